"""A decoder of the Llama family (Touvron et al. 2023, arXiv 2302.13971), open between projections and attention.

    u = norm(x);   q, k, v = u Wq, u Wk, u Wv;   x = x + attend(q, k, v) Wo
    u = norm(x);   x = x + (act(u Wgate) * (u Wup)) Wdown            without Wgate: act(u Wup) Wdown
    logits = norm(x) E^T  (tied)  or  norm(x) Whead

``norm`` is RMSNorm, ``Hq`` query heads read ``H`` key heads (GQA), and Qwen2 adds biases to q, k and v. With
``smear`` the input of Wk is ``mu u[t] + (1 - mu) u[t-1]``, mu learned per channel from 0.5: one layer then sees
what stood before a key (Olsson et al. 2022). Where no token came before, ``u[t-1]`` is ``u[t]`` itself.

A block is defined once, in `layer`, and what happens between projections and output is a function it is given:
``attend(q, k, v) -> (out, carry)`` receives q and k *unrotated*. `forward` passes exact causal attention; a cache
passes its own write and read. `decoder_model` binds the pieces to a configuration: the value a cache takes.

Params: ``{"embedding": [V, d], "layers": {name: [L, ...]}, "norm": [d], "head": [d, V] unless tied}``; kernels are
``[in, out]`` and all layers lie along the leading axis, so that `forward` is one `jax.lax.scan`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from hashml.models.exact_attention import causal_attention
from hashml.models.rotary import Rotary

Params = dict[str, Any]
"""As in the module's docstring, or one layer of it without the leading axis."""
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""``(q [B, Hq, n, D], k [B, H, n, D], v [B, H, n, D]) -> (out [B, Hq, n, D], carry)``."""

_ROTARY = Rotary()
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of a decoder; hashable, hence static under `jax.jit`.

    Attributes:
        vocabulary: tokens V.
        features: width d of the residual stream.
        layers: blocks L.
        heads: of queries, Hq.
        kv_heads: of keys and values, H; they divide ``heads``.
        head_dim: width D of a head.
        hidden: width of the perceptron.
        activation: of the perceptron; "gelu" is the exact one, "gelu_tanh" its approximation.
        gated: whether the perceptron has a gate (SwiGLU and its relatives).
        norm_eps: added to the mean square.
        tied: whether the head is the embedding.
        qkv_bias: whether q, k and v have biases.
        rotary: the rotation of q and k, or ``None`` for no positions at all.
        context: tokens of the longest sequence the model was made for; `forward` takes longer ones, too.
        sliding_window: a query sees this many last positions, its own included; ``None``: all of them.
        smear: whether keys are smeared over two tokens.

    Raises:
        ValueError: for sizes that are not positive or do not fit together.
    """

    vocabulary: int
    features: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    norm_eps: float = 1e-5
    tied: bool = True
    qkv_bias: bool = False
    rotary: Rotary | None = _ROTARY
    context: int = 2048
    sliding_window: int | None = None
    smear: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocabulary", "features", "layers", "heads", "kv_heads", "head_dim", "hidden", "context")
        for name in (*sizes, *(() if self.sliding_window is None else ("sliding_window",))):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}; it divides heads, {self.heads}")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; allowed are {', '.join(_ACTIVATIONS)}")
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps is {self.norm_eps}; it is not negative")
        if self.rotary is not None and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; a head is rotated in pairs, so its width is even")


# --- parameters -----------------------------------------------------------------------------------


def param_shapes(config: DecoderConfig) -> dict[str, Any]:
    """The tree of parameters with shapes in place of arrays."""
    d, width, count = config.features, config.head_dim, config.layers
    queries, keys = config.heads * width, config.kv_heads * width
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (d,),
        "query": (d, queries),
        "key": (d, keys),
        "value": (d, keys),
        "output": (queries, d),
        "mlp_norm": (d,),
        "up": (d, config.hidden),
        "down": (config.hidden, d),
    }
    if config.gated:
        layer["gate"] = (d, config.hidden)
    if config.qkv_bias:
        layer |= {"query_bias": (queries,), "key_bias": (keys,), "value_bias": (keys,)}
    if config.smear:
        layer["smear"] = (d,)
    shapes: dict[str, Any] = {
        "embedding": (config.vocabulary, d),
        "layers": {name: (count, *shape) for name, shape in layer.items()},
        "norm": (d,),
    }
    return shapes if config.tied else shapes | {"head": (d, config.vocabulary)}


def init_params(key: Array, config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Fresh parameters: norms 1, biases 0, smear 1/2; kernels normal with variance 1 / inputs.

    The two kernels that write into the residual stream are smaller by ``sqrt(2 L)`` (GPT-2), and a tied
    embedding has the variance of a head, 1 / d.
    """
    shapes = param_shapes(config)
    return {
        name: _init(jax.random.fold_in(key, i), name, shapes[name], config, dtype) for i, name in enumerate(shapes)
    }


def _init(key: Array, name: str, shape: Any, config: DecoderConfig, dtype: DTypeLike) -> Any:
    if isinstance(shape, dict):
        keys = jax.random.split(key, len(shape))
        return {
            inner: _init(k, inner, shape[inner], config, dtype) for k, inner in zip(keys, sorted(shape), strict=True)
        }
    if name.endswith("norm"):
        return jnp.ones(shape, dtype)
    if name.endswith("bias"):
        return jnp.zeros(shape, dtype)
    if name == "smear":
        return jnp.full(shape, 0.5, dtype)
    fan_in = shape[-1] if name == "embedding" else shape[-2]
    if name in ("output", "down"):
        fan_in *= 2 * config.layers
    return (jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype)


# --- the pieces -----------------------------------------------------------------------------------


def embed(params: Params, config: DecoderConfig, tokens: Int[Array, "B n"]) -> Float[Array, "B n d"]:
    """Rows of the embedding. Ids are those of the vocabulary, which nothing here checks (`forward` and `generation`
    do): one beyond it reads the last row, and a negative one counts from the end."""
    return params["embedding"][tokens]


def layer_params(params: Params, index: int | Int[Array, ""]) -> Params:
    """Parameters of one layer, of layers along an axis or in a tuple (`unstacked`)."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        return layers[index]
    return jax.tree.map(lambda leaf: leaf[index], layers)


def unstacked(params: Params) -> Params:
    """The same parameters with ``"layers"`` a tuple: for programs that unroll layers, such as a decode step, where a
    slice of a stack may be a copy."""
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return params | {"layers": tuple(layer_params(params, index) for index in range(count))}


def layer(
    params: Params,
    config: DecoderConfig,
    x: Float[Array, "B n d"],
    previous: Float[Array, "B d"] | None,
    attend: Attend,
    valid: Bool[Array, "B n"] | None = None,
) -> tuple[Float[Array, "B n d"], Float[Array, "B d"] | None, Any]:
    """One block: ``(x, previous, carry)``.

    Args:
        params: of this layer, from `layer_params`.
        config: of the model.
        x: residual stream of ``n`` tokens that follow each other.
        previous: with ``config.smear``, the ``u`` of the last token before these; ``None``, or a row of zeros,
            where there was none. What is returned goes in here next time. Else ``None``.
        attend: gets q, k, v before any rotation, gives the heads' outputs and whatever it carries on.
        valid: which tokens are no padding, so that in a ragged row the token before one is the last valid one,
            wherever the padding stands; ``None``: all. Only ``config.smear`` reads it.
    """
    u = rms_norm(x, params["attention_norm"], config.norm_eps)
    smeared = u
    if config.smear:
        before, previous = _token_before(u, previous, valid)
        smeared = u * params["smear"] + before * (1 - params["smear"])
    q, k, v = (
        _heads(_dense(inputs, params, name), count)
        for inputs, name, count in (
            (u, "query", config.heads),
            (smeared, "key", config.kv_heads),
            (u, "value", config.kv_heads),
        )
    )
    out, carry = attend(q, k, v)
    batch, n, _ = x.shape
    x = x + out.astype(x.dtype).transpose(0, 2, 1, 3).reshape(batch, n, -1) @ params["output"]
    u = rms_norm(x, params["mlp_norm"], config.norm_eps)
    act, up = _ACTIVATIONS[config.activation], u @ params["up"]
    hidden = act(u @ params["gate"]) * up if config.gated else act(up)
    return x + hidden @ params["down"], previous, carry


def unembed(params: Params, config: DecoderConfig, x: Float[Array, "B n d"]) -> Float[Array, "B n V"]:
    """Logits, float32 whatever the dtype of the parameters, since softmax and sampling follow."""
    u = rms_norm(x, params["norm"], config.norm_eps)
    head = params["embedding"].T if config.tied else params["head"]
    return jnp.matmul(u, head, preferred_element_type=jnp.float32)


def rms_norm(x: Float[Array, "*n d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "*n d"]:
    """``x / sqrt(mean(x^2) + eps) * scale`` (Zhang and Sennrich 2019), in float32, returned as ``x.dtype``."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def _dense(inputs: Array, params: Params, name: str) -> Array:
    outputs = inputs @ params[name]
    bias = params.get(f"{name}_bias")
    return outputs if bias is None else outputs + bias


def _heads(x: Array, count: int) -> Array:
    return x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)


def _token_before(u: Array, previous: Array | None, valid: Array | None) -> tuple[Array, Array]:
    """``u`` of the token before each, and of the last token of all."""
    n = u.shape[1]
    first = jnp.zeros_like(u[:, 0]) if previous is None else previous.astype(u.dtype)
    line = jnp.concatenate([first[:, None], u], axis=1)
    if valid is None:
        before, last = line[:, :-1], line[:, -1]
    else:
        places = jnp.where(valid, jnp.arange(1, n + 1), 0)
        latest = jnp.pad(jax.lax.cummax(places, axis=1), ((0, 0), (1, 0)))
        filled = jnp.take_along_axis(line, latest[..., None], axis=1)
        before, last = filled[:, :-1], filled[:, -1]
    # A normed vector is zero only where nothing was.
    return jnp.where(jnp.any(before != 0, axis=-1, keepdims=True), before, u), last


# --- the whole ------------------------------------------------------------------------------------


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, "B T"] | None = None,
    *,
    remat: bool = False,
    block: int = 256,
) -> Float[Array, "B T V"]:
    """Logits of the next token after each token, float32; compiled once for a configuration and a shape.

    Args:
        params: as `init_params` makes them.
        config: of the model.
        tokens: ids, at least one a row. Under `jax.jit` they have no values yet, and what `embed` says holds.
        positions: of the tokens, rising along a row, -1 for padding at either end; ``None``: 0, 1, 2...
        remat: whether the backward pass computes each layer again instead of keeping its insides.
        block: queries that attention takes at a time.

    Raises:
        ValueError: for rows of no token, ids outside the vocabulary, and a ``block`` below 1.
    """
    if not tokens.shape[1]:
        raise ValueError(f"tokens has shape {tokens.shape}; allowed is at least 1 token a row")
    if isinstance(tokens, np.ndarray) or (not isinstance(tokens, Tracer) and tokens.is_fully_addressable):
        outside = np.asarray(tokens).ravel()
        outside = outside[(outside < 0) | (outside >= config.vocabulary)]
        if outside.size:
            raise ValueError(f"tokens has {outside[0]}; allowed are ids from 0 to {config.vocabulary - 1}")
    return _forward(params, config, tokens, positions, remat=remat, block=block)


@functools.partial(jax.jit, static_argnames=("config", "remat", "block"))
def _forward(
    params: Params, config: DecoderConfig, tokens: Array, positions: Array | None, *, remat: bool, block: int
) -> Array:
    valid = None if positions is None else positions >= 0
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    options: dict[str, Any] = {"rotary": config.rotary, "sliding_window": config.sliding_window, "block": block}

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return causal_attention(q, k, v, positions, **options), None

    def body(x: Array, params_l: Params) -> tuple[Array, None]:
        return layer(params_l, config, x, None, attend, valid)[0], None

    x = embed(params, config, tokens)
    x, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, x, params["layers"])
    return unembed(params, config, x)


class DecoderModel(NamedTuple):
    """A decoder as a cache or a generator sees it: the pieces above with their configuration bound."""

    config: DecoderConfig
    embed: Callable[[Params, Array], Array]
    """``(params, tokens [B, n]) -> x [B, n, d]``"""
    layer: Callable[..., tuple[Array, Array | None, Any]]
    """``(params_l, x, previous, attend, valid=None) -> (x, previous, carry)``"""
    layer_params: Callable[[Params, Any], Params]
    """``(params, index) -> params_l``"""
    unembed: Callable[[Params, Array], Array]
    """``(params, x [B, n, d]) -> logits [B, n, V]``"""


@functools.lru_cache
def decoder_model(config: DecoderConfig) -> DecoderModel:
    """The pieces bound to ``config``. Equal configurations give one value, hence one compilation."""
    return DecoderModel(
        config=config,
        embed=lambda params, tokens: embed(params, config, tokens),
        layer=lambda params, x, previous, attend, valid=None: layer(params, config, x, previous, attend, valid),
        layer_params=layer_params,
        unembed=lambda params, x: unembed(params, config, x),
    )


class Decoder(nn.Module):
    """`forward` as a module whose ``params`` are those of `init_params`.

    Attributes:
        config: sizes and choices.
        remat: as in `forward`.
        param_dtype: of the parameters.
    """

    config: DecoderConfig
    remat: bool = False
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T {self.config.vocabulary}"]:
        params = {
            name: self.param(
                name, lambda key, name=name, shape=shape: _init(key, name, shape, self.config, self.param_dtype)
            )
            for name, shape in param_shapes(self.config).items()
        }
        return forward(params, self.config, tokens, positions, remat=self.remat)
