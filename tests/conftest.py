"""The whole run sees eight host devices, and checks every annotated shape and dtype."""

import os

# Before jax is imported: data-parallel tests need a mesh.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook(["hashml", "hashml_kernels", "experiments"], "beartype.beartype")
