from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.accounting import stored_bytes
from hashml.embeddings import EmbeddingTables, concatenated_ids, take_rows

SIZES = (7, 1, 11)
OFFSETS = (0, 7, 8)


def init(module) -> Any:
    return module.init(jax.random.key(0), jnp.zeros((1, len(module.sizes)), jnp.int32))


def lookup(module, variables, ids) -> Any:
    return jax.jit(module.apply)(variables, ids)


LOOK_UP = jax.jit(EmbeddingTables(SIZES, 2).apply)


def all_ids(low, high):
    return st.lists(st.tuples(*[st.integers(low, high)] * 3), min_size=5, max_size=5)


@settings(deadline=None)
@given(all_ids(-20, 20))
def test_rows_are_those_of_separate_tables(ids):
    """Each column reads its own table, and whatever is not in it is NaN, never a neighbour's row."""
    variables = {"params": {"table": jnp.arange(38.0).reshape(19, 2)}}
    table = np.asarray(variables["params"]["table"])
    tables = [table[o : o + n] for o, n in zip(OFFSETS, SIZES, strict=True)]
    found = np.asarray(LOOK_UP(variables, jnp.asarray(ids, jnp.int32)))
    for row, looked_up in zip(ids, found, strict=True):
        for t, v in enumerate(row):
            expected = tables[t][v] if 0 <= v < SIZES[t] else np.full(2, np.nan)
            np.testing.assert_array_equal(looked_up[t], expected)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
def test_any_leading_axes(leading):
    module, variables = EmbeddingTables(SIZES, 5), {"params": {"table": jnp.ones((19, 5))}}
    assert lookup(module, variables, jnp.zeros((*leading, 3), jnp.int32)).shape == (*leading, 3, 5)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32"])
def test_any_integers(dtype):
    """Offsets are added in int32, whatever the ids are stored in: 100 + 200 is beyond int8 and uint8."""
    ids = jnp.array([[100, 100]], dtype)
    assert concatenated_ids(ids, (200, 200)).tolist() == [[100, 300]]
    assert concatenated_ids(ids, (200, 100)).tolist() == [[100, 300]]  # the second is beyond: 300 rows in all
    assert concatenated_ids(ids, (200, 200)).dtype == jnp.int32


def test_ids_that_need_more_than_31_bits_are_out_of_range():
    """Cut to int32 they would be 3, or negative."""
    unsigned = jnp.array([2**31 + 3, 2**32 - 1, 3], jnp.uint32)
    assert concatenated_ids(unsigned[:, None], (7,))[:, 0].tolist() == [7, 7, 3]
    with jax.enable_x64(True):
        wide = jnp.array([2**32 + 3, -(2**32) + 3, 3], jnp.int64)
        assert concatenated_ids(wide[:, None], (7,))[:, 0].tolist() == [7, 7, 3]
        assert np.isnan(take_rows(jnp.ones((7, 1)), wide))[:, 0].tolist() == [True, True, False]


def test_table_gradient_is_the_transpose_of_a_one_hot_product():
    """Zero on every row not looked up, and duplicates add."""
    draw = np.random.default_rng(0)
    ids = jnp.asarray(draw.integers(0, 19, 40), jnp.int32) // 3 * 3
    table, cotangent = (jnp.asarray(draw.normal(size=(n, 4)), jnp.float32) for n in (19, 40))
    grads = jax.grad(lambda t: jnp.vdot(take_rows(t, ids), cotangent))(table)
    one_hot = np.asarray(ids)[:, None] == np.arange(19)
    np.testing.assert_allclose(grads, one_hot.T.astype(float) @ np.asarray(cotangent), rtol=1e-5, atol=1e-6)
    assert (grads[1::3] == 0).all()


def test_ids_out_of_range_leave_no_gradient():
    ids = jnp.array([-1, 19, 5])
    grads = jax.grad(lambda t: take_rows(t, ids)[2].sum())(jnp.ones((19, 2)))
    np.testing.assert_array_equal(grads, np.zeros((19, 2)) + (np.arange(19) == 5)[:, None])


def test_initial_rows_fill_their_published_bounds():
    """Uniform on +-1/sqrt(n_t), whatever the width is: no value beyond, and the variance 1 / (3 n_t)."""
    sizes = (4, 400, 100)
    table = np.asarray(init(EmbeddingTables(sizes, 64))["params"]["table"], np.float64)
    for rows, n in zip(np.split(table, np.cumsum(sizes)[:-1]), sizes, strict=True):
        bound, count = n**-0.5, rows.size
        assert np.abs(rows).max() <= bound * (1 + 1e-6)
        assert np.abs(rows).max() > bound * 0.95
        assert abs(rows.mean()) < 4 * bound / np.sqrt(3 * count)
        # u**2 has mean 1/3 and variance 4/45 for u uniform on +-1.
        assert abs(np.mean((rows / bound) ** 2) - 1 / 3) < 4 * np.sqrt(4 / 45 / count)


def test_the_whole_table_is_stored():
    variables = init(EmbeddingTables(SIZES, 6, param_dtype=jnp.bfloat16))
    assert stored_bytes(variables) == 19 * 6 * 2
    assert lookup(EmbeddingTables(SIZES, 6), variables, jnp.zeros((2, 3), jnp.int32)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), r"sizes are \(\); allowed are one or more tables"),
        ((3, 0), r"sizes are \(3, 0\)"),
        ((3, 2**31 - 3), "sizes sum to 2147483648 rows"),
        ((3, 4, 5), r"ids have shape \(1, 2\); their last axis must have 3 entries"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        concatenated_ids(jnp.zeros((1, 2), jnp.int32), sizes)


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_ids_must_be_integers(dtype):
    ids: Any = jnp.zeros((1, 3), dtype)
    for read in (lambda: concatenated_ids(ids, SIZES), lambda: take_rows(jnp.ones((3, 2)), ids)):
        with pytest.raises(TypeError, match="ids"):
            read()
