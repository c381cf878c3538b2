"""The state of attention by features: sums over keys, which add up over chunks, steps of a decoder and devices.

    mass[s] = sum_j phi(k_j)[s]        value[s, :] = sum_j phi(k_j)[s] v_j
    out[i] = phi(q_i) . value / (phi(q_i) . mass + epsilon)                      normalization = "global"
    out[i] = sum_s phi(q_i)[s] value[s] / (mass[s] + epsilon)                    normalization = "per_bucket"

It holds ``S (V + 1)`` floats a key head, whatever the length. Query head ``h`` reads key head ``h // (H / K)``.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

Normalization = Literal["global", "per_bucket"]

Features = Callable[[Any, Array], Array]
"""``features(params, x [..., T, D]) -> phi [..., T, S]``, float32, at least 0. A plain function: it is static."""


class LinearState(NamedTuple):
    """What the keys so far have left: sums over them. Two states of disjoint keys merge by addition.

    Attributes:
        mass: sums of features.
        value: sums of features times values.
    """

    mass: Float32[Array, "B K S"]
    value: Float32[Array, "B K S V"]


def init_state(batch: int, heads: int, features: int, width: int) -> LinearState:
    """The state of no key, for ``heads`` key heads, S = ``features`` and values of ``width`` coordinates."""
    return LinearState(jnp.zeros((batch, heads, features)), jnp.zeros((batch, heads, features, width)))


def merge_states(first: LinearState, second: LinearState) -> LinearState:
    """The state of the keys of both."""
    return LinearState(first.mass + second.mass, first.value + second.value)


def update_state(
    state: LinearState,
    phi_k: Float[Array, "B K N S"],
    v: Float[Array, "B K N V"],
    mask: Bool[Array, "B N"] | None = None,
) -> LinearState:
    """The state with more keys; those outside ``mask`` leave nothing."""
    phi_k = phi_k.astype(jnp.float32)
    if mask is not None:
        phi_k = jnp.where(mask[:, None, :, None], phi_k, 0)
    return merge_states(state, LinearState(phi_k.sum(axis=-2), outer(phi_k, v)))


def query_state(
    state: LinearState,
    phi_q: Float[Array, "B H T S"],
    *,
    normalization: Normalization = "global",
    epsilon: float | int = 0.0,
) -> Float32[Array, "B H T V"]:
    """What queries read from a state, each from all of its keys."""
    batch, heads, length, features = phi_q.shape
    grouped = phi_q.astype(jnp.float32).reshape(batch, state.mass.shape[1], -1, length, features)
    out = read_state(state, grouped, normalization, float(epsilon))
    return out.reshape(batch, heads, length, -1)


def read_state(state: LinearState, phi_q: Array, normalization: Normalization, epsilon: float) -> Array:
    """``phi_q [B, K, G, T, S]`` against the whole state."""
    mass, value = state
    if normalization == "per_bucket":
        value = value * reciprocal(mass + epsilon)[..., None]
        return jnp.einsum("bkgts,bksv->bkgtv", phi_q, value)
    mass_read = jnp.einsum("bkgts,bks->bkgt", phi_q, mass)
    return jnp.einsum("bkgts,bksv->bkgtv", phi_q, value) * reciprocal(mass_read + epsilon)[..., None]


def outer(phi: Array, v: Array) -> Array:
    return jnp.einsum("...ns,...nv->...sv", phi, v, preferred_element_type=jnp.float32)


def reciprocal(x: Array) -> Array:
    """1 / x, and 0 where there is nothing to divide by."""
    some = x > jnp.finfo(jnp.float32).tiny
    return jnp.where(some, 1 / jnp.where(some, x, 1), 0)
