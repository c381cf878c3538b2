"""RACE attention without order over keys and queries that never lie in memory together: four passes over chunks.

The state of all keys is a sum, and so is its gradient over the queries that read it:

    for each chunk of keys       state   = collect_keys(state, k, v, ...)
    for each chunk of queries    out     = read_queries(state, q, ...)
                                 d_q, .. = pull_queries(state, q, g, ...)      summed: d_state, d_beta
    for each chunk of keys       d_k, .. = pull_keys(d_state, k, v, ...)       summed: d_beta

where ``g`` is the gradient of the outputs. Between chunks live the state and its gradient, ``S (V + 1)`` floats a
head each, so that length is bounded by time alone. Every pass is the derivative of the one above it, and together
they are `hashml.attention.race.race_attention` and its gradient, up to the order of sums.

Of a key the gradient depends on all queries: hence keys are read twice, and whoever cannot store them makes them
again. Reference: Joshi et al., ICLR 2026, arXiv 2510.04008, whose 75 million tokens are one such pass.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hashml.attention.linear_state import LinearState, Normalization, query_state, update_state
from hashml.attention.race import BUCKET_EPSILON, race_features

AnyArray = Array | np.ndarray


class QueryGradients(NamedTuple):
    """What a chunk of queries gives back.

    Attributes:
        d_q: of the chunk.
        d_state: its share of the state's gradient; shares add up, as by `merge_states`.
        d_beta: its share.
    """

    d_q: Float[Array, "B H T D"]
    d_state: LinearState
    d_beta: Float[Array, ""]


class KeyGradients(NamedTuple):
    """What a chunk of keys gives back: gradients of the chunk, and its share of ``beta``'s."""

    d_k: Float[Array, "B K N D"]
    d_v: Float[Array, "B K N V"]
    d_beta: Float[Array, ""]


def collect_keys(
    state: LinearState,
    k: Float[AnyArray, "B K N D"],
    v: Float[AnyArray, "B K N V"],
    planes: Float[AnyArray, "L P features"],
    beta: Float[AnyArray, ""] | float | int = 1.0,
) -> LinearState:
    """The state with a chunk of keys more; `hashml.attention.race.race_state` makes an empty one.

    Raises:
        ValueError: as `hashml.hashing.soft_hash`, or for a state of other planes, heads or values.
    """
    _check(state, planes, k.shape[1], v.shape[-1])
    return update_state(state, race_features(planes, beta, k), jnp.asarray(v))


def read_queries(
    state: LinearState,
    q: Float[AnyArray, "B H T D"],
    planes: Float[AnyArray, "L P features"],
    beta: Float[AnyArray, ""] | float | int = 1.0,
    *,
    normalization: Normalization = "global",
) -> Float[Array, "B H T V"]:
    """What a chunk of queries reads from the state of all keys, in float32.

    Raises:
        ValueError: as `collect_keys`; for heads of q that the state's do not divide.
    """
    kv_heads = state.mass.shape[1]
    if q.shape[1] % kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads and the state {kv_heads}; those of the state must divide them")
    _check(state, planes, kv_heads, state.value.shape[-1])
    epsilon = BUCKET_EPSILON if normalization == "per_bucket" else 0.0
    return query_state(state, race_features(planes, beta, q), normalization=normalization, epsilon=epsilon)


def pull_queries(
    state: LinearState,
    q: Float[AnyArray, "B H T D"],
    g: Float[AnyArray, "B H T V"],
    planes: Float[AnyArray, "L P features"],
    beta: Float[AnyArray, ""] | float | int = 1.0,
    *,
    normalization: Normalization = "global",
) -> QueryGradients:
    """Gradients of a chunk of queries whose outputs have the gradient ``g``; arguments as `read_queries`."""

    def read(state: LinearState, q: Array, beta: Array) -> Array:
        return read_queries(state, q, planes, beta, normalization=normalization)

    _, pull = jax.vjp(read, state, jnp.asarray(q), jnp.asarray(beta, jnp.float32))
    d_state, d_q, d_beta = pull(jnp.asarray(g, jnp.float32))
    return QueryGradients(d_q, d_state, d_beta)


def pull_keys(
    d_state: LinearState,
    k: Float[AnyArray, "B K N D"],
    v: Float[AnyArray, "B K N V"],
    planes: Float[AnyArray, "L P features"],
    beta: Float[AnyArray, ""] | float | int = 1.0,
) -> KeyGradients:
    """Gradients of a chunk of keys, from the state's gradient over all queries; arguments as `collect_keys`."""
    # The state is a sum: its gradient by a chunk does not depend on the other chunks.
    empty = jax.tree.map(jnp.zeros_like, d_state)
    _, pull = jax.vjp(
        lambda k, v, beta: collect_keys(empty, k, v, planes, beta),
        jnp.asarray(k),
        jnp.asarray(v),
        jnp.asarray(beta, jnp.float32),
    )
    return KeyGradients(*pull(d_state))


def _check(state: LinearState, planes: AnyArray, kv_heads: int, width: int) -> None:
    found, needed = state.value.shape[1:], (kv_heads, planes.shape[0] * 2 ** planes.shape[1], width)
    if found != needed:
        raise ValueError(f"state has the value of shape {found} a sequence; these keys and planes need {needed}")
