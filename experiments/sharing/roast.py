"""An encoder trained from scratch inside one shared memory, 10 to 1000 times smaller: what does it lose?

    python -m experiments run sharing.roast      # about 10 minutes on 2 cores

Accuracy of a BERT-like encoder (two layers of width 32 and a table of 6,000 words) on two text sets, dense, in a
memory that all its modules share (global), in a memory a module (local), and against smaller encoders of equal
bytes, whose width and vocabulary are searched with the learning rate. Norms and the head are stored and counted in
all of them. The maps are those of `RoastDense` and `RoastEmbed`; for speed their slots are computed once a run
here, which changes nothing of the function (a test says so) and all of its memory.
"""

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array
from matplotlib.figure import Figure

from experiments.data import text_classification
from experiments.data.text_classification import Texts
from experiments.lab import Claim, Measured, NotEnoughRows, Trial, mean_interval, new_figure
from experiments.sharing.image_models import train_and_score
from hashml.accounting import stored_bytes
from hashml.models.text_encoder import TextEncoder
from hashml.sharing import SharingMap
from hashml.sharing.roast import RoastDense, RoastEmbed

PAPER = "Desai, Zhou, Shrivastava: Hardware-Aware Compression with ROAST Hashing, ICML 2023, arXiv 2207.10702"
SYSTEM = "hashml.sharing.roast"
TITLES = {"sst2": "SST-2", "ag_news": "AG News"}
Path = tuple[str, ...]


@dataclass(frozen=True)
class Config:
    """A BERT of 1/500 the size on a fifth of its words."""

    data: tuple[str, ...] = ("sst2", "ag_news")
    compressions: tuple[int, ...] = (10, 100, 1000)
    """Weights of the layers and tables over weights of the memory."""
    vocabulary: int = 6000
    features: int = 32
    layers: int = 2
    heads: int = 4
    length: int = 24
    rows: int | None = 2400
    """Training rows used at most, a sixth of them for validation; all of them with None."""
    epochs: int = 3
    batch_size: int = 32
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    """Of Adam; searched for every contender and compression on the validation part."""
    widths: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Of the small encoders; those are tried that leave room for 64 words at least."""
    seeds: int = 3


SCALES = {
    "tiny": Config(data=("sst2",), compressions=(10,), vocabulary=200, features=16, layers=1, heads=2, length=8,
                   rows=240, epochs=1, learning_rates=(0.003,), widths=(4,), seeds=2),
    "default": Config(),
}  # fmt: skip

TILE = {10: (16, 16), 100: (8, 8)}
"""Tiles shrink with the memories of single modules; ``(4, 4)`` beyond."""
BLOCK = 8
"""Coordinates of a word's vector that lie side by side."""
LEAST_WORDS = 64


def run(config: Config) -> Iterator[Trial]:
    for data in config.data:
        yield from _trials(config, data, "dense", 1)
        for compression in config.compressions:
            yield from _trials(config, data, "global", compression)
            yield from _trials(config, data, "local", compression)
            if compression <= 100:
                yield from _trials(config, data, "elements", compression)
            yield from _trials(config, data, "small", compression)


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    each = 1 + 3 * len(config.compressions) + sum(compression <= 100 for compression in config.compressions)
    return len(config.data) * each * config.seeds


def _trials(config: Config, data: str, method: str, compression: int) -> Iterator[Trial]:
    """A trial a seed; all seeds are trained in one program."""
    for seed in range(config.seeds):
        key = {"data": data, "method": method, "compression": compression, "seed": seed}
        yield Trial(key, functools.partial(_measure, config, data, method, compression, seed))


def _measure(config: Config, data: str, method: str, compression: int, seed: int) -> dict[str, Any]:
    return outcomes(config, data, method, compression)[seed]


@functools.lru_cache(maxsize=1)
def outcomes(config: Config, data: str, method: str, compression: int) -> list[dict[str, Any]]:
    """The rows of all seeds of one contender."""
    if method == "small":
        return _best_small(config, data, compression)
    model = encoder(config, data)
    if method == "dense":
        params, constants, apply = *_stacked_init(model, config), None, _dense_apply(model)
        return _scored(config, data, model, params, constants, apply)
    contender = shared(config, data, method, compression)
    return _scored(config, data, model, contender.params, contender.constants, contender.apply)


# --- the contenders -----------------------------------------------------------------------------------


def encoder(config: Config, data: str, vocabulary: int | None = None, features: int | None = None) -> TextEncoder:
    """The dense encoder of the experiment, or one of another width and vocabulary."""
    width = features or config.features
    return TextEncoder(
        vocabulary or config.vocabulary,
        text_classification.SETS[data].classes,
        features=width,
        layers=config.layers,
        heads=min(config.heads, max(1, width // 4)),
        length=config.length,
    )


def _stacked_init(model: TextEncoder, config: Config) -> tuple[Any]:
    keys = jnp.stack([jax.random.key(seed) for seed in range(config.seeds)])
    tokens = jnp.zeros((1, config.length), jnp.int32)
    return (jax.jit(jax.vmap(lambda key: model.init(key, tokens)["params"]))(keys),)


def _dense_apply(model: TextEncoder) -> Any:
    return lambda params, _, x: model.apply({"params": params}, x)


def leaf_map(path: Path, shape: tuple[int, int], budget: int, tile: tuple[int, int], seed: int) -> SharingMap:
    """The map that `RoastDense` or `RoastEmbed` has at ``path`` of a model with a shared memory."""
    offset = zlib.crc32("/".join(path[:-1]).encode()) << 31
    if path[-1] == "embedding":
        block = (1, 1) if tile == (1, 1) else (1, BLOCK)
        return RoastEmbed(*shape, budget=budget, tile=block, seed=seed, offset=offset, parent=None).sharing_map()
    return RoastDense(shape[1], budget=budget, tile=tile, seed=seed, offset=offset, parent=None).sharing_map(shape[0])


class Shared(NamedTuple):
    """An encoder in memories: what is trained, the slots and signs of every leaf, and the function."""

    params: Any
    constants: Any
    apply: Any


def shared(config: Config, data: str, method: str, compression: int) -> Shared:
    """The encoder in one memory (``global``, ``elements``: tiles of one weight) or in one a leaf (``local``)."""
    model = encoder(config, data)
    (dense,) = _stacked_init(model, config)
    leaves: dict[Path, Any] = dict(flatten_dict(dense))  # pyright: ignore[reportArgumentType] paths of strings
    inside = {path: leaf.shape[1:] for path, leaf in leaves.items() if path[0] != "head" and leaf.ndim == 3}
    sizes = {path: int(np.prod(shape)) for path, shape in inside.items()}
    # A memory of one leaf holds one tile at least; the memory of all holds as much as those together.
    tile = TILE.get(compression, (4, 4))
    budgets = {path: max(size // compression, tile[0] * tile[1], BLOCK) for path, size in sizes.items()}
    whole = sum(budgets.values())
    tile = (1, 1) if method == "elements" else tile
    memory_std = config.features**-0.5

    memories, constants, scales = {}, {}, {}
    for path, shape in inside.items():
        std = (shape[1] if path[-1] == "embedding" else shape[0]) ** -0.5  # as RoastEmbed and RoastDense have it
        name = "/".join(path) if method == "local" else "memory"
        budget = budgets[path] if method == "local" else whole
        scales[path] = (name, 1.0 if method == "local" else std / memory_std)
        if name not in memories:
            keys = [
                jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())) for seed in range(config.seeds)
            ]
            start = jnp.stack([jax.random.normal(key, (budget,)) for key in keys])
            memories[name] = start * (std if method == "local" else memory_std)
        maps = [leaf_map(path, shape, budget, tile, seed) for seed in range(config.seeds)]
        rows = np.arange(shape[0])
        constants[path] = (
            np.stack([np.asarray(m.slots(rows)).astype(np.int32) for m in maps]),
            np.stack([np.asarray(m.signs(rows)).astype(np.int8) for m in maps]),
        )
    rest = {path: leaf for path, leaf in leaves.items() if path not in inside}

    def apply(params: Any, constants: Any, x: Array) -> Array:
        weights = dict(params["dense"])
        for path, (slots, signs) in constants.items():
            name, scale = scales[path]
            weights[path] = scale * signs * params["memory"][name][slots]
        return jnp.asarray(model.apply({"params": unflatten_dict(weights)}, x))

    return Shared({"memory": memories, "dense": rest}, constants, apply)


def _normal(seed: int, name: str, size: int) -> Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), (size,))


def small_encoders(config: Config, data: str, floats: int) -> list[TextEncoder]:
    """Encoders of at most ``floats`` weights, a width each, with as many words as then fit."""
    found = []
    for width in config.widths:
        least = encoder(config, data, LEAST_WORDS, width)
        tokens = jnp.zeros((1, config.length), jnp.int32)
        used = stored_bytes(jax.eval_shape(least.init, jax.random.key(0), tokens)) // 4
        words = LEAST_WORDS + (floats - used) // width
        if words >= LEAST_WORDS:
            found.append(encoder(config, data, min(words, config.vocabulary), width))
    return found


def _best_small(config: Config, data: str, compression: int) -> list[dict[str, Any]]:
    contender = shared(config, data, "global", compression)
    floats = stored_bytes(contender.params) // (4 * config.seeds)
    rows = []
    for model in small_encoders(config, data, floats):
        (params,) = _stacked_init(model, config)
        rows.append(_scored(config, data, model, params, None, _dense_apply(model)))
    if not rows:
        raise NotEnoughRows(f"no encoder of {floats} weights has {LEAST_WORDS} words; give smaller widths")
    return max(rows, key=lambda runs: np.mean([row["validation_accuracy"] for row in runs]))


# --- training -----------------------------------------------------------------------------------------


def adam(schedule: optax.Schedule, constants: Any = None) -> optax.GradientTransformation:
    """Adam with clipped gradients, for every contender alike."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@functools.cache
def parts(config: Config, data: str, vocabulary: int) -> tuple[Texts, Texts, Texts]:
    """Train, validation and test parts."""
    train, validation, test = text_classification.splits(
        data, size=vocabulary, length=config.length, rows=config.rows
    )
    return train, validation, test


def _scored(
    config: Config, data: str, model: TextEncoder, params: Any, constants: Any, apply: Any
) -> list[dict[str, Any]]:
    texts = parts(config, data, model.vocabulary)
    outcome = train_and_score(
        apply,
        params,
        texts,
        learning_rates=config.learning_rates,
        steps=len(texts[0]) // config.batch_size * config.epochs,
        batch_size=config.batch_size,
        seeds=range(config.seeds),
        constants=constants,
        optimizer=adam,
    )
    rate = outcome.chosen()
    return [
        {
            "accuracy": float(outcome.test[seed, rate]),
            "validation_accuracy": float(outcome.validation[seed, rate]),
            "learning_rate": outcome.learning_rates[rate],
            "bytes": stored_bytes(params) // config.seeds,
            "width": model.features,
            "words": model.vocabulary,
        }
        for seed in range(config.seeds)
    ]


# --- claims -------------------------------------------------------------------------------------------


def _gain(rows: pl.DataFrame, method: str, peer: str, compression: int) -> Measured:
    """Points of accuracy of ``method`` over ``peer``, paired over data sets and seeds."""
    ours = rows.filter((pl.col("method") == method) & (pl.col("compression") == compression))
    at = 1 if peer == "dense" else compression
    theirs = rows.filter((pl.col("method") == peer) & (pl.col("compression") == at))
    pairs = ours.join(theirs, on=["data", "seed"], how="inner").sort("data", "seed")
    if pairs.is_empty():
        raise NotEnoughRows(f"no pairs of {method} and {peer} at {compression}x")
    return mean_interval(100 * (pairs["accuracy"] - pairs["accuracy_right"]).to_numpy(), "pairs")


CLAIMS = (
    *(
        Claim(
            f"no-loss-{compression}x",
            f"At {compression}x the encoder loses at most 1 point of accuracy",
            paper="BERT 100x to 1000x smaller without loss of quality",
            measure=functools.partial(_gain, method="global", peer="dense", compression=compression),
            holds=lambda measured: measured.low >= -1,
            unit="points",
        )
        for compression in (10, 100, 1000)
    ),
    *(
        Claim(
            f"global-{compression}x",
            f"At {compression}x one memory for all modules is better than one each",
            paper="global sharing is better than local, in theory and in practice",
            measure=functools.partial(_gain, method="global", peer="local", compression=compression),
            holds=lambda measured: measured.low > 0,
            unit="points",
        )
        for compression in (10, 100, 1000)
    ),
    *(
        Claim(
            f"small-{compression}x",
            f"At {compression}x it is better than a smaller encoder of equal bytes",
            paper="not stated for equal bytes",
            measure=functools.partial(_gain, method="global", peer="small", compression=compression),
            holds=lambda measured: measured.low > 0,
            unit="points",
        )
        for compression in (10, 100, 1000)
    ),
    *(
        Claim(
            f"tiles-{compression}x",
            f"At {compression}x tiles cost at most 1 point against single elements (HashedNet over the whole model)",
            paper="tiles at no cost in quality",
            measure=functools.partial(_gain, method="global", peer="elements", compression=compression),
            holds=lambda measured: measured.low >= -1,
            unit="points",
        )
        for compression in (10, 100)
    ),
)


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Accuracy in percent and stored bytes, a line a data set, contender and compression."""
    dense = rows.filter(pl.col("method") == "dense")["bytes"].max()
    return (
        rows.group_by("data", "method", "compression", maintain_order=True)
        .agg(
            (100 * pl.col("accuracy").mean()).alias("accuracy, %"),
            (100 * pl.col("accuracy").std() / pl.len().sqrt()).alias("standard error"),
            pl.col("bytes").first(),
            (dense / pl.col("bytes").first()).alias("measured compression"),
            pl.col("learning_rate").first(),
            pl.col("width").first(),
            pl.col("words").first(),
        )
        .sort("data", "compression", maintain_order=True)
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Accuracy against the compression of the layers, a panel a data set."""
    names = rows["data"].unique(maintain_order=True).to_list()
    drawing, axes = new_figure(columns=len(names))
    labels = {"global": "ROAST, one memory", "local": "ROAST, a memory a module", "elements": "single elements",
              "small": "smaller encoder"}  # fmt: skip
    for ax, name in zip(axes, names, strict=True):
        part = rows.filter(pl.col("data") == name)
        ax.axhline(100 * part.filter(pl.col("method") == "dense")["accuracy"].to_numpy().mean(), color="0.4",
                   linestyle="--", label="dense")  # fmt: skip
        for method, label in labels.items():
            line = (
                part.filter(pl.col("method") == method)
                .group_by("compression")
                .agg(
                    (100 * pl.col("accuracy").mean()).alias("accuracy"),
                    (100 * pl.col("accuracy").std() / pl.len().sqrt()).alias("error"),
                )
                .sort("compression")
            )
            ax.errorbar(line["compression"], line["accuracy"], line["error"], marker="o", capsize=3, label=label)
        ax.set(xscale="log", xlabel="compression of layers and tables", ylabel="test accuracy, %", title=TITLES[name])
        ax.legend(frameon=True, framealpha=0.9, edgecolor="none")
    return drawing
