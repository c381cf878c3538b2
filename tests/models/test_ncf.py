"""NCF against loops in NumPy, and BPR's batches against what they promise."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hashml.models.ncf import (
    NCF,
    NCFHead,
    NCFVectors,
    bpr_batches,
    bpr_loss,
    mlp_width,
    ncf_bpr_loss,
    sample_negatives,
    squared_norms,
)
from hashml.sharing import RobeEmbed

USERS, ITEMS, FEATURES = 5, 11, 4


def model(layers=2, items: Any = nn.Embed) -> NCF:
    width = mlp_width(FEATURES, layers)
    return NCF(
        nn.Embed(USERS, FEATURES),
        items(ITEMS, FEATURES),
        nn.Embed(USERS, width),
        items(ITEMS, width),
        features=FEATURES,
        layers=layers,
    )


def vectors(*shape, width=FEATURES, seed=0):
    rng = np.random.default_rng(seed)
    return NCFVectors(*(jnp.asarray(rng.standard_normal((*shape, w)), jnp.float32) for w in (FEATURES, width)))


@pytest.mark.parametrize("layers", [1, 3])
def test_scores_are_the_towers_in_a_loop(layers):
    ncf = model(layers)
    users, items = jnp.array([0, 4, 2]), jnp.array([10, 0, 10])
    variables = ncf.init(jax.random.key(0), users, items)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    expected = []
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        g = p["gmf_users"]["embedding"][user] * p["gmf_items"]["embedding"][item]
        z = np.concatenate([p["mlp_users"]["embedding"][user], p["mlp_items"]["embedding"][item]])
        for level in range(layers):
            dense = p["head"][f"mlp_{level}"]
            z = np.maximum(z @ dense["kernel"] + dense["bias"], 0)
            assert z.shape == (FEATURES * 2 ** (layers - 1 - level),)
        last = p["head"]["predict"]
        expected.append((np.concatenate([g, z]) @ last["kernel"] + last["bias"])[0])
    np.testing.assert_allclose(ncf.apply(variables, users, items), expected, rtol=1e-5)  # type: ignore[arg-type]


def test_users_and_items_broadcast():
    head = NCFHead(FEATURES)
    user, item = vectors(3, 1), vectors(1, 6, seed=1)
    variables = head.init(jax.random.key(0), user, item)
    grid: Any = head.apply(variables, user, item)
    for row in range(3):
        for column in range(6):
            one: Any = head.apply(
                variables, NCFVectors(*(v[row, 0] for v in user)), NCFVectors(*(v[0, column] for v in item))
            )
            np.testing.assert_allclose(grid[row, column], one, rtol=1e-5, atol=1e-6)


def test_compressed_tables_plug_in():
    ncf = model(items=lambda n, width: RobeEmbed(n, width, budget=20, block_size=2))
    variables: Any = ncf.init(jax.random.key(0), jnp.array([0]), jnp.array([0]))
    assert variables["params"]["gmf_items"]["memory"].shape == (20,)
    gradient = jax.grad(lambda v: jnp.asarray(ncf.apply(v, jnp.array([1]), jnp.array([7]))).sum())(variables)
    assert np.abs(gradient["params"]["mlp_items"]["memory"]).max() > 0


def test_bpr_is_its_definition():
    rng = np.random.default_rng(0)
    positive, negatives = rng.standard_normal(6), rng.standard_normal((6, 3))
    weights = np.array([1, 0, 2, 1, 1, 0.0])
    each = [np.log1p(np.exp(-(p - n.mean()))) for p, n in zip(positive, negatives, strict=True)]
    arrays = [jnp.asarray(x, jnp.float32) for x in (positive, negatives, weights)]
    np.testing.assert_allclose(bpr_loss(*arrays[:2]), np.mean(each), rtol=1e-5)
    np.testing.assert_allclose(bpr_loss(*arrays), np.average(each, weights=weights), rtol=1e-5)
    assert bpr_loss(arrays[0], arrays[1], jnp.zeros(6)) == 0


def test_the_penalty_reaches_all_six_vectors_alike():
    """Its gradient is each vector itself, not the user's six times."""
    user, positive, negatives = vectors(2), vectors(2, seed=1), vectors(2, 3, seed=2)
    gradients = jax.grad(squared_norms, (0, 1, 2))(user, positive, negatives)
    for found, given, share in zip(gradients, (user, positive, negatives), (2, 2, 6), strict=True):
        for a, b in zip(found, given, strict=True):
            np.testing.assert_allclose(a, b / share, rtol=1e-5)
    total = ncf_bpr_loss(
        lambda u, i: (u.gmf * i.gmf).sum(-1), user, positive, negatives, regularization=0.5
    ) - ncf_bpr_loss(lambda u, i: (u.gmf * i.gmf).sum(-1), user, positive, negatives)
    np.testing.assert_allclose(total, 0.5 * squared_norms(user, positive, negatives), rtol=1e-4)


def test_negatives_are_uniform_on_what_is_left():
    positives = jnp.array([0, 3, 4, 9, ITEMS, ITEMS])
    drawn = np.asarray(sample_negatives(jax.random.key(0), positives, ITEMS, (7000,)))
    counts = np.bincount(drawn, minlength=ITEMS)
    assert counts[[0, 3, 4, 9]].sum() == 0
    assert stats.chisquare(np.delete(counts, [0, 3, 4, 9])).pvalue > 1e-3


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_every_epoch_reads_each_positive_once(batch_size):
    positives = jnp.array([1, 2, 5, 8, 10, ITEMS, ITEMS, ITEMS])
    batches, active = bpr_batches(
        jax.random.key(1), positives, items=ITEMS, epochs=3, batch_size=batch_size, negatives=2
    )
    steps = -(-8 // batch_size)
    assert batches.negatives.shape == (3 * steps, batch_size, 2)
    np.testing.assert_array_equal(active.reshape(3, steps).sum(axis=1), -(-5 // batch_size))
    orders = []
    for epoch in range(3):
        part = slice(epoch * steps, (epoch + 1) * steps)
        orders.append(np.asarray(batches.positive[part])[np.asarray(batches.weights[part]) > 0].tolist())
        assert sorted(orders[-1]) == [1, 2, 5, 8, 10]
    assert orders[0] != orders[1] or orders[1] != orders[2]
    assert not np.isin(np.asarray(batches.negatives), [1, 2, 5, 8, 10]).any()
    assert not (batches.weights.sum(axis=1) > 0)[~active].any()


def test_bad_widths_are_refused_by_name():
    with pytest.raises(ValueError, match="layers is 0; it must be at least 1"):
        mlp_width(4, 0)
    head = NCFHead(FEATURES, layers=2)
    with pytest.raises(ValueError, match=r"user has vectors of widths \(4, 4\); they must be \(4, 8\)"):
        head.init(jax.random.key(0), vectors(2), vectors(2))
