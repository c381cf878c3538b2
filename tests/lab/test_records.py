"""Rows survive JSON, a kill at any byte, and nothing else."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.lab.records import (
    RecordError,
    RowLog,
    decode_row,
    encode_row,
    frame,
    key_of,
    make_row,
    plain,
    read_record,
    write_atomically,
    write_json,
)

ROWS = [{"method": m, "seed": s, "auc": 0.5 + s / 7} for m in ("robe", "häsh\n\r\u2028") for s in range(2)]

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text()


@given(st.dictionaries(st.text().filter(lambda name: not name.startswith("_")), scalars))
def test_a_row_comes_back_as_it_was(fields):
    if {"NaN", "Infinity", "-Infinity"} & {v for v in fields.values() if isinstance(v, str)}:
        with pytest.raises(ValueError, match="stands for a float"):
            make_row({}, fields, seconds=0.0)
        return
    row = make_row({}, fields, seconds=0.25)
    line = encode_row(row)
    assert line.count(b"\n") == 1
    # repr tells -0.0 from 0.0, 1 from 1.0 and True, and finds NaN equal to itself.
    assert repr(decode_row(line)) == repr(fields | {"_seconds": 0.25})


def test_lines_are_json_that_every_parser_reads():
    def refuse(constant):
        raise AssertionError(constant)

    row = make_row({"seed": np.int64(3)}, {"a": math.nan, "b": -math.inf, "c": np.float32(0.5)}, seconds=1.0)
    assert json.loads(encode_row(row), parse_constant=refuse) == {
        "seed": 3, "a": "NaN", "b": "-Infinity", "c": 0.5, "_seconds": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "measured", "error", "message"),
    [
        ({"auc": 1}, {"auc": 0.5}, ValueError, "measured field 'auc' is also in the trial's key"),
        ({"_seed": 1}, {}, ValueError, "'_seed' of a row must not start with an underscore"),
        ({}, {"auc": "NaN"}, ValueError, "'auc' of a row is the text 'NaN'"),
        ({}, {"auc": np.zeros(2)}, TypeError, "'auc' of a row must be a scalar, got ndarray"),
        ({}, {"count": 2**63}, ValueError, "'count' of a row must fit 64 bits, got 9223372036854775808"),
    ],
)
def test_what_is_no_row_is_refused(key, measured, error, message):
    with pytest.raises(error, match=message):
        make_row(key, measured, seconds=0.0)


def test_keys_are_equal_where_their_values_are():
    keys = [(1, "a"), (1.0, "a"), (True, "a"), ("1", "a"), (None, "a"), (math.nan, "a"), (1, "b")]
    texts = [key_of({"x": x, "y": y}, ["x", "y"]) for x, y in keys]
    assert len(set(texts)) == len(keys)
    assert key_of({"y": "a", "x": np.int32(1), "auc": 0.5}, ["x", "y"]) == texts[0]


def write_rows(path):
    with RowLog(path) as log:
        for row in ROWS:
            log.append(row)


def test_a_kill_at_any_byte_costs_the_torn_line_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path)
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        with RowLog(path) as log:
            assert log.rows == ROWS[: content[:cut].count(b"\n")]
            for row in ROWS[len(log.rows) :]:
                log.append(row)
        assert path.read_bytes() == content


@pytest.mark.parametrize("garbage", [b"{'auc': 1}", b"", b"3", b'{"auc": [1]}', b'{"auc": NaN}', b"\x00\xff"])
def test_garbage_in_the_middle_is_named_and_kept(tmp_path, garbage):
    path = tmp_path / "rows.jsonl"
    write_rows(path)
    lines = path.read_bytes().split(b"\n")
    damaged = b"\n".join([*lines[:2], garbage, *lines[2:]])
    path.write_bytes(damaged)
    with pytest.raises(RecordError, match=r"rows\.jsonl, line 3, is not a row"):
        RowLog(path)
    write_json(tmp_path / "config.json", {"fields": {}})
    with pytest.raises(RecordError, match=r"rows\.jsonl, line 3, is not a row"):
        read_record(tmp_path)
    assert path.read_bytes() == damaged


@pytest.mark.skipif(sys.platform == "win32", reason="files are locked on POSIX systems alone")
def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    take = (
        "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print('taken', flush=True); "
    )
    command = [sys.executable, "-c", take + "sys.stdin.read()", path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(RecordError, match="another process is measuring into"):
            RowLog(path)
        other.kill()
    with RowLog(path) as log:
        assert log.rows == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "RESULTS.md"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "a lone surrogate cannot be written: \ud800")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_plain_makes_json_of_configs(tmp_path):
    import dataclasses
    import enum

    class Optimizer(enum.Enum):
        SGD = 1

    @dataclasses.dataclass(frozen=True)
    class Inner:
        rate: float = math.inf

    @dataclasses.dataclass(frozen=True)
    class Config:
        inner: Inner = dataclasses.field(default_factory=Inner)
        sizes: tuple[int, ...] = (1, 2)
        optimizer: Optimizer = Optimizer.SGD
        home: object = tmp_path

    assert plain(Config()) == {
        "inner": {"rate": "Infinity"}, "sizes": [1, 2], "optimizer": "SGD", "home": str(tmp_path),
    }  # fmt: skip


def test_a_frame_joins_whole_numbers_and_floats_and_fields_that_come_late():
    table = frame([{"a": 1}] * 200 + [{"a": 0.5, "b": math.nan}])
    assert table["a"].to_list() == [1.0] * 200 + [0.5]
    assert table["b"].null_count() == 200
    assert math.isnan(table["b"][-1])


def test_reading_an_empty_folder_and_a_damaged_one(tmp_path):
    assert read_record(tmp_path) is None
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(RecordError, match=r"rows\.jsonl but no config\.json"):
        read_record(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecordError, match=r"config\.json is not JSON"):
        read_record(tmp_path)
