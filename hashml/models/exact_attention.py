"""Causal softmax attention by positions: what a decoder without compression computes, and caches are compared with.

    logits[p, s] = q[p] . k[s] / sqrt(D)        for 0 <= position(s) <= position(p), within the sliding window
    out[p] = softmax(logits[p]) v

Positions, not places in an array, say which key a query may see; -1 marks padding or an empty slot. Query head
``h`` reads key head ``h // (Hq / H)``. Softmax and both sums are float32.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hashml.models.rotary import Rotary


def masked_attention(
    q: Float[Array, "B Hq n D"],
    k: Float[Array, "B H S D"],
    v: Float[Array, "B H S D"],
    query_positions: Int[Array, "B n"],
    key_positions: Int[Array, "B S"],
    sliding_window: int | None = None,
) -> Float[Array, "B Hq n D"]:
    """Softmax attention of rotated queries over rotated keys; the positions alone say who sees whom.

    A query at ``p`` sees the keys at ``0 <= position <= p``, of these the last ``sliding_window`` positions.
    Logits and softmax are float32; a query that sees nothing (padding, position -1) gets zeros.
    """
    batch, heads, n, width = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, n, width)
    logits = jnp.einsum("bhgnd,bhsd->bhgns", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(width)
    seen = (key_positions[:, None, :] >= 0) & (key_positions[:, None, :] <= query_positions[:, :, None])
    if sliding_window is not None:
        seen &= key_positions[:, None, :] > query_positions[:, :, None] - sliding_window
    seen = seen[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1) * seen
    out = jnp.einsum("bhgns,bhsd->bhgnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(batch, heads, n, width).astype(q.dtype)


def causal_attention(
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B H T D"],
    v: Float[Array, "B H T D"],
    positions: Int[Array, "B T"],
    *,
    rotary: Rotary | None,
    sliding_window: int | None = None,
    block: int = 256,
) -> Float[Array, "B Hq T D"]:
    """`masked_attention` of a sequence over itself, rotating first, ``block`` queries at a time.

    Beyond ``block`` tokens only ``[B, Hq, block, T]`` logits are alive, in the backward pass too.

    Raises:
        ValueError: for a ``block`` below 1.
    """
    if block < 1:
        raise ValueError(f"block is {block}; it is at least 1 query")
    if rotary is not None:
        q, k = (rotary.rotate(x, positions[:, None, :]) for x in (q, k))
    batch, heads, length, width = q.shape
    if length <= block:
        return masked_attention(q, k, v, positions, positions, sliding_window)
    blocks = -(-length // block)
    short = blocks * block - length
    q = jnp.pad(q, ((0, 0), (0, 0), (0, short), (0, 0))).reshape(batch, heads, blocks, block, width)
    asking = jnp.pad(positions, ((0, 0), (0, short)), constant_values=-1).reshape(batch, blocks, block)

    @jax.checkpoint
    def one(block_of: tuple[Array, Array]) -> Array:
        return masked_attention(block_of[0], k, v, block_of[1], positions, sliding_window)

    out = jax.lax.map(one, (q.transpose(2, 0, 1, 3, 4), asking.transpose(1, 0, 2)))
    return out.transpose(1, 2, 0, 3, 4).reshape(batch, heads, blocks * block, width)[:, :, :length]
