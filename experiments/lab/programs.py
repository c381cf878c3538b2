"""Compiled programs that a long run no longer needs."""

import gc
import sys
from pathlib import Path

from experiments.lab.allocator import return_freed_memory

MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 8_000
"""Linux lets a process have 65,530 (vm.max_map_count); XLA crashes when it gets no more for a program. At 24,000 a
worker of the test-suite held 5 GB."""


def forget_programs(most: int = MOST_MAPPINGS) -> bool:
    """Clear the caches of jax if this process has more memory mappings than ``most``; whether it did.

    Every compiled program takes some for as long as jax keeps it, which is for ever, and a run that compiles some
    hundred large ones would end in a crash. What is needed again is compiled again. Elsewhere than under Linux, and
    before jax is imported, nothing happens.
    """
    jax = sys.modules.get("jax")
    if jax is None or not MAPPINGS.exists() or MAPPINGS.read_bytes().count(b"\n") <= most:
        return False
    jax.clear_caches()
    gc.collect()
    return_freed_memory()
    return True
