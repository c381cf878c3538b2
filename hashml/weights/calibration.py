"""What a layer's inputs say of it: the Hessian of its quadratic loss (Frantar et al., GPTQ, ICLR 2023).

    H = 2/n sum_t x_t x_t^T            1/2 tr(D H D^T) = mean_t ||D x_t||^2,    D = W - Q

`calibrate` takes the inputs of one layer, a batch at a time, and holds nothing but H in float32 and the number of
tokens n; two of them `merge`. The reference counts sequences where n counts tokens: only a scale, and damping is
relative to the mean of the diagonal.

Elimination needs the upper Cholesky factor U of the inverse of the damped H. With H = R R^T, R upper triangular,
U = R^-1: one factorisation of the matrix in reversed order and one inverse of a triangle, where the reference makes
a factorisation, an inverse and another factorisation. `factorize` does it in float64 on the host. A damping of 0.01
leaves a condition number near a million, of which float32 would keep no digit of the last pivots; NumPy says by an
exception that a matrix is not positive definite; and every device then gets the same factor.

Departures: an input that was always 0 gets the mean of the other diagonal entries, where the reference writes 1,
whatever the scale of H. A matrix that is singular under its damping is tried again with ten times as much.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int32

AnyArray = Array | np.ndarray

_MOST_DAMPING = 1.0
_LEAST_DAMPING = 1e-6
"""Of a retry; pivots below a tenth of it are the rounding of float32 sums."""
_TRIANGLE = 64
"""Rows of a triangle that is inverted at once."""


class Hessian(NamedTuple):
    """A running mean.

    Attributes:
        matrix: ``2/n sum_t x_t x_t^T``.
        tokens: n, below 2^31.
    """

    matrix: Float[AnyArray, "in in"]
    tokens: Int32[AnyArray, ""]


class Factor(NamedTuple):
    """The damped Hessian of ordered inputs, factored: ``damped[order][:, order] = scale root root^T``.

    Attributes:
        order: inputs in the order of elimination.
        inverse: U, upper triangular, the inverse of ``root``.
        root: R, upper triangular.
        dead: inputs that were always 0, in their own order.
        scale: mean of the diagonal before damping.
        damping: that was enough, relative to ``scale``.
    """

    order: Int32[np.ndarray, " in"]
    inverse: Float32[np.ndarray, "in in"]
    root: Float32[np.ndarray, "in in"]
    dead: Bool[np.ndarray, " in"]
    scale: float
    damping: float


def calibrate(
    x: Float[AnyArray, "*tokens in"],
    hessian: Hessian | None = None,
    *,
    valid: Bool[AnyArray, "*tokens"] | None = None,
) -> Hessian:
    """The Hessian of the inputs so far and these.

    Args:
        x: inputs of the layer, of any float type; products are float32.
        hessian: of earlier inputs, or ``None``.
        valid: which tokens count; padding does not. ``None``: all.

    Raises:
        ValueError: for no tokens, for inputs of another width than earlier ones, and, out of `jax.jit`, for inputs
            that are NaN or infinite, or whose squares are, and for a ``valid`` without a token.
    """
    width = x.shape[-1]
    if x.size == 0:
        raise ValueError(f"x has the shape {x.shape}: there is no calibration data; allowed is at least one token")
    if hessian is not None and hessian.matrix.shape[0] != width:
        raise ValueError(f"x has width {width}; hessian is of width {hessian.matrix.shape[0]}")
    if valid is None:
        valid = np.ones(x.shape[:-1], bool)
    if hessian is None:
        hessian = Hessian(np.zeros((width, width), np.float32), np.zeros((), np.int32))
    found = _accumulate(hessian, x.reshape(-1, width), valid.reshape(-1))
    if not isinstance(found.matrix, Tracer):
        if int(found.tokens) == 0:
            raise ValueError("valid has no token: there is no calibration data; allowed is at least one token")
        bad = int((~np.isfinite(np.diagonal(found.matrix))).sum())
        if bad:
            raise ValueError(f"x or its square is NaN or infinite in {bad} of {width} inputs; it must be finite")
    return found


def merge(a: Hessian, b: Hessian) -> Hessian:
    """The Hessian of both sets of tokens.

    Raises:
        ValueError: if their widths differ.
    """
    if a.matrix.shape != b.matrix.shape:
        raise ValueError(f"a is of width {a.matrix.shape[0]}, b of {b.matrix.shape[0]}; they must be equal")
    count = a.tokens + b.tokens
    share = a.tokens / jnp.maximum(count, 1)
    return Hessian(share * a.matrix + (1 - share) * b.matrix, jnp.asarray(count, jnp.int32))


def proxy_loss(difference: Float[AnyArray, "out in"], hessian: Hessian) -> Float32[Array, ""]:
    """``1/2 tr(D H D^T)``: the mean squared error of the outputs over calibration tokens, without damping."""
    difference = jnp.asarray(difference, jnp.float32)
    return jnp.sum(_product(difference, jnp.asarray(hessian.matrix)) * difference) / 2


def factorize(hessian: Hessian, *, damping: float | int = 0.1, act_order: bool = True) -> Factor:
    """The factors that elimination needs, on the host in float64.

    Args:
        hessian: of the layer's inputs.
        damping: added to the diagonal, relative to its mean; more where the matrix is singular under it.
        act_order: whether inputs are ordered by falling diagonal; otherwise they keep their order.

    Raises:
        ValueError: for a matrix that is not square or not finite, for a negative damping, and for a matrix that is
            not positive definite even when damped by its mean diagonal, as no sum of squares is.
    """
    matrix = np.asarray(hessian.matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"hessian has the shape {matrix.shape}; it must be square")
    bad = matrix.size - int(np.isfinite(matrix).sum())
    if bad:
        raise ValueError(f"hessian has {bad} entries that are NaN or infinite; all must be finite")
    if not (np.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping is {damping}; it must be finite and not negative")
    diagonal = np.diagonal(matrix).astype(np.float64)
    dead = diagonal == 0
    scale = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    if scale <= 0:
        raise ValueError(f"hessian has a diagonal of mean {scale:g}; a sum of squares is not negative")
    diagonal = np.where(dead, 1.0, diagonal / scale)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    # The reversed order turns the lower factor that NumPy gives into an upper one.
    backwards = order[::-1]
    reversed_ = matrix[backwards][:, backwards] / np.float64(scale)
    enough = float(damping)
    while True:
        np.fill_diagonal(reversed_, diagonal[backwards] + enough)
        root = _upper_root(reversed_)
        if root is not None:
            break
        if enough >= _MOST_DAMPING:
            raise ValueError(
                f"hessian is not positive definite under a damping of {enough:g} times its mean diagonal; "
                "a sum of squares is"
            )
        enough = min(max(10 * enough, _LEAST_DAMPING), _MOST_DAMPING)
    return Factor(
        order.astype(np.int32), _invert_upper(root).astype(np.float32), root.astype(np.float32), dead, scale, enough
    )


def damped(hessian: Hessian, factor: Factor) -> Float[np.ndarray, "in in"]:
    """The matrix that ``factor`` is of, in the order of the inputs, float64."""
    matrix = np.array(hessian.matrix, np.float64)
    matrix[np.diag_indices_from(matrix)] += factor.scale * (factor.dead + factor.damping)
    return matrix


def _upper_root(backwards: np.ndarray) -> np.ndarray | None:
    """The upper factor R of R R^T, which is given in reversed order; ``None`` where that is singular."""
    try:
        lower = np.linalg.cholesky(backwards)
    except np.linalg.LinAlgError:
        return None
    return lower[::-1, ::-1] if np.diagonal(lower).min() ** 2 > _LEAST_DAMPING / 10 else None


def _invert_upper(triangle: np.ndarray) -> np.ndarray:
    """The inverse of an upper triangle by halves: products of matrices, and no elimination of zeros."""
    n = len(triangle)
    if n <= _TRIANGLE:
        return np.triu(np.linalg.inv(triangle))
    half = n // 2
    inverse = np.zeros_like(triangle)
    first, last = _invert_upper(triangle[:half, :half]), _invert_upper(triangle[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -first @ (triangle[:half, half:] @ last)
    return inverse


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _accumulate(hessian: Hessian, x: Array, valid: Array) -> Hessian:
    # Not a product with 0: what is not a number in padding would stay so.
    x = jnp.where(valid[:, None], x.astype(jnp.float32), 0)
    count = hessian.tokens + valid.sum(dtype=jnp.int32)
    total = jnp.maximum(count, 1).astype(jnp.float32)
    return Hessian(hessian.matrix * (hessian.tokens / total) + _product(x.T, x) * (2 / total), count)
