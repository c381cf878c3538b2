"""Policies at work: what each keeps at every step, against lists of rows and loops over tokens."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.kvcache.ada_kv import AdaKV
from hashml.kvcache.attending import attend, observe
from hashml.kvcache.contract import Policy, Queries
from hashml.kvcache.controls import RandomEviction
from hashml.kvcache.corm import Corm
from hashml.kvcache.dense import Dense
from hashml.kvcache.engine import cache_engine
from hashml.kvcache.eviction import append, evict
from hashml.kvcache.full import KeepAll
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.integer import IntGroup
from hashml.kvcache.keyformer import Keyformer
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.prefill import prefill_layer
from hashml.kvcache.scissorhands import Scissorhands, ScissorhandsRelease
from hashml.kvcache.snap_kv import SnapKV
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerTables, all_positions
from hashml.kvcache.streaming import Streaming
from hashml.kvcache.tova import TOVA
from hashml.models.decoder import DecoderConfig, decoder_model

H, J, D, STEPS = 2, 2, 4, 26
PROMPTS = (14, 3)
"""Lengths of the rows' prompts: one that overflows most caches, one shorter than most windows."""
QUICK = {"xla_backend_optimization_level": 0}
"""What is compiled here runs once."""


def layer_spec(policy: Policy, **changes: Any) -> LayerSpec:
    settings: dict[str, Any] = {"kv_heads": H, "query_heads": H * J, "head_dim": D, "slots": 7, "window": 4}
    settings |= {"key_codec": Dense(), "value_codec": Dense(), "rotary": None, "rope": "none"}
    return LayerSpec(policy=policy, **(settings | changes))


@functools.cache
def stream(batch: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values at all positions; neighbouring queries are alike, so that importance persists."""
    rng = np.random.default_rng(seed)
    total = max(PROMPTS) + STEPS
    q = rng.normal(size=(batch, H * J, total, D))
    for t in range(1, total):
        q[:, :, t] = 0.8 * q[:, :, t - 1] + 0.6 * q[:, :, t]
    k, v = rng.normal(size=(2, batch, H, total, D))
    return (2 * q).astype(np.float32), (1.5 * k).astype(np.float32), v.astype(np.float32)


MODEL = decoder_model(DecoderConfig(vocabulary=2, features=2, layers=1, heads=1, kv_heads=1, head_dim=2, hidden=2))


class Run(NamedTuple):
    """Positions ``[steps, B, P, C + R]`` and outputs ``[steps, B, Hq, D]`` of every decode step."""

    pos: np.ndarray
    out: np.ndarray
    first: np.ndarray
    """Positions after the prompt."""


def decode(
    spec: LayerSpec, *, batch: int = 2, seed: int = 0, steps: int = STEPS, prompts: tuple[int, ...] = PROMPTS
) -> Run:
    """The framework's steps, compiled as one program; ``prompts`` are lengths of rows, none above the longest."""
    q, k, v = stream(batch, seed)
    lengths = np.resize(prompts, batch)
    # Padded in front.
    width = max(prompts)
    place = np.arange(width)[None] - (width - lengths)[:, None]
    prompt = [np.take_along_axis(x, np.maximum(place, 0)[:, None, :, None], axis=2) for x in (q, k, v)]
    after = lengths[:, None] + np.arange(steps)
    later = [np.take_along_axis(x, after[:, None, :, None], axis=2) for x in (q, k, v)]
    keys = jax.random.split(jax.random.key(seed), batch)

    born = jnp.asarray(lengths, jnp.int32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def all_steps(prompt: list[jax.Array], later: list[jax.Array]) -> Any:
        q, k, v = prompt
        layer = prefill_layer(spec, LayerTables(), q, k, v, jnp.asarray(np.maximum(place, -1), jnp.int32), keys)

        def step(carry: Any, x: Any) -> Any:
            layer, t, now = carry
            q1, k1, v1 = x
            head = t % spec.window if spec.window else t
            layer = evict(spec, LayerTables(), layer, head, now, keys)
            layer = append(spec, LayerTables(), layer, head, k1[:, :, None], v1[:, :, None], now[:, None], now, keys)
            out, attention = attend(spec, LayerTables(), layer, q1[:, :, None], now[:, None])
            layer = observe(spec, layer, attention, Queries(now[:, None], keys, born))
            return (layer, t + 1, now + 1), (all_positions(spec, layer), out[:, :, 0])

        start = layer, jnp.asarray(0, jnp.int32), jnp.asarray(lengths, jnp.int32)
        _, (pos, out) = jax.lax.scan(step, start, [jnp.moveaxis(x, 2, 0) for x in later])
        return pos, out, all_positions(spec, layer)

    return Run(*(np.asarray(x) for x in all_steps([jnp.asarray(x) for x in prompt], [jnp.asarray(x) for x in later])))


class Row(NamedTuple):
    """What one query gave the keys it saw: ``logits`` and ``probs [J]`` of each position."""

    logits: dict[int, np.ndarray]
    probs: dict[int, np.ndarray]


Rows = list[list[Row]]
"""Of each head, all queries so far."""


def look(q: np.ndarray, k: np.ndarray, positions: list[int]) -> Row:
    """One head: queries ``[J, D]`` on the keys ``[T, D]`` at these positions."""
    x = np.stack([q @ k[p] for p in positions], axis=-1).astype(np.float64) / math.sqrt(D)
    weight = np.exp(x - x.max(axis=-1, keepdims=True))
    probs = weight / weight.sum(axis=-1, keepdims=True)
    return Row(*({p: a[:, i] for i, p in enumerate(positions)} for a in (x, probs)))


Score = Callable[[Rows, int, int, int], tuple]
"""``rows, head, position, prompt's length`` to what is compared: the least leaves."""


def naive(
    spec: LayerSpec, score: Score, expired: Callable[[Rows, int, int, int, int], bool] | None = None, row: int = 0
) -> tuple[list[list[set[int]]], np.ndarray]:
    """Kept positions of every step and head, and outputs ``[steps, Hq, D]``, of one row of the batch."""
    q, k, v = (x[row] for x in stream())
    q, length = q.reshape(H, J, -1, D), PROMPTS[row]
    shared = spec.head_pos == 1
    rows: Rows = [[look(q[h, :, t], k[h], list(range(t + 1))) for t in range(length)] for h in range(H)]
    window = list(range(max(length - spec.window, 0), length))

    def rank(h: int, p: int) -> tuple:
        return (p < spec.sinks, *score(rows, h, p, length))

    main = [sorted(range(length - len(window)), key=lambda p: rank(h, p))[::-1][: spec.slots] for h in range(H)]
    kept, outputs = [], []
    for step in range(STEPS):
        now = length + step
        if step % spec.flush == 0:
            leaving = window[: max(len(window) - (spec.window - spec.flush), 0)]
            window = window[len(leaving) :]
            for h in range(H):
                candidates = list(leaving)
                if expired is not None:
                    dead = {p for p in main[h] + candidates if expired(rows, h, p, length, now) and p >= spec.sinks}
                    main[h], candidates = ([p for p in x if p not in dead] for x in (main[h], candidates))
                bulk, empty = spec.policy.bulk(spec), spec.slots - len(main[h])
                if bulk > spec.flush and empty < spec.flush:
                    freed = sorted(main[h], key=lambda p: rank(h, p))[: bulk - empty]
                    main[h] = [p for p in main[h] if p not in freed or p < spec.sinks]
                # Between equals a main slot leaves before a candidate: candidates are newer, and scores know ages.
                both = sorted(main[h] + candidates, key=lambda p: rank(h, p))
                main[h] = both[max(len(both) - spec.slots, 0) :]
        window.append(now)
        seen = [sorted(main[h] + window) for h in range(H)]
        for h in range(H):
            rows[h].append(look(q[h, :, now], k[h], seen[h]))
        kept.append([set(seen[h]) for h in range(1 if shared else H)])
        outputs.append([sum(rows[h][-1].probs[p][j] * v[h, p] for p in seen[h]) for h in range(H) for j in range(J)])
    return kept, np.asarray(outputs)


def column(rows: Rows, h: int, p: int, queries: int | None = None) -> list[Row]:
    """The last queries of a head that saw a position."""
    seen = [r for r in rows[h] if p in r.probs]
    return seen if queries is None else seen[-queries:]


def votes_of(rows: Rows, h: int, p: int, queries: int, votes: str = "any") -> list[bool]:
    heads = {"any": np.max, "mean": np.mean}[votes]
    return [bool(heads(r.probs[p]) >= 1 / len(r.probs)) for r in column(rows, h, p, queries)]


def vote_count(queries: int, votes: str = "any") -> Score:
    return lambda rows, h, p, length: (sum(votes_of(rows, h, p, queries, votes)), p)


def low_count(queries: int, ties: int = 1, per_query: bool = False) -> Score:
    def score(rows: Rows, h: int, p: int, length: int) -> tuple:
        votes = votes_of(rows, h, p, queries)
        low = len(votes) - sum(votes)
        return (-low / len(votes) if per_query else -low, ties * p)

    return score


def minor(queries: int) -> Callable[[Rows, int, int, int, int], bool]:
    def expired(rows: Rows, h: int, p: int, length: int, now: int) -> bool:
        votes = votes_of(rows, h, p, queries)
        return len(votes) == queries and not any(votes)

    return expired


def above(quantile: float, queries: int) -> Callable[[Rows, int, int], list[bool]]:
    def votes(rows: Rows, h: int, p: int) -> list[bool]:
        found = []
        for r in column(rows, h, p, queries):
            table = np.stack(list(r.probs.values()), axis=-1)
            found.append(bool((r.probs[p] > np.quantile(table, quantile, axis=-1)).any()))
        return found

    return votes


def keyformer_sum(start: float, end: float, tokens: int) -> Score:
    def score(rows: Rows, h: int, p: int, length: int) -> tuple:
        total = 0.0
        for t, r in enumerate(rows[h]):
            if p in r.logits:
                tau = start + (end - start) * min(max(t - length + 1, 0), tokens) / tokens
                table = np.exp(np.stack(list(r.logits.values()), axis=-1) / tau)
                total += float((np.exp(r.logits[p] / tau) / table.sum(axis=-1)).mean())
        return (total,)

    return score


def frozen(queries: int) -> Score:
    """Kernel 1. Later tokens, and the prompt's last, are above all, by age."""

    def score(rows: Rows, h: int, p: int, length: int) -> tuple:
        if p >= length - queries:
            return (math.inf, p)
        return (sum(float(r.probs[p].mean()) for r in rows[h][length - queries : length] if p in r.probs), 0)

    return score


def mean_over_queries(rows: Rows, h: int, p: int, length: int) -> tuple:
    return (np.mean([r.probs[p].mean() for r in column(rows, h, p)]),)


CASES: dict[str, tuple[LayerSpec, Score, Any]] = {
    "streaming": (layer_spec(Streaming(), slots=3, sinks=3), lambda rows, h, p, length: (p,), None),
    "window": (layer_spec(Streaming(), slots=0, window=8), lambda rows, h, p, length: (p,), None),
    "h2o": (
        layer_spec(HeavyHitters(), sinks=1),
        lambda rows, h, p, length: (sum(r.probs[p].mean() for r in column(rows, h, p)),),
        None,
    ),
    "h2o per query, flush": (layer_spec(HeavyHitters(normalise=True), slots=9, flush=2), mean_over_queries, None),
    "tova": (
        layer_spec(TOVA(), window=1),
        lambda rows, h, p, length: (np.mean([r[-1].probs[p].mean() for r in rows]), p),
        None,
    ),
    "snapkv": (layer_spec(SnapKV(queries=4, kernel=1)), frozen(4), None),
    "scissorhands": (layer_spec(Scissorhands(queries=6, drop=1)), low_count(6), None),
    "scissorhands, half at once": (layer_spec(Scissorhands(queries=6)), low_count(6), None),
    "scissorhands, newer, per query": (
        layer_spec(Scissorhands(queries=40, ties="newer", per_query=True, drop=3), sinks=1, flush=2),
        low_count(40, -1, True),
        None,
    ),
    "release": (
        layer_spec(ScissorhandsRelease(queries=3, quantile=0.8, start=16), slots=20),
        lambda rows, h, p, length: (sum(above(0.8, 3)(rows, h, p)), p),
        lambda rows, h, p, length, now: now >= 16 and not any(above(0.8, 3)(rows, h, p)),
    ),
    "corm": (layer_spec(Corm(queries=5), slots=30), vote_count(5), minor(5)),
    "corm at its cap, flush": (layer_spec(Corm(queries=5), slots=5, sinks=1, flush=2), vote_count(5), minor(5)),
    "corm without a window": (layer_spec(Corm(queries=5), slots=40, window=0), vote_count(5), minor(5)),
    "corm budgeted": (layer_spec(Corm(queries=35, budgeted=True)), vote_count(35), None),
    "keyformer without noise": (
        layer_spec(Keyformer(tau_start=0.8, tau_end=3, new_tokens=20, noise=False)),
        keyformer_sum(0.8, 3, 20),
        None,
    ),
}


@functools.cache
def run(name: str) -> Run:
    return decode(CASES[name][0])


def kept_at(run: Run, step: int, row: int, head: int) -> list[int]:
    line = run.pos[step, row, head]
    return sorted(line[line >= 0].tolist())


@pytest.mark.parametrize("name", CASES)
def test_decisions_and_outputs_are_those_of_a_loop(name):
    spec, score, expired = CASES[name]
    found = run(name)
    dropped = 0
    for row in range(2):
        kept, outputs = naive(spec, score, expired, row)
        for step, h in np.ndindex(STEPS, spec.head_pos):
            assert kept_at(found, step, row, h) == sorted(kept[step][h]), (row, step, h)
        np.testing.assert_allclose(found.out[:, row], outputs, rtol=1e-4, atol=1e-5)
        dropped += PROMPTS[row] + STEPS - len(kept[-1][0])
    assert dropped > 20, "the case must drop something"


@pytest.mark.parametrize("name", CASES)
def test_recents_and_sinks_are_there_and_nothing_returns(name):
    spec = CASES[name][0]
    found = run(name)
    recents = max(spec.window - spec.flush + 1, 1)
    for row, h in np.ndindex(2, spec.head_pos):
        before = set(found.first[row, h].tolist()) - {-1}
        for step in range(STEPS):
            now = PROMPTS[row] + step
            tokens = kept_at(found, step, row, h)
            assert len(set(tokens)) == len(tokens) <= spec.capacity
            assert set(range(max(now - recents + 1, 0), now + 1)) <= set(tokens)
            assert set(range(min(spec.sinks, now))) <= set(tokens)
            assert set(tokens) <= before | {now}
            before = set(tokens)


def test_streaming_is_its_sinks_and_a_window():
    found = run("streaming")
    for row, step in np.ndindex(2, STEPS):
        now = PROMPTS[row] + step
        expected = set(range(min(3, now + 1))) | set(range(max(now - 3, 0), now + 1))
        assert set(kept_at(found, step, row, 0)) == expected


@pytest.mark.parametrize(("name", "drop"), [("scissorhands", 1), ("scissorhands, half at once", 5)])
def test_scissorhands_holds_between_b_less_m_and_b(name, drop):
    """B = 11 tokens; once full, m of them leave at a time and the count saws between."""
    found, budget = run(name), 11
    sizes = (found.pos >= 0).sum(axis=-1)
    for row, h in np.ndindex(2, H):
        line = sizes[:, row, h]
        full = np.flatnonzero(line == budget)
        assert full.size
        assert line.max() == budget
        assert line[full[0] :].min() == (budget if drop == 1 else budget - drop + 1)


BLOCKS: dict[str, Any] = {"key_codec": KiviKeys(2, 4), "value_codec": IntGroup(2, 4), "flush": 4, "slots": 16}
"""Codes of four tokens share a scale."""


def test_scissorhands_frees_whole_blocks_where_slots_share_scales():
    """Four blocks of main slots: at the flush that finds them full two are freed, m = 8 slots, and one is filled."""
    pos = decode(layer_spec(Scissorhands(queries=6, drop=8), **BLOCKS)).pos[..., :16]
    held = (pos.reshape(*pos.shape[:-1], 4, 4) >= 0).sum(axis=-1)
    for row, h in np.ndindex(2, H):
        blocks = (held[:, row, h] > 0).sum(axis=-1)
        full = np.flatnonzero(blocks == 4)[0]
        np.testing.assert_array_equal(blocks[full:], np.resize(np.repeat([4, 3], 4), STEPS - full))
        # A prompt's last block may have holes; no other has.
        assert (np.sort(held[-1, row, h])[1:] == 4).all()


@pytest.mark.parametrize(
    "codecs", [BLOCKS, BLOCKS | {"key_codec": Dense(), "value_codec": Dense()}], ids=["kivi", "dense"]
)
def test_all_is_kept_as_long_as_the_layer_says_whatever_the_prompts_length(codecs):
    """A window that is emptied four at a time and a block with holes cost three tokens, and no fewer."""
    spec = layer_spec(KeepAll(), **codecs)
    assert spec.holds == 16 + 4 - 3
    prompts = tuple(range(1, 15))
    pos = decode(spec, batch=14, prompts=prompts, steps=18).pos[:, :, 0]
    lost = 0
    for row, length in enumerate(prompts):
        line = pos[spec.holds - length - 1, row]
        np.testing.assert_array_equal(np.sort(line[line >= 0]), np.arange(spec.holds))
        lost += int((pos[spec.holds - length, row] >= 0).sum() <= spec.holds)
    assert lost > 0, "the bound is not tight"
    assert layer_spec(KeepAll(), window=0).holds == 7
    with pytest.raises(ValueError, match="capacity is 18; .* keeps all of at most 17 tokens"):
        cache_engine(MODEL, [spec], capacity=18)


def test_sinks_lie_in_the_first_slots_also_of_a_row_whose_window_is_not_full():
    """Three tokens of a prompt leave a window of four at once, with a hole before them."""
    pos = decode(layer_spec(HeavyHitters(), slots=8, flush=4, sinks=2)).pos
    for row in range(2):
        np.testing.assert_array_equal(pos[-1, row, :, :2], [[0, 1]] * H)


def test_corm_follows_the_attention_and_differs_by_head():
    sizes = (run("corm").pos >= 0).sum(axis=-1)
    assert (sizes[-1] < 30).all()
    assert (sizes[:, :, 0] != sizes[:, :, 1]).any()


FULL: dict[str, Policy] = {
    "keyformer": Keyformer(new_tokens=STEPS),
    "scissorhands": Scissorhands(queries=8),
    "release": ScissorhandsRelease(queries=64, quantile=0, start=0),
    "corm": Corm(queries=64),
}


@functools.cache
def full_attention() -> np.ndarray:
    """Outputs ``[steps, B, Hq, D]`` of causal attention over everything."""
    q, k, v = (x.astype(np.float64) for x in stream())
    out = np.zeros((STEPS, 2, H * J, D))
    for step, b, head in np.ndindex(STEPS, 2, H * J):
        now = PROMPTS[b] + step
        x = k[b, head // J, : now + 1] @ q[b, head, now] / math.sqrt(D)
        weight = np.exp(x - x.max())
        out[step, b, head] = weight @ v[b, head // J, : now + 1] / weight.sum()
    return out


@pytest.mark.parametrize("name", FULL)
def test_with_room_for_all_the_output_is_that_of_the_full_cache(name):
    """So is CORM's and the release's, which have no budget, where their window of votes is longer than the text."""
    found = decode(layer_spec(FULL[name], slots=36))
    np.testing.assert_allclose(found.out, full_attention(), rtol=1e-4, atol=1e-5)


def test_a_floor_of_one_is_snapkv_and_smaller_floors_keep_within_caps():
    same = decode(layer_spec(AdaKV(queries=4, kernel=3, base=7, floor=1)))
    plain = decode(layer_spec(SnapKV(queries=4, kernel=3)))
    np.testing.assert_array_equal(np.sort(same.pos[..., :7]), np.sort(plain.pos[..., :7]))
    # Ten tokens of the long prompt compete for four main slots a head on average; the short one fits.
    found = decode(layer_spec(AdaKV(queries=4, kernel=3, base=4, floor=0)))
    sizes = (found.pos[..., :7] >= 0).sum(axis=-1)
    assert (sizes[-1].sum(axis=-1) == 8).all()
    assert (sizes.max(axis=0) == sizes[-1]).all()
    assert (sizes[-1, 0] != 4).any(), "the case does not occur"
    assert (sizes[-1, 1] == 4).all()


def test_later_tokens_have_slots_of_their_own_in_adakv():
    """A prompt's tokens stay until as many tokens as ``later`` says have come, and leave one by one after that."""
    later, window = 5, 4
    found = decode(layer_spec(AdaKV(queries=4, kernel=3, base=2, floor=0, later=later), slots=12))
    for row in range(2):
        before = max(0, PROMPTS[row] - window)  # what was no window's at first
        room = later + (0 if before else 2)  # the short prompt leaves its budget, too
        for head in range(H):
            first = {p for p in found.first[row, head, :12] if p >= 0}
            for step in range(STEPS):
                main = {p for p in found.pos[step, row, head, :12] if p >= 0}
                came = max(0, PROMPTS[row] + step + 1 - window) - before  # have left the window since
                lost = len(first - main)
                assert lost == min(len(first), max(0, came - room))
                assert len(main) == len(first) + min(came, room)
        assert sum((found.first[row, h, :12] >= 0).sum() for h in range(H)) == min(2 * H, before * H)


def test_random_eviction_keeps_a_uniform_sample_of_the_past():
    """Every token that has left the window is kept with the same chance, in standard errors over 120 heads."""
    batch = 60
    found = decode(layer_spec(RandomEviction()), batch=batch, seed=1)
    for row in range(2):
        past = PROMPTS[row] + STEPS - 4
        lines = found.pos[-1, row::2, :, :7].reshape(-1, 7)
        assert (lines >= 0).all()
        heads = len(lines)
        share = np.bincount(lines.ravel(), minlength=past)[:past] / heads
        chance = 7 / past
        assert share.sum() == pytest.approx(7)
        np.testing.assert_array_less(np.abs(share - chance), 4 * math.sqrt(chance * (1 - chance) / heads))
