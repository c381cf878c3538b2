"""Chunks in lockstep: a slow reader's symbols, on the host and under jit; sizes; damage; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.coding.huffman import canonical_codes, code_lengths, entropy, unpack_lengths
from hashml.coding.huffman_chunks import (
    Chunks,
    chunk_steps,
    decode_chunks,
    decode_chunks_host,
    encode_chunks,
    stack_chunks,
)

jitted = jax.jit(decode_chunks, static_argnums=(1, 2))


def exponents(count, seed=0, scale=1.0):
    values = np.random.default_rng(seed).standard_normal(count) * scale
    return np.clip(np.floor(np.log2(np.abs(values))) + 120, 0, 255).astype(np.uint8)


def skewed(count):
    """Counts of powers of two, so that a limit of 8 bits binds, beside every other byte."""
    return np.concatenate([np.arange(256), np.floor(-np.log2(1 - np.random.default_rng(1).random(count)))])[
        :count
    ].astype(np.uint8)


def slow(chunks, count, max_length):
    """As the module's docstring says: bit by bit, lane by lane, with words by length and number."""
    bits = "".join(f"{word:032b}" for word in chunks.words.tolist())
    lengths = unpack_lengths(chunks.lengths)
    words = {
        f"{code:0{n}b}" if n else "": s
        for s, (n, code) in enumerate(zip(lengths, canonical_codes(lengths), strict=True))
        if n >= 0
    }
    lanes = len(chunks.starts)
    steps = -(-count // (4 * lanes))
    group = max(1, 4096 // (4 * steps))
    out = np.zeros((steps, lanes, 4), np.uint8)
    for lane in range(lanes):
        place = 32 * int(chunks.bases[lane // group]) + int(chunks.starts[lane])
        for step in range(steps):
            for i in range(4):
                word = ""
                while word not in words:
                    word, place = word + bits[place], place + 1
                out[step, lane, i] = words[word]
    return out.reshape(-1)[:count]


@pytest.mark.parametrize("count", [1, 3, 4, 511, 1025, 5001])
@pytest.mark.parametrize("source", [exponents, skewed], ids=["exponents", "skewed"])
def test_a_slow_reader_finds_the_symbols(count, source):
    symbols = source(count)
    chunks = encode_chunks(symbols, max_length=9, chunk=128)
    np.testing.assert_array_equal(slow(chunks, count, 9), symbols)
    np.testing.assert_array_equal(decode_chunks_host(chunks, count, 9), symbols)


@pytest.mark.parametrize("max_length", [8, 12, 14])
def test_jit_and_host_agree(max_length):
    symbols = np.concatenate([skewed(20_001), exponents(20_000)])
    chunks = encode_chunks(symbols, max_length=max_length)
    assert unpack_lengths(np.asarray(chunks.lengths)).max() == max_length
    np.testing.assert_array_equal(decode_chunks_host(chunks, len(symbols), max_length), symbols)
    np.testing.assert_array_equal(jitted(chunks, len(symbols), max_length), symbols)


@pytest.mark.parametrize("count", [1, 4097])
def test_one_symbol_takes_no_stream(count):
    symbols = np.full(count, 127, np.uint8)
    chunks = encode_chunks(symbols)
    assert chunks.words.tolist() == [0]
    np.testing.assert_array_equal(decode_chunks_host(chunks, count, 12), symbols)
    np.testing.assert_array_equal(jitted(chunks, count, 12), symbols)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 4096), st.integers(8, 14), st.integers(1, 256), st.integers(0, 2**32 - 1))
def test_any_symbols_in_any_chunks(count, chunk, max_length, alphabet, seed):
    symbols = np.random.default_rng(seed).integers(0, alphabet, count).astype(np.uint8)
    chunks = encode_chunks(symbols, chunk=chunk, max_length=max_length)
    np.testing.assert_array_equal(decode_chunks_host(chunks, count, max_length), symbols)


@pytest.mark.parametrize("symbols", [skewed(100_000), np.arange(256).repeat(300).astype(np.uint8)], ids=["1", "8"])
def test_words_of_any_length_in_the_fast_tables_of_the_host(symbols):
    """About 2 bits a symbol are read four at a time, 8 bits two at a time."""
    np.testing.assert_array_equal(decode_chunks_host(encode_chunks(symbols), len(symbols), 12), symbols)


def test_bytes_are_the_codes_and_the_entrances():
    count = 2**18
    symbols = exponents(count)
    chunks = encode_chunks(symbols, chunk=512)
    counts = np.bincount(symbols, minlength=256)
    bits = int((counts * np.maximum(code_lengths(counts, 12), 0)).sum())
    segments = count // 4096
    assert chunks.starts.nbytes == 2 * count // 512
    assert chunks.bases.nbytes == 4 * segments
    assert bits <= 32 * len(chunks.words) < bits + 32 * segments
    stored = 8 * sum(part.nbytes for part in chunks) / count
    assert entropy(counts) < stored < entropy(counts) + 0.06 + 0.05  # Huffman's own loss, then the entrances


def test_starts_fit_in_their_type_for_the_longest_words():
    """Segments full of words of 14 bits: the last lane begins below 2^16."""
    units = np.floor(-np.log2(1 - np.random.default_rng(0).random((128, 512, 4)))).astype(np.uint8)
    units[:, :8] = np.random.default_rng(1).permutation(np.arange(256).repeat(16)).reshape(128, 8, 4)
    symbols = units.reshape(-1)
    chunks = encode_chunks(symbols, max_length=14)
    assert chunks.starts.max() > 2**15
    np.testing.assert_array_equal(decode_chunks_host(chunks, len(symbols), 14), symbols)


def test_stacked_codings_are_decoded_in_a_scan():
    """Other codes, other lengths of streams; one of them has a single symbol."""
    rows = [exponents(3000, 1), exponents(3000, 2, 1e-9), np.full(3000, 200, np.uint8)]
    stacked = stack_chunks([encode_chunks(row) for row in rows])
    found = jax.lax.map(lambda chunks: decode_chunks(chunks, 3000, 12), Chunks(*map(jnp.asarray, stacked)))
    np.testing.assert_array_equal(found, rows)


def test_damage_under_jit_gives_symbols_all_the_same():
    symbols = exponents(5000)
    chunks = encode_chunks(symbols)
    broken = Chunks(*(np.full_like(part, np.iinfo(part.dtype).max) for part in chunks))
    assert jitted(broken, 5000, 12).shape == (5000,)


def test_refusals():
    symbols = exponents(5000)
    with pytest.raises(ValueError, match="symbols is empty"):
        encode_chunks(symbols[:0])
    with pytest.raises(ValueError, match="chunk is 5000; allowed are 1 to 4096"):
        encode_chunks(symbols, chunk=5000)
    with pytest.raises(ValueError, match="max_length is 15; allowed are 8 to 14"):
        encode_chunks(symbols, max_length=15)
    chunks = encode_chunks(symbols)
    with pytest.raises(ValueError, match="chunks has 0 lanes and"):
        decode_chunks_host(chunks._replace(starts=chunks.starts[:0]), 5000, 12)
    with pytest.raises(ValueError, match="chunks has 1 bases; 10 lanes of 125 steps have 2"):
        decode_chunks_host(chunks._replace(bases=chunks.bases[:1]), 5000, 12)
    with pytest.raises(ValueError, match="of 4096 windows"):
        decode_chunks_host(chunks._replace(lengths=chunks.lengths[:-2]), 5000, 12)
    assert chunk_steps(5000, 10) == 125
