"""Dense layers that read codes: a kernel that models multiply by, and a layer for models of one's own.

    y = x Q^T + bias,    Q[row, column] = tables[row, group, code]  or  scales[row, group] (code - zeros[row, group])

`QuantizedKernel` is a `hashml.weights.quantized.QuantizedMatrix` in the place of a dense kernel ``[in, out]``: it
answers ``x @ kernel``, so that a decoder, its caches and its generation run from codes as they are. To an encoder
`hashml.weights.quantized.matmul` is given as its ``dense``. Neither ever has Q whole.

`QuantizedDense` is a Flax layer. What may be trained lies in its ``params``: tables or scales, and the bias. Codes
and zeros are integers, for which JAX has no gradient, and have a collection of their own, ``codes``.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from hashml.weights.calibration import AnyArray
from hashml.weights.grids import Grid, GridSpec
from hashml.weights.quantized import QuantizedMatrix, matmul
from hashml_kernels.lut_matmul import pack_codes
from hashml_kernels.lut_matmul.api import Implementation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel(QuantizedMatrix):
    """A matrix ``Q [out, in]`` that stands where a kernel ``Q^T`` stood: ``x @ kernel`` is ``x Q^T``."""

    __array_ufunc__ = None  # a NumPy array on the left leaves the product to this class

    def __rmatmul__(self, x: Any) -> Array:
        return matmul(x, self)


def as_kernel(matrix: QuantizedMatrix) -> QuantizedKernel:
    """The same arrays as a kernel."""
    return QuantizedKernel(matrix.codes, matrix.grid, matrix.columns)


def draw_matrix(key: PRNGKeyArray, shape: tuple[int, ...], grid: GridSpec) -> QuantizedMatrix:
    """A fresh matrix ``[*layers, out, in]``: codes uniform over values that are evenly spaced and, but for the half
    step by which an affine grid is off, of mean 0 and variance 1 / in.

    Raises:
        ValueError: if groups do not divide the columns.
    """
    *rows, columns = shape
    grid.group_width(columns)
    codes = jax.random.randint(key, shape, 0, 2**grid.bits, jnp.uint8)
    return QuantizedMatrix(pack_codes(codes, grid.bits), _even_grid((*rows, grid.groups), columns, grid), columns)


def _even_grid(shape: tuple[int, ...], columns: int, grid: GridSpec) -> Grid:
    levels = 2**grid.bits
    # The variance of as many equally likely values from -end to end is end^2 (levels + 1) / (3 (levels - 1)).
    end = math.sqrt(3 * (levels - 1) / ((levels + 1) * columns))
    if grid.kind == "kmeans":
        values = jnp.linspace(-end, end, levels).astype(grid.dtype)
        return Grid(jnp.broadcast_to(values, (*shape, levels)), None, None, grid.bits)
    scales = jnp.full(shape, 2 * end / (levels - 1), grid.dtype)
    return Grid(None, scales, jnp.full(shape, levels // 2, jnp.uint8), grid.bits)


class QuantizedDense(nn.Module):
    """A dense layer of codes, for `flax.linen.Dense`.

    ``dense_variables`` makes its variables from a matrix that was quantised; `init` draws some, to be trained or
    replaced.

    Attributes:
        features: outputs.
        grid: bits, groups and type of the matrix, and whether it has tables (``kmeans``) or scales.
        use_bias: whether there is a bias.
        implementation: of `hashml_kernels.lut_matmul.lut_matmul`.
    """

    features: int
    grid: GridSpec = dataclasses.field(default_factory=GridSpec)
    use_bias: bool = True
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch in"]) -> Float[Array, "*batch {self.features}"]:
        columns = x.shape[-1]
        width = self.grid.group_width(columns)
        fresh = _even_grid((self.features, columns // width), columns, self.grid)

        def drawn() -> UInt8[Array, "out row_bytes"]:
            return jnp.asarray(draw_matrix(self.make_rng("params"), (self.features, columns), self.grid).codes)

        codes: Any = self.variable("codes", "codes", drawn).value
        if fresh.tables is not None:
            grid = Grid(self.param("tables", lambda key: fresh.tables), None, None, self.grid.bits)
        else:
            zeros: Any = self.variable("codes", "zeros", lambda: fresh.zeros).value
            grid = Grid(None, self.param("scales", lambda key: fresh.scales), zeros, self.grid.bits)
        y = matmul(x, QuantizedMatrix(codes, grid, columns), implementation=self.implementation)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        return y


def dense_variables(matrix: QuantizedMatrix, bias: Float[AnyArray, " out"] | None = None) -> dict[str, Any]:
    """Variables of a `QuantizedDense` that multiplies by this matrix.

    Args:
        matrix: of one layer.
        bias: of a layer with ``use_bias``, or ``None``.

    Raises:
        ValueError: for a stack of layers, or a bias of another width.
    """
    if len(matrix.shape) != 2:
        raise ValueError(f"matrix has the shape {matrix.shape}; a layer takes one matrix [out, in]")
    if bias is not None and bias.shape[0] != matrix.shape[0]:
        raise ValueError(f"bias has {bias.shape[0]} entries; matrix has {matrix.shape[0]} outputs")
    grid = matrix.grid
    params = {"tables": grid.tables} if grid.tables is not None else {"scales": grid.scales}
    codes = {"codes": matrix.codes} | ({} if grid.zeros is None else {"zeros": grid.zeros})
    params |= {} if bias is None else {"bias": bias}
    return jax.tree.map(jnp.asarray, {"params": params, "codes": codes})
