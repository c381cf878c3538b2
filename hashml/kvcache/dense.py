"""Keys and values as they are: the codec of every eviction method, and the yardstick of the others."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from hashml.kvcache.contract import Codec, CodecState, Role


@dataclasses.dataclass(frozen=True)
class Dense(Codec):
    """Exact tokens in the layer's dtype, 8 itemsize bits a value. A NaN stays one."""

    @property
    def roles(self) -> dict[str, Role]:
        return {"x": "payload"}

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        return CodecState({"x": jnp.zeros((batch, heads, slots, head_dim), dtype)}, {})

    def quantise(self, params: Any, fixed: dict[str, Array], x: Array, valid: Array) -> dict[str, Array]:
        del params, fixed, valid
        return {"x": x}

    def decode(self, params: Any, state: CodecState) -> Array:
        del params
        return state.slots["x"].astype(jnp.float32)
