"""The op by XLA on any platform: look-ups in soft tables, one table of all keys at a time."""

import jax
import jax.numpy as jnp

from hashml_kernels.manual_axes import varying_alike
from hashml_kernels.soft_collision_score.operands import Operands, Scores, blockwise, judged, piece_tables, pieces_of

MOST_BITS = 8
"""Of a piece: codes of a byte are looked up once."""


def scores(operands: Operands, block: int) -> Scores:
    """Nothing but the codes has an entry for every table and key."""
    alike, _ = varying_alike(*operands)
    operands = Operands(*alike)
    batch, heads, queries, tables, bits, slots = operands.sizes
    pieces = pieces_of(bits, MOST_BITS)
    parts = piece_tables(operands.logits, pieces)

    def add(place: jax.Array, totals: jax.Array) -> jax.Array:
        code = jax.lax.dynamic_slice_in_dim(operands.codes, place, 1, axis=2).astype(jnp.int32)
        chance = 1.0
        for piece, part in zip(pieces, parts, strict=True):
            own = jax.lax.dynamic_index_in_dim(part, place, axis=3, keepdims=False)
            chance = chance * jnp.take_along_axis(own, piece.of(code), axis=3, mode="clip")
        return totals + chance

    start = jnp.zeros((batch, heads, queries, slots), jnp.float32)
    (_, start), _ = varying_alike(operands.codes, start)
    totals = jax.lax.fori_loop(0, tables, add, start)
    norms = jnp.ones((), jnp.float32) if operands.norms is None else operands.norms.astype(jnp.float32)[:, :, None]
    return blockwise(judged(totals, norms, operands.threshold[..., None]), block)
