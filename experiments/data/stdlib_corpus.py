"""The Python standard library's own source text: a corpus that every machine has.

The task: which package does this piece of source come from? Labels are packages of several files,
texts are runs of consecutive lines, and the parts are cut by file, so that nothing of a test file is
seen in training. Package names do occur in the texts (``import asyncio``), as they do in real code.

Tests are left out, and so is everything installed beside the library. What a Python version ships
is its own (3.11 has ``distutils``, 3.12 has not): report ``version`` with any result.
"""

import io
import os
import platform
import sys
import sysconfig
import tokenize
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from experiments.data.clicks import Splits
from experiments.data.counter import stream, uniform
from experiments.data.files import DataNotFound

_TESTS = ("test", "tests", "idle_test")


class Source(NamedTuple):
    """One file of the library.

    Attributes:
        package: top-level package, or the module's own name for a file outside packages.
        file: its path below the library's folder, with forward slashes.
        text: what it says, line ends as ``\\n``.
    """

    package: str
    file: str
    text: str


class Corpus(NamedTuple):
    """Pieces of source and the package each comes from.

    Attributes:
        texts: ``N`` pieces, in the order of files and lines.
        labels: index into ``label_names`` of each.
        files: index into ``file_names`` of each.
        label_names: packages, in alphabetical order.
        file_names: paths below the library's folder, in alphabetical order.
        skipped: files that could not be read, and why.
        version: of Python, such as ``3.11.7``.
    """

    texts: tuple[str, ...]
    labels: Int32[np.ndarray, " N"]
    files: Int32[np.ndarray, " N"]
    label_names: tuple[str, ...]
    file_names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    version: str


def sources() -> tuple[list[Source], list[tuple[str, str]]]:
    """Every file of the library in alphabetical order, and those that cannot be read, with the reason.

    Raises:
        DataNotFound: this Python has no source files (it may run from a zip archive).
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    read, skipped = [], []
    for name in _files(folder):
        *folders, module = name.split("/")
        try:
            with tokenize.open(folder / name) as file:
                read.append(Source(folders[0] if folders else module.removesuffix(".py"), name, file.read()))
        except (SyntaxError, UnicodeDecodeError, OSError) as error:
            skipped.append((name, f"{type(error).__name__}: {error}"))
    if not read:
        raise DataNotFound(f"the standard library of this Python has no source files under {folder}")
    return read, skipped


def load(*, lines_per_chunk: int = 20, min_chunks: int = 30, max_chunks: int = 400, min_files: int = 3) -> Corpus:
    """Pieces of ``lines_per_chunk`` consecutive lines, labelled by package.

    Args:
        lines_per_chunk: lines of a piece; pieces do not overlap, a rest of less than half is left out.
        min_chunks: packages with fewer pieces are left out.
        max_chunks: of a package with more, this many are kept, evenly spaced over its files, so that
            tables of character codes (``encodings``) do not make up the corpus.
        min_files: packages with fewer files are left out; 3 let every part of a split have one.

    Raises:
        ValueError: an argument is out of range, or no package is left.
        DataNotFound: as ``sources``.
    """
    if lines_per_chunk < 1 or min_files < 1 or not 1 <= min_chunks <= max_chunks:
        raise ValueError(
            f"lines_per_chunk={lines_per_chunk} and min_files={min_files} must be at least 1, and "
            f"1 <= min_chunks={min_chunks} <= max_chunks={max_chunks}"
        )
    read, skipped = sources()
    pieces: dict[str, list[tuple[str, str]]] = {}
    for source in read:
        found = [(source.file, text) for text in _pieces(source.text, lines_per_chunk)]
        pieces.setdefault(source.package, []).extend(found)
    kept = {
        package: _spaced(found, max_chunks)
        for package, found in sorted(pieces.items())
        if len(found) >= min_chunks and len({file for file, _ in _spaced(found, max_chunks)}) >= min_files
    }
    if not kept:
        raise ValueError(f"no package has min_files={min_files} files and min_chunks={min_chunks} pieces")
    rows = [(label, file, text) for label, found in enumerate(kept.values()) for file, text in found]
    file_names, files = np.unique([file for _, file, _ in rows], return_inverse=True)
    return Corpus(
        texts=tuple(text for _, _, text in rows),
        labels=np.array([label for label, _, _ in rows], dtype=np.int32),
        files=files.astype(np.int32),
        label_names=tuple(kept),
        file_names=tuple(str(name) for name in file_names),
        skipped=tuple(skipped),
        version=platform.python_version(),
    )


def splits(
    corpus: Corpus, seed: int = 0, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
) -> Splits[Int64[np.ndarray, " _"]]:
    """Rows of the corpus for training, validation and test; a file is in one part only.

    Within each package the files are dealt one by one, roughly from large to small in an order that
    ``seed`` picks, each to the part that lacks most of its fraction. Every package is in every part;
    the fractions hold as nearly as its files allow.

    Raises:
        ValueError: ``fractions`` do not add up to 1, or a package has fewer than 3 files.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions={fractions} must be positive and add up to 1")
    part_of_file = np.zeros(len(corpus.file_names), dtype=np.int64)
    for label, name in enumerate(corpus.label_names):
        files, sizes = np.unique(corpus.files[corpus.labels == label], return_counts=True)
        if files.size < len(fractions):
            raise ValueError(f"package {name!r} has {files.size} files, a split by file needs {len(fractions)}")
        luck = 0.5 + uniform(stream(seed, "files", name), np.arange(files.size))
        missing = np.array(fractions) * sizes.sum()
        empty = np.ones(len(fractions), dtype=bool)
        for dealt, file in enumerate(np.argsort(-sizes * luck, kind="stable")):
            last_chance = files.size - dealt == empty.sum()
            part = int(np.argmax(np.where(empty, missing, -np.inf) if last_chance else missing))
            part_of_file[files[file]] = part
            missing[part] -= sizes[file]
            empty[part] = False
    part_of_row = part_of_file[corpus.files]
    return Splits(*(np.flatnonzero(part_of_row == part) for part in range(len(fractions))))


def _files(folder: Path) -> list[str]:
    """Paths below ``folder`` of the library's own modules, without tests.

    Its top level also holds what is installed beside the library and what the build has generated;
    ``sys.stdlib_module_names`` tells them apart.
    """
    names = []
    for place, folders, files in os.walk(folder):
        own = [name for name in files if name.endswith(".py")]
        if Path(place) == folder:
            folders[:] = [name for name in folders if name in sys.stdlib_module_names]
            own = [name for name in own if name.removesuffix(".py") in sys.stdlib_module_names]
        folders[:] = [name for name in folders if name not in _TESTS]
        names += [Path(place, name).relative_to(folder).as_posix() for name in own]
    return sorted(names)


def _pieces(text: str, size: int) -> list[str]:
    lines = io.StringIO(text).readlines()  # splitlines() would also cut at form feeds
    return [
        "".join(lines[start : start + size])
        for start in range(0, len(lines), size)
        if 2 * len(lines[start : start + size]) >= size
    ]


def _spaced(found: list[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """At most ``most`` of the pieces, evenly spaced."""
    return [found[place * len(found) // min(most, len(found))] for place in range(min(most, len(found)))]
