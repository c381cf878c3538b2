"""Predictors of contextual sparsity: two linear maps that say what an input needs of a layer (Deja Vu, ICML 2023).

    logits = (x A) B,     A [d, r], B [r, out],     no bias and nothing between the maps

``out`` is the neurons of a perceptron or the heads of attention, ``x`` a residual stream, as it is before the norm.
The loss is logistic. Few outputs are positive, so a negative weighs ``w`` = their share in the batch (+ 0.005), a
positive 1. AdamW; what is kept is the epoch with the best recall on positions that were not trained on.

Departure: the reference keeps the epoch by its recall where a logit says yes at 0.5, which a predictor wins that says
yes to everything. Inference takes a fixed number of outputs, and so does the recall here.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

AnyArray = Array | np.ndarray


class Predictor(NamedTuple):
    """Both maps of a layer, or of many along leading axes; a pytree."""

    first: Float[Array, "*L d r"]
    second: Float[Array, "*L r out"]


class Trained(NamedTuple):
    """What `train_predictors` found.

    Attributes:
        predictor: of the best epoch of each layer.
        recall: of that epoch, on the positions held out.
        epochs: that were trained, of each layer.
    """

    predictor: Predictor
    recall: Float32[Array, " L"]
    epochs: Int32[Array, " L"]


def init_predictor(key: Key[Array, ""], features: int, rank: int, outputs: int) -> Predictor:
    """Fresh maps, normal with variance 1 / inputs."""
    first, second = jax.random.split(key)
    return Predictor(
        jax.random.normal(first, (features, rank)) / features**0.5,
        jax.random.normal(second, (rank, outputs)) / rank**0.5,
    )


def predict(predictor: Predictor, x: Float[Array, "*n d"]) -> Float32[Array, "*n out"]:
    """Logits, float32 whatever the maps are stored in: their order is what matters."""
    inner = jnp.matmul(x.astype(jnp.float32), predictor.first, preferred_element_type=jnp.float32)
    return jnp.matmul(inner, predictor.second, preferred_element_type=jnp.float32)


def example_weights(
    target: Bool[Array, "n out"], extra: float | int | Float[Array, ""] = 0.005
) -> Float32[Array, "n out"]:
    """1 where the target is, and elsewhere the share of targets in the batch plus ``extra``."""
    weight = target.mean(dtype=jnp.float32) + extra
    return jnp.where(target, jnp.float32(1), weight)


def weighted_loss(
    logits: Float[Array, "n out"], target: Bool[Array, "n out"], extra: float | int | Float[Array, ""] = 0.005
) -> Float32[Array, ""]:
    """Mean of the logistic losses times `example_weights`."""
    # Half the exponentials of the form with two logarithms of sigmoids; they are most of the time.
    losses = jax.nn.softplus(logits) - jnp.where(target, logits, 0.0)
    return (example_weights(target, extra) * losses).mean()


def recall_at(logits: Float[Array, "n out"], target: Bool[Array, "n out"], top: int) -> Float32[Array, ""]:
    """Part of all targets that are among the ``top`` largest logits of their row; 1 where there is no target."""
    found = jnp.take_along_axis(target, jax.lax.top_k(logits, top)[1], axis=-1).sum()
    whole = target.sum()
    return jnp.where(whole > 0, found / jnp.maximum(whole, 1), 1.0).astype(jnp.float32)


def train_predictors(
    key: Key[Array, ""],
    queries: Float[AnyArray, "L n d"],
    targets: Bool[AnyArray, "L n out"],
    *,
    rank: int,
    top: int,
    learning_rate: float | int = 1e-3,
    weight_decay: float | int = 0.01,
    batch: int = 1024,
    epochs: int = 20,
    patience: int = 5,
    validation: float = 0.05,
    extra: float | int = 0.005,
) -> Trained:
    """A predictor for each layer, all in one compiled program.

    Args:
        key: of the first maps and of the order of positions.
        queries: what a predictor is to look at, see `hashml.sparse.residuals`.
        targets: what the layer turned out to need at the same position.
        rank: r.
        top: outputs that inference will take; recall is measured at it.
        learning_rate: of AdamW; another value is no other compilation.
        weight_decay, batch: of AdamW; rows of an epoch that fill no batch wait for another epoch.
        epochs: at most; ``patience`` of them without a better recall end it, and so does a recall above 0.99.
        validation: part of the positions, the last ones, that is held out.
        extra: see `example_weights`.

    Raises:
        ValueError: for sizes that are not positive, ``top`` beyond the outputs, or too few positions for a batch.
    """
    count, outputs = targets.shape[1:]
    sizes = {"rank": rank, "batch": batch, "epochs": epochs, "patience": patience}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it is at least 1")
    if not 1 <= top <= outputs:
        raise ValueError(f"top is {top}; it must lie in 1..{outputs}, the outputs")
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation}; it lies between 0 and 1")
    held = max(1, round(validation * count))
    if count - held < batch:
        raise ValueError(f"batch is {batch}; queries leave {count - held} positions to train on")
    program = _program(rank, top, batch, epochs, patience, held)
    hyper = tuple(jnp.float32(value) for value in (learning_rate, weight_decay, extra))
    return Trained(*program(key, jnp.asarray(queries), jnp.asarray(targets), hyper))


@functools.lru_cache(maxsize=16)
def _program(rank: int, top: int, batch: int, epochs: int, patience: int, held: int) -> Any:
    """`train_predictors` of these sizes: ``(key, queries, targets, hyper) -> (predictor, recall, epochs)``."""

    def one(init: Array, order: Array, queries: Array, targets: Array, hyper: tuple[Array, ...]) -> Any:
        learning_rate, weight_decay, extra = hyper
        optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)
        trained_on = queries.shape[0] - held
        last = queries[trained_on:], targets[trained_on:]
        start = init_predictor(init, queries.shape[1], rank, targets.shape[1])

        def step(carry: Any, rows: Array) -> tuple[Any, None]:
            predictor, moments = carry
            x, target = queries[rows], targets[rows]
            gradient = jax.grad(lambda p: weighted_loss(predict(p, x), target, extra))(predictor)
            updates, moments = optimizer.update(gradient, moments, predictor)
            return (optax.apply_updates(predictor, updates), moments), None

        def going(carry: Any) -> Array:
            epoch, _, _, best, stale = carry
            return (epoch < epochs) & (stale < patience) & (best <= 0.99)

        def following(carry: Any) -> Any:
            epoch, training, kept, best, stale = carry
            shuffled = jax.random.permutation(jax.random.fold_in(order, epoch), trained_on)
            training, _ = jax.lax.scan(step, training, shuffled[: trained_on // batch * batch].reshape(-1, batch))
            found = recall_at(predict(training[0], last[0]), last[1], top)
            better = found > best
            kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), training[0], kept)
            stale = jnp.where(better, 0, stale + 1)
            return epoch + 1, training, kept, jnp.maximum(found, best), stale

        carry = (jnp.int32(0), (start, optimizer.init(start)), start, jnp.float32(-1), jnp.int32(0))
        epoch, _, kept, best, _ = jax.lax.while_loop(going, following, carry)
        return kept, best, epoch

    @jax.jit
    def program(key: Array, queries: Array, targets: Array, hyper: tuple[Array, ...]) -> Any:
        first, order = jax.random.split(key)
        inits = jax.random.split(first, queries.shape[0])
        return jax.vmap(one, in_axes=(0, None, 0, 0, None))(inits, order, queries, targets, hyper)

    return program
