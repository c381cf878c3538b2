"""Sentences and documents with a class: SST-2, AG News, MR and others, as ``label TAB text`` a line.

Texts are cut in lower-case words and signs. A vocabulary holds the words that occur most often in the training
rows; 0 is padding and 1 every other word, so that it tells nothing about the other rows.
"""

import gzip
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int, Int32

from experiments.data.clicks import Splits
from experiments.data.counter import permutation, stream
from experiments.data.files import Home, locate

PADDING, UNKNOWN = 0, 1
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?|[^\sa-z0-9]")


@dataclass(frozen=True)
class Facts:
    """Rows and classes of a set, and the checksums of its parts."""

    train: int
    test: int
    classes: int
    sha256: tuple[str, str]
    page: str


SETS = {
    "sst2": Facts(
        6920,
        1821,
        2,
        (
            "143415001e48f2feb6f079c297f6c2acee0807b3daeedcbfebab23f992ec4ea4",
            "ed0acab2df94df250c4c2b607e48d4c0265ed8f541a15bc7367f62be95c86be4",
        ),
        "https://nlp.stanford.edu/sentiment/",
    ),
    "ag_news": Facts(
        6000,
        1600,
        4,
        (
            "6b792aa472081ecdc676d0b9f88f1c4145db8a76d69b2fddb52d80a835976507",
            "3f796d5dda3377e7a39f9b951495eac85464be7ccf2f8fd6f3469d621d8efa2f",
        ),
        "https://github.com/mhjabreel/CharCnn_Keras (AG's corpus of news articles)",
    ),
    "mr": Facts(
        9595,
        1067,
        2,
        (
            "bf95d4a9040e6f17e2386654c6250c90edf2edca25a404fa42153f2c5515472e",
            "ff5c263220a2358142551a19486808c35c5a5cb57f2a21b6b38d7992c3a4abc6",
        ),
        "https://www.cs.cornell.edu/people/pabo/movie-review-data/",
    ),
}


@dataclass(frozen=True)
class Texts:
    """Token sequences with a class each.

    Attributes:
        inputs: tokens, padded with 0 or cut to one length.
        labels: classes.

    Raises:
        ValueError: lengths disagree.
    """

    inputs: Int32[np.ndarray, "N T"]
    labels: Int32[np.ndarray, " N"]

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise ValueError(f"{len(self.inputs)} texts, but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: slice | Int[np.ndarray, " M"]) -> "Texts":
        """The named texts, in that order."""
        return replace(self, inputs=self.inputs[rows], labels=self.labels[rows])


def load(name: str, part: str) -> tuple[list[str], Int32[np.ndarray, " N"]]:
    """Texts and classes of a part, in the file's order.

    Raises:
        ValueError: for an unknown set or part, or a file that has not the rows and classes of its set.
    """
    if name not in SETS:
        raise ValueError(f"name={name!r} must be one of {', '.join(SETS)}")
    if part not in ("train", "test"):
        raise ValueError(f"part={part!r} must be 'train' or 'test'")
    facts = SETS[name]
    file = f"text_classification/{name}_{part}.tsv.gz"
    path = locate(file, facts.sha256[part == "test"], Home(name, facts.page, file))
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        rows = [line.rstrip("\n").split("\t", 1) for line in lines]
    labels = np.array([int(label) for label, _ in rows], np.int32)
    expected = facts.train if part == "train" else facts.test
    if len(rows) != expected or set(labels.tolist()) != set(range(facts.classes)):
        raise ValueError(
            f"{file} has {len(rows)} rows of classes {sorted(set(labels.tolist()))}; not those of {name}"
        )
    return [text for _, text in rows], labels


def words(text: str) -> list[str]:
    """Words and signs, in lower case."""
    return _WORD.findall(text.lower())


def vocabulary(texts: Sequence[str], size: int) -> dict[str, int]:
    """Numbers of the ``size - 2`` most frequent words, from 2 on; ties in alphabetical order.

    Raises:
        ValueError: for a size below 3.
    """
    if size < 3:
        raise ValueError(f"size is {size}; a vocabulary has padding, the unknown and one word at least")
    counts = Counter(word for text in texts for word in words(text))
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[: size - 2]
    return {word: number for number, (word, _) in enumerate(ranked, start=2)}


def encode(texts: Sequence[str], numbers: dict[str, int], length: int) -> Int32[np.ndarray, "N {length}"]:
    """Tokens of the first ``length`` words of each text, padded at the end."""
    tokens = np.full((len(texts), length), PADDING, np.int32)
    for row, text in enumerate(texts):
        found = [numbers.get(word, UNKNOWN) for word in words(text)[:length]]
        tokens[row, : len(found)] = found
    return tokens


def splits(name: str, *, size: int, length: int, rows: int | None = None, seed: int = 0) -> Splits[Texts]:
    """Training rows, a validation part of a sixth drawn from them by ``seed``, and the test rows.

    Args:
        name: of the set.
        size: of the vocabulary, made of the training rows that remain.
        length: tokens of a sequence.
        rows: training rows used at most, validation included.
        seed: draws the validation rows.
    """
    texts, labels = load(name, "train")
    order = permutation(stream(seed, "validation", 0), len(texts))[:rows]
    held = len(order) // 6
    train = [texts[i] for i in order[held:]]
    numbers = vocabulary(train, size)
    held_out = Texts(encode([texts[i] for i in order[:held]], numbers, length), labels[order[:held]])
    test_texts, test_labels = load(name, "test")
    return Splits(
        Texts(encode(train, numbers, length), labels[order[held:]]),
        held_out,
        Texts(encode(test_texts, numbers, length), test_labels),
    )
