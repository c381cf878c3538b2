"""What the claims of `experiments.kvcache.retrieval` measure: means over models, of the worst of several cells."""

import dataclasses
import itertools

import polars as pl

from experiments.kvcache.retrieval_cells import CONDITIONS, DEPTHS, KINDS, last_place, layout_of
from experiments.lab import Measured, NotEnoughRows, highest, lowest, mean_interval

SCORED = ("h2o", "keyformer", "corm", "scissorhands_1")
"""Policies that score by attention."""
BUDGETS, PROMPT_BUDGETS = (2, 3, 4, 8), (2, 3, 4)
LENGTHS = (96, 256)
GUESS = 0.1
"""Twice what one of 20 values, guessed, answers."""


def _values(
    rows: pl.DataFrame,
    part: str,
    length: int,
    method: str,
    budget: int | None = None,
    condition: str | None = None,
    metric: str = "accuracy",
) -> pl.Series:
    """A column of one cache, by model."""
    found = rows.filter(
        pl.col("part") == part,
        pl.col("length") == length,
        pl.col("method") == method,
        pl.col("budget").eq_missing(budget),
        pl.col("condition").eq_missing(condition),
    )
    if found.is_empty():
        raise NotEnoughRows(f"no rows of {part} at {length} tokens with {method} at budget {budget}")
    return found.sort("seed")[metric]


def _mean(values: pl.Series, note: str) -> Measured:
    return dataclasses.replace(mean_interval(values, "models"), note=note)


def exact(rows: pl.DataFrame, part: str) -> Measured:
    """Accuracy of the exact cache, at the length where it is least."""
    lengths = LENGTHS if part == "grid" else (96,)
    return lowest(_mean(_values(rows, part, length, "full"), f"worst: {length} tokens") for length in lengths)


def beyond_reach(rows: pl.DataFrame) -> Measured:
    """Accuracy of a window on pairs that the first question no longer sees, where it is largest."""
    found = []
    for length in LENGTHS:
        for budget in BUDGETS:
            kept = _values(rows, "grid", length, "window", budget, metric="tokens_kept").to_numpy()
            reach = layout_of(length).questions - kept.min()
            deep = [part for part in range(1, DEPTHS + 1) if last_place(length, part) < reach]
            columns = [_values(rows, "grid", length, "window", budget, metric=f"unrehearsed_{part}") for part in deep]
            if columns:
                values = pl.select(pl.mean_horizontal(columns)).to_series()
                found.append(_mean(values, f"most: {length} tokens, 1/{budget}"))
    return highest(found)


def over(
    rows: pl.DataFrame, methods: tuple[str, ...], rivals: tuple[str, ...], budgets: tuple[int, ...], part: str
) -> Measured:
    """Accuracy of methods over that of rivals in equal bytes, where it stands worst."""
    found = []
    lengths = LENGTHS if part == "grid" else (96,)
    for length, budget, method, rival in itertools.product(lengths, budgets, methods, rivals):
        lead = _values(rows, part, length, method, budget) - _values(rows, part, length, rival, budget)
        found.append(_mean(lead, f"worst: {method} against {rival}, {length} tokens, 1/{budget}"))
    return lowest(found)


def newest_part(rows: pl.DataFrame, length: int, method: str) -> Measured:
    """Accuracy at the newest part of the places less that at the oldest, at half of the bytes."""
    ends = []
    for part in (DEPTHS, 1):
        kinds = [_values(rows, "grid", length, method, 2, metric=f"{kind}_{part}") for kind in KINDS]
        ends.append((kinds[0] + kinds[1]) / 2)
    return _mean(ends[0] - ends[1], f"{method}, {length} tokens")


def window_depth(rows: pl.DataFrame) -> Measured:
    return lowest(newest_part(rows, length, "window") for length in LENGTHS)


def other_depth(rows: pl.DataFrame) -> Measured:
    return highest(newest_part(rows, length, method) for length in LENGTHS for method in ("random", *SCORED))


def rehearsal(rows: pl.DataFrame, method: str, budgets: tuple[int, ...]) -> Measured:
    """Accuracy of rehearsed pairs less that of the others, where it is least."""
    found = []
    for length in LENGTHS:
        for budget in budgets:
            sides = [_values(rows, "grid", length, method, budget, metric=kind) for kind in KINDS]
            found.append(_mean(sides[0] - sides[1], f"worst: {length} tokens, 1/{budget}"))
    return lowest(found)


def all_tokens(rows: pl.DataFrame) -> Measured:
    """Accuracy of CQ-8c8b less that of the exact cache, on the task where it loses most."""
    found = []
    for part, length in (("grid", 96), ("grid", 256), ("aggregation", 96)):
        sides = [_values(rows, part, length, method) for method in ("coupled:8c8b", "full")]
        found.append(_mean(sides[0] - sides[1], f"worst: {part}, {length} tokens"))
    return lowest(found)


def coupled_over(rows: pl.DataFrame) -> Measured:
    """Accuracy of CQ-8c8b less that of a policy with a quarter of the bytes, where it stands worst."""
    found = []
    for length in LENGTHS:
        coded = _values(rows, "grid", length, "coupled:8c8b")
        for method in ("random", *SCORED):
            lead = coded - _values(rows, "grid", length, method, 4)
            found.append(_mean(lead, f"worst: against {method}, {length} tokens"))
    return lowest(found)


def gain(rows: pl.DataFrame, method: str, budget: int, metric: str = "rehearsed") -> pl.Series:
    """Accuracy with the questions in the prompt less that without them."""
    sides = [_values(rows, "prompt", 96, method, budget, condition, metric) for condition in CONDITIONS]
    return sides[0] - sides[1]


def aware_gain(rows: pl.DataFrame) -> Measured:
    return lowest(_mean(gain(rows, "snapkv", budget), f"worst: 1/{budget}") for budget in PROMPT_BUDGETS)


def aware_gain_over(rows: pl.DataFrame) -> Measured:
    """SnapKV's gain less that of a control, which has the questions among its newest tokens too."""
    found = []
    for budget in PROMPT_BUDGETS:
        for control in ("random", "window"):
            lead = gain(rows, "snapkv", budget) - gain(rows, control, budget)
            found.append(_mean(lead, f"worst: against {control}, 1/{budget}"))
    return lowest(found)


def aware_half(rows: pl.DataFrame) -> Measured:
    return mean_interval(_values(rows, "prompt", 96, "snapkv", 2, "aware", "rehearsed"), "models")


def agnostic_over(rows: pl.DataFrame) -> Measured:
    """All questions: none was in the prompt."""
    found = []
    for budget in PROMPT_BUDGETS:
        sides = [_values(rows, "prompt", 96, method, budget, "agnostic") for method in ("snapkv", "random")]
        found.append(_mean(sides[0] - sides[1], f"worst: 1/{budget}"))
    return lowest(found)


def second_turn(rows: pl.DataFrame) -> Measured:
    """Accuracy of pairs that the prompt asked for less that of the others."""
    found = []
    for budget in PROMPT_BUDGETS:
        sides = [_values(rows, "prompt", 96, "snapkv", budget, "aware", kind) for kind in KINDS]
        found.append(_mean(sides[0] - sides[1], f"worst: 1/{budget}"))
    return lowest(found)


def second_turn_cost(rows: pl.DataFrame) -> Measured:
    return highest(
        _mean(gain(rows, "snapkv", budget, "unrehearsed"), f"most: 1/{budget}") for budget in PROMPT_BUDGETS
    )


def needle_tuned(rows: pl.DataFrame) -> Measured:
    """A policy's lead over random eviction on the recall task less that on counting, at half of the bytes."""
    found = []
    for method in SCORED:
        leads = [
            _values(rows, part, 96, method, 2) - _values(rows, part, 96, "random", 2)
            for part in ("grid", "aggregation")
        ]
        found.append(_mean(leads[0] - leads[1], f"worst: {method}"))
    return lowest(found)
