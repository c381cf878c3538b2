"""From the raw numbers of a categorical column to rows of a table.

Two ways, both used with DLRM (Naumov et al., arXiv 1906.00091): ``Modulus`` takes the raw number
modulo the table's size, needs no pass over the data and lets ids collide; ``Vocabulary`` counts what
occurs in one pass and gives each number a row of its own.

Row 0 of a vocabulary stands for every number that was not in the rows it was made of, so a
vocabulary of the training rows tells nothing about the others. Rows 1, 2, ... follow the order of
the numbers, hence do not depend on the order of the rows. DLRM's own script numbers ids by first
appearance over all rows and keeps no row for the unknown.
"""

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from experiments.data.clicks import ClickLog


@dataclass(frozen=True)
class Modulus:
    """Row = number modulo ``modulus``, in each of ``fields`` columns.

    Raises:
        ValueError: ``modulus`` is not positive or is beyond int32.
    """

    modulus: int
    fields: int

    def __post_init__(self) -> None:
        _check_modulus(self.modulus)

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """Rows of each column's table."""
        return (self.modulus,) * self.fields

    def encode(self, raw: Int64[np.ndarray, "N T"]) -> Int32[np.ndarray, "N T"]:
        """Row of each number in its column's table."""
        _check_columns(raw, self.fields)
        return (raw % self.modulus).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The numbers of each column that have a row of their own.

    Attributes:
        values: each column's numbers, ascending; ``values[t][r - 1]`` has row ``r``.
        counts: how often each occurred.
        modulus: numbers were first taken modulo this; None leaves them.
    """

    values: tuple[Int64[np.ndarray, " _"], ...]
    counts: tuple[Int64[np.ndarray, " _"], ...]
    modulus: int | None = None

    @classmethod
    def fit(
        cls, chunks: Iterable[Int64[np.ndarray, "_ T"]], *, modulus: int | None = None, min_count: int = 1
    ) -> "Vocabulary":
        """Count the numbers of every column in one pass; memory grows with distinct numbers, not rows.

        Args:
            chunks: raw numbers, some rows at a time.
            modulus: take the numbers modulo this first, as DLRM's ``max_ind_range`` does.
            min_count: numbers that occur less often share row 0 with the unknown.

        Raises:
            ValueError: there are no rows, or ``modulus`` or ``min_count`` is out of range.
        """
        if modulus is not None:
            _check_modulus(modulus)
        if min_count < 1:
            raise ValueError(f"min_count={min_count} must be at least 1")
        columns: list[_Counts] = []
        for raw in chunks:
            columns = columns or [_Counts() for _ in range(raw.shape[1])]
            for column, numbers in zip(columns, raw.T, strict=True):
                column.add(numbers if modulus is None else numbers % modulus)
        if not columns:
            raise ValueError("a vocabulary of no rows")
        counted = [column.result() for column in columns]
        kept = [(values[counts >= min_count], counts[counts >= min_count]) for values, counts in counted]
        return cls(tuple(values for values, _ in kept), tuple(counts for _, counts in kept), modulus)

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """Rows of each column's table, row 0 included."""
        return tuple(len(values) + 1 for values in self.values)

    def encode(self, raw: Int64[np.ndarray, "N T"]) -> Int32[np.ndarray, "N T"]:
        """Row of each number in its column's table; 0 for one that has none."""
        _check_columns(raw, len(self.values))
        rows = np.zeros(raw.shape, dtype=np.int32)
        for field, values in enumerate(self.values):
            if values.size == 0:
                continue
            numbers = raw[:, field] if self.modulus is None else raw[:, field] % self.modulus
            place = np.minimum(np.searchsorted(values, numbers), values.size - 1)
            rows[:, field] = np.where(values[place] == numbers, place + 1, 0)
        return rows

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file of plain arrays; a file of that name is replaced in one step."""
        arrays: dict[str, Any] = {f"values_{field}": values for field, values in enumerate(self.values)}
        arrays |= {f"counts_{field}": counts for field, counts in enumerate(self.counts)}
        arrays["modulus"] = np.array(self.modulus or 0)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)
            os.replace(beside, path)
        except BaseException:
            os.unlink(beside)
            raise

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as file:
            fields = range(sum(name.startswith("values_") for name in file.files))
            return cls(
                tuple(file[f"values_{field}"] for field in fields),
                tuple(file[f"counts_{field}"] for field in fields),
                int(file["modulus"]) or None,
            )


Encoder = Modulus | Vocabulary


def reindex(train: ClickLog, *others: ClickLog) -> tuple[ClickLog, ...]:
    """The same rows with ids from a vocabulary of ``train``: row 0 is what ``train`` never saw."""
    vocabulary = Vocabulary.fit([train.ids.astype(np.int64)])
    return tuple(
        replace(log, ids=vocabulary.encode(log.ids.astype(np.int64)), table_sizes=vocabulary.table_sizes)
        for log in (train, *others)
    )


class _Counts:
    """Counts of one column's numbers.

    Chunks wait until they hold as many numbers as the table, and are merged then: every number is
    sorted a logarithmic number of times, however many chunks there are.
    """

    def __init__(self) -> None:
        self._values = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting_size = 0

    def add(self, numbers: Int64[np.ndarray, " N"]) -> None:
        values, counts = np.unique(numbers, return_counts=True)
        self._waiting.append((values, counts))
        self._waiting_size += values.size
        if self._waiting_size > max(self._values.size, 1 << 16):
            self._merge()

    def result(self) -> tuple[Int64[np.ndarray, " U"], Int64[np.ndarray, " U"]]:
        self._merge()
        return self._values, self._counts

    def _merge(self) -> None:
        parts = [(self._values, self._counts), *self._waiting]
        values, owner = np.unique(np.concatenate([values for values, _ in parts]), return_inverse=True)
        counts = np.zeros(values.size, dtype=np.int64)
        np.add.at(counts, owner, np.concatenate([counts for _, counts in parts]))
        self._values, self._counts = values, counts
        self._waiting, self._waiting_size = [], 0


def _check_modulus(modulus: int) -> None:
    if not 1 <= modulus <= 2**31:
        raise ValueError(f"modulus={modulus} must be between 1 and 2**31, to fit int32 ids")


def _check_columns(raw: np.ndarray, fields: int) -> None:
    if raw.shape[1] != fields:
        raise ValueError(f"{raw.shape[1]} columns of numbers for an encoder of {fields}")
