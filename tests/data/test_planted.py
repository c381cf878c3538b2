"""The planted log follows its law, is the same however it is cut, and holds nothing."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit, zeta
from sklearn.metrics import roc_auc_score

from experiments.data.clicks import batches
from experiments.data.counter import normal, stream
from experiments.data.planted import (
    FirstOrderTeacher,
    PairwiseTeacher,
    PlantedLog,
    bayes_auc,
    zipf_ranks,
)

P_VALUE = 1e-4  # below this a law is rejected; the seeds are fixed
LOGS = {
    "pairwise": PlantedLog(rows=5000, table_sizes=(50, 1, 3000), seed=1),
    "first order": PlantedLog(
        rows=5000, table_sizes=(40, 7), exponent=0.8, teacher=FirstOrderTeacher(), dense=3, bias=-1.0, seed=2
    ),
}


@pytest.mark.parametrize("name", LOGS)
@given(bounds=st.lists(st.integers(0, 5000), min_size=2, max_size=6))
@settings(deadline=None, max_examples=50)
def test_rows_do_not_depend_on_the_cut(name, bounds):
    log = LOGS[name]
    bounds = sorted(bounds)
    whole = log.batch(bounds[0], bounds[-1])
    parts = [log.batch(low, high) for low, high in itertools.pairwise(bounds)]
    for column in ("ids", "dense", "labels"):
        joined = np.concatenate([getattr(part, column) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, column))


@pytest.mark.parametrize("exponent", [0, 0.6, 1, 1.05, 1.5, 3])
def test_ranks_follow_zipfs_law(exponent):
    log = PlantedLog(rows=100_000, table_sizes=(200,), exponent=exponent)
    counts = np.bincount(log.ranks(0, len(log))[:, 0], minlength=200)
    expected = np.arange(1, 201.0) ** -exponent
    expected *= len(log) / expected.sum()
    common = expected >= 5  # chi-square's rule; the rest in one cell
    if not common.all():
        counts = np.append(counts[common], counts[~common].sum())
        expected = np.append(expected[common], expected[~common].sum())
    assert stats.chisquare(counts, expected).pvalue > P_VALUE


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0, 1.05, 1.5, 2.5])
def test_the_formula_beyond_the_head_equals_the_cumulative_sum(exponent):
    """The whole sum over 300,000 ranks against a head of 4,096 and the formula, edges included."""
    size = 300_000
    sums = np.cumsum(np.arange(1.0, size + 1) ** -exponent)
    drawn = np.random.default_rng(0).random(50_000)
    tail = sums[4090:4200] / sums[-1] + np.array([[-1e-9], [1e-9]])
    u = np.concatenate([drawn, 1 - drawn * 1e-3, tail.ravel(), [1e-300, 1 - 2**-53]])
    u = u[(u > 0) & (u < 1)]
    expected = np.minimum(np.searchsorted(sums, u * sums[-1]), size - 1)
    found = zipf_ranks(u, size, exponent, head=4096)
    # Sums of 300,000 terms agree to 1e-12: a rank may differ where u lies that near to an edge.
    differ = found != expected
    edge = np.abs(sums[np.minimum(found, expected)] / sums[-1] - u)
    assert (edge[differ] < 1e-10).all()
    assert differ.mean() < 0.01


def test_tables_of_a_hundred_million_rows_need_no_array():
    """The share of ranks beyond the first million, against the zeta function's tail; memory of a batch."""
    log = PlantedLog(rows=10**8, table_sizes=(10**8, 2**31 - 1), exponent=1.2)
    log.batch(0, 10)  # the cumulative sum of the head
    tracemalloc.start()
    ranks = log.ranks(10**8 - 100_000, 10**8)
    batch = log.batch(10**8 - 1000, 10**8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6
    assert len(batch) == 1000
    for field, size in enumerate(log.table_sizes):
        beyond = (zeta(1.2, 10**6 + 1) - zeta(1.2, size + 1.0)) / (zeta(1.2) - zeta(1.2, size + 1.0))
        found = (ranks[:, field] >= 10**6).mean()
        assert abs(found - beyond) < 4 * np.sqrt(beyond * (1 - beyond) / 100_000)


def test_a_hundred_million_rows_are_not_held():
    log = PlantedLog(rows=10**8, table_sizes=(1000, 1000))
    far = log.batch(10**8 - 1000, 10**8)
    np.testing.assert_array_equal(far.ids[-7:], log.batch(10**8 - 7, 10**8).ids)
    chunks = log.chunks(10_000)
    next(chunks)
    tracemalloc.start()
    rows = sum(len(chunk) for chunk in itertools.islice(chunks, 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 200_000
    assert peak < 20e6
    assert sum(len(chunk) for chunk in log.chunks(300, start=10**8 - 1000)) == 1000


def test_ids_are_a_fixed_permutation_of_ranks():
    log = PlantedLog(rows=20_000, table_sizes=(300, 300))
    ranks, ids = log.ranks(0, len(log)), log.batch(0, len(log)).ids
    for field in range(2):
        pairs = {(int(r), int(i)) for r, i in zip(ranks[:, field], ids[:, field], strict=True)}
        assert len(pairs) == len({r for r, _ in pairs}) == len({i for _, i in pairs})
    assert not np.array_equal(ids, ranks)
    plain = PlantedLog(rows=20_000, table_sizes=(300, 300), permute=False)
    np.testing.assert_array_equal(plain.batch(0, len(log)).ids, ranks)
    np.testing.assert_array_equal(plain.batch(0, len(log)).labels, log.batch(0, len(log)).labels)


def test_fields_are_independent():
    ranks = PlantedLog(rows=50_000, table_sizes=(3, 3), exponent=0.5).ranks(0, 50_000)
    table = np.histogram2d(ranks[:, 0], ranks[:, 1], bins=3)[0]
    expected = table.sum(axis=0) * table.sum(axis=1, keepdims=True) / table.sum()
    assert stats.chisquare(table.ravel(), expected.ravel(), ddof=4).pvalue > P_VALUE


def test_the_pairwise_teacher_is_the_sum_over_pairs():
    """Embeddings are read back from logits of two fields; four fields must be the sum over their pairs."""
    teacher = PairwiseTeacher(rank=3, scale=0.8)
    ranks = np.random.default_rng(0).integers(0, 30, (200, 4))
    nothing = np.zeros((200, 0), np.float32)

    def embedding(field):
        counters = ranks[:, field, None] * 3 + np.arange(3)
        return normal(stream(7, "latent", field), counters)

    expected = sum(0.8 * (embedding(t) * embedding(u)).sum(axis=-1) for t, u in itertools.combinations(range(4), 2))
    np.testing.assert_allclose(teacher.logits(7, ranks, nothing), expected, rtol=1e-12, atol=1e-12)


def test_logits_have_the_teachers_variance():
    """A dot product of two N(0, 1) vectors has variance ``rank``, and pairs are uncorrelated."""
    rows, fields, rank, scale = 20_000, 3, 4, 0.5
    ranks = np.arange(rows)[:, None].repeat(fields, axis=1)  # every row other embeddings
    logits = PairwiseTeacher(rank, scale).logits(0, ranks, np.zeros((rows, 0), np.float32))
    variance = scale**2 * rank * fields * (fields - 1) / 2
    # E[logit ** 4] by the sample itself gives the estimate's own error.
    error = np.sqrt(np.var(logits**2) / rows)
    assert abs(np.mean(logits**2) - variance) < 4 * error
    assert abs(np.mean(logits)) < 4 * np.sqrt(variance / rows)


def test_the_first_order_teacher_is_its_formula():
    teacher = FirstOrderTeacher(rank=1, pairs=((0, 1),), dense_scale=0.3, id_scale=2, pair_scale=0.7)
    ranks = np.stack(np.meshgrid(np.arange(20), np.arange(20)), axis=-1).reshape(-1, 2)
    dense = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    nothing = np.zeros((400, 2), np.float32)
    logits = teacher.logits(5, ranks, dense)
    ids_only = teacher.logits(5, ranks, nothing)
    # Linear in the dense features, with the same weights in every row.
    weights, residual, *_ = np.linalg.lstsq(dense, logits - ids_only, rcond=None)
    assert residual < 1e-20
    assert np.abs(weights).min() > 0
    # Without pairs: additive. With one pair of rank 1: additive plus a matrix of rank 1.
    additive = FirstOrderTeacher(1, (), id_scale=2).logits(5, ranks, nothing).reshape(20, 20)
    centred = additive - additive.mean(axis=0) - additive.mean(axis=1, keepdims=True) + additive.mean()
    np.testing.assert_allclose(centred, 0, atol=1e-12)
    pair = ids_only.reshape(20, 20) - additive
    singular = np.linalg.svd(pair, compute_uv=False)
    assert singular[1] < 1e-12 * singular[0]
    assert singular[0] > 1
    assert len(FirstOrderTeacher().logits(0, ranks, nothing)) == 400


@pytest.mark.parametrize("name", LOGS)
def test_labels_are_drawn_with_the_stated_probabilities(name):
    """Ten bins of probability: clicks are Binomial, judged in standard errors."""
    log = LOGS[name]
    probabilities, labels = log.probabilities(0, len(log)), log.batch(0, len(log)).labels
    order = np.argsort(probabilities)
    for part in np.array_split(order, 10):
        p = probabilities[part]
        error = np.sqrt((p * (1 - p)).sum())
        assert abs(labels[part].sum() - p.sum()) < 4 * error


def test_bias_moves_the_logit():
    plain, biased = PlantedLog(rows=100), PlantedLog(rows=100, bias=-2)
    p, q = plain.probabilities(0, 100), biased.probabilities(0, 100)
    np.testing.assert_allclose(q, expit(np.log(p / (1 - p)) - 2), rtol=1e-9)


def test_a_larger_table_keeps_the_head():
    """The same ranks have the same embeddings; the head's share falls to its value under the longer law."""
    small, large = (PlantedLog(rows=100_000, table_sizes=(size,) * 2, seed=4) for size in (5_000, 500_000))
    ranks = np.stack(np.meshgrid(np.arange(50), np.arange(50)), axis=-1).reshape(-1, 2)
    nothing = np.zeros((2500, 0), np.float32)
    np.testing.assert_array_equal(
        small.teacher.logits(small.seed, ranks, nothing), large.teacher.logits(large.seed, ranks, nothing)
    )
    found = (large.ranks(0, 100_000)[:, 0] < 5_000).mean()
    share = (np.arange(1.0, 5_001) ** -1.5).sum() / (np.arange(1.0, 500_001) ** -1.5).sum()
    assert share > 0.98
    assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / 100_000)


@given(st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.9]), min_size=2, max_size=30))
@settings(deadline=None, max_examples=50)
def test_bayes_auc_equals_the_double_sum(values):
    p = np.array(values)
    wins = (p[:, None] > p[None, :]) + 0.5 * (p[:, None] == p[None, :])
    expected = (p[:, None] * (1 - p[None, :]) * wins).sum() / (p.sum() * (1 - p).sum())
    assert bayes_auc(p) == pytest.approx(expected, rel=1e-12)


def test_bayes_auc_is_what_the_truth_scores():
    """Labels redrawn 50 times: the mean AUC of the true probabilities, in standard errors."""
    log = PlantedLog(rows=4000, table_sizes=(500,) * 4)
    p = log.probabilities(0, 4000)
    rng = np.random.default_rng(0)
    scores = [roc_auc_score(rng.random(4000) < p, p) for _ in range(50)]
    assert abs(np.mean(scores) - log.bayes_auc(0, 4000)) < 4 * np.std(scores) / np.sqrt(50)


def test_seeds_make_other_logs_and_dense_features_are_normal():
    first, second = (PlantedLog(rows=20_000, dense=2, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first.batch(0, 100).ids, second.batch(0, 100).ids)
    dense = first.dense_features(0, 20_000)
    assert dense.dtype == np.float32
    for column in dense.T:
        assert stats.kstest(column, "norm").pvalue > P_VALUE
    assert abs(np.corrcoef(dense.T)[0, 1]) < 4 / np.sqrt(len(dense))


def test_it_streams_into_batches():
    log = PlantedLog(rows=1000, table_sizes=(10,))
    found = np.concatenate([batch.ids for batch in batches(log.chunks(128), 100, window=250)])
    np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(log.batch(0, 1000).ids, axis=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows=0"),
        ({"dense": -1}, "dense=-1"),
        ({"exponent": -0.5}, "exponent=-0.5"),
        ({"table_sizes": ()}, r"table_sizes=\(\)"),
        ({"table_sizes": (5, 0)}, r"table_sizes=\(5, 0\)"),
        ({"table_sizes": (2**31,)}, "table_sizes="),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PlantedLog(**arguments)


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 1001)])
def test_bad_ranges_are_named(start, stop):
    log = PlantedLog(rows=1000)
    for method in (log.batch, log.ranks, log.dense_features, log.probabilities):
        with pytest.raises(ValueError, match=f"start={start}"):
            method(start, stop)
    with pytest.raises(ValueError, match="chunk_rows=0"):
        log.chunks(0)
