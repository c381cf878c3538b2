"""Where the weights of a whole model lie in its one memory.

A model is a row of arrays; each owns the positions from its ``offset`` on, and reads

    weight(X) = sign(X) * memory[slot(X)]

    fold      slot of `hashml.sharing.fold`: partitions of the row as long as the memory, rotated; the default
    element   every weight at a slot of its own hash                           (HashedNet, over the whole model)
    block     runs of ``block_size`` weights side by side, at hashed places    (ROBE-Z)
    tile      tiles of ``bk x bn`` of each array seen as a matrix of inputs by outputs, likewise    (ROAST)

Nothing is stored but the memory. One ``seed`` serves all arrays, since positions are never the same.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float, Int

from hashml.sharing.budgets import check_positive
from hashml.sharing.fold import FoldSpan, fold_expand, fold_load
from hashml.sharing.maps import AnyArray
from hashml_kernels import bits, hashed_matmul
from hashml_kernels.hash_gather import BlockGeometry, hash_gather, reference
from hashml_kernels.hashed_matmul.geometry import TileGeometry, tile_runs

ModelMap = Literal["fold", "element", "block", "tile"]
ModelSign = Literal["element", "none"]

_CHUNK = 2**20
"""Weights whose slots are counted at a time."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """The map of a model's weights into ``budget`` slots.

    Attributes:
        budget: weights in the memory.
        map: ``"fold"``, ``"element"``, ``"block"`` or ``"tile"``.
        seed: picks the hash function.
        sign: hashed signs, one an ``"element"``, or ``"none"``.
        block_size: Z, for ``"block"``.
        tile: rows and columns of a tile, for ``"tile"``.

    Raises:
        TypeError: where a size is no int.
        ValueError: for an unknown map or sign, a size below 1, or a budget smaller than a block or tile.
    """

    budget: int
    map: ModelMap = "fold"
    seed: int = 0
    sign: ModelSign = "element"
    block_size: int = 32
    tile: tuple[int, int] = (32, 32)

    def __post_init__(self) -> None:
        if self.map not in ("fold", "element", "block", "tile"):
            raise ValueError(f"map is {self.map!r}; it must be 'fold', 'element', 'block' or 'tile'")
        if self.sign not in ("element", "none"):
            raise ValueError(f"sign is {self.sign!r}; it must be 'element' or 'none'")
        if not isinstance(self.tile, (tuple, list)) or len(self.tile) != 2:
            raise TypeError(f"tile is {self.tile!r}; it must be a pair of ints, rows by columns")
        object.__setattr__(self, "tile", tuple(self.tile))
        check_positive(budget=self.budget, block_size=self.block_size, rows=self.tile[0], columns=self.tile[1])
        if self.budget < self.run:
            raise ValueError(
                f"budget is {self.budget}; with map {self.map!r} it must hold {self.run} weights at least"
            )

    @property
    def run(self) -> int:
        """Weights that lie side by side wherever they are placed."""
        return {"block": self.block_size, "tile": self.tile[0] * self.tile[1]}.get(self.map, 1)

    def positions(self, shape: tuple[int, ...]) -> int:
        """Positions that an array owns: its weights, rounded up to whole blocks or tiles."""
        if self.map == "tile":
            return self._tiles(shape, 0).positions
        size = int(np.prod(shape, dtype=np.int64))
        return -(-size // self.run) * self.run

    def expand(
        self, memory: Float[AnyArray, " budget"], shape: tuple[int, ...], offset: int
    ) -> Float[Array, "*shape"]:
        """An array of ``shape`` whose first weight has position ``offset``; differentiable in the memory."""
        size = int(np.prod(shape, dtype=np.int64))
        if self.map == "fold":
            return fold_expand(memory, offset=offset, size=size, seed=self.seed, sign=self.sign).reshape(shape)
        if self.map == "tile":
            return hashed_matmul.expand(memory, self._tiles(shape, offset)).reshape(shape)
        rows = -(-size // self.run)
        entries = hash_gather(memory, self._row_ids(offset, 0, rows), features=self.run, **self._options())
        return entries.reshape(-1)[:size].reshape(shape)

    def load(self, shape: tuple[int, ...], offset: int) -> Int[np.ndarray, " budget"]:
        """How many weights of such an array each slot serves.

        On the host; of a fold in closed form, else by chunks, so that no array is as long as the model.
        """
        size = int(np.prod(shape, dtype=np.int64))
        if self.map == "fold":
            return fold_load(FoldSpan(self.budget, offset, size, self.seed, self.sign))
        counts = np.zeros(self.budget, np.int64)
        for slots in self._slots(shape, offset, size):
            counts += np.bincount(slots, minlength=self.budget)
        return counts

    def _slots(self, shape: tuple[int, ...], offset: int, size: int) -> Iterator[np.ndarray]:
        if self.map == "tile":
            tiles = self._tiles(shape, offset)
            start = tile_runs(tiles).start.astype(np.int64)
            inside = np.arange(tiles.tile_size).reshape(self.tile)
            for i, j in np.ndindex(*tiles.grid):
                rows, columns = tiles.rows - i * self.tile[0], tiles.columns - j * self.tile[1]
                yield ((start[i, j] + inside[:rows, :columns]) % self.budget).reshape(-1)
            return
        layout = BlockGeometry(self.budget, self.run, self.run, self.seed, self.sign)
        step = max(1, _CHUNK // self.run)
        for first in range(0, -(-size // self.run), step):
            count = min(step, -(-size // self.run) - first)
            slots = np.asarray(reference.slots(self._row_ids(offset, first, count), layout)).reshape(-1)
            yield slots[: size - first * self.run]

    def _tiles(self, shape: tuple[int, ...], offset: int) -> TileGeometry:
        rows, columns = int(np.prod(shape[:-1], dtype=np.int64)), int(shape[-1]) if shape else 1
        return TileGeometry(
            self.budget, rows, columns, tile=self.tile, map="tile", seed=self.seed, sign=self.sign, offset=offset
        )

    def _row_ids(self, offset: int, first: int, count: int) -> bits.Limbs:
        number = np.uint64(offset // self.run + first) + np.arange(count, dtype=np.uint64)
        return bits.split64(number)

    def _options(self) -> dict[str, Any]:
        return {"block_size": self.run, "seed": self.seed, "sign": self.sign}
