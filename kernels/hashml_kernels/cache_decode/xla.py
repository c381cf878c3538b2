"""The op by XLA on any platform: blocks of slots are decoded one by one, so that no copy of the cache exists.

Each block is decoded in full before it is multiplied, which XLA writes and reads again: `BLOCK_FLOATS` of keys, and
as many of values, at a time. That saves memory, and no traffic.
"""

import math

import jax.numpy as jnp
from jax import lax

from hashml_kernels.annotations import Array
from hashml_kernels.cache_decode.formats import (
    MASKED,
    Coupled,
    DecodeGeometry,
    Format,
    Leaves,
    Operands,
    granularity,
)
from hashml_kernels.cache_decode.reference import decode, keys_of, seen
from hashml_kernels.manual_axes import varying_alike

BLOCK_FLOATS = 2**20
"""Numbers of keys that are decoded at a time: 4 MiB."""
LEAST_SLOTS = 64
"""Slots of a block at least, where many rows and heads share those numbers."""


def block_slots(operands: Operands, geometry: DecodeGeometry) -> int:
    """Slots of a block: a multiple of those that share a scale, and no more than there are."""
    batch, heads, _, slots, width = operands.sizes
    unit = math.lcm(granularity(geometry.keys), granularity(geometry.values))
    wanted = max(LEAST_SLOTS, BLOCK_FLOATS // max(batch * heads * width, 1))
    return min(-(-wanted // unit) * unit, slots)


def partials(operands: Operands, geometry: DecodeGeometry) -> tuple[Array, Array]:
    """``(out [B, H, J, 1, D], lse [B, H, J, 1])``: the attention over the store alone, in one part."""
    alike, _ = varying_alike(*operands)
    operands = Operands(*alike)
    batch, heads, queries, slots, width = operands.sizes
    most = jnp.full((batch, heads, queries), MASKED, jnp.float32)
    start = (most, jnp.zeros_like(most), jnp.zeros((batch, heads, queries, width), jnp.float32))
    (_, start), _ = varying_alike(operands.q, start)
    size = block_slots(operands, geometry)

    def block(state, index):
        # The last block begins early and leaves out what another has seen.
        first = jnp.minimum(index * size, slots - size)
        part = operands._replace(
            keys=slots_of(geometry.keys, operands.keys, first, size),
            values=slots_of(geometry.values, operands.values, first, size),
            pos=lax.dynamic_slice_in_dim(operands.pos, first, size, 2),
        )
        fresh = first + jnp.arange(size, dtype=jnp.int32) >= index * size
        held = seen(part.pos, part.query_pos, geometry.sliding_window) & fresh
        valid = held[:, :, None]
        logits = jnp.einsum("bhjd,bhcd->bhjc", part.q, keys_of(part, geometry), precision="highest")
        logits = jnp.where(valid, logits, MASKED)
        most, total, out = state
        higher = jnp.maximum(most, logits.max(axis=-1))
        kept = jnp.exp(most - higher)
        probs = jnp.where(valid, jnp.exp(logits - higher[..., None]), 0.0)
        # Zero times what lies in an empty slot may be NaN; XLA decodes and selects in one loop.
        values = jnp.where(held[..., None], decode(geometry.values, part.values, width), 0.0)
        out = out * kept[..., None] + jnp.einsum("bhjc,bhcd->bhjd", probs, values, precision="highest")
        return (higher, total * kept + probs.sum(axis=-1), out), None

    if slots and batch:
        state, _ = lax.scan(block, start, jnp.arange(-(-slots // size), dtype=jnp.int32))
    else:
        state = start
    most, total, out = state
    tiny = jnp.finfo(jnp.float32).tiny
    out = out / jnp.maximum(total, tiny)[..., None]
    lse = jnp.where(total > 0, most + jnp.log(jnp.maximum(total, tiny)), MASKED)
    return out[..., None, :], lse[..., None]


def slots_of(form: Format, leaves: Leaves, first: Array, size: int) -> Leaves:
    """The arrays of ``size`` slots from ``first`` on."""
    if isinstance(leaves, Coupled):
        return leaves._replace(codes=lax.dynamic_slice_in_dim(leaves.codes, first, size, 2))
    shared = granularity(form)

    def cut(name: str, array: Array) -> Array:
        by = shared if name in ("scale", "minimum") else 1
        return lax.dynamic_slice_in_dim(array, first // by, size // by, 2)

    return type(leaves)(*(cut(name, array) for name, array in zip(leaves._fields, leaves, strict=True)))


def merge(out: Array, lse: Array) -> tuple[Array, Array]:
    """Parts ``[*n, S, D]`` and ``[*n, S]`` of one softmax as the whole: ``(out [*n, D], lse [*n])``."""
    top = lse.max(axis=-1)
    # Parts without a valid slot have no weight, even where all parts are so.
    weight = jnp.where(lse > MASKED / 2, jnp.exp(lse - top[..., None]), 0.0)
    total = weight.sum(axis=-1)
    least = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    mean = (weight[..., None] * out).sum(axis=-2) / least[..., None]
    return mean, jnp.where(total > 0, top + jnp.log(least), MASKED)


def exact(q: Array, window: tuple[Array, Array, Array], query_pos: Array, sliding_window: int | None):
    """The attention over the exact window alone, as a part for `merge`: ``([B, H, J, D], [B, H, J])``."""
    keys, values, pos = window
    held = seen(pos, query_pos, sliding_window)[:, None, :, None]
    values = jnp.where(held, values.astype(jnp.float32), 0.0)  # what lies in empty places may be NaN
    valid = held.swapaxes(2, 3)
    logits = jnp.einsum("bhjd,bhrd->bhjr", q, keys.astype(jnp.float32), precision="highest")
    logits = jnp.where(valid, logits, MASKED)
    top = logits.max(axis=-1)
    probs = jnp.where(valid, jnp.exp(logits - top[..., None]), 0.0)
    total = probs.sum(axis=-1)
    least = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = jnp.einsum("bhjr,bhrd->bhjd", probs, values, precision="highest") / least[..., None]
    return out, jnp.where(total > 0, top + jnp.log(least), MASKED)
