"""Calibration: keys, values and gradients of a decoder, books and tables learned of them, files."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.exchange import ExchangeError
from hashml.kvcache.calibration import (
    calibrate_coupled,
    calibrate_nonuniform,
    collect,
    learn_coupled,
    learn_nonuniform,
    with_floor,
)
from hashml.kvcache.contract import CodecState
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.kvquant import NonUniformKeys, kvquant
from hashml.kvcache.methods import cache_layers
from hashml.kvcache.serving import decode_step, prefill
from hashml.kvcache.spec import CacheSpec
from hashml.kvcache.state import LayerTables, init
from hashml.kvcache.tables import learn_tables, load_tables, model_fingerprint, save_tables
from hashml.models.decoder import DecoderConfig, decoder_model, forward, init_params, rms_norm

KEY = jax.random.key(0)
CONFIG = DecoderConfig(
    vocabulary=17, features=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24, qkv_bias=True, context=32
)
MODEL = decoder_model(CONFIG)
PARAMS = init_params(jax.random.key(1), CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 17, (3, 20))
LAYERS = 2


@pytest.fixture(scope="module")
def activations():
    return list(collect(MODEL, PARAMS, [TOKENS]))


def errors(codec, params, x):
    """Squared errors of activations ``[N, H, D]`` as the codec gives them back."""
    line = jnp.asarray(x).transpose(1, 0, 2)[None]
    rows = codec.quantise(params, {}, line, jnp.ones(line.shape[:3], bool))
    return np.asarray((codec.decode(params, CodecState(rows, {})) - line) ** 2)[0].transpose(1, 0, 2)


def test_keys_and_values_are_those_before_rotation(activations):
    """Of the first layer by hand, token by token in the order of the sequences."""
    assert len(activations) == LAYERS
    layer = MODEL.layer_params(PARAMS, 0)
    u = rms_norm(PARAMS["embedding"][TOKENS], layer["attention_norm"], CONFIG.norm_eps)
    for found, name in ((activations[0].keys, "key"), (activations[0].values, "value")):
        expected = (u @ layer[name] + layer[f"{name}_bias"]).reshape(60, 2, 8)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert found.dtype == np.float32
    assert all(a.keys.shape == a.value_gradients.shape == (60, 2, 8) for a in activations)


def test_gradients_are_those_of_the_mean_loss(activations):
    """A bias is added to every key or value, so its gradient, of a forward pass that knows no taps, is their sum."""

    def loss(params):
        logits = jax.nn.log_softmax(forward(params, CONFIG, jnp.asarray(TOKENS))[:, :-1])
        return -jnp.take_along_axis(logits, jnp.asarray(TOKENS)[:, 1:, None], axis=-1).mean()

    gradients = jax.grad(loss)(PARAMS)["layers"]
    for index, layer in enumerate(activations):
        for found, name in ((layer.key_gradients, "key_bias"), (layer.value_gradients, "value_bias")):
            expected = np.asarray(gradients[name][index])
            np.testing.assert_allclose(found.sum(axis=0).reshape(-1), expected, atol=2e-5 * np.abs(expected).max())
        # Nobody is asked to predict what follows the last token.
        ends = layer.value_gradients.reshape(3, 20, 2, 8)[:, -1]
        np.testing.assert_array_equal(ends, np.zeros_like(ends))


def test_layer_by_layer_and_sequence_by_sequence_give_the_same(activations):
    """With memory for one layer only there is a pass a layer; and the loss is the mean over all sequences."""
    by_layer = list(collect(MODEL, PARAMS, iter([TOKENS]), memory=1))
    apart = list(collect(MODEL, PARAMS, [*TOKENS]))
    for one, other, third in zip(activations, by_layer, apart, strict=True):
        for a, b, c in zip(one, other, third, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(c, a, atol=1e-5)


def test_fisher_weights_lower_what_an_error_costs(activations):
    """The weighted objective of a Fisher book is below that of a uniform one, and the plain one above."""
    codec = Coupled(2, 3)
    books = {
        fisher: calibrate_coupled(KEY, MODEL, PARAMS, [TOKENS], codec, fisher=fisher) for fisher in (True, False)
    }
    cost = {}
    for fisher, tables in books.items():
        for index, (layer, table) in enumerate(zip(activations, tables, strict=True)):
            assert table.keys["codebook"].shape == (2, 4, 8, 2)
            assert table.keys["codebook"].dtype == jnp.float16
            plain = errors(codec, table.keys, layer.keys).reshape(60, 2, 4, 2).sum(-1)
            weight = (layer.key_gradients.reshape(60, 2, 4, 2) ** 2).sum(-1)
            cost[fisher, index] = (weight * plain).sum(), plain.sum()
    for index in range(LAYERS):
        assert cost[True, index][0] < 0.9 * cost[False, index][0]
        assert cost[True, index][1] > cost[False, index][1]


def test_books_are_learned_of_each_layer_tensor_head_and_group(activations):
    """By hand from `learn_coupled`: the tensor's key folds in its place; values may have a codec of their own."""
    told = []
    tables = calibrate_coupled(
        KEY, MODEL, PARAMS, [TOKENS], Coupled(2, 3), Coupled(4, 2), progress=lambda *count: told.append(count)
    )
    # One array through the model, then keys and values of each layer.
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    for index, layer in enumerate(activations):
        for place, (codec, name) in enumerate(((Coupled(2, 3), "keys"), (Coupled(4, 2), "values"))):
            key = jax.random.fold_in(KEY, 2 * index + place)
            x, gradients = getattr(layer, name), getattr(layer, f"{name[:-1]}_gradients")
            expected = learn_coupled(key, codec, x, gradients)["codebook"]
            np.testing.assert_array_equal(getattr(tables[index], name)["codebook"], expected)
    several = learn_coupled(
        jax.random.fold_in(KEY, 0), Coupled(2, 3), activations[0].keys, activations[0].key_gradients, at_once=3
    )
    np.testing.assert_allclose(several["codebook"], tables[0].keys["codebook"], atol=1e-3)


def test_weights_have_a_floor_and_no_gradient_is_uniform(activations):
    np.testing.assert_allclose(with_floor(jnp.asarray([0.0, 3.0])), [1.5e-12, 3.0], rtol=1e-6)
    x = activations[0].keys
    zero = learn_coupled(KEY, Coupled(2, 3), x, np.zeros_like(x))["codebook"]
    np.testing.assert_array_equal(zero, learn_coupled(KEY, Coupled(2, 3), x)["codebook"])


def test_nonuniform_tables_of_every_layer(activations):
    keys, values = kvquant(2, 1)
    tables = calibrate_nonuniform(KEY, MODEL, PARAMS, [TOKENS], keys, values, q_norm=True)
    for layer, table in zip(activations, tables, strict=True):
        np.testing.assert_allclose(table.keys["low"], np.percentile(layer.keys, 0.5, axis=0), rtol=1e-4, atol=1e-5)
        assert set(table.values) == {"table", "levels"}
        # A constant would leave the variance.
        assert errors(keys, table.keys, layer.keys).mean() < 0.25 * layer.keys.var(axis=0).mean()
        assert errors(values, table.values, layer.values).mean() < 0.25 * layer.values.var(axis=0).mean()


def test_half_precision_models_are_calibrated_in_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    found = next(collect(MODEL, params, [TOKENS]))
    assert found.keys.dtype == found.key_gradients.dtype == np.float32
    assert np.isfinite(found.key_gradients).all()
    assert np.abs(found.key_gradients).max() > 0


def test_an_endless_stream_is_read_as_far_as_it_is_asked_for():
    """The array that reaches the number of tokens is the last, taken whole."""
    taken = []

    def endless():
        for row in itertools.cycle(TOKENS):
            taken.append(row)
            yield row

    (first, *_) = collect(MODEL, PARAMS, endless(), tokens=41)
    assert len(taken) == 3
    assert first.keys.shape == (60, 2, 8)
    with pytest.raises(ValueError, match="tokens is 0; it must be at least 1"):
        collect(MODEL, PARAMS, endless(), tokens=0)


def test_progress_tells_of_passes_through_the_model_before_anything_is_learned():
    """With memory for one layer there are two passes over both arrays, each before its layer's k-means."""
    learned, told = [], []
    tables = calibrate_coupled(
        KEY, MODEL, PARAMS, [TOKENS[:1], TOKENS[1:2]], Coupled(2, 3), memory=1, iterations=1,
        progress=lambda done, total: told.append((done, total, len(learned)))
    )  # fmt: skip
    assert [(done, total) for done, total, _ in told] == [(i, 8) for i in range(1, 9)]
    assert len(tables) == LAYERS


@pytest.mark.parametrize("name", ["keys", "value_gradients"])
def test_what_is_not_finite_is_refused_by_layer(monkeypatch, activations, name):
    """A NaN in one activation would make books of NaN, and nobody would say why."""
    broken = np.array(getattr(activations[1], name))
    broken[3, 0, 2] = np.nan
    layers = [activations[0], activations[1]._replace(**{name: broken})]
    monkeypatch.setattr("hashml.kvcache.calibration._layers", lambda *args: iter(layers))
    said = "gradients of the values" if name == "value_gradients" else "keys"
    with pytest.raises(ValueError, match=f"^{said} of layer 1: 1 of 960 values are not finite"):
        calibrate_coupled(KEY, MODEL, PARAMS, [TOKENS], Coupled(2, 3))
    if name == "keys":
        with pytest.raises(ValueError, match="^x: 1 of 960 values are not finite"):
            learn_coupled(KEY, Coupled(2, 3), broken)
        with pytest.raises(ValueError, match="^x: 1 of 960 values are not finite"):
            learn_nonuniform(KEY, NonUniformKeys(2), broken)
    else:
        calibrate_coupled(KEY, MODEL, PARAMS, [TOKENS], Coupled(2, 3), fisher=False)  # nobody reads them


def test_tables_come_back_from_their_file_and_nobody_else_takes_them(tmp_path):
    path = tmp_path / "tables.safetensors"
    rng = np.random.default_rng(2)
    layers = cache_layers("coupled:2c3b", dataclasses.replace(CONFIG, layers=11), 32)
    tables = tuple(
        LayerTables({"codebook": jnp.asarray(rng.normal(size=(2, 4, 8, 2)), jnp.float16)}) for _ in range(11)
    )
    save_tables(path, tables, layers=layers, params=PARAMS, metadata={"data": "random"})
    # Another policy, other slots, channels chosen in front of the codec: the codec is the same.
    others = cache_layers("h2o@9+coupled:2c3b+think:0.5", dataclasses.replace(CONFIG, layers=11), 64)
    found = load_tables(path, layers=others, params=PARAMS)
    assert len(found) == 11
    for one, other in zip(tables, found, strict=True):
        np.testing.assert_array_equal(one.keys["codebook"], other.keys["codebook"])
        assert other.keys["codebook"].dtype == jnp.float16
        assert other.values is None

    def named(name="coupled:2c3b", **changes):
        return cache_layers(name, dataclasses.replace(CONFIG, layers=11, **changes), 32)

    for wrong, message in (
        (named("coupled:2c4b"), "key_codec: file .*channels=2, bits=3.*, given .*channels=2, bits=4"),
        (layers[:10], "layers: file 11, given 10"),
        (named(kv_heads=4), "kv_heads: file 2, given 4"),
        (named(head_dim=16), "head_dim: file 8, given 16"),
    ):
        with pytest.raises(ExchangeError, match=message):
            load_tables(path, layers=wrong, params=PARAMS)
    with pytest.raises(ExchangeError, match='model: file "[0-9a-f]{32}", given "[0-9a-f]{32}"'):
        load_tables(path, layers=layers, params=init_params(jax.random.key(2), CONFIG))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ExchangeError, match="checksum disagrees"):
        load_tables(path, layers=layers, params=PARAMS)
    with pytest.raises(ValueError, match="tables hold no array"):
        save_tables(path, [LayerTables()], layers=layers[:1], params=PARAMS)
    with pytest.raises(ValueError, match="tables has 11 entries; there are 10 layers"):
        save_tables(path, tables, layers=layers[:10], params=PARAMS)


def test_a_fingerprint_is_of_the_weights_in_any_float_type():
    short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    assert model_fingerprint(PARAMS) == model_fingerprint(short)
    moved = PARAMS | {"embedding": PARAMS["embedding"].at[0, 0].add(1.0)}
    assert model_fingerprint(PARAMS) != model_fingerprint(moved)


@pytest.mark.parametrize("name", ["coupled:2c3b", "kvquant:2o1", "coupled:2c3b+think:0.5", "kvquant:2f1n"])
def test_tables_that_are_missing_or_of_another_model_are_refused_before_they_are_used(name):
    """Before anything is compiled: books of two heads would be taken for the first head of one."""
    layers = cache_layers(name, CONFIG, 32)
    tokens = jnp.asarray(TOKENS[:1])
    pos = jnp.arange(20)[None]
    spec = CacheSpec(layers, 1)
    cache = init(spec, KEY)
    given = {"coupled": {"codebook": jnp.zeros((3, 4, 8, 2), jnp.float16)},
             "kvquant": {"low": jnp.zeros((3, 8)), "high": jnp.zeros((3, 8)), "table": jnp.zeros(4)}}  # fmt: skip
    wrong = (LayerTables(*[given[name.partition(":")[0]]] * 2),) * LAYERS
    for tables, message in (
        ((LayerTables(),) * LAYERS, "tables hold nothing for .*; it learns .*: give what `learn_tables`"),
        (wrong, "this model needs \\[2, .*\\]: they are of another one"),
        (wrong[:1], "tables has 1 entries; spec has 2 layers"),
        ((LayerTables({}, {}),) * LAYERS, "it needs"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill(MODEL, spec, tables, PARAMS, tokens, pos, KEY)
        with pytest.raises(ValueError, match=message):
            decode_step(MODEL, spec, tables, PARAMS, cache, tokens[:, 0])


def test_a_name_with_q_norm_learns_levels():
    """And first tokens that are exact change nothing of what is learned."""
    layers = cache_layers("kvquant:2o1f1n", CONFIG, 32)
    tables = learn_tables(layers, MODEL, PARAMS, [TOKENS], tokens=60)
    expected = calibrate_nonuniform(jax.random.key(0), MODEL, PARAMS, [TOKENS], *kvquant(2, 1), q_norm=True)
    for found, by_hand in zip(tables, expected, strict=True):
        assert set(found.values) == {"table", "levels"}
        np.testing.assert_array_equal(found.keys["levels"], by_hand.keys["levels"])


def test_refuses_sequences_and_codecs_that_do_not_fit():
    with pytest.raises(ValueError, match="sequences is empty; calibration needs at least one"):
        collect(MODEL, PARAMS, [])
    with pytest.raises(ValueError, match="sequences holds an array of shape \\(2, 1\\); allowed are"):
        collect(MODEL, PARAMS, [TOKENS, TOKENS[:2, :1]])
    with pytest.raises(ValueError, match="channels is 3; it must divide the head's width, 8"):
        calibrate_coupled(KEY, MODEL, PARAMS, [TOKENS], Coupled(3, 3))
