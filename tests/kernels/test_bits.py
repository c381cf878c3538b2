"""The hash arithmetic equals Python's own integers, in NumPy, in XLA, and inside an interpreted kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl

from hashml_kernels import bits

P = bits.P31
WORDS = st.integers(0, 2**32 - 1)
LONGS = st.integers(0, 2**64 - 1)
CORNERS = (0, 1, 2, 2**15 - 1, 2**16 - 1, 2**16, P - 1, P, 2**31, 2**32 - 1)


def value(limbs: bits.Limbs) -> int:
    return (int(limbs.hi) << 32) | int(limbs.lo)


def limbs(x: int) -> bits.Limbs:
    return bits.Limbs(np.uint32(x >> 32), np.uint32(x & 0xFFFFFFFF))


@given(WORDS, WORDS)
def test_multiply32_is_the_full_product(a, b):
    assert value(bits.multiply32(a, b)) == a * b


@given(LONGS, LONGS)
def test_64_bit_sum_and_product_wrap(a, b):
    assert value(bits.add64(limbs(a), limbs(b))) == (a + b) % 2**64
    assert value(bits.multiply64(limbs(a), limbs(b))) == a * b % 2**64


@given(st.integers(0, 2**32 - 1), st.integers(1, 2**20), st.integers(0, 2**20))
def test_flat_index_does_not_overflow(row, columns, column):
    assert value(bits.flat_index(np.uint32(row), columns, np.uint32(column))) == row * columns + column


def expected_m31(function: bits.Multilinear, *keys: int) -> int:
    return (sum(a * x for a, x in zip(function.multipliers, keys, strict=False)) + function.offset) % P


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_m31_is_exact(seed, a, b):
    function = bits.multilinear(seed, 0, 2)
    assert int(bits.m31(function, a, b)) == expected_m31(function, a, b)


def test_m31_is_exact_at_a_million_random_pairs_and_the_corners():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**31, (2, 1_000_000), dtype=np.uint32)
    corners = np.array([(x, y) for x in CORNERS for y in CORNERS if max(x, y) < 2**31], np.uint32)
    a, b = np.concatenate([a, corners[:, 0]]), np.concatenate([b, corners[:, 1]])
    for function in (
        bits.multilinear(1, 0, 2),
        bits.Multilinear((P - 1, P - 1), P - 1),
        bits.Multilinear((1, 1), 0),
    ):
        (first, second), offset = function.multipliers, function.offset
        # Each product is below 2**62, so uint64 holds the sum.
        exact = (a.astype(np.uint64) * np.uint64(first) + b.astype(np.uint64) * np.uint64(second)) % np.uint64(P)
        np.testing.assert_array_equal(bits.m31(function, a, b), (exact + np.uint64(offset)) % np.uint64(P))


def test_m31_leaves_out_keys_that_are_zero():
    function = bits.multilinear(5, 0, 3)
    keys = np.arange(10, dtype=np.uint32)
    np.testing.assert_array_equal(bits.m31(function, keys, None, keys), bits.m31(function, keys, 0 * keys, keys))
    np.testing.assert_array_equal(bits.m31(function, keys), bits.m31(function, keys, 0 * keys, 0 * keys))


def test_m31_refuses_more_keys_than_multipliers():
    with pytest.raises(ValueError, match="keys: got 3"):
        bits.m31(bits.multilinear(0, 0, 2), 1, 2, 3)


@given(st.integers(0, P - 1), st.integers(0, P - 1), st.integers(1, 2**31 - 1))
def test_reduction_is_the_exact_floor(first, second, size):
    assert int(bits.reduce_m31(first, second, size)) == (first * P + second) * size // P**2


@pytest.mark.parametrize("size", [1, 2, 3, P - 1, P])
@pytest.mark.parametrize("first", [0, P - 1])
@pytest.mark.parametrize("second", [0, P - 1])
def test_reduction_at_the_corners(first, second, size):
    slot = int(bits.reduce_m31(first, second, size))
    assert slot == (first * P + second) * size // P**2
    assert slot < size


@given(LONGS, st.integers(1, 2**32 - 1))
def test_multiply_high_is_the_exact_floor(x, size):
    assert int(bits.multiply_high(limbs(x), size)) == x * size // 2**64


@given(LONGS)
def test_split64_keeps_the_value(x):
    assert value(bits.split64(x)) == x
    assert value(jax.tree.map(lambda word: word[0], bits.split64(np.array([x], np.uint64)))) == x


def test_split64_refuses_negative_ids():
    with pytest.raises(ValueError, match="x holds -3"):
        bits.split64(np.array([5, -3]))


@given(WORDS)
def test_lowbias32_is_undone_by_its_published_inverse(x):
    y = int(bits.lowbias32(x))
    y ^= y >> 16
    y = y * 0x43021123 % 2**32
    y ^= y >> 15 ^ y >> 30
    y = y * 0x1D69E2A5 % 2**32
    y ^= y >> 16
    assert y == x


@given(st.integers(0, 2**32 - 1), WORDS)
def test_scrambling_is_a_bijection_that_limbs_agree_with(x, salt):
    word = np.asarray(bits.scramble(np.uint32(x), salt))
    assert value(bits.scramble(bits.Limbs(np.uint32(0), np.uint32(x)), salt)) == int(word)
    many = np.arange(x & 0xFFFF, (x & 0xFFFF) + 1000, dtype=np.uint32)
    wide = bits.scramble(bits.Limbs(many, np.full_like(many, x)), salt)
    assert len(np.unique(bits.scramble(many, salt))) == 1000
    assert len({(int(hi), int(lo)) for hi, lo in zip(wide.hi, wide.lo, strict=True)}) == 1000


def test_splitmix64_gives_its_published_outputs():
    # The first outputs for seed 1234567, as printed with the reference implementations.
    assert bits._splitmix64(1234567) == 6457827717110365317
    assert bits._splitmix64((1234567 + 0x9E3779B97F4A7C15) % 2**64) == 3203168211198807973


def test_streams_and_seeds_share_no_words():
    words = [w for seed in range(50) for stream in range(4) for w in bits.seed_words(seed, stream, 5)]
    assert len(set(words)) == len(words)


# --- one definition, everywhere ---


def _functions():
    tables = bits.tabulation_tables(3)
    function = bits.multilinear(7, 0, 2)
    return {
        "m31": lambda x: bits.m31(function, x & np.uint32(P), x >> np.uint32(31)),
        "reduce_m31": lambda x: bits.reduce_m31(x >> np.uint32(2), x >> np.uint32(1), 12345),
        "multiply_shift32": lambda x: bits.multiply_shift32(x, 9, 20),
        "multiply_shift64": lambda x: bits.multiply_shift64(bits.Limbs(x, x ^ np.uint32(77)), 9, 32),
        "lowbias32": bits.lowbias32,
        "mix64": lambda x: bits.mix64(bits.Limbs(x, x), 2),
        "sign_bit": lambda x: bits.sign_bit(bits.flat_index(x, 128, x & np.uint32(127)), 4),
        "murmur3_32": lambda x: bits.murmur3_32((x, x), 5),
        "tabulation": lambda x: bits.tabulation(x, jnp.asarray(tables) if isinstance(x, jax.Array) else tables),
    }


WORDS_TO_HASH = np.concatenate([np.array(CORNERS, np.uint32), np.arange(118, dtype=np.uint32) * 40503221])


@pytest.mark.parametrize("name", list(_functions()))
def test_same_bits_in_numpy_and_xla_jitted_or_not(name):
    function = _functions()[name]
    expected = function(WORDS_TO_HASH)
    assert expected.dtype == np.uint32
    words = jnp.asarray(WORDS_TO_HASH)
    for found in (function(words), jax.jit(function)(words)):
        assert found.dtype == jnp.uint32
        np.testing.assert_array_equal(found, expected)


# Tabulation reads a table; a kernel takes it as an operand, so it has no in-kernel form of its own.
@pytest.mark.parametrize("name", [name for name in _functions() if name != "tabulation"])
def test_same_bits_inside_an_interpreted_kernel(name):
    function = _functions()[name]

    def body(words_ref, out_ref):
        out_ref[...] = function(words_ref[...])

    shape = jax.ShapeDtypeStruct(WORDS_TO_HASH.shape, jnp.uint32)
    found = pl.pallas_call(body, out_shape=shape, interpret=True)(WORDS_TO_HASH)
    np.testing.assert_array_equal(found, function(WORDS_TO_HASH))
