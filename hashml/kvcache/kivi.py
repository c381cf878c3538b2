"""KIVI: tuning-free asymmetric 2-bit quantisation of the cache (Liu et al., ICML 2024, arXiv 2402.02750).

Keys have a few channels that are large at every token, values have none. Keys are therefore quantised *per
channel*: for each channel, ``group`` consecutive tokens share a scale and a minimum, so that a large channel spoils
only itself. Values are quantised per token in groups of channels, which is `hashml.kvcache.integer.IntGroup`.

    scale[block, d] = (max - min of x over the block's tokens) / (2**bits - 1)
    q[n, d] = round((x[n, d] - min[block, d]) / scale[block, d])

Keys are stored rotated, and ``bits + 32 / group`` bits a value are stored: 3 for the paper's 2 bits in groups of 32.

Departures: here both keys and values leave the exact window in blocks of the layer's ``flush``, while the paper's
values leave one by one and its keys 128 at a time; ``flush = window`` gives the paper's cycle of the keys. A block
that is short of tokens (the end of a prompt) has its scales from those that it has, and never re-quantises what it
holds.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from hashml.coding.bit_packing import pack, packed_size, unpack
from hashml.kvcache.contract import Codec, CodecState, Role, Space
from hashml.kvcache.integer import IntGroup, affine, check_bits_and_group, decode_affine, quantise_affine


@dataclasses.dataclass(frozen=True)
class KiviKeys(Codec):
    """Keys in ``bits`` bits, with scales per channel over blocks of ``group`` tokens.

    A NaN makes its channel NaN at all tokens of its block.

    Attributes:
        bits: of a code, 1 to 8.
        group: consecutive slots that share a channel's scale; the layer's ``flush`` is a multiple of it.

    Raises:
        ValueError: for other values.
    """

    bits: int
    group: int = 32

    def __post_init__(self) -> None:
        check_bits_and_group(self.bits, self.group)

    @property
    def granularity(self) -> int:
        return self.group

    @property
    def space(self) -> Space:
        return "post_rope"

    @property
    def roles(self) -> dict[str, Role]:
        return {"q": "payload", "scale": "scales", "minimum": "scales"}

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        scales = (batch, heads, slots // self.group, head_dim)
        return CodecState(
            {
                "q": jnp.zeros((batch, heads, slots, packed_size(head_dim, self.bits)), jnp.uint8),
                "scale": jnp.zeros(scales, jnp.float16),
                "minimum": jnp.zeros(scales, jnp.float16),
            },
            {},
        )

    def quantise(self, params: Any, fixed: dict[str, Array], x: Array, valid: Array) -> dict[str, Array]:
        del params, fixed
        levels = 2**self.bits - 1
        batch, heads, tokens, width = x.shape
        if tokens % self.group:
            raise ValueError(f"x has {tokens} tokens; they are quantised in blocks of group, {self.group}")
        blocks = x.astype(jnp.float32).reshape(batch, heads, tokens // self.group, self.group, width)
        real = valid.reshape(*blocks.shape[:-1], 1)
        some = real.any(axis=3)
        low = jnp.where(some, jnp.where(real, blocks, jnp.inf).min(axis=3), 0.0)
        high = jnp.where(some, jnp.where(real, blocks, -jnp.inf).max(axis=3), 0.0)
        scale, minimum = affine(low, high, levels)
        codes = quantise_affine(blocks, scale[:, :, :, None], minimum[:, :, :, None], levels)
        return {"q": pack(codes.reshape(x.shape), self.bits), "scale": scale, "minimum": minimum}

    def decode(self, params: Any, state: CodecState) -> Array:
        del params
        packed, scale, minimum = (state.slots[name] for name in ("q", "scale", "minimum"))
        batch, heads, slots, _ = packed.shape
        width = scale.shape[-1]
        codes = unpack(packed, self.bits, width).reshape(batch, heads, slots // self.group, self.group, width)
        decoded = decode_affine(codes, scale[:, :, :, None], minimum[:, :, :, None])
        return decoded.reshape(batch, heads, slots, width)


def kivi(bits: int, group: int = 32) -> tuple[KiviKeys, IntGroup]:
    """The paper's pair: ``key_codec`` and ``value_codec`` of a layer with ``rope="write"``."""
    return KiviKeys(bits, group), IntGroup(bits, group)
