"""The op for NVIDIA GPUs through Pallas-Triton (deprecated in JAX since 0.11, hence a file of its own).

A program takes one row, one key head with its query heads, and one part of the slots; several key heads where they
share positions at which keys are rotated. It walks over the part some tiles of slots a step; a tile is read once, as
bytes, unpacked or looked up in registers, and meets all queries there.

Every slot of a tile keeps a running maximum, sum and output of its own, over all the tiles of the part: nothing is
exchanged between threads until the part's end but the sum of a logit's products. Products are float32 and go to no
tensor core. Channels of a byte lie in *pieces*: with two codes a byte, the even channels are one tile of numbers, the
odd ones another, so that no number ever changes its thread; queries are read, and results written, in that order.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hashml_kernels.annotations import Array
from hashml_kernels.cache_decode.formats import (
    MASKED,
    Coupled,
    CoupledFormat,
    DecodeGeometry,
    Dense,
    IntegerFormat,
    KiviFormat,
    Operands,
    Quantised,
    codes_a_byte,
)
from hashml_kernels.cache_decode.sines import sine_and_cosine
from hashml_kernels.cache_decode.triton_tiles import Piece, Tile, pieces_of
from hashml_kernels.manual_axes import varying_alike
from hashml_kernels.triton_arithmetic import count_to, fused, unfused

_FLOATS = ("float32", "bfloat16", "float16")
_WIDTHS = (16, 256)
_MOST_QUERIES = 8  # of one program, fewer for wide heads; more go to several, which read the bytes again
_TURNED = 4  # queries of one program, over several key heads, that meet keys turned by the same sines
_WARPS = 4
_NUMBERS = 32  # of all outputs of a program that a thread holds: with 64, the compiler spills registers
_TILE = 8  # slots at least
_STEP = 32  # slots whose bytes are asked for together, at least
_PROGRAMS = 16 * 132  # some four a multiprocessor of an H200 at a time, in several turns
_PART = 256  # slots of a program at least, where slots are split


def check(operands: Operands, geometry: DecodeGeometry) -> None:
    """Returns if the kernel serves these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for sizes that are no powers of 2, codes that cross bytes, coupled codes of other than 8
            bits, rotated KIVI keys, an empty cache, and arrays whose addresses have no 32 bits with a sign.
    """
    _, _, _, _, width = operands.sizes
    if not (_is_power(width) and _WIDTHS[0] <= width <= _WIDTHS[1]):
        raise NotImplementedError(
            f"the head's width is {width}; the Triton kernel takes powers of 2 from {_WIDTHS[0]} to {_WIDTHS[1]}; "
            f"auto uses XLA"
        )
    for name, form, leaves in (
        ("key_format", geometry.keys, operands.keys),
        ("value_format", geometry.values, operands.values),
    ):
        parts = codes_a_byte(form)
        if parts is None:
            raise NotImplementedError(f"{name} is {form}; the Triton kernel takes 1, 2, 4 and 8 bits; auto uses XLA")
        if isinstance(form, IntegerFormat | KiviFormat) and not (_is_power(form.group) and form.group >= 8):
            raise NotImplementedError(
                f"{name} is {form}; the Triton kernel takes groups that are powers of 2 from 8 on; auto uses XLA"
            )
        if isinstance(form, CoupledFormat) and (form.bits != 8 or not _is_power(form.channels)):
            raise NotImplementedError(
                f"{name} is {form}; the Triton kernel takes 8 bits and powers of 2 of channels; auto uses XLA"
            )
        for field, array in zip(leaves._fields, leaves, strict=True):
            if 0 in array.shape:
                raise NotImplementedError(
                    f"{field} has shape {array.shape}; the Triton kernel takes no empty arrays; auto uses XLA"
                )
            if field != "codes" and str(array.dtype) not in _FLOATS:
                raise NotImplementedError(
                    f"{field} has dtype {array.dtype}; the Triton kernel takes {_FLOATS}; auto uses XLA"
                )
            if array.size >= 2**31 and array.size * array.dtype.itemsize <= 2**32:
                raise NotImplementedError(
                    f"{field} holds {array.size} numbers; the Triton kernel takes less than 2**31, or more than "
                    f"2**32 bytes, for which addresses have 64 bits; auto uses XLA"
                )
    if geometry.pairs is not None and isinstance(geometry.keys, KiviFormat):
        raise NotImplementedError(
            "rotation is given with KIVI keys, which are stored rotated; the Triton kernel rotates others; "
            "auto uses XLA"
        )


def _is_power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


class _Plan(NamedTuple):
    """What the programs do."""

    queries: int
    """Query heads of a key head in a program."""
    heads: int
    """Key heads of a program: several where they share positions, whose sines are then computed once."""
    shares: int
    """Programs that the query heads of one key head are dealt to; the last may have fewer than `queries`."""
    tile: int
    """Slots of a tile."""
    tiles: int
    """Tiles of a step."""
    steps: int
    """Steps of a program."""
    parts: int
    """Programs that the slots are dealt to."""

    @staticmethod
    def of(operands: Operands, geometry: DecodeGeometry) -> "_Plan":
        batch, heads, queries, slots, width = operands.sizes
        held = _NUMBERS * 32 * _WARPS // width  # slots times queries
        most = min(_MOST_QUERIES, held // _TILE)
        shares = pl.cdiv(queries, most)
        share, together = pl.cdiv(queries, shares), 1
        if geometry.pairs is not None and operands.pos.shape[1] == 1:
            together = max(n for n in range(1, max(min(_TURNED, most) // queries, 1) + 1) if heads % n == 0)
        fit = held // pl.next_power_of_2(share * together)
        groups = [form.group for form in (geometry.keys, geometry.values) if isinstance(form, KiviFormat)]
        tile = min([max(fit, _TILE), 64, *groups])
        tiles = max(1, _STEP // (tile * together))
        step = tile * tiles
        programs = batch * heads // together * shares
        wanted = pl.cdiv(_PROGRAMS, programs)
        parts = max(1, min(wanted, slots // _PART))
        steps = pl.cdiv(slots, parts * step)
        return _Plan(share, together, shares, tile, tiles, steps, pl.cdiv(slots, steps * step))


# --- inside the kernel ----------------------------------------------------------------------------


def _sum(x: Any) -> Any:
    return jnp.sum(x, axis=(1, 2))


def _products(left: list[Any], right: list[Any], fma: Any, start: Any = None) -> Any:
    """Sum of products, piece by piece."""
    for x, y in zip(left, right, strict=True):
        start = x * y if start is None else fma(x, y, start)
    return start


def _logits(tile: Tile, pieces: list[Piece], queries: list[list[Any]], fma: Any) -> list[Any]:
    """Of each query with each slot, where keys are stored as they are used."""
    raw = [tile.raw(piece) for piece in pieces]
    affine = [tile.affine(piece) for piece in pieces]
    found = []
    for query in queries:
        if affine[0] is None:
            total = _products(raw, query, fma)
        elif isinstance(tile.form, KiviFormat):
            # The scale belongs to the channel: it meets the query, once a tile, and not the codes.
            scales, minima = zip(*(a for a in affine if a), strict=True)
            scaled = [q * scale for q, scale in zip(query, scales, strict=True)]
            total = _products(raw, scaled, fma, _products(query, list(minima), fma))
        else:
            # One scale serves all pieces of a unit.
            scale, minimum = affine[0]
            total = fma(scale, _products(raw, query, fma), minimum * sum(query))
        found.append(_sum(total))
    return found


def _rotated_logits(
    tile: Tile, pieces: list[Piece], queries: list[list[Any]], turns: list[Any], fma: Any
) -> list[Any]:
    """The same for keys that are rotated at their positions; ``turns`` are sines and cosines of half the pieces."""
    half = len(pieces) // 2
    totals: list[Any] = [0.0] * len(queries)
    for place, (sin, cos) in enumerate(turns):
        a, b = tile.numbers(pieces[place], fma), tile.numbers(pieces[half + place], fma)
        a, b = fma(a, cos, -(b * sin)), fma(a, sin, b * cos)
        totals = [fma(a, q[place], fma(b, q[half + place], t)) for t, q in zip(totals, queries, strict=True)]
    return [_sum(total) for total in totals]


class _State(NamedTuple):
    """One query's, a slot of the tile: nothing is shared between slots before the end."""

    most: Any
    total: Any
    out: tuple[Any, ...]
    """By pieces; for integers the part of the codes."""
    low: Any
    """The part of the minima, ``[slots, units, 1]``; None for others."""


def _kernel(geometry: DecodeGeometry, plan: _Plan, width: int, slots: int, counts: tuple[int, int], fma: Any):
    key_pieces = pieces_of(geometry.keys, width, geometry.pairs)
    value_pieces = pieces_of(geometry.values, width, None)
    apart = isinstance(geometry.values, IntegerFormat)

    def cache_decode(q, pos, query_pos, *refs):
        *refs, out, lse = refs
        keys, values = refs[: counts[0]], refs[counts[0] : sum(counts)]
        keys = {1: Dense, 2: Coupled, 3: Quantised}[len(keys)](*keys)
        values = {1: Dense, 2: Coupled, 3: Quantised}[len(values)](*values)
        now, part = query_pos[0], pl.program_id(2)

        def query(j: int, piece: Piece) -> Any:
            channel = piece.channels()
            return plt.load(q.at[jnp.full(channel.shape, j, jnp.int32), channel])[None]

        queries = [[query(j, piece) for piece in key_pieces] for j in range(plan.heads * plan.queries)]
        frequencies = []
        if geometry.pairs is not None:
            for piece in key_pieces[: len(key_pieces) // 2]:
                channel = piece.channels()
                place = channel if geometry.pairs == "half" else lax.div(channel, jnp.int32(2))
                frequencies.append(plt.load(refs[-1].at[place])[None])

        def empty() -> _State:
            tiles = tuple(jnp.zeros((plan.tile, p.units, p.across), jnp.float32) for p in value_pieces)
            low = jnp.zeros((plan.tile, value_pieces[0].units, 1), jnp.float32) if apart else None
            zeros = jnp.zeros(plan.tile, jnp.float32)
            return _State(zeros + MASKED, zeros, tiles, low)

        def positions(index: Any) -> Any:
            slot = index + count_to(plan.tile)
            at = plt.load(pos.at[slot], mask=slot < slots, other=jnp.int32(-1))
            valid = (at >= 0) & (at <= now)
            if geometry.sliding_window is not None:
                valid &= at > now - geometry.sliding_window
            return index, slot, at, valid

        def take(states: list[_State], first: Any, slot: Any, at: Any, valid: Any) -> list[_State]:
            """States after one more tile."""
            turns = [sine_and_cosine(at.astype(jnp.float32)[:, None, None] * f, fma) for f in frequencies]
            new = []
            for head in range(plan.heads):
                own = slice(head * plan.queries, (head + 1) * plan.queries)
                tile = Tile(geometry.keys, keys, head, first, slot, valid)
                if geometry.pairs is None:
                    logits = _logits(tile, key_pieces, queries[own], fma)
                else:
                    logits = _rotated_logits(tile, key_pieces, queries[own], turns, fma)
                tile = Tile(geometry.values, values, head, first, slot, valid)
                if apart:
                    numbers, affine = [tile.raw(piece) for piece in value_pieces], tile.affine(value_pieces[0])
                else:
                    numbers, affine = [tile.numbers(piece, fma) for piece in value_pieces], None
                for state, logit in zip(states[own], logits, strict=True):
                    new.append(add(state, jnp.where(valid, logit, MASKED), valid, numbers, affine))
            return new

        def add(state: _State, logit: Any, valid: Any, numbers: list[Any], affine: Any) -> _State:
            """One query's state after one more logit a slot."""
            most = jnp.maximum(state.most, logit)
            kept = jnp.exp(state.most - most)
            p = jnp.where(valid, jnp.exp(logit - most), 0.0)
            kept3, p3, low = kept[:, None, None], p[:, None, None], None
            if affine is not None:
                low = fma(state.low, kept3, p3 * affine[1])
                p3 = p3 * affine[0]
            tiles = tuple(fma(p3, x, o * kept3) for o, x in zip(state.out, numbers, strict=True))
            return _State(most, fma(state.total, kept, p), tiles, low)

        def step(index: Any, states: list[_State]) -> list[_State]:
            first = (part * plan.steps + index) * (plan.tile * plan.tiles)
            found = [positions(first + plan.tile * t) for t in range(plan.tiles)]
            some = sum(valid.astype(jnp.int32) for *_, valid in found)

            def read(states: list[_State]) -> list[_State]:
                for tile in found:
                    states = take(states, *tile)
                return states

            return lax.cond(jnp.max(some) > 0, read, lambda states: states, states)

        states = lax.fori_loop(0, plan.steps, step, [empty() for _ in queries])
        for j, state in enumerate(states):
            top = jnp.max(state.most)
            weight = jnp.exp(state.most - top)
            total = jnp.sum(state.total * weight)
            least = jnp.maximum(total, jnp.float32(np.finfo(np.float32).tiny))
            whole = jnp.where(total > 0, top + jnp.log(least), MASKED)
            plt.store(lse.at[jnp.full(1, j, jnp.int32)], jnp.broadcast_to(whole, (1,)))
            for piece, tile in zip(value_pieces, state.out, strict=True):
                tile = tile if state.low is None else tile + state.low
                channel = piece.channels()
                where = out.at[jnp.full(channel.shape, j, jnp.int32), channel]
                plt.store(where, jnp.sum(tile * weight[:, None, None], axis=0) / least)

    return cache_decode


# --- the op ---------------------------------------------------------------------------------------


def partials(operands: Operands, geometry: DecodeGeometry, *, interpret: bool = False) -> tuple[Array, Array]:
    """``(out [B, H, J, S, D], lse [B, H, J, S])``: the attention over the store alone, in S parts.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, geometry)
    alike, kind = varying_alike(*operands)
    operands = Operands(*alike)
    batch, heads, queries, slots, width = operands.sizes
    plan = _Plan.of(operands, geometry)
    shares, programs = plan.shares, heads // plan.heads * plan.shares
    together = plan.heads * plan.queries

    def of_head(field: str, array: Array) -> pl.BlockSpec:
        """The matrices of one row and the program's heads, or these heads' tables."""
        if field == "codebook":
            return pl.BlockSpec(
                (plan.heads, *array.shape[1:]), lambda b, h, s: (lax.div(h, jnp.int32(shares)), 0, 0, 0)
            )
        return pl.BlockSpec(
            (None, plan.heads, *array.shape[2:]), lambda b, h, s: (b, lax.div(h, jnp.int32(shares)), 0, 0)
        )

    one = operands.pos.shape[1] == 1
    # Query heads of zeros fill the last share up.
    q = jnp.pad(operands.q, ((0, 0), (0, 0), (0, shares * plan.queries - queries), (0, 0)))
    q = q.reshape(batch, programs, together, width)
    extra = [] if operands.frequencies is None else [operands.frequencies]
    leaves = [*operands.keys, *operands.values]
    fields = [*operands.keys._fields, *operands.values._fields]
    parts = batch, programs, plan.parts
    out, lse = pl.pallas_call(
        _kernel(
            geometry, plan, width, slots, (len(operands.keys), len(operands.values)), unfused if interpret else fused
        ),
        grid=parts,
        in_specs=[
            pl.BlockSpec((None, None, together, width), lambda b, h, s: (b, h, 0, 0)),
            pl.BlockSpec((None, None, slots), lambda b, h, s: (b, 0 if one else lax.div(h, jnp.int32(shares)), 0)),
            pl.BlockSpec((1,), lambda b, h, s: (b,)),
            *map(of_head, fields, leaves),
            *(pl.BlockSpec(array.shape, lambda b, h, s: (0,)) for array in extra),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, together, width), lambda b, h, s: (b, h, s, 0, 0)),
            pl.BlockSpec((None, None, None, together), lambda b, h, s: (b, h, s, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*parts, *last), jnp.float32, manual_axis_type=kind)
            for last in ((together, width), (together,))
        ],
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=2),
        interpret=interpret,
        name="cache_decode",
    )(q, operands.pos, operands.query_pos, *leaves, *extra)
    shape = (batch, heads // plan.heads, shares, plan.parts, together)
    out = out.reshape(*shape, width).transpose(0, 1, 2, 4, 3, 5).reshape(batch, heads, -1, plan.parts, width)
    lse = lse.reshape(shape).transpose(0, 1, 2, 4, 3).reshape(batch, heads, -1, plan.parts)
    return out[:, :, :queries], lse[:, :, :queries]
