"""Figure of `experiments.sparse.deja_vu`: a colour is one way to choose in every panel."""

from collections.abc import Iterator

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.lab import new_figure

NAMES = {
    "dense": "dense",
    "oracle": "oracle",
    "static": "most frequent",
    "magnitude": "largest weights",
    "static_bytes": "most frequent, in the predictor's bytes",
    "random": "random",
    "fewer": "dense of fewer neurons",
    "gathered": "gathered",
    "predicted": "predicted and gathered",
}
STYLES = {
    "oracle": "k*-",
    "random": "k:",
    NAMES["static"]: "C0s--",
    NAMES["magnitude"]: "C1s--",
    NAMES["static_bytes"]: "C2s--",
}
PREDICTORS = ("C3o-", "C4o-", "C5o-")


def with_ratios(rows: pl.DataFrame) -> pl.DataFrame:
    """Seconds over those of the dense perceptron in the same repetition."""
    if "seconds" not in rows.columns:
        return rows
    base = pl.col("seconds").filter((pl.col("part") == "speed") & (pl.col("method") == "dense")).first()
    return rows.with_columns((pl.col("seconds") / base.over("part", "place")).alias("ratio"))


def figure(rows: pl.DataFrame) -> Figure:
    """Loss against the share of neurons and against bytes, loss against heads, unions and times."""
    drawing, axes = new_figure(3, 2, width=16, height=9)
    _quality(axes[0], rows, "neurons", "kept", "share of neurons kept")
    _quality(axes[1], rows, "neurons", "perceptron_bytes", "bytes of neurons and predictors a token")
    _quality(axes[2], rows, "heads", "heads_kept", "share of heads kept")
    _recalls(axes[3], rows)
    _unions(axes[4], rows)
    _times(axes[5], rows)
    for ax in axes[4:]:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="small")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        drawing.legend(handles, labels, loc="outside lower center", ncols=4)
    return drawing


def _lines(rows: pl.DataFrame, part: str) -> Iterator[tuple[str, str, pl.DataFrame]]:
    """Label, style and rows of each way to choose."""
    chosen = rows.filter((pl.col("part") == part) & (pl.col("method") != "dense"))
    distances = sorted(rows["lookahead"].drop_nulls().unique()) if "lookahead" in rows.columns else []
    for (method, ahead), own in chosen.group_by("method", "lookahead", maintain_order=True):
        known = NAMES.get(str(method))
        if known is None:
            yield f"predictor, look-ahead {ahead}", PREDICTORS[distances.index(ahead) % len(PREDICTORS)], own
        else:
            yield known, STYLES[known], own


def _quality(ax: Axes, rows: pl.DataFrame, part: str, x: str, label: str) -> None:
    dense = rows.filter((pl.col("part") == "neurons") & (pl.col("method") == "dense"))
    if "nll" not in rows.columns or dense.is_empty():
        return
    exact = dense.select("seed", pl.col("nll").alias("exact"))
    for name, style, own in _lines(rows, part):
        points = (
            own.join(exact, on="seed")
            .with_columns((pl.col("nll") / pl.col("exact") - 1).alias("excess"))
            .group_by(x)
            .agg(pl.col("excess").mean(), (pl.col("excess").std() / pl.len().sqrt()).alias("error"))
            .sort(x)
        )
        ax.errorbar(points[x], points["excess"], points["error"].fill_null(0), fmt=style, label=name)
    ax.set(xlabel=label, ylabel="loss over the dense model's, less 1")
    ax.set_yscale("symlog", linthresh=0.01)


def _recalls(ax: Axes, rows: pl.DataFrame) -> None:
    for name, style, own in _lines(rows, "neurons"):
        points = own.group_by("kept").agg(pl.col("recall").mean()).sort("kept")
        ax.plot(points["kept"], points["recall"], style, label=name)
    ax.set(xlabel="share of neurons kept", ylabel="active neurons in the list")


def _unions(ax: Axes, rows: pl.DataFrame) -> None:
    part = rows.filter(pl.col("part") == "union")
    if part.is_empty():
        return
    points = part.group_by("place").agg(pl.col("union_share").mean()).sort("place")
    ax.plot(points["place"], points["union_share"], "o-", label="predictor")
    kept = float(part["kept"][0])
    batch = np.asarray(points["place"], float)
    ax.plot(batch, 1 - (1 - kept) ** batch, "k:", label="independent lists")
    ax.set(xscale="log", xlabel="rows of a batch", ylabel="share of neurons in the union", ylim=(0, 1.05))


def _times(ax: Axes, rows: pl.DataFrame) -> None:
    part = with_ratios(rows).filter((pl.col("part") == "speed") & (pl.col("method") != "dense"))
    for (method,), own in part.group_by("method", maintain_order=True):
        points = own.group_by("kept").agg(
            pl.col("ratio").median(),
            pl.col("ratio").quantile(0.25).alias("low"),
            pl.col("ratio").quantile(0.75).alias("high"),
        ).sort("kept")  # fmt: skip
        middle = points["ratio"].to_numpy()
        spread = np.abs(np.stack([middle - points["low"].to_numpy(), points["high"].to_numpy() - middle]))
        ax.errorbar(points["kept"], middle, spread, fmt="o-", label=NAMES[str(method)])
    ax.axhline(1, color="0.6", linewidth=0.8)
    ax.set(xlabel="share of neurons kept", ylabel="time over the dense perceptron's")
