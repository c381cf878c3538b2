"""Codes of 1, 2, 3, 4 or 8 bits in exactly so many, in an order that a kernel unpacks by shifts alone.

A row of n codes is cut into ``slots`` runs of ``width = ceil(n / slots)``; column c is number ``c % width`` of slot
``c // width``. Byte k of a row holds code k of every slot, slot s in bits ``s bits ..``: unpacking byte k gives one
column of each run, and whole runs meet whole slices of the inputs, where neighbours in a byte would have to be dealt
out over lanes. There are ``8 / bits`` slots. 3 bits take 8 slots in three planes of ``width`` bytes each:

    plane 0:  the two low bits of slots 0..3      plane 1:  those of slots 4..7      plane 2:  the high bit of all 8

A row so takes ``planes * width`` bytes: n bits / 8, and less than 3 bytes more where the slots do not divide n.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array

BITS = (1, 2, 3, 4, 8)


class Layout(NamedTuple):
    """How rows of ``count`` codes lie in bytes."""

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    bits: int
    slots: int
    width: int
    """Codes of a slot, and bytes of a plane."""
    planes: int

    @property
    def row_bytes(self) -> int:
        return self.planes * self.width


def layout(count: int, bits: int) -> Layout:
    """The layout of rows of ``count`` codes.

    Raises:
        ValueError: if ``bits`` is not one of `BITS`, or there is no code.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; allowed are {', '.join(map(str, BITS))}")
    if count < 1:
        raise ValueError(f"count is {count}; a row has at least one code")
    slots = 8 if bits == 3 else 8 // bits
    return Layout(count, bits, slots, -(-count // slots), 3 if bits == 3 else 1)


def pack_codes(codes: Array | np.ndarray, bits: int) -> Array:
    """Integer codes ``[..., n]`` below ``2**bits`` as bytes ``[..., row_bytes]``; higher bits are cut off."""
    codes = jnp.asarray(codes)
    own = layout(codes.shape[-1], bits)
    short = own.slots * own.width - own.count
    codes = codes.astype(jnp.uint8) & jnp.uint8(2**bits - 1)
    runs = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    runs = runs.reshape(*codes.shape[:-1], own.slots, own.width)
    if bits != 3:
        return _overlay(runs, bits)
    low, high = runs & 3, runs >> 2
    planes = (_overlay(low[..., :4, :], 2), _overlay(low[..., 4:, :], 2), _overlay(high, 1))
    return jnp.concatenate(planes, axis=-1)


def unpack_codes(packed: Array | np.ndarray, bits: int, count: int) -> Array:
    """The ``count`` codes of each row, uint8 ``[..., count]``.

    Raises:
        ValueError: if a row has not ``row_bytes`` bytes.
    """
    packed = jnp.asarray(packed)
    own = layout(count, bits)
    if packed.shape[-1] != own.row_bytes:
        raise ValueError(
            f"packed has rows of {packed.shape[-1]} bytes; {count} codes of {bits} bits take {own.row_bytes}"
        )
    planes = packed.astype(jnp.uint8).reshape(*packed.shape[:-1], own.planes, own.width)
    runs = jnp.stack([slot_codes(planes, own, slot) for slot in range(own.slots)], axis=-2)
    return runs.reshape(*packed.shape[:-1], own.slots * own.width)[..., :count]


def slot_codes(planes: Array, own: Layout, slot: int) -> Array:
    """Codes of one slot from planes ``[..., planes, width]``: the definition that kernels follow."""
    if own.bits != 3:
        return planes[..., 0, :] >> (own.bits * slot) & (2**own.bits - 1)
    low = planes[..., slot // 4, :] >> (2 * (slot % 4)) & 3
    return low | (planes[..., 2, :] >> slot & 1) << 2


def _overlay(runs: Array, bits: int) -> Array:
    """Bytes ``[..., width]`` from runs ``[..., slots, width]``."""
    whole = jnp.zeros_like(runs[..., 0, :])
    for slot in range(runs.shape[-2]):
        whole |= runs[..., slot, :] << (bits * slot)
    return whole
