"""The scaler's laws: formulas by hand, the dense trajectory, no trace of the memory's spread, Adam unmoved."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.sharing.share import share
from hashml.sharing.stable_rps import (
    gradient_scaler,
    scale_by_sharing,
    scale_update_by_sharing,
    scaler_weights,
    sharing_sums,
    unit_memory,
    update_scaler,
)

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.tanh(nn.Dense(32)(nn.tanh(nn.Dense(24)(x)))))


DENSE = MLP().init(KEY, X)


def train(module, params, optimizer, steps=8) -> Any:
    """The parameters after each step."""

    def loss(params) -> Any:
        return ((module.apply({"params": params}, X) - Y) ** 2).mean()

    def step(state, _):
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), params

    return jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), None, steps)[1])(params)


def test_formulas_by_hand():
    """Slot 0 serves 2 weights of scale 1 and 1 of scale 4; slot 1 serves 3 of scale 1; slot 2 none."""
    counts, scales = [np.array([2, 3, 0]), np.array([1, 0, 0])], [1.0, 4.0]
    expected = {"v1": [12, 3], "v2": [6, 3], "v3": [2, 1], "v4": [18**0.5, 3**0.5], "v5": [18, 3], "none": [1, 1]}
    for version, gamma in expected.items():
        np.testing.assert_allclose(scaler_weights(counts, scales, version), [*gamma, 1])  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(scaler_weights(counts, scales, "v5", epsilon=0.1), [18 + 1.05, 3 + 1.05, 1])


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=5), data=st.data())
def test_v1_is_at_most_v5_and_equal_where_scales_are(counts, data):
    scales = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(counts), max_size=len(counts)))
    loads = [np.array([count]) for count in counts]
    v1, v5 = (scaler_weights(loads, scales, version)[0] for version in ("v1", "v5"))  # pyright: ignore[reportArgumentType]
    distinct = {scale for count, scale in zip(counts, scales, strict=True) if count}
    assert (v1 == v5) if len(distinct) <= 1 else (v1 < v5)


@pytest.mark.parametrize("map", ["fold", "element"])
def test_sums_are_those_of_the_map(map):
    """A is what all weights are when the memory is ones, without signs: pulled back, it is B."""
    shared = share(MLP(), DENSE, budget=70, map=map, sign="none")
    arrays, pull = jax.vjp(shared.expand, jnp.ones(70))
    sums = sharing_sums(shared)
    np.testing.assert_allclose(sums.square, pull(arrays)[0], rtol=1e-5)
    np.testing.assert_allclose(sums.scale, pull([jnp.ones_like(array) for array in arrays])[0], rtol=1e-5)
    assert sums.weights.sum() == sum(array.size for array in arrays)
    np.testing.assert_allclose(update_scaler(shared) ** 2 * sums.weights, sums.square)


@pytest.mark.parametrize("room", [0, 100])
@pytest.mark.parametrize("scale", [1.0, 0.125, 3.0])
def test_a_model_that_fits_trains_as_the_dense_one(room, scale):
    """With momentum and coupled weight decay. At scales that are powers of two, bit for bit but for fusion."""
    size = sum(leaf.size for leaf in jax.tree.leaves(DENSE) if leaf.ndim == 2 and leaf.size >= 128)
    shared = share(MLP(), DENSE, budget=size + room, min_size=128)
    assert shared.one_to_one
    shared = shared.with_init_std(1 / scale)
    start = shared.from_dense(DENSE)["params"]
    base = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.2, momentum=0.9))
    found = train(shared, start, optax.chain(scale_by_sharing(gradient_scaler(shared)), base))
    expected = train(MLP(), DENSE["params"], base)
    weights = jax.vmap(lambda params: shared.to_dense({"params": params})["params"])(found)
    moved = 0.0
    for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        moved = max(moved, float(np.abs(b[-1] - b[0]).max()))
    assert moved > 0.1


def test_the_hashed_map_leaves_slots_empty_where_the_fold_does_not():
    """At as many slots as weights 1 / e of them, within four standard errors of Poisson occupancy."""
    size = sum(leaf.size for leaf in jax.tree.leaves(DENSE) if leaf.ndim == 2 and leaf.size >= 128)
    empty = {
        map: (sharing_sums(share(MLP(), DENSE, budget=size, min_size=128, map=map)).weights == 0).mean()
        for map in ("fold", "element")
    }
    assert empty["fold"] == 0
    error = np.sqrt((np.exp(-1) - 2 * np.exp(-2)) / size)
    assert abs(empty["element"] - np.exp(-1)) < 4 * error


@pytest.mark.parametrize("version", ["v1", "v5"])
def test_training_does_not_know_the_spread_of_the_memory(version):
    """memory / init_std is one trajectory; without the scaler it is not."""

    def trajectory(init_std, version) -> np.ndarray:
        shared = share(MLP(), DENSE, budget=100, init_std=init_std)
        optimizer = optax.chain(scale_by_sharing(gradient_scaler(shared, version)), optax.sgd(0.1, momentum=0.9))
        return np.asarray(train(shared, shared.init(KEY, X)["params"], optimizer)["memory"]) / init_std

    reference = trajectory(1.0, version)
    assert np.abs(reference[-1] - reference[0]).max() > 0.05
    for init_std in (1e-3, 0.1, 10.0):
        np.testing.assert_allclose(trajectory(init_std, version), reference, rtol=1e-3, atol=1e-4)
    assert np.abs(trajectory(10.0, "none") - trajectory(1.0, "none")).max() > 0.01


def test_adam_does_not_see_the_scaler():
    shared = share(MLP(), DENSE, budget=100)
    start = shared.init(KEY, X)["params"]
    adam = optax.adam(0.01, eps=1e-20)
    scaled = optax.chain(scale_by_sharing(100 * gradient_scaler(shared)), adam)
    np.testing.assert_allclose(
        train(shared, start, scaled)["memory"], train(shared, start, adam)["memory"], rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("init_std", [0.01, 5.0])
def test_adam_on_a_unit_memory_or_by_scaled_updates_does_not_know_the_spread(init_std):
    adam = optax.adam(0.01, eps=1e-20)
    unit = share(MLP(), DENSE, budget=100)
    reference = train(unit, unit.init(KEY, X)["params"], adam)["memory"]
    shared = unit.with_init_std(init_std)
    variables = shared.init(KEY, X)
    same, rescaled = unit_memory(shared, variables)
    np.testing.assert_allclose(same.apply(rescaled, X), shared.apply(variables, X), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(train(same, rescaled["params"], adam)["memory"], reference, rtol=1e-3, atol=1e-5)

    def weights(shared) -> Any:
        optimizer = optax.chain(adam, scale_update_by_sharing(shared))
        end = train(shared, shared.init(KEY, X)["params"], optimizer)["memory"][-1]
        return jnp.concatenate([array.reshape(-1) for array in shared.expand(end)])

    np.testing.assert_allclose(weights(shared), weights(unit), rtol=1e-3, atol=1e-4)


def test_other_arrays_pass():
    gamma = np.array([2.0, 4.0])
    updates = {"memory": jnp.ones(2), "dense": {"bias": jnp.ones(3)}}
    transform = scale_by_sharing(gamma)
    found, _ = transform.update(updates, transform.init(updates))
    np.testing.assert_array_equal(found["memory"], [0.5, 0.25])  # pyright: ignore
    np.testing.assert_array_equal(found["dense"]["bias"], np.ones(3))  # pyright: ignore


def test_bad_input_is_refused():
    load = [np.array([1, 2])]
    with pytest.raises(ValueError, match="epsilon is -1.0; it must be finite"):
        scaler_weights(load, [1.0], epsilon=-1.0)
    with pytest.raises(ValueError, match="scales holds 0.0; they must be positive"):
        scaler_weights(load, [0.0])
    with pytest.raises(ValueError, match="counts is empty"):
        scaler_weights([], [])
    with pytest.raises(ValueError, match="shorter|longer"):
        scaler_weights(load, [1.0, 2.0])
    with pytest.raises(Exception, match="v9"):
        scaler_weights(load, [1.0], "v9")  # pyright: ignore[reportArgumentType]
    transform = scale_by_sharing(np.ones(2))
    for tree, message in [
        ({"kernel": jnp.ones(2)}, "the tree has 0 arrays called 'memory'"),
        ({"a": {"memory": jnp.ones(2)}, "b": {"memory": jnp.ones(2)}}, "the tree has 2 arrays"),
        ({"memory": jnp.ones(3)}, r"the memory has shape \(3,\); the scaler is for \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            transform.update(tree, transform.init(tree))
    with pytest.raises(ValueError, match="there must be a 'memory'"):
        unit_memory(share(MLP(), DENSE, budget=9), DENSE)
