"""Scores of all keys from their codes, a table at a time: what SOCKET, hashing and product quantisation share.

    lookup_sum          score[n] = sum_l table[l, code[l, n]]
    collision_counts    score[n] = sum_l [code[l, n] = query[l]]
    agreeing_bits       score[n] = sum_l (P - popcount(code[l, n] ^ query[l]))

Codes lie as ``[L, N]``, so that a table's codes of all keys are side by side. The loop over tables holds one
``[B, K, J, N]`` sum; an array over tables and keys exists only in the codes' own few bits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, UInt


def lookup_sum(tables: Float[Array, "B K J L R"], codes: UInt[Array, "B K L N"]) -> Float32[Array, "B K J N"]:
    """Each key's entries in the query's tables, added up."""
    tables = tables.astype(jnp.float32)

    def term(place: Array, code: Array) -> Array:
        table = jax.lax.dynamic_index_in_dim(tables, place, axis=3, keepdims=False)
        return jnp.take_along_axis(table, code, axis=3, mode="clip")

    return over_tables(term, codes, tables.shape[2], jnp.float32)


def collision_counts(queries: Int[Array, "B K J L"], codes: UInt[Array, "B K L N"]) -> Int32[Array, "B K J N"]:
    """Tables in which a key has the query's code."""

    def term(place: Array, code: Array) -> Array:
        query = jax.lax.dynamic_slice_in_dim(queries, place, 1, axis=3)
        return (code == query).astype(jnp.int32)

    return over_tables(term, codes, queries.shape[2], jnp.int32)


def agreeing_bits(
    queries: Int[Array, "B K J L"], codes: UInt[Array, "B K L N"], bits: int
) -> Int32[Array, "B K J N"]:
    """Bits that a key shares with the query, of ``bits`` in each table."""

    def term(place: Array, code: Array) -> Array:
        query = jax.lax.dynamic_slice_in_dim(queries.astype(jnp.int32), place, 1, axis=3)
        return bits - jax.lax.population_count(code ^ query)

    return over_tables(term, codes, queries.shape[2], jnp.int32)


def over_tables(
    term: Callable[[Array, Array], Array], codes: UInt[Array, "B K L N"], group: int, dtype: type
) -> Array:
    """``sum_l term(l, code)`` as ``[B, K, J, N]``, with ``code int32 [B, K, 1, N]`` of table l."""
    batch, heads, tables, slots = codes.shape

    def add(place: Array, total: Array) -> Array:
        code = jax.lax.dynamic_slice_in_dim(codes, place, 1, axis=2)
        return total + term(place, code.astype(jnp.int32))

    return jax.lax.fori_loop(0, tables, add, jnp.zeros((batch, heads, group, slots), dtype))
