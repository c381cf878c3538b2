"""The TPU kernels: what a step of the grid does with its tile of tokens. See `pallas_mosaic_tpu`."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from hashml_kernels.race_attention.features import reciprocal
from hashml_kernels.race_attention.tpu_tiles import Arithmetic, Maps, Phi, split

_LANES = 128
_SHARED = 4
"""Refs that make features."""


class Setting(NamedTuple):
    """What is static in a kernel."""

    arithmetic: Arithmetic
    buckets: int
    groups: int
    length: int
    """Queries."""
    keys: int
    tile: int
    causal: bool
    masked: bool

    def maps(self, refs: tuple[Any, ...]) -> tuple[Maps, Any]:
        """The refs that make features, and the others."""
        return Maps(self.arithmetic, self.buckets, *refs[:_SHARED]), list(refs[_SHARED:])

    def rows(self, x: Any, length: int, step: Any) -> Any:
        """A tile's rows, rounded; zeros for those beyond the end, where memory holds anything."""
        x = self.arithmetic.round(x)
        if length % self.tile == 0:
            return x
        row = step * self.tile + lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(row < length, x, jnp.zeros((), x.dtype))

    def live(self, length: int, step: Any) -> Any:
        return step * self.tile + lax.broadcasted_iota(jnp.int32, (1, self.tile), 1) < length

    def take_keys(self, maps: Maps, refs: list[Any], step: Any) -> tuple[Phi, Any]:
        """Features and values."""
        k, v, *keep = refs
        live = self.live(self.keys, step)
        if keep:
            live &= keep[0][0] > 0
        return maps.phi(self.rows(k[0], self.keys, step), live), self.rows(v[0], self.keys, step)

    def take_queries(self, maps: Maps, q: Any, h: Any, step: Any) -> Phi:
        return maps.phi(self.rows(q[0, h], self.length, step), self.live(self.length, step))

    def take_gradients(self, refs: list[Any], h: Any, step: Any) -> tuple[Any, Any, Any]:
        """Of a head's results ``[C, V]``, and its rows ``[1, C]`` of inverse masses and their gradients."""
        g, inverse, d_mass = refs
        live, own = self.live(self.length, step), pl.ds(h, 1)
        scale, e = (jnp.where(live, x[0, own, :], 0.0) for x in (inverse, d_mass))
        return self.rows(g[0, h], self.length, step), scale, e

    def each_query_head(self, body: Any, start: Any) -> Any:
        return body(0, start) if self.groups == 1 else lax.fori_loop(0, self.groups, body, start)

    def upper(self, weights: Any) -> Any:
        """What queries, along lanes, see of the keys of their own tile."""
        key, query = (lax.broadcasted_iota(jnp.int32, weights.shape, axis) for axis in (0, 1))
        return jnp.where(key <= query, weights, 0.0)

    def add(self, state: tuple[Any, Any], phi: Any, weights: Any, vectors: Any) -> None:
        """To the sums: features, with weights ``[1, C]``, and features times vectors with rows of weights."""
        mass, value = state
        scaled = phi.astype(jnp.float32)
        by_mass, by_value = (scaled, phi) if weights is None else (scaled * weights[1], scaled * weights[0])
        mass[...] += jnp.sum(by_mass, axis=1, keepdims=True)
        value[...] += self.arithmetic.dot(by_value, vectors, (1, 0))


def _clear(*refs: Any) -> None:
    for ref in refs:
        ref[...] = jnp.zeros_like(ref)


def sum_kernel(own: Setting, *refs: Any) -> None:
    maps, rest = own.maps(refs)
    *keys, mass, value = rest
    step = pl.program_id(1)
    pl.when(step == 0)(lambda: _clear(mass, value))
    at, v = own.take_keys(maps, keys, step)
    own.add((mass.at[0], value.at[0]), at.phi, None, v)


def _state(own: Setting, refs: Any) -> tuple[tuple[Any, Any], list[Any]]:
    """Refs of the sums, and the others: the last two are kept from tile to tile, or the first two do not change."""
    if not own.causal:
        mass, value, *refs = refs
        return (mass.at[0], value.at[0]), refs
    *refs, mass, value = refs
    pl.when(pl.program_id(1) == 0)(lambda: _clear(mass, value))
    return (mass, value), refs


def forward_kernel(own: Setting, *refs: Any) -> None:
    maps, rest = own.maps(refs)
    state, (q, *keys, out, inverse) = _state(own, rest)
    (mass, value), step, arithmetic = state, pl.program_id(1), own.arithmetic
    at, v = own.take_keys(maps, keys, step) if own.causal else (None, None)

    def head(h: Any, _: Any) -> Any:
        phi = own.take_queries(maps, q, h, step).phi
        total = jnp.sum(phi.astype(jnp.float32) * mass[:, :1], axis=0, keepdims=True)
        numerator = _transposed_read(arithmetic, phi, value[...])
        if at is not None:
            weights = arithmetic.round(own.upper(arithmetic.dot(at.phi, phi, (0, 0))))
            total += jnp.sum(weights.astype(jnp.float32), axis=0, keepdims=True)
            numerator += arithmetic.dot(weights, v, (0, 0))
        found = reciprocal(total)
        inverse[0, pl.ds(h, 1), :] = found
        column = jnp.broadcast_to(found, (_LANES, own.tile)).T[:, :1]
        out[0, h] = (numerator * column).astype(out.dtype)
        return 0

    own.each_query_head(head, 0)
    if at is not None:
        own.add(state, at.phi, None, v)


def _transposed_read(arithmetic: Arithmetic, phi: Any, value: Any) -> Any:
    """``phi.T @ value``."""
    if arithmetic.precise:
        return arithmetic.dot(phi, value, (0, 0))
    high, low, _ = split(value)
    return arithmetic.dot(phi, low, (0, 0)) + arithmetic.dot(phi, high, (0, 0))


def query_gradient_kernel(own: Setting, *refs: Any) -> None:
    maps, rest = own.maps(refs)
    (mass, value), (q, *rest) = _state(own, rest)
    given, rest = rest[:3], rest[3:]
    step, arithmetic, sums = pl.program_id(1), own.arithmetic, None
    if own.causal:
        *keys, d_q, d_beta = rest
        at, v = own.take_keys(maps, keys, step)
    else:
        (d_q, d_beta, *after), at, v = rest, None, None
        pl.when(step == 0)(lambda: _clear(*after))
        sums = tuple(ref.at[0] for ref in after)
    pl.when(step == 0)(lambda: _clear(d_beta))

    def head(h: Any, _: Any) -> Any:
        query = own.take_queries(maps, q, h, step)
        g, inverse, e = own.take_gradients(given, h, step)
        d_phi = arithmetic.read(value[...], g, (1, 1)) * inverse + mass[:, :1] * e
        if at is not None:
            pairs = own.upper(arithmetic.dot(v, g, (1, 1)) * inverse + e)
            d_phi += arithmetic.dot(at.phi, pairs, (1, 0))
        d_x, parts = maps.pull(query, d_phi)
        d_q[0, h] = d_x.astype(d_q.dtype)
        d_beta[0] += parts
        if sums is not None:
            own.add(sums, query.phi, (inverse, e), g)
        return 0

    own.each_query_head(head, 0)
    if at is not None:
        own.add((mass, value), at.phi, None, v)


def key_gradient_kernel(own: Setting, *refs: Any) -> None:
    maps, rest = own.maps(refs)
    state, rest = _state(own, rest)
    (mass, value), (*inputs, d_k, d_v, d_beta) = state, rest
    keys, queries = inputs[: 2 + own.masked], inputs[2 + own.masked :]
    step, arithmetic = pl.num_programs(1) - 1 - pl.program_id(1), own.arithmetic
    pl.when(pl.program_id(1) == 0)(lambda: _clear(d_beta))
    at, v = own.take_keys(maps, keys, step)
    d_phi = arithmetic.read(value[...], v, (1, 1)) + mass[:, :1]
    found = _transposed_read(arithmetic, at.phi, value[...])

    def head(h: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        d_phi, found = carry
        q, *given = queries
        phi = own.take_queries(maps, q, h, step).phi
        g, inverse, e = own.take_gradients(given, h, step)
        weights = own.upper(arithmetic.dot(at.phi, phi, (0, 0))) * inverse
        pairs = own.upper(arithmetic.dot(v, g, (1, 1)) * inverse + e)
        d_phi += arithmetic.dot(phi, pairs, (1, 1))
        found += arithmetic.dot(weights, g, (1, 0))
        own.add(state, phi, (inverse, e), g)
        return d_phi, found

    if own.causal:
        d_phi, found = own.each_query_head(head, (d_phi, found))
    d_x, parts = maps.pull(at, d_phi)
    d_k[0] = d_x.astype(d_k.dtype)
    d_v[0] = found.astype(d_v.dtype)
    d_beta[0] += parts
