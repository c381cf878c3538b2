"""Calibration: keys, values and gradients of a decoder, books and tables learned of them, files."""

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
    load_tables,
    save_tables,
    with_floor,
)
from hashml.kvcache.contract import CodecState
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.dense import Dense
from hashml.kvcache.kvquant import kvquant
from hashml.kvcache.state import LayerTables
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
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
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


def test_tables_come_back_from_their_file_and_no_other_codecs_take_them(tmp_path):
    path = tmp_path / "tables.safetensors"
    rng = np.random.default_rng(2)
    tables = tuple(
        LayerTables({"codebook": jnp.asarray(rng.normal(size=(2, 4, 8, 2)), jnp.float16)}) for _ in range(11)
    )
    save_tables(path, tables, key_codec=Coupled(2, 3), value_codec=Dense(), metadata={"data": "random"})
    found = load_tables(path, layers=11, key_codec=Coupled(2, 3, histogram=True), value_codec=Dense())
    assert len(found) == 11
    for one, other in zip(tables, found, strict=True):
        np.testing.assert_array_equal(one.keys["codebook"], other.keys["codebook"])
        assert other.keys["codebook"].dtype == jnp.float16
        assert other.values is None
    with pytest.raises(ExchangeError, match="key_codec: file .*channels=2, bits=3.*, given .*channels=2, bits=4"):
        load_tables(path, layers=11, key_codec=Coupled(2, 4), value_codec=Dense())
    with pytest.raises(ExchangeError, match="layers: file 11, given 12"):
        load_tables(path, layers=12, key_codec=Coupled(2, 3), value_codec=Dense())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ExchangeError, match="checksum disagrees"):
        load_tables(path, layers=11, key_codec=Coupled(2, 3), value_codec=Dense())
    with pytest.raises(ValueError, match="tables hold no array"):
        save_tables(path, [LayerTables()], key_codec=Dense(), value_codec=Dense())


def test_refuses_sequences_and_codecs_that_do_not_fit():
    with pytest.raises(ValueError, match="sequences is empty; calibration needs at least one"):
        collect(MODEL, PARAMS, [])
    with pytest.raises(ValueError, match="sequences holds an array of shape \\(2, 1\\); allowed are"):
        collect(MODEL, PARAMS, [TOKENS, TOKENS[:2, :1]])
    with pytest.raises(ValueError, match="channels is 3; it must divide the head's width, 8"):
        calibrate_coupled(KEY, MODEL, PARAMS, [TOKENS], Coupled(3, 3))
