"""What `experiments.kvcache.streaming` measures: long streams, texts that a model tells itself, and attention on BOS.

Streams are decoded token by token through a cache (`harness.teacher_forced`). Beside them stand three losses of the
same tokens that no cache of `LayerSpec` gives: of exact attention over all tokens, at absolute positions; of the
newest tokens behind BOS, encoded anew for each token that is scored; and of pieces of the trained length, of whose
tokens the second half is scored. The last is what the model could do at most, and tells how hard the text is there.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from experiments.data import language
from experiments.kvcache import fixtures, harness, language_models
from experiments.kvcache.attention_rows import held_out_rows
from experiments.kvcache.contenders import contender
from experiments.kvcache.fixtures import DEFAULT, Size
from hashml.kvcache.methods import cache_layers
from hashml.kvcache.serving import Tables, decode_step, no_tables
from hashml.kvcache.spec import CacheSpec, LayerSpec, batch_spec
from hashml.kvcache.state import Cache
from hashml.kvcache.streaming import Streaming
from hashml.models.decoder import DecoderConfig, DecoderModel, Params, decoder_model
from hashml.models.sampling import Sampling, sample

FIXTURE = "f1"
STRIDE = 16
"""Of the tokens that are scored with all before them encoded anew."""
_THREADS = 2
_DRAWS = 1
"""What a seed's key is folded with for draws of tokens, so that they share no bits with a policy's noise."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are those of the claims."""

    capacities: tuple[int, ...] = (64, 128)
    """Tokens that a stream's cache keeps in all, sinks and window together."""
    sinks: tuple[int, ...] = (0, 1, 2, 4)
    stretch: int = 20
    """Tokens of a stream over those of a training sequence."""
    stream_rows: int = 4
    """Streams."""
    policies: tuple[str, ...] = ("window", "streaming", "random", "h2o", "scissorhands", "corm", "keyformer")
    """That tokens are drawn with."""
    codecs: tuple[str, ...] = ("kivi:2", "coupled:8c8b")
    budget: int = 4
    """Bytes of the exact cache over those of a policy."""
    prompt: int = 64
    """Held-out tokens before the first that is drawn."""
    prompts: int = 32
    """Texts."""
    seeds: int = 3
    """Models."""
    size: Size = DEFAULT


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cache, or what stands beside one.

    Attributes:
        part: ``"stream"`` or ``"generation"``.
        method: of a stream ``sinks``, ``elsewhere`` (other tokens stay), ``exact``, ``recomputed`` or ``pieces``;
            else a contender.
        capacity: tokens of a stream's cache.
        sinks: tokens of it that never leave.
        rope: where keys are rotated: ``slot``, their rank, or ``write``, their position.
    """

    part: str
    method: str
    capacity: int | None = None
    sinks: int | None = None
    rope: str | None = None


def cells(config: Config) -> list[Cell]:
    """All cells. Without sinks ranks and positions of all keys differ by the same number, hence one of the two."""
    found = [Cell("stream", "pieces"), Cell("stream", "exact")]
    for capacity in config.capacities:
        found.append(Cell("stream", "recomputed", capacity))
        found += [Cell("stream", "sinks", capacity, sinks, rope) for rope in ("slot", "write")
                  for sinks in config.sinks if sinks or rope == "write"]  # fmt: skip
        found.append(Cell("stream", "elsewhere", capacity, max(config.sinks), "slot"))
    return found + [Cell("generation", name) for name in ("full", *config.policies, *config.codecs)]


def starts(config: Config, part: str) -> list[int]:
    """First positions of the bins that losses are means over: of the trained length in a stream, and of as many
    tokens as the prompt behind it."""
    length = config.size.length
    if part == "stream":
        return list(range(0, config.stretch * length, length))
    return list(range(config.prompt, length, config.prompt))


def scores(config: Config, cell: Cell) -> list[list[dict[str, float | int | None]]]:
    """Of each seed, and of each bin of `starts`."""
    return _generation(config, cell) if cell.part == "generation" else _stream(config, cell)


def decoder(config: Config) -> DecoderConfig:
    return fixtures.setting(config.size, FIXTURE, "decode").decoder


def _each(program: Callable[..., Any], arguments: Sequence[tuple]) -> list[Any]:
    """Results of a compiled program, which uses one core: as many at a time as there are threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda one: jax.block_until_ready(program(*one)), arguments))


# --- sinks --------------------------------------------------------------------------------------------


def first_token(config: Config, layer: int, seed: int) -> dict[str, float]:
    """Attention of a layer on the first token and on the three behind it, mean over sequences, heads and the queries
    of the second half; the most that a head gives the first; and the share of a key if all got the same."""
    probs = held_out_rows(config.size, FIXTURE, seed).probs[layer]
    length = probs.shape[-1]
    half = probs[..., length // 2 :, :]
    heads = half[..., 0].mean(axis=(0, 2))
    return {
        "first": float(heads.mean()),
        "highest_head": float(heads.max()),
        "next_three": float(half[..., 1:4].sum(axis=-1).mean()),
        "equal": float((1 / np.arange(length // 2 + 1, length + 1)).mean()),
    }


# --- streams ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Protected(Streaming):
    """The oldest token leaves, but for those at some positions, which never do.

    Attributes:
        positions: of tokens that stay; at most as many as there are main slots.
    """

    positions: tuple[int, ...] = ()

    def score(
        self, spec: LayerSpec, state: dict[str, Array], pos: Array, now: Array, key: Array | None = None
    ) -> Array:
        stays = (pos[..., None] == jnp.asarray(self.positions, jnp.int32)).any(axis=-1)
        return jnp.where(stays, 1.0, super().score(spec, state, pos, now))


def stream_layers(config: Config, cell: Cell) -> tuple[LayerSpec, ...]:
    """The cache of a stream, of equal bytes whatever its sinks are."""
    if cell.capacity is None or cell.sinks is None:
        raise ValueError(f"cell is {cell}; a cache has a capacity and a number of sinks")
    sizes: dict[str, Any] = {"slots": cell.sinks, "window": cell.capacity - cell.sinks, "rope": cell.rope}
    sizes |= {"sinks": 0, "policy": Protected(elsewhere(config))} if cell.method == "elsewhere" else {
        "sinks": cell.sinks}  # fmt: skip
    layers = cache_layers(f"streaming@{cell.capacity}", decoder(config), cell.capacity, dtype="float16")
    return tuple(dataclasses.replace(layer, **sizes) for layer in layers)


def elsewhere(config: Config) -> tuple[int, ...]:
    """Positions of as many tokens as there are sinks at most, from the trained length but not its first."""
    sinks = max(config.sinks)
    found = np.random.default_rng(0).choice(np.arange(sinks, config.size.length), sinks, replace=False)
    return tuple(sorted(int(position) for position in found))


@functools.lru_cache(maxsize=2)
def streams(config: Config) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """Tokens, BOS first, and what follows each."""
    length = config.stretch * config.size.length
    text = language.splits(language_models.RECIPES[FIXTURE].text).test
    whole = language.sequences(text, length + 1, config.stream_rows)
    return whole[:, :-1], whole[:, 1:]


@functools.lru_cache(maxsize=2)
def _stream(config: Config, cell: Cell) -> list[list[dict[str, float | int | None]]]:
    trained = [fixtures.params(config.size, FIXTURE, seed) for seed in range(config.seeds)]
    if cell.method not in ("sinks", "elsewhere"):
        return [_bins(config, exact_losses(config, cell, params, *streams(config)), None) for params in trained]
    layers, model = stream_layers(config, cell), decoder_model(decoder(config))
    spec, size = batch_spec(layers, config.stream_rows), harness.row_bytes(model, layers).total
    tokens, targets = (jnp.asarray(x) for x in streams(config))
    # Nothing here draws noise: one key for all.
    fed = [(no_tables(spec), params, tokens, targets, jax.random.key(0)) for params in trained]
    program = harness.teacher_forced.lower(model, spec, *fed[0]).compile()
    return [_bins(config, np.asarray(found.nll), size) for found in _each(program, fed)]


def _bins(config: Config, loss: Float[np.ndarray, "B T"], size: int | None) -> list[dict[str, float | int | None]]:
    """Means over bins, of all tokens and of those that ``recomputed`` scores, none where one is unknown; and the
    bytes of a row's cache."""
    cut = loss.reshape(loss.shape[0], -1, config.size.length)
    means = {"nll": cut.mean(axis=(0, 2)), "nll_strided": cut[..., ::STRIDE].mean(axis=(0, 2))}
    return [{name: None if np.isnan(values[at]) else float(values[at]) for name, values in means.items()}
            | {"cache_bytes": size} for at in range(cut.shape[1])]  # fmt: skip


def exact_losses(
    config: Config, cell: Cell, params: Params, tokens: Int32[np.ndarray, "B T"], targets: Int32[np.ndarray, "B T"]
) -> Float[np.ndarray, "B T"]:
    """Losses of streams under exact attention, in float32; NaN where it is not asked for.

    ``exact`` sees all tokens. ``recomputed`` sees BOS and the newest ``capacity - 1``, at positions 0, 1, 2...; it is
    asked beyond the trained length, for one token of `STRIDE`. ``pieces`` sees the trained length at most, and half
    of it at least once so many are there.
    """
    whole = np.concatenate([tokens, targets[:, -1:]], axis=1)
    length, nll = config.size.length, functools.partial(_nll, params, decoder(config))
    if cell.method == "exact":
        return nll(whole)
    found = np.full(tokens.shape, np.nan, np.float32)
    if cell.method == "recomputed":
        newest = (cell.capacity or 0) - 1
        at = np.arange(length, tokens.shape[1], STRIDE)
        for row, line in enumerate(whole):
            found[row, at] = nll(_behind_bos(line, at - newest + 1, newest + 1))[:, -1]
        return found
    half = length // 2
    at = np.arange(0, tokens.shape[1] - half, half)
    for row, line in enumerate(whole):
        scored = nll(_behind_bos(line, at + 1, length))
        found[row, :half] = scored[0, :half]
        found[row, half:] = scored[:, half:].reshape(-1)
    return found


def _behind_bos(line: Int32[np.ndarray, " N"], first: np.ndarray, count: int) -> Int32[np.ndarray, "n M"]:
    """BOS and the ``count`` tokens from each of these places on."""
    pieces = line[first[:, None] + np.arange(count)]
    return np.pad(pieces, ((0, 0), (1, 0)), constant_values=language.BOS)


def _nll(params: Params, decoder: DecoderConfig, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(language_models.next_token_nll(params, decoder, tokens))


# --- texts that a model tells itself ------------------------------------------------------------------


class Told(NamedTuple):
    """Texts that a cache was drawn from.

    Attributes:
        tokens: prompts and what was drawn.
        log_probs: of all tokens of the vocabulary, wherever one was drawn.
    """

    tokens: Int32[Array, "B T"]
    log_probs: Float[Array, "B n V"]


@functools.partial(jax.jit, static_argnames=("model", "spec", "length"))
def told(
    model: DecoderModel,
    spec: CacheSpec,
    tables: Tables,
    params: Params,
    prompts: Int[Array, "B P"],
    noise: Array,
    draws: Array,
    *,
    length: int,
) -> Told:
    """Prompts, token by token through a cache that begins empty, and what it then says at temperature 1.

    Args:
        model, params: the decoder.
        spec, tables: of the cache.
        prompts: without padding.
        noise: key of a policy.
        draws: key of the tokens: the same one gives each place the same Gumbel noise, whatever the cache is.
        length: tokens of a text in all.
    """
    given = prompts.shape[1]

    def step(carry: tuple[Cache, Array], place: Array) -> tuple[tuple[Cache, Array], tuple[Array, Array]]:
        cache, drawn = carry
        token = jnp.where(place < given, prompts[:, jnp.minimum(place, given - 1)].astype(jnp.int32), drawn)
        logits, cache = decode_step(model, spec, tables, params, cache, token)
        drawn = sample(jax.random.fold_in(draws, place), logits, Sampling())
        return (cache, drawn), (token, jax.nn.log_softmax(logits))

    begin = (harness.empty_cache(model, spec, noise), jnp.zeros(prompts.shape[0], jnp.int32))
    (_, last), (fed, said) = jax.lax.scan(step, begin, jnp.arange(length - 1))
    return Told(jnp.concatenate([fed, last[None]]).T, said[given - 1 :].transpose(1, 0, 2))


@functools.lru_cache(maxsize=2)
def _generation(config: Config, cell: Cell) -> list[list[dict[str, float | int | None]]]:
    common = fixtures.setting(config.size, FIXTURE, "decode")
    model = decoder_model(common.decoder)
    layers = contender(cell.method, common, config.budget if cell.method in config.policies else None)
    spec, size = batch_spec(layers, config.prompts), harness.row_bytes(model, layers).total
    text = language.splits(language_models.RECIPES[FIXTURE].text).test
    prompts = jnp.asarray(language.sequences(text, config.prompt, config.prompts))
    fed = []
    for seed in range(config.seeds):
        tables = fixtures.tables(config.size, FIXTURE, seed, fixtures.codecs_of(layers[0]))
        key = jax.random.key(seed)
        trained = fixtures.params(config.size, FIXTURE, seed)
        fed.append((tables, trained, prompts, key, jax.random.fold_in(key, _DRAWS)))
    program = told.lower(model, spec, *fed[0], length=config.size.length).compile()
    found = []
    for (_, trained, *_), texts in zip(fed, _each(program, fed), strict=True):
        said = scored_by_exact(trained, common.decoder, texts)
        cut = {name: each.reshape(len(each), -1, config.prompt).mean(axis=(0, 2)) for name, each in said.items()}
        found.append([{name: float(each[at]) for name, each in cut.items()} | {"cache_bytes": size}
                      for at in range(len(starts(config, "generation")))])  # fmt: skip
    return found


def scored_by_exact(params: Params, decoder: DecoderConfig, texts: Told) -> dict[str, Float[np.ndarray, "B n"]]:
    """What the model with exact attention says of each drawn token: ``nll``, its loss; ``divergence``, the
    Kullback-Leibler divergence of its distribution from the one that was drawn from; ``entropy``, of its own."""
    count = texts.log_probs.shape[1]
    exact = jax.nn.log_softmax(language_models.forward(params, decoder, texts.tokens)[:, -count - 1 : -1])
    drawn = texts.tokens[:, -count:, None]
    probs = jnp.exp(texts.log_probs)
    return {
        "nll": -np.asarray(jnp.take_along_axis(exact, drawn, axis=-1)[..., 0]),
        "divergence": np.asarray((probs * (texts.log_probs - exact)).sum(axis=-1)),
        "entropy": -np.asarray((jnp.exp(exact) * exact).sum(axis=-1)),
    }
