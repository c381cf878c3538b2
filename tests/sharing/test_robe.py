"""ROBE equals a loop over Python's integers, forward and backward, in rows and in bags."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.hashing import split64
from hashml.sharing import RobeEmbed, block_map, element_map, robe_bag, robe_lookup
from hashml_kernels import bits

P = 2**31 - 1
LAYOUT: dict[str, Any] = {"features": 12, "block_size": 4, "seed": 5}


# --- the definition, in Python's integers ------------------------------------------------------------


def lowbias32(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


def base(row, block, *, budget, block_size, seed, wrap="circular", align=1):
    """First slot of a block: the row scrambled block by block, two hashes modulo P, an exact floor."""
    low = lowbias32((row % 2**32) ^ (block * 0x9E3779B9 % 2**32))
    word = ((row >> 32) * (low | 1) % 2**32) << 32 | low
    keys = (word % 2**31, block, (word >> 31) % 2**31, word >> 62)
    first, second = (
        (sum(a * key for a, key in zip(hash_.multipliers, keys, strict=True)) + hash_.offset) % P
        for hash_ in (bits.multilinear(seed, stream, 4) for stream in (1, 2))
    )
    room = budget if wrap == "circular" else budget - block_size + 1
    return align * ((first * P + second) * -(-room // align) // P**2)


def sign_of(index, seed):
    """A mixed bit of the flat index, which wraps at 2**64."""
    first, second = bits.seed_words(seed, 0x5169, 2)
    low, high = index % 2**32, index % 2**64 >> 32
    mixed = lowbias32(low ^ first % 2**32) ^ high ^ lowbias32(high ^ first >> 32)
    return 1 - 2 * (lowbias32(mixed ^ second % 2**32) >> 31)


def loop(memory, rows, *, features, block_size, seed=0, sign="none", **place):
    budget, blocks = len(memory), -(-features // block_size)
    out = np.zeros((len(rows), features), np.float32)
    for i, row in enumerate(rows):
        for t in range(features):
            start = base(row, t // block_size, budget=budget, block_size=block_size, seed=seed, **place)
            index = row * features + t if sign == "element" else row * blocks + t // block_size
            out[i, t] = memory[(start + t % block_size) % budget] * (1 if sign == "none" else sign_of(index, seed))
    return out


def rows_of(memory, ids, **how):
    """`robe_lookup`, compiled once rather than op by op."""
    return np.asarray(jax.jit(lambda memory: robe_lookup(memory, ids, **how))(memory))


def bags_of(memory, ids, **how):
    return np.asarray(jax.jit(lambda memory: robe_bag(memory, ids, **how))(memory))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def numbered(budget):
    """A memory that shows which slot was read."""
    return np.arange(1, budget + 1, dtype=np.float32)


LAYOUTS = {
    "Z = 1": {"features": 5, "block_size": 1},
    "Z = 4, element signs": {"features": 8, "block_size": 4, "sign": "element"},
    "Z = 4, block signs": {"features": 8, "block_size": 4, "sign": "block"},
    "last block cut short": {"features": 7, "block_size": 5, "sign": "block", "seed": 2**40 + 3},
    "a block longer than a row": {"features": 3, "block_size": 16},
    "no wrap": {"features": 8, "block_size": 4, "wrap": "none"},
    "aligned": {"features": 16, "block_size": 16, "align": 8, "sign": "element"},
}
WORDS = (0, 1, 2**31 - 1, 2**31, 2**31 + 12345, 2**32 - 1)
LONGS = (7, 2**32, 2**32 + 7, 188_000_000 * 128, 2**40 + 17, 2**63 + 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_equal_a_loop_over_python_integers(name):
    """Bit for bit, ids beyond 2**31 and beyond 2**32 included, jitted, without 64-bit integers."""
    assert jnp.asarray(np.arange(3)).dtype == jnp.int32
    memory = numbered(1000)
    look_up = jax.jit(lambda memory, ids: robe_lookup(memory, ids, **LAYOUTS[name]))
    np.testing.assert_array_equal(look_up(memory, np.array(WORDS, np.uint32)), loop(memory, WORDS, **LAYOUTS[name]))
    np.testing.assert_array_equal(
        look_up(memory, split64(np.array(LONGS, np.uint64))), loop(memory, LONGS, **LAYOUTS[name])
    )


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(9, 2**31 - 1),
    st.integers(0, 2**64 - 1),
)
def test_slots_equal_a_loop_over_python_integers(rows, features, block_size, budget, seed):
    ids = split64(np.array(rows, np.uint64))
    found = block_map(2**64, features, budget, block_size=block_size, seed=seed).slots(ids)
    for row, slots in zip(rows, found, strict=True):
        for t, slot in enumerate(slots):
            start = base(row, t // block_size, budget=budget, block_size=block_size, seed=seed)
            assert slot == (start + t % block_size) % budget


def test_a_virtual_table_of_188_million_rows_of_128():
    """The size of the paper's largest table: flat indices reach 2.4e10, and nothing but the budget is stored."""
    module = RobeEmbed(188_000_000, 128, budget=4096, block_size=32, sign="element", seed=9)
    ids = np.array([0, 16_777_216, 16_777_217, 187_999_999], np.int32)
    memory = numbered(4096)
    look_up: Any = jax.jit(lambda ids: module.apply({"params": {"memory": memory}}, ids))
    found = look_up(ids)
    expected = loop(memory, ids.tolist(), features=128, block_size=32, sign="element", seed=9)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.isnan(look_up(ids + 1)).all(-1), ids > 10**8)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_an_id_is_its_value_not_its_dtype(dtype):
    ids = np.array([[0, 1, 2], [1, 127, 1]], dtype)
    expected = loop(numbered(64), ids.reshape(-1).tolist(), **LAYOUT).reshape(2, 3, 12)
    for same in (ids, split64(ids)):
        np.testing.assert_array_equal(rows_of(numbered(64), same, **LAYOUT), expected)


def test_64_bit_ids_of_numpy_are_hashed_whole():
    rows = [5, 2**32 + 5, 2**33 + 5]
    found = rows_of(numbered(1000), np.array(rows), **LAYOUT)
    np.testing.assert_array_equal(found, loop(numbered(1000), rows, **LAYOUT))
    assert len(np.unique(found, axis=0)) == 3


def test_blocks_wrap_around_the_end_of_the_memory():
    """A row whose block starts at the last slot goes on at slot 0, and its gradient with it."""
    budget, z = 9, 4
    row = next(r for r in range(1000) if base(r, 0, budget=budget, block_size=z, seed=0) == budget - 1)

    @jax.jit
    def look_up(memory):
        rows, backward = jax.vjp(lambda m: robe_lookup(m, np.array(row), features=z, block_size=z), memory)
        return rows, backward(jnp.array([1.0, 10.0, 100.0, 1000.0]))[0]

    rows, gradient = look_up(numbered(budget))
    np.testing.assert_array_equal(rows, [9, 1, 2, 3])
    np.testing.assert_array_equal(gradient, [10, 100, 1000, 0, 0, 0, 0, 0, 1])


def test_blocks_of_one_are_element_hashing():
    memory = draw(50, seed=0)
    sharing, ids = element_map(30, 6, 50, seed=3), np.arange(30)
    rows = rows_of(memory, ids, features=6, block_size=1, seed=3, sign="element")
    np.testing.assert_array_equal(rows, memory[sharing.slots(ids)] * sharing.signs(ids))


def test_a_hashed_table_read_back_is_unbiased():
    """Over seeds, the row read from a memory that another table was hashed into is that table's, on average."""
    table = np.random.default_rng(0).standard_normal((6, 8))
    ids, errors = np.arange(6), []
    for seed in range(250):
        layout = block_map(6, 8, 20, block_size=4, seed=seed, sign="element")
        slots, signs = np.asarray(layout.slots(ids)), np.asarray(layout.signs(ids))
        memory = np.bincount(slots.reshape(-1), (signs * table).reshape(-1), 20)
        errors.append((signs * memory[slots] - table)[[0, 2, 5], [0, 3, 7]])
    errors = np.array(errors)
    assert (errors.std(0) > 0.1).all()  # one memory is far off; the mean of many is not
    assert (np.abs(errors.mean(0)) < 4 * errors.std(0) / np.sqrt(len(errors))).all()


# --- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_is_that_of_the_naive_gather(name):
    layout = LAYOUTS[name]
    ids = np.array([[0, 3, 3], [2**31 + 5, 0, 9]], np.uint32)  # with repetitions
    full = {"rows": 2**32, "columns": layout["features"], "budget": 40}
    sharing = block_map(**full, **{key: value for key, value in layout.items() if key != "features"})
    slots, signs = np.asarray(sharing.slots(ids)), np.asarray(sharing.signs(ids))
    memory = draw(40, seed=1)
    weight = draw(2, 3, layout["features"], seed=2)

    def fast(memory):
        return (jnp.tanh(robe_lookup(memory, ids, **layout)) * weight).sum()

    def naive(memory):
        return (jnp.tanh(memory[slots] * signs) * weight).sum()

    found, expected = jax.jit(lambda memory: (jax.grad(fast)(memory), jax.grad(naive)(memory)))(memory)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_bfloat16_memory_is_added_up_in_float32():
    """1,000 ones: in bfloat16 a sum stalls at 256."""
    memory, ids = jnp.zeros(4, jnp.bfloat16), np.zeros(1000, np.int32)
    gradient = jax.jit(jax.grad(lambda memory: robe_lookup(memory, ids, features=4, block_size=4).sum()))(memory)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient, np.full(4, 1000, jnp.bfloat16))


# --- bags --------------------------------------------------------------------------------------------

BAGS = [[3, 3, 8], [], [1], [0, 8], []]


def bag_loop(memory, mode, weights):
    out = np.zeros((len(BAGS), 12))
    for i, (members, factors) in enumerate(zip(BAGS, weights, strict=True)):
        for row, factor in zip(loop(memory, members, **LAYOUT), factors, strict=True):
            out[i] += factor * row
        if mode == "mean" and members:
            out[i] /= sum(factors)
    return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_equal_a_loop(mode, weighted):
    """By offsets and by padding; empty bags are zero in either mode."""
    memory = draw(30, seed=3)
    weights = [[0.5 + 0.25 * i for i in range(len(bag))] if weighted else [1.0] * len(bag) for bag in BAGS]
    expected = bag_loop(memory, mode, weights)
    flat = np.array(list(itertools.chain(*BAGS)), np.int32)
    offsets = np.cumsum([0, *map(len, BAGS[:-1])])
    flat_weights = np.array(list(itertools.chain(*weights)), np.float32) if weighted else None
    found = bags_of(memory, flat, mode=mode, offsets=offsets, weights=flat_weights, **LAYOUT)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    padding = -1 if weighted else 77
    ids = np.array([bag + [padding] * (3 - len(bag)) for bag in BAGS], np.int32)
    full = np.array([row + [9.0] * (3 - len(row)) for row in weights], np.float32) if weighted else None
    found = bags_of(memory, ids, mode=mode, padding_id=padding, weights=full, **LAYOUT)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[[1, 4]], 0)


def test_gradient_of_a_bag_is_the_sum_of_its_rows():
    memory = draw(30, seed=4)
    weights = np.array([[0.5, 2.0, -1.0], [1.0, 1.0, 3.0]], np.float32)
    cotangent = draw(2, 12, seed=5)
    ids = np.array([[3, 3, 8], [1, 0, -1]], np.int32)

    slots = np.asarray(block_map(9, 12, 30, block_size=4, seed=5).slots(np.maximum(ids, 0)))
    counted = np.where(ids == -1, 0, weights)[..., None]
    by_memory = np.zeros(30)
    np.add.at(by_memory, slots, counted * cotangent[:, None])
    by_weights = np.where(ids == -1, 0, (memory[slots] * cotangent[:, None]).sum(-1))

    def padded(memory, weights):
        return robe_bag(memory, ids, weights=weights, padding_id=-1, **LAYOUT)

    def offset(memory, weights):
        flat = {"weights": weights.reshape(-1), "offsets": np.array([0, 3])}
        return robe_bag(memory, ids.reshape(-1), padding_id=-1, **flat, **LAYOUT)

    for bags in (padded, offset):
        found = jax.jit(jax.grad(lambda m, w, bags=bags: jnp.vdot(bags(m, w), cotangent), (0, 1)))(memory, weights)
        np.testing.assert_allclose(found[0], by_memory, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1], by_weights, rtol=1e-4, atol=1e-5)


def test_padding_gives_exact_zeros_and_no_gradient():
    memory, ids = jnp.full(30, 1e30), np.full((2, 3), -1, np.int32)

    def bags(memory):
        return robe_bag(memory, ids, padding_id=-1, mode="mean", num_embeddings=9, **LAYOUT)

    value, gradient = jax.jit(jax.value_and_grad(lambda memory: jnp.abs(bags(memory)).sum()))(memory)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(30))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_batches_and_bags_of_nothing(mode):
    memory, nothing, zeros = jnp.ones(30), np.zeros(0, np.int32), np.zeros((2, 12))
    assert robe_lookup(memory, nothing, **LAYOUT).shape == (0, 12)
    assert bags_of(memory, nothing.reshape(0, 3), mode=mode, **LAYOUT).shape == (0, 12)
    assert bags_of(memory, nothing, offsets=nothing, mode=mode, **LAYOUT).shape == (0, 12)
    two_empty_bags = {"offsets": np.zeros(2, np.int32), "mode": mode}
    np.testing.assert_array_equal(bags_of(memory, nothing, **two_empty_bags, **LAYOUT), zeros)
    np.testing.assert_array_equal(bags_of(memory, nothing.reshape(2, 0), mode=mode, **LAYOUT), zeros)
    gradient = jax.jit(jax.grad(lambda memory: robe_lookup(memory, nothing, **LAYOUT).sum()))(memory)
    np.testing.assert_array_equal(gradient, np.zeros(30))


def test_bags_of_a_bfloat16_memory_are_added_up_in_float32():
    memory, ids = jnp.ones(16, jnp.bfloat16), np.zeros(1000, np.int32)
    for bag in (
        bags_of(memory, ids[None], features=4, block_size=4),
        bags_of(memory, ids, offsets=np.zeros(1, np.int32), features=4, block_size=4),
    ):
        assert bag.dtype == jnp.bfloat16
        np.testing.assert_array_equal(bag, np.full((1, 4), 1000, jnp.bfloat16))


# --- ids and memories that are wrong -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_ids_outside_the_table_give_nan_and_no_gradient(dtype):
    memory, ids = numbered(64), np.array([-1, 0, 99, 100, 127, -128], dtype)
    outside = np.array([True, False, False, True, True, True])

    @jax.jit
    def rows_and_gradient(memory):
        rows, backward = jax.vjp(lambda m: robe_lookup(m, ids, num_embeddings=100, **LAYOUT), memory)
        return rows, backward(jnp.ones_like(rows))[0], robe_lookup(memory, ids, **LAYOUT)

    rows, gradient, rows_of_no_table = rows_and_gradient(memory)
    np.testing.assert_array_equal(np.isnan(rows), np.repeat(outside[:, None], 12, 1))
    slots = np.asarray(block_map(100, 12, 64, block_size=4, seed=5).slots(np.array([0, 99])))
    np.testing.assert_array_equal(gradient, np.bincount(slots.reshape(-1), minlength=64))
    np.testing.assert_array_equal(np.isnan(rows_of_no_table).all(-1), ids < 0)


@pytest.mark.parametrize("size", [2**31 + 10, 2**32, 2**32 + 3, 2**40])
def test_tables_beyond_31_bits_know_their_end(size):
    rows = np.array([size - 1, size, 0, 2**63], np.uint64)
    found = rows_of(numbered(64), split64(rows), num_embeddings=size, **LAYOUT)
    np.testing.assert_array_equal(np.isnan(found).all(-1), [False, True, False, True])
    words = rows[rows < 2**32].astype(np.uint32)
    found = rows_of(numbered(64), words, num_embeddings=size, **LAYOUT)
    np.testing.assert_array_equal(np.isnan(found).all(-1), words.astype(np.uint64) >= size)


def test_a_bag_with_an_id_outside_the_table_is_nan():
    ids = np.array([[1, 2, -1], [1, 9, 2], [-2, 0, 0]], np.int64)
    for bags in (
        bags_of(numbered(64), ids, padding_id=-1, num_embeddings=9, **LAYOUT),
        bags_of(numbered(64), ids.reshape(-1), offsets=np.arange(0, 9, 3), padding_id=-1, num_embeddings=9, **LAYOUT),
    ):
        np.testing.assert_array_equal(np.isnan(bags).all(-1), [False, True, True])
        assert np.isfinite(bags[0]).all()


def test_a_nan_in_the_memory_shows_where_it_is_read_only():
    memory = numbered(64)
    memory[10] = np.nan
    expected = loop(memory, range(40), **LAYOUT)
    assert 0 < np.isnan(expected).any(-1).sum() < 40
    np.testing.assert_array_equal(rows_of(memory, np.arange(40), **LAYOUT), expected)
