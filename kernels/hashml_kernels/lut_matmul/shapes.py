"""The sizes at which `lut_matmul` is compiled, timed and tested, and the bytes it must move at each."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.lut_matmul import pallas_mosaic_tpu, pallas_triton
from hashml_kernels.lut_matmul.api import lut_matmul
from hashml_kernels.lut_matmul.layout import Layout, layout
from hashml_kernels.lut_matmul.operands import Operands
from hashml_kernels.problem import Problem

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}
_PLATFORMS = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}


class Case(NamedTuple):
    """``batch`` inputs of ``columns`` numbers meet ``rows`` rows of codes."""

    name: str
    batch: int
    columns: int
    rows: int
    bits: int
    groups: int = 1
    affine: bool = False
    dtype: str = "bfloat16"
    grid_dtype: str | None = None
    """Of tables, scales and zeros; None: that of the inputs."""
    backward: bool = False
    """Whether the gradient is compiled and timed too."""

    @property
    def own(self) -> Layout:
        return layout(self.columns, self.bits)

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """``x, codes, tables``, or ``x, codes, scales, zeros``."""
        grid = (self.rows, self.groups) if self.affine else (self.rows, self.groups, 2**self.bits)
        dtype = self.grid_dtype or self.dtype
        return (
            jax.ShapeDtypeStruct((self.batch, self.columns), self.dtype),
            jax.ShapeDtypeStruct((self.rows, self.own.row_bytes), jnp.uint8),
            *[jax.ShapeDtypeStruct(grid, dtype)] * (2 if self.affine else 1),
        )

    def operands(self) -> Operands:
        """As backends see them."""
        x, codes, *grids = self.arguments()
        return Operands(x, codes, *([None, *grids] if self.affine else [*grids, None, None]))  # pyright: ignore[reportArgumentType]

    def y(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.rows), self.dtype)

    def bytes(self) -> int:
        """Codes, tables, inputs and results."""
        return sum(a.size * a.dtype.itemsize for a in (*self.arguments(), self.y()))

    def backward_bytes(self) -> int:
        """What the forward pass reads and the result's gradient are read, the inputs' and tables' are written."""
        x, _, *grids = self.arguments()
        return self.bytes() + sum(a.size * a.dtype.itemsize for a in (x, *grids))

    def flops(self) -> int:
        """Of one product; the backward pass has two."""
        return 2 * self.batch * self.rows * self.columns


# Llama-7B: projections of attention, and of the perceptron, there and back.
DECODE = (
    Case("attention_t4_b1", 1, 4096, 4096, 4),
    Case("attention_t4g4_b8", 8, 4096, 4096, 4, 4),
    Case("attention_t3_b1", 1, 4096, 4096, 3),
    Case("attention_t2_b8", 8, 4096, 4096, 2),
    Case("up_t4_b8", 8, 4096, 11008, 4),
    Case("up_t2g4_b1", 1, 4096, 11008, 2, 4),
    Case("down_t4g4_b1", 1, 11008, 4096, 4, 4),
    Case("down_t3g4_b8", 8, 11008, 4096, 3, 4),
    Case("attention_a4g32_b1", 1, 4096, 4096, 4, 32, affine=True),
    Case("down_a4g86_b8", 8, 11008, 4096, 4, 86, affine=True),
    Case("attention_a8_b1", 1, 4096, 4096, 8, affine=True),
    Case("up_a8_b8", 8, 4096, 11008, 8, affine=True),
)

PREFILL = (
    Case("attention_t4g4_b512", 512, 4096, 4096, 4, 4, backward=True),
    Case("attention_t3_b512", 512, 4096, 4096, 3, backward=True),
    Case("down_t2_b512", 512, 11008, 4096, 2, backward=True),
    Case("up_a4g32_b512", 512, 4096, 11008, 4, 32, affine=True, backward=True),
)

ODD = (
    Case("ragged_t3", 5, 133, 70, 3, 7, dtype="float32", backward=True),
    Case("ragged_t1", 3, 300, 200, 1, grid_dtype="float32"),
    Case("ragged_t4_f16", 19, 210, 45, 4, 3, dtype="float16", backward=True),
    Case("ragged_a2", 37, 260, 140, 2, 5, affine=True, backward=True),
    Case("tables_of_bytes", 4, 128, 64, 8),
)

CASES = DECODE + PREFILL + ODD


def problems() -> Iterator[Problem]:
    """Every case forward, some backward."""
    for case in CASES:
        yield _problem(case, backward=False)
        if case.backward:
            yield _problem(case, backward=True)


def _problem(case: Case, *, backward: bool) -> Problem:
    arguments = (*case.arguments(), case.y()) if backward else case.arguments()

    def refusal(implementation: str) -> str | None:
        try:
            _KERNELS[implementation].check("gradient" if backward else "multiply", case.operands(), case.own)
        except NotImplementedError as error:
            return str(error)
        return None

    return Problem(
        op="lut_matmul",
        case=case.name,
        direction="backward" if backward else "forward",
        arguments=arguments,
        draw=lambda rng: draw(case, arguments, rng),
        call=_backward(case) if backward else _forward(case),
        kernels=_PLATFORMS,
        refusal=refusal,
        bytes=case.backward_bytes() if backward else case.bytes(),
        flops=case.flops() * (2 if backward else 1),
        terms=max(case.columns, case.rows, case.batch),
        table_rows=None,
    )


def call(case: Case, implementation, x, codes, *grids):
    """The public function."""
    named = dict(zip(("scales", "zeros") if case.affine else ("tables",), grids, strict=True))
    return lut_matmul(x, codes, **named, bits=case.bits, columns=case.columns, implementation=implementation)


def _forward(case: Case):
    return lambda implementation, *arrays: call(case, implementation, *arrays)


def _backward(case: Case):
    def pulled(implementation, x, codes, *rest):
        *grids, dy = rest
        _, pull = jax.vjp(lambda x, *grids: call(case, implementation, x, codes, *grids), x, *grids)
        return pull(dy)

    return pulled


def draw(case: Case, arguments, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Standard normal inputs, any codes, and numbers of W that keep the size of what they multiply."""
    size = case.columns**-0.5
    x, codes, *rest = arguments
    found = [rng.standard_normal(x.shape, np.float32), rng.integers(0, 256, codes.shape, np.uint8)]
    if case.affine:
        scales, zeros, *rest = rest
        # Codes are uniform: their spread is 2**bits / sqrt(12).
        spread = size * 12**0.5 / 2**case.bits
        found.append(spread * (1 + rng.random(scales.shape, np.float32)))
        found.append(2 ** (case.bits - 1) * (0.5 + rng.random(zeros.shape, np.float32)))
    else:
        tables, *rest = rest
        found.append(size * rng.standard_normal(tables.shape, np.float32))
    found += [rng.standard_normal(a.shape, np.float32) for a in rest]
    return tuple(a.astype(b.dtype) for a, b in zip(found, arguments, strict=True))
