"""Numbers by counting are SplitMix64's, of the stated laws, and bijections are bijections."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments.data.counter import GOLDEN, mix64, normal, numbers, permutation, scatter, stream, uniform

P_VALUE = 1e-4  # below this a law is rejected; the seeds are fixed


def test_the_numbers_are_those_of_splitmix64():
    """The published first outputs of the generator with seed 1234567."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert numbers(1234567, np.arange(5)).tolist() == expected


def test_any_slice_is_a_slice_of_the_whole():
    whole = numbers(stream(3, "x"), np.arange(1000))
    np.testing.assert_array_equal(whole[417:523], numbers(stream(3, "x"), np.arange(417, 523)))


def test_mixing_is_a_bijection_on_a_sample():
    assert np.unique(mix64(np.arange(100_000, dtype=np.uint64))).size == 100_000


def test_streams_differ_by_seed_name_and_type():
    keys = [stream(0), stream(1), stream(0, "a"), stream(0, "a", 1), stream(0, "a", "1"), stream(0, "a1")]
    assert len(set(keys)) == len(keys)
    assert stream(5, "rank", 2) == stream(np.int64(5).item(), "rank", 2)


def test_uniform_numbers_are_uniform():
    u = uniform(stream(0, "u"), np.arange(100_000))
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > P_VALUE


def unmix(y: int) -> int:
    """The inverse of ``mix64``, in Python's integers."""
    y ^= y >> 31 ^ y >> 62
    y = y * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    y ^= y >> 27 ^ y >> 54
    y = y * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return y ^ y >> 30 ^ y >> 60


@pytest.mark.parametrize("number", [0, 2**64 - 1])
def test_the_extreme_uniform_numbers_lie_inside(number):
    """The key whose first number has no bits, or all of them."""
    key = (unmix(number) - GOLDEN) % 2**64
    assert numbers(key, np.arange(1)).tolist() == [number]
    assert 0 < uniform(key, np.arange(1))[0] < 1
    assert np.isfinite(normal(key, np.arange(1))).all()


def test_normal_numbers_are_normal_and_streams_independent():
    x, y = (normal(stream(0, name), np.arange(100_000)) for name in ("x", "y"))
    assert stats.kstest(x, "norm").pvalue > P_VALUE
    # A correlation of independent numbers has a standard error of 1 / sqrt(n).
    assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(x.size)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 4 / np.sqrt(x.size)


def test_permutations_are_permutations_and_differ():
    first, second = (permutation(stream(seed), 1000) for seed in (0, 1))
    np.testing.assert_array_equal(np.sort(first), np.arange(1000))
    assert not np.array_equal(first, second)


@given(st.integers(1, 3000), st.integers(0, 10))
@settings(deadline=None, max_examples=50)
def test_scatter_is_a_bijection_of_any_range(size, seed):
    scattered = scatter(stream(seed), np.arange(size), size)
    np.testing.assert_array_equal(np.sort(scattered), np.arange(size))


@pytest.mark.parametrize("size", [2**31 - 1, 10**8, 2**20 + 1])
def test_scatter_serves_large_ranges(size):
    x = np.concatenate([np.arange(1000), np.arange(size - 1000, size)])
    scattered = scatter(stream(0), x, size)
    assert scattered.min() >= 0
    assert scattered.max() < size
    assert np.unique(scattered).size == x.size


def test_scatter_spreads_the_head_evenly():
    """Where the 4,096 first numbers land, in 64 equal ranges: as without replacement, by chi-square."""
    counts = np.bincount(scatter(stream(0), np.arange(4096), 10**6) * 64 // 10**6, minlength=64)
    assert stats.chisquare(counts).pvalue > P_VALUE
