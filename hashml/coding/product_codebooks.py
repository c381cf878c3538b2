"""Product quantisation: a vector is cut in groups of coordinates, each of which is a code in a codebook of its own.

    code[i] = argmin_j ||x[i c : (i + 1) c] - codebook[i, j]||^2,  ties to the smaller j
    decoded = codebook[0, code[0]], codebook[1, code[1]], ...

Jegou, Douze, Schmid, PAMI 2011; with groups within a head it is the coding of `hashml.kvcache.coupled`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from hashml.coding.kmeans import nearest


def product_encode(x: Float[Array, "n D"], codebook: Float[Array, "G K c"]) -> Int32[Array, "n G"]:
    """Codes of vectors of width ``D = G c``.

    Raises:
        ValueError: if the widths do not fit.
    """
    n, width = x.shape
    groups, _, channels = codebook.shape
    if width != groups * channels:
        raise ValueError(f"x has width {width}; the codebook is of {groups} groups of {channels} coordinates")
    parts = x.reshape(n, groups, channels).transpose(1, 0, 2)
    return jax.vmap(nearest)(parts, codebook)[0].T


def product_decode(codes: Int[Array, "n G"], codebook: Float[Array, "G K c"]) -> Float[Array, "n D"]:
    """Vectors of codes, in the codebook's dtype."""
    groups, _, channels = codebook.shape
    parts = codebook[jnp.arange(groups), codes]
    return parts.reshape(codes.shape[0], groups * channels)


def product_of(left: Float[Array, "K c"], right: Float[Array, "L d"]) -> Float[Array, "KL cd"]:
    """The codebook of two neighbouring groups that says what their two codebooks say: all pairs of entries."""
    (k, c), (l, d) = left.shape, right.shape
    pairs = (jnp.broadcast_to(left[:, None], (k, l, c)), jnp.broadcast_to(right[None], (k, l, d)))
    return jnp.concatenate(pairs, axis=-1).reshape(k * l, c + d)
