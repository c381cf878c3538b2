"""Attention whose kernel is an inner product of features: what RACE, linear attention and Performer compute alike.

With features ``phi(x)`` of ``S`` coordinates and the keys that query ``i`` may see (all, or those up to ``i``),

    mass[s] = sum_j phi(k_j)[s]        value[s, :] = sum_j phi(k_j)[s] v_j
    out[i] = phi(q_i) . value / (phi(q_i) . mass + epsilon)                      normalization = "global"
    out[i] = sum_s phi(q_i)[s] value[s] / (mass[s] + epsilon)                    normalization = "per_bucket"

Features of the whole sequence never exist. Tiles of tokens are mapped, used and forgotten, forward and backward: the
pass without order (`linear_unordered`) and the causal one (`linear_causal`) have gradients of their own. What stays
between tiles is the state, ``S (V + 1)`` floats a head whatever the length; over devices too. All sums are float32,
results have the dtype of ``v``, and a query that sees no key gets zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hashml.attention.linear_causal import (
    Form,
    causal_attention,
)
from hashml.attention.linear_state import (
    Features,
    LinearState,
    Normalization,
    init_state,
    merge_states,
)
from hashml.attention.linear_unordered import collect_tiles, read_tiles
from hashml_kernels.manual_axes import varying_alike

TILE, CHUNK = 2048, 64
"""Tokens whose features exist at a time, and rows of the triangle inside."""


def linear_attention(
    phi_q: Float[Array, "B H T S"],
    phi_k: Float[Array, "B K N S"],
    v: Float[Array, "B K N V"],
    *,
    causal: bool = False,
    mask: Bool[Array, "B N"] | None = None,
    normalization: Normalization = "global",
    epsilon: float | int = 0.0,
    tile: int = TILE,
    chunk: int = CHUNK,
) -> Float[Array, "B H T V"]:
    """Attention of features that the caller has computed; `feature_attention` computes and forgets them.

    Args:
        phi_q, phi_k: features, at least 0.
        v: values.
        causal: query ``i`` sees the keys ``0 .. i``, itself included.
        mask: keys that exist; the features of the others count as 0.
        normalization: see the module.
        epsilon: added to each denominator.
        tile, chunk: sizes of the passes; they change rounding alone.

    Raises:
        ValueError: as `feature_attention`.
    """
    out, _ = feature_attention(
        phi_q,
        phi_k,
        v,
        features=_identity,
        causal=causal,
        mask=mask,
        normalization=normalization,
        epsilon=epsilon,
        tile=tile,
        chunk=chunk,
    )
    return out


def feature_attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    *,
    features: Features,
    params: Any = (),
    key_features: Features | None = None,
    causal: bool = False,
    mask: Bool[Array, "B N"] | None = None,
    state: LinearState | None = None,
    normalization: Normalization = "global",
    epsilon: float | int = 0.0,
    tile: int = TILE,
    chunk: int = CHUNK,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B H T V"], LinearState]:
    """Attention with the kernel ``features(params, q) . key_features(params, k)``, and the state after it.

    Args:
        q, k, v: queries, keys and values.
        features, key_features: of a query and of a key; by default the same function.
        params: float arrays that the features read. They get gradients: a feature function stops those that it
            does not want.
        causal, mask, normalization, epsilon, tile, chunk: as `linear_attention`.
        state: of keys before these, which every query sees.
        axis_name: an axis of the mesh over which `jax.shard_map` split the sequence, in order. One state a device
            and head is exchanged, whatever the length; the state that comes back is that of the whole sequence.

    Raises:
        ValueError: for another normalization, heads that the key heads do not divide, a tile or chunk below 1,
            a negative epsilon, or causal queries that are not as many as the keys.
    """
    batch, heads, length, _ = q.shape
    kv_heads = k.shape[1]
    _check(heads, kv_heads, length, k.shape[2], causal, normalization, epsilon, tile, chunk)
    form = Form(features, key_features or features, normalization, float(epsilon), tile, chunk)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, length, q.shape[-1])
    if state is None:
        mapped = jax.eval_shape(form.key_features, params, k)
        state = init_state(batch, kv_heads, mapped.shape[-1], v.shape[-1])
    # Under `jax.shard_map` what a scan carries must vary from its start.
    (grouped, k, v, mask, params, before), _ = varying_alike(grouped, k, v, mask, params, state)
    total = None
    if axis_name is not None:
        own = collect_tiles(form, params, k, v, mask, jax.tree.map(jnp.zeros_like, before))
        before, total = _across(own, state, axis_name, causal)
        (_, before), _ = varying_alike(grouped, before)
    if causal:
        out, after = causal_attention(form, grouped, k, v, mask, params, before)
    else:
        after = collect_tiles(form, params, k, v, mask, before) if total is None else total
        out = read_tiles(form, v.dtype, params, grouped, after)
    after = after if total is None else total
    return out.reshape(batch, heads, length, v.shape[-1]), after


def _check(
    heads: int, kv_heads: int, queries: int, keys: int, causal: bool, normalization: str, epsilon: float, *sizes: int
) -> None:
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k {kv_heads}; the heads of k must divide those of q")
    if causal and queries != keys:
        raise ValueError(f"q has {queries} tokens and k {keys}; with causal=True they must be as many")
    if normalization not in ("global", "per_bucket"):
        raise ValueError(f"normalization is {normalization!r}; it must be 'global' or 'per_bucket'")
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon is {epsilon}; it must be finite and at least 0")
    for name, size in zip(("tile", "chunk"), sizes, strict=True):
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")


def _identity(params: Any, x: Array) -> Array:
    del params
    return x.astype(jnp.float32)


def _across(own: LinearState, state: LinearState, axis_name: str, causal: bool) -> tuple[LinearState, LinearState]:
    """The states before and after a device's part of the sequence; without order, both are the whole's."""
    # To float32, which it is: otherwise XLA adds up in bfloat16 where a TPU's products round to that anyway.
    total = jax.tree.map(lambda x: jax.lax.reduce_precision(jax.lax.psum(x, axis_name), 8, 23), own)
    after = merge_states(state, total)
    if not causal:
        return after, after
    earlier = jnp.arange(jax.lax.axis_size(axis_name)) < jax.lax.axis_index(axis_name)

    def prefix(x: Array) -> Array:
        parts = jax.lax.all_gather(x, axis_name)
        return jnp.where(earlier.reshape(-1, *[1] * x.ndim), parts, 0).sum(axis=0)

    return merge_states(state, jax.tree.map(prefix, own)), after
