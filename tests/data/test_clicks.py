"""A click log keeps its invariants; splits and batches lose and repeat nothing."""

import itertools

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.clicks import ClickLog, batches, concatenate, cut


def make_log(rows: int, first: int = 0) -> ClickLog:
    """Row ``i`` has id ``first + i`` in its first field, so that rows can be told apart."""
    own = np.arange(first, first + rows, dtype=np.int32)
    return ClickLog(
        ids=np.stack([own, own % 3], axis=1),
        dense=own[:, None].astype(np.float32),
        labels=(own % 2).astype(np.int8),
        field_names=("row", "rest"),
        table_sizes=(1_000_000, 3),
    )


def rows_of(log: ClickLog) -> list[int]:
    """Which rows of the log these are; all columns must agree on it."""
    own = log.ids[:, 0]
    np.testing.assert_array_equal(log.ids[:, 1], own % 3)
    np.testing.assert_array_equal(log.dense[:, 0], own)
    np.testing.assert_array_equal(log.labels, own % 2)
    return own.tolist()


def test_stacked_ids_number_one_table():
    log = make_log(5)
    np.testing.assert_array_equal(log.offsets, [0, 1_000_000])
    np.testing.assert_array_equal(log.stacked_ids()[:, 1], 1_000_000 + np.arange(5) % 3)
    assert log.stacked_ids().dtype == np.int32


def test_stacked_ids_refuse_to_wrap():
    ids = np.zeros((1, 2), np.int32)
    log = ClickLog(ids, np.zeros((1, 0), np.float32), np.zeros(1, np.int8), ("a", "b"), (2**31 - 1, 2))
    with pytest.raises(ValueError, match="2147483649 rows"):
        log.stacked_ids()


def test_select_keeps_the_named_fields():
    log = make_log(7).select("rest")
    np.testing.assert_array_equal(log.ids[:, 0], np.arange(7) % 3)
    assert (log.field_names, log.table_sizes) == (("rest",), (3,))
    with pytest.raises(ValueError, match="no field 'other'; the fields are rest"):
        log.select("other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.full((4, 1), 3, np.int32)}, "field 'a' span 3 to 3; its table has 3 rows"),
        ({"ids": np.full((4, 1), -1, np.int32)}, "field 'a' span -1 to -1"),
        ({"labels": np.full(4, 2, np.int8)}, "labels span 2 to 2"),
        ({"labels": np.zeros(3, np.int8)}, "3 labels"),
        ({"dense": np.zeros((5, 0), np.float32)}, "5 of dense"),
        ({"table_sizes": (3, 3)}, "1 columns of ids"),
        ({"field_names": ()}, "1 columns of ids"),
    ],
)
def test_a_log_that_contradicts_itself_is_refused(monkeypatch, change, message):
    # The checks of a program that runs without the shape checks of this test run.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    good = {
        "ids": np.zeros((4, 1), np.int32),
        "dense": np.zeros((4, 0), np.float32),
        "labels": np.zeros(4, np.int8),
        "field_names": ("a",),
        "table_sizes": (3,),
    }
    assert len(ClickLog(**good)) == 4
    with pytest.raises(ValueError, match=message):
        ClickLog(**(good | change))


def test_a_log_may_be_empty():
    assert len(make_log(3).take(slice(0, 0))) == 0


@given(st.integers(10, 500), st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_a_split_is_a_partition_and_depends_on_the_seed_alone(rows, seed):
    log = make_log(rows)
    parts = [rows_of(part) for part in log.split((0.6, 0.2, 0.2), seed=seed)]
    assert sorted(itertools.chain(*parts)) == list(range(rows))
    assert [len(part) for part in parts] == np.diff(np.round(np.array([0, 0.6, 0.8, 1]) * rows)).tolist()
    assert parts == [rows_of(part) for part in log.split((0.6, 0.2, 0.2), seed=seed)]
    assert parts != [rows_of(part) for part in log.split((0.6, 0.2, 0.2), seed=seed + 1)]


@pytest.mark.parametrize(
    ("fractions", "message"),
    [((0.5, 0.4), "add up to 1"), ((1.5, -0.5), "positive"), ((0.01, 0.99), "part empty")],
)
def test_bad_fractions_are_named(fractions, message):
    with pytest.raises(ValueError, match=message):
        cut(10, fractions)


def test_concatenate_keeps_the_order():
    assert rows_of(concatenate([make_log(3), make_log(2, 3), make_log(4, 5)])) == list(range(9))


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 30), st.booleans())
@settings(deadline=None, max_examples=50)
def test_batches_in_order_are_the_rows_in_order(sizes, batch_size, drop_remainder):
    starts = np.cumsum([0, *sizes])
    pieces = (make_log(size, first) for size, first in zip(sizes, starts[:-1].tolist(), strict=True))
    found = [rows_of(batch) for batch in batches(pieces, batch_size, drop_remainder=drop_remainder)]
    total = int(starts[-1])
    kept = total - total % batch_size if drop_remainder else total
    assert list(itertools.chain(*found)) == list(range(kept))
    assert all(len(batch) == batch_size for batch in found[:-1])


@given(st.integers(1, 80), st.integers(1, 30), st.integers(1, 20))
@settings(deadline=None, max_examples=50)
def test_shuffled_batches_are_each_row_once_and_not_far_from_its_window(rows, window, batch_size):
    log = [make_log(rows)]
    found = [rows_of(b) for b in batches(log, batch_size, window=window, seed=1, drop_remainder=False)]
    order = list(itertools.chain(*found))
    assert sorted(order) == list(range(rows))
    assert [row // window for row in order] == sorted(row // window for row in range(rows))


def test_shuffling_follows_the_seed():
    def order(seed):
        return [rows_of(b) for b in batches([make_log(100)], 10, window=100, seed=seed)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != [list(range(i, i + 10)) for i in range(0, 100, 10)]


def test_batches_do_not_depend_on_the_pieces():
    whole = [rows_of(b) for b in batches([make_log(95)], 8, window=30, seed=3)]
    pieces = [make_log(5, first) for first in range(0, 95, 5)]
    assert whole == [rows_of(b) for b in batches(pieces, 8, window=30, seed=3)]


def test_batches_read_no_further_than_they_must():
    read = []

    def pieces():
        for first in range(0, 1000, 10):
            read.append(first)
            yield make_log(10, first)

    next(iter(batches(pieces(), 20, window=40)))
    assert len(read) == 4


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 1, "window": -1}])
def test_bad_batches_are_refused_before_anything_is_read(arguments):
    with pytest.raises(ValueError, match="batch_size="):
        batches(iter(()), **arguments)
