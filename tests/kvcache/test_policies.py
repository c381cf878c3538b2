"""What holds of every eviction policy, whatever it scores by."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from hashml.kvcache.ada_kv import AdaKV
from hashml.kvcache.contract import MASKED, Attention, Policy, PrefillStatistics, Queries
from hashml.kvcache.controls import KeyNorm, RandomEviction
from hashml.kvcache.corm import Corm
from hashml.kvcache.dense import Dense
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.keyformer import Keyformer
from hashml.kvcache.scissorhands import Scissorhands, ScissorhandsRelease
from hashml.kvcache.snap_kv import SnapKV
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.streaming import Streaming, break_ties
from hashml.kvcache.tova import TOVA
from hashml.kvcache.window_vote import WindowVote, count_queries, count_votes

B, H, J, D, T = 3, 2, 3, 4, 12
KEYS = jax.random.split(jax.random.key(0), B)
QUICK = {"xla_backend_optimization_level": 0}
"""What is compiled here runs a few times."""

POLICIES: dict[str, Policy] = {
    "streaming": Streaming(),
    "h2o": HeavyHitters(),
    "h2o per query": HeavyHitters(normalise=True),
    "tova": TOVA(),
    "snapkv": SnapKV(queries=3, kernel=3),
    "snapkv max": SnapKV(queries=3, kernel=5, pooling="max"),
    "adakv": AdaKV(queries=3, base=4),
    "window vote": WindowVote(queries=5),
    "scissorhands": Scissorhands(queries=5),
    "scissorhands newer, mean": Scissorhands(queries=40, ties="newer", votes="mean", per_query=True),
    "scissorhands release": ScissorhandsRelease(queries=5, start=0),
    "corm": Corm(queries=5),
    "keyformer": Keyformer(new_tokens=4),
    "keyformer without noise": Keyformer(tau_start=1.5, tau_end=1.5, noise=False),
    "random": RandomEviction(),
    "key norm": KeyNorm(),
}
INCREMENTAL = ("h2o", "h2o per query", "tova", "keyformer without noise", "window vote", "scissorhands",
               "scissorhands newer, mean", "scissorhands release", "corm")  # fmt: skip
"""Those that read a prompt as if its queries had come one by one."""

each = pytest.mark.parametrize("name", POLICIES)


def layer_spec(policy: Policy, **changes: Any) -> LayerSpec:
    settings: dict[str, Any] = {"kv_heads": H, "query_heads": H * J, "head_dim": D, "slots": 8, "window": 4}
    settings |= {"key_codec": Dense(), "value_codec": Dense(), "rotary": None, "rope": "none"}
    return LayerSpec(policy=policy, **(settings | changes))


def positions(lengths: tuple[int, ...], tokens: int) -> np.ndarray:
    """Rows padded on the left."""
    return np.stack([np.r_[np.full(tokens - n, -1), np.arange(n)] for n in lengths]).astype(np.int32)


def causal(seed: int, pos: np.ndarray, scale: float = 1.5) -> Attention:
    """Attention of a prompt's queries ``[B, H, J, T, T]``, by NumPy, from logits drawn for each row of the batch."""
    batch, tokens = pos.shape
    x = np.stack([np.random.default_rng((seed, b)).normal(size=(H, J, tokens, tokens)) for b in range(batch)]) * scale
    valid = ((pos[:, None, :] >= 0) & (pos[:, None, :] <= pos[:, :, None]))[:, None, None]
    x = np.where(valid, x, MASKED).astype(np.float32)
    weight = np.where(valid, np.exp(x - x.max(axis=-1, keepdims=True)), 0)
    probs = weight / np.maximum(weight.sum(axis=-1, keepdims=True), 1e-30)
    return Attention(jnp.asarray(x), jnp.asarray(probs.astype(np.float32)), jnp.asarray(valid))


def statistics(policy: Policy, seed: int, pos: np.ndarray, gqa: str = "mean") -> PrefillStatistics:
    """What a prompt's attention leaves, of which a policy must read no more than it asks for."""
    full = causal(seed, pos)
    keys = np.stack([np.random.default_rng((seed, b)).normal(size=(H, pos.shape[1], D)) for b in range(len(pos))])
    keys = jnp.asarray(keys.astype(np.float32))
    last = sums = None
    if policy.observed:
        short = max(policy.observed - pos.shape[1], 0)
        # Padded in front: queries that see nothing.
        last = Attention(
            *(jnp.pad(x, ((0, 0),) * 3 + ((short, 0), (0, 0)))[..., -policy.observed :, :] for x in full)
        )
    if policy.sums_columns:
        at = jnp.asarray(pos)
        given = policy.weigh(full.logits, full.valid, at[:, None], Queries(at, KEYS, at.max(axis=1) + 1))
        sums = {"mean": jnp.mean, "sum": jnp.sum, "max": jnp.max}[gqa](given, axis=2).sum(axis=2)
    counts = full.valid[:, 0, 0].sum(axis=1, dtype=jnp.int32)
    return PrefillStatistics(jnp.asarray(pos), keys, keys, last, sums, counts)


def row(attention: Attention, first: int, after: int) -> Attention:
    return Attention(*(x[..., first:after, :] for x in attention))


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def from_prefill(policy: Policy, spec: LayerSpec, prompt: PrefillStatistics) -> tuple[jax.Array, Any]:
    return policy.from_prefill(spec, prompt, KEYS)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def _observe(
    policy: Policy, spec: LayerSpec, state: Any, attention: Attention, pos: jax.Array, asks: jax.Array
) -> Any:
    shown = jnp.broadcast_to(pos[:, None], (pos.shape[0], spec.head_pos, pos.shape[1]))
    return policy.observe(spec, state, attention, shown, Queries(asks, KEYS, jnp.zeros(B, jnp.int32)))


def observe(policy: Policy, spec: LayerSpec, state: Any, attention: Attention, pos: np.ndarray, step: int) -> Any:
    """The queries stand at ``step`` and after it, in rows without a prompt."""
    asks = step + jnp.arange(attention.logits.shape[3], dtype=jnp.int32)
    return _observe(policy, spec, state, attention, jnp.asarray(pos), jnp.broadcast_to(asks, (B, asks.size)))


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def decide(policy: Policy, spec: LayerSpec, state: Any, pos: jax.Array, now: jax.Array) -> Any:
    shown = jnp.broadcast_to(pos[:, None], (pos.shape[0], spec.head_pos, pos.shape[1]))
    scores = policy.score(spec, state, shown, now, KEYS)
    return scores, *(f(spec, state, shown, now) for f in (policy.expire, policy.admit))


@each
def test_is_static_and_its_state_has_an_entry_a_slot(name):
    policy = POLICIES[name]
    assert hash(policy) == hash(dataclasses.replace(policy))  # pyright: ignore[reportArgumentType]
    spec = layer_spec(policy)
    state = policy.init(spec, B)
    assert spec.head_pos == (1 if name in ("streaming", "tova") else H)
    for leaf in state.values():
        assert leaf.shape[:3] == (B, spec.head_pos, spec.capacity)
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[:1, :1, :1], leaf.shape))
    assert policy.bulk(spec) <= spec.slots


@each
@pytest.mark.parametrize(("lengths", "tokens"), [((12, 7, 0), 12), ((2, 1, 0), 2)])
def test_scores_and_states_of_a_prompt_are_numbers(name, lengths, tokens):
    """Prompts of one token, shorter than the window or the queries observed, or of padding alone."""
    policy = POLICIES[name]
    spec = layer_spec(policy)
    empty = policy.init(spec, B)
    pos = positions(lengths, tokens)
    scores, state = from_prefill(policy, spec, statistics(policy, 1, pos))
    assert scores.shape == (B, spec.head_pos, tokens)
    assert scores.dtype == jnp.float32
    assert not np.isnan(scores).any()
    assert not (np.asarray(scores) == -np.inf).any()
    assert state.keys() == empty.keys()
    for leaf_name, fresh in empty.items():
        leaf = state[leaf_name]
        assert (leaf.shape, leaf.dtype) == ((B, spec.head_pos, tokens, *fresh.shape[3:]), fresh.dtype)
        assert not np.isnan(leaf).any()


@each
def test_observing_keeps_the_shapes_and_scores_are_numbers(name):
    policy = POLICIES[name]
    spec = layer_spec(policy)
    state = fresh = policy.init(spec, B)
    pos = positions((12, 7, 0), T)
    attention = causal(2, pos)
    for step in range(3):
        state = observe(policy, spec, state, row(attention, T - 3 + step, T - 2 + step), pos, step)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), fresh)
    scores, *marked = decide(policy, spec, state, jnp.asarray(pos), jnp.asarray([12, 7, 0], jnp.int32))
    assert (scores.shape, scores.dtype) == ((B, spec.head_pos, T), jnp.float32)
    assert not np.isnan(scores).any()
    for marks in marked:
        assert marks is None or (marks.shape == scores.shape and marks.dtype == bool)


@pytest.mark.parametrize(
    ("name", "gqa"),
    [*((name, "mean") for name in INCREMENTAL), ("h2o", "max"), ("h2o", "sum"), ("h2o per query", "max")],
)
def test_a_prompt_is_its_queries_one_by_one(name, gqa):
    """The state after a prompt is that after observing its rows, in a cache that has a slot for every token."""
    policy = POLICIES[name]
    spec = layer_spec(policy, gqa=gqa)
    pos = positions((12, 7, 3), T)
    attention = causal(3, pos)
    _, read = from_prefill(policy, spec, statistics(policy, 3, pos, gqa))
    seen = policy.init(spec, B)
    for t in range(T):
        seen = observe(policy, spec, seen, row(attention, t, t + 1), pos, t)
    at_once = observe(policy, spec, policy.init(spec, B), attention, pos, 0)
    if isinstance(policy, WindowVote):
        # Rings may be turned: the prompt begins with its last w queries, the loop with its first.
        for other in (seen, at_once):
            np.testing.assert_array_equal(count_votes(read), count_votes(other))
            np.testing.assert_array_equal(count_queries(read, policy.queries), count_queries(other, policy.queries))
        jax.tree.map(np.testing.assert_array_equal, seen, at_once)
        return
    for leaf in read:
        np.testing.assert_allclose(read[leaf], seen[leaf], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(read[leaf], at_once[leaf], rtol=1e-5, atol=1e-6)


@each
def test_rows_of_a_batch_are_independent(name):
    """Another neighbour changes no bit of a row: nothing is summed over the batch."""
    policy = POLICIES[name]
    spec = layer_spec(policy)

    def scores(seed: int) -> np.ndarray:
        """Of row 0, beside neighbours drawn from another seed."""
        own, other = positions((12, 7, 3), T), positions((12, 2 + seed, 9 + seed), T)

        def splice(a: jax.Array | None, b: jax.Array | None) -> Any:
            return None if a is None or b is None else jnp.concatenate([a[:1], b[1:]])

        pos = np.concatenate([own[:1], other[1:]])
        prompt = jax.tree.map(splice, statistics(policy, 4, own), statistics(policy, 40 + seed, other))
        first, state = from_prefill(policy, spec, prompt)
        attention = jax.tree.map(splice, causal(5, own), causal(50 + seed, other))
        state = observe(policy, spec, state, row(attention, T - 1, T), pos, 0)
        now = jnp.asarray(pos.max(axis=1) + 1)
        after = decide(policy, spec, state, jnp.asarray(pos), now)[0]
        return np.stack([first[0], after[0]])

    np.testing.assert_array_equal(scores(0), scores(1))


@each
def test_the_same_key_gives_the_same_scores(name):
    policy = POLICIES[name]
    spec = layer_spec(policy)
    pos = positions((12, 7, 3), T)

    def scores() -> tuple[jax.Array, Any]:
        first, state = from_prefill(policy, spec, statistics(policy, 6, pos))
        return first, observe(policy, spec, state, row(causal(7, pos), T - 1, T), pos, 3)

    jax.tree.map(np.testing.assert_array_equal, scores(), scores())


@pytest.mark.parametrize("gqa", ["mean", "sum", "max"])
def test_query_heads_are_summed_up_as_the_layer_asks(gqa):
    """Against a loop over rows, heads and queries."""
    pos = positions((12, 7, 3), T)
    attention = causal(8, pos)
    probs = np.asarray(attention.probs, np.float64)
    how = {"mean": np.mean, "sum": np.sum, "max": np.max}[gqa]
    sums = np.zeros((B, H, T))
    for b, h, q, j in np.ndindex(B, H, T, T):
        sums[b, h, j] += how([probs[b, h, g, q, j] for g in range(J)])
    spec = layer_spec(HeavyHitters(), gqa=gqa)
    state = observe(spec.policy, spec, spec.policy.init(spec, B), attention, pos, 0)
    np.testing.assert_allclose(state["sum"], sums, rtol=1e-5, atol=1e-6)

    policy = SnapKV(queries=2, kernel=1)
    spec = layer_spec(policy, gqa=gqa)
    frozen, _ = policy.from_prefill(spec, statistics(policy, 8, pos), KEYS)
    expected = how(probs[:, :, :, -2:].sum(axis=3), axis=2)
    np.testing.assert_allclose(frozen[:, :, :-2], np.where(pos[:, None, :-2] < 0, 0, expected[..., :-2]), rtol=1e-5)
    assert (frozen[:, :, -2:] > expected.max()).all()


def test_normalised_sums_are_means_over_the_queries_that_saw_the_key():
    pos = positions((12, 7, 3), T)
    attention = causal(9, pos)
    policy = HeavyHitters(normalise=True)
    spec = layer_spec(policy)
    scores, _ = policy.from_prefill(spec, statistics(policy, 9, pos), KEYS)
    probs, valid = np.asarray(attention.probs).mean(axis=2), np.asarray(attention.valid)
    for b, h, j in np.ndindex(B, H, T):
        rows = [probs[b, h, q, j] for q in range(T) if valid[b, 0, 0, q, j]]
        assert scores[b, h, j] == pytest.approx(np.mean(rows) if rows else 0.0, rel=1e-5)


def test_all_scores_ever_handed_out_by_h2o_add_up_to_the_queries():
    pos = positions((12, 7, 3), T)
    scores, _ = HeavyHitters().from_prefill(layer_spec(HeavyHitters()), statistics(HeavyHitters(), 10, pos), KEYS)
    np.testing.assert_allclose(scores.sum(axis=-1), np.repeat([[12.0], [7.0], [3.0]], H, axis=1), rtol=1e-5)


def test_tova_takes_one_decision_by_the_mean_over_all_heads_of_the_last_query():
    pos = positions((12, 7, 3), T)
    attention = causal(11, pos)
    policy = TOVA()
    spec = layer_spec(policy)
    state = observe(policy, spec, policy.init(spec, B), row(attention, T - 1, T), pos, 0)
    expected = np.asarray(attention.probs)[:, :, :, -1].reshape(B, H * J, T).mean(axis=1)
    np.testing.assert_allclose(state["last"][:, 0], expected, rtol=1e-5)
    scores = policy.score(spec, state, jnp.asarray(pos)[:, None], jnp.asarray([12, 7, 3]))
    for b, length in enumerate((12, 7, 3)):
        np.testing.assert_array_equal(np.argsort(scores[b, 0, -length:]), np.argsort(expected[b, -length:]))


def test_under_uniform_attention_tova_drops_the_oldest_wherever_it_lies():
    policy = TOVA()
    spec = layer_spec(policy, slots=5, window=1)
    pos = jnp.asarray([[[7, 3, 9, 4, 6, 10]]], jnp.int32)
    state = {"last": jnp.full((1, 1, 6), 1 / 6)}
    scores = policy.score(spec, state, pos, jnp.asarray([11]))
    np.testing.assert_array_equal(np.argsort(scores[0, 0]), np.argsort(pos[0, 0]))


def test_a_chunk_with_padding_leaves_tova_the_last_query_that_saw_anything():
    pos = positions((12, 7, 3), T)
    attention = causal(12, pos)
    valid = attention.valid & (jnp.arange(T)[:, None] < jnp.asarray([12, 9, 0])[:, None, None, None, None])
    attention = attention._replace(valid=valid, probs=jnp.where(valid, attention.probs, 0))
    policy = TOVA()
    spec = layer_spec(policy)
    before = {"last": jnp.full((B, 1, T), 0.25)}
    after = observe(policy, spec, before, attention, pos, 0)["last"]
    for b, query in ((0, 11), (1, 8)):
        np.testing.assert_allclose(after[b, 0], attention.probs[b, :, :, query].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(after[2], before["last"][2])


def test_streaming_orders_by_age_at_positions_that_float32_cannot_tell_apart():
    pos = jnp.asarray([[[2**30 + 3, 2**30, 2**30 + 2, 2**30 + 1]]], jnp.int32)
    scores = Streaming().score(layer_spec(Streaming()), {}, pos, jnp.asarray([2**30 + 4]))
    np.testing.assert_array_equal(scores[0, 0], [-1, -4, -2, -3])


@pytest.mark.parametrize("leaves", ["older", "newer"])
def test_ties_are_broken_by_age(leaves):
    rng = np.random.default_rng(0)
    score, pos = rng.integers(0, 4, 50), rng.permutation(50).astype(np.int32)
    ranks = break_ties(jnp.asarray(score), jnp.asarray(pos), leaves)
    order = sorted(range(50), key=lambda i: (score[i], pos[i] if leaves == "older" else -pos[i]))
    np.testing.assert_array_equal(np.argsort(ranks), order)
    np.testing.assert_array_equal(np.sort(ranks), np.arange(50))


def test_random_draws_are_uniform_and_those_of_the_row_head_and_position():
    """They cost no state, and it is nothing to them in which slot, beside which tokens and rows, and when."""
    policy, tokens = RandomEviction(), 2000
    spec = layer_spec(policy, slots=tokens, window=0)
    assert not policy.init(spec, B)
    pos = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (B, H, tokens))
    draws = np.asarray(policy.score(spec, {}, pos, jnp.full(B, tokens), KEYS))
    assert ((draws > 0) & (draws < 1)).all()
    assert np.unique(draws).size > 0.99 * draws.size
    # A uniform mean has the variance 1 / 12 n, its square's mean 4 / 45 n; draws of heads and rows are uncorrelated.
    assert abs(draws.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / draws.size)
    assert abs((draws**2).mean() - 1 / 3) < 4 * np.sqrt(4 / 45 / draws.size)
    lines = draws.reshape(B * H, tokens)
    np.testing.assert_array_less(np.abs(np.corrcoef(lines)[np.triu_indices(B * H, 1)]), 4 / np.sqrt(tokens))
    # Of another order, of one row alone, of a prompt with padding.
    order = np.random.default_rng(0).permutation(tokens)
    alone = policy.score(spec, {}, pos[1:2, :, order], jnp.full(1, 9), KEYS[1:2])
    np.testing.assert_array_equal(alone, draws[1:2, :, order])
    prompt = statistics(policy, 1, positions((12, 7, 3), T))
    scores, _ = policy.from_prefill(spec, prompt, KEYS)
    for b, length in enumerate((12, 7, 3)):
        np.testing.assert_array_equal(scores[b, :, T - length :], draws[b, :, :length])
    with pytest.raises(ValueError, match="key is None; random eviction draws by the keys"):
        policy.score(spec, {}, pos, jnp.full(B, 9))


@pytest.mark.parametrize("keep", ["low", "high"])
def test_key_norm_keeps_low_or_high_norms(keep):
    policy = KeyNorm(keep=keep)
    prompt = statistics(policy, 13, positions((12, 7, 3), T))
    scores, state = policy.from_prefill(layer_spec(policy), prompt, KEYS)
    norms = np.sqrt((np.asarray(prompt.keys, np.float64) ** 2).sum(axis=-1))
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(norms if keep == "high" else -norms))
    np.testing.assert_array_equal(state["norm"], policy.enter(layer_spec(policy), prompt.keys)["norm"])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SnapKV, {"queries": 0}, "queries is 0; at least 1"),
        (SnapKV, {"kernel": 4}, "kernel is 4; it must be odd"),
        (SnapKV, {"pooling": "sum"}, "pooling is 'sum'; it must be 'avg' or 'max'"),
        (AdaKV, {"base": 0}, "base is 0; it must be at least 1"),
        (AdaKV, {"base": 1, "floor": 1.5}, "floor is 1.5; it must be between 0 and 1"),
        (AdaKV, {"base": 9}, "slots is 8; it must be at least base, 9"),
        (WindowVote, {"queries": 0}, "queries is 0; it must be between 1 and 32768"),
        (Corm, {"queries": 2**15 + 1}, "queries is 32769; it must be between 1 and 32768"),
        (Corm, {"votes": "max"}, "votes is 'max'; it must be 'any' or 'mean'"),
        (Scissorhands, {"drop": 0}, "drop is 0; it must be at least 1"),
        (Scissorhands, {"ties": "first"}, "ties is 'first'; it must be 'older' or 'newer'"),
        (Scissorhands, {"drop": 9}, "drop is 9; it must be at most slots, 8"),
        (ScissorhandsRelease, {"quantile": 1}, r"quantile is 1; it must be in \[0, 1\)"),
        (ScissorhandsRelease, {"start": -1}, "start is -1; it must be at least 0"),
        (Keyformer, {"tau_start": 0}, "tau_start is 0; a temperature is positive"),
        (Keyformer, {"tau_end": float("inf")}, "tau_end is inf; a temperature is positive and finite"),
        (Keyformer, {"new_tokens": 0}, "new_tokens is 0; it must be at least 1"),
        (KeyNorm, {"keep": "middle"}, "keep is 'middle'; it must be 'low' or 'high'"),
    ],
)
def test_bad_options_are_named(monkeypatch, kind: Any, options, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its own check of a Literal comes first
    with pytest.raises(ValueError, match=message):
        layer_spec(kind(**options))
