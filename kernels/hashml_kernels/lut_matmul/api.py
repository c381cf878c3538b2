"""`lut_matmul`: checks, choice of a backend, gradients."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array, Float
from hashml_kernels.lut_matmul import pallas_mosaic_tpu, pallas_triton, reference, xla
from hashml_kernels.lut_matmul.layout import Layout, layout
from hashml_kernels.lut_matmul.operands import Operands
from hashml_kernels.manual_axes import varying_alike

Implementation = Literal["auto", "reference", "xla", "pallas_triton", "pallas_mosaic_tpu"]

AnyArray = Array | np.ndarray
"""What the public function takes: JAX arrays, or NumPy arrays."""

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}


def lut_matmul(
    x: Float[AnyArray, "*batch columns"],
    codes: AnyArray,
    *,
    tables: Float[AnyArray, "rows groups entries"] | None = None,
    scales: Float[AnyArray, "rows groups"] | None = None,
    zeros: Float[AnyArray, "rows groups"] | None = None,
    bits: int,
    columns: int,
    implementation: Implementation = "auto",
) -> Float[Array, "*batch rows"]:
    """``x @ W.T``, where ``W[r, c]`` is ``tables[r, g, code]`` or ``scales[r, g] (code - zeros[r, g])``.

    ``code`` is that of row r and column c, and g the c's group: ``columns / G`` neighbours make one. W never exists
    whole, nor does its gradient. Products are added up in float32; kernels for many inputs round W's numbers to the
    dtype of ``x`` first, for the matrix unit, and others take them as they are.

    Gradients reach ``x``, the tables, the scales and the zeros. The backward pass keeps the arguments alone.

    Args:
        x: inputs, any float dtype.
        codes: uint8 ``[rows, row_bytes]``, packed as `pack_codes` does.
        tables: ``[rows, G, 2**bits]``, any float dtype; or instead of them
        scales: ``[rows, G]``.
        zeros: ``[rows, G]``, with scales; None: zeros.
        bits: of a code: 1, 2, 3, 4 or 8.
        columns: codes of a row.
        implementation: ``"auto"`` picks the platform's kernel where it serves the problem, else XLA. A
            kernel asked for by name is interpreted on a CPU, slowly: that is for tests.

    Returns:
        ``[*batch, rows]`` in the dtype of ``x``.

    Raises:
        TypeError: for codes that are no bytes, or other arrays that are no floats.
        ValueError: for shapes that do not fit, naming them, bits that are not allowed, and both or neither of tables
            and scales.
        NotImplementedError: where an ``implementation`` asked for by name does not serve the problem.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; it must be one of {get_args(Implementation)}")
    if (tables is None) == (scales is None):
        which = "neither is" if tables is None else "both are"
        raise ValueError(f"tables and scales: {which} given; exactly one says which numbers the codes are")
    if zeros is not None and scales is None:
        raise ValueError("zeros are given with tables; they belong to scales")
    given = {"x": x, "codes": codes, "tables": tables, "scales": scales, "zeros": zeros}
    arrays = {name: jnp.asarray(array) for name, array in given.items() if array is not None}
    own = layout(columns, bits)
    _check(arrays, own)
    x, batch = arrays["x"], arrays["x"].shape[:-1]
    flat = x.reshape(math.prod(batch), columns)  # written out: -1 does not go with empty batches
    if scales is not None and zeros is None:
        arrays["zeros"] = jnp.zeros_like(arrays["scales"])
    operands = Operands(flat, arrays["codes"], *(arrays.get(name) for name in Operands._fields[2:]))
    (operands,), _ = varying_alike(operands)
    y: Any
    if implementation == "reference":
        y = reference.multiply(operands, own)
    else:
        y = _multiply(*operands, own, implementation)
    return y.reshape(*batch, operands.codes.shape[0])


def _check(arrays: dict[str, Array], own: Layout) -> None:
    for name, array in arrays.items():
        if name == "codes":
            if array.dtype != jnp.uint8:
                raise TypeError(f"codes has dtype {array.dtype}; it must be uint8, as pack_codes makes it")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}; it must be a float type")
    x, codes = arrays["x"], arrays["codes"]
    if not x.ndim or x.shape[-1] != own.count:
        raise ValueError(f"x has shape {x.shape}; its last axis must be the {own.count} columns")
    if codes.ndim != 2 or codes.shape[1] != own.row_bytes:
        raise ValueError(
            f"codes has shape {codes.shape}; it must be [rows, {own.row_bytes}]: {own.count} codes of {own.bits} bits"
        )
    rows, entries = codes.shape[0], 2**own.bits
    for name in ("tables", "scales", "zeros"):
        if name not in arrays:
            continue
        array, of_entries = arrays[name], name == "tables"
        if array.ndim != 2 + of_entries or array.shape[0] != rows or (of_entries and array.shape[2] != entries):
            allowed = f"[{rows}, groups, {entries}]" if of_entries else f"[{rows}, groups]"
            raise ValueError(f"{name} has shape {array.shape}; it must be {allowed}")
        groups = array.shape[1]
        if not groups or own.count % groups:
            raise ValueError(f"{name} has {groups} groups; a number of groups must divide the {own.count} columns")
    if "zeros" in arrays and arrays["zeros"].shape != arrays["scales"].shape:
        raise ValueError(f"zeros has shape {arrays['zeros'].shape}; it must be {arrays['scales'].shape}, as scales")


# --- gradients ------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _multiply(x, codes, tables, scales, zeros, own: Layout, implementation: Implementation) -> Any:
    return _dispatch("multiply", implementation, own, Operands(x, codes, tables, scales, zeros))


def _multiply_forward(*arguments):
    return _multiply(*arguments), arguments[:5]


def _multiply_backward(own, implementation, residuals, dy):
    operands = Operands(*residuals)
    x, tables, scales, zeros = operands.x, *operands[2:]
    dx = xla.transposed(operands, dy, own).astype(x.dtype)
    sums = _dispatch("gradient", implementation, own, operands, dy)
    if tables is not None:
        return dx, None, sums.astype(tables.dtype), None, None
    assert scales is not None
    assert zeros is not None
    # W = scales (codes - zeros): sums with the codes, and without.
    inputs = x.astype(jnp.float32).reshape(x.shape[0], operands.groups, -1).sum(axis=2)
    plain = jnp.einsum("mo,mg->og", dy.astype(jnp.float32), inputs, precision="highest")
    of_scales = (sums - zeros.astype(jnp.float32) * plain).astype(scales.dtype)
    return dx, None, None, of_scales, (-scales.astype(jnp.float32) * plain).astype(zeros.dtype)


_multiply.defvjp(_multiply_forward, _multiply_backward)


# --- the choice of a backend ----------------------------------------------------------------------


def _dispatch(op: str, implementation: Implementation, own: Layout, operands: Operands, *rest: Array) -> Any:
    def through(backend, **options) -> Callable[..., Any]:
        return lambda *arguments: getattr(backend, op)(*arguments, own, **options)

    def kernel(backend, **options) -> Callable[..., Any]:
        """The backend's kernel; a batch of calls that share W is one call with more inputs, others are a loop."""
        run = jax.custom_batching.custom_vmap(through(backend, **options))

        @run.def_vmap
        def _(size, batched, *arguments):
            flags = jax.tree.leaves(batched)
            if op == "multiply" and batched[0].x and sum(flags) == 1:
                [operands] = arguments
                y = run(operands._replace(x=operands.x.reshape(-1, own.count)))
                return y.reshape(size, -1, y.shape[1]), True
            leaves, tree = jax.tree.flatten(arguments)

            def one(mine):
                mine = iter(mine)
                every = [next(mine) if flag else leaf for flag, leaf in zip(flags, leaves, strict=True)]
                return run(*jax.tree.unflatten(tree, every))

            return jax.lax.map(one, [leaf for flag, leaf in zip(flags, leaves, strict=True) if flag]), True

        return run

    def served(backend) -> Callable[..., Any]:
        """The backend's kernel, or XLA where it says that it does not serve these operands."""
        try:
            backend.check(op, operands, own)
        except NotImplementedError:
            return through(xla)
        return kernel(backend)

    arguments = (operands, *rest)
    match implementation:
        case "auto":
            return jax.lax.platform_dependent(
                *arguments, cuda=served(pallas_triton), tpu=served(pallas_mosaic_tpu), default=through(xla)
            )
        case "xla":
            return through(xla)(*arguments)
        case _:
            backend = _KERNELS[implementation]
            backend.check(op, operands, own)
            return jax.lax.platform_dependent(
                *arguments, cpu=kernel(backend, interpret=True), default=kernel(backend)
            )
