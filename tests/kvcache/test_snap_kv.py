"""SnapKV, and what PyramidKV and AdaKV make of its scores: which layer and which head may keep how many."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import maximum_filter1d, uniform_filter1d

from hashml.kvcache.ada_kv import AdaKV, ada_budgets
from hashml.kvcache.contract import Attention, PrefillStatistics
from hashml.kvcache.dense import Dense
from hashml.kvcache.prefill import prefill_layer
from hashml.kvcache.pyramid import pyramid_budgets, pyramid_layers
from hashml.kvcache.scissorhands import Scissorhands
from hashml.kvcache.snap_kv import SnapKV, snap_scores
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerTables

H, J, T, W = 3, 2, 20, 4
KEY = jax.random.key(0)


def layer_spec(policy: Any, **changes: Any) -> LayerSpec:
    fixed: dict[str, Any] = {"kv_heads": H, "query_heads": H * J, "head_dim": 4, "slots": 8, "window": W}
    fixed |= {"key_codec": Dense(), "value_codec": Dense(), "rotary": None, "rope": "none"}
    return LayerSpec(policy=policy, **(fixed | changes))


def prompt(seed: int, padding: int = 0, order: np.ndarray | None = None) -> PrefillStatistics:
    """The last W rows of a prompt of one row of the batch, padded in front; early keys in another order if given."""
    pos = np.r_[np.full(padding, -1), np.arange(T - padding)].astype(np.int32)[None]
    valid = ((pos[:, None] >= 0) & (pos[:, None] <= pos[:, -W:, None]))[:, None, None]
    x = np.where(valid, np.exp(2 * np.random.default_rng(seed).normal(size=(1, H, J, W, T))), 0)
    x = x if order is None else np.concatenate([x[..., :-W][..., order], x[..., -W:]], axis=-1)
    probs = jnp.asarray(x / x.sum(axis=-1, keepdims=True), jnp.float32)
    nothing = jnp.zeros((1, H, T, 4))
    counts = jnp.zeros((1, T), jnp.int32)
    return PrefillStatistics(
        jnp.asarray(pos), nothing, nothing, Attention(probs, probs, jnp.asarray(valid)), None, counts
    )


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_scores_are_summed_rows_pooled_as_scipy_pools(pooling, kernel):
    """Zeros beyond the ends, which the average counts in, as the reference does; the last W tokens are outside."""
    statistics = prompt(1, padding=3)
    policy = SnapKV(queries=W, kernel=kernel, pooling=pooling)
    frozen, state = policy.from_prefill(layer_spec(policy), statistics, KEY)
    sums = np.asarray(statistics.last.probs, np.float64)[0].sum(axis=2)[..., 3:-W]  # pyright: ignore
    pool = uniform_filter1d if pooling == "avg" else maximum_filter1d
    expected = pool(sums, kernel, axis=-1, mode="constant", cval=0.0).mean(axis=1)
    np.testing.assert_allclose(frozen[0, :, 3:-W], expected, rtol=1e-5)
    # The last W are frozen above all others, and in a prompt's choice the newest above the older of them.
    np.testing.assert_array_equal(frozen[..., :-W], state["frozen"][..., :-W])
    assert np.isposinf(state["frozen"][0, :, -W:]).all()
    assert (np.diff(frozen[0, :, -W:], axis=-1) == 1).all()
    assert (frozen[0, :, -W] > expected.max()).all()


def test_the_best_pooled_tokens_stay_and_so_do_the_last():
    """Also where the window is shorter than the queries that choose."""
    statistics = prompt(2)
    policy = SnapKV(queries=W, kernel=3)
    frozen, _ = policy.from_prefill(layer_spec(policy, window=1), statistics, KEY)
    best = np.argsort(frozen[0], axis=-1)[:, -(5 + W) :]
    for h in range(H):
        assert set(range(T - W, T)) <= set(best[h])
        pooled = np.asarray(frozen)[0, h, : T - W]
        assert set(best[h]) - set(range(T - W, T)) == set(np.argsort(pooled)[-5:])


def test_of_an_observation_window_that_does_not_fit_the_newest_stay():
    """Eight queries choose, and a layer of six tokens is all of them that can be kept."""
    spec = layer_spec(SnapKV(queries=8, kernel=1), slots=4, window=2)
    q, k, v = (jax.random.normal(jax.random.key(i), (1, heads, T, 4)) for i, heads in enumerate((H * J, H, H)))
    layer = prefill_layer(spec, LayerTables(), q, k, v, jnp.arange(T, dtype=jnp.int32)[None], KEY)
    np.testing.assert_array_equal(layer.pos[0], np.broadcast_to(np.arange(T - 6, T - 2), (H, 4)))
    np.testing.assert_array_equal(layer.window_pos[0], [T - 2, T - 1])


def test_with_kernel_one_a_permutation_of_early_keys_permutes_the_scores():
    order = np.random.default_rng(3).permutation(T - W)
    policy = SnapKV(queries=W, kernel=1)
    plain, _ = policy.from_prefill(layer_spec(policy), prompt(4), KEY)
    turned, _ = policy.from_prefill(layer_spec(policy), prompt(4, order=order), KEY)
    np.testing.assert_allclose(turned[..., : T - W], plain[..., order], rtol=1e-6)
    # With neighbours pooled in it does not.
    policy = SnapKV(queries=W, kernel=5)
    plain, _ = policy.from_prefill(layer_spec(policy), prompt(4), KEY)
    turned, _ = policy.from_prefill(layer_spec(policy), prompt(4, order=order), KEY)
    assert not np.allclose(turned[..., : T - W], plain[..., order], rtol=1e-2)


def test_later_tokens_outlive_the_prompts_and_among_them_the_newer_the_older():
    policy = SnapKV(queries=W)
    spec = layer_spec(policy, slots=3, window=2)
    state = {"frozen": jnp.asarray([[[0.5, jnp.inf, 3.9, jnp.inf, jnp.inf]] * H])}
    pos = jnp.asarray([[[3, 21, 7, 20, 22]] * H], jnp.int32)
    scores = policy.score(spec, state, pos, jnp.asarray([23]))
    np.testing.assert_array_equal(np.argsort(scores[0, 0]), [0, 2, 3, 1, 4])


def test_what_policies_count_in_slots_follows_the_layers_of_a_pyramid():
    """The smallest layer has fewer slots than the middle one drops at once, or has to a head."""
    base = layer_spec(Scissorhands(queries=8, drop=4), slots=10)
    layers = pyramid_layers(base, 3, beta=5, slope="rising")
    assert [x.slots for x in layers] == [2, 10, 18]
    assert [x.policy.bulk(x) for x in layers] == [1, 4, 7]
    assert [getattr(x.policy, "drop") for x in layers] == [1, 4, 7]  # noqa: B009
    shared = layer_spec(AdaKV(queries=W, base=8, later=2), slots=18, page_size=2, pages=3 * 10)
    layers = pyramid_layers(shared, 3, beta=3)
    assert [x.slots for x in layers] == [30, 18, 6]
    assert [getattr(x.policy, "base") for x in layers] == [14, 8, 2]  # noqa: B009
    # Pages as the slots, and of a smaller layer those that heads fill in part.
    assert [x.pages for x in layers] == [50, 30, 12]
    alike = pyramid_layers(layer_spec(SnapKV()), 3, beta=2)
    assert {x.policy for x in alike} == {SnapKV()}


def test_pooling_leaves_what_no_kernel_reaches():
    probs = jnp.zeros((1, 9)).at[0, 4].set(1.0)
    everywhere = jnp.ones(9, bool)
    np.testing.assert_allclose(
        snap_scores(probs, everywhere, kernel=3, pooling="avg"), [0, 0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0], rtol=1e-6
    )
    np.testing.assert_array_equal(
        snap_scores(probs, everywhere, kernel=5, pooling="max"), [0, 0, 1, 1, 1, 1, 1, 0, 0]
    )


# PyramidKV


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(1, 40),
    blocks=st.integers(1, 60),
    multiple_of=st.sampled_from([1, 4, 32]),
    beta=st.floats(1, 50),
    prompt=st.none() | st.integers(0, 4000),
)
def test_budgets_fall_and_add_up_to_the_slot(layers, blocks, multiple_of, beta, prompt):
    base = blocks * multiple_of
    falling = pyramid_budgets(layers, base, beta=beta, prompt=prompt, multiple_of=multiple_of)
    assert len(falling) == layers
    assert sum(falling) == layers * base
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert all(slots % multiple_of == 0 for slots in falling)
    assert min(falling) >= min(1, base)
    assert prompt is None or max(falling) <= max(prompt, base)
    rising = pyramid_budgets(layers, base, beta=beta, prompt=prompt, multiple_of=multiple_of, slope="rising")
    assert rising == falling[::-1]


@pytest.mark.parametrize("prompt", [None, 150])
def test_budgets_follow_the_formula_of_the_reference(prompt):
    """Within one slot, the rounding, of max - l (max - min) / (L - 1)."""
    layers, base, beta = 9, 100, 20
    least, most = base / beta, 2 * base - base / beta
    if prompt is not None and most >= prompt:
        least, most = 2 * base - prompt, prompt
    exact = [most - layer * (most - least) / (layers - 1) for layer in range(layers)]
    budgets = pyramid_budgets(layers, base, beta=beta, prompt=prompt)
    np.testing.assert_array_less(np.abs(np.subtract(budgets, exact)), 1)
    assert budgets[0] == most
    assert budgets[-1] == least


def test_beta_one_and_prompts_that_fit_give_equal_budgets():
    assert pyramid_budgets(7, 30, beta=1) == (30,) * 7
    assert pyramid_budgets(7, 30, prompt=25) == (30,) * 7
    assert pyramid_budgets(1, 30) == (30,)


def test_layers_are_copies_but_for_their_slots():
    base = layer_spec(SnapKV(queries=W), slots=40, window=W, flush=2, sinks=3)
    layers = pyramid_layers(base, 5, beta=40)
    assert [layer.slots for layer in layers] == [77, 58, 40, 22, 3], "the smallest layer holds the sinks"
    assert {(layer.window, layer.policy, layer.flush, layer.sinks) for layer in layers} == {(W, base.policy, 2, 3)}
    assert [layer.slots for layer in pyramid_layers(base, 2, prompt=54)] == [50, 30]
    assert [layer.slots for layer in pyramid_layers(base, 2, beta=40, slope="rising")] == [3, 77]
    paged = layer_spec(SnapKV(queries=W), slots=40, page_size=8, pages=100)
    assert [layer.slots for layer in pyramid_layers(paged, 3)] == [72, 40, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0; it must be at least 1"),
        ({"base": 0}, "base is 0; it must be at least 1"),
        ({"beta": 0.5}, "beta is 0.5; it must be at least 1"),
        ({"multiple_of": 3}, "base is 8; it must be a multiple of 3"),
        ({"least": 9}, "least is 9; it must be between 0 and base, 8"),
        ({"prompt": -1}, "prompt is -1; it must be at least 0"),
    ],
)
def test_bad_pyramids_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        pyramid_budgets(**({"layers": 4, "base": 8} | change))


# AdaKV


def scores_of(seed: int, batch: int = 2, tokens: int = 30) -> np.ndarray:
    """Heads of unequal reach."""
    scale = np.asarray([0.3, 1.0, 3.0])[:, None]
    return (np.random.default_rng(seed).exponential(size=(batch, H, tokens)) * scale).astype(np.float32)


@pytest.mark.parametrize("base", [1, 5, 11])
@pytest.mark.parametrize("floor", [0, 0.2, 0.5, 1])
def test_budgets_of_heads_follow_the_best_of_all(base, floor):
    """Against a loop; in all they are H base, but for the rounding."""
    scores = scores_of(1)
    budgets = np.asarray(ada_budgets(jnp.asarray(scores), base, floor))
    for b in range(2):
        best = sorted(((-scores[b, h, t], h) for h, t in np.ndindex(H, 30)))[: H * base]
        counts = [sum(owner == h for _, owner in best) for h in range(H)]
        np.testing.assert_array_equal(budgets[b], [round((1 - floor) * n + int(floor * base)) for n in counts])
        assert abs(budgets[b].sum() - H * (base * (1 - floor) + int(floor * base))) <= H / 2


def test_a_full_floor_gives_equal_budgets():
    np.testing.assert_array_equal(ada_budgets(jnp.asarray(scores_of(2)), 7, 1), np.full((2, H), 7))


def test_without_a_floor_no_split_keeps_more_of_the_scores():
    scores = scores_of(3)
    budgets = np.asarray(ada_budgets(jnp.asarray(scores), 6, 0))
    ordered = -np.sort(-scores, axis=-1)
    adaptive = np.asarray([[ordered[b, h, : budgets[b, h]].sum() for h in range(H)] for b in range(2)]).sum(axis=1)
    equal = ordered[..., :6].sum(axis=(1, 2))
    assert (adaptive > equal).all()
    np.testing.assert_allclose(adaptive, [np.sort(row.ravel())[-6 * H :].sum() for row in scores], rtol=1e-6)


@pytest.mark.parametrize("floor", [0, 0.5, 1])
def test_a_prompt_that_fits_leaves_every_head_the_mean(floor):
    few = jnp.where(jnp.arange(30) < 4, jnp.asarray(scores_of(4)), -jnp.inf)
    base = 6
    np.testing.assert_array_equal(
        ada_budgets(few, base, floor), np.full((2, H), round((1 - floor) * 6 + int(floor * 6)))
    )
    np.testing.assert_array_equal(ada_budgets(few[..., :3], base, 0), np.full((2, H), base))


def test_caps_are_budgets_of_what_competes_for_main_slots():
    """Padding and the window do not; sinks are kept by every head; caps lie within the slots."""
    policy = AdaKV(queries=2, base=4, floor=0)
    spec = layer_spec(policy, slots=6, window=3, sinks=2)
    pos = np.r_[np.full(5, -1), np.arange(25)].astype(np.int32)
    pos = np.stack([pos, np.arange(30, dtype=np.int32)])
    score = scores_of(5)
    masked = score.copy()
    masked[0, :, :5], masked[:, :, -3:] = -np.inf, -np.inf
    masked[0, :, 5:7], masked[1, :, :2] = np.inf, np.inf
    expected = np.clip(np.asarray(ada_budgets(jnp.asarray(masked), 4, 0)), 2, 6)
    loud = np.where(np.isneginf(masked), 1e9, score)
    np.testing.assert_array_equal(policy.caps(spec, jnp.asarray(loud), jnp.asarray(pos)), expected)
    assert (expected != 4).any()


@pytest.mark.parametrize(
    ("base", "floor", "message"), [(0, 0.5, "base is 0"), (3, -0.1, "floor is -0.1; it must be bet")]
)
def test_bad_budgets_are_named(base, floor, message):
    with pytest.raises(ValueError, match=message):
        ada_budgets(jnp.zeros((1, 1, 4)), base, floor)


def test_slots_for_later_tokens_lie_beyond_budgets():
    spec = layer_spec(AdaKV(queries=2, base=4, floor=0, later=3), slots=9, window=3)
    score, pos = scores_of(5), np.tile(np.arange(30, dtype=np.int32), (2, 1))
    bare = layer_spec(AdaKV(queries=2, base=4, floor=0), slots=6, window=3)
    policies: list[Any] = [spec.policy, bare.policy]
    found, expected = (
        policy.caps(each, jnp.asarray(score), jnp.asarray(pos))
        for policy, each in zip(policies, (spec, bare), strict=True)
    )
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="later is -1; it must be at least 0 slots"):
        AdaKV(base=4, later=-1)
    with pytest.raises(ValueError, match="slots is 9; it must be at least base, 4, .*and later, 6, together"):
        layer_spec(AdaKV(queries=2, base=4, later=6), slots=9, window=3)
