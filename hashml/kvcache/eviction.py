"""Tokens enter through the window and leave it to the main store, or to nothing: the one place where both meet.

Before a token is appended, the ``flush`` oldest window tokens are candidates for the main store. Candidates and
main slots are ranked by the policy's scores; as many lose as there are candidates, empty slots first, and a
surviving candidate takes the slot of a loser. Nothing is moved or compacted: softmax does not see the order of
slots. Where codes share a scale over a block of tokens, blocks compete, each with the best score in it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from hashml.kvcache.contract import PolicyState
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerCache, LayerTables, all_positions
from hashml.kvcache.store import empty_slots, encode, write

_PROTECTED = 3e38
_EMPTY = -jnp.inf
_NO_PAGE = -3e38
"""An empty slot whose page has to be taken from the pool: those of pages that are there go first."""


def append(
    spec: LayerSpec,
    tables: LayerTables,
    layer: LayerCache,
    head: Int32[Array, ""],
    k: Float[Array, "B H n D"],
    v: Float[Array, "B H n D"],
    pos: Int32[Array, "B n"],
    now: Int32[Array, " B"],
    key: Array | None = None,
) -> LayerCache:
    """Takes in n tokens: into the window at ``head``, or at once into the main store where there is no window.

    Args:
        spec, tables, layer: of the layer.
        head: ring index; with more than one token, a multiple of n that divides ``flush``.
        k, v: as the layer stores them: rotated where ``rope`` is ``"write"``.
        pos: positions, -1 for padding and for rows that are idle, of which nothing is stored.
        now: tokens seen before these.
        key: of the rows in this layer, for a policy that draws; see `Policy.score`.
    """
    count = k.shape[2]
    real = (pos >= 0)[:, None, :, None]
    k, v = jnp.where(real, k, 0), jnp.where(real, v, 0)
    if spec.window == 0:
        if count > spec.slots:
            raise ValueError(f"n is {count} tokens at once; slots is {spec.slots} and there is no window")
        shown = jnp.broadcast_to(pos[:, None], (pos.shape[0], spec.head_pos, count))
        layer = _without_expired(spec, layer, all_positions(spec, layer), now)
        main = spec.policy.score(spec, layer.policy, all_positions(spec, layer), now, key)
        slot, mask, layer = _places(spec, layer, shown, jnp.full(shown.shape, _PROTECTED), main)
        return _into_main(spec, tables, layer, k, v, shown, slot, mask, _fresh(spec, layer.policy, k, pos))
    if spec.flush % count:
        raise ValueError(f"n is {count} tokens at once; it must divide flush, {spec.flush}, so that there is room")
    start = (0, 0, head, 0)
    fresh = _fresh(spec, layer.policy, k, pos)
    return layer._replace(
        window_keys=jax.lax.dynamic_update_slice(layer.window_keys, k.astype(layer.window_keys.dtype), start),
        window_values=jax.lax.dynamic_update_slice(layer.window_values, v.astype(layer.window_values.dtype), start),
        window_pos=jax.lax.dynamic_update_slice(layer.window_pos, pos, (0, head)),
        policy={
            name: jax.lax.dynamic_update_slice_in_dim(leaf, fresh[name], spec.slots + head, axis=2)
            for name, leaf in layer.policy.items()
        },
    )


def _fresh(spec: LayerSpec, state: PolicyState, k: Array, pos: Array) -> PolicyState:
    """State of tokens that just came; of empty entries where there is none."""
    if not state:
        return {}
    empty = spec.policy.init(spec, k.shape[0])
    fresh = {name: leaf[:, :, :1].repeat(k.shape[2], axis=2) for name, leaf in empty.items()}
    entered = spec.policy.enter(spec, k)
    if entered is not None:
        for name, leaf in entered.items():
            real = (pos >= 0)[:, None].reshape(pos.shape[0], 1, -1, *(1,) * (leaf.ndim - 3))
            fresh[name] = jnp.where(real, leaf.astype(state[name].dtype), fresh[name])
    return fresh


def evict(
    spec: LayerSpec,
    tables: LayerTables,
    layer: LayerCache,
    head: Int32[Array, ""],
    now: Int32[Array, " B"],
    key: Array | None = None,
) -> LayerCache:
    """Makes room for the next token: run before each `append` of a layer with a window.

    The ``flush`` oldest window tokens move into main slots or are dropped when ``head`` is a multiple of ``flush``;
    at other times nothing changes.

    Args:
        spec, tables, layer: of the layer.
        head: ring index of the next write.
        now: tokens seen.
        key: of the rows in this layer, for a policy that draws; see `Policy.score`.
    """
    if spec.window == 0:
        return layer
    size = spec.flush
    start = head // size * size
    due = head % size == 0
    leaving = jax.lax.dynamic_slice_in_dim(layer.window_pos, start, size, axis=1)
    pos = jnp.broadcast_to(leaving[:, None], (leaving.shape[0], spec.head_pos, size))
    if spec.slots:
        pos, layer = _expire(spec, layer, pos, start, now, due)
        scores = _due_scores(spec, layer, now, key, due)
        candidates = jax.lax.dynamic_slice_in_dim(scores, spec.slots + start, size, axis=2)
        slot, mask, layer = _places(spec, layer, pos, candidates, scores[:, :, : spec.slots], due)
        k, v = (
            jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (layer.window_keys, layer.window_values)
        )
        state = {
            name: jax.lax.dynamic_slice_in_dim(leaf, spec.slots + start, size, axis=2)
            for name, leaf in layer.policy.items()
        }
        layer = _into_main(spec, tables, layer, k, v, pos, slot, mask & due, state)
    left = jnp.where(due, -1, leaving)
    return layer._replace(window_pos=jax.lax.dynamic_update_slice_in_dim(layer.window_pos, left, start, axis=1))


def _due_scores(
    spec: LayerSpec, layer: LayerCache, now: Array, key: Array | None, due: Array
) -> Float[Array, "B P N"]:
    """The policy's scores; where tokens leave in groups, they are found at those steps alone."""
    seen = all_positions(spec, layer)
    if spec.flush == 1:
        return spec.policy.score(spec, layer.policy, seen, now, key)
    return jax.lax.cond(
        due,
        lambda: spec.policy.score(spec, layer.policy, seen, now, key).astype(jnp.float32),
        lambda: jnp.zeros(seen.shape, jnp.float32),
    )


def _expire(
    spec: LayerSpec, layer: LayerCache, pos: Array, start: Array, now: Array, due: Array
) -> tuple[Array, LayerCache]:
    """Candidates without those that the policy does not admit, and the layer without what it lets expire."""
    seen = all_positions(spec, layer)
    admitted = spec.policy.admit(spec, layer.policy, seen, now)
    if admitted is not None:
        entering = jax.lax.dynamic_slice_in_dim(admitted, spec.slots + start, pos.shape[2], axis=2)
        pos = jnp.where(entering | _is_sink(spec, pos), pos, -1)
    return pos, _without_expired(spec, layer, seen, now, due)


def _without_expired(
    spec: LayerSpec, layer: LayerCache, seen: Array, now: Array, due: Array | bool = True
) -> LayerCache:
    """The layer without the main slots that the policy lets expire."""
    expired = spec.policy.expire(spec, layer.policy, seen, now)
    if expired is None:
        return layer
    gone = expired[:, :, : spec.slots] & ~_is_sink(spec, layer.pos) & due
    return empty_slots(layer, jnp.where(gone, -1, layer.pos))


def _is_sink(spec: LayerSpec, pos: Array) -> Bool[Array, "..."]:
    return (pos >= 0) & (pos < spec.sinks)


def _places(
    spec: LayerSpec,
    layer: LayerCache,
    pos: Int32[Array, "B P G"],
    candidates: Float[Array, "B P G"],
    main: Float[Array, "B P C"],
    due: Array | bool = True,
) -> tuple[Int32[Array, "B P G"], Bool[Array, "B P G"], LayerCache]:
    """Slots that candidates take, which of them do, and the layer without slots that were freed in bulk."""
    size, grain = pos.shape[2], spec.granularity
    main = _ranked(spec, main, layer.pos)
    bulk = spec.policy.bulk(spec)
    if bulk > size:
        # Whole blocks: a slot alone, where others of its block hold tokens, would be of no use to those that come.
        blocks = _best(main, grain)
        short = (blocks == _EMPTY).sum(axis=2, keepdims=True) * grain < size
        # A sort of all slots, for the steps alone that need one.
        lowest = jax.lax.cond(
            jnp.any(short) & due,
            lambda x: _lowest(x, min(bulk, spec.slots) // grain),
            lambda x: jnp.zeros(x.shape, bool),
            blocks,
        )
        gone = jnp.repeat(lowest & short & due & (blocks < _PROTECTED), grain, axis=2)
        layer = empty_slots(layer, jnp.where(gone, -1, layer.pos))
        main = jnp.where(gone, _EMPTY, main)
    if spec.caps and layer.caps is not None:
        unusable = jnp.arange(spec.slots) >= layer.caps[:, :, None]
        main = jnp.where(unusable, jnp.inf, main)
    main, candidates = _best(main, grain), _best(_ranked(spec, candidates, pos), grain)
    if layer.pages is not None:
        main, layer = _within_pool(spec, layer, main, (candidates > _EMPTY).sum(axis=2), due)
    slot, mask = _compete(main, candidates)
    slot = (slot[..., None] * grain + jnp.arange(grain, dtype=jnp.int32)).reshape(pos.shape)
    mask = jnp.broadcast_to(mask[..., None], (*mask.shape, grain)).reshape(pos.shape)
    if spec.caps and layer.caps is not None:
        mask &= slot < layer.caps[:, :, None]
    return slot, mask, layer


def _within_pool(
    spec: LayerSpec,
    layer: LayerCache,
    main: Float[Array, "B P blocks"],
    count: Int32[Array, "B P"],
    due: Array | bool,
) -> tuple[Float[Array, "B P blocks"], LayerCache]:
    """Ranks of a paged layer's main slots, or blocks of them, for ``count`` candidates: where the pool has too few
    pages, empty slots without one are out of reach, so that a candidate fights for one that is held."""
    assert layer.pages is not None
    table = layer.pages.table
    owned = (table >= 0).reshape(table.shape[0], spec.head_pos, -1, table.shape[2]).all(axis=2)
    size = main.shape[2] // table.shape[2]
    owned = jnp.repeat(owned, size, axis=2)
    free = main == _EMPTY
    room, beyond = (free & owned).sum(axis=2), (free & ~owned).sum(axis=2)
    moves = jnp.where(due, jnp.clip(count - room, 0, beyond), 0)
    wanted = -(-moves // size) * (table.shape[1] // spec.head_pos)
    # As `allocate` serves them: rows first.
    served = jnp.cumsum(wanted.reshape(-1)).reshape(wanted.shape) <= layer.pages.top
    short = (moves > 0) & ~served
    main = jnp.where(free & ~owned, jnp.where(short, jnp.inf, _NO_PAGE)[..., None], main)
    grain = spec.slots // main.shape[2]
    missed = layer.pages.missed + grain * jnp.where(short, moves, 0).sum(dtype=jnp.int32)
    return main, layer._replace(pages=layer.pages._replace(missed=missed))


def _ranked(spec: LayerSpec, scores: Array, pos: Array) -> Float[Array, "B P n"]:
    """Scores with empty slots below all others, and sinks above; a score that is no number counts as the least."""
    scores = jnp.where(_is_sink(spec, pos), _PROTECTED, jnp.clip(jnp.nan_to_num(scores, nan=-2e38), -2e38, 2e38))
    return jnp.where(pos < 0, _EMPTY, scores)


def _best(scores: Array, grain: int) -> Array:
    """The best score of each block."""
    return scores if grain == 1 else scores.reshape(*scores.shape[:2], -1, grain).max(axis=-1)


def _lowest(scores: Array, count: int) -> Bool[Array, "B P C"]:
    """Marks the ``count`` lowest; between equals the first."""
    order = jnp.argsort(scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < count


def _compete(main: Float[Array, "B P C"], candidates: Float[Array, "B P G"]) -> tuple[Array, Array]:
    """Main slots that candidates take, and which of them do.

    The G lowest of all lose, main slots before candidates between equals; the surviving candidates are paired in
    order with the losing slots.
    """
    slots, count = main.shape[2], candidates.shape[2]
    if count == 1:
        victim = jnp.argmin(main, axis=2, keepdims=True).astype(jnp.int32)
        lowest = jnp.take_along_axis(main, victim, axis=2)
        return victim, (candidates > _EMPTY) & (candidates >= lowest)
    # Between equals `top_k` takes the lower index: main slots, and the first of them.
    losers = jax.lax.top_k(-jnp.concatenate([main, candidates], axis=2), count)[1]
    losers = jnp.sort(losers, axis=2).astype(jnp.int32)
    lost = (losers[..., None, :] == (slots + jnp.arange(count))[:, None]).any(axis=-1)
    stays = ~lost & (candidates > _EMPTY)
    rank = jnp.cumsum(stays, axis=2) - 1
    slot = jnp.take_along_axis(losers, jnp.maximum(rank, 0), axis=2)
    return slot, stays & (slot < slots)


def _into_main(
    spec: LayerSpec,
    tables: LayerTables,
    layer: LayerCache,
    k: Array,
    v: Array,
    pos: Array,
    slot: Array,
    mask: Array,
    state: PolicyState,
) -> LayerCache:
    """Encodes tokens into their slots, and moves what the policy knows of them."""
    keys, values = encode(spec, tables, layer, k, v, pos >= 0)
    layer = write(spec, layer, keys, values, pos, slot, mask)
    b, p = jnp.arange(pos.shape[0])[:, None, None], jnp.arange(spec.head_pos)[None, :, None]
    # Entries of the window's part lie behind the main slots: C + R is out of range for both.
    at = jnp.where(mask, slot, spec.slots + spec.window)
    policy = {name: leaf.at[b, p, at].set(state[name], mode="drop") for name, leaf in layer.policy.items()}
    return layer._replace(policy=policy)
