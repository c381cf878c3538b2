"""The frontier: a run at the smallest scale, and claims that read the right rows."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from experiments.kvcache import fixtures, frontier, frontier_cells, frontier_claims
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
    assert rows["speed_low"].is_between(0, rows["speed"]).all()
    assert (rows["speed_high"] >= rows["speed"]).all()
    assert rows["tokens_per_second"].min() > 0
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert isinstance(found.table(rows), pl.DataFrame)
    assert figures.describe(figures.draw(found.figure, rows))


def test_a_recall_cell_tells_rehearsed_from_unrehearsed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = dataclasses.replace(TINY, models=("recall",), recall_seeds=1)
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
    decoded: dict[tuple[str, int | None], float] = {
        ("full", None): 2.0, ("int2", None): 2.5, ("coupled:2c8b", None): 2.03, ("coupled:8c8b", None): 2.2
    }  # fmt: skip
    recall: dict[tuple[str, int | None], float] = {("full", None): 1.0}
    for budget in (2, 3, 4, 8):
        decoded |= {("scissorhands", budget): 2.02, ("scissorhands+int4", budget): 2.02, ("random", budget): 2.1}
        decoded |= {("window", budget): 2.06} | {(name, budget): 2.04 for name in frontier_claims.SCORED[:3]}
        decoded |= {("scissorhands_1", budget): 2.08, ("h2o+coupled:8c8b", budget): 2.04 * (1 + 0.002 * budget)}
        recall |= {("window", budget): 0.05, ("random", budget): 0.5, ("tova", budget): 0.2}
        recall |= {("h2o", budget): 0.9, ("keyformer", budget): 0.8, ("corm", budget): 0.7}
        recall |= {("scissorhands_1", budget): 0.95 - 0.1 * budget, ("scissorhands", budget): 0.45}
        recall |= {(f"{name}+coupled:8c8b", budget): value for name, value in
                   (("h2o", 0.8), ("scissorhands_1", 0.8 - 0.1 * budget), ("random", 0.5))}  # fmt: skip
    prompted: dict[tuple[str, int | None], float] = {("full", None): 2.0, ("think:0.4", None): 2.1}
    for budget in (2, 4):
        prompted |= {("snapkv", budget): 2.1, ("random", budget): 2.1 + 0.1 * budget, ("window", budget): 2.0}
        prompted |= {("adakv", budget): 2.05, ("pyramidkv", budget): 2.2}
    # Stories: other losses than f1's, so that a claim that read those would be off.
    told = {("full", None): 1.0, ("scissorhands", 2): 1.01, ("coupled:2c8b", None): 1.02, ("coupled:8c8b", None): 1.1,
            ("int2", None): 1.0}  # fmt: skip
    grouped = {("full", None): 2.0, ("kivi:4", None): 2.01, ("kivi:2", None): 2.2, ("coupled:2c8b", None): 2.1}
    for budget in (2, 4):
        grouped |= {("h2o", budget): 2.3, ("corm", budget): 2.2, ("scissorhands_1", budget): 2.1}
        grouped |= {("random", budget): 2.4, ("window", budget): 2.0 + 0.1 * budget}
    parts = (
        ("f1_relu_gqa", "decode", grouped, 0.0),
        ("f1", "decode", decoded, 0.1),
        ("f1", "prompt", prompted, 0.0),
        ("stories", "decode", told, 0.0),
    )
    rows = [
        {"fixture": fixture, "protocol": protocol, "method": method, "budget": budget, "seed": seed,
         "nll": value + step * seed, "accuracy": None}
        for fixture, protocol, losses, step in parts
        for (method, budget), value in losses.items() for seed in range(3)
    ]  # fmt: skip
    rows += [
        {"fixture": "recall", "protocol": "decode", "method": method, "budget": budget, "seed": seed, "nll": None,
         "accuracy": value + 0.001 * seed}
        for (method, budget), value in recall.items() for seed in range(3)
    ]  # fmt: skip
    frame = pl.DataFrame(rows, infer_schema_length=None)
    extra = {"bytes_per_token": 100.0 + frame["accuracy"].is_null(), "rehearsed": frame["accuracy"],
             "unrehearsed": frame["accuracy"], "tokens_kept": 10.0, "table_bytes": 0,
             "tokens_per_second": 1.0, "speed": 1.0, "speed_low": 0.9, "speed_high": 1.1}  # fmt: skip
    return frame.with_columns(**{n: v if isinstance(v, pl.Series) else pl.lit(v) for n, v in extra.items()})


def over(a: float, b: float) -> float:
    """Mean over three models, whose losses differ by .1, of the one loss over the other, less 1."""
    return float(np.mean([(a + s) / (b + s) - 1 for s in (0, 0.1, 0.2)]))


def test_the_claims_read_the_right_rows():
    rows = made_up()
    expected = {
        "scissorhands-half": (over(2.02, 2), True),
        "scissorhands-quarter": (over(2.02, 2), True),
        "scissorhands-random": (over(2.02, 2.1), True),
        "scissorhands-window": (over(2.02, 2.06), True),
        "scored-random": (over(2.08, 2.1), True),
        "scored-window": (over(2.08, 2.06), False),
        "scissorhands-int4": (0.0, True),
        "h2o-coupled": (over(2.04 * 1.008, 2.04), True),
        "recall-half": (0.751, False),
        "recall-third": (0.651, False),
        "recall-scissorhands-random": (0.15, True),
        "recall-h2o-random": (0.4, True),
        "recall-keyformer-random": (0.3, True),
        "recall-corm-random": (0.2, True),
        "recall-all-random": (-0.05, False),
        "recall-all-window": (0.4, True),
        "recall-coupled": (-0.1, False),
        "tova-below-random": (-0.3, True),
        "coupled-2c8b": (over(2.03, 2), False),
        "coupled-8c8b": (over(2.2, 2.5), True),
        "prompt-snapkv-random": (2.1 / 2.3 - 1, True),
        "prompt-snapkv-window": (2.1 / 2.0 - 1, False),
        "prompt-adakv-snapkv": (2.05 / 2.1 - 1, True),
        "prompt-pyramidkv-snapkv": (2.2 / 2.1 - 1, False),
        "think": (0.05, False),
        "stories-scissorhands-half": (0.01, True),
        "stories-coupled-2c8b": (0.02, False),
        "stories-coupled-8c8b": (0.1, False),
        "grouped-kivi": (0.005, True),
        "grouped-kivi-bits": (2.01 / 2.2 - 1, True),
        "grouped-coupled": (0.05, False),
        "grouped-random": (2.3 / 2.4 - 1, True),
        "grouped-window": (2.3 / 2.2 - 1, False),
    }
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in frontier.CLAIMS}
    assert {name for name in verdicts if verdicts[name].measured is not None} == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert "scissorhands at 1/" in (verdicts["recall-all-random"].note or "")
    # Every claim of f1 is made of stories, too.
    text = {name for name in verdicts if not name.startswith(("recall-", "tova-", "stories-", "grouped-"))}
    assert {name for name in verdicts if name.startswith("stories-")} == {f"stories-{name}" for name in text}


def test_the_figure_has_panels_for_each_model():
    drawn = figures.draw(frontier.figure, made_up())
    titles = [ax.get_title("left") for ax in drawn.axes if ax.get_title("left")]
    assert sorted(titles) == sorted(
        f"{fixture}, {what}" for fixture in ("f1", "f1_relu_gqa", "recall", "stories")
        for what in ("compressed prompt", "token by token", "token by token, speed on a CPU")
    )  # fmt: skip
