"""PairConnect beside attention: costs as counted, texts and counts by a loop, the optimiser, claims by hand."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from experiments import cli
from experiments.attention import pair_connect, pair_connect_training
from experiments.attention.pair_connect_models import Sizes, contender, flops, looked_up, model, weights
from experiments.attention.pair_connect_training import Text, counts, initial, optimizer
from experiments.attention.race_training import Part, Plan
from experiments.data import files, language
from experiments.data.clicks import Splits
from experiments.lab import experiment, figures, records
from experiments.lab.claims import judge
from hashml.accounting import stored_bytes

needs_data = pytest.mark.skipif(files.data_folder() is None, reason="HASHML_DATA is not set")
SIZES = Sizes(11, 12, features=8, pair_features=4, window=5, heads=2)


@needs_data
def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(tmp_path):
    assert cli.main(["run", "attention.pair_connect", "--scale", "tiny", "--out", str(tmp_path)]) == 0
    record = records.read_record(tmp_path / "attention.pair_connect" / "tiny")
    assert record is not None
    rows, found = record.rows, experiment.load("attention.pair_connect")
    assert found.count is not None
    assert found.table is not None
    assert len(rows) == found.count(found.scales["tiny"]) == 12
    assert rows["value"].is_finite().all()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert (rows.filter(pl.col("task") == "contains")["value"] < 1e-5).all()  # theory, at any scale
    rates = [set(rows.filter(pl.col("method") == name)["learning_rate"]) for name in ("pairs", "pairs-2^9")]
    assert rates[0] - {None} == rates[1]  # which is not searched again
    assert len(rates[1]) == 1
    trained = rows.filter(pl.col("flops") > 0)
    assert np.allclose(trained["perplexity"], np.exp(trained["value"]))
    assert len(found.table(rows)) == 6
    assert figures.describe(figures.draw(found.figure, rows))


# --- the models ---------------------------------------------------------------------------------------

NAMES = ["none", "bigram", "pairs", "pairs-2^6", "attention", "attention-window", "attention-bytes"]


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_parameters(name):
    one = contender(name, SIZES)
    shapes = jax.eval_shape(model(one, SIZES).init, jax.random.key(0), jnp.zeros((1, 12), jnp.int32))
    assert stored_bytes(shapes["params"]) == 4 * weights(one, SIZES)


def test_costs_are_those_of_the_formulas_and_widths_meet_them():
    d, v, blocks, p, w, t = 8, 11, 2, 4, 5, 12
    perceptrons = blocks * 8 * d * d + v * d
    assert flops(contender("none", SIZES), SIZES) == 2 * perceptrons
    assert flops(contender("pairs", SIZES), SIZES) == 2 * (perceptrons + w * p + p * d)
    assert flops(contender("attention", SIZES), SIZES) == 2 * (perceptrons + blocks * (4 * d * d + 2 * t * d))
    assert flops(contender("attention-window", SIZES), SIZES) == 2 * (perceptrons + blocks * (4 * d * d + 2 * w * d))
    assert looked_up(contender("pairs", SIZES), SIZES) == 4 * w * p
    assert looked_up(contender("attention", SIZES), SIZES) == 0
    # Distances 0 .. 4 have 5 buckets less one: 0, 1, 2 and 3-4.
    assert weights(contender("pairs", SIZES), SIZES) - weights(contender("none", SIZES), SIZES) == (
        4 * v * v * p + w + p * d
    )
    default = Sizes(66, 128)
    for name, measure in (("attention-bytes", weights), ("attention-flops", flops)):
        right, found = measure(contender("pairs", default), default), measure(contender(name, default), default)
        assert abs(found / right - 1) < 0.05
    with pytest.raises(ValueError, match="method is 'pairs-2'; it must be pairs, pairs-2"):
        contender("pairs-2", SIZES)


def test_attention_sees_its_window_and_nothing_later():
    sizes = SIZES._replace(blocks=1)
    params = initial(sizes, "attention-window", 0)
    module = model(contender("attention-window", sizes), sizes)
    apply = jax.jit(lambda ids: module.apply({"params": params}, ids))
    ids = np.random.default_rng(0).integers(0, 11, (1, 12)).astype(np.int32)
    changed = ids.copy()
    changed[0, 3] = (changed[0, 3] + 1) % 11
    moved = np.abs(np.asarray(apply(ids)) - np.asarray(apply(changed))).max(axis=(0, 2)) > 1e-6
    assert moved.tolist() == [3 <= t < 8 for t in range(12)]


def test_tables_are_trained_by_adagrad_and_the_rest_by_adam():
    """Steps of Adagrad: the rate over the root of the sum of squares; rows without gradient stay."""
    start = {"pairs_0": {"table": jnp.ones((4, 2)), "alpha": jnp.ones(3)}, "words": jnp.ones(2)}
    transformation = optimizer(lambda step: jnp.asarray(0.01) * (1 - step / 100), None)
    state = transformation.init(start)
    # One number a weight of the table; two of Adam for the others.
    sizes = collections.Counter(leaf.shape for leaf in jax.tree.leaves(state))
    assert (sizes[4, 2], sizes[3,]) == (1, 2)
    gradient = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), start)
    gradient["pairs_0"]["table"] = jnp.asarray([[1e-4, -2e-4], [0, 0], [0, 0], [0, 0]])
    update = jax.jit(transformation.update)
    found: Any = None
    for step in range(2):
        found, state = update(gradient, state, start)
        rate = 0.1 * (step + 1) / 20 * (1 - step / 100) / np.sqrt(step + 1)
        np.testing.assert_allclose(found["pairs_0"]["table"][0], [-rate, rate], rtol=2e-2)
        assert not np.asarray(found["pairs_0"]["table"][1:]).any()
    np.testing.assert_allclose(found["words"], -0.01 * 2 / 20 * 0.99, rtol=1e-3)


# --- texts and counts ---------------------------------------------------------------------------------


@needs_data
def test_texts_say_what_the_files_say():
    text = pair_connect_training.characters(16, 4)
    train = text.parts.train
    np.testing.assert_array_equal(train.inputs[:, 1:], train.labels[:, :-1])
    assert (train.inputs[:, 0] == text.vocabulary - 1).all()
    assert (text.vocabulary, train.labels.max()) == (66, 64)
    raw = language.splits("tiny_shakespeare").train[:48]
    alphabet = sorted(set(language.read("tiny_shakespeare/input.txt.gz").tolist()))
    assert [alphabet[c] for c in train.labels[:3].ravel()] == raw.tolist()
    words = pair_connect_training.words(16, 4, 50)
    train = words.parts.train
    np.testing.assert_array_equal(train.inputs.ravel()[1:], train.labels.ravel()[:-1])
    said = bytes(language.splits("wikitext2").train).decode().replace("\n", " <eos> ").split()
    common = [word for word, _ in collections.Counter(said).most_common(3)]
    for number, word in enumerate(common):
        assert [w == word for w in said[:160]] == (train.inputs[:10].ravel() == number).tolist()
    assert len(words.parts.test) == 4


def test_counts_are_those_of_a_loop():
    size, plan = 3, Plan(2, 2, (0.1,), 1)
    rng = np.random.default_rng(1)
    parts = [Part(x[:, :-1], x[:, 1:]) for x in rng.integers(0, size, (3, 4, 6)).astype(np.int32)]
    row = counts(Text(Splits(*parts), size), plan, 0)  # 2 steps of 2 are all 4 sequences
    grams = [collections.Counter() for _ in range(4)]

    def places(part):
        for inputs, labels in zip(part.inputs.tolist(), part.labels.tolist(), strict=True):
            yield from zip([inputs[0], *inputs[:-1]], inputs, labels, strict=True)

    for *context, label in places(parts[0]):
        for n in range(3):
            grams[n][(*context[2 - n :], label)] += 1

    def share(context, label, strength):
        if context is None:
            return 1 / size
        shorter = context[1:] if context else None
        total = sum(grams[len(context)][(*context, other)] for other in range(size))
        found = grams[len(context)][(*context, label)]
        return (found + strength * share(shorter, label, strength)) / (total + strength)

    def loss(part, strength):
        return np.mean([-np.log(share(tuple(context), label, strength)) for *context, label in places(part)])

    losses = [loss(parts[1], strength) for strength in pair_connect_training.STRENGTHS]
    best = pair_connect_training.STRENGTHS[int(np.argmin(losses))]
    assert row["validation_loss"] == pytest.approx(min(losses))
    assert row["value"] == pytest.approx(loss(parts[2], best))
    assert (row["bytes"], row["flops"]) == (4 * (27 + 9 + 3), 0)


# --- what a table can say -----------------------------------------------------------------------------


def test_what_no_head_holds_is_what_the_best_one_leaves():
    """The best head by alternating least squares, with a constant a row free, leaves what singular values say."""
    logits = np.random.default_rng(2).standard_normal((pair_connect.WORDS, pair_connect.WORDS))
    rng = np.random.default_rng(0)
    keys, ones = rng.standard_normal((pair_connect.WORDS, pair_connect.HEAD_WIDTH)), np.ones((pair_connect.WORDS, 1))
    queries = np.zeros((pair_connect.WORDS, pair_connect.HEAD_WIDTH + 1))
    for _ in range(2000):
        queries = np.linalg.lstsq(np.hstack([keys, ones]), logits.T)[0].T
        keys = np.linalg.lstsq(queries[:, :-1], logits - queries[:, -1:])[0].T
    left = logits - queries[:, :-1] @ keys.T
    left -= left.mean(axis=1, keepdims=True)
    whole = logits - logits.mean(axis=1, keepdims=True)
    found = pair_connect._beyond(pair_connect.Config(), 2)["value"]
    assert found == pytest.approx(np.linalg.norm(left) / np.linalg.norm(whole), rel=1e-3)


# --- claims -------------------------------------------------------------------------------------------

LOSSES = {"none": 2.5, "bigram": 2.2, "counts": 2.1, "pairs": 1.9, "attention": 1.85, "attention-window": 1.85,
          "attention-flops": 1.95, "attention-bytes": 1.7, "pairs-2^15": 1.9, "pairs-2^13": 1.95, "pairs-2^11": 2.03,
          "pairs-2^9": 2.15}  # fmt: skip


def by_hand(losses=LOSSES, *, flops=200):
    """Seeds shift all methods, and each a little by itself."""
    rows = []
    for seed in range(3):
        for task, value in (("contains", 1e-6), ("beyond", 0.5)):
            rows.append({"task": task, "method": "pairs", "seed": seed, "value": value + seed * 1e-7})
        for at, (name, loss) in enumerate(losses.items()):
            value = loss + 0.01 * seed + 1e-4 * seed * at
            cost = {"attention": flops, "pairs": 100}.get(name)
            rows.append({"task": "characters", "method": name, "seed": seed, "value": value, "flops": cost})
    return pl.DataFrame(rows, infer_schema_length=None).with_columns(pl.col("value").exp().alias("perplexity"))


def verdicts(rows):
    return {claim.id: judge(claim, rows, scale="default", complete=True) for claim in pair_connect.CLAIMS}


def test_claims_read_the_right_rows():
    found = verdicts(by_hand())
    said = collections.defaultdict(set)
    for name, one in found.items():
        said[one.verdict].add(name)
    assert said["fails"] == {"characters-bytes"}
    assert said["not judged"] == {"words-gap", "words-memory"}
    near, memory, smooth = (found[f"characters-{name}"].measured for name in ("near", "memory", "smooth"))
    assert near is not None
    assert memory is not None
    assert smooth is not None
    assert near.value == pytest.approx(np.exp(0.05) - 1, rel=1e-2)
    assert memory.note.startswith("pairs-2^15 to pairs-2^11")
    assert memory.value == pytest.approx(0.13, rel=1e-2)
    assert smooth.note.startswith("pairs-2^11 to pairs-2^9")
    assert smooth.value == pytest.approx(0.12 / 0.25, rel=1e-2)


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"pairs": 2.02}, {"characters-near", "characters-window", "characters-flops"}),
        ({"pairs": 2.15}, {"characters-near", "characters-gap", "characters-window", "characters-flops",
                           "characters-counts"}),
        ({"pairs": 2.45}, {"characters-near", "characters-gap", "characters-window", "characters-flops",
                           "characters-counts", "characters-bigram", "characters-none"}),
        ({"pairs-2^11": 1.9}, {"characters-memory", "characters-smooth"}),
        ({"attention-bytes": 2.0}, set()),
    ],
)  # fmt: skip
def test_each_claim_can_fail(change, failed):
    found = verdicts(by_hand(LOSSES | change))
    always = set() if "attention-bytes" in change else {"characters-bytes"}
    assert {name for name, one in found.items() if one.verdict == "fails"} == failed | always


def test_costs_the_table_and_the_yardstick_are_looked_at():
    assert verdicts(by_hand(flops=199))["cheaper"].verdict == "fails"
    rows = by_hand().with_columns(pl.when(pl.col("task") == "contains").then(1e-4).otherwise("value").alias("value"))
    assert verdicts(rows)["contains"].verdict == "fails"
    found = verdicts(by_hand(LOSSES | {"attention": 2.6}))["characters-near"]
    assert (found.verdict, found.note.startswith("attention is not below one token alone")) == ("not judged", True)
    flat = by_hand({name: loss for name, loss in LOSSES.items() if name != "pairs-2^11"})
    assert verdicts(flat)["characters-memory"].note == "no rows of pairs-2^11"
