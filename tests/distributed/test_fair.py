"""A round of FAIR against loops over devices, its limits, and what travels."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hashml import sharing
from hashml.accounting import stored_bytes
from hashml.distributed.fair import (
    download,
    federated_round,
    pad_group,
    subspace_table,
    traffic,
    train_locally,
    whole_table,
)
from hashml.sharing.nested import nested_map

ADAM = optax.adam(0.05)


def close(found, expected, tolerance=2e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def one_device(state, group, place, loss, table_of, memory, skip=0) -> Any:
    """Adam, step by step, on one device; ``table_of`` reads rows off what it holds."""
    params: Any = (memory, state.shared, state.private[group.clients[place]])
    opt_state = ADAM.init(params)
    steps = group.active.shape[1] - skip
    for step in range(steps):
        batch = tuple(part[place, step] for part in group.batches)

        def objective(params, batch=batch):
            memory, shared, private = params
            return loss(lambda _, ids: table_of(memory)[ids], shared, private, batch)

        updates, opt_state = ADAM.update(jax.grad(objective)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.fixture
def mixed(setting):
    """Three classes of unequal numbers of devices: whole, a quarter, a sixteenth."""
    forms = [whole_table(), subspace_table(setting.make_map(2)), subspace_table(setting.make_map(4))]
    groups = [setting.group([0, 3], 1), setting.group([5, 1, 8], 2), setting.group([4], 3, empty=1)]
    return groups, [{"items": form} for form in forms]


def play(state, groups, classes, **options) -> Any:
    """A compiled round."""
    return jax.jit(lambda state, groups: federated_round(state, groups, classes, **options))(state, groups)


def whole(table) -> Any:
    return table


def looped(setting, groups, halvings, salt, aggregation="replace"):
    """The round of the paper, one device after the other, with dense tables at the server."""
    state = setting.state
    total = sum(float(group.weights.sum()) for group in groups)
    table, bias, private = np.zeros_like(state.tables["items"]), 0.0, np.array(state.private)
    for group, halving in zip(groups, halvings, strict=True):
        for place, client in enumerate(group.clients.tolist()):
            share = float(group.weights[place]) / total
            skip = int((~group.active[place]).sum())
            start, expand = state.tables["items"], whole
            if halving is not None:
                known = setting.make_map(halving)(salt)
                start, expand = sharing.collapse(known, start), partial(sharing.expand, known)
            memory, shared, own = one_device(state, group, place, setting.loss, expand, start, skip)
            change = expand(memory) - (expand(start) if aggregation == "delta" else 0)
            table = table + share * np.asarray(change)
            bias += share * float(shared["bias"])
            private[client] = own
    return table + (np.asarray(state.tables["items"]) if aggregation == "delta" else 0), bias, private


@pytest.mark.parametrize("aggregation", ["replace", "delta"])
def test_a_round_is_the_loop_over_its_devices(setting, mixed, aggregation):
    groups, classes = mixed
    found = play(setting.state, groups, classes, loss=setting.loss, optimizer=ADAM, aggregation=aggregation, salt=3)
    table, bias, private = looped(setting, groups, (None, 2, 4), 3, aggregation)
    close((found.tables["items"], found.shared["bias"], found.private), (table, np.float32(bias), private), 1e-4)


def test_users_that_were_not_sampled_stay_as_they_were(setting, mixed):
    groups, classes = mixed
    found = play(setting.state, groups, classes, loss=setting.loss, optimizer=ADAM)
    sampled = {int(client) for group in groups for client in group.clients}
    for client in range(len(setting.state.private)):
        same = (found.private[client] == setting.state.private[client]).all()
        assert same == (client not in sampled)


def test_whole_tables_are_fedavg(setting):
    """The weighted mean of what the devices came to."""
    group = setting.group([2, 7, 4])
    found = play(setting.state, [group], [{"items": whole_table()}], loss=setting.loss, optimizer=ADAM)
    ends = [
        one_device(setting.state, group, place, setting.loss, lambda m: m, setting.state.tables["items"])
        for place in range(3)
    ]
    share = np.asarray(group.weights / group.weights.sum())
    expected = sum(w * np.asarray(end[0]) for w, end in zip(share, ends, strict=True))
    close(found.tables["items"], expected)


def test_one_whole_device_continues_adam(setting):
    group = setting.group([6])
    found = play(setting.state, [group], [{"items": whole_table()}], loss=setting.loss, optimizer=ADAM)
    table, shared, own = one_device(setting.state, group, 0, setting.loss, lambda m: m, setting.state.tables["items"])
    close((found.tables["items"], found.shared, found.private[6]), (table, shared, own))


def test_averaging_commutes_with_expanding_at_one_size(setting):
    """mean of expand(psi) = expand(mean of psi) where all have one map, and not where each has its own."""
    rng = np.random.default_rng(0)
    memories, shares = rng.standard_normal((3, setting.sizes[2])).astype(np.float32), np.array([0.2, 0.5, 0.3])
    make = setting.make_map(2)

    def gap(maps):
        mean = np.einsum("k,kij->ij", shares, [sharing.expand(m, p) for m, p in zip(maps, memories, strict=True)])
        together = sharing.expand(maps[0], jnp.asarray(shares @ memories, jnp.float32))
        return np.abs(mean - np.asarray(together)).max()

    assert gap([make(0)] * 3) < 1e-6
    assert gap([make(0), make(1), make(2)]) > 0.1


def test_a_table_in_the_span_is_kept_where_nothing_is_learned(setting):
    """No step, one size: the mean of the projections of a projected table is the table."""
    known = setting.make_map(3)(0)
    table = sharing.expand(known, jnp.arange(known.budget, dtype=jnp.float32))
    state = setting.state._replace(tables={"items": table})
    group = setting.group([0, 1], empty=3)
    for halving in (1, 3):  # its own size, and a larger one whose span contains it
        forms = [{"items": subspace_table(setting.make_map(halving))}]
        found = play(state, [group], forms, loss=setting.loss, optimizer=ADAM)
        close(found.tables["items"], table)


def test_replacing_forgets_what_no_device_can_hold_and_delta_does_not(setting):
    group = setting.group([0, 1], empty=3)
    forms = [{"items": subspace_table(setting.make_map(2))}]
    table = setting.state.tables["items"]
    for aggregation, expected in [
        ("replace", sharing.expand(m := setting.make_map(2)(0), sharing.collapse(m, table))),
        ("delta", table),
    ]:
        found = play(setting.state, [group], forms, loss=setting.loss, optimizer=ADAM, aggregation=aggregation)
        close(found.tables["items"], expected)
    assert np.abs(sharing.expand(m, sharing.collapse(m, table)) - table).max() > 0.1


def test_places_that_are_not_taken_change_nothing(setting, mixed):
    groups, classes = mixed
    options = {"loss": setting.loss, "optimizer": ADAM}
    padded = [pad_group(group, 4) for group in groups]
    assert [group.clients.shape[0] for group in padded] == [4, 4, 4]
    expected = play(setting.state, groups, classes, **options)
    close(play(setting.state, padded, classes, **options), expected)
    close(play(setting.state, groups, classes, at_a_time=2, **options), expected)
    nobody = [jax.tree.map(jnp.zeros_like, group) for group in groups]
    close(play(setting.state, nobody, classes, **options), setting.state)


def test_devices_over_a_mesh_are_the_loop(setting, mixed):
    groups, classes = mixed
    mesh = jax.make_mesh((4,), ("clients",), devices=jax.devices()[:4])
    padded = [pad_group(group, 4) for group in groups]
    options = {"loss": setting.loss, "optimizer": ADAM}
    expected = play(setting.state, groups, classes, **options)
    found = play(setting.state, padded, classes, mesh=mesh, **options)
    close(found, expected)
    with pytest.raises(ValueError, match="a group of 2 devices cannot be split evenly over the 4 of mesh axis"):
        play(setting.state, groups, classes, mesh=mesh, **options)
    with pytest.raises(ValueError, match=r"axis is 'data'; allowed are the axes of the mesh, \('clients',\)"):
        play(setting.state, padded, classes, mesh=mesh, axis="data", **options)


def test_bytes_are_four_a_weight_and_the_rest(setting):
    for halving in (0, 2, 4):
        forms = {"items": subspace_table(setting.make_map(halving))}
        moved = traffic(forms, setting.state)
        assert moved.down == moved.up == 4 * setting.sizes[halving] + 4
        assert moved.down == stored_bytes((download(forms, setting.state.tables), setting.state.shared))
    assert traffic({"items": whole_table()}, setting.state).down == 4 * 20 * 4 + 4


def sizes_in(jaxpr):
    """Elements of every value of a program, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


def test_the_device_never_holds_the_table(setting):
    rows = 100_000
    forms = {"items": subspace_table(lambda salt: nested_map(rows, 4, 625, full_budget=400_000, salt=salt))}
    group = setting.group([0])
    batches = jax.tree.map(lambda leaf: leaf[0], group.batches)

    def device(memory):
        return train_locally(
            {"items": memory},
            setting.state.shared,
            setting.state.private[0],
            batches,
            group.active[0],
            forms=forms,
            loss=setting.loss,
            optimizer=ADAM,
        )

    memory = jnp.ones(625)
    assert max(sizes_in(jax.make_jaxpr(device)(memory).jaxpr)) < 1000 < rows
    assert np.abs(device(memory)[0]["items"] - memory).max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aggregation": "mean"}, "aggregation is 'mean'; it must be 'replace' or 'delta'"),
        ({"groups": []}, "got 0 groups and 1 classes"),
        ({"classes": [{"users": whole_table()}]}, r"forms are of tables \['users'\]; the server has \['items'\]"),
    ],
)
def test_bad_input_is_refused_by_name(setting, change, message):
    fields = {"groups": [setting.group([0])], "classes": [{"items": whole_table()}]} | change
    with pytest.raises(ValueError, match=message):
        play(setting.state, loss=setting.loss, optimizer=ADAM, **fields)


def test_groups_are_padded_to_at_least_one(setting):
    with pytest.raises(ValueError, match="multiple is 0; it must be at least 1"):
        pad_group(setting.group([0]), 0)
