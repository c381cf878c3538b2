"""What a policy has to beat: tokens kept by chance, and by the norms of their keys.

`RandomEviction`: each token draws a number when it enters, and the lowest leaves. So what is kept is a uniform sample
of the past (reservoir sampling by random priorities; Vitter, ACM TOMS 1985). A draw anew at every step would be
another control, under which a token's life is geometric and recent ones prevail.

`KeyNorm`: keys of low norm get much attention (Devoto, Zhao, Scardapane, Minervini, EMNLP 2024, arXiv 2406.11430), so
the highest norm leaves. It needs no attention; ``keep = "high"`` is its opposite. A rotation leaves norms alone.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hashml.kvcache.contract import Attention, Policy, PolicyState, PrefillStatistics
from hashml.kvcache.spec import LayerSpec

UNDRAWN = -1.0
"""Below every draw."""


@dataclasses.dataclass(frozen=True)
class RandomEviction(Policy):
    """A uniform sample of the past, drawn by each head alone."""

    def init(self, spec: LayerSpec, batch: int) -> PolicyState:
        return {"draw": jnp.full((batch, spec.head_pos, spec.capacity), UNDRAWN, jnp.float32)}

    def from_prefill(self, spec: LayerSpec, statistics: PrefillStatistics, key: Array) -> tuple[Array, PolicyState]:
        batch, tokens = statistics.pos.shape
        draw = jax.random.uniform(jax.random.fold_in(key, 0), (batch, spec.head_pos, tokens), jnp.float32)
        return draw, {"draw": draw}

    def observe(
        self, spec: LayerSpec, state: PolicyState, attention: Attention, pos: Array, key: Array, step: Array
    ) -> PolicyState:
        draw = state["draw"]
        new = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 1), step), draw.shape, jnp.float32)
        return {"draw": jnp.where((draw == UNDRAWN) & (pos >= 0), new, draw)}

    def score(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array) -> Array:
        return state["draw"]


@dataclasses.dataclass(frozen=True)
class KeyNorm(Policy):
    """Scores a token by the norm of its key, once.

    Attributes:
        keep: keys of ``"low"`` norm, or of ``"high"``.

    Raises:
        ValueError: for another value.
    """

    keep: Literal["low", "high"] = "low"

    def __post_init__(self) -> None:
        if self.keep not in ("low", "high"):
            raise ValueError(f"keep is {self.keep!r}; it must be 'low' or 'high'")

    def init(self, spec: LayerSpec, batch: int) -> PolicyState:
        # Where nobody tells the policy of a key, its token stays.
        return {"norm": jnp.full((batch, spec.head_pos, spec.capacity), jnp.inf, jnp.float32)}

    def enter(self, spec: LayerSpec, keys: Float[Array, "B H n D"]) -> PolicyState:
        """The state of tokens that enter, leaves ``[B, H, n]``."""
        norm = jnp.linalg.norm(keys.astype(jnp.float32), axis=-1)
        return {"norm": norm if self.keep == "high" else -norm}

    def from_prefill(self, spec: LayerSpec, statistics: PrefillStatistics, key: Array) -> tuple[Array, PolicyState]:
        state = self.enter(spec, statistics.keys)
        return state["norm"], state

    def score(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array) -> Array:
        return state["norm"]
