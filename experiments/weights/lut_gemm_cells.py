"""The cells of `experiments.weights.lut_gemm` that take no time: exactness, and nets trained at few bits."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int32

from experiments.data import images
from experiments.data.clicks import Splits
from experiments.data.counter import permutation, stream
from experiments.sharing.image_models import Apply, accuracies, train_and_score
from hashml.weights.lut_gemm import (
    Implementation,
    LutWeights,
    lsq_dense,
    lsq_levels,
    lsq_scale,
    lut_dense,
    lut_product,
    pack_dense,
    pack_weights,
    product_table,
)
from hashml.weights.lut_gemm_native import available

CLASSES = 10
DIGITS = (1097, 300, 400)
"""Images of scikit-learn's 1797 to train, to validate and to test."""


# --- exactness ------------------------------------------------------------------------------------------


def books(bits: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Levels of activations and weights by name; the first two are evenly spaced, the last two are not."""
    even = lsq_levels(bits, signed=False).astype(np.int32)
    square = np.sign(even - even[-1] // 2) * (even - even[-1] // 2) ** 2
    return {
        "step sizes": (even, lsq_levels(bits, signed=True).astype(np.int32)),
        "shifted": (even, even - 1),
        "squares": (square.astype(np.int32), (7 * square[::-1] + 3).astype(np.int32)),
        "normal quantiles": _quantiles(2**bits),
    }


def _quantiles(levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Float levels of equal mass under a standard normal, and their magnitudes."""
    from scipy.special import ndtri

    found = ndtri((np.arange(levels) + 0.5) / levels).astype(np.float32)
    return np.abs(found), found


def forms(book: str) -> tuple[Implementation, ...]:
    """What can be asked for these levels here."""
    if book == "normal quantiles":
        return ("float32", "byte_tables", "bit_planes")
    return ("int8", "byte_tables", "bit_planes", *(("native",) if available() else ()))


def exactness(book: str, bits: int, form: Implementation, columns: int) -> dict[str, int | float]:
    """Sums that differ from those of a loop over the table, the largest relative error, and bytes a row."""
    rng = np.random.default_rng(bits)
    a, w = (rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8) for rows in (5, 64))
    a_levels, w_levels = books(bits)[book]
    table, expected = product_table(a_levels, w_levels), 0
    for k in range(columns):
        expected = expected + table[w[:, k].astype(int) << bits | a[:, k, None]]
    found = np.asarray(jax.jit(lambda a, w: lut_product(a, w, a_levels, w_levels, implementation=form))(a, w))
    scale = np.abs(a_levels.astype(float)[a]) @ np.abs(w_levels.astype(float)[w]).T
    return {
        "differing": int((found != expected).sum()),
        "error": float((np.abs(found - expected) / scale).max()),
        "row_bytes": pack_weights(w, w_levels).blocks.nbytes / len(w),
    }


# --- data -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Images as rows of numbers from 0 to 1."""

    inputs: Float32[np.ndarray, "n pixels"]
    labels: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)


@runtime_checkable
class Training(Protocol):
    """Sizes of the nets and their training, fields of the experiment's configuration."""

    @property
    def hidden(self) -> tuple[int, ...]: ...
    @property
    def seeds(self) -> int: ...
    @property
    def learning_rates(self) -> tuple[float, ...]: ...
    @property
    def steps(self) -> int: ...
    @property
    def fashion_train(self) -> int: ...


@functools.cache
def parts(name: str, train: int) -> Splits[Examples]:
    """The digits, split once, or so many training images of Fashion-MNIST."""
    if name == "digits":
        from sklearn.datasets import load_digits

        pixels, classes = load_digits(return_X_y=True)
        order = permutation(stream(0, "split"), len(classes))
        inputs, labels = (pixels[order] / 16).astype(np.float32), classes[order].astype(np.int32)
        ends = np.cumsum((0, *DIGITS))
        return Splits(*(Examples(inputs[i:j], labels[i:j]) for i, j in itertools.pairwise(ends)))
    found = images.splits("fashion_mnist", train=train, validation=max(200, train // 4))
    low, high = found.train.images.min(), found.train.images.max()
    return Splits(
        *(
            Examples(((part.images - low) / (high - low)).reshape(len(part), -1).clip(0, 1), part.labels)
            for part in found
        )
    )


# --- nets ---------------------------------------------------------------------------------------------


def float_apply(params: Any, _: Any, x: Array) -> Array:
    """Logits of the net whose numbers are floats."""
    return _net(params, lambda layer, x: x @ layer["kernel"] + layer["bias"], x)


@functools.cache
def lsq_apply(bits: int) -> Apply:
    """Logits of the net whose every layer has weights and inputs of so many bits."""
    return lambda params, _, x: _net(params, lambda layer, x: lsq_dense(x, **layer, bits=bits), x)


def _net(params: list[Any], dense: Callable[[Any, Array], Array], x: Array) -> Array:
    for layer in params[:-1]:
        x = jax.nn.relu(dense(layer, x))
    return dense(params[-1], x)


@functools.partial(jax.jit, static_argnames=("widths", "seeds"))
def float_start(widths: tuple[int, ...], seeds: int) -> list[dict[str, Array]]:
    """He's initial weights, stacked over the seeds; the same for all contenders."""
    layers = []
    for at, (before, after) in enumerate(itertools.pairwise(widths)):
        keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), at) for seed in range(seeds)])
        kernel = jax.vmap(lambda key, shape=(before, after): jax.random.normal(key, shape))(keys)
        layers.append({"kernel": kernel * np.sqrt(2 / before), "bias": jnp.zeros((seeds, after))})
    return layers


@functools.partial(jax.jit, static_argnames="bits")
def with_scales(params: list[Any], inputs: Float[Array, "n pixels"], bits: int) -> list[dict[str, Array]]:
    """Step sizes where LSQ starts them, from the weights and from what each layer reads of these inputs."""

    def one(params: list[Any]) -> list[dict[str, Array]]:
        x, layers = inputs, []
        for layer in params:
            steps = jax.vmap(lambda column: lsq_scale(column, bits, signed=True), in_axes=1)(layer["kernel"])
            layers.append(layer | {"kernel_scale": steps, "input_scale": lsq_scale(x, bits, signed=False)})
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return layers

    return jax.vmap(one)(params)


def adam(schedule: optax.Schedule, constants: Any) -> optax.GradientTransformation:
    """The optimiser of all contenders."""
    del constants
    return optax.adam(schedule)


# --- what a net scores ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def scores(config: Training, data: str, method: str, bits: int) -> list[dict[str, float | None]]:
    """All seeds of a contender: ``float32``, ``lsq``, or ``rounded``, float32's weights without more training."""
    whole = parts(data, config.fashion_train)
    if method == "rounded":
        chosen = with_scales(_trained(config, data, "float32", 32)[1], _calibration(whole), bits)
        stacked = jax.tree.map(lambda leaf: leaf[:, None], chosen)
        found = accuracies(lsq_apply(bits), stacked, whole.test)
        return [_scored(float(found[seed, 0])) for seed in range(config.seeds)]
    outcome, chosen = _trained(config, data, method, bits)
    rate = outcome.chosen()
    rows = []
    for seed in range(config.seeds):
        row = _scored(float(outcome.test[seed, rate]))
        row["validation_accuracy"] = float(outcome.validation[seed, rate])
        row["learning_rate"] = outcome.learning_rates[rate]
        if method == "lsq":
            row |= _by_tables(jax.tree.map(lambda leaf, seed=seed: leaf[seed], chosen), whole.test, bits)
        rows.append(row)
    return rows


def _scored(accuracy: float) -> dict[str, float | None]:
    names = ("accuracy", "validation_accuracy", "learning_rate", "table_accuracy", "changed", "logit_error")
    return dict.fromkeys(names) | {"accuracy": accuracy}


def _calibration(whole: Splits[Examples]) -> Array:
    return jnp.asarray(whole.train.inputs[:512])


@functools.lru_cache(maxsize=4)
def _trained(config: Training, data: str, method: str, bits: int) -> tuple[Any, Any]:
    whole = parts(data, config.fashion_train)
    start: Any = float_start((whole.train.inputs.shape[1], *config.hidden, CLASSES), config.seeds)
    if method == "lsq":
        start = with_scales(start, _calibration(whole), bits)
    outcome = train_and_score(
        lsq_apply(bits) if method == "lsq" else float_apply,
        start,
        tuple(whole),
        learning_rates=config.learning_rates,
        steps=config.steps,
        batch_size=64,
        seeds=range(config.seeds),
        optimizer=adam,
    )
    return outcome, outcome.chosen_params()


def _by_tables(params: list[Any], test: Examples, bits: int) -> dict[str, float]:
    """The net by `lut_dense`: its accuracy, the share of answers that differ, and the error of logits."""
    packed = [pack_dense(layer["kernel"], layer["kernel_scale"], bits=bits) for layer in params]
    trained, looked_up = _logits(params, packed, jnp.asarray(test.inputs), bits)
    answers = looked_up.argmax(axis=1)
    return {
        "table_accuracy": float((answers == test.labels).mean()),
        "changed": float((answers != trained.argmax(axis=1)).mean()),
        "logit_error": float(np.abs(looked_up - trained).max() / np.abs(trained).max()),
    }


@functools.partial(jax.jit, static_argnames="bits")
def _both(params: list[Any], packed: list[LutWeights], x: Array, bits: int) -> tuple[Array, Array]:
    def dense(layer: tuple[Any, LutWeights], x: Array) -> Array:
        own, weights = layer
        return lut_dense(x, weights, own["bias"], own["kernel_scale"], own["input_scale"], bits=bits)

    looked_up = _net(list(zip(params, packed, strict=True)), dense, x)
    return lsq_apply(bits)(params, None, x), looked_up


def _logits(params: Any, packed: Any, x: Array, bits: int) -> tuple[np.ndarray, np.ndarray]:
    trained, looked_up = _both(params, packed, x, bits)
    return np.asarray(trained), np.asarray(looked_up)
