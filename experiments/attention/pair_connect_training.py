"""Texts of characters and of words, the training of every contender at a rate of its own, and counts of trigrams.

Adam serves all dense parameters, with a rate that is searched with the first seed; the table of pairs is trained by
Adagrad at 0.1, which leaves rows that no pair used as they are. Its accumulator begins at zero, since gradients of a
row are small. All contenders of a seed see the same batches.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from experiments.attention.pair_connect_models import Sizes, contender, flops, looked_up, model
from experiments.attention.race_training import WARMUP, Part, Plan, Score, adam, score
from experiments.data import language
from experiments.data.clicks import Splits
from experiments.sharing.image_models import batch_order, train
from hashml.accounting import stored_bytes

TABLE_RATE = 0.1


class Text(NamedTuple):
    """A text in sequences, and the number of its words."""

    parts: Splits[Part]
    vocabulary: int


def optimizer(schedule: optax.Schedule, constants: Any = None) -> optax.GradientTransformation:
    """Adam, and for tables and memories Adagrad with the same warm-up and decay."""

    def table_rate(step: Any) -> Any:
        return TABLE_RATE * jnp.minimum(1, (step + 1) / WARMUP) * schedule(step) / schedule(0)

    adagrad = optax.adagrad(table_rate, initial_accumulator_value=0.0, eps=1e-10)  # pyright: ignore[reportArgumentType] a schedule is allowed
    return optax.partition({"dense": adam(schedule, constants), "pairs": adagrad}, _labels)


def _labels(params: Any) -> Any:
    def label(path: Any, leaf: Any) -> str:
        del leaf
        return "pairs" if {entry.key for entry in path} & {"table", "memory"} else "dense"

    return jax.tree_util.tree_map_with_path(label, params)


@functools.cache
def _apply(sizes: Sizes, method: str) -> Any:
    """``apply(params, seed, x)``, one function object a method, so that its training is compiled once.

    The hash is the same for all seeds: it is part of the program.
    """
    module = model(contender(method, sizes), sizes)
    return lambda params, seed, x: module.apply({"params": params}, x)


@functools.cache
def _init(sizes: Sizes, method: str) -> Any:
    module = model(contender(method, sizes), sizes)
    return jax.jit(lambda key, x: module.init(key, x)["params"])


def initial(sizes: Sizes, method: str, seed: int) -> Any:
    """Parameters at the start."""
    return _init(sizes, method)(jax.random.key(seed), jnp.zeros((1, sizes.context), jnp.int32))


def outcomes(sizes: Sizes, method: str, parts: Splits[Part], plan: Plan) -> list[dict[str, Any]]:
    """The row of each seed: test and validation loss, the learning rate, and costs. One rate is not searched."""
    apply = _apply(sizes, method)

    def run(seed: int, rate: float | int) -> tuple[Score, Score]:
        found = train(
            apply,
            jax.tree.map(lambda leaf: leaf[None], initial(sizes, method, seed)),
            parts.train,
            learning_rates=(rate,),
            steps=plan.steps,
            batch_size=plan.batch_size,
            seeds=(seed,),
            optimizer=optimizer,
        )
        last = jax.tree.map(lambda leaf: leaf[0, 0], found.params)
        return score(apply, last, seed, parts.validation), score(apply, last, seed, parts.test)

    searched = {rate: run(0, rate) for rate in plan.learning_rates}
    # A run that diverged is the worst.
    rate = min(searched, key=lambda rate: np.nan_to_num(searched[rate][0].loss, nan=np.inf))
    scores = [searched[rate], *(run(seed, rate) for seed in range(1, plan.seeds))]
    one = contender(method, sizes)
    spent = {
        "learning_rate": rate,
        "features": one.features,
        "bytes": stored_bytes(jax.eval_shape(lambda: initial(sizes, method, 0))),
        "flops": flops(one, sizes),
        "bytes_looked_up": looked_up(one, sizes),
    }
    return [{"value": test.loss, "validation_loss": validation.loss} | spent for validation, test in scores]


# --- texts --------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def characters(context: int, held_out: int) -> Text:
    """Tiny Shakespeare; its characters are numbered through, and the last number begins a sequence."""
    texts = language.splits("tiny_shakespeare")
    alphabet = np.append(np.unique(np.concatenate([texts.train, texts.validation, texts.test])), language.BOS)

    def part(text: np.ndarray, count: int | None) -> Part:
        tokens = np.searchsorted(alphabet, language.sequences(text, context + 1, count)).astype(np.int32)
        return Part(tokens[:, :-1], tokens[:, 1:])

    parts = (part(text, count) for text, count in zip(_three(texts), (None, held_out, held_out), strict=True))
    return Text(Splits(*parts), alphabet.size)


@functools.lru_cache(maxsize=2)
def words(context: int, held_out: int, vocabulary: int) -> Text:
    """WikiText-2 (`experiments.data.language` says which parts) in words, the rarest being one word; a line's end is
    a word too. Sequences follow each other without a mark."""
    texts = [
        bytes(text).decode("utf-8", "replace").replace("\n", " <eos> ").split()
        for text in _three(language.splits("wikitext2"))
    ]
    found, counts = np.unique(texts[0], return_counts=True)
    order = np.lexsort((found, -counts))[: vocabulary - 1]
    numbers = {str(found[at]): number for number, at in enumerate(order)}

    def part(text: list[str], count: int | None) -> Part:
        ids = np.array([numbers.get(word, vocabulary - 1) for word in text], np.int32)
        whole = (ids.size - 1) // context
        chosen = np.arange(whole) if count is None else np.arange(count) * whole // count
        inputs, labels = (ids[start : start + whole * context].reshape(whole, context)[chosen] for start in (0, 1))
        return Part(inputs, labels)

    return Text(
        Splits(*(part(text, n) for text, n in zip(texts, (None, held_out, held_out), strict=True))), vocabulary
    )


def _three(parts: Splits[Any]) -> tuple[Any, Any, Any]:
    return parts.train, parts.validation, parts.test


# --- counts -------------------------------------------------------------------------------------------

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Of the smoothing: so many tokens of the shorter context count beside the longer one."""


def counts(text: Text, plan: Plan, seed: int) -> dict[str, Any]:
    """The row of interpolated trigram counts, made from the same batches: no training and no product.

    ``p(c | a b) = (n(a b c) + s p(c | b)) / (n(a b) + s)``, and so on down; ``s`` is chosen by the validation part.
    """
    chosen = batch_order(len(text.parts.train), plan.steps, plan.batch_size, seed).ravel()
    train = Part(text.parts.train.inputs[chosen], text.parts.train.labels[chosen])
    size = text.vocabulary
    tally = np.bincount(_trigrams(train, size), minlength=size**3).reshape(size, size, size)
    losses = {strength: _loss(tally, text.parts.validation, strength) for strength in STRENGTHS}
    best = min(losses, key=lambda strength: losses[strength])
    stored = 4 * (size**3 + size**2 + size)
    row = {"value": _loss(tally, text.parts.test, best), "validation_loss": losses[best], "learning_rate": None}
    return row | {"features": None, "bytes": stored, "flops": 0, "bytes_looked_up": 4 * 3 * size}


def _trigrams(part: Part, size: int) -> Int[np.ndarray, " n"]:
    """``(a V + b) V + c``; before the first token stands that token itself."""
    inputs = part.inputs.astype(np.int64)
    before = np.concatenate([inputs[:, :1], inputs[:, :-1]], axis=1)
    return ((before * size + inputs) * size + part.labels).ravel()


def _loss(tally: Int[np.ndarray, "V V V"], part: Part, strength: float) -> float:
    size = len(tally)
    shares: Any = np.full(size, 1 / size)
    for table in (tally.sum(axis=(0, 1)), tally.sum(axis=0), tally):
        shares = (table + strength * shares) / (table.sum(axis=-1, keepdims=True) + strength)
    return float(-np.log(shares.ravel()[_trigrams(part, size)]).mean())
