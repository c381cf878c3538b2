"""`hashed_matmul` and its siblings: checks, choice of a backend, gradients."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array, Float
from hashml_kernels.hashed_matmul import pallas_mosaic_tpu, pallas_triton, reference, xla
from hashml_kernels.hashed_matmul.geometry import TileGeometry, TileMap, TileSign
from hashml_kernels.manual_axes import varying_alike

Implementation = Literal["auto", "reference", "xla", "pallas_triton", "pallas_mosaic_tpu"]

AnyArray = Array | np.ndarray
"""What the public functions take: JAX arrays, or NumPy arrays."""

Ids = Any
"""Integer array of row ids, not negative."""

_BACKENDS = {
    "reference": reference,
    "xla": xla,
    "pallas_triton": pallas_triton,
    "pallas_mosaic_tpu": pallas_mosaic_tpu,
}


def hashed_matmul(
    x: Float[AnyArray, "*batch rows"],
    memory: Float[AnyArray, " budget"],
    *,
    columns: int,
    tile: tuple[int, int] = (32, 32),
    map: TileMap = "tile",
    seed: int = 0,
    sign: TileSign = "element",
    offset: int = 0,
    align: int = 1,
    scale: float | int = 1.0,
    implementation: Implementation = "auto",
) -> Float[Array, "*batch columns"]:
    """``scale * x @ W``, where W is a virtual matrix whose tiles lie in ``memory``.

    Neither W nor its gradient exists at any time. Products are added up in float32, float32 itself is multiplied
    in full precision, whatever `jax.default_matmul_precision` says, and ``scale`` meets the sum once.

    Args:
        x: inputs ``[*batch, rows]``, any float dtype.
        memory: the stored weights, any float dtype.
        columns: columns of W.
        tile, map, seed, sign, offset, align: the geometry of W, see `TileGeometry`.
        scale: what the weights are multiplied by, so that modules of different scales share a memory.
        implementation: ``"auto"`` picks the platform's kernel where it serves the problem, else XLA. A
            kernel asked for by name is interpreted on a CPU, slowly: that is for tests.

    Returns:
        ``[*batch, columns]`` in the dtype that those of ``x`` and ``memory`` promote to. The gradient with
        respect to the memory is added up in float32; what the backward pass keeps is ``x`` and ``memory``.

    Raises:
        TypeError: for an ``x`` or a memory that is no float array, sizes that are no ints, or a scale that is
            no number.
        ValueError: for a memory that is no vector, an ``x`` without a last axis, or a field of the geometry out of
            its range.
        NotImplementedError: where an ``implementation`` asked for by name does not serve the problem.
    """
    x, memory = _floats(x, "x"), _vector(memory)
    if not x.ndim:
        raise ValueError("x is a scalar; its last axis must be the rows of W")
    geometry = TileGeometry(memory.shape[0], x.shape[-1], columns, tile, map, seed, sign, offset, align)
    batch = x.shape[:-1]
    flat = x.reshape(math.prod(batch), geometry.rows)  # written out: -1 does not go with empty batches
    (flat, memory), _ = varying_alike(flat, memory)
    y = _multiply(flat, memory, geometry, _number(scale), _known(implementation))
    return y.reshape(*batch, geometry.columns)


def hashed_lookup(
    memory: Float[AnyArray, " budget"],
    ids: Ids,
    geometry: TileGeometry,
    *,
    scale: float | int = 1.0,
) -> Float[Array, "*batch columns"]:
    """Rows ``ids`` of ``scale * W``: an embedding whose table is the virtual matrix.

    Args:
        memory: the stored weights.
        ids: ``[*batch]``, integers below ``geometry.rows``; others are clipped.
        geometry: where W lies.
        scale: as in `hashed_matmul`.

    Returns:
        The rows in the dtype of ``memory``. The backward pass keeps ``ids``.

    Raises:
        TypeError: for a memory that is no float array or ids that are no integers.
        ValueError: for a memory whose size is not that of the geometry.
    """
    memory, ids = _fitting(memory, geometry), jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids has dtype {ids.dtype}; it must be an integer type")
    (memory, flat), _ = varying_alike(memory, jnp.clip(ids.reshape(-1), 0, geometry.rows - 1).astype(jnp.int32))
    rows = _lookup(memory, flat, geometry).reshape(*ids.shape, geometry.columns)
    return rows if _number(scale) == 1.0 else rows * scale


def expand(
    memory: Float[AnyArray, " budget"], geometry: TileGeometry, *, scale: float | int = 1.0
) -> Float[Array, "rows columns"]:
    """``scale * W`` itself, for ops that have to see it: small kernels of convolutions, tests, export.

    Its gradient is that of `pull`; the backward pass keeps nothing.

    Raises:
        TypeError, ValueError: as `hashed_lookup`.
    """
    (memory,), _ = varying_alike(_fitting(memory, geometry))
    w = _expand(memory, geometry)
    return w if _number(scale) == 1.0 else w * scale


def pull(
    gradient: Float[AnyArray, "rows columns"], geometry: TileGeometry, *, scale: float | int = 1.0
) -> Float[Array, " budget"]:
    """The transpose of `expand`: each slot's sum over its weights, in float32 or better.

    Raises:
        TypeError: for a gradient that is no float array.
        ValueError: for a gradient that has not the shape of W.
    """
    gradient = _floats(gradient, "gradient")
    if gradient.shape != (geometry.rows, geometry.columns):
        raise ValueError(
            f"gradient has shape {gradient.shape}; it must be that of W, {(geometry.rows, geometry.columns)}"
        )
    (gradient,), _ = varying_alike(gradient)
    total = _pull(gradient, geometry)
    return total if _number(scale) == 1.0 else total * scale


# --- gradients ------------------------------------------------------------------------------------
# sum(scale * y * (x @ W(memory))) is linear in each of x, memory and y. `_multiply`, `_multiply_transposed` and
# `_outer` are its derivatives with respect to y, x and the memory, and each one's gradients are the other two.


def _custom_vjp(*static: int) -> Callable[[Callable[..., Any]], Any]:
    return functools.partial(jax.custom_vjp, nondiff_argnums=static)


@_custom_vjp(2, 3, 4)
def _multiply(x, memory, geometry: TileGeometry, scale: float, implementation: Implementation) -> Any:
    return _dispatch("multiply", implementation, geometry, scale, *_alike(x, memory))


def _multiply_forward(x, memory, *static):
    return _multiply(x, memory, *static), (x, memory)


def _multiply_backward(geometry, scale, implementation, residuals, cotangent):
    x, memory = residuals
    static = (geometry, scale, implementation)
    dx = _multiply_transposed(cotangent, memory, *static)
    return dx.astype(x.dtype), _outer(x, cotangent, *static).astype(memory.dtype)


_multiply.defvjp(_multiply_forward, _multiply_backward)


@_custom_vjp(2, 3, 4)
def _multiply_transposed(y, memory, geometry: TileGeometry, scale: float, implementation: Implementation) -> Any:
    return _dispatch("multiply_transposed", implementation, geometry, scale, *_alike(y, memory))


def _multiply_transposed_forward(y, memory, *static):
    return _multiply_transposed(y, memory, *static), (y, memory)


def _multiply_transposed_backward(geometry, scale, implementation, residuals, cotangent):
    y, memory = residuals
    static = (geometry, scale, implementation)
    dy = _multiply(cotangent, memory, *static)
    return dy.astype(y.dtype), _outer(cotangent, y, *static).astype(memory.dtype)


_multiply_transposed.defvjp(_multiply_transposed_forward, _multiply_transposed_backward)


@_custom_vjp(2, 3, 4)
def _outer(x, y, geometry: TileGeometry, scale: float, implementation: Implementation) -> Any:
    return _dispatch("outer", implementation, geometry, scale, *_alike(x, y))


def _outer_forward(x, y, *static):
    return _outer(x, y, *static), (x, y)


def _outer_backward(geometry, scale, implementation, residuals, cotangent):
    x, y = residuals
    static = (geometry, scale, implementation)
    dx = _multiply_transposed(y, cotangent, *static)
    return dx.astype(x.dtype), _multiply(x, cotangent, *static).astype(y.dtype)


_outer.defvjp(_outer_forward, _outer_backward)


@_custom_vjp(1)
def _expand(memory, geometry: TileGeometry) -> Any:
    return xla.expand(memory, geometry)


@_custom_vjp(1)
def _pull(gradient, geometry: TileGeometry) -> Any:
    return xla.pull(gradient, geometry)


@_custom_vjp(2)
def _lookup(memory, ids, geometry: TileGeometry) -> Any:
    return xla.lookup(memory, ids, geometry)


@_custom_vjp(2)
def _scatter(gradients, ids, geometry: TileGeometry) -> Any:
    return xla.scatter(gradients, ids, geometry)


def _transposes(function, transpose):
    """Makes the gradient of ``function`` its ``transpose``; ids have none."""

    def forward(values, *rest):
        *operands, geometry = rest
        return function(values, *operands, geometry), (operands, jnp.zeros(0, values.dtype))

    def backward(geometry, residuals, cotangent):
        operands, like = residuals
        gradient = transpose(cotangent, *operands, geometry).astype(like.dtype)
        return (gradient, *(None for _ in operands))

    function.defvjp(forward, backward)


_transposes(_expand, _pull)
_transposes(_pull, _expand)
_transposes(_lookup, _scatter)
_transposes(_scatter, _lookup)


# --- the choice of a backend ----------------------------------------------------------------------


def _dispatch(op: str, implementation: Implementation, geometry: TileGeometry, scale: float, *operands) -> Any:
    def through(backend, **options):
        return lambda *operands: getattr(backend, op)(*operands, geometry, scale, **options)

    def served(backend):
        """The backend's kernel, or XLA where it says that it does not serve these operands."""
        try:
            backend.check(op, *operands, geometry=geometry)
        except NotImplementedError:
            return through(xla)
        return through(backend)

    match implementation:
        case "auto":
            return jax.lax.platform_dependent(
                *operands, cuda=served(pallas_triton), tpu=served(pallas_mosaic_tpu), default=through(xla)
            )
        case "reference" | "xla":
            return through(_BACKENDS[implementation])(*operands)
        case _:
            backend = _BACKENDS[implementation]
            backend.check(op, *operands, geometry=geometry)
            return jax.lax.platform_dependent(
                *operands, cpu=through(backend, interpret=True), default=through(backend)
            )


def _alike(*operands: Array) -> tuple[Array, ...]:
    """The operands in the dtype that they promote to, the only kind of pair that backends see."""
    dtype = jnp.result_type(*operands)
    return tuple(operand.astype(dtype) for operand in operands)


def _known(implementation: Implementation) -> Implementation:
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; it must be one of {get_args(Implementation)}")
    return implementation


def _number(scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise TypeError(f"scale is {scale!r}; it must be a number, fixed before the program is compiled")
    return float(scale)


def _floats(array: Any, name: str) -> Array:
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {array.dtype}; it must be a float type")
    return array


def _vector(memory: Any) -> Array:
    memory = _floats(memory, "memory")
    if memory.ndim != 1:
        raise ValueError(f"memory has shape {memory.shape}; it must be a vector of budget weights")
    return memory


def _fitting(memory: Any, geometry: TileGeometry) -> Array:
    memory = _vector(memory)
    if memory.shape[0] != geometry.budget:
        raise ValueError(f"memory holds {memory.shape[0]} weights; the geometry's budget is {geometry.budget}")
    return memory
