"""Trains the decoder of `experiments.attention.refrag`, REFRAG on top of it, and the policies that expand chunks.

The decoder learns to answer from contexts, short and whole, and to say the tokens of short ones again, in any order,
behind `REPEAT`: a language model can do both before it hears of chunks. REFRAG then takes two stages, which differ by
``recipe``:

    refrag              reconstruction with the decoder frozen, then all parameters; few chunks first in both
    no_curriculum       both stages, whole contexts from the start
    no_reconstruction   as many steps, all of them of the second stage
    direct              neither

Encoder and phi begin as the mean of the decoder's embeddings of a chunk's tokens (``untrained`` is that, and the
decoder as it was): they have no pretraining to begin with. A batch holds as many tokens of context whatever their
length. Of the batches of whole contexts in the second stage, every other one has chunks expanded, drawn at random, so
that the decoder has read both kinds beside each other.
"""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from experiments.attention import refrag_task
from experiments.attention.refrag_task import CONTEXT, LENGTH, PASSAGES, REPEAT, VOCABULARY
from experiments.data.counter import stream, uniform
from hashml.models.decoder import DecoderConfig, Params
from hashml.models.decoder import forward as decoder_forward
from hashml.models.decoder import init_params as init_decoder
from hashml.models.refrag import (
    RefragConfig,
    chunked,
    embed_chunks,
    encode,
    expanded_count,
    init_params,
    output_log_probs,
    output_logits,
    token_start,
)
from hashml.models.refrag_policy import ChunkPolicy, policy_step
from hashml.models.refrag_training import (
    continuation_step,
    curriculum,
    reconstruction_state,
    reconstruction_step,
)
from hashml.models.training import init_state

RECIPES = ("refrag", "no_curriculum", "no_reconstruction", "direct", "untrained")


@runtime_checkable
class Plan(Protocol):
    """Fields of the experiment's configuration that training reads; hashable."""

    @property
    def features(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def questions(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def decoder_steps(self) -> int: ...
    @property
    def decoder_rows(self) -> int: ...
    @property
    def decoder_rate(self) -> float: ...
    @property
    def reconstruction_steps(self) -> int: ...
    @property
    def reconstruction_rate(self) -> float: ...
    @property
    def continuation_steps(self) -> int: ...
    @property
    def continuation_rate(self) -> float: ...
    @property
    def policy_steps(self) -> int: ...
    @property
    def policy_rows(self) -> int: ...
    @property
    def policy_rate(self) -> float: ...
    @property
    def group(self) -> int: ...


def decoder_config(plan: Plan) -> DecoderConfig:
    """Heads of 32 channels, a perceptron twice as wide as the stream."""
    heads = max(1, plan.features // 32)
    return DecoderConfig(
        vocabulary=VOCABULARY,
        features=plan.features,
        layers=plan.layers,
        heads=heads,
        kv_heads=heads,
        head_dim=plan.features // heads,
        hidden=2 * plan.features,
        activation="gelu",
        gated=False,
        context=2 * CONTEXT,
    )


def refrag_config(plan: Plan, size: int) -> RefragConfig:
    return RefragConfig(decoder_config(plan), size, plan.features, 2, max(1, plan.features // 32), 2 * plan.features)


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with gradients cut at norm 1: rising for a tenth of the steps, then half a cosine to a tenth."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, -(-steps // 10), steps + 1, rate / 10)
    # As one vector: a program for each length of context compiles in half the time.
    return optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)))


# --- the decoder --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _decoder_step(plan: Plan) -> Any:
    config, optimizer = decoder_config(plan), adam(plan.decoder_rate, plan.decoder_steps)

    def nll(params: Params, tokens: Array, weight: Array) -> Array:
        found = -output_log_probs(decoder_forward(params, config, tokens[:, :-1]), tokens[:, 1:])
        return (found * weight).sum() / weight.sum()

    @jax.jit
    def step(state: Any, *parts: tuple[Array, Array]) -> Any:
        value, grads = jax.value_and_grad(lambda p: sum(nll(p, *part) for part in parts))(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state), value

    return step, optimizer


SHORT = 2
"""Passages of the short contexts, of which a batch has four times as many."""


@functools.lru_cache(maxsize=8)
def trained_decoder(plan: Plan, seed: int) -> Params:
    """The parameters of the decoder that every method of a seed begins with."""
    step, optimizer = _decoder_step(plan)
    state = init_state(init_decoder(jax.random.key(seed), decoder_config(plan)), optimizer)
    keys = [stream(seed, "refrag", "decoder", part) for part in ("long", "short")]
    rows = 4 * plan.decoder_rows
    for at in range(plan.decoder_steps):
        long = refrag_task.contexts(
            plan.decoder_rows, keys[0], questions=plan.questions, first=at * plan.decoder_rows
        )
        few = refrag_task.contexts(rows, keys[1], questions=SHORT, passages=SHORT, first=at * rows)
        short = few.context[: plan.decoder_rows]
        draws = uniform(stream(seed, "refrag", "order", at), np.arange(short.size)).reshape(short.shape)
        shuffled = np.take_along_axis(short, np.argsort(draws, axis=1), axis=1)
        asked = np.concatenate([short, np.full((plan.decoder_rows, 1), REPEAT, np.int32), shuffled], axis=1)
        again = np.broadcast_to(np.arange(1, asked.shape[1]) > short.shape[1], asked[:, 1:].shape)
        state, _ = step(state, _answers(long), _answers(few), (asked, again.astype(np.float32)))
    return state.params


def _answers(made: refrag_task.Contexts) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and which of them behind the first are answers."""
    weight = np.pad(made.weight, ((0, 0), (made.context.shape[1], 0)))
    return np.concatenate([made.context, made.tail], axis=1), weight


# --- REFRAG -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _steps(plan: Plan, size: int, continuation_steps: int) -> Any:
    """Both stages' steps and optimizers; one object a shape, so that seeds share what is compiled."""
    config = refrag_config(plan, size)
    first = adam(plan.reconstruction_rate, plan.reconstruction_steps)
    second = adam(plan.continuation_rate, continuation_steps)
    return (reconstruction_step(config, first, marker=REPEAT), first), (continuation_step(config, second), second)


def chunk_counts(size: int) -> tuple[int, ...]:
    """Of the curriculum: contexts of an eighth of the passages, and of all."""
    return CONTEXT // size // 8, CONTEXT // size


def lengths(plan: Plan, size: int, recipe: str, stage: str, steps: int, seed: int) -> Int[np.ndarray, " steps"]:
    """Chunks of each step's contexts."""
    counts = chunk_counts(size)
    if recipe in ("no_curriculum", "direct"):
        return np.full(steps, counts[-1])
    return curriculum(jax.random.key(stream(seed, "refrag", stage) >> 32), counts, steps)


@functools.partial(jax.jit, static_argnames="config")
def _begun(key: Array, config: RefragConfig, decoder: Params) -> Params:
    return token_start(init_params(key, config, decoder))


@functools.lru_cache(maxsize=16)
def trained(plan: Plan, size: int, recipe: str, seed: int) -> Params:
    """REFRAG's parameters for chunks of a size.

    Raises:
        ValueError: for a recipe that does not exist.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; allowed are {', '.join(RECIPES)}")
    config = refrag_config(plan, size)
    params = _begun(jax.random.key(seed), config, trained_decoder(plan, seed))
    if recipe == "untrained":
        return params
    before = plan.reconstruction_steps if recipe in ("refrag", "no_curriculum") else 0
    after = plan.reconstruction_steps + plan.continuation_steps - before
    (reconstruct, first), (continue_, second) = _steps(plan, size, after)

    state = reconstruction_state(params, first)
    for at, chunks in enumerate(lengths(plan, size, recipe, "reconstruction", before, seed) if before else ()):
        passages = int(chunks) * size // LENGTH
        rows = plan.rows * PASSAGES // passages
        made = refrag_task.contexts(rows, stream(seed, "refrag", "reconstruction", at), passages=passages)
        state, _ = reconstruct(state, params["decoder"], made.context)

    state = init_state(params | state.params, second)
    count = expanded_count(CONTEXT // size, plan.share)
    for at, chunks in enumerate(lengths(plan, size, recipe, "continuation", after, seed)):
        passages = int(chunks) * size // LENGTH
        rows = plan.rows * PASSAGES // passages
        key, questions = stream(seed, "refrag", "continuation", at), min(plan.questions, passages)
        made = refrag_task.contexts(rows, key, questions=questions, passages=passages)
        whole = int(chunks) * size == CONTEXT
        chosen = random_chunks(rows, int(chunks), count if whole and at % 2 else 0, seed, at)
        state, _ = continue_(state, made.tail[:, :1], made.context, made.tail[:, 1:], made.weight, chosen)
    return state.params


def random_chunks(rows: int, chunks: int, count: int, seed: int, at: int = 0) -> Int[np.ndarray, "rows count"]:
    """Different chunks for each row, all as likely."""
    draws = uniform(stream(seed, "refrag", "chosen", at), np.arange(rows * chunks)).reshape(rows, chunks)
    return np.argsort(draws, axis=1)[:, :count].astype(np.int32)


# --- the policies -------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What is computed of contexts before anything is asked, and the question's own vector."""

    c: Float[Array, "N L w"]
    embeddings: Float[Array, "N L d"]
    question: Float[Array, "N w"]


@functools.partial(jax.jit, static_argnames="config")
def kept(params: Params, config: RefragConfig, context: Array, tail: Array) -> Kept:
    """The question goes through the encoder as a chunk of its own that holds nothing but its first token."""
    chunks = chunked(context, config.size)
    line = jnp.broadcast_to(tail[:, :1], (tail.shape[0], config.size))
    return Kept(encode(params, config, chunks), embed_chunks(params, config, chunks), encode(params, config, line))


@functools.lru_cache(maxsize=4)
def _policy(plan: Plan, size: int, sees: bool) -> Any:
    config, optimizer = refrag_config(plan, size), adam(plan.policy_rate, plan.policy_steps)
    network = ChunkPolicy(plan.features, 2, max(1, plan.features // 32))

    def apply(params: Any, c: Array, question: Array) -> Array:
        return jnp.asarray(network.apply({"params": params}, c, question if sees else None))

    def reward(chosen: Array, params: Params, context: Array, tail: Array, embeddings: Array) -> Array:
        logits = output_logits(params, config, tail[:, :1], context, tail[:, 1:], chosen, embeddings=embeddings)
        return output_log_probs(logits, tail[:, 1:])[:, ::2].mean(axis=1)

    count = expanded_count(CONTEXT // size, plan.share)
    step = policy_step(apply, optimizer, reward, count=count, group=plan.group)
    return network, optimizer, step, jax.jit(apply)


@functools.lru_cache(maxsize=4)
def policy_logits(plan: Plan, size: int, seed: int, sees: bool) -> Any:
    """``logits(kept) [N, L]`` of a policy that was trained with contexts of its own; ``sees`` the question or not."""
    config, params = refrag_config(plan, size), trained(plan, size, "refrag", seed)
    network, optimizer, step, apply = _policy(plan, size, sees)
    c = jnp.zeros((1, CONTEXT // size, config.features))
    begun = jax.jit(network.init)(jax.random.key(seed), c, c[:, 0] if sees else None)["params"]
    state = init_state(begun, optimizer)
    key = stream(seed, "refrag", "policy")
    for at in range(plan.policy_steps):
        made = refrag_task.contexts(plan.policy_rows, key, first=at * plan.policy_rows)
        known = kept(params, config, made.context, made.tail)
        draws = jax.random.fold_in(jax.random.key(seed), at)
        rewarded = (params, made.context, made.tail, known.embeddings)
        state, _ = step(state, draws, (known.c, known.question), rewarded)
    return lambda known: apply(state.params, known.c, known.question)
