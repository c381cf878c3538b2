"""The native half of NoMAD-Attention: ``nomad_native.cc``, compiled on first use, called through `jax.ffi`.

    sums[n] = sum_s tables[s, code[s, n]]     in uint16, by shuffles of bytes (AVX-512, AVX2), else by a plain loop

XLA has no shuffle of bytes, and a gather from 16 entries costs it more than the products that it replaces. The
compiler is ``$CXX``, else the first of c++, g++ and clang++ that works. What it makes lies in the user's cache,
``$XDG_CACHE_HOME/hashml/native`` or ``~/.cache/hashml/native``, under a hash of source, flags, compiler, processor
and jaxlib. Nothing here is needed to install or import the library: without a compiler `available` is false, a
warning is logged once, and callers take XLA's path.

Work is shared with the threads of XLA's own pool, in units that do not depend on their number, so that they change no
bit of a result.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.ffi
import jax.numpy as jnp
import jaxlib
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8, UInt16

Level = Literal["auto", "scalar", "avx2", "avx512"]
"""Instructions to use; those that the processor lacks are replaced by the next best. ``"auto"``: the best."""

LEVELS: tuple[Level, ...] = ("auto", "scalar", "avx2", "avx512")
SOURCE = Path(__file__).with_suffix(".cc")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-Wno-psabi")
_SECONDS = 300
_log = logging.getLogger(__name__)


class NativeUnavailable(RuntimeError):
    """No compiler has made the library here; the message says what was tried."""


def available() -> bool:
    """Whether there is a library, which is compiled now where there is none yet. Why not is logged once."""
    return _loaded()[0] is not None


def best_level() -> Level:
    """The best instructions of this processor.

    Raises:
        NativeUnavailable: without a library.
    """
    return LEVELS[_library().hashml_nomad_level()]


def lookup_sums(
    tables: UInt8[Array, "R J S 16"], codes: UInt8[Array, "R blocks S 16"], *, level: Level = "auto"
) -> UInt16[Array, "R J slots"]:
    """Each key's table entries added up, modulo 2^16; ``slots`` is 32 a block.

    Args:
        tables: of J queries that read the same codes.
        codes: in blocks of 32 keys, as `hashml.attention.nomad.pack_blocks` lays them.
        level: of instructions; the result is the same.

    Raises:
        NativeUnavailable: without a library.
    """
    _library()
    rows, group = tables.shape[:2]
    out = jax.ShapeDtypeStruct((rows, group, 32 * codes.shape[1]), jnp.uint16)
    call = jax.ffi.ffi_call("hashml_nomad_scores", out, vmap_method="sequential")
    return call(tables, codes, level=_number(level))


def attend(
    tables: UInt8[Array, "R J S 16"],
    slope: Float32[Array, "R J"],
    codes: UInt8[Array, "R blocks S 16"],
    values: Float32[Array, "R N V"],
    length: Int32[Array, " R"],
    *,
    level: Level = "auto",
) -> Float32[Array, "R J V"]:
    """``softmax(slope * sums) values`` over the first ``length`` keys of each row; 0 where there is none.

    Args:
        tables, codes, level: as `lookup_sums`.
        slope: what a logit rises by for each unit of a sum.
        values: of the keys.
        length: keys that are seen; clipped to what there is.

    Raises:
        NativeUnavailable: without a library.
    """
    _library()
    out = jax.ShapeDtypeStruct((*tables.shape[:2], values.shape[2]), jnp.float32)
    call = jax.ffi.ffi_call("hashml_nomad_attend", out, vmap_method="sequential")
    return call(tables, slope, codes, values, length, level=_number(level))


def _number(level: Level) -> np.int32:
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; allowed are {', '.join(map(repr, LEVELS))}")
    return np.int32(LEVELS.index(level))


# --- compiling ----------------------------------------------------------------------------------------


def _library() -> ctypes.CDLL:
    library, reason = _loaded()
    if library is None:
        raise NativeUnavailable(f"there is no native library: {reason}")
    return library


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library with its functions made known to XLA, or why there is none."""
    try:
        library = ctypes.CDLL(str(build(cache_folder(), compilers())))
        for name in ("hashml_nomad_scores", "hashml_nomad_attend"):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except (NativeUnavailable, OSError) as error:
        _log.warning("NoMAD-Attention runs without its native look-ups, by XLA's slower ones: %s", error)
        return None, str(error)
    return library, ""


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
    folder: Path, commands: list[list[str]], run: Callable[..., "subprocess.CompletedProcess[str]"] = subprocess.run
) -> Path:
    """The library in ``folder``, compiled with the first command that works unless it is there.

    It is written beside its place and then moved there, so that processes that begin together do not disturb one
    another.

    Raises:
        NativeUnavailable: if no command works.
        OSError: if nothing can be written.
    """
    tried = []
    for command in commands:
        target = folder / f"nomad-{_fingerprint(command)}.so"
        if target.is_file():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f"{target.name}.{os.getpid()}.{secrets.token_hex(4)}"
        arguments: list[Any] = [*command, *FLAGS, f"-I{jax.ffi.include_dir()}", SOURCE, "-o", beside]
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


def _fingerprint(command: list[str]) -> str:
    parts = (SOURCE.read_text(), *FLAGS, *command, platform.system(), platform.machine(), jaxlib.__version__)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
