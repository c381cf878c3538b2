"""A pool that rows share: what one leaves there, takes, or finds gone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.kvcache.accounting import cache_bytes, cache_cost, describe
from hashml.kvcache.ada_kv import AdaKV
from hashml.kvcache.attending import attend
from hashml.kvcache.batching import insert, reset_rows
from hashml.kvcache.contract import Codec, Policy
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.dense import Dense
from hashml.kvcache.full import KeepAll
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.integer import Float8, Int8
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.prefill import prefill_layer
from hashml.kvcache.serving import decode_step, no_tables, prefill
from hashml.kvcache.spec import CacheSpec, LayerSpec, batch_spec
from hashml.kvcache.state import Cache, LayerTables, all_positions, init, init_layer
from hashml.kvcache.store import encode, write
from hashml.kvcache.tova import TOVA
from hashml.models.decoder import DecoderConfig, decoder_model, init_params

QUICK = {"xla_backend_optimization_level": 0}
CONFIG = DecoderConfig(vocabulary=40, features=16, layers=1, heads=2, kv_heads=2, head_dim=8, hidden=16, tied=False)
PARAMS = init_params(jax.random.key(0), CONFIG)
MODEL = decoder_model(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 39, (3, 60))
BAD = 39
"""A token whose embedding is no number."""
PROMPT = 12


def layer_of(policy: Policy | None = None, **options) -> LayerSpec:
    base = {"slots": 8, "window": 4, "key_codec": Dense(), "value_codec": Dense(), "rope": "write"}
    return LayerSpec(kv_heads=2, query_heads=2, head_dim=8, policy=policy or KeepAll(), rotary=CONFIG.rotary,
                     **(base | options))  # fmt: skip


@functools.cache
def steps_of(spec: CacheSpec):
    begin = jax.jit(functools.partial(prefill, MODEL, spec, no_tables(spec)), compiler_options=QUICK)
    return begin, jax.jit(functools.partial(decode_step, MODEL, spec, no_tables(spec)), compiler_options=QUICK)


def prompts(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, pos = np.zeros((len(lengths), PROMPT), np.int32), np.full((len(lengths), PROMPT), -1, np.int32)
    for row, length in enumerate(lengths):
        tokens[row, PROMPT - length :], pos[row, PROMPT - length :] = TOKENS[row, :length], np.arange(length)
    return tokens, pos


def pages_of(cache: Cache):
    pages = cache.layers[0].pages
    assert pages is not None
    return pages


def check_owners(cache: Cache) -> None:
    """Every page is free or somebody's, none both, and who has one has a token in it."""
    pages, pos = pages_of(cache), np.asarray(cache.layers[0].pos)
    table = np.asarray(pages.table)
    free = np.asarray(pages.free)[: int(pages.top)]
    assert sorted([*free, *table[table >= 0]]) == list(range(len(pages.free)))
    used = (pos >= 0).reshape(*pos.shape[:2], table.shape[2], -1).any(axis=3)
    np.testing.assert_array_equal(table >= 0, np.broadcast_to(used, table.shape))


def test_a_row_that_is_no_number_spoils_no_other():
    """Neither where others have no page, nor in the pages that it gives back."""
    spec = CacheSpec((layer_of(HeavyHitters(), page_size=4, pages=4),), 3)
    begin, step = steps_of(spec)
    params = dict(PARAMS)
    params["embedding"] = params["embedding"].at[BAD].set(jnp.nan)
    tokens, pos = prompts(12, 3, 3)
    tokens[0, 5] = BAD
    _, cache = begin(params, jnp.asarray(tokens), jnp.asarray(pos), jax.random.key(0))
    assert (np.asarray(pages_of(cache).table[0]) == 0).any()
    logits = jnp.zeros((3, 40))
    for i in range(10):
        logits, cache = step(params, cache, jnp.asarray(TOKENS[:, 20 + i]))
        assert np.isnan(logits[0]).all() or i >= 2
        assert np.isfinite(logits[1:]).all()
        if i == 2:
            # All pages are the row's, and go to the others.
            assert (np.asarray(pages_of(cache).table[0]) >= 0).all()
            assert int(pages_of(cache).top) == 0
            cache = reset_rows(spec, cache, jnp.asarray([True, False, False]))
    assert (np.asarray(pages_of(cache).table[1:]) >= 0).any()
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("keys", "values"), [(Dense(), Dense()), (Int8(), Float8()), (KiviKeys(2, 4), Dense()), (Dense(), KiviKeys(2, 4))]
)
def test_a_value_that_is_no_number_is_seen_but_not_in_a_slot_that_was_emptied(keys: Codec, values: Codec):
    grain = max(keys.granularity, values.granularity)
    spec = layer_of(key_codec=keys, value_codec=values, flush=grain)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(k, v, q):
        layer, slot = init_layer(spec, 2), jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 1, 8))
        real = jnp.ones(slot.shape, bool)
        rows = encode(spec, LayerTables(), layer, k, v, real)
        layer = write(spec, layer, *rows, slot, slot, real)
        emptied = layer._replace(pos=layer.pos.at[:, :, 4:].set(-1))
        return tuple(attend(spec, LayerTables(), one, q, jnp.full((2, 1), 8))[0] for one in (layer, emptied))

    k, v, q = (np.random.default_rng(i).standard_normal((2, 2, 8, 8)).astype(np.float32) for i in range(3))
    good = run(k, v, q[:, :, :1])
    for number in (np.nan, np.inf):
        if number == np.inf and not isinstance(values, Dense):
            continue  # scales of codes are clipped to the largest float16
        v[0, :, 5, 2] = number
        seen, emptied = run(k, v, q[:, :, :1])
        assert np.isnan(seen[0]).all()
        np.testing.assert_array_equal(seen[1], good[0][1])
        np.testing.assert_array_equal(emptied, good[1])


BOOKS = {"codebook": jax.random.normal(jax.random.key(3), (2, 2, 16, 4)).astype(jnp.float16)}


@pytest.mark.parametrize(
    ("codec", "tables", "rope"),
    [(Int8(), None, "read"), (KiviKeys(2, 4), None, "write"), (Coupled(4, 4), BOOKS, "read")],
    ids=["int8", "kivi", "coupled"],
)
def test_pages_are_read_as_slots_are(codec, tables, rope):
    """Answered by each page, or by a copy where a codec has tables of heads; more of the pool is free than taken."""
    flat = layer_of(HeavyHitters(), slots=16, key_codec=codec, value_codec=codec, rope=rope, flush=codec.granularity)
    paged = dataclasses.replace(flat, page_size=4, pages=40)
    known = LayerTables(tables, tables)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(q, k, v, pos):
        keys, asked = jax.random.split(jax.random.key(0)), pos.max(axis=1, keepdims=True)
        layers = [prefill_layer(spec, known, q, k, v, pos, keys) for spec in (flat, paged)]
        pairs = zip((flat, paged), layers, strict=True)
        return tuple(attend(spec, known, layer, q[:, :, -1:], asked)[0] for spec, layer in pairs), layers[1].pos

    q, k, v = (np.random.default_rng(i).standard_normal((2, 2, 24, 8)).astype(np.float32) for i in range(3))
    pos = np.stack([np.arange(24), np.r_[np.full(15, -1), np.arange(9)]]).astype(np.int32)
    (one, other), kept = run(q, k, v, pos)
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
    assert (np.asarray(kept) >= 0).sum(axis=2).tolist() == [[16, 16], [5, 5]]


def test_pages_are_read_without_a_copy():
    """But for one, of keys or of values, that a CPU's product turns round, of slots likewise."""
    spec = dataclasses.replace(layer_of(slots=4096, page_size=16, pages=512), head_dim=64)
    layer = jax.eval_shape(lambda: init_layer(spec, 2))
    q, asked = jax.ShapeDtypeStruct((2, 2, 1, 64), jnp.float32), jax.ShapeDtypeStruct((2, 1), jnp.int32)
    step = jax.jit(lambda layer, q, asked: attend(spec, LayerTables(), layer, q, asked)[0])
    memory = step.lower(layer, q, asked).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.6 * stored_bytes((layer.keys, layer.values))


def test_idle_rows_take_no_page_of_the_others():
    """Two rows whose requests have ended, and a pool for little more than one row: it keeps its 36 tokens."""
    spec = CacheSpec((layer_of(HeavyHitters(), slots=32, page_size=4, pages=18),), 3)
    step, cache = steps_of(spec)[1], init(spec, jax.random.key(0))
    first = jnp.asarray([True, False, False])
    for i in range(40):
        if i == 6:
            cache = reset_rows(spec, cache, ~first)
        _, cache = step(PARAMS, cache, jnp.asarray(TOKENS[:, i]), active=first | (i < 6))
    held = np.asarray(all_positions(spec.layers[0], cache.layers[0]))
    assert (held >= 0).sum(axis=2).tolist() == [[36, 36], [0, 0], [0, 0]]
    assert int(pages_of(cache).missed) == 0
    check_owners(cache)


@pytest.mark.parametrize(("policy", "options"), [
    (HeavyHitters(), {}),
    (TOVA(), {"key_codec": KiviKeys(2, 4), "flush": 4}),
], ids=["h2o", "tova-kivi"])  # fmt: skip
def test_a_pool_that_is_spent_is_a_cache_of_as_many_slots(policy, options):
    """Of 16 slots a head and pages for 8, the best 8 tokens stay: those of a cache of 8 slots."""
    big = CacheSpec((layer_of(policy, slots=16, page_size=4, pages=4, **options),), 1)
    small = CacheSpec((layer_of(policy, slots=8, **options),), 1)
    begun = [init(spec, jax.random.key(0)) for spec in (big, small)]
    for i in range(36):
        token = jnp.asarray(TOKENS[:1, i])
        (one, begun[0]), (other, begun[1]) = (
            steps_of(spec)[1](PARAMS, cache, token) for spec, cache in zip((big, small), begun, strict=True)
        )
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    kept = [np.sort(np.asarray(cache.layers[0].pos), axis=2)[:, :, -8:] for cache in begun]
    np.testing.assert_array_equal(kept[0], kept[1])
    if not options:
        assert (kept[0] >= 8).any()
        # Of 36 tokens of each of two heads 4 are in the window and 8 in the store.
        assert int(pages_of(begun[0]).missed) == 2 * (36 - 4 - 8)
    assert int(pages_of(begun[0]).missed) > 0
    check_owners(begun[0])


@pytest.mark.parametrize("policy", [TOVA(), AdaKV(queries=4, base=6, later=2)])
def test_a_prompt_in_pages_is_inserted_and_goes_on_as_it_would_alone(policy):
    layer = layer_of(policy, slots=16, page_size=4, pages=8)
    one, spec = batch_spec((layer,), 1), batch_spec((layer,), 3)
    step, (begin_one, step_one) = steps_of(spec)[1], steps_of(one)
    place = jax.jit(functools.partial(insert, spec), compiler_options=QUICK)
    cache = init(spec, jax.random.key(0))
    for i in range(11):
        _, cache = step(PARAMS, cache, jnp.asarray(TOKENS[:, 20 + i]))
    others = np.asarray(cache.layers[0].pos[::2])
    _, prompt = begin_one(PARAMS, *map(jnp.asarray, prompts(11)), jax.random.key(0))
    for row in (7, -1):
        same = place(cache, prompt, row)
        np.testing.assert_array_equal(same.layers[0].pos, cache.layers[0].pos)
        np.testing.assert_array_equal(pages_of(same).table, pages_of(cache).table)
        assert int(pages_of(same).top) == int(pages_of(cache).top)
    cache = place(cache, prompt, 1)
    check_owners(cache)
    np.testing.assert_array_equal(cache.layers[0].pos[::2], others)
    for i in range(5):
        token = TOKENS[0, 11 + i]
        alone, prompt = step_one(PARAMS, prompt, jnp.asarray([token]))
        logits, cache = step(PARAMS, cache, jnp.asarray([3, token, 4]))
        np.testing.assert_allclose(logits[1], alone[0], rtol=1e-4, atol=1e-5)
    assert int(pages_of(cache).missed) == 0


@pytest.mark.parametrize("policy", [HeavyHitters(), TOVA()])
def test_a_prompt_that_finds_too_few_pages_loses_its_newest_and_says_so(policy):
    """8 tokens of the main store of each of 2 heads are 4 pages, and 3 are free."""
    layer = layer_of(policy, slots=8, page_size=4, pages=4)
    spec = CacheSpec((dataclasses.replace(layer, pages=3),), 2)
    _, prompt = steps_of(CacheSpec((layer,), 1))[0](PARAMS, *map(jnp.asarray, prompts(12)), jax.random.key(0))
    place = jax.jit(functools.partial(insert, spec), compiler_options=QUICK)
    cache = place(init(spec, jax.random.key(0)), prompt, 1)
    check_owners(cache)
    kept = (np.asarray(cache.layers[0].pos[1]) >= 0).sum(axis=1).tolist()
    # One decision for all heads keeps what all of them can hold.
    assert kept == ([4] if layer.head_pos == 1 else [8, 4])
    assert int(pages_of(cache).missed) == 4


def test_bytes_of_pages_are_those_of_tokens():
    """The pool is smaller than all slots together, so that its filled share is not that of positions and scores."""
    spec = CacheSpec((layer_of(HeavyHitters(), page_size=4, pages=6),), 3)
    _, cache = steps_of(spec)[0](PARAMS, *map(jnp.asarray, prompts(12, 3, 3)), jax.random.key(0))
    found, layer = cache_bytes(spec, cache), cache.layers[0]
    # One row has 8 tokens in main slots of each of 2 heads, and all have the newest 4, 3 and 3 in the window.
    assert float(found.logical["payload"]) == 16 * 2 * 8 * 4
    assert float(found.logical["policy"]) == pytest.approx((16 + 2 * 10) * 4)
    fixed = found.allocated["index"] - layer.pos.nbytes
    assert float(found.logical["index"]) == pytest.approx(fixed + 16 * 4)
    cost = cache_cost(spec, cache)
    assert (cost.seen, cost.kept) == (18, 18.0)
    assert cost.per_kept == pytest.approx(found.total / 18)
    assert cost.ratio == pytest.approx(found.total / (18 * 2 * 2 * 8 * 4))
    assert cost.bits == pytest.approx(32 * cost.ratio)
    size = sum(float(part) for part in found.logical.values())
    assert cache_cost(spec, cache, logical=True).per_seen == pytest.approx(size / 18)
    assert f"{8 * size / (18 * 2 * 2 * 8):.2f} bits for each value of 18 tokens seen" in describe(spec, cache)
    assert "none was seen" in describe(spec, init(spec, jax.random.key(0)))
