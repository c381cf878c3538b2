"""What the commands print: tables of experiments, of claims and of summaries."""

from typing import Any

import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.lab import formatting
from experiments.lab.claims import Verdict
from experiments.lab.experiment import Experiment
from experiments.lab.formatting import NOTHING
from experiments.lab.report import Run, Section

WIDTH = 120
"""Columns where the output is no terminal."""

_STYLES: dict[Verdict, str] = {"holds": "green", "fails": "red", "not judged": "dim"}


def console(*, stderr: bool = False) -> Console:
    """A console that writes plain lines where its stream is no terminal."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=WIDTH, color_system=None)


def experiments_table(experiments: list[Experiment]) -> Table:
    """A line an experiment."""
    table = Table("experiment", "title", "scales", "claims")
    for e in experiments:
        table.add_row(e.name, escape(e.title), " ".join(e.scales), str(len(e.claims)))
    return table


def claims_table(section: Section) -> Table:
    """A line a claim, with the verdict of the section's first run."""
    table = Table("claim", "paper", "ours", "verdict", show_lines=True)
    for j in section.judgements:
        ours = NOTHING if j.measured is None else formatting.interval(j.measured, j.claim.unit)
        note = f"\n[dim]{escape(j.note)}[/dim]" if j.note else ""
        verdict = f"[{_STYLES[j.verdict]}]{j.verdict}[/]"
        table.add_row(escape(j.claim.text), escape(j.claim.paper), escape(ours) + note, verdict)
    return table


def frame_table(frame: pl.DataFrame) -> Table:
    """A table of polars."""
    table = Table(*map(escape, frame.columns))
    for row in frame.iter_rows():
        table.add_row(*(escape(formatting.cell(value)) for value in row))
    return table


def print_run(console: Console, run: Run) -> None:
    """Summary and claims of a run."""
    console.print(escape(f"scale {run.scale}: {run.circumstances}"), highlight=False)
    table = run.table()
    if not table.is_empty():
        console.print(frame_table(table))
    console.print(claims_table(Section(run.experiment, (run,))))


def print_section(console: Console, section: Section) -> None:
    """An experiment with all of its runs."""
    experiment = section.experiment
    console.print(f"[bold]{experiment.name}[/bold]: {escape(experiment.title)}", highlight=False)
    console.print(escape(experiment.paper), highlight=False)
    for run in section.runs:
        print_run(console, run)
    if not section.runs:
        console.print(claims_table(section))


def sweep_frame(runs: list[Run]) -> pl.DataFrame:
    """The summaries of a sweep's runs, one below the other, after the fields that tell them apart."""
    names = _swept(runs)
    frames: list[pl.DataFrame] = []
    for run in runs:
        table = run.table()
        point = _point(names, run)
        labels = [pl.lit(value).alias(name) for name, value in point.items() if name not in table.columns]
        frames.append(table.select(*labels, pl.all()))
    return pl.concat(frames, how="diagonal_relaxed")


def sweep_claims(runs: list[Run]) -> pl.DataFrame:
    """What each run of a sweep says of each claim."""
    names = _swept(runs)
    lines = [
        _point(names, run)
        | {
            "claim": j.claim.id,
            "ours": NOTHING if j.measured is None else formatting.interval(j.measured, j.claim.unit),
            "verdict": j.verdict,
        }
        for run in runs
        for j in run.judgements
    ]
    return pl.DataFrame(lines)


def _swept(runs: list[Run]) -> list[str]:
    """The fields in which the runs' configs differ."""
    first, *others = (run.record.config for run in runs)
    return [name for name, value in first.items() if any(other[name] != value for other in others)]


def _point(names: list[str], run: Run) -> dict[str, Any]:
    """The values of the swept fields in a run, as text."""
    return {name: formatting.cell(run.record.config[name]) for name in names}
