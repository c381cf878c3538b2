"""The exact attention of a model on held-out sequences: what the papers on eviction looked at first.

All rows are there at once, ``[L, B, Hq, T, T]``, with the queries before and after their rotation. That is 70 MB for
16 sequences of 256 tokens of ``f1``: a measurement on small models, no method.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.kvcache import fixtures
from hashml.kvcache.contract import masked_softmax
from hashml.models.decoder import DecoderModel, Params, decoder_model

AnyArray = Array | np.ndarray


class AttentionRows(NamedTuple):
    """Of all layers and query heads.

    Attributes:
        probs: what each query gives each key; 0 above the diagonal.
        queries: before rotation.
        rotated: as they meet the keys.
    """

    probs: Float[Array, "L B Hq T T"]
    queries: Float[Array, "L B Hq T D"]
    rotated: Float[Array, "L B Hq T D"]


@functools.partial(jax.jit, static_argnames="model")
def attention_rows(model: DecoderModel, params: Params, tokens: Int[AnyArray, "B T"]) -> AttentionRows:
    """What exact causal attention does in each layer, for sequences without padding."""
    config = model.config
    length = tokens.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)
    seen = positions <= positions[:, None]
    if config.sliding_window is not None:
        seen &= positions > positions[:, None] - config.sliding_window

    def body(x: Array, index: Array) -> tuple[Array, AttentionRows]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, AttentionRows]:
            at = jnp.broadcast_to(positions, (q.shape[0], 1, length))
            turned, keys = (q, k) if config.rotary is None else (config.rotary.rotate(y, at) for y in (q, k))
            keys, values = (y.repeat(config.heads // config.kv_heads, axis=1) for y in (keys, v))
            probs = masked_softmax(jnp.einsum("bhtd,bhsd->bhts", turned, keys) / math.sqrt(config.head_dim), seen)
            return jnp.einsum("bhts,bhsd->bhtd", probs, values), AttentionRows(probs, q, turned)

        x, _, found = model.layer(model.layer_params(params, index), x, None, attend)
        return x, found

    return jax.lax.scan(body, model.embed(params, jnp.asarray(tokens)), jnp.arange(config.layers))[1]


@functools.lru_cache(maxsize=1)
def held_out_rows(size: fixtures.Size, fixture: str, seed: int) -> AttentionRows:
    """Those of a fixture's model on the sequences that caches are scored on."""
    model = decoder_model(fixtures.setting(size, fixture, "decode").decoder)
    tokens, _, _ = fixtures.texts(size, fixture)
    return attention_rows(model, fixtures.params(size, fixture, seed), tokens)
