"""The op for TPUs: pages of rows by DMA into a double buffer, whose numbers wait in scalar memory.

A step of the grid takes `_TOKENS` rows of one list. While it computes, the pages of the next step, be it of the same
list or of another, are on their way; a page that does not count is not fetched. Single rows are refused: a copy of
256 bytes is mostly waiting.

Products run on the matrix unit. Where rows are bfloat16, float32 numbers meet them in three pieces of eight bits,
stacked: the unit is busy with the rows, and more queries cost it nothing. Logits lie along the lanes, one row of
sublanes a query.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels.annotations import Array
from hashml_kernels.manual_axes import varying_alike
from hashml_kernels.sparse_decode.lists import MASKED, Operands, Partial, tokens

_LANES = 128
_SUBLANES = 8
_TOKENS = 512  # rows of a step
_PIECES = 3  # of a float32 number, 8 bits each
_LEAST_PAGE = {"float32": 8, "bfloat16": 16}
_MOST_WIDTH = 1024
_MOST_QUERIES = 128
_SCALAR_BYTES = 512 * 2**10  # of the 1 MiB of a v5e
_VECTOR_BYTES = 64 * 2**20


def check(operands: Operands, *, page: int) -> None:
    """Returns if the kernel serves these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for single rows and pages that fill no tiles, dtypes other than bfloat16 and float32,
            heads that fill no lanes, empty lists, and more pages than fit scalar memory.
    """
    batch, lists, queries, entries, slots = operands.sizes
    for name, array in (("k", operands.k), ("v", operands.v)):
        least = _LEAST_PAGE.get(str(array.dtype))
        if least is None:
            raise NotImplementedError(
                f"{name} has dtype {array.dtype}; the TPU kernel takes {tuple(_LEAST_PAGE)}; auto uses XLA"
            )
        if page < least or page > _TOKENS or page & (page - 1):
            raise NotImplementedError(
                f"page is {page}; of {array.dtype} the TPU kernel fetches pages of {least} to {_TOKENS} rows, a "
                f"power of 2, since a DMA of a single row is mostly waiting; auto uses XLA"
            )
        width = array.shape[3]
        if width % _LANES or width > _MOST_WIDTH:
            raise NotImplementedError(
                f"{name} has heads of {width}; the TPU kernel takes multiples of {_LANES} up to {_MOST_WIDTH}; "
                f"auto uses XLA"
            )
    if slots % page:
        raise NotImplementedError(f"k has {slots} slots; the TPU kernel takes whole pages of {page}; auto uses XLA")
    if not batch or not entries or queries > _MOST_QUERIES:
        raise NotImplementedError(
            f"there are {batch} rows, {entries} entries of a list and {queries} queries that share one; the TPU "
            f"kernel takes at least 1, 1 and at most {_MOST_QUERIES}; auto uses XLA"
        )
    pages = batch * lists * _steps(entries, page) * (_TOKENS // page)
    if 4 * pages > _SCALAR_BYTES:
        raise NotImplementedError(
            f"idx names {pages} pages; the TPU kernel holds {_SCALAR_BYTES // 4} in scalar memory; auto uses XLA"
        )


def _steps(entries: int, page: int) -> int:
    return pl.cdiv(entries * page, _TOKENS)


def _pieces(x: Any) -> Any:
    """Float32 ``[n, m]`` as bfloat16 ``[3 n, m]`` whose parts add up to it exactly."""
    found = []
    for _ in range(_PIECES):
        # Cut off, not rounded: no compiler takes that for an excess of precision.
        high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & -(2**16), jnp.float32)
        found.append(high)
        x = x - high
    return jnp.concatenate(found).astype(jnp.bfloat16)


def _times(x: Any, rows: Any, contract: int) -> Any:
    """Float32 ``x [n, m]`` times ``rows``, over their axis ``contract``, with all bits of both."""
    dimensions = (((1,), (contract,)), ((), ()))
    if rows.dtype == jnp.float32:
        return lax.dot_general(
            x, rows, dimensions, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
    found = lax.dot_general(_pieces(x), rows, dimensions, preferred_element_type=jnp.float32)
    return sum(jnp.split(found, _PIECES))


def _kernel(plan: tuple[int, int, int], pages, length, q, bias, k, v, value, mass, top, *scratch) -> None:
    """``plan``: lists, lists of a key head, steps of a list."""
    lists, sharing, steps = plan
    *buffers, semaphores = scratch
    (keys, values), (count, page) = buffers, buffers[0].shape[1:3]
    index = pl.program_id(2)
    step = (pl.program_id(0) * lists + pl.program_id(1)) * steps + index
    last = pl.num_programs(0) * lists * steps - 1

    def each_page(step: Any, act: Any) -> None:
        """``act(place in the buffer, page's number)`` for the pages of a step; -1: it does not count."""

        @pl.loop(0, count)
        def _(place):
            act(place, pages[step * count + place])

    def copies(step: Any, place: Any, number: Any) -> list[Any]:
        owner, slot = lax.div(step, steps), lax.rem(step, 2)
        row, head = lax.div(owner, lists), lax.div(lax.rem(owner, lists), sharing)
        return [
            pltpu.make_async_copy(x.at[row, head, number], buffer.at[slot, place], semaphores.at[slot, i])
            for i, (x, buffer) in enumerate(((k, keys), (v, values)))
        ]

    def fetch(step: Any) -> None:
        def one(place: Any, number: Any) -> None:
            @pl.when(number >= 0)
            def _():
                for copy in copies(step, place, number):
                    copy.start()

        each_page(step, one)

    @pl.when(step == 0)
    def _():
        fetch(step)

    @pl.when(step < last)
    def _():
        fetch(step + 1)

    slot, limit = lax.rem(step, 2), length[pl.program_id(0)]

    def arrived(place: Any, number: Any) -> None:
        """Values that do not count become zeros: they meet a share of 0."""

        @pl.when(number >= 0)
        def _():
            for copy in copies(step, place, number):
                copy.wait()

        first = jnp.maximum(number, 0) * page

        @pl.when((number < 0) | (first + page > limit))
        def _():
            row = first + lax.broadcasted_iota(jnp.int32, values.shape[2:], 0)
            counts = (number >= 0) & (row < limit)
            found = values[slot, place].astype(jnp.float32)
            values[slot, place] = jnp.where(counts, found, 0.0).astype(values.dtype)

    each_page(step, arrived)

    @pl.when(index == 0)
    def _():
        value[...] = jnp.zeros_like(value)
        mass[...] = jnp.zeros_like(mass)
        top[...] = jnp.full_like(top, MASKED)

    along = bias[0, 0]
    counts = along > MASKED / 2
    logits = _times(q[0, 0], keys[slot].reshape(count * page, -1), 1) + along
    logits = jnp.where(counts, logits, MASKED)
    before = top[0, 0][:, :1]
    highest = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    kept = jnp.exp(before - highest)
    p = jnp.where(counts, jnp.exp(logits - highest), 0.0)
    top[0, 0] = jnp.broadcast_to(highest, top.shape[2:])
    mass[0, 0] = mass[0, 0] * kept + jnp.sum(p, axis=1, keepdims=True)
    value[0, 0] = value[0, 0] * kept + _times(p, values[slot].reshape(count * page, -1), 0)


def _of_list(*sides: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, *sides), lambda b, s, i, *_: (b, s, 0, 0))


def _in_pages(x: Array, page: int) -> Array:
    """``[B, K, pages, page, D]``: no copy, since pages fill tiles."""
    return x.reshape(*x.shape[:2], -1, page, x.shape[3])


def partial(
    operands: Operands, *, page: int, scale: float, interpret: bool | pltpu.InterpretParams = False
) -> Partial:
    """The sums over the whole list.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, page=page)
    alike, kind = varying_alike(*operands)
    operands = Operands(*alike)
    batch, lists, queries, entries, slots = operands.sizes
    steps, count = _steps(entries, page), _TOKENS // page
    short = ((0, 0), (0, 0), (0, steps * count - entries))
    padded = operands._replace(
        idx=jnp.pad(operands.idx, short), valid=jnp.pad(operands.valid, short), weight=jnp.pad(operands.weight, short)
    )
    spread = tokens(padded, page)
    # Of a page's tokens the first one counts if any does.
    first = spread.valid[:, :, ::page]
    pages = jnp.where(first, spread.idx[:, :, ::page] // page, -1).reshape(-1)
    bias = jnp.where(spread.valid, jnp.log(jnp.where(spread.valid, spread.weight, 1.0)), MASKED)[:, :, None]
    rows = -(-queries // _SUBLANES) * _SUBLANES
    q = jnp.pad(operands.q.astype(jnp.float32) * scale, ((0, 0), (0, 0), (0, rows - queries), (0, 0)))
    width, across = operands.k.shape[3], operands.v.shape[3]

    def shape(*last: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, lists, *last), jnp.float32, manual_axis_type=kind)

    call = pl.pallas_call(
        functools.partial(_kernel, (lists, lists // operands.k.shape[1], steps)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, lists, steps),
            in_specs=[
                _of_list(rows, width),
                pl.BlockSpec((1, 1, 1, _TOKENS), lambda b, s, i, *_: (b, s, 0, i)),
                *[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            ],
            out_specs=[_of_list(rows, across), *[_of_list(rows, _LANES)] * 2],
            scratch_shapes=[
                *(pltpu.VMEM((2, count, page, x.shape[3]), x.dtype) for x in (operands.k, operands.v)),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=[shape(rows, across), shape(rows, _LANES), shape(rows, _LANES)],
        # Steps follow each other on one core: each fetches for the next.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=_VECTOR_BYTES),
        interpret=interpret,
        name="sparse_decode",
    )
    limit = jnp.minimum(operands.length, np.int32(slots))
    with jax.enable_x64(False):  # a TPU has no loop counters of 64 bits
        value, mass, top = call(pages, limit, q, bias, *(_in_pages(x, page) for x in (operands.k, operands.v)))
    return Partial(value[:, :, :queries], mass[:, :, :queries, 0], top[:, :, :queries, 0])
