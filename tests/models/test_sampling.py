"""Tokens are drawn from the distribution that temperature, top_k and top_p define."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.models.sampling import Sampling, filtered_logits, sample

LOGITS = jnp.array([[2.0, -1.0, 0.5, 3.0, 0.5, -4.0], [0.0, 0.0, 5.0, 1.0, 4.0, 2.0]])
SAMPLINGS = [
    Sampling(),
    Sampling(0.5),
    Sampling(3.0, top_k=3),
    Sampling(1.0, top_p=0.9),
    Sampling(2.0, top_k=4, top_p=0.8),
    Sampling(1.0, top_k=100),
    Sampling(1.0, top_p=1e-6),
]


def expected_probabilities(logits, sampling):
    """A loop over tokens from the likeliest on, in NumPy."""
    scaled = np.asarray(logits, np.float64) / sampling.temperature
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    order = order[: sampling.top_k]
    weight = np.exp([scaled[token] for token in order])
    weight /= weight.sum()
    result, reached = np.zeros(len(scaled)), 0.0
    for token, w in zip(order, weight, strict=True):
        if reached >= sampling.top_p:
            break
        result[token] = w
        reached += w
    return result / result.sum()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_distribution_is_that_of_the_loop(sampling):
    found = jax.nn.softmax(filtered_logits(LOGITS, sampling), axis=-1)
    for row in range(2):
        np.testing.assert_allclose(found[row], expected_probabilities(LOGITS[row], sampling), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("sampling", [SAMPLINGS[1], SAMPLINGS[4]], ids=str)
def test_counts_follow_the_distribution(sampling):
    """20,000 draws: each count within 5 standard errors, and nothing outside the support."""
    n = 20_000
    keys = jax.random.split(jax.random.key(0), n)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: sample(key, LOGITS, sampling)))(keys))
    assert drawn.dtype == np.int32
    for row in range(2):
        p = expected_probabilities(LOGITS[row], sampling)
        counts = np.bincount(drawn[:, row], minlength=6)
        assert (counts[p == 0] == 0).all()
        assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()
    # Rows are drawn apart from each other: their covariance is within 5 standard errors of none.
    a, b = (drawn[:, row] == np.argmax(LOGITS[row]) for row in range(2))
    p, q = a.mean(), b.mean()
    assert abs((a & b).mean() - p * q) < 5 * np.sqrt(p * (1 - p) * q * (1 - q) / n)


def test_greedy_takes_the_first_of_the_likeliest():
    logits = jnp.array([[1.0, 3.0, 3.0], [5.0, 5.0, 5.0]])
    assert sample(None, logits, Sampling(0)).tolist() == [1, 0]


def test_ties_at_the_k_th_place_do_not_enlarge_the_set():
    found = jax.nn.softmax(filtered_logits(jnp.array([1.0, 2.0, 1.0, 1.0]), Sampling(top_k=2)))
    assert (np.asarray(found) > 0).tolist() == [True, True, False, False]


def test_a_row_is_drawn_alike_whatever_stands_behind_it():
    sampling, key = Sampling(5.0), jax.random.key(3)
    flat = jnp.zeros((64, 40))
    assert sample(key, flat, sampling)[:9].tolist() == sample(key, flat[:9], sampling).tolist()
    assert len(set(sample(key, flat, sampling).tolist())) > 20  # and rows differ


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_extreme_logits_and_temperatures_are_finite(dtype):
    logits = jnp.array([[-3e4, 0.0, 3e4]], dtype)
    for temperature in (1e-30, 1.0, 1e30):
        found = filtered_logits(logits, Sampling(temperature, top_p=0.5))
        assert found.dtype == jnp.float32
        assert np.isfinite(found).all()
        assert np.argmax(found) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0.1; it is 0 \(greedy\) or positive"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; it is at least 1, or None"),
        ({"top_p": 0.0}, "top_p is 0.0; it is above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_values_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


def test_a_draw_needs_a_key_and_a_distribution_a_temperature():
    with pytest.raises(ValueError, match="key is None; temperature 1.0 draws"):
        sample(None, LOGITS, Sampling())
    with pytest.raises(ValueError, match="temperature is 0; a distribution has a positive one"):
        filtered_logits(LOGITS, Sampling(0))
