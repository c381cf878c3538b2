"""Linformer: keys and values projected along the sequence (Wang et al., 2020, arXiv 2006.04768).

    out = softmax(q (E k)' / sqrt(D)) (F v)            E, F [R, N_max] learned, for all heads

Time is linear in the length at a fixed ``R``, and so is what is stored: the two matrices are ``2 R N_max`` weights,
which belong into any comparison. Keys that do not exist are zeroed before they are mixed. A mixed key has seen the
whole sequence, so that there is no causal form.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Initializer
from jaxtyping import Array, Bool, Float

from hashml.attention.multi_head import HashedAttention

AnyArray = Array | np.ndarray


def linformer_attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    mix_k: Float[AnyArray, "R N_max"],
    mix_v: Float[AnyArray, "R N_max"],
    *,
    mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B H T V"]:
    """Softmax attention over ``R`` mixtures of the keys; a shorter sequence takes the first columns of the mixers.

    Raises:
        ValueError: for more keys than the mixers have columns, or heads that the key heads do not divide.
    """
    batch, heads, length, width = q.shape
    kv_heads, keys = k.shape[1:3]
    if keys > mix_k.shape[1]:
        raise ValueError(f"k has {keys} tokens; mix_k and mix_v take at most {mix_k.shape[1]}")
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k {kv_heads}; the heads of k must divide those of q")
    k, v_ = (x.astype(jnp.float32) for x in (k, v))
    if mask is not None:
        k, v_ = (jnp.where(mask[:, None, :, None], x, 0) for x in (k, v_))
    mixed_k = jnp.einsum("rn,bknd->bkrd", jnp.asarray(mix_k)[:, :keys], k)
    mixed_v = jnp.einsum("rn,bknv->bkrv", jnp.asarray(mix_v)[:, :keys], v_)
    grouped = q.astype(jnp.float32).reshape(batch, kv_heads, -1, length, width)
    weights = jax.nn.softmax(jnp.einsum("bkgtd,bkrd->bkgtr", grouped, mixed_k) / math.sqrt(width), axis=-1)
    out = jnp.einsum("bkgtr,bkrv->bkgtv", weights, mixed_v)
    return out.reshape(batch, heads, length, -1).astype(v.dtype)


class LinformerAttention(HashedAttention, kw_only=True):
    """`HashedAttention` by Linformer; not causal.

    Attributes:
        max_length: N_max, keys at most.
        mixtures: R; the paper has 128 and 256.
        mix_init: initialiser of the two mixers.

    Raises:
        ValueError: as `linformer_attention`; for causal=True, or sizes below 1.
    """

    max_length: int
    mixtures: int = 128
    mix_init: Initializer = nn.initializers.normal(0.02)

    def attend(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        if self.causal:
            raise ValueError("causal is True; a mixture of Linformer's has seen every key")
        for name, size in (("max_length", self.max_length), ("mixtures", self.mixtures)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        shape = (self.mixtures, self.max_length)
        mix_k, mix_v = (self.param(name, self.mix_init, shape, self.param_dtype) for name in ("mix_k", "mix_v"))
        return linformer_attention(q, k, v, mix_k, mix_v, mask=mask)
