"""Numbers, intervals and tables as text, the same on the terminal, in RESULTS.md and in results.html."""

import math
from typing import Any

import polars as pl

from experiments.lab.claims import Measured
from experiments.lab.records import SECONDS
from experiments.lab.statistics import standard_error
from experiments.lab.trial import Number

NOTHING = "–"


def number(value: Number) -> str:
    """Four significant digits, whole numbers in full with separators from 10,000 on."""
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e9 else f"{value:.4g}"


def interval(measured: Measured, unit: str = "") -> str:
    """``0.8025 [0.8019, 0.8031] AUC``."""
    text = f"{number(measured.value)} [{number(measured.low)}, {number(measured.high)}]"
    return f"{text} {unit}" if unit else text


def cell(value: Any) -> str:
    """A table's cell."""
    match value:
        case None:
            return NOTHING
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return number(value)
        case _:
            return str(value)


def duration(seconds: Number) -> str:
    """``1.4 s``, ``48 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    whole = round(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def summary(rows: pl.DataFrame, key: tuple[str, ...], seed: str = "seed") -> pl.DataFrame:
    """The table of an experiment that brings none: a line a setting, mean ± standard error over seeds.

    Settings are the key's fields other than ``seed``; measured numbers are averaged, a NaN showing as NaN;
    measured text is left out.
    """
    if rows.is_empty():
        return pl.DataFrame()
    settings = [name for name in key if name != seed]
    measured = [
        name
        for name, kind in rows.schema.items()
        if name not in key and name != SECONDS and (kind.is_numeric() or kind == pl.Boolean)
    ]
    lines: list[dict[str, Any]] = []
    groups = rows.partition_by(settings, maintain_order=True) if settings else [rows]
    for group in groups:
        line: dict[str, Any] = {name: group[name][0] for name in settings}
        if seed in key:
            line["seeds"] = len(group)
        lines.append(line | {name: _mean(group[name].cast(pl.Float64).drop_nulls()) for name in measured})
    return pl.DataFrame(lines, infer_schema_length=None)


def _mean(values: pl.Series) -> str:
    mean = values.mean()
    if not isinstance(mean, float):
        return NOTHING
    if len(values) < 2 or not math.isfinite(mean):
        return number(mean)
    return f"{number(mean)} ± {float(f'{standard_error(values):.2g}'):.4g}"
