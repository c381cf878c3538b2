"""An encoder of the BERT family (Devlin et al. 2019, arXiv 1810.04805), open at its dense layers.

    x = norm(token + position + token type)
    x = norm(x + attention(x Wq + bq, x Wk + bk, x Wv + bv) Wo + bo)
    x = norm(x + act(x Wup + bup) Wdown + bdown)                          these two ``layers`` times
    pooled = tanh(x[0] Wpool + bpool)                                     where there is a pooler

``norm`` is LayerNorm *behind* the skip (post-norm), every token sees every token that is no padding, and positions
are a table. `forward` gives the last x; sentences are embedded by `hashml.models.sentence_embeddings`.

Each product with a kernel is ``dense(x, kernel)``, a matrix product unless another function is passed: a kernel may
then be anything whose arrays lie along the leading axis of layers, such as the codes of a compressed matrix.

Params: ``{"embedding": [V, d], "positions": [T, d], "token_types": [types, d], "embedding_norm": [d],
"embedding_norm_bias": [d], "layers": {name: [L, ...]}, "pooler": [d, d], "pooler_bias": [d]}``, the last two where
there is a pooler; kernels are ``[in, out]`` and all layers lie along the leading axis, so that `forward` is one
`jax.lax.scan`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from hashml.models.exact_attention import masked_attention

Params = dict[str, Any]
"""As in the module's docstring, or one layer of it without the leading axis."""
Dense = Callable[[Array, Any], Array]
"""``(x [B, n, in], kernel) -> [B, n, out]``."""

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and choices of an encoder; hashable, hence static under `jax.jit`.

    Attributes:
        vocabulary: tokens V.
        features: width d of the residual stream.
        layers: blocks L.
        heads: of attention; they divide ``features``.
        hidden: width of the perceptron.
        activation: of the perceptron; "gelu" is the exact one, "gelu_tanh" its approximation.
        norm_eps: added to the variance.
        context: rows of the table of positions: tokens of the longest sequence.
        token_types: rows of the table of token types.
        pooler: whether there is one.

    Raises:
        ValueError: for sizes that are not positive or do not fit together.
    """

    vocabulary: int
    features: int
    layers: int
    heads: int
    hidden: int
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    norm_eps: float = 1e-12
    context: int = 512
    token_types: int = 2
    pooler: bool = True

    def __post_init__(self) -> None:
        for name in ("vocabulary", "features", "layers", "heads", "hidden", "context", "token_types"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
        if self.features % self.heads:
            raise ValueError(f"heads is {self.heads}; it divides features, {self.features}")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; allowed are {', '.join(_ACTIVATIONS)}")
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps is {self.norm_eps}; it is not negative")


# --- parameters -----------------------------------------------------------------------------------


def param_shapes(config: EncoderConfig) -> dict[str, Any]:
    """The tree of parameters with shapes in place of arrays."""
    d, hidden, count = config.features, config.hidden, config.layers
    kernels = {name: (d, d) for name in ("query", "key", "value", "output")}
    kernels |= {"up": (d, hidden), "down": (hidden, d)}
    layer: dict[str, tuple[int, ...]] = {}
    for name, shape in kernels.items():
        layer |= {name: shape, f"{name}_bias": shape[1:]}
    for name in ("attention_norm", "mlp_norm"):
        layer |= {name: (d,), f"{name}_bias": (d,)}
    shapes: dict[str, Any] = {
        "embedding": (config.vocabulary, d),
        "positions": (config.context, d),
        "token_types": (config.token_types, d),
        "embedding_norm": (d,),
        "embedding_norm_bias": (d,),
        "layers": {name: (count, *shape) for name, shape in layer.items()},
    }
    return shapes | {"pooler": (d, d), "pooler_bias": (d,)} if config.pooler else shapes


def init_params(key: Array, config: EncoderConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Fresh parameters: norms 1, biases 0, tables and kernels normal with standard deviation 0.02 (BERT)."""
    shapes = param_shapes(config)
    return {name: _init(jax.random.fold_in(key, i), name, shapes[name], dtype) for i, name in enumerate(shapes)}


def _init(key: Array, name: str, shape: Any, dtype: DTypeLike) -> Any:
    if isinstance(shape, dict):
        keys = jax.random.split(key, len(shape))
        return {inner: _init(k, inner, shape[inner], dtype) for k, inner in zip(keys, sorted(shape), strict=True)}
    if name.endswith("norm"):
        return jnp.ones(shape, dtype)
    if name.endswith("bias"):
        return jnp.zeros(shape, dtype)
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


# --- the pieces -----------------------------------------------------------------------------------


def dense(x: Float[Array, "*n inputs"], kernel: Float[Array, "inputs outputs"]) -> Float[Array, "*n outputs"]:
    """``x @ kernel``: what every dense layer does unless another function is passed."""
    return x @ kernel


def layer_norm(
    x: Float[Array, "*n d"], scale: Float[Array, " d"], bias: Float[Array, " d"], eps: float
) -> Float[Array, "*n d"]:
    """``(x - mean) / sqrt(variance + eps) * scale + bias`` (Ba et al. 2016), in float32, returned as ``x.dtype``."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def embed(
    params: Params, config: EncoderConfig, tokens: Int[Array, "B n"], token_types: Int[Array, "B n"] | None = None
) -> Float[Array, "B n d"]:
    """What the first layer reads. Ids are those of the tables: nothing here checks them.

    Raises:
        ValueError: for more tokens than there are positions.
    """
    if tokens.shape[1] > config.context:
        raise ValueError(f"tokens has shape {tokens.shape}; sequences have at most {config.context} tokens")
    kind = params["token_types"][0] if token_types is None else params["token_types"][token_types]
    x = params["embedding"][tokens] + kind + params["positions"][: tokens.shape[1]]
    return layer_norm(x, params["embedding_norm"], params["embedding_norm_bias"], config.norm_eps)


def layer(
    params: Params, config: EncoderConfig, x: Float[Array, "B n d"], mask: Bool[Array, "B n"], *, dense: Dense = dense
) -> Float[Array, "B n d"]:
    """One block.

    Args:
        params: of this layer: the tree under ``"layers"`` without its leading axis.
        config: of the model.
        x: residual stream.
        mask: which tokens are no padding.
        dense: multiplies by a kernel.
    """

    def affine(x: Array, name: str) -> Array:
        return dense(x, params[name]) + params[f"{name}_bias"]

    def after_skip(x: Array, y: Array, name: str) -> Array:
        return layer_norm(x + y, params[name], params[f"{name}_bias"], config.norm_eps)

    batch, n, _ = x.shape
    q, k, v = (
        affine(x, name).reshape(batch, n, config.heads, -1).transpose(0, 2, 1, 3)
        for name in ("query", "key", "value")
    )
    # All queries stand at position 0, and so do the keys that are no padding: nothing is causal.
    places = jnp.where(mask, 0, -1)
    out = masked_attention(q, k, v, jnp.zeros_like(places), places)
    x = after_skip(x, affine(out.transpose(0, 2, 1, 3).reshape(x.shape), "output"), "attention_norm")
    hidden = _ACTIVATIONS[config.activation](affine(x, "up"))
    return after_skip(x, affine(hidden, "down"), "mlp_norm")


def pooled(params: Params, x: Float[Array, "B n d"], *, dense: Dense = dense) -> Float[Array, "B d"]:
    """BERT's pooler: ``tanh`` of a dense layer of the first token."""
    return jnp.tanh(dense(x[:, 0], params["pooler"]) + params["pooler_bias"])


# --- the whole ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "dense", "remat"))
def forward(
    params: Params,
    config: EncoderConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    token_types: Int[Array, "B T"] | None = None,
    *,
    dense: Dense = dense,
    remat: bool = False,
) -> Float[Array, "B T d"]:
    """The last layer's x; compiled once for a configuration, a shape and a ``dense``.

    Args:
        params: as `init_params` makes them.
        config: of the model.
        tokens: ids; any at padding.
        mask: which tokens are no padding, wherever they stand; ``None``: all.
        token_types: ids of the two sentences of a pair; ``None``: all 0.
        dense: multiplies by a kernel.
        remat: whether the backward pass computes each layer again instead of keeping its insides.

    Raises:
        ValueError: for sequences longer than ``config.context``.
    """
    seen = jnp.ones(tokens.shape, bool) if mask is None else mask

    def body(x: Array, params_l: Params) -> tuple[Array, None]:
        return layer(params_l, config, x, seen, dense=dense), None

    x = embed(params, config, tokens, token_types)
    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, params["layers"])[0]


class Encoder(nn.Module):
    """`forward` as a module whose ``params`` are those of `init_params`.

    Attributes:
        config: sizes and choices.
        dense: multiplies by a kernel.
        remat: as in `forward`.
        param_dtype: of the parameters.
    """

    config: EncoderConfig
    dense: Dense = dense
    remat: bool = False
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T {self.config.features}"]:
        params = {
            name: self.param(name, lambda key, name=name, shape=shape: _init(key, name, shape, self.param_dtype))
            for name, shape in param_shapes(self.config).items()
        }
        return forward(params, self.config, tokens, mask, token_types, dense=self.dense, remat=self.remat)
