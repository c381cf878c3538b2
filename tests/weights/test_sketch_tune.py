"""A sketched model trains by its tables: gradients are sums over codes, codes never move, and no layer is dense."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.cluster.vq

from hashml.accounting import stored_bytes
from hashml.models.decoder import DecoderConfig, forward, init_params
from hashml.weights.calibration import calibrate
from hashml.weights.grids import Grid
from hashml.weights.quantize_model import dequantize_params
from hashml.weights.quantized import QuantizationSpec, QuantizedMatrix, dequantize, preset, quantize_matrix
from hashml.weights.quantized_dense import QuantizedDense, as_kernel, dense_variables, draw_matrix
from hashml.weights.sketch_tune import sketch_spec, tables_of, with_tables
from hashml_kernels.lut_matmul import pack_codes, unpack_codes

ROWS, COLUMNS, GROUPS, BITS = 6, 24, 2, 2
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(ROWS, COLUMNS)).astype(np.float32)
X = (RNG.normal(size=(200, COLUMNS)) @ RNG.normal(size=(COLUMNS, COLUMNS))).astype(np.float32)


@pytest.fixture(scope="module")
def hessian():
    return calibrate(X)


# --- a matrix --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matrix(hessian):
    """Sketched, with its codes as integers."""
    small = quantize_matrix(WEIGHTS, hessian, sketch_spec(BITS, GROUPS))
    return small, np.asarray(unpack_codes(small.codes, BITS, COLUMNS))


def scored(params: Any, x: Any, dy: np.ndarray) -> Any:
    return ((x @ params["kernel"]) * dy).sum()


def test_the_gradient_of_a_table_is_the_sum_of_dw_over_its_code(matrix):
    """By a loop over weights; and a few entries by differences, which are exact: the score is linear in tables."""
    small, codes = matrix
    params, x, dy = {"kernel": as_kernel(small)}, jnp.asarray(X[:5]), RNG.normal(size=(5, ROWS)).astype(np.float32)

    @jax.jit
    def value_and_grad(tables):
        return jax.value_and_grad(lambda tables: scored(with_tables(params, tables), x, dy))(tables)

    tables = tables_of(params)
    value, found = value_and_grad(tables)
    dw = dy.T.astype(np.float64) @ np.asarray(x, np.float64)
    expected = np.zeros((ROWS, GROUPS, 2**BITS))
    for row in range(ROWS):
        for column in range(COLUMNS):
            expected[row, column // (COLUMNS // GROUPS), codes[row, column]] += dw[row, column]
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    for place in ((0, 0, 0), (3, 1, 2), (5, 1, 3)):
        moved = {"kernel": tables["kernel"].at[place].add(1.0)}
        assert float(value_and_grad(moved)[0] - value) == pytest.approx(expected[place], rel=1e-3, abs=2e-3)
    # All entries of a row, or of a group: what a constant of the row would get.
    np.testing.assert_allclose(found["kernel"].sum(axis=(1, 2)), dw.sum(axis=1), rtol=1e-3, atol=1e-3)


def test_a_group_for_every_column_is_the_dense_matrix():
    """G = in: a table holds its weight alone, under code 0, and its gradient is dW."""
    codes = jnp.zeros((ROWS, COLUMNS), jnp.uint8)
    table = jnp.asarray(WEIGHTS)[:, :, None] * jnp.array([1.0, 0.0])
    params = {"kernel": as_kernel(QuantizedMatrix(pack_codes(codes, 1), Grid(table, None, None, 1), COLUMNS))}
    x, dy = jnp.asarray(X[:5]), RNG.normal(size=(5, ROWS)).astype(np.float32)
    np.testing.assert_array_equal(dequantize(params["kernel"]), WEIGHTS)
    np.testing.assert_allclose(x @ params["kernel"], X[:5] @ WEIGHTS.T, rtol=1e-5, atol=1e-4)
    found = jax.grad(lambda tables: scored(with_tables(params, tables), x, dy))(tables_of(params))["kernel"]
    np.testing.assert_allclose(found[..., 0], dy.T @ X[:5], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[..., 1], 0)


def test_rows_of_few_values_are_sketched_exactly(hessian):
    few = RNG.choice(np.array([-1.5, -0.25, 0.5, 2.0], np.float32), size=(ROWS, COLUMNS))
    np.testing.assert_array_equal(dequantize(quantize_matrix(few, hessian, sketch_spec(BITS, 1))), few)


def test_without_weights_and_feedback_it_is_plain_k_means():
    """A fixed point of Lloyd's algorithm as SciPy has it: nearest codes, and each value the mean of its own."""
    spec = QuantizationSpec(dataclasses.replace(sketch_spec(BITS, 1, dtype="float32").grid, exponent=0), "rtn")
    small = quantize_matrix(WEIGHTS, None, spec)
    codes, tables = np.asarray(unpack_codes(small.codes, BITS, COLUMNS)), np.asarray(small.grid.tables)[:, 0]
    for row in range(ROWS):
        nearest, _ = scipy.cluster.vq.vq(WEIGHTS[row][:, None], tables[row][:, None])
        np.testing.assert_array_equal(codes[row], nearest)
        again, _ = scipy.cluster.vq.kmeans2(WEIGHTS[row][:, None], tables[row][:, None], 1, minit="matrix")
        np.testing.assert_allclose(again[:, 0], tables[row], atol=1e-3)


def test_feedback_lowers_the_error_of_outputs(hessian):
    """On correlated inputs strictly, and k-means lowers it below an even grid."""

    def error(spec: QuantizationSpec) -> float:
        small = np.asarray(dequantize(quantize_matrix(WEIGHTS, hessian, spec)))
        return float(((X @ (WEIGHTS - small).T) ** 2).sum())

    alone = error(QuantizationSpec(sketch_spec(BITS).grid, "rtn"))
    sketched, even = error(sketch_spec(BITS)), error(preset("rtn", BITS))
    assert sketched < 0.8 * alone
    assert sketched < 0.5 * even


# --- a model ---------------------------------------------------------------------------------------

KERNELS = ("query", "key", "value", "output", "gate", "up", "down")
CONFIG = DecoderConfig(vocabulary=40, features=64, layers=16, heads=2, kv_heads=2, head_dim=32, hidden=128)
TOKENS = np.random.default_rng(1).integers(0, 40, (2, 3)).astype(np.int32)
ROWS_OF_A_LAYER = 4 * 64 + 2 * 128 + 64


@pytest.fixture(scope="module")
def sketched():
    """Codes and tables are drawn: what they are does not matter here."""
    params = init_params(jax.random.key(0), CONFIG)
    layers, grid = params["layers"], sketch_spec(BITS, GROUPS).grid
    for place, name in enumerate(KERNELS):
        inputs, outputs = layers[name].shape[1:]
        drawn = draw_matrix(jax.random.key(place), (CONFIG.layers, outputs, inputs), grid)
        layers[name] = as_kernel(drawn)
    tables = {name: leaf + 0.1 * RNG.normal(size=leaf.shape) for name, leaf in tables_of(params).items()}
    return with_tables(params, tables, "float16")


def loss(tables, params, tokens):
    return (forward(with_tables(params, tables), CONFIG, tokens) ** 2).mean()


@pytest.fixture(scope="module")
def compiled(sketched):
    """One program for users of other tables."""
    leaves, tree = jax.tree.flatten(sketched)

    def value_and_grad(tables, leaves):
        return jax.value_and_grad(loss)(tables, jax.tree.unflatten(tree, leaves), TOKENS)

    return jax.jit(value_and_grad).lower(tables_of(sketched), leaves).compile()


def run(compiled, tables, params):
    return compiled(tables, jax.tree.leaves(params))


def test_tables_are_all_that_is_trained(sketched, compiled):
    tables = tables_of(sketched)
    assert set(tables) == {f"layers/{name}" for name in KERNELS}
    assert {leaf.dtype for leaf in tables.values()} == {np.dtype(np.float32)}
    assert sum(leaf.size for leaf in tables.values()) == CONFIG.layers * ROWS_OF_A_LAYER * GROUPS * 2**BITS
    value, gradients = run(compiled, tables, sketched)
    assert jax.tree.structure(gradients) == jax.tree.structure(tables)
    # dW of the dense model, summed over codes.
    squares = jax.jit(jax.value_and_grad(lambda params: (forward(params, CONFIG, TOKENS) ** 2).mean()))
    expected, dense = squares(dequantize_params(sketched))
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    for name in ("key", "down"):
        dw = np.swapaxes(np.asarray(dense["layers"][name]), 1, 2)
        codes = np.asarray(unpack_codes(sketched["layers"][name].codes, BITS, dw.shape[-1]))
        codes, dw = (array.reshape(*dw.shape[:2], GROUPS, -1) for array in (codes, dw))
        sums = np.stack([np.where(codes == code, dw, 0).sum(axis=-1) for code in range(2**BITS)], axis=-1)
        np.testing.assert_allclose(gradients[f"layers/{name}"], sums, rtol=1e-3, atol=1e-4 * np.abs(sums).max())


def test_no_more_than_a_layer_is_dense(sketched, compiled):
    """Forward and backward take less beside their arguments than half of all W, or of all dW."""
    memory: Any = compiled.memory_analysis()
    dense = stored_bytes(dequantize_params(sketched)["layers"])
    assert memory.temp_size_in_bytes < dense / 2


def test_users_swap_tables_and_share_codes(sketched, compiled):
    mine = tables_of(sketched)
    yours = {name: leaf * 1.5 - 0.01 for name, leaf in mine.items()}
    other = with_tables(sketched, yours, "float16")
    for name in KERNELS:
        assert other["layers"][name].codes is sketched["layers"][name].codes
        assert other["layers"][name].grid.tables.dtype == jnp.float16
    values = [float(run(compiled, tables, sketched)[0]) for tables in (mine, yours, mine)]
    assert values[0] == values[2] != values[1]
    # float16 keeps what it rounded to, and a model is its codes and its tables.
    back = tables_of(other)
    for name, leaf in yours.items():
        np.testing.assert_allclose(back[name], leaf, rtol=2**-10, atol=1e-6)
    assert stored_bytes(other) == stored_bytes(sketched)


def test_a_step_down_the_gradient_lowers_the_loss(sketched, compiled):
    tables = tables_of(sketched)
    value, gradients = run(compiled, tables, sketched)
    square = sum(float((leaf**2).sum()) for leaf in gradients.values())
    step = 0.01 * float(value) / square  # a hundredth of the way to 0, were it a plane
    moved = {name: leaf - step * gradients[name] for name, leaf in tables.items()}
    assert float(run(compiled, moved, sketched)[0]) == pytest.approx(0.99 * float(value), rel=2e-3)


def test_an_even_grid_is_written_out_as_tables(hessian):
    params = {"a": [quantize_matrix(WEIGHTS, hessian, preset("rtn", BITS, groups=1)), np.ones(3)]}
    tables = tables_of(params)
    assert set(tables) == {"a/0"}
    assert tables["a/0"].shape == (ROWS, 1, 4)
    again = with_tables(params, tables)
    np.testing.assert_array_equal(dequantize(again["a"][0]), dequantize(params["a"][0]))
    assert again["a"][1] is params["a"][1]


def test_a_layer_trains_its_tables_and_bias(matrix):
    """`QuantizedDense` over ``kmeans`` is the layer of this paper."""
    small, _ = matrix
    layer = QuantizedDense(ROWS, sketch_spec(BITS, GROUPS).grid)
    variables = dense_variables(small, np.zeros(ROWS, np.float32))
    assert {name: set(part) for name, part in variables.items()} == {"params": {"tables", "bias"}, "codes": {"codes"}}
    found: Any = layer.apply(variables, jnp.asarray(X[:5]))
    np.testing.assert_allclose(found, X[:5] @ np.asarray(dequantize(small)).T, rtol=1e-4, atol=1e-3)


def test_refusals(sketched):
    tables = tables_of(sketched)
    with pytest.raises(ValueError, match="params have no quantised kernel; quantize_decoder makes some"):
        tables_of(dequantize_params(sketched))
    with pytest.raises(ValueError, match="tables has none for 'layers/down'; it has layers/gate"):
        with_tables(sketched, {name: leaf for name, leaf in tables.items() if name != "layers/down"})
    with pytest.raises(ValueError, match="tables has layers/extra; params have no quantised kernel of that name"):
        with_tables(sketched, tables | {"layers/extra": tables["layers/down"]})
    with pytest.raises(
        ValueError, match=r"'layers/down' have the shape \(16, 64, 2, 3\); allowed is \(16, 64, 'groups', 4\)"
    ):
        with_tables(sketched, tables | {"layers/down": tables["layers/down"][..., :3]})
    with pytest.raises(ValueError, match="that divide the 128 columns"):
        with_tables(sketched, tables | {"layers/down": jnp.zeros((16, 64, 3, 4))})
    with pytest.raises(ValueError, match="bits is 5; allowed are 1, 2, 3, 4, 8"):
        sketch_spec(5)
