"""The sizes at which `huffman_decode` is compiled, timed and tested, and the bytes it must move at each."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.huffman_decode import pallas_mosaic_tpu, pallas_triton
from hashml_kernels.huffman_decode.api import huffman_decode
from hashml_kernels.huffman_decode.operands import UNIT, FloatParts, Geometry, Operands
from hashml_kernels.problem import Problem

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}
_PLATFORMS = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}
_SEGMENT = 4096

BFLOAT16, FLOAT16 = FloatParts(16, 7), FloatParts(16, 7)
E4M3, E4M3_PAIRS, E5M2 = FloatParts(8, 3), FloatParts(8, 3, pairs=True), FloatParts(8, 1)

LONGER = (5,) * 24 + (6,) * 8 + (7,) * 8 + (8,) * 8 + (9,) * 16
"""5.5 bits a symbol: exponents with three bits of mantissa, or two exponents."""

LENGTHS = (2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12)
"""A code for the exponents of Gaussian numbers, which have the shares 0.30, 0.27, 0.19, 0.10, and half as much each
octave below (and one above, of 0.05): 2.5 bits a symbol where each comes as often as its word is long."""


class Case(NamedTuple):
    """One matrix."""

    name: str
    total: int
    form: FloatParts | None = BFLOAT16
    chunk: int = 512
    lengths: tuple[int, ...] = LENGTHS
    max_length: int = 12

    @property
    def geometry(self) -> Geometry:
        symbols = Geometry(self.total, 1, 1, self.form).symbols
        lanes = max(1, round(symbols / self.chunk))
        steps = -(-symbols // (UNIT * lanes))
        return Geometry(self.total, lanes, max(1, _SEGMENT // (UNIT * steps)), self.form)

    @property
    def stride(self) -> int:
        """Bits of a lane: the mean of fair bits."""
        mean = sum(length / 2**length for length in self.lengths)
        return round(UNIT * self.geometry.steps * mean)

    @property
    def first_symbol(self) -> int:
        """So that symbols have no more bits than the format."""
        return {3: 1, 1: 20}.get(self.form.low, 107) if self.form is not None else 107

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        geometry = self.geometry
        segments = -(-geometry.lanes // geometry.lanes_a_base)
        words = segments * -(-geometry.lanes_a_base * self.stride // 32) + 1
        sizes = [(words, "uint32"), (segments, "uint32"), (geometry.lanes, "uint16"), (2**self.max_length, "uint16")]
        if self.form is not None:
            sizes.append((-(-self.total * self.form.rest_bits // 8), "uint8"))
        return tuple(jax.ShapeDtypeStruct((size,), dtype) for size, dtype in sizes)

    def operands(self) -> Operands:
        """As backends see them."""
        found = self.arguments()
        return Operands(*found, *([None] if self.form is None else []))  # pyright: ignore[reportArgumentType]

    def bytes(self) -> int:
        """All arguments once, and the result."""
        result = self.total * self.geometry.dtype.itemsize
        return result + sum(array.size * array.dtype.itemsize for array in self.arguments())


def table_of(lengths: tuple[int, ...], max_length: int, first: int) -> np.ndarray:
    """A decoder's table of a canonical code, for symbols from ``first`` on."""
    table, end = np.zeros(2**max_length, np.uint16), 0
    for length, symbol in sorted((length, first + i) for i, length in enumerate(lengths)):
        begin, end = end, end + 2 ** (max_length - length)
        table[begin:end] = length << 8 | symbol
    assert end == 2**max_length
    return table


LLAMA_7B = (
    Case("llama7b_attention", 4096 * 4096),
    Case("llama7b_mlp", 11008 * 4096),
    Case("llama7b_attention_short", 4096 * 4096, chunk=128),
    Case("llama7b_mlp_symbols", 11008 * 4096, None),
    Case("llama7b_mlp_f16", 11008 * 4096, FLOAT16, lengths=LONGER),
    Case("llama7b_mlp_e4m3", 11008 * 4096, E4M3),
    Case("llama7b_mlp_e4m3_pairs", 11008 * 4096, E4M3_PAIRS, lengths=LONGER),
    Case("llama7b_mlp_e5m2", 11008 * 4096, E5M2, lengths=(3,) * 6 + (4,) * 2 + (5,) * 2 + (6,) * 2 + (7,) * 4),
)

ODD = (
    Case("ragged", 600 * 333 + 1),
    Case("ragged_e5m2", 100_003, E5M2, chunk=100),
    Case("ragged_e4m3", 70_001, E4M3, chunk=33),
    Case("ragged_long_words", 50_002, None, 16, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 14), 14),
    Case("few_lanes", 4096, chunk=64),
)

CASES = LLAMA_7B + ODD


def problems() -> Iterator[Problem]:
    """Every case; decoding has no backward pass."""
    return map(_problem, CASES)


def _problem(case: Case) -> Problem:
    def refusal(implementation: str) -> str | None:
        try:
            _KERNELS[implementation].check(case.operands(), case.geometry)
        except NotImplementedError as error:
            return str(error)
        return None

    return Problem(
        op="huffman_decode",
        case=case.name,
        direction="forward",
        arguments=case.arguments(),
        draw=lambda rng: draw(case, rng),
        call=lambda implementation, *arrays: call(case, implementation, *arrays),
        kernels=_PLATFORMS,
        refusal=refusal,
        bytes=case.bytes(),
        flops=0,
        terms=1,
        table_rows=None,
    )


def draw(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Fair bits, in which a word of ``n`` bits comes with chance ``2^-n``, and entrances at equal distances.

    A lane's code then ends near the next one's beginning, and not upon it: nobody looks there.
    """
    geometry = case.geometry
    words, bases, _, _, *rest = case.arguments()
    lane = np.arange(geometry.lanes)
    segment = -(-geometry.lanes_a_base * case.stride // 32)
    return (
        rng.integers(0, 2**32, words.shape, np.uint32),
        (np.arange(bases.shape[0]) * segment).astype(np.uint32),
        (lane % geometry.lanes_a_base * case.stride).astype(np.uint16),
        table_of(case.lengths, case.max_length, case.first_symbol),
        *(rng.integers(0, 256, array.shape, np.uint8) for array in rest),
    )


def call(case: Case, implementation, words, bases, starts, table, rest=None):
    """The op, on the arrays of `Case.arguments`."""
    return huffman_decode(
        jnp.asarray(words), bases, starts, table, rest=rest, form=case.form, count=case.total,
        lanes_a_base=case.geometry.lanes_a_base, implementation=implementation,
    )  # fmt: skip
