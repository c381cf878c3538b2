"""How well questions are answered: by the decoder from whole or truncated contexts, by REFRAG from chunks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.attention import refrag_task
from experiments.attention.refrag_models import (
    Plan,
    decoder_config,
    kept,
    policy_logits,
    random_chunks,
    refrag_config,
    trained,
    trained_decoder,
)
from experiments.attention.refrag_task import CONTEXT, FACT, FILLER, LENGTH, REPEAT, Contexts
from experiments.data.counter import stream
from hashml.models.decoder import forward
from hashml.models.refrag import chunked, expanded_count, output_log_probs, output_logits
from hashml.models.refrag_policy import chunk_nll, greedy_selection
from hashml.models.refrag_serving import prefill_cost

AnyArray = Array | np.ndarray
PLAIN = ("full", "none", "truncated", "truncated_expanded")
"""Answered by the decoder alone."""
SELECTIONS = ("random", "heuristic", "blind", "policy", "oracle")
"""Ways to choose the chunks that are expanded."""


class Answers(NamedTuple):
    """Of every question: whether both values are the likeliest tokens, and their nats a token."""

    right: Bool[Array, " N"]
    nll: Float[Array, " N"]


@functools.lru_cache(maxsize=2)
def held_out(count: int, seed: int) -> Contexts:
    """Contexts that no training sees, with a question each."""
    return refrag_task.contexts(count, stream(seed, "refrag", "held out"))


def judged(logits: Float[Array, "N 2 V"], said: Int[AnyArray, "N 2"]) -> tuple[Bool[Array, " N"], Float[Array, " N"]]:
    """Both right, and nats a token. The second value is asked for behind the right first one, whatever was said; no
    question tells what that is."""
    right = (logits.argmax(axis=-1) == jnp.asarray(said)).all(axis=1)
    return right, -output_log_probs(logits, said).mean(axis=1)


@functools.partial(jax.jit, static_argnames="config")
def _dense(params: Any, config: Any, tokens: Array, positions: Array, said: Array) -> Any:
    return judged(forward(params, config, tokens, positions)[:, -3::2], said)


@functools.partial(jax.jit, static_argnames="config")
def _mixed(params: Any, config: Any, context: Array, tail: Array, chosen: Array) -> Any:
    logits = output_logits(params, config, tail[:, :1], context, tail[:, 1:], chosen)
    return judged(logits[:, ::2], tail[:, 1::2])


def from_tokens(plan: Plan, seed: int, data: Contexts, length: int) -> Answers:
    """The decoder's answers from the last ``length`` tokens of each context; those before are padding, one program
    for all lengths."""
    tokens = np.concatenate([data.context, data.tail[:, :-1]], axis=1)
    positions = np.arange(tokens.shape[1], dtype=np.int32) - (CONTEXT - length)
    positions = np.broadcast_to(np.maximum(positions, -1), tokens.shape)
    return Answers(*_dense(trained_decoder(plan, seed), decoder_config(plan), tokens, positions, data.tail[:, 1::2]))


def from_chunks(plan: Plan, size: int, recipe: str, seed: int, data: Contexts, chosen: np.ndarray) -> Answers:
    """REFRAG's answers, the chosen chunks being expanded."""
    params = trained(plan, size, recipe, seed)
    return Answers(*_mixed(params, refrag_config(plan, size), data.context, data.tail, chosen))


def selection(plan: Plan, size: int, seed: int, data: Contexts, how: str) -> Int[np.ndarray, "N t"]:
    """The chunks that are expanded. Only the oracle knows which passage is asked for; it draws the others.

    Raises:
        ValueError: for a way that does not exist.
    """
    if how not in SELECTIONS:
        raise ValueError(f"how is {how!r}; allowed are {', '.join(SELECTIONS)}")
    rows, chunks = len(data.context), CONTEXT // size
    count = expanded_count(chunks, plan.share)
    drawn = random_chunks(rows, chunks, chunks, seed, at=-1)
    if how == "random":
        return drawn[:, :count]
    if how == "oracle":
        wanted = asked_chunks(data, size)
        return np.argsort(~wanted * (1 + np.argsort(drawn, axis=1)), axis=1, kind="stable")[:, :count].astype(
            np.int32
        )
    if how == "heuristic":
        each = chunked(data.context, size).reshape(-1, size)
        scores = chunk_nll(trained_decoder(plan, seed), decoder_config(plan), each, REPEAT).reshape(rows, chunks)
        return np.asarray(greedy_selection(scores, count))
    known = kept(trained(plan, size, "refrag", seed), refrag_config(plan, size), data.context, data.tail)
    return np.asarray(greedy_selection(policy_logits(plan, size, seed, how == "policy")(known), count))


def asked_chunks(data: Contexts, size: int) -> Bool[np.ndarray, "N L"]:
    """Which chunks hold the facts that are asked for: exactly one a context."""
    first = data.asked[:, :1] * LENGTH
    tokens = np.take_along_axis(data.context, first + np.arange(LENGTH), axis=1)
    is_fact = (tokens >= FACT) & (tokens < FILLER)
    return (first + is_fact.argmax(axis=1)[:, None]) // size == np.arange(CONTEXT // size)


def quality(plan: Plan, rows: int, method: str, size: int | None, seed: int) -> dict[str, Any]:
    """Accuracy, nats a token, the share of questions whose chunk is expanded, and what the decoder reads.

    Positions, FLOPs and bytes are of a prompt without its answer.
    """
    data = held_out(rows, seed)
    whole = refrag_config(plan, size or CONTEXT)
    asking = 1
    if method in PLAIN:
        chunks = CONTEXT // (size or CONTEXT)
        count = expanded_count(chunks, plan.share) if method == "truncated_expanded" else 0
        matched = chunks + count * ((size or 1) - 1)
        length = {"full": CONTEXT, "none": 0}.get(method, matched)
        found, hits = from_tokens(plan, seed, data, length), None
        spent = prefill_cost(whole, context=0, others=length + asking)
    else:
        if size is None:
            raise ValueError(f"size is None; {method} has chunks")
        chosen = np.zeros((rows, 0), np.int32)
        if method == "all":
            chosen = np.tile(np.arange(CONTEXT // size, dtype=np.int32), (rows, 1))
        elif method in SELECTIONS:
            chosen = selection(plan, size, seed, data, method)
        recipe = method if method not in (*SELECTIONS, "all", "compressed") else "refrag"
        found = from_chunks(plan, size, recipe, seed, data, chosen)
        hits = float(np.take_along_axis(asked_chunks(data, size), chosen, axis=1).any(axis=1).mean())
        spent = prefill_cost(whole, context=CONTEXT, others=asking, expanded=chosen.shape[1])
    return {
        "accuracy": float(found.right.mean()),
        "nll": float(found.nll.mean()),
        "hits": hits,
        "positions": spent.positions,
        "flops": spent.flops,
        "kv_bytes": spent.kv_bytes,
    }
