"""A prompt into a cache: its own attention is exact and stands apart; what it leaves chooses what is kept.

The last R valid tokens of each row go to the window; of the others the C with the best scores go to the main store,
in the order of time, the first ``sinks`` always among them. Policies get statistics of the exact attention, found by
blocks of queries, so that no ``T x T`` array is alive.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from hashml.kvcache.contract import (
    MASKED,
    Attention,
    HeadBudgets,
    PrefillStatistics,
    Queries,
    masked_softmax,
    over_queries,
)
from hashml.kvcache.noise import row_keys
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerCache, LayerTables, init_layer
from hashml.kvcache.store import encode, write

_BLOCK = 128
"""Queries whose attention is alive at once."""


def prefill_layer(
    spec: LayerSpec,
    tables: LayerTables,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B H T D"],
    v: Float[Array, "B H T D"],
    pos: Int32[Array, "B T"],
    key: Array,
) -> LayerCache:
    """A layer that holds a prompt.

    Args:
        spec, tables: of the layer.
        q, k, v: of the prompt's tokens, not rotated.
        pos: their positions, rising along a row; -1 for padding, wherever it stands.
        key: of the policy's noise in this layer: one of each row, ``[B]``, or one from which they are drawn.
    """
    batch, _, length = k.shape[:3]
    keys = row_keys(key, batch)
    missing = max(0, spec.window - length)
    if missing:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (missing, 0), (0, 0))) for x in (q, k, v))
        pos, length = jnp.pad(pos, ((0, 0), (missing, 0)), constant_values=-1), length + missing
    turned_q, turned_k = (x if spec.rotary is None else spec.rotary.rotate(x, pos[:, None]) for x in (q, k))
    statistics = prefill_statistics(spec, turned_q, turned_k, v, pos, keys)
    scores, state = spec.policy.from_prefill(spec, statistics, keys)
    stored = turned_k if spec.rope == "write" else k
    layer = init_layer(spec, batch)
    # Padding first, then tokens by age: the last ones are the window's.
    order = jnp.argsort(pos, axis=1, stable=True)
    early, late = order[:, : length - spec.window], order[:, length - spec.window :]
    newest = late[:, None, :, None]
    layer = layer._replace(
        window_keys=jnp.take_along_axis(stored, newest, axis=2).astype(spec.dtype),
        window_values=jnp.take_along_axis(v, newest, axis=2).astype(spec.dtype),
        window_pos=jnp.take_along_axis(pos, late, axis=1),
    )
    chosen, chosen_pos, layer = _chosen(spec, layer, scores, pos, early)
    picked = jnp.broadcast_to(chosen, (batch, spec.kv_heads, chosen.shape[2]))[..., None]
    kept_k, kept_v = (jnp.take_along_axis(x, picked, axis=2) for x in (stored, v))
    layer = _fitted(spec, layer, kept_k, chosen_pos, turned_q if spec.rope == "write" else q, pos, order)
    if chosen.shape[2]:
        rows = encode(spec, tables, layer, kept_k, kept_v, chosen_pos >= 0)
        slot = jnp.broadcast_to(jnp.arange(chosen.shape[2], dtype=jnp.int32), chosen_pos.shape)
        real = _by_block(chosen_pos >= 0, spec.granularity)
        layer = write(spec, layer, *rows, chosen_pos, slot, real)
    return layer._replace(policy=_states(spec, layer, state, chosen, chosen_pos, late))


def _chosen(
    spec: LayerSpec, layer: LayerCache, scores: Array, pos: Array, early: Int32[Array, "B M"]
) -> tuple[Int32[Array, "B P K"], Int32[Array, "B P K"], LayerCache]:
    """Places in the prompt, and positions, of the tokens that go to main slots 0, 1, 2...: by age, holes last."""
    heads = spec.head_pos
    line = jnp.broadcast_to(jnp.take_along_axis(pos, early, axis=1)[:, None], (pos.shape[0], heads, early.shape[1]))
    places = jnp.broadcast_to(early[:, None], line.shape)
    budgets = None
    if isinstance(spec.policy, HeadBudgets):
        budgets = spec.policy.caps(spec, scores, pos).astype(jnp.int32)
        layer = layer._replace(caps=jnp.minimum(budgets + spec.policy.later, spec.slots))
    count = min(spec.slots if spec.prompt_slots is None else spec.prompt_slots, early.shape[1])
    if early.shape[1] > count or budgets is not None:
        ranked = jnp.take_along_axis(jnp.broadcast_to(scores, (*line.shape[:2], pos.shape[1])), places, axis=2)
        ranked = jnp.clip(jnp.nan_to_num(ranked, nan=-2e38), -2e38, 2e38)
        ranked = jnp.where(line < spec.sinks, 3e38, ranked)
        best = jax.lax.top_k(jnp.where(line < 0, -jnp.inf, ranked), count)[1]
        line, places = (jnp.take_along_axis(x, best, axis=2) for x in (line, places))
        if budgets is not None:
            line = jnp.where(jnp.arange(count) < budgets[:, :, None], line, -1)
    by_age = jnp.argsort(jnp.where(line < 0, jnp.iinfo(jnp.int32).max, line), axis=2, stable=True)
    line, places = (jnp.take_along_axis(x, by_age, axis=2) for x in (line, places))
    short = -count % spec.granularity
    line = jnp.pad(line, ((0, 0), (0, 0), (0, short)), constant_values=-1)
    return jnp.pad(places, ((0, 0), (0, 0), (0, short))), line.astype(jnp.int32), layer


def _by_block(real: Bool[Array, "B P K"], grain: int) -> Bool[Array, "B P K"]:
    """Whether a token's block holds any."""
    blocks = real.reshape(*real.shape[:2], -1, grain).any(axis=-1, keepdims=True)
    return jnp.broadcast_to(blocks, (*blocks.shape[:-1], grain)).reshape(real.shape)


def _fitted(
    spec: LayerSpec, layer: LayerCache, keys: Array, keys_pos: Array, q: Array, pos: Array, order: Array
) -> LayerCache:
    """The layer whose key codec has seen the keys that stay, in both tiers, and the prompt's last queries."""
    if not layer.keys.fixed:
        return layer
    last = order[:, -spec.key_codec.observed :]
    ring = jnp.broadcast_to(layer.window_pos[:, None], (*keys_pos.shape[:2], spec.window))
    keys_pos = jnp.concatenate([keys_pos, ring], axis=2)
    keys = jnp.concatenate([keys, layer.window_keys.astype(keys.dtype)], axis=2)
    queries = jnp.take_along_axis(q, last[:, None, :, None], axis=2)
    queries = queries.reshape(q.shape[0], spec.kv_heads, spec.group, *queries.shape[2:])
    valid = jnp.broadcast_to(keys_pos >= 0, keys.shape[:3]), jnp.take_along_axis(pos, last, axis=1) >= 0
    fixed = spec.key_codec.fit(layer.keys.fixed, keys, queries, valid)
    return layer._replace(keys=layer.keys._replace(fixed=fixed))


def _states(spec: LayerSpec, layer: LayerCache, state: dict, chosen: Array, chosen_pos: Array, late: Array) -> dict:
    """What the policy knows, moved from places in the prompt to slots."""
    found = {}
    for name, leaf in layer.policy.items():
        per_token = state[name].astype(leaf.dtype)
        tail = (1,) * (leaf.ndim - 3)
        shape = (*chosen.shape[:2], spec.window)
        ring = jnp.broadcast_to(late[:, None], shape).reshape(*shape, *tail)
        leaf = leaf.at[:, :, spec.slots :].set(jnp.take_along_axis(per_token, ring, axis=2))
        if chosen.shape[2]:
            moved = jnp.take_along_axis(per_token, chosen.reshape(*chosen.shape, *tail), axis=2)
            real = (chosen_pos >= 0).reshape(*chosen.shape, *tail)
            size = chosen.shape[2]
            leaf = leaf.at[:, :, :size].set(jnp.where(real, moved, leaf[:, :, :size]))
        found[name] = leaf
    return found


def prefill_statistics(
    spec: LayerSpec,
    q: Float[Array, "B Hq T D"],
    k: Float[Array, "B H T D"],
    v: Float[Array, "B H T D"],
    pos: Int32[Array, "B T"],
    key: Array,
) -> PrefillStatistics:
    """What the layer's policy asks of a prompt's exact attention; ``q`` and ``k`` are rotated, ``key`` is as in
    `prefill_layer`."""
    policy = spec.policy
    counts = jax.vmap(lambda row: _seen_by(row, spec.sliding_window))(pos)
    last = _last(spec, q, k, pos, policy.observed) if policy.observed else None
    sums = _column_sums(spec, q, k, pos, row_keys(key, pos.shape[0])) if policy.sums_columns else None
    return PrefillStatistics(pos, k, v, last, sums, counts)


def _seen_by(pos: Int32[Array, " T"], sliding_window: int | None) -> Int32[Array, " T"]:
    """Queries that see each key of a row: those at its position and after, up to the sliding window's end."""
    ordered = jnp.sort(pos)
    end = pos.shape[0] if sliding_window is None else jnp.searchsorted(ordered, pos + sliding_window)
    return jnp.where(pos < 0, 0, end - jnp.searchsorted(ordered, pos)).astype(jnp.int32)


def _logits(spec: LayerSpec, q: Array, k: Array, query_pos: Array, pos: Array) -> tuple[Array, Array]:
    """Masked logits ``[B, H, J, n, T]`` of queries ``[B, Hq, n, D]``, and which keys they see."""
    grouped = q.astype(jnp.float32).reshape(q.shape[0], spec.kv_heads, spec.group, *q.shape[2:])
    logits = jnp.einsum("bhjnd,bhtd->bhjnt", grouped, k.astype(jnp.float32)) / math.sqrt(q.shape[-1])
    valid = (pos[:, None] >= 0) & (pos[:, None] <= query_pos[..., None])
    if spec.sliding_window is not None:
        valid &= pos[:, None] > query_pos[..., None] - spec.sliding_window
    valid = valid[:, None, None]
    return jnp.where(valid, logits, MASKED), valid


def _last(spec: LayerSpec, q: Array, k: Array, pos: Array, count: int) -> Attention:
    """Attention of each row's last ``count`` tokens."""
    order = jnp.argsort(pos, axis=1, stable=True)[:, -count:]
    query_pos = jnp.take_along_axis(pos, order, axis=1)
    logits, valid = _logits(spec, jnp.take_along_axis(q, order[:, None, :, None], axis=2), k, query_pos, pos)
    short = count - order.shape[1]
    if short:
        logits = jnp.pad(logits, ((0, 0), (0, 0), (0, 0), (short, 0), (0, 0)), constant_values=MASKED)
        valid = jnp.pad(valid, ((0, 0), (0, 0), (0, 0), (short, 0), (0, 0)))
    return Attention(logits, masked_softmax(logits, valid), valid)


def _column_sums(spec: LayerSpec, q: Array, k: Array, pos: Array, key: Array) -> Float[Array, "B H T"]:
    """Sums over queries of what each gives each key, a block of queries at a time."""
    batch, _, length, width = q.shape
    size = min(_BLOCK, length)
    short = -length % size
    blocks = jnp.pad(q, ((0, 0), (0, 0), (0, short), (0, 0))).reshape(batch, spec.query_heads, -1, size, width)
    asking = jnp.pad(pos, ((0, 0), (0, short)), constant_values=-1).reshape(batch, -1, size)

    born = pos.max(axis=1) + 1

    def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        queries, query_pos = block
        logits, valid = _logits(spec, queries, k, query_pos, pos)
        given = spec.policy.weigh(logits, valid, pos[:, None], Queries(query_pos, key, born))
        return total + over_queries(jnp.where(valid, given, 0), spec.gqa).sum(axis=2), None

    start = jnp.zeros((batch, spec.kv_heads, length), jnp.float32)
    sequence = (blocks.transpose(2, 0, 1, 3, 4), asking.transpose(1, 0, 2))
    return jax.lax.scan(add, start, sequence)[0]
