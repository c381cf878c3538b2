"""Votes of the last queries: what Scissorhands (arXiv 2305.17118) and CORM (arXiv 2404.15949) keep of the past.

A query that sees ``n`` keys votes for those to which it gives at least the mean, ``p >= 1 / n``. Each slot holds a
ring of the last ``queries`` (w) votes as bits, and how many queries saw it:

    bits    uint32 [B, P, N, ceil(w / 32)]        vote t lies in bit t mod w
    seen    uint16 [B, P, N]                      t + 1 up to 2 w - 1, then back to w, so that t mod w goes on

The place in the ring is the slot's own, not the step's: a row that is prefilled into a batch that has long been
running needs no alignment, and a query that does not see a key leaves its ring alone. Bits of a slot are empty when
its token enters. `WindowVote` keeps the tokens with most votes; the systems differ in what they make of the bits.
With n read off the softmax itself, the threshold is that of the kept keys, not of all that ever were.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from hashml.kvcache.contract import Attention, Policy, PolicyState, PrefillStatistics, Queries
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.streaming import break_ties

MOST_QUERIES = 2**15
"""Twice a ring is counted in 16 bits."""


def empty_rings(shape: tuple[int, ...], queries: int) -> PolicyState:
    """Rings of ``queries`` votes that nobody has cast."""
    return {"bits": jnp.zeros((*shape, -(-queries // 32)), jnp.uint32), "seen": jnp.zeros(shape, jnp.uint16)}


@functools.partial(jax.jit, static_argnames="queries")
def push_votes(
    state: PolicyState, votes: Bool[Array, "B P n N"], sees: Bool[Array, "B #P n N"], *, queries: int
) -> PolicyState:
    """Rings after n more queries, the oldest first; a query counts for the keys that it ``sees`` alone."""

    def push(state: PolicyState, row: tuple[Array, Array]) -> tuple[PolicyState, None]:
        vote, saw = row
        bits, seen = state["bits"], state["seen"].astype(jnp.int32)
        place = (seen % queries)[..., None]
        here = (jnp.arange(bits.shape[-1]) == place // 32) & saw[..., None]
        bit = jnp.uint32(1) << (place % 32).astype(jnp.uint32)
        bits = jnp.where(here, (bits & ~bit) | jnp.where(vote[..., None], bit, jnp.uint32(0)), bits)
        seen = jnp.where(saw, jnp.where(seen + 1 == 2 * queries, queries, seen + 1), seen)
        return {"bits": bits, "seen": seen.astype(jnp.uint16)}, None

    rows = jnp.moveaxis(votes, 2, 0), jnp.moveaxis(jnp.broadcast_to(sees, votes.shape), 2, 0)
    return lax.scan(push, state, rows)[0]


def count_votes(state: PolicyState) -> Int32[Array, "B P N"]:
    """Votes in each ring."""
    return lax.population_count(state["bits"]).sum(axis=-1, dtype=jnp.int32)


def count_queries(state: PolicyState, queries: int) -> Int32[Array, "B P N"]:
    """Queries whose votes each ring holds, at most ``queries``."""
    return jnp.minimum(state["seen"].astype(jnp.int32), queries)


def at_least_mean(probs: Float[Array, "B H J n N"], valid: Bool[Array, "B #H 1 n N"]) -> Bool[Array, "B H J n N"]:
    """Which keys get at least the mean of those that the query sees."""
    return valid & (probs >= 1.0 / jnp.maximum(valid.sum(axis=-1, keepdims=True), 1))


@dataclasses.dataclass(frozen=True)
class WindowVote(Policy):
    """Keeps the tokens that most of the last queries voted for, the newer ones among equals.

    Attributes:
        queries: w, the last queries whose votes count.
        votes: a key has a query's vote if ``"any"`` of the query heads gives it one, or if their ``"mean"`` does.

    Raises:
        ValueError: for values outside these.
    """

    queries: int = 64
    votes: Literal["any", "mean"] = "any"

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= MOST_QUERIES:
            raise ValueError(f"queries is {self.queries}; it must be between 1 and {MOST_QUERIES}")
        if self.votes not in ("any", "mean"):
            raise ValueError(f"votes is {self.votes!r}; it must be 'any' or 'mean'")

    @property
    def observed(self) -> int:
        return self.queries

    def passes(self, probs: Array, valid: Array) -> Array:
        """Which keys ``[B, H, J, n, N]`` each query votes for."""
        return at_least_mean(probs, valid)

    def init(self, spec: LayerSpec, batch: int) -> PolicyState:
        return empty_rings((batch, spec.head_pos, spec.capacity), self.queries)

    def from_prefill(self, spec: LayerSpec, statistics: PrefillStatistics, key: Array) -> tuple[Array, PolicyState]:
        assert statistics.last is not None, "observed is at least 1"
        batch, heads, _, _, tokens = statistics.last.probs.shape
        state = self._push(empty_rings((batch, heads, tokens), self.queries), statistics.last)
        return self._rank(state, jnp.broadcast_to(statistics.pos[:, None], (batch, heads, tokens))), state

    def observe(
        self, spec: LayerSpec, state: PolicyState, attention: Attention, pos: Array, queries: Queries
    ) -> PolicyState:
        return self._push(state, attention)

    def score(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array, key: Array | None = None) -> Array:
        return self._rank(state, pos)

    def _push(self, state: PolicyState, attention: Attention) -> PolicyState:
        probs, valid = attention.probs, attention.valid
        if self.votes == "any":
            votes = self.passes(probs, valid).any(axis=2)
        else:
            votes = self.passes(probs.mean(axis=2, keepdims=True), valid)[:, :, 0]
        return push_votes(state, votes, valid[:, :, 0], queries=self.queries)

    def _rank(self, state: PolicyState, pos: Array) -> Array:
        return break_ties(count_votes(state), pos)
