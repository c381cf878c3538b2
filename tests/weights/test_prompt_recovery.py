"""A soft prompt: the identity when empty, a prefix when made of embeddings, judged on real tokens, cached once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.exchange import load_module, save_module
from hashml.models.decoder import DecoderConfig, decoder_model, forward, init_params
from hashml.models.generation import generate
from hashml.weights.grids import GridSpec
from hashml.weights.prompt_recovery import (
    cache_prompt,
    diluted,
    prompted_engine,
    prompted_forward,
    prompted_nll,
    recovered_fraction,
    start_prompt,
)
from hashml.weights.quantize_model import dequantize_params
from hashml.weights.quantized_dense import as_kernel, draw_matrix

V, D, N, T = 30, 16, 3, 7
CONFIG = DecoderConfig(
    vocabulary=V, features=D, layers=2, heads=2, kv_heads=1, head_dim=8, hidden=24, context=20, smear=True
)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (2, T)).astype(np.int32)
PROMPT = RNG.normal(size=(N, D)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def prompted(params):
    """Logits behind the prompt."""
    return np.asarray(prompted_forward(params, CONFIG, PROMPT, TOKENS))


def test_without_rows_it_is_the_model(params):
    empty = start_prompt(params, 0)
    assert empty.shape == (0, D)
    found = prompted_forward(params, CONFIG, empty, TOKENS)
    np.testing.assert_allclose(found, forward(params, CONFIG, TOKENS), atol=1e-5)


def test_embeddings_of_tokens_are_a_prefix(params):
    """Positions shifted: logits behind the rows of y are those behind y."""
    y = RNG.integers(0, V, N).astype(np.int32)
    found = prompted_forward(params, CONFIG, params["embedding"][y], TOKENS)
    whole = forward(params, CONFIG, np.concatenate([np.tile(y, (2, 1)), TOKENS], axis=1))
    np.testing.assert_allclose(found, whole[:, N:], atol=1e-5)
    np.testing.assert_array_equal(start_prompt(params, N), params["embedding"][:N])


@pytest.fixture(scope="module")
def gradient(params):
    return np.asarray(jax.jit(jax.grad(lambda p: prompted_nll(p, params, CONFIG, TOKENS).mean()))(PROMPT))


def test_the_gradient_of_the_prompt_is_that_of_differences(params, gradient):
    """Along a direction, in float32: central differences are exact to the cube of the step."""

    def loss(prompt):
        return float(prompted_nll(prompt, params, CONFIG, TOKENS).mean())

    direction = RNG.normal(size=(N, D)).astype(np.float32)
    step = np.float32(0.02)
    slope = (loss(PROMPT + step * direction) - loss(PROMPT - step * direction)) / (2 * step)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=0.02, abs=1e-4)
    assert (np.abs(gradient).max(axis=1) > 0).all()


def test_real_tokens_alone_are_targets(params, prompted):
    """By hand from the logits; there is no label on a prompt's place, nor is the first token one: it may be another
    as long as nothing later reads it."""
    nll = np.asarray(prompted_nll(PROMPT, params, CONFIG, TOKENS))
    assert nll.shape == (2, T - 1)
    logits = prompted.astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for row in range(2):
        for place in range(T - 1):
            assert nll[row, place] == pytest.approx(-logs[row, place, TOKENS[row, place + 1]], abs=1e-4)


def test_the_metric_does_not_change_with_a_prompt_that_is_ignored(params, prompted):
    """Values and outputs of 0: attention adds nothing, and tokens do not see each other. The diluted one falls."""
    deaf = params | {"layers": params["layers"] | {"output": jnp.zeros_like(params["layers"]["output"])}}
    alone = forward(deaf, CONFIG, TOKENS)
    np.testing.assert_allclose(prompted_forward(deaf, CONFIG, PROMPT, TOKENS), alone, atol=1e-5)
    nll = np.asarray(prompted_nll(PROMPT, deaf, CONFIG, TOKENS))
    assert float(diluted(nll, 0)) == pytest.approx(nll.mean(), rel=1e-6)
    assert float(diluted(nll, N)) == pytest.approx(nll.sum() / (2 * (T - 1 + N)), rel=1e-6)
    # The card's: 100 rows before 1,024 tokens.
    assert float(diluted(np.ones((1, 1023), np.float32), 100)) == pytest.approx(0.911, abs=5e-4)


def test_saved_prompts_give_the_same_logits(params, prompted, tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_module(path, {"prompt": jnp.asarray(PROMPT)}, geometry={"rows": N})
    loaded, said = load_module(path)
    assert said == {"rows": N}
    np.testing.assert_array_equal(prompted_forward(params, CONFIG, loaded["prompt"], TOKENS), prompted)


# --- a prompt that is cached -----------------------------------------------------------------------


def greedy(params, prompt, rows, count):
    """Token by token, the whole computed anew each time."""
    found = []
    for row in rows:
        said = list(row)
        for _ in range(count):
            padded = np.zeros((1, T + count), np.int32)
            padded[0, : len(said)] = said
            logits = prompted_forward(params, CONFIG, prompt, padded)
            said.append(int(np.argmax(np.asarray(logits)[0, len(said) - 1])))
        found.append(said[len(row) :])
    return found


def test_generation_behind_a_cached_prompt(params, prompted):
    """Ragged rows, padded at the left; as the whole computed anew, smeared keys included."""
    model, cache = decoder_model(CONFIG), cache_prompt(params, CONFIG, PROMPT)
    assert cache.k.shape == (2, 1, N, 8)
    engine = prompted_engine(model, cache, T + 3)
    positions = jnp.tile(jnp.arange(T, dtype=jnp.int32), (2, 1))
    logits, state = jax.jit(engine.prefill)(params, jnp.asarray(TOKENS), positions)
    np.testing.assert_allclose(logits, prompted[:, -1], atol=1e-5)
    assert state.k[0].shape == (2, 1, N + T + 3, 8)
    rows = [TOKENS[0].tolist(), TOKENS[1, :4].tolist()]
    found = generate(model, params, rows, 3, temperature=0, cache=engine)
    assert found == greedy(params, PROMPT, rows, 3)


def test_kernels_of_codes_are_prompted_alike(params):
    layers = dict(params["layers"])
    for name in ("query", "down"):
        inputs, outputs = layers[name].shape[1:]
        layers[name] = as_kernel(draw_matrix(jax.random.key(1), (2, outputs, inputs), GridSpec(3, groups=2)))
    coded = params | {"layers": layers}
    found = prompted_forward(coded, CONFIG, PROMPT, TOKENS)
    np.testing.assert_allclose(found, prompted_forward(dequantize_params(coded), CONFIG, PROMPT, TOKENS), atol=1e-4)


def test_recovered_fractions():
    assert recovered_fraction(2.0, 3.0, 2.25) == pytest.approx(0.75)
    assert recovered_fraction(2, 3, 1.5) == pytest.approx(1.5)
    assert recovered_fraction(2, 3, 4) == pytest.approx(-1)
    with pytest.raises(ValueError, match="compressed is 2.0, full 2.0; without a loss there is no part"):
        recovered_fraction(2.0, 2.0, 1.0)


def test_refusals(params):
    with pytest.raises(ValueError, match="count is 31; allowed are 0 to the 30 ids"):
        start_prompt(params, 31)
    with pytest.raises(ValueError, match="prompt has width 15; the model's is 16"):
        prompted_forward(params, CONFIG, PROMPT[:, :15], TOKENS)
    with pytest.raises(ValueError, match="prompt has 14 rows and is followed by 7 tokens; together at most 20 fit"):
        prompted_nll(np.zeros((14, D), np.float32), params, CONFIG, TOKENS)
    with pytest.raises(ValueError, match="prompt has no row; allowed is at least one"):
        cache_prompt(params, CONFIG, PROMPT[:0])
    cache = jax.eval_shape(lambda: cache_prompt(params, CONFIG, PROMPT))
    with pytest.raises(
        ValueError, match="capacity is 18; behind a prompt of 3, at most 17 fit the model's context of 20"
    ):
        prompted_engine(decoder_model(CONFIG), cache, 18)
    with pytest.raises(ValueError, match="capacity is 5; the prompts have 7 columns"):
        prompted_engine(decoder_model(CONFIG), cache, 5).prefill(params, jnp.asarray(TOKENS), jnp.asarray(TOKENS))
