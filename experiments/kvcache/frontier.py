"""Quality against bytes: what each way to make a cache smaller costs, and what two of them cost together.

    python -m experiments run kvcache.frontier      # about 35 minutes on 2 cores, once models and codebooks are there

Loss of a language model (``f1``, held-out WikiText-2, tokens after the middle of 256) and of a published one
(stories260K, on stories that it tells itself), and accuracy of a recall model (final questions of 96 tokens) while
every token goes through the cache, against all bytes of the cache for each token seen: codes, scales, positions,
votes and sums, and the exact window that all share. Policies that drop tokens get 1/2, 1/4 or 1/8 of the exact
cache's bytes, of recall 1/3, too; a codec behind them keeps their tokens in fewer bytes. The exact cache holds
float16; codebooks are learned from 16 k tokens of training text, weighted by Fisher information, and stand apart,
since a model has them once.

``f1_relu_gqa``, a language model whose query heads share key heads in pairs, is scored with a few of them.

A second part, never mixed with the first, compresses a prompt once, after its own exact attention, and then lets the
cache grow: the only way to compare SnapKV, PyramidKV, AdaKV and ThinK. Prompts of the recall model end before the
first question. Tokens a second are those of this reference code on a CPU, all rows of the batch together, each
cache's in turns with the exact one's: a sanity check, no claim. Benchmarks of long contexts (LongBench, RULER) need a
pretrained model of long context, and none is at hand.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.kvcache import fixtures
from experiments.kvcache.frontier_cells import Cell, Config, cells, scores
from experiments.kvcache.frontier_claims import CLAIMS as CLAIMS
from experiments.lab import Trial, new_figure

PAPER = (
    "Liu, Desai, Liao, Wang, Xie, Xu, Kyrillidis, Shrivastava: Scissorhands, NeurIPS 2023, arXiv 2305.17118; "
    "Zhang, Yi, Xu, Shrivastava: KV Cache is 1 Bit Per Channel (coupled quantization), NeurIPS 2024, arXiv 2405.03917"
)
SYSTEM = "hashml.kvcache"


SCALES = {
    "tiny": Config(models=("f1",), budgets=(2,), together_budgets=(2,), policies=(),
                   codecs=("coupled:8c8b",), together=("scissorhands+int4",), prompt=("snapkv",), grouped=(), seeds=2,
                   recall_seeds=2, size=fixtures.TINY),
    "default": Config(),
    "paper": Config(models=("f1", "f1_relu_gqa", "recall", "stories"), seeds=5, size=fixtures.PAPER),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config):
        for seed in range(config.trained(cell.fixture)):
            key = {**dataclasses.asdict(cell), "seed": seed}
            yield Trial(key, functools.partial(_seed, config, cell, seed))


def _seed(config: Config, cell: Cell, seed: int) -> dict[str, float | int | None]:
    return scores(config, cell)[seed]


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return sum(config.trained(cell.fixture) for cell in cells(config))


# --- what is shown ------------------------------------------------------------------------------------

FAMILIES = {
    "int8": "int8, int4, int2",
    "int4": "int8, int4, int2",
    "int2": "int8, int4, int2",
    "kivi:4": "KIVI",
    "kivi:2": "KIVI",
    "coupled:2c8b": "CQ 2c8b, 4c8b, 8c10b, 8c8b",
    "coupled:4c8b": "CQ 2c8b, 4c8b, 8c10b, 8c8b",
    "coupled:8c10b": "CQ 2c8b, 4c8b, 8c10b, 8c8b",
    "coupled:8c8b": "CQ 2c8b, 4c8b, 8c10b, 8c8b",
}
"""Codecs that are one line of the figure."""
SPEED = ("speed", "speed_low", "speed_high")
"""Tokens a second over the exact cache's, and the bounds of its interval."""
PROTOCOLS = {"decode": "token by token", "prompt": "compressed prompt"}


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Quality, mean over the models, beside bytes. The standard error is of the accuracy, or of the loss over that of
    the exact cache. Speed is a sanity check alone: of this reference code on a CPU, over the exact cache's, with the
    95 % interval of the ratio."""
    quality = pl.coalesce("accuracy", "excess")
    return (
        _with_excess(rows)
        .group_by("fixture", "protocol", "method", "budget", maintain_order=True)
        .agg(
            pl.col("bytes_per_token").first().alias("bytes/token"),
            pl.col("nll").mean(),
            pl.col("excess").mean().alias("over exact"),
            pl.col("rehearsed").mean(),
            pl.col("unrehearsed").mean(),
            (quality.std() / pl.len().sqrt()).alias("standard error"),
            pl.col("tokens_kept").mean().alias("tokens kept"),
            pl.col("table_bytes").first().alias("codebooks, once a model"),
            pl.col("tokens_per_second").first().round(0).alias("tokens/s, CPU"),
            pl.col("speed").first().alias("speed over exact"),
            pl.col("speed_low").first().alias("from"),
            pl.col("speed_high").first().alias("to"),
        )
    )


def _with_excess(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows with the loss over that of the same model's exact cache, less 1: models differ by more than caches."""
    exact = pl.col("nll").filter(pl.col("method") == "full").first().over("fixture", "protocol", "seed")
    untimed = [name for name in ("tokens_per_second", *SPEED) if name not in rows.columns]
    rows = rows.with_columns(pl.lit(None, pl.Float64).alias(name) for name in untimed)
    return rows.with_columns((pl.col("nll") / exact - 1).alias("excess"))


def figure(rows: pl.DataFrame) -> Figure:
    """Loss over the exact cache's, or accuracy, and tokens a second against bytes for each token seen, log axis: one
    line a method, one row a model."""
    rows = _with_excess(rows).with_columns(pl.col("method").replace(FAMILIES).alias("line"))
    styles = _styles(rows["line"].unique(maintain_order=True).to_list())
    fixtures_ = rows["fixture"].unique(maintain_order=True).to_list()
    drawing, axes = new_figure(3, len(fixtures_), width=16, height=4.3 * len(fixtures_) + 1.3)
    for place, fixture in enumerate(fixtures_):
        part = rows.filter(pl.col("fixture") == fixture)
        quality, label = "excess", "loss over the exact cache's, less 1"
        if fixture == "recall":
            quality, label = "accuracy", "accuracy, final questions"
        decoded, prompted = (part.filter(pl.col("protocol") == name) for name in PROTOCOLS)
        columns = ((decoded, quality, label), (decoded, "speed", "tokens/s over the exact cache's"),
                   (prompted, quality, label))  # fmt: skip
        for ax, (shown, metric, said) in zip(axes[3 * place :], columns, strict=False):
            _panel(ax, shown, metric, styles)
            title = f"{fixture}, {PROTOCOLS['prompt' if shown is prompted else 'decode']}"
            ax.set(xscale="log", xlabel="bytes of cache for each token seen", ylabel=said,
                   title=f"{title}, speed on a CPU" if metric == "speed" else title)  # fmt: skip
    handles = {text: line for ax in axes for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize="small")
    return drawing


def _styles(lines: list[str]) -> dict[str, dict[str, Any]]:
    """A look for every line, the same in all panels."""
    # More lines than colours: each round of them has its own dashes and markers.
    rounds = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))
    found: dict[str, dict[str, Any]] = {}
    for place, line in enumerate(line for line in lines if line not in ("full", "random")):
        dashes, marker = rounds[place // 7 % 4]
        found[line] = {"color": f"C{place % 7}", "linestyle": dashes, "marker": marker}
    found["full"] = {"color": "black", "marker": "*", "markersize": 12, "linestyle": "none"}
    found["random"] = {"color": "black", "linestyle": ":", "linewidth": 2.5, "marker": "."}
    return found


def _panel(ax: Axes, rows: pl.DataFrame, quality: str, styles: dict[str, dict[str, Any]]) -> None:
    rows = rows.filter(pl.col(quality).is_not_null())
    for line in rows["line"].unique(maintain_order=True):
        points = (
            rows.filter(pl.col("line") == line)
            .group_by("bytes_per_token")
            .agg(pl.col(quality).mean(), (pl.col(quality).std() / pl.len().sqrt()).alias("error"))
            .sort("bytes_per_token")
        )
        ax.errorbar(points["bytes_per_token"], points[quality], points["error"], label=line, **styles[line])
        if line == "full":
            ax.axhline(float(points[quality][0]), color="0.6", linewidth=0.8)
    most = rows[quality].max()
    if quality == "excess" and isinstance(most, float) and most > 1:
        # One cache that breaks a model would press all others onto the axis.
        ax.set_yscale("symlog", linthresh=0.05)
