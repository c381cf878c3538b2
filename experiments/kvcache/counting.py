"""Counting: which token came most often, asked once at the end. No token is a needle, and all together tell.

A sequence of 96 tokens from the vocabulary of `experiments.kvcache.recall`:

    0          BOS
    1..94      the 21 filler tokens in random order: one of them, the answer, 12 times, the others 4 or 5 times each
    95         the question

This is RULER's extraction of frequent words (Hsieh et al. 2024, arXiv 2404.06654) at the size of the recall task. The
order is random, so that any part of the past is as good as any other of its size, and a policy that keeps what got
attention can only do harm. The model is that of the recall task, trained on questions at the end alone.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from experiments.data.counter import stream, uniform
from experiments.kvcache import recall
from experiments.kvcache.language_models import Progress, kept
from hashml.models.decoder import Params, forward

LENGTH = 96
QUESTION = 62
"""The token that asks."""
OFTEN = 12
"""Times that the answer occurs."""

COUNTING = dataclasses.replace(recall.RECALL, warmup=50)


def sequences(
    count: int, key: int, first: int = 0
) -> tuple[Int32[np.ndarray, "{count} 96"], Int32[np.ndarray, "{count} 96"]]:
    """Tokens and targets, -1 before the question, of sequences ``first`` to ``first + count`` of a stream.

    Raises:
        ValueError: for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    words, places = recall.FILLER[1] - recall.FILLER[0], LENGTH - 2
    per_row = words + places
    draws = uniform(key, np.arange(first * per_row, (first + count) * per_row)).reshape(count, per_row)
    shuffled = (recall.FILLER[0] + np.argsort(draws[:, :words], axis=1)).astype(np.int32)
    # The first of the shuffled words is the answer; the others are dealt in turn.
    dealt = np.concatenate([np.zeros(OFTEN, np.int64), 1 + np.arange(places - OFTEN) % (words - 1)])
    order = np.argsort(draws[:, words:], axis=1)
    tokens = np.full((count, LENGTH), QUESTION, np.int32)
    tokens[:, 0] = recall.BOS
    tokens[:, 1:-1] = np.take_along_axis(shuffled[:, dealt], order, axis=1)
    targets = np.full(tokens.shape, -1, np.int32)
    targets[:, -1] = shuffled[:, 0]
    return tokens, targets


def trained(recipe: recall.Recipe, seed: int, progress: Progress | None = None) -> Params:
    """The parameters of a model: read from the user's cache, or trained now and kept there; see `recall.trained`."""
    geometry = dataclasses.asdict(recipe) | {"length": LENGTH, "often": OFTEN}
    batches = stream(seed, "counting", "train")

    def batch(step: int) -> recall.Batch:
        return sequences(recipe.rows, batches, step * recipe.rows)

    return kept("counting", geometry, seed, lambda: recall.train(recipe, seed, batch, progress))


def held_out(count: int) -> tuple[Int32[np.ndarray, "{count} 96"], Int32[np.ndarray, "{count} 96"]]:
    """Sequences that no training sees, the same for every model."""
    return sequences(count, stream(0, "counting", "held out"))


def held_out_accuracy(recipe: recall.Recipe, params: Params, *, count: int = 256) -> float:
    """Share of questions that are answered."""
    tokens, targets = held_out(count)
    said = np.asarray(forward(params, recipe.decoder, jnp.asarray(tokens))[:, -1].argmax(axis=-1))
    return float((said == targets[:, -1]).mean())
