"""A decoder whose weights stay compressed: each block is decoded inside the program, used, and forgotten.

    for block in layers:    W = decode(block);   x = layer(W, x)          one dense block at a time (DFloat11)

`compress_decoder` turns the matrices of `hashml.models.decoder` into `CompressedArray`s, each layer under codes of
its own, stacked as `jax.lax.scan` takes them; norms and biases stay as they are, being few.
`compressed_forward` is that module's `forward` with a decoding at the top of the scan's body. Embedding and head are
blocks of their own, and a tied one is decoded twice rather than kept. The arithmetic after decoding is the same, on
the same bits. Weights are constants here: gradients by them are not defined.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hashml.models.decoder import DecoderConfig, Params, embed, layer, unembed
from hashml.models.exact_attention import causal_attention
from hashml.weights.lossless import Codec, CompressedArray, decode, encode, encode_stack


def compress_decoder(params: Params, codec: Codec) -> Params:
    """The parameters of a decoder with a `CompressedArray` for every matrix of a dtype that the codec is for.

    Leaves in ``"layers"`` are coded layer by layer; the tree keeps its form, and goes through `jax.jit`,
    `jax.device_put` and `hashml.accounting.stored_bytes` as it is.

    Raises:
        ValueError: if no leaf has a dtype of the codec, or for a codec that cannot be stacked.
    """
    dtypes = {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(params)}
    if not dtypes & set(codec.dtypes):
        raise ValueError(
            f"params are of {', '.join(sorted(dtypes))}; codec {codec.name!r} is for {', '.join(codec.dtypes)}"
        )

    def compress(leaf: Any, coding: Any, dimensions: int) -> Any:
        codable = np.dtype(leaf.dtype).name in codec.dtypes and leaf.ndim == dimensions
        return coding(leaf, codec) if codable else leaf

    return {
        name: {inner: compress(stacked, encode_stack, 3) for inner, stacked in leaf.items()}
        if name == "layers"
        else compress(leaf, encode, 2)
        for name, leaf in params.items()
    }


def dense(params: Params) -> Params:
    """The same tree with every compressed leaf decoded; of stacked ones, one layer's, as inside a scan."""
    return jax.tree.map(
        lambda leaf: decode(leaf) if isinstance(leaf, CompressedArray) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, CompressedArray),
    )


@functools.partial(jax.jit, static_argnames=("config", "block"))
def compressed_forward(
    params: Params,
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    *,
    block: int = 256,
) -> Float[Array, "B T V"]:
    """Logits of the next token after each token, float32, from compressed parameters.

    Args:
        params: from `compress_decoder`.
        config: of the model.
        tokens: ids.
        positions: as in `hashml.models.decoder.forward`.
        block: queries that attention takes at a time.
    """
    valid = None if positions is None else positions >= 0
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    options: dict[str, Any] = {"rotary": config.rotary, "sliding_window": config.sliding_window, "block": block}

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return causal_attention(q, k, v, positions, **options), None

    def body(x: Array, params_l: Params) -> tuple[Array, None]:
        return layer(dense(params_l), config, x, None, attend, valid)[0], None

    x = embed(dense({"embedding": params["embedding"]}), config, tokens)
    x, _ = jax.lax.scan(body, x, params["layers"])
    # Without the barrier the compiler would see one decoding of a tied embedding, and keep it through all layers.
    last = {name: params[name] for name in ("norm", "embedding" if config.tied else "head")}
    x, last = jax.lax.optimization_barrier((x, last))
    return unembed(dense(last), config, x)
