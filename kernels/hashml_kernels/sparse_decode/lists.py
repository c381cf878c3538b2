"""What all backends are handed, and sums over parts of a list, which merge in any order."""

from typing import NamedTuple

import jax.numpy as jnp

from hashml_kernels.annotations import Array, Float

MASKED = -1e30
"""Logit of an entry that does not count: finite, so that no difference of two is NaN."""


class Operands(NamedTuple):
    """Arrays of the op. S lists, each of J query heads; a key head has S / K neighbouring lists.

    Attributes:
        q: ``[B, S, J, D]``, any float dtype.
        k, v: ``[B, K, N, D]`` and ``[B, K, N, V]``.
        idx: int32 ``[B, S, M]``: slots, or pages of them.
        valid: bool ``[B, S, M]``.
        weight: float32 ``[B, S, M]``.
        length: int32 ``[B]``: slots from here on do not count.
    """

    q: Array
    k: Array
    v: Array
    idx: Array
    valid: Array
    weight: Array
    length: Array

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Batch, lists, queries a list, entries of a list, slots."""
        batch, lists, queries, _ = self.q.shape
        return batch, lists, queries, self.idx.shape[2], self.k.shape[2]


class Partial(NamedTuple):
    """What a part of the list adds up to, relative to its largest logit; float32.

    Attributes:
        value: ``[*n, V]``: sum of ``w exp(s - top) v``.
        mass: ``[*n]``: sum of ``w exp(s - top)``; 0 where nothing counts.
        top: ``[*n]``: the largest ``s + log w``; `MASKED` where nothing counts.
    """

    value: Array
    mass: Array
    top: Array


def merge(parts: Partial, axis: int) -> Partial:
    """The sums over all parts, which lie along ``axis`` of ``mass``."""
    top = parts.top.max(axis=axis, keepdims=True)
    # Where nothing counts both are MASKED; the factor is then 1, of a mass of 0.
    factor = jnp.exp(parts.top - top)
    value = jnp.sum(factor[..., None] * parts.value, axis=axis)
    return Partial(value, jnp.sum(factor * parts.mass, axis=axis), top.squeeze(axis))


def finish(partial: Partial) -> Float[Array, "*n V"]:
    """``value / mass``, and 0 where nothing counts."""
    found = partial.mass > 0
    return jnp.where(found[..., None], partial.value / jnp.where(found, partial.mass, 1.0)[..., None], 0.0)


def tokens(operands: Operands, page: int) -> Operands:
    """Lists of slots, ``M page`` entries, in which ``valid`` says all: range, length and weights above 0."""
    idx, valid, weight, slots = operands.idx, operands.valid, operands.weight, operands.k.shape[2]
    pages = -(-slots // page)
    # Before the multiplication, which could leave the 32 bits.
    valid = valid & (idx >= 0) & (idx < pages) & (weight > 0)
    idx = jnp.where(valid, idx, 0)
    if page > 1:
        idx = (idx[..., None] * page + jnp.arange(page, dtype=jnp.int32)).reshape(*idx.shape[:2], -1)
        valid, weight = (jnp.repeat(x, page, axis=2) for x in (valid, weight))
    valid = valid & (idx < jnp.minimum(operands.length, slots)[:, None, None])
    return operands._replace(idx=idx, valid=valid, weight=weight)
