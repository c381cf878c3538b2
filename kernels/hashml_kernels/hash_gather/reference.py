"""The definition of the op in plain jnp; what every backend must equal. Any mode of autodiff works."""

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels import bits
from hashml_kernels.annotations import Array, Float
from hashml_kernels.hash_gather.geometry import BlockGeometry, block_bases, block_signs


def slots(ids: bits.Words | bits.Limbs, geometry: BlockGeometry) -> bits.Words:
    """The slot, uint32 ``[*batch, features]``, that holds each coordinate of the rows ``ids``."""
    ids = jax.tree.map(lambda word: word[..., None], ids)
    coordinate = np.arange(geometry.features, dtype=np.uint32)
    inside = coordinate % np.uint32(geometry.block_size)
    place = block_bases(geometry, ids, coordinate // np.uint32(geometry.block_size)) + inside
    return place % np.uint32(geometry.budget)


def signs(ids: bits.Words | bits.Limbs, geometry: BlockGeometry) -> bits.Words:
    """-1 or 1, float32 ``[*batch, features]``, of each coordinate of the rows ``ids``; 1 without signs."""
    ids = jax.tree.map(lambda word: word[..., None], ids)
    coordinate = np.arange(geometry.features, dtype=np.uint32)
    if geometry.sign == "none":
        shape = np.broadcast_shapes(jax.tree.leaves(ids)[0].shape, coordinate.shape)
        return np.ones(shape, np.float32)
    return 1 - 2 * block_signs(geometry, ids, coordinate).astype(np.float32)


def gather(
    memory: Float[Array, " budget"], ids: bits.Words | bits.Limbs, geometry: BlockGeometry
) -> Float[Array, "*batch features"]:
    """Rows ``ids`` of the virtual table."""
    rows = memory[slots(ids, geometry).astype(jnp.int32)]
    return rows if geometry.sign == "none" else rows * signs(ids, geometry).astype(memory.dtype)


def gather_bag(
    memory: Float[Array, " budget"],
    ids: bits.Words | bits.Limbs,
    weights: Float[Array, "*batch members"] | None,
    geometry: BlockGeometry,
) -> Float[Array, "*batch features"]:
    """Weighted sums of rows over the last axis of ``ids``, added up in float32."""
    rows = gather(memory, ids, geometry).astype(jnp.float32)
    if weights is not None:
        rows = rows * weights.astype(jnp.float32)[..., None]
    return rows.sum(axis=-2).astype(memory.dtype)


def scatter(
    gradients: Float[Array, "*batch features"], ids: bits.Words | bits.Limbs, geometry: BlockGeometry
) -> Float[Array, " budget"]:
    """The transpose of `gather`: each slot's sum of the gradients of its coordinates, float32."""
    signed = gradients.astype(jnp.float32) * signs(ids, geometry)
    memory = jnp.zeros(geometry.budget, jnp.float32)
    return memory.at[slots(ids, geometry).astype(jnp.int32)].add(signed)


def scatter_bag(
    gradients: Float[Array, "*batch features"],
    ids: bits.Words | bits.Limbs,
    weights: Float[Array, "*batch members"] | None,
    geometry: BlockGeometry,
) -> Float[Array, " budget"]:
    """The transpose of `gather_bag` in the memory, float32."""
    shape = (*jax.tree.leaves(ids)[0].shape, geometry.features)
    spread = jnp.broadcast_to(gradients.astype(jnp.float32)[..., None, :], shape)
    if weights is not None:
        spread = spread * weights.astype(jnp.float32)[..., None]
    return scatter(spread, ids, geometry)
