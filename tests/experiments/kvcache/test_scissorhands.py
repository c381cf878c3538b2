"""Scissorhands: a run at the smallest scale, its caches, and claims that read the right rows."""

import dataclasses
from typing import Any

import numpy as np
import polars as pl
import pytest

from experiments.kvcache import fixtures, scissorhands
from experiments.kvcache.scissorhands_cells import Cell, Config, cells, histories, layers_of
from experiments.kvcache.token_budgets import row_bytes
from experiments.lab import figures
from experiments.lab.claims import judge
from hashml.kvcache.scissorhands import Scissorhands

DEFAULT = Config()

EXPERIMENT = "kvcache.scissorhands"
NEEDS = ("wikitext2/valid.txt.gz",)


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    layers = rows.filter(pl.col("part") == "persistence")
    assert layers["ratio"].is_between(0, 1).all()
    assert layers["random_level"].is_between(1 / 24, 1).all()
    caches = rows.filter(pl.col("part") == "budget")
    assert caches["nll"].is_between(1, 8).all()
    held = {(row["method"], row["budget"]): row["tokens_kept"] for row in caches.iter_rows(named=True)}
    # Tokens 25 to 48 are counted; the cache has 24, and where it is full 12 leave at once.
    assert held["full", None] == np.arange(25, 49).mean()
    assert held["scissorhands", 2] == np.tile(np.arange(13, 25), 2).mean()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == 1 + len(cells(found.scales["tiny"]))
    assert figures.describe(figures.draw(found.figure, rows))


def test_the_history_of_recall_is_measured_head_by_head(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = dataclasses.replace(scissorhands.SCALES["tiny"], recall_seeds=1)
    (row,) = histories(config, Cell("history", "recall", "scissorhands_1", 2, 96))
    assert row["accuracy"] is not None
    assert row["newest"] is not None
    assert 0 <= row["accuracy"] <= 1
    # The window's 6 of 48 tokens at least, and BOS never.
    assert 6 / 48 <= row["newest"] <= 47 / 48


def test_the_caches_are_those_of_the_budgets():
    found = cells(DEFAULT)
    assert len(set(found)) == len(found)
    text = {cell.budget: layers_of(DEFAULT, cell)[0] for cell in found
            if (cell.fixture, cell.method) == ("f1", "scissorhands")}  # fmt: skip
    assert {budget: layer.capacity for budget, layer in text.items()} == {2: 128, 4: 64, 5: 51}
    assert {(layer.window, layer.policy) for layer in text.values()} == {(10, Scissorhands(queries=64))}
    assert text[2].policy.bulk(text[2]) == 64
    (half,) = {layers_of(DEFAULT, cell) for cell in found if cell == Cell("budget", "recall", "scissorhands_1", 2)}
    assert (half[0].capacity, half[0].window) == (48, 6)
    assert half[0].policy == Scissorhands(queries=16, drop=1)
    all_queries = layers_of(DEFAULT, Cell("history", "recall", "scissorhands_1", 2, 96, True))[0]
    assert all_queries.policy == Scissorhands(queries=96, drop=1, per_query=True)
    setting = fixtures.setting(DEFAULT.size, "f1", "decode")
    own, rival = (layers_of(DEFAULT, Cell("budget", "f1", name, 4)) for name in ("scissorhands", "h2o"))
    assert row_bytes(setting, rival) <= row_bytes(setting, own)
    assert rival[0].capacity >= own[0].capacity


def made_up() -> pl.DataFrame:
    """Seeds add 0.1 to a loss and 0.01 to an accuracy and to a ratio."""
    loss: dict[tuple[str, int | None], float] = {("full", None): 2.0, ("int4", None): 2.01}
    for budget, nll in ((2, 2.02), (4, 2.03), (5, 2.1)):
        loss |= {("scissorhands", budget): nll, ("scissorhands+int4", budget): nll, ("random", budget): nll + 0.1}
        loss |= {("window", budget): nll - 0.01, ("h2o", budget): nll}
    loss["scissorhands+int4", 4] = 2.05
    recall = {(name, budget): value - 0.1 * budget for budget in (2, 3) for name, value in (
        ("scissorhands_1", 1.1), ("scissorhands", 0.8), ("random", 0.7), ("window", 0.3), ("h2o", 1.15))}  # fmt: skip
    none: dict[str, Any] = {"layer": None, "budget": None, "history": None, "per_query": False}
    rows = [none | {"part": "budget", "fixture": "f1", "method": method, "budget": budget, "seed": seed,
                    "nll": nll + 0.1 * seed, "bytes_per_token": 15.0 if "int4" in method else 225.0}
            for (method, budget), nll in loss.items() for seed in range(3)]  # fmt: skip
    rows += [none | {"part": "budget", "fixture": "recall", "method": method, "budget": budget, "seed": seed,
                     "accuracy": accuracy + 0.01 * seed, "bytes_per_token": 1.0}
             for (method, budget), accuracy in recall.items() for seed in range(3)]  # fmt: skip
    rows += [none | {"part": "persistence", "fixture": "f1", "method": "full", "layer": layer, "seed": seed,
                     "ratio": ratio + 0.01 * seed, "median": ratio + 0.001 * seed, "random_level": 0.4 + 0.1 * layer}
             for layer, ratio in enumerate((0.96, 0.97, 0.9)) for seed in range(3)]  # fmt: skip
    windows = ((16, False, 0.9), (96, False, 0.3), (96, True, 0.95))
    rows += [none | {"part": "history", "fixture": "recall", "method": "scissorhands_1", "budget": 2, "seed": seed,
                     "history": w, "per_query": per, "accuracy": accuracy + 0.01 * seed, "newest": 1 - accuracy}
             for w, per, accuracy in windows for seed in range(3)]  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


def excess(a: float, b: float) -> float:
    return float(np.mean([(a + 0.1 * seed) / (b + 0.1 * seed) - 1 for seed in range(3)]))


def test_the_claims_read_the_right_rows():
    rows = made_up()
    expected = {
        "persistence-median": (0.901, False),
        "persistence-most-layers": (2 / 3, True),
        "persistence-random": (0.31, True),
        "persistence-small-set": (0.6, False),
        "persistence-late": (-0.06, True),
        "text-half": (excess(2.02, 2.0), True),
        "text-fifth": (excess(2.1, 2.0), False),
        "text-random": (excess(2.1, 2.2), True),
        "recall-half": (0.91, True),
        "recall-third": (0.81, True),
        "recall-random": (0.4, True),
        "recall-window": (0.8, True),
        "int4": (excess(2.05, 2.03), False),
        "int4-fold": (15.0, False),
        "int4-quality": (excess(2.1, 2.0), False),
        "history-accuracy": (-0.6, True),
        "history-window": (0.6, True),
    }
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in scissorhands.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert verdicts["int4"].note == "worst: 1/4 of the tokens"
    assert verdicts["persistence-median"].note == "worst: layer 2"
    # One model above random eviction's loss is one too many, whatever the mean.
    worse = pl.when(pl.col("seed").eq(2) & pl.col("method").eq("scissorhands")).then(9.0).otherwise("nll")
    (claim,) = (claim for claim in scissorhands.CLAIMS if claim.id == "text-random")
    assert judge(claim, rows.with_columns(nll=worse), scale="default", complete=True).verdict == "fails"


def test_the_figure_shows_all_parts():
    drawn = figures.draw(scissorhands.figure, made_up())
    titles = [ax.get_title("left") for ax in drawn.axes]
    assert titles == ["pivotal later, and pivotal before", "f1, token by token", "recall, token by token",
                      "recall at half of the tokens"]  # fmt: skip
    assert {"full", "scissorhands", "random"} <= {text.get_text() for text in drawn.axes[1].get_legend().get_texts()}  # pyright: ignore[reportOptionalMemberAccess]
