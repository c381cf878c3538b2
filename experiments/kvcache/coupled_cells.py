"""The cells of `experiments.kvcache.coupled`: which code on which model or Gaussian tensor, and what it scores."""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float

from experiments.kvcache import fixtures
from experiments.kvcache.contenders import contender
from experiments.kvcache.fixtures import DEFAULT, Size
from experiments.kvcache.harness import row_bytes
from hashml.coding.product_codebooks import product_decode, product_encode
from hashml.kvcache.calibration import learn_coupled
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.spec import LayerSpec
from hashml.models.decoder import decoder_model

Weights = Literal["fisher", "uniform"]
TENSORS = "tensors"
"""The fixture that is no model."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Codes, windows and tensors; the defaults are those of the claims."""

    models: tuple[str, ...] = ("f1", "recall")
    one_bit: tuple[str, ...] = ("coupled:1c1b", "coupled:2c2b", "coupled:4c4b", "coupled:8c8b")
    """With and without Fisher weights, on every model."""
    more_bits: tuple[str, ...] = ("coupled:1c2b", "coupled:2c4b", "coupled:4c8b", "coupled:2c8b")
    """On language models alone, as the baselines but INT2."""
    baselines: tuple[str, ...] = ("int4", "int2", "kivi:2", "kvquant:2", "kvquant:1")
    window: int = 16
    """Newest tokens that are exact where there is a window; KIVI's blocks gather in 32, of which 16.5 are held on
    average."""
    windowed: tuple[str, ...] = ("coupled:1c1b", "coupled:8c8b", "coupled:4c8b", "int2")
    """Codes that are also shown with the window, on language models; all others encode a token at once."""
    correlations: tuple[float, ...] = (0.0, 0.5, 0.9)
    """Of neighbouring channels of the Gaussian tensors."""
    couplings: tuple[int, ...] = (1, 2, 4, 8)
    """Channels that share a code there, of as many bits."""
    tensor_rows: int = 16384
    """Vectors of 16 channels to learn from; four times as many are scored."""
    tensor_lloyd: int = 25
    tensor_seeds: int = 5
    seeds: int = 3
    """Of each model."""
    size: Size = DEFAULT


@dataclasses.dataclass(frozen=True)
class Cell:
    """One code: on which model or tensor, learned with which weights, behind how many exact tokens."""

    fixture: str
    method: str
    weights: Weights | None
    window: int | None
    correlation: float | None


def cells(config: Config) -> list[Cell]:
    """All codes."""
    found = []
    for fixture in config.models:
        text = fixture != "recall"
        coupled = [(name, weights) for name in config.one_bit for weights in ("fisher", "uniform")]
        coupled += [(name, "fisher") for name in config.more_bits if text]
        plain = [name for name in config.baselines if text or name == "int2"]
        at_once = [*coupled, *((name, weights_of(name)) for name in ("full", *plain))]
        found += [Cell(fixture, name, weights, _window(config, fixture, name, 0), None) for name, weights in at_once]
        if text:
            found += [
                Cell(fixture, name, weights_of(name), _window(config, fixture, name, config.window), None)
                for name in config.windowed
            ]
    for correlation in config.correlations:
        names = (f"coupled:{channels}c{channels}b" for channels in config.couplings)
        found += [Cell(TENSORS, name, "uniform", None, correlation) for name in names]
    return found


def weights_of(method: str) -> Weights | None:
    """Of k-means, where a method learns anything and nothing else is asked for."""
    return "fisher" if method.startswith(("coupled", "kvquant")) else None


def _window(config: Config, fixture: str, method: str, window: int) -> int:
    return layers_of(config, fixture, method, window)[0].window


def layers_of(config: Config, fixture: str, method: str, window: int) -> tuple[LayerSpec, ...]:
    """The cache of a code behind a window."""
    common = dataclasses.replace(fixtures.setting(config.size, fixture, "decode"), window=window)
    return contender(method, common)


@functools.lru_cache(maxsize=4)
def scores(config: Config, cell: Cell) -> list[dict[str, float | int | None]]:
    """All seeds of a code on a model, which share a program."""
    assert cell.window is not None, "the cell is of a model"
    layers = layers_of(config, cell.fixture, cell.method, cell.window)
    found = fixtures.scores(
        config.size, cell.fixture, "decode", layers, config.seeds, fisher=cell.weights != "uniform"
    )  # fmt: skip
    stored = row_bytes(decoder_model(fixtures.setting(config.size, cell.fixture, "decode").decoder), layers).allocated
    values = sum(2 * layer.kv_heads * layer.head_dim * layer.slots for layer in layers)
    bits = 8 * (stored["payload"] + stored["scales"]) / values
    return [row | {"bits": bits, "mse": None, "limit": None} for row in found]


# --- Gaussian tensors -------------------------------------------------------------------------------

CHANNELS = 16


def correlated(correlation: float | int, rows: int, seed: int) -> Float[np.ndarray, "{rows} 16"]:
    """Gaussian channels of variance 1 whose neighbours are correlated, AR(1); seeds share their noise over the
    correlations."""
    noise = np.random.default_rng([seed, rows]).normal(size=(rows, CHANNELS))
    x = [noise[:, 0]]
    for place in range(1, CHANNELS):
        x.append(correlation * x[-1] + np.sqrt(1 - correlation**2) * noise[:, place])
    return np.stack(x, axis=1).astype(np.float32)


def tensor_scores(config: Config, cell: Cell, seed: int) -> dict[str, float | int | None]:
    """Held-out squared error a value of a code on a Gaussian tensor, and the least that theory allows it."""
    assert cell.correlation is not None, "the cell is of a tensor"
    codec = Coupled.named(cell.method.removeprefix("coupled:"))
    x = correlated(cell.correlation, 5 * config.tensor_rows, seed)
    train, test = x[: config.tensor_rows], x[config.tensor_rows :]
    learned = learn_coupled(jax.random.key(seed), codec, train[:, None], iterations=config.tensor_lloyd)
    book = learned["codebook"][0]
    decoded = np.asarray(product_decode(product_encode(jax.numpy.asarray(test), book), book), np.float64)
    limit = shannon_limit(cell.correlation, codec.channels, codec.bits / codec.channels)
    return {"mse": float(((decoded - test) ** 2).mean()), "limit": limit, "bits": codec.bits / codec.channels}


def shannon_limit(correlation: float | int, channels: int, bits: float | int) -> float:
    """Squared error a value below which no code of ``bits`` a value gets, however many vectors of ``channels``
    AR(1) channels it sees at once: reverse water-filling over the eigenvalues of their covariance (Kolmogorov 1956).

    An eigenvalue above the level theta keeps an error of theta at ``log2(eigenvalue / theta) / 2`` bits, one below it
    gets no bits and keeps its own variance.
    """
    places = np.arange(channels)
    variances = np.sort(np.linalg.eigvalsh(float(correlation) ** np.abs(places[:, None] - places)))[::-1]
    level = 0.0
    for kept in range(channels, 0, -1):  # of the largest variances; the first level that is below all of them
        level = float(np.exp2(np.log2(np.maximum(variances[:kept], 1e-300)).mean() - 2 * bits * channels / kept))
        if level <= variances[kept - 1]:
            break
    return float(np.minimum(level, variances).mean())
