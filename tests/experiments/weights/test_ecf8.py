"""ECF8's experiment: a run at the smallest scale, what is counted, claims that read the right rows."""

import json
from typing import Any

import ml_dtypes
import numpy as np
import polars as pl
import pytest

from experiments.kvcache import fixtures
from experiments.lab import figures
from experiments.lab.claims import judge
from experiments.weights import ecf8, ecf8_cells

EXPERIMENT = "weights.ecf8"
NEEDS = ("wikitext2/valid.txt.gz",)


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    arrays = rows.filter(pl.col("part") == "array")
    assert (arrays["limit"] - 4 - arrays["exponent_entropy"]).abs().max() < 1e-12
    for coder in ecf8_cells.CODERS:
        assert (arrays[coder] >= arrays["limit"] - 1e-12).all()
        assert (arrays[coder] <= 8).all()
    assert rows["changed"].drop_nulls().sum() == 0
    scaled = arrays.filter(pl.col("cast") == "scaled")
    assert (scaled["error"] < 2**-8).all()  # rounding to 3 bits of mantissa is off by 2^-4 at most
    for text in rows.filter(pl.col("part") == "exponents")["histogram"]:
        assert len(json.loads(text)) == 16
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) >= 2 + 2 + 4
    assert figures.describe(figures.draw(found.figure, rows))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_a_scale_puts_the_largest_weight_at_the_largest_number(dtype):
    array = np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32)
    largest = float(ml_dtypes.finfo(dtype).max)
    small, scale = ecf8_cells.rounded(array, dtype, "scaled")
    assert np.abs(small.astype(np.float32)).max() == largest
    assert scale == pytest.approx(largest / np.abs(array).max())
    assert ecf8_cells.rounded(array, dtype, "direct")[1] == 1
    beyond = ecf8_cells.rounded(array * 1e6, dtype, "direct")[0].astype(np.float32)
    assert np.isfinite(beyond).all()


@pytest.mark.parametrize(
    ("dtype", "bias", "bits"), [("float8_e4m3fn", 7, 4), ("float8_e5m2", 15, 5), ("bfloat16", 127, 8)]
)
def test_exponents_are_octaves(dtype, bias, bits):
    values = np.array([1.0, 1.5, -2.0, 3.5, 0.25, 0.0])
    counts = ecf8_cells.exponents(values.astype(ml_dtypes.finfo(dtype).dtype))
    assert len(counts) == 2**bits
    assert {int(e) - bias: int(counts[e]) for e in np.flatnonzero(counts)} == {0: 2, 1: 2, -2: 1, -bias: 1}


def test_only_subnormal_weights_are_coarse(monkeypatch):
    """2^-6 is the smallest normal number of E4M3, and below it they are multiples of 2^-9."""
    fine = np.linspace(2.0**-6, 2.0**-3, 900, dtype=np.float32)
    coarse = np.arange(4, 16, dtype=np.float32)[:, None] * np.float32(2.0**-9 / 4) * np.ones(3, np.float32)
    off = np.abs(np.round(coarse * 2**9) * 2.0**-9 - coarse) > coarse / 16
    monkeypatch.setattr(ecf8_cells, "matrices", lambda *key: {"w": np.concatenate([fine, coarse.reshape(-1)])})
    direct, scaled = (ecf8_cells.array_bits(fixtures.TINY, "f1", 0, "float8_e4m3fn", how, "w")
                      for how in ("direct", "scaled"))  # fmt: skip
    assert direct["coarse"] == pytest.approx(off.sum() / 936)
    assert 0 < off.sum() < 36
    assert scaled["coarse"] == 0


def test_gaussian_weights_by_scale():
    """Within the range of bfloat16 a power of two changes nothing; far below that of E4M3 all is zero."""
    rows = [ecf8_cells.scaled_entropy(20_000, "bfloat16", octave, 0) for octave in (-12, 0, 8)]
    assert len({row["exponent_entropy"] for row in rows}) == 1
    assert {row["subnormal"] for row in rows} == {0}
    lost = ecf8_cells.scaled_entropy(20_000, "float8_e4m3fn", -16, 0)
    assert lost["subnormal"] == 1
    assert lost["exponent_entropy"] == 0
    clipped = ecf8_cells.scaled_entropy(20_000, "float8_e4m3fn", 8, 0)
    assert clipped["clipped"] == pytest.approx(2 * 0.0401, abs=0.006)  # P(|Z| > 448 / 256), four standard errors


def made_up() -> pl.DataFrame:
    """Two seeds of f1 and one other model; entropies of three samples of two alphas."""
    none: dict[str, Any] = dict.fromkeys(("model", "seed", "dtype", "cast", "name", "alpha", "octave"))
    rows = [none | {"part": "every_byte", "dtype": "float8_e4m3fn", "weights": 40_256, "changed": 0}]
    for model, seed, bits in (("f1", 0, 7.0), ("f1", 1, 7.1), ("minilm", 0, 6.9)):
        for cast, less, coarse in (("scaled", 0.0, 0.125), ("direct", 1.0, 0.375)):
            for name, weights in (("small", 100), ("large", 2**16)):
                coded = bits - less
                rows.append(
                    none
                    | {
                        "part": "array",
                        "model": model,
                        "seed": seed,
                        "dtype": "float8_e4m3fn",
                        "cast": cast,
                        "name": name,
                        "weights": weights,
                        "huffman": coded,
                        "gaps": 7.5,
                        "fixed_rate": 7.5,
                        "limit": coded / 1.01,
                        "exponent_entropy": coded / 1.01 - 4,
                        "subnormal": 0.1,
                        "error": 1e-3,
                        "coarse": coarse,
                        "changed": 0,
                    }
                )
    for alpha, entropy, upper in ((1.5, 2.8, 2.32), (2.0, 2.54, 2.67)):
        for seed in range(3):
            rows.append(
                none
                | {
                    "part": "stable",
                    "alpha": alpha,
                    "seed": seed,
                    "upper": upper,
                    "lower": 1.2,
                    "geometric": 1.8,
                    "exponent_entropy": entropy + 0.001 * seed,
                }
            )
    for octave, entropy, subnormal in ((-4, 2.5, 0.0), (0, 2.5, 0.0), (8, 2.1, 0.1)):
        rows.append(
            none
            | {
                "part": "scale",
                "dtype": "bfloat16",
                "octave": octave,
                "seed": 0,
                "clipped": 0.0,
                "exponent_entropy": entropy,
                "subnormal": subnormal,
                "error": 1e-5,
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    expected = {
        "saved": (1 - 7.05 / 8, False),  # two models: the interval is wide
        "saved-large": (1 - 7.1 / 8, True),
        "saved-direct": (1 - 6.05 / 8, False),
        "coarse-direct": (0.25, True),
        "limit": (1.01, True),
        "lossless": (0, True),
        "upper-2": (2.541 - 2.67, True),
        "upper": (2.801 - 2.32, False),
        "lower": (1.2 - 2.541, True),
        "geometric": (0.741, False),
        "concentrated": (2.801, True),
        "scale": (0, True),
    }
    rows = made_up()
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in ecf8.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert verdicts["saved-large"].note == "least of 3: f1, large"
    assert verdicts["upper"].note == "highest: alpha 1.5, 3 samples"


def test_small_matrices_alone_are_not_judged():
    rows = made_up().filter(pl.col("name").is_null() | (pl.col("name") == "small"))
    (claim,) = (claim for claim in ecf8.CLAIMS if claim.id == "saved-large")
    assert judge(claim, rows, scale="default", complete=True).note == "no matrix of 65536 weights"
