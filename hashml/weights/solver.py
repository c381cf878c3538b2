"""Calibrated rounding of one layer: GPTQ (Frantar et al., ICLR 2023) with any grid, and rounding to nearest.

    for column i:    q = grid(w_i);    e_i = (w_i - q) / U_ii;    W[:, i:] -= e_i outer U[i, i:]
    H = R R^T damped,  U = R^-1:       W - Q = E U,    1/2 tr(D H D^T) = 1/2 sum_i ||e_i||^2,    D = W - Q

What rounding one column loses, columns that are still free make up for. A block of columns is eliminated by itself,
and its errors reach the rest in one product. LeanQuant (Zhang, Shrivastava, ICLR 2025) changes the grid alone.
The losses of rounding to nearest are those of E = D R, so that the identity holds for it, too.

Groups are static by default: their grids come from the weights as given, and a column reads that of its place,
whatever the order. Otherwise a group's grid is found when its first column is reached, from the weights as they are
then, with all errors so far: the block is made to divide the group.

Inputs that were always 0 have weight 0 here, as in the reference.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from hashml.weights.calibration import AnyArray, Hessian, factorize
from hashml.weights.grids import (
    Grid,
    GridSpec,
    affine_codes,
    affine_values,
    column_importance,
    fit_groups,
    make_grid,
    midpoints,
)

Method = Literal["rtn", "gptq"]


class Solution(NamedTuple):
    """Codes of a layer and what they cost; columns in the order of the layer.

    Attributes:
        codes: of the grid.
        grid: in the type that it is stored in.
        quantized: Q, the values of the codes.
        losses: of each column, half its squared errors over rows; their sum is ``1/2 tr(D H D^T)`` with the damped
            H. Without a Hessian, ``None``.
        damping: that was needed, relative to the mean diagonal.
    """

    codes: UInt8[Array, "out in"]
    grid: Grid
    quantized: Float32[Array, "out in"]
    losses: Float32[Array, " in"] | None
    damping: float


def check_options(method: str, act_order: bool, damping: float | int, block: int, static_groups: bool) -> None:
    """Raises:
    ValueError: for options of `solve` that are not allowed, alone or together.
    """
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; allowed are {', '.join(get_args(Method))}")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping is {damping}; it must be finite and not negative")
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    if method == "gptq" and act_order and not static_groups:
        raise ValueError("static_groups is False with act_order, which scatters the columns of a group; one must go")


def solve(
    weights: Float[AnyArray, "out in"],
    hessian: Hessian | None,
    grid: GridSpec,
    *,
    method: Method = "gptq",
    act_order: bool = True,
    damping: float | int = 0.1,
    block: int = 128,
    static_groups: bool = True,
) -> Solution:
    """Codes of a layer.

    Args:
        weights: rows are outputs.
        hessian: of its inputs, from `hashml.weights.calibration.calibrate`; may be ``None`` for ``rtn`` on a grid
            that reads no importance.
        grid: what kind of grid.
        method: ``gptq``, or ``rtn``: round to nearest, columns by themselves.
        act_order: whether columns go by falling diagonal of the Hessian.
        damping: of the Hessian, relative to its mean diagonal; LeanQuant takes 0.1, GPTQ 0.01.
        block: columns eliminated before the rest hears of it; changes the result only by rounding.
        static_groups: whether grids come from the weights as given.

    Raises:
        ValueError: for options that are not allowed, groups that do not divide the columns, weights that are not
            finite, and a Hessian that is missing, of another width, not finite or not positive definite.
    """
    check_options(method, act_order, damping, block, static_groups)
    columns = weights.shape[1]
    width = grid.group_width(columns)
    if not bool(jnp.isfinite(weights).all()):
        raise ValueError("weights are NaN or infinite in places; all must be finite")
    if hessian is None:
        if method == "gptq" or grid.weighted:
            raise ValueError(
                f"hessian is None; method {method!r} with the grid {grid.kind!r} of exponent {grid.exponent} reads it"
            )
        found = make_grid(weights, spec=grid)
        codes = found.nearest(weights)
        return Solution(codes, found, found.decode(codes), None, 0.0)
    if hessian.matrix.shape != (columns, columns):
        raise ValueError(f"hessian has the shape {hessian.matrix.shape}; weights have {columns} columns")
    factor = factorize(hessian, damping=damping, act_order=act_order)
    alive = jnp.where(factor.dead, 0, jnp.asarray(weights, jnp.float32))
    importance = column_importance(factor, grid.exponent if grid.weighted else 0)
    if method == "rtn":
        found = make_grid(alive, importance, spec=grid)
        codes = found.nearest(alive)
        quantized = found.decode(codes)
        losses = _nearest_losses(alive - quantized, factor.root, factor.order)
    elif static_groups:
        found = make_grid(alive, importance, spec=grid)
        codes, losses = _eliminate(alive, factor.inverse, factor.order, found, width=width, block=min(block, columns))
        quantized = found.decode(codes)
    else:
        size = max(divisor for divisor in range(1, min(block, width) + 1) if width % divisor == 0)
        codes, losses, found = _eliminate_regrouping(alive, factor.inverse, importance, spec=grid, block=size)
        quantized = found.decode(codes)
    return Solution(codes, found, quantized, losses * factor.scale, factor.damping)


# --- elimination, columns first --------------------------------------------------------------------

Pick = Callable[[Array, Array], tuple[Array, Array]]
"""``(column's number, weights of the column [out]) -> (codes, values)``."""


def _picker(grid: Grid, group_of: Array) -> Pick:
    """Nearest values on the grid of the column's group; outputs last, as elimination goes along them."""
    if grid.tables is not None:
        tables = jnp.transpose(grid.tables, (1, 2, 0)).astype(jnp.float32)
        between = jnp.transpose(midpoints(grid.tables), (1, 2, 0))

        def from_table(column: Array, weights: Array) -> tuple[Array, Array]:
            group = group_of[column]
            codes = (weights > between[group]).sum(axis=0)
            return codes, jnp.take_along_axis(tables[group], codes[None], axis=0, mode="clip")[0]

        return from_table
    assert grid.scales is not None
    assert grid.zeros is not None
    scales, zeros = grid.scales.T.astype(jnp.float32), grid.zeros.T.astype(jnp.float32)

    def from_scale(column: Array, weights: Array) -> tuple[Array, Array]:
        scale, zero = scales[group_of[column]], zeros[group_of[column]]
        codes = affine_codes(weights, scale, zero, grid.bits)
        return codes, affine_values(codes, scale, zero)

    return from_scale


def _eliminate_block(weights: Array, upper: Array, first: Array, pick: Pick) -> tuple[Array, Array]:
    """Codes and errors of a block ``[block, out]`` whose first column has this number."""

    def column(i: Array, held: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weights, errors, codes = held
        now = jax.lax.dynamic_index_in_dim(weights, i, keepdims=False)
        row = jax.lax.dynamic_index_in_dim(upper, i, keepdims=False)
        code, value = pick(first + i, now)
        error = (now - value) / row[i]
        # The row is 0 left of the diagonal: columns that are done stay as they are.
        weights = weights - row[:, None] * error
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        return weights, put(errors, error), put(codes, code.astype(jnp.uint8))

    start = (weights, jnp.zeros_like(weights), jnp.zeros(weights.shape, jnp.uint8))
    _, errors, codes = jax.lax.fori_loop(0, len(weights), column, start)
    return codes, errors


def _eliminate_blocks(
    ordered: Array, upper: Array, firsts: Array, block: int, pick: Pick
) -> tuple[Array, tuple[Array, Array]]:
    """All columns ``[in, out]`` after the blocks that begin at ``firsts``; the blocks' codes and losses."""

    def step(ordered: Array, first: Array) -> tuple[Array, tuple[Array, Array]]:
        rows = jax.lax.dynamic_slice_in_dim(upper, first, block)
        square = jax.lax.dynamic_slice_in_dim(rows, first, block, axis=1)
        codes, errors = _eliminate_block(jax.lax.dynamic_slice_in_dim(ordered, first, block), square, first, pick)
        # Columns of the block itself change, too, and are not read again.
        ordered = ordered - jnp.matmul(rows.T, errors, precision=jax.lax.Precision.HIGHEST)
        return ordered, (codes, (errors**2).sum(axis=1) / 2)

    return jax.lax.scan(step, ordered, firsts)


@functools.partial(jax.jit, static_argnames=("width", "block"))
def _eliminate(
    weights: Array, inverse: Array, order: Array, grid: Grid, *, width: int, block: int
) -> tuple[Array, Array]:
    """Codes and losses on fixed grids. Columns are padded to whole blocks, which no other column notices."""
    rows, columns = weights.shape
    short = -columns % block
    ordered = jnp.pad(weights.T[order], ((0, short), (0, 0)))
    upper = jnp.pad(inverse, ((0, short), (0, short))) + jnp.diag(jnp.arange(columns + short) >= columns)
    pick = _picker(grid, jnp.pad(order // width, (0, short)))
    firsts = jnp.arange(0, columns + short, block, dtype=jnp.int32)
    _, (codes, losses) = _eliminate_blocks(ordered, upper, firsts, block, pick)
    back = jnp.argsort(order)
    return codes.reshape(-1, rows)[back].T, losses.reshape(-1)[back]


@functools.partial(jax.jit, static_argnames=("spec", "block"))
def _eliminate_regrouping(
    weights: Array, upper: Array, importance: Array, *, spec: GridSpec, block: int
) -> tuple[Array, Array, Grid]:
    """Codes and losses in the columns' own order, and grids that were found on the way."""
    rows, columns = weights.shape
    width = spec.group_width(columns)

    def group(ordered: Array, first_of_group: Array) -> tuple[Array, tuple[Array, Array, Grid]]:
        own = jax.lax.dynamic_slice_in_dim(ordered, first_of_group, width)
        weighing = jax.lax.dynamic_slice_in_dim(importance, first_of_group, width)
        grid = fit_groups(own.T[None], weighing[None], spec)
        grid = jax.tree.map(lambda part: jnp.swapaxes(part, 0, 1), grid)
        pick = _picker(grid, jnp.zeros(columns, jnp.int32))
        firsts = first_of_group + jnp.arange(0, width, block, dtype=jnp.int32)
        ordered, (codes, losses) = _eliminate_blocks(ordered, upper, firsts, block, pick)
        return ordered, (codes, losses, grid)

    firsts = jnp.arange(0, columns, width, dtype=jnp.int32)
    _, (codes, losses, grids) = jax.lax.scan(group, weights.T, firsts)
    grid = jax.tree.map(lambda part: jnp.swapaxes(part[:, :, 0], 0, 1), grids)
    return codes.reshape(columns, rows).T, losses.reshape(-1), grid


@jax.jit
def _nearest_losses(difference: Array, root: Array, order: Array) -> Array:
    errors = jnp.matmul(difference[:, order], root, precision=jax.lax.Precision.HIGHEST)
    return ((errors**2).sum(axis=0) / 2)[jnp.argsort(order)]
