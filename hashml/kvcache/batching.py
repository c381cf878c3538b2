"""Continuous batching: rows of a cache that runs end, and others take their places, while their neighbours go on.

    check_step(spec, cache, n)                       what a compiled step cannot check: the place in the ring
    cache = reset_rows(spec, cache, ended)           as they were before their first token
    cache = insert(spec, cache, prompt, row)         a prompt of its own `prefill` into a row

Between them a row that has nothing to do is left idle by `hashml.kvcache.serving.decode_step`'s ``active``: it takes
no page of the pool, which all rows share.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from hashml.kvcache.contract import CodecState
from hashml.kvcache.pages import allocate, release
from hashml.kvcache.spec import CacheSpec, LayerSpec
from hashml.kvcache.state import Cache, LayerCache, init_layer


def check_step(spec: CacheSpec, cache: Cache, count: int = 1) -> None:
    """Whether the next step may take ``count`` tokens a row.

    `hashml.kvcache.serving.decode_step` asks it wherever ``cache.head`` is a concrete number. Under `jax.jit` it is
    none: there who mixes steps of several sizes has to ask before each, or tokens of the window are overwritten that
    were to go to the main store.

    Raises:
        ValueError: for a number that does not divide ``flush``, a ring that stands between two multiples of it, or
            more tokens than slots where there is no window.
    """
    window, flush = spec.layers[0].window, spec.layers[0].flush
    if count < 1:
        raise ValueError(f"n is {count} tokens at once; it must be at least 1")
    if not window:
        slots = min(layer.slots for layer in spec.layers)
        if count > slots:
            raise ValueError(f"n is {count} tokens at once; slots is {slots} and there is no window")
        return
    if flush % count:
        raise ValueError(f"n is {count} tokens at once; it must divide flush, {flush}, so that there is room")
    head = _known(cache.head)
    if head is not None and head % count:
        raise ValueError(f"n is {count} tokens at once; the ring stands at {head}, and must stand at a multiple of "
                         f"n: steps of other sizes add up to one first")  # fmt: skip


def reset_rows(spec: CacheSpec, cache: Cache, rows: Bool[Array, " B"]) -> Cache:
    """The cache with these rows as `hashml.kvcache.state.init` makes them, for requests that have ended. Their pages
    go back to the pool.

    Args:
        spec: of the cache.
        cache: with B rows.
        rows: which of them.
    """

    def chosen(fresh: Any, held: Any) -> Any:
        """Leaves ``[B, ...]`` with ``[1, ...]`` in the chosen rows."""

        def one(new: Array, old: Array) -> Array:
            return jnp.where(rows.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        return jax.tree.map(one, fresh, held)

    def empty(layer_spec: LayerSpec, layer: LayerCache) -> LayerCache:
        fresh = init_layer(layer_spec, 1)
        if layer.pages is None:
            return chosen(fresh, layer)
        # The pool is no row's; what ended requests leave in it is finite, and never read.
        keys, values = (
            CodecState(held.slots, chosen(new.fixed, held.fixed))
            for new, held in ((fresh.keys, layer.keys), (fresh.values, layer.values))
        )
        others = jnp.broadcast_to(~rows[:, None, None], layer.pages.table.shape)
        apart = {"keys": None, "values": None, "pages": None}
        return chosen(fresh._replace(**apart), layer._replace(**apart))._replace(
            keys=keys, values=values, pages=release(layer.pages, others)
        )

    return cache._replace(
        layers=tuple(empty(one, layer) for one, layer in zip(spec.layers, cache.layers, strict=True)),
        previous=jax.tree.map(lambda x: jnp.where(rows[:, None], 0, x), cache.previous),
        length=jnp.where(rows, 0, cache.length),
        born=jnp.where(rows, 0, cache.born),
    )


def insert(spec: CacheSpec, cache: Cache, prompt: Cache, row: Int[Array, ""] | int) -> Cache:
    """The cache with a prompt's, a cache of one row, in place of what a row held.

    The prompt comes from `hashml.kvcache.serving.prefill` under the same layers, or has been decoded since. Then the
    row goes on as it would alone, but for sums in another order. Both rings have to stand equally far from a multiple
    of ``flush``: for a fresh prompt, ``cache.head`` at one. In a paged cache the row's pages go back first; tokens
    that find none are dropped, the newest of the main store before others, and counted in ``missed``.

    Args:
        spec: of ``cache``.
        cache: with B rows.
        prompt: with one; a paged one has a pool of its own, of any number of pages.
        row: where it goes. One that is traced and out of range changes nothing.

    Raises:
        ValueError: for a prompt of more rows or of other layers, for a row out of range, and for rings that stand
            unequally; the last two only where ``row`` and both ``head`` are concrete, not under `jax.jit`.
    """
    _check_insert(spec, cache, prompt, row)
    batch = cache.length.shape[0]
    # Indices below 0 would count from the end.
    target = jnp.where(jnp.asarray(row) < 0, batch, jnp.asarray(row))
    turn = cache.head - prompt.head
    return cache._replace(
        layers=tuple(
            _insert_layer(one, held, _turned(one, new, turn), target)
            for one, held, new in zip(spec.layers, cache.layers, prompt.layers, strict=True)
        ),
        previous=_set_row(cache.previous, prompt.previous, target),
        **{name: _set_row(getattr(cache, name), getattr(prompt, name), target) for name in ("length", "key", "born")},
    )


def _check_insert(spec: CacheSpec, cache: Cache, prompt: Cache, row: Array | int) -> None:
    if prompt.length.shape != (1,):
        raise ValueError(f"prompt holds {prompt.length.shape[0]} rows; it must hold 1")
    if len(prompt.layers) != len(cache.layers):
        raise ValueError(f"prompt has {len(prompt.layers)} layers; the cache has {len(cache.layers)}")
    for part in ("layers", "previous"):
        held, new = (jax.tree_util.tree_flatten_with_path(getattr(x, part)) for x in (cache, prompt))
        if held[1] != new[1]:
            raise ValueError(f"prompt has {part} of the structure {new[1]}; the cache's is {held[1]}")
        for (path, old), (_, leaf) in zip(held[0], new[0], strict=True):
            name = part + jax.tree_util.keystr(path)
            if ".pages" not in name and (old.shape[1:], old.dtype) != (leaf.shape[1:], leaf.dtype):
                raise ValueError(f"prompt's {name} is {leaf.dtype}{list(leaf.shape)}; the cache's is {old.dtype}"
                                 f"{list(old.shape)}, and all but the first axis must agree")  # fmt: skip
    place, head, other = _known(row), _known(cache.head), _known(prompt.head)
    batch = cache.length.shape[0]
    if place is not None and not 0 <= place < batch:
        raise ValueError(f"row is {place}; the cache has rows 0 to {batch - 1}")
    flush = spec.layers[0].flush
    if head is not None and other is not None and spec.layers[0].window and (head - other) % flush:
        raise ValueError(f"the cache's ring stands at {head} and the prompt's at {other}; they must differ by a "
                         f"multiple of flush, {flush}")  # fmt: skip


def _known(x: Array | int) -> int | None:
    """The number, unless it is traced or abstract."""
    return None if isinstance(x, Tracer | jax.ShapeDtypeStruct) else int(x)


def _turned(spec: LayerSpec, layer: LayerCache, turn: Array) -> LayerCache:
    """The layer with its ring ``turn`` entries on."""
    if not spec.window:
        return layer
    main, ring = slice(0, spec.slots), slice(spec.slots, None)
    return layer._replace(
        window_keys=jnp.roll(layer.window_keys, turn, axis=2),
        window_values=jnp.roll(layer.window_values, turn, axis=2),
        window_pos=jnp.roll(layer.window_pos, turn, axis=1),
        policy={
            name: jnp.concatenate([leaf[:, :, main], jnp.roll(leaf[:, :, ring], turn, axis=2)], axis=2)
            for name, leaf in layer.policy.items()
        },
    )


def _set_row(held: Any, new: Any, row: Array) -> Any:
    """Leaves ``[B, ...]`` with those of one row, ``[1, ...]``, at ``row``; nothing changes beyond the last."""
    return jax.tree.map(lambda old, leaf: old.at[row].set(leaf[0], mode="drop"), held, new)


def _insert_layer(spec: LayerSpec, held: LayerCache, new: LayerCache, row: Array) -> LayerCache:
    if held.pages is None or new.pages is None:
        return _set_row(held, new, row)
    source = jnp.maximum(new.pages.table, 0)
    chosen = (jnp.arange(held.pages.table.shape[0]) == row)[:, None, None]
    table = held.pages.table
    wanted = (new.pos >= 0).reshape(*new.pos.shape[:2], table.shape[2], -1).any(axis=3)
    pages = release(held.pages, jnp.broadcast_to(~chosen, table.shape))
    pages = allocate(pages, jnp.broadcast_to(chosen & wanted, table.shape))
    own = pages.table.at[row].get(mode="fill", fill_value=-1)[None]
    # What one decision for all heads keeps, all heads have to hold.
    short = (wanted & (own < 0)).reshape(1, spec.head_pos, -1, table.shape[2]).any(axis=2)
    short = jnp.repeat(short, new.pos.shape[2] // table.shape[2], axis=2)
    lost = (new.pos >= 0) & short & (row < table.shape[0])
    pos = jnp.where(short, -1, new.pos)
    used = (pos >= 0).reshape(*wanted.shape, -1).any(axis=3)
    pages = release(pages, jnp.broadcast_to(~chosen | used, table.shape))
    pages = pages._replace(missed=pages.missed + lost.sum(dtype=jnp.int32))

    def moved(old: CodecState, leaves: CodecState) -> CodecState:
        slots = {}
        for name, leaf in old.slots.items():
            place = jnp.where(used & (own >= 0), own, leaf.shape[0])
            rows = leaves.slots[name][source]
            slots[name] = leaf.at[place].set(rows, mode="drop")
        return CodecState(slots, _set_row(old.fixed, leaves.fixed, row))

    apart = {"keys": None, "values": None, "pages": None}
    rest = _set_row(held._replace(**apart), new._replace(**apart, pos=pos), row)
    return rest._replace(keys=moved(held.keys, new.keys), values=moved(held.values, new.values), pages=pages)
