"""TOVA: token omission via attention (Oren, Hassid, Yarden, Adi, Schwartz, EMNLP 2024, arXiv 2401.06104).

A cache of bounded size makes a transformer a recurrent network with that many states. The token is dropped that
the last query looks at least, by the mean over all heads of the layer,

    last[j] = mean over heads of p[now, j]

so one decision serves them all and nothing is accumulated. Neither recents nor sinks are protected: give the layer
a ``window`` of 1, the token that has just come. Among equals, as under uniform attention, the oldest leaves.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from hashml.kvcache.contract import Attention, Policy, PolicyState, PrefillStatistics, Queries
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.streaming import break_ties


@dataclasses.dataclass(frozen=True)
class TOVA(Policy):
    """Drops what the last query looked at least, for all heads alike."""

    @property
    def head_uniform(self) -> bool:
        return True

    @property
    def observed(self) -> int:
        return 1

    def init(self, spec: LayerSpec, batch: int) -> PolicyState:
        return {"last": jnp.zeros((batch, 1, spec.capacity), jnp.float32)}

    def from_prefill(self, spec: LayerSpec, statistics: PrefillStatistics, key: Array) -> tuple[Array, PolicyState]:
        assert statistics.last is not None, "observed is 1"
        last = statistics.last.probs.mean(axis=(1, 2))
        return break_ties(last, statistics.pos[:, None]), {"last": last}

    def observe(
        self, spec: LayerSpec, state: PolicyState, attention: Attention, pos: Array, queries: Queries
    ) -> PolicyState:
        rows = attention.probs.mean(axis=(1, 2))
        # A row of the batch that brings fewer queries than others keeps what its own last one said.
        asks = attention.valid.any(axis=(1, 2, 4))
        last = asks.shape[1] - 1 - jnp.argmax(asks[:, ::-1], axis=1)
        new = jnp.take_along_axis(rows, last[:, None, None], axis=1)
        return {"last": jnp.where(asks.any(axis=1)[:, None, None], new, state["last"])}

    def score(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array, key: Array | None = None) -> Array:
        return break_ties(state["last"], pos)
