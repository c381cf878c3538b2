"""Layers that cannot be, and those that barely can: one token kept, prompts shorter than all that looks at them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.kvcache.ada_kv import AdaKV, ada_pages
from hashml.kvcache.controls import KeyNorm, RandomEviction
from hashml.kvcache.corm import Corm
from hashml.kvcache.dense import Dense
from hashml.kvcache.full import KeepAll
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.integer import IntGroup
from hashml.kvcache.keyformer import Keyformer
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.scissorhands import Scissorhands, ScissorhandsRelease
from hashml.kvcache.serving import decode_step, no_tables, prefill
from hashml.kvcache.snap_kv import SnapKV
from hashml.kvcache.spec import CacheSpec, LayerSpec
from hashml.kvcache.state import all_positions
from hashml.kvcache.streaming import Streaming
from hashml.kvcache.think import ThinK
from hashml.kvcache.tova import TOVA
from hashml.models.decoder import DecoderConfig, decoder_model, init_params
from hashml.models.rotary import Rotary

CONFIG = DecoderConfig(vocabulary=12, features=8, layers=1, heads=2, kv_heads=2, head_dim=4, hidden=8)
MODEL, PARAMS = decoder_model(CONFIG), init_params(jax.random.key(0), CONFIG)
QUICK = {"xla_backend_optimization_level": 0}


def layer_of(**changes: Any) -> LayerSpec:
    settings: dict[str, Any] = {
        "slots": 8,
        "window": 4,
        "key_codec": Dense(),
        "value_codec": Dense(),
        "rope": "write",
    }
    settings |= {"policy": KeepAll(), "rotary": CONFIG.rotary}
    return LayerSpec(kv_heads=2, query_heads=2, head_dim=4, **(settings | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 4.0}, "slots is 4.0; it must be an integer"),
        ({"window": True}, "window is True; it must be an integer"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be at least 1"),
        (
            {"slots": 3, "sinks": 3, "window": 0},
            "window is 0 and slots is 3; with 3 sinks, which never leave, it must be",
        ),
        ({"policy": HeavyHitters}, "policy is the class HeavyHitters; give an instance, HeavyHitters\\(...\\)"),
        ({"key_codec": Dense}, "key_codec is the class Dense; give an instance"),
        ({"pages": 0, "page_size": 4}, "pages is 0; it must be at least 1"),
        (
            {"key_codec": ThinK(Dense(), pair_tied=True), "rope": "read", "rotary": Rotary(pairs="interleaved")},
            "which keeps 'half' pairs of channels together; rotary turns 'interleaved' ones",
        ),
    ],
)
def test_refuses_what_cannot_be(changes, message):
    """Past the annotations, which nobody checks outside of these tests."""
    spec = object.__new__(LayerSpec)
    for name, value in {
        **{f.name: getattr(layer_of(), f.name) for f in dataclasses.fields(LayerSpec)},
        **changes,
    }.items():
        object.__setattr__(spec, name, value)
    with pytest.raises(ValueError, match=message):
        spec.__post_init__()


def test_sizes_that_only_just_can_be():
    assert layer_of(sliding_window=1).sliding_window == 1
    assert layer_of(slots=4, sinks=3, window=0).capacity == 4
    assert layer_of(slots=3, sinks=3, window=1).capacity == 4
    tied = ThinK(Dense(), pair_tied=True, pairs="interleaved")
    assert layer_of(key_codec=tied, rope="read", rotary=Rotary(pairs="interleaved")).key_codec == tied


def fed(
    spec: CacheSpec, tokens: np.ndarray, positions: np.ndarray, later: np.ndarray,
    config: DecoderConfig = CONFIG, params: Any = PARAMS,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Logits after the prompt, and after each later token, and the cache; one program."""
    model = decoder_model(config)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(tokens, positions, later):
        first, cache = prefill(model, spec, no_tables(spec), params, tokens, positions, jax.random.key(0))

        def step(cache, token):
            logits, cache = decode_step(model, spec, no_tables(spec), params, cache, token)
            return cache, logits

        cache, logits = jax.lax.scan(step, cache, later.T)
        return first, logits, cache

    return run(*(jnp.asarray(x, jnp.int32) for x in (tokens, positions, later)))


POLICIES = {
    "full": KeepAll(), "streaming": Streaming(), "h2o": HeavyHitters(normalise=True), "tova": TOVA(),
    "snapkv": SnapKV(queries=8), "adakv": AdaKV(queries=8, base=1), "scissorhands": Scissorhands(queries=8, drop=1),
    "release": ScissorhandsRelease(queries=8, start=2), "keyformer": Keyformer(new_tokens=4), "corm": Corm(queries=8),
    "random": RandomEviction(), "keynorm": KeyNorm(),
}  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "without"), [({"slots": 1, "window": 0}, {"full"}), ({"slots": 3, "window": 4, "sinks": 3}, set())]
)
def test_one_token_and_prompts_shorter_than_everything_give_finite_output(sizes, without):
    """Section 10.9 (10): a budget of one slot without a window (but for what keeps all, which refuses a prompt of two
    tokens); and prompts of two, one and no tokens where window, sinks and last queries are more. A layer a policy."""
    policies = {name: policy for name, policy in POLICIES.items() if name not in without}
    config = dataclasses.replace(CONFIG, layers=len(policies))
    params = init_params(jax.random.key(0), config)
    spec = CacheSpec(tuple(layer_of(policy=policy, **sizes) for policy in policies.values()), 3)
    tokens, later = np.array([[3, 5], [0, 7], [0, 0]]), np.arange(9).reshape(3, 3)
    positions = np.array([[0, 1], [-1, 0], [-1, -1]])
    first, logits, cache = fed(spec, tokens, positions, later, config, params)
    assert np.isfinite(first[:2]).all()  # the third row has said nothing
    assert np.isfinite(logits).all()
    newest = np.array([4, 3, 2])[:, None]
    for name, layer_spec, layer in zip(policies, spec.layers, cache.layers, strict=True):
        held = np.asarray(all_positions(layer_spec, layer))
        np.testing.assert_array_equal(held.max(axis=2), np.broadcast_to(newest, held.shape[:2]), err_msg=name)


def test_adakv_shares_out_blocks_that_share_scales():
    """Budgets are whole blocks of KIVI's; no main slot beyond a head's budget is ever used; the pool is enough."""
    grain, base = 4, 8
    pages = ada_pages(2, base, 0, grain, least=grain, granularity=grain)
    layer = layer_of(
        slots=16, window=4, flush=4, policy=AdaKV(queries=4, base=base, floor=0), key_codec=KiviKeys(2, 4),
        value_codec=IntGroup(2, 4), page_size=grain, pages=2 * pages,
    )  # fmt: skip
    rng = np.random.default_rng(3)
    tokens, positions = rng.integers(0, 12, (2, 26)), np.tile(np.arange(26), (2, 1))
    positions[1, :15] = -1
    positions[1, 15:] = np.arange(11)
    _, logits, cache = fed(CacheSpec((layer,), 2), tokens, positions, rng.integers(0, 12, (2, 9)))
    found = cache.layers[0]
    caps, pos = np.asarray(found.caps), np.asarray(found.pos)
    assert (caps % grain == 0).all()
    assert (abs(caps.sum(axis=1) - 2 * base) <= grain).all()
    assert (pos[np.arange(16) >= caps[:, :, None]] == -1).all()
    assert ((pos >= 0).sum(axis=2)[0] == caps[0]).all()  # the long row fills them
    assert int(found.pages.missed) == 0
    assert np.isfinite(logits).all()
    with pytest.raises(ValueError, match="later is 2; it must be a multiple of 4, the slots that share a scale"):
        dataclasses.replace(layer, policy=AdaKV(base=base, later=2))


@pytest.mark.parametrize("line", [[0, 0, 1], [0, 1, 3], [2, 1, 0], [1, 2, 3]])
def test_positions_that_are_no_sequence_are_refused(line):
    """Twice the same, with a gap, backwards, from the middle: each would be kept, and quietly mean something else."""
    spec = CacheSpec((layer_of(),), 2)
    positions = np.array([[0, 1, 2], line], np.int32)
    with pytest.raises(
        ValueError, match="positions of row 1 are .*; beside padding, -1, they must be 0, 1 and so on"
    ):
        prefill(
            MODEL,
            spec,
            no_tables(spec),
            PARAMS,
            jnp.zeros((2, 3), jnp.int32),
            jnp.asarray(positions),
            jax.random.key(0),
        )
