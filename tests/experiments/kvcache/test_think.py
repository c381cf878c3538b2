"""ThinK: a run at the smallest scale, what chooses channels, the error of logits by a loop, claims that read rows."""

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from experiments.kvcache import fixtures, think, think_cells
from experiments.kvcache.think_cells import Cell, KeyNormChannels, RandomChannels
from experiments.lab import figures
from experiments.lab.claims import judge
from hashml.kvcache.dense import Dense
from hashml.kvcache.think import ThinK
from hashml.models.decoder import decoder_model, rms_norm

TINY, DEFAULT = think.SCALES["tiny"], think.SCALES["default"]

EXPERIMENT = "kvcache.think"
NEEDS = ("wikitext2/valid.txt.gz",)


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    assert rows["nll"].is_between(1, 8).all()
    thin, full = (rows.filter(pl.col("method") == method) for method in ("think", "full"))
    assert thin["logit_error"].is_between(0.01, 0.99).all()
    assert full["logit_error"].null_count() == len(full)
    # 44 slots of one head, of which 12 of 32 float16 key channels are gone; the names of 20 are a byte each.
    saved = (full["bytes_per_token"][0] - thin["bytes_per_token"][0]) * 48
    assert saved == pytest.approx(44 * 12 * 2 - 20)
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == len(think_cells.cells(found.scales["tiny"]))
    assert "random" in figures.describe(figures.draw(found.figure, rows))


def test_queries_and_keys_are_those_of_the_model(finished):
    """The first layer by hand: normed embeddings times a kernel, channels i and i + 16 turned by 10000^(-i/16) t."""
    del finished
    common = fixtures.setting(TINY.size, "f1", "prompt")
    config, params = common.decoder, fixtures.params(TINY.size, "f1", 0)
    model = decoder_model(config)
    tokens, _, _ = fixtures.texts(TINY.size, "f1")
    layer = model.layer_params(params, 0)
    u = np.asarray(rms_norm(params["embedding"][tokens], layer["attention_norm"], config.norm_eps), np.float64)
    angles = np.arange(tokens.shape[1])[:, None] * 10000.0 ** (-np.arange(16) / 16)
    for found, name in zip(think_cells.rotated(model, params, tokens), ("query", "key"), strict=True):
        raw = u @ np.asarray(layer[name], np.float64)
        low, high = raw[..., :16], raw[..., 16:]
        turned = [low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)]
        np.testing.assert_allclose(found[0, :, 0], np.concatenate(turned, axis=-1), atol=1e-4)


def test_the_error_is_that_of_logits_without_the_channels(finished):
    """By a loop over rows: the choice from the last queries of the prompt, the error of those after it."""
    del finished
    size = TINY.size
    common = fixtures.setting(size, "f1", "prompt")
    tokens, _, _ = fixtures.texts(size, "f1")
    layers = think_cells.layers_of(TINY, Cell("f1", "think", "queries", 0.4, None))
    model, params = decoder_model(common.decoder), fixtures.params(size, "f1", 1)
    queries, keys = (np.asarray(x, np.float64)[0, :, 0] for x in think_cells.rotated(model, params, tokens))
    errors = []
    for q, k in zip(queries, keys, strict=True):
        k = k[:20]  # of 24 tokens the last 4 are the window's, which keep all channels
        gone = np.argsort((q[:24] ** 2).mean(axis=0) * (k**2).mean(axis=0))[:12]
        kept = k.copy()
        kept[:, gone] = 0
        exact = q[24:] @ k.T
        errors.append(np.linalg.norm(q[24:] @ kept.T - exact) / np.linalg.norm(exact))
    assert think_cells.logit_error(size, "f1", 1, layers) == pytest.approx(np.mean(errors), rel=1e-4)
    whole = think_cells.layers_of(TINY, Cell("f1", "think", "queries", 0.0, None))
    assert think_cells.logit_error(size, "f1", 1, whole) == 0


# --- what chooses -------------------------------------------------------------------------------------

B, H, J, N, W, D = 64, 4, 2, 6, 3, 32


def channels(codec: ThinK, seed: int = 0) -> np.ndarray:
    """What a codec keeps of keys and queries whose channels are of very different size."""
    rng = np.random.default_rng(seed)
    scales = [np.exp(rng.normal(size=D)) for _ in range(2)]
    keys, queries = rng.normal(size=(B, H, N, D)) * scales[0], rng.normal(size=(B, H, J, W, D)) * scales[1]
    fixed = codec.init(B, H, 0, D, jnp.float32).fixed
    valid = jnp.ones((B, H, N), bool), jnp.ones((B, W), bool)
    kept = codec.fit(fixed, jnp.asarray(keys, jnp.float32), jnp.asarray(queries, jnp.float32), valid)["channels"]
    if isinstance(codec, KeyNormChannels):
        by_norm = np.argsort(-(keys.astype(np.float32) ** 2).mean(axis=2), axis=-1)[..., : kept.shape[-1]]
        np.testing.assert_array_equal(kept, np.sort(by_norm, axis=-1))
    return np.asarray(kept, np.int64)


def test_key_norms_choose_without_queries():
    """Compared with NumPy in `channels`; ThinK, which sees the queries, keeps others."""
    by_norm, by_both = channels(KeyNormChannels(Dense(), 0.4)), channels(ThinK(Dense(), 0.4))
    assert (by_norm != by_both).any(axis=-1).mean() > 0.9


def test_random_channels_see_nothing_and_are_uniform():
    codec = RandomChannels(Dense(), 0.4, seed=5)
    kept = channels(codec)
    np.testing.assert_array_equal(kept, channels(codec, seed=1))
    assert (kept != channels(RandomChannels(Dense(), 0.4, seed=6))).any(axis=-1).mean() > 0.9
    assert len(np.unique(kept.reshape(-1, 20), axis=0)) == B * H
    share, draws = 20 / 32, B * H
    counts = np.bincount(kept.reshape(-1), minlength=D)
    assert np.abs(counts - share * draws).max() < 4.5 * np.sqrt(draws * share * (1 - share))


def test_random_channels_of_layers_are_drawn_apart():
    layers = think_cells.layers_of(DEFAULT, Cell("f1", "think", "random", 0.4, None))
    assert len({layer.key_codec for layer in layers}) == len(layers) == 4


def test_cells_are_apart_and_compositions_stand_beside_what_they_are_made_of():
    cells = think_cells.cells(DEFAULT)
    assert len(set(cells)) == len(cells)
    for cell in cells:
        if cell.method.endswith("+think"):
            assert Cell(cell.fixture, cell.method.removesuffix("+think"), None, None, cell.budget) in cells
    thin = think_cells.layers_of(DEFAULT, Cell("f1", "int4+think", "queries", 0.4, None))[0]
    alone = think_cells.layers_of(DEFAULT, Cell("f1", "int4", None, None, None))[0]
    assert thin.value_codec == alone.value_codec
    assert thin.key_codec.init(1, 1, 3, 32, jnp.float16).slots["q"].shape == (1, 1, 3, 10)


@pytest.mark.parametrize(("fixture", "heads"), [("f1", 16), ("recall", 4)])
def test_snapkv_with_think_holds_what_fits_into_the_same_bytes(fixture, heads):
    """By hand: a slot of a head holds two float16 vectors of 32, or of 20 and 32, its position and its score; the
    window's part and what all heads share is the same, and the names of 20 channels are a byte each."""
    for budget in DEFAULT.budgets:
        model = decoder_model(fixtures.setting(DEFAULT.size, fixture, "prompt").decoder)
        pair = [
            think_cells.layers_of(DEFAULT, cell)
            for cell in (Cell(fixture, "snapkv", None, None, budget),
                         Cell(fixture, "snapkv+think", "queries", 0.4, budget))
        ]  # fmt: skip
        slots, more = (layers[0].prompt_slots for layers in pair)
        assert slots is not None
        assert more is not None
        assert more == (slots * (64 + 64 + 8) - 20) // (40 + 64 + 8)
        alone, thin = (think_cells.prompt_bytes(model, layers) for layers in pair)
        assert alone - thin == heads * (slots * 136 - more * 112 - 20)
        assert 0 <= alone - thin < heads * 112
        assert pair[1][0].slots - more == pair[0][0].slots - slots


# --- claims -------------------------------------------------------------------------------------------


def made_up() -> pl.DataFrame:
    """A loss of 2.0 of the exact cache, errors and accuracies by hand, and seeds 5 % apart in the loss."""
    rows = []

    def add(fixture, method, choice=None, dropped=None, budget=None, nll=None, error=None, accuracy=None, size=100.0):
        for seed in range(3):
            loss = None if nll is None else nll * (1 + 0.05 * seed)
            rows.append(
                {"fixture": fixture, "method": method, "choice": choice, "dropped": dropped, "budget": budget,
                 "seed": seed, "nll": loss, "logit_error": None if error is None else error * (1 + 0.05 * seed),
                 "accuracy": accuracy, "answer_nll": None, "bytes_per_token": size, "prompt_bytes": None,
                 "prompt_slots": None}
            )  # fmt: skip

    add("f1", "full", nll=2.0)
    for dropped, size in ((0.2, 92.0), (0.4, 84.0), (0.5, 79.0), (0.6, 75.0)):
        better = 0.9 if dropped < 0.6 else 1.05
        add("f1", "think", "queries", dropped, nll=2 + 0.06 * dropped, error=dropped * better, size=size)
        add("f1", "think", "keys", dropped, nll=2 + 0.05 * dropped, error=dropped * 0.95)
        add("f1", "think", "random", dropped, nll=2 + dropped, error=dropped)
    for method, budget, alone, thin in (("snapkv", 2, 2.1, 2.09), ("snapkv", 4, 2.3, 2.35), ("int4", None, 2.0, 2.01),
                                        ("kivi:2", None, 2.1, 2.12)):  # fmt: skip
        add("f1", method, budget=budget, nll=alone)
        add("f1", f"{method}+think", "queries", 0.4, budget, nll=thin)
    add("recall", "full", accuracy=0.99)
    for choice, accuracy in (("queries", 0.98), ("random", 0.5)):
        add("recall", "think", choice, 0.4, accuracy=accuracy)
    for budget, alone, thin in ((2, 0.9, 0.91), (4, 0.6, 0.55)):
        add("recall", "snapkv", budget=budget, accuracy=alone)
        add("recall", "snapkv+think", "queries", 0.4, budget, accuracy=thin)
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    expected = {
        "error-queries-keys": (0.9 / 0.95 - 1, True),
        "error-keys-random": (-0.05, True),
        "error-queries-random": (-0.1, True),
        "loss-queries-keys": (2.024 / 2.02 - 1, False),
        "loss-keys-random": (2.02 / 2.4 - 1, True),
        "loss-queries-random": (2.024 / 2.4 - 1, True),
        "error-random-everywhere": (0.05, False),
        "loss-random-everywhere": (2.012 / 2.2 - 1, True),
        "loss-40": (0.012, True),
        "loss-50": (0.015, True),
        "memory-40": (0.16, False),
        "memory": (0.21, True),
        "equal-bytes": (2.35 / 2.3 - 1, False),
        "equal-bytes-some": (0, False),
        "equal-bytes-recall": (-0.05, False),
        "quantised": (2.12 / 2.1 - 1, True),
        "recall-40": (-0.01, True),
        "recall-random": (0.48, True),
    }
    verdicts = {claim.id: judge(claim, made_up(), scale="default", complete=True) for claim in think.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert "snapkv at 1/4, 3 of 3 models lose" in verdicts["equal-bytes"].note
    assert "at 0.6 of the channels" in verdicts["error-random-everywhere"].note


def test_the_figure_has_all_four_panels():
    drawn = figures.draw(think.figure, made_up())
    assert len([ax for ax in drawn.axes if ax.get_visible()]) == 4
    assert "snapkv+think" in figures.describe(drawn)
