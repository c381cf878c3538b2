"""The stream of the reference implementations of DFloat11 and ECF8: chunks of 64 bits with gaps, for interchange.

Codes follow each other from the highest bit without alignment; what the last byte has left is the beginning of the
code of an end symbol. A chunk is 8 bytes, a block 512 chunks, and beside the stream stand

    gaps                a number a chunk: from its first bit to the first code that starts in it, 5 (4) bits each,
                        from the highest bit, padded with zeros to whole blocks
    output_positions    a number a block, and the count of all: the first element whose code starts in the block;
                        uint32 (uint64), little-endian, stored as bytes
    luts                rows of 256 bytes: row 0 is asked with the next byte; an answer v >= 240 means row 256 - v and
                        the byte after it, any other is the symbol; the last row holds the lengths of the codes

Numbers are DFloat11's (ECF8's). A decoder has two passes: every chunk counts the codes that start in it, sums of the
counts say where its symbols go, and it decodes again. The layout holds symbols below 240 and codes of at most 32 (16)
bits that need no more than 16 rows; `encode_gaps` refuses the rest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from hashml.coding.huffman import ABSENT, canonical_codes, crude_code_lengths

AnyArray = Array | np.ndarray
_CHUNK_BITS, _BLOCK_CHUNKS = 64, 512
_POINTERS = 240


class Gaps(NamedTuple):
    """A coded sequence, all fields uint8; its number of symbols and the limit of code lengths are known besides."""

    stream: UInt8[AnyArray, " bytes"]
    gaps: UInt8[AnyArray, " gap_bytes"]
    output_positions: UInt8[AnyArray, " position_bytes"]
    luts: UInt8[AnyArray, "rows 256"]


def _widths(max_length: int) -> tuple[int, str]:
    """Bits of a gap and the type of a position."""
    kinds = {32: (5, "<u4"), 16: (4, "<u8")}
    if max_length not in kinds:
        raise ValueError(f"max_length is {max_length}; allowed are 32 (DFloat11) and 16 (ECF8)")
    return kinds[max_length]


def encode_gaps(symbols: UInt8[np.ndarray, " count"], max_length: int) -> Gaps:
    """The stream and what stands beside it, in NumPy.

    Args:
        symbols: at least one, below 240.
        max_length: 32, as DFloat11 has it, or 16, as ECF8.

    Raises:
        ValueError: for symbols that the layout does not hold, and for another ``max_length``.
    """
    gap_bits, position_type = _widths(max_length)
    if not symbols.size or symbols.max() >= _POINTERS:
        found = symbols.max() if symbols.size else "no symbol"
        raise ValueError(f"symbols has {found}; the gap layout holds at least one, and all below {_POINTERS}")
    counts = np.append(np.bincount(symbols, minlength=256), 1)  # the end symbol
    lengths = crude_code_lengths(counts, max_length)
    codes = canonical_codes(lengths)
    luts = _luts(lengths, codes)

    bits = lengths[symbols]
    ends = np.concatenate([[0], np.cumsum(bits)])
    size = -(-int(ends[-1]) // 8)
    stream = _bytes(codes[symbols], bits, ends[:-1], size)
    if left := int(ends[-1]) % 8:
        end = np.uint64(int(codes[256]) << 8 >> int(lengths[256]))
        stream[-1] |= np.uint8(int(end) >> left & 255)

    chunks = -(-size // 8)
    blocks = -(-chunks // _BLOCK_CHUNKS)
    begins = np.arange(chunks, dtype=np.int64) * _CHUNK_BITS
    first = np.searchsorted(ends, begins)
    gaps = np.zeros(blocks * _BLOCK_CHUNKS, np.uint8)
    gaps[:chunks] = ends[first] - begins
    spread = np.unpackbits(gaps[:, None], axis=1)[:, 8 - gap_bits :]
    positions = np.append(first[::_BLOCK_CHUNKS], len(symbols)).astype(position_type)
    return Gaps(stream, np.packbits(spread.reshape(-1)), positions.view(np.uint8), luts)


def _luts(lengths: np.ndarray, codes: np.ndarray) -> np.ndarray:
    tables: dict[tuple[int, ...], dict[int, int]] = {(): {}}
    order = sorted(np.flatnonzero(lengths[:256] != ABSENT), key=lambda s: (lengths[s], s))
    for symbol in order:
        length, code = int(lengths[symbol]), int(codes[symbol])
        spelled = (code << -length % 8).to_bytes(-(-length // 8), "big")
        for depth in range(1, len(spelled)):
            prefix = tuple(spelled[:depth])
            if prefix not in tables:
                tables[prefix] = {}
                if len(tables) > 17:
                    raise ValueError(f"symbols need more than {16} rows of prefixes, which the gap layout lacks")
                tables[prefix[:-1]][prefix[-1]] = 257 - len(tables)
        tables[tuple(spelled[:-1])][spelled[-1]] = int(symbol)
    luts = np.zeros((len(tables) + 1, 256), np.uint8)
    for row, table in enumerate(tables.values()):
        value = 0
        for byte in range(256):
            value = table.get(byte, value)
            luts[row, byte] = value
    luts[-1] = np.maximum(lengths[:256], 0)
    return luts


def _bytes(codes: np.ndarray, bits: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    """Codes of up to 32 bits at their places; a code touches two words, and no two codes share a bit."""
    words = -(-size // 4) + 1
    left = codes << (64 - bits).astype(np.uint64) >> (places & 31).astype(np.uint64)
    stream = np.bincount(places >> 5, (left >> np.uint64(32)).astype(np.float64), words)
    stream += np.bincount((places >> 5) + 1, (left & np.uint64(0xFFFFFFFF)).astype(np.float64), words + 1)[:words]
    return stream.astype(">u4").view(np.uint8)[:size].copy()


# --- decode ---------------------------------------------------------------------------------------


def decode_gaps(coded: Gaps, count: int, max_length: int) -> UInt8[Array, " {count}"]:
    """The symbols, inside `jax.jit` or out of it. A damaged stream gives wrong symbols, nothing worse."""
    words, luts, position = _prepared(Gaps(*map(jnp.asarray, coded)), max_length, jnp)

    def walk(visit: Callable[[Any, Array, Array], Any], start: Any) -> Any:
        def step(state: tuple[Array, Any]) -> tuple[Array, Any]:
            position, found = state
            symbol, length = _next(words, luts, position)
            active = position < _CHUNK_BITS
            # A damaged table may say 0 bits; the walk goes on all the same.
            return position + jnp.where(active, jnp.maximum(length, 1), 0), visit(found, symbol, active)

        return jax.lax.while_loop(lambda state: jnp.any(state[0] < _CHUNK_BITS), step, (position, start))[1]

    counts = walk(lambda found, _, active: found + active, jnp.zeros(position.shape, jnp.int32))
    firsts = jnp.cumsum(counts) - counts

    def write(found: tuple[Array, Array], symbol: Array, active: Array) -> tuple[Array, Array]:
        out, place = found
        return out.at[jnp.where(active, place, count)].set(symbol, mode="drop"), place + active

    return walk(write, (jnp.zeros(count, jnp.uint8), firsts))[0]


def decode_gaps_host(coded: Gaps, count: int, max_length: int) -> UInt8[np.ndarray, " {count}"]:
    """The symbols, in NumPy, and whether ``output_positions`` agree with the stream.

    Raises:
        ValueError: for fields that contradict each other.
    """
    coded = Gaps(*map(np.asarray, coded))
    blocks = -(-len(coded.stream) // (8 * _BLOCK_CHUNKS))
    gap_bits, position_type = _widths(max_length)
    sizes = (len(coded.gaps), len(coded.output_positions))
    wanted = (blocks * _BLOCK_CHUNKS * gap_bits // 8, (blocks + 1) * np.dtype(position_type).itemsize)
    if sizes != wanted or not blocks or coded.luts.shape[0] < 2:
        raise ValueError(
            f"coded has {sizes[0]} bytes of gaps and {sizes[1]} of positions; {len(coded.stream)} bytes take {wanted}"
        )
    words, luts, position = _prepared(coded, max_length, np)
    begin, rounds = position.copy(), []
    while (active := position < _CHUNK_BITS).any():
        symbol, length = _next(words, luts, position)
        if (length[active] == 0).any():
            raise ValueError("coded has a symbol of no bits")
        rounds.append(np.where(active, symbol, 0).astype(np.uint8))
        position = position + np.where(active, length, 0)
    counts = np.zeros(len(begin), np.int64)
    position = begin
    for symbol in rounds:
        counts += position < _CHUNK_BITS
        position = position + np.where(position < _CHUNK_BITS, luts[-1][symbol], 0)
    firsts = np.cumsum(counts) - counts
    said = coded.output_positions.view(position_type)
    if said[-1] != count or (said[:-1] != np.minimum(firsts[::_BLOCK_CHUNKS], count)).any():
        raise ValueError(f"coded has output_positions that disagree with the stream of {count} symbols")
    out = np.zeros(count, np.uint8)
    for i, symbol in enumerate(rounds):
        place = firsts + i
        inside = (counts > i) & (place < count)
        out[place[inside]] = symbol[inside]
    return out


def _prepared(coded: Gaps, max_length: int, xp: Any) -> tuple[Any, Any, Any]:
    """Two words a chunk (and two more), the tables, and where each chunk's first code starts."""
    chunks = -(-coded.stream.shape[0] // 8)
    stream = xp.pad(coded.stream, (0, 8 * chunks + 8 - coded.stream.shape[0])).reshape(-1, 4).astype(xp.uint32)
    words = stream[:, 0] << 24 | stream[:, 1] << 16 | stream[:, 2] << 8 | stream[:, 3]
    gap_bits = _widths(max_length)[0]
    spread = (coded.gaps[:, None] >> np.arange(7, -1, -1, dtype=np.uint8) & 1).reshape(-1, gap_bits)
    gaps = (spread.astype(xp.int32) << np.arange(gap_bits - 1, -1, -1, dtype=np.int32)).sum(axis=1)
    return words, coded.luts, gaps[:chunks].astype(xp.int32)


def _next(words: Any, luts: Any, position: Any) -> tuple[Any, Any]:
    """Symbol and length at each chunk's position, 0 to 95; both look at most 32 bits ahead."""
    place = np.arange(position.shape[0], dtype=np.int32) * 2 + (position >> 5)
    shift = (position & 31).astype(words.dtype)
    last = words.shape[0] - 1
    window = words[place.clip(0, last)] << shift | words[(place + 1).clip(0, last)] >> 1 >> (31 - shift)
    pointers = luts.shape[0] - 1
    value = luts[0][(window >> 24).astype(np.int32)]
    for depth in (16, 8, 0):
        row = (256 - value.astype(np.int32)).clip(0, pointers)
        deeper = luts[row, (window >> depth & 255).astype(np.int32)]
        value = (jnp if isinstance(value, jax.Array) else np).where(value >= _POINTERS, deeper, value)
    return value, luts[-1][value.astype(np.int32)].astype(np.int32)
