"""Codes of b bits in b bits: a row of n codes is a stream of ``ceil(n b / 8)`` bytes, whatever b from 1 to 16.

Code ``i`` lies in bits ``i b .. i b + b - 1`` of its row, the lowest bit first, and bit ``k`` of the stream is bit
``k mod 8`` of byte ``k // 8``. After ``8 / gcd(8, b)`` codes the pattern begins anew at a byte, so both directions
are a few shifts a byte, and no bit is ever an array element of its own. For b of 1, 2 and 4 this is the usual
nibble packing, for 8 and 16 a copy, and 10-bit codes take four to five bytes. Bits that a last byte has left are
zero.
"""

import math

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Integer, UInt8


def packed_size(count: int, bits: int) -> int:
    """Bytes of a row of ``count`` codes.

    Raises:
        ValueError: if ``bits`` is not in 1..16, or ``count`` is negative.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits is {bits}; a code has 1 to 16")
    if count < 0:
        raise ValueError(f"count is {count}; a number of codes is not negative")
    return -(-count * bits // 8)


def code_dtype(bits: int) -> DTypeLike:
    """The narrowest unsigned type that holds a code: uint8 up to 8 bits, else uint16."""
    packed_size(0, bits)
    return jnp.uint8 if bits <= 8 else jnp.uint16


def pack(codes: Integer[Array, "*batch n"], bits: int) -> UInt8[Array, "*batch m"]:
    """Codes below ``2**bits`` as ``m = packed_size(n, bits)`` bytes a row; higher bits of a code are cut off.

    Raises:
        ValueError: if ``bits`` is not in 1..16.
    """
    n = codes.shape[-1]
    size = packed_size(n, bits)
    codes_a_period, bytes_a_period = 8 // math.gcd(8, bits), bits // math.gcd(8, bits)
    codes = codes.astype(jnp.uint32) & jnp.uint32(2**bits - 1)
    short = -n % codes_a_period
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    period = codes.reshape(*codes.shape[:-1], (n + short) // codes_a_period, codes_a_period)
    packed = [
        _overlay([(period[..., i], i * bits - 8 * byte) for i in range(codes_a_period) if _overlap(i, byte, bits)])
        for byte in range(bytes_a_period)
    ]
    stream = jnp.stack(packed, axis=-1).astype(jnp.uint8)
    return stream.reshape(*stream.shape[:-2], stream.shape[-2] * bytes_a_period)[..., :size]


def unpack(packed: UInt8[Array, "*batch m"], bits: int, count: int) -> Integer[Array, "*batch {count}"]:
    """The first ``count`` codes of each row, as `code_dtype`.

    Raises:
        ValueError: if ``bits`` is not in 1..16, or a row has not ``packed_size(count, bits)`` bytes.
    """
    m = packed.shape[-1]
    if m != packed_size(count, bits):
        raise ValueError(
            f"packed has rows of {m} bytes; {count} codes of {bits} bits take {packed_size(count, bits)}"
        )
    codes_a_period, bytes_a_period = 8 // math.gcd(8, bits), bits // math.gcd(8, bits)
    short = -m % bytes_a_period
    stream = jnp.pad(packed.astype(jnp.uint32), [(0, 0)] * (packed.ndim - 1) + [(0, short)])
    period = stream.reshape(*stream.shape[:-1], (m + short) // bytes_a_period, bytes_a_period)
    codes = [
        _overlay([(period[..., b], 8 * b - i * bits) for b in range(bytes_a_period) if _overlap(i, b, bits)])
        for i in range(codes_a_period)
    ]
    row = (jnp.stack(codes, axis=-1) & jnp.uint32(2**bits - 1)).astype(code_dtype(bits))
    return row.reshape(*row.shape[:-2], row.shape[-2] * codes_a_period)[..., :count]


def _overlap(code: int, byte: int, bits: int) -> bool:
    return code * bits < 8 * (byte + 1) and 8 * byte < (code + 1) * bits


def _overlay(parts: list[tuple[Array, int]]) -> Array:
    """The bitwise or of uint32 words, each shifted to the left, or by a negative number to the right."""
    whole = jnp.zeros_like(parts[0][0])
    for word, shift in parts:
        whole |= word << jnp.uint32(shift) if shift >= 0 else word >> jnp.uint32(-shift)
    return whole
