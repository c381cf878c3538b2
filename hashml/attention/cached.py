"""Sparse decoding over a compressed cache: a selector's few bits say which slots a step decodes.

    logits, state = sparse_prefill(model, spec, tables, reads, params, tokens, positions, key)
    logits, state = sparse_decode_step(model, spec, tables, reads, params, state, token)    jit it, donate the state

A step of a layer: tokens enter and leave the window as in `hashml.kvcache`; those that reached the main store are
read back from their codes and indexed; the selector names slots; the codes of these alone are gathered, decoded and,
where keys are stored raw, rotated at their positions. The exact window is read whole. Both parts merge by their sums
of exponentials, so the answer is exact softmax over what was read.

The index is made from keys as a query meets them: decoded and rotated. It knows no position, so that evicted slots
and empty rows need no care: positions do. A policy that looks at attention cannot be served, since there is none over
all keys. Where codes share a scale over a block of tokens, the whole block of a chosen token is decoded; the pages of
`Quest` are then the cheaper choice.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, Key

from hashml.attention.selector_contract import Gqa, Index, Selector, check_gqa, check_sizes, per_head
from hashml.attention.sparse_decode import Selection, finish, merge_partials, rows_partial
from hashml.kvcache import (
    Cache,
    CacheSpec,
    Codec,
    CodecState,
    LayerCache,
    LayerSpec,
    LayerTables,
    Policy,
    append,
    evict,
    prefill,
)
from hashml.kvcache.noise import layer_keys
from hashml.models.decoder import DecoderModel


@dataclasses.dataclass(frozen=True)
class SparseReads:
    """What a step reads of the main store, beside the exact window.

    Attributes:
        selector: who names the slots.
        heavy: tokens that it names.
        sinks, window: first and last tokens that are always read. Those in the exact window are read anyway, so with
            one ``window`` may be 0.
        gqa: lists for query heads, or one for all of a key head.

    Raises:
        ValueError: for negative numbers, nothing to read, or another ``gqa``.
    """

    selector: Selector
    heavy: int
    sinks: int = 0
    window: int = 0
    gqa: Gqa = "head"

    def __post_init__(self) -> None:
        check_sizes(self.sinks, self.window, self.heavy)
        check_gqa(self.gqa)


class SparseCache(NamedTuple):
    """A cache and the index of each layer's main store."""

    cache: Cache
    indexes: tuple[Index, ...]


def read_rows(
    codec: Codec, params: Any, state: CodecState, idx: Int32[Array, "B S M"], slots: int
) -> Float32[Array, "B S M D"]:
    """Decoded tokens of the listed slots alone; each list reads its own key head.

    Args:
        codec, params, state: of the store.
        idx: slots; one outside gives some row.
        slots: of the store.
    """
    grain = codec.granularity
    some = next(iter(state.slots.values()))
    batch, heads = some.shape[:2]
    lists, entries = idx.shape[1:]
    flat = jnp.clip(idx, 0, slots - 1).reshape(batch, heads, -1)
    b, h, block = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None], flat // grain

    def gathered(leaf: Array) -> Array:
        # A leaf has a row a token, or a row a block.
        blocks = leaf.reshape(batch, heads, slots // grain, -1, *leaf.shape[3:])
        found = blocks[b, h, block]
        return found.reshape(batch, heads, -1, *leaf.shape[3:])

    few = CodecState({name: gathered(leaf) for name, leaf in state.slots.items()}, state.fixed)
    decoded = codec.decode(params, few).reshape(batch, heads, flat.shape[2], grain, -1)
    rows = jnp.take_along_axis(decoded, (flat % grain)[..., None, None], axis=3)
    return rows.reshape(batch, lists, entries, -1)


def index_layer(
    reads: SparseReads,
    spec: LayerSpec,
    tables: LayerTables,
    layer: LayerCache,
    *,
    key: Key[Array, ""] | None = None,
    learned: Any = None,
) -> Index:
    """The index of what a layer's main store holds; it is decoded whole, this once.

    Args:
        reads: whose selector it is for.
        spec, tables, layer: of the layer.
        key, learned: as `Selector.build` has them.

    Raises:
        ValueError: for a layer that cannot be read sparsely.
    """
    check_layer(spec)
    keys = _turned(spec, spec.key_codec.decode(tables.keys, layer.keys), layer.pos)
    values = spec.value_codec.decode(tables.values, layer.values)
    return reads.selector.build(keys, values, layer.pos, key=key, learned=learned)


def index_cache(
    reads: SparseReads,
    spec: CacheSpec,
    tables: Sequence[LayerTables],
    cache: Cache,
    *,
    key: Key[Array, ""] | None = None,
    learned: Sequence[Any] | None = None,
) -> SparseCache:
    """A cache with its indexes. All layers draw from the same key, as the papers' planes are shared."""
    known = (None,) * len(spec.layers) if learned is None else learned
    indexes = tuple(
        index_layer(reads, layer, codecs, held, key=key, learned=own)
        for layer, codecs, held, own in zip(spec.layers, tables, cache.layers, known, strict=True)
    )
    return SparseCache(cache, indexes)


def sparse_attend(
    reads: SparseReads,
    spec: LayerSpec,
    tables: LayerTables,
    layer: LayerCache,
    index: Index,
    q: Float[Array, "B Hq 1 D"],
    query_pos: Int32[Array, "B 1"],
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "B Hq 1 D"], Selection]:
    """What unrotated queries read, in their dtype, and the slots of the main store that it came from.

    Args:
        reads: what is read.
        spec, tables, layer: of the layer.
        index: of its main store.
        q, query_pos: one query a head, and where it stands.
        key: for selectors that sample.
    """
    turned = (q if spec.rotary is None else spec.rotary.rotate(q, query_pos[:, None]))[:, :, 0]
    past = jnp.full_like(query_pos, -1) if spec.sliding_window is None else query_pos - spec.sliding_window
    pos = jnp.where(layer.pos > past[:, None], layer.pos, -1)

    def key_rows(idx: Array) -> Array:
        rows = read_rows(spec.key_codec, tables.keys, layer.keys, idx, spec.slots)
        places = jnp.clip(idx, 0, spec.slots - 1)
        return _turned(spec, rows, jnp.take_along_axis(per_head(layer.pos, idx.shape[1]), places, axis=2))

    sizes = {"sinks": reads.sinks, "window": reads.window, "heavy": reads.heavy}
    chosen = reads.selector.select(
        index, turned, pos, query_pos[:, 0], **sizes, gqa=reads.gqa, key=key, rows=key_rows
    )
    values = read_rows(spec.value_codec, tables.values, layer.values, chosen.idx, spec.slots)
    parts = [rows_partial(turned, key_rows(chosen.idx), values, chosen.valid, chosen.weight)]
    if spec.window:
        ring = layer.window_pos
        shown = (ring >= 0) & (ring <= query_pos) & (ring > past)
        shown = jnp.broadcast_to(shown[:, None], layer.window_keys.shape[:3])
        keys = _turned(spec, layer.window_keys.astype(jnp.float32), ring[:, None])
        parts.append(rows_partial(turned, keys, layer.window_values, shown, jnp.ones(shown.shape, jnp.float32)))
    return finish(merge_partials(*parts))[:, :, None].astype(q.dtype), chosen


def sparse_prefill(
    model: DecoderModel,
    spec: CacheSpec,
    tables: Sequence[LayerTables],
    reads: SparseReads,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    key: Key[Array, ""],
    *,
    learned: Sequence[Any] | None = None,
) -> tuple[Float[Array, "B V"], SparseCache]:
    """`hashml.kvcache.prefill`, which is dense, and the indexes of what it leaves.

    To read a question sparsely as well, prefill its context and give the question to `sparse_decode_step`.

    Raises:
        ValueError: as `prefill`, and for layers that cannot be read sparsely.
    """
    for layer in spec.layers:
        check_layer(layer)
    logits, cache = prefill(model, spec, tables, params, tokens, positions, key)
    drawn = jax.random.fold_in(key, len(spec.layers))
    return logits, index_cache(reads, spec, tables, cache, key=drawn, learned=learned)


def sparse_decode_step(
    model: DecoderModel,
    spec: CacheSpec,
    tables: Sequence[LayerTables],
    reads: SparseReads,
    params: Any,
    state: SparseCache,
    token: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], SparseCache]:
    """`hashml.kvcache.decode_step` for one token a row, with sparse reads.

    Jit it with ``model``, ``spec`` and ``reads`` static and ``state`` donated.
    """
    cache = state.cache
    pos = cache.length[:, None]
    x = model.embed(params, token[:, None])
    layers, indexes, previous = [], [], []
    # Draws of a selector are one for all rows, and anew at every step.
    noise = jax.random.fold_in(cache.key[0], cache.step)
    for place, (layer, known) in enumerate(zip(spec.layers, tables, strict=True)):
        own, keys = jax.random.fold_in(noise, place), layer_keys(cache.key, place)

        def attend(q: Array, k: Array, v: Array, place=place, layer=layer, known=known, own=own, keys=keys) -> tuple:
            before = cache.layers[place]
            stored = layer.rotary.rotate(k, pos[:, None]) if layer.rope == "write" and layer.rotary is not None else k
            held = evict(layer, known, before, cache.head, cache.length, keys)
            held = append(layer, known, held, cache.head, stored, v, pos, cache.length, keys)
            index = _indexed(reads, layer, known, before, held, state.indexes[place])
            out, _ = sparse_attend(reads, layer, known, held, index, q, pos, own)
            return out, (held, index)

        weights = model.layer_params(params, place)
        x, last, (held, index) = model.layer(weights, x, cache.previous[place], attend)
        layers.append(held)
        indexes.append(index)
        previous.append(last)
    ring = spec.layers[0].window
    following = cache._replace(
        layers=tuple(layers),
        previous=tuple(previous),
        length=cache.length + 1,
        head=(cache.head + 1) % ring if ring else cache.head,
        step=cache.step + 1,
    )
    return model.unembed(params, x)[:, 0], SparseCache(following, tuple(indexes))


@dataclasses.dataclass(frozen=True)
class SparseEngine:
    """A decoder with sparse reads, as `hashml.models.generation` wants an engine; see `sparse_engine`."""

    prefill: Callable[[Any, Array, Array], tuple[Array, SparseCache]]
    step: Callable[[Any, SparseCache, Array], tuple[Array, SparseCache]]
    capacity: int


def sparse_engine(
    model: DecoderModel,
    layers: Sequence[LayerSpec],
    tables: Sequence[LayerTables],
    reads: SparseReads,
    *,
    capacity: int,
    key: Key[Array, ""] | None = None,
    learned: Sequence[Any] | None = None,
) -> SparseEngine:
    """An engine for `generate` and `stream`.

    Args:
        model: the decoder.
        layers, tables: of the cache.
        reads: what a step reads of it.
        capacity: most tokens of a row that a user may ask for.
        key: of planes and draws.
        learned: what selectors have learned, one entry a layer.
    """
    noise = jax.random.key(0) if key is None else key

    def begin(params: Any, tokens: Array, positions: Array) -> tuple[Array, SparseCache]:
        spec = CacheSpec(tuple(layers), tokens.shape[0])
        return sparse_prefill(model, spec, tables, reads, params, tokens, positions, noise, learned=learned)

    def step(params: Any, state: SparseCache, token: Array) -> tuple[Array, SparseCache]:
        spec = CacheSpec(tuple(layers), token.shape[0])
        return sparse_decode_step(model, spec, tables, reads, params, state, token)

    return SparseEngine(begin, step, capacity)


def check_layer(spec: LayerSpec) -> None:
    """Raises ValueError for a layer that cannot be read sparsely."""
    if spec.pages is not None:
        raise ValueError(f"pages is {spec.pages}; a paged store is not read sparsely")
    if spec.rope == "slot":
        raise ValueError("rope is 'slot'; keys that turn as others leave cannot be indexed")
    if not spec.slots:
        raise ValueError("slots is 0; there is nothing beside the exact window to choose from")
    if type(spec.policy).observe is not Policy.observe:
        raise ValueError(f"policy is {spec.policy}; it looks at attention, and sparse reads form none over all keys")


def _turned(spec: LayerSpec, keys: Array, pos: Array) -> Array:
    """Keys as a query meets them, from keys as the layer stores them."""
    return spec.rotary.rotate(keys, pos) if spec.rope == "read" and spec.rotary is not None else keys


def _indexed(
    reads: SparseReads, spec: LayerSpec, tables: LayerTables, before: LayerCache, held: LayerCache, index: Index
) -> Index:
    """The index with the tokens that a step has brought to the main store: slots whose position is another."""
    entered = (held.pos != before.pos) & (held.pos >= 0)
    most = min(spec.flush if spec.window else 1, spec.slots)
    marked, at = jax.lax.top_k(entered.astype(jnp.int32), most)
    at = jnp.where(marked > 0, at, spec.slots)
    lists = per_head(at, spec.kv_heads)
    keys = read_rows(spec.key_codec, tables.keys, held.keys, lists, spec.slots)
    values = read_rows(spec.value_codec, tables.values, held.values, lists, spec.slots)
    pos = jnp.take_along_axis(held.pos, jnp.minimum(at, spec.slots - 1), axis=2)
    return reads.selector.append(index, _turned(spec, keys, pos), values, at)
