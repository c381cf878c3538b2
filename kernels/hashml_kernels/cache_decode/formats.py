"""How compressed keys and values lie in memory: the arrays of a format, and what is static about it.

    DenseFormat                 values  float  [B, H, C, D]
    IntegerFormat(bits, group)  codes   uint8  [B, H, C, D bits / 8]     scale, minimum  float16  [B, H, C, D / group]
    KiviFormat(bits, group)     codes   uint8  [B, H, C, D bits / 8]     scale, minimum  float16  [B, H, C / group, D]
    CoupledFormat(channels, b)  codes   uint8  [B, H, C, D / channels b / 8]
                                codebook       float16  [H, D / channels, 2**b, channels]

B rows, H key heads, C slots, D channels. An integer stands for ``minimum + code scale``; one scale serves ``group``
neighbouring channels of a slot (IntegerFormat), or a channel of ``group`` consecutive slots (KiviFormat). Codes are a
stream of bits: code ``i`` of a row lies in bits ``i b .. i b + b - 1``, the lowest bit of the first byte first.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from hashml_kernels.annotations import Array

Pairs = Literal["half", "interleaved"]
"""Channels that a rotation turns together: ``(i, i + D / 2)``, or ``(2 i, 2 i + 1)``."""

MASKED = -1e30
"""Logit of a masked slot, and log-sum-exp of no slot: finite, so that no difference of two is NaN."""


class Dense(NamedTuple):
    """Arrays of `DenseFormat`."""

    values: Any


class Quantised(NamedTuple):
    """Arrays of `IntegerFormat` and `KiviFormat`."""

    codes: Any
    scale: Any
    minimum: Any


class Coupled(NamedTuple):
    """Arrays of `CoupledFormat`; the codebook belongs to the model and serves all rows."""

    codes: Any
    codebook: Any


Leaves = Dense | Quantised | Coupled


@dataclasses.dataclass(frozen=True)
class DenseFormat:
    """Numbers as they are."""


@dataclasses.dataclass(frozen=True)
class _Integers:
    bits: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; allowed are 1 to 8")
        if self.group < 1:
            raise ValueError(f"group is {self.group}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class IntegerFormat(_Integers):
    """Integers of ``bits`` bits with a scale for every ``group`` channels of a slot.

    Raises:
        ValueError: for bits outside 1..8, or a group below 1.
    """


@dataclasses.dataclass(frozen=True)
class KiviFormat(_Integers):
    """Integers of ``bits`` bits with a scale a channel for every ``group`` consecutive slots.

    Raises:
        ValueError: for bits outside 1..8, or a group below 1.
    """


@dataclasses.dataclass(frozen=True)
class CoupledFormat:
    """``channels`` neighbours share a code of ``bits`` bits, the number of an entry of their codebook.

    Raises:
        ValueError: for channels below 1, or bits outside 1..16.
    """

    channels: int
    bits: int = 8

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels is {self.channels}; it must be at least 1")
        if not 1 <= self.bits <= 16:
            raise ValueError(f"bits is {self.bits}; allowed are 1 to 16")


Format = DenseFormat | IntegerFormat | KiviFormat | CoupledFormat

_ARRAYS = {DenseFormat: Dense, IntegerFormat: Quantised, KiviFormat: Quantised, CoupledFormat: Coupled}


@dataclasses.dataclass(frozen=True)
class DecodeGeometry:
    """What is static about a step.

    Attributes:
        keys, values: their formats.
        pairs: how keys are rotated at their positions; None where they are stored rotated.
        sliding_window: a query sees this many last positions; None: all.
    """

    keys: Format
    values: Format
    pairs: Pairs | None = None
    sliding_window: int | None = None


class Operands(NamedTuple):
    """The arrays of a step, over the compressed store alone.

    Attributes:
        q: ``[B, H, J, D]`` float32, J query heads of a key head, rotated and scaled.
        keys, values: arrays of their formats.
        pos: int32 ``[B, P, C]`` with P = 1 or H, -1 at empty slots.
        query_pos: int32 ``[B]``.
        frequencies: float32 ``[D / 2]``, radians a position; None where nothing is rotated.
    """

    q: Array
    keys: Leaves
    values: Leaves
    pos: Array
    query_pos: Array
    frequencies: Array | None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """``(B, H, J, C, D)``."""
        batch, heads, queries, width = self.q.shape
        return batch, heads, queries, self.pos.shape[2], width


def row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of ``count`` codes."""
    return -(-count * bits // 8)


def expected_shapes(form: Format, batch: int, heads: int, slots: int, width: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a format's arrays, in their order.

    Raises:
        ValueError: where groups do not divide the width, or the slots.
    """
    store = (batch, heads, slots)
    match form:
        case DenseFormat():
            return ((*store, width),)
        case IntegerFormat(bits, group):
            if width % group:
                raise ValueError(f"group is {group}; it must divide the head's width, {width}")
            return (*store, row_bytes(width, bits)), (*store, width // group), (*store, width // group)
        case KiviFormat(bits, group):
            if slots % group:
                raise ValueError(f"group is {group}; it must divide the number of slots, {slots}")
            scales = (batch, heads, slots // group, width)
            return (*store, row_bytes(width, bits)), scales, scales
        case CoupledFormat(channels, bits):
            if width % channels:
                raise ValueError(f"channels is {channels}; it must divide the head's width, {width}")
            groups = width // channels
            return (*store, row_bytes(groups, bits)), (heads, groups, 2**bits, channels)


def check_leaves(name: str, form: Format, leaves: Any, batch: int, heads: int, slots: int, width: int) -> None:
    """Returns if ``leaves`` are arrays of that format.

    Raises:
        TypeError: for leaves of another format, or of other dtypes.
        ValueError: for other shapes.
    """
    if type(form) not in _ARRAYS:
        raise TypeError(f"{name[:-1]}_format is {form!r}; it must be one of {[f.__name__ for f in _ARRAYS]}")
    kind = _ARRAYS[type(form)]
    if not isinstance(leaves, kind):
        raise TypeError(f"{name} is a {type(leaves).__name__}; {form} needs {kind.__name__}")
    shapes = expected_shapes(form, batch, heads, slots, width)
    for field, array, shape in zip(kind._fields, leaves, shapes, strict=True):
        if array.shape != shape:
            raise ValueError(f"{name}.{field} has shape {array.shape}; {form} needs {shape}")
        if field == "codes" and array.dtype != jnp.uint8:
            raise TypeError(f"{name}.{field} has dtype {array.dtype}; it must be uint8")
        if field != "codes" and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name}.{field} has dtype {array.dtype}; it must be a float type")


def granularity(form: Format) -> int:
    """Consecutive slots that share a scale."""
    return form.group if isinstance(form, KiviFormat) else 1


def codes_a_byte(form: Format) -> int | None:
    """How many integers of one slot lie in a byte; 1 for formats without; None where they cross bytes."""
    if isinstance(form, IntegerFormat | KiviFormat):
        return 8 // form.bits if 8 % form.bits == 0 else None
    return 1
