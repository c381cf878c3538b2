"""Text from a decoder: a ragged batch of prompts, static shapes, one compilation, any cache.

    tokens = generate(model, params, prompts, 50, temperature=0)            # one program for the whole
    for step in stream(model, params, prompts, 50, temperature=0): ...      # a token a row as it comes

Prompts are padded at the *left*, so that all end in one column; a position of -1 marks padding, and a row's own
tokens count from 0. What keeps keys and values is an `Engine`: two functions over a state of fixed shapes, which the
steps donate. `full_engine` is the exact dense one: the default, and what caches that forget are compared with.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hashml.models.decoder import DecoderConfig, DecoderModel, Params
from hashml.models.exact_attention import causal_attention, masked_attention
from hashml.models.sampling import Sampling, integer, sample

State = Any
"""Pytree of arrays whose shapes never change."""
Prompts = Sequence[Sequence[int]] | Int[Array | np.ndarray, "B T"]
"""Token ids, of any lengths."""
_ENDED, _LOST = -1, -2
"""In place of a token: the row has ended; its logits were not finite."""


@runtime_checkable
class Engine(Protocol):
    """A model with its cache.

    One that holds only so many tokens a row, padding included, also says so in ``capacity: int``.
    """

    @property
    def prefill(self) -> Callable[[Params, Array, Array], tuple[Array, State]]:
        """``(params, tokens [B, T], positions [B, T]) -> (logits [B, V] behind the last column, state)``."""
        ...

    @property
    def step(self) -> Callable[[Params, State, Array], tuple[Array, State]]:
        """``(params, state, token [B]) -> (logits [B, V], state)``."""
        ...


class DenseState(NamedTuple):
    """Keys and values of every token, layer by layer; keys are stored rotated."""

    k: tuple[Float[Array, "B H C D"], ...]
    v: tuple[Float[Array, "B H C D"], ...]
    previous: tuple[Float[Array, "B d"] | None, ...]
    """The last ``u`` of each layer, where keys are smeared."""
    positions: Int[Array, "B C"]
    """Of the token in each slot; -1: none."""
    length: Int[Array, " B"]
    """Tokens of the row, hence the next position."""
    slot: Int[Array, ""]
    """The next to be written, the same in all rows."""


@dataclasses.dataclass(frozen=True)
class DenseEngine:
    """What `full_engine` returns, an `Engine`."""

    prefill: Callable[[Params, Array, Array], tuple[Array, DenseState]]
    step: Callable[[Params, DenseState, Array], tuple[Array, DenseState]]
    capacity: int


@functools.lru_cache(maxsize=64)
def full_engine(model: DecoderModel, capacity: int) -> DenseEngine:
    """Exact attention over all tokens: nothing is ever dropped, rounded or moved.

    Args:
        model: a decoder.
        capacity: slots C a row: columns of the prompt and steps. `step` writes the last slot again when it is
            called beyond; `generate` and `stream` refuse to.

    Raises:
        ValueError: when traced with a longer prompt.
    """
    config = model.config

    def rotated(x: Array, positions: Array) -> Array:
        return x if config.rotary is None else config.rotary.rotate(x, positions[:, None])

    def prefill(params: Params, tokens: Array, positions: Array) -> tuple[Array, DenseState]:
        free = capacity - tokens.shape[1]
        if free < 0:
            raise ValueError(f"capacity is {capacity}; the prompts have {tokens.shape[1]} columns")
        slots = ((0, 0), (0, 0), (0, free), (0, 0))

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            out = causal_attention(q, k, v, positions, rotary=config.rotary, sliding_window=config.sliding_window)
            return out, (jnp.pad(rotated(k, positions), slots), jnp.pad(v, slots))

        x, carried, previous = model.embed(params, tokens), [], []
        for index in range(config.layers):
            x, last, kv = model.layer(model.layer_params(params, index), x, None, attend, positions >= 0)
            carried.append(kv)
            previous.append(last)
        k, v = zip(*carried, strict=True)
        kept = jnp.pad(positions, ((0, 0), (0, free)), constant_values=-1)
        slot = jnp.asarray(tokens.shape[1], jnp.int32)
        state = DenseState(k, v, tuple(previous), kept, positions.max(axis=1) + 1, slot)
        return model.unembed(params, x[:, -1:])[:, 0], state

    def step(params: Params, state: DenseState, token: Array) -> tuple[Array, DenseState]:
        now = state.length[:, None]
        positions = jax.lax.dynamic_update_slice(state.positions, now, (0, state.slot))

        def attend(index: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            keys = jax.lax.dynamic_update_slice(state.k[index], rotated(k, now), (0, 0, state.slot, 0))
            values = jax.lax.dynamic_update_slice(state.v[index], v, (0, 0, state.slot, 0))
            out = masked_attention(rotated(q, now), keys, values, now, positions, config.sliding_window)
            return out, (keys, values)

        x, carried, previous = model.embed(params, token[:, None]), [], []
        for index in range(config.layers):
            attend_here = functools.partial(attend, index)
            x, last, kv = model.layer(model.layer_params(params, index), x, state.previous[index], attend_here)
            carried.append(kv)
            previous.append(last)
        k, v = zip(*carried, strict=True)
        state = DenseState(k, v, tuple(previous), positions, state.length + 1, state.slot + 1)
        return model.unembed(params, x)[:, 0], state

    return DenseEngine(prefill, step, capacity)


# --- generation -----------------------------------------------------------------------------------


def generate(
    model: DecoderModel,
    params: Params,
    prompts: Prompts,
    tokens: int,
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int = 1.0,
    key: Array | None = None,
    cache: Engine | None = None,
    stops: Sequence[int] = (),
    prompt_length: int | None = None,
) -> list[list[int]]:
    """What follows each prompt, in one compiled program that ends when every row has.

    Args:
        model: from `hashml.models.decoder.decoder_model`.
        params: of the model.
        prompts: token ids, of any lengths.
        tokens: at most that many new ones a row.
        temperature: 0 is greedy and needs no key.
        top_k: see `Sampling`.
        top_p: see `Sampling`.
        key: of the draws.
        cache: an engine; ``None`` is `full_engine` of the size that is needed.
        stops: tokens that end a row; they are not returned.
        prompt_length: columns that prompts are padded to, so that calls of different prompts share a compilation;
            ``None``: the longest prompt.

    Returns:
        The new tokens of each row, without the prompt.

    Raises:
        ValueError: for an empty prompt, an id outside the vocabulary, more tokens than the cache holds or, of the
            full cache, than the model's context; for sampling arguments outside their ranges; and when the logits
            of a row are not finite, since no token follows from them.
        TypeError: for tokens, ids or a top_k that are no integers.
    """
    tokens = integer("tokens", tokens, "an integer, at least 1")
    run = _prepared(model, prompts, tokens, Sampling(temperature, top_k, top_p), key, cache, stops, prompt_length)
    found = _whole(run.engine.prefill, run.engine.step, run.sampling, run.stops, tokens)(
        params, run.tokens, run.positions, run.key
    )
    found = np.asarray(found)
    for row, place in np.argwhere(found == _LOST).tolist():
        raise _lost(row, place)
    return [[token for token in row.tolist() if token >= 0] for row in found]


def stream(
    model: DecoderModel,
    params: Params,
    prompts: Prompts,
    tokens: int,
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int = 1.0,
    key: Array | None = None,
    cache: Engine | None = None,
    stops: Sequence[int] = (),
    prompt_length: int | None = None,
) -> Iterator[np.ndarray]:
    """`generate`, a step at a time: int32 ``[B]``, where -1 stands for rows that have ended.

    The arguments are those of `generate`, checked when this is called; logits that are not finite are an error when
    their step comes. The next step is under way on the device while the caller reads a token.
    """
    tokens = integer("tokens", tokens, "an integer, at least 1")
    run = _prepared(model, prompts, tokens, Sampling(temperature, top_k, top_p), key, cache, stops, prompt_length)
    return _steps(run, params, tokens)


class _Run(NamedTuple):
    engine: Engine
    sampling: Sampling
    stops: tuple[int, ...]
    key: Array
    tokens: Array
    positions: Array


def _prepared(
    model: DecoderModel,
    prompts: Prompts,
    tokens: int,
    sampling: Sampling,
    key: Array | None,
    cache: Engine | None,
    stops: Sequence[int],
    prompt_length: int | None,
) -> _Run:
    config = model.config
    if key is None and sampling.temperature > 0:
        raise ValueError(f"key is None; temperature {sampling.temperature} draws, and needs a jax.random key")
    ids, positions, stops = check_request(config, prompts, tokens, stops, prompt_length)
    longest, columns = int(positions.max()) + 1, ids.shape[1]
    if cache is None:
        if longest + tokens > config.context:
            raise ValueError(
                f"tokens is {tokens}; behind a prompt of {longest}, at most {config.context - longest} fit the "
                f"model's context of {config.context}"
            )
        cache = full_engine(model, columns + tokens)
    capacity = getattr(cache, "capacity", None)
    if capacity is not None and columns + tokens > capacity:
        raise ValueError(
            f"tokens is {tokens}; the cache has a capacity of {capacity}, of which the prompts take {columns}"
        )
    key = jax.random.key(0) if key is None else key  # never read at temperature 0
    return _Run(cache, sampling, stops, key, jnp.asarray(ids), jnp.asarray(positions))


def check_request(
    config: DecoderConfig, prompts: Prompts, tokens: int, stops: Sequence[int] = (), prompt_length: int | None = None
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], tuple[int, ...]]:
    """What `generate` asks of these arguments whatever the cache: the results of `pad_prompts`, and stops in order.

    Raises:
        ValueError, TypeError: as `generate`.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; at least 1 is generated")
    ids, positions = pad_prompts(prompts, config.vocabulary, prompt_length)
    longest = int(positions.max()) + 1
    if longest > config.context:
        raise ValueError(f"prompts has one of {longest} tokens; the model's context is {config.context}")
    allowed = f"ids of the vocabulary, 0 to {config.vocabulary - 1}"
    found = {integer(f"stops[{place}]", stop, allowed) for place, stop in enumerate(stops)}
    if bad := [stop for stop in found if not 0 <= stop < config.vocabulary]:
        raise ValueError(f"stops has {bad[0]}; allowed are {allowed}")
    return ids, positions, tuple(sorted(found))


def pad_prompts(
    prompts: Prompts, vocabulary: int, length: int | None = None
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Prompts padded at the left: int32 tokens and positions, which are -1 where there is none.

    Padding repeats the first token of its row: whatever a model makes of it, the row makes that of it anyway, and
    numbers that are not finite stay in the rows that have them.

    Args:
        prompts: token ids.
        vocabulary: that they lie in.
        length: columns; ``None``: as the longest prompt has.

    Raises:
        ValueError: for no prompts, an empty one, one longer than ``length``, or an id outside the vocabulary.
        TypeError: for prompts that are no rows of integers.
    """
    rows = [_ids(row, prompt, vocabulary) for row, prompt in enumerate(_listed("prompts", prompts))]
    if not rows:
        raise ValueError("prompts is empty; at least one is needed")
    longest = max(len(ids) for ids in rows)
    length = longest if length is None else integer("prompt_length", length, "an integer, or None")
    if longest > length:
        raise ValueError(f"prompts has one of {longest} tokens; prompt_length is {length}")
    tokens, positions = np.empty((len(rows), length), np.int32), np.full((len(rows), length), -1, np.int32)
    for row, ids in enumerate(rows):
        tokens[row] = ids[0]
        tokens[row, length - len(ids) :] = ids
        positions[row, length - len(ids) :] = np.arange(len(ids))
    return tokens, positions


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, jax.Array):  # whose entries one by one are slow to read
        values = np.asarray(values)
    try:
        return values.tolist() if isinstance(values, np.ndarray) else list(values)
    except TypeError:
        raise TypeError(f"{name} is {values!r}; prompts are rows of token ids") from None


def _ids(row: int, prompt: Any, vocabulary: int) -> list[int]:
    name, allowed = f"prompts[{row}]", f"ids from 0 to {vocabulary - 1}"
    ids = [integer(f"{name}[{place}]", token, allowed) for place, token in enumerate(_listed(name, prompt))]
    if not ids:
        raise ValueError(f"{name} is empty; allowed is at least one token, such as the tokenizer's BOS")
    for place, token in enumerate(ids):
        if not 0 <= token < vocabulary:
            raise ValueError(f"{name}[{place}] is {token}; allowed are {allowed}")
    return ids


def _lost(row: int, place: int) -> ValueError:
    return ValueError(
        f"the logits of new token {place} behind prompts[{row}] are not finite; params hold NaN or infinite numbers, "
        "or theirs are too large for their dtype"
    )


def _chosen(key: Array, index: Any, logits: Array, ended: Array, sampling: Sampling, stops: tuple[int, ...]) -> Any:
    """The token of step ``index``, and which rows have ended with it or before."""
    token = sample(jax.random.fold_in(key, index), logits, sampling)
    lost = ~ended & ~jnp.isfinite(logits.max(axis=-1))  # -inf alone rules a token out
    ended = ended | lost | (token[:, None] == jnp.asarray(stops, jnp.int32)).any(axis=1)
    return jnp.where(lost, _LOST, token), ended


@functools.lru_cache(maxsize=64)
def _stepwise(
    prefill: Callable[..., Any], step: Callable[..., Any], sampling: Sampling, stops: tuple[int, ...]
) -> Any:
    def first(params: Params, tokens: Array, positions: Array, key: Array) -> Any:
        logits, state = prefill(params, tokens, positions)
        ended = jnp.zeros(tokens.shape[0], bool)
        return state, *_chosen(key, 0, logits, ended, sampling, stops)

    def following(params: Params, state: State, token: Array, ended: Array, key: Array, index: Array) -> Any:
        logits, state = step(params, state, token)
        return state, *_chosen(key, index, logits, ended, sampling, stops)

    return jax.jit(first), jax.jit(following, donate_argnums=1)


def _steps(run: _Run, params: Params, tokens: int) -> Iterator[np.ndarray]:
    first, following = _stepwise(run.engine.prefill, run.engine.step, run.sampling, run.stops)
    state, token, ended = first(params, run.tokens, run.positions, run.key)
    for index in range(1, tokens + 1):
        read = token, ended
        if index < tokens:
            state, token, ended = following(params, state, token, ended, run.key, np.int32(index))
        found, over = np.asarray(read[0]), np.asarray(read[1])
        if (found == _LOST).any():
            raise _lost(int(np.argmin(found)), index - 1)
        if over.all():
            return
        yield np.where(over, np.int32(_ENDED), found)


@functools.lru_cache(maxsize=64)
def _whole(
    prefill: Callable[..., Any], step: Callable[..., Any], sampling: Sampling, stops: tuple[int, ...], tokens: int
) -> Any:
    @jax.jit
    def whole(params: Params, prompt: Array, positions: Array, key: Array) -> Array:
        logits, state = prefill(params, prompt, positions)
        token, ended = _chosen(key, 0, logits, jnp.zeros(prompt.shape[0], bool), sampling, stops)
        written = jnp.full((prompt.shape[0], tokens), _ENDED, jnp.int32)

        def write(index: Any, written: Array, token: Array, ended: Array) -> Array:
            shown = jnp.where(ended & (token != _LOST), _ENDED, token)
            return jax.lax.dynamic_update_slice(written, shown[:, None], (0, index))

        def going(carry: Any) -> Array:
            index, _, _, ended, _ = carry
            return (index < tokens) & ~ended.all()

        def following(carry: Any) -> Any:
            index, state, token, ended, written = carry
            logits, state = step(params, state, token)
            token, ended = _chosen(key, index, logits, ended, sampling, stops)
            return index + 1, state, token, ended, write(index, written, token, ended)

        carry = (jnp.int32(1), state, token, ended, write(0, written, token, ended))
        return jax.lax.while_loop(going, following, carry)[-1]

    return whole
