"""The next token from logits: greedy, by temperature, of the ``top_k`` likeliest, of the nucleus ``top_p``.

filtered = logits / temperature, then all but the top_k largest are dropped, then all but the smallest set of
           largest ones whose probability reaches top_p (Holtzman et al. 2020, arXiv 1904.09751)
token ~ softmax(filtered);        temperature 0: argmax(logits)
"""

import dataclasses
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DROPPED = -1e30
"""The logit of a token that cannot be drawn: finite, and probability 0 in float32."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; hashable, hence static under `jax.jit`.

    Attributes:
        temperature: 0 takes the likeliest token, the first of equals.
        top_k: tokens that stay, ties broken by their ids; ``None``, or more than there are: all.
        top_p: probability that those which stay reach, in (0, 1]; the likeliest always stays.

    Raises:
        ValueError: for values outside these.
        TypeError: for a top_k that is no integer.
    """

    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | int = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it is 0 (greedy) or positive, and finite")
        if self.top_k is not None and integer("top_k", self.top_k, "an integer, at least 1, or None") < 1:
            raise ValueError(f"top_k is {self.top_k}; it is at least 1, or None")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it is above 0 and at most 1")


def integer(name: str, value: Any, allowed: str) -> int:
    """``value`` if it is an integer, NumPy's and JAX's included, and no number that would have to be rounded.

    Raises:
        TypeError: if it is none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; allowed is {allowed}") from None


def filtered_logits(logits: Float[Array, "*B V"], sampling: Sampling) -> Float[Array, "*B V"]:
    """Logits whose softmax is the distribution that `sample` draws from, float32; the largest is 0.

    Raises:
        ValueError: for temperature 0, which is no distribution.
    """
    if sampling.temperature == 0:
        raise ValueError("temperature is 0; a distribution has a positive one")
    logits = logits.astype(jnp.float32)
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    scaled = jnp.maximum(scaled, DROPPED)
    kept = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if kept == logits.shape[-1] and sampling.top_p == 1:
        return scaled
    values, tokens = jax.lax.top_k(scaled, kept)
    if sampling.top_p < 1:
        probability = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        stays = (before < sampling.top_p).at[..., 0].set(True)
        values = jnp.where(stays, values, DROPPED)
    return jnp.put_along_axis(jnp.full_like(scaled, DROPPED), tokens, values, axis=-1, inplace=False)


def sample(key: Array | None, logits: Float[Array, "B V"], sampling: Sampling) -> Int[Array, " B"]:
    """One token a row, int32.

    Row ``r`` is drawn by ``fold_in(key, r)``: what it gets does not depend on the rows behind it.

    Args:
        key: of the draw; temperature 0 needs none.
        logits: of the next token; of a row with NaN or inf, the token means nothing (`generate` refuses it).
        sampling: how to draw.

    Raises:
        ValueError: for a positive temperature without a key.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError(f"key is None; temperature {sampling.temperature} draws, and needs a jax.random key")
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, filtered_logits(logits, sampling)).astype(jnp.int32)
