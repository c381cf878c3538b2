"""NoMAD-Attention's experiment: a run at the smallest scale, what is timed and compared, claims that read rows."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import scipy.special

from experiments.attention import nomad, nomad_cells, nomad_timing
from experiments.attention.nomad_cells import Cell, ProductKeys
from experiments.kvcache import fixtures
from experiments.lab import NotEnoughRows, figures
from experiments.lab.claims import judge
from hashml.attention import nomad_native
from hashml.attention.nomad_keys import NomadKeys

TINY, DEFAULT, K = nomad.SCALES["tiny"], nomad.SCALES["default"], 1024
EXPERIMENT = "attention.nomad"
NEEDS = ("wikitext2/valid.txt.gz",)


@pytest.fixture(scope="module", autouse=True)
def native():
    """The library in the user's cache, before a run has another one for its models."""
    nomad_native.available()


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    assert rows["nll"].drop_nulls().is_between(1, 8).all()
    assert (rows["seconds"].drop_nulls() > 0).all()
    # 32 channels of a head in float16, in codes of 4 bits, and with a scale and a minimum in float16 beside them.
    sizes = rows.filter(pl.col("part") == "quality").select("method", "channels", "key_bytes").unique().rows()
    expected = {("full", None): 64, ("nomad", 1): 16, ("random", 1): 16, ("int4", None): 20}
    assert {(method, channels): size for method, channels, size in sizes} == expected
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == len(rows.select("part", "method", "channels", "context").unique())
    assert "nomad" in figures.describe(figures.draw(found.figure, rows))


def test_the_error_budget_is_that_of_scalar_quantisers(finished):
    """No 16 levels leave less than 0.0095 of a Gaussian's variance (Max 1960); a score's error is the keys' root."""
    _, rows = finished
    part = rows.filter(pl.col("part") == "budget")
    assert part["key_mse"].is_between(0.009, 0.1).all()
    for key_mse, score, table in part.select("key_mse", "score_error", "table_error").iter_rows():
        assert score == pytest.approx(np.sqrt(key_mse), rel=0.2)
        assert 0 < table < score


# --- codebooks and controls -----------------------------------------------------------------------------


def test_controls_have_the_codebooks_they_name():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((200, 2, 4)).astype(np.float32) * [1, 5, 2, 3]
    uniform = np.asarray(nomad_cells.codebook(jax.random.key(0), keys, Cell("f1", "uniform", 1), 2))
    for head, channel in np.ndindex(2, 4):
        column = keys[:, head, channel]
        np.testing.assert_allclose(
            uniform[head, channel, :, 0], np.linspace(column.min(), column.max(), 16), rtol=1e-5
        )
    random = np.asarray(nomad_cells.codebook(jax.random.key(0), keys, Cell("f1", "random", 2), 2))
    assert random.shape == (2, 2, 16, 2)
    for head, part in np.ndindex(2, 2):
        known = {tuple(row) for row in keys[:, head, 2 * part : 2 * part + 2].astype(np.float32)}
        assert {tuple(row) for row in random[head, part]} <= known


def test_the_control_without_tables_multiplies_decoded_keys():
    rng = np.random.default_rng(1)
    keys, q, book = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((1, 2, 5, 6), (1, 2, 3, 1, 6), (2, 3, 40, 2))
    )
    codec, params = ProductKeys(2, bits=8), {"codebook": book}
    state = codec.init(1, 2, 5, 6, jnp.float32)
    valid = jnp.ones((1, 2, 5), bool)
    nearest = np.empty((1, 2, 5, 6))
    for h, n, part in np.ndindex(2, 5, 3):
        own = np.asarray(keys)[0, h, n, 2 * part : 2 * part + 2]
        entries = np.asarray(book)[h, part]
        nearest[0, h, n, 2 * part : 2 * part + 2] = entries[((entries - own) ** 2).sum(axis=1).argmin()]
    logits = jax.jit(
        lambda: codec.logits(params, state._replace(slots=codec.quantise(params, {}, keys, valid)), q, None)
    )
    expected = np.einsum("bhjnd,bhcd->bhjnc", np.asarray(q), nearest)
    np.testing.assert_allclose(logits(), expected, rtol=1e-4, atol=1e-5)


def test_cells_are_apart_and_every_key_is_coded_at_once():
    cells = nomad_cells.cells(DEFAULT.models, DEFAULT.channels, DEFAULT.controls)
    assert len(set(cells)) == len(cells)
    for cell in cells:
        layers = nomad_cells.layers_of(DEFAULT.size, cell)
        assert {(layer.window, layer.flush, layer.sinks) for layer in layers} == {(0, 1, 0)}
        assert isinstance(layers[0].key_codec, NomadKeys) == (cell.method not in ("full", "int4"))
        assert layers[0].rope != "read"  # keys are coded as they are used
    assert fixtures.DEFAULT.lloyd != DEFAULT.size.lloyd == 25


# --- what is timed --------------------------------------------------------------------------------------


def test_what_is_timed_scores_keys_and_attends():
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for shape in ((1, 2, 8), (1, 2, 64, 8), (1, 2, 64, 8)))
    logits = np.einsum("bhd,bhnd->bhn", q, k)
    expected = {"scores": logits, "attention": np.einsum(
        "bhn,bhnd->bhd", scipy.special.softmax(logits.astype(np.float64) / np.sqrt(8), axis=-1), v)}  # fmt: skip
    for part in nomad.TIMED:
        found = {name: np.asarray(nomad_timing.timed(TINY, part, *name, q, k, v)())
                 for name in nomad_timing.timed_methods(TINY, 64)}  # fmt: skip
        for name in set(found) & {("dense", None), ("torch", None)}:
            np.testing.assert_allclose(
                found[name].reshape(expected[part].shape), expected[part], rtol=1e-4, atol=1e-5
            )
        if ("native", 1) in found:
            np.testing.assert_allclose(found["native", 1], found["xla", 1], rtol=1e-4, atol=1e-5)


def test_what_is_not_here_is_not_timed(monkeypatch):
    monkeypatch.setattr(nomad_timing, "torch_is_here", lambda: False)
    monkeypatch.setattr(nomad_native, "available", lambda: False)
    assert nomad_timing.timed_methods(DEFAULT, 16 * K) == [("dense", None)]
    assert nomad_timing.timed_methods(DEFAULT, K) == [("dense", None), ("xla", 1)]


# --- claims ---------------------------------------------------------------------------------------------


def made_up() -> pl.DataFrame:
    """Losses, errors and times by hand; each seed and repetition is worse as a whole."""
    rows = []

    def add(part, method, channels=None, fixture=None, context=None, count=3, **measured):
        for at in range(count):
            timed = part in nomad.TIMED
            rows.append(
                nomad._key(part, fixture, method, channels, seed=None if timed else at, context=context,
                           repetition=at if timed else None)
                | nomad._row(**{name: value * (1 + at) if timed else value + (0.1 * at if name == "nll" else 0)
                                for name, value in measured.items()})
            )  # fmt: skip

    for fixture in ("f1", "stories"):
        add("quality", "full", fixture=fixture, nll=1.4)
        for channels, more in ((1, 0.008), (2, 0.05), (4, 0.4), (8, 0.3)):
            add("quality", "nomad", channels, fixture, nll=1.4 + more + (0.1 if fixture == "stories" else 0))
    for method, channels, more in (("random", 1, 0.05), ("uniform", 1, 0.009), ("shared", 1, 0.007),
                                   ("int4", None, 0), ("pq256", 2, 0.002), ("float", 1, 0.007)):  # fmt: skip
        add("quality", method, channels, "f1", nll=1.4 + more)
    add("quality", "full", fixture="recall", accuracy=0.99)
    add("quality", "nomad", 1, "recall", accuracy=0.97)
    for channels, score, entries in ((1, 0.1, 0.01), (2, 0.3, 0.09), (4, 0.6, 0.01), (8, 0.7, 0.01)):
        add("budget", "nomad", channels, key_mse=0.013, score_error=score, table_error=entries)
    for part in nomad.TIMED:
        for method, channels, seconds in (("dense", None, 4.0), ("torch", None, 12.0), ("native", 1, 1.0),
                                          ("native", 4, 0.1)):  # fmt: skip
            add(part, method, channels, context=16 * K, count=7, seconds=seconds)
        add(part, "dense", context=4 * K, count=7, seconds=1.0)
        add(part, "xla", 1, context=4 * K, count=7, seconds=8.0)
    return pl.DataFrame(rows, infer_schema_length=None)


def test_the_claims_read_the_right_rows():
    expected = {
        "quality-1-percent": (np.expm1(0.008), True),
        "quality-3-percent": (np.expm1(0.008), True),
        "quality-stories": (np.expm1(0.108), False),
        "recall": (-0.02, False),
        "monotone": (np.expm1(-0.1), False),
        "four-worse": (np.expm1(0.392), True),
        "beats-random": (np.expm1(-0.042), True),
        "beats-uniform": (np.expm1(-0.001), True),
        "beats-shared": (np.expm1(0.001), False),
        "against-int4": (np.expm1(0.008), False),
        "against-pq256": (np.expm1(0.006), True),
        "tables-model": (np.expm1(0.001), True),
        "tables-budget": (0.3, False),
        "key-error": (0.013, True),
        "scores-16k-dense": (4.0, False),
        "scores-16k-torch": (12.0, True),
        "attention-16k-dense": (4.0, True),
        "attention-16k-torch": (12.0, True),
        "xla-alone": (1 / 8, True),
    }
    rows = made_up()
    verdicts = {claim.id: judge(claim, rows, scale="default", complete=True) for claim in nomad.CLAIMS}
    assert set(verdicts) == set(expected)
    for name, (value, holds) in expected.items():
        measured = verdicts[name].measured
        assert measured is not None, (name, verdicts[name].note)
        assert measured.value == pytest.approx(value, abs=1e-9), name
        assert verdicts[name].verdict == ("holds" if holds else "fails"), name
    assert "least from 4 to 8" in verdicts["monotone"].note
    assert "most at d_sub 2" in verdicts["tables-budget"].note
    claims = {claim.id: claim for claim in nomad.CLAIMS}
    with pytest.raises(NotEnoughRows, match="torch was not timed here at 16384 keys"):
        claims["attention-16k-torch"].measure(rows.filter(pl.col("method") != "torch"))
    with pytest.raises(NotEnoughRows, match="native was not timed here at 16384 keys"):
        claims["scores-16k-dense"].measure(rows.filter(pl.col("method") != "native"))
    with pytest.raises(NotEnoughRows, match="no rows of nomad:1 on recall"):
        claims["recall"].measure(
            rows.filter(pl.col("fixture").ne_missing(pl.lit("recall")) | (pl.col("method") == "full"))
        )
