"""ROBE against a full table and equal-budget baselines, on the Python standard library's own source.

    make demo        # or: python -m experiments run sharing.robe_text      about 3 minutes on 2 cores

Which package does a chunk of lines come from? A fastText-style classifier answers: the mean of the rows
of its n-grams, hashed to 2**20 ids of 16 floats, then one linear layer. Real input that needs no download,
and a full table of 64 MB. Beside the accuracy: the time of a lookup and of a training step.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from experiments.data import ngrams, stdlib_corpus
from experiments.lab import Claim, Measured, Trial, compare, new_figure, paired_difference
from experiments.lab.formatting import number
from experiments.sharing import training
from experiments.sharing.click_models import embedding
from hashml.accounting import stored_bytes

PAPER = "Desai, Chou, Shrivastava: Random Offset Block Embedding Array (ROBE), MLSys 2022, arXiv 2108.02191"
SYSTEM = "hashml.sharing.robe"
METHODS = {"robe": "ROBE-16", "hashing_trick": "hashing trick", "quotient_remainder": "quotient-remainder"}


@dataclass(frozen=True)
class Config:
    """The claim on a small machine; a smaller width cannot compress 16 floats a hundredfold, so it is absent."""

    vocabulary: int = 1 << 20
    """Rows of the table: n-grams are hashed to as many ids."""
    features: int = 16
    """Floats of a row."""
    compressions: tuple[int, ...] = (100, 1000)
    """Floats of the full table over floats stored."""
    learning_rates: tuple[float, ...] = (0.05, 0.2, 0.8)
    """Searched for every contender on the validation part."""
    epochs: int = 4
    batch_size: int = 128
    members: int = 512
    """N-grams kept of a chunk; longer ones are thinned evenly."""
    lines_per_chunk: int = 10
    max_chunks: int = 1000
    """Chunks of a package at most."""
    seeds: int = 3
    repetitions: int = 15
    """Of each timing."""


SCALES = {
    "tiny": Config(vocabulary=1 << 12, compressions=(10,), learning_rates=(0.2,), epochs=1, members=64,
                   max_chunks=40, seeds=2, repetitions=6),
    "default": Config(),
}  # fmt: skip


class Bags(NamedTuple):
    """Chunks as padded bags of n-gram ids."""

    ids: np.ndarray | Array
    """int32 ``[chunks, members]``."""
    weights: np.ndarray | Array
    """float32 ``[chunks, members]``: one over the chunk's n-grams, 0 in padding."""
    labels: np.ndarray | Array
    """int32 ``[chunks]``."""

    def take(self, rows: np.ndarray) -> "Bags":
        return Bags(self.ids[rows], self.weights[rows], self.labels[rows])


@functools.cache
def corpus(config: Config, seed: int) -> tuple[tuple[Bags, Bags, Bags], int]:
    """Train, validation and test bags, split by file, and the number of packages."""
    text, bags = _bags(config)
    parts = [bags.take(rows) for rows in stdlib_corpus.splits(text, seed)]
    return (parts[0], parts[1], parts[2]), len(text.label_names)


@functools.cache
def _bags(config: Config) -> tuple[stdlib_corpus.Corpus, Bags]:
    text = stdlib_corpus.load(lines_per_chunk=config.lines_per_chunk, max_chunks=config.max_chunks)
    found = ngrams.bags(text.texts, vocabulary=config.vocabulary, words=(1, 2), characters=(4, 4))
    ids, filled = found.padded(np.arange(len(found)), config.members)
    weights = filled / np.maximum(filled.sum(axis=1, keepdims=True), 1)
    return text, Bags(ids, weights.astype(np.float32), text.labels)


class Classifier(nn.Module):
    """Mean of the bag's rows, then one linear layer."""

    table: nn.Module
    classes: int

    def setup(self) -> None:
        self.output = nn.Dense(self.classes)

    def __call__(self, ids: Array, weights: Array) -> Float[Array, "B classes"]:
        return self.head(self.table(ids[..., None])[:, :, 0], weights)

    def head(self, rows: Float[Array, "B L D"], weights: Float[Array, "B L"]) -> Float[Array, "B classes"]:
        """Logits from looked-up rows."""
        return self.output(jnp.einsum("bld,bl->bd", rows, weights))


def run(config: Config) -> Iterator[Trial]:
    for seed in range(config.seeds):
        yield _quality(config, "full", 1, seed)
        for compression, method in itertools.product(config.compressions, METHODS):
            yield _quality(config, method, compression, seed)
    timings = functools.cache(lambda: time_all(config))
    for task, method in itertools.product(("lookup", "step"), ("full", "robe")):
        key = {"part": task, "method": method, "compression": _speed_compression(config, method), "seed": None}
        yield Trial(key, functools.partial(lambda task, method: timings()[task][method]._asdict(), task, method))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return config.seeds * (1 + len(config.compressions) * len(METHODS)) + 4


def _quality(config: Config, method: str, compression: int, seed: int) -> Trial:
    key = {"part": "quality", "method": method, "compression": compression, "seed": seed}
    return Trial(key, lambda: train_and_score(config, method, compression, seed))


def _module(config: Config, method: str, compression: int, seed: int) -> nn.Module:
    budget = math.ceil(config.vocabulary * config.features / compression)
    return embedding(
        method, (config.vocabulary,), features=config.features, budget=budget, block_size=config.features, seed=seed
    )


def train_and_score(config: Config, method: str, compression: int, seed: int) -> dict[str, float]:
    """Test accuracy at the rate and epoch that the validation part chose."""
    (train, validation, test), classes = corpus(config, seed)
    model = Classifier(_module(config, method, compression, seed), classes)
    start = model.init(jax.random.key(seed), jnp.asarray(train.ids[:2]), jnp.asarray(train.weights[:2]))["params"]
    device = Bags(*map(jnp.asarray, train))
    best = (-1.0, 0.0, 0, start)
    for rate in config.learning_rates:
        order = np.random.default_rng(seed)
        state = training.start(start, "table", model.table)
        for epoch in range(config.epochs):
            rows = order.permutation(len(train.labels))
            batches = rows[: len(rows) // config.batch_size * config.batch_size].reshape(-1, config.batch_size)
            state = _epoch(model, state, jnp.float32(rate), device, jnp.asarray(batches))
            params = training.parameters(state, "table")
            found = accuracy(model, params, validation)
            if found > best[0]:
                best = (found, rate, epoch + 1, jax.tree.map(jnp.copy, params))
    table = start["table"]
    return {
        "accuracy": accuracy(model, best[3], test),
        "validation_accuracy": best[0],
        "learning_rate": best[1],
        "epoch": best[2],
        "embedding_bytes": stored_bytes(table),
        "majority": float(np.bincount(test.labels).max() / len(test.labels)),
    }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _epoch(model: Classifier, state: training.RunState, rate: Array, data: Bags, batches: Array) -> training.RunState:
    def step(state: training.RunState, rows: Array) -> tuple[training.RunState, None]:
        return train_step(model, state, rate, Bags(*(leaf[rows] for leaf in data))), None

    return jax.lax.scan(step, state, batches)[0]


def train_step(model: Classifier, state: training.RunState, rate: Array | float, batch: Bags) -> training.RunState:
    """One step on a batch."""

    def loss(params: Any, rows: Array | None) -> Float[Array, ""]:
        if rows is None:
            logits = model.apply({"params": params}, batch.ids, batch.weights)
        else:
            logits = model.apply({"params": params}, rows[:, :, 0], batch.weights, method="head")
        return _loss(logits, batch)

    return training.adagrad_step(state, rate, model.table, jnp.asarray(batch.ids)[..., None], loss)


def _loss(logits: Any, batch: Bags) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


@functools.partial(jax.jit, static_argnums=0)
def _predict(model: Classifier, params: Any, ids: Array, weights: Array) -> Array:
    return jnp.argmax(jnp.asarray(model.apply({"params": params}, ids, weights)), axis=-1)


def accuracy(model: Classifier, params: Any, part: Bags, chunk: int = 512) -> float:
    """Share of chunks whose package is found."""
    total = len(part.labels)
    padded = [np.concatenate([leaf, np.zeros((-total % chunk, *leaf.shape[1:]), leaf.dtype)]) for leaf in part[:2]]
    pieces = zip(*(np.split(leaf, len(leaf) // chunk) for leaf in padded), strict=True)
    found = np.concatenate([np.asarray(_predict(model, params, ids, weights)) for ids, weights in pieces])
    return float((found[:total] == part.labels).mean())


def _speed_compression(config: Config, method: str) -> int:
    return 1 if method == "full" else config.compressions[-1]


def time_all(config: Config) -> dict[str, dict[str, Any]]:
    """Times of a lookup of a batch's rows, and of a training step, of the full table and of ROBE."""
    (train, _, _), classes = corpus(config, 0)
    batch = Bags(*(jnp.asarray(leaf[: config.batch_size]) for leaf in train))
    lookups, steps = {}, {}
    for method in ("full", "robe"):
        model = Classifier(_module(config, method, _speed_compression(config, method), 0), classes)
        params = model.init(jax.random.key(0), batch.ids[:2], batch.weights[:2])["params"]
        look = jax.jit(
            lambda params, ids, model=model: model.table.apply({"params": params["table"]}, ids[..., None])
        )
        step = jax.jit(lambda state, batch, model=model: train_step(model, state, 0.1, batch), donate_argnums=0)
        lookups[method] = functools.partial(look, params, batch.ids)
        steps[method] = _stepper(step, training.start(params, "table", model.table), batch)
    return {
        "lookup": compare(lookups, base="full", repetitions=config.repetitions),
        "step": compare(steps, base="full", repetitions=config.repetitions),
    }


def _stepper(step: Any, state: Any, batch: Bags) -> Any:
    """A function of no argument that trains on, its state donated, as a training loop would."""
    held = [state]

    def advance() -> Any:
        held[0] = step(held[0], batch)
        return held[0]

    return advance


def _quality_rows(rows: pl.DataFrame, compression: int) -> pl.DataFrame:
    return rows.filter((pl.col("part") == "quality") & pl.col("compression").is_in([1, compression]))


def _loss_against_full(rows: pl.DataFrame, compression: int) -> Measured:
    return paired_difference(_quality_rows(rows, compression), "robe", "full", "accuracy", on=["seed"])


def _gain_over(rows: pl.DataFrame, baseline: str, compression: int) -> Measured:
    chosen = rows.filter((pl.col("part") == "quality") & (pl.col("compression") == compression))
    return paired_difference(chosen, "robe", baseline, "accuracy", on=["seed"])


def _speed(rows: pl.DataFrame, task: str) -> Measured:
    found = rows.filter((pl.col("part") == task) & (pl.col("method") == "robe"))
    value, low, high = (float(found[name][0]) for name in ("ratio", "ratio_low", "ratio_high"))
    return Measured(1 / value, 1 / high, 1 / low, "full table's time over ROBE's, in one process")


CLAIMS = (
    Claim(
        "keeps-accuracy",
        "At 100x ROBE loses less than 2 points of accuracy against the full table",
        paper="no loss of AUC at 1000x on CriteoTB",
        measure=lambda rows: _loss_against_full(rows, 100),
        holds=lambda measured: measured.low > -0.02,
    ),
    Claim(
        "keeps-accuracy-1000x",
        "At 1000x ROBE loses less than 2 points of accuracy against the full table",
        paper="no loss of AUC at 1000x on CriteoTB",
        measure=lambda rows: _loss_against_full(rows, 1000),
        holds=lambda measured: measured.low > -0.02,
    ),
    Claim(
        "beats-hashing-trick",
        "At 1000x ROBE is more accurate than the hashing trick with as many bytes",
        paper="lower variance than feature hashing (theorem)",
        measure=lambda rows: _gain_over(rows, "hashing_trick", 1000),
        holds=lambda measured: measured.low > 0,
        source="section 4",
    ),
    Claim(
        "faster-lookup",
        "A lookup at 1000x takes less time than from the full table",
        paper="inference throughput 3.1x of the full model's",
        measure=lambda rows: _speed(rows, "lookup"),
        holds=lambda measured: measured.low > 1,
        unit="x",
    ),
    Claim(
        "faster-step",
        "A training step at 1000x takes less time than one that updates the full table's looked-up rows",
        paper="not faster than sparse gradients (251 ms) at 1 MB (270 ms), on a CPU",
        measure=lambda rows: _speed(rows, "step"),
        holds=lambda measured: measured.low > 1,
        source="the authors' CPU benchmark",
        unit="x",
    ),
)


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Accuracy and bytes a contender, mean over the seeds, and the times of the two that are timed."""
    quality = (
        rows.filter(pl.col("part") == "quality")
        .group_by("compression", "method", maintain_order=True)
        .agg(
            pl.col("embedding_bytes").first(),
            pl.col("accuracy").mean().alias("accuracy"),
            (pl.col("accuracy").std() / pl.len().sqrt()).alias("standard error"),
        )
        .sort("compression", maintain_order=True)
    )
    times = (
        rows.filter(pl.col("part") != "quality")
        .with_columns((1e3 * pl.col("seconds")).alias("milliseconds"))
        .pivot("part", index=["method", "compression"], values="milliseconds")
        .rename({"lookup": "lookup, ms", "step": "step, ms"})
    )
    return quality.join(times, on=["method", "compression"], how="left")


def figure(rows: pl.DataFrame) -> Figure:
    """Left: accuracy against the bytes of the embedding. Right: time of a lookup and of a step."""
    drawing, (left, right) = new_figure(columns=2)
    quality = rows.filter(pl.col("part") == "quality")
    full = quality.filter(pl.col("method") == "full")["accuracy"]
    left.axhline(full.to_numpy().mean(), color="0.4", linestyle="--", label="full table")
    for method, name in METHODS.items():
        chosen = (
            quality.filter(pl.col("method") == method)
            .group_by("compression")
            .agg(pl.col("accuracy").mean(), pl.col("accuracy").std().alias("spread"))
            .sort("compression")
        )
        left.errorbar(chosen["compression"], chosen["accuracy"], chosen["spread"], marker="o", capsize=3, label=name)
    left.axhline(quality["majority"].to_numpy().mean(), color="0.7", linestyle=":", label="largest package")
    left.set(xscale="log", xlabel="compression of the table", ylabel="accuracy on files never seen")
    left.legend()
    for place, task in enumerate(("lookup", "step")):
        for offset, (method, color) in enumerate((("full", "0.5"), ("robe", "C0"))):
            row = rows.filter((pl.col("part") == task) & (pl.col("method") == method))
            bar = right.bar(
                place + 0.4 * offset,
                1e3 * row["seconds"][0],
                width=0.38,
                color=color,
                label=None if place else {"full": "full table", "robe": "ROBE-16"}[method],
            )
            right.bar_label(bar, [f"{number(1e3 * row['seconds'][0])} ms"])
    right.set(xticks=[0.2, 1.2], ylabel="milliseconds")
    right.set_xticklabels(["lookup of a batch", "training step"])
    right.legend()
    drawing.suptitle("Which package does this chunk of lines come from?")
    return drawing
