"""The command line: ``python -m experiments list | run NAME | sweep NAME | report``.

The options of `run` are those below and the fields of the experiment's own ``Config``, so the line is read
twice: once for the name and the scale, then with the parser that tyro makes of that experiment.
"""

import dataclasses
import hashlib
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import tyro
from tyro.conf import FlagConversionOff, FlagCreatePairsOff, OmitArgPrefixes, Positional

from experiments.data.files import ChecksumMismatch, DataNotFound
from experiments.lab import figures, markdown, page, report, runner, terminal
from experiments.lab.environment import ROOT
from experiments.lab.errors import UserError
from experiments.lab.experiment import Experiment, Scale, discover, load
from experiments.lab.records import plain, write_atomically
from experiments.lab.report import RESULTS_DIR, Run, Section

DESCRIPTION = "A runnable experiment behind every claim of every paper."
PROGRAM = "python -m experiments"
MARKERS = (FlagCreatePairsOff,)
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@dataclass(frozen=True)
class ListCommand:
    """Show the experiments."""

    json: bool = False
    """Print JSON: name, title, system, paper, scales and claims of each."""


@dataclass(frozen=True)
class RunOptions:
    """What to begin from, and where the rows go."""

    scale: Scale = "default"
    """tiny takes seconds and is not judged, default suits a small machine, paper is the paper's own size."""
    out: Path = Path("runs")
    """Where the rows go: OUT/NAME/SCALE. Results to be committed go to experiments/results."""
    fresh: bool = False
    """Delete the rows that are there, and measure anew."""


Name = Annotated[str, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True, kw_only=True)
class RunCommand(RunOptions):
    """Measure an experiment, or go on with what was measured of it; NAME --help shows its own fields."""

    name: Positional[Name]
    """The experiment, as in `list`."""


@dataclass(frozen=True)
class SweepCommand(RunCommand):
    """Run an experiment at every combination of the values given for its fields.

    A field that holds one value takes several (--learning-rate 0.1 0.3); one that is a list by itself goes
    to every run as it is. Each run has its own folder OUT/NAME/SCALE+FIELD=VALUE.
    """


@dataclass(frozen=True)
class ReportCommand:
    """Judge the committed rows: write RESULTS.md and results.html, or show one experiment's results."""

    name: Positional[Name | None] = None
    """Show this experiment and write nothing."""
    json: bool = False
    """Print JSON, of all experiments or the one that is named, and write nothing."""
    results: Path = RESULTS_DIR
    """The folder of rows: RESULTS/NAME/SCALE."""
    out_dir: Path = ROOT
    """Where RESULTS.md and results.html are written."""


COMMANDS = {"list": ListCommand, "run": RunCommand, "sweep": SweepCommand, "report": ReportCommand}


def main(argv: Sequence[str] | None = None, package: str = "experiments") -> int:
    """Run a command line; returns the exit status (raises SystemExit where tyro finds it wrong).

    Args:
        argv: the words after the program's name; by default those of this process.
        package: where the experiments are.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files, also those of other libraries
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words, package)
    except (UserError, DataNotFound, ChecksumMismatch) as error:
        terminal.console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:  # while nothing was being measured
        terminal.console(stderr=True).print("interrupted")
        return INTERRUPTED


def _dispatch(words: list[str], package: str) -> int:
    if words[:1] in (["run"], ["sweep"]) and _names_experiment(words[1:]):
        return (_run if words[0] == "run" else _sweep)(words[1:], package)
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, args=words, prog=PROGRAM, description=DESCRIPTION, config=MARKERS
    )
    match command:
        case ListCommand():
            return _list(command, package)
        case ReportCommand():
            return _report(command, package)
        case _:
            raise AssertionError("tyro ends the process where run or sweep has no name")


def _names_experiment(words: list[str]) -> bool:
    """Whether there is a name to ask for its fields; a line with none gets the general help or error."""
    return bool(words) and (not words[0].startswith("-") or not {"-h", "--help"} & set(words))


def _list(command: ListCommand, package: str) -> int:
    found, broken = discover(package)
    _warn_of(broken)
    if command.json:
        print(report.to_json([report.describe_experiment(experiment) for experiment in found]))
    else:
        terminal.console().print(terminal.experiments_table(found))
    return 0


def _warn_of(broken: dict[str, str]) -> None:
    console = terminal.console(stderr=True)
    for reason in broken.values():
        console.print(f"left out: {reason}", markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Request:
    """A run that is asked for."""

    experiment: Experiment
    options: RunOptions
    config: Any


def _parse(words: list[str], package: str, command: str, *, flags: bool = True) -> _Request:
    """Read the line with the fields of the experiment that it names.

    Args:
        words: what follows the command, the experiment's name among it.
        package: where the experiments are.
        command: ``run`` or ``sweep``, for the help.
        flags: a truth value is ``--field`` or ``--no-field``; else ``--field True``.
    """
    program = f"{PROGRAM} {command}"
    asked, _ = tyro.cli(
        COMMANDS[command],
        args=[word for word in words if word not in ("-h", "--help")],
        prog=program,
        return_unknown_args=True,
        add_help=False,
        config=MARKERS,
    )
    experiment = load(asked.name, package)
    if asked.scale not in experiment.scales:
        raise UserError(f"{asked.name} has no scale {asked.scale!r}; it has {', '.join(experiment.scales)}")
    default = experiment.scales[asked.scale]
    fields: Any = type(default) if flags else FlagConversionOff[type(default)]
    arguments = dataclasses.make_dataclass(
        "Arguments",
        [(command, RunOptions), ("experiment", fields, dataclasses.field(default=default))],
    )
    rest = list(words)
    rest.remove(asked.name)
    parsed = tyro.cli(
        arguments,
        args=rest,
        prog=f"{program} {asked.name}",
        description=f"{experiment.description}\n\n{experiment.paper}",
        config=(*MARKERS, OmitArgPrefixes),
    )
    return _Request(experiment, getattr(parsed, command), parsed.experiment)


def _run(words: list[str], package: str) -> int:
    request = _parse(words, package, "run")
    options = request.options
    run = _execute(request, options.out / request.experiment.name / options.scale)
    if run is None:
        return INTERRUPTED
    console = terminal.console()
    terminal.print_run(console, run)
    folder = run.record.folder
    sections = (Section(run.experiment, (run,)),)
    write_atomically(folder / "page.html", page.render(sections, run.experiment.name, overview=False))
    print(folder / "rows.jsonl")
    print(folder / "page.html")
    figure = page.draw(run)
    if figure is not None:
        write_atomically(folder / "figure.png", figures.save(figure, "png"))
        print(folder / "figure.png")
    return 0


def _execute(request: _Request, folder: Path) -> Run | None:
    """Measure into the folder and judge; None after Ctrl-C."""
    options = request.options
    console = terminal.console(stderr=True)
    try:
        runner.execute(
            request.experiment,
            request.config,
            scale=options.scale,
            folder=folder,
            fresh=options.fresh,
            console=console,
        )
    except KeyboardInterrupt:
        again = "the same command without --fresh" if options.fresh else "the same command"
        text = f"interrupted; the rows measured so far are in {folder}, and {again} goes on from them"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return None
    return report.read_run(request.experiment, options.scale, folder)


def _sweep(words: list[str], package: str) -> int:
    if {"-h", "--help"} & set(words):
        _parse(words, package, "sweep", flags=False)
    lines = _points(words, package)
    requests = [_parse(line, package, "sweep", flags=False) for line in lines]
    runs: list[Run] = []
    for request in requests:
        options, experiment = request.options, request.experiment
        changed = report.changed_fields(experiment, options.scale, plain(request.config))
        run = _execute(request, options.out / experiment.name / _point_name(options.scale, changed))
        if run is None:
            return INTERRUPTED
        runs.append(run)
    console = terminal.console()
    console.print(terminal.frame_table(terminal.sweep_frame(runs)))
    console.print(terminal.frame_table(terminal.sweep_claims(runs)))
    for run in runs:
        print(run.record.folder)
    return 0


def _points(words: list[str], package: str) -> list[list[str]]:
    """A line of `run` for each combination of the values of the fields that hold one value each.

    Raises:
        UserError: where no field has several values.
    """
    groups: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            option, _, value = word.partition("=")
            groups.append([option, value] if value else [option])
        else:
            groups[-1].append(word)
    # Only the name and the scale are needed for the types of the fields; the rest is read point by point.
    kept = [g for g in groups if g and (not g[0].startswith("--") or g[0] == "--scale")]
    default = _parse(list(itertools.chain(*kept)), package, "sweep", flags=False).config
    single = {
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(default)
        if not isinstance(getattr(default, field.name), list | tuple | set | frozenset | dict)
    }
    choices = [
        [[group[0], value] for value in group[1:]]
        if group and group[0].replace("_", "-") in single and len(group) > 2
        else [group]
        for group in groups
    ]
    if all(len(choice) == 1 for choice in choices):
        raise UserError("sweep needs several values for a field, as in --learning-rate 0.1 0.3")
    return [list(itertools.chain(*point)) for point in itertools.product(*choices)]


def _point_name(scale: str, changed: dict[str, Any]) -> str:
    """Name of a run's folder: the scale's own, or one that tells the values."""
    if not changed:
        return scale
    text = ",".join(f"{name}={quote(str(value), safe='')}" for name, value in changed.items())
    if len(text) > 150:  # file names have 255 bytes at most
        text = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{scale}+{text}"


def _report(command: ReportCommand, package: str) -> int:
    if command.name is not None:
        sections = report.collect([load(command.name, package)], command.results)
    else:
        found, broken = discover(package)
        _warn_of(broken)
        sections = report.collect(found, command.results, broken)
        report.check_owned(sections, command.results)
    if command.json:
        print(report.to_json([report.describe_section(section) for section in sections]))
    elif command.name is not None:
        terminal.print_section(terminal.console(), sections[0])
    else:
        html = page.render(sections, "hashml: results")
        for name, text in {"RESULTS.md": markdown.render(sections), "results.html": html}.items():
            write_atomically(command.out_dir / name, text)
            print(command.out_dir / name)
    return 0
