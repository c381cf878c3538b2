"""The causal pass of attention by features: a scan over tiles, chunks inside, with a gradient of its own.

In a tile, with the states ``(mass, value)`` before each chunk of ``C`` tokens,

    W = tril(phi_q phi_k'),     num = phi_q value + W v,     den = phi_q mass + W 1

One state a tile is kept for the gradient, and features are computed again. With ``g`` the gradient of ``num`` and
``e`` that of ``den``, the states' own gradients are sums over later queries:

    d_value = sum phi_q' g,    d_mass = sum phi_q' e,    E = tril(g v' + e 1')
    d_phi_q = g value' + e mass + E phi_k,    d_phi_k = v d_value' + d_mass + E' phi_q,    d_v = phi_k d_value + W' g

States before a chunk are rebuilt by a forward sum and their gradients by a reverse one; a prefix made by subtraction
from the total would lose its digits. Per bucket, ``phi_q`` is divided by the mass that its token sees, and there is
no ``den``. Axes: b batch, k key head, g its query heads, n chunk, c and e its tokens, s feature, v coordinate.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hashml.attention.linear_state import Features, LinearState, Normalization, outer, reciprocal


class Form(NamedTuple):
    """What is static in a pass: the functions, and the numbers of `feature_attention`."""

    query_features: Features
    key_features: Features
    normalization: Normalization
    epsilon: float
    tile: int
    chunk: int


def split_tiles(x: Array, tiles: int, tile: int) -> Array:
    """``[..., T, D]`` as ``[tiles, ..., tile, D]``, padded with zeros."""
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, tiles * tile - x.shape[-2]), (0, 0)))
    return jnp.moveaxis(x.reshape(*x.shape[:-2], tiles, tile, x.shape[-1]), -3, 0)


def join_tiles(x: Array, length: int) -> Array:
    """What `split_tiles` made, whole again and without its padding."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :length, :]


def tile_mask(mask: Array | None, batch: int, length: int, tiles: int, tile: int) -> Array | None:
    """``[tiles, B, 1, tile, 1]``, or None where every key of every tile exists."""
    if mask is None:
        if tiles * tile == length:
            return None
        mask = jnp.ones((batch, length), bool)
    return split_tiles(mask[:, None, :, None], tiles, tile)


def keep_keys(phi: Array, mask: Array | None) -> Array:
    """Features of the keys that exist, 0 for the others; a zero key would have features like any other."""
    return phi if mask is None else jnp.where(mask, phi, 0)


def even_tiles(length: int, tile: int) -> tuple[int, int]:
    """Tiles, and their size, as even as they can be: little padding."""
    tiles = max(-(-length // tile), 1)
    return tiles, max(-(-length // tiles), 1)


class _Chunks(NamedTuple):
    """What a tile computes from its features, forward and backward."""

    phi_q: Array
    """``[B, K, G, n, C, S]``; per bucket it is divided by ``scale``."""
    phi_k: Array
    scale: Array | None
    """Per bucket, 1 / the mass that each token sees, ``[B, K, n, C, S]``."""
    weights: Array
    """``tril(phi_q phi_k')``."""
    inverse: Array | None
    """1 / the denominator; None per bucket."""
    before: LinearState
    after: LinearState


def _exclusive(sums: Array, reverse: bool = False) -> Array:
    """Sums over the chunks before each (axis 2), or after each."""
    running = jax.lax.cumsum(sums, axis=2, reverse=reverse)
    # Moved by a chunk, and not made by subtraction: a small prefix keeps its digits.
    none = jnp.zeros_like(running[:, :, :1])
    if reverse:
        return jnp.concatenate([running[:, :, 1:], none], axis=2)
    return jnp.concatenate([none, running[:, :, :-1]], axis=2)


def _chunked(x: Array, chunk: int) -> Array:
    return x.reshape(*x.shape[:-2], -1, chunk, x.shape[-1])


def _lower(weights: Array) -> Array:
    size = weights.shape[-1]
    return jnp.where(jnp.tril(jnp.ones((size, size), bool)), weights, 0)


def _chunks(form: Form, chunk: int, phi_q: Array, phi_k: Array, v: Array, state: LinearState) -> _Chunks:
    phi_q, phi_k, v = (_chunked(x, chunk) for x in (phi_q, phi_k, v))
    mass, value = phi_k.sum(axis=-2), outer(phi_k, v)
    before = LinearState(state.mass[:, :, None] + _exclusive(mass), state.value[:, :, None] + _exclusive(value))
    after = LinearState(before.mass[:, :, -1] + mass[:, :, -1], before.value[:, :, -1] + value[:, :, -1])
    scale = inverse = None
    if form.normalization == "per_bucket":
        seen = before.mass[..., None, :] + jax.lax.cumsum(phi_k, axis=3)
        scale = reciprocal(seen + form.epsilon)
        phi_q = phi_q * scale[:, :, None]
    weights = _lower(jnp.einsum("bkgncs,bknes->bkgnce", phi_q, phi_k))
    if form.normalization == "global":
        mass_read = jnp.einsum("bkgncs,bkns->bkgnc", phi_q, before.mass) + weights.sum(axis=-1)
        inverse = reciprocal(mass_read + form.epsilon)[..., None]
    return _Chunks(phi_q, phi_k, scale, weights, inverse, before, after)


def _layout(form: Form, length: int) -> tuple[int, int, int]:
    """Tiles, tokens of a tile, tokens of a chunk."""
    chunk = max(min(form.chunk, length), 1)
    chunks = max(-(-length // chunk), 1)
    tiles, per_tile = even_tiles(chunks, max(form.tile // chunk, 1))
    return tiles, per_tile * chunk, chunk


def _causal_pass(
    form: Form, q: Array, k: Array, v: Array, mask: Array | None, params: Any, state: LinearState, keep: bool
) -> tuple[Array, LinearState, LinearState | None]:
    """The output, the last state, and with ``keep`` the state before each tile."""
    batch, _, length, _ = k.shape
    tiles, tile, chunk = _layout(form, length)

    def step(state: LinearState, part: tuple) -> tuple[LinearState, tuple]:
        q, k, v, mask = part
        phi_k = keep_keys(form.key_features(params, k), mask)
        at = _chunks(form, chunk, form.query_features(params, q), phi_k, v, state)
        out = jnp.einsum("bkgncs,bknsv->bkgncv", at.phi_q, at.before.value)
        out += jnp.einsum("bkgnce,bknev->bkgncv", at.weights, _chunked(v, chunk), preferred_element_type=jnp.float32)
        out = out if at.inverse is None else out * at.inverse
        return at.after, (out.reshape(*q.shape[:-1], -1).astype(v.dtype), state if keep else None)

    parts = (*(split_tiles(x, tiles, tile) for x in (q, k, v)), tile_mask(mask, batch, length, tiles, tile))
    state, (out, states) = jax.lax.scan(step, state, parts)
    return join_tiles(out, length), state, states


def _attention(
    form: Form, q: Array, k: Array, v: Array, mask: Array | None, params: Any, state: LinearState
) -> tuple[Array, LinearState]:
    """``(out, state after the last token)`` of ``q [B, K, G, T, D]``, ``k [B, K, T, D]`` and ``v [B, K, T, V]``."""
    out, state, _ = _causal_pass(form, q, k, v, mask, params, state, keep=False)
    return out, state


def _causal_forward(form: Form, *operands: Any) -> tuple[tuple[Array, LinearState], tuple]:
    out, state, states = _causal_pass(form, *operands, keep=True)
    return (out, state), (*operands[:-1], out, states)


def _causal_backward(form: Form, saved: tuple, cotangents: tuple[Array, LinearState]) -> tuple:
    q, k, v, mask, params, out, states = saved
    d_out, d_last = cotangents
    batch, _, length, _ = k.shape
    tiles, tile, chunk = _layout(form, length)

    def step(carry: tuple[LinearState, Any], part: tuple) -> tuple[tuple[LinearState, Any], tuple]:
        (d_after, d_params), (q, k, v, mask, out, g, state) = carry, part
        phi_q, pull_q = jax.vjp(form.query_features, params, q)
        phi_k, pull_k = jax.vjp(lambda p, x: keep_keys(form.key_features(p, x), mask), params, k)
        at = _chunks(form, chunk, phi_q, phi_k, v, state)
        v_, g_, out_ = (_chunked(x.astype(jnp.float32), chunk) for x in (v, g, out))
        # g is from here the gradient of the numerator, d_den that of the denominator.
        d_den = None
        if at.inverse is not None:
            d_den = -jnp.sum(g_ * out_, axis=-1) * at.inverse[..., 0]
            g_ = g_ * at.inverse
        pairs = jnp.einsum("bkgncv,bknev->bkgnce", g_, v_)
        pairs = _lower(pairs if d_den is None else pairs + d_den[..., None])
        d_phi_q = jnp.einsum("bkgncv,bknsv->bkgncs", g_, at.before.value)
        d_phi_q += jnp.einsum("bkgnce,bknes->bkgncs", pairs, at.phi_k)
        d_value = jnp.einsum("bkgncs,bkgncv->bknsv", at.phi_q, g_)
        if d_den is not None:
            d_phi_q += d_den[..., None] * at.before.mass[:, :, None, :, None, :]
            d_mass = jnp.einsum("bkgncs,bkgnc->bkns", at.phi_q, d_den)
            d_seen = None
        else:
            assert at.scale is not None
            d_seen = -jnp.sum(d_phi_q * at.phi_q, axis=2) * at.scale
            d_phi_q = d_phi_q * at.scale[:, :, None]
            d_mass = d_seen.sum(axis=-2)
        # A key reaches the queries of its own chunk through the weights, and later ones through the state.
        later = LinearState(
            d_after.mass[:, :, None] + _exclusive(d_mass, reverse=True),
            d_after.value[:, :, None] + _exclusive(d_value, reverse=True),
        )
        d_phi_k = jnp.einsum("bknev,bknsv->bknes", v_, later.value) + later.mass[..., None, :]
        d_phi_k += jnp.einsum("bkgnce,bkgncs->bknes", pairs, at.phi_q)
        if d_seen is not None:
            d_phi_k += jax.lax.cumsum(d_seen, axis=3, reverse=True)
        d_v = jnp.einsum("bknes,bknsv->bknev", at.phi_k, later.value)
        d_v += jnp.einsum("bkgnce,bkgncv->bknev", at.weights, g_)
        d_before = LinearState(later.mass[:, :, 0] + d_mass[:, :, 0], later.value[:, :, 0] + d_value[:, :, 0])
        by_q, d_q = pull_q(d_phi_q.reshape(phi_q.shape))
        by_k, d_k = pull_k(d_phi_k.reshape(phi_k.shape))
        d_params = jax.tree.map(lambda *terms: sum(terms), d_params, by_q, by_k)
        return (d_before, d_params), (d_q, d_k, d_v.reshape(v.shape).astype(v.dtype))

    parts = (*(split_tiles(x, tiles, tile) for x in (q, k, v)), tile_mask(mask, batch, length, tiles, tile))
    parts = (*parts, split_tiles(out, tiles, tile), split_tiles(d_out, tiles, tile), states)
    start = (d_last, jax.tree.map(jnp.zeros_like, params))
    (d_state, d_params), gradients = jax.lax.scan(step, start, parts, reverse=True)
    d_q, d_k, d_v = (join_tiles(x, length) for x in gradients)
    return d_q, d_k, d_v, None, d_params, d_state


causal_attention = jax.custom_vjp(_attention, nondiff_argnums=(0,))
causal_attention.defvjp(_causal_forward, _causal_backward)
