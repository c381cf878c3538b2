"""StreamingLLM: a model reads for ever from a small cache, if the first tokens never leave it. And texts from caches.

    python -m experiments run kvcache.streaming      # about 8 minutes on 2 cores, once models and codebooks are there

*Streams*: the language model ``f1`` reads held-out WikiText-2, 20 times as long as the sequences that it was trained
on, token by token through a cache of C tokens: S sinks, the first tokens, and a window of C - S, in equal bytes. Keys
are rotated at their rank in the cache (``slot``, the paper's) or at their position (``write``). Without sinks the two
are one, since all distances are equal. Text is harder here and easier there, so that a loss is shown over that of
*pieces* of the trained length, encoded anew. *Recomputed* encodes BOS and the newest C - 1 tokens anew for every
token, one in 16 of which is scored; *exact* keeps all tokens, at positions that the model was not trained at;
*elsewhere* protects as many other tokens, drawn once from the trained length. BOS begins every sequence that the
model was trained on and every stream, so that it can be a sink; how much attention it gets is the part *sink*, on
exact attention.

*Generation*: 64 held-out tokens and what the model draws behind them, up to its trained length, at temperature 1, all
through a compressed cache, with the same noise for every cache. The same model with exact attention then says how
likely the text is. A text that repeats itself is likely, too; hence beside the loss the divergence, at every token
drawn, of the distribution that it was drawn from to the exact one's. Policies that drop tokens get a quarter of the
exact cache's bytes; codecs take what they take.

LongBench, RULER and the reasoning tasks that the field decodes with such caches need a pretrained model of long
context, which cannot be had here.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.kvcache import fixtures
from experiments.kvcache.streaming_cells import Cell, Config, cells, decoder, first_token, scores, starts
from experiments.kvcache.streaming_claims import CLAIMS as CLAIMS
from experiments.lab import Trial, new_figure

PAPER = (
    "Xiao, Tian, Chen, Han, Lewis: Efficient Streaming Language Models with Attention Sinks, ICLR 2024, "
    "arXiv 2309.17453"
)
SYSTEM = "hashml.kvcache.streaming"

SCALES = {
    "tiny": Config(capacities=(16,), sinks=(0, 4), stretch=3, stream_rows=2, policies=("random",), codecs=(),
                   budget=2, prompt=16, prompts=2, seeds=2, size=fixtures.TINY),
    "default": Config(),
    "paper": Config(stream_rows=16, prompts=128, seeds=5, size=fixtures.PAPER),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for layer in range(decoder(config).layers):
        for seed in range(config.seeds):
            key = {**dataclasses.asdict(Cell("sink", "exact")), "layer": layer, "start": None, "seed": seed}
            yield Trial(key, functools.partial(first_token, config, layer, seed))
    for cell in cells(config):
        for seed in range(config.seeds):
            for place, start in enumerate(starts(config, cell.part)):
                key = {**dataclasses.asdict(cell), "layer": None, "start": start, "seed": seed}
                yield Trial(key, functools.partial(_one, config, cell, seed, place))


def _one(config: Config, cell: Cell, seed: int, place: int) -> dict[str, float | int | None]:
    return scores(config, cell)[seed][place]


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    bins = sum(len(starts(config, cell.part)) for cell in cells(config))
    return config.seeds * (decoder(config).layers + bins)


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over the models: attention on BOS; losses of streams in three places, that beyond the trained length over
    that of pieces (of ``recomputed``, over the same tokens of pieces) with its standard error; losses of texts."""
    keys = ["part", "method", "capacity", "sinks", "rope", "layer"]
    rows = _over_pieces(rows)
    last = sorted(rows.filter(pl.col("part") == "stream")["start"].unique())
    quarter = last[-max(1, len(last) // 4)] if last else 0
    beyond = pl.col("start") >= last[1] if len(last) > 1 else pl.lit(True)
    stream = pl.col("part") == "stream"
    of_model = rows.group_by(*keys, "seed", maintain_order=True).agg(
        pl.col("cache_bytes").first(),
        pl.col("nll").filter(stream & (pl.col("start") == 0)).mean().alias("loss, trained length"),
        pl.col("nll").filter(stream & beyond).mean().alias("beyond it"),
        pl.col("nll").filter(stream & (pl.col("start") >= quarter)).mean().alias("last quarter"),
        pl.col("over").filter(stream & beyond).mean().alias("over pieces"),
        pl.col("nll").filter(~stream).mean().alias("loss of texts"),
        pl.col("divergence", "entropy").mean(),
        pl.col("first").mean().alias("attention on BOS"),
        pl.col("highest_head").mean().alias("its highest head"),
        pl.col("next_three").mean().alias("on the next three"),
        pl.col("equal").mean().alias("equal share"),
    )
    means = [pl.col(name).mean() for name in of_model.columns if name not in (*keys, "seed", "cache_bytes")]
    error = pl.coalesce("over pieces", "divergence", "attention on BOS")
    return of_model.group_by(keys, maintain_order=True).agg(
        pl.col("cache_bytes").first().alias("bytes of a row"),
        *means,
        (error.std() / pl.len().sqrt()).alias("standard error"),
    )


def _over_pieces(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows with the loss over that of pieces of the same tokens, less 1."""
    pieces = (pl.col("method") == "pieces") & (pl.col("part") == "stream")
    same = ("part", "seed", "start")
    whole, strided = (pl.col(name).filter(pieces).first().over(same) for name in ("nll", "nll_strided"))
    return rows.with_columns(over=pl.coalesce(pl.col("nll") / whole, pl.col("nll_strided") / strided) - 1)


def figure(rows: pl.DataFrame) -> Figure:
    """Losses of streams over those of pieces, one panel a cache size; attention on BOS; texts that were drawn."""
    drawing, axes = new_figure(2, 2, width=13, height=9)
    streams = _over_pieces(rows).filter(pl.col("part") == "stream")
    capacities = streams["capacity"].drop_nulls().unique().sort().to_list()
    for ax, capacity in zip(axes[:2], capacities, strict=False):
        own = pl.col("capacity").is_null() & (pl.col("method") == "exact")
        _draw_stream(ax, streams.filter((pl.col("capacity") == capacity) | own))
        ax.set_title(f"stream, C = {capacity}")
    _draw_sinks(axes[2], rows.filter(pl.col("part") == "sink"))
    _draw_texts(axes[3], rows.filter(pl.col("part") == "generation"))
    return drawing


def _draw_stream(ax: Axes, rows: pl.DataFrame) -> None:
    names = {"elsewhere": "others protected", "exact": "exact cache", "recomputed": "recomputed"}
    styles: dict[str, dict[str, Any]] = {
        "exact": {"color": "black", "linestyle": "--"}, "recomputed": {"color": "black", "linestyle": ":"},
        "elsewhere": {"color": "0.5", "linestyle": "-."},
    }  # fmt: skip
    for (method, sinks, rope), part in rows.group_by("method", "sinks", "rope", maintain_order=True):
        points = part.group_by("start").agg(pl.col("over").mean()).sort("start").drop_nulls()
        kept = f"S = {sinks}" + (f", {rope}" if sinks else "")
        colour = {0: "C1", 1: "C2", 2: "C4"}.get(int(sinks or 0), "C0")
        own = {"color": colour, "linestyle": "--" if sinks and rope == "write" else "-"}
        ax.plot(points["start"], points["over"], marker="", label=names.get(str(method), kept),
                **styles.get(str(method), own))  # fmt: skip
    ax.set(xlabel="position in the stream", ylabel="loss over that of pieces, less 1")
    ax.set_yscale("symlog", linthresh=0.01)
    ticks = [tick for tick in (-0.1, -0.01, 0, 0.01, 0.1, 1) if ax.get_ylim()[0] <= tick <= ax.get_ylim()[1]]
    ax.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    _legend_above(ax, 3)


def _legend_above(ax: Axes, columns: int) -> None:
    ax.legend(fontsize="x-small", ncols=columns, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def _draw_sinks(ax: Axes, rows: pl.DataFrame) -> None:
    names = {"first": "BOS", "highest_head": "BOS, highest head", "next_three": "the next three tokens together",
             "equal": "equal share"}  # fmt: skip
    points = rows.group_by("layer").agg(*(pl.col(name).mean() for name in names)).sort("layer")
    for name, label in names.items():
        ax.plot(points["layer"], points[name], label=label)
    ax.set(xlabel="layer", ylabel="attention, queries of the second half", yscale="log", title="sink")
    ax.set_xticks(points["layer"].to_list())
    _legend_above(ax, 2)


def _draw_texts(ax: Axes, rows: pl.DataFrame) -> None:
    exact = pl.col("nll").filter(pl.col("method") == "full").mean().over("seed")
    models = rows.with_columns(exact=exact).group_by("method", "seed", maintain_order=True)
    means = models.agg(
        (pl.col("divergence").mean() / pl.col("exact").first()).alias("divergence"),
        (pl.col("nll").mean() / pl.col("exact").first() - 1).alias("text"),
    )
    methods = means["method"].unique(maintain_order=True).to_list()[::-1]
    for column, label, shift in (("divergence", "divergence over the exact texts' loss", 0.12),
                                 ("text", "loss of texts over the exact ones', less 1", -0.12)):  # fmt: skip
        points = means.group_by("method").agg(
            pl.col(column).mean(), (pl.col(column).std() / pl.len().sqrt()).alias("error")
        )
        at = [methods.index(method) + shift for method in points["method"]]
        ax.errorbar(points[column], at, xerr=points["error"], linestyle="", label=label)
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.set_yticks(range(len(methods)), labels=methods)
    ax.set(xlabel="part of the loss; bars are standard errors over the models", ylabel="cache", title="texts")
    _legend_above(ax, 1)
