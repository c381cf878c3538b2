"""Criteo display advertising: 13 integer and 26 categorical features of a click log.

The real logs are read as text at bounded memory: the Kaggle challenge of 2014 (``train.txt``, seven
days, 45,840,617 rows) and the Terabyte log (``day_0`` ... ``day_23``, about 4.4 billion rows), both
tab separated: label, 13 integers, 26 numbers of 8 hexadecimal digits, any of them may be empty.
Preprocessing and splits are those of DLRM (Naumov et al., arXiv 1906.00091; facebookresearch/dlrm,
data_utils.py), except that row 0 of a vocabulary is kept for unknown ids (see ``vocabulary``).

Two small samples stand in for them, and cannot be joined (one has indices, one raw numbers): 8,192
rows drawn from all seven days (``load``, ``splits``) and the first 8,000 rows (``head_splits``).

    data = criteo.kaggle()
    parts = criteo.day_splits(data, rows=criteo.KAGGLE_ROWS, days=7)
    vocabulary = Vocabulary.fit(chunk.ids for chunk in parts.train.raw())
    for batch in clicks.batches(parts.train.clicks(vocabulary), 2048, window=2**20): ...
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.data.clicks import ClickLog, Splits
from experiments.data.clicktext import ClickText, TextFormat, text_splits
from experiments.data.files import Home, data_folder, locate
from experiments.data.vocabulary import reindex

DENSE = tuple(f"I{i}" for i in range(1, 14))
FIELDS = tuple(f"C{i}" for i in range(1, 27))

FORMAT = TextFormat(
    name="Criteo",
    separator="\t",
    columns=(
        ("label", "label"),
        *((name, "dense") for name in DENSE),
        *((name, "hex") for name in FIELDS),
    ),
)

KAGGLE_ROWS = 45_840_617
KAGGLE_TABLE_SIZES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
"""Distinct numbers of each field in the whole Kaggle log, 33,762,577 in all."""

_PAGE = "https://ailab.criteo.com/ressources/"
KAGGLE = Home("Criteo Kaggle", _PAGE, "criteo_kaggle/train.txt")
TERABYTE = Home("Criteo Terabyte", _PAGE, "criteo_terabyte/day_0")
RANDOM = Home("Criteo, random sample", _PAGE, "criteo_sample/random_8192.npz")
HEAD = Home("Criteo, head of the log", _PAGE, "criteo_sample/train.tsv.gz")

_RANDOM_SHA256 = "fbda9ad7bcbe6837ae64e873690e9435b245c44917b5309629fa8aca0e32b8a1"
_HEAD_SHA256 = {
    "criteo_sample/train.tsv.gz": "26f53069b65ee2088d59d084767e9216ba6c8f41b8b728a8702791224bb7ed17",
    "criteo_sample/test.tsv.gz": "5d21ca9a6e7cf9bb68e01707cecbbe3e4c591abb1b9d61416443953270f11d58",
}


def kaggle(*, chunk_rows: int = 65_536) -> ClickText:
    """The Kaggle log, ``criteo_kaggle/train.txt`` (or ``.gz``) under ``$HASHML_DATA``.

    A file elsewhere: ``ClickText((path,), criteo.FORMAT)``.

    Raises:
        DataNotFound: there is no such file.
    """
    return ClickText((_plain_or_gzip(KAGGLE),), FORMAT, chunk_rows=chunk_rows)


def terabyte(days: tuple[int, ...] = tuple(range(24)), *, chunk_rows: int = 65_536) -> ClickText:
    """Days of the Terabyte log, ``criteo_terabyte/day_<n>`` (or ``.gz``) under ``$HASHML_DATA``.

    DLRM trains on days 0 to 22 and tests on day 23.

    Raises:
        DataNotFound: a day is not there.
    """
    homes = (replace(TERABYTE, name=f"criteo_terabyte/day_{day}") for day in days)
    return ClickText(tuple(_plain_or_gzip(home) for home in homes), FORMAT, chunk_rows=chunk_rows)


def day_splits(text: ClickText, *, rows: int, days: int) -> Splits[ClickText]:
    """DLRM's split: all days but the last train; of the last one, the first half tests.

    Args:
        text: one log of consecutive days.
        rows: of the whole log; ``KAGGLE_ROWS``, or ``text.count()``.
        days: the log is cut in this many parts of equal length (the first ones one row longer
            where that does not divide), as its rows carry no date.

    Raises:
        ValueError: there are fewer than two days, or the last one is too short to halve.
    """
    last = rows // days if days > 0 else 0
    if days < 2 or last < 2:
        raise ValueError(f"days={days} must be at least 2, each with at least 2 of the rows={rows}")
    begin = rows - last
    middle = begin + (last + 1) // 2
    return Splits(text.rows(0, begin), text.rows(middle, rows), text.rows(begin, middle))


def load() -> ClickLog:
    """The 8,192 random rows; a field's table has a row for each id that occurs, after row 0.

    The dense features come transformed; -1 in them stands for a negative raw value, and is set to 0
    as everywhere else.
    """
    published = load_published_ids()
    return reindex(published)[0]


def load_published_ids() -> ClickLog:
    """The 8,192 random rows with tables of the whole log's size, ``KAGGLE_TABLE_SIZES``.

    For what a method does to the memory of tables; nearly all of their rows are never read here.
    """
    with np.load(locate(RANDOM.name, _RANDOM_SHA256, RANDOM), allow_pickle=False) as file:
        sparse, dense, labels = file["sparse"], file["dense"], file["label"]
    offsets = np.cumsum([0, *KAGGLE_TABLE_SIZES[:-1]]).astype(np.int32)
    return ClickLog(sparse - offsets, np.maximum(dense, 0), labels, FIELDS, KAGGLE_TABLE_SIZES)


def splits(seed: int = 0, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> Splits[ClickLog]:
    """The 8,192 random rows, split by ``seed``; ids that the training rows lack are 0."""
    train, validation, test = load().split(fractions, seed=seed)
    return Splits(*reindex(train, validation, test))


def head_splits(seed: int = 0, validation: float = 0.1) -> Splits[ClickLog]:
    """The first 8,000 rows of the Kaggle log, read as the real files are.

    Args:
        seed: picks the validation rows.
        validation: their part of the first 7,200 rows; the last 800 rows test.
    """
    train, test = (ClickText((locate(name, sha, HEAD),), FORMAT) for name, sha in _HEAD_SHA256.items())
    return text_splits(train, test, validation=validation, seed=seed)


def _plain_or_gzip(home: Home) -> Path:
    folder = data_folder()
    if folder is not None and not (folder / home.name).is_file() and (folder / f"{home.name}.gz").is_file():
        return folder / f"{home.name}.gz"
    return locate(home.name, None, home)
