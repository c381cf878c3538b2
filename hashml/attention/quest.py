"""Quest: pages whose bounds allow a large logit (Tang et al., ICML 2024, arXiv 2406.10774).

    low, high [pages, D] = smallest and largest key of a page, coordinate by coordinate
    score(page) = sum_c max(q_c low_c, q_c high_c)                  >= q . k for every key of the page

The tokens of the best pages are read. Bounds are rounded outwards to 16 bits, so that they remain bounds:
``32 D / page_size`` bits a token.

Departures: exactly ``heavy`` tokens are read, the last page being cut where need be, and tokens of a page that are
sinks or window already do not count against them; the released code takes whole pages, three at least. A slot that
is written again leaves its old key in the bounds of its page, which remain bounds, but wider ones.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key

from hashml.attention.selector_contract import Index, Selector, grouped, per_head


@dataclasses.dataclass(frozen=True)
class Quest(Selector):
    """Page bounds.

    Attributes:
        page_size: neighbouring slots that share bounds; a last page may be short.
        dtype: of the bounds; keys beyond its range have no bound.

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
        # max(q low, q high) is q high where q is positive and q low where it is negative: two matrix products.
        above = jnp.einsum("bkjd,bkpd->bkjp", jnp.maximum(queries, 0), high)
        return above + jnp.einsum("bkjd,bkpd->bkjp", jnp.minimum(queries, 0), low)

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        """Each slot has the bound of its page."""
        of_tokens = jnp.repeat(self.page_scores(index, q), self.page_size, axis=3)
        return of_tokens[..., : index.fixed["slots"].shape[0]]
