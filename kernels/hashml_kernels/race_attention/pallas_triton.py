"""The op for NVIDIA GPUs through Pallas-Triton (deprecated in JAX since 0.11, hence a file of its own).

A program takes one row and key head, and a span of tokens, which it walks along by chunks; features of a chunk are
made in registers. Programs do not wait for each other: a first kernel sums the keys of each span, XLA adds the spans
up (to the sums before each where order matters, else to one), and a second kernel reads, for each query, the sums
that its span begins with, which it carries on from chunk to chunk. Backward the same twice: queries, with the sums
over keys before, forward; keys, with the sums over queries after, backward.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hashml_kernels.annotations import Array
from hashml_kernels.manual_axes import varying_alike
from hashml_kernels.race_attention.features import (
    Gradients,
    Operands,
    Results,
    exclusive,
    mass_gradient,
    selection,
    signed_planes,
)
from hashml_kernels.race_attention.triton_kernels import (
    Setting,
    Shape,
    Walk,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
    sum_kernel,
)
from hashml_kernels.race_attention.triton_tiles import Arithmetic, parts_of

_FLOATS = ("float32", "bfloat16", "float16")
_LEAST = 16  # sides of a tensor core's operands
_WIDEST = 128
_MOST_BUCKETS = 64
_PROGRAMS = 4 * 132  # some a multiprocessor of an H200
_SPAN = 1024  # tokens of a program at least: a span's sums are as large as some 64 tokens
_CHUNK = 32
_SMALL_CHUNK = 16  # where order matters, and for float32: more would not fit in registers
_PIECE = 64
_SMALL_PIECE = 32  # for few buckets with order, whose kernels ptxas holds to 128 registers
_WARPS = 8
_MOST_SUMS = 8192  # numbers of a state, buckets by values: registers bind
_MOST_CAUSAL_SUMS = 4096


def check(operands: Operands, causal: bool) -> None:
    """Returns if the kernels serve these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for wide heads, many buckets, empty arrays, float64, and arrays of 2**31 numbers.
    """
    *_, width, values = operands.sizes
    for name, size in (("D", width), ("V", values)):
        if size > _WIDEST:
            raise NotImplementedError(f"{name} is {size}; the Triton kernels take at most {_WIDEST}; auto uses XLA")
    shape = _shape(operands)
    if shape.buckets > _MOST_BUCKETS:
        raise NotImplementedError(
            f"planes has shape {operands.planes.shape}, {operands.buckets} buckets; the Triton kernels take at most "
            f"{_MOST_BUCKETS}; auto uses XLA"
        )
    if causal and _precise(operands) and shape.width > 64 and shape.buckets > 32:
        raise NotImplementedError(
            f"q has dtype float32 and shape {operands.q.shape}; with causal=True the Triton kernels take D up to 64, "
            f"or 32 buckets, since registers bind; auto uses XLA"
        )
    for name, array in zip(("q", "k", "v"), operands, strict=False):
        if str(array.dtype) not in _FLOATS:
            raise NotImplementedError(
                f"{name} has dtype {array.dtype}; the Triton kernels take {_FLOATS}; auto uses XLA"
            )
        if 0 in array.shape:
            raise NotImplementedError(
                f"{name} has shape {array.shape}; the Triton kernels take no empty arrays; auto uses XLA"
            )
        if array.size >= 2**31:
            raise NotImplementedError(
                f"{name} holds {array.size} numbers; the Triton kernels take less than 2**31; auto uses XLA"
            )


def _shape(operands: Operands) -> Shape:
    *_, width, values = operands.sizes
    tables, bits, _ = operands.planes.shape
    sizes = width, values, operands.buckets, 2 * tables * bits
    return Shape(*(max(pl.next_power_of_2(size), _LEAST) for size in sizes))


# --- the op ---------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """One pass over operands whose first two axes, rows and key heads, are one."""

    operands: Operands
    causal: bool
    interpret: bool

    @property
    def precise(self) -> bool:
        return _precise(self.operands)

    @property
    def rows(self) -> int:
        return self.operands.q.shape[0] * self.operands.q.shape[1]

    def keys(self) -> list[Array]:
        k, v, keep = self.operands[1:4]
        masks = [] if keep is None else [jnp.repeat(keep, k.shape[1], axis=0)]
        return [k.reshape(self.rows, *k.shape[2:]), v.reshape(self.rows, *v.shape[2:]), *masks]

    def queries(self, *arrays: Array) -> list[Array]:
        return [x.reshape(self.rows, *x.shape[2:]) for x in arrays]

    def walk(self, length: int) -> Walk:
        chunk = _SMALL_CHUNK if self.causal or self.precise else _CHUNK
        wanted = pl.cdiv(length * self.rows, _PROGRAMS)
        chunks = pl.cdiv(min(max(wanted, _SPAN), length), chunk)
        return Walk(chunk, chunks, pl.cdiv(length, chunk * chunks))

    def __call__(self, kernel: Any, name: str, walk: Walk, inputs: list[Array], outputs: list[Any]) -> Any:
        """``inputs`` and ``outputs`` have an entry a row and key head; outputs with True in front one a program."""
        operands, shape = self.operands, _shape(self.operands)
        tables, bits, _ = operands.planes.shape
        shared = [
            jnp.asarray(selection(tables, bits, shape.rows, shape.buckets)),
            operands.beta.reshape(1),
            *parts_of(signed_planes(operands.planes, shape.rows, shape.width), self.precise),
        ]
        arrays, kind = varying_alike(*shared, *inputs)
        setting = Setting(
            Arithmetic(self.precise, self.interpret),
            shape,
            operands.buckets,
            operands.q.shape[2],
            self.causal,
            operands.keep is not None,
            walk,
            _SMALL_PIECE if self.causal and shape.buckets == _LEAST else _PIECE,
        )

        def whole(array: Any) -> pl.BlockSpec:
            return pl.BlockSpec(array.shape, lambda r, s: (0,) * array.ndim)

        def own(shape: tuple[int, ...]) -> pl.BlockSpec:
            return pl.BlockSpec((None, *shape[1:]), lambda r, s: (r,) + (0,) * (len(shape) - 1))

        def part(shape: tuple[int, ...]) -> pl.BlockSpec:
            return pl.BlockSpec((None, None, *shape[2:]), lambda r, s: (r, s) + (0,) * (len(shape) - 2))

        shapes = [
            jax.ShapeDtypeStruct((self.rows, *((walk.spans,) if spans else ()), *tail), dtype, manual_axis_type=kind)
            for spans, tail, dtype in outputs
        ]
        return pl.pallas_call(
            functools.partial(kernel, setting),
            grid=(self.rows, walk.spans),
            in_specs=[*map(whole, shared), *(own(x.shape) for x in inputs)],
            out_specs=[
                part(s.shape) if spans else own(s.shape) for s, (spans, *_) in zip(shapes, outputs, strict=True)
            ],
            out_shape=shapes,
            compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=1),
            interpret=self.interpret,
            name=name,
        )(*arrays)

    def sums(self, walk: Walk, inputs: list[Array], name: str, *, reverse: bool = False) -> list[Array]:
        """What each span begins with, ``[rows, spans or 1, ...]``."""
        sizes = _shape(self.operands)
        states = (True, (sizes.buckets,), jnp.float32), (True, (sizes.buckets, sizes.values), jnp.float32)
        parts = self(sum_kernel, name, walk, inputs, list(states))
        if self.causal:
            return [exclusive(part, reverse=reverse) for part in parts]
        return [part.sum(axis=1, keepdims=True) for part in parts]


def forward(operands: Operands, causal: bool, *, interpret: bool = False) -> Results:
    """The attention.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, causal)
    parts = [
        _forward(operands._replace(v=operands.v[..., own]), causal, interpret) for own in _slices(operands, causal)
    ]
    out = parts[0].out if len(parts) == 1 else jnp.concatenate([part.out for part in parts], axis=-1)
    return Results(out, parts[0].inverse)


def backward(
    operands: Operands, results: Results, gradient: Array, causal: bool, *, interpret: bool = False
) -> Gradients:
    """The gradients, with what the forward pass left.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, causal)
    d_mass = mass_gradient(results, gradient)
    slices = _slices(operands, causal)
    if len(slices) == 1:
        return _backward(operands, results.inverse, d_mass, gradient, causal, interpret)
    # All but the gradient of the values are sums over the values' coordinates. The mass belongs to one of the parts.
    parts = [
        _backward(
            operands._replace(v=operands.v[..., own]),
            results.inverse,
            jnp.zeros_like(d_mass) if own.start else d_mass,
            gradient[..., own],
            causal,
            interpret,
            exact=True,
        )
        for own in slices
    ]
    d_q, d_k, beta = (
        functools.reduce(jnp.add, (getattr(part, name) for part in parts)) for name in ("q", "k", "beta")
    )
    d_v = jnp.concatenate([part.v for part in parts], axis=-1)
    return Gradients(d_q.astype(operands.q.dtype), d_k.astype(operands.k.dtype), d_v, beta)


def _precise(operands: Operands) -> bool:
    return any(x.dtype == jnp.float32 for x in operands[:3])


def _slices(operands: Operands, causal: bool) -> list[slice]:
    """Coordinates of the values that are taken at a time: so many that their sums fit in registers."""
    shape = _shape(operands)
    most = _MOST_CAUSAL_SUMS if causal else _MOST_SUMS
    size = max(most // shape.buckets, _LEAST)
    values = operands.v.shape[-1]
    return [slice(first, min(first + size, values)) for first in range(0, values, size)]


def _forward(operands: Operands, causal: bool, interpret: bool) -> Results:
    call = _Call(operands, causal, interpret)
    batch, heads, groups, length, keys, _, width = operands.sizes
    of_keys = call.keys()
    state = call.sums(call.walk(keys), of_keys, "race_attention_sums")
    outputs = [(False, (groups, length, width), operands.v.dtype), (False, (groups, length), jnp.float32)]
    inputs = [*call.queries(operands.q), *state, *(of_keys if causal else [])]
    found = call(forward_kernel, "race_attention", call.walk(length), inputs, outputs)
    return Results(*(x.reshape(batch, heads, *x.shape[1:]) for x in found))


def _backward(
    operands: Operands,
    inverse: Array,
    d_mass: Array,
    gradient: Array,
    causal: bool,
    interpret: bool,
    *,
    exact: bool = False,
) -> Gradients:
    """With ``exact``, gradients of queries and keys in float32, to be added up."""
    call = _Call(operands, causal, interpret)
    batch, heads, groups, length, keys, width, values = operands.sizes
    of_keys = call.keys()
    of_queries = call.queries(operands.q, gradient, inverse, d_mass)
    before = call.sums(call.walk(keys), of_keys, "race_attention_sums")
    after = call.sums(call.walk(length), of_queries, "race_attention_query_sums", reverse=True)
    beta = True, (1,), jnp.float32
    q_dtype, k_dtype = (jnp.float32 if exact else x.dtype for x in operands[:2])
    d_q, by_queries = call(
        query_gradient_kernel,
        "race_attention_query_gradient",
        call.walk(length),
        [*of_queries, *before, *(of_keys if causal else [])],
        [(False, (groups, length, width), q_dtype), beta],
    )
    d_k, d_v, by_keys = call(
        key_gradient_kernel,
        "race_attention_key_gradient",
        call.walk(keys),
        [*after, *of_keys, *(of_queries if causal else [])],
        [(False, (keys, width), k_dtype), (False, (keys, values), operands.v.dtype), beta],
    )
    d_q, d_k, d_v = (x.reshape(batch, heads, *x.shape[1:]) for x in (d_q, d_k, d_v))
    return Gradients(d_q, d_k, d_v, by_queries.sum() + by_keys.sum())
