"""Speed of sparse decoding: a run at the smallest scale, steps that attend, ratios of one repetition."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import scipy.special

from experiments.attention import sparse_decode_speed
from experiments.attention.sparse_decode_speed import SCALES, SELECTORS, methods, sparse, speedup
from experiments.lab import NotEnoughRows, figures
from experiments.lab.claims import judge

EXPERIMENT = "attention.sparse_decode_speed"
K = 1024


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    config = found.scales["tiny"]
    assert found.count is not None
    assert len(rows) == found.count(config)
    assert (rows["seconds"] > 0).all()
    bytes_of = {method: read for method, read in rows.select("method", "bytes").unique().iter_rows()}
    token, budget = 2 * 8 * 4, 512 // 4
    assert bytes_of["dense"] == 512 * token
    # 32 pages, two bounds of 8 coordinates of 2 bytes; 3 codes and a length of 2 bytes; keys whole.
    assert bytes_of["quest"] == 32 * 32 + budget * token
    assert bytes_of["socket"] == 512 * 5 + budget * token
    assert bytes_of["oracle"] == 512 * 32 + budget * token
    assert bytes_of["streaming"] == budget * token
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == len(methods(config))
    assert "quest" in figures.describe(figures.draw(found.figure, rows))


def test_what_is_timed_computes_attention():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 4, 8), dtype=np.float32)
    k, v = (rng.standard_normal((1, 2, 96, 8), dtype=np.float32) for _ in range(2))
    operands = tuple(map(jnp.asarray, (q, k, v)))
    wide = [x.repeat(2, axis=1).astype(np.float64) for x in (k, v)]
    shares = scipy.special.softmax(np.einsum("bhd,bhnd->bhn", q, wide[0]) / np.sqrt(8), axis=-1)
    expected = np.einsum("bhn,bhnd->bhd", shares, wide[1])
    for method, sparsity in methods(SCALES["tiny"]):
        if sparsity is None:
            out = np.asarray(sparse_decode_speed._dense(method, *operands)()).reshape(1, 4, 8)
            np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    # At a sparsity of 1 every selector names all tokens.
    for method in SELECTORS:
        step, _ = sparse(SCALES["tiny"], method, 1, *operands)
        np.testing.assert_allclose(jax.block_until_ready(step()), expected, rtol=1e-4, atol=1e-5)


def rows_of(method: str, sparsity: int | None, seconds: list[float], read: int) -> pl.DataFrame:
    return pl.DataFrame({"heads": "8/8", "context": 64 * K, "method": method, "sparsity": sparsity,
                         "repetition": list(range(len(seconds))), "seconds": seconds, "bytes": read},
                        schema_overrides={"sparsity": pl.Int64})  # fmt: skip


def test_ratios_are_to_the_fastest_of_the_same_repetition():
    rows = pl.concat([
        rows_of("dense", None, [8.0, 9.0, 8.0, 8.0, 8.0, 8.0, 8.0], 1000),
        rows_of("dense_jax", None, [9.0, 8.0, 9.0, 9.0, 9.0, 9.0, 9.0], 1000),
        rows_of("quest", 50, [2.0] * 7, 50),
        rows_of("socket", 50, [4.0] * 7, 100),
    ])  # fmt: skip
    assert speedup(rows, "quest", 50, ("dense", "dense_jax")).value == 4
    with pytest.raises(NotEnoughRows, match="dense_torch was not timed here at 65536 tokens"):
        speedup(rows, "quest", 50, ("dense_torch",))
    by_id = {claim.id: claim for claim in sparse_decode_speed.CLAIMS}
    assert by_id["quest-xla"].holds(by_id["quest-xla"].measure(rows))
    # 2x of the 10x that bytes allow.
    assert by_id["socket-ceiling"].measure(rows).value == pytest.approx(0.2)
