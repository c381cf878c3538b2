from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from hashml.embeddings import EmbeddingTables
from hashml.models import (
    DLRM,
    KAGGLE,
    MLP,
    MLPERF,
    TERABYTE,
    binary_cross_entropy,
    cat_interaction,
    dot_interaction,
    init_state,
    sum_bags,
    train_step,
)

SIZES = (7, 5, 11)


def random_batch(size=6, dense=3, seed=0):
    draw = np.random.default_rng(seed)
    ids = np.stack([draw.integers(0, n, size) for n in SIZES], axis=1).astype(np.int32)
    return jnp.asarray(draw.normal(size=(size, dense)), jnp.float32), jnp.asarray(ids)


def small_model(bottom=(8, 4), top=(6, 1), interaction: Any = "dot"):
    return DLRM(EmbeddingTables(SIZES, 4), bottom, top, interaction)


def init(module: nn.Module, *args) -> Any:
    """Variables of the module's shapes from NumPy's generator, which needs no compilation."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw.normal(size=leaf.shape), leaf.dtype), shapes)


def apply(module: nn.Module, *args, **kwargs) -> Any:
    """`Module.apply`, whose declared type tells apart what only its arguments can."""
    return jax.jit(partial(module.apply, **kwargs))(*args)


# --- interactions ---------------------------------------------------------------------------------


def double_loop(vectors, include_self):
    products = []
    for i in range(len(vectors)):
        for j in range(i + 1 if include_self else i):
            products.append(sum(a * b for a, b in zip(vectors[i].tolist(), vectors[j].tolist(), strict=True)))
    return np.array(products)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize(("batch", "fields", "width"), [(0, 3, 2), (1, 1, 4), (2, 2, 1), (3, 6, 9), (2, 27, 16)])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_dot_interaction_is_the_double_loop_bit_for_bit(include_self, batch, fields, width, seed):
    """In float64, on multiples of 2**-20 below 1, whose sums of products no order of addition rounds."""
    with jax.enable_x64(True):
        grid = np.random.default_rng(seed).integers(-(2**20), 2**20, (batch, fields, width)) * 2.0**-20
        found = dot_interaction(jnp.asarray(grid), include_self=include_self)
        assert found.dtype == jnp.float64
        assert found.shape == (batch, fields * (fields + (1 if include_self else -1)) // 2)
        for vectors, products in zip(grid, np.asarray(found), strict=True):
            np.testing.assert_array_equal(products, double_loop(vectors, include_self))


def test_dot_interaction_goes_row_by_row():
    # Powers of two make each product name its pair.
    vectors = jnp.array([[1.0], [2.0], [4.0], [8.0]])
    assert dot_interaction(vectors).tolist() == [2, 4, 8, 8, 16, 32]
    assert dot_interaction(vectors, include_self=True).tolist() == [1, 2, 4, 4, 8, 16, 8, 16, 32, 64]


def test_dot_interaction_accumulates_in_float32():
    """1,024 products of 1 exceed what bfloat16 can count one by one, and 2**16 what float16 can hold."""
    assert dot_interaction(jnp.ones((2, 1024), jnp.bfloat16)).item() == 1024
    halves = jnp.array([[256.0, 256.0, 1.0], [256.0, -256.0, 1.0]], jnp.float16)
    found = dot_interaction(halves)
    assert found.dtype == jnp.float16
    assert found.item() == 1


def test_dot_interaction_gradient_equals_finite_differences():
    vectors = jax.random.normal(jax.random.key(0), (2, 4, 3))
    check_grads(jax.jit(dot_interaction), (vectors,), order=2, modes=("rev",), rtol=1e-2)


def test_permuting_vectors_permutes_the_products_only():
    vectors = jax.random.normal(jax.random.key(0), (5, 6, 4))
    order = np.random.default_rng(1).permutation(6)
    rows, columns = np.tril_indices(6, k=-1)
    place = {frozenset(pair): k for k, pair in enumerate(zip(rows, columns, strict=True))}
    moved = [place[frozenset((order[i], order[j]))] for i, j in zip(rows, columns, strict=True)]
    assert sorted(moved) == list(range(15))
    np.testing.assert_allclose(dot_interaction(vectors[:, order]), dot_interaction(vectors)[:, moved], rtol=1e-6)


def test_cat_interaction_keeps_the_vectors_in_order():
    vectors = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(cat_interaction(vectors), np.arange(24.0).reshape(2, 12))


# --- bags -----------------------------------------------------------------------------------------


def test_bags_are_sums_of_their_rows():
    draw = np.random.default_rng(0)
    rows, mask = draw.normal(size=(4, 3, 2, 5)).astype(np.float32), draw.random((4, 3, 2)) < 0.5
    expected = np.zeros((4, 2, 5))
    for b, slot, t in np.argwhere(mask):
        expected[b, t] += rows[b, slot, t]
    np.testing.assert_allclose(sum_bags(jnp.asarray(rows), jnp.asarray(mask)), expected, rtol=1e-6, atol=1e-6)


def test_a_bag_of_one_is_a_row_and_an_empty_bag_is_zero():
    tables = EmbeddingTables(SIZES, 4)
    _, ids = random_batch()
    variables = init(tables, ids)
    padded = jnp.stack([ids, jnp.full_like(ids, 10**6)], axis=1)  # the second slot is out of range, and masked
    mask = jnp.zeros(padded.shape, bool).at[:, 0, :2].set(True)  # the third table's bags are empty
    bags = sum_bags(apply(tables, variables, padded), mask)
    np.testing.assert_array_equal(bags[:, :2], apply(tables, variables, ids)[:, :2])
    np.testing.assert_array_equal(bags[:, 2], 0)
    grads = jax.jit(jax.grad(lambda v: sum_bags(apply(tables, v, padded), mask).sum()))(variables)
    assert np.isfinite(grads["params"]["table"]).all()


# --- loss -----------------------------------------------------------------------------------------


def test_binary_cross_entropy_is_the_mean_negative_log_likelihood():
    logits, labels = jax.random.normal(jax.random.key(0), (50,)) * 3, jnp.arange(50) % 2
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    expected = -np.mean(np.where(labels == 1, np.log(p), np.log(1 - p)))
    for kind in (jnp.int32, jnp.float32, bool):
        np.testing.assert_allclose(binary_cross_entropy(logits, labels.astype(kind)), expected, rtol=1e-6)


def test_binary_cross_entropy_stays_finite_where_the_sigmoid_saturates():
    logits, labels = jnp.array([1e4, -1e4]), jnp.array([0.0, 1.0])
    assert binary_cross_entropy(logits, labels) == 1e4
    np.testing.assert_array_equal(jax.grad(binary_cross_entropy)(logits, labels), [0.5, -0.5])


# --- the model ------------------------------------------------------------------------------------


def naive_dlrm(params, dense, ids):
    """The model from its published description, in NumPy float64, one example at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def mlp(layers, x, last):
        for i in range(len(layers)):
            x = x @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"]
            x = np.maximum(x, 0) if i < len(layers) - 1 or last else x
        return x

    offsets = np.cumsum([0, *SIZES[:-1]])
    logits = []
    for x, v in zip(np.asarray(dense, np.float64), np.asarray(ids), strict=True):
        z = mlp(params["bottom_mlp"], x, True)
        vectors = np.stack([z, *params["embedding"]["table"][v + offsets]])
        logits.append(mlp(params["top_mlp"], np.concatenate([z, double_loop(vectors, False)]), False)[0])
    return np.array(logits)


def test_the_model_is_its_description():
    dense, ids = random_batch(20)
    model = small_model()
    variables = init(model, dense, ids)
    expected = naive_dlrm(variables["params"], dense, ids)
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(apply(model, variables, dense, ids), expected, rtol=1e-4, atol=1e-6)


def test_the_bottom_mlp_is_rectified_after_its_last_layer():
    dense, ids = random_batch()
    model = small_model(interaction="cat")
    variables = init(model, dense, ids)
    _, state = apply(model, variables, dense, ids, capture_intermediates=True, mutable="intermediates")
    (z,) = state["intermediates"]["bottom_mlp"]["__call__"]
    assert z.min() == 0
    (logits,) = state["intermediates"]["top_mlp"]["__call__"]
    assert logits.min() < 0 or logits.max() > 0


def test_head_is_the_model_without_its_look_up():
    dense, ids = random_batch()
    model = small_model()
    variables = init(model, dense, ids)
    vectors = apply(EmbeddingTables(SIZES, 4), {"params": variables["params"]["embedding"]}, ids)
    found = apply(model, variables, dense, vectors, method="head")
    np.testing.assert_array_equal(found, apply(model, variables, dense, ids))


@pytest.mark.parametrize("interaction", ["dot", "cat"])
def test_without_tables_only_the_dense_features_speak(interaction):
    dense, ids = random_batch()
    model = small_model(interaction=interaction)
    variables = init(model, dense, ids)
    variables["params"]["embedding"]["table"] = jnp.zeros((sum(SIZES), 4))
    logits = apply(model, variables, dense, ids)
    np.testing.assert_array_equal(apply(model, variables, dense, ids[::-1]), logits)
    assert np.ptp(logits) > 0


@pytest.mark.parametrize(("interaction", "width"), [("dot", 3), ("cat", 12)])
def test_without_dense_features_the_bottom_is_dropped(interaction, width):
    _, ids = random_batch()
    model = small_model(interaction=interaction)
    variables = init(model, None, ids)
    assert set(variables["params"]) == {"embedding", "top_mlp"}
    assert variables["params"]["top_mlp"]["Dense_0"]["kernel"].shape == (width, 6)
    assert apply(model, variables, None, ids).shape == (6,)


def test_any_embedding_may_be_passed_in():
    """Here one without parameters: ids as cosines."""

    class Cosines(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return jnp.cos(ids[..., None] * jnp.arange(1.0, 5.0))

    dense, ids = random_batch()
    model = DLRM(Cosines(), bottom=(4,), top=(1,))
    variables = init(model, dense, ids)
    assert set(variables["params"]) == {"bottom_mlp", "top_mlp"}
    assert apply(model, variables, dense, ids).shape == (6,)


@pytest.mark.parametrize(
    ("sizes", "rows", "top_input"),
    [(KAGGLE, 33_762_577, 367), (TERABYTE, 49_126_297, 415), (MLPERF, 187_767_399, 479)],
    ids=["kaggle", "terabyte", "mlperf"],
)
def test_published_sizes(sizes, rows, top_input):
    """Widths and sums as the reference implementation states them, without allocating a table."""
    assert len(sizes.tables) == 26
    assert sum(sizes.tables) == rows
    model = DLRM(EmbeddingTables(sizes.tables, sizes.dimension), bottom=sizes.bottom, top=sizes.top)
    dense, ids = jnp.zeros((2, sizes.dense_features)), jnp.zeros((2, 26), jnp.int32)
    params: Any = jax.eval_shape(model.init, jax.random.key(0), dense, ids)["params"]
    assert params["embedding"]["table"].shape == (rows, sizes.dimension)
    assert params["bottom_mlp"]["Dense_0"]["kernel"].shape == (13, 512)
    assert params["top_mlp"]["Dense_0"]["kernel"].shape == (top_input, sizes.top[0])


def test_initial_weights_have_the_published_variance():
    inputs, outputs = 300, 400
    params = MLP((outputs,)).init(jax.random.key(0), jnp.zeros((1, inputs)))["params"]["Dense_0"]
    for leaf, variance in ((params["kernel"], 2 / (inputs + outputs)), (params["bias"], 1 / outputs)):
        leaf = np.asarray(leaf, np.float64)
        assert abs(leaf.mean()) < 4 * np.sqrt(variance / leaf.size)
        # The mean square of n normal draws has a standard error of variance * sqrt(2 / n).
        assert abs(np.mean(leaf**2) - variance) < 4 * variance * np.sqrt(2 / leaf.size)


def test_an_id_out_of_range_is_seen_in_its_own_logit_only():
    dense, ids = random_batch()
    model = small_model()
    variables = init(model, dense, ids)
    wrong = apply(model, variables, dense, ids.at[2, 1].set(SIZES[1]))
    assert np.isnan(wrong).tolist() == [False, False, True, False, False, False]


def test_it_learns_what_no_linear_model_can():
    """Labels are the parity of two ids: each field alone says nothing, and a linear model stays at ln 2."""
    ids = jnp.stack(jnp.meshgrid(jnp.arange(8), jnp.arange(8)), axis=-1).reshape(-1, 2)
    labels = (ids.sum(axis=1) % 2).astype(jnp.float32)
    model = DLRM(EmbeddingTables((8, 8), 4), bottom=(), top=(16, 1))

    def loss_fn(variables, batch):
        return binary_cross_entropy(apply(model, variables, None, batch["ids"]), batch["labels"])

    variables = jax.jit(model.init)(jax.random.key(0), None, ids)
    state = init_state(variables, optimizer := optax.adam(0.05))
    step, batch = train_step(loss_fn, optimizer), {"ids": ids, "labels": labels}
    for _ in range(150):
        state, _ = step(state, batch)
    assert loss_fn(state.params, batch) < 0.01
    assert state.step == 150


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small_model(bottom=(8, 5)), r"bottom is \(8, 5\); its last width must be 4"),
        (small_model(bottom=()), r"bottom is \(\); its last width must be 4"),
        (small_model(top=(6, 2)), r"top is \(6, 2\); its last width must be 1"),
        (small_model(top=()), r"top is \(\)"),
    ],
)
def test_widths_that_do_not_fit(model, message):
    with pytest.raises(ValueError, match=message):
        init(model, *random_batch())


def test_one_vector_has_nothing_to_interact_with():
    model = DLRM(EmbeddingTables((7,), 4), bottom=(4,), top=(1,))
    _, ids = random_batch()
    with pytest.raises(ValueError, match="needs at least two"):
        init(model, None, ids[:, :1])


def test_an_unknown_interaction():
    with pytest.raises((ValueError, TypeError), match="interaction"):
        init(small_model(interaction="sum"), *random_batch())
