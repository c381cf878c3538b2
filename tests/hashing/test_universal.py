"""Families: published vectors, uniformity and pairwise independence in standard errors, wide keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hashml import hashing
from hashml_kernels import bits

SEEDS = 4000


@pytest.mark.parametrize(
    ("data", "seed", "expected"),
    [  # the vectors that circulate with MurmurHash3_x86_32
        (b"", 0, 0),
        (b"", 1, 0x514E28B7),
        (b"", 0xFFFFFFFF, 0x81F16F39),
        (b"\xff\xff\xff\xff", 0, 0x76293B50),
        (b"\x21\x43\x65\x87", 0, 0xF55B516B),
        (b"\x21\x43\x65\x87", 0x5082EDEE, 0x2362F9DE),
        (b"\x21\x43\x65", 0, 0x7E4A8634),
        (b"\x21\x43", 0, 0xA0F7B07A),
        (b"\x21", 0, 0x72661CF4),
        (b"\x00\x00\x00\x00", 0, 0x2362F9DE),
        (b"Hello, world!", 0x9747B28C, 0x24884CBA),
        (b"The quick brown fox jumps over the lazy dog", 0x9747B28C, 0x2FA826CD),
    ],
)
def test_murmur3_gives_its_published_vectors(data, seed, expected):
    assert hashing.murmur3_32_bytes(data, seed) == expected


def test_murmur3_of_words_is_murmur3_of_their_bytes():
    words = np.array([1, 2**31, 2**32 - 1], np.uint32)
    found = hashing.murmur3_32(words, words, seed=3)
    assert [int(h) for h in found] == [hashing.murmur3_32_bytes(w.tobytes() * 2, 3) for w in words]


def test_lowbias32_equals_a_loop_over_python_integers():
    def loop(x: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x ^ (x >> 16)

    words = np.array([0, 1, 2, 0xDEADBEEF, 2**32 - 1], np.uint32)
    assert [int(h) for h in hashing.lowbias32(words)] == [loop(int(w)) for w in words]
    assert [int(h) for h in hashing.mix32(words, 99)] == [loop(int(w) ^ 99) for w in words]


FAMILIES = {
    "m31": (lambda x, seed: hashing.m31(x, seed=seed), 2**31 - 1),
    "hash_slots": (lambda x, seed: hashing.hash_slots(x, size=1 << 24, seed=seed), 1 << 24),
    "multiply_shift": (lambda x, seed: hashing.multiply_shift(x, seed=seed), 2**32),
    "tabulation": (lambda x, seed: hashing.tabulation(x, seed=seed), 2**32),
}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_pairs_of_keys_are_independent_over_seeds(name):
    """Two neighbouring keys fall in the 8 x 8 cells of the output's square equally often."""
    family, size = FAMILIES[name]
    keys = np.array([1000, 1001], np.uint32)
    cells = np.stack([family(keys, seed).astype(np.uint64) * 8 // size for seed in range(SEEDS)]).astype(int)
    counts = np.bincount(cells[:, 0] * 8 + cells[:, 1], minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("name", list(FAMILIES))
def test_loads_are_uniform(name):
    family, size = FAMILIES[name]
    keys = np.random.default_rng(0).integers(0, 2**31, 100_000).astype(np.uint32)
    counts = np.bincount((family(keys, 3).astype(np.uint64) * 256 // size).astype(int), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_collisions_of_slots_are_one_in_size():
    size, keys = 50, np.arange(40, dtype=np.int32)
    pairs = np.triu_indices(40, 1)
    rates = []
    for seed in range(1000):
        slots = hashing.hash_slots(keys, size=size, seed=seed)
        rates.append((slots[pairs[0]] == slots[pairs[1]]).mean())
    error = np.std(rates, ddof=1) / np.sqrt(len(rates))
    assert abs(np.mean(rates) - 1 / size) < 4 * error


def test_reduction_has_no_modulo_bias():
    """Exact probabilities of the slots, from how many pairs of hashes each is the floor of."""
    for size in (3, 1000, 128_000, 25_000_000, 2**31 - 1):
        pairs = bits.P31**2  # equally likely, and slot j takes those from ceil(j P^2 / size)
        edges = [-(-j * pairs // size) for j in (0, 1, 2, size // 2, size // 2 + 1, size - 1, size)]
        for start, stop in ((edges[0], edges[1]), (edges[3], edges[4]), (edges[5], edges[6])):
            assert abs((stop - start) * size / pairs - 1) < 2**-20


def test_signs_are_balanced_and_four_of_an_arithmetic_progression_are_independent():
    """Linear hashes fail this: the signs of i, j, k and i + j - k hang together."""
    keys = np.array([10, 11, 12, 13], np.uint32)
    signs = np.stack([hashing.hash_signs(keys, seed=seed) for seed in range(SEEDS)])
    error = SEEDS**-0.5
    assert np.abs(signs.mean(axis=0)).max() < 4 * error
    assert abs(signs.prod(axis=1).mean()) < 4 * error


def test_signs_and_slots_of_one_seed_are_independent():
    keys = np.arange(20_000, dtype=np.uint32)
    slots = hashing.hash_slots(keys, size=2, seed=5)
    signs = hashing.hash_signs(keys, seed=5)
    assert abs((signs * (2 * slots.astype(int) - 1)).mean()) < 4 * 20_000**-0.5


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
def test_wide_keys_are_hashed_exactly(key, seed):
    """m31 and multiply-shift of a 64-bit key, against Python's integers."""
    wide = hashing.split64(key)
    p = bits.P31
    function = bits.multilinear(seed, 0x3131, 3)
    words = (key % 2**31, (key >> 31) % 2**31, key >> 62)
    expected = (sum(a * w for a, w in zip(function.multipliers, words, strict=True)) + function.offset) % p
    assert int(hashing.m31(wide, seed=seed)) == expected
    a0, a1, b = bits.seed_words(seed, 0x6464, 3)
    top = (a0 * (key % 2**32) + a1 * (key >> 32) + b) % 2**64 >> 32
    assert int(hashing.multiply_shift(wide, seed=seed)) == top


def test_a_key_hashes_alike_in_every_integer_type():
    keys = [0, 1, 77, 2**31 - 1]
    expected = hashing.m31(np.array(keys, np.int32), 9, seed=4)
    for other in (np.array(keys, np.uint32), np.array(keys, np.int64), hashing.split64(np.array(keys))):
        np.testing.assert_array_equal(hashing.m31(other, 9, seed=4), expected)
    jitted = jax.jit(lambda x: hashing.m31(x, 9, seed=4))(jnp.array(keys, jnp.uint32))
    np.testing.assert_array_equal(jitted, expected)


def test_ids_beyond_32_bits_are_told_apart_without_x64():
    assert jnp.arange(1).dtype == jnp.int32  # x64 is off
    ids = hashing.split64(np.array([5, 5 + 2**31, 5 + 2**32, 5 + 2**40, 188_000_000 * 128 - 1]))
    slots = jax.jit(lambda ids: hashing.hash_slots(ids, size=2**31 - 1, seed=0))(ids)
    assert len(set(np.asarray(slots).tolist())) == 5


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="key has dtype float32; it must be an integer type"):
        hashing.m31(np.zeros(2, np.float32), seed=0)
    with pytest.raises(ValueError, match="size is 0; it must lie in 1..2147483647"):
        hashing.hash_slots(np.arange(2), size=0, seed=0)
    with pytest.raises(ValueError, match=r"bits is 33; it must lie in 1..32"):
        hashing.multiply_shift(np.arange(2), seed=0, bits_out=33)
    with pytest.raises(TypeError, match="tabulation takes 32-bit words"):
        hashing.tabulation(hashing.split64(2**40), seed=0)


def test_reference64_equals_python_integers():
    r = [
        hashing.REFERENCE_PRIME,
        *np.random.RandomState(1024).randint(0, hashing.REFERENCE_PRIME, 50).tolist(),
    ]
    a, b = np.array([0, 1, 188_000_000, 2**31 - 1]), np.array([0, 3, 15, 2**31 - 1])
    expected = [(x * r[3] + y * r[2] + r[1]) % r[0] for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert hashing.reference64(a, b).tolist() == expected


def test_reference64_slots_follow_the_reference_kernel():
    slots = hashing.reference64_slots(np.array([3, 9]), features=10, block_size=4, budget=100)
    for row, x in zip(slots, (3, 9), strict=True):
        for t, slot in enumerate(row):
            assert slot == int(hashing.reference64(np.array([x]), t // 4)[0]) % 97 + t % 4
    with pytest.raises(ValueError, match="budget is 3; it must be at least block_size = 4"):
        hashing.reference64_slots(np.array([3]), features=10, block_size=4, budget=3)
    with pytest.raises(ValueError, match="a spans -1..2"):
        hashing.reference64(np.array([-1, 2]), 0)
