"""Quest ranks pages: its lists are those of ranking every token by the bound of its page, entry for entry."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.attention.quest import Quest
from hashml.attention.selector_contract import Selector

B, K, H, D, SLOTS = 2, 2, 4, 8, 203
SIZES: dict[str, Any] = {"sinks": 3, "window": 6, "heavy": 25}


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.standard_normal((B, K, SLOTS, D)), jnp.float32)
    # Few different numbers, so that pages tie.
    q = jnp.asarray(rng.integers(-1, 2, (B, H, D)), jnp.float32)
    return jnp.round(keys), q


@pytest.fixture(scope="module")
def programs():
    selector = Quest(page_size=8)

    @jax.jit
    def both(keys, q, positions, query_pos):
        index = selector.build(keys, keys, positions)
        where = (index, q, positions, query_pos)
        return tuple(
            (of(selector, *where, **SIZES, gqa="head"), of(selector, *where, **SIZES, gqa="max"))
            for of in (Quest.select, Selector.select)
        )

    return both


def positions_of(name):
    """What lies in order, what has holes, what is short, and a ring whose oldest token lies in the middle."""
    order = np.arange(SLOTS)
    return {
        "whole": (order, SLOTS - 1),
        "part": (np.where(order < 150, order, -1), 149),
        "later": (order, 120),
        "short": (np.where(order < 7, order, -1), 6),
        # A token a page: pages hold fewer tokens than are wanted, and tokens are ranked after all.
        "holes": (np.where(order % 8 == 5, order, -1), SLOTS - 1),
        "ring": ((order - 77) % SLOTS, SLOTS - 1),
    }[name]


@pytest.mark.parametrize("name", ["whole", "part", "later", "short", "holes", "ring"])
def test_lists_are_those_of_ranking_tokens(operands, programs, name):
    positions, now = positions_of(name)
    positions = jnp.broadcast_to(jnp.asarray(positions, jnp.int32), (B, 1, SLOTS))
    found, expected = programs(*operands, positions, jnp.full((B,), now, jnp.int32))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine.valid, theirs.valid)
        np.testing.assert_array_equal(np.where(mine.valid, mine.idx, -1), np.where(theirs.valid, theirs.idx, -1))
        np.testing.assert_array_equal(mine.weight, np.ones(mine.idx.shape))
    seen = int((np.asarray(positions[0, 0]) >= 0).sum())
    if name != "later":
        assert set(np.asarray(found[0].valid).sum(axis=2).flat) == {min(34, seen)}
