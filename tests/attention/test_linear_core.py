"""The core of attention by features: equal to a dense matrix, its gradient to autodiff's, its state to a sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.attention.linear_core import feature_attention, linear_attention
from hashml.attention.linear_state import init_state, merge_states, query_state, update_state

B, H, K, T, D, S, V = 2, 4, 2, 23, 5, 6, 3
STATIC = ("features", "causal", "normalization", "epsilon", "tile", "chunk")

# Compiled once a form and shape: what costs time here is XLA.
attend = jax.jit(feature_attention, static_argnames=STATIC)
attend_mapped = jax.jit(linear_attention, static_argnames=STATIC[1:])


def features(params, x):
    return jax.nn.softplus(x @ params).astype(jnp.float32)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shapes = {"q": (B, H, T, D), "k": (B, K, T, D), "v": (B, K, T, V), "params": (D, S), "g": (B, H, T, V)}
    arrays = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    # The second row starts with padding, so that its first queries see nothing, and ends with it.
    arrays["mask"] = jnp.stack([jnp.ones(T, bool), (jnp.arange(T) >= 3) & (jnp.arange(T) < 17)])
    return arrays


def dense(phi_q, phi_k, v, mask, causal, normalization, epsilon, xp=jnp):
    """The definition: a matrix of weights for every head. ``xp`` is NumPy (in float64) or jax.numpy."""
    phi_k, v = (xp.repeat(x, phi_q.shape[1] // x.shape[1], axis=1) for x in (phi_k, v))
    seen = xp.tril(xp.ones((T, T))) if causal else xp.ones((T, T))
    phi_k = phi_k * mask[:, None, :, None]
    if normalization == "per_bucket":
        phi_q = phi_q / (xp.einsum("tn,bhns->bhts", seen, phi_k) + epsilon)
    weights = xp.einsum("bhts,bhns->bhtn", phi_q, phi_k) * seen
    out = weights @ v
    if normalization == "global":
        mass = weights.sum(-1, keepdims=True) + epsilon
        out = out / xp.where(mass > 0, mass, 1)
    return out


def check(found, expected, tolerance=1e-5):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(1, np.abs(expected).max())


@pytest.mark.parametrize(
    ("causal", "normalization", "epsilon"),
    [(False, "global", 0.0), (False, "per_bucket", 1e-2), (True, "global", 1e-2), (True, "per_bucket", 1e-2)],
)
def test_values_and_gradients_are_those_of_the_dense_form(inputs, causal, normalization, epsilon):
    names = ("q", "k", "v", "params")
    how = {"causal": causal, "mask": inputs["mask"], "normalization": normalization, "epsilon": epsilon}

    def tiled(q, k, v, params):
        out, _ = feature_attention(q, k, v, features=features, params=params, tile=8, chunk=3, **how)
        return (out * inputs["g"]).sum(), out

    def whole(q, k, v, params):
        out = dense(features(params, q), features(params, k), v, **how)
        return (out * inputs["g"]).sum(), out

    point = [inputs[name] for name in names]
    both = [jax.jit(jax.value_and_grad(f, range(4), has_aux=True)) for f in (tiled, whole)]
    ((_, out), gradients), ((_, expected), expected_gradients) = (f(*point) for f in both)
    check(out, expected)
    if causal:  # those rows see no key
        assert not np.asarray(out[1, :, :3]).any()
    for found, truth in zip(gradients, expected_gradients, strict=True):
        check(found, truth, 2e-5)


def mapped(inputs):
    return features(inputs["params"], inputs["q"]), features(inputs["params"], inputs["k"]), inputs["v"]


@pytest.mark.parametrize(("tile", "chunk"), [(23, 1), (14, 7)])
def test_causal_chunks_of_any_size_are_the_dense_form(inputs, tile, chunk):
    """Against NumPy in float64; lengths that chunks and tiles do not divide."""
    phi_q, phi_k, v = mapped(inputs)
    exact_q, exact_k, exact_v = (np.asarray(x, np.float64) for x in (phi_q, phi_k, v))
    expected = dense(exact_q, exact_k, exact_v, np.asarray(inputs["mask"]), True, "global", 0.0, xp=np)
    check(attend_mapped(phi_q, phi_k, v, causal=True, mask=inputs["mask"], tile=tile, chunk=chunk), expected)


def test_the_last_causal_row_sees_what_a_query_without_order_sees(inputs):
    phi_q, phi_k, v = mapped(inputs)
    last = attend_mapped(phi_q, phi_k, v, causal=True)[:, :, -1]
    check(last, attend_mapped(phi_q, phi_k, v)[:, :, -1])


HALVES = (slice(0, 12), slice(12, T))


def test_a_sequence_in_parts_is_the_sequence(inputs):
    """Parts of 1 and 22 tokens through the state, and the state by hand at the end."""
    how = {"features": features, "params": inputs["params"], "causal": True}
    how |= {"normalization": "per_bucket", "epsilon": 1e-3}
    q, k, v, mask = (inputs[name] for name in ("q", "k", "v", "mask"))
    whole, last = attend(q, k, v, mask=mask, **how)
    state, parts = init_state(B, K, S, V), []
    for at in (slice(0, 1), slice(1, T)):
        out, state = attend(q[:, :, at], k[:, :, at], v[:, :, at], mask=mask[:, at], state=state, **how)
        parts.append(out)
    check(np.concatenate(parts, axis=2), whole)
    phi_q, phi_k, _ = mapped(inputs)
    halves = [update_state(init_state(B, K, S, V), phi_k[:, :, at], v[:, :, at], mask[:, at]) for at in HALVES]
    for one in (state, merge_states(*halves)):
        jax.tree.map(check, one, last)
    read = query_state(last, phi_q[:, :, -1:], normalization="per_bucket", epsilon=1e-3)
    check(read[:, :, 0], whole[:, :, -1])


def test_the_state_passes_gradients_between_parts(inputs):
    q, k, v, params, g = (inputs[name] for name in ("q", "k", "v", "params", "g"))
    phi_q, phi_k = features(params, q), features(params, k)

    def whole(phi_q, phi_k, v):
        return (dense(phi_q, phi_k, v, jnp.ones((B, T)), True, "global", 0.0) * g).sum()

    def parts(phi_q, phi_k, v):
        state, total = None, 0.0
        for at in HALVES:
            how = {"features": identity, "state": state, "causal": True, "tile": 4, "chunk": 2}
            out, state = feature_attention(phi_q[:, :, at], phi_k[:, :, at], v[:, :, at], **how)
            total += (out * g[:, :, at]).sum()
        return total

    both = (jax.jit(jax.grad(f, range(3)))(phi_q, phi_k, v) for f in (parts, whole))
    for found, expected in zip(*both, strict=True):
        check(found, expected)


def identity(params, x):
    return x


def test_grouped_heads_are_repeated_keys(inputs):
    phi_q, phi_k, v = mapped(inputs)
    for causal in (False, True):
        grouped = attend_mapped(phi_q, phi_k, v, causal=causal)
        check(grouped, attend_mapped(phi_q, jnp.repeat(phi_k, 2, 1), jnp.repeat(v, 2, 1), causal=causal), 1e-6)


def test_no_key_is_zero_and_nothing_is_nan(inputs):
    q, k, v, params = (inputs[name] for name in ("q", "k", "v", "params"))
    none = jnp.zeros((B, T), bool)
    assert not np.asarray(attend(q, k, v, features=features, params=params, mask=none)[0]).any()

    def total(q, k, v, params):
        out, _ = feature_attention(q, k, v, features=features, params=params, causal=True, mask=none)
        return out.sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, range(4), has_aux=True))(q, k, v, params)
    for one in (out, *gradients):
        np.testing.assert_array_equal(one, np.zeros_like(one))


def test_results_have_the_dtype_of_v_and_sums_are_float32(inputs):
    phi_q, phi_k, v = (x.astype(jnp.bfloat16) for x in mapped(inputs))
    for causal in (False, True):
        out = attend_mapped(phi_q, phi_k, v, causal=causal)
        assert out.dtype == jnp.bfloat16
        exact = attend_mapped(*(x.astype(jnp.float32) for x in (phi_q, phi_k, v)), causal=causal)
        check(out.astype(jnp.float32), exact, 2**-8)  # one rounding, of the result


def sizes_in(jaxpr):
    """Elements of every value of a program, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


@pytest.mark.parametrize("causal", [False, True])
def test_features_of_all_tokens_never_exist(causal):
    """Forward and backward: 512 features a token, and nothing larger than a tile's or a state a tile."""
    tokens, wide, width = 2048, 512, 4
    x = jnp.zeros((1, 1, tokens, width))

    def total(params, x):
        out, _ = feature_attention(x, x, x, features=features, params=params, causal=causal, tile=128, chunk=32)
        return out.sum()

    program = jax.make_jaxpr(jax.grad(total, (0, 1)))(jnp.zeros((width, wide)), x)
    assert max(sizes_in(program.jaxpr)) <= 128 * wide < tokens * wide / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "q has 4 heads and k 3; the heads of k must divide those of q"),
        ({"keys": 5, "causal": True}, "q has 4 tokens and k 5; with causal=True they must be as many"),
        ({"normalization": "softmax"}, "normalization is 'softmax'; it must be 'global' or 'per_bucket'"),
        ({"epsilon": -1.0}, "epsilon is -1.0; it must be finite and at least 0"),
        ({"tile": 0}, "tile is 0; it must be at least 1"),
        ({"chunk": 0}, "chunk is 0; it must be at least 1"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    change = dict(change)
    keys, heads = change.pop("keys", 4), change.pop("heads", 2)
    k = jnp.zeros((1, heads, keys, 3))
    if change.get("normalization") == "softmax":
        # The annotation refuses it first where annotations are checked.
        with pytest.raises(Exception, match="softmax"):
            linear_attention(jnp.zeros((1, 4, 4, 3)), k, k, **change)
        return
    with pytest.raises(ValueError, match=message):
        linear_attention(jnp.zeros((1, 4, 4, 3)), k, k, **change)
