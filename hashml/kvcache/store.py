"""Where rows of codes are written, and how a store is seen as slots, in either layout.

A codec makes rows for G tokens and knows no slot; here they find their place. Leaves that have a row for every token
are written at ``slot``, those with a row for a block of tokens at ``slot // granularity``.

A slot is emptied by its position alone, and its attention is 0; but 0 times NaN is NaN, so what is stored of values
is finite throughout: see `write`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from hashml.kvcache.contract import Codec, CodecState
from hashml.kvcache.pages import Pages, allocate, release
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerCache, LayerTables

Rows = dict[str, Array]
"""Leaves ``[B, H, G, ...]``, or ``[B, H, G / granularity, ...]``."""


def quantise(
    codec: Codec, params: Any, state: CodecState, x: Float[Array, "B H G D"], valid: Bool[Array, "B H G"]
) -> Rows:
    """The codec's rows for tokens; those that are not ``valid`` count as zeros."""
    return codec.quantise(params, state.fixed, jnp.where(valid[..., None], x, 0), valid)


def write(
    spec: LayerSpec,
    layer: LayerCache,
    keys: Rows,
    values: Rows,
    pos: Int32[Array, "B P G"],
    slot: Int32[Array, "B P G"],
    mask: Bool[Array, "B P G"],
) -> LayerCache:
    """Puts G tokens into main slots.

    A token whose value is no number, or too large for the store, gets zeros for it, and a key that is NaN where the
    codec of keys can say so. Seen, it then spoils what its row reads, as it should; its slot emptied, or its page
    given to another row, it spoils nothing, since logits of empty slots are never looked at.

    Args:
        spec, layer: what is written to.
        keys, values: from `quantise`.
        pos: their positions; -1 makes a hole in a block.
        slot: where; whole blocks in order where codecs have a granularity.
        mask: which are written at all; the others go nowhere. Equal within a block.
    """
    keys, values = _numbers(layer, keys, values)
    heads = spec.kv_heads
    places = jnp.broadcast_to(jnp.where(mask, slot, spec.slots), (pos.shape[0], heads, pos.shape[2]))
    pages = layer.pages
    if pages is not None:
        assert spec.page_size is not None
        logical = spec.slots // spec.page_size
        wanted = _marked(places // spec.page_size, logical)
        pages = allocate(pages, wanted)
        lost = (jnp.take_along_axis(pages.table, jnp.minimum(places // spec.page_size, logical - 1), axis=2) < 0) & (
            places < spec.slots
        )
        if spec.head_pos == 1:
            lost = jnp.broadcast_to(lost.any(axis=1, keepdims=True), lost.shape)
        places = jnp.where(lost, spec.slots, places)
        mask = mask & ~(lost[:, : spec.head_pos])
        pages = pages._replace(missed=pages.missed + lost[:, : spec.head_pos].sum(dtype=jnp.int32))
    rows, lines, count = (
        jnp.arange(pos.shape[0])[:, None, None],
        jnp.arange(spec.head_pos)[None, :, None],
        jnp.where(mask, slot, spec.slots),
    )
    return layer._replace(
        keys=_put(spec, layer.keys, keys, places, pages),
        values=_put(spec, layer.values, values, places, pages),
        pos=layer.pos.at[rows, lines, count].set(pos, mode="drop"),
        pages=pages,
    )


def _numbers(layer: LayerCache, keys: Rows, values: Rows) -> tuple[Rows, Rows]:
    """Rows in the store's dtypes, where a value that is not finite is 0 and its key NaN."""
    keys = {name: rows.astype(layer.keys.slots[name].dtype) for name, rows in keys.items()}
    values = {name: rows.astype(layer.values.slots[name].dtype) for name, rows in values.items()}
    count = max(rows.shape[2] for rows in (*keys.values(), *values.values()))
    spoilt = jnp.zeros((1, 1, count), bool)
    for name, rows in values.items():
        if jnp.issubdtype(rows.dtype, jnp.floating):
            finite = jnp.isfinite(rows.astype(jnp.float32))
            values[name] = jnp.where(finite, rows, 0)
            bad = ~finite.reshape(*rows.shape[:3], -1).all(axis=3)
            spoilt = spoilt | jnp.repeat(bad, count // rows.shape[2], axis=2)
    for name, rows in keys.items():
        if jnp.issubdtype(rows.dtype, jnp.floating):
            bad = spoilt.reshape(*spoilt.shape[:2], rows.shape[2], -1).any(axis=3)
            bad = bad.reshape(*bad.shape, *(1,) * (rows.ndim - 3))
            keys[name] = jnp.where(bad, jnp.asarray(jnp.nan, rows.dtype), rows)
    return keys, values


def _put(spec: LayerSpec, state: CodecState, rows: Rows, places: Array, pages: Pages | None) -> CodecState:
    batch, heads, count = places.shape
    b, h = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    slots = {}
    for name, leaf in state.slots.items():
        row = rows[name]
        block = count // row.shape[2]
        at = places[:, :, ::block]
        if pages is None:
            slots[name] = leaf.at[b, h, at // block].set(row, mode="drop")
            continue
        assert spec.page_size is not None
        logical = jnp.minimum(at // spec.page_size, pages.table.shape[2] - 1)
        page = jnp.take_along_axis(pages.table, logical, axis=2)
        page = jnp.where((at < spec.slots) & (page >= 0), page, leaf.shape[0])
        slots[name] = leaf.at[page, at % spec.page_size // block].set(row, mode="drop")
    return CodecState(slots, state.fixed)


def _marked(index: Int32[Array, "B H G"], size: int) -> Bool[Array, "B H {size}"]:
    """Which of ``size`` places are named."""
    batch, heads, _ = index.shape
    b, h = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    return jnp.zeros((batch, heads, size), bool).at[b, h, index].set(True, mode="drop")


def view(spec: LayerSpec, layer: LayerCache) -> tuple[CodecState, CodecState]:
    """Keys and values as slots, ``[B, H, C, ...]``; of a paged store a gathered copy, zeros where it has no page."""
    if layer.pages is None:
        return layer.keys, layer.values
    table = layer.pages.table

    def gather(state: CodecState) -> CodecState:
        found = {
            name: leaf.at[jnp.where(table < 0, leaf.shape[0], table)].get(mode="fill", fill_value=0)
            for name, leaf in state.slots.items()
        }
        return CodecState({n: x.reshape(*x.shape[:2], -1, *x.shape[4:]) for n, x in found.items()}, state.fixed)

    return gather(layer.keys), gather(layer.values)


def empty_slots(layer: LayerCache, pos: Int32[Array, "B P C"]) -> LayerCache:
    """The layer with other positions: slots at -1 are empty, and pages without a token go back to the pool."""
    pages = layer.pages
    if pages is not None:
        used = (pos >= 0).reshape(*pos.shape[:2], pages.table.shape[2], -1).any(axis=-1)
        pages = release(pages, jnp.broadcast_to(used, pages.table.shape))
    return layer._replace(pos=pos, pages=pages)


def encode(
    spec: LayerSpec, tables: LayerTables, layer: LayerCache, k: Array, v: Array, valid: Bool[Array, "B P G"]
) -> tuple[Rows, Rows]:
    """Rows of keys and values of the layer's codecs."""
    shown = jnp.broadcast_to(valid, k.shape[:3])
    return (
        quantise(spec.key_codec, tables.keys, layer.keys, k, shown),
        quantise(spec.value_codec, tables.values, layer.values, v, shown),
    )
