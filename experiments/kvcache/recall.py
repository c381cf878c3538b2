"""Recall: keys with values, asked for later, by a model that a pure recency window leaves at chance.

A sequence of 96 tokens from a vocabulary of 64 (0 BOS, 1-20 keys, 21-40 values, 41-61 filler, 63 blank):

    0          BOS
    1..37      8 pairs (key, value) at random odd places, 1 to 35; keys differ, values may repeat
    38..77     4 rehearsals: the keys of 4 of the pairs, each followed by a blank, at random even places
    80..95     8 questions: the keys of all pairs in random order, each followed by a blank
    elsewhere  filler, drawn uniformly

What is to be said at a rehearsed or asked key is its value. A blank stands where the answer would be: were it fed
back, the model would solve later questions from the recent copy, and a window would look perfect. A pair that is
rehearsed gets attention once more before it is asked for, and one that is not tells whether a policy keeps what has
not mattered for long: the two are reported apart.

The model has 2 layers of width 64 and smeared keys, without which a key cannot say what stood before it in a single
layer and training takes ten times as many steps.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int32

from experiments.data.counter import stream, uniform
from experiments.kvcache.language_models import Progress, fit, kept
from hashml.models.decoder import DecoderConfig, Params, forward, init_params

LENGTH = 96
PAIRS, REHEARSED = 8, 4
BOS, BLANK = 0, 63
KEYS, VALUES, FILLER = (1, 21), (21, 41), (41, 62)
"""First token, and the one after the last."""
PAIR_PLACES = np.arange(1, 36, 2)
REHEARSAL_PLACES = np.arange(38, 77, 2)
QUESTIONS = 80
"""Place of the first of the final questions."""


class Sequences(NamedTuple):
    """Sequences and what is to be said at each place.

    Attributes:
        tokens: inputs.
        targets: the value where a key is rehearsed or asked for, else -1.
        rehearsed: final questions whose pair was rehearsed.
        unrehearsed: final questions whose pair was not.
    """

    tokens: Int32[np.ndarray, "N T"]
    targets: Int32[np.ndarray, "N T"]
    rehearsed: Bool[np.ndarray, "N T"]
    unrehearsed: Bool[np.ndarray, "N T"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recall model is trained by.

    Attributes:
        decoder: sizes and choices.
        steps: of Adam.
        rows: sequences of a step.
        learning_rate: after ``warmup`` steps.
        warmup: steps.
    """

    decoder: DecoderConfig
    steps: int = 150
    rows: int = 64
    learning_rate: float = 3e-3
    warmup: int = 100


RECALL = Recipe(
    DecoderConfig(
        vocabulary=64,
        features=64,
        layers=2,
        heads=2,
        kv_heads=2,
        head_dim=32,
        hidden=128,
        activation="gelu",
        gated=False,
        context=LENGTH,
        smear=True,
    )
)


def sequences(count: int, key: int, first: int = 0) -> Sequences:
    """Sequences ``first`` to ``first + count`` of a stream of `experiments.data.counter`.

    Raises:
        ValueError: for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    per_row = LENGTH + PAIRS + 20 + len(PAIR_PLACES) + len(REHEARSAL_PLACES) + 2 * PAIRS
    draws = uniform(key, np.arange(first * per_row, (first + count) * per_row)).reshape(count, per_row)
    sizes = (LENGTH, PAIRS, 20, len(PAIR_PLACES), len(REHEARSAL_PLACES), PAIRS, PAIRS)
    filler, value, key_order, places, rehearsal_places, rehearsal_order, question_order = np.split(
        draws, np.cumsum(sizes)[:-1], axis=1
    )
    rows = np.arange(count)[:, None]
    tokens = (FILLER[0] + filler * (FILLER[1] - FILLER[0])).astype(np.int32)
    tokens[:, 0] = BOS
    keys = (KEYS[0] + np.argsort(key_order, axis=1)[:, :PAIRS]).astype(np.int32)
    values = (VALUES[0] + value * (VALUES[1] - VALUES[0])).astype(np.int32)
    at = PAIR_PLACES[np.argsort(places, axis=1)[:, :PAIRS]]
    tokens[rows, at], tokens[rows, at + 1] = keys, values

    targets = np.full(tokens.shape, -1, np.int32)
    chosen = np.argsort(rehearsal_order, axis=1)[:, :REHEARSED]
    asked = REHEARSAL_PLACES[np.argsort(rehearsal_places, axis=1)[:, :REHEARSED]]
    tokens[rows, asked], tokens[rows, asked + 1] = keys[rows, chosen], BLANK
    targets[rows, asked] = values[rows, chosen]

    order = np.argsort(question_order, axis=1)
    final = np.arange(QUESTIONS, LENGTH, 2)
    tokens[:, final], tokens[:, final + 1] = keys[rows, order], BLANK
    targets[:, final] = values[rows, order]
    rehearsed, unrehearsed = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    known = (order[:, :, None] == chosen[:, None, :]).any(axis=2)
    rehearsed[:, final], unrehearsed[:, final] = known, ~known
    return Sequences(tokens, targets, rehearsed, unrehearsed)


def trained(recipe: Recipe, seed: int, progress: Progress | None = None) -> Params:
    """The parameters of a model: read from the user's cache, or trained now and kept there.

    Args:
        recipe: what it is trained by.
        seed: of the initialisation and of the batches.
        progress: told of every step; nothing is told where the model is found.
    """
    return kept("recall", dataclasses.asdict(recipe), seed, lambda: _train(recipe, seed, progress))


def _train(recipe: Recipe, seed: int, progress: Progress | None) -> Params:
    config, batches = recipe.decoder, stream(seed, "recall", "train")

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        made = sequences(recipe.rows, batches, step * recipe.rows)
        return made.tokens, made.targets

    def loss(params: Params, batch: tuple[Array, Array]) -> Float[Array, ""]:
        tokens, targets = batch
        logits = jax.nn.log_softmax(forward(params, config, tokens))
        said = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return -(said * (targets >= 0)).sum() / (targets >= 0).sum()

    schedule = optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup)
    return fit(init_params(jax.random.key(seed), config), loss, batch, recipe.steps, schedule, progress)


def held_out(count: int) -> Sequences:
    """Sequences that no training sees, the same for every model."""
    return sequences(count, stream(0, "recall", "held out"))


def held_out_accuracy(recipe: Recipe, params: Params, *, count: int = 256) -> tuple[float, float]:
    """Share of final questions that are answered, of rehearsed pairs and of the others."""
    data = held_out(count)
    right = np.asarray(forward(params, recipe.decoder, jnp.asarray(data.tokens)).argmax(axis=-1)) == data.targets
    return float(right[data.rehearsed].mean()), float(right[data.unrehearsed].mean())
