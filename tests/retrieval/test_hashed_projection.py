"""Hashed projections: the law of angles, signs that know no scale, packed codes, a search equal to a full sort."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from hashml.hashing import hash_signs
from hashml.retrieval.hashed_projection import (
    angle,
    cosine,
    hadamard_project,
    hadamard_projection,
    hamming,
    hashed_projection,
    hyperplanes,
    nearest_by_hamming,
    pack_bits,
    plane_codes,
    sign_projection,
    unpack_bits,
    walsh_hadamard,
    words_of,
)

D, BITS, N = 24, 75, 40
PROJECTIONS = {"gaussian": hashed_projection, "hadamard": hadamard_projection}


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)


def pairs_at(theta: float, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs of vectors at this angle."""
    rng = np.random.default_rng(1)
    u, v = rng.standard_normal((2, count, width))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    v -= (u * v).sum(axis=1, keepdims=True) * u
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    return u.astype(np.float32), (np.cos(theta) * u + np.sin(theta) * v).astype(np.float32)


# --- the card's invariants ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("theta", [0.3, 1.2, 2.5])
def test_bits_differ_with_probability_angle_over_pi(name, theta):
    """Over seeds, which are independent, as bits of one Hadamard block are not."""
    seeds, width = 60, 32
    x, y = pairs_at(theta, 8, width)
    shares = np.array([
        np.asarray(hamming(PROJECTIONS[name](x, 256, seed=seed), PROJECTIONS[name](y, 256, seed=seed))).mean() / 256
        for seed in range(seeds)
    ])  # fmt: skip
    error = shares.std(ddof=1) / np.sqrt(seeds)
    assert error < 0.01
    assert abs(shares.mean() - theta / np.pi) < 4 * error


def test_the_variance_is_that_of_independent_bits():
    """Hamming / b of one pair over seeds: p (1 - p) / b, within 4 standard errors of a sample variance."""
    (x, y), bits, seeds = pairs_at(1.0, 1, 16), 64, 400
    apart = np.array([int(hamming(*(plane_codes(z, hyperplanes(bits, 16, seed=s)) for z in (x, y)))[0]) for s in
                      range(seeds)]) / bits  # fmt: skip
    p = 1 / np.pi
    assert abs(apart.mean() - p) < 4 * np.sqrt(p * (1 - p) / bits / seeds)
    assert abs(apart.var(ddof=1) / (p * (1 - p) / bits) - 1) < 4 * np.sqrt(2 / (seeds - 1))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_length_does_not_matter_and_the_opposite_is_the_complement(name, vectors):
    codes = functools.partial(PROJECTIONS[name], bits=BITS, seed=3)
    own = np.asarray(unpack_bits(codes(vectors), BITS))
    np.testing.assert_array_equal(unpack_bits(codes(vectors * np.float32(1024)), BITS), own)
    np.testing.assert_array_equal(unpack_bits(codes(vectors / np.float32(64)), BITS), own)
    np.testing.assert_array_equal(unpack_bits(codes(-vectors), BITS), ~own)
    assert 0.3 < own.mean() < 0.7


def test_hamming_of_words_is_that_of_bits(vectors):
    codes = hashed_projection(vectors, BITS, seed=0)
    bits = np.asarray(unpack_bits(codes, BITS))
    np.testing.assert_array_equal(hamming(codes[:, None], codes), (bits[:, None] != bits).sum(axis=-1))
    assert hamming(codes, codes).dtype == jnp.int32


def test_the_nearest_code_becomes_that_of_the_nearest_vector(vectors):
    """Share of vectors whose neighbour by Hamming distance is that by cosine: all of them in the end."""
    queries = vectors + 0.5 * np.random.default_rng(2).standard_normal(vectors.shape).astype(np.float32)
    cosines = queries @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    ranked = np.sort(cosines / np.linalg.norm(queries, axis=1, keepdims=True), axis=1)
    clear = ranked[:, -1] - ranked[:, -2] > 0.1
    assert clear.sum() > N / 2
    shares = []
    for bits in (16, 128, 8192):
        sides = (hashed_projection(x, bits, seed=0) for x in (queries, vectors))
        found = np.asarray(nearest_by_hamming(*sides, 1).ids)[:, 0]
        shares.append((found == cosines.argmax(axis=1))[clear].mean())
    assert shares[0] < shares[1] <= shares[2] == 1


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_seed_gives_the_same_bits_inside_another_program(name, vectors):
    codes = functools.partial(PROJECTIONS[name], bits=BITS, seed=7)
    own = codes(vectors)
    np.testing.assert_array_equal(jax.jit(codes)(vectors), own)
    assert (np.asarray(PROJECTIONS[name](vectors, BITS, seed=8)) != own).any()


@pytest.mark.parametrize("bits", [1, 31, 32, 33, 75])
def test_words_give_back_their_bits(bits):
    values = np.random.default_rng(bits).integers(0, 2, (3, 2, bits)).astype(bool)
    codes = pack_bits(values)
    assert codes.dtype == jnp.uint32
    assert codes.shape == (3, 2, words_of(bits)) == (3, 2, -(-bits // 32))
    np.testing.assert_array_equal(unpack_bits(codes, bits), values)
    expected = sum(int(value) << place for place, value in enumerate(values[0, 0]))
    assert sum(int(word) << 32 * place for place, word in enumerate(np.asarray(codes)[0, 0])) == expected


# --- definitions ----------------------------------------------------------------------------------


def test_a_bit_is_the_side_of_a_plane_and_zero_on_it(vectors):
    planes = np.asarray(hyperplanes(BITS, D, seed=5), np.float64)
    expected = vectors.astype(np.float64) @ planes.T
    assert np.abs(expected).min() > 1e-5
    np.testing.assert_array_equal(unpack_bits(hashed_projection(vectors, BITS, seed=5), BITS), expected > 0)
    assert not np.asarray(hashed_projection(np.zeros((1, D), np.float32), BITS, seed=5)).any()
    assert np.asarray(unpack_bits(sign_projection(np.array([0.0, -0.0, 1e-30, -1.0], np.float32)), 4)).tolist() == [
        False, False, True, False,
    ]  # fmt: skip


def test_planes_are_those_of_the_generator_that_is_named():
    expected = jax.random.normal(jax.random.key(9, impl="threefry2x32"), (6, 1, 4))[:, 0]
    np.testing.assert_array_equal(hyperplanes(6, 4, seed=9), expected)


@pytest.mark.parametrize("width", [1, 2, 16])
def test_walsh_hadamard_is_the_matrix(width):
    x = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
    np.testing.assert_allclose(walsh_hadamard(jnp.asarray(x)), x @ scipy.linalg.hadamard(width), atol=1e-5)


def test_hadamard_planes_are_products_of_signs_and_hadamard_matrices():
    """Of 12 coordinates in blocks of 16, the last one cut: each block is an orthogonal map of the padded vector."""
    found = np.asarray(hadamard_project(np.eye(12, dtype=np.float32), 40, seed=4))
    signs = np.asarray(hash_signs(np.arange(3 * 3 * 16, dtype=np.uint32), seed=4)).reshape(3, 3, 16)
    matrix = scipy.linalg.hadamard(16) / 4
    blocks = [np.diag(s[0]) @ matrix @ np.diag(s[1]) @ matrix @ np.diag(s[2]) @ matrix for s in signs.swapaxes(0, 1)]
    np.testing.assert_allclose(found, np.concatenate(blocks, axis=1)[:12, :40], atol=1e-6)
    np.testing.assert_allclose(found[:, :16] @ found[:, :16].T, np.eye(12), atol=1e-6)
    codes = hadamard_projection(np.eye(12, dtype=np.float32), 40, seed=4)
    np.testing.assert_array_equal(unpack_bits(codes, 40), found > 0)


def test_estimates_of_angle_and_cosine():
    distances = np.array([0, 64, 128, 256], np.int32)
    np.testing.assert_allclose(angle(distances, 256), [0, np.pi / 4, np.pi / 2, np.pi], rtol=1e-6)
    np.testing.assert_allclose(cosine(distances, 256), [1, np.sqrt(0.5), 0, -1], atol=1e-6)


@pytest.mark.parametrize(("k", "block"), [(1, 40), (7, 6), (40, 64)])
def test_search_is_a_stable_sort(k, block, vectors):
    """Few bits, so that many distances are equal: the smaller id comes first."""
    queries, items = (hashed_projection(x, 9, seed=1) for x in (vectors[:5] + 0.1, vectors))
    found = nearest_by_hamming(queries, items, k, block=block)
    distances = np.asarray(hamming(queries[:, None], items))
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_array_equal(found.distances, np.take_along_axis(distances, order, axis=1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: hashed_projection(x, 0, seed=0), "bits is 0; a code has at least 1"),
        (lambda x: hadamard_projection(x, -1, seed=0), "bits is -1; a code has at least 1"),
        (lambda x: plane_codes(x, np.ones((4, D + 1), np.float32)), f"x has {D} features and planes {D + 1}"),
        (lambda x: hamming(sign_projection(x), sign_projection(x[:, :1].repeat(33, 1))), "x has 1 words and y 2"),
        (lambda x: unpack_bits(sign_projection(x), 33), "codes has 1 words; 33 bits take 2"),
        (lambda x: nearest_by_hamming(sign_projection(x), sign_projection(x), 41), "k is 41; it must lie in 1..40"),
        (lambda x: nearest_by_hamming(sign_projection(x), sign_projection(x), 1, block=0), "block is 0; it is at"),
        (lambda x: walsh_hadamard(jnp.asarray(x)), "x has width 24; it must be a power of two"),
    ],
)
def test_bad_input(call, message, vectors):
    with pytest.raises(ValueError, match=message):
        call(vectors)
