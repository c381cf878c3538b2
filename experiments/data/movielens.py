"""What the two MovieLens sets share: genres, age brackets, and the click log that ratings become."""

import numpy as np
from jaxtyping import Bool, Int8, Int32, Int64

from experiments.data.clicks import ClickLog

GENRES = (
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)

AGES = (1, 18, 25, 35, 45, 50, 56)
"""Youngest age of each bracket; the first is "under 18"."""


def genre_flags(genres: list[tuple[str, ...]]) -> Bool[np.ndarray, "items 18"]:
    """Which of ``GENRES`` each item has; names outside that list (``unknown``) have no column."""
    flags = [[name in names for name in GENRES] for names in genres]
    return np.array(flags, dtype=bool).reshape(-1, len(GENRES))


def genre_sets(flags: Bool[np.ndarray, "items 18"]) -> Int32[np.ndarray, " items"]:
    """One id for each set of genres that occurs, in the order of their bits."""
    bits = flags @ (1 << np.arange(len(GENRES)))
    return np.unique(bits, return_inverse=True)[1].astype(np.int32)


def age_brackets(ages: Int64[np.ndarray, " users"]) -> Int8[np.ndarray, " users"]:
    """Which of ``AGES`` each age falls into, from 0."""
    return (np.searchsorted(AGES, ages, side="right") - 1).astype(np.int8)


def click_log(
    user: Int32[np.ndarray, " N"],
    item: Int32[np.ndarray, " N"],
    liked: Bool[np.ndarray, " N"],
    *,
    male: Bool[np.ndarray, " users"],
    age: Int8[np.ndarray, " users"],
    occupation: Int8[np.ndarray, " users"],
    genres: Bool[np.ndarray, "items 18"],
) -> ClickLog:
    """Ratings as clicks, with what is known of the user and the film as further fields.

    Args:
        user, item: of each rating.
        liked: is it a click?
        male, age, occupation: of each user; the age is a bracket, the occupation one of 21.
        genres: of each item; a combination of genres is one id of the field ``genres``.
    """
    combination = genre_sets(genres)
    columns = {
        "user": (user, len(male)),
        "item": (item, len(genres)),
        "gender": (male[user], 2),
        "age": (age[user], len(AGES)),
        "occupation": (occupation[user], 21),
        "genres": (combination[item], int(combination.max()) + 1),
    }
    return ClickLog(
        ids=np.stack([ids for ids, _ in columns.values()], axis=1).astype(np.int32),
        dense=np.zeros((len(user), 0), dtype=np.float32),
        labels=liked.astype(np.int8),
        field_names=tuple(columns),
        table_sizes=tuple(size for _, size in columns.values()),
    )
