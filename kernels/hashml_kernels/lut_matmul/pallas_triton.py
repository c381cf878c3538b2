"""The op for NVIDIA GPUs through Pallas-Triton (deprecated in JAX since 0.11, hence a file of its own).

A tile of bytes is read once and holds a tile of codes for each slot; a shift and a mask take them out, in registers.
A number is looked up by a gather from its row's table: 32 bytes for 4 bits, one line of the first-level cache for all
threads of a warp. That is one instruction beside the address, where a chain of choices takes fifteen.

With up to `_FEW` inputs a product is float32 on ordinary units, and sums are kept apart by place in the tile until
the end. With more, numbers are rounded to the dtype of the inputs and go to the tensor cores. The gradient of tables
makes a tile of ``dy.T x`` there, looks at its codes, and writes down a sum for each entry; XLA adds up tiles of a
group.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hashml_kernels.annotations import Array
from hashml_kernels.lut_matmul.layout import Layout
from hashml_kernels.lut_matmul.operands import Operands, Tiles, slot_of
from hashml_kernels.manual_axes import varying_alike
from hashml_kernels.triton_arithmetic import count_to, fused, unfused

_FLOATS = ("float32", "bfloat16", "float16")
_TABLE_BITS = 4
_FEW = 4  # inputs that go without tensor cores
_LEAST = 16  # sides of a tensor core's operands
_PROGRAMS = 4 * 132  # some four a multiprocessor of an H200


def check(op: str, operands: Operands, own: Layout) -> None:
    """Returns if the kernels serve these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for tables of 256 entries, other dtypes, empty arrays, addresses beyond 32 bits, and
            gradients of groups that end inside of tiles.
    """
    if operands.tables is not None and own.bits > _TABLE_BITS:
        raise NotImplementedError(
            f"tables are of {own.bits} bits; the Triton kernels take at most {_TABLE_BITS}; auto uses XLA"
        )
    for name, array in zip(operands._fields, operands, strict=True):
        if array is None:
            continue
        if 0 in array.shape:
            raise NotImplementedError(
                f"{name} has shape {array.shape}; the Triton kernels take no empty arrays; auto uses XLA"
            )
        if name != "codes" and str(array.dtype) not in _FLOATS:
            raise NotImplementedError(
                f"{name} has dtype {array.dtype}; the Triton kernels take {_FLOATS}; auto uses XLA"
            )
        if array.size >= 2**31:
            raise NotImplementedError(
                f"{name} holds {array.size} numbers; the Triton kernels take less than 2**31; auto uses XLA"
            )
    if op == "gradient" and not _gradient_tiles(operands, own).aligned:
        raise NotImplementedError(
            f"groups of {own.count // operands.groups} columns end inside of tiles of {_LEAST} bytes of rows of "
            f"{own.width}; the Triton kernel of gradients takes others; auto uses XLA"
        )


class _Plan(NamedTuple):
    """What one program makes, ``high x wide`` numbers of the result; all powers of two, as Triton wants."""

    high: int
    wide: int
    tiles: Tiles
    parts: int
    """Programs that share a sum."""
    warps: int

    @staticmethod
    def of(operands: Operands, own: Layout) -> "_Plan":
        count, rows = operands.x.shape[0], operands.codes.shape[0]
        across = max(pl.next_power_of_2(own.width), _LEAST)
        if count <= _FEW:
            tiles = Tiles(own, operands.groups, min(across, 1024 if count <= 2 else 512))
            return _Plan(count, 4, tiles, 1, 4)
        small = operands.x.dtype.itemsize > 2  # float32 goes without tensor cores: registers bind
        if count <= _LEAST:
            tiles = Tiles(own, operands.groups, min(across, 64 if small else 128))
            # Parts of sums are written and read again, 8 bytes each: no more of that than a twentieth of the codes.
            affordable = operands.codes.size // (20 * 8 * count * rows)
            wanted = pl.cdiv(_PROGRAMS, pl.cdiv(rows, _LEAST))
            return _Plan(_LEAST, _LEAST, tiles, max(1, min(affordable, wanted, tiles.number)), 4)
        high = min(pl.next_power_of_2(count), 64 if small else 128)
        tiles = Tiles(own, operands.groups, min(across, 16 if small else 64 if own.slots <= 2 else 32))
        return _Plan(high, 64, tiles, 1, 8 if high == 128 else 4)

    @property
    def steps(self) -> int:
        return pl.cdiv(self.tiles.number, self.parts)


# --- inside the kernels ---------------------------------------------------------------------------


def _read(ref: Any, row: Any, column: Any, mask: Any = None) -> Any:
    """Elements of a matrix; the shapes broadcast. Zeros where the mask is false."""
    shape = jnp.broadcast_shapes(jnp.shape(row), jnp.shape(column))
    at = ref.at[tuple(jnp.broadcast_to(jnp.asarray(index, jnp.int32), shape) for index in (row, column))]
    if mask is None:
        return plt.load(at)
    return plt.load(at, mask=jnp.broadcast_to(mask, shape), other=jnp.zeros((), ref.dtype))


class _Walk(NamedTuple):
    """Rows of W, tile by tile: their codes, and the numbers that these are."""

    tiles: Tiles
    tables: bool
    row: Any
    """Rows beyond the last one are the last one: what they make is not kept."""

    def planes(self, codes: Any, byte: Any) -> list[Any]:
        own = self.tiles.own
        mask = None if own.width % self.tiles.size == 0 else (byte < own.width)[None]
        return [
            _read(codes, self.row[:, None], plane * own.width + byte[None], mask).astype(jnp.int32)
            for plane in range(own.planes)
        ]

    def column(self, slot: Any, byte: Any) -> tuple[Any, Any]:
        """Columns of a slot, and which exist; None if all do."""
        own = self.tiles.own
        column = slot * own.width + byte
        return column, None if self.tiles.whole else (byte < own.width) & (column < own.count)

    def numbers(self, grids: Any, slot: int, first: Any, code: Any) -> Any:
        """``[rows, bytes]``, in the dtype of the tables, or float32."""
        tiles, own = self.tiles, self.tiles.own
        group: Any = jnp.int32(0)
        if tiles.groups > 1:
            begin = slot * own.width + first
            begin = begin if tiles.aligned else (begin + count_to(tiles.size))[None]
            group = jnp.minimum(lax.div(begin, jnp.full_like(begin, tiles.run)), tiles.groups - 1)
        if self.tables:
            return _read(grids[0], self.row[:, None], group * 2**own.bits + code)
        scale, zero = (_read(grid, self.row[:, None], group).astype(jnp.float32) for grid in grids)
        return scale * (code.astype(jnp.float32) - zero)


def _few_kernel(plan: _Plan, tables: bool, fma: Any) -> Callable[..., None]:
    tiles = plan.tiles

    def lut_matmul_few(x, codes, *refs):
        *grids, out = refs
        place = pl.program_id(0) * plan.wide + count_to(plan.wide)
        walk = _Walk(tiles, tables, jnp.minimum(place, codes.shape[0] - 1))

        def step(index: Any, sums: list[Any]) -> list[Any]:
            first = index * tiles.size
            byte = first + count_to(tiles.size)
            planes = walk.planes(codes, byte)
            for slot in range(tiles.own.slots):
                numbers = walk.numbers(grids, slot, first, slot_of(planes, tiles.own, slot)).astype(jnp.float32)
                column, mask = walk.column(slot, byte)
                inputs = [_read(x, jnp.int32(m), column, mask).astype(jnp.float32) for m in range(plan.high)]
                sums = [fma(one[None], numbers, total) for one, total in zip(inputs, sums, strict=True)]
            return sums

        zeros = jnp.zeros((plan.wide, tiles.size), jnp.float32)
        sums = lax.fori_loop(0, plan.steps, step, [zeros] * plan.high)
        for m, total in enumerate(sums):
            at = out.at[jnp.full(place.shape, m, jnp.int32), place]
            plt.store(at, jnp.sum(total, axis=1).astype(out.dtype), mask=place < out.shape[1])

    return lut_matmul_few


def _many_kernel(plan: _Plan, tables: bool) -> Callable[..., None]:
    tiles = plan.tiles

    def lut_matmul(x, codes, *refs):
        *grids, out = refs
        batch = pl.program_id(0) * plan.high + count_to(plan.high)
        place = pl.program_id(1) * plan.wide + count_to(plan.wide)
        part = pl.program_id(2)
        walk = _Walk(tiles, tables, jnp.minimum(place, codes.shape[0] - 1))
        inputs = jnp.minimum(batch, x.shape[0] - 1)[:, None]

        def step(index: Any, total: Any) -> Any:
            first = (part * plan.steps + index) * tiles.size
            byte = first + count_to(tiles.size)
            planes = walk.planes(codes, byte)
            for slot in range(tiles.own.slots):
                numbers = walk.numbers(grids, slot, first, slot_of(planes, tiles.own, slot)).astype(x.dtype)
                column, mask = walk.column(slot, byte)
                own = _read(x, inputs, column[None], None if mask is None else mask[None])
                total = total + plt.dot(own, numbers, trans_b=True, precision=lax.Precision.HIGHEST)
            return total

        # The last part may be shorter: tiles beyond the last one would be those of the next plane.
        steps = jnp.minimum(plan.steps, tiles.number - part * plan.steps)
        total = lax.fori_loop(0, steps, step, jnp.zeros((plan.high, plan.wide), jnp.float32))
        shape = total.shape
        row, column = jnp.broadcast_to(batch[:, None], shape), jnp.broadcast_to(place[None], shape)
        mask = (row < out.shape[1]) & (column < out.shape[2])
        plt.store(out.at[jnp.full(shape, part), row, column], total.astype(out.dtype), mask=mask)

    return lut_matmul


def _gradient_kernel(tiles: Tiles, wide: int, depth: int, entries: int | None) -> Callable[..., None]:
    own = tiles.own

    def lut_matmul_gradient(x, dy, codes, out):
        place = pl.program_id(0) * wide + count_to(wide)
        byte, slot = pl.program_id(1) * tiles.size + count_to(tiles.size), pl.program_id(2)
        row = jnp.minimum(place, codes.shape[0] - 1)
        column, mask = _Walk(tiles, True, row).column(slot, byte)

        def step(index: Any, total: Any) -> Any:
            batch = (index * depth + count_to(depth))[:, None]
            here = None if x.shape[0] % depth == 0 else batch < x.shape[0]
            inputs = mask[None] if mask is not None and here is None else here
            inputs = here & mask[None] if mask is not None and here is not None else inputs
            left, right = _read(dy, batch, row[None], here), _read(x, batch, column[None], inputs)
            return total + plt.dot(left, right, trans_a=True, precision=lax.Precision.HIGHEST)

        zeros = jnp.zeros((wide, tiles.size), jnp.float32)
        dw = lax.fori_loop(0, pl.cdiv(x.shape[0], depth), step, zeros)
        inside = None if own.width % tiles.size == 0 else (byte < own.width)[None]

        def plane(number: Any) -> Any:
            return _read(codes, row[:, None], number * own.width + byte[None], inside).astype(jnp.int32)

        if own.bits == 3:
            low = (plane(lax.div(slot, jnp.int32(4))) >> (2 * lax.rem(slot, jnp.int32(4)))) & 3
            code = low | (((plane(2) >> slot) & 1) << 2)
        else:
            code = (plane(0) >> (own.bits * slot)) & (2**own.bits - 1)
        tile = slot * tiles.number + pl.program_id(1)
        for entry in range(entries or 1):
            chosen = dw * code.astype(jnp.float32) if entries is None else jnp.where(code == entry, dw, 0.0)
            at = out.at[jnp.full(place.shape, tile), jnp.full(place.shape, entry, jnp.int32), place]
            plt.store(at, jnp.sum(chosen, axis=1), mask=place < out.shape[2])

    return lut_matmul_gradient


# --- the ops --------------------------------------------------------------------------------------


def bytes_moved(operands: Operands, own: Layout) -> int:
    """What `multiply` asks of the memory, its own blocks counted: tables and inputs once, sums in all their parts."""
    plan = _Plan.of(operands, own)
    count, rows = operands.x.shape[0], operands.codes.shape[0]
    of_codes = pl.cdiv(count, plan.high) * rows * own.planes * min(plan.tiles.number * plan.tiles.size, own.width)
    others = sum(array.size * array.dtype.itemsize for array in (operands.x, *operands.grids))
    parts = 0 if plan.parts == 1 else 2 * 4 * plan.parts
    return of_codes + others + count * rows * (operands.x.dtype.itemsize + parts)


def multiply(operands: Operands, own: Layout, *, interpret: bool = False) -> Array:
    """``[M, out]`` in the dtype of ``x``.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("multiply", operands, own)
    (operands,), kind = varying_alike(operands)
    plan, tables = _Plan.of(operands, own), operands.tables is not None
    count, rows = operands.x.shape[0], operands.codes.shape[0]
    options: dict[str, Any] = {
        "interpret": interpret,
        "cost_estimate": pl.CostEstimate(
            flops=2 * count * rows * own.count, bytes_accessed=bytes_moved(operands, own), transcendentals=0
        ),
    }
    arrays = operands.x, operands.codes, *(grid.reshape(rows, -1) for grid in operands.grids)
    if count <= _FEW:
        return pl.pallas_call(
            _few_kernel(plan, tables, unfused if interpret else fused),
            grid=(pl.cdiv(rows, plan.wide),),
            out_shape=jax.ShapeDtypeStruct((count, rows), operands.x.dtype, manual_axis_type=kind),
            compiler_params=plt.CompilerParams(num_warps=plan.warps, num_stages=2),
            **options,
        )(*arrays)
    dtype = operands.x.dtype if plan.parts == 1 else jnp.float32
    out = pl.pallas_call(
        _many_kernel(plan, tables),
        grid=(pl.cdiv(count, plan.high), pl.cdiv(rows, plan.wide), plan.parts),
        out_shape=jax.ShapeDtypeStruct((plan.parts, count, rows), dtype, manual_axis_type=kind),
        compiler_params=plt.CompilerParams(num_warps=plan.warps, num_stages=3),
        **options,
    )(*arrays)
    return (out[0] if plan.parts == 1 else out.sum(axis=0)).astype(operands.x.dtype)


def _gradient_tiles(operands: Operands, own: Layout) -> Tiles:
    """The largest tiles that lie in one group each, if there are any."""
    most = min(pl.next_power_of_2(own.width), 64 if operands.x.dtype.itemsize > 2 else 128)
    sizes = [size for size in (128, 64, 32, _LEAST) if size <= max(most, _LEAST)]
    every = [Tiles(own, operands.groups, size) for size in sizes]
    return next((tiles for tiles in every if tiles.aligned), every[-1])


def gradient(operands: Operands, dy: Array, own: Layout, *, interpret: bool = False) -> Array:
    """As `xla.gradient`.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("gradient", operands, own)
    tiles, entries = _gradient_tiles(operands, own), None if operands.tables is None else 2**own.bits
    x, dy = operands.x, dy.astype(operands.x.dtype)
    (x, dy, codes), kind = varying_alike(x, dy, operands.codes)
    wide, depth = (32, 16) if x.dtype.itemsize > 2 else (64, 32)
    (count, _), rows = x.shape, codes.shape[0]
    pieces = own.slots * tiles.number
    sums = pl.pallas_call(
        _gradient_kernel(tiles, wide, depth, entries),
        grid=(pl.cdiv(rows, wide), tiles.number, own.slots),
        out_shape=jax.ShapeDtypeStruct((pieces, entries or 1, rows), jnp.float32, manual_axis_type=kind),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * count * rows * own.count,
            bytes_accessed=(x.size + dy.size) * x.dtype.itemsize + own.slots * codes.size + 4 * pieces * rows,
            transcendentals=0,
        ),
    )(x, dy, codes)
    # Groups of the tiles: a matrix of zeros and ones, since a scatter would add one by one.
    begin = (np.arange(own.slots)[:, None] * own.width + np.arange(tiles.number) * tiles.size).ravel()
    of = np.minimum(begin // tiles.run, tiles.groups - 1)
    belongs = jnp.asarray(of == np.arange(tiles.groups)[:, None], jnp.float32)
    total = jnp.einsum("gt,ter->rge", belongs, sums, precision="highest")
    return total[..., 0] if entries is None else total
