"""The op for NVIDIA GPUs through Pallas-Triton (deprecated in JAX since 0.11, hence a file of its own).

A thread decodes a lane, and a program is one warp, so that few lanes still reach all multiprocessors. A thread keeps
the next 33 to 64 bits of its stream in two registers and the word after them in a third, which is asked for when the
one before it is used up. Words are looked up by their first 8 bits in a table of 512 bytes, four lines of the cache:
in the whole table of 8 KB, 32 threads would meet in some 25 lines. The few longer words are looked up in it.

Units of a step lie side by side: what 32 threads read of the rests and write of the floats is one run of bytes.
The stream's are not, since each thread walks through a stretch of its own. So a program first reads its whole part
of the stream, a sector of 32 bytes a thread, and decodes from the cache. Nobody uses the checksum of what was read;
it is written so that the reads are not taken for superfluous.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hashml_kernels.annotations import Array
from hashml_kernels.huffman_decode.operands import UNIT, Geometry, Operands
from hashml_kernels.manual_axes import varying_alike
from hashml_kernels.triton_arithmetic import count_to

_LANES = 32  # of a program: a warp
_FIRST = 8  # bits of the first look-up
_FAR = 0xFFFF  # entry of the first table where a word has more bits
_SECTOR = 8  # words that come into the cache together
_UNITS = 4  # units of a turn of the loop, whose rests are asked for a turn before


def check(operands: Operands, geometry: Geometry) -> None:
    """Returns if the kernel serves these operands; only shapes are looked at.

    Raises:
        NotImplementedError: for arrays whose places have no 32 bits with a sign.
    """
    numbers = (geometry.steps + 2 * _UNITS) * (geometry.lanes + _LANES) * UNIT * geometry.numbers
    for name, size in (("words", operands.words.shape[0] + _LANES * _SECTOR), ("the result", numbers)):
        if size >= 2**31:
            raise NotImplementedError(
                f"{name} takes {size} places; the Triton kernel counts up to 2**31 - 1; auto uses XLA"
            )


def _unsigned(x: Any) -> Any:
    return lax.convert_element_type(x, jnp.uint32)


def _signed(x: Any) -> Any:
    return lax.convert_element_type(x, jnp.int32)


def _kernel(geometry: Geometry, size: int, max_length: int):
    lanes, steps, form = geometry.lanes, geometry.steps, geometry.form
    across = UNIT * geometry.numbers
    turns = pl.cdiv(steps, _UNITS)

    def huffman_decode(words, bases, starts, first, table, *refs):
        rest, (out, checksum) = refs[0] if form is not None else None, refs[-2:]
        begin = pl.program_id(0) * _LANES
        lane = begin + count_to(_LANES)
        inside = lane < lanes

        def entrance(lane: Any) -> tuple[Any, Any]:
            """First word and bit of a lane; of the last one for those beyond."""
            lane = lax.min(lane, jnp.full(lane.shape, lanes - 1, jnp.int32))
            start = _unsigned(plt.load(starts.at[lane]))
            base = plt.load(bases.at[lax.div(lane, jnp.full(lane.shape, geometry.lanes_a_base, jnp.int32))])
            return base + (start >> 5), start & 31

        def clipped(place: Any) -> Any:
            return _signed(jnp.minimum(place, jnp.uint32(size - 1)))

        # The stretch of all lanes of the program, into the cache.
        one = jnp.zeros(1, jnp.int32)
        low = jnp.max(clipped(entrance(one + begin)[0]))
        after = jnp.max(clipped(entrance(one + (begin + _LANES))[0]))
        high = jnp.where(begin + _LANES < lanes, after, jnp.int32(size - 1))
        most = pl.cdiv(_LANES * (UNIT * steps * max_length + 64), 32 * _LANES * _SECTOR)
        tiles = lax.clamp(jnp.int32(0), lax.div(high - low, jnp.int32(_LANES * _SECTOR)) + 1, jnp.int32(most))

        def touch(index: Any, seen: Any) -> Any:
            place = low + (_signed(index) * _LANES + count_to(_LANES)) * _SECTOR
            return seen ^ plt.load(words.at[place], mask=place <= high, other=jnp.uint32(0))

        seen = lax.fori_loop(jnp.int32(0), tiles, touch, jnp.zeros(_LANES, jnp.uint32))
        total = jnp.sum(lax.bitcast_convert_type(seen, jnp.int32), dtype=jnp.int32)
        plt.store(checksum.at[one], jnp.broadcast_to(total, (1,)))

        def numbers(step: Any) -> tuple[Any, Any]:
            """Places of the numbers of a step, ``[lanes, across]``, and which there are."""
            place = ((step * lanes + lane) * across)[:, None] + count_to(across)[None, :]
            return place, inside[:, None] & (place < geometry.total)

        def rests(turn: Any) -> tuple[Any, ...]:
            if rest is None or form is None:
                return ()
            found = []
            for i in range(_UNITS):
                place, there = numbers(turn * _UNITS + i)
                if form.rest_bits < 8:
                    place = lax.div(place, jnp.full(place.shape, 8 // form.rest_bits, jnp.int32))
                found.append(plt.load(rest.at[place], mask=there, other=jnp.uint8(0)))
            return tuple(found)

        def write(step: Any, unit: Any, rest: Any) -> None:
            place, there = numbers(step)
            k = count_to(across)[None, :]
            if form is None:
                value = unit[:, None] >> _unsigned(8 * k) & 255
            else:
                if form.pairs:  # of each byte, the high nibble first
                    value = unit[:, None] >> _unsigned(4 * (k ^ 1)) & 15
                else:
                    value = unit[:, None] >> _unsigned(8 * k) & 255
                rest = _unsigned(rest)
                if form.rest_bits < 8:
                    a_byte = 8 // form.rest_bits
                    # A unit's numbers begin with a byte of rests.
                    rest = rest >> _unsigned(8 - form.rest_bits * (1 + (k & (a_byte - 1)))) & (2**form.rest_bits - 1)
                value = form.join(value, rest)
            plt.store(out.at[place], value.astype(out.dtype), mask=there)

        def refill(state: tuple[Any, ...]) -> tuple[Any, ...]:
            """At least 33 bits; there are 5 or more, since two words have at most 28."""
            upper, lower, bits, ahead, place = state
            need = bits <= 32
            left = jnp.where(need, bits, jnp.uint32(32))
            ready = jnp.where(need, ahead, jnp.uint32(0))
            upper |= ready >> 1 >> (left - 1)
            lower |= ready << (32 - left)
            ahead = jnp.where(need, plt.load(words.at[clipped(place)], mask=need, other=jnp.uint32(0)), ahead)
            return upper, lower, jnp.where(need, bits + 32, bits), ahead, jnp.where(need, place + 1, place)

        def symbol(state: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
            upper, lower, bits, *later = state
            entry = _unsigned(plt.load(first.at[_signed(upper >> (32 - _FIRST))]))
            if max_length > _FIRST:
                far = entry == _FAR
                whole = plt.load(table.at[_signed(upper >> (32 - max_length))], mask=far, other=jnp.uint16(0))
                entry = jnp.where(far, _unsigned(whole), entry)
            length = entry >> 8
            upper = upper << length | lower >> 1 >> (31 ^ length)
            return entry & 255, (upper, lower << length, bits - length, *later)

        def turn(index: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            index = _signed(index)
            state, now = carry
            ahead = rests(index + 1)
            for i in range(_UNITS):
                unit = jnp.zeros(_LANES, jnp.uint32)
                for k in range(UNIT):
                    if k % 2 == 0:
                        state = refill(state)
                    found, state = symbol(state)
                    unit |= found << (8 * k)
                write(index * _UNITS + i, unit, now[i] if now else None)
            return state, ahead

        place, shift = entrance(lane)
        upper, lower, ahead = (plt.load(words.at[clipped(place + i)]) for i in range(3))
        upper = upper << shift | lower >> 1 >> (31 ^ shift)
        state = upper, lower << shift, 64 - shift, ahead, place + 3
        lax.fori_loop(jnp.int32(0), jnp.int32(turns), turn, (state, rests(jnp.int32(0))))

    return huffman_decode


def decode(operands: Operands, geometry: Geometry, *, interpret: bool = False) -> Array:
    """The op.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, geometry)
    alike, kind = varying_alike(*operands)
    words, bases, starts, table, rest = operands = Operands(*alike)
    first = table[:: 2 ** (operands.max_length - _FIRST)]
    if operands.max_length > _FIRST:
        first = jnp.where(first >> 8 <= _FIRST, first, jnp.uint16(_FAR))
    arrays = [words, bases, starts, first, table, *([] if rest is None else [rest])]
    programs = pl.cdiv(geometry.lanes, _LANES)
    out, _ = pl.pallas_call(
        _kernel(geometry, words.shape[0], operands.max_length),
        grid=(programs,),
        in_specs=[pl.BlockSpec(array.shape, lambda p: (0,)) for array in arrays],
        out_specs=[pl.BlockSpec((geometry.total,), lambda p: (0,)), pl.BlockSpec((1,), lambda p: (p,))],
        out_shape=[
            jax.ShapeDtypeStruct((geometry.total,), geometry.dtype, manual_axis_type=kind),
            jax.ShapeDtypeStruct((programs,), jnp.int32, manual_axis_type=kind),
        ],
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="huffman_decode",
    )(*arrays)
    return out
