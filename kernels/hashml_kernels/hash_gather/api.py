"""`hash_gather` and its siblings: checks, choice of a backend, gradients."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels import bits
from hashml_kernels.annotations import Array, Bool, Float
from hashml_kernels.hash_gather import native_cpu, pallas_mosaic_tpu, pallas_triton, reference, xla
from hashml_kernels.hash_gather.geometry import BlockGeometry, Sign, Wrap, id_limbs
from hashml_kernels.manual_axes import varying_alike

Implementation = Literal["auto", "reference", "xla", "native", "pallas_triton", "pallas_mosaic_tpu"]

AnyArray = Array | np.ndarray
"""What the public functions take: JAX arrays, or NumPy arrays."""

Ids = Any
"""Integer array of row ids, not negative, or `bits.Limbs` where they may exceed 2**32."""

_BACKENDS = {
    "reference": reference,
    "xla": xla,
    "pallas_triton": pallas_triton,
    "pallas_mosaic_tpu": pallas_mosaic_tpu,
}


def hash_gather(
    memory: Float[AnyArray, " budget"],
    ids: Ids,
    *,
    features: int,
    block_size: int = 8,
    seed: int = 0,
    sign: Sign = "none",
    wrap: Wrap = "circular",
    align: int = 1,
    valid: Bool[AnyArray, "*batch"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "*batch features"]:
    """Rows of a virtual table whose blocks lie at hashed offsets of ``memory``.

    Args:
        memory: the stored weights, any float dtype.
        ids: row ids ``[*batch]``, integers, not negative; `bits.Limbs` for ids beyond 2**32.
        features: coordinates of a row.
        block_size: coordinates that lie side by side in the memory (Z).
        seed: picks the hash function.
        sign: multiply by hashed signs: ``"none"``, one an ``"element"``, or one a ``"block"``.
        wrap: whether blocks run over the end of the memory, ``"circular"`` or ``"none"``.
        align: blocks start at multiples of it.
        valid: ``[*batch]``; a row that is not valid is NaN and has no gradient.
        implementation: ``"auto"`` picks the platform's kernel where it serves the problem, else XLA. A
            kernel asked for by name is interpreted on a CPU, slowly: that is for tests. ``"native"`` is
            C++ for CPUs, compiled on first use, which ``"auto"`` picks for long lookups of long blocks;
            gradients are XLA's.

    Returns:
        The rows ``[*batch, features]`` in the dtype of ``memory``. The gradient with respect to the
        memory is added up in float32; what the backward pass keeps is ``ids``.

    Raises:
        TypeError: for ids that are no integers, a memory that is no float array, or sizes that are no ints.
        ValueError: for a memory that is no vector, a field of the geometry out of its range, or ``valid``
            of another shape than the ids.
        NotImplementedError: where an ``implementation`` asked for by name does not serve the problem.
    """
    memory = jnp.asarray(memory)
    geometry = _geometry(memory, features, block_size, seed, sign, wrap, align)
    words = id_limbs(ids)
    if valid is not None:
        if valid.shape != _shape(words):
            raise ValueError(f"valid has shape {valid.shape}; it must be that of ids, {_shape(words)}")
        valid = jnp.asarray(valid).reshape(-1)
    (memory, flat, valid), _ = varying_alike(memory, _flat(words), valid)
    rows = _gather(memory, flat, valid, geometry, _known(implementation))
    return rows.reshape(*_shape(words), features)


def hash_gather_bag(
    memory: Float[AnyArray, " budget"],
    ids: Ids,
    weights: Float[AnyArray, "*batch members"] | None = None,
    *,
    features: int,
    block_size: int = 8,
    seed: int = 0,
    sign: Sign = "none",
    wrap: Wrap = "circular",
    align: int = 1,
    implementation: Implementation = "auto",
) -> Float[Array, "*batch features"]:
    """Weighted sums of virtual rows: ``sum_l weights[..., l] * row(ids[..., l])``.

    Args:
        memory: as in `hash_gather`.
        ids: ``[*batch, members]``; give members that are padding the weight 0.
        weights: ``[*batch, members]``, ones where it is left out. It has a gradient.
        features, block_size, seed, sign, wrap, align, implementation: as in `hash_gather`.

    Returns:
        ``[*batch, features]`` in the dtype of ``memory``, added up in float32. A bag of no members is zero.

    Raises:
        TypeError, ValueError, NotImplementedError: as `hash_gather`; ValueError for ids without a last
            axis, or weights of another shape than the ids.
    """
    memory = jnp.asarray(memory)
    geometry = _geometry(memory, features, block_size, seed, sign, wrap, align)
    words = id_limbs(ids)
    shape = _shape(words)
    if not shape:
        raise ValueError("ids is a scalar; a bag needs an axis of members")
    weights = None if weights is None else jnp.asarray(weights)
    if weights is not None and weights.shape != shape:
        raise ValueError(f"weights has shape {weights.shape}; it must be that of ids, {shape}")
    pairs = (math.prod(shape[:-1]), shape[-1])  # written out: -1 does not go with bags of no members
    flat = jax.tree.map(lambda word: word.reshape(pairs), words)
    flat_weights = None if weights is None else weights.reshape(pairs)
    (memory, flat, flat_weights), _ = varying_alike(memory, flat, flat_weights)
    bags = _bag(memory, flat, flat_weights, geometry, _known(implementation))
    return bags.reshape(*shape[:-1], features)


def hash_scatter(
    gradients: Float[AnyArray, "*batch features"],
    ids: Ids,
    *,
    budget: int,
    block_size: int = 8,
    seed: int = 0,
    sign: Sign = "none",
    wrap: Wrap = "circular",
    align: int = 1,
    implementation: Implementation = "auto",
) -> Float[Array, " budget"]:
    """The transpose of `hash_gather`: sums of gradients in the slots of their coordinates, float32.

    Args:
        gradients: ``[*batch, features]``.
        ids: ``[*batch]``.
        budget: weights of the memory.
        block_size, seed, sign, wrap, align, implementation: as in `hash_gather`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `hash_gather`; ValueError where the shapes of
            ``gradients`` and ``ids`` do not fit.
    """
    gradients, words = jnp.asarray(gradients), id_limbs(ids)
    if gradients.shape[:-1] != _shape(words):
        raise ValueError(
            f"gradients has shape {gradients.shape}; ids has shape {_shape(words)}, without the last axis"
        )
    geometry = BlockGeometry(budget, gradients.shape[-1], block_size, seed, sign, wrap, align)
    (flat, flat_ids), _ = varying_alike(gradients.reshape(-1, geometry.features), _flat(words))
    return _scatter(flat, flat_ids, geometry, _known(implementation))


# --- gradients: gather and scatter are each other's transpose, so any order of reverse mode works ----


def _custom_vjp(*static: int) -> Callable[[Callable[..., Any]], Any]:
    return functools.partial(jax.custom_vjp, nondiff_argnums=static)


@_custom_vjp(3, 4)
def _gather(memory, ids, valid, geometry: BlockGeometry, implementation: Implementation) -> Any:
    return _dispatch("gather", implementation, geometry, memory, ids, valid=valid)


def _gather_forward(memory, ids, valid, geometry, implementation):
    return _gather(memory, ids, valid, geometry, implementation), (ids, valid, jnp.zeros(0, memory.dtype))


def _gather_backward(geometry, implementation, residuals, cotangent):
    ids, valid, like = residuals
    if valid is not None:
        cotangent = jnp.where(valid[:, None], cotangent, 0)
    return _scatter(cotangent, ids, geometry, implementation).astype(like.dtype), None, None


_gather.defvjp(_gather_forward, _gather_backward)


@_custom_vjp(2, 3)
def _scatter(gradients, ids, geometry: BlockGeometry, implementation: Implementation) -> Any:
    return _dispatch("scatter", implementation, geometry, gradients, ids)


def _scatter_forward(gradients, ids, geometry, implementation):
    return _scatter(gradients, ids, geometry, implementation), (ids, jnp.zeros(0, gradients.dtype))


def _scatter_backward(geometry, implementation, residuals, cotangent):
    ids, like = residuals
    return _gather(cotangent, ids, None, geometry, implementation).astype(like.dtype), None


_scatter.defvjp(_scatter_forward, _scatter_backward)


@_custom_vjp(3, 4)
def _bag(memory, ids, weights, geometry: BlockGeometry, implementation: Implementation) -> Any:
    return _dispatch("gather_bag", implementation, geometry, memory, ids, weights)


def _bag_forward(memory, ids, weights, geometry, implementation):
    # The gradient of the weights needs the memory; without weights its dtype is enough.
    kept = jnp.zeros(0, memory.dtype) if weights is None else memory
    return _bag(memory, ids, weights, geometry, implementation), (ids, weights, kept)


def _bag_backward(geometry, implementation, residuals, cotangent):
    ids, weights, kept = residuals
    gradient = _scatter_bag(cotangent, ids, weights, geometry, implementation).astype(kept.dtype)
    return gradient, None, _weight_gradient(cotangent, kept, ids, weights, geometry, implementation)


_bag.defvjp(_bag_forward, _bag_backward)


@_custom_vjp(3, 4)
def _scatter_bag(gradients, ids, weights, geometry: BlockGeometry, implementation: Implementation) -> Any:
    return _dispatch("scatter_bag", implementation, geometry, gradients, ids, weights)


def _scatter_bag_forward(gradients, ids, weights, geometry, implementation):
    kept = jnp.zeros(0, gradients.dtype) if weights is None else gradients
    return _scatter_bag(gradients, ids, weights, geometry, implementation), (ids, weights, kept)


def _scatter_bag_backward(geometry, implementation, residuals, cotangent):
    ids, weights, kept = residuals
    gradient = _bag(cotangent, ids, weights, geometry, implementation).astype(kept.dtype)
    return gradient, None, _weight_gradient(kept, cotangent, ids, weights, geometry, implementation)


_scatter_bag.defvjp(_scatter_bag_forward, _scatter_bag_backward)


def _weight_gradient(bags, memory, ids, weights, geometry, implementation):
    """Dot products of each bag's vector with the rows of its members."""
    if weights is None:
        return None
    rows = _gather(memory, _flat(ids), None, geometry, implementation).reshape(*weights.shape, geometry.features)
    products = jnp.einsum("bf,blf->bl", bags, rows, precision="highest", preferred_element_type=jnp.float32)
    return products.astype(weights.dtype)


# --- the choice of a backend ----------------------------------------------------------------------


def _dispatch(
    op: str, implementation: Implementation, geometry: BlockGeometry, *operands: Any, valid: Array | None = None
) -> Any:
    """What the backend makes of the operands; ``valid`` is of a gather."""

    def through(backend, **options):
        return lambda valid, *operands: _nan_where_not(valid, getattr(backend, op)(*operands, geometry, **options))

    def natively(valid, memory, ids, *weights):
        if op == "gather":
            return native_cpu.gather(memory, ids, geometry, valid=valid)
        return native_cpu.gather_bag(memory, ids, *weights, geometry=geometry)

    def served(backend):
        """The backend's kernel, or XLA where it says that it does not serve these operands."""
        try:
            backend.check(op, *operands, geometry=geometry)
        except NotImplementedError:
            return through(xla)
        return through(backend)

    match implementation:
        case "auto":
            native = native_cpu.serves(op, *operands, geometry=geometry)
            return jax.lax.platform_dependent(
                valid,
                *operands,
                cpu=natively if native else through(xla, materialise=True),
                cuda=served(pallas_triton),
                tpu=served(pallas_mosaic_tpu),
                default=through(xla),
            )
        case "reference" | "xla":
            return through(_BACKENDS[implementation])(valid, *operands)
        case "native" if op.startswith("scatter"):
            return through(xla, materialise=True)(valid, *operands)
        case "native":
            native_cpu.check(op, *operands, geometry=geometry)
            return natively(valid, *operands)
        case _:
            backend = _BACKENDS[implementation]
            return jax.lax.platform_dependent(
                valid, *operands, cpu=through(backend, interpret=True), default=through(backend)
            )


def _nan_where_not(valid: Array | None, rows: Array) -> Array:
    return rows if valid is None else jnp.where(valid[:, None], rows, jnp.nan)


def _known(implementation: Implementation) -> Implementation:
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; it must be one of {get_args(Implementation)}")
    return implementation


def _geometry(memory, features, block_size, seed, sign, wrap, align) -> BlockGeometry:
    if not jnp.issubdtype(memory.dtype, jnp.floating):
        raise TypeError(f"memory has dtype {memory.dtype}; it must be a float type")
    if memory.ndim != 1:
        raise ValueError(f"memory has shape {memory.shape}; it must be a vector of budget weights")
    return BlockGeometry(memory.shape[0], features, block_size, seed, sign, wrap, align)


def _shape(words: bits.Words | bits.Limbs) -> tuple[int, ...]:
    return jax.tree.leaves(words)[0].shape


def _flat(words: bits.Words | bits.Limbs) -> bits.Words | bits.Limbs:
    return jax.tree.map(lambda word: word.reshape(-1), words)
