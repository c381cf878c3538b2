"""The HashedNet experiment: equal bytes, the materialised form, and a run at the smallest scale."""

import itertools
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from experiments import cli
from experiments.lab import experiment, figures, records
from experiments.lab.claims import judge
from experiments.sharing import hashed_net, mlp_contenders
from hashml.accounting import stored_bytes
from hashml.sharing import HashedDense, element_map, expand

PAPER = (784, 256, 256, 10)
SMALL = (20, 16, 12, 5)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_materialised_matrix_is_the_hashed_one_bit_for_bit(layer):
    budgets = mlp_contenders.weights(PAPER, mlp_contenders.floats(PAPER) // 8)
    memory = np.random.default_rng(0).standard_normal(budgets[layer]).astype(np.float32)
    found = mlp_contenders.materialised(
        jnp.asarray(memory), mlp_contenders.precomputed(PAPER, budgets, layer, seed=2)
    )
    sharing = element_map(PAPER[layer + 1], PAPER[layer], budgets[layer], seed=mlp_contenders.hash_seed(layer, 2))
    np.testing.assert_array_equal(found, expand(sharing, memory))


class Hashed(nn.Module):
    """The net of the experiment from the library's layers."""

    budgets: tuple[int, ...]
    seed: int

    @nn.compact
    def __call__(self, x):
        for i, budget in enumerate(self.budgets):
            layer = HashedDense(
                SMALL[i + 1], budget=budget, seed=mlp_contenders.hash_seed(i, self.seed), name=f"layer{i}"
            )
            x = nn.relu(layer(x)) if i < 2 else layer(x)
        return x


def test_the_experiment_trains_hashed_dense_layers():
    """Logits and gradients of the contender's second seed are those of a net of `HashedDense`."""
    contender = mlp_contenders.make("hashed", SMALL, 4, range(2))
    model = Hashed(mlp_contenders.weights(SMALL, mlp_contenders.floats(SMALL) // 4), seed=1)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 20)), jnp.float32)
    params, maps = jax.tree.map(lambda leaf: leaf[1], (contender.params, contender.constants))
    params = {**params, "bias": [leaf + 0.1 for leaf in params["bias"]]}
    named = {f"layer{i}": {"memory": params["memory"][i], "bias": params["bias"][i]} for i in range(3)}

    @jax.jit
    def both(params, named):
        y, backward = jax.vjp(lambda params: contender.apply(params, maps, x), params)
        expected, library = jax.vjp(lambda named: jnp.asarray(model.apply({"params": named}, x)), named)
        return y, backward(y)[0], expected, library(y)[0]

    y, gradient, expected, by_library = both(params, named)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for i in range(3):
        for name in ("memory", "bias"):
            np.testing.assert_allclose(gradient[name][i], by_library[f"layer{i}"][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", mlp_contenders.METHODS)
def test_contenders_store_equal_bytes(method):
    """None more than the budget, and no less than whole weights, units or ranks of it."""
    budget = mlp_contenders.floats(PAPER) // 64
    contender = mlp_contenders.make(method, PAPER, 64, range(1))
    slack = {"hashed": 3, "random_edges": 3}.get(method)
    if method == "small":
        hidden = mlp_contenders.small_widths(PAPER, budget)
        wider = mlp_contenders.floats((784, hidden[0] + 1, hidden[1] + 1, 10))
        slack = wider - mlp_contenders.floats((784, *hidden, 10))
    elif method == "low_rank":
        slack = 784 + 256
    assert slack is not None
    assert 4 * (budget - slack) <= contender.bytes <= 4 * budget
    if method != "random_edges":
        assert contender.bytes == stored_bytes(jax.tree.map(lambda leaf: leaf[0], contender.params))


def test_weights_go_to_layers_in_proportion():
    budget = mlp_contenders.floats(PAPER) // 8
    found = mlp_contenders.weights(PAPER, budget)
    for stored, (a, b) in zip(found, itertools.pairwise(PAPER), strict=True):
        assert stored == (budget - 522) * a * b // (784 * 256 + 256 * 256 + 2560)
    with pytest.raises(ValueError, match="budget is 530; it must hold 522 biases and a weight for every layer"):
        mlp_contenders.weights(PAPER, 530)


@pytest.mark.parametrize("budget", [810, 5000, 33_665, 269_322])
def test_small_widths_are_the_largest_that_fit(budget):
    """Against counting up, for two equal hidden widths; the whole budget gives the whole net."""
    width = max(w for w in range(1, 257) if mlp_contenders.floats((784, w, w, 10)) <= budget)
    assert mlp_contenders.small_widths(PAPER, budget) == (width, width)


def test_a_net_of_one_hidden_layer_is_scaled_too():
    assert mlp_contenders.small_widths((784, 1000, 10), mlp_contenders.floats((784, 37, 10))) == (37,)
    with pytest.raises(ValueError, match="budget is 700; a net of hidden widths"):
        mlp_contenders.small_widths(PAPER, 700)


def test_ranks_fill_the_budget_and_no_factor_exceeds_its_matrix():
    for compression in (2, 8, 64):
        budget = mlp_contenders.floats(PAPER) // compression
        found = mlp_contenders.ranks(PAPER, budget)
        costs = [a + b for a, b in itertools.pairwise(PAPER)]
        sizes = [a * b for a, b in itertools.pairwise(PAPER)]
        stored = [rank * cost for rank, cost in zip(found, costs, strict=True)]
        assert min(found) >= 1
        assert all(one <= size for one, size in zip(stored, sizes, strict=True))
        left = budget - 522 - sum(stored)
        assert left >= 0
        assert all(cost > left or one + cost > size for cost, one, size in zip(costs, stored, sizes, strict=True))
    with pytest.raises(ValueError, match="budget is 2000; rank one and the biases take 2340"):
        mlp_contenders.ranks(PAPER, 2000)


def test_random_edges_start_with_the_variance_of_their_fan_in():
    """A unit that keeps a share s of its inputs starts from weights of variance 2 / (s * fan_in)."""
    contender = mlp_contenders.make("random_edges", PAPER, 8, range(2))
    kept = mlp_contenders.weights(PAPER, mlp_contenders.floats(PAPER) // 8)
    for seed in range(2):
        mask = np.asarray(contender.constants["Dense_0"]["kernel"][seed])
        assert mask.sum() == kept[0]
        weights = np.asarray(contender.params["Dense_0"]["kernel"][seed])[mask]
        expected = 2 / (784 * kept[0] / (784 * 256))
        # A variance of n normal numbers is known to sqrt(2 / n) of itself.
        assert abs(weights.var() / expected - 1) < 5 * np.sqrt(2 / kept[0])
    first, second = np.asarray(contender.constants["Dense_0"]["kernel"])
    assert (first != second).any()


@pytest.mark.parametrize("method", ["hashed", "low_rank"])
def test_contenders_start_with_the_variance_of_the_dense_net(method):
    """Of the virtual matrix, averaged over seeds, which share slots or factors within a net."""
    contender = mlp_contenders.make(method, SMALL, 2, range(100))
    for layer, gain in ((0, 2), (2, 1)):
        if method == "hashed":
            matrices = np.asarray(contender.params["memory"][layer])
        else:
            matrices = np.asarray(contender.params["left"][layer] @ contender.params["right"][layer])
        squares = (matrices**2).reshape(100, -1).mean(axis=1)
        error = squares.std() / np.sqrt(100)
        assert abs(squares.mean() - gain / SMALL[layer]) < 4 * error


def test_an_unknown_contender_is_refused():
    with pytest.raises(ValueError, match="method is 'distilled'"):
        mlp_contenders.make("distilled", SMALL, 4, range(1))


# --- a run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The experiment and the rows of a run at scale tiny."""
    folder = os.environ.get("HASHML_DATA")
    if not folder or not (Path(folder) / "fashion_mnist/train.npz").is_file():
        pytest.skip(f"needs fashion_mnist under $HASHML_DATA, which is {folder or 'not set'}")
    out = tmp_path_factory.mktemp("runs")
    assert cli.main(["run", "sharing.hashed_net", "--scale", "tiny", "--out", str(out)]) == 0
    record = records.read_record(out / "sharing.hashed_net" / "tiny")
    assert record is not None
    return experiment.load("sharing.hashed_net"), record.rows


def test_a_run_has_its_rows_its_claims_a_table_and_a_figure(finished):
    found, rows = finished
    assert found.count is not None
    assert len(rows) == found.count(found.scales["tiny"]) == 10
    assert rows["accuracy"].is_between(0, 1).all()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
    assert found.table is not None
    assert isinstance(found.table(rows), pl.DataFrame)
    assert figures.describe(figures.draw(found.figure, rows))


def test_rows_of_a_compression_store_as_many_bytes(finished):
    _, rows = finished
    dense = rows.filter(pl.col("method") == "dense")["model_bytes"][0]
    stored = rows.filter(pl.col("method") != "dense")["model_bytes"]
    assert (stored <= dense // 8).all()


def test_the_claims_read_the_right_rows():
    """Made-up rows, where a HashedNet gains 2 points on the small net and 4 on all others, at either compression."""
    loss = {"hashed": 0.0, "small": 0.02, "random_edges": 0.04, "low_rank": 0.04}
    rows = pl.DataFrame(
        [
            {"method": method, "compression": compression, "seed": seed, "accuracy": 0.8 + 0.01 * seed - lost}
            for compression in (8, 64)
            for seed in range(3)
            for method, lost in loss.items()
        ]
    )
    for claim in hashed_net.CLAIMS:
        judgement = judge(claim, rows, scale="default", complete=True)
        assert judgement.verdict == "holds"
        assert judgement.measured is not None
        assert judgement.measured.value == pytest.approx(0.02 if "small" in claim.id else 0.04)
    swapped = rows.with_columns(pl.col("method").replace({"hashed": "small", "small": "hashed"}))
    verdicts = {
        claim.id: judge(claim, swapped, scale="default", complete=True).verdict for claim in hashed_net.CLAIMS
    }
    assert (
        verdicts["small-does-not-win-64x"] == verdicts["beats-small-64x"] == verdicts["not-below-small-8x"] == "fails"
    )
