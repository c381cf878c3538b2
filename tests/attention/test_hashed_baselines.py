"""Linformer, Reformer and YOSO: exact in a limit, gradients as the papers state them, what a token may not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from hashml.attention.linformer import LinformerAttention, linformer_attention
from hashml.attention.reformer import ReformerAttention, reformer_attention, reformer_rotations
from hashml.attention.yoso import YosoAttention, yoso_attention, yoso_expected
from hashml.hashing.simhash import srp_planes

B, H, K, N, D = 2, 4, 2, 16, 6
MASK = np.arange(N)[None] < np.array([[N], [11]])


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, h, N, D)), jnp.float32) for h in (H, K, K))
    return q, k, v


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def softmax_attention(q, k, v, seen):
    """Dense, in float64, with a hidden logit where a pair is not seen."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bhtd,bhnd->bhtn", q, k) / np.sqrt(q.shape[-1])
    return scipy.special.softmax(np.where(seen, logits, -1e30), axis=-1) @ v


# Linformer


def test_linformer_that_mixes_nothing_is_exact(inputs):
    q, k, v = inputs
    found = linformer_attention(q, k, v, jnp.eye(N), jnp.eye(N))
    close(found, softmax_attention(q, np.repeat(k, 2, 1), np.repeat(v, 2, 1), True))


def test_linformer_does_not_read_masked_keys(inputs):
    q, k, v = inputs
    mix = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, N)), jnp.float32)
    at = jnp.asarray(MASK)[:, None, :, None]
    found = linformer_attention(q, k, v, *mix, mask=jnp.asarray(MASK))
    other = linformer_attention(q, jnp.where(at, k, 7.0), jnp.where(at, v, -9.0), *mix, mask=jnp.asarray(MASK))
    np.testing.assert_array_equal(found, other)
    short = linformer_attention(q[1:], k[1:, :, :11], v[1:, :, :11], *mix)
    close(found[1:], short)


def test_linformer_stores_its_mixers():
    module = LinformerAttention(num_heads=2, max_length=20, mixtures=3)
    x = jnp.ones((1, 9, 8))
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    assert shapes["mix_k"] == shapes["mix_v"] == (3, 20)
    for change, message in [
        ({"causal": True}, "causal is True; a mixture of Linformer's has seen every key"),
        ({"mixtures": 0}, "mixtures is 0; it must be at least 1"),
        ({"max_length": 8}, "k has 9 tokens; mix_k and mix_v take at most 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            LinformerAttention(**({"num_heads": 2, "max_length": 20} | change)).init(jax.random.key(0), x)


# Reformer


@pytest.fixture(scope="module")
def shared(inputs):
    q, _, _ = inputs
    return q, jnp.asarray(np.random.default_rng(3).standard_normal((B, H, N, 3)), jnp.float32)


def reformer_dense(qk, v, causal, mask):
    """Attention over the other tokens, with keys of length 1; over itself where there is no other."""
    qk = np.asarray(qk, np.float64)
    keys = qk / np.linalg.norm(qk, axis=-1, keepdims=True)
    seen = np.broadcast_to(mask[:, None, None], (B, 1, N, N)) & (np.tri(N, dtype=bool) if causal else True)
    others = seen & ~np.eye(N, dtype=bool)
    alone = ~others.any(-1, keepdims=True)
    return softmax_attention(qk, keys, v, others | (alone & seen))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [N, N // 2])
def test_reformer_is_exact_where_every_token_meets_every_other(shared, causal, chunk):
    """In one chunk, or in two that see each other; with duplicates counted once or as often as they come."""
    rotations = reformer_rotations(jax.random.key(0), 2, D, 4)
    run = jax.jit(reformer_attention, static_argnames=("causal", "chunk", "count_once"))
    qk, v = shared
    for count_once in (False, True):
        how = {"causal": causal, "chunk": chunk, "count_once": count_once}
        close(run(qk, v, rotations, mask=jnp.asarray(MASK), **how), reformer_dense(qk, v, causal, MASK))


def test_reformer_is_a_loop_over_sorted_chunks(shared):
    """One round, chunks of 4, buckets kept apart, against a loop."""
    qk, v = (np.asarray(x, np.float64) for x in shared)
    rotations = reformer_rotations(jax.random.key(1), 1, D, 4)
    found = reformer_attention(shared[0], shared[1], rotations, causal=True, chunk=4, same_bucket=True)
    for row, head in [(0, 0), (1, 3)]:
        turned = qk[row, head] @ np.asarray(rotations[0], np.float64)
        bucket = np.concatenate([turned, -turned], axis=1).argmax(1)
        order = sorted(range(N), key=lambda t: (bucket[t], t))
        chunk_of = {token: place // 4 for place, token in enumerate(order)}
        for t in range(N):
            near = [
                s for s in range(t) if chunk_of[s] in (chunk_of[t], (chunk_of[t] - 1) % 4) and bucket[s] == bucket[t]
            ]
            near = near or [t]
            keys = qk[row, head, near] / np.linalg.norm(qk[row, head, near], axis=1, keepdims=True)
            weights = scipy.special.softmax(keys @ qk[row, head, t] / np.sqrt(D))
            close(found[row, head, t], weights @ v[row, head, near], 1e-4)


def test_reformer_reads_nothing_later(shared):
    """No derivative of a row by what comes after it, and none by chance: earlier ones have one."""
    rotations = reformer_rotations(jax.random.key(2), 2, D, 4)

    def early(qk, v):
        return (reformer_attention(qk, v, rotations, causal=True, chunk=4, count_once=True)[:, :, :9] ** 2).sum()

    for gradient in jax.jit(jax.grad(early, (0, 1)))(*shared):
        assert not np.asarray(gradient[:, :, 9:]).any()
        assert np.asarray(gradient[:, :, :9]).any()


def test_more_rounds_come_closer_to_exact():
    rng = np.random.default_rng(8)
    qk, v = (jnp.asarray(rng.standard_normal((1, 8, 64, 8)), jnp.float32) for _ in range(2))
    keys = qk / jnp.linalg.norm(qk, axis=-1, keepdims=True)
    exact = softmax_attention(qk, keys, v, ~np.eye(64, dtype=bool))

    def error(rounds):
        rotations = reformer_rotations(jax.random.key(4), rounds, 8, 8)
        found = jax.jit(lambda qk, v: reformer_attention(qk, v, rotations, chunk=8, count_once=True))(qk, v)
        return np.sqrt(np.mean((np.asarray(found) - exact) ** 2))

    assert error(16) < error(1) / 2


def test_the_reformer_module_has_no_keys_of_its_own():
    x = jnp.ones((1, 16, 8))
    module = ReformerAttention(num_heads=2, num_kv_heads=1, chunk=4, rounds=2)
    assert set(jax.eval_shape(module.init, jax.random.key(0), x)["params"]) == {"query", "value", "out"}
    for change, call, message in [
        ({"chunk": 16}, {}, "chunk is 16; twice it must divide the 16 tokens, or buckets be given"),
        ({"chunk": 5, "buckets": 2}, {}, "chunk is 5; it must divide the 16 tokens"),
        ({"chunk": 16, "buckets": 3}, {}, "buckets is 3; it must be even"),
        ({"rounds": 0}, {}, "rounds is 0; it must be at least 1"),
        ({}, {"inputs_k": x + 1}, "inputs_k is given and share_qk is True"),
    ]:
        with pytest.raises(ValueError, match=message):
            ReformerAttention(**({"num_heads": 2, "chunk": 4} | change)).init(jax.random.key(0), x, **call)


# YOSO


def collision_rate(q, k, bits):
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    cosines = np.einsum("bhtd,bhnd->bhtn", q, k) / np.linalg.norm(q, axis=-1)[..., None]
    cosines = cosines / np.linalg.norm(k, axis=-1)[:, :, None]
    return (1 - np.arccos(np.clip(cosines, -1, 1)) / np.pi) ** bits


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_yosos_expectation_is_its_formula_and_rows_have_length_one(inputs):
    q, k, v = inputs
    rate = collision_rate(q, np.repeat(k, 2, 1), 4) * MASK[:, None, None]
    expected = unit(rate @ np.repeat(np.asarray(v, np.float64), 2, 1))
    close(yoso_expected(q, k, v, 4, mask=jnp.asarray(MASK)), expected)
    found = yoso_attention(q, k, v, srp_planes(jax.random.key(0), 64, 4, D), mask=jnp.asarray(MASK))
    close(np.linalg.norm(found, axis=-1), np.ones(found.shape[:-1]))


def test_rounds_come_to_the_expectation(inputs):
    """The error of 1024 rounds is about a quarter of that of 64, which is 1 / sqrt(16)."""
    q, k, v = inputs
    exact = yoso_expected(q, k, v, 3)

    def error(rounds):
        found = yoso_attention(q, k, v, srp_planes(jax.random.key(1), rounds, 3, D))
        return float(jnp.sqrt(jnp.mean((found - exact) ** 2)))

    assert 1 / 8 < error(1024) / error(64) < 1 / 2


@pytest.fixture(scope="module")
def yoso_gradients():
    rng = np.random.default_rng(4)
    q, k, v, g = (jnp.asarray(rng.standard_normal((1, 1, N, D)), jnp.float32) for _ in range(4))

    def gradient(attend):
        return jax.jit(jax.grad(lambda q, k, v: (attend(q, k, v) * g).sum(), range(3)))(q, k, v)

    return (q, k, v, g), gradient


def stated_gradient(arrays, matrix, bits):
    """The card's formula for collisions ``matrix``, with the lengths taken by the chain rule, in float64."""
    q, k, v, g = (np.asarray(x, np.float64)[0, 0] for x in arrays)
    y = matrix @ v

    def through_unit(x, dx):
        u = x / np.linalg.norm(x, axis=1, keepdims=True)
        return (dx - (dx * u).sum(1, keepdims=True) * u) / np.linalg.norm(x, axis=1, keepdims=True)

    dy = through_unit(y, g)
    slope = (dy @ v.T) * matrix * bits / 2
    return through_unit(q, slope @ unit(k)), through_unit(k, slope.T @ unit(q)), matrix.T @ dy


def test_the_gradient_of_the_expectation_is_the_stated_one(yoso_gradients):
    arrays, gradient = yoso_gradients
    expected = stated_gradient(arrays, collision_rate(arrays[0], arrays[1], 3)[0, 0], 3)
    for found, truth in zip(gradient(lambda q, k, v: yoso_expected(q, k, v, 3)), expected, strict=True):
        close(found[0, 0], truth, 1e-4)


def test_the_gradient_of_the_rounds_is_the_stated_one(yoso_gradients):
    """With the very collisions of the rounds."""
    arrays, gradient = yoso_gradients
    planes = srp_planes(jax.random.key(6), 50, 3, D)
    bits = [np.einsum("td,mpd->tmp", np.asarray(x)[0, 0], planes) >= 0 for x in arrays[:2]]
    matrix = (bits[0][:, None] == bits[1][None]).all(-1).mean(-1)
    expected = stated_gradient(arrays, matrix, 3)
    for found, truth in zip(gradient(lambda q, k, v: yoso_attention(q, k, v, planes)), expected, strict=True):
        close(found[0, 0], truth, 1e-4)


def test_bad_input_of_yoso_is_refused_by_name(inputs):
    q, k, v = inputs
    with pytest.raises(ValueError, match="planes has 17 bits a table"):
        yoso_attention(q, k, v, jnp.zeros((1, 17, D)))
    with pytest.raises(ValueError, match="bits is 0; it must be at least 1"):
        yoso_expected(q, k, v, 0)
    with pytest.raises(ValueError, match="q has 3 heads and k 2; the heads of k must divide"):
        yoso_expected(q[:, :3], k, v, 2)
    with pytest.raises(ValueError, match="causal is True; a bucket of YOSO's sums all of its keys"):
        YosoAttention(num_heads=2, causal=True).init(jax.random.key(0), jnp.zeros((1, 4, 8)))
