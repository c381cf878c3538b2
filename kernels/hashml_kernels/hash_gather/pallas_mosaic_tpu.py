"""The op for TPUs, in whole lines of 128 lanes: blocks that start and end at multiples of 128.

The memory is a list of lines, and a block is a run of them, each wrapped on its own. XLA hashes the
line numbers, one int32 for 512 bytes of a row, because the kernel needs them as scalars, and a scalar
core would take a hundred steps for what the vector units do 1024 at a time; they reach the kernel
through scalar memory, a tile of bags at a time. A memory of up to `_RESIDENT_BYTES` stays in vector
memory; a larger one stays in HBM and its lines are fetched by DMA, `_DEPTH` steps ahead. Gradients
are added up in vector memory. A lookup is a bag of one member, so two kernels serve four ops.
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
from hashml_kernels.hash_gather.geometry import BlockGeometry, block_bases, block_signs
from hashml_kernels.manual_axes import varying_alike

_LANES = 128
_GROUP = 8  # rows a step works on: the sublanes of a register
_DEPTH = 16
_RESIDENT_BYTES = 32 * 2**20  # of the 128 MiB of vector memory of a v5e or v6e
_SCALARS = 8192  # line numbers of a tile in scalar memory
_ROWS = 256
_LINES_OF_A_ROW = 16
_CHUNK = 256  # lines zeroed at once


def check(op: str, *operands: Any, geometry: BlockGeometry) -> None:
    """Returns if the kernels serve these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for blocks that are no whole lines, rows of more than 2048 features, signs of
            elements, ids in limbs, no ids at all, other dtypes than float32 and bfloat16, and for a large
            memory if it is bfloat16 or receives gradients.
    """
    values, ids, *weights = operands
    if isinstance(ids, bits.Limbs):
        raise NotImplementedError("ids are bits.Limbs; the TPU kernels take ids of 32 bits")
    if 0 in ids.shape:
        raise NotImplementedError(f"ids has shape {ids.shape}; the TPU kernels take at least one id")
    for name in ("budget", "features", "block_size", "align"):
        if getattr(geometry, name) % _LANES:
            raise NotImplementedError(
                f"{name} is {getattr(geometry, name)}; the TPU kernels take multiples of {_LANES}"
            )
    if geometry.features > _LINES_OF_A_ROW * _LANES:
        raise NotImplementedError(
            f"features is {geometry.features}; the TPU kernels take at most {_LINES_OF_A_ROW * _LANES}"
        )
    if geometry.sign == "element":
        raise NotImplementedError("sign is 'element'; the TPU kernels take 'none' and 'block'")
    names = "memory" if op.startswith("gather") else "gradients", "weights"
    for name, array in zip(names, (values, *weights), strict=False):
        if array is not None and array.dtype not in ("float32", "bfloat16"):
            raise NotImplementedError(f"{name} has dtype {array.dtype}; the TPU kernels take float32 and bfloat16")
    if not _resident(geometry):
        if op.startswith("scatter"):
            raise NotImplementedError(
                f"budget is {geometry.budget}; the TPU kernels add gradients up to {_RESIDENT_BYTES // 4} weights"
            )
        if values.dtype != jnp.float32:
            raise NotImplementedError(
                f"memory has dtype {values.dtype} and {geometry.budget} weights; beyond "
                f"{_RESIDENT_BYTES // 4} the TPU kernels take float32"
            )


def _resident(geometry: BlockGeometry) -> bool:
    return _accumulator_lines(geometry) * _LANES * 4 <= _RESIDENT_BYTES


def _accumulator_lines(geometry: BlockGeometry) -> int:
    """Lines of the memory and at least one more, where what must not be added is added."""
    return pl.cdiv(geometry.budget // _LANES + 1, _CHUNK) * _CHUNK


class _Tile(NamedTuple):
    """The bags of one step of the grid, and how many members of each."""

    rows: int
    members: int
    lines: int

    @property
    def scalars(self) -> int:
        return self.rows * self.members * self.lines


def _tile(geometry: BlockGeometry, n: int, members: int) -> _Tile:
    lines = geometry.features // _LANES
    members = min(members, _SCALARS // (_GROUP * lines))
    rows = min(_ROWS, _SCALARS // (members * lines), n + _GROUP - 1)
    return _Tile(rows // _GROUP * _GROUP, members, lines)


# --- what XLA prepares ----------------------------------------------------------------------------


def _tiled(scalars: bits.Words, tile: _Tile) -> jax.Array:
    """``[n, members]`` regrouped as ``[row tiles * member tiles, 1, rows * members of a tile]``, with zeros."""
    n, members = scalars.shape
    row_tiles, member_tiles = pl.cdiv(n, tile.rows), pl.cdiv(members, tile.members)
    padding = ((0, row_tiles * tile.rows - n), (0, member_tiles * tile.members - members))
    scalars = jnp.pad(scalars, padding).reshape(row_tiles, tile.rows, member_tiles, tile.members)
    return scalars.swapaxes(1, 2).reshape(row_tiles * member_tiles, 1, tile.rows * tile.members)


def _line_numbers(geometry: BlockGeometry, tile: _Tile, words: jax.Array) -> jax.Array:
    """Lines of the memory ``[tiles, lines, rows * members]`` that hold the rows of tiled ids, int32."""
    block = np.arange(geometry.blocks, dtype=np.uint32)[:, None]
    first = (block_bases(geometry, words, block) // np.uint32(_LANES)).astype(jnp.int32)[:, :, None, :]
    line = first + jnp.arange(geometry.block_size // _LANES, dtype=jnp.int32)[:, None]
    lines = geometry.budget // _LANES
    line = jnp.where(line >= lines, line - lines, line)
    return line.reshape(words.shape[0], -1, words.shape[2])[:, : tile.lines]


def _scales(geometry: BlockGeometry, tile: _Tile, words: jax.Array, weights: jax.Array | None) -> jax.Array | None:
    """Weight times sign of each line ``[tiles, lines or 1, rows * members]``, float32; None if all are 1."""
    scales = None if weights is None else _tiled(weights.astype(jnp.float32), tile)
    if geometry.sign == "none":
        return scales
    column = np.arange(tile.lines, dtype=np.uint32)[:, None] * np.uint32(_LANES)
    signs = 1.0 - 2.0 * block_signs(geometry, words, column).astype(jnp.float32)
    return signs if scales is None else scales * signs


# --- the kernels ----------------------------------------------------------------------------------


def _gather_kernel(tile: _Tile, members: int, resident: bool, scaled: bool, *refs: Any) -> None:
    lines, scales, memory, out, rows, semaphores, *copy = refs if scaled else (refs[0], None, *refs[1:])
    depth = rows.shape[0]
    count = jnp.minimum(tile.members, members - pl.program_id(1) * tile.members)
    steps = tile.rows // _GROUP * count  # a step is one member of each of `_GROUP` bags

    def places(step):
        """For each line of a step: row of the group, line of the row, and where its scalars are."""
        group, member = lax.div(step, count), lax.rem(step, count)
        for row in range(_GROUP):
            for line in range(tile.lines):
                yield row, line, (group * _GROUP + row) * tile.members + member

    def transfers(step):
        slot = lax.rem(step, np.int32(depth))
        for row, line, place in places(step):
            first = pl.multiple_of(lines[0, line, place] * _LANES, _LANES)
            yield pltpu.make_async_copy(
                memory.at[pl.ds(first, _LANES)], rows.at[slot, line, row], semaphores.at[slot]
            )

    def start(step):
        @pl.when(step < steps)
        def _():
            for transfer in transfers(step):
                transfer.start()

    def read(step):
        for row, line, place in places(step):
            rows[0, line, pl.ds(row, 1), :] = copy[0][pl.ds(lines[0, line, place], 1), :]

    @pl.when(pl.program_id(1) == 0)
    def _():
        if members > 1:
            out[...] = jnp.zeros_like(out)

    if resident:

        @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
        def _():
            whole = pltpu.make_async_copy(memory, copy[0], semaphores.at[0])
            whole.start()
            whole.wait()

    else:
        pl.loop(0, depth - 1)(start)

    @pl.loop(0, steps)
    def _(step):
        slot = lax.rem(step, np.int32(depth))
        if resident:
            read(step)
        else:
            start(step + depth - 1)
            for transfer in transfers(step):
                transfer.wait()
        if scales is not None:
            for row, line, place in places(step):
                at = (slot, line, pl.ds(row, 1))
                rows[at] = rows[at] * scales[0, min(line, scales.shape[1] - 1), place]
        group = pl.ds(pl.multiple_of(lax.div(step, count) * _GROUP, _GROUP), _GROUP)
        for line in range(tile.lines):
            lanes = pl.ds(line * _LANES, _LANES)
            value = rows[slot, line]
            out[group, lanes] = value if members == 1 else out[group, lanes] + value


def _scatter_kernel(tile: _Tile, scaled: bool, *refs: Any) -> None:
    lines, scales, gradients, out, total, rows, semaphore = refs if scaled else (refs[0], None, *refs[1:])
    step = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)

    @pl.when(step == 0)
    def _():
        @pl.loop(0, total.shape[0] // _CHUNK)
        def _(chunk):
            total[pl.ds(pl.multiple_of(chunk * _CHUNK, _CHUNK), _CHUNK), :] = jnp.zeros((_CHUNK, _LANES), jnp.float32)

    @pl.loop(0, tile.rows // _GROUP)
    def _(group):
        first = pl.multiple_of(group * _GROUP, _GROUP)
        for line in range(tile.lines):
            rows[line] = gradients[pl.ds(first, _GROUP), pl.ds(line * _LANES, _LANES)]

        @pl.loop(0, tile.members)
        def _(member):
            for row in range(_GROUP):
                for line in range(tile.lines):
                    place = (first + row) * tile.members + member
                    value = rows[line, pl.ds(row, 1), :]
                    if scales is not None:
                        value = value * scales[0, min(line, scales.shape[1] - 1), place]
                    at = pl.ds(lines[0, line, place], 1)
                    total[at, :] = total[at, :] + value

    @pl.when(step == pl.num_programs(0) * pl.num_programs(1) - 1)
    def _():
        whole = pltpu.make_async_copy(total.at[pl.ds(0, out.shape[0])], out, semaphore)
        whole.start()
        whole.wait()


def _scalar_specs(tile: _Tile, members: int, scalars: list[jax.Array]) -> list[pl.BlockSpec]:
    def place(i, j):
        return i * pl.cdiv(members, tile.members) + j, 0, 0

    return [pl.BlockSpec((1, *array.shape[1:]), place, memory_space=pltpu.SMEM) for array in scalars]


def _parameters(vector_bytes: int) -> pltpu.CompilerParams:
    # Tiles of the grid follow each other on one core: they share the resident memory.
    return pltpu.CompilerParams(
        dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=vector_bytes + 16 * 2**20
    )


# --- the ops --------------------------------------------------------------------------------------


def gather(
    memory: Float[Array, " budget"],
    ids: bits.Words,
    geometry: BlockGeometry,
    *,
    interpret: bool | pltpu.InterpretParams = False,
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
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, " budget"]:
    """The transpose of `gather`, float32.

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
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "n features"]:
    """Weighted sums of rows over the members of each bag, added up in float32.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("gather_bag", memory, ids, weights, geometry=geometry)

    @jax.custom_batching.custom_vmap
    def call(memory, ids, weights):
        return _gather_call(memory, ids, weights, geometry, interpret)

    @call.def_vmap
    def _(size, batched, memory, ids, weights):
        memory_batched, ids_batched, weights_batched = batched
        if memory_batched:
            return _one_by_one(call, size, batched, (memory, ids, weights)), True
        # Rows of one memory: a batch of batches is a longer batch.
        ids = _longer(size, ids_batched, ids)
        weights = None if weights is None else _longer(size, weights_batched, weights)
        return call(memory, ids, weights).reshape(size, -1, geometry.features), True

    return call(memory, ids, weights)


def _longer(size: int, batched: bool, pairs: jax.Array) -> jax.Array:
    """``[size * n, members]`` of what is ``[n, members]``, or has an axis of ``size`` before them."""
    pairs = pairs if batched else jnp.broadcast_to(pairs, (size, *pairs.shape))
    return pairs.reshape(-1, pairs.shape[-1])


def _one_by_one(call, size: int, batched: Any, operands: tuple[Any, ...]) -> jax.Array:
    """A batch of calls in a loop: Pallas cannot batch an array that stays in HBM."""
    leaves, tree = jax.tree.flatten(operands)
    flags = jax.tree.leaves(batched)

    def one(index):
        return call(*jax.tree.unflatten(tree, [x[index] if own else x for x, own in zip(leaves, flags, strict=True)]))

    return lax.map(one, jnp.arange(size))


def _gather_call(memory, ids, weights, geometry: BlockGeometry, interpret) -> jax.Array:
    n, members = ids.shape
    tile = _tile(geometry, n, members)
    words = _tiled(ids, tile)
    scales = _scales(geometry, tile, words, weights)
    scalars = [_line_numbers(geometry, tile, words), *([] if scales is None else [scales])]
    resident = _resident(geometry)
    depth = 1 if resident else _DEPTH
    scratch = [pltpu.VMEM((depth, tile.lines, _GROUP, _LANES), jnp.float32), pltpu.SemaphoreType.DMA((depth,))]
    source = memory.astype(jnp.float32).reshape(-1, _LANES) if resident else memory
    if resident:
        scratch.append(pltpu.VMEM(source.shape, jnp.float32))
    operands, kind = varying_alike(*scalars, source)
    call = pl.pallas_call(
        functools.partial(_gather_kernel, tile, members, resident, scales is not None),
        grid=(pl.cdiv(n, tile.rows), pl.cdiv(members, tile.members)),
        in_specs=[*_scalar_specs(tile, members, scalars), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((tile.rows, geometry.features), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((n, geometry.features), jnp.float32, manual_axis_type=kind),
        scratch_shapes=scratch,
        compiler_params=_parameters(geometry.budget * 4 if resident else 0),
        interpret=interpret,
        name="hash_gather_bag",
    )
    with jax.enable_x64(False):  # a TPU has no loop counters of 64 bits
        bags = call(*operands)
    return bags.astype(memory.dtype)


def scatter_bag(
    gradients: Float[Array, "n features"],
    ids: bits.Words,
    weights: Float[Array, "n members"] | None,
    geometry: BlockGeometry,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, " budget"]:
    """The transpose of `gather_bag` in the memory, float32; bags are never spread to their members.

    Raises:
        NotImplementedError: what `check` says.
    """
    check("scatter_bag", gradients, ids, weights, geometry=geometry)

    @jax.custom_batching.custom_vmap
    def call(gradients, ids, weights):
        return _scatter_call(gradients, ids, weights, geometry, interpret)

    @call.def_vmap
    def _(size, batched, *operands):
        return _one_by_one(call, size, batched, operands), True

    return call(gradients, ids, weights)


def _scatter_call(gradients, ids, weights, geometry: BlockGeometry, interpret) -> jax.Array:
    n, members = ids.shape
    tile = _tile(geometry, n, members)
    words = _tiled(ids, tile)
    exists = _tiled(jnp.ones(ids.shape, bool), tile)
    nowhere = geometry.budget // _LANES
    scales = _scales(geometry, tile, words, weights)
    scalars = [jnp.where(exists, _line_numbers(geometry, tile, words), nowhere)]
    if scales is not None:
        scalars.append(scales)
    lines = _accumulator_lines(geometry)
    operands, kind = varying_alike(*scalars, gradients.astype(jnp.float32))
    call = pl.pallas_call(
        functools.partial(_scatter_kernel, tile, scales is not None),
        grid=(pl.cdiv(n, tile.rows), pl.cdiv(members, tile.members)),
        in_specs=[
            *_scalar_specs(tile, members, scalars),
            pl.BlockSpec((tile.rows, geometry.features), lambda i, j: (i, 0)),
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct((geometry.budget // _LANES, _LANES), jnp.float32, manual_axis_type=kind),
        scratch_shapes=[
            pltpu.VMEM((lines, _LANES), jnp.float32),
            pltpu.VMEM((tile.lines, _GROUP, _LANES), jnp.float32),
            pltpu.SemaphoreType.DMA,
        ],
        compiler_params=_parameters(lines * _LANES * 4),
        interpret=interpret,
        name="hash_scatter_bag",
    )
    with jax.enable_x64(False):
        total = call(*operands)
    return total.reshape(geometry.budget)
