"""Measures the trials of an experiment into a folder, and goes on where an earlier process stopped."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.lab import environment, records
from experiments.lab.experiment import Experiment
from experiments.lab.programs import forget_programs
from experiments.lab.progress import Watch, watch
from experiments.lab.records import CONFIG, ENVIRONMENT, ROWS, STATE, Record, RecordError, RowLog
from experiments.lab.trial import Row


def execute(
    experiment: Experiment, config: Any, *, scale: str, folder: Path, fresh: bool, console: Console
) -> Record:
    """Measure every trial of ``experiment.run(config)`` that has no row in the folder yet.

    Args:
        experiment: what to run.
        config: a value of its ``Config``.
        scale: under which name the config goes.
        folder: the run's own; made if it is not there.
        fresh: delete what was measured into the folder before.
        console: where progress is shown.

    Raises:
        RecordError: where the folder holds rows of another config, or of trials that this run does not
            have, or is damaged, or is in use.
        ValueError: where two trials have the same key, or their keys different fields.
    """
    wanted = records.plain({"experiment": experiment.name, "scale": scale, "fields": config})
    with RowLog(folder / ROWS, fresh) as log:
        _claim_folder(folder, wanted, has_rows=bool(log.rows))
        total = experiment.count(config) if experiment.count else None
        with watch(console, experiment.name, total) as progress:
            _measure(experiment, config, folder, log, progress)
    record = records.read_record(folder)
    if record is None:
        raise RecordError(f"{folder} was removed while its rows were measured")
    return record


def _claim_folder(folder: Path, wanted: dict[str, Any], has_rows: bool) -> None:
    """Make the folder one of this config, or refuse because it has rows of another."""
    if not has_rows:
        for name in (ENVIRONMENT, STATE):
            (folder / name).unlink(missing_ok=True)
        records.write_json(folder / CONFIG, wanted)
        return
    found = records.read_json(folder / CONFIG)
    if found == wanted:
        return
    if found is None:
        raise RecordError(f"{folder} has {ROWS} but no {CONFIG}; --fresh deletes the rows and measures anew")
    before, after = _fields(found), _fields(wanted)
    changes = [
        f"{name} is {before.get(name)!r} there and {after.get(name)!r} now"
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    ]
    raise RecordError(
        f"{folder} has rows of another config: {'; '.join(changes)}; "
        "--out takes another folder, --fresh deletes the rows and measures anew"
    )


def _fields(document: dict[str, Any]) -> dict[str, Any]:
    """A config document as one flat dict."""
    return {name: document.get(name) for name in ("experiment", "scale")} | document.get("fields", {})


def _measure(experiment: Experiment, config: Any, folder: Path, log: RowLog, progress: Watch) -> None:
    """Run the generator; every row that it asks for is in the log when it goes on."""
    fields: list[str] | None = None
    saved: dict[str, Row] = {}
    yielded: set[str] = set()
    measured = 0
    for trial in experiment.run(config):
        key = records.scalars(trial.key)
        if fields is None:
            fields = list(key)
            saved = _index(log.rows, fields, log.path)
        if list(key) != fields:
            raise ValueError(f"trials of a run must have the same key fields, got {fields} and {list(key)}")
        identity = records.key_of(key, fields)
        if identity in yielded:
            raise ValueError(f"two trials have the key {key}")
        yielded.add(identity)
        if identity not in saved:
            if not measured:
                _begin(folder, fields)
            progress.begins(key)
            start = time.perf_counter()
            values = trial.measure()
            log.append(records.make_row(key, values, time.perf_counter() - start))
            measured += 1
            forget_programs()
        progress.done(saved=identity in saved)
    stale = [row for identity, row in saved.items() if identity not in yielded]
    if stale:
        raise RecordError(
            f"{log.path} has {len(stale)} rows that this run does not have, such as "
            f"{ {f: stale[0][f] for f in fields or ()} }; the experiment changed since they were measured: "
            "delete these lines, or measure anew with --fresh"
        )
    state = records.read_json(folder / STATE) or {}
    if measured or state.get("rows") != len(log.rows):
        records.write_json(
            folder / STATE, {"key": fields or [], "rows": len(log.rows), "finished": environment.now()}
        )


def _index(rows: list[Row], fields: list[str], path: Path) -> dict[str, Row]:
    """The saved rows by key."""
    index: dict[str, Row] = {}
    for number, row in enumerate(rows, start=1):
        absent = [field for field in fields if field not in row]
        if absent:
            raise RecordError(f"{path}, line {number}, has no field {absent[0]!r} of the trials' key")
        identity = records.key_of(row, fields)
        if identity in index:
            raise RecordError(f"{path}, line {number}, repeats a key; delete that line and run again")
        index[identity] = row
    return index


def _begin(folder: Path, fields: list[str]) -> None:
    """Before the first measurement of this process: write down on what it measures."""
    here = environment.collect()
    first = records.read_json(folder / ENVIRONMENT)
    if first is None:
        records.write_json(folder / ENVIRONMENT, here)
    else:
        known = [first, *first.get("resumed", ())]
        if all(environment.differs(here, other) for other in known):
            first["resumed"] = [*known[1:], here]
            records.write_json(folder / ENVIRONMENT, first)
    records.write_json(folder / STATE, {"key": fields, "rows": None, "finished": None})
