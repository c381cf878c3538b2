"""The arrays of a cache, and how they begin: empty.

    one layer   keys, values   the main store: C slots, in the codecs' own arrays
                pos            absolute position of each slot's token, -1 where there is none
                window ...     the R newest tokens, exact, in a ring
                policy         what the policy remembers of each slot of both tiers
                caps           slots that a head may use (AdaKV), or None
                pages          in the paged layout, where the slots of a row and head lie in the pool

A slot is described by its position: validity, causality, age and rotation all follow from it, so nothing can
disagree. The ring is always full, with empty entries at -1, and one index for the whole batch says where it turns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from hashml.kvcache.contract import Codec, CodecState, HeadBudgets, PolicyState
from hashml.kvcache.noise import row_keys
from hashml.kvcache.pages import Pages, empty_pages
from hashml.kvcache.spec import CacheSpec, LayerSpec


class LayerCache(NamedTuple):
    """One layer; see the module's docstring."""

    keys: CodecState
    values: CodecState
    pos: Int32[Array, "B P C"]
    window_keys: Float[Array, "B H R D"]
    window_values: Float[Array, "B H R D"]
    window_pos: Int32[Array, "B R"]
    policy: PolicyState
    caps: Int32[Array, "B H"] | None
    pages: Pages | None


class Cache(NamedTuple):
    """A model's cache.

    Attributes:
        layers: one `LayerCache` each.
        previous: what a decoder with smeared keys carries from token to token, a row ``[B, d]`` a layer; else None.
        length: tokens seen, which is the position of the next; how many are kept is another number.
        head: where the ring is written next; when it is a multiple of ``flush`` the oldest ``flush`` entries leave.
        key: of the policy's noise, one typed key a row; see `hashml.kvcache.noise`.
        born: tokens of each row's prompt.
        step: tokens decoded since the prompt.
    """

    layers: tuple[LayerCache, ...]
    previous: tuple[Any, ...]
    length: Int32[Array, " B"]
    head: Int32[Array, ""]
    key: Array
    born: Int32[Array, " B"]
    step: Int32[Array, ""]


class LayerTables(NamedTuple):
    """What the codecs of a layer have learned: parameters, one copy a model, no part of the cache."""

    keys: Any = None
    values: Any = None


def check_tables(spec: CacheSpec, tables: Sequence[LayerTables]) -> None:
    """Raises ValueError unless there is for every layer what its codecs learn, of this model's heads."""
    if len(tables) != len(spec.layers):
        raise ValueError(f"tables has {len(tables)} entries; spec has {len(spec.layers)} layers")
    for layer, known in zip(spec.layers, tables, strict=True):
        layer.key_codec.check_tables(known.keys, layer.kv_heads, layer.head_dim)
        layer.value_codec.check_tables(known.values, layer.kv_heads, layer.head_dim)


def init_layer(spec: LayerSpec, batch: int) -> LayerCache:
    """An empty layer."""
    ring = (batch, spec.kv_heads, spec.window, spec.head_dim)
    return LayerCache(
        keys=_store(spec, spec.key_codec, batch),
        values=_store(spec, spec.value_codec, batch),
        pos=jnp.full((batch, spec.head_pos, spec.slots), -1, jnp.int32),
        window_keys=jnp.zeros(ring, spec.dtype),
        window_values=jnp.zeros(ring, spec.dtype),
        window_pos=jnp.full((batch, spec.window), -1, jnp.int32),
        policy=spec.policy.init(spec, batch),
        caps=_caps(spec, batch),
        pages=None if spec.pages is None else empty_pages(spec, batch),
    )


def _caps(spec: LayerSpec, batch: int) -> Int32[Array, "B H"] | None:
    """The same budget for every head, as long as no prompt has shared them out."""
    if not isinstance(spec.policy, HeadBudgets):
        return None
    return jnp.full((batch, spec.kv_heads), min(spec.policy.base + spec.policy.later, spec.slots), jnp.int32)


def _store(spec: LayerSpec, codec: Codec, batch: int) -> CodecState:
    slots = spec.slots
    state = codec.init(batch, spec.kv_heads, slots, spec.head_dim, jnp.dtype(spec.dtype))
    if spec.pages is None or spec.page_size is None:
        return state
    # The pool has one batch-and-head axis, the page's, in place of two.
    pool = codec.init(spec.pages, 1, spec.page_size, spec.head_dim, jnp.dtype(spec.dtype))
    return CodecState({name: leaf[:, 0] for name, leaf in pool.slots.items()}, state.fixed)


def init(spec: CacheSpec, key: Array, previous: tuple[Any, ...] | None = None) -> Cache:
    """An empty cache of a whole model: ``length`` 0 everywhere, all positions -1.

    Args:
        spec: of the layers.
        key: of the policy's noise: one, from which each row's is drawn, or ``[B]`` of the rows.
        previous: a row of zeros ``[B, d]`` a layer for a decoder with smeared keys.
    """
    return Cache(
        layers=tuple(init_layer(layer, spec.batch) for layer in spec.layers),
        previous=(None,) * len(spec.layers) if previous is None else previous,
        length=jnp.zeros(spec.batch, jnp.int32),
        head=jnp.zeros((), jnp.int32),
        key=row_keys(key, spec.batch),
        born=jnp.zeros(spec.batch, jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )


def all_positions(spec: LayerSpec, layer: LayerCache) -> Int32[Array, "B P N"]:
    """Positions of both tiers: main slots, then the window's."""
    batch, heads, _ = layer.pos.shape
    ring = jnp.broadcast_to(layer.window_pos[:, None], (batch, heads, spec.window))
    return jnp.concatenate([layer.pos, ring], axis=2)
