"""Keyformer: key tokens by a regularised softmax (Adnan, Arunkumar, Jain, Nair, Soloveychik, Kamath, MLSys 2024,
arXiv 2403.09054).

Once tokens are dropped, the softmax over those that stay is skewed, and sums of attention (H2O) pick early tokens.
So scores add up another softmax, of the same logits ``x`` with fresh Gumbel noise ``z`` and a temperature:

    f[i] = exp((x[i] + z[i]) / tau) / sum over j of exp((x[j] + z[j]) / tau)        sum[i] += f[i]
    tau  = tau_start + t (tau_end - tau_start) / new_tokens                         t = 0 in the prompt

``t`` counts a row's generated tokens, and ``tau`` stays at ``tau_end`` after ``new_tokens`` of them. The noise never
touches the attention itself. It is drawn anew for every query, head and key, by a hash of their positions under the
row's key (`hashml.kvcache.noise`), and not stored: a row has the same noise wherever it runs. Query heads of a key
head are averaged. Departures: the reference sums scores over the batch, and its MPT code drops only at every 8th step
(here ``LayerSpec.flush``). ``noise = False`` is the temperature alone, ``tau_start = tau_end = 1`` the noise alone,
and both together are H2O.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from hashml.kvcache.contract import (
    Attention,
    Policy,
    PolicyState,
    PrefillStatistics,
    Queries,
    masked_softmax,
    over_queries,
)
from hashml.kvcache.noise import gumbel, pair_draws
from hashml.kvcache.spec import LayerSpec


def gumbel_softmax(
    logits: Float[Array, "*n N"],
    valid: Bool[Array, "*#n N"],
    tau: float | int | Shaped[Array, "..."],
    noise: Float[Array, "*n N"] | None,
) -> Float[Array, "*n N"]:
    """Softmax over the valid entries of ``(logits + noise) / tau``, in float32; ``tau`` may be one for each query."""
    x = logits.astype(jnp.float32)
    return masked_softmax((x if noise is None else x + noise) / tau, valid)


@dataclasses.dataclass(frozen=True)
class Keyformer(Policy):
    """Keeps the tokens with the largest sums of a noisy, ever flatter softmax.

    Attributes:
        tau_start: temperature in the prompt, positive.
        tau_end: temperature after ``new_tokens`` tokens.
        new_tokens: tokens to be generated.
        noise: whether Gumbel noise is added.

    Raises:
        ValueError: for values out of range.
    """

    tau_start: float | int = 1.0
    tau_end: float | int = 2.0
    new_tokens: int = 128
    noise: bool = True

    def __post_init__(self) -> None:
        for name in ("tau_start", "tau_end"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; a temperature is positive and finite")
        if self.new_tokens < 1:
            raise ValueError(f"new_tokens is {self.new_tokens}; it must be at least 1")

    @property
    def sums_columns(self) -> bool:
        return True

    def tau(self, tokens: int | Array) -> Array:
        """The temperature at the ``tokens``-th generated token; 0 and less are the prompt."""
        share = jnp.clip(jnp.asarray(tokens), 0, self.new_tokens) / self.new_tokens
        # Exact at both ends.
        return self.tau_start * (1 - share) + self.tau_end * share

    def weigh(self, logits: Array, valid: Array, pos: Array, queries: Queries) -> Array:
        return gumbel_softmax(logits, valid, self.tau_start, self._noise(logits, pos, queries))

    def init(self, spec: LayerSpec, batch: int) -> PolicyState:
        return {"sum": jnp.zeros((batch, spec.head_pos, spec.capacity), jnp.float32)}

    def from_prefill(self, spec: LayerSpec, statistics: PrefillStatistics, key: Array) -> tuple[Array, PolicyState]:
        assert statistics.column_sums is not None, "sums_columns is set"
        return statistics.column_sums, {"sum": statistics.column_sums}

    def observe(
        self, spec: LayerSpec, state: PolicyState, attention: Attention, pos: Array, queries: Queries
    ) -> PolicyState:
        if not self.noise and self.tau_start == self.tau_end == 1:
            f = attention.probs
        else:
            tau = self.tau(queries.pos + 1 - queries.born[:, None])[:, None, None, :, None]
            f = gumbel_softmax(attention.logits, attention.valid, tau, self._noise(attention.logits, pos, queries))
        return {"sum": state["sum"] + over_queries(f, spec.gqa).sum(axis=2)}

    def score(self, spec: LayerSpec, state: PolicyState, pos: Array, now: Array, key: Array | None = None) -> Array:
        return state["sum"]

    def _noise(self, logits: Array, pos: Array, queries: Queries) -> Array | None:
        """Gumbel noise of the shape of logits ``[B, H, J, n, N]``."""
        if not self.noise:
            return None
        return gumbel(pair_draws(queries.key, queries.pos, pos, *logits.shape[1:3]))
