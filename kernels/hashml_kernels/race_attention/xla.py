"""The op where no kernel serves: scans over tiles of tokens, whose features live in one step, forward and backward.

The backward pass is that of the kernels. The one over queries goes forward with the sums over keys, the one over keys
backward with the sums over queries; both begin from zero where order matters, and from the whole sums where it does
not.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hashml_kernels.annotations import Array
from hashml_kernels.race_attention.features import (
    FLOOR,
    Gradients,
    Operands,
    Results,
    log_sigmoid,
    mass_gradient,
    reciprocal,
    selection,
    signed_planes,
)

TILE = {False: 1024, True: 128}
"""Tokens of a step, without order and with it."""

_HIGHEST = jax.lax.Precision.HIGHEST


class _Phi(NamedTuple):
    """Features of a tile, and what their gradient needs."""

    phi: Array
    table: Array
    """Without the floor and the mask."""
    u: Array
    z: Array


class _Maps(NamedTuple):
    planes: Array
    selection: Any
    beta: Array

    @staticmethod
    def of(operands: Operands) -> "_Maps":
        tables, bits, width = operands.planes.shape
        rows = 2 * tables * bits
        return _Maps(
            signed_planes(operands.planes, rows, width),
            selection(tables, bits, rows, operands.buckets),
            operands.beta,
        )

    def phi(self, x: Array, keep: Array) -> _Phi:
        u = jnp.tanh(jnp.matmul(x.astype(jnp.float32), self.planes.T, precision=_HIGHEST))
        z = 2 * self.beta * u
        table = jnp.exp(jnp.matmul(log_sigmoid(z), self.selection, precision=_HIGHEST))
        return _Phi((table + FLOOR) * keep[..., None], table, u, z)

    def pull(self, at: _Phi, d_phi: Array) -> tuple[Array, Array]:
        """Gradients of the tokens, float32, and of beta."""
        d_z = jnp.matmul(at.table * d_phi, self.selection.T, precision=_HIGHEST) * jax.nn.sigmoid(-at.z)
        d_x = jnp.matmul(2 * self.beta * d_z * (1 - at.u**2), self.planes, precision=_HIGHEST)
        return d_x, jnp.sum(2 * at.u * d_z)


def _einsum(formula: str, *arrays: Array) -> Array:
    """In float32; bfloat16 values meet features as they are, and XLA turns them to float32."""
    return jnp.einsum(formula, *(x.astype(jnp.float32) for x in arrays), precision=_HIGHEST)


def _tiles(x: Array, axis: int, tile: int) -> Array:
    """Tiles of an axis in front, padded with zeros."""
    length = x.shape[axis]
    count = max(-(-length // tile), 1)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * tile - length)
    x = jnp.pad(x, widths)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, tile, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, axis: int, length: int) -> Array:
    """What `_tiles` made, whole again."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])[tuple([slice(None)] * axis + [slice(length)])]


def _size(length: int, causal: bool) -> int:
    return max(min(TILE[causal], length), 1)


def _query_parts(operands: Operands, tile: int, *more: Array) -> tuple[Array, ...]:
    """Queries, which of them exist, and arrays ``[B, K, G, T, ...]`` beside them."""
    length = operands.q.shape[3]
    return tuple(
        _tiles(x, axis, tile) for x, axis in ((operands.q, 3), (jnp.ones(length), 0), *((x, 3) for x in more))
    )


def _key_parts(operands: Operands, tile: int) -> tuple[Array, ...]:
    batch, length = operands.k.shape[0], operands.k.shape[2]
    keep = jnp.ones((batch, length)) if operands.keep is None else operands.keep
    return tuple(_tiles(x, axis, tile) for x, axis in ((operands.k, 2), (operands.v, 2), (keep[:, None], 2)))


def _start(operands: Operands) -> tuple[Array, Array]:
    batch, heads, _, _, _, _, width = operands.sizes
    mass = jnp.zeros_like(operands.beta) + jnp.zeros((batch, heads, operands.buckets))
    return mass, mass[..., None] + jnp.zeros(width)


def _take(state: tuple[Array, Array], phi_k: Array, v: Array) -> tuple[Array, Array]:
    return state[0] + phi_k.sum(axis=2), state[1] + _einsum("bkns,bknv->bksv", phi_k, v)


def _lower(weights: Array) -> Array:
    return jnp.tril(weights)


def _whole(operands: Operands, maps: _Maps) -> tuple[Array, Array]:
    """Sums over all keys."""
    tile = _size(operands.k.shape[2], False)

    def step(state: tuple[Array, Array], part: tuple) -> tuple[tuple[Array, Array], None]:
        k, v, keep = part
        return _take(state, maps.phi(k, keep).phi, v), None

    return jax.lax.scan(step, _start(operands), _key_parts(operands, tile))[0]


def forward(operands: Operands, causal: bool) -> Results:
    maps, length = _Maps.of(operands), operands.q.shape[3]
    tile = _size(length, causal)

    def step(state: tuple[Array, Array], part: tuple) -> tuple[tuple[Array, Array], Results]:
        (q, live), keys = part[:2], part[2:]
        phi_q = maps.phi(q, live).phi
        mass = _einsum("bkgts,bks->bkgt", phi_q, state[0])
        out = _einsum("bkgts,bksv->bkgtv", phi_q, state[1])
        if causal:
            k, v, keep = keys
            phi_k = maps.phi(k, keep).phi
            weights = _lower(_einsum("bkgts,bkns->bkgtn", phi_q, phi_k))
            mass, out = mass + weights.sum(axis=-1), out + _einsum("bkgtn,bknv->bkgtv", weights, v)
            state = _take(state, phi_k, v)
        inverse = reciprocal(mass)
        return state, Results((out * inverse[..., None]).astype(operands.v.dtype), inverse)

    parts = (*_query_parts(operands, tile), *(_key_parts(operands, tile) if causal else ()))
    _, results = jax.lax.scan(step, _start(operands) if causal else _whole(operands, maps), parts)
    return Results(*(_join(x, 3, length) for x in results))


def backward(operands: Operands, results: Results, gradient: Array, causal: bool) -> Gradients:
    maps, length, keys = _Maps.of(operands), operands.q.shape[3], operands.k.shape[2]
    scaled = gradient.astype(jnp.float32) * results.inverse[..., None]
    beside = (scaled, mass_gradient(results, gradient))
    zero = jnp.zeros_like(operands.beta)

    def over_queries(carry: tuple, part: tuple) -> tuple[tuple, Array]:
        """Forward, with the sums over the keys before; without order also those that `over_keys` needs."""
        state, sums, d_beta = carry
        q, live, g, e, *of_keys = part
        at = maps.phi(q, live)
        d_phi = _einsum("bkgtv,bksv->bkgts", g, state[1]) + e[..., None] * state[0][:, :, None, None]
        if causal:
            k, v, keep = of_keys
            phi_k = maps.phi(k, keep).phi
            pairs = _lower(_einsum("bkgtv,bknv->bkgtn", g, v) + e[..., None])
            d_phi = d_phi + _einsum("bkgtn,bkns->bkgts", pairs, phi_k)
            state = _take(state, phi_k, v)
        else:
            sums = _later(sums, at.phi, g, e)
        d_q, own = maps.pull(at, d_phi)
        return (state, sums, d_beta + own), d_q.astype(q.dtype)

    tile = _size(length, causal)
    query_parts = _query_parts(operands, tile, *beside)
    key_parts = _key_parts(operands, _size(keys, causal))
    start = _start(operands)
    carry = (start if causal else _whole(operands, maps), start, zero)
    (_, sums, d_beta), d_q = jax.lax.scan(over_queries, carry, (*query_parts, *(key_parts if causal else ())))

    def over_keys(carry: tuple, part: tuple) -> tuple[tuple, tuple[Array, Array]]:
        """Backward, with the sums over the queries after."""
        state, d_beta = carry
        k, v, keep, *of_queries = part
        at = maps.phi(k, keep)
        d_v = _einsum("bkns,bksv->bknv", at.phi, state[1])
        d_phi = _einsum("bknv,bksv->bkns", v, state[1]) + state[0][:, :, None]
        if causal:
            q, live, g, e = of_queries
            phi_q = maps.phi(q, live).phi
            weights = _lower(_einsum("bkgts,bkns->bkgtn", phi_q, at.phi))
            pairs = _lower(_einsum("bkgtv,bknv->bkgtn", g, v) + e[..., None])
            d_v = d_v + _einsum("bkgtn,bkgtv->bknv", weights, g)
            d_phi = d_phi + _einsum("bkgtn,bkgts->bkns", pairs, phi_q)
            state = _later(state, phi_q, g, e)
        d_k, own = maps.pull(at, d_phi * keep[..., None])
        return (state, d_beta + own), (d_k.astype(k.dtype), d_v.astype(v.dtype))

    parts = (*key_parts, *(query_parts if causal else ()))
    (_, d_beta), (d_k, d_v) = jax.lax.scan(over_keys, (sums, d_beta), parts, reverse=True)
    return Gradients(_join(d_q, 3, length), _join(d_k, 2, keys), _join(d_v, 2, keys), d_beta)


def _later(state: tuple[Array, Array], phi_q: Array, g: Array, e: Array) -> tuple[Array, Array]:
    """Gradients of the sums, after more queries."""
    return state[0] + _einsum("bkgts,bkgt->bks", phi_q, e), state[1] + _einsum("bkgts,bkgtv->bksv", phi_q, g)
