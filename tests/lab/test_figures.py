"""Figures look alike and come out the same."""

import matplotlib as mpl
import polars as pl
import pytest

from experiments.lab import figures, new_figure

ROWS = pl.DataFrame({"budget": [1, 10, 100], "auc": [0.6, 0.7, 0.75]})


def plot(rows):
    figure, (left, right) = new_figure(columns=2)
    left.plot(rows["budget"], rows["auc"], label="ROBE")
    left.set(xlabel="budget", ylabel="AUC", xscale="log", title="Criteo")
    left.legend()
    right.bar(rows["budget"], rows["auc"])
    return figure


@pytest.mark.parametrize(("format", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_same_rows_give_the_same_file(format, start):
    first, second = (figures.save(figures.draw(plot, ROWS), format) for _ in range(2))
    assert first == second
    assert first.startswith(start)


def test_the_file_tells_no_date_and_no_version():
    assert mpl.__version__.encode() not in figures.save(figures.draw(plot, ROWS), "png")
    assert b"<dc:date>" not in figures.save(figures.draw(plot, ROWS), "svg")


def test_the_style_holds_inside_and_is_gone_outside():
    mpl.use("agg")  # chosen by the first figure otherwise
    before = mpl.rcParams.copy()
    figure = figures.draw(plot, ROWS)
    assert figure.axes[0].lines[0].get_linewidth() == 1.6
    assert figure.axes[0].lines[0].get_color() == "#0072B2"
    figures.save(figure, "svg")
    assert mpl.rcParams == before


def test_the_axes_come_row_by_row():
    figure, axes = new_figure(columns=3, rows=2, width=9, sharey=True)
    assert axes == figure.axes
    assert len(axes) == 6
    assert figure.get_size_inches().tolist() == [9, 6.4]


def test_a_figure_is_described():
    assert figures.describe(plot(ROWS)) == "Criteo; AUC against budget; lines: ROBE"
    assert figures.describe(new_figure()[0]) == ""
    shared, (axes,) = new_figure()
    axes.plot([0, 1], label="ROBE")
    shared.legend(loc="outside lower center")
    assert figures.describe(shared) == "lines: ROBE"
