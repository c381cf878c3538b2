"""Criteo: the facts of the samples, and the splits of the real log."""

import numpy as np
import pytest

from experiments.data import criteo
from experiments.data.clicktext import ClickText


@pytest.fixture
def random_sample(require_data):
    require_data(criteo.RANDOM.name)
    return criteo.load()


def test_facts_of_the_random_sample(random_sample):
    assert random_sample.ids.shape == (8192, 26)
    assert random_sample.dense.shape == (8192, 13)
    assert random_sample.labels.mean() == pytest.approx(0.253, abs=5e-4)
    assert sum(random_sample.table_sizes) - 26 == 39_910  # distinct ids
    assert random_sample.ids.min() == 1


def test_dense_features_are_logs_of_integers_from_1(random_sample):
    raw = np.expm1(random_sample.dense.astype(np.float64))
    assert raw.min() == 0
    np.testing.assert_allclose(raw, np.round(raw), rtol=1e-5, atol=1e-5)


def test_published_ids_lie_in_the_whole_logs_tables(random_sample):
    published = criteo.load_published_ids()
    assert sum(published.table_sizes) == 33_762_577
    for mine, theirs in zip(random_sample.ids.T, published.ids.T, strict=True):
        pairs = np.unique(np.stack([mine, theirs]), axis=1)
        assert np.unique(pairs[0]).size == np.unique(pairs[1]).size == pairs.shape[1]


def test_splits_of_the_random_sample_know_training_ids_only(random_sample):
    train, validation, test = criteo.splits(seed=3)
    assert [len(part) for part in (train, validation, test)] == [6554, 819, 819]
    assert train.ids.min() == 1
    for part in (validation, test):
        assert part.table_sizes == train.table_sizes
        assert 0.05 < (part.ids == 0).mean() < 0.5
    again = criteo.splits(seed=3)
    np.testing.assert_array_equal(again.test.ids, test.ids)
    assert not np.array_equal(criteo.splits(seed=4).test.labels, test.labels)


def test_facts_of_the_head(require_data):
    require_data(criteo.HEAD.name)
    train, validation, test = criteo.head_splits()
    assert [len(part) for part in (train, validation, test)] == [6480, 720, 800]
    clicks = sum(int(part.labels.sum()) for part in (train, validation, test))
    assert clicks / 8000 == pytest.approx(0.216, abs=5e-4)
    assert train.dense.shape == (6480, 13)
    # The log's first line: label 0, integers 1 1 5 0 1382 4 15 2 181 1 2 - 2.
    first = np.log1p([1, 1, 5, 0, 1382, 4, 15, 2, 181, 1, 2, 0, 2]).astype(np.float32)
    everything = np.concatenate([train.dense, validation.dense])
    assert (everything == first).all(axis=1).any()


def test_the_published_table_sizes_add_up():
    assert len(criteo.KAGGLE_TABLE_SIZES) == 26
    assert sum(criteo.KAGGLE_TABLE_SIZES) == 33_762_577


@pytest.mark.parametrize(("rows", "days"), [(criteo.KAGGLE_ROWS, 7), (100, 7), (101, 7), (10, 2)])
def test_day_splits_are_those_of_dlrm(tmp_path, rows, days):
    """DLRM: divmod for the days, the first ones longer; ``np.array_split`` of the last one, test first."""
    each, extra = divmod(rows, days)
    per_day = [each + (day < extra) for day in range(days)]
    test, validation = np.array_split(np.arange(rows - per_day[-1], rows), 2)
    text = ClickText((tmp_path / "train.txt",), criteo.FORMAT)
    parts = criteo.day_splits(text, rows=rows, days=days)
    assert (parts.train.start, parts.train.stop) == (0, sum(per_day[:-1]))
    assert (parts.test.start, parts.test.stop) == (test[0], test[-1] + 1)
    assert (parts.validation.start, parts.validation.stop) == (validation[0], validation[-1] + 1)


@pytest.mark.parametrize(("rows", "days"), [(100, 1), (100, 0), (7, 7)])
def test_a_log_of_too_few_days_is_not_split(tmp_path, rows, days):
    text = ClickText((tmp_path / "train.txt",), criteo.FORMAT)
    with pytest.raises(ValueError, match=f"days={days}"):
        criteo.day_splits(text, rows=rows, days=days)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_real_logs_are_found_by_their_published_names(no_data, suffix):
    names = ["criteo_kaggle/train.txt", "criteo_terabyte/day_0", "criteo_terabyte/day_23"]
    paths = [no_data / f"{name}{suffix}" for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert criteo.kaggle(chunk_rows=5).files == (paths[0],)
    assert criteo.terabyte((0, 23)).files == tuple(paths[1:])
    with pytest.raises(FileNotFoundError, match="criteo_terabyte/day_1"):
        criteo.terabyte((0, 1))
