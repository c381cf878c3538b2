"""What a policy has to beat: tokens kept by chance, and by the norms of their keys.

`RandomEviction`: each token has a number, drawn once, and the lowest leaves. So what is kept is a uniform sample of
the past (reservoir sampling by random priorities; Vitter, ACM TOMS 1985). A draw anew at every step would be another
control, under which a token's life is geometric and recent ones prevail. The draw is a hash of the row's key and the
token's position (`hashml.kvcache.noise`), found when it is needed, so that the control pays for no state.

`KeyNorm`: keys of low norm get much attention (Devoto, Zhao, Scardapane, Minervini, EMNLP 2024, arXiv 2406.11430), so
the highest norm leaves. It needs no attention; ``keep = "high"`` is its opposite. A rotation leaves norms alone.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from hashml.kvcache.contract import Policy, PolicyState, PrefillStatistics
from hashml.kvcache.noise import token_draws
from hashml.kvcache.spec import LayerSpec


@dataclasses.dataclass(frozen=True)
class RandomEviction(Policy):
    """A uniform sample of the past, drawn by each head alone."""

    def init(self, spec: LayerSpec, batch: int) -> PolicyState:
        return {}

    def from_prefill(self, spec: LayerSpec, statistics: PrefillStatistics, key: Array) -> tuple[Array, PolicyState]:
        pos = statistics.pos[:, None]
        return token_draws(key, jnp.broadcast_to(pos, (pos.shape[0], spec.head_pos, pos.shape[2]))), {}

    def score(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array, key: Array | None = None) -> Array:
        if key is None:
            raise ValueError("key is None; random eviction draws by the keys of the rows")
        return token_draws(key, pos)


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

    def score(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array, key: Array | None = None) -> Array:
        return state["norm"]
