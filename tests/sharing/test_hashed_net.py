"""HashedNets: a layer equals its dense form, its feature-hashing view, its gradient formula; in little memory."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hashml.accounting import compression, stored_bytes
from hashml.sharing import HashedDense, SharingMap, element_map, expand, pull, virtual_matmul

OUT, IN = 30, 17


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def definition(sharing):
    """Slots and signs of every entry, in NumPy."""
    rows = np.arange(sharing.rows)
    return np.asarray(sharing.slots(rows)), np.asarray(sharing.signs(rows))


@pytest.mark.parametrize(("row_block", "sign"), [(1, "none"), (7, "element"), (1000, "element")])
def test_blocks_of_rows_equal_the_dense_layer(row_block, sign):
    """Invariant (a): output and all gradients, whatever the block, with leading axes."""
    layer = HashedDense(OUT, budget=50, seed=4, sign=sign, row_block=row_block)
    variables = {"params": {"memory": draw(50), "bias": draw(OUT, seed=1)}}
    x, cotangent = draw(2, 3, IN, seed=2), draw(2, 3, OUT, seed=3)
    slots, signs = definition(layer.sharing_map(IN))

    def dense(variables, x):
        return x @ (variables["params"]["memory"][slots] * signs).T + variables["params"]["bias"]

    def all_of(apply):
        y, backward = jax.vjp(apply, variables, x)
        return y, backward(cotangent)

    found, expected = jax.jit(lambda: (all_of(layer.apply), all_of(dense)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_an_injective_map_is_a_dense_layer():
    """Invariant (b): as many weights as entries and one slot an entry; the product is that of the matrix itself."""

    def rows_of(memory, ids):
        return jnp.asarray(memory).reshape(OUT, IN).at[ids].get(mode="clip")

    def slots(ids):
        return np.arange(OUT * IN, dtype=np.uint32).reshape(OUT, IN)[ids]

    identity = SharingMap(
        rows=OUT,
        columns=IN,
        budget=OUT * IN,
        scale=1.0,
        expand_rows=rows_of,
        pull_rows=lambda gradients, ids: jnp.zeros((OUT, IN)).at[ids].add(gradients).reshape(-1),
        slots=slots,
        signs=lambda ids: np.ones((*ids.shape, IN), np.float32),
        geometry={"map": "identity"},
    )
    w, x, cotangent = draw(OUT, IN), draw(5, IN, seed=1), draw(5, OUT, seed=2)
    np.testing.assert_array_equal(expand(identity, w.reshape(-1)), w)

    @jax.jit
    def layer(memory, x):
        y, backward = jax.vjp(lambda memory, x: virtual_matmul(x, memory, identity, row_block=8), memory, x)
        return y, *backward(cotangent)

    y, by_memory, by_x = layer(w.reshape(-1), x)
    np.testing.assert_allclose(y, x @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_memory.reshape(OUT, IN), cotangent.T @ x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_x, cotangent @ w, rtol=1e-5, atol=1e-5)


def hashed_features(x, slots, signs, budget):
    """phi_i(x)[k]: the coordinates of x that output i hashes to k, added up with their signs."""
    return np.stack([np.bincount(s, g * x, budget) for s, g in zip(slots, signs, strict=True)])


def test_outputs_are_inner_products_of_hashed_features():
    """Invariant (c): y_i = <memory, phi_i(x)>."""
    layer, memory, x = HashedDense(OUT, budget=50, seed=4, use_bias=False), draw(50), draw(IN, seed=1)
    slots, signs = definition(layer.sharing_map(IN))
    expected = hashed_features(x, slots, signs, 50) @ memory
    y = jax.jit(layer.apply)({"params": {"memory": memory}}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_hashed_features_keep_inner_products_on_average():
    """Invariant (d): the mean over seeds of <phi_i(x), phi_i(z)> is <x, z>; without signs it is not."""
    x = np.random.default_rng(0).standard_normal(IN)
    z = 0.5 * x + np.random.default_rng(1).standard_normal(IN)
    signed, plain = [], []
    for seed in range(300):
        slots, signs = definition(element_map(1, IN, 10, seed=seed))
        for estimates, g in ((signed, signs), (plain, np.ones_like(signs))):
            estimates.append(hashed_features(x, slots, g, 10)[0] @ hashed_features(z, slots, g, 10)[0])
    # Each of the IN (IN - 1) pairs of coordinates meets with probability 1 / 10, and adds x_i z_j.
    bias = (x.sum() * z.sum() - x @ z) / 10
    for estimates, expected in ((signed, x @ z), (plain, x @ z + bias)):
        assert abs(np.mean(estimates) - expected) < 4 * np.std(estimates) / np.sqrt(300)


def test_loads_are_uniform():
    """Invariant (e): chi-square of 100,000 entries on 50 slots."""
    slots, signs = definition(element_map(200, 500, 50, seed=1))
    assert stats.chisquare(np.bincount(slots.reshape(-1), minlength=50)).pvalue > 1e-3
    # Locations and signs are independent: so is the sum of signs of each slot.
    sums = np.bincount(slots.reshape(-1), signs.reshape(-1), 50)
    assert stats.chi2.sf((sums**2 / np.bincount(slots.reshape(-1))).sum(), 50) > 1e-3


def test_gradient_is_the_pulled_gradient_of_the_matrix():
    """Invariant (f): dmemory[k] = sum over h(i, j) = k of sign * dy_i * x_j."""
    layer, x, cotangent = HashedDense(OUT, budget=50, seed=4), draw(6, IN, seed=1), draw(6, OUT, seed=2)
    variables = {"params": {"memory": draw(50), "bias": np.zeros(OUT, np.float32)}}
    sharing = layer.sharing_map(IN)

    @jax.jit
    def both(variables):
        _, backward = jax.vjp(lambda variables: layer.apply(variables, x), variables)
        return backward(cotangent)[0]["params"], pull(sharing, cotangent.T @ x)

    gradient, pulled = both(variables)
    np.testing.assert_allclose(gradient["memory"], pulled, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient["bias"], cotangent.sum(0), rtol=1e-5, atol=1e-5)
    slots, signs = definition(sharing)
    loop = np.zeros(50)
    for i in range(OUT):
        for j in range(IN):
            loop[slots[i, j]] += signs[i, j] * float(cotangent[:, i] @ x[:, j])
    np.testing.assert_allclose(pulled, loop, rtol=1e-4, atol=1e-4)


class TwoLayers(nn.Module):
    seed: int | None = None

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(HashedDense(16, budget=64, seed=self.seed, name="first")(x))
        return HashedDense(16, budget=64, seed=self.seed, name="second")(hidden)


@pytest.mark.parametrize("seed", [None, 3])
def test_layers_of_one_model_have_maps_of_their_own(seed):
    """By default: a given seed is kept."""
    maps = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, HashedDense) and context.method_name == "__call__":
            maps.append(context.module.sharing_map(16))
        return call(*args, **kwargs)

    for _ in range(2):
        with nn.intercept_methods(note):
            jax.eval_shape(TwoLayers(seed).init, jax.random.key(0), jnp.zeros((1, 16)))
    first, second, first_again, second_again = (definition(sharing)[0] for sharing in maps)
    np.testing.assert_array_equal(first, first_again)
    np.testing.assert_array_equal(second, second_again)
    assert (first == second).all() == (seed is not None)


def test_memory_starts_with_the_variance_of_dense():
    """Uniform of variance 1 / inputs, as the kernel of `flax.linen.Dense`, within 5 standard errors."""
    x, n = np.zeros((1, 64), np.float32), 30_000
    params = jax.jit(HashedDense(600, budget=n).init)(jax.random.key(0), x)["params"]
    assert np.abs(params["memory"]).max() <= (3 / 64) ** 0.5
    error = 3 / 64 * np.sqrt((1 / 5 - 1 / 9) / n)
    assert abs(np.var(params["memory"]) - 1 / 64) < 5 * error
    np.testing.assert_array_equal(params["bias"], np.zeros(600))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_stands_in_for_dense(dtype, param_dtype):
    common, results = {"features": 8, "dtype": dtype, "param_dtype": param_dtype}, []
    for module in (nn.Dense(**common), HashedDense(**common, budget=20)):
        for x in (jnp.zeros((0, 6)), jnp.zeros((2, 3, 6), jnp.bfloat16)):
            variables = jax.eval_shape(module.init, jax.random.key(0), x)
            y = jax.eval_shape(module.apply, variables, x)
            results.append((y.shape, y.dtype, variables["params"]["bias"].dtype))
    assert results[:2] == results[2:]


def test_the_budget_and_the_bias_are_all_that_is_stored():
    key, x = jax.random.key(0), jnp.zeros((1, 100))
    dense = jax.eval_shape(nn.Dense(64, use_bias=False).init, key, x)
    for asked in (1, 3, 8, 64):
        hashed = jax.eval_shape(HashedDense(64, compression=asked, use_bias=False).init, key, x)
        assert compression(dense, hashed) >= asked
        assert len(jax.tree.leaves(hashed)) == 1
    assert stored_bytes(jax.eval_shape(HashedDense(64, budget=77).init, key, x)) == 4 * (77 + 64)


def test_memory_in_use_is_far_below_the_matrix():
    """4,096 x 1,024 weights are 16 MiB; forward and backward hold 64 rows at a time, in a few copies."""
    layer = HashedDense(4096, budget=10_000, row_block=64)
    x = jnp.zeros((8, 1024))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)

    def loss(variables, x):
        y: Any = layer.apply(variables, x)
        return (y**2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(variables, x).compile()
    used = compiled.memory_analysis()
    assert used is not None
    assert used.temp_size_in_bytes < 4096 * 1024 * 4 / 10
