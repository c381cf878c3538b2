"""Rows of a running cache: what a step of several tokens may be, reset, insertion, and rows that are idle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.kvcache.ada_kv import AdaKV
from hashml.kvcache.batching import check_step, insert, reset_rows
from hashml.kvcache.contract import Policy
from hashml.kvcache.controls import KeyNorm
from hashml.kvcache.corm import Corm
from hashml.kvcache.dense import Dense
from hashml.kvcache.full import KeepAll
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.integer import Float8, IntGroup
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.pages import Pages
from hashml.kvcache.serving import decode_step, no_tables
from hashml.kvcache.snap_kv import SnapKV
from hashml.kvcache.spec import CacheSpec, LayerSpec
from hashml.kvcache.state import all_positions, init
from hashml.kvcache.think import ThinK
from hashml.models.decoder import DecoderConfig, decoder_model, forward, init_params

QUICK = {"xla_backend_optimization_level": 0}
CONFIG = DecoderConfig(vocabulary=40, features=16, layers=1, heads=2, kv_heads=2, head_dim=8, hidden=16, smear=True)
PARAMS = init_params(jax.random.key(0), CONFIG)
MODEL = decoder_model(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 40, (3, 40))


def spec_of(policy: Policy | None = None, rows: int = 3, **options) -> CacheSpec:
    base = {"slots": 16, "window": 4, "key_codec": Dense(), "value_codec": Dense(), "rope": "write"}
    layer = LayerSpec(kv_heads=2, query_heads=2, head_dim=8, policy=policy or KeepAll(), rotary=CONFIG.rotary,
                      **(base | options))  # fmt: skip
    return CacheSpec((layer,), rows)


def one_row(spec: CacheSpec) -> CacheSpec:
    return CacheSpec(spec.layers, 1)


@functools.cache
def step_of(spec: CacheSpec):
    return jax.jit(functools.partial(decode_step, MODEL, spec, no_tables(spec)), compiler_options=QUICK,
                   static_argnames="all_logits")  # fmt: skip


def empty(spec: CacheSpec, seed: int = 0):
    return init(spec, jax.random.key(seed), (jnp.zeros((spec.batch, CONFIG.features)),))


def fed(spec: CacheSpec, *lengths: int, seed: int = 0):
    """A cache of rows that have seen so many tokens: what it holds then, the step before has written."""
    step, cache = step_of(spec), empty(spec, seed)
    for i in range(max(lengths)):
        _, cache = step(PARAMS, cache, jnp.asarray(TOKENS[: spec.batch, i]), active=jnp.asarray(lengths) > i)
    return cache


@functools.cache
def whole() -> np.ndarray:
    return np.asarray(forward(PARAMS, CONFIG, jnp.asarray(TOKENS)))


MEMBERS = {
    "h2o": spec_of(HeavyHitters(), sinks=2),
    "adakv": spec_of(AdaKV(queries=4, base=3, later=2)),
    "think": spec_of(HeavyHitters(normalise=True), key_codec=ThinK(IntGroup(4, 8), 0.0), value_codec=Float8()),
    "thin": spec_of(SnapKV(queries=4), key_codec=ThinK(Dense(), 0.5)),
    "kivi": spec_of(HeavyHitters(), key_codec=KiviKeys(2, 4), value_codec=IntGroup(2, 8), flush=4),
    "corm": spec_of(Corm(queries=4), window=0),
    "norm": spec_of(KeyNorm(), window=2),
    "paged": spec_of(HeavyHitters(), page_size=4, pages=20),
    "paged adakv": spec_of(AdaKV(queries=4, base=3, later=2), page_size=4, pages=20),
}


def _leaves(tree) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_row_that_is_reset_is_a_fresh_one(name):
    """Of a cache where every number is another, all of the row's are those of `init`; the other rows stay."""
    spec = MEMBERS[name]
    fresh = empty(spec)
    used = jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), (fresh.layers[0], fresh.previous[0]))
    layer = used[0]
    if layer.pages is not None:
        table = jnp.full_like(layer.pages.table, -1).at[:, :, :2].set(jnp.arange(12).reshape(3, 2, 2))
        free = jnp.where(jnp.arange(20) < 8, jnp.arange(12, 32), -5).astype(jnp.int32)
        layer = layer._replace(pages=Pages(table, free, jnp.int32(8), jnp.int32(3)))
    used = fresh._replace(layers=(layer,), previous=(used[1],), length=fresh.length + 9, born=fresh.born + 5)
    reset = jax.jit(functools.partial(reset_rows, spec), compiler_options=QUICK)
    after = reset(used, jnp.asarray([False, True, False]))
    rowless = (".keys.slots", ".values.slots", ".pages.") if layer.pages is not None else ()
    found, new, old = (_leaves(x._replace(key=0)) for x in (after, fresh, used))
    for path, leaf in found.items():
        if leaf.ndim and not any(part in path for part in rowless):
            np.testing.assert_array_equal(leaf[1], new[path][1], err_msg=path)
            np.testing.assert_array_equal(leaf[::2], old[path][::2], err_msg=path)
    if after.layers[0].pages is not None:
        pages = after.layers[0].pages
        assert (np.asarray(pages.table[1]) == -1).all()
        assert layer.pages is not None
        np.testing.assert_array_equal(pages.table[::2], layer.pages.table[::2])
        np.testing.assert_array_equal(np.sort(pages.free[:12]), np.sort(np.r_[4:8, 12:20]))
        assert int(pages.top) == 12


def test_a_head_that_has_seen_no_prompt_has_the_mean_budget():
    """Of 16 slots that one head may get, and not all 16: a pool has pages for the mean alone."""
    np.testing.assert_array_equal(empty(MEMBERS["paged adakv"]).layers[0].caps, np.full((3, 2), 3 + 2))


# --- steps of several tokens ----------------------------------------------------------------------


def test_sizes_of_steps_that_do_not_fit():
    spec = spec_of(slots=32, window=8, flush=4)
    cache = empty(spec)
    check_step(spec, cache, 4)
    for head, count in ((2, 2), (6, 1), (4, 4)):
        check_step(spec, cache._replace(head=jnp.int32(head)), count)
    with pytest.raises(ValueError, match="n is 4 tokens at once; the ring stands at 1, and must stand at a multiple"):
        check_step(spec, cache._replace(head=jnp.int32(1)), 4)
    with pytest.raises(ValueError, match="n is 3 tokens at once; it must divide flush, 4"):
        check_step(spec, cache, 3)
    with pytest.raises(ValueError, match="n is 0 tokens at once; it must be at least 1"):
        check_step(spec, cache, 0)
    bare = spec_of(HeavyHitters(), slots=3, window=0)
    with pytest.raises(ValueError, match="n is 4 tokens at once; slots is 3 and there is no window"):
        check_step(bare, empty(bare), 4)
    with pytest.raises(ValueError, match="the ring stands at 2"):
        decode_step(MODEL, spec, no_tables(spec), PARAMS, cache._replace(head=jnp.int32(2)), jnp.zeros((3, 4), int))
    with pytest.raises(ValueError, match=r"token has shape \(2,\); the cache has 3 rows"):
        decode_step(MODEL, spec, no_tables(spec), PARAMS, cache, jnp.zeros(2, int))


def test_logits_after_every_token_of_a_draft():
    spec = spec_of(slots=32, window=8, flush=4)
    cache = empty(spec)
    for start in range(0, 12, 4):
        part = jnp.asarray(TOKENS[:, start : start + 4])
        logits, cache = step_of(spec)(PARAMS, cache, part, all_logits=True)
        np.testing.assert_allclose(logits, whole()[:, start : start + 4], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.length, [12] * 3)


# --- insertion ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running():
    """A cache whose ring stands at 2 of 4, and a prompt of one row whose ring stands at 3."""
    spec = MEMBERS["h2o"]
    prompt = fed(one_row(spec), 15, seed=3)._replace(born=jnp.asarray([12], jnp.int32))
    return spec, fed(spec, 6, 6, 6), prompt


def test_a_prompt_that_has_been_decoded_goes_on_in_its_row(running):
    """Its ring stands at 3 of 4 and the cache's at 2: what leaves next is what would have left."""
    spec, cache, prompt = running
    step, step_one = step_of(spec), step_of(one_row(spec))
    held = jax.jit(functools.partial(insert, spec), compiler_options=QUICK)(cache, prompt, 1)
    np.testing.assert_array_equal(jax.random.key_data(held.key[1]), jax.random.key_data(prompt.key[0]))
    assert int(held.born[1]) == 12
    for i in range(6):
        alone, prompt = step_one(PARAMS, prompt, jnp.asarray(TOKENS[:1, 15 + i]), active=jnp.ones(1, bool))
        logits, held = step(PARAMS, held, jnp.asarray([3, TOKENS[0, 15 + i], 4]), active=jnp.ones(3, bool))
        np.testing.assert_allclose(logits[1], alone[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(held.layers[0].pos[1], prompt.layers[0].pos[0])


def test_a_row_that_is_traced_and_out_of_range_changes_nothing(running):
    spec, cache, prompt = running
    place = jax.jit(functools.partial(insert, spec), compiler_options=QUICK)
    for row in (7, -1):
        found, expected = (_leaves(x._replace(key=0)) for x in (place(cache, prompt, row), cache))
        for path, leaf in found.items():
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_prompts_that_cannot_be_inserted(running):
    spec, cache, prompt = running
    for row in (3, -1):
        with pytest.raises(ValueError, match=f"row is {row}; the cache has rows 0 to 2"):
            insert(spec, cache, prompt, row)
    with pytest.raises(ValueError, match="prompt holds 3 rows; it must hold 1"):
        insert(spec, cache, cache, 0)
    fewer = empty(one_row(spec_of(HeavyHitters(), slots=8)))
    with pytest.raises(ValueError, match=r"'x'\] is float32\[1, 2, 8, 8\]; the cache's is float32\[3, 2, 16, 8\]"):
        insert(spec, cache, fewer, 0)
    half = empty(one_row(spec_of(HeavyHitters(), dtype="bfloat16")))
    with pytest.raises(ValueError, match="is bfloat16"):
        insert(spec, cache, half, 0)
    other = empty(one_row(spec_of(HeavyHitters(normalise=True))))
    with pytest.raises(ValueError, match="prompt has layers of the structure"):
        insert(spec, cache, other, 0)
    with pytest.raises(ValueError, match="prompt has 2 layers; the cache has 1"):
        insert(spec, cache, prompt._replace(layers=prompt.layers * 2), 0)
    flushed = spec_of(slots=32, window=8, flush=4)
    late = empty(flushed)._replace(head=jnp.int32(6))
    with pytest.raises(ValueError, match="the cache's ring stands at 6 and the prompt's at 0; they must differ by a"):
        insert(flushed, late, empty(one_row(flushed)), 0)


# --- rows that are idle ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["norm", "kivi"])
def test_idle_rows_stand_still_and_the_others_go_on(name):
    """A row that was reset stays fresh to the last number, a new one begins when it may, and row 0 sees neither."""
    spec = MEMBERS[name]
    step, cache = step_of(spec), fed(spec, 12, 7, 6)
    cache = reset_rows(spec, cache, jnp.asarray([False, True, True]))
    alone, fresh = cache, empty(spec)
    for i in range(6):
        feed = jnp.asarray([TOKENS[0, 12 + i], 1, 2])
        logits, cache = step(PARAMS, cache, feed, active=jnp.asarray([True, False, False]))
        expected, alone = step(PARAMS, alone, feed, active=jnp.asarray([True, True, True]))
        np.testing.assert_array_equal(logits[0], expected[0])
        assert np.isfinite(logits).all()
    assert cache.length.tolist() == [18, 0, 0]
    found, new = _leaves((cache.layers, cache.previous)), _leaves((fresh.layers, fresh.previous))
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf[1:], new[path][1:], err_msg=path)


def test_a_row_that_is_held_back_goes_on_where_it_stood():
    """Its exact tokens drain into main slots, and none is lost while these have room."""
    spec = spec_of(slots=32)
    cache, place = empty(spec), 0
    for i in range(20):
        goes = i not in (5, 6, 7, 12)
        feed = jnp.asarray([TOKENS[0, i], TOKENS[1, place], 1])
        logits, cache = step_of(spec)(PARAMS, cache, feed, active=jnp.asarray([True, goes, False]))
        np.testing.assert_allclose(logits[0], whole()[0, i], rtol=1e-4, atol=1e-5)
        if goes:
            np.testing.assert_allclose(logits[1], whole()[1, place], rtol=1e-4, atol=1e-5)
        place += goes
    np.testing.assert_array_equal(cache.length, [20, 16, 0])
    held = np.asarray(all_positions(spec.layers[0], cache.layers[0]))[1, 0]
    assert sorted(held[held >= 0]) == list(range(16))
