"""Sparse reads of compressed caches: equal to dense reads where all is chosen, and nothing else is decoded."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from hashml.attention.cached import (
    SparseReads,
    check_layer,
    index_layer,
    read_rows,
    sparse_attend,
    sparse_decode_step,
    sparse_engine,
    sparse_prefill,
)
from hashml.attention.oracle import OracleTopK
from hashml.attention.quest import Quest
from hashml.attention.selection_controls import UniformRandom
from hashml.attention.socket import Socket
from hashml.attention.v_attention import VAttention
from hashml.kvcache import (
    CacheSpec,
    Coupled,
    Dense,
    HeavyHitters,
    IntGroup,
    KeepAll,
    KeyNorm,
    KiviKeys,
    LayerSpec,
    LayerTables,
    decode_step,
    init_layer,
)
from hashml.models.decoder import DecoderConfig, decoder_model, forward, param_shapes
from hashml.models.generation import generate
from hashml.models.rotary import Rotary

B, K, H, D, SLOTS = 2, 2, 4, 8, 24
PROMPT, STEPS = 14, 9
CONFIG = DecoderConfig(vocabulary=30, features=16, layers=2, heads=H, kv_heads=K, head_dim=D, hidden=16)
TOKENS = np.random.default_rng(0).integers(0, 30, (B, PROMPT + STEPS)).astype(np.int32)
POSITIONS = np.stack([np.arange(PROMPT), np.arange(PROMPT) - 3]).astype(np.int32)
POSITIONS = np.where(POSITIONS < 0, -1, POSITIONS)
KEY = jax.random.key(0)


def layer_of(**options) -> LayerSpec:
    base: dict[str, Any] = {"slots": SLOTS, "window": 4, "rope": "write", "policy": KeepAll(), "rotary": Rotary()}
    base |= {"key_codec": Dense(), "value_codec": Dense(), "kv_heads": K, "query_heads": H, "head_dim": D}
    return LayerSpec(**(base | options))


def books(groups, entries, channels, seed):
    shape = (K, groups, entries, channels)
    return {"codebook": jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float16)}


CASES = {
    "socket-int4": (
        Socket(tables=8, bits=4),
        {"key_codec": IntGroup(4, 8), "value_codec": IntGroup(4, 8)},
        LayerTables(),
        "head",
    ),
    "quest-cq": (
        Quest(page_size=4),
        {"key_codec": Coupled(2, 4), "value_codec": Coupled(4, 4), "rope": "read", "window": 8, "flush": 4,
         "sliding_window": 17},
        LayerTables(books(4, 16, 2, 1), books(2, 16, 4, 2)),
        "max",
    ),
    "socket-evicting": (
        Socket(tables=8, bits=4, value_norm_power=0),
        {"policy": KeyNorm(), "slots": 8, "window": 0, "sinks": 2},
        LayerTables(),
        "head",
    ),
}  # fmt: skip


def params_of(config):
    """Normal kernels and norms near 1, from NumPy."""
    rng = np.random.default_rng(1)

    def draw(shape):
        return jnp.asarray(rng.normal(float(len(shape) == 1), 0.3, shape), jnp.float32)

    shapes = param_shapes(config)
    return jax.tree.map(draw, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))


@dataclasses.dataclass(frozen=True)
class Run:
    """A prompt, some steps with all of the store read, and the same steps with dense reads."""

    spec: CacheSpec
    tables: tuple
    reads: SparseReads
    state: Any
    sparse: list
    dense: list


@functools.cache
def run(name) -> Run:
    selector, options, codecs, gqa = CASES[name]
    layers = 1 if name != "socket-int4" else 2
    config = dataclasses.replace(CONFIG, layers=layers, sliding_window=options.get("sliding_window"))
    spec, tables = CacheSpec((layer_of(**options),) * layers, B), (codecs,) * layers
    reads = SparseReads(selector, heavy=SLOTS, gqa=gqa)
    model, params = decoder_model(config), params_of(config)
    begin = jax.jit(functools.partial(sparse_prefill, model, spec, tables, reads))
    step = jax.jit(functools.partial(sparse_decode_step, model, spec, tables, reads))
    plain = jax.jit(functools.partial(decode_step, model, spec, tables))
    _, state = begin(params, jnp.asarray(TOKENS[:, :PROMPT]), jnp.asarray(POSITIONS), KEY)
    cache, sparse, dense = state.cache, [], []
    for n in range(PROMPT, PROMPT + STEPS):
        found, state = step(params, state, jnp.asarray(TOKENS[:, n]))
        expected, cache = plain(params, cache, jnp.asarray(TOKENS[:, n]))
        sparse.append(np.asarray(found))
        dense.append(np.asarray(expected))
    return Run(spec, tables, reads, state, sparse, dense)


@pytest.mark.parametrize("name", CASES)
def test_reading_all_is_the_dense_read(name):
    """Prompts of 14 and 11 tokens, then nine steps: tokens enter the main store and, with KeyNorm, leave it."""
    found = run(name)
    np.testing.assert_allclose(found.sparse, found.dense, rtol=1e-4, atol=1e-4)
    pos = np.asarray(found.state.cache.layers[0].pos)
    assert (pos >= 0).sum() > B * 2


@pytest.mark.parametrize("name", CASES)
def test_an_index_that_grew_is_that_of_the_store(name):
    found = run(name)
    drawn = jax.random.fold_in(KEY, len(found.spec.layers))
    for spec, codecs, layer, index in zip(
        found.spec.layers, found.tables, found.state.cache.layers, found.state.indexes, strict=True
    ):
        whole = jax.jit(functools.partial(index_layer, found.reads, spec))(codecs, layer, key=drawn)
        held = np.broadcast_to(np.asarray(layer.pos >= 0), (B, K, spec.slots))
        assert held.any()
        for leaf in index.slots:
            mine, fresh = np.asarray(index.slots[leaf]), np.asarray(whole.slots[leaf])
            if leaf == "codes":
                mine, fresh = mine.swapaxes(2, 3), fresh.swapaxes(2, 3)
            if leaf in ("low", "high"):
                np.testing.assert_array_equal(mine, fresh)
            else:
                np.testing.assert_array_equal(mine[held], fresh[held])


def queries():
    q = np.random.default_rng(3).standard_normal((B, H, 1, D)).astype(np.float32)
    return jnp.asarray(q), jnp.asarray([[22], [19]], jnp.int32)


@functools.partial(jax.jit, static_argnames=("reads", "spec"))
def attend(reads, spec, codecs, layer, index, q, query_pos):
    return sparse_attend(reads, spec, codecs, layer, index, q, query_pos, KEY)


@pytest.mark.parametrize(("name", "sinks", "window", "heavy"), [("quest-cq", 0, 0, 3), ("socket-int4", 2, 1, 2)])
def test_a_few_tokens_and_the_window_share_a_softmax(name, sinks, window, heavy):
    """Beside a loop over what was chosen, with keys and values decoded as a whole."""
    found = run(name)
    spec, codecs, layer = found.spec.layers[0], found.tables[0], found.state.cache.layers[0]
    rotary = spec.rotary
    assert rotary is not None
    reads = dataclasses.replace(found.reads, sinks=sinks, window=window, heavy=heavy)
    q, query_pos = queries()
    out, chosen = attend(reads, spec, codecs, layer, found.state.indexes[0], q, query_pos)

    @jax.jit
    def whole(layer, q, query_pos):
        keys, ring = spec.key_codec.decode(codecs.keys, layer.keys), layer.window_keys
        if spec.rope == "read":
            keys = rotary.rotate(keys, layer.pos)
            ring = rotary.rotate(ring, layer.window_pos[:, None])
        values = spec.value_codec.decode(codecs.values, layer.values)
        return keys, values, ring, rotary.rotate(q, query_pos[:, None])

    keys, values, ring, turned = whole(layer, q, query_pos)
    past = np.asarray(query_pos)[:, 0] - (spec.sliding_window or 10**6)
    for b, h in np.ndindex(B, H):
        of_key, of_list = h // 2, h // (H // chosen.idx.shape[1])
        slots = np.asarray(chosen.idx)[b, of_list][np.asarray(chosen.valid)[b, of_list]]
        assert len(set(slots)) == len(slots) == sinks + window + heavy
        pos = np.asarray(layer.pos)[b, 0]
        assert (pos[slots] > past[b]).all()
        near = np.asarray(layer.window_pos)[b]
        near = (near >= 0) & (near <= query_pos[b, 0]) & (near > past[b])
        k = np.concatenate([np.asarray(keys)[b, of_key, slots], np.asarray(ring)[b, of_key][near]])
        v = np.concatenate([np.asarray(values)[b, of_key, slots], np.asarray(layer.window_values)[b, of_key][near]])
        shares = scipy.special.softmax(k @ np.asarray(turned)[b, h, 0] / np.sqrt(D))
        np.testing.assert_allclose(out[b, h, 0], shares @ v, rtol=1e-4, atol=1e-5)


def test_selectors_that_look_at_keys_get_them_from_the_codes():
    """A sample of all others, after the best by exact logits, is everything."""
    found = run("socket-int4")
    spec, layer = found.spec.layers[0], found.state.cache.layers[0]
    q, query_pos = queries()

    @jax.jit
    def read(layer, q, query_pos):
        outs = []
        for selector in (VAttention(OracleTopK(), epsilon=0), UniformRandom(), OracleTopK()):
            reads = SparseReads(selector, heavy=2 * SLOTS)
            index = index_layer(reads, spec, LayerTables(), layer, key=KEY)
            outs.append(sparse_attend(reads, spec, LayerTables(), layer, index, q, query_pos, KEY)[0])
        return outs

    outs = read(layer, q, query_pos)
    np.testing.assert_allclose(outs[0], outs[2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outs[1], outs[2], rtol=1e-5, atol=1e-5)


def test_rows_are_those_of_the_whole_store():
    """Of a codec with a row a token, and of one whose scales are a block's."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((B, K, SLOTS, D)), jnp.float32)
    shared, own = (jnp.asarray(rng.integers(0, SLOTS, (B, lists, 5)), jnp.int32) for lists in (K, H))

    @jax.jit
    def read(x, shared, own):
        found = []
        for codec in (IntGroup(3, 4), KiviKeys(4, 4)):
            empty = codec.init(B, K, SLOTS, D, jnp.float32)
            rows = codec.quantise(None, empty.fixed, x, jnp.ones((B, K, SLOTS), bool))
            state = empty._replace(slots=rows)
            some = [read_rows(codec, None, state, idx, SLOTS) for idx in (shared, own)]
            found.append((codec.decode(None, state), some))
        return found

    for whole, some in read(x, shared, own):
        for idx, rows in zip((shared, own), some, strict=True):
            of_list = np.repeat(np.asarray(whole), idx.shape[1] // K, axis=1)
            expected = np.take_along_axis(of_list, np.asarray(idx)[..., None], axis=2)
            np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=1e-7)


def sizes_in(jaxpr):
    """Entries of every float that a program makes."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if jnp.issubdtype(variable.aval.dtype, jnp.floating):
                yield variable.aval.size
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


def test_only_what_was_chosen_is_decoded():
    """2,048 slots, 64 of them read: no float of a step is as large as the decoded keys."""
    spec = layer_of(slots=2048, key_codec=IntGroup(4, 8), value_codec=IntGroup(4, 8), window=16)
    reads = SparseReads(Socket(tables=4, bits=4), heavy=60, sinks=4)
    layer = jax.eval_shape(lambda: init_layer(spec, 1))
    index = jax.eval_shape(lambda layer: index_layer(reads, spec, LayerTables(), layer, key=KEY), layer)
    q, pos = jax.ShapeDtypeStruct((1, H, 1, D), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    program = jax.make_jaxpr(functools.partial(sparse_attend, reads, spec, LayerTables()))(layer, index, q, pos)
    # Scores are a float for each slot and query head.
    assert max(sizes_in(program.jaxpr)) <= 2048 * H < 2048 * K * D


def test_generation_with_all_read_is_that_of_the_model():
    """Greedy tokens over a dense store: each is the best by the logits of the model without a cache."""
    config = dataclasses.replace(CONFIG, layers=1)
    model, params = decoder_model(config), params_of(config)
    prompt = TOKENS[0, :5].tolist()
    reads = SparseReads(Socket(tables=4, bits=4), heavy=SLOTS)
    engine = sparse_engine(model, (layer_of(),), (LayerTables(),), reads, capacity=20)
    (found,) = generate(model, params, [prompt], 6, temperature=0, cache=engine)
    logits = np.asarray(forward(params, config, jnp.asarray([prompt + found], jnp.int32)))
    assert found == logits[0, 4:-1].argmax(axis=-1).tolist()


def test_what_cannot_be_read_sparsely_is_refused():
    for options, message in (
        ({"page_size": 8, "pages": 24}, "pages is 24; a paged store is not read sparsely"),
        ({"rope": "slot"}, "rope is 'slot'; keys that turn as others leave cannot be indexed"),
        ({"slots": 0}, "slots is 0; there is nothing beside the exact window to choose from"),
        ({"policy": HeavyHitters()}, "it looks at attention, and sparse reads form none over all keys"),
    ):
        spec = layer_of(**options)
        with pytest.raises(ValueError, match=message):
            check_layer(spec)
    with pytest.raises(ValueError, match="heavy is -1; it must not be negative"):
        SparseReads(Quest(), heavy=-1)
