"""FAR: a run at the smallest scale, training of all units against full fine-tuning, and claims that read rows."""

import dataclasses

import jax
import numpy as np
import polars as pl
import pytest

from experiments.lab import NotEnoughRows, figures
from experiments.lab.claims import judge
from experiments.optim import far, far_costs, far_models, far_training
from experiments.optim.far_models import Recipe

TINY = far.SCALES["tiny"]
EXPERIMENT = "optim.far"
NEEDS = ("text_classification/ag_news_train.tsv.gz", "text_classification/ag_news_test.tsv.gz")


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(TINY)
    measured = set()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        measured |= {claim.id} if judgement.measured else set()
    assert {"primed-random", "primed-magnitude", "bytes-fall"} <= measured
    assert found.table is not None
    assert len(found.table(rows)) == len(far.cells(TINY)) + len(far_costs.recipes(TINY))
    assert "test accuracy against learners" in figures.describe(figures.draw(found.figure, rows))


def test_what_rows_say(finished):
    _, rows = finished
    quality = rows.filter(pl.col("part") == "quality")
    assert quality["test_accuracy"].is_between(0, 1).all()
    assert quality["test_loss"].is_between(0.5, 3).all()
    costs = {row["method"]: row for row in rows.filter(pl.col("part") == "bytes").iter_rows(named=True)}
    # Width 16, 64 units, of which 0.4 are 26; the head has 16 x 2 + 2 weights, tables 8 + 8 + 1 rows and a norm.
    d, h, k, tables = 16, 64, 26, 17 * 16 + 2 * 16
    blocks = {"full": h * (2 * d + 1), "far-0.4": k * (2 * d + 1)}
    trained = {name: 4 * (d * d + d) + 5 * d + 34 + tables + number for name, number in blocks.items()}
    for method, number in trained.items():
        assert costs[method]["trained"] == number
        assert costs[method]["optimizer_bytes"] == 4 * (2 * number + 1)
    floats = {"full": d + 2 * h, "far-0.4": d + h + k, "far-0.4, recomputed": d + 2 * k}
    for method, number in floats.items():
        assert costs[method]["floats_ffn"] == number
        # Whatever else a block keeps, every method keeps the same.
        assert costs[method]["floats_block"] - number == costs["full"]["floats_block"] - floats["full"]
        assert costs[method]["parameter_bytes"] == costs["full"]["parameter_bytes"]


def test_learners_of_all_units_are_full_fine_tuning(finished):
    """Through priming, the cut of weights and moments, and back."""
    del finished
    full, all_units = (far_training.outcomes(TINY, one, "primed") for one in (Recipe("full"), Recipe("far", 1.0)))
    for one, other in zip(full, all_units, strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, err_msg=name)


def test_choices_differ_and_seeds_share_the_pretraining(finished):
    _, rows = finished
    found = rows.filter((pl.col("method") == "far") & (pl.col("seed") == 0))["test_loss"]
    assert found.n_unique() == 3
    assert rows["pretraining_gain"].n_unique() == 2  # and null, where nothing is trained
    with pytest.raises(ValueError, match="choice is 'best'; allowed are primed, random, magnitude"):
        far_training.outcomes(TINY, Recipe("far", 0.4), "best")


def test_no_article_is_in_two_parts(finished):
    del finished
    made = far_training.data(TINY)
    assert [len(part) for part in made.parts] == [50, 10, 1600]
    assert set(made.parts.test.labels.tolist()) == {0, 1, 2, 3}
    wide = far_training.data(dataclasses.replace(TINY, vocabulary=5000, length=24, pretraining_texts=None))
    first, second = np.split(wide.read, 2)
    np.testing.assert_array_equal(wide.said, np.concatenate([second, first]))
    assert (second[:, 0] != 0).all()
    # The other 5,940 articles, but for those of 24 words and fewer; few begin alike.
    assert 5000 < len(first) <= 5940
    texts = [
        {row.tobytes() for row in rows} for rows in (first, wide.parts.train.inputs, wide.parts.validation.inputs)
    ]
    assert sum(map(len, texts)) - len(set.union(*texts)) <= 5


def test_adapters_have_as_many_trained_parameters_as_far():
    config = far_models.encoder_config(50, 64, 2, 8)
    for share in (0.4, 0.1):
        counts = {}
        for recipe in (Recipe("far", share), Recipe("lora", share)):
            params = jax.eval_shape(lambda key, r=recipe: far_costs.parameters(key, config, r), jax.random.key(0))
            counts[recipe.method] = far_models.trained_count(far_models.divide(params, recipe)[0]["layers"])
        rank = 2 * (4 * 2 * 64 + 2 * (64 + 256))  # of both layers
        assert abs(counts["far"] - counts["lora"]) <= rank / 2


@pytest.mark.parametrize("method", ["full", "far", "freeze", "bitfit", "lora", "scratch"])
def test_what_is_trained(method):
    config, recipe = far_models.encoder_config(50, 32, 2, 8), Recipe(method, 0.25)
    params = jax.eval_shape(lambda key: far_costs.parameters(key, config, recipe), jax.random.key(0))
    trained, fixed = far_models.divide(params, recipe)
    assert jax.tree.structure(far_models.unite(trained, fixed)) == jax.tree.structure(params)
    names = {"/".join(str(part) for part in path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
    assert not any("frozen" in name for name in names)
    assert any("ffn" in name for name in names) is (method not in ("freeze", "lora"))
    assert any("query" in name for name in names)
    assert any("positions" in name for name in names)
    still = far_models.divide(params, recipe._replace(attention=False, embedding=False))[0]
    left = {str(path) for path, _ in jax.tree_util.tree_leaves_with_path(still)}
    assert any("head" in path for path in left)
    inside = {"bitfit": "bias", "lora": "adapters"}.get(method, "ffn")
    assert all(inside in path or "head" in path for path in left)


# --- claims -------------------------------------------------------------------------------------------


def rows_of(primed: float, random: float, times: float, bytes_: float, scratch: float = 0.6) -> pl.DataFrame:
    """Five seeds, full fine-tuning at 0.8; seconds and bytes of 10% learners over full fine-tuning's."""
    base = {"share": None, "choice": None, "seed": None, "repetition": None}
    rows = []
    for seed in range(5):
        jitter = 0.001 * seed

        def quality(method, accuracy, share=None, choice=None, seed=seed, jitter=jitter):
            same = {"part": "quality", "method": method, "share": share, "choice": choice, "seed": seed}
            return base | same | {"test_accuracy": accuracy + jitter}

        rows += [quality("full", 0.8), quality("scratch", scratch), quality("freeze", 0.7), quality("bitfit", 0.7)]
        for share in (0.4, 0.1):
            rows += [quality("far", primed + jitter, share, "primed"), quality("far", random, share, "random"),
                     quality("far", random, share, "magnitude"), quality("lora", 0.79, share)]  # fmt: skip
    for method, scale in (("full", 1.0), ("full, recomputed", 0.9), ("far-0.1", bytes_), ("far-0", bytes_ / 2),
                          ("far-0.1, recomputed", bytes_), ("far-0, recomputed", bytes_ / 2)):  # fmt: skip
        numbers = {name: scale * 100 for name in ("temporary_bytes", "optimizer_bytes", "accessed_bytes")}
        floats = {"floats_ffn": 100 * scale, "floats_block": 100 + 50 * scale * scale}
        rows.append(base | {"part": "bytes", "method": method} | numbers | floats)
    for repetition in range(9):
        for method, seconds in (("full", 1.0), ("far-0.1", times)):
            timed = {"part": "time", "method": method, "repetition": repetition}
            rows.append(base | timed | {"seconds": seconds + 0.01 * repetition})
    return pl.DataFrame(rows, infer_schema_length=None)


def verdicts(rows: pl.DataFrame) -> dict[str, str]:
    return {claim.id: judge(claim, rows, scale="default", complete=True).verdict for claim in far.CLAIMS}


def test_claims_hold_and_fail():
    good = verdicts(rows_of(primed=0.795, random=0.78, times=0.5, bytes_=0.45))
    assert set(good.values()) == {"holds"}, good
    bad = verdicts(rows_of(primed=0.69, random=0.70, times=0.9, bytes_=1.1))
    assert set(bad.values()) - {"fails"} == {"holds"}
    assert {name for name, verdict in bad.items() if verdict == "holds"} == {"input-kept"}


def test_without_a_pretraining_that_helps_accuracy_is_not_judged():
    found = verdicts(rows_of(primed=0.795, random=0.78, times=0.5, bytes_=0.45, scratch=0.9))
    assert found["metric-40"] == found["metric-10"] == found["lora"] == "not judged"
    assert found["bytes-fall"] == "holds"
    claim = next(claim for claim in far.CLAIMS if claim.id == "optimizer-bytes")
    timed = rows_of(0.7, 0.7, 1, 1).filter(pl.col("part") == "time")
    with pytest.raises(NotEnoughRows, match="no bytes of far-0.1"):
        claim.measure(timed)
