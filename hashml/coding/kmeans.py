"""Weighted k-means: Lloyd's iteration (1957; 1982) from k-means++ seeds (Arthur, Vassilvitskii, SODA 2007).

    objective = sum_n weight[n] ||point[n] - centroid[code[n]]||^2
    code[n] = argmin_j ||point[n] - centroid[j]||^2,  ties to the smaller j
    centroid[j] = sum of weight point / sum of weight,  over code = j

A seed is a point drawn with probability ``weight * dist^2`` to the seeds so far. A centroid that no weight falls to
is moved to a point of largest ``weight * dist^2``, the e-th empty one to the e-th such point. Neither step raises the
objective, and it stops once it falls by less than ``tolerance`` of itself.

Distances are sums of squared differences and not expanded, so that a point on a centroid is at distance zero whatever
its offset; centroids are passed a block at a time with a running minimum, and no ``[n, clusters]`` array exists.
All is float32 and works under `jax.vmap`. On a CPU equal keys give equal bits; on a GPU the sums over a cluster are
scattered, whose order XLA fixes only under its flag for deterministic operations.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray

_DISTANCES = 2**14
"""Distances of one block of centroids that are alive together."""


class KMeans(NamedTuple):
    """What `kmeans` found.

    Attributes:
        centroids: in no order; some are equal where there are fewer distinct points than clusters.
        objectives: of the seeds and after each iteration; after the last one, its value again.
        iterations: how many were made.
    """

    centroids: Float[Array, "clusters d"]
    objectives: Float[Array, " history"]
    iterations: Int32[Array, ""]


def nearest(
    points: Float[Array, "n d"], centroids: Float[Array, "clusters d"]
) -> tuple[Int32[Array, " n"], Float[Array, " n"]]:
    """The nearest centroid of each point, the first of equally near ones, and the squared distance; float32."""
    n, (clusters, width) = points.shape[0], centroids.shape
    if clusters < 1:
        raise ValueError("centroids is empty; there must be at least one")
    block = max(1, min(clusters, _DISTANCES // max(n, 1)))
    coordinates = points.astype(jnp.float32).T
    padded = jnp.pad(centroids.astype(jnp.float32), ((0, -clusters % block), (0, 0)), constant_values=jnp.inf)

    def body(best: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        code, least = best
        some = jax.lax.dynamic_slice_in_dim(padded, start, block)
        distances = sum(
            ((coordinates[i] - some[:, i, None]) ** 2 for i in range(width)), jnp.zeros((block, n), jnp.float32)
        )
        first = jnp.argmin(distances, axis=0).astype(jnp.int32) if block > 1 else jnp.zeros(n, jnp.int32)
        found = distances.min(axis=0)
        return (jnp.where(found < least, start + first, code), jnp.minimum(found, least)), None

    initial = (jnp.zeros(n, jnp.int32), jnp.full(n, jnp.inf, jnp.float32))
    if block == clusters:
        return body(initial, jnp.int32(0))[0]
    return jax.lax.scan(body, initial, jnp.arange(0, clusters, block, dtype=jnp.int32))[0]


def seed_centroids(
    key: PRNGKeyArray, points: Float[Array, "n d"], clusters: int, weights: Float[Array, " n"]
) -> Float[Array, "clusters d"]:
    """k-means++ seeds: points, drawn by ``weights * dist^2``; the first by ``weights``. No two are equal until
    there is no weight left away from a seed."""
    points = points.astype(jnp.float32)
    n = points.shape[0]

    def draw(index: Array, mass: Array) -> Array:
        # Gumbel's maximum: proportional to mass, and never a point of mass zero while there is another.
        return points[jnp.argmax(jnp.log(mass) + jax.random.gumbel(jax.random.fold_in(key, index), (n,)))]

    def body(least: Array, index: Array) -> tuple[Array, Array]:
        seed = draw(index, jnp.where(index == 0, weights, weights * least))
        return jnp.minimum(least, ((points - seed) ** 2).sum(axis=-1)), seed

    return jax.lax.scan(body, jnp.full(n, jnp.inf, jnp.float32), jnp.arange(clusters))[1]


@functools.partial(jax.jit, static_argnames=("clusters", "iterations", "tolerance"))
def kmeans(
    key: PRNGKeyArray,
    points: Float[Array, "n d"],
    clusters: int,
    weights: Float[Array, " n"] | None = None,
    *,
    initial: Float[Array, "clusters d"] | None = None,
    iterations: int = 100,
    tolerance: float | int = 1e-6,
) -> KMeans:
    """Centroids of weighted points.

    Args:
        key: of the seeds; not used with ``initial``.
        points: of any width, 1 included.
        clusters: centroids to find; there may be fewer points.
        weights: not negative; ``None``, or any constant, gives the same centroids bit for bit. All zero count as
            equal.
        initial: centroids to begin with in place of seeds.
        iterations: at most.
        tolerance: it stops once an iteration lowers the objective by no more than this part of it.

    Raises:
        ValueError: if there is no point, no cluster, or ``iterations`` is negative.
    """
    n = points.shape[0]
    if n < 1:
        raise ValueError("points is empty; there must be at least one")
    if clusters < 1:
        raise ValueError(f"clusters is {clusters}; it must be at least 1")
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}; it is not negative")
    points = points.astype(jnp.float32)
    weights = jnp.ones(n, jnp.float32) if weights is None else weights.astype(jnp.float32)
    # A scale changes no centroid; with the largest weight at 1, a constant is exactly no weights at all.
    unit = weights.max()
    weights = jnp.where(unit > 0, weights / jnp.where(unit > 0, unit, 1.0), 1.0)
    spare = min(clusters, n)

    def update(centroids: Array, codes: Array, losses: Array) -> Array:
        # As a step from the old centroid: a cluster of equal points then stays on them exactly.
        steps = jax.ops.segment_sum(weights[:, None] * (points - centroids[codes]), codes, clusters)
        mass = jax.ops.segment_sum(weights, codes, clusters)
        moved = centroids + steps / jnp.where(mass > 0, mass, 1.0)[:, None]
        empty = mass == 0
        farthest = jax.lax.top_k(losses, spare)[1]
        rank = jnp.clip(jnp.cumsum(empty) - 1, 0, spare - 1)
        return jnp.where(empty[:, None], points[farthest[rank]], moved)

    def going(state: tuple) -> Array:
        seen, _, _, history = state
        last, before = history[seen - 1], history[seen - 2]
        return (seen < 2) | (before - last > tolerance * before)

    def body(state: tuple) -> tuple:
        seen, centroids, _, history = state
        codes, distances = nearest(points, centroids)
        losses = weights * distances
        history = history.at[seen].set(losses.sum())
        return seen + 1, update(centroids, codes, losses), centroids, history

    start = seed_centroids(key, points, clusters, weights) if initial is None else initial.astype(jnp.float32)
    state = (jnp.int32(0), start, start, jnp.zeros(iterations + 1, jnp.float32))
    seen, _, centroids, history = jax.lax.while_loop(
        lambda state: (state[0] <= iterations) & going(state), body, state
    )
    history = jnp.where(jnp.arange(iterations + 1) < seen, history, history[seen - 1])
    return KMeans(centroids, history * jnp.where(unit > 0, unit, 1.0), seen - 1)
