"""Coupled quantisation: a run at the smallest scale, theory of the Gaussian tensors, claims that read their rows."""

import dataclasses

import jax
import numpy as np
import polars as pl
import pytest

from experiments.data import language
from experiments.kvcache import coupled, coupled_cells, fixtures, language_models, recall
from experiments.kvcache.coupled_cells import TENSORS, Cell, correlated, shannon_limit, tensor_scores
from experiments.lab import figures
from experiments.lab.claims import judge
from hashml.kvcache.calibration import calibrate_coupled
from hashml.kvcache.coupled import Coupled
from hashml.models.decoder import decoder_model, forward, init_params

TINY = coupled.SCALES["tiny"]

EXPERIMENT = "kvcache.coupled"
NEEDS = ("wikitext2/valid.txt.gz",)


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    of_models = rows.filter(pl.col("fixture") == "f1")
    assert of_models["nll"].is_between(1, 8).all()
    assert rows.filter(pl.col("fixture") == TENSORS)["mse"].is_between(0.05, 0.5).all()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == len(coupled_cells.cells(found.scales["tiny"]))
    assert "Gaussian tensors" in figures.describe(figures.draw(found.figure, rows))


def test_bits_and_bytes_are_those_counted_by_hand(finished):
    """One head of 32 channels, 48 tokens, no window: keys and values of a token, its position, and 24 bytes that the
    whole cache shares. Books are of 32 / c groups of 2^b centroids of c float16 values, for keys and for values."""
    _, rows = finished
    expected = {"coupled:4c4b": (1.0, 2 * 4 + 4, 2 * 8 * 16 * 4 * 2), "int2": (3.0, 2 * (8 + 4) + 4, 0),
                "full": (16.0, 2 * 64 + 4, 0)}  # fmt: skip
    for method, (bits, per_token, books) in expected.items():
        part = rows.filter(pl.col("method").eq(method) & pl.col("fixture").eq("f1"))
        assert set(part["bits"]) == {bits}, method
        assert set(part["table_bytes"]) == {books}, method
        np.testing.assert_allclose(part["bytes_per_token"], per_token + 24 / 48, err_msg=method)


def test_uniform_books_know_no_gradient(finished):
    """They are those that the library learns without Fisher weights, in a file of their own."""
    codec = Coupled(4, 4)
    size = TINY.size
    books = {
        fisher: fixtures.tables(size, "f1", 1, (codec, codec), fisher=fisher)[0].keys["codebook"]
        for fisher in (True, False)
    }
    text = language.sequences(language.splits(language_models.F1.text).train, size.length, size.calibration)
    model = decoder_model(fixtures.text_recipe(size, "f1").decoder)
    params = fixtures.params(size, "f1", 1)
    direct = calibrate_coupled(
        jax.random.key(1), model, params, [text], codec, codec, fisher=False, iterations=size.lloyd
    )
    np.testing.assert_array_equal(books[False], direct[0].keys["codebook"])
    assert np.abs(np.asarray(books[True]) - np.asarray(books[False])).max() > 1e-3


def test_the_loss_of_answers_is_that_of_the_questions(monkeypatch):
    """The exact cache, which holds float16, against the model without any; parameters as they are before training."""
    decoder = recall.RECALL.decoder
    params = init_params(jax.random.key(0), decoder)
    monkeypatch.setattr(fixtures, "params", lambda *_: params)
    config = dataclasses.replace(TINY, seeds=1)
    (row,) = coupled_cells.scores(config, Cell("recall", "full", None, 0, None))
    data = recall.held_out(config.size.recall_rows)
    said = np.asarray(jax.nn.log_softmax(forward(params, decoder, jax.numpy.asarray(data.tokens))))
    final = np.arange(recall.QUESTIONS, recall.LENGTH, 2)
    rows = np.arange(len(said))[:, None]
    assert row["answer_nll"] == pytest.approx(-said[rows, final, data.targets[:, final]].mean(), abs=2e-3)
    assert row["nll"] is None


def test_cells_are_apart_and_every_claim_has_its_own():
    config = coupled.SCALES["default"]
    cells = coupled_cells.cells(config)
    assert len(set(cells)) == len(cells)
    assert config.window == coupled.WINDOW
    at_once = {(cell.method, cell.weights) for cell in cells if cell.fixture == "f1" and cell.window == 0}
    assert {(name, weights) for name in coupled.ONE_BIT for weights in ("fisher", "uniform")} < at_once
    assert {(name, "fisher") for name in coupled.TWO_BITS} < at_once
    assert [cell.window for cell in cells if cell.method == "kivi:2"] == [32]
    assert {cell.method for cell in cells if cell.fixture == TENSORS} == set(coupled.ONE_BIT)
    # A bit a value is a bit a value, however many channels share it.
    for name in (*coupled.ONE_BIT, *coupled.TWO_BITS):
        codec = Coupled.named(name.removeprefix("coupled:"))
        assert codec.bits / codec.channels == (1 if name in coupled.ONE_BIT else 2)


# --- Gaussian tensors -------------------------------------------------------------------------------


def test_channels_are_correlated_as_asked():
    rows = 20000
    for correlation in (0.0, 0.9):
        x = correlated(correlation, rows, seed=3).astype(np.float64)
        places = np.arange(16)
        expected = correlation ** np.abs(places[:, None] - places)
        # The product of two Gaussians of correlation r has variance 1 + r^2.
        error = np.sqrt((1 + expected**2) / rows)
        assert (np.abs(x.T @ x / rows - expected) < 5 * error).all()


@pytest.mark.parametrize(
    ("correlation", "channels", "expected"),
    [
        (0.0, 1, 0.25),
        (0.0, 8, 0.25),
        (0.5, 2, 0.25 * 0.75**0.5),  # both eigenvalues, 1.5 and .5, are above the level
        (0.9, 2, (1.9 / 16 + 0.1) / 2),  # all 2 bits go to the eigenvalue 1.9, and .1 is kept whole
    ],
)
def test_shannons_limit_in_closed_form(correlation, channels, expected):
    assert shannon_limit(correlation, channels, 1) == pytest.approx(expected, rel=1e-9)


def test_the_limit_of_many_channels_is_that_of_the_spectrum():
    """(1 - r^2) / 4 for an AR(1) process whose spectrum, (1 - r) / (1 + r) and more, is above it everywhere; of n
    channels the determinant is (1 - r^2)^(n - 1), so that the limit is larger by its n-th root."""
    for correlation in (0.5, 0.9):
        process = 1 - correlation**2
        assert shannon_limit(correlation, 64, 1) == pytest.approx(process / 4 / process ** (1 / 64), rel=1e-9)


def test_one_channel_at_one_bit_costs_what_theory_says():
    """1 - 2/pi for a Gaussian. The error squared, (|x| - sqrt(2/pi))^2, has the variance that quadrature gives it."""
    mse = tensor_scores(TINY, Cell(TENSORS, "coupled:1c1b", "uniform", None, 0.0), seed=0)["mse"]
    x = np.linspace(0, 12, 200001)
    density = 2 * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    step = x[1] - x[0]
    moments = [((x - np.sqrt(2 / np.pi)) ** power * density).sum() * step for power in (2, 4)]
    error = np.sqrt((moments[1] - moments[0] ** 2) / (4 * TINY.tensor_rows * 16))
    assert moments[0] == pytest.approx(1 - 2 / np.pi, rel=1e-4)
    assert mse == pytest.approx(1 - 2 / np.pi, abs=4 * error)


# --- claims -----------------------------------------------------------------------------------------


def made_up() -> pl.DataFrame:
    """A loss of 2.0 with the exact cache, all others by hand, and seeds .1 apart in the loss."""
    loss: dict[tuple[str, str | None, int], float] = {("full", None, 0): 2.0, ("int2", None, 0): 2.4}
    for name, value in zip(coupled.ONE_BIT, (3.0, 2.6, 2.7, 2.3), strict=True):
        loss |= {
            (name, "fisher", 0): value,
            (name, "uniform", 0): value * (1.02 if name != "coupled:8c8b" else 0.995),
        }
    for name, value in zip(coupled.TWO_BITS, (2.5, 2.2, 2.1), strict=True):
        loss[name, "fisher", 0] = value
    loss |= {("coupled:2c8b", "fisher", 0): 2.01, ("coupled:8c8b", "fisher", 16): 2.05, ("int2", None, 16): 2.04}
    loss |= {("coupled:4c8b", "fisher", 16): 2.03, ("kivi:2", None, 32): 2.02}
    loss |= {("kvquant:1", "fisher", 0): 2.9, ("kvquant:2", "fisher", 0): 2.05}
    empty = {"correlation": None, "nll": None, "accuracy": None, "answer_nll": None, "mse": None, "limit": None,
             "bits": 1.0, "bytes_per_token": 10.0, "table_bytes": 8}  # fmt: skip
    rows = [
        empty | {"fixture": "f1", "method": method, "weights": weights, "window": window, "seed": seed,
                 "nll": value * (1 + 0.05 * seed)}
        for (method, weights, window), value in loss.items() for seed in range(3)
    ]  # fmt: skip
    rows += [
        empty | {"fixture": "recall", "method": method, "weights": weights, "window": 0, "seed": seed,
                 "accuracy": value + 0.001 * seed, "answer_nll": 1 - value}
        for method, weights, value in (("full", None, 0.99), ("coupled:1c1b", "fisher", 0.7),
                                       ("coupled:1c1b", "uniform", 0.2), ("coupled:8c8b", "fisher", 0.97))
        for seed in range(3)
    ]  # fmt: skip
    rows += [
        empty | {"fixture": TENSORS, "method": method, "weights": "uniform", "window": None, "seed": seed,
                 "correlation": correlation, "mse": value * (1 + 0.001 * seed), "limit": value / 2}
        for correlation, method, value in ((0.0, "coupled:1c1b", 1 - 2 / np.pi), (0.0, "coupled:8c8b", 0.34),
                                           (0.9, "coupled:1c1b", 0.36), (0.9, "coupled:8c8b", 0.08))
        for seed in range(5)
    ]  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    rows = made_up()
    expected = {
        "one-bit-steps": (2.7 / 2.6 - 1, False),
        "one-bit-spread": (0.7 * 1.05 - 3.0 * 0.1, True),
        "two-bit-steps": (2.1 / 2.2 - 1, True),
        "fisher": (1 / 0.995 - 1, True),
        "fisher-few-channels": (1 / 1.02 - 1, True),
        "fisher-8c8b": (1 / 0.995 - 1, False),
        "coupled-2c8b": (0.005, True),
        "window-8c8b": (0.025, True),
        "int2": (2.3 / 2.4 - 1, True),
        "int2-window": (2.05 / 2.04 - 1, False),
        "kvquant-1": (2.3 / 2.9 - 1, True),
        "kvquant-2": (2.1 / 2.05 - 1, False),
        "kivi-2": (2.03 / 2.02 - 1, True),
        "recall-coupling": (0.27, True),
        "recall-8c8b": (-0.02, False),
        "single-channel": (1.002, True),
        "gain-correlated": (4.5, True),
        "gain-uncorrelated": ((1 - 2 / np.pi) / 0.34, True),
    }
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in coupled.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert "coupled:4c4b after coupled:2c2b" in verdicts["one-bit-steps"].note


def test_the_figure_has_all_four_panels():
    drawn = figures.draw(coupled.figure, made_up())
    assert len([ax for ax in drawn.axes if ax.get_visible()]) == 4
    said = figures.describe(drawn)
    assert "1 bit, uniform" in said
    assert "correlation 0.9" in said
