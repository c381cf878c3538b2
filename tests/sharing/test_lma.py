"""LMA: a naive loop's bits, the law of what is shared, controls, gradients, what is stored, refusals."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml import sharing
from hashml.hashing import split64
from hashml.hashing.minhash import minhash, pack_signatures
from hashml.models.training import data_parallel_value_and_grad
from hashml.sharing.lma import LmaGeometry, lma_lookup, lma_map, lma_slots
from hashml.sharing.lma_signatures import Signatures, sample_signatures

ROOT = Path(__file__).parents[2]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_words(values, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (values, 2), dtype=np.uint32)


@functools.cache
def pair_of_sets(common, apart, seed):
    """Signatures of two values whose samples have the Jaccard index ``common / (common + 2 apart)``."""
    samples = np.arange(common + 2 * apart)
    sets = np.repeat([0, 1], common + apart)
    elements = np.concatenate([samples[: common + apart], samples[:common], samples[common + apart :]])
    return pack_signatures(minhash(sets, elements, 2, 15, seed), seed=seed)


def shared_fraction(words, geometry):
    first, second = lma_slots(words, geometry)
    return (first == second).mean()


def law(jaccard, geometry):
    """Mean over coordinates of phi + (1 - phi) / m, phi = (J + (1 - J) / 2**b) to the distinct picks."""
    distinct = [len(set(picks)) for picks in geometry.picks.tolist()]
    phi = np.repeat([(jaccard + (1 - jaccard) / 2**geometry.key_bits) ** d for d in distinct], geometry.block_size)
    phi = phi[: geometry.features]
    return (phi + (1 - phi) / geometry.budget).mean()


LAYOUTS = [
    {},
    {"block_size": 4, "seed": 2**40},
    {"block_size": 3, "keys_to_use": 12},  # the last block is cut short, and keys fill two words
    {"keys_to_use": 16},
    {"keys_to_use": 1, "key_bits": 1},
    {"keys_to_use": 5, "key_bits": 8},
    {"block_size": 11, "keys_to_use": 3, "key_bits": 5},
]


@pytest.mark.parametrize("how", LAYOUTS)
def test_slots_are_those_of_a_naive_loop(how):
    """Keys by Python integers; then ROBE's map, given the keys for the row, holds each block."""
    budget, features, words = 41, 11, random_words(9)
    geometry = LmaGeometry(budget, features, **how)
    z, b, seed = geometry.block_size, geometry.key_bits, geometry.seed
    robe = sharing.block_map(2**64, features, budget, block_size=z, seed=seed)
    each = 32 // b
    expected = np.zeros((9, features), np.uint32)
    for v in range(9):
        for t in range(features):
            e = 0
            for k, p in enumerate(geometry.picks[t // z].tolist()):
                key = (int(words[v, p // each]) >> (b * (p % each))) % 2**b
                e |= key << (32 * (k // each) + b * (k % each))
            expected[v, t] = np.asarray(robe.slots(split64(np.array([e], np.uint64))))[0, t]
    found = lma_slots(words, geometry)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(jax.jit(lambda words: lma_slots(words, geometry))(words), expected)
    memory = draw(budget)
    rows = jax.jit(lambda m, w, ids: lma_lookup(m, w, ids, features=features, **how))(memory, words, np.arange(9))
    np.testing.assert_array_equal(rows, memory[expected])


def test_picks_are_drawn_with_replacement_from_all_keys():
    """Of K = 8 draws from 15 keys 15 (1 - (14/15)**8) = 6.36 are distinct on average."""
    picks = np.concatenate([LmaGeometry(64, 200, seed=seed).picks for seed in range(10)])
    counts = np.bincount(picks.reshape(-1), minlength=15)
    expected = picks.size / 15
    assert len(counts) == 15
    assert ((counts - expected) ** 2 / expected).sum() < 36.1  # chi-square of 14, 1 in 1000
    distinct = np.array([len(set(row)) for row in picks.tolist()])
    mean = 15 * (1 - (14 / 15) ** 8)
    assert abs(distinct.mean() - mean) < 4 * distinct.std() / np.sqrt(len(distinct))


@pytest.mark.parametrize(("common", "apart"), [(0, 12), (8, 8), (20, 2)])
@pytest.mark.parametrize(
    "how",
    [{"keys_to_use": 2}, {"keys_to_use": 8}, {"keys_to_use": 3, "block_size": 4}, {"keys_to_use": 1, "key_bits": 4}],
)
def test_the_fraction_of_a_row_that_is_shared_follows_the_law(common, apart, how):
    """E f = mean Gamma, given the picks, over 250 draws of all hash functions."""
    jaccard, apartness = common / (common + 2 * apart), []
    for seed in range(250):
        geometry = LmaGeometry(50, 16, seed=seed, **how)
        words = pair_of_sets(common, apart, seed)
        apartness.append(shared_fraction(words, geometry) - law(jaccard, geometry))
    assert abs(np.mean(apartness)) < 3.5 * np.std(apartness) / np.sqrt(len(apartness))


def test_equal_sets_have_equal_rows_and_blocks_are_shared_whole():
    words = pair_of_sets(20, 0, seed=3)
    np.testing.assert_array_equal(*lma_slots(words, LmaGeometry(1000, 64, seed=4)))
    geometry = LmaGeometry(100_000, 64, block_size=8, keys_to_use=2)
    first, second = lma_slots(pair_of_sets(20, 5, seed=0), geometry).reshape(2, 8, 8)
    together = (first == second).mean(axis=1)
    assert set(together.tolist()) == {0.0, 1.0}


def test_shuffled_signatures_share_as_any_two_values_do():
    """100 pairs of twins: shuffled over the values, twins share what two values picked at random share."""
    samples = np.arange(100)[:, None] * 40 + np.arange(30)
    own = np.concatenate([samples, samples + np.array([3] * 30)])  # of 30 samples each, 27 common
    hashes = minhash(np.repeat(np.arange(200), 30), own.reshape(-1), 200, 15, seed=0)
    words, geometry = pack_signatures(hashes), LmaGeometry(500, 32)
    slots = lma_slots(words, geometry)
    same = (slots[:, None] == slots[None]).mean(axis=-1)
    any_two = (same.sum() - 200) / (200 * 199)
    twins = same[np.arange(100), np.arange(100) + 100]
    assert abs(twins.mean() - law(27 / 33, geometry)) < 4 * twins.std() / np.sqrt(100)
    found = []
    for seed in range(100):
        order = np.random.default_rng(seed).permutation(200)
        found.append(same[order[:100], order[100:]].mean())
    assert abs(np.mean(found) - any_two) < 3.5 * np.std(found) / np.sqrt(100)
    # Plain hashing, 1 / m, but for the one other value in 199 that is a twin.
    assert any_two == pytest.approx(1 / 500 + twins.mean() / 199, rel=0.25)
    assert twins.mean() > 50 * any_two


def test_values_never_seen_have_rows_of_their_own():
    """And meet as rows of plain hashing do, but for keys of 4 bits that agree by chance."""
    signatures = sample_signatures(np.zeros((40, 1), np.int32), (2001,))
    assert len(np.unique(signatures.words, axis=0)) == 2001
    geometry = LmaGeometry(1000, 16)
    slots = lma_slots(signatures.words[1:], geometry)
    assert len(np.unique(slots, axis=0)) == 2000
    same = (slots[:1000] == slots[1000:]).mean(axis=1)
    assert abs(same.mean() - law(0.0, geometry)) < 4 * same.std() / np.sqrt(1000)


# --- gradients ----------------------------------------------------------------------------------------


def test_the_gradient_adds_up_what_is_shared_and_nothing_of_rows_outside():
    words, memory, ids = random_words(20), draw(30), np.array([[3, 19, 3], [20, -1, 0]], np.int32)
    cotangent = draw(2, 3, 12)

    @jax.jit
    def forward_and_backward(memory):
        rows, backward = jax.vjp(lambda m: lma_lookup(m, words, ids, features=12, block_size=5), memory)
        return rows, backward(cotangent)[0]

    rows, gradient = forward_and_backward(memory)
    inside = (ids >= 0) & (ids < 20)
    np.testing.assert_array_equal(np.isnan(rows), np.repeat(~inside[..., None], 12, -1))
    expected, slots = np.zeros(30), np.asarray(lma_slots(words, LmaGeometry(30, 12, block_size=5)))
    np.add.at(expected, slots[ids[inside]], cotangent[inside])
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_lookup_and_its_gradient_are_adjoint_in_either_order():
    words, ids = random_words(20), np.arange(20)

    def rows(memory):
        return lma_lookup(memory, words, ids, features=12)

    memory, vector = jnp.asarray(draw(30)), jnp.asarray(draw(30, seed=1))
    cotangent = draw(20, 12)

    @jax.jit
    def sides(memory):
        (pulled,) = jax.vjp(rows, memory)[1](cotangent)
        # The gradient of a cubic is differentiated again: 6 pull(W v).
        slope = jax.grad(lambda m: jnp.vdot(jax.grad(lambda m: (rows(m) ** 3).sum())(m), vector))(memory)
        (expected,) = jax.vjp(rows, memory)[1](6 * rows(memory) * rows(vector))
        return jnp.vdot(rows(memory), cotangent), jnp.vdot(memory, pulled), slope, expected

    first, second, slope, expected = sides(memory)
    np.testing.assert_allclose(first, second, rtol=1e-4)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-3)


def test_a_bfloat16_memory_adds_up_in_float32():
    """1,000 gradients of 1 in one slot: in bfloat16 the sum would stop at 256."""
    words = np.zeros((1, 2), np.uint32)
    lookup = jax.jit(lambda m: lma_lookup(m, words, np.zeros(1000, np.int32), features=1))
    rows, backward = jax.vjp(lookup, jnp.ones(1, jnp.bfloat16))
    assert rows.dtype == jnp.bfloat16
    (gradient,) = backward(jnp.ones((1000, 1), jnp.bfloat16))
    assert (gradient.dtype, float(gradient[0])) == (jnp.bfloat16, 1000)


def test_what_the_backward_pass_keeps_is_ids_and_signatures():
    words, ids = jnp.asarray(random_words(50)), jnp.zeros(600, jnp.int32)
    lookup = jax.jit(lambda m: lma_lookup(m, words, ids, features=64))
    _, backward = jax.vjp(lookup, jnp.zeros(90))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
    assert 0 < kept <= 2 * (words.nbytes + ids.nbytes)  # far from 600 x 64


def test_no_array_of_the_virtual_table_is_ever_built():
    values, features, budget = 2**21, 512, 10_000
    shapes = [((budget,), jnp.float32), ((values, 2), jnp.uint32), ((1000,), jnp.int32)]
    operands = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def loss(memory, words, ids):
        return (lma_lookup(memory, words, ids, features=features, block_size=8) ** 2).sum()

    found = jax.jit(jax.grad(loss)).lower(*operands).compile().memory_analysis()
    assert found is not None
    used = found.temp_size_in_bytes + found.output_size_in_bytes
    assert used < 4 * (3 * budget + 8 * 1000 * features)
    assert used < values * 16


def test_eight_devices_have_the_gradient_of_one():
    words, memory, ids = random_words(30), draw(40), np.random.default_rng(0).integers(0, 30, 64).astype(np.int32)

    def loss(memory, batch):
        return (lma_lookup(memory, words, batch, features=6) ** 2).mean()

    found = data_parallel_value_and_grad(loss, jax.make_mesh((8,), ("data",)))(memory, ids)
    slots = lma_slots(words[ids], LmaGeometry(40, 6))
    np.testing.assert_allclose(found[0], (memory[slots] ** 2).mean(), rtol=1e-5)
    expected = np.zeros(40)
    np.add.at(expected, slots, 2 * memory[slots] / slots.size)
    np.testing.assert_allclose(found[1], expected, rtol=1e-4, atol=1e-6)


# --- the map ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", LAYOUTS)
def test_the_map_is_the_lookup(how):
    how = {"scale": 0.5} | how
    one = lma_map(random_words(23), 11, 41, **how)
    memory, matrix, x = draw(41), draw(23, 11), draw(3, 11)
    slots = np.asarray(one.slots(np.arange(23)))

    @jax.jit
    def found(memory, matrix):
        product = sharing.virtual_matmul(x, memory, one, row_block=7)  # runs over the end of the rows
        return sharing.expand(one, memory), sharing.pull(one, matrix), sharing.load(one), product

    table, pulled, load, product = found(memory, matrix)
    np.testing.assert_array_equal(table, np.float32(0.5) * memory[slots])
    expected = np.zeros(41)
    np.add.at(expected, slots, 0.5 * matrix)
    np.testing.assert_allclose(pulled, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(load, np.bincount(slots.reshape(-1), minlength=41))
    np.testing.assert_allclose(product, x @ table.T, rtol=1e-4, atol=1e-5)


def test_a_map_is_named_by_all_that_determines_it():
    words = random_words(6)
    geometry = json.loads(json.dumps(lma_map(words, 8, 41).geometry))
    assert {"map", "rows", "columns", "budget", "seed", "scale", "keys_to_use", "key_bits", "signatures"} < set(
        geometry
    )
    changed = words.copy()
    changed[3, 1] ^= 1
    for other in (lma_map(changed, 8, 41), lma_map(words, 8, 41, seed=1), lma_map(words, 8, 41, key_bits=2)):
        assert other.geometry != geometry
    assert lma_map(Signatures(words), 8, 41).geometry == geometry
    with pytest.raises(ValueError, match="key_bits is 2; the signatures have 4"):
        lma_map(Signatures(words), 8, 41, key_bits=2)


def test_every_slot_is_hit_equally_often_over_seeds():
    words = random_words(1)
    counts = np.zeros(20)
    for seed in range(400):
        np.add.at(counts, lma_slots(words, LmaGeometry(20, 10, seed=seed))[0], 1)
    # Coordinates of one seed are independent.
    assert ((counts - 200) ** 2 / 200).sum() < 43.8  # chi-square of 19, 1 in 1000
