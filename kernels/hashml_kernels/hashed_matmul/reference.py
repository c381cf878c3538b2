"""The definition of the op in plain jnp; what every backend must equal. Any mode of autodiff works."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array, Float, Int
from hashml_kernels.hashed_matmul.geometry import TileGeometry, sign_bits, tile_positions, tile_runs


def slots(geometry: TileGeometry) -> Int[Array, "rows columns"]:
    """The slot of the memory that holds each weight of W."""
    runs, tile, inside = tile_runs(geometry), *_places(geometry)
    start, split, second = (jnp.asarray(array)[tile] for array in runs)
    place = jnp.where(inside < split, start + inside, second + inside - split)
    return jnp.where(place >= geometry.budget, place - geometry.budget, place)


def signs(geometry: TileGeometry) -> Float[Array, "rows columns"]:
    """-1 or 1 of each weight of W; 1 without signs."""
    if geometry.sign == "none":
        return jnp.ones((geometry.rows, geometry.columns), jnp.float32)
    tile, inside = _places(geometry)
    first = jax.tree.map(lambda word: jnp.asarray(word)[tile], tile_positions(geometry))
    return 1 - 2 * sign_bits(geometry, first, inside.astype(jnp.uint32)).astype(jnp.float32)


def expand(memory: Float[Array, " budget"], geometry: TileGeometry) -> Float[Array, "rows columns"]:
    """The virtual matrix W, whole."""
    return memory[slots(geometry)] * signs(geometry).astype(memory.dtype)


def pull(gradient: Float[Array, "rows columns"], geometry: TileGeometry) -> Float[Array, " budget"]:
    """The transpose of `expand`: each slot's sum over its weights, in float32 or better."""
    wide = accumulator(gradient.dtype)
    memory = jnp.zeros(geometry.budget, wide)
    return memory.at[slots(geometry)].add(gradient.astype(wide) * signs(geometry).astype(wide))


def multiply(
    x: Float[Array, "n rows"], memory: Float[Array, " budget"], geometry: TileGeometry, scale: float
) -> Float[Array, "n columns"]:
    """``scale * x @ W`` in the dtype of ``x``."""
    return _product("nk,kc->nc", x, expand(memory, geometry), scale).astype(x.dtype)


def multiply_transposed(
    y: Float[Array, "n columns"], memory: Float[Array, " budget"], geometry: TileGeometry, scale: float
) -> Float[Array, "n rows"]:
    """``scale * y @ W.T`` in the dtype of ``y``."""
    return _product("nc,kc->nk", y, expand(memory, geometry), scale).astype(y.dtype)


def outer(
    x: Float[Array, "n rows"], y: Float[Array, "n columns"], geometry: TileGeometry, scale: float
) -> Float[Array, " budget"]:
    """The gradient of ``sum(y * multiply(x, memory))`` with respect to the memory, in float32 or better."""
    return scale * pull(_product("nk,nc->kc", x, y, 1.0), geometry)


def accumulator(dtype: Any) -> Any:
    """The dtype in which products of ``dtype`` are added up."""
    return jnp.promote_types(dtype, jnp.float32)


def _product(formula: str, a: Array, b: Array, scale: float) -> Array:
    wide = accumulator(a.dtype)
    return scale * jnp.einsum(formula, a, b, precision="highest", preferred_element_type=wide)


def _places(geometry: TileGeometry) -> tuple[Any, Any]:
    """For each weight of W its tile, as a pair of indices, and its place inside the tile."""
    bk, bn = geometry.tile
    row = jnp.arange(geometry.rows, dtype=np.int32)[:, None]
    column = jnp.arange(geometry.columns, dtype=np.int32)[None, :]
    return (row // bk, column // bn), row % bk * bn + column % bn
