"""A decoder equals a loop over layers, tokens, heads and pairs in NumPy, whatever its switches."""

import dataclasses
import functools
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from hashml.models.decoder import (
    Decoder,
    DecoderConfig,
    decoder_model,
    forward,
    init_params,
    layer,
    param_shapes,
)
from hashml.models.exact_attention import causal_attention, masked_attention
from hashml.models.llama2c import load_llama2c
from hashml.models.rotary import Rotary

PLAIN = DecoderConfig(
    vocabulary=23, features=12, layers=2, heads=4, kv_heads=2, head_dim=6, hidden=10, rotary=Rotary(100.0)
)
CONFIGS = {
    "llama": PLAIN,
    "no gate, gelu, every head its keys": dataclasses.replace(PLAIN, gated=False, activation="gelu", kv_heads=4),
    "relu, one key head": dataclasses.replace(PLAIN, activation="relu", kv_heads=1),
    "gelu_tanh, untied, biased": dataclasses.replace(PLAIN, activation="gelu_tanh", tied=False, qkv_bias=True),
    "interleaved, window": dataclasses.replace(PLAIN, rotary=Rotary(50.0, "interleaved"), sliding_window=3),
    "smeared": dataclasses.replace(PLAIN, smear=True),
    "no positions": dataclasses.replace(PLAIN, rotary=None, norm_eps=0.1),
}
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 23)


def naive_logits(params, config, tokens):
    """One row, float64, as the docstring of the module reads."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    activation = {
        "silu": lambda z: z / (1 + math.exp(-z)),
        "gelu": lambda z: z * (1 + erf(z / math.sqrt(2))) / 2,
        "gelu_tanh": lambda z: z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
        "relu": lambda z: max(z, 0.0),
    }[config.activation]
    activation = np.vectorize(activation, otypes=[float])
    width, group = config.head_dim, config.heads // config.kv_heads

    def norm(x, scale):
        return x / math.sqrt(np.mean(x**2) + config.norm_eps) * scale

    def turned(x, position):
        if config.rotary is None:
            return x
        out = np.zeros(width)
        for i in range(width // 2):
            a, b = (i, i + width // 2) if config.rotary.pairs == "half" else (2 * i, 2 * i + 1)
            number = complex(x[a], x[b]) * np.exp(1j * position * config.rotary.theta ** (-2 * i / width))
            out[a], out[b] = number.real, number.imag
        return out

    def projected(u, weights, name, heads):
        return (u @ weights[name] + weights.get(name + "_bias", 0)).reshape(heads, width)

    stream = [params["embedding"][token] for token in tokens]
    for index in range(config.layers):
        weights = {name: leaf[index] for name, leaf in params["layers"].items()}
        u = [norm(x, weights["attention_norm"]) for x in stream]
        smeared = u
        if config.smear:
            mu = weights["smear"]
            smeared = [mu * u[t] + (1 - mu) * u[max(t - 1, 0)] for t in range(len(u))]
        q = [projected(u[t], weights, "query", config.heads) for t in range(len(u))]
        k = [projected(smeared[t], weights, "key", config.kv_heads) for t in range(len(u))]
        v = [projected(u[t], weights, "value", config.kv_heads) for t in range(len(u))]
        for t in range(len(stream)):
            oldest = 0 if config.sliding_window is None else max(0, t - config.sliding_window + 1)
            heads = []
            for head in range(config.heads):
                asked = turned(q[t][head], t)
                seen = range(oldest, t + 1)
                logits = np.array([asked @ turned(k[s][head // group], s) / math.sqrt(width) for s in seen])
                weight = np.exp(logits - logits.max())
                weight /= weight.sum()
                heads.append(sum(w * v[s][head // group] for w, s in zip(weight, seen, strict=True)))
            stream[t] = stream[t] + np.concatenate(heads) @ weights["output"]
        for t in range(len(stream)):
            z = norm(stream[t], weights["mlp_norm"])
            up = z @ weights["up"]
            hidden = activation(z @ weights["gate"]) * up if config.gated else activation(up)
            stream[t] = stream[t] + hidden @ weights["down"]
    head = params["embedding"].T if config.tied else params["head"]
    return np.stack([norm(x, params["norm"]) @ head for x in stream])


@functools.cache
def some_params(config):
    """Random in every leaf: fresh norms and biases of 1 and 0 would hide a place where they are not used."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        name = path[-1].key
        scale = 0.4 if len(shape) > 2 or name in ("embedding", "head") else 0.2
        return jnp.asarray(name.endswith("norm") + scale * rng.normal(size=shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, param_shapes(config), is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_the_loop(name):
    config = CONFIGS[name]
    params = some_params(config)
    found = forward(params, config, TOKENS)
    assert found.dtype == jnp.float32
    for row in range(2):
        np.testing.assert_allclose(found[row], naive_logits(params, config, TOKENS[row]), atol=1e-4)


@pytest.mark.skipif("HASHML_DATA" not in os.environ, reason="set HASHML_DATA to the folder of data sets")
def test_a_real_model_equals_the_loop():
    params, config = load_llama2c(Path(os.environ["HASHML_DATA"]) / "stories260K/stories260K.bin")
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 3, config.vocabulary).at[0, 0].set(1)
    found = forward(params, config, tokens)[0]
    expected = naive_logits(params, config, tokens[0])
    assert np.abs(expected).max() > 5  # a trained model has opinions
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["interleaved, window", "smeared"])
def test_padding_at_either_end_counts_for_nothing(name):
    config, params = CONFIGS[name], some_params(CONFIGS[name])
    alone = forward(params, config, TOKENS)
    line = np.arange(9, dtype=np.int32)[None].repeat(2, axis=0)
    for left, right in ((4, 0), (1, 3)):
        ends = ((0, 0), (left, right))
        padded = forward(
            params,
            config,
            jnp.asarray(np.pad(TOKENS, ends, constant_values=7)),
            jnp.asarray(np.pad(line, ends, constant_values=-1)),
        )
        np.testing.assert_allclose(padded[:, left : left + 9], alone, atol=1e-5)
        assert np.isfinite(padded).all()


def test_ids_outside_the_vocabulary_are_refused():
    params = some_params(PLAIN)
    for wrong in (23, -1, 2**40):
        tokens = np.array([[1, 22, 0], [2, wrong, 3]])
        with pytest.raises(ValueError, match=f"tokens has {wrong}; allowed are ids from 0 to 22"):
            forward(params, PLAIN, tokens)
    with pytest.raises(ValueError, match="tokens has 23; allowed are ids from 0 to 22"):
        Decoder(PLAIN).apply({"params": params}, jnp.array([[1, 23]]))


def test_no_tokens_and_blocks_of_none_are_refused():
    params = some_params(PLAIN)
    with pytest.raises(ValueError, match=r"tokens has shape \(1, 0\); allowed is at least 1 token a row"):
        forward(params, PLAIN, jnp.zeros((1, 0), jnp.int32))
    with pytest.raises(ValueError, match="block is 0; it is at least 1 query"):
        forward(params, PLAIN, TOKENS, block=0)


def test_blocks_and_rematerialisation_change_nothing():
    config = dataclasses.replace(PLAIN, smear=True, sliding_window=3)
    params = some_params(config)

    def loss(params, **options):
        return jnp.mean(jax.nn.log_softmax(forward(params, config, TOKENS, **options))[..., 3])

    expected = jax.jit(jax.value_and_grad(loss))(params)
    found = jax.jit(jax.value_and_grad(functools.partial(loss, block=4, remat=True)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_no_array_of_all_queries_by_all_keys():
    """Of 64 queries, 8 at a time: neither pass forms an array with 64 x 64 places."""
    q, k = jnp.ones((1, 2, 64, 4)), jnp.ones((1, 1, 64, 4))
    positions = jnp.arange(64)[None]

    def loss(q, k):
        return causal_attention(q, k, k, positions, rotary=None, block=8).sum()

    def text(block_loss):
        return jax.jit(jax.grad(block_loss, argnums=(0, 1))).lower(q, k).as_text()

    assert "64x64x" not in text(loss)
    assert "64x64x" in text(lambda q, k: causal_attention(q, k, k, positions, rotary=None).sum())


def test_the_future_is_not_seen_and_the_past_is():
    config, params = CONFIGS["smeared"], some_params(CONFIGS["smeared"])
    changed = forward(params, config, TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % 23))
    found = forward(params, config, TOKENS)
    np.testing.assert_array_equal(changed[:, :5], found[:, :5])
    assert (np.abs(changed[:, 5:] - found[:, 5:]).max(axis=-1) > 1e-4).all()


def test_a_window_forgets():
    """With a window of w a token's reach through L layers is L (w - 1) back."""
    config = CONFIGS["interleaved, window"]
    params = some_params(config)
    changed = forward(params, config, TOKENS.at[:, 0].set((TOKENS[:, 0] + 1) % 23))
    found = forward(params, config, TOKENS)
    np.testing.assert_allclose(changed[:, 5:], found[:, 5:], atol=1e-6)
    assert (np.abs(changed[:, :5] - found[:, :5]).max(axis=-1) > 1e-4).all()


# --- the pieces, as a cache calls them ------------------------------------------------------------


def test_pieces_in_chunks_make_up_the_whole():
    """Chunks of 4, 4 and 1 tokens, padded on both sides; the caller keeps keys unrotated, with their positions."""
    config = dataclasses.replace(PLAIN, smear=True, tied=False, qkv_bias=True)
    params, model, rotary = some_params(config), decoder_model(config), PLAIN.rotary
    assert rotary is not None

    @jax.jit
    def chunk(tokens, positions, kept, previous):
        x, kept, previous = model.embed(params, tokens), list(kept), list(previous)
        for index in range(config.layers):

            def attend(q, k, v, past=kept[index]):
                k, v = (jnp.concatenate([old, new], axis=2) for old, new in zip(past[:2], (k, v), strict=True))
                places = jnp.concatenate([past[2], positions], axis=1)
                turned = rotary.rotate(k, places[:, None])
                out = masked_attention(rotary.rotate(q, positions[:, None]), turned, v, positions, places)
                return out, (k, v, places)

            x, previous[index], kept[index] = model.layer(
                model.layer_params(params, index), x, previous[index], attend, positions >= 0
            )
        return model.unembed(params, x), kept, previous

    nothing = jnp.zeros((2, 2, 0, 6))
    kept = [(nothing, nothing, jnp.zeros((2, 0), jnp.int32))] * config.layers
    previous = [jnp.zeros((2, 12))] * config.layers
    logits = []
    for start, stop, ends in ((0, 4, (1, 1)), (4, 8, (2, 0)), (8, 9, (0, 5))):
        tokens = np.pad(TOKENS[:, start:stop], ((0, 0), ends))
        positions = np.pad(np.arange(start, stop, dtype=np.int32)[None], ((0, 0), ends), constant_values=-1)
        found, kept, previous = chunk(tokens, np.tile(positions, (2, 1)), kept, previous)
        logits.append(found[:, ends[0] : ends[0] + stop - start])
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), forward(params, config, TOKENS), atol=1e-4)


def test_a_previous_of_zeros_is_none_before():
    config = CONFIGS["smeared"]
    params_l = decoder_model(config).layer_params(some_params(config), 0)
    x = jax.random.normal(jax.random.key(2), (2, 3, 12))

    def keys(previous, valid=None):
        return layer(params_l, config, x, previous, lambda q, k, v: (q, k), valid)[1:]

    for found, expected in zip(keys(jnp.zeros((2, 12))), keys(None), strict=True):
        np.testing.assert_array_equal(found, expected)
    # A row of padding alone passes on what it was given.
    given = jax.random.normal(jax.random.key(3), (2, 12))
    np.testing.assert_array_equal(keys(given, jnp.zeros((2, 3), bool))[0], given)
    assert np.abs(keys(given)[1][:, :, 0] - keys(None)[1][:, :, 0]).max() > 1e-3


def test_a_query_that_sees_nothing_gets_zeros():
    q, k = jnp.ones((1, 2, 2, 4)), jnp.ones((1, 1, 3, 4))
    out = masked_attention(q, k, k, jnp.array([[-1, 0]]), jnp.array([[1, -1, -1]]))
    np.testing.assert_array_equal(out, jnp.zeros_like(q))


def test_equal_configurations_are_one_model():
    assert decoder_model(PLAIN) is decoder_model(dataclasses.replace(PLAIN))
    assert decoder_model(PLAIN) is not decoder_model(CONFIGS["smeared"])


# --- parameters and the module --------------------------------------------------------------------


def test_the_module_owns_the_same_parameters():
    config = CONFIGS["gelu_tanh, untied, biased"]
    key = jax.random.key(0)
    own = jax.eval_shape(lambda: init_params(key, config, jnp.bfloat16))
    theirs = jax.eval_shape(Decoder(config, param_dtype=jnp.bfloat16).init, key, TOKENS)["params"]
    assert own == theirs
    assert jax.tree.map(lambda leaf: leaf.shape, own) == param_shapes(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype(jnp.bfloat16)}
    params = some_params(config)
    expected = forward(params, config, TOKENS)
    np.testing.assert_array_equal(Decoder(config).apply({"params": params}, TOKENS), expected)


def test_initial_kernels_have_the_stated_variance():
    """Within 5 standard errors of a normal's standard deviation, sigma / sqrt(2 n)."""
    config = DecoderConfig(500, 64, 3, 4, 2, 16, 200, tied=False, qkv_bias=True, smear=True)
    params = jax.jit(lambda key: init_params(key, config))(jax.random.key(0))
    shapes = param_shapes(config)
    expected = {"query": 64, "key": 64, "value": 64, "up": 64, "gate": 64, "output": 64 * 6, "down": 200 * 6}
    for name, fan_in in expected.items():
        leaf = np.asarray(params["layers"][name])
        assert leaf.shape == shapes["layers"][name]
        assert abs(leaf.std() * math.sqrt(fan_in) - 1) < 5 / math.sqrt(2 * leaf.size)
    for name in ("embedding", "head"):
        assert abs(np.asarray(params[name]).std() * 8 - 1) < 5 / math.sqrt(2 * params[name].size)
    assert (params["layers"]["smear"] == 0.5).all()
    assert (params["layers"]["key_bias"] == 0).all()
    assert (params["norm"] == 1).all()


def test_bfloat16_is_float32_up_to_its_rounding():
    """Each of some 30 roundings in a row adds at most 2^-9 of what it rounds."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), some_params(PLAIN))
    found = forward(params, PLAIN, TOKENS)
    wide = forward(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), PLAIN, TOKENS)
    assert found.dtype == jnp.float32
    assert 0 < np.abs(found - wide).max() < 30 * 2**-9 * np.abs(wide).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0; it is at least 1"),
        ({"kv_heads": 3}, "kv_heads is 3; it divides heads, 4"),
        ({"head_dim": 5}, "head_dim is 5; a head is rotated in pairs"),
        ({"sliding_window": 0}, "sliding_window is 0; it is at least 1"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0; it is not negative"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **change)
