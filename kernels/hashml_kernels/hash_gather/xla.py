"""The op for XLA: one hash a block, then copies (or additions) of whole runs.

What exists at run time is one base a block looked up, and the output; never an array of the virtual
table's size nor one with an entry for each of its rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hashml_kernels import bits
from hashml_kernels.annotations import Array, Float, Int
from hashml_kernels.hash_gather.geometry import BlockGeometry, block_bases, block_signs

_HASH_CHUNK = 2048
_IN_BOUNDS = lax.GatherScatterMode.PROMISE_IN_BOUNDS


def bases(
    ids: bits.Words | bits.Limbs, geometry: BlockGeometry, *, materialise: bool = False
) -> Int[Array, "n blocks"]:
    """First slots of the blocks of ``n`` rows.

    XLA's CPU compiler fuses the hash into the copy that follows and then computes it once a coordinate
    rather than once a block, three times slower at Z = 32; it has no barrier that would stop it, but it
    does not fuse through a loop. ``materialise`` therefore hashes in a short loop over chunks.
    """
    block = np.arange(geometry.blocks, dtype=np.uint32)

    def of(chunk: bits.Words | bits.Limbs) -> Int[Array, "n blocks"]:
        chunk = jax.tree.map(lambda word: word[:, None], chunk)
        return jnp.asarray(block_bases(geometry, chunk, block)).astype(jnp.int32)

    n = jax.tree.leaves(ids)[0].shape[0]
    if not materialise or n <= _HASH_CHUNK:
        return of(ids)
    chunks = -(-n // _HASH_CHUNK)
    padded = jax.tree.map(lambda word: jnp.pad(word, (0, chunks * _HASH_CHUNK - n)), ids)
    hashed = lax.map(of, jax.tree.map(lambda word: word.reshape(chunks, _HASH_CHUNK), padded))
    return hashed.reshape(chunks * _HASH_CHUNK, geometry.blocks)[:n]


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
    n, size = gradients.shape[0], geometry.block_size
    signed = _signed(gradients.astype(jnp.float32), ids, geometry)
    padding = geometry.blocks * size - geometry.features
    if padding:
        signed = jnp.pad(signed, ((0, 0), (0, padding)))
    tail = size - 1 if geometry.may_wrap else 0
    windows = lax.ScatterDimensionNumbers(
        update_window_dims=(1,), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
    )
    extended = lax.scatter_add(
        jnp.zeros(geometry.budget + tail, jnp.float32),
        bases(ids, geometry, materialise=materialise).reshape(-1, 1),
        signed.reshape(n * geometry.blocks, size),
        windows,
        mode=_IN_BOUNDS,
    )
    if not tail:
        return extended
    return extended[: geometry.budget].at[:tail].add(extended[geometry.budget :])


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
    spread = jnp.broadcast_to(gradients.astype(jnp.float32)[:, None, :], (n, members, geometry.features))
    if weights is not None:
        spread = spread * weights.astype(jnp.float32)[:, :, None]
    flat = jax.tree.map(lambda word: word.reshape(-1), ids)
    return scatter(spread.reshape(-1, geometry.features), flat, geometry, materialise=materialise)
