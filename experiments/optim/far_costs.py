"""Bytes and time of one training step of each way of fine-tuning, Adam included.

    floats_ffn, floats_block    a token leaves for the backward pass, by JAX's own account: the perceptron alone, and
                                a whole block, its input counted in both
    temporary_bytes             of the compiled step, beside what it is given: residuals, gradients, the rest
    optimizer_bytes             Adam's moments, read off the state
    peak_bytes                  temporary + parameters + state (updated in place)
    accessed_bytes              that a compiled step of one block moves, by the compiler's account of each operation

Sizes are a checkpoint's and no weights are made for them: programs are compiled for shapes. Times are those of a
smaller model on random tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.lab import interleave
from experiments.optim import far_models
from experiments.optim.far_models import Params, Recipe
from hashml.accounting import stored_bytes
from hashml.models.encoder import EncoderConfig
from hashml.optim.far import learner_count, reconfigure
from hashml.optim.residuals import residual_bytes

CLASSES = 2


@runtime_checkable
class Costed(Protocol):
    """Fields of the experiment's configuration; hashable."""

    @property
    def shares(self) -> tuple[float, ...]: ...
    @property
    def baselines(self) -> tuple[str, ...]: ...
    @property
    def costed(self) -> tuple[str, ...] | None: ...
    @property
    def measured_vocabulary(self) -> int: ...
    @property
    def measured_features(self) -> int: ...
    @property
    def measured_layers(self) -> int: ...
    @property
    def measured_tokens(self) -> tuple[int, int]: ...
    @property
    def timed_vocabulary(self) -> int: ...
    @property
    def timed_features(self) -> int: ...
    @property
    def timed_layers(self) -> int: ...
    @property
    def timed_tokens(self) -> tuple[int, int]: ...
    @property
    def repetitions(self) -> int: ...


class Step(NamedTuple):
    """A compiled step and the shapes that it takes.

    Attributes:
        compiled: ``(trained, state, fixed, tokens, labels) -> (trained, state, loss)``, the first two in place.
        shapes: of those.
    """

    compiled: Any
    shapes: tuple[Any, ...]


def recipes(config: Costed) -> dict[str, Recipe]:
    """What is compared, by name; ``recomputed`` are the controls that keep less without freezing anything."""
    found = {
        "full": Recipe("full", 1.0),
        "full, h recomputed": Recipe("full", 1.0, kept="preactivation"),
        "full, recomputed": Recipe("full", 1.0, kept="input"),
    }
    for share in config.shares:
        found[f"far-{share:g}"] = Recipe("far", share)
        found[f"far-{share:g}, recomputed"] = Recipe("far", share, recompute=True)
    smallest = min((share for share in config.shares if share), default=1.0)
    found[f"far-{smallest:g}, tables frozen"] = Recipe("far", smallest, embedding=False)
    others = {"bitfit": Recipe("bitfit"), "lora": Recipe("lora", smallest)}
    found |= {name: recipe for name, recipe in others.items() if name in config.baselines}
    return {name: recipe for name, recipe in found.items() if config.costed is None or name in config.costed}


def parameters(key: Array, config: EncoderConfig, recipe: Recipe) -> Params:
    """Random weights as the recipe has them; learners are the first units, which bytes and times cannot tell."""
    params = far_models.with_head(far_models.initial(key, config), key, CLASSES)
    if recipe.method == "lora":
        return far_models.with_adapters(params, key, far_models.equal_rank(config, recipe.share or 0.0))
    if recipe.method != "far":
        return params
    count = learner_count(config.hidden, recipe.share or 0.0)
    return reconfigure(params, np.broadcast_to(np.arange(count, dtype=np.int32), (config.layers, count)))


@functools.lru_cache(maxsize=32)
def step(config: EncoderConfig, recipe: Recipe, tokens: tuple[int, int]) -> Step:
    """One step of Adam, for shapes."""
    optimizer = optax.adam(1e-4)

    def given(key: Array) -> tuple[Any, ...]:
        trained, fixed = far_models.divide(parameters(key, config, recipe), recipe)
        return trained, optimizer.init(trained), fixed, jnp.zeros(tokens, jnp.int32), jnp.zeros(tokens[0], jnp.int32)

    def loss(trained: Params, fixed: Params, tokens: Array, labels: Array) -> Array:
        logits = far_models.classify(far_models.unite(trained, fixed), config, tokens, recipe)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def update(trained: Params, state: Any, fixed: Params, tokens: Array, labels: Array) -> tuple[Any, Any, Array]:
        value, gradients = jax.value_and_grad(loss)(trained, fixed, tokens, labels)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    shapes = jax.eval_shape(given, jax.random.key(0))
    return Step(jax.jit(update, donate_argnums=(0, 1)).lower(*shapes).compile(), shapes)


# --- bytes ------------------------------------------------------------------------------------------


def measured_config(config: Costed) -> EncoderConfig:
    """The checkpoint's sizes."""
    sizes = config.measured_vocabulary, config.measured_features, config.measured_layers
    return far_models.encoder_config(*sizes, config.measured_tokens[1])


def one_block(config: Costed) -> EncoderConfig:
    """One of its blocks, behind a table of few tokens: an account of operations reads the body of a loop once."""
    return far_models.encoder_config(8, config.measured_features, 1, config.measured_tokens[1])


def costs(config: Costed, recipe: Recipe) -> dict[str, float]:
    """The row of a recipe."""
    whole = measured_config(config)
    made = step(whole, recipe, config.measured_tokens)
    trained, state, fixed, *_ = made.shapes
    memory: Any = made.compiled.memory_analysis()
    stored = stored_bytes((trained, fixed))
    floats = kept_floats(whole, recipe)
    moved: Any = step(one_block(config), recipe, config.measured_tokens).compiled.cost_analysis()
    return {
        "floats_ffn": floats[0],
        "floats_block": floats[1],
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "optimizer_bytes": stored_bytes(state),
        "parameter_bytes": stored,
        "peak_bytes": int(memory.temp_size_in_bytes) + stored + stored_bytes(state),
        "trained": far_models.trained_count(trained),
        "accessed_bytes": float(moved["bytes accessed"]),
    }


def kept_floats(config: EncoderConfig, recipe: Recipe) -> tuple[float, float]:
    """Floats a token leaves in the perceptron alone, and in a block; the input is made inside, so that it counts."""
    rows, length = 2, config.context
    trained, fixed = jax.eval_shape(lambda: far_models.divide(parameters(jax.random.key(0), config, recipe), recipe))
    layer = [jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), part["layers"])
             for part in (trained, fixed)]  # fmt: skip
    x = jax.ShapeDtypeStruct((rows, length, config.features), jnp.float32)
    mask = jax.ShapeDtypeStruct((rows, length), jnp.bool_)

    def alone(trained: Params, x: Array, fixed: Params, mask: Array) -> Array:
        del mask
        return far_models.perceptron(far_models.unite(trained, fixed), 2 * x, recipe)

    def block(trained: Params, x: Array, fixed: Params, mask: Array) -> Array:
        return far_models.block(far_models.unite(trained, fixed), config, 2 * x, mask, recipe)

    found = [
        residual_bytes(function, layer[0], x, constants=(layer[1], mask)) / (4 * rows * length)
        for function in (alone, block)
    ]
    return found[0], found[1]


# --- time -------------------------------------------------------------------------------------------


def timed_config(config: Costed) -> EncoderConfig:
    sizes = config.timed_vocabulary, config.timed_features, config.timed_layers
    return far_models.encoder_config(*sizes, config.timed_tokens[1])


def times(config: Costed) -> dict[str, Float[np.ndarray, " repetitions"]]:
    """Seconds of a step of every recipe, taken in turns within one process."""
    functions = {name: _stepper(config, recipe) for name, recipe in recipes(config).items()}
    return interleave(functions, repetitions=config.repetitions, warmup=2)


def _stepper(config: Costed, recipe: Recipe) -> Callable[[], Any]:
    made = step(timed_config(config), recipe, config.timed_tokens)
    rng = np.random.default_rng(0)

    def drawn(shape: jax.ShapeDtypeStruct) -> Array:
        return jnp.asarray(0.02 * rng.standard_normal(shape.shape), shape.dtype)

    trained, state, fixed = made.shapes[:3]
    moments = jax.tree.map(lambda shape: jnp.asarray(np.zeros(shape.shape, shape.dtype)), state)
    held = [jax.tree.map(drawn, trained), moments]
    tokens = jnp.asarray(rng.integers(1, config.timed_vocabulary, config.timed_tokens, np.int32))
    given = (jax.tree.map(drawn, fixed), tokens, jnp.asarray(np.zeros(len(tokens), np.int32)))

    def advance() -> Any:
        """Trains on, as a loop would."""
        held[0], held[1], value = made.compiled(*held, *given)
        return value, held

    return advance


timings = functools.lru_cache(maxsize=1)(times)
