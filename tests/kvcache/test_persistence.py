"""What is measured on attention rows, against loops over tokens."""

import itertools

import numpy as np
import pytest

from hashml.kvcache.persistence import adjacent_cosine, persistence_ratio, top_mass, vote_overlap

T = 24


def rows(seed: int, *batch: int, scale: float = 2.0) -> np.ndarray:
    x = np.exp(scale * np.random.default_rng(seed).normal(size=(*batch, T, T))) * np.tri(T)
    return (x / x.sum(axis=-1, keepdims=True)).astype(np.float32)


def pivotal(p: np.ndarray, t: int) -> set[int]:
    return {j for j in range(t + 1) if p[t, j] > 1 / (t + 1)}


@pytest.mark.parametrize("split", [None, 1, 7, 23])
def test_persistence_is_that_of_a_loop(split):
    probs = rows(1, 2, 3)
    ratio, share = persistence_ratio(probs, split)
    at = T // 2 if split is None else split
    for index in np.ndindex(2, 3):
        p = probs[index]
        before = set().union(*(pivotal(p, t) for t in range(at)))
        needed = {j for j in set().union(*(pivotal(p, t) for t in range(at, T))) if j < at}
        assert ratio[index] == pytest.approx(len(needed & before) / len(needed) if needed else 1.0)
        assert share[index] == pytest.approx(len(before) / at)


def test_persistence_at_its_ends():
    """Rows that repeat one set, rows that jump to what nobody wanted, and rows that look back at nothing."""
    same = np.zeros((T, T), np.float32)
    same[:, 0] = 1
    assert persistence_ratio(same)[0] == 1
    assert persistence_ratio(same)[1] == pytest.approx(2 / T)
    jump = same.copy()
    jump[T // 2 :, 0], jump[T // 2 :, 5] = 0, 1
    assert persistence_ratio(jump)[0] == 0
    own = np.eye(T, dtype=np.float32)
    assert persistence_ratio(own)[0] == 1


def test_a_random_set_persists_by_its_share():
    """Two random sets of tokens, one pivotal before the split and one after: in standard errors over 500 heads."""
    rng, heads = np.random.default_rng(2), 500
    # Under uniform attention no key is above the mean, so that two rows alone speak.
    probs = np.tile((np.tri(T) / np.arange(1, T + 1)[:, None]).astype(np.float32), (heads, 1, 1))
    for row, size in ((9, 4), (10, 6)):
        chosen = np.argsort(rng.random((heads, 10)), axis=1)[:, :size]
        probs[:, row] = 0
        np.put_along_axis(probs[:, row], chosen, np.float32(1 / size), axis=1)
    ratio, share = persistence_ratio(probs, split=10)
    np.testing.assert_allclose(share, 0.4)
    assert abs(np.mean(ratio) - 0.4) < 4 * np.std(ratio) / np.sqrt(heads)


@pytest.mark.parametrize("distance", [1, 3])
def test_cosines_of_neighbours(distance):
    x = np.random.default_rng(3).normal(size=(2, T, 5)).astype(np.float32)
    found = adjacent_cosine(x, distance)
    for b in range(2):
        pairs = [
            x[b, t] @ x[b, t - distance] / np.linalg.norm(x[b, t]) / np.linalg.norm(x[b, t - distance])
            for t in range(distance, T)
        ]
        assert found[b] == pytest.approx(np.mean(pairs), rel=1e-4, abs=1e-6)


def test_cosine_of_an_autoregression_is_its_coefficient():
    """Queries x[t] = rho x[t-1] + noise have the mean cosine rho in high dimension."""
    rng, width, rho = np.random.default_rng(4), 256, 0.9
    x = np.zeros((400, width))
    x[0] = rng.normal(size=width)
    for t in range(1, 400):
        x[t] = rho * x[t - 1] + np.sqrt(1 - rho**2) * rng.normal(size=width)
    x = x.astype(np.float32)
    # One pair's cosine has a standard deviation below 1 / sqrt(width) about rho; neighbours are correlated, which
    # at rho = 0.9 leaves at least a twentieth of the pairs independent.
    error = 1 / np.sqrt(width * 400 / 20)
    assert abs(adjacent_cosine(x) - rho) < 4 * error
    # Among shuffled tokens a pair is as far apart as any two.
    apart = np.arange(1, 400)
    chance = ((400 - apart) * rho**apart).sum() / (400 - apart).sum()
    assert abs(adjacent_cosine(rng.permutation(x)) - chance) < 4 * error


@pytest.mark.parametrize("queries", [1, 4, 100])
@pytest.mark.parametrize("recents", [0, 1, 3])
def test_overlap_is_that_of_a_loop(queries, recents):
    probs = rows(5, 2, 2)
    found = vote_overlap(probs, queries, recents)
    for index in np.ndindex(2, 2):
        p = probs[index]
        for t in range(T):
            mass = 0.0
            for j in range(t + 1):
                voted = any(j <= s and p[s, j] >= 1 / (s + 1) for s in range(max(t - queries, 0), t))
                mass += p[t, j] if voted or j > t - recents else 0.0
            assert found[(*index, t)] == pytest.approx(mass, rel=1e-4, abs=1e-6)


def test_overlap_grows_with_the_queries_that_vote():
    probs = rows(6, 3)
    found = [np.asarray(vote_overlap(probs, w)) for w in (1, 3, 10, 30)]
    for fewer, more in itertools.pairwise(found):
        assert (more >= fewer - 1e-6).all()
    assert (found[-1] <= 1 + 1e-5).all()


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.7, 1])
def test_mass_of_the_best_keys(fraction):
    probs = rows(7, 2)
    found = top_mass(probs, fraction)
    for b, t in np.ndindex(2, T):
        # In tenths, so that the number of keys is exact.
        kept = -(-round(fraction * 10) * (t + 1) // 10)
        assert found[b, t] == pytest.approx(np.sort(probs[b, t, : t + 1])[::-1][:kept].sum(), rel=1e-5)
    uniform = (np.tri(T) / np.arange(1, T + 1)[:, None]).astype(np.float32)
    np.testing.assert_allclose(top_mass(uniform, 0.5), [-(-(t + 1) // 2) / (t + 1) for t in range(T)], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: persistence_ratio(rows(0), 0), "split is 0; it must be between 1 and 23"),
        (lambda: persistence_ratio(rows(0), T), "split is 24; it must be between 1 and 23"),
        (lambda: adjacent_cosine(rows(0), T), "distance is 24; it must be between 1 and 23"),
        (lambda: vote_overlap(rows(0), 0), "queries is 0; it must be at least 1"),
        (lambda: vote_overlap(rows(0), 1, -1), "recents is -1; it must be at least 0"),
        (lambda: top_mass(rows(0), 0), "fraction is 0; it must be above 0 and at most 1"),
    ],
)
def test_bad_sizes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
