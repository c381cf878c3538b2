"""MagicPig: keys sampled by hash collisions, with the probability known (Chen et al., ICLR 2025, arXiv 2410.16179).

    c_j = k_j - mu,   m = max_j |c_j|                               mu, m of the prompt, and kept
    k'_j = [c_j, sqrt(m^2 - |c_j|^2)] / m,    q' = [q - mu, 0] / |q - mu|              Neyshabur, Srebro 2015
    read j if the P-bit codes of k'_j and q' are equal in at least ``matches`` of L tables

so that with ``u = (1 - angle / pi)^P`` a token is read with probability

    matches = 1      p = 1 - (1 - u)^L
    matches = 2      p = 1 - (1 - u)^L - L u (1 - u)^(L - 1)                           the paper's

and counts ``1 / p`` times: numerator and denominator are unbiased over the planes. The number of tokens is not chosen
but comes out; report the density. Where more than ``heavy`` collide, so many of them are drawn uniformly, and count
as many times more. A later key longer than ``m`` is taken at its direction alone.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key

from hashml.attention.code_lookup import collision_counts
from hashml.attention.selector_contract import (
    Gqa,
    Index,
    Rows,
    Selector,
    check_gqa,
    combine,
    disjoint,
    grouped,
    mean_key,
    need,
    over_group,
    per_head,
    put_codes,
    rest,
    sample,
)
from hashml.attention.socket import srp_codes
from hashml.attention.sparse_decode import Selection
from hashml.hashing.simhash import MAX_SOFT_BITS, hard_hash, srp_planes

_TINY = 1e-30


def collision_probability(
    cosine: Float[Array, "*n"], tables: int, bits: int, matches: Literal[1, 2]
) -> Float32[Array, "*n"]:
    """That codes of two vectors are equal in at least ``matches`` of ``tables`` tables."""
    angle = jnp.arccos(jnp.clip(cosine.astype(jnp.float32), -1.0, 1.0))
    once = (1 - angle / jnp.pi) ** bits
    missed = jnp.log1p(-once)
    some = -jnp.expm1(tables * missed)
    return some if matches == 1 else some - tables * once * jnp.exp((tables - 1) * missed)


@dataclasses.dataclass(frozen=True)
class MagicPig(Selector):
    """Sampling by collisions; a list for each query head, since probabilities belong to queries.

    `select` needs ``rows``, for the angles of what it samples, and a key where ``heavy`` is less than all slots.

    Attributes:
        tables, bits: L tables of P bits.
        matches: tables in which a token must collide, 1 or 2.

    Raises:
        ValueError: for values outside these, fewer tables than ``matches``, or bits outside 1..16.
    """

    tables: int = 75
    bits: int = 8
    matches: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        if self.matches not in (1, 2):
            raise ValueError(f"matches is {self.matches}; allowed are 1 and 2")
        if self.tables < self.matches:
            raise ValueError(f"tables is {self.tables}; it must be at least matches, {self.matches}")
        if not 1 <= self.bits <= MAX_SOFT_BITS:
            raise ValueError(f"bits is {self.bits}; it must lie in 1..{MAX_SOFT_BITS}")

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
        key = need("key", key, "MagicPig", "to draw its planes")
        mean = mean_key(keys, positions)
        lengths = jnp.linalg.norm(keys.astype(jnp.float32) - mean[:, :, None], axis=-1)
        held = per_head(positions >= 0, keys.shape[1])
        longest = jnp.max(jnp.where(held, lengths, 0.0), axis=2, keepdims=True)
        planes = srp_planes(key, self.tables, self.bits, keys.shape[-1] + 1)
        fixed = {"planes": planes, "mean": mean, "longest": jnp.maximum(longest, _TINY)}
        return Index({"codes": self._codes(fixed, keys).swapaxes(2, 3)}, fixed)

    def append(
        self,
        index: Index,
        keys: Float[Array, "B K n D"],
        values: Float[Array, "B K n V"],
        at: Int32[Array, "B P n"],
    ) -> Index:
        del values
        return Index({"codes": put_codes(index.slots["codes"], self._codes(index.fixed, keys), at)}, index.fixed)

    def _codes(self, fixed: dict[str, Any], keys: Array) -> Array:
        """``[B, K, n, L]``; hashing does not see the length ``m``."""
        centred = keys.astype(jnp.float32) - fixed["mean"][:, :, None]
        room = jnp.square(fixed["longest"]) - jnp.sum(jnp.square(centred), axis=-1)
        return srp_codes(
            jnp.concatenate([centred, jnp.sqrt(jnp.maximum(room, 0.0))[..., None]], axis=-1), fixed["planes"]
        )

    def _queries(self, fixed: dict[str, Any], q: Array) -> Float32[Array, "B K J D"]:
        return grouped(q, fixed["mean"].shape[1]) - fixed["mean"][:, :, None]

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        """Tables in which a key and a query collide."""
        queries = self._queries(index.fixed, q)
        padded = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, 1)))
        counts = collision_counts(hard_hash(padded, index.fixed["planes"]), index.slots["codes"])
        return counts.astype(jnp.float32)

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
        check_gqa(gqa, ("head",))
        rows = need("rows", rows, "MagicPig", "for the angles of what it samples")
        slots = positions.shape[2]
        scores = over_group(self.scores(index, q), gqa)
        fixed = combine(jnp.full_like(scores, -jnp.inf), positions, query_pos, sinks=sinks, window=window, heavy=0)
        others = rest(positions, query_pos, sinks=sinks, window=window, heads=q.shape[1])
        hits = others & (scores >= self.matches)
        if heavy < slots:
            idx, valid, population = sample(need("key", key, "MagicPig", "to draw from the hits"), hits, heavy)
            more = jnp.maximum(population / max(heavy, 1), 1.0)[..., None]
        else:
            idx = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), hits.shape)
            valid, more = hits, 1.0
        chance = collision_probability(self._cosines(index.fixed, q, rows(idx)), self.tables, self.bits, self.matches)
        return disjoint(fixed, Selection(idx, valid, more / jnp.maximum(chance, _TINY)), slots)

    def _cosines(self, fixed: dict[str, Any], q: Array, keys: Float[Array, "B H M D"]) -> Float32[Array, "B H M"]:
        """Of ``q'`` and ``k'``."""
        queries = self._queries(fixed, q).reshape(q.shape)
        mean, longest = (per_head(fixed[name], q.shape[1]) for name in ("mean", "longest"))
        centred = keys.astype(jnp.float32) - mean[:, :, None]
        dots = jnp.einsum("bhd,bhmd->bhm", queries, centred)
        lengths = jnp.maximum(jnp.linalg.norm(centred, axis=-1), longest)
        return dots / jnp.maximum(jnp.linalg.norm(queries, axis=-1)[..., None] * lengths, _TINY)
