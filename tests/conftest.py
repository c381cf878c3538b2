"""The whole run sees eight host devices, and checks every annotated shape and dtype."""

import gc
import os
from pathlib import Path

import pytest

# Before jax is imported: data-parallel tests need a mesh.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling programs that run once. `make test-newer` compiles them in full.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook(["hashml", "hashml_kernels", "experiments"], "beartype.beartype")

MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 20_000
"""Linux lets a process have 65,530 (vm.max_map_count); XLA crashes when it gets no more for a program."""


@pytest.fixture(scope="module", autouse=True)
def old_programs_are_forgotten():
    """Every compiled program takes some mappings for as long as jax keeps it, which is for ever."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()
