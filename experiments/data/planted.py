"""A click log whose truth is known: Zipf-distributed ids, labels drawn from a planted teacher.

Field ``t`` of row ``i`` shows the id of popularity rank ``r`` with a probability proportional to
``(r + 1) ** -exponent``, and

    label[i] ~ Bernoulli(sigmoid(logit(ranks[i], dense[i])))

where the teacher's Gaussian embeddings belong to ranks, not ids: a larger table adds rare ids and
leaves the head, with its embeddings, as it was (PSS, Desai and Shrivastava, arXiv 2207.10731, where
the table's size and not its information is what compresses away).

Nothing is stored. Every number is a function of the seed, the row and its name (see ``counter``), so
any rows can be made at any time, 10**8 rows need no more memory than a batch, and tables of 10**8
rows need neither a permutation nor an array of embeddings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float32, Float64, Int64
from scipy.special import boxcox, expit, inv_boxcox
from scipy.stats import rankdata

from experiments.data.clicks import ClickLog
from experiments.data.counter import normal, scatter, stream, uniform

_HEAD = 1 << 20

Real = float | int


@dataclass(frozen=True)
class PairwiseTeacher:
    """Dot products over all pairs of fields, times ``scale``; embeddings are N(0, 1), ``rank`` wide."""

    rank: int = 4
    scale: Real = 0.8

    def logits(
        self, seed: int, ranks: Int64[np.ndarray, "N T"], dense: Float32[np.ndarray, "N D"]
    ) -> Float64[np.ndarray, " N"]:
        """Logit of each row; dense features are ignored."""
        embedded = _embed(seed, "latent", ranks, self.rank)
        # The sum over pairs is half of what the square of the sum has beyond the squares.
        square_of_sum = (embedded.sum(axis=1) ** 2).sum(axis=-1)
        squares = (embedded**2).sum(axis=1).sum(axis=-1)
        return 0.5 * self.scale * (square_of_sum - squares)


@dataclass(frozen=True)
class FirstOrderTeacher:
    """A weight for each id and dense feature, and a dot product for some ordered pairs of fields:

        w . dense + sum_t v[t, id_t] + sum_{(t, u) in pairs} p[t, id_t] . q[u, id_u]

    with ``w``, ``v``, ``p``, ``q`` Gaussian, ``p`` and ``q`` ``rank`` wide, each sum times its scale.
    """

    rank: int = 4
    pairs: tuple[tuple[int, int], ...] | None = None
    """None: all pairs ``t < u``."""
    dense_scale: Real = 0.5
    id_scale: Real = 1.0
    pair_scale: Real = 0.5

    def logits(
        self, seed: int, ranks: Int64[np.ndarray, "N T"], dense: Float32[np.ndarray, "N D"]
    ) -> Float64[np.ndarray, " N"]:
        """Logit of each row."""
        fields = ranks.shape[1]
        pairs = self.pairs
        if pairs is None:
            pairs = tuple((t, u) for t in range(fields) for u in range(t + 1, fields))
        weights = normal(stream(seed, "dense weight"), np.arange(dense.shape[1]))
        logits = self.dense_scale * (dense * weights).sum(axis=-1)
        logits += self.id_scale * _embed(seed, "first order", ranks, 1).sum(axis=1)[:, 0]
        left, right = (_embed(seed, name, ranks, self.rank) for name in ("left", "right"))
        for t, u in pairs:
            logits += self.pair_scale * (left[:, t] * right[:, u]).sum(axis=-1)
        return logits


Teacher = PairwiseTeacher | FirstOrderTeacher


@dataclass(frozen=True)
class PlantedLog:
    """A click log that is made as it is read.

    Attributes:
        rows: of the log.
        table_sizes: rows of each field's table.
        exponent: of Zipf's law; 0 is uniform, the card of PSS takes 1.5, recommenders show 0.6 to 1.2.
        teacher: makes the logits.
        dense: number of dense features, each N(0, 1).
        bias: added to every logit.
        seed: another log of the same law, from another teacher.
        permute: ids are a fixed random permutation of ranks in each table; False leaves rank = id.

    Raises:
        ValueError: an argument is out of range.
    """

    rows: int = 200_000
    table_sizes: tuple[int, ...] = (5_000, 5_000, 5_000, 5_000)
    exponent: Real = 1.5
    teacher: Teacher = PairwiseTeacher()
    dense: int = 0
    bias: Real = 0.0
    seed: int = 0
    permute: bool = True

    def __post_init__(self) -> None:
        if self.rows < 1 or self.dense < 0 or self.exponent < 0:
            raise ValueError(
                f"rows={self.rows} must be at least 1, dense={self.dense} and exponent={self.exponent} at least 0"
            )
        if not self.table_sizes or not all(1 <= size < 2**31 for size in self.table_sizes):
            raise ValueError(f"table_sizes={self.table_sizes} must be one or more sizes from 1 to 2**31 - 1")

    def __len__(self) -> int:
        return self.rows

    def ranks(self, start: int, stop: int) -> Int64[np.ndarray, "N T"]:
        """Popularity rank of each id of the rows ``start`` to ``stop``, 0 = the most popular."""
        self._check(start, stop)
        rows = np.arange(start, stop)
        return np.stack(
            [
                zipf_ranks(uniform(stream(self.seed, "rank", field), rows), size, self.exponent)
                for field, size in enumerate(self.table_sizes)
            ],
            axis=1,
        )

    def dense_features(self, start: int, stop: int) -> Float32[np.ndarray, "N D"]:
        """Dense features of the rows ``start`` to ``stop``."""
        self._check(start, stop)
        counters = np.arange(start, stop)[:, None] * self.dense + np.arange(self.dense)
        return normal(stream(self.seed, "dense"), counters).astype(np.float32)

    def probabilities(self, start: int, stop: int) -> Float64[np.ndarray, " N"]:
        """True click probability of the rows ``start`` to ``stop``."""
        return self._probabilities(self.ranks(start, stop), self.dense_features(start, stop))

    def batch(self, start: int, stop: int) -> ClickLog:
        """The rows ``start`` to ``stop``; the same however the log is cut.

        Raises:
            ValueError: the bounds are not ``0 <= start <= stop <= rows``.
        """
        ranks, dense = self.ranks(start, stop), self.dense_features(start, stop)
        coin = uniform(stream(self.seed, "label"), np.arange(start, stop))
        ids = ranks
        if self.permute:
            columns = [
                scatter(stream(self.seed, "id", field), ranks[:, field], size)
                for field, size in enumerate(self.table_sizes)
            ]
            ids = np.stack(columns, axis=1)
        return ClickLog(
            ids=ids.astype(np.int32),
            dense=dense,
            labels=(coin < self._probabilities(ranks, dense)).astype(np.int8),
            field_names=tuple(f"field_{field}" for field in range(len(self.table_sizes))),
            table_sizes=self.table_sizes,
        )

    def chunks(self, chunk_rows: int = 65_536, *, start: int = 0, stop: int | None = None) -> Iterator[ClickLog]:
        """The rows ``start`` to ``stop`` (all of them by default), some at a time; see ``clicks.batches``."""
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows={chunk_rows} must be at least 1")
        end = self.rows if stop is None else stop
        self._check(start, end)
        return (self.batch(low, min(low + chunk_rows, end)) for low in range(start, end, chunk_rows))

    def bayes_auc(self, start: int, stop: int) -> float:
        """The AUC that the true probabilities reach on these rows: no model can beat it by more than luck."""
        return bayes_auc(self.probabilities(start, stop))

    def _probabilities(self, ranks: np.ndarray, dense: np.ndarray) -> Float64[np.ndarray, " N"]:
        return expit(self.teacher.logits(self.seed, ranks, dense) + self.bias)

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"start={start} to stop={stop} is no range within rows={self.rows}")


def bayes_auc(probabilities: Float64[np.ndarray, " N"]) -> float:
    """Expected AUC of the true probabilities as scores, over the labels they may give.

    The probability that a random click has the higher score than a random non-click, ties half:
    ``sum_ij p_i (1 - p_j) [p_i > p_j] / (sum p * sum(1 - p))``, in N log N.
    """
    clicks, misses = probabilities, 1 - probabilities
    order = np.argsort(probabilities, kind="stable")
    below = np.concatenate([[0.0], np.cumsum(misses[order])])
    # Non-clicks with a strictly lower score, and with a score not higher.
    lower = below[(rankdata(probabilities, method="min") - 1).astype(np.int64)]
    not_higher = below[rankdata(probabilities, method="max").astype(np.int64)]
    return float((clicks * (lower + not_higher)).sum() / (2 * clicks.sum() * misses.sum()))


def zipf_ranks(
    u: Float64[np.ndarray, " N"], size: int, exponent: Real, *, head: int = _HEAD
) -> Int64[np.ndarray, " N"]:
    """Ranks 0 to ``size - 1`` by the inverse of Zipf's distribution function at ``u`` in (0, 1).

    The first ``head`` ranks are searched for in a float64 cumulative sum. Beyond, the sum is the
    Euler-Maclaurin formula, ``sum_{K < j <= r} f(j) = int_K^r f + (f(r) - f(K)) / 2 + (f'(r) - f'(K)) / 12``
    with ``f(x) = x ** -exponent``, whose next term is below ``K ** (-exponent - 3)``: less than float64
    resolves. It is inverted by Newton's steps, so no memory grows with ``size``.
    """
    sums = _head_sums(min(size, head), exponent)
    first = float(len(sums))

    def total(r: np.ndarray) -> np.ndarray:
        integral = first ** (1 - exponent) * boxcox(r / first, 1 - exponent)
        slope = exponent * (first ** (-exponent - 1) - r ** (-exponent - 1)) / 12
        return sums[-1] + integral + (r**-exponent - first**-exponent) / 2 + slope

    target = u * (sums[-1] if size == len(sums) else total(np.array([float(size)]))[0])
    ranks = np.searchsorted(sums, target)
    beyond = np.flatnonzero(ranks == len(sums))
    if beyond.size == 0 or size == len(sums):
        return np.minimum(ranks, size - 1)
    wanted = target[beyond]
    r = first * inv_boxcox((wanted - sums[-1]) * first ** (exponent - 1), 1 - exponent)
    r = np.nan_to_num(r, nan=size, posinf=size)  # rounding may pass the end of a thin tail
    for _ in range(4):
        r = np.clip(r, first, size)
        r += (wanted - total(r)) * r**exponent
    r = np.clip(np.ceil(r), first + 1, size)
    r = np.where(total(r - 1) >= wanted, r - 1, np.where(total(r) < wanted, r + 1, r))
    ranks[beyond] = np.clip(r, first + 1, size).astype(np.int64) - 1
    return ranks


@lru_cache(maxsize=8)
def _head_sums(ranks: int, exponent: Real) -> Float64[np.ndarray, " ranks"]:
    sums = np.cumsum(np.arange(1.0, ranks + 1) ** -exponent)
    sums.flags.writeable = False
    return sums


def _embed(seed: int, name: str, ranks: Int64[np.ndarray, "N T"], width: int) -> Float64[np.ndarray, "N T W"]:
    """Standard normal numbers that belong to a field and a rank."""
    columns = []
    for field, column in enumerate(ranks.T):
        counters = column[:, None] * width + np.arange(width)
        columns.append(normal(stream(seed, name, field), counters))
    return np.stack(columns, axis=1)
