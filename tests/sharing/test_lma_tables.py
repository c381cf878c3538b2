"""LMA's modules and signatures: one table or several, what is stored and counted, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import compression, stored_bytes
from hashml.embeddings import EmbeddingTables
from hashml.hashing import split64
from hashml.hashing.minhash import minhash, pack_signatures
from hashml.sharing.lma import LmaEmbed, lma_map
from hashml.sharing.lma_signatures import Signatures, sample_signatures
from hashml.sharing.lma_tables import LmaTables

ROOT = Path(__file__).parents[2]
SIZES = (10, 30, 7)
IDS = np.array([[0, 0, 0], [9, 29, 6], [5, 5, 5]], np.int32)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_words(values, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (values, 2), dtype=np.uint32)


def test_sample_signatures_are_the_minima_of_the_samples_that_hold_a_value():
    ids = np.random.default_rng(0).integers(0, SIZES, (60, 3))
    ids[5] = [-1, 30, 8]  # outside every table
    sets: list[Any] = []
    for table, size in enumerate(SIZES):
        sets += [np.flatnonzero(ids[:, table] == value) for value in range(size)]
    numbers = np.concatenate([np.full(len(members), value) for value, members in enumerate(sets)])
    hashes = minhash(numbers, np.concatenate(sets), sum(SIZES), 15, seed=6)
    found = sample_signatures(ids, SIZES, minimum_support=3, seed=6)
    np.testing.assert_array_equal(found.words, pack_signatures(hashes, minimum_support=3, seed=6))
    assert sample_signatures(jnp.asarray(ids), SIZES, minimum_support=3, seed=6) == found


def test_signatures_are_values():
    words = random_words(5)
    one, other = Signatures(words), Signatures(jnp.asarray(words))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Signatures(words, key_bits=8)
    assert one != Signatures(words[::-1])
    assert one != words.tolist()
    words[0] = 0
    assert one == other
    with pytest.raises(ValueError, match="read-only"):
        one.words[0] = 0


@pytest.mark.parametrize("ids", [np.array([[0, 9], [10, -1]]), np.array([[0, 9], [2**32, 2**33 + 1]])])
def test_the_module_is_the_lookup_with_limbs_and_wide_ids(ids):
    words = random_words(10)
    module = LmaEmbed(10, 6, Signatures(words), budget=40, seed=3)
    variables: Any = jax.jit(module.init)(jax.random.key(0), np.zeros(1, np.int32))
    memory = np.asarray(variables["params"]["memory"])
    table = memory[np.asarray(module.sharing_map().slots(np.arange(10)))]
    ids = ids if ids.max() < 2**32 else split64(ids)
    found = np.asarray(jax.jit(module.apply)(variables, ids))
    np.testing.assert_array_equal(found[0], table[[0, 9]])
    assert np.isnan(found[1]).all()
    query = draw(2, 6)
    logits = jax.jit(lambda v, q: module.apply(v, q, method="attend"))(variables, query)
    np.testing.assert_allclose(logits, query @ table.T, rtol=1e-5, atol=1e-5)


def test_signatures_are_stored_and_counted():
    key, ids = jax.random.key(0), np.zeros((1, 3), np.int32)
    signatures = Signatures(random_words(sum(SIZES)))
    stored: Any = jax.eval_shape(LmaTables(SIZES, 64, signatures, budget=50).init, key, ids)
    assert stored_bytes(stored) == 4 * 50 + 8 * sum(SIZES)
    assert stored_bytes(stored["params"]) == 4 * 50
    full = jax.eval_shape(EmbeddingTables(SIZES, 64).init, key, ids)
    for asked in (1, 4, 7.5, 30):
        stored = jax.eval_shape(LmaTables(SIZES, 64, signatures, compression=asked).init, key, ids)
        assert asked <= compression(full, stored) < 1.02 * asked
    half = LmaEmbed(47, 64, signatures, compression=8, param_dtype=jnp.bfloat16)
    stored = jax.eval_shape(half.init, key, np.zeros(1, np.int32))
    assert stored_bytes(stored) == 47 * 64 * 2 // 8


def test_tables_are_one_table_on_concatenated_ids():
    words = random_words(sum(SIZES))
    tables = LmaTables(SIZES, 8, Signatures(words), budget=96, block_size=3, seed=5)
    memory = draw(96)
    whole = IDS + np.array([0, 10, 40])
    expected = memory[np.asarray(lma_map(words, 8, 96, block_size=3, seed=5).slots(whole))]
    variables: Any = {"params": {"memory": memory}, "signatures": {"words": words}}
    np.testing.assert_array_equal(jax.jit(tables.apply)(variables, IDS), expected)
    # Parameters alone: the words are the module's own.
    np.testing.assert_array_equal(jax.jit(tables.apply)({"params": {"memory": memory}}, IDS), expected)
    # The variable is what is read.
    variables["signatures"] = {"words": words[::-1].copy()}
    assert (np.asarray(jax.jit(tables.apply)(variables, IDS)) != expected).any()
    outside = np.array([[10, 0, 6], [-1, 30, 7]], np.int32)
    found = jax.jit(tables.apply)({"params": {"memory": memory}}, outside)
    np.testing.assert_array_equal(np.isnan(np.asarray(found)).all(-1), [[True, False, False], [True, True, True]])


def test_widths_differ_from_table_to_table():
    words, memory, widths = random_words(sum(SIZES)), draw(96), (8, 3, 12)
    tables = LmaTables(SIZES, widths, Signatures(words), budget=96, block_size=4)
    found: Any = jax.jit(tables.apply)({"params": {"memory": memory}}, IDS)
    for t, (width, offset) in enumerate(zip(widths, (0, 10, 40), strict=True)):
        slots = lma_map(words, width, 96, block_size=4).slots(IDS[:, t] + offset)
        np.testing.assert_array_equal(found[t], memory[np.asarray(slots)])


def test_tables_geometry_is_json_and_the_module_a_static_argument():
    signatures = Signatures(random_words(sum(SIZES)))
    tables = LmaTables(SIZES, 8, signatures, budget=96, seed=2**40)
    geometry = json.loads(json.dumps(tables.geometry()))
    assert geometry["signatures"] == signatures.checksum
    assert geometry["budget"] == 96
    traces = []

    def apply(module, memory):
        traces.append(module)
        return module.apply({"params": {"memory": memory}}, IDS)

    static = jax.jit(apply, static_argnums=0)
    again = LmaTables(SIZES, 8, Signatures(signatures.words.copy()), budget=96, seed=2**40)
    np.testing.assert_array_equal(static(tables, draw(96)), static(again, draw(96)))
    assert len(traces) == 1


REFUSED = [
    ("lookup(words=words.astype(int))", "TypeError", "signatures has dtype int64; it must be uint32"),
    ("lookup(words=words[0])", "ValueError", "signatures has shape (2,); it must be [values, 2]"),
    ("lookup(memory=np.ones(64, int))", "TypeError", "memory has dtype int32; it must be a float type"),
    ("lookup(memory=np.ones((8, 8)))", "ValueError", "memory has shape (8, 8); it must be a vector"),
    ("lookup(ids=np.ones(3))", "TypeError", "ids has dtype float64; it must be an integer type"),
    ("lookup(block_size=65)", "ValueError", "budget is 64; it must be at least one block, block_size = 65"),
    ("lookup(keys_to_use=0)", "ValueError", "keys_to_use is 0; it must be at least 1"),
    ("lookup(keys_to_use=17)", "ValueError", "keys_to_use is 17; at most 16 keys of 4 bits fit two words"),
    ("lookup(keys_to_use=2.0)", "TypeError", "keys_to_use is 2.0; it must be an int"),
    ("lookup(key_bits=33)", "ValueError", "key_bits is 33; it must lie in 1..32"),
    ("lookup(seed='a')", "TypeError", "seed is 'a'; it must be an int"),
    ("embed()", "ValueError", "give exactly one of budget (got None) and compression (got None)"),
    ("embed(budget=0)", "ValueError", "budget is 0; it must be at least 1"),
    (
        "embed(compression=2)",
        "ValueError",
        "compression is 2: 20 weights in all, of which the signatures of 10 values",
    ),
    ("embed(budget=9, num_embeddings=11)", "ValueError", "signatures has 10 values; there are 11 rows"),
    ("embed(budget=9, signatures=words)", "TypeError", "signatures is of type ndarray; it must be Signatures"),
    ("embed(budget=9, ids=np.ones(3))", "TypeError", "ids has dtype float64; it must be an integer type"),
    ("tables(features=(4,))", "ValueError", "features has 1 entries; there are 2 tables"),
    ("tables(num_embeddings=(4, 5))", "ValueError", "signatures has 10 values; there are 9 rows"),
    ("tables(num_embeddings=())", "ValueError", "num_embeddings is (); it must name one table at least"),
    ("tables(ids=ids)", "ValueError", "ids has shape (3,); its last axis must be 2, one column a table"),
    ("lma_map(words, 4, 64, scale=float('inf'))", "ValueError", "scale is inf; it must be finite"),
    ("sample_signatures(ids, (10,))", "ValueError", "ids has shape (3,); it must be [samples, 1], a column a table"),
    ("sample_signatures(pairs * 1.0, (4, 6))", "TypeError", "ids has dtype float64; it must be an integer type"),
]

PRELUDE = """
import warnings

warnings.simplefilter("error")
import json, sys
import jax, numpy as np
from hashml.sharing.lma import *
from hashml.sharing.lma_signatures import *
from hashml.sharing.lma_tables import *

memory, ids, pairs = np.ones(64, np.float32), np.array([1, 2, 3]), np.array([[1, 2], [3, 4]])
words, key = np.arange(20, dtype=np.uint32).reshape(10, 2), jax.random.key(0)

def lookup(memory=memory, words=words, ids=ids, **how):
    return lma_lookup(memory, words, ids, **{"features": 16, **how})

def embed(ids=ids, **how):
    how = {"num_embeddings": 10, "features": 4, "signatures": Signatures(words), **how}
    return LmaEmbed(**how).init_with_output(key, ids)[0]

def tables(ids=pairs, **how):
    how = {"num_embeddings": (4, 6), "features": 4, "signatures": Signatures(words), "budget": 40, **how}
    return LmaTables(**how).init_with_output(key, ids)[0]

def outcome(call):
    try:
        jax.eval_shape(lambda: eval(call))
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", "no error"]

print(json.dumps([outcome(call) for call in json.load(sys.stdin)]))
"""


def test_bad_input_is_refused_by_name():
    """In a process without the annotations' checks of the tests."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE],
        input=json.dumps([call for call, _, _ in REFUSED] + ["lookup()", "embed(budget=9)", "tables()"]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    for (call, error, message), (kind, text) in zip(REFUSED, outcomes, strict=False):
        assert (kind, message in text) == (error, True), f"{call}: {kind}: {text}"
    assert outcomes[len(REFUSED) :] == [["", "no error"]] * 3
