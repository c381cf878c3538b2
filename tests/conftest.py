"""The whole run sees eight host devices, and checks every annotated shape and dtype."""

import os

import pytest

# Before jax is imported: data-parallel tests need a mesh.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling programs that run once. `make test-newer` compiles them in full.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook(["hashml", "hashml_kernels", "experiments"], "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def old_programs_are_forgotten():
    """A worker compiles more than a process can hold."""
    yield
    # Not before the hook above is there.
    from experiments.lab.programs import forget_programs

    forget_programs()
