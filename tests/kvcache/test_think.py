"""ThinK: the paper's error and its bound (numbered invariants), masks, pairs that rotate together, inner codecs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.kvcache.contract import Codec, CodecState
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.dense import Dense
from hashml.kvcache.full import KeepAll
from hashml.kvcache.integer import IntGroup
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.kvquant import NonUniformKeys
from hashml.kvcache.prefill import prefill_layer
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerTables
from hashml.kvcache.think import ThinK, choose_channels, choose_pairs
from hashml.models.rotary import Rotary, half_from_interleaved

B, H, J, D, T, W = 2, 2, 2, 16, 24, 5
SIGNPOSTS = jnp.asarray([-1.0, -0.4, 0.1, 0.8])


def prompt(seed=0, width=D):
    """Keys and queries whose channels are of very different size."""
    rng = np.random.default_rng(seed)
    scales = [np.exp(rng.normal(size=(B, H, *ones, width))) for ones in ((1,), (1, 1))]
    keys, queries = rng.normal(size=(B, H, T, width)) * scales[0], rng.normal(size=(B, H, J, W, width)) * scales[1]
    return jnp.asarray(keys, jnp.float32), jnp.asarray(queries, jnp.float32)


@functools.partial(jax.jit, static_argnames="codec")
def fitted(codec, params, keys, queries, keys_valid=None, queries_valid=None):
    """The codec's state of a prompt that has all of it in main slots."""
    keys_valid = jnp.ones(keys.shape[:3], bool) if keys_valid is None else keys_valid
    queries_valid = jnp.ones((keys.shape[0], queries.shape[3]), bool) if queries_valid is None else queries_valid
    fixed = codec.init(*keys.shape[:2], keys.shape[2], keys.shape[3], keys.dtype).fixed
    fixed = codec.fit(fixed, keys, queries, (keys_valid, queries_valid))
    return CodecState(codec.quantise(params, fixed, keys, keys_valid), fixed)


@functools.partial(jax.jit, static_argnames="codec")
def decode(codec, params, state):
    return codec.decode(params, state)


@functools.partial(jax.jit, static_argnames="codec")
def logits(codec, params, state, queries):
    return codec.logits(params, state, queries, None)


@functools.partial(jax.jit, static_argnames="codec")
def quantise(codec, params, keys):
    return codec.quantise(params, {}, keys, jnp.ones(keys.shape[:3], bool))


def logits_of(keys, queries):
    return np.einsum("bhjnd,bhcd->bhjnc", np.asarray(queries, np.float64), np.asarray(keys, np.float64))


# --- the numbered invariants ----------------------------------------------------------------------


@pytest.mark.parametrize("pair_tied", [False, True])
def test_1_nothing_dropped_is_exact(pair_tied):
    keys, queries = prompt()
    codec = ThinK(Dense(), 0.0, pair_tied)
    state = fitted(codec, {}, keys, queries)
    np.testing.assert_array_equal(decode(codec, {}, state), keys)
    np.testing.assert_allclose(logits(codec, {}, state, queries), logits_of(keys, queries), atol=1e-4)


@pytest.mark.parametrize("dropped", [0.2, 0.4, 0.6])
def test_2_error_is_the_papers_and_below_the_bound_that_the_choice_minimises(dropped):
    """||Q K' - Q_S K_S'||_F^2 = sum over dropped i, j of (Q'Q)_ij (K'K)_ij, at most the square of the sum over
    dropped j of ||Q_j|| ||K_j||, and no other choice of as many channels has a lower bound: all of them are tried."""
    width = 10
    keys, queries = prompt(1, width)
    codec = ThinK(Dense(), dropped)
    state = fitted(codec, {}, keys, queries)
    channels = np.asarray(state.fixed["channels"])
    count = int(width * dropped)
    assert channels.shape == (B, H, width - count)
    assert (np.diff(channels.astype(int), axis=-1) > 0).all()
    error = logits_of(keys, queries) - np.asarray(logits(codec, {}, state, queries))
    for b in range(B):
        for h in range(H):
            q, k = np.asarray(queries[b, h], np.float64).reshape(J * W, width), np.asarray(keys[b, h], np.float64)
            gone = np.setdiff1d(np.arange(width), channels[b, h])
            cross = ((q.T @ q) * (k.T @ k))[np.ix_(gone, gone)].sum()
            np.testing.assert_allclose((error[b, h] ** 2).sum(), cross, rtol=1e-3)
            weight = np.linalg.norm(q, axis=0) * np.linalg.norm(k, axis=0)
            assert cross <= weight[gone].sum() ** 2
            least = min(weight[list(some)].sum() for some in itertools.combinations(range(width), count))
            np.testing.assert_allclose(weight[gone].sum(), least, rtol=1e-6)


def test_3_channels_no_query_uses_go_at_no_error():
    keys, queries = prompt(2)
    unused = [1, 4, 5, 9, 14, 15]  # int(16 * 0.4) of them, and they are large in the keys
    keys, queries = keys.at[..., jnp.array(unused)].mul(50), queries.at[..., jnp.array(unused)].set(0)
    state = fitted(ThinK(Dense(), 0.4), {}, keys, queries)
    expected = np.setdiff1d(np.arange(D), unused)
    np.testing.assert_array_equal(state.fixed["channels"], np.broadcast_to(expected, (B, H, 10)))
    found = logits(ThinK(Dense(), 0.4), {}, state, queries)
    np.testing.assert_allclose(found, logits_of(keys, queries), rtol=1e-4, atol=1e-3)


def test_4_permuted_channels_permute_the_choice():
    keys, queries = prompt(3)
    order = np.random.default_rng(4).permutation(D)
    chosen = fitted(ThinK(Dense(), 0.4), {}, keys, queries).fixed["channels"]
    permuted = fitted(ThinK(Dense(), 0.4), {}, keys[..., order], queries[..., order]).fixed["channels"]
    np.testing.assert_array_equal(np.sort(order[np.asarray(permuted)], axis=-1), chosen)


@pytest.mark.parametrize("pair_tied", [False, True])
def test_5_pruned_slots_beside_exact_ones_equal_zeroed_channels(pair_tied):
    """Old keys lose channels and recent ones none: as logits of full keys with zeros, with one scale for both."""
    keys, queries = prompt(5)
    codec = ThinK(Dense(), 0.5, pair_tied)
    state = fitted(codec, {}, keys[:, :, :-W], queries)
    masked = np.array(keys)
    for b, h in np.ndindex(B, H):
        gone = np.setdiff1d(np.arange(D), np.asarray(state.fixed["channels"][b, h]))
        masked[b, h, :-W, gone] = 0
    recent = jnp.einsum("bhjnd,bhcd->bhjnc", queries, keys[:, :, -W:])
    joined = jnp.concatenate([logits(codec, {}, state, queries), recent], axis=-1)
    np.testing.assert_allclose(joined, logits_of(masked, queries), atol=1e-3)
    np.testing.assert_array_equal(decode(codec, {}, state), masked[:, :, :-W])


def test_6_the_size_of_queries_and_keys_changes_nothing():
    keys, queries = prompt(6)
    codec = ThinK(Dense(), 0.4)
    chosen = fitted(codec, {}, keys, queries).fixed["channels"]
    np.testing.assert_array_equal(fitted(codec, {}, keys, 1000 * queries).fixed["channels"], chosen)
    np.testing.assert_array_equal(fitted(codec, {}, 0.01 * keys, queries).fixed["channels"], chosen)


def test_7_real_bytes_fall():
    """In heads of 128 at 0.4, 51 channels go; the index is a byte a kept channel and head, two beyond 256."""
    for inner, full in ((Dense(), 32 * 128 * 4), (IntGroup(4, 11), None), (KiviKeys(2, 8), None)):
        thin, whole = (jax.eval_shape(lambda c=c: c.init(1, 2, 16, 128, jnp.float32)) for c in (ThinK(inner), inner))
        if full is not None:
            assert stored_bytes(whole) == full
            assert stored_bytes(thin) == full * 77 // 128 + 2 * 77
            assert stored_bytes(thin.slots) / stored_bytes(whole.slots) == 77 / 128
        assert thin.fixed["channels"].dtype == jnp.uint8
        assert stored_bytes(thin) < 0.65 * stored_bytes(whole) + 2 * 77
    wide = jax.eval_shape(lambda: ThinK(Dense()).init(1, 2, 16, 512, jnp.float32))
    assert wide.fixed["channels"].dtype == jnp.int32


# --- beyond the list ------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [ThinK(Dense(), 0.4), ThinK(Dense(), 0.4, pair_tied=True)], ids=str)
def test_padding_other_rows_and_dropped_tokens_decide_nothing(codec):
    keys, queries = prompt(7)
    keys_valid = jnp.asarray(np.random.default_rng(8).random((B, H, T)) < 0.7)
    queries_valid = jnp.arange(W) >= jnp.asarray([[2], [0]])
    noisy = jnp.where(keys_valid[..., None], keys, 1e4 * jnp.arange(D))
    asked = jnp.where(queries_valid[:, None, None, :, None], queries, 1e4 * jnp.arange(D)[::-1])
    chosen = fitted(codec, {}, noisy, asked, keys_valid, queries_valid).fixed["channels"]
    for b, h in np.ndindex(B, H):
        of_keys = (np.asarray(keys, np.float64)[b, h, keys_valid[b, h]] ** 2).mean(0)
        of_queries = (np.asarray(queries, np.float64)[b, h][:, queries_valid[b]] ** 2).mean((0, 1))
        if codec.pair_tied:  # three of the eight pairs go
            scores = of_keys.reshape(2, 8).sum(0) * of_queries.reshape(2, 8).sum(0)
            pairs = np.sort(np.argsort(scores)[3:])
            expected = np.concatenate([pairs, pairs + 8])
        else:
            expected = np.sort(np.argsort(of_keys * of_queries)[6:])
        np.testing.assert_array_equal(chosen[b, h], expected)


def test_query_heads_of_a_group_are_averaged():
    """Squares first, then the mean: one head that asks loudly outweighs one that whispers."""
    of_keys = jnp.ones((1, 1, 4))
    keys = jnp.ones((1, 1, 3, 4))
    queries = jnp.asarray([[3.0, 0, 1, 0], [0, 2, 1, 0]]).reshape(1, 1, 2, 1, 4)
    chosen = fitted(ThinK(Dense(), 0.5), {}, keys, queries).fixed["channels"]
    np.testing.assert_array_equal(chosen[0, 0], [0, 1])  # energies 4.5, 2, 1, 0
    np.testing.assert_array_equal(choose_channels(jnp.asarray([[[4.5, 2, 1, 0]]]), of_keys, 2)[0, 0], [0, 1])


def test_pairs_stay_together_and_rotation_does_not_change_the_choice():
    """So the mask commutes with the rotation: pruning raw keys and then rotating is pruning rotated keys."""
    keys, queries = prompt(9)
    rotary = Rotary()
    positions = jnp.broadcast_to(jnp.arange(T), (B, 1, T))
    turned = rotary.rotate(keys, positions)
    asked = queries.reshape(B, H * J, W, D)
    asked = rotary.rotate(asked, jnp.broadcast_to(jnp.arange(T, T + W), (B, 1, W))).reshape(queries.shape)
    codec = ThinK(Dense(), 0.4, pair_tied=True)
    raw, written = fitted(codec, {}, keys, queries), fitted(codec, {}, turned, asked)
    channels = np.asarray(raw.fixed["channels"])
    assert channels.shape[-1] == D - 6  # int(16 * 0.4) = 6 is three pairs
    np.testing.assert_array_equal(channels[..., 5:], channels[..., :5] + D // 2)
    np.testing.assert_array_equal(written.fixed["channels"], channels)
    late = codec.logits({}, raw, asked, lambda x: rotary.rotate(x, positions))
    np.testing.assert_allclose(late, logits(codec, {}, written, asked), atol=1e-3)
    # Single channels do not: their choice from raw keys is another one than from rotated keys.
    single = ThinK(Dense(), 0.4)
    ours, theirs = (fitted(single, {}, *x).fixed["channels"] for x in ((keys, queries), (turned, asked)))
    assert (ours != theirs).any()


def test_runs_of_pairs_are_chosen_by_their_sum():
    """Two neighbours and both partners are one unit of `Coupled`."""
    energy = jnp.asarray([[[1, 9, 4, 4, 0, 1, 1, 5.0]]])
    np.testing.assert_array_equal(choose_pairs(energy, jnp.ones((1, 1, 8)), 4, unit=2)[0, 0], [2, 3, 6, 7])
    np.testing.assert_array_equal(choose_pairs(energy, jnp.ones((1, 1, 8)), 4)[0, 0], [1, 3, 5, 7])


def test_neighbours_that_turn_together_stay_together():
    """Interleaved pairs are the others up to the order of channels; in runs, the best of all runs by hand."""
    rng = np.random.default_rng(5)
    of_queries, of_keys = (jnp.asarray(rng.random((2, 3, 12)), jnp.float32) for _ in range(2))
    order = half_from_interleaved(12)
    found = np.asarray(choose_pairs(of_queries, of_keys, 6, pairs="interleaved"))
    same = np.sort(order[np.asarray(choose_pairs(of_queries[..., order], of_keys[..., order], 6))], axis=-1)
    np.testing.assert_array_equal(found, same)
    for unit, run in ((1, 2), (2, 2), (3, 6), (4, 4)):
        found = np.asarray(choose_pairs(of_queries, of_keys, run, unit=unit, pairs="interleaved"))
        pair = np.asarray(of_queries).reshape(2, 3, 6, 2).sum(-1) * np.asarray(of_keys).reshape(2, 3, 6, 2).sum(-1)
        best = pair.reshape(2, 3, 12 // run, run // 2).sum(-1).argmax(-1)
        np.testing.assert_array_equal(found, best[..., None] * run + np.arange(run))


@pytest.mark.parametrize("inner", [IntGroup(4, 4), KiviKeys(2, 8)], ids=str)
def test_prunes_then_quantises(inner):
    """The authors' order: the kept channels, coded as if there were no others."""
    keys, queries = prompt(10)
    codec = ThinK(inner, 0.5)
    state = fitted(codec, {}, keys, queries)
    channels = np.asarray(state.fixed["channels"], np.int64)[:, :, None]
    thin = jnp.take_along_axis(keys, jnp.asarray(channels, jnp.int32), axis=-1)
    rows = quantise(inner, {}, thin)
    for leaf, row in rows.items():
        np.testing.assert_array_equal(state.slots[leaf], row)
    kept = np.take_along_axis(np.asarray(decode(codec, {}, state)), channels, axis=-1)
    np.testing.assert_allclose(kept, decode(inner, {}, CodecState(rows, {})), atol=1e-6)
    asked = jnp.take_along_axis(queries, jnp.asarray(channels, jnp.int32)[:, :, None], axis=-1)
    expected = logits(inner, {}, CodecState(rows, {}), asked)
    np.testing.assert_allclose(logits(codec, {}, state, queries), expected, atol=1e-4)


@pytest.mark.parametrize("inner", [Coupled(4, 3), NonUniformKeys(2)], ids=str)
def test_raw_codes_of_kept_channels_are_those_of_all_channels(inner):
    """Groups are formed on all channels, and each keeps the code it had; what is gone decodes to zero."""
    rng = np.random.default_rng(11)
    if isinstance(inner, Coupled):
        params = {"codebook": jnp.asarray(rng.normal(size=(H, D // 4, 8, 4)), jnp.float16)}
    else:
        ranges = {"low": -2 - jnp.arange(H * D).reshape(H, D) / 9, "high": jnp.linspace(1, 4, H * D).reshape(H, D)}
        params = ranges | {"table": SIGNPOSTS}
    keys, queries = prompt(12)
    codec = ThinK(inner, 0.5, pair_tied=True)
    codec.check(D)
    state = fitted(codec, params, keys, queries)
    channels = np.asarray(state.fixed["channels"], np.int64)
    if isinstance(inner, Coupled):
        starts = channels.reshape(B, H, 2, 4)[..., 0]
        assert (starts % 4 == 0).all()
        np.testing.assert_array_equal(starts[..., 1], starts[..., 0] + D // 2)
    whole = quantise(inner, params, keys)
    full = np.asarray(decode(inner, params, CodecState(whole, {})))
    masked = np.zeros_like(full)
    np.put_along_axis(masked, channels[:, :, None], np.take_along_axis(full, channels[:, :, None], -1), -1)
    np.testing.assert_allclose(decode(codec, params, state), masked, atol=1e-6)
    assert codec.space == "pre_rope"
    assert stored_bytes(state.slots) == stored_bytes(whole) / 2


def test_only_pairs_may_meet_raw_keys():
    """A layer refuses single channels of raw keys, and takes pairs of either."""

    def layer(codec, rope, values: Codec | None = None):
        return LayerSpec(
            kv_heads=2, query_heads=4, head_dim=D, slots=8, window=4, flush=4, key_codec=codec,
            value_codec=values or Dense(), policy=KeepAll(), rotary=Rotary(), rope=rope,
        )  # fmt: skip

    with pytest.raises(ValueError, match="is for keys after rotation; rope is 'read', not 'write'"):
        layer(ThinK(Dense()), "read")
    with pytest.raises(ValueError, match="is for keys before rotation; rope must be"):
        layer(ThinK(Coupled(4, 4), pair_tied=True), "write")
    for rope in ("read", "write"):
        layer(ThinK(Dense(), pair_tied=True), rope)
    layer(ThinK(KiviKeys(2, 4), 0.5), "write")
    layer(ThinK(Coupled(4, 4), 0.5, pair_tied=True), "read")
    with pytest.raises(ValueError, match="value_codec is .*; it is for keys alone"):
        layer(Dense(), "write", ThinK(Dense()))


def chosen_by_hand(q, k, length, count, kept=4):
    """Of one row and head, whose queries are ``q [J, T, D]`` and keys ``k [T, D]``."""
    energy = (q[:, :length][:, -count:].astype(np.float64) ** 2).mean((0, 1))
    return np.sort(np.argsort(-energy * (k[:length].astype(np.float64) ** 2).mean(0))[:kept])


@pytest.mark.parametrize("count", [3, 32])
def test_all_cached_keys_choose_the_windows_among_them(count):
    """A row whose prompt lies in the window as a whole chooses as well, and padding has no say in any."""
    rng = np.random.default_rng(13)
    lengths, width, tokens = (20, 5), 8, 20
    q, k, v = (
        (rng.normal(size=(2, heads, tokens, width)) * np.exp(rng.normal(size=(2, heads, 1, width)))).astype(
            np.float32
        )
        for heads in (H * J, H, H)
    )
    # The window's keys are others than those before it.
    k[:, :, :6] *= 5 * np.exp(rng.normal(size=(2, H, 6, width)))
    pos = np.full((2, tokens), -1, np.int32)
    placed = [np.full_like(x, 9.0) for x in (q, k, v)]
    for row, length in enumerate(lengths):
        pos[row, tokens - length :] = np.arange(length)
        for x, source in zip(placed, (q, k, v), strict=True):
            x[row, :, tokens - length :] = source[row, :, :length]
    spec = LayerSpec(
        kv_heads=H, query_heads=H * J, head_dim=width, slots=16, window=8, value_codec=Dense(),
        key_codec=ThinK(Dense(), 0.5, queries=count), policy=KeepAll(), rotary=None, rope="none",
    )  # fmt: skip
    given = (jnp.asarray(x) for x in (*placed, pos))
    run = jax.jit(functools.partial(prefill_layer, spec, LayerTables()))
    layer = run(*given, jax.random.key(0))
    for row, h in np.ndindex(2, H):
        expected = chosen_by_hand(q[row, J * h : J * (h + 1)], k[row, h], lengths[row], count)
        np.testing.assert_array_equal(layer.keys.fixed["channels"][row, h], expected)
    with pytest.raises(ValueError, match="queries is 0; at least 1"):
        ThinK(Dense(), queries=0)
