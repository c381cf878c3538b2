"""Layers of codes multiply as dense ones do, train their tables, and load from a quantised matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.models import decoder, encoder
from hashml.models.decoder import DecoderConfig
from hashml.models.encoder import EncoderConfig
from hashml.weights.calibration import calibrate
from hashml.weights.grids import GridSpec
from hashml.weights.quantized import dequantize, matmul, preset, quantize_matrix
from hashml.weights.quantized_dense import QuantizedDense, as_kernel, dense_variables, draw_matrix
from hashml.weights.quantized_modules import QuantizedDecoder, QuantizedEncoder, module_variables

ROWS, COLUMNS = 12, 40
RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_t(4, (ROWS, COLUMNS)).astype(np.float32)
X = RNG.normal(size=(60, COLUMNS)).astype(np.float32)
BIAS = RNG.normal(size=ROWS).astype(np.float32)
TABLES, AFFINE = preset("leanquant", 3, groups=2), preset("gptq", 2, groups=4)


@pytest.fixture(scope="module")
def matrices():
    hessian = calibrate(X)
    return {spec.grid: quantize_matrix(WEIGHTS, hessian, spec) for spec in (TABLES, AFFINE)}


@pytest.mark.parametrize("spec", [TABLES, AFFINE], ids=["tables", "affine"])
def test_a_layer_reads_the_codes_of_a_matrix(matrices, spec):
    matrix = matrices[spec.grid]
    module: Any = QuantizedDense(ROWS, spec.grid)
    variables = dense_variables(matrix, BIAS)
    x = X[:6].reshape(2, 3, COLUMNS)
    expected = x.astype(np.float64) @ np.asarray(dequantize(matrix), np.float64).T + BIAS
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(x @ as_kernel(matrix) + BIAS, module.apply(variables, x))
    # A fresh one has the same variables, of the same types.
    fresh = module.init(jax.random.key(0), x)
    assert jax.tree.map(_said, fresh) == jax.tree.map(_said, variables)
    half = module.apply(variables, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def _said(leaf):
    return leaf.shape, leaf.dtype.name


def test_tables_are_trained_and_codes_stay(matrices):
    """Least squares by gradients of ``params`` alone finds the means of the codes' weights: its loss goes down."""
    variables = dense_variables(matrices[TABLES.grid], BIAS)
    variables["params"]["tables"] = variables["params"]["tables"].astype(jnp.float32)
    module: Any = QuantizedDense(ROWS, TABLES.grid)
    wanted = X @ WEIGHTS.T + BIAS

    def loss(params):
        return ((module.apply({"params": params, "codes": variables["codes"]}, X) - wanted) ** 2).mean()

    value, gradients = jax.value_and_grad(loss)(variables["params"])
    # dT[r, g, c] = sum over the columns of that code of dW, here with dW by hand.
    missing = 2 * (np.asarray(X @ np.asarray(dequantize(matrices[TABLES.grid])).T + BIAS) - wanted) / wanted.size
    dense = missing.T.astype(np.float64) @ X
    codes = np.asarray(matrices[TABLES.grid].grid.nearest(dequantize(matrices[TABLES.grid])))
    expected = np.zeros((ROWS, 2, 8))
    for row in range(ROWS):
        for column in range(COLUMNS):
            expected[row, column // 20, codes[row, column]] += dense[row, column]
    np.testing.assert_allclose(gradients["tables"], expected, rtol=1e-3, atol=1e-5)
    moved = jax.tree.map(lambda p, g: p - 0.5 * g, variables["params"], gradients)
    assert loss(moved) < value


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_fresh_values_have_the_variance_of_a_dense_layer(bits):
    """Mean square 1 / in: codes are uniform, hence within 5 standard errors of it over 200,000 weights."""
    matrix = draw_matrix(jax.random.key(bits), (500, 400), GridSpec(bits, "kmeans", dtype="float32"))
    squares = np.asarray(dequantize(matrix), np.float64) ** 2 * 400
    error = squares.std() / np.sqrt(squares.size)
    # With one bit all squares are 1.
    assert abs(squares.mean() - 1) <= 5 * error + 1e-6


def test_models_as_modules():
    """A decoder's and an encoder's variables go through `apply` as the trees do through `forward`."""
    config = DecoderConfig(vocabulary=40, features=16, layers=2, heads=2, kv_heads=2, head_dim=8, hidden=16)
    tokens = jnp.asarray(RNG.integers(0, 40, (2, 5)))
    grid = preset("gptq", 3).grid
    module: Any = QuantizedDecoder(config, grid)
    shapes = {name: shape[1:][::-1] for name, shape in decoder.param_shapes(config)["layers"].items()}
    params = decoder.init_params(jax.random.key(0), config)
    drawn = {
        name: as_kernel(draw_matrix(jax.random.key(i), (2, *shapes[name]), grid))
        for i, name in enumerate(("query", "key", "value", "output", "gate", "up", "down"))
    }
    params = params | {"layers": params["layers"] | drawn}
    variables = module_variables(params)
    expected = decoder.forward(params, config, tokens)
    np.testing.assert_array_equal(module.apply(variables, tokens), expected)
    fresh = jax.eval_shape(module.init, jax.random.key(1), tokens)
    assert jax.tree.map(_said, fresh) == jax.tree.map(_said, variables)
    assert not any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(variables["params"]))

    text = EncoderConfig(vocabulary=40, features=16, layers=2, heads=2, hidden=24, context=12)
    other: Any = QuantizedEncoder(text, preset("leanquant", 2).grid)
    variables = jax.eval_shape(other.init, jax.random.key(0), tokens)
    assert jax.eval_shape(other.apply, variables, tokens).shape == (2, 5, 16)
    assert variables["params"]["layers"]["down"]["tables"].shape == (2, 16, 1, 4)
    assert set(variables["params"]) == set(encoder.param_shapes(text))


def test_refusals(matrices):
    matrix = matrices[TABLES.grid]
    stack = jax.tree.map(lambda part: jnp.stack([part, part]), matrix)
    with pytest.raises(ValueError, match=r"matrix has the shape \(2, 12, 40\); a layer takes one matrix"):
        dense_variables(stack)
    with pytest.raises(ValueError, match="bias has 11 entries; matrix has 12 outputs"):
        dense_variables(matrix, BIAS[:11])
    with pytest.raises(ValueError, match="groups is 3; it must divide the 40 columns"):
        QuantizedDense(ROWS, GridSpec(3, groups=3)).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"x has shape \(60, 39\); its last axis must be the 40 columns"):
        matmul(X[:, :39], matrix)
