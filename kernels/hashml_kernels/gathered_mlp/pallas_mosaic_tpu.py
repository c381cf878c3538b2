"""The op for TPUs: a step of the grid takes one block of neurons, whose number waits in scalar memory.

The blocks of the matrices are chosen by the grid's own index map, so that the pipeline of Pallas fetches the next
ones while one is multiplied. An entry that does not count names the block before it, which is there already, and is
skipped. Single neurons are refused: a row of a few KiB is mostly waiting.

Channels lie along the lanes, neurons along the sublanes. Products are float32 on the vector unit: an input meets a
block once, and the matrix unit would be filled for a product with few rows. Products are added up by lane, a hidden
number is a column, and it meets its row of the last matrix as such.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels.annotations import Array
from hashml_kernels.gathered_mlp.lists import Activation, Operands, activate
from hashml_kernels.manual_axes import varying_alike

_LANES = 128
_LEAST_BLOCK = {"float32": 8, "bfloat16": 16}
_MOST_BLOCK = 128
_MOST_ROWS = 8
_CHUNK = 512  # channels of a step of the loop inside the kernel, at most
_SCALAR_BYTES = 512 * 2**10  # of the 1 MiB of a v5e
_VECTOR_BYTES = 96 * 2**20  # of the 128 MiB of a v5e or v6e


def check(operands: Operands, *, block: int) -> None:
    """Returns if the kernel serves these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for single neurons and blocks that fill no tiles, many inputs to a list, dtypes other
            than bfloat16 and float32, widths that fill no lanes, empty lists, and more than the memories hold.
    """
    lists, rows, entries, count, width = operands.sizes
    for name, array in operands.weights().items():
        least = _LEAST_BLOCK.get(str(array.dtype))
        if least is None:
            raise NotImplementedError(
                f"{name} has dtype {array.dtype}; the TPU kernel takes {tuple(_LEAST_BLOCK)}; auto uses XLA"
            )
        if block % least or block > _MOST_BLOCK:
            raise NotImplementedError(
                f"block is {block}; of {array.dtype} the TPU kernel takes multiples of {least} neurons up to "
                f"{_MOST_BLOCK}, since a DMA of a single row is mostly waiting; auto uses XLA"
            )
    if count % block:
        raise NotImplementedError(
            f"w_in has {count} neurons; the TPU kernel takes whole blocks of {block}; auto uses XLA"
        )
    if width % _LANES:
        raise NotImplementedError(f"x has width {width}; the TPU kernel takes multiples of {_LANES}; auto uses XLA")
    if not lists or not entries or not 1 <= rows <= _MOST_ROWS:
        raise NotImplementedError(
            f"there are {lists} lists of {entries} entries for {rows} rows; the TPU kernel takes at least 1, 1 and "
            f"1 to {_MOST_ROWS}; auto uses XLA"
        )
    if 8 * lists * entries > _SCALAR_BYTES:
        raise NotImplementedError(
            f"idx names {lists * entries} blocks; the TPU kernel holds {_SCALAR_BYTES // 8} in scalar memory; auto "
            f"uses XLA"
        )
    held = sum(2 * block * width * array.dtype.itemsize for array in operands.weights().values())
    if held + 4 * 8 * rows * width > _VECTOR_BYTES:
        raise NotImplementedError(
            f"blocks of {block} neurons of width {width} need {held} bytes of vector memory; the TPU kernel has "
            f"{_VECTOR_BYTES}; auto uses XLA"
        )


def _kernel(
    entries: int, chunk: int, biased: bool, activation: Activation, blocks, counts, x, w_in, w_out, *refs
) -> None:
    *others, out = refs
    del blocks  # read by the index maps
    matrices = [w_in, *others[biased:]]
    step = pl.program_id(1)
    neurons, width = w_in.shape
    rows = x.shape[0]

    @pl.when(step == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    @pl.when(counts[pl.program_id(0) * entries + step] > 0)
    def _():
        def part(index: Any) -> Any:
            return pl.ds(pl.multiple_of(index * chunk, chunk), chunk)

        def multiply(index: Any, sums: Any) -> Any:
            own = part(index)
            inputs = x[:, own]
            found = []
            for weights, totals in zip(matrices, sums, strict=True):
                tile = weights[:, own].astype(jnp.float32)
                found.append([total + _by_lane(tile * inputs[r : r + 1]) for r, total in enumerate(totals)])
            return found

        zeros = jnp.zeros((neurons, _LANES), jnp.float32)
        sums = lax.fori_loop(0, width // chunk, multiply, [[zeros] * rows for _ in matrices])
        hidden = []
        for r in range(rows):
            value = jnp.sum(sums[0][r], axis=1, keepdims=True)
            if biased:
                value = value + others[0][:, :1]
            value = activate(activation)(value)
            if len(matrices) > 1:
                value = value * jnp.sum(sums[1][r], axis=1, keepdims=True)
            hidden.append(value)

        def spread(index: Any, _: Any) -> Any:
            own = part(index)
            tile = w_out[:, own].astype(jnp.float32)
            for r, value in enumerate(hidden):
                out[r : r + 1, own] += jnp.sum(tile * value, axis=0, keepdims=True)
            return 0

        lax.fori_loop(0, width // chunk, spread, 0)


def _by_lane(x: Any) -> Any:
    """``[rows, channels]`` summed up to ``[rows, 128]``."""
    return functools.reduce(jnp.add, jnp.split(x, x.shape[1] // _LANES, axis=1))


def apply(
    operands: Operands, *, activation: Activation, block: int, interpret: bool | pltpu.InterpretParams = False
) -> Array:
    """``[L, R, E]``, float32.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, block=block)
    (operands,), kind = varying_alike(operands)
    lists, rows, entries, count, width = operands.sizes
    valid = operands.valid & (operands.idx >= 0) & (operands.idx < count // block)
    # Where an entry does not count: the place of the last one before it that does.
    last = lax.cummax(jnp.where(valid, jnp.arange(entries, dtype=jnp.int32), 0), axis=1)
    named = jnp.clip(jnp.take_along_axis(operands.idx, last, axis=1), 0, count // block - 1)
    chunk = max(n for n in range(_LANES, min(_CHUNK, width) + 1, _LANES) if width % n == 0)
    of_block = pl.BlockSpec((block, width), lambda i, j, blocks, _: (blocks[i * entries + j], 0))
    of_list = pl.BlockSpec((None, rows, width), lambda i, j, *_: (i, 0, 0))
    arrays, specs = [], []
    if operands.b_in is not None:
        # A column a block, spread along the lanes: biases are few beside the matrices' rows.
        places = named[..., None] * block + jnp.arange(block, dtype=jnp.int32)
        bias = operands.b_in.astype(jnp.float32)[places]
        arrays.append(jnp.broadcast_to(bias[..., None], (*bias.shape, _LANES)))
        specs.append(pl.BlockSpec((None, None, block, _LANES), lambda i, j, *_: (i, j, 0, 0)))
    if operands.w_gate is not None:
        arrays.append(operands.w_gate)
        specs.append(of_block)
    call = pl.pallas_call(
        functools.partial(_kernel, entries, chunk, operands.b_in is not None, activation),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(lists, entries),
            in_specs=[of_list, of_block, of_block, *specs],
            out_specs=of_list,
        ),
        out_shape=jax.ShapeDtypeStruct((lists, rows, width), jnp.float32, manual_axis_type=kind),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VECTOR_BYTES
        ),
        interpret=interpret,
        name="gathered_mlp",
    )
    x = operands.x.astype(jnp.float32)
    with jax.enable_x64(False):  # a TPU has no loop counters of 64 bits
        return call(named.reshape(-1), valid.astype(jnp.int32).reshape(-1), x, operands.w_in, operands.w_out, *arrays)
