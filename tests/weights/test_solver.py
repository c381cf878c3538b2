"""Elimination against first principles: OBQ by fresh least squares, the loss of every solution by its columns."""

import functools
from typing import Any

import numpy as np
import pytest

from hashml.weights.calibration import Hessian, calibrate, damped, factorize, proxy_loss
from hashml.weights.grids import GridSpec, make_grid
from hashml.weights.obq import obq
from hashml.weights.quantized import preset
from hashml.weights.solver import check_options, solve

ROWS, COLUMNS = 16, 40
ONE = np.ones((), np.int32)
RANGE, TABLE = GridSpec(2, "min_max"), GridSpec(3, "kmeans", 2)


@functools.cache
def layer(seed=0):
    """Weights with tails, and the Hessian of correlated inputs of unequal scales."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(COLUMNS, COLUMNS)) + 4 * rng.normal(size=(1, COLUMNS))
    x = rng.normal(size=(400, COLUMNS)) @ mixing * rng.uniform(0.3, 1.0, COLUMNS)
    weights = rng.standard_t(4, (ROWS, COLUMNS)).astype(np.float32)
    return weights, calibrate(x.astype(np.float32))


def total(found):
    """Of the losses of columns."""
    return float(found.losses.sum())


def exact_proxy(difference, matrix):
    """float64."""
    difference = np.asarray(difference, np.float64)
    return np.trace(difference @ matrix @ difference.T) / 2


CASES = [
    ("gptq", RANGE, True),
    ("gptq", TABLE, True),
    ("gptq", TABLE, False),
    ("gptq", GridSpec(4, "range_search"), True),
    ("rtn", RANGE, True),
    ("rtn", TABLE, False),
]


@pytest.mark.parametrize(("method", "spec", "act_order"), CASES)
def test_losses_of_columns_sum_to_the_proxy_loss(method, spec, act_order):
    """1/2 tr(D H D^T), with any grid, method and order; and Q lies on the grid, bit for bit."""
    weights, hessian = layer()
    found: Any = solve(weights, hessian, spec, method=method, act_order=act_order)
    factor = factorize(hessian, act_order=act_order)
    exact = exact_proxy(weights - found.quantized, damped(hessian, factor))
    assert abs(total(found) / exact - 1) < 1e-5
    np.testing.assert_array_equal(found.grid.decode(found.codes), found.quantized)
    # Column by column: E = D R.
    errors = (weights - np.asarray(found.quantized, np.float64))[:, factor.order] @ factor.root
    exact_losses = np.empty(COLUMNS)
    exact_losses[factor.order] = factor.scale * (errors**2).sum(axis=0) / 2
    np.testing.assert_allclose(found.losses, exact_losses, rtol=1e-3, atol=1e-6 * exact_losses.max())


@pytest.mark.parametrize("act_order", [False, True])
def test_blocks_change_nothing_and_the_result_is_elimination_in_that_order(act_order):
    """Blocks of one, of what divides nothing, and of all; OBQ in float64 with its order given."""
    weights, hessian = layer()
    factor = factorize(hessian, act_order=act_order)
    results = [solve(weights, hessian, TABLE, act_order=act_order, block=block) for block in (1, 7, 128)]
    expected = obq(weights, damped(hessian, factor), results[0].grid, order=factor.order)
    for found in results:
        np.testing.assert_array_equal(found.codes, expected.codes)
        assert abs(total(found) / expected.losses.sum() - 1) < 1e-5


def greedy_by_least_squares(weights, matrix, grid, levels):
    """OBQ from its statement: what is free solves its least-squares problem anew at each step. No elimination."""
    rows, columns = weights.shape
    values = np.stack([np.asarray(grid.decode(np.full(weights.shape, code, np.uint8))) for code in range(levels)], -1)
    quantized = np.zeros(weights.shape)
    for row in range(rows):
        fixed = []
        for _ in range(columns):
            free = [i for i in range(columns) if i not in fixed]
            change = np.zeros(columns)
            change[fixed] = quantized[row, fixed] - weights[row, fixed]
            h = matrix[np.ix_(free, free)]
            change[free] = -np.linalg.solve(h, matrix[np.ix_(free, fixed)] @ change[fixed])
            now = weights[row] + change
            nearest = values[row, free, np.abs(values[row, free] - now[free, None]).argmin(axis=1)]
            place = ((nearest - now[free]) ** 2 / np.diagonal(np.linalg.inv(h))).argmin()
            quantized[row, free[place]] = nearest[place]
            fixed.append(free[place])
    return quantized


def test_greedy_order_is_that_of_fresh_least_squares():
    weights, hessian = layer()
    few = np.asarray(weights[:4], np.float64)
    matrix = damped(hessian, factorize(hessian))
    grid = make_grid(weights[:4], spec=RANGE)
    found = obq(few, matrix, grid)
    quantized = np.asarray(grid.decode(found.codes), np.float64)
    np.testing.assert_array_equal(quantized, greedy_by_least_squares(few, matrix, grid, 4))
    assert abs(found.losses.sum() / exact_proxy(few - quantized, matrix) - 1) < 1e-8


@pytest.mark.parametrize("scale", [1.0, 0.003])
def test_with_equal_uncorrelated_inputs_it_is_rounding_to_nearest(scale):
    weights, _ = layer()
    hessian = Hessian(np.eye(COLUMNS, dtype=np.float32) * np.float32(scale), ONE)
    results: list[Any] = [solve(weights, hessian, TABLE, method="rtn")]
    results += [solve(weights, hessian, TABLE, act_order=order, block=7) for order in (False, True)]
    for found in results[1:]:
        np.testing.assert_array_equal(found.codes, results[0].codes)
        np.testing.assert_allclose(found.losses, results[0].losses, rtol=1e-5)


def test_errors_fall_by_the_square_of_the_levels():
    """255^2 / 3^2 = 7,225 from 2 bits to 8, within a factor of two; and 8 bits are near the weights themselves."""
    weights, hessian = layer()
    losses = {bits: total(solve(weights, hessian, GridSpec(bits, "min_max"))) for bits in (2, 8)}
    assert 7225 / 2 < losses[2] / losses[8] < 7225 * 2
    assert losses[8] < 1e-4 * exact_proxy(weights, np.asarray(hessian.matrix, np.float64))


def test_making_up_for_errors_lowers_the_loss():
    """On 20 layers of correlated inputs, by the undamped loss, too; LeanQuant's grid lowers it further at 2 bits."""
    wins, plain_wins, lean = 0, 0, 0
    for seed in range(20):
        weights, hessian = layer(seed)
        totals = []
        for spec in (preset("rtn", 2), preset("gptq", 2), preset("leanquant", 2)):
            found: Any = solve(weights, hessian, spec.grid, method=spec.method)
            totals.append((total(found), float(proxy_loss(weights - found.quantized, hessian))))
        wins += totals[1][0] < totals[0][0]
        plain_wins += totals[1][1] < totals[0][1]
        lean += totals[2][0] < totals[1][0]
    assert min(wins, plain_wins, lean) >= 19


def test_dead_inputs_give_weight_to_nobody():
    weights, hessian = layer()
    matrix = np.array(hessian.matrix)
    dead = [0, 17]
    matrix[dead], matrix[:, dead] = 0, 0
    found: Any = solve(weights, Hessian(matrix, hessian.tokens), RANGE)
    assert np.isfinite(found.quantized).all()
    np.testing.assert_array_equal(np.asarray(found.quantized)[:, dead], np.zeros((ROWS, 2)))
    alive = np.delete(np.arange(COLUMNS), dead)
    part = Hessian(matrix[np.ix_(alive, alive)], hessian.tokens)
    factor = factorize(part)
    # Their zeros change no range: the grid is that of the others alone.
    expected = obq(weights[:, alive], damped(part, factor), found.grid, order=factor.order)
    np.testing.assert_array_equal(np.asarray(found.codes)[:, alive], expected.codes)
    nothing = solve(weights, Hessian(np.zeros_like(matrix), ONE), TABLE)
    np.testing.assert_array_equal(nothing.quantized, np.zeros((ROWS, COLUMNS)))


def naive_regrouping(weights, hessian, bits, groups):
    """GPTQ in the columns' order, a column at a time in float64; a group's range when its first column is reached."""
    matrix = damped(hessian, factorize(hessian, act_order=False))
    upper = np.linalg.cholesky(np.linalg.inv(matrix)).T
    now, width = np.asarray(weights, np.float64), COLUMNS // groups
    quantized, scale, zero = np.zeros_like(now), np.ones(ROWS), np.zeros(ROWS)
    for i in range(COLUMNS):
        if i % width == 0:
            low = np.minimum(now[:, i : i + width].min(axis=1), 0)
            high = np.maximum(now[:, i : i + width].max(axis=1), 0)
            scale = (high - low) / (2**bits - 1)
            zero = np.round(-low / scale)
        quantized[:, i] = scale * (np.clip(np.round(now[:, i] / scale) + zero, 0, 2**bits - 1) - zero)
        now[:, i:] -= np.outer((now[:, i] - quantized[:, i]) / upper[i, i], upper[i, i:])
    return quantized


@pytest.mark.parametrize(("groups", "block"), [(4, 128), (2, 8)])
def test_groups_that_are_not_static_see_the_weights_as_they_are_then(groups, block):
    """A group within a block, and of several."""
    weights, hessian = layer()
    options: dict[str, Any] = {"act_order": False, "static_groups": False, "block": block}
    found: Any = solve(weights, hessian, GridSpec(3, "min_max", groups, dtype="float32"), **options)
    expected = naive_regrouping(weights, hessian, 3, groups)
    np.testing.assert_allclose(found.quantized, expected, rtol=1e-4, atol=1e-5)
    static: Any = solve(weights, hessian, GridSpec(3, "min_max", groups, dtype="float32"), act_order=False)
    assert (np.asarray(static.grid.scales) != np.asarray(found.grid.scales)).any()
    matrix = damped(hessian, factorize(hessian, act_order=False))
    assert abs(total(found) / exact_proxy(weights - found.quantized, matrix) - 1) < 1e-5


def test_a_singular_hessian_is_damped_until_it_is_not():
    weights, _ = layer()
    x = np.random.default_rng(3).normal(size=(10, COLUMNS)).astype(np.float32)
    found: Any = solve(weights, calibrate(x), TABLE, damping=0)
    assert 0 < found.damping <= 1e-3
    assert np.isfinite(found.quantized).all()
    rounded = solve(weights, calibrate(x), TABLE, damping=0, method="rtn")
    assert proxy_loss(weights - found.quantized, calibrate(x)) < 0.5 * proxy_loss(
        weights - rounded.quantized, calibrate(x)
    )


def test_rounding_needs_no_hessian_where_no_grid_reads_it():
    weights, hessian = layer()
    found: Any = solve(weights, None, RANGE, method="rtn")
    assert found.losses is None
    np.testing.assert_array_equal(found.codes, solve(weights, hessian, RANGE, method="rtn").codes)


def test_refusals():
    weights, hessian = layer()
    plain: dict[str, Any] = {"method": "gptq", "act_order": True, "damping": 0, "block": 1, "static_groups": True}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"method": "awq"}, "method is 'awq'; allowed are rtn, gptq"),
        ({"damping": -1}, "damping is -1; it must be finite and not negative"),
        ({"block": 0}, "block is 0; it must be at least 1"),
        ({"static_groups": False}, "static_groups is False with act_order"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            check_options(**{**plain, **options})
    spec = GridSpec(3, "kmeans")
    with pytest.raises(ValueError, match="groups is 7; it must divide the 40 columns"):
        solve(weights, hessian, GridSpec(groups=7))
    with pytest.raises(ValueError, match="hessian is None; method 'rtn' with the grid 'kmeans' of exponent 4"):
        solve(weights, None, spec, method="rtn")
    with pytest.raises(ValueError, match="hessian is None; method 'gptq'"):
        solve(weights, None, GridSpec(kind="min_max"))
    with pytest.raises(ValueError, match=r"hessian has the shape \(40, 40\); weights have 20 columns"):
        solve(weights[:, :20], hessian, spec)
    with pytest.raises(ValueError, match="hessian has 1600 entries that are NaN or infinite"):
        solve(weights, Hessian(np.full((COLUMNS, COLUMNS), np.nan, np.float32), ONE), spec)
    broken = weights.copy()
    broken[3, 3] = np.inf
    with pytest.raises(ValueError, match="weights are NaN or infinite in places"):
        solve(broken, hessian, spec)
    with pytest.raises(ValueError, match=r"hessian has the shape \(40, 40\); weights have 20 columns"):
        obq(weights[:, :20], hessian.matrix, make_grid(weights[:, :20], spec=spec))
