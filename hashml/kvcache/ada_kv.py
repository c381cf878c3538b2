"""AdaKV: heads of a layer share one budget (Feng, Lv, Cao, Xie, Zhou, NeurIPS 2025, arXiv 2407.11550).

Some heads look at few tokens, others everywhere. Of a layer with H heads and ``base`` (c) tokens a head, the best
``H c`` over ALL heads are taken; with ``count[h]`` of them in head ``h`` its budget is

    cap[h] = round((1 - floor) count[h] + int(floor c))

and each head keeps that many of its own best, by SnapKV's scores, beside the window. ``floor`` = 1 gives equal
budgets, hence SnapKV; 0 keeps the largest sum of scores that a layer can. Caps are found once, from the prompt.
Tokens that come later get ``later`` slots more in every head, and none of the prompt's leaves for them until these
are full; slots beyond both stay empty, so that memory is saved only where the layout has pages. Where slots share
scales budgets are whole blocks of them, the nearest number.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from hashml.kvcache.snap_kv import SnapKV, newest
from hashml.kvcache.spec import LayerSpec


def ada_budgets(scores: Float[Array, "B H T"], base: int, floor: float | int) -> Int32[Array, "B H"]:
    """Tokens that each head keeps, ``H base`` in all up to rounding.

    Args:
        scores: of a prompt's tokens; -inf for those that cannot be kept, as many in every head of a row.
        base: c, tokens that a head keeps on average.
        floor: share of ``base`` that every head has, in [0, 1].

    Raises:
        ValueError: for a base or a floor out of range.
    """
    if base < 1:
        raise ValueError(f"base is {base}; it must be at least 1")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is {floor}; it must be between 0 and 1")
    batch, heads, tokens = scores.shape
    best, index = lax.top_k(scores.reshape(batch, heads * tokens), min(heads * base, heads * tokens))
    owner = jnp.where(best > -jnp.inf, index // tokens, heads)
    count = (owner[:, None] == jnp.arange(heads)[:, None]).sum(axis=-1)
    # Where all tokens fit, what is left over belongs to all heads alike.
    count = jnp.where((scores > -jnp.inf).sum(axis=-1) <= base, base, count)
    return jnp.round((1 - floor) * count + int(floor * base)).astype(jnp.int32)


def ada_pages(
    heads: int, base: int, later: int, page_size: int, *, floor: float | int = 0.5, least: int = 1,
    granularity: int = 1,
) -> int:  # fmt: skip
    """Pages of a row that are enough however `ada_budgets` splits them: each head's last page may be a part of one.

    Args:
        heads: H.
        base: c, tokens that a head keeps on average.
        later: slots of every head for tokens after the prompt.
        page_size: tokens of a page.
        floor: share of ``base`` that every head has.
        least: slots that every head has whatever its budget, for sinks or the tokens that leave the window together.
        granularity: slots that share a scale; budgets are multiples of it.
    """
    # A budget is rounded up by half a token and half a block at most, and heads but one may be lifted to the least.
    least = math.ceil(least / granularity) * granularity
    lifted = max(0, least - int(floor * base))
    held = max(base, least) + 0.5 + granularity // 2 + later
    return math.ceil((heads * (held + page_size - granularity) + (heads - 1) * lifted) / page_size)


@dataclasses.dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV with a budget for each head.

    Attributes:
        base: c, main slots that a head has on average; the layer's ``slots`` bound what one can get.
        floor: share of it that every head has.
        later: main slots of every head beyond its budget, for tokens that come after the prompt; whole blocks where
            slots share scales.
        queries, kernel, pooling: as in `SnapKV`.

    Raises:
        ValueError: for values out of range.
    """

    base: int = dataclasses.field(kw_only=True)
    floor: float | int = dataclasses.field(default=0.5, kw_only=True)
    later: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base < 1:
            raise ValueError(f"base is {self.base}; it must be at least 1")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is {self.floor}; it must be between 0 and 1")
        if self.later < 0:
            raise ValueError(f"later is {self.later}; it must be at least 0 slots")

    def check(self, spec: LayerSpec) -> None:
        if spec.slots < self.base + self.later:
            raise ValueError(f"slots is {spec.slots}; it must be at least base, {self.base}, the mean over heads, "
                             f"and later, {self.later}, together")  # fmt: skip
        if self.later % spec.granularity:
            raise ValueError(f"later is {self.later}; it must be a multiple of {spec.granularity}, the slots that "
                             f"share a scale")  # fmt: skip

    def resized(self, slots: int, of: int) -> "AdaKV":
        share = max(0, slots - self.later), max(1, of - self.later)
        return dataclasses.replace(self, base=max(1, self.base * share[0] // share[1]))

    def caps(self, spec: LayerSpec, score: Float[Array, "B H T"], pos: Int32[Array, "B T"]) -> Int32[Array, "B H"]:
        """Main slots that a prompt may fill in each head, from its tokens' scores at ``pos`` (-1 for padding)."""
        # Sinks are kept everywhere, and the window's tokens are no main slots' concern.
        score = jnp.where((pos < spec.sinks)[:, None], jnp.inf, score)
        main = (pos >= 0) & ~newest(pos, spec.window)
        budgets = ada_budgets(jnp.where(main[:, None], score, -jnp.inf), self.base, self.floor)
        grain = spec.granularity
        budgets = (budgets + grain // 2) // grain * grain
        least = -(-max(spec.sinks, spec.flush, 1) // grain) * grain
        return jnp.clip(budgets, least, spec.slots - self.later)
