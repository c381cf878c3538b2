"""The projections around an attention function, with the names of `flax.linen.MultiHeadDotProductAttention`.

    q, k, v = x W_q, y W_k, z W_v        heads of equal width
    out = attend(q, k, v) W_o

A function that attends serves as it is: ``attention_fn(q [B, H, T, D], k [B, K, N, D], v [B, K, N, D], causal=,
mask=)`` with a mask ``[B, N]`` of the keys that exist. A method with parameters of its own is a subclass that
overrides `attend`. Parameters have Flax's names and shapes, so that those of softmax attention load.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.module import merge_param
from flax.typing import Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Bool, Float, Key

AnyArray = Array | np.ndarray


def padding_mask(mask: AnyArray, batch: tuple[int, ...], keys: int) -> Bool[Array, "B N"]:
    """Flax's mask ``[*batch, 1, 1, keys]`` as ``[prod(batch), keys]``.

    Raises:
        ValueError: for a mask that differs between heads or queries, or does not broadcast.
    """
    kind = "[..., 1, 1, keys]"
    if mask.ndim < 3 or mask.shape[-3:] != (1, 1, keys):
        raise ValueError(
            f"mask has shape {mask.shape}; hashed attention forms no matrix of weights, and serves a mask of padding "
            f"{kind} with {keys} keys; for queries in order set causal=True"
        )
    try:
        whole = np.broadcast_shapes((*batch, 1, 1, keys), mask.shape)
    except ValueError:
        whole = None
    if whole != (*batch, 1, 1, keys):
        raise ValueError(f"mask has shape {mask.shape}; it must broadcast to {(*batch, 1, 1, keys)}")
    return jnp.broadcast_to(jnp.asarray(mask).astype(bool), whole).reshape(math.prod(batch), keys)


class HashedAttention(nn.Module):
    """Multi-head attention around ``attention_fn``, or around the `attend` of a subclass.

    Attributes:
        num_heads: query heads.
        attention_fn: see the module; linear attention is ``HashedAttention(8, linear.elu_attention)``.
        causal: query ``i`` sees the keys ``0 .. i``. It is said here, since no mask can say it.
        num_kv_heads: key heads, which must divide the query heads; by default as many.
        share_qk: keys are the queries, and are not projected (Reformer).
        dtype, param_dtype, qkv_features, out_features, precision, kernel_init, out_kernel_init, bias_init,
            out_bias_init, use_bias, normalize_qk: as in Flax.
        dropout_rate, broadcast_dropout, deterministic: as in Flax, but dropout falls on the heads' outputs.

    Raises:
        ValueError: for heads that do not divide, a mask that is not of padding, or weights to sow.
    """

    num_heads: int
    attention_fn: Callable[..., Array] | None = None
    causal: bool = False
    num_kv_heads: int | None = None
    share_qk: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    qkv_features: int | None = None
    out_features: int | None = None
    broadcast_dropout: bool = True
    dropout_rate: float | int = 0.0
    deterministic: bool | None = None
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()
    out_bias_init: Initializer | None = None
    use_bias: bool = True
    normalize_qk: bool = False

    def attend(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        """``[B, H, T, D]``, from q of that shape, k and v ``[B, K, N, D]`` and a mask ``[B, N]``."""
        if self.attention_fn is None:
            raise ValueError("attention_fn is None; it must be a function (q, k, v, causal=, mask=)")
        return self.attention_fn(q, k, v, causal=self.causal, mask=mask)

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[AnyArray, "*batch T features"],
        inputs_k: Float[AnyArray, "*batch N key_features"] | None = None,
        inputs_v: Float[AnyArray, "*batch N value_features"] | None = None,
        *,
        mask: AnyArray | None = None,
        deterministic: bool | None = None,
        dropout_rng: Key[Array, ""] | None = None,
        sow_weights: bool = False,
    ) -> Float[Array, "*batch T out"]:
        if inputs_k is None and inputs_v is not None:
            raise ValueError("inputs_k is None and inputs_v is given; values need keys")
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        if sow_weights:
            raise ValueError("sow_weights is True; hashed attention forms no weights")
        width = self.qkv_features or inputs_q.shape[-1]
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if self.num_heads < 1 or width % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide qkv_features = {width}")
        if kv_heads < 1 or self.num_heads % kv_heads:
            raise ValueError(f"num_kv_heads is {kv_heads}; it must divide num_heads = {self.num_heads}")
        head_width, batch = width // self.num_heads, inputs_q.shape[:-2]
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "use_bias": self.use_bias,
            "precision": self.precision,
        }
        dense = functools.partial(nn.DenseGeneral, kernel_init=self.kernel_init, bias_init=self.bias_init, **common)
        q = dense((self.num_heads, head_width), name="query")(inputs_q)
        if self.share_qk and inputs_k is not inputs_q:
            raise ValueError("inputs_k is given and share_qk is True; the keys are the queries")
        k = q if self.share_qk else dense((kv_heads, head_width), name="key")(inputs_k)
        v = dense((kv_heads, head_width), name="value")(inputs_v)
        if self.normalize_qk:
            norm = functools.partial(nn.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
            q, k = norm(name="query_ln")(q), (k if self.share_qk else norm(name="key_ln")(k))
        keys = None if mask is None else padding_mask(mask, batch, k.shape[-3])
        query, key, value = (x.reshape(-1, *x.shape[-3:]).swapaxes(1, 2) for x in (q, k, v))
        out = self.attend(query, key, value, keys).swapaxes(1, 2).reshape(q.shape)
        if self.dropout_rate > 0:
            quiet = merge_param("deterministic", self.deterministic, deterministic)
            shared = tuple(range(len(batch))) if self.broadcast_dropout else ()
            out = nn.Dropout(self.dropout_rate, broadcast_dims=shared)(out, deterministic=quiet, rng=dropout_rng)
        return nn.DenseGeneral(
            self.out_features or inputs_q.shape[-1],
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            name="out",
            **common,
        )(out)
