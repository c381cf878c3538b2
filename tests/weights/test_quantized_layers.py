"""A quantised model in a file: the same bits again, in the bytes that were counted; foreign files are refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.exchange import ExchangeError, load_module, save_module
from hashml.models import decoder, encoder
from hashml.models.decoder import DecoderConfig
from hashml.models.encoder import EncoderConfig
from hashml.models.rotary import Rotary
from hashml.weights.grids import Grid
from hashml.weights.quantize_model import kernel_groups
from hashml.weights.quantized import preset
from hashml.weights.quantized_dense import QuantizedKernel
from hashml.weights.quantized_layers import kernel_of, load_quantized, save_quantized
from hashml_kernels.lut_matmul import layout

DECODER = DecoderConfig(vocabulary=40, features=16, layers=2, heads=2, kv_heads=1, head_dim=8, hidden=24,
                        rotary=Rotary(scaling=("linear", 2.0)), tied=False)  # fmt: skip
ENCODER = EncoderConfig(vocabulary=40, features=16, layers=2, heads=2, hidden=24, context=12)


def _model(config, spec):
    """Random numbers in every leaf."""
    rng = np.random.default_rng(0)
    family: Any = decoder if isinstance(config, DecoderConfig) else encoder
    shapes = family.param_shapes(config)
    leaves = jax.tree.map(lambda shape: rng.normal(size=shape).astype(jnp.bfloat16), shapes, is_leaf=_is_shape)
    grid, kernels = spec.grid, {}
    for name in (name for group in kernel_groups(config) for name in group):
        layers, inputs, outputs = shapes["layers"][name]
        row_bytes = layout(inputs, grid.bits).row_bytes
        codes = rng.integers(0, 256, (layers, outputs, row_bytes)).astype(np.uint8)
        numbers = rng.normal(size=(layers, outputs, grid.groups, 2**grid.bits)).astype(grid.dtype)
        if grid.kind == "kmeans":
            values = Grid(np.sort(numbers), None, None, grid.bits)
        else:
            values = Grid(None, numbers[..., 0], codes[..., :1].repeat(grid.groups, axis=-1), grid.bits)
        kernels[name] = QuantizedKernel(codes, values, inputs)
    return leaves | {"layers": leaves["layers"] | kernels}


def _is_shape(leaf):
    return isinstance(leaf, tuple)


@pytest.mark.parametrize(
    ("config", "spec"),
    [(DECODER, preset("leanquant", 3)), (ENCODER, preset("gptq", 2, groups=4))],
    ids=["decoder", "encoder"],
)
def test_a_model_comes_back_bit_for_bit(config, spec, tmp_path):
    params = _model(config, spec)
    path = tmp_path / "model.safetensors"
    save_quantized(path, params, config, metadata={"from": "a test"})
    loaded = load_quantized(path)
    assert loaded.config == config
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert stored_bytes(params) < path.stat().st_size < stored_bytes(params) + 2**14


def test_what_is_no_quantised_model_is_refused(tmp_path):
    params, path = _model(DECODER, preset("leanquant", 3)), tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="params have no quantised kernel"):
        save_quantized(path, params | {"layers": {"mlp_norm": params["layers"]["mlp_norm"]}}, DECODER)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        load_quantized(path)
    save_module(path, {"memory": np.zeros(3, np.float32)}, geometry={"budget": 3})
    with pytest.raises(ExchangeError, match="holds no quantised model: 'kind'"):
        load_quantized(path)
    save_quantized(path, params, dataclasses.replace(DECODER, hidden=32))
    with pytest.raises(ExchangeError, match=r"has the shape \(2, 16, 24\); the model's is \(2, 16, 32\)"):
        load_quantized(path)
    save_quantized(path, params, DECODER)
    tree, said = load_module(path)
    said["kernels"]["up"]["bits"] = 4
    save_module(path, tree, geometry=said)
    with pytest.raises(ExchangeError, match="16 codes of 4 bits take uint8 rows of 8"):
        load_quantized(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExchangeError, match="damaged or no safetensors file"):
        load_quantized(path)


def test_arrays_of_a_kernel():
    codes, tables = np.zeros((5, 6), np.uint8), np.zeros((5, 2, 8), np.float16)
    assert kernel_of({"codes": codes, "tables": tables}, 3, 16).shape == (5, 16)
    with pytest.raises(ValueError, match="a kernel has the arrays codes, zeros"):
        kernel_of({"codes": codes, "zeros": np.zeros((5, 1), np.uint8)}, 3, 16)
    for wrong in (tables[:4], tables[:, :, :4], tables.repeat(3, axis=1)[:, :5], tables[:, :0]):
        with pytest.raises(ValueError, match="tables has the shape"):
            kernel_of({"codes": codes, "tables": wrong}, 3, 16)
