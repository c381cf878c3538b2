"""What every backend takes and gives: streams, entrances, the table, and how floats are put together.

A chunk, or lane, is ``4 * steps`` symbols; unit ``t * lanes + lane`` of four neighbouring symbols is step ``t`` of
that lane. The code of lane ``n`` begins at bit ``starts[n]`` after the word ``bases[n // lanes_a_base]``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array

UNIT = 4


class FloatParts(NamedTuple):
    """How a float's bits are made of a symbol and a rest: ``sign | symbol | lowest low bits``.

    Attributes:
        bits: of a number, 16 or 8.
        low: bits of the mantissa that are in the rest, below the sign: 7, 3 or 1, so that rests fill bytes.
        pairs: whether a coded byte is the symbols of two numbers, the first in the high nibble.
    """

    bits: int
    low: int
    pairs: bool = False

    @property
    def rest_bits(self) -> int:
        return 1 + self.low

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(f"uint{self.bits}")

    def join(self, symbol: Array, rest: Array) -> Array:
        """The number's bits, of integers that are wide enough."""
        low = (1 << self.low) - 1
        return (rest >> self.low) << (self.bits - 1) | symbol << self.low | rest & low


class Operands(NamedTuple):
    """What the api has checked.

    Attributes:
        words: uint32 ``[words]``, the stream from the highest bit.
        bases: uint32 ``[segments]``.
        starts: uint16 ``[lanes]``.
        table: uint16 ``[2^max_length]``, ``length << 8 | symbol`` by the next bits of the stream.
        rest: uint8, the rests of the numbers one after the other from the highest bit, or None.
    """

    words: Array
    bases: Array
    starts: Array
    table: Array
    rest: Array | None

    @property
    def max_length(self) -> int:
        return self.table.shape[0].bit_length() - 1


class Geometry(NamedTuple):
    """What is static.

    Attributes:
        total: numbers of the result.
        lanes: chunks.
        lanes_a_base: that share an entry of ``bases``.
        form: of the floats; None: symbols are the result.
    """

    total: int
    lanes: int
    lanes_a_base: int
    form: FloatParts | None

    @property
    def symbols(self) -> int:
        """Bytes that were coded."""
        return -(-self.total // self.numbers)

    @property
    def numbers(self) -> int:
        """Of a symbol."""
        return 2 if self.form is not None and self.form.pairs else 1

    @property
    def steps(self) -> int:
        return -(-self.symbols // (UNIT * self.lanes))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("uint8") if self.form is None else self.form.dtype


def spread(packed: Array, bits: int) -> Array:
    """Each byte's groups of 4 or 2 bits, the highest first, as bytes; made as words, which vectors do."""
    groups = 8 // bits
    word = np.dtype(f"uint{8 * groups}")
    wide, words = packed.astype(word), packed.astype(word) & 0
    for i in range(groups):
        words = words | (wide >> (8 - bits * (i + 1)) & (2**bits - 1)) << (8 * i)
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)


def finished(symbols: Array, rest: Array | None, geometry: Geometry) -> Array:
    """The result, of all coded bytes: what the api gives back, in plain jnp."""
    form = geometry.form
    if form is None or rest is None:
        return symbols[: geometry.total]
    if form.pairs:
        symbols = spread(symbols, 4)
    if form.rest_bits < 8:
        rest = spread(rest, form.rest_bits)
    symbols, rest = (x[: geometry.total].astype(form.dtype) for x in (symbols, rest))
    return form.join(symbols, rest)


def first_places(operands: Operands, geometry: Geometry) -> Array:
    """The word in which each lane begins, uint32."""
    bases = jnp.repeat(operands.bases, geometry.lanes_a_base)[: geometry.lanes]
    return bases + (operands.starts >> 5).astype(jnp.uint32)
