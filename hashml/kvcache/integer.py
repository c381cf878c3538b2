"""Plain quantisation of keys and values: int8 and fp8 with a scale a token and head, int2..8 in groups of channels.

    Int8           scale = max|x| / 127                          q = round(x / scale)
    Float8         scale = max|x| / 448                          q = e4m3(x / scale)
    IntGroup       scale = (max - min) / (2**bits - 1)           q = round((x - min) / scale)

Each token is on its own: its scales are over its own channels, so a slot can be replaced without touching others.
This is what serving systems do (MaxText, vLLM, the quantised caches of transformers), and with groups of 32
channels also the values of KIVI. Scales are stored in float16 and quantisation uses them *as stored*, so the codes
of a decoded token are its codes, and no error exceeds half a scale (as long as the scale is no subnormal float16,
of 6e-5 and less).

Departures: qmax is 127 and not 127.5, which leans on saturation; codes below 8 bits are packed by hand, since int4
arrays need not be packed in memory. A minimum is rounded to float16 so that both promises hold, see `affine`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16

from hashml.coding.bit_packing import pack, packed_size, unpack
from hashml.kvcache.contract import Codec, CodecState, Role

_HALF_MAX = 65504.0
"""The largest finite float16."""


def half(x: Float[Array, "*n"]) -> Float16[Array, "*n"]:
    """The nearest finite float16."""
    return jnp.clip(x.astype(jnp.float32), -_HALF_MAX, _HALF_MAX).astype(jnp.float16)


def divide(x: Float[Array, "*n"], scale: Float16[Array, "*#n"]) -> Float[Array, "*n"]:
    """``x / scale`` in float32, and 0 where the scale is 0: a group of one value needs no codes."""
    scale = scale.astype(jnp.float32)
    return jnp.where(scale > 0, x / jnp.where(scale > 0, scale, 1.0), 0.0)


def affine(
    low: Float[Array, "*n"], high: Float[Array, "*n"], levels: int
) -> tuple[Float16[Array, "*n"], Float16[Array, "*n"]]:
    """``(scale, minimum)`` in float16 of ``levels + 1`` codes from ``low`` to ``high``.

    A minimum between two float16 numbers is rounded down, so that no value lies below it; but up where ``low`` would
    be decoded as that upper number or more (a large offset of a small range). Quantising what was decoded then finds
    the same minimum again, and the error stays within half a scale and half a step of the minimum over ``levels``.
    """
    low, high = (jnp.clip(x.astype(jnp.float32), -_HALF_MAX, _HALF_MAX) for x in (low, high))
    nearest = low.astype(jnp.float16)
    below = jnp.where(nearest > low, jnp.nextafter(nearest, jnp.float16(-jnp.inf)), nearest)
    above = jnp.nextafter(below, jnp.float16(jnp.inf))
    scale = half((high - below.astype(jnp.float32)) / levels)
    decoded = below + jnp.round(divide(low - below, scale)) * scale.astype(jnp.float32)
    minimum = jnp.where((decoded >= above) & jnp.isfinite(above), above, below)
    scale = half(jnp.maximum(high - minimum.astype(jnp.float32), 0.0) / levels)
    return scale, minimum


def quantise_affine(x: Float[Array, "*n"], scale: Float16[Array, "*#n"], minimum: Float16[Array, "*#n"], levels: int):
    """Codes 0..levels, uint8."""
    return jnp.clip(jnp.round(divide(x.astype(jnp.float32) - minimum, scale)), 0, levels).astype(jnp.uint8)


def decode_affine(codes: Array, scale: Float16[Array, "*#n"], minimum: Float16[Array, "*#n"]) -> Float[Array, "*n"]:
    """``minimum + codes scale``, float32."""
    return minimum.astype(jnp.float32) + codes.astype(jnp.float32) * scale.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Int8(Codec):
    """Symmetric int8 with a float16 scale a token and head: ``8 + 16 / D`` bits a value.

    A NaN makes the scale one, and so all values of its token and head.
    """

    @property
    def roles(self) -> dict[str, Role]:
        return {"q": "payload", "scale": "scales"}

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        return _scaled_store(batch, heads, slots, head_dim, jnp.int8)

    def quantise(self, params: Any, fixed: dict[str, Array], x: Array, valid: Array) -> dict[str, Array]:
        del params, fixed, valid
        x = x.astype(jnp.float32)
        scale = half(jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127)
        return {"q": jnp.clip(jnp.round(divide(x, scale)), -127, 127).astype(jnp.int8), "scale": scale}

    def decode(self, params: Any, state: CodecState) -> Array:
        del params
        return state.slots["q"].astype(jnp.float32) * state.slots["scale"].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Float8(Codec):
    """fp8 of 4 exponent and 3 mantissa bits (e4m3, no infinities) with a float16 scale a token and head.

    As many bits as `Int8`; small coordinates beside a large one keep their relative precision. A NaN spoils its token
    and head, as there.
    """

    @property
    def roles(self) -> dict[str, Role]:
        return {"q": "payload", "scale": "scales"}

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        return _scaled_store(batch, heads, slots, head_dim, jnp.float8_e4m3fn)

    def quantise(self, params: Any, fixed: dict[str, Array], x: Array, valid: Array) -> dict[str, Array]:
        del params, fixed, valid
        x = x.astype(jnp.float32)
        scale = half(jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 448)
        # Beyond 464 the type has no number but NaN.
        return {"q": jnp.clip(divide(x, scale), -448, 448).astype(jnp.float8_e4m3fn), "scale": scale}

    def decode(self, params: Any, state: CodecState) -> Array:
        del params
        return state.slots["q"].astype(jnp.float32) * state.slots["scale"].astype(jnp.float32)


def _scaled_store(batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
    shape = (batch, heads, slots)
    return CodecState({"q": jnp.zeros((*shape, head_dim), dtype), "scale": jnp.zeros((*shape, 1), jnp.float16)}, {})


@dataclasses.dataclass(frozen=True)
class IntGroup(Codec):
    """Asymmetric integers, a float16 scale and minimum for every ``group`` channels of a token.

    ``bits + 32 / group`` bits a value: 4.25 for 4 bits in groups of 128, 3 for 2 bits in groups of 32. A NaN makes
    all values of its group NaN.

    Attributes:
        bits: of a code, 1 to 8.
        group: neighbouring channels that share a scale; they divide the head's width.

    Raises:
        ValueError: for other values.
    """

    bits: int
    group: int = 32

    def __post_init__(self) -> None:
        check_bits_and_group(self.bits, self.group)

    @property
    def roles(self) -> dict[str, Role]:
        return {"q": "payload", "scale": "scales", "minimum": "scales"}

    def check(self, head_dim: int) -> None:
        if head_dim % self.group:
            raise ValueError(f"group is {self.group}; it must divide the head's width, {head_dim}")

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        shape = (batch, heads, slots)
        scales = (*shape, head_dim // self.group)
        return CodecState(
            {
                "q": jnp.zeros((*shape, packed_size(head_dim, self.bits)), jnp.uint8),
                "scale": jnp.zeros(scales, jnp.float16),
                "minimum": jnp.zeros(scales, jnp.float16),
            },
            {},
        )

    def quantise(self, params: Any, fixed: dict[str, Array], x: Array, valid: Array) -> dict[str, Array]:
        del params, fixed, valid
        levels = 2**self.bits - 1
        grouped = x.reshape(*x.shape[:-1], x.shape[-1] // self.group, self.group)
        scale, minimum = affine(grouped.min(axis=-1), grouped.max(axis=-1), levels)
        codes = quantise_affine(grouped, scale[..., None], minimum[..., None], levels)
        return {"q": pack(codes.reshape(x.shape), self.bits), "scale": scale, "minimum": minimum}

    def decode(self, params: Any, state: CodecState) -> Array:
        del params
        scale, minimum = state.slots["scale"], state.slots["minimum"]
        width = scale.shape[-1] * self.group
        codes = unpack(state.slots["q"], self.bits, width).reshape(*scale.shape, self.group)
        return decode_affine(codes, scale[..., None], minimum[..., None]).reshape(*scale.shape[:-1], width)


def check_bits_and_group(bits: int, group: int) -> None:
    """Raises ValueError unless ``bits`` is in 1..8 and ``group`` is positive."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; allowed are 1 to 8")
    if group < 1:
        raise ValueError(f"group is {group}; it must be at least 1")
