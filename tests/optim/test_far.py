"""FAR: the same function in two halves, exact gradients, frozen bits, and what the backward pass keeps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from hashml.models import encoder
from hashml.models.decoder import DecoderConfig, init_params
from hashml.optim.far import (
    FeedForward,
    SplitFeedForward,
    choose_learners,
    feed_forward,
    frozen_part,
    gelu,
    learner_optimizer,
    magnitude_scores,
    merge,
    node_scores,
    random_scores,
    reconfigure,
    split_feed_forward,
    trained_part,
    with_frozen,
)
from hashml.optim.residuals import residual_bytes, residuals

D, H, ROWS, LAYERS = 6, 10, 7, 3


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def perceptron(*layers: int, gated: bool = False) -> FeedForward:
    gate = drawn(4, *layers, D, H) if gated else None
    found = FeedForward(drawn(0, *layers, D, H), drawn(1, *layers, H, D), drawn(2, *layers, H), drawn(3, *layers, D),
                        gate)  # fmt: skip
    return jax.tree.map(jnp.asarray, found)


X = drawn(9, ROWS, D)
ONE = perceptron()
run = jax.jit(feed_forward, static_argnames=("activation", "kept"))
run_split = jax.jit(split_feed_forward, static_argnames=("activation", "recompute"))


def by_numpy(ffn: FeedForward, x: np.ndarray) -> np.ndarray:
    """float64, with the exact GELU."""
    up, down, up_bias, down_bias, gate = (None if leaf is None else np.asarray(leaf, np.float64) for leaf in ffn)
    assert up is not None
    assert down is not None
    z = x @ up + (0 if up_bias is None else up_bias)
    first = z if gate is None else x @ gate
    hidden = first * scipy.special.ndtr(first) * (1 if gate is None else z)
    return hidden @ down + (0 if down_bias is None else down_bias)


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.int32), np.asarray(b).view(np.int32))


# --- the same function --------------------------------------------------------------------------------

FORMS = {
    "biases": ONE,
    "no biases": ONE._replace(up_bias=None, down_bias=None),
    "gated": perceptron(gated=True)._replace(down_bias=None),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [0, 4, H])
def test_reconfigured_perceptron_is_the_same_function(form, count):
    ffn = FORMS[form]
    learners = np.random.default_rng(count).permutation(H)[:count].astype(np.int32)
    split = reconfigure(ffn, learners)
    expected = by_numpy(ffn, X)
    np.testing.assert_allclose(run(ffn, X), expected, atol=2e-5)
    np.testing.assert_allclose(run_split(split, X), expected, atol=2e-5)
    np.testing.assert_array_equal(split.learner.up, np.asarray(ffn.up)[:, learners])
    np.testing.assert_array_equal(split.learner.down, np.asarray(ffn.down)[learners])
    assert_same_bits(merge(split, learners), ffn)


def test_all_units_in_order_are_the_perceptron_itself():
    split = reconfigure(ONE, np.arange(H, dtype=np.int32))
    assert_same_bits(split.learner, ONE)
    np.testing.assert_array_equal(run_split(split, X), run(ONE, X))


def test_stacked_layers_have_learners_of_their_own_and_trees_are_split_inside():
    stacked, learners = perceptron(LAYERS), np.array([[7, 0], [1, 2], [9, 3]], np.int32)
    state = optax.adam(0.1).init({"ffn": stacked, "other": jnp.ones(2)})  # pyright: ignore[reportArgumentType]
    tree = {"ffn": stacked, "other": jnp.ones(2), "state": state}
    split = reconfigure(tree, learners)
    up, down = np.asarray(stacked.up), np.asarray(stacked.down)
    for layer, chosen in enumerate(learners):
        others = np.setdiff1d(np.arange(H), chosen)
        np.testing.assert_array_equal(split["ffn"].learner.down[layer], down[layer, chosen])
        np.testing.assert_array_equal(split["ffn"].frozen.up[layer], up[layer][:, others])
    assert split["state"][0].nu["ffn"].frozen.down.shape == (LAYERS, H - 2, D)
    assert_same_bits(merge(split, learners), tree)
    assert_same_bits(with_frozen(trained_part(split["ffn"]), frozen_part(split["ffn"])), split["ffn"])


def test_perceptrons_of_the_library_s_encoder_and_decoder():
    """Split in the middle of a block, the perceptron of each model gives what the model's own lines give."""
    tiny = encoder.EncoderConfig(vocabulary=5, features=D, layers=1, heads=2, hidden=H, context=4)
    llama = DecoderConfig(vocabulary=5, features=D, layers=1, heads=2, kv_heads=2, head_dim=4, hidden=H,
                          activation="silu", gated=True)  # fmt: skip
    blocks = [
        {name: drawn(i, *leaf.shape) for i, (name, leaf) in enumerate(sorted(shapes["layers"].items()))}
        for shapes in (
            jax.eval_shape(lambda key: encoder.init_params(key, tiny), jax.random.key(0)),
            jax.eval_shape(lambda key: init_params(key, llama), jax.random.key(0)),
        )
    ]
    for block, activation in zip(blocks, (scipy.special.ndtr, scipy.special.expit), strict=True):
        ffn = FeedForward(**{name: block[name][0] for name in FeedForward._fields if name in block})
        split = reconfigure(ffn, np.array([3, 8], np.int32))
        first = X @ np.asarray(ffn.up if ffn.gate is None else ffn.gate, np.float64)
        first = first if ffn.up_bias is None else first + ffn.up_bias
        hidden = first * activation(first) * (1 if ffn.gate is None else X @ np.asarray(ffn.up, np.float64))
        function = gelu if activation is scipy.special.ndtr else jax.nn.silu
        expected = hidden @ np.asarray(ffn.down, np.float64) + (0 if ffn.down_bias is None else ffn.down_bias)
        np.testing.assert_allclose(run_split(split, X, function), expected, atol=1e-4)


# --- choosing -----------------------------------------------------------------------------------------


def test_scores_are_distances_by_hand():
    after = jax.tree.map(lambda leaf: leaf + drawn(7, *leaf.shape), perceptron(LAYERS, gated=True))
    before = perceptron(LAYERS, gated=True)
    up, down, bias, _, gate = (np.abs(np.asarray(b) - np.asarray(a)) for a, b in zip(before, after, strict=True))
    expected = up.sum(1) + gate.sum(1) + bias
    np.testing.assert_allclose(node_scores(before, after), expected, rtol=1e-5)
    np.testing.assert_allclose(node_scores(before, after, down=True), expected + down.sum(2), rtol=1e-5)
    magnitudes = np.abs(np.asarray(ONE.up)).sum(0) + np.abs(np.asarray(ONE.up_bias))
    np.testing.assert_allclose(magnitude_scores(ONE), magnitudes, rtol=1e-5)


def test_without_priming_no_unit_has_a_score():
    assert not np.asarray(node_scores(ONE, ONE, down=True)).any()
    moved = ONE._replace(down_bias=jnp.zeros(D))
    assert not np.asarray(node_scores(ONE, moved, down=True)).any()


def test_learners_are_the_largest_scores_of_each_layer():
    scores = np.array([[1, 5, 3, 5, 0], [2, 2, 2, 2, 9]], np.float32)
    np.testing.assert_array_equal(choose_learners(scores, 0.4), [[1, 3], [0, 4]])
    np.testing.assert_array_equal(choose_learners(scores, 1), [[0, 1, 2, 3, 4]] * 2)
    assert choose_learners(scores, 0).shape == (2, 0)
    np.testing.assert_array_equal(jax.jit(choose_learners, static_argnums=1)(scores, 0.4), [[1, 3], [0, 4]])


def test_random_learners_are_uniform():
    """Each of 10 units is among 3 with probability 0.3; standard errors of a binomial share."""
    keys = jax.random.split(jax.random.key(0), 2000)
    chosen = jax.jit(jax.vmap(lambda key: choose_learners(random_scores(key, ONE), 0.3)))(keys)
    shares = np.bincount(np.asarray(chosen).ravel(), minlength=H) / len(keys)
    assert (np.abs(shares - 0.3) < 4 * np.sqrt(0.3 * 0.7 / len(keys))).all()
    assert bool((chosen[:, 1:] > chosen[:, :-1]).all())


# --- gradients and training ---------------------------------------------------------------------------

LEARNERS = np.array([8, 1, 4], np.int32)
TARGET = drawn(11, ROWS, D)


def loss_of(tree, recompute=False):
    ffn = tree["ffn"]
    y = (
        feed_forward(ffn, tree["x"])
        if isinstance(ffn, FeedForward)
        else split_feed_forward(ffn, tree["x"], recompute=recompute)
    )
    return ((y - TARGET) ** 2).sum()


@functools.cache
def gradients(recompute: bool = False):
    tree = {"ffn": ONE, "x": jnp.asarray(X)}
    full = jax.jit(jax.grad(loss_of))(tree)
    own = jax.jit(jax.grad(functools.partial(loss_of, recompute=recompute)))(reconfigure(tree, LEARNERS))
    return full, own


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_slices_of_the_full_ones(recompute):
    full, own = gradients(recompute)
    expected = reconfigure(full, LEARNERS)
    for name in ("up", "down", "up_bias", "down_bias"):
        found = getattr(own["ffn"].learner, name)
        np.testing.assert_allclose(found, getattr(expected["ffn"].learner, name), rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(own["x"], full["x"], rtol=2e-4, atol=1e-4)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(own["ffn"].frozen))


def test_the_full_gradient_is_that_of_central_differences():
    found = np.asarray(gradients()[0]["ffn"].up)
    step, up = 1e-5, np.asarray(ONE.up, np.float64)
    for i, j in ((0, 0), (3, 8), (5, 4)):
        losses = []
        for sign in (1, -1):
            moved = up.copy()
            moved[i, j] += sign * step
            losses.append(((by_numpy(ONE._replace(up=moved), X.astype(np.float64)) - TARGET) ** 2).sum())
        np.testing.assert_allclose(found[i, j], (losses[0] - losses[1]) / (2 * step), rtol=2e-3)


def trained(ffn, steps: int = 5, *, whole: bool = False):
    """Adam on the perceptron alone; split trees by `trained_part`, or ``whole`` through `learner_optimizer`."""
    optimizer = optax.adam(0.02)
    split = isinstance(ffn, SplitFeedForward)
    if whole:
        optimizer = learner_optimizer(optimizer)
    frozen = frozen_part(ffn) if split and not whole else []
    part = trained_part(ffn) if frozen else ffn

    @jax.jit
    def step(part, state):
        def loss(part):
            return loss_of({"ffn": with_frozen(part, frozen) if frozen else part, "x": X})

        updates, state = optimizer.update(jax.grad(loss)(part), state, part)
        return optax.apply_updates(part, updates), state

    state = optimizer.init(part)
    for _ in range(steps):
        part, state = step(part, state)
    return (with_frozen(part, frozen) if frozen else part), state


def test_training_leaves_frozen_weights_bit_for_bit_and_their_moments_out():
    split = reconfigure(ONE, LEARNERS)
    after, state = trained(split)
    assert_same_bits(after.frozen, split.frozen)
    for a, b in zip(after.learner[:4], split.learner[:4], strict=True):
        assert (np.asarray(a) != np.asarray(b)).any()
    # Two moments of 3 units of 6 + 6 + 1 weights and of b2, beside a counter.
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 1 + 2 * (3 * 13 + D)
    whole, whole_state = trained(split, whole=True)
    assert_same_bits(whole.frozen, split.frozen)
    assert sum(leaf.size for leaf in jax.tree.leaves(whole_state)) == 1 + 2 * (3 * 13 + D)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_training_all_units_is_full_training():
    full, _ = trained(ONE)
    order = np.random.default_rng(0).permutation(H).astype(np.int32)
    split, _ = trained(reconfigure(ONE, order))
    for a, b in zip(jax.tree.leaves(merge(split, order)), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    ascending = np.arange(H, dtype=np.int32)
    assert_same_bits(merge(trained(reconfigure(ONE, ascending))[0], ascending), full)


# --- what is kept for the backward pass ---------------------------------------------------------------


def kept_of_row(count: int | None, **options) -> float:
    """Floats a row leaves; the input is made inside, so that it counts when it is kept."""
    if count is None:
        return residual_bytes(lambda f, x: feed_forward(f, 2 * x, **options), ONE, X) / (4 * ROWS)
    split = reconfigure(ONE, np.arange(count, dtype=np.int32))

    def function(part, x, frozen):
        return split_feed_forward(with_frozen(part, frozen), 2 * x, **options)

    return residual_bytes(function, trained_part(split), X, constants=(frozen_part(split),)) / (4 * ROWS)


def test_residuals_follow_the_formulas():
    assert kept_of_row(None) == kept_of_row(H) == D + 2 * H
    assert kept_of_row(None, kept="preactivation") == D + H
    assert kept_of_row(None, kept="input") == D
    for count in (1, 4, 9):
        assert kept_of_row(count) == D + H + count
        assert kept_of_row(count, recompute=True) == D + 2 * count
    assert kept_of_row(0) == H
    assert kept_of_row(0, recompute=True) == D


def test_masked_gradients_save_nothing():
    """The pitfall: zeroing gradients afterwards keeps what full training keeps."""
    mask = jnp.zeros(H).at[LEARNERS].set(1)

    def function(ffn, x):
        masked = ffn._replace(up=ffn.up * mask + jax.lax.stop_gradient(ffn.up * (1 - mask)))
        return feed_forward(masked, 2 * x)

    assert residual_bytes(function, ONE, X) / (4 * ROWS) >= D + 2 * H


def test_compiled_memory_falls_with_the_share():
    """Six layers under one scan, whose kept arrays XLA has to store: 4 n (d + h + k) bytes a layer."""
    layers, n, d, h = 6, 256, 16, 256
    shape = jax.ShapeDtypeStruct
    stacked = FeedForward(shape((layers, d, h), np.float32), shape((layers, h, d), np.float32))  # pyright: ignore[reportArgumentType]

    def temporary(count: int, recompute: bool) -> int:
        learners = np.broadcast_to(np.arange(count, dtype=np.int32), (layers, count))
        split = jax.eval_shape(lambda f: reconfigure(f, learners), stacked)

        def loss(part, frozen, x):
            def body(x, ffn):
                return x + split_feed_forward(ffn, x, jnp.tanh, recompute=recompute), None

            return (jax.lax.scan(body, x, with_frozen(part, frozen))[0] ** 2).sum()

        lowered = jax.jit(jax.grad(loss)).lower(trained_part(split), frozen_part(split), shape((n, d), np.float32))
        memory: Any = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes

    found = {(count, r): temporary(count, r) for count, r in ((256, False), (64, False), (0, False), (64, True))}
    for one, other in (((256, False), (64, False)), ((64, False), (0, False))):
        fewer = 4 * layers * n * (one[0] - other[0])
        assert 0.8 * fewer < found[one] - found[other]
    assert found[64, True] < found[64, False] - 0.8 * 4 * layers * n * (h - 64)


def test_the_meter_counts_each_array_once_and_no_argument():
    x = jax.ShapeDtypeStruct((5, 3), np.float32)
    assert residuals(lambda x: 2.0 * x, x) == []
    assert residual_bytes(lambda x, y: x * y, x, x) == 0
    assert [found.shape for found in residuals(lambda x: jnp.sin(jnp.exp(x)).sum(), x)] == [(5, 3), (5, 3)]
    # Of x y with y constant the gradient needs y, which was given; of exp(y) x it needs exp(y), which was made.
    assert residual_bytes(lambda x, y: x * y, x, constants=(x,)) == 0
    assert residual_bytes(lambda x, y: x * jnp.exp(y), x, constants=(x,)) == 60


# --- bad input ----------------------------------------------------------------------------------------


def test_bad_input():
    with pytest.raises(ValueError, match=r"share is 1.2; it must be in \[0, 1\]"):
        choose_learners(drawn(0, H), 1.2)
    with pytest.raises(ValueError, match="scores has NaN, as of a priming that diverged"):
        choose_learners(np.full(H, np.nan, np.float32), 0.5)
    with pytest.raises(ValueError, match="before has the shapes"):
        node_scores(ONE, perceptron(LAYERS))
    with pytest.raises(ValueError, match=r"learners has shape \(3, 2\); for layers \(\) of 10 units it must be"):
        reconfigure(ONE, np.zeros((3, 2), np.int32))
    with pytest.raises(ValueError, match="learners repeats a unit"):
        reconfigure(ONE, np.array([1, 1], np.int32))
    with pytest.raises(ValueError, match="learners has units from 0 to 10; they are 0 to 9"):
        reconfigure(ONE, np.array([0, 10], np.int32))
    with pytest.raises(ValueError, match="tree has no FeedForward; there must be one at least"):
        reconfigure({"kernel": jnp.ones((2, 2))}, LEARNERS)
    split = reconfigure(ONE, LEARNERS)
    with pytest.raises(ValueError, match="tree has no FeedForward"):
        reconfigure(split, LEARNERS)
    with pytest.raises(ValueError, match="split has frozen=None; with_frozen gives the frozen weights back"):
        split_feed_forward(trained_part(split), X)
    with pytest.raises(ValueError, match="a perceptron has frozen=None"):
        merge(trained_part(split), LEARNERS)
    with pytest.raises(ValueError, match="frozen has 0 halves; the tree has 1 split perceptrons"):
        with_frozen(trained_part(split), [])
