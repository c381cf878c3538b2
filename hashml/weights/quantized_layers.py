"""Files of quantised models: a whole model in one, and finished layers of a run that may be killed.

Both are safetensors with a JSON header and a checksum, as `hashml.exchange` writes them: beside their place, then
moved. A kernel is its arrays ``codes`` and ``tables``, or ``codes``, ``scales`` and ``zeros``; how many bits and
columns a kernel has stands in the header.

    save_quantized("model.safetensors", model.params, config)          params, config = load_quantized(...)
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hashml.exchange import ExchangeError, load_module, save_module
from hashml.models import decoder, encoder
from hashml.models.decoder import DecoderConfig
from hashml.models.encoder import EncoderConfig
from hashml.models.rotary import Rotary
from hashml.weights.grids import Grid
from hashml.weights.quantized import QuantizationSpec, QuantizedMatrix
from hashml.weights.quantized_dense import QuantizedKernel
from hashml_kernels.lut_matmul import layout

Params = dict[str, Any]
_CONFIGS = {"decoder": (DecoderConfig, decoder.param_shapes), "encoder": (EncoderConfig, encoder.param_shapes)}


def arrays_of(matrix: QuantizedMatrix) -> dict[str, Any]:
    """What is stored of a matrix, by name."""
    grid = matrix.grid
    every = {"codes": matrix.codes, "tables": grid.tables, "scales": grid.scales, "zeros": grid.zeros}
    return {name: array for name, array in every.items() if array is not None}


def kernel_of(arrays: Mapping[str, Any], bits: int, columns: int) -> QuantizedKernel:
    """A matrix from what `arrays_of` gives.

    Raises:
        ValueError: for arrays that are none of a matrix of so many bits and columns.
    """
    if set(arrays) not in ({"codes", "tables"}, {"codes", "scales", "zeros"}):
        raise ValueError(f"a kernel has the arrays {', '.join(sorted(arrays))}; it has codes and tables, or codes, "
                         "scales and zeros")  # fmt: skip
    codes, tables, scales, zeros = (arrays.get(name) for name in ("codes", "tables", "scales", "zeros"))
    assert codes is not None
    row_bytes, rows = layout(columns, bits).row_bytes, codes.shape[:-1]
    if codes.shape[-1] != row_bytes or codes.dtype != jnp.uint8:
        raise ValueError(f"codes are {codes.dtype}{list(codes.shape)}; {columns} codes of {bits} bits take uint8 "
                         f"rows of {row_bytes}")  # fmt: skip
    for name, part, levels in (("tables", tables, (2**bits,)), ("scales", scales, ()), ("zeros", zeros, ())):
        if part is None:
            continue
        groups = part.shape[len(rows) : len(rows) + 1]
        if part.shape != (*rows, *groups, *levels) or len(groups) != 1 or not groups[0] or columns % groups[0]:
            raise ValueError(f"{name} has the shape {part.shape}; codes are of {rows} rows of {columns} columns")
    return QuantizedKernel(codes, Grid(tables, scales, zeros, bits), columns)


# --- a whole model --------------------------------------------------------------------------------


class LoadedModel(NamedTuple):
    """What a file holds."""

    params: Params
    config: DecoderConfig | EncoderConfig


def save_quantized(
    path: str | os.PathLike[str],
    params: Params,
    config: DecoderConfig | EncoderConfig,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a quantised model; the file appears whole or not at all.

    Args:
        path: the file to write, or to replace.
        params: with a `QuantizedMatrix` for some kernels of the layers; others may be dense.
        config: of the model.
        metadata: further text for the header.

    Raises:
        ValueError: if no kernel is quantised.
        OSError: if the file cannot be written; one that was there before is untouched.
    """
    layers = params["layers"]
    kernels = {name: leaf for name, leaf in layers.items() if isinstance(leaf, QuantizedMatrix)}
    if not kernels:
        raise ValueError("params have no quantised kernel; quantize_decoder and quantize_encoder make some")
    geometry = {
        "kind": "decoder" if isinstance(config, DecoderConfig) else "encoder",
        "config": dataclasses.asdict(config),
        "kernels": {name: {"bits": leaf.bits, "columns": leaf.columns} for name, leaf in kernels.items()},
    }
    plain = params | {"layers": layers | {name: arrays_of(leaf) for name, leaf in kernels.items()}}
    save_module(path, plain, geometry=geometry, metadata=metadata)


def load_quantized(path: str | os.PathLike[str]) -> LoadedModel:
    """Reads what `save_quantized` wrote, bit for bit.

    Raises:
        ExchangeError: if the file is damaged, or holds no quantised model.
        FileNotFoundError: if there is no such file.
    """
    params, said = load_module(path)
    try:
        made, param_shapes = _CONFIGS[said["kind"]]
        options = dict(said["config"])
        rotary = options.get("rotary")
        if rotary is not None:
            scaling = None if rotary["scaling"] is None else tuple(rotary["scaling"])
            options["rotary"] = Rotary(**rotary | {"scaling": scaling})
        config = made(**options)
        layers = dict(params["layers"])
        for name, own in said["kernels"].items():
            layers[name] = kernel_of(layers[name], own["bits"], own["columns"])
        whole = params | {"layers": layers}
        _check(whole, param_shapes(config))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExchangeError(f"{path} holds no quantised model: {error}") from error
    return LoadedModel(whole, config)


def _check(params: Params, shapes: Params) -> None:
    """Refuses a tree whose leaves are not those of a model."""
    for name, shape in shapes.items():
        if isinstance(shape, dict):
            _check(params[name], shape)
            continue
        found = tuple(params[name].shape)
        if isinstance(params[name], QuantizedMatrix):
            found = (*found[:-2], found[-1], found[-2])
        if found != shape:
            raise ValueError(f"{name} has the shape {found}; the model's is {shape}")
    if extra := set(params) - set(shapes):
        raise ValueError(f"{', '.join(sorted(extra))} are no parameters of the model")


# --- layers of a run ------------------------------------------------------------------------------


class FinishedLayers:
    """A folder with a file for each layer that is done.

    Args:
        folder: made where it is not there.
        said: all that the results depend on; a file that says otherwise is refused.
    """

    def __init__(self, folder: str | os.PathLike[str], said: Mapping[str, Any]) -> None:
        self.folder, self.said = Path(folder), said
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, index: int, kernels: Mapping[str, QuantizedMatrix], losses: Mapping[str, np.ndarray]) -> None:
        tree = {"kernels": {name: arrays_of(matrix) for name, matrix in kernels.items()}, "losses": dict(losses)}
        save_module(self._file(index), tree, geometry=self._geometry(index))

    def load(
        self, index: int, sizes: Mapping[str, tuple[int, int]], spec: QuantizationSpec
    ) -> tuple[dict[str, QuantizedKernel], dict[str, np.ndarray]] | None:
        """The layer, or ``None`` if it is not there; ``sizes`` are outputs and inputs.

        Raises:
            ExchangeError: if the file is damaged or of another run.
        """
        path = self._file(index)
        if not path.exists():
            return None
        tree, _ = load_module(path, geometry=self._geometry(index))
        try:
            kernels = {
                name: kernel_of(_host(tree["kernels"][name]), spec.grid.bits, columns)
                for name, (_, columns) in sizes.items()
            }
            return kernels, _host({name: tree["losses"][name] for name in sizes})
        except (KeyError, TypeError, ValueError) as error:
            raise ExchangeError(f"{path} holds no quantised layer: {error}") from error

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:04d}.safetensors"

    def _geometry(self, index: int) -> dict[str, Any]:
        return {**self.said, "layer": index}


def _host(arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in arrays.items()}
