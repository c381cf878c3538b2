"""Caches by name: what each says is what it is, no request is changed silently, and every refusal names itself."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.kvcache.accounting import bytes_per_token, cache_bytes
from hashml.kvcache.ada_kv import AdaKV, ada_pages
from hashml.kvcache.corm import Corm
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.exact_first import ExactFirst
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.integer import IntGroup
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.kvquant import NonUniformKeys, NonUniformValues
from hashml.kvcache.methods import CODECS, POLICIES, cache_layers
from hashml.kvcache.scissorhands import Scissorhands, ScissorhandsRelease
from hashml.kvcache.spec import CacheSpec
from hashml.kvcache.state import init
from hashml.kvcache.tables import needs_tables
from hashml.kvcache.think import ThinK
from hashml.models.decoder import DecoderConfig
from hashml.models.rotary import Rotary

SMALL = DecoderConfig(vocabulary=40, features=32, layers=3, heads=4, kv_heads=2, head_dim=32, hidden=32)
WIDE = dataclasses.replace(SMALL, heads=8, kv_heads=8, head_dim=128)
INTERLEAVED = dataclasses.replace(SMALL, layers=2, kv_heads=1, head_dim=64, rotary=Rotary(pairs="interleaved"))
SHAPES = {"small": SMALL, "wide": WIDE, "interleaved": INTERLEAVED}
CAPACITY = 256
NAMES = (
    *POLICIES, "h2o:normalised@0.2", "scissorhands:per_query@64", "scissorhands:release@64", "corm:budgeted@0.3",
    "dense", "int8", "fp8", "int4", "int4:16", "int2", "kivi:2", "kivi:4", "kivi:2r64", "kvquant:3", "kvquant:3o1",
    "kvquant:3o1f1", "kvquant:2o1f4n", "coupled:8c8b", "coupled:4c8b", "coupled:8c10b", "think", "think:0.5",
    "int4+think:0.4", "int4:8+think:0.5", "kivi:2+think:0.4", "coupled:8c8b+think:0.5", "kvquant:3o1+think:0.5",
    "kvquant:3o1f2+think:0.5", "scissorhands@0.2+int4", "h2o@0.5+coupled:8c8b", "snapkv@128+think:0.4",
    "streaming@64+int4", "streaming@64+kvquant:3o1", "streaming@64+coupled:8c8b", "streaming@64+think:0.4",
    "adakv@128+kivi:2", "pyramidkv@128+int8", "tova@128+kvquant:3o1f1", "corm@128+kivi:2r32",
)  # fmt: skip


def held(layers):
    """Tokens of a row and head, the mean over layers."""
    return np.mean([x.slots + x.window if x.pages is None else x.pages * x.page_size / x.kv_heads for x in layers])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_name_is_a_cache_whose_bytes_are_those_of_its_arrays(shape):
    """Of a model's shapes alone: nothing is allocated or compiled."""
    config = SHAPES[shape]
    for name in NAMES:
        layers = cache_layers(name, config, CAPACITY)
        assert len(layers) == config.layers, name
        spec = CacheSpec(layers, 3)
        cache = jax.eval_shape(lambda spec=spec: init(spec, jax.random.key(0)))
        found = cache_bytes(spec, cache)
        key = jax.eval_shape(jax.random.key_data, cache.key)
        assert found.total == stored_bytes(cache._replace(key=key)), name
        assert needs_tables(layers) == ("coupled" in name or "kvquant" in name)
        budget = re.search(r"@([0-9.]+)", name)
        if budget and "adakv" not in name:
            asked = float(budget[1]) * (CAPACITY if "." in budget[1] else 1)
            assert held(layers) <= round(asked), name


def test_bytes_fall_with_bits_and_with_the_budget():
    """Section 10.9 (11): the more is dropped or the coarser the codes, the fewer bytes."""
    for line in (
        ("dense", "int8", "int4:128", "coupled:4c8b", "coupled:8c8b"),
        ("int8", "int4", "int2"),
        ("kivi:8", "kivi:4", "kivi:2", "kivi:1"),
        ("kvquant:4o1", "kvquant:3o1", "kvquant:3", "kvquant:2", "kvquant:1"),
        ("kvquant:3o1f4", "kvquant:3o1f1", "kvquant:3o1"),
        ("coupled:2c8b", "coupled:4c8b", "coupled:8c10b", "coupled:8c8b"),
        ("dense", "think:0.2", "think:0.4", "think:0.6"),
        ("int4", "int4+think:0.2", "int4+think:0.4", "int4+think:0.6"),
    ):
        sizes = [bytes_per_token(cache_layers(name, WIDE, 1024), 1024) for name in line]
        assert sizes == sorted(set(sizes), reverse=True), dict(zip(line, sizes, strict=True))
    for policy in POLICIES[1:]:
        for codec in ("dense", "int4", *(["kivi:2"] if policy != "streaming" else [])):
            names = [f"{policy}@{part}+{codec}" for part in ("0.8", "0.4", "256", "0.125")]
            sizes = [bytes_per_token(cache_layers(name, WIDE, 1024), 1024) for name in names]
            assert sizes == sorted(set(sizes), reverse=True), names


def test_options_are_what_they_say():
    def policy(name):
        return cache_layers(name, SMALL, CAPACITY)[0].policy

    assert policy("h2o:normalised@64") == HeavyHitters(normalise=True)
    assert policy("h2o@64") == HeavyHitters()
    per_query, plain = policy("scissorhands:per_query@64"), policy("scissorhands@64")
    assert isinstance(per_query, Scissorhands)
    assert dataclasses.replace(per_query, per_query=False) == plain
    assert isinstance(policy("scissorhands:release@64"), ScissorhandsRelease)
    # The newest 10 beside the current one, as in the released code.
    assert cache_layers("scissorhands:release@64", SMALL, CAPACITY)[0].window == 11
    assert policy("corm:budgeted@64") == Corm(queries=32, budgeted=True)
    assert policy("corm@64") == Corm(queries=32)
    residual = cache_layers("kivi:2r64", SMALL, CAPACITY)[0]
    assert (residual.window, residual.flush) == (64, 32)
    assert (residual.key_codec, residual.value_codec) == (KiviKeys(2, 32), IntGroup(2, 32))
    first = cache_layers("kvquant:2o1f4n", SMALL, CAPACITY)[0]
    assert first.key_codec == ExactFirst(NonUniformKeys(2, 1, q_norm=True), 4)
    assert first.value_codec == ExactFirst(NonUniformValues(2, 1, q_norm=True), 4)
    assert "q_norm=True" in str(first.key_codec)  # by which files tell tables apart
    assert "q_norm" not in str(cache_layers("kvquant:2", SMALL, CAPACITY)[0].key_codec)
    assert first.sinks == 4
    thin = cache_layers("kvquant:3f2+think:0.5", SMALL, CAPACITY)[0]
    assert thin.key_codec == ExactFirst(ThinK(NonUniformKeys(3), 0.5, pair_tied=True), 2)


def test_pairs_of_channels_are_tied_where_keys_are_stored_raw():
    """For StreamingLLM too, whose keys are rotated by rank; and in the order in which the model turns them."""
    for name, tied in (("think:0.5", False), ("streaming+think:0.5", True), ("coupled:8c8b+think:0.5", True)):
        for config in (SMALL, INTERLEAVED):
            codec = cache_layers(name, config, CAPACITY)[0].key_codec
            assert isinstance(codec, ThinK)
            assert codec.pair_tied == tied
            turned = "half" if config is SMALL else "interleaved"
            assert codec.rotary_pairs == (turned if tied else None)


@pytest.mark.parametrize(
    ("name", "width", "kept", "group"),
    [
        ("int4+think:0.4", 128, 80, 20),  # 128 - 51 = 77, up to a multiple of 8
        ("int4+think:0.4", 32, 24, 24),
        ("int2+think:0.4", 16, 12, 12),  # of 8 none would go
        ("int4:16+think:0.4", 128, 80, 16),
        ("int4:64+think:0.5", 128, 64, 64),
    ],
)
def test_thin_keys_come_in_whole_groups(name, width, kept, group):
    layer = cache_layers(name, dataclasses.replace(SMALL, head_dim=width), CAPACITY)[0]
    codec = layer.key_codec
    assert isinstance(codec, ThinK)
    assert isinstance(codec.inner, IntGroup)
    assert (codec.kept(width), codec.inner.group) == (kept, group)
    state = jax.eval_shape(lambda: codec.init(1, 2, 16, width, np.float32))
    assert state.slots["q"].shape == (1, 2, 16, kept * codec.inner.bits // 8)
    assert state.fixed["channels"].shape[-1] == kept


def test_a_budget_is_a_bound_and_above_the_capacity_keeps_all():
    """One name serves rows of any length."""
    assert cache_layers("h2o@500", SMALL, 256) == cache_layers("h2o@256", SMALL, 256)
    assert held(cache_layers("h2o@500", SMALL, 256)) == 256
    assert held(cache_layers("h2o@0.2", SMALL, 256)) == 51
    # Blocks round down.
    assert held(cache_layers("h2o@100+kivi:2", SMALL, 256)) == 96
    # Nothing has to be dropped from three tokens: the least cache that streaming can have does.
    assert held(cache_layers("streaming@64", SMALL, 3)) == 5
    # No budget is asked for: a fifth, or the least there can be.
    assert held(cache_layers("scissorhands+kivi:2", SMALL, 256)) == 64
    assert cache_layers("full", SMALL, 3, sinks=8)[0].slots == 9


def test_sinks_are_as_many_as_asked_for_or_refused():
    for name in ("h2o@64", "snapkv@64", "pyramidkv@64", "adakv@64", "tova@64", "full", "int4", "h2o@128+kivi:2"):
        assert all(layer.sinks == 10 for layer in cache_layers(name, SMALL, CAPACITY, sinks=10)), name
    assert cache_layers("streaming@64", SMALL, CAPACITY)[0].sinks == 4
    assert cache_layers("streaming@64", SMALL, CAPACITY, sinks=6)[0].sinks == 6


@pytest.mark.parametrize(
    ("name", "sinks", "message"),
    [
        ("h2o@4", 10, "'h2o@4'; it keeps 4 of 256 tokens, and must keep at least 19 for its window and 10 sinks"),
        ("snapkv@8", 30, "keeps 8 of 256 tokens, and must keep at least 39 for its window and 30 sinks"),
        ("streaming@2", 0, "keeps 2 of 256 tokens, and must keep at least 5 for its window and 4 sinks"),
        ("h2o@4+kivi:2", 0, "keeps 4 of 256 tokens, and must keep at least 64 for its window and blocks of 32"),
        ("scissorhands@0.2+kivi:2", 0, "keeps 51 of 256 tokens, and must keep at least 64 for its window and blocks"),
        ("h2o@1.5", 0, "a number of tokens is whole, and a part of the capacity at most 1, which 1.5 is not"),
        ("h2o@1.2.3", 0, "'1.2.3' is no number of tokens"),
        ("int4+int8", 0, "'int4' and 'int8' are two codecs, and there is one, beside which there may be 'think'"),
        ("coupled:8c8b+kivi:2", 0, "'coupled' and 'kivi' are two codecs"),
        ("int8+think:0.4+think:0.2", 0, "'think' is there twice"),
        ("int8+h2o", 0, "a policy stands first, and 'h2o' does not"),
        ("h2o:often", 0, "the option of 'h2o' is 'often'; allowed is :normalised, and @TOKENS"),
        ("scissorhands:2@64", 0, "the option of 'scissorhands' is '2'; allowed is :per_query or :release"),
        ("tova:2", 0, "the option of 'tova' is '2'; allowed is none"),
        ("kivi:2r40", 0, "its residual of 40 must be a multiple of 32, the tokens of a block"),
        ("kivi:r", 0, "kivi:r; the option must be a number of bits, and rRESIDUAL after it"),
        ("kvquant:3f1o1", 0, "the option must be a number of bits, and after it oOUTLIERS, fFIRST and n"),
        ("int4:32+think:0.4", 0, "of 32 channels in groups of 32, think drops none"),
        ("think:0.01", 0, "of 32 channels in groups of 1, think drops none"),
        ("adakv@64+kvquant:3f1", 0, "keeps its first tokens in slots, and pages have no first slot"),
        ("h2o@64", -1, "sinks is -1; it must be at least 0"),
    ],
)  # fmt: skip
def test_no_request_is_changed_silently(name, sinks, message):
    with pytest.raises(ValueError, match=message):
        cache_layers(name, SMALL, CAPACITY, sinks=sinks)


def test_codecs_of_every_kind_are_reachable_by_name():
    kinds = {kind for name in NAMES for part in name.split("+") for kind in [re.split("[:@]", part)[0]]}
    assert kinds == {*POLICIES, *CODECS}
    assert cache_layers("coupled:8c10b", SMALL, CAPACITY)[0].key_codec == Coupled(8, 10)


def test_pages_of_adakv_are_enough_when_heads_are_lifted_to_the_least():
    """Each head has the flush's tokens at least; with floor 0 one head may have all others' budgets beside."""
    heads, base, page, flush = 16, 8, 4, 4
    caps = np.full(heads, flush)
    caps[0] = heads * base
    needed = np.ceil(caps / page).sum()
    assert ada_pages(heads, base, 0, page, floor=0, least=flush) >= needed
    assert np.ceil(heads * (base + 0.5 + page - 1) / page) == needed - 1  # of budgets alone
    rng = np.random.default_rng(0)
    for _ in range(300):
        heads, base, floor = int(rng.integers(1, 9)), int(rng.integers(1, 40)), float(rng.choice([0, 0.2, 0.5, 1]))
        grain, later = int(rng.choice([1, 4])), 4 * int(rng.integers(0, 3))
        page, least = grain * int(rng.integers(1, 5)), int(rng.integers(1, 12))
        counts = rng.multinomial(heads * base, rng.dirichlet(np.full(heads, 0.3)))
        budgets = np.round((1 - floor) * counts + int(floor * base)).astype(int)
        budgets = np.maximum((budgets + grain // 2) // grain * grain, -(-least // grain) * grain)
        pages = ada_pages(heads, base, later, page, floor=floor, least=least, granularity=grain)
        assert np.ceil((budgets + later) / page).sum() <= pages


def test_adakv_by_name_has_pages_for_its_sinks():
    layer = cache_layers("adakv@40", WIDE, CAPACITY, sinks=12)[0]
    policy = layer.policy
    assert isinstance(policy, AdaKV)
    assert layer.pages == ada_pages(8, policy.base, 0, 8, floor=0.5, least=12)
