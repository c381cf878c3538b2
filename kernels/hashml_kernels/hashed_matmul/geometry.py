"""Where the tiles of a virtual matrix lie in the shared memory.

A matrix W of ``rows x columns`` (inputs x outputs) is cut in tiles of ``bk x bn``. Tiles are numbered row by
row, and the weights inside a tile row by row, so that every weight has a flat position in the model:

    X(k, n) = offset + tile(k // bk, n // bn) * bk * bn + (k mod bk) * bn + n mod bn

``map="tile"`` (ROAST) puts every tile at a hashed place of the circular memory. ``map="fold"`` (RANDOMFOLD)
cuts the positions of the whole model in partitions as long as the memory and rotates each:

    tile:  slot(X) = (h(first position of X's tile) + place in the tile) mod budget
    fold:  slot(X) = (u(X // budget) + X mod budget) mod budget

so that a fold loads every slot alike, and is one to one where the model fits the memory. Tiles at the edge are
cut; they own all their positions. A geometry is part of a trained model: it must be saved with the memory, and
changing any field, the tile's shape included, changes every weight.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import numpy as np

from hashml_kernels import bits

TileMap = Literal["tile", "fold"]
TileSign = Literal["none", "tile", "element"]

_FIRST_STREAM, _SECOND_STREAM = 3, 4
_P31 = np.uint32(bits.P31)
_MOST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class TileGeometry:
    """The map from a weight of W to a slot of the memory, and its sign.

    Attributes:
        budget: weights in the memory.
        rows, columns: shape of W, inputs by outputs.
        tile: rows and columns of a tile, ``(bk, bn)``.
        map: ``"tile"`` or ``"fold"``.
        seed: picks the hash function; one for a whole model.
        sign: no signs, one a tile, or one an element.
        offset: positions that the modules before this one own in the model.
        align: tiles (of a fold: partitions) start at multiples of it. Where it is a multiple of the tile's
            size every tile is one aligned run (`aligned`), which the TPU needs.

    Raises:
        TypeError: where a size is no int.
        ValueError: where a field is out of its range.
    """

    budget: int
    rows: int
    columns: int
    tile: tuple[int, int] = (32, 32)
    map: TileMap = "tile"
    seed: int = 0
    sign: TileSign = "element"
    offset: int = 0
    align: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.tile, (tuple, list)) or len(self.tile) != 2:
            raise TypeError(f"tile is {self.tile!r}; it must be a pair of ints, rows by columns")
        sizes = {"tile[0]": self.tile[0], "tile[1]": self.tile[1]}
        sizes |= {name: getattr(self, name) for name in ("budget", "rows", "columns", "align")}
        for name, value in (sizes | {"seed": self.seed, "offset": self.offset}).items():
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be an int")
        for name in ("budget", "rows", "columns", "align", "seed", "offset"):
            object.__setattr__(self, name, int(getattr(self, name)))
        object.__setattr__(self, "tile", (int(self.tile[0]), int(self.tile[1])))
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.offset <= 2**63 - 1:
            raise ValueError(f"offset is {self.offset}; it must lie in 0..2**63 - 1")
        if self.budget + self.tile_size > _MOST:
            raise ValueError(f"budget is {self.budget}; with a tile it must stay below 2**31")
        if self.budget < self.tile_size:
            raise ValueError(
                f"budget is {self.budget}; it must hold one tile at least, {self.tile[0]} x {self.tile[1]} = "
                f"{self.tile_size} weights"
            )
        if self.map not in ("tile", "fold"):
            raise ValueError(f"map is {self.map!r}; it must be 'tile' or 'fold'")
        if self.sign not in ("none", "tile", "element"):
            raise ValueError(f"sign is {self.sign!r}; it must be 'none', 'tile' or 'element'")
        if self.budget % self.align:
            raise ValueError(f"align is {self.align}; it must divide budget = {self.budget}")

    @property
    def tile_size(self) -> int:
        """Weights of a tile."""
        return self.tile[0] * self.tile[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along the rows and along the columns of W."""
        return -(-self.rows // self.tile[0]), -(-self.columns // self.tile[1])

    @property
    def positions(self) -> int:
        """Positions that this matrix owns: its tiles' sizes, those at the edge in full."""
        return self.grid[0] * self.grid[1] * self.tile_size

    @property
    def aligned(self) -> bool:
        """Whether every tile is one run that starts at a multiple of the tile's size."""
        whole = self.align % self.tile_size == 0
        return whole and (self.map == "tile" or self.offset % self.tile_size == 0)


class Runs(NamedTuple):
    """Where tiles lie: weight ``t`` of a tile is at ``start + t`` before ``split``, else at ``second + t - split``.

    Both run on circularly from the end of the memory to its head. Only tiles of a fold that cross from one
    partition into the next have a ``split`` below the tile's size. Arrays int32 ``[grid rows, grid columns]``.
    """

    start: np.ndarray
    split: np.ndarray
    second: np.ndarray


@functools.lru_cache(maxsize=256)
def tile_runs(geometry: TileGeometry) -> Runs:
    """The runs of all tiles, computed on the host: one number a tile, not one a weight."""
    hashed = functools.partial(hashed_starts, budget=geometry.budget, align=geometry.align, seed=geometry.seed)
    size, budget = np.uint64(geometry.tile_size), np.uint64(geometry.budget)
    number = np.arange(geometry.grid[0] * geometry.grid[1], dtype=np.uint64).reshape(geometry.grid)
    first = np.uint64(geometry.offset) + number * size
    if geometry.map == "tile":
        start = hashed(bits.split64(first))
        return Runs(start, np.full_like(start, geometry.tile_size), start)
    partition, place = first // budget, first % budget
    left = budget - place
    start = ((hashed(bits.split64(partition)).astype(np.uint64) + place) % budget).astype(np.int32)
    second = hashed(bits.split64(partition + np.uint64(1)))
    return Runs(start, np.minimum(left, size).astype(np.int32), second)


def hashed_starts(keys: bits.Limbs, *, budget: int, align: int, seed: int) -> bits.Words:
    """A uniform multiple of ``align`` below ``budget`` for each 64-bit key, int32: ``h`` and ``u`` above.

    Keys are scrambled before the linear hash: neighbouring tiles, and tiles of modules of one shape, would
    otherwise lie at fixed distances from one another.
    """
    row = bits.scramble(keys)
    assert isinstance(row, bits.Limbs)  # limbs stay limbs
    words = (row.lo & _P31, (row.lo >> np.uint32(31)) | ((row.hi << np.uint32(1)) & _P31), row.hi >> np.uint32(30))
    first = bits.m31(bits.multilinear(seed, _FIRST_STREAM, 3), *words)
    second = bits.m31(bits.multilinear(seed, _SECOND_STREAM, 3), *words)
    start = bits.reduce_m31(first, second, budget // align)
    return bits.multiply_low(start, np.uint32(align)).astype(np.int32)


def fold_rotations(geometry: TileGeometry) -> np.ndarray:
    """``u`` of the partitions that the matrix touches, from that of its ``offset`` on; uint32 on the host."""
    first = geometry.offset // geometry.budget
    last = (geometry.offset + geometry.positions - 1) // geometry.budget
    keys = bits.split64(np.arange(first, last + 1, dtype=np.uint64))
    starts = hashed_starts(keys, budget=geometry.budget, align=geometry.align, seed=geometry.seed)
    return starts.astype(np.uint32)


def tile_positions(geometry: TileGeometry) -> bits.Limbs:
    """Flat position of the first weight of each tile, limbs ``[grid rows, grid columns]`` on the host."""
    number = np.arange(geometry.grid[0] * geometry.grid[1], dtype=np.uint64).reshape(geometry.grid)
    return bits.split64(np.uint64(geometry.offset) + number * np.uint64(geometry.tile_size))


def sign_bits(geometry: TileGeometry, first: bits.Limbs, inside: bits.Words) -> bits.Words:
    """Sign bit, 0 or 1, of weight ``inside`` of the tile whose first weight has position ``first``; they broadcast.

    One an element, or that of the tile's first weight for the whole tile. Meaningless with ``sign="none"``.
    """
    if geometry.sign == "tile":
        return bits.sign_bit(first, geometry.seed)
    return bits.sign_bit(bits.add64(first, bits.Limbs(np.uint32(0), inside)), geometry.seed)
