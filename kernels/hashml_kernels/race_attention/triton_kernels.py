"""The Triton kernels: what a program does along its span of tokens. See `pallas_triton`."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from hashml_kernels.race_attention.features import reciprocal
from hashml_kernels.race_attention.triton_tiles import (
    Arithmetic,
    Maps,
    Phi,
    Piece,
    count_to,
    lower,
    numbers,
    pieces_of,
    store_numbers,
)


class Shape(NamedTuple):
    """Sizes inside the kernels: powers of two, as Triton wants."""

    width: int
    values: int
    buckets: int
    rows: int
    """Of the signed planes."""


class Walk(NamedTuple):
    """How programs share an axis of tokens."""

    chunk: int
    chunks: int
    """Of a span."""
    spans: int

    def each(self, body: Any, start: Any, *, reverse: bool = False) -> Any:
        """``body(rows of the chunk, carry)`` along a program's span."""
        first = pl.program_id(1) * self.chunks

        def step(index: Any, carry: Any) -> Any:
            index = self.chunks - 1 - index if reverse else index
            return body(count_to((first + index) * self.chunk, self.chunk), carry)

        return lax.fori_loop(0, self.chunks, step, start)


def _each_query_head(groups: int, body: Any, start: Any) -> Any:
    return body(0, start) if groups == 1 else lax.fori_loop(0, groups, body, start)


class State(NamedTuple):
    """Sums over tokens: of features, and of features times vectors."""

    mass: Any
    """``[S]``."""
    value: tuple[Any, ...]
    """``[S, piece of V]`` each."""


class Setting(NamedTuple):
    """What is static in a kernel."""

    arithmetic: Arithmetic
    shape: Shape
    buckets: int
    groups: int
    causal: bool
    masked: bool
    walk: Walk
    piece: int

    @property
    def values(self) -> list[Piece]:
        return pieces_of(self.shape.values, self.piece)

    @property
    def shared(self) -> int:
        """Refs that make features."""
        return 3 if self.arithmetic.precise else 4

    def maps(self, refs: tuple[Any, ...]) -> tuple[Maps, Any]:
        """The refs that make features, and the others."""
        selection, beta, *planes = refs[: self.shared]
        pieces = pieces_of(self.shape.width, self.piece)
        return Maps(self.arithmetic, self.buckets, selection, beta, tuple(planes), pieces), refs[self.shared :]

    def state(self, mass: Any, value: Any) -> State:
        """The sums that a program begins with."""
        at, rows = pl.program_id(1) if self.causal else 0, count_to(0, self.shape.buckets)
        return State(numbers(mass, (at,), rows), tuple(piece.load(value, (at,), rows) for piece in self.values))

    def carried(self, state: State, mass: Any, value: Any) -> State:
        """``state``, or where it does not change along a span the same read again, so that no register holds it."""
        return state if self.causal else self.state(mass, value)

    def start(self, mass: Any, value: Any) -> State:
        return self.state(mass, value) if self.causal else State(jnp.float32(0), ())

    def taken(self, state: State, phi: Any, weights: Any, vectors: list[Any]) -> State:
        """The sums with a chunk more."""
        weighted = phi if weights is None else phi * weights
        value = (b + self.arithmetic.dot(phi, y, trans_a=True) for b, y in zip(state.value, vectors, strict=True))
        return State(state.mass + jnp.sum(weighted, axis=0), tuple(value))

    def keys(self, maps: Maps, refs: tuple[Any, ...], rows: Any) -> tuple[Phi, list[Any]]:
        """Features and values."""
        k, v, *keep = refs
        live = rows < k.shape[0]
        if keep:
            live &= numbers(keep[0], (), rows) > 0
        return maps.phi(k, (), rows, live), [piece.load(v, (), rows) for piece in self.values]

    def queries(self, maps: Maps, refs: tuple[Any, ...], h: Any, rows: Any) -> tuple[Phi, list[Any], Any]:
        """Features of a head's queries, and the gradients of their numerators and denominators ``[C, 1]``."""
        q, g, inverse, d_mass = refs
        at = maps.phi(q, (h,), rows, rows < q.shape[1])
        scale = numbers(inverse, (h,), rows)[:, None]
        vectors = [self.arithmetic.round(piece.load(g, (h,), rows) * scale) for piece in self.values]
        return at, vectors, numbers(d_mass, (h,), rows)[:, None]

    def inner(self, a: Any, b: Any) -> Any:
        """Products of vectors in pieces, ``a @ b.T``."""
        return sum(self.arithmetic.dot(x, y, trans_b=True) for x, y in zip(a, b, strict=True))

    def rounded(self, state: State) -> tuple[Any, ...]:
        return tuple(map(self.arithmetic.round, state.value))


def sum_kernel(own: Setting, *refs: Any) -> None:
    """Of each span, the sums over its keys, or the gradients of these by its queries."""
    maps, rest = own.maps(refs)
    *inputs, mass, value = rest

    def of_keys(rows: Any, state: State) -> State:
        at, vectors = own.keys(maps, tuple(inputs), rows)
        return own.taken(state, at.phi, None, vectors)

    def of_queries(rows: Any, state: State) -> State:
        def head(h: Any, state: State) -> State:
            at, vectors, e = own.queries(maps, tuple(inputs), h, rows)
            return own.taken(state, at.phi, e, vectors)

        return _each_query_head(own.groups, head, state)

    size = own.shape.buckets
    empty = (jnp.zeros((size, piece.size), jnp.float32) for piece in own.values)
    start = State(jnp.zeros(size, jnp.float32), tuple(empty))
    total = own.walk.each(of_queries if len(inputs) == 4 else of_keys, start)
    rows = count_to(0, size)
    store_numbers(mass, (), rows, total.mass)
    for piece, part in zip(own.values, total.value, strict=True):
        piece.store(value, (), rows, part)


def forward_kernel(own: Setting, *refs: Any) -> None:
    maps, (q, mass, value, *rest) = own.maps(refs)
    (*keys, out, inverse), arithmetic = rest, own.arithmetic

    def chunk(rows: Any, state: State) -> State:
        at, vectors = own.keys(maps, tuple(keys), rows) if own.causal else (None, [])
        before = own.carried(state, mass, value)
        rounded = own.rounded(before)

        def head(h: Any, _: Any) -> Any:
            phi = maps.phi(q, (h,), rows, rows < q.shape[1]).phi
            total, weights = jnp.sum(phi * before.mass[None, :], axis=1), None
            if at is not None:
                weights = arithmetic.round(lower(arithmetic.dot(phi, at.phi, trans_b=True)))
                total += jnp.sum(weights, axis=1)
            found = reciprocal(total)
            store_numbers(inverse, (h,), rows, found)
            for index, piece in enumerate(own.values):
                numerator = arithmetic.dot(phi, rounded[index])
                if weights is not None:
                    numerator += arithmetic.dot(weights, vectors[index])
                piece.store(out, (h,), rows, numerator * found[:, None])
            return 0

        _each_query_head(own.groups, head, 0)
        return state if at is None else own.taken(state, at.phi, None, vectors)

    own.walk.each(chunk, own.start(mass, value))


def query_gradient_kernel(own: Setting, *refs: Any) -> None:
    maps, (*queries, mass, value) = own.maps(refs[: own.shared + 6])
    (*keys, d_q, d_beta), arithmetic = refs[own.shared + 6 :], own.arithmetic

    def chunk(rows: Any, carry: tuple[State, Any]) -> tuple[State, Any]:
        state, total = carry
        at, vectors = own.keys(maps, tuple(keys), rows) if own.causal else (None, [])
        before = own.carried(state, mass, value)
        rounded = own.rounded(before)

        def head(h: Any, total: Any) -> Any:
            query, y, e = own.queries(maps, tuple(queries), h, rows)
            d_phi = own.inner(y, rounded) + e * before.mass[None, :]
            if at is not None:
                pairs = arithmetic.round(lower(own.inner(y, vectors) + e))
                d_phi += arithmetic.dot(pairs, at.phi)
            return total + maps.pull(query, d_phi, d_q, (h,), rows)

        total = _each_query_head(own.groups, head, total)
        return (state if at is None else own.taken(state, at.phi, None, vectors)), total

    _, total = own.walk.each(chunk, (own.start(mass, value), jnp.float32(0)))
    store_numbers(d_beta, (), count_to(0, 1), jnp.broadcast_to(total, (1,)))


def key_gradient_kernel(own: Setting, *refs: Any) -> None:
    maps, (mass, value, *rest) = own.maps(refs)
    (*inputs, d_k, d_v, d_beta), arithmetic = rest, own.arithmetic
    keys, queries = inputs[: 2 + own.masked], inputs[2 + own.masked :]

    def chunk(rows: Any, carry: tuple[State, Any]) -> tuple[State, Any]:
        state, total = carry
        at, vectors = own.keys(maps, tuple(keys), rows)
        after = own.carried(state, mass, value)
        rounded = own.rounded(after)
        d_phi = own.inner(vectors, rounded) + after.mass[None, :]
        found = tuple(arithmetic.dot(at.phi, part) for part in rounded)

        def head(h: Any, carry: tuple[State, Any, tuple[Any, ...]]) -> tuple[State, Any, tuple[Any, ...]]:
            state, d_phi, found = carry
            query, y, e = own.queries(maps, tuple(queries), h, rows)
            weights = arithmetic.round(lower(arithmetic.dot(query.phi, at.phi, trans_b=True)))
            pairs = arithmetic.round(lower(own.inner(y, vectors) + e))
            d_phi += arithmetic.dot(pairs, query.phi, trans_a=True)
            found = tuple(f + arithmetic.dot(weights, part, trans_a=True) for f, part in zip(found, y, strict=True))
            return own.taken(state, query.phi, e, y), d_phi, found

        if own.causal:
            state, d_phi, found = _each_query_head(own.groups, head, (state, d_phi, found))
        for piece, part in zip(own.values, found, strict=True):
            piece.store(d_v, (), rows, part)
        return state, total + maps.pull(at, d_phi, d_k, (), rows)

    _, total = own.walk.each(chunk, (own.start(mass, value), jnp.float32(0)), reverse=True)
    store_numbers(d_beta, (), count_to(0, 1), jnp.broadcast_to(total, (1,)))
