"""Avazu: the facts of the sample."""

import gzip

import numpy as np
import pytest

from experiments.data import avazu
from experiments.data.files import locate


@pytest.fixture(autouse=True)
def _sample(require_data):
    require_data(avazu.HOME.name)


def test_facts():
    train, validation, test = avazu.splits()
    assert len(train) + len(validation) == 8087
    assert len(test) == 912
    assert train.ids.shape[1] == 21
    assert train.dense.shape[1] == 0
    clicks = sum(int(part.labels.sum()) for part in (train, validation, test))
    assert clicks / 8999 == pytest.approx(0.17, abs=5e-3)


def test_the_header_names_the_columns_of_the_format_and_the_hour_is_constant():
    with gzip.open(locate(avazu.HOME.name, None, avazu.HOME), "rt") as file:
        header, *rows = (line.rstrip("\n").split(",") for line in file)
    assert tuple(header) == tuple(name for name, _ in avazu.FORMAT.columns)
    assert len(header) == 24
    assert len({row[header.index("hour")] for row in rows}) == 1


def test_the_test_rows_are_in_order_and_ids_follow_their_text():
    """Two test rows have one id exactly where they have one text, or both were never trained on."""
    test = avazu.splits().test
    with gzip.open(locate("avazu_sample/test.csv.gz", None, avazu.HOME), "rt") as file:
        rows = [line.rstrip("\n").split(",") for line in file][1:]
    assert test.labels.tolist() == [int(row[1]) for row in rows]
    for column, ids in enumerate(test.ids.T, start=3):
        known = {(row[column], int(number)) for row, number in zip(rows, ids, strict=True) if number}
        assert len(known) == len({text for text, _ in known}) == len({number for _, number in known})


def test_splits_follow_the_seed():
    first, second = avazu.splits(seed=1), avazu.splits(seed=2)
    assert len(first.train) == len(second.train)
    assert not np.array_equal(first.train.labels, second.train.labels)
    assert (first.test.ids == 0).any()
    assert first.train.ids.min() == 1
