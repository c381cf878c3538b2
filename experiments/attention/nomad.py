"""NoMAD-Attention: what 4-bit codes of keys cost a model's answers, and what look-ups in registers save on a CPU.

    make peers && python -m experiments run attention.nomad       # about 6 minutes on 2 cores, once models are there

Three parts. ``quality``: every key of every layer is a code from the moment it comes, with tables of bytes, on the
models of `experiments.kvcache.fixtures`; codebooks are learned from training text, anew for each model. Controls of
equal bytes: int4 with a fixed range for each channel (``uniform``), 16 keys in place of centroids (``random``), one
codebook for all heads (``shared``), 256 centroids for pairs of channels (``pq256``). ``int4`` has a range of its own
for each key, 4 bytes more. ``float`` leaves the tables unrounded.

``budget``: errors of scores of independent Gaussian keys of width 64, and what rounding the tables adds.

``scores`` and ``attention``: seconds of one decode step, one query a head, at the default scale 8 heads of width 128:
scoring of all keys, making the tables included, beside the float32 products that it replaces, in XLA and in PyTorch;
then attention whole, with float32 values for all, beside XLA's and PyTorch's scaled_dot_product_attention. Functions
take turns in one process, each call after one of its own that does not count, and ratios are of one repetition.
Codes are random: no time depends on what they are. Where there is no compiler or no PyTorch, their rows are absent,
and claims about them are not judged.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import polars as pl
from jaxtyping import Float
from matplotlib.figure import Figure

from experiments.attention.nomad_cells import CONTROLS, SIZE, Cell, budget, cells, scores
from experiments.attention.nomad_timing import name_of, timed_methods, times
from experiments.kvcache import fixtures
from experiments.kvcache.fixtures import Size
from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    Trial,
    highest,
    lowest,
    mean_interval,
    new_figure,
    ratio_interval,
)

PAPER = (
    "Zhang, Yi, Yao, Xu, Shrivastava: NoMAD-Attention: Efficient LLM Inference on CPUs Through Multiply-add-free "
    "Attention, NeurIPS 2024, arXiv 2403.01273"
)
SYSTEM = "hashml.attention.nomad"
K = 1024
TIMED = ("scores", "attention")


@dataclass(frozen=True)
class Config:
    """The defaults are those of the claims."""

    models: tuple[str, ...] = ("f1", "recall", "stories")
    channels: tuple[int, ...] = (1, 2, 4, 8)
    """Coordinates of a key that share a code, d_sub."""
    controls: tuple[str, ...] = tuple(CONTROLS)
    """Beside random centroids, on the first of the models."""
    seeds: int = 3
    """Of models, each with codebooks of its own."""
    size: Size = SIZE
    points: int = 4096
    """Keys of the error budget, and as many that codebooks are learned from."""
    contexts: tuple[int, ...] = (1 * K, 4 * K, 16 * K)
    """Keys of a timed step."""
    longest_xla: int = 4 * K
    """Of look-ups by XLA alone."""
    heads: int = 8
    width: int = 128
    repetitions: int = 15


SCALES = {
    "tiny": Config(models=("f1",), channels=(1,), controls=("int4",), seeds=2, size=fixtures.TINY, points=64,
                   contexts=(64,), longest_xla=64, heads=2, width=8, repetitions=6),
    "default": Config(),
    "paper": Config(size=Size(rows=64, recall_rows=512, lloyd=100), seeds=5, contexts=(K, 4 * K, 16 * K, 32 * K),
                    heads=32),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config.models, config.channels, config.controls):
        for seed in range(config.seeds):
            yield Trial(_key("quality", cell.fixture, cell.method, cell.channels, seed=seed),
                        functools.partial(_quality, config, cell, seed))  # fmt: skip
    for channels in config.channels:
        for seed in range(config.seeds):
            yield Trial(_key("budget", None, "nomad", channels, seed=seed),
                        functools.partial(_budget, config, channels, seed))  # fmt: skip
    seconds = functools.lru_cache(maxsize=1)(functools.partial(times, config))
    for part in TIMED:
        for context in config.contexts:
            for method, channels in timed_methods(config, context):
                for repetition in range(config.repetitions):

                    def measure(
                        part: str = part, context: int = context, name: tuple[str, int | None] = (method, channels),
                        at: int = repetition,
                    ) -> dict[str, Any]:  # fmt: skip
                        return _row(seconds=float(seconds(part, context)[name_of(*name)][at]))

                    yield Trial(_key(part, None, method, channels, context=context, repetition=repetition), measure)


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    timed = sum(len(timed_methods(config, context)) for part in TIMED for context in config.contexts)
    known = len(cells(config.models, config.channels, config.controls)) + len(config.channels)
    return known * config.seeds + timed * config.repetitions


def _key(
    part: str, fixture: str | None, method: str, channels: int | None, *, seed: int | None = None,
    context: int | None = None, repetition: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {"part": part, "fixture": fixture, "method": method, "channels": channels, "seed": seed,
            "context": context, "repetition": repetition}  # fmt: skip


def _row(**measured: float | None) -> dict[str, float | None]:
    names = ("nll", "accuracy", "key_bytes", "key_mse", "score_error", "table_error", "seconds")
    return dict.fromkeys(names) | measured


def _quality(config: Config, cell: Cell, seed: int) -> dict[str, float | None]:
    return _row(**scores(config.size, cell, config.seeds)[seed])


def _budget(config: Config, channels: int, seed: int) -> dict[str, float | None]:
    found = budget(jax.random.key(seed), channels=channels, points=config.points, iterations=config.size.lloyd)
    return _row(**dict(zip(("key_mse", "score_error", "table_error"), map(float, found), strict=True)))


# --- claims -------------------------------------------------------------------------------------------


def _of(
    rows: pl.DataFrame, metric: str, method: str, channels: int | None = None, fixture: str | None = "f1",
    part: str = "quality",
) -> Float[np.ndarray, " seeds"]:  # fmt: skip
    """The metric of a cache, seed by seed."""
    wanted = {"part": part, "fixture": fixture, "method": method, "channels": channels}
    found = rows.filter([pl.col(name).eq_missing(pl.lit(value)) for name, value in wanted.items()]).sort("seed")
    if found.is_empty():
        raise NotEnoughRows(f"no rows of {name_of(method, channels)} on {fixture or part}")
    return found[metric].cast(pl.Float64).to_numpy()


def _perplexity(
    rows: pl.DataFrame, method: str, channels: int | None, rival: str = "full", rival_channels: int | None = None,
    fixture: str = "f1",
) -> Measured:  # fmt: skip
    """Perplexity over that of a rival, less 1."""
    first = _of(rows, "nll", method, channels, fixture)
    second = _of(rows, "nll", rival, rival_channels, fixture)
    return mean_interval(np.expm1(first - second), "models")


def _next_worse(rows: pl.DataFrame) -> Measured:
    """By how much perplexity rises from a number of channels to the next: where it does so least."""
    steps = []
    for few, more in ((1, 2), (2, 4), (4, 8)):
        found = _perplexity(rows, "nomad", more, "nomad", few)
        steps.append(Measured(found.value, found.low, found.high, f"least from {few} to {more}, {found.note}"))
    return lowest(steps)


def _recall(rows: pl.DataFrame) -> Measured:
    exact, coded = (_of(rows, "accuracy", *cell, fixture="recall") for cell in (("full", None), ("nomad", 1)))
    return mean_interval(coded - exact, "models")


def _rounding(rows: pl.DataFrame) -> Measured:
    """Error that tables of bytes add over that of the codes: at the channels where it is largest."""
    found = []
    for channels in Config().channels:
        table, codes = (_of(rows, name, "nomad", channels, None, "budget") for name in ("table_error", "score_error"))
        cell = mean_interval(table / codes, "draws")
        found.append(Measured(cell.value, cell.low, cell.high, f"most at d_sub {channels}, {cell.note}"))
    return highest(found)


def _key_error(rows: pl.DataFrame) -> Measured:
    return mean_interval(_of(rows, "key_mse", "nomad", 1, None, "budget"), "draws")


def _speedup(
    rows: pl.DataFrame, part: str, peer: str, context: int, method: str = "native", channels: int = 1
) -> Measured:
    """Time of a peer over that of NoMAD: median of the ratios within a repetition."""
    timed = rows.filter(pl.col("part").eq(part) & pl.col("context").eq(context))
    wanted = timed.filter(
        pl.col("method").eq(peer) | (pl.col("method").eq(method) & pl.col("channels").eq_missing(pl.lit(channels)))
    )
    absent = {peer, method} - set(wanted["method"])
    if absent:
        raise NotEnoughRows(f"{', '.join(sorted(absent))} was not timed here at {context} keys")
    return ratio_interval(wanted, peer, method, "seconds", on=["repetition"])


CARD = "reproduction"
CONTROL = "none; trivial control"
TARGET = "this project's target"


def _quality_claims() -> Iterator[Claim]:
    for name, bound, said in (("1-percent", 0.01, "1 %"), ("3-percent", 0.03, "3 %")):
        yield Claim(
            f"quality-{name}",
            f"A code for each coordinate costs less than {said} of perplexity",
            paper="quality is kept without fine-tuning; d_sub = 1 is recommended for it",
            measure=functools.partial(_perplexity, method="nomad", channels=1),
            holds=lambda measured, bound=bound: measured.high < bound,
        )
    yield Claim(
        "quality-stories",
        "On a published model, too, less than 3 %",
        paper="CodeLlama-7B, LLaMA-2-7B and StableLM-3B keep their quality",
        measure=functools.partial(_perplexity, method="nomad", channels=1, fixture="stories"),
        holds=lambda measured: measured.high < 0.03,
    )
    yield Claim(
        "recall",
        "The recall model answers at most 1 % less with a code for each coordinate",
        paper="none",
        measure=_recall,
        holds=lambda measured: measured.low > -0.01,
        source=CARD,
    )
    yield Claim(
        "monotone",
        "Perplexity rises with every doubling of the coordinates of a code, 1 to 8",
        paper="smaller sub-vectors are better",
        measure=_next_worse,
        holds=lambda measured: measured.low > 0,
        source="the authors' repository",
    )
    yield Claim(
        "four-worse",
        "Codes of 4 coordinates are worse than codes of one",
        paper="smaller sub-vectors are better",
        measure=functools.partial(_perplexity, method="nomad", channels=4, rival="nomad", rival_channels=1),
        holds=lambda measured: measured.low > 0,
        source="the authors' repository",
    )
    controls = (
        ("random", 1, "16 keys that are drawn at random, in equal bytes"),
        ("uniform", 1, "int4 with a fixed range for each channel, in equal bytes"),
        ("shared", 1, "one codebook for all heads"),
    )
    for rival, channels, said in controls:
        yield Claim(
            f"beats-{rival}",
            f"Codes of one coordinate have less perplexity than with {said}",
            paper="codebooks are learned for each head" if rival == "shared" else CONTROL,
            measure=functools.partial(_perplexity, method="nomad", channels=1, rival=rival, rival_channels=channels),
            holds=lambda measured: measured.high < 0,
            source=CARD,
        )
    yield Claim(
        "against-int4",
        "And less than int4 with a range for each key, in 4 bytes more of them",
        paper="none",
        measure=functools.partial(_perplexity, method="nomad", channels=1, rival="int4"),
        holds=lambda measured: measured.high < 0,
        source=CARD,
    )
    yield Claim(
        "against-pq256",
        "And at most 1 % more than with 256 centroids for pairs of coordinates, which no register holds",
        paper="none",
        measure=functools.partial(_perplexity, method="nomad", channels=1, rival="pq256", rival_channels=2),
        holds=lambda measured: measured.high < 0.01,
        source=CARD,
    )
    yield Claim(
        "tables-model",
        "Tables of bytes cost less than 0.5 % of perplexity beside tables of floats, a code for each coordinate",
        paper="none",
        measure=functools.partial(_perplexity, method="nomad", channels=1, rival="float", rival_channels=1),
        holds=lambda measured: measured.high < 0.005,
        source=CARD,
    )
    yield Claim(
        "tables-budget",
        "On Gaussian keys they add less than a fifth of the codes' own error, at 1 to 8 coordinates",
        paper="0.125 to 0.004 of it in a small check, d = 64",
        measure=_rounding,
        holds=lambda measured: measured.high < 0.2,
        source=CARD,
    )
    yield Claim(
        "key-error",
        "A code for each coordinate leaves less than 0.02 of the variance of a Gaussian key",
        paper="0.013 in a small check; 0.0095 is the least that 16 levels leave",
        measure=_key_error,
        holds=lambda measured: measured.high < 0.02,
        source=CARD,
    )


def _speed_claims() -> Iterator[Claim]:
    products = {"dense": "XLA's", "torch": "PyTorch's"}
    for peer, whose in products.items():
        yield Claim(
            f"scores-16k-{peer}",
            f"At 16 K keys scoring is at least 5x faster than {whose} float32 products, a code for each coordinate",
            paper="the q.k step is 5 to 10x faster, say third parties",
            measure=functools.partial(_speedup, part="scores", peer=peer, context=16 * K),
            holds=lambda measured: measured.low >= 5,
            source=TARGET,
            unit="x",
        )
    reads = {"dense": "XLA's softmax attention", "torch": "PyTorch's scaled_dot_product_attention"}
    for peer, whose in reads.items():
        yield Claim(
            f"attention-16k-{peer}",
            f"At 16 K keys all of attention is faster than {whose}, a code for each coordinate",
            paper="up to 2x for all of a 4-bit LLaMA-7B at 16 K tokens",
            measure=functools.partial(_speedup, part="attention", peer=peer, context=16 * K),
            holds=lambda measured: measured.low > 1,
            source=TARGET if peer == "torch" else "abstract",
            unit="x",
        )
    yield Claim(
        "xla-alone",
        "Without a shuffle of bytes, by XLA alone at 4 K keys, look-ups are slower than products",
        paper="none; XLA has no shuffle of bytes",
        measure=functools.partial(_speedup, part="scores", peer="dense", context=4 * K, method="xla"),
        holds=lambda measured: measured.high < 1,
        source=CARD,
        unit="x",
    )


CLAIMS = (*_quality_claims(), *_speed_claims())


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over seeds and their standard errors; of times medians and quartiles, in milliseconds."""
    quality = pl.coalesce("nll", "accuracy", "score_error")
    return rows.group_by("part", "fixture", "method", "channels", "context", maintain_order=True).agg(
        pl.col("key_bytes").first().alias("bytes of a key"),
        pl.col("nll").mean(),
        pl.col("accuracy").mean(),
        pl.col("key_mse").mean().alias("key error"),
        pl.col("score_error").mean().alias("score error"),
        pl.col("table_error").mean().alias("error of tables"),
        (quality.std() / quality.count().sqrt()).alias("standard error"),
        (1e3 * pl.col("seconds").median()).alias("ms"),
        (1e3 * pl.col("seconds").quantile(0.25)).alias("ms, first quartile"),
        (1e3 * pl.col("seconds").quantile(0.75)).alias("ms, third quartile"),
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Loss against bytes, errors against channels, and seconds against keys."""
    drawing, axes = new_figure(2, 2, width=12, height=9)
    text = rows.filter(pl.col("part").eq("quality") & pl.col("fixture").eq("f1"))
    for method in text["method"].unique(maintain_order=True):
        part = text.filter(pl.col("method") == method)
        points = part.group_by("key_bytes").agg(pl.col("nll").mean()).sort("key_bytes")
        axes[0].plot(points["key_bytes"], points["nll"], "k*" if method == "full" else "o-", label=method)
    axes[0].set_xscale("log", base=2)
    axes[0].set(xlabel="bytes of a key of one head", ylabel="nats a byte of text", title="f1")
    errors = (
        rows.filter(pl.col("part") == "budget").group_by("channels").agg(pl.col("score_error", "table_error").mean())
    )
    errors = errors.sort("channels")
    for name, label in (("score_error", "codes"), ("table_error", "tables of bytes, on their own")):
        axes[1].plot(errors["channels"], errors[name], "o-", label=label)
    axes[1].set_xscale("log", base=2)
    axes[1].set(yscale="log", xlabel="coordinates of a code", title="Gaussian keys, width 64",
                ylabel="error of scores over their deviation")  # fmt: skip
    for ax, part in zip(axes[2:], TIMED, strict=True):
        timed = rows.filter(pl.col("part") == part)
        for method, channels in timed.select("method", "channels").unique(maintain_order=True).iter_rows():
            own = timed.filter(pl.col("method").eq(method) & pl.col("channels").eq_missing(pl.lit(channels)))
            points = own.group_by("context").agg(
                pl.col("seconds").median(), pl.col("seconds").quantile(0.25).alias("low"),
                pl.col("seconds").quantile(0.75).alias("high"),
            ).sort("context")  # fmt: skip
            spread = [points["seconds"] - points["low"], points["high"] - points["seconds"]]
            ax.errorbar(
                points["context"], points["seconds"], spread, marker="o", capsize=2, label=name_of(method, channels)
            )
        ax.set(xscale="log", yscale="log", xlabel="keys", ylabel="seconds", title=part)
    for ax in axes:
        ax.legend(fontsize="x-small")
    return drawing
