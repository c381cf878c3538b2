"""Grids against loops: min-max and its searches, k-means of a row against dynamic programming, and what is stored."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hashml.weights.calibration import calibrate, factorize
from hashml.weights.grids import GridSpec, column_importance, make_grid
from hashml.weights.lloyd_1d import cluster_rows, lloyd, sort_rows, start_centroids

RNG = np.random.default_rng(0)
ROWS, COLUMNS = 6, 48
WEIGHTS = RNG.standard_t(4, (ROWS, COLUMNS)).astype(np.float32)
WEIGHTS[3] = np.abs(WEIGHTS[3])  # one sign
WEIGHTS[4] = 0
IMPORTANCE = (RNG.uniform(0.4, 1.0, COLUMNS) ** -4).astype(np.float32)


def error(weights, quantized, importance: Any = 1.0):
    return (importance * (np.asarray(weights, np.float64) - quantized) ** 2).sum(axis=1)


# --- affine -----------------------------------------------------------------------------------------


def affine(low, high, bits, dtype, zero=None):
    """Scale and zero of one range, in float32 as stored."""
    if low == high:
        low, high = np.float32(-1), np.float32(1)
    scale = ((high - low) / np.float32(2**bits - 1)).astype(dtype).astype(np.float32)
    return scale, np.clip(np.round(-low / scale), 0, 2**bits - 1) if zero is None else np.float32(zero)


def rounded(row, scale, zero, bits):
    return scale * (np.clip(np.round(row / scale) + zero, 0, 2**bits - 1) - zero)


def ends(row):
    return np.minimum(row.min(), np.float32(0)), np.maximum(row.max(), np.float32(0))


@pytest.mark.parametrize(("kind", "bits", "groups", "dtype"), [
    ("min_max", 2, 1, "float32"),
    ("min_max", 8, 3, "float16"),
    ("symmetric", 3, 4, "float16"),
])  # fmt: skip
def test_ranges_by_a_loop(kind, bits, groups, dtype):
    grid: Any = make_grid(WEIGHTS, spec=GridSpec(bits, kind, groups, dtype=dtype))
    codes = grid.nearest(WEIGHTS)
    assert grid.scales.dtype == dtype
    assert grid.scales.shape == (ROWS, groups)
    expected = np.empty_like(WEIGHTS)
    for row in range(ROWS):
        for group in range(groups):
            own = slice(group * COLUMNS // groups, (group + 1) * COLUMNS // groups)
            part = WEIGHTS[row, own]
            low, high = ends(part)
            if kind == "symmetric":
                low, high = -max(-low, high), max(-low, high)
            scale, zero = affine(low, high, bits, dtype, 2 ** (bits - 1) if kind == "symmetric" else None)
            assert abs(grid.scales[row, group] / scale - 1) < (1e-6 if dtype == "float32" else 1e-9)
            scale = np.float32(grid.scales[row, group])
            assert grid.zeros[row, group] == zero
            expected[row, own] = rounded(part, scale, zero, bits)
    np.testing.assert_array_equal(grid.decode(codes), expected)
    if kind == "min_max":
        # Nothing is clipped but by the rounding of zero and of the stored scale.
        scales = np.repeat(np.asarray(grid.scales, np.float32), COLUMNS // groups, axis=1)
        assert (np.abs(WEIGHTS - expected) <= scales * (0.501 + 2**bits * 2.0**-11) + (bits == 2) * scales / 2).all()


def test_shrunk_ranges_by_a_loop():
    bits = 3
    grid: Any = make_grid(WEIGHTS, spec=GridSpec(bits, "mse", dtype="float16"))
    for row in range(ROWS):
        low, high = ends(WEIGHTS[row])
        parts = [np.float32(1) - np.float32(i) / np.float32(100) for i in range(80)]
        found = []
        for part in parts:
            scale, zero = affine(part * low, part * high, bits, "float16")
            missing = np.abs(WEIGHTS[row] - rounded(WEIGHTS[row], scale, zero, bits)).astype(np.float64)
            found.append((missing**2.4).sum())
        chosen = rounded(WEIGHTS[row], np.float32(grid.scales[row, 0]), np.float32(grid.zeros[row, 0]), bits)
        missing = (np.abs(WEIGHTS[row] - chosen).astype(np.float64) ** 2.4).sum()
        assert missing <= min(found) * (1 + 1e-5) + 1e-12
        assert missing <= found[0]


def test_a_search_over_both_ends_finds_the_least_of_its_candidates():
    """256 of them, min-max among these, by a loop; under the weights that it was given, on the stored scales."""
    bits = 3
    spec = GridSpec(bits, "range_search", dtype="bfloat16")
    grid: Any = make_grid(WEIGHTS, IMPORTANCE, spec=spec)
    found = error(WEIGHTS, grid.decode(grid.nearest(WEIGHTS)), IMPORTANCE)
    plain: Any = make_grid(WEIGHTS, spec=dataclasses.replace(spec, kind="min_max"))
    assert (found <= error(WEIGHTS, plain.decode(plain.nearest(WEIGHTS)), IMPORTANCE)).all()
    for row in range(ROWS - 1):
        low, high = ends(WEIGHTS[row])
        step = (high - low) / np.float32(64)
        least = np.inf
        for t in range(0, 32, 2):
            for u in range(0, 32, 2):
                scale, zero = affine(low + t * step, high - u * step, bits, jnp.bfloat16)
                least = min(least, error(WEIGHTS[row][None], rounded(WEIGHTS[row], scale, zero, bits), IMPORTANCE)[0])
        assert found[row] <= least * (1 + 1e-5) + 1e-12


def test_a_row_of_zeros_and_a_type_that_cannot_hold_a_scale():
    for kind in ("range_search", "kmeans"):
        grid: Any = make_grid(
            np.array([[0, 0, 0, 0], [3e-9, -3e-9, 1e-9, 0], [1e9, -1e9, 1e8, 0]], np.float32),
            spec=GridSpec(2, kind),
        )
        codes = grid.nearest(np.zeros((3, 4), np.float32))
        assert np.isfinite(grid.decode(codes)).all()
        np.testing.assert_array_equal(grid.decode(codes)[:2], np.zeros((2, 4)))


# --- k-means of a row -------------------------------------------------------------------------------


def assign(values, centroids):
    """Nearest, the smaller of two."""
    return np.abs(values[:, None] - centroids).argmin(axis=1)


def objective(values, weights, centroids):
    values, weights, centroids = (np.asarray(part, np.float64) for part in (values, weights, centroids))
    return (weights * (values - centroids[assign(values, centroids)]) ** 2).sum()


def naive_lloyd(values, weights, centroids, iterations):
    """float64; a cluster without weight stays."""
    values, weights, centroids = (np.array(part, np.float64) for part in (values, weights, centroids))
    for _ in range(iterations):
        codes = assign(values, centroids)
        for j in range(len(centroids)):
            if weights[codes == j].sum() > 0:
                centroids[j] = (weights * values)[codes == j].sum() / weights[codes == j].sum()
    return centroids


def optimum(values, weights, k):
    """The least objective of all partitions, by dynamic programming over runs of sorted values."""
    order = np.argsort(values)
    values, weights = np.asarray(values, np.float64)[order], np.asarray(weights, np.float64)[order]
    n = len(values)
    cost = np.full((n + 1, n + 1), np.inf)
    for i in range(n):
        for j in range(i + 1, n + 1):
            mean = np.average(values[i:j], weights=weights[i:j])
            cost[i, j] = (weights[i:j] * (values[i:j] - mean) ** 2).sum()
    best = cost[0]
    for _ in range(k - 1):
        best = np.minimum(best, (best[:, None] + cost).min(axis=0))
    return best[n]


K = 4


@pytest.fixture(scope="module")
def rows():
    return sort_rows(jnp.asarray(WEIGHTS), jnp.broadcast_to(IMPORTANCE, WEIGHTS.shape))


@pytest.fixture(scope="module")
def linspace(rows):
    return np.array(start_centroids(rows, K, start="linspace"))


@pytest.fixture(scope="module")
def step(rows):
    return jax.jit(lambda start, iterations: lloyd(rows, start, iterations=iterations, tolerance=0.0))


def test_iterations_are_those_of_a_loop(linspace, step):
    np.testing.assert_allclose(linspace[0], np.linspace(WEIGHTS[0].min(), WEIGHTS[0].max(), K), rtol=1e-6)
    for iterations in (1, 2, 5, 100):
        found = np.asarray(step(linspace, iterations))
        for row in range(ROWS):
            expected = naive_lloyd(WEIGHTS[row], IMPORTANCE, linspace[row], iterations)
            np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


def test_the_objective_never_rises_and_centroids_stay_sorted(linspace, step):
    before = [objective(WEIGHTS[row], IMPORTANCE, linspace[row]) for row in range(ROWS)]
    first = before
    for iterations in range(1, 12):
        centroids = np.asarray(step(linspace, iterations))
        after = [objective(WEIGHTS[row], IMPORTANCE, centroids[row]) for row in range(ROWS)]
        assert (np.diff(centroids, axis=1) >= 0).all()
        assert all(new <= old + 1e-6 * start for new, old, start in zip(after, before, first, strict=True))
        before = after
    assert before[0] < 0.9 * first[0]


def test_an_empty_cluster_keeps_its_centroid(step):
    start = np.tile(np.array([-1.0, 0.0, 500.0, 600.0], np.float32), (ROWS, 1))
    found = np.asarray(step(start, 3))
    np.testing.assert_array_equal(found[:, 2:], start[:, 2:])
    assert (found[0, :2] != start[0, :2]).all()


def test_no_partition_is_better_than_the_optimum():
    """Of 40 values in 4 clusters, by dynamic programming; k-means++ from 20 seeds comes near it."""
    values, weights = WEIGHTS[:2, :40], IMPORTANCE[:40]
    short = sort_rows(jnp.asarray(values), jnp.broadcast_to(weights, values.shape))
    run = jax.jit(jax.vmap(lambda seed: lloyd(short, start_centroids(short, K, start="kmeans++", seed=seed))))
    found = np.asarray(run(jnp.arange(20)))
    for row in range(2):
        bound = optimum(values[row], weights, K)
        every = np.array([objective(values[row], weights, centroids[row]) for centroids in found])
        assert (every >= bound * (1 - 1e-6)).all()
        assert every.min() <= bound * 1.02
        assert np.median(every) <= bound * 1.5


def test_seeds_follow_their_law():
    """First seed by weight, second by weight times squared distance: the 10 pairs of 5 values, in 4,000 draws."""
    points = np.array([[0.0, 1.0, 3.0, 4.0, 8.0]], np.float32)
    weights = np.array([[1.0, 4.0, 2.0, 0.5, 0.25]], np.float32)
    few = sort_rows(jnp.asarray(points), jnp.asarray(weights))
    draws = 4000
    seeds = jax.jit(jax.vmap(lambda seed: start_centroids(few, 2, start="kmeans++", seed=seed)))(jnp.arange(draws))
    places = np.searchsorted(points[0], np.asarray(seeds)[:, 0])
    mass = weights * (points.T - points) ** 2
    ordered = (weights / weights.sum()).T * mass / mass.sum(axis=1, keepdims=True)
    law = np.asarray(ordered + ordered.T, np.float64)[np.triu_indices(5, 1)]
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(places.T), 1)
    assert stats.chisquare(counts[np.triu_indices(5, 1)], draws * law / law.sum()).pvalue > 1e-3


@pytest.mark.parametrize("start", ["linspace", "kmeans++"])
def test_few_distinct_values_are_found_exactly(start):
    """As many as centroids; the last ones close together, where empty clusters would leave two in one."""
    rng = np.random.default_rng(1)
    distinct = np.array([-7.3, 0.1, 0.11, 5.7], np.float32)
    values = jnp.asarray(np.stack([rng.permutation(distinct[rng.integers(0, few, 30)]) for few in (4, 4, 3, 1)]))
    found = np.asarray(cluster_rows(values, jnp.asarray(rng.gamma(0.3, size=(4, 30)), jnp.float32), 4, start=start))
    for row in range(4):
        assert set(np.asarray(values[row])) == set(found[row])
    assert (np.diff(found, axis=1) >= 0).all()


def tables(spec, importance=None, weights=WEIGHTS):
    grid: Any = make_grid(weights, importance, spec=spec)
    return np.asarray(grid.tables, np.float32)


def test_only_ratios_of_weights_matter_and_exponent_zero_weighs_all_the_same():
    spec = GridSpec(3, "kmeans", dtype="float32")
    plain = tables(spec, IMPORTANCE)
    np.testing.assert_array_equal(plain, tables(spec, IMPORTANCE * np.float32(2.0**-60)))
    np.testing.assert_allclose(plain, tables(spec, IMPORTANCE * np.float32(3.7e9)), rtol=1e-4, atol=1e-5)
    unweighted = tables(spec)
    assert np.abs(unweighted - plain).max() > 0.01
    same = np.linspace(WEIGHTS.min(axis=1), WEIGHTS.max(axis=1), 8, axis=1)
    for row in (0, 1, 2):
        expected = naive_lloyd(WEIGHTS[row], np.ones(COLUMNS), same[row], 30)
        np.testing.assert_allclose(unweighted[row, 0], expected, rtol=1e-4, atol=1e-5)
    factor = factorize(calibrate(np.random.default_rng(2).normal(size=(99, COLUMNS)).astype(np.float32)))
    np.testing.assert_array_equal(column_importance(factor, 0), np.ones(COLUMNS))


def test_sorting_on_the_host_or_in_the_program_gives_the_same_tables():
    """Outside of `jax.jit` NumPy sorts on a CPU."""
    spec = GridSpec(3, "kmeans", dtype="float32")
    inside: Any = jax.jit(lambda weights: make_grid(weights, IMPORTANCE, spec=spec))(WEIGHTS)
    np.testing.assert_allclose(inside.tables, tables(spec, IMPORTANCE), rtol=1e-5, atol=1e-6)


def test_importance_is_of_the_columns_own_order_and_ignores_dead_ones():
    x = np.random.default_rng(3).normal(size=(99, 9)).astype(np.float32) * np.arange(9, dtype=np.float32)
    factor = factorize(calibrate(x))
    pivots = np.diagonal(factor.inverse).astype(np.float64)
    expected = np.zeros(9)
    for place, column in enumerate(factor.order):
        expected[column] = pivots[place] ** -4.0 if column else 0
    np.testing.assert_allclose(column_importance(factor, 4), expected / expected.max(), rtol=1e-5)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    spec = GridSpec(4, "kmeans")
    alone = tables(spec, IMPORTANCE, np.tile(WEIGHTS[2], (ROWS, 1)))
    np.testing.assert_array_equal(tables(spec, IMPORTANCE)[2], alone[5])


# --- a grid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "groups"), [(3, 4), (8, 1)])
def test_codes_are_of_the_nearest_entries_and_tables_are_of_the_stored_type(bits, groups):
    grid: Any = make_grid(WEIGHTS, IMPORTANCE, spec=GridSpec(bits, "kmeans", groups, dtype="bfloat16"))
    assert grid.tables.shape == (ROWS, groups, 2**bits)
    assert grid.tables.dtype == jnp.bfloat16
    tables = np.asarray(grid.tables, np.float32)
    assert (np.diff(tables, axis=2) >= 0).all()
    codes = np.asarray(grid.nearest(WEIGHTS))
    decoded = np.asarray(grid.decode(codes))
    for row in range(ROWS):
        for column in range(COLUMNS):
            table = tables[row, column * groups // COLUMNS]
            assert decoded[row, column] == table[codes[row, column]]
            least = np.abs(table - WEIGHTS[row, column]).min()
            assert abs(decoded[row, column] - WEIGHTS[row, column]) <= least * (1 + 1e-6)


def test_a_column_a_group_is_the_matrix_itself():
    grid: Any = make_grid(WEIGHTS, spec=GridSpec(1, "kmeans", COLUMNS, dtype="float32"))
    np.testing.assert_array_equal(grid.decode(grid.nearest(WEIGHTS)), WEIGHTS)


def test_refusals():
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"bits": 5}, "bits is 5; allowed are 1, 2, 3, 4, 8"),
        ({"kind": "lloyd"}, "kind is 'lloyd'; allowed are min_max, symmetric, mse, range_search, kmeans"),
        ({"dtype": "float64"}, "dtype is 'float64'; allowed are float16, bfloat16, float32"),
        ({"start": "random"}, "start is 'random'; allowed are None, linspace, kmeans"),
        ({"groups": 0}, "groups is 0; it must be at least 1"),
        ({"exponent": -1}, "exponent is -1; it must be finite and not negative"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            GridSpec(**options)
    with pytest.raises(ValueError, match="groups is 5; it must divide the 48 columns of weights"):
        make_grid(WEIGHTS, spec=GridSpec(groups=5))
    with pytest.raises(ValueError, match="start is 'random'; allowed are linspace"):
        cluster_rows(jnp.asarray(WEIGHTS), jnp.ones(WEIGHTS.shape), 4, start="random")
