"""The definition: all rows that the list names, one softmax, in plain jnp."""

import jax.numpy as jnp

from hashml_kernels.annotations import Array
from hashml_kernels.sparse_decode.lists import MASKED, Operands, Partial, tokens


def partial(operands: Operands, *, page: int, scale: float) -> Partial:
    """The sums over the whole list."""
    return rows_partial(tokens(operands, page), scale)


def rows_partial(operands: Operands, scale: float) -> Partial:
    """The same for lists of slots that `tokens` has seen."""
    q, k, v, idx, valid, weight, _ = operands
    valid = valid[:, :, None]
    logits = jnp.einsum(
        "bsjd,bsmd->bsjm", q.astype(jnp.float32) * scale, rows(k, idx).astype(jnp.float32), precision="highest"
    )
    logits = jnp.where(valid, logits + jnp.log(jnp.where(valid, weight[:, :, None], 1.0)), MASKED)
    top = jnp.max(logits, axis=-1, initial=MASKED)
    share = jnp.where(valid, jnp.exp(logits - top[..., None]), 0.0)
    values = jnp.where(valid[:, :, 0, :, None], rows(v, idx).astype(jnp.float32), 0.0)
    value = jnp.einsum("bsjm,bsmv->bsjv", share, values, precision="highest")
    return Partial(value, share.sum(axis=-1), top)


def rows(x: Array, idx: Array) -> Array:
    """Rows of ``x [B, K, N, D]`` for lists ``[B, S, M]`` of S / K neighbouring lists a key head."""
    of_head = idx.reshape(idx.shape[0], x.shape[1], -1)
    found = jnp.take_along_axis(x, of_head[..., None], axis=2, mode="clip")
    return found.reshape(*idx.shape, x.shape[-1])
