"""The rotation is multiplication by a complex number of modulus 1, in either convention of pairs."""

import cmath
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.models.rotary import Rotary, half_from_interleaved

LLAMA3 = ("llama3", 8.0, 1.0, 4.0, 64)
ROTARIES = [
    Rotary(),
    Rotary(500.0, "interleaved"),
    Rotary(100, "half", ("linear", 4.0)),
    Rotary(10000.0, "half", LLAMA3),
]


def vectors(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def naive_frequency(rotary, pair, width):
    """The definition, a pair at a time; of Llama 3.1 by its three branches of wavelengths."""
    frequency = rotary.theta ** (-2 * pair / width)
    if rotary.scaling is None:
        return frequency
    if rotary.scaling[0] == "linear":
        return frequency / rotary.scaling[1]
    _, factor, low, high, context = rotary.scaling
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


@pytest.mark.parametrize("rotary", ROTARIES, ids=str)
def test_pairs_are_turned_as_complex_numbers(rotary):
    width, positions = 8, [0, 1, 17, 300, -1]
    x = np.asarray(vectors(0, 1, 2, len(positions), width))
    expected = np.zeros_like(x)
    for head in range(2):
        for n, p in enumerate(positions):
            for i in range(width // 2):
                a, b = (i, i + width // 2) if rotary.pairs == "half" else (2 * i, 2 * i + 1)
                turned = complex(x[0, head, n, a], x[0, head, n, b]) * cmath.exp(
                    1j * p * naive_frequency(rotary, i, width)
                )
                expected[0, head, n, a], expected[0, head, n, b] = turned.real, turned.imag
    found = rotary.rotate(jnp.asarray(x), jnp.array(positions)[None, None])
    np.testing.assert_allclose(found, expected, atol=1e-4)  # 300 radians in float32


def test_llama3_has_all_three_branches():
    """Else the comparison above would not have seen the middle one."""
    plain, scaled = Rotary().frequencies(8), Rotary(scaling=LLAMA3).frequencies(8)
    ratio = scaled / plain
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / 8)
    wide = Rotary(scaling=LLAMA3).frequencies(64) / Rotary().frequencies(64)
    assert ((wide > 0.2) & (wide < 0.9)).any()


@pytest.mark.parametrize("rotary", ROTARIES, ids=str)
def test_inner_products_depend_on_the_distance_alone(rotary):
    q, k = vectors(1, 2, 3, 4, 8), vectors(2, 2, 3, 4, 8)

    def product(shift):
        place = jnp.array([[[0, 5, 9, 2]]] * 2) + shift
        return jnp.sum(rotary.rotate(q, place + 3) * rotary.rotate(k, place), axis=-1)

    np.testing.assert_allclose(product(0), product(40), atol=1e-4)
    assert np.abs(product(0) - jnp.sum(q * k, axis=-1)).max() > 0.1


@pytest.mark.parametrize("rotary", ROTARIES, ids=str)
def test_length_is_kept_and_the_opposite_position_undoes(rotary):
    x, positions = vectors(3, 2, 1, 5, 8), jnp.array([[[3, 7, 0, 100, 42]], [[1, 2, 3, 4, 5]]])
    turned = rotary.rotate(x, positions)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(rotary.rotate(turned, -positions), x, atol=1e-5)


def test_positions_may_differ_by_head():
    x, positions = vectors(4, 1, 3, 2, 8), jnp.array([[[0, 1], [5, 6], [9, 2]]])
    found = Rotary().rotate(x, positions)
    for head in range(3):
        alone = Rotary().rotate(x[:, head : head + 1], positions[:, head : head + 1])
        np.testing.assert_array_equal(found[:, head], alone[:, 0])


def test_the_conventions_differ_by_a_permutation_of_coordinates():
    x, positions = vectors(5, 1, 2, 3, 12), jnp.array([[[4, 90, 2]]])
    order = half_from_interleaved(12)
    assert sorted(order.tolist()) == list(range(12))
    interleaved = Rotary(pairs="interleaved").rotate(x, positions)[..., order]
    np.testing.assert_allclose(Rotary(pairs="half").rotate(x[..., order], positions), interleaved, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_inputs_are_turned_in_float32(dtype):
    """At position 1000 an angle rounded to bfloat16 would be off by radians."""
    x, positions = vectors(6, 1, 1, 1, 8).astype(dtype), jnp.array([[[1000]]])
    found = Rotary().rotate(x, positions)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, Rotary().rotate(x.astype(jnp.float32), positions).astype(dtype))


@pytest.mark.parametrize("theta", [77.7, 500000.0])
@pytest.mark.parametrize("scaling", [None, ("linear", 3.3), ("llama3", 32.0, 1.0, 4.0, 8192)])
def test_frequencies_are_those_of_transformers(scaling, theta):
    """Within three units of the last place, also where an exponent such as 2 / 80 is rounded: a relative 1e-6 is
    1e-3 radians at position 1000."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    names = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    said = {"rope_type": "default", "rope_theta": theta, **dict(zip(names, scaling or (), strict=False))}
    config = LlamaConfig(hidden_size=320, num_attention_heads=4, rope_parameters=said, max_position_embeddings=131072)
    embedding = LlamaRotaryEmbedding(config)
    assert embedding.attention_scaling == 1.0
    found = Rotary(theta, scaling=scaling).frequencies(80)
    assert found.dtype == np.float32
    np.testing.assert_array_max_ulp(found, embedding.inv_freq.numpy(), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"theta": 0.0}, "theta is 0.0; a base is positive"),
        ({"theta": math.inf}, "theta is inf"),
        ({"theta": 10**400}, "theta is 1000"),
        ({"pairs": "thirds"}, "pairs|Literal"),
        ({"scaling": ("yarn", 4.0)}, r"scaling is \('yarn', 4.0\); allowed are None; \(linear, factor\); \(llama3,"),
        ({"scaling": ()}, r"scaling is \(\); allowed"),
        ({"scaling": ("linear",)}, r"allowed are None"),
        ({"scaling": ("linear", -1.0)}, "its numbers are positive"),
        ({"scaling": ("llama3", 8.0, 4.0, 4.0, 64)}, "its low, 4.0, is less than its high, 4.0"),
    ],
)
def test_bad_choices_are_refused_by_name(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Rotary(**arguments)


def test_odd_heads_are_refused():
    with pytest.raises(ValueError, match="width is 7; a head is rotated in pairs"):
        Rotary().rotate(jnp.ones((1, 1, 1, 7)), jnp.zeros((1, 1, 1), jnp.int32))
