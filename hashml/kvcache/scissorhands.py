"""Scissorhands: the persistence of importance (Liu, Desai, Liao, Wang, Xie, Xu, Kyrillidis, Shrivastava, NeurIPS
2023, arXiv 2305.17118).

Only tokens that were pivotal once will be pivotal later: those that got more than the mean, ``p[t, j] > 1 / n``. A
cache of ``slots + window`` tokens fills up; when it is full, the tokens are dropped at once, ``drop`` (m) of them,
that got a low score most often:

    low[j] = number of the last w queries with p[t, j] < 1 / n          the m largest leave, never the window

The window w is essential: counted over all queries, ``low`` grows with age and the policy keeps what is new.
``per_query`` divides by the queries that saw the key, so that a young token has no advantage. Among equals the older
token leaves first (``ties``). ``n`` is what is kept, so 1/n is the mean of the actual row; the paper writes 1/t.
Departures: when more tokens are freed than leave the window, those that leave it are not among the freed; where slots
share scales, whole blocks are freed, each as good as its best token. Later layers, where importance persists less,
should have more slots: `hashml.kvcache.pyramid.pyramid_layers` with a rising slope, where m grows with them.

The released code is another method, `ScissorhandsRelease`: a row votes for the keys above its own 90th percentile,
and a key without a vote in the last 100 rows is dropped unless it is among the newest 10. There is no budget, which
makes it CORM with another threshold. Its percentile is over all columns of a padded matrix; here over the keys seen.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hashml.kvcache.contract import PolicyState
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.streaming import break_ties
from hashml.kvcache.window_vote import WindowVote, count_queries, count_votes


@dataclasses.dataclass(frozen=True)
class Scissorhands(WindowVote):
    """Drops the tokens that got a low score most often, many at once.

    Attributes:
        queries: w, the last queries that count.
        votes: a score is low if it is so for all query heads (``"any"`` of them high saves it), or in the ``"mean"``.
        drop: m, tokens dropped at once; None for half of what the layer holds.
        ties: which of equals leaves first.
        per_query: whether the counter is divided by the queries that saw the key.

    Raises:
        ValueError: for values outside these, and for a layer with fewer than ``drop`` slots.
    """

    queries: int = 400
    drop: int | None = None
    ties: Literal["older", "newer"] = "older"
    per_query: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop is not None and self.drop < 1:
            raise ValueError(f"drop is {self.drop}; it must be at least 1, or None for half of the layer's tokens")
        if self.ties not in ("older", "newer"):
            raise ValueError(f"ties is {self.ties!r}; it must be 'older' or 'newer'")

    def check(self, spec: LayerSpec) -> None:
        if self.drop is not None and self.drop > spec.slots:
            raise ValueError(f"drop is {self.drop}; it must be at most slots, {spec.slots}")

    def resized(self, slots: int, of: int) -> "Scissorhands":
        return self if self.drop is None else dataclasses.replace(self, drop=max(1, self.drop * slots // of))

    def bulk(self, spec: LayerSpec) -> int:
        wanted = spec.capacity // 2 if self.drop is None else self.drop
        return min(max(wanted, spec.flush), spec.slots)

    def _rank(self, state: PolicyState, pos: Array) -> Array:
        seen = count_queries(state, self.queries)
        low = (seen - count_votes(state)).astype(jnp.float32)
        low = low / jnp.maximum(seen, 1) if self.per_query else low
        return break_ties(-low, pos, self.ties)


def above_quantile(
    probs: Float[Array, "B H J n N"], valid: Bool[Array, "B #H 1 n N"], quantile: float | int
) -> Bool[Array, "B H J n N"]:
    """Which keys get more than the ``quantile`` of what the query gives those that it sees; of 0, more than 0."""
    if quantile == 0:
        return valid & (probs > 0)
    ordered = jnp.sort(jnp.where(valid, probs, jnp.inf), axis=-1)
    place = quantile * jnp.maximum(valid.sum(axis=-1, keepdims=True) - 1, 0)
    lower = jnp.floor(place).astype(jnp.int32)
    low, high = (
        jnp.take_along_axis(ordered, jnp.broadcast_to(at, (*ordered.shape[:-1], 1)), axis=-1)
        for at in (lower, jnp.ceil(place).astype(jnp.int32))
    )
    # The infinities of a row without keys must not meet in a difference.
    share = place - lower
    threshold = jnp.where(share > 0, low * (1 - share) + high * share, low)
    return valid & (probs > threshold)


@dataclasses.dataclass(frozen=True)
class ScissorhandsRelease(WindowVote):
    """The released code: no budget, a percentile of each row as its threshold.

    The newest 10 tokens beside the current one that it always keeps are a ``window`` of 11.

    Attributes:
        queries: rows whose votes count.
        votes: as in `WindowVote`.
        quantile: of a row's scores, what a key must exceed to get its vote; 0 asks for any attention at all.
        start: tokens seen before anything is dropped.

    Raises:
        ValueError: for values out of range.
    """

    queries: int = 100
    quantile: float | int = 0.9
    start: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.quantile < 1:
            raise ValueError(f"quantile is {self.quantile}; it must be in [0, 1)")
        if self.start < 0:
            raise ValueError(f"start is {self.start}; it must be at least 0")

    def passes(self, probs: Array, valid: Array) -> Array:
        return above_quantile(probs, valid, self.quantile)

    def expire(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array) -> Array:
        return self._voteless(state) & (now >= self.start)[:, None, None]

    def admit(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array) -> Array:
        return ~self.expire(spec, state, pos, now)

    def _voteless(self, state: PolicyState) -> Array:
        return (state["seen"] > 0) & (count_votes(state) == 0)
