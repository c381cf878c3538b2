"""The cells of `experiments.sparse.deja_vu`: who chooses heads and neurons, how many, and what is lost."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.data import language
from experiments.data.counter import stream
from experiments.kvcache import fixtures, language_models
from experiments.kvcache.fixtures import Size
from experiments.lab import interleave
from hashml.models.decoder import DecoderConfig, Params
from hashml.sparse.lists import top_list
from hashml.sparse.predictors import Predictor, init_predictor, predict, train_predictors
from hashml.sparse.residuals import (
    LOOKAHEADS,
    Choice,
    Residuals,
    Scores,
    fixed_scores,
    head_query,
    masked_forward,
    neuron_query,
    oracle_heads,
    oracle_neurons,
    random_scores,
    ranked,
)
from hashml.sparse.weight_reads import neurons_for, weight_reads
from hashml_kernels.gathered_mlp import gathered_mlp

FIXTURE = "f1_relu_gqa"
Part = Literal["neurons", "heads"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and shares; the defaults are those of the claims."""

    seeds: int = 3
    """Of predictors: calibration text, first maps, batches, random draws, and the test sequences."""
    model: int = 0
    """Seed of the language model, which all share."""
    kept: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1)
    """Share of the neurons of every layer."""
    heads_kept: tuple[float, ...] = (0.75, 0.5, 0.25)
    """Share of the query heads of every layer."""
    lookaheads: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Blocks between what predicts and what is predicted."""
    rank: int = 32
    calibration_sequences: int = 100
    """Sequences of training text that predictors, frequencies and norms come from."""
    test_sequences: int = 16
    """Of a seed."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """The best by recall on held-out positions of the first seed is that of all seeds, for each kind of predictor."""
    batch: int = 1024
    epochs: int = 12
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Rows whose neurons are joined."""
    speed_features: int = 2048
    speed_hidden: int = 8192
    speed_kept: tuple[float, ...] = (0.5, 0.3, 0.1)
    speed_rank: int = 160
    """The paper's 1000 of 12288, at this width."""
    repetitions: int = 21
    size: Size = fixtures.DEFAULT


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a row is about; what does not apply is ``None``."""

    part: str
    method: str
    lookahead: float | int | None = None
    kept: float | None = None
    """Of neurons."""
    heads_kept: float | None = None
    place: int | None = None
    """Layer, rows of a batch, or repetition."""
    seed: int | None = None


NEURONS, HEADS, TOGETHER = 0.3, 0.5, 0.5
"""Shares at which predictors choose their best epoch and both are put together; the look-ahead of neurons there."""
FIXED = ("static", "magnitude", "static_bytes")
"""One order for all tokens: the most frequent, the largest weights, the most frequent in the predictor's bytes."""


def cells(config: Config) -> list[Cell]:
    """All rows."""
    found = []
    layers = fixtures.text_recipe(config.size, FIXTURE).decoder.layers
    for seed in range(config.seeds):
        found += [Cell("activity", "dense", place=layer, seed=seed) for layer in range(layers)]
        found.append(Cell("neurons", "dense", seed=seed))
        for kept in config.kept:
            found += [Cell("neurons", name, kept=kept, seed=seed) for name in ("oracle", *FIXED, "random")]
            found += [Cell("neurons", "predictor", ahead, kept=kept, seed=seed) for ahead in config.lookaheads]
        for kept in config.heads_kept:
            found += [Cell("heads", name, heads_kept=kept, seed=seed) for name in ("oracle", "static", "random")]
            found += [Cell("heads", "predictor", ahead, heads_kept=kept, seed=seed) for ahead in config.lookaheads]
        found += [Cell("both", name, TOGETHER if name == "predictor" else None, NEURONS, HEADS, seed=seed)
                  for name in ("oracle", "predictor", "static", "random")]  # fmt: skip
        found += [Cell("union", "predictor", TOGETHER, NEURONS, place=batch, seed=seed) for batch in config.batches]
    for name, kept in timed(config):
        found += [Cell("speed", name, kept=kept, place=place) for place in range(config.repetitions)]
    return found


def measure(config: Config, cell: Cell) -> dict[str, float | int | None]:
    """The measured part of a row."""
    seed, place = cell.seed or 0, cell.place or 0
    match cell.part:
        case "activity":
            return activity(config, place, seed)
        case "union":
            return {"union_share": union_share(config, place, seed)}
        case "speed":
            return {"seconds": float(times(config)[cell.method, cell.kept][place])}
        case _:
            return quality(config, cell)


# --- a model from inside ------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Calibration text in a dense model, positions of all sequences in one line, layers first."""

    residuals: Residuals
    active: Bool[np.ndarray, "L n ff"]
    head_norms: Float[np.ndarray, "L n Hq"]


@functools.partial(jax.jit, static_argnames="decoder")
def _inside(params: Params, decoder: DecoderConfig, tokens: Int[Array, "B T"]) -> Any:
    trace = masked_forward(params, decoder, tokens)
    return trace.residuals.x, trace.residuals.y, trace.activations > 0, trace.head_norms


@functools.lru_cache(maxsize=2)
def seen(config: Config, seed: int) -> Seen:
    """Of the calibration text of a seed."""
    decoder, params = model(config)
    text = language.splits(language_models.RECIPES[FIXTURE].text).train
    key = stream(seed, "deja vu", "calibration")
    tokens = language.crops(text, decoder.context, config.calibration_sequences, key=key, step=0)
    parts = []
    for start in range(0, len(tokens), config.test_sequences):
        # The last piece is filled up: one program for all.
        piece = np.resize(tokens[start : start + config.test_sequences], (config.test_sequences, tokens.shape[1]))
        count = min(config.test_sequences, len(tokens) - start)
        parts.append([np.asarray(leaf)[:, :count] for leaf in _inside(params, decoder, jnp.asarray(piece))])
    x, y, active, norms = (
        np.concatenate(leaves, axis=1).reshape(decoder.layers, -1, leaves[0].shape[-1])
        for leaves in zip(*parts, strict=True)
    )
    x_before, y_before = (np.concatenate([x[:1], leaf[:-1]]) for leaf in (x, y))
    return Seen(Residuals(*map(jnp.asarray, (x, y, x_before, y_before))), active, norms)


@functools.lru_cache(maxsize=2)
def model(config: Config) -> tuple[DecoderConfig, Params]:
    """The language model with ReLU that all cells share."""
    return (
        fixtures.text_recipe(config.size, FIXTURE).decoder,
        fixtures.params(config.size, FIXTURE, config.model),
    )


def activity(config: Config, layer: int, seed: int) -> dict[str, float | int | None]:
    """How sparse a layer is by itself, and how far the residual stream moves: means over calibration text."""
    found = seen(config, seed)
    active = found.active[layer]
    x, y, before, _ = (np.asarray(leaf)[layer] for leaf in found.residuals)
    return {
        "zeros": 1 - float(active.mean()),
        "never": float((~active.any(axis=0)).mean()),
        "cosine_before": _cosine(x, before) if layer else None,
        "cosine_attention": _cosine(y, x),
    }


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / lengths).mean())


# --- predictors ---------------------------------------------------------------------------------------


def head_targets(norms: Float[np.ndarray, "L n Hq"]) -> Bool[np.ndarray, "L n Hq"]:
    """True for the share `HEADS` of heads with the largest outputs."""
    top = kept_of(HEADS, norms.shape[-1])
    order = np.argsort(np.argsort(-norms, axis=-1, kind="stable"), axis=-1, kind="stable")
    return order < top


def kept_of(share: float, total: int) -> int:
    """Heads or neurons of a layer, at least one."""
    return max(1, round(share * total))


@functools.lru_cache(maxsize=64)
def _train(config: Config, part: Part, lookahead: float | int, seed: int, rate: float) -> tuple[Predictor, float]:
    found = seen(config, seed)
    neurons = part == "neurons"
    query = neuron_query if neurons else head_query
    targets = found.active if neurons else head_targets(found.head_norms)
    top = kept_of(NEURONS if neurons else HEADS, targets.shape[-1])
    key = jax.random.fold_in(jax.random.key(seed), int(neurons))
    trained = train_predictors(key, query(found.residuals, lookahead), targets, rank=config.rank, top=top,
                               learning_rate=rate, batch=config.batch, epochs=config.epochs,
                               extra=0.005 if neurons else 0.0)  # fmt: skip
    return trained.predictor, float(trained.recall.mean())


@functools.lru_cache(maxsize=16)
def learning_rate(config: Config, part: Part, lookahead: float | int) -> float:
    """The best for this kind of predictor on the first seed, by recall at positions that it was not trained on."""
    if len(config.learning_rates) == 1:
        return config.learning_rates[0]
    return max(config.learning_rates, key=lambda rate: _train(config, part, lookahead, 0, rate)[1])


def predictor(config: Config, part: Part, lookahead: float | int, seed: int) -> Predictor:
    """Of all layers."""
    return _train(config, part, lookahead, seed, learning_rate(config, part, lookahead))[0]


# --- who chooses --------------------------------------------------------------------------------------

KINDS: tuple[str | float | int, ...] = ("oracle", "random", "fixed", *LOOKAHEADS)
"""Branches of `chooser`; a number is a predictor with this look-ahead."""


@functools.cache
def chooser(part: Part) -> Scores:
    """Scores by any method: one program serves all, and what a layer's own data says is branched on."""
    query, oracle = (neuron_query, oracle_neurons) if part == "neurons" else (head_query, oracle_heads)

    def scores(data: Any, residuals: Residuals, found: Array) -> Array:
        own = data[part]
        branches = [functools.partial(base, own, residuals, found) for base in (oracle, random_scores, fixed_scores)]
        branches += [lambda ahead=ahead: predict(own["maps"], query(residuals, ahead)) for ahead in LOOKAHEADS]
        return jax.lax.switch(own["kind"], branches)

    return scores


def data_of(config: Config, part: Part, method: str, lookahead: float | int | None, seed: int) -> dict[str, Any]:
    """What `chooser` reads, layers first; what the method has no use for is zero."""
    decoder, params = model(config)
    layers, count = params["layers"], decoder.layers
    outputs = decoder.hidden if part == "neurons" else decoder.heads
    maps = Predictor(jnp.zeros((count, decoder.features, config.rank)), jnp.zeros((count, config.rank, outputs)))
    if method == "predictor":
        assert lookahead is not None
        maps = predictor(config, part, lookahead, seed)
    kind = KINDS.index(lookahead if lookahead is not None else method if method in KINDS else "fixed")
    down = np.linalg.norm(np.asarray(layers["down"]), axis=-1)
    worth = np.zeros((count, outputs))
    if method == "magnitude":
        worth = down * np.linalg.norm(np.asarray(layers["up"]), axis=1)
    elif method in FIXED:
        found = seen(config, seed)
        worth = (found.active if part == "neurons" else head_targets(found.head_norms)).mean(axis=1)
    draws = stream(seed, "deja vu", part) % 2**30 + np.arange(count)
    return {
        "kind": jnp.full((count,), kind, jnp.int32),
        "maps": maps,
        "order": ranked(worth),
        "draw": jnp.asarray(draws, jnp.int32),
        "down_norms": jnp.asarray(down),
    }


# --- what is lost -------------------------------------------------------------------------------------


def test_tokens(config: Config, seed: int) -> Int[np.ndarray, "B T"]:
    """The test sequences of a seed; no two seeds share one."""
    decoder, _ = model(config)
    text = language.splits(language_models.RECIPES[FIXTURE].text).test
    return language.sequences(text, decoder.context, config.test_sequences * config.seeds)[seed :: config.seeds]


@functools.partial(jax.jit, static_argnames="decoder")
def _scored(params: Params, decoder: DecoderConfig, tokens: Array, kept: dict[Part, Array], data: Any) -> Any:
    """Loss, recall of active neurons and of the heads with the largest outputs, and all lists of neurons."""
    choices: dict[str, Any] = {
        part: Choice(chooser(part), jnp.broadcast_to(count, (decoder.layers,))) for part, count in kept.items()
    }
    trace = masked_forward(params, decoder, tokens, data=data, **choices)
    said = jax.nn.log_softmax(trace.logits[:, :-1])
    nll = -jnp.take_along_axis(said, tokens[:, 1:, None], axis=-1).mean()
    active = trace.activations > 0
    recall = (trace.neurons & active).sum() / active.sum()
    large = trace.head_norms >= jnp.sort(trace.head_norms, axis=-1)[..., -kept_of(HEADS, decoder.heads), None]
    return nll, recall, (trace.heads & large).sum() / large.sum(), trace.neurons


class Choosing(NamedTuple):
    """How many of a part are kept, and what `chooser` reads."""

    kept: int
    data: dict[str, Any]
    rank: int
    """Of the predictor that is asked; 0 for none."""


def choosing(config: Config, cell: Cell, part: Part) -> Choosing:
    """What a cell says of a part: all are kept where it says nothing."""
    decoder, _ = model(config)
    share, total = (cell.kept, decoder.hidden) if part == "neurons" else (cell.heads_kept, decoder.heads)
    seed = cell.seed or 0
    if share is None:
        return Choosing(total, data_of(config, part, "none", None, seed), 0)
    # Together heads are predicted from the input of the block before, as in the paper.
    ahead = 1 if cell.part == "both" and part == "heads" and cell.lookahead is not None else cell.lookahead
    data, count = data_of(config, part, cell.method, ahead, seed), kept_of(share, total)
    if cell.method == "static_bytes":
        return Choosing(neurons_for(decoder, count, config.rank), data, 0)
    return Choosing(count, data, config.rank if cell.method == "predictor" and count < total else 0)


def scored(config: Config, cell: Cell) -> tuple[Any, dict[Part, Choosing]]:
    """`_scored` of a cell, in which every token, from the first, is run with its own choice."""
    decoder, params = model(config)
    parts: dict[Part, Choosing] = {
        "neurons": choosing(config, cell, "neurons"),
        "heads": choosing(config, cell, "heads"),
    }
    kept: dict[Part, Array] = {part: jnp.int32(each.kept) for part, each in parts.items()}
    data = {part: each.data for part, each in parts.items()}
    return _scored(params, decoder, jnp.asarray(test_tokens(config, cell.seed or 0)), kept, data), parts


def quality(config: Config, cell: Cell) -> dict[str, float | int | None]:
    """Loss on test text, recall, and what a step of one row reads."""
    decoder, params = model(config)
    (nll, recall, head_recall, _), parts = scored(config, cell)
    neurons, heads = parts["neurons"], parts["heads"]
    reads = weight_reads(decoder, neurons=neurons.kept, heads=heads.kept, key_heads=decoder.kv_heads,
                         neuron_rank=neurons.rank, head_rank=heads.rank)  # fmt: skip
    own = weight_reads(decoder, neurons=neurons.kept, heads=0, key_heads=0, neuron_rank=neurons.rank)
    one = np.asarray(params["embedding"]).itemsize
    return {
        "nll": float(nll),
        "recall": None if cell.kept is None else float(recall),
        "head_recall": None if cell.heads_kept is None else float(head_recall),
        "neurons": neurons.kept,
        "heads": heads.kept,
        "bytes_per_token": one * reads.total,
        "perceptron_bytes": one * (own.neurons + own.predictors),
    }


@functools.lru_cache(maxsize=1)
def _masks(config: Config, seed: int) -> Bool[np.ndarray, "L B T ff"]:
    """What predictors with look-ahead `TOGETHER` choose at `NEURONS`."""
    found, _ = scored(config, Cell("union", "predictor", TOGETHER, NEURONS, seed=seed))
    return np.asarray(found[3])


def union_share(config: Config, batch: int, seed: int) -> float:
    """Share of the neurons that any of so many rows chooses at the same step: mean over layers, steps and batches."""
    masks = _masks(config, seed)
    layers, rows, steps, neurons = masks.shape
    batches = masks[:, : rows // batch * batch].reshape(layers, -1, batch, steps, neurons)
    return float(batches.any(axis=2).mean())


# --- how fast -----------------------------------------------------------------------------------------


def timed(config: Config) -> list[tuple[str, float | None]]:
    """What is timed: the dense perceptron, a contiguous one of fewer neurons, gathered ones whose list is given, and
    gathered ones with their predictor."""
    return [("dense", None), *itertools.product(("fewer", "gathered", "predicted"), config.speed_kept)]


@functools.lru_cache(maxsize=1)
def times(config: Config) -> dict[tuple[str, float | None], np.ndarray]:
    """Seconds of every repetition for one row of a batch, in one process, by turns."""
    d, hidden = config.speed_features, config.speed_hidden
    keys = jax.random.split(jax.random.key(0), 4)
    w_in, w_out = (jax.random.normal(key, (hidden, d)) / d**0.5 for key in keys[:2])
    x = jax.random.normal(keys[2], (1, d))
    maps = init_predictor(keys[3], d, config.speed_rank, hidden)
    rng = np.random.default_rng(0)

    @jax.jit
    def dense(x: Array, w_in: Array, w_out: Array) -> Array:
        return jax.nn.relu(x @ w_in.T) @ w_out

    gathered = jax.jit(lambda x, w_in, w_out, idx: gathered_mlp(x, w_in, w_out, idx))

    @functools.partial(jax.jit, static_argnames="count")
    def predicted(x: Array, w_in: Array, w_out: Array, maps: Predictor, count: int) -> Array:
        return gathered_mlp(x, w_in, w_out, top_list(predict(maps, x), count)[0])

    functions: dict[str, Callable[[], Any]] = {}
    names = {}
    for name, kept in timed(config):
        names[f"{name} {kept}"] = (name, kept)
        if kept is None:
            functions[f"{name} {kept}"] = functools.partial(dense, x, w_in, w_out)
            continue
        count = kept_of(kept, hidden)
        if name == "fewer":
            call = functools.partial(dense, x, jnp.copy(w_in[:count]), jnp.copy(w_out[:count]))
        elif name == "gathered":
            idx = np.sort(rng.permutation(hidden)[:count]).astype(np.int32)
            call = functools.partial(gathered, x, w_in, w_out, jnp.asarray(idx))
        else:
            call = functools.partial(predicted, x, w_in, w_out, maps, count)
        functions[f"{name} {kept}"] = call
    found = interleave(functions, repetitions=config.repetitions)
    return {names[name]: seconds for name, seconds in found.items()}
