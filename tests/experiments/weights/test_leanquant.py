"""LeanQuant's experiment: a run at the smallest scale, equal bytes, claims that read the right rows."""

import dataclasses
import math

import numpy as np
import polars as pl
import pytest

from experiments.lab import NotEnoughRows, figures
from experiments.lab.claims import judge
from experiments.weights import leanquant, leanquant_cells
from experiments.weights.leanquant_cells import Config, spec_of
from hashml.weights.quantized import spec_bits_per_weight

EXPERIMENT = "weights.leanquant"
NEEDS = ("wikitext2/valid.txt.gz", "wikitext2/test.txt.gz")


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    quality = rows.filter(pl.col("part") == "quality")
    assert np.isfinite(quality["nll"].to_numpy()).all()
    assert (quality.filter(pl.col("method") != "float")["proxy"] > 0).all()
    # One layer of width 32, hidden 86: 2 bits, and a scale and a zero of 3 bytes or a table of 8 a row.
    shapes = [(32, 32)] * 4 + [(86, 32)] * 2 + [(32, 86)]
    weights = sum(rows * columns for rows, columns in shapes)
    sizes = dict(quality.select("method", "bits_per_weight").unique().iter_rows())
    for method, side in (("rtn", 3), ("gptq", 3), ("gptq_kmeans", 8), ("leanquant_4", 8)):
        stored = sum(rows * (math.ceil(columns / 4) + side) for rows, columns in shapes)
        assert sizes[method] == pytest.approx(8 * stored / weights)
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == 5
    assert "leanquant_4" in figures.describe(figures.draw(found.figure, rows))


def test_what_is_measured(monkeypatch):
    """Every method and the card's controls on f1 at 2 and 3 bits; a model that is not installed has no rows."""
    own = {(cell.method, cell.bits) for cell in leanquant_cells.cells(Config()) if cell.model == "f1"}
    assert {
        ("rtn_mse", 2),
        ("rtn_kmeans", 3),
        ("gptq_kmeans", 2),
        ("leanquant_1", 3),
        ("gptq", 8),
        ("float", 32),
    } < own
    assert ("leanquant_1", 4) not in own
    assert ("gptq_kmeans", 8) not in own
    monkeypatch.setattr(leanquant_cells, "minilm_file", lambda: None)
    assert all(cell.model != "minilm" for cell in leanquant_cells.cells(Config()))


@pytest.mark.parametrize(("bits", "divisor", "groups"), [(2, 8, 2), (3, 8, 4), (4, 8, 8), (3, 4, 4), (4, 384, 8)])
def test_groups_take_no_more_bytes_than_tables(bits, divisor, groups):
    grouped, tables = spec_of("gptq_groups", bits, divisor), spec_of("leanquant_4", bits)
    assert grouped.grid.groups == groups
    assert spec_bits_per_weight(grouped, 384) <= spec_bits_per_weight(tables, 384)
    assert grouped.grid.kind == spec_of("gptq", bits).grid.kind == "min_max"
    assert dataclasses.replace(tables.grid, exponent=0) == spec_of("gptq_kmeans", bits).grid


# --- claims -------------------------------------------------------------------------------------------


def _row(model: str, method: str, bits: int, seed: int, nll: float | None, proxy: float, **more: float) -> dict:
    empty = dict.fromkeys(("cosine", "ndcg", "accuracy", "seconds"))
    own = {"part": "quality", "model": model, "method": method, "bits": bits, "seed": seed}
    return {**own, "nll": nll, "proxy": proxy, "bits_per_weight": float(bits), **empty, **more}


ROWS = pl.DataFrame(
    [
        _row("f1", "float", 32, seed, 1.0, 0.0) for seed in range(3)
    ] + [
        _row("f1", method, bits, seed, 1 + scale * (4 - bits) + 0.001 * seed * scale, scale)
        for method, scale in (("rtn", 0.5), ("gptq", 0.2), ("leanquant_4", 0.1))
        for bits in (2, 3)
        for seed in range(3)
    ] + [
        _row("minilm", "gptq", 3, 0, None, 2.0, cosine=0.90, ndcg=0.4),
        _row("minilm", "leanquant_4", 3, 0, None, 1.5, cosine=0.95, ndcg=0.39),
    ],
    infer_schema_length=None,
)  # fmt: skip


def test_claims_read_the_rows_that_they_name():
    found = leanquant.difference(ROWS, "gptq", "rtn", 3)
    assert found.value == pytest.approx(-0.3003)
    assert found.low < found.value < found.high < 0
    # The model where it is highest.
    assert leanquant.ratio(ROWS, "leanquant_4", "gptq", (2, 3)).value == pytest.approx(0.75)
    assert "minilm, 3 bits" in leanquant.ratio(ROWS, "leanquant_4", "gptq", (2, 3)).note
    by_id = {claim.id: claim for claim in leanquant.CLAIMS}
    assert len(by_id) == len(leanquant.CLAIMS)
    holding = {}
    for name, claim in by_id.items():
        try:
            holding[name] = claim.holds(claim.measure(ROWS))
        except NotEnoughRows:
            continue
    assert holding == {
        "gptq-rtn-3": True,
        "gptq-rtn-2": True,
        "exact-gptq": True,
        "gap-grows": True,
        "leanquant-gptq-3": True,
        "leanquant-gptq-2": True,
        "leanquant-rtn-3": True,
        "leanquant-rtn-2": True,
        "leanquant-proxy": True,
        "minilm-cosine": True,
        "minilm-ndcg": False,
    }
    assert by_id["exact-gptq"].measure(ROWS).value == pytest.approx(-0.2)
    assert by_id["gap-grows"].measure(ROWS).value == pytest.approx(-0.3)
    assert by_id["minilm-cosine"].measure(ROWS).value == pytest.approx(0.05)


def test_a_claim_that_the_rows_break_fails():
    worse = ROWS.with_columns(
        pl.when(pl.col("method") == "leanquant_4").then(pl.col("nll") + 0.5).otherwise(pl.col("nll")).alias("nll")
    )
    by_id = {claim.id: claim for claim in leanquant.CLAIMS}
    assert not by_id["leanquant-gptq-3"].holds(by_id["leanquant-gptq-3"].measure(worse))
    times = pl.DataFrame(
        {"part": ["time"] * 3, "model": ["f1"] * 3, "method": ["leanquant_4"] * 3, "bits": [2, 3, 4],
         "ratio": [1.2, 1.45, 1.3], "ratio_low": [1.1, 1.4, 1.2], "ratio_high": [1.3, 1.6, 1.4]}
    )  # fmt: skip
    slowest = by_id["time-leanquant_4-3"].measure(times)
    assert slowest.value == 1.45
    assert not by_id["time-leanquant_4-3"].holds(slowest)
    assert by_id["time-leanquant_4-4"].holds(by_id["time-leanquant_4-4"].measure(times))
