"""A matrix in a few bits a weight: packed codes and their grid, as one pytree; and the settings that papers name.

    small = quantize_matrix(weights, hessian, preset("leanquant", 3))       matmul(x, small) = x Q^T
    dequantize(small) == solution.quantized, bit for bit                    stored_bits_per_weight(small)

Codes lie as `hashml_kernels.lut_matmul.layout` says, 3 bits in 3 bits. Everything that is stored is a leaf:
`hashml.accounting.stored_bytes` counts tables, scales and zeros. Leaves may be stacked along leading axes, one matrix
each, as `jax.lax.scan` takes layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from hashml.accounting import stored_bytes
from hashml.weights.calibration import AnyArray, Hessian
from hashml.weights.grids import Grid, GridSpec
from hashml.weights.solver import Method, Solution, check_options, solve
from hashml_kernels.lut_matmul import layout, lut_matmul, pack_codes, unpack_codes
from hashml_kernels.lut_matmul.api import Implementation


@dataclasses.dataclass(frozen=True)
class QuantizationSpec:
    """How a matrix is quantised: the options of `hashml.weights.solver.solve`.

    Raises:
        ValueError: for options that are not allowed.
    """

    grid: GridSpec
    method: Method = "gptq"
    act_order: bool = True
    damping: float | int = 0.1
    block: int = 128
    static_groups: bool = True

    def __post_init__(self) -> None:
        check_options(self.method, self.act_order, self.damping, self.block, self.static_groups)


_PRESETS: dict[str, tuple[Method, str, int]] = {
    "rtn": ("rtn", "min_max", 0),
    "gptq": ("gptq", "min_max", 0),
    "rtn_kmeans": ("rtn", "kmeans", 0),
    "gptq_kmeans": ("gptq", "kmeans", 0),
    "leanquant": ("gptq", "kmeans", 4),
    "leanquant_affine": ("gptq", "range_search", 4),
}
PRESETS = tuple(_PRESETS)


def preset(name: str, bits: int = 4, *, groups: int = 1, dtype: str = "float16") -> QuantizationSpec:
    """The settings of a method: ``rtn``, ``gptq``, ``leanquant`` (non-uniform) and ``leanquant_affine``; and the
    controls ``rtn_kmeans`` and ``gptq_kmeans``, whose columns weigh the same.

    All are damped by 0.1 of the mean diagonal and ordered by it, so that they differ in what their names say.

    Raises:
        ValueError: for another name, and as `GridSpec` does.
    """
    if name not in _PRESETS:
        raise ValueError(f"name is {name!r}; allowed are {', '.join(PRESETS)}")
    method, kind, exponent = _PRESETS[name]
    return QuantizationSpec(GridSpec(bits, kind, groups, exponent, dtype), method)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """``Q [out, in]`` as codes and grid.

    Attributes:
        codes: packed, a row an output.
        grid: their values.
        columns: of the matrix, which a last byte may exceed.
    """

    codes: UInt8[AnyArray, "*layers out row_bytes"]
    grid: Grid
    columns: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.columns)

    @property
    def bits(self) -> int:
        return self.grid.bits


def quantize_matrix(
    weights: Float[AnyArray, "out in"], hessian: Hessian | None, spec: QuantizationSpec
) -> QuantizedMatrix:
    """The matrix in few bits.

    Raises:
        ValueError: as `hashml.weights.solver.solve` does.
    """
    options: dict[str, Any] = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return pack_solution(solve(weights, hessian, **options))


def pack_solution(solution: Solution) -> QuantizedMatrix:
    """What is stored of a solution."""
    grid = solution.grid
    return QuantizedMatrix(_pack(solution.codes, grid.bits), grid, solution.codes.shape[1])


def dequantize(quantized: QuantizedMatrix) -> Float32[Array, "*layers out in"]:
    """Q in float32, inside `jax.jit` or out of it; differentiable by tables and scales.

    Raises:
        ValueError: if a row of codes has not the bytes that so many columns take.
    """
    return quantized.grid.decode(unpack_codes(quantized.codes, quantized.bits, quantized.columns))


def matmul(
    x: Float[AnyArray, "*batch in"], quantized: QuantizedMatrix, *, implementation: Implementation = "auto"
) -> Float[Array, "*batch out"]:
    """``x Q^T`` from the codes, with float32 sums, in the type of ``x``: `hashml_kernels.lut_matmul`, whose Q never
    exists whole.

    Raises:
        ValueError: if the widths differ, or for a stack of layers.
    """
    grid = quantized.grid
    # A zero is stored as a code, of one byte; the kernel computes with floats.
    zeros = None if grid.zeros is None else jnp.asarray(grid.zeros, jnp.float32)
    return lut_matmul(
        x,
        quantized.codes,
        tables=grid.tables,
        scales=grid.scales,
        zeros=zeros,
        bits=quantized.bits,
        columns=quantized.columns,
        implementation=implementation,
    )


def stored_bits_per_weight(quantized: QuantizedMatrix) -> float:
    """Stored bits a weight, tables or scales and zeros counted."""
    rows = quantized.codes.size // quantized.codes.shape[-1]
    return 8 * stored_bytes(quantized) / (rows * quantized.columns)


def spec_bits_per_weight(spec: QuantizationSpec | GridSpec, columns: int) -> float:
    """What `stored_bits_per_weight` will be of a matrix of so many columns, whatever its rows.

    Raises:
        ValueError: if groups do not divide the columns.
    """
    grid = spec.grid if isinstance(spec, QuantizationSpec) else spec
    grid.group_width(columns)
    number = jnp.finfo(grid.dtype).bits
    side = number * 2**grid.bits if grid.kind == "kmeans" else number + 8
    return (8 * layout(columns, grid.bits).row_bytes + grid.groups * side) / columns


_pack = jax.jit(pack_codes, static_argnames="bits")
