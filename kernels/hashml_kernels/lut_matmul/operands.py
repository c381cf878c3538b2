"""What all backends are handed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from hashml_kernels.annotations import Array
from hashml_kernels.lut_matmul.layout import Layout


class Operands(NamedTuple):
    """Arrays of the op: M inputs, and a matrix of G groups a row.

    Attributes:
        x: ``[M, in]``, any float dtype.
        codes: uint8 ``[out, row_bytes]``.
        tables: ``[out, G, 2**bits]``, or None.
        scales, zeros: ``[out, G]``, or None where there are tables.
    """

    x: Array
    codes: Array
    tables: Array | None
    scales: Array | None
    zeros: Array | None

    @property
    def grids(self) -> tuple[Any, ...]:
        """What says which numbers the codes are."""
        return tuple(array for array in (self.tables, self.scales, self.zeros) if array is not None)

    @property
    def groups(self) -> int:
        return self.grids[0].shape[1]


class Tiles(NamedTuple):
    """Bytes of a plane in tiles of ``size``, and the groups that the codes of a tile belong to."""

    own: Layout
    groups: int
    size: int

    @property
    def run(self) -> int:
        """Columns of a group."""
        return self.own.count // self.groups

    @property
    def number(self) -> int:
        """Tiles of a plane."""
        return -(-self.own.width // self.size)

    @property
    def whole(self) -> bool:
        """Whether tiles and slots are full, and nothing has to be masked."""
        return self.own.width % self.size == 0 and self.own.count == self.own.slots * self.own.width

    @property
    def aligned(self) -> bool:
        """Whether all codes of a tile that lie in one slot belong to one group."""
        slots_begin = self.own.slots == 1 or self.own.width % self.size == 0
        return self.groups == 1 or (slots_begin and self.run % self.size == 0)

    def groups_of(self, slot: int, first: int, size: int) -> range:
        """Groups of the columns from byte ``first`` of a slot."""
        begin = slot * self.own.width + first
        end = min(begin + size, (slot + 1) * self.own.width, self.own.count)
        return range(begin // self.run, (end - 1) // self.run + 1 if end > begin else begin // self.run)


def slot_of(planes: Sequence[Any], own: Layout, slot: int) -> Any:
    """Codes of a slot from a tile of each plane, int32: `layout.slot_codes` for values inside a kernel."""
    if own.bits == 8:
        return planes[0]
    if own.bits != 3:
        return (planes[0] >> (own.bits * slot)) & (2**own.bits - 1)
    low = (planes[slot // 4] >> (2 * (slot % 4))) & 3
    return low | (((planes[2] >> slot) & 1) << 2)
