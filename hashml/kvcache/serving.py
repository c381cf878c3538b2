"""Prefill and decode: a decoder that runs on a compressed cache, a fixed number of rows at a time.

    logits, cache = prefill(model, spec, tables, params, tokens, positions, key)
    logits, cache = decode_step(model, spec, tables, params, cache, token)       jit it with the cache donated

One step of a layer: the oldest tokens leave the window, the new one enters, attention reads both tiers, the policy
looks on. Rows are independent: what one holds or when it ends changes no bit of another, unless a pool of pages that
they share runs out. How rows come and go is in `hashml.kvcache.batching`. Layers are a tuple and the loop over them
is unrolled, since a scan over a stacked cache keeps a second copy of it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from hashml.kvcache.attending import attend, observe, stored_keys
from hashml.kvcache.batching import check_step
from hashml.kvcache.contract import Queries
from hashml.kvcache.eviction import append, evict
from hashml.kvcache.fused import fused_attend, is_fused
from hashml.kvcache.noise import layer_keys, row_keys
from hashml.kvcache.prefill import prefill_layer
from hashml.kvcache.spec import CacheSpec
from hashml.kvcache.state import Cache, LayerTables, check_tables
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
        key: of the policy's noise: one, from which each row's is drawn by its index, or ``[B]`` of the rows, which
            have the same noise wherever and with whomever they run.

    Raises:
        ValueError: for shapes, layers or tables that do not fit, a prompt longer than a cache that keeps all can
            hold, or positions that are not 0, 1, 2...; these are looked at outside of `jax.jit` alone.
    """
    _check(model, spec, tokens, positions)
    check_tables(spec, tables)
    positions = positions.astype(jnp.int32)
    keys = row_keys(key, spec.batch)
    x = model.embed(params, tokens)
    layers, previous = [], []
    for index, (layer, known) in enumerate(zip(spec.layers, tables, strict=True)):
        noise = layer_keys(keys, index)

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
    return logits, Cache(tuple(layers), tuple(previous), length, zero, keys, length, zero)


def decode_step(
    model: DecoderModel,
    spec: CacheSpec,
    tables: Tables,
    params: Any,
    cache: Cache,
    token: Int[Array, "B"] | Int[Array, "B n"],
    *,
    active: Bool[Array, " B"] | None = None,
    all_logits: bool = False,
) -> tuple[Float[Array, "B V"] | Float[Array, "B n V"], Cache]:
    """Logits after one more token in each row (or n of them, a divisor of ``flush``), and the cache with them.

    Jit it with ``model``, ``spec`` and ``all_logits`` static and ``cache`` donated: then all updates are in place.

    Args:
        model, spec, tables, params: as in `prefill`.
        cache: of the rows.
        token: one or n for each.
        active: rows that take their tokens; None: all. The others stand still: they see and store nothing, take no
            page, and their policies do not look on. The ring turns for all, though, so that the exact tokens of a row
            that is held back move to its main slots, which must have room for them where nothing is to be dropped.
        all_logits: whether to return those after each of the n tokens, ``[B, n, V]``, by which drafts are verified.

    Returns:
        Logits ``[B, V]`` after the last token, and the cache. Logits of idle rows are those of a token that sees
        nothing, and mean nothing.

    Raises:
        ValueError: as `hashml.kvcache.batching.check_step`, and for another number of rows.
    """
    tokens = token if token.ndim == 2 else token[:, None]
    count = tokens.shape[1]
    if tokens.shape[0] != cache.length.shape[0]:
        raise ValueError(f"token has shape {token.shape}; the cache has {cache.length.shape[0]} rows")
    check_step(spec, cache, count)
    check_tables(spec, tables)
    pos = cache.length[:, None] + jnp.arange(count, dtype=jnp.int32)
    if active is not None:
        pos = jnp.where(active[:, None], pos, -1)
    x = model.embed(params, tokens)
    layers, previous = [], []
    for index, (layer, known) in enumerate(zip(spec.layers, tables, strict=True)):
        asks = Queries(pos, layer_keys(cache.key, index), cache.born)

        def attend_cache(q: Array, k: Array, v: Array, index=index, layer=layer, known=known, asks=asks) -> tuple:
            held = evict(layer, known, cache.layers[index], cache.head, cache.length, asks.key)
            stored = stored_keys(layer, k, pos)
            held = append(layer, known, held, cache.head, stored, v, pos, cache.length, asks.key)
            if is_fused(layer, count):
                return fused_attend(layer, known, held, q, pos), held
            out, attention = attend(layer, known, held, q, pos)
            looked = observe(layer, held, attention, asks)
            return out, looked._replace(policy=_of_rows(active, looked.policy, held.policy))

        weights = model.layer_params(params, index)
        x, last, held = model.layer(weights, x, cache.previous[index], attend_cache)
        layers.append(held)
        previous.append(_of_rows(active, last, cache.previous[index]))
    window = spec.layers[0].window
    logits = model.unembed(params, x) if all_logits else model.unembed(params, x[:, -1:])[:, 0]
    return logits, Cache(
        layers=tuple(layers),
        previous=tuple(previous),
        length=cache.length + (count if active is None else count * active),
        head=(cache.head + count) % window if window else cache.head,
        key=cache.key,
        born=cache.born,
        step=cache.step + count,
    )


def _of_rows(active: Array | None, new: Any, old: Any) -> Any:
    """Leaves ``[B, ...]`` after the step in active rows, and from before it in the others."""
    if active is None:
        return new
    return jax.tree.map(lambda x, y: jnp.where(active.reshape(-1, *(1,) * (x.ndim - 1)), x, y), new, old)


def _check(model: DecoderModel, spec: CacheSpec, tokens: Array, positions: Array) -> None:
    if tokens.shape != positions.shape or tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tokens.shape} and positions {positions.shape}; both must be [B, T]")
    if tokens.shape[0] != spec.batch or tokens.shape[1] < 1:
        raise ValueError(f"tokens has shape {tokens.shape}; it must be [{spec.batch}, T] with T of at least 1")
    if not isinstance(positions, Tracer):
        for row, line in enumerate(np.asarray(positions)):
            held = line[line >= 0]
            if (held != np.arange(held.size)).any():
                raise ValueError(f"positions of row {row} are {held.tolist()}; beside padding, -1, they must be 0, 1 "
                                 f"and so on up to {held.size - 1}")  # fmt: skip
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
