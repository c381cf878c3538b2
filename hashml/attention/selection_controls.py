"""Selection without an index: what a selector has to beat.

    StreamingMask     the first and the last tokens alone (Xiao et al., ICLR 2024), at their own positions
    UniformRandom     the first, the last, and uniform draws from the others without replacement

The paper's StreamingLLM rotates keys by their place in the cache instead; `hashml.kvcache.Streaming` does that.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key

from hashml.attention.selector_contract import (
    Gqa,
    Index,
    Rows,
    Selector,
    combine,
    disjoint,
    need,
    over_group,
    rest,
    sample,
)
from hashml.attention.sparse_decode import Selection


@dataclasses.dataclass(frozen=True)
class StreamingMask(Selector):
    """Sinks and window; what ``heavy`` would take makes the window longer. One list serves all heads of a key head,
    or each has its own, equal one."""

    def build(
        self,
        keys: Float[Array, "B K N D"],
        values: Float[Array, "B K N V"],
        positions: Int32[Array, "B P N"],
        *,
        key: Key[Array, ""] | None = None,
        learned: Any = None,
    ) -> Index:
        del values, positions, key, learned
        # Nothing; an array without entries says how many rows, key heads and slots there are.
        return Index({}, {"shape": jnp.zeros((*keys.shape[:3], 0))})

    def append(
        self,
        index: Index,
        keys: Float[Array, "B K n D"],
        values: Float[Array, "B K n V"],
        at: Int32[Array, "B P n"],
    ) -> Index:
        del keys, values, at
        return index

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        """Zeros: all are alike."""
        batch, heads, slots = index.fixed["shape"].shape[:3]
        return jnp.zeros((batch, heads, q.shape[1] // heads, slots))

    def select(
        self,
        index: Index,
        q: Float[Array, "B H D"],
        positions: Int32[Array, "B P N"],
        query_pos: Int32[Array, " B"],
        *,
        sinks: int,
        window: int,
        heavy: int,
        gqa: Gqa = "head",
        key: Key[Array, ""] | None = None,
        rows: Rows | None = None,
    ) -> Selection:
        del key, rows
        blank = over_group(self.scores(index, q), gqa)
        return combine(blank, positions, query_pos, sinks=sinks, window=window + heavy, heavy=0)


@dataclasses.dataclass(frozen=True)
class UniformRandom(StreamingMask):
    """Sinks, window, and a sample of ``heavy`` others.

    Attributes:
        weighted: whether a draw counts ``n / heavy`` times, n being the number of others, so that sums are unbiased;
            if not, it counts as a chosen token does.
    """

    weighted: bool = True

    def select(
        self,
        index: Index,
        q: Float[Array, "B H D"],
        positions: Int32[Array, "B P N"],
        query_pos: Int32[Array, " B"],
        *,
        sinks: int,
        window: int,
        heavy: int,
        gqa: Gqa = "head",
        key: Key[Array, ""] | None = None,
        rows: Rows | None = None,
    ) -> Selection:
        del rows
        key = need("key", key, "UniformRandom", "to draw tokens")
        blank = over_group(self.scores(index, q), gqa)
        fixed = combine(blank, positions, query_pos, sinks=sinks, window=window, heavy=0)
        others = rest(positions, query_pos, sinks=sinks, window=window, heads=blank.shape[1])
        idx, valid, population = sample(key, others, heavy)
        weight = jnp.ones(idx.shape, jnp.float32)
        if self.weighted and heavy:
            weight *= jnp.maximum(population[..., None] / heavy, 1.0)
        return disjoint(fixed, Selection(idx, valid, weight), positions.shape[2])
