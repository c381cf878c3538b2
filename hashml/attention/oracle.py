"""The ceilings of selection by score: exact logits of all keys, by number or by mass.

    OracleTopK       the ``heavy`` largest q . k
    OracleTopP       of these, the fewest whose softmax mass over the tokens beside sinks and window reaches ``mass``

They read every key, so their index is the keys themselves, and their bits are those of a dense read.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key

from hashml.attention.selector_contract import (
    Gqa,
    Index,
    Rows,
    Selector,
    check_gqa,
    combine,
    grouped,
    over_group,
    put,
    rest,
)
from hashml.attention.sparse_decode import MASKED, Selection


@dataclasses.dataclass(frozen=True)
class OracleTopK(Selector):
    """The tokens of largest logits."""

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
        return Index({"keys": keys}, {})

    def append(
        self,
        index: Index,
        keys: Float[Array, "B K n D"],
        values: Float[Array, "B K n V"],
        at: Int32[Array, "B P n"],
    ) -> Index:
        del values
        return Index({"keys": put(index.slots["keys"], keys, at)}, index.fixed)

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        """Logits, ``q . k / sqrt(D)``."""
        keys = index.slots["keys"].astype(jnp.float32)
        queries = grouped(q, keys.shape[1]) / math.sqrt(keys.shape[-1])
        return jnp.einsum("bkjd,bknd->bkjn", queries, keys)


@dataclasses.dataclass(frozen=True)
class OracleTopP(OracleTopK):
    """As many tokens of largest logits as their mass asks for, at most ``heavy`` of them; at least one.

    For a list that a group shares, the mass is that of the mean of its softmax weights.

    Attributes:
        mass: p, the part of the softmax mass to reach; 1 takes all tokens.

    Raises:
        ValueError: for a mass outside (0, 1].
    """

    mass: float | int = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass is {self.mass}; it must lie in (0, 1]")

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
        check_gqa(gqa, ("head", "mean"))
        logits = over_group(self.scores(index, q), "head")
        size = {"sinks": sinks, "window": window}
        others = rest(positions, query_pos, heads=logits.shape[1], **size)
        logits = jnp.where(others, logits, MASKED)
        shares = jax.nn.softmax(logits, axis=-1) * others
        worth, lists = logits, shares
        if gqa == "mean":
            lists = over_group(shares.reshape(q.shape[0], index.slots["keys"].shape[1], -1, shares.shape[2]), gqa)
            worth = lists
        chosen = combine(worth, positions, query_pos, heavy=heavy, **size)
        optional = jnp.take_along_axis(rest(positions, query_pos, heads=lists.shape[1], **size), chosen.idx, axis=2)
        if self.mass == 1:
            return chosen
        own = jnp.where(optional & chosen.valid, jnp.take_along_axis(lists, chosen.idx, axis=2), 0.0)
        before = jnp.cumsum(own, axis=2) - own
        return chosen._replace(valid=chosen.valid & (~optional | (before < self.mass)))
