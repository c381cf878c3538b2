"""Training of image classifiers for many seeds and learning rates in one program, and their scores.

A contender is a function ``apply(params, constants, x) -> logits`` and what it starts from. ``params`` is
trained; ``constants`` is not: masks, slots and signs of a hash, or None. Both are stacked over the seeds (a
leading axis of length ``len(seeds)`` on every leaf), so that each seed has its own initial weights, mask or
map; all learning rates of a seed start from the same weights and see the same batches, and so do all
contenders. A dense net, a masked one and a shared one differ in ``apply`` alone:

    dense    lambda params, _, x: model.apply({"params": params}, x)
    masked   lambda params, mask, x: model.apply({"params": apply_mask(params, mask)}, x)
    shared   lambda memory, map, x: model.apply({"params": expand(memory, map)}, x)

    outcome = train_and_score(apply, params, parts, learning_rates=(0.03, 0.1), steps=750, batch_size=128,
                              seeds=range(3), constants=masks)
    rate = outcome.chosen()                  # best mean validation accuracy over the seeds
    outcome.test[:, rate]                    # accuracy of each seed; the test part chose nothing

Momentum 0.9 and a cosine schedule to zero, unless ``optimizer`` says otherwise; the last step is scored.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from experiments.data.counter import permutation, stream

Apply = Callable[[Any, Any, Array], Array]
"""``(params, constants, x [B, ...]) -> logits [B, classes]`` of one run."""

Optimizer = Callable[[optax.Schedule, Any], optax.GradientTransformation]
"""``(schedule, constants) -> transformation`` of one run; it may close over the run's own constants."""


def momentum(schedule: optax.Schedule, constants: Any = None) -> optax.GradientTransformation:
    """SGD with momentum 0.9, the default `Optimizer`."""
    return optax.sgd(schedule, momentum=0.9)


@runtime_checkable
class Examples(Protocol):
    """A labelled part of a data set: images, or token sequences."""

    @property
    def inputs(self) -> np.ndarray: ...

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...


class Trained(NamedTuple):
    """Every leaf of ``params`` has the leading axes ``[seeds, rates]``."""

    params: Any
    losses: Float[np.ndarray, "seeds rates steps"]
    """Cross-entropy of each step's batch, in nats, before the step."""


class Outcome(NamedTuple):
    """Accuracies of every run at its last step, and the runs themselves."""

    learning_rates: tuple[float, ...]
    validation: Float[np.ndarray, "seeds rates"]
    test: Float[np.ndarray, "seeds rates"]
    trained: Trained

    def chosen(self) -> int:
        """Index of the rate with the best mean validation accuracy over the seeds; between equals the smaller."""
        means = self.validation.mean(axis=0)
        return min(range(len(means)), key=lambda i: (-means[i], self.learning_rates[i]))

    def chosen_params(self) -> Any:
        """The parameters at the chosen rate, stacked over the seeds."""
        return jax.tree.map(lambda leaf: leaf[:, self.chosen()], self.trained.params)


def train_and_score(
    apply: Apply,
    params: Any,
    parts: Sequence[Examples],
    *,
    learning_rates: Sequence[float],
    steps: int,
    batch_size: int,
    seeds: Sequence[int],
    constants: Any = None,
    optimizer: Optimizer = momentum,
    runs_at_a_time: int = 1,
) -> Outcome:
    """Train on ``parts[0]`` and score every run on ``parts[1]`` (validation) and ``parts[2]`` (test).

    Args:
        apply: the contender. It is compiled once per function object: a module-level function, or one
            that is kept, is not compiled again for another mask or another seed.
        params: stacked over the seeds; what is trained.
        parts: train, validation and test.
        learning_rates: the peaks of the schedule, each trained from the same start.
        steps: of the optimiser; the schedule reaches zero at the last.
        batch_size: images of a step; those that fill no batch are left out of that epoch.
        seeds: of the order of images. Contenders that are given the same seeds see the same batches.
        constants: stacked over the seeds; handed to ``apply`` and ``optimizer``, not trained.
        optimizer: makes the transformation of a run from its schedule and its constants. Compiled once
            per function object, as ``apply``.
        runs_at_a_time: runs that are one batched program; on a CPU one after the other is as quick, and
            convolutions are far quicker.
    """
    trained = train(
        apply,
        params,
        parts[0],
        learning_rates=learning_rates,
        steps=steps,
        batch_size=batch_size,
        seeds=seeds,
        constants=constants,
        optimizer=optimizer,
        runs_at_a_time=runs_at_a_time,
    )
    validation, test = (accuracies(apply, trained.params, part, constants=constants) for part in parts[1:])
    return Outcome(tuple(learning_rates), validation, test, trained)


def train(
    apply: Apply,
    params: Any,
    part: Examples,
    *,
    learning_rates: Sequence[float],
    steps: int,
    batch_size: int,
    seeds: Sequence[int],
    constants: Any = None,
    optimizer: Optimizer = momentum,
    runs_at_a_time: int = 1,
    stop: int | None = None,
) -> Trained:
    """Train every seed at every rate; arguments as `train_and_score`.

    Args:
        stop: end after so many of the ``steps``, with the schedule of them all: the early weights to
            which a lottery ticket is rewound.

    Raises:
        ValueError: where a leaf of params or constants is not stacked over the seeds, a batch is larger
            than the part, or stop is not in 0..steps.
    """
    seeds, stop = list(seeds), steps if stop is None else stop
    for name, tree in (("params", params), ("constants", constants)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if leaf.shape[:1] != (len(seeds),):
                where = f"{name}{jax.tree_util.keystr(path)}"
                raise ValueError(f"{where} has shape {leaf.shape}; its first axis must be {len(seeds)}, the seeds")
    if not 0 <= stop <= steps:
        raise ValueError(f"stop is {stop}; it must be between 0 and steps = {steps}")
    rows = jnp.asarray(np.stack([batch_order(len(part), steps, batch_size, seed)[:stop] for seed in seeds]))
    rates = jnp.asarray(learning_rates, jnp.float32)
    images, labels = jnp.asarray(part.inputs), jnp.asarray(part.labels)
    found, losses = _train(apply, optimizer, steps, runs_at_a_time, params, constants, rates, rows, images, labels)
    return Trained(found, np.asarray(losses))


def batch_order(rows: int, steps: int, batch_size: int, seed: int) -> Int32[np.ndarray, "steps batch"]:
    """The rows of each step: every epoch in an order of its own.

    Raises:
        ValueError: where no batch can be filled.
    """
    if not 1 <= batch_size <= rows:
        raise ValueError(f"batch_size is {batch_size}; it must be between 1 and {rows}, the rows")
    each = rows // batch_size
    epochs = [
        permutation(stream(seed, "epoch", epoch), rows)[: each * batch_size] for epoch in range(-(-steps // each))
    ]
    return np.concatenate([*epochs, np.empty(0, int)]).astype(np.int32).reshape(-1, batch_size)[:steps]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _train(
    apply: Apply,
    optimizer: Optimizer,
    steps: int,
    runs_at_a_time: int,
    params: Any,
    constants: Any,
    rates: Array,
    rows: Array,
    images: Array,
    labels: Array,
) -> tuple[Any, Array]:
    def one_run(run: tuple[Array, Array]) -> tuple[Any, Array]:
        seed, rate = run
        start, fixed, order = jax.tree.map(lambda leaf: leaf[seed], (params, constants, rows))
        transformation = optimizer(optax.cosine_decay_schedule(rate, steps), fixed)  # pyright: ignore[reportArgumentType] a traced rate

        def loss(params: Any, batch: Array) -> Array:
            logits = apply(params, fixed, images[batch])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

        def step(state: tuple[Any, Any], batch: Array) -> tuple[tuple[Any, Any], Array]:
            params, memory = state
            value, gradients = jax.value_and_grad(loss)(params, batch)
            updates, memory = transformation.update(gradients, memory, params)
            return (optax.apply_updates(params, updates), memory), value

        (trained, _), losses = jax.lax.scan(step, (start, transformation.init(start)), order)
        return trained, losses

    count = rows.shape[0]
    runs = (jnp.repeat(jnp.arange(count), len(rates)), jnp.tile(rates, count))
    flat = jax.lax.map(one_run, runs, batch_size=None if runs_at_a_time == 1 else runs_at_a_time)
    return jax.tree.map(lambda leaf: leaf.reshape(count, len(rates), *leaf.shape[1:]), flat)


def accuracies(
    apply: Apply, params: Any, part: Examples, *, constants: Any = None, chunk: int = 1000
) -> Float[np.ndarray, "seeds rates"]:
    """Share of images whose label has the largest logit; an image with a logit that is not finite is a miss.

    Args:
        apply: as in `train_and_score`.
        params: stacked ``[seeds, rates, ...]``, as `train` gives them.
        part: what is scored.
        constants: stacked over the seeds.
        chunk: images in one program.
    """
    hits: Any = 0
    for start in range(0, len(part), chunk):
        images, labels = (jnp.asarray(leaf[start : start + chunk]) for leaf in (part.inputs, part.labels))
        hits = hits + np.asarray(_hits(apply, params, constants, images, labels))
    return hits / len(part)


@functools.partial(jax.jit, static_argnums=0)
def _hits(apply: Apply, params: Any, constants: Any, images: Array, labels: Array) -> Array:
    def of_seed(run: tuple[Any, Any]) -> Array:
        params, fixed = run

        def of_rate(params: Any) -> Array:
            logits = apply(params, fixed, images)
            return ((jnp.argmax(logits, axis=-1) == labels) & jnp.isfinite(logits).all(axis=-1)).sum()

        return jax.lax.map(of_rate, params)

    return jax.lax.map(of_seed, (params, constants))
