"""Quest: pages whose bounds allow a large logit (Tang et al., ICML 2024, arXiv 2406.10774).

    low, high [pages, D] = smallest and largest key of a page, coordinate by coordinate
    score(page) = sum_c max(q_c low_c, q_c high_c)                  >= q . k for every key of the page

The tokens of the best pages are read. Bounds are rounded outwards to 16 bits, so that they remain bounds:
``32 D / page_size`` bits a token. Pages are ranked, tokens being ``page_size`` times as many; the lists are those of
ranking tokens.

Departures: exactly ``heavy`` tokens are read, the last page being cut where need be, and tokens of a page that are
sinks or window already do not count against them; the released code takes whole pages, three at least. A slot that
is written again leaves its old key in the bounds of its page, which remain bounds, but wider ones.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key

from hashml.attention.selector_contract import (
    Gqa,
    Index,
    Rows,
    Selector,
    check_sizes,
    combine,
    grouped,
    over_group,
    per_head,
    rest,
)
from hashml.attention.sparse_decode import Selection

_PARTIAL = 3
"""Pages with some of their tokens among sinks or window, or beyond the last token, where tokens lie in order."""


@dataclasses.dataclass(frozen=True)
class Quest(Selector):
    """Page bounds.

    Attributes:
        page_size: neighbouring slots that share bounds; a last page may be short.
        dtype: of the bounds; keys beyond its range have no bound. On a CPU XLA reads bfloat16
            many times faster than float16, which it converts one by one; it rounds to 1 part in 128, not 1024.

    Raises:
        ValueError: for a page without a slot, or another dtype.
    """

    page_size: int = 16
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise ValueError(f"page_size is {self.page_size}; it must be at least 1")
        if self.dtype not in ("float16", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; allowed are 'float16', 'bfloat16' and 'float32'")

    def build(
        self,
        keys: Float[Array, "B K N D"],
        values: Float[Array, "B K N V"],
        positions: Int32[Array, "B P N"],
        *,
        key: Key[Array, ""] | None = None,
        learned: Any = None,
    ) -> Index:
        del values, key, learned
        held = per_head(positions >= 0, keys.shape[1])[..., None]
        short = -keys.shape[2] % self.page_size

        def pages(fill: float, outwards: float) -> Array:
            filled = jnp.where(held, keys.astype(jnp.float32), fill)
            padded = jnp.pad(filled, ((0, 0), (0, 0), (0, short), (0, 0)), constant_values=fill)
            parts = padded.reshape(*keys.shape[:2], -1, self.page_size, keys.shape[3])
            return self._rounded(parts.min(axis=3) if fill > 0 else parts.max(axis=3), outwards)

        most = float(jnp.finfo(self.dtype).max)
        slots = {"low": pages(most, -jnp.inf), "high": pages(-most, jnp.inf)}
        return Index(slots, {"slots": jnp.zeros((keys.shape[2], 0))})

    def append(
        self,
        index: Index,
        keys: Float[Array, "B K n D"],
        values: Float[Array, "B K n V"],
        at: Int32[Array, "B P n"],
    ) -> Index:
        del values
        slots, heads = index.fixed["slots"].shape[0], keys.shape[1]
        pages = index.slots["low"].shape[2]
        # Out of range for pages, too, where there is no such slot.
        page = per_head(jnp.where((at < 0) | (at >= slots), pages, at // self.page_size), heads)
        b, k = jnp.arange(keys.shape[0])[:, None, None], jnp.arange(heads)[None, :, None]
        low = index.slots["low"].at[b, k, page].min(self._rounded(keys, -jnp.inf), mode="drop")
        high = index.slots["high"].at[b, k, page].max(self._rounded(keys, jnp.inf), mode="drop")
        return Index({"low": low, "high": high}, index.fixed)

    def _rounded(self, x: Array, outwards: float) -> Array:
        """The nearest finite number of the dtype on the side of ``outwards``."""
        info = jnp.finfo(self.dtype)
        x = jnp.clip(x.astype(jnp.float32), float(info.min), float(info.max))
        nearest = x.astype(self.dtype)
        found = nearest.astype(jnp.float32)
        inside = found > x if outwards < 0 else found < x
        moved = jnp.where(inside, jnp.nextafter(nearest, jnp.asarray(outwards, self.dtype)), nearest)
        return jnp.clip(moved, info.min, info.max)

    def page_scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J pages"]:
        """The bound of each page; what a page without a token has means nothing."""
        low, high = (index.slots[name].astype(jnp.float32) for name in ("low", "high"))
        queries = grouped(q, low.shape[1])
        # max(q low, q high) is q high where q is positive and q low where it is negative. A sum of products, unlike a
        # matrix product, converts bounds as it reads them, and writes no float32 copy of the index.
        above, below = (part[:, :, :, None] for part in (jnp.maximum(queries, 0), jnp.minimum(queries, 0)))
        return jnp.sum(above * high[:, :, None] + below * low[:, :, None], axis=-1)

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        """Each slot has the bound of its page."""
        of_tokens = jnp.repeat(self.page_scores(index, q), self.page_size, axis=3)
        return of_tokens[..., : index.fixed["slots"].shape[0]]

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
        """As the contract's, from the best pages alone where these hold enough tokens."""
        del key, rows
        check_sizes(sinks, window, heavy)
        size, slots, page = {"sinks": sinks, "window": window}, positions.shape[2], self.page_size
        entries, few = sinks + window + heavy, -(-heavy // page) + _PARTIAL
        bounds = over_group(self.page_scores(index, q), gqa)

        def of_tokens() -> Selection:
            scores = jnp.repeat(bounds, page, axis=2)[..., :slots]
            return combine(scores, positions, query_pos, heavy=heavy, **size)

        if few * page + sinks + window >= slots or few > bounds.shape[2]:
            return of_tokens()
        lists = bounds.shape[1]
        fixed = combine(jnp.zeros(positions.shape), positions, query_pos, heavy=0, **size)
        others = rest(positions, query_pos, heads=positions.shape[1], **size)
        others = jnp.pad(others, ((0, 0), (0, 0), (0, -slots % page))).reshape(*others.shape[:2], -1, page)
        held = per_head(others.sum(axis=3, dtype=jnp.int32), lists)
        worth = jnp.where(jnp.isnan(bounds), jnp.finfo(jnp.float32).min, bounds)
        worth = jnp.where(held > 0, worth, -jnp.inf)
        best, pages = jax.lax.top_k(worth, few)
        named = pages[..., None] * page + jnp.arange(page, dtype=jnp.int32)
        real = jnp.take_along_axis(per_head(others, lists), pages[..., None], axis=2) & (best > -jnp.inf)[..., None]

        def behind(first: Array, then: Array) -> Array:
            return jnp.concatenate([per_head(first, lists), then.reshape(*then.shape[:2], -1)], axis=2)

        idx, valid = behind(fixed.idx, named), behind(fixed.valid, real)
        # Sinks and window first, then pages from the best on: the valid entries, in the order in which they stand.
        places = jnp.arange(idx.shape[2], dtype=jnp.float32)
        rank, at = jax.lax.top_k(jnp.where(valid, -places, -jnp.inf), entries)
        listed = Selection(jnp.take_along_axis(idx, at, axis=2), rank > -jnp.inf, jnp.ones(at.shape, jnp.float32))
        there = jnp.where(worth > -jnp.inf, held, 0).sum(axis=2) + per_head(fixed.valid.sum(axis=2), lists)
        # Pages with holes, as eviction leaves them, may hold too few.
        enough = (valid.sum(axis=2) >= jnp.minimum(there, entries)).all()
        return jax.lax.cond(enough, lambda: listed, of_tokens)
