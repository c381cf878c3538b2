"""Exact attention rows against NumPy, query by query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kvcache.attention_rows import attention_rows
from hashml.models.decoder import DecoderConfig, decoder_model, embed, init_params, layer_params
from hashml.models.exact_attention import causal_attention

BATCH, T, HEADS, KV_HEADS, WIDTH = 2, 9, 4, 2, 6


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_rows_are_those_of_the_forward_pass(sliding_window):
    config = DecoderConfig(vocabulary=11, features=8, layers=2, heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH,
                           hidden=8, smear=True, sliding_window=sliding_window)  # fmt: skip
    model, params = decoder_model(config), init_params(jax.random.key(0), config)
    tokens = np.random.default_rng(0).integers(0, 11, (BATCH, T))
    found = attention_rows(model, params, tokens)
    assert found.probs.shape == (2, BATCH, HEADS, T, T)

    @jax.jit
    def projected(params, tokens):
        """Queries and keys of each layer of the model's own forward pass."""
        positions, taken = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (BATCH, T)), []

        def attend(q, k, v):
            taken.append((q, k))
            return causal_attention(q, k, v, positions, rotary=config.rotary, sliding_window=sliding_window), None

        x = embed(params, config, tokens)
        for index in range(2):
            x, _, _ = model.layer(layer_params(params, index), x, None, attend)
        return taken

    taken = [(np.asarray(q), np.asarray(k)) for q, k in projected(params, jnp.asarray(tokens))]
    for index, (q, k) in enumerate(taken):
        np.testing.assert_allclose(found.queries[index], q, rtol=1e-4, atol=1e-5)
        turned, keys = turn(q), turn(k)
        np.testing.assert_allclose(found.rotated[index], turned, rtol=1e-4, atol=1e-5)
        for b, h, t in np.ndindex(BATCH, HEADS, T):
            first = 0 if sliding_window is None else max(0, t + 1 - sliding_window)
            logits = keys[b, h // (HEADS // KV_HEADS), first : t + 1] @ turned[b, h, t] / np.sqrt(WIDTH)
            expected = np.zeros(T)
            expected[first : t + 1] = np.exp(logits) / np.exp(logits).sum()
            np.testing.assert_allclose(found.probs[index, b, h, t], expected, rtol=1e-4, atol=1e-5)


def turn(x: np.ndarray) -> np.ndarray:
    """RoPE as complex numbers, the pairs being (i, i + D/2)."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[2])[:, None] * 10000.0 ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)
