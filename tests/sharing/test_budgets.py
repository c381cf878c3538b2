"""A budget is what was asked for, to the weight, or an error that names what was not possible."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashml.sharing.budgets import check_positive, resolve_budget


@given(
    st.integers(1, 2**50),
    st.one_of(st.integers(1, 10**6), st.floats(1, 1e6)),
    st.integers(1, 256),
)
def test_compression_is_at_least_what_was_asked_and_no_more_than_needed(virtual, compression, multiple_of):
    asked = Fraction(compression)
    if virtual / asked < multiple_of:
        with pytest.raises(ValueError, match="budget is 0"):
            resolve_budget(virtual, budget=None, compression=compression, multiple_of=multiple_of)
        return
    budget = resolve_budget(virtual, budget=None, compression=compression, multiple_of=multiple_of)
    assert budget % multiple_of == 0
    assert Fraction(virtual, budget) >= asked
    assert Fraction(virtual, budget + multiple_of) < asked


def test_a_given_budget_is_kept():
    assert resolve_budget(100, budget=17, compression=None, at_least=17) == 17
    assert resolve_budget(100, budget=96, compression=None, multiple_of=32) == 96


def test_compression_one_stores_every_weight():
    assert resolve_budget(12345, budget=None, compression=1) == 12345


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ValueError, "give exactly one of budget (got None) and compression (got None)"),
        ({"budget": 8, "compression": 2}, ValueError, "give exactly one of budget (got 8) and compression (got 2)"),
        ({"compression": 0.99}, ValueError, "compression is 0.99; it must be finite, and at least 1"),
        ({"compression": -3}, ValueError, "compression is -3; it must be finite, and at least 1"),
        ({"compression": math.nan}, ValueError, "compression is nan; it must be finite, and at least 1"),
        ({"compression": math.inf}, ValueError, "compression is inf; it must be finite, and at least 1"),
        ({"compression": True}, TypeError, "compression is True; it must be a number"),
        ({"budget": True}, TypeError, "budget is True; it must be an int"),
        ({"budget": 7, "at_least": 8}, ValueError, "budget is 7; it must be at least 8"),
        (
            {"compression": 20, "at_least": 8},
            ValueError,
            "budget is 5 (compression 20 of 100 weights); it must be at least 8",
        ),
        ({"budget": 33, "multiple_of": 32}, ValueError, "budget is 33; it must be a multiple of 32"),
    ],
)
def test_what_is_not_possible_is_refused_by_name(fields, error, message):
    with pytest.raises(error) as caught:
        resolve_budget(100, **{"budget": None, "compression": None} | fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "features is 0; it must be at least 1"),
        (-2, ValueError, "features is -2; it must be at least 1"),
        (2.0, TypeError, "features is 2.0; it must be an int"),
        (True, TypeError, "features is True; it must be an int"),
        (None, TypeError, "features is None; it must be an int"),
    ],
)
def test_sizes_are_positive_ints(value, error, message):
    check_positive(block_size=1, features=np.int32(3))
    with pytest.raises(error, match=message):
        check_positive(block_size=1, features=value)
