"""Weighted k-means of many rows of numbers at once (Lloyd 1957; 1982), by sorting and prefix sums.

    objective[row] = sum_i weight[i] (value[row, i] - centroid[row, code])^2,    code = the nearest, or the smaller

A row is sorted once. A cluster is then a run of it, whose ends are found by bisection at the midpoints of centroids
that are neighbours, and whose mean is a difference of two prefix sums: an iteration costs ``O(k log n)`` a row, not
``O(k n)``. A mean is held between the first and the last value of its run, so that rounding neither moves a cluster
of equal values nor changes the order. A cluster without weight keeps its centroid, and centroids stay sorted.

Rows with at most k distinct values have these as their centroids, whatever the start: empty clusters that stay where
they are would leave two values in one. Results of a row do not depend on the rows beside it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from hashml.hashing import mix32

STARTS = ("linspace", "kmeans++", "quantiles")

_RUN = 32
"""Values whose sum is passed at once when one is drawn."""


class SortedRows(NamedTuple):
    """Rows in ascending order and their prefix sums, which begin with 0.

    Attributes:
        values: sorted.
        weights: in the same order; the largest of a row is 1.
        middle: of each row, subtracted before summing.
        mass: prefix sums of the weights.
        moment: prefix sums of weight times value less middle.
    """

    values: Float[Array, "rows n"]
    weights: Float[Array, "rows n"]
    middle: Float[Array, "rows 1"]
    mass: Float[Array, "rows n+1"]
    moment: Float[Array, "rows n+1"]


def sort_rows(
    values: Float[Array, "rows n"], weights: Float[Array, "rows n"], order: Int32[Array, "rows n"] | None = None
) -> SortedRows:
    """What `lloyd` and the starts read.

    Args:
        values: in any order.
        weights: not negative; only their ratios matter.
        order: that sorts the values, where somebody knows it.
    """
    most = weights.max(axis=1, keepdims=True)
    weights = jnp.where(most > 0, weights / jnp.where(most > 0, most, 1), 1)
    if order is None:
        values, weights = jax.lax.sort((values, weights), dimension=1, num_keys=1)
    else:
        values, weights = _at(values, order), _at(weights, order)
    middle = (values[:, :1] + values[:, -1:]) / 2
    sums = jnp.cumsum(jnp.stack([weights, weights * (values - middle)]), axis=2)
    mass, moment = jnp.pad(sums, ((0, 0), (0, 0), (1, 0)))
    return SortedRows(values, weights, middle, mass, moment)


def lloyd(
    rows: SortedRows, start: Float[Array, "rows k"], *, iterations: int | Array = 100, tolerance: float | Array = 1e-6
) -> Float[Array, "rows k"]:
    """Centroids after so many iterations from ascending ones; a row stops where the squares of its moves sum to no
    more than ``tolerance`` of its variance, the rule of the package that the reference calls."""
    values, _, middle, mass, moment = rows
    enough = tolerance * values.var(axis=1, keepdims=True)
    n = values.shape[1]

    def step(centroids: Array) -> Array:
        midpoints = (centroids[:, 1:] + centroids[:, :-1]) / 2
        ends = jax.vmap(functools.partial(jnp.searchsorted, side="right", method="scan"))(values, midpoints)
        first = jnp.pad(ends, ((0, 0), (1, 0)))
        last = jnp.pad(ends, ((0, 0), (0, 1)), constant_values=n)
        own = _at(mass, last) - _at(mass, first)
        mean = middle + (_at(moment, last) - _at(moment, first)) / jnp.where(own > 0, own, 1)
        mean = jnp.clip(mean, _at(values, first), _at(values, last - 1))
        return jnp.where((own > 0) & (last > first), mean, centroids)

    def going(state: tuple[Array, Array, Array]) -> Array:
        seen, _, done = state
        return (seen < iterations) & ~done.all()

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        seen, centroids, done = state
        moved = jnp.where(done, centroids, step(centroids))
        moves = ((moved - centroids) ** 2).sum(axis=1, keepdims=True)
        return seen + 1, moved, done | (moves <= enough)

    still = jnp.zeros((values.shape[0], 1), bool)
    return jax.lax.while_loop(going, body, (jnp.int32(0), start, still))[1]


def start_centroids(rows: SortedRows, k: int, *, start: str, seed: int | Array = 0) -> Float[Array, "rows k"]:
    """Ascending centroids to begin with.

    Args:
        rows: from `sort_rows`.
        k: centroids of a row.
        start: ``linspace``, equally spaced between the ends; ``quantiles``, values at equal ranks, whatever their
            weight; ``kmeans++``, values drawn by weight times squared distance to those before.
        seed: of ``kmeans++``. Every row meets the same k uniform numbers, as the reference seeds each row alike.

    Raises:
        ValueError: for another start.
    """
    values = rows.values
    n = values.shape[1]
    if start == "linspace":
        return values[:, :1] + (values[:, -1:] - values[:, :1]) * jnp.linspace(0, 1, k, dtype=jnp.float32)
    if start == "quantiles":
        return values[:, (2 * jnp.arange(k) + 1) * n // (2 * k)]
    if start != "kmeans++":
        raise ValueError(f"start is {start!r}; allowed are {', '.join(STARTS)}")
    own = mix32(jnp.asarray(seed, jnp.uint32), 0)
    uniform = (mix32(own ^ jnp.arange(k, dtype=jnp.uint32), 1) >> 8).astype(jnp.float32) * 2.0**-24

    def draw(least: Array, number: Array) -> tuple[Array, Array]:
        centroid = _at(values, _drawn(rows.weights * least, number))
        return jnp.minimum(least, (values - centroid) ** 2), centroid[:, 0]

    first = _at(values, _drawn(rows.weights, uniform[0]))
    _, others = jax.lax.scan(draw, (values - first) ** 2, uniform[1:])
    return jnp.sort(jnp.concatenate([first, others.T], axis=1), axis=1)


@functools.partial(jax.jit, static_argnames=("k", "start", "seed", "iterations", "tolerance"))
def cluster_rows(
    values: Float[Array, "rows n"],
    weights: Float[Array, "rows n"],
    k: int,
    *,
    order: Int32[Array, "rows n"] | None = None,
    start: str,
    seed: int = 0,
    iterations: int = 100,
    tolerance: float = 1e-6,
) -> Float[Array, "rows k"]:
    """Ascending centroids of rows; of a row with at most k distinct values, these values, the last one repeated.

    Raises:
        ValueError: for another start.
    """
    rows = sort_rows(values, weights, order)
    found = lloyd(rows, start_centroids(rows, k, start=start, seed=seed), iterations=iterations, tolerance=tolerance)
    new = jnp.pad(rows.values[:, 1:] != rows.values[:, :-1], ((0, 0), (1, 0)))
    few = new.sum(axis=1, keepdims=True) < k

    def distinct(found: Array) -> Array:
        rank = jnp.cumsum(new, axis=1, dtype=jnp.int32)
        place = jax.vmap(lambda ranks: jnp.searchsorted(ranks, jnp.arange(k, dtype=jnp.int32), side="left"))(rank)
        return jnp.where(few, _at(rows.values, place), found)

    return jax.lax.cond(few.any(), distinct, lambda found: found, found)


def _drawn(mass: Array, number: Array) -> Array:
    """``[rows, 1]``: the place where this part of a row's mass is passed; first among runs, then in one."""
    n = mass.shape[1]
    runs = jnp.pad(mass, ((0, 0), (0, -n % _RUN))).reshape(mass.shape[0], -1, _RUN)
    # A product with ones: XLA's sums along rows are ten times slower on a CPU.
    sums = jnp.cumsum(jnp.matmul(runs, jnp.ones(_RUN, mass.dtype), precision=jax.lax.Precision.HIGHEST), axis=1)
    wanted = number * sums[:, -1:]
    run = jnp.minimum((sums <= wanted).sum(axis=1, keepdims=True), runs.shape[1] - 1)
    before = jnp.where(run > 0, _at(sums, jnp.maximum(run - 1, 0)), 0)
    inside = before + jnp.cumsum(jnp.take_along_axis(runs, run[..., None], axis=1)[:, 0], axis=1)
    return jnp.minimum(run * _RUN + jnp.minimum((inside <= wanted).sum(axis=1, keepdims=True), _RUN - 1), n - 1)


def _at(rows: Array, places: Array) -> Array:
    return jnp.take_along_axis(rows, places, axis=1, mode="clip")
