"""SimHash: codes equal to a naive loop, soft tables to a softmax over corners, and the law of collisions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from hashml.hashing.simhash import corners, hard_hash, project, soft_hash, srp_planes

D = 7


@pytest.fixture(scope="module")
def planes():
    return srp_planes(jax.random.key(1), 3, 4, D)


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).standard_normal((2, 11, D)).astype(np.float32)


def softmax_form(x, planes, beta):
    """The definition, in float64: a softmax over the 2**P corners."""
    u = np.tanh(np.einsum("...d,lpd->...lp", np.asarray(x, np.float64), np.asarray(planes, np.float64)))
    every = np.array(list(itertools.product([-1, 1], repeat=planes.shape[1])))
    return scipy.special.softmax(beta * u @ every.T, axis=-1)


def test_plane_zero_is_the_highest_bit(planes, vectors):
    codes = hard_hash(vectors, planes)
    for table, x in itertools.product(range(3), [(0, 0), (1, 7), (0, 10)]):
        code = 0
        for plane in np.asarray(planes)[table]:
            code = 2 * code + int(plane.astype(np.float64) @ vectors[x] >= 0)
        assert codes[(*x, table)] == code
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(corners(3), list(itertools.product([-1, 1], repeat=3)))


def test_planes_are_standard_normal_and_of_their_key():
    planes = np.asarray(srp_planes(jax.random.key(0), 50, 10, 40)).ravel()
    assert planes.dtype == np.float32
    # Of 20,000 draws, in standard errors: the mean, and the mean square, whose variance is 2.
    assert abs(planes.mean()) < 4 / np.sqrt(planes.size)
    assert abs((planes**2).mean() - 1) < 4 * np.sqrt(2 / planes.size)
    again, other = (srp_planes(jax.random.key(key), 50, 10, 40).ravel() for key in (0, 1))
    np.testing.assert_array_equal(again, planes)
    assert (np.asarray(other) != planes).all()


@pytest.mark.parametrize("beta", [0.3, 1, 4.0])
def test_the_product_of_sigmoids_is_the_softmax_over_corners(planes, vectors, beta):
    table = soft_hash(vectors, planes, beta)
    assert table.shape == (2, 11, 3, 16)
    assert table.dtype == jnp.float32
    np.testing.assert_allclose(table, softmax_form(vectors, planes, beta), atol=1e-6)
    np.testing.assert_allclose(table.sum(-1), 1, atol=1e-6)


def test_unlikely_buckets_keep_their_relative_precision(planes, vectors):
    table, expected = soft_hash(vectors, planes, 8.0), softmax_form(vectors, planes, 8.0)
    assert expected.min() < 1e-20
    np.testing.assert_allclose(table, expected, rtol=1e-4)


def test_a_hard_table_is_the_code(planes, vectors):
    """Where no projection is near 0, beta = 1e3 leaves one entry, and it is the code's."""
    clear = np.abs(np.asarray(project(vectors, planes))).min(axis=(-1, -2)) > 0.02
    assert clear.sum() > 5
    table, codes = np.asarray(soft_hash(vectors, planes, 1e3))[clear], np.asarray(hard_hash(vectors, planes))[clear]
    np.testing.assert_allclose(table, np.eye(16)[codes], atol=1e-6)


@pytest.mark.parametrize("hard", [True, False])
def test_collisions_follow_the_angle(hard):
    """(1 - theta / pi)**P, over 4000 tables, within four standard errors; at beta = 1e3 the soft tables too."""
    tables, bits = 4000, 3
    planes = srp_planes(jax.random.key(3), tables, bits, D)
    x = np.random.default_rng(1).standard_normal(D)
    other = np.random.default_rng(2).standard_normal(D)
    for cosine in (1.0, 0.9, 0.0, -0.6):
        across = other - (other @ x) / (x @ x) * x
        y = 3 * (cosine * x / np.linalg.norm(x) + np.sqrt(1 - cosine**2) * across / np.linalg.norm(across))
        pair = np.stack([x, y]).astype(np.float32)
        if hard:
            codes = np.asarray(hard_hash(pair, planes))
            met = (codes[0] == codes[1]).astype(float)
        else:
            table = np.asarray(soft_hash(pair, planes, 1e3), np.float64)
            met = (table[0] * table[1]).sum(-1)
        law = (1 - np.arccos(cosine) / np.pi) ** bits
        # A plane within rounding of a vector splits two equal ones; of 12,000 that is a handful.
        slack = 1e-3 if not hard else 0
        assert abs(met.mean() - law) <= 4 * np.sqrt(law * (1 - law) / tables) + slack


def test_length_does_not_change_a_code_and_does_change_a_soft_table(planes, vectors):
    np.testing.assert_array_equal(hard_hash(vectors, planes), hard_hash(np.float32(8) * vectors, planes))
    assert np.abs(soft_hash(vectors, planes) - soft_hash(np.float32(8) * vectors, planes)).max() > 0.1


def test_no_temperature_is_uniform(planes, vectors):
    np.testing.assert_array_equal(soft_hash(vectors, planes, 0), np.full((2, 11, 3, 16), 1 / 16, np.float32))


def test_projections_are_float32_whatever_comes_in(planes, vectors):
    half = jnp.asarray(vectors, jnp.bfloat16)
    exact = np.einsum("...d,lpd->...lp", np.asarray(half, np.float64), np.asarray(planes, np.float64))
    np.testing.assert_allclose(project(half, planes), exact, rtol=1e-5, atol=1e-6)
    # bfloat16 planes would move a projection by about 2**-9 of it.
    assert "HIGHEST" in str(jax.make_jaxpr(project)(half, planes))


def test_the_gradient_is_that_of_the_softmax_form(planes, vectors):
    weight = jax.random.normal(jax.random.key(5), (2, 11, 3, 16))

    def softmax(x, beta):
        u = jnp.tanh(jnp.einsum("...d,lpd->...lp", x, planes, precision="highest"))
        return (jax.nn.softmax(beta * u @ corners(4).T) * weight).sum()

    def product(x, beta):
        return (soft_hash(x, planes, beta) * weight).sum()

    point = (jnp.asarray(vectors), jnp.float32(1.4))
    for found, expected in zip(*(jax.jit(jax.grad(f, (0, 1)))(*point) for f in (product, softmax)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: srp_planes(jax.random.key(0), 0, 2, 3), "tables is 0; it must be at least 1"),
        (lambda x: srp_planes(jax.random.key(0), 2, 0, 3), "bits is 0; it must be at least 1"),
        (lambda x: srp_planes(jax.random.key(0), 2, 32, 3), "bits is 32; a code holds at most 31"),
        (lambda x: hard_hash(x, jnp.zeros((0, 2, D))), r"planes has shape \(0, 2, 7\); it needs at least one table"),
        (lambda x: soft_hash(x, jnp.zeros((2, 0, D))), r"planes has shape \(2, 0, 7\); it needs at least one table"),
        (lambda x: hard_hash(x, jnp.zeros((2, 2, 3))), "x has 7 features and planes 3; they must be the same"),
        (lambda x: hard_hash(x, jnp.zeros((1, 32, D))), "planes has 32 bits a table; a code holds at most 31"),
        (lambda x: soft_hash(x, jnp.zeros((1, 17, D))), "planes has 17 bits a table; .* of at most 16"),
        (lambda x: corners(17), "bits is 17; it must lie in 1..16"),
    ],
)
def test_bad_input_is_refused_by_name(vectors, call, message):
    with pytest.raises(ValueError, match=message):
        call(vectors)
