"""One softmax over both tiers: logits of the compressed store, read by its codec, beside those of the exact window.

    probs = softmax([codec.logits(q) | q . window keys] / sqrt(D))        float32, over the keys a query may see
    out   = codec.weighted_sum(probs of main slots) + probs of the window . window values

Logits are joined, never keys or values, so no copy of the cache is made. A query that sees no key gets zeros.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from hashml.kvcache.contract import MASKED, Attention, Queries, masked_softmax
from hashml.kvcache.reading import read_logits, read_values
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerCache, LayerTables, all_positions


def stored_keys(spec: LayerSpec, k: Float[Array, "B H n D"], pos: Int32[Array, "B n"]) -> Float[Array, "B H n D"]:
    """Keys as the layer stores them: rotated where ``rope`` is ``"write"``."""
    return spec.rotary.rotate(k, pos[:, None]) if spec.rope == "write" and spec.rotary is not None else k


def attend(
    spec: LayerSpec,
    tables: LayerTables,
    layer: LayerCache,
    q: Float[Array, "B Hq n D"],
    query_pos: Int32[Array, "B n"],
) -> tuple[Float[Array, "B Hq n D"], Attention]:
    """What unrotated queries read from the cache, in their dtype, and the attention that a policy observes.

    Query p sees keys at positions ``0 <= pos <= p``, of these the last ``sliding_window``.
    """
    pos = all_positions(spec, layer)
    shown = query_pos[:, None]
    if spec.rope == "slot":
        # Rank among the keys that are kept; the newest token stands last.
        order = jnp.argsort(jnp.where(pos < 0, jnp.iinfo(jnp.int32).max, pos), axis=2)
        places = jnp.argsort(order, axis=2).astype(jnp.int32)
        kept = (pos[:, :, None] >= 0) & (pos[:, :, None] <= query_pos[:, None, :, None])
        shown = jnp.maximum(kept.sum(axis=3, dtype=jnp.int32) - 1, 0)
        shown = jnp.repeat(shown, spec.query_heads // spec.head_pos, axis=1)
    else:
        places = pos
    turned = q if spec.rotary is None else spec.rotary.rotate(q, shown)
    batch, _, count, width = q.shape
    grouped = turned.astype(jnp.float32).reshape(batch, spec.kv_heads, spec.group, count, width) / math.sqrt(width)

    def rotate(x: Array, at: Array) -> Array:
        return x if spec.rotary is None or spec.rope not in ("read", "slot") else spec.rotary.rotate(x, at)

    window = rotate(layer.window_keys.astype(jnp.float32), places[:, :, spec.slots :])
    parts = [jnp.einsum("bhjnd,bhrd->bhjnr", grouped, window)]
    if spec.slots:
        main = places[:, :, : spec.slots] if spec.rope in ("read", "slot") else None
        parts.insert(0, read_logits(spec, tables, layer, grouped, main))
    logits = jnp.concatenate(parts, axis=-1)
    valid = (pos >= 0)[:, :, None] & (pos[:, :, None] <= query_pos[:, None, :, None])
    if spec.sliding_window is not None:
        valid &= pos[:, :, None] > query_pos[:, None, :, None] - spec.sliding_window
    valid = valid[:, :, None]
    logits = jnp.where(valid, logits, MASKED)
    probs = masked_softmax(logits, valid)
    out = jnp.einsum("bhjnr,bhrd->bhjnd", probs[..., spec.slots :], ring_values(layer).astype(jnp.float32))
    if spec.slots:
        out = out + read_values(spec, tables, layer, probs[..., : spec.slots])
    return out.reshape(q.shape).astype(q.dtype), Attention(logits, probs, valid)


def ring_values(layer: LayerCache) -> Float[Array, "B H R D"]:
    """Values of the window, zeros at empty entries, of which an ended request may have left NaN."""
    return jnp.where((layer.window_pos >= 0)[:, None, :, None], layer.window_values, 0)


def observe(spec: LayerSpec, layer: LayerCache, attention: Attention, queries: Queries) -> LayerCache:
    """Shows a step's attention, and who asked, to the policy."""
    pos = all_positions(spec, layer)
    return layer._replace(policy=spec.policy.observe(spec, layer.policy, attention, pos, queries))
