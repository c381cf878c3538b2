"""Text logs are read exactly, at bounded memory, and what is wrong is named by file and line."""

import gzip
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments.data import criteo
from experiments.data.clicks import batches
from experiments.data.clicktext import ClickText, TextFormat
from experiments.data.vocabulary import Modulus, Vocabulary

ROWS = 200_000


def criteo_lines(rows: int, seed: int = 0) -> bytes:
    """Random lines of the format: negative, missing and long integers, missing categories."""
    rng = np.random.default_rng(seed)
    frame = {"label": pl.Series(rng.integers(0, 2, rows))}
    for column in range(13):
        values = pl.Series(rng.integers(-3, 10 ** (column % 8 + 1), rows))
        frame[f"I{column}"] = values.set(pl.Series(rng.random(rows) < 0.2), None)
    for column in range(26):
        numbers = rng.integers(0, 2**32, 50 * (column + 1), dtype=np.uint64)[rng.integers(0, 50 * (column + 1), rows)]
        nibbles = (numbers[:, None] >> np.arange(28, -4, -4, dtype=np.uint64)) & np.uint64(15)
        text = np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles.astype(np.int64)].view("S8").ravel()
        frame[f"C{column}"] = pl.Series(text.astype(str)).set(pl.Series(rng.random(rows) < 0.1), None)
    return pl.DataFrame(frame).write_csv(separator="\t", include_header=False).encode()


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("criteo") / "train.txt"
    path.write_bytes(criteo_lines(ROWS))
    return path


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small.txt"
    path.write_bytes(criteo_lines(50, seed=1))
    return path


def naive(lines: list[bytes]) -> tuple[list, list, list]:
    """The format in the plainest words: one line, one column at a time."""
    ids, dense, labels = [], [], []
    for line in lines:
        fields = line.decode().rstrip("\n").split("\t")
        labels.append(int(fields[0]))
        dense.append([np.log(1 + max(0, int(field or 0))) for field in fields[1:14]])
        ids.append([int(field or "0", 16) for field in fields[14:]])
    return ids, dense, labels


def test_equal_to_a_line_by_line_reading(big):
    lines = big.read_bytes().splitlines(keepends=True)[:3000]
    ids, dense, labels = naive(lines)
    chunks = list(ClickText((big,), criteo.FORMAT, chunk_rows=700).rows(0, 3000).raw())
    assert [len(chunk.labels) for chunk in chunks] == [700, 700, 700, 700, 200]
    np.testing.assert_array_equal(np.concatenate([chunk.ids for chunk in chunks]), ids)
    np.testing.assert_array_equal(np.concatenate([chunk.labels for chunk in chunks]), labels)
    read = np.concatenate([chunk.dense for chunk in chunks])
    np.testing.assert_array_equal(read, np.array(dense, dtype=np.float32))


def test_memory_is_bounded_by_the_chunk(big):
    """Lines and arrays at their peak, over a tenth of the file and over all of it."""

    def peak(rows: int) -> int:
        text = ClickText((big,), criteo.FORMAT, chunk_rows=4096).rows(0, rows)
        tracemalloc.start()
        read = sum(len(chunk) for chunk in text.clicks(Modulus(1000, fields=26)))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert read == rows
        return most

    peak(4096)  # first use imports and caches
    whole, tenth = peak(ROWS), peak(ROWS // 10)
    assert whole < 1.1 * tenth
    assert whole < big.stat().st_size / 4


def test_the_process_does_not_grow_with_the_file(big):
    """polars' own memory is not Python's: the process's high-water mark, before and after the bulk."""
    program = """
import resource, sys
from pathlib import Path
from experiments.data import criteo
from experiments.data.clicktext import ClickText
chunks = ClickText((Path(sys.argv[1]),), criteo.FORMAT, chunk_rows=2048).raw()
for _ in range(20):
    next(chunks)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sum(len(chunk.labels) for chunk in chunks) == int(sys.argv[2]) - 20 * 2048
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    root = Path(criteo.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(big), str(ROWS)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < big.stat().st_size / 3


def test_nothing_is_parsed_ahead(small):
    spoil(small, 21, None, b"damaged\n")
    chunks = ClickText((small,), criteo.FORMAT, chunk_rows=10).raw()
    assert [len(next(chunks).labels) for _ in range(2)] == [10, 10]
    with pytest.raises(ValueError, match="line 21"):
        next(chunks)


def test_progress_is_told_the_rows_that_have_passed(small):
    seen = []
    text = ClickText((small, small), criteo.FORMAT, chunk_rows=20)
    assert sum(len(chunk.labels) for chunk in text.rows(30, 75).raw(seen.append)) == 45
    assert seen == [20, 40, 50, 70, 90]


def test_gzip_is_recognised_by_content(small, tmp_path):
    zipped = tmp_path / "no_suffix"
    zipped.write_bytes(gzip.compress(small.read_bytes()))
    for plain, packed in zip(
        ClickText((small,), criteo.FORMAT).raw(), ClickText((zipped,), criteo.FORMAT).raw(), strict=True
    ):
        np.testing.assert_array_equal(plain.ids, packed.ids)


def test_the_last_line_may_lack_its_end(small):
    small.write_bytes(small.read_bytes().rstrip(b"\n"))
    assert sum(len(chunk.labels) for chunk in ClickText((small,), criteo.FORMAT).raw()) == 50


@pytest.mark.parametrize(("start", "stop"), [(0, 50), (7, 90), (49, 51), (50, 100), (60, None), (30, 30)])
def test_a_range_of_rows_may_span_files(tmp_path, start, stop):
    paths = []
    for part in range(2):
        paths.append(tmp_path / f"day_{part}")
        paths[-1].write_bytes(criteo_lines(50, seed=part))
    text = ClickText(tuple(paths), criteo.FORMAT, chunk_rows=8)
    assert text.count() == 100
    whole = np.concatenate([chunk.ids for chunk in text.raw()])
    part = [chunk.ids for chunk in text.rows(start, stop).raw()]
    expected = whole[start:stop]
    np.testing.assert_array_equal(np.concatenate(part) if part else whole[:0], expected)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_are_equal_disjoint_and_nearly_all(small, count):
    text = ClickText((small,), criteo.FORMAT, chunk_rows=16)
    whole = [row.tobytes() for chunk in text.raw() for row in chunk.ids]
    shards = [
        [row.tobytes() for chunk in text.shard(index, count).raw() for row in chunk.ids] for index in range(count)
    ]
    assert len({len(shard) for shard in shards}) == 1
    joined = [row for shard in shards for row in shard]
    assert len(set(joined)) == len(joined)
    assert set(joined) <= set(whole)
    chunks = -(-50 // 16)
    assert len(whole) - len(joined) <= chunks * (count - 1)


def spoil(path: Path, line: int, column: int | None, value: bytes) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    if column is None:
        lines[line - 1] = value
    else:
        fields = lines[line - 1].rstrip(b"\n").split(b"\t")
        fields[column] = value
        lines[line - 1] = b"\t".join(fields) + b"\n"
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (None, b"0\t1\t2\n", "3 columns, but the Criteo format has 40"),
        (None, b"\n", "1 columns"),
        (39, b"0123abcd\t", "41 columns"),
        (0, b"2", "column 'label' is b'2', must be 0 or 1"),
        (0, b"", "column 'label' is b''"),
        (3, b"1.5", "column 'I3' is b'1.5', must be an integer"),
        (3, b"99999999999999999999", "column 'I3'"),
        (14, b"xyz01234", "column 'C1' is b'xyz01234', must be 8 hexadecimal digits"),
        (39, b"0123", "column 'C26' is b'0123'"),
        (39, b"-1234567", "column 'C26'"),
        (39, b"+1234567", "column 'C26'"),
        (20, b"\xff\xfe345678", "column 'C7'"),
    ],
)
def test_a_bad_line_is_named(small, column, value, message):
    spoil(small, 33, column, value)
    text = ClickText((small,), criteo.FORMAT, chunk_rows=10)
    with pytest.raises(ValueError, match=message) as error:
        list(text.raw())
    assert f"{small}, line 33: " in str(error.value)
    assert sum(len(chunk.labels) for chunk in text.rows(0, 30).raw()) == 30
    with pytest.raises(ValueError, match="line 33: "):
        list(text.rows(31, 35).shard(0, 2).raw())


def test_a_file_cut_in_its_last_line_is_named(small):
    small.write_bytes(small.read_bytes()[:-4])
    with pytest.raises(ValueError, match="line 50: column 'C26'"):
        list(ClickText((small,), criteo.FORMAT).raw())


def test_compressed_data_cut_short_is_named(tmp_path):
    path = tmp_path / "day_0.gz"
    packed = gzip.compress(criteo_lines(2000))
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"day_0\.gz: compressed data damaged after row \d+"):
        list(ClickText((path,), criteo.FORMAT, chunk_rows=100).raw())


def test_lines_after_a_header_are_numbered_as_in_the_file(tmp_path):
    toy = TextFormat("toy", ",", (("name", "skip"), ("click", "label"), ("n", "decimal"), ("h", "hex")), header=True)
    path = tmp_path / "toy.csv"
    path.write_bytes(b"name,click,n,h\na,1,-5,0000000f\nb,0,,\n")
    (chunk,) = ClickText((path,), toy).raw()
    assert chunk.ids.tolist() == [[-5, 15], [0, 0]]
    assert chunk.labels.tolist() == [1, 0]
    assert chunk.dense.shape == (2, 0)
    path.write_bytes(b"name,click,n,h\na,1,-5,0000000f\nb,0,x,\n")
    with pytest.raises(ValueError, match=r"toy\.csv, line 3: column 'n' is b'x'"):
        list(ClickText((path,), toy).raw())


def test_a_vocabulary_of_the_stream_covers_it(big):
    text = ClickText((big,), criteo.FORMAT, chunk_rows=20_000).rows(0, 60_000)
    vocabulary = Vocabulary.fit(chunk.ids for chunk in text.raw())
    log = next(iter(batches(text.clicks(vocabulary), 60_000)))
    assert log.ids.min() == 1
    assert log.table_sizes == tuple(int(column.max()) + 1 for column in log.ids.T)
    assert log.field_names == criteo.FIELDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": ()}, "names no file"),
        ({"chunk_rows": 0}, "chunk_rows=0"),
        ({"start": -1}, "start=-1"),
        ({"start": 5, "stop": 4}, "start=5, stop=4"),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
        ({"process_count": 0}, "process_count=0"),
    ],
)
def test_bad_arguments_are_named(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        ClickText(**({"files": (small,), "format": criteo.FORMAT} | arguments))
