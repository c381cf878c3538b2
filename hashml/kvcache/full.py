"""Nothing is dropped: the full cache, and the policy under every codec that is studied alone."""

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array

from hashml.kvcache.contract import Policy, PolicyState, PrefillStatistics

if TYPE_CHECKING:
    from hashml.kvcache.spec import LayerSpec


@dataclasses.dataclass(frozen=True)
class KeepAll(Policy):
    """Slots fill up in order. Beyond `LayerSpec.holds` tokens a row's oldest are overwritten, so a server asks first:
    `hashml.kvcache.engine.cache_engine` refuses a ``capacity`` above it."""

    @property
    def head_uniform(self) -> bool:
        return True

    @property
    def append_only(self) -> bool:
        return True

    def init(self, spec: "LayerSpec", batch: int) -> PolicyState:
        return {}

    def from_prefill(self, spec: "LayerSpec", statistics: PrefillStatistics, key: Array) -> tuple[Array, PolicyState]:
        return statistics.pos[:, None].astype(jnp.float32), {}

    def score(self, spec: "LayerSpec", state: PolicyState, pos: Array, now: Array, key: Array | None = None) -> Array:
        return pos.astype(jnp.float32)
