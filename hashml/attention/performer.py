"""Performer: positive random features of softmax's kernel, FAVOR+ (Choromanski et al., ICLR 2021, arXiv 2009.14794).

With ``y = x D**(-1/4)`` and ``m`` random directions ``w_s``,

    phi(x)[s] = (exp(w_s . y - |y|^2 / 2 - c) + eps) / sqrt(m)        E phi(q) . phi(k) = exp(q . k / sqrt(D))

where ``c = eps = 0``. The directions are orthogonal in blocks of ``D``, each of the length of a Gaussian vector: the
estimate stays unbiased and varies less. ``c`` keeps the exponentials at most 1 and cancels in the ratio: the largest
exponent of the features of a query, and of all keys of a head, since one constant a key would be another kernel.
Directions are drawn once and not again while training; eps is 1e-4.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key

from hashml.attention.linear_causal import even_tiles, split_tiles, tile_mask
from hashml.attention.linear_core import CHUNK, TILE, feature_attention
from hashml.attention.multi_head import HashedAttention

AnyArray = Array | np.ndarray

EPSILON = 1e-4


def orthogonal_directions(key: Key[Array, ""], features: int, width: int) -> Float32[Array, "{features} {width}"]:
    """``m = features`` directions, Gaussian in length, orthogonal in blocks of ``width``.

    The paper takes ``m = int(D ln D)`` by default.

    Raises:
        ValueError: for sizes below 1.
    """
    for name, size in (("features", features), ("width", width)):
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    blocks = -(-features // width)
    turned, lengths = jax.random.split(key)
    turns, upper = jnp.linalg.qr(jax.random.normal(turned, (blocks, width, width)))
    # Signs of the diagonal make the turns uniform.
    turns = turns * jnp.sign(jnp.diagonal(upper, axis1=1, axis2=2))[:, None, :]
    norms = jnp.linalg.norm(jax.random.normal(lengths, (features, width)), axis=1)
    return turns.swapaxes(1, 2).reshape(-1, width)[:features] * norms[:, None]


def performer_exponents(x: Float[AnyArray, "*n D"], directions: Float[AnyArray, "m D"]) -> Float32[Array, "*n m"]:
    """``w_s . y - |y|^2 / 2``: what is exponentiated, before a constant."""
    y = jnp.asarray(x, jnp.float32) * directions.shape[1] ** -0.25
    directions = jax.lax.stop_gradient(jnp.asarray(directions, jnp.float32))
    inner = jnp.matmul(y, directions.T, precision=jax.lax.Precision.HIGHEST)
    return inner - jnp.sum(y * y, axis=-1, keepdims=True) / 2


def performer_features(
    x: Float[AnyArray, "*n D"],
    directions: Float[AnyArray, "m D"],
    constant: Float[AnyArray, "..."] | float | int = 0.0,
    epsilon: Float[AnyArray, ""] | float | int = EPSILON,
) -> Float32[Array, "*n m"]:
    """``phi`` with the caller's ``c``, which broadcasts against ``[*n, m]``."""
    return (jnp.exp(performer_exponents(x, directions) - constant) + epsilon) / math.sqrt(directions.shape[0])


def _query_features(params: tuple[Array, Array, Array], x: Array) -> Array:
    directions, _, epsilon = params
    largest = performer_exponents(x, directions).max(axis=-1, keepdims=True)
    return performer_features(x, directions, jax.lax.stop_gradient(largest), epsilon)


def _key_features(params: tuple[Array, Array, Array], x: Array) -> Array:
    directions, largest, epsilon = params
    return performer_features(x, directions, largest, epsilon)


def _largest_exponent(k: Array, directions: Array, mask: Array | None, tile: int) -> Array:
    """``[B, K, 1, 1]``, over the features of all keys that exist."""
    batch, _, length, _ = k.shape
    tiles, tile = even_tiles(length, tile)

    def step(largest: Array, part: tuple) -> tuple[Array, None]:
        k, mask = part
        exponents = performer_exponents(k, directions).max(axis=-1, keepdims=True)
        exponents = exponents if mask is None else jnp.where(mask, exponents, -1e30)
        return jnp.maximum(largest, exponents.max(axis=-2, keepdims=True)), None

    parts = (split_tiles(k, tiles, tile), tile_mask(mask, batch, length, tiles, tile))
    start = jnp.full_like(k, -1e30, jnp.float32, shape=(*k.shape[:2], 1, 1))
    return jax.lax.stop_gradient(jax.lax.scan(step, start, parts)[0])


def performer_attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    directions: Float[AnyArray, "m width"],
    *,
    causal: bool = False,
    mask: Bool[Array, "B N"] | None = None,
    epsilon: float | int = EPSILON,
    tile: int = TILE,
    chunk: int = CHUNK,
) -> Float[Array, "B H T V"]:
    """Softmax attention's estimate, linear in T + N; arguments as `hashml.attention.linear_core.linear_attention`.

    It has no streaming state: the constant of the keys is the largest over all of them, which a causal query learns
    through rounding (and ``epsilon``) alone.

    Raises:
        ValueError: as `linear_attention`; for directions of another width than q, or a negative epsilon.
    """
    if directions.shape[1] != q.shape[-1]:
        raise ValueError(f"directions have width {directions.shape[1]} and q {q.shape[-1]}; they must be the same")
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}; it must be finite and at least 0")
    fixed = jax.lax.stop_gradient(jnp.asarray(directions, jnp.float32))
    largest = _largest_exponent(jax.lax.stop_gradient(k), fixed, mask, tile)
    out, _ = feature_attention(
        q,
        k,
        v,
        features=_query_features,
        key_features=_key_features,
        params=(fixed, largest, jnp.float32(epsilon)),
        causal=causal,
        mask=mask,
        tile=tile,
        chunk=chunk,
    )
    return out


class PerformerAttention(HashedAttention, kw_only=True):
    """`HashedAttention` by Performer.

    Attributes:
        features: m random directions; 256 in RACE's tables.
        seed: picks them.
    """

    features: int = 256
    seed: int = 0

    def attend(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        directions = orthogonal_directions(jax.random.key(self.seed), self.features, q.shape[-1])
        return performer_attention(q, k, v, directions, causal=self.causal, mask=mask)
