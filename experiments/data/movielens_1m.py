"""MovieLens-1M: 1,000,209 ratings of 3,706 films by 6,040 users (Harper and Konstan, TiiS 2015).

Ratings are kept as three levels: 0 for 1 and 2 stars, 1 for 3 stars, 2 for 4 and 5 stars. The files
under ``$HASHML_DATA`` are a join of published derivatives: five pairs have another level than in the
original, times are missing, and the film is unknown for 95 rarely rated items (genreless here). The
original ``ml-1m.zip``, which is downloaded where they are not, has neither flaw and gives the same
arrays otherwise, in the same order. Its licence forbids to pass it on.

As a click log a rating of 4 or 5 stars is a click: click rate 0.575, one-hot logistic regression
reaches an AUC of 0.787.
"""

import gzip
import zipfile
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Int8, Int32

from experiments.data.clicks import ClickLog, Splits
from experiments.data.files import Home, fetch, find, locate
from experiments.data.movielens import age_brackets, click_log, genre_flags

HOME = Home(
    "MovieLens-1M",
    "https://grouplens.org/datasets/movielens/1m/",
    "movielens_1m/ml-1m.zip",
    "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
)

_SHA256 = {
    "movielens_1m/ml-1m.npz": "7f5525050656dce038f604c443c7837f15da5cc1bebe349072b081242dff103f",
    "movielens_1m/users.dat.gz": "1bfdd04e6e7543fb1e26369bc4966040076d06814f07682a5b77497b1ffa2700",
    "movielens_1m/movies.dat.gz": "55de701c227b3a8125219a591f11073d50277cbdb9d3ca1b1374279fcb42b4b4",
}


class Ratings(NamedTuple):
    """The set as it is, sorted by user, then item.

    Attributes:
        user: of each rating, 0 to 6039 (the original id less 1).
        item: of each rating, 0 to 3705, the rank of the film's id among the rated films.
        level: 0 = 1-2 stars, 1 = 3 stars, 2 = 4-5 stars.
        item_movie_id: original id of each item; -1 where it is not known.
        male: of each user.
        age: of each user, a bracket of ``movielens.AGES``.
        occupation: of each user, the original code 0 to 20.
        genres: of each item, a column for each of ``movielens.GENRES``.
    """

    user: Int32[np.ndarray, " N"]
    item: Int32[np.ndarray, " N"]
    level: Int8[np.ndarray, " N"]
    item_movie_id: Int32[np.ndarray, " items"]
    male: Bool[np.ndarray, " users"]
    age: Int8[np.ndarray, " users"]
    occupation: Int8[np.ndarray, " users"]
    genres: Bool[np.ndarray, "items 18"]


def ratings() -> Ratings:
    """All ratings, with what is known of users and films.

    Raises:
        DataNotFound: there is neither a copy nor a download.
        ChecksumMismatch: a file is not the one it should be.
    """
    if find("movielens_1m/ml-1m.npz", _SHA256["movielens_1m/ml-1m.npz"]) is None:
        return _from_zip()
    joined, users, movies = (locate(name, sha, HOME) for name, sha in _SHA256.items())
    with np.load(joined, allow_pickle=False) as file:
        user, item, level, movie = (file[name] for name in ("user", "item", "level", "item_movie_id"))
    return _with_tables(
        user.astype(np.int32),
        item.astype(np.int32),
        level,
        movie.astype(np.int32),
        gzip.decompress(users.read_bytes()).decode("utf-8"),
        gzip.decompress(movies.read_bytes()).decode("utf-8"),
    )


def load() -> ClickLog:
    """All ratings as a click log of six fields: level 2 (4 or 5 stars) against the rest.

    ``genres`` is one id for each combination of genres that occurs.
    """
    data = ratings()
    return click_log(
        data.user,
        data.item,
        data.level == 2,
        male=data.male,
        age=data.age,
        occupation=data.occupation,
        genres=data.genres,
    )


def splits(seed: int = 0, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> Splits[ClickLog]:
    """The click log, split at random by ``seed``."""
    return Splits(*load().split(fractions, seed=seed))


def _from_zip() -> Ratings:
    with zipfile.ZipFile(fetch(HOME)) as archive:
        # The two colons between columns read as an empty column between two separators.
        stars = pl.read_csv(
            archive.read("ml-1m/ratings.dat"),
            separator=":",
            has_header=False,
            columns=[0, 2, 4],
        )
        users, movies = (archive.read(f"ml-1m/{name}.dat").decode("latin-1") for name in ("users", "movies"))
    user, movie, rating = (column.to_numpy().astype(np.int32) for column in stars)
    rated, item = np.unique(movie, return_inverse=True)
    order = np.lexsort((item, user))
    level = np.array([0, 0, 0, 1, 2, 2], dtype=np.int8)[rating]
    return _with_tables(
        user[order] - 1, item[order].astype(np.int32), level[order], rated.astype(np.int32), users, movies
    )


def _with_tables(
    user: np.ndarray, item: np.ndarray, level: np.ndarray, item_movie_id: np.ndarray, users: str, movies: str
) -> Ratings:
    _, gender, age, occupation, _ = zip(*_records(users), strict=True)
    genres = {int(movie): tuple(names.split("|")) for movie, _, names in _records(movies)}
    return Ratings(
        user,
        item,
        level,
        item_movie_id,
        male=np.array(gender) == "M",
        age=age_brackets(np.array(age).astype(np.int64)),
        occupation=np.array(occupation).astype(np.int8),
        genres=genre_flags([genres.get(int(movie), ()) for movie in item_movie_id]),
    )


def _records(text: str) -> list[list[str]]:
    # Not splitlines(), which also splits at characters that stand in titles.
    return [line.rstrip("\r").split("::") for line in text.strip().split("\n")]
