"""Ways to store an embedding in few bytes, each a function from vectors to what a reader has of them.

Codes that are learned (PCA, ITQ, product quantisation) are fitted once a data set on its training rows; what is
fitted is stored once and not counted to a row's bytes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, UInt32

from hashml.coding import kmeans, product_decode, product_encode
from hashml.retrieval.hashed_projection import (
    cosine,
    hadamard_projection,
    hamming,
    hashed_projection,
    nearest_by_hamming,
    pack_bits,
    sign_projection,
    unpack_bits,
)

VECTORS = ("float", "float16", "int8", "truncated", "pca", "pq")
"""Read back as vectors."""
SIGNS = ("hrp", "hadamard", "sign", "pca_sign", "itq")
"""Read back as bits."""
SEEDED = ("hrp", "hadamard")
"""Drawn by a seed; all others are the same for all seeds."""
_FITTED = 2000
"""Rows, at most, that a rotation or a codebook is fitted on."""
_CODEWORD = 8
"""Bits of a code of product quantisation."""


class Codes(NamedTuple):
    """Vectors as they are read back.

    Attributes:
        features: what a classifier reads: vectors, or bits as 0 and 1.
        words: of codes of bits, packed.
        bits: of a row.
    """

    features: Float32[np.ndarray, "n f"]
    words: UInt32[np.ndarray, "n w"] | None
    bits: int

    def take(self, rows: Int[np.ndarray, " m"]) -> "Codes":
        """The named rows, in that order."""
        return Codes(self.features[rows], None if self.words is None else self.words[rows], self.bits)


Encode = Callable[[np.ndarray], Codes]


def bits_of(method: str, features: int, bits: int | None) -> int | None:
    """Bits of a row, scales included; ``None`` where the method cannot have as many as asked for."""
    fixed = {"float": 32 * features, "float16": 16 * features, "int8": 8 * features + 16, "sign": features}
    if method in fixed:
        return fixed[method] if bits is None else None
    if bits is None:
        return None
    fits = {
        "truncated": bits % 16 == 0 and bits // 16 <= features,
        "pca": bits % 16 == 0 and bits // 16 <= features,
        "pca_sign": bits <= features,
        "itq": bits <= features,
        "pq": bits % _CODEWORD == 0 and features % (bits // _CODEWORD) == 0,
    }
    return bits if fits.get(method, True) else None


def encoder(method: str, bits: int, rows: np.ndarray, seed: int) -> Encode:
    """The way to store.

    Args:
        method: of `VECTORS` or `SIGNS`.
        bits: of a row, from `bits_of`.
        rows: what learned codes are fitted on.
        seed: of the hyperplanes; learned codes and the others do not depend on it.
    """
    signs: dict[str, Callable[[Array], Array]] = {
        "hrp": lambda x: hashed_projection(x, bits, seed=seed),
        "hadamard": lambda x: hadamard_projection(x, bits, seed=seed),
        "sign": sign_projection,
    }
    if method in signs:
        return lambda x: _signs(signs[method](jnp.asarray(x)), bits)
    if method in ("pca_sign", "itq"):
        mean, basis = _principal(rows, bits)
        basis = basis @ _itq_rotation((rows[:_FITTED] - mean) @ basis) if method == "itq" else basis
        return lambda x: _signs(pack_bits(((x - mean) @ basis) > 0), bits)
    return lambda x: Codes(_vectors(method, bits, rows)(x).astype(np.float32), None, bits)


def _signs(words: Array, bits: int) -> Codes:
    return Codes(np.asarray(unpack_bits(words, bits)).astype(np.float32), np.asarray(words), bits)


def _vectors(method: str, bits: int, rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    if method == "pca":
        mean, basis = _principal(rows, bits // 16)
        return lambda x: mean + _half((x - mean) @ basis) @ basis.T
    if method == "pq":
        codebook = _product_codebook(rows, bits // _CODEWORD)
        return lambda x: np.asarray(product_decode(product_encode(jnp.asarray(x), codebook), codebook))
    simple: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "float": lambda x: x,
        "float16": _half,
        "int8": _int8,
        "truncated": lambda x: _half(x[:, : bits // 16]),
    }
    return simple[method]


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def _int8(x: np.ndarray) -> np.ndarray:
    """Symmetric, with a float16 scale a row."""
    scale = np.maximum(_half(np.abs(x).max(axis=1, keepdims=True) / 127), 1e-7)
    return np.clip(np.round(x / scale), -127, 127) * scale


def _principal(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and the directions of largest variance as columns."""
    mean = rows.mean(axis=0)
    _, directions = np.linalg.eigh((rows - mean).T @ (rows - mean))
    return mean, directions[:, ::-1][:, :count]


def _itq_rotation(coordinates: np.ndarray, iterations: int = 50) -> np.ndarray:
    """Iterative quantisation (Gong et al., PAMI 2013): the rotation that brings coordinates next to their signs."""
    width = coordinates.shape[1]
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0].astype(np.float32)
    for _ in range(iterations):
        signs = np.where(coordinates @ rotation > 0, np.float32(1), np.float32(-1))
        left, _, right = np.linalg.svd(coordinates.T @ signs)
        rotation = left @ right
    return rotation


def _product_codebook(rows: np.ndarray, groups: int) -> Array:
    """256 centroids a group of coordinates."""
    rows = rows[:_FITTED]
    parts = jnp.asarray(rows).reshape(len(rows), groups, -1).transpose(1, 0, 2)
    keys = jax.random.split(jax.random.key(0), groups)
    fit: Any = functools.partial(kmeans, clusters=2**_CODEWORD, iterations=12)
    return jax.jit(lambda keys, parts: jax.lax.map(lambda both: fit(*both).centroids, (keys, parts)))(keys, parts)


# --- what is read from codes ----------------------------------------------------------------------


def cosines(x: Codes, y: Codes) -> Float32[np.ndarray, " n"]:
    """Cosine of each row of x with the same row of y: exact for vectors, ``cos(pi Hamming / b)`` for bits."""
    if x.words is not None and y.words is not None:
        return np.asarray(cosine(hamming(x.words, y.words), x.bits))
    return (_unit(x.features) * _unit(y.features)).sum(axis=1)


def nearest(queries: Codes, items: Codes, k: int) -> Int[np.ndarray, "Q k"]:
    """The items of largest cosine to each query, best first; of equals the first item."""
    if queries.words is not None and items.words is not None:
        return np.asarray(nearest_by_hamming(queries.words, items.words, k).ids)
    found = _unit(queries.features) @ _unit(items.features).T
    return np.argsort(-found, axis=1, kind="stable")[:, :k]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
