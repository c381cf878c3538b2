"""Whole models in few bits a weight, a layer at a time (the loop of GPTQ, ICLR 2023, and of LeanQuant, ICLR 2025).

    x = embed(tokens)                                                  calibration tokens, all of them
    for layer:                                                         true-sequential
        for group in {query, key, value}, {output}, {gate, up}, {down}:
            H = calibrate(inputs of the group in layer(x))             earlier groups are quantised already
            Q = quantize_matrix(W, H)                                  every W of the group
        x = layer(x)                                                   quantised throughout

What is held at a time is one layer's x for all tokens, one layer's kernels and one Hessian, whatever the number of
layers: inputs of a group are computed again from x, a few sequences at once, where keeping them would take several
times the memory of x. Embedding, head, norms, biases and a pooler stay as they are.

The result is the model's own tree with a `hashml.weights.quantized_dense.QuantizedKernel` for every kernel of the
layers, stacked over these: `hashml.models.decoder.forward`, caches and `generate` take it as they take params; an
encoder takes it with ``dense=matmul``. With a ``folder`` each layer is written there when it is done, beside its
place and then moved: a run that was killed goes on after it, and ends with the same bits.
"""

import functools
import hashlib
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from hashml.models import decoder, encoder
from hashml.models.decoder import DecoderConfig
from hashml.models.encoder import EncoderConfig
from hashml.models.exact_attention import causal_attention
from hashml.weights.calibration import AnyArray, Hessian, calibrate, proxy_loss
from hashml.weights.quantized import QuantizationSpec, QuantizedMatrix, dequantize, quantize_matrix
from hashml.weights.quantized_dense import QuantizedKernel, as_kernel
from hashml.weights.quantized_layers import FinishedLayers

Config = DecoderConfig | EncoderConfig
Params = dict[str, Any]
Progress = Callable[[int, int], None]
"""Told ``(kernels done, kernels in all)`` after every group of kernels, and for every layer that was done before."""

_TOKENS = 4096
"""Calibration tokens that go through a layer at once."""


class QuantizedModel(NamedTuple):
    """A model with quantised kernels.

    Attributes:
        params: its tree.
        losses: of each kernel by layer, ``1/2 tr(D H D^T)`` without damping: the mean squared error of its outputs
            on the inputs that it met.
    """

    params: Params
    losses: dict[str, Float32[np.ndarray, " layers"]]


class GroupHessian(NamedTuple):
    """Kernels of a layer that read the same inputs, and the Hessian of these."""

    layer: int
    names: tuple[str, ...]
    hessian: Hessian


def quantize_decoder(
    params: Params,
    config: DecoderConfig,
    tokens: Int[AnyArray, "B T"],
    spec: QuantizationSpec,
    *,
    positions: Int[AnyArray, "B T"] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> QuantizedModel:
    """A decoder in few bits.

    Args:
        params: of the model.
        config: of the model.
        tokens: calibration sequences.
        spec: how each kernel is quantised.
        positions: as in `hashml.models.decoder.forward`; padding, at -1, is not calibrated on.
        folder: where finished layers are kept, and looked for; it may hold those of this very run alone.
        progress: told of every group of kernels.

    Raises:
        ValueError: without calibration data, for tokens outside the vocabulary, groups that do not divide a kernel's
            inputs, and kernels or activations that are NaN or infinite; the message names the layer.
        hashml.exchange.ExchangeError: if a file of ``folder`` is damaged, or of another run.
    """
    return _quantize(params, config, _batches(config, tokens, positions, "positions"), spec, folder, progress)


def quantize_encoder(
    params: Params,
    config: EncoderConfig,
    tokens: Int[AnyArray, "B T"],
    spec: QuantizationSpec,
    *,
    mask: Bool[AnyArray, "B T"] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> QuantizedModel:
    """An encoder in few bits; as `quantize_decoder`, but that ``mask`` says which tokens are no padding."""
    return _quantize(params, config, _batches(config, tokens, mask, "mask"), spec, folder, progress)


def model_hessians(
    params: Params,
    config: Config,
    tokens: Int[AnyArray, "B T"],
    places: Int[AnyArray, "B T"] | Bool[AnyArray, "B T"] | None = None,
) -> Iterator[GroupHessian]:
    """Hessians of a model's layers as they are, one at a time; ``places`` are positions or mask.

    Raises:
        ValueError: as `quantize_decoder`.
    """
    name = "positions" if isinstance(config, DecoderConfig) else "mask"
    batches = _batches(config, tokens, places, name)
    return (GroupHessian(index, names, hessian) for index, names, _, hessian in _groups(params, config, batches))


def dequantize_params(params: Params) -> Params:
    """The same tree with dense float32 kernels ``[L, in, out]``."""
    return jax.tree.map(
        lambda leaf: jnp.swapaxes(dequantize(leaf), -1, -2) if isinstance(leaf, QuantizedMatrix) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix),
    )


def kernel_groups(config: Config) -> tuple[tuple[str, ...], ...]:
    """Kernels of a layer in the order of the computation; those of a group read the same inputs."""
    if isinstance(config, EncoderConfig):
        return ("query", "key", "value"), ("output",), ("up",), ("down",)
    # Keys are made of other inputs where they are smeared over two tokens.
    attention = (("query", "value"), ("key",)) if config.smear else (("query", "key", "value"),)
    return *attention, ("output",), ("gate", "up") if config.gated else ("up",), ("down",)


# --- the loop -------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """A few sequences. ``places`` are positions of a decoder, -1 for padding, or the mask of an encoder."""

    tokens: Array
    places: Array
    valid: Array


def _quantize(
    params: Params,
    config: Config,
    batches: list[_Batch],
    spec: QuantizationSpec,
    folder: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> QuantizedModel:
    groups = kernel_groups(config)
    names = [name for group in groups for name in group]
    for name in names:
        columns = params["layers"][name].shape[-2]
        try:
            spec.grid.group_width(columns)
        except ValueError as error:
            raise ValueError(f"kernel {name!r}: {error}") from error
    layers = params["layers"][names[0]].shape[0]
    kept = None if folder is None else FinishedLayers(folder, _said(params, config, batches, spec))
    found: list[dict[str, QuantizedKernel]] = []
    losses: list[dict[str, np.ndarray]] = []
    done = 0

    def finished(index: int) -> dict[str, Array] | None:
        """Dense kernels of a layer that lies in the folder."""
        nonlocal done
        loaded = None if kept is None else kept.load(index, {name: _columns(params, name) for name in names}, spec)
        if loaded is None:
            return None
        found.append(loaded[0])
        losses.append(loaded[1])
        done += len(names)
        if progress is not None:
            progress(done, layers * len(names))
        return {name: _kernel(matrix, params["layers"][name].dtype) for name, matrix in loaded[0].items()}

    for index, group, layer, hessian in _groups(params, config, batches, finished):
        if len(found) == index:
            found.append({})
            losses.append({})
        for name in group:
            try:
                matrix, losses[index][name] = _solved(layer[name].T, hessian, spec)
            except ValueError as error:
                raise ValueError(f"layer {index}, {name!r}: {error}") from error
            layer[name] = _kernel(matrix, layer[name].dtype)
            found[index][name] = jax.tree.map(np.asarray, matrix)
        del hessian  # before the next one is accumulated
        if kept is not None and group == groups[-1]:
            kept.save(index, found[index], losses[index])
        done += len(group)
        if progress is not None:
            progress(done, layers * len(names))
    stacked = {name: jax.tree.map(lambda *parts: jnp.stack(parts), *(each[name] for each in found)) for name in names}
    return QuantizedModel(
        params | {"layers": params["layers"] | stacked},
        {name: np.array([each[name] for each in losses], np.float32) for name in names},
    )


def _groups(
    params: Params,
    config: Config,
    batches: list[_Batch],
    finished: Callable[[int], dict[str, Array] | None] = lambda index: None,
) -> Iterator[tuple[int, tuple[str, ...], Params, Hessian]]:
    """Layer, group, the layer's own dict of dense parameters, and the Hessian. Kernels that are put into the dict
    before the next group is asked for are those that the rest of the model sees."""
    layers = params["layers"]["query"].shape[0]
    x = [_embed(params, batch, config=config) for batch in batches]
    for index in range(layers):
        layer = dict(decoder.layer_params(params, index))
        known = finished(index)
        if known is not None:
            layer |= known
        else:
            for names in kernel_groups(config):
                # In no variable here, so that whoever takes the Hessian can forget it.
                yield index, names, layer, _group_hessian(layer, config, x, batches, index, names)
        if index + 1 < layers:
            for place, batch in enumerate(batches):
                x[place] = _outputs(layer, x[place], batch.places, config=config)


def _group_hessian(
    layer: Params, config: Config, x: list[Array], batches: list[_Batch], index: int, names: tuple[str, ...]
) -> Hessian:
    found = None
    try:
        for each, batch in zip(x, batches, strict=True):
            inputs = _inputs(layer, each, batch.places, config=config, name=names[0])
            found = calibrate(inputs, found, valid=batch.valid)
    except ValueError as error:
        raise ValueError(f"inputs of layer {index}, {' and '.join(names)}: {error}") from error
    assert found is not None
    return found


def _solved(weights: Array, hessian: Hessian, spec: QuantizationSpec) -> tuple[QuantizedKernel, np.ndarray]:
    """A kernel and its loss."""
    matrix = as_kernel(quantize_matrix(weights, hessian, spec))
    loss = proxy_loss(weights.astype(jnp.float32) - dequantize(matrix), hessian)
    return matrix, np.asarray(loss, np.float32)


def _kernel(matrix: QuantizedMatrix, dtype: Any) -> Array:
    return dequantize(matrix).T.astype(dtype)


def _columns(params: Params, name: str) -> tuple[int, int]:
    """Outputs and inputs of a kernel."""
    inputs, outputs = params["layers"][name].shape[-2:]
    return outputs, inputs


# --- a layer that tells what its kernels read -----------------------------------------------------


class _Tap:
    """A kernel that keeps what it is multiplied with."""

    def __init__(self, kernel: Array, seen: list[Array]) -> None:
        self.kernel, self.seen = kernel, seen

    def __rmatmul__(self, x: Array) -> Array:
        self.seen.append(x)
        return x @ self.kernel


def _layer(params: Params, config: Config, x: Array, places: Array) -> Array:
    if isinstance(config, EncoderConfig):
        return encoder.layer(params, config, x, places, dense=operator.matmul)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        options: dict[str, Any] = {"rotary": config.rotary, "sliding_window": config.sliding_window}
        return causal_attention(q, k, v, places, **options), None

    return decoder.layer(params, config, x, None, attend, places >= 0)[0]


@functools.partial(jax.jit, static_argnames="config")
def _embed(params: Params, batch: _Batch, *, config: Config) -> Array:
    if isinstance(config, EncoderConfig):
        return encoder.embed(params, config, batch.tokens)
    return decoder.embed(params, config, batch.tokens)


@functools.partial(jax.jit, static_argnames=("config", "name"))
def _inputs(params: Params, x: Array, places: Array, *, config: Config, name: str) -> Array:
    """What a kernel reads; whatever comes behind it in the layer is not computed."""
    seen: list[Array] = []
    _layer(params | {name: _Tap(params[name], seen)}, config, x, places)
    return seen[0]


@functools.partial(jax.jit, static_argnames="config")
def _outputs(params: Params, x: Array, places: Array, *, config: Config) -> Array:
    return _layer(params, config, x, places)


# --- calibration data -----------------------------------------------------------------------------


def _batches(config: Config, tokens: AnyArray, places: AnyArray | None, name: str) -> list[_Batch]:
    """Sequences in batches of one shape; the last one is filled up with padding."""
    tokens = np.asarray(tokens)
    if tokens.size == 0:
        raise ValueError(f"tokens has the shape {tokens.shape}: there is no calibration data; "
                         "allowed is at least one token")  # fmt: skip
    if isinstance(config, EncoderConfig):
        places = np.ones(tokens.shape, bool) if places is None else np.asarray(places)
        valid, padding = places, False
    else:
        line = np.arange(tokens.shape[1], dtype=np.int32)
        places = np.broadcast_to(line, tokens.shape) if places is None else np.asarray(places, np.int32)
        valid, padding = places >= 0, -1
    if places.shape != tokens.shape:
        raise ValueError(f"{name} has the shape {places.shape}; tokens have {tokens.shape}")
    if not valid.any():
        raise ValueError(f"{name} has no token: there is no calibration data; allowed is at least one token")
    outside = valid & ((tokens < 0) | (tokens >= config.vocabulary))
    if outside.any():
        raise ValueError(f"tokens has {tokens[outside][0]}; allowed are 0 to {config.vocabulary - 1}")
    seen = valid.any(axis=1)
    tokens, places = np.where(valid, tokens, 0)[seen].astype(np.int32), places[seen]
    size = min(len(tokens), max(1, _TOKENS // tokens.shape[1]))
    short = -len(tokens) % size
    tokens = np.pad(tokens, ((0, short), (0, 0)))
    places = np.pad(places, ((0, short), (0, 0)), constant_values=padding)
    valid = places if isinstance(config, EncoderConfig) else places >= 0
    starts = range(0, len(tokens), size)
    return [_Batch(*(jnp.asarray(a[i : i + size]) for a in (tokens, places, valid))) for i in starts]


def _said(params: Params, config: Config, batches: list[_Batch], spec: QuantizationSpec) -> dict[str, Any]:
    """All that a layer's result depends on, for the files."""

    def digest(tree: Any) -> str:
        found = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            host = np.asarray(leaf)
            found.update(f"{jax.tree_util.keystr(path)} {host.dtype.name} {host.shape}".encode())
            found.update(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)
        return found.hexdigest()

    return {"model": repr(config), "spec": repr(spec), "params": digest(params), "tokens": digest(batches)}
