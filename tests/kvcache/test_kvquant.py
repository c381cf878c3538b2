"""KVQuant: nearest signposts in static and in measured ranges, exact outliers, Q-Norm, weighted tables."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.kvcache.calibration import learn_nonuniform
from hashml.kvcache.contract import CodecState
from hashml.kvcache.integer import IntGroup
from hashml.kvcache.kvquant import (
    NonUniformKeys,
    NonUniformValues,
    kvquant,
    normalise,
    snap,
    token_outliers,
    token_range,
)
from hashml.models.rotary import Rotary

KEY = jax.random.key(0)
B, H, C, D, N = 2, 2, 6, 16, 400


@functools.partial(jax.jit, static_argnames="codec")
def coded(codec, params, x):
    rows = codec.quantise(params, {}, x, jnp.ones(x.shape[:3], bool))
    return rows, codec.decode(params, CodecState(rows, {}))


def heavy(*shape, seed=0):
    """Student's t with 3 degrees of freedom: some values far out."""
    return jnp.asarray(np.random.default_rng(seed).standard_t(3, size=shape), jnp.float32)


@functools.cache
def normed(codec):
    return learn_nonuniform(KEY, codec, heavy(N, H, D, seed=1), q_norm=True)


def learned(codec):
    """Without Q-Norm, which only adds its levels."""
    return {name: x for name, x in normed(codec).items() if name != "levels"}


def test_snaps_to_the_nearest_signpost_the_smaller_of_two():
    table = np.array([-1, -0.25, 0.25, 0.75], np.float32)
    x = np.random.default_rng(0).uniform(-2, 2, 500).astype(np.float32)
    np.testing.assert_array_equal(snap(jnp.asarray(x), jnp.asarray(table)), np.abs(x[:, None] - table).argmin(1))
    np.testing.assert_array_equal(snap(jnp.asarray([0.0, 0.5, -9.0, 9.0]), jnp.asarray(table)), [1, 2, 0, 3])
    np.testing.assert_array_equal(snap(jnp.asarray([5.0]), jnp.asarray([0.3])), [0])


def test_keys_equal_the_formula():
    codec = NonUniformKeys(2)
    params = {name: np.asarray(x, np.float64) for name, x in learned(codec).items()}
    k = heavy(B, H, C, D)
    zero, spread = (params["high"] + params["low"])[:, None] / 2, (params["high"] - params["low"])[:, None] / 2
    nearest = np.abs(((k - zero) / spread)[..., None] - params["table"]).argmin(-1)
    np.testing.assert_allclose(
        coded(codec, learned(codec), k)[1], zero + spread * params["table"][nearest], atol=1e-5
    )


@pytest.mark.parametrize("codec", [NonUniformKeys(2, 2), NonUniformValues(2, 2)], ids=str)
def test_outliers_are_exact(codec):
    """To float16: those farthest from a key channel's middle, or those without which a value has the least range."""
    params, x = learned(codec), heavy(B, H, C, D, seed=2)
    rows, decoded = coded(codec, params, x)
    if isinstance(codec, NonUniformKeys):
        unit = np.abs(normalise(x, params["low"][:, None], params["high"][:, None]))
        expected = np.sort(np.argsort(-unit, axis=-1)[..., :2], axis=-1)
        np.testing.assert_array_equal(np.sort(rows["outlier_index"], axis=-1), expected)
    index = np.asarray(rows["outlier_index"], np.int64)
    taken = [np.take_along_axis(np.asarray(a), index, axis=-1) for a in (decoded, x)]
    np.testing.assert_array_equal(taken[0], taken[1].astype(np.float16))
    without = coded(type(codec)(2), params, x)[1]
    assert ((decoded - x) ** 2).mean() < 0.7 * ((without - x) ** 2).mean()


@pytest.mark.parametrize("outliers", [0, 1, 3])
def test_a_values_range_is_the_least_there_is_without_its_outliers(outliers):
    """Against all choices of so many of 8 channels."""
    x = heavy(40, 8, seed=3)
    index = token_outliers(x, outliers)
    assert index.shape == (40, outliers)
    low, high = token_range(x, index)
    for token, found in zip(np.asarray(x), np.asarray(high - low)[:, 0], strict=True):
        ranges = [np.ptp(np.delete(token, gone)) for gone in itertools.combinations(range(8), outliers)]
        np.testing.assert_allclose(found, min(ranges), rtol=1e-6)


def test_constant_weights_learn_what_no_weights_do():
    for codec in kvquant(2, 2):
        x = heavy(N, H, D, seed=4)
        plain = learn_nonuniform(KEY, codec, x, q_norm=True)
        constant = learn_nonuniform(KEY, codec, x, jnp.full_like(x, -0.3), q_norm=True)
        other = learn_nonuniform(KEY, codec, x, x, q_norm=True)
        np.testing.assert_allclose(constant["table"], plain["table"], rtol=1e-6)
        assert not np.allclose(other["table"], plain["table"], rtol=1e-2)
        assert (np.diff(plain["table"]) > 0).all()


def test_ranges_are_percentiles_of_each_channel():
    x = heavy(N, H, D, seed=5) * jnp.arange(1, D + 1) + 3
    for codec, tail in ((NonUniformKeys(2), 0.0), (NonUniformKeys(2, 2), 0.5)):
        params = learn_nonuniform(KEY, codec, x, q_norm=True)
        np.testing.assert_allclose(params["low"], np.percentile(x, tail, axis=0), rtol=1e-5)
        np.testing.assert_allclose(params["high"], np.percentile(x, 100 - tail, axis=0), rtol=1e-5)
        assert np.abs(params["table"]).max() <= 1 + 1e-6


def test_signposts_beat_equal_steps_where_values_are_uneven():
    """The reason to learn them: at 2 bits and the ranges of the whole channel, tails cost equal steps more."""
    x = heavy(B, H, 60, D, seed=6)
    nonuniform = ((coded(NonUniformKeys(2), learned(NonUniformKeys(2)), x)[1] - x) ** 2).mean()
    steps = {**learned(NonUniformKeys(2)), "table": jnp.linspace(-1, 1, 4)}
    assert nonuniform < 0.5 * ((coded(NonUniformKeys(2), steps, x)[1] - x) ** 2).mean()
    values = ((coded(NonUniformValues(2, 2), learned(NonUniformValues(2, 2)), x)[1] - x) ** 2).mean()
    assert values < ((coded(IntGroup(2, D), {}, x)[1] - x) ** 2).mean()


@pytest.mark.parametrize("codec", kvquant(2, 2), ids=str)
def test_q_norm_restores_mean_and_deviation(codec):
    """Of the normalised calibration values that are no outliers; it changes what codes mean and not the codes."""
    x = heavy(N, H, D, seed=1)
    plain, params = learned(codec), normed(codec)
    if isinstance(codec, NonUniformKeys):
        unit = normalise(x, params["low"], params["high"])
    else:
        unit = normalise(x, *token_range(x, token_outliers(x, 2)))
    unit = np.asarray(unit)[np.abs(unit) <= 1 + 1e-6]
    snapped = np.asarray(snap(jnp.asarray(unit), params["table"]))
    for levels, agrees in ((params["levels"], True), (plain["table"], False)):
        decoded = np.asarray(levels)[snapped]
        assert (abs(decoded.std() / unit.std() - 1) < 1e-4) == agrees
    np.testing.assert_allclose(np.asarray(params["levels"])[snapped].mean(), unit.mean(), atol=1e-5)
    rows = [coded(codec, p, heavy(B, H, C, D))[0]["q"] for p in (plain, params)]
    np.testing.assert_array_equal(*rows)


def test_raw_keys_are_decoded_then_rotated():
    codec, rotary = NonUniformKeys(2), Rotary()
    k, q = heavy(B, H, C, D), heavy(B, H, 2, 1, D, seed=7)
    positions = jnp.asarray(np.random.default_rng(8).integers(0, 99, (B, 1, C)), jnp.int32)
    rows, decoded = coded(codec, learned(codec), k)
    logits = codec.logits(learned(codec), CodecState(rows, {}), q, lambda x: rotary.rotate(x, positions))
    expected = jnp.einsum("bhjnd,bhcd->bhjnc", q, rotary.rotate(decoded, positions))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert codec.space == "pre_rope"


def test_channels_without_a_range_and_constant_tokens_are_no_nan():
    x = heavy(N, H, D, seed=9).at[:, 0, 3].set(1.5)
    keys, values = kvquant(2, 2)
    params = learn_nonuniform(KEY, keys, x, q_norm=True)
    k = heavy(B, H, C, D).at[:, 0, :, 3].set(1.5).at[0, 0, 0, 3].set(7.0)
    decoded = coded(keys, params, k)[1]
    assert jnp.isfinite(decoded).all()
    np.testing.assert_array_equal(decoded[1, 0, :, 3], 1.5)
    assert decoded[0, 0, 0, 3] == 7.0  # what differs in such a channel is an outlier
    flat = jnp.full((B, H, C, D), -2.0)
    np.testing.assert_array_equal(coded(values, learned(values), flat)[1], flat)


def test_refuses_coverages_and_heads_that_do_not_fit():
    x = heavy(8, H, D)
    for coverage in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"coverage is {coverage}; it must be above 0 and at most 1"):
            learn_nonuniform(KEY, NonUniformKeys(2), x, coverage=coverage)
    with pytest.raises(ValueError, match="outliers is 16; it must be less than the head's width, 16"):
        learn_nonuniform(KEY, NonUniformKeys(2, 16), x)
