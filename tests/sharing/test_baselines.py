"""What ROBE is compared with: each stays within the budget, and does what its paper says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.sharing import HashingTrickTables, NarrowTables, QuotientRemainderTables

BASELINES = {
    "hashing_trick": HashingTrickTables,
    "quotient_remainder": QuotientRemainderTables,
    "narrow": NarrowTables,
}
SIZES = (40, 1000, 3)
EVERY_ID = np.stack([np.arange(1000) % size for size in SIZES], axis=-1)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parameters(module):
    """Shapes of the parameters, of which nothing is computed."""
    return jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, len(module.num_embeddings)), np.int32))


def random_parameters(module):
    return jax.tree.map(lambda leaf: draw(*leaf.shape), parameters(module))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("compression", [1, 1.5, 4, 15])
def test_stored_bytes_are_within_the_budget_and_near_it(name, compression):
    features = 16
    budget = int(sum(SIZES) * features / compression)
    used = stored_bytes(parameters(BASELINES[name](SIZES, features, budget=budget))) / (4 * budget)
    # A narrow table spends whole columns: at a budget of w and a half of them, a third of one's share is lost.
    least = 0.9 if name != "narrow" else (budget // (sum(SIZES) + features)) * (sum(SIZES) + features) / budget
    assert least <= used <= 1


@pytest.mark.parametrize("name", BASELINES)
def test_rows_have_the_shape_of_the_ids(name):
    module = BASELINES[name](SIZES, 8, budget=3000)
    variables, ids = random_parameters(module), np.array([[[0, 0, 0], [39, 999, 2]]], np.int32)
    rows = jax.jit(module.apply)(variables, ids)
    assert (rows.shape, rows.dtype) == ((1, 2, 3, 8), jnp.float32)
    assert np.isfinite(rows).all()
    assert len(np.unique(rows.reshape(6, 8), axis=0)) == 6  # equal ids of different tables are different rows
    assert jax.eval_shape(module.apply, variables, np.zeros((0, 3), np.int32)).shape == (0, 3, 8)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_an_id_outside_its_table_is_nan_and_has_no_gradient(name, dtype):
    module = BASELINES[name](SIZES, 8, budget=3000)
    variables = random_parameters(module)
    beyond = 1000 if dtype == np.int32 else 2**32 + 1
    ids = np.array([[-1, 5, 2], [40, 999, 3], [39, beyond, 0]], dtype)
    outside = (ids < 0) | (ids >= SIZES)

    @jax.jit
    def rows_and_gradient(variables):
        rows, backward = jax.vjp(lambda variables: module.apply(variables, ids), variables)
        ones = jnp.ones_like(rows)
        return rows, backward(ones)[0], backward(ones * ~outside[..., None])[0]

    rows, gradient, inside = rows_and_gradient(variables)
    np.testing.assert_array_equal(np.isnan(rows).all(-1), outside)
    np.testing.assert_array_equal(np.isnan(rows).any(-1), outside)
    jax.tree.map(np.testing.assert_array_equal, gradient, inside)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_hashing_trick_reads_a_row_of_its_table():
    module = HashingTrickTables(SIZES, 5, budget=103)
    variables = random_parameters(module)
    table = variables["params"]["table"]
    assert table.shape == (20, 5)
    rows = np.asarray(jax.jit(module.apply)(variables, EVERY_ID)).reshape(-1, 5)
    assert {row.tobytes() for row in rows} == {row.tobytes() for row in np.asarray(table)}


def test_hashing_trick_collides_as_often_as_chance():
    """Over 150 seeds, pairs of 200 ids meet in one of k rows with probability 1 / k, in standard errors."""
    k, ids, met = 50, np.arange(200)[:, None], []
    variables = {"params": {"table": jnp.arange(k, dtype=jnp.float32)[:, None]}}
    for seed in range(150):
        slots = HashingTrickTables((200,), 1, budget=k, seed=seed).apply(variables, ids)
        load = np.bincount(np.asarray(slots).reshape(-1).astype(int), minlength=k)
        met.append((load * (load - 1)).sum() / 2)
    expected, error = 200 * 199 / 2 / k, np.std(met) / np.sqrt(len(met))
    assert abs(np.mean(met) - expected) < 4 * error
    assert error < expected / 20  # so that the line above says something


def pairs_of(module):
    """The (quotient, remainder) of every row: tables that are 1 in one coordinate show the other's index."""
    shapes = {name: leaf.shape[0] for name, leaf in parameters(module)["params"].items()}
    quotient = np.stack([np.arange(shapes["quotient"]), np.ones(shapes["quotient"])], -1, dtype=np.float32)
    remainder = np.stack([np.ones(shapes["remainder"]), np.arange(shapes["remainder"])], -1, dtype=np.float32)
    variables = {"params": {"quotient": quotient, "remainder": remainder}}
    return shapes, np.asarray(jax.jit(module.apply)(variables, EVERY_ID))


@pytest.mark.parametrize("stored", [65, 66, 100, 700, 1043, 1044, 5000])
def test_quotient_remainder_gives_every_row_its_own_pair(stored):
    """1,043 rows need 65 stored ones, 32 x 33; few quotients, so that most rows keep their own remainder."""
    shapes, rows = pairs_of(QuotientRemainderTables(SIZES, 2, budget=2 * stored))
    assert min(stored, 1044) == shapes["quotient"] + shapes["remainder"]
    pairs = np.unique(np.concatenate([rows[: SIZES[t], t] for t in range(3)]), axis=0)
    assert len(pairs) == sum(SIZES)
    fewer = shapes["quotient"] - 1
    assert fewer * (stored - fewer) < sum(SIZES)


@pytest.mark.parametrize("stored", [2, 3, 40, 64])
def test_quotient_remainder_hashes_where_pairs_are_too_few(stored):
    shapes, rows = pairs_of(QuotientRemainderTables(SIZES, 2, budget=2 * stored))
    assert shapes["quotient"] + shapes["remainder"] == stored
    pairs = np.unique(rows.reshape(-1, 2), axis=0)
    possible = shapes["quotient"] * shapes["remainder"]
    # 1,043 rows thrown at so many pairs leave few empty: more than half are hit whatever the hash, nearly.
    assert possible / 2 < len(pairs) <= possible
    np.testing.assert_array_less(pairs.max(0), [shapes["quotient"], shapes["remainder"]])


def test_quotient_remainder_rows_start_with_the_spread_of_a_plain_table():
    """(1 + u) v with u, v uniform on +- a: mean 0, variance s (1 + s) for s = a**2 / 3."""
    module = QuotientRemainderTables((400,), 64, budget=64 * 60)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 1), np.int32))
    rows = np.asarray(jax.jit(module.apply)(variables, np.arange(400)[:, None]))
    s = 1 / 400 / 3
    # 400 x 64 products of only 60 x 64 draws: as precise as some 50 x 64 independent ones.
    assert abs(rows.var() / (s * (1 + s)) - 1) < 4 * np.sqrt(0.8 / (50 * 64))


def test_narrow_is_a_narrow_table_and_a_projection():
    module = NarrowTables(SIZES, 8, budget=3 * (sum(SIZES) + 8) + 7)
    variables = random_parameters(module)
    shapes = {name: leaf.shape for name, leaf in variables["params"].items()}
    assert shapes == {"table": (1043, 3), "projection": (3, 8)}
    rows = jax.jit(module.apply)(variables, EVERY_ID)
    table, projection = variables["params"]["table"], variables["params"]["projection"]
    for t, offset in enumerate((0, 40, 1040)):
        np.testing.assert_allclose(rows[:, t], table[EVERY_ID[:, t] + offset] @ projection, rtol=1e-5, atol=1e-5)


def test_narrow_with_room_for_all_is_the_full_table():
    module = NarrowTables(SIZES, 8, budget=sum(SIZES) * 8)
    variables = random_parameters(module)
    assert {name: leaf.shape for name, leaf in variables["params"].items()} == {"table": (1043, 8)}
    rows = jax.jit(module.apply)(variables, EVERY_ID)
    np.testing.assert_array_equal(rows[:, 1], variables["params"]["table"][40:1040])


@pytest.mark.parametrize("name", ["hashing_trick", "quotient_remainder"])
def test_more_virtual_rows_than_32_bits(name):
    """Tables of 2**31 rows each: the rows of the third are numbered beyond 2**32, and stay apart from the first's."""
    module = BASELINES[name]((2**31, 2**31, 2**31), 4, budget=4000)
    ids = np.array([[7, 7, 7], [2**31 - 1, 2**31 - 1, 2**31 - 1]], np.uint32)
    rows = np.asarray(jax.jit(module.apply)(random_parameters(module), ids)).reshape(6, 4)
    assert np.isfinite(rows).all()
    assert len(np.unique(rows, axis=0)) == 6


def test_quotient_remainder_with_more_pairs_than_a_hash_has_slots():
    """100,000 stored rows make 2.5e9 pairs, for 3e9 virtual rows."""
    module = QuotientRemainderTables((3_000_000_000,), 1, budget=100_000)
    rows = jax.jit(module.apply)(random_parameters(module), np.arange(1000, dtype=np.uint32)[:, None])
    assert np.isfinite(rows).all()
    assert len(np.unique(rows)) > 990
