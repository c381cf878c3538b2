"""vAttention: the best tokens, and a sample of the rest that is as large as it has to be (Desai et al. 2025,
arXiv 2510.05688).

    static     sinks, window, and the best tokens of another selector
    rest       the n others; ``max(2, base n)`` uniform draws of them give the deviation ``sigma`` of e_j = exp(s_j),
               and  D = sum_static e_j + n mean_draws e_j
    b = clip((z sigma n / (epsilon D))^2, draws, n),         z the normal quantile of ``1 - delta / sides``

b uniform draws without replacement count ``n / b`` times. By the central limit theorem the denominator is then
too small by more than ``epsilon`` of itself in a part ``delta`` of all cases, and too large in as many: the quantile
of the released code is that of one side, and ``sides=2`` promises ``delta`` for both together. Shapes are static: so
many tokens are drawn as the list has room for, and the first b of them count; where b is more than there is room for,
the promise does not hold.

As in the released code, the draws that choose b are among the b draws; sums are unbiased for a fixed b alone (as with
``epsilon=0``, which always takes all draws there is room for).
"""

import dataclasses
import math
import statistics
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key

from hashml.attention.selector_contract import (
    Gqa,
    Index,
    Rows,
    Selector,
    check_gqa,
    chosen_slots,
    disjoint,
    need,
    rest,
    sample,
)
from hashml.attention.sparse_decode import MASKED, Selection


def sample_budget(
    sigma: Float[Array, "*n"],
    total: Float[Array, "*n"],
    population: Float[Array, "*n"],
    least: Float[Array, "*n"],
    *,
    epsilon: float | int,
    delta: float | int,
    sides: int = 1,
) -> Float32[Array, "*n"]:
    """Draws that the denominator ``total`` needs: ``(z sigma n / (epsilon total))^2``, rounded up, between ``least``
    and n. ``epsilon = 0`` needs all."""
    if epsilon == 0:
        return population.astype(jnp.float32)
    z = statistics.NormalDist().inv_cdf(1 - delta / sides)
    wanted = z * sigma * population / jnp.maximum(epsilon * total, jnp.finfo(jnp.float32).tiny)
    # The square of a quotient beyond 2^62 would overflow; n is smaller.
    return jnp.clip(jnp.ceil(jnp.square(jnp.minimum(wanted, 1e15))), jnp.minimum(least, population), population)


@dataclasses.dataclass(frozen=True)
class VAttention(Selector):
    """Another selector's best tokens and an adaptive sample. `select` needs ``rows`` and ``key``.

    Attributes:
        selector: who names the best tokens.
        top_share: part of ``heavy`` that they are; the rest is room for draws.
        base: part of the others that is drawn to choose b.
        epsilon, delta: error that the denominator may have, and how often it may be larger.
        sides: 1 counts errors of either sign by themselves, 2 both together.

    Raises:
        ValueError: for values outside of their ranges.
    """

    selector: Selector
    top_share: float | int = 0.5
    base: float | int = 0.05
    epsilon: float | int = 0.05
    delta: float | int = 0.05
    sides: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        for name in ("top_share", "base"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon is {self.epsilon}; it must be at least 0 and finite")
        if not 0 < self.delta <= 0.5:
            raise ValueError(f"delta is {self.delta}; it must lie in (0, 0.5]")
        if self.sides not in (1, 2):
            raise ValueError(f"sides is {self.sides}; allowed are 1 and 2")

    def build(
        self,
        keys: Float[Array, "B K N D"],
        values: Float[Array, "B K N V"],
        positions: Int32[Array, "B P N"],
        *,
        key: Key[Array, ""] | None = None,
        learned: Any = None,
    ) -> Index:
        return self.selector.build(keys, values, positions, key=key, learned=learned)

    def append(
        self,
        index: Index,
        keys: Float[Array, "B K n D"],
        values: Float[Array, "B K n V"],
        at: Int32[Array, "B P n"],
    ) -> Index:
        return self.selector.append(index, keys, values, at)

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        return self.selector.scores(index, q)

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
        check_gqa(gqa)
        key = need("key", key, "VAttention", "to draw tokens")
        rows = need("rows", rows, "VAttention", "for the weights of what it samples")
        slots, top = positions.shape[2], round(self.top_share * heavy)
        above, below = jax.random.split(key)
        static = self.selector.select(
            index, q, positions, query_pos, sinks=sinks, window=window, heavy=top, gqa=gqa, key=above, rows=rows
        )
        lists = static.idx.shape[1]
        others = rest(positions, query_pos, sinks=0, window=0, heads=lists) & ~chosen_slots(static, slots)
        idx, valid, population = sample(below, others, heavy - top)
        if idx.shape[2] == 0:
            return static
        count = self._budget(q, rows, static, Selection(idx, valid, jnp.ones(idx.shape, jnp.float32)), population)
        used = valid & (jnp.arange(idx.shape[2]) < count[..., None])
        weight = jnp.broadcast_to((population / jnp.maximum(count, 1.0))[..., None], idx.shape)
        return disjoint(static, Selection(idx, used, weight), slots)

    def _budget(
        self, q: Array, rows: Rows, static: Selection, draws: Selection, population: Int32[Array, "B S"]
    ) -> Float32[Array, "B S"]:
        """Draws that count: what the most demanding query of a list needs, as far as there is room."""
        room = draws.idx.shape[2]
        n = population.astype(jnp.float32)
        least = jnp.minimum(jnp.maximum(2.0, jnp.ceil(self.base * n)), jnp.minimum(n, room))
        chosen, drawn = (_logits(q, rows, selection) for selection in (static, draws))
        first = jnp.arange(room) < least[..., None]
        drawn = jnp.where(first[:, :, None], drawn, MASKED)
        top = jnp.maximum(chosen.max(axis=-1, initial=MASKED), drawn.max(axis=-1))[..., None]
        held = jnp.where(static.valid, static.weight, 0.0)[:, :, None]
        base = jnp.where(drawn > MASKED / 2, jnp.exp(drawn - top), 0.0)
        size = jnp.maximum(least, 1.0)[:, :, None]
        mean = base.sum(axis=-1) / size
        spread = jnp.where(first[:, :, None] & draws.valid[:, :, None], jnp.square(base - mean[..., None]), 0.0)
        sigma = jnp.sqrt(spread.sum(axis=-1) / jnp.maximum(size - 1, 1.0))
        n, least = (jnp.broadcast_to(x[:, :, None], sigma.shape) for x in (n, least))
        total = jnp.sum(held * jnp.exp(chosen - top), axis=-1) + n * mean
        limits: dict[str, Any] = {"epsilon": self.epsilon, "delta": self.delta, "sides": self.sides}
        wanted = sample_budget(sigma, total, n, least, **limits)
        return jnp.minimum(wanted.max(axis=2), room)


def _logits(q: Array, rows: Rows, selection: Selection) -> Float32[Array, "B S J M"]:
    """Exact logits of listed tokens, `MASKED` where an entry is not valid."""
    keys = rows(selection.idx).astype(jnp.float32)
    batch, heads, width = q.shape
    queries = q.astype(jnp.float32).reshape(batch, keys.shape[1], heads // keys.shape[1], width) / math.sqrt(width)
    found = jnp.einsum("bsjd,bsmd->bsjm", queries, keys)
    return jnp.where(selection.valid[:, :, None], found, MASKED)
