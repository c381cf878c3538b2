"""Pruning: exact counts, conservation laws, scores by finite differences, and weights that stay gone."""

import itertools
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hashml.accounting import stored_bytes
from hashml.models.classifiers import MLP, ResNet
from hashml.sharing import pruning, pruning_scores
from hashml.sharing.lottery_ticket import lottery_ticket
from hashml.sharing.pruning import (
    apply_mask,
    count_kept,
    grasp_scores,
    magnitude_scores,
    mask_from_scores,
    masked,
    prune,
    pruned_bytes,
    random_scores,
    snip_scores,
    synflow_scores,
)

WIDTHS = (12, 9, 4)
SHAPE = (6,)


def apply(params, x):
    """Matrices ``w0, w1, ...`` and biases ``b0, ...`` where there are any, with ReLU between."""
    layers = sum(name.startswith("w") for name in params)
    for i in range(layers):
        x = x @ params[f"w{i}"]
        if f"b{i}" in params:
            x = x + params[f"b{i}"]
        x = jax.nn.relu(x) if i < layers - 1 else x
    return x


def net(widths=WIDTHS, inputs=SHAPE[0], biases=False, seed=0):
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {}
    for i, width in enumerate(widths):
        params[f"w{i}"] = (rng.standard_normal((inputs, width)) * (2 / inputs) ** 0.5).astype(np.float32)
        if biases:
            params[f"b{i}"] = rng.standard_normal(width).astype(np.float32) / 5
        inputs = width
    return params


def data(rows=20, inputs=SHAPE[0], seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, inputs)).astype(np.float32), rng.integers(0, 4, rows).astype(np.int32)


def kept(mask):
    return {name: int(leaf.sum()) for name, leaf in mask.items() if leaf is not None}


def scorers():
    x, labels = data()
    return {
        "random": lambda params: random_scores(params, jax.random.key(3)),
        "magnitude": magnitude_scores,
        "snip": lambda params: snip_scores(apply, params, x, labels),
        "grasp": lambda params: grasp_scores(apply, params, x, labels),
        "synflow": lambda params: synflow_scores(apply, params, SHAPE),
    }


# --- masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", scorers())
@pytest.mark.parametrize(("scope", "steps"), [("global", 1), ("local", 3)])
def test_as_many_weights_as_asked_and_no_bias(name, scope, steps):
    params = net(biases=True)
    mask = prune(scorers()[name], params, 0.3, steps=steps, scope=scope)
    sizes = {"w0": 72, "w1": 108, "w2": 36}
    assert all(mask[f"b{i}"] is None for i in range(3))
    assert int(count_kept(mask)) == (round(0.3 * 216) if scope == "global" else 22 + 32 + 11)
    if scope == "local":
        assert kept(mask) == {name: round(0.3 * size) for name, size in sizes.items()}
    assert {name: leaf.shape for name, leaf in mask.items() if leaf is not None} == {
        name: leaf.shape for name, leaf in params.items() if name in sizes
    }


def test_the_largest_are_kept():
    """Against a sort, in both scopes, with negative scores, infinities and NaN, which is the smallest."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((30, 5)), 100 * rng.standard_normal((7, 8))
    a[0, :3] = np.nan, np.inf, -np.inf
    scores = {"a": a.astype(np.float32), "b": b.astype(np.float32)}
    flat = np.nan_to_num(
        np.concatenate([scores["a"].ravel(), scores["b"].ravel()]), nan=-np.inf, posinf=np.inf, neginf=-np.inf
    )
    for kept_count in (1, 2, 77, 150, 206):
        order = np.argsort(-flat, kind="stable")[:kept_count]
        expected = np.isin(np.arange(206), order)
        mask = mask_from_scores(scores, kept_count / 206)
        np.testing.assert_array_equal(np.concatenate([mask["a"].ravel(), mask["b"].ravel()]), expected)
    local = mask_from_scores(scores, 0.5, scope="local")
    for name, leaf in scores.items():
        threshold = np.sort(np.nan_to_num(leaf.ravel(), nan=-np.inf, posinf=np.inf, neginf=-np.inf))[leaf.size // 2]
        np.testing.assert_array_equal(local[name], leaf >= threshold)


def test_ties_are_kept_by_index():
    """All scores equal, or all zero, whatever the zero's sign: the first ones in the tree's order."""
    for value in (1.0, 0.0):
        scores = {"a": np.full((3, 4), value, np.float32), "b": np.full((2, 5), -value, np.float32) if value == 0 else
                  np.full((2, 5), value, np.float32)}  # fmt: skip
        mask = mask_from_scores(scores, 15 / 22)
        assert mask["a"].all()
        np.testing.assert_array_equal(mask["b"], np.arange(10).reshape(2, 5) < 3)
    scores = {"a": np.array([[2.0, 1.0, 1.0, 3.0, 1.0]], np.float32)}
    np.testing.assert_array_equal(mask_from_scores(scores, 0.6)["a"], [[True, True, False, True, False]])


def test_masks_are_the_same_under_jit_and_vmap():
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(net(seed=seed) for seed in range(3)))
    one = jax.jit(lambda params: prune(magnitude_scores, params, 0.2, steps=2))
    together = jax.jit(jax.vmap(one))(stacked)
    for seed in range(3):
        alone = prune(magnitude_scores, net(seed=seed), 0.2, steps=2)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf, i=seed: leaf[i], together), alone)


@pytest.mark.parametrize(
    ("name", "schedule"), [("synflow", "exponential"), ("snip", "linear"), ("random", "exponential")]
)
def test_masks_are_nested(name, schedule):
    """What a run has removed after e steps is removed in the end; counts follow the schedule."""
    params, score, seen = net(), scorers()[name], []

    def watched(params):
        found = score(params)
        jax.debug.callback(lambda leaves: seen.append(leaves), params)
        return found

    mask = prune(watched, params, 0.1, steps=4, schedule=schedule)
    jax.block_until_ready(mask)
    jax.effects_barrier()
    masks = [{name: np.asarray(leaf) != 0 for name, leaf in leaves.items()} for leaves in seen] + [mask]
    assert len(masks) == 5
    for earlier, later in itertools.pairwise(masks):
        assert all((later[name] <= earlier[name]).all() for name in params)
    shares = [0.1 ** (e / 4) if schedule == "exponential" else 1 - 0.9 * e / 4 for e in range(5)]
    assert [sum(kept(one).values()) for one in masks] == [round(share * 216) for share in shares]


def test_density_one_keeps_everything():
    params = net()
    mask = prune(scorers()["synflow"], params, 1, steps=3)
    jax.tree.map(np.testing.assert_array_equal, apply_mask(params, mask), params)


def test_random_edges_are_drawn_evenly():
    """A layer's share of the kept is hypergeometric: 60 of 1,000 weights in the small layer."""
    params = {"a": np.zeros((940, 1), np.float32), "b": np.zeros((60, 1), np.float32)}
    count = jax.jit(lambda key: mask_from_scores(random_scores(params, key), 0.5)["b"].sum())
    counts = [int(count(jax.random.key(seed))) for seed in range(100)]
    variance = 500 * 0.06 * 0.94 * 500 / 999
    assert abs(np.mean(counts) - 30) < 4 * np.sqrt(variance / 100)


# --- scores -------------------------------------------------------------------------------------------


def test_snip_is_the_finite_difference_in_the_mask():
    params, (x, labels) = net(biases=True), data()

    def loss(factors):
        """In float64, so that a small step can be taken."""
        h = x.astype(np.float64)
        for i in range(3):
            h = h @ (params[f"w{i}"] * factors[f"w{i}"]) + params[f"b{i}"]
            h = np.maximum(h, 0) if i < 2 else h
        h = h - h.max(axis=1, keepdims=True)
        return (np.log(np.exp(h).sum(axis=1)) - h[np.arange(len(h)), labels]).mean()

    ones = {f"w{i}": np.ones(params[f"w{i}"].shape) for i in range(3)}
    expected = {}
    for name, leaf in ones.items():
        expected[name] = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = {key: value.copy() for key, value in ones.items()}
                moved[name][index] += step
                ends.append(loss(moved))
            expected[name][index] = abs(ends[0] - ends[1]) / 2e-6
    total = sum(leaf.sum() for leaf in expected.values())
    scores = jax.jit(lambda params: snip_scores(apply, params, x, labels))(params)
    assert scores["b0"] is None
    for name, leaf in expected.items():
        np.testing.assert_allclose(scores[name], leaf / total, rtol=1e-3, atol=1e-6)


def test_grasp_is_the_finite_difference_of_the_gradient():
    """H g by central differences of the gradient along g, and by the whole Hessian."""
    params, (x, labels) = net(widths=(5, 4)), data()
    kernels = {name: jnp.asarray(leaf) for name, leaf in params.items()}

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x) / 3, labels).mean()

    flat, unravel = jax.flatten_util.ravel_pytree(kernels)
    gradient = jax.grad(lambda flat: loss(unravel(flat)))
    step = 1e-2

    @jax.jit
    def products(flat):
        g = gradient(flat)
        by_hessian = jax.jacfwd(gradient)(flat) @ g
        return by_hessian, (gradient(flat + step * g) - gradient(flat - step * g)) / (2 * step)

    by_hessian, by_difference = products(flat)
    np.testing.assert_allclose(by_difference, by_hessian, rtol=0.02, atol=1e-4)
    product = flat * by_hessian
    scores = grasp_scores(apply, params, x, labels, temperature=3)
    found = jax.flatten_util.ravel_pytree(scores)[0]
    np.testing.assert_allclose(found, product / abs(product.sum()), rtol=1e-3, atol=1e-5)


def test_grasp_keeps_what_lowers_the_gradient_norm_most_when_removed():
    """The card's sign: the first-order change of |g|^2 when w goes is -2 w (H g), so the largest are kept."""
    params, (x, labels) = net(widths=(5, 4)), data()

    def squared_norm(params):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), labels).mean()

        return sum((leaf**2).sum() for leaf in jax.tree.leaves(jax.grad(loss)(params)))

    kernels = {name: jnp.asarray(leaf) for name, leaf in params.items()}
    slope = jax.jit(jax.grad(squared_norm))(kernels)
    change = jax.tree.map(lambda w, s: -w * s, kernels, slope)  # of removing each weight, to first order
    scores = grasp_scores(apply, params, x, labels, temperature=1)
    a, b = (jax.flatten_util.ravel_pytree(tree)[0] for tree in (scores, change))
    assert np.corrcoef(a, b)[0, 1] == pytest.approx(-1, abs=1e-4)


def test_synflow_is_conserved_in_every_hidden_unit_and_every_layer():
    params = net()
    scores = jax.jit(lambda params: synflow_scores(apply, params, SHAPE))(params)
    for before, after in (("w0", "w1"), ("w1", "w2")):
        np.testing.assert_allclose(scores[before].sum(axis=0), scores[after].sum(axis=1), rtol=1e-5)
    sums = [float(leaf.sum()) for leaf in scores.values()]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-5)
    # The definition: the flow is a product of absolute matrices.
    a, b, c = (np.abs(params[f"w{i}"]).astype(float) for i in range(3))
    middle = b * np.outer(np.ones(6) @ a, c @ np.ones(4))
    found = np.asarray(scores["w1"], float)
    np.testing.assert_allclose(found / found.sum(), middle / middle.sum(), rtol=1e-5)


def test_synflow_knows_neither_signs_nor_data_nor_biases():
    params = net(biases=True)
    rng = np.random.default_rng(5)
    flipped = {name: leaf * rng.choice([-1, 1], leaf.shape).astype(np.float32) for name, leaf in params.items()}
    named = {f"layer{i}": {"kernel": params[f"w{i}"], "bias": params[f"b{i}"]} for i in range(3)}

    def by_name(params, x):
        return apply({f"{new}{i}": params[f"layer{i}"][old] for i in range(3) for new, old in
                      (("w", "kernel"), ("b", "bias"))}, x)  # fmt: skip

    plain = synflow_scores(apply, {name: leaf for name, leaf in params.items() if name[0] == "w"}, SHAPE)
    with_biases = synflow_scores(by_name, named, SHAPE)
    for i in range(3):
        np.testing.assert_allclose(with_biases[f"layer{i}"]["kernel"], plain[f"w{i}"], rtol=1e-6)
    jax.tree.map(
        np.testing.assert_array_equal,
        synflow_scores(apply, flipped, SHAPE),
        synflow_scores(apply, params, SHAPE),
    )


@pytest.mark.parametrize(("layers", "gain", "rescale"), [(40, 18.0, False), (40, 1 / 18, False), (40, 1e4, True)])
def test_synflow_of_deep_nets_stays_in_range(layers, gain, rescale):
    """Flows of 18^40 = 10^50, 10^-50 and 10^160: scores in float64 differ by one factor."""
    rng = np.random.default_rng(0)
    stack = rng.uniform(0.5, 1.5, (layers, 8, 8)) * gain / 8

    def deep(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    def kernel_by_kernel(params, x):
        for i in range(layers):
            x = x @ params[f"w{i:03}"]
        return x

    if rescale:
        params = {f"w{i:03}": stack[i].astype(np.float32) for i in range(layers)}
        scores = jax.jit(lambda params: synflow_scores(kernel_by_kernel, params, (8,), rescale=True))(params)
        found = np.stack(list(scores.values())).astype(float)
    else:
        scores = jax.jit(lambda params: synflow_scores(deep, params, (8,)))({"w": stack.astype(np.float32)})
        found = np.asarray(scores["w"], float)
    forward, backward = [np.ones(8)], [np.ones(8)]
    for w in stack:
        forward.append(forward[-1] @ w / gain)
    for w in stack[::-1]:
        backward.append(w @ backward[-1] / gain)
    expected = np.stack([np.outer(forward[i], backward[layers - 1 - i]) * stack[i] for i in range(layers)])
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-3)


def test_synflow_collapses_no_layer_where_that_can_be_avoided():
    """The card's test, down to one weight a layer; in one step it does collapse."""
    params = net(widths=(40, 40, 5), inputs=30)
    size = 30 * 40 + 40 * 40 + 40 * 5

    @jax.jit
    def masks(params):
        hundred = [
            prune(lambda p: synflow_scores(apply, p, (30,)), params, k / size, steps=100) for k in (3, 4, 10, 60)
        ]
        once = prune(lambda p: synflow_scores(apply, p, (30,)), params, 10 / size, steps=1)
        return hundred, once

    hundred, once = masks(params)
    for mask, count in zip(hundred, (3, 4, 10, 60), strict=True):
        assert sum(kept(mask).values()) == count
        assert min(kept(mask).values()) >= 1
        # More than a weight in each: they form a path.
        assert np.abs(apply(jax.tree.map(np.abs, apply_mask(params, mask)), np.ones((1, 30), np.float32))).max() > 0
    assert min(kept(once).values()) == 0


def test_a_resnet_is_pruned_from_outside():
    """Kernels of convolutions and the last layer alone, with statistics closed over."""
    model, x = ResNet(8, width=2), np.ones((1, 8, 8, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), variables["params"])
    statistics = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), variables["batch_stats"])

    def evaluate(params, x):
        y: Any = model.apply({"params": params, "batch_stats": statistics}, x)
        return y

    mask = jax.jit(lambda params: prune(lambda p: synflow_scores(evaluate, p, x.shape[1:]), params, 0.2))(params)
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim >= 2]
    assert len(jax.tree.leaves(mask)) == len(kernels) == 10
    assert int(count_kept(mask)) == round(0.2 * sum(leaf.size for leaf in kernels))
    assert mask["stem_norm"]["scale"] is None


def test_the_user_says_what_is_pruned():
    params = net(biases=True)
    mask = prune(lambda p: magnitude_scores(p, prunable=lambda path, _: path in ("w1", "b1")), params, 0.5)
    assert [name for name, leaf in mask.items() if leaf is not None] == ["b1", "w1"]


# --- use ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True)),
        optax.adamw(0.1, weight_decay=0.1),
    ],
    ids=["momentum", "decay", "adamw"],
)
def test_nothing_revives_a_pruned_weight(optimizer):
    """Even if the gradient is that of the dense net, which starts with weights in the pruned places."""
    params, (x, labels) = net(biases=True), data()
    mask = prune(magnitude_scores, params, 0.3)
    wrapped = masked(optimizer, mask)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), labels).mean()

    @jax.jit
    def run(params):
        def step(state, _):
            params, memory = state
            updates, memory = wrapped.update(jax.grad(loss)(params), memory, params)
            return (optax.apply_updates(params, updates), memory), None

        return jax.lax.scan(step, (params, wrapped.init(params)), length=5)[0]

    end, memory = run(params)
    for name, keep in mask.items():
        moved = np.asarray(end[name] != params[name])
        # Units that are dead for all inputs rest, too, where nothing decays.
        assert moved.any()
        assert keep is None or not moved[~keep].any()
    for leaf in jax.tree.leaves(memory):
        if leaf.shape == mask["w1"].shape:
            assert not leaf[~mask["w1"]].any()


def test_the_masked_gradient_is_zero_outside():
    params, (x, labels) = net(), data()
    mask = prune(magnitude_scores, params, 0.3)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(apply(apply_mask(params, mask), x), labels).mean()

    gradient = jax.grad(loss)({name: jnp.asarray(leaf) for name, leaf in params.items()})
    for name, leaf in gradient.items():
        assert not leaf[~mask[name]].any()
        assert leaf[mask[name]].any()


def test_bytes_of_a_pruned_net():
    params = {"w": np.zeros((30, 5), np.float32), "h": np.zeros((3, 3), jnp.bfloat16), "b": np.zeros(7, np.float32)}
    mask = {"w": np.zeros((30, 5), bool), "h": np.eye(3, dtype=bool), "b": None}
    mask["w"][::3] = True  # 50 of 150
    values = 50 * 4 + 3 * 2 + 7 * 4
    assert pruned_bytes(params, mask, index="none") == values
    assert pruned_bytes(params, mask) == values + 19 + 2  # 150 and 9 bits, in whole bytes
    assert pruned_bytes(params, mask, index="int32") == values + 4 * 53
    assert pruned_bytes(params, mask, index="int16") == values + 2 * 53
    everything = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    assert pruned_bytes(params, everything, index="none") == stored_bytes(params)


def test_long_gaps_take_a_stored_zero():
    """65,536 empty places before a weight still fit 16 bits as 65,536 - 1 of a filler, and then a gap of none."""
    params = {"w": np.zeros((1, 200_000), np.float32)}
    for place, entries in ((65_535, 1), (65_536, 2), (131_071, 2), (131_072, 3)):
        mask = {"w": np.zeros((1, 200_000), bool)}
        mask["w"][0, place] = True
        assert pruned_bytes(params, mask, index="int16") == entries * (4 + 2)


# --- lottery tickets ----------------------------------------------------------------------------------


def test_a_ticket_keeps_the_largest_trained_survivors_and_rewinds():
    """Training that is known: every call adds a given tree. Against a loop with argsort."""
    start, calls = net(), []
    gains = [net(seed=seed) for seed in (7, 8, 9)]

    def train(params, mask):
        for name, keep in mask.items():
            assert not np.asarray(params[name])[~np.asarray(keep)].any()
        calls.append(kept(mask))
        return {name: leaf + gains[len(calls) - 1][name] for name, leaf in params.items()}

    def rewind(params):
        return {name: leaf + 0.25 for name, leaf in params.items()}

    ticket = lottery_ticket(train, start, 0.1, levels=3, rewind=rewind)
    assert ticket.trainings == 4
    alive = np.ones(216, bool)
    early = np.concatenate([leaf.ravel() + np.float32(0.25) for leaf in start.values()])
    for level in range(3):
        assert sum(calls[level].values()) == alive.sum()
        trained = np.where(alive, early, 0) + np.concatenate([leaf.ravel() for leaf in gains[level].values()])
        scores = np.where(alive, np.abs(trained), -1)
        alive = np.isin(np.arange(216), np.argsort(-scores)[: round(216 * 0.1 ** ((level + 1) / 3))])
    np.testing.assert_array_equal(np.concatenate([np.asarray(leaf).ravel() for leaf in ticket.mask.values()]), alive)
    found = np.concatenate([np.asarray(leaf).ravel() for leaf in ticket.params.values()])
    np.testing.assert_array_equal(found, np.where(alive, early, 0))


def test_stacked_runs_get_tickets_of_their_own():
    """Training doubles the weights; each run's ticket is that of the run alone."""
    nets = [net(biases=True, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *nets)

    def train(params, mask):
        return jax.tree.map(lambda leaf: 2 * leaf, params)

    together = lottery_ticket(train, stacked, 0.2, levels=2, stacked=True)
    for i, one in enumerate(nets):
        alone = lottery_ticket(train, one, 0.2, levels=2)
        for a, b in ((together.mask, alone.mask), (together.params, alone.params)):
            jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), a, b)
        assert together.mask["b0"] is None


# --- bad input ----------------------------------------------------------------------------------------

PARAMS = net()
REFUSED = [
    (lambda: mask_from_scores(PARAMS, 0.0), ValueError, r"density is 0.0; it must be in \(0, 1\]"),
    (lambda: mask_from_scores(PARAMS, 1.5), ValueError, r"density is 1.5; it must be in \(0, 1\]"),
    (lambda: mask_from_scores(PARAMS, float("nan")), ValueError, "density is nan; it must be in"),
    (lambda: prune(magnitude_scores, PARAMS, -1), ValueError, "density is -1; it must be in"),
    (lambda: prune(magnitude_scores, PARAMS, 0.5, steps=0), ValueError, "steps is 0; it must be at least 1"),
    (lambda: mask_from_scores({"w": None}, 0.5), ValueError, "scores have no leaf"),
    (lambda: magnitude_scores({"b": np.ones(3, np.float32)}), ValueError, "params have no prunable leaf"),
    (lambda: magnitude_scores({"w": np.ones((2, 2), int)}), TypeError, "params w has dtype int64; what is pruned"),
    (lambda: random_scores({"a": {"w": np.ones((2, 2), bool)}}, jax.random.key(0)), TypeError, "a/w has dtype bool"),
    (
        lambda: apply_mask(PARAMS, {"w0": None, "w1": np.ones((2, 2), bool), "w2": None}),
        ValueError,
        r"mask of w1 has shape \(2, 2\)",
    ),
    (
        lambda: grasp_scores(apply, PARAMS, *data(), temperature=0),
        ValueError,
        "temperature is 0; it must be positive",
    ),
    (lambda: lottery_ticket(lambda p, m: p, PARAMS, 0.5, 0), ValueError, "levels is 0; it must be at least 1"),
    (lambda: lottery_ticket(lambda p, m: p, PARAMS, 2, 1), ValueError, "density is 2; it must be in"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_unknown_words_are_refused():
    """The shape checks of the tests may speak before the functions do."""
    unknown: Any = "each"
    mask = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), PARAMS)
    for name, call in (
        ("scope", lambda: mask_from_scores(PARAMS, 0.5, scope=unknown)),
        ("scope", lambda: prune(magnitude_scores, PARAMS, 0.5, scope=unknown)),
        ("schedule", lambda: prune(magnitude_scores, PARAMS, 0.5, schedule=unknown)),
        ("index", lambda: pruned_bytes(PARAMS, mask, index=unknown)),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            call()


def test_all_scores_can_be_had_from_one_place():
    for name in ("random_scores", "magnitude_scores", "snip_scores", "grasp_scores", "synflow_scores", "is_kernel"):
        assert getattr(pruning, name) is getattr(pruning_scores, name)


def test_a_linen_model_is_pruned_and_still_applies():
    model, x = MLP((8, 4)), data()[0]
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    mask = prune(magnitude_scores, params, 0.5)
    y: Any = model.apply({"params": apply_mask(params, mask)}, x)
    first, second = params["Dense_0"], params["Dense_1"]
    hidden = np.maximum(x @ np.where(mask["Dense_0"]["kernel"], first["kernel"], 0), 0)
    np.testing.assert_allclose(
        y, hidden @ np.where(mask["Dense_1"]["kernel"], second["kernel"], 0), rtol=1e-4, atol=1e-5
    )
