"""KIVI and KVQuant: a run at the smallest scale, planted channels, rotated keys, claims that read their rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from experiments.kvcache import fixtures, kivi, kivi_cells
from experiments.kvcache.coupled_cells import TENSORS, weights_of
from experiments.kvcache.kivi_cells import PLANTED, Cell, RotatedKeys, planted, rotated, tensor, tensor_scores
from experiments.lab import figures
from experiments.lab.claims import judge
from hashml.kvcache.calibration import collect
from hashml.kvcache.integer import IntGroup
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.kvquant import kvquant
from hashml.models.decoder import DecoderConfig, decoder_model, forward, param_shapes
from hashml.models.rotary import Rotary

TINY = kivi.SCALES["tiny"]

EXPERIMENT = "kvcache.kivi"
NEEDS = ("wikitext2/valid.txt.gz",)


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    assert rows.filter(pl.col("fixture") != TENSORS)["nll"].is_between(1, 8).all()
    assert rows.filter(pl.col("fixture") == TENSORS)["error"].is_between(0.01, 5).all()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == len(kivi_cells.cells(found.scales["tiny"]))
    assert "axes of scales, equal bytes" in figures.describe(figures.draw(found.figure, rows))


def test_bits_and_bytes_are_those_counted_by_hand(finished):
    """One head of 32 channels, blocks of 8, 48 tokens. A coded token has codes and scales of 2 x 32 values where an
    exact one has them in float16; both have positions, and the cache has what all tokens share."""
    _, rows = finished
    exact = 2 * 64
    blocks = 2 * 32 * 6 // 8  # 2 bits and two float16 numbers for 8 values are 6 bits a value
    bit = 4 + (4 + 4)  # 32 codes, and the range of values
    outlier = 2 * (1 + 2)  # its channel and its value
    expected = {
        ("full", 0, 1): (16.0, 0),
        ("kivi:2", 8, 8): (6.0, 40 * (exact - blocks)),
        ("kivi:2", 16, 8): (6.0, 32 * (exact - blocks)),
        ("kivi:2", 16, 16): (6.0, 32 * (exact - blocks)),
        ("kvquant:1o1", 0, 1): (18 * 8 / 64, 48 * (exact - bit - outlier)),
        ("kvquant:1", 0, 1): (12 * 8 / 64, 48 * (exact - bit)),
    }
    models = rows.filter(pl.col("fixture") != TENSORS)
    assert set(models.select("method", "window", "flush").unique().iter_rows()) == set(expected)
    (most,) = set(models.filter(pl.col("method") == "full")["bytes_per_token"])
    for (method, window, flush), (bits, saved) in expected.items():
        part = models.filter(pl.col("method").eq(method) & pl.col("window").eq(window) & pl.col("flush").eq(flush))
        assert set(part["bits"]) == {bits}, method
        np.testing.assert_allclose(most - part["bytes_per_token"].to_numpy(), saved / 48, err_msg=method)


def test_planted_channels_do_not_change_the_exact_cache(finished):
    """To the precision of its float16 values."""
    _, rows = finished
    loss = {
        fixture: rows.filter(pl.col("fixture").eq(fixture) & pl.col("method").eq("full")).sort("seed")["nll"]
        for fixture in ("f1", PLANTED)
    }
    np.testing.assert_allclose(loss[PLANTED], loss["f1"], rtol=1e-3)


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_planting_keeps_the_function_and_scales_the_keys(pairs):
    """Grouped queries, biases, either convention of pairs: logits of `forward`, and the keys themselves."""
    config = DecoderConfig(vocabulary=11, features=12, layers=2, heads=4, kv_heads=2, head_dim=6, hidden=8,
                           qkv_bias=True, rotary=Rotary(pairs=pairs))  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: 0.5 * rng.normal(size=shape).astype(np.float32),
        param_shapes(config), is_leaf=lambda shape: isinstance(shape, tuple)
    )  # fmt: skip
    chosen = np.array([[[0], [2]], [[1], [1]]])  # [layer, head, pair]
    changed = planted(params, config, chosen, 10)
    tokens = jnp.asarray(rng.integers(0, 11, size=(2, 9)))
    np.testing.assert_allclose(forward(changed, config, tokens), forward(params, config, tokens), atol=2e-5)
    channels = {"half": {0: (0, 3), 1: (1, 4), 2: (2, 5)}, "interleaved": {0: (0, 1), 1: (2, 3), 2: (4, 5)}}[pairs]
    for layer, head in np.ndindex(2, 2):
        ratio = (changed["layers"]["key"] / params["layers"]["key"])[layer, 0].reshape(2, 6)[head]
        expected = np.where(np.isin(np.arange(6), channels[int(chosen[layer, head, 0])]), 10, 1)
        np.testing.assert_allclose(ratio, expected, rtol=1e-6)
        queries = (changed["layers"]["query"] / params["layers"]["query"])[layer, 0].reshape(2, 2, 6)[head]
        np.testing.assert_allclose(queries, np.stack([1 / expected] * 2), rtol=1e-6)


def test_pairs_that_are_planted_are_different_ones():
    decoder = fixtures.setting(kivi.SCALES["default"].size, "f1", "decode").decoder
    pairs = kivi_cells.planted_pairs(kivi.SCALES["default"], decoder, seed=1)
    assert pairs.shape == (4, 4, 2)
    assert pairs.min() >= 0
    assert pairs.max() < 16
    assert (pairs[..., 0] != pairs[..., 1]).all()
    assert len(np.unique(pairs.reshape(16, 2), axis=0)) > 8


# --- rotated keys -------------------------------------------------------------------------------------


def turned(x: np.ndarray, length: int) -> np.ndarray:
    """Pairs ``(i, i + D/2)`` as complex numbers, times e^(i position frequency)."""
    width = x.shape[-1]
    frequency = 10000.0 ** (-np.arange(0, width, 2) / width)
    turn = np.exp(1j * (np.arange(len(x)) % length)[:, None, None] * frequency)
    z = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)


def test_keys_are_turned_to_their_places_in_their_sequences():
    x = np.random.default_rng(0).normal(size=(10, 2, 8)).astype(np.float32)
    found = rotated(Rotary(), x, 5)
    np.testing.assert_allclose(found, turned(x, 5), atol=1e-5)
    np.testing.assert_array_equal(found[::5], x[::5])


@pytest.mark.usefixtures("finished")
def test_ranges_of_rotated_keys_are_theirs():
    """Without outliers they hold all calibration values; what values learn is what they learn beside any keys."""
    size = TINY.size
    learned = kivi_cells.rotated_tables(size, "f1", 1, RotatedKeys(1))
    plain = fixtures.tables(size, "f1", 1, kvquant(1))
    decoder = fixtures.setting(size, "f1", "decode").decoder
    text = fixtures.calibration_text(size, "f1", 1)
    (layer,) = collect(decoder_model(decoder), fixtures.params(size, "f1", 1), [text])
    keys = turned(np.asarray(layer.keys), text.shape[1])
    np.testing.assert_allclose(learned[0].keys["low"], keys.min(axis=0), atol=1e-4)
    np.testing.assert_allclose(learned[0].keys["high"], keys.max(axis=0), atol=1e-4)
    assert np.abs(np.asarray(plain[0].keys["high"]) - keys.max(axis=0)).max() > 1e-2
    np.testing.assert_array_equal(learned[0].values["table"], plain[0].values["table"])


# --- cells ------------------------------------------------------------------------------------------


def test_cells_are_apart_and_axes_are_compared_at_equal_bytes():
    config = kivi.SCALES["default"]
    cells = kivi_cells.cells(config)
    assert len(set(cells)) == len(cells)
    for fixture, group in (("f1", 32), (PLANTED, 32), ("stories", 8)):
        for bits in (2, 4):
            part = [cell for cell in cells if cell.fixture == fixture and cell.method.endswith(f":{bits}")
                    and cell.window == cell.flush == 32 and not cell.weights]  # fmt: skip
            layers = {cell.method: kivi_cells.layers_of(config, cell)[0] for cell in part}
            assert set(layers) == {f"{axes}:{bits}" for axes in kivi_cells.AXES}
            assert layers[f"kivi:{bits}"].key_codec == layers[f"swapped:{bits}"].value_codec == KiviKeys(bits, group)
            assert layers[f"kivi:{bits}"].value_codec == layers[f"token:{bits}"].key_codec == IntGroup(bits, group)
            for layer in layers.values():
                assert (layer.window, layer.flush, layer.slots) == (32, 32, 224)
                for codec in (layer.key_codec, layer.value_codec):
                    assert kivi_cells.value_bits(codec, layer) == bits + 32 / group
    rotated_cells = [cell for cell in cells if cell.rotated]
    assert [kivi_cells.layers_of(config, cell)[0].rope for cell in rotated_cells] == ["write", "write"]
    assert {cell.iterations for cell in cells if cell.method == "coupled:8c8b"} == {10, 100}
    assert {cell.iterations for cell in cells if cell.method.startswith("kvquant")} == {10}


# --- tensors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_errors_are_those_of_fake_quantisation(axis):
    """Minima and scales of 16 tokens of a channel, or of 16 channels of a token; float16 moves them little."""
    x, deviation = tensor(0.9, "scaled", 64, 0, 10)
    blocks = x.astype(np.float64).reshape(4, 16, 16)
    along = {"channel": 1, "token": 2}[axis]
    low, high = blocks.min(along, keepdims=True), blocks.max(along, keepdims=True)
    scale = (high - low) / 3
    error = (np.rint((blocks - low) / scale) * scale + low - blocks) ** 2
    found = tensor_scores(TINY, Cell(TENSORS, f"{axis}:2", correlation=0.9, outliers="scaled"), 0)
    assert found["mse"] == pytest.approx(error.mean(), rel=1e-2)
    assert found["error"] == pytest.approx((error / deviation**2).mean(), rel=1e-2)
    assert found["bits"] == 2 + 32 / 16


def test_a_channels_own_scale_is_blind_to_its_size_and_its_middle():
    """Per channel the error in variances is what it is without outliers, to the rounding of a float16 minimum."""
    kinds = [Cell(TENSORS, "channel:2", correlation=0.9, outliers=kind) for kind in TINY.outliers]
    none, scaled, shifted = (tensor_scores(TINY, cell, 0)["error"] for cell in kinds)
    assert scaled == pytest.approx(none, rel=5e-3)
    assert shifted == pytest.approx(none, rel=5e-3)
    x, deviation = tensor(0.0, "shifted", 20000, 1, 10)
    planted_channels = np.isin(np.arange(16), kivi_cells.OUTLIER_CHANNELS)
    assert (np.abs(x.mean(axis=0) - 10 * planted_channels) < 5 / np.sqrt(20000)).all()
    assert (deviation == 1).all()


# --- claims -----------------------------------------------------------------------------------------


def made_up() -> pl.DataFrame:
    """A loss of 2.0 with the exact cache, all others by hand; seeds are .1 apart in the loss."""
    rows = []

    def add(loss, method, fixture="f1", window=0, flush=None, **other):
        given = {"weights": weights_of(method), "rotated": False, "correlation": None, "outliers": None}
        given["iterations"] = 10 if given["weights"] else None
        measured = {"bits": 2.0, "bytes_per_token": 9.0, "table_bytes": 0, "error": None, "mse": None}
        for seed in range(3):
            rows.append({"fixture": fixture, "method": method, "window": window, "flush": flush or max(window, 1),
                         **given, **other, **measured, "nll": loss * (1 + 0.05 * seed), "seed": seed})  # fmt: skip

    for fixture, kivi_2, token, swapped, channel in (
        ("f1", 2.02, 2.04, 2.01, 1.99), (PLANTED, 2.03, 2.5, 2.6, 2.1), ("stories", 2.1, 2.0, 2.3, 2.1),
    ):  # fmt: skip
        add(2.001 if fixture == PLANTED else 2.0, "full", fixture)
        for name, loss in (("kivi", kivi_2), ("token", token), ("swapped", swapped), ("channel", channel)):
            add(loss, f"{name}:2", fixture, 32)
            add(2.0 + (loss - 2.0) / 10, f"{name}:4", fixture, 32)
    for window, blocks, whole in ((64, 2.015, 2.018), (128, 2.017, 2.05)):
        add(blocks, "kivi:2", window=window, flush=32)
        add(whole, "kivi:2", window=window)
    for name, loss in (("1", 2.9), ("1o1", 2.4), ("2", 2.2), ("2o1", 2.25), ("3", 2.1), ("3o1", 2.05)):
        add(loss, f"kvquant:{name}")
    add(2.8, "kvquant:1", weights="uniform")
    add(2.3, "kvquant:2", weights="uniform")
    add(2.3, "kvquant:2", rotated=True)
    add(2.2, "kvquant:3", rotated=True)
    add(2.01, "kvquant:2", window=32)
    add(2.01, "kvquant:3o1", window=32)
    add(2.4, "token:2")
    for iterations, four, eight in ((10, 2.1, 2.5), (100, 2.09, 2.4)):
        add(four, "coupled:4c8b", iterations=iterations)
        add(eight, "coupled:8c8b", iterations=iterations)
    nothing = dict.fromkeys(rows[0]) | {"fixture": TENSORS, "rotated": False, "correlation": 0.9, "bits": 4.0}
    for kind, channel, token in (("none", 0.1, 0.08), ("scaled", 0.1, 1.0), ("shifted", 0.1, 0.3)):
        for axis, error, more in (("channel", channel, 2), ("token", token, 1)):
            rows += [
                {**nothing, "method": f"{axis}:2", "outliers": kind, "seed": seed, "error": error * (1 + 0.01 * seed),
                 "mse": error * more}
                for seed in range(3)
            ]  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    rows = made_up()
    expected = {
        "planted-exact": (0.0005, True),
        "planted-token": (2.003 / 2.05 - 1, True),
        "planted-swapped": (2.003 / 2.06 - 1, True),
        "planted-kivi": (2.03 / 2.02 - 1, True),
        "f1-token": (2.02 / 2.04 - 1, True),
        "f1-swapped": (2.02 / 2.01 - 1, False),
        "f1-values": (1.99 / 2.02 - 1, False),
        "stories-token": (0.05, False),
        "stories-swapped": (2.1 / 2.3 - 1, True),
        "stories-values": (0.0, True),
        "kivi-2": (0.01, True),
        "kivi-4": (0.001, True),
        "tensor-keys": (3.0, False),
        "tensor-keys-plain": (1.5, True),
        "tensor-values": (1.25, True),
        "residual-window": (2.017 / 2.015 - 1, False),
        "residual-flush": (2.05 / 2.017 - 1, False),
        "outlier-1": (2.4 / 2.9 - 1, True),
        "outlier-2": (2.25 / 2.2 - 1, False),
        "outlier-3": (2.05 / 2.1 - 1, True),
        "nonuniform-int2": (2.2 / 2.4 - 1, True),
        "nonuniform-kivi-2": (2.01 / 2.02 - 1, True),
        "nonuniform-kivi-4": (2.01 / 2.002 - 1, True),
        "coupled-1": (2.5 / 2.4 - 1, False),
        "coupled-2": (2.1 / 2.25 - 1, True),
        "rotation": (2.2 / 2.3 - 1, True),
        "fisher": (2.9 / 2.8 - 1, False),
        "lloyd": (2.5 / 2.4 - 1, False),
    }
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in kivi.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert "window 128" in verdicts["residual-window"].note
    assert "shifted" in verdicts["tensor-keys"].note


def test_the_figure_draws_all_of_it():
    drawn = figures.draw(kivi.figure, made_up())
    assert len(drawn.axes) == 4
    said = figures.describe(drawn)
    for label in (
        "both per channel, 4 bits",
        "32 leave together",
        "rotated keys",
        "KIVI, window",
        "per token, 2 bits",
    ):
        assert label in said


def test_cells_of_the_claims_are_those_of_the_default():
    """At another scale a claim of a window or of bits may find no rows, here it must."""
    config = kivi.SCALES["default"]
    keys = [dataclasses.asdict(cell) for cell in kivi_cells.cells(config)]
    rows = pl.DataFrame(
        [{**key, "seed": seed, "nll": 2.0, "error": 0.1, "mse": 0.1} for key in keys for seed in range(3)],
        infer_schema_length=None,
    )
    for claim in kivi.CLAIMS:
        assert claim.measure(rows).low <= 1
