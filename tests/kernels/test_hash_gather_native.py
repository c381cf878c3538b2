"""Native lookups of hashed blocks: XLA's numbers to the bit, its gradients, and who chooses them."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.hashing import Limbs
from hashml.sharing import RobeEmbed, robe_bag, robe_lookup
from hashml_kernels import native, native_xla
from hashml_kernels.hash_gather import hash_gather, hash_gather_bag, native_cpu

native_only = pytest.mark.skipif(not native_cpu.FUNCTIONS.available(), reason="there is no C++ compiler")
BUDGET = 700
GEOMETRIES = [
    {"features": 64, "block_size": 32},
    {"features": 64, "block_size": 64, "wrap": "none"},
    {"features": 40, "block_size": 16, "seed": 3},  # the last block is cut short
    {"features": 30, "block_size": 7, "seed": 4},  # of no length that is compiled in
    {"features": 5, "block_size": 8},
    {"features": 256, "block_size": 128, "align": 100},
    {"features": 3, "block_size": 1},
    {"features": 700, "block_size": 700, "seed": 5},
]


def memory(dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).standard_normal(BUDGET), dtype)


def draw_ids(*shape):
    return np.random.default_rng(2).integers(0, 2**32, shape, dtype=np.uint32)


@native_only
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_are_those_of_xla(geometry, dtype):
    ids = draw_ids(3, 500)
    found = hash_gather(memory(dtype), ids, **geometry, implementation="native")
    expected = hash_gather(memory(dtype), ids, **geometry, implementation="xla")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype("float32"), expected.astype("float32"))


@native_only
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_are_those_of_a_sum_of_rows(geometry, weighted):
    ids = draw_ids(50, 11)
    weights = np.random.default_rng(3).standard_normal((50, 11)).astype(np.float32) if weighted else None
    found = hash_gather_bag(memory(), ids, weights, **geometry, implementation="native")
    rows = np.asarray(hash_gather(memory(), ids, **geometry, implementation="xla"), np.float64)
    expected = (rows * (1 if weights is None else weights[..., None])).sum(axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@native_only
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_that_are_not_valid_are_nan_and_have_no_gradient(dtype):
    ids = jnp.asarray([3, -1, 7, 9, 2**31 - 1], jnp.int32)
    rows = {}
    for implementation in ("native", "xla"):
        read = functools.partial(
            hash_gather, features=12, block_size=8, valid=(ids >= 0) & (ids < 9), implementation=implementation
        )
        out, pull = jax.vjp(lambda m, read=read: read(m, ids), memory(dtype))
        rows[implementation] = (out.astype("float32"), pull(jnp.ones_like(out))[0].astype("float32"))
    np.testing.assert_array_equal(np.isnan(rows["native"][0]).all(axis=1), [False, True, False, True, True])
    for found, expected in zip(rows["native"], rows["xla"], strict=True):
        np.testing.assert_array_equal(found, expected)
    assert rows["native"][1].sum() == 24


@native_only
def test_gradients_are_those_of_xla():
    ids, weights = draw_ids(40, 6), jnp.asarray(np.random.default_rng(4).standard_normal((40, 6)), jnp.float32)

    def loss(memory, weights, implementation):
        options = {"features": 24, "block_size": 8, "implementation": implementation}
        bags = hash_gather_bag(memory, ids, weights, **options)
        return (bags**2).sum() + (hash_gather(memory, ids, **options) ** 3).sum()

    found = jax.grad(loss, (0, 1))(memory(), weights, "native")
    for one, expected in zip(found, jax.grad(loss, (0, 1))(memory(), weights, "xla"), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5)


@native_only
def test_nothing_is_looked_up_and_vmap():
    options = {"features": 24, "block_size": 8, "implementation": "native"}
    assert hash_gather(memory(), np.zeros((0, 3), np.int32), **options).shape == (0, 3, 24)
    np.testing.assert_array_equal(hash_gather_bag(memory(), np.zeros((2, 0), np.int32), **options), np.zeros((2, 24)))
    ids = jnp.asarray(draw_ids(4, 9))
    memories = jnp.stack([memory(), 2 * memory()])
    found = jax.vmap(lambda m: jax.vmap(lambda i: hash_gather(m, i, **options))(ids))(memories)
    expected = hash_gather(memory(), ids, **options)
    np.testing.assert_array_equal(found, np.stack([expected, 2 * expected]))


@pytest.fixture
def alone(monkeypatch):
    """A process with one device; the suite has eight."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def calls_native(function, *arguments):
    return "hashml_hash_gather" in jax.jit(function).lower(*arguments).as_text()


@native_only
def test_auto_is_native_for_long_lookups_of_long_blocks_on_one_device(alone, monkeypatch):
    del alone
    ids = draw_ids(4096).astype(np.int64) % 10**6
    read = functools.partial(robe_lookup, features=64, num_embeddings=10**6)
    assert calls_native(functools.partial(read, block_size=32), memory(), ids)
    assert calls_native(lambda m, i: robe_bag(m, i.reshape(512, 8), features=64, block_size=32), memory(), ids)
    embed = RobeEmbed(10**6, 64, budget=BUDGET, block_size=16)
    assert calls_native(lambda m, i: embed.apply({"params": {"memory": m}}, i), memory(), ids)
    for geometry in ({"block_size": 4}, {"block_size": 32, "sign": "block"}):
        assert not calls_native(functools.partial(read, **geometry), memory(), ids)
    assert not calls_native(functools.partial(read, block_size=32), memory(), ids[:4000])
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not calls_native(functools.partial(read, block_size=32), memory(), ids)


@native_only
def test_ids_beyond_the_table_are_nan_by_native_code_too(alone):
    del alone
    ids = jnp.asarray(np.arange(-10, 5000), jnp.int32)
    found = robe_lookup(memory(), ids, features=64, block_size=32, num_embeddings=4990)
    assert np.isnan(found[:10]).all()
    assert np.isfinite(found[10:5000]).all()
    assert np.isnan(found[5000:]).all()


def test_what_native_code_does_not_serve_is_said():
    read = functools.partial(hash_gather, features=8, implementation="native")
    with pytest.raises(NotImplementedError, match="sign is 'block'; the native code has none"):
        read(memory(), np.arange(3), sign="block")
    with pytest.raises(NotImplementedError, match=r"ids are bits.Limbs; the native code takes ids of 32 bits"):
        read(memory(), Limbs(np.ones(2, np.uint32), np.ones(2, np.uint32)))
    with pytest.raises(NotImplementedError, match="memory has dtype bfloat16; the native gather_bag takes"):
        hash_gather_bag(memory("bfloat16"), np.arange(4).reshape(2, 2), features=8, implementation="native")
    with pytest.raises(ValueError, match=r"valid has shape \(2,\); it must be that of ids, \(3,\)"):
        hash_gather(memory(), np.arange(3), features=8, valid=np.ones(2, bool))


def test_without_a_compiler_xla_serves_and_says_so_once(alone, monkeypatch, tmp_path, caplog):
    del alone
    monkeypatch.setattr(native, "compilers", list)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_xla.load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert not calls_native(
                    functools.partial(robe_lookup, features=64, block_size=32), memory(), draw_ids(5000)
                )
        assert [record.message for record in caplog.records] == [
            "Lookups of hashed blocks run without native code, by XLA's slower gather: no C++ compiler was found "
            "(c++, g++, clang++, or one named by $CXX)"
        ]
        with pytest.raises(native.NativeUnavailable, match="there is no native library: no C"):
            hash_gather(memory(), np.arange(3), features=8, implementation="native")
    finally:
        native_xla.load.cache_clear()
