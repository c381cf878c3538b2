"""The cells of `experiments.retrieval.hashed_projection`: texts, a way to store their embeddings, what is left."""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float32, Int, Int32

from experiments.data import cranfield, mrpc, text_classification
from experiments.data.counter import permutation, stream
from experiments.retrieval import codes
from experiments.retrieval.linear_probe import accuracy, fit
from experiments.retrieval.minilm_embeddings import embeddings

CUTOFF = 10
"""Documents of a ranking that nDCG reads."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Texts, bits and the classifier; the defaults are those of the claims."""

    data: tuple[str, ...] = ("sst2", "mr", "ag_news", "mrpc", "cranfield")
    """Also ``digits``, scikit-learn's images of digits, which need neither texts nor the encoder."""
    bits: tuple[int, ...] = (256, 384, 512, 768, 1024, 1536, 2048)
    """Of hashed projections."""
    control_bits: tuple[int, ...] = (256, 384, 1024)
    """Of everything else that can have several."""
    seeds: int = 10
    """Of hyperplanes, and of the training rows, their validation part and their order."""
    rows: int = 4000
    """Of a data set that a classifier sees, validation included."""
    validation: int = 600
    epochs: int = 20
    """At most: the weights are those of the epoch with the best validation accuracy."""
    batch: int = 128
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """Searched for every way to store, every data set and seed on the validation part."""
    pairs: int = 2000
    """Random pairs of test texts whose cosines are ranked."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row: a data set, a way to store its embeddings at so many bits, a seed."""

    data: str
    method: str
    bits: int
    seed: int


class Part(NamedTuple):
    """Texts with a class.

    Attributes:
        rows: of the embeddings of one sentence, or of two, each.
        labels: classes.
    """

    rows: Int[np.ndarray, "n sentences"]
    labels: Int32[np.ndarray, " n"]


class Search(NamedTuple):
    """Documents to be found: rows of embeddings, and which document answers which query."""

    documents: Int[np.ndarray, " N"]
    queries: Int[np.ndarray, " Q"]
    relevant: Bool[np.ndarray, "Q N"]


class Task(NamedTuple):
    """What a data set asks for; what it does not, is ``None``.

    Attributes:
        vectors: embeddings of all texts.
        train, test: of a classifier.
        search: of a ranking.
        similar: whether the labels say which sentences of a pair are alike.
    """

    vectors: Float32[np.ndarray, "texts d"]
    train: Part | None = None
    test: Part | None = None
    search: Search | None = None
    similar: bool = False


def cells(config: Config) -> list[Cell]:
    """All rows, in the order in which they are measured."""
    found = []
    for data in config.data:
        ways = _ways(config, features(data))
        found += [Cell(data, method, bits, seed) for method, bits in ways for seed in range(config.seeds)]
    return found


def features(data: str) -> int:
    """Coordinates of an embedding."""
    return 64 if data == "digits" else 384


def _ways(config: Config, width: int) -> list[tuple[str, int]]:
    asked: list[tuple[str, int | None]] = [(name, None) for name in ("float", "float16", "int8", "sign")]
    asked += [("hrp", bits) for bits in config.bits]
    asked += [
        (name, bits)
        for name in ("hadamard", "truncated", "pca", "pca_sign", "itq", "pq")
        for bits in config.control_bits
    ]
    ways = [(name, codes.bits_of(name, width, bits)) for name, bits in asked]
    return [(name, bits) for name, bits in ways if bits is not None]


# --- texts ------------------------------------------------------------------------------------------


@functools.cache
def task(data: str) -> Task:
    """Embeddings of a data set."""
    if data == "digits":
        return _digits()
    if data == "cranfield":
        texts = cranfield.load()
        parts = [embeddings("cranfield-documents", texts.documents), embeddings("cranfield-queries", texts.queries)]
        documents, queries = np.split(np.arange(len(parts[0]) + len(parts[1])), [len(parts[0])])
        return Task(np.concatenate(parts), search=Search(documents, queries, texts.relevant))
    texts_of = _pairs if data == "mrpc" else _sentences
    parts, labels = zip(*(texts_of(data, part) for part in ("train", "test")), strict=True)
    sentences = parts[0].shape[1]
    rows = np.arange(sum(len(part) for part in parts) * sentences).reshape(-1, sentences)
    train, test = (Part(chosen, label) for chosen, label in zip(np.split(rows, [len(parts[0])]), labels, strict=True))
    vectors = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    return Task(vectors, train, test, similar=data == "mrpc")


def _sentences(data: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    texts, labels = text_classification.load(data, part)
    return embeddings(f"{data}-{part}", texts)[:, None], labels


def _pairs(data: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = mrpc.load(part)
    sides = [embeddings(f"{data}-{part}-{name}", getattr(pairs, name)) for name in ("first", "second")]
    return np.stack(sides, axis=1), pairs.labels


def _digits() -> Task:
    """Images in place of texts, every other one for testing; an image is searched by its class."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    rows, labels = np.arange(len(images)), classes.astype(np.int32)
    train, test = (Part(rows[first::2, None], labels[first::2]) for first in (0, 1))
    relevant = test.labels[:100, None] == train.labels
    search = Search(train.rows[:, 0], test.rows[:100, 0], relevant)
    return Task(images.astype(np.float32), train, test, search)


# --- what is measured -------------------------------------------------------------------------------


def measure(config: Config, cell: Cell) -> dict[str, float | None]:
    """Accuracy of a classifier on the codes, nDCG of a search in them, and how well they rank cosines.

    ``spearman`` is the rank correlation of cosines from codes and of exact ones over random pairs of test texts, or
    of queries and documents, ``judged`` that with people's judgements of the pairs.
    """
    whole = task(cell.data)
    coded = _coded(cell.data, cell.method, cell.bits, cell.seed if cell.method in codes.SEEDED else 0)
    found: dict[str, float | None] = {"row_bytes": cell.bits / 8, "accuracy": None, "ndcg": None, "judged": None}
    if whole.train is not None and whole.test is not None:
        train, test = ((_features(coded, part), part.labels) for part in (whole.train, whole.test))
        found["accuracy"] = _accuracy(config, cell, train, test)
    if whole.search is not None:
        queries, documents = coded.take(whole.search.queries), coded.take(whole.search.documents)
        found["ndcg"] = ndcg(codes.nearest(queries, documents, CUTOFF), whole.search.relevant)
    if whole.similar and whole.test is not None:
        judged = codes.cosines(*(coded.take(side) for side in whole.test.rows.T))
        found["judged"] = _spearman(judged, whole.test.labels)
    pairs = random_pairs(whole, config.pairs)
    exact = codes.Codes(whole.vectors, None, 0)
    found["spearman"] = _spearman(*(codes.cosines(*(each.take(side) for side in pairs)) for each in (coded, exact)))
    return found


@functools.lru_cache(maxsize=1)
def _coded(data: str, method: str, bits: int, seed: int) -> codes.Codes:
    """All embeddings of a data set; learned codes are fitted on its training texts, or its documents."""
    whole = task(data)
    if whole.train is not None:
        rows = whole.train.rows.reshape(-1)
    else:
        rows = np.arange(len(whole.vectors)) if whole.search is None else whole.search.documents
    order = permutation(stream(0, "rows of codes", data), len(rows))
    return codes.encoder(method, bits, whole.vectors[rows[order]], seed)(whole.vectors)


def _features(coded: codes.Codes, part: Part) -> np.ndarray:
    """What a classifier reads: of one sentence itself, of a pair ``|u - v|`` and ``u v`` (SentEval)."""
    sides = [coded.features[side] for side in part.rows.T]
    if len(sides) == 1:
        return sides[0]
    return np.concatenate([np.abs(sides[0] - sides[1]), sides[0] * sides[1]], axis=1)


def _accuracy(config: Config, cell: Cell, train: tuple[np.ndarray, Any], test: tuple[np.ndarray, Any]) -> float:
    order = permutation(stream(cell.seed, "rows", cell.data), len(train[1]))[: config.rows]
    held, used = np.split(order, [config.validation])
    x, labels = train
    fitted = fit(
        x[used], labels[used], x[held], labels[held],
        learning_rates=config.learning_rates, epochs=config.epochs, batch=config.batch, seed=cell.seed,
    )  # fmt: skip
    return accuracy(fitted, *test)


def random_pairs(whole: Task, count: int) -> Int[np.ndarray, "2 pairs"]:
    """Rows of at most ``count`` pairs of different texts: of test texts, or of a query and a document."""
    if whole.test is not None:
        left = right = whole.test.rows.reshape(-1)
    elif whole.search is not None:
        left, right = whole.search.queries, whole.search.documents
    else:
        left = right = np.arange(len(whole.vectors))
    rng = np.random.default_rng(0)
    pairs = np.stack([side[rng.integers(0, len(side), count)] for side in (left, right)])
    return pairs[:, pairs[0] != pairs[1]]


def ndcg(ranking: np.ndarray, relevant: np.ndarray) -> float:
    """Mean over queries of nDCG of the first documents (Jarvelin and Kekalainen 2002) with gains 0 and 1."""
    discounts = 1 / np.log2(np.arange(2, ranking.shape[1] + 2))
    gained = (np.take_along_axis(relevant, ranking, axis=1) * discounts).sum(axis=1)
    most = np.minimum(relevant.sum(axis=1), ranking.shape[1])
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[most]
    judged = ideal > 0
    return float((gained[judged] / ideal[judged]).mean())


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, ties sharing the mean of their ranks."""
    return float(np.corrcoef(scipy.stats.rankdata(x), scipy.stats.rankdata(y))[0, 1])
