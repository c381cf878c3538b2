"""Who is called when, and that ratios are taken within a repetition. No time is judged."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lab import compare, timing


def test_functions_take_turns_in_an_order_that_the_seed_draws():
    def calls(seed):
        called = []
        functions = {name: lambda name=name: called.append(name) for name in "abc"}
        compare(functions, base="a", repetitions=20, warmup=2, seed=seed)
        return called

    called = calls(seed=0)
    assert collections.Counter(called) == dict.fromkeys("abc", 22)
    assert called[:6] == ["a", "b", "c"] * 2
    turns = [tuple(called[i : i + 3]) for i in range(6, len(called), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 2
    assert calls(seed=0) == called
    assert calls(seed=1) != called


def test_a_ratio_is_of_the_same_repetition(monkeypatch):
    """With a clock of our own: the machine drifts a hundredfold, the ratio stays 3."""
    now = 0.0
    drift = iter(np.repeat(np.geomspace(1, 100, 9), 2))

    def work(amount):
        nonlocal now
        now += amount * next(drift)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    timings = compare({"xla": lambda: work(1.0), "slow": lambda: work(3.0)}, base="xla", repetitions=9, warmup=0)
    assert timings["xla"][3:] == (1.0, 1.0, 1.0)
    assert timings["slow"][3:] == pytest.approx((3.0, 3.0, 3.0))
    expected = np.quantile(np.geomspace(1, 100, 9), [0.5, 0.25, 0.75])
    assert timings["xla"][:3] == pytest.approx(expected)
    assert timings["slow"][:3] == pytest.approx(3 * expected)


def test_results_of_jax_and_torch_are_waited_for():
    torch = pytest.importorskip("torch", reason="the peer is not installed (make peers)")
    waited = []

    @jax.jit
    def f(x):
        jax.debug.callback(lambda: waited.append(True))
        return {"sum": x.sum(), "parts": (x, x + 1)}

    timing.wait((f(jnp.ones(1000)), torch.ones(3), None))
    jax.effects_barrier()
    assert waited == [True]
    timings = compare(
        {"jax": lambda: f(jnp.ones(10)), "torch": lambda: torch.ones(10).sum()}, base="jax", repetitions=6
    )
    assert set(timings) == {"jax", "torch"}
    assert all(t.seconds_lower <= t.seconds <= t.seconds_upper for t in timings.values())
    assert set(timings["jax"]._asdict()) >= {"seconds", "ratio", "ratio_low", "ratio_high"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "b"}, "base must be one of a, got 'b'"),
        ({"base": "a", "repetitions": 5}, "repetitions must be at least 6, got 5"),
        ({"base": "a", "warmup": -1}, "warmup must not be negative, got -1"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        compare({"a": lambda: None}, **options)
