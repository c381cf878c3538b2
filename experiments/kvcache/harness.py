"""How a compressed cache is judged: teacher-forced decoding, token by token, evicting and encoding as in generation.

    decode     the cache begins empty; every token goes through it, and nothing ever attends to what it has lost
    prompt     the first tokens are a prompt, whose own attention is exact and which is compressed once

The second number flatters: the prompt's hidden states are those of an exact cache. It is the only one for methods
that choose by a prompt (SnapKV and its relatives, ThinK), and is never called the other. Of a language model the
tokens after the middle of the sequence count; of a recall model, the final questions. Both come from one program,
compiled once for a method and run for every model.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from hashml.kvcache.accounting import CacheBytes, cache_bytes
from hashml.kvcache.serving import Tables, decode_step, prefill
from hashml.kvcache.spec import CacheSpec, LayerSpec, batch_spec
from hashml.kvcache.state import Cache, init
from hashml.models.decoder import DecoderModel, Params


class Scores(NamedTuple):
    """What is said after each token; places inside a prompt hold zeros.

    Attributes:
        nll: negative log-likelihood of the targets, in nats; 0 where there is none.
        correct: whether the target is the likeliest token.
        kept: tokens that a head holds, mean over rows, heads and layers.
    """

    nll: Float[Array, "B T"]
    correct: Bool[Array, "B T"]
    kept: Float[Array, " T"]


@functools.partial(jax.jit, static_argnames=("model", "spec", "prompt"))
def teacher_forced(
    model: DecoderModel,
    spec: CacheSpec,
    tables: Tables,
    params: Params,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    key: Array,
    *,
    prompt: int = 0,
) -> Scores:
    """Scores of sequences that are fed to a cache, whatever it would have said.

    Args:
        model, params: the decoder.
        spec, tables: of the cache.
        tokens: sequences without padding.
        targets: what is to be said after each token; -1 for nothing.
        key: of a policy's noise.
        prompt: tokens that are prefilled together; 0 begins with an empty cache.

    Raises:
        ValueError: for a prompt that leaves nothing to decode.
    """
    batch, length = tokens.shape
    if not 0 <= prompt < length:
        raise ValueError(f"prompt is {prompt}; it must be at least 0 and less than the {length} tokens")
    if prompt:
        positions = jnp.broadcast_to(jnp.arange(prompt, dtype=jnp.int32), (batch, prompt))
        _, cache = prefill(model, spec, tables, params, tokens[:, :prompt], positions, key)
    else:
        cache = empty_cache(model, spec, key)

    def step(cache: Cache, given: tuple[Array, Array]) -> tuple[Cache, tuple[Array, Array, Array]]:
        token, target = given
        logits, cache = decode_step(model, spec, tables, params, cache, token)
        said = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(target, 0)[:, None], axis=1)[:, 0]
        return cache, (jnp.where(target >= 0, -said, 0.0), logits.argmax(axis=1) == target, tokens_kept(cache))

    fed = (tokens[:, prompt:].T, targets[:, prompt:].T)
    _, (nll, correct, kept) = jax.lax.scan(step, cache, fed)
    before = ((0, 0), (prompt, 0))
    return Scores(jnp.pad(nll.T, before), jnp.pad(correct.T, before), jnp.pad(kept, before[1]))


def empty_cache(model: DecoderModel, spec: CacheSpec, key: Array) -> Cache:
    """A cache before its first token, with zeros before it where the model smears its keys."""
    config = model.config
    nothing = jnp.zeros((spec.batch, config.features)) if config.smear else None
    return init(spec, key, (nothing,) * len(spec.layers))


def tokens_kept(cache: Cache) -> Float[Array, ""]:
    """Tokens that a head holds, mean over rows, heads and layers."""
    held = [(layer.pos >= 0).sum(-1).mean() + (layer.window_pos >= 0).sum(-1).mean() for layer in cache.layers]
    return jnp.stack(held).mean()


def row_bytes(model: DecoderModel, layers: Sequence[LayerSpec], tables: Any = ()) -> CacheBytes:
    """All bytes of the cache of one row: payload, scales, positions, window, policy; tables apart."""
    spec = batch_spec(layers, 1)
    cache = jax.eval_shape(lambda: empty_cache(model, spec, jax.random.key(0)))
    return cache_bytes(spec, cache, tables)


class Model(NamedTuple):
    """One of several models of the same configuration, and what it is fed.

    Attributes:
        params: of the decoder.
        tables: of the codecs.
        key: of a policy's noise.
        tokens, targets: as in `teacher_forced`.
    """

    params: Params
    tables: Tables
    key: Array
    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]


def compile_decode(
    model: DecoderModel, layers: Sequence[LayerSpec], like: Model, *, prompt: int = 0
) -> Callable[[Model], Scores]:
    """`teacher_forced` as one program, for all models whose shapes are those of ``like``.

    Args:
        model: the decoder's pieces.
        layers: of the cache.
        like: any of the models.
        prompt: as in `teacher_forced`.
    """
    spec = batch_spec(layers, len(like.tokens))
    program = teacher_forced.lower(
        model, spec, like.tables, like.params, like.tokens, like.targets, like.key, prompt=prompt
    ).compile()

    def run(one: Model) -> Scores:
        fed = (jnp.asarray(one.tokens), jnp.asarray(one.targets))
        return Scores(*program(one.tables, one.params, *fed, one.key))

    return run


def decode_all(
    model: DecoderModel,
    layers: Sequence[LayerSpec],
    models: Sequence[Model],
    *,
    prompt: int = 0,
) -> Iterator[Scores]:
    """`teacher_forced` of each of the models, by one program; arguments as in `compile_decode`."""
    run = compile_decode(model, layers, models[0], prompt=prompt)
    for one in models:
        yield jax.block_until_ready(run(one))


def next_tokens(tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
    """Targets of a language model."""
    return np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)


def second_half_nll(scores: Scores, targets: Int32[np.ndarray, "B T"]) -> float:
    """Mean over the targets after position T/2."""
    length = targets.shape[1]
    counted = (targets >= 0) & (np.arange(length) >= length // 2)
    return float(np.asarray(scores.nll)[counted].mean())


def share_correct(scores: Scores, where: Bool[np.ndarray, "B T"]) -> float:
    """Share of right answers at these places."""
    return float(np.asarray(scores.correct)[where].mean())
