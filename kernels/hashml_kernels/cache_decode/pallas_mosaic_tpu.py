"""The op for TPUs: slots lie along the lanes, channels along the sublanes.

A step of the grid takes one row and `_Plan.slots` slots of all its key heads, so that rotations are computed once for
heads that share positions. Codes narrower than a line of 128 lanes are read transposed, ``[channels, slots]``, which
is how XLA lays such arrays out on a TPU, and hence no copy; codes of full lines are transposed in registers. A
codebook is looked up by gathers along the lanes: the 256 entries of a channel are two registers' rows. All heads'
tables stay in vector memory. Sums are kept apart by lane until the last slot, and added up then.

Channels are taken in the order in which codes lie in bytes, see `_order`; queries come, and results go, in it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels.annotations import Array
from hashml_kernels.cache_decode.formats import (
    MASKED,
    Coupled,
    CoupledFormat,
    DecodeGeometry,
    Dense,
    DenseFormat,
    Format,
    IntegerFormat,
    KiviFormat,
    Leaves,
    Operands,
    Quantised,
    codes_a_byte,
)
from hashml_kernels.cache_decode.sines import sine_and_cosine
from hashml_kernels.half_floats import half_to_float
from hashml_kernels.manual_axes import varying_alike

_LANES = 128
_SUBLANES = 8
_FLOATS = ("float32", "bfloat16", "float16")
_WIDTHS = (64, 128)
_MOST_QUERIES = _SUBLANES
_SLOTS = 512
_VECTOR_BYTES = 96 * 2**20  # of the 128 MiB of a v5e or v6e


def check(operands: Operands, geometry: DecodeGeometry) -> None:
    """Returns if the kernel serves these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for other widths than 64 and 128, more than 8 query heads a key head, fewer than 128
            slots, formats whose channels do not fill sublanes, KIVI groups of very different sizes, some rotations,
            and tables beyond vector memory.
    """
    batch, heads, queries, slots, width = operands.sizes
    if width not in _WIDTHS:
        raise NotImplementedError(f"the head's width is {width}; the TPU kernel takes {_WIDTHS}; auto uses XLA")
    if queries > _MOST_QUERIES:
        raise NotImplementedError(
            f"a key head has {queries} query heads; the TPU kernel takes at most {_MOST_QUERIES}; auto uses XLA"
        )
    if slots < _LANES or not batch:
        raise NotImplementedError(
            f"the cache has {batch} rows of {slots} slots; the TPU kernel takes {_LANES} or more; auto uses XLA"
        )
    for name, form, leaves in (
        ("key_format", geometry.keys, operands.keys),
        ("value_format", geometry.values, operands.values),
    ):
        _check_format(name, form, width)
        for field, array in zip(leaves._fields, leaves, strict=True):
            # Mosaic has no float16: it is read as its bits, which are few where they stand beside codes.
            allowed = {"codebook": _FLOATS, "values": ("float32", "bfloat16")}.get(field, ("float16",))
            if field != "codes" and array.dtype not in allowed:
                raise NotImplementedError(
                    f"{field} has dtype {array.dtype}; the TPU kernel takes {allowed}; auto uses XLA"
                )
    if geometry.pairs is not None:
        _check_rotation(geometry, width)
    plan = _Plan.of(operands, geometry)
    for name, form in (("key_format", geometry.keys), ("value_format", geometry.values)):
        if isinstance(form, KiviFormat) and plan.slots // form.group >= _LANES:
            raise NotImplementedError(
                f"{name} is {form}, whose scales of {plan.slots} slots are {plan.slots // form.group} a channel; "
                f"the TPU kernel takes fewer than {_LANES}; auto uses XLA"
            )
    bytes_held = plan.vector_bytes(operands, geometry)
    if bytes_held > _VECTOR_BYTES:
        raise NotImplementedError(
            f"{heads} key heads of {queries} query heads need {bytes_held} bytes of vector memory; the TPU kernel "
            f"has {_VECTOR_BYTES}; auto uses XLA"
        )


def _check_format(name: str, form: Format, width: int) -> None:
    stride = _stride(form)
    served = stride is not None
    match form:
        case CoupledFormat(channels, bits):
            served = bits == 8 and width // channels % _SUBLANES == 0
        case IntegerFormat(_, group):
            served = stride is not None and group % (stride * _SUBLANES) == 0
        case KiviFormat(_, group):
            served = stride is not None and width == _LANES and group % _SUBLANES == 0 and group <= _SLOTS
            served = served and _SLOTS % group == 0
    if not served:
        raise NotImplementedError(
            f"{name} is {form}; the TPU kernel takes codes of 1, 2, 4 or 8 bits whose groups, and channels of a "
            f"place in a byte, fill {_SUBLANES} sublanes, and KIVI groups at width {_LANES}; auto uses XLA"
        )


def _check_rotation(geometry: DecodeGeometry, width: int) -> None:
    stride = _stride(geometry.keys) or 1
    if isinstance(geometry.keys, KiviFormat):
        raise NotImplementedError(
            "rotation is given with KIVI keys, which are stored rotated; the TPU kernel rotates others; auto uses XLA"
        )
    rows = width // stride
    if geometry.pairs == "half" and rows // 2 % _SUBLANES:
        raise NotImplementedError(
            f"key_format is {geometry.keys} and pairs are halves; the TPU kernel wants half of {rows} codes to fill "
            f"{_SUBLANES} sublanes; auto uses XLA"
        )
    if geometry.pairs == "interleaved" and stride == 1:
        raise NotImplementedError(
            f"key_format is {geometry.keys} and pairs are interleaved; the TPU kernel rotates neighbours that "
            f"lie in one byte or share a code; auto uses XLA"
        )


def _stride(form: Format) -> int | None:
    """Neighbouring channels whose numbers come from one byte."""
    return form.channels if isinstance(form, CoupledFormat) else codes_a_byte(form)


def _order(form: Format, width: int) -> np.ndarray:
    """Channels as the kernel has them: first of each byte, then second of each byte, and so on."""
    return np.arange(width).reshape(-1, _stride(form) or 1).T.ravel()


def _apart(x: Array, stride: int) -> Array:
    """The last axis with each ``stride``-th together: in the order of `_order`; by ``width / stride`` back again."""
    return x.reshape(*x.shape[:-1], -1, stride).swapaxes(-1, -2).reshape(x.shape)


class _Plan(NamedTuple):
    """What a step of the grid takes."""

    slots: int
    stored: int
    """Bytes of one slot and head in vector memory, about."""

    @staticmethod
    def of(operands: Operands, geometry: DecodeGeometry) -> "_Plan":
        slots = operands.sizes[3]
        stored = sum(
            array.shape[-1] * array.dtype.itemsize
            for leaves in (operands.keys, operands.values)
            for field, array in zip(leaves._fields, leaves, strict=True)
            if field != "codebook"
        )
        shared = [form.group for form in (geometry.keys, geometry.values) if isinstance(form, KiviFormat)]
        if shared:
            # A block of their scales has 16 rows, which fill a register of 16-bit numbers.
            return _Plan(max(_SLOTS, *(16 * group for group in shared)), stored)
        return _Plan(min(_SLOTS, slots // _LANES * _LANES), stored)

    def vector_bytes(self, operands: Operands, geometry: DecodeGeometry) -> int:
        """About what the kernel holds."""
        _, heads, queries, _, width = operands.sizes
        books = sum(isinstance(x, Coupled) for x in (operands.keys, operands.values))
        tables = 2 * books * heads * width * 256 * 4
        turned = 8 * width // 2 * self.slots if geometry.pairs else 0
        return tables + turned + 2 * heads * self.slots * (self.stored + 4) + heads * queries * width * _LANES * 4


# --- inside the kernel ----------------------------------------------------------------------------


def _along_lanes(table: Any, index: Any) -> Any:
    """``table[i, index[i, n]]`` for a table of 128 columns."""
    return jnp.take_along_axis(table, index, axis=1)


def _unpacked(packed: Any, stride: int) -> list[Any]:
    """Codes of each place in a byte, float32."""
    if stride == 1:
        return [packed.astype(jnp.float32)]
    bits = 8 // stride
    return [((packed >> (bits * t)) & (2**bits - 1)).astype(jnp.float32) for t in range(stride)]


def _decode(form: Format, leaves: Any, h: Any, width: int, valid: Any) -> list[Any]:
    """Numbers of head ``h``: a tile ``[width / stride, slots]`` for each place in a byte, or in a group of channels.

    What lies in slots that are not ``valid`` is finite.
    """
    stride = _stride(form) or 1
    if isinstance(form, DenseFormat):
        numbers = leaves[0][0, h].astype(jnp.float32)
        numbers = numbers.T if width == _LANES else numbers
        return [jnp.where(valid, numbers, 0.0)]
    codes = leaves[0][0, h].astype(jnp.int32)
    if isinstance(form, CoupledFormat):
        table, rows = leaves[1], width // stride
        codes = codes.T if rows == _LANES else codes
        low, second = codes & (_LANES - 1), codes >= _LANES

        def entry(t: int) -> Any:
            own = pl.ds(t * rows, rows)
            first, last = table[h, own, :_LANES], table[h, own, _LANES:]
            return jnp.where(second, _along_lanes(last, low), _along_lanes(first, low))

        return [entry(t) for t in range(stride)]
    if width // stride == _LANES:
        codes = codes.astype(jnp.float32).T
    tiles = _unpacked(codes, stride)
    scale, minimum = (half_to_float(leaf[0, h]) for leaf in leaves[1:])
    rows, slots = tiles[0].shape
    assert isinstance(form, IntegerFormat | KiviFormat)
    if isinstance(form, IntegerFormat):
        across = form.group // stride

        def spread(x: Any) -> Any:
            x = jnp.where(valid, x, 0.0)
            return jnp.concatenate([jnp.broadcast_to(row, (across, slots)) for row in jnp.split(x, x.shape[0])])

        scale, minimum = spread(scale), spread(minimum)
        return [minimum + tile * scale for tile in tiles]
    block = lax.broadcasted_iota(jnp.int32, (rows, slots), 1) // form.group
    scale, minimum = (_channels_first(x, stride) for x in (scale, minimum))
    return [
        jnp.where(valid, _along_lanes(m, block) + tile * _along_lanes(s, block), 0.0)
        for tile, s, m in zip(tiles, scale, minimum, strict=True)
    ]


def _channels_first(x: Any, stride: int) -> list[Any]:
    """``[blocks, 128 channels]`` as tiles ``[128 / stride, 128]`` of the channels of each place in a byte."""
    if stride > 1:
        # Channels of a place together: that is where they are to be read from.
        to = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        rows = _LANES // stride
        x = _along_lanes(x, (to % rows) * stride + to // rows)
    x = jnp.concatenate([x, jnp.zeros((_LANES - x.shape[0], _LANES), jnp.float32)]).T
    return jnp.split(x, stride)


def _turned(tiles: list[Any], pairs: str | None, sin: Any, cos: Any) -> list[Any]:
    """Keys rotated; ``sin`` and ``cos`` come in the order of `_angle_order`."""
    if pairs is None:
        return tiles
    if pairs == "half":
        rows, found = tiles[0].shape[0] // 2, []
        for t, tile in enumerate(tiles):
            (a, b), own = jnp.split(tile, 2), slice(t * rows, (t + 1) * rows)
            c, s = cos[own], sin[own]
            found.append(jnp.concatenate([a * c - b * s, a * s + b * c]))
        return found
    rows, found = tiles[0].shape[0], []
    for t in range(0, len(tiles), 2):
        a, b, own = tiles[t], tiles[t + 1], slice(t // 2 * rows, (t // 2 + 1) * rows)
        c, s = cos[own], sin[own]
        found += [a * c - b * s, a * s + b * c]
    return found


def _angle_order(form: Format, pairs: str, width: int) -> np.ndarray:
    """Which frequency each row of the kernel's sines has."""
    rows = width // (_stride(form) or 1)
    order = _order(form, width).reshape(-1, rows)
    return order[:, : rows // 2].ravel() if pairs == "half" else (order[::2] // 2).ravel()


def _by_lane(x: Any) -> Any:
    """``[rows, slots]`` summed up to ``[rows, 128]``."""
    return functools.reduce(jnp.add, jnp.split(x, x.shape[1] // _LANES, axis=1))


def _kernel(geometry: DecodeGeometry, slots: int, counts: tuple[int, int], query_pos, q, pos, *refs) -> None:
    split = len(refs) - 5 - (0 if geometry.pairs is None else 2)
    refs, (out, lse, most, total, partial, *turns) = refs[:split], refs[split:]
    keys, values = refs[: counts[0]], refs[counts[0] : sum(counts)]
    heads, queries, width = partial.shape[0], partial.shape[1], partial.shape[2]
    step, now = pl.program_id(1), query_pos[pl.program_id(0)]
    shared = pos.shape[1] == 1
    size = pos.shape[2]

    @pl.when(step == 0)
    def _():
        most[...] = jnp.full_like(most, MASKED)
        total[...] = jnp.zeros_like(total)
        partial[...] = jnp.zeros_like(partial)

    slot = step * size + lax.broadcasted_iota(jnp.int32, (1, size), 1)

    def seen(at: Any) -> Any:
        valid = (at >= 0) & (at <= now) & (slot < slots)
        return valid if geometry.sliding_window is None else valid & (at > now - geometry.sliding_window)

    def angles(at: Any) -> tuple[Any, Any]:
        # Empty slots, and what lies beyond the last one, may hold any number.
        at = jnp.where(seen(at), at, 0).astype(jnp.float32)
        return sine_and_cosine(refs[-1][:, :1] * at)

    def head(h: Any, _: Any) -> Any:
        at = pos[0, pl.ds(0 if shared else h, 1), :]
        valid = seen(at)
        sin = cos = None
        if geometry.pairs is not None:
            sin, cos = (turn[...] for turn in turns) if shared else angles(at)
        tiles = _turned(_decode(geometry.keys, keys, h, width, valid), geometry.pairs, sin, cos)
        query = q[0, h].T
        # Tiles of one number of rows: their products are added up before the sum over sublanes.
        rows = tiles[0].shape[0]
        numbers = _decode(geometry.values, values, h, width, valid)
        for j in range(queries):
            products = [x * query[t * rows : (t + 1) * rows, j : j + 1] for t, x in enumerate(tiles)]
            logit = jnp.sum(functools.reduce(jnp.add, products), axis=0, keepdims=True)
            logit = jnp.where(valid, logit, MASKED)
            before = most[h, j : j + 1, :1]
            highest = jnp.maximum(before, jnp.max(logit, axis=1, keepdims=True))
            kept = jnp.exp(before - highest)
            p = jnp.where(valid, jnp.exp(logit - highest), 0.0)
            most[h, j : j + 1, :] = jnp.broadcast_to(highest, (1, _LANES))
            total[h, j : j + 1, :] = total[h, j : j + 1, :] * kept + _by_lane(p)
            own = jnp.concatenate([_by_lane(p * x) for x in numbers])
            partial[h, j] = partial[h, j] * kept + own
        return 0

    @pl.when(jnp.max(jnp.where(seen(pos[0]), 1, 0)) > 0)
    def _():
        if geometry.pairs is not None and shared:
            turns[0][...], turns[1][...] = angles(pos[0])
        lax.fori_loop(0, heads, head, 0)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out[...] = jnp.zeros_like(out)

        def finish(h: Any, _: Any) -> Any:
            whole = jnp.sum(total[h], axis=1, keepdims=True)
            least = jnp.maximum(whole, np.float32(np.finfo(np.float32).tiny))
            lse[0, h] = jnp.where(whole > 0, most[h] + jnp.log(least), MASKED)
            for j in range(queries):
                out[0, h, j : j + 1, :] = jnp.sum(partial[h, j].T, axis=0, keepdims=True) / least[j : j + 1, :]
            return 0

        lax.fori_loop(0, heads, finish, 0)


# --- the op ---------------------------------------------------------------------------------------


def _prepared(form: Format, leaves: Leaves, slots: int, width: int) -> list[tuple[Array, pl.BlockSpec]]:
    """The arrays as the kernel reads them, and their blocks of ``slots`` slots."""

    def own(array: Array, by: int = 1) -> tuple[Array, pl.BlockSpec]:
        """Lines of 128 as they are, shorter ones transposed."""
        heads, across = array.shape[1], array.shape[3]
        if across == _LANES:
            return array, pl.BlockSpec((1, heads, slots // by, across), lambda b, i, *_: (b, 0, i, 0))
        block = pl.BlockSpec((1, heads, across, slots // by), lambda b, i, *_: (b, 0, 0, i))
        return array.swapaxes(2, 3), block

    match leaves:
        case Dense(values):
            return [own(values)]
        case Coupled(codes, codebook):
            heads, groups, entries, channels = codebook.shape
            tables = codebook.astype(jnp.float32).transpose(0, 3, 1, 2).reshape(heads, channels * groups, entries)
            return [own(codes), (tables, pl.BlockSpec(tables.shape, lambda b, i, *_: (0, 0, 0)))]
        case Quantised(codes, scale, minimum):
            by = form.group if isinstance(form, KiviFormat) else 1
            # Mosaic takes no float16; the same bits as integers are a copy that XLA makes.
            scale, minimum = (lax.bitcast_convert_type(x, jnp.uint16) for x in (scale, minimum))
            return [own(codes), own(scale, by), own(minimum, by)]


def partials(
    operands: Operands, geometry: DecodeGeometry, *, interpret: bool | pltpu.InterpretParams = False
) -> tuple[Array, Array]:
    """``(out [B, H, J, 1, D], lse [B, H, J, 1])``: the attention over the store alone, in one part.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, geometry)
    alike, kind = varying_alike(*operands)
    operands = Operands(*alike)
    batch, heads, queries, slots, width = operands.sizes
    plan = _Plan.of(operands, geometry)
    keys = _prepared(geometry.keys, operands.keys, plan.slots, width)
    values = _prepared(geometry.values, operands.values, plan.slots, width)
    q = _apart(operands.q, _stride(geometry.keys) or 1)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, _SUBLANES - queries), (0, 0)))
    arrays = [*keys, *values]
    scratch = [
        pltpu.VMEM((heads, _SUBLANES, _LANES), jnp.float32),
        pltpu.VMEM((heads, _SUBLANES, _LANES), jnp.float32),
        pltpu.VMEM((heads, queries, width, _LANES), jnp.float32),
    ]
    if geometry.pairs is not None and operands.frequencies is not None:
        turning = operands.frequencies[_angle_order(geometry.keys, geometry.pairs, width)]
        turning = jnp.broadcast_to(turning[:, None], (width // 2, _LANES))
        arrays.append((turning, pl.BlockSpec(turning.shape, lambda b, i, *_: (0, 0))))
        scratch += [pltpu.VMEM((width // 2, plan.slots), jnp.float32)] * 2
    call = pl.pallas_call(
        functools.partial(_kernel, geometry, slots, (len(keys), len(values))),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(slots, plan.slots)),
            in_specs=[
                pl.BlockSpec((1, heads, _SUBLANES, width), lambda b, i, *_: (b, 0, 0, 0)),
                pl.BlockSpec((1, operands.pos.shape[1], plan.slots), lambda b, i, *_: (b, 0, i)),
                *(block for _, block in arrays),
            ],
            out_specs=[
                pl.BlockSpec((1, heads, _SUBLANES, width), lambda b, i, *_: (b, 0, 0, 0)),
                pl.BlockSpec((1, heads, _SUBLANES, _LANES), lambda b, i, *_: (b, 0, 0, 0)),
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, _SUBLANES, width), jnp.float32, manual_axis_type=kind),
            jax.ShapeDtypeStruct((batch, heads, _SUBLANES, _LANES), jnp.float32, manual_axis_type=kind),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VECTOR_BYTES
        ),
        interpret=interpret,
        name="cache_decode",
    )
    with jax.enable_x64(False):  # a TPU has no loop counters of 64 bits
        out, lse = call(operands.query_pos, q, operands.pos, *(array for array, _ in arrays))
    out = _apart(out[:, :, :queries], width // (_stride(geometry.values) or 1))
    return out[:, :, :, None], lse[:, :, :queries, :1]
