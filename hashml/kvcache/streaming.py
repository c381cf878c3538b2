"""StreamingLLM: attention sinks and a window (Xiao, Tian, Chen, Han, Lewis, ICLR 2024, arXiv 2309.17453).

A plain sliding window breaks when the first tokens leave, since every head parks its spare attention on them. So
the first ``sinks`` tokens stay for ever, and of the others the oldest leaves:

    score = -age

The layer brings the rest: ``LayerSpec.sinks`` = 4, main slots for them, a ``window`` for the recent ones, and
``rope = "slot"``, so that keys are rotated by their rank in the cache and no distance exceeds its capacity. With
``sinks`` = 0 this is the window that all other policies are compared with.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Num

from hashml.kvcache.contract import Policy, PolicyState, PrefillStatistics
from hashml.kvcache.spec import LayerSpec


@dataclasses.dataclass(frozen=True)
class Streaming(Policy):
    """The oldest token leaves. It needs no attention and no state, and serves all heads alike."""

    @property
    def head_uniform(self) -> bool:
        return True

    def init(self, spec: LayerSpec, batch: int) -> PolicyState:
        return {}

    def from_prefill(self, spec: LayerSpec, statistics: PrefillStatistics, key: Array) -> tuple[Array, PolicyState]:
        # Ages and not positions, which float32 no longer tells apart beyond 2**24.
        pos = statistics.pos[:, None]
        return (pos - pos.max(axis=-1, keepdims=True)).astype(jnp.float32), {}

    def score(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array, key: Array | None = None) -> Array:
        return (pos - now[:, None, None]).astype(jnp.float32)


def break_ties(
    score: Num[Array, "*n N"], pos: Int32[Array, "*n N"], leaves: Literal["older", "newer"] = "older"
) -> Float[Array, "*n N"]:
    """Ranks of scores, 0 for the lowest, where among equal ones the ``older`` or ``newer`` token has the lower rank.

    Ranks are exact in float32, which a sum of a count and a position would not be.
    """
    order = jnp.lexsort((pos if leaves == "older" else -pos, score), axis=-1)
    return jnp.argsort(order, axis=-1).astype(jnp.float32)
