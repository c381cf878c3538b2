"""Hashed random projections of sentence embeddings (Hamster, Lee, Geyken, Gurevych 2023, arXiv 2304.02481).

    bit[i] = [x . w_i > 0],    w_i ~ N(0, 1)^d,    i < b         an exact 0 gives the bit 0
    p = P[bit_i(x) != bit_i(y)] = theta / pi,    theta the angle of x and y
    angle ~ pi Hamming / b,    cosine ~ cos(pi Hamming / b)      variance of Hamming / b: p (1 - p) / b

The hyperplanes are drawn once and not trained; vectors are neither centred nor normalised, since a sign has no scale.
768 floats become 256 bits, on which a linear classifier still works; ``b`` is free, where the signs of a vector's own
coordinates (`sign_projection`, the control) are as many as there are coordinates.

Planes are ``hashml.hashing.srp_planes(jax.random.key(seed, impl="threefry2x32"), b, 1, d)``: a seed means nothing
without its generator. Products are float32 at the highest precision, since bfloat16 would flip the bits of small
projections. Codes are uint32 words, bit ``i`` at place ``i mod 32`` of word ``i // 32``, and bits that the last word
has left are zero.

`hadamard_projection` takes O(D log D) for ``D`` bits in place of O(d D): three rounds of random signs and a
Walsh-Hadamard transform (Andoni et al., NeurIPS 2015), whose rows are nearly Gaussian; [ours] here.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt32

from hashml.coding import pack, unpack
from hashml.hashing import hash_signs, project, srp_planes

AnyArray = Array | np.ndarray
GENERATOR = "threefry2x32"
"""Of `jax.random`, that planes are drawn by; store it beside the seed."""
WORD = 32
_ROUNDS = 3


class Neighbors(NamedTuple):
    """The nearest items of each query, nearest first; of equally near ones the smaller id first."""

    distances: Int32[Array, "Q k"]
    """Hamming."""
    ids: Int32[Array, "Q k"]


# --- codes ----------------------------------------------------------------------------------------


def hyperplanes(bits: int, features: int, *, seed: int) -> Float32[Array, "{bits} {features}"]:
    """Normals of the hyperplanes, independent N(0, 1).

    Args:
        bits: b.
        features: d.
        seed: with `GENERATOR`, picks them.

    Raises:
        ValueError: for sizes below 1.
    """
    _check_bits(bits)
    return srp_planes(jax.random.key(seed, impl=GENERATOR), bits, 1, features)[:, 0]


def hashed_projection(x: Float[AnyArray, "*n d"], bits: int, *, seed: int) -> UInt32[Array, "*n words"]:
    """The code of each vector: the sides of ``bits`` random hyperplanes that it lies on.

    Args:
        x: vectors; their lengths do not matter.
        bits: b, of any number.
        seed: of `hyperplanes`; compare codes of one seed alone.

    Raises:
        ValueError: for fewer than 1 bit.
    """
    return plane_codes(x, hyperplanes(bits, x.shape[-1], seed=seed))


@jax.jit
def plane_codes(x: Float[AnyArray, "*n d"], planes: Float[AnyArray, "b features"]) -> UInt32[Array, "*n words"]:
    """`hashed_projection` by planes that are there already.

    Raises:
        ValueError: for planes of another width than x, or none.
    """
    return pack_bits(project(x, jnp.asarray(planes)[:, None])[..., 0] > 0)


def sign_projection(x: Float[AnyArray, "*n d"]) -> UInt32[Array, "*n words"]:
    """The control: the signs of the vector's own coordinates, d bits."""
    return pack_bits(jnp.asarray(x) > 0)


def hadamard_projection(x: Float[AnyArray, "*n d"], bits: int, *, seed: int) -> UInt32[Array, "*n words"]:
    """`hashed_projection` with structured planes: the signs of `hadamard_project`.

    Raises:
        ValueError: for fewer than 1 bit.
    """
    return pack_bits(hadamard_project(x, bits, seed=seed) > 0)


def hadamard_project(x: Float[AnyArray, "*n d"], bits: int, *, seed: int) -> Float32[Array, "*n {bits}"]:
    """``H S3 H S2 H S1 x``, as many times as it takes for ``bits`` values; each time an orthogonal map of ``x``.

    ``x`` is padded with zeros to the next power of two ``D``, ``H`` is the Walsh-Hadamard matrix over ``sqrt(D)`` and
    ``S`` are random signs from `hashml.hashing.hash_signs`. Values of one block of ``D`` are not independent.

    Raises:
        ValueError: for fewer than 1 bit.
    """
    _check_bits(bits)
    width = 1 << max(0, x.shape[-1] - 1).bit_length()
    blocks = -(-bits // width)
    places = np.arange(_ROUNDS * blocks * width, dtype=np.uint32)
    signs = hash_signs(places, seed=seed).astype(np.float32).reshape(_ROUNDS, blocks, width)
    return _turned(x, signs)[..., :bits]


@jax.jit
def _turned(x: Float[AnyArray, "*n d"], signs: Float[AnyArray, "rounds blocks D"]) -> Float32[Array, "*n values"]:
    _, blocks, width = signs.shape
    x = jnp.asarray(x, jnp.float32)
    turned = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])[..., None, :]
    for each in jnp.asarray(signs):
        turned = walsh_hadamard(turned * each) / math.sqrt(width)
    return turned.reshape(*x.shape[:-1], blocks * width)


def walsh_hadamard(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """``x H``, where ``H[i, j] = (-1)^popcount(i & j)``, by log2 D rounds of sums and differences.

    Raises:
        ValueError: if D is no power of two.
    """
    width = x.shape[-1]
    if width < 1 or width & (width - 1):
        raise ValueError(f"x has width {width}; it must be a power of two")
    shape, half = x.shape, 1
    while half < width:
        pairs = x.reshape(*shape[:-1], width // (2 * half), 2, half)
        x = jnp.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
        half *= 2
    return x.reshape(shape)


def words_of(bits: int) -> int:
    """uint32 words of a code.

    Raises:
        ValueError: for fewer than 1 bit.
    """
    _check_bits(bits)
    return -(-bits // WORD)


@jax.jit
def pack_bits(bits: Bool[AnyArray, "*n b"]) -> UInt32[Array, "*n words"]:
    """Truth values as words, the lowest place first.

    Raises:
        ValueError: for no bit.
    """
    bits = jnp.asarray(bits)
    words = words_of(bits.shape[-1])
    padded = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, words * WORD - bits.shape[-1])])
    lanes = pack(padded.astype(jnp.uint8), 1).reshape(*bits.shape[:-1], words, 4)
    return jax.lax.bitcast_convert_type(lanes, jnp.uint32)


@functools.partial(jax.jit, static_argnames="bits")
def unpack_bits(codes: UInt32[AnyArray, "*n words"], bits: int) -> Bool[Array, "*n {bits}"]:
    """The truth values of `pack_bits`.

    Raises:
        ValueError: if codes of ``bits`` bits have another number of words.
    """
    _check_words("codes", codes, bits)
    lanes = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.uint8)
    return unpack(lanes.reshape(*codes.shape[:-1], -1), 1, codes.shape[-1] * WORD)[..., :bits].astype(bool)


# --- what codes say -------------------------------------------------------------------------------


@jax.jit
def hamming(x: UInt32[AnyArray, "*n words"], y: UInt32[AnyArray, "*m peers"]) -> Int32[Array, "..."]:
    """Bits in which codes differ; leading axes broadcast.

    Raises:
        ValueError: for codes of different numbers of words.
    """
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} words and y {y.shape[-1]}; codes that are compared have as many")
    return jnp.sum(jax.lax.population_count(jnp.asarray(x) ^ jnp.asarray(y)), axis=-1, dtype=jnp.int32)


def angle(distance: Int[AnyArray, "*n"], bits: int) -> Float32[Array, "*n"]:
    """The angle of two vectors, in radians, from the Hamming distance of their codes; unbiased."""
    _check_bits(bits)
    return jnp.asarray(distance).astype(jnp.float32) * np.float32(np.pi / bits)


def cosine(distance: Int[AnyArray, "*n"], bits: int) -> Float32[Array, "*n"]:
    """The cosine of two vectors, from the Hamming distance of their codes; exact as ``bits`` grows."""
    return jnp.cos(angle(distance, bits))


@functools.partial(jax.jit, static_argnames=("k", "block"))
def nearest_by_hamming(
    queries: UInt32[AnyArray, "Q words"], items: UInt32[AnyArray, "N peers"], k: int, *, block: int = 4096
) -> Neighbors:
    """The ``k`` items of smallest Hamming distance to each query, by reading all of them.

    Args:
        queries: codes.
        items: codes, of as many words.
        k: in 1..N.
        block: items that are compared at a time; ``[Q, block]`` distances are alive.

    Raises:
        ValueError: for another k, or an empty block.
    """
    count, width = items.shape
    if not 1 <= k <= count:
        raise ValueError(f"k is {k}; it must lie in 1..{count}, the items")
    if block < 1:
        raise ValueError(f"block is {block}; it is at least 1")
    block = min(block, count)
    blocks = -(-count // block)
    padded = jnp.pad(jnp.asarray(items), ((0, blocks * block - count), (0, 0))).reshape(blocks, block, width)
    queries = jnp.asarray(queries)
    beyond = np.int32(np.iinfo(np.int32).max)

    def body(best: Neighbors, part: tuple[Array, Array]) -> tuple[Neighbors, None]:
        codes, start = part
        ids = start + jnp.arange(block, dtype=jnp.int32)
        apart = jnp.where(ids < count, hamming(queries[:, None], codes), beyond)
        # Of equal values top_k takes the first, and those kept so far have the smaller ids.
        distances = jnp.concatenate([best.distances, apart], axis=1)
        candidates = jnp.concatenate([best.ids, jnp.broadcast_to(ids, apart.shape)], axis=1)
        found, places = jax.lax.top_k(-distances, k)
        return Neighbors(-found, jnp.take_along_axis(candidates, places, axis=1)), None

    empty = jnp.full((queries.shape[0], k), beyond)
    start = jnp.arange(blocks, dtype=jnp.int32) * block
    return jax.lax.scan(body, Neighbors(empty, jnp.zeros_like(empty)), (padded, start))[0]


def _check_bits(bits: int) -> None:
    if bits < 1:
        raise ValueError(f"bits is {bits}; a code has at least 1")


def _check_words(name: str, codes: AnyArray, bits: int) -> None:
    if codes.shape[-1] != words_of(bits):
        raise ValueError(f"{name} has {codes.shape[-1]} words; {bits} bits take {words_of(bits)}")
