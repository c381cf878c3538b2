"""A compressed cache where `hashml.models.generation` wants an engine: by its name, in one call.

cache = engine("scissorhands@0.2+int4", model, params, capacity=1024)
tokens = generate(model, params, prompts, 200, cache=cache)
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from hashml.kvcache.calibration import Progress
from hashml.kvcache.methods import cache_layers
from hashml.kvcache.serving import decode_step, prefill
from hashml.kvcache.spec import LayerSpec, batch_spec
from hashml.kvcache.state import Cache, LayerTables
from hashml.kvcache.tables import learn_tables, needs_tables
from hashml.models.decoder import DecoderModel


@dataclasses.dataclass(frozen=True)
class CacheEngine:
    """A decoder on a cache: the functions that `generate` and `stream` call.

    Attributes:
        prefill, step: as `hashml.models.generation.Engine` has them; `step` also takes ``active``, bool ``[B]``, the
            rows that go on, so that those which have ended take no page of the others.
        capacity: most tokens of a row, prompt and generated.
        layers, tables: of the cache.
    """

    prefill: Callable[[Any, Array, Array], tuple[Array, Cache]]
    step: Callable[..., tuple[Array, Cache]]
    capacity: int
    layers: tuple[LayerSpec, ...]
    tables: tuple[LayerTables, ...]


def engine(
    name: str,
    model: DecoderModel,
    params: Any,
    capacity: int,
    *,
    sequences: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    sinks: int = 0,
    key: Array | None = None,
    progress: Progress | None = None,
) -> CacheEngine:
    """The cache of a name such as ``"h2o@0.2"`` or ``"coupled:8c8b"``; see `hashml.kvcache.methods`.

    Args:
        name: policy, codec and budget.
        model, params: the decoder; its params are read only where codecs learn.
        capacity: most tokens of a row.
        sequences: token arrays that codecs learn from, or a function that makes them; only called when needed.
        sinks: first tokens that are never dropped.
        key: of k-means and of a policy's noise.
        progress: of learning.

    Raises:
        ValueError: for names or combinations that cannot be, or codecs that learn and no ``sequences``.
    """
    layers = cache_layers(name, model.config, capacity, sinks=sinks)
    if needs_tables(layers):
        if sequences is None:
            raise ValueError(f"cache is {name!r}; its codec learns from text, and sequences is None")
        text = sequences() if callable(sequences) else sequences
        tables = learn_tables(layers, model, params, text, key=key, progress=progress)
    else:
        tables = (LayerTables(),) * len(layers)
    return cache_engine(model, layers, tables, capacity=capacity, key=key)


def cache_engine(
    model: DecoderModel,
    layers: Sequence[LayerSpec],
    tables: Sequence[LayerTables] | None = None,
    *,
    capacity: int,
    key: Array | None = None,
) -> CacheEngine:
    """An engine of layers that are given; ``pages`` of a paged one are those of a row.

    Args:
        model: the decoder.
        layers: of the cache.
        tables: what their codecs have learned.
        capacity: most tokens of a row that a user may ask for.
        key: of a policy's noise.

    Raises:
        ValueError: for a layer that keeps all tokens and has room for fewer than ``capacity``.
    """
    for layer in layers:
        needed = capacity if layer.sliding_window is None else min(capacity, layer.sliding_window)
        if layer.policy.append_only and needed > layer.holds:
            raise ValueError(f"capacity is {capacity}; a layer of {layer.slots} slots, a window of {layer.window} "
                             f"and a flush of {layer.flush} keeps all of at most {layer.holds} tokens")  # fmt: skip
    noise = jax.random.key(0) if key is None else key
    known = (LayerTables(),) * len(layers) if tables is None else tuple(tables)

    def begin(params: Any, tokens: Array, positions: Array) -> tuple[Array, Cache]:
        return prefill(model, batch_spec(layers, tokens.shape[0]), known, params, tokens, positions, noise)

    def step(params: Any, cache: Cache, token: Array, active: Array | None = None) -> tuple[Array, Cache]:
        spec = batch_spec(layers, token.shape[0])
        return decode_step(model, spec, known, params, cache, token, active=active)

    return CacheEngine(begin, step, capacity, tuple(layers), known)
