"""What is timed computes the same, the pass in chunks is that over everything, and claims read times made by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from experiments.attention import race_scaling
from experiments.lab import NotEnoughRows, figures
from experiments.lab.claims import judge
from hashml.attention.race import race_attention
from hashml.hashing.simhash import srp_planes

TINY = race_scaling.SCALES["tiny"]

EXPERIMENT = "attention.race_scaling"


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    assert (rows["seconds"] > 0).all()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == 2 * len(TINY.lengths) + 1
    assert figures.describe(figures.draw(found.figure, rows))


def test_the_pass_in_chunks_is_that_over_everything(finished):
    """600 tokens, which are 3 chunks of 256, against one call on all of them and its gradient."""
    _, rows = finished
    row = rows.filter(pl.col("pass") == "streamed").row(0, named=True)
    words = race_scaling.noise(TINY)
    q, k, v, g = (
        jnp.concatenate([race_scaling.made(words, chunk, which) for chunk in range(3)], axis=2) for which in range(4)
    )
    planes = srp_planes(jax.random.key(0), TINY.tables, TINY.bits, TINY.features)

    @jax.jit
    def whole(q, k, v, g):
        out, pull = jax.vjp(lambda q, k, v: race_attention(q, k, v, planes), q, k, v)
        return out, *pull(g)

    for name, array in zip(("out", "d_q", "d_k", "d_v"), whole(q, k, v, g), strict=True):
        expected = np.square(np.asarray(array, np.float64)).sum()
        assert row[f"{name}_square"] == pytest.approx(expected, rel=1e-4), name
    assert row["tokens_passed"] == 768
    assert row["peak_bytes"] > 10_000_000  # Python and JAX alone take more


def test_made_numbers_are_uniform_and_differ_between_chunks_and_arrays():
    words = race_scaling.noise(dataclasses.replace(TINY, chunk=4096))
    arrays = np.stack([np.ravel(race_scaling.made(words, chunk, which)) for chunk in (0, 1) for which in (0, 3)])
    n = arrays.shape[1]
    # Of a uniform variable of variance 1 the square has variance 9/5 - 1.
    assert np.abs(arrays.mean(axis=1)).max() < 4.5 / math.sqrt(n)
    assert np.abs((arrays**2).mean(axis=1) - 1).max() < 4.5 * math.sqrt(0.8 / n)
    assert np.abs(np.corrcoef(arrays) - np.eye(4)).max() < 4.5 / math.sqrt(n)


def test_methods_that_are_timed_compute_attention():
    """Softmax in JAX and in PyTorch against NumPy, gradients against each other."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 1, 64, 8), dtype=np.float32) for _ in range(4)]
    q, k, v, _ = (x[0, 0].astype(np.float64) for x in arrays)
    weights = np.exp(q @ k.T / math.sqrt(8))
    found = race_scaling.timed(TINY, "forward", "softmax", arrays)()
    np.testing.assert_allclose(found[0, 0], weights @ v / weights.sum(1, keepdims=True), rtol=1e-4, atol=1e-5)
    if not race_scaling.torch_is_here():
        pytest.skip("PyTorch is not installed")
    np.testing.assert_allclose(race_scaling.timed(TINY, "forward", "torch", arrays)(), found, rtol=1e-4, atol=1e-5)
    ours = race_scaling.timed(TINY, "gradient", "softmax", arrays)()[1:]
    theirs = race_scaling.timed(TINY, "gradient", "torch", arrays)()
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(other, mine, rtol=1e-4, atol=1e-5)


def by_hand(crossing: int) -> pl.DataFrame:
    """RACE takes N microseconds, softmax N**2 / crossing; each repetition is slower as a whole."""
    lengths = race_scaling.SCALES["default"].lengths
    rows = [
        {"pass": direction, "method": method, "tokens": n, "repetition": at, "seconds": 1e-6 * time(n) * (1 + at)}
        for direction in race_scaling.PASSES
        for method, time in (
            ("race", lambda n: n),
            ("race_causal", lambda n: n**1.2),
            ("softmax", lambda n: n**2 / crossing),
            ("torch", lambda n: n**2 / crossing),
            ("torch_causal", lambda n: n**2 / crossing),
        )
        for n in lengths
        for at in range(7)
    ]
    return pl.DataFrame(rows)


def test_claims_read_slopes_crossings_and_ratios():
    claims = {claim.id: claim for claim in race_scaling.CLAIMS}
    rows = by_hand(1500)
    slope = claims["slope-race"].measure(rows)
    assert slope.value == pytest.approx(1)
    assert claims["slope-race"].holds(slope)
    slope = claims["slope-race_causal"].measure(rows)
    assert slope.value == pytest.approx(1.2)
    assert not claims["slope-race_causal"].holds(slope)
    assert claims["slope-softmax"].measure(rows).value == pytest.approx(2)
    assert claims["slope-torch"].measure(rows).note.startswith("65536 to 262144")
    crossing = claims["crossover-forward"].measure(rows)
    assert crossing.value == pytest.approx(1500)
    assert claims["crossover-forward"].holds(crossing)
    assert claims["forward-16k"].measure(rows).value == pytest.approx(16 * 1024 / 1500)
    late = claims["crossover-gradient"].measure(by_hand(100_000))
    assert late.value == pytest.approx(100_000)
    assert not claims["crossover-gradient"].holds(late)
    assert claims["crossover-gradient"].measure(by_hand(10**9)).value == math.inf
    assert claims["crossover-gradient"].measure(by_hand(10)).value == pytest.approx(1024)
    for claim in ("forward-16k", "slope-torch"):
        with pytest.raises(NotEnoughRows, match="torch was not timed here"):
            claims[claim].measure(rows.filter(pl.col("method") != "torch"))
    with pytest.raises(NotEnoughRows, match="no pass over more tokens"):
        claims["memory"].measure(rows)
