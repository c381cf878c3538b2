"""Intervals over seeds and pairs, the area under the ROC curve, and the choice of a learning rate.

Methods that are compared share their seeds (the same data, split and initialisation), so the interval is
one of the differences and not of each method by itself. Intervals are two-sided, at 95%.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
import scipy.special
from jax import Array
from jaxtyping import Bool, Float, Num

from experiments.lab.claims import Measured
from experiments.lab.errors import NotEnoughRows
from experiments.lab.trial import Number

LEVEL = 0.95
"""Coverage of every interval in the reports."""

Values = Sequence[Number | None] | Num[np.ndarray | Array, " n"] | pl.Series
Labels = Values | Bool[np.ndarray | Array, " n"]


def _numbers(values: Values, at_least: int, noun: str = "values") -> Float[np.ndarray, " n"]:
    """The values as float64 (a null is NaN); raises `NotEnoughRows` where there are too few."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size < at_least:
        raise NotEnoughRows(f"{numbers.size} {noun}, of at least {at_least}")
    return numbers


def standard_error(values: Values) -> float:
    """Standard error of the mean, from the sample's standard deviation with ``n - 1``."""
    numbers = _numbers(values, at_least=2)
    return float(numbers.std(ddof=1) / np.sqrt(numbers.size))


def mean_interval(values: Values, noun: str = "values") -> Measured:
    """Mean with Student's t interval; NaN or an infinity among the values makes it NaN, and the note says so.

    Args:
        values: one number a seed, or a pair.
        noun: what they are, for the note: ``"5 values"``.

    Raises:
        NotEnoughRows: for fewer than 2 values.
    """
    numbers = _numbers(values, 2, noun)
    lost = int((~np.isfinite(numbers)).sum())
    if lost:
        return Measured(np.nan, np.nan, np.nan, f"{lost} of {numbers.size} {noun} are not finite")
    mean = float(numbers.mean())
    half = float(scipy.special.stdtrit(numbers.size - 1, (1 + LEVEL) / 2)) * standard_error(numbers)
    return Measured(mean, mean - half, mean + half, f"{numbers.size} {noun}")


def median_interval(values: Values, noun: str = "values") -> Measured:
    """Median with the interval between two order statistics, which assumes no distribution.

    The interval is the narrowest pair of mirrored order statistics that covers the median with at least
    95%: with ``B ~ Binomial(n, 1/2)``, the ``k``-th smallest and largest for the largest ``k`` with
    ``2 P(B < k) <= 5%``. NaN among the values makes it NaN.

    Raises:
        NotEnoughRows: for fewer than 6 values, whose extremes cover the median with less than 95%.
    """
    numbers = np.sort(_numbers(values, 6, noun))
    lost = int(np.isnan(numbers).sum())
    if lost:
        return Measured(np.nan, np.nan, np.nan, f"{lost} of {numbers.size} {noun} are NaN")
    below = scipy.special.bdtr(np.arange(numbers.size), numbers.size, 0.5)  # P(B < k) for k = 1, 2, ...
    k = int((2 * below <= 1 - LEVEL).sum())
    low, high = float(numbers[k - 1]), float(numbers[-k])
    return Measured(float(np.median(numbers)), low, high, f"{numbers.size} {noun}")


def _pairs(
    rows: pl.DataFrame, a: str, b: str, metric: str, on: str | Sequence[str], by: str
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The metric of ``a`` and of ``b``, paired on the columns ``on``."""
    columns = [on] if isinstance(on, str) else list(on)
    absent = [name for name in (by, metric, *columns) if name not in rows.columns]
    if absent:
        raise ValueError(f"no column {absent[0]!r} in the rows; there are {', '.join(rows.columns)}")
    sides: dict[str, pl.DataFrame] = {}
    for name in (a, b):
        side = rows.filter(pl.col(by) == name).select(*columns, metric)
        repeated = side.filter(side.select(columns).is_duplicated())
        if not repeated.is_empty():
            example = repeated.select(columns).row(0, named=True)
            raise ValueError(f"on={columns} does not identify the rows of {by} {name!r}: {example} repeats")
        sides[name] = side
        if side.is_empty():
            raise NotEnoughRows(f"no rows of {by} {name!r}")
    paired = sides[a].join(sides[b], on=columns, how="inner", suffix="_b", nulls_equal=True)
    alone = len(sides[a]) + len(sides[b]) - 2 * len(paired)
    if alone:
        raise ValueError(f"{alone} rows of {by} {a!r} and {b!r} have no partner on {columns}")
    first, second = (paired[name].cast(pl.Float64).to_numpy() for name in (metric, f"{metric}_b"))
    return first, second


def paired_difference(
    rows: pl.DataFrame, a: str, b: str, metric: str, on: str | Sequence[str], by: str = "method"
) -> Measured:
    """Mean of ``metric`` of ``a`` minus that of ``b`` over pairs, with Student's t interval.

    Args:
        rows: the rows of a run, filtered to what the claim is about.
        a: value of the column ``by`` whose metric counts positively.
        b: value of the column ``by`` that is subtracted.
        metric: column of the numbers.
        on: the columns that make two rows a pair, such as ``"seed"`` or ``["data", "seed"]``. The pairs
            are taken as independent.
        by: column that tells the methods apart.

    Raises:
        NotEnoughRows: for fewer than 2 pairs.
        ValueError: where ``on`` does not identify the rows of a method, or a row has no partner.
    """
    first, second = _pairs(rows, a, b, metric, on, by)
    return mean_interval(first - second, "pairs")


def ratio_interval(
    rows: pl.DataFrame, a: str, b: str, metric: str, on: str | Sequence[str], by: str = "method"
) -> Measured:
    """Median of ``metric`` of ``a`` over that of ``b`` over pairs, as `median_interval`; for timings.

    Arguments and errors are those of `paired_difference`, but at least 6 pairs are needed.
    """
    first, second = _pairs(rows, a, b, metric, on, by)
    with np.errstate(divide="ignore", invalid="ignore"):
        return median_interval(first / second, "pairs")


def select_best(
    rows: pl.DataFrame,
    by: Sequence[str],
    over: str = "learning_rate",
    metric: str = "validation_auc",
    seed: str = "seed",
    maximize: bool = True,
) -> pl.DataFrame:
    """For each group of ``by``, the rows of the setting ``over`` with the best mean ``metric`` over seeds.

    The choice looks at ``metric`` alone, a validation number; the test number of the rows that remain has
    not been selected on. A setting of which a seed is NaN (it diverged) is the worst; between equals the
    smallest setting is taken.

    Raises:
        NotEnoughRows: where the settings of a group do not have the same seeds.
    """
    settings = rows.group_by([*by, over], maintain_order=True).agg(
        pl.col(metric).cast(pl.Float64).fill_null(float("nan")).mean().alias("__mean"),
        pl.col(seed).sort().alias("__seeds"),
    )
    uneven = settings.group_by(by).agg(pl.col("__seeds").n_unique() > 1).filter(pl.col("__seeds"))
    if not uneven.is_empty():
        group = uneven.select(by).row(0, named=True)
        raise NotEnoughRows(f"the values of {over} in {group} do not have the same seeds")
    worst = float("-inf") if maximize else float("inf")
    best = (
        settings.with_columns(pl.col("__mean").fill_nan(worst))
        .sort(["__mean", over], descending=[maximize, False])
        .group_by(by, maintain_order=True)
        .first()
        .select(*by, over)
    )
    return rows.join(best, on=[*by, over], how="semi", nulls_equal=True, maintain_order="left")


def _split(labels: Labels, *scores: Values) -> tuple[Bool[np.ndarray, " n"], list[Float[np.ndarray, " n"]]]:
    """Labels as booleans, scores as float64; checked."""
    positive = np.asarray(labels)
    if not np.isin(positive, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(positive)[:5]}")
    positive = positive.astype(bool)
    if positive.all() or not positive.any():
        raise ValueError(f"labels must have both classes, got {positive.sum()} ones of {positive.size}")
    numbers = [np.asarray(score, dtype=np.float64) for score in scores]
    for score in numbers:
        if score.shape != positive.shape:
            raise ValueError(f"scores must have the shape {positive.shape} of labels, got {score.shape}")
    return positive, numbers


def _midranks(scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks from 1, equal scores sharing the mean of theirs."""
    _, where, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def auc(labels: Labels, scores: Values) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    NaN among the scores gives NaN.

    Raises:
        ValueError: for labels other than 0 and 1, of one class alone, or of another length than scores.
    """
    positive, (numbers,) = _split(labels, scores)
    if np.isnan(numbers).any():
        return float("nan")
    ranks = _midranks(numbers)
    n = int(positive.sum())
    wins = ranks[positive].sum() - n * (n + 1) / 2
    return float(wins / (n * (positive.size - n)))


class AucDifference(NamedTuple):
    """Difference of two areas under the curve, and its standard error over examples."""

    value: float
    standard_error: float


def delong(labels: Labels, scores_a: Values, scores_b: Values) -> AucDifference:
    """AUC of ``a`` minus AUC of ``b`` on the same examples, by the placements of DeLong et al. (1988).

    A positive's placement is the share of negatives below it (ties half), a negative's the share of
    positives above it; the variance of the difference is the sum over both classes of the variance of the
    differences of placements over the class size. Midranks give the placements in ``n log n`` (Sun and
    Xu, 2014). The error is that of drawing other test examples, with both models as they are. NaN among
    the scores gives NaN.

    Raises:
        ValueError: as `auc`, and for fewer than 2 examples of a class.
    """
    positive, (first, second) = _split(labels, scores_a, scores_b)
    n = int(positive.sum())
    m = positive.size - n
    if min(n, m) < 2:
        raise ValueError(f"labels must have at least 2 examples of each class, got {n} ones of {n + m}")

    def placements(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ranks = _midranks(scores)
        above = (ranks[positive] - _midranks(scores[positive])) / m
        below = 1 - (ranks[~positive] - _midranks(scores[~positive])) / n
        return above, below

    if np.isnan(first).any() or np.isnan(second).any():
        return AucDifference(float("nan"), float("nan"))
    (above_a, below_a), (above_b, below_b) = placements(first), placements(second)
    variance = (above_a - above_b).var(ddof=1) / n + (below_a - below_b).var(ddof=1) / m
    return AucDifference(float((above_a - above_b).mean()), float(np.sqrt(variance)))
