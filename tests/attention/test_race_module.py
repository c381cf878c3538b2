"""The module of RACE attention: it takes the place of Flax's, decodes, and keeps its temperature in range."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.attention.race import RaceAttention, race_attention
from hashml.hashing.simhash import srp_planes


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_the_module_takes_the_place_of_flaxs():
    """Names, parameters, and at beta tiny the mean of the values, which no attention weights could hide."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 10, 16)), jnp.float32)
    common = {"num_heads": 4, "qkv_features": 8, "out_features": 12, "use_bias": False}
    ours, theirs = RaceAttention(**common, tables=3, bits=2), nn.MultiHeadDotProductAttention(**common)
    softmax = jax.eval_shape(theirs.init, jax.random.key(0), x)
    variables = jax.jit(ours.init)(jax.random.key(0), x)
    assert set(variables) == {"params"}
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes.pop("log_beta") == ()
    assert shapes == jax.tree.map(jnp.shape, softmax["params"])
    out = jax.jit(ours.apply)(variables, x)
    assert out.shape == (2, 3, 10, 12)
    # What the module must be, from the function: projections, attention, projection.
    params = variables["params"]
    q, k, v = (jnp.einsum("abtf,fhd->abhtd", x, params[name]["kernel"]) for name in ("query", "key", "value"))
    planes = srp_planes(jax.random.key(0), 3, 2, 2)
    q, k, v = (one.reshape(6, 4, 10, 2) for one in (q, k, v))
    heads = race_attention(q, k, v, planes)
    expected = jnp.einsum("bhtd,hdo->bto", heads, params["out"]["kernel"]).reshape(2, 3, 10, 12)
    close(out, expected)
    # Padding as Flax says it.
    mask = nn.make_attention_mask(
        jnp.ones((2, 3, 1)), jnp.arange(10) < jnp.array([[[6], [10], [3]], [[1], [9], [10]]])
    )
    apply = jax.jit(ours.apply)
    close(apply(variables, x, mask=mask)[0, 0], apply(variables, x[0, 0], x[0, 0, :6]))


def test_the_module_decodes():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 9, 8)), jnp.float32)
    how = {"num_heads": 2, "num_kv_heads": 1, "causal": True, "tables": 2, "bits": 2}
    decoder = RaceAttention(**how, decode=True)
    variables = jax.jit(decoder.init)(jax.random.key(0), x[:, :1])
    cache, outs = variables["cache"], []
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(cache))
    step = jax.jit(lambda cache, x: decoder.apply({**variables, "cache": cache}, x, mutable=["cache"]))
    for at in (slice(0, 8), slice(8, 9)):
        out, moved = step(cache, x[:, at])
        cache, outs = moved["cache"], [*outs, out]
    whole = jax.jit(RaceAttention(**how).apply)({"params": variables["params"]}, x)
    close(np.concatenate(outs, axis=1), whole)


def test_beta_is_clipped_and_may_stay():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 6, 8)), jnp.float32)
    module = RaceAttention(num_heads=2, tables=2, bits=2)
    params = module.init(jax.random.key(0), x)["params"]
    run = jax.jit(lambda log_beta: module.apply({"params": {**params, "log_beta": jnp.float32(log_beta)}}, x))
    for beyond, bound in ((-50.0, np.log(1e-2)), (50.0, np.log(20.0))):
        close(run(beyond), run(bound), 1e-6)
    fixed = RaceAttention(num_heads=2, tables=2, bits=2, beta=0.5, trainable_beta=False)
    assert "log_beta" not in fixed.init(jax.random.key(0), x)["params"]
    params.pop("log_beta")
    close(fixed.apply({"params": params}, x), run(np.log(0.5)), 1e-6)


def test_dropout_needs_a_key_and_falls_on_the_heads():
    x = jnp.ones((1, 6, 8))
    module = RaceAttention(num_heads=2, tables=2, bits=2, dropout_rate=0.5)
    variables = jax.jit(lambda x: module.init(jax.random.key(0), x, deterministic=True))(x)

    def heads(**how):
        """The projection's input is its output where the projection is the identity."""
        params = {**variables["params"], "out": {"kernel": jnp.eye(8).reshape(2, 4, 8), "bias": jnp.zeros(8)}}
        return np.asarray(module.apply({"params": params}, x, **how)[0])

    quiet = heads(deterministic=True)
    loud = heads(deterministic=False, dropout_rng=jax.random.key(1))
    dropped = loud == 0
    assert 0 < dropped.sum() < dropped.size
    close(loud[~dropped], 2 * quiet[~dropped])


SMALL = jnp.zeros((2, 6, 8))


@pytest.mark.parametrize(
    ("module", "call", "message"),
    [
        (
            {},
            {"mask": jnp.ones((2, 1, 6, 6), bool)},
            r"mask has shape \(2, 1, 6, 6\).*for queries in order set causal",
        ),
        ({}, {"mask": jnp.ones((3, 1, 1, 6), bool)}, r"mask has shape \(3, 1, 1, 6\); it must broadcast to"),
        ({}, {"sow_weights": True}, "sow_weights is True; hashed attention forms no weights"),
        ({}, {"inputs_v": SMALL}, "inputs_k is None and inputs_v is given; values need keys"),
        ({"num_heads": 3}, {}, "num_heads is 3; it must divide qkv_features = 8"),
        ({"num_kv_heads": 3}, {}, "num_kv_heads is 3; it must divide num_heads = 4"),
        ({"beta": 30.0}, {}, "beta is 30.0; it must lie in 0.01..20.0"),
        ({"decode": True}, {}, "decode is True and causal is False"),
        ({"tables": 0}, {}, "tables is 0; it must be at least 1"),
        ({"bits": 17}, {}, "planes has 17 bits a table"),
        ({"causal": True}, {"inputs_k": jnp.zeros((2, 5, 8))}, "q has 6 tokens and k 5; with causal=True"),
    ],
)
def test_bad_input_is_refused_by_name(module, call, message):
    with pytest.raises(ValueError, match=message):
        RaceAttention(**({"num_heads": 4} | module)).init(jax.random.key(0), SMALL, **call)
