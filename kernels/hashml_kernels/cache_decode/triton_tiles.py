"""What the Triton kernel reads, and in which order: pieces of the channels, tiles of the slots."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from hashml_kernels.cache_decode.formats import (
    Coupled,
    CoupledFormat,
    Dense,
    DenseFormat,
    Format,
    IntegerFormat,
    KiviFormat,
    Pairs,
    Quantised,
    codes_a_byte,
)
from hashml_kernels.triton_arithmetic import count_to


class Piece(NamedTuple):
    """Channels ``first + unit i + step k`` of a tile ``[slots, units, across]``, read together."""

    first: int
    units: int
    unit: int
    step: int

    @property
    def across(self) -> int:
        return self.unit // self.step

    def channels(self) -> Any:
        """``[units, across]``, inside the kernel."""
        return self.first + self.unit * count_to(self.units)[:, None] + self.step * count_to(self.across)[None, :]


def pieces_of(form: Format, width: int, pairs: Pairs | None) -> list[Piece]:
    """All channels; with ``pairs``, the first half of the list turns with the second."""
    step, unit = codes_a_byte(form) or 1, width
    if isinstance(form, IntegerFormat):
        unit = form.group
    elif isinstance(form, CoupledFormat):
        unit = form.channels
    if pairs == "half":
        unit = min(unit, width // 2)
        first = [half * width // 2 + place for half in range(2) for place in range(step)]
        return [Piece(place, width // 2 // unit, unit, step) for place in first]
    if pairs == "interleaved":
        step, unit = max(step, 2), max(unit, 2)
        order = [*range(0, step, 2), *range(1, step, 2)]
    else:
        order = list(range(step))
    return [Piece(place, width // unit, unit, step) for place in order]


def _load(ref: Any, head: int, rows: Any, columns: Any, mask: Any) -> Any:
    """Elements of a head's matrix; all shapes broadcast to that of ``mask``."""
    where = tuple(jnp.broadcast_to(jnp.asarray(index, jnp.int32), mask.shape) for index in (head, rows, columns))
    return plt.load(ref.at[where], mask=mask, other=jnp.zeros((), ref.dtype))


class Tile:
    """A head's keys or values of some slots: what is asked for twice is kept, so that nothing is read again."""

    def __init__(self, form: Format, leaves: Any, head: int, first: Any, slots: Any, valid: Any) -> None:
        self.form, self.leaves, self.head = form, leaves, head
        self.first, self.slots, self.valid = first, slots, valid
        self.read: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.read:
            self.read[key] = make()
        return self.read[key]

    def _mask(self, *sides: int) -> Any:
        return jnp.broadcast_to(self.valid[:, None, None], (self.slots.size, *sides))

    def raw(self, piece: Piece) -> Any:
        """Codes of integers, or the numbers themselves: float32 ``[slots, units, across]``."""
        rows = self.slots[:, None, None]
        match self.form, self.leaves:
            case DenseFormat(), Dense(values):
                mask = self._mask(piece.units, piece.across)
                return _load(values, self.head, rows, piece.channels()[None], mask).astype(jnp.float32)
            case CoupledFormat(channels), Coupled(codes, codebook):
                # All channels of a unit share a code.
                channel = piece.channels()
                group = lax.div(piece.first + piece.unit * count_to(piece.units)[:, None], jnp.int32(channels))
                code = self._once(
                    ("code", piece.first // channels),
                    lambda: _load(codes, self.head, rows, group[None], self._mask(*group.shape)).astype(jnp.int32),
                )
                shape = (self.slots.size, piece.units, piece.across)
                where = (jnp.int32(self.head), group[None], code, lax.rem(channel, jnp.int32(channels))[None])
                entry = codebook.at[tuple(jnp.broadcast_to(index, shape) for index in where)]
                # Masked slots have the code 0: any entry will do, and no mask is needed.
                return plt.load(entry).astype(jnp.float32)
            case ((IntegerFormat(bits) | KiviFormat(bits)), Quantised(codes)):
                start, shift = divmod(piece.first * bits, 8)
                across = start + (piece.unit * bits // 8) * count_to(piece.units)[:, None]
                across = across + (piece.step * bits // 8) * count_to(piece.across)[None, :]
                packed = self._once(
                    ("codes", start, piece.step),
                    lambda: _load(codes, self.head, rows, across[None], self._mask(piece.units, piece.across)).astype(
                        jnp.int32
                    ),
                )
                if bits < 8:
                    packed = (packed >> shift) & (2**bits - 1)
                return packed.astype(jnp.float32)
        raise AssertionError("check has seen these")

    def affine(self, piece: Piece) -> tuple[Any, Any] | None:
        """Scale and minimum, ``[slots, units, 1]`` or ``[1, units, across]``; None where numbers are as they are."""
        if not isinstance(self.leaves, Quantised):
            return None
        group = self.form.group  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self.form, KiviFormat):
            # All slots of a tile lie in one block; of a tile beyond the last slot no block is read.
            channel = piece.channels()[None]
            rows, columns, key = lax.div(self.first, jnp.int32(group)), channel, piece.first
            mask = jnp.broadcast_to(rows < self.leaves.scale.shape[1], channel.shape)
        else:
            of_unit = lax.div(piece.first + piece.unit * count_to(piece.units), jnp.int32(group))
            rows, columns, mask = self.slots[:, None, None], of_unit[None, :, None], self._mask(piece.units, 1)
            key = piece.first // max(group, piece.unit)
        return tuple(
            self._once((name, key), lambda ref=ref: _load(ref, self.head, rows, columns, mask).astype(jnp.float32))
            for name, ref in (("scale", self.leaves.scale), ("minimum", self.leaves.minimum))
        )

    def numbers(self, piece: Piece, fma: Any) -> Any:
        """Decoded, ``[slots, units, across]``; finite in slots that are not valid, whatever lies there."""
        raw, affine = self.raw(piece), self.affine(piece)
        if affine is None:
            return raw
        decoded = fma(raw, *affine)
        # A block without a valid slot has scales that nobody wrote; other scales are not read where masked.
        return jnp.where(self.valid[:, None, None], decoded, 0.0) if isinstance(self.form, KiviFormat) else decoded
