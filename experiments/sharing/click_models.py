"""A DLRM trained on a click log with one of the family's embeddings, and its contenders at equal bytes.

Every contender gets the same model, batches, steps and optimiser (Adagrad, as the DLRM code uses), and a
learning-rate search of its own on the validation part: all rates are trained at once, as a batch axis.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.data.clicks import ClickLog
from experiments.lab import auc
from experiments.sharing import training
from hashml.accounting import stored_bytes
from hashml.embeddings import EmbeddingTables
from hashml.models.dlrm import DLRM, binary_cross_entropy
from hashml.sharing import HashingTrickTables, NarrowTables, QuotientRemainderTables, RobeTables

TOP = (64, 32, 1)
"""Widths of the top MLP in the stand-ins of the DLRM card."""


def embedding(
    method: str, table_sizes: Sequence[int], *, features: int, budget: int, block_size: int = 1, seed: int = 0
) -> nn.Module:
    """The embedding module of a contender: ``full``, ``robe``, ``hashing_trick``, ``quotient_remainder``, ``narrow``.

    Raises:
        ValueError: for an unknown method, or a budget that the method cannot meet.
    """
    sizes = tuple(table_sizes)
    match method:
        case "full":
            return EmbeddingTables(sizes, features)
        case "robe":
            return RobeTables(sizes, features, budget=budget, block_size=block_size, seed=seed)
        case "hashing_trick":
            return HashingTrickTables(sizes, features, budget=budget, seed=seed)
        case "quotient_remainder":
            return QuotientRemainderTables(sizes, features, budget=budget, seed=seed)
        case "narrow":
            return NarrowTables(sizes, features, budget=budget)
        case _:
            raise ValueError(f"method is {method!r}; it must name a contender")


class Outcome(NamedTuple):
    """What training at the best of the learning rates gave."""

    learning_rate: float
    validation_auc: float
    test_auc: float
    embedding_bytes: int
    model_bytes: int
    steps: int
    """Steps to the best validation AUC, at which the model is scored."""
    curve: tuple[float, ...]
    """Validation AUC at the best rate, an evaluation each ``evaluate_every`` steps."""


def train_and_score(
    module: nn.Module,
    parts: Sequence[ClickLog],
    *,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
    evaluations: int = 1,
    patience: int | None = None,
) -> Outcome:
    """Train on ``parts[0]``, choose rate and moment on ``parts[1]``, score ``parts[2]`` at that choice alone.

    Args:
        module: the embedding.
        parts: train, validation and test logs.
        learning_rates: tried side by side from one initialisation.
        epochs: passes over the training part, at most.
        batch_size: rows of a step; rows that fill no batch are left out of that epoch.
        seed: of the initialisation and of the order of rows.
        evaluations: on the validation part, in an epoch.
        patience: stop when no rate has gained for so many evaluations.
    """
    train, validation, test = parts
    model = DLRM(module, bottom=(), top=TOP)
    key, order = jax.random.key(seed), np.random.default_rng(seed)
    params = model.init(key, None, jnp.asarray(train.ids[:2]))["params"]
    first = training.start(params, "embedding", module)
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(learning_rates), axis=0), first)
    rates = jnp.asarray(learning_rates, jnp.float32)
    ids, labels = jnp.asarray(train.ids), jnp.asarray(train.labels, jnp.float32)
    every = len(train) // batch_size // evaluations

    curves: list[list[float]] = []
    best: tuple[float, int, int, Any] = (-1.0, 0, 0, None)
    for _ in range(epochs):
        rows = order.permutation(len(train))[: evaluations * every * batch_size]
        for part in rows.reshape(evaluations, every, batch_size):
            state = _steps(model, state, rates, ids, labels, jnp.asarray(part))
            curves.append(_aucs(model, training.parameters(state, "embedding"), validation))
            index = int(np.argmax(curves[-1]))
            if curves[-1][index] > best[0]:
                # Copied: the slice of a single rate is the array itself, which the next steps are given to keep.
                chosen = jax.tree.map(lambda leaf, i=index: jnp.copy(leaf[i : i + 1]), state)
                best = (curves[-1][index], index, len(curves), training.parameters(chosen, "embedding"))
        if patience is not None and _stalled(np.array(curves), patience):
            break
    validation_auc, index, evaluation, chosen = best
    return Outcome(
        learning_rate=float(learning_rates[index]),
        validation_auc=validation_auc,
        test_auc=_aucs(model, chosen, test)[0],
        embedding_bytes=stored_bytes(params["embedding"]),
        model_bytes=stored_bytes(params),
        steps=evaluation * every,
        curve=tuple(curve[index] for curve in curves),
    )


def _stalled(curves: np.ndarray, patience: int) -> bool:
    """Whether the best of every rate lies ``patience`` evaluations back."""
    return bool((len(curves) - 1 - curves.argmax(axis=0) >= patience).all())


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _steps(
    model: DLRM, state: training.RunState, rates: Array, ids: Array, labels: Array, batches: Array
) -> training.RunState:
    """Steps over ``batches`` of rows, for each rate side by side."""

    def one_run(state: training.RunState, rate: Array) -> training.RunState:
        def step(state: training.RunState, rows: Array) -> tuple[training.RunState, None]:
            batch = ids[rows]

            def loss(params: Any, vectors: Array | None) -> Float[Array, ""]:
                if vectors is None:
                    logits = model.apply({"params": params}, None, batch)
                else:
                    logits = model.apply({"params": params}, None, vectors, method="head")
                return binary_cross_entropy(jnp.asarray(logits), labels[rows])

            return training.adagrad_step(state, rate, model.embedding, batch, loss), None

        return jax.lax.scan(step, state, batches)[0]

    return jax.vmap(one_run)(state, rates)


def _aucs(model: DLRM, params: Any, part: ClickLog) -> list[float]:
    """AUC of each of the stacked parameters; -1 where training has diverged."""
    return [auc(part.labels, run) if np.isfinite(run).all() else -1.0 for run in score(model, params, part.ids)]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: DLRM, params: Any, ids: Array) -> Array:
    return jax.vmap(lambda params: jnp.asarray(model.apply({"params": params}, None, ids)))(params)


def score(model: DLRM, params: Any, ids: np.ndarray, *, chunk: int = 16_384) -> np.ndarray:
    """Logits ``[runs, rows]`` of stacked parameters."""
    padded = np.concatenate([ids, np.zeros((-len(ids) % chunk, ids.shape[1]), ids.dtype)])
    pieces = [
        np.asarray(_logits(model, params, jnp.asarray(piece))) for piece in np.split(padded, len(padded) // chunk)
    ]
    return np.concatenate(pieces, axis=1)[:, : len(ids)]
