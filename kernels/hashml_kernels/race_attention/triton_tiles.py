"""What the Triton kernels do with a chunk of tokens: load it, make its features, take their gradient back.

Products go to the tensor cores as tf32, eleven bits. 16-bit inputs are exact in that; the planes come in two parts of
eleven bits each, and the logarithms of the features are split in two where they are added up, so that projections and
features are float32 but for the last two bits. Features themselves, and sums of them, are rounded to tf32 once,
before anything is added up, so that the mass of a bucket is of the same numbers as its value. float32 inputs take
three products of tf32 parts (tf32x3) everywhere, and nothing is rounded.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from hashml_kernels.race_attention.features import FLOOR, log_sigmoid


class Arithmetic(NamedTuple):
    """How numbers are multiplied."""

    precise: bool
    """float32 inputs."""
    interpret: bool

    def dot(self, a: Any, b: Any, trans_a: bool = False, trans_b: bool = False) -> Any:
        """Of what `round` has made."""
        return plt.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=self._precision(self.precise))

    def exact(self, a: Any, b: Any, trans_b: bool = False) -> Any:
        """Any numbers with ones and zeros."""
        if self.precise:
            return self.dot(a, b, trans_b=trans_b)
        high = _tf32(a)
        precision = self._precision(False)
        low = plt.dot(a - high, b, trans_b=trans_b, precision=precision)
        return low + plt.dot(high, b, trans_b=trans_b, precision=precision)

    def round(self, x: Any) -> Any:
        return x if self.precise else _tf32(x)

    def _precision(self, precise: bool) -> Any:
        if self.interpret:  # a CPU has no tf32; operands are rounded all the same
            return lax.Precision.HIGHEST
        return lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if precise else lax.DotAlgorithmPreset.TF32_TF32_F32


def _tf32(x: Any) -> Any:
    """To the nearest number of eleven bits; tensor cores would cut off."""
    whole = lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type((whole + 0x1000) & jnp.int32(-0x2000), jnp.float32)


def parts_of(planes: Any, precise: bool) -> list[Any]:
    """The planes as the kernels read them, in parts that tensor cores keep; outside the kernel."""
    if precise:
        return [planes]
    high = _tf32(planes)
    return [high, _tf32(planes - high)]


def count_to(first: Any, size: int) -> Any:
    return first + jnp.arange(size, dtype=jnp.int32)


class Piece(NamedTuple):
    """Columns that are taken together: a whole chunk of wide heads would not fit in registers."""

    first: int
    size: int

    def load(self, ref: Any, lead: tuple[Any, ...], rows: Any) -> Any:
        """Of rows of a matrix ``ref[lead]``, float32, with zeros beyond its ends."""
        where, mask = self._where(ref, lead, rows)
        return plt.load(ref.at[where], mask=mask, other=jnp.zeros((), ref.dtype)).astype(jnp.float32)

    def store(self, ref: Any, lead: tuple[Any, ...], rows: Any, value: Any) -> None:
        where, mask = self._where(ref, lead, rows)
        plt.store(ref.at[where], value.astype(ref.dtype), mask=mask)

    def _where(self, ref: Any, lead: tuple[Any, ...], rows: Any) -> tuple[Any, Any]:
        shape = rows.size, self.size
        row = jnp.broadcast_to(rows[:, None], shape)
        column = jnp.broadcast_to(count_to(self.first, self.size)[None, :], shape)
        mask = row < ref.shape[-2]
        if self.first + self.size > ref.shape[-1]:
            mask &= column < ref.shape[-1]
        return (*(jnp.full(shape, i, jnp.int32) for i in lead), row, column), mask


def pieces_of(width: int, size: int) -> list[Piece]:
    """Of a power of two."""
    size = min(width, size)
    return [Piece(first, size) for first in range(0, width, size)]


def numbers(ref: Any, lead: tuple[Any, ...], rows: Any) -> Any:
    """Entries of a vector ``ref[lead]``, with zeros beyond its end."""
    where = (*(jnp.full(rows.shape, i, jnp.int32) for i in lead), rows)
    return plt.load(ref.at[where], mask=rows < ref.shape[-1], other=jnp.float32(0))


def store_numbers(ref: Any, lead: tuple[Any, ...], rows: Any, value: Any) -> None:
    where = (*(jnp.full(rows.shape, i, jnp.int32) for i in lead), rows)
    plt.store(ref.at[where], value, mask=rows < ref.shape[-1])


class Phi(NamedTuple):
    """Features of a chunk, and what their gradient needs."""

    phi: Any
    """``[C, S]``, rounded; 0 where there is no token."""
    table: Any
    """Without the floor, which has no gradient, and the mask."""
    u: Any
    """``[C, 2 L P]``, the saturated projections."""


class Maps(NamedTuple):
    """What makes features: the refs that all kernels read."""

    arithmetic: Arithmetic
    buckets: int
    selection: Any
    beta: Any
    planes: tuple[Any, ...]
    pieces: list[Piece]
    """Of the coordinates of a token."""

    def phi(self, ref: Any, lead: tuple[Any, ...], rows: Any, live: Any) -> Phi:
        """Of the tokens ``ref[lead, rows]``; ``live [C]`` says which exist."""
        own, projected = self.arithmetic, 0.0
        for piece in self.pieces:
            x = piece.load(ref, lead, rows)
            for part in reversed(self.planes):  # small numbers first
                projected += own.dot(x, self._planes(part, piece), trans_b=True)
        u = jnp.tanh(projected)
        logarithm = own.exact(log_sigmoid(2.0 * self._beta() * u), self.selection[...])
        table = jnp.exp(logarithm)
        used = live[:, None] & (count_to(0, table.shape[1])[None, :] < self.buckets)
        return Phi(own.round(jnp.where(used, table + FLOOR, 0.0)), jnp.where(used, table, 0.0), u)

    def pull(self, at: Phi, d_phi: Any, ref: Any, lead: tuple[Any, ...], rows: Any) -> Any:
        """Stores the gradients of the tokens in ``ref[lead, rows]``; that of beta is a number."""
        own, beta = self.arithmetic, self._beta()
        d_z = own.exact(at.table * d_phi, self.selection[...], trans_b=True)
        d_z = d_z / (1.0 + jnp.exp(2.0 * beta * at.u))
        d_beta = jnp.sum(jnp.sum(2.0 * at.u * d_z, axis=1), axis=0)
        projected = own.round(2.0 * beta * d_z * (1.0 - at.u * at.u))
        for piece in self.pieces:
            piece.store(ref, lead, rows, own.dot(projected, self._planes(self.planes[0], piece)))
        return d_beta

    @staticmethod
    def _planes(part: Any, piece: Piece) -> Any:
        return piece.load(part, (), count_to(0, part.shape[0]))

    def _beta(self) -> Any:
        return self.beta[0]


def lower(weights: Any) -> Any:
    """What queries, along rows, see of the keys of their own chunk."""
    size = weights.shape[0]
    row, column = count_to(0, size)[:, None], count_to(0, size)[None, :]
    return jnp.where(row >= column, weights, 0.0)
