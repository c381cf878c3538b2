"""A float as a symbol that is worth coding and the rest, which is not: integer views only, so that every bit counts.

    bits = sign | exponent | mantissa;     symbol = (bits >> low) mod 2^symbol_bits;     rest = sign | lowest low bits

The sign and the last bits of a trained weight look random, its exponent does not (Zhang et al. 2025; Yang et al.
2025). For bfloat16 and float8_e4m3 the symbol is the exponent: 8 bits and a rest of a byte, 4 bits and a rest of a
nibble, laid out as in DFloat11 and ECF8 (the sign is the rest's highest bit; the first of two nibbles is the high
one). For float16 and float8_e5m2 the exponent has 5 bits, and a rest of 11 or 3 would straddle bytes. So the symbol
takes the 3 or 1 highest bits of the mantissa, too: a code loses nothing by longer symbols, and may gain, since these
bits are not quite fair.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, UInt, UInt8

AnyArray = Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    """Where a format is cut: ``low`` is the number of the mantissa's bits in the rest.

    Attributes:
        name: of the dtype.
        bits: of a number.
        mantissa_bits: of a number.
        low: bits of the mantissa that stay in the rest; with the sign they are 8, 4 or 2.
    """

    name: str
    bits: int
    mantissa_bits: int
    low: int

    @property
    def symbol_bits(self) -> int:
        return self.bits - 1 - self.low

    @property
    def rest_bits(self) -> int:
        return 1 + self.low

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(getattr(ml_dtypes, self.name, self.name))

    @property
    def word(self) -> np.dtype:
        """The unsigned integer of the same size."""
        return np.dtype(f"uint{self.bits}")


FORMATS = {
    found.name: found
    for found in (
        FloatFormat("bfloat16", 16, 7, 7),
        FloatFormat("float16", 16, 10, 7),
        FloatFormat("float8_e4m3fn", 8, 3, 3),
        FloatFormat("float8_e5m2", 8, 2, 1),
    )
}


def float_format(dtype: DTypeLike) -> FloatFormat:
    """The format of a dtype.

    Raises:
        ValueError: for another dtype.
    """
    name = jnp.dtype(dtype).name
    if name not in FORMATS:
        raise ValueError(f"dtype is {name}; allowed are {', '.join(FORMATS)}")
    return FORMATS[name]


def to_bits(array: AnyArray) -> UInt[AnyArray, " count"]:
    """The numbers as flat unsigned integers of their size, row-major.

    Raises:
        ValueError: for a dtype that is none of `FORMATS`.
    """
    word = float_format(array.dtype).word
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array).reshape(-1).view(word)
    return jax.lax.bitcast_convert_type(array, word).reshape(-1)


def from_bits(bits: UInt[AnyArray, " count"], form: FloatFormat, shape: tuple[int, ...]) -> AnyArray:
    """The numbers of these integers."""
    if isinstance(bits, np.ndarray):
        return bits.view(form.dtype).reshape(shape)
    return jax.lax.bitcast_convert_type(bits, form.dtype).reshape(shape)


def split(
    bits: UInt[AnyArray, " count"], form: FloatFormat
) -> tuple[UInt8[AnyArray, " count"], UInt8[AnyArray, " m"]]:
    """Symbols, and rests in ``m = rest_size`` bytes, the first one in the highest bits; what is left over is zero."""
    mask = np.array(2**form.symbol_bits - 1, form.word)
    symbols = (bits >> form.low & mask).astype(np.uint8)
    rest = (bits >> form.symbol_bits & (1 << form.low) | bits & (1 << form.low) - 1).astype(np.uint8)
    a_byte = 8 // form.rest_bits
    if a_byte == 1:
        return symbols, rest
    xp = np if isinstance(bits, np.ndarray) else jnp
    rest = xp.pad(rest, (0, -rest.shape[0] % a_byte)).reshape(-1, a_byte)
    shifts = np.arange(8 - form.rest_bits, -1, -form.rest_bits).astype(np.uint8)
    return symbols, (rest << shifts).sum(axis=1, dtype=np.uint8)


def join(
    symbols: UInt8[AnyArray, " count"], rest: UInt8[AnyArray, " m"], form: FloatFormat
) -> UInt[AnyArray, " count"]:
    """What `split` took apart.

    Raises:
        ValueError: if ``rest`` has not `rest_size` bytes.
    """
    count = symbols.shape[0]
    if rest.shape[0] != rest_size(count, form):
        raise ValueError(f"rest has {rest.shape[0]} bytes; {count} numbers take {rest_size(count, form)}")
    if form.rest_bits < 8:
        rest = spread(rest, form.rest_bits)[:count]
    rest, symbols = rest.astype(form.word), symbols.astype(form.word)
    return (rest >> form.low) << form.bits - 1 | symbols << form.low | rest & (1 << form.low) - 1


def rest_size(count: int, form: FloatFormat) -> int:
    """Bytes of the rests of ``count`` numbers."""
    return math.ceil(count * form.rest_bits / 8)


def spread(packed: UInt8[AnyArray, " m"], bits: int) -> UInt8[AnyArray, " count"]:
    """Each byte's groups of 4 or 2 bits, the highest first, as bytes.

    The bytes of a group are made as one word, which arithmetic of vectors does, and then seen as bytes.
    """
    groups = 8 // bits
    word = np.dtype(f"uint{8 * groups}")
    wide, words = packed.astype(word), packed.astype(word) & 0
    for i in range(groups):
        words = words | (wide >> (8 - bits * (i + 1)) & (2**bits - 1)) << (8 * i)
    if isinstance(words, np.ndarray):
        return words.astype(word.newbyteorder("<"), copy=False).view(np.uint8)
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)
