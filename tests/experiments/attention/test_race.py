"""Quality of RACE: laws of its kernel by a naive loop, tasks and costs as stated, claims over rows made by hand."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import scipy.special

from experiments import cli
from experiments.attention import race, race_images
from experiments.attention.race_models import METHODS, Sizes, Transformer, cost
from experiments.attention.race_training import Part, initial, score
from experiments.data import files
from experiments.lab import NotEnoughRows, experiment, figures, records
from experiments.lab.claims import judge
from hashml.hashing.simhash import corners, srp_planes

needs_data = pytest.mark.skipif(files.data_folder() is None, reason="HASHML_DATA is not set")


@needs_data
@pytest.mark.parametrize("name", ["attention.race", "attention.race_images"])
def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(name, tmp_path):
    assert cli.main(["run", name, "--scale", "tiny", "--out", str(tmp_path)]) == 0
    record = records.read_record(tmp_path / name / "tiny")
    assert record is not None
    rows, found = record.rows, experiment.load(name)
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"])
    assert rows["value"].is_finite().all()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert len(found.table(rows)) == rows["method", "task", "tables", "beta"].n_unique()
    assert figures.describe(figures.draw(found.figure, rows))


# --- the kernel ---------------------------------------------------------------------------------------


def phi(x, planes, beta):
    """Softmax over the corners, in float64."""
    u = np.tanh(np.einsum("nd,lpd->nlp", x, planes))
    return scipy.special.softmax(beta * u @ corners(race.BITS).T, axis=-1).reshape(len(x), -1)


def test_the_error_is_that_of_the_definition():
    config = dataclasses.replace(race.Config(), tokens=32)
    key, drawn = jax.random.split(jax.random.key(1))
    q, k, v = np.asarray(jax.random.normal(key, (3, 1, 1, 32, race.WIDTH)), np.float64)[:, 0, 0]
    planes = np.asarray(srp_planes(drawn, 4, race.BITS, race.WIDTH), np.float64)
    weights = phi(q, planes, race.BETA) @ phi(k, planes, race.BETA).T
    cosines = q @ k.T / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(k, axis=1)
    right = (1 - np.arccos(cosines) / np.pi) ** race.BITS
    found, exact = (w @ v / w.sum(axis=1, keepdims=True) for w in (weights, right))
    expected = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert race._error(config, 4, 1)["value"] == pytest.approx(expected, rel=1e-4)


def test_the_bias_vanishes_in_the_hard_limit_up_to_chance_and_not_at_a_flat_kernel():
    config = dataclasses.replace(race.Config(), averaged=2000)
    rate = (1 - np.arccos(race.COSINES) / np.pi) ** race.BITS
    flat = race._bias(config, 1e-6, 0)["value"]
    assert flat == pytest.approx(np.sqrt(np.mean((2.0**-race.BITS - rate) ** 2)), rel=1e-3)
    # Collisions are counted: the mean square is that of 17 binomial shares, of which 4 standard errors are allowed.
    chance = rate * (1 - rate) / config.averaged
    assert race._bias(config, 1e4, 0)["value"] ** 2 < chance.mean() + 4 * np.sqrt(2 * np.sum(chance**2)) / 17


# --- the tasks ----------------------------------------------------------------------------------------


def test_every_key_is_asked_twice_and_answered_by_its_value():
    parts = race.questions(50, 20)
    assert [len(part) for part in parts] == [50, 20, 20]
    for tokens, labels in zip(parts.train.inputs, parts.train.labels, strict=True):
        pairs, asked = tokens[:8].reshape(4, 2), tokens[8:]
        values = dict(pairs.tolist())
        assert len(values) == 4
        assert sorted(asked) == sorted([*values, *values])
        assert [values[key] - race.KEYS for key in asked] == labels.tolist()
    assert set(parts.train.labels.ravel()) == set(range(race.VALUES))
    assert not np.array_equal(parts.train.inputs[:20], parts.test.inputs)


@needs_data
def test_texts_and_patches_are_what_they_say():
    train = race.texts(32, 4).train
    np.testing.assert_array_equal(train.inputs[:, 1:], train.labels[:, :-1])
    found = race_images.patches(20, 4).train.inputs[3]
    whole = race_images.images.splits("fashion_mnist", train=20, validation=4, test=4).train.images[3, ..., 0]
    for row, column in itertools.product(range(14), range(14)):
        corner = whole[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(found[14 * row + column], corner.ravel())


# --- the models ---------------------------------------------------------------------------------------

SIZES = Sizes(5, 32, True, 7, features=8, layers=2, heads=2, hidden=16)


def parameters(name, sizes):
    key = jax.random.key(0)
    shapes = jax.eval_shape(Transformer(sizes, METHODS[name]).init, key, jnp.zeros((1, 32), jnp.int32), key)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_methods_differ_in_their_own_parameters_alone():
    added = {
        name: parameters(name, SIZES) - parameters("softmax", SIZES) for name in METHODS if name[:3] not in "linyos"
    }
    projection = 8 * 8 + 8
    expected = {name: 2 if name.startswith("race") else 0 for name in added} | {"reformer-16": -2 * projection}
    assert added == expected
    loose = SIZES._replace(causal=False)
    assert parameters("linear", SIZES) == parameters("yoso-8", loose) == parameters("softmax", SIZES)
    assert parameters("linformer-128", loose) - parameters("softmax", loose) == 2 * 2 * 128 * 32


def test_a_causal_model_sees_no_later_token():
    name = "race-2x2-bucket"
    tokens = np.random.default_rng(0).integers(0, 7, (1, 32)).astype(np.int32)
    params = initial(SIZES, name, 0, tokens)
    model, key = Transformer(SIZES, METHODS[name]), jax.random.key(0)
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens, key))
    changed = tokens.copy()
    changed[0, 20] = (changed[0, 20] + 1) % 7
    first, second = (np.asarray(apply(x)) for x in (tokens, changed))
    np.testing.assert_allclose(first[:, :20], second[:, :20], atol=1e-5)
    assert np.abs(first[:, 20:] - second[:, 20:]).max(axis=(0, 2)).min() > 1e-4


def test_costs_are_those_of_the_formulas():
    d, tables, bits, buckets = 16, 4, 4, 64
    flops = 4 * d * tables * bits + 4 * buckets * d + 4 * buckets
    assert cost(METHODS["race-4x4"], d, 999, causal=True) == (flops, buckets * (d + 1))
    assert cost(METHODS["performer-64"], d, 999, causal=True).state == buckets * (d + 1)
    # Of 3 causal tokens the first has 1 weight, the last 3: 6 weights, each of 4 d FLOPs.
    assert 3 * cost(METHODS["softmax"], d, 3, causal=True).flops == 6 * 4 * d
    assert cost(METHODS["angular-8"], d, 3, causal=False).flops == 3 * 4 * d


def test_scores_are_means_over_all_labels():
    rng = np.random.default_rng(0)
    part = Part(rng.standard_normal((8, 3)).astype(np.float32), rng.integers(0, 3, 8).astype(np.int32))
    found = score(lambda params, seed, x: params * x, jnp.float32(2), 0, part)
    logs = scipy.special.log_softmax(2.0 * part.inputs, axis=1)
    assert found.loss == pytest.approx(-logs[np.arange(8), part.labels].mean(), rel=1e-5)
    assert found.accuracy == pytest.approx(np.mean(logs.argmax(axis=1) == part.labels))
    with pytest.raises(ValueError, match="part has 8 rows; they must divide in 3 pieces"):
        score(lambda params, seed, x: params * x, jnp.float32(2), 0, part, pieces=3)


# --- claims -------------------------------------------------------------------------------------------

LOSSES = {"softmax": 2.0, "mean": 2.3, "race-4x4": 2.04, "race-2x2": 2.1, "linear": 2.1, "performer-256": 2.03,
          "angular-8": 1.9}  # fmt: skip
RECALLS = {"softmax": 0.99, "race-3x3": 0.5, "race-4x4": 0.7, "linear": 0.4}


def by_hand(losses=LOSSES, recalls=RECALLS) -> pl.DataFrame:
    """Errors fall as the square root; seeds shift all methods of a task, and each a little by itself."""

    def row(task, method, value, seed, tables=None, beta=None):
        return {"task": task, "method": method, "tables": tables, "beta": beta, "seed": seed, "value": value}

    rows = [row("error", "race", 2 * (1 + seed) * n**-0.5, seed, tables=n) for seed in range(5) for n in (1, 4, 16)]
    rows += [
        row("bias", "race", (0.1 + 0.001 * seed) / beta, seed, beta=beta) for seed in range(5) for beta in (1.0, 4.0)
    ]
    for place, (task, values) in enumerate((("language", losses), ("recall", recalls))):
        for at, (method, value) in enumerate(values.items()):
            rows += [row(task, method, value + 0.001 * seed * (1 + at + place), seed) for seed in range(3)]
    return pl.DataFrame(rows, infer_schema_length=None)


def verdict(module, name, rows):
    claim = next(claim for claim in module.CLAIMS if claim.id == name)
    return judge(claim, rows, scale="default", complete=True)


def test_claims_read_the_right_rows():
    rows = by_hand()
    verdicts = {claim.id: verdict(race, claim.id, rows) for claim in race.CLAIMS}
    slope = verdicts["error-law"].measured
    assert slope is not None
    assert slope.value == pytest.approx(-0.5)
    failed = {name for name, found in verdicts.items() if found.verdict != "holds"}
    assert failed == {"language-performer-256", "language-softmax-race-2x2"}
    assert (
        verdict(race, "error-law", rows.with_columns(pl.col("value") * (pl.col("tables") ** 0.3))).verdict == "fails"
    )
    assert verdict(race, "recall-gap-race-4x4", by_hand(recalls=RECALLS | {"race-4x4": 0.95})).verdict == "fails"
    reversed_bias = rows.with_columns(pl.col("value") * pl.col("beta").fill_null(1) ** 2)
    assert verdict(race, "bias-law", reversed_bias).verdict == "fails"


def test_nothing_is_said_where_softmax_says_nothing():
    found = verdict(race, "language-linear", by_hand(LOSSES | {"mean": 1.9}))
    assert (found.verdict, found.note.startswith("softmax is not below the mean")) == ("not judged", True)
    found = verdict(race, "recall-gap-race-3x3", by_hand(recalls=RECALLS | {"softmax": 0.8}))
    assert (found.verdict, found.note) == ("not judged", "softmax recalls 0.80, below 0.9")
    flat = by_hand({"softmax": 0.5, "mean": 0.5, "race-4x4": 0.6}).filter(pl.col("task") == "language")
    with pytest.raises(NotEnoughRows, match="softmax is not above the mean of all values"):
        race_images.CLAIMS[0].measure(flat)


def test_claims_on_images_count_points():
    shares = {"softmax": 0.6, "mean": 0.4, "race-4x4": 0.65, "linear": 0.7, "performer-256": 0.6, "performer-64": 0.6,
              "linformer-128": 0.6, "angular-8": 0.6}  # fmt: skip
    rows = by_hand(shares).filter(pl.col("task") == "language")
    verdicts = {claim.id: verdict(race_images, claim.id, rows) for claim in race_images.CLAIMS}
    found = verdicts["images-control"].measured
    assert found is not None
    assert found.value == pytest.approx(25.1)
    assert {name for name, found in verdicts.items() if found.verdict != "holds"} == {"images-linear"}
