"""The table of compiled kernels, kept in a README between two markers."""

import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]

BEGIN, END = "<!-- aot: begin -->", "<!-- aot: end -->"
_HEADS = (
    "chip",
    "op",
    "case",
    "pass",
    "must move",
    "program",
    "registers",
    "spills",
    "shared memory or VMEM",
    "temporaries",
)
_FIXED = 6
"""Columns that do not depend on the version of a compiler."""


def title(row: Row) -> str:
    return f"{row['chip']}, {row['op']}, {row['case']}, {row['direction']}"


def markdown(rows: list[Row]) -> list[str]:
    """A line a problem and chip; kernels of one program side by side."""
    lines = [_line(_HEADS), _line(["---"] * len(_HEADS))]
    return lines + [_line(_cells(row)) for row in rows]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Row) -> list[str]:
    kernels = row["kernels"]

    def joined(name: str, form: Callable[[int], str] = str) -> str:
        return ", ".join(form(kernel[name]) for kernel in kernels if kernel[name] is not None)

    program = ", ".join(k["name"] for k in kernels) or f"XLA ({row['refusal'].partition(';')[0]})"
    return [
        row["chip"],
        row["op"],
        row["case"],
        row["direction"],
        _size(row["bytes"]),
        "does not compile" if row["failures"] and not kernels else program,
        joined("registers"),
        joined("spills"),
        joined("on_chip_bytes", _size),
        "" if row["temporary_bytes"] is None else _size(row["temporary_bytes"]),
    ]


def _size(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    if count < 1024**2:
        return f"{count / 1024:.0f} KiB"
    return f"{count / 1024**2:.1f} MiB"


def write(rows: list[Row], path: pathlib.Path) -> None:
    """Puts the table between the markers of ``path``."""
    before, _, after = _split(path)
    beside = path.with_name(path.name + ".new")
    beside.write_text("\n".join([f"{before}{BEGIN}", *markdown(rows), f"{END}{after}"]))
    os.replace(beside, path)


def differences(rows: list[Row], path: pathlib.Path) -> list[str]:
    """Lines of the README's table and of the rows that the other lacks, by what no compiler version moves."""
    _, kept, _ = _split(path)
    kept = {_fixed(line) for line in kept.strip().splitlines()}
    now = {_fixed(line) for line in markdown(rows)}
    return [f"only in {path.name}: {line}" for line in sorted(kept - now)] + [
        f"not in {path.name}: {line}" for line in sorted(now - kept)
    ]


def _fixed(line: str) -> str:
    return _line([cell.strip() for cell in line.strip("| ").split("|")[:_FIXED]])


def _split(path: pathlib.Path) -> tuple[str, str, str]:
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} must hold the markers {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    kept, after = rest.split(END)
    return before, kept, after
