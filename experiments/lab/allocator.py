"""The C library's memory: times that do not depend on where it puts an array, and what it gives back."""

import ctypes
import ctypes.util
import sys

# Parameters of mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Ask glibc for one arena that hands freed memory out again, instead of returning it to the system.

    By default the threads of XLA allocate from arenas that shrink whenever a result of some megabytes is
    freed, and the next one is made of fresh pages: a training step with three temporaries of 16 MB takes
    20 ms or 5 by which thread ran it. Threads keep the arena they began with, so this must be called before
    JAX starts; ``MALLOC_ARENA_MAX=1`` in the environment has most of the effect. Elsewhere than under
    glibc it does nothing.
    """
    library = ctypes.util.find_library("c") if sys.platform == "linux" else None
    mallopt = getattr(ctypes.CDLL(library), "mallopt", None) if library else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Ask glibc to give the system back what is free in all arenas; elsewhere it does nothing."""
    library = ctypes.util.find_library("c") if sys.platform == "linux" else None
    trim = getattr(ctypes.CDLL(library), "malloc_trim", None) if library else None
    if trim is not None:
        trim(0)
