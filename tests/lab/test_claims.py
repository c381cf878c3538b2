"""When a claim is judged, and when it is not."""

import math

import polars as pl
import pytest

from experiments.lab import Claim, Measured, NotEnoughRows, furthest, highest, lowest
from experiments.lab.claims import judge

ROWS = pl.DataFrame({"auc": [0.7, 0.8]})


def claim(measured):
    return Claim("id", "the mean is large", "0.8", lambda rows: measured, lambda m: m.low > 0.5)


@pytest.mark.parametrize(("low", "verdict"), [(0.6, "holds"), (0.4, "fails")])
def test_the_interval_decides(low, verdict):
    judgement = judge(claim(Measured(0.75, low, 0.9, "2 pairs")), ROWS, scale="default", complete=True)
    assert (judgement.verdict, judgement.note) == (verdict, "2 pairs")


def test_tiny_is_measured_and_not_judged():
    judgement = judge(claim(Measured(0.75, 0.6, 0.9)), ROWS, scale="tiny", complete=True)
    assert judgement.verdict == "not judged"
    assert judgement.measured == Measured(0.75, 0.6, 0.9)


@pytest.mark.parametrize(("value", "low", "high"), [(math.nan, 0.6, 0.9), (0.7, math.nan, 0.9), (0.7, 0.6, math.nan)])
def test_nan_is_not_judged(value, low, high):
    judgement = judge(claim(Measured(value, low, high, "a seed diverged")), ROWS, scale="default", complete=True)
    assert (judgement.verdict, judgement.note) == ("not judged", "a seed diverged")


@pytest.mark.parametrize(
    ("rows", "complete", "note"), [(ROWS, False, "the run is not complete"), (ROWS.clear(), True, "no rows")]
)
def test_without_the_rows_nothing_is_measured(rows, complete, note):
    judgement = judge(claim(Measured(0.75, 0.6, 0.9)), rows, scale="default", complete=complete)
    assert (judgement.measured, judgement.verdict, judgement.note) == (None, "not judged", note)


def test_a_measure_may_find_too_few_rows():
    def measure(rows):
        raise NotEnoughRows("1 of 2 pairs")

    judgement = judge(Claim("id", "", "", measure, bool), ROWS, scale="default", complete=True)
    assert (judgement.measured, judgement.verdict, judgement.note) == (None, "not judged", "1 of 2 pairs")


def test_an_interval_holds_its_value():
    with pytest.raises(ValueError, match="low <= value <= high must hold, got 0.8, 0.7, 0.9"):
        Measured(0.7, 0.8, 0.9)


def test_of_several_cells_the_one_whose_bound_is_worst_is_judged():
    certain, unsure = Measured(0.1, 0.09, 0.11), Measured(0.3, -0.2, 0.8)
    assert lowest([certain, unsure]) is unsure  # though its value is the higher
    assert highest([unsure, Measured(0.4, 0.39, 0.41)]) is unsure
    assert furthest([Measured(-0.2, -0.9, 0.5), unsure]).value == -0.2
    assert lowest([certain, certain]) is certain


def test_a_cell_that_is_nan_is_not_passed_over():
    broken, bounded = Measured(math.nan, math.nan, math.nan), Measured(-1.0, -2.0, 1.0)
    for choose in (lowest, highest, furthest):
        for cells in ([broken, bounded], [bounded, broken]):
            assert choose(cells) is broken
        with pytest.raises(NotEnoughRows):
            choose([])
