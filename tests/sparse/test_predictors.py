"""Predictors, lists, the gathered perceptron and the count of what is read, each against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from hashml.accounting import stored_bytes
from hashml.models.decoder import DecoderConfig, param_shapes
from hashml.sparse.lists import top_list, top_mask, union_rows
from hashml.sparse.predictors import (
    example_weights,
    init_predictor,
    predict,
    recall_at,
    train_predictors,
    weighted_loss,
)
from hashml.sparse.residuals import Residuals, fixed_scores, random_scores, ranked
from hashml.sparse.weight_reads import neurons_for, weight_reads
from hashml_kernels.gathered_mlp import gathered_mlp

RNG = np.random.default_rng(0)

# --- predictors -----------------------------------------------------------------------------------


def test_a_target_weighs_one_and_the_others_their_share():
    target = RNG.random((50, 8)) < 0.2
    weights = np.asarray(example_weights(jnp.asarray(target), 0.005))
    share = np.float32(target.mean() + 0.005)
    np.testing.assert_allclose(weights, np.where(target, 1, share), rtol=1e-6)
    logits = RNG.normal(size=target.shape) * 3
    chance = scipy.special.expit(logits)
    expected = -np.where(target, np.log(chance), share * np.log1p(-chance)).mean()
    assert float(weighted_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(target))) == pytest.approx(
        expected, rel=1e-5
    )


def test_recall_is_counted_over_all_targets():
    logits, target = RNG.normal(size=(20, 9)), RNG.random((20, 9)) < 0.3
    hits = sum(target[row, place] for row in range(20) for place in np.argsort(-logits[row])[:4])
    found = recall_at(jnp.asarray(logits, jnp.float32), jnp.asarray(target), 4)
    assert float(found) == pytest.approx(hits / target.sum())
    assert float(recall_at(jnp.zeros((2, 9)), jnp.zeros((2, 9), bool), 4)) == 1


def test_a_predictor_is_two_products():
    predictor = init_predictor(jax.random.key(0), 300, 5, 7)
    first, second = (np.asarray(leaf, np.float64) for leaf in predictor)
    x = RNG.normal(size=(3, 300)).astype(np.float32)
    np.testing.assert_allclose(predict(predictor, jnp.asarray(x)), x @ first @ second, atol=1e-5)
    # 1,500 draws of variance 1/300: a variance of draws has the relative error sqrt(2/1500) = .037.
    assert first.var() * 300 == pytest.approx(1, abs=4 * 0.037)


@pytest.fixture(scope="module")
def planted():
    """Layers whose targets are the signs of a map of rank 3, and one whose targets are noise."""
    x = RNG.normal(size=(2, 1200, 8)).astype(np.float32)
    scores = x[0] @ RNG.normal(size=(8, 3)) @ RNG.normal(size=(3, 20)) - 5
    target = np.stack([scores > 0, RNG.random((1200, 20)) < 0.25])
    found = train_predictors(
        jax.random.key(0), x, target, rank=3, top=10, learning_rate=0.02, batch=100, epochs=20, validation=0.2
    )
    return x, target, found


def test_training_finds_a_map_of_low_rank(planted):
    x, target, found = planted
    late = slice(960, None)  # the last fifth, held out
    for layer in range(2):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], found.predictor)
        recall = float(recall_at(predict(own, jnp.asarray(x[layer, late])), jnp.asarray(target[layer, late]), 10))
        assert float(found.recall[layer]) == pytest.approx(recall, abs=1e-6)
    # Rows with more than 10 targets miss some whatever is chosen.
    counts = target[0, late].sum(axis=-1)
    assert float(found.recall[0]) > 0.97 * np.minimum(counts, 10).sum() / counts.sum()
    # Of noise 10 of 20 outputs hold one half: 240 x 5 targets, standard error .5 / sqrt(1200), best of 20 epochs.
    assert abs(float(found.recall[1]) - 0.5) < 5 * 0.5 / 1200**0.5


def test_training_ends_where_nothing_is_gained(planted):
    found = planted[2]
    assert int(found.epochs[1]) <= 20
    if float(found.recall[0]) > 0.99:
        assert int(found.epochs[0]) < 20
    else:
        assert int(found.epochs[0]) <= 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it is at least 1"),
        ({"top": 21}, r"top is 21; it must lie in 1\.\.20"),
        ({"validation": 1.0}, "validation is 1.0; it lies between 0 and 1"),
        ({"batch": 2000}, "batch is 2000; queries leave 1140 positions"),
    ],
)
def test_bad_training(planted, options, message):
    x, target, _ = planted
    with pytest.raises(ValueError, match=message):
        train_predictors(jax.random.key(0), x, target, **({"rank": 3, "top": 10} | options))


# --- lists ----------------------------------------------------------------------------------------


def test_masks_hold_exactly_the_largest_and_of_equals_the_first():
    scores = RNG.integers(-3, 4, (200, 17)).astype(np.float32) / 4
    scores[:50] = RNG.normal(size=(50, 17)).astype(np.float32) * 1e-3
    ranks = np.argsort(np.argsort(-scores, axis=-1, kind="stable"), axis=-1, kind="stable")
    masks = jax.jit(top_mask)
    for count in (0, 1, 6, 17):
        np.testing.assert_array_equal(masks(jnp.asarray(scores), jnp.int32(count)), ranks < count)
    np.testing.assert_array_equal(
        top_list(jnp.asarray(scores), 6), np.sort(np.argsort(-scores, axis=-1, kind="stable")[:, :6], axis=-1)
    )


def test_a_union_is_a_set():
    idx = np.array([[1, 5, 9], [5, 2, 1]], np.int32)
    found, valid = union_rows(jnp.asarray(idx), 11)
    assert found.shape == (6,)
    np.testing.assert_array_equal(np.asarray(found)[np.asarray(valid)], np.unique(idx))
    found, valid = union_rows(jnp.asarray(idx), 10)
    assert found.shape == (6,)
    assert int(valid.sum()) == 4
    assert union_rows(jnp.asarray(idx[:, :1]), 1)[0].shape == (1,)


def test_fixed_and_random_scores():
    worth = np.array([[3.0, 1.0, 3.0, 7.0]])
    order = ranked(worth)
    np.testing.assert_array_equal(np.argsort(-np.asarray(order[0])), [3, 0, 2, 1])
    x = jnp.zeros((2, 5, 8))
    seen = Residuals(x, None, x, x)
    scores = fixed_scores({"order": order[0]}, seen, jnp.zeros((2, 5, 4)))
    np.testing.assert_array_equal(scores, np.broadcast_to(order[0], (2, 5, 4)))
    for found, outputs in ((jnp.zeros((2, 5, 4)), 4), (jnp.zeros((2, 3, 5, 7)), 3)):
        draws = np.asarray(random_scores({"draw": jnp.int32(4)}, seen, found))
        assert draws.shape == (2, 5, outputs)
        assert len(np.unique(draws)) == draws.size


# --- a perceptron of few neurons ------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gathered_is_masked(gated, shared):
    rows, width, neurons, count = 3, 7, 13, 5
    x = RNG.normal(size=(rows, width))
    w_in, w_out, w_gate = (RNG.normal(size=(neurons, width)) for _ in range(3))
    idx = np.stack([RNG.permutation(neurons)[:count] for _ in range(rows)]).astype(np.int32)
    valid = RNG.random((rows, count)) < 0.7
    if shared:
        idx, valid = idx[0], valid[0]
    mask = np.zeros((rows, neurons))
    for row in range(rows):
        own = (slice(None),) if shared else (row,)
        mask[row, idx[own][valid[own]]] = 1
    hidden = np.maximum(x @ w_in.T, 0) * (x @ w_gate.T if gated else 1) * mask
    given, rows_in, rows_out = (jnp.asarray(leaf, jnp.float32) for leaf in (x, w_in, w_out))
    gate = jnp.asarray(w_gate, jnp.float32) if gated else None
    found = gathered_mlp(given, rows_in, rows_out, jnp.asarray(idx), jnp.asarray(valid), w_gate=gate)
    np.testing.assert_allclose(found, hidden @ w_out, atol=1e-5)
    low, low_in, low_out = (jnp.asarray(leaf, jnp.bfloat16) for leaf in (x, w_in, w_out))
    whole = gathered_mlp(low, low_in, low_out, jnp.asarray(idx))
    assert whole.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        whole, gathered_mlp(low, low_in, low_out, jnp.asarray(idx), jnp.ones(idx.shape, bool))
    )


# --- what is read ---------------------------------------------------------------------------------

CONFIG = DecoderConfig(vocabulary=30, features=16, layers=3, heads=4, kv_heads=2, head_dim=8, hidden=24,
                       activation="relu", gated=False)  # fmt: skip


def test_a_dense_step_reads_every_weight_and_a_row_of_the_embedding():
    for gated, bias in ((False, False), (True, True)):
        config = DecoderConfig(vocabulary=30, features=16, layers=3, heads=4, kv_heads=2, head_dim=8, hidden=24,
                               activation="relu", gated=gated, qkv_bias=bias)  # fmt: skip
        tree = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), param_shapes(config),
                            is_leaf=lambda leaf: isinstance(leaf, tuple))  # fmt: skip
        whole = weight_reads(config, neurons=24, heads=4, key_heads=2)
        assert 4 * whole.total == stored_bytes(tree) + 4 * 16


def test_sparse_reads_count_predictors():
    whole = weight_reads(CONFIG, neurons=24, heads=4, key_heads=2)
    some = weight_reads(CONFIG, neurons=6, heads=2, key_heads=1.5, neuron_rank=5, head_rank=2)
    assert some.neurons == whole.neurons / 4
    assert some.heads == whole.heads / 2
    assert some.keys_values == whole.keys_values * 0.75
    assert some.predictors == 3 * (5 * (16 + 24) + 2 * (16 + 4))
    assert some.total == sum(some)
    # A predictor of rank 5 is 200 weights, a neuron 32: seven of them are no fewer.
    assert neurons_for(CONFIG, 6, 5) == 13
    assert neurons_for(CONFIG, 20, 5) == 24
    with pytest.raises(ValueError, match=r"neurons is 25; it must lie in 0\.\.24"):
        weight_reads(CONFIG, neurons=25, heads=4, key_heads=2)
    with pytest.raises(ValueError, match="head_rank is -1; it must not be negative"):
        weight_reads(CONFIG, neurons=2, heads=4, key_heads=2, head_rank=-1)
