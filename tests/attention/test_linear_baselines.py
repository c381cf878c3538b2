"""Linear attention and Performer: their features, and attention equal to the matrix that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.attention.linear import elu_attention, elu_extend, elu_features
from hashml.attention.multi_head import HashedAttention
from hashml.attention.performer import (
    PerformerAttention,
    orthogonal_directions,
    performer_attention,
    performer_features,
)

B, H, K, T, D = 2, 4, 2, 13, 6


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, h, T, D)), jnp.float32) for h in (H, K, K))
    return q, k, v


MASK = np.arange(T)[None] < np.array([[T], [8]])


def dense(phi_q, phi_k, v, causal, epsilon):
    """In float64."""
    phi_q, phi_k, v = (np.asarray(x, np.float64) for x in (phi_q, phi_k, v))
    weights = np.einsum("bhts,bhns->bhtn", phi_q, np.repeat(phi_k, H // K, 1)) * MASK[: len(v), None, None]
    weights = np.tril(weights) if causal else weights
    return weights @ np.repeat(v, H // K, 1) / (weights.sum(-1, keepdims=True) + epsilon)


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_the_features_of_linear_attention_are_elu_plus_one():
    x = np.array([-30.0, -2, -1e-3, 0, 1e-3, 4], np.float32)
    close(elu_features(jnp.asarray(x)), np.where(x > 0, x + 1, np.exp(x.astype(np.float64))), 1e-6)
    assert elu_features(jnp.asarray(x))[0] > 0  # elu + 1 in float32 would be 0
    assert jax.vmap(jax.grad(elu_features))(jnp.asarray([-1e4, 0.0, 1e4])).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_is_its_matrix(inputs, causal):
    q, k, v = inputs
    run = jax.jit(lambda q, k, v: elu_attention(q, k, v, causal=causal, mask=jnp.asarray(MASK), tile=8, chunk=4))
    close(run(q, k, v), dense(elu_features(q), elu_features(k), v, causal, 1e-6))
    close(run(q, k, jnp.ones_like(v)), np.ones(q.shape))


def test_linear_attention_streams(inputs):
    q, k, v = inputs
    state, parts = None, []
    for at in (slice(0, 12), slice(12, 13)):
        out, state = elu_extend(state, q[:, :, at], k[:, :, at], v[:, :, at])
        parts.append(out)
    whole = dense(elu_features(q)[:1], elu_features(k)[:1], v[:1], True, 1e-6)  # a row without padding
    close(np.concatenate(parts, axis=2)[:1], whole)


def test_directions_are_orthogonal_in_blocks():
    directions = np.asarray(orthogonal_directions(jax.random.key(0), 15, D), np.float64)
    units = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    inner = np.abs(units @ units.T - np.eye(15))
    for start in (0, 6, 12):
        assert inner[start : start + 6, start : start + 6].max() < 1e-5
    assert inner.max() > 0.1
    # E |w|^2 = D, with variance 2 D, for each of 6000 rows.
    squares = np.square(orthogonal_directions(jax.random.key(1), 6000, D)).sum(1)
    assert abs(squares.mean() - D) < 4 * np.sqrt(2 * D / 6000)


def test_positive_features_are_unbiased_and_orthogonality_helps():
    """E phi(q) . phi(k) = exp(q . k / sqrt(D)) within four standard errors of 2000 draws."""
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal(D).astype(np.float32) for _ in range(2))
    keys = jax.random.split(jax.random.key(2), 2000)

    def product(directions):
        phi = performer_features(np.stack([q, k]), directions, 0.0, 0.0)
        return phi[0] @ phi[1]

    def independent(key):
        return jax.random.normal(key, (D, D))

    truth = np.exp(q @ k / np.sqrt(D))
    spread = {}
    for name, draw in (("orthogonal", lambda key: orthogonal_directions(key, D, D)), ("independent", independent)):
        found = np.asarray(jax.jit(jax.vmap(lambda key, draw=draw: product(draw(key))))(keys), np.float64)
        assert (found > 0).all()
        assert abs(found.mean() - truth) < 4 * found.std() / np.sqrt(len(found))
        spread[name] = found.var()
    assert spread["orthogonal"] < spread["independent"]


@pytest.mark.parametrize("causal", [False, True])
def test_performer_is_the_matrix_of_its_features(inputs, causal):
    """The stabilisers cancel: with eps = 0 the features may have any constant."""
    q, k, v = inputs
    directions = orthogonal_directions(jax.random.key(3), 10, D)
    how = {"causal": causal, "mask": jnp.asarray(MASK), "epsilon": 0.0, "tile": 8, "chunk": 4}
    found = jax.jit(lambda q, k, v: performer_attention(q, k, v, directions, **how))(q, k, v)
    phi_q, phi_k = (performer_features(x, directions, 0.0, 0.0) for x in (q, k))
    close(found, dense(phi_q, phi_k, v, causal, 0.0))


def test_performer_takes_long_keys_and_ignores_masked_ones(inputs):
    """exp(|k|^2) would overflow; a masked key does not set the scale of the others."""
    q, k, v = inputs
    directions = orthogonal_directions(jax.random.key(3), 10, D)
    run = jax.jit(lambda k: performer_attention(q, k, v, directions, mask=jnp.asarray(MASK)))
    assert np.isfinite(run(100 * k)).all()
    far = jnp.where(jnp.asarray(MASK)[:, None, :, None], k, 50.0)
    np.testing.assert_array_equal(run(far), run(k))


def test_many_directions_come_to_softmax(inputs):
    """The error of 1024 is about an eighth of that of 16, which is 1 / sqrt(64), where logits are small: the
    features of long vectors have heavy tails."""
    q, k, v = 0.3 * inputs[0], 0.3 * inputs[1], inputs[2]
    exact = jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)

    def error(features):
        directions = orthogonal_directions(jax.random.key(5), features, D)
        found = jax.jit(lambda directions: performer_attention(q, k, v, directions, epsilon=0.0))(directions)
        return np.sqrt(np.mean((np.asarray(found) - exact) ** 2))

    assert 1 / 16 < error(1024) / error(16) < 1 / 4


def test_modules():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 8)), jnp.float32)
    for module in (HashedAttention(2, elu_attention, causal=True), PerformerAttention(num_heads=2, causal=True)):
        variables = jax.jit(module.init)(jax.random.key(0), x)
        assert set(variables["params"]) == {"query", "key", "value", "out"}
        run = jax.jit(lambda x, module=module, variables=variables: module.apply(variables, x))
        changed = x.at[:, 6:].add(0.1)
        # Performer's epsilon is relative to the largest key.
        close(run(changed)[:, :6], run(x)[:, :6], 1e-5 if module.attention_fn else 1e-2)
        assert np.abs(run(changed) - run(x))[:, 6:].max() > 1e-3


def test_bad_input_is_refused_by_name(inputs):
    q, k, v = inputs
    with pytest.raises(ValueError, match="directions have width 5 and q 6; they must be the same"):
        performer_attention(q, k, v, jnp.zeros((3, 5)))
    with pytest.raises(ValueError, match="epsilon is -1; it must be finite and at least 0"):
        performer_attention(q, k, v, jnp.zeros((3, D)), epsilon=-1)
    with pytest.raises(ValueError, match="features is 0; it must be at least 1"):
        orthogonal_directions(jax.random.key(0), 0, 4)
    with pytest.raises(ValueError, match="attention_fn is None; it must be a function"):
        HashedAttention(2).init(jax.random.key(0), jnp.zeros((1, 3, 4)))
