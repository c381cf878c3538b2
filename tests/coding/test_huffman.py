"""Codes: cheapest among all of their length, complete, canonical; tables that read them; refusals."""

import functools
import heapq
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.coding.huffman import (
    ABSENT,
    canonical_codes,
    code_lengths,
    crude_code_lengths,
    decode_table,
    entropy,
    jitted_decode_table,
    pack_lengths,
    unpack_lengths,
)

count_lists = st.lists(st.integers(0, 10**9), min_size=2, max_size=256).filter(lambda c: sum(x > 0 for x in c) >= 2)


def huffman_cost(counts):
    """Bits of all symbols: the sum of all merged weights, by the algorithm of 1952."""
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


def cost(counts, lengths):
    return int((np.asarray(counts) * np.maximum(lengths, 0)).sum())


def kraft(lengths):
    return sum(2.0 ** -int(length) for length in lengths if length != ABSENT)


@settings(deadline=None, max_examples=60)
@given(count_lists)
def test_without_a_limit_it_is_huffmans_code(counts):
    lengths = code_lengths(np.array(counts), max_length=max(len(counts), 2))
    assert cost(counts, lengths) == huffman_cost(counts)


@settings(deadline=None, max_examples=60)
@given(count_lists, st.integers(8, 14))
def test_a_limited_code_is_complete_and_costs_no_more_than_the_crude_one(counts, limit):
    counts = np.array(counts)
    lengths, crude = code_lengths(counts, limit), crude_code_lengths(counts, limit)
    assert kraft(lengths) == 1
    assert lengths.max() <= limit
    assert crude.max() <= limit
    assert huffman_cost(counts) <= cost(counts, lengths) <= cost(counts, crude)
    np.testing.assert_array_equal(lengths == ABSENT, counts == 0)


@settings(deadline=None, max_examples=60)
@given(count_lists)
def test_mean_length_is_within_a_bit_of_the_entropy(counts):
    counts = np.array(counts)
    bits, total = entropy(counts), counts.sum()
    assert bits * total * (1 - 1e-12) <= cost(counts, code_lengths(counts, 255)) <= (bits + 1) * total


@pytest.mark.parametrize("limit", [3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_code_of_that_length_is_cheaper(limit, seed):
    """All lengths of six symbols that Kraft allows, tried one by one."""
    counts = np.random.default_rng(seed).geometric(0.01 + 0.1 * seed, 6) ** 3
    allowed = (lengths for lengths in itertools.product(range(1, limit + 1), repeat=6) if kraft(lengths) <= 1)
    assert cost(counts, code_lengths(counts, limit)) == min(cost(counts, lengths) for lengths in allowed)


def test_no_symbol_and_one_symbol():
    assert code_lengths(np.zeros(4, int), 12).tolist() == [ABSENT] * 4
    assert code_lengths(np.array([0, 7, 0]), 12).tolist() == [ABSENT, 0, ABSENT]
    assert entropy(np.array([0, 7, 0])) == 0
    assert entropy(np.zeros(3, int)) == 0
    assert entropy(np.array([5, 5, 0, 5, 5])) == 2
    assert crude_code_lengths(np.array([0, 7, 0]), 12).tolist() == [ABSENT, 0, ABSENT]


def test_words_are_consecutive_in_the_order_of_length_and_symbol():
    codes = canonical_codes(np.array([2, ABSENT, 1, 3, 3]))
    assert codes.tolist() == [0b10, 0, 0b0, 0b110, 0b111]


@functools.cache
def jitted(max_length):
    return jax.jit(functools.partial(jitted_decode_table, max_length=max_length))


@pytest.mark.parametrize("symbols", [2, 37, 256])
def test_tables_read_every_window(symbols):
    """By walking down the bits until they are some symbol's word; of 256 symbols, the first and the last."""
    counts = np.zeros(256, int)
    chosen = np.random.default_rng(symbols).permutation(256)[:symbols]
    counts[chosen] = np.random.default_rng(1).geometric(1e-3, symbols) ** 2
    counts[[0, 255]] = 1
    lengths = code_lengths(counts, 12)
    words = {(int(lengths[s]), int(c)): s for s, c in enumerate(canonical_codes(lengths)) if lengths[s] != ABSENT}
    expected = []
    for window in range(2**12):
        length = next(length for length in range(1, 13) if (length, window >> (12 - length)) in words)
        expected.append(length << 8 | words[length, window >> (12 - length)])
    np.testing.assert_array_equal(decode_table(lengths, 12), expected)
    np.testing.assert_array_equal(jitted(12)(jnp.asarray(pack_lengths(lengths))), expected)


@pytest.mark.parametrize("symbol", [0, 255])
def test_the_table_of_one_symbol_uses_no_bits(symbol):
    lengths = code_lengths(np.eye(256, dtype=int)[symbol], 12)
    packed = pack_lengths(lengths)
    assert len(packed) == 2
    np.testing.assert_array_equal(unpack_lengths(packed), lengths)
    assert set(decode_table(lengths, 12)) == {symbol}
    assert set(np.asarray(jitted(12)(jnp.asarray(packed)))) == {symbol}


@settings(deadline=None, max_examples=60)
@given(count_lists)
def test_packed_lengths_come_back(counts):
    lengths = code_lengths(np.pad(counts, (0, 256 - len(counts))), 14)
    packed = pack_lengths(lengths)
    present = np.flatnonzero(lengths != ABSENT)
    assert len(packed) == 1 + -(-(present[-1] - present[0] + 1) // 2)
    np.testing.assert_array_equal(unpack_lengths(packed), lengths)


def test_refusals():
    with pytest.raises(ValueError, match="counts has -1; a count is not negative"):
        code_lengths(np.array([3, -1]), 12)
    for limiter in (code_lengths, crude_code_lengths):
        with pytest.raises(ValueError, match="max_length is 2; 5 symbols need 3 bits"):
            limiter(np.ones(5, int), 2)
    with pytest.raises(ValueError, match=r"lengths are \[1, 1, 2\]; Kraft's sum"):
        canonical_codes(np.array([1, 1, 2]))
    with pytest.raises(ValueError, match="lengths use 3072 of 4096 windows"):
        decode_table(np.array([1, 2]), 12)
    with pytest.raises(ValueError, match="lengths has 13; allowed are words of at most 12"):
        decode_table(np.array([1, 13]), 12)
    with pytest.raises(ValueError, match="lengths has 15; allowed are words of at most 14"):
        pack_lengths(np.array([1, 15]))
    with pytest.raises(ValueError, match="packed begins with symbol 255 and has 2 lengths; symbols end at 255"):
        unpack_lengths(np.array([255, 0x11], np.uint8))
