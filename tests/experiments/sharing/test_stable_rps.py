"""The STABLE-RPS experiment: the materialised form, equal stored weights, and a run at the smallest scale."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from experiments import cli
from experiments.lab import experiment, figures, records
from experiments.lab.claims import judge
from experiments.sharing import stable_rps
from experiments.sharing import stable_rps_contenders as contenders
from hashml.sharing.stable_rps import gradient_scaler

TINY = stable_rps.SCALES["tiny"]


@pytest.fixture(scope="module", autouse=True)
def data():
    folder = os.environ.get("HASHML_DATA")
    if not folder or not (Path(folder) / "fashion_mnist/train.npz").is_file():
        pytest.skip(f"needs fashion_mnist under $HASHML_DATA, which is {folder or 'not set'}")


@pytest.mark.parametrize("method", ["rps", "roast_element", "roast_tile"])
def test_the_materialised_net_is_the_shared_one(method):
    """Logits and gradients of the contender are those of `Shared`, seed by seed."""
    contender = contenders.make(TINY, "fashion_mnist", method, 10)
    kind = {"rps": "fold", "roast_element": "element", "roast_tile": "tile"}[method]
    x = jnp.asarray(contenders.split(TINY, "fashion_mnist").test.images[:5])
    for seed in range(TINY.seeds):
        params, constants = jax.tree.map(lambda leaf, i=seed: leaf[i], (contender.params, contender.constants))
        init_std = 1.0 if method == "rps" else contenders.ROAST_SPREAD
        shared = contenders.geometry(TINY, "fashion_mnist", kind, 10, seed, init_std)

        def loss(apply, params):
            return (jnp.asarray(apply(params)) ** 2).sum()

        found = jax.value_and_grad(lambda p, c=constants: loss(lambda p: contender.apply(p, c, x), p))(params)
        expected = jax.value_and_grad(lambda p, s=shared: loss(lambda p: s.apply({"params": p}, x), p))(params)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
        gamma = gradient_scaler(shared, "v1" if method == "rps" else "none")
        np.testing.assert_allclose(constants["gamma"], gamma, rtol=1e-6)
    first, second = contender.constants["slots"]["Dense_0"]["kernel"]
    assert (first != second).any()


@pytest.mark.parametrize("compression", [10, 100])
def test_contenders_store_as_many_weights(compression):
    """Bytes equal but for the smaller net, which one more unit in its widths would make too large."""
    config = dataclasses.replace(TINY, hidden=(64, 64))
    stored = {
        method: contenders.make(config, "fashion_mnist", method, compression).bytes
        for method in (*contenders.SHARED, *contenders.AT_INIT)
    }
    weights = 784 * 64 + 64 * 64 + 640
    assert {tuple(sizes) for sizes in stored.values()} == {(4 * (round(weights / compression) + 138),) * TINY.seeds}
    pruned = contenders.make(config, "fashion_mnist", "snip", compression)
    assert pruned.bitmap_bytes[0] == pruned.bytes[0] + weights // 8
    small = contenders.smaller_net(config, "fashion_mnist", compression)
    if small is not None:
        assert contenders.make(config, "fashion_mnist", "small", compression).bytes[0] <= stored["rps"][0]


def test_an_unknown_contender_is_refused():
    with pytest.raises(ValueError, match="method is 'distilled'; it must be 'dense' or one of 'rps'"):
        contenders.make(TINY, "fashion_mnist", "distilled", 10)


# --- a run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The experiment and the rows of a run at scale tiny."""
    out = tmp_path_factory.mktemp("runs")
    assert cli.main(["run", "sharing.stable_rps", "--scale", "tiny", "--out", str(out)]) == 0
    record = records.read_record(out / "sharing.stable_rps" / "tiny")
    assert record is not None
    return experiment.load("sharing.stable_rps"), record.rows


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    assert set(rows["method"]) >= {"dense", *contenders.METHODS, "v1", "none", "fold", "element"}
    assert rows["accuracy"].is_between(0, 1).all()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert isinstance(found.table(rows), pl.DataFrame)
    assert figures.describe(figures.draw(found.figure, rows))


def test_at_compression_one_the_fold_is_the_dense_net(finished):
    _, rows = finished
    chosen = rows.filter((pl.col("part") == "continuity") & (pl.col("method") == "fold"))
    assert (chosen["deviation"] < 1e-3).all()
    assert (chosen["empty_slots"] == 0).all()
    assert (chosen["accuracy"] == chosen["dense_accuracy"]).all()


def test_the_claims_read_the_right_rows():
    """Made-up rows: RPS gains 3 points on SNIP, 4 on all others, and 10 of spread without the scaler."""
    base = {"rps": 0.8, "dense": 0.9, "snip": 0.77} | dict.fromkeys(
        ["random", "magnitude", "grasp", "synflow", "ltr", "small", "roast_element", "roast_tile"], 0.76
    )
    rows = [
        {"part": "quality", "data": data, "method": method, "compression": c, "init_std": None, "seed": seed,
         "accuracy": accuracy + 0.001 * seed, "validation_accuracy": accuracy}
        for data in ("fashion_mnist", "cifar10_subset") for c in (1, 3, 10, 100, 1000)
        for method, accuracy in base.items() for seed in range(3)
    ]  # fmt: skip
    rows += [
        {"part": "stability", "data": "fashion_mnist", "method": method, "compression": 10, "init_std": std,
         "seed": seed, "accuracy": 0.8 - (method == "none") * 0.1 * place, "validation_accuracy": None}
        for method in ("v1", "none") for place, std in enumerate((0.1, 1.0)) for seed in range(3)
    ]  # fmt: skip
    frame = pl.DataFrame(rows, infer_schema_length=None)
    verdicts = {
        claim.id: judge(claim, frame, scale="default", complete=True)
        for claim in stable_rps.CLAIMS
        if claim.id not in ("continuous", "continuous-as-rounding", "hashing-is-not")
    }
    expected = {"matches-pruning": 0.03, "beats-pruning-high": 0.03, "matches-pruning-cifar": 0.03,
                "beats-tickets-high": 0.04, "tickets-win-low": 0.04, "matches-small-nets": 0.04,
                "not-below-roast": 0.04, "stable": 0.0, "unstable-without": 0.1}  # fmt: skip
    assert set(verdicts) == set(expected)
    for name, value in expected.items():
        measured = verdicts[name].measured
        assert measured is not None
        assert measured.value == pytest.approx(value, abs=1e-9)
        fails = name in ("tickets-win-low", "unstable-without")
        assert verdicts[name].verdict == ("fails" if fails else "holds")
