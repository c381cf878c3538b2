"""Figures that look alike, are drawn without a display, and come out the same for the same rows."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from experiments.lab.trial import Number

STYLE = Path(__file__).with_name("style.mplstyle")


def new_figure(
    columns: int = 1,
    rows: int = 1,
    *,
    width: Number | None = None,
    height: Number | None = None,
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure in the house style and its axes, row by row.

    It belongs to no window and no global state; nothing has to be closed.

    Args:
        columns: axes beside each other.
        rows: axes above each other.
        width: inches; by default 6.4 for one column and 4 for each of several.
        height: inches; by default 4 for one row and 3.2 for each of several.
        **options: as ``Figure.subplots`` takes them (``sharex``, ``sharey``, ``width_ratios``).
    """
    size = (width or (6.4 if columns == 1 else 4.0 * columns), height or (4.0 if rows == 1 else 3.2 * rows))
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def draw(figure: Callable[[pl.DataFrame], Figure], rows: pl.DataFrame) -> Figure:
    """Call an experiment's ``figure`` in the house style."""
    with mpl.rc_context(fname=STYLE):
        return figure(rows)


def save(figure: Figure, format: Literal["png", "svg"]) -> bytes:
    """The figure's file; the same bytes for the same figure and versions."""
    file = io.BytesIO()
    # Only what would differ between two runs is left out: the date in SVG, the version in PNG.
    metadata = {"Date": None} if format == "svg" else {"Software": None}
    with mpl.rc_context(fname=STYLE):
        figure.savefig(file, format=format, dpi=160, metadata=metadata)
    return file.getvalue()


def describe(figure: Figure) -> str:
    """A text in place of the figure: its titles, and what is drawn against what."""
    parts = [figure.get_suptitle()]
    for axes in figure.axes:
        drawn = f"{axes.get_ylabel()} against {axes.get_xlabel()}"
        parts += [axes.get_title(loc) for loc in ("left", "center", "right")]
        parts.append(drawn if axes.get_xlabel() and axes.get_ylabel() else "")
        parts.append(_lines(axes.get_legend()))
    parts += [_lines(legend) for legend in figure.legends]
    return "; ".join(dict.fromkeys(" ".join(part.split()) for part in parts if part.strip()))


def _lines(legend: Legend | None) -> str:
    labels = [text.get_text() for text in legend.get_texts()] if legend else []
    return f"lines: {', '.join(labels)}" if labels else ""
