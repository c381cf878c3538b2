"""Linear attention: the kernel of ``elu + 1`` in softmax's place (Katharopoulos et al., ICML 2020, arXiv 2006.16236).

    phi(x) = elu(x) + 1        out[i] = phi(q_i) . sum_j phi(k_j) v_j' / (phi(q_i) . sum_j phi(k_j) + 1e-6)

The state is ``D (V + 1)`` floats a head. The public version that drops the denominator is another method.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from hashml.attention.linear_core import CHUNK, TILE, feature_attention
from hashml.attention.linear_state import LinearState

EPSILON = 1e-6


def elu_features(x: Float[Array, "*n"]) -> Float32[Array, "*n"]:
    """``elu(x) + 1`` in float32; exp(x) below 0, whose digits a sum with 1 would lose."""
    x = x.astype(jnp.float32)
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def _features(params: Any, x: Array) -> Array:
    del params
    return elu_features(x)


def elu_attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    *,
    causal: bool = False,
    mask: Bool[Array, "B N"] | None = None,
    tile: int = TILE,
    chunk: int = CHUNK,
) -> Float[Array, "B H T V"]:
    """Attention linear in T + N. Arguments and errors as `hashml.attention.linear_core.linear_attention`."""
    return elu_extend(None, q, k, v, causal=causal, mask=mask, tile=tile, chunk=chunk)[0]


def elu_extend(
    state: LinearState | None,
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    *,
    causal: bool = True,
    mask: Bool[Array, "B N"] | None = None,
    tile: int = TILE,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B H T V"], LinearState]:
    """`elu_attention` after the keys of ``state`` (None before the first), and the state with these."""
    return feature_attention(
        q, k, v, features=_features, causal=causal, mask=mask, state=state, epsilon=EPSILON, tile=tile, chunk=chunk
    )
