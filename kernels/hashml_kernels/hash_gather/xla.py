"""The op for XLA: one hash a block, then copies (or additions) of whole runs.

What exists at run time is one base a block looked up, and the output; never an array of the virtual
table's size nor one with an entry for each of its rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hashml_kernels import bits
from hashml_kernels.annotations import Array, Float, Int
from hashml_kernels.hash_gather.geometry import BlockGeometry, block_bases, block_signs

_FEW_ROWS = 2048
"""Up to here a hash is not worth keeping apart."""

_SHORT_STEP = 2**14
"""Floats a step of a loop over members must add up to be worth its overhead."""

_IN_BOUNDS = lax.GatherScatterMode.PROMISE_IN_BOUNDS


def bases(
    ids: bits.Words | bits.Limbs, geometry: BlockGeometry, *, materialise: bool = False
) -> Int[Array, "n blocks"]:
    """First slots of the blocks of ``n`` rows.

    XLA's CPU compiler fuses the hash into the copy that follows and then computes it once a coordinate
    rather than once a block, four times slower at Z = 32. It drops a barrier before it fuses, but does not
    fuse out of a branch: ``materialise`` hashes in one whose condition is hidden behind such a barrier.
    """
    block = np.arange(geometry.blocks, dtype=np.uint32)

    def hashed(ids: bits.Words | bits.Limbs) -> Int[Array, "n blocks"]:
        rows = jax.tree.map(lambda word: word[:, None], ids)
        return jnp.asarray(block_bases(geometry, rows, block)).astype(jnp.int32)

    def never(ids: bits.Words | bits.Limbs) -> Int[Array, "n blocks"]:
        # Zeros made of the ids, so that both branches vary over the same axes of a mesh.
        column = jax.tree.leaves(ids)[0][:, None]
        return (column ^ column).astype(jnp.int32) + jnp.zeros((1, geometry.blocks), jnp.int32)

    if not materialise or jax.tree.leaves(ids)[0].shape[0] <= _FEW_ROWS:
        return hashed(ids)
    return lax.cond(lax.optimization_barrier(jnp.bool_(True)), hashed, never, ids)


def gather(
    memory: Float[Array, " budget"],
    ids: bits.Words | bits.Limbs,
    geometry: BlockGeometry,
    *,
    materialise: bool = False,
) -> Float[Array, "n features"]:
    """Rows ``ids`` of the virtual table."""
    # Blocks of a few coordinates are hashed as fast as they are written down and read back.
    apart = materialise and geometry.block_size >= 8
    place = bases(ids, geometry, materialise=apart)[:, :, None]
    place = place + jnp.arange(geometry.block_size, dtype=jnp.int32)
    if geometry.may_wrap:
        place = jnp.where(place >= geometry.budget, place - geometry.budget, place)
    rows = memory.at[place].get(mode="promise_in_bounds")
    rows = rows.reshape(place.shape[0], place.shape[1] * place.shape[2])[:, : geometry.features]
    return _signed(rows, ids, geometry)


def scatter(
    gradients: Float[Array, "n features"],
    ids: bits.Words | bits.Limbs,
    geometry: BlockGeometry,
    *,
    materialise: bool = False,
) -> Float[Array, " budget"]:
    """The transpose of `gather`, float32: whole blocks are added to a memory with a tail for the wrap."""
    return _folded(_add_blocks(_extended_zeros(geometry), gradients, ids, geometry, materialise), geometry)


def _extended_zeros(geometry: BlockGeometry) -> Float[Array, " extended"]:
    tail = geometry.block_size - 1 if geometry.may_wrap else 0
    return jnp.zeros(geometry.budget + tail, jnp.float32)


def _add_blocks(
    extended: Float[Array, " extended"],
    gradients: Float[Array, "n features"],
    ids: bits.Words | bits.Limbs,
    geometry: BlockGeometry,
    materialise: bool,
) -> Float[Array, " extended"]:
    n, size = gradients.shape[0], geometry.block_size
    signed = _signed(gradients.astype(jnp.float32), ids, geometry)
    padding = geometry.blocks * size - geometry.features
    if padding:
        signed = jnp.pad(signed, ((0, 0), (0, padding)))
    windows = lax.ScatterDimensionNumbers(
        update_window_dims=(1,), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
    )
    return lax.scatter_add(
        extended,
        bases(ids, geometry, materialise=materialise).reshape(-1, 1),
        signed.reshape(n * geometry.blocks, size),
        windows,
        mode=_IN_BOUNDS,
    )


def _folded(extended: Float[Array, " extended"], geometry: BlockGeometry) -> Float[Array, " budget"]:
    """The tail of blocks that ran over the end, added to the head."""
    tail = extended.shape[0] - geometry.budget
    return extended[: geometry.budget].at[:tail].add(extended[geometry.budget :]) if tail else extended


def _signed(rows: Float[Array, "n features"], ids: bits.Words | bits.Limbs, geometry: BlockGeometry):
    if geometry.sign == "none":
        return rows
    column = jax.tree.map(lambda word: word[:, None], ids)
    negative = block_signs(geometry, column, np.arange(geometry.features, dtype=np.uint32))
    return jnp.where(negative != 0, -rows, rows)


def gather_bag(
    memory: Float[Array, " budget"],
    ids: bits.Words | bits.Limbs,
    weights: Float[Array, "n members"] | None,
    geometry: BlockGeometry,
    *,
    materialise: bool = False,
) -> Float[Array, "n features"]:
    """Weighted sums of rows over the members of each bag, added up in float32."""
    n, members = jax.tree.leaves(ids)[0].shape
    if materialise and _member_by_member(n, members, geometry):

        def rows_of(ids: bits.Words | bits.Limbs, weights: Float[Array, " n"] | None) -> Float[Array, "n features"]:
            rows = gather(memory, ids, geometry, materialise=True).astype(jnp.float32)
            return rows if weights is None else rows * weights.astype(jnp.float32)[:, None]

        first, others = _first_and_others(ids, weights)
        sums, _ = lax.scan(lambda sums, member: (sums + rows_of(*member), None), rows_of(*first), others)
        return sums.astype(memory.dtype)
    flat = jax.tree.map(lambda word: word.reshape(-1), ids)
    rows = gather(memory, flat, geometry, materialise=materialise).reshape(n, members, geometry.features)
    if weights is None:
        return rows.sum(axis=1, dtype=jnp.float32).astype(memory.dtype)
    # By default GPUs multiply float32 with 10 bits of mantissa, and TPUs with 7.
    sums = jnp.einsum("blf,bl->bf", rows, weights, precision="highest", preferred_element_type=jnp.float32)
    return sums.astype(memory.dtype)


def scatter_bag(
    gradients: Float[Array, "n features"],
    ids: bits.Words | bits.Limbs,
    weights: Float[Array, "n members"] | None,
    geometry: BlockGeometry,
    *,
    materialise: bool = False,
) -> Float[Array, " budget"]:
    """The transpose of `gather_bag` in the memory, float32; XLA may write the gradient once a member."""
    n, members = jax.tree.leaves(ids)[0].shape
    gradients = gradients.astype(jnp.float32)
    if materialise and _member_by_member(n, members, geometry):

        def add(extended: Array, ids: bits.Words | bits.Limbs, weights: Float[Array, " n"] | None) -> Array:
            weighted = gradients if weights is None else gradients * weights.astype(jnp.float32)[:, None]
            return _add_blocks(extended, weighted, ids, geometry, True)

        first, others = _first_and_others(ids, weights)
        start = add(_extended_zeros(geometry), *first)
        extended, _ = lax.scan(lambda extended, member: (add(extended, *member), None), start, others)
        return _folded(extended, geometry)
    spread = jnp.broadcast_to(gradients[:, None, :], (n, members, geometry.features))
    if weights is not None:
        spread = spread * weights.astype(jnp.float32)[:, :, None]
    flat = jax.tree.map(lambda word: word.reshape(-1), ids)
    return scatter(spread.reshape(-1, geometry.features), flat, geometry, materialise=materialise)


def _member_by_member(n: int, members: int, geometry: BlockGeometry) -> bool:
    """Whether bags are added up in a loop over members, so that no array has a row a member.

    On a CPU that saves writing and reading those rows, which takes longer than to look them up.
    """
    return members > 1 and n * geometry.features >= _SHORT_STEP


def _first_and_others(
    ids: bits.Words | bits.Limbs, weights: Float[Array, "n members"] | None
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Ids and weights of the first member of all bags, and of the others with the member as first axis."""
    columns = jax.tree.map(jnp.transpose, (ids, weights))
    return jax.tree.map(lambda x: x[0], columns), jax.tree.map(lambda x: x[1:], columns)
