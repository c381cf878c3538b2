"""Rings of votes: bits against lists of rows, thresholds against their definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.kvcache.contract import Attention, Queries, masked_softmax
from hashml.kvcache.dense import Dense
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.window_vote import (
    WindowVote,
    at_least_mean,
    count_queries,
    count_votes,
    empty_rings,
    push_votes,
)

SHAPE = (2, 2, 3)


class Lists:
    """The last w rows that each slot saw, as Python lists."""

    def __init__(self, queries: int) -> None:
        self.queries = queries
        self.votes: dict[tuple[int, ...], list[bool]] = {index: [] for index in np.ndindex(*SHAPE)}

    def push(self, votes: np.ndarray, sees: np.ndarray) -> None:
        for index, votes_of_slot in self.votes.items():
            if sees[index]:
                votes_of_slot.append(bool(votes[index]))

    def last(self, index: tuple[int, ...]) -> list[bool]:
        return self.votes[index][-self.queries :]


def unrolled(state: dict, index: tuple[int, ...], queries: int) -> list[bool]:
    """A ring's votes from the oldest to the newest."""
    bits = [bool(word >> k & 1) for word in np.asarray(state["bits"])[index] for k in range(32)][:queries]
    seen = int(np.asarray(state["seen"])[index])
    return bits[:seen] if seen < queries else bits[seen % queries :] + bits[: seen % queries]


@pytest.mark.parametrize("queries", [1, 2, 31, 32, 33, 70])
def test_ring_is_a_list_of_the_last_rows(queries):
    """Over more than two turns, in chunks, where not every query sees every slot; every bit compared."""
    rng = np.random.default_rng(queries)
    state, lists = empty_rings(SHAPE, queries), Lists(queries)
    chunk = max(queries // 3, 1)
    for _ in range(9):
        votes, sees = rng.random((2, 2, chunk, 3)) < 0.4, rng.random((2, 2, chunk, 3)) < 0.85
        state = push_votes(state, jnp.asarray(votes), jnp.asarray(sees), queries=queries)
        for n in range(chunk):
            lists.push(votes[:, :, n], sees[:, :, n])
        for index in np.ndindex(*SHAPE):
            last = lists.last(index)
            assert unrolled(state, index, queries) == last
            assert count_votes(state)[index] == sum(last)
            assert count_queries(state, queries)[index] == len(last)
    if queries > 1:
        assert min(len(rows) for rows in lists.votes.values()) > 2 * queries


def test_a_ring_of_400_votes_takes_52_bytes_and_one_of_the_longest_still_counts():
    state = empty_rings(SHAPE, 400)
    assert state["bits"].shape[-1] * state["bits"].dtype.itemsize == 52
    assert state["seen"].dtype == jnp.uint16
    # The counter's last value before it turns back is within 16 bits.
    longest = {"bits": jnp.zeros((*SHAPE, 1024), jnp.uint32), "seen": jnp.full(SHAPE, 2**16 - 1, jnp.uint16)}
    one = jnp.ones((2, 2, 1, 3), bool)
    after = push_votes(longest, one, one, queries=2**15)
    assert (after["seen"] == 2**15).all()
    assert (after["bits"][..., -1] == np.uint32(2**31)).all()
    assert (count_votes(after) == 1).all()


def test_one_mask_may_serve_all_heads():
    votes = jnp.asarray(np.random.default_rng(0).random((2, 2, 5, 3)) < 0.5)
    sees = jnp.asarray(np.random.default_rng(1).random((2, 1, 5, 3)) < 0.5)
    narrow = push_votes(empty_rings(SHAPE, 4), votes, sees, queries=4)
    wide = push_votes(empty_rings(SHAPE, 4), votes, jnp.broadcast_to(sees, votes.shape), queries=4)
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 7, 64]), st.floats(0, 5))
def test_every_query_votes_for_at_least_one_key(seed, seen, scale):
    """The largest of n numbers is not below their mean, also in float32 and under uniform attention."""
    logits = np.random.default_rng(seed).normal(size=(1, 1, 2, 1, 64)).astype(np.float32) * np.float32(scale)
    valid = jnp.arange(64)[None, None, None, None] < seen
    probs = masked_softmax(jnp.asarray(logits), valid)
    votes = np.asarray(at_least_mean(probs, valid))
    assert votes.any(axis=-1).all()
    assert not votes[..., seen:].any()


@pytest.mark.parametrize("seen", range(1, 65, 7))
def test_all_keys_have_the_vote_only_under_uniform_attention(seen):
    valid = jnp.arange(64)[None, None, None, None] < seen
    uniform = masked_softmax(jnp.full((1, 1, 1, 1, 64), 0.7), valid)
    assert at_least_mean(uniform, valid).sum() == seen
    tilted = masked_softmax(jnp.full((1, 1, 1, 1, 64), 0.7).at[..., 0].add(0.1), valid)
    assert at_least_mean(tilted, valid).sum() == 1


def test_a_query_that_sees_nothing_votes_for_nothing():
    valid = jnp.zeros((1, 1, 1, 1, 5), bool)
    assert not at_least_mean(jnp.zeros((1, 1, 1, 1, 5)), valid).any()


@pytest.mark.parametrize("votes", ["any", "mean"])
def test_query_heads_vote_by_any_or_by_their_mean(votes):
    """Against a loop; the threshold is one over the keys that the query sees, not over its position."""
    rng = np.random.default_rng(3)
    valid = rng.random((2, 1, 1, 4, 9)) < 0.7
    probs = np.where(valid, rng.exponential(size=(2, 3, 2, 4, 9)), 0).astype(np.float32)
    probs /= np.maximum(probs.sum(axis=-1, keepdims=True), 1e-9)
    policy = WindowVote(queries=4, votes=votes)
    spec = LayerSpec(kv_heads=3, query_heads=6, head_dim=4, slots=9, window=0, key_codec=Dense(),
                     value_codec=Dense(), policy=policy, rotary=None, rope="none")  # fmt: skip
    attention = Attention(jnp.zeros(probs.shape), jnp.asarray(probs), jnp.asarray(valid))
    pos = jnp.zeros((2, 3, 9), jnp.int32)
    asks = Queries(jnp.zeros((2, 4), jnp.int32), jax.random.split(jax.random.key(0), 2), jnp.zeros(2, jnp.int32))
    state = policy.observe(spec, policy.init(spec, 2), attention, pos, asks)
    for b, h, n in np.ndindex(2, 3, 9):
        count = 0
        for q in range(4):
            if not valid[b, 0, 0, q, n]:
                continue
            least = 1 / valid[b, 0, 0, q].sum()
            heads = probs[b, h, :, q, n].astype(np.float64)
            count += bool((heads >= least).any()) if votes == "any" else bool(heads.mean() >= least)
        assert count_votes(state)[b, h, n] == count
        assert count_queries(state, 4)[b, h, n] == valid[b, 0, 0, :, n].sum()


def test_more_queries_keep_a_superset():
    """Given the same rows, whoever has a vote among the last w has one among the last w + 1."""
    rows = jnp.asarray(np.random.default_rng(4).random((2, 2, 60, 3)) < 0.05)
    held = [
        np.asarray(count_votes(push_votes(empty_rings(SHAPE, w), rows, jnp.ones_like(rows), queries=w)) > 0)
        for w in (1, 5, 20, 33, 60)
    ]
    for fewer, more in itertools.pairwise(held):
        assert (fewer <= more).all()
    assert held[0].sum() < held[-1].sum()
