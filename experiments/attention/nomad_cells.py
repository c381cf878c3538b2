"""The cells of `experiments.attention.nomad`: caches of a model whose keys are codes, and the errors of scores."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.kvcache import fixtures, harness
from experiments.kvcache.think_cells import rotated
from hashml.attention.nomad import encode_keys, lookup_tables, nomad_codebooks, nomad_scores, pack_blocks
from hashml.attention.nomad_keys import NomadKeys
from hashml.coding import code_dtype, pack, packed_size, product_decode, product_encode, unpack
from hashml.kvcache import Codec, CodecState, Coupled, Dense, IntGroup, KeepAll, LayerSpec, LayerTables
from hashml.kvcache.calibration import learn_coupled
from hashml.models.decoder import decoder_model

AnyArray = Array | np.ndarray
SIZE = dataclasses.replace(fixtures.DEFAULT, lloyd=25)
COORDINATES = 64
"""Of a key in the error budget, which is the card's."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cache: ``channels`` are those of a code, where there are codes."""

    fixture: str
    method: str
    channels: int | None = None


CONTROLS: dict[str, int | None] = {"float": 1, "shared": 1, "uniform": 1, "pq256": 2, "int4": None}
"""What stands on the first model alone, with the coordinates of a code."""


def cells(models: tuple[str, ...], channels: tuple[int, ...], controls: tuple[str, ...]) -> list[Cell]:
    """All caches; random centroids stand on every model."""
    found = []
    for fixture in models:
        found.append(Cell(fixture, "full"))
        found += [Cell(fixture, "nomad", count) for count in channels]
        found.append(Cell(fixture, "random", 1))
        if fixture == models[0]:
            found += [Cell(fixture, name, CONTROLS[name]) for name in controls]
    return found


# --- codecs ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ProductKeys(NomadKeys):
    """A control: codes of any number of bits whose centroids are multiplied with the query, without tables.

    Attributes:
        bits: of a code.
    """

    bits: int = 4

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        row = packed_size(head_dim // self.channels, self.bits)
        return CodecState({"code": jnp.zeros((batch, heads, slots, row), jnp.uint8)}, {})

    def quantise(self, params: Any, fixed: dict[str, Array], x: Array, valid: Array) -> dict[str, Array]:
        del fixed, valid
        codes = jax.vmap(jax.vmap(product_encode), in_axes=(0, None))(x, params["codebook"])
        return {"code": pack(codes.astype(code_dtype(self.bits)), self.bits)}

    def decode(self, params: Any, state: CodecState) -> Float[Array, "B H C D"]:
        book = params["codebook"].astype(jnp.float32)
        codes = unpack(state.slots["code"], self.bits, book.shape[1]).astype(jnp.int32)
        return jax.vmap(jax.vmap(product_decode), in_axes=(0, None))(codes, book)

    def logits(self, params: Any, state: CodecState, q: Array, rotate: Any) -> Float[Array, "B H J n C"]:
        return Codec.logits(self, params, state, q, rotate)


def layers_of(size: fixtures.Size, cell: Cell) -> tuple[LayerSpec, ...]:
    """Every token is encoded as it comes: no window of exact ones, no policy. Values are exact float16."""
    common = fixtures.setting(size, cell.fixture, "decode")
    decoder = common.decoder
    codecs: dict[str, Any] = {
        "full": Dense,
        "int4": lambda: IntGroup(4, group=decoder.head_dim),
        "nomad": lambda: NomadKeys(cell.channels or 1),
        "pq256": lambda: ProductKeys(cell.channels or 1, bits=8),
    }
    make = codecs.get(cell.method, codecs["nomad"])
    if cell.method == "float":
        make = functools.partial(ProductKeys, cell.channels or 1)
    layer = LayerSpec(
        kv_heads=decoder.kv_heads,
        query_heads=decoder.heads,
        head_dim=decoder.head_dim,
        slots=common.tokens,
        window=0,
        key_codec=make(),
        value_codec=Dense(),
        policy=KeepAll(),
        rotary=decoder.rotary,
        rope="none" if decoder.rotary is None else "write",
        sliding_window=decoder.sliding_window,
        dtype=common.dtype,
    )
    return (layer,) * decoder.layers


# --- codebooks ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def calibration_keys(size: fixtures.Size, fixture: str, seed: int) -> Float[np.ndarray, "L n H D"]:
    """Keys of training text as the cache holds them, after rotation; of the model of this seed."""
    text = fixtures.calibration_text(size, fixture, seed)
    model = decoder_model(fixtures.setting(size, fixture, "decode").decoder)
    _, keys = rotated(model, fixtures.params(size, fixture, seed), text)
    layers, _, heads, _, width = keys.shape
    return np.asarray(keys.transpose(0, 1, 3, 2, 4), np.float32).reshape(layers, -1, heads, width)


@functools.partial(jax.jit, static_argnames=("channels", "iterations"))
def _books(key: Array, keys: Array, *, channels: int, iterations: int) -> Array:
    return nomad_codebooks(key, keys, channels=channels, iterations=iterations)


def tables(size: fixtures.Size, cell: Cell, seed: int) -> tuple[LayerTables, ...]:
    """The codebooks of a cell, of the model and the calibration of this seed."""
    decoder = fixtures.setting(size, cell.fixture, "decode").decoder
    if cell.method in ("full", "int4"):
        return (LayerTables(),) * decoder.layers
    learned = dataclasses.replace(cell, method="nomad") if cell.method == "float" else cell
    return tuple(LayerTables(keys={"codebook": book}) for book in _codebooks(size, learned, seed))


@functools.lru_cache(maxsize=32)
def _codebooks(size: fixtures.Size, cell: Cell, seed: int) -> tuple[Array, ...]:
    """Of every layer."""
    layers = enumerate(calibration_keys(size, cell.fixture, seed))
    return tuple(codebook(jax.random.fold_in(jax.random.key(seed), n), keys, cell, size.lloyd) for n, keys in layers)


def codebook(key: Array, keys: Float[AnyArray, "n H D"], cell: Cell, iterations: int) -> Float[Array, "H S R c"]:
    """What a cell codes keys with.

    ``nomad`` learns by k-means for each head, ``shared`` once for all heads of a layer; ``uniform`` has
    16 equal steps from the smallest to the largest value of each channel, which is int4 with a fixed range;
    ``random`` takes 16 keys as they are.
    """
    count, heads, width = keys.shape
    channels = cell.channels or 1
    if cell.method == "pq256":
        chosen = np.random.default_rng(0).permutation(count)[:PQ_POINTS]
        few = min(iterations, fixtures.DEFAULT.lloyd)
        return learn_coupled(key, Coupled(channels, 8), keys[chosen], iterations=few)["codebook"]
    if cell.method == "uniform":
        low, high = (np.asarray(of(np.asarray(keys), axis=0)) for of in (np.min, np.max))
        return jnp.asarray(np.moveaxis(np.linspace(low, high, 16), 0, -1)[..., None], jnp.float32)
    if cell.method == "random":
        few = jnp.asarray(keys)[jax.random.choice(key, count, (16,), replace=False)]
        return few.reshape(16, heads, width // channels, channels).transpose(1, 2, 0, 3)
    if cell.method == "shared":
        together = jnp.asarray(keys).reshape(count * heads, 1, width)
        return jnp.repeat(_books(key, together, channels=channels, iterations=iterations), heads, axis=0)
    return _books(key, jnp.asarray(keys), channels=channels, iterations=iterations)


PQ_POINTS = 4096
"""Keys that k-means with 256 centroids sees, as many as with 16; it makes the iterations of other codebooks here."""


# --- what a cache scores --------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def scores(size: fixtures.Size, cell: Cell, seeds: int) -> list[dict[str, float | None]]:
    """All seeds of a cache, which share a program: token by token, every key a code from the start."""
    common = fixtures.setting(size, cell.fixture, "decode")
    model, layers = decoder_model(common.decoder), layers_of(size, cell)
    fed = [fixtures.texts(size, cell.fixture, seed if cell.fixture == "stories" else 0) for seed in range(seeds)]
    models = [
        harness.Model(
            fixtures.params(size, cell.fixture, seed), tables(size, cell, seed), jax.random.key(seed), tokens, targets
        )
        for seed, (tokens, targets, _) in enumerate(fed)
    ]
    key_bytes = key_bytes_of(layers[0])
    rows = []
    for scored, (_, targets, places) in zip(harness.decode_all(model, layers, models), fed, strict=True):
        rows.append(
            {
                "nll": None if places else harness.second_half_nll(scored, targets),
                "accuracy": harness.share_correct(scored, places["accuracy"]) if places else None,
                "key_bytes": key_bytes,
            }
        )
    return rows


def key_bytes_of(layer: LayerSpec) -> float:
    """Bytes of a key of one head, with its scales; codebooks apart."""
    codec, slots = layer.key_codec, layer.slots
    state = jax.eval_shape(lambda: codec.init(1, 1, slots, layer.head_dim, jnp.dtype(layer.dtype)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / slots


# --- the error budget -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("channels", "points", "iterations"))
def budget(key: Array, *, channels: int, points: int, iterations: int) -> tuple[Array, Array, Array]:
    """``(key_mse, score_error, table_error)`` of independent Gaussian keys and queries, relative to their variance
    and to the deviation of exact scores; the last is what rounding the tables adds, on its own."""
    of_learning, of_keys, of_queries, seed = jax.random.split(key, 4)
    learning = jax.random.normal(of_learning, (points, 1, COORDINATES))
    keys = jax.random.normal(of_keys, (1, 1, points, COORDINATES))
    queries = jax.random.normal(of_queries, (1, 64, COORDINATES))
    book = nomad_codebooks(seed, learning, channels=channels, iterations=iterations)
    codes = encode_keys(keys, book)
    decoded = product_decode(codes[0, 0].astype(jnp.int32), book[0])
    exact = queries[0] @ keys[0, 0].T
    # With float tables a score is a product with the decoded key (tests/attention/test_nomad.py).
    coded = jnp.einsum("jsr,nsr->jn", lookup_tables(queries, book)[0, 0], jax.nn.one_hot(codes[0, 0], 16))
    rounded = nomad_scores(queries, pack_blocks(codes), book, implementation="xla")[0, 0, :, :points]

    def relative(error: Array) -> Array:
        return jnp.sqrt((error**2).mean()) / exact.std()

    key_mse = ((decoded - keys[0, 0]) ** 2).mean() / (keys**2).mean()
    return key_mse, relative(coded - exact), relative(rounded - coded)
