"""Deja Vu: a run at the smallest scale, lists against NumPy, and claims that read rows."""

import numpy as np
import polars as pl
import pytest

from experiments.lab import NotEnoughRows, figures
from experiments.lab.claims import judge
from experiments.sparse import deja_vu, deja_vu_cells
from experiments.sparse.deja_vu_cells import Cell, choosing, scored

TINY = deja_vu.SCALES["tiny"]
EXPERIMENT = "sparse.deja_vu"
NEEDS = ("wikitext2/valid.txt.gz",)


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None
    assert found.table is not None
    groups = rows.filter(pl.col("part") != "speed").select(
        "part", "method", "lookahead", "kept", "heads_kept", "place"
    )
    assert len(found.table(rows)) == groups.n_unique() + 4
    assert "most frequent" in figures.describe(figures.draw(found.figure, rows))


def test_what_rows_say(finished):
    _, rows = finished
    neurons = rows.filter(pl.col("part") == "neurons")
    assert neurons["nll"].is_between(1, 8).all()
    # Width 64, 256 neurons of 2 layers, float32; a predictor of rank 4 is 4 (64 + 256) weights, or 10 neurons.
    half = neurons.filter(pl.col("kept") == 0.5)
    by_method = dict(zip(half["method"], half["perceptron_bytes"], strict=True))
    assert by_method["static"] == by_method["oracle"] == 4 * 2 * 128 * 128
    assert by_method["predictor"] == by_method["static"] + 4 * 2 * 4 * 320
    assert by_method["static_bytes"] == by_method["predictor"]
    unions = rows.filter(pl.col("part") == "union").sort("seed", "place")["union_share"].to_numpy().reshape(2, 2)
    np.testing.assert_allclose(unions[:, 0], round(0.3 * 256) / 256)
    assert (unions[:, 1] > unions[:, 0]).all()
    assert (unions[:, 1] <= 2 * unions[:, 0]).all()


def test_lists_are_those_of_the_method(finished):
    """All by NumPy from calibration text: how often a neuron is active, how large its weights are."""
    del finished
    _, params = deja_vu_cells.model(TINY)
    up, down = (np.asarray(params["layers"][name], np.float64) for name in ("up", "down"))
    active = deja_vu_cells.seen(TINY, 1).active
    worths = {
        "static": active.mean(axis=1),
        "magnitude": np.sqrt((up**2).sum(axis=1) * (down**2).sum(axis=2)),
    }
    for method, worth in worths.items():
        masks = np.asarray(scored(TINY, Cell("neurons", method, kept=0.3, seed=1))[0][3])
        assert (masks == masks[:, :1, :1]).all()
        first = masks[:, 0, 0]
        assert (first.sum(axis=-1) == 77).all()
        for layer in range(2):
            assert worth[layer][first[layer]].min() >= worth[layer][~first[layer]].max() * (1 - 1e-6)
    random = np.asarray(scored(TINY, Cell("neurons", "random", kept=0.3, seed=1))[0][3])
    assert (random.sum(axis=-1) == 77).all()
    assert (random[:, 0, 0] != random[:, 0, 1]).any()
    assert (random[0] != random[1]).any()


def test_seeds_share_no_test_sequence_and_no_calibration_text(finished):
    del finished
    rows = [deja_vu_cells.test_tokens(TINY, seed) for seed in range(2)]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 4
    one, other = (deja_vu_cells.seen(TINY, seed).active for seed in range(2))
    assert (one != other).any()


def test_the_static_control_gets_the_bytes_of_a_predictor(finished):
    del finished
    assert choosing(TINY, Cell("neurons", "predictor", 0.5, 0.3, seed=0), "neurons")[::2] == (77, 4)
    assert choosing(TINY, Cell("neurons", "static_bytes", kept=0.3, seed=0), "neurons")[::2] == (87, 0)
    assert choosing(TINY, Cell("neurons", "static", kept=0.3, seed=0), "heads")[::2] == (2, 0)


# --- claims -------------------------------------------------------------------------------------------


def rows_of(**losses: float) -> pl.DataFrame:
    """Three seeds of a dense model with loss 2 and of methods with these; at 10 % kept they are 0.1 higher."""
    base = {"part": "neurons", "lookahead": None, "heads_kept": None, "place": None, "recall": 0.9}
    rows = [base | {"method": "dense", "kept": None, "seed": seed, "nll": 2 + 0.1 * seed} for seed in range(3)]
    for method, loss in losses.items():
        ahead = 0.5 if method == "predictor" else None
        for kept in (0.3, 0.1):
            rows += [
                base | {"method": method, "kept": kept, "lookahead": ahead, "seed": seed,
                        "nll": (2 + 0.1 * seed) * (loss + (kept == 0.1) * 0.1 + 0.001 * seed)}
                for seed in range(3)
            ]  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


def verdicts(rows: pl.DataFrame) -> dict[str, str]:
    return {claim.id: judge(claim, rows, scale="default", complete=True).verdict for claim in deja_vu.CLAIMS}


def test_claims_hold_and_fail():
    good = verdicts(rows_of(oracle=1.0, predictor=1.005, static=1.2, static_bytes=1.1, magnitude=1.3, random=2.0))
    for name in ("oracle", "predictor", "predictor-static", "predictor-bytes", "predictor-magnitude",
                 "oracle-predictor", "static-random", "recall"):  # fmt: skip
        assert good[name] == "holds", name
    bad = verdicts(rows_of(oracle=1.05, predictor=1.04, static=1.03, static_bytes=1.0, magnitude=1.0, random=1.0))
    for name in ("oracle", "predictor", "predictor-static", "predictor-bytes", "predictor-magnitude",
                 "oracle-predictor", "static-random"):  # fmt: skip
        assert bad[name] == "fails", name
    assert bad["heads-random"] == bad["speed"] == bad["union"] == bad["sparsity"] == "not judged"


def test_the_worst_share_decides():
    rows = rows_of(predictor=1.0, static=1.2)
    worse = pl.col("nll") + 1.0 * (pl.col("method").eq("predictor") & pl.col("kept").eq(0.1).fill_null(False))
    claim = next(claim for claim in deja_vu.CLAIMS if claim.id == "predictor-static")
    assert claim.measure(rows.with_columns(worse)).value > 0 > claim.measure(rows).value
    assert "10% kept" in claim.measure(rows.with_columns(worse)).note
    with pytest.raises(NotEnoughRows, match="no rows of neurons with static"):
        claim.measure(rows_of(predictor=1.0))
