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

This is the layout `SHORT`. `LONG` has 256 tokens, 16 pairs and 8 rehearsals, its pairs over more than half of the
sequence, and a model of its own, `RECALL_LONG`.
"""

import dataclasses
from collections.abc import Callable
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
BOS, BLANK = 0, 63
Batch = tuple[np.ndarray, np.ndarray]
"""Tokens and targets."""
KEYS, VALUES, FILLER = (1, 21), (21, 41), (41, 62)
"""First token, and the one after the last."""
QUESTIONS = 80
"""Place of the first of the final questions."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What stands where in a sequence.

    Attributes:
        length: tokens.
        pairs: of a key and a value, at most as many as there are keys; all are asked for at the end.
        rehearsed: pairs that are asked for once before.
        pair_places: first and last place of a pair's key; it stands at every second one.
        rehearsal_places: the same of rehearsals.

    Raises:
        ValueError: for pairs, rehearsals or questions that run into each other or do not fit.
    """

    length: int = LENGTH
    pairs: int = 8
    rehearsed: int = 4
    pair_places: tuple[int, int] = (1, 35)
    rehearsal_places: tuple[int, int] = (38, 76)

    def __post_init__(self) -> None:
        bounds = (0, *self.pair_places, *self.rehearsal_places, self.questions)
        steps = zip(bounds, (1, 0, 2, 0, 2), bounds[1:], strict=False)
        if any(after - before < least for before, least, after in steps):
            raise ValueError(f"pair_places is {self.pair_places} and rehearsal_places {self.rehearsal_places}; each "
                             f"must rise, pairs first, and end before the questions at {self.questions}")  # fmt: skip
        for name, count, most in (
            ("pairs", self.pairs, min(KEYS[1] - KEYS[0], len(self.places))),
            ("rehearsed", self.rehearsed, min(self.pairs, len(self.rehearsals))),
        ):
            if not 1 <= count <= most:
                raise ValueError(f"{name} is {count}; there is room for 1 to {most}")

    @property
    def questions(self) -> int:
        """Place of the first of the final questions."""
        return self.length - 2 * self.pairs

    @property
    def places(self) -> np.ndarray:
        """Where a pair's key may stand."""
        return np.arange(self.pair_places[0], self.pair_places[1] + 1, 2)

    @property
    def rehearsals(self) -> np.ndarray:
        """Where a rehearsed key may stand."""
        return np.arange(self.rehearsal_places[0], self.rehearsal_places[1] + 1, 2)


SHORT = Layout()
LONG = Layout(length=256, pairs=16, rehearsed=8, pair_places=(1, 143), rehearsal_places=(146, 218))


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
RECALL_LONG = dataclasses.replace(
    RECALL, decoder=dataclasses.replace(RECALL.decoder, context=LONG.length), steps=300, rows=32
)
"""Of the layout `LONG`."""


def sequences(count: int, key: int, first: int = 0, layout: Layout = SHORT) -> Sequences:
    """Sequences ``first`` to ``first + count`` of a stream of `experiments.data.counter`.

    Raises:
        ValueError: for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    pairs = layout.pairs
    sizes = (layout.length, pairs, 20, len(layout.places), len(layout.rehearsals), pairs, pairs)
    per_row = sum(sizes)
    draws = uniform(key, np.arange(first * per_row, (first + count) * per_row)).reshape(count, per_row)
    filler, value, key_order, places, rehearsal_places, rehearsal_order, question_order = np.split(
        draws, np.cumsum(sizes)[:-1], axis=1
    )
    rows = np.arange(count)[:, None]
    tokens = (FILLER[0] + filler * (FILLER[1] - FILLER[0])).astype(np.int32)
    tokens[:, 0] = BOS
    keys = (KEYS[0] + np.argsort(key_order, axis=1)[:, :pairs]).astype(np.int32)
    values = (VALUES[0] + value * (VALUES[1] - VALUES[0])).astype(np.int32)
    at = layout.places[np.argsort(places, axis=1)[:, :pairs]]
    tokens[rows, at], tokens[rows, at + 1] = keys, values

    targets = np.full(tokens.shape, -1, np.int32)
    chosen = np.argsort(rehearsal_order, axis=1)[:, : layout.rehearsed]
    asked = layout.rehearsals[np.argsort(rehearsal_places, axis=1)[:, : layout.rehearsed]]
    tokens[rows, asked], tokens[rows, asked + 1] = keys[rows, chosen], BLANK
    targets[rows, asked] = values[rows, chosen]

    order = np.argsort(question_order, axis=1)
    final = np.arange(layout.questions, layout.length, 2)
    tokens[:, final], tokens[:, final + 1] = keys[rows, order], BLANK
    targets[:, final] = values[rows, order]
    rehearsed, unrehearsed = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    known = (order[:, :, None] == chosen[:, None, :]).any(axis=2)
    rehearsed[:, final], unrehearsed[:, final] = known, ~known
    return Sequences(tokens, targets, rehearsed, unrehearsed)


def asked_pairs(tokens: Int32[np.ndarray, "N T"], targets: Int32[np.ndarray, "N T"]) -> Int32[np.ndarray, "N T"]:
    """Where the key stands, in its pair, that is asked for at each place; -1 where nothing is asked."""
    first = (tokens[:, :, None] == np.arange(*KEYS)).argmax(axis=1).astype(np.int32)
    key = np.where(targets >= 0, tokens - KEYS[0], 0)
    return np.where(targets >= 0, np.take_along_axis(first, key, axis=1), -1).astype(np.int32)


def without_rehearsals(data: Sequences, key: int, layout: Layout = SHORT) -> Sequences:
    """The same sequences with filler in place of all rehearsals; which pairs had one is still told."""
    early = (data.targets >= 0) & (np.arange(layout.length) < layout.questions)
    draws = uniform(key, np.arange(early.size)).reshape(early.shape)
    filler = (FILLER[0] + draws * (FILLER[1] - FILLER[0])).astype(np.int32)
    gone = early | np.pad(early[:, :-1], ((0, 0), (1, 0)))  # the key, and the blank behind it
    tokens, targets = np.where(gone, filler, data.tokens), np.where(early, np.int32(-1), data.targets)
    return data._replace(tokens=tokens, targets=targets)


def trained(recipe: Recipe, seed: int, progress: Progress | None = None, layout: Layout = SHORT) -> Params:
    """The parameters of a model: read from the user's cache, or trained now and kept there.

    Args:
        recipe: what it is trained by.
        seed: of the initialisation and of the batches.
        progress: told of every step; nothing is told where the model is found.
        layout: of its sequences.
    """
    # The files of the short layout are older than layouts.
    geometry = dataclasses.asdict(recipe) | ({} if layout == SHORT else {"layout": dataclasses.asdict(layout)})
    batches = stream(seed, "recall", "train")

    def batch(step: int) -> Batch:
        made = sequences(recipe.rows, batches, step * recipe.rows, layout)
        return made.tokens, made.targets

    return kept("recall", geometry, seed, lambda: train(recipe, seed, batch, progress))


def train(recipe: Recipe, seed: int, batch: Callable[[int], Batch], progress: Progress | None) -> Params:
    """Parameters of a model that says targets.

    Args:
        recipe: what it is trained by.
        seed: of the initialisation.
        batch: tokens and targets of each step; a target of -1 is none.
        progress: told of every step.
    """
    config = recipe.decoder

    def loss(params: Params, batch: tuple[Array, Array]) -> Float[Array, ""]:
        tokens, targets = batch
        logits = jax.nn.log_softmax(forward(params, config, tokens))
        said = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return -(said * (targets >= 0)).sum() / (targets >= 0).sum()

    schedule = optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup)
    return fit(init_params(jax.random.key(seed), config), loss, batch, recipe.steps, schedule, progress)


def held_out(count: int, layout: Layout = SHORT) -> Sequences:
    """Sequences that no training sees, the same for every model."""
    return sequences(count, stream(0, "recall", "held out"), layout=layout)


def held_out_accuracy(
    recipe: Recipe, params: Params, *, count: int = 256, layout: Layout = SHORT
) -> tuple[float, float]:
    """Share of final questions that are answered, of rehearsed pairs and of the others."""
    data = held_out(count, layout)
    right = np.asarray(forward(params, recipe.decoder, jnp.asarray(data.tokens)).argmax(axis=-1)) == data.targets
    return float(right[data.rehearsed].mean()), float(right[data.unrehearsed].mean())
