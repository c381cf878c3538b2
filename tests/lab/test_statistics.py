"""Intervals against SciPy, the area under the curve against scikit-learn, the rest against plain loops."""

import math

import numpy as np
import polars as pl
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from experiments.lab import (
    NotEnoughRows,
    auc,
    delong,
    mean_interval,
    median_interval,
    paired_difference,
    ratio_interval,
    select_best,
    standard_error,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_mean_interval_is_students(n):
    values = RNG.normal(3, 2, n)
    measured = mean_interval(values)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert measured.value == pytest.approx(values.mean())
    assert (measured.low, measured.high) == pytest.approx((expected.low, expected.high))
    assert standard_error(values) == pytest.approx(scipy.stats.sem(values))
    assert measured.note == f"{n} values"


def test_mean_interval_covers_the_mean_as_often_as_it_says():
    samples = np.random.default_rng(1).normal(1, 5, (2000, 4))
    covered = np.mean([m.low <= 1 <= m.high for m in map(mean_interval, samples)])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_mean_of_equal_values_has_no_width():
    measured = mean_interval([0.1, 0.1, 0.1])
    assert measured.low <= 0.1 <= measured.high
    assert measured.high - measured.low < 1e-15


@pytest.mark.parametrize("lost", [math.nan, math.inf, None])
def test_a_lost_value_makes_the_mean_nan_and_is_counted(lost):
    measured = mean_interval(pl.Series([1.0, lost, 2.0]))
    assert all(map(math.isnan, (measured.value, measured.low, measured.high)))
    assert measured.note == "1 of 3 values are not finite"


def test_too_few_values():
    with pytest.raises(NotEnoughRows, match="1 values, of at least 2"):
        mean_interval([1.0])
    with pytest.raises(NotEnoughRows, match="5 values, of at least 6"):
        median_interval([1.0] * 5)


@pytest.mark.parametrize("n", [6, 7, 8, 9, 20, 65, 300])
def test_median_interval_is_the_one_of_the_sign_test(n):
    values = RNG.exponential(size=n)
    measured = median_interval(values)
    assert measured.value == np.median(values)
    low, high = (np.searchsorted(np.sort(values), bound) for bound in (measured.low, measured.high))
    assert low == n - 1 - high  # mirrored
    # Outside the interval lies the median where at most `low` signs, or fewer, are of one kind.
    assert 2 * scipy.stats.binom.cdf(low, n, 0.5) <= 0.05 < 2 * scipy.stats.binom.cdf(low + 1, n, 0.5)
    # SciPy cuts the 5% in the same halves, but leaves a bound open that the sample cannot give.
    expected = scipy.stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    assert (measured.low, measured.high) == (expected.low, expected.high)


def test_median_of_a_lost_value_is_nan():
    measured = median_interval([math.nan, 1, 2, 3, 4, 5])
    assert math.isnan(measured.value)
    assert measured.note == "1 of 6 values are NaN"


def paired_rows(n=6, seed=0):
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=n)
    return pl.DataFrame(
        [
            {"method": method, "data": d, "seed": s, "auc": hard[s] + shift + 0.1 * rng.normal()}
            for method, shift in (("robe", 1.0), ("hash", 0.5))
            for d in ("x", "y")
            for s in range(n)
        ]
    )


def test_paired_difference_is_the_paired_t_test_in_any_order_of_rows():
    rows = paired_rows()
    measured = paired_difference(
        rows.sample(fraction=1, shuffle=True, seed=3), "robe", "hash", "auc", ["data", "seed"]
    )
    robe, hashed = (rows.filter(method=m)["auc"].to_numpy() for m in ("robe", "hash"))
    expected = scipy.stats.ttest_rel(robe, hashed).confidence_interval(0.95)
    assert measured.value == pytest.approx((robe - hashed).mean())
    assert (measured.low, measured.high) == pytest.approx((expected.low, expected.high))
    assert measured.note == "12 pairs"
    # The seeds' own spread is no part of it: the interval of two samples apart is wider.
    unpaired = scipy.stats.ttest_ind(robe, hashed).confidence_interval(0.95)
    assert measured.high - measured.low < unpaired.high - unpaired.low


def test_paired_difference_refuses_pairs_that_are_none():
    rows = paired_rows()
    with pytest.raises(ValueError, match=r"on=\['seed'\] does not identify the rows of method 'robe'"):
        paired_difference(rows, "robe", "hash", "auc", on="seed")
    alone = rows.filter((pl.col("method") == "robe") | (pl.col("seed") > 0))
    with pytest.raises(ValueError, match="2 rows of method 'robe' and 'hash' have no partner"):
        paired_difference(alone, "robe", "hash", "auc", on=["data", "seed"])
    with pytest.raises(ValueError, match="no column 'loss' in the rows; there are method, data, seed, auc"):
        paired_difference(rows, "robe", "hash", "loss", on="seed")


def test_paired_difference_of_too_little():
    rows = paired_rows(n=1).filter(data="x")
    with pytest.raises(NotEnoughRows, match="1 pairs, of at least 2"):
        paired_difference(rows, "robe", "hash", "auc", on="seed")
    with pytest.raises(NotEnoughRows, match="no rows of method 'dense'"):
        paired_difference(rows, "robe", "dense", "auc", on="seed")


def test_a_key_that_does_not_apply_pairs_with_itself():
    rows = paired_rows().with_columns(pl.lit(None).alias("bits"))
    measured = paired_difference(rows, "robe", "hash", "auc", on=["data", "seed", "bits"])
    assert measured.note == "12 pairs"


def test_ratio_interval_is_of_ratios_within_pairs():
    drift = [1.0, 10.0, 100.0, 3.0, 7.0, 50.0, 2.0]
    ratios = [2.0, 2.1, 1.9, 2.2, 1.8, 2.05, 1.95]
    rows = pl.DataFrame(
        [{"op": "xla", "turn": i, "s": d} for i, d in enumerate(drift)]
        + [{"op": "pallas", "turn": i, "s": d * r} for i, (d, r) in enumerate(zip(drift, ratios, strict=True))]
    )
    measured = ratio_interval(rows, "pallas", "xla", "s", on="turn", by="op")
    assert (measured.low, measured.value, measured.high) == pytest.approx((1.8, 2.0, 2.2))
    with pytest.raises(NotEnoughRows, match="5 pairs, of at least 6"):
        ratio_interval(rows.filter(pl.col("turn") < 5), "pallas", "xla", "s", on="turn", by="op")


def tuned_rows():
    validation = {
        ("robe", 0.1): [0.7, 0.8], ("robe", 0.3): [0.9, 0.7], ("robe", 1.0): [0.99, math.nan],
        ("hash", 0.1): [0.6, 0.6], ("hash", 0.3): [0.6, 0.6], ("hash", 1.0): [0.5, 0.5],
    }  # fmt: skip
    return pl.DataFrame(
        [
            {"method": m, "learning_rate": r, "seed": s, "validation_auc": v, "test_auc": 1 - v}
            for (m, r), values in validation.items()
            for s, v in enumerate(values)
        ]
    )


def test_select_best_takes_the_best_mean_of_validation():
    best = select_best(tuned_rows(), by=["method"])
    # 0.3 has the larger mean for robe, where 1.0 diverged once; hash is a tie, and takes the smallest.
    assert best.select("method", "learning_rate", "seed").rows() == [
        ("robe", 0.3, 0), ("robe", 0.3, 1), ("hash", 0.1, 0), ("hash", 0.1, 1),
    ]  # fmt: skip
    assert best.columns == tuned_rows().columns


def test_select_best_of_losses_takes_the_smallest():
    best = select_best(tuned_rows(), by=["method"], maximize=False)
    assert best.select("method", "learning_rate").unique(maintain_order=True).rows() == [
        ("robe", 0.1), ("hash", 1.0),
    ]  # fmt: skip


def test_select_best_does_not_look_at_the_test():
    rows = tuned_rows()
    other = rows.with_columns(test_auc=pl.Series(RNG.random(len(rows))))
    assert select_best(rows, ["method"]).drop("test_auc").equals(select_best(other, ["method"]).drop("test_auc"))


def test_select_best_needs_the_same_seeds_everywhere():
    with pytest.raises(NotEnoughRows, match=r"learning_rate in .*'robe'.* same seeds"):
        select_best(tuned_rows().slice(1), by=["method"])


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=40))
def test_auc_is_scikit_learns(examples):
    labels, scores = (np.array(column) for column in zip(*examples, strict=True))
    if labels.all() or not labels.any():
        with pytest.raises(ValueError, match="labels must have both classes"):
            auc(labels, scores)
        return
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in scores[labels] for n in scores[~labels]]
    assert auc(labels, scores) == pytest.approx(np.mean(wins), abs=1e-12)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_of_what_it_cannot_judge():
    assert math.isnan(auc([0, 1, 1], [0.1, math.nan, 0.3]))
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        auc([0, 1, 2], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"scores must have the shape \(3,\)"):
        auc([0, 1, 1], [0.1, 0.2])


def two_models(n=300):
    rng = np.random.default_rng(5)
    labels = rng.random(n) < 0.4
    shared = labels + rng.normal(size=n)
    return labels, np.round(shared + 0.3 * rng.normal(size=n), 1), shared + rng.normal(size=n)


def test_delong_is_the_formula_over_all_pairs():
    labels, *models = two_models(60)
    kernels = [np.sign(s[labels][:, None] - s[~labels][None, :]) / 2 + 0.5 for s in models]
    difference = kernels[0] - kernels[1]
    variance = sum(difference.mean(axis).var(ddof=1) / difference.mean(axis).size for axis in (0, 1))
    measured = delong(labels, *models)
    assert measured.value == pytest.approx(auc(labels, models[0]) - auc(labels, models[1]))
    assert measured.standard_error == pytest.approx(math.sqrt(variance))


def test_delong_agrees_with_the_bootstrap():
    labels, first, second = two_models()
    rng = np.random.default_rng(6)
    draws = 1000
    picks = (rng.integers(0, labels.size, labels.size) for _ in range(draws))
    spread = np.std([auc(labels[i], first[i]) - auc(labels[i], second[i]) for i in picks])
    # The bootstrap's own standard error is spread / sqrt(2 draws).
    assert abs(delong(labels, first, second).standard_error - spread) < 4 * spread / math.sqrt(2 * draws)


def test_delong_of_what_it_cannot_judge():
    assert math.isnan(delong([0, 1, 0, 1], [0.1, 0.2, math.nan, 0.4], [0.1, 0.2, 0.3, 0.4]).standard_error)
    with pytest.raises(ValueError, match="at least 2 examples of each class"):
        delong([0, 1, 1], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
