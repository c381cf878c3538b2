"""Microsoft Research Paraphrase Corpus (Dolan and Brockett 2005): pairs of sentences, judged by people.

A line is ``label TAB sentence TAB sentence``, label 1 where the two say the same: about two thirds of the pairs.
"""

import gzip
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from experiments.data.files import Home, locate

ROWS = {"train": 4076, "test": 1725}
PARAPHRASES = {"train": 2753, "test": 1147}

_PAGE = "https://www.microsoft.com/en-us/download/details.aspx?id=52398"
_SHA256 = {
    "train": "88c45f746fffb0e1a72f50f69afda6134d001689dd21c1faebaef0f3c5537c25",
    "test": "e7f1861a63062fc52a783b039d393d9c972e9dab17578abcbe46e58520c53096",
}


@dataclass(frozen=True)
class Pairs:
    """Pairs of sentences.

    Attributes:
        first, second: sentences.
        labels: 1 where they say the same.
    """

    first: list[str]
    second: list[str]
    labels: Int32[np.ndarray, " N"]


def load(part: str) -> Pairs:
    """The pairs of a part, in the file's order.

    Raises:
        ValueError: for another part than train and test, or a file that has not their pairs.
        experiments.data.files.DataNotFound: where the file is missing, with what to get and where to put it.
    """
    if part not in ROWS:
        raise ValueError(f"part={part!r} must be 'train' or 'test'")
    file = f"text_classification/mrpc_{part}.tsv.gz"
    path = locate(file, _SHA256[part], Home("MRPC", _PAGE, file))
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines]
    labels = np.array([int(row[0]) for row in rows], np.int32)
    if len(rows) != ROWS[part] or labels.sum() != PARAPHRASES[part] or any(len(row) != 3 for row in rows):
        raise ValueError(f"{file} has {len(rows)} rows and {labels.sum()} paraphrases; not those of MRPC")
    return Pairs([row[1] for row in rows], [row[2] for row in rows], labels)
