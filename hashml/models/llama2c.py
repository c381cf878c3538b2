"""Decoders in the legacy file of llama2.c (Karpathy 2023, github.com/karpathy/llama2.c, export version 0).

    7 x int32     features, hidden, layers, heads, kv heads, vocabulary, context; vocabulary < 0: a head of its own
    float32       embedding, attention norms, Wq, Wk, Wv, Wo, mlp norms, W1 (gate), W2 (down), W3 (up), last norm,
                  cos and sin [context, D / 2], which are recomputed here, and the head if it is its own

All is little-endian; each kernel is ``[out, in]``, stacked over layers. Pairs of the rotation are interleaved, its
base is 10000, and 1e-5 is added under the root of the norms.
"""

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from hashml.exchange import ExchangeError
from hashml.models.decoder import DecoderConfig, Params
from hashml.models.folder_tensors import narrowed
from hashml.models.rotary import Rotary

_FIELDS = ("features", "hidden", "layers", "heads", "kv_heads", "vocabulary", "context")
_HEADER = struct.Struct("<7i")
_LATER_VERSIONS = 0x616B3432
"""The magic number, "ak42", that later exports of llama2.c begin with."""


def load_llama2c(path: str | os.PathLike[str], dtype: DTypeLike = jnp.float32) -> tuple[Params, DecoderConfig]:
    """Params and configuration of a llama2.c file.

    Raises:
        ExchangeError: if the file is of another format or version, has not the size that its header asks for, or
            holds weights that are not finite.
        FileNotFoundError: if there is no such file.
        ValueError: for weights that exceed ``dtype``.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        config = _config(path, file.read(_HEADER.size))
        layout = list(_layout(config))
        wanted = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in layout)
        if size != wanted:
            raise ExchangeError(
                f"{path} has {size} bytes; a llama2.c file with its header ({_said(config)}) has {wanted}: "
                + ("it was cut short" if size < wanted else "something follows the model")
            )
        found = {name: np.fromfile(file, "<f4", math.prod(shape)).reshape(shape) for name, shape in layout}
    # [out, in] there, [in, out] here
    kernels = ("query", "key", "value", "output", "gate", "up", "down", "head")
    arrays = {}
    for name, array in found.items():
        if name not in ("cos", "sin"):
            host = narrowed(array, jnp.dtype(dtype), f"{path}: array {name!r}")
            arrays[name] = jnp.asarray(np.swapaxes(host, -1, -2) if name in kernels else host)
    params: dict[str, Any] = {name: arrays.pop(name) for name in ("embedding", "norm", "head") if name in arrays}
    return params | {"layers": arrays}, config


def _config(path: str | os.PathLike[str], header: bytes) -> DecoderConfig:
    if header[:2] == b"PK":
        raise ExchangeError(f"{Path(path)} is a pickled checkpoint; allowed are safetensors and llama2.c files")
    if len(header) < _HEADER.size:
        raise ExchangeError(f"{path} has {len(header)} bytes; the header of a llama2.c file alone has {_HEADER.size}")
    values = _HEADER.unpack(header)
    if values[0] == _LATER_VERSIONS:
        raise ExchangeError(f"{path} is a later llama2.c export; allowed is version 0 (legacy)")
    sizes = dict(zip(_FIELDS, values, strict=True))
    tied, sizes["vocabulary"] = sizes["vocabulary"] > 0, abs(sizes["vocabulary"])
    d, heads = sizes["features"], sizes["heads"]
    # What bounds a size here keeps the sizes of damaged headers out of messages and sums.
    fits = all(0 < value < 2**24 for value in sizes.values())
    if not fits or d % heads or d // heads % 2 or heads % sizes["kv_heads"]:
        said = ", ".join(f"{name} {value}" for name, value in sizes.items())
        raise ExchangeError(
            f"{path} is no llama2.c file: its header reads {said}; sizes are positive, heads divides features "
            "into an even width, and kv_heads divides heads"
        )
    return DecoderConfig(
        **sizes,
        head_dim=d // heads,
        activation="silu",
        gated=True,
        norm_eps=1e-5,
        tied=tied,
        rotary=Rotary(10000.0, pairs="interleaved"),
    )


def _layout(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name here and shape there of each array, in the file's order."""
    d, count = config.features, config.layers
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    yield "embedding", (config.vocabulary, d)
    yield "attention_norm", (count, d)
    yield "query", (count, queries, d)
    yield "key", (count, keys, d)
    yield "value", (count, keys, d)
    yield "output", (count, d, queries)
    yield "mlp_norm", (count, d)
    yield "gate", (count, config.hidden, d)
    yield "down", (count, d, config.hidden)
    yield "up", (count, config.hidden, d)
    yield "norm", (d,)
    yield "cos", (config.context, config.head_dim // 2)
    yield "sin", (config.context, config.head_dim // 2)
    if not config.tied:
        yield "head", (config.vocabulary, d)


def _said(config: DecoderConfig) -> str:
    return ", ".join(f"{name} {getattr(config, name)}" for name in _FIELDS)
