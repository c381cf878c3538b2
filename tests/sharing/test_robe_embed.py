"""`RobeEmbed` stands in for `flax.linen.Embed`: calls, dtypes, wrong ids, training; and stores its budget."""

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hashml.accounting import compression, stored_bytes
from hashml.hashing import Limbs, split64
from hashml.sharing import RobeEmbed, block_map, robe_lookup


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def apply(module, variables, *inputs, **how) -> Any:
    """`flax.linen.Module.apply`, which is typed to return variables too."""
    return module.apply(variables, *inputs, **how)


def table_of(module, memory):
    """The whole virtual table, by the map's definition."""
    ids = np.arange(module.num_embeddings)
    sharing = module.sharing_map()
    return memory[sharing.slots(ids)] * np.asarray(sharing.signs(ids))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16, jnp.float16])
def test_calls_shapes_and_dtypes_are_those_of_embed(dtype, param_dtype):
    ids, query, key = np.array([[0, 9, 3]], np.int32), jnp.ones((2, 5), jnp.bfloat16), jax.random.key(0)
    common = {"num_embeddings": 10, "features": 5, "dtype": dtype, "param_dtype": param_dtype}
    results = []
    for module in (nn.Embed(**common), RobeEmbed(**common, budget=16)):
        variables = jax.eval_shape(module.init, key, ids)
        rows = jax.eval_shape(module.apply, variables, ids)
        logits = jax.eval_shape(lambda v, q, module=module: module.apply(v, q, method="attend"), variables, query)
        results.append(((rows.shape, rows.dtype), (logits.shape, logits.dtype)))
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(param_dtype)}
    assert results[0] == results[1]


@pytest.mark.parametrize("layout", [{"block_size": 5}, {"sign": "element"}, {"align": 16}, {"block_size": 1}])
def test_rows_and_attend_are_those_of_the_table(layout):
    module = RobeEmbed(50, 12, budget=64, seed=2, **layout)
    memory, query, ids = draw(64), draw(2, 3, 12, seed=1), np.array([[0, 49, 7], [7, 0, 1]], np.int32)
    table = table_of(module, memory)

    @jax.jit
    def both(variables):
        return module.apply(variables, ids), module.apply(variables, query, method="attend")

    rows, logits = both({"params": {"memory": memory}})
    np.testing.assert_array_equal(rows, table[ids])
    np.testing.assert_allclose(logits, query @ table.T, rtol=1e-5, atol=1e-5)


def test_attend_holds_few_rows_of_a_large_table():
    """A million rows of 64 would be 256 MB; forward and backward get by with a block of them and the logits."""
    module = RobeEmbed(1_000_000, 64, budget=1000)

    def loss(memory, query):
        return (apply(module, {"params": {"memory": memory}}, query, method="attend") ** 2).sum()

    compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros(1000), jnp.zeros((1, 64))).compile()
    used = compiled.memory_analysis()
    assert used is not None
    assert used.temp_size_in_bytes < 4 * 1_000_000 * 64 / 8


def test_ids_beyond_the_table_are_nan_as_with_embed():
    """Negative ids too, which `flax.linen.Embed` reads from the end: a wrong id never reads another's row."""
    ids, full, robe = np.array([0, 3, 4, 100], np.int32), nn.Embed(4, 8), RobeEmbed(4, 8, budget=16)
    expected = np.isnan(jax.jit(apply, static_argnums=0)(full, {"params": {"embedding": draw(4, 8)}}, ids))
    variables = {"params": {"memory": draw(16)}}
    for look_up in (apply, jax.jit(apply, static_argnums=0)):
        np.testing.assert_array_equal(np.isnan(look_up(robe, variables, ids)), expected)
        np.testing.assert_array_equal(np.isnan(look_up(robe, variables, -ids)).all(-1), [False, True, True, True])


@pytest.mark.parametrize(
    "ids", [split64([3, 2**32 + 3, 2**33 - 1, 2**33]), np.array([3, 2**32 + 3, 2**33 - 1, 2**33])]
)
def test_tables_of_more_than_32_bits_take_limbs_or_numpy_ids(ids):
    memory, module = draw(64), RobeEmbed(2**33, 8, budget=64, block_size=4)
    found = apply(module, {"params": {"memory": memory}}, ids)
    sharing = block_map(2**33, 8, 64, block_size=4)
    words = split64([3, 2**32 + 3, 2**33 - 1])
    np.testing.assert_array_equal(found[:3], memory[sharing.slots(words)])
    assert np.isnan(found[3]).all()
    if isinstance(ids, Limbs):
        np.testing.assert_array_equal(jax.jit(module.apply)({"params": {"memory": memory}}, ids), found)


def test_one_leaf_is_stored_and_compresses_as_asked():
    ids, key = np.arange(3), jax.random.key(0)
    full = jax.eval_shape(nn.Embed(1000, 24).init, key, ids)
    for asked in (1, 7, 12.5, 100, 24_000 / 8):
        variables = jax.eval_shape(RobeEmbed(1000, 24, compression=asked).init, key, ids)
        assert asked <= compression(full, variables) < 1.04 * asked
        assert len(jax.tree.leaves(variables)) == 1
    variables = jax.eval_shape(RobeEmbed(1000, 24, compression=7, align=128).init, key, ids)
    assert variables["params"]["memory"].size % 128 == 0
    assert compression(full, variables) >= 7
    for param_dtype, width in ((jnp.float32, 4), (jnp.bfloat16, 2)):
        variables = jax.eval_shape(RobeEmbed(1000, 24, budget=1234, param_dtype=param_dtype).init, key, ids)
        assert stored_bytes(variables) == width * 1234


def test_rows_start_with_the_spread_of_embed():
    """Standard deviation 1 / sqrt(features), within 5 standard errors (of a normal: 1 / sqrt(2 n))."""
    key, ids = jax.random.key(1), np.arange(1)
    for module in (RobeEmbed(10**6, 16, budget=16_000), nn.Embed(1000, 16)):
        (weights,) = jax.tree.leaves(jax.jit(module.init)(key, ids))
        assert weights.size == 16_000
        assert abs(np.std(weights) * 16**0.5 - 1) < 5 / np.sqrt(2 * 16_000)
    ones = jax.jit(RobeEmbed(9, 4, budget=20, embedding_init=nn.initializers.ones).init)(key, ids)
    np.testing.assert_array_equal(ones["params"]["memory"], np.ones(20))


def test_jit_and_vmap_change_nothing():
    module, ids = RobeEmbed(50, 12, budget=61, block_size=5, sign="element"), np.array([[0, 49, 7], [7, 7, 50]])
    variables = {"params": {"memory": draw(61)}}
    rows = apply(module, variables, ids)
    np.testing.assert_array_equal(rows[:, -1], [table_of(module, draw(61))[7], np.full(12, np.nan)])
    np.testing.assert_array_equal(jax.jit(module.apply)(variables, ids), rows)
    np.testing.assert_array_equal(jax.jit(jax.vmap(module.apply, (None, 0)))(variables, ids), rows)


def test_models_side_by_side_have_their_own_gradients():
    """vmap over memories: what a search over learning rates needs."""
    memories, ids = draw(3, 61), np.arange(9)
    gradient = jax.grad(lambda memory: (robe_lookup(memory, ids, features=6) ** 2).sum())
    expected = jax.jit(lambda memories: [gradient(memory) for memory in memories])(memories)
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(memories), expected, rtol=1e-6)


def test_geometry_is_json_and_makes_the_map_again():
    module = RobeEmbed(50, 12, budget=64, block_size=5, seed=2**40, sign="element", align=4)
    geometry = json.loads(json.dumps(module.sharing_map().geometry))
    assert geometry.pop("map") == "block"
    again, ids = block_map(**geometry), np.arange(50)
    np.testing.assert_array_equal(again.slots(ids), module.sharing_map().slots(ids))
    np.testing.assert_array_equal(again.signs(ids), module.sharing_map().signs(ids))


class Tagger(nn.Module):
    """A model that is handed its embedding, and ties the output layer to it."""

    embedding: nn.Module

    @nn.compact
    def __call__(self, ids):
        hidden = nn.tanh(nn.Dense(8)(self.embedding(ids)))
        return self.embedding.attend(hidden)


EMBEDDINGS = {"full": nn.Embed(20, 8), "robe": RobeEmbed(20, 8, budget=40, block_size=4)}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_model_trains_with_either_embedding(name):
    """Learn a permutation of 20 ids: the same model and steps, the embedding swapped."""
    model, ids = Tagger(EMBEDDINGS[name]), np.arange(20)
    target, optimizer = (ids * 7 + 3) % 20, optax.adam(0.05)

    def loss(variables):
        return optax.softmax_cross_entropy_with_integer_labels(apply(model, variables, ids), target).mean()

    @jax.jit
    def train(key):
        variables = model.init(key, ids)

        def step(carry, _):
            variables, state = carry
            value, gradient = jax.value_and_grad(loss)(variables)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(variables, updates), state), value

        return jax.lax.scan(step, (variables, optimizer.init(variables)), length=60)[1]

    losses = np.asarray(train(jax.random.key(0)))
    assert abs(losses[0] - np.log(20)) < 1
    assert losses[-1] < 0.5 * losses[0]
