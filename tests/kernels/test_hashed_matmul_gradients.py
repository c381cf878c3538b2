"""The gradients of the op are those of an ordinary matrix, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from hashml_kernels.hashed_matmul import TileGeometry, hashed_matmul, pull, reference

EPS = float(np.finfo(np.float32).eps)

GEOMETRY = TileGeometry(3 * 2**14, 300, 200, (128, 128), "fold", 9, "element", 2**15, 2**14)
OPTIONS = {
    "columns": 200,
    "tile": (128, 128),
    "map": "fold",
    "seed": 9,
    "sign": "element",
    "offset": 2**15,
    "align": 2**14,
    "scale": 0.5,
}
IMPLEMENTATIONS = ["auto", "reference", "xla", "pallas_triton", "pallas_mosaic_tpu"]


def draw(rng: np.random.Generator, *shape: int, dtype="float32") -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)))


def dense(x, memory):
    """What autodiff sees of the op: W is formed, and is an ordinary matrix."""
    return 0.5 * jnp.einsum("...k,kc->...c", x, reference.expand(memory, GEOMETRY), precision="highest")


def assert_alike(got, expected) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=600 * EPS * float(jnp.abs(other).max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_equal_autodiff_of_the_matrix(implementation):
    rng = np.random.default_rng(10)
    x, memory, y = draw(rng, 2, 3, 300), draw(rng, GEOMETRY.budget), draw(rng, 2, 3, 200)

    def gradients(product):
        return jax.jit(jax.value_and_grad(lambda x, memory: jnp.vdot(product(x, memory), y), (0, 1)))(x, memory)

    assert_alike(
        gradients(functools.partial(hashed_matmul, **OPTIONS, implementation=implementation)), gradients(dense)
    )


@pytest.mark.parametrize("implementation", ["auto", "pallas_triton"])
def test_gradients_have_gradients(implementation):
    """Each op's gradients are the other two ops, so reverse mode goes on as far as one likes."""
    rng = np.random.default_rng(11)
    x, memory = draw(rng, 4, 300), draw(rng, GEOMETRY.budget)

    def twice(product):
        def once(x, memory):
            grads = jax.grad(lambda x, memory: (product(x, memory) ** 2).sum(), (0, 1))(x, memory)
            return sum((jnp.sin(grad)).sum() for grad in grads)

        return jax.jit(jax.grad(once, (0, 1)))(x, memory)

    # The sine of numbers of some thousand magnifies their rounding.
    got = twice(functools.partial(hashed_matmul, **OPTIONS, implementation=implementation))
    for one, other in zip(got, twice(dense), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-3 * float(jnp.abs(other).max()))


def test_operands_of_two_dtypes_are_promoted_and_gradients_are_not():
    rng = np.random.default_rng(12)
    x, memory = draw(rng, 4, 300, dtype="bfloat16"), draw(rng, GEOMETRY.budget)
    y, back = jax.vjp(functools.partial(hashed_matmul, **OPTIONS), x, memory)
    dx, dmemory = back(y)
    assert (y.dtype, dx.dtype, dmemory.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert_alike(y, dense(x.astype(jnp.float32), memory))


@pytest.mark.parametrize("implementation", ["auto", "pallas_triton", "pallas_mosaic_tpu"])
def test_vmap_twice(implementation):
    """Over memories and, within, over batches of one memory; and so the gradients."""
    rng = np.random.default_rng(13)
    x, memory = draw(rng, 2, 3, 5, 300), draw(rng, 2, GEOMETRY.budget)

    def values(product):
        twice = jax.vmap(jax.vmap(product, (0, None)), (0, 0))
        return jax.jit(jax.value_and_grad(lambda x, memory: (twice(x, memory) ** 2).sum(), (0, 1)))(x, memory)

    assert_alike(values(functools.partial(hashed_matmul, **OPTIONS, implementation=implementation)), values(dense))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_batch_may_be_cut_anywhere(implementation):
    rng = np.random.default_rng(14)
    x, memory = draw(rng, 37, 300), draw(rng, GEOMETRY.budget)
    product = jax.jit(functools.partial(hashed_matmul, **OPTIONS, implementation=implementation))
    assert_alike(product(x, memory), jnp.concatenate([product(x[:5], memory), product(x[5:], memory)]))


@pytest.mark.parametrize("shape", [(300,), (0, 300), (2, 0, 300)])
def test_batches_of_any_shape(shape):
    memory = jnp.ones(GEOMETRY.budget)
    y, back = jax.vjp(functools.partial(hashed_matmul, **OPTIONS), jnp.ones(shape), memory)
    assert y.shape == (*shape[:-1], 200)
    dx, dmemory = back(y)
    assert dx.shape == shape
    assert bool(dmemory.any()) == (len(shape) == 1)


def test_backward_keeps_x_and_memory_only():
    x, memory = jnp.ones((5, 300)), jnp.ones(GEOMETRY.budget)
    _, back = jax.vjp(functools.partial(hashed_matmul, **OPTIONS), x, memory)
    assert sorted(np.size(leaf) for leaf in jax.tree.leaves(back)) == [x.size, memory.size]


@pytest.mark.parametrize("implementation", ["auto", "pallas_triton", "pallas_mosaic_tpu"])
def test_under_shard_map(implementation):
    """A batch over eight devices, a memory on each: its gradient is the sum over all of them."""
    rng = np.random.default_rng(15)
    x, memory = draw(rng, 8, 2, 300), draw(rng, GEOMETRY.budget)
    product = functools.partial(hashed_matmul, **OPTIONS, implementation=implementation)
    checked = implementation == "auto"  # the interpreter of kernels mixes what varies with what does not

    def gradients(x, memory):
        dx, dmemory = jax.grad(lambda x, memory: (product(x, memory) ** 2).sum(), (0, 1))(x, memory)
        return dx, dmemory if checked else jax.lax.psum(dmemory, "data")

    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = jax.shard_map(
        gradients, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P()), check_vma=checked
    )
    whole = jax.grad(lambda x, memory: (dense(x, memory) ** 2).sum(), (0, 1))
    assert_alike(jax.jit(split)(x, memory), jax.jit(whole)(x, memory))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(16)
        geometry = TileGeometry(101, 37, 29, (5, 7), "fold", seed=2)
        x, memory = jnp.asarray(rng.standard_normal((4, 37))), jnp.asarray(rng.standard_normal(101))

        @jax.jit
        def both(x, memory):
            product = functools.partial(hashed_matmul, columns=29, tile=(5, 7), map="fold", seed=2)
            y, back = jax.vjp(product, x, memory)
            return reference.expand(memory, geometry), y, back(y)[1], pull(x.T @ y, geometry)

        w, y, gradient, expected = both(x, memory)
        np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(w), rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12)
