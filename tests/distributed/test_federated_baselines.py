"""The baselines' forms against linear algebra, and their rounds against what each must and must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hashml import sharing
from hashml.distributed.fair import device_salts, federated_round, subspace_table, traffic, whole_table
from hashml.distributed.federated_baselines import (
    drop_small,
    low_rank_table,
    low_rank_within,
    own_subspace_table,
    per_size_round,
    sliced_table,
    smallest_for_all,
    width_within,
)

ADAM = optax.adam(0.05)


def still(setting, form, clients=(0, 1), **options):
    """The table after a round in which no device makes a step."""
    group = setting.group(list(clients), empty=3)
    return federated_round(setting.state, [group], [{"items": form}], loss=setting.loss, optimizer=ADAM, **options)


def test_who_takes_part():
    capacities = [1, 0.25, 0.0625, 1, 0.25]
    np.testing.assert_array_equal(drop_small(capacities), [True, False, False, True, False])
    np.testing.assert_array_equal(drop_small(capacities, least=0.25), [True, True, False, True, True])
    np.testing.assert_array_equal(smallest_for_all(capacities), [0.0625] * 5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_low_rank_table_is_the_best_of_its_rank(setting, rank):
    """Eckart and Young: the error is the norm of the singular values left out."""
    form, table = low_rank_table(rank), setting.state.tables["items"]
    left, right = form.download(table, 0)
    assert left.shape == (20, rank)
    assert right.shape == (rank, 4)
    values = np.linalg.svd(np.asarray(table), compute_uv=False)
    error = np.linalg.norm(form.upload((left, right), 0) - table)
    np.testing.assert_allclose(error, np.sqrt((values[rank:] ** 2).sum()), rtol=1e-4, atol=1e-4)
    ids = jnp.array([[3, 19], [0, 3]])
    np.testing.assert_allclose(
        form.read((left, right), ids, 0), form.upload((left, right), 0)[ids], rtol=1e-5, atol=1e-6
    )
    assert traffic({"items": form}, setting.state).down == 4 * rank * 24 + 4


def test_products_are_averaged_and_not_factors(setting):
    """One device after the other, each multiplied out: the mean of products has a greater rank."""
    form, group = low_rank_table(1), setting.group([2, 5, 7])

    def one_round(groups):
        return federated_round(
            setting.state, groups, [{"items": form}] * len(groups), loss=setting.loss, optimizer=ADAM
        ).tables["items"]

    together = one_round([group])
    alone = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], group) for i in range(3)]
    shares = np.asarray(group.weights / group.weights.sum())
    expected = np.einsum("k,kij->ij", shares, [one_round([one]) for one in alone])
    np.testing.assert_allclose(together, expected, rtol=1e-4, atol=1e-5)
    assert np.linalg.matrix_rank(np.asarray(together), tol=1e-3) > 1


def test_a_column_is_averaged_over_those_who_hold_it(setting):
    """A whole device and one of the first two columns; the others stay the whole device's alone."""
    groups = [setting.group([0], 1), setting.group([1], 2)]
    classes = [{"items": whole_table()}, {"items": sliced_table(4, 2)}]
    options = {"loss": setting.loss, "optimizer": ADAM}
    both = federated_round(setting.state, groups, classes, **options).tables["items"]
    first, second = (
        federated_round(setting.state, [group], [forms], **options).tables["items"]
        for group, forms in zip(groups, classes, strict=True)
    )
    weights = np.array([float(group.weights[0]) for group in groups])
    expected = (weights[0] * first + weights[1] * second) / weights.sum()
    np.testing.assert_allclose(both[:, :2], expected[:, :2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(both[:, 2:], first[:, 2:], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(second[:, 2:], setting.state.tables["items"][:, 2:])
    assert traffic(classes[1], setting.state).down == 4 * 20 * 2 + 4


def test_a_device_reads_zeros_where_it_holds_no_column(setting):
    form = sliced_table(4, 3)
    rows = form.read(form.download(setting.state.tables["items"], 0), jnp.array([4]), 0)
    np.testing.assert_array_equal(rows[0, :3], setting.state.tables["items"][4, :3])
    assert rows[0, 3] == 0


def test_own_maps_are_the_mean_of_their_projections(setting):
    """Consistent devices project once; those with maps of their own each to another place."""
    make, group = setting.make_map(3), setting.group([2, 6])
    found = federated_round(
        setting.state,
        [group._replace(active=jnp.zeros_like(group.active))],
        [{"items": own_subspace_table(make)}],
        loss=setting.loss,
        optimizer=ADAM,
        salt=9,
    ).tables["items"]
    table, shares = setting.state.tables["items"], np.asarray(group.weights / group.weights.sum())
    salts = [int(salt) for salt in device_salts(9, group.clients)]
    assert len(set(salts)) == 2
    maps = [make(salt) for salt in salts]
    parts = [sharing.expand(m, sharing.collapse(m, table)) for m in maps]
    np.testing.assert_allclose(found, np.einsum("k,kij->ij", shares, parts), rtol=1e-5, atol=1e-5)
    again = sharing.expand(maps[0], sharing.collapse(maps[0], found))
    assert np.abs(again - found).max() > 0.05  # it is in nobody's span


def test_a_round_without_learning_is_idempotent_only_where_maps_agree(setting):
    for form, same in [(subspace_table(setting.make_map(3)), True), (own_subspace_table(setting.make_map(3)), False)]:
        once = still(setting, form)
        twice = still(setting._replace(state=once), form)
        gap = np.abs(twice.tables["items"] - once.tables["items"]).max()
        assert (gap < 1e-5) == same


def test_nothing_flows_between_sizes(setting):
    groups = [setting.group([0, 1], 1), setting.group([2], 2)]
    classes = [{"items": whole_table()}, {"items": subspace_table(setting.make_map(2))}]
    options = {"loss": setting.loss, "optimizer": ADAM}
    found = per_size_round([setting.state] * 2, groups, classes, **options)
    other = per_size_round([setting.state] * 2, [groups[0], setting.group([3], 5)], classes, **options)
    np.testing.assert_array_equal(found[0].tables["items"], other[0].tables["items"])
    assert np.abs(found[1].tables["items"] - other[1].tables["items"]).max() > 0


def test_sizes_within_a_capacity_fit_and_the_next_do_not():
    for capacity in (1, 0.5, 0.25, 0.0625):
        width, rank = width_within(8, capacity), low_rank_within(3706, 8, capacity)
        assert width <= 8 * capacity < width + 1
        assert rank * (3706 + 8) <= 3706 * 8 * capacity < (rank + 1) * (3706 + 8)
    assert width_within(8, 0.0625) == 0
    assert low_rank_within(3706, 8, 0.0625) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drop_small([0.5, 0.25]), "least is 1; no device has that capacity, the largest being 0.5"),
        (lambda: drop_small([2.0]), r"capacities hold \[2.0\]; they must be in \(0, 1\]"),
        (lambda: smallest_for_all([0.5, 0]), r"capacities hold \[0.0\]; they must be in"),
        (lambda: sliced_table(4, 5), "width is 5; it must not exceed columns = 4"),
        (lambda: sliced_table(4, 0), "width is 0; it must be at least 1"),
        (lambda: low_rank_table(0), "rank is 0; it must be at least 1"),
        (lambda: low_rank_table(3).download(jnp.ones((9, 2)), 0), r"rank is 3; a table of shape \(9, 2\) has rank 2"),
        (lambda: low_rank_within(0, 2, 1), "rows is 0; it must be at least 1"),
        (lambda: per_size_round([], [], [{}]), "got 0 states, 0 groups and 1 classes"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
