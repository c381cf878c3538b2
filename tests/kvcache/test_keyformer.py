"""Keyformer: limits of the Gumbel softmax, and its identity with H2O where noise and temperature are off."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.kvcache.contract import MASKED, Attention, masked_softmax
from hashml.kvcache.dense import Dense
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.keyformer import Keyformer, gumbel_softmax
from hashml.kvcache.spec import LayerSpec

H, J, N = 2, 2, 6
KEY = jax.random.key(0)
SOFTMAX = np.asarray([0.114, 0.024, 0.055, 0.755, 0.012, 0.040])
MEANS = {
    0.01: (0.116, 0.025, 0.054, 0.752, 0.012, 0.041),
    1.0: (0.161, 0.051, 0.093, 0.593, 0.028, 0.074),
    2.0: (0.182, 0.089, 0.130, 0.423, 0.063, 0.113),
}
"""Means of f that a simulation of 100,000 draws printed, to three places."""


def layer_spec(policy: Any, **changes: Any) -> LayerSpec:
    settings: dict[str, Any] = {"kv_heads": H, "query_heads": H * J, "head_dim": 4, "slots": 4, "window": 2}
    settings |= {"key_codec": Dense(), "value_codec": Dense(), "rotary": None, "rope": "none"}
    return LayerSpec(policy=policy, **(settings | changes))


def attention(seed: int, batch: int = 2) -> Attention:
    """One query over N slots, of which some are empty."""
    rng = np.random.default_rng(seed)
    valid = jnp.asarray(rng.random((batch, 1, 1, 1, N)) < 0.8).at[..., 0].set(True)
    logits = jnp.asarray(rng.normal(size=(batch, H, J, 1, N)) * 2, jnp.float32)
    logits = jnp.where(valid, logits, MASKED)
    return Attention(logits, masked_softmax(logits, valid), valid)


def draws(logits: np.ndarray, tau: float, count: int, seed: int = 0) -> np.ndarray:
    x = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, logits.size))
    return np.asarray(gumbel_softmax(x, jnp.ones(x.shape, bool), tau, jax.random.key(seed)), np.float64)


@pytest.mark.parametrize("tau", MEANS)
def test_means_are_those_of_the_printed_example(tau):
    """Both are simulations: their standard errors add up. The logits are known to the softmax's three places."""
    count = 50_000
    f = draws(np.log(SOFTMAX), tau, count)
    error = f.std(axis=0) * np.sqrt(1 / count + 1 / 100_000)
    # A softmax value off by half a unit moves its logit by 0.0005 / p, and f by at most f / (4 tau) a logit's unit
    # in the mean of sigmoids; near tau = 0 by that much itself.
    rounding = 0.0005 + np.minimum(0.0005, np.asarray(MEANS[tau]) * 0.0005 / SOFTMAX) * 2
    assert (np.abs(f.mean(axis=0) - MEANS[tau]) < 4 * error + rounding).all()


def test_without_temperature_the_mean_over_noise_is_the_softmax():
    """The Gumbel-max theorem, in standard errors."""
    logits = np.asarray([0.3, -1.0, 2.0, 0.0, 1.1])
    softmax = np.exp(logits) / np.exp(logits).sum()
    f = draws(logits, 1e-4, 40_000)
    np.testing.assert_array_less(np.abs(f.mean(axis=0) - softmax), 4 * np.sqrt(softmax * (1 - softmax) / 40_000))
    assert (f.max(axis=1) > 0.99).mean() > 0.99


def test_at_an_infinite_temperature_all_keys_are_equal():
    np.testing.assert_allclose(draws(np.log(SOFTMAX), 1e7, 100), 1 / 6, rtol=1e-4)


def test_at_temperature_one_the_mean_is_flatter_than_the_softmax():
    """Its entropy is larger, and every key moves towards the uniform share."""
    count = 20_000
    f = draws(np.log(SOFTMAX), 1.0, count)
    towards = np.sign(1 / 6 - SOFTMAX) * (f.mean(axis=0) - SOFTMAX)
    assert (towards > 4 * f.std(axis=0) / np.sqrt(count)).all()


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_f_sums_to_one_over_the_keys_seen(tau):
    seen = attention(1)
    f = gumbel_softmax(seen.logits, seen.valid, tau, KEY)
    np.testing.assert_allclose(f.sum(axis=-1), 1, rtol=1e-6)
    assert (np.where(seen.valid, 0, f) == 0).all()
    nothing = gumbel_softmax(seen.logits, jnp.zeros_like(seen.valid), tau, KEY)
    assert (nothing == 0).all()


@pytest.mark.parametrize("jitted", [False, True])
def test_without_noise_and_temperature_it_is_h2o_bit_for_bit(jitted):
    seen = attention(2)
    plain, heavy = Keyformer(tau_start=1, tau_end=1, noise=False), HeavyHitters()
    spec, pos = layer_spec(plain), jnp.zeros((2, H, N), jnp.int32)
    wrap = jax.jit if jitted else lambda f: f
    for step in range(3):
        one, other = (
            wrap(lambda state, step, p=p: p.observe(spec, state, seen, pos, KEY, step))(
                p.init(spec, 2), jnp.asarray(step)
            )
            for p in (plain, heavy)
        )
        np.testing.assert_array_equal(one["sum"], other["sum"])
    one, other = (wrap(p.weigh)(seen.logits, seen.valid, KEY, jnp.asarray(0)) for p in (plain, heavy))
    np.testing.assert_array_equal(one, other)
    # Near temperature 1 it is the formula's value and not the shortcut's.
    near = Keyformer(tau_start=1, tau_end=np.nextafter(1, 2), noise=False)
    state = near.observe(spec, near.init(spec, 2), seen, pos, KEY, jnp.asarray(0))
    np.testing.assert_allclose(state["sum"], seen.probs.mean(axis=2)[:, :, 0], rtol=1e-5)


def test_temperature_rises_with_the_tokens_and_then_stays():
    policy = Keyformer(tau_start=1.0, tau_end=3.0, new_tokens=8)
    np.testing.assert_allclose([policy.tau(t) for t in (0, 1, 4, 8, 9, 1000)], [1, 1.25, 2, 3, 3, 3])
    for start, end in ((0.3, 0.7), (1.1, 0.1)):
        ends = Keyformer(tau_start=start, tau_end=end, new_tokens=7)
        np.testing.assert_array_equal([ends.tau(0), ends.tau(7)], np.asarray([start, end], np.float32))


def test_a_step_uses_the_schedule_and_the_prompt_its_start():
    """Decode step s makes token s + 1; noise off, so that the temperature alone shows."""
    seen = attention(3)
    policy = Keyformer(tau_start=1.5, tau_end=3.0, new_tokens=4, noise=False)
    spec, pos = layer_spec(policy), jnp.zeros((2, H, N), jnp.int32)
    for step in (0, 3, 10):
        tau = 1.5 + 1.5 * min(step + 1, 4) / 4
        f = policy.observe(spec, policy.init(spec, 2), seen, pos, KEY, jnp.asarray(step))["sum"]
        x = np.where(seen.valid, np.asarray(seen.logits, np.float64), -np.inf)[:, :, :, 0] / tau
        x = np.exp(x - x.max(axis=-1, keepdims=True))
        expected = (x / x.sum(axis=-1, keepdims=True)).mean(axis=2)
        np.testing.assert_allclose(f, expected, rtol=1e-5, atol=1e-7)
    first, later = (policy.weigh(seen.logits, seen.valid, KEY, jnp.asarray(step)) for step in (0, 9))
    np.testing.assert_array_equal(first, later)


def test_noise_is_fresh_for_every_step_head_query_and_phase():
    """The same logits everywhere, so that only noise can differ; and the same key gives the same again."""
    policy = Keyformer(new_tokens=1000)
    spec, pos = layer_spec(policy), jnp.zeros((2, H, N), jnp.int32)
    flat = jnp.zeros((2, H, J, 3, N))
    valid = jnp.ones((2, 1, 1, 3, N), bool)
    seen = Attention(flat, masked_softmax(flat, valid), valid)

    def sums(key: jax.Array, step: int) -> np.ndarray:
        return np.asarray(policy.observe(spec, policy.init(spec, 2), seen, pos, key, jnp.asarray(step))["sum"])

    np.testing.assert_array_equal(sums(KEY, 5), sums(KEY, 5))
    assert np.unique(np.stack([sums(KEY, 5), sums(KEY, 6), sums(jax.random.key(1), 5)])).size == 3 * 2 * H * N
    given = np.asarray(policy.weigh(flat, valid, KEY, jnp.asarray(5)))
    assert np.unique(given).size == given.size
    assert not np.allclose(given.mean(axis=2).sum(axis=2), sums(KEY, 5), rtol=1e-3)
