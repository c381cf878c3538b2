"""The op for TPUs: 1024 lanes of the code fill a register, and a step of the grid decodes up to four of them.

A TPU reads no address of a lane's own from its memories. So the stretch of the stream that belongs to a step's lanes
comes to vector memory by DMA, and is turned: 128 lanes of the code give a tile, whose row ``c`` is what follows the
first word of lane ``c``, put in place by a gather along the lanes, and whose transpose has the k-th word of every
lane in row ``k``. All lanes are near the same ``k`` at any time. A window is then chosen from the few rows that some
lane needs, by comparing numbers, ``_TOGETHER`` units after the range of these rows was last looked at.

A word of the code is looked up by its first 7 bits in a table of 128 entries, by a gather along the lanes; a longer
one in the row of the whole table that its next bits name. These are the last rows, since words are given out in the
order of their lengths: nearly always the last one alone.

The four symbols of a unit are neighbours in the result, where they lie in one number of 32 bits here. Gathers along
the lanes spread 128 of these over four lines of the result, and the rests, which are bytes, as far as those share
them; floats are joined there. XLA would give each unit a line of 128 bytes to itself, of which it fills four.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels.annotations import Array
from hashml_kernels.huffman_decode.operands import UNIT, Geometry, Operands, first_places
from hashml_kernels.manual_axes import varying_alike

_LANES = 128
_SUBLANES = 8
_REGISTER = _LANES * _SUBLANES
_FIRST = 7  # bits of the first look-up
_FAR = -1  # entry of the first table where a word has more bits
_TOGETHER = 4  # units of a range of rows
_CANDIDATES = 4  # rows of a turn
_UNROLL = 8  # lanes whose words are put in place in a turn
_PIECE = 64  # rows of 128 words that a DMA brings
_MOST_REGISTERS = 4
_LEAST_LANES = 256
_VECTOR_BYTES = 96 * 2**20  # of the 128 MiB of a v5e or v6e


def check(operands: Operands, geometry: Geometry) -> None:
    """Returns if the kernel serves these operands; only shapes are looked at.

    Raises:
        NotImplementedError: for few lanes, chunks whose words do not fit in vector memory, and long streams.
    """
    if geometry.lanes < _LEAST_LANES:
        raise NotImplementedError(
            f"starts has {geometry.lanes} lanes; the TPU kernel takes {_LEAST_LANES} or more; auto uses XLA"
        )
    size = operands.words.shape[0]
    if size >= 2**30:
        raise NotImplementedError(f"words has {size} entries; the TPU kernel takes less than 2**30; auto uses XLA")
    held = _Plan.of(operands, geometry).vector_bytes(geometry)
    if held > _VECTOR_BYTES:
        raise NotImplementedError(
            f"chunks of {UNIT * geometry.steps} symbols need {held} bytes of vector memory; the TPU kernel has "
            f"{_VECTOR_BYTES}; auto uses XLA"
        )


class _Plan(NamedTuple):
    """What a step of the grid takes."""

    registers: int
    """Of 1024 lanes."""
    pages: int
    """Of 128 words, that the longest chunk and what is read beyond it may have."""
    pieces: int
    """Copies that bring the stream of all lanes at most."""

    @staticmethod
    def of(operands: Operands, geometry: Geometry) -> "_Plan":
        registers = min(_MOST_REGISTERS, pl.cdiv(geometry.lanes, _REGISTER))
        words = pl.cdiv(31 + UNIT * geometry.steps * operands.max_length, 32)
        # Aligned to 8 rows before, some rows more behind.
        rows = pl.cdiv(registers * _REGISTER * words, _LANES) + 16
        return _Plan(registers, pl.cdiv(words + 3, _LANES), pl.cdiv(rows, _PIECE))

    @property
    def lanes(self) -> int:
        return self.registers * _REGISTER

    @property
    def rows(self) -> int:
        """Of the stream in vector memory; some more than copies bring, as the last lane's pages reach beyond."""
        return self.pieces * _PIECE + pl.cdiv(self.pages + 2, _SUBLANES) * _SUBLANES

    @property
    def stride(self) -> int:
        """Rows of 128 turned lanes."""
        return self.pages * _LANES

    def vector_bytes(self, geometry: Geometry) -> int:
        """About what the kernel holds; what comes and goes is there twice."""
        lines = self.registers * _SUBLANES
        outer = lines * geometry.steps * (_lines(geometry) * geometry.dtype.itemsize + _rest_lines(geometry))
        inner = self.rows + lines * (self.stride + _lines(geometry) + _rest_lines(geometry)) + 3 * _LANES + 200
        return _LANES * (2 * outer + 4 * inner)


def _lines(geometry: Geometry) -> int:
    """Lines of 128 numbers that 128 units give."""
    return UNIT * geometry.numbers


def _rest_lines(geometry: Geometry) -> int:
    """Lines of 128 bytes that hold the rests of 128 units."""
    return 0 if geometry.form is None else _lines(geometry) * geometry.form.rest_bits // 8


def _right(x: Any, by: Any) -> Any:
    """A shift that brings zeros."""
    by = jnp.broadcast_to(jnp.asarray(by, jnp.int32), x.shape)
    return lax.shift_right_logical(x, by)


def _look_up(table: Any, index: Any) -> Any:
    """``table[i, index[i, n]]`` for a table of 128 columns."""
    return jnp.take_along_axis(table, index, axis=1)


def _spread(line: Any, groups: int, bits: int, part: int, order: int) -> Any:
    """Of the entries of the ``part``-th of ``groups`` shares of a line, all groups of bits, one a lane.

    ``order`` is added, bit by bit, to a group's number, the lowest bits being the first: 0 leaves it as it is.
    """
    lane = lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), 1)
    if groups > 1:
        shift = bits.bit_length() - 1, groups.bit_length() - 1
        line = _look_up(line, (_LANES // groups) * part + (lane >> shift[1]))
        line = _right(line, (lane & (groups - 1) ^ order) << shift[0])
    return line & (2**bits - 1)


def _kernel(plan: _Plan, geometry: Geometry, max_length: int, scalars, places, shifts, table, words, *refs) -> None:
    stream, near, following, offsets, turned, done, numbers, *scratch = refs[-7 - (geometry.form is not None) :]
    *_, out = refs[: len(refs) - 7 - len(scratch)]
    rest, rests = (refs[0], scratch[0]) if scratch else (None, None)
    steps, form, a_unit, of_rests = geometry.steps, geometry.form, _lines(geometry), _rest_lines(geometry)
    tile, tiles = pl.program_id(0), pl.num_programs(0)
    origin, pieces, pages = scalars[tile], scalars[tiles + tile], scalars[2 * tiles + tile]
    first_far, rows = scalars[3 * tiles], 2**max_length // _LANES

    def copy(index: Any) -> Any:
        source = pl.multiple_of(origin + index * _PIECE, _SUBLANES)
        target = pl.multiple_of(index * _PIECE, _PIECE)
        return pltpu.make_async_copy(words.at[pl.ds(source, _PIECE)], stream.at[pl.ds(target, _PIECE)], done)

    lax.fori_loop(0, pieces, lambda i, _: copy(i).start(), None)
    lax.fori_loop(0, pieces, lambda i, _: copy(i).wait(), None)

    # --- turn: word k of lane c to row k ---

    lane = lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 1)

    def page(number: Any, _: Any) -> None:
        group, which = lax.div(number, pages), lax.rem(number, pages)

        def row(c: Any, _: Any) -> None:
            place = places[group * _LANES + c]
            start = lax.shift_right_logical(place, 7) + which
            near[pl.ds(c, 1), :] = stream[pl.ds(start, 1), :]
            following[pl.ds(c, 1), :] = stream[pl.ds(start + 1, 1), :]
            offsets[pl.ds(c, 1), :] = jnp.full((1, _LANES), place & (_LANES - 1), jnp.int32)

        lax.fori_loop(0, _LANES, row, None, unroll=_UNROLL)
        index = lane + offsets[...]
        inside = index < _LANES
        index = index & (_LANES - 1)
        found = jnp.where(inside, _look_up(near[...], index), _look_up(following[...], index))
        target = pl.multiple_of(group * plan.stride + which * _LANES, _LANES)
        turned[pl.ds(target, _LANES), :] = found.T

    lax.fori_loop(0, plan.registers * _SUBLANES * pages, page, None)

    # --- decode ---

    shape = (_SUBLANES, _LANES)

    def entries(row: Any) -> Any:
        return jnp.broadcast_to(table[pl.ds(row, 1), :], shape)

    def symbols(uppers: list[Any]) -> list[Any]:
        """Entries of the words at the head of each window."""
        numbers = [_right(upper, 32 - max_length) for upper in uppers]
        columns = [number & (_LANES - 1) for number in numbers]
        last = entries(rows)
        whole = [_look_up(last, column) for column in columns]

        def other(row: Any, whole: list[Any]) -> list[Any]:
            own = entries(1 + row)
            return [
                jnp.where(lax.shift_right_logical(number, jnp.full(shape, 7)) == row, _look_up(own, column), entry)
                for number, column, entry in zip(numbers, columns, whole, strict=True)
            ]

        whole = lax.fori_loop(first_far, rows - 1, other, whole)
        short = entries(0)
        found = [_look_up(short, _right(upper, 32 - _FIRST)) for upper in uppers]
        return [jnp.where(a == _FAR, b, a) for a, b in zip(found, whole, strict=True)]

    def windows(positions: list[Any], lowest: Any, highest: Any) -> list[tuple[Any, Any]]:
        """The next 64 bits of each lane, from rows ``lowest .. highest``."""
        at = [_right(position, 5) for position in positions]

        def turn(index: Any, found: list[Any]) -> list[Any]:
            first = lowest + index * _CANDIDATES
            new = []
            for g, (own, place) in enumerate(zip(found, at, strict=True)):
                own = list(own)
                # Whose first, second or third word is this row?
                its = {i: place == first + i for i in range(-2, _CANDIDATES)}
                for i in range(_CANDIDATES):
                    row = jnp.minimum(first + i, plan.stride - 1)
                    word = turned[pl.ds(g * _SUBLANES * plan.stride + row, _SUBLANES, stride=plan.stride), :]
                    own = [jnp.where(its[i - k], word, x) for k, x in enumerate(own)]
                new.append(own)
            return new

        empty = [[jnp.zeros(shape, jnp.int32)] * 3 for _ in positions]
        found = lax.fori_loop(0, lax.div(highest - lowest, _CANDIDATES) + 1, turn, empty)
        result = []
        for (a, b, c), position in zip(found, positions, strict=True):
            shift = position & 31
            upper = a << shift | _right(_right(b, 1), 31 - shift)
            result.append((upper, b << shift | _right(_right(c, 1), 31 - shift)))
        return result

    def number(g: int, unit: Any, j: int) -> Any:
        """Line ``j`` of the numbers of 128 units each."""
        # Of pairs, the first lies in the high nibble of its byte.
        symbol = _spread(unit, a_unit, 32 // a_unit, j, int(a_unit > UNIT))
        if form is None or rests is None:
            return symbol
        groups = a_unit // of_rests
        own = rests[pl.ds(g * _SUBLANES * of_rests + j // groups, _SUBLANES, stride=of_rests), :]
        return form.join(symbol, _spread(own, groups, form.rest_bits, j % groups, groups - 1))

    def block(index: Any, positions: list[Any]) -> list[Any]:
        at = [_right(position, 5) for position in positions]
        lowest = jnp.min(functools.reduce(jnp.minimum, at))
        ahead = pl.cdiv((_TOGETHER - 1) * UNIT * max_length + 31, 32) + 2
        highest = jnp.minimum(jnp.max(functools.reduce(jnp.maximum, at)) + ahead, plan.stride - 1)
        lowest = jnp.minimum(lowest, highest)

        def unit(t: Any, positions: list[Any]) -> list[Any]:
            both = windows(positions, lowest, highest)
            units = [jnp.zeros(shape, jnp.int32) for _ in positions]
            for k in range(UNIT):
                found = symbols([upper for upper, _ in both])
                lengths = [_right(entry, 8) for entry in found]
                units = [x | (entry & 255) << (8 * k) for x, entry in zip(units, found, strict=True)]
                both = [
                    (upper << n | _right(_right(lower, 1), 31 - n), lower << n)
                    for (upper, lower), n in zip(both, lengths, strict=True)
                ]
                positions = [position + n for position, n in zip(positions, lengths, strict=True)]
            if rest is not None and rests is not None:
                rests[...] = rest[t].astype(jnp.int32)
            for g, x in enumerate(units):
                for j in range(a_unit):
                    here = pl.ds(g * _SUBLANES * a_unit + j, _SUBLANES, stride=a_unit)
                    numbers[here, :] = number(g, x, j)
            out[t] = numbers[...].astype(out.dtype)
            return positions

        first = index * _TOGETHER
        return lax.fori_loop(first, jnp.minimum(first + _TOGETHER, steps), unit, positions)

    start = [shifts[pl.ds(g * _SUBLANES, _SUBLANES), :] for g in range(plan.registers)]
    lax.fori_loop(0, pl.cdiv(steps, _TOGETHER), block, start)


def _laid_out(operands: Operands, geometry: Geometry, plan: _Plan) -> tuple[Array, Array, Array, Array, Array]:
    """Scalars of the steps, place of each lane in its step's stream, first bits, tables, and lines of the stream."""
    lanes, size = geometry.lanes, operands.words.shape[0]
    tiles = pl.cdiv(lanes, plan.lanes)
    first = jnp.minimum(first_places(operands, geometry), jnp.uint32(size - 1)).astype(jnp.int32)
    following = jnp.append(first[1:], jnp.int32(size))
    spans = jnp.clip(following - first + 3, 1, plan.stride)
    more = (0, tiles * plan.lanes - lanes)
    first, following, spans, shifts = (
        jnp.pad(x, more, mode="edge").reshape(tiles, plan.lanes)
        for x in (first, following, spans, operands.starts.astype(jnp.int32) & 31)
    )
    # A DMA wants whole tiles of 8 rows.
    origin = first[:, 0] // _REGISTER * _SUBLANES
    places = jnp.clip(first - origin[:, None] * _LANES, 0, plan.pieces * _PIECE * _LANES - 1)
    rows = (following[:, -1] - origin * _LANES) // _LANES + 2
    pieces = jnp.clip((rows + _PIECE - 1) // _PIECE, 1, plan.pieces)
    pages = (spans.max(axis=1) + _LANES - 1) // _LANES

    table = operands.table.astype(jnp.int32)
    near = table[:: 2 ** (operands.max_length - _FIRST)]
    near = jnp.where(near >> 8 <= _FIRST, near, _FAR)
    lines = table.reshape(-1, _LANES)
    far = (lines >> 8 > _FIRST).any(axis=1)
    first_far = jnp.where(far.any(), jnp.argmax(far), far.shape[0]).astype(jnp.int32)
    scalars = jnp.concatenate([origin, pieces, pages, first_far[None]]).astype(jnp.int32)

    held = pl.cdiv(size, _LANES) + plan.pieces * _PIECE
    words = lax.bitcast_convert_type(operands.words, jnp.int32)
    words = jnp.pad(words, (0, held * _LANES - size)).reshape(held, _LANES)
    return scalars, places.reshape(-1), shifts.reshape(-1, _LANES), jnp.concatenate([near[None], lines]), words


def _rests_laid_out(rest: Array, geometry: Geometry, lanes: int) -> Array:
    """Lines of 128 bytes, ``[steps, lines, 128]``, for as many lanes."""
    of_lane = _rest_lines(geometry)  # bytes of a unit
    whole = jnp.pad(rest, (0, geometry.steps * geometry.lanes * of_lane - rest.shape[0]))
    whole = whole.reshape(geometry.steps, geometry.lanes * of_lane)
    more = (lanes - geometry.lanes) * of_lane
    return jnp.pad(whole, ((0, 0), (0, more))).reshape(geometry.steps, -1, _LANES)


def decode(operands: Operands, geometry: Geometry, *, interpret: bool | pltpu.InterpretParams = False) -> Array:
    """The op.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, geometry)
    alike, kind = varying_alike(*operands)
    operands = Operands(*alike)
    plan = _Plan.of(operands, geometry)
    scalars, places, shifts, table, words = _laid_out(operands, geometry, plan)
    steps, tiles, rows = geometry.steps, places.shape[0] // plan.lanes, plan.registers * _SUBLANES
    lines, rests = rows * _lines(geometry), []
    if operands.rest is not None:
        rests.append(_rests_laid_out(operands.rest, geometry, tiles * plan.lanes))
    call = pl.pallas_call(
        functools.partial(_kernel, plan, geometry, operands.max_length),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles,),
            in_specs=[
                pl.BlockSpec((plan.lanes,), lambda n, _: (n,), memory_space=pltpu.SMEM),
                pl.BlockSpec((rows, _LANES), lambda n, _: (n, 0)),
                pl.BlockSpec(table.shape, lambda n, _: (0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                *(pl.BlockSpec((steps, x.shape[1] // tiles, _LANES), lambda n, _: (0, n, 0)) for x in rests),
            ],
            out_specs=pl.BlockSpec((steps, lines, _LANES), lambda n, _: (0, n, 0)),
            scratch_shapes=[
                pltpu.VMEM((plan.rows, _LANES), jnp.int32),
                *[pltpu.VMEM((_LANES, _LANES), jnp.int32)] * 3,
                pltpu.VMEM((plan.registers * _SUBLANES * plan.stride, _LANES), jnp.int32),
                pltpu.SemaphoreType.DMA,
                pltpu.VMEM((lines, _LANES), jnp.int32),
                *(pltpu.VMEM((x.shape[1] // tiles, _LANES), jnp.int32) for x in rests),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((steps, tiles * lines, _LANES), geometry.dtype, manual_axis_type=kind),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_VECTOR_BYTES),
        interpret=interpret,
        name="huffman_decode",
    )
    with jax.enable_x64(False):  # a TPU has no loop counters of 64 bits
        numbers = call(scalars, places, shifts, table, words, *rests)
    numbers = numbers.reshape(steps, tiles * lines * _LANES)[:, : geometry.lanes * _lines(geometry)]
    return numbers.reshape(-1)[: geometry.total]
