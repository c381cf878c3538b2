"""AdaKV: heads of a layer share one budget (Feng, Lv, Cao, Xie, Zhou, NeurIPS 2025, arXiv 2407.11550).

Some heads look at few tokens, others everywhere. Of a layer with H heads and ``base`` (c) tokens a head, the best
``H c`` over ALL heads are taken; with ``count[h]`` of them in head ``h`` its budget is

    cap[h] = round((1 - floor) count[h] + int(floor c))

and each head keeps that many of its own best, by SnapKV's scores, beside the window. ``floor`` = 1 gives equal
budgets, hence SnapKV; 0 keeps the largest sum of scores that a layer can. Caps are found once, after the prompt, and
then hold: slots beyond a head's cap stay empty, so that memory is saved only where the layout has pages.
"""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV with a budget for each head.

    Attributes:
        base: c, main slots that a head has on average; the layer's ``slots`` bound what one can get.
        floor: share of it that every head has.
        queries, kernel, pooling: as in `SnapKV`.

    Raises:
        ValueError: for values out of range.
    """

    base: int = dataclasses.field(kw_only=True)
    floor: float | int = dataclasses.field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base < 1:
            raise ValueError(f"base is {self.base}; it must be at least 1")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is {self.floor}; it must be between 0 and 1")

    def check(self, spec: LayerSpec) -> None:
        if spec.slots < self.base:
            raise ValueError(f"slots is {spec.slots}; it must be at least base, {self.base}, the mean over heads")
        if spec.granularity > 1:
            raise ValueError(
                f"slots share scales by {spec.granularity}; budgets of heads need codecs where they do not"
            )

    def caps(self, spec: LayerSpec, score: Float[Array, "B H T"], pos: Int32[Array, "B T"]) -> Int32[Array, "B H"]:
        """Main slots that each head may use, from the scores of a prompt's tokens at ``pos`` (-1 for padding)."""
        # Sinks are kept everywhere, and the window's tokens are no main slots' concern.
        score = jnp.where((pos < spec.sinks)[:, None], jnp.inf, score)
        main = (pos >= 0) & ~newest(pos, spec.window)
        budgets = ada_budgets(jnp.where(main[:, None], score, -jnp.inf), self.base, self.floor)
        return jnp.clip(budgets, max(spec.sinks, spec.flush, 1), spec.slots)
