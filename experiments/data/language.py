"""Text as bytes, for language models: WikiText-2, tiny Shakespeare, and the Python standard library.

A token is a byte, 0 to 255, and 256 begins a sequence (``BOS``): a vocabulary of 257 that nothing has to learn.

    wikitext2          train and validation are cut from the published valid part, test is the published test part
    tiny_shakespeare   the file in order: 90 % train, 5 % validation, 5 % test
    stdlib             pieces of source code, split by file (`experiments.data.stdlib_corpus`)

WikiText-2's own train part is not used: at the size of these models a million characters are enough, and then two
small files are all that one has to get. Parts are cut at a line's end.
"""

import gzip
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from experiments.data import stdlib_corpus
from experiments.data.clicks import Splits
from experiments.data.counter import uniform
from experiments.data.files import Home, locate

Name = Literal["wikitext2", "tiny_shakespeare", "stdlib"]
NAMES: tuple[Name, ...] = get_args(Name)
BOS = 256
"""Begins every sequence."""
VOCABULARY = 257


@dataclass(frozen=True)
class Facts:
    """Size of a file, its checksum and its home."""

    size: int
    sha256: str
    page: str


_WIKITEXT = "https://github.com/pytorch/examples/tree/main/word_language_model/data/wikitext-2"
FILES = {
    "wikitext2/valid.txt.gz": Facts(
        1_121_681, "3cdd8cb5bb349a05840c7c3bef9578d90d64df77e27e0c25c033ba9342757ee3", _WIKITEXT
    ),
    "wikitext2/test.txt.gz": Facts(
        1_256_449, "688887879b4b526692cb2e423a516dcc5f6584a01fd3f33a8e164fbed2de8090", _WIKITEXT
    ),
    "tiny_shakespeare/input.txt.gz": Facts(
        1_115_394,
        "13125fe8f49092165d7d489e3944db52d1ba546e64a60080cc9523bcd0c5e46a",
        "https://github.com/karpathy/char-rnn/tree/master/data/tinyshakespeare",
    ),
}


def read(file: str) -> UInt8[np.ndarray, " N"]:
    """The bytes of one of `FILES`.

    Raises:
        ValueError: for another name, or a file of another size.
    """
    if file not in FILES:
        raise ValueError(f"file={file!r} must be one of {', '.join(FILES)}")
    facts = FILES[file]
    path = locate(file, facts.sha256, Home(file.partition("/")[0], facts.page, file))
    with gzip.open(path, "rb") as stream:
        text = np.frombuffer(stream.read(), np.uint8)
    if text.size != facts.size:
        raise ValueError(f"{file} holds {text.size} bytes, not {facts.size}")
    return text


def splits(name: Name, *, seed: int = 0) -> Splits[UInt8[np.ndarray, " _"]]:
    """Training, validation and test text.

    Args:
        name: of the text.
        seed: picks the files of the parts of ``stdlib``; the other texts have one split.

    Raises:
        ValueError: for an unknown name.
    """
    match name:
        case "wikitext2":
            train, validation = _cut(read("wikitext2/valid.txt.gz"), 0.95)
            return Splits(train, validation, read("wikitext2/test.txt.gz"))
        case "tiny_shakespeare":
            return Splits(*_cut(read("tiny_shakespeare/input.txt.gz"), 0.9, 0.95))
        case "stdlib":
            corpus = stdlib_corpus.load()
            return Splits(*(_joined(corpus, rows) for rows in stdlib_corpus.splits(corpus, seed)))
        case _:
            raise ValueError(f"name={name!r} must be one of {', '.join(NAMES)}")


def _cut(text: np.ndarray, *shares: float) -> list[np.ndarray]:
    """The text in parts that end where a line does, as near as can be after these shares of it."""
    ends = np.flatnonzero(text == ord("\n")) + 1
    return np.split(text, [int(ends[np.searchsorted(ends, share * text.size)]) for share in shares])


def _joined(corpus: stdlib_corpus.Corpus, rows: Int64[np.ndarray, " n"]) -> np.ndarray:
    return np.frombuffer("".join(corpus.texts[row] for row in rows).encode(), np.uint8)


def sequences(
    text: UInt8[np.ndarray, " N"], length: int, count: int | None = None
) -> Int32[np.ndarray, "n {length}"]:
    """Pieces of ``length - 1`` bytes with BOS in front, which do not overlap.

    Args:
        text: of a part.
        length: of a sequence, BOS included.
        count: of sequences, spread evenly over the text; None for all that it has.

    Raises:
        ValueError: for a length below 2, or a text that is too short.
    """
    _check(text, length)
    pieces = text[: text.size // (length - 1) * (length - 1)].reshape(-1, length - 1)
    if count is not None:
        if not 1 <= count <= len(pieces):
            raise ValueError(f"count is {count}; the text has {len(pieces)} sequences of {length} tokens")
        pieces = pieces[np.arange(count) * len(pieces) // count]
    return _with_bos(pieces)


def crops(
    text: UInt8[np.ndarray, " N"], length: int, rows: int, *, key: int, step: int
) -> Int32[np.ndarray, "{rows} {length}"]:
    """``rows`` pieces from random places, BOS in front: the batch of a training step.

    Args:
        text: of a part.
        length: of a sequence, BOS included.
        rows: of the batch.
        key: of a stream of `experiments.data.counter`.
        step: which batch of the stream.

    Raises:
        ValueError: for a length below 2, or a text that is too short.
    """
    _check(text, length)
    draws = uniform(key, np.arange(step * rows, (step + 1) * rows))
    starts = (draws * (text.size - length + 2)).astype(np.int64)
    return _with_bos(text[starts[:, None] + np.arange(length - 1)])


def _with_bos(pieces: np.ndarray) -> np.ndarray:
    return np.pad(pieces.astype(np.int32), ((0, 0), (1, 0)), constant_values=BOS)


def _check(text: np.ndarray, length: int) -> None:
    if length < 2 or text.size < length - 1:
        raise ValueError(f"length is {length}; it must be at least 2, and the text of {text.size} bytes as long")


def to_text(tokens: Int32[np.ndarray, " n"]) -> str:
    """What tokens say; BOS says nothing, and bytes that are no UTF-8 are replaced."""
    return bytes(int(token) for token in tokens if token != BOS).decode("utf-8", errors="replace")
