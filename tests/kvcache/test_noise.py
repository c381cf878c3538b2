"""A row draws the same wherever, whenever and with whomever it runs: policies with noise, in a decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.kvcache.batching import insert, reset_rows
from hashml.kvcache.controls import RandomEviction
from hashml.kvcache.dense import Dense
from hashml.kvcache.keyformer import Keyformer
from hashml.kvcache.noise import row_keys
from hashml.kvcache.serving import decode_step, no_tables, prefill
from hashml.kvcache.spec import CacheSpec, LayerSpec
from hashml.kvcache.state import Cache, all_positions, init
from hashml.models.decoder import DecoderConfig, decoder_model, init_params

CONFIG = DecoderConfig(vocabulary=40, features=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=16)
PARAMS = init_params(jax.random.key(0), CONFIG)
MODEL = decoder_model(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 40, (3, 40))
QUICK = {"xla_backend_optimization_level": 0}
KEYS = jax.random.split(jax.random.key(7), 2)
LENGTHS, PROMPT, STEPS = (14, 20), 20, 10
POLICIES = {"random": RandomEviction(), "keyformer": Keyformer(tau_start=0.5, tau_end=4, new_tokens=8)}
each = pytest.mark.parametrize("name", POLICIES)


@functools.cache
def layers(name: str, rows: int) -> CacheSpec:
    layer = LayerSpec(kv_heads=2, query_heads=4, head_dim=4, slots=6, window=4, flush=2, key_codec=Dense(),
                      value_codec=Dense(), policy=POLICIES[name], rotary=CONFIG.rotary, rope="write")  # fmt: skip
    return CacheSpec((layer,) * 2, rows)


@functools.cache
def functions(name: str, rows: int):
    spec = layers(name, rows)
    return (
        jax.jit(functools.partial(prefill, MODEL, spec, no_tables(spec)), compiler_options=QUICK),
        jax.jit(functools.partial(decode_step, MODEL, spec, no_tables(spec)), compiler_options=QUICK),
    )


def prompts(rows: tuple[int, ...], padding: bool = True) -> tuple[jax.Array, jax.Array]:
    """Of these rows, padded in front to one length, or not at all."""
    width = PROMPT if padding else max(LENGTHS[row] for row in rows)
    tokens, pos = np.zeros((len(rows), width), np.int32), np.full((len(rows), width), -1, np.int32)
    for at, row in enumerate(rows):
        tokens[at, width - LENGTHS[row] :] = TOKENS[row, : LENGTHS[row]]
        pos[at, width - LENGTHS[row] :] = np.arange(LENGTHS[row])
    return jnp.asarray(tokens), jnp.asarray(pos)


def kept(cache: Cache, spec: CacheSpec, at: int) -> list[list[int]]:
    """Positions that each head of each layer holds of a row."""
    both = zip(spec.layers, cache.layers, strict=True)
    lines = np.concatenate([np.asarray(all_positions(one, layer))[at] for one, layer in both])
    return [sorted(p for p in line.tolist() if p >= 0) for line in lines]


@functools.cache
def alone(name: str) -> tuple[Cache, list[list[list[int]]]]:
    """Row 0 of its own, without padding: its prompt, and what it holds after each step."""
    begin, step = functions(name, 1)
    _, first = begin(PARAMS, *prompts((0,), padding=False), KEYS[:1])
    cache, found = first, []
    for i in range(STEPS):
        _, cache = step(PARAMS, cache, jnp.asarray([TOKENS[0, LENGTHS[0] + i]]))
        found.append(kept(cache, layers(name, 1), 0))
    return first, found


@each
def test_a_row_of_a_batch_keeps_what_it_would_alone(name):
    """At another place of the batch, with padding, and beside others."""
    rows = (1, 0)
    begin, step = functions(name, 2)
    _, cache = begin(PARAMS, *prompts(rows), KEYS[::-1])
    np.testing.assert_array_equal(cache.born, [20, 14])
    for i in range(STEPS):
        _, cache = step(PARAMS, cache, jnp.asarray([TOKENS[row, LENGTHS[row] + i] for row in rows]))
        assert kept(cache, layers(name, 2), 1) == alone(name)[1][i]
    heads = {tuple(line) for line in kept(cache, layers(name, 2), 1)}
    assert len(heads) > 1, "heads and layers decide alike"


@each
def test_a_row_that_is_inserted_later_keeps_what_it_would_alone(name):
    """Temperatures and noise are those of its own age, whatever the batch has done before."""
    spec = layers(name, 2)
    _, step = functions(name, 2)
    cache = init(spec, jax.random.key(1))
    for _ in range(6):
        _, cache = step(PARAMS, cache, jnp.asarray([1, 2]))
    cache = insert(spec, cache, alone(name)[0], 1)
    assert jax.random.key_data(cache.key)[1].tolist() == jax.random.key_data(KEYS)[0].tolist()
    for i in range(STEPS):
        _, cache = step(PARAMS, cache, jnp.asarray([1, TOKENS[0, LENGTHS[0] + i]]))
        assert kept(cache, spec, 1) == alone(name)[1][i]
    assert int(cache.born[1]) == 14
    np.testing.assert_array_equal(reset_rows(spec, cache, jnp.asarray([False, True])).born, [0, 0])


def test_rows_have_keys_of_their_own():
    one = jax.random.key_data(row_keys(jax.random.key(0), 3))
    assert np.unique(one, axis=0).shape == one.shape
    np.testing.assert_array_equal(jax.random.key_data(row_keys(KEYS, 2)), jax.random.key_data(KEYS))
    np.testing.assert_array_equal(one, jax.random.key_data(row_keys(jax.random.PRNGKey(0), 3)))
    with pytest.raises(ValueError, match=r"key has shape \(2,\); it must be one key, or one of each of 3 rows"):
        row_keys(KEYS, 3)
