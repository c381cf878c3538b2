"""The choice of chunks: draws without replacement by enumeration, the clipped gradient, and what is learned."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from hashml.models.decoder import DecoderConfig, forward, init_params
from hashml.models.refrag_policy import (
    ChunkPolicy,
    chunk_nll,
    clipped_loss,
    greedy_selection,
    group_advantages,
    policy_step,
    sampled_selection,
    selection_log_prob,
)
from hashml.models.training import init_state

LOGITS = np.array([0.3, -1.2, 2.0, 0.5], np.float32)
ORDERED = list(itertools.permutations(range(4), 2))


def by_hand(chosen, logits=LOGITS):
    """The product of one softmax after the other, over what is left."""
    left, log_prob = list(range(len(logits))), 0.0
    for chunk in chosen:
        log_prob += logits[chunk] - float(scipy.special.logsumexp(logits[left]))
        left.remove(chunk)
    return log_prob


def test_the_log_probability_is_the_sum_of_masked_terms_and_of_a_distribution():
    found = np.asarray(selection_log_prob(jnp.tile(LOGITS, (12, 1)), np.array(ORDERED)))
    np.testing.assert_allclose(found, np.array([by_hand(chosen) for chosen in ORDERED]), rtol=1e-5)
    assert np.exp(found.astype(np.float64)).sum() == pytest.approx(1, abs=1e-6)
    whole = selection_log_prob(jnp.asarray(LOGITS), np.array([2, 0, 3, 1]))
    assert float(whole) == pytest.approx(by_hand([2, 0, 3, 1]), rel=1e-5)


def test_chunks_are_drawn_one_after_the_other_without_replacement():
    """Every ordered pair as often as its probability says, in binomial standard errors."""
    count = 20_000
    drawn = np.asarray(sampled_selection(jax.random.key(3), jnp.tile(LOGITS, (count, 1)), 2))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    for pair in ORDERED:
        p = np.exp(by_hand(pair))
        error = np.sqrt(p * (1 - p) / count)
        assert abs((drawn == pair).all(axis=1).mean() - p) < 4 * error


def test_greedy_takes_the_largest_logits():
    logits = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    found = np.asarray(greedy_selection(jnp.asarray(logits), 4))
    np.testing.assert_array_equal(found, np.argsort(-logits, axis=1)[:, :4])


def test_what_is_absent_is_drawn_last_and_counts_for_nothing():
    present = np.array([True, False, True, False])
    drawn = np.asarray(sampled_selection(jax.random.key(0), jnp.tile(LOGITS, (50, 1)), 3, np.tile(present, (50, 1))))
    assert (np.sort(drawn[:, :2], axis=1) == [0, 2]).all()
    assert np.asarray(greedy_selection(jnp.asarray(LOGITS), 2, present)).tolist() == [2, 0]
    found = selection_log_prob(jnp.asarray(LOGITS), np.array([0, 2, 1]), present)
    assert float(found) == pytest.approx(-np.log1p(np.exp(1.7)), rel=1e-5)


def test_advantages_are_standard_scores_and_zero_without_a_difference():
    rewards = np.random.default_rng(1).standard_normal((8, 3)).astype(np.float32)
    expected = (rewards - rewards.mean(axis=0)) / rewards.std(axis=0)
    np.testing.assert_allclose(group_advantages(jnp.asarray(rewards)), expected, atol=1e-4)
    equal = jnp.full((7, 3), -1.1)  # whose mean is not -1.1 in float32 by every order of summation
    assert not np.asarray(group_advantages(equal)).any()


def test_the_clipped_loss_and_its_gradient():
    ratios, advantages = np.array([0.5, 0.9, 1.1, 1.5, 0.5, 1.5]), np.array([1, 1, 1, 1, -1, -1.0])
    clipped = np.clip(ratios, 0.8, 1.2)
    expected = -np.minimum(ratios * advantages, clipped * advantages).mean()
    old = jnp.zeros(6)
    now = jnp.asarray(np.log(ratios), jnp.float32)
    value, grad = jax.value_and_grad(clipped_loss)(now, old, jnp.asarray(advantages, jnp.float32))
    assert float(value) == pytest.approx(expected, rel=1e-5)
    # Nothing moves where the ratio has already gone too far the right way: places 3 and 4.
    moves = np.array([1, 1, 1, 0, 0, 1])
    np.testing.assert_allclose(grad, -moves * ratios * advantages / 6, atol=1e-6)


# --- the policy ---------------------------------------------------------------------------------------

CHUNKS, WIDTH, COUNT = 6, 8, 2
POLICY = ChunkPolicy(features=16, layers=1, heads=2)
C = jax.random.normal(jax.random.key(2), (4, CHUNKS, WIDTH))


@functools.cache
def learned(kind):
    """Parameters at the start, the state after all steps and their mean rewards, of a policy that sees the question:
    the vector of the asked chunk. Rewarded is that this one is expanded, or all draws alike."""
    optimizer = optax.adam(1e-2)

    def apply(params, c, question):
        return jnp.asarray(POLICY.apply({"params": params}, c, question))

    def reward(chosen, asked):
        hit = (chosen == asked[:, None]).any(axis=1).astype(jnp.float32)
        return hit if kind == "asked" else jnp.full(hit.shape, -2.3)

    step = policy_step(apply, optimizer, reward, count=COUNT, group=8)
    start = jax.jit(POLICY.init)(jax.random.key(0), C, C[:, 0])["params"]
    state, rewards = init_state(start, optimizer), []
    rng = np.random.default_rng(3)
    for at in range(25 if kind == "asked" else 3):
        c = rng.standard_normal((32, CHUNKS, WIDTH)).astype(np.float32)
        asked = rng.integers(0, CHUNKS, 32)
        inputs = (c, c[np.arange(32), asked])
        state, mean = step(state, jax.random.fold_in(jax.random.key(1), at), inputs, (asked,))
        rewards.append(float(mean))
    return start, state, rewards


def test_the_policy_learns_to_expand_what_is_asked_for():
    """At first the asked chunk is among 2 of 6 by chance, which is a third; 256 draws a step."""
    start, state, rewards = learned("asked")
    assert rewards[0] == pytest.approx(1 / 3, abs=4 * np.sqrt(2 / 9 / 256))
    c = jax.random.normal(jax.random.key(9), (200, CHUNKS, WIDTH))
    asked = np.arange(200) % CHUNKS
    apply = jax.jit(lambda params: POLICY.apply({"params": params}, c, c[np.arange(200), asked]))
    for params, low, high in ((start, 0.0, 0.5), (state.params, 0.8, 1.0)):
        hits = (np.asarray(greedy_selection(apply(params), COUNT)) == asked[:, None]).any(axis=1)
        assert low <= hits.mean() <= high


def test_equal_rewards_teach_nothing():
    start, state, _ = learned("equal")
    assert int(state.step) == 3
    jax.tree.map(np.testing.assert_array_equal, start, state.params)


def test_without_positions_permuted_chunks_have_permuted_logits():
    """And without the question the policy is another one; what is absent changes nothing."""
    params = learned("asked")[1].params
    order = np.random.default_rng(4).permutation(CHUNKS)
    apply = jax.jit(lambda c, present: POLICY.apply({"params": params}, c, C[:, 0], present))
    everything = np.ones((4, CHUNKS), bool)
    base = np.asarray(apply(C, everything))
    np.testing.assert_allclose(apply(C[:, order], everything), base[:, order], atol=1e-4)
    assert base.std(axis=1).min() > 0.1
    some, other = everything.copy(), C.at[:, 1].add(1.0)
    some[:, 1] = False
    kept = np.flatnonzero(some[0])
    np.testing.assert_allclose(
        np.asarray(apply(C, some))[:, kept], np.asarray(apply(other, some))[:, kept], atol=1e-5
    )
    blind = jax.eval_shape(POLICY.init, jax.random.key(0), C)["params"]
    assert set(params) - set(blind) == {"question", "compare"}


def test_the_heuristic_is_the_nll_of_a_chunk_on_its_own():
    config = DecoderConfig(vocabulary=11, features=8, layers=1, heads=2, kv_heads=2, head_dim=4, hidden=16)
    params = jax.jit(lambda key: init_params(key, config))(jax.random.key(0))
    chunks = np.random.default_rng(5).integers(0, 11, (3, 4)).astype(np.int32)
    fed = np.concatenate([np.full((3, 1), 7, np.int32), chunks[:, :-1]], axis=1)
    logs = scipy.special.log_softmax(np.asarray(forward(params, config, jnp.asarray(fed)), np.float64), axis=-1)
    expected = -np.take_along_axis(logs, chunks[..., None], axis=-1)[..., 0].mean(axis=1)
    np.testing.assert_allclose(chunk_nll(params, config, chunks, 7), expected, atol=1e-5)
    with pytest.raises(ValueError, match="first is 11; allowed are ids from 0 to 10"):
        chunk_nll(params, config, chunks, 11)


def test_what_is_refused():
    logits = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="count is 4; it is from 0 to the 3 chunks"):
        greedy_selection(logits, 4)
    with pytest.raises(ValueError, match="count is -1; it is from 0 to the 3 chunks"):
        sampled_selection(jax.random.key(0), logits, -1)
    with pytest.raises(ValueError, match="rewards has a group of 1; a baseline needs at least 2"):
        group_advantages(jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="clip is 1.0; it is above 0 and below 1"):
        clipped_loss(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2), clip=1.0)
    with pytest.raises(ValueError, match="epochs is 0; it is at least 1"):
        policy_step(lambda params: logits, optax.sgd(0.1), lambda chosen: chosen, count=1, epochs=0)
    with pytest.raises(ValueError, match="group is 1; a baseline needs at least 2"):
        policy_step(lambda params: logits, optax.sgd(0.1), lambda chosen: chosen, count=1, group=1)
