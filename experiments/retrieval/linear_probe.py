"""Logistic regression on features, as SentEval trains it (Conneau and Kiela 2018): batches, and an early stop.

Features are centred, and divided by one number so that their mean square is 1: bits, small floats and reconstructed
vectors then meet the same learning rates. Adam; of all learning rates and epochs the weights are those with the best
validation accuracy, the first of equals.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int


class Probe(NamedTuple):
    """A linear classifier of raw features."""

    weights: Float[np.ndarray, "f classes"]
    offset: Float[np.ndarray, " classes"]
    validation_accuracy: float
    learning_rate: float


def fit(
    x: Float[np.ndarray, "n f"],
    labels: Int[np.ndarray, " n"],
    held: Float[np.ndarray, "v f"],
    held_labels: Int[np.ndarray, " v"],
    *,
    learning_rates: tuple[float, ...],
    epochs: int,
    batch: int,
    seed: int,
) -> Probe:
    """The classifier that is best on the held rows.

    Args:
        x, labels: training rows.
        held, held_labels: validation rows.
        learning_rates: of Adam.
        epochs: at most; at least 1.
        batch: rows of a step, at most ``n``.
        seed: of the order of the rows.
    """
    mean = x.mean(axis=0)
    centred = x - mean
    scale = float(np.sqrt(np.mean(centred * centred))) or 1.0
    classes = int(max(labels.max(), held_labels.max())) + 1
    order = jax.random.key(seed)
    rates = jnp.asarray(learning_rates, jnp.float32)
    kernel, bias, accuracy, best = _train(
        centred / scale, labels, (held - mean) / scale, held_labels, order, rates,
        classes=classes, epochs=epochs, batch=min(batch, len(x)),
    )  # fmt: skip
    weights = np.asarray(kernel) / scale
    return Probe(weights, np.asarray(bias) - mean @ weights, float(accuracy), float(learning_rates[int(best)]))


def accuracy(probe: Probe, x: Float[np.ndarray, "n f"], labels: Int[np.ndarray, " n"]) -> float:
    """Share of rows whose class is found."""
    return float(((x @ probe.weights + probe.offset).argmax(axis=1) == labels).mean())


@functools.partial(jax.jit, static_argnames=("classes", "epochs", "batch"))
def _train(
    x: Array, labels: Array, held: Array, held_labels: Array, key: Array, rates: Array,
    *, classes: int, epochs: int, batch: int,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """All learning rates beside each other: they share their batches."""
    n, width = x.shape
    steps = n // batch
    moments = optax.scale_by_adam()
    params = (jnp.zeros((len(rates), width, classes)), jnp.zeros((len(rates), classes)))

    def logits(params: tuple[Array, Array], rows: Array) -> Array:
        return jnp.einsum("nf,rfc->rnc", rows, params[0]) + params[1][:, None]

    def loss(params: tuple[Array, Array], rows: Array, classes_of: Array) -> Array:
        # A sum over rates: none of them touches the weights of another.
        each = optax.softmax_cross_entropy_with_integer_labels(logits(params, rows), classes_of[None])
        return each.mean(axis=1).sum()

    def step(state: tuple, rows: Array) -> tuple[tuple, None]:
        params, adam = state
        gradient = jax.grad(loss)(params, x[rows], labels[rows])
        updates, adam = moments.update(gradient, adam)
        moved = jax.tree.map(lambda p, u: p - rates.reshape(-1, *[1] * (p.ndim - 1)) * u, params, updates)
        return (moved, adam), None

    def epoch(carry: tuple, key: Array) -> tuple[tuple, None]:
        state, best, scores = carry
        order = jax.random.permutation(key, n)[: steps * batch].reshape(steps, batch)
        state = jax.lax.scan(step, state, order)[0]
        found = (logits(state[0], held).argmax(axis=-1) == held_labels).mean(axis=1)
        better = found > scores
        best = jax.tree.map(lambda b, p: jnp.where(better.reshape(-1, *[1] * (p.ndim - 1)), p, b), best, state[0])
        return (state, best, jnp.maximum(scores, found)), None

    start = ((params, moments.init(params)), params, jnp.full(len(rates), -1.0))
    (_, best, scores), _ = jax.lax.scan(epoch, start, jax.random.split(key, epochs))
    first = scores.argmax()
    return best[0][first], best[1][first], scores[first], first
