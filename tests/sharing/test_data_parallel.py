"""A memory that every device holds: the gradient over eight devices is that of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.models.dlrm import DLRM, binary_cross_entropy
from hashml.models.training import data_parallel_value_and_grad, sharded_value_and_grad
from hashml.sharing import RobeTables, robe_bag
from hashml_kernels.hash_gather import hash_scatter

SIZES = (50, 60, 70)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",))


# Aligned as a TPU's kernel asks, and as it does not: every platform's branch is traced either way.
@pytest.mark.parametrize(("block_size", "align"), [(128, 128), (16, 1)])
@pytest.mark.parametrize("parallel", [data_parallel_value_and_grad, sharded_value_and_grad])
def test_dlrm_with_robe_has_the_gradient_of_one_device(mesh, parallel, block_size, align):
    tables = RobeTables(SIZES, 128, budget=1280, block_size=block_size, align=align, sign="element")
    model = DLRM(tables, bottom=(), top=(8, 1))
    rng = np.random.default_rng(0)
    batch = {
        "ids": jnp.stack([jnp.asarray(rng.integers(0, size, 64), jnp.int32) for size in SIZES], axis=1),
        "labels": jnp.asarray(rng.integers(0, 2, 64), jnp.float32),
    }
    params = model.init(jax.random.key(0), None, batch["ids"][:2])["params"]

    def loss(params, batch):
        logits = model.apply({"params": params}, None, batch["ids"])
        return binary_cross_entropy(jnp.asarray(logits), batch["labels"])

    expected, expected_gradient = jax.value_and_grad(loss)(params, batch)
    found, gradient = parallel(loss, mesh)(params, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bags_and_their_weights_split_over_devices(mesh):
    memory = jax.random.normal(jax.random.key(0), (256,))
    ids = jax.random.randint(jax.random.key(1), (16, 5), 0, 1000)
    weights = jax.random.uniform(jax.random.key(2), (16, 5))

    def loss(params, batch):
        memory, factor = params
        bags = robe_bag(memory, batch["ids"], features=16, block_size=4, weights=batch["weights"] * factor)
        return (bags**2).mean()

    params, batch = (memory, jnp.float32(0.5)), {"ids": ids, "weights": weights}
    expected = jax.value_and_grad(loss)(params, batch)
    found = data_parallel_value_and_grad(loss, mesh)(params, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_scatters_of_the_parts_add_up(mesh):
    ids = jnp.arange(64)
    gradients = jax.random.normal(jax.random.key(3), (64, 8))

    def part(gradients, ids):
        return jax.lax.psum(hash_scatter(gradients, ids, budget=100, block_size=4), "data")

    split = jax.NamedSharding(mesh, jax.P("data"))
    summed = jax.shard_map(part, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())
    found = summed(jax.device_put(gradients, split), jax.device_put(ids, split))
    np.testing.assert_allclose(found, hash_scatter(gradients, ids, budget=100, block_size=4), rtol=1e-5, atol=1e-5)
