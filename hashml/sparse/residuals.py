"""A decoder opened at the residual stream: what predictors look at, what they should have said, what a choice costs.

    x[l]                      input of block l, before its norm
    y[l] = x[l] + attention   input of its perceptron, before its norm

    look-ahead     heads of layer l are predicted from     neurons of layer l from
        0                    x[l]                                  y[l]
       1/2                   y[l-1]                                x[l]
        1                    x[l-1]                                x[l-1]

The first block has none before it and looks at x[0] there. `masked_forward` runs a sequence through the model with a
choice of heads and neurons made for every token, all others being multiplied by zero: the definition that a sparse
decode step is compared with. Without a choice it is the dense model, and its trace is what predictors are trained on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from hashml.models.decoder import DecoderConfig, Params, embed, rms_norm, unembed
from hashml.models.exact_attention import causal_attention
from hashml.sparse.lists import top_mask

AnyArray = Array | np.ndarray
LOOKAHEADS = (0, 0.5, 1)
"""Blocks between what a predictor looks at and what it decides."""


class Residuals(NamedTuple):
    """The stream around the first half of a block; in a trace, of all layers along a leading axis.

    Attributes:
        x: input of the block.
        y: input of its perceptron; ``None`` where its heads are yet to be chosen.
        x_before, y_before: of the block before; both are ``x`` in the first block.
    """

    x: Float[Array, "*n d"]
    y: Float[Array, "*n d"] | None
    x_before: Float[Array, "*n d"]
    y_before: Float[Array, "*n d"]


def neuron_query(residuals: Residuals, lookahead: float | int) -> Float[Array, "*n d"]:
    """What the neurons of a block are predicted from.

    Raises:
        ValueError: for another look-ahead.
    """
    if check_lookahead("lookahead", lookahead) == 0:
        assert residuals.y is not None  # it is there once the heads are done
        return residuals.y
    return residuals.x if lookahead == 0.5 else residuals.x_before


def head_query(residuals: Residuals, lookahead: float | int) -> Float[Array, "*n d"]:
    """What the heads of a block are predicted from.

    Raises:
        ValueError: for another look-ahead.
    """
    return {0: residuals.x, 0.5: residuals.y_before, 1: residuals.x_before}[check_lookahead("lookahead", lookahead)]


def check_lookahead(name: str, value: float | int) -> float | int:
    """The value; raises ValueError for one that is not among `LOOKAHEADS`."""
    if value not in LOOKAHEADS:
        raise ValueError(f"{name} is {value}; allowed are {', '.join(map(str, LOOKAHEADS))}")
    return value


def check_model(config: DecoderConfig) -> None:
    """Raises ValueError for a decoder whose neurons are never exactly zero, or whose keys are smeared."""
    if config.activation != "relu":
        raise ValueError(f"activation is {config.activation!r}; allowed is 'relu', whose zeros are exact")
    if config.smear:
        raise ValueError("smear is True; allowed is False, since a skipped key would be needed by the next one")


# --- a forward pass with choices ------------------------------------------------------------------

Scores = Callable[[Any, Residuals, Array], Array]
"""``(data, residuals, found) -> scores``; the largest are kept. ``data`` is the layer's own part of what
`masked_forward` was given. ``found`` is what an oracle may look at: outputs of the heads ``[B, Hq, n, D]`` for
scores ``[B, n, Hq]``, or activations of all neurons ``[B, n, ff]`` for scores of the same shape."""


class Choice(NamedTuple):
    """How many heads, or neurons, are kept for each token, and by which scores.

    Attributes:
        scores: as above.
        kept: of each layer; it may be traced.
    """

    scores: Scores
    kept: Int[AnyArray, " L"]


class Trace(NamedTuple):
    """What `masked_forward` saw; what a jitted caller does not use is not computed.

    Attributes:
        logits: of the next token.
        residuals: of all layers.
        activations: of all neurons, before those not chosen were zeroed.
        head_norms: of the outputs of all heads, before the output projection and before any was zeroed.
        neurons, heads: what was chosen.
    """

    logits: Float32[Array, "B n V"]
    residuals: Residuals
    activations: Float[Array, "L B n ff"]
    head_norms: Float32[Array, "L B n Hq"]
    neurons: Bool[Array, "L B n ff"]
    heads: Bool[Array, "L B n Hq"]


def masked_forward(
    params: Params,
    config: DecoderConfig,
    tokens: Int[AnyArray, "B n"],
    *,
    neurons: Choice | None = None,
    heads: Choice | None = None,
    data: Any = None,
    prompt: int = 0,
) -> Trace:
    """The decoder with a choice of heads and neurons for every token; keys and values are those of all heads.

    Args:
        params: as `hashml.models.decoder.init_params` makes them.
        config: a decoder with ReLU.
        tokens: ids, without padding.
        neurons, heads: ``None`` keeps all.
        data: pytree with a leading axis of layers, handed to the scores a layer at a time.
        prompt: first tokens that keep all.

    Raises:
        ValueError: for a decoder that `check_model` refuses.
    """
    check_model(config)
    tokens = jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    unused = jnp.zeros((config.layers,), jnp.int32)
    dense = (jnp.arange(tokens.shape[1]) < prompt)[:, None]

    def pick(choice: Choice | None, kept: Array, *seen: Any, total: int) -> Array:
        if choice is None:
            return jnp.ones((*tokens.shape, total), bool)
        return top_mask(choice.scores(*seen).astype(jnp.float32), kept) | dense

    def body(carry: tuple[Array, Array, Array], layer: Any) -> tuple[tuple[Array, Array, Array], Any]:
        (x, x_before, y_before), (weights, own, neurons_kept, heads_kept) = carry, layer
        q, k, v = (
            project(weights, config, rms_norm(x, weights["attention_norm"], config.norm_eps), name)
            for name in ("query", "key", "value")
        )
        out = causal_attention(q, k, v, positions, rotary=config.rotary, sliding_window=config.sliding_window)
        seen = Residuals(x, None, x_before, y_before)
        chosen = pick(heads, heads_kept, own, seen, out, total=config.heads)
        norms = jnp.linalg.norm(out.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
        merged = (out.transpose(0, 2, 1, 3) * chosen[..., None]).reshape(*tokens.shape, -1)
        y = x + merged.astype(x.dtype) @ weights["output"]
        u = rms_norm(y, weights["mlp_norm"], config.norm_eps)
        active = jax.nn.relu(u @ weights["gate"]) if config.gated else jax.nn.relu(u @ weights["up"])
        hidden = active * (u @ weights["up"]) if config.gated else active
        seen = seen._replace(y=y)
        taken = pick(neurons, neurons_kept, own, seen, hidden, total=config.hidden)
        after = y + (hidden * taken) @ weights["down"]
        return (after, x, y), (seen, hidden, norms, taken, chosen)

    kept = (unused if neurons is None else neurons.kept, unused if heads is None else heads.kept)
    x = embed(params, config, tokens)
    (x, _, _), trace = jax.lax.scan(body, (x, x, x), (params["layers"], data, *map(jnp.asarray, kept)))
    return Trace(unembed(params, config, x), *trace)


def project(
    params: Params, config: DecoderConfig, u: Float[Array, "B n d"], name: str
) -> Float[Array, "B heads n D"]:
    """Queries, keys or values of all heads; ``name`` is that of the kernel."""
    out = u @ params[name]
    bias = params.get(f"{name}_bias")
    out = out if bias is None else out + bias
    return out.reshape(*u.shape[:2], -1, config.head_dim).transpose(0, 2, 1, 3)


# --- scores ---------------------------------------------------------------------------------------


def contribution(params_l: Params, hidden: Float[Array, "*n ff"]) -> Float32[Array, "*n ff"]:
    """How much each neuron adds to the stream: its activation times the norm of its row of the output matrix."""
    return jnp.abs(hidden.astype(jnp.float32)) * jnp.linalg.norm(params_l["down"].astype(jnp.float32), axis=-1)


def fixed_scores(data: Any, residuals: Residuals, found: Array) -> Array:
    """The same order for every token: ``data["order"]`` has a score for each head or neuron, as `ranked` makes."""
    del found
    return jnp.broadcast_to(data["order"], (*residuals.x.shape[:-1], data["order"].shape[-1]))


def ranked(worth: Float[AnyArray, "*L out"]) -> Float32[Array, "*L out"]:
    """Scores without ties in the order of ``worth``; of equals the first stands higher."""
    order = np.argsort(-np.asarray(worth), axis=-1, kind="stable")
    scores = np.zeros(order.shape, np.float32)
    line = np.broadcast_to(-np.arange(order.shape[-1], dtype=np.float32), order.shape)
    np.put_along_axis(scores, order, line, axis=-1)
    return jnp.asarray(scores)


def random_scores(data: Any, residuals: Residuals, found: Array) -> Array:
    """Uniform for every token; ``data["draw"]`` is the seed of the layer's own draws."""
    heads = found.ndim == 4
    outputs = found.shape[1] if heads else found.shape[-1]
    return jax.random.uniform(jax.random.key(data["draw"]), (*residuals.x.shape[:-1], outputs))


def oracle_neurons(data: Any, residuals: Residuals, found: Array) -> Array:
    """`contribution` of the neurons themselves; ``data["down_norms"]`` are the norms of the output rows."""
    del residuals
    return jnp.abs(found).astype(jnp.float32) * data["down_norms"]


def oracle_heads(data: Any, residuals: Residuals, found: Array) -> Array:
    """Norms of the outputs of the heads themselves, before the output projection."""
    del data, residuals
    return jnp.linalg.norm(found.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
