"""Numbers as people read them, and the table of an experiment that brings none."""

import math

import polars as pl
import pytest

from experiments.lab import Measured, standard_error
from experiments.lab.formatting import cell, duration, interval, number, summary


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.80249, "0.8025"), (1234.5, "1234"), (123456.7, "123,457"), (1e12, "1e+12"), (-1.5e-7, "-1.5e-07"),
        (9999, "9999"), (10_000, "10,000"), (-2_000_000, "-2,000,000"), (0, "0"), (0.0, "0"),
        (math.nan, "NaN"), (math.inf, "∞"), (-math.inf, "-∞"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (True, "yes"), (False, "no"), (0.25, "0.25"), (3, "3"), ("robe", "robe")]
)
def test_cells(value, text):
    assert cell(value) == text


def test_intervals_carry_their_unit():
    assert interval(Measured(0.5, 0.25, 1), "bits") == "0.5 [0.25, 1] bits"
    assert interval(Measured(0.5, 0.25, 1)) == "0.5 [0.25, 1]"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_summary_is_a_line_a_setting():
    aucs = [0.70, 0.75, 0.80]
    rows = pl.DataFrame(
        [
            {"method": "robe", "bits": None, "seed": s, "auc": auc, "fits": s > 0, "note": "x", "_seconds": 1.0}
            for s, auc in enumerate(aucs)
        ]
        + [{"method": "dense", "bits": 32, "seed": 0, "auc": math.nan, "fits": None, "note": "y", "_seconds": 1.0}]
    )
    assert summary(rows, ("method", "bits", "seed")).to_dicts() == [
        {
            "method": "robe",
            "bits": None,
            "seeds": 3,
            "auc": f"0.75 ± {standard_error(aucs):.2g}",
            "fits": "0.6667 ± 0.33",
        },
        {"method": "dense", "bits": 32, "seeds": 1, "auc": "NaN", "fits": "–"},
    ]


def test_summary_of_a_run_without_settings():
    rows = pl.DataFrame({"seed": [0, 1], "loss": [1, 3]})
    assert summary(rows, ("seed",)).to_dicts() == [{"seeds": 2, "loss": "2 ± 1"}]
    assert summary(pl.DataFrame(), ("seed",)).is_empty()
