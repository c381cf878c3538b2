"""SOCKET's experiment: a run at the smallest scale, measures that equal a loop, claims that read rows."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import scipy.special
import scipy.stats

from experiments.attention import socket, socket_cells
from experiments.attention.socket_cells import Heads, bits_of, made_up, quality, ranking
from experiments.lab import NotEnoughRows, figures
from experiments.lab.claims import judge
from hashml.attention.socket import AsymmetricSRP, HammingLSH, HardLSH, Socket

EXPERIMENT = "attention.socket"
NEEDS = ("wikitext2/valid.txt.gz",)
DEFAULT = socket.SCALES["default"]


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    for metric in ("recall", "recall_logits", "mass"):
        assert rows[metric].drop_nulls().is_between(0, 1).all()
    oracle = rows.filter(pl.col("method").eq("oracle") & pl.col("part").eq("heads"))
    # A twentieth of 48 tokens is what is always read: there is none to find.
    assert set(oracle.filter(pl.col("share") == 0.05)["recall_logits"]) == {0}
    oracle = oracle.filter(pl.col("share") > 0.05)
    np.testing.assert_allclose(oracle["recall_logits"], 1, rtol=1e-6)
    np.testing.assert_allclose(oracle["correlation"], 1, rtol=1e-5)
    assert (rows.filter(pl.col("part") == "loss")["nll"] > 1).all()
    # 60 codes of a byte and a length of 16 bits; 128 numbers of 4 bits with a scale and a minimum.
    assert rows.filter(pl.col("part") == "bytes")["index_bits"].to_list() == [496, 544]
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == len(rows.select("part", "data", "method", "share").unique())
    assert "SOCKET" in figures.describe(figures.draw(found.figure, rows))


def test_measures_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 3, 8), (2, 2, 30, 8), (2, 2, 30, 8))
    )
    now, sinks, window, share = np.array([20, 25, 29]), 1, 2, 0.3
    selector = ranking("asymmetric-plain", 4, 8)
    key = jax.random.key(3)
    heads = Heads(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(now, jnp.int32))
    found = quality(selector, heads, key, shares=(share, 1.0), sinks=sinks, window=window)
    places = jnp.broadcast_to(jnp.arange(30, dtype=jnp.int32), (2, 1, 30))
    index = selector.build(heads.k, heads.v, places, key=key)
    planes, codes = (np.asarray(x) for x in (index.fixed["planes"], index.slots["codes"]))
    expected = []
    for row, head, at in np.ndindex(2, 4, 3):
        keys, values, own, n = k[row, head // 2], v[row, head // 2], q[row, head, at], int(now[at]) + 1
        projected = (planes @ own).ravel()
        bits = (codes[row, head // 2][..., None] >> np.arange(7, -1, -1)) & 1
        score = ((2.0 * bits - 1).transpose(1, 0, 2).reshape(30, -1) @ projected)[:n]
        logits = keys[:n].astype(np.float64) @ own / np.sqrt(8)
        weights, room = scipy.special.softmax(logits), int(np.ceil(share * n - 5e-4))
        others = np.arange(sinks, n - window)

        def best(worth, room=room, others=others):
            return set(others[np.argsort(-worth[others], kind="stable")][: room - 3].tolist())

        mine = best(score)
        read = sorted({0, n - 2, n - 1} | mine)
        out = weights[read] @ values[read] / weights[read].sum()
        exact = weights @ values[:n]
        expected.append(
            (
                len(mine & best(weights * np.linalg.norm(values[:n], axis=1))) / (room - 3),
                len(mine & best(logits)) / (room - 3),
                weights[read].sum(),
                np.linalg.norm(out - exact) / np.linalg.norm(exact),
                scipy.stats.spearmanr(score[others], logits[others])[0],
            )
        )
    means = np.mean(expected, axis=0)
    np.testing.assert_allclose([float(x[0]) for x in found], means, rtol=1e-4)
    np.testing.assert_allclose(
        [float(found.recall[1]), float(found.mass[1]), 1 + float(found.error[1])], 1, atol=1e-5
    )


def test_names_of_rankings():
    assert ranking("socket", 15, 32) == Socket(tables=15)
    assert ranking("socket-plain:0.05", 15, 32) == Socket(tables=15, value_norm_power=0, temperature=0.05)
    assert ranking("socket-plain:40x12", 60, 64) == Socket(tables=40, bits=12, value_norm_power=0)
    assert ranking("socket:0.2", 60, 64) == Socket(temperature=0.2)
    assert ranking("hard-plain:4", 15, 32) == HardLSH(tables=60, value_norm_power=0)
    assert ranking("hamming-centred", 15, 32) == HammingLSH(tables=15, value_norm_power=0, center="prefill_mean")
    assert ranking("asymmetric", 15, 32) == AsymmetricSRP(tables=15)
    for name in {*DEFAULT.rankings, *DEFAULT.head_rankings, *DEFAULT.loss}:
        ranking(name, 4, 8)
    with pytest.raises(ValueError, match="name is 'soft'; allowed are socket, hard, hamming"):
        ranking("soft", 4, 8)


def test_bits_are_those_stored():
    """At 480 bits in all: a code takes a byte, or two beyond 8 bits."""
    stored = {shape: bits_of(ranking(f"socket-plain:{shape}", 60, 64), 64) for shape in ("240x2", "120x4", "40x12")}
    assert stored == {"240x2": 240 * 8, "120x4": 120 * 8, "40x12": 40 * 16}
    assert bits_of(ranking("quest:4", 60, 64), 64) == 32 * 64 / 4
    assert bits_of(ranking("random", 60, 64), 64) == 0
    assert socket_cells.tables_of(128) == 60


def test_made_up_keys():
    size = {"queries": 16, "tokens": 2048, "width": 16}
    plain, offset, clustered = (
        made_up(jax.random.key(0), name, **size) for name in ("gaussian", "offset", "clustered")
    )
    k = np.asarray(plain.k)[0, 0]
    np.testing.assert_allclose(k.mean(axis=0), 0, atol=5 / np.sqrt(2048))
    # A common part of 16 coordinates of deviation 3.
    assert 6 < np.linalg.norm(np.asarray(offset.k)[0, 0].mean(axis=0)) < 20
    distances = np.linalg.norm(np.asarray(clustered.k)[0, 0][:, None] - np.asarray(clustered.q)[0, 0], axis=-1)
    # The nearest key of a query is of its own cluster: two deviations of .5 in 16 coordinates, or less.
    assert (distances.min(axis=0) < np.sqrt(2 * 0.25 * 16)).all()
    lengths = np.linalg.norm(np.asarray(plain.v)[0, 0], axis=1)
    np.testing.assert_allclose(np.log(lengths).std(), 0.5, rtol=0.08)


def rows_of(method: str, part: str = "heads", data: str = "f1", share: float = 0.1, **columns: list) -> pl.DataFrame:
    seeds = len(next(iter(columns.values())))
    base = {"part": part, "data": data, "method": method, "share": share, "seed": list(range(seeds))}
    return pl.DataFrame(base | columns)


def test_claims_measure_what_they_say():
    by_id = {claim.id: claim for claim in socket.CLAIMS}
    rows = pl.concat(
        [rows_of("socket-plain", error=[0.3, 0.4, 0.5]), rows_of("hamming-plain", error=[0.1, 0.2, 0.3])]
    )
    claim = by_id["hamming-heads"]
    # An error that is larger by .2 is a lead of -.2.
    assert claim.measure(rows).value == pytest.approx(-0.2)
    assert not claim.holds(claim.measure(rows))
    with pytest.raises(NotEnoughRows, match="no rows of asymmetric-plain on f1"):
        by_id["asymmetric-heads"].measure(rows)
    # Of two set-ups the one with the least lead counts.
    cells = {("socket-plain", "gaussian"): 0.5, ("hard-plain", "gaussian"): 0.2, ("socket-plain", "clustered"): 0.6,
             ("hard-plain", "clustered"): 0.5}  # fmt: skip
    rows = pl.concat(
        [rows_of(name, "keys", setup, recall_logits=[value] * 3) for (name, setup), value in cells.items()]
    )
    measured = by_id["soft-hard-keys"].measure(rows)
    assert measured.value == pytest.approx(0.1)
    assert "clustered" in measured.note
    assert by_id["soft-hard-keys"].holds(measured)
    rows = pl.concat([rows_of("socket", "loss", share=0.2, nll=[1.03, 1.13], exact_nll=[1.0, 1.1])])
    assert by_id["perplexity"].measure(rows).value == pytest.approx(np.expm1(0.03))
    rows = pl.DataFrame({"part": ["bytes"], "data": [None], "method": ["socket"], "share": [None], "seed": [None],
                         "index_bits": [496.0]}, schema_overrides={"data": pl.String})  # fmt: skip
    assert by_id["bytes"].measure(rows).value == pytest.approx(62 / 512 + 0.1)
