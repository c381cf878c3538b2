"""The Hessian of a layer's inputs: NumPy's product in any batches, what is no data, and the factor of its inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.weights.calibration import Hessian, calibrate, damped, factorize, merge, proxy_loss


def inputs(tokens, width, seed=0):
    """Correlated, of unequal scales."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * rng.gamma(1.0, size=width)
    return (rng.normal(size=(tokens, width)) @ mixing / np.sqrt(width)).astype(np.float32)


X = inputs(300, 20)
ONE = np.ones((), np.int32)
EXACT = 2 / 300 * X.T.astype(np.float64) @ X.astype(np.float64)


def assert_near(found, wanted):
    """Within the rounding of float32 sums."""
    assert np.abs(np.asarray(found, np.float64) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_is_the_mean_of_products_in_any_batches():
    assert_near(calibrate(X).matrix, EXACT)
    hessian = None
    for part in (X[:100].reshape(4, 25, 20), X[100:200].reshape(4, 25, 20), X[200:].reshape(4, 25, 20)):
        hessian = calibrate(part, hessian)
    assert hessian is not None
    assert_near(hessian.matrix, EXACT)
    assert hessian.tokens == 300
    one = calibrate(X[0])
    assert one.tokens == 1
    assert_near(one.matrix, 2 * np.outer(X[0], X[0]))


def test_merging_is_seeing_both():
    merged = merge(calibrate(X[:100]), calibrate(X[100:]))
    assert_near(merged.matrix, EXACT)
    assert merged.tokens == 300
    assert merged.tokens.dtype == np.int32
    with pytest.raises(ValueError, match="a is of width 20, b of 3"):
        merge(merged, calibrate(X[:, :3]))


def test_sums_of_half_floats_are_float32():
    """4,096 ones: a bfloat16 sum stops at 256."""
    found = calibrate(jnp.ones((4096, 3), jnp.bfloat16))
    assert found.matrix.dtype == jnp.float32
    np.testing.assert_array_equal(found.matrix, np.full((3, 3), 2.0))


def test_padding_does_not_count_whatever_it_holds():
    padded = np.concatenate([X, np.full((100, 20), np.nan, np.float32)])
    found = calibrate(padded, valid=np.arange(400) < 300)
    assert_near(found.matrix, EXACT)
    assert found.tokens == 300


def test_works_inside_a_scan():
    """Three batches that were not shown to the host."""
    start = Hessian(jnp.zeros((20, 20)), jnp.int32(0))
    found, _ = jax.lax.scan(lambda h, x: (calibrate(x, h), None), start, X.reshape(3, 100, 20))
    assert_near(found.matrix, EXACT)


def test_proxy_loss_is_the_mean_squared_error_of_outputs():
    difference = np.random.default_rng(1).normal(size=(7, 20)).astype(np.float32)
    errors = X.astype(np.float64) @ difference.T
    assert abs(proxy_loss(difference, calibrate(X)) / (errors**2).sum(axis=1).mean() - 1) < 1e-5


@pytest.mark.parametrize("act_order", [False, True])
def test_factors_are_of_the_inverse_of_the_damped_matrix(act_order):
    hessian = calibrate(inputs(500, 150))  # more than are inverted at once
    factor = factorize(hessian, damping=0.1, act_order=act_order)
    exact = np.asarray(hessian.matrix, np.float64)
    diagonal = np.diagonal(exact)
    np.testing.assert_array_equal(factor.order, np.argsort(-diagonal) if act_order else np.arange(150))
    exact = exact + 0.1 * diagonal.mean() * np.eye(150)
    np.testing.assert_allclose(damped(hessian, factor), exact, rtol=1e-6, atol=1e-7 * diagonal.max())
    exact = exact[np.ix_(factor.order, factor.order)] / diagonal.mean()
    assert_near(factor.inverse.T.astype(np.float64) @ factor.inverse, np.linalg.inv(exact))
    assert_near(factor.root.astype(np.float64) @ factor.root.T, exact)
    for triangle in (factor.inverse, factor.root):
        np.testing.assert_array_equal(triangle, np.triu(triangle))
    assert factor.damping == 0.1


def test_a_pivot_is_conditional_on_the_columns_that_are_left():
    """U_ii^2 is the inverse of what is left of H at i when all later columns answer; not diag(H^-1)."""
    hessian = calibrate(X)
    factor = factorize(hessian, damping=0.05, act_order=False)
    exact = damped(hessian, factor) / factor.scale
    for i in (0, 7, 19):
        pivot = np.linalg.inv(exact[i:, i:])[0, 0]
        assert abs(factor.inverse[i, i] ** 2 / pivot - 1) < 1e-5
    assert abs(factor.inverse[19, 19] ** 2 / np.linalg.inv(exact)[19, 19] - 1) > 0.1


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**30])
def test_the_scale_of_the_inputs_changes_nothing_but_the_scale(scale):
    hessian = calibrate(X)
    plain, scaled = factorize(hessian), factorize(Hessian(scale * hessian.matrix, hessian.tokens))
    np.testing.assert_array_equal(plain.inverse, scaled.inverse)
    assert scaled.scale == scale * plain.scale


def test_an_input_that_was_always_zero_stands_apart():
    silent = X.copy()
    silent[:, [3, 11]] = 0
    factor = factorize(calibrate(silent), act_order=False)
    np.testing.assert_array_equal(np.flatnonzero(factor.dead), [3, 11])
    off = factor.inverse - np.diag(np.diagonal(factor.inverse))
    assert not off[[3, 11]].any()
    assert not off[:, [3, 11]].any()
    alive = np.delete(np.arange(20), [3, 11])
    without = factorize(calibrate(X[:, alive]), act_order=False)
    np.testing.assert_allclose(factor.inverse[np.ix_(alive, alive)], without.inverse, rtol=1e-4, atol=1e-5)
    nothing = factorize(calibrate(np.zeros((5, 4), np.float32)))
    assert nothing.dead.all()
    assert np.isfinite(nothing.inverse).all()


def test_a_singular_matrix_gets_more_damping():
    """Ten tokens for twenty inputs; and the same input twice."""
    for x in (X[:10], np.concatenate([X, X[:, :1]], axis=1)):
        factor = factorize(calibrate(x), damping=0)
        assert 0 < factor.damping <= 1e-3
        assert np.isfinite(factor.inverse).all()
        exact = damped(calibrate(x), factor)[np.ix_(factor.order, factor.order)] / factor.scale
        assert np.abs(factor.root.astype(np.float64) @ factor.root.T - exact).max() < 1e-5 * exact.max()
        assert factorize(calibrate(x), damping=0.1).damping == 0.1


def test_refusals():
    with pytest.raises(ValueError, match="there is no calibration data"):
        calibrate(X[:0])
    with pytest.raises(ValueError, match="valid has no token: there is no calibration data"):
        calibrate(X, valid=np.zeros(300, bool))
    with pytest.raises(ValueError, match="x has width 19; hessian is of width 20"):
        calibrate(X[:, :19], calibrate(X))
    for value in (np.nan, np.inf, 1e30):
        broken = X.copy()
        broken[5, 2] = value
        with pytest.raises(ValueError, match="in 1 of 20 inputs; it must be finite"):
            calibrate(broken)
    matrix = np.array(calibrate(X).matrix)
    with pytest.raises(ValueError, match="damping is -0.1; it must be finite and not negative"):
        factorize(calibrate(X), damping=-0.1)
    with pytest.raises(ValueError, match="hessian is not positive definite under a damping of 1 times"):
        factorize(Hessian((2 * np.eye(20) - 1).astype(np.float32), ONE))  # with an eigenvalue of -18
    with pytest.raises(ValueError, match="hessian has a diagonal of mean -"):
        factorize(Hessian(-matrix, ONE))
    matrix[3, 4] = np.nan
    with pytest.raises(ValueError, match="hessian has 1 entries that are NaN or infinite"):
        factorize(Hessian(matrix, ONE))
    with pytest.raises(ValueError, match=r"hessian has the shape \(20, 19\); it must be square"):
        factorize(Hessian(matrix[:, :19], ONE))
