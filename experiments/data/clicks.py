"""Click logs: categorical fields, dense features and a binary label, in NumPy arrays."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float32, Int, Int8, Int32, Int64

from experiments.data.counter import permutation, stream

T = TypeVar("T")


@dataclass(frozen=True)
class Splits(Generic[T]):
    """The three parts of a data set; unpacks as ``train, validation, test``."""

    train: T
    validation: T
    test: T

    def __iter__(self) -> Iterator[T]:
        return iter((self.train, self.validation, self.test))


@dataclass(frozen=True, eq=False)
class ClickLog:
    """Rows of a click log.

    Attributes:
        ids: ``ids[i, t]`` is a row of table ``t``, counted from 0 in every field.
        dense: real features, already transformed; ``D`` may be 0.
        labels: 1 = clicked (or liked), 0 = not.
        field_names: one a field.
        table_sizes: rows of each field's table; every id is smaller.

    Raises:
        ValueError: lengths disagree, an id lies outside its table, or a label is not 0 or 1.
    """

    ids: Int32[np.ndarray, "N T"]
    dense: Float32[np.ndarray, "N D"]
    labels: Int8[np.ndarray, " N"]
    field_names: tuple[str, ...]
    table_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        rows, fields = self.ids.shape
        if not len(self.dense) == len(self.labels) == rows:
            raise ValueError(f"{rows} rows of ids, {len(self.dense)} of dense, {len(self.labels)} labels")
        if not len(self.field_names) == len(self.table_sizes) == fields:
            raise ValueError(
                f"{fields} columns of ids, but field_names={self.field_names}, table_sizes={self.table_sizes}"
            )
        if rows == 0:
            return
        # A gather would clamp a wrong id in silence, so it is refused here.
        for name, size, low, high in zip(
            self.field_names, self.table_sizes, self.ids.min(axis=0), self.ids.max(axis=0), strict=True
        ):
            if low < 0 or high >= size:
                raise ValueError(f"ids of field {name!r} span {low} to {high}; its table has {size} rows")
        if self.labels.min() < 0 or self.labels.max() > 1:
            raise ValueError(f"labels span {self.labels.min()} to {self.labels.max()}, must be 0 or 1")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def offsets(self) -> Int64[np.ndarray, " T"]:
        """First row of each field's table when all tables are stacked into one."""
        return np.array([0, *accumulate(self.table_sizes)][:-1], dtype=np.int64)

    def stacked_ids(self) -> Int32[np.ndarray, "N T"]:
        """Row numbers in the one table of ``sum(table_sizes)`` rows.

        Raises:
            ValueError: the stacked table has more rows than int32 can count.
        """
        if sum(self.table_sizes) > 2**31:
            raise ValueError(f"a table of {sum(self.table_sizes)} rows has no int32 row numbers")
        return self.ids + self.offsets.astype(np.int32)

    def take(self, rows: slice | Int[np.ndarray, " M"]) -> "ClickLog":
        """The named rows, in that order (a slice gives views)."""
        return replace(self, ids=self.ids[rows], dense=self.dense[rows], labels=self.labels[rows])

    def select(self, *fields: str) -> "ClickLog":
        """The same rows with the named fields only, in that order."""
        unknown = [name for name in fields if name not in self.field_names]
        if unknown:
            raise ValueError(f"no field {unknown[0]!r}; the fields are {', '.join(self.field_names)}")
        columns = [self.field_names.index(name) for name in fields]
        sizes = tuple(self.table_sizes[column] for column in columns)
        return replace(self, ids=self.ids[:, columns], field_names=fields, table_sizes=sizes)

    def split(self, fractions: tuple[float, ...] = (0.8, 0.1, 0.1), *, seed: int) -> tuple["ClickLog", ...]:
        """Random disjoint parts that together hold every row; the same for the same ``seed``.

        Raises:
            ValueError: ``fractions`` are not positive, do not add up to 1, or leave a part empty.
        """
        order = permutation(stream(seed, "split"), len(self))
        bounds = cut(len(self), fractions)
        return tuple(self.take(order[low:high]) for low, high in pairwise(bounds))


def cut(size: int, fractions: Sequence[float]) -> list[int]:
    """Bounds that cut ``size`` things in parts of the given fractions, none of them empty.

    Returns:
        ``len(fractions) + 1`` bounds, from 0 to ``size``.

    Raises:
        ValueError: ``fractions`` are not positive, do not add up to 1, or leave a part empty.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions={tuple(fractions)} must be positive and add up to 1")
    bounds = [round(size * total) for total in np.cumsum([0.0, *fractions])]
    if any(low == high for low, high in pairwise(bounds)):
        raise ValueError(f"fractions={tuple(fractions)} of {size} rows leave a part empty")
    return bounds


def concatenate(logs: list[ClickLog]) -> ClickLog:
    """The rows of ``logs``, which share their fields, one after the other."""
    if len(logs) == 1:
        return logs[0]
    ids, dense, labels = (np.concatenate([getattr(log, name) for log in logs]) for name in ("ids", "dense", "labels"))
    return replace(logs[0], ids=ids, dense=dense, labels=labels)


def batches(
    logs: Iterable[ClickLog], batch_size: int, *, window: int = 0, seed: int = 0, drop_remainder: bool = True
) -> Iterator[ClickLog]:
    """Batches of a log that comes in pieces of any size (one piece is a log in memory).

    Args:
        logs: the pieces, read once and not faster than the batches are taken.
        batch_size: rows of a batch.
        window: rows that are gathered and shuffled together; 0 keeps the order. Memory grows with it.
        seed: order of the shuffle; another one for each epoch.
        drop_remainder: leave out a last batch that is not full, so that every batch has one shape.

    Raises:
        ValueError: ``batch_size`` is not positive or ``window`` is negative.
    """
    if batch_size < 1 or window < 0:
        raise ValueError(f"batch_size={batch_size} must be at least 1 and window={window} at least 0")
    if window:
        logs = (
            block.take(permutation(stream(seed, "window", index), len(block)))
            for index, block in enumerate(_regroup(logs, window))
        )
    pieces = _regroup(logs, batch_size)
    return (batch for batch in pieces if len(batch) == batch_size or not drop_remainder)


def _regroup(logs: Iterable[ClickLog], rows: int) -> Iterator[ClickLog]:
    """The same rows in pieces of ``rows``; the last one may be shorter."""
    held: list[ClickLog] = []
    missing = rows
    for log in logs:
        start = 0
        while start < len(log):
            piece = log.take(slice(start, start + missing))
            held.append(piece)
            start += len(piece)
            missing -= len(piece)
            if missing == 0:
                yield concatenate(held)
                held, missing = [], rows
    if held:
        yield concatenate(held)
