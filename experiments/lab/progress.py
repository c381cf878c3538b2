"""What is seen of a run while it measures: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from experiments.lab.trial import Row

LINE_EVERY = 10.0
"""Seconds between two lines where the output is no terminal."""


class Bar:
    """Progress on a terminal."""

    def __init__(self, progress: Progress, name: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=total, current="")

    def begins(self, key: Row) -> None:
        """A measurement starts."""
        self._progress.update(self._task, current=describe(key))

    def done(self, saved: bool) -> None:
        """A trial's row is in the record; ``saved`` if it was there before."""
        self._progress.advance(self._task)


class Lines:
    """Progress as plain lines."""

    def __init__(self, console: Console, name: str, total: int | None) -> None:
        self._console, self._name = console, name
        self._of = "" if total is None else f"/{total}"
        self._count = self._saved = 0
        self._start = self._last = time.monotonic()

    def begins(self, key: Row) -> None:
        """A measurement starts."""
        if time.monotonic() - self._last >= LINE_EVERY:
            self._say(f"now {describe(key)}")

    def done(self, saved: bool) -> None:
        """A trial's row is in the record; ``saved`` if it was there before."""
        self._count += 1
        self._saved += saved

    def finish(self) -> None:
        """All trials are done."""
        self._say(f"{self._saved} were in the record" if self._saved else "done")

    def _say(self, text: str) -> None:
        self._last = time.monotonic()
        elapsed = f"{self._last - self._start:.0f} s"
        line = f"{self._name}: {self._count}{self._of} trials, {elapsed}, {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


Watch = Bar | Lines


@contextmanager
def watch(console: Console, name: str, total: int | None) -> Iterator[Watch]:
    """Show the progress of a run of ``total`` trials (None: not known) on the console."""
    if not console.is_terminal:
        lines = Lines(console, name, total)
        yield lines
        lines.finish()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[current]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, name, total)


def describe(key: Row) -> str:
    """A key in words: ``method=robe seed=1``."""
    return " ".join(f"{name}={value}" for name, value in key.items() if value is not None)
