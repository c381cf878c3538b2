"""A run's folder: what was asked for, on what it was measured, and the rows, each written when measured.

    config.json        experiment, scale and the fields of its Config
    environment.json   commit, versions and device; ``resumed`` lists others the run was continued on
    state.json         names of the key fields; date and number of rows once the run is complete
    rows.jsonl         a line of strict JSON a row: key fields, measured fields, ``_seconds``

JSON knows no NaN, so a float that is not finite is the text ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``,
and a row may not hold these texts otherwise. A process that is killed leaves whole lines and at most one
torn one at the end, which the next run drops; the other files are replaced in one step.
"""

import dataclasses
import enum
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import polars as pl

from experiments.lab.errors import UserError
from experiments.lab.trial import Row, Scalar

CONFIG, ENVIRONMENT, STATE, ROWS = "config.json", "environment.json", "state.json", "rows.jsonl"
SECONDS = "_seconds"
"""Field of a row with the wall time of its measurement; not part of what two runs have to agree on."""

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RecordError(UserError):
    """A run's folder cannot be used as it is."""


def plain(value: Any) -> Any:
    """The value as JSON holds it: dataclasses to dicts, sequences to lists, paths and enums to text."""
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case enum.Enum():
            return value.name
        case os.PathLike():
            return os.fspath(value)
        case Mapping():
            return {str(k): plain(v) for k, v in value.items()}
        case list() | tuple():
            return [plain(v) for v in value]
        case np.generic():
            return plain(value.item())
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        case _:
            return value


def make_row(key: Mapping[str, Any], measured: Mapping[str, Any], seconds: float) -> Row:
    """The row of a trial.

    Raises:
        ValueError: for a field in both, and as `scalars`.
        TypeError: as `scalars`.
    """
    both = key.keys() & measured.keys()
    if both:
        raise ValueError(f"the measured field {sorted(both)[0]!r} is also in the trial's key")
    return {**scalars(key), **scalars(measured), SECONDS: round(seconds, 6)}


def scalars(fields: Mapping[str, Any]) -> Row:
    """The fields as Python scalars.

    Raises:
        ValueError: for a name that starts with an underscore, a text that stands for a float that is not
            finite, or an integer beyond 64 bits.
        TypeError: for a value that is no scalar.
    """
    row: Row = {}
    for name, value in fields.items():
        if name.startswith("_"):
            raise ValueError(f"the field {name!r} of a row must not start with an underscore")
        scalar = value.item() if isinstance(value, np.generic) else value
        if not isinstance(scalar, bool | int | float | str | None):
            raise TypeError(f"the field {name!r} of a row must be a scalar, got {type(value).__name__}")
        if isinstance(scalar, str) and scalar in _NOT_FINITE:
            raise ValueError(f"the field {name!r} of a row is the text {scalar!r}, which stands for a float")
        if isinstance(scalar, int) and not -(2**63) <= scalar < 2**63:
            raise ValueError(f"the field {name!r} of a row must fit 64 bits, got {scalar}")
        row[name] = scalar
    return row


def encode_row(row: Row) -> bytes:
    """The row's line, its end included."""
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def decode_row(line: bytes) -> Row:
    """The row of a line.

    Raises:
        ValueError: where the line is no JSON object of scalars.
    """
    row = json.loads(line, parse_constant=_refuse)
    if not isinstance(row, dict) or any(isinstance(v, dict | list) for v in row.values()):
        raise ValueError("not an object of scalars")
    return {name: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for name, v in row.items()}


def _refuse(constant: str) -> Scalar:
    raise ValueError(f"{constant} is not JSON")


def key_of(row: Mapping[str, Any], fields: list[str]) -> str:
    """A text that is equal for equal keys."""
    return json.dumps([plain(row[field]) for field in fields])


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside the file, then put it in its place: a reader sees the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    with open(beside, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, document: Any) -> None:
    """Write a document of the folder; indented, since people read and compare it."""
    write_atomically(path, json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """A document of the folder, or None where there is no such file."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RecordError(f"{path} is not JSON: {error}; delete it or measure anew with --fresh") from None
    if not isinstance(document, dict):
        raise RecordError(f"{path} is not a JSON object; delete it or measure anew with --fresh")
    return document


def parse_rows(content: bytes, path: Path) -> tuple[list[Row], int]:
    """The rows of a file's content and the length of its whole lines; what follows the last end is torn.

    Raises:
        RecordError: naming file and line where a whole line is no row.
    """
    rows: list[Row] = []
    whole = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
        try:
            rows.append(decode_row(line))
        except ValueError as error:
            text = line[:60].decode(errors="replace")
            raise RecordError(
                f"{path}, line {number}, is not a row ({error}): {text!r}; "
                "repair or delete that line and run again, or measure anew with --fresh"
            ) from None
    return rows, whole


class RowLog:
    """The open ``rows.jsonl`` of a run, for one process at a time.

    Opening it drops a torn last line, or all lines where ``fresh`` is asked for. `append` returns when the
    row is on the disk.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        try:
            _lock(self._file, path)
            if fresh:
                self._file.truncate(0)
            self._file.seek(0)
            self.rows, whole = parse_rows(self._file.read(), path)
            self._file.truncate(whole)
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Row) -> None:
        self._file.write(encode_row(row))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)

    def __enter__(self) -> "RowLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep other processes out until the file is closed or this process ends, however it ends."""
    if sys.platform == "win32":
        return
    import fcntl  # not there on Windows

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RecordError(f"another process is measuring into {path.parent}") from None


@dataclass(frozen=True)
class Record:
    """A run's folder, read."""

    folder: Path
    config: dict[str, Any]
    """The fields of the experiment's Config, as JSON."""
    environment: dict[str, Any]
    key: tuple[str, ...]
    """The fields that identify a row."""
    rows: pl.DataFrame
    complete: bool

    @property
    def seconds(self) -> float:
        """Wall time of all measurements."""
        return float(self.rows[SECONDS].sum()) if SECONDS in self.rows.columns else 0.0


def frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows as a table; a column that mixes whole numbers and floats is one of floats."""
    return pl.DataFrame(rows, infer_schema_length=None)


def read_record(folder: Path) -> Record | None:
    """What a run left in its folder, or None where nothing has been run.

    Raises:
        RecordError: where a file is damaged or missing.
    """
    config, state = read_json(folder / CONFIG), read_json(folder / STATE)
    environment = read_json(folder / ENVIRONMENT)
    rows_file = folder / ROWS
    if config is None and not rows_file.exists():
        return None
    if config is None:
        raise RecordError(f"{folder} has {ROWS} but no {CONFIG}")
    rows, _ = parse_rows(rows_file.read_bytes() if rows_file.exists() else b"", rows_file)
    state = state or {}
    return Record(
        folder=folder,
        config=config["fields"],
        environment=environment or {},
        key=tuple(state.get("key", ())),
        rows=frame(rows),
        complete=state.get("finished") is not None and state.get("rows") == len(rows),
    )
