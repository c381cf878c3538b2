"""SimHash: the signs of random projections as hash codes (Charikar, STOC 2002), and their soft form.

``planes [L, P, d]`` are the normals of ``P`` random hyperplanes in each of ``L`` tables. With ``w = planes[l, p]``,

    hard    bit[p] = [w . x >= 0],     code[l] = sum_p bit[p] 2**(P - 1 - p)        plane 0 is the highest bit
    soft    table[l, r] = prod_p sigmoid(2 beta c[r, p] tanh(w . x))       c[r, p] = 2 (bit p of r) - 1

A bit of two vectors at the angle ``theta`` agrees with probability ``1 - theta / pi``, and a code with its ``P``-th
power. The soft table is the softmax of ``beta sum_p c[r, p] tanh(w . x)`` over the corners ``c[r]``,
without a sum over corners: the partition function is a product too. It sums to 1, and as ``beta`` grows it tends to
the one-hot vector of the code. Projections are float32 at the highest precision whatever ``x`` is: bfloat16 planes
would move a soft table by more than a percent.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Key

AnyArray = Array | np.ndarray

MAX_BITS = 31
"""Bits of a code: it is an int32."""

MAX_SOFT_BITS = 16
"""Bits of a soft table, which has ``2**bits`` entries."""


def srp_planes(key: Key[Array, ""], tables: int, bits: int, features: int) -> Float32[Array, "tables bits features"]:
    """Normals of random hyperplanes, independent N(0, 1).

    Args:
        key: what they are drawn from.
        tables: L.
        bits: P, hyperplanes a table.
        features: d, coordinates of what is hashed.

    Raises:
        ValueError: for sizes below 1, or more bits than 31.
    """
    for name, size in (("tables", tables), ("bits", bits), ("features", features)):
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    if bits > MAX_BITS:
        raise ValueError(f"bits is {bits}; a code holds at most {MAX_BITS}")
    return jax.random.normal(key, (tables, bits, features), jnp.float32)


def project(x: Float[AnyArray, "*n d"], planes: Float[AnyArray, "L P features"]) -> Float32[Array, "*n L P"]:
    """``w . x`` for each hyperplane, in float32 at the highest precision.

    Raises:
        ValueError: for planes without a table or a plane, or of another width than x.
    """
    tables, bits, features = planes.shape
    if not tables or not bits:
        raise ValueError(f"planes has shape {planes.shape}; it needs at least one table and one plane")
    if x.shape[-1] != features:
        raise ValueError(f"x has {x.shape[-1]} features and planes {features}; they must be the same")
    # One matrix product: over two axes of the planes XLA would not call its fast one.
    flat = jnp.asarray(planes, jnp.float32).reshape(-1, features)
    projected = jnp.matmul(jnp.asarray(x, jnp.float32), flat.T, precision=jax.lax.Precision.HIGHEST)
    return projected.reshape(*x.shape[:-1], tables, bits)


def corners(bits: int) -> Float32[np.ndarray, "R {bits}"]:
    """``c [2**bits, bits]``: the corner of each code, 1 where its bit is set and -1 where it is not.

    Raises:
        ValueError: for bits outside 1..16.
    """
    _check_soft_bits(bits)
    codes = np.arange(2**bits)[:, None] >> np.arange(bits - 1, -1, -1)
    return ((codes & 1) * 2 - 1).astype(np.float32)


def hard_hash(x: Float[AnyArray, "*n d"], planes: Float[AnyArray, "L P features"]) -> Int32[Array, "*n L"]:
    """The code of each vector in each table, in 0 .. 2**P - 1. It does not change as ``x`` is scaled.

    Raises:
        ValueError: as `project`; for more than 31 bits.
    """
    bits = planes.shape[1]
    if bits > MAX_BITS:
        raise ValueError(f"planes has {bits} bits a table; a code holds at most {MAX_BITS}")
    weights = np.left_shift(1, np.arange(bits - 1, -1, -1)).astype(np.int32)
    return jnp.sum((project(x, planes) >= 0) * weights, axis=-1, dtype=jnp.int32)


def soft_hash(
    x: Float[AnyArray, "*n d"], planes: Float[AnyArray, "L P features"], beta: Float[AnyArray, ""] | float | int = 1.0
) -> Float32[Array, "*n L R"]:
    """The soft table of each vector: entry ``r`` of table ``l`` is its share of the bucket with code ``r``.

    Args:
        x: vectors, of any length.
        planes: of `srp_planes`.
        beta: inverse temperature. 0 gives ``2**-P`` everywhere; SOCKET's temperature is ``beta = 1 / (tau sqrt(d))``.

    Raises:
        ValueError: as `project`; for more than 16 bits.
    """
    bits = planes.shape[1]
    if bits > MAX_SOFT_BITS:
        raise ValueError(
            f"planes has {bits} bits a table; a soft table has 2**bits entries, of at most {MAX_SOFT_BITS}"
        )
    logits = 2 * jnp.asarray(beta, jnp.float32) * jnp.tanh(project(x, planes))
    return _corner_products(logits)


@jax.custom_jvp
def _corner_products(logits: Array) -> Array:
    """``prod_p sigmoid(c[r, p] logits[..., p])`` for each corner r."""
    # Both signs, and not 1 - sigmoid: an unlikely bucket keeps its relative precision.
    chances = jnp.stack([jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits)], axis=-1)
    table = chances[..., 0, :]
    for p in range(1, logits.shape[-1]):
        table = (table[..., :, None] * chances[..., p, None, :]).reshape(*table.shape[:-1], -1)
    return table


@_corner_products.defjvp
def _corner_products_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # d table[r] = table[r] sum_p (bit[r, p] - chance[p]) d logits[p]: a matrix product, where autodiff of the
    # products would reduce over many axes of size 2.
    (logits,), (moved,) = primals, tangents
    table = _corner_products(logits)
    bits = (corners(logits.shape[-1]) + 1) / 2
    own = jnp.matmul(moved, bits.T, precision=jax.lax.Precision.HIGHEST)
    mean = jnp.sum(jax.nn.sigmoid(logits) * moved, axis=-1, keepdims=True)
    return table, table * (own - mean)


def _check_soft_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_SOFT_BITS:
        raise ValueError(f"bits is {bits}; it must lie in 1..{MAX_SOFT_BITS}")
