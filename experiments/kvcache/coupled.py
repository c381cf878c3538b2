"""CQ: what one bit a value keeps where channels share a code, and where each has its own.

    python -m experiments run kvcache.coupled      # about 8 minutes on 2 cores, once models are there and the
                                                   # codebooks of kvcache.frontier; 4 more without these

Every token goes through the cache, and is coded as soon as it enters (no window), or when it leaves the 16 newest.
Loss of a language model (``f1``, held-out WikiText-2, tokens after the middle of 256) and accuracy and loss of a
recall model's final answers, with 1 bit a value in 1c1b, 2c2b, 4c4b and 8c8b, k-means weighted by Fisher information
or not; 2 bits in 1c2b, 2c4b and 4c8b; 4 bits in 2c8b. Beside them integers in groups of 32 channels, KIVI, KVQuant's
non-uniform codes of single channels (without outliers), and the exact cache. ``bits`` are codes and scales of the
coded tokens; bytes of a token are all of the cache, and what is learned stands apart, since a model has it once. It
outweighs the cache of these small models.

The control has no model: 16 Gaussian channels whose neighbours are correlated by 0, .5 or .9, at 1 bit each. If
correlation is what coupling lives on, it gains little at 0, where one channel costs 1 - 2/pi, and much at .9; the
dotted lines are Shannon's limits for so many channels together.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.kvcache import fixtures
from experiments.kvcache.coupled_cells import TENSORS, Cell, Config, Weights, cells, scores, tensor_scores, weights_of
from experiments.lab import Claim, Measured, NotEnoughRows, Trial, highest, mean_interval, new_figure

PAPER = (
    "Zhang, Yi, Xu, Shrivastava: KV Cache is 1 Bit Per Channel: Efficient Large Language Model Inference with "
    "Coupled Quantization, NeurIPS 2024, arXiv 2405.03917"
)
SYSTEM = "hashml.kvcache.coupled"

SCALES = {
    "tiny": Config(models=("f1",), one_bit=("coupled:4c4b",), more_bits=(), baselines=("int2",), windowed=(),
                   correlations=(0.9,), couplings=(1,), tensor_rows=4096, tensor_lloyd=5, tensor_seeds=2, seeds=2,
                   size=fixtures.TINY),
    "default": Config(),
    "paper": Config(models=("f1", "f1_relu_gqa", "recall"), tensor_lloyd=100, seeds=5, size=fixtures.PAPER),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config):
        for seed in range(_seeds(config, cell)):
            measure = tensor_scores if cell.fixture == TENSORS else _model_scores
            yield Trial({**dataclasses.asdict(cell), "seed": seed}, functools.partial(measure, config, cell, seed))


def _seeds(config: Config, cell: Cell) -> int:
    return config.tensor_seeds if cell.fixture == TENSORS else config.seeds


def _model_scores(config: Config, cell: Cell, seed: int) -> dict[str, float | int | None]:
    return scores(config, cell)[seed]


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return sum(_seeds(config, cell) for cell in cells(config))


# --- claims -------------------------------------------------------------------------------------------

WINDOW = Config().window
ONE_BIT = ("coupled:1c1b", "coupled:2c2b", "coupled:4c4b", "coupled:8c8b")
TWO_BITS = ("coupled:1c2b", "coupled:2c4b", "coupled:4c8b")


class Which(NamedTuple):
    """A cache of the rows: `weights_of` says what its weights are where nothing else is asked for."""

    method: str
    window: int = 0
    weights: Weights | None = None


def _scored(rows: pl.DataFrame, fixture: str, which: Which) -> pl.DataFrame:
    weights = which.weights or weights_of(which.method)
    found = rows.filter(
        pl.col("fixture").eq(fixture) & pl.col("method").eq(which.method) & pl.col("window").eq(which.window)
        & pl.col("weights").eq_missing(pl.lit(weights))
    ).sort("seed")  # fmt: skip
    if found.is_empty():
        named = f"{which.method}, {weights or 'no'} weights, window {which.window}"
        raise NotEnoughRows(f"no rows of {fixture} with {named}")
    return found


def _excess(rows: pl.DataFrame, a: Which, b: Which) -> Measured:
    """Loss of a over that of b, less 1, over the language models."""
    first, second = (_scored(rows, "f1", which)["nll"].to_numpy() for which in (a, b))
    return mean_interval(first / second - 1, "models")


def _recall_lead(rows: pl.DataFrame, a: Which, b: Which) -> Measured:
    """Accuracy of a less that of b, over the recall models."""
    first, second = (_scored(rows, "recall", which)["accuracy"].to_numpy() for which in (a, b))
    return mean_interval(first - second, "models")


def _worst(found: dict[str, Measured]) -> Measured:
    return highest(
        Measured(one.value, one.low, one.high, f"worst: {name}, {one.note}") for name, one in found.items()
    )


def _steps(rows: pl.DataFrame, methods: tuple[str, ...]) -> Measured:
    """By how much the loss changes as channels are coupled, at the step where it falls least."""
    pairs = itertools.pairwise(methods)
    return _worst({f"{b} after {a}": _excess(rows, Which(b), Which(a)) for a, b in pairs})


def _spread(rows: pl.DataFrame) -> Measured:
    """Gap of the loss of 1c1b to that of 8c8b, less the largest spread over the models of either."""
    single, coupled = (_scored(rows, "f1", Which(method))["nll"].to_numpy() for method in (ONE_BIT[0], ONE_BIT[-1]))
    spread = max(float(np.ptp(losses)) for losses in (single, coupled))
    found = mean_interval(single - coupled - spread, "models")
    return Measured(found.value, found.low, found.high, f"the losses spread by {spread:.3f}, {found.note}")


def _weighting(rows: pl.DataFrame, methods: tuple[str, ...]) -> Measured:
    """By how much Fisher weights raise the loss, where they do so most."""
    return _worst({name: _excess(rows, Which(name), Which(name, weights="uniform")) for name in methods})


def _gain(rows: pl.DataFrame, correlation: float) -> Measured:
    """Error of channels on their own over that of 8 together."""
    part = rows.filter(pl.col("fixture").eq(TENSORS) & pl.col("correlation").eq(correlation)).sort("seed")
    single, coupled = (part.filter(pl.col("method") == name)["mse"].to_numpy() for name in (ONE_BIT[0], ONE_BIT[-1]))
    if not single.size or not coupled.size:
        raise NotEnoughRows(f"no tensors of correlation {correlation} with 1 and 8 channels to a code")
    return mean_interval(single / coupled, "tensors")


def _single(rows: pl.DataFrame) -> Measured:
    """Error of one uncorrelated channel at one bit, over what theory says."""
    part = rows.filter(
        pl.col("fixture").eq(TENSORS) & pl.col("correlation").eq(0.0) & pl.col("method").eq(ONE_BIT[0])
    )
    return mean_interval(part["mse"].to_numpy() / (1 - 2 / math.pi), "tensors")


def _below(measured: Measured) -> bool:
    return measured.high < 0


def _within_a_percent(measured: Measured) -> bool:
    return measured.high < 0.01


CLAIMS = (
    Claim(
        "one-bit-steps",
        "At 1 bit a value the loss falls at every step from 1c1b over 2c2b and 4c4b to 8c8b",
        paper="none; coupling lowers perplexity on Mistral-7b at 2 bits from 5.77 to 5.32",
        measure=functools.partial(_steps, methods=ONE_BIT),
        holds=_below,
        source="ablation",
    ),
    Claim(
        "one-bit-spread",
        "8c8b has less loss than 1c1b by more than the losses of the models spread",
        paper="quality is kept at 1 bit a channel",
        measure=_spread,
        holds=lambda measured: measured.low > 0,
    ),
    Claim(
        "two-bit-steps",
        "At 2 bits a value the loss falls at every step from 1c2b over 2c4b to 4c8b",
        paper="perplexity 5.77 to 5.32 (Mistral-7b)",
        measure=functools.partial(_steps, methods=TWO_BITS),
        holds=_below,
        source="ablation",
    ),
    Claim(
        "fisher",
        "At 1 bit Fisher weights never raise the loss by more than 1 %",
        paper="Fisher-guided centroids preserve quality",
        measure=functools.partial(_weighting, methods=ONE_BIT),
        holds=_within_a_percent,
        source="ablation",
    ),
    Claim(
        "fisher-few-channels",
        "They lower it where 1, 2 or 4 channels share a code",
        paper="perplexity 5.32 to 5.11 (Mistral-7b, 2 bits)",
        measure=functools.partial(_weighting, methods=ONE_BIT[:-1]),
        holds=_below,
        source="ablation",
    ),
    Claim(
        "fisher-8c8b",
        "And in 8c8b",
        paper="perplexity 32.12 to 8.09 (LLaMA-7b)",
        measure=functools.partial(_weighting, methods=ONE_BIT[-1:]),
        holds=_below,
        source="ablation",
    ),
    Claim(
        "coupled-2c8b",
        "2c8b, 4 bits a value, is within 1 % of the exact cache's loss",
        paper="perplexity 5.70 against 5.68 (LLaMA-7b, WikiText-2)",
        measure=functools.partial(_excess, a=Which("coupled:2c8b"), b=Which("full")),
        holds=_within_a_percent,
        source="table of perplexities",
    ),
    Claim(
        "window-8c8b",
        "With the 16 newest tokens exact, 8c8b is within 3 % of the exact cache's loss",
        paper="with 128 of them perplexity rises by .30 to .33 from 5.68, which is 3 % of the loss",
        measure=functools.partial(_excess, a=Which("coupled:8c8b", WINDOW), b=Which("full")),
        holds=lambda measured: measured.high < 0.03,
        source="section on exact recent tokens",
    ),
    Claim(
        "int2",
        "8c8b, 1 bit, has less loss than INT2 in groups, 3 bits with its scales",
        paper="perplexity 8.09 against 11779 (LLaMA-7b, WikiText-2)",
        measure=functools.partial(_excess, a=Which("coupled:8c8b"), b=Which("int2")),
        holds=_below,
        source="table of perplexities",
    ),
    Claim(
        "int2-window",
        "With the 16 newest tokens exact, too",
        paper="none",
        measure=functools.partial(_excess, a=Which("coupled:8c8b", WINDOW), b=Which("int2", WINDOW)),
        holds=_below,
        source="reproduction",
    ),
    Claim(
        "kvquant-1",
        "8c8b has less loss than 1-bit codes of single channels (KVQuant)",
        paper="perplexity 8.09 against 321.58 (LLaMA-7b, WikiText-2)",
        measure=functools.partial(_excess, a=Which("coupled:8c8b"), b=Which("kvquant:1")),
        holds=_below,
        source="table of perplexities",
    ),
    Claim(
        "kvquant-2",
        "4c8b, 2 bits, has less loss than 2-bit codes of single channels",
        paper="perplexity 5.97 against 8.17 (LLaMA-7b, WikiText-2)",
        measure=functools.partial(_excess, a=Which("coupled:4c8b"), b=Which("kvquant:2")),
        holds=_below,
        source="table of perplexities",
    ),
    Claim(
        "kivi-2",
        "4c8b with the 16 newest tokens exact is within 1 % of KIVI-2's loss, whose window holds as many on average",
        paper="better than or competitive with baselines",
        measure=functools.partial(_excess, a=Which("coupled:4c8b", WINDOW), b=Which("kivi:2", 32)),
        holds=_within_a_percent,
    ),
    Claim(
        "recall-coupling",
        "At 1 bit the recall model answers more with 8c8b than with 1c1b",
        paper="none; .999 against .757 in an earlier study",
        measure=functools.partial(_recall_lead, a=Which("coupled:8c8b"), b=Which("coupled:1c1b")),
        holds=lambda measured: measured.low > 0,
        source="reproduction",
    ),
    Claim(
        "recall-8c8b",
        "And with 8c8b at most 1 % less than with the exact cache",
        paper="none; .999 and .999 in an earlier study",
        measure=functools.partial(_recall_lead, a=Which("coupled:8c8b"), b=Which("full")),
        holds=lambda measured: measured.low > -0.01,
        source="reproduction",
    ),
    Claim(
        "single-channel",
        "Gaussian channels on their own cost 1 - 2/pi at 1 bit, within 1 %",
        paper="none; theory",
        measure=_single,
        holds=lambda measured: measured.low > 0.99 and measured.high < 1.01,
        source="theory",
    ),
    Claim(
        "gain-correlated",
        "Where neighbours are correlated by .9, coupling 8 channels divides the error by more than 4",
        paper="none; .351 against .077 in an earlier study",
        measure=functools.partial(_gain, correlation=0.9),
        holds=lambda measured: measured.low > 4,
        source="reproduction",
    ),
    Claim(
        "gain-uncorrelated",
        "Where they are not correlated, by less than 1.15",
        paper="none; .365 against .336 in an earlier study",
        measure=functools.partial(_gain, correlation=0.0),
        holds=lambda measured: measured.high < 1.15,
        source="reproduction",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Quality or error, mean over models or tensors and its standard error, beside bits and bytes."""
    main = pl.coalesce("nll", "accuracy", "mse")
    return rows.group_by("fixture", "method", "weights", "window", "correlation", maintain_order=True).agg(
        pl.col("bits").first(),
        pl.col("bytes_per_token").first().alias("bytes/token"),
        pl.col("table_bytes").first().alias("codebooks, once a model"),
        pl.col("nll").mean(),
        pl.col("accuracy").mean(),
        pl.col("answer_nll").mean(),
        pl.col("mse").mean(),
        pl.col("limit").first().alias("Shannon's limit"),
        (main.std() / pl.len().sqrt()).alias("standard error"),
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Loss against coupling and against bits, answers of the recall model, and error of the Gaussian tensors."""
    drawing, axes = new_figure(2, 2, width=12, height=9)
    named = pl.col("method").str.extract_groups(r"^coupled:(?<channels>\d+)c(?<code>\d+)b$").struct.unnest()
    rows = rows.with_columns(named).with_columns(pl.col("channels", "code").cast(pl.Int64))
    rows = rows.with_columns((pl.col("code") / pl.col("channels")).alias("rate"))
    at_once = rows.filter(pl.col("window").eq(0))
    for ax, fixture, metric in ((axes[0], "f1", "nll"), (axes[2], "recall", "answer_nll")):
        part = at_once.filter(pl.col("fixture") == fixture)
        _against_coupling(ax, part, metric)
        ax.set(xlabel="channels that share a code", title=f"{fixture}, every token coded at once")
    axes[0].set(ylabel="loss, nats a byte")
    axes[2].set(ylabel="loss of the answers, nats", yscale="log")
    _against_bits(axes[1], rows.filter(pl.col("fixture") == "f1"))
    _gaussian(axes[3], rows.filter(pl.col("fixture") == TENSORS))
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="x-small")
        else:
            ax.set_visible(False)  # a run may leave out a model, or the tensors
    return drawing


def _line(ax: Axes, rows: pl.DataFrame, x: str, y: str, label: str, style: str) -> None:
    """Means over seeds with their standard errors."""
    points = rows.group_by(x).agg(pl.col(y).mean(), (pl.col(y).std() / pl.len().sqrt()).alias("error")).sort(x)
    if not points.is_empty():
        ax.errorbar(points[x], points[y], points["error"], fmt=style, label=label)


def _ticks(ax: Axes, *places: int) -> None:
    """A log axis with whole numbers below it."""
    ax.set_xscale("log")
    ax.set_xticks(places, labels=[str(place) for place in places])
    ax.set_xticks([], minor=True)


def _exact(ax: Axes, rows: pl.DataFrame, metric: str) -> None:
    full = rows.filter(pl.col("method") == "full")
    if not full.is_empty():
        ax.axhline(float(full[metric].to_numpy().mean()), color="0.6", linewidth=0.8, label="exact cache")


def _against_coupling(ax: Axes, rows: pl.DataFrame, metric: str) -> None:
    for rate, weights, style in ((1, "fisher", "o-"), (1, "uniform", "o--"), (2, "fisher", "s-"), (4, "fisher", "D")):
        part = rows.filter(pl.col("rate").eq(rate) & pl.col("weights").eq(weights))
        _line(ax, part, "channels", metric, f"{rate} bit{'s' * (rate > 1)}, {weights}", style)
    _exact(ax, rows, metric)
    _ticks(ax, 1, 2, 4, 8)


def _against_bits(ax: Axes, rows: pl.DataFrame) -> None:
    fisher = rows.filter(pl.col("weights").eq("fisher") | pl.col("weights").is_null())
    at_once = fisher.filter(pl.col("window") == 0)
    for channels in sorted(set(at_once["channels"].drop_nulls())):
        _line(ax, at_once.filter(pl.col("channels") == channels), "bits", "nll", f"CQ, {channels} together", "o-")
    for method in at_once.filter(pl.col("channels").is_null() & pl.col("method").ne("full"))["method"].unique(
        maintain_order=True
    ):
        _line(ax, at_once.filter(pl.col("method") == method), "bits", "nll", method, "^")
    windowed = fisher.filter(pl.col("window") > 0)
    for method, window in windowed.select("method", "window").unique(maintain_order=True).iter_rows():
        part = windowed.filter(pl.col("method").eq(method))
        _line(ax, part, "bits", "nll", f"{method}, window {window}", "x")
    _exact(ax, rows, "nll")
    _ticks(ax, 1, 2, 3, 4, 5, 16)
    ax.set(
        xlabel="bits of codes and scales for each value", ylabel="loss, nats a byte", title="f1, loss against bits"
    )


def _gaussian(ax: Axes, rows: pl.DataFrame) -> None:
    for place, correlation in enumerate(sorted(set(rows["correlation"]))):
        part = rows.filter(pl.col("correlation") == correlation)
        _line(ax, part, "channels", "mse", f"correlation {correlation:g}", f"C{place}o-")
        limits = part.group_by("channels").agg(pl.col("limit").first()).sort("channels")
        ax.plot(limits["channels"], limits["limit"], f"C{place}:", linewidth=1)
    ax.axhline(1 - 2 / math.pi, color="0.6", linewidth=0.8, label="1 - 2/pi")
    _ticks(ax, 1, 2, 4, 8)
    ax.set(xlabel="channels that share a code", ylabel="held-out squared error a value", yscale="log",
           title="Gaussian tensors, 1 bit a value; dotted: Shannon")  # fmt: skip
