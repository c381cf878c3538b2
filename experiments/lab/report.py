"""What the committed rows say of every claim; the renderings take it from here."""

import contextlib
import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from experiments.lab import formatting, records
from experiments.lab.claims import Claim, Judgement, Verdict, judge
from experiments.lab.environment import ROOT, describe_device
from experiments.lab.errors import NotEnoughRows, UserError
from experiments.lab.experiment import SCALES, Experiment
from experiments.lab.records import ROWS, Record
from experiments.lab.trial import Number

RESULTS_DIR = ROOT / "experiments" / "results"
"""The committed records: ``<experiment>/<scale>/``."""


class ReportError(UserError):
    """The results cannot be reported as they are."""


@dataclass(frozen=True)
class Run:
    """A record and what it says of the claims."""

    experiment: Experiment
    scale: str
    record: Record
    judgements: tuple[Judgement, ...]
    changed: dict[str, Any]
    """Fields of the config that are not the scale's own, with the value they were run with."""

    @property
    def device(self) -> str:
        return describe_device(self.record.environment)

    @property
    def date(self) -> str:
        """The day the run was started, UTC."""
        return str(self.record.environment.get("date", "unknown"))[:10]

    @property
    def command(self) -> str:
        """The line that runs it again."""
        words = ["python", "-m", "experiments", "run", self.experiment.name]
        if self.scale != "default":
            words += ["--scale", self.scale]
        for name, value in self.changed.items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
        return shlex.join(words)

    @property
    def circumstances(self) -> str:
        """Device, date and what else a reader has to know of the run, in a line."""
        environment = self.record.environment
        parts = [self.device, self.date]
        parts += [f"{len(self.record.rows)} rows in {formatting.duration(self.record.seconds)}"]
        if environment.get("commit"):
            changes = " with uncommitted changes" if environment.get("dirty") else ""
            parts.append(f"commit {environment['commit'][:10]}{changes}")
        parts += [f"{p} {environment[p]}" for p in ("python", "jax") if environment.get(p)]
        if not self.record.complete:
            parts.append("not complete")
        return " · ".join(parts)

    def table(self) -> pl.DataFrame:
        """The experiment's summary of the rows."""
        rows = self.record.rows
        if self.experiment.table is not None and self.record.complete and not rows.is_empty():
            with contextlib.suppress(NotEnoughRows):
                return self.experiment.table(rows)
        return formatting.summary(rows, self.record.key)


@dataclass(frozen=True)
class Section:
    """An experiment and its runs, the most telling scale first."""

    experiment: Experiment
    runs: tuple[Run, ...]

    @property
    def judgements(self) -> tuple[Judgement, ...]:
        """Those of the first run; without one, that there is none."""
        if self.runs:
            return self.runs[0].judgements
        return tuple(Judgement(c, None, "not judged", "no committed rows") for c in self.experiment.claims)


def read_run(experiment: Experiment, scale: str, folder: Path) -> Run | None:
    """Judge what is in a run's folder; None where nothing has been run.

    Raises:
        RecordError: where the folder is damaged.
    """
    record = records.read_record(folder)
    if record is None:
        return None
    judgements = tuple(
        judge(claim, record.rows, scale=scale, complete=record.complete) for claim in experiment.claims
    )
    return Run(experiment, scale, record, judgements, changed_fields(experiment, scale, record.config))


def changed_fields(experiment: Experiment, scale: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, as JSON, that are not those of the experiment's scale."""
    own = records.plain(experiment.scales[scale]) if scale in experiment.scales else {}
    return {name: value for name, value in fields.items() if name not in own or own[name] != value}


def collect(
    experiments: Iterable[Experiment], results: Path = RESULTS_DIR, broken: Iterable[str] = ()
) -> tuple[Section, ...]:
    """Judge the results of the experiments, which are sorted by name.

    Args:
        experiments: all of them, or the one that is asked for.
        results: the folder of records.
        broken: names of experiments that cannot be imported and so are not among ``experiments``.

    Raises:
        ReportError: where an experiment that is broken has results, which would be lost from the report.
        RecordError: where a record is damaged.
    """
    for name in broken:
        if (results / name).exists():
            raise ReportError(f"{results / name} has results, but the experiment cannot be imported")
    sections: list[Section] = []
    for experiment in sorted(experiments, key=lambda e: e.name):
        folders = {scale: results / experiment.name / scale for scale in reversed(SCALES)}
        runs = [read_run(experiment, scale, folder) for scale, folder in folders.items()]
        sections.append(Section(experiment, tuple(run for run in runs if run is not None)))
    return tuple(sections)


def check_owned(sections: Sequence[Section], results: Path) -> None:
    """Raise `ReportError` where the results have a folder that the report does not show."""
    shown = {run.record.folder for section in sections for run in section.runs}
    for folder in sorted(results.glob("*/*/")):
        if folder not in shown:
            raise ReportError(
                f"{folder} belongs to no experiment and scale, or has no rows; "
                f"results are in <experiment>/<{'|'.join(SCALES)}>"
            )


def describe_experiment(experiment: Experiment) -> dict[str, Any]:
    """An experiment as ``list --json`` prints it."""
    return {
        "name": experiment.name,
        "title": experiment.title,
        "system": experiment.system,
        "paper": experiment.paper,
        "scales": list(experiment.scales),
        "claims": [_describe_claim(claim) for claim in experiment.claims],
    }


def describe_section(section: Section) -> dict[str, Any]:
    """An experiment and its results as ``report --json`` prints them.

    The claims carry what the first of the runs says: its ``scale``, ``value``, ``interval`` (low and high;
    null where not finite), ``verdict`` and ``note``; ``runs`` has the same of every scale.
    """
    described = describe_experiment(section.experiment)
    scale = section.runs[0].scale if section.runs else None
    described["claims"] = [
        _describe_claim(j.claim) | {"scale": scale} | _describe_judgement(j) for j in section.judgements
    ]
    described["runs"] = [
        {
            "scale": run.scale,
            "device": run.device,
            "date": run.date,
            "commit": run.record.environment.get("commit"),
            "complete": run.record.complete,
            "changed": run.changed,
            "rows": len(run.record.rows),
            "rows_sha256": _digest(run.record.folder / ROWS),
            "seconds": round(run.record.seconds, 3),
            "claims": [{"id": j.claim.id} | _describe_judgement(j) for j in run.judgements],
        }
        for run in section.runs
    ]
    return described


def to_json(document: Any) -> str:
    """Strict JSON, indented."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def verdict_counts(judgements: Iterable[Judgement]) -> dict[Verdict, int]:
    """Number of claims by verdict."""
    counts: dict[Verdict, int] = {"holds": 0, "fails": 0, "not judged": 0}
    for judgement in judgements:
        counts[judgement.verdict] += 1
    return counts


def _describe_claim(claim: Claim) -> dict[str, Any]:
    return {name: getattr(claim, name) for name in ("id", "text", "paper", "source", "unit")}


def _describe_judgement(judgement: Judgement) -> dict[str, Any]:
    measured = judgement.measured
    return {
        "value": None if measured is None else _finite(measured.value),
        "interval": None if measured is None else [_finite(measured.low), _finite(measured.high)],
        "verdict": judgement.verdict,
        "note": judgement.note,
    }


def _finite(value: Number) -> float | None:
    return float(value) if math.isfinite(value) else None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
