"""Click logs as text, a row a line, read in chunks: memory is bounded by the chunk, not the file.

polars parses a chunk; what it would let pass (a line cut short reads as missing values) is checked
first, and a line that does not say what the format promises is reported by file and number. Files
may be gzipped, whatever their names say.
"""

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float32, Int8, Int64

from experiments.data.clicks import ClickLog, Splits, concatenate
from experiments.data.vocabulary import Encoder, Vocabulary, reindex

Kind = Literal["label", "dense", "hex", "decimal", "skip"]
Progress = Callable[[int], object]

_LEGAL: dict[Kind, tuple[re.Pattern[bytes], str]] = {
    "label": (re.compile(rb"[01]"), "0 or 1"),
    "dense": (re.compile(rb"(-?\d{1,18})?"), "an integer, or nothing"),
    "hex": (re.compile(rb"([0-9a-fA-F]{8})?"), "8 hexadecimal digits, or nothing"),
    "decimal": (re.compile(rb"(-?\d{1,18})?"), "an integer, or nothing"),
    "skip": (re.compile(rb"[^\r\n]*"), "text"),
}

_TYPES = {"label": pl.Int8, "dense": pl.Int64, "decimal": pl.Int64, "hex": pl.String, "skip": pl.String}


class RawClicks(NamedTuple):
    """Rows as the text has them: categorical fields are raw numbers, missing ones 0."""

    ids: Int64[np.ndarray, "N T"]
    dense: Float32[np.ndarray, "N D"]
    labels: Int8[np.ndarray, " N"]


@dataclass(frozen=True)
class TextFormat:
    """What the columns of a line are.

    Attributes:
        name: of the format, for messages.
        separator: between columns.
        columns: name and kind of each: ``label`` 0 or 1; ``dense`` integers, read as
            ``log(1 + max(x, 0))``, missing 0 (Naumov et al., arXiv 1906.00091); ``hex`` categories
            of 8 hexadecimal digits and ``decimal`` ones, missing 0; ``skip`` is not read.
        header: the first line of a file names the columns.
    """

    name: str
    separator: str
    columns: tuple[tuple[str, Kind], ...]
    header: bool = False

    def names(self, *kinds: Kind) -> tuple[str, ...]:
        """Names of the columns of these kinds."""
        return tuple(name for name, kind in self.columns if kind in kinds)

    def parse(self, lines: list[bytes], *, path: Path, first_line: int = 1) -> RawClicks:
        """Read some whole lines.

        Args:
            lines: each with its line end (the last one may lack it).
            path: the file they come from, for messages.
            first_line: number of the first one in the file, from 1.

        Raises:
            ValueError: a line has too few or too many columns, or one of them is not of its kind.
        """
        separators = len(self.columns) - 1
        mark = self.separator.encode()
        if any(line.count(mark) != separators for line in lines):
            raise self._bad_line(lines, path, first_line)
        try:
            frame = pl.read_csv(
                io.BytesIO(b"".join(lines)),
                separator=self.separator,
                has_header=False,
                quote_char=None,
                schema={name: _TYPES[kind] for name, kind in self.columns},
                columns=[place for place, (_, kind) in enumerate(self.columns) if kind != "skip"],
            )
            # A number cut short is still a number, and so is one with a sign: another category.
            text = pl.col(self.names("hex")).str
            whole = text.len_bytes().eq(8) & ~text.starts_with("-") & ~text.starts_with("+")
            labels = frame[self.names("label")[0]].to_numpy()
            legal = all(map(all, frame.select(whole.all()).rows()))
            if not legal or labels.dtype != np.int8 or not np.isin(labels, (0, 1)).all():
                raise self._bad_line(lines, path, first_line)
            frame = frame.with_columns(text.to_integer(base=16))
        except pl.exceptions.PolarsError as error:
            raise self._bad_line(lines, path, first_line) from error
        dense = np.zeros((len(lines), len(self.names("dense"))), dtype=np.float32)
        for column, name in enumerate(self.names("dense")):
            dense[:, column] = frame[name].fill_null(0).clip(0).log1p()
        ids = frame.select(self.names("hex", "decimal")).fill_null(0).to_numpy()
        return RawClicks(np.ascontiguousarray(ids), dense, labels)

    def _bad_line(self, lines: list[bytes], path: Path, first_line: int) -> ValueError:
        """The first line that breaks the format; slow, so only asked when one does."""
        for number, line in enumerate(lines, start=first_line):
            fields = line.removesuffix(b"\n").split(self.separator.encode())
            where = f"{path}, line {number}: "
            if len(fields) != len(self.columns):
                return ValueError(
                    f"{where}{len(fields)} columns, but the {self.name} format has {len(self.columns)}; "
                    "the line is cut short or the file is of another format"
                )
            for (name, kind), field in zip(self.columns, fields, strict=True):
                legal, words = _LEGAL[kind]
                if not legal.fullmatch(field):
                    return ValueError(f"{where}column {name!r} is {field[:40]!r}, must be {words}")
        last = first_line + len(lines) - 1
        return ValueError(f"{path}, lines {first_line} to {last}: not readable as the {self.name} format")


@dataclass(frozen=True)
class ClickText:
    """A click log in text files, read one chunk at a time.

    Attributes:
        files: read in this order; a chunk never spans two files.
        format: of every file.
        chunk_rows: rows of a chunk, which bound the memory.
        start, stop: rows of all files together that are read; None reads to the end.
        process_index, process_count: of the processes of a data-parallel run, each parses its own
            equal part of every chunk. A chunk that is no multiple of ``process_count`` loses its
            last rows (fewer than ``process_count``), so that all processes have equally many.

    Raises:
        ValueError: an argument is out of range.
    """

    files: tuple[Path, ...]
    format: TextFormat
    chunk_rows: int = 65_536
    start: int = 0
    stop: int | None = None
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files=() names no file")
        if self.chunk_rows < 1:
            raise ValueError(f"chunk_rows={self.chunk_rows} must be at least 1")
        if self.start < 0 or (self.stop is not None and self.stop < self.start):
            raise ValueError(f"start={self.start}, stop={self.stop} must be 0 <= start <= stop")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index={self.process_index} must be from 0 to process_count={self.process_count} - 1"
            )

    def rows(self, start: int, stop: int | None) -> "ClickText":
        """The rows from ``start`` to ``stop`` of all files together."""
        return replace(self, start=start, stop=stop)

    def shard(self, process_index: int, process_count: int) -> "ClickText":
        """The part of one process of a data-parallel run."""
        return replace(self, process_index=process_index, process_count=process_count)

    def count(self) -> int:
        """Rows of all files, whatever ``start`` and ``stop`` are; reads them once."""
        return sum(len(lines) for path in self.files for lines in self._lines(path))

    def raw(self, progress: Progress | None = None) -> Iterator[RawClicks]:
        """Chunks of raw rows, for ``Vocabulary.fit``.

        Args:
            progress: told how many rows of the files have passed, after each chunk.

        Raises:
            ValueError: a line breaks the format, or compressed data ends early.
        """
        passed = 0
        for path in self.files:
            line = 1 + int(self.format.header)
            for lines in self._lines(path):
                low = max(0, self.start - passed)
                high = len(lines) if self.stop is None else min(len(lines), self.stop - passed)
                share = max(0, high - low) // self.process_count
                if share:
                    own = low + self.process_index * share
                    yield self.format.parse(lines[own : own + share], path=path, first_line=line + own)
                line += len(lines)
                passed += len(lines)
                if progress is not None:
                    progress(passed)
                if self.stop is not None and passed >= self.stop:
                    return

    def clicks(self, encoder: Encoder, progress: Progress | None = None) -> Iterator[ClickLog]:
        """Chunks of a click log whose ids are the encoder's; see ``clicks.batches``.

        Raises:
            ValueError: as ``raw``; or the encoder is for another number of fields.
        """
        names = self.format.names("hex", "decimal")
        for raw in self.raw(progress):
            yield ClickLog(encoder.encode(raw.ids), raw.dense, raw.labels, names, encoder.table_sizes)

    def _lines(self, path: Path) -> Iterator[list[bytes]]:
        """The file's lines below the header, ``chunk_rows`` at a time."""
        row = 0
        with _open(path) as file:
            try:
                lines = islice(file, int(self.format.header), None)
                while chunk := list(islice(lines, self.chunk_rows)):
                    row += len(chunk)
                    yield chunk
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path}: compressed data damaged after row {row}: {error}") from error


def text_splits(train: ClickText, test: ClickText, *, validation: float, seed: int) -> Splits[ClickLog]:
    """Two logs that fit in memory, the first one cut at random; ids that its training rows lack are 0.

    Args:
        train: rows to train on and to validate with.
        test: rows to test on.
        validation: part of ``train`` that validates.
        seed: picks it.
    """
    everything = Vocabulary.fit(chunk.ids for text in (train, test) for chunk in text.raw())
    rows, tested = (concatenate(list(text.clicks(everything))) for text in (train, test))
    trained, held_out = rows.split((1 - validation, validation), seed=seed)
    return Splits(*reindex(trained, held_out, tested))


def _open(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """The file's bytes, decompressed when they are gzip's."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if compressed else path.open("rb")
