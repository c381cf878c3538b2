"""MinHash: the collision rate is Jaccard's index; the same bits in NumPy and JAX; keys, empty sets, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hashml.hashing import mix32
from hashml.hashing.minhash import MinHashes, key_count, minhash, pack_signatures
from hashml_kernels import bits

ROOT = Path(__file__).parents[2]


def two_sets(common, apart, element=lambda i: i):
    """Pairs of two sets with ``common`` elements in both and ``apart`` in each alone."""
    ids = np.arange(common + 2 * apart)
    first, second = ids[: common + apart], np.concatenate([ids[:common], ids[common + apart :]])
    sets = np.repeat([0, 1], common + apart)
    return sets, element(np.concatenate([first, second])).astype(np.uint32)


def scattered(i):
    return np.random.default_rng(7).integers(0, 2**32, 10_000, dtype=np.uint32)[i]


@pytest.mark.parametrize("element", [lambda i: i, lambda i: i * 2**20, scattered])
@pytest.mark.parametrize(("common", "apart"), [(1, 3), (20, 40), (300, 50), (5, 0), (0, 30)])
def test_minima_agree_as_often_as_jaccard_says(common, apart, element):
    count = 4096
    jaccard = common / (common + 2 * apart)
    values, support = minhash(*two_sets(common, apart, element), 2, count, seed=1)
    rate = (values[0] == values[1]).mean()
    assert abs(rate - jaccard) <= 3 * np.sqrt(jaccard * (1 - jaccard) / count)
    assert support.tolist() == [common + apart] * 2


def test_renaming_the_samples_changes_nothing_in_law_and_their_order_nothing_at_all():
    sets, elements = two_sets(40, 30)
    count, jaccard = 4096, 0.4
    names = np.random.default_rng(0).permutation(100).astype(np.uint32)
    renamed = minhash(sets, names[elements], 2, count, seed=2).values
    assert abs((renamed[0] == renamed[1]).mean() - jaccard) <= 3 * np.sqrt(jaccard * (1 - jaccard) / count)
    plain = minhash(sets, elements, 2, count, seed=2).values
    assert (renamed != plain).any()
    order = np.random.default_rng(1).permutation(len(sets))
    np.testing.assert_array_equal(minhash(sets[order], elements[order], 2, count, seed=2).values, plain)


def test_a_minimum_is_that_of_its_elements_hashes():
    """A set of one element is its hash, and no two elements have one: the functions are bijections."""
    rng = np.random.default_rng(3)
    sets, elements = rng.integers(0, 30, 400), rng.integers(0, 100, 400)
    hashed = minhash(np.arange(100), np.arange(100), 100, 12, seed=5).values
    assert all(len(np.unique(column)) == 100 for column in hashed.T)
    found = minhash(sets, elements, 31, 12, seed=5)
    for number in range(30):
        own = elements[sets == number]
        np.testing.assert_array_equal(found.values[number], hashed[own].min(axis=0))
        assert found.support[number] == len(own)


def test_numpy_and_jax_give_the_same_bits():
    rng = np.random.default_rng(4)
    sets, elements = rng.integers(-3, 25, 500).astype(np.int32), rng.integers(-(2**31), 2**31, 500).astype(np.int32)
    expected = minhash(sets, elements, 20, 15, seed=2**40)
    assert isinstance(expected.values, np.ndarray)
    found = minhash(jnp.asarray(sets), jnp.asarray(elements), 20, 15, seed=2**40)
    traced = jax.jit(lambda s, e: minhash(s, e, 20, 15, seed=2**40))(sets, elements)
    for one in (found, traced):
        np.testing.assert_array_equal(one.values, expected.values)
        np.testing.assert_array_equal(one.support, expected.support)
        assert (one.values.dtype, one.support.dtype) == (np.uint32, np.int32)
        packed = pack_signatures(one, seed=3)
        assert isinstance(packed, jax.Array)
        np.testing.assert_array_equal(packed, pack_signatures(expected, seed=3))


def test_empty_sets_are_flagged_and_pairs_outside_are_padding():
    found = minhash(np.array([1, 1, -1, 4, 2**31 - 1]), np.arange(5), 4, 3, seed=0)
    np.testing.assert_array_equal(found.support, [0, 2, 0, 0])
    assert (found.values[[0, 2, 3]] == 2**32 - 1).all()
    assert (found.values[1] < 2**32 - 1).all()
    none = minhash(np.zeros(0, np.int32), np.zeros(0, np.int32), 2, 3, seed=0)
    np.testing.assert_array_equal(none.support, [0, 0])


def test_the_first_of_many_hashes_are_those_of_few():
    pairs = two_sets(10, 10)
    np.testing.assert_array_equal(minhash(*pairs, 2, 3, 9).values, minhash(*pairs, 2, 15, 9).values[:, :3])
    assert (minhash(*pairs, 2, 3, 9).values != minhash(*pairs, 2, 3, 10).values).any()


def keys_of(signature, key_bits) -> list[int]:
    """The keys of a signature, by Python integers: key p in bits of word p // (32 // key_bits)."""
    each = 32 // key_bits
    return [(int(signature[p // each]) >> (key_bits * (p % each))) % 2**key_bits for p in range(64 // key_bits - 1)]


@pytest.mark.parametrize("key_bits", [1, 3, 4, 5, 8, 16, 32])
def test_keys_lie_where_the_layout_says(key_bits):
    hashes = minhash(*two_sets(9, 5), 2, 63, seed=0)
    packed = pack_signatures(hashes, key_bits=key_bits, seed=8)
    mixers = bits.seed_words(8, 0x6D6B, key_count(key_bits))
    for row in range(2):
        expected = [int(mix32(hashes.values[row, p], mixer)) >> (32 - key_bits) for p, mixer in enumerate(mixers)]
        assert keys_of(packed[row], key_bits) == expected


@pytest.mark.parametrize(
    ("key_bits", "common", "apart"), [(1, 10, 10), (4, 0, 20), (4, 30, 10), (5, 10, 20), (8, 20, 5)]
)
def test_truncated_keys_agree_as_the_law_says(key_bits, common, apart):
    """J + (1 - J) / 2**b, over seeds; the keys of one seed are independent."""
    jaccard = common / (common + 2 * apart)
    law = jaccard + (1 - jaccard) / 2**key_bits
    sets, elements = two_sets(common, apart)
    keys, agree = key_count(key_bits), []
    for seed in range(4096 // keys):
        packed = pack_signatures(minhash(sets, elements, 2, keys, seed), key_bits=key_bits, seed=seed)
        first, second = (keys_of(row, key_bits) for row in packed)
        agree += [a == b for a, b in zip(first, second, strict=True)]
    assert abs(np.mean(agree) - law) < 3.5 * np.sqrt(law * (1 - law) / len(agree))


def test_keys_are_uniform_though_minima_are_small():
    sets = np.repeat(np.arange(3000), 50)
    packed = pack_signatures(minhash(sets, np.arange(sets.size), 3000, 15, seed=1))
    counts = np.bincount(np.array([keys_of(row, 4) for row in packed]).reshape(-1), minlength=16)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_sets_without_support_get_distinct_random_signatures():
    """Else they would all share one row."""
    sets = np.array([3, 3, 3, 5, 5, 5, 7, 7, 8])
    elements = np.array([1, 2, 3, 1, 2, 3, 1, 2, 1])
    hashes = minhash(sets, elements, 20_000, 15, seed=0)
    packed = pack_signatures(hashes, minimum_support=3)
    np.testing.assert_array_equal(packed[3], packed[5])
    others = np.delete(packed, [3, 5], axis=0)
    assert len(np.unique(others[:, 0])) == len(others)
    counts = np.bincount((others[:, 1] >> np.uint32(28)).astype(int), minlength=16)
    assert stats.chisquare(counts).pvalue > 1e-3
    # From the support on, sets have their own keys.
    lower = pack_signatures(hashes, minimum_support=2)
    changed = np.flatnonzero((lower != packed).any(axis=1))
    np.testing.assert_array_equal(changed, [7])
    assert (pack_signatures(hashes, seed=1) != packed)[:, 0].mean() > 0.9


REFUSED = [
    ("minhash(ids, ids, 0, 4, 0)", "ValueError", "num_sets is 0; it must lie in 1..2147483647"),
    ("minhash(ids, ids, 4, 2.0, 0)", "TypeError", "num_hashes is 2.0; it must be an int"),
    (
        "minhash(ids, ids[:2], 4, 4, 0)",
        "ValueError",
        "set_ids has shape (3,), element_ids (2,); they must be vectors",
    ),
    ("minhash(ids * 1.0, ids, 4, 4, 0)", "TypeError", "set_ids has dtype float64; it must be an integer type"),
    ("minhash(ids, ids > 1, 4, 4, 0)", "TypeError", "element_ids has dtype bool; it must be an integer type"),
    ("minhash(ids, ids + 2**32, 4, 4, 0)", "ValueError", "element_ids holds 4294967298; it must fit 32 bits"),
    ("minhash(ids, -ids, 4, 4, 0)", "ValueError", "element_ids holds -2; it must fit 32 bits"),
    ("pack(key_bits=0)", "ValueError", "key_bits is 0; it must lie in 1..32"),
    ("pack(key_bits=4.0)", "TypeError", "key_bits is 4.0; it must be an int"),
    ("pack(key_bits=3)", "ValueError", "hashes has 15 minima a set; key_bits = 3 needs 20"),
    ("pack(minimum_support=0)", "ValueError", "minimum_support is 0; it must be at least 1"),
    ("pack(minimum_support=1.5)", "TypeError", "minimum_support is 1.5; it must be an int"),
]

PRELUDE = """
import json, sys
import numpy as np
from hashml.hashing.minhash import *

ids = np.arange(3, dtype=np.int64)

def pack(**how):
    return pack_signatures(minhash(ids, ids, 4, 15, 0), **how)

def outcome(call):
    try:
        eval(call)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", "no error"]

print(json.dumps([outcome(call) for call in json.load(sys.stdin)]))
"""


def test_bad_input_is_refused_by_name():
    """In a process without the annotations' checks of the tests."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE],
        input=json.dumps([call for call, _, _ in REFUSED]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for (call, error, message), (kind, text) in zip(REFUSED, json.loads(done.stdout), strict=True):
        assert (kind, message in text) == (error, True), f"{call}: {kind}: {text}"


def test_what_is_packed_is_any_minima():
    """Sets of one's own: the support alone decides which are random."""
    values = np.arange(30, dtype=np.uint32).reshape(2, 15)
    known = pack_signatures(MinHashes(values, np.array([2, 2], np.int32)))
    mixed = pack_signatures(MinHashes(values, np.array([2, 1], np.int32)))
    np.testing.assert_array_equal(known[0], mixed[0])
    assert (known[1] != mixed[1]).all()
