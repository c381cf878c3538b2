"""What the codecs of a cache have learned: of which text, of which model, and in which file.

    tables = learn_tables(layers, model, params, sequences)          one `LayerTables` a layer
    save_tables("books.safetensors", tables, layers=layers, params=params)
    tables = load_tables("books.safetensors", layers=layers, params=params)

Codebooks and ranges belong to one model: those of another one fit by shape where it is as wide, and are noise. A file
therefore says the codecs, the heads and a fingerprint of the weights, and is refused where any of them differs.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hashml.exchange import load_module, save_module
from hashml.kvcache.calibration import TOKENS, Progress, calibrate_coupled, calibrate_nonuniform
from hashml.kvcache.contract import Codec
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.exact_first import ExactFirst
from hashml.kvcache.kvquant import NonUniformKeys, NonUniformValues
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerTables
from hashml.kvcache.think import ThinK
from hashml.models.decoder import DecoderModel

_SAMPLED = 1024
"""Values of an array that go into a fingerprint."""


def bare(codec: Codec) -> Codec:
    """The codec without what only chooses channels or tokens for it: the one that learns, if any does."""
    while isinstance(codec, ThinK | ExactFirst):
        codec = codec.inner
    return codec


def needs_tables(layers: Sequence[LayerSpec]) -> bool:
    """Whether codecs have to learn something first."""
    learning = (Coupled, NonUniformKeys, NonUniformValues)
    return any(
        isinstance(bare(codec), learning) for layer in layers for codec in (layer.key_codec, layer.value_codec)
    )


def learn_tables(
    layers: Sequence[LayerSpec],
    model: DecoderModel,
    params: Any,
    sequences: Iterable[Any],
    *,
    key: Array | None = None,
    tokens: int = TOKENS,
    progress: Progress | None = None,
) -> tuple[LayerTables, ...]:
    """What the codecs of layers learn from token sequences; nothing where they learn nothing.

    Args:
        layers: of one codec.
        model, params: the decoder.
        sequences: arrays of tokens ``[T]`` or ``[B, T]``, which may go on for ever.
        key: of k-means.
        tokens: no further array is taken when there are so many.
        progress: called with what is done and all there is to do.

    Raises:
        ValueError: for codecs of two kinds, or what `calibrate_coupled` and `calibrate_nonuniform` refuse.
    """
    if not needs_tables(layers):
        return (LayerTables(),) * len(layers)
    key = jax.random.key(0) if key is None else key
    codec, values = bare(layers[0].key_codec), bare(layers[0].value_codec)
    options: dict[str, Any] = {"tokens": tokens, "progress": progress}
    if isinstance(codec, Coupled) and isinstance(values, Coupled):
        return calibrate_coupled(key, model, params, sequences, codec, values, **options)
    if isinstance(codec, NonUniformKeys) and isinstance(values, NonUniformValues):
        return calibrate_nonuniform(key, model, params, sequences, codec, values, **options)
    raise ValueError(f"codecs are {codec} and {values}; keys and values must be of one kind to learn together")


def save_tables(
    path: str | os.PathLike[str],
    tables: Sequence[LayerTables],
    *,
    layers: Sequence[LayerSpec],
    params: Any,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes what the codecs of a model have learned, with a checksum, and whose it is.

    Args:
        path: of the file.
        tables: one entry a layer.
        layers: of the cache, all of the same codecs and heads.
        params: of the model that they were learned of.
        metadata: texts for a reader.

    Raises:
        ValueError: if there are no tables, or as many as there are no layers.
    """
    if len(tables) != len(layers):
        raise ValueError(f"tables has {len(tables)} entries; there are {len(layers)} layers")
    held = {
        str(index): {name: dict(part) for name, part in layer._asdict().items() if part}
        for index, layer in enumerate(tables)
    }
    if not any(held.values()):
        raise ValueError("tables hold no array; codecs that learn nothing need no file")
    arrays = {index: layer for index, layer in held.items() if layer}
    save_module(path, arrays, geometry=_geometry(layers, params), metadata=metadata)


def load_tables(path: str | os.PathLike[str], *, layers: Sequence[LayerSpec], params: Any) -> tuple[LayerTables, ...]:
    """Reads what `save_tables` wrote.

    Args:
        path: of the file.
        layers: of the cache that it is for; policies, slots and windows may differ from those it was learned with.
        params: of the model, in any float type.

    Raises:
        hashml.exchange.ExchangeError: if the file is damaged, or of other codecs, heads or layers or another model.
        FileNotFoundError: if there is no such file.
    """
    found, _ = load_module(path, geometry=_geometry(layers, params))
    return tuple(LayerTables(**found.get(str(index), {})) for index in range(len(layers)))


def _geometry(layers: Sequence[LayerSpec], params: Any) -> dict[str, Any]:
    shapes = {
        (repr(bare(x.key_codec)), repr(bare(x.value_codec)), x.kv_heads, x.head_dim) for x in layers
    }  # fmt: skip
    if len(shapes) != 1:
        raise ValueError(f"layers are of {len(shapes)} kinds; tables are of one codec and one shape of heads")
    keys, values, heads, width = shapes.pop()
    return {"layers": len(layers), "key_codec": keys, "value_codec": values, "kv_heads": heads, "head_dim": width,
            "model": model_fingerprint(params)}  # fmt: skip


def model_fingerprint(params: Any) -> str:
    """Hexadecimal digits that tell models apart: of names, shapes and evenly spaced values of all arrays.

    Values are rounded to bfloat16, so that a checkpoint is the same in float32 and in bfloat16.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        line = leaf.reshape(-1)
        some = np.asarray(line[:: max(1, line.size // _SAMPLED)])
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode())
        digest.update(some.astype(np.float32).astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()[:32]
