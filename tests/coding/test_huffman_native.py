"""Native decoding of chunks: equal to NumPy's for every kind of number and shape of chunks; damage; no compiler."""

import ctypes
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.coding import huffman_native
from hashml.coding.huffman_chunks import Chunks, decode_chunks_host, decode_joined_host, encode_chunks
from hashml.weights.dfloat11 import DFLOAT11
from hashml.weights.ecf8 import ECF8
from hashml.weights.float_split import FORMATS, from_bits
from hashml.weights.lossless import decode_host, encode
from hashml_kernels import native

needs_library = pytest.mark.skipif(not huffman_native.available(), reason="there is no C++ compiler")
CODEC_OF = {dtype: codec for codec in (DFLOAT11, ECF8) for dtype in codec.dtypes}


def crowded(rng, count, alphabet):
    """Bytes of which few are frequent, so that words of all lengths occur."""
    return np.minimum(np.floor(-np.log2(1 - rng.random(count))) * rng.integers(1, 9), alphabet - 1).astype(np.uint8)


@needs_library
@settings(deadline=None, max_examples=150)
@given(st.integers(1, 9000), st.integers(1, 4096), st.integers(8, 14), st.integers(1, 256), st.integers(0, 2**32 - 1))
def test_symbols_come_back_and_numpy_agrees(count, chunk, max_length, alphabet, seed):
    """Uniform bytes have no short pairs, crowded ones nearly only such."""
    rng = np.random.default_rng(seed)
    for symbols in (crowded(rng, count, alphabet), rng.integers(0, alphabet, count).astype(np.uint8)):
        chunks = encode_chunks(symbols, chunk=chunk, max_length=max_length)
        np.testing.assert_array_equal(decode_chunks_host(chunks, count, max_length), symbols)
        np.testing.assert_array_equal(decode_chunks_host(chunks, count, max_length, native=False), symbols)


@needs_library
@settings(deadline=None, max_examples=80)
@given(st.sampled_from([*FORMATS]), st.integers(1, 9000), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_numbers_come_back_and_numpy_agrees(dtype, count, scale, seed):
    """Counts that are no multiple of what a byte of rests holds, and codes of pairs, are among them."""
    rng, form = np.random.default_rng(seed), FORMATS[dtype]
    array = (rng.standard_normal(count) * scale).clip(-440, 440).astype(form.dtype)
    array[: count // 3] = 1.0
    compressed = encode(array, CODEC_OF[dtype])
    for found in (decode_host(compressed), decode_host(compressed, native=False)):
        assert found.tobytes() == array.tobytes()


@needs_library
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_bit_pattern_and_pieces_of_numpys_join(dtype):
    """More numbers than NumPy joins at a time, and an odd one at the end."""
    form = FORMATS[dtype]
    bits = np.arange(2**form.bits, dtype=np.uint64).astype(form.word)
    array = np.concatenate([from_bits(bits, form, bits.shape), np.ones(3 * 2**16 + 5, form.dtype)])
    compressed = encode(array, CODEC_OF[dtype])
    assert compressed.geometry.coder.startswith("huffman")
    for use_native in (True, False):
        assert decode_host(compressed, native=use_native).tobytes() == array.tobytes()


@needs_library
def test_damage_gives_numbers_all_the_same():
    """Starts and bases far beyond the stream, and one word of it: nothing is read there."""
    symbols = crowded(np.random.default_rng(0), 30_000, 40)
    chunks = encode_chunks(symbols)
    bases, starts = (np.full_like(part, np.iinfo(part.dtype).max) for part in chunks[1:3])
    highest = Chunks(chunks.words[:1], bases, starts, chunks.lengths)
    assert len(decode_chunks_host(highest, len(symbols), 12)) == len(symbols)
    cut = chunks._replace(words=chunks.words[:-3].copy())
    found = decode_chunks_host(cut, len(symbols), 12)
    # A segment's words stand in its order: all but the last segment's lanes are whole.
    lanes = len(chunks.starts)
    whole = np.arange(lanes) < len(chunks.starts) // 8 * 8 - 8
    rows = np.arange(len(symbols)) // 4 % lanes
    np.testing.assert_array_equal(found[whole[rows]], symbols[whole[rows]])


def test_refusals():
    chunks = encode_chunks(crowded(np.random.default_rng(0), 5000, 40))
    for use_native in (True, False):
        with pytest.raises(ValueError, match="max_length is 15; allowed are 8 to 14"):
            decode_chunks_host(chunks, 5000, 15, native=use_native)
        with pytest.raises(ValueError, match="chunks has 0 lanes and"):
            decode_chunks_host(chunks._replace(starts=chunks.starts[:0]), 5000, 12, native=use_native)
    assert decode_joined_host(chunks, np.zeros(5000, np.uint8), 5000, 12, (32, 23, False)) is None


def test_without_a_compiler_numpy_serves_and_says_so_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(huffman_native, "compilers", list)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    huffman_native._loaded.cache_clear()
    array = np.random.default_rng(0).standard_normal(5000).astype(FORMATS["bfloat16"].dtype)
    compressed = encode(array, DFLOAT11)
    try:
        with caplog.at_level(logging.WARNING):
            assert decode_host(compressed).tobytes() == decode_host(compressed).tobytes() == array.tobytes()
        assert [record.message for record in caplog.records] == [
            "Huffman codes are decoded on the host by NumPy, which is slower than native code: no C++ compiler was "
            "found (c++, g++, clang++, or one named by $CXX)"
        ]
        nothing = np.zeros(1, np.uint32)
        with pytest.raises(native.NativeUnavailable, match="there is no native library: no C"):
            huffman_native.decode_lanes(nothing, nothing, nothing, nothing, group=1, steps=1, max_length=8, count=1)
    finally:
        huffman_native._loaded.cache_clear()


@needs_library
def test_the_source_compiles_without_warnings(tmp_path):
    commands = [[*command, "-Wall", "-Wextra", "-Werror"] for command in native.compilers()]
    built = native.build(huffman_native.SOURCE, tmp_path, commands)
    assert ctypes.CDLL(str(built)).hashml_huffman_decode
