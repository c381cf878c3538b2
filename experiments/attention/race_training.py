"""Trains a transformer of each method by the same plan, at a learning rate of its own, and scores it.

The rate is searched with the first seed, by the loss on the validation part after all steps; the other seeds are
then trained at it. Batches of a seed are the same for all methods, and so are the initial weights that they share.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments.attention.race_models import METHODS, Sizes, Transformer, costs
from experiments.data.clicks import Splits
from experiments.sharing.image_models import train

WARMUP = 20
"""Steps in which the learning rate rises."""


@dataclass(frozen=True, eq=False)
class Part:
    """Sequences, and the class of each place that the head reads."""

    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class Plan(NamedTuple):
    """What all methods of a task have in common."""

    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    """Peaks of Adam's rate."""
    seeds: int


class Score(NamedTuple):
    """Mean loss in nats and accuracy over all labels of a part."""

    loss: float
    accuracy: float


def adam(schedule: optax.Schedule, constants: Any = None) -> optax.GradientTransformation:
    """Adam with clipped gradients, for every method alike; the rate rises first."""

    def warmed(step: Any) -> Any:
        return schedule(step) * jnp.minimum(1, (step + 1) / WARMUP)

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warmed))


@functools.cache
def _apply(sizes: Sizes, name: str) -> Any:
    """``apply(params, seed, x)``; one function object a method, so that its training is compiled once."""
    model = Transformer(sizes, METHODS[name])
    return lambda params, seed, x: model.apply({"params": params}, x, jax.random.key(seed))


@functools.cache
def _init(sizes: Sizes, name: str) -> Any:
    model = Transformer(sizes, METHODS[name])
    return jax.jit(lambda key, x: model.init(key, x, key)["params"])


def initial(sizes: Sizes, name: str, seed: int, x: np.ndarray) -> Any:
    """Parameters at the start."""
    return _init(sizes, name)(jax.random.key(seed), jnp.asarray(x[:1]))


@functools.partial(jax.jit, static_argnums=0)
def _score(apply: Any, params: Any, seed: Array, inputs: Array, labels: Array) -> tuple[Array, Array]:
    def piece(part: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = apply(params, seed, part[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, part[1])
        return losses.mean(), (jnp.argmax(logits, axis=-1) == part[1]).mean()

    losses, hits = jax.lax.map(piece, (inputs, labels))
    return losses.mean(), hits.mean()


def score(apply: Any, params: Any, seed: int, part: Part, pieces: int = 4) -> Score:
    """Loss and accuracy of one model, whose part is read in so many pieces of equal size.

    Raises:
        ValueError: where the pieces are not equal.
    """
    if len(part) % pieces:
        raise ValueError(f"part has {len(part)} rows; they must divide in {pieces} pieces")
    inputs, labels = (x.reshape(pieces, -1, *x.shape[1:]) for x in (part.inputs, part.labels))
    loss, accuracy = _score(apply, params, jnp.uint32(seed), inputs, labels)
    return Score(float(loss), float(accuracy))


def outcomes(sizes: Sizes, name: str, parts: Splits[Part], plan: Plan) -> list[dict[str, Any]]:
    """The row of each seed: test loss and accuracy, the learning rate, and costs."""
    apply = _apply(sizes, name)

    def run(seed: int, rate: float | int) -> tuple[Score, Score]:
        params = initial(sizes, name, seed, parts.train.inputs)
        found = train(
            apply,
            jax.tree.map(lambda leaf: leaf[None], params),
            parts.train,
            learning_rates=(rate,),
            steps=plan.steps,
            batch_size=plan.batch_size,
            seeds=(seed,),
            constants=jnp.asarray([seed], jnp.uint32),
            optimizer=adam,
        )
        last = jax.tree.map(lambda leaf: leaf[0, 0], found.params)
        return score(apply, last, seed, parts.validation), score(apply, last, seed, parts.test)

    searched = {rate: run(0, rate) for rate in plan.learning_rates}
    # A run that diverged is the worst.
    rate = min(searched, key=lambda rate: np.nan_to_num(searched[rate][0].loss, nan=np.inf))
    scores = [searched[rate], *(run(seed, rate) for seed in range(1, plan.seeds))]
    spent = costs(METHODS[name], sizes, jax.eval_shape(lambda: initial(sizes, name, 0, parts.train.inputs)))
    return [
        {"loss": test.loss, "accuracy": test.accuracy, "validation_loss": validation.loss, "learning_rate": rate}
        | spent
        for validation, test in scores
    ]
