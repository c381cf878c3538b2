"""The op for NVIDIA GPUs through Pallas-Triton (deprecated in JAX since 0.11, hence a file of its own).

Two kernels, since every number of the result needs all hidden ones. `gathered_mlp_in` deals neurons to programs,
which walk over the rows of the first matrices and write down one float32 a neuron and input. `gathered_mlp_out` deals
the result's channels and parts of the list to programs; a row whose neuron is silent for all inputs is not read.
Their sums are added up by XLA.

Sums are kept apart by place in the tile until the end, so that nothing is exchanged between threads before. Products
are float32 and go to no tensor core.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hashml_kernels.annotations import Array
from hashml_kernels.gathered_mlp.lists import Activation, Operands, activate
from hashml_kernels.manual_axes import varying_alike
from hashml_kernels.triton_arithmetic import count_to, fused, unfused

_FLOATS = ("float32", "bfloat16", "float16")
_MOST_ROWS = 64  # of a list: beyond, a dense product on the tensor cores is the better choice
_ROWS = 8  # of a list in a program; more go to several, which read the matrices again
_WARPS = 4
_SUMS = 8192  # that a program keeps
_ASKED = 8192  # numbers of a matrix that are asked for together
_PROGRAMS = 4 * 132  # some four a multiprocessor of an H200


def check(operands: Operands, *, block: int) -> None:
    """Returns if the kernels serve these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for many inputs to a list, other dtypes, empty arrays, and matrices whose addresses have
            no 32 bits with a sign.
    """
    del block  # any
    if operands.sizes[1] > _MOST_ROWS:
        raise NotImplementedError(
            f"x has {operands.sizes[1]} rows that share a list; the Triton kernel takes at most {_MOST_ROWS}; auto "
            f"uses XLA"
        )
    for name, array in zip(operands._fields, operands, strict=True):
        if array is None:
            continue
        if 0 in array.shape:
            raise NotImplementedError(
                f"{name} has shape {array.shape}; the Triton kernel takes no empty arrays; auto uses XLA"
            )
        if name not in ("idx", "valid") and str(array.dtype) not in _FLOATS:
            raise NotImplementedError(
                f"{name} has dtype {array.dtype}; the Triton kernel takes {_FLOATS}; auto uses XLA"
            )
        if array.size >= 2**31 and array.size * array.dtype.itemsize <= 2**32:
            raise NotImplementedError(
                f"{name} holds {array.size} numbers; the Triton kernel takes less than 2**31, or more than "
                f"2**32 bytes, for which addresses have 64 bits; auto uses XLA"
            )


class _Tile(NamedTuple):
    """Rows of a matrix that are multiplied together."""

    neurons: int
    channels: int
    times: int
    """Tiles that are asked for together."""

    @staticmethod
    def of(neurons: int, channels: int, sums: int) -> "_Tile":
        """As many channels as ``sums`` sums for each number of a tile allow."""
        channels = min(channels, max(_SUMS // (neurons * sums), 32))
        return _Tile(neurons, channels, max(1, min(4, _ASKED // (neurons * channels))))


class _Plan(NamedTuple):
    """What the programs do."""

    rows: int
    """Inputs of a program."""
    shares: int
    """Programs that the inputs of a list are dealt to."""
    into: _Tile
    out: _Tile
    steps: int
    """Steps of a program of the second kernel."""
    parts: int
    """Programs of the second kernel that the list is dealt to."""

    @staticmethod
    def of(operands: Operands, block: int) -> "_Plan":
        lists, rows, entries, _, width = operands.sizes
        shares = pl.cdiv(rows, _ROWS)
        rows = pl.cdiv(rows, shares)
        filled, across = pl.next_power_of_2(rows), pl.next_power_of_2(width)
        gated = 1 if operands.w_gate is None else 2
        few = filled <= 2
        into = _Tile.of(4 if few else 8, min(across, 512), gated * filled)
        out = _Tile.of(16 if few else 8, min(across, 256), filled)
        steps = pl.cdiv(entries * block, out.neurons * out.times)
        programs = lists * shares * pl.cdiv(width, out.channels)
        parts = max(1, min(pl.cdiv(_PROGRAMS, programs), steps))
        own = pl.cdiv(steps, parts)
        return _Plan(rows, shares, into, out, own, pl.cdiv(steps, own))


class _Named(NamedTuple):
    """Neurons of a tile, and which of them count."""

    place: Any
    neuron: Any
    counts: Any


def _named(idx: Any, valid: Any, first: Any, size: int, block: int, count: int) -> _Named:
    place = first + count_to(size)
    inside = place < idx.shape[0] * block
    entry = lax.div(place, jnp.int32(block))
    number = plt.load(idx.at[entry], mask=inside, other=jnp.int32(-1))
    counts = plt.load(valid.at[entry], mask=inside, other=jnp.int8(0)) != 0
    counts &= (number >= 0) & (number < pl.cdiv(count, block))
    neuron = jnp.where(counts, number, 0) * block + lax.rem(place, jnp.int32(block))
    counts &= neuron < count
    return _Named(place, jnp.where(counts, neuron, 0), counts)


def _read(weights: Any, rows: Any, counts: Any, channel: Any) -> Any:
    """``[neurons, channels]``, as stored; zeros where nothing counts."""
    shape = (rows.size, channel.size)
    mask = jnp.broadcast_to(counts[:, None] & (channel < weights.shape[1])[None], shape)
    place = tuple(jnp.broadcast_to(x, shape) for x in (rows[:, None], channel[None]))
    return plt.load(weights.at[place], mask=mask, other=jnp.zeros((), weights.dtype))


def _row(x: Any, r: int, place: Any, inside: Any) -> Any:
    """Part of a row of ``x``, float32."""
    at = jnp.full(place.shape, r, jnp.int32), place
    return plt.load(x.at[at], mask=inside, other=jnp.zeros((), x.dtype)).astype(jnp.float32)


def _into(plan: _Plan, biased: bool, gated: bool, activation: Activation, block: int, fma: Any):
    tile = plan.into

    def gathered_mlp_in(x, idx, valid, w_in, *refs):
        *others, hidden = refs
        matrices = [w_in, *others[biased:]]
        count, width = w_in.shape
        named = _named(idx, valid, pl.program_id(2) * tile.neurons, tile.neurons, block, count)

        def step(index: Any, sums: list[list[Any]]) -> list[list[Any]]:
            first = index * (tile.channels * tile.times)
            channels = [first + tile.channels * t + count_to(tile.channels) for t in range(tile.times)]
            found = [[_read(w, named.neuron, named.counts, c) for c in channels] for w in matrices]
            found = [[w.astype(jnp.float32) for w in tiles] for tiles in found]
            for t, channel in enumerate(channels):
                inputs = [_row(x, r, channel, channel < width)[None] for r in range(plan.rows)]
                sums = [
                    [fma(tiles[t], one, total) for one, total in zip(inputs, totals, strict=True)]
                    for tiles, totals in zip(found, sums, strict=True)
                ]
            return sums

        zeros = jnp.zeros((tile.neurons, tile.channels), jnp.float32)
        start = [[zeros] * plan.rows for _ in matrices]
        sums = lax.fori_loop(0, pl.cdiv(width, tile.channels * tile.times), step, start)
        bias = 0.0
        if biased:
            bias = plt.load(others[0].at[named.neuron], mask=named.counts, other=jnp.zeros((), others[0].dtype))
            bias = bias.astype(jnp.float32)
        for r in range(plan.rows):
            value = activate(activation)(jnp.sum(sums[0][r], axis=1) + bias)
            if gated:
                value = value * jnp.sum(sums[1][r], axis=1)
            at = jnp.full(named.place.shape, r, jnp.int32), named.place
            there = named.place < hidden.shape[1]
            plt.store(hidden.at[at], jnp.where(named.counts, value, 0.0), mask=there)

    return gathered_mlp_in


def _out(plan: _Plan, block: int, fma: Any):
    tile = plan.out

    def gathered_mlp_out(hidden, idx, valid, w_out, out):
        count, width = w_out.shape
        channel = pl.program_id(1) * tile.channels + count_to(tile.channels)
        begin = pl.program_id(2) * plan.steps

        def step(index: Any, sums: list[Any]) -> list[Any]:
            first = (begin + index) * (tile.neurons * tile.times)
            found = []
            for t in range(tile.times):
                named = _named(idx, valid, first + t * tile.neurons, tile.neurons, block, count)
                values = [_row(hidden, r, named.place, named.counts) for r in range(plan.rows)]
                speaks = named.counts & (sum(jnp.abs(value) for value in values) != 0)
                found.append((_read(w_out, named.neuron, speaks, channel), values))
            for weights, values in found:
                weights = weights.astype(jnp.float32)
                sums = [fma(value[:, None], weights, total) for value, total in zip(values, sums, strict=True)]
            return sums

        zeros = jnp.zeros((tile.neurons, tile.channels), jnp.float32)
        sums = lax.fori_loop(0, plan.steps, step, [zeros] * plan.rows)
        for r, total in enumerate(sums):
            at = jnp.full(channel.shape, r, jnp.int32), channel
            plt.store(out.at[at], jnp.sum(total, axis=0), mask=channel < width)

    return gathered_mlp_out


def apply(operands: Operands, *, activation: Activation, block: int, interpret: bool = False) -> Array:
    """``[L, R, E]``, float32.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, block=block)
    (operands,), kind = varying_alike(operands)
    plan = _Plan.of(operands, block)
    lists, rows, entries, _, width = operands.sizes
    programs, fma = lists * plan.shares, unfused if interpret else fused
    x = jnp.pad(operands.x, ((0, 0), (0, plan.shares * plan.rows - rows), (0, 0)))
    x = x.reshape(programs, plan.rows, width)
    # Loads of truth values are not to be had.
    named = [operands.idx, operands.valid.astype(jnp.int8)]

    def whole(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i, j, k: (0,) * array.ndim)

    def own(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *array.shape[1:]), lambda i, j, k: (i, 0, 0))

    lists_of = [pl.BlockSpec((None, entries), lambda i, j, k: (lax.div(i, jnp.int32(plan.shares)), 0))] * 2
    parameters = plt.CompilerParams(num_warps=_WARPS, num_stages=2)
    neurons = entries * block
    others = [array for array in (operands.b_in, operands.w_gate) if array is not None]
    biased, gated = operands.b_in is not None, operands.w_gate is not None
    hidden = pl.pallas_call(
        _into(plan, biased, gated, activation, block, fma),
        grid=(programs, 1, pl.cdiv(neurons, plan.into.neurons)),
        in_specs=[own(x), *lists_of, whole(operands.w_in), *map(whole, others)],
        out_specs=pl.BlockSpec((None, plan.rows, neurons), lambda i, j, k: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((programs, plan.rows, neurons), jnp.float32, manual_axis_type=kind),
        compiler_params=parameters,
        interpret=interpret,
        name="gathered_mlp_in",
    )(x, *named, operands.w_in, *others)
    out = pl.pallas_call(
        _out(plan, block, fma),
        grid=(programs, pl.cdiv(width, plan.out.channels), plan.parts),
        in_specs=[own(hidden), *lists_of, whole(operands.w_out)],
        out_specs=pl.BlockSpec((None, None, plan.rows, width), lambda i, j, k: (i, k, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((programs, plan.parts, plan.rows, width), jnp.float32, manual_axis_type=kind),
        compiler_params=parameters,
        interpret=interpret,
        name="gathered_mlp_out",
    )(hidden, *named, operands.w_out)
    return out.sum(axis=1).reshape(lists, -1, width)[:, :rows]
