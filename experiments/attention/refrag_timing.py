"""Time to the first token: a prompt of random tokens through the same decoder, whole or in chunks.

One call is a prefill as generation makes it: keys and values of the prompt are written to a cache, and the logits of
the first token come out. ``dense`` reads the context as tokens; ``kept`` reads embeddings that lie in a table;
``expanded`` reads a share of the chunks as tokens beside them; ``encoded`` begins with the tokens of all chunks and
makes the embeddings within the call.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float

from experiments.lab import interleave
from hashml.models.decoder import DecoderConfig, decoder_model, unstacked
from hashml.models.generation import full_engine
from hashml.models.refrag import RefragConfig, embed_chunks, expanded_count, init_params
from hashml.models.refrag_serving import PrefillCost, prefill_cost, prompt, refrag_model, with_chunks

VOCABULARY = 257
OTHERS = 16
"""Tokens of the question."""


@runtime_checkable
class Timed(Protocol):
    """Fields of the experiment's configuration."""

    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def share(self) -> float: ...
    @property
    def timed_features(self) -> int: ...
    @property
    def timed_layers(self) -> int: ...
    @property
    def repetitions(self) -> int: ...


def timed_config(config: Timed, size: int) -> RefragConfig:
    """The card's decoder: full heads, a perceptron four times as wide; an encoder of 2 layers, as wide."""
    width = config.timed_features
    decoder = DecoderConfig(
        vocabulary=VOCABULARY,
        features=width,
        layers=config.timed_layers,
        heads=4,
        kv_heads=4,
        head_dim=width // 4,
        hidden=4 * width,
        activation="gelu",
        gated=False,
        context=1 << 20,
    )
    return RefragConfig(decoder, size, width, 2, 4)


def timed_methods(config: Timed) -> list[tuple[str, int | None]]:
    """``(method, size)`` of what is timed at a context; expansion and the encoder at the largest chunks."""
    largest = max(config.sizes)
    kept: list[tuple[str, int | None]] = [("kept", size) for size in config.sizes]
    return [("dense", None), *kept, ("expanded", largest), ("encoded", largest)]


def cost(config: Timed, method: str, size: int | None, context: int) -> PrefillCost:
    """What a call computes and keeps."""
    whole = timed_config(config, size or 1)
    count = expanded_count(context // whole.size, config.share) if method == "expanded" else 0
    expanded = None if method == "dense" else count
    return prefill_cost(whole, context=context, others=OTHERS, expanded=expanded, kept=method != "encoded")


def prefill(config: Timed, method: str, size: int | None, context: int) -> Callable[[], tuple[Array, Any]]:
    """A function of no argument, compiled when it is first called: logits of the first token, and the cache."""
    rng = np.random.default_rng(context)
    tokens, question = (rng.integers(0, VOCABULARY, n).astype(np.int32) for n in (context, OTHERS))
    whole = timed_config(config, size or 1)
    params, chunks = jax.jit(init_params, static_argnums=1)(jax.random.key(0), whole), tokens.reshape(-1, whole.size)
    decoder = unstacked(params["decoder"])
    if method == "dense":
        model, served, ids = decoder_model(whole.decoder), decoder, [*tokens.tolist(), *question.tolist()]
    else:
        count = expanded_count(len(chunks), config.share) if method == "expanded" else 0
        places = rng.permutation(len(chunks))[:count].tolist()
        model = refrag_model(whole.decoder, len(chunks))
        served = with_chunks(decoder, jax.jit(embed_chunks, static_argnums=1)(params, whole, chunks))
        ids = prompt([], chunks, np.arange(len(chunks)), question.tolist(), expanded=places, vocabulary=VOCABULARY)
    line = np.array([ids], np.int32)
    positions = np.arange(len(ids), dtype=np.int32)[None]
    engine = full_engine(model, len(ids))
    if method == "encoded":

        @jax.jit
        def encoded(params: Any, decoder: Any, chunks: Array) -> tuple[Array, Any]:
            table = embed_chunks(params, whole, chunks)
            return engine.prefill(with_chunks(decoder, table), jax.numpy.asarray(line), jax.numpy.asarray(positions))

        return functools.partial(encoded, params, decoder, chunks)
    return functools.partial(jax.jit(engine.prefill), served, line, positions)


def times(config: Timed, context: int) -> dict[tuple[str, int | None], Float[np.ndarray, " repetitions"]]:
    """Seconds of every method at a context, taken in turns."""
    functions = {f"{method}:{size}": prefill(config, method, size, context) for method, size in timed_methods(config)}
    found = interleave(functions, repetitions=config.repetitions, warmup=2)
    return {(method, size): found[f"{method}:{size}"] for method, size in timed_methods(config)}
