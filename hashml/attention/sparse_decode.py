"""Sparse decoding: one query a head reads the tokens that a selector named, each with a weight.

    s_i = scale q . k[idx_i]
    out = sum_i w_i exp(s_i) v[idx_i] / sum_i w_i exp(s_i)              over the valid i

A token that was chosen has weight 1, one that was sampled with probability ``p`` has ``1 / p``: numerator and
denominator are then unbiased (Horvitz and Thompson 1952). ``log w`` is added to the logit, so that a kernel needs no
second path. The list is cut in blocks whose partial sums merge in any order. Sums are float32, masks are finite, and
a list without a valid entry gives zeros.

Who selects is `hashml.attention.selector_contract`'s matter. An index outside the slots counts as not valid. An index
that stands twice counts twice, as in a sample with replacement: a selector names each token once (`combine` and
`disjoint` there see to it).

On a GPU the kernel `hashml_kernels.sparse_decode` reads the rows, once, where XLA writes and reads them again. Its
TPU kernel wants pages of rows, which lists of tokens are not: there XLA serves.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from hashml_kernels import sparse_decode as kernel

MASKED = -1e30
"""Logit of an entry that is not valid: finite, so that no difference of two is NaN."""


class Selection(NamedTuple):
    """Tokens that each of S heads reads: S is the number of query heads, or of key heads whose group shares a list.

    Attributes:
        idx: slots.
        valid: which entries count; the others are padding.
        weight: 1 for a chosen token, ``1 / p`` for a sampled one; entries of weight 0 do not count.
    """

    idx: Int32[Array, "B S M"]
    valid: Bool[Array, "B S M"]
    weight: Float32[Array, "B S M"]


class Partial(NamedTuple):
    """What a part of the list adds up to, relative to its largest logit.

    Attributes:
        value: ``sum_i w_i exp(s_i - top) v_i``.
        mass: ``sum_i w_i exp(s_i - top)``; 0 where nothing was valid.
        top: the largest ``s_i + log w_i``; `MASKED` where nothing was valid.
    """

    value: Float32[Array, "*n V"]
    mass: Float32[Array, "*n"]
    top: Float32[Array, "*n"]


def sparse_decode(
    q: Float[Array, "B H D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    idx: Int32[Array, "B S M"],
    valid: Bool[Array, "B S M"],
    weight: Float32[Array, "B S M"],
    *,
    scale: float | int | None = None,
    block: int = 256,
    implementation: Literal["auto", "xla"] = "auto",
) -> Float[Array, "B H V"]:
    """Attention of one query a head over the tokens of a `Selection`, in the dtype of ``v``.

    Args:
        q: queries; head ``h`` reads key head ``h // (H / K)`` and list ``h // (H / S)``.
        k, v: keys and values of N slots.
        idx, valid, weight: a `Selection`, unpacked.
        scale: of the logits; ``None``: ``1 / sqrt(D)``.
        block: entries of the list that are gathered at a time by XLA; it changes rounding alone.
        implementation: ``"auto"`` is the platform's kernel where it serves, and XLA elsewhere. Derivatives are XLA's.

    Raises:
        ValueError: for heads that do not divide, no slot, a block below 1, or another ``implementation``.
    """
    if implementation not in ("auto", "xla"):
        raise ValueError(f"implementation is {implementation!r}; allowed are 'auto' and 'xla'")
    _check_sizes(q, k, idx, block)

    def xla(*operands: Array) -> Array:
        return finish(sparse_partial(*operands, scale=scale, block=block)).astype(v.dtype)

    def cuda(*operands: Array) -> Array:
        try:
            return kernel.sparse_decode(*operands, scale=scale, implementation="pallas_triton")
        except NotImplementedError:  # it does not serve these sizes
            return xla(*operands)

    operands = (q, k, v, idx, valid, weight)
    if implementation == "xla":
        return xla(*operands)
    return jax.lax.platform_dependent(*operands, cuda=cuda, default=xla)


def sparse_partial(
    q: Float[Array, "B H D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    idx: Int32[Array, "B S M"],
    valid: Bool[Array, "B S M"],
    weight: Float32[Array, "B S M"],
    *,
    scale: float | int | None = None,
    block: int = 256,
) -> Partial:
    """`sparse_decode` before the division, ``value [B, H, V]``, for tokens that lie in several places."""
    _check_sizes(q, k, idx, block)
    slots, entries = k.shape[2], idx.shape[2]
    valid = valid & (idx >= 0) & (idx < slots)

    def part(idx: Array, valid: Array, weight: Array) -> Partial:
        return rows_partial(q, gather_rows(k, idx), gather_rows(v, idx), valid, weight, scale=scale)

    if entries <= block:
        return part(idx, valid, weight)
    short = -entries % block

    def blocks(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, short)))
        return jnp.moveaxis(padded.reshape(*x.shape[:2], -1, block), 2, 0)

    return _merged(jax.lax.map(lambda lists: part(*lists), (blocks(idx), blocks(valid), blocks(weight))))


def _check_sizes(q: Array, k: Array, idx: Array, block: int) -> None:
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    check_heads(q.shape[1], k.shape[1], idx.shape[1])
    if not k.shape[2]:
        raise ValueError(f"k has shape {k.shape}; there must be at least one slot")


def rows_partial(
    q: Float[Array, "B H D"],
    keys: Float[Array, "B S M D"],
    values: Float[Array, "B S M V"],
    valid: Bool[Array, "B S M"],
    weight: Float32[Array, "B S M"],
    *,
    scale: float | int | None = None,
) -> Partial:
    """Partial sums over rows that are at hand; what stands in rows that are not valid does not matter."""
    batch, heads, width = q.shape
    lists = keys.shape[1]
    check_heads(heads, lists, lists)
    scale = 1 / math.sqrt(width) if scale is None else scale
    counts = valid & (weight > 0)
    grouped = q.astype(jnp.float32).reshape(batch, lists, heads // lists, width) * scale
    logits = jnp.einsum("bsjd,bsmd->bsjm", grouped, keys.astype(jnp.float32))
    logits = logits + jnp.log(jnp.where(counts, weight, 1.0))[:, :, None]
    logits = jnp.where(counts[:, :, None], logits, MASKED)
    top = jnp.max(logits, axis=-1, initial=MASKED)
    share = jnp.where(counts[:, :, None], jnp.exp(logits - top[..., None]), 0.0)
    rows = jnp.where(counts[..., None], values.astype(jnp.float32), 0.0)
    value = jnp.einsum("bsjm,bsmv->bsjv", share, rows)
    return Partial(
        value.reshape(batch, heads, -1), share.sum(axis=-1).reshape(batch, heads), top.reshape(batch, heads)
    )


def merge_partials(*parts: Partial) -> Partial:
    """The sums over the union of parts that share no token. The order of parts changes rounding alone.

    Raises:
        ValueError: for no part.
    """
    if not parts:
        raise ValueError("parts is empty; there must be at least one")
    return _merged(Partial(*(jnp.stack(leaves) for leaves in zip(*parts, strict=True))))


def _merged(parts: Partial) -> Partial:
    """Merges along the leading axis."""
    top = parts.top.max(axis=0)
    # Where nothing is valid both are MASKED; the factor is then 1, of a mass of 0.
    factor = jnp.exp(parts.top - top)
    value = jnp.sum(factor[..., None] * parts.value, axis=0)
    return Partial(value, jnp.sum(factor * parts.mass, axis=0), top)


def finish(partial: Partial) -> Float32[Array, "*n V"]:
    """``value / mass``, and 0 where nothing was valid."""
    found = partial.mass > 0
    return jnp.where(found[..., None], partial.value / jnp.where(found, partial.mass, 1.0)[..., None], 0.0)


def gather_rows(x: Float[Array, "B K N D"], idx: Int32[Array, "B S M"]) -> Float[Array, "B S M D"]:
    """Rows of each list's own key head; an index outside the slots gives some row.

    Raises:
        ValueError: for lists that are no multiple of the key heads.
    """
    heads, lists = x.shape[1], idx.shape[1]
    check_heads(lists, heads, lists)
    of_head = idx.reshape(idx.shape[0], heads, -1)
    rows = jnp.take_along_axis(x, of_head[..., None], axis=2, mode="clip")
    return rows.reshape(*idx.shape, x.shape[-1])


def check_heads(queries: int, keys: int, lists: int) -> None:
    """Raises ValueError unless key heads divide lists, and lists divide query heads."""
    if keys < 1 or lists % keys or lists < 1 or queries % lists:
        raise ValueError(
            f"idx has lists for {lists} heads; with {queries} query heads and {keys} key heads, allowed are {keys} "
            f"(shared by a group), {queries}, or a multiple of the first that divides the second"
        )
