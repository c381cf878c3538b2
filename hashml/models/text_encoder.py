"""A small encoder of the BERT family for classification (Devlin et al. 2019, arXiv 1810.04805), pre-norm.

    x = tokens + positions
    x = x + attention(norm(x));  x = x + mlp(norm(x))        ``layers`` times
    logits = head(mean of norm(x) over the tokens that are no padding)

Layers and tables are passed in: `flax.linen.Dense` and `Embed` by default, or anything that is called alike, so
that their weights may lie in a shared memory.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Factory = Callable[..., Any]
"""Makes a module: ``dense(features, use_bias=..., name=...)`` or ``embed(num_embeddings, features, name=...)``."""


class EncoderBlock(nn.Module):
    """Self-attention and a GELU perceptron, each behind a norm and beside a skip.

    Attributes:
        heads: of attention; they divide the width.
        hidden: of the perceptron.
        dense: makes a dense layer.
    """

    heads: int
    hidden: int
    dense: Factory = nn.Dense

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Array) -> Float[Array, "B T D"]:
        features = x.shape[-1]
        if features % self.heads:
            raise ValueError(f"heads is {self.heads}; it must divide the width, {features}")
        width = features // self.heads
        y = nn.LayerNorm(use_bias=False, name="attention_norm")(x)
        q, k, v = (
            self.dense(features, use_bias=False, name=name)(y).reshape(*y.shape[:-1], self.heads, width)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(x.shape)
        x = x + self.dense(features, use_bias=False, name="output")(y)
        y = nn.LayerNorm(use_bias=False, name="mlp_norm")(x)
        y = nn.gelu(self.dense(self.hidden, use_bias=False, name="up")(y))
        return x + self.dense(features, use_bias=False, name="down")(y)


class TextEncoder(nn.Module):
    """Classes of token sequences.

    Attributes:
        vocabulary: tokens; 0 is padding.
        classes: of the head, which is always a `flax.linen.Dense`.
        features: width D.
        layers, heads: as usual; the perceptron is four times as wide as D.
        length: most tokens of a sequence, one position each.
        dense, embed: make layers and tables.
        memory: a module that ``dense`` and ``embed`` are handed as ``memory=``, if they share one.
    """

    vocabulary: int
    classes: int
    features: int = 64
    layers: int = 2
    heads: int = 4
    length: int = 32
    dense: Factory = nn.Dense
    embed: Factory = nn.Embed
    memory: nn.Module | None = None

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B {self.classes}"]:
        if tokens.shape[1] > self.length:
            raise ValueError(f"tokens has shape {tokens.shape}; sequences have at most length = {self.length} tokens")
        shared = {} if self.memory is None else {"memory": self.memory}

        def dense(*arguments: Any, **options: Any) -> Any:
            return self.dense(*arguments, **options, **shared)

        # A sequence of padding alone is read as one token of it.
        mask = (tokens != 0) | (jnp.arange(tokens.shape[1]) == 0)
        x = self.embed(self.vocabulary, self.features, name="tokens", **shared)(tokens)
        x = x + self.embed(self.length, self.features, name="positions", **shared)(jnp.arange(tokens.shape[1]))
        for layer in range(self.layers):
            x = EncoderBlock(self.heads, 4 * self.features, dense, name=f"block_{layer}")(x, mask)
        x = nn.LayerNorm(use_bias=False, name="norm")(x)
        weight = mask[..., None].astype(x.dtype)
        return nn.Dense(self.classes, name="head")((x * weight).sum(1) / weight.sum(1))
