"""Native functions that XLA calls on a CPU: handlers in a C++ file, compiled on first use (`hashml_kernels.native`).

    FUNCTIONS = XlaFunctions(SOURCE, ("hashml_nomad_scores",), "NoMAD-Attention runs without its native look-ups")
    if FUNCTIONS.available():
        scores = FUNCTIONS.call("hashml_nomad_scores", shape, tables, codes, level=np.int32(0))

Handlers share work with the threads of XLA's own pool (``native_threads.h``).
"""

import ctypes
import dataclasses
import functools
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.ffi
import jaxlib

from hashml_kernels import native
from hashml_kernels.native import NativeUnavailable

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class XlaFunctions:
    """The handlers of a file.

    Attributes:
        source: the file.
        names: symbols of its handlers, by which XLA knows them, too.
        without: what is logged, once, where there is no library; the reason follows.
        flags: of the compiler.
    """

    source: Path
    names: tuple[str, ...]
    without: str
    flags: tuple[str, ...] = (*native.FLAGS, "-pthread", "-Wno-psabi")

    def available(self) -> bool:
        """Whether there is a library, which is compiled now where there is none yet. Why not is logged once."""
        return load(self)[0] is not None

    def library(self) -> ctypes.CDLL:
        """The library, for symbols beside the handlers.

        Raises:
            NativeUnavailable: without one.
        """
        library, reason = load(self)
        if library is None:
            raise NativeUnavailable(f"there is no native library: {reason}")
        return library

    def call(self, name: str, result: Any, *operands: Any, **attributes: Any) -> Any:
        """What a handler makes of arrays; under `jax.vmap` it is called once for each of them.

        Args:
            name: of the handler.
            result: its shape and dtype, as `jax.ffi.ffi_call` takes them.
            *operands: arrays.
            **attributes: NumPy numbers.

        Raises:
            NativeUnavailable: without a library.
        """
        self.library()
        return jax.ffi.ffi_call(name, result, vmap_method="sequential")(*operands, **attributes)

    def build(
        self,
        folder: Path,
        commands: list[list[str]],
        run: Callable[..., "subprocess.CompletedProcess[str]"] = subprocess.run,
    ) -> Path:
        """The library in ``folder``, as `hashml_kernels.native.build` makes it.

        Raises:
            NativeUnavailable: if no command works.
            OSError: if nothing can be written.
        """
        return native.build(
            self.source, folder, commands, flags=self.flags, headers=(native.THREADS,),
            includes=(jax.ffi.include_dir(),), version=jaxlib.__version__, run=run,
        )  # fmt: skip


@functools.cache
def load(functions: XlaFunctions) -> tuple[ctypes.CDLL | None, str]:
    """The library with its functions made known to XLA, or why there is none."""
    try:
        library = ctypes.CDLL(str(functions.build(native.cache_folder(), native.compilers())))
        for name in functions.names:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except (NativeUnavailable, OSError) as error:
        _log.warning("%s: %s", functions.without, error)
        return None, str(error)
    return library, ""
