"""SketchTune's experiment: a run at the smallest scale, equal floats and bytes, claims that read the right rows."""

import dataclasses

import jax
import numpy as np
import polars as pl
import pytest

from experiments.lab import figures
from experiments.lab.claims import judge
from experiments.weights import compressed_models as models
from experiments.weights import sketch_tune, sketch_tune_cells
from experiments.weights.sketch_tune_cells import Config, rank_of
from hashml.models.decoder import forward, init_params
from hashml.weights.quantize_model import dequantize_params
from hashml.weights.quantized import preset

EXPERIMENT = "weights.sketch_tune"
NEEDS = ("wikitext2/valid.txt.gz", "wikitext2/test.txt.gz", "tiny_shakespeare/input.txt.gz")


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    assert np.isfinite(rows["nll"].to_numpy()).all()
    tuned = rows.filter(pl.col("part") == "tuned")
    assert set(tuned["method"]) == set(sketch_tune.TITLES) - {"kernels"}
    assert tuned.filter(pl.col("method") != "full")["at_the_edge"].any() is False
    sizes = {(row["method"], row["groups"]): row for row in tuned.iter_rows(named=True)}
    # 332 rows and 25,120 weights of 2 bits; 4 floats a row and table; 610 floats a rank.
    assert sizes["sketch", 1]["trained_floats"] == sizes["rtn", 1]["trained_floats"] == 332 * 4
    assert sizes["sketch", 1]["kernel_bytes"] == _code_bytes(2) + 332 * 4 * 2
    assert sizes["qlora", 1]["trained_floats"] == 3 * 610
    assert sizes["qlora", 1]["kernel_bytes"] == _code_bytes(2) + 332 * 3 + 3 * 610 * 2
    assert sizes["frozen", 1]["kernel_bytes"] == _code_bytes(2) + 332 * 4 * 2 + 3 * 610 * 2
    assert sizes["qlora_bytes", 1]["rank"] == 1
    assert sizes["qlora_bytes", 1]["kernel_bytes"] <= sizes["sketch", 1]["kernel_bytes"]
    assert sizes["full", None]["kernel_bytes"] == 2 * WEIGHTS
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == len(sketch_tune_cells.cells(found.scales["tiny"]))
    assert figures.describe(figures.draw(found.figure, rows))


WEIGHTS = 4 * 32 * 32 + 3 * 32 * 86


def _code_bytes(bits: int) -> int:
    """5 kernels of 32 columns, with 4 * 32 and 2 * 86 rows; one of 86 columns, whose rows end in half a byte."""
    return (4 * 32 + 2 * 86) * 32 * bits // 8 + 32 * -(-86 * bits // 8)


def test_adapters_have_as_many_floats_and_bytes_as_is_said():
    """Of f1 at the default scale: 1,328 rows a layer, 2,440 floats a rank and layer."""
    config = Config()
    assert models.floats_of_a_rank(models.decoder_config(config.size)) == 4 * 2440
    for bits in config.bits:
        tables = 1328 * 2**bits
        rank = rank_of(config, "qlora", bits)
        assert 2440 * (rank - 1) < tables <= 2440 * rank
        fitting = rank_of(config, "qlora_bytes", bits)
        assert fitting >= 1
        assert 3 * 1328 + 2 * 2440 * fitting <= 2 * tables < 3 * 1328 + 2 * 2440 * (fitting + 1)
    assert rank_of(config, "lora", None) == rank_of(config, "qlora", 4)


@pytest.fixture(scope="module")
def small():
    """A drawn model on an even grid, its decoded weights and a batch."""
    config = models.decoder_config(sketch_tune.SCALES["tiny"].size)
    params = init_params(jax.random.key(0), config)
    coded = {name: models._rounded(leaf, preset("rtn", 2)) for name, leaf in models.kernels(params, config).items()}
    tokens = np.random.default_rng(0).integers(0, 257, (4, 2, 10)).astype(np.int32)
    return models.with_kernels(params, coded), config, tokens


def test_decoded_weights_give_the_numbers_of_codes(small):
    params, config, tokens = small
    np.testing.assert_allclose(
        forward(params, config, tokens[0]), forward(dequantize_params(params), config, tokens[0]), atol=1e-4
    )


def test_adapters_start_from_nothing_and_padding_stays(small):
    params, config, tokens = small
    dense = dequantize_params(params)
    adapters = models.draw_adapters(jax.random.key(0), dense, config, 2, 5)
    tuned = models.tune(models.adapted_loss, adapters, dense, tokens, 1e-2, config, 2)
    for name, (down, up) in tuned.items():
        first, zero = adapters[name]
        assert not np.asarray(zero).any()
        for padded in (down[..., 2:], up[:, 2:]):
            np.testing.assert_array_equal(padded, 0)
        assert np.abs(down[..., :2] - first[..., :2]).max() > 0
        assert np.abs(up[:, :2]).max() > 0
    np.testing.assert_allclose(
        forward(models.with_adapters(dense, tuned), config, tokens[0]),
        forward(models.merged(dense, models.cut(tuned, 2)), config, tokens[0]),
        atol=1e-4,
    )


def quadratic(trained, frozen, tokens, config):
    """Its gradient is ``4 (trained - frozen) mean(tokens)`` in one coordinate, longer than 1 at first."""
    return 2 * ((trained["x"] - frozen) ** 2).sum() * tokens.mean()


def test_tuning_is_adam_with_a_warm_up_and_a_decay(small):
    """By a loop in NumPy; the number of steps of a program changes nothing."""
    _, config, _ = small
    tokens = np.random.default_rng(0).integers(1, 4, (20, 1, 2)).astype(np.int32)
    x, target = np.array([1.0, -2.0]), np.array([0.5, 1.0])
    first, second = np.zeros(2), np.zeros(2)
    for step, batch in enumerate(tokens):
        gradient = 4 * (x - target) * batch.mean()
        gradient = gradient / max(1.0, np.sqrt((gradient**2).sum()))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        x = x - 0.3 * min((step + 1) / 2, (20 - step) / 18) * mean / (np.sqrt(square) + 1e-8)
    began = {"x": np.array([1.0, -2.0], np.float32)}
    for chunk in (5, 20):
        found = models.tune(quadratic, began, target.astype(np.float32), tokens, 0.3, config, chunk)
        np.testing.assert_allclose(found["x"], x, rtol=1e-3)
    with pytest.raises(ValueError, match="chunk is 3; it must divide the 20 steps"):
        models.tune(quadratic, began, target, tokens, 0.3, config, 3)


def made_up() -> pl.DataFrame:
    """Three models; each loss is a base that differs by model, and what a method adds."""
    added = {
        ("grid", "dense", None, None): 0.0,
        ("tuned", "full", None, None): 0.0,
        ("tuned", "kernels", None, None): 0.01,
        ("tuned", "lora", None, None): 0.12,
    }
    for bits in (4, 3, 2):
        worse = (4 - bits) * 0.1
        added |= {
            ("grid", "rtn", bits, 1): 0.2 + 6 * worse,
            ("grid", "kmeans", bits, 1): 0.15 + worse,
            ("grid", "sketch", bits, 1): 0.1 + worse,
            ("grid", "sketch", bits, 4): 0.05 + worse,
            ("tuned", "sketch", bits, 1): 0.05 + worse,
            ("tuned", "sketch", bits, 4): 0.02 + worse,
            ("tuned", "qlora", bits, 1): 0.08 + worse,
            ("tuned", "frozen", bits, 1): 0.04 + worse,
        }
    for bits in (3, 2):
        worse = (4 - bits) * 0.1
        added |= {("tuned", "rtn", bits, 1): 0.2 + worse, ("tuned", "kmeans", bits, 1): 0.15 + worse,
                  ("tuned", "qlora_bytes", bits, 1): 0.1 + worse}  # fmt: skip
    rows = []
    for (part, method, bits, groups), nats in added.items():
        stored = {"sketch": 1000, "qlora_bytes": 950}.get(method, 2000)
        for seed in range(3):
            noise = 1e-4 * seed * len(method)
            own = {"part": part, "method": method, "bits": bits, "groups": groups, "seed": seed}
            rows.append(own | {"nll": 2 + seed + nats + noise, "base_nll": 1.5 + seed + nats + noise,
                               "kernel_bytes": stored, "trained_floats": 5, "rank": None, "learning_rate": 0.01,
                               "at_the_edge": False})  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    expected = {
        "sketch-rtn": (-0.1, True),
        "gap-2": (1.4, True),
        "qlora-floats": (-0.03, True),
        "qlora-bytes": (-0.05, True),
        "equal-bytes": (0.95, True),
        "full": (0.02, True),
        "lora": (-0.07, True),
        "frozen": (0.01, False),
        "even-grid": (-0.15, True),
        "plain-k-means": (-0.1, True),
        "groups": (-0.03, True),
    }
    verdicts = {claim.id: judge(claim, made_up(), scale="default", complete=True) for claim in sketch_tune.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, abs=2e-3), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert verdicts["sketch-rtn"].note == "worst: 4 bits, 3 pairs"


def test_a_missing_contender_is_not_judged():
    rows = made_up().filter(pl.col("method") != "frozen")
    (claim,) = (claim for claim in sketch_tune.CLAIMS if claim.id == "frozen")
    assert judge(claim, rows, scale="default", complete=True).note == "no rows of frozen, bits 4, groups 1"


def test_scales_divide():
    for scale in sketch_tune.SCALES.values():
        assert scale.steps % scale.search_steps == 0
        assert dataclasses.is_dataclass(scale)
