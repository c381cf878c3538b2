"""A decoder with compressed weights: the same logits to the bit, one dense layer at a time, refusals."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.models.decoder import DecoderConfig, forward, init_params
from hashml.weights.dfloat11 import DFLOAT11
from hashml.weights.ecf8 import ECF8
from hashml.weights.forward import compress_decoder, compressed_forward
from hashml.weights.lossless import CompressedArray

CONFIG = DecoderConfig(
    vocabulary=300, features=128, layers=6, heads=4, kv_heads=2, head_dim=32, hidden=256, gated=False
)
PARAMS = init_params(jax.random.key(0), CONFIG, jnp.bfloat16)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 300)


@pytest.fixture(scope="module")
def compressed():
    return jax.device_put(compress_decoder(PARAMS, DFLOAT11))


def test_the_tree_keeps_its_form_and_shrinks(compressed):
    assert set(compressed) == set(PARAMS)
    assert set(compressed["layers"]) == set(PARAMS["layers"])
    assert isinstance(compressed["layers"]["up"], CompressedArray)
    assert stored_bytes(compressed) < 0.7 * stored_bytes(PARAMS)


@pytest.fixture(scope="module")
def compiled(compressed):
    return compressed_forward.lower(compressed, CONFIG, TOKENS).compile()


def test_logits_are_the_same_bits(compressed, compiled):
    found, wanted = np.asarray(compiled(compressed, TOKENS)), np.asarray(forward(PARAMS, CONFIG, TOKENS))
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


def test_only_one_block_is_dense(compiled):
    """Temporaries hold a layer and its planes, not all six layers."""
    memory: Any = compiled.memory_analysis()
    layers = stored_bytes(PARAMS["layers"])
    assert memory.temp_size_in_bytes < 3.5 * layers / CONFIG.layers < 0.6 * layers


def test_other_dtypes_and_vectors_stay_as_they_are(compressed):
    mixed = PARAMS | {"embedding": PARAMS["embedding"].astype(jnp.float32)}
    assert compress_decoder(mixed, DFLOAT11)["embedding"] is mixed["embedding"]
    np.testing.assert_array_equal(compressed["layers"]["mlp_norm"], PARAMS["layers"]["mlp_norm"])


def test_refusals():
    with pytest.raises(ValueError, match="params are of bfloat16; codec 'ecf8' is for float8_e4m3fn, float8_e5m2"):
        compress_decoder(PARAMS, ECF8)
    with pytest.raises(ValueError, match="codec has the coder 'gaps'; stacks have huffman or raw"):
        compress_decoder(PARAMS, dataclasses.replace(DFLOAT11, coder="gaps"))
