"""One operator pair behind every system of the family (Chen et al. 2015; Desai et al. 2022, 2023).

A virtual matrix W of ``rows x columns`` is never stored. Its entry (r, c) is one of ``budget`` weights:

    expand(memory)[r, c] = scale * sign(r, c) * memory[slot(r, c)]
    pull(dW)[j]          = sum over slot(r, c) = j of  scale * sign(r, c) * dW[r, c]      = expand^T
    collapse(W)[j]       = mean over slot(r, c) = j of  sign(r, c) * W[r, c] / scale      least squares

`pull` is the exact gradient of `expand`. Both exist by rows, so that a user never needs the whole W:
`virtual_matmul` multiplies by blocks of rows. A map is a value; its `geometry` is part of a trained
model and is saved with it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hashml_kernels import bits
from hashml_kernels.hash_gather import BlockGeometry, hash_gather, hash_scatter
from hashml_kernels.hash_gather import reference as _reference
from hashml_kernels.hash_gather.geometry import Sign, Wrap, id_limbs
from hashml_kernels.hashed_matmul.geometry import (
    TileGeometry,
    TileSign,
    fold_rotations,
    hashed_starts,
    sign_bits,
)

AnyArray = Array | np.ndarray
"""What functions take: JAX arrays, or NumPy arrays."""

Rows = Any
"""Row ids ``[*n]``: an integer array, or `hashml.hashing.Limbs` for rows beyond 2**32."""


class SharingMap(NamedTuple):
    """A fixed random linear map from ``budget`` weights to a virtual matrix.

    Attributes:
        rows, columns: shape of the virtual matrix; Python ints of any size.
        budget: weights stored.
        scale: what every entry is multiplied by.
        expand_rows: ``(memory, ids) -> [*n, columns]``; its gradient is `pull_rows`.
        pull_rows: ``(gradients [*n, columns], ids [*n]) -> [budget]``, float32.
        slots: ``ids -> uint32 [*n, columns]``, the definition; NumPy ids give NumPy slots.
        signs: ``ids -> float32 [*n, columns]``, likewise.
        geometry: what determines the map, as JSON values.
    """

    rows: int
    columns: int
    budget: int
    scale: float
    expand_rows: Callable[[AnyArray, Rows], Array]
    pull_rows: Callable[[AnyArray, Rows], Array]
    slots: Callable[[Rows], AnyArray]
    signs: Callable[[Rows], AnyArray]
    geometry: dict[str, Any]


def block_map(
    rows: int,
    columns: int,
    budget: int,
    *,
    block_size: int = 8,
    seed: int = 0,
    sign: Sign = "none",
    wrap: Wrap = "circular",
    align: int = 1,
    scale: float = 1.0,
) -> SharingMap:
    """Rows cut in blocks of ``block_size`` neighbours that lie side by side in the memory (ROBE-Z).

    Raises:
        TypeError, ValueError: for sizes that are no positive ints, a budget smaller than a block or
            not divisible by ``align``, an unknown sign or wrap, or a scale that is not finite.
    """
    _check(rows, scale)
    layout = BlockGeometry(budget, columns, block_size, seed, sign, wrap, align)
    fields = {name: value for name, value in dataclasses.asdict(layout).items() if name != "features"}

    def expand_rows(memory: AnyArray, ids: Rows) -> Array:
        entries = hash_gather(memory, ids, **_without_budget(fields), features=columns)
        return entries if scale == 1.0 else entries * jnp.asarray(scale, entries.dtype)

    def pull_rows(gradients: AnyArray, ids: Rows) -> Array:
        sums = hash_scatter(gradients, ids, **fields)
        return sums if scale == 1.0 else sums * scale

    return SharingMap(
        rows=rows,
        columns=columns,
        budget=budget,
        scale=scale,
        expand_rows=expand_rows,
        pull_rows=pull_rows,
        slots=lambda ids: _reference.slots(id_limbs(ids), layout),
        signs=lambda ids: _reference.signs(id_limbs(ids), layout),
        geometry={"map": "block", "rows": rows, "columns": columns, "scale": scale, **fields},
    )


def _without_budget(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "budget"}


def element_map(
    rows: int, columns: int, budget: int, *, seed: int = 0, sign: Sign = "element", scale: float = 1.0
) -> SharingMap:
    """Every entry at a slot of its own hash, with a hashed sign (HashedNet): `block_map` with blocks of one.

    Raises:
        TypeError, ValueError: as `block_map`.
    """
    return block_map(rows, columns, budget, block_size=1, seed=seed, sign=sign, scale=scale)


def tile_map(
    rows: int,
    columns: int,
    budget: int,
    *,
    tile: tuple[int, int] = (32, 32),
    seed: int = 0,
    sign: TileSign = "element",
    offset: int = 0,
    align: int = 1,
    scale: float = 1.0,
) -> SharingMap:
    """Tiles of ``bk x bn`` weights, each at a hashed place of the circular memory (ROAST).

    ``offset`` counts the positions that other matrices of the same memory own: it keeps their maps apart.

    Raises:
        TypeError, ValueError: as `TileGeometry`; for a scale that is not finite.
    """
    return _tiled_map(TileGeometry(budget, rows, columns, tile, "tile", seed, sign, offset, align), scale)


def fold_map(
    rows: int,
    columns: int,
    budget: int,
    *,
    tile: tuple[int, int] = (1, 1),
    seed: int = 0,
    sign: TileSign = "element",
    offset: int = 0,
    align: int = 1,
    scale: float = 1.0,
) -> SharingMap:
    """The positions of the model cut in partitions as long as the memory, each rotated by a hash (RANDOMFOLD).

    Every slot serves ``floor(n / budget)`` or ``ceil(n / budget)`` of the model's ``n`` positions, one where
    they fit. That holds over several matrices if they share one ``seed`` and their offsets follow on.

    Raises:
        TypeError, ValueError: as `TileGeometry`; for a scale that is not finite.
    """
    return _tiled_map(TileGeometry(budget, rows, columns, tile, "fold", seed, sign, offset, align), scale)


def _tiled_map(layout: TileGeometry, scale: float) -> SharingMap:
    """The map of a tile geometry by its formula: no table of tiles, however many there are."""
    size, budget = layout.tile_size, layout.budget
    column = np.arange(layout.columns)
    if layout.positions + budget > 2**32:
        raise ValueError(
            f"rows is {layout.rows} and columns is {layout.columns}; their {layout.positions} positions and the "
            f"budget, {budget}, must stay within 2**32"
        )

    def place(ids: Rows) -> tuple[Any, Any]:
        """Number of the tile of each coordinate of the rows, and where in its tile it lies, uint32."""
        row = _small_rows(ids)[..., None]
        number = (row // layout.tile[0]) * layout.grid[1] + column // layout.tile[1]
        inside = (row % layout.tile[0]) * layout.tile[1] + column % layout.tile[1]
        return number.astype(np.uint32), inside.astype(np.uint32)

    def position(number: Any, inside: Any) -> bits.Limbs:
        return bits.add64(bits.flat_index(number, size, inside), bits.split64(layout.offset))

    def slots(ids: Rows) -> AnyArray:
        number, inside = place(ids)
        if layout.map == "tile":
            start = hashed_starts(position(number, np.uint32(0)), budget=budget, align=layout.align, seed=layout.seed)
            slot = start.astype(np.uint32) + inside
        else:
            # Counted from the beginning of the first partition that this matrix touches.
            local = number * np.uint32(size) + inside + np.uint32(layout.offset % budget)
            partition, place_in_it = local // np.uint32(budget), local % np.uint32(budget)
            rotations = fold_rotations(layout)
            rotation = rotations[partition] if isinstance(local, np.ndarray) else jnp.asarray(rotations)[partition]
            slot = rotation + place_in_it
        return slot - np.uint32(budget) * (slot >= budget).astype(np.uint32)

    def signs(ids: Rows) -> AnyArray:
        number, inside = place(ids)
        if layout.sign == "none":
            return np.ones(inside.shape, np.float32)
        negative = sign_bits(layout, position(number, np.uint32(0)), inside)
        return 1 - 2 * negative.astype(np.float32)

    fields = {"map": layout.map, **_fields(layout, "map"), "tile": list(layout.tile), "scale": scale}
    return map_from_slots(layout.rows, layout.columns, budget, slots, signs, fields, scale=scale)


def _fields(layout: Any, *left_out: str) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(layout).items() if name not in left_out}


def _small_rows(ids: Rows) -> Any:
    """Row ids of a matrix that has fewer than 2**31 rows, int32 (NumPy int64 on the host)."""
    words = id_limbs(ids)
    if isinstance(words, bits.Limbs):
        raise TypeError("ids are Limbs; the rows of a matrix in tiles are counted in 32 bits")
    return words.astype(np.int64 if isinstance(words, np.ndarray) else jnp.int32)


def map_from_slots(
    rows: int,
    columns: int,
    budget: int,
    slots: Callable[[Rows], AnyArray],
    signs: Callable[[Rows], AnyArray],
    geometry: dict[str, Any],
    *,
    scale: float = 1.0,
) -> SharingMap:
    """A map given by its definition: entries are gathered one by one, and their gradients added in float32.

    Args:
        rows, columns, budget: of the map.
        slots, signs: of rows ``ids``, as `SharingMap` has them; they are computed again in the backward pass.
        geometry: what determines the map.
        scale: what every entry is multiplied by.

    Raises:
        ValueError: for no rows, or a scale that is not finite.
    """
    _check(rows, scale)

    # Rematerialised: the backward pass of either hashes again, and keeps ids alone.
    @jax.checkpoint
    def expand_rows(memory: AnyArray, ids: Rows) -> Array:
        if memory.shape != (budget,):
            raise ValueError(f"memory has shape {memory.shape}; it must be ({budget},), the map's budget")
        # In float32 at least, so that the gradient of a narrow memory is added up wide.
        wide = jnp.asarray(memory, jnp.promote_types(memory.dtype, jnp.float32))
        entries = wide.at[jnp.asarray(slots(ids)).astype(jnp.int32)].get(mode="clip") * signs(ids)
        return (entries if scale == 1.0 else entries * jnp.asarray(scale, wide.dtype)).astype(memory.dtype)

    @jax.checkpoint
    def pull_rows(gradients: AnyArray, ids: Rows) -> Array:
        signed = jnp.asarray(gradients, jnp.float32)
        signed = (signed if scale == 1.0 else signed * jnp.float32(scale)) * signs(ids)
        return jnp.zeros(budget, jnp.float32).at[jnp.asarray(slots(ids)).astype(jnp.int32)].add(signed, mode="drop")

    return SharingMap(rows, columns, budget, scale, expand_rows, pull_rows, slots, signs, geometry)


def _check(rows: int, scale: float) -> None:
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")


def expand(sharing: SharingMap, memory: Float[AnyArray, " budget"]) -> Float[Array, "rows columns"]:
    """The whole virtual matrix: for tests, small matrices and export."""
    return sharing.expand_rows(memory, _all_rows(sharing))


def pull(sharing: SharingMap, matrix: Float[AnyArray, "rows columns"]) -> Float[Array, " budget"]:
    """The transpose of `expand`, float32."""
    return sharing.pull_rows(matrix, _all_rows(sharing))


def load(sharing: SharingMap) -> Int[Array, " budget"]:
    """How many entries of the virtual matrix each weight serves, int32; counted by blocks of rows."""
    step = max(1, 2**20 // sharing.columns)
    total = jnp.zeros(sharing.budget, jnp.int32)
    for start in range(0, sharing.rows, step):
        ids = jnp.arange(start, min(start + step, sharing.rows), dtype=jnp.uint32)
        total = total.at[sharing.slots(ids).reshape(-1)].add(1)
    return total


def collapse(sharing: SharingMap, matrix: Float[AnyArray, "rows columns"]) -> Float[Array, " budget"]:
    """The memory whose expansion is nearest to ``matrix`` in least squares; 0 in slots that serve nothing."""
    served = jnp.maximum(load(sharing), 1).astype(jnp.float32)
    return pull(sharing, matrix) / (served * sharing.scale**2)


def virtual_matmul(
    x: Float[AnyArray, "*batch columns"],
    memory: Float[AnyArray, " budget"],
    sharing: SharingMap,
    *,
    row_block: int = 256,
) -> Float[Array, "*batch rows"]:
    """``x @ W.T`` with at most ``row_block`` rows of W in existence at a time, forward and backward.

    The backward pass hashes again: what it keeps is ``x`` and the memory. Products are added up in
    float32.

    Args:
        x: inputs.
        memory: the stored weights.
        sharing: the map of W.
        row_block: rows of W expanded at a time.

    Raises:
        ValueError: where x does not have ``sharing.columns`` columns, or row_block is below 1.
    """
    if x.shape[-1] != sharing.columns:
        raise ValueError(f"x has shape {x.shape}; its last axis must be {sharing.columns}, the map's columns")
    if row_block < 1:
        raise ValueError(f"row_block is {row_block}; it must be at least 1")
    x, memory = jnp.asarray(x), jnp.asarray(memory)
    flat = x.reshape(-1, sharing.columns)
    row_block = min(row_block, sharing.rows)
    blocks = -(-sharing.rows // row_block)

    @jax.checkpoint
    def one_block(memory: Array, flat: Array, start: Array) -> Array:
        # The last block may run over the end: rows beyond it are computed and cut off below.
        ids = start + jnp.arange(row_block, dtype=jnp.uint32)
        w = sharing.expand_rows(memory, ids)
        return jnp.einsum("bc,rc->br", flat, w, preferred_element_type=jnp.float32).astype(x.dtype)

    starts = jnp.arange(blocks, dtype=jnp.uint32) * jnp.uint32(row_block)
    y = jax.lax.map(lambda start: one_block(memory, flat, start), starts)
    y = jnp.moveaxis(y, 0, 1).reshape(flat.shape[0], blocks * row_block)[:, : sharing.rows]
    return y.reshape(*x.shape[:-1], sharing.rows)


def _all_rows(sharing: SharingMap) -> Array:
    return jnp.arange(sharing.rows, dtype=jnp.uint32)
