"""Prefill, insert, decode, reset: a decoder that runs on a compressed cache, a fixed number of rows at a time.

    logits, cache = prefill(model, spec, tables, params, tokens, positions, key)
    logits, cache = decode_step(model, spec, tables, params, cache, token)       jit it with the cache donated

One step of a layer: the oldest tokens leave the window, the new one enters, attention reads both tiers, the policy
looks on. Rows are independent: what one holds or when it ends changes no bit of another. Layers are a tuple and the
loop over them is unrolled, since a scan over a stacked cache keeps a second copy of it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hashml.kvcache.attending import attend, observe, stored_keys
from hashml.kvcache.eviction import append, evict
from hashml.kvcache.fused import fused_attend, is_fused
from hashml.kvcache.prefill import prefill_layer
from hashml.kvcache.spec import CacheSpec
from hashml.kvcache.state import Cache, LayerCache, LayerTables
from hashml.kvcache.store import empty_slots
from hashml.models.decoder import DecoderModel
from hashml.models.exact_attention import causal_attention

Tables = Sequence[LayerTables]
"""What the codecs have learned, one entry a layer."""


def no_tables(spec: CacheSpec) -> tuple[LayerTables, ...]:
    """Of codecs that learn nothing."""
    return (LayerTables(),) * len(spec.layers)


def prefill(
    model: DecoderModel,
    spec: CacheSpec,
    tables: Tables,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    key: Array,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after each row's last token, and the cache of the prompts.

    Args:
        model: from `hashml.models.decoder.decoder_model`.
        spec: of the cache.
        tables: of its codecs.
        params: of the model.
        tokens: prompts, padded at either end.
        positions: 0, 1, 2... along each row, -1 for padding. A row of padding alone stays empty; its logits are
            those of no token.
        key: of the policy's noise.

    Raises:
        ValueError: for shapes or layers that do not fit, or a prompt longer than a cache that keeps all can hold.
    """
    _check(model, spec, tokens, positions)
    positions = positions.astype(jnp.int32)
    x = model.embed(params, tokens)
    layers, previous = [], []
    for index, (layer, known) in enumerate(zip(spec.layers, tables, strict=True)):
        noise = jax.random.fold_in(key, index)

        def attend_prompt(q: Array, k: Array, v: Array, layer=layer, known=known, noise=noise) -> tuple[Array, Any]:
            window = layer.sliding_window
            out = causal_attention(q, k, v, positions, rotary=layer.rotary, sliding_window=window)
            return out, prefill_layer(layer, known, q, k, v, positions, noise)

        weights = model.layer_params(params, index)
        x, last, filled = model.layer(weights, x, None, attend_prompt, positions >= 0)
        layers.append(filled)
        previous.append(last)
    newest = jnp.argmax(positions, axis=1)[:, None, None]
    logits = model.unembed(params, jnp.take_along_axis(x, newest, axis=1))[:, 0]
    zero = jnp.zeros((), jnp.int32)
    length = positions.max(axis=1) + 1
    return logits, Cache(tuple(layers), tuple(previous), length, zero, jax.random.fold_in(key, len(layers)), zero)


def decode_step(
    model: DecoderModel,
    spec: CacheSpec,
    tables: Tables,
    params: Any,
    cache: Cache,
    token: Int[Array, "B"] | Int[Array, "B n"],
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after one more token in each row (or n of them, a divisor of ``flush``), and the cache with them.

    Jit it with ``model`` and ``spec`` static and ``cache`` donated: then all updates are in place.
    """
    tokens = token if token.ndim == 2 else token[:, None]
    count = tokens.shape[1]
    pos = cache.length[:, None] + jnp.arange(count, dtype=jnp.int32)
    x = model.embed(params, tokens)
    layers, previous = [], []
    noise = jax.random.fold_in(cache.key, cache.step)
    for index, (layer, known) in enumerate(zip(spec.layers, tables, strict=True)):
        own = jax.random.fold_in(noise, index)

        def attend_cache(q: Array, k: Array, v: Array, index=index, layer=layer, known=known, own=own) -> tuple:
            held = evict(layer, known, cache.layers[index], cache.head, cache.length)
            held = append(layer, known, held, cache.head, stored_keys(layer, k, pos), v, pos, cache.length)
            if is_fused(layer, count):
                return fused_attend(layer, known, held, q, pos), held
            out, attention = attend(layer, known, held, q, pos)
            return out, observe(layer, held, attention, own, cache.step)

        weights = model.layer_params(params, index)
        x, last, held = model.layer(weights, x, cache.previous[index], attend_cache)
        layers.append(held)
        previous.append(last)
    window = spec.layers[0].window
    return model.unembed(params, x[:, -1:])[:, 0], Cache(
        layers=tuple(layers),
        previous=tuple(previous),
        length=cache.length + count,
        head=(cache.head + count) % window if window else cache.head,
        key=cache.key,
        step=cache.step + count,
    )


def reset_rows(cache: Cache, rows: Bool[Array, " B"]) -> Cache:
    """The cache with these rows empty, for requests that have ended. Positions go to -1; what lies there stays, but
    for pages, which go back to the pool."""

    def empty(layer: LayerCache) -> LayerCache:
        gone = rows[:, None]
        kept = empty_slots(layer, jnp.where(gone[..., None], -1, layer.pos))
        return kept._replace(window_pos=jnp.where(gone, -1, layer.window_pos))

    return cache._replace(
        layers=tuple(empty(layer) for layer in cache.layers),
        previous=tuple(None if x is None else jnp.where(rows[:, None], 0, x) for x in cache.previous),
        length=jnp.where(rows, 0, cache.length),
    )


def insert(cache: Cache, prompt: Cache, row: Int[Array, ""] | int) -> Cache:
    """The cache with a prompt's (a cache of one row, fresh from `prefill`) in a row of it.

    To be called when ``cache.head`` is a multiple of ``flush``, where a row's window looks as it does after its
    own prefill; then the row goes on bit for bit as it would alone.

    Raises:
        ValueError: for a prompt of more than one row, or a paged cache.
    """
    if prompt.length.shape != (1,):
        raise ValueError(f"prompt holds {prompt.length.shape[0]} rows; it must hold 1")
    if any(layer.pages is not None for layer in cache.layers):
        raise ValueError("cache is paged; a row is inserted into a cache of slots")
    chosen = jnp.arange(cache.length.shape[0]) == row

    def place(held: LayerCache, new: LayerCache) -> LayerCache:
        slots, window = new.pos.shape[2], new.window_pos.shape[1]

        def turn(leaf: Array, axis: int) -> Array:
            return jnp.roll(leaf, cache.head, axis=axis) if window else leaf

        ring = new._replace(
            window_keys=turn(new.window_keys, 2),
            window_values=turn(new.window_values, 2),
            window_pos=turn(new.window_pos, 1),
            policy={
                name: jnp.concatenate([leaf[:, :, :slots], turn(leaf[:, :, slots:], 2)], axis=2)
                for name, leaf in new.policy.items()
            },
        )
        return _set_row(held, ring, row)

    return cache._replace(
        layers=tuple(place(held, new) for held, new in zip(cache.layers, prompt.layers, strict=True)),
        previous=_set_row(cache.previous, prompt.previous, row),
        length=jnp.where(chosen, prompt.length, cache.length),
    )


def _set_row(held: Any, new: Any, row: Array | int) -> Any:
    """Leaves ``[B, ...]`` with those of one row, ``[1, ...]``, at ``row``."""
    return jax.tree.map(lambda old, leaf: jax.lax.dynamic_update_index_in_dim(old, leaf[0], row, 0), held, new)


def _check(model: DecoderModel, spec: CacheSpec, tokens: Array, positions: Array) -> None:
    if tokens.shape != positions.shape or tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tokens.shape} and positions {positions.shape}; both must be [B, T]")
    if tokens.shape[0] != spec.batch or tokens.shape[1] < 1:
        raise ValueError(f"tokens has shape {tokens.shape}; it must be [{spec.batch}, T] with T of at least 1")
    config = model.config
    if len(spec.layers) != config.layers:
        raise ValueError(f"spec has {len(spec.layers)} layers; the model has {config.layers}")
    for layer in spec.layers:
        shape, expected = (
            (layer.query_heads, layer.kv_heads, layer.head_dim),
            (config.heads, config.kv_heads, config.head_dim),
        )
        if shape != expected:
            raise ValueError(f"spec has query heads, key heads and width {shape}; the model has {expected}")
        if layer.rotary != config.rotary:
            raise ValueError(f"spec's rotary is {layer.rotary}; the model's is {config.rotary}")
        if layer.policy.append_only and tokens.shape[1] > layer.capacity:
            raise ValueError(f"tokens has shape {tokens.shape}; the cache keeps all and holds {layer.capacity} a row")
