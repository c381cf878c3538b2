"""Exponents concentrate: the table of entropies, the law that the paper assumes, and where its bound fails."""

import math

import ml_dtypes
import numpy as np
import pytest
from scipy import stats

from hashml.weights.ecf8 import ECF8, claimed_bounds, exponent_entropy, geometric_entropy, sample_stable
from hashml.weights.lossless import bits_per_weight, encode, entropy_limit

DRAWS = 400_000


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0])
def test_the_entropy_of_the_geometric_law_by_its_sum(alpha):
    terms = 2.0 ** (-alpha * np.abs(np.arange(-400, 401)))
    assert geometric_entropy(alpha) == pytest.approx(stats.entropy(terms, base=2), abs=1e-9)


def test_the_laws_own_entropy_exceeds_the_claimed_bound_at_one():
    assert claimed_bounds(2) == pytest.approx((1.6, 8 / 3))
    assert claimed_bounds(1) == pytest.approx((2 / 3, 2.0))
    assert claimed_bounds(2)[0] < geometric_entropy(2) < claimed_bounds(2)[1]
    assert geometric_entropy(1) > claimed_bounds(1)[1] + 0.9


@pytest.mark.parametrize("alpha", [2.0, 1.9, 1.5, 1.0])
def test_exponents_of_stable_variables_exceed_the_bound_below_two(alpha):
    """Against the law of |X|, integrated over each octave: scipy's for the Gaussian and the Cauchy variable."""
    found = exponent_entropy(sample_stable(np.random.default_rng(0), alpha, DRAWS))
    assert (found > claimed_bounds(alpha)[1]) == (alpha < 2)
    assert 2.5 < found < 3.25
    law = {2.0: stats.norm(scale=math.sqrt(2)), 1.0: stats.cauchy()}.get(alpha)
    if law is not None:
        octaves = 2 * np.diff(law.cdf(2.0 ** np.arange(-60, 61)))
        # The standard error of an entropy is sqrt(Var log p / n).
        logs = np.log2(octaves[octaves > 0])
        mean = -(octaves[octaves > 0] * logs).sum()
        error = math.sqrt(((octaves[octaves > 0] * logs**2).sum() - mean**2) / DRAWS)
        assert abs(found - mean) < 4 * error + len(logs) / DRAWS  # and the bias of a plug-in estimate


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.6])
def test_the_sampler_has_the_stable_law(alpha):
    """The characteristic function is exp(-|t|^alpha)."""
    draws = sample_stable(np.random.default_rng(1), alpha, DRAWS)
    for t in (0.3, 1.0, 2.0):
        assert abs(np.cos(t * draws).mean() - math.exp(-(t**alpha))) < 4 / math.sqrt(2 * DRAWS)


def test_scale_does_not_matter_while_no_exponent_is_clipped():
    values = np.random.default_rng(0).standard_normal(DRAWS)
    assert exponent_entropy(values) == exponent_entropy(2.0**-9 * values)
    scaled = (values * 448 / np.abs(values).max()).astype(ml_dtypes.float8_e4m3fn)
    assert 2.53 < entropy_limit(scaled) - 4 < 2.56
    assert exponent_entropy(np.zeros(3)) == 0


def test_savings_with_and_without_a_scale():
    """18.2% at most of a scaled Gaussian; 24.2% and 32.4% of one that is cast as it is, for range it does not use."""
    values = np.random.default_rng(0).standard_normal(2**19)
    limits = {}
    for name, scale in (("scaled", 448 / np.abs(values).max()), ("0.05", 0.05), ("0.02", 0.02)):
        array = (values * scale).astype(ml_dtypes.float8_e4m3fn)
        limits[name] = 1 - entropy_limit(array) / 8
        saved = 1 - bits_per_weight(encode(array, ECF8)) / 8
        assert limits[name] - 0.015 * entropy_limit(array) / 8 < saved < limits[name]
    assert limits == pytest.approx({"scaled": 0.182, "0.05": 0.242, "0.02": 0.324}, abs=2e-3)


def test_refusals():
    for call in (geometric_entropy, claimed_bounds):
        with pytest.raises(ValueError, match="alpha is 0; allowed is more than 0"):
            call(0)
    with pytest.raises(ValueError, match="alpha is 2.5; allowed is more than 0, up to 2"):
        sample_stable(np.random.default_rng(0), 2.5, 3)
