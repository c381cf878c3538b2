"""Deja Vu: the sparse step is the decoder with all other heads and neurons multiplied by zero, whatever it skips."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.models.decoder import DecoderConfig, decoder_model, forward, init_params
from hashml.models.generation import generate
from hashml.models.rotary import Rotary
from hashml.sparse.chosen_heads import empty_ring
from hashml.sparse.deja_vu import Sparsity, choose, deja_vu_engine, sparse_params, sparse_step, uniform_sparsity
from hashml.sparse.predictors import init_predictor, predict
from hashml.sparse.residuals import (
    Choice,
    head_query,
    masked_forward,
    neuron_query,
    oracle_heads,
    oracle_neurons,
    project,
)

L, FF, HQ, H, D, V = 3, 24, 4, 2, 8, 23
CONFIG = DecoderConfig(vocabulary=V, features=16, layers=L, heads=HQ, kv_heads=H, head_dim=D, hidden=FF,
                       activation="relu", gated=False, context=96)  # fmt: skip
GATED = dataclasses.replace(CONFIG, gated=True, qkv_bias=True, sliding_window=7, tied=False)
ROWS, LENGTH, FIRST = 3, 70, 5
"""Of the sequences; the first columns are a prompt."""
TOKENS = np.random.default_rng(0).integers(0, V, (ROWS, LENGTH)).astype(np.int32)
SPARSITY = Sparsity((9, 7, 12), (2, 1, 3))


def params_of(config):
    """Parameters whose attention and biases matter."""
    params = init_params(jax.random.key(0), config)
    layers = {name: leaf * 2 if leaf.ndim == 3 else leaf for name, leaf in params["layers"].items()}
    for place, name in enumerate(name for name in layers if name.endswith("bias")):
        layers[name] = jax.random.normal(jax.random.key(place), layers[name].shape)
    return params | {"layers": layers}


PARAMS = params_of(CONFIG)
KEYS = jax.random.split(jax.random.key(1), L)
NEURONS = jax.vmap(lambda key: init_predictor(key, 16, 6, FF))(KEYS)
HEADS = jax.vmap(lambda key: init_predictor(jax.random.fold_in(key, 1), 16, 3, HQ))(KEYS)
SPARSE = sparse_params(PARAMS, CONFIG, NEURONS, HEADS)


@functools.cache
def prefilled(config):
    """Keys and values of the prompt, which is dense whatever comes after it."""
    engine = deja_vu_engine(decoder_model(config), uniform_sparsity(config, 1, 1), LENGTH)
    positions = np.broadcast_to(np.arange(FIRST, dtype=np.int32), (ROWS, FIRST))
    params = sparse_params(params_of(config), config)
    return jax.jit(engine.prefill)(params, jnp.asarray(TOKENS[:, :FIRST]), jnp.asarray(positions))[1]


def prompted(sparsity, config=CONFIG):
    rings = L if sparsity.kv_policy == "lazy_kv" else 0
    return prefilled(config)._replace(rings=(empty_ring(ROWS, config, sparsity.ring, jnp.float32),) * rings)


@functools.cache
def program(sparsity, config):
    @jax.jit
    def steps(params, state, tokens):
        def step(state, token):
            logits, state, lists = sparse_step(config, sparsity, params, state, token)
            return state, (logits, lists)

        return jax.lax.scan(step, state, tokens)[1]

    return steps


def decoded(sparsity, params=SPARSE, config=CONFIG):
    """Logits after each token behind the prompt, and masks ``[L, B, n, ...]`` of what each step read."""
    fed = jnp.asarray(TOKENS[:, FIRST:].T)
    logits, lists = program(sparsity, config)(params, prompted(sparsity, config), fed)
    masks = []
    for kind, total in ((lists.neurons, config.hidden), (lists.heads, config.heads)):
        mask = np.zeros((L, ROWS, LENGTH, total), bool)
        mask[:, :, :FIRST] = True
        for layer, (idx, valid) in enumerate(kind):
            idx = np.asarray(idx)
            valid = np.ones(idx.shape, bool) if valid is None else np.asarray(valid)
            for place in range(LENGTH - FIRST):
                for row in range(ROWS):
                    own = (place, row) if idx.ndim == 3 else (place,)
                    mask[layer, row, FIRST + place, idx[own][valid[own]]] = True
        masks.append(mask)
    return np.asarray(logits).swapaxes(0, 1), *masks


def naive(config, params, neurons, heads):
    """The decoder in float64 with masks: logits, x and y of all layers."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def turned(z):
        angles = np.arange(LENGTH)[:, None] * 10000.0 ** (-np.arange(D // 2) / (D // 2))
        a, b = z[..., : D // 2], z[..., D // 2 :]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)

    back = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    seen = (back >= 0) & (back < (config.sliding_window or LENGTH))
    x, xs, ys = p["embedding"][TOKENS], [], []
    for layer in range(L):
        w = {name: leaf[layer] for name, leaf in p["layers"].items()}
        u = norm(x, w["attention_norm"])
        q, k, v = (
            (u @ w[name] + w.get(f"{name}_bias", 0)).reshape(ROWS, LENGTH, -1, D).transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        out = np.zeros((ROWS, LENGTH, HQ, D))
        for head in range(HQ):
            own = head // (HQ // H)
            logits = np.where(seen, turned(q[:, head]) @ turned(k[:, own]).swapaxes(1, 2) / np.sqrt(D), -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[:, :, head] = weights / weights.sum(-1, keepdims=True) @ v[:, own]
        y = x + (out * heads[layer][..., None]).reshape(ROWS, LENGTH, -1) @ w["output"]
        u = norm(y, w["mlp_norm"])
        hidden = np.maximum(u @ w["gate"], 0) * (u @ w["up"]) if config.gated else np.maximum(u @ w["up"], 0)
        xs.append(x)
        ys.append(y)
        x = y + (hidden * neurons[layer]) @ w["down"]
    head = p["embedding"].T if config.tied else p["head"]
    return norm(x, p["norm"]) @ head, np.stack(xs), np.stack(ys)


def predicted_by(sparsity):
    """The scores of the predictors, for `masked_forward`."""
    return {
        "neurons": Choice(
            lambda data, seen, found: predict(data[0], neuron_query(seen, sparsity.neuron_lookahead)),
            np.asarray(sparsity.neurons),
        ),
        "heads": Choice(
            lambda data, seen, found: predict(data[1], head_query(seen, sparsity.head_lookahead)),
            np.asarray(sparsity.heads),
        ),
        "data": (NEURONS, HEADS),
    }


@functools.cache
def dense_keys(batch):
    """Keys and values of all heads; every row has its own lists, or all have one."""
    return decoded(dataclasses.replace(SPARSITY, batch=batch))


@pytest.fixture(scope="module")
def rows():
    return dense_keys("row")


# --- equal to masks -------------------------------------------------------------------------------


def test_masked_forward_is_a_naive_loop_and_the_step_is_masked_forward(rows):
    trace = masked_forward(PARAMS, CONFIG, TOKENS, prompt=FIRST, **predicted_by(SPARSITY))
    expected, x, y = naive(CONFIG, PARAMS, np.asarray(trace.neurons), np.asarray(trace.heads))
    np.testing.assert_allclose(trace.logits, expected, atol=2e-4)
    np.testing.assert_allclose(trace.residuals.x, x, atol=1e-4)
    np.testing.assert_allclose(np.asarray(trace.residuals.y), y, atol=1e-4)
    before = np.concatenate([x[:1], x[:-1]])
    np.testing.assert_allclose(trace.residuals.x_before, before, atol=1e-4)
    np.testing.assert_allclose(trace.residuals.y_before, np.concatenate([x[:1], y[:-1]]), atol=1e-4)
    logits, neurons, heads = rows
    np.testing.assert_array_equal(neurons, trace.neurons)
    np.testing.assert_array_equal(heads, trace.heads)
    np.testing.assert_allclose(logits, expected[:, FIRST:], atol=2e-4)
    counts = neurons[:, :, FIRST:].sum(-1), heads[:, :, FIRST:].sum(-1)
    for found, allowed in zip(counts, (SPARSITY.neurons, SPARSITY.heads), strict=True):
        np.testing.assert_array_equal(found, np.broadcast_to(np.array(allowed)[:, None, None], found.shape))


@pytest.mark.parametrize(("neuron", "head"), [(0, 0), (0.5, 0.5), (1, 1)])
def test_the_largest_logits_of_the_residual_that_lookahead_names(neuron, head):
    sparsity = dataclasses.replace(SPARSITY, neuron_lookahead=neuron, head_lookahead=head)
    trace = jax.jit(lambda: masked_forward(PARAMS, CONFIG, TOKENS, **predicted_by(sparsity)))()
    x, y = np.asarray(trace.residuals.x), np.asarray(trace.residuals.y)
    x_before, y_before = (np.concatenate([x[:1], z[:-1]]) for z in (x, y))
    for predictor, query, mask, kept in (
        (NEURONS, {0: y, 0.5: x, 1: x_before}[neuron], trace.neurons, sparsity.neurons),
        (HEADS, {0: x, 0.5: y_before, 1: x_before}[head], trace.heads, sparsity.heads),
    ):
        for layer in range(L):
            logits = query[layer] @ np.asarray(predictor.first[layer]) @ np.asarray(predictor.second[layer])
            ordered = np.sort(logits, axis=-1)
            clear = ordered[..., -kept[layer]] - ordered[..., -kept[layer] - 1] > 1e-4
            assert clear.mean() > 0.95
            best = logits >= ordered[..., -kept[layer]][..., None]
            np.testing.assert_array_equal(np.asarray(mask)[layer][clear], best[clear])


def test_a_union_serves_all_rows_with_what_any_of_them_names():
    logits, neurons, heads = dense_keys("union")
    expected, x, _ = naive(CONFIG, PARAMS, neurons, heads)
    np.testing.assert_allclose(logits, expected[:, FIRST:], atol=2e-4)
    assert (neurons == neurons[:, :1]).all()
    sizes = neurons[:, 0, FIRST:].sum(-1)
    assert (sizes >= np.array(SPARSITY.neurons)[:, None]).all()
    assert (sizes.mean(axis=1) > np.array(SPARSITY.neurons)).all()
    own = x[1] @ np.asarray(NEURONS.first[1]) @ np.asarray(NEURONS.second[1])
    best = np.greater_equal(own, np.sort(own, axis=-1)[..., -SPARSITY.neurons[1], None])
    np.testing.assert_array_equal(neurons[1, 0, FIRST:], best.max(axis=0)[FIRST:])


def test_gates_biases_and_sliding_windows():
    params = params_of(GATED)
    sparse = sparse_params(params, GATED, NEURONS, HEADS)
    logits, neurons, heads = decoded(dataclasses.replace(SPARSITY, kv_policy="lazy_kv", ring=4), sparse, GATED)
    expected, _, _ = naive(GATED, params, neurons, heads)
    np.testing.assert_allclose(logits, expected[:, FIRST:], atol=5e-4)


@pytest.mark.parametrize(("ring", "batch"), [(16, "row"), (5, "union")])
def test_keys_that_are_computed_late_are_the_same_keys(ring, batch):
    """Over 65 tokens, in which heads are skipped for whole runs."""
    lazy = decoded(dataclasses.replace(SPARSITY, kv_policy="lazy_kv", ring=ring, batch=batch))
    dense = dense_keys(batch)
    for found, expected in zip(lazy[1:], dense[1:], strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(lazy[0], dense[0], atol=1e-5)
    of_keys = dense[2][:, :, FIRST:].reshape(L, ROWS, -1, H, HQ // H).max(axis=-1)
    if batch == "row":
        assert not of_keys.all()
        assert 0.1 < of_keys[1].mean() < 0.9  # one of four heads: chosen and skipped by turns


# --- exact in a limit -----------------------------------------------------------------------------


def test_all_heads_and_neurons_are_the_dense_model():
    everything = uniform_sparsity(CONFIG, 1, 1.0)
    assert everything.neurons == (FF,) * L
    assert everything.heads == (HQ,) * L
    bare = sparse_params(PARAMS, CONFIG)  # no predictor is asked
    logits, _, _ = decoded(everything, bare)
    np.testing.assert_allclose(logits, forward(PARAMS, CONFIG, jnp.asarray(TOKENS))[:, FIRST:], atol=1e-4)


def test_a_list_that_holds_all_positive_neurons_is_exact():
    data = {"down_norms": jnp.linalg.norm(PARAMS["layers"]["down"], axis=-1)}

    @jax.jit
    def kept(most):
        trace = masked_forward(PARAMS, CONFIG, TOKENS, neurons=Choice(oracle_neurons, most), data=data)
        return trace.logits, trace.activations

    logits, activations = kept(np.full(L, FF))
    np.testing.assert_allclose(logits, forward(PARAMS, CONFIG, jnp.asarray(TOKENS)), atol=1e-5)
    most = (np.asarray(activations) > 0).sum(-1).max(axis=(1, 2))
    assert (most < FF).all()
    np.testing.assert_allclose(kept(most)[0], logits, atol=1e-5)
    assert np.abs(np.asarray(kept(most - 8)[0] - logits)).max() > 0.1


def test_the_oracle_of_heads_keeps_those_of_largest_norm():
    trace = masked_forward(PARAMS, CONFIG, TOKENS, heads=Choice(oracle_heads, np.full(L, 2)))
    norms = np.asarray(trace.head_norms)
    np.testing.assert_array_equal(trace.heads, norms >= np.sort(norms, axis=-1)[..., -2:-1])
    q, k, v = (project(jax.tree.map(lambda leaf: leaf[0], PARAMS["layers"]), CONFIG,
                       jnp.ones((1, 1, 16)), name) for name in ("query", "key", "value"))  # fmt: skip
    assert q.shape == (1, HQ, 1, D)
    assert k.shape == v.shape == (1, H, 1, D)


def test_permuted_neurons_are_permuted_lists(rows):
    order = np.random.default_rng(3).permutation(FF)
    layers = PARAMS["layers"]
    swapped = PARAMS | {"layers": layers | {"up": layers["up"][..., order], "down": layers["down"][:, order]}}
    sparse = sparse_params(swapped, CONFIG, NEURONS._replace(second=NEURONS.second[..., order]), HEADS)
    logits, neurons, heads = decoded(SPARSITY, sparse)
    np.testing.assert_array_equal(neurons, rows[1][..., order])
    np.testing.assert_array_equal(heads, rows[2])
    np.testing.assert_allclose(logits, rows[0], atol=1e-5)


# --- what is not read -----------------------------------------------------------------------------


def test_nothing_else_is_read():
    """One step from the same state, with NaN in all that no list names."""
    sparsity = dataclasses.replace(SPARSITY, kv_policy="lazy_kv", batch="union")
    state = prompted(sparsity)
    token = jnp.asarray(TOKENS[:1, FIRST])
    state = jax.tree.map(lambda leaf: leaf[:1] if leaf.ndim else leaf, state)  # one row

    step = jax.jit(lambda params: sparse_step(CONFIG, sparsity, params, state, token))
    expected, _, lists = step(SPARSE)
    spoiled = []
    for layer, weights in enumerate(SPARSE["layers"]):
        spoilt = dict(weights)
        heads = np.asarray(lists.heads[layer].idx)
        named = {"w_in": lists.neurons[layer].idx, "w_out": lists.neurons[layer].idx, "query": heads,
                 "output": heads, "key": heads // (HQ // H), "value": heads // (HQ // H)}  # fmt: skip
        for name, idx in named.items():
            kept = np.zeros(weights[name].shape[0], bool)
            kept[np.asarray(idx)] = True
            spoilt[name] = jnp.where(kept[:, None] if name[0] == "w" else kept[:, None, None], weights[name], jnp.nan)
        spoiled.append(spoilt)
    assert len(set(np.asarray(lists.heads[1].idx) // 2)) == 1  # of this layer's key heads one is skipped
    found, after, _ = step(SPARSE | {"layers": tuple(spoiled)})
    np.testing.assert_array_equal(found, expected)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in (*after.dense.k, *after.dense.v))


def test_with_lookahead_one_lists_wait_for_nothing_of_the_block_before():
    token = jnp.asarray(TOKENS[:, FIRST])
    layers = list(SPARSE["layers"])
    layers[1] = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, layers[1]) | {
        name: layers[1][name] for name in ("neurons", "heads")
    }
    other = SPARSE | {"layers": tuple(layers)}
    for lookahead, same in ((1, True), (0.5, False)):
        sparsity = dataclasses.replace(SPARSITY, neuron_lookahead=lookahead, head_lookahead=lookahead)
        state = prompted(sparsity)
        step = jax.jit(
            lambda params, state=state, sparsity=sparsity: sparse_step(CONFIG, sparsity, params, state, token)
        )
        (_, _, first), (_, _, second) = step(SPARSE), step(other)
        assert np.array_equal(first.neurons[2].idx, second.neurons[2].idx) is same
        if same:
            np.testing.assert_array_equal(first.heads[2].idx, second.heads[2].idx)


def test_generate_says_what_the_masks_say():
    """A ragged batch: the shorter row is padded, and says what it would say alone."""
    model, prompts, count = decoder_model(CONFIG), [[1, 2, 3], [4, 9, 9, 1, 3]], 10
    engine = deja_vu_engine(model, dataclasses.replace(SPARSITY, kv_policy="lazy_kv", ring=3), 20)
    said = generate(model, SPARSE, prompts, count, temperature=0, cache=engine)[0]
    alone = np.array([[1, 2, 3, *said]], np.int32)
    logits = masked_forward(PARAMS, CONFIG, alone, prompt=3, **predicted_by(SPARSITY)).logits
    assert said == np.asarray(logits)[0, 2:-1].argmax(-1).tolist()
    assert len(set(said)) > 1


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neuron_lookahead": 2}, "neuron_lookahead is 2; allowed are 0, 0.5, 1"),
        ({"ring": 0}, "ring is 0; it is at least 1"),
        ({"heads": (1,)}, "heads has 1 layers; neurons has 3"),
        ({"neurons": (1, 0, 1)}, r"neurons is \(1, 0, 1\); every layer keeps at least 1"),
    ],
)
def test_bad_sparsities(options, message):
    with pytest.raises(ValueError, match=message):
        Sparsity(**({"neurons": (1,) * L, "heads": (1,) * L} | options))


def test_bad_models_and_budgets():
    model = decoder_model(CONFIG)
    with pytest.raises(ValueError, match=r"neurons has 1 layers; the model has 3"):
        deja_vu_engine(model, Sparsity((4,), (1,)), 8)
    with pytest.raises(ValueError, match=r"heads is \(5, 5, 5\); a layer has 4"):
        deja_vu_engine(model, Sparsity((4,) * L, (5,) * L), 8)
    with pytest.raises(ValueError, match="neurons is 0; a share lies above 0"):
        uniform_sparsity(CONFIG, 0, 1)
    with pytest.raises(ValueError, match="predictor is None; 2 of 24 are chosen by one"):
        choose(None, jnp.ones((1, 16)), 2, FF, "row")
    with pytest.raises(ValueError, match="count is 30; a layer has 24"):
        choose(None, jnp.ones((1, 16)), 30, FF, "row")
    smooth = dataclasses.replace(CONFIG, activation="gelu")
    with pytest.raises(ValueError, match="activation is 'gelu'; allowed is 'relu'"):
        masked_forward(PARAMS, smooth, TOKENS)
    with pytest.raises(ValueError, match="smear is True; allowed is False"):
        sparse_params(PARAMS, dataclasses.replace(CONFIG, smear=True))
    assert CONFIG.rotary == Rotary()  # what `naive` turns by
