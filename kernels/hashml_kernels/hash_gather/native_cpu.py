"""The op by native code on a CPU: XLA hashes, ``native_cpu.cc`` copies or adds whole blocks.

XLA's gather reads a block a number at a time. Where blocks are long enough to be copied at once, a lookup takes half
the time of XLA's, about what a copy of its output takes, and a bag a third. The file is compiled on first use
(`hashml_kernels.native`); without a compiler XLA serves, and says so once.

A custom call is opaque to XLA's partitioner, which would gather sharded ids on every device, and to `jax.export`.
`serves` therefore says yes only in a process with one device, outside of `jax.shard_map`, and for a lookup that is
worth it; ``implementation="xla"`` always keeps it out.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels import bits
from hashml_kernels.annotations import Array, Float
from hashml_kernels.hash_gather import xla
from hashml_kernels.hash_gather.geometry import BlockGeometry
from hashml_kernels.native_xla import XlaFunctions

FUNCTIONS = XlaFunctions(
    Path(__file__).with_suffix(".cc"),
    ("hashml_hash_gather", "hashml_hash_gather_bag"),
    "Lookups of hashed blocks run without native code, by XLA's slower gather",
)
LEAST = 2**18
"""Numbers that a lookup must read to be worth a compiler's seconds."""
_SHORTEST = 8
_DTYPES = {"gather": ("float32", "bfloat16", "float16"), "gather_bag": ("float32",)}


def check(op: str, *operands: Any, geometry: BlockGeometry) -> None:
    """Returns if the native code serves these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for a scatter, signs, ids in limbs, or another dtype.
    """
    memory, ids, *weights = operands
    if op not in _DTYPES:
        raise NotImplementedError(f"{op} has no native code; gather and gather_bag have")
    if geometry.sign != "none":
        raise NotImplementedError(f"sign is {geometry.sign!r}; the native code has none")
    if isinstance(ids, bits.Limbs):
        raise NotImplementedError("ids are bits.Limbs; the native code takes ids of 32 bits")
    for name, array in zip(("memory", "weights"), (memory, *weights), strict=False):
        if array is not None and array.dtype not in _DTYPES[op]:
            raise NotImplementedError(f"{name} has dtype {array.dtype}; the native {op} takes {_DTYPES[op]}")


def serves(op: str, *operands: Any, geometry: BlockGeometry) -> bool:
    """Whether the native code is there, serves these operands, and is the better choice."""
    try:
        check(op, *operands, geometry=geometry)
    except NotImplementedError:
        return False
    memory, ids, *_ = operands
    worth = geometry.block_size >= _SHORTEST and ids.size * geometry.features >= LEAST
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    manual = any(jax.typeof(array).manual_axis_type.varying for array in (memory, ids))
    return worth and alone and not manual and FUNCTIONS.available()


def gather(
    memory: Float[Array, " budget"], ids: bits.Words, geometry: BlockGeometry, *, valid: Array | None = None
) -> Float[Array, "n features"]:
    """Rows ``ids`` of the virtual table; NaN for those that are not ``valid``."""
    bases = xla.bases(ids, geometry, materialise=True)
    if valid is not None:
        bases = jnp.where(valid[:, None], bases, -1)
    out = jax.ShapeDtypeStruct((ids.shape[0], geometry.features), memory.dtype)
    return FUNCTIONS.call("hashml_hash_gather", out, memory, bases, block=np.int64(geometry.block_size))


def gather_bag(
    memory: Float[Array, " budget"],
    ids: bits.Words,
    weights: Float[Array, "n members"] | None,
    geometry: BlockGeometry,
) -> Float[Array, "n features"]:
    """Weighted sums of rows over the members of each bag."""
    bases = xla.bases(ids.reshape(ids.size), geometry, materialise=True).reshape(*ids.shape, geometry.blocks)
    # The handler takes no weights as an empty array.
    factors = jnp.zeros(0, jnp.float32) if weights is None else weights
    out = jax.ShapeDtypeStruct((ids.shape[0], geometry.features), memory.dtype)
    return FUNCTIONS.call("hashml_hash_gather_bag", out, memory, bases, factors, block=np.int64(geometry.block_size))
