"""k-means: scikit-learn's Lloyd from equal seeds, the objective never rises, the law of the seeds, empty clusters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.cluster import KMeans as Sklearn

from hashml.coding.kmeans import kmeans, nearest, seed_centroids
from hashml.coding.product_codebooks import product_decode, product_encode, product_of

KEY = jax.random.key(0)


def cloud(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)).astype(np.float32), rng.gamma(0.5, size=n).astype(np.float32)


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_scikit_learn_from_equal_seeds(d, weighted):
    points, weights = cloud(300, d)
    initial = points[:8]
    options: Any = {"init": initial, "n_init": 1}  # which the package's annotations call texts
    reference = Sklearn(8, max_iter=300, tol=0, algorithm="lloyd", **options)
    reference.fit(points, sample_weight=weights if weighted else None)
    found = kmeans(KEY, points, 8, weights if weighted else None, initial=initial, iterations=300, tolerance=0)
    np.testing.assert_allclose(found.centroids, reference.cluster_centers_, atol=1e-5)
    assert abs(found.objectives[-1] / reference.inertia_ - 1) < 1e-5


@pytest.mark.parametrize("d", [1, 4])
def test_weighted_objective_never_rises(d):
    """Beyond the rounding of a sum of 300 float32; and it is the objective of the centroids that come with it."""
    points, weights = cloud(300, d)
    found = kmeans(KEY, points, 16, weights, iterations=40, tolerance=0)
    fall = -np.diff(found.objectives)
    assert (fall >= -1e-6 * found.objectives[0]).all()
    assert fall[0] > 0.01 * found.objectives[0]
    distance = ((points[:, None] - np.asarray(found.centroids)) ** 2).sum(-1).min(1)
    assert abs((weights * distance).sum() / found.objectives[-1] - 1) < 1e-5


@pytest.mark.parametrize("constant", [1.0, 0.3, 7e-9])
def test_a_constant_weight_changes_no_bit(constant):
    points, _ = cloud(300, 2)
    plain = kmeans(KEY, points, 8)
    weighted = kmeans(KEY, points, 8, np.full(300, constant, np.float32))
    np.testing.assert_array_equal(plain.centroids, weighted.centroids)
    np.testing.assert_allclose(constant * plain.objectives, weighted.objectives, rtol=1e-6)


def test_an_integer_weight_is_a_repeated_point():
    points, _ = cloud(300, 2)
    times = np.random.default_rng(1).integers(0, 4, 300)
    weighted = kmeans(KEY, points, 8, times.astype(np.float32), initial=points[:8])
    repeated = kmeans(KEY, np.repeat(points, times, axis=0), 8, initial=points[:8])
    np.testing.assert_allclose(weighted.centroids, repeated.centroids, atol=1e-5)


def test_few_distinct_points_are_found_exactly():
    """Twelve places, sixteen clusters, far from the origin: no distance is left at all."""
    rng = np.random.default_rng(2)
    places = (1000 + rng.normal(size=(12, 3))).astype(np.float32)
    points = places[rng.integers(0, 12, 200)]
    found = kmeans(KEY, points, 16, rng.gamma(0.3, size=200).astype(np.float32))
    assert found.objectives[-1] == 0
    assert {tuple(p) for p in np.unique(points, axis=0)} <= {tuple(c) for c in np.asarray(found.centroids)}
    more_clusters_than_points = kmeans(KEY, places[:3], 8)
    assert more_clusters_than_points.objectives[-1] == 0


def test_seeds_follow_their_law():
    """First seed by weight, second by weight times squared distance: the 20 pairs of 5 points, in 4,000 draws."""
    points = np.array([[0.0], [1.0], [3.0], [4.0], [8.0]], np.float32)
    weights = np.array([1.0, 4.0, 2.0, 0.5, 0.25], np.float32)
    draws = 4000
    seeds = jax.vmap(lambda key: seed_centroids(key, jnp.asarray(points), 2, jnp.asarray(weights)))(
        jax.random.split(KEY, draws)
    )
    places = np.searchsorted(points[:, 0], np.asarray(seeds)[:, :, 0])
    mass = weights * (points - points.T) ** 2
    law = (weights / weights.sum())[:, None] * mass / mass.sum(axis=1, keepdims=True)
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(places.T), 1)
    assert (np.diag(counts) == 0).all()
    off = ~np.eye(5, dtype=bool)
    assert stats.chisquare(counts[off], draws * law[off]).pvalue > 1e-3


def test_empty_clusters_move_to_the_largest_weighted_distances():
    points = np.array([[0.0], [1.0], [10.0], [-6.0]], np.float32)
    weights = np.array([1.0, 1.0, 1.0, 10.0], np.float32)
    initial = np.array([[500.0], [0.0], [600.0]], np.float32)
    found = kmeans(KEY, points, 3, weights, initial=initial, iterations=1)
    # All points belong to 0, at weighted distances 0, 1, 100 and 360; their mean is (0 + 1 + 10 - 60) / 13.
    np.testing.assert_allclose(found.centroids[:, 0], [-6, -49 / 13, 10], rtol=1e-6)


def test_stops_when_nothing_changes_and_keeps_the_history():
    points = np.array([[0.0], [1.0], [10.0], [11.0]], np.float32)
    found = kmeans(KEY, points, 2, initial=points[:2], iterations=50)
    np.testing.assert_array_equal(np.sort(found.centroids[:, 0]), [0.5, 10.5])
    # By hand: seeds 0 and 1; then centroids 0 and 22/3, so that 1 goes over; then 0.5 and 10.5, which stay.
    np.testing.assert_allclose(found.objectives[:4], [181, 1 + (8 / 3) ** 2 + (11 / 3) ** 2, 1, 1], rtol=1e-6)
    assert found.iterations == 3
    assert found.objectives.shape == (51,)
    assert (found.objectives[2:] == 1).all()


def test_is_deterministic_and_works_under_vmap():
    points = np.stack([cloud(300, 2, seed)[0] for seed in range(3)])
    keys = jax.random.split(KEY, 3)
    together = jax.vmap(lambda key, points: kmeans(key, points, 8))(keys, points)
    for i in range(3):
        alone = kmeans(keys[i], points[i], 8)
        np.testing.assert_array_equal(alone.centroids, kmeans(keys[i], points[i], 8).centroids)
        np.testing.assert_allclose(together.centroids[i], alone.centroids, atol=1e-6)
        assert together.iterations[i] == alone.iterations


@pytest.mark.parametrize(("n", "clusters"), [(1, 5), (40, 1), (70, 300), (20_000, 7)])
def test_nearest_is_the_first_of_the_nearest(n, clusters):
    """One block, many blocks with a rest, one centroid a block; on a grid, so that ties abound."""
    rng = np.random.default_rng(3)
    points, centroids = (rng.integers(-3, 4, (count, 2)).astype(np.float32) for count in (n, clusters))
    codes, distances = nearest(jnp.asarray(points), jnp.asarray(centroids))
    full = ((points[:, None] - centroids) ** 2).sum(-1)
    np.testing.assert_array_equal(codes, full.argmin(axis=1))
    np.testing.assert_array_equal(distances, full.min(axis=1))


def test_product_codes_are_nearest_in_every_group():
    rng = np.random.default_rng(4)
    x, book = rng.normal(size=(30, 12)).astype(np.float32), rng.normal(size=(3, 16, 4)).astype(np.float32)
    codes = product_encode(jnp.asarray(x), jnp.asarray(book))
    for group in range(3):
        part = x[:, 4 * group : 4 * group + 4]
        np.testing.assert_array_equal(codes[:, group], ((part[:, None] - book[group]) ** 2).sum(-1).argmin(1))
    decoded = product_decode(codes, jnp.asarray(book))
    np.testing.assert_array_equal(decoded[:, 4:8], book[1][np.asarray(codes[:, 1])])
    pairs = np.asarray(product_of(jnp.asarray(book[0]), jnp.asarray(book[1])))
    assert pairs.shape == (256, 8)
    np.testing.assert_array_equal(pairs[3 * 16 + 5], [*book[0, 3], *book[1, 5]])
    with pytest.raises(ValueError, match="x has width 11; the codebook is of 3 groups of 4 coordinates"):
        product_encode(jnp.asarray(x[:, :11]), jnp.asarray(book))


def test_degenerate_weights_and_bad_input():
    points, _ = cloud(300, 2)
    zero = kmeans(KEY, points, 8, np.zeros(300, np.float32))
    np.testing.assert_array_equal(zero.centroids, kmeans(KEY, points, 8).centroids)
    with pytest.raises(ValueError, match="clusters is 0; it must be at least 1"):
        kmeans(KEY, points, 0)
    with pytest.raises(ValueError, match="points is empty"):
        kmeans(KEY, points[:0], 2)
    with pytest.raises(ValueError, match="iterations is -1; it is not negative"):
        kmeans(KEY, points, 2, iterations=-1)
    with pytest.raises(ValueError, match="centroids is empty"):
        nearest(jnp.asarray(points), jnp.zeros((0, 2)))
