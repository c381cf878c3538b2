"""Scissorhands: counters of low scores, and the released code's percentile."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.kvcache.contract import Attention, Queries
from hashml.kvcache.dense import Dense
from hashml.kvcache.scissorhands import Scissorhands, ScissorhandsRelease, above_quantile
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.window_vote import WindowVote

B, H, J, N = 2, 2, 2, 10
ASKS = Queries(jnp.zeros((B, 1), jnp.int32), jax.random.split(jax.random.key(0), B), jnp.zeros(B, jnp.int32))
"""Who asks; votes do not depend on it."""


def layer_spec(policy: WindowVote, **changes: Any) -> LayerSpec:
    settings: dict[str, Any] = {"kv_heads": H, "query_heads": H * J, "head_dim": 4, "slots": 8, "window": 2}
    settings |= {"key_codec": Dense(), "value_codec": Dense(), "rotary": None, "rope": "none"}
    return LayerSpec(policy=policy, **(settings | changes))


def rows(seed: int, queries: int, since: np.ndarray, heavy: int = 0) -> Attention:
    """Rows over N slots, the token of each of which is there since a query; the first ``heavy`` get more."""
    rng = np.random.default_rng(seed)
    valid = (since[None, :] <= np.arange(queries)[:, None])[None, None, None]
    x = rng.normal(size=(B, H, J, queries, N)) * 2 + 6 * (np.arange(N) < heavy)
    weight = np.where(valid, np.exp(x), 0)
    probs = weight / np.maximum(weight.sum(axis=-1, keepdims=True), 1e-30)
    valid = np.broadcast_to(valid, (B, 1, 1, queries, N))
    return Attention(jnp.asarray(x, jnp.float32), jnp.asarray(probs, jnp.float32), jnp.asarray(valid))


def leaving(policy: WindowVote, attention: Attention, pos: np.ndarray, now: int = 1000) -> np.ndarray:
    """Slots in the order in which they would leave."""
    spec = layer_spec(policy)
    shown = jnp.broadcast_to(jnp.asarray(pos, jnp.int32), (B, H, N))
    state = policy.observe(spec, policy.init(spec, B), attention, shown, ASKS)
    return np.argsort(policy.score(spec, state, shown, jnp.full(B, now)), axis=-1)


@pytest.mark.parametrize("votes", ["any", "mean"])
@pytest.mark.parametrize("ties", ["older", "newer"])
@pytest.mark.parametrize("per_query", [False, True])
def test_the_largest_counters_of_low_scores_leave_first(votes, ties, per_query):
    """Against a loop that stores the rows, with slots that were filled at different times."""
    w, queries = 7, 12
    pos = np.random.default_rng(0).permutation(N)
    since = np.asarray([0, 0, 0, 2, 6, 6, 8, 9, 10, 11])
    attention = rows(1, queries, since)
    probs, valid = np.asarray(attention.probs, np.float64), np.asarray(attention.valid)
    order = leaving(Scissorhands(queries=w, votes=votes, ties=ties, per_query=per_query), attention, pos)
    for b, h in np.ndindex(B, H):
        keys = []
        for n in range(N):
            seen = [q for q in range(queries) if valid[b, 0, 0, q, n]][-w:]
            low = 0.0
            for q in seen:
                mean = 1 / valid[b, 0, 0, q].sum()
                heads = probs[b, h, :, q, n]
                low += bool((heads < mean).all() if votes == "any" else heads.mean() < mean)
            keys.append((-low / (len(seen) if per_query else 1), pos[n] if ties == "older" else -pos[n]))
        np.testing.assert_array_equal(order[b, h], sorted(range(N), key=lambda n: keys[n]))


def test_a_key_that_was_never_low_outlives_all_that_were():
    attention = rows(2, 6, np.zeros(N, int), heavy=1)
    probs = np.asarray(attention.probs)
    never_low = [
        {n for n in range(N) if all((probs[b, h, :, q, n] >= 1 / N).any() for q in range(6))}
        for b, h in np.ndindex(B, H)
    ]
    assert all(0 < len(slots) < N for slots in never_low)
    kinds = Scissorhands(queries=6), Scissorhands(queries=6, ties="newer"), Scissorhands(queries=6, per_query=True)
    for policy in kinds:
        order = leaving(policy, attention, np.arange(N)).reshape(B * H, N)
        for slots, line in zip(never_low, order, strict=True):
            assert set(line[N - len(slots) :]) == slots


def test_counted_over_all_queries_the_policy_becomes_a_window():
    """Where every score but the query's own is low, the counter is the age; a short window forgets that."""
    queries = N
    own = np.eye(queries, dtype=np.float32)[None, None, None]
    valid = np.broadcast_to(np.tri(queries, dtype=bool), (B, 1, 1, queries, N))
    probs = jnp.asarray(np.broadcast_to(own, (B, H, J, queries, N)))
    attention = Attention(probs, probs, jnp.asarray(valid))
    # Newer-first ties show which order comes from counters alone.
    order = leaving(Scissorhands(queries=1000, ties="newer"), attention, np.arange(N))
    np.testing.assert_array_equal(order, np.broadcast_to(np.arange(N), (B, H, N)))
    order = leaving(Scissorhands(queries=1, ties="newer"), attention, np.arange(N))
    np.testing.assert_array_equal(order[0, 0], [*range(N - 2, -1, -1), N - 1])


def test_half_of_the_layer_is_dropped_at_once_unless_a_number_is_given():
    assert Scissorhands().bulk(layer_spec(Scissorhands(), slots=20, window=10)) == 15
    assert Scissorhands().bulk(layer_spec(Scissorhands(), slots=8, window=32)) == 8
    assert Scissorhands(drop=3).bulk(layer_spec(Scissorhands(), slots=20, window=10)) == 3
    assert Scissorhands(drop=3).bulk(layer_spec(Scissorhands(), slots=20, window=10, flush=5)) == 5


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9, 0.95])
def test_the_percentile_is_that_of_the_keys_a_query_sees(quantile):
    attention = rows(3, 8, np.asarray([0, 0, 0, 1, 2, 3, 4, 5, 6, 7]))
    votes = above_quantile(attention.probs, attention.valid, quantile)
    for b, h, j, q in np.ndindex(B, H, J, 8):
        valid = np.asarray(attention.valid)[b, 0, 0, q]
        row = np.asarray(attention.probs)[b, h, j, q]
        threshold = np.quantile(row[valid].astype(np.float64), quantile)
        # A key that is the quantile itself is not above it, whatever the rounding of an interpolation.
        clear = np.abs(row - threshold) > 1e-6
        np.testing.assert_array_equal(np.asarray(votes)[b, h, j, q][clear], ((row > threshold) & valid)[clear])
    assert not above_quantile(jnp.zeros((1, 1, 1, 1, 3)), jnp.zeros((1, 1, 1, 1, 3), bool), quantile).any()


def test_the_release_drops_what_no_recent_row_voted_for():
    """Against a loop; nothing is dropped before ``start`` tokens, nor what no row has judged yet."""
    attention = rows(4, 9, np.asarray([0, 0, 0, 0, 0, 1, 2, 4, 8, 100]))
    policy = ScissorhandsRelease(queries=4, quantile=0.7, start=50)
    spec = layer_spec(policy)
    shown = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, H, N))
    state = policy.observe(spec, policy.init(spec, B), attention, shown, ASKS)
    votes = above_quantile(attention.probs, attention.valid, 0.7).any(axis=2)
    expected = np.array(~votes[:, :, -4:].any(axis=2))
    expected[..., -1] = False
    expired = policy.expire(spec, state, shown, jnp.asarray([50, 49]))
    np.testing.assert_array_equal(expired[0], expected[0])
    assert not expired[1].any()
    assert expected[0].any()
    admitted = policy.admit(spec, state, shown, jnp.asarray([50, 49]))
    np.testing.assert_array_equal(admitted, ~np.asarray(expired))


def test_threshold_zero_and_a_full_window_keep_everything():
    attention = rows(5, 40, np.arange(N))
    policy = ScissorhandsRelease(queries=40, quantile=0, start=0)
    spec = layer_spec(policy)
    shown = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, H, N))
    state = policy.observe(spec, policy.init(spec, B), attention, shown, ASKS)
    assert not policy.expire(spec, state, shown, jnp.asarray([40, 40])).any()
