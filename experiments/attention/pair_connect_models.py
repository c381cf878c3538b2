"""The models that PairConnect is compared with, and what a token costs in each.

All have the perceptrons, the norms and the tied output layer of `PairConnectLM`, and differ in how a token learns of
others: by pairs, by softmax attention, or not at all. Attention is given positions that it may learn, PairConnect the
buckets of distance.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hashml.attention.multi_head import HashedAttention
from hashml.attention.pair_connect import EXACT_ROWS, HASHED_ROWS, PairConnect, pair_table_rows
from hashml.attention.pair_connect_model import PairConnectLM, ResidualMLP


class Sizes(NamedTuple):
    """What all contenders of a task have in common.

    Attributes:
        vocabulary: words.
        context: tokens of a sequence.
        features: width of the model.
        blocks: perceptrons, of four times the width, and layers of attention.
        pair_features: P.
        window: w.
        heads: of attention.
    """

    vocabulary: int
    context: int
    features: int = 64
    blocks: int = 2
    pair_features: int = 16
    window: int = 32
    heads: int = 4


class Contender(NamedTuple):
    """How tokens learn of each other.

    Attributes:
        kind: by ``pairs``, by ``attention``, or not (``none``).
        features: width of the model.
        window: tokens that a token sees; the context for all.
        rows: of the hashed memory; None leaves it to `PairConnect`.
    """

    kind: Literal["pairs", "attention", "none"]
    features: int
    window: int
    rows: int | None = None


def contender(method: str, sizes: Sizes) -> Contender:
    """The contender of a name; ``pairs-2^k`` has a hashed memory of so many rows.

    ``attention-bytes`` and ``attention-flops`` have the width that comes nearest to the bytes and the FLOPs of
    ``pairs``.

    Raises:
        ValueError: for a name that there is not.
    """
    ours = Contender("pairs", sizes.features, sizes.window)
    match method.split("-", 1):
        case ["pairs"]:
            return ours
        case ["pairs", power] if power.startswith("2^") and power[2:].isdecimal():
            return ours._replace(rows=2 ** int(power[2:]))
        case ["bigram"]:
            return ours._replace(window=2)
        case ["none"]:
            return Contender("none", sizes.features, 1)
        case ["attention"]:
            return Contender("attention", sizes.features, sizes.context)
        case ["attention", "window"]:
            return Contender("attention", sizes.features, sizes.window)
        case ["attention", "bytes"]:
            return _nearest(functools.partial(weights, sizes=sizes), weights(ours, sizes), sizes)
        case ["attention", "flops"]:
            return _nearest(functools.partial(flops, sizes=sizes), flops(ours, sizes), sizes)
    raise ValueError(
        f"method is {method!r}; it must be pairs, pairs-2^k, bigram, none, attention, attention-window, "
        "attention-bytes or attention-flops"
    )


def _nearest(measure: Any, target: int, sizes: Sizes) -> Contender:
    """The width, a multiple of the heads, whose measure, which grows with it, is nearest to the target."""
    several = [Contender("attention", sizes.heads * n, sizes.context) for n in range(1, 1025)]
    return min(several, key=lambda one: abs(measure(one) - target))


def weights(one: Contender, sizes: Sizes) -> int:
    """Weights stored, every table and position included; four bytes each."""
    d, v = one.features, sizes.vocabulary
    perceptron = 2 * 4 * d * d + 5 * d + 2 * d  # with biases and a norm
    total = v * d + sizes.blocks * perceptron + 2 * d
    if one.kind == "attention":
        total += sizes.context * d + sizes.blocks * (4 * d * d + 4 * d + 2 * d)
    if one.kind == "pairs":
        total += pair_budget(one, sizes) + one.window + sizes.pair_features * d
    return total


def pair_budget(one: Contender, sizes: Sizes) -> int:
    """Weights of the table of pairs, or of the memory in its place."""
    exact = pair_table_rows(sizes.vocabulary, window=one.window)
    return (one.rows or (exact if exact <= EXACT_ROWS else HASHED_ROWS)) * sizes.pair_features


def flops(one: Contender, sizes: Sizes) -> int:
    """FLOPs of products for the last token of a sequence in a decoder, two a multiplication and addition."""
    d = one.features
    total = 2 * (sizes.blocks * 2 * 4 * d * d + sizes.vocabulary * d)
    if one.kind == "attention":
        total += sizes.blocks * 2 * (4 * d * d + 2 * min(one.window, sizes.context) * d)
    if one.kind == "pairs":
        total += 2 * sizes.pair_features * (one.window + d)
    return total


def looked_up(one: Contender, sizes: Sizes) -> int:
    """Bytes of the table that a token reads."""
    return 4 * one.window * sizes.pair_features if one.kind == "pairs" else 0


def model(one: Contender, sizes: Sizes, seed: int = 0) -> nn.Module:
    """The module; ``seed`` picks the hash function of a hashed memory."""
    if one.kind == "attention":
        return AttentionLM(sizes, one.features, None if one.window >= sizes.context else one.window)
    pairs = ()
    if one.kind == "pairs":
        budget = None if one.rows is None else one.rows * sizes.pair_features
        pairs = (
            PairConnect(sizes.vocabulary, one.features, sizes.pair_features, one.window, budget=budget, seed=seed),
        )
    return PairConnectLM(sizes.vocabulary, one.features, pairs=pairs, blocks=sizes.blocks)


class AttentionLM(nn.Module):
    """`PairConnectLM` with positions, and softmax attention in front of each perceptron."""

    sizes: Sizes
    features: int
    window: int | None

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        words = nn.Embed(self.sizes.vocabulary, self.features, name="words")
        # Words are as long as positions, as in the first Transformer: the output layer's are far shorter, and would
        # be lost beside them.
        x = words(ids) * math.sqrt(self.features)
        x = x + self.param("positions", turns, (self.sizes.context, self.features))[: ids.shape[1]]
        for k in range(self.sizes.blocks):
            attention = HashedAttention(self.sizes.heads, self._attend, causal=True, name=f"attention_{k}")
            x = x + attention(nn.LayerNorm(name=f"norm_{k}")(x))
            x = ResidualMLP(4 * self.features, name=f"block_{k}")(x)
        return words.attend(nn.LayerNorm(name="norm")(x))

    def _attend(self, q: Array, k: Array, v: Array, *, causal: bool, mask: Array | None) -> Array:
        del mask  # sequences are whole
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        near = None if self.window is None else (self.window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, local_window_size=near).swapaxes(1, 2)


def turns(key: Array, shape: tuple[int, int]) -> Float[Array, "T D"]:
    """Where learned positions begin: sines of 6 to 600 tokens, as in `attention.race`. From small random ones
    attention to the token before is found several times later."""
    del key
    length, features = shape
    angles = np.arange(length)[:, None] / 100.0 ** (np.arange(features // 2) / (features // 2))
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)
