"""Retrieval: a run at the smallest scale, its tasks and cells, and claims that read the right rows."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from experiments.data.counter import stream
from experiments.kvcache import recall, retrieval, retrieval_cells
from experiments.kvcache.contenders import contender
from experiments.kvcache.retrieval_cells import DEPTHS, Cell, Config, cells, last_place, layout_of, setting, tasks
from experiments.lab import figures
from experiments.lab.claims import judge
from hashml.kvcache.snap_kv import SnapKV

EXPERIMENT = "kvcache.retrieval"
DEFAULT = Config()


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    assert rows["accuracy"].is_between(0, 1).all()
    recalled = rows.filter(pl.col("part") != "aggregation")
    mean = (recalled["rehearsed"] + recalled["unrehearsed"]) / 2
    np.testing.assert_allclose(recalled["accuracy"], mean, atol=1e-12)
    (kept,) = rows.filter(pl.col("part") == "grid", pl.col("method") == "window")["tokens_kept"]
    assert kept == 41 + 6
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.note
    assert found.table is not None
    assert isinstance(found.table(rows), pl.DataFrame)
    assert figures.describe(figures.draw(found.figure, rows))


# --- tasks and cells ----------------------------------------------------------------------------------


def test_depths_part_the_final_questions_by_the_place_of_their_pair():
    """Read back by a loop, at both lengths."""
    config = Config(questions=160)
    for length, last in ((96, 35), (256, 143)):
        (task,) = tasks(config, "grid", length)
        assert task.tokens.shape == (160 // layout_of(length).pairs, length)
        ends = [last_place(length, part) for part in range(DEPTHS + 1)][1:]
        assert ends[-1] == last + 1
        assert len({end - before for before, end in zip([0, *ends], ends, strict=False)}) == 1
        kinds = ("rehearsed", "unrehearsed")
        parts = {(kind, part): task.places[f"{kind}_{part}"] for kind in kinds for part in range(1, DEPTHS + 1)}
        for row, column in zip(*np.nonzero(task.places["accuracy"]), strict=True):
            kind = "rehearsed" if task.places["rehearsed"][row, column] else "unrehearsed"
            place = int(np.flatnonzero(task.tokens[row] == task.tokens[row, column])[0])
            part = 1 + sum(place > end for end in ends)
            assert [name for name, where in parts.items() if where[row, column]] == [(kind, part)]
        assert sum(where.sum() for where in parts.values()) == 160


def test_prompts_end_with_their_questions_or_with_filler():
    aware, agnostic = tasks(Config(questions=80), "prompt", 96)
    cell = Cell("prompt", 96, "snapkv", 2)
    common = setting(DEFAULT, cell)
    observed = range(common.prompt - 8, common.prompt)
    assert observed[-1] == 77
    asked = aware.tokens[:, list(observed)]
    assert ((asked[:, ::2] >= 1) & (asked[:, ::2] <= 20)).all()
    assert (asked[:, 1::2] == recall.BLANK).all()
    unasked = agnostic.tokens[:, list(observed)]
    assert ((unasked >= 41) & (unasked <= 61)).all()
    same = np.ones(96, bool)
    same[list(observed)] = False
    np.testing.assert_array_equal(aware.tokens[:, same], agnostic.tokens[:, same])
    assert (agnostic.targets[:, : common.prompt] == -1).all()
    for row, keys in enumerate(asked[:, ::2]):
        final = aware.tokens[row, aware.places["rehearsed"][row]]
        assert set(final) == set(keys)
    (layer, _) = contender("snapkv", common, 4)
    assert layer.policy == SnapKV(queries=8)
    # Beside the window there are slots for the prompt, and nothing is dropped after it.
    assert layer.prompt_slots == 10
    assert layer.slots == 10 + 96 - common.prompt


def test_the_cells_are_those_of_the_protocol():
    found = cells(DEFAULT)
    assert len(set(found)) == len(found)
    for part, length, budgets in (("grid", 96, {2, 3, 4, 8}), ("grid", 256, {2, 3, 4, 8}), ("prompt", 96, {2, 3, 4}),
                                  ("aggregation", 96, {2, 3, 4, 8})):  # fmt: skip
        chosen = [cell for cell in found if (cell.part, cell.length) == (part, length)]
        assert {cell.budget for cell in chosen if cell.method == "random"} == budgets
        assert {cell.budget for cell in chosen if cell.method == "full"} == {None}
    long = setting(DEFAULT, Cell("grid", 256, "window", 2))
    assert (long.window, long.queries, long.tokens, long.decoder.context) == (16, 42, 256, 256)
    short = setting(DEFAULT, Cell("grid", 96, "window", 2))
    assert (short.window, short.queries) == (6, 16)
    with pytest.raises(ValueError, match="length is 128; the recall task has models for 96, 256"):
        tasks(Config(lengths=(128,)), "grid", 128)


def test_codebooks_are_learned_from_sequences_that_are_not_scored():
    config = Config(calibration=4, questions=64)
    (task,) = tasks(config, "grid", 96)
    for seed in (0, 1):
        text = retrieval_cells.calibration_text(config, "grid", 96, seed)
        np.testing.assert_array_equal(text, recall.sequences(4, stream(seed, "recall", "calibration")).tokens)
        assert not (text[:, None] == task.tokens).all(axis=2).any()


# --- claims -------------------------------------------------------------------------------------------

BUDGETS = (2, 3, 4, 8)
SCORED = ("h2o", "keyformer", "corm", "scissorhands_1")


def row(part: str, length: int, method: str, budget: int | None, seed: int, **shares: float) -> dict[str, Any]:
    given = {f"{kind}_{part}": None for kind in retrieval_cells.KINDS for part in range(1, DEPTHS + 1)}
    return {"part": part, "length": length, "method": method, "budget": budget, "condition": None, "seed": seed,
            "rehearsed": None, "unrehearsed": None, "bytes_per_token": 1.0, "tokens_kept": length / (budget or 1),
            **given, **shares}  # fmt: skip


def made_up() -> pl.DataFrame:
    """Accuracies by hand; seeds add nothing but to H2O, 0.01 each."""
    rows = []
    base = {"window": 0.1, "random": 0.5, "h2o": 0.9, "keyformer": 0.8, "corm": 0.7, "scissorhands_1": 0.6}
    for seed in range(3):
        for length in (96, 256):
            for method, accuracy in (("full", 1.0), ("coupled:8c8b", 0.99 if length == 96 else 0.97)):
                rows.append(row("grid", length, method, None, seed, accuracy=accuracy))
            for budget in BUDGETS:
                for method, at_half in base.items():
                    accuracy = at_half - 0.02 * (budget - 2) + 0.01 * seed * (method == "h2o")
                    by_depth = {f"{kind}_{part}": accuracy for kind in retrieval_cells.KINDS for part in range(1, 7)}
                    if method == "window":
                        # Guesses; the newest part is in reach at a half.
                        by_depth = {name: 0.05 for name in by_depth}
                        by_depth |= {"unrehearsed_1": 0.07, "rehearsed_6": 0.95, "unrehearsed_6": 0.85}
                    if method == "corm":
                        by_depth |= {"rehearsed_6": accuracy + 0.3, "unrehearsed_6": accuracy + 0.1}
                    shares = {"accuracy": accuracy, "rehearsed": accuracy + 0.01 * budget, "unrehearsed": accuracy}
                    rows.append(row("grid", length, method, budget, seed, **shares, **by_depth))
        for method, accuracy in (("full", 0.9), ("coupled:8c8b", 0.89)):
            rows.append(row("aggregation", 96, method, None, seed, accuracy=accuracy))
        counted = {"window": 0.5, "streaming": 0.52, "random": 0.4, "h2o": 0.5, "keyformer": 0.48, "corm": 0.3,
                   "scissorhands_1": 0.2}  # fmt: skip
        for budget in BUDGETS:
            rows += [row("aggregation", 96, m, budget, seed, accuracy=a) for m, a in counted.items()]
        for budget in (2, 3, 4):
            for condition in ("aware", "agnostic"):
                aware = condition == "aware"
                for method, told, untold in (
                    ("snapkv", 0.96 if aware else 0.6, 0.5 if aware else 0.61),
                    ("random", 0.5 if aware else 0.49, 0.5),
                    ("window", 0.5 if aware else 0.1, 0.1),
                    ("h2o", 0.9, 0.8),
                ):
                    one = row("prompt", 96, method, budget, seed, rehearsed=told, unrehearsed=untold,
                              accuracy=(told + untold) / 2)  # fmt: skip
                    rows.append(one | {"condition": condition})
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    rows = made_up()
    expected = {
        "exact": (1.0, True),
        # Reach of 12 of 96 tokens ends at 68, beyond all pairs; then five guesses, one .07, and .85.
        "window-reach": ((4 * 0.05 + 0.07 + 0.85) / 6, False),
        "scored-random": (0.1, True),
        "h2o-random": (0.41, True),
        "window-depth": (0.9 - 0.06, True),
        "other-depth": (0.2, False),
        "rehearsed": (0.02, True),
        "coupled-exact": (-0.03, False),
        "coupled-quarter": (0.97 - (0.9 - 0.04 + 0.01), True),
        "aware": (0.36, True),
        "aware-control": (-0.04, False),
        "aware-half": (0.96, True),
        "agnostic-random": (0.605 - 0.495, True),
        "second-turn": (0.46, True),
        "second-turn-cost": (-0.11, True),
        "counting-exact": (0.9, False),
        "counting-streaming": (0.02, True),
        "counting-window": (0.0, True),
        "counting-random": (-0.1, False),
        "needle-tuned": (0.3 - 0.08, True),
    }
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in retrieval.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert verdicts["other-depth"].note == "corm, 96 tokens"
    assert verdicts["counting-random"].note == "worst: random against h2o, 96 tokens, 1/2"


def test_a_window_is_judged_where_it_does_not_reach():
    """At half of the bytes it sees the newest part of the places, whose answers then do not count."""
    rows = made_up()
    claim = next(claim for claim in retrieval.CLAIMS if claim.id == "window-reach")
    missing = rows.filter((pl.col("budget") != 8) | (pl.col("method") != "window"))
    assert judge(claim, missing, scale="default", complete=True).verdict == "not judged"
    kept = pl.when(pl.col("method") == "window").then(pl.col("length") / 2).otherwise(pl.col("tokens_kept"))
    measured = judge(claim, rows.with_columns(tokens_kept=kept), scale="default", complete=True).measured
    assert measured is not None
    # 48 of 96 tokens leave the five parts that end by place 30, 128 of 256 the three that end by 72.
    assert measured.value == pytest.approx(max((4 * 0.05 + 0.07) / 5, (2 * 0.05 + 0.07) / 3))


def test_the_figure_has_a_map_for_each_policy_and_panels_below():
    drawn = figures.draw(retrieval.figure, made_up())
    described = figures.describe(drawn)
    for method in ("window", "random", *SCORED):
        assert method in described
    assert "prompt: pairs it asked for" in described
    assert "counting, token by token" in described
    assert "lines:" in described
