"""The lookup-table GEMM's experiment: a run at the smallest scale, peers that compute the same, claims."""

from typing import Any

import jax
import numpy as np
import polars as pl
import pytest

from experiments.lab import NotEnoughRows, figures
from experiments.lab.claims import judge
from experiments.weights import lut_gemm, lut_gemm_cells, lut_gemm_timing
from hashml.weights import lut_gemm_native
from hashml.weights.lut_gemm import lsq_codes, lsq_levels

EXPERIMENT = "weights.lut_gemm"


@pytest.fixture(scope="module", autouse=True)
def native():
    """The library in the user's cache, before a run has another one."""
    lut_gemm_native.available()


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    exact = rows.filter(pl.col("part") == "exact")
    assert exact.filter(pl.col("book") != "normal quantiles")["differing"].sum() == 0
    assert set(exact["row_bytes"]) == {8}  # 30 codes of 2 bits
    nets = rows.filter(pl.col("part") == "accuracy")
    assert set(nets["method"]) == {"float32", "lsq", "rounded"}
    assert nets.filter(pl.col("method") == "float32")["accuracy"].to_numpy().mean() > 0.3  # of ten classes
    lsq = nets.filter(pl.col("method") == "lsq")
    assert (lsq["logit_error"] < 1e-4).all()
    assert (lsq["changed"] == 0).all()
    assert (lsq["table_accuracy"] == lsq["accuracy"]).all()
    timed = rows.filter(pl.col("part") == "time")
    assert (timed["seconds"] > 0).all()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    said = " ".join(found.table(rows)["what"])
    assert all(method in said for method in ("int8", "lsq", "dense_float32", "xla_byte_tables"))
    assert figures.describe(figures.draw(found.figure, rows))


@pytest.mark.parametrize("given", lut_gemm_timing.INPUTS)
def test_what_is_timed_computes_the_same_product(given):
    shape = (2, 64, 64)
    x = np.abs(np.random.default_rng(64).standard_normal((2, 64), dtype=np.float32))
    functions = lut_gemm_timing.methods(given, shape)
    assert list(functions) == lut_gemm_timing.method_names(given, shape)
    codes = np.asarray(lsq_codes(x, lut_gemm_timing.STEP, 2, signed=False)).astype(int)
    generator = np.random.default_rng(64)
    generator.standard_normal((2, 64), dtype=np.float32)
    w = lsq_levels(2, signed=True)[generator.integers(0, 4, (64, 64))].astype(int)
    sums = codes @ w.T
    for name, function in functions.items():
        if name.startswith("torch"):
            continue  # of int8 they have ranges of their own
        got = np.asarray(jax.block_until_ready(function()))
        if given == "codes":
            np.testing.assert_array_equal(got, sums, name)
        elif name == "dense_float32":
            np.testing.assert_allclose(got, x @ w.T, rtol=1e-4, atol=1e-4)
        elif name == "dense_int8":
            steps = np.round(x / np.float32(lut_gemm_timing.STEP)).astype(int)
            np.testing.assert_allclose(got, 0.1 * lut_gemm_timing.STEP * (steps @ w.T), rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_allclose(got, 0.1 * lut_gemm_timing.STEP * sums, rtol=1e-5, atol=1e-5, err_msg=name)


def test_books_are_evenly_spaced_or_not():
    for bits in (2, 3, 4):
        books = lut_gemm_cells.books(bits)
        for name, (a, w) in books.items():
            assert len(a) == len(w) == 2**bits
            even = len(set(np.diff(a.astype(float)))) == len(set(np.diff(w.astype(float)))) == 1
            assert even == (name in ("step sizes", "shifted"))
        assert books["normal quantiles"][0].dtype == np.float32


def made_up() -> pl.DataFrame:
    """Nets of three seeds; seconds in which the peers take known multiples of the tables' time."""
    rows: list[dict[str, Any]] = []
    for bits in (2, 3, 4):
        for book, differing, error in (("step sizes", 0, 0.0), ("normal quantiles", 9, 1e-7)):
            rows.append({"part": "exact", "book": book, "bits": bits, "differing": differing, "error": error,
                         "columns": 30, "row_bytes": -(-30 * bits // 8)})  # fmt: skip
    for data in ("digits", "fashion_mnist"):
        for seed in range(3):
            for method, bits, accuracy in (("float32", 32, 0.97), ("lsq", 2, 0.96), ("rounded", 2, 0.5),
                                           ("lsq", 3, 0.95), ("lsq", 4, 0.969)):  # fmt: skip
                rows.append({"part": "accuracy", "data": data, "method": method, "bits": bits, "seed": seed,
                             "accuracy": accuracy + 0.001 * seed, "changed": 0.0})  # fmt: skip
    seconds = {"tables": 1.0, "paper": 2.0, "torch_qnnpack": 5.0, "torch_fbgemm": 1.5, "torch_onednn": 1.2,
               "dense_float32": 6.0, "torch_float32": 3.0, "dense_int8": 4.0, "xla_byte_tables": 5.0}  # fmt: skip
    for cores, factor in (("one", 1.0), ("all", 0.5)):
        for given, more in (("codes", 0.0), ("floats", 0.4)):
            for m, n, k in ((16, 1024, 1024), (1, 4096, 4096)):
                for method, own in seconds.items():
                    slower = 2 if method == "torch_qnnpack" and m == 1 else 1
                    rows += [
                        {"part": "time", "cores": cores, "given": given, "m": m, "n": n, "k": k, "method": method,
                         "repetition": at, "seconds": (own * slower + more) * factor * (1 + at)}
                        for at in range(6)
                    ]  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    expected = {
        "exact": (0, True),
        "exact-floats": (1e-7, True),
        "bytes": (1, True),
        "digits-2": (-1, True),
        "digits-3": (-2, False),
        "digits-4": (-0.1, True),
        "fashion_mnist-2": (-1, True),
        "beats-rounding": (46, True),
        "same-answers": (0, True),
        "paper-qnnpack": (5, True),
        "paper-int8": (0.6, False),
        "tables-qnnpack": (10, True),
        "tables-int8": (1.2, False),
        "gemv-one": (3.4 / 1.4, True),
        "gemv-all": (3.4 / 1.4, True),
        "gemv-int8": (1.6 / 1.4, True),
        "sums-of-products": (2, True),
        "xla-tables-float32": (1.2, False),
        "xla-tables-int8": (0.8, True),
        "packing": (1.4, True),
    }
    rows = made_up()
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in lut_gemm.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert verdicts["paper-qnnpack"].note == "at 1 x 4096 x 4096, 6 repetitions"
    claims = {claim.id: claim for claim in lut_gemm.CLAIMS}
    with pytest.raises(
        NotEnoughRows, match="torch_fbgemm and torch_onednn was not timed here at 1 x 4096 x 4096, cores: one"
    ):
        claims["gemv-int8"].measure(rows.filter(~pl.col("method").str.starts_with("torch")))
    with pytest.raises(NotEnoughRows, match="tables was not timed here"):
        claims["tables-qnnpack"].measure(rows.filter(pl.col("method") != "tables"))
