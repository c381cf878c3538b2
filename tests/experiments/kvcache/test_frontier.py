"""The frontier: a run at the smallest scale, and claims that read the right rows."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from experiments.kvcache import fixtures, frontier, frontier_cells
from experiments.kvcache.contenders import contender
from experiments.kvcache.language_models import next_token_nll
from experiments.lab import figures
from experiments.lab.claims import judge

TINY = frontier.SCALES["tiny"]

EXPERIMENT = "kvcache.frontier"
NEEDS = ("wikitext2/valid.txt.gz",)


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    assert rows["nll"].is_between(1, 8).all()
    assert rows["bytes_per_token"].min() > 0
    coded = rows.filter(pl.col("method") == "coupled:8c8b")
    # Codebooks of one head of 32: 4 groups of 256 centroids of 8 float16 values, of keys and of values.
    assert set(coded["table_bytes"]) == {2 * 4 * 256 * 8 * 2}
    assert set(rows.filter(pl.col("method") != "coupled:8c8b")["table_bytes"]) == {0}
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert isinstance(found.table(rows), pl.DataFrame)
    assert figures.describe(figures.draw(found.figure, rows))


def test_a_recall_cell_tells_rehearsed_from_unrehearsed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = dataclasses.replace(TINY, models=("recall",), seeds=1)
    (row,) = frontier_cells.scores(config, frontier_cells.Cell("recall", "decode", "window", 2))
    assert row["nll"] is None
    assert row["accuracy"] == pytest.approx((row["rehearsed"] + row["unrehearsed"]) / 2)  # pyright: ignore
    assert row["tokens_kept"] == 47


def test_stories_are_its_own_and_every_seed_has_others():
    """The exact cache says of its own stories what `forward` does; a seed's stories are none of another's."""
    size = dataclasses.replace(fixtures.TINY, text_window=4)
    first, second = (fixtures.texts(size, "stories", seed)[0] for seed in (0, 1))
    assert first.shape == second.shape == (2, 48)
    assert (first[:, 0] == 1).all()
    assert (first != second).any(axis=1).all()
    common = fixtures.setting(size, "stories", "decode")
    rows = fixtures.scores(
        size, "stories", "decode", contender("full", dataclasses.replace(common, dtype="float32")), 2
    )
    params = fixtures.params(size, "stories", 0)
    for row, tokens in zip(rows, (first, second), strict=True):
        exact = np.asarray(next_token_nll(params, common.decoder, tokens))
        assert row["nll"] == pytest.approx(exact[:, 24:].mean(), abs=1e-4)


def test_the_cells_are_those_of_the_protocol():
    config = frontier.SCALES["default"]
    cells = frontier_cells.cells(config)
    assert len(set(cells)) == len(cells)
    for fixture, budgets in (("f1", {2, 4, 8}), ("recall", {2, 3, 4, 8}), ("stories", {2, 4, 8})):
        part = [cell for cell in cells if cell.fixture == fixture and cell.protocol == "decode"]
        assert {cell.budget for cell in part if cell.method == "random"} == budgets
        assert {cell.budget for cell in part if cell.method == "full"} == {None}
    assert fixtures.setting(config.size, "recall", "prompt").prompt == 80
    assert fixtures.setting(config.size, "f1", "prompt").prompt == 128
    recipe = fixtures.text_recipe(config.size, "f1_relu_gqa")
    assert recipe == fixtures.language_models.F1_RELU_GQA


def made_up() -> pl.DataFrame:
    """Loss 2.0 with the exact cache, 1 % more with Scissorhands, of which INT4 adds nothing; recall by hand."""
    loss: dict[tuple[str, int | None], float] = {
        ("full", None): 2.0, ("int2", None): 2.5, ("coupled:2c8b", None): 2.03, ("coupled:8c8b", None): 2.2
    }  # fmt: skip
    recall: dict[tuple[str, int | None], float] = {("full", None): 1.0}
    for budget in (2, 3, 4):
        loss |= {("scissorhands", budget): 2.02, ("scissorhands+int4", budget): 2.02, ("random", budget): 2.1}
        recall |= {("window", budget): 0.05, ("random", budget): 0.5, ("tova", budget): 0.2}
        recall |= {("h2o", budget): 0.9, ("keyformer", budget): 0.8, ("corm", budget): 0.7}
        recall |= {("scissorhands_1", budget): 0.95 - 0.1 * budget, ("scissorhands", budget): 0.45}
    rows = [
        {"fixture": "f1", "protocol": protocol, "method": method, "budget": budget, "seed": seed,
         "nll": value + 0.1 * seed if protocol == "decode" else 2.0, "accuracy": None}
        for protocol in ("decode", "prompt") for (method, budget), value in loss.items() for seed in range(3)
    ]  # fmt: skip
    rows += [
        {"fixture": "f1", "protocol": "prompt", "method": "think:0.4", "budget": None, "seed": seed,
         "nll": 2.1 + 0.001 * seed, "accuracy": None}
        for seed in range(3)
    ]  # fmt: skip
    rows += [
        {"fixture": "recall", "protocol": "decode", "method": method, "budget": budget, "seed": seed, "nll": None,
         "accuracy": value + 0.001 * seed}
        for (method, budget), value in recall.items() for seed in range(3)
    ]  # fmt: skip
    # Stories: other losses than f1's, so that a claim that read those would be off.
    told = {("full", None): 1.0, ("scissorhands", 2): 1.01, ("coupled:2c8b", None): 1.02, ("coupled:8c8b", None): 1.1,
            ("int2", None): 1.0}  # fmt: skip
    rows += [
        {"fixture": "stories", "protocol": "decode", "method": method, "budget": budget, "seed": seed,
         "nll": value, "accuracy": None}
        for (method, budget), value in told.items() for seed in range(3)
    ]  # fmt: skip
    frame = pl.DataFrame(rows, infer_schema_length=None)
    extra = {"bytes_per_token": 100.0 + frame["accuracy"].is_null(), "rehearsed": frame["accuracy"],
             "unrehearsed": frame["accuracy"], "tokens_kept": 10.0, "table_bytes": 0,
             "tokens_per_second": 1.0}  # fmt: skip
    return frame.with_columns(**{n: v if isinstance(v, pl.Series) else pl.lit(v) for n, v in extra.items()})


def test_the_claims_read_the_right_rows():
    rows = made_up()
    ratio = float(np.mean([0.02 / (2 + 0.1 * seed) for seed in range(3)]))
    expected = {
        "scissorhands-half": (ratio, True),
        "scissorhands-quarter": (ratio, True),
        "scissorhands-random": (float(np.mean([(2.02 + s) / (2.1 + s) - 1 for s in (0, 0.1, 0.2)])), True),
        "scissorhands-int4": (0.0, True),
        "recall-half": (0.751, False),
        "recall-third": (0.651, False),
        "recall-scissorhands-random": (0.15, True),
        "recall-h2o-random": (0.4, True),
        "recall-keyformer-random": (0.3, True),
        "recall-corm-random": (0.2, True),
        "recall-all-random": (-0.05, False),
        "recall-all-window": (0.4, True),
        "tova-below-random": (-0.3, True),
        "coupled-2c8b": (float(np.mean([0.03 / (2 + 0.1 * seed) for seed in range(3)])), False),
        "coupled-8c8b": (float(np.mean([(2.2 + s) / (2.5 + s) - 1 for s in (0, 0.1, 0.2)])), True),
        "stories-scissorhands-half": (0.01, True),
        "stories-coupled-2c8b": (0.02, False),
        "stories-coupled-8c8b": (0.1, False),
        "think": (0.0505, False),
    }
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in frontier.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert "scissorhands at 1/" in (verdicts["recall-all-random"].note or "")


def test_the_figure_has_a_panel_for_each_model_and_protocol():
    drawn = figures.draw(frontier.figure, made_up())
    titles = [ax.get_title("left") for ax in drawn.axes if ax.get_title("left")]
    assert sorted(titles) == ["f1, compressed prompt", "f1, token by token", "recall, token by token",
                              "stories, token by token"]  # fmt: skip
