"""The op for XLA: a strip of W at a time, copied together from runs of the memory, multiplied and forgotten.

A *run* is one row of a tile, ``bn`` weights side by side in W. It lies in one piece in the memory unless it
crosses the memory's end or, in a fold, the end of a partition: such runs are few, the host knows them all, and
they are put right one weight at a time. `multiply` walks over strips of columns and `multiply_transposed` over
strips of rows, so that every number of the result is one product, and no sum is carried from strip to strip.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hashml_kernels.annotations import Array, Float
from hashml_kernels.hashed_matmul.geometry import Runs, TileGeometry, tile_runs
from hashml_kernels.hashed_matmul.reference import accumulator
from hashml_kernels.hashed_matmul.tiles import across, first_positions, number_of, signs
from hashml_kernels.manual_axes import varying_alike

STRIP = 256
"""Rows, or columns, of a strip, unless a tile has more."""

_IN_BOUNDS = lax.GatherScatterMode.PROMISE_IN_BOUNDS


class _Strips(NamedTuple):
    """W cut in strips of ``tiles`` rows (``axis`` 0) or columns (1) of the grid; the last may reach beyond W.

    ``broken`` are the runs of each strip that lie in several pieces: numbers in the strip, row by row of W,
    all strips as many as the one with most, then `_runs` of them, which is no run.
    """

    axis: int
    tiles: int
    runs: Runs
    broken: np.ndarray

    @property
    def parts(self) -> int:
        return self.broken.shape[0]


@functools.lru_cache(maxsize=256)
def _strips(geometry: TileGeometry, axis: int, most: int) -> _Strips:
    count = across(geometry.grid[axis], max(1, most // geometry.tile[axis]))
    tiles = across(geometry.grid[axis], count)
    count = across(geometry.grid[axis], tiles)
    padding = [(0, count * tiles - geometry.grid[0]) if axis == 0 else (0, 0), (0, 0)]
    if axis == 1:
        padding = [(0, 0), (0, count * tiles - geometry.grid[1])]
    # Tiles beyond W: at the head of the memory, in one piece. What they hold is cut away, or zero.
    runs = Runs(
        *(np.pad(a, padding, constant_values=v) for a, v in zip(tile_runs(geometry), (0, 2**30, 0), strict=True))
    )

    bk, bn = geometry.tile
    size, budget = geometry.tile_size, geometry.budget
    suspect = np.nonzero((runs.split < size) | (runs.start + size > budget))
    start, split, second = (array[suspect][:, None] for array in runs)
    place = np.arange(bk) * bn
    cut = (place < split) & (split < place + bn)
    first = np.where(place < split, start + place, second + place - split) % budget
    tile, row = np.nonzero(cut | (first + bn > budget))
    i, j = suspect[0][tile], suspect[1][tile]
    strip, i, j = (i // tiles, i % tiles, j) if axis == 0 else (j // tiles, i, j % tiles)
    width = runs.start.shape[1] if axis == 0 else tiles
    number = (i * bk + row) * width + j
    most_broken = int(np.bincount(strip, minlength=count).max(initial=0))
    # XLA turns a scatter of one run into a choice at every weight of the strip, twice as slow on a CPU.
    most_broken = 2 if most_broken == 1 else most_broken
    broken = np.full((count, most_broken), _runs_of(geometry, axis, tiles), np.int32)
    for one in range(count):
        mine = np.sort(number[strip == one])
        broken[one, : len(mine)] = mine
    return _Strips(axis, tiles, runs, broken)


def _runs_of(geometry: TileGeometry, axis: int, tiles: int) -> int:
    """Runs of a strip."""
    return tiles * geometry.grid[1 - axis] * geometry.tile[0]


class _Runs(NamedTuple):
    """`Runs` as arrays of the program."""

    start: Any
    split: Any
    second: Any


class _Strip(NamedTuple):
    """One strip of W at run time: the runs of its tiles, of its broken runs, and the tiles' numbers."""

    runs: _Runs
    broken: jax.Array
    number: jax.Array


def _strip(geometry: TileGeometry, strips: _Strips, index: Any) -> _Strip:
    def own(array: np.ndarray) -> jax.Array:
        return lax.dynamic_slice_in_dim(jnp.asarray(array), index * strips.tiles, strips.tiles, strips.axis)

    grid = [np.arange(size, dtype=np.uint32) for size in strips.runs.start.shape]
    number = number_of(geometry, grid[0][:, None], grid[1][None, :])
    broken = lax.dynamic_index_in_dim(jnp.asarray(strips.broken), index, keepdims=False)
    return _Strip(_Runs(*map(own, strips.runs)), broken, own(number))


def _slots(geometry: TileGeometry, runs: _Runs, inside: Any) -> Any:
    """Slots of the weights ``inside`` of tiles."""
    place = jnp.where(inside < runs.split, runs.start + inside, runs.second + inside - runs.split)
    return jnp.where(place >= geometry.budget, place - geometry.budget, place)


def _first_slots(geometry: TileGeometry, runs: _Runs) -> Array:
    """First slots ``[rows of tiles, bk, columns of tiles, 1]`` of runs; broken ones' lie where a run fits."""
    inside = np.arange(geometry.tile[0], dtype=np.int32)[:, None] * np.int32(geometry.tile[1])
    place = _slots(geometry, _Runs(*(array[:, None, :] for array in runs)), inside)
    return jnp.minimum(place, geometry.budget - geometry.tile[1])[..., None]


def _broken_slots(geometry: TileGeometry, strip: _Strip) -> Array:
    """Slots ``[broken runs, bn]``; a number that is no run is read as the last one."""
    bk, bn = geometry.tile
    height, width = strip.number.shape
    number = jnp.minimum(strip.broken, height * bk * width - 1)
    row, column = number // width, number % width
    runs = _Runs(*(array[row // bk, column][:, None] for array in strip.runs))
    return _slots(geometry, runs, (row % bk * bn)[:, None] + np.arange(bn, dtype=np.int32))


def _negative(geometry: TileGeometry, number: Array) -> Array:
    """Which weights ``[rows of tiles, bk, columns of tiles, bn]`` have the sign -1."""
    first = first_positions(geometry, number)
    if geometry.sign == "tile":
        return signs(geometry, first, np.uint32(0))[:, None, :, None] != 0
    # Hashed in the order of positions, which is fast, and then turned over into the order of W.
    first = jax.tree.map(lambda word: word if np.ndim(word) == 0 else word[..., None], first)
    negative = signs(geometry, first, np.arange(geometry.tile_size, dtype=np.uint32)) != 0
    return negative.reshape(*number.shape, *geometry.tile).transpose(0, 2, 1, 3)


def _expand(memory: Float[Array, " budget"], geometry: TileGeometry, strip: _Strip) -> Float[Array, "height width"]:
    """A strip of W, whole tiles."""
    bk, bn = geometry.tile
    height, width = strip.number.shape
    windows = lax.GatherDimensionNumbers(offset_dims=(3,), collapsed_slice_dims=(), start_index_map=(0,))
    w = lax.gather(memory, _first_slots(geometry, strip.runs), windows, (bn,), mode=_IN_BOUNDS)
    if strip.broken.size:
        pieces = memory.at[_broken_slots(geometry, strip)].get(mode="promise_in_bounds")
        w = w.reshape(-1, bn).at[strip.broken].set(pieces, mode="drop").reshape(w.shape)
    if geometry.sign != "none":
        w = jnp.where(_negative(geometry, strip.number), -w, w)
    return w.reshape(height * bk, width * bn)


def _add(total: Float[Array, " budget"], gradient: Array, geometry: TileGeometry, strip: _Strip) -> Array:
    """``total`` and the transpose of `_expand`."""
    bk, bn = geometry.tile
    height, width = strip.number.shape
    gradient = gradient.reshape(height, bk, width, bn)
    if geometry.sign != "none":
        gradient = jnp.where(_negative(geometry, strip.number), -gradient, gradient)
    gradient = gradient.reshape(-1, bn)
    if strip.broken.size:
        pieces = gradient.at[strip.broken].get(mode="fill", fill_value=0)
        total = total.at[_broken_slots(geometry, strip)].add(pieces, mode="promise_in_bounds")
        gradient = gradient.at[strip.broken].set(0, mode="drop")
    windows = lax.ScatterDimensionNumbers(
        update_window_dims=(1,), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
    )
    first = _first_slots(geometry, strip.runs).reshape(-1, 1)
    return lax.scatter_add(total, first, gradient, windows, mode=_IN_BOUNDS)


# --- the ops --------------------------------------------------------------------------------------


def multiply(
    x: Float[Array, "n rows"], memory: Float[Array, " budget"], geometry: TileGeometry, scale: float
) -> Float[Array, "n columns"]:
    """``scale * x @ W`` in the dtype of ``x``."""

    def strip_of_y(strip: _Strip) -> Array:
        return _product(x, _expand(memory, geometry, strip)[: geometry.rows], ((1,), (0,)), scale)

    return _strip_by_strip(strip_of_y, x, memory, geometry, 1)


def multiply_transposed(
    y: Float[Array, "n columns"], memory: Float[Array, " budget"], geometry: TileGeometry, scale: float
) -> Float[Array, "n rows"]:
    """``scale * y @ W.T`` in the dtype of ``y``."""

    def strip_of_x(strip: _Strip) -> Array:
        return _product(y, _expand(memory, geometry, strip)[:, : geometry.columns], ((1,), (1,)), scale)

    return _strip_by_strip(strip_of_x, y, memory, geometry, 0)


def _product(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]], scale: float) -> Array:
    wide = accumulator(a.dtype)
    product = lax.dot_general(a, b, (contract, ((), ())), precision="highest", preferred_element_type=wide)
    return (product if scale == 1.0 else product * scale).astype(a.dtype)


def _strip_by_strip(function: Any, left: Array, memory: Array, geometry: TileGeometry, axis: int) -> Array:
    """Results of ``function`` side by side."""
    strips = _strips(geometry, axis, STRIP)
    n, width = left.shape[0], strips.tiles * geometry.tile[axis]
    columns = (geometry.rows, geometry.columns)[axis]
    if strips.parts == 1:
        return function(_strip(geometry, strips, 0))[:, :columns]
    whole = jnp.zeros((n, strips.parts * width), left.dtype)
    (whole, *_), _ = varying_alike(whole, left, memory)

    def step(index: Any, whole: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(whole, function(_strip(geometry, strips, index)), index * width, 1)

    return lax.fori_loop(0, strips.parts, step, whole)[:, :columns]


def outer(
    x: Float[Array, "n rows"], y: Float[Array, "n columns"], geometry: TileGeometry, scale: float
) -> Float[Array, " budget"]:
    """The gradient of ``sum(y * multiply(x, memory))`` with respect to the memory, in float32 or better."""
    (x, y), _ = varying_alike(x, y)

    def gradient(first: Any, rows: int) -> Array:
        return _product_wide(lax.dynamic_slice_in_dim(x, first, rows, 1), y)

    strips = _strips(geometry, 0, STRIP)
    x = _padded(x, strips.parts * strips.tiles * geometry.tile[0], 1)
    total = _add_strips(gradient, accumulator(x.dtype), x, geometry, strips)
    return total if scale == 1.0 else total * scale


def _product_wide(x: Array, y: Array) -> Array:
    wide = accumulator(x.dtype)
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())), precision="highest", preferred_element_type=wide)


def expand(memory: Float[Array, " budget"], geometry: TileGeometry) -> Float[Array, "rows columns"]:
    """The virtual matrix W, whole."""
    strips = _strips(geometry, 0, geometry.grid[0] * geometry.tile[0])
    return _expand(memory, geometry, _strip(geometry, strips, 0))[: geometry.rows, : geometry.columns]


def pull(gradient: Float[Array, "rows columns"], geometry: TileGeometry) -> Float[Array, " budget"]:
    """The transpose of `expand`: each slot's sum over its weights, in float32 or better."""
    strips, wide = _strips(geometry, 0, STRIP), accumulator(gradient.dtype)
    gradient = _padded(gradient, strips.parts * strips.tiles * geometry.tile[0], 0)

    def strip_of_gradient(first: Any, rows: int) -> Array:
        return lax.dynamic_slice_in_dim(gradient, first, rows, 0).astype(wide)

    return _add_strips(strip_of_gradient, wide, gradient, geometry, strips)


def _add_strips(gradient: Any, dtype: Any, like: Array, geometry: TileGeometry, strips: _Strips) -> Array:
    """Sums over the rows ``gradient(first, rows)`` of W's gradient, strip by strip."""
    rows = strips.tiles * geometry.tile[0]
    (total, _), _ = varying_alike(jnp.zeros(geometry.budget, dtype), like)

    def step(index: Any, total: Array) -> Array:
        strip = _padded(gradient(index * rows, rows), geometry.grid[1] * geometry.tile[1], 1)
        return _add(total, strip, geometry, _strip(geometry, strips, index))

    return step(0, total) if strips.parts == 1 else lax.fori_loop(0, strips.parts, step, total)


def _padded(array: Array, size: int, axis: int) -> Array:
    """With zeros up to ``size``."""
    missing = size - array.shape[axis]
    if not missing:
        return array
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])


def lookup(memory: Float[Array, " budget"], ids: Array, geometry: TileGeometry) -> Float[Array, "n columns"]:
    """Rows ``ids`` of W."""
    slots, negative = _rows(geometry, ids)
    rows = memory.at[slots].get(mode="promise_in_bounds")
    return (rows if negative is None else jnp.where(negative, -rows, rows)).reshape(ids.shape[0], -1)[
        :, : geometry.columns
    ]


def scatter(gradients: Float[Array, "n columns"], ids: Array, geometry: TileGeometry) -> Float[Array, " budget"]:
    """The transpose of `lookup`, in float32 or better."""
    slots, negative = _rows(geometry, ids)
    wide = accumulator(gradients.dtype)
    whole = _padded(gradients.astype(wide), geometry.grid[1] * geometry.tile[1], 1).reshape(slots.shape)
    whole = whole if negative is None else jnp.where(negative, -whole, whole)
    (total, _), _ = varying_alike(jnp.zeros(geometry.budget, wide), whole)
    return total.at[slots].add(whole, mode="promise_in_bounds")


def _rows(geometry: TileGeometry, ids: Array) -> tuple[Array, Array | None]:
    """Slots ``[n, columns of tiles, bn]`` of rows of W, and which weights are negative."""
    bk, bn = geometry.tile
    row = ids[:, None, None] // bk
    inside = ids[:, None, None] % bk * bn + np.arange(bn, dtype=np.int32)
    runs = _Runs(*(jnp.asarray(array)[row[:, 0, 0]][:, :, None] for array in tile_runs(geometry)))
    if geometry.sign == "none":
        return _slots(geometry, runs, inside), None
    first = first_positions(geometry, number_of(geometry, row, np.arange(geometry.grid[1])[:, None]))
    return _slots(geometry, runs, inside), signs(geometry, first, inside.astype(jnp.uint32)) != 0
