"""The op for TPUs: slots lie along the lanes, key heads or tables along the sublanes.

A step of the grid takes one row and some slots of all its key heads. An entry of a soft table is the product of the
entries of its pieces, of 7 bits each: 128 floats are the lanes of a register, which is looked up by a gather along
lanes, for eight tables, or eight heads, at a time. A piece of one bit, the eighth of a byte, is chosen by it instead:
that is cheaper than a second gather. Pieces of all tables and query heads stay in vector memory for a whole row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels.annotations import Array
from hashml_kernels.half_floats import half_to_float
from hashml_kernels.manual_axes import varying_alike
from hashml_kernels.soft_collision_score.operands import Operands, Piece, Scores, judged, piece_tables, pieces_of

_LANES = 128
_SUBLANES = 8
_FLOATS = ("float32", "bfloat16", "float16")
_PIECE = 7  # bits: 128 floats
_BLOCKS = (128, 256, 512)
_MOST_QUERIES = _SUBLANES
_SLOTS = 1024  # of a step of the grid
_CHUNK = 512  # slots whose sums lie in registers
_VECTOR_BYTES = 96 * 2**20  # of the 128 MiB of a v5e or v6e


def check(operands: Operands, block: int) -> None:
    """Returns if the kernel serves these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for blocks other than 128, 256 and 512, more than 8 query heads a key head, fewer slots
            than a block, norms of 64 bits, and tables beyond vector memory.
    """
    batch, _, queries, _, _, slots = operands.sizes
    if block not in _BLOCKS:
        raise NotImplementedError(f"block is {block}; the TPU kernel takes {_BLOCKS}; auto uses XLA")
    if queries > _MOST_QUERIES:
        raise NotImplementedError(
            f"a key head has {queries} query heads; the TPU kernel takes at most {_MOST_QUERIES}; auto uses XLA"
        )
    if slots < block or not batch:
        raise NotImplementedError(
            f"codes has {batch} rows of {slots} slots; the TPU kernel takes a block, {block}, or more; auto uses XLA"
        )
    if operands.norms is not None and operands.norms.dtype not in _FLOATS:
        raise NotImplementedError(
            f"norms has dtype {operands.norms.dtype}; the TPU kernel takes {_FLOATS}; auto uses XLA"
        )
    held = _vector_bytes(operands, block)
    if held > _VECTOR_BYTES:
        raise NotImplementedError(
            f"tables and codes need {held} bytes of vector memory; the TPU kernel has {_VECTOR_BYTES}; auto uses XLA"
        )


def _vector_bytes(operands: Operands, block: int) -> int:
    """About what the kernel holds: arrays that come and go twice."""
    _, heads, queries, tables, bits, _ = operands.sizes
    plan = _Plan.of(operands, block)
    outer, rows = (tables, heads) if plan.heads_together else (heads, pl.cdiv(tables, _SUBLANES) * _SUBLANES)
    soft = outer * queries * sum(map(_lines, pieces_of(bits, _PIECE))) * rows * _LANES * 4
    codes = outer * (pl.cdiv(rows, 32) * 32) * plan.slots * operands.codes.dtype.itemsize
    results = heads * _SUBLANES * (plan.slots + 2 * plan.lanes + _LANES) * 4
    return 2 * (soft + codes + results) + 3 * heads * plan.slots * 4


def _lines(piece: Piece) -> int:
    """Lines of 128 floats that a piece takes."""
    return 2 if piece.width == 1 else 1


class _Plan(NamedTuple):
    """What a step of the grid takes."""

    heads_together: bool
    """Whether eight heads lie along the sublanes, and not eight tables of one head."""
    slots: int
    chunk: int
    lanes: int
    """Blocks of a row, up to full registers."""

    @staticmethod
    def of(operands: Operands, block: int) -> "_Plan":
        _, heads, _, tables, _, slots = operands.sizes
        # So XLA keeps such codes on a TPU, heads inside of tables, since it saves padding: no copy.
        together = heads % _SUBLANES == 0 and tables % _SUBLANES > 0
        chunk = _CHUNK if slots >= _CHUNK else block
        lanes = pl.cdiv(slots, block * _LANES) * _LANES
        return _Plan(together, _SLOTS if slots >= _SLOTS else chunk, chunk, lanes)


# --- inside the kernel ----------------------------------------------------------------------------


def _along_lanes(table: Any, index: Any) -> Any:
    """``table[i, index[i, n]]`` for a table of 128 columns."""
    if index.shape[0] > 1:
        return jnp.take_along_axis(table, index, axis=1)
    # A single row is no gather that Mosaic knows.
    table, index = (jnp.broadcast_to(x, (_SUBLANES, x.shape[1])) for x in (table, index))
    return jnp.take_along_axis(table, index, axis=1)[:1]


def _across(line: Any, slots: int) -> Any:
    """A line whose lanes are alike, for as many slots."""
    return jnp.concatenate([line] * (slots // _LANES), axis=1)


def _entries(line: Callable[[int], Any], pieces: list[Piece], code: Any) -> Any:
    """Of eight soft tables, or fewer, at their codes ``[rows, slots]``; ``line(i)`` is the i-th of their pieces."""
    chance, first = None, 0
    for piece in pieces:
        index = piece.of(code)
        if piece.width == 1:
            unset, put = (_across(line(first + k), index.shape[1]) for k in range(2))
            entry = jnp.where(index == 1, put, unset)
        else:
            entry = _along_lanes(line(first), index)
        chance = entry if chance is None else chance * entry
        first += _lines(piece)
    return chance


def _kernel(pieces: list[Piece], plan: _Plan, slots: int, block: int, weighted: bool, *refs) -> None:
    codes, soft, threshold, *rest = refs
    values, highest, survivors = rest[weighted : weighted + 3]
    step = pl.program_id(1)
    heads, queries, outer, rows = *values.shape[1:3], *codes.shape[1:3]
    norms, lengths = (rest[0], rest[-1]) if weighted else (None, None)
    if norms is not None and lengths is not None:
        own = norms[0]
        # Mosaic has no float16: they come as their bits.
        lengths[...] = half_to_float(own) if own.dtype == jnp.uint16 else own.astype(jnp.float32)

    def sums(place: Any, first: int, last: int, here: Any, totals: list[Any]) -> list[Any]:
        """Totals of each query with the entries of rows ``first .. last - 1`` of what lies at ``place``."""
        code = codes[0, place, first:last, here].astype(jnp.int32)
        return [
            total + _entries(lambda line, j=j: soft[0, place, j, line, first:last, :], pieces, code)
            for j, total in enumerate(totals)
        ]

    def finish(h: Any, start: Any, totals: Any) -> None:
        """Writes what sums ``[queries, chunk]`` of head h make."""
        here = pl.ds(start, plan.chunk)
        slot = step * plan.slots + start + lax.broadcasted_iota(jnp.int32, (1, plan.chunk), 1)
        norm = jnp.where(slot < slots, 1.0 if lengths is None else lengths[pl.ds(h, 1), here], -1.0)
        found = judged(totals, norm, _across(threshold[0, h], plan.chunk))
        values[0, h, :, here] = found
        lane = lax.broadcasted_iota(jnp.int32, (queries, _LANES), 1)
        for i in range(plan.chunk // block):
            own = found[:, i * block : (i + 1) * block]
            number = lax.div(step * plan.slots + start, block) + i
            window = pl.ds(pl.multiple_of(lax.div(number, _LANES) * _LANES, _LANES), _LANES)
            its_lane = lane == lax.rem(number, _LANES)
            most = jnp.max(own, axis=1, keepdims=True)
            count = jnp.sum(jnp.where(own > -jnp.inf, 1.0, 0.0), axis=1, keepdims=True).astype(jnp.int32)
            highest[0, h, :, window] = jnp.where(its_lane, most, highest[0, h, :, window])
            survivors[0, h, :, window] = jnp.where(its_lane, count, survivors[0, h, :, window])

    def zeros(count: int) -> list[Any]:
        return [jnp.zeros((count, plan.chunk), jnp.float32)] * queries

    def eight_heads(first: int, here: Any, table: Any, totals: list[Any]) -> list[Any]:
        return sums(table, first, first + _SUBLANES, here, totals)

    def of_heads_together(c: Any, _: Any) -> Any:
        start = pl.multiple_of(c * plan.chunk, plan.chunk)
        here = pl.ds(start, plan.chunk)
        for first in range(0, heads, _SUBLANES):
            add = functools.partial(eight_heads, first, here)
            totals = lax.fori_loop(0, outer, add, zeros(_SUBLANES))
            for i in range(_SUBLANES):
                finish(first + i, start, jnp.concatenate([total[i : i + 1] for total in totals]))
        return 0

    def of_one_head(index: Any, _: Any) -> Any:
        chunks = plan.slots // plan.chunk
        h, start = lax.div(index, chunks), pl.multiple_of(lax.rem(index, chunks) * plan.chunk, plan.chunk)
        here, full = pl.ds(start, plan.chunk), rows // _SUBLANES * _SUBLANES
        totals = zeros(_SUBLANES)
        for first in range(0, full, _SUBLANES):
            totals = sums(h, first, first + _SUBLANES, here, totals)
        totals = [jnp.sum(total, axis=0, keepdims=True) for total in totals]
        if full < rows:
            few = sums(h, full, rows, here, zeros(rows - full))
            totals = [a + jnp.sum(b, axis=0, keepdims=True) for a, b in zip(totals, few, strict=True)]
        finish(h, start, jnp.concatenate(totals))
        return 0

    if plan.heads_together:
        lax.fori_loop(0, plan.slots // plan.chunk, of_heads_together, 0)
    else:
        lax.fori_loop(0, heads * (plan.slots // plan.chunk), of_one_head, 0)


# --- the op ---------------------------------------------------------------------------------------


def _laid_out(operands: Operands, pieces: list[Piece]) -> Array:
    """Lines of 128 floats: ``[B, K, J, lines, L, 128]``."""
    lines = []
    for piece, table in zip(pieces, piece_tables(operands.logits, pieces), strict=True):
        if piece.width == 1:
            lines += [jnp.broadcast_to(table[..., k, None], (*table.shape[:-1], _LANES)) for k in range(2)]
        else:
            lines.append(jnp.pad(table, ((0, 0),) * 4 + ((0, _LANES - table.shape[-1]),)))
    return jnp.stack(lines, axis=3)


def scores(operands: Operands, block: int, *, interpret: bool | pltpu.InterpretParams = False) -> Scores:
    """The op.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, block)
    alike, kind = varying_alike(*operands)
    operands = Operands(*alike)
    batch, heads, queries, _, bits, slots = operands.sizes
    plan, pieces, blocks = _Plan.of(operands, block), pieces_of(bits, _PIECE), pl.cdiv(slots, block)
    codes, soft = operands.codes, _laid_out(operands, pieces)
    if plan.heads_together:
        codes, soft = codes.swapaxes(1, 2), soft.swapaxes(1, 4)
    threshold = jnp.broadcast_to(operands.threshold[..., None], (batch, heads, queries, _LANES))
    norms = []
    if operands.norms is not None:
        half = operands.norms.dtype == jnp.float16
        norms = [lax.bitcast_convert_type(operands.norms, jnp.uint16) if half else operands.norms]
    call = pl.pallas_call(
        functools.partial(_kernel, pieces, plan, slots, block, bool(norms)),
        grid=(batch, pl.cdiv(slots, plan.slots)),
        in_specs=[
            pl.BlockSpec((1, *codes.shape[1:3], plan.slots), lambda b, n: (b, 0, 0, n)),
            pl.BlockSpec((1, *soft.shape[1:]), lambda b, n: (b, 0, 0, 0, 0, 0)),
            pl.BlockSpec((1, *threshold.shape[1:]), lambda b, n: (b, 0, 0, 0)),
            *(pl.BlockSpec((1, heads, plan.slots), lambda b, n: (b, 0, n)) for _ in norms),
        ],
        out_specs=[
            pl.BlockSpec((1, heads, queries, plan.slots), lambda b, n: (b, 0, 0, n)),
            *[pl.BlockSpec((1, heads, queries, plan.lanes), lambda b, n: (b, 0, 0, 0))] * 2,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, queries, width), dtype, manual_axis_type=kind)
            for width, dtype in ((slots, jnp.float32), (plan.lanes, jnp.float32), (plan.lanes, jnp.int32))
        ],
        scratch_shapes=[pltpu.VMEM((heads, plan.slots), jnp.float32) for _ in norms],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VECTOR_BYTES
        ),
        interpret=interpret,
        name="soft_collision_score",
    )
    with jax.enable_x64(False):  # a TPU has no loop counters of 64 bits
        values, highest, survivors = call(codes, soft, threshold, *norms)
    return Scores(values, highest[..., :blocks], survivors[..., :blocks])
