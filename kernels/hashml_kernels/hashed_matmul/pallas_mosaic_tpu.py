"""The op for TPUs, for tiles that start at multiples of their size: W is a list of tiles of the memory.

The host knows which; their numbers reach the kernel through scalar memory before it starts, so that the
pipeline fetches tiles as it fetches the blocks of any matrix. A block of rows of x stays in vector memory while
all of W passes by, `_STEP` rows of it a step. For the gradient of the memory the tiles of W are sorted by the tile
of the memory that they share: each is summed in vector memory over all that share it, and written once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels import bits
from hashml_kernels.annotations import Array, Float
from hashml_kernels.hashed_matmul.geometry import TileGeometry, tile_positions, tile_runs
from hashml_kernels.hashed_matmul.tiles import across, first_positions, signs
from hashml_kernels.manual_axes import varying_alike

_LANES = 128
_SUBLANES = 16  # rows of a bfloat16 register; a multiple of float32's
_MOST_TILES = 2**16  # numbers of 4 bytes in scalar memory
_ROWS = 512
_OUTER_ROWS = 1024
_RESIDENT_BYTES = 8 * 2**20  # of vector memory for x, and as much again while the next block is fetched
_LONGEST = 2**16  # `_SUBLANES` such rows are resident
_STEP = 512
_VECTOR_BYTES = 96 * 2**20  # of the 128 MiB of a v5e or v6e


def check(op: str, *operands: Any, geometry: TileGeometry) -> None:
    """Returns if the kernels serve these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for tiles that are no multiples of 128, or too many, or too large, or that start
            anywhere, an empty batch, very long rows, and other dtypes than float32 and bfloat16.
    """
    for name, side in zip(("tile[0]", "tile[1]"), geometry.tile, strict=True):
        if side % _LANES or side > 1024:
            raise NotImplementedError(
                f"{name} is {side}; the TPU kernels take multiples of {_LANES} up to 1024; auto uses XLA"
            )
    if not geometry.aligned:
        of = f"align is {geometry.align}" if geometry.align % geometry.tile_size else f"offset is {geometry.offset}"
        raise NotImplementedError(
            f"{of}; the TPU kernels take multiples of the tile's size, {geometry.tile_size}; auto uses XLA"
        )
    if geometry.grid[0] * geometry.grid[1] > _MOST_TILES:
        raise NotImplementedError(
            f"tile is {geometry.tile}; the TPU kernels take at most {_MOST_TILES} tiles; auto uses XLA"
        )
    names = {"multiply": ("x", "memory"), "multiply_transposed": ("y", "memory"), "outer": ("x", "y")}[op]
    for name, array in zip(names, operands, strict=True):
        if array.dtype != jnp.float32 and array.dtype != jnp.bfloat16:
            raise NotImplementedError(
                f"{name} has dtype {array.dtype}; the TPU kernels take float32 and bfloat16; auto uses XLA"
            )
        if 0 in array.shape:
            raise NotImplementedError(f"{name} has shape {array.shape}; the TPU kernels take no empty arrays")
        if op != "outer" and name != "memory" and array.shape[1] > _LONGEST:
            raise NotImplementedError(
                f"{name} has rows of {array.shape[1]}; the TPU kernels take at most {_LONGEST}; auto uses XLA"
            )


def _tile_numbers(geometry: TileGeometry) -> np.ndarray:
    """The tile of the memory that each tile of W is."""
    return (tile_runs(geometry).start // geometry.tile_size).astype(np.int32)


def _tile_signs(geometry: TileGeometry) -> np.ndarray:
    """Sign bits of tiles; what is not used is not looked at."""
    if geometry.sign != "tile":
        return np.zeros(geometry.grid, np.int32)
    return np.asarray(bits.sign_bit(tile_positions(geometry), geometry.seed)).astype(np.int32)


def _signed(geometry: TileGeometry, values: Any, number: Any, negative: Any) -> Any:
    """``values`` of tile ``number`` of W with their signs; ``negative`` is the sign bit of the whole tile."""
    if geometry.sign == "none":
        return values
    if geometry.sign == "tile":
        return jnp.where(negative != 0, -values, values)
    bk, bn = geometry.tile
    row, column = (lax.broadcasted_iota(jnp.int32, (bk, bn), axis) for axis in (0, 1))
    first = first_positions(geometry, number.astype(jnp.uint32))
    bit = signs(geometry, first, (row * bn + column).astype(jnp.uint32))
    return jnp.where(bit != 0, -values, values)


def _dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


# --- products -------------------------------------------------------------------------------------


class _Walk(NamedTuple):
    """A product ``left @ W``, or ``left @ W.T``: its steps ``[blocks of the result, tiles of a sum]``.

    Some ``together`` tiles make a step; where they are no divisor, the last step has tiles that meet zeros.
    """

    tiles: np.ndarray
    numbers: np.ndarray
    negative: np.ndarray
    together: int
    rows: int

    @staticmethod
    def of(geometry: TileGeometry, left: Any, transposed: bool) -> "_Walk":
        own = np.arange(geometry.grid[0] * geometry.grid[1], dtype=np.int32).reshape(geometry.grid)
        tables = [_tile_numbers(geometry), own, _tile_signs(geometry)]
        side = geometry.tile[1] if transposed else geometry.tile[0]
        tables = tables if transposed else [table.T for table in tables]
        together = min(max(1, _STEP // side), tables[0].shape[1])
        missing = -tables[0].shape[1] % together
        tables = [np.pad(table, ((0, 0), (0, missing))) for table in tables]
        width = tables[0].shape[1] * side
        most = min(_ROWS, _RESIDENT_BYTES // (width * left.dtype.itemsize) // _SUBLANES * _SUBLANES)
        n = left.shape[0]
        rows = across(across(n, across(n, max(most, _SUBLANES))), _SUBLANES) * _SUBLANES
        return _Walk(tables[0], tables[1], tables[2], together, rows)


def _product_kernel(
    geometry: TileGeometry, walk: _Walk, scale: float, transposed: bool, tiles, numbers, negative, left, *refs
) -> None:
    *weights, out, total = refs
    side = geometry.tile[1] if transposed else geometry.tile[0]
    block, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    for piece, w in enumerate(weights):
        place = step * walk.together + piece
        at = block * walk.tiles.shape[1] + place
        values = _signed(geometry, w[0], numbers[at], negative[at])
        x = left[:, pl.ds(pl.multiple_of(place * side, _LANES), side)]
        total[...] += _dot(x, values, (1, 1 if transposed else 0))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out[...] = (total[...] if scale == 1.0 else total[...] * scale).astype(out.dtype)


def _product(left, memory, geometry: TileGeometry, scale: float, transposed: bool, interpret):
    walk, (n, _) = _Walk.of(geometry, left, transposed), left.shape
    blocks, places = walk.tiles.shape
    side, wide = geometry.tile[::-1] if transposed else geometry.tile
    left = _padded(left, across(n, walk.rows) * walk.rows, places * side)
    scalars = [jnp.asarray(table.ravel()) for table in (walk.tiles, walk.numbers, walk.negative)]
    operands, kind = varying_alike(*scalars, left, memory.reshape(-1, *geometry.tile))

    def fetched(piece):
        def place(i, j, k, tiles, *_):
            return tiles[j * places + k * walk.together + piece], 0, 0

        return pl.BlockSpec((1, *geometry.tile), place)

    call = pl.pallas_call(
        functools.partial(_product_kernel, geometry, walk, scale, transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(left.shape[0] // walk.rows, blocks, places // walk.together),
            in_specs=[
                pl.BlockSpec((walk.rows, left.shape[1]), lambda i, j, k, *_: (i, 0)),
                *map(fetched, range(walk.together)),
            ],
            out_specs=pl.BlockSpec((walk.rows, wide), lambda i, j, k, *_: (i, j)),
            scratch_shapes=[pltpu.VMEM((walk.rows, wide), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((left.shape[0], blocks * wide), left.dtype, manual_axis_type=kind),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VECTOR_BYTES
        ),
        interpret=interpret,
        name="hashed_matmul_transposed" if transposed else "hashed_matmul",
    )
    *scalars, left, tiles = operands
    with jax.enable_x64(False):  # a TPU has no loop counters of 64 bits
        out = call(*scalars, left, *[tiles] * walk.together)
    return out[:n, : geometry.rows if transposed else geometry.columns]


def _padded(array: Array, rows: int, columns: int) -> Array:
    """With zeros up to that shape: what lies beyond the end of an array is not defined on a TPU."""
    missing = rows - array.shape[0], columns - array.shape[1]
    return jnp.pad(array, [(0, m) for m in missing]) if any(missing) else array


def multiply(
    x: Float[Array, "n rows"],
    memory: Float[Array, " budget"],
    geometry: TileGeometry,
    scale: float,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "n columns"]:
    """``scale * x @ W`` in the dtype of ``x``.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("multiply", x, memory, geometry=geometry)
    return _product(x, memory, geometry, scale, False, interpret)


def multiply_transposed(
    y: Float[Array, "n columns"],
    memory: Float[Array, " budget"],
    geometry: TileGeometry,
    scale: float,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "n rows"]:
    """``scale * y @ W.T`` in the dtype of ``y``.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("multiply_transposed", y, memory, geometry=geometry)
    return _product(y, memory, geometry, scale, True, interpret)


# --- the gradient of the memory -------------------------------------------------------------------


def _outer_kernel(geometry: TileGeometry, scale: float, order, tiles, negative, x, y, zeros, out) -> None:
    place, part = pl.program_id(0), pl.program_id(1)
    last = pl.num_programs(0) - 1
    tile = tiles[place]
    begins = (place == 0) | (tile != tiles[jnp.maximum(place - 1, 0)])
    ends = (place == last) | (tile != tiles[jnp.minimum(place + 1, last)])

    @pl.when(begins & (part == 0))
    def _():
        out[...] = zeros[...]

    out[0] += _signed(geometry, _dot(x[...], y[...], (0, 0)), order[place], negative[place])

    if scale != 1.0:

        @pl.when(ends & (part == pl.num_programs(1) - 1))
        def _():
            out[...] = out[...] * scale


def outer(
    x: Float[Array, "n rows"],
    y: Float[Array, "n columns"],
    geometry: TileGeometry,
    scale: float,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, " budget"]:
    """The gradient of the memory, float32; the order of additions is fixed.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("outer", x, y, geometry=geometry)
    (bk, bn), (grid_rows, grid_columns), n = geometry.tile, geometry.grid, x.shape[0]
    tiles = _tile_numbers(geometry).ravel()
    order = np.argsort(tiles, kind="stable").astype(np.int32)
    scalars = [jnp.asarray(table) for table in (order, tiles[order], _tile_signs(geometry).ravel()[order])]
    parts = across(n, _OUTER_ROWS)
    rows = across(across(n, parts), _SUBLANES) * _SUBLANES
    x, y = _padded(x, parts * rows, grid_rows * bk), _padded(y, parts * rows, grid_columns * bn)
    zeros = jnp.zeros((geometry.budget // geometry.tile_size, bk, bn), jnp.float32)  # tiles of no part of W stay so
    operands, kind = varying_alike(*scalars, x, y, zeros)
    own = pl.BlockSpec((1, bk, bn), lambda t, m, order, tiles, *_: (tiles[t], 0, 0))
    call = pl.pallas_call(
        functools.partial(_outer_kernel, geometry, scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(len(order), parts),
            in_specs=[
                pl.BlockSpec((rows, bk), lambda t, m, order, *_: (m, lax.div(order[t], np.int32(grid_columns)))),
                pl.BlockSpec((rows, bn), lambda t, m, order, *_: (m, lax.rem(order[t], np.int32(grid_columns)))),
                own,
            ],
            out_specs=own,
        ),
        out_shape=jax.ShapeDtypeStruct(zeros.shape, jnp.float32, manual_axis_type=kind),
        input_output_aliases={len(operands) - 1: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VECTOR_BYTES
        ),
        interpret=interpret,
        name="hashed_matmul_outer",
    )
    with jax.enable_x64(False):
        total = call(*operands)
    return total.reshape(geometry.budget)
