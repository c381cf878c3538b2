"""The op for NVIDIA GPUs through Pallas-Triton (deprecated in JAX since 0.11, hence a file of its own).

A program takes one row, one key head with its query heads, and a tile of slots; it reads each code once. An entry
of a soft table is the product of entries of two pieces (three above 10 bits): 32 floats each, one line of the cache
whose words lie in 32 banks, so that 32 threads look up 32 codes in one go. A whole table of 256 floats would be eight
lines, and some three or four codes of 32 would meet in a bank.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hashml_kernels.annotations import Array
from hashml_kernels.manual_axes import varying_alike
from hashml_kernels.soft_collision_score.operands import Operands, Piece, Scores, judged, piece_tables, pieces_of
from hashml_kernels.triton_arithmetic import count_to, fused, unfused

_FLOATS = ("float32", "bfloat16", "float16")
_PIECE = 5  # bits: 32 floats
_BLOCKS = (16, 512)
_TILE = 512  # slots of a program
_WARPS = 4
_MOST_QUERIES = 8  # of one program; more go to several, which read the codes again
_TABLES = 4  # whose codes are asked for together


def check(operands: Operands, block: int) -> None:
    """Returns if the kernel serves these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for blocks that are no power of 2 from 16 to 512, empty arrays, norms of 64 bits, and
            arrays whose addresses have no 32 bits with a sign.
    """
    if block & (block - 1) or not _BLOCKS[0] <= block <= _BLOCKS[1]:
        raise NotImplementedError(
            f"block is {block}; the Triton kernel takes powers of 2 from {_BLOCKS[0]} to {_BLOCKS[1]}; auto uses XLA"
        )
    if operands.norms is not None and operands.norms.dtype not in _FLOATS:
        raise NotImplementedError(
            f"norms has dtype {operands.norms.dtype}; the Triton kernel takes {_FLOATS}; auto uses XLA"
        )
    batch, heads, queries, _, _, slots = operands.sizes
    held = {"codes": (operands.codes.shape, operands.codes.dtype.itemsize)}
    held["the result"] = ((batch, heads, queries, slots), 4)
    for name, (shape, width) in held.items():
        size = 1
        for side in shape:
            size *= side
        if not size:
            raise NotImplementedError(
                f"{name} has shape {shape}; the Triton kernel takes no empty arrays; auto uses XLA"
            )
        if size >= 2**31 and size * width <= 2**32:
            raise NotImplementedError(
                f"{name} holds {size} numbers; the Triton kernel takes less than 2**31, or more than 2**32 bytes, "
                f"for which addresses have 64 bits; auto uses XLA"
            )


class _Plan(NamedTuple):
    """What the programs do."""

    queries: int
    """Query heads of a key head in a program."""
    shares: int
    """Programs that the query heads of one key head are dealt to."""
    tables: int
    """Tables, with some that are all 0 up to a multiple of those read together."""
    pieces: list[Piece]

    @staticmethod
    def of(operands: Operands) -> "_Plan":
        _, _, queries, tables, bits, _ = operands.sizes
        share = max(n for n in range(1, min(queries, _MOST_QUERIES) + 1) if queries % n == 0)
        return _Plan(share, queries // share, pl.cdiv(tables, _TABLES) * _TABLES, pieces_of(bits, _PIECE))


def _full(x: Any) -> Any:
    return jnp.full(_TILE, x, jnp.int32)


def _kernel(plan: _Plan, tables: int, slots: int, block: int, weighted: bool, fma: Any):
    stride = len(plan.pieces) * plan.queries * 2**_PIECE

    def soft_collision_score(codes, soft, threshold, *refs):
        norms, (values, highest, survivors) = refs[0] if weighted else None, refs[-3:]
        tile = pl.program_id(2)
        slot = tile * _TILE + count_to(_TILE)
        inside = slot < slots

        def read(table: Any) -> Any:
            # Tables beyond the last one are 0, whatever the code.
            row = _full(lax.min(table, jnp.int32(tables - 1)))
            code = plt.load(codes.at[row, slot], mask=inside, other=jnp.zeros((), codes.dtype))
            return code.astype(jnp.int32)

        def look_up(totals: list[Any], table: Any, code: Any) -> list[Any]:
            places = [table * stride + piece.of(code) for piece in plan.pieces]
            found = []
            for j, total in enumerate(totals):
                entries = [
                    plt.load(soft.at[place + (i * plan.queries + j) * 2**_PIECE]) for i, place in enumerate(places)
                ]
                chance = 1.0
                for entry in entries[:-1]:
                    chance = chance * entry
                found.append(fma(chance, entries[-1], total) if len(entries) > 1 else total + entries[0])
            return found

        def step(index: Any, totals: list[Any]) -> list[Any]:
            first = lax.convert_element_type(index, jnp.int32) * _TABLES
            read_together = [read(first + t) for t in range(_TABLES)]
            for t, code in enumerate(read_together):
                totals = look_up(totals, first + t, code)
            return totals

        start = [jnp.zeros(_TILE, jnp.float32)] * plan.queries
        totals = lax.fori_loop(0, plan.tables // _TABLES, step, start)
        norm = jnp.where(inside, jnp.float32(1), jnp.float32(-1))
        if norms is not None:
            norm = plt.load(norms.at[slot], mask=inside, other=jnp.full((), -1, norms.dtype)).astype(jnp.float32)
        own = tile * (_TILE // block) + count_to(_TILE // block)
        exists = own < pl.cdiv(slots, block)
        for j, total in enumerate(totals):
            score = judged(total, norm, threshold[j])
            plt.store(values.at[_full(j), slot], score, mask=inside)
            blocks = jnp.reshape(score, (_TILE // block, block))
            at = jnp.full(own.shape, j, jnp.int32), own
            plt.store(highest.at[at], jnp.max(blocks, axis=1), mask=exists)
            plt.store(survivors.at[at], jnp.sum(blocks > -jnp.inf, axis=1, dtype=jnp.int32), mask=exists)

    return soft_collision_score


def _laid_out(operands: Operands, plan: _Plan) -> Array:
    """Pieces of the soft tables, ``[B, programs, tables x pieces x queries x 32]``."""
    batch, heads, _, tables, _, _ = operands.sizes
    parts = piece_tables(operands.logits, plan.pieces)
    wide = [jnp.pad(part, ((0, 0),) * 4 + ((0, 2**_PIECE - part.shape[-1]),)) for part in parts]
    soft = jnp.stack(wide, axis=4).reshape(batch, heads * plan.shares, plan.queries, tables, len(parts), 2**_PIECE)
    soft = jnp.pad(soft.transpose(0, 1, 3, 4, 2, 5), ((0, 0), (0, 0), (0, plan.tables - tables), *((0, 0),) * 3))
    return soft.reshape(batch, heads * plan.shares, -1)


def scores(operands: Operands, block: int, *, interpret: bool = False) -> Scores:
    """The op.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, block)
    alike, kind = varying_alike(*operands)
    operands = Operands(*alike)
    batch, heads, queries, tables, _, slots = operands.sizes
    plan, blocks = _Plan.of(operands), pl.cdiv(slots, block)
    programs, shares, share = heads * plan.shares, plan.shares, plan.queries
    soft = _laid_out(operands, plan)
    weighted = operands.norms is not None

    def of_head(h: Any) -> Any:
        return lax.div(h, jnp.int32(shares))

    found = pl.pallas_call(
        _kernel(plan, tables, slots, block, weighted, unfused if interpret else fused),
        grid=(batch, programs, pl.cdiv(slots, _TILE)),
        in_specs=[
            pl.BlockSpec((None, None, tables, slots), lambda b, h, n: (b, of_head(h), 0, 0)),
            pl.BlockSpec((None, None, soft.shape[2]), lambda b, h, n: (b, h, 0)),
            pl.BlockSpec((None, None, share), lambda b, h, n: (b, h, 0)),
            *([pl.BlockSpec((None, None, slots), lambda b, h, n: (b, of_head(h), 0))] if weighted else []),
        ],
        out_specs=[
            pl.BlockSpec((None, None, share, width), lambda b, h, n: (b, h, 0, 0))
            for width in (slots, blocks, blocks)
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, programs, share, width), dtype, manual_axis_type=kind)
            for width, dtype in ((slots, jnp.float32), (blocks, jnp.float32), (blocks, jnp.int32))
        ],
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="soft_collision_score",
    )(
        operands.codes,
        soft,
        operands.threshold.reshape(batch, programs, share),
        *([operands.norms] if weighted else []),
    )
    return Scores(*(x.reshape(batch, heads, queries, -1) for x in found))
