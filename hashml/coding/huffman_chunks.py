"""Huffman codes in chunks of equal numbers of symbols, so that all chunks are decoded in lockstep.

A stream of prefix codes has no second entrance: who wants to decode in parallel stores where some codes begin. Chunks
of equal *bits* (DFloat11's) then hold unequal numbers of symbols, and need a first pass that counts them and a
scatter. Here every chunk (a lane) has the same number of symbols, ``4 * steps``, and unit ``t * lanes + lane`` of
four neighbouring symbols is step ``t`` of that lane:

    units [steps, lanes, 4] = symbols in their order;     the codes of units[:, lane] follow each other in the stream

One step of all lanes therefore writes ``4 * lanes`` neighbouring symbols: no count, no scatter, no transposition, and
each step is two windows of 32 bits and four look-ups a lane. Words are at most 14 bits, two of which fit in a window.

Stored: ``words``, the stream from the highest bit; ``starts``, a uint16 a lane, the first bit within the segment of
its lane; ``bases``, the first word of each segment, which has about 4096 symbols and begins with a word, so that no
offset counts bits beyond 2^32; ``lengths``, the packed code. Symbols that fill up the last step are the commonest.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt, UInt8, UInt16, UInt32

from hashml.coding import huffman_native
from hashml.coding.huffman import (
    ABSENT,
    MAX_LENGTH,
    AnyArray,
    canonical_codes,
    code_lengths,
    decode_table,
    jitted_decode_table,
    pack_lengths,
    unpack_lengths,
)
from hashml_kernels.huffman_decode import FloatParts, huffman_decode

UNIT = 4
_SEGMENT = 4096
_BLOCK = 8192
"""Lanes that the host decodes at a time: their windows stay in the cache of a core."""
_WINDOW = 16
"""Bits of a look-up of several symbols."""


class Chunks(NamedTuple):
    """A coded sequence; its number of symbols and ``max_length`` are known besides."""

    words: UInt32[Array | np.ndarray, " words"]
    bases: UInt32[Array | np.ndarray, " segments"]
    starts: UInt16[Array | np.ndarray, " lanes"]
    lengths: UInt8[Array | np.ndarray, " bytes"]


def chunk_steps(count: int, lanes: int) -> int:
    """Steps of four symbols in which ``lanes`` chunks give ``count`` symbols."""
    return -(-count // (UNIT * lanes))


def _segment_lanes(steps: int) -> int:
    """Lanes that share a base: the start of the last one is below 2^16, whatever the code."""
    return max(1, _SEGMENT // (UNIT * steps))


# --- encode ---------------------------------------------------------------------------------------


def encode_chunks(symbols: UInt8[np.ndarray, " count"], *, chunk: int = 512, max_length: int = 12) -> Chunks:
    """The best code of at most ``max_length`` bits for these symbols, and the stream, in NumPy.

    Args:
        symbols: at least one.
        chunk: symbols of a chunk, roughly: the number of chunks is ``count / chunk``, rounded.
        max_length: bits of the longest word; a decoder's table has ``2**max_length`` entries.

    Raises:
        ValueError: for no symbols, and for ``chunk`` or ``max_length`` out of range.
    """
    if not symbols.size:
        raise ValueError("symbols is empty; a chunk has symbols")
    if not 1 <= chunk <= _SEGMENT:
        raise ValueError(f"chunk is {chunk}; allowed are 1 to {_SEGMENT}")
    if not 8 <= max_length <= MAX_LENGTH:
        raise ValueError(f"max_length is {max_length}; allowed are 8 to {MAX_LENGTH}, since symbols are bytes")
    count = len(symbols)
    counts = np.bincount(symbols, minlength=256)
    lengths = code_lengths(counts, max_length)
    # Few symbols a lane at the least: a lane more costs two bytes.
    lanes = max(1, round(count / chunk))
    steps = chunk_steps(count, lanes)
    symbols = np.pad(symbols, (0, UNIT * steps * lanes - count), constant_values=np.uint8(counts.argmax()))
    pairs = symbols.view("<u2").reshape(steps, lanes, 2)
    code, length = _pair_tables(lengths)

    group = _segment_lanes(steps)
    block = group * max(1, 2**16 // (steps * group))
    words, bases, starts, begin = [], [], [], 0
    for first in range(0, lanes, block):
        part = pairs[:, first : first + block]
        bits = length[part[..., 0]] + length[part[..., 1]]
        codes = code[part[..., 0]] << length[part[..., 1]].astype(np.uint64) | code[part[..., 1]]
        ends = np.cumsum(bits, axis=0, dtype=np.int64)
        start, base, total = _places(ends[-1], group)
        words.append(_placed(codes, bits, ends - bits + base[np.arange(len(start)) // group] * 32 + start, total))
        bases.append(base + begin)
        starts.append(start)
        begin += total
    if begin >= 2**32:
        raise ValueError(f"symbols take {begin} words; allowed are fewer than 2^32")
    stream = np.concatenate(words) if begin else np.zeros(1, np.uint32)  # a look-up needs something to read
    return Chunks(
        stream,
        np.concatenate(bases).astype(np.uint32),
        np.concatenate(starts).astype(np.uint16),
        pack_lengths(lengths),
    )


def _pair_tables(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words of two symbols after each other, by the pair's bytes as a little-endian uint16, and their bits."""
    codes, bits = canonical_codes(lengths), np.maximum(lengths, 0)
    pair_bits = (bits[None, :] + bits[:, None]).astype(np.int64)  # [second, first]
    pair_codes = codes[None, :] << bits[:, None].astype(np.uint64) | codes[:, None]
    return pair_codes.reshape(-1), pair_bits.reshape(-1)


def _places(bits: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Of lanes of so many bits: first bits in the segments, first words of the segments, and words of all."""
    lanes = len(bits)
    table = np.pad(bits, (0, -lanes % group)).reshape(-1, group)
    within = np.cumsum(table, axis=1)
    words = -(-within[:, -1] // 32)
    ends = np.cumsum(words)
    return (within - table).reshape(-1)[:lanes], ends - words, int(ends[-1])


def _placed(codes: np.ndarray, bits: np.ndarray, places: np.ndarray, total: int) -> np.ndarray:
    """The stream in which each code stands at its place; a code of up to 56 bits touches three words at most.

    Codes do not overlap, so that a sum is their union, and a float64 holds 32 bits exactly.
    """
    codes, places = codes.reshape(-1), places.reshape(-1)
    left = codes << (64 - np.maximum(bits.reshape(-1), 1)).astype(np.uint64)
    shift = (places & 31).astype(np.uint64)
    high = left >> shift
    low = left << np.uint64(1) << (np.uint64(63) - shift)
    word = places >> 5
    stream = np.bincount(word, (high >> np.uint64(32)).astype(np.float64), total + 3)
    stream += np.bincount(word + 1, (high & np.uint64(0xFFFFFFFF)).astype(np.float64), total + 3)
    stream += np.bincount(word + 2, (low >> np.uint64(32)).astype(np.float64), total + 3)
    return stream[:total].astype(np.uint32)


# --- decode ---------------------------------------------------------------------------------------


def decode_chunks(chunks: Chunks, count: int, max_length: int) -> UInt8[Array, " {count}"]:
    """The symbols, inside `jax.jit` or out of it: all lanes at once, by the kernel of the platform or a scan.

    A damaged stream gives wrong symbols, never a read out of bounds.
    """
    return _decode_lanes(chunks, count, count, max_length)


def decode_joined(
    chunks: Chunks, rest: UInt8[AnyArray, " bytes"], count: int, max_length: int, join: tuple[int, int, bool]
) -> UInt[Array, " {count}"]:
    """Numbers of which the chunks hold symbols and ``rest`` the signs and low bits, inside `jax.jit` or out of it.

    The kernels write no symbols: numbers are all that leaves them.

    Args:
        chunks: of the symbols.
        rest: as `hashml.weights.float_split` lays it.
        count: of the numbers.
        max_length: bits of the longest word.
        join: bits of a number, its bits below the symbol, and whether two symbols are one in the chunks.
    """
    symbols = -(-count // 2) if join[2] else count
    return _decode_lanes(chunks, symbols, count, max_length, rest=rest, form=FloatParts(*join))


def _decode_lanes(chunks: Chunks, symbols: int, count: int, max_length: int, **floats: Any) -> Array:
    table = jitted_decode_table(jnp.asarray(chunks.lengths), max_length)
    group = _segment_lanes(chunk_steps(symbols, chunks.starts.shape[0]))
    return huffman_decode(chunks.words, chunks.bases, chunks.starts, table, count=count, lanes_a_base=group, **floats)


def decode_chunks_host(
    chunks: Chunks, count: int, max_length: int, *, native: bool = True
) -> UInt8[np.ndarray, " {count}"]:
    """The symbols, on one core of the host.

    Args:
        chunks: of the symbols.
        count: of the symbols.
        max_length: bits of the longest word.
        native: whether native code may do it, where a compiler is (`hashml.coding.huffman_native`); else NumPy does.

    Raises:
        ValueError: for parts whose sizes do not fit together, and for lengths that are no code's.
    """
    steps, group, table = _checked(chunks, count, max_length)
    if not native or not huffman_native.available():
        return _decode_in_lockstep(chunks, count, max_length, steps, group, table)
    words, bases, starts = (np.asarray(part) for part in chunks[:3])
    sizes: dict[str, Any] = {"group": group, "steps": steps, "max_length": max_length, "count": count}
    return huffman_native.decode_lanes(words, bases, starts, table, **sizes)


def decode_joined_host(
    chunks: Chunks, rest: UInt8[np.ndarray, " bytes"], count: int, max_length: int, join: tuple[int, int, bool]
) -> UInt[np.ndarray, " {count}"] | None:
    """Numbers of which the chunks hold symbols and ``rest`` the signs and low bits, in one pass of native code.

    Args:
        chunks: of the symbols.
        rest: as `hashml.weights.float_split` lays it, of the size that it says.
        count: of the numbers.
        max_length: bits of the longest word.
        join: bits of a number, its bits below the symbol, and whether two symbols are one in the chunks.

    Returns:
        ``None`` where there is no native code, or none for this ``join``.

    Raises:
        ValueError: as `decode_chunks_host` does.
    """
    if join not in huffman_native.JOINS or not huffman_native.available():
        return None
    steps, group, table = _checked(chunks, -(-count // 2) if join[2] else count, max_length)
    words, bases, starts = (np.asarray(part) for part in chunks[:3])
    sizes: dict[str, Any] = {"group": group, "steps": steps, "max_length": max_length, "count": count}
    return huffman_native.decode_lanes(words, bases, starts, table, rest=rest, join=join, **sizes)


def _checked(chunks: Chunks, count: int, max_length: int) -> tuple[int, int, np.ndarray]:
    """Steps of a lane, lanes of a segment, and the decoder's table."""
    if not 8 <= max_length <= MAX_LENGTH:
        raise ValueError(f"max_length is {max_length}; allowed are 8 to {MAX_LENGTH}, since symbols are bytes")
    words, lanes = len(chunks.words), len(chunks.starts)
    if not lanes or not words:
        raise ValueError(f"chunks has {lanes} lanes and {words} words; both are at least 1")
    steps = chunk_steps(count, lanes)
    group = _segment_lanes(max(steps, 1))
    if len(chunks.bases) != -(-lanes // group):
        raise ValueError(
            f"chunks has {len(chunks.bases)} bases; {lanes} lanes of {steps} steps have {-(-lanes // group)}"
        )
    return steps, group, decode_table(unpack_lengths(np.asarray(chunks.lengths)), max_length)


def _decode_in_lockstep(
    chunks: Chunks, count: int, max_length: int, steps: int, group: int, table: np.ndarray
) -> np.ndarray:
    """In NumPy: blocks of lanes at a time, and where words are short, four symbols a look-up."""
    words, starts = np.asarray(chunks.words), np.asarray(chunks.starts)
    lanes = len(starts)
    at_once, units, used = _joint_table(table, max_length)

    # Every 32-bit place gives 64 bits, so that a window is one look-up and one shift.
    following = np.append(words[1:], np.uint32(0))
    windows = words.astype(np.uint64) << np.uint64(32) | following
    out = np.empty((steps, lanes), np.uint32)
    first = np.repeat(np.asarray(chunks.bases, np.int64) * 32, group)[:lanes] + starts
    for begin in range(0, lanes, _BLOCK):
        position = first[begin : begin + _BLOCK].copy()
        for t in range(steps):
            found = np.zeros(len(position), np.uint32)
            for i in range(0, UNIT, at_once):
                window = _look(windows, position)
                index = (window >> np.uint64(64 - _WINDOW)).astype(np.int64)
                entry, bits = units.take(index), used.take(index)
                if at_once > 1 and (slow := np.flatnonzero(bits == 255)).size:
                    entry[slow], bits[slow] = _one_by_one(windows, position[slow], table, max_length, at_once)
                position += bits
                found |= entry << np.uint32(8 * i)
            out[t, begin : begin + _BLOCK] = found
    return out.astype("<u4", copy=False).view(np.uint8).reshape(-1)[:count]


def _look(windows: np.ndarray, position: np.ndarray) -> np.ndarray:
    window = windows.take(position >> 5, mode="clip")
    window <<= (position & 31).astype(np.uint64)
    return window


def _joint_table(table: np.ndarray, max_length: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Symbols a look-up (4, 2 or 1), and for each value of 16 bits these symbols and the bits they use.

    255 bits: the words do not fit. As many symbols as fit nearly always, when bits are fair coins.
    """
    index = np.arange(2**_WINDOW, dtype=np.uint64)
    for at_once in (4, 2, 1):
        units, used = np.zeros(len(index), np.uint32), np.zeros(len(index), np.int64)
        for i in range(at_once):
            window = index << np.minimum(used, 63).astype(np.uint64) & np.uint64(2**_WINDOW - 1)
            entry = table[(window >> np.uint64(_WINDOW - max_length)).astype(np.int64)].astype(np.int64)
            units |= (entry & 255).astype(np.uint32) << np.uint32(8 * i)
            used += entry >> 8
        fits = used <= _WINDOW
        if at_once == 1 or fits.mean() > 0.9:
            return at_once, units, np.where(fits, used, 255).astype(np.uint8)
    raise AssertionError("a word of at most 14 bits fits in 16")


def _one_by_one(
    windows: np.ndarray, position: np.ndarray, table: np.ndarray, max_length: int, symbols: int
) -> tuple[np.ndarray, np.ndarray]:
    unit, begin, position = np.zeros(len(position), np.uint32), position, position.copy()
    for i in range(symbols):
        window = _look(windows, position)
        entry = table[(window >> np.uint64(64 - max_length)).astype(np.int64)]
        unit |= (entry & 255).astype(np.uint32) << np.uint32(8 * i)
        position += entry >> 8
    return unit, (position - begin).astype(np.uint8)


# --- several sequences ----------------------------------------------------------------------------


def stack_chunks(parts: list[Chunks]) -> Chunks:
    """Codings of equally many symbols along a leading axis, for a scan over them: the shorter ones end in zeros."""
    words = max(len(part.words) for part in parts)
    lengths = [unpack_lengths(np.asarray(part.lengths)) for part in parts]
    present = np.flatnonzero((np.stack(lengths) != ABSENT).any(axis=0))
    first, size = int(present[0]), (int(present[-1]) - int(present[0])) // 2 + 1

    def packed(row: np.ndarray) -> np.ndarray:
        nibbles = np.pad(row, (0, 1), constant_values=ABSENT)[first : first + 2 * size] & 15
        return np.concatenate([[first], nibbles[0::2] << 4 | nibbles[1::2]]).astype(np.uint8)

    return Chunks(
        np.stack([np.pad(np.asarray(part.words), (0, words - len(part.words))) for part in parts]),
        np.stack([np.asarray(part.bases) for part in parts]),
        np.stack([np.asarray(part.starts) for part in parts]),
        np.stack([packed(row) for row in lengths]),
    )
