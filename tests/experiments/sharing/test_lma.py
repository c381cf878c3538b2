"""The experiment of LMA: what its contenders store and see, its law, its claims on rows of known answers."""

import json

import numpy as np
import polars as pl
import pytest

from experiments import cli
from experiments.lab import experiment, figures, records
from experiments.lab.claims import judge
from experiments.sharing import lma
from hashml.sharing.lma import LmaGeometry

TINY = lma.SCALES["tiny"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The experiment and the rows of a finished run at scale tiny."""
    out = tmp_path_factory.mktemp("runs")
    assert cli.main(["run", "sharing.lma", "--scale", "tiny", "--out", str(out)]) == 0
    record = records.read_record(out / "sharing.lma" / "tiny")
    assert record is not None
    assert (out / "sharing.lma" / "tiny" / "figure.png").read_bytes()[:4] == b"\x89PNG"
    return experiment.load("sharing.lma"), record.rows


def test_runs_as_many_trials_as_it_says_and_shows_them(finished):
    found, rows = finished
    assert len(rows) == found.count(TINY)
    assert len(found.table(rows)) == 7
    text = figures.describe(figures.draw(found.figure, rows))
    assert all(label in text for label in ("LMA, signatures shuffled", "element hashing", "hashing trick", "the law"))
    assert json.dumps(rows.to_dicts())


def test_both_accountings_are_there(finished):
    """Equal weights without the signatures; and element hashing with all of LMA's bytes."""
    _, rows = finished
    stored = rows.filter((pl.col("part") == "quality") & (pl.col("seed") == 0))
    memory = dict(stored.select("method", "memory_bytes").rows())
    whole = dict(stored.select("method", "embedding_bytes").rows())
    values = 4 * 300
    assert memory["full"] == whole["full"] == 4 * 16 * values
    assert memory["lma"] == memory["shuffled"] == memory["element"] == memory["robe"] == 4 * values
    assert memory["hashing_trick"] <= memory["lma"]
    assert whole["lma"] == whole["shuffled"] == whole["element_same_bytes"] == 4 * values + 8 * values
    assert whole["element"] == memory["element"]


def test_shuffling_keeps_the_signatures_and_moves_them():
    given = lma.signatures(TINY, "planted", 0)
    moved = lma.shuffled(given, 3)
    assert (moved.words != given.words).any(axis=1).mean() > 0.9
    for word in (0, 1):
        np.testing.assert_array_equal(np.sort(moved.words[:, word]), np.sort(given.words[:, word]))


def test_signatures_see_the_ids_of_half_of_the_training_rows():
    train, _, _ = lma.parts(TINY, "planted", 0)
    seen = lma.sampled(train)
    assert len(seen) == len(train) // 2
    np.testing.assert_array_equal(seen, train.ids[: len(seen)])


def test_the_law_is_the_mean_over_coordinates():
    geometry = LmaGeometry(100, 5, keys_to_use=3)
    expected = 0.0
    for picks in geometry.picks:
        phi = (0.5 + 0.5 / 16) ** len(set(picks.tolist()))
        expected += (phi + (1 - phi) / 100) / 5
    np.testing.assert_allclose(lma.expected_sharing(np.array([0.5, 1.0]), geometry), [expected, 1.0])


def test_pairs_have_the_jaccard_index_of_their_rows():
    pairs, similarity = lma._similar_pairs(TINY, "planted")
    train, _, _ = lma.parts(TINY, "planted", 0)
    ids = lma.sampled(train) + 300 * np.arange(4)
    for place in range(0, len(pairs), len(pairs) // 20):
        a, b = ((ids == value).any(axis=1) for value in pairs[place])
        assert similarity[place] == pytest.approx((a & b).sum() / (a | b).sum())
        assert min(a.sum(), b.sum()) >= TINY.minimum_support


def rows_of(auc):
    """Rows of one data set: ``auc`` by method, the same at every compression, with a known spread of seeds."""
    rows = []
    for (method, value), seed in ((item, seed) for item in auc.items() for seed in range(5)):
        for compression in (1,) if method == "full" else (4, 16, 64):
            rows.append(
                {
                    "part": "quality", "data": "frappe", "method": method, "compression": compression, "seed": seed,
                    "auc": value + 0.01 * seed + 1e-4 * (seed - 2) * (method == "lma"),
                }
            )  # fmt: skip
    return pl.DataFrame(rows)


@pytest.mark.parametrize(
    ("claim", "holds_at", "fails_at"),
    [("gain-frappe", 0.803, 0.8015), ("loss-16x-frappe", 0.8485, 0.84), ("control-frappe", 0.802, 0.7999),
     ("equal-bytes-frappe", 0.821, 0.819)],
)  # fmt: skip
def test_claims_compare_what_they_say(claim, holds_at, fails_at):
    (one,) = (c for c in lma.CLAIMS if c.id == claim)
    others = {"full": 0.85, "element": 0.8, "shuffled": 0.8, "element_same_bytes": 0.82}
    for value, verdict in ((holds_at, "holds"), (fails_at, "fails")):
        found = judge(one, rows_of({"lma": value, **others}), scale="default", complete=True)
        assert (found.verdict, found.note) == (verdict, "5 pairs")


def test_a_law_that_is_missed_is_told():
    (one,) = (c for c in lma.CLAIMS if c.id == "sharing-law")
    for deviation, verdict in ((0.003, "holds"), (-0.005, "fails")):
        rows = pl.DataFrame(
            {"part": "law", "pairs": [10, 0], "deviation": [deviation, None], "deviation_error": [0.001, None]}
        )
        assert judge(one, rows, scale="default", complete=True).verdict == verdict
