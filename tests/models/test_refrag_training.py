"""Stages of training: what is frozen stays so to the bit, the curriculum is its formula, losses are the model's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from hashml.models.decoder import DecoderConfig
from hashml.models.refrag import RefragConfig, init_params, output_logits
from hashml.models.refrag_training import (
    continuation_step,
    curriculum,
    curriculum_weights,
    reconstruction_loss,
    reconstruction_state,
    reconstruction_step,
)
from hashml.models.training import init_state

DECODER = DecoderConfig(vocabulary=13, features=8, layers=1, heads=2, kv_heads=2, head_dim=4, hidden=16)
CONFIG = RefragConfig(DECODER, 3, features=8, layers=1, heads=2)
RNG = np.random.default_rng(0)
CONTEXT = RNG.integers(0, 13, (4, 6)).astype(np.int32)
OUTPUT = RNG.integers(0, 13, (4, 2)).astype(np.int32)
ASKED = RNG.integers(0, 13, (4, 1)).astype(np.int32)
MARKER = 12


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(key, CONFIG))(jax.random.key(0))


run = jax.jit(output_logits, static_argnames="config")


def nll(logits, tokens):
    logs = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    return -np.take_along_axis(logs, tokens[..., None], axis=-1)[..., 0]


def test_the_first_stage_repeats_the_context_and_leaves_the_decoder_alone(params):
    optimizer = optax.adam(1e-2)
    step = reconstruction_step(CONFIG, optimizer, marker=MARKER)
    state = reconstruction_state(params, optimizer)
    assert set(state.params) == {"encoder", "projector"}
    before = jax.tree.map(np.array, params["decoder"])
    losses = []
    for _ in range(20):
        state, loss = step(state, params["decoder"], CONTEXT)
        losses.append(float(loss))
    marked = np.full((4, 1), MARKER, np.int32)
    expected = nll(run(params, CONFIG, marked, CONTEXT, CONTEXT), CONTEXT).mean()
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.1
    jax.tree.map(np.testing.assert_array_equal, before, params["decoder"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, {k: params[k] for k in state.params})
    assert min(jax.tree.leaves(moved["projector"])) > 0
    # Nor would it move if its gradient were asked for.
    adapter = {name: params[name] for name in state.params}
    grads = jax.grad(lambda decoder: reconstruction_loss(adapter, decoder, CONFIG, CONTEXT, MARKER))(
        params["decoder"]
    )
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


def test_the_second_stage_trains_all_and_weighs_tokens(params):
    step = continuation_step(CONFIG, optax.sgd(0.1))
    weight, chosen = np.array([[1, 0]] * 3 + [[1, 1]], np.float32), np.array([[1], [0], [1], [1]], np.int32)
    state, loss = step(init_state(params, optax.sgd(0.1)), ASKED, CONTEXT, OUTPUT, weight, chosen)
    each = nll(run(params, CONFIG, ASKED, CONTEXT, OUTPUT, chosen), OUTPUT)
    assert float(loss) == pytest.approx((each * weight).sum() / 5, rel=1e-5)
    for part in ("decoder", "encoder", "projector"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params[part], params[part])
        assert max(jax.tree.leaves(moved)) > 0, part


def test_the_curriculum_is_its_formula():
    counts = (1, 2, 4, 8, 16)
    for stage in range(5):
        expected = scipy.special.softmax(-np.abs(stage - np.arange(5)))
        np.testing.assert_allclose(curriculum_weights(counts, stage), expected, rtol=1e-12)
    # Counts that are no powers of two are apart by their logarithms.
    weights = curriculum_weights((4, 16, 32), 1)
    np.testing.assert_allclose(weights, scipy.special.softmax([-2.0, 0, -1]), rtol=1e-12)


def test_every_stage_draws_by_its_weights():
    counts, steps = (1, 4, 16), 3001
    drawn = curriculum(jax.random.key(0), counts, steps)
    assert drawn.shape == (steps,)
    assert set(drawn) == set(counts)
    for stage in range(3):
        part = drawn[1000 * stage : 1000 * (stage + 1)]
        for count, p in zip(counts, curriculum_weights(counts, stage), strict=True):
            assert abs((part == count).mean() - p) < 4 * np.sqrt(p * (1 - p) / 1000)
    assert curriculum(jax.random.key(0), (8,), 5).tolist() == [8] * 5


def test_what_is_refused(params):
    adapter = {name: params[name] for name in ("encoder", "projector")}
    with pytest.raises(ValueError, match="marker is 13; allowed are ids from 0 to 12"):
        reconstruction_loss(adapter, params["decoder"], CONFIG, jnp.asarray(CONTEXT), 13)
    with pytest.raises(ValueError, match=r"counts is \(1, 4, 4\); they are at least 1 and rising"):
        curriculum_weights((1, 4, 4), 0)
    with pytest.raises(ValueError, match=r"counts is \(0, 4\); they are at least 1 and rising"):
        curriculum_weights((0, 4), 0)
    with pytest.raises(ValueError, match="stage is 2; it is from 0 to 1"):
        curriculum_weights((1, 4), 2)
    with pytest.raises(ValueError, match="steps is 2; 3 stages take at least as many"):
        curriculum(jax.random.key(0), (1, 2, 4), 2)
