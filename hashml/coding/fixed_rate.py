"""Fixed-rate codes with escapes, for symbols that crowd below a local top, such as the exponents of weights.

    code = top[block] - symbol        if 0 <= code < 2^bits - 1,        else code = 2^bits - 1 and the symbol itself
                                                                        stands next in the list of escapes

Every code has the same place whatever came before it, so that decoding is elementwise; the escape of an element is
found by its rank, a running count. ``top`` is a byte a block of 4096 symbols, the one with fewest escapes there.
Codes lie in bits as `hashml.coding.bit_packing` says.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from hashml.coding.bit_packing import packed_size, unpack

BLOCK = 4096


class FixedRate(NamedTuple):
    """A coded sequence; its number of symbols and the bits of a code are known besides."""

    codes: UInt8[Array | np.ndarray, " bytes"]
    tops: UInt8[Array | np.ndarray, " blocks"]
    escapes: UInt8[Array | np.ndarray, " escapes"]


def encode_fixed_rate(symbols: UInt8[np.ndarray, " count"], bits: int) -> FixedRate:
    """The codes, in NumPy.

    Raises:
        ValueError: if ``bits`` is not in 1..7; from 8 on, a symbol itself is shorter.
    """
    _check(bits)
    escape = 2**bits - 1
    blocks = -(-len(symbols) // BLOCK)
    tops = np.zeros(blocks, np.uint8)
    for block in range(blocks):
        counts = np.bincount(symbols[block * BLOCK : (block + 1) * BLOCK], minlength=256)
        # Symbols top - escape + 1 .. top have codes.
        below = np.concatenate([np.zeros(escape, np.int64), np.cumsum(counts)])
        tops[block] = np.argmax(below[escape:] - below[:256])
    distance = np.repeat(tops, BLOCK)[: len(symbols)].astype(np.int16) - symbols
    escaped = (distance < 0) | (distance >= escape)
    codes = np.where(escaped, escape, distance).astype(np.uint8)
    spread = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
    return FixedRate(np.packbits(spread.reshape(-1), bitorder="little"), tops, symbols[escaped])


def decode_fixed_rate(coded: FixedRate, count: int, bits: int) -> UInt8[Array, " {count}"]:
    """The symbols, inside `jax.jit` or out of it. A damaged list of escapes gives wrong symbols, nothing worse.

    Raises:
        ValueError: if ``bits`` is not in 1..7, or the sizes do not fit.
    """
    _check_sizes(coded, count, bits)
    codes = unpack(jnp.asarray(coded.codes), bits, count)
    escaped = codes == 2**bits - 1
    symbols = jnp.repeat(jnp.asarray(coded.tops), BLOCK)[:count] - codes
    if not coded.escapes.shape[0]:
        return symbols
    rank = _ranks(escaped)
    return jnp.where(escaped, jnp.asarray(coded.escapes).at[rank].get(mode="clip"), symbols)


def _ranks(marks: Bool[Array, " count"]) -> Int[Array, " count"]:
    """How many marks stand before each place: a running sum over words of 32, and a count of bits within."""
    count = marks.shape[0]
    bits = jnp.arange(32, dtype=jnp.uint32)
    spread = jnp.pad(marks, (0, -count % 32)).reshape(-1, 32).astype(jnp.uint32)
    words = (spread << bits).sum(axis=1, dtype=jnp.uint32)
    each = jax.lax.population_count(words)
    before = jnp.cumsum(each) - each
    within = jax.lax.population_count(words[:, None] & ((jnp.uint32(1) << bits) - 1))
    return (before[:, None] + within).reshape(-1)[:count].astype(jnp.int32)


def decode_fixed_rate_host(coded: FixedRate, count: int, bits: int) -> UInt8[np.ndarray, " {count}"]:
    """The symbols, in NumPy.

    Raises:
        ValueError: as `decode_fixed_rate` does, and if the number of escapes is not that of the codes.
    """
    _check_sizes(coded, count, bits)
    stream = np.unpackbits(np.asarray(coded.codes), count=count * bits, bitorder="little").reshape(count, bits)
    codes = np.packbits(stream, axis=1, bitorder="little")[:, 0] if count else np.zeros(0, np.uint8)
    symbols = np.repeat(np.asarray(coded.tops), BLOCK)[:count] - codes
    escaped = codes == 2**bits - 1
    if (found := int(escaped.sum())) != len(coded.escapes):
        raise ValueError(f"coded has {len(coded.escapes)} escapes; its codes name {found}")
    symbols[escaped] = np.asarray(coded.escapes)
    return symbols


def _check(bits: int) -> None:
    if not 1 <= bits <= 7:
        raise ValueError(f"bits is {bits}; a code of a byte's symbol has 1 to 7")


def _check_sizes(coded: FixedRate, count: int, bits: int) -> None:
    _check(bits)
    found = (coded.codes.shape[0], coded.tops.shape[0])
    wanted = (packed_size(count, bits), -(-count // BLOCK))
    if found != wanted:
        raise ValueError(
            f"coded has {found[0]} bytes and {found[1]} tops; {count} symbols take {wanted[0]} and {wanted[1]}"
        )
