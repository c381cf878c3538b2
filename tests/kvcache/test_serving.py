"""A decoder on a cache: equal to the model without one, row by row, in place, and over several devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hashml.accounting import stored_bytes
from hashml.kvcache.accounting import bytes_per_token, cache_bytes
from hashml.kvcache.batching import insert, reset_rows
from hashml.kvcache.contract import Policy
from hashml.kvcache.dense import Dense
from hashml.kvcache.engine import engine
from hashml.kvcache.full import KeepAll
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.integer import Int8, IntGroup
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.methods import cache_layers
from hashml.kvcache.prefill import prefill_statistics
from hashml.kvcache.serving import decode_step, no_tables, prefill
from hashml.kvcache.sharding import cache_shardings
from hashml.kvcache.spec import CacheSpec, LayerSpec
from hashml.kvcache.state import init
from hashml.kvcache.tova import TOVA
from hashml.models.decoder import DecoderConfig, decoder_model, forward, init_params
from hashml.models.generation import generate
from hashml.models.rotary import Rotary

CONFIG = DecoderConfig(vocabulary=40, features=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=32, smear=True)
PARAMS = init_params(jax.random.key(0), CONFIG)
MODEL = decoder_model(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 40, (3, 30))
LENGTHS = (12, 7, 1)
PROMPT = 12


def layer_of(config: DecoderConfig = CONFIG, policy: Policy | None = None, **options) -> LayerSpec:
    base = {"slots": 32, "window": 4, "key_codec": Dense(), "value_codec": Dense(), "rope": "write"}
    base["sliding_window"] = config.sliding_window
    return LayerSpec(kv_heads=config.kv_heads, query_heads=config.heads, head_dim=config.head_dim,
                     policy=policy or KeepAll(), rotary=config.rotary, **(base | options))  # fmt: skip


def prompts(lengths=LENGTHS, side="left") -> tuple[jnp.ndarray, jnp.ndarray]:
    tokens, pos = np.zeros((len(lengths), PROMPT), np.int32), np.full((len(lengths), PROMPT), -1, np.int32)
    for row, length in enumerate(lengths):
        place = slice(PROMPT - length, PROMPT) if side == "left" else slice(0, length)
        tokens[row, place], pos[row, place] = TOKENS[row, :length], np.arange(length)
    return jnp.asarray(tokens), jnp.asarray(pos)


def steps_of(model, spec):
    return (
        jax.jit(functools.partial(prefill, model, spec, no_tables(spec))),
        jax.jit(functools.partial(decode_step, model, spec, no_tables(spec)), donate_argnums=1),
    )


@pytest.mark.parametrize(
    ("config", "options", "side"),
    [
        (CONFIG, {}, "left"),
        (CONFIG, {"window": 0}, "right"),
        (CONFIG, {"window": 8, "flush": 4, "rope": "read"}, "left"),
        (CONFIG, {"window": 8, "flush": 8, "rope": "slot", "page_size": 8, "pages": 24}, "left"),
        (dataclasses.replace(CONFIG, rotary=None, smear=False), {"rope": "none"}, "left"),
        (dataclasses.replace(CONFIG, rotary=Rotary(pairs="interleaved"), sliding_window=5), {}, "left"),
    ],
    ids=["write", "no-window", "read", "slot-paged", "no-rope", "sliding"],
)
def test_keep_all_is_the_model_without_a_cache(config, options, side):
    model, params = decoder_model(config), init_params(jax.random.key(0), config)
    spec = CacheSpec((layer_of(config, **options),) * 2, 3)
    begin, step = steps_of(model, spec)
    logits, cache = begin(params, *prompts(side=side), jax.random.key(0))
    whole = forward(params, config, jnp.asarray(TOKENS))
    rows = np.arange(3)
    np.testing.assert_allclose(logits, whole[rows, np.array(LENGTHS) - 1], rtol=1e-4, atol=1e-5)
    for i in range(18):
        at = np.array(LENGTHS) + i
        logits, cache = step(params, cache, jnp.asarray(TOKENS[rows, at]))
        np.testing.assert_allclose(logits, whole[rows, at], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(cache.length, at + 1)
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert all(layer.pages is None or int(layer.pages.missed) == 0 for layer in cache.layers)


def test_chunks_of_tokens_are_single_tokens():
    """Two and four tokens at once, with a flush of four: the tokens that stay are seen alike."""
    spec = CacheSpec((layer_of(policy=HeavyHitters(), window=8, flush=4),) * 2, 3)
    begin, step = steps_of(MODEL, spec)
    _, cache = begin(PARAMS, *prompts(), jax.random.key(0))
    found = {1: cache, 2: jax.tree.map(jnp.copy, cache), 4: jax.tree.map(jnp.copy, cache)}
    logits = {}
    for count in found:
        for i in range(0, 16, count):
            part = np.stack([TOKENS[row, length + i : length + i + count] for row, length in enumerate(LENGTHS)])
            logits[count], found[count] = step(PARAMS, found[count], jnp.asarray(part))
    for count in (2, 4):
        np.testing.assert_allclose(logits[count], logits[1], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found[count].layers[0].pos, found[1].layers[0].pos)


def test_a_row_that_is_inserted_goes_on_as_it_would_alone():
    """Continuous batching: other rows come, go and hold garbage, and no bit of a row changes.

    Against a cache of that row alone, whose ring turned elsewhere and whose products have another shape, sums are
    taken in another order: close, not equal.
    """
    one = layer_of(policy=HeavyHitters(), slots=8, window=4, flush=2, sinks=1)
    spec, single = CacheSpec((one,) * 2, 3), CacheSpec((one,) * 2, 1)
    _, step = steps_of(MODEL, spec)
    begin_one, step_one = steps_of(MODEL, single)
    place = jax.jit(functools.partial(insert, spec))
    tokens, pos = prompts()
    ready = [begin_one(PARAMS, tokens[i : i + 1], pos[i : i + 1], jax.random.key(0))[1] for i in range(3)]
    starts = {0: 0, 1: 2, 2: 6}  # multiples of flush

    def fed(row: int, i: int) -> int:
        return int(TOKENS[row, LENGTHS[row] + i])

    def serve(rows: tuple[int, ...]) -> dict[int, list]:
        held = init(spec, jax.random.key(0), tuple(jnp.zeros((3, 32)) for _ in range(2)))
        seen: dict[int, list] = {row: [] for row in rows}
        for i in range(14):
            for row in rows:
                if i == starts[row]:
                    held = place(held, ready[row], row)
            busy = {row: i - starts[row] for row in rows if 0 <= i - starts[row] < 8}
            feed = [fed(row, busy[row]) if row in busy else 3 for row in range(3)]
            logits, held = step(PARAMS, held, jnp.asarray(feed))
            for row in busy:
                seen[row].append(logits[row])
            if i == 8 and 0 in rows:
                held = reset_rows(spec, held, jnp.asarray([True, False, False]))
                assert int(held.length[0]) == 0
                assert (held.layers[0].pos[0] < 0).all()
        return seen

    together = serve((0, 1, 2))
    for row in range(3):
        np.testing.assert_array_equal(jnp.stack(together[row]), jnp.stack(serve((row,))[row]))
        cache = ready[row]
        for i in range(8):
            near, cache = step_one(PARAMS, jax.tree.map(jnp.copy, cache), jnp.asarray([fed(row, i)]))
            np.testing.assert_allclose(together[row][i], near[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", [HeavyHitters(), TOVA()])
def test_heads_over_devices_are_one_device(policy):
    """Eight key heads on eight devices."""
    if jax.device_count() < 8:
        pytest.skip("wants 8 devices")
    config = dataclasses.replace(CONFIG, heads=16, kv_heads=8, smear=False)
    model, params = decoder_model(config), init_params(jax.random.key(0), config)
    spec = CacheSpec((layer_of(config, policy=policy, slots=8, key_codec=Int8(), value_codec=IntGroup(4, 8)),) * 2, 3)
    begin, step = steps_of(model, spec)
    logits, cache = begin(params, *prompts(), jax.random.key(0))
    mesh = Mesh(np.array(jax.devices()[:8]), ("heads",))
    spread = jax.device_put(jax.tree.map(jnp.copy, cache), cache_shardings(cache, mesh, "heads"))
    weights = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    placed = jax.tree.map(lambda leaf: leaf.sharding, spread)
    step_spread = jax.jit(functools.partial(decode_step, model, spec, no_tables(spec)), donate_argnums=1,
                          out_shardings=(NamedSharding(mesh, PartitionSpec()), placed))  # fmt: skip
    for i in range(6):
        token = jnp.asarray([TOKENS[row, length + i] for row, length in enumerate(LENGTHS)])
        logits, cache = step(params, cache, token)
        other, spread = step_spread(weights, spread, token)
        np.testing.assert_allclose(other, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(spread.layers[0].pos, cache.layers[0].pos)
    assert spread.layers[0].keys.slots["q"].addressable_shards[0].data.shape[1] == 1


def test_the_step_is_in_place():
    """All of the cache is aliased, and temporaries are small beside it."""
    spec = CacheSpec((layer_of(policy=HeavyHitters(), slots=4096, window=16),) * 2, 3)
    cache = jax.eval_shape(lambda: init(spec, jax.random.key(0), tuple(jnp.zeros((3, 32)) for _ in range(2))))
    token = jax.ShapeDtypeStruct((3,), jnp.int32)
    step = jax.jit(functools.partial(decode_step, MODEL, spec, no_tables(spec)), donate_argnums=1)
    memory: Any = step.lower(PARAMS, cache, token).compile().memory_analysis()
    total = stored_bytes(cache.layers)
    assert memory.alias_size_in_bytes >= 0.98 * total
    assert memory.temp_size_in_bytes < 0.5 * total


def test_bytes_are_those_of_the_buffers():
    spec = CacheSpec((layer_of(slots=32, key_codec=KiviKeys(2, 4), value_codec=IntGroup(2, 8), flush=4),) * 2, 3)
    begin, _ = steps_of(MODEL, spec)
    _, cache = begin(PARAMS, *prompts(), jax.random.key(0))
    found = cache_bytes(spec, cache)
    key = jax.random.key_data(cache.key)
    assert found.total == sum(leaf.nbytes for leaf in jax.tree.leaves(cache._replace(key=key)))
    # 2 layers, 3 rows, 2 heads, 32 slots: 2-bit codes; float16 scale and minimum, per 4 tokens and per 8 channels.
    assert found.allocated["payload"] == 2 * 3 * 2 * 32 * 2 * (8 * 2 // 8)
    assert found.allocated["scales"] == 2 * 3 * 2 * (32 // 4 * 8 * 4 + 32 * 4)
    kept = np.asarray(cache.layers[0].pos >= 0).sum()
    assert float(found.logical["payload"]) == pytest.approx(found.allocated["payload"] * kept / (3 * 32))


def test_bytes_of_a_token_at_llamas_size_are_the_papers():
    """Section 10.6: L = 32, H = 32, D = 128, without positions, which all of them need."""
    config = DecoderConfig(vocabulary=8, features=8, layers=32, heads=32, kv_heads=32, head_dim=128, hidden=8)
    expected = {"dense": 524288, "int8": 266240, "int4:128": 139264, "kivi:4": 163840, "kivi:2": 98304,
                "coupled:4c8b": 65536, "coupled:8c8b": 32768, "think:0.4": 419840}  # fmt: skip
    for name, size in expected.items():
        (layer, *_) = cache_layers(name, config, 4096, dtype="bfloat16")
        bare = dataclasses.replace(layer, slots=4096, window=layer.flush if layer.flush > 1 else 0)
        shapes = jax.eval_shape(lambda bare=bare: init(CacheSpec((bare,), 1), jax.random.key(0)))
        parts = cache_bytes(CacheSpec((bare,), 1), shapes).allocated
        stored = parts["payload"] + parts["scales"]
        assert 32 * stored / 4096 == size, name
        assert bytes_per_token([bare] * 32, 4096) > size


def test_every_named_cache_generates_and_the_same_seed_the_same_text():
    prompt = [TOKENS[0, :9].tolist(), TOKENS[1, :4].tolist()]
    exact = generate(MODEL, PARAMS, prompt, 8, temperature=0)
    full = generate(MODEL, PARAMS, prompt, 8, temperature=0, cache=engine("full", MODEL, PARAMS, 20))
    np.testing.assert_array_equal(np.asarray(exact), np.asarray(full))
    half = engine("h2o@0.5+int8", MODEL, PARAMS, 20)
    first, second = (generate(MODEL, PARAMS, prompt, 8, temperature=0, cache=half) for _ in range(2))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h3o", "'h3o' is none of the policies full, streaming"),
        ("h2o:3", "the option of 'h2o' is '3'; allowed is :normalised"),
        ("int8@3", "@TOKENS belongs to a policy, and 'int8' is a codec"),
        ("full@9", "'full' keeps all tokens"),
        ("h2o@0", "keeps 0 of 64 tokens, and must keep at least 2"),
        ("int8:4", "int8 has no option"),
        ("kivi:two", "kivi:two; the option must be a number"),
        ("streaming+kivi:2", "is for keys after rotation"),
        ("int4:7", "group"),
    ],
)
def test_names_that_are_not_understood(name, message):
    with pytest.raises(ValueError, match=message):
        cache_layers(name, CONFIG, 64)


def test_a_codec_that_learns_asks_for_text():
    with pytest.raises(ValueError, match="its codec learns from text, and sequences is None"):
        engine("coupled:8c8b", MODEL, PARAMS, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 6, "flush": 4}, "window is 6; it must be a multiple of flush, 4"),
        ({"slots": 2, "sinks": 3}, "slots is 2; it must hold the 3 sinks"),
        ({"slots": 0, "sinks": 1}, "sinks is 1 and slots is 0"),
        ({"slots": 0, "window": 0}, "slots and window are both 0"),
        ({"rope": "none"}, "'none' goes with None alone"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be a float"),
        ({"page_size": 3, "pages": 4}, "page_size is 3; it must divide slots, 32"),
        ({"page_size": 4}, "page_size is 4 and pages is None"),
        ({"key_codec": KiviKeys(2, 4)}, "flush is 1; it must be a multiple of 4"),
        ({"key_codec": KiviKeys(2, 4), "rope": "slot"}, "is for keys after rotation; rope is 'slot'"),
        ({"window": -1}, "window is -1; it must be at least 0"),
    ],
)
def test_layers_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**options)


def test_caches_that_do_not_fit_the_model_or_the_prompt():
    spec = CacheSpec((layer_of(slots=4),) * 2, 3)
    with pytest.raises(ValueError, match="the cache keeps all and holds 8 a row"):
        prefill(MODEL, spec, no_tables(spec), PARAMS, *prompts(), jax.random.key(0))
    with pytest.raises(ValueError, match=r"it must be \[3, T\]"):
        prefill(MODEL, spec, no_tables(spec), PARAMS, *prompts((12, 7)), jax.random.key(0))
    lone = CacheSpec((layer_of(),), 3)
    with pytest.raises(ValueError, match="spec has 1 layers; the model has 2"):
        prefill(MODEL, lone, no_tables(lone), PARAMS, *prompts(), jax.random.key(0))
    other = CacheSpec((dataclasses.replace(layer_of(), rotary=Rotary(theta=7.0)),) * 2, 3)
    with pytest.raises(ValueError, match="rotary"):
        prefill(MODEL, other, no_tables(other), PARAMS, *prompts(), jax.random.key(0))


def test_a_row_of_padding_alone_and_keys_that_are_no_numbers():
    """An empty row stays empty and finite; NaN in one row reaches no other."""
    spec = CacheSpec((layer_of(policy=HeavyHitters(), slots=4),) * 2, 3)
    begin, step = steps_of(MODEL, spec)
    logits, cache = begin(PARAMS, *prompts((12, 0, 7)), jax.random.key(0))
    assert np.isfinite(logits).all()
    assert int(cache.length[1]) == 0
    broken = cache.layers[0]._replace(window_keys=cache.layers[0].window_keys.at[0].set(jnp.nan))
    bad = jax.tree.map(jnp.copy, cache._replace(layers=(broken, cache.layers[1])))
    other = logits
    for i in range(8):
        token = jnp.asarray(TOKENS[:, i])
        logits, cache = step(PARAMS, cache, token)
        other, bad = step(PARAMS, bad, token)
        np.testing.assert_array_equal(other[1:], logits[1:])
        assert np.isfinite(logits).all()
    assert np.isnan(other[0]).any()


def test_pages_of_a_row_that_is_reset_go_back():
    spec = CacheSpec((layer_of(policy=HeavyHitters(), slots=8, page_size=4, pages=12),) * 2, 3)
    begin, _ = steps_of(MODEL, spec)
    _, cache = begin(PARAMS, *prompts(), jax.random.key(0))
    # Rows of 12, 7 and 1 tokens have 8, 3 and 0 beside a window of 4: two pages, one and none for each of two heads.
    assert [int(layer.pages.top) for layer in cache.layers if layer.pages] == [12 - 6] * 2
    after = reset_rows(spec, cache, jnp.asarray([True, False, False]))
    for layer in after.layers:
        assert layer.pages is not None
        assert int(layer.pages.top) == 12 - 2
        assert (layer.pages.table[0] < 0).all()
        free = np.asarray(layer.pages.free[: int(layer.pages.top)])
        owned = np.asarray(layer.pages.table[layer.pages.table >= 0])
        assert sorted([*free, *owned]) == list(range(12))


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_queries_that_saw_a_key_are_counted_as_by_a_mask(sliding_window):
    pos = np.array([[-1, -1, 0, 1, 2, 5, 6], [0, 1, 2, 3, -1, -1, -1], [-1] * 7], np.int32)
    seen = (pos[:, None] >= 0) & (pos[:, None] <= pos[:, :, None])
    if sliding_window:
        seen &= pos[:, None] > pos[:, :, None] - sliding_window
    spec, nothing = layer_of(sliding_window=sliding_window), jnp.zeros((3, 2, 7, 8))
    found = prefill_statistics(spec, jnp.zeros((3, 4, 7, 8)), nothing, nothing, jnp.asarray(pos), jax.random.key(0))
    np.testing.assert_array_equal(found.column_counts, seen.sum(axis=1))
