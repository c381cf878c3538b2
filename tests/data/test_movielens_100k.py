"""MovieLens-100K: its facts, and the original archive read into the same arrays."""

import dataclasses
import hashlib
import zipfile

import numpy as np
import pytest

from experiments.data import movielens_100k
from experiments.data.movielens import GENRES


@pytest.fixture
def _files(require_data):
    require_data("movielens_100k/ml-100k.inter.tsv.gz")


@pytest.mark.usefixtures("_files")
def test_facts():
    ratings = movielens_100k.ratings()
    assert len(ratings.user) == 100_000
    assert np.unique(ratings.user).tolist() == list(range(943))
    assert np.unique(ratings.item).tolist() == list(range(1682))
    assert np.unique(ratings.stars).tolist() == [1, 2, 3, 4, 5]
    assert len(ratings.occupations) == 21
    assert ratings.genres.shape == (1682, 18)
    # The first lines of the published tables.
    assert (ratings.user[0], ratings.item[0], ratings.stars[0], ratings.time[0]) == (195, 241, 3, 881250949)
    assert ratings.male[0]
    assert ratings.age[0] == 1
    assert ratings.occupations[ratings.occupation[0]] == "technician"
    assert [name for name, has in zip(GENRES, ratings.genres[0], strict=True) if has] == [
        "Animation",
        "Children's",
        "Comedy",
    ]
    assert not ratings.genres[266].any()  # the film whose genre is "unknown"
    year = 365 * 24 * 3600
    assert ratings.time.min() / year > 1997 - 1970
    assert ratings.time.max() / year < 1999 - 1970


@pytest.mark.usefixtures("_files")
def test_the_click_log():
    ratings, log = movielens_100k.ratings(), movielens_100k.load()
    assert log.table_sizes[:5] == (943, 1682, 2, 7, 21)
    np.testing.assert_array_equal(log.labels == 1, ratings.stars >= 4)
    assert [len(part) for part in movielens_100k.splits(seed=1)] == [80_000, 10_000, 10_000]


@pytest.mark.usefixtures("_files")
def test_temporal_splits_train_on_the_past():
    ratings = movielens_100k.ratings()
    when = dict(zip(zip(ratings.user.tolist(), ratings.item.tolist(), strict=True), ratings.time, strict=True))
    parts = list(movielens_100k.temporal_splits((0.7, 0.1, 0.2)))
    assert [len(part) for part in parts] == [70_000, 10_000, 20_000]
    times = [[when[user, item] for user, item in part.ids[:, :2].tolist()] for part in parts]
    for earlier, later in ((times[0], times[1]), (times[1], times[2])):
        assert max(earlier) <= min(later)
    unseen = ~np.isin(parts[2].ids[:, 0], parts[0].ids[:, 0])
    assert unseen.mean() > 0.5


DATA = "3\t1\t4\t881250949\n1\t2\t2\t891717742\n2\t1\t5\t878887116\n"
USERS = "1|24|M|technician|85711\n2|53|F|other|94043\n3|7|M|student|T8H1N\n"
FLAGS = [[0] * 19, [1] + [0] * 18]
FLAGS[0][1] = FLAGS[0][18] = 1  # Action, Western
ITEMS = "".join(
    f"{number}|Misérables, Les (1995)|01-Jan-1995||http://example.org/|{'|'.join(map(str, flags))}\n"
    for number, flags in enumerate(FLAGS, start=1)
)


def test_the_original_archive_is_downloaded_and_read(no_data, served, monkeypatch):
    folder, address = served
    path = folder / "ml-100k.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (("u.data", DATA), ("u.user", USERS), ("u.item", ITEMS)):
            archive.writestr(f"ml-100k/{name}", text.encode("latin-1"))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    home = dataclasses.replace(movielens_100k.HOME, url=f"{address}/ml-100k.zip", sha256=sha256)
    monkeypatch.setattr(movielens_100k, "HOME", home)

    ratings = movielens_100k.ratings()
    assert ratings.user.tolist() == [2, 0, 1]
    assert ratings.item.tolist() == [0, 1, 0]
    assert ratings.stars.tolist() == [4, 2, 5]
    assert ratings.time.tolist() == [881250949, 891717742, 878887116]
    assert ratings.male.tolist() == [True, False, True]
    assert ratings.age.tolist() == [1, 5, 0]
    assert [ratings.occupations[code] for code in ratings.occupation] == ["technician", "other", "student"]
    named = [[name for name, has in zip(GENRES, row, strict=True) if has] for row in ratings.genres]
    assert named == [["Action", "Western"], []]
    assert movielens_100k.load().labels.tolist() == [1, 0, 1]
