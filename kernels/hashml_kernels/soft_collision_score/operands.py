"""What every backend takes and gives, and soft tables cut in pieces.

A soft table is a product over bits, so the entry of a code is the product of the entries of its pieces:

    p(code) = prod_i piece_i[(code >> shift_i) & (2^width_i - 1)]

Pieces are as wide as a machine looks up at no extra cost: 32 floats are one line of a GPU's cache and 32 banks, 128
floats are the lanes of a TPU. Together they hold hundreds of floats where the whole table would hold ``2^P``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hashml_kernels.annotations import Array, Float, Int


class Operands(NamedTuple):
    """What the api has checked.

    Attributes:
        codes: uint8 or uint16 ``[B, K, L, N]``, plane 0 in the highest of their P bits; bits above do not matter.
        norms: ``[B, K, N]`` of any float type, or None where every slot counts alike. Below 0: slots left out.
        logits: float32 ``[B, K, J, L, P]``.
        threshold: float32 ``[B, K, J]``.
    """

    codes: Array
    norms: Array | None
    logits: Array
    threshold: Array

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """Rows, key heads, query heads of one, tables, bits, slots."""
        batch, heads, tables, slots = self.codes.shape
        return batch, heads, self.logits.shape[2], tables, self.logits.shape[4], slots


class Scores(NamedTuple):
    """What the keys are worth to each query head.

    Attributes:
        values: ``norm sum_l p_l(code[l])``; ``-inf`` below the threshold and where a slot is left out.
        highest: the largest of each block of slots.
        survivors: how many of each block are not ``-inf``.
    """

    values: Float[Array, "B K J N"]
    highest: Float[Array, "B K J blocks"]
    survivors: Int[Array, "B K J blocks"]


class Piece(NamedTuple):
    """Some neighbouring bits of a code."""

    shift: int
    width: int

    def of(self, code: Array) -> Array:
        """The piece of each code, in ``0 .. 2^width - 1``."""
        return (code >> self.shift) & (2**self.width - 1)


def pieces_of(bits: int, most: int) -> list[Piece]:
    """All bits, the highest first, at most ``most`` a piece."""
    starts = range(0, bits, most)
    return [Piece(max(bits - start - most, 0), min(most, bits - start)) for start in starts]


def piece_tables(logits: Array, pieces: list[Piece]) -> list[Array]:
    """``[..., 2^width]`` for each piece of ``logits [..., P]``."""
    # Both signs, and not 1 - sigmoid: an unlikely code keeps its relative precision.
    chances = jnp.stack([jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits)], axis=-1)
    bits, found = logits.shape[-1], []
    for shift, width in pieces:
        first = bits - shift - width
        table = chances[..., first, :]
        for p in range(first + 1, first + width):
            table = (table[..., :, None] * chances[..., p, None, :]).reshape(*table.shape[:-1], -1)
        found.append(table)
    return found


def judged(totals: Array, norm: Array, threshold: Array) -> Array:
    """Scores from sums over tables: ``-inf`` below the threshold, or where a norm is below 0."""
    score = totals * norm
    return jnp.where((norm >= 0) & (score >= threshold), score, -jnp.inf)


def blockwise(values: Array, block: int) -> Scores:
    """With the largest value of each ``block`` slots and how many are finite; the last block may be short."""
    short = -values.shape[-1] % block
    padded = jnp.pad(values, ((0, 0),) * (values.ndim - 1) + ((0, short),), constant_values=-jnp.inf)
    blocks = padded.reshape(*values.shape[:-1], -1, block)
    return Scores(values, blocks.max(axis=-1), (blocks > -jnp.inf).sum(axis=-1, dtype=jnp.int32))
