"""SnapKV: the prompt's last queries choose once (Li, Huang, Yang, Venkitesh, Locatelli, Ye, Cai, Lewis, Chen, NeurIPS
2024, arXiv 2404.14469).

What the last ``queries`` (W) of a prompt attend to is what its answer will need. At the end of the prompt

    score[j] = pool over j of sum over the last W queries of p[q, j]         j before those W tokens

with a pooling of ``kernel`` tokens that keeps the neighbours of a hit, and the best are kept with the W last tokens,
of which the newest stay where these are more than the layer holds. Scores are frozen then: tokens that come later are
never dropped, as in the reference, as long as an older prompt token is there to leave in their place; a layer with
more ``slots`` than the prompt fills loses none. Query heads of one key head are pooled each for itself and then
summed up as the layer's ``gqa`` says.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from hashml.kvcache.contract import Policy, PolicyState, PrefillStatistics, over_queries
from hashml.kvcache.spec import LayerSpec

LATER = 2.0**22
"""Above every frozen score; a later token's is this less its age, exact in float32 for four million tokens."""


def snap_scores(
    probs: Float[Array, "*batch W T"],
    before: Bool[Array, "*#batch T"],
    *,
    kernel: int,
    pooling: Literal["avg", "max"],
) -> Float[Array, "*batch T"]:
    """Attention summed over W queries and pooled over the tokens ``before`` them; tokens outside count as zeros.

    The average divides by ``kernel`` at the borders too, as the reference's does.
    """
    x = jnp.where(before, probs.sum(axis=-2), 0.0)
    window = (1,) * (x.ndim - 1) + (kernel,)
    padding = ((0, 0),) * (x.ndim - 1) + ((kernel // 2, kernel // 2),)
    if pooling == "max":
        return lax.reduce_window(x, -jnp.inf, lax.max, window, (1,) * x.ndim, padding)
    return lax.reduce_window(x, 0.0, lax.add, window, (1,) * x.ndim, padding) / kernel


@dataclasses.dataclass(frozen=True)
class SnapKV(Policy):
    """Scores of a prompt's tokens by its last queries, frozen.

    Attributes:
        queries: W, the prompt's last queries that choose; the layer's ``window`` is commonly as long.
        kernel: tokens that are pooled, odd.
        pooling: ``"avg"`` or ``"max"``.

    Raises:
        ValueError: for values outside these.
    """

    queries: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries is {self.queries}; at least 1 of the prompt's last queries must choose")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}; it must be odd and positive, to have a middle")
        if self.pooling not in ("avg", "max"):
            raise ValueError(f"pooling is {self.pooling!r}; it must be 'avg' or 'max'")

    @property
    def observed(self) -> int:
        return self.queries

    def init(self, spec: LayerSpec, batch: int) -> PolicyState:
        return {"frozen": jnp.full((batch, spec.head_pos, spec.capacity), jnp.inf, jnp.float32)}

    def from_prefill(self, spec: LayerSpec, statistics: PrefillStatistics, key: Array) -> tuple[Array, PolicyState]:
        assert statistics.last is not None, "observed is at least 1"
        before = ~newest(statistics.pos, self.queries)
        pooled = snap_scores(
            statistics.last.probs,
            (before & (statistics.pos >= 0))[:, None, None],
            kernel=self.kernel,
            pooling=self.pooling,
        )
        frozen = jnp.where(before[:, None], over_queries(pooled, spec.gqa), jnp.inf)
        state = {"frozen": frozen}
        pos = statistics.pos[:, None]
        return self.score(spec, state, pos, pos.max(axis=(1, 2)) + 1), state

    def score(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array, key: Array | None = None) -> Array:
        age = (now[:, None, None] - pos).astype(jnp.float32)
        return jnp.where(jnp.isinf(state["frozen"]), LATER - age, state["frozen"])


def newest(pos: Int32[Array, "B T"], tokens: int) -> Bool[Array, "B T"]:
    """The last ``tokens`` of each row of a prompt."""
    return pos > pos.max(axis=1, keepdims=True) - tokens
