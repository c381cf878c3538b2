"""The trainer: updating looked-up rows is Adagrad on the whole table, and choices use validation alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data.planted import PlantedLog
from experiments.sharing import training
from experiments.sharing.click_models import embedding, train_and_score
from experiments.sharing.robe import law
from hashml.models.dlrm import DLRM, binary_cross_entropy

SIZES = (20, 30)


def test_a_full_table_by_rows_equals_dense_adagrad():
    module = embedding("full", SIZES, features=4, budget=0)
    model = DLRM(module, bottom=(), top=(8, 1))
    rng = np.random.default_rng(0)
    # Few ids, so that rows repeat within a batch and between batches.
    batches = [jnp.asarray(rng.integers(0, 5, (16, 2)), jnp.int32) for _ in range(4)]
    labels = jnp.asarray(rng.integers(0, 2, 16), jnp.float32)
    params = model.init(jax.random.key(0), None, batches[0])["params"]

    optimizer = training.adagrad(0.1)
    dense, opt_state = params, optimizer.init(params)
    state = training.start(params, "embedding", module)
    for ids in batches:

        def loss(params, rows, ids=ids):
            if rows is None:
                logits = model.apply({"params": params}, None, ids)
            else:
                logits = model.apply({"params": params}, None, rows, method="head")
            return binary_cross_entropy(jnp.asarray(logits), labels)

        updates, opt_state = optimizer.update(jax.grad(lambda p, loss=loss: loss(p, None))(dense), opt_state)
        dense = optax.apply_updates(dense, updates)
        state = training.adagrad_step(state, 0.1, module, ids, loss)
    found = training.parameters(state, "embedding")
    assert jax.tree.structure(found) == jax.tree.structure(dense)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_training_learns_and_reports_the_chosen_moment():
    log = PlantedLog(rows=8192 + 2048 + 2048, table_sizes=(50, 50, 50, 50), seed=1)
    parts = (log.batch(0, 8192), log.batch(8192, 10240), log.batch(10240, 12288))
    module = embedding("robe", log.table_sizes, features=8, budget=800, block_size=8)
    outcome = train_and_score(
        module, parts, learning_rates=(0.001, 0.1), epochs=2, batch_size=128, seed=0, evaluations=2
    )
    assert outcome.test_auc > 0.7
    assert outcome.learning_rate == pytest.approx(0.1)
    assert len(outcome.curve) == 4
    assert outcome.validation_auc == max(outcome.curve)
    assert outcome.steps == (int(np.argmax(outcome.curve)) + 1) * 32
    assert outcome.embedding_bytes == 4 * 800


@pytest.mark.parametrize("method", ["robe", "hashing_trick", "quotient_remainder", "narrow"])
def test_contenders_fit_the_budget(method):
    module = embedding(method, SIZES, features=8, budget=120, block_size=8)
    params = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) <= 120


def test_an_unknown_contender_is_refused():
    with pytest.raises(ValueError, match="method is 'lma'"):
        embedding("lma", SIZES, features=8, budget=120)


def test_the_variance_law_counts_pairs_of_different_blocks():
    """Against the sum over pairs that it came from: each pair of coordinates in different blocks adds once."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 64))
    for block_size in (1, 4, 16):
        pairs = 0.0
        for i in range(64):
            for j in range(64):
                if i // block_size != j // block_size:
                    pairs += (x[i] ** 2 * y[j] ** 2 + x[i] * y[i] * x[j] * y[j]) / 16
        assert law(x, y, block_size) == pytest.approx(pairs)
