"""One interface for lossless codecs of weights: split, coder, pytree.

    compressed = encode(array, DFLOAT11)           a pytree: arrays under names, and a static geometry
    decode(compressed)                             the same bits again; inside `jax.jit`, too
    decode_host(compressed)                        the same on one core of the host; damaged parts are errors

An array is cut into symbols and a rest (`hashml.weights.float_split`). The rest is stored as it is, the symbols by
one of four coders: ``huffman`` (chunks of equally many symbols, decoded in lockstep), ``gaps`` (the reference layout
of DFloat11 and ECF8), ``fixed_rate`` (codes of few bits with escapes), ``raw`` (nothing is coded). Where a coder
saves nothing, or does not hold the symbols, `encode` takes ``raw`` by itself, so that no array grows. Symbols of 4
bits are coded in pairs by ``huffman`` where that takes less: whole bits then cost half as much.

What a compressed array stores is its leaves, and `hashml.accounting.stored_bytes` counts them; tables of decoders are
made anew from the lengths of the code. The bound of every coder is `entropy_limit`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from hashml.accounting import stored_bytes
from hashml.coding.fixed_rate import FixedRate, decode_fixed_rate, decode_fixed_rate_host, encode_fixed_rate
from hashml.coding.huffman import entropy
from hashml.coding.huffman_chunks import (
    Chunks,
    decode_chunks,
    decode_chunks_host,
    decode_joined,
    decode_joined_host,
    encode_chunks,
    stack_chunks,
)
from hashml.weights.float_split import (
    FORMATS,
    AnyArray,
    float_format,
    from_bits,
    join,
    rest_size,
    split,
    spread,
    to_bits,
)
from hashml.weights.gap_layout import Gaps, decode_gaps, decode_gaps_host, encode_gaps

CODER_NAMES = ("huffman", "gaps", "fixed_rate", "raw")


@dataclasses.dataclass(frozen=True)
class Codec:
    """What a paper fixes of a codec.

    Attributes:
        name: of the codec.
        dtypes: that it is for, by name.
        coder: ``huffman``, ``gaps``, ``fixed_rate`` or ``raw``.
        max_length: bits of the longest word of ``huffman``.
        chunk: symbols of a chunk of ``huffman``, roughly.
        code_limit: bits of the longest word of ``gaps``: 32 or 16.
        rate: bits of a code of ``fixed_rate``.

    Raises:
        ValueError: for another coder or dtype.
    """

    name: str
    dtypes: tuple[str, ...]
    coder: str = "huffman"
    max_length: int = 12
    chunk: int = 512
    code_limit: int = 32
    rate: int = 3

    def __post_init__(self) -> None:
        if self.coder not in CODER_NAMES:
            raise ValueError(f"coder is {self.coder!r}; allowed are {', '.join(CODER_NAMES)}")
        for name in self.dtypes:
            float_format(name)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is static of a compressed array: hashable, and a few words in a file.

    Attributes:
        dtype: of the array, by name.
        shape: of the array.
        coder: one of `CODERS`: those of a codec, and ``huffman_pairs``.
        limit: ``max_length``, ``code_limit`` or ``rate`` of the codec; 0 for ``raw``.
    """

    dtype: str
    shape: tuple[int, ...]
    coder: str
    limit: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedArray:
    """Arrays under names, which are leaves of a tree, and their geometry, which is not.

    Attributes:
        parts: those of the coder in their order, then ``rest``; of `raw`, ``bits`` alone.
        geometry: what they are parts of.
    """

    parts: dict[str, Any]
    geometry: Geometry = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.geometry.shape

    @property
    def dtype(self) -> np.dtype:
        return FORMATS[self.geometry.dtype].dtype


class Coder(NamedTuple):
    """How symbols become arrays and back; ``limit`` is the geometry's."""

    parts: Any
    """The `NamedTuple` of the arrays."""
    dtypes: tuple[DTypeLike, ...]
    """Of the arrays, wide ones first."""
    encode: Callable[[np.ndarray, Codec], tuple[Any, int]]
    """``(symbols, codec) -> (parts, limit)``; a `ValueError` means that it does not hold these symbols."""
    decode: Callable[[Any, int, int], Array]
    """``(parts, count, limit) -> symbols``, traceable."""
    decode_host: Callable[[Any, int, int], np.ndarray]


class _Raw(NamedTuple):
    bits: Any


def _refuse(*_: Any) -> Any:
    raise ValueError("raw arrays have no symbols")


def _encode_pairs(symbols: np.ndarray, codec: Codec) -> tuple[Chunks, int]:
    symbols = np.pad(symbols, (0, len(symbols) % 2), mode="edge")
    pairs = symbols[0::2] << 4 | symbols[1::2]
    return encode_chunks(pairs, chunk=codec.chunk, max_length=codec.max_length), codec.max_length


def _pairs(decode: Callable[[Any, int, int], Any]) -> Callable[[Any, int, int], Any]:
    def symbols(chunks: Chunks, count: int, limit: int) -> Any:
        pairs = decode(chunks, -(-count // 2), limit)
        return spread(pairs, 4)[:count]

    return symbols


_in_numpy = functools.partial(decode_chunks_host, native=False)
"""What native code decodes is joined in the same pass, see `_joined_host`."""

CODERS = {
    "huffman_pairs": Coder(
        Chunks,
        (np.uint32, np.uint32, np.uint16, np.uint8),
        _encode_pairs,
        _pairs(decode_chunks),
        _pairs(_in_numpy),
    ),
    "huffman": Coder(
        Chunks,
        (np.uint32, np.uint32, np.uint16, np.uint8),
        lambda symbols, codec: (
            encode_chunks(symbols, chunk=codec.chunk, max_length=codec.max_length),
            codec.max_length,
        ),
        decode_chunks,
        _in_numpy,
    ),
    "gaps": Coder(
        Gaps,
        (np.uint8,) * 4,
        lambda symbols, codec: (encode_gaps(symbols, codec.code_limit), codec.code_limit),
        decode_gaps,
        decode_gaps_host,
    ),
    "fixed_rate": Coder(
        FixedRate,
        (np.uint8,) * 3,
        lambda symbols, codec: (encode_fixed_rate(symbols, codec.rate), codec.rate),
        decode_fixed_rate,
        decode_fixed_rate_host,
    ),
    "raw": Coder(_Raw, (), _refuse, _refuse, _refuse),
}


def part_dtypes(geometry: Geometry) -> dict[str, np.dtype]:
    """The parts of such an array with their dtypes, wide ones first."""
    if geometry.coder == "raw":
        return {"bits": FORMATS[geometry.dtype].word}
    coder = CODERS[geometry.coder]
    names = (*coder.parts._fields, "rest")
    return dict(zip(names, [np.dtype(dtype) for dtype in (*coder.dtypes, np.uint8)], strict=True))


# --- one array ------------------------------------------------------------------------------------


def encode(array: Shaped[AnyArray, "..."], codec: Codec) -> CompressedArray:
    """The array's bits in fewer bytes, or raw where there are none to save; on the host, in NumPy.

    Raises:
        ValueError: for a dtype that the codec is not for; the message names those that it is for.
    """
    if jnp.dtype(array.dtype).name not in codec.dtypes:
        raise ValueError(f"array is of dtype {array.dtype}; codec {codec.name!r} is for {', '.join(codec.dtypes)}")
    host = np.asarray(array)
    found = [_raw(host), *(_coded(host, codec, coder) for coder in _candidates(codec, host))]
    return min((one for one in found if one is not None), key=stored_bytes)


def _raw(array: np.ndarray) -> CompressedArray:
    geometry = Geometry(jnp.dtype(array.dtype).name, array.shape, "raw")
    return CompressedArray({"bits": to_bits(array)}, geometry)


def _candidates(codec: Codec, array: np.ndarray) -> tuple[str, ...]:
    if codec.coder == "raw" or not array.size:
        return ()
    pairs = codec.coder == "huffman" and float_format(array.dtype).symbol_bits == 4
    return ("huffman_pairs", "huffman") if pairs else (codec.coder,)


def _coded(array: np.ndarray, codec: Codec, coder: str) -> CompressedArray | None:
    """``None`` for what the coder does not hold."""
    form = float_format(array.dtype)
    symbols, rest = (np.asarray(part) for part in split(to_bits(array), form))
    try:
        parts, limit = CODERS[coder].encode(symbols, codec)
    except ValueError:
        if coder != "gaps":
            raise
        return None  # symbols from 240 on, which stand for infinities and the like, or too many rows
    geometry = Geometry(form.name, array.shape, coder, limit)
    return CompressedArray(parts._asdict() | {"rest": rest}, geometry)


def decode(compressed: CompressedArray) -> Shaped[Array, "..."]:
    """The array, bit for bit, inside `jax.jit` or out of it; a constant for gradients."""
    return _decode(compressed, host=False)


def decode_host(compressed: CompressedArray, *, native: bool = True) -> Shaped[np.ndarray, "..."]:
    """The array, bit for bit, as NumPy has it, on one core.

    Args:
        compressed: of any coder.
        native: whether native code may decode the default coder, where there is a compiler; else NumPy does.

    Raises:
        ValueError: for parts that contradict each other or the geometry.
    """
    return _decode(compressed, host=True, native=native)


def _decode(compressed: CompressedArray, *, host: bool, native: bool = False) -> Any:
    geometry, parts = compressed.geometry, compressed.parts
    form, coder = FORMATS[geometry.dtype], CODERS[geometry.coder]
    wanted = part_dtypes(geometry)
    if {name: np.dtype(part.dtype) for name, part in parts.items()} != wanted:
        raise ValueError(f"compressed has parts {sorted(parts)}; coder {geometry.coder!r} has {wanted}")
    if geometry.coder == "raw":
        if parts["bits"].size != geometry.count:
            raise ValueError(
                f"compressed has {parts['bits'].size} numbers; shape {geometry.shape} has {geometry.count}"
            )
        return from_bits(np.asarray(parts["bits"]) if host else jnp.asarray(parts["bits"]), form, geometry.shape)
    coded = coder.parts(*(parts[name] for name in coder.parts._fields))
    if host:
        return from_bits(_joined_host(geometry, coded, np.asarray(parts["rest"]), native), form, geometry.shape)
    rest = jnp.asarray(parts["rest"])
    if isinstance(coded, Chunks):  # kernels join while they decode, and write no symbols
        kind = (form.bits, form.low, geometry.coder == "huffman_pairs")
        return from_bits(decode_joined(coded, rest, geometry.count, geometry.limit, kind), form, geometry.shape)
    symbols = coder.decode(coded, geometry.count, geometry.limit)
    return from_bits(join(symbols, rest, form), form, geometry.shape)


_PIECE = 2**16
"""Numbers that NumPy joins at a time: its temporary arrays stay in the cache of a core."""


def _joined_host(geometry: Geometry, coded: Any, rest: np.ndarray, native: bool) -> np.ndarray:
    form, count = FORMATS[geometry.dtype], geometry.count
    if native and isinstance(coded, Chunks) and len(rest) == rest_size(count, form):
        kind = (form.bits, form.low, geometry.coder == "huffman_pairs")
        numbers = decode_joined_host(coded, rest, count, geometry.limit, kind)
        if numbers is not None:
            return numbers
    symbols = CODERS[geometry.coder].decode_host(coded, count, geometry.limit)
    if len(rest) != rest_size(count, form):
        return np.asarray(join(symbols, rest, form))  # which says what is wrong
    numbers = np.empty(count, form.word)
    for begin in range(0, count, _PIECE):
        end = min(begin + _PIECE, count)
        part = rest[begin * form.rest_bits // 8 : rest_size(end, form)]
        numbers[begin:end] = join(symbols[begin:end], part, form)
    return numbers


_STACKED = ("raw", "huffman", "huffman_pairs")


def stack(arrays: list[CompressedArray]) -> CompressedArray:
    """Arrays of one shape along a leading axis of every part, as `jax.lax.scan` takes them; the geometry is of one.

    Raises:
        ValueError: for no arrays, and for other coders than raw and Huffman chunks, or unequal geometries.
    """
    geometries = {array.geometry for array in arrays}
    if len(geometries) != 1 or next(iter(geometries)).coder not in _STACKED:
        raise ValueError(f"arrays have the geometries {geometries}; allowed is one, of {', '.join(_STACKED)}")
    (geometry,) = geometries
    if geometry.coder == "raw":
        return CompressedArray({"bits": np.stack([array.parts["bits"] for array in arrays])}, geometry)
    rest = np.stack([array.parts["rest"] for array in arrays])
    chunks = stack_chunks([Chunks(*(array.parts[name] for name in Chunks._fields)) for array in arrays])
    return CompressedArray(chunks._asdict() | {"rest": rest}, geometry)


def encode_stack(array: Shaped[AnyArray, "layers ..."], codec: Codec) -> CompressedArray:
    """Each ``array[i]`` with a code of its own, stacked; raw, all of them, where that takes no more bytes.

    Raises:
        ValueError: as `encode` and `stack` do.
    """
    host = np.asarray(array)
    encode(host[:0], codec)  # refuses the dtype
    if codec.coder not in _STACKED:
        raise ValueError(f"codec has the coder {codec.coder!r}; stacks have huffman or raw")
    found = [[_raw(one) for one in host]]
    for coder in _candidates(codec, host):
        rows = [_coded(one, codec, coder) for one in host]
        found.append([row for row in rows if row is not None])  # these coders hold everything
    return min((stack(rows) for rows in found), key=stored_bytes)


# --- bounds ---------------------------------------------------------------------------------------


def entropy_limit(array: Shaped[AnyArray, "..."]) -> float:
    """Bits a number that no code of single symbols goes below: the rest's bits and the symbols' entropy.

    Raises:
        ValueError: for a dtype that is none of `hashml.weights.float_split.FORMATS`.
    """
    form = float_format(array.dtype)
    counts = np.bincount(split(to_bits(np.asarray(array)), form)[0], minlength=256)
    return form.rest_bits + entropy(counts)


def bits_per_weight(compressed: CompressedArray) -> float:
    """Stored bits a number, all side arrays counted; 0 for an empty array."""
    return 8 * stored_bytes(compressed) / max(compressed.geometry.count, 1)
