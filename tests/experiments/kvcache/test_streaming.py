"""Streams and drawn texts: a run at the smallest scale, losses beside naive loops, claims that read their rows."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from experiments.data import language
from experiments.kvcache import harness, streaming
from experiments.kvcache.contenders import Setting, contender
from experiments.kvcache.language_models import next_token_nll
from experiments.kvcache.streaming_cells import (
    Cell,
    Config,
    Protected,
    cells,
    decoder,
    elsewhere,
    exact_losses,
    scored_by_exact,
    starts,
    stream_layers,
    told,
)
from experiments.lab import figures
from experiments.lab.claims import judge
from hashml.kvcache.serving import decode_step, no_tables
from hashml.kvcache.spec import batch_spec
from hashml.models.decoder import DecoderConfig, decoder_model, forward, init_params

DEFAULT, TINY = Config(), streaming.SCALES["tiny"]
DECODER = DecoderConfig(vocabulary=257, features=16, layers=1, heads=2, kv_heads=2, head_dim=8, hidden=16)
PARAMS = jax.tree.map(lambda leaf: 3 * leaf, init_params(jax.random.key(0), DECODER))

EXPERIMENT = "kvcache.streaming"
NEEDS = ("wikitext2/valid.txt.gz", "wikitext2/test.txt.gz")


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    shares = rows.filter(pl.col("part") == "sink")
    assert (shares["first"] <= shares["highest_head"]).all()
    # Queries 24 to 47 see 25 to 48 keys.
    np.testing.assert_allclose(shares["equal"], (1 / np.arange(25, 49)).mean())
    streams = rows.filter(pl.col("part") == "stream")
    assert set(streams["start"]) == {0, 48, 96}
    assert streams["nll"].drop_nulls().is_between(1, 8).all()
    # The trained length is the first piece, and a cache of 16 tokens another thing.
    first = streams.filter(pl.col("start") == 0)
    losses = {key: part["nll"].to_numpy() for key, part in first.group_by("method", "sinks", "rope")}
    np.testing.assert_allclose(losses["exact", None, None], losses["pieces", None, None], rtol=1e-5)
    assert (np.abs(losses["sinks", 4, "slot"] - losses["exact", None, None]) > 1e-4).all()
    anew = streams.filter(pl.col("method") == "recomputed").sort("start")
    assert anew["nll"].is_null().all()
    assert anew["nll_strided"].is_null().to_list() == [True, True, False, False, False, False]
    assert streams["cache_bytes"].drop_nulls().n_unique() == 1
    texts = rows.filter(pl.col("part") == "generation")
    assert set(texts["start"]) == {16, 32}
    drawn = {name: part for (name,), part in texts.group_by("method")}
    assert (drawn["full"]["divergence"].abs() < 1e-5).all()
    assert (drawn["random"]["divergence"] > 1e-5).all()
    assert drawn["full"]["entropy"].is_between(1, np.log(257)).all()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == 1 + len(cells(found.scales["tiny"]))
    assert figures.describe(figures.draw(found.figure, rows))


def test_the_cells_share_bytes():
    found = cells(DEFAULT)
    assert len(set(found)) == len(found)
    for capacity in (64, 128):
        own = [cell for cell in found if cell.method in ("sinks", "elsewhere") and cell.capacity == capacity]
        assert [(cell.sinks, cell.rope) for cell in own] == [
            (1, "slot"), (2, "slot"), (4, "slot"), (0, "write"), (1, "write"), (2, "write"), (4, "write"), (4, "slot")
        ]  # fmt: skip
        layers = [stream_layers(DEFAULT, cell) for cell in own]
        assert {layer[0].capacity for layer in layers} == {capacity}
        assert len({harness.row_bytes(decoder_model(decoder(DEFAULT)), layer).total for layer in layers}) == 1
        assert [layer[0].sinks for layer in layers] == [1, 2, 4, 0, 1, 2, 4, 0]
    others = elsewhere(DEFAULT)
    assert len(set(others)) == 4
    assert all(4 <= position < 256 for position in others)
    assert starts(DEFAULT, "stream") == [256 * place for place in range(20)]
    assert starts(DEFAULT, "generation") == [64, 128, 192]
    with pytest.raises(ValueError, match="a cache has a capacity and a number of sinks"):
        stream_layers(DEFAULT, Cell("stream", "exact"))


def streamed(**sizes: Any) -> tuple[np.ndarray, list[int]]:
    """Losses of a stream of a small model, and the positions that a head holds at its end."""
    setting = Setting(DECODER, 12, 4, dtype="float32")
    layers = [dataclasses.replace(contender("streaming", setting, 2)[0], **sizes)]
    tokens = np.random.default_rng(1).integers(0, 256, (2, 40)).astype(np.int32)
    model, spec = decoder_model(DECODER), batch_spec(layers, 2)

    @jax.jit
    def whole(params: Any) -> Any:
        step = functools.partial(decode_step, model, spec, no_tables(spec), params)

        def body(cache: Any, token: jax.Array) -> Any:
            logits, cache = step(cache, token)
            return cache, jax.nn.log_softmax(logits)

        return jax.lax.scan(body, harness.empty_cache(model, spec, jax.random.key(0)), jnp.asarray(tokens).T)

    cache, said = whole(PARAMS)
    (layer,) = cache.layers
    held = [int(pos) for pos in [*layer.pos[0, 0], *layer.window_pos[0]] if pos >= 0]
    return np.asarray(said), sorted(held)


def test_without_sinks_ranks_and_positions_are_one():
    """And with them they are not: the distance to the sinks is another."""
    shape: dict[str, Any] = {"slots": 0, "sinks": 0, "window": 8}
    ranks, positions = (streamed(rope=rope, **shape)[0] for rope in ("slot", "write"))
    np.testing.assert_allclose(ranks, positions, atol=1e-3)
    shape = {"slots": 2, "sinks": 2, "window": 6}
    ranks, positions = (streamed(rope=rope, **shape)[0] for rope in ("slot", "write"))
    np.testing.assert_allclose(ranks[:8], positions[:8], atol=1e-3)
    assert np.abs(ranks - positions)[20:].max() > 1e-2


def test_protected_tokens_stay():
    shape: dict[str, Any] = {"slots": 2, "window": 6, "sinks": 0, "rope": "slot"}
    _, held = streamed(policy=Protected((3, 11)), **shape)
    assert held == [3, 11, *range(34, 40)]


def test_losses_without_a_cache_are_those_of_a_loop():
    length, capacity = TINY.size.length, 16
    half = length // 2
    tokens = np.random.default_rng(2).integers(0, 256, (2, 3 * length)).astype(np.int32)
    tokens[:, 0] = language.BOS
    targets = np.random.default_rng(3).integers(0, 256, (2, 3 * length)).astype(np.int32)
    targets[:, :-1] = tokens[:, 1:]
    params = init_params(jax.random.key(0), decoder(TINY))

    def loss(row: int, first: int, t: int) -> float:
        """Of the target behind position t, given BOS and the tokens from ``first`` on."""
        fed = [language.BOS, *tokens[row, first : t + 1], targets[row, t]]
        padded = np.array([fed + [0] * (length + 1 - len(fed))], np.int32)
        return float(next_token_nll(params, decoder(TINY), padded)[0, len(fed) - 2])

    found = exact_losses(TINY, Cell("stream", "pieces"), params, tokens, targets)
    for t in (0, 5, half - 1, half, length - 1, length, 2 * length + 3, 3 * length - 1):
        begin = 0 if t < length else t // half * half - half
        assert found[1, t] == pytest.approx(loss(1, begin + 1, t), abs=1e-4), t
    found = exact_losses(TINY, Cell("stream", "recomputed", capacity), params, tokens, targets)
    assert np.flatnonzero(~np.isnan(found[0])).tolist() == list(range(length, 3 * length, 16))
    for t in (length, 2 * length + 16):
        assert found[0, t] == pytest.approx(loss(0, t - capacity + 2, t), abs=1e-4), t
    found = exact_losses(TINY, Cell("stream", "exact"), params, tokens, targets)
    assert found[0, length - 2] == pytest.approx(loss(0, 1, length - 2), abs=1e-4)
    assert abs(found[0, -1] - exact_losses(TINY, Cell("stream", "pieces"), params, tokens, targets)[0, -1]) > 1e-4


def test_texts_are_drawn_from_the_cache_and_judged_by_the_model():
    length, prompt, model = 20, 8, decoder_model(DECODER)
    layers = contender("full", Setting(DECODER, length, 4, dtype="float32"))
    prompts = np.random.default_rng(4).integers(0, 257, (3, prompt)).astype(np.int32)
    spec, draws = batch_spec(layers, 3), jax.random.key(7)
    found = told(model, spec, no_tables(spec), PARAMS, jnp.asarray(prompts), jax.random.key(1), draws, length=length)
    assert found.tokens.shape == (3, length)
    np.testing.assert_array_equal(found.tokens[:, :prompt], prompts)
    logits = np.asarray(forward(PARAMS, DECODER, found.tokens), np.float64)
    exact = (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))[:, prompt - 1 : -1]
    np.testing.assert_allclose(found.log_probs, exact, atol=1e-4)
    for row in range(3):
        for place in range(prompt - 1, length - 1):
            key = jax.random.fold_in(jax.random.fold_in(draws, place), row)
            noise = np.asarray(jax.random.gumbel(key, (257,)))
            said = (np.asarray(found.log_probs[row, place - prompt + 1]) + noise).argmax()
            assert said == found.tokens[row, place + 1], (row, place)
    drawn = np.asarray(found.tokens[:, prompt:, None])
    nll = -np.take_along_axis(exact, drawn, axis=-1)[..., 0]
    scored = scored_by_exact(PARAMS, DECODER, found)
    np.testing.assert_allclose(scored["nll"], nll, atol=1e-4)
    np.testing.assert_allclose(scored["divergence"], 0, atol=1e-4)
    np.testing.assert_allclose(scored["entropy"], -(np.exp(exact) * exact).sum(axis=-1), rtol=1e-4)
    # Drawn from even chances.
    even = np.full(exact.shape, -np.log(257), np.float32)
    scored = scored_by_exact(PARAMS, DECODER, found._replace(log_probs=jnp.asarray(even)))
    np.testing.assert_allclose(scored["divergence"], -np.log(257) - exact.mean(axis=-1), rtol=1e-3)


def made_up() -> pl.DataFrame:
    """Models add 0.1 to all losses; the text is harder in the second bin; C = 128 is better by 0.1 but for S = 2."""
    none: dict[str, Any] = dict.fromkeys(("method", "capacity", "sinks", "rope", "layer", "start"))
    columns = ("nll", "nll_strided", "cache_bytes", "divergence", "entropy", "first", "highest_head", "next_three")
    none |= dict.fromkeys((*columns, "equal"))
    rows = [none | {"part": "sink", "method": "exact", "layer": layer, "seed": seed, "equal": 0.01,
                    "first": 0.1 * layer + 0.001 * seed, "highest_head": 0.5, "next_three": 0.05}
            for layer in range(4) for seed in range(3)]  # fmt: skip
    losses: dict[tuple[Any, ...], float] = {("pieces", None, None, None): 1.0, ("exact", None, None, None): 2.6}
    for capacity, less in ((64, 0.0), (128, 0.1)):
        losses |= {("sinks", capacity, 0, "write"): 2.5 - less, ("sinks", capacity, 1, "slot"): 2.2 - less,
                   ("sinks", capacity, 2, "slot"): 2.1, ("sinks", capacity, 4, "slot"): 2.0 - less,
                   ("sinks", capacity, 4, "write"): 2.4 - less, ("elsewhere", capacity, 4, "slot"): 1.9,
                   ("recomputed", capacity, None, None): 1.9}  # fmt: skip
    for (method, capacity, sinks, rope), nll in losses.items():
        for place, seed in ((place, seed) for place in range(4) for seed in range(3)):
            # What S = 4 loses to pieces in the last of four bins.
            late = 0.5 if place == 3 and sinks == 4 else 0.0
            value = nll + 0.1 * seed + (0.3 if place == 1 else 0.0) + late
            strided = value + 1 if place else None
            rows.append(none | {"part": "stream", "method": method, "capacity": capacity, "sinks": sinks,
                                "rope": rope, "start": 256 * place, "seed": seed, "nll_strided": strided,
                                "nll": None if method == "recomputed" else value + 5 * (place == 0)})  # fmt: skip
    texts = {"full": (2.0, 0.0), "window": (2.0, 0.01), "streaming": (2.0, 0.01), "random": (2.0, 0.05),
             "h2o": (2.1, 0.06), "scissorhands": (2.0, 0.02), "corm": (2.0, 0.02), "keyformer": (2.0, 0.03),
             "kivi:2": (1.7, 0.03), "coupled:8c8b": (2.0, 0.001)}  # fmt: skip
    rows += [none | {"part": "generation", "method": method, "start": start, "seed": seed, "entropy": 1.5,
                     "nll": nll * (1 + 0.1 * seed), "divergence": divergence * (1 + 0.1 * seed)}
             for method, (nll, divergence) in texts.items() for start in (64, 128) for seed in range(3)]  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    rows = made_up()
    s = np.array([0, 0.1, 0.2])
    # Over the three bins behind the first, one of which adds 0.3, and one 0.5 where four tokens stay.
    late = 0.1 + 0.5 / 3
    none, one, four = 2.5 + 0.1 + s, 2.2 + 0.1 + s, 2.0 + late + s
    expected = {
        "sink": (20.1, True),
        "sinks": (np.mean(none / one - 1), True),
        "window-breaks": (np.mean(none / four - 1), True),
        "first-gives-most": (np.mean(((none - one) - (none - four) / 2) / four), True),
        "flat": (np.mean((1.9 + 0.5 + s) / (1 + s) / ((1.9 + 0.3 + s) / (1 + 0.3 + s)) - 1), False),
        "slot": (np.mean((2.4 + late + s) / four - 1), True),
        "elsewhere": (np.mean((1.9 + late + s) / four - 1), False),
        "recomputed": (np.mean((four + 1) / (1.9 + 0.1 + s + 1) - 1), False),
        "dense-breaks": (np.mean((2.6 + 0.1 + s) / four - 1), True),
        "drawn-streaming": (0.005, True),
        "drawn-h2o": (0.03, False),
        "drawn-scissorhands": (0.01, True),
        "drawn-corm": (0.01, True),
        "drawn-keyformer": (0.015, True),
        "drawn-kivi-2": (0.015, True),
        "drawn-coupled-8c8b": (0.0005, True),
        "drawn-window": (0.005, True),
        "drawn-text": (-0.15, False),
        "drawn-random": (0.2, False),
    }
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in streaming.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(float(value), abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert verdicts["sinks"].note == "worst: C = 64, S = 1"
    assert verdicts["drawn-random"].note == "worst: h2o"
    assert verdicts["drawn-text"].note == "worst: kivi:2"


def test_the_figure_shows_all_parts():
    drawn = figures.draw(streaming.figure, made_up())
    assert [ax.get_title("left") for ax in drawn.axes] == ["stream, C = 64", "stream, C = 128", "sink", "texts"]
