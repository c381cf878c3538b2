"""Budgets in tokens and in bytes, and what heads hold as time goes by."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kvcache import harness
from experiments.kvcache.contenders import Setting
from experiments.kvcache.token_budgets import follow, in_bytes, in_tokens, row_bytes
from hashml.kvcache.corm import Corm
from hashml.kvcache.scissorhands import Scissorhands
from hashml.kvcache.serving import no_tables
from hashml.kvcache.spec import batch_spec
from hashml.models.decoder import DecoderConfig, decoder_model, init_params

DECODER = DecoderConfig(vocabulary=17, features=8, layers=1, heads=2, kv_heads=2, head_dim=8, hidden=8)
SETTING = Setting(DECODER, tokens=24, window=4, queries=4)
MODEL, PARAMS = decoder_model(DECODER), init_params(jax.random.key(0), DECODER)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (3, 24)), jnp.int32)
TARGETS = jnp.asarray(harness.next_tokens(np.asarray(TOKENS)))


def test_a_budget_in_tokens_holds_slots_and_window():
    (layer,) = in_tokens("scissorhands+int4", SETTING, 10)
    assert (layer.capacity, layer.slots, layer.window, layer.sinks) == (10, 6, 4, 1)
    assert layer.policy == Scissorhands(queries=4)
    assert type(layer.key_codec).__name__ == "IntGroup"
    (layer,) = in_tokens("corm", SETTING, 24, Corm(queries=7))
    assert (layer.capacity, layer.policy) == (24, Corm(queries=7))
    with pytest.raises(ValueError, match="tokens is 4; a window of 4 and 1 sinks need at least 5"):
        in_tokens("h2o", SETTING, 4)


def test_a_budget_in_bytes_is_the_largest_that_fits():
    def grown(layers, by):
        return [dataclasses.replace(layer, slots=layer.slots + by) for layer in layers]

    allowed = row_bytes(SETTING, in_tokens("scissorhands", SETTING, 12))
    for name in ("random", "window"):
        layers = in_bytes(name, SETTING, allowed)
        assert row_bytes(SETTING, layers) <= allowed < row_bytes(SETTING, grown(layers, 1))
    up = in_bytes("window", SETTING, allowed, round_up=True)
    assert row_bytes(SETTING, grown(up, -1)) < allowed <= row_bytes(SETTING, up)
    own = in_tokens("h2o", SETTING, 12)
    for up in (False, True):
        assert in_bytes("h2o", SETTING, row_bytes(SETTING, own), round_up=up) == own
    with pytest.raises(ValueError, match="allowed is 100 bytes; h2o with 5 tokens, the fewest, takes"):
        in_bytes("h2o", SETTING, 100)


def test_what_a_window_holds():
    """BOS and the newest 9 of 10: all that a window of 10 holds until the sequence is longer, then all but BOS."""
    spec = batch_spec(in_tokens("window", SETTING, 10), 3)
    found = follow(MODEL, spec, PARAMS, TOKENS, TARGETS, jax.random.key(0))
    seen = np.arange(1, 25)
    np.testing.assert_array_equal(
        found.held, np.broadcast_to(np.minimum(seen, 10)[:, None, None, None], (24, 1, 3, 1))
    )
    np.testing.assert_array_equal(found.newest[:, 0, 0, 0], np.where(seen <= 10, seen, 9))


def test_following_is_decoding():
    spec = batch_spec(in_tokens("corm", SETTING, 24, Corm(queries=4)), 3)
    found = follow(MODEL, spec, PARAMS, TOKENS, TARGETS, jax.random.key(0))
    scores = harness.teacher_forced(MODEL, spec, no_tables(spec), PARAMS, TOKENS, TARGETS, jax.random.key(0))
    np.testing.assert_allclose(found.nll, scores.nll, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.correct, scores.correct)
    held = np.asarray(found.held)
    np.testing.assert_allclose(held.mean(axis=(1, 2, 3)), scores.kept, rtol=1e-6)
    # Heads go their own ways, and none holds less than BOS and the window.
    assert held.shape == (24, 1, 3, 2)
    assert (held[:, 0, :, 0] != held[:, 0, :, 1]).any()
    assert (held >= np.minimum(np.arange(1, 25), 5)[:, None, None, None]).all()
    assert (np.asarray(found.newest) <= held).all()
