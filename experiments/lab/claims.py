"""A claim is a sentence of a paper, a number measured from rows, and a predicate on that number."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import polars as pl

from experiments.lab.errors import NotEnoughRows
from experiments.lab.trial import Number

Verdict = Literal["holds", "fails", "not judged"]


@dataclass(frozen=True)
class Measured:
    """A number and its 95% interval."""

    value: Number
    low: Number
    high: Number
    note: str = ""
    """What the reader should know beside the number, such as the number of pairs."""

    def __post_init__(self) -> None:
        bounds = (self.value, self.low, self.high)
        if not any(map(math.isnan, bounds)) and not self.low <= self.value <= self.high:
            raise ValueError(f"low <= value <= high must hold, got {self.low}, {self.value}, {self.high}")


def _first(cells: Iterable[Measured], key: Callable[[Measured], Number]) -> Measured:
    """The cell with the smallest key; one that is NaN, which says that something is amiss, before all others."""
    found = list(cells)
    if not found:
        raise NotEnoughRows("no rows of any setting that the claim speaks of")
    broken = [cell for cell in found if any(map(math.isnan, (cell.value, cell.low, cell.high)))]
    return broken[0] if broken else min(found, key=key)


def lowest(cells: Iterable[Measured]) -> Measured:
    """The cell whose interval reaches lowest: what a claim must be judged by that puts every cell above a bound.

    The cell with the lowest *value* would not do: the interval of another one, less certain, may cross the
    bound that this one keeps. NaN comes before every number, so that a setting that failed is not passed over.

    Raises:
        NotEnoughRows: for no cell.
    """
    return _first(cells, lambda cell: cell.low)


def highest(cells: Iterable[Measured]) -> Measured:
    """The cell whose interval reaches highest, for a claim that puts every cell below a bound; see `lowest`."""
    return _first(cells, lambda cell: -cell.high)


def furthest(cells: Iterable[Measured]) -> Measured:
    """The cell whose interval reaches furthest from 0, for a claim that every cell is near it; see `lowest`."""
    return _first(cells, lambda cell: -max(abs(cell.low), abs(cell.high)))


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper that rows can bear out or not."""

    id: str
    """Short and unique in the experiment; it stays when the text is reworded."""
    text: str
    """The sentence, made precise enough to be wrong."""
    paper: str
    """The paper's own number, as it prints it: ``"AUC 0.8025 at 1000x on CriteoTB"``."""
    measure: Callable[[pl.DataFrame], Measured]
    """Our number from the rows of a run; raises `NotEnoughRows` where they cannot give it."""
    holds: Callable[[Measured], bool]
    """The predicate; it looks at the interval where the claim is an inequality."""
    source: str = "abstract"
    """Where the paper says so: ``"abstract"``, ``"table 3"``."""
    unit: str = ""


@dataclass(frozen=True)
class Judgement:
    """What a run says about a claim."""

    claim: Claim
    measured: Measured | None
    verdict: Verdict
    note: str
    """Why it is not judged, or the measured number's own note."""


def judge(claim: Claim, rows: pl.DataFrame, *, scale: str, complete: bool) -> Judgement:
    """Measure the claim and say whether it holds.

    It is not judged where the run is not complete, at scale ``tiny`` (seconds of work say nothing of a
    paper; the number is shown all the same), where ``measure`` raises `NotEnoughRows`, and where the
    number or a bound of its interval is NaN.
    """
    if rows.is_empty():
        return Judgement(claim, None, "not judged", "no rows")
    if not complete:
        return Judgement(claim, None, "not judged", "the run is not complete")
    try:
        measured = claim.measure(rows)
    except NotEnoughRows as reason:
        return Judgement(claim, None, "not judged", str(reason))
    if any(map(math.isnan, (measured.value, measured.low, measured.high))):
        return Judgement(claim, measured, "not judged", measured.note or "the measured number is NaN")
    if scale == "tiny":
        return Judgement(claim, measured, "not judged", "scale tiny is too small to judge")
    return Judgement(claim, measured, "holds" if claim.holds(measured) else "fails", measured.note)
