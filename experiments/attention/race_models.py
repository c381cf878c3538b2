"""Small transformers in which only the attention differs, and what a token costs in them.

    x = embedding + positions
    x = x + attention(norm(x));  x = x + mlp(norm(x))        ``layers`` times
    logits = head(norm(x))                                   of each token, of their mean, or of the last ones

Planes, directions and rotations are drawn from a key that the model is called with, and are no parameters: so all
seeds of a method are one program.
"""

import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from hashml.attention.linear import elu_attention
from hashml.attention.linear_core import linear_attention
from hashml.attention.linformer import linformer_attention
from hashml.attention.multi_head import HashedAttention
from hashml.attention.performer import orthogonal_directions, performer_attention
from hashml.attention.race import BETA_RANGE, angular_attention, race_attention
from hashml.attention.reformer import reformer_attention, reformer_rotations
from hashml.attention.yoso import yoso_expected
from hashml.hashing.simhash import srp_planes

Kind = Literal["softmax", "race", "linear", "performer", "angular", "linformer", "yoso", "reformer", "mean"]


class Method(NamedTuple):
    """An attention and its sizes.

    Attributes:
        kind: of the attention; ``mean`` gives every query the mean of the values that it sees.
        tables: of RACE; rounds of Reformer.
        bits: of RACE, and of YOSO, which is taken at infinitely many rounds.
        per_bucket: whether RACE is normalised bucket by bucket, as in the released causal code.
        size: Performer's features, Linformer's mixtures, the power of angular attention, Reformer's chunk.
    """

    kind: Kind
    tables: int = 0
    bits: int = 0
    per_bucket: bool = False
    size: int = 0


METHODS = {
    "softmax": Method("softmax"),
    "race-2x2": Method("race", 2, 2),
    "race-3x3": Method("race", 3, 3),
    "race-4x4": Method("race", 4, 4),
    "race-2x2-bucket": Method("race", 2, 2, per_bucket=True),
    "race-4x4-bucket": Method("race", 4, 4, per_bucket=True),
    "linear": Method("linear"),
    "performer-64": Method("performer", size=64),
    "performer-256": Method("performer", size=256),
    "angular-8": Method("angular", size=8),
    "linformer-128": Method("linformer", size=128),
    "yoso-8": Method("yoso", bits=8),
    "reformer-16": Method("reformer", tables=4, size=16),
    "mean": Method("mean"),
}
"""RACE by tables x bits; Performer-64 has the state of RACE 4 x 4, Performer-256 and angular**8 are the paper's."""


class Sizes(NamedTuple):
    """Sizes of a transformer, the same for all methods of a task.

    Attributes:
        outputs: classes of the head.
        length: tokens, at most.
        causal: whether a token sees no later ones.
        vocabulary: tokens that there are; None where inputs are vectors.
        reads: what the head is put on: every token, their mean, or so many last ones.
        smear: whether a token is told what stood before it, by a dense layer. A key and its value are then one
            token's matter, and training takes a part of the steps.
        features, layers, heads, hidden: as usual.
    """

    outputs: int
    length: int
    causal: bool
    vocabulary: int | None = None
    reads: Literal["every", "mean"] | int = "every"
    smear: bool = False
    features: int = 64
    layers: int = 2
    heads: int = 4
    hidden: int = 256


class Transformer(nn.Module):
    """A transformer with ``method`` for its attention."""

    sizes: Sizes
    method: Method

    @nn.compact
    def __call__(self, x: Array, key: Key[Array, ""]) -> Array:
        sizes = self.sizes
        if sizes.vocabulary is None:
            x = nn.Dense(sizes.features, name="patches")(x)
        else:
            x = nn.Embed(sizes.vocabulary, sizes.features, name="tokens")(x)
        x = x + self.param("positions", _sinusoids, (sizes.length, sizes.features))[: x.shape[1]]
        if sizes.smear:
            before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
            x = x + nn.Dense(sizes.features, use_bias=False, name="before")(before)
        for layer in range(sizes.layers):
            x = Block(sizes, self.method, name=f"block_{layer}")(x, jax.random.fold_in(key, layer))
        if isinstance(sizes.reads, int):
            x = x[:, -sizes.reads :]
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(sizes.outputs, name="head")(x.mean(axis=1) if sizes.reads == "mean" else x)


class Block(nn.Module):
    """Attention and a GELU perceptron, each behind a norm and beside a skip."""

    sizes: Sizes
    method: Method

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], key: Key[Array, ""]) -> Float[Array, "B T D"]:
        attend = functools.partial(self._attend, key)
        shared = self.method.kind == "reformer"
        attention = HashedAttention(self.sizes.heads, attend, causal=self.sizes.causal, share_qk=shared)
        x = x + attention(nn.LayerNorm(name="attention_norm")(x))
        y = nn.gelu(nn.Dense(self.sizes.hidden, name="up")(nn.LayerNorm(name="mlp_norm")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y)

    def _attend(self, key: Array, q: Array, k: Array, v: Array, *, causal: bool, mask: Array | None) -> Array:
        del mask  # sequences are whole
        method, width = self.method, q.shape[-1]
        match method.kind:
            case "softmax":
                q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
                return jax.nn.dot_product_attention(q, k, v, is_causal=causal).swapaxes(1, 2)
            case "race":
                log_beta = self.param("log_beta", nn.initializers.zeros, ())
                beta = jnp.clip(jnp.exp(log_beta), *BETA_RANGE)
                planes = srp_planes(key, method.tables, method.bits, width)
                how = "per_bucket" if method.per_bucket else "global"
                return race_attention(q, k, v, planes, beta, causal=causal, normalization=how)
            case "linear":
                return elu_attention(q, k, v, causal=causal)
            case "performer":
                return performer_attention(q, k, v, orthogonal_directions(key, method.size, width), causal=causal)
            case "angular":
                return angular_attention(q, k, v, method.size, causal=causal)
            case "linformer":
                shape = (method.size, k.shape[2])
                mix_k, mix_v = (self.param(name, nn.initializers.normal(0.02), shape) for name in ("mix_k", "mix_v"))
                return linformer_attention(q, k, v, mix_k, mix_v)
            case "yoso":
                return yoso_expected(q, k, v, method.bits)
            case "reformer":
                rotations = reformer_rotations(key, method.tables, width, q.shape[2] // method.size)
                return reformer_attention(q, v, rotations, causal=causal, chunk=method.size)
            case "mean":
                return linear_attention(jnp.ones_like(q[..., :1]), jnp.ones_like(k[..., :1]), v, causal=causal)


def _sinusoids(key: Array, shape: tuple[int, int]) -> Array:
    """Where learned positions begin: turns of 6 to 600 tokens. From small random ones attention to the token before
    is found several times later, which no training of minutes can wait for."""
    del key
    length, features = shape
    angles = np.arange(length)[:, None] / 100.0 ** (np.arange(features // 2) / (features // 2))
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)


# --- what a token costs -------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of one head of a layer.

    Attributes:
        flops: of products, forward and for each token, two a multiplication and addition. Linear methods are counted
            in the form of a decoder, where chunks of a causal pass cost more and are faster.
        state: floats that later queries need.
    """

    flops: float | int
    state: int


def cost(method: Method, width: int, length: int, *, causal: bool) -> Cost:
    """What a token costs among ``length`` of them, with heads of ``width`` coordinates."""
    seen = (length + 1) / 2 if causal else length

    def features(size: int, hashing: int) -> Cost:
        return Cost(hashing + 4 * size * width + 4 * size, size * (width + 1))

    match method.kind:
        case "race":
            size = method.tables * 2**method.bits
            return features(size, 4 * width * method.tables * method.bits)
        case "linear":
            return features(width, 0)
        case "performer":
            return features(method.size, 4 * width * method.size)
        case "linformer":
            return Cost(8 * method.size * width, 2 * method.size * width)
        case "reformer":
            buckets = length // method.size
            return Cost(method.tables * (width * buckets + 8 * method.size * width), 2 * length * width)
        case "mean":
            return Cost(2 * width, width + 1)
        case _:
            return Cost(4 * seen * width, 2 * length * width)


def costs(method: Method, sizes: Sizes, parameters: Any) -> dict[str, int | float]:
    """The columns of a row: parameters of the model, FLOPs of a token and floats of the state in one layer."""
    width = sizes.features // sizes.heads
    found = {length: cost(method, width, length, causal=sizes.causal) for length in (256, 1024, 4096)}
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
        **{f"flops_{length}": sizes.heads * one.flops for length, one in found.items()},
        "state_4096": sizes.heads * found[4096].state,
    }
