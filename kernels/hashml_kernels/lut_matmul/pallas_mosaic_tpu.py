"""The op for TPUs: a step of the grid takes 128 rows of W with all their bytes, and all inputs wait in vector memory.

So every byte of codes is fetched once for up to 512 inputs, and a row's bytes in one piece. Columns lie along the
lanes. A row's tables, turned so that their entries lie along the lanes too, are one register for eight rows: a number
is looked up by a gather along the lanes, its index the code and what the group adds to it, which serves groups that
end anywhere. A chain of choices would take fifteen instructions for 4 bits instead of one. Numbers are rounded to the
dtype of the inputs for the matrix unit.

The gradient of tables gathers a block of ``dy.T x`` in vector memory over all inputs, then looks at its codes: masked
sums by lane, and one sum over lanes for each entry at last.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels.annotations import Array
from hashml_kernels.lut_matmul.layout import Layout
from hashml_kernels.lut_matmul.operands import Operands, Tiles, slot_of
from hashml_kernels.manual_axes import varying_alike

_LANES = 128
_SUBLANES = 32  # rows of a register of bytes
_FLOATS = ("float32", "bfloat16")
_TABLE_BITS = 4
_ROWS = 128  # of W in a step
_GRADIENT_ROWS = (512, 256, 128)
_GRADIENT_BYTES = 24 * 2**20  # of a block of the gradient of W
_INPUTS = 512
_RESIDENT_BYTES = 16 * 2**20  # of vector memory for inputs, and as much again while the next ones are fetched
_LONGEST = 2**16  # columns
_CHUNK = 512  # columns that are multiplied at once
_VECTOR_BYTES = 96 * 2**20  # of the 128 MiB of a v5e or v6e


def check(op: str, operands: Operands, own: Layout) -> None:
    """Returns if the kernels serve these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for tables of 256 entries, inputs other than float32 and bfloat16, empty arrays, very
            long rows, and many groups that share no registers.
    """
    del op  # both serve the same
    if operands.tables is not None and own.bits > _TABLE_BITS:
        raise NotImplementedError(
            f"tables are of {own.bits} bits; the TPU kernels take at most {_TABLE_BITS}; auto uses XLA"
        )
    if str(operands.x.dtype) not in _FLOATS:
        raise NotImplementedError(f"x has dtype {operands.x.dtype}; the TPU kernels take {_FLOATS}; auto uses XLA")
    for name, array in zip(operands._fields, operands, strict=True):
        if array is not None and 0 in array.shape:
            raise NotImplementedError(
                f"{name} has shape {array.shape}; the TPU kernels take no empty arrays; auto uses XLA"
            )
        if array is not None and array.dtype == jnp.float64:
            raise NotImplementedError(f"{name} has dtype float64; the TPU kernels take shorter ones; auto uses XLA")
    if own.count > _LONGEST:
        raise NotImplementedError(
            f"codes have {own.count} columns; the TPU kernels take at most {_LONGEST}; auto uses XLA"
        )
    shape = _Shape.of(operands, own)
    for chunk in shape.chunks():
        lines = {group * shape.entries // _LANES for group in chunk.groups}
        if len(lines) > 1:
            raise NotImplementedError(
                f"tables have {operands.groups} groups of {own.count // operands.groups} columns; the TPU kernels "
                f"take groups whose entries, where {_CHUNK} columns meet them, lie in {_LANES} lanes; auto uses XLA"
            )


class _Chunk(NamedTuple):
    """Columns of one slot, from byte ``first``; ``place`` is where the inputs have them."""

    slot: int
    first: int
    size: int
    place: int
    groups: range


class _Shape(NamedTuple):
    """How arrays lie in vector memory."""

    own: Layout
    groups: int
    entries: int
    """Lanes of a group: entries of its table, or one for its scale."""

    @staticmethod
    def of(operands: Operands, own: Layout) -> "_Shape":
        return _Shape(own, operands.groups, 1 if operands.tables is None else 2**own.bits)

    @property
    def slot_lanes(self) -> int:
        """Lanes of a slot of the inputs."""
        return _up(self.own.width, _LANES)

    @property
    def input_lanes(self) -> int:
        return self.own.slots * self.slot_lanes

    @property
    def byte_lanes(self) -> int:
        """Lanes of a row of bytes: planes that begin inside of a register are read with the next one."""
        begins_inside = self.own.planes > 1 and self.own.width % _LANES
        return _up(self.own.row_bytes, _LANES) + (_LANES if begins_inside else 0)

    @property
    def lines(self) -> int:
        """Registers that a row's tables take."""
        return pl.cdiv(self.groups * self.entries, _LANES)

    def chunks(self) -> Iterator[_Chunk]:
        tiles = Tiles(self.own, self.groups, _CHUNK)
        for slot in range(self.own.slots):
            for first in range(0, self.slot_lanes, _CHUNK):
                size = min(_CHUNK, self.slot_lanes - first)
                groups = tiles.groups_of(slot, first, size)
                if groups:
                    yield _Chunk(slot, first, size, slot * self.slot_lanes + first, groups)


def _up(size: int, step: int) -> int:
    return pl.cdiv(size, step) * step


# --- inside the kernels ---------------------------------------------------------------------------


def _codes(shape: _Shape, chunk: _Chunk, packed: Any, rows: Any) -> Any:
    """Codes of a chunk, int32; those beyond the slot are some codes."""

    def plane(number: int) -> Any:
        begin = number * shape.own.width + chunk.first
        inside = begin % _LANES
        if not inside:
            return packed[rows, begin : begin + chunk.size].astype(jnp.int32)
        begin -= inside
        found = packed[rows, begin : begin + chunk.size + _LANES].astype(jnp.int32)
        return pltpu.roll(found, found.shape[1] - inside, 1)[:, : chunk.size]

    own = shape.own
    if own.planes == 1:
        return slot_of([plane(0)], own, chunk.slot)
    low = plane(chunk.slot // 4)
    return slot_of([low, low, plane(2)], own, chunk.slot)


def _group(shape: _Shape, chunk: _Chunk, like: Any) -> Any:
    """Number of each column's group from the first one of its chunk, int32."""
    begin = chunk.slot * shape.own.width + chunk.first
    column = lax.broadcasted_iota(jnp.int32, like.shape, 1)
    run = shape.own.count // shape.groups
    number = jnp.zeros_like(column)
    for group in chunk.groups[1:]:
        number += jnp.where(column >= group * run - begin, 1, 0)
    return number


def _along_lanes(table: Any, index: Any) -> Any:
    """``table[i, index[i, n]]`` for a table of 128 columns."""
    parts = [index[:, i : i + _LANES] for i in range(0, index.shape[1], _LANES)]
    return jnp.concatenate([jnp.take_along_axis(table, part, axis=1) for part in parts], axis=1)


def _numbers(shape: _Shape, chunk: _Chunk, grids: list[Any], code: Any) -> Any:
    """Numbers of a chunk, float32; beyond the slot, where inputs are zeros, some of the same row."""
    line, first = divmod(chunk.groups[0] * shape.entries, _LANES)
    here = slice(line * _LANES, (line + 1) * _LANES)
    several = len(chunk.groups) > 1
    if shape.entries > 1:
        index = code + first
        if several:
            index += shape.entries * _group(shape, chunk, code)
        return _along_lanes(grids[0][:, here], index)
    if several:
        index = first + _group(shape, chunk, code)
        scale, zero = (_along_lanes(grid[:, here], index) for grid in grids)
    else:
        scale, zero = (grid[:, here][:, first : first + 1] for grid in grids)
    return scale * (code.astype(jnp.float32) - zero)


def _dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _kernel(shape: _Shape, x, packed, *refs) -> None:
    *grids, out, total = refs
    # Entries along the sublanes, as they come, are entries along the lanes.
    grids = [jnp.concatenate([_turned(grid, i) for i in range(shape.lines)], axis=1) for grid in grids]
    total[...] = jnp.zeros_like(total)
    for chunk in shape.chunks():
        code = _codes(shape, chunk, packed, slice(None))
        numbers = _numbers(shape, chunk, grids, code).astype(x.dtype)
        total[...] += _dot(x[:, chunk.place : chunk.place + chunk.size], numbers, (1, 1))
    out[...] = total[...].astype(out.dtype)


def _turned(grid: Any, line: int) -> Any:
    part = grid[line * _LANES : min((line + 1) * _LANES, grid.shape[0])].astype(jnp.float32)
    missing = _LANES - part.shape[0]
    if missing:
        part = jnp.concatenate([part, jnp.zeros((missing, part.shape[1]), jnp.float32)])
    return part.T


def _gradient_kernel(shape: _Shape, x, dy, packed, out, dw) -> None:
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        dw[...] = jnp.zeros_like(dw)

    for chunk in shape.chunks():
        here = slice(chunk.place, chunk.place + chunk.size)
        dw[:, here] += _dot(dy[...], x[:, here], (0, 0))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        lane = lax.broadcasted_iota(jnp.int32, (_SUBLANES, out.shape[1]), 1)

        def some_rows(index: Any, _: Any) -> Any:
            rows = pl.ds(pl.multiple_of(index * _SUBLANES, _SUBLANES), _SUBLANES)
            sums: dict[int, Any] = {}
            for chunk in shape.chunks():
                code = _codes(shape, chunk, packed, rows)
                part = dw[rows, chunk.place : chunk.place + chunk.size]
                group = _group(shape, chunk, code) if len(chunk.groups) > 1 else None
                for number, g in enumerate(chunk.groups):
                    own = part if group is None else jnp.where(group == number, part, 0.0)
                    for entry in range(shape.entries):
                        one = shape.entries == 1
                        chosen = own * code.astype(jnp.float32) if one else jnp.where(code == entry, own, 0.0)
                        place = g * shape.entries + entry
                        sums[place] = sums.get(place, 0.0) + _by_lane(chosen)
            found = jnp.zeros(lane.shape, jnp.float32)
            for place, total in sums.items():
                found = jnp.where(lane == place, jnp.sum(total, axis=1, keepdims=True), found)
            out[rows, :] = found
            return 0

        lax.fori_loop(0, out.shape[0] // _SUBLANES, some_rows, 0)


def _by_lane(x: Any) -> Any:
    """``[rows, columns]`` summed up to ``[rows, 128]``."""
    return functools.reduce(jnp.add, jnp.split(x, x.shape[1] // _LANES, axis=1))


# --- the ops --------------------------------------------------------------------------------------


def _inputs(x: Array, shape: _Shape) -> Array:
    """``[M, input_lanes]``: slots begin at multiples of 128 lanes, and what is none is zero."""
    own = shape.own
    if shape.input_lanes == own.count:
        return x
    x = jnp.pad(x, ((0, 0), (0, own.slots * own.width - own.count)))
    x = x.reshape(-1, own.slots, own.width)
    return jnp.pad(x, ((0, 0), (0, 0), (0, shape.slot_lanes - own.width))).reshape(-1, shape.input_lanes)


def _resident(x: Array) -> int:
    """Inputs that are in vector memory at a time."""
    most = min(_INPUTS, _RESIDENT_BYTES // (x.shape[1] * x.dtype.itemsize)) // _SUBLANES * _SUBLANES
    return x.shape[0] if x.shape[0] <= most else max(most, _SUBLANES)


def _lying(grid: Array) -> Array:
    """``[G entries, out]``, full registers of 16-bit numbers: how XLA stores narrow arrays on a TPU anyway."""
    grid = grid if grid.dtype == jnp.bfloat16 else grid.astype(jnp.float32)
    grid = grid.reshape(grid.shape[0], -1).T
    return jnp.pad(grid, ((0, -grid.shape[0] % 16), (0, 0)))


def multiply(operands: Operands, own: Layout, *, interpret: bool | pltpu.InterpretParams = False) -> Array:
    """``[M, out]`` in the dtype of ``x``.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("multiply", operands, own)
    (operands,), kind = varying_alike(operands)
    shape = _Shape.of(operands, own)
    x, rows = _inputs(operands.x, shape), operands.codes.shape[0]
    grids = [_lying(grid) for grid in operands.grids]
    count, inputs = x.shape[0], _resident(x)
    blocks = pl.cdiv(count, inputs)
    moved = sum(a.size * a.dtype.itemsize for a in (operands.codes, *grids)) * blocks
    moved += (x.size + count * rows) * x.dtype.itemsize
    call = pl.pallas_call(
        functools.partial(_kernel, shape),
        grid=(blocks, pl.cdiv(rows, _ROWS)),
        in_specs=[
            pl.BlockSpec((inputs, shape.input_lanes), lambda i, j: (i, 0)),
            pl.BlockSpec((_ROWS, shape.byte_lanes), lambda i, j: (j, 0)),
            *(pl.BlockSpec((grid.shape[0], _ROWS), lambda i, j: (0, j)) for grid in grids),
        ],
        out_specs=pl.BlockSpec((inputs, _ROWS), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((count, rows), x.dtype, manual_axis_type=kind),
        scratch_shapes=[pltpu.VMEM((inputs, _ROWS), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VECTOR_BYTES
        ),
        cost_estimate=pl.CostEstimate(flops=2 * count * rows * own.count, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
        name="lut_matmul",
    )
    with jax.enable_x64(False):
        return call(x, operands.codes, *grids)


def gradient(operands: Operands, dy: Array, own: Layout, *, interpret: bool | pltpu.InterpretParams = False) -> Array:
    """As `xla.gradient`.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("gradient", operands, own)
    (operands, dy), kind = varying_alike(operands, dy)
    shape = _Shape.of(operands, own)
    x, dy = _inputs(operands.x, shape), dy.astype(operands.x.dtype)
    inputs, rows = _resident(x), operands.codes.shape[0]
    # What lies beyond the last input must add nothing.
    x, dy = (jnp.pad(a, ((0, -a.shape[0] % inputs), (0, 0))) for a in (x, dy))
    fits = [n for n in _GRADIENT_ROWS if 4 * n * shape.input_lanes <= _GRADIENT_BYTES]
    wide = min(max(fits, default=_ROWS), _up(rows, _ROWS))
    lanes, blocks = shape.lines * _LANES, pl.cdiv(rows, wide)
    call = pl.pallas_call(
        functools.partial(_gradient_kernel, shape),
        grid=(blocks, x.shape[0] // inputs),
        in_specs=[
            pl.BlockSpec((inputs, shape.input_lanes), lambda i, j: (j, 0)),
            pl.BlockSpec((inputs, wide), lambda i, j: (j, i)),
            pl.BlockSpec((wide, shape.byte_lanes), lambda i, j: (i, 0)),
        ],
        out_specs=pl.BlockSpec((wide, lanes), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, lanes), jnp.float32, manual_axis_type=kind),
        scratch_shapes=[pltpu.VMEM((wide, shape.input_lanes), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VECTOR_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * rows * own.count,
            bytes_accessed=(x.size * blocks + dy.size) * x.dtype.itemsize + operands.codes.size + 4 * rows * lanes,
            transcendentals=0,
        ),
        interpret=interpret,
        name="lut_matmul_gradient",
    )
    with jax.enable_x64(False):
        sums = call(x, dy, operands.codes)[:, : shape.groups * shape.entries]
    return sums if operands.tables is None else sums.reshape(rows, shape.groups, shape.entries)
