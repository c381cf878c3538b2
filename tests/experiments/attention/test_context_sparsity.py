"""Context sparsity: a run at the smallest scale, budgets that share a program, claims that read the right rows."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from experiments.attention import context_sparsity, context_sparsity_cells, context_sparsity_estimators
from experiments.attention.context_sparsity_cells import SELECTORS, Cell, bits_of, cells, sparsities_of, tables_of
from experiments.attention.context_sparsity_decode import Budgeted, Recency, budget_of, decoded
from experiments.kvcache import fixtures
from experiments.lab import NotEnoughRows, figures
from experiments.lab.claims import judge
from hashml.attention.oracle import OracleTopK
from hashml.attention.selection_controls import StreamingMask, UniformRandom
from hashml.attention.selector_contract import slot_positions

EXPERIMENT = "attention.context_sparsity"
NEEDS = ("wikitext2/valid.txt.gz",)
DEFAULT = context_sparsity.SCALES["default"]


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    decode = rows.filter(pl.col("part") == "decode")
    assert decode["nll"].is_between(1, 8).all()
    # 24 tokens are decoded, which see 25 to 48.
    seen = np.arange(25, 49)
    assert set(decode["tokens_seen"]) == {36.5}
    budgeted = decode.filter(pl.col("sparsity").is_not_null() & pl.col("method").ne("v_attention"))
    for sparsity, read in budgeted.select("sparsity", "tokens_read").iter_rows():
        assert read == pytest.approx(np.ceil(seen / sparsity).mean())
    whole = rows.filter(pl.col("part").eq("codec") & pl.col("method").eq("all"))
    assert set(whole["tokens_read"]) == {36.5}
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    settings = ["part", "fixture", "method", "codec", "sparsity", "spread", "budget"]
    assert len(found.table(rows)) == len(rows.select(settings).unique())
    assert "oracle" in figures.describe(figures.draw(found.figure, rows))


def test_reading_all_is_exact_attention(finished):
    """The engine, a token at a time with a list of all slots, against the model run over the whole text."""
    config = finished[0].scales["tiny"]
    row, few = decoded(config.size, "f1", 0, OracleTopK(), (1.0, 0.2))
    assert row["tokens_read"] == row["tokens_seen"] == 36.5
    assert row["nll"] == pytest.approx(row["exact_nll"], abs=1e-4)
    assert row["accuracy"] == row["exact_accuracy"]
    assert abs(few["nll"] - few["exact_nll"]) > 1e-4


# --- budgets --------------------------------------------------------------------------------------------


def test_a_budget_is_the_part_rounded_up():
    seen = np.arange(1, 400)
    for sparsity in (2, 5, 10, 50):
        found = budget_of(np.full(seen.size, 1 / sparsity, np.float32), seen - 1)
        np.testing.assert_array_equal(found, -(-seen // sparsity))
    np.testing.assert_array_equal(budget_of(np.ones(3, np.float32), np.array([0, 5, 255])), [1, 6, 256])


SLOTS, D = 40, 4
POSITIONS = slot_positions(jnp.array([SLOTS - 4, SLOTS - 4], jnp.int32), SLOTS)
NOW = jnp.array([SLOTS - 5, SLOTS - 5], jnp.int32)


def operands():
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.standard_normal((2, 2, SLOTS, D)), jnp.float32)
    return keys, jnp.asarray(rng.standard_normal((2, 2, D)), jnp.float32)


def named(selection) -> list[set[int]]:
    idx, valid = (np.asarray(x).reshape(-1, x.shape[2]) for x in selection[:2])
    return [set(row[keep].tolist()) for row, keep in zip(idx, valid, strict=True)]


def test_rows_of_one_program_have_lists_of_their_own_length():
    """Each row's list is the one that the selector makes for its budget."""
    keys, q = operands()
    budgeted = Budgeted(OracleTopK())
    share = jnp.array([1 / 3, 1 / 6])
    index = budgeted.build(keys, keys, POSITIONS, learned=(None, share))
    size: dict[str, Any] = {"sinks": 1, "window": 2}
    found = named(budgeted.select(index, q, POSITIONS, NOW, **size, heavy=9))
    (read,) = budgeted.read
    np.testing.assert_array_equal(read, [12, 6])
    exact = OracleTopK().build(keys, keys, POSITIONS)
    for row, budget in enumerate((12, 6)):
        alone = OracleTopK().select(exact, q, POSITIONS, NOW, **size, heavy=budget - 3)
        assert found[2 * row : 2 * row + 2] == named(alone)[2 * row : 2 * row + 2]


def test_recency_ranks_as_a_window_does():
    keys, q = operands()
    index = StreamingMask().build(keys, keys, POSITIONS)
    size: dict[str, Any] = {"sinks": 1, "window": 2, "heavy": 7}
    recent, window = (of.select(index, q, POSITIONS, NOW, **size) for of in (Recency(), StreamingMask()))
    assert named(recent) == named(window) == [{0, *range(27, 36)}] * 4


def test_draws_count_for_the_tokens_that_they_stand_for():
    keys, q = operands()
    budgeted = Budgeted(UniformRandom(weighted=False), sampled=True)
    index = budgeted.build(keys, keys, POSITIONS, learned=(None, jnp.array([1 / 3, 1 / 6])))
    _, valid, weight = budgeted.select(
        index, q, POSITIONS, NOW, sinks=1, window=2, heavy=9, key=jax.random.key(0)
    )  # fmt: skip
    # 36 tokens are seen: the weights of those that are read add up to that.
    np.testing.assert_allclose(np.where(valid, weight, 0).sum(axis=2), 36, rtol=1e-6)
    np.testing.assert_allclose(weight[0, 0, :4], [1, 1, 1, 33 / 9], rtol=1e-6)


# --- cells ----------------------------------------------------------------------------------------------


def test_cells_and_the_bits_that_they_store():
    found = cells(DEFAULT.models, DEFAULT.methods, DEFAULT.codecs)
    assert len(set(found)) == len(found) == 3 * len(SELECTORS) + 2
    assert sparsities_of(Cell("f1", "top_p"), (2, 5)) == (None,)
    assert sparsities_of(Cell("f1", "socket"), (2, 5)) == (2, 5)
    assert sparsities_of(Cell("f1", "socket", "int4"), (2, 5)) == (5,)
    decoder = fixtures.setting(DEFAULT.size, "f1", "prompt").decoder
    assert decoder.head_dim == 32
    assert tables_of(decoder) == 15
    # 8 bits a table and 16 of the value's length; two numbers of 16 bits a coordinate and page of 8; codes of a byte.
    known = {"socket": 15 * 8 + 16, "hamming": 15 * 8, "quest": 32 * 32 / 8, "pq_cache": 16, "oracle": 16 * 32,
             "streaming": 0, "magic_pig": 75 * 8}  # fmt: skip
    assert {name: bits_of(SELECTORS[name](decoder), decoder) for name in known} == known


def test_a_codec_is_a_number_of_bits():
    decoder = fixtures.setting(fixtures.TINY, "f1", "prompt").decoder
    with pytest.raises(ValueError, match="codec is 'cq'; allowed are int2, int4 and int8"):
        context_sparsity_cells._codecs("cq", decoder)


# --- estimators -----------------------------------------------------------------------------------------


def test_logits_have_the_deviation_that_is_asked_for():
    given = context_sparsity_estimators.head(jax.random.key(0), jnp.float32(1.5), queries=8, tokens=512, width=32)
    q, k = (np.asarray(x, np.float64) for x in (given.q[0], given.k[0, 0]))
    # Over 512 keys a deviation is off by 3 % (1 standard error).
    np.testing.assert_allclose((q @ k.T / math.sqrt(32)).std(axis=1), 1.5, rtol=0.12)


def test_an_estimator_that_reads_all_is_exact():
    found = context_sparsity_estimators.errors(
        jax.random.key(0), jnp.float32(1), budget=32, queries=2, tokens=32, width=4
    )  # fmt: skip
    assert set(found) == {"oracle", "hybrid", "random"}
    for error in found.values():
        assert float(error) < 1e-5


# --- claims ---------------------------------------------------------------------------------------------


def rows_of(**columns) -> pl.DataFrame:
    seeds = len(next(iter(columns.values())))
    base = {"part": "decode", "fixture": "f1", "method": "oracle", "codec": None, "sparsity": 5, "spread": None,
            "budget": None, "seed": list(range(seeds))}  # fmt: skip
    return pl.DataFrame(base | columns)


def test_claims_measure_what_they_say():
    by_id = {claim.id: claim for claim in context_sparsity.CLAIMS}
    rows = rows_of(nll=[1.4, 1.5, 1.6], exact_nll=[1.39, 1.49, 1.59])
    measured = by_id["oracle-f1-5"].measure(rows)
    assert measured.value == pytest.approx(math.expm1(0.01))
    assert not by_id["oracle-f1-5"].holds(measured)
    with pytest.raises(NotEnoughRows, match="oracle"):
        by_id["oracle-f1-10"].measure(rows)
    # Of three the least lead counts.
    levels = {"socket": 1.5, "quest": 1.4, "pq_cache": 1.45, "streaming": 1.48, "random": 2.0}
    rows = pl.concat([rows_of(method=[name] * 3, nll=[level, level, level]) for name, level in levels.items()])
    measured = by_id["order-f1-streaming"].measure(rows)
    assert measured.value == pytest.approx(math.expm1(-0.02))
    assert "socket" in measured.note
    assert not by_id["order-f1-streaming"].holds(measured)
    assert by_id["order-f1-random"].holds(by_id["order-f1-random"].measure(rows))
    rows = pl.concat([rows_of(part=["estimator"] * 3, method=[name] * 3, sparsity=[None] * 3, spread=[0.5] * 3,
                              budget=[400] * 3, error=[error, error, error])
                      for name, error in (("oracle", 0.3), ("hybrid", 0.2))])  # fmt: skip
    assert by_id["crossover-flat"].measure(rows).value == pytest.approx(0.5)
