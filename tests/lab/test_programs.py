"""A process that holds many compiled programs forgets them, and only then."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments.lab import programs


def test_programs_are_forgotten_beyond_the_limit():
    if not programs.MAPPINGS.exists():
        pytest.skip("no /proc/self/maps here")
    double: Any = jax.jit(lambda x: 2 * x)
    double(jnp.ones(3))
    assert double._cache_size() == 1
    assert not programs.forget_programs(most=10**9)
    assert double._cache_size() == 1
    assert programs.forget_programs(most=0)
    assert double._cache_size() == 0
    assert double(jnp.ones(3)).tolist() == [2, 2, 2]


def test_nothing_is_done_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(programs, "MAPPINGS", tmp_path / "maps")
    assert not programs.forget_programs(most=0)
