"""CORM: long-term minor keys leave, others stay, and nothing has a budget."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.kvcache.contract import Attention, Queries
from hashml.kvcache.corm import Corm
from hashml.kvcache.dense import Dense
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.window_vote import empty_rings, push_votes

B, H, J, N, QUERIES = 2, 2, 2, 12, 20
ASKS = Queries(jnp.zeros((B, 1), jnp.int32), jax.random.split(jax.random.key(0), B), jnp.zeros(B, jnp.int32))
"""Who asks; votes do not depend on it."""
POS = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, H, N))
NOW = jnp.full(B, QUERIES)


def layer_spec(policy: Corm, **changes: Any) -> LayerSpec:
    settings: dict[str, Any] = {"kv_heads": H, "query_heads": H * J, "head_dim": 4, "slots": 10, "window": 2}
    settings |= {"key_codec": Dense(), "value_codec": Dense(), "rotary": None, "rope": "none"}
    return LayerSpec(policy=policy, **(settings | changes))


def rows(seed: int) -> Attention:
    """Concentrated rows; the last slot's token came 4 queries ago, that before it 8."""
    since = np.asarray([0] * (N - 2) + [QUERIES - 8, QUERIES - 4])
    valid = (since[None, :] <= np.arange(QUERIES)[:, None])[None, None, None]
    x = np.random.default_rng(seed).normal(size=(B, H, J, QUERIES, N)) * 3
    x[..., ::2] -= 4
    weight = np.where(valid, np.exp(x), 0)
    probs = weight / weight.sum(axis=-1, keepdims=True)
    valid = np.broadcast_to(valid, (B, 1, 1, QUERIES, N))
    return Attention(jnp.asarray(x, jnp.float32), jnp.asarray(probs, jnp.float32), jnp.asarray(valid))


def after(policy: Corm, attention: Attention) -> tuple[LayerSpec, dict]:
    spec = layer_spec(policy)
    return spec, policy.observe(spec, policy.init(spec, B), attention, POS, ASKS)


@pytest.mark.parametrize("votes", ["any", "mean"])
@pytest.mark.parametrize("queries", [1, 5, 8, 20])
def test_a_key_expires_that_was_minor_to_each_of_the_last_queries(votes, queries):
    attention = rows(1)
    probs, valid = np.asarray(attention.probs, np.float64), np.asarray(attention.valid)
    policy = Corm(queries=queries, votes=votes)
    spec, state = after(policy, attention)
    expected = np.zeros((B, H, N), bool)
    for b, h, n in np.ndindex(B, H, N):
        seen = [q for q in range(QUERIES) if valid[b, 0, 0, q, n]]
        minor = []
        for q in seen[-queries:]:
            heads, mean = probs[b, h, :, q, n], 1 / valid[b, 0, 0, q].sum()
            minor.append(bool((heads < mean).all() if votes == "any" else heads.mean() < mean))
        expected[b, h, n] = len(seen) >= queries and all(minor)
    np.testing.assert_array_equal(policy.expire(spec, state, POS, NOW), expected)
    np.testing.assert_array_equal(policy.admit(spec, state, POS, NOW), ~expected)
    assert expected.any()
    assert not expected.all(axis=-1).any(), "some key had the last query's vote"


def test_nothing_expires_that_fewer_queries_saw():
    spec, state = after(Corm(queries=QUERIES + 1), rows(2))
    assert not spec.policy.expire(spec, state, POS, NOW).any()  # pyright: ignore[reportOptionalMemberAccess]


def test_more_queries_keep_a_superset():
    kept = []
    for queries in (1, 2, 4, 8, 16):
        spec, state = after(Corm(queries=queries), rows(3))
        kept.append(~np.asarray(spec.policy.expire(spec, state, POS, NOW)))
    for fewer, more in itertools.pairwise(kept):
        assert (fewer <= more).all()
    assert kept[0].sum() < kept[-1].sum()


def test_any_head_saves_what_the_mean_would():
    """The mean of the heads reaches a threshold only if one of them does."""
    kept = []
    for votes in ("any", "mean"):
        spec, state = after(Corm(queries=8, votes=votes), rows(4))
        kept.append(~np.asarray(spec.policy.expire(spec, state, POS, NOW)))
    assert (kept[1] <= kept[0]).all()
    assert kept[1].sum() < kept[0].sum()


def test_a_budget_of_what_is_not_minor_keeps_the_same():
    """Keys with a vote have more votes than keys without: the best B by count are CORM's where those are B."""
    policy, budgeted = Corm(queries=4), Corm(queries=4, budgeted=True)
    spec, state = after(policy, rows(5))
    assert budgeted.expire(spec, state, POS, NOW) is None
    assert budgeted.admit(spec, state, POS, NOW) is None
    keeps = ~np.asarray(policy.expire(spec, state, POS, NOW))
    scores = np.asarray(budgeted.score(spec, state, POS, NOW))
    for b, h in np.ndindex(B, H):
        best = np.argsort(scores[b, h])[N - keeps[b, h].sum() :]
        assert set(best) == set(np.flatnonzero(keeps[b, h]))


def test_the_fewest_votes_leave_first_and_of_equals_the_older():
    votes = jnp.asarray(np.random.default_rng(6).random((B, H, 6, N)) < 0.4)
    state = push_votes(empty_rings((B, H, N), 6), votes, jnp.ones_like(votes), queries=6)
    pos = jnp.asarray(np.random.default_rng(7).permutation(B * H * N).reshape(B, H, N), jnp.int32)
    policy = Corm(queries=6)
    scores = policy.score(layer_spec(policy), state, pos, NOW)
    for b, h in np.ndindex(B, H):
        expected = sorted(range(N), key=lambda n: (votes[b, h, :, n].sum(), pos[b, h, n]))
        np.testing.assert_array_equal(np.argsort(scores[b, h]), expected)
