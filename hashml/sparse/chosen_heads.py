"""Attention of a few heads, and what becomes of the keys and values of the others (Deja Vu, ICML 2023).

A head that is skipped at a token has no key and no value for it when it is chosen later. Two ways out:

    dense_kv     keys and values of all heads are computed and written at every token; only queries, scores and the
                 output projection of the chosen heads are
    lazy_kv      a layer keeps the attention inputs of the last ``ring`` tokens and counts for each key head how many
                 of the newest tokens it misses. A head that is chosen computes keys and values of all of these; with
                 the last token that the ring holds, all heads do. The matrices of other heads are not read

Both give the same outputs: a key is the same product of the same input, early or late. With grouped queries a key
head is computed where any of its query heads is chosen. Matrices lie by head, ``[heads, d, D]``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from hashml.models.decoder import DecoderConfig, Params
from hashml.models.exact_attention import masked_attention


class Ring(NamedTuple):
    """What lazy keys and values are made of.

    Attributes:
        inputs: of attention, normed, of the current run of R columns; the token of column ``s`` at ``s mod R``.
        missing: newest tokens for which a key head has no key yet.
    """

    inputs: Float[Array, "B R d"]
    missing: Int32[Array, "B H"]


def empty_ring(batch: int, config: DecoderConfig, ring: int, dtype: Any) -> Ring:
    """Nothing is missing after a dense prompt."""
    return Ring(jnp.zeros((batch, ring, config.features), dtype), jnp.zeros((batch, config.kv_heads), jnp.int32))


def project_heads(
    weights: Params, name: str, u: Float[Array, "B n d"], idx: Int[Array, "*B K"] | None
) -> Float[Array, "B K n D"]:
    """Queries, keys or values of listed heads.

    Args:
        weights: of a layer, by head.
        name: ``"query"``, ``"key"`` or ``"value"``.
        u: inputs.
        idx: ``[B, K]`` for a list a row, ``[K]`` for one list, ``None`` for all heads.
    """
    kernel, bias = weights[name], weights.get(f"{name}_bias")
    if idx is not None:
        kernel, bias = kernel[idx], None if bias is None else bias[idx]
    rows = "b" if idx is not None and idx.ndim == 2 else ""
    out = jnp.einsum(f"bnd,{rows}hde->bhne", u, kernel)
    return out if bias is None else out + bias[..., None, :]


def merge_heads(
    weights: Params, out: Float[Array, "B K D"], idx: Int[Array, "*B K"], valid: Bool[Array, "*B K"] | None
) -> Float[Array, "B d"]:
    """The output projection of listed heads; the others contribute nothing."""
    if valid is not None:
        out = jnp.where(valid[..., None], out, 0)
    rows = "b" if idx.ndim == 2 else ""
    return jnp.einsum(f"bhe,{rows}hed->bd", out, weights["output"][idx])


def attend_chosen(
    config: DecoderConfig,
    q: Float[Array, "B K 1 D"],
    k: Float[Array, "B H C D"],
    v: Float[Array, "B H C D"],
    idx: Int[Array, "*B K"],
    now: Int[Array, "B 1"],
    positions: Int[Array, "B C"],
) -> Float[Array, "B K D"]:
    """Exact attention of rotated queries of the listed query heads over the cache of their key heads."""
    of = jnp.broadcast_to(idx // (config.heads // config.kv_heads), q.shape[:2])[:, :, None, None]
    keys, values = (jnp.take_along_axis(cache, of, axis=1) for cache in (k, v))
    return masked_attention(q, keys, values, now, positions, config.sliding_window)[:, :, 0]


def key_heads(config: DecoderConfig, idx: Int[Array, "*B K"], valid: Bool[Array, "*B K"] | None, batch: int) -> Any:
    """Which key heads the listed query heads read: ``(idx [B, M], valid [B, M])``, each once."""
    lists = jnp.broadcast_to(idx, (batch, idx.shape[-1])) // (config.heads // config.kv_heads)
    counts = jnp.ones_like(lists) if valid is None else jnp.broadcast_to(valid, lists.shape).astype(jnp.int32)
    named = jnp.zeros((batch, config.kv_heads), jnp.int32).at[jnp.arange(batch)[:, None], lists].max(counts)
    marked, found = jax.lax.top_k(named, min(config.kv_heads, idx.shape[-1]))
    return found.astype(jnp.int32), marked > 0


def write_all(
    weights: Params, config: DecoderConfig, k: Array, v: Array, u: Float[Array, "B d"], now: Array, slot: Array
) -> tuple[Float[Array, "B H C D"], Float[Array, "B H C D"]]:
    """``dense_kv``: the caches with the token of column ``slot`` in all heads."""
    key, value = (project_heads(weights, name, u[:, None], None) for name in ("key", "value"))
    place = (0, 0, slot, 0)
    key = _rotated(config, key, now).astype(k.dtype)
    return jax.lax.dynamic_update_slice(k, key, place), jax.lax.dynamic_update_slice(v, value.astype(v.dtype), place)


def write_chosen(
    weights: Params,
    config: DecoderConfig,
    k: Float[Array, "B H C D"],
    v: Float[Array, "B H C D"],
    ring: Ring,
    u: Float[Array, "B d"],
    chosen: tuple[Int32[Array, "B M"], Bool[Array, "B M"]],
    positions: Int[Array, "B C"],
    slot: Int[Array, ""],
) -> tuple[Float[Array, "B H C D"], Float[Array, "B H C D"], Ring]:
    """``lazy_kv``: the caches with all that the chosen key heads had missed, and of all heads when the ring is full.

    Args:
        weights: of the layer, by head.
        config: of the model.
        k, v: the caches.
        ring: before this token.
        u: attention input of this token.
        chosen: key heads that are about to be read, from `key_heads`.
        positions: of the tokens in all columns.
        slot: column of this token.
    """
    size = ring.inputs.shape[1]
    place = slot % size
    inputs = jax.lax.dynamic_update_slice(ring.inputs, u[:, None].astype(ring.inputs.dtype), (0, place, 0))
    columns = jnp.minimum(slot - place + jnp.arange(size), k.shape[2] - 1)
    where = jnp.take(positions, columns, axis=1)
    behind = place - jnp.arange(size)  # tokens that came after; negative: not yet here

    def filled(k: Array, v: Array, missing: Array, idx: Array, valid: Array) -> tuple[Array, Array, Array]:
        lack = jnp.take_along_axis(missing, idx, axis=1)[:, :, None]
        write = valid[:, :, None] & (behind >= 0) & (behind < lack)
        at = (jnp.arange(idx.shape[0])[:, None, None], idx[:, :, None], jnp.where(write, columns, k.shape[2]))
        key, value = (project_heads(weights, name, inputs.astype(u.dtype), idx) for name in ("key", "value"))
        k = k.at[at].set(_rotated(config, key, where).astype(k.dtype), mode="drop")
        v = v.at[at].set(value.astype(v.dtype), mode="drop")
        done = jnp.zeros_like(missing).at[at[0][..., 0], idx].max(valid.astype(jnp.int32))
        return k, v, jnp.where(done > 0, 0, missing)

    def all_filled(k: Array, v: Array, missing: Array) -> tuple[Array, Array, Array]:
        everyone = jnp.broadcast_to(jnp.arange(config.kv_heads, dtype=jnp.int32), missing.shape)
        return filled(k, v, missing, everyone, jnp.ones(missing.shape, bool))

    k, v, missing = filled(k, v, ring.missing + 1, *chosen)
    k, v, missing = jax.lax.cond(place == size - 1, all_filled, lambda *given: given, k, v, missing)
    return k, v, Ring(inputs, missing)


def _rotated(config: DecoderConfig, x: Array, positions: Array) -> Array:
    return x if config.rotary is None else config.rotary.rotate(x, positions[:, None])
