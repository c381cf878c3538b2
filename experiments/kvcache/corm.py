"""CORM: adjacent queries are alike, so what none of the last few voted for may go. How much goes, and at what price?

    python -m experiments run kvcache.corm      # about 4 minutes on 2 cores, once the models are there

*Queries*: the mean cosine of adjacent queries beside that of random pairs, layer by layer, before and after rotation.
*Overlap*: the attention of a query on its own key and on those that one of the w queries before it voted for, beside
the share of all keys that these are, which is what a random set of that size would get. Both on exact attention; the
overlap is of queries of the second half.

*Sweep*: every token through the cache, CORM without a budget, w = r. The number of tokens a head keeps follows its
attention; it is averaged over the second half of the sequence of the language model ``f1``, or the final questions of
the recall model, over heads, layers and sequences, and so are the tokens that an exact cache holds by then. H2O,
random eviction and a window get the mean of these *bytes*, rounded up to a token, as a fixed size, with the same r
exact newest tokens. The peak, the largest head at any time, is what a cache without pages must allocate. *Budget*:
the recall model; CORM keeps the tokens with the most votes of the last 16 queries, its rivals take as many bytes.
BOS never leaves, whatever the policy.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.kvcache import fixtures
from experiments.kvcache.corm_cells import Cell, Config, cells, cosines, overlap, scores
from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    Trial,
    highest,
    lowest,
    mean_interval,
    new_figure,
    paired_difference,
)

PAPER = (
    "Dai, Huang, Jiang, Chen, Cai, Bi, Shi: CORM, Cache Optimization with Recent Message for Large Language Model "
    "Inference, 2024, arXiv 2404.15949"
)
SYSTEM = "hashml.kvcache.corm"

SCALES = {
    "tiny": Config(
        models=("f1",), widths=(8,), overlaps=(8,), rivals=("h2o",), seeds=2, recall_seeds=2, size=fixtures.TINY
    ),
    "default": Config(),
    "paper": Config(seeds=5, size=fixtures.PAPER),
}


def run(config: Config) -> Iterator[Trial]:
    for fixture in config.models:
        for seed, layer in itertools.product(range(config.trained(fixture)), range(_depth(config, fixture))):
            key = {"part": "queries", **dataclasses.asdict(Cell(fixture, "attention")), "layer": layer, "seed": seed}
            yield Trial(key, functools.partial(cosines, config, fixture, layer, seed))
            for width in config.overlaps:
                measure = functools.partial(overlap, config, fixture, layer, width, seed)
                yield Trial(key | {"part": "overlap", "width": width}, measure)
    for cell in cells(config):
        part = "sweep" if cell.budget is None else "budget"
        for seed in range(config.trained(cell.fixture)):
            key = {"part": part, **dataclasses.asdict(cell), "layer": None, "seed": seed}
            yield Trial(key, functools.partial(_seed, config, cell, seed))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    layers = sum(_depth(config, fixture) * config.trained(fixture) for fixture in config.models)
    return layers * (1 + len(config.overlaps)) + sum(config.trained(cell.fixture) for cell in cells(config))


def _depth(config: Config, fixture: str) -> int:
    return fixtures.setting(config.size, fixture, "decode").decoder.layers


def _seed(config: Config, cell: Cell, seed: int) -> dict[str, Any]:
    return scores(config, cell)[seed]


# --- claims -------------------------------------------------------------------------------------------

NEAR = 0.02
"""Loss over that of the exact cache that passes for the same."""


def _part(rows: pl.DataFrame, part: str, fixture: str) -> pl.DataFrame:
    found = rows.filter(pl.col("part") == part, pl.col("fixture") == fixture).sort("seed", maintain_order=True)
    if found.is_empty():
        raise NotEnoughRows(f"no rows of {fixture} in the part {part}")
    return found


def _worst_layer(rows: pl.DataFrame, column: str, over: str | None = None) -> Measured:
    """A number, less that of the column ``over``, in the layer and at the w where it is least."""
    found = []
    for (layer, width), part in rows.group_by("layer", "width", maintain_order=True):
        values = part[column].to_numpy() - (0 if over is None else part[over].to_numpy())
        at = "" if width is None else f", w = {width}"
        found.append(dataclasses.replace(mean_interval(values, "models"), note=f"worst: layer {layer}{at}"))
    return lowest(found)


def _alike(rows: pl.DataFrame, suffix: str) -> Measured:
    return _worst_layer(_part(rows, "queries", "f1"), f"adjacent{suffix}", f"random_pairs{suffix}")


def _overlap(rows: pl.DataFrame, over: str | None = None) -> Measured:
    """At w of 16 and more."""
    part = _part(rows, "overlap", "f1").filter(pl.col("width") >= 16)
    if part.is_empty():
        raise NotEnoughRows("no w of 16 or more in the part overlap")
    return _worst_layer(part, "overlap", over)


def _losses(rows: pl.DataFrame, method: str, width: int | None) -> np.ndarray:
    same = pl.col("width").is_null() if width is None else pl.col("width") == width
    found = _part(rows, "sweep", "f1").filter(pl.col("method") == method, same)
    if found.is_empty():
        raise NotEnoughRows(f"no rows of f1 with {method} at w = {width}")
    return found["nll"].to_numpy()


def _least(rows: pl.DataFrame, column: str) -> Measured:
    """The least part of the tokens or bytes that CORM holds with a loss that passes for the exact cache's; all where
    there is none."""
    exact, found = _losses(rows, "full", None), [Measured(1.0, 1.0, 1.0, "at no w is the loss within 2 %")]
    corm = _part(rows, "sweep", "f1").filter(pl.col("method") == "corm")
    for (width,), part in corm.group_by("width", maintain_order=True):
        if mean_interval(part["nll"].to_numpy() / exact - 1).high < NEAR:
            found.append(dataclasses.replace(mean_interval(part[column]), note=f"w = {width}"))
    return min(found, key=lambda one: one.value)


def _over_h2o(rows: pl.DataFrame) -> Measured:
    """Loss over H2O's in equal bytes, less 1, where it is most, at the w that keep half of the tokens or less."""
    corm = _part(rows, "sweep", "f1").filter(pl.col("method") == "corm")
    means = corm.group_by("width", maintain_order=True).agg(pl.col("kept_share").mean())
    found = []
    for width in means.filter(pl.col("kept_share") <= 0.5)["width"]:
        one = mean_interval(_losses(rows, "corm", width) / _losses(rows, "h2o", width) - 1, "models")
        found.append(dataclasses.replace(one, note=f"worst: w = {width}"))
    if not found:
        raise NotEnoughRows("at no w does CORM keep half of the tokens or less")
    return max(found, key=lambda one: one.low)  # the claim is that at no w is it certainly more


def _behind(rows: pl.DataFrame, rival: str) -> Measured:
    """Loss over a rival's in equal bytes, less 1, where it is most, at all w of f1."""
    corm = _part(rows, "sweep", "f1").filter(pl.col("method") == "corm")
    found = []
    for width in corm["width"].unique().sort():
        one = mean_interval(_losses(rows, "corm", width) / _losses(rows, rival, width) - 1, "models")
        found.append(dataclasses.replace(one, note=f"worst: w = {width}"))
    return highest(found)


def _ahead(rows: pl.DataFrame, rival: str) -> Measured:
    """Accuracy without a budget over a rival's in equal bytes, where it is least, at the w that keep half of the
    tokens or less."""
    part = _part(rows, "sweep", "recall")
    corm = part.filter(pl.col("method") == "corm")
    means = corm.group_by("width", maintain_order=True).agg(pl.col("kept_share").mean())
    found = []
    for width in means.filter(pl.col("kept_share") <= 0.5)["width"]:
        one = paired_difference(part.filter(pl.col("width") == width), "corm", rival, "accuracy", on="seed")
        found.append(dataclasses.replace(one, note=f"worst: w = {width}"))
    return lowest(found)


def _lead(rows: pl.DataFrame, rival: str) -> Measured:
    """Accuracy over a rival's in equal bytes, at half of the tokens."""
    part = _part(rows, "budget", "recall").filter(pl.col("budget") == 2)
    return paired_difference(part, "corm", rival, "accuracy", on="seed")


CLAIMS = (
    *(
        Claim(
            f"adjacent{suffix.replace('_', '-')}",
            f"In every layer adjacent queries are more alike than random pairs, {when} rotation",
            paper="adjacent queries are very similar",
            measure=functools.partial(_alike, suffix=suffix),
            holds=lambda measured: measured.low > 0,
        )
        for suffix, when in (("", "before"), ("_rotated", "after"))
    ),
    Claim(
        "overlap",
        "In every layer more than 90 % of the attention is on the query's own key and those with one of the last "
        "votes, at w of 16 and more",
        paper="what matters to a query mattered to a few before it",
        measure=_overlap,
        holds=lambda measured: measured.low > 0.9,
        source="reproduction",
    ),
    Claim(
        "overlap-random",
        "In every layer that is more than a random set of as many keys gets",
        paper="what matters to a query mattered to a few before it",
        measure=functools.partial(_overlap, over="share_of_keys"),
        holds=lambda measured: measured.low > 0,
    ),
    Claim(
        "half",
        "With half of the tokens or less, on average over time, CORM's loss is within 2 % of the exact cache's",
        paper="negligible loss on six LongBench tasks",
        measure=functools.partial(_least, column="kept_share"),
        holds=lambda measured: measured.high <= 0.5,
        source="reproduction",
        unit="of the tokens",
    ),
    Claim(
        "less-memory",
        "With 30 % of the bytes or less, on average over time, it is so, too",
        paper="up to 70 % less memory with negligible loss on six LongBench tasks",
        measure=functools.partial(_least, column="bytes_share"),
        holds=lambda measured: measured.high <= 0.3,
        unit="of the bytes",
    ),
    Claim(
        "h2o",
        "Where it keeps half of the tokens or less, its loss is not above H2O's in equal mean bytes by more than the "
        "interval over models",
        paper="at least as good as H2O at equal budgets",
        measure=_over_h2o,
        holds=lambda measured: measured.low <= 0,
        source="reproduction",
    ),
    *(
        Claim(
            f"sweep-{rival}",
            f"At every w its loss is below that of {title} in equal mean bytes",
            paper="better than StreamingLLM at equal budgets",
            measure=functools.partial(_behind, rival=rival),
            holds=lambda measured: measured.high < 0,
            source="trivial control",
        )
        for rival, title in (("random", "random eviction"), ("window", "a window of the newest tokens"))
    ),
    *(
        Claim(
            f"recall-sweep-{rival}",
            f"Without a budget, at every w with which it keeps half of the tokens or less, it recalls more than "
            f"{title} in equal mean bytes",
            paper="none; every eviction method is to be shown on both models",
            measure=functools.partial(_ahead, rival=rival),
            holds=lambda measured: measured.low > 0,
            source="trivial control",
        )
        for rival, title in (("random", "random eviction"), ("window", "a window of the newest tokens"))
    ),
    *(
        Claim(
            f"recall-{rival}",
            f"With a budget of half of the tokens it recalls more than {title} in equal bytes",
            paper="none; .998 for counts of votes against .67 for random eviction in an earlier study",
            measure=functools.partial(_lead, rival=rival),
            holds=lambda measured: measured.low > 0,
            source="reproduction",
        )
        for rival, title in (("random", "random eviction"), ("window", "a window of the newest tokens"))
    ),
)


# --- what is shown ------------------------------------------------------------------------------------

MEASURED = {"adjacent": "adjacent", "random_pairs": "random pairs", "adjacent_rotated": "adjacent, rotated",
            "random_pairs_rotated": "random pairs, rotated", "overlap": "overlap", "overlap_voted": "without own key",
            "share_of_keys": "share of keys", "nll": "nll", "rehearsed": "rehearsed", "unrehearsed": "unrehearsed",
            "accuracy": "accuracy", "tokens_kept": "tokens kept", "kept_share": "part of tokens",
            "bytes_share": "part of bytes", "peak_share": "peak head"}  # fmt: skip
"""Columns of numbers, and their names in the table."""


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over the models, the standard error beside the quality; layers first, then caches."""
    measured = [name for name in MEASURED if name in rows.columns]
    quality = pl.coalesce(pl.col(name) for name in ("accuracy", "nll", "overlap", "adjacent") if name in measured)
    return (
        rows.group_by("part", "fixture", "layer", "width", "budget", "method", maintain_order=True)
        .agg(*(pl.col(name).mean() for name in measured), (quality.std() / pl.len().sqrt()).alias("standard error"))
        .rename({"width": "w"} | {name: MEASURED[name] for name in measured})
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Cosines and overlap of the language model, layer by layer; its loss over the exact cache's against the bytes;
    recall's accuracy, without a budget and with one."""
    drawing, axes = new_figure(3, 2, width=16, height=8)
    text = rows.filter(pl.col("fixture") == "f1")
    _draw_cosines(axes[0], text.filter(pl.col("part") == "queries"))
    _draw_overlap(axes[1], text.filter(pl.col("part") == "overlap"))
    _draw_sweep(axes[2], text.filter(pl.col("part") == "sweep"))
    recalled = rows.filter(pl.col("fixture") == "recall")
    unlimited = recalled.filter(pl.col("part").eq("sweep") & pl.col("width").is_not_null())
    _draw_recall(axes[3], unlimited, "width", "recall, no budget, rivals in equal mean bytes")
    _draw_recall(axes[4], recalled.filter(pl.col("part") == "budget"), "budget", "recall, equal budgets")
    axes[5].axis("off")
    return drawing


def _means(rows: pl.DataFrame, by: str, *columns: str) -> pl.DataFrame:
    """Means and standard errors over the models."""
    errors = ((pl.col(name).std() / pl.len().sqrt()).alias(f"{name} error") for name in columns)
    return rows.group_by(by).agg(*(pl.col(name).mean() for name in columns), *errors).sort(by)


def _draw_cosines(ax: Axes, rows: pl.DataFrame) -> None:
    names = ("adjacent", "random_pairs", "adjacent_rotated", "random_pairs_rotated")
    points = _means(rows, "layer", *names)
    for name in names:
        style: dict[str, Any] = {
            "linestyle": "--" if "rotated" in name else "-",
            "color": "C0" if "adjacent" in name else "C1",
        }
        style["marker"] = "s" if "rotated" in name else "o"
        ax.errorbar(points["layer"], points[name], points[f"{name} error"], label=MEASURED[name], **style)
    ax.set(xlabel="layer", ylabel="mean cosine of two queries", title="f1, queries")
    ax.set_xticks(points["layer"].to_list())
    ax.legend(fontsize="x-small")


def _draw_overlap(ax: Axes, rows: pl.DataFrame) -> None:
    for (layer,), part in rows.group_by("layer", maintain_order=True):
        points = _means(part, "width", "overlap", "share_of_keys")
        drawn = ax.errorbar(points["width"], points["overlap"], points["overlap error"], marker="o",
                            label=f"layer {layer}")  # fmt: skip
        ax.plot(points["width"], points["share_of_keys"], linestyle=":", color=drawn[0].get_color(),
                label=f"layer {layer}, share of keys")  # fmt: skip
    ax.set(xscale="log", xlabel="queries before, w", ylabel="attention on what they voted for", title="f1, overlap")
    widths = sorted(set(rows["width"]))
    ax.set_xticks(widths, labels=[str(width) for width in widths])
    ax.minorticks_off()
    ax.legend(fontsize="x-small", ncols=2)


def _draw_sweep(ax: Axes, rows: pl.DataFrame) -> None:
    """Loss against mean bytes; of CORM, crosses at its peak, in tokens of one head."""
    exact = pl.col("nll").filter(pl.col("method") == "full").first().over("seed")
    rows = rows.with_columns(excess=pl.col("nll") / exact - 1).filter(pl.col("width").is_not_null())
    for (method,), part in rows.group_by("method", maintain_order=True):
        points = _means(part, "width", "bytes_share", "excess", "peak_share").sort("bytes_share")
        drawn = _draw_line(ax, points, "excess", str(method))
        if method == "corm":
            ax.plot(points["peak_share"], points["excess"], "x", color=drawn, label="corm, peak tokens of a head")
    ax.axhline(0, color="0.4", linestyle="--", label="full")
    ax.set(xlabel="bytes held over those of all tokens seen, mean over time",
           ylabel="loss over the exact cache's, less 1", title="f1, token by token")  # fmt: skip
    ax.legend(fontsize="x-small")


def _draw_recall(ax: Axes, rows: pl.DataFrame, by: str, title: str) -> None:
    for (method,), part in rows.group_by("method", maintain_order=True):
        points = _means(part, by, "bytes_share", "accuracy").sort("bytes_share")
        _draw_line(ax, points, "accuracy", str(method))
    ax.set(xlabel="bytes held over those of all tokens seen", ylabel="accuracy, final questions", title=title)
    if not rows.is_empty():
        ax.legend(fontsize="x-small")


def _draw_line(ax: Axes, points: pl.DataFrame, quality: str, method: str) -> Any:
    """A line against the bytes; returns its colour."""
    style: dict[str, Any] = {"color": "black", "linestyle": ":"} if method == "random" else {}
    x, y, error = (points[name] for name in ("bytes_share", quality, f"{quality} error"))
    return ax.errorbar(x, y, error, marker="o", label=method, **style)[0].get_color()
