"""The pass without order of attention by features: once over the keys, once over the queries, a tile at a time.

`collect_tiles` adds keys to a state, `read_tiles` reads it. A tile is cut out of the whole array and its gradient
written over it (that of values beside them), so that beside queries, keys, values and gradients no array of the
sequence's length exists, forward or backward: no copy in another order, no features. The price is that a gradient
of a gradient is not to be had.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hashml.attention.linear_causal import Form, even_tiles, keep_keys
from hashml.attention.linear_state import LinearState, merge_states, outer, read_state
from hashml_kernels.manual_axes import varying_alike


def _contribution(form: Form, params: Any, k: Array, v: Array, mask: Array | None) -> LinearState:
    phi = keep_keys(form.key_features(params, k), mask)
    return LinearState(phi.sum(axis=-2), outer(phi, v))


def _collect(form: Form, params: Any, k: Array, v: Array, mask: Array | None, state: LinearState) -> LinearState:
    """``state`` with the keys ``k [B, K, N, D]``, values ``v [B, K, N, V]``; ``mask [B, N]`` says which exist."""
    tiles, tile = even_tiles(k.shape[-2], form.tile)
    k, v, mask = _padded(k, tiles * tile), _padded(v, tiles * tile), _key_mask(mask, k, tiles * tile)

    def step(place: Array, state: LinearState) -> LinearState:
        k_tile, v_tile, mask_tile = (_cut(x, place, tile) for x in (k, v, mask))
        return merge_states(state, _contribution(form, params, k_tile, v_tile, mask_tile))

    return jax.lax.fori_loop(0, tiles, step, state)


def _collect_forward(form: Form, params: Any, k: Array, v: Array, mask: Array | None, state: LinearState) -> tuple:
    return _collect(form, params, k, v, mask, state), (params, k, v, mask)


def _collect_backward(form: Form, saved: tuple, d_state: LinearState) -> tuple:
    params, k, v, mask = saved
    length = k.shape[-2]
    tiles, tile = even_tiles(length, form.tile)
    exists = _key_mask(mask, k, tiles * tile)

    def step(place: Array, carry: tuple) -> tuple:
        d_params, k, d_v = carry
        mask_tile = _cut(exists, place, tile)
        _, pull = jax.vjp(
            lambda params, k, v: _contribution(form, params, k, v, mask_tile),
            params,
            _cut(k, place, tile),
            _cut(v, place, tile),
        )
        by_tile, k_rows, v_rows = pull(d_state)
        return jax.tree.map(jnp.add, d_params, by_tile), _put(k, k_rows, place), _put(d_v, v_rows, place)

    k, v = _padded(k, tiles * tile), _padded(v, tiles * tile)
    # Not over the values: no gradient of a value waits for the value to be read, so that a compiler that writes first
    # must keep, and copies, all of them in every step.
    start = (jax.tree.map(jnp.zeros_like, params), k, jnp.zeros_like(v))
    d_params, d_k, d_v = jax.lax.fori_loop(0, tiles, step, start)
    return d_params, d_k[..., :length, :], d_v[..., :length, :], None, d_state


collect_tiles = jax.custom_vjp(_collect, nondiff_argnums=(0,))
collect_tiles.defvjp(_collect_forward, _collect_backward)


def _reading(form: Form, params: Any, q: Array, state: LinearState) -> Array:
    return read_state(state, form.query_features(params, q), form.normalization, form.epsilon)


def _read(form: Form, dtype: Any, params: Any, q: Array, state: LinearState) -> Array:
    """What ``q [B, K, G, T, D]`` reads, ``[B, K, G, T, V]`` in a dtype."""
    length = q.shape[-2]
    tiles, tile = even_tiles(length, form.tile)
    q = _padded(q, tiles * tile)

    def step(place: Array, out: Array) -> Array:
        return _put(out, _reading(form, params, _cut(q, place, tile), state), place)

    out = jnp.zeros((*q.shape[:-1], state.value.shape[-1]), dtype)
    (out, _), _ = varying_alike(out, q)
    return jax.lax.fori_loop(0, tiles, step, out)[..., :length, :]


def _read_forward(form: Form, dtype: Any, params: Any, q: Array, state: LinearState) -> tuple:
    return _read(form, dtype, params, q, state), (params, q, state)


def _read_backward(form: Form, dtype: Any, saved: tuple, d_out: Array) -> tuple:
    del dtype
    params, q, state = saved
    length = q.shape[-2]
    tiles, tile = even_tiles(length, form.tile)
    d_out = _padded(d_out, tiles * tile)

    def step(place: Array, carry: tuple) -> tuple:
        d_params, d_state, q = carry
        _, pull = jax.vjp(
            lambda params, q, state: _reading(form, params, q, state), params, _cut(q, place, tile), state
        )
        by_params, d_q, by_state = pull(_cut(d_out, place, tile).astype(jnp.float32))
        d_params, d_state = jax.tree.map(jnp.add, (d_params, d_state), (by_params, by_state))
        return d_params, d_state, _put(q, d_q, place)

    start = (*jax.tree.map(jnp.zeros_like, (params, state)), _padded(q, tiles * tile))
    d_params, d_state, d_q = jax.lax.fori_loop(0, tiles, step, start)
    return d_params, d_q[..., :length, :], d_state


read_tiles = jax.custom_vjp(_read, nondiff_argnums=(0, 1))
read_tiles.defvjp(_read_forward, _read_backward)


def _padded(x: Array, length: int) -> Array:
    return x if x.shape[-2] == length else jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, length - x.shape[-2]), (0, 0)))


def _key_mask(mask: Array | None, k: Array, length: int) -> Array | None:
    """``[B, 1, length, 1]``, or None where every key exists and nothing is padded."""
    if mask is None:
        if length == k.shape[-2]:
            return None
        mask = jnp.ones((k.shape[0], k.shape[-2]), bool)
    return _padded(mask[:, None, :, None], length)


def _cut(x: Array | None, place: Array, tile: int) -> Any:
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, place * tile, tile, axis=x.ndim - 2)


def _put(x: Array, rows: Array, place: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(
        x, rows.astype(x.dtype), place * rows.shape[-2], axis=x.ndim - 2
    )  # fmt: skip
