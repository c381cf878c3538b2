"""First tokens that are exact: in their slots for ever, read in place of their codes, and counted."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.kvcache.accounting import cache_bytes
from hashml.kvcache.contract import CodecState, Policy
from hashml.kvcache.corm import Corm
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.dense import Dense
from hashml.kvcache.exact_first import ExactFirst
from hashml.kvcache.full import KeepAll
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.integer import IntGroup
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.kvquant import NonUniformKeys, NonUniformValues, kvquant
from hashml.kvcache.scissorhands import Scissorhands
from hashml.kvcache.serving import decode_step, no_tables, prefill
from hashml.kvcache.spec import CacheSpec, LayerSpec
from hashml.kvcache.state import init_layer
from hashml.kvcache.think import ThinK
from hashml.models.decoder import DecoderConfig, decoder_model, init_params

S, STEPS, PROMPT = 3, 18, 14
CONFIG = DecoderConfig(vocabulary=40, features=16, layers=1, heads=4, kv_heads=2, head_dim=8, hidden=16)
MODEL, PARAMS = decoder_model(CONFIG), init_params(jax.random.key(0), CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 40, (2, PROMPT + STEPS)).astype(np.int32)
LENGTHS = (14, 1)
"""A row whose sinks come with the prompt, and one whose sinks come later, one by one."""
QUICK = {"xla_backend_optimization_level": 0}


def layer_of(policy: Policy | None = None, first: int = S, **changes: Any) -> LayerSpec:
    codec = ExactFirst(Dense(), first)
    settings = {"slots": 8, "window": 4, "sinks": S, "key_codec": codec, "value_codec": codec, "rope": "write"}
    return LayerSpec(kv_heads=2, query_heads=4, head_dim=8, policy=policy or KeepAll(), rotary=CONFIG.rotary,
                     **(settings | changes))  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        (HeavyHitters(), {"flush": 2}),
        (KeepAll(), {"slots": 40, "window": 0}),
        (Scissorhands(queries=8, drop=4), {}),
        (Corm(queries=4), {"flush": 2}),
    ],
    ids=["h2o", "all", "scissorhands", "corm"],
)
def test_first_tokens_are_bit_for_bit_those_of_the_store_whatever_leaves(policy, changes):
    """The inner codec is exact too, so that the store beside has the truth."""
    spec = CacheSpec((layer_of(policy, **changes),), 2)
    place = np.arange(PROMPT)[None] - (PROMPT - np.array(LENGTHS))[:, None]
    tokens = np.take_along_axis(TOKENS, np.maximum(place, 0), axis=1)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def generate(tokens, positions, later):
        _, cache = prefill(MODEL, spec, no_tables(spec), PARAMS, tokens, positions, jax.random.key(0))

        def step(cache, token):
            return decode_step(MODEL, spec, no_tables(spec), PARAMS, cache, token)[1], None

        return jax.lax.scan(step, cache, later.T)[0]

    after = np.take_along_axis(TOKENS, np.array(LENGTHS)[:, None] + np.arange(STEPS), axis=1)
    cache = generate(jnp.asarray(tokens), jnp.asarray(np.maximum(place, -1), jnp.int32), jnp.asarray(after))
    layer = cache.layers[0]
    np.testing.assert_array_equal(layer.pos[:, :, :S], np.broadcast_to(np.arange(S), (*layer.pos.shape[:2], S)))
    for store in (layer.keys, layer.values):
        assert np.abs(store.slots["x"][:, :, :S]).min() > 0
        np.testing.assert_array_equal(store.slots["first"], store.slots["x"][:, :, :S])
    found = cache_bytes(spec, cache)
    exact = 2 * 2 * 2 * S * 8 * 4  # keys and values, 2 rows, 2 heads, float32
    ring = spec.layers[0].window * 2 * (2 * 2 * 8 * 4 + 4)
    assert found.allocated["window"] == exact + ring
    assert float(found.logical["window"]) == exact + ring


INNERS = {
    "int2": (IntGroup(2, 8), {}),
    "nuq": (
        NonUniformKeys(2),
        {"low": jnp.full((2, 8), -2.0), "high": jnp.full((2, 8), 2.0), "table": jnp.asarray([-1.0, -0.3, 0.3, 1.0])},
    ),
    "cq": (
        Coupled(4, 3, histogram=True),
        {"codebook": jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 8, 4)), jnp.float16)},
    ),
    "think": (ThinK(IntGroup(4, 4), 0.5), {}),
}


@pytest.mark.parametrize("name", INNERS)
def test_exact_tokens_stand_in_for_their_codes(name):
    """Decoded tokens, logits, turned or not, and sums are those of exact tokens in front of decoded ones."""
    inner, params = INNERS[name]
    codec = ExactFirst(inner, S)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 2, 6, 8)).astype(np.float32)
    q, probs = rng.normal(size=(2, 2, 2, 1, 8)).astype(np.float32), rng.random((2, 2, 2, 1, 6)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(x, q, probs):
        empty = codec.init(2, 2, 6, 8, jnp.float32)
        rows = codec.quantise(params, empty.fixed, x, jnp.ones(x.shape[:3], bool))
        state = CodecState(rows | {"first": rows["first"][:, :, :S]}, empty.fixed)
        plain = inner.decode(params, CodecState({n: v for n, v in rows.items() if n != "first"}, empty.fixed))
        turn = jnp.where(jnp.arange(8) % 2 == 0, -1.0, 1.0)
        return (
            plain, codec.decode(params, state), codec.logits(params, state, q, None),
            codec.logits(params, state, q, lambda k: k * turn), codec.weighted_sum(params, state, probs),
        )  # fmt: skip

    plain, decoded, logits, turned, out = (np.asarray(a) for a in both(x, q, probs))
    expected = plain.copy()
    expected[:, :, :S] = x[:, :, :S]
    np.testing.assert_array_equal(decoded, expected)
    assert np.abs(plain - x)[:, :, :S].max() > 0.05
    np.testing.assert_allclose(logits, np.einsum("bhjnd,bhcd->bhjnc", q, expected), atol=1e-5)
    flipped = expected * np.where(np.arange(8) % 2 == 0, -1, 1)
    np.testing.assert_allclose(turned, np.einsum("bhjnd,bhcd->bhjnc", q, flipped), atol=1e-5)
    np.testing.assert_allclose(out, np.einsum("bhjnc,bhcd->bhjnd", probs, expected), atol=1e-5)


def test_what_wraps_is_what_is_wrapped():
    keys, values = kvquant(3, 1, first=2)
    assert (keys, values) == (ExactFirst(NonUniformKeys(3, 1), 2), ExactFirst(NonUniformValues(3, 1), 2))
    assert keys.space == "pre_rope"
    assert ExactFirst(ThinK(Dense())).keys_only
    assert ExactFirst(Coupled(4, 3)).roles == {"code": "payload", "first": "window"}
    assert hash(keys) == hash(eval(repr(keys)))
    both = keys, kvquant(3, 1)[0]
    coded, plain = (jax.eval_shape(lambda c=c: c.init(2, 3, 64, 16, jnp.bfloat16)) for c in both)
    assert stored_bytes(coded) - stored_bytes(plain) == 2 * 3 * 2 * 16 * 2
    state = jax.eval_shape(lambda: init_layer(layer_of(first=1), 2))
    assert state.keys.slots["first"].shape == (2, 2, 1, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactFirst(Dense(), 0), "first is 0; it must be at least 1 token"),
        (lambda: ExactFirst(KiviKeys(2, 4)), "whose slots share scales by 4; first tokens are set apart where each"),
        (lambda: ExactFirst(ExactFirst(Dense())), "its first tokens are exact already"),
        (lambda: ThinK(ExactFirst(Dense())).check(8), "so that it is ThinK that goes inside"),
        (lambda: layer_of(sinks=2), "sinks is 2; it must be at least 3, the first tokens that ExactFirst"),
        (lambda: layer_of(page_size=4, pages=8), "pages is 8; ExactFirst.* keeps its first tokens in slots"),
        (lambda: layer_of(value_codec=ExactFirst(ThinK(Dense()))), "it is for keys alone"),
    ],
)
def test_refuses_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
