"""The op by XLA on any platform: some rows of W at a time are made from their codes, multiplied and forgotten.

Neither W nor its gradient exists whole. A number is looked up by a chain of choices, bit by bit of its code, which on
a CPU becomes vector instructions and is faster than a gather; gradients of a table are as many masked sums,
and no scatter.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hashml_kernels.annotations import Array
from hashml_kernels.lut_matmul.layout import Layout, unpack_codes
from hashml_kernels.lut_matmul.operands import Operands
from hashml_kernels.manual_axes import varying_alike

BLOCK_WEIGHTS = 2**20
"""Numbers of W that exist at a time: 4 MiB."""
_CHAIN = 4
"""Bits of codes that are looked up by choices; others by a gather."""


def block_rows(own: Layout) -> int:
    """Rows of W that are made at a time."""
    return max(1, BLOCK_WEIGHTS // own.count)


def multiply(operands: Operands, own: Layout) -> Array:
    """``[M, out]`` in the dtype of ``x``."""
    x = operands.x.astype(jnp.float32)

    def part(total: Any, rows: Operands) -> tuple[Any, Array]:
        return total, _product("oi,mi->om", _weights(rows, own), x)

    _, y = _by_rows(part, (), operands._replace(x=None), own)
    return y.T.astype(operands.x.dtype)


def transposed(operands: Operands, dy: Array, own: Layout) -> Array:
    """``dy W``: ``[M, in]``, float32."""

    def part(total: Array, rows: Any) -> tuple[Array, tuple[()]]:
        operands, dy = rows
        return total + _product("om,oi->mi", dy, _weights(operands, own)), ()

    (start, *_), _ = varying_alike(jnp.zeros(operands.x.shape, jnp.float32), operands, dy)
    return _by_rows(part, start, (operands._replace(x=None), dy.T.astype(jnp.float32)), own)[0]


def gradient(operands: Operands, dy: Array, own: Layout) -> Array:
    """Sums of ``dy.T x`` over the columns of each group, float32.

    ``[out, G, 2**bits]`` over the columns of each code where there are tables; else ``[out, G]``, each number
    weighed by its code.
    """
    x = operands.x.astype(jnp.float32)
    groups, entries = operands.groups, None if operands.tables is None else 2**own.bits

    def part(total: Any, rows: Any) -> tuple[Any, Array]:
        codes, dy = rows
        dw = _product("om,mi->oi", dy, x).reshape(codes.shape[0], groups, -1)
        codes = unpack_codes(codes, own.bits, own.count).reshape(dw.shape)
        if entries is None:
            return total, jnp.sum(dw * codes, axis=2)

        def chosen(entry: Any) -> Array:
            return jnp.sum(jnp.where(codes == entry, dw, 0.0), axis=2)

        # One after the other: on a CPU a single loop over all entries goes ten times slower.
        return total, jnp.moveaxis(lax.map(chosen, jnp.arange(entries, dtype=jnp.uint8)), 0, 2)

    return _by_rows(part, (), (operands.codes, dy.T.astype(jnp.float32)), own)[1]


def _weights(rows: Operands, own: Layout) -> Array:
    """Some rows of W, float32."""
    codes = unpack_codes(rows.codes, own.bits, own.count)
    codes = codes.reshape(codes.shape[0], rows.groups, -1)
    tables, scales, zeros = (None if a is None else a.astype(jnp.float32) for a in rows[2:])
    if tables is None:
        assert scales is not None
        assert zeros is not None
        w = scales[..., None] * (codes.astype(jnp.float32) - zeros[..., None])
    elif own.bits <= _CHAIN:
        w = _choose([tables[..., entry, None] for entry in range(2**own.bits)], codes)
    else:
        w = jnp.take_along_axis(tables, codes.astype(jnp.int32), axis=2)
    return w.reshape(codes.shape[0], own.count)


def _choose(entries: list[Array], codes: Array) -> Array:
    """``entries[code]``: each bit of the codes halves the list."""
    while len(entries) > 1:
        odd = (codes & 1) != 0
        entries = [jnp.where(odd, b, a) for a, b in zip(entries[::2], entries[1::2], strict=True)]
        codes = codes >> 1
    return jnp.broadcast_to(entries[0], codes.shape)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, precision="highest")


def _by_rows(part: Callable[..., Any], total: Any, arrays: Any, own: Layout) -> tuple[Any, Any]:
    """``part`` on blocks of rows of all arrays: what is carried on, and the results one after the other."""
    rows = jax.tree.leaves(arrays)[0].shape[0]
    size = min(block_rows(own), max(rows, 1))
    whole = rows // size * size
    blocks = jax.tree.map(lambda a: a[:whole].reshape(-1, size, *a.shape[1:]), arrays)
    total, found = lax.scan(part, total, blocks)
    found = [jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), found)]
    if whole < rows:
        total, last = part(total, jax.tree.map(lambda a: a[whole:], arrays))
        found.append(last)
    return total, functools.reduce(lambda a, b: jax.tree.map(lambda *p: jnp.concatenate(p), a, b), found)
