"""The op by XLA on any platform: a block of the list is gathered at a time, and sums of blocks are merged.

Gathered rows are written and read again, so that about three times the bytes of the rows cross the bus.
"""

import jax.numpy as jnp
from jax import lax

from hashml_kernels.annotations import Array
from hashml_kernels.sparse_decode.lists import Operands, Partial, merge, tokens
from hashml_kernels.sparse_decode.reference import rows_partial

BLOCK_FLOATS = 2**20
"""Numbers of keys that are gathered at a time: 4 MiB in float32."""
LEAST_SLOTS = 128
"""Slots of a block at least, where many rows and lists share those numbers."""


def block_slots(operands: Operands) -> int:
    """Slots of a block."""
    batch, lists = operands.q.shape[:2]
    return max(LEAST_SLOTS, BLOCK_FLOATS // max(batch * lists * operands.q.shape[3], 1))


def partial(operands: Operands, *, page: int, scale: float) -> Partial:
    """The sums over the whole list."""
    operands = tokens(operands, page)
    size, entries = block_slots(operands), operands.idx.shape[2]
    if entries <= size:
        return rows_partial(operands, scale)

    def blocks(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, -entries % size)))
        return jnp.moveaxis(padded.reshape(*x.shape[:2], -1, size), 2, 0)

    def block(lists: tuple[Array, Array, Array]) -> Partial:
        idx, valid, weight = lists
        return rows_partial(operands._replace(idx=idx, valid=valid, weight=weight), scale)

    return merge(lax.map(block, tuple(map(blocks, (operands.idx, operands.valid, operands.weight)))), axis=0)
