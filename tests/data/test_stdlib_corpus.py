"""The standard library as a corpus: the same each time, no test files, no file in two parts."""

import itertools
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from experiments.data import stdlib_corpus
from experiments.data.files import DataNotFound


@pytest.fixture(scope="module")
def corpus() -> stdlib_corpus.Corpus:
    return stdlib_corpus.load()


def test_sources_are_the_librarys_own():
    sources, skipped = stdlib_corpus.sources()
    files = [source.file for source in sources]
    assert files == sorted(files)
    assert skipped == []
    packages = {source.package for source in sources}
    assert packages <= set(sys.stdlib_module_names)
    assert {"asyncio", "json", "argparse", "this"} <= packages
    banned = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not any(banned.intersection(file.split("/")) for file in files)
    by_file = {source.file: source for source in sources}
    assert by_file["xml/etree/ElementTree.py"].package == "xml"
    assert by_file["argparse.py"].package == "argparse"


def test_texts_are_what_the_files_say(corpus):
    root = Path(sysconfig.get_paths()["stdlib"])
    for row in range(0, len(corpus.texts), 97):
        file = corpus.file_names[corpus.files[row]]
        assert corpus.texts[row] in (root / file).read_text(encoding="utf-8")
        assert file.startswith(f"{corpus.label_names[corpus.labels[row]]}/")


def test_shape_of_the_corpus(corpus):
    counts = np.bincount(corpus.labels)
    assert len(corpus.texts) == len(corpus.labels) == len(corpus.files)
    assert counts.min() >= 30
    assert counts.max() <= 400
    assert {"asyncio", "email", "http", "json", "multiprocessing", "unittest"} <= set(corpus.label_names)
    assert list(corpus.label_names) == sorted(corpus.label_names)
    lines = np.array([text.count("\n") for text in corpus.texts])
    assert lines.min() >= 9
    assert lines.max() <= 20
    assert len(corpus.texts) > 3000


def test_the_same_each_time(corpus):
    again = stdlib_corpus.load()
    assert again.texts == corpus.texts
    np.testing.assert_array_equal(again.labels, corpus.labels)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_split_is_by_file_and_complete(corpus, seed):
    parts = list(stdlib_corpus.splits(corpus, seed=seed))
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(corpus.texts)))
    files = [set(corpus.files[part].tolist()) for part in parts]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(files, 2))
    for part, fraction in zip(parts, (0.7, 0.1, 0.2), strict=True):
        assert np.unique(corpus.labels[part]).size == len(corpus.label_names)
        assert len(part) / len(corpus.texts) == pytest.approx(fraction, abs=0.03)


def test_splits_follow_the_seed(corpus):
    first, same, other = (stdlib_corpus.splits(corpus, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.test, same.test)
    assert not np.array_equal(first.test, other.test)


@pytest.fixture
def small_library(monkeypatch, tmp_path) -> Path:
    folder = tmp_path / "lib"

    def write(name: str, content: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    for package in ("one", "two"):
        for name in ("__init__", "b", "c"):
            write(f"{package}/{name}.py", f"# {package} {name}\n".encode() * 10)
    write("alone.py", b"x = 1\n" * 10)
    write("one/coded.py", b"# -*- coding: latin-1 -*-\ny = '\xe9'\n")
    write("one/broken.py", b"z = '\xff'\n")
    write("one/tests/hidden.py", b"assert True\n" * 10)
    write("generated.py", b"no part of the library\n" * 10)
    write("site-packages/other/__init__.py", b"not ours\n" * 10)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset({"one", "two", "alone"}))
    return folder


@pytest.mark.usefixtures("small_library")
def test_what_is_left_out_and_why():
    sources, skipped = stdlib_corpus.sources()
    names = ["alone.py", "one/__init__.py", "one/b.py", "one/c.py", "one/coded.py"]
    assert [source.file for source in sources] == [*names, "two/__init__.py", "two/b.py", "two/c.py"]
    assert [source.text for source in sources if source.file == "one/coded.py"] == [
        "# -*- coding: latin-1 -*-\ny = 'é'\n"
    ]
    assert [file for file, _ in skipped] == ["one/broken.py"]
    assert "UnicodeDecodeError" in skipped[0][1] or "SyntaxError" in skipped[0][1]


@pytest.mark.usefixtures("small_library")
def test_pieces_are_runs_of_lines_and_spread_over_files():
    corpus = stdlib_corpus.load(lines_per_chunk=4, min_chunks=3)
    # Ten lines are 4 + 4 + 2, and the two-line file is half a piece.
    assert np.bincount(corpus.labels).tolist() == [10, 9]
    assert corpus.texts[0] == "# one __init__\n" * 4
    assert corpus.texts[2] == "# one __init__\n" * 2
    capped = stdlib_corpus.load(lines_per_chunk=4, min_chunks=3, max_chunks=3)
    assert np.bincount(capped.labels).tolist() == [3, 3]
    assert np.unique(capped.files).size == 6
    assert corpus.skipped == capped.skipped != ()


def test_too_few_files_are_not_split(small_library):
    (small_library / "two" / "c.py").unlink()
    corpus = stdlib_corpus.load(lines_per_chunk=4, min_chunks=3, min_files=2)
    with pytest.raises(ValueError, match="package 'two' has 2 files"):
        stdlib_corpus.splits(corpus)


def test_errors_name_what_is_wrong(monkeypatch, tmp_path, corpus):
    with pytest.raises(ValueError, match="lines_per_chunk=0"):
        stdlib_corpus.load(lines_per_chunk=0)
    with pytest.raises(ValueError, match="min_chunks=10 <= max_chunks=5"):
        stdlib_corpus.load(min_chunks=10, max_chunks=5)
    with pytest.raises(ValueError, match="min_files=1000"):
        stdlib_corpus.load(min_files=1000)
    with pytest.raises(ValueError, match="add up to 1"):
        stdlib_corpus.splits(corpus, fractions=(0.5, 0.1, 0.1))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataNotFound, match="no source files"):
        stdlib_corpus.sources()
