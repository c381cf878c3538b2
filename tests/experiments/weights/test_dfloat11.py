"""DFloat11's experiment: a run at the smallest scale, what is counted, claims that read the right rows."""

import dataclasses
import json
import sys
from typing import Any

import ml_dtypes
import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save_file

from experiments.kvcache import fixtures
from experiments.lab import figures
from experiments.lab.claims import judge
from experiments.weights import dfloat11, dfloat11_cells, trained_weights
from hashml.coding import huffman_native

EXPERIMENT = "weights.dfloat11"
NEEDS = ("wikitext2/valid.txt.gz",)


@pytest.fixture(scope="module", autouse=True)
def native():
    """The library in the user's cache, before a run has another one for its models."""
    huffman_native.available()


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    arrays = rows.filter(pl.col("part") == "array")
    assert (arrays["limit"] == 8 + arrays["exponent_entropy"]).all()  # bfloat16's symbols are its exponents
    for coder in dfloat11_cells.CODERS:
        assert (arrays[coder] >= arrays["limit"] - 1e-12).all()
    assert (arrays["mean_length"] >= arrays["exponent_entropy"] - 1e-12).all()
    assert (arrays["mean_length"] < arrays["exponent_entropy"] + 1).all()
    assert rows["changed"].drop_nulls().sum() == 0
    control = arrays.filter(pl.col("model") == "control")
    ((coder, bits),) = control.filter(pl.col("name") == "random_bits").select("chosen", "huffman").rows()
    assert (coder, bits) == ("raw", 16)
    assert 8 < control.filter(pl.col("name") == "ones")["huffman"].item() < 9
    blocks = rows.filter(pl.col("part") == "block")
    assert (blocks["limit"] <= blocks["joint_limit"]).all()
    histogram = json.loads(rows.filter(pl.col("part") == "exponents")["histogram"].item())
    matrices = arrays.filter(pl.col("model").eq("f1") & pl.col("dimensions").eq(2))
    assert sum(histogram.values()) == matrices["weights"].sum()
    assert set(rows.filter(pl.col("part") == "decode")["method"]) >= {"numpy", "xla", "zlib", "copy"}
    assert (rows["seconds"].drop_nulls() > 0).all()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert found.table(rows)["what"].n_unique() == len(found.table(rows))
    assert figures.describe(figures.draw(found.figure, rows))


def test_float16_counts_its_exponents_apart_from_its_symbols(monkeypatch):
    """A symbol holds three bits of the mantissa: all of them occur here, beside two exponents."""
    array = np.array([1 + i / 8 for i in range(8)] + [2 + i / 4 for i in range(8)] * 3, np.float32)
    monkeypatch.setattr(dfloat11_cells, "model_arrays", lambda *key: {"w": array})
    row = dfloat11_cells.array_bits(fixtures.TINY, "f1", 0, "float16", "w")
    assert row["exponents"] == 2
    assert row["exponent_entropy"] == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))
    assert row["limit"] == pytest.approx(11 - (0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))
    assert row["changed"] == 0


def test_codecs_of_bytes_give_the_array_back():
    array = np.random.default_rng(0).standard_normal((30, 41)).astype(ml_dtypes.bfloat16)
    assert dfloat11_cells.planes(array)[:1230] == bytes(array.reshape(-1).view(np.uint8)[0::2])
    for codec in dfloat11_cells.BYTES:
        if not dfloat11_cells.has_peer(codec):
            continue
        compress, back = dfloat11_cells.byte_codec(codec, array)
        assert dfloat11_cells.differing(back(compress()), array) == 0, codec
        assert 0 < dfloat11_cells.byte_size(codec, array) <= array.nbytes


def test_differing_counts_bits_and_not_values():
    wanted = np.array([0.0, 1.0, np.nan, 2.0], np.float32)
    assert dfloat11_cells.differing(wanted.copy(), wanted) == 0
    assert dfloat11_cells.differing(np.array([-0.0, 1.0, np.nan, 2.0], np.float32), wanted) == 1


def test_the_encoders_file_is_found_without_an_import(tmp_path, monkeypatch):
    monkeypatch.setattr(trained_weights, "_PACKAGE", "an_encoder_of_this_test")
    assert trained_weights.minilm_file() is None
    assert trained_weights.present(("minilm", "f1"), 2) == [("f1", 0), ("f1", 1)]
    with pytest.raises(FileNotFoundError, match="the package an_encoder_of_this_test is not installed"):
        trained_weights.shapes(fixtures.TINY, "minilm")
    package = tmp_path / "an_encoder_of_this_test"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = {"encoder.layer.3.w": weights, "ids": np.arange(3)}
    save_file(tensors, package / "model" / "model.safetensors")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert trained_weights.present(("minilm",), 2) == [("minilm", 0)]
    assert trained_weights.shapes(fixtures.TINY, "minilm") == {"encoder.layer.3.w": (2, 3)}
    np.testing.assert_array_equal(trained_weights.arrays(fixtures.TINY, "minilm", 0)["encoder.layer.3.w"], weights)
    assert [trained_weights.layer_of(name) for name in ("encoder.layer.3.w", "layers.12.up", "norm")] == [3, 12, None]
    config = dataclasses.replace(dfloat11.SCALES["tiny"], models=("minilm",))
    methods = {key["method"] for part, key, _ in dfloat11._trials(config) if part == "decode"}
    assert {"numpy", "zlib"} <= methods


def made_up() -> pl.DataFrame:
    """Two models: of f1 three seeds of 100 weights in a matrix and 10 in a norm, of the other one."""
    none: dict[str, Any] = dict.fromkeys(("seed", "name", "method", "tokens", "repetition"))
    rows = []
    models = [("f1", seed, 10.6 + 0.01 * seed) for seed in range(3)] + [("stories", 0, 10.65)]
    for model, seed, bits in models:
        own = none | {"part": "array", "model": model, "seed": seed, "changed": 0}
        for name, weights, coded in (("w", 100, bits), ("norm", 10, 16.0)):
            for dtype, more in (("bfloat16", 0.0), ("float16", 3.0)):
                rows.append(
                    own
                    | {
                        "dtype": dtype,
                        "name": name,
                        "weights": weights,
                        "huffman": min(16.0, coded + more),
                        "gaps": min(16.0, coded + more + 0.3),
                        "fixed_rate": 16.0,
                        "limit": coded - 0.1,
                        "exponent_entropy": 2.5,
                        "mean_length": 2.6,
                        "chosen": "huffman",
                        "zlib": 12.0,
                        "zlib_planes": 11.5,
                        "zstd": 12.0,
                        "zstd_planes": 11.0,
                        "zipnn": 10.5,
                    }
                )
        rows.append(
            none
            | {
                "part": "logits",
                "model": model,
                "seed": seed,
                "dtype": "bfloat16",
                "logits": 7,
                "changed": int(model == "stories"),
            }
        )
        rows.append(
            none
            | {
                "part": "block",
                "model": model,
                "seed": seed,
                "name": "layer 0",
                "weights": 100,
                "apart": bits,
                "joint": 10.64,
                "reference": 11.0,
            }
        )
    control = none | {"part": "array", "model": "control", "seed": 0, "dtype": "bfloat16", "weights": 9, "changed": 0}
    rows.append(control | {"name": "random_bits", "huffman": 16.0, "chosen": "raw"})
    for at in range(11):
        timed = none | {"dtype": "bfloat16", "repetition": at}
        for content, rate in (("gaussian", 2.0), ("minilm", 0.4 + 0.02 * at)):
            rows.append(
                timed
                | {
                    "part": "decode",
                    "model": content,
                    "method": "native",
                    "bytes": 1000,
                    "changed": 0,
                    "seconds": 1e-6 / rate,
                    "bits": 10.6,
                    "cores": 1.0,
                }
            )
        for tokens, dense in ((16, 1.0), (4096, 100.0)):
            for method, seconds in (("dense", dense), ("compressed", dense + 3 + tokens / 4096), ("decode", 3.0)):
                rows.append(
                    timed
                    | {
                        "part": "forward",
                        "model": "f1",
                        "tokens": tokens,
                        "method": method,
                        "seconds": seconds + 0.1 * at,
                    }
                )
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    rows = made_up()

    def whole(bits: float) -> float:
        return (100 * bits + 160) / 110

    expected = {
        "size": (whole(10.65) / 16, True),
        "limit": (whole(10.6) / (whole(10.6) - 0.1), True),
        "entropy": (2.5, True),
        "weights": (0, True),
        "logits": (1, False),
        "layout": (whole(10.65) / (whole(10.65) + 30 / 110), True),
        "code-for-each": (10.65 / 10.64, False),
        "bytes": (whole(10.65) / 11, False),
        "zipnn": (whole(10.65) / 10.5, False),
        "random-bits": (1, True),
        "float16": ((16 - whole(13.6)) / (16 - whole(10.6)), True),
        "decode": (0.5, False),
        "few-tokens": ((4 + 16 / 4096 + 0.5) / 1.5, False),
        "many-tokens": (104.5 / 100.5, True),
        "constant": (4 / (3 + 16 / 4096), True),
    }
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in dfloat11.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, rel=2e-3), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert verdicts["size"].note == "worst: stories, counted"
    assert verdicts["limit"].note == "worst: f1, 3 models"
    assert verdicts["decode"].note == "minilm, 1.00 cores, 11 repetitions"


def test_a_changed_weight_is_not_lossless():
    changed = made_up().with_columns(changed=pl.when(pl.col("part") == "decode").then(1).otherwise("changed"))
    (claim,) = (claim for claim in dfloat11.CLAIMS if claim.id == "weights")
    assert judge(claim, changed, scale="default", complete=True).verdict == "fails"


def test_without_peers_claims_about_them_are_not_judged_and_the_table_says_so():
    rows = made_up().with_columns(zipnn=pl.lit(None, pl.Float64))
    (claim,) = (claim for claim in dfloat11.CLAIMS if claim.id == "zipnn")
    assert judge(claim, rows, scale="default", complete=True).note == "zipnn was not installed where this ran"
    said = dfloat11.table(rows.with_columns(zstd=pl.lit(None, pl.Float64)))["what"].to_list()
    assert "zipnn was not installed where this ran" in said
    assert "zlib was not installed where this ran" not in said
