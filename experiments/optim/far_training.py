"""Pretrains the encoder on articles without their classes, fine-tunes it on others in every way, and scores it.

Pretraining reads one part of an AG News article and says which words the other part holds: a softmax over the
vocabulary from the mean of x, against the share of each word. Fine-tuning tells the four classes of articles apart
that pretraining has not seen.

A run is one program, compiled once a recipe: priming, the choice of learners, the cut of the parameters and of Adam's
moments, the remaining steps, and the scores of the validation and test part. Seeds share the pretrained weights, as
the users of a checkpoint do; a seed draws the head, the order of the rows and random learners.
"""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int32

from experiments.data import text_classification
from experiments.data.clicks import Splits
from experiments.data.counter import permutation, stream
from experiments.data.text_classification import Texts
from experiments.optim import far_models
from experiments.optim.far_models import Params, Recipe
from experiments.sharing.image_models import batch_order
from hashml.models.encoder import EncoderConfig
from hashml.optim.far import choose_learners, magnitude_scores, merge, node_scores, random_scores, reconfigure
from hashml.optim.far import trained_part as without_frozen

CHOICES = ("primed", "random", "magnitude")
CLASSES = 4


@runtime_checkable
class Plan(Protocol):
    """Fields of the experiment's configuration; hashable."""

    @property
    def rows(self) -> int: ...
    @property
    def pretraining_texts(self) -> int | None: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def features(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def pretraining_steps(self) -> int: ...
    @property
    def pretraining_rows(self) -> int: ...
    @property
    def pretraining_rate(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def priming(self) -> float: ...
    @property
    def learning_rates(self) -> tuple[float, ...]: ...
    @property
    def search_seeds(self) -> int: ...
    @property
    def seeds(self) -> int: ...


def model_config(plan: Plan) -> EncoderConfig:
    return far_models.encoder_config(plan.vocabulary, plan.features, plan.layers, plan.length)


def priming_steps(plan: Plan) -> int:
    return max(1, round(plan.priming * plan.steps))


# --- data -------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Pairs of parts of an article to pretrain on, and the parts of the set to fine-tune on."""

    read: Int32[np.ndarray, "N T"]
    said: Int32[np.ndarray, "N T"]
    parts: Splits[Texts]


@functools.lru_cache(maxsize=2)
def data(plan: Plan) -> Data:
    """The vocabulary is that of the rows that are trained on; a sixth of ``rows`` is the validation part."""
    texts, labels = text_classification.load("ag_news", "train")
    order = permutation(stream(0, "far", "rows"), len(texts))
    held, train, other = np.split(order, [plan.rows // 6, plan.rows])
    other = other[: plan.pretraining_texts]
    test, test_labels = text_classification.load("ag_news", "test")
    numbers = text_classification.vocabulary([texts[row] for row in (*other, *train)], plan.vocabulary)

    def encode(rows: np.ndarray, length: int = plan.length) -> np.ndarray:
        return text_classification.encode([texts[row] for row in rows], numbers, length)

    tested = Texts(text_classification.encode(test, numbers, plan.length), test_labels)
    parts = Splits(Texts(encode(train), labels[train]), Texts(encode(held), labels[held]), tested)
    # Either part of an article is read once; one that has no second part is left out.
    first, second = np.split(encode(other, 2 * plan.length), 2, axis=1)
    long = (second != text_classification.PADDING).any(axis=1)
    halves = first[long], second[long]
    return Data(np.concatenate(halves), np.concatenate(halves[::-1]), parts)


# --- pretraining ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def pretrained(plan: Plan) -> tuple[Params, float]:
    """Weights, and how many nats a word the last tenth of the steps were better than the frequencies of words."""
    made = data(plan)
    order = batch_order(len(made.read), plan.pretraining_steps, plan.pretraining_rows, 0)
    counts = np.bincount(made.said.ravel(), minlength=plan.vocabulary) + 0.1
    counts[text_classification.PADDING] = 0.1
    shares = np.log(counts / counts.sum()).astype(np.float32)
    given = [jnp.asarray(leaf) for leaf in (shares, made.read, made.said, order)]
    params, gains = _pretrain(model_config(plan), plan.pretraining_rate, initial(plan), *given)
    return params, float(np.asarray(gains)[-max(1, plan.pretraining_steps // 10) :].mean())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pretrain(
    config: EncoderConfig, rate: float, params: Params, shares: Array, read: Array, said: Array, order: Array
) -> tuple[Params, Array]:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(_schedule(rate, len(order))))
    words = 0.02 * jax.random.normal(jax.random.key(1), (config.vocabulary, config.features))
    params = params | {"words": words, "bias": shares}

    def loss(params: Params, rows: Array) -> tuple[Array, Array]:
        x = far_models.pooled(params, config, read[rows], Recipe("full"))
        found = jax.nn.log_softmax(x @ params["words"].T + params["bias"])
        weight = (said[rows] != text_classification.PADDING) / (said[rows] != text_classification.PADDING).sum()
        value = -(jnp.take_along_axis(found, said[rows], axis=1) * weight).sum()
        return value, -(shares[said[rows]] * weight).sum() - value

    def step(state: tuple[Any, Any], rows: Array) -> tuple[tuple[Any, Any], Array]:
        (_, gain), gradients = jax.value_and_grad(loss, has_aux=True)(state[0], rows)
        updates, memory = optimizer.update(gradients, state[1], state[0])
        return (optax.apply_updates(state[0], updates), memory), gain

    (params, _), gains = jax.lax.scan(step, (params, optimizer.init(params)), order)
    return {name: params[name] for name in ("embedding", "layers")}, gains


def _schedule(rate: Any, steps: int) -> optax.Schedule:
    """Rises for a tenth of the steps, then falls to zero along a line."""
    rise = max(1, steps // 10)

    def at(step: Any) -> Any:
        return rate * jnp.minimum((step + 1) / rise, (steps - step) / max(1, steps - rise))

    return at


@functools.lru_cache(maxsize=2)
def initial(plan: Plan) -> Params:
    return jax.jit(far_models.initial, static_argnums=1)(jax.random.key(0), model_config(plan))


# --- fine-tuning ------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Of one run, or stacked over runs."""

    validation_loss: Any
    validation_accuracy: Any
    test_loss: Any
    test_accuracy: Any
    train_loss: Any
    """Mean of the last tenth of the steps."""


@functools.lru_cache(maxsize=64)
def outcomes(plan: Plan, recipe: Recipe, choice: str) -> list[dict[str, float]]:
    """The row of each seed at the rate that the validation loss of the first seeds chose.

    Raises:
        ValueError: for a choice that does not exist.
    """
    if choice not in CHOICES:
        raise ValueError(f"choice is {choice!r}; allowed are {', '.join(CHOICES)}")
    rates = plan.learning_rates
    searched = range(min(plan.search_seeds, plan.seeds))
    found = _runs(plan, recipe, choice, [(seed, rate) for rate in rates for seed in searched])
    losses = np.asarray(found.validation_loss, np.float64).reshape(len(rates), -1).mean(axis=1)
    best = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))
    rest = [(seed, rates[best]) for seed in range(len(searched), plan.seeds)]
    chosen = slice(best * len(searched), (best + 1) * len(searched))
    parts = [Outcome(*(leaf[chosen] for leaf in found))]
    if rest:
        parts.append(_runs(plan, recipe, choice, rest))
    joined = Outcome(*(np.concatenate([np.asarray(leaf) for leaf in leaves]) for leaves in zip(*parts, strict=True)))
    return [
        {name: float(leaf[seed]) for name, leaf in joined._asdict().items()} | {"learning_rate": rates[best]}
        for seed in range(plan.seeds)
    ]


def _runs(plan: Plan, recipe: Recipe, choice: str, runs: list[tuple[int, float]]) -> Outcome:
    made = data(plan)
    seeds, rates = zip(*runs, strict=True)
    start = initial(plan) if recipe.method == "scratch" else pretrained(plan)[0]
    # It differs from full fine-tuning in its start alone, and is the same program.
    program = recipe._replace(method="full") if recipe.method == "scratch" else recipe
    orders = np.stack([batch_order(len(made.parts.train), plan.steps, plan.batch_size, seed) for seed in seeds])
    found = [
        _fine_tune(
            model_config(plan), program, priming_steps(plan), start, jnp.int32(CHOICES.index(choice)),
            jnp.uint32(seed), jnp.float32(rate), jnp.asarray(order), *_parts(plan),
        )
        for seed, rate, order in zip(seeds, rates, orders, strict=True)
    ]  # fmt: skip
    return Outcome(*(np.asarray([float(leaf) for leaf in leaves]) for leaves in zip(*found, strict=True)))


@functools.lru_cache(maxsize=2)
def _parts(plan: Plan) -> list[tuple[Array, Array]]:
    return [(jnp.asarray(part.inputs), jnp.asarray(part.labels)) for part in data(plan).parts]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fine_tune(
    config: EncoderConfig,
    recipe: Recipe,
    priming: int,
    params: Params,
    choice: Array,
    seed: Array,
    rate: Array,
    order: Array,
    train: tuple[Array, Array],
    validation: tuple[Array, Array],
    test: tuple[Array, Array],
) -> Outcome:
    key = jax.random.key(seed)
    params = far_models.with_head(params, jax.random.fold_in(key, 0), CLASSES)
    if recipe.method == "lora":
        rank = far_models.equal_rank(config, recipe.share or 0.0)
        params = far_models.with_adapters(params, jax.random.fold_in(key, 1), rank)
    optimizer = optax.adam(_schedule(rate, len(order)))

    def train_on(trained: Params, fixed: Params, memory: Any, order: Array) -> tuple[Params, Any, Array]:
        def loss(trained: Params, rows: Array) -> Array:
            logits = far_models.classify(far_models.unite(trained, fixed), config, train[0][rows], recipe)
            return optax.softmax_cross_entropy_with_integer_labels(logits, train[1][rows]).mean()

        def step(state: tuple[Any, Any], rows: Array) -> tuple[tuple[Any, Any], Array]:
            value, gradients = jax.value_and_grad(loss)(state[0], rows)
            updates, memory = optimizer.update(gradients, state[1], state[0])
            return (optax.apply_updates(state[0], updates), memory), value

        (trained, memory), losses = jax.lax.scan(step, (trained, memory), order)
        return trained, memory, losses

    if recipe.method != "far":
        trained, fixed = far_models.divide(params, recipe)
        trained, _, losses = train_on(trained, fixed, optimizer.init(trained), order)
        tuned = far_models.unite(trained, fixed)
    else:
        # Priming trains what full fine-tuning does.
        whole, still = far_models.divide(params, recipe)
        whole, memory, _ = train_on(whole, still, optimizer.init(whole), order[:priming])
        before, after = params["layers"]["ffn"], whole["layers"]["ffn"]
        scores = jnp.stack(
            [
                node_scores(before, after),
                random_scores(jax.random.fold_in(key, 2), after),
                magnitude_scores(after),
            ]
        )
        learners = choose_learners(scores[choice], recipe.share or 0.0)
        split = reconfigure(far_models.unite(whole, still), learners)
        trained, fixed = far_models.divide(split, recipe)
        trained, _, losses = train_on(trained, fixed, without_frozen(reconfigure(memory, learners)), order[priming:])
        tuned = merge(far_models.unite(trained, fixed), learners)

    def score(part: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = far_models.classify(tuned, config, part[0], recipe)
        found = optax.softmax_cross_entropy_with_integer_labels(logits, part[1])
        return found.mean(), (jnp.argmax(logits, -1) == part[1]).mean()

    return Outcome(*score(validation), *score(test), losses[-max(1, len(order) // 10) :].mean())
