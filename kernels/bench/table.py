"""Rows as text."""

from typing import Any

Row = dict[str, Any]

_HEADS = ("op", "case", "pass", "implementation", "median", "quartiles", "bound", "of bound", "over XLA")


def line(row: Row) -> str:
    """One row, to be read while the others are measured."""
    return "  ".join(_cells(row))


def text(rows: list[Row]) -> str:
    """All rows of one run under the device they ran on, columns aligned."""
    if not rows:
        return "nothing was measured"
    first = rows[0]
    cells = [_HEADS, *map(_cells, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_HEADS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    head = f"{first['device']} ({first['platform']}), jax {first['jax']}, {first['date']}; bound by "
    return "\n".join([f"{head}{first['bandwidth'] / 1e9:.0f} GB/s ({first['bandwidth_source']})", *lines])


def _cells(row: Row) -> tuple[str, ...]:
    name = (row["op"], row["case"], row["direction"], row["implementation"])
    if row["failure"]:
        return (*name, row["failure"].splitlines()[0], "", "", "", "")
    ratio = "" if row["over_xla"] is None else f"{row['over_xla']:.2f}"
    return (
        *name,
        _time(row["seconds"]),
        f"{_time(row['seconds_q1'])} to {_time(row['seconds_q3'])}",
        _time(row["bound_seconds"]),
        f"{row['of_bound']:.0%}",
        ratio,
    )


def _time(seconds: float) -> str:
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
