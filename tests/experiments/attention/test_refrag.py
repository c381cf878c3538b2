"""REFRAG's experiment: a run at the smallest scale, the task and its controls, claims over rows made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import scipy.special

from experiments.attention import refrag, refrag_cells, refrag_models, refrag_task, refrag_timing
from experiments.attention.refrag_task import (
    ASK,
    CONTEXT,
    FACT,
    FILLER,
    LENGTH,
    PASSAGES,
    VALUE,
    VALUES,
    VOCABULARY,
)
from experiments.lab import NotEnoughRows, figures
from experiments.lab.claims import judge
from hashml.models.refrag import init_params

EXPERIMENT = "attention.refrag"
TINY, DEFAULT = refrag.SCALES["tiny"], refrag.SCALES["default"]


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(TINY)
    assert (rows["seconds"].drop_nulls() > 0).all()
    trained = rows.filter(pl.col("part") != "time")
    assert trained["accuracy"].is_between(0, 1).all()
    assert (trained["nll"] > 0).all()
    # Of 16 chunks of 8 tokens 4 are expanded; one token asks for the first value.
    positions = dict(trained.select("method", "positions").unique().iter_rows())
    mixed = 12 + 4 * 8 + 1
    assert positions == {"full": 129, "none": 1, "compressed": 17, "truncated": 17, "all": 129, "refrag": 17,
                         "truncated_expanded": mixed, "untrained": 17,
                         **dict.fromkeys(refrag_cells.SELECTIONS, mixed)}  # fmt: skip
    same = trained.filter(pl.col("method").is_in(["compressed", "refrag"]))
    assert same.group_by("seed").agg(pl.col("nll").n_unique())["nll"].to_list() == [1, 1]
    hits = dict(trained.filter(pl.col("seed") == 0).select("method", "hits").unique().iter_rows())
    assert (hits["oracle"], hits["all"], hits["compressed"]) == (1, 1, 0)
    timed = {method: part for (method,), part in rows.filter(pl.col("part") == "time").group_by("method")}
    assert {method: part["positions"][0] for method, part in timed.items()} == {
        "dense": 32 + 16, "kept": 4 + 16, "expanded": 3 + 8 + 16, "encoded": 4 + 16}  # fmt: skip
    assert timed["encoded"]["flops"][0] > timed["kept"]["flops"][0]
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == len(rows.select("part", "method", "size", "context").unique())
    assert "kept, k = 8" in figures.describe(figures.draw(found.figure, rows))


# --- the task -------------------------------------------------------------------------------------------


def decoded(fact):
    """Subject, attribute and value of a fact."""
    return (fact - FACT) // (2 * VALUES), (fact - FACT) // VALUES % 2, (fact - FACT) % VALUES


@pytest.mark.parametrize("passages", [2, PASSAGES])
def test_every_passage_has_two_facts_that_no_chunk_parts(passages):
    made = refrag_task.contexts(50, 7, questions=2, passages=passages)
    for row, context in enumerate(made.context):
        known = {}
        for passage, tokens in enumerate(context.reshape(passages, LENGTH)):
            at = np.flatnonzero(tokens < FILLER)
            assert len(at) == 2
            assert len(set(at // 4)) == 1
            for fact in tokens[at].tolist():
                subject, attribute, value = decoded(fact)
                known[subject, attribute] = passage, value
        assert len(known) == 2 * passages  # subjects differ
        for asked, question in zip(made.asked[row], made.tail[row].reshape(2, 2, 2), strict=True):
            for attribute, (ask, answer) in enumerate(question.tolist()):
                assert (ask - ASK) % 2 == attribute
                passage, value = known[(ask - ASK) // 2, attribute]
                assert (passage, VALUE + VALUES * attribute + value) == (asked, answer)
    assert made.weight[0].tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert FILLER <= made.context.max() < VOCABULARY
    # Facts stand in each of the places of a passage alike.
    places = np.flatnonzero((made.context < FILLER).ravel()) % LENGTH
    share = np.bincount(places, minlength=LENGTH) / len(places)
    assert np.abs(share - 1 / 16).max() < 4 * np.sqrt(15 / 256 / len(places))


def test_contexts_are_a_stream_and_all_passages_are_asked_for_alike():
    whole = refrag_task.contexts(2000, 3)
    part = refrag_task.contexts(5, 3, first=7)
    np.testing.assert_array_equal(part.context, whole.context[7:12])
    np.testing.assert_array_equal(part.tail, whole.tail[7:12])
    counts = np.bincount(whole.asked[:, 0], minlength=PASSAGES)
    assert np.abs(counts - 250).max() < 4 * np.sqrt(2000 * 7 / 64)
    for wrong, message in (
        ({"count": 0}, "count is 0; it is at least 1"),
        ({"passages": 9}, "passages is 9; it is from 1 to 8, the subjects there are"),
        ({"questions": 17}, "questions is 17; it is from 1 to the 8 passages"),
    ):
        with pytest.raises(ValueError, match=message):
            refrag_task.contexts(**({"count": 1, "key": 0} | wrong))


# --- controls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 16])
def test_the_asked_chunk_is_the_one_with_the_fact(size):
    data = refrag_task.contexts(40, 1)
    found = refrag_cells.asked_chunks(data, size)
    chunks = data.context.reshape(40, -1, size)
    mine = (chunks >= FACT) & (chunks < FILLER) & (decoded(chunks)[0] == (data.tail[:, :1, None] - ASK) // 2)
    np.testing.assert_array_equal(found, mine.any(axis=2))
    assert (mine.sum(axis=2)[found] == 2).all()
    assert (found.sum(axis=1) == 1).all()


def test_selections_expand_a_quarter_and_only_the_oracle_knows():
    data, share = refrag_task.contexts(400, 1), 0.25
    asked = refrag_cells.asked_chunks(data, 8)
    for how in ("random", "oracle"):
        chosen = refrag_cells.selection(DEFAULT, 8, 0, data, how)
        assert chosen.shape == (400, 4)
        assert all(len(set(row)) == 4 for row in chosen.tolist())
        hits = np.take_along_axis(asked, chosen, axis=1).any(axis=1).mean()
        if how == "oracle":
            assert hits == 1
            others = chosen[:, 1:]  # drawn among the rest: each of 15 in a fifth of the rows
            assert np.abs(np.bincount(others.ravel(), minlength=16) / 400 - 3 / 16).max() < 4 * np.sqrt(0.16 / 400)
        else:
            assert abs(hits - share) < 4 * np.sqrt(share * (1 - share) / 400)
    with pytest.raises(ValueError, match="how is 'best'; allowed are random, heuristic, blind, policy, oracle"):
        refrag_cells.selection(DEFAULT, 8, 0, data, "best")


def test_no_policy_is_shown_an_answer():
    """Other values behind the question change nothing that is kept, and another question its vector alone."""
    config = refrag_models.refrag_config(TINY, 8)
    params = jax.jit(lambda key: init_params(key, config))(jax.random.key(0))
    data = refrag_task.contexts(2, 1)
    values, question = data.tail.copy(), data.tail.copy()
    values[:, 1:] = 0
    question[:, 0] += 2
    base, same, other = (
        refrag_models.kept(params, config, data.context, tail) for tail in (data.tail, values, question)
    )
    jax.tree.map(np.testing.assert_array_equal, base, same)
    np.testing.assert_array_equal(base.c, other.c)
    assert np.abs(np.asarray(base.question) - np.asarray(other.question)).max() > 1e-3


def test_an_answer_is_both_values():
    logits = np.full((3, 2, 6), -1.0, np.float32)
    said = np.array([[1, 2], [1, 2], [3, 4]])
    for row, best in enumerate(([1, 2], [1, 3], [3, 4])):
        logits[row, [0, 1], best] = 1.0
    right, nll = refrag_cells.judged(jnp.asarray(logits), said)
    assert right.tolist() == [True, False, True]
    logs = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(nll, -np.take_along_axis(logs, said[..., None], axis=-1)[..., 0].mean(1), rtol=1e-5)


def test_recipes_and_the_curriculum():
    for size in DEFAULT.sizes:
        counts = refrag_models.chunk_counts(size)
        assert counts[-1] * size == CONTEXT
        assert all(count * size % LENGTH == 0 for count in counts)
    whole = refrag_models.lengths(DEFAULT, 8, "direct", "continuation", 6, 0)
    assert whole.tolist() == [16] * 6
    rising = refrag_models.lengths(DEFAULT, 8, "refrag", "continuation", 400, 0)
    assert (rising[:200] == 2).mean() > 0.5 > (rising[200:] == 2).mean()
    with pytest.raises(ValueError, match="recipe is 'best'; allowed are refrag, no_curriculum, .*, untrained"):
        refrag_models.trained(DEFAULT, 8, "best", 0)


# --- what is timed --------------------------------------------------------------------------------------


def test_what_is_timed_gives_the_first_tokens_logits():
    """Kept embeddings or embeddings made within the call: the same logits and the same cache."""
    kept, encoded = (refrag_timing.prefill(TINY, method, 8, 32)() for method in ("kept", "encoded"))
    assert kept[0].shape == (1, refrag_timing.VOCABULARY)
    np.testing.assert_allclose(kept[0], encoded[0], atol=1e-5)
    np.testing.assert_allclose(kept[1].k[0], encoded[1].k[0], atol=1e-5)
    assert [name for name, _ in refrag_timing.timed_methods(DEFAULT)] == [
        "dense", "kept", "kept", "kept", "expanded", "encoded"]  # fmt: skip


# --- claims ---------------------------------------------------------------------------------------------


def made_up() -> pl.DataFrame:
    """Answers and times by hand; a seed is better as a whole, a repetition slower."""
    rows = []

    def add(part, method, size=None, count=3, context=None, **measured):
        for at in range(count):
            timed = part == "time"
            scaled = {name: value * (1 + at) if timed else value + 0.01 * at for name, value in measured.items()}
            key = refrag._key(part, method, size, seed=None if timed else at, context=context,
                              repetition=at if timed else None)  # fmt: skip
            rows.append(key | refrag._row(**scaled))

    add("quality", "full", accuracy=0.95, nll=0.02)
    for size, accuracy, truncated in ((4, 0.95, 0.25), (8, 0.8, 0.125), (16, 0.85, 0.9)):
        add("quality", "compressed", size, accuracy=accuracy, nll=0.05)
        add("quality", "truncated", size, accuracy=truncated, nll=1.0)
    for method, accuracy, hits in (("compressed", 0.8, 0.0), ("random", 0.84, 0.25), ("heuristic", 0.84, 0.24),
                                   ("blind", 0.84, 0.25), ("policy", 0.94, 0.9), ("oracle", 0.95, 1.0),
                                   ("truncated_expanded", 0.3, 0.3)):  # fmt: skip
        add("selection", method, 8, accuracy=accuracy, nll=0.1, hits=hits)
    for method, accuracy in (("refrag", 0.8), ("direct", 0.7), ("untrained", 0.85)):
        add("ablation", method, 8, accuracy=accuracy, nll=0.1)
    for context, dense in ((1024, 8.0), (4096, 34.0)):
        add("time", "dense", count=7, context=context, seconds=dense)
        for size, seconds in ((4, 2.0), (16, 2.0)):
            add("time", "kept", size, count=7, context=context, seconds=seconds)
        add("time", "encoded", 16, count=7, context=context, seconds=8.0)
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    expected = {
        "truncation": (-0.05, False),
        "order": (-0.05, False),
        "no-loss": (0.03, False),
        "policy-random": (0.1, True),
        "policy-heuristic": (0.1, True),
        "policy-oracle": (-0.01, True),
        "policy-whole": (-0.01, True),
        "policy-compressed": (0.14, True),
        "policy-truncation": (0.64, True),
        "policy-hits": (0.65, True),
        "blind": (0.0, True),
        "ablation-direct": (0.1, True),
        "ablation-untrained": (-0.05, False),
        "sooner-1024": (0.25, False),
        "sooner-kept": (17.0, True),
        "sooner-encoded": (4.25, False),
    }
    rows = made_up()
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in refrag.CLAIMS}
    unmeasured = {"ablation-no_reconstruction", "ablation-no_curriculum"}
    assert set(verdicts) == set(expected) | unmeasured
    assert all(verdicts[name].verdict == "not judged" for name in unmeasured)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert "least at k = 16" in verdicts["truncation"].note
    assert "least from k = 8 to k = 16" in verdicts["order"].note
    assert "least at k = 16" in verdicts["sooner-1024"].note


def test_nothing_is_said_where_the_decoder_does_not_answer():
    claims = {claim.id: claim for claim in refrag.CLAIMS}
    poor = made_up().with_columns(pl.col("accuracy") - 0.3)
    with pytest.raises(NotEnoughRows, match="whole contexts give 0.66 of the answers, below 0.9"):
        claims["policy-random"].measure(poor)
    with pytest.raises(NotEnoughRows, match="encoded was not timed at 4096 tokens, chunks of 16"):
        claims["sooner-encoded"].measure(made_up().filter(pl.col("method") != "encoded"))
