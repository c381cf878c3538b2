"""PQCache: inner products with quantised keys (Zhang et al. 2024, arXiv 2407.12820).

    a key is cut in ``groups`` parts, each replaced by the nearest of ``2^bits`` centroids of its head's own codebook
    score_j = sum_g q[g] . codebook[g, code[g, j]]                  a look-up a part, in a table made for the query

Codebooks come from a few rounds of k-means over the prompt's keys and stay; later keys are coded with them. A code
takes a byte up to 8 bits, so the paper's 2 x 6 bits are 16 stored ones.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key

from hashml.attention.code_lookup import lookup_sum
from hashml.attention.selector_contract import Index, Selector, grouped, need, per_head, put_codes
from hashml.coding import code_dtype, kmeans, product_encode


@dataclasses.dataclass(frozen=True)
class PQCache(Selector):
    """Product-quantised keys.

    Attributes:
        groups: parts of a key; they divide the head's width.
        bits: of a code, 1..16.
        iterations: of k-means.

    Raises:
        ValueError: for values outside these.
    """

    groups: int = 2
    bits: int = 6
    iterations: int = 10

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups is {self.groups}; it must be at least 1")
        if not 1 <= self.bits <= 16:
            raise ValueError(f"bits is {self.bits}; it must lie in 1..16")
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}; it must not be negative")

    def build(
        self,
        keys: Float[Array, "B K N D"],
        values: Float[Array, "B K N V"],
        positions: Int32[Array, "B P N"],
        *,
        key: Key[Array, ""] | None = None,
        learned: Any = None,
    ) -> Index:
        del values, learned
        key = need("key", key, "PQCache", "for the seeds of k-means")
        batch, heads, slots, width = keys.shape
        if width % self.groups:
            raise ValueError(f"groups is {self.groups}; it must divide the head's width, {width}")
        held = per_head((positions >= 0).astype(jnp.float32), heads)
        parts = keys.reshape(batch, heads, slots, self.groups, -1).swapaxes(2, 3)
        draws = jax.random.split(key, (batch, heads, self.groups))

        def centroids(draw: Array, points: Array, weights: Array) -> Array:
            return kmeans(draw, points, 2**self.bits, weights, iterations=self.iterations).centroids

        of_groups = jax.vmap(centroids, in_axes=(0, 0, None))
        books = jax.vmap(jax.vmap(of_groups))(draws, parts, held)
        codes = self._codes(books, keys)
        return Index({"codes": codes.swapaxes(2, 3)}, {"codebook": books})

    def append(
        self,
        index: Index,
        keys: Float[Array, "B K n D"],
        values: Float[Array, "B K n V"],
        at: Int32[Array, "B P n"],
    ) -> Index:
        del values
        codes = put_codes(index.slots["codes"], self._codes(index.fixed["codebook"], keys), at)
        return Index({"codes": codes}, index.fixed)

    def _codes(self, books: Array, keys: Array) -> Array:
        """``[B, K, n, G]``."""
        return jax.vmap(jax.vmap(product_encode))(keys, books).astype(code_dtype(self.bits))

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        books = index.fixed["codebook"]
        queries = grouped(q, books.shape[1])
        parts = queries.reshape(*queries.shape[:3], self.groups, -1)
        return lookup_sum(jnp.einsum("bkjgc,bkgrc->bkjgr", parts, books), index.slots["codes"])
