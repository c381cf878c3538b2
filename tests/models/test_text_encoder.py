"""The encoder reads its tokens and no padding, and takes its layers from outside."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.models.text_encoder import EncoderBlock, TextEncoder
from hashml.sharing import RoastDense, RoastEmbed, SharedMemory

MODEL = TextEncoder(50, 3, features=8, layers=2, heads=2, length=6)
TOKENS = jnp.array([[4, 7, 9, 0, 0, 0], [3, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def variables() -> Any:
    return MODEL.init(jax.random.key(0), TOKENS)


def logits(variables, tokens):
    return np.asarray(MODEL.apply(variables, tokens))


def test_padding_counts_for_nothing(variables):
    np.testing.assert_allclose(logits(variables, TOKENS[:1, :3]), logits(variables, TOKENS)[:1], rtol=1e-5, atol=1e-6)
    assert np.isfinite(logits(variables, jnp.zeros((1, 6), jnp.int32))).all()


def test_rows_do_not_see_each_other_and_words_have_places(variables):
    np.testing.assert_allclose(logits(variables, TOKENS)[2], logits(variables, TOKENS[2:])[0], rtol=1e-5, atol=1e-6)
    turned = TOKENS[2:, ::-1]
    assert np.abs(logits(variables, turned) - logits(variables, TOKENS[2:])).max() > 1e-4


def test_parameters_are_those_of_the_formula(variables):
    d, block = 8, 12 * 8 * 8 + 2 * 8
    assert stored_bytes(variables) == 4 * (50 * d + 6 * d + 2 * block + d + 3 * d + 3)


def test_attention_is_that_of_flax(variables):
    """One block with the weights of `flax.linen.MultiHeadDotProductAttention` in the same places."""
    block = variables["params"]["block_0"]
    x = jax.random.normal(jax.random.key(2), (1, 6, 8))
    attention = nn.MultiHeadDotProductAttention(2, use_bias=False)
    heads = {name: {"kernel": block[name]["kernel"].reshape(8, 2, 4)} for name in ("query", "key", "value")}
    out = {"out": {"kernel": block["output"]["kernel"].reshape(2, 4, 8)}}
    normed = nn.LayerNorm(use_bias=False).apply({"params": block["attention_norm"]}, x)
    assert isinstance(normed, jax.Array)
    y = x + jnp.asarray(attention.apply({"params": heads | out}, normed, normed))
    z = nn.LayerNorm(use_bias=False).apply({"params": block["mlp_norm"]}, y)
    expected = y + nn.gelu(z @ block["up"]["kernel"]) @ block["down"]["kernel"]
    found = EncoderBlock(2, 32).apply({"params": block}, x, jnp.ones((1, 6), bool))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-5)


def test_layers_may_share_a_memory():
    shared = TextEncoder(
        50,
        3,
        features=8,
        layers=1,
        heads=2,
        length=6,
        dense=functools.partial(RoastDense, tile=(4, 4), use_bias=False),
        embed=functools.partial(RoastEmbed, tile=(1, 4)),
        memory=SharedMemory(100),
    )
    variables: Any = shared.init(jax.random.key(0), TOKENS)
    kept = {name for name in variables["params"] if name != "block_0"}
    assert kept == {"memory", "head", "norm"}
    assert variables["params"]["memory"]["memory"].shape == (100,)
    assert np.isfinite(np.asarray(shared.apply(variables, TOKENS))).all()


@pytest.mark.parametrize(
    ("model", "tokens", "message"),
    [
        (MODEL, jnp.zeros((1, 7), jnp.int32), r"tokens has shape \(1, 7\); sequences have at most length = 6 tokens"),
        (
            TextEncoder(9, 2, features=6, heads=4),
            jnp.zeros((1, 2), jnp.int32),
            "heads is 4; it must divide the width, 6",
        ),
    ],
)
def test_bad_input(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), tokens)
