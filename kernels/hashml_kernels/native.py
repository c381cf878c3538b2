"""Native code without an installation: one C++ file beside a module, compiled on first use, kept in a cache.

    library = ctypes.CDLL(str(build(SOURCE, cache_folder(), compilers())))

The compiler is ``$CXX``, else the first of c++, g++ and clang++ that works. What it makes lies in the user's cache,
``$XDG_CACHE_HOME/hashml/native`` or ``~/.cache/hashml/native``, under a hash of source, flags, compiler, processor
and of what the source includes. Nothing here is needed to install or import the library: who calls has another path
for machines where nothing compiles.
"""

import contextlib
import hashlib
import os
import platform
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
THREADS = Path(__file__).with_name("native_threads.h")
"""Work on the threads of XLA's pool, for sources that XLA calls."""
_SECONDS = 300


class NativeUnavailable(RuntimeError):
    """No compiler has made the library here; the message says what was tried."""


def cache_folder() -> Path:
    """Where libraries are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "hashml" / "native"


def compilers() -> list[list[str]]:
    """Commands to try, in order."""
    named = os.environ.get("CXX")
    commands = [shlex.split(named)] if named else []
    return [*commands, *([found] for name in ("c++", "g++", "clang++") if (found := shutil.which(name)))]


def build(
    source: Path,
    folder: Path,
    commands: list[list[str]],
    *,
    flags: tuple[str, ...] = FLAGS,
    headers: tuple[Path, ...] = (),
    includes: tuple[str, ...] = (),
    version: str = "",
    run: Callable[..., "subprocess.CompletedProcess[str]"] = subprocess.run,
) -> Path:
    """The library of a source in ``folder``, compiled with the first command that works unless it is there.

    It is written beside its place and then moved there, so that processes that begin together do not disturb one
    another.

    Args:
        source: a C++ file; its name, less ``_native``, begins the library's.
        folder: is made where it is missing.
        commands: compilers, each with its own arguments.
        flags: of the compiler.
        headers: of hashml that the source includes by name; part of what the library is named by.
        includes: folders of other headers.
        version: of what lies in these folders.
        run: starts a compiler.

    Raises:
        NativeUnavailable: if no command works.
        OSError: if nothing can be written.
    """
    tried = []
    folders = (*includes, *(header.parent for header in headers))
    for command in commands:
        name = f"{source.stem.removesuffix('_native')}-{_fingerprint((source, *headers), flags, command, version)}.so"
        target = folder / name
        if target.is_file():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f"{name}.{os.getpid()}.{secrets.token_hex(4)}"
        arguments: list[Any] = [*command, *flags, *(f"-I{path}" for path in folders), source, "-o", beside]
        try:
            done = run([str(x) for x in arguments], capture_output=True, text=True, timeout=_SECONDS, check=False)
            if done.returncode == 0:
                os.replace(beside, target)
                return target
            said = (done.stderr or "").strip().splitlines()
            tried.append(f"{shlex.join(command)}: {next((x for x in said if 'error' in x), 'it failed')}")
        except (OSError, subprocess.SubprocessError) as error:
            tried.append(f"{shlex.join(command)}: {error}")
        finally:
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()
    raise NativeUnavailable("; ".join(tried) or "no C++ compiler was found (c++, g++, clang++, or one named by $CXX)")


def _fingerprint(sources: tuple[Path, ...], flags: tuple[str, ...], command: list[str], version: str) -> str:
    parts = (
        *(source.read_text() for source in sources),
        *flags,
        *command,
        platform.system(),
        platform.machine(),
        version,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
