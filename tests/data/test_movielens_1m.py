"""MovieLens-1M: its facts, and the original archive read into the same arrays."""

import dataclasses
import gzip
import hashlib
import zipfile

import numpy as np
import pytest

from experiments.data import movielens_1m
from experiments.data.files import locate
from experiments.data.movielens import AGES, GENRES, age_brackets, genre_sets


@pytest.fixture(scope="module")
def _cache():
    return {}


@pytest.fixture
def data(require_data, _cache):
    require_data("movielens_1m/ml-1m.npz")
    if "ratings" not in _cache:
        _cache["ratings"] = movielens_1m.ratings()
        _cache["log"] = movielens_1m.load()
    return _cache


def test_facts(data):
    ratings = data["ratings"]
    assert len(ratings.user) == 1_000_209
    assert np.bincount(ratings.level).tolist() == [163_726, 261_202, 575_281]
    assert np.unique(ratings.user).tolist() == list(range(6040))
    assert np.unique(ratings.item).tolist() == list(range(3706))
    assert (ratings.item_movie_id == -1).sum() == 95
    assert np.unique(ratings.user.astype(np.int64) * 3706 + ratings.item).size == 1_000_209
    assert ratings.genres.shape == (3706, 18)
    assert ratings.male.sum() == 4331  # users.dat
    assert np.unique(ratings.occupation).tolist() == list(range(21))


def test_side_tables_are_joined_to_the_right_rows(data):
    """Each user and known film, looked up in the published tables by its original id."""
    ratings = data["ratings"]
    with gzip.open(locate("movielens_1m/users.dat.gz", None, movielens_1m.HOME), "rt") as file:
        users = {int(line.split("::")[0]): line.split("::") for line in file}
    assert len(users) == 6040
    for user, (male, age, job) in enumerate(zip(ratings.male, ratings.age, ratings.occupation, strict=True), start=1):
        assert users[user][1:4] == ["M" if male else "F", str(AGES[age]), str(job)]
    with gzip.open(locate("movielens_1m/movies.dat.gz", None, movielens_1m.HOME), "rt", encoding="utf-8") as file:
        films = {int(line.split("::")[0]): line.rstrip("\n").split("::")[2] for line in file}
    assert len(films) == 3883
    for movie, flags in zip(ratings.item_movie_id, ratings.genres, strict=True):
        named = "|".join(name for name, has in zip(GENRES, flags, strict=True) if has)
        assert named == ("" if movie < 0 else films[movie])


def test_the_click_log(data):
    ratings, log = data["ratings"], data["log"]
    assert log.field_names == ("user", "item", "gender", "age", "occupation", "genres")
    assert log.table_sizes[:5] == (6040, 3706, 2, 7, 21)
    assert log.labels.mean() == pytest.approx(0.575, abs=5e-4)
    np.testing.assert_array_equal(log.labels == 1, ratings.level == 2)
    row = 123_456
    assert log.ids[row, :2].tolist() == [ratings.user[row], ratings.item[row]]
    assert log.ids[row, 3] == ratings.age[ratings.user[row]]


def test_splits(data):
    train, validation, test = movielens_1m.splits(seed=2)
    assert [len(part) for part in (train, validation, test)] == [800_167, 100_021, 100_021]
    again = data["log"].split((0.8, 0.1, 0.1), seed=2)
    np.testing.assert_array_equal(again[2].ids, test.ids)
    seen = np.concatenate([part.ids[:, 0] * np.int64(3706) + part.ids[:, 1] for part in (train, validation, test)])
    assert np.unique(seen).size == 1_000_209


RATINGS = "1::20::5::978300760\n1::10::3::978302109\n2::30::2::978301968\n2::10::4::978300275\n3::20::1::978824291\n"
USERS = "1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::15::55117\n"
MOVIES = (
    "10::Fille: seule, La (1995)::Drama\n15::Never rated (1990)::War\n"
    "20::Misérables, Les (1995)::Drama|Musical\n30::Home Alone (1990)::Children's|Comedy\n"
)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_original_archive_is_downloaded_and_read(no_data, served, monkeypatch, line_end):
    folder, address = served
    path = folder / "ml-1m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (("ratings", RATINGS), ("users", USERS), ("movies", MOVIES)):
            archive.writestr(f"ml-1m/{name}.dat", text.replace("\n", line_end).encode("latin-1"))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    home = dataclasses.replace(movielens_1m.HOME, url=f"{address}/ml-1m.zip", sha256=sha256)
    monkeypatch.setattr(movielens_1m, "HOME", home)

    ratings = movielens_1m.ratings()
    assert ratings.user.tolist() == [0, 0, 1, 1, 2]
    assert ratings.item.tolist() == [0, 1, 0, 2, 1]
    assert ratings.level.tolist() == [1, 2, 2, 0, 0]
    assert ratings.item_movie_id.tolist() == [10, 20, 30]
    assert ratings.male.tolist() == [False, True, True]
    assert ratings.age.tolist() == [0, 6, 2]
    assert ratings.occupation.tolist() == [10, 16, 15]
    named = [{name for name, has in zip(GENRES, row, strict=True) if has} for row in ratings.genres]
    assert named == [{"Drama"}, {"Drama", "Musical"}, {"Children's", "Comedy"}]
    log = movielens_1m.load()
    assert log.labels.tolist() == [0, 1, 1, 0, 0]
    assert log.table_sizes == (3, 3, 2, 7, 21, 3)


def test_age_brackets_begin_with_their_age():
    ages = np.array([1, 17, 18, 24, 25, 34, 35, 44, 45, 49, 50, 55, 56, 99])
    assert age_brackets(ages).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_genre_sets_are_equal_exactly_for_equal_sets():
    flags = np.random.default_rng(0).random((200, 18)) < 0.1
    ids = genre_sets(flags)
    equal = (flags[:, None, :] == flags[None, :, :]).all(axis=-1)
    np.testing.assert_array_equal(ids[:, None] == ids[None, :], equal)
    assert np.unique(ids).tolist() == list(range(int(ids.max()) + 1))
