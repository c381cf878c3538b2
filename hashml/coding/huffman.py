"""Length-limited canonical Huffman codes (Huffman 1952; Larmore and Hirschberg 1990; Schwartz and Kallick 1964).

The best prefix code whose words have at most ``max_length`` bits comes from package-merge: a coin of value ``2^-l``
stands for bit ``l`` of a symbol's word and costs the symbol's count, and the cheapest coins worth ``m - 1`` are
bought by merging pairs, one level at a time. Only the lengths are stored. Words are given out in the order of
(length, symbol), so that lengths alone say all: words of ``l`` bits are consecutive numbers. A table over the next
``max_length`` bits of a stream answers length and symbol in one look-up.

A code of one symbol has a word of no bits at all: the stream is empty. ``ABSENT`` marks symbols without a word.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, UInt8, UInt16

ABSENT = -1
MAX_LENGTH = 14
"""Bits of the longest word that `pack_lengths` can say; 15 is `ABSENT` there."""

AnyArray = Array | np.ndarray


def code_lengths(counts: Integer[np.ndarray, " symbols"], max_length: int) -> Integer[np.ndarray, " symbols"]:
    """Bits of each symbol's word in the cheapest code of words of at most ``max_length`` bits (package-merge).

    Returns:
        int64; `ABSENT` where the count is 0, and 0 for a symbol that is alone.

    Raises:
        ValueError: for a negative count, or more symbols than words.
    """
    if counts.size and counts.min() < 0:
        raise ValueError(f"counts has {counts.min()}; a count is not negative")
    lengths = np.full(len(counts), ABSENT, np.int64)
    symbols = np.flatnonzero(counts)
    symbols = symbols[np.argsort(counts[symbols], kind="stable")]
    m = len(symbols)
    if m > 2**max_length:
        raise ValueError(f"max_length is {max_length}; {m} symbols need {(m - 1).bit_length()} bits")
    lengths[symbols] = 0
    if m < 2:
        return lengths
    leaves = counts[symbols].astype(np.int64)
    packages, levels = np.zeros(0, np.int64), []
    for _ in range(max_length):
        coins = np.concatenate([leaves, packages])
        order = np.argsort(coins, kind="stable")
        levels.append(order < m)
        packages = coins[order][: len(coins) // 2 * 2].reshape(-1, 2).sum(axis=1)
    bought = 2 * m - 2
    for is_leaf in reversed(levels):
        of_leaves = int(is_leaf[:bought].sum())
        lengths[symbols[:of_leaves]] += 1
        bought = 2 * (bought - of_leaves)
    return lengths


def crude_code_lengths(counts: Integer[np.ndarray, " symbols"], max_length: int) -> Integer[np.ndarray, " symbols"]:
    """As DFloat11 limits them: while a word of Huffman's code is too long, the k rarest counts become 1, k = 2, 3...

    Raises:
        ValueError: as `code_lengths` does.
    """
    limited = counts.copy()
    rarest = np.flatnonzero(counts)
    rarest = rarest[np.argsort(counts[rarest], kind="stable")]
    if len(rarest) > 2**max_length:
        raise ValueError(
            f"max_length is {max_length}; {len(rarest)} symbols need {(len(rarest) - 1).bit_length()} bits"
        )
    for k in range(2, len(rarest) + 1):
        # Words of Huffman's own code never exceed m - 1 bits: this limit is none.
        lengths = code_lengths(limited, max(len(rarest) - 1, 1))
        if lengths.max() <= max_length:
            return lengths
        limited[rarest[:k]] = 1
    return code_lengths(limited, max_length)


def canonical_codes(lengths: Integer[np.ndarray, " symbols"]) -> Integer[np.ndarray, " symbols"]:
    """The words, as uint64 numbers of ``lengths`` bits; 0 for symbols without one.

    Raises:
        ValueError: if no prefix code has these lengths (Kraft's sum exceeds 1).
    """
    codes = np.zeros(len(lengths), np.uint64)
    following, before = 0, 0
    for symbol in sorted(np.flatnonzero(lengths != ABSENT), key=lambda s: (lengths[s], s)):
        length = int(lengths[symbol])
        following <<= length - before
        if following >> length:
            raise ValueError(f"lengths are {lengths[lengths != ABSENT].tolist()}; Kraft's sum of them exceeds 1")
        codes[symbol] = following
        following, before = following + 1, length
    return codes


def decode_table(lengths: Integer[np.ndarray, " symbols"], max_length: int) -> UInt16[np.ndarray, " windows"]:
    """``length << 8 | symbol`` for every value of the next ``max_length`` bits; symbols are below 256.

    Raises:
        ValueError: if the words do not use up all values: not every stream could be decoded.
    """
    table = np.zeros(2**max_length, np.uint16)
    present = sorted(np.flatnonzero(lengths != ABSENT), key=lambda s: (lengths[s], s))
    end = 0
    for symbol in present:
        if lengths[symbol] > max_length:
            raise ValueError(f"lengths has {lengths[symbol]}; allowed are words of at most {max_length} bits")
        begin, end = end, end + 2 ** (max_length - int(lengths[symbol]))
        table[begin:end] = int(lengths[symbol]) << 8 | int(symbol)
    if end != 2**max_length:
        raise ValueError(f"lengths use {end} of {2**max_length} windows; a complete code uses all (Kraft's sum 1)")
    return table


def pack_lengths(lengths: Integer[np.ndarray, " symbols"]) -> UInt8[np.ndarray, " bytes"]:
    """The lengths in nibbles, from the first symbol that has a word: its number, then two lengths a byte.

    Raises:
        ValueError: for a word of more than `MAX_LENGTH` bits.
    """
    if lengths.size and lengths.max() > MAX_LENGTH:
        raise ValueError(f"lengths has {lengths.max()}; allowed are words of at most {MAX_LENGTH} bits")
    present = np.flatnonzero(lengths != ABSENT)
    if not present.size:
        return np.zeros(1, np.uint8)
    first, last = int(present[0]), int(present[-1])
    nibbles = np.pad(lengths[first : last + 1], (0, (last + 1 - first) % 2), constant_values=ABSENT)
    nibbles = (nibbles & 15).astype(np.uint8)
    return np.concatenate([np.array([first], np.uint8), nibbles[0::2] << 4 | nibbles[1::2]])


def unpack_lengths(packed: UInt8[np.ndarray, " bytes"]) -> Integer[np.ndarray, " 256"]:
    """Lengths of the 256 symbols from what `pack_lengths` made.

    Raises:
        ValueError: for lengths of symbols beyond 255.
    """
    nibbles = _nibbles(packed).astype(np.int64)
    lengths = np.full(256 + len(nibbles), ABSENT)
    lengths[int(packed[0]) : int(packed[0]) + len(nibbles)] = np.where(nibbles == 15, ABSENT, nibbles)
    if (lengths[256:] != ABSENT).any():
        raise ValueError(f"packed begins with symbol {packed[0]} and has {len(nibbles)} lengths; symbols end at 255")
    return lengths[:256]


def jitted_decode_table(packed: UInt8[Array, " bytes"], max_length: int) -> UInt16[Array, " windows"]:
    """`decode_table` of packed lengths under `jax.jit`: a table of 8 KB need not be stored to be there.

    Nothing is checked. Sums over earlier words and a running maximum stand for a sort, which would take more memory
    and time to compile.
    """
    lengths = _nibbles(packed).astype(jnp.int32)
    places = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    present = lengths != 15
    key = lengths * 256 + places
    windows = jnp.where(present, 2**max_length >> lengths, 0)
    begin = jnp.where(key < key[:, None], windows, 0).sum(axis=1)
    symbols = packed[0].astype(jnp.int32) + places & 255
    marked = jnp.where(present, begin << 12 | lengths << 8 | symbols, 0)
    table = jax.lax.cummax(jnp.zeros(2**max_length, jnp.int32).at[begin].max(marked, mode="drop"))
    return (table & 0xFFF).astype(jnp.uint16)


def _nibbles(packed: AnyArray) -> AnyArray:
    return (packed[1:, None] >> np.array([4, 0], np.uint8) & 15).reshape(-1)


def entropy(counts: Integer[np.ndarray, " symbols"]) -> float:
    """Shannon's entropy of the counts, in bits a symbol; 0 for no symbols."""
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(-(shares * np.log2(shares)).sum()) + 0.0
