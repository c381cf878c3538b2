"""The interface of the cache, over every member: what must hold whatever is dropped and however it is coded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.kvcache.ada_kv import AdaKV
from hashml.kvcache.attending import attend, observe, stored_keys
from hashml.kvcache.contract import Codec, Policy, Queries
from hashml.kvcache.controls import KeyNorm, RandomEviction
from hashml.kvcache.corm import Corm
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.dense import Dense
from hashml.kvcache.eviction import append, evict
from hashml.kvcache.full import KeepAll
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.integer import Float8, Int8, IntGroup
from hashml.kvcache.keyformer import Keyformer
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.kvquant import NonUniformKeys, NonUniformValues
from hashml.kvcache.noise import row_keys
from hashml.kvcache.prefill import prefill_layer
from hashml.kvcache.scissorhands import Scissorhands, ScissorhandsRelease
from hashml.kvcache.snap_kv import SnapKV
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerTables, all_positions
from hashml.kvcache.store import view
from hashml.kvcache.streaming import Streaming
from hashml.kvcache.think import ThinK
from hashml.kvcache.tova import TOVA
from hashml.models.rotary import Rotary

HEADS, GROUP, WIDTH, PROMPT, STEPS = 2, 2, 16, 24, 16
LENGTHS = (24, 9)
"""Tokens of the two rows' prompts; the second is padded."""

POLICIES: dict[str, Policy] = {
    "streaming": Streaming(),
    "h2o": HeavyHitters(),
    "h2o-normalised": HeavyHitters(normalise=True),
    "tova": TOVA(),
    "snapkv": SnapKV(queries=4, kernel=3),
    "adakv": AdaKV(queries=4, kernel=3, base=8),
    "scissorhands": Scissorhands(queries=8, drop=4),
    "scissorhands-release": ScissorhandsRelease(queries=8, start=0),
    "keyformer": Keyformer(new_tokens=STEPS),
    "corm": Corm(queries=8),
    "corm-budgeted": Corm(queries=8, budgeted=True),
    "random": RandomEviction(),
    "key-norm": KeyNorm(),
}

CODECS: dict[str, tuple[Codec, Codec, str]] = {
    "int8": (Int8(), Int8(), "write"),
    "float8": (Float8(), Float8(), "write"),
    "int4": (IntGroup(4, 8), IntGroup(4, 8), "write"),
    "int2-raw": (IntGroup(2, 16), IntGroup(2, 16), "read"),
    "kivi2": (KiviKeys(2, 4), IntGroup(2, 8), "write"),
    "kvquant3": (NonUniformKeys(3, 1), NonUniformValues(3, 1), "read"),
    "cq-4c8b": (Coupled(4, 8), Coupled(4, 8), "read"),
    "cq-slot": (Coupled(4, 8), Coupled(4, 8), "slot"),
    "think": (ThinK(Dense(), 0.4), Dense(), "write"),
    "think-int4": (ThinK(IntGroup(4, 8), 0.5), IntGroup(4, 8), "write"),
}

BASE = LayerSpec(kv_heads=HEADS, query_heads=HEADS * GROUP, head_dim=WIDTH, slots=8, window=4, sinks=2,
                 key_codec=Dense(), value_codec=Dense(), policy=KeepAll(), rotary=Rotary(), rope="write")  # fmt: skip


def coded(name: str, **options) -> LayerSpec:
    keys, values, rope = CODECS[name]
    grain = max(keys.granularity, values.granularity)
    return dataclasses.replace(BASE, key_codec=keys, value_codec=values, rope=rope, flush=grain, **options)


MEMBERS: dict[str, LayerSpec] = {
    **{name: dataclasses.replace(BASE, policy=policy) for name, policy in POLICIES.items()},
    "no-window": dataclasses.replace(BASE, policy=HeavyHitters(), window=0, slots=12),
    "window-alone": dataclasses.replace(BASE, policy=Streaming(), slots=0, sinks=0, window=8),
    "flush4": dataclasses.replace(BASE, policy=HeavyHitters(), flush=4),
    "slot-streaming": dataclasses.replace(BASE, policy=Streaming(), rope="slot", slots=2),
    "paged-h2o": dataclasses.replace(BASE, policy=HeavyHitters(), page_size=4, pages=8),
    "paged-corm": dataclasses.replace(BASE, policy=Corm(queries=8), page_size=2, pages=16),
    **{f"{name}+keep-all": coded(name, slots=40) for name in CODECS},
    **{f"{name}+h2o": coded(name, policy=HeavyHitters()) for name in ("int4", "kivi2", "kvquant3", "cq-4c8b")},
    "think+snapkv": coded("think", policy=SnapKV(queries=4, kernel=3)),
    "int8+scissorhands": coded("int8", policy=Scissorhands(queries=8, drop=4)),
    "cq-4c8b+corm": coded("cq-4c8b", policy=Corm(queries=8)),
}


def stream(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v of both rows for the prompt and the steps, with some keys that draw attention."""
    rng = np.random.default_rng(seed)
    total = PROMPT + STEPS
    q = rng.standard_normal((2, HEADS * GROUP, total, WIDTH)).astype(np.float32) + 1
    k, v = (rng.standard_normal((2, HEADS, total, WIDTH)).astype(np.float32) for _ in range(2))
    k[:, :, ::5] += 1
    return q, k, v


def tables_of(spec: LayerSpec) -> LayerTables:
    """Learned parameters where codecs have any: drawn, since nothing here is about quality."""
    rng = np.random.default_rng(1)

    def of(codec: Codec):
        if isinstance(codec, Coupled):
            shape = (HEADS, WIDTH // codec.channels, 2**codec.bits, codec.channels)
            return {"codebook": jnp.asarray(rng.standard_normal(shape), jnp.float16)}
        if isinstance(codec, NonUniformKeys | NonUniformValues):
            table = jnp.asarray(np.linspace(-1, 1, 2**codec.bits), jnp.float32)
            edge = jnp.full((HEADS, WIDTH), 2.5, jnp.float32)
            return (
                {"low": -edge, "high": edge, "table": table}
                if isinstance(codec, NonUniformKeys)
                else {"table": table}
            )
        return None

    return LayerTables(of(spec.key_codec), of(spec.value_codec))


def positions_of(lengths: tuple[int, ...]) -> np.ndarray:
    """``[B, T]`` with the padding first."""
    pos = np.full((len(lengths), PROMPT), -1, np.int32)
    for row, length in enumerate(lengths):
        pos[row, PROMPT - length :] = np.arange(length)
    return pos


@functools.cache
def runner(name: str):
    """One program: a prompt, then ``STEPS`` tokens; returns what every step saw and gave."""
    spec, tables = MEMBERS[name], tables_of(MEMBERS[name])

    @jax.jit
    def run(q, k, v, pos, key):
        part = slice(0, PROMPT)
        keys, born = row_keys(key, 2), pos.max(axis=1) + 1
        layer = prefill_layer(spec, tables, q[:, :, part], k[:, :, part], v[:, :, part], pos, keys)

        def one(carry, x):
            layer, head, now = carry
            q1, k1, v1 = (leaf[:, :, None] for leaf in x)
            at = now[:, None]
            scores = spec.policy.score(spec, layer.policy, all_positions(spec, layer), now, keys)
            before = all_positions(spec, layer)
            layer = evict(spec, tables, layer, head, now, keys)
            layer = append(spec, tables, layer, head, stored_keys(spec, k1, at), v1, at, now, keys)
            out, attention = attend(spec, tables, layer, q1, at)
            layer = observe(spec, layer, attention, Queries(at, keys, born))
            head = (head + 1) % spec.window if spec.window else head
            seen = {"pos": all_positions(spec, layer), "out": out[:, :, 0], "scores": scores, "before": before}
            return (layer, head, now + 1), seen

        start = (layer, jnp.zeros((), jnp.int32), born)
        steps = tuple(jnp.moveaxis(x[:, :, PROMPT:], 2, 0) for x in (q, k, v))
        (layer, *_), seen = jax.lax.scan(one, start, steps)
        return layer, seen

    return run


@functools.cache
def result(name: str, seed: int = 0):
    q, k, v = stream(seed)
    return runner(name)(q, k, v, positions_of(LENGTHS), jax.random.key(0))


def kept(seen_pos: np.ndarray) -> list[int]:
    return sorted(int(p) for p in seen_pos if p >= 0)


def names(suited) -> list[str]:
    return [name for name, spec in MEMBERS.items() if suited(spec)]


every = pytest.mark.parametrize("name", MEMBERS)


@every
def test_positions_tell_of_tokens_once_and_the_newest_and_sinks_are_there(name):
    spec, (_, seen) = MEMBERS[name], result(name)
    pos = np.asarray(seen["pos"])
    for step, row in np.ndindex(STEPS, 2):
        length = LENGTHS[row] + step + 1
        for line in pos[step, row]:
            held = kept(line)
            assert len(held) == len(set(held)) <= spec.capacity
            newest = range(length - max(1, min(length, spec.window - spec.flush + 1)), length)
            assert set(newest) <= set(held)
            assert set(range(spec.sinks)) <= set(held)
            assert held[-1] == length - 1


@every
def test_a_row_does_not_see_the_others(name):
    _, seen = result(name)
    q, k, v = stream()
    other = stream(5)
    mixed = tuple(np.stack([theirs[0], own[1]]) for own, theirs in zip((q, k, v), other, strict=True))
    # The other row's prompt has another length, too.
    _, again = runner(name)(*mixed, positions_of((13, LENGTHS[1])), jax.random.key(0))
    if MEMBERS[name].pages is None:
        np.testing.assert_array_equal(seen["pos"][:, 1], again["pos"][:, 1])
    np.testing.assert_array_equal(seen["out"][:, 1], again["out"][:, 1])


@pytest.mark.parametrize("name", names(lambda spec: spec.granularity == 1))
def test_attention_is_that_of_a_full_cache_under_a_mask_of_the_same_decisions(name):
    """A naive loop: every token's key and value as they are stored, softmax over those that are kept.

    Not where the scales of a block depend on which tokens left together.
    """
    spec, (layer, seen) = MEMBERS[name], result(name)
    q, k, v = (np.asarray(x) for x in stream())
    tables, pos = tables_of(spec), np.asarray(seen["pos"])
    for row, length in enumerate(LENGTHS):
        tokens = np.r_[PROMPT - length : PROMPT, PROMPT : PROMPT + STEPS]
        own_q, own_k, own_v = (jnp.asarray(x[row : row + 1, :, tokens]) for x in (q, k, v))
        at = jnp.arange(len(tokens))[None]
        turned = own_k if spec.rope != "write" else Rotary().rotate(own_k, at[:, None])
        fixed = {n: leaf[row : row + 1] for n, leaf in layer.keys.fixed.items()}
        coded_k, coded_v = (
            np.asarray(through(codec, params, held, x))
            for codec, params, held, x in (
                (spec.key_codec, tables.keys, fixed, turned),
                (spec.value_codec, tables.values, {}, own_v),
            )
        )
        exact_k, exact_v = np.asarray(turned), np.asarray(own_v)
        for step in range(STEPS):
            now = length + step
            for head in range(HEADS * GROUP):
                key_head = head // GROUP
                line = pos[step, row, min(key_head, spec.head_pos - 1)]
                main, ring = kept(line[: spec.slots]), kept(line[spec.slots :])
                held = [*main, *ring]
                keys = np.concatenate([coded_k[0, key_head, main], exact_k[0, key_head, ring]])
                values = np.concatenate([coded_v[0, key_head, main], exact_v[0, key_head, ring]])
                asked, where = np.asarray(own_q[0, head, now]), now
                if spec.rope == "slot":
                    ranks = np.argsort(np.argsort(held))
                    keys, where = rotated(keys, ranks), len(held) - 1
                elif spec.rope == "read":
                    keys = rotated(keys, np.asarray(held))
                logits = keys @ rotated(asked[None], np.asarray([where]))[0] / np.sqrt(WIDTH)
                probs = np.exp(logits - logits.max())
                expected = probs / probs.sum() @ values
                np.testing.assert_allclose(seen["out"][step, row, head], expected, rtol=2e-4, atol=2e-5)


def through(codec, params, fixed, x):
    """What a codec gives back of tokens; channels that ThinK drops are zeros."""
    state = codec.init(1, HEADS, x.shape[2], WIDTH, jnp.float32)
    valid = jnp.ones(x.shape[:3], bool)
    state = state._replace(slots=codec.quantise(params, fixed, x, valid), fixed=fixed)
    eye = jnp.broadcast_to(jnp.eye(WIDTH), (1, HEADS, 1, WIDTH, WIDTH))
    if fixed:
        return jnp.moveaxis(codec.logits(params, state, eye, None)[:, :, 0], 2, 3)
    return codec.decode(params, state)


def rotated(x, at):
    """RoPE in NumPy: channels i and i + D / 2 turn by ``at * 10000 ** (-2 i / D)``."""
    angles = np.asarray(at)[:, None] * 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    a, b = np.split(np.asarray(x), 2, axis=-1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], axis=-1)


def one_by_one(spec: LayerSpec) -> bool:
    """A single token leaves the window and fights for a slot; none leave in bulk, expire, or have a head's cap."""
    in_groups = isinstance(spec.policy, AdaKV | Corm | ScissorhandsRelease | Scissorhands)
    return spec.flush == 1 and spec.window > 0 and spec.slots > 0 and not in_groups


@pytest.mark.parametrize("name", names(one_by_one))
def test_what_is_kept_scores_no_less_than_what_is_dropped(name):
    spec, (_, seen) = MEMBERS[name], result(name)
    pos, before, scores = (np.asarray(seen[x]) for x in ("pos", "before", "scores"))
    dropped_any = 0
    for step, row, head in np.ndindex(STEPS, 2, spec.head_pos):
        # The candidate is the oldest window token.
        head_of = spec.slots + step % spec.window
        main = slice(0, spec.slots)
        line = {int(p): float(s) for p, s in zip(before[step, row, head, main], scores[step, row, head, main],
                                                 strict=True) if p >= 0}  # fmt: skip
        if before[step, row, head, head_of] >= 0:
            line[int(before[step, row, head, head_of])] = float(scores[step, row, head, head_of])
        after = set(kept(pos[step, row, head, main]))
        gone = set(line) - after
        assert len(gone) <= 1
        dropped_any += len(gone)
        for token in gone:
            assert token >= spec.sinks
            assert line[token] <= min((s for p, s in line.items() if p in after and p >= spec.sinks), default=np.inf)
    assert dropped_any or spec.slots >= PROMPT + STEPS - spec.window


@pytest.mark.parametrize("name", ["h2o", "cq-4c8b+h2o", "int8+scissorhands", "think+snapkv", "slot-streaming"])
def test_the_order_of_slots_changes_nothing(name):
    spec, (layer, _) = MEMBERS[name], result(name)
    order = np.random.default_rng(2).permutation(spec.slots)
    keys, values = (
        state._replace(slots={n: leaf[:, :, order] for n, leaf in state.slots.items()})
        for state in (layer.keys, layer.values)
    )
    shuffled = layer._replace(keys=keys, values=values, pos=layer.pos[:, :, order])
    q = jnp.asarray(stream()[0][:, :, -1:])
    at = jnp.asarray([[LENGTHS[0] + STEPS], [LENGTHS[1] + STEPS]])
    both = [attend(spec, tables_of(spec), one, q, at)[0] for one in (layer, shuffled)]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-5, atol=1e-6)


def is_streaming(spec: LayerSpec) -> bool:
    """Where neither scales of blocks, nor channels that a prompt chooses, depend on where the prompt ends."""
    return isinstance(spec.policy, KeepAll) and spec.granularity == 1 and not isinstance(spec.key_codec, ThinK)


@pytest.mark.parametrize("name", names(is_streaming))
def test_a_longer_prompt_or_more_steps_is_one(name):
    spec = MEMBERS[name]
    q, k, v = stream()
    tables, pos = tables_of(spec), np.arange(PROMPT + STEPS, dtype=np.int32)[None]
    q, k, v = (jnp.asarray(x[:1]) for x in (q, k, v))
    whole = prefill_layer(spec, tables, q, k, v, jnp.asarray(pos), jax.random.key(0))
    stepped = jax.tree.map(lambda leaf: leaf[:1], result(name)[0])
    count = PROMPT + STEPS - spec.window
    np.testing.assert_array_equal(stepped.pos[0, 0, :count], np.arange(count))
    for one, other in zip(view(spec, whole), view(spec, stepped), strict=True):
        for leaf in one.slots:
            np.testing.assert_array_equal(one.slots[leaf][:, :, :count], other.slots[leaf][:, :, :count])


@pytest.mark.parametrize("name", POLICIES)
def test_room_for_all_is_the_full_cache(name):
    """Every policy with as many slots as tokens, and nothing that expires, gives exact attention."""
    policy = POLICIES[name]
    if isinstance(policy, Corm):
        policy = dataclasses.replace(policy, queries=PROMPT + STEPS)
    if isinstance(policy, ScissorhandsRelease):
        policy = dataclasses.replace(policy, start=PROMPT + STEPS)
    if isinstance(policy, AdaKV):
        policy = dataclasses.replace(policy, base=40)
    MEMBERS[f"{name}-roomy"] = dataclasses.replace(BASE, policy=policy, slots=40)
    MEMBERS["roomy"] = dataclasses.replace(BASE, slots=40)
    np.testing.assert_allclose(result(f"{name}-roomy")[1]["out"], result("roomy")[1]["out"], rtol=1e-4, atol=1e-5)
    del MEMBERS[f"{name}-roomy"], MEMBERS["roomy"]
