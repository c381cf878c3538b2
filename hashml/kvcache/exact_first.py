"""The first tokens of a sequence as they are, before any codec: attention sinks, which a coarse code would spoil most
(KVQuant: Hooper et al., NeurIPS 2024, arXiv 2401.18079, keeps the first 1 to 5 so).

Every head parks its spare attention on the first tokens, so an error in their keys or values is read at each step.
Sinks are never dropped and come first, so they lie in main slots 0, 1, 2...: `ExactFirst` holds a second copy of
slots 0 to S - 1 in the layer's dtype, and reads that one. The codes of these slots are stored and never looked at,
since one code more or less is cheaper than a store whose slots begin elsewhere.

    bytes = those of ``inner`` + S D itemsize a head         keys + values, whatever the number of slots
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from hashml.kvcache.contract import Codec, CodecState, Role, Rotate, Space


@dataclasses.dataclass(frozen=True)
class ExactFirst(Codec):
    """Tokens coded by ``inner``, but for the first ones. For keys, rotated or raw, and for values.

    A NaN in one of the first tokens stays one; others are as in ``inner``.

    Attributes:
        inner: codec of all other tokens, each of which it codes alone.
        first: S, tokens that are exact; the layer has as many ``sinks`` at least, and no pages.

    Raises:
        ValueError: for less than one token, or an inner codec whose slots share scales or are exact already.
    """

    inner: Codec
    first: int = 1

    def __post_init__(self) -> None:
        if self.first < 1:
            raise ValueError(f"first is {self.first}; it must be at least 1 token")
        if self.inner.needs_sinks:
            raise ValueError(f"inner is {self.inner}; its first tokens are exact already")
        if self.inner.granularity > 1:
            raise ValueError(f"inner is {self.inner}, whose slots share scales by {self.inner.granularity}; first "
                             f"tokens are set apart where each is coded alone")  # fmt: skip

    @property
    def needs_sinks(self) -> int:
        return self.first

    @property
    def space(self) -> Space:
        return self.inner.space

    @property
    def keys_only(self) -> bool:
        return self.inner.keys_only

    @property
    def observed(self) -> int:
        return self.inner.observed

    @property
    def rotary_pairs(self) -> str | None:
        return self.inner.rotary_pairs

    @property
    def roles(self) -> dict[str, Role]:
        return {**self.inner.roles, "first": "window"}

    def check(self, head_dim: int) -> None:
        self.inner.check(head_dim)

    def check_tables(self, params: Any, heads: int, head_dim: int) -> None:
        self.inner.check_tables(params, heads, head_dim)

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        state = self.inner.init(batch, heads, slots, head_dim, dtype)
        first = jnp.zeros((batch, heads, min(self.first, slots), head_dim), dtype)
        return CodecState(state.slots | {"first": first}, state.fixed)

    def fit(
        self, fixed: dict[str, Array], keys: Array, queries: Array, valid: tuple[Array, Array]
    ) -> dict[str, Array]:
        return self.inner.fit(fixed, keys, queries, valid)

    def quantise(self, params: Any, fixed: dict[str, Array], x: Array, valid: Array) -> dict[str, Array]:
        # A row of ``first`` for every token: those of later slots fall outside the leaf, and are not written.
        return self.inner.quantise(params, fixed, x, valid) | {"first": x}

    def decode(self, params: Any, state: CodecState) -> Float[Array, "B H C D"]:
        first = state.slots["first"].astype(jnp.float32)
        coded = self.inner.decode(params, self._coded(state)).astype(jnp.float32)
        return coded.at[:, :, : first.shape[2]].set(first)

    def logits(
        self, params: Any, state: CodecState, q: Float[Array, "B H J n D"], rotate: Rotate | None
    ) -> Float[Array, "B H J n C"]:
        if rotate is not None:  # it turns all slots together
            return super().logits(params, state, q, rotate)
        first = state.slots["first"].astype(jnp.float32)
        exact = jnp.einsum("bhjnd,bhsd->bhjns", q.astype(jnp.float32), first)
        return self.inner.logits(params, self._coded(state), q, None).at[..., : first.shape[2]].set(exact)

    def weighted_sum(
        self, params: Any, state: CodecState, probs: Float[Array, "B H J n C"]
    ) -> Float[Array, "B H J n D"]:
        first = state.slots["first"].astype(jnp.float32)
        count = first.shape[2]
        coded = self.inner.weighted_sum(params, self._coded(state), probs.at[..., :count].set(0))
        return coded + jnp.einsum("bhjns,bhsd->bhjnd", probs[..., :count].astype(jnp.float32), first)

    def _coded(self, state: CodecState) -> CodecState:
        return CodecState({name: leaf for name, leaf in state.slots.items() if name != "first"}, state.fixed)
