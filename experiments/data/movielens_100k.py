"""MovieLens-100K: 100,000 ratings with true stars and times (Harper and Konstan, TiiS 2015).

Read from a copy under ``$HASHML_DATA``, else from the original ``ml-100k.zip``, which is downloaded.
Its licence forbids to pass it on. As a click log, 4 or 5 stars are a click: click rate 0.554.
"""

import zipfile
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Int8, Int32, Int64

from experiments.data.clicks import ClickLog, Splits, cut
from experiments.data.files import Home, fetch, find, locate
from experiments.data.movielens import GENRES, age_brackets, click_log, genre_flags

HOME = Home(
    "MovieLens-100K",
    "https://grouplens.org/datasets/movielens/100k/",
    "movielens_100k/ml-100k.zip",
    "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
)

_SHA256 = {
    "movielens_100k/ml-100k.inter.tsv.gz": "9b437e45bc8f23e6672be54b8f4ad85856ce1667fc74f502a4296d55e40f6203",
    "movielens_100k/ml-100k.user.tsv.gz": "89d9f71d245d271cff8c9e8def1d75fb08c2a857db3687cdff0742fd8f5420c9",
    "movielens_100k/ml-100k.item.tsv.gz": "92dddf09e8656b5b2912be8844d5ceed402e1cd48a136c59f72a419b0bf62ed7",
}


class Ratings(NamedTuple):
    """The set as it is, in its own order.

    Attributes:
        user: of each rating, 0 to 942 (the original id less 1).
        item: of each rating, 0 to 1681 (the original id less 1).
        stars: 1 to 5.
        time: seconds since 1970, UTC.
        male: of each user.
        age: of each user, a bracket of ``movielens.AGES``.
        occupation: of each user, an index into ``occupations``.
        occupations: 21 names, in alphabetical order.
        genres: of each item, a column for each of ``movielens.GENRES``.
    """

    user: Int32[np.ndarray, " N"]
    item: Int32[np.ndarray, " N"]
    stars: Int8[np.ndarray, " N"]
    time: Int64[np.ndarray, " N"]
    male: Bool[np.ndarray, " users"]
    age: Int8[np.ndarray, " users"]
    occupation: Int8[np.ndarray, " users"]
    occupations: tuple[str, ...]
    genres: Bool[np.ndarray, "items 18"]


def ratings() -> Ratings:
    """All ratings, with what is known of users and films.

    Raises:
        DataNotFound: there is neither a copy nor a download.
        ChecksumMismatch: a file is not the one it should be.
    """
    if find(*next(iter(_SHA256.items()))) is None:
        return _from_zip()
    rated, people, films = (
        pl.read_csv(locate(name, sha, HOME), separator="\t", quote_char=None, infer_schema=False)
        for name, sha in _SHA256.items()
    )
    return _assemble(
        rated,
        people.select("user_id:token", "age:token", "gender:token", "occupation:token"),
        [tuple(names.split(" ")) for names in films["class:token_seq"]],
    )


def load() -> ClickLog:
    """All ratings as a click log of six fields, in the order of ``ratings``: 4 or 5 stars are a click.

    ``genres`` is one id for each combination of genres that occurs.
    """
    data = ratings()
    return click_log(
        data.user,
        data.item,
        data.stars >= 4,
        male=data.male,
        age=data.age,
        occupation=data.occupation,
        genres=data.genres,
    )


def splits(seed: int = 0, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> Splits[ClickLog]:
    """The click log, split at random by ``seed``."""
    return Splits(*load().split(fractions, seed=seed))


def temporal_splits(fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> Splits[ClickLog]:
    """The click log in the order of time, cut: training is the past, test the future.

    Most users rate on one day only, so most test users have no training rows.
    """
    data, log = ratings(), load()
    order = np.lexsort((data.item, data.user, data.time))
    bounds = cut(len(log), fractions)
    return Splits(*(log.take(order[low:high]) for low, high in pairwise(bounds)))


def _from_zip() -> Ratings:
    with zipfile.ZipFile(fetch(HOME)) as archive:
        rated, people, films = (
            pl.read_csv(
                archive.read(f"ml-100k/{name}"),
                separator=separator,
                has_header=False,
                quote_char=None,
                infer_schema=False,
                encoding="latin-1",
            )
            for name, separator in (("u.data", "\t"), ("u.user", "|"), ("u.item", "|"))
        )
    # u.item ends in a 0/1 column for "unknown" and then one for each genre, in GENRES' order.
    flags = films.to_numpy()[:, -len(GENRES) :] == "1"
    genres = [tuple(name for name, has in zip(GENRES, row, strict=True) if has) for row in flags]
    return _assemble(rated, people[:, :4], genres)


def _assemble(rated: pl.DataFrame, people: pl.DataFrame, genres: list[tuple[str, ...]]) -> Ratings:
    """From columns user, item, stars, time; and user, age, gender, occupation, in the order of users."""
    user, item, stars, time = (column.cast(pl.Int64).to_numpy() for column in rated)
    _, age, gender, occupation = people
    names, code = np.unique(occupation.to_numpy().astype(str), return_inverse=True)
    return Ratings(
        user=(user - 1).astype(np.int32),
        item=(item - 1).astype(np.int32),
        stars=stars.astype(np.int8),
        time=time,
        male=(gender == "M").to_numpy(),
        age=age_brackets(age.cast(pl.Int64).to_numpy()),
        occupation=code.astype(np.int8),
        occupations=tuple(str(name) for name in names),
        genres=genre_flags(genres),
    )
