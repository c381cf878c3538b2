"""Grids: the few values that a weight may take, by row and group (GPTQ, ICLR 2023; LeanQuant, arXiv 2407.10032).

    tables:   w = table[row, group, code]          affine:   w = scale[row, group] (code - zero[row, group])

Groups are contiguous runs of ``in / groups`` columns. How a grid is found:

    min_max        low = min(w, 0), high = max(w, 0):  scale = (high - low) / (2^bits - 1), zero = round(-low / scale)
    symmetric      low = -high, high = max |w|, zero = 2^(bits - 1)
    mse            min_max, both ends shrunk by 0 to 79 hundredths: the least sum |w - q|^2.4
    range_search   both ends free, min_max among the candidates: the least sum a (w - q)^2     (LeanQuant affine)
    kmeans         2^bits values by k-means of the row under weights a                         (LeanQuant)

The importance of column i is ``a_i = d_i^-exponent``, d the diagonal of the Cholesky factor of the inverse Hessian
(`hashml.weights.calibration.factorize`); exponent 4 as in the reference's README, 0 for the unweighted control.
A grid is rounded to the type that it is stored in before a code is chosen, so what is stored is what was solved for.

Departures: a symmetric grid has both signs also where a row has one, whose larger half the reference clips; dead
inputs have no importance; 8 bits start from quantiles, since k-means++ makes 256 passes over a row; k-means ends
after 30 iterations of the reference's 100; the search tries 256 ranges, and 49 around the best one.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Integer, UInt8

from hashml.weights.calibration import AnyArray, Factor
from hashml.weights.lloyd_1d import STARTS, cluster_rows
from hashml_kernels.lut_matmul.layout import BITS

KINDS = ("min_max", "symmetric", "mse", "range_search", "kmeans")
STORED = ("float16", "bfloat16", "float32")

_SHRINKS, _NORM = 80, 2.4
_STEPS = 64
"""Of a range, in `range_search`: each end moves by 0, 2, .. 30 of them, then by up to 1.5 in halves."""


@dataclasses.dataclass(frozen=True)
class GridSpec:
    """What kind of grid; hashable, hence static under `jax.jit`.

    Attributes:
        bits: of a code: 1, 2, 3, 4 or 8.
        kind: one of `KINDS`.
        groups: of a row; they divide its columns.
        exponent: of the importance, for ``range_search`` and ``kmeans``; 0: columns weigh the same.
        dtype: of tables and scales as they are stored.
        start: of ``kmeans``, one of `hashml.weights.lloyd_1d.STARTS`; ``None``: ``linspace`` up to 3 bits,
            ``kmeans++`` for 4, ``quantiles`` for 8.
        iterations: of ``kmeans``, at most.
        seed: of ``kmeans++``.

    Raises:
        ValueError: for anything else.
    """

    bits: int = 4
    kind: str = "kmeans"
    groups: int = 1
    exponent: float | int = 4
    dtype: str = "float16"
    start: str | None = None
    iterations: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("bits", self.bits, BITS),
            ("kind", self.kind, KINDS),
            ("dtype", self.dtype, STORED),
            ("start", self.start, (None, *STARTS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(str, allowed))}")
        for name, value, least in (
            ("groups", self.groups, 1),
            ("iterations", self.iterations, 0),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not 0 <= self.exponent < float("inf"):
            raise ValueError(f"exponent is {self.exponent}; it must be finite and not negative")

    @property
    def weighted(self) -> bool:
        """Whether the grid reads the importance of columns."""
        return self.kind in ("range_search", "kmeans") and self.exponent > 0

    def group_width(self, columns: int) -> int:
        """Columns of a group.

        Raises:
            ValueError: if groups do not divide the columns.
        """
        if columns % self.groups:
            raise ValueError(f"groups is {self.groups}; it must divide the {columns} columns of weights")
        return columns // self.groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that weights may take, in the type that they are stored in; tables, or scales and zeros.

    Attributes:
        tables: ascending in each row and group.
        scales: of an affine grid.
        zeros: codes of 0.
        bits: of a code.
    """

    tables: Float[AnyArray, "*layers out groups levels"] | None
    scales: Float[AnyArray, "*layers out groups"] | None
    zeros: UInt8[AnyArray, "*layers out groups"] | None
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def groups(self) -> int:
        if self.tables is not None:
            return self.tables.shape[-2]
        assert self.scales is not None
        return self.scales.shape[-1]

    def decode(self, codes: Integer[AnyArray, "*layers out in"]) -> Float32[Array, "*layers out in"]:
        """The values of codes."""
        return _decode(self, codes)

    def nearest(self, weights: Float[AnyArray, "out in"]) -> UInt8[Array, "out in"]:
        """Codes of the nearest values: of an affine grid as it rounds, to even where two are equally near; of a
        table the smaller one."""
        return _nearest(self, weights)


def column_importance(factor: Factor, exponent: float | int) -> Float32[np.ndarray, " in"]:
    """``d^-exponent`` of each input in its own order, the largest 1; of dead inputs 0."""
    logs = np.empty(len(factor.order))
    logs[factor.order] = -exponent * np.log(np.diagonal(factor.inverse).astype(np.float64))
    alive = ~factor.dead
    most = logs[alive].max(initial=-np.inf)
    return np.where(alive, np.exp(np.where(alive, logs - most, 0)), 0).astype(np.float32)


def make_grid(
    weights: Float[AnyArray, "out in"], importance: Float[AnyArray, " in"] | None = None, *, spec: GridSpec
) -> Grid:
    """The grid of each row and group.

    Args:
        weights: finite.
        importance: of columns, from `column_importance`; ``None``: all weigh the same.
        spec: what kind.

    Raises:
        ValueError: if groups do not divide the columns.
    """
    rows, columns = weights.shape
    width = spec.group_width(columns)
    importance = np.ones(columns, np.float32) if importance is None else importance
    order = None
    if spec.kind == "kmeans" and jax.default_backend() == "cpu" and not isinstance(weights, Tracer):
        # NumPy sorts rows ten times faster than XLA does on a CPU; half the time of a table went there.
        grouped = np.asarray(weights, np.float32).reshape(rows, spec.groups, width).transpose(1, 0, 2)
        order = np.argsort(grouped, axis=-1).astype(np.int32)
    # The exponent is in the importance already, and another one needs no other program.
    return _make_grid(weights, importance, order, spec=dataclasses.replace(spec, exponent=0))


@functools.partial(jax.jit, static_argnames="spec")
def _make_grid(weights: Array, importance: Array, order: Array | None, *, spec: GridSpec) -> Grid:
    grouped = weights.reshape(weights.shape[0], spec.groups, -1).transpose(1, 0, 2)
    grid = fit_groups(grouped, importance.reshape(spec.groups, -1), spec, order)
    return jax.tree.map(lambda part: jnp.swapaxes(part, 0, 1), grid)


def fit_groups(
    weights: Float[Array, "groups out width"],
    importance: Float[Array, "groups width"],
    spec: GridSpec,
    order: Integer[Array, "groups out width"] | None = None,
) -> Grid:
    """Grids with groups first; traceable. ``order`` sorts each row of ``weights``, where somebody knows it."""
    weights, importance = weights.astype(jnp.float32), importance.astype(jnp.float32)
    if spec.kind == "kmeans":
        return Grid(_tables(weights, importance, spec, order), None, None, spec.bits)
    low, high = (jnp.minimum(weights.min(axis=-1), 0), jnp.maximum(weights.max(axis=-1), 0))
    if spec.kind == "symmetric":
        high = jnp.maximum(-low, high)
        low = -high
    elif spec.kind == "mse":
        parts = 1 - jnp.arange(_SHRINKS, dtype=jnp.float32) / 100
        low, high = _search(weights, lambda part: (part * low, part * high), parts, jnp.ones_like(importance), spec)
    elif spec.kind == "range_search":
        step = (high - low) / _STEPS
        coarse, fine = np.arange(0, _STEPS // 2, 2), np.arange(-3, 4) / 2
        for steps in (coarse, fine):
            low, high = _search(weights, _moved(low, high, step), _pairs(steps), importance, spec)
    scales, zeros = _affine(low, high, spec)
    return Grid(None, scales, zeros, spec.bits)


# --- arithmetic of a code, in float32 --------------------------------------------------------------


def affine_codes(weights: Array, scales: Array, zeros: Array, bits: int) -> Array:
    """Codes as float32; a scale that its type rounded to 0 has one value."""
    codes = jnp.round(weights / jnp.where(scales > 0, scales, 1)) + zeros
    return jnp.clip(codes, 0, 2**bits - 1)


def affine_values(codes: Array, scales: Array, zeros: Array) -> Array:
    return scales * (codes - zeros)


def midpoints(tables: AnyArray) -> Array:
    """A code is the number of midpoints below a weight."""
    lower, upper = (jnp.asarray(part, jnp.float32) for part in (tables[..., :-1], tables[..., 1:]))
    return lower + (upper - lower) / 2


def _scales_and_zeros(grid: Grid) -> tuple[Array, Array]:
    """Float32, with an axis for the columns of a group."""
    assert grid.scales is not None
    assert grid.zeros is not None
    return jnp.asarray(grid.scales, jnp.float32)[..., None], jnp.asarray(grid.zeros, jnp.float32)[..., None]


@jax.jit
def _decode(grid: Grid, codes: Array) -> Array:
    shaped = codes.reshape(*codes.shape[:-1], grid.groups, -1)
    if grid.tables is not None:
        tables = grid.tables.astype(jnp.float32)
        return jnp.take_along_axis(tables, shaped.astype(jnp.int32), axis=-1, mode="clip").reshape(codes.shape)
    scales, zeros = _scales_and_zeros(grid)
    return affine_values(shaped.astype(jnp.float32), scales, zeros).reshape(codes.shape)


@jax.jit
def _nearest(grid: Grid, weights: Array) -> Array:
    shaped = weights.astype(jnp.float32).reshape(weights.shape[0], grid.groups, -1)
    if grid.tables is not None:
        count = jax.vmap(jax.vmap(functools.partial(jnp.searchsorted, side="left", method="scan")))
        codes = count(midpoints(grid.tables), shaped)
    else:
        scales, zeros = _scales_and_zeros(grid)
        codes = affine_codes(shaped, scales, zeros, grid.bits)
    return codes.reshape(weights.shape).astype(jnp.uint8)


# --- finding a grid --------------------------------------------------------------------------------


def _tables(weights: Array, importance: Array, spec: GridSpec, order: Array | None) -> Array:
    groups, rows, width = weights.shape
    start = spec.start or ("linspace" if spec.bits <= 3 else "kmeans++" if spec.bits <= 4 else "quantiles")
    found = cluster_rows(
        weights.reshape(groups * rows, width),
        jnp.repeat(importance, rows, axis=0),
        2**spec.bits,
        order=None if order is None else order.reshape(groups * rows, width),
        start=start,
        seed=spec.seed,
        iterations=spec.iterations,
    )
    return _stored(found.reshape(groups, rows, 2**spec.bits), spec)


def _affine(low: Array, high: Array, spec: GridSpec) -> tuple[Array, Array]:
    """Scales and zeros as they are stored."""
    empty = low == high
    low, high = jnp.where(empty, -1, low), jnp.where(empty, 1, high)
    scales = _stored((high - low) / (2**spec.bits - 1), spec)
    if spec.kind == "symmetric":
        return scales, jnp.full(low.shape, 2 ** (spec.bits - 1), jnp.uint8)
    # The zero is of the rounded scale, and a code itself: one byte, whatever the range.
    return scales, affine_codes(-low, scales.astype(jnp.float32), jnp.float32(0), spec.bits).astype(jnp.uint8)


def _stored(values: Array, spec: GridSpec) -> Array:
    most = jnp.finfo(spec.dtype).max.astype(jnp.float32)
    return jnp.clip(values, -most, most).astype(spec.dtype)


def _search(
    weights: Array,
    ends: Callable[[Array], tuple[Array, Array]],
    candidates: Array,
    importance: Array,
    spec: GridSpec,
) -> tuple[Array, Array]:
    """The ends of the least loss, the first of equal ones."""
    power = _NORM if spec.kind == "mse" else 2.0

    def step(best: tuple[Array, Array, Array], candidate: Array) -> tuple[tuple[Array, Array, Array], None]:
        low, high = ends(candidate)
        scales, zeros = (part[..., None].astype(jnp.float32) for part in _affine(low, high, spec))
        missing = weights - affine_values(affine_codes(weights, scales, zeros, spec.bits), scales, zeros)
        missing = missing**2 if power == 2 else jnp.abs(missing) ** power
        # As a product: XLA's sums along rows are ten times slower on a CPU.
        loss = jnp.einsum("gow,gw->go", missing, importance, precision=jax.lax.Precision.HIGHEST)
        least, lower, upper = best
        better = loss < least
        return (jnp.where(better, loss, least), jnp.where(better, low, lower), jnp.where(better, high, upper)), None

    low, high = ends(candidates[0])
    return jax.lax.scan(step, (jnp.full(low.shape, jnp.inf, jnp.float32), low, high), candidates)[0][1:]


def _moved(low: Array, high: Array, step: Array) -> Callable[[Array], tuple[Array, Array]]:
    return lambda steps: (low + steps[0] * step, high - steps[1] * step)


def _pairs(steps: np.ndarray) -> Array:
    """All pairs of steps of the two ends, none first."""
    pairs = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    return jnp.asarray(pairs[np.argsort(np.abs(pairs).sum(axis=1), kind="stable")], jnp.float32)
