"""RACE in softmax's place: the law of its error, the loss of a language model, and what it recalls.

    python -m experiments run attention.race

*Kernel*: RACE's output against exact angular attention on random tokens, by the number of tables, and the bias of
its kernel, averaged over thousands of tables, by temperature. *Language*: causal models of bytes that differ in
attention alone, each with a learning rate of its own. *Recall*: keys that come with values and are asked for again,
which is what a state of fixed size must lose first. Softmax is the yardstick and the mean of all earlier values the
control: where softmax is not better than the control, or does not recall, nothing is said. The models of the default
scale are some hundred steps old, when attention has begun to help; the scale ``paper`` trains them longer. Images,
without order, are `attention.race_images`; times are `attention.race_scaling`.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Array
from matplotlib.figure import Figure

from experiments.attention.race_models import Sizes
from experiments.attention.race_training import Part, Plan, outcomes
from experiments.data import language
from experiments.data.clicks import Splits
from experiments.data.counter import stream, uniform
from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    Trial,
    lowest,
    mean_interval,
    new_figure,
    paired_difference,
    standard_error,
)
from hashml.attention.race import angular_attention, race_attention, race_features
from hashml.hashing.simhash import srp_planes

PAPER = (
    "Joshi, Chowdhury, Kanakamedala, Singh, Tu, Shrivastava: RACE Attention: A Strictly Linear-Time Attention for "
    "Long-Sequence Training, ICLR 2026, arXiv 2510.04008"
)
SYSTEM = "hashml.attention.race"


@dataclass(frozen=True)
class Config:
    """Two layers of width 64 with 4 heads, on tiny Shakespeare and on 4 pairs of 32 keys and 16 values."""

    tables: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Of the kernel's error, at beta = 2."""
    betas: tuple[float, ...] = (1.0, 4.0, 16.0)
    """Of the kernel's bias."""
    averaged: int = 4000
    """Tables that the bias is averaged over."""
    tokens: int = 512
    kernel_seeds: int = 5
    language: tuple[str, ...] = ("softmax", "race-2x2", "race-4x4", "race-2x2-bucket", "race-4x4-bucket", "linear",
                                 "performer-256", "angular-8", "reformer-16", "mean")  # fmt: skip
    context: int = 128
    steps: int = 450
    batch_size: int = 8
    learning_rates: tuple[float, ...] = (0.0025, 0.005, 0.01, 0.02)
    held_out: int = 192
    """Sequences of the validation and of the test part."""
    recall: tuple[str, ...] = ("softmax", "race-3x3", "race-4x4", "linear")
    recall_steps: int = 600
    recall_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    features: int = 64
    layers: int = 2
    seeds: int = 3


SCALES = {
    "tiny": Config(tables=(1, 4), betas=(1.0, 16.0), averaged=50, tokens=64, kernel_seeds=2, language=("mean",),
                   context=32, steps=2, learning_rates=(0.005,), held_out=16, recall=("softmax",), recall_steps=2,
                   recall_rates=(0.003,), features=16, layers=1, seeds=2),
    "default": Config(),
    "paper": Config(context=256, steps=4000, batch_size=32, recall_steps=4000),
}  # fmt: skip

BITS, WIDTH, BETA = 3, 32, 2.0
"""P and head width of the kernel's laws, and the temperature of its error."""
PAIRS, QUESTIONS, KEYS, VALUES = 4, 8, 32, 16


def run(config: Config) -> Iterator[Trial]:
    for tables in config.tables:
        for seed in range(config.kernel_seeds):
            yield _trial("error", "race", seed, functools.partial(_error, config, tables, seed), tables=tables)
    for beta in config.betas:
        for seed in range(config.kernel_seeds):
            yield _trial("bias", "race", seed, functools.partial(_bias, config, beta, seed), beta=beta)
    for task, methods in (("language", config.language), ("recall", config.recall)):
        for method in methods:
            for seed in range(config.seeds):
                yield _trial(task, method, seed, functools.partial(_measure, config, task, method, seed))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    kernel = config.kernel_seeds * (len(config.tables) + len(config.betas))
    return kernel + config.seeds * (len(config.language) + len(config.recall))


def _trial(
    task: str, method: str, seed: int, measure: Any, *, tables: int | None = None, beta: float | None = None
) -> Trial:
    key = {"task": task, "method": method, "tables": tables, "beta": beta, "seed": seed}
    return Trial(key, measure)


# --- the kernel ---------------------------------------------------------------------------------------


def _error(config: Config, tables: int, seed: int) -> dict[str, float]:
    """Root mean square of RACE's output less that of angular attention, over that of the latter."""
    key, drawn = jax.random.split(jax.random.key(seed))
    q, k, v = jax.random.normal(key, (3, 1, 1, config.tokens, WIDTH))
    planes = srp_planes(drawn, tables, BITS, WIDTH)
    exact, found = (np.asarray(x, np.float64) for x in _outputs(q, k, v, planes))
    return {"value": float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))}


@jax.jit
def _outputs(q: Array, k: Array, v: Array, planes: Array) -> tuple[Array, Array]:
    return angular_attention(q, k, v, BITS), race_attention(q, k, v, planes, BETA)


COSINES = np.linspace(-1, 1, 17)


def _bias(config: Config, beta: float, seed: int) -> dict[str, float]:
    """Root mean square, over 17 angles, of the kernel averaged over tables less ``(1 - angle / pi)**P``.

    Vectors are as long as Gaussian ones, ``sqrt(D)``.
    """
    key, drawn = jax.random.split(jax.random.key(seed))
    one, other = np.linalg.qr(np.asarray(jax.random.normal(key, (WIDTH, 2))))[0].T * math.sqrt(WIDTH)
    turned = COSINES[:, None] * one + np.sqrt(1 - COSINES[:, None] ** 2) * other
    planes = srp_planes(drawn, config.averaged, BITS, WIDTH)
    mean = np.asarray(_kernel(one[None], turned, planes, jnp.float32(beta)), np.float64) / config.averaged
    return {"value": float(np.sqrt(np.mean((mean - (1 - np.arccos(COSINES) / np.pi) ** BITS) ** 2)))}


@jax.jit
def _kernel(one: Array, others: Array, planes: Array, beta: Array) -> Array:
    return race_features(planes, beta, others) @ race_features(planes, beta, one)[0]


# --- the models ---------------------------------------------------------------------------------------


def _measure(config: Config, task: str, method: str, seed: int) -> dict[str, Any]:
    row = trained(config, task, method)[seed]
    return {"value": row["loss"] if task == "language" else row["accuracy"]} | row


@functools.lru_cache(maxsize=1)
def trained(config: Config, task: str, method: str) -> list[dict[str, Any]]:
    """The rows of all seeds of a method."""
    if task == "language":
        sizes = Sizes(language.VOCABULARY, config.context, True, language.VOCABULARY,
                      features=config.features, layers=config.layers, hidden=4 * config.features)  # fmt: skip
        plan = Plan(config.steps, config.batch_size, config.learning_rates, config.seeds)
        return outcomes(sizes, method, texts(config.context, config.held_out), plan)
    sizes = Sizes(VALUES, 2 * PAIRS + QUESTIONS, True, KEYS + VALUES, reads=QUESTIONS, smear=True,
                  features=config.features, layers=config.layers, hidden=2 * config.features)  # fmt: skip
    plan = Plan(config.recall_steps, 64, config.recall_rates, config.seeds)
    return outcomes(sizes, method, questions(64 * config.recall_steps), plan)


@functools.lru_cache(maxsize=1)
def texts(context: int, held_out: int) -> Splits[Part]:
    """Sequences of tiny Shakespeare, and what comes next at each place."""

    def part(text: np.ndarray, count: int | None) -> Part:
        tokens = language.sequences(text, context + 1, count)
        return Part(tokens[:, :-1], tokens[:, 1:])

    train, validation, test = language.splits("tiny_shakespeare")
    return Splits(part(train, None), part(validation, held_out), part(test, held_out))


@functools.lru_cache(maxsize=1)
def questions(train: int, held_out: int = 1024) -> Splits[Part]:
    """Sequences of 4 keys, each before its value, and 8 questions: every key twice. Labels are the values."""

    def part(name: str, count: int) -> Part:
        draws = uniform(stream(0, "recall", name), np.arange(count * (KEYS + PAIRS + QUESTIONS))).reshape(count, -1)
        chosen, drawn, order = np.split(draws, [KEYS, KEYS + PAIRS], axis=1)
        keys, values = np.argsort(chosen, axis=1)[:, :PAIRS], (drawn * VALUES).astype(int)
        asked = np.argsort(order, axis=1) % PAIRS
        pairs = np.stack([keys, KEYS + values], axis=2).reshape(count, -1)
        tokens = np.concatenate([pairs, np.take_along_axis(keys, asked, axis=1)], axis=1)
        return Part(tokens.astype(np.int32), np.take_along_axis(values, asked, axis=1).astype(np.int32))

    return Splits(part("train", train), part("validation", held_out), part("test", held_out))


# --- claims -------------------------------------------------------------------------------------------

LAST_STEP = "reproduction at small scale"


def _slope(rows: pl.DataFrame) -> Measured:
    """Slope of the log of the error against the log of the tables, a line a seed."""
    part = rows.filter(pl.col("task") == "error").sort("seed", "tables")
    tables = part["tables"].unique().sort().to_numpy()
    errors = part["value"].to_numpy().reshape(-1, tables.size)
    return mean_interval(np.polynomial.polynomial.polyfit(np.log(tables), np.log(errors).T, 1)[1], "seeds")


def _bias_falls(rows: pl.DataFrame) -> Measured:
    """By how much the bias at a temperature is above that at the next one; where it is least."""
    part = rows.filter(pl.col("task") == "bias").with_columns(pl.col("beta").cast(pl.String).alias("at"))
    betas = part["beta"].unique().sort().to_list()
    falls = []
    for low, high in itertools.pairwise(betas):
        found = paired_difference(part, str(low), str(high), "value", on="seed", by="at")
        falls.append(Measured(found.value, found.low, found.high, f"beta from {low:g} to {high:g}, {found.note}"))
    return lowest(falls)


def _useful(rows: pl.DataFrame, task: str) -> pl.DataFrame:
    """The rows of a task whose softmax model is worth comparing with.

    Raises:
        NotEnoughRows: where it is not above its control.
    """
    part = rows.filter(pl.col("task") == task)
    if task == "language":
        gain = paired_difference(part, "mean", "softmax", "value", on="seed")
        if not gain.low > 0:
            raise NotEnoughRows(f"softmax is not below the mean of earlier values: {gain.value:.3f} nats")
        return part
    recalled = part.filter(pl.col("method") == "softmax")["value"].to_numpy()
    if not recalled.size or recalled.mean() < 0.9:
        raise NotEnoughRows(f"softmax recalls {recalled.mean() if recalled.size else math.nan:.2f}, below 0.9")
    return part


def within_one_error(rows: pl.DataFrame, method: str, peer: str) -> Measured:
    """``value`` of method less that of peer, with an interval of one standard error and not of 95 %."""
    found = paired_difference(rows, method, peer, "value", on="seed")
    pair = [rows.filter(pl.col("method") == name).sort("seed")["value"].to_numpy() for name in (method, peer)]
    error = standard_error(pair[0] - pair[1])
    return Measured(found.value, found.value - error, found.value + error, f"{found.note}; +- one standard error")


def _loss_against(rows: pl.DataFrame, peer: str) -> Measured:
    return within_one_error(_useful(rows, "language"), "race-4x4", peer)


def _excess(rows: pl.DataFrame, method: str, peer: str) -> Measured:
    """Loss of ``method`` over that of ``peer``, less 1."""
    part = _useful(rows, "language")
    losses = [part.filter(pl.col("method") == name).sort("seed")["value"].to_numpy() for name in (method, peer)]
    if not losses[0].size or losses[0].size != losses[1].size:
        raise NotEnoughRows(f"no pairs of {method} and {peer}")
    return mean_interval(losses[0] / losses[1] - 1, "pairs")


def _recalls_less(rows: pl.DataFrame, method: str, peer: str) -> Measured:
    return paired_difference(_useful(rows, "recall"), peer, method, "value", on="seed")


CLAIMS = (
    Claim(
        "error-law",
        "The error against angular attention falls as the square root of the number of tables",
        paper="O(P / beta + sqrt(log(N / delta) / L)) |V|_F",
        measure=_slope,
        holds=lambda measured: measured.low >= -0.65 and measured.high <= -0.35,
        source="theorem",
    ),
    Claim(
        "bias-law",
        "The bias of the averaged kernel falls as beta goes from 1 to 4 to 16",
        paper="bias O(P / beta)",
        measure=_bias_falls,
        holds=lambda measured: measured.low > 0,
        source="theorem",
    ),
    *(
        Claim(
            f"language-{peer}",
            f"RACE with 4 tables of 4 bits has no more loss than {words}, within one standard error",
            paper="TinyStories, masked: perplexity 2.6 against 7.0 (linear) and 10.0 (Performer)",
            measure=functools.partial(_loss_against, peer=peer),
            holds=lambda measured: measured.low <= 0,
            source="tables",
            unit="nats",
        )
        for peer, words in (("linear", "linear attention"), ("performer-256", "Performer with 256 features"))
    ),
    *(
        Claim(
            f"language-softmax-{method}",
            f"The loss of RACE with {words} is within 3 % of softmax's",
            paper="WikiText-103: perplexity 20.9 and 20.9",
            measure=functools.partial(_excess, method=method, peer="softmax"),
            holds=lambda measured: measured.high < 0.03,
            source="tables",
        )
        for method, words in (("race-4x4", "(4, 4)"), ("race-2x2", "(2, 2)"))
    ),
    Claim(
        "language-angular",
        "Angular attention to the 8th power has less loss than softmax",
        paper="WikiText-103: perplexity 19.0 against 20.9",
        measure=functools.partial(_excess, method="angular-8", peer="softmax"),
        holds=lambda measured: measured.high < 0,
        source="tables",
    ),
    Claim(
        "language-control",
        "RACE with (4, 4) has less loss than the mean of all earlier values: its buckets address",
        paper="none",
        measure=functools.partial(_excess, method="race-4x4", peer="mean"),
        holds=lambda measured: measured.high < 0,
        source=LAST_STEP,
    ),
    *(
        Claim(
            f"recall-gap-{method}",
            f"With a state of {buckets} buckets RACE recalls visibly less than softmax: by more than 0.05",
            paper="none; hybrids distilled from a model of 3 B: RULER-16K 22.9 to 54.6, teacher 80.5",
            measure=functools.partial(_recalls_less, method=method, peer="softmax"),
            holds=lambda measured: measured.low > 0.05,
            source=LAST_STEP,
        )
        for method, buckets in (("race-3x3", 24), ("race-4x4", 64))
    ),
    Claim(
        "recall-linear",
        "With 64 buckets it recalls more than linear attention, whose state has 16 rows a head",
        paper="none",
        measure=functools.partial(_recalls_less, method="linear", peer="race-4x4"),
        holds=lambda measured: measured.low > 0,
        source=LAST_STEP,
    ),
)


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Error or bias, loss in nats a byte, or recall: mean and standard error over the seeds, beside costs."""
    return rows.group_by("task", "method", "tables", "beta", maintain_order=True).agg(
        pl.col("value").mean(),
        (pl.col("value").std() / pl.len().sqrt()).alias("standard error"),
        pl.col("learning_rate").first(),
        pl.col("parameters").first(),
        *(pl.col(f"flops_{n}").first().alias(f"FLOPs a token of {n}") for n in (256, 1024, 4096)),
        pl.col("state_4096").first().alias("floats of state at 4096"),
    )


def figure(rows: pl.DataFrame) -> Figure:
    """The law of the error, and loss and recall of each method."""
    drawing, axes = new_figure(columns=3, height=4.2)
    part = rows.filter(pl.col("task") == "error")
    means = part.group_by("tables").agg(pl.col("value").mean()).sort("tables")
    axes[0].scatter(part["tables"], part["value"], s=8, color="0.6")
    axes[0].plot(means["tables"], means["value"], marker="o", label="RACE, beta = 2")
    first = float(means["value"][0]) if len(means) else math.nan
    axes[0].plot(means["tables"], first / np.sqrt(means["tables"]), color="0.4", linestyle="--", label="slope -1/2")
    axes[0].set(
        xscale="log", yscale="log", xlabel="tables", ylabel="relative error", title="Against angular attention"
    )
    axes[0].legend()
    for ax, task, label in ((axes[1], "language", "nats a byte"), (axes[2], "recall", "share recalled")):
        bars(ax, rows.filter(pl.col("task") == task), label)
    axes[1].set(title="Tiny Shakespeare")
    axes[2].set(title="Associative recall", xlim=(0, 1.05))
    return drawing


def bars(ax: Any, rows: pl.DataFrame, label: str) -> None:
    """A point a seed and their mean, a line a method."""
    names = rows["method"].unique(maintain_order=True).to_list()[::-1]
    for place, name in enumerate(names):
        values = rows.filter(pl.col("method") == name)["value"].to_numpy()
        color = "C0" if name.startswith("race") else "0.3"
        ax.scatter(values, np.full(values.size, place), s=10, color=color, alpha=0.5)
        ax.plot([values.mean()], [place], marker="|", markersize=14, color=color)
    ax.set_yticks(range(len(names)), labels=names)
    ax.set(xlabel=label)
