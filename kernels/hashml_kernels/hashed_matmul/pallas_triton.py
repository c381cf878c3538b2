"""The op for NVIDIA GPUs through Pallas-Triton (deprecated in JAX since 0.11, hence a file of its own).

A program makes a block of the result. It walks along the axis that is summed over, a part of a tile's rows (or
columns) a step, loads that part of W from the memory by computed addresses, turns signs by a hash in
registers, and multiplies on the tensor cores. The gradient of the memory is one block of W's gradient a
program, summed over the batch in registers and added to the memory by one atomic a weight.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hashml_kernels.annotations import Array, Float
from hashml_kernels.hashed_matmul.geometry import TileGeometry, tile_runs
from hashml_kernels.hashed_matmul.tiles import first_positions, signs
from hashml_kernels.manual_axes import varying_alike

_DTYPES = ("float32", "bfloat16", "float16")
_LEAST = 16  # sides of a tensor core's operands
_CORES = 132  # multiprocessors of an H200
_LONG = 512  # what a program sums over at least, where a sum is shared


def check(op: str, *operands: Any, geometry: TileGeometry) -> None:
    """Returns if the kernels serve these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for tiles whose sides are no multiples of 16, an empty batch, or float64.
    """
    for name, side in zip(("tile[0]", "tile[1]"), geometry.tile, strict=True):
        if side % _LEAST:
            raise NotImplementedError(
                f"{name} is {side}; the Triton kernels take multiples of {_LEAST}; auto uses XLA"
            )
    names = {"multiply": ("x", "memory"), "multiply_transposed": ("y", "memory"), "outer": ("x", "y")}[op]
    for name, array in zip(names, operands, strict=True):
        if array.dtype not in _DTYPES:
            raise NotImplementedError(
                f"{name} has dtype {array.dtype}; the Triton kernels take {_DTYPES}; auto uses XLA"
            )
        if 0 in array.shape:
            raise NotImplementedError(f"{name} has shape {array.shape}; the Triton kernels take no empty arrays")


class _Blocks(NamedTuple):
    """What one program makes, ``high x wide``, ``step`` terms at a time; all powers of two, as Triton wants."""

    high: int
    wide: int
    step: int
    parts: int = 1
    """Programs that share a sum."""

    @property
    def parameters(self) -> plt.CompilerParams:
        return plt.CompilerParams(num_warps=8 if self.high * self.wide >= 64 * 64 else 4, num_stages=3)


def _product_blocks(n: int, width: int, terms: int, side: int, dtype: Any) -> _Blocks:
    """For ``n`` rows of results, ``width`` wide, that sum ``terms`` weights in tiles of ``side`` along the sum."""
    small = jnp.dtype(dtype).itemsize > 2  # float32 goes without tensor cores: registers bind
    high = min(max(pl.next_power_of_2(n), _LEAST), 64 if small else 128)
    wide = min(max(pl.next_power_of_2(width), _LEAST), 64 if small or high < 64 else 128)
    step = min(side & -side, 16 if small else 32)
    programs = pl.cdiv(n, high) * pl.cdiv(width, wide)
    # Parts of sums are written and read again, 8 bytes each: no more of that than of weights.
    affordable = terms * jnp.dtype(dtype).itemsize // (8 * n)
    wanted = _CORES if high > 32 else 4 * _CORES  # few rows wait for the memory, many for the arithmetic
    parts = max(1, min(pl.cdiv(wanted, programs), terms // _LONG, affordable))
    return _Blocks(high, wide, step, parts)


# --- inside the kernels ---------------------------------------------------------------------------


class _Where(NamedTuple):
    """What the kernels read of the tiles' places, besides the geometry: see `Runs`."""

    start: Any
    split: Any
    second: Any
    crosses: bool
    """Whether some tile runs over the end of the memory."""
    step: int
    """Tiles lie at multiples of it, 16 at most: Triton then reads several weights at once."""

    @staticmethod
    def of(geometry: TileGeometry) -> "_Where":
        """On the host; ``split`` and ``second`` are None where no tile is split."""
        runs = tile_runs(geometry)
        size = np.int64(geometry.tile_size)
        split = bool((runs.split < size).any())
        ends = [runs.start + np.minimum(size, runs.split)] + [runs.second + (size - runs.split)] * split
        crosses = any(bool((end > geometry.budget).any()) for end in ends)
        start, cut, second = (array.ravel() for array in runs)
        step = int(np.gcd.reduce([16, geometry.budget, *map(np.gcd.reduce, (start, cut, second))]))
        return _Where(start, cut if split else None, second if split else None, crosses, step)

    @property
    def operands(self) -> tuple[Any, ...]:
        return (self.start,) if self.split is None else (self.start, self.split, self.second)

    def from_refs(self, refs: tuple[Any, ...]) -> "_Where":
        start, split, second = refs if len(refs) == 3 else (*refs, None, None)
        return _Where(start, split, second, self.crosses, self.step)


def _slots(geometry: TileGeometry, where: _Where, tile: Any, inside: Any, exists: Any) -> Any:
    """Slots of the weights ``inside`` of the tiles numbered ``tile``; the shapes broadcast."""
    mask = jnp.broadcast_to(exists, tile.shape)

    def own(table: Any) -> Any:
        loaded = plt.load(table.at[tile], mask=mask, other=jnp.int32(0))
        return pl.multiple_of(loaded, (where.step,) * loaded.ndim) if where.step > 1 else loaded

    place = own(where.start) + inside
    if where.split is not None:
        split = own(where.split)
        place = jnp.where(inside < split, place, own(where.second) + (inside - split))
    if where.crosses:
        place = jnp.where(place >= geometry.budget, place - geometry.budget, place)
    return place


def _signed(geometry: TileGeometry, values: Any, tile: Any, inside: Any) -> Any:
    if geometry.sign == "none":
        return values
    negative = signs(geometry, first_positions(geometry, tile.astype(jnp.uint32)), inside.astype(jnp.uint32))
    return jnp.where(jnp.broadcast_to(negative, values.shape) != 0, -values, values)


def _inside(geometry: TileGeometry, row: Any, column: Any) -> Any:
    bk, bn = geometry.tile
    return (lax.rem(row, _int(bk)) * bn)[:, None] + lax.rem(column, _int(bn))[None, :]


def _tile(geometry: TileGeometry, row: Any, column: Any) -> Any:
    """Number of the tile of a weight."""
    bk, bn = geometry.tile
    return lax.div(row, _int(bk)) * geometry.grid[1] + lax.div(column, _int(bn))


def _load(array: Any, row: Any, column: Any) -> Any:
    """Block of a matrix, zeros where it ends."""
    shape = (row.size, column.size)
    row, column = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None, :], shape)
    mask = (row < array.shape[0]) & (column < array.shape[1])
    return plt.load(array.at[row, column], mask=mask, other=jnp.zeros((), array.dtype))


def _int(value: int) -> Any:
    """For `lax.div`: the operator ``//`` rounds down by a choice, in which Triton loses sight of what is aligned."""
    return jnp.int32(value)


def _range(first: Any, size: int) -> Any:
    return first + jnp.arange(size, dtype=jnp.int32)


def _product_kernel(
    geometry: TileGeometry, blocks: _Blocks, where: _Where, scale: float, transposed: bool
) -> Callable[..., None]:
    """``left @ W``, or ``left @ W.T`` if ``transposed``; the axis that is summed over is walked along."""
    terms = geometry.columns if transposed else geometry.rows

    def kernel(left, memory, *rest):
        places, out = where.from_refs(rest[:-1]), rest[-1]
        part = pl.program_id(2)
        steps = pl.cdiv(pl.cdiv(terms, blocks.step), blocks.parts)
        batch = _range(pl.program_id(0) * blocks.high, blocks.high)
        kept = _range(pl.program_id(1) * blocks.wide, blocks.wide)

        def weights(first):
            """The part of W from row, or column, ``first``: the tile along it is one for all."""
            summed = _range(first, blocks.step)
            if transposed:
                row, column = kept, summed
                tile = _tile(geometry, kept, first)[:, None]
                here = (kept < geometry.rows)[:, None] & (first < terms)
            else:
                row, column = summed, kept
                tile = _tile(geometry, first, kept)[None, :]
                here = (kept < geometry.columns)[None, :] & (first < terms)
            inside = _inside(geometry, row, column)
            slot = _slots(geometry, places, tile, inside, here)
            exists = (row < geometry.rows)[:, None] & (column < geometry.columns)[None, :]
            values = plt.load(memory.at[slot], mask=exists, other=jnp.zeros((), memory.dtype))
            return summed, _signed(geometry, values, tile, inside)

        def step(index, total):
            summed, w = weights((part * steps + index) * blocks.step)
            return total + plt.dot(_load(left, batch, summed), w, trans_b=transposed, precision=lax.Precision.HIGHEST)

        total = lax.fori_loop(0, steps, step, jnp.zeros((blocks.high, blocks.wide), jnp.float32))
        shape = total.shape
        row, column = jnp.broadcast_to(batch[:, None], shape), jnp.broadcast_to(kept[None, :], shape)
        mask = (row < out.shape[1]) & (column < out.shape[2])
        total = total if scale == 1.0 else total * jnp.float32(scale)
        plt.store(out.at[jnp.full(shape, part), row, column], total.astype(out.dtype), mask=mask)

    return kernel


def _outer_kernel(
    geometry: TileGeometry, blocks: _Blocks, where: _Where, scale: float, interpret: bool
) -> Callable[..., None]:
    def hashed_matmul_outer(x, y, *rest):
        places, memory = where.from_refs(rest[:-2]), rest[-1]
        row = _range(pl.program_id(0) * blocks.high, blocks.high)
        column = _range(pl.program_id(1) * blocks.wide, blocks.wide)

        def step(index, total):
            batch = _range(index * blocks.step, blocks.step)
            return total + plt.dot(
                _load(x, batch, row), _load(y, batch, column), trans_a=True, precision=lax.Precision.HIGHEST
            )

        steps = pl.cdiv(x.shape[0], blocks.step)
        total = lax.fori_loop(0, steps, step, jnp.zeros((blocks.high, blocks.wide), jnp.float32))
        total = total if scale == 1.0 else total * jnp.float32(scale)
        tile = _tile(geometry, row[:, None], column[None, :])
        inside = _inside(geometry, row, column)
        exists = (row < geometry.rows)[:, None] & (column < geometry.columns)[None, :]
        slot = _slots(geometry, places, tile, inside, exists)
        total = _signed(geometry, total, tile, inside)
        if interpret:  # the interpreter's atomics know no masks, and keep one of several adds to a slot
            memory[...] = memory[...].at[slot].add(jnp.where(exists, total, 0.0))
        else:
            plt.atomic_add(memory, slot, total, mask=exists)

    return hashed_matmul_outer


# --- the ops --------------------------------------------------------------------------------------


def multiply(
    x: Float[Array, "n rows"],
    memory: Float[Array, " budget"],
    geometry: TileGeometry,
    scale: float,
    *,
    interpret: bool = False,
) -> Float[Array, "n columns"]:
    """``scale * x @ W`` in the dtype of ``x``.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("multiply", x, memory, geometry=geometry)
    blocks = _product_blocks(x.shape[0], geometry.columns, geometry.rows, geometry.tile[0], x.dtype)
    return _product(x, memory, geometry, scale, blocks, False, interpret)


def multiply_transposed(
    y: Float[Array, "n columns"],
    memory: Float[Array, " budget"],
    geometry: TileGeometry,
    scale: float,
    *,
    interpret: bool = False,
) -> Float[Array, "n rows"]:
    """``scale * y @ W.T`` in the dtype of ``y``.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("multiply_transposed", y, memory, geometry=geometry)
    blocks = _product_blocks(y.shape[0], geometry.rows, geometry.columns, geometry.tile[1], y.dtype)
    return _product(y, memory, geometry, scale, blocks, True, interpret)


def _product(left, memory, geometry: TileGeometry, scale: float, blocks: _Blocks, transposed: bool, interpret: bool):
    where, n = _Where.of(geometry), left.shape[0]
    width = geometry.rows if transposed else geometry.columns
    operands, kind = varying_alike(left, memory, *map(jnp.asarray, where.operands))
    # Programs that share a sum write each its own part, in float32.
    dtype = left.dtype if blocks.parts == 1 else jnp.float32
    out = pl.pallas_call(
        _product_kernel(geometry, blocks, where, scale, transposed),
        grid=(pl.cdiv(n, blocks.high), pl.cdiv(width, blocks.wide), blocks.parts),
        out_shape=jax.ShapeDtypeStruct((blocks.parts, n, width), dtype, manual_axis_type=kind),
        compiler_params=blocks.parameters,
        interpret=interpret,
        name="hashed_matmul_transposed" if transposed else "hashed_matmul",
    )(*operands)
    return (out[0] if blocks.parts == 1 else out.sum(axis=0)).astype(left.dtype)


def outer(
    x: Float[Array, "n rows"],
    y: Float[Array, "n columns"],
    geometry: TileGeometry,
    scale: float,
    *,
    interpret: bool = False,
) -> Float[Array, " budget"]:
    """The gradient of the memory, added up by float32 atomics: equal sums may differ in the last bits.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("outer", x, y, geometry=geometry)
    where = _Where.of(geometry)
    most = 64 if x.dtype == jnp.float32 else 128
    side = [min(max(pl.next_power_of_2(size), _LEAST), most) for size in (geometry.rows, geometry.columns)]
    blocks = _Blocks(side[0], min(side[1], 64), 32)
    zeros = jnp.zeros(geometry.budget, jnp.float32)
    operands, kind = varying_alike(x, y, *map(jnp.asarray, where.operands), zeros)
    return pl.pallas_call(
        _outer_kernel(geometry, blocks, where, scale, interpret),
        grid=(pl.cdiv(geometry.rows, blocks.high), pl.cdiv(geometry.columns, blocks.wide)),
        out_shape=jax.ShapeDtypeStruct((geometry.budget,), jnp.float32, manual_axis_type=kind),
        input_output_aliases={len(operands) - 1: 0},
        compiler_params=blocks.parameters,
        interpret=interpret,
    )(*operands)
