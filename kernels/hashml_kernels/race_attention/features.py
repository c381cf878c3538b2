"""What all backends share: the arrays that they are given, and the features as two products of matrices.

With ``z = 2 beta tanh(w . x)`` a table of ``2**P`` corners is ``prod_p sigmoid(c[r, p] z[p])``. Every plane is taken
twice, as it is and turned round, so that the logarithm of the table is a sum of what both give:

    ls = log_sigmoid(2 beta tanh(x @ signed.T))        signed = [W; -W], ``2 L P`` rows
    phi = exp(ls @ selection) + FLOOR                  selection [2 L P, L 2**P] of zeros and ones

and so is its gradient: with ``h = phi d_phi`` (without the floor), ``d_ls = h @ selection.T``. Nothing is subtracted,
and an unlikely bucket keeps its relative precision.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array

FLOOR = 1e-15
"""Of every feature: a query whose buckets hold no key gets the mean of the values."""

TINY = float(np.finfo(np.float32).tiny)


class Operands(NamedTuple):
    """What a forward pass reads; only shapes and dtypes matter to a backend's ``check``."""

    q: Any
    """``[B, K, G, T, D]``."""
    k: Any
    """``[B, K, N, D]``."""
    v: Any
    """``[B, K, N, V]``."""
    keep: Any
    """float32 ``[B, N]``, 1 for keys that exist and 0 for others; None: all exist."""
    planes: Any
    """float32 ``[L, P, D]``."""
    beta: Any
    """float32 scalar."""

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """B, K, G, T, N, D, V."""
        return (*self.q.shape[:4], *self.k.shape[2:], self.v.shape[3])

    @property
    def buckets(self) -> int:
        """S, coordinates of a token's features."""
        return self.planes.shape[0] * 2 ** self.planes.shape[1]


class Results(NamedTuple):
    """Of a forward pass."""

    out: Any
    """``[B, K, G, T, V]`` in the dtype of the values."""
    inverse: Any
    """float32 ``[B, K, G, T]``: 1 / the denominators, 0 for a query that sees no key."""


class Gradients(NamedTuple):
    """Of a backward pass, in the dtypes of what they belong to; that of beta is float32."""

    q: Any
    k: Any
    v: Any
    beta: Any


def corner_bits(bits: int) -> np.ndarray:
    """``[2**bits, bits]``: bit ``p`` of each code, the highest first."""
    codes = np.arange(2**bits)[:, None] >> np.arange(bits - 1, -1, -1)
    return (codes & 1).astype(np.float32)


def selection(tables: int, bits: int, rows: int, columns: int) -> np.ndarray:
    """float32 ``[rows, columns]``: which signed planes meet in which bucket; zeros beyond both."""
    own = corner_bits(bits).T
    found = np.zeros((rows, columns), np.float32)
    count = tables * bits
    for half, part in enumerate((own, 1 - own)):
        whole = np.kron(np.eye(tables, dtype=np.float32), part)
        found[half * count : (half + 1) * count, : whole.shape[1]] = whole
    return found


def signed_planes(planes: Array, rows: int, columns: int) -> Array:
    """float32 ``[rows, columns]``: the planes, then the planes turned round, then zeros."""
    flat = planes.reshape(-1, planes.shape[-1])
    both = jnp.concatenate([flat, -flat])
    return jnp.pad(both, ((0, rows - both.shape[0]), (0, columns - both.shape[1])))


def log_sigmoid(z: Any) -> Any:
    return jnp.minimum(z, 0.0) - jnp.log(1.0 + jnp.exp(-jnp.abs(z)))


def reciprocal(x: Any) -> Any:
    """1 / x, and 0 where there is nothing to divide by."""
    some = x > TINY
    return jnp.where(some, 1.0 / jnp.where(some, x, 1.0), 0.0)


def mass_gradient(results: Results, gradient: Array) -> Array:
    """The denominators' gradient, float32 ``[B, K, G, T]``: all that a backward pass needs of the output."""
    product = gradient.astype(jnp.float32) * results.out.astype(jnp.float32)
    return -product.sum(axis=-1) * results.inverse


def exclusive(sums: Array, *, reverse: bool = False) -> Array:
    """Sums over the entries of axis 1 before each, or after each; moved by one, since a difference loses digits."""
    running = jax.lax.cumsum(sums, axis=1, reverse=reverse)
    none = jnp.zeros_like(running[:, :1])
    return jnp.concatenate([running[:, 1:], none] if reverse else [none, running[:, :-1]], axis=1)
