"""The cells of `experiments.kvcache.kivi`: which code on which model or Gaussian tensor, and what it scores.

``planted`` is the model ``f1`` with keys that are as unbalanced as those of large models, and the same function: some
key channels are ten times as large, and the queries' are a tenth. Both members of a pair that RoPE turns are scaled
together, so that the two factors cancel at every distance.
"""

import dataclasses
import functools
import hashlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.kvcache import fixtures, harness, language_models
from experiments.kvcache.contenders import contender
from experiments.kvcache.coupled_cells import CHANNELS, TENSORS, Weights, correlated, weights_of
from experiments.kvcache.fixtures import DEFAULT, Size
from hashml.accounting import stored_bytes
from hashml.kvcache.calibration import collect, learn_nonuniform
from hashml.kvcache.contract import Codec, CodecState, Space
from hashml.kvcache.integer import IntGroup
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.kvquant import NonUniformKeys, NonUniformValues
from hashml.kvcache.spec import LayerSpec, Rope
from hashml.kvcache.state import LayerTables
from hashml.models.decoder import DecoderConfig, Params, decoder_model
from hashml.models.rotary import Rotary

AnyArray = Array | np.ndarray
PLANTED = "planted"
"""The model ``f1`` with outlier channels in its keys."""
Outliers = Literal["none", "scaled", "shifted"]
"""Of a Gaussian tensor: some channels are ten times as large, or lie ten deviations off zero."""

AXES: dict[str, tuple[type[KiviKeys] | type[IntGroup], type[KiviKeys] | type[IntGroup]]] = {
    "kivi": (KiviKeys, IntGroup),
    "token": (IntGroup, IntGroup),
    "channel": (KiviKeys, KiviKeys),
    "swapped": (IntGroup, KiviKeys),
}
"""Codecs of keys and of values: `KiviKeys` has its scales per channel, over blocks of tokens, `IntGroup` per token,
over groups of channels."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Axes, windows, codes and tensors; the defaults are those of the claims."""

    models: tuple[str, ...] = ("f1", PLANTED, "stories")
    """On which axes are compared; the rest is measured on f1."""
    axes: tuple[str, ...] = tuple(AXES)
    bits: tuple[int, ...] = (2, 4)
    group: int = 32
    """Values that share a scale, along either axis; at most the width of a head."""
    window: int = 32
    """Newest tokens that are exact, R, and leave the window together, G, where axes are compared."""
    windows: tuple[int, ...] = (64, 128)
    """R of the residual part, with G as above and G = R."""
    nonuniform: tuple[str, ...] = ("kvquant:3", "kvquant:3o1", "kvquant:2", "kvquant:2o1", "kvquant:1", "kvquant:1o1")
    """KVQuant, every token coded at once."""
    uniform: tuple[str, ...] = ("kvquant:2", "kvquant:1")
    """Also without Fisher weights."""
    rotated: tuple[str, ...] = ("kvquant:3", "kvquant:2")
    """Also with keys that are coded after rotation."""
    beside: tuple[str, ...] = ("coupled:4c8b", "coupled:8c8b", "token:2")
    """Other codes of every token at once."""
    windowed: tuple[str, ...] = ("kvquant:2", "kvquant:3o1")
    """Also behind KIVI's window."""
    other_lloyd: int = 100
    """Iterations of k-means that are compared with those of ``size``."""
    lloyd_methods: tuple[str, ...] = ("coupled:4c8b", "coupled:8c8b")
    pairs: int = 2
    """Of channels that are planted in the keys of a head."""
    factor: float | int = 10
    """By which planted channels are larger."""
    correlations: tuple[float, ...] = (0.0, 0.9)
    """Of neighbouring channels of the Gaussian tensors."""
    outliers: tuple[Outliers, ...] = ("none", "scaled", "shifted")
    tensor_rows: int = 4096
    """Tokens of 16 channels."""
    tensor_seeds: int = 5
    seeds: int = 3
    """Of each model."""
    size: Size = DEFAULT


@dataclasses.dataclass(frozen=True)
class Cell:
    """One code: on which model or tensor, behind how many exact tokens, learned how."""

    fixture: str
    method: str
    window: int | None = None
    flush: int | None = None
    weights: Weights | None = None
    rotated: bool = False
    """Whether non-uniform codes are of rotated keys."""
    iterations: int | None = None
    """Of k-means."""
    correlation: float | None = None
    outliers: Outliers | None = None


def cells(config: Config) -> list[Cell]:
    """All codes, each once."""
    block, found = config.window, []
    for fixture in config.models:
        found.append(Cell(fixture, "full", 0, 1))
        found += [Cell(fixture, f"{axes}:{bits}", block, block) for bits in config.bits for axes in config.axes]
    for window in config.windows:
        found += [Cell("f1", f"kivi:{min(config.bits)}", window, flush) for flush in (block, window)]
    usual = config.size.lloyd
    found += [learned(name, 0, 1, usual) for name in (*config.nonuniform, *config.beside)]
    found += [dataclasses.replace(learned(name, 0, 1, usual), weights="uniform") for name in config.uniform]
    found += [dataclasses.replace(learned(name, 0, 1, usual), rotated=True) for name in config.rotated]
    found += [learned(name, block, block, usual) for name in config.windowed]
    found += [learned(name, 0, 1, config.other_lloyd) for name in config.lloyd_methods]
    for outliers in config.outliers:
        found += [
            Cell(TENSORS, f"{axis}:{bits}", correlation=correlation, outliers=outliers)
            for correlation in config.correlations for bits in config.bits for axis in ("channel", "token")
        ]  # fmt: skip
    return list(dict.fromkeys(found))


def learned(method: str, window: int, flush: int, iterations: int) -> Cell:
    """A code on f1, learned as all experiments do it, if it learns anything."""
    weights = weights_of(method)
    return Cell("f1", method, window, flush, weights, iterations=iterations if weights else None)


def base_of(fixture: str) -> str:
    """The trained model behind a fixture."""
    return "f1" if fixture == PLANTED else fixture


def layers_of(config: Config, cell: Cell) -> tuple[LayerSpec, ...]:
    """The cache of a code on a model."""
    assert cell.window is not None, "the cell is of a model"
    assert cell.flush is not None, "the cell is of a model"
    common = dataclasses.replace(fixtures.setting(config.size, base_of(cell.fixture), "decode"), window=0)
    keys, values, rope = _codecs(config, cell, common.decoder.head_dim)
    if keys is None or values is None:
        found = contender(cell.method, common)[0]
        keys, values, rope = found.key_codec, found.value_codec, found.rope
    slots = -(-max(common.tokens - cell.window, 1) // cell.flush) * cell.flush
    layer = dataclasses.replace(
        contender("full", common)[0], key_codec=keys, value_codec=values, rope=rope, window=cell.window,
        flush=cell.flush, slots=slots
    )  # fmt: skip
    return (layer,) * common.decoder.layers


def _codecs(config: Config, cell: Cell, width: int) -> tuple[Codec | None, Codec | None, Rope]:
    """Codecs that no name of the library stands for."""
    kind, _, option = cell.method.partition(":")
    if kind in AXES:
        group = min(config.group, width)
        keys, values = (codec(int(option), group) for codec in AXES[kind])
        return keys, values, "write"
    if cell.rotated:
        bits, _, outliers = option.partition("o")
        return RotatedKeys(int(bits), int(outliers or 0)), NonUniformValues(int(bits), int(outliers or 0)), "write"
    return None, None, "write"


@functools.lru_cache(maxsize=4)
def scores(config: Config, cell: Cell) -> list[dict[str, float | int | None]]:
    """All seeds of a code on a model, which share a program: loss after the middle of the sequences, bits of codes
    and scales for each value, bytes of all the cache for each token seen, bytes of what is learned."""
    size = config.size if cell.iterations is None else dataclasses.replace(config.size, lloyd=cell.iterations)
    base, layers = base_of(cell.fixture), layers_of(config, cell)
    model = decoder_model(fixtures.setting(size, base, "decode").decoder)
    models = fixtures.fed_models(size, base, layers, config.seeds, fisher=cell.weights != "uniform")
    for seed, one in enumerate(models):
        if cell.fixture == PLANTED:
            pairs = planted_pairs(config, model.config, seed)
            models[seed] = one._replace(params=planted(one.params, model.config, pairs, config.factor))
        if isinstance(codec := layers[0].key_codec, RotatedKeys):
            models[seed] = one._replace(tables=rotated_tables(size, base, seed, codec))
    bits = [value_bits(codec, layers[0]) for codec in (layers[0].key_codec, layers[0].value_codec)]
    found = []
    for seed, (one, scored) in enumerate(zip(models, harness.decode_all(model, layers, models), strict=True)):
        row = fixtures.row_of(size, base, "decode", layers, seed, one, scored)
        kept = {name: row[name] for name in ("nll", "bytes_per_token", "table_bytes")}
        found.append({**kept, "bits": sum(bits) / 2, "error": None, "mse": None})
    return found


def value_bits(codec: Codec, layer: LayerSpec) -> float:
    """Bits stored for each value: codes, scales, and outliers with their channels."""
    state = jax.eval_shape(lambda: codec.init(1, layer.kv_heads, layer.slots, layer.head_dim, jnp.dtype(layer.dtype)))
    return 8 * stored_bytes(state.slots) / (layer.kv_heads * layer.slots * layer.head_dim)


# --- planted channels ---------------------------------------------------------------------------------


def planted_pairs(config: Config, decoder: DecoderConfig, seed: int) -> Int[np.ndarray, "L H p"]:
    """The pairs of channels that are scaled, others in every layer and head."""
    rng = np.random.default_rng([seed, decoder.layers, decoder.kv_heads])
    heads = [rng.choice(decoder.head_dim // 2, config.pairs, replace=False)
             for _ in range(decoder.layers * decoder.kv_heads)]  # fmt: skip
    return np.array(heads).reshape(decoder.layers, decoder.kv_heads, config.pairs)


def planted(params: Params, decoder: DecoderConfig, pairs: Int[np.ndarray, "L H p"], factor: float | int) -> Params:
    """Parameters of the same function whose keys are ``factor`` times as large in these pairs of channels.

    Args:
        params: of the model.
        decoder: its configuration, with a rotation.
        pairs: for each layer and key head, as RoPE counts them.
        factor: of keys; queries are divided by it.
    """
    assert decoder.rotary is not None, "pairs are those of a rotation"
    width = decoder.head_dim
    halves = decoder.rotary.pairs == "half"
    channels = np.concatenate([pairs, pairs + width // 2] if halves else [2 * pairs, 2 * pairs + 1], axis=-1)
    keys = np.ones((decoder.layers, decoder.kv_heads, width), np.float32)
    np.put_along_axis(keys, channels, np.float32(factor), axis=-1)
    queries = np.repeat(1 / keys, decoder.heads // decoder.kv_heads, axis=1)
    layers = dict(params["layers"])
    for name, by in (("key", keys), ("query", queries)):
        line = by.reshape(decoder.layers, -1)
        layers[name] = layers[name] * line[:, None]
        if decoder.qkv_bias:
            layers[f"{name}_bias"] = layers[f"{name}_bias"] * line
    return {**params, "layers": layers}


# --- non-uniform codes of rotated keys ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RotatedKeys(NonUniformKeys):
    """What KVQuant advises against: the same codes, of keys after rotation."""

    @property
    def space(self) -> Space:
        return "post_rope"


def rotated_tables(size: Size, fixture: str, seed: int, codec: RotatedKeys) -> tuple[LayerTables, ...]:
    """Tables whose keys' part is learned from rotated keys; the values' is that of `fixtures.tables`."""
    config = fixtures.setting(size, fixture, "decode").decoder
    plain = NonUniformKeys(codec.bits, codec.outliers), NonUniformValues(codec.bits, codec.outliers)
    known = fixtures.tables(size, fixture, seed, plain)
    params, text = fixtures.params(size, fixture, seed), fixtures.calibration_text(size, fixture, seed)
    rotary = config.rotary
    assert rotary is not None, "there is a rotation"

    def make() -> Params:
        found = {}
        for index, layer in enumerate(collect(decoder_model(config), params, [text])):
            # A rotation keeps lengths: the gradient of a rotated key is the key's gradient, rotated.
            keys, gradients = (rotated(rotary, x, text.shape[1]) for x in (layer.keys, layer.key_gradients))
            key = jax.random.fold_in(jax.random.key(seed), 2 * index)
            found[f"layer{index}"] = learn_nonuniform(key, codec, keys, gradients, iterations=size.lloyd)
        return found

    model = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))).hexdigest()
    geometry: dict[str, Any] = {"codec": repr(codec), "model": model, "iterations": size.lloyd}
    found = language_models.kept(f"{fixture}-tables", geometry | {"sequences": text.shape[0]}, seed, make)
    return tuple(LayerTables(found[f"layer{i}"], layer.values) for i, layer in enumerate(known))


def rotated(rotary: Rotary, x: Float[AnyArray, "N H D"], length: int) -> Float[Array, "N H D"]:
    """Tokens of sequences of ``length``, one after the other, turned to their places."""
    places = jnp.arange(x.shape[0]) % length
    return rotary.rotate(jnp.asarray(x).swapaxes(0, 1)[None], places[None, None])[0].swapaxes(0, 1)


# --- Gaussian tensors -----------------------------------------------------------------------------------

OUTLIER_CHANNELS = (3, 10)
"""Of 16."""


def tensor_scores(config: Config, cell: Cell, seed: int) -> dict[str, float | int | None]:
    """Squared error a value of a code on a Gaussian tensor, and the same in units of each channel's variance: what
    is left of it where queries are as much smaller as keys are larger."""
    assert cell.correlation is not None, "the cell is of a tensor"
    assert cell.outliers is not None, "the cell is of a tensor"
    axis, _, bits = cell.method.partition(":")
    codec = {"channel": KiviKeys, "token": IntGroup}[axis](int(bits), CHANNELS)
    x, deviation = tensor(cell.correlation, cell.outliers, config.tensor_rows, seed, config.factor)
    decoded = np.asarray(_decoded(codec, x[None, None]), np.float64)[0, 0]
    slots = 2 * CHANNELS
    stored = jax.eval_shape(lambda: codec.init(1, 1, slots, CHANNELS, jnp.float16).slots)
    squared = (decoded - x) ** 2
    return {
        "error": float((squared / deviation**2).mean()),
        "mse": float(squared.mean()),
        "bits": 8 * stored_bytes(stored) / (slots * CHANNELS),
    }


def tensor(
    correlation: float | int, outliers: Outliers, rows: int, seed: int, factor: float | int
) -> tuple[Float[np.ndarray, "{rows} 16"], Float[np.ndarray, " 16"]]:
    """Gaussian tokens, and the deviation of their channels; all kinds of outliers share their noise."""
    x, deviation = correlated(correlation, rows, seed), np.ones(CHANNELS, np.float32)
    planted = list(OUTLIER_CHANNELS)
    if outliers == "scaled":
        deviation[planted] = factor
    elif outliers == "shifted":
        x[:, planted] += factor
    return x * deviation, deviation


@functools.partial(jax.jit, static_argnames="codec")
def _decoded(codec: KiviKeys | IntGroup, x: Float[AnyArray, "1 1 N D"]) -> Float[Array, "1 1 N D"]:
    rows = codec.quantise({}, {}, jnp.asarray(x), jnp.ones(x.shape[:3], bool))
    return codec.decode({}, CodecState(rows, {}))
