"""RACE over chunks that never lie in memory together: equal to one pass over everything, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.attention.linear_state import merge_states
from hashml.attention.race import race_attention, race_state
from hashml.attention.race_streamed import collect_keys, pull_keys, pull_queries, read_queries
from hashml.hashing.simhash import srp_planes

B, H, K, T, D, V = 2, 4, 2, 45, 5, 3
CHUNKS = (slice(0, 15), slice(15, 30), slice(30, 45))
PLANES = srp_planes(jax.random.key(0), 3, 2, D)
BETA = 1.3


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shapes = ((B, H, T, D), (B, K, T, D), (B, K, T, V), (B, H, T, V))
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def streamed(inputs, normalization):
    """The four passes; outputs and gradients put together again."""
    q, k, v, g = inputs
    collect, pull_k = jax.jit(collect_keys), jax.jit(pull_keys)
    read, pull_q = (jax.jit(f, static_argnames="normalization") for f in (read_queries, pull_queries))
    state = race_state(B, K, PLANES, V)
    for at in CHUNKS:
        state = collect(state, k[:, :, at], v[:, :, at], PLANES, BETA)
    out, d_q, d_state, d_beta = [], [], jax.tree.map(jnp.zeros_like, state), 0.0
    for at in CHUNKS:
        out.append(read(state, q[:, :, at], PLANES, BETA, normalization=normalization))
        pulled = pull_q(state, q[:, :, at], g[:, :, at], PLANES, BETA, normalization=normalization)
        d_q.append(pulled.d_q)
        d_state, d_beta = merge_states(d_state, pulled.d_state), d_beta + pulled.d_beta
    d_k, d_v = [], []
    for at in CHUNKS:
        pulled = pull_k(d_state, k[:, :, at], v[:, :, at], PLANES, BETA)
        d_k.append(pulled.d_k)
        d_v.append(pulled.d_v)
        d_beta = d_beta + pulled.d_beta
    joined = (np.concatenate(parts, axis=2) for parts in (out, d_q, d_k, d_v))
    return *joined, np.asarray(d_beta)


@pytest.mark.parametrize("normalization", ["global", "per_bucket"])
def test_chunks_equal_one_pass_and_its_gradient(inputs, normalization):
    q, k, v, g = inputs

    @jax.jit
    def whole(q, k, v, beta, g):
        def attend(q, k, v, beta):
            return race_attention(q, k, v, PLANES, beta, normalization=normalization)

        out, pull = jax.vjp(attend, q, k, v, beta)
        return out, *pull(g)

    expected = whole(q, k, v, jnp.float32(BETA), g)
    for name, found, right in zip(
        ("out", "d_q", "d_k", "d_v", "d_beta"), streamed(inputs, normalization), expected, strict=True
    ):
        np.testing.assert_allclose(found, right, rtol=2e-5, atol=1e-5, err_msg=name)


def test_bad_input_is_named(inputs):
    q, k, v, _ = inputs
    state = race_state(B, K, PLANES, V)
    with pytest.raises(ValueError, match=r"state has the value of shape \(2, 12, 3\).* need \(2, 12, 2\)"):
        collect_keys(state, k, v[..., :2], PLANES)
    with pytest.raises(ValueError, match=r"these keys and planes need \(2, 8, 3\)"):
        read_queries(state, q, PLANES[:2])
    with pytest.raises(ValueError, match="q has 3 heads and the state 2"):
        read_queries(state, q[:, :3], PLANES)
