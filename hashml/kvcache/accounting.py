"""What a cache costs, read off its leaves: allocated bytes, and bytes of the tokens that are there.

    payload     codes and values of the main store           window    exact keys and values, and their positions
    scales      scales, zeros, outliers' values              policy    what the policy remembers of slots
    index       positions, kept channels, page tables        tables    codebooks, one copy a model

``allocated`` is what the buffers take. ``logical`` leaves out main slots, window entries and policy entries that hold
no token: what a paged layout could free. Codec tables are parameters and have their own line. `cache_cost` sets both
beside the tokens that were seen and kept.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hashml.accounting import stored_bytes
from hashml.kvcache.contract import Codec, CodecState
from hashml.kvcache.spec import CacheSpec, LayerSpec
from hashml.kvcache.state import Cache, LayerCache, all_positions, init

PARTS = ("payload", "scales", "index", "window", "policy")


class CacheBytes(NamedTuple):
    """Bytes by part.

    Attributes:
        allocated: of the buffers, by part; exact ints.
        logical: of what holds a token, by part; float32 scalars.
        tables: of what codecs have learned, once a model.
    """

    allocated: dict[str, int]
    logical: dict[str, Float[Array, ""]]
    tables: int

    @property
    def total(self) -> int:
        """Allocated bytes of all parts, tables apart."""
        return sum(self.allocated.values())


def cache_bytes(spec: CacheSpec, cache: Cache, tables: Any = ()) -> CacheBytes:
    """Bytes of a cache; ``cache`` may be abstract (`jax.eval_shape`), whose logical bytes are those of a full one.

    The few scalars that all layers share (ring index, noise key, lengths) count as ``index``.
    """
    allocated: dict[str, int] = {part: 0 for part in PARTS}
    logical: dict[str, Any] = {part: jnp.zeros(()) for part in PARTS}
    key = jax.eval_shape(jax.random.key_data, cache.key)
    shared = stored_bytes((cache.length, cache.head, cache.born, cache.step, key))
    shared += stored_bytes(cache.previous)
    allocated["index"] += shared
    logical["index"] = logical["index"] + shared
    for layer_spec, layer in zip(spec.layers, cache.layers, strict=True):
        for part, leaf, share in _leaves(layer_spec, layer):
            size = stored_bytes(leaf)
            allocated[part] += size
            logical[part] = logical[part] + size * share
    return CacheBytes(allocated, logical, stored_bytes(tables))


class CacheCost(NamedTuple):
    """Bytes of the buffers beside the tokens that they tell of; tables apart. NaN where no token was seen.

    Attributes:
        seen: tokens seen, over all rows.
        kept: tokens kept, over all rows; the mean of layers and heads.
        per_seen, per_kept: bytes for each of them.
        bits: for each key and value number of the tokens seen.
        ratio: bytes over those of `hashml.kvcache.dense.Dense` keys and values of all tokens seen, in the layers'
            ``dtype``, with nothing beside them.
    """

    seen: int
    kept: float
    per_seen: float
    per_kept: float
    bits: float
    ratio: float


def cache_cost(spec: CacheSpec, cache: Cache, *, logical: bool = False) -> CacheCost:
    """What a cache of arrays, not of shapes, costs for each token.

    Args:
        spec, cache: as in `cache_bytes`.
        logical: whether bytes are those that hold tokens, in place of all that is allocated.
    """
    found = cache_bytes(spec, cache)
    size = math.fsum(float(part) for part in found.logical.values()) if logical else float(found.total)
    seen = int(np.asarray(cache.length).sum())
    kept = [np.asarray(all_positions(one, layer) >= 0).sum() / one.head_pos
            for one, layer in zip(spec.layers, cache.layers, strict=True)]  # fmt: skip
    mean = float(np.mean(kept))
    values = seen * sum(2 * layer.kv_heads * layer.head_dim for layer in spec.layers)
    dense = seen * sum(2 * x.kv_heads * x.head_dim * jnp.dtype(x.dtype).itemsize for x in spec.layers)

    def over(count: float | int) -> float:
        return size / count if count else math.nan

    return CacheCost(seen, mean, over(seen), over(mean), 8 * over(values), over(dense))


def bytes_per_token(layers: Sequence[LayerSpec], tokens: int) -> float:
    """Allocated bytes of a cache of one row, for each of the ``tokens`` it has seen; nothing is allocated."""
    spec = CacheSpec(tuple(layers), 1)
    return cache_bytes(spec, jax.eval_shape(lambda: init(spec, jax.random.key(0)))).total / tokens


class _Shares(NamedTuple):
    """Shares of a layer's arrays that hold a token."""

    store: Any
    """Of the main store's slots, which in a paged layer are those of the pool."""
    slots: Any
    """Of the entries that every slot has, in a pool or not."""
    ring: Any


def _shares(spec: LayerSpec, layer: LayerCache) -> _Shares:
    if isinstance(layer.pos, jax.ShapeDtypeStruct):
        return _Shares(1.0, 1.0, 1.0)
    slots = (layer.pos >= 0).mean() if layer.pos.size else jnp.ones(())
    ring = (layer.window_pos >= 0).mean() if layer.window_pos.size else jnp.ones(())
    if layer.pages is None or spec.pages is None or spec.page_size is None:
        return _Shares(slots, slots, ring)
    held = (layer.pos >= 0).sum() * (spec.kv_heads // spec.head_pos)
    return _Shares(held / (spec.pages * spec.page_size), slots, ring)


def _leaves(spec: LayerSpec, layer: LayerCache) -> list[tuple[str, Any, Any]]:
    """Every leaf with its part and the share of it that holds tokens."""
    shares = _shares(spec, layer)
    found: list[tuple[str, Any, Any]] = []
    for codec, state in ((spec.key_codec, layer.keys), (spec.value_codec, layer.values)):
        first = 1.0
        if codec.needs_sinks and not isinstance(layer.pos, jax.ShapeDtypeStruct):
            first = (layer.pos[:, :, : codec.needs_sinks] >= 0).mean()
        found += _codec_leaves(codec, state, shares.store, first)
    found += [("index", layer.pos, shares.slots), ("window", layer.window_pos, shares.ring)]
    found += [("window", leaf, shares.ring) for leaf in (layer.window_keys, layer.window_values)]
    both = (shares.slots * spec.slots + shares.ring * spec.window) / max(1, spec.capacity)
    found += [("policy", leaf, both) for leaf in layer.policy.values()]
    found += [("index", leaf, 1.0) for leaf in jax.tree.leaves((layer.caps, layer.pages))]
    return found


def _codec_leaves(codec: Codec, state: CodecState, share: Any, first: Any) -> list[tuple[str, Any, Any]]:
    """``first`` is the share of the slots that a codec keeps exact which hold a token."""
    roles = codec.roles
    slots = [(roles[name], leaf, first if roles[name] == "window" else share) for name, leaf in state.slots.items()]
    return slots + [(roles[name], leaf, 1.0) for name, leaf in state.fixed.items()]


def describe(spec: CacheSpec, cache: Cache, tables: Any = ()) -> str:
    """A line for a reader: bytes and bits a value of all rows, beside a dense bfloat16 cache of the tokens seen."""
    found, held = cache_bytes(spec, cache, tables), cache_cost(spec, cache, logical=True)
    size = math.fsum(float(part) for part in found.logical.values())
    text = f"cache: {found.total:,} bytes allocated, {size:,.0f} hold tokens"
    if not held.seen:
        return f"{text}; none was seen"
    return (
        f"{text}, {held.bits:.2f} bits for each value of {held.seen:,} tokens seen (bfloat16: 16), "
        f"{held.per_kept:,.0f} bytes for each of {held.kept:,.0f} kept"
    )
