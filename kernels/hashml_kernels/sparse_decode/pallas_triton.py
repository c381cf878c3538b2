"""The op for NVIDIA GPUs through Pallas-Triton (deprecated in JAX since 0.11, hence a file of its own).

A program takes one row, one list with its query heads, and one part of the list. It walks over the part some tiles of
rows a step; the rows of a step are asked for together, and are read once for all queries of the list. Nothing of a
row that does not count is read.

Every row of a tile keeps a running maximum, mass and value of its own, over all steps: nothing is exchanged between
threads until the part's end but the sum of a logit's products. Products are float32 and go to no tensor core.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hashml_kernels.manual_axes import varying_alike
from hashml_kernels.sparse_decode.lists import MASKED, Operands, Partial, merge
from hashml_kernels.triton_arithmetic import count_to, fused, unfused

_FLOATS = ("float32", "bfloat16", "float16")
_MOST_WIDTH = 256
_QUERY_FLOATS = 1024  # of one program's queries; more queries go to several, which read the rows again
_WARPS = 4
_NUMBERS = 32  # of the queries' values that a thread holds
_STEP_NUMBERS = 8192  # of keys and values that are asked for together
_STEPS = (8, 64)  # rows of a step, at least and at most
_PROGRAMS = 4 * 132  # some four a multiprocessor of an H200


def check(operands: Operands, *, page: int) -> None:
    """Returns if the kernel serves these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for heads wider than 256, other dtypes, empty arrays, and arrays whose addresses have no
            32 bits with a sign.
    """
    del page  # any
    for name, array in (("q", operands.q), ("k", operands.k), ("v", operands.v)):
        if str(array.dtype) not in _FLOATS:
            raise NotImplementedError(
                f"{name} has dtype {array.dtype}; the Triton kernel takes {_FLOATS}; auto uses XLA"
            )
        if array.shape[3] > _MOST_WIDTH:
            raise NotImplementedError(
                f"{name} has heads of {array.shape[3]}; the Triton kernel takes at most {_MOST_WIDTH}; auto uses XLA"
            )
        if array.size >= 2**31 and array.size * array.dtype.itemsize <= 2**32:
            raise NotImplementedError(
                f"{name} holds {array.size} numbers; the Triton kernel takes less than 2**31, or more than "
                f"2**32 bytes, for which addresses have 64 bits; auto uses XLA"
            )
    for name, array in zip(operands._fields, operands, strict=True):
        if 0 in array.shape:
            raise NotImplementedError(
                f"{name} has shape {array.shape}; the Triton kernel takes no empty arrays; auto uses XLA"
            )


class _Plan(NamedTuple):
    """What the programs do."""

    queries: int
    """Query heads of a list in a program."""
    shares: int
    """Programs that the query heads of one list are dealt to."""
    tile: int
    """Rows of a tile."""
    tiles: int
    """Tiles of a step."""
    steps: int
    """Steps of a program."""
    parts: int
    """Programs that the list is dealt to."""

    @staticmethod
    def of(operands: Operands, page: int) -> "_Plan":
        batch, lists, queries, entries, _ = operands.sizes
        keys, values = (pl.next_power_of_2(x.shape[3]) for x in (operands.k, operands.v))
        width = max(keys, values)
        rows = 2 ** (_STEP_NUMBERS // (keys + values)).bit_length() // 2
        rows = min(max(rows, _STEPS[0]), _STEPS[1])
        most = max(_QUERY_FLOATS // width, 1)
        share = max(n for n in range(1, min(queries, most) + 1) if queries % n == 0)
        fit = _NUMBERS * 32 * _WARPS // (width * pl.next_power_of_2(share))
        tile = min(max(fit, _STEPS[0]), rows)
        steps = pl.cdiv(entries * page, rows)
        parts = max(1, min(pl.cdiv(_PROGRAMS, batch * lists * (queries // share)), steps))
        own = pl.cdiv(steps, parts)
        return _Plan(share, queries // share, tile, rows // tile, own, pl.cdiv(steps, own))


class _Rows(NamedTuple):
    """Slots of a tile, and what they count for."""

    slot: Any
    counts: Any
    bias: Any
    """Logarithms of the weights."""


class _State(NamedTuple):
    """One query's, a row of the tile: nothing is shared between rows before the end."""

    top: Any
    mass: Any
    value: Any


def _kernel(plan: _Plan, operands: Operands, page: int, scale: float, fma: Any):
    entries, slots = operands.sizes[3:]
    pages = pl.cdiv(slots, page)

    def columns(size: int) -> tuple[Any, Any]:
        """Channels, and which of them there are: tiles have powers of 2."""
        channel = count_to(pl.next_power_of_2(size))
        return channel, channel < size

    def sparse_decode(q, k, v, idx, valid, weight, length, value, mass, top):
        limit = jnp.minimum(length[0], slots)
        part = pl.program_id(2)
        (key_channel, has_key), (value_channel, has_value) = columns(k.shape[1]), columns(v.shape[1])

        def query(j: int) -> Any:
            place = jnp.full(key_channel.shape, j, jnp.int32), key_channel
            row = plt.load(q.at[place], mask=has_key, other=jnp.zeros((), q.dtype))
            return row.astype(jnp.float32)[None] * scale

        queries = [query(j) for j in range(plan.queries)]

        def named(first: Any) -> _Rows:
            token = first + count_to(plan.tile)
            inside = token < entries * page
            entry = lax.div(token, jnp.int32(page))
            number = plt.load(idx.at[entry], mask=inside, other=jnp.int32(-1))
            w = plt.load(weight.at[entry], mask=inside, other=jnp.float32(0))
            counts = plt.load(valid.at[entry], mask=inside, other=jnp.int8(0)) != 0
            counts &= (number >= 0) & (number < pages) & (w > 0)
            slot = jnp.where(counts, number, 0) * page + lax.rem(token, jnp.int32(page))
            counts &= slot < limit
            return _Rows(slot, counts, jnp.log(jnp.where(counts, w, 1.0)))

        def read(ref: Any, rows: _Rows, channel: Any, there: Any) -> Any:
            shape = (plan.tile, channel.size)
            place = tuple(jnp.broadcast_to(x, shape) for x in (rows.slot[:, None], channel[None]))
            mask = jnp.broadcast_to(rows.counts[:, None] & there[None], shape)
            return plt.load(ref.at[place], mask=mask, other=jnp.zeros((), ref.dtype))

        def add(j: int, state: _State, found: list[_Rows], keys: list[Any], values: list[Any]) -> _State:
            """One query's state after one more step."""
            logits = [
                jnp.where(rows.counts, jnp.sum(x * queries[j], axis=1) + rows.bias, MASKED)
                for rows, x in zip(found, keys, strict=True)
            ]
            highest = state.top
            for logit in logits:
                highest = jnp.maximum(highest, logit)
            kept = jnp.exp(state.top - highest)
            mass, value = state.mass * kept, state.value * kept[:, None]
            for rows, logit, x in zip(found, logits, values, strict=True):
                p = jnp.where(rows.counts, jnp.exp(logit - highest), 0.0)
                mass, value = mass + p, fma(p[:, None], x, value)
            return _State(highest, mass, value)

        def step(index: Any, states: list[_State]) -> list[_State]:
            first = (part * plan.steps + index) * (plan.tile * plan.tiles)
            found = [named(first + plan.tile * t) for t in range(plan.tiles)]
            keys = [read(k, rows, key_channel, has_key) for rows in found]
            values = [read(v, rows, value_channel, has_value) for rows in found]
            keys, values = ([x.astype(jnp.float32) for x in tiles] for tiles in (keys, values))
            return [add(j, state, found, keys, values) for j, state in enumerate(states)]

        zeros = jnp.zeros(plan.tile, jnp.float32)
        empty = _State(zeros + MASKED, zeros, jnp.zeros((plan.tile, value_channel.size), jnp.float32))
        states = lax.fori_loop(0, plan.steps, step, [empty] * plan.queries)
        for j, state in enumerate(states):
            highest = jnp.max(state.top)
            share = jnp.exp(state.top - highest)
            one = jnp.full(1, j, jnp.int32)
            plt.store(top.at[one], jnp.broadcast_to(highest, (1,)))
            plt.store(mass.at[one], jnp.broadcast_to(jnp.sum(state.mass * share), (1,)))
            place = jnp.full(value_channel.shape, j, jnp.int32), value_channel
            plt.store(value.at[place], jnp.sum(state.value * share[:, None], axis=0), mask=has_value)

    return sparse_decode


def partial(operands: Operands, *, page: int, scale: float, interpret: bool = False) -> Partial:
    """The sums over the whole list.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, page=page)
    alike, kind = varying_alike(*operands)
    operands = Operands(*alike)
    batch, lists, queries, *_ = operands.sizes
    plan = _Plan.of(operands, page)
    programs = lists * plan.shares
    of_head = programs // operands.k.shape[1]
    q = operands.q.reshape(batch, programs, plan.queries, -1)

    def list_of(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, *array.shape[2:]), lambda b, h, s: (b, lax.div(h, jnp.int32(plan.shares)), 0)
        )

    def head_of(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *array.shape[2:]), lambda b, h, s: (b, lax.div(h, jnp.int32(of_head)), 0, 0))

    parts = batch, programs, plan.parts
    width = operands.v.shape[3]
    value, mass, top = pl.pallas_call(
        _kernel(plan, operands, page, scale, unfused if interpret else fused),
        grid=parts,
        in_specs=[
            pl.BlockSpec((None, None, *q.shape[2:]), lambda b, h, s: (b, h, 0, 0)),
            *map(head_of, (operands.k, operands.v)),
            *map(list_of, (operands.idx, operands.valid, operands.weight)),
            pl.BlockSpec((1,), lambda b, h, s: (b,)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, plan.queries, width), lambda b, h, s: (b, h, s, 0, 0)),
            *[pl.BlockSpec((None, None, None, plan.queries), lambda b, h, s: (b, h, s, 0))] * 2,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*parts, *last), jnp.float32, manual_axis_type=kind)
            for last in ((plan.queries, width), (plan.queries,), (plan.queries,))
        ],
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=2),
        interpret=interpret,
        name="sparse_decode",
    )(q, operands.k, operands.v, operands.idx, operands.valid.astype(jnp.int8), operands.weight, operands.length)
    found = merge(Partial(value, mass, top), axis=2)
    return Partial(*(x.reshape(batch, lists, queries, *x.shape[3:]) for x in found))
