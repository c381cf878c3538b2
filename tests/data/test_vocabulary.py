"""Encoders equal a dictionary written out; a vocabulary depends on the rows, not on their order."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.clicks import ClickLog
from experiments.data.vocabulary import Modulus, Vocabulary, reindex

columns = st.integers(1, 3).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(-5, 2**32 - 1) | st.integers(0, 6), min_size=width, max_size=width), min_size=1
    )
)


@given(columns, st.none() | st.integers(1, 10), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_a_vocabulary_equals_a_dictionary(rows, modulus, min_count):
    raw = np.array(rows, dtype=np.int64)
    vocabulary = Vocabulary.fit([raw], modulus=modulus, min_count=min_count)
    encoded = vocabulary.encode(raw)
    for field in range(raw.shape[1]):
        numbers = [number if modulus is None else number % modulus for number in raw[:, field].tolist()]
        counts = Counter(numbers)
        known = sorted(number for number, count in counts.items() if count >= min_count)
        dictionary = {number: row for row, number in enumerate(known, start=1)}
        assert encoded[:, field].tolist() == [dictionary.get(number, 0) for number in numbers]
        assert vocabulary.table_sizes[field] == len(known) + 1
        assert vocabulary.counts[field].tolist() == [counts[number] for number in known]


def test_chunks_and_their_order_do_not_matter():
    """More distinct numbers than one merge holds, so chunks are merged several times."""
    raw = np.random.default_rng(0).integers(0, 200_000, (300_000, 1))
    whole = Vocabulary.fit([raw])
    assert whole.table_sizes[0] > 1 << 16
    pieces = Vocabulary.fit(np.array_split(raw, 37)[::-1])
    np.testing.assert_array_equal(whole.values[0], pieces.values[0])
    np.testing.assert_array_equal(whole.counts[0], pieces.counts[0])
    assert whole.counts[0].sum() == len(raw)


def test_what_was_not_counted_is_row_0():
    vocabulary = Vocabulary.fit([np.array([[5], [7]])])
    assert vocabulary.encode(np.array([[5], [6], [7], [8], [4], [0]])).ravel().tolist() == [1, 0, 2, 0, 0, 0]


def test_nothing_frequent_leaves_row_0_alone():
    vocabulary = Vocabulary.fit([np.array([[5], [7]])], min_count=2)
    assert vocabulary.table_sizes == (1,)
    assert vocabulary.encode(np.array([[5], [7]])).ravel().tolist() == [0, 0]


def test_modulus_is_a_modulus():
    encoder = Modulus(10, fields=2)
    assert encoder.encode(np.array([[13, 2**32 - 1], [-1, 0]])).tolist() == [[3, 5], [9, 0]]
    assert encoder.table_sizes == (10, 10)


@pytest.mark.parametrize("modulus", [0, -1, 2**31 + 1])
def test_a_modulus_out_of_range_is_refused(modulus):
    with pytest.raises(ValueError, match=f"modulus={modulus}"):
        Modulus(modulus, fields=1)
    with pytest.raises(ValueError, match=f"modulus={modulus}"):
        Vocabulary.fit([np.zeros((1, 1), np.int64)], modulus=modulus)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        Vocabulary.fit([])
    with pytest.raises(ValueError, match="min_count=0"):
        Vocabulary.fit([np.zeros((1, 1), np.int64)], min_count=0)
    with pytest.raises(ValueError, match="2 columns of numbers for an encoder of 1"):
        Modulus(5, fields=1).encode(np.zeros((1, 2), np.int64))


@pytest.mark.parametrize("modulus", [None, 100])
def test_a_saved_vocabulary_is_the_same(tmp_path, modulus):
    raw = np.random.default_rng(1).integers(0, 1000, (500, 3))
    vocabulary = Vocabulary.fit([raw], modulus=modulus, min_count=2)
    path = tmp_path / "vocabulary.npz"
    vocabulary.save(path)
    vocabulary.save(path)
    loaded = Vocabulary.load(path)
    assert loaded.modulus == modulus
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(loaded.encode(raw), vocabulary.encode(raw))
    for mine, theirs in zip(vocabulary.counts, loaded.counts, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "vocabulary.npz"
    vocabulary = Vocabulary.fit([np.array([[1], [2]])])
    vocabulary.save(path)
    before = path.read_bytes()

    def disk_full(*_args: object, **_arrays: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", disk_full)
    with pytest.raises(OSError, match="no space left"):
        vocabulary.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_reindex_knows_the_training_rows_only():
    def log(ids):
        rows = np.array(ids, np.int32)[:, None]
        nothing = np.zeros((len(ids), 0), np.float32)
        return ClickLog(rows, nothing, np.zeros(len(ids), np.int8), ("a",), (100,))

    train, test = reindex(log([40, 7, 40]), log([7, 8, 40, 99]))
    assert train.ids.ravel().tolist() == [2, 1, 2]
    assert test.ids.ravel().tolist() == [1, 0, 2, 0]
    assert train.table_sizes == test.table_sizes == (3,)
