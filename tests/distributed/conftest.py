"""A small federation: matrix factorisation by least squares, whose steps a loop can follow."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.distributed.fair import DeviceGroup, ServerState
from hashml.sharing.nested import nested_budgets, nested_map

ITEMS, FEATURES, CLIENTS = 20, 4, 9


class Setting(NamedTuple):
    """What the tests of the family share."""

    state: ServerState
    sizes: tuple[int, ...]
    loss: Any
    group: Any
    make_map: Any


def loss(rows: Any, shared: Any, private: Any, batch: Any) -> Any:
    """Weighted squared error of <row, user> + bias."""
    ids, targets, weights = batch
    found = rows("items", ids) @ private + shared["bias"]
    return (weights * (found - targets) ** 2).sum() / weights.sum()


def make_group(clients, seed=0, steps=3, batch=5, empty=0) -> DeviceGroup:
    """Random data; the last ``empty`` steps of each device hold none."""
    rng = np.random.default_rng(seed)
    count = len(clients)
    shape = (count, steps, batch)
    active = np.ones((count, steps), bool)
    active[:, steps - empty :] = False
    batches = (
        jnp.asarray(rng.integers(0, ITEMS, shape), jnp.int32),
        jnp.asarray(rng.standard_normal(shape), jnp.float32),
        jnp.asarray(np.where(active[..., None], 1.0, 0.0) * np.ones(shape), jnp.float32),
    )
    weights = jnp.asarray(rng.integers(1, 9, count), jnp.float32)
    return DeviceGroup(jnp.asarray(clients, jnp.int32), weights, batches, jnp.asarray(active))


@pytest.fixture(scope="session")
def setting() -> Setting:
    rng = np.random.default_rng(0)
    state = ServerState(
        {"items": jnp.asarray(rng.standard_normal((ITEMS, FEATURES)), jnp.float32)},
        {"bias": jnp.float32(0.3)},
        jnp.asarray(rng.standard_normal((CLIENTS, FEATURES)), jnp.float32),
    )
    sizes = nested_budgets(ITEMS * FEATURES, 4)

    def make_map(halvings):
        return lambda salt: nested_map(ITEMS, FEATURES, sizes[halvings], full_budget=sizes[0], salt=salt)

    assert len(jax.devices()) >= 4
    return Setting(state, sizes, loss, make_group, make_map)
