"""The definition: decode all of the cache, one softmax over it and the exact window, in plain jnp."""

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array, Float
from hashml_kernels.cache_decode.formats import (
    MASKED,
    Coupled,
    CoupledFormat,
    DecodeGeometry,
    Dense,
    Format,
    IntegerFormat,
    KiviFormat,
    Leaves,
    Operands,
    Pairs,
    Quantised,
)

Window = tuple[Array, Array, Array]
"""Exact keys and values ``[B, H, R, D]``, rotated where needed, and their positions int32 ``[B, R]``."""


def unpack(packed: Array, bits: int, count: int) -> Array:
    """The ``count`` codes of each row, int32: bits ``i b .. i b + b - 1`` of its bytes, the lowest first."""
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
        return codes.reshape(*packed.shape[:-1], packed.shape[-1] * (8 // bits))[..., :count].astype(jnp.int32)
    first = np.arange(count) * bits
    last = packed.shape[-1] - 1  # what lies beyond belongs to no code
    word = sum(packed[..., np.minimum(first // 8 + k, last)].astype(jnp.int32) << (8 * k) for k in range(3))
    return (word >> (first % 8).astype(np.int32)) & (2**bits - 1)


def decode(form: Format, leaves: Leaves, width: int) -> Float[Array, "B H C D"]:
    """All slots, float32."""
    match form, leaves:
        case IntegerFormat(bits, group), Quantised(packed, scale, minimum):
            grouped = unpack(packed, bits, width).reshape(*scale.shape, group).astype(jnp.float32)
            x = minimum.astype(jnp.float32)[..., None] + grouped * scale.astype(jnp.float32)[..., None]
            return x.reshape(*packed.shape[:-1], width)
        case KiviFormat(bits, group), Quantised(packed, scale, minimum):
            codes = unpack(packed, bits, width).astype(jnp.float32)
            blocks = codes.reshape(*scale.shape[:-1], group, width)
            x = minimum.astype(jnp.float32)[:, :, :, None] + blocks * scale.astype(jnp.float32)[:, :, :, None]
            return x.reshape(codes.shape)
        case CoupledFormat(channels, bits), Coupled(packed, codebook):
            heads, groups = codebook.shape[:2]
            codes = unpack(packed, bits, groups)
            parts = codebook[np.arange(heads)[:, None, None], np.arange(groups), codes]
            return parts.astype(jnp.float32).reshape(*codes.shape[:-1], groups * channels)
        case _, Dense(values):
            return values.astype(jnp.float32)
    raise AssertionError("check_leaves has seen these")


def rotate(x: Array, pos: Array, frequencies: Array, pairs: Pairs) -> Float[Array, "B H C D"]:
    """``x [B, H, C, D]`` turned to its positions int32 ``[B, P, C]``."""
    angles = pos[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if pairs == "half":
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def seen(pos: Array, query_pos: Array, sliding_window: int | None) -> Array:
    """Which positions ``[B, *n]`` the query of each row sees."""
    query = query_pos.reshape(-1, *[1] * (pos.ndim - 1))
    valid = (pos >= 0) & (pos <= query)
    return valid if sliding_window is None else valid & (pos > query - sliding_window)


def keys_of(operands: Operands, geometry: DecodeGeometry) -> Float[Array, "B H C D"]:
    """The keys as the queries meet them."""
    keys = decode(geometry.keys, operands.keys, operands.q.shape[-1])
    if geometry.pairs is None or operands.frequencies is None:
        return keys
    return rotate(keys, operands.pos, operands.frequencies, geometry.pairs)


def step(operands: Operands, geometry: DecodeGeometry, window: Window | None) -> tuple[Array, Array]:
    """``(out [B, H, J, D], lse [B, H, J])``, float32."""
    keys, values = keys_of(operands, geometry), decode(geometry.values, operands.values, operands.q.shape[-1])
    batch, heads, _, slots, _ = operands.sizes
    valid = jnp.broadcast_to(seen(operands.pos, operands.query_pos, geometry.sliding_window), (batch, heads, slots))
    if window is not None:
        keys, values = (
            jnp.concatenate([main, exact.astype(jnp.float32)], axis=2)
            for main, exact in ((keys, window[0]), (values, window[1]))
        )
        recent = seen(window[2], operands.query_pos, geometry.sliding_window)[:, None]
        valid = jnp.concatenate([valid, jnp.broadcast_to(recent, (batch, heads, recent.shape[2]))], axis=2)
    values = jnp.where(valid[..., None], values, 0.0)  # nothing times what lies in an empty slot may be NaN
    valid = valid[:, :, None]
    logits = jnp.where(valid, jnp.einsum("bhjd,bhcd->bhjc", operands.q, keys, precision="highest"), MASKED)
    lse = jax.nn.logsumexp(logits, axis=-1, where=jnp.broadcast_to(valid, logits.shape))
    lse = jnp.where(valid.any(axis=-1), lse, MASKED)
    probs = jnp.where(valid, jnp.exp(logits - lse[..., None]), 0.0)
    return jnp.einsum("bhjc,bhcd->bhjd", probs, values, precision="highest"), lse
