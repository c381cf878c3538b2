"""What the backends know of tiles besides their runs: the positions that signs are hashed from."""

from typing import Any

import numpy as np

from hashml_kernels import bits
from hashml_kernels.hashed_matmul.geometry import TileGeometry, sign_bits


def first_positions(geometry: TileGeometry, number: bits.Words) -> bits.Limbs:
    """Flat position of the first weight of tile ``number``, counted row by row.

    Where all weights of W share it, the high limb is a NumPy scalar, and hashing it costs nothing at run time.
    """
    offset, size = bits.split64(geometry.offset), np.uint32(geometry.tile_size)
    if _one_high_limb(geometry):
        with np.errstate(over="ignore"):
            return bits.Limbs(offset.hi[()], bits.multiply_low(number, size) + offset.lo)
    return bits.add64(offset, bits.multiply32(number, size))


def signs(geometry: TileGeometry, first: bits.Limbs, inside: bits.Words) -> bits.Words:
    """Sign bits of the weights ``inside`` of the tiles whose `first_positions` are given; they broadcast."""
    if geometry.sign == "element" and _one_high_limb(geometry):
        with np.errstate(over="ignore"):
            return bits.sign_bit(bits.Limbs(first.hi, first.lo + inside), geometry.seed)
    return sign_bits(geometry, first, inside)


def _one_high_limb(geometry: TileGeometry) -> bool:
    return geometry.offset >> 32 == (geometry.offset + geometry.positions - 1) >> 32


def across(size: int, step: int) -> int:
    """How many steps cover ``size``."""
    return -(-size // step)


def number_of(geometry: TileGeometry, row: Any, column: Any) -> bits.Words:
    """Number of the tile in row ``row`` and column ``column`` of the grid."""
    return bits.as_words(row) * np.uint32(geometry.grid[1]) + bits.as_words(column)
