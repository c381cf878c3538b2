"""A packed matrix has the bits of its solution, takes the bytes that its arrays take, and multiplies."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.weights.calibration import calibrate
from hashml.weights.grids import GridSpec
from hashml.weights.quantized import (
    PRESETS,
    QuantizationSpec,
    dequantize,
    matmul,
    pack_solution,
    preset,
    quantize_matrix,
    spec_bits_per_weight,
    stored_bits_per_weight,
)
from hashml.weights.solver import solve

ROWS, COLUMNS = 12, 40
RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_t(4, (ROWS, COLUMNS)).astype(np.float32)
X = (RNG.normal(size=(300, COLUMNS)) @ RNG.normal(size=(COLUMNS, COLUMNS))).astype(np.float32)


@pytest.fixture(scope="module")
def hessian():
    return calibrate(X)


@pytest.mark.parametrize(("name", "bits", "groups", "dtype"), [
    ("rtn", 1, 1, "float16"),
    ("gptq", 8, 4, "bfloat16"),
    ("leanquant", 2, 1, "float16"),
    ("leanquant", 3, 2, "bfloat16"),
    ("leanquant", 4, 1, "float32"),
    ("leanquant_affine", 3, 2, "float16"),
])  # fmt: skip
def test_what_is_stored_is_what_was_solved_for(hessian, name, bits, groups, dtype):
    spec = preset(name, bits, groups=groups, dtype=dtype)
    options: dict[str, Any] = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    solution = solve(WEIGHTS, hessian, **options)
    packed = pack_solution(solution)
    np.testing.assert_array_equal(dequantize(packed), solution.quantized)
    same = quantize_matrix(WEIGHTS, hessian, spec)
    assert jax.tree.structure(same) == jax.tree.structure(packed)
    for one, other in zip(jax.tree.leaves(same), jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(one, other)
    # By hand: 40 codes are 5, 10, 15, 20 or 40 bytes; tables, or a scale and a byte for its zero.
    number = 4 if dtype == "float32" else 2
    side = groups * (number * 2**bits if "kmeans" in name or name == "leanquant" else number + 1)
    assert stored_bytes(packed) == ROWS * (5 * bits + side)
    assert stored_bits_per_weight(packed) == spec_bits_per_weight(spec, COLUMNS) == 8 * (5 * bits + side) / COLUMNS
    assert packed.shape == (ROWS, COLUMNS)
    assert packed.bits == bits


def test_the_overhead_of_a_table_is_that_of_the_card():
    """16 2^b / in: 0.0625 bits for 4,096 columns, 1 for 256; of a scale and a zero 24 / in."""
    assert spec_bits_per_weight(preset("leanquant", 4), 4096) == 4.0625
    assert spec_bits_per_weight(preset("leanquant", 4), 256) == 5
    assert spec_bits_per_weight(preset("gptq", 3).grid, 1024) == 3 + 24 / 1024
    assert spec_bits_per_weight(preset("gptq", 3, groups=8), 1024) == 3 + 8 * 24 / 1024
    # 41 codes of 3 bits: 8 slots of 6 codes, in 3 planes.
    assert spec_bits_per_weight(preset("gptq", 3), 41) == (8 * 18 + 24) / 41


@pytest.fixture(scope="module")
def small(hessian):
    return quantize_matrix(WEIGHTS, hessian, preset("leanquant", 3, groups=2, dtype="bfloat16"))


def test_multiplies_under_jit_and_in_the_type_of_its_input(small):
    dense = np.asarray(dequantize(small), np.float64)
    x = X[:6].reshape(2, 3, COLUMNS)
    found = jax.jit(matmul)(x, small)
    expected = x.astype(np.float64) @ dense.T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    half = matmul(jnp.asarray(x, jnp.bfloat16), small)
    assert half.dtype == jnp.bfloat16
    expected = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) @ dense.T
    np.testing.assert_allclose(np.asarray(half, np.float64), expected, rtol=2.0**-8, atol=1e-4)


def test_gradients_of_tables_are_sums_over_their_codes(small):
    """dT[r, g, c] = sum of dW[r, j] over j in g with code c, by a loop; dW = dy^T x."""
    tables = small.grid.tables.astype(jnp.float32)
    x, dy = X[:5], RNG.normal(size=(5, ROWS)).astype(np.float32)

    def loss(tables):
        return (matmul(x, dataclasses.replace(small, grid=dataclasses.replace(small.grid, tables=tables))) * dy).sum()

    found = np.asarray(jax.grad(loss)(tables))
    dense, codes = dy.T.astype(np.float64) @ x, np.asarray(small.grid.nearest(dequantize(small)))
    expected = np.zeros(tables.shape)
    for row in range(ROWS):
        for column in range(COLUMNS):
            expected[row, column // (COLUMNS // 2), codes[row, column]] += dense[row, column]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_may_be_stacked(small, hessian):
    other = quantize_matrix(-2 * WEIGHTS, hessian, preset("leanquant", 3, groups=2, dtype="bfloat16"))
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), small, other)
    assert stacked.shape == (2, ROWS, COLUMNS)
    dense = np.stack([dequantize(small), dequantize(other)])
    np.testing.assert_array_equal(dequantize(stacked), dense)
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, dequantize(layer)), 0, stacked)
    np.testing.assert_array_equal(scanned, dense)
    assert stored_bits_per_weight(stacked) == stored_bits_per_weight(small)


def test_matrices_of_one_shape_are_one_program(hessian):
    """Twenty layers are not to be compiled twenty times."""
    from hashml.weights import solver

    programs: Any = solver._eliminate
    spec = preset("leanquant", 2)
    quantize_matrix(WEIGHTS, hessian, spec)
    before = programs._cache_size()
    quantize_matrix(WEIGHTS + 1, calibrate(X + 1), preset("leanquant", 2))
    assert programs._cache_size() == before


def test_presets_and_refusals(small):
    assert PRESETS == ("rtn", "gptq", "rtn_kmeans", "gptq_kmeans", "leanquant", "leanquant_affine")
    assert preset("leanquant", 2).grid == GridSpec(2, "kmeans", exponent=4)
    assert preset("gptq_kmeans").grid.exponent == 0
    assert preset("rtn").method == "rtn"
    assert hash(preset("gptq", 3)) == hash(preset("gptq", 3))
    with pytest.raises(ValueError, match="name is 'awq'; allowed are rtn, gptq"):
        preset("awq")
    with pytest.raises(ValueError, match="bits is 5; allowed are 1, 2, 3, 4, 8"):
        preset("gptq", 5)
    with pytest.raises(ValueError, match="static_groups is False with act_order"):
        QuantizationSpec(GridSpec(), static_groups=False)
    with pytest.raises(ValueError, match="groups is 3; it must divide the 40 columns"):
        spec_bits_per_weight(preset("gptq", 3, groups=3), 40)
    with pytest.raises(ValueError, match=r"x has shape \(\d+, 39\); its last axis must be the 40 columns"):
        matmul(X[:, :39], small)
    with pytest.raises(ValueError, match="packed has rows of 15 bytes; 41 codes of 3 bits take 18"):
        dequantize(dataclasses.replace(small, columns=41))
