"""The fused read of a large store equals logits and sums."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from hashml.kvcache.attending import attend
from hashml.kvcache.contract import Codec
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.dense import Dense
from hashml.kvcache.full import KeepAll
from hashml.kvcache.fused import fused_attend, is_fused
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.integer import Int8, IntGroup
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.prefill import prefill_layer
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerTables, init_layer
from hashml.models.rotary import Rotary

HEADS, WIDTH, TOKENS = 2, 16, 40
BASE = LayerSpec(kv_heads=HEADS, query_heads=4, head_dim=WIDTH, slots=1024, window=8, key_codec=Dense(),
                 value_codec=Dense(), policy=KeepAll(), rotary=Rotary(), rope="write")  # fmt: skip
BOOKS = {"codebook": jax.random.normal(jax.random.key(3), (HEADS, WIDTH // 4, 256, 4)).astype(jnp.float16)}


def made(keys: Codec, values: Codec, **options) -> LayerSpec:
    return dataclasses.replace(BASE, key_codec=keys, value_codec=values, **options)


CASES = {
    "dense": made(Dense(), Dense()),
    "int4": made(IntGroup(4, 8), IntGroup(4, 8), rope="read", sliding_window=30),
    "kivi": made(KiviKeys(2, 4), IntGroup(2, 8), flush=4),
    "coupled": made(Coupled(4, 8), Coupled(4, 8), rope="read"),
    "interleaved": made(Coupled(4, 8), Dense(), rope="read", rotary=Rotary(pairs="interleaved"), window=0),
    "no rotation": made(IntGroup(8, 16), Dense(), rope="none", rotary=None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fused_read_is_the_plain_one(name):
    spec = CASES[name]
    tables = LayerTables(BOOKS, BOOKS)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, heads, TOKENS, WIDTH)), jnp.float32) for heads in (4, 2, 2))
    pos = np.stack([np.arange(TOKENS), np.r_[np.full(29, -1), np.arange(11)]]).astype(np.int32)
    layer = prefill_layer(spec, tables, q, k, v, jnp.asarray(pos), jax.random.key(0))
    asked = jnp.asarray([[TOKENS - 1], [10]], jnp.int32)
    assert is_fused(spec)
    expected, _ = attend(spec, tables, layer, q[:, :, -1:], asked)
    found = fused_attend(spec, tables, layer, q[:, :, -1:], asked)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_fused():
    """Policies that look on, codecs without a format, small stores, several tokens, pages, ranks."""
    assert not is_fused(dataclasses.replace(BASE, policy=HeavyHitters()))
    assert not is_fused(made(Int8(), Int8()))
    assert not is_fused(dataclasses.replace(BASE, slots=512))
    assert not is_fused(BASE, 2)
    assert not is_fused(dataclasses.replace(BASE, page_size=64, pages=32))
    assert not is_fused(dataclasses.replace(BASE, rope="slot"))


def test_no_decoded_store_exists():
    """Of a million slots the plain read forms float32 keys; the fused one forms blocks."""
    spec = made(Coupled(4, 8), Coupled(4, 8), rope="read", slots=2**20)
    shapes = jax.eval_shape(lambda: init_layer(spec, 1))
    q, asked = jax.ShapeDtypeStruct((1, 4, 1, WIDTH), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def temporary(read) -> int:
        def step(layer, q, asked):
            return read(spec, LayerTables(BOOKS, BOOKS), layer, q, asked)

        memory = jax.jit(step).lower(shapes, q, asked).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    decoded = HEADS * 2**20 * WIDTH * 4
    assert temporary(attend) >= decoded
    assert temporary(fused_attend) < decoded / 8


@pytest.mark.parametrize("name", ["int4", "kivi", "coupled"])
def test_heads_over_devices_are_one_device(name):
    if jax.device_count() < 2:
        pytest.skip("wants 2 devices")
    spec, tables = CASES[name], LayerTables(BOOKS, BOOKS)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, heads, TOKENS, WIDTH)), jnp.float32) for heads in (4, 2, 2))
    pos = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (2, TOKENS))
    layer = prefill_layer(spec, tables, q, k, v, pos, jax.random.key(0))
    expected = fused_attend(spec, tables, layer, q[:, :, -1:], pos[:, -1:])
    spread = dataclasses.replace(spec, heads_axis="heads")
    with jax.set_mesh(Mesh(np.array(jax.devices()[:2]), ("heads",))):
        found = jax.jit(lambda *args: fused_attend(spread, *args))(tables, layer, q[:, :, -1:], pos[:, -1:])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert {shard.data.shape[1] for shard in found.addressable_shards} == {2}
