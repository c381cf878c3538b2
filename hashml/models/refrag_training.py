"""REFRAG's stages of training (Lin et al. 2025, arXiv 2509.01092), from one chunk to many.

    reconstruction     the decoder is frozen, and repeats a context from its chunks' embeddings:
                       encoder and phi learn its language
    continuation       all is trained: the tokens that follow the context, some chunks expanded or none
    selection          `hashml.models.refrag_policy`

Both stages pass through ``counts`` of chunks, few first: in stage ``s`` a batch has ``n`` chunks with probability
``softmax over n of -|log2 counts[s] - log2 n|``. The paper finds the first stage and the curriculum essential:
encoder and decoder that are trained together from the start learn to ignore each other.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from hashml.models.decoder import Params
from hashml.models.refrag import Order, RefragConfig, output_log_probs, output_logits
from hashml.models.training import TrainState, init_state

AnyArray = Array | np.ndarray
ADAPTER = ("encoder", "projector")
"""What the first stage trains."""


def curriculum_weights(counts: Sequence[int], stage: int) -> Float[np.ndarray, " counts"]:
    """Probability of each count of chunks in a stage.

    Raises:
        ValueError: for counts that are not positive and rising, or a stage that does not exist.
    """
    if not counts or counts[0] < 1 or any(a >= b for a, b in itertools.pairwise(counts)):
        raise ValueError(f"counts is {tuple(counts)}; they are at least 1 and rising")
    if not 0 <= stage < len(counts):
        raise ValueError(f"stage is {stage}; it is from 0 to {len(counts) - 1}")
    distance = np.abs(np.log2(counts) - np.log2(counts[stage]))
    weights = np.exp(-distance)
    return weights / weights.sum()


def curriculum(key: Array, counts: Sequence[int], steps: int) -> Int[np.ndarray, " {steps}"]:
    """Chunks of each step: stages of equal length, the last of which takes what is left over.

    Args:
        key: of the draws.
        counts: of chunks, rising; a stage each.
        steps: in all.

    Raises:
        ValueError: for fewer steps than stages, or counts that are not positive and rising.
    """
    if steps < len(counts):
        raise ValueError(f"steps is {steps}; {len(counts)} stages take at least as many")
    stages = np.minimum(np.arange(steps) // (steps // len(counts)), len(counts) - 1)
    weights = np.stack([curriculum_weights(counts, stage) for stage in range(len(counts))])
    drawn = jax.random.categorical(key, jnp.log(jnp.asarray(weights[stages])))
    return np.asarray(counts)[np.asarray(drawn)]


def reconstruction_loss(
    adapter: Params, decoder: Params, config: RefragConfig, context: Int[AnyArray, "B s"], marker: int
) -> Float[Array, ""]:
    """Nats a token of the context, which the decoder repeats behind its embeddings and the token ``marker``.

    Args:
        adapter: parameters of encoder and projector; the gradient is of these.
        decoder: frozen.
        config: of the model.
        context: tokens.
        marker: a token that asks for the repetition.

    Raises:
        ValueError: for a marker outside the vocabulary.
    """
    if not 0 <= marker < config.decoder.vocabulary:
        raise ValueError(f"marker is {marker}; allowed are ids from 0 to {config.decoder.vocabulary - 1}")
    params = adapter | {"decoder": jax.lax.stop_gradient(decoder)}
    asked = jnp.full((context.shape[0], 1), marker, jnp.int32)
    return -output_log_probs(output_logits(params, config, asked, context, context), context).mean()


def continuation_loss(
    params: Params,
    config: RefragConfig,
    question: Int[AnyArray, "B q"],
    context: Int[AnyArray, "B s"],
    output: Int[AnyArray, "B o"],
    weight: Float[AnyArray, "B o"] | None = None,
    chosen: Int[AnyArray, "B t"] | None = None,
    *,
    order: Order = "context_first",
) -> Float[Array, ""]:
    """Nats a token of what follows the context, of those with a ``weight`` where there is one."""
    logits = output_logits(params, config, question, context, output, chosen, order=order)
    nll = -output_log_probs(logits, output)
    return nll.mean() if weight is None else (nll * weight).sum() / jnp.asarray(weight).sum()


Step = Callable[..., tuple[TrainState, Float[Array, ""]]]


def reconstruction_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first stage: of encoder and projector."""
    return init_state({name: params[name] for name in ADAPTER}, optimizer)


def reconstruction_step(config: RefragConfig, optimizer: optax.GradientTransformation, *, marker: int) -> Step:
    """The jitted ``step(state, decoder, context) -> (state, loss)``; the decoder does not change."""

    def loss(adapter: Params, decoder: Params, context: Array) -> Array:
        return reconstruction_loss(adapter, decoder, config, context, marker)

    return _jitted(loss, optimizer)


def continuation_step(
    config: RefragConfig, optimizer: optax.GradientTransformation, *, order: Order = "context_first"
) -> Step:
    """The jitted ``step(state, question, context, output, weight, chosen) -> (state, loss)``, of a state of all
    parameters."""

    def loss(params: Params, *batch: Array) -> Array:
        return continuation_loss(params, config, *batch, order=order)

    return _jitted(loss, optimizer)


def _jitted(loss: Callable[..., Array], optimizer: optax.GradientTransformation) -> Step:
    @jax.jit
    def step(state: TrainState, *arguments: Any) -> tuple[TrainState, Array]:
        value, grads = jax.value_and_grad(loss)(state.params, *arguments)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), value

    return step
