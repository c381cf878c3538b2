from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.embeddings import (
    PADDING,
    EmbeddingTables,
    adagrad_rows,
    coalesce,
    concatenated_ids,
    rowwise_adagrad_rows,
    sgd_rows,
    take_rows,
)
from hashml.models import DLRM, binary_cross_entropy

ROWS, WIDTH = 23, 4


def random_step(seed, size=40):
    """Ids with many duplicates, and gradients that float32 adds exactly: multiples of 2**-10."""
    draw = np.random.default_rng(seed)
    ids = jnp.asarray(draw.zipf(1.3, size) % (ROWS - 3), jnp.int32)
    grads = jnp.asarray(draw.integers(-(2**12), 2**12, (size, WIDTH)) * 2.0**-10, jnp.float32)
    return ids, grads


def random_table(seed=0):
    return jax.random.normal(jax.random.key(seed), (ROWS, WIDTH))


def dense_gradient(ids, row_grads):
    return jnp.zeros((ROWS, WIDTH)).at[ids].add(row_grads)


def dense_updates(optimizer, table, steps):
    """What optax does to the whole table, with a gradient of the whole table."""
    state = optimizer.init(table)
    for ids, row_grads in steps:
        updates, state = optimizer.update(dense_gradient(ids, row_grads), state, table)
        table = optax.apply_updates(table, updates)
    return table


# --- coalesce -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.sampled_from([0, 1, 6, 12]).flatmap(lambda n: st.lists(st.integers(-3, 9), min_size=n, max_size=n)),
    st.integers(0, 99),
)
def test_coalesce_sums_by_id(ids, seed):
    grads = np.random.default_rng(seed).integers(-8, 8, (len(ids), 2)).astype(np.float32)
    expected: dict[int, Any] = {}
    for v, g in zip(ids, grads, strict=True):
        expected[v] = expected.get(v, 0) + g
    unique, sums = jax.jit(coalesce)(jnp.asarray(ids, jnp.int32), jnp.asarray(grads))
    assert unique.shape == (len(ids),)
    assert sums.shape == (len(ids), 2)
    found = {v: s for v, s in zip(unique.tolist(), np.asarray(sums), strict=True) if v != PADDING}
    assert list(found) == sorted(v for v in expected if v >= 0)
    for v, s in found.items():
        np.testing.assert_array_equal(s, expected[v])
    # Places that are not in use are zero; one of them holds the negative ids' gradients.
    padding = np.asarray(sums)[np.asarray(unique) == PADDING]
    assert (np.abs(padding).sum(axis=1) > 0).sum() <= 1


def test_coalesce_sums_in_float32():
    """A thousand gradients of 1 are 1,000; bfloat16, which has 8 bits, would stop counting at 256."""
    ids, sums = jax.jit(coalesce)(jnp.zeros(1000, jnp.int32), jnp.ones((1000, 1), jnp.bfloat16))
    assert sums.dtype == jnp.float32
    assert sums[0].item() == 1000
    assert (ids[1:] == PADDING).all()


def test_coalesce_keeps_wide_ids_apart():
    ids, _ = jax.jit(coalesce)(jnp.array([2**31 + 5, 5, 2**32 - 1], jnp.uint32), jnp.ones((3, 1)))
    assert ids.tolist() == [5, PADDING, PADDING]


# --- equal to the dense optimiser -------------------------------------------------------------------


def test_sgd_equals_optax():
    steps, table = [random_step(seed) for seed in range(3)], random_table()
    # A learning rate of a quarter keeps sums of updates exact, in whatever order they are taken.
    expected = dense_updates(optax.sgd(0.25), jnp.round(table * 64) / 64, steps)
    found = jnp.round(table * 64) / 64
    for ids, grads in steps:
        found = jax.jit(sgd_rows)(found, ids, grads, 0.25)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("initial", "eps"), [(0.1, 1e-7), (0.0, 1e-7), (1.0, 1e-2)])
def test_adagrad_equals_optax_bit_for_bit(initial, eps):
    """Operation by operation, as optax runs outside of jit; XLA may round a fused product once, not twice."""
    steps, table = [random_step(seed) for seed in range(3)], random_table()
    optimizer = optax.adagrad(0.3, initial_accumulator_value=initial, eps=eps)
    found, sums = table, jnp.full_like(table, initial)
    for ids, grads in steps:
        found, sums = adagrad_rows(found, sums, ids, grads, 0.3, eps=eps)
    np.testing.assert_array_equal(found, dense_updates(optimizer, table, steps))
    total = sum(np.asarray(dense_gradient(*step), np.float64) ** 2 for step in steps)
    np.testing.assert_allclose(sums, initial + total, rtol=1e-6)


def test_adagrad_without_coalescing_would_differ():
    """The reason for the sort: (g + g)**2 is not g**2 + g**2."""
    ids, grads = jnp.array([2, 2]), jnp.ones((2, WIDTH))
    zeros = jnp.zeros((ROWS, WIDTH))
    _, sums = jax.jit(adagrad_rows)(zeros, zeros, ids, grads, 0.1)
    np.testing.assert_array_equal(sums[2], 4.0)


def rowwise_by_loop(table, sums, ids, grads, learning_rate, eps=1e-10):
    """The reference implementation's update, in float64, a row at a time."""
    table, sums = np.array(table, np.float64), np.array(sums, np.float64)
    for v in set(np.asarray(ids).tolist()):
        g = np.asarray(grads, np.float64)[np.asarray(ids) == v].sum(axis=0)
        sums[v] += np.mean(g**2)
        table[v] -= learning_rate * g / (np.sqrt(sums[v]) + eps)
    return table, sums


def test_rowwise_adagrad_equals_the_loop():
    table, sums = random_table(), jnp.zeros(ROWS)
    expected, expected_sums = np.asarray(table), np.asarray(sums)
    for seed in range(3):
        ids, grads = random_step(seed)
        table, sums = jax.jit(rowwise_adagrad_rows)(table, sums, ids, grads, 0.1)
        expected, expected_sums = rowwise_by_loop(expected, expected_sums, ids, grads, 0.1)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5)
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-6)


def test_rowwise_adagrad_of_width_one_is_adagrad():
    """Up to the place of eps, which is below float32's resolution here."""
    ids, grads = random_step(0)
    table = random_table()[:, :1]
    zeros = jnp.zeros((ROWS, 1))
    by_row, row_sums = jax.jit(rowwise_adagrad_rows)(table, zeros[:, 0], ids, grads[:, :1], 0.1)
    by_entry, sums = jax.jit(partial(adagrad_rows, eps=1e-10))(table, zeros, ids, grads[:, :1], 0.1)
    np.testing.assert_allclose(row_sums, sums[:, 0], rtol=1e-6)
    np.testing.assert_allclose(by_row, by_entry, rtol=1e-6, atol=1e-7)


# --- what holds of all three ------------------------------------------------------------------------


@jax.jit
def rowwise(table, ids, grads):
    return rowwise_adagrad_rows(table, jnp.zeros(table.shape[0]), ids, grads, 0.1)[0]


@jax.jit
def elementwise(table, ids, grads):
    return adagrad_rows(table, jnp.full_like(table, 0.1), ids, grads, 0.1)[0]


@jax.jit
def sgd(table, ids, grads):
    return sgd_rows(table, ids, grads, 0.1)


UPDATES = pytest.mark.parametrize("update", [sgd, elementwise, rowwise])


@UPDATES
def test_only_looked_up_rows_move(update):
    ids, grads = random_step(0)
    moved = np.any(np.asarray(update(random_table(), ids, grads) != random_table()), axis=1)
    touched = np.any(np.asarray(dense_gradient(ids, grads)) != 0, axis=1)
    np.testing.assert_array_equal(moved, touched)
    assert not moved.all()


@UPDATES
def test_ids_outside_the_table_change_nothing(update):
    ids = jnp.array([-1, ROWS, PADDING, -ROWS, -(2**31), 5])
    grads = jnp.ones((6, WIDTH))
    expected = update(random_table(), ids[5:], grads[5:])
    np.testing.assert_array_equal(update(random_table(), ids, grads), expected)


@UPDATES
def test_an_empty_batch_changes_nothing(update):
    found = update(random_table(), jnp.zeros(0, jnp.int32), jnp.zeros((0, WIDTH)))
    np.testing.assert_array_equal(found, random_table())


@UPDATES
def test_the_order_of_the_batch_does_not_matter(update):
    ids, grads = random_step(0)
    order = np.random.default_rng(0).permutation(len(ids))
    np.testing.assert_allclose(
        update(random_table(), ids[order], grads[order]), update(random_table(), ids, grads), rtol=1e-6, atol=1e-6
    )


@UPDATES
def test_a_bfloat16_table_rounds_once_a_row(update):
    """512 gradients of one row: one by one, each would be lost beside a weight of 256."""
    table = jnp.full((3, WIDTH), 256, jnp.bfloat16)
    found = update(table, jnp.ones(512, jnp.int32), jnp.full((512, WIDTH), -1.0, jnp.bfloat16))
    wide = update(table.astype(jnp.float32), jnp.ones(512, jnp.int32), jnp.full((512, WIDTH), -1.0))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wide, rtol=2**-8)


@pytest.mark.parametrize(
    ("update", "shapes"),
    [
        (partial(sgd_rows, learning_rate=0.1), ["table"]),
        (partial(adagrad_rows, learning_rate=0.1), ["table", "table"]),
        (partial(rowwise_adagrad_rows, learning_rate=0.1), ["table", "column"]),
    ],
    ids=["sgd", "adagrad", "rowwise"],
)
def test_no_second_array_of_the_tables_size(update, shapes):
    """Donated, table and accumulator are updated in place; all else is of the batch's size."""
    rows, width, batch = 100_000, 16, 256
    forms = {"table": (rows, width), "column": (rows,)}
    stores = [jax.ShapeDtypeStruct(forms[shape], jnp.float32) for shape in shapes]
    ids, grads = (jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((batch, width), jnp.float32))
    compiled = jax.jit(update, donate_argnums=range(len(stores))).lower(*stores, ids, grads).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == sum(4 * int(np.prod(store.shape)) for store in stores)
    assert memory.temp_size_in_bytes < 16 * batch * width * 4


def test_a_dlrm_step_through_rows_equals_the_dense_step():
    """The whole path: gather, differentiate by rows, update; against jax.grad and optax on every array."""
    sizes, width = (9, 30, 4), 4
    model = DLRM(EmbeddingTables(sizes, width), bottom=(8, width), top=(8, 1))
    draw = np.random.default_rng(0)
    dense, labels = jnp.asarray(draw.normal(size=(64, 3)), jnp.float32), jnp.asarray(draw.integers(0, 2, 64))
    ids = jnp.asarray(np.stack([draw.integers(0, n, 64) for n in sizes], axis=1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), dense, ids)
    variables: Any = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), shapes)
    optimizer = optax.adagrad(0.1)

    def loss_of(variables, *args, method=None) -> Any:
        return binary_cross_entropy(jnp.asarray(model.apply(variables, dense, *args, method=method)), labels)

    def optax_step(variables, grads) -> Any:
        updates, _ = optimizer.update(grads, optimizer.init(variables), variables)
        return optax.apply_updates(variables, updates)

    @jax.jit
    def dense_step(variables):
        loss, grads = jax.value_and_grad(loss_of)(variables, ids)
        return loss, optax_step(variables, grads)

    @jax.jit
    def row_step(table, head):
        rows = concatenated_ids(ids, sizes)
        loss, (head_grads, row_grads) = jax.value_and_grad(partial(loss_of, method="head"), argnums=(0, 1))(
            head, take_rows(table, rows)
        )
        table, _ = adagrad_rows(table, jnp.full_like(table, 0.1), rows.reshape(-1), row_grads.reshape(-1, width), 0.1)
        return loss, table, optax_step(head, head_grads)

    expected_loss, expected = dense_step(variables)
    expected_table = expected["params"].pop("embedding")["table"]
    loss, table, head = row_step(variables["params"].pop("embedding")["table"], variables)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(table, expected_table, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(head) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(head), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [jnp.zeros((2, 2), jnp.int32), jnp.zeros(3, jnp.int32)])
def test_shapes_that_do_not_fit(ids):
    grads = jnp.zeros((2, WIDTH))
    for update in (coalesce, partial(sgd_rows, random_table(), learning_rate=0.1)):
        with pytest.raises((ValueError, TypeError), match="ids"):
            update(ids=ids, row_grads=grads)


def test_ids_must_be_integers():
    for update in (coalesce, partial(sgd_rows, random_table(), learning_rate=0.1)):
        with pytest.raises(TypeError, match="ids"):
            update(ids=jnp.zeros(2), row_grads=jnp.zeros((2, WIDTH)))
