"""Keyformer: limits of the Gumbel softmax, and its identity with H2O where noise and temperature are off."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.kvcache.attending import attend, observe
from hashml.kvcache.contract import MASKED, Attention, Queries, masked_softmax
from hashml.kvcache.dense import Dense
from hashml.kvcache.eviction import append, evict
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.keyformer import Keyformer, gumbel_softmax
from hashml.kvcache.noise import gumbel, pair_draws
from hashml.kvcache.prefill import prefill_layer
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerCache, LayerTables, all_positions

H, J, N = 2, 2, 6
KEYS = jax.random.split(jax.random.key(0), 2)
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


def asks(first: int, keys: jax.Array = KEYS, count: int = 1, born: int = 0) -> Queries:
    """Queries at ``first`` and after it, in both rows."""
    pos = jnp.broadcast_to(first + jnp.arange(count, dtype=jnp.int32), (2, count))
    return Queries(pos, keys, jnp.full(2, born, jnp.int32))


def places(batch: int = 2) -> jax.Array:
    """Positions of the slots."""
    return jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (batch, H, N))


@functools.cache
def noise(count: int, keys: int, seed: int = 0) -> np.ndarray:
    """Gumbel noise ``[count, keys]`` of one head's queries, as a long prompt has it."""
    query_pos, pos = jnp.arange(count, dtype=jnp.int32)[None], jnp.arange(keys, dtype=jnp.int32)[None, None]
    return np.asarray(gumbel(pair_draws(jax.random.split(jax.random.key(seed), 1), query_pos, pos, 1, 1))[0, 0, 0])


def draws(logits: np.ndarray, tau: float, count: int, seed: int = 0) -> np.ndarray:
    x = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, logits.size))
    drawn = jnp.asarray(noise(count, logits.size, seed))
    return np.asarray(gumbel_softmax(x, jnp.ones(x.shape, bool), tau, drawn), np.float64)


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
    drawn = gumbel(pair_draws(KEYS, asks(7).pos, places(), H, J))
    f = gumbel_softmax(seen.logits, seen.valid, tau, drawn)
    np.testing.assert_allclose(f.sum(axis=-1), 1, rtol=1e-6)
    assert (np.where(seen.valid, 0, f) == 0).all()
    nothing = gumbel_softmax(seen.logits, jnp.zeros_like(seen.valid), tau, drawn)
    assert (nothing == 0).all()


@pytest.mark.parametrize("jitted", [False, True])
def test_without_noise_and_temperature_it_is_h2o_bit_for_bit(jitted):
    seen = attention(2)
    plain, heavy = Keyformer(tau_start=1, tau_end=1, noise=False), HeavyHitters()
    spec, pos = layer_spec(plain), places()
    wrap = jax.jit if jitted else lambda f: f
    for at in range(3):
        one, other = (
            wrap(lambda state, asking, p=p: p.observe(spec, state, seen, pos, asking))(p.init(spec, 2), asks(at))
            for p in (plain, heavy)
        )
        np.testing.assert_array_equal(one["sum"], other["sum"])
    one, other = (wrap(p.weigh)(seen.logits, seen.valid, pos, asks(0)) for p in (plain, heavy))
    np.testing.assert_array_equal(one, other)
    # Near temperature 1 it is the formula's value and not the shortcut's.
    near = Keyformer(tau_start=1, tau_end=np.nextafter(1, 2), noise=False)
    state = near.observe(spec, near.init(spec, 2), seen, pos, asks(0))
    np.testing.assert_allclose(state["sum"], seen.probs.mean(axis=2)[:, :, 0], rtol=1e-5)


def test_temperature_rises_with_the_tokens_and_then_stays():
    policy = Keyformer(tau_start=1.0, tau_end=3.0, new_tokens=8)
    np.testing.assert_allclose([policy.tau(t) for t in (-5, 0, 1, 4, 8, 9, 1000)], [1, 1, 1.25, 2, 3, 3, 3])
    for start, end in ((0.3, 0.7), (1.1, 0.1)):
        ends = Keyformer(tau_start=start, tau_end=end, new_tokens=7)
        np.testing.assert_array_equal([ends.tau(0), ends.tau(7)], np.asarray([start, end], np.float32))


def test_a_query_uses_the_schedule_by_its_own_place_and_a_prompt_its_start():
    """The query at position p of a row with a prompt of T makes token p + 1 - T, in a step of one or of many, in each
    row; noise off, so that the temperature alone shows."""
    seen = attention(3)
    policy = Keyformer(tau_start=1.5, tau_end=3.0, new_tokens=4, noise=False)
    spec, pos = layer_spec(policy), places()

    def expected(tokens: int) -> np.ndarray:
        tau = 1.5 + 1.5 * min(tokens, 4) / 4
        x = np.where(seen.valid, np.asarray(seen.logits, np.float64), -np.inf)[:, :, :, 0] / tau
        x = np.exp(x - x.max(axis=-1, keepdims=True))
        return (x / x.sum(axis=-1, keepdims=True)).mean(axis=2)

    for tokens in (1, 4, 11):
        f = policy.observe(spec, policy.init(spec, 2), seen, pos, asks(8 + tokens, born=9))["sum"]
        np.testing.assert_allclose(f, expected(tokens), rtol=1e-5, atol=1e-7)
    # Two queries at once, in rows of different age.
    twice = Attention(*(jnp.repeat(x, 2, axis=3) for x in seen))
    two = Queries(jnp.asarray([[9, 10], [3, 4]]), KEYS, jnp.asarray([9, 1]))
    f = policy.observe(spec, policy.init(spec, 2), twice, pos, two)["sum"]
    for row, tokens in enumerate(((1, 2), (3, 4))):
        np.testing.assert_allclose(f[row], sum(expected(t)[row] for t in tokens), rtol=1e-5, atol=1e-7)
    first, later = (policy.weigh(seen.logits, seen.valid, pos, asks(at, born=20)) for at in (0, 19))
    np.testing.assert_array_equal(first, later)


def test_noise_is_fresh_for_every_query_key_head_and_row_and_the_same_for_the_same():
    """The same logits everywhere, so that only noise can differ."""
    policy = Keyformer(new_tokens=1000)
    spec, pos = layer_spec(policy), places()
    flat = jnp.zeros((2, H, J, 3, N))
    valid = jnp.ones((2, 1, 1, 3, N), bool)
    seen = Attention(flat, masked_softmax(flat, valid), valid)

    def sums(keys: jax.Array, at: int) -> np.ndarray:
        return np.asarray(policy.observe(spec, policy.init(spec, 2), seen, pos, asks(at, keys, 3))["sum"])

    np.testing.assert_array_equal(sums(KEYS, 5), sums(KEYS, 5))
    other = jax.random.split(jax.random.key(1), 2)
    assert np.unique(np.stack([sums(KEYS, 5), sums(KEYS, 8), sums(other, 5)])).size == 3 * 2 * H * N
    given = np.asarray(policy.weigh(flat, valid, pos, asks(5, count=3)))
    assert np.unique(given).size == given.size
    # A row at another place of the batch, with slots in another order.
    turned = asks(5, KEYS[::-1], 3)
    order = np.random.default_rng(0).permutation(N)
    moved = policy.weigh(flat[..., order], valid, pos[..., order], turned)
    np.testing.assert_allclose(moved[::-1], given[..., order], rtol=1e-6)


def test_noise_is_gumbel_and_that_of_two_queries_or_keys_is_uncorrelated():
    """Mean Euler's constant, variance pi^2 / 6, and no covariance, in standard errors."""
    count = 20_000
    drawn = noise(count, 6).astype(np.float64)
    variance = np.pi**2 / 6
    assert np.isfinite(drawn).all()
    assert abs(drawn.mean() - np.euler_gamma) < 4 * np.sqrt(variance / drawn.size)
    # The fourth central moment of a Gumbel variable is 5.4 variances squared.
    assert abs(drawn.var() - variance) < 4 * variance * np.sqrt(4.4 / drawn.size)
    centred = drawn - np.euler_gamma
    for other in (np.roll(centred, 1, axis=0), np.roll(centred, 1, axis=1), centred[np.arange(count) ^ 1]):
        assert abs((centred * other).mean()) < 4 * variance / np.sqrt(drawn.size)


@pytest.mark.parametrize("count", [1, 2])
def test_a_longer_prompt_is_a_shorter_one_and_steps_with_noise(count):
    """As long as all is kept and the temperature stays: the noise of a query and a key is theirs alone."""
    spec = layer_spec(Keyformer(tau_start=1.5, tau_end=1.5), slots=12, window=2 * count, flush=count)
    total, prompt = 10, 6
    q, k, v = (jax.random.normal(jax.random.key(i), (2, heads, total, 4)) for i, heads in enumerate((H * J, H, H)))
    pos = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), (2, total))
    whole = prefill_layer(spec, LayerTables(), q, k, v, pos, KEYS)
    first = [x[:, :, :prompt] for x in (q, k, v)]
    layer = prefill_layer(spec, LayerTables(), first[0], first[1], first[2], pos[:, :prompt], KEYS)

    @jax.jit
    def step(layer: Any, at: jax.Array) -> Any:
        now, head = jnp.full(2, at), (at - prompt) % spec.window
        new = [jax.lax.dynamic_slice_in_dim(x, at, count, axis=2) for x in (q, k, v)]
        asking = jax.lax.dynamic_slice_in_dim(pos, at, count, axis=1)
        layer = evict(spec, LayerTables(), layer, head, now)
        layer = append(spec, LayerTables(), layer, head, new[1], new[2], asking, now)
        _, found = attend(spec, LayerTables(), layer, new[0], asking)
        return observe(spec, layer, found, Queries(asking, KEYS, jnp.full(2, prompt)))

    for at in range(prompt, total, count):
        layer = step(layer, jnp.asarray(at, jnp.int32))
    for one, other in zip(sums_by_position(spec, whole), sums_by_position(spec, layer), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def sums_by_position(spec: LayerSpec, layer: LayerCache) -> list[np.ndarray]:
    """Of each row and head, those of its tokens by age."""
    pos, sums = (np.asarray(x).reshape(2 * H, -1) for x in (all_positions(spec, layer), layer.policy["sum"]))
    return [s[np.argsort(p)][(p < 0).sum() :] for p, s in zip(pos, sums, strict=True)]
