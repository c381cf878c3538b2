from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hashml.embeddings import EmbeddingTables
from hashml.models import (
    DLRM,
    binary_cross_entropy,
    data_parallel_step,
    data_parallel_value_and_grad,
    init_state,
    sharded_step,
    sharded_value_and_grad,
    train_step,
)

DEVICES = 8
SIZES = (9, 30, 4)
MODEL = DLRM(EmbeddingTables(SIZES, 4), bottom=(8, 4), top=(8, 1))

VALUE_AND_GRADS = pytest.mark.parametrize("transform", [data_parallel_value_and_grad, sharded_value_and_grad])
STEPS = pytest.mark.parametrize("make_step", [data_parallel_step, sharded_step])


@pytest.fixture(autouse=True)
def eight_devices():
    assert len(jax.devices()) >= DEVICES, "set XLA_FLAGS=--xla_force_host_platform_device_count=8"


def mesh(shape=(DEVICES,), axes=("data",), **kwargs):
    return jax.make_mesh(shape, axes, devices=jax.devices()[:DEVICES], **kwargs)


def random_batch(seed=0, size=64) -> Any:
    draw = np.random.default_rng(seed)
    return {
        "dense": draw.normal(size=(size, 3)).astype(np.float32),
        "ids": np.stack([draw.integers(0, n, size) for n in SIZES], axis=1).astype(np.int32),
        "labels": draw.integers(0, 2, size).astype(np.float32),
    }


def loss_fn(variables, batch) -> Any:
    logits = MODEL.apply(variables, batch["dense"], batch["ids"])
    return binary_cross_entropy(jnp.asarray(logits), batch["labels"])


@cache
def initial_variables() -> Any:
    """From NumPy's generator, which needs no compilation."""
    draw, batch = np.random.default_rng(0), random_batch()
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), batch["dense"], batch["ids"])
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw.normal(size=leaf.shape), leaf.dtype), shapes)


def assert_close(found, expected):
    """Equal up to the order of summation: some units in the last place of an array's largest entry."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * np.finfo(np.float32).eps * scale)


@VALUE_AND_GRADS
def test_gradient_is_that_of_one_device(transform):
    batch = random_batch()
    expected = jax.jit(jax.value_and_grad(loss_fn))(initial_variables(), batch)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1])) > 0.01
    assert_close(transform(loss_fn, mesh())(initial_variables(), batch), expected)


@VALUE_AND_GRADS
@pytest.mark.parametrize("size", [8, 16, 64])
def test_gradient_is_exact_where_sums_are(transform, size):
    """Least squares over small integers: no sum is rounded, so no order of summation can show."""
    draw = np.random.default_rng(size)
    x, y = (draw.integers(-8, 8, shape).astype(np.float32) for shape in [(size, 5), (size,)])
    w = jnp.asarray(draw.integers(-8, 8, 5), jnp.float32)

    def squares(w, batch):
        return jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2

    loss, grads = transform(squares, mesh())(w, (x, y))
    residual = x.astype(np.float64) @ np.asarray(w, np.float64) - y
    assert loss == np.mean(residual**2) / 2
    np.testing.assert_array_equal(grads, residual @ x / size)


@STEPS
def test_training_is_that_of_one_device(make_step):
    optimizer = optax.adam(0.01)
    state = expected = init_state(initial_variables(), optimizer)
    step, single = make_step(loss_fn, optimizer, mesh()), train_step(loss_fn, optimizer)
    losses = []
    for seed in range(4):
        state, loss = step(state, random_batch(seed))
        expected, expected_loss = single(expected, random_batch(seed))
        losses.append((loss, expected_loss))
    assert state.step == 4
    found, target = np.array(losses).T
    np.testing.assert_allclose(found, target, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@VALUE_AND_GRADS
def test_the_work_is_split_and_only_gradients_travel(transform):
    """Each device computes an eighth of the batch, and none of it is gathered, also within another jit."""
    lowered = jax.jit(transform(loss_fn, mesh())).lower(initial_variables(), random_batch())
    text = lowered.compile().as_text()
    assert text is not None
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "f32[8,3]" in text  # 64 rows of 3 dense features, an eighth of them
    assert f"f32[8,{len(SIZES) + 1},4]" in text


@STEPS
def test_the_result_is_replicated(make_step):
    state, loss = make_step(loss_fn, optax.adam(0.1), mesh())(
        init_state(initial_variables(), optax.adam(0.1)), random_batch()
    )
    for leaf in jax.tree.leaves((state, loss)):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == DEVICES


@STEPS
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_arguments_may_lie_anywhere(make_step, axis_type):
    """On the host, on one device (as after a restore), or placed over the caller's own mesh."""
    over = mesh(axis_types=(axis_type,))
    state, batch, optimizer = init_state(initial_variables(), optax.sgd(0.1)), random_batch(), optax.sgd(0.1)
    step = make_step(loss_fn, optimizer, over)
    expected = step(state, batch)
    for place, split in [
        (jax.devices()[0], jax.devices()[0]),
        (jax.devices()[1], jax.devices()[0]),
        (NamedSharding(over, P()), NamedSharding(over, P("data"))),
    ]:
        found = step(jax.device_put(state, place), jax.device_put(batch, split))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


@VALUE_AND_GRADS
def test_one_axis_of_a_larger_mesh(transform):
    expected = jax.jit(jax.value_and_grad(loss_fn))(initial_variables(), random_batch())
    over = mesh((4, 2), ("rows", "columns"))
    for axis in ("rows", "columns"):
        assert_close(transform(loss_fn, over, axis=axis)(initial_variables(), random_batch()), expected)


@STEPS
def test_donated_state_is_consumed_and_the_result_the_same(make_step):
    optimizer = optax.sgd(0.1)
    kept, given = (jax.tree.map(jnp.copy, init_state(initial_variables(), optimizer)) for _ in range(2))
    keeping = make_step(loss_fn, optimizer, mesh())
    donating = make_step(loss_fn, optimizer, mesh(), donate=True)
    for seed in range(2):
        (next_kept, _), (next_given, _) = keeping(kept, random_batch(seed)), donating(given, random_batch(seed))
        for a, b in zip(jax.tree.leaves(next_given), jax.tree.leaves(next_kept), strict=True):
            np.testing.assert_array_equal(a, b)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))
        if seed:  # the first state was still moved to the mesh
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        kept, given = next_kept, next_given


@VALUE_AND_GRADS
@pytest.mark.parametrize("size", [1, 7, 12, 63])
def test_a_batch_that_does_not_divide_is_refused(transform, size):
    """Eight parts of unequal size would weigh their examples unequally."""
    with pytest.raises(ValueError, match=rf"a batch of {size} cannot be split evenly over the 8 devices"):
        transform(loss_fn, mesh())(initial_variables(), random_batch(size=size))


@VALUE_AND_GRADS
def test_arrays_of_unequal_length_are_refused(transform):
    for labels in (np.zeros(8, np.float32), np.float32(0)):
        with pytest.raises(ValueError, match=r"leading axes of the batch are .*batch\['labels'\]"):
            transform(loss_fn, mesh())(initial_variables(), random_batch() | {"labels": labels})


@pytest.mark.parametrize(
    "make", [data_parallel_value_and_grad, sharded_value_and_grad, data_parallel_step, sharded_step]
)
def test_an_unknown_axis_is_refused(make):
    optimizer = (optax.sgd(0.1),) if make in (data_parallel_step, sharded_step) else ()
    with pytest.raises(ValueError, match=r"axis is 'model'; allowed are the axes of the mesh, \('data',\)"):
        make(loss_fn, *optimizer, mesh(), axis="model")
