"""REFRAG: what chunk embeddings cost in answers, which chunks are worth their tokens, and how much sooner one speaks.

    python -m experiments run attention.refrag      # about 15 minutes on 2 cores

*Quality*: contexts of 8 passages of 16 tokens, two facts in each, and a question about one of them
(`experiments.attention.refrag_task`). A decoder learns to answer from whole contexts; REFRAG is trained on top of it
for each size of chunks. The control is the same decoder with as many positions of context, the last ones
(``truncated``): no decoder knows more than what is left of the facts, so it is not trained further. ``none`` has no
context at all.

*Selection*: at one size of chunks, a quarter of them is expanded, chosen at random, by the decoder's loss on each
chunk alone (``heuristic``), by a policy that reads kept vectors (``blind``), by one that reads the question's vector
beside them (``policy``), or by one who knows which is asked for (``oracle``, the rest at random). Every passage is as
likely to be asked for, so a policy that is told no question has nothing to go by: the card's own policy is ``blind``.
``all`` expands everything, in REFRAG's decoder. ``truncated_expanded`` is the decoder before REFRAG, with as many
positions.

*Ablation*: as many steps, without reconstruction and without curriculum (``direct``); and none (``untrained``), when
an embedding is the mean of the decoder's own of the chunk's tokens, which is where training begins.

*Time* to the first token, of untrained models, batch 1: the whole prefill, cache included, with embeddings that are
kept, or made within the call (``encoded``). Functions take turns in one process.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.attention.refrag_cells import SELECTIONS, quality
from experiments.attention.refrag_claims import CLAIMS as CLAIMS
from experiments.attention.refrag_timing import cost, timed_methods, times
from experiments.lab import Trial, new_figure

PAPER = "Lin, Ghosh, Low, Shrivastava, Mohan: REFRAG: Rethinking RAG based Decoding, 2025, arXiv 2509.01092"
SYSTEM = "hashml.models.refrag"


@dataclass(frozen=True)
class Config:
    """The defaults are those of the claims."""

    sizes: tuple[int, ...] = (4, 8, 16)
    """Tokens of a chunk, k."""
    selected: int = 16
    """The size at which chunks are chosen and recipes compared."""
    recipes: tuple[str, ...] = ("direct", "untrained")
    """Of the ablation, see `experiments.attention.refrag_models`."""
    share: float = 0.25
    """Of the chunks, expanded."""
    held_out: int = 1024
    """Questions that a model is scored on."""
    seeds: int = 3
    features: int = 64
    layers: int = 2
    rows: int = 16
    """Contexts of a batch of REFRAG's, where these are whole."""
    questions: int = 8
    """About each context while training."""
    decoder_steps: int = 280
    decoder_rows: int = 32
    decoder_rate: float = 0.005
    reconstruction_steps: int = 60
    reconstruction_rate: float = 0.003
    continuation_steps: int = 360
    continuation_rate: float = 0.003
    policy_steps: int = 80
    policy_rows: int = 16
    policy_rate: float = 0.003
    group: int = 8
    """Draws of chunks for each question, G."""
    contexts: tuple[int, ...] = (512, 1024, 4096)
    """Tokens of a timed prompt."""
    timed_features: int = 128
    timed_layers: int = 4
    repetitions: int = 15


SCALES = {
    "tiny": Config(sizes=(8,), selected=8, held_out=8, seeds=2, features=8, layers=1, rows=2, questions=2,
                   decoder_steps=2, decoder_rows=2, reconstruction_steps=2, continuation_steps=2, policy_steps=1,
                   policy_rows=2, group=2, recipes=("untrained",), contexts=(32,), timed_features=8, timed_layers=1,
                   repetitions=6),
    "default": Config(),
    "paper": Config(features=128, layers=4, rows=64, decoder_steps=1000, decoder_rows=64, reconstruction_steps=2000,
                    continuation_steps=4000, policy_steps=1000, seeds=5,
                    recipes=("no_curriculum", "no_reconstruction", "direct", "untrained"),
                    contexts=(1024, 2048, 4096, 8192, 16384)),
}  # fmt: skip

OVERALL = ("full", "none")
SELECTED = (*SELECTIONS, "all", "truncated_expanded")


def cells(config: Config) -> list[tuple[str, str, int | None]]:
    """``(part, method, size)`` of everything that is trained."""
    found: list[tuple[str, str, int | None]] = [("quality", method, None) for method in OVERALL]
    found += [("quality", method, size) for size in config.sizes for method in ("compressed", "truncated")]
    found += [("selection", method, config.selected) for method in ("compressed", *SELECTED)]
    return found + [("ablation", recipe, config.selected) for recipe in ("refrag", *config.recipes)]


def run(config: Config) -> Iterator[Trial]:
    # Seed by seed, so that few models are kept at a time.
    for seed in range(config.seeds):
        for part, method, size in cells(config):
            yield Trial(_key(part, method, size, seed=seed), functools.partial(_quality, config, method, size, seed))
    seconds = functools.lru_cache(maxsize=1)(functools.partial(times, config))
    for context in config.contexts:
        for method, size in timed_methods(config):
            for repetition in range(config.repetitions):

                def measure(context: int = context, method: str = method, size: int | None = size,
                            at: int = repetition) -> dict[str, Any]:  # fmt: skip
                    spent = cost(config, method, size, context)
                    return _row(seconds=float(seconds(context)[method, size][at]), positions=spent.positions,
                                flops=spent.flops + spent.encoder_flops, kv_bytes=spent.kv_bytes)  # fmt: skip

                yield Trial(_key("time", method, size, context=context, repetition=repetition), measure)


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    timed = len(config.contexts) * len(timed_methods(config)) * config.repetitions
    return config.seeds * len(cells(config)) + timed


def _key(
    part: str, method: str, size: int | None, *, seed: int | None = None, context: int | None = None,
    repetition: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {"part": part, "method": method, "size": size, "seed": seed, "context": context, "repetition": repetition}


def _row(**measured: float | int | None) -> dict[str, float | int | None]:
    names = ("accuracy", "nll", "hits", "positions", "flops", "kv_bytes", "seconds")
    return dict.fromkeys(names) | measured


def _quality(config: Config, method: str, size: int | None, seed: int) -> dict[str, Any]:
    return _row(**quality(config, config.held_out, method, size, seed))


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over seeds and the accuracy's standard error; of times medians and quartiles, in milliseconds."""
    return rows.group_by("part", "method", "size", "context", maintain_order=True).agg(
        pl.col("positions").first(),
        (pl.col("flops").first() / 1e6).alias("MFLOP"),
        pl.col("kv_bytes").first().alias("bytes of keys and values"),
        pl.col("accuracy").mean(),
        (pl.col("accuracy").std() / pl.col("accuracy").count().sqrt()).alias("standard error"),
        pl.col("nll").mean(),
        pl.col("hits").mean(),
        (1e3 * pl.col("seconds").median()).alias("ms"),
        (1e3 * pl.col("seconds").quantile(0.25)).alias("ms, first quartile"),
        (1e3 * pl.col("seconds").quantile(0.75)).alias("ms, third quartile"),
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Answers against positions, by selection and by recipe, and time to the first token against the context."""
    drawing, axes = new_figure(2, 2, width=12, height=9)
    part = rows.filter(pl.col("part") == "quality")
    for method in part["method"].unique(maintain_order=True):
        points = (
            part.filter(pl.col("method") == method)
            .group_by("positions")
            .agg(pl.col("accuracy").mean(), (pl.col("accuracy").std() / pl.len().sqrt()).alias("error"))
            .sort("positions")
        )
        axes[0].errorbar(points["positions"], points["accuracy"], points["error"], marker="o", label=method)
    axes[0].set(xscale="log", xlabel="positions of the prompt", ylabel="answers", title="embeddings or tokens")
    _draw_bars(axes[1], rows.filter(pl.col("part") == "selection"), "a quarter of the chunks expanded")
    _draw_bars(axes[2], rows.filter(pl.col("part") == "ablation"), "equal steps")
    timed = rows.filter(pl.col("part") == "time")
    for method, size in timed.select("method", "size").unique(maintain_order=True).iter_rows():
        own = timed.filter(pl.col("method").eq(method) & pl.col("size").eq_missing(pl.lit(size)))
        points = own.group_by("context").agg(
            pl.col("seconds").median(), pl.col("seconds").quantile(0.25).alias("low"),
            pl.col("seconds").quantile(0.75).alias("high"),
        ).sort("context")  # fmt: skip
        spread = [points["seconds"] - points["low"], points["high"] - points["seconds"]]
        label = method if size is None else f"{method}, k = {size}"
        axes[3].errorbar(points["context"], points["seconds"], spread, marker="o", capsize=2, label=label)
    axes[3].set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="seconds to the first token",
                title="prefill")  # fmt: skip
    for ax in (axes[0], axes[3]):
        ax.legend(fontsize="x-small")
    return drawing


def _draw_bars(ax: Axes, rows: pl.DataFrame, title: str) -> None:
    """Mean accuracies and their standard errors, a bar a method."""
    points = rows.group_by("method", maintain_order=True).agg(
        pl.col("accuracy").mean(), (pl.col("accuracy").std() / pl.len().sqrt()).alias("error")
    )
    ax.bar(points["method"].to_list(), points["accuracy"].to_list(), yerr=points["error"].to_list(), color="C0")
    ax.tick_params(axis="x", labelrotation=30)
    ax.set(ylabel="answers", title=title, ylim=(0, 1))
