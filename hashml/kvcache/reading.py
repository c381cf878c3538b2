"""How attention reads the main store: its logits, and its values under probabilities, in either layout.

Slots are read as they lie. Of pages no copy in the order of slots is made where a codec has learned nothing and keeps
nothing for a row: every page answers for itself, asked by the queries of its owner,

    logits[b, h, page]  =  pool[table[b, h, page]] . q[b, h]            and likewise sums of values

and what is gathered are answers, a page's logits and one row of D numbers a page. Pages of nobody answer, too, and
are not heard. Other codecs read the copy that `hashml.kvcache.store.view` makes.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from hashml.kvcache.contract import CodecState, Rotate
from hashml.kvcache.pages import Pages
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerCache, LayerTables
from hashml.kvcache.store import view


def read_logits(
    spec: LayerSpec,
    tables: LayerTables,
    layer: LayerCache,
    q: Float[Array, "B H J n D"],
    places: Int32[Array, "B P C"] | None,
) -> Float[Array, "B H J n C"]:
    """Inner products of queries with all keys of the main store, float32.

    Args:
        spec, tables, layer: of the layer.
        q: rotated queries, scaled.
        places: what the keys of slots are rotated at, for keys that are stored raw; else None.
    """
    if layer.pages is None or not _in_place(layer.keys, tables.keys):
        keys, _ = view(spec, layer)
        return spec.key_codec.logits(tables.keys, keys, q, _rotation(spec, places))
    pages, (batch, heads, group, count, width) = layer.pages, q.shape
    entry = _entries(pages)
    asked = q.reshape(batch * heads, group, count, width)[entry // pages.table.shape[2]]
    if places is not None:
        every = jnp.broadcast_to(places, (batch, heads, spec.slots))
        places = every.reshape(batch * heads * pages.table.shape[2], 1, -1)[entry]
    found = spec.key_codec.logits(tables.keys, _pool(layer.keys), asked[:, None], _rotation(spec, places))
    # [B, H, L, J, n, page]
    return jnp.moveaxis(_answers(found[:, 0], pages), 2, 4).reshape(*q.shape[:-1], spec.slots)


def read_values(
    spec: LayerSpec, tables: LayerTables, layer: LayerCache, probs: Float[Array, "B H J n C"]
) -> Float[Array, "B H J n D"]:
    """``probs`` times the values of the main store, float32; arguments as of `read_logits`."""
    if layer.pages is None or not _in_place(layer.values, tables.values):
        _, values = view(spec, layer)
        return spec.value_codec.weighted_sum(tables.values, values, probs)
    pages, (batch, heads, group, count, _) = layer.pages, probs.shape
    logical = pages.table.shape[2]
    parts = jnp.moveaxis(probs.reshape(batch, heads, group, count, logical, -1), 4, 2)
    parts = parts.reshape(batch * heads * logical, 1, group, count, -1)[_entries(pages)]
    found = spec.value_codec.weighted_sum(tables.values, _pool(layer.values), parts)
    return _answers(found[:, 0], pages).sum(axis=2)


def _in_place(state: CodecState, params: Any) -> bool:
    return params is None and not state.fixed


def _rotation(spec: LayerSpec, places: Array | None) -> Rotate | None:
    rotary = spec.rotary
    return None if places is None or rotary is None else lambda keys: rotary.rotate(keys, places)


def _entries(pages: Pages) -> Int32[Array, " pool"]:
    """Whose each page of the pool is: its place in the table, as one line; any where it is nobody's."""
    size = pages.free.shape[0]
    table = pages.table.reshape(-1)
    return (
        jnp.zeros(size, jnp.int32)
        .at[jnp.where(table < 0, size, table)]
        .set(jnp.arange(table.shape[0], dtype=jnp.int32), mode="drop")
    )


def _pool(state: CodecState) -> CodecState:
    """Pages as rows of a batch, with one head."""
    return CodecState({name: leaf[:, None] for name, leaf in state.slots.items()}, {})


def _answers(found: Array, pages: Pages) -> Array:
    """``[pool, ...]`` as ``[B, H, L, ...]``; zeros where there is no page."""
    place = jnp.where(pages.table < 0, found.shape[0], pages.table)
    return found.at[place].get(mode="fill", fill_value=0)
