"""The harness: an exact cache scores as the model without one, and budgets are of the bytes of arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kvcache import harness, recall
from experiments.kvcache.contenders import POLICIES, Setting, contender
from experiments.kvcache.language_models import next_token_nll
from hashml.accounting import stored_bytes
from hashml.kvcache.serving import decode_step, no_tables, prefill
from hashml.kvcache.state import init
from hashml.models.decoder import DecoderConfig, decoder_model, forward, init_params

DECODER = DecoderConfig(vocabulary=40, features=32, layers=1, heads=4, kv_heads=2, head_dim=8, hidden=32, smear=True)
PARAMS = init_params(jax.random.key(0), DECODER)
TOKENS = np.random.default_rng(0).integers(0, 40, (3, 24)).astype(np.int32)
TARGETS = harness.next_tokens(TOKENS)
SETTING = Setting(DECODER, 24, 4, queries=8, dtype="float32")


def score(name, budget=None, prompt=0, setting=SETTING):
    setting = dataclasses.replace(setting, prompt=prompt)
    layers, model = contender(name, setting, budget), decoder_model(DECODER)
    spec = harness.batch_spec(layers, 3)
    one = harness.Model(PARAMS, no_tables(spec), jax.random.key(1), TOKENS, TARGETS)
    (found,) = harness.decode_all(model, layers, [one], prompt=prompt)
    return found


@pytest.mark.parametrize("prompt", [0, 9])
def test_a_cache_that_keeps_all_scores_as_the_model(prompt):
    found = score("full", prompt=prompt)
    np.testing.assert_allclose(
        found.nll[:, prompt:-1], next_token_nll(PARAMS, DECODER, TOKENS)[:, prompt:], atol=1e-4
    )
    np.testing.assert_array_equal(found.nll[:, -1], 0)
    said = np.asarray(forward(PARAMS, DECODER, jnp.asarray(TOKENS)).argmax(axis=-1))
    np.testing.assert_array_equal(found.correct[:, prompt:], (said == TARGETS)[:, prompt:])
    np.testing.assert_array_equal(found.nll[:, :prompt], 0)
    np.testing.assert_array_equal(found.kept[prompt:], np.arange(prompt + 1, 25))


def test_a_policy_drops_tokens_while_it_decodes():
    """Equal to the exact cache until it is full, and no more than its slots hold after that."""
    capacity = contender("h2o", SETTING, 2)[0].capacity
    exact, found = score("full"), score("h2o", 2)
    assert 8 <= capacity <= 12
    np.testing.assert_allclose(found.nll[:, :capacity], exact.nll[:, :capacity], atol=1e-4)
    assert np.abs(found.nll - exact.nll)[:, capacity:].max() > 1e-3
    np.testing.assert_array_equal(found.kept, np.minimum(np.arange(1, 25), capacity))
    assert float(score("scissorhands", 2).kept[-1]) < capacity


def test_scores_are_summed_where_they_count():
    nll, correct = jnp.zeros((2, 6)).at[:, 3:].set(2.0).at[:, :3].set(9.0), jnp.zeros((2, 6), bool).at[0, 4].set(True)
    scores = harness.Scores(nll, correct, jnp.zeros(6))
    targets = np.where(np.arange(6) == 5, -1, 1).astype(np.int32)[None].repeat(2, 0)
    assert harness.second_half_nll(scores, targets) == 2.0
    where = np.zeros((2, 6), bool)
    where[:, 4] = True
    assert harness.share_correct(scores, where) == 0.5
    np.testing.assert_array_equal(harness.next_tokens(np.array([[1, 2, 3]], np.int32)), [[2, 3, -1]])
    with pytest.raises(ValueError, match="prompt is 24; it must be at least 0 and less than the 24 tokens"):
        score("full", prompt=24)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("budget", [2, 4])
def test_budgets_are_of_bytes(name, budget):
    """The largest cache that fits: a slot more in each layer would not, and the arrays have as many bytes as said."""
    setting = Setting(recall.RECALL.decoder, 96, 6, queries=16)
    model = decoder_model(setting.decoder)
    if name in ("snapkv", "pyramidkv", "adakv"):
        setting = dataclasses.replace(setting, prompt=80)
    layers = contender(name, setting, budget)
    size = harness.row_bytes(model, layers).total
    exact = 2 * (2 * 2 * 32 * 2 * 96 + 4 * 96)  # keys and values of 2 heads in float16, and a position for both
    others = 2 * 64 * 4 + 4 + 4 + 4 + 4 + 8  # smeared rows, lengths of row and prompt, ring index, step, noise key
    spec = harness.batch_spec(layers, 1)
    cache = init(spec, jax.random.key(0))
    assert size == sum(stored_bytes(layer) for layer in cache.layers) + others
    if setting.prompt == 0:
        assert harness.row_bytes(model, contender("full", setting)).total == exact + others
        slot = sum(stored_bytes(init(harness.batch_spec([dataclasses.replace(
            layer, slots=layer.slots + (name != "streaming"), window=layer.window + (name == "streaming"))], 1),
            jax.random.key(0)).layers[0]) - stored_bytes(part)
            for layer, part in zip(layers, cache.layers, strict=True))  # fmt: skip
        assert size <= (exact + others) / budget < size + slot
    assert all(layer.window == 6 for layer in layers) or name == "streaming"
    assert all(layer.sinks == (4 if name == "streaming" else 1) for layer in layers)


def test_prompts_have_room_and_relatives_of_snapkv_equal_bytes():
    setting = Setting(recall.RECALL.decoder, 96, 6, queries=16, prompt=80)
    model = decoder_model(setting.decoder)
    snap, pyramid, ada = (contender(name, setting, 2) for name in ("snapkv", "pyramidkv", "adakv"))
    assert {layer.slots for layer in snap} == {(snap[0].prompt_slots or 0) + 16}
    assert sum(layer.slots for layer in pyramid) == sum(layer.slots for layer in snap)
    sizes = [harness.row_bytes(model, layers).total for layers in (snap, pyramid, ada)]
    assert sizes[0] == sizes[1] >= sizes[2] > 0.85 * sizes[0]


@pytest.mark.parametrize("name", ["window", "random", "h2o", "snapkv", "pyramidkv", "adakv", "snapkv+think:0.4"])
def test_a_compressed_prompt_is_compressed(name):
    """Every method holds half of the prompt's tokens at most, and what follows drives none of them out."""
    setting = Setting(recall.RECALL.decoder, 96, 6, queries=16, prompt=80)
    model, config = decoder_model(setting.decoder), setting.decoder
    spec = harness.batch_spec(contender(name, setting, 2), 3)
    tables = no_tables(spec)
    params = init_params(jax.random.key(0), config)
    tokens = jnp.asarray(recall.held_out(3).tokens)
    pos = jnp.broadcast_to(jnp.arange(80, dtype=jnp.int32), (3, 80))
    _, cache = prefill(model, spec, tables, params, tokens[:, :80], pos, jax.random.key(1))
    held = harness.tokens_kept(cache)
    assert 20 < held <= 40
    for place in range(80, 96):
        _, cache = decode_step(model, spec, tables, params, cache, tokens[:, place])
    np.testing.assert_allclose(harness.tokens_kept(cache), held + 16)


def test_compositions_keep_as_many_tokens_in_fewer_bytes():
    setting = Setting(recall.RECALL.decoder, 96, 6, queries=16)
    model = decoder_model(setting.decoder)
    alone, coded = (contender(name, setting, 2) for name in ("h2o", "h2o+coupled:8c8b"))
    assert coded[0].slots == alone[0].slots
    assert coded[0].rope == "read"
    # A slot's keys and values of a head: 64 halves, or 8 codes of a byte.
    saved = 2 * 2 * alone[0].slots * (128 - 8)
    assert harness.row_bytes(model, alone).total - harness.row_bytes(model, coded).total == saved
    kivi = contender("kivi:2", setting)
    assert (kivi[0].window, kivi[0].slots) == (32, 64)


def test_bad_names_and_budgets():
    with pytest.raises(ValueError, match="name is 'lru'; policies are full, window"):
        contender("lru", SETTING, 2)
    with pytest.raises(ValueError, match="name is 'h2o' and budget None; a budget goes with a policy"):
        contender("h2o", SETTING)
    with pytest.raises(ValueError, match="name is 'int8' and budget 2"):
        contender("int8", SETTING, 2)
    with pytest.raises(ValueError, match="window is 4 and sinks 1; with one slot beside them"):
        contender("h2o", SETTING, 24)
