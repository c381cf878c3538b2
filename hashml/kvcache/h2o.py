"""H2O: heavy hitters (Zhang, Sheng, Zhou, Chen, Zheng, Cai, Song, Tian, Re, Barrett, Wang, Chen, NeurIPS 2023,
arXiv 2306.14048).

A few tokens get most of the attention, whoever asks. A token is scored by what all queries so far gave it,

    sum[j] += p[q, j]        for every query q that saw j; the column sums of the attention, in the prompt

and the ``slots`` heaviest are kept beside the ``window`` of recent ones. A token that is dropped takes its sum with
it. Heads decide alone; the reference sums over the batch too, which is a defect for more than one row. Sums favour
old tokens, which more queries saw; ``normalise`` divides by their number.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from hashml.kvcache.contract import Attention, Policy, PolicyState, PrefillStatistics, Queries, over_queries
from hashml.kvcache.spec import LayerSpec


@dataclasses.dataclass(frozen=True)
class HeavyHitters(Policy):
    """Keeps the tokens that got most attention.

    Attributes:
        normalise: whether a sum is divided by the number of queries that saw the token.
    """

    normalise: bool = False

    @property
    def sums_columns(self) -> bool:
        return True

    def init(self, spec: LayerSpec, batch: int) -> PolicyState:
        shape = (batch, spec.head_pos, spec.capacity)
        state = {"sum": jnp.zeros(shape, jnp.float32)}
        return state | {"count": jnp.zeros(shape, jnp.int32)} if self.normalise else state

    def from_prefill(self, spec: LayerSpec, statistics: PrefillStatistics, key: Array) -> tuple[Array, PolicyState]:
        assert statistics.column_sums is not None, "sums_columns is set"
        state = {"sum": statistics.column_sums}
        if self.normalise:
            state["count"] = jnp.broadcast_to(statistics.column_counts[:, None], statistics.column_sums.shape)
        return self._score(state), state

    def observe(
        self, spec: LayerSpec, state: PolicyState, attention: Attention, pos: Array, queries: Queries
    ) -> PolicyState:
        new = {"sum": state["sum"] + over_queries(attention.probs, spec.gqa).sum(axis=2)}
        if self.normalise:
            new["count"] = state["count"] + attention.valid[:, :, 0].sum(axis=2, dtype=jnp.int32)
        return new

    def score(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array, key: Array | None = None) -> Array:
        return self._score(state)

    def _score(self, state: PolicyState) -> Array:
        return state["sum"] / jnp.maximum(state["count"], 1) if self.normalise else state["sum"]
