"""RACE attention: the ten identities of its theory, its gradient, its state, its form over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from hashml.attention import race
from hashml.attention.linear_state import merge_states
from hashml.attention.race import (
    angular_attention,
    race_attention,
    race_extend,
    race_features,
    race_state,
)
from hashml.hashing.simhash import corners, srp_planes

B, H, K, T, D, V, TABLES, BITS = 2, 4, 2, 71, 5, 3, 3, 2
STATIC = ("causal", "normalization", "tile", "chunk")
attend = jax.jit(race_attention, static_argnames=(*STATIC, "implementation"))
extend = jax.jit(race_extend, static_argnames=STATIC)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shapes = {"q": (B, H, T, D), "k": (B, K, T, D), "v": (B, K, T, V), "g": (B, H, T, V)}
    arrays = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    arrays["planes"] = srp_planes(jax.random.key(0), TABLES, BITS, D)
    return arrays


def qkv(inputs):
    return tuple(inputs[name] for name in ("q", "k", "v"))


def dense(q, k, v, planes, beta, *, causal, normalization="global", xp=jnp):
    """The definition with softmax features and a matrix of weights, in NumPy (float64) or jax.numpy."""
    softmax = scipy.special.softmax if xp is np else jax.nn.softmax

    def features(x):
        u = xp.tanh(xp.einsum("bhtd,lpd->bhtlp", x, planes))
        return softmax(beta * u @ corners(BITS).T, axis=-1).reshape(*x.shape[:-1], -1)

    phi_q, phi_k = features(q), xp.repeat(features(k), H // K, axis=1)
    seen = xp.tril(xp.ones((T, T))) if causal else xp.ones((T, T))
    if normalization == "per_bucket":
        phi_q = phi_q / (xp.einsum("tn,bhns->bhts", seen, phi_k) + 1e-6)
    weights = xp.einsum("bhts,bhns->bhtn", phi_q, phi_k) * seen
    out = weights @ xp.repeat(v, H // K, axis=1)
    return out / weights.sum(-1, keepdims=True) if normalization == "global" else out


def exact(inputs, beta, **how):
    q, k, v, planes = (np.asarray(inputs[name], np.float64) for name in ("q", "k", "v", "planes"))
    return dense(q, k, v, planes, beta, **how, xp=np)


def close(found, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_causal_chunks_are_the_dense_form(inputs, chunk):
    found = attend(*qkv(inputs), inputs["planes"], 1.3, causal=True, chunk=chunk)
    close(found, exact(inputs, 1.3, causal=True))


@pytest.mark.parametrize(
    ("causal", "normalization"), [(False, "global"), (False, "per_bucket"), (True, "per_bucket")]
)
def test_equals_the_dense_form(inputs, causal, normalization):
    how = {"causal": causal, "normalization": normalization}
    close(attend(*qkv(inputs), inputs["planes"], 1.3, tile=32, **how), exact(inputs, 1.3, **how))


@pytest.mark.parametrize("causal", [False, True])
def test_constant_values_come_back_and_rows_lie_in_the_hull(inputs, causal):
    q, k, v = qkv(inputs)
    constant = jnp.broadcast_to(jnp.array([1.0, -2.0, 0.5]), v.shape)
    for beta in (1.0, 20.0):
        found = attend(q, k, constant, inputs["planes"], beta, causal=causal)
        close(found, np.broadcast_to(constant[0, 0, 0], found.shape), 1e-6)
        found = np.asarray(attend(q, k, v, inputs["planes"], beta, causal=causal)).reshape(B, K, -1, T, V)
        for bound, outside in ((v.max(2), found.max((2, 3))), (-v.min(2), (-found).max((2, 3)))):
            assert (outside <= np.asarray(bound) + 1e-5).all()


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernels_package_computes_the_same(inputs, causal):
    found = attend(*qkv(inputs), inputs["planes"], 1.3, causal=causal, implementation="xla")
    close(found, exact(inputs, 1.3, causal=causal))


def test_kernels_are_for_the_global_form(inputs):
    with pytest.raises(NotImplementedError, match="implementation is 'xla' with normalization='per_bucket'"):
        attend(*qkv(inputs), inputs["planes"], normalization="per_bucket", implementation="xla")


def test_a_machine_with_a_gpu_takes_its_kernel(inputs, monkeypatch):
    """By name of the backend that jax would run on; the program for it is looked at in tests/kernels."""
    taken = []

    def kernel(q, k, v, *_, implementation, **how):
        taken.append(implementation)
        return jnp.zeros((*q.shape[:3], v.shape[3]))

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(race.kernels, "race_attention", kernel)
    for normalization in ("global", "per_bucket"):
        attention = functools.partial(race_attention, normalization=normalization)
        jax.eval_shape(attention, *qkv(inputs), inputs["planes"])
    assert taken == ["auto"]


def test_per_bucket_sums_the_tables(inputs):
    """A constant comes back L times: each table's buckets have that mean."""
    q, k, v = qkv(inputs)
    found = attend(q, k, jnp.ones_like(v), inputs["planes"], 1.3, causal=True, normalization="per_bucket")
    # 1e-6 in the mass of a bucket that a first token has filled by a hundredth or so.
    close(found, np.full(found.shape, TABLES, np.float32), 1e-3)


def test_the_last_causal_row_and_the_order_of_keys(inputs):
    q, k, v = qkv(inputs)
    whole = attend(q, k, v, inputs["planes"], 1.3, causal=False)
    close(attend(q, k, v, inputs["planes"], 1.3, causal=True)[:, :, -1], whole[:, :, -1])
    order = np.random.default_rng(3).permutation(T)
    close(attend(q, k[:, :, order], v[:, :, order], inputs["planes"], 1.3, causal=False), whole)


@pytest.fixture(scope="module")
def gradients(inputs):
    """``f(beta) -> (out, (dq, dk, dv, dbeta, dplanes))`` of both forms, compiled once."""

    def gradient_of(form):
        def total(q, k, v, beta, planes):
            out = form(q, k, v, planes, beta)
            return (out * inputs["g"]).sum(), out

        compiled = jax.jit(jax.value_and_grad(total, range(5), has_aux=True))

        def at(beta):
            (_, out), found = compiled(*qkv(inputs), jnp.float32(beta), inputs["planes"])
            return out, found

        return at

    forms = {}
    for causal in (False, True):
        own = functools.partial(race_attention, causal=causal, tile=16, chunk=8)
        forms[causal] = (gradient_of(own), gradient_of(functools.partial(dense, causal=causal)))
    return forms


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_autodiffs_of_the_dense_form(gradients, causal):
    own, whole = gradients[causal]
    (out, found), (expected_out, expected) = own(1.3), whole(1.3)
    close(out, expected_out)
    for one, truth in zip(found[:4], expected[:4], strict=True):
        scale = np.abs(truth).max()
        close(one / scale, truth / scale)
    assert not np.asarray(found[4]).any()  # the planes are not trained


@pytest.mark.parametrize("causal", [False, True])
def test_beta_zero_is_the_mean_and_the_kernel_is_even(gradients, inputs, causal):
    own, _ = gradients[causal]
    out, (dq, dk, *_) = own(0.0)
    v = np.repeat(np.asarray(inputs["v"], np.float64), H // K, axis=1)
    mean = (
        np.cumsum(v, 2) / np.arange(1, T + 1)[:, None] if causal else np.broadcast_to(v.mean(2)[:, :, None], v.shape)
    )
    close(out, mean)
    assert not np.asarray(dq).any()
    assert not np.asarray(dk).any()
    close(own(-0.7)[0], own(0.7)[0], 1e-6)


def test_the_hard_kernel_is_the_angles_power_and_a_soft_one_is_flatter():
    """Over 4000 tables at beta = 1e3: (1 - angle / pi)**P within four standard errors. At beta = 0 it is 2**-P, at
    small beta between the two; the bias falls as beta grows through 1, 4 and 16."""
    tables, bits = 4000, 3
    planes = srp_planes(jax.random.key(7), tables, bits, 16)
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((2, 16)).astype(np.float32)
    y = (0.8 * x / np.linalg.norm(x) + 0.6 * y / np.linalg.norm(y)) * np.linalg.norm(x)
    law = (1 - np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) / np.pi) ** bits
    found = {}
    for beta in (1.0, 4.0, 16.0, 1e3):
        phi = np.asarray(race_features(planes, beta, np.stack([x, y])), np.float64).reshape(2, tables, -1)
        products = (phi[0] * phi[1]).sum(-1)
        found[beta] = products.mean(), products.std() / np.sqrt(tables)
    assert abs(found[1e3][0] - law) < 4 * found[1e3][1]
    bias = [abs(found[beta][0] - law) for beta in (1.0, 4.0, 16.0)]
    assert bias[0] > bias[1] + 4 * found[4.0][1]
    assert bias[1] > bias[2]


def test_many_hard_tables_come_to_angular_attention():
    """The error of 512 tables is about a quarter of that of 32, which is 1 / sqrt(16)."""
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 1, 40, 8)), jnp.float32) for _ in range(3))
    target = angular_attention(q, k, v, 2)

    def error(tables):
        found = attend(q, k, v, srp_planes(jax.random.key(1), tables, 2, 8), 1e3)
        return float(jnp.sqrt(jnp.mean((found - target) ** 2)))

    assert 1 / 8 < error(512) / error(32) < 1 / 2


def test_angular_attention_is_its_formula(inputs):
    q, k, v = (np.asarray(x, np.float64) for x in qkv(inputs))
    mask = np.arange(T)[None] < np.array([[T], [9]])
    found = angular_attention(inputs["q"], inputs["k"], inputs["v"], 3, causal=True, mask=jnp.asarray(mask))
    for row, head, t in [(0, 0, 0), (0, 3, 70), (1, 2, 40), (1, 1, 5)]:
        keys, values = k[row, head // 2], v[row, head // 2]
        cosines = keys @ q[row, head, t] / np.linalg.norm(keys, axis=1) / np.linalg.norm(q[row, head, t])
        weights = (1 - np.arccos(cosines) / np.pi) ** 3 * (np.arange(T) <= t) * mask[row]
        close(found[row, head, t], weights @ values / weights.sum())


def test_the_state_streams_and_adds_up(inputs):
    """Five tokens at once and then one by one; and two halves of the keys."""
    q, k, v = qkv(inputs)
    planes = inputs["planes"]
    whole, last = extend(None, q, k, v, planes, 1.3, causal=True)
    state, parts = race_state(B, K, planes, V), []
    for at in (slice(0, 60), *(slice(t, t + 1) for t in range(60, T))):
        out, state = extend(state, q[:, :, at], k[:, :, at], v[:, :, at], planes, 1.3, causal=True)
        parts.append(out)
    close(np.concatenate(parts, axis=2), whole)
    close(state, last)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, race_state(B, K, planes, V))
    halves = [
        extend(None, q, k[:, :, at], v[:, :, at], planes, 1.3, causal=False)[1] for at in (slice(40), slice(40, T))
    ]
    close(merge_states(*halves), last)


def test_padding_is_as_if_the_keys_were_not_there(inputs):
    q, k, v = qkv(inputs)
    mask = jnp.arange(T)[None] < jnp.array([[60], [60]])
    found = attend(q, k, v, inputs["planes"], 1.3, causal=False, mask=mask)
    close(found, attend(q, k[:, :, :60], v[:, :, :60], inputs["planes"], 1.3, causal=False))


def test_nothing_is_nan_at_any_length_or_temperature(inputs):
    """Vectors of length 0 and 1e18, beta large; queries whose buckets hold no key."""
    q, k, v = qkv(inputs)
    scale = jnp.where(jnp.arange(T) % 3 == 0, 1e18, 0.0)[:, None]

    def total(q, k, v, beta):
        out = race_attention(q, k, v, inputs["planes"], beta, causal=True)
        return (out**2).sum(), out

    run = jax.jit(jax.value_and_grad(total, range(4), has_aux=True))
    for beta in (20.0, 1e3):
        (_, out), found = run(q * scale, -k * scale, v, jnp.float32(beta))
        assert all(np.isfinite(one).all() for one in (out, *found))
    # All keys opposite to the query: no bucket is shared, and the floor makes it the mean.
    alone = attend(
        jnp.ones((1, 1, 1, D)), -jnp.ones((1, 1, 4, D)), jnp.arange(4.0).reshape(1, 1, 4, 1), inputs["planes"], 1e3
    )
    close(alone, np.full((1, 1, 1, 1), 1.5))


def test_a_gradient_keeps_no_second_copy_of_a_long_sequence():
    """A copy within the loop over tiles would be made in every step: time would grow as the square of the length."""
    length, planes = 2**15, srp_planes(jax.random.key(0), TABLES, BITS, 64)
    x = jax.ShapeDtypeStruct((1, 1, length, 64), jnp.float32)

    def gradient(q, k, v, g):
        out, pull = jax.vjp(lambda q, k, v: race_attention(q, k, v, planes), q, k, v)
        return out, *pull(g)

    memory = jax.jit(gradient).lower(x, x, x, x).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * length * 64 / 2


@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_over_eight_devices_is_the_sequence(inputs, causal):
    """Values and the state; in order, where states are exchanged before the pass, all gradients too."""
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    split, everywhere = jax.P(None, None, "sequence"), jax.P()
    q, k, v, g = (inputs[name][:, :, :64] for name in ("q", "k", "v", "g"))
    mask = jnp.arange(64)[None] < jnp.array([[64], [50]])
    how = {"causal": causal, "tile": 4, "chunk": 3}

    def part(q, k, v, mask, beta):
        return race_extend(None, q, k, v, inputs["planes"], beta, mask=mask, axis_name="sequence", **how)

    over = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(split, split, split, jax.P(None, "sequence"), everywhere),
        out_specs=(split, everywhere),
    )

    def one(q, k, v, mask, beta):
        return race_extend(None, q, k, v, inputs["planes"], beta, mask=mask, causal=causal)

    if not causal:  # its gradient is autodiff's alone
        q, k, v = (x[:1] for x in (q, k, v))
        found, expected = (jax.jit(f)(q, k, v, mask[:1], jnp.float32(1.3)) for f in (over, one))
        close(found, expected, 2e-5)
        return

    def gradient(f):
        def total(q, k, v, beta):
            out, state = f(q, k, v, mask, beta)
            return (out * g).sum() + state.value.sum(), (out, state)

        return jax.jit(jax.value_and_grad(total, range(4), has_aux=True))

    ((_, found), found_gradients), ((_, expected), expected_gradients) = (
        gradient(f)(q, k, v, jnp.float32(1.3)) for f in (over, one)
    )
    close(found, expected, 2e-5)
    close(found_gradients, expected_gradients, 1e-4)


def test_bad_powers_are_refused():
    x = jnp.zeros((1, 2, 3, 4))
    with pytest.raises(ValueError, match="power is 0; it must be positive and finite"):
        angular_attention(x, x, x, 0)
    with pytest.raises(ValueError, match="q has 2 heads and k 3; the heads of k must divide"):
        angular_attention(x, jnp.zeros((1, 3, 3, 4)), jnp.zeros((1, 3, 3, 4)), 2)
    with pytest.raises(ValueError, match="q has 3 tokens and k 5; with causal=True they must be as many"):
        angular_attention(x, jnp.zeros((1, 2, 5, 4)), jnp.zeros((1, 2, 5, 4)), 2, causal=True)
