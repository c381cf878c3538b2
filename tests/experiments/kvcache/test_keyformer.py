"""Keyformer: a run at the smallest scale, its caches, and claims that read the right rows."""

import numpy as np
import polars as pl
import pytest

from experiments.kvcache import fixtures, keyformer
from experiments.kvcache.keyformer import Config, cells, layers_of
from experiments.kvcache.token_budgets import row_bytes
from experiments.lab import figures
from experiments.lab.claims import judge
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.keyformer import Keyformer

DEFAULT = Config()

EXPERIMENT = "kvcache.keyformer"
NEEDS = ("wikitext2/valid.txt.gz",)


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    attention = rows.filter(pl.col("method") == "attention")
    assert attention["mass"].is_between(0.4, 1 + 1e-6).all()
    assert (attention["worst_head"] <= attention["mass"]).all()
    caches = rows.filter(pl.col("method") != "attention")
    assert caches["nll"].is_between(1, 8).all()
    # Two noises for each of two models, where there is noise.
    counts = dict(caches["method"].value_counts().iter_rows())
    assert counts == {"full": 2, "window": 2, "h2o": 2, "temperature": 2, "random": 4, "keyformer": 4, "noise": 4}
    drawn = caches.filter(pl.col("method") == "random").group_by("seed").agg(pl.col("nll").n_unique())
    assert (drawn["nll"] == 2).all()
    kept = caches.filter(pl.col("method").is_in(["h2o", "keyformer", "temperature", "noise"]))
    assert set(kept["tokens_kept"]) == {24.0}
    assert (caches.filter(pl.col("method") == "random")["tokens_kept"] >= 24.0).all()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    shown = found.table(rows)
    assert len(shown) == 1 + len(cells(found.scales["tiny"]))
    assert shown.filter(pl.col("method") == "keyformer")["less H2O"][0].endswith("]")
    assert figures.describe(figures.draw(found.figure, rows))


def test_the_caches_share_window_and_bytes():
    found = cells(DEFAULT)
    assert len(set(found)) == len(found)
    for fixture, tokens in (("f1", 256), ("recall", 96)):
        setting = fixtures.setting(DEFAULT.size, fixture, "decode")
        for kept in DEFAULT.kept:
            layers = {cell.method: layers_of(DEFAULT, cell) for cell in found
                      if cell.fixture == fixture and cell.kept == kept and cell.method != "full"}  # fmt: skip
            k = int(kept * tokens)
            assert {layer[0].window for layer in layers.values()} == {int(0.3 * k)}
            assert {layers[name][0].capacity for name in layers if name not in ("window", "random")} == {k}
            assert layers["random"][0].capacity >= k
            sizes = {name: row_bytes(setting, layer) for name, layer in layers.items()}
            for control in (sizes.pop("window"), sizes.pop("random")):
                assert 0.95 * sizes["keyformer"] < control <= sizes["keyformer"]
            assert len(set(sizes.values())) == 1
            assert layers["h2o"][0].policy == HeavyHitters()
            assert layers["keyformer"][0].policy == Keyformer(1.0, 2.0, tokens)
            assert layers["temperature"][0].policy == Keyformer(1.0, 2.0, tokens, noise=False)
            assert layers["noise"][0].policy == Keyformer(1.0, 1.0, tokens)


def made_up() -> pl.DataFrame:
    """Models add 0.1 to a loss and 0.01 to an accuracy; the two noises cancel out."""
    recall = {"window": 0.1, "random": 0.5, "h2o": 0.78, "keyformer": 0.8, "temperature": 0.85, "noise": 0.7}
    rows = [{"fixture": "recall", "method": "full", "kept": 1.0, "noise": None, "seed": seed, "accuracy": 1.0}
            for seed in range(3)]  # fmt: skip
    rows += [{"fixture": "recall", "method": method, "kept": kept, "noise": noise, "seed": seed,
              "accuracy": accuracy + 0.2 * (kept - 0.7) + 0.01 * seed + (0.02 * noise - 0.01) + (
                  -0.1 if method == "keyformer" and kept == 0.5 else 0.0)}
             for method, accuracy in recall.items() for kept in (0.7, 0.5, 0.3) for seed in range(3)
             for noise in (0, 1)]  # fmt: skip
    rows += [{"fixture": "f1", "method": method, "kept": kept, "noise": None, "seed": seed, "nll": nll + 0.1 * seed}
             for method, kept, nll in (("full", 1.0, 2.0), ("keyformer", 0.7, 2.01), ("keyformer", 0.5, 2.2),
                                       ("h2o", 0.7, 2.02)) for seed in range(3)]  # fmt: skip
    rows += [{"fixture": "f1", "method": "attention", "kept": kept, "layer": layer, "noise": None, "seed": seed,
              "mass": kept + 0.45 + 0.1 * layer + 0.001 * seed, "worst_head": kept}
             for kept in (0.3, 0.4) for layer in (0, 1) for seed in range(3)]  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    rows = made_up()
    expected = {
        "mass": (0.901, False),
        "recall-window": (0.6, True),
        "recall-random": (0.2, True),
        "text-70": (float(np.mean([(2.01 + s) / (2 + s) for s in (0, 0.1, 0.2)])), True),
        "recall-70": (0.81, False),
        "noise": (-0.05, False),
    }
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in keyformer.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert verdicts["recall-random"].note == "at 50% of the tokens"


def test_the_table_has_the_difference_to_h2o_and_the_figure_all_models():
    rows = made_up()
    shown = keyformer.table(rows).filter(pl.col("fixture") == "f1", pl.col("method") == "keyformer")
    found = dict(shown.select("kept", "less H2O").iter_rows())
    assert found[0.5] is None
    value, low, high = (float(part.strip("[],")) for part in found[0.7].split())
    assert value == pytest.approx(-0.01)
    assert low <= value <= high
    drawn = figures.draw(keyformer.figure, rows)
    titles = [ax.get_title("left") for ax in drawn.axes]
    assert titles == [
        "recall, exact attention",
        "recall, token by token",
        "f1, exact attention",
        "f1, token by token",
    ]
