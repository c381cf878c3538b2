"""The op for NVIDIA GPUs through Pallas-Triton (deprecated in JAX since 0.11, hence a file of its own).

A row is cut in *pieces*, short runs of coordinates that lie side by side in the memory. A program
hashes one (row, member, piece) triple a thread, in registers, then reads or adds the pieces whole. A
lookup is a bag of one member, so two kernels serve four ops. What they touch besides the memory are
ids, weights, and one row a lookup or bag; no base, and no row of a member, is ever written down.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hashml_kernels import bits
from hashml_kernels.annotations import Array, Float
from hashml_kernels.hash_gather.geometry import BlockGeometry, block_bases, block_signs
from hashml_kernels.manual_axes import varying_alike

_WARPS = 4
_THREADS = 32 * _WARPS
_GATHER_LANES = 32
# Pallas offers atomics with acquire-release order only, at which a warp waits for its earlier ones. Many
# short threads hide that wait better than few long ones.
_SCATTER_LANES = 8

_DTYPES = ("float32", "bfloat16", "float16")


def check(op: str, *operands: Any, geometry: BlockGeometry) -> None:
    """Returns if the kernels serve these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for ids in limbs, no ids at all, or float64.
    """
    values, ids, *weights = operands
    if isinstance(ids, bits.Limbs):
        raise NotImplementedError("ids are bits.Limbs; the Triton kernels take ids of 32 bits")
    names = "memory" if op.startswith("gather") else "gradients", "weights"
    for name, array in zip(names, (values, *weights), strict=False):
        if array is not None and array.dtype not in _DTYPES:
            raise NotImplementedError(f"{name} has dtype {array.dtype}; the Triton kernels take {_DTYPES}")
    if 0 in ids.shape:
        raise NotImplementedError(f"ids has shape {ids.shape}; the Triton kernels take at least one id")


class _Tile(NamedTuple):
    """What one program works on; all sizes are powers of two, as Triton wants."""

    rows: int
    members: int
    pieces: int
    lanes: int
    pieces_per_block: int

    def columns(self, geometry: BlockGeometry) -> int:
        """Programs side by side that cover a row."""
        return pl.cdiv(geometry.blocks * self.pieces_per_block, self.pieces)


def _tile(geometry: BlockGeometry, members: int, lanes: int) -> _Tile:
    """As many triples as threads: then no two threads compute the same hash."""
    run = min(geometry.block_size, geometry.features)
    lanes = min(pl.next_power_of_2(run), lanes)
    per_block = pl.cdiv(run, lanes)
    pieces = min(pl.next_power_of_2(geometry.blocks * per_block), _THREADS)
    members = min(pl.next_power_of_2(members), _THREADS // pieces)
    return _Tile(_THREADS // (pieces * members), members, pieces, lanes, per_block)


# --- inside the kernels; axes are [rows, members, pieces, lanes] ----------------------------------


def _columns(geometry: BlockGeometry, tile: _Tile, program: Any) -> tuple[Any, Any, Any]:
    """The block of each piece, and for its lanes the place inside the block and the column of the row.

    A lane without a coordinate gets the column ``features``, which is out of bounds and masked.
    """
    piece = program * tile.pieces + jnp.arange(tile.pieces, dtype=jnp.int32)
    block = piece // tile.pieces_per_block
    inside = (piece % tile.pieces_per_block * tile.lanes)[:, None] + jnp.arange(tile.lanes, dtype=jnp.int32)
    column = block[:, None] * geometry.block_size + inside
    exists = (inside < geometry.block_size) & (column < geometry.features)
    return block, inside, jnp.where(exists, column, geometry.features)


def _slots(geometry: BlockGeometry, ids: Any, block: Any, inside: Any) -> Any:
    """Slots ``[rows, members, pieces, lanes]`` of the memory, int32; uint32 on the way: no overflow."""
    base = block_bases(geometry, ids[:, :, None], block.astype(jnp.uint32))
    slot = base[:, :, :, None] + inside.astype(jnp.uint32)
    if geometry.may_wrap:
        slot = jnp.where(slot >= jnp.uint32(geometry.budget), slot - jnp.uint32(geometry.budget), slot)
    return slot.astype(jnp.int32)


def _signed(geometry: BlockGeometry, values: Any, ids: Any, block: Any, column: Any) -> Any:
    if geometry.sign == "none":
        return values
    place = (block * geometry.block_size)[:, None] if geometry.sign == "block" else column
    negative = block_signs(geometry, ids[:, :, None, None], place.astype(jnp.uint32))
    return jnp.where(jnp.broadcast_to(negative, values.shape) != 0, -values, values)


def _load_members(ids: Any, weights: Any, row: Any, member: Any) -> tuple[Any, Any, Any]:
    """Ids and weights ``[rows, members]`` of a tile, and which of them exist."""
    shape = (row.size, member.size)
    row, member = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(member[None, :], shape)
    exists = (row < ids.shape[0]) & (member < ids.shape[1])
    words = plt.load(ids.at[row, member], mask=exists, other=jnp.uint32(0))
    if weights is None:
        return words, None, exists
    loaded = plt.load(weights.at[row, member], mask=exists, other=jnp.zeros((), weights.dtype))
    return words, loaded.astype(jnp.float32)[:, :, None, None], exists


def _row_index(row: Any, column: Any) -> tuple[Any, Any]:
    shape = (row.size, *column.shape)
    return jnp.broadcast_to(row[:, None, None], shape), jnp.broadcast_to(column[None], shape)


def _gather_kernel(geometry: BlockGeometry, tile: _Tile, weighted: bool) -> Callable[..., None]:
    def hash_gather_bag(memory, ids, *rest):
        weights, out = rest if weighted else (None, *rest)
        row = pl.program_id(0) * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
        block, inside, column = _columns(geometry, tile, pl.program_id(1))

        def read(step):
            member = jnp.int32(step) * tile.members + jnp.arange(tile.members, dtype=jnp.int32)
            words, scale, exists = _load_members(ids, weights, row, member)
            mask = exists[:, :, None, None] & (column < geometry.features)
            slot = _slots(geometry, words, block, inside)
            values = plt.load(memory.at[slot], mask=mask, other=jnp.zeros((), memory.dtype))
            values = _signed(geometry, values.astype(jnp.float32), words, block, column)
            return values if scale is None else values * scale

        steps = pl.cdiv(ids.shape[1], tile.members)
        total = read(0)
        if steps > 1:
            total = jax.lax.fori_loop(1, steps, lambda step, total: total + read(step), total)
        total = total.sum(axis=1) if tile.members > 1 else total.reshape(tile.rows, tile.pieces, tile.lanes)
        index = _row_index(row, column)
        mask = (index[0] < ids.shape[0]) & (index[1] < geometry.features)
        plt.store(out.at[index], total.astype(out.dtype), mask=mask)

    return hash_gather_bag


def _scatter_kernel(geometry: BlockGeometry, tile: _Tile, weighted: bool, interpret: bool) -> Callable[..., None]:
    def hash_scatter_bag(gradients, ids, *rest):
        weights, _, memory = rest if weighted else (None, *rest)
        columns = tile.columns(geometry)
        row = pl.program_id(0) * tile.rows + jnp.arange(tile.rows, dtype=jnp.int32)
        member = pl.program_id(1) // columns * tile.members + jnp.arange(tile.members, dtype=jnp.int32)
        block, inside, column = _columns(geometry, tile, pl.program_id(1) % columns)
        words, scale, exists = _load_members(ids, weights, row, member)
        index = _row_index(row, column)
        loaded = (index[0] < ids.shape[0]) & (index[1] < geometry.features)
        values = plt.load(gradients.at[index], mask=loaded, other=jnp.zeros((), gradients.dtype))
        slot = _slots(geometry, words, block, inside)
        values = jnp.broadcast_to(values.astype(jnp.float32)[:, None], slot.shape)
        values = _signed(geometry, values, words, block, column)
        if scale is not None:
            values = values * scale
        mask = jnp.broadcast_to(exists[:, :, None, None] & (column < geometry.features), slot.shape)
        if interpret:  # the interpreter's atomics know no masks, and keep one of several adds to a slot
            memory[...] = memory[...].at[slot].add(jnp.where(mask, values, 0.0))
        else:
            plt.atomic_add(memory, slot, values, mask=mask)

    return hash_scatter_bag


# --- the ops --------------------------------------------------------------------------------------


def gather(
    memory: Float[Array, " budget"],
    ids: bits.Words,
    geometry: BlockGeometry,
    *,
    interpret: bool = False,
) -> Float[Array, "n features"]:
    """Rows ``ids`` of the virtual table.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("gather", memory, ids, geometry=geometry)
    return gather_bag(memory, ids[:, None], None, geometry, interpret=interpret)


def scatter(
    gradients: Float[Array, "n features"],
    ids: bits.Words,
    geometry: BlockGeometry,
    *,
    interpret: bool = False,
) -> Float[Array, " budget"]:
    """The transpose of `gather`, added up by float32 atomics: equal sums may differ in the last bits.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("scatter", gradients, ids, geometry=geometry)
    return scatter_bag(gradients, ids[:, None], None, geometry, interpret=interpret)


def gather_bag(
    memory: Float[Array, " budget"],
    ids: bits.Words,
    weights: Float[Array, "n members"] | None,
    geometry: BlockGeometry,
    *,
    interpret: bool = False,
) -> Float[Array, "n features"]:
    """Weighted sums of rows over the members of each bag, added up in float32.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("gather_bag", memory, ids, weights, geometry=geometry)
    n, members = ids.shape
    tile = _tile(geometry, members, _GATHER_LANES)
    operands, kind = varying_alike(memory, ids, *(() if weights is None else (weights,)))
    return pl.pallas_call(
        _gather_kernel(geometry, tile, weights is not None),
        grid=(pl.cdiv(n, tile.rows), tile.columns(geometry)),
        out_shape=jax.ShapeDtypeStruct((n, geometry.features), memory.dtype, manual_axis_type=kind),
        compiler_params=plt.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
    )(*operands)


def scatter_bag(
    gradients: Float[Array, "n features"],
    ids: bits.Words,
    weights: Float[Array, "n members"] | None,
    geometry: BlockGeometry,
    *,
    interpret: bool = False,
) -> Float[Array, " budget"]:
    """The transpose of `gather_bag` in the memory, float32; bags are never spread to their members.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("scatter_bag", gradients, ids, weights, geometry=geometry)
    n, members = ids.shape
    tile = _tile(geometry, members, _SCATTER_LANES)
    zeros = jnp.zeros(geometry.budget, jnp.float32)
    operands, kind = varying_alike(gradients, ids, *(() if weights is None else (weights,)), zeros)
    return pl.pallas_call(
        _scatter_kernel(geometry, tile, weights is not None, interpret),
        grid=(pl.cdiv(n, tile.rows), tile.columns(geometry) * pl.cdiv(members, tile.members)),
        out_shape=jax.ShapeDtypeStruct((geometry.budget,), jnp.float32, manual_axis_type=kind),
        input_output_aliases={len(operands) - 1: 0},
        compiler_params=plt.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
    )(*operands)
