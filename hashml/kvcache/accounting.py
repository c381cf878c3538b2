"""What a cache costs, read off its leaves: allocated bytes, and bytes of the tokens that are there.

    payload     codes and values of the main store           window    exact keys and values, and their positions
    scales      scales, zeros, outliers' values              policy    what the policy remembers of slots
    index       positions, kept channels, page tables        tables    codebooks, one copy a model

``allocated`` is what the buffers take. ``logical`` leaves out main slots, window entries and policy entries that hold
no token: what a paged layout could free. Codec tables are parameters and have their own line.
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
from hashml.kvcache.state import Cache, LayerCache, init

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
    shared = stored_bytes((cache.length, cache.head, cache.step, key))
    shared += stored_bytes(cache.previous)
    allocated["index"] += shared
    logical["index"] = logical["index"] + shared
    for layer_spec, layer in zip(spec.layers, cache.layers, strict=True):
        main, ring = _filled(layer_spec, layer)
        for part, leaf, share in _leaves(layer_spec, layer, main, ring):
            size = stored_bytes(leaf)
            allocated[part] += size
            logical[part] = logical[part] + size * share
    return CacheBytes(allocated, logical, stored_bytes(tables))


def bytes_per_token(layers: Sequence[LayerSpec], tokens: int) -> float:
    """Allocated bytes of a cache of one row, for each of the ``tokens`` it has seen; nothing is allocated."""
    spec = CacheSpec(tuple(layers), 1)
    return cache_bytes(spec, jax.eval_shape(lambda: init(spec, jax.random.key(0)))).total / tokens


def _filled(spec: LayerSpec, layer: LayerCache) -> tuple[Any, Any]:
    """Shares of main slots and of window entries that hold a token."""
    if isinstance(layer.pos, jax.ShapeDtypeStruct):
        return 1.0, 1.0
    main = (layer.pos >= 0).mean() if layer.pos.size else jnp.ones(())
    ring = (layer.window_pos >= 0).mean() if layer.window_pos.size else jnp.ones(())
    if layer.pages is not None and spec.pages is not None:
        # Slots of the pool that hold a token, over all slots of the pool.
        assert spec.page_size is not None
        held = (layer.pos >= 0).sum() * (spec.kv_heads // spec.head_pos)
        main = held / (spec.pages * spec.page_size)
    return main, ring


def _leaves(spec: LayerSpec, layer: LayerCache, main: Any, ring: Any) -> list[tuple[str, Any, Any]]:
    """Every leaf with its part and the share of it that holds tokens."""
    found: list[tuple[str, Any, Any]] = []
    for codec, state in ((spec.key_codec, layer.keys), (spec.value_codec, layer.values)):
        found += _codec_leaves(codec, state, main)
    found += [("index", layer.pos, main), ("window", layer.window_pos, ring)]
    found += [("window", leaf, ring) for leaf in (layer.window_keys, layer.window_values)]
    both = (main * spec.slots + ring * spec.window) / max(1, spec.capacity)
    found += [("policy", leaf, both) for leaf in layer.policy.values()]
    found += [("index", leaf, 1.0) for leaf in jax.tree.leaves((layer.caps, layer.pages))]
    return found


def _codec_leaves(codec: Codec, state: CodecState, share: Any) -> list[tuple[str, Any, Any]]:
    roles = codec.roles
    slots = [(roles[name], leaf, share) for name, leaf in state.slots.items()]
    return slots + [(roles[name], leaf, 1.0) for name, leaf in state.fixed.items()]


def describe(spec: CacheSpec, cache: Cache, tables: Any = ()) -> str:
    """A line for a reader: bytes a row and bits a value, beside a dense bfloat16 cache of the tokens seen."""
    found = cache_bytes(spec, cache, tables)
    tokens = max(1, int(np.asarray(cache.length).max()))
    values = sum(2 * layer.kv_heads * layer.head_dim for layer in spec.layers) * tokens * spec.batch
    held = math.fsum(float(part) for part in found.logical.values())
    return (
        f"cache: {found.total:,} bytes allocated, {held:,.0f} hold tokens, {8 * held / values:.2f} bits for each "
        f"value of {tokens:,} tokens seen (bfloat16: 16)"
    )
