"""Several tables over one memory: apart by offset or by seed, of one width or many, beyond 2**32 rows in all."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import compression, stored_bytes
from hashml.embeddings import EmbeddingTables
from hashml.hashing import split64
from hashml.sharing import RobeTables, block_map

SIZES = (10, 300, 7)
IDS = np.array([[0, 0, 0], [9, 299, 6], [5, 5, 5]], np.int32)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def apply(tables, memory, ids) -> Any:
    return tables.apply({"params": {"memory": memory}}, ids)


def rows_of(tables, memory, ids):
    return jax.jit(lambda memory: apply(tables, memory, ids))(memory)


def read(memory, rows, *, features, **layout):
    """Rows by the definition of the map; ``rows`` are Python ints."""
    sharing = block_map(2**64, features, len(memory), **layout)
    words = split64(np.array(rows, np.uint64))
    return memory[sharing.slots(words)] * np.asarray(sharing.signs(words))


@pytest.mark.parametrize(
    "layout", [{"block_size": 4}, {"block_size": 3, "sign": "element", "seed": 8}, {"align": 16}]
)
def test_tables_are_one_table_on_concatenated_ids(layout):
    memory = draw(96)
    found = rows_of(RobeTables(SIZES, 8, budget=96, **layout), memory, IDS)
    whole = (IDS + np.array([0, 10, 310])).reshape(-1).tolist()
    np.testing.assert_array_equal(found.reshape(9, 8), read(memory, whole, features=8, **layout))


def test_equal_ids_of_different_tables_are_different_rows():
    memory = np.arange(1000, dtype=np.float32)
    for seed in (0, (4, 5, 6)):
        first, second, third = np.asarray(rows_of(RobeTables(SIZES, 8, budget=1000, seed=seed), memory, IDS))[0]
        assert (first != second).any()
        assert (second != third).any()


@pytest.mark.parametrize("seed", [3, (3, 4, 5)])
def test_widths_differ_from_table_to_table(seed):
    """One array a table; with one width for all, one array."""
    memory, widths = draw(96), (8, 3, 12)
    found = rows_of(RobeTables(SIZES, widths, budget=96, block_size=4, seed=seed), memory, IDS)
    assert isinstance(found, tuple)
    seeds, offsets = ((seed,) * 3, (0, 10, 310)) if isinstance(seed, int) else (seed, (0, 0, 0))
    for t, rows in enumerate(found):
        whole = (IDS[:, t] + offsets[t]).tolist()
        np.testing.assert_array_equal(rows, read(memory, whole, features=widths[t], block_size=4, seed=seeds[t]))
    same = rows_of(RobeTables(SIZES, (8, 8, 8), budget=96, block_size=4, seed=seed), memory, IDS)
    assert same.shape == (3, 3, 8)
    np.testing.assert_array_equal(same[:, 0], found[0])


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("seed", [0, (1, 2, 3)])
def test_an_id_outside_its_table_is_nan(dtype, seed):
    """Though it lies inside a neighbour's rows; a 64-bit id of NumPy is not cut to 32 bits."""
    wide = dtype != np.int32
    ids = np.array([[10, 0, 6], [-1, 10, 7], [2**32 if wide else 0, 300, 0], [3, 2**33 + 1 if wide else -9, 1]])
    outside = (ids < 0) | (ids >= SIZES)
    rows = rows_of(RobeTables(SIZES, 4, budget=64, seed=seed), draw(64), ids.astype(dtype))
    np.testing.assert_array_equal(np.isnan(rows), np.repeat(outside[..., None], 4, -1))


@pytest.mark.parametrize("sizes", [(2**31, 2**31, 2**31), (2**32 - 1, 2**32, 7), (2**31, 2**31 - 5, 5)])
def test_tables_with_more_than_32_bits_of_rows_together(sizes):
    """The last one just fits 2**32 rows, and needs no limbs."""
    memory = draw(96)
    ids = np.array([[0, 0, 0], [2**31 - 1, 2**31 - 6, 4], [12345, 2**31 - 7, 3]], np.uint32)
    offsets = [0, sizes[0], sizes[0] + sizes[1]]
    whole = [int(row[t]) + offsets[t] for row in ids for t in range(3)]
    expected = read(memory, whole, features=8, block_size=4, sign="element").reshape(3, 3, 8)
    tables = RobeTables(sizes, 8, budget=96, block_size=4, sign="element")
    np.testing.assert_array_equal(rows_of(tables, memory, ids), expected)
    np.testing.assert_array_equal(rows_of(tables, memory, ids.astype(np.int64)), expected)
    last = np.array([sizes, [size - 1 for size in sizes]])
    found = rows_of(tables, memory, split64(last))
    np.testing.assert_array_equal(np.isnan(found).all(-1), [[True] * 3, [False] * 3])
    ends = [last + offset for last, offset in zip(last[1].tolist(), offsets, strict=True)]
    np.testing.assert_array_equal(found[1], read(memory, ends, features=8, block_size=4, sign="element"))


def test_gradient_adds_up_over_all_tables():
    tables, cotangent = RobeTables(SIZES, 8, budget=64, block_size=4), draw(4, 3, 8)
    ids = np.concatenate([IDS, [[-1, 300, 3]]])  # only the last of these is a row

    @jax.jit
    def gradient(memory):
        _, backward = jax.vjp(lambda memory: apply(tables, memory, ids), memory)
        return backward(cotangent)[0]

    expected = np.zeros(64)
    slots = np.asarray(block_map(400, 8, 64, block_size=4).slots(np.maximum(ids, 0) + np.array([0, 10, 310])))
    np.add.at(expected, slots[:3], cotangent[:3])
    np.add.at(expected, slots[3, 2], cotangent[3, 2])
    np.testing.assert_allclose(gradient(draw(64)), expected, rtol=1e-5, atol=1e-5)


def test_the_budget_is_all_that_is_stored():
    key = jax.random.key(0)
    full = jax.eval_shape(EmbeddingTables(SIZES, 8).init, key, IDS)
    for asked in (1, 3, 10.5, 100):
        variables = jax.eval_shape(RobeTables(SIZES, 8, compression=asked).init, key, IDS)
        assert len(jax.tree.leaves(variables)) == 1
        assert compression(full, variables) >= asked
    half = jax.eval_shape(RobeTables(SIZES, (8, 3, 12), budget=100, param_dtype=jnp.bfloat16).init, key, IDS)
    assert stored_bytes(half) == 200


def test_memory_starts_uniform_by_the_largest_table():
    """On +- 1 / sqrt(rows), standard deviation that over sqrt(3), within 5 standard errors."""
    tables = RobeTables((10, 400), 8, budget=20_000)
    memory = jax.jit(tables.init)(jax.random.key(0), IDS[:, :2])["params"]["memory"]
    limit = 400**-0.5
    assert np.abs(memory).max() <= limit
    # The fourth moment of a uniform is a**4 / 5: a sample variance is off by a**2 sqrt((1/5 - 1/9) / n).
    assert abs(np.var(memory) - limit**2 / 3) < 5 * limit**2 * np.sqrt((1 / 5 - 1 / 9) / 20_000)


@pytest.mark.parametrize("seed", [2**40, (1, 2, 3)])
def test_geometry_is_json_and_makes_the_module_again(seed):
    tables = RobeTables(SIZES, (8, 8, 4), compression=10, seed=seed, sign="block", align=2)
    geometry = json.loads(json.dumps(tables.geometry()))
    assert geometry.pop("map") == "robe_tables"
    again = RobeTables(**geometry)
    assert again.geometry() == tables.geometry()
    assert geometry["budget"] == (317 * 8 - 7 * 4) // 10 // 2 * 2
    for one, other in zip(
        rows_of(tables, draw(geometry["budget"]), IDS), rows_of(again, draw(geometry["budget"]), IDS), strict=True
    ):
        np.testing.assert_array_equal(one, other)
