"""The op for TPUs: one row and key head after the other, tile by tile in the order of the sequence.

A core runs the steps of a grid in order, so that sums over tokens stay in vector memory from tile to tile: with a
causal order one kernel reads the sums of the keys before and adds its own tile, and nothing of that is ever stored.
Without order a first kernel sums over the keys. Backward, one kernel goes along the queries, forward, and one along
the keys, backward with the sums over the queries after; without order the first also makes the sums that the second
needs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels.annotations import Array
from hashml_kernels.manual_axes import varying_alike
from hashml_kernels.race_attention.features import (
    Gradients,
    Operands,
    Results,
    mass_gradient,
    selection,
    signed_planes,
)
from hashml_kernels.race_attention.tpu_kernels import (
    Setting,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
    sum_kernel,
)
from hashml_kernels.race_attention.tpu_tiles import Arithmetic, split

_LANES = 128
_SUBLANES = 16  # of a bfloat16 register; a multiple of float32's
_WIDTHS = (64, 128, 256)
_MOST_BUCKETS = 256
_MOST_HEADS = 16  # query heads of a key head
_TILE = 512
_CAUSAL_TILE = 256
_VECTOR_BYTES = 96 * 2**20  # of the 128 MiB of a v5e or v6e


def check(operands: Operands, causal: bool) -> None:
    """Returns if the kernels serve these operands; only shapes and dtypes are looked at.

    Raises:
        NotImplementedError: for heads of other widths than 64, 128 and 256, short sequences, many buckets or query
            heads, and other dtypes than float32 and bfloat16.
    """
    del causal
    batch, heads, groups, length, keys, width, values = operands.sizes
    for name, size in (("D", width), ("V", values)):
        if size not in _WIDTHS:
            raise NotImplementedError(f"{name} is {size}; the TPU kernels take {_WIDTHS}; auto uses XLA")
    for name, size in (("T", length), ("N", keys)):
        if size < _LANES:
            raise NotImplementedError(f"{name} is {size}; the TPU kernels take {_LANES} or more; auto uses XLA")
    if groups > _MOST_HEADS or not batch * heads * groups:
        raise NotImplementedError(
            f"q has shape {operands.q.shape}; the TPU kernels take 1 to {_MOST_HEADS} query heads a key head, and "
            f"some rows; auto uses XLA"
        )
    if operands.buckets > _MOST_BUCKETS:
        raise NotImplementedError(
            f"planes has shape {operands.planes.shape}, {operands.buckets} buckets; the TPU kernels take at most "
            f"{_MOST_BUCKETS}; auto uses XLA"
        )
    for name, array in zip(("q", "k", "v"), operands, strict=False):
        if array.dtype != jnp.float32 and array.dtype != jnp.bfloat16:
            raise NotImplementedError(
                f"{name} has dtype {array.dtype}; the TPU kernels take float32 and bfloat16; auto uses XLA"
            )


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


# --- the op ---------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """One pass over operands whose first two axes, rows and key heads, are one."""

    operands: Operands
    causal: bool
    interpret: bool | pltpu.InterpretParams

    @property
    def precise(self) -> bool:
        return any(x.dtype == jnp.float32 for x in self.operands[:3])

    @property
    def rows(self) -> int:
        return self.operands.q.shape[0] * self.operands.q.shape[1]

    @property
    def buckets(self) -> int:
        return _up(self.operands.buckets, _SUBLANES)

    @property
    def signed(self) -> int:
        tables, bits, _ = self.operands.planes.shape
        return _up(2 * tables * bits, _SUBLANES)

    def tile(self, length: int) -> int:
        """Tokens of a step; queries and keys are as many where they share a step."""
        return min(_CAUSAL_TILE if self.causal else _TILE, length // _LANES * _LANES)

    def spec(self, array: Any, tile: int, backward: bool, tiles: int) -> pl.BlockSpec:
        """Of ``[rows, ..., tokens, width]`` and ``[rows, heads, tokens]``; what has no tokens is whole."""

        def at(t: Any) -> Any:
            return tiles - 1 - t if backward else t

        heads, kind = self.operands.q.shape[1], array.kind
        if kind == "matrix":
            shape, middle = (1, *array.shape[1:-2], tile, array.shape[-1]), array.ndim - 3
            return pl.BlockSpec(shape, lambda r, t: (r, *(0,) * middle, at(t), 0))
        if kind == "vector":
            return pl.BlockSpec((1, array.shape[1], tile), lambda r, t: (r, 0, at(t)))
        if kind == "mask":
            return pl.BlockSpec((1, 1, tile), lambda r, t: (lax.div(r, np.int32(heads)), 0, at(t)))
        return pl.BlockSpec((1, *array.shape[1:]), lambda r, t: (r,) + (0,) * (array.ndim - 1))

    def keys(self) -> list["_Kinded"]:
        k, v, keep = self.operands[1:4]
        masks = [] if keep is None else [_Kinded("mask", keep[:, None])]
        return [_Kinded("matrix", x.reshape(self.rows, *x.shape[2:])) for x in (k, v)] + masks

    def queries(self, *vectors: Array) -> list["_Kinded"]:
        """Queries, and beside them matrices and vectors."""
        found = []
        for x in (self.operands.q, *vectors):
            found.append(_Kinded("matrix" if x.ndim == 5 else "vector", x.reshape(self.rows, *x.shape[2:])))
        return found

    def states(self) -> list["_Kinded"]:
        """Shapes of the sums: masses along all lanes, and values."""
        mass = jax.ShapeDtypeStruct((self.rows, self.buckets, _LANES), jnp.float32)
        value = jax.ShapeDtypeStruct((self.rows, self.buckets, self.operands.v.shape[3]), jnp.float32)
        return [_Kinded("state", mass), _Kinded("state", value)]

    def beta(self, tile: int) -> "_Kinded":
        return _Kinded("state", jax.ShapeDtypeStruct((self.rows, self.signed, tile), jnp.float32))

    def __call__(
        self,
        kernel: Any,
        name: str,
        length: int,
        inputs: list["_Kinded"],
        outputs: list["_Kinded"],
        *,
        backward: bool = False,
        scratch: bool = True,
    ) -> Any:
        operands, tile = self.operands, self.tile(length)
        tables, bits, width = operands.planes.shape
        chosen = selection(tables, bits, self.signed, self.buckets)
        planes = signed_planes(operands.planes, self.signed, width)
        shared = [
            jnp.asarray(np.concatenate([chosen.T] * 3, axis=1), jnp.bfloat16),
            jnp.asarray(np.concatenate([chosen] * 3, axis=1), jnp.bfloat16),
            planes if self.precise else jnp.concatenate(split(planes)),
            operands.beta.reshape(1),
        ]
        setting = Setting(
            Arithmetic(self.precise),
            operands.buckets,
            operands.q.shape[2],
            operands.q.shape[3],
            operands.k.shape[2],
            tile,
            self.causal,
            operands.keep is not None,
        )
        arrays, kind = varying_alike(*shared, *(x.array for x in inputs))
        tiles = pl.cdiv(length, tile)
        kept = [pltpu.VMEM(x.shape[1:], jnp.float32) for x in self.states()] if scratch and self.causal else []
        call = pl.pallas_call(
            functools.partial(kernel, setting),
            grid=(self.rows, tiles),
            in_specs=[
                *(pl.BlockSpec(x.shape, lambda r, t: (0, 0)) for x in shared[:3]),
                pl.BlockSpec(memory_space=pltpu.SMEM),
                *(self.spec(x, tile, backward, tiles) for x in inputs),
            ],
            out_specs=[self.spec(x, tile, backward, tiles) for x in outputs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.array.dtype, manual_axis_type=kind) for x in outputs],
            scratch_shapes=kept,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VECTOR_BYTES
            ),
            interpret=self.interpret,
            name=name,
        )
        with jax.enable_x64(False):  # a TPU has no loop counters of 64 bits
            return call(*arrays)

    def sums(self) -> list["_Kinded"]:
        """Over all keys, where there is no order."""
        if self.causal:
            return []
        length = self.operands.k.shape[2]
        found = self(sum_kernel, "race_attention_sums", length, self.keys(), self.states(), scratch=False)
        return [_Kinded("state", x) for x in found]


class _Kinded(NamedTuple):
    """An array, or its shape, and how tiles of it are taken."""

    kind: str
    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def ndim(self) -> int:
        return len(self.array.shape)


def forward(operands: Operands, causal: bool, *, interpret: bool | pltpu.InterpretParams = False) -> Results:
    """The attention.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, causal)
    call = _Call(operands, causal, interpret)
    batch, heads, groups, length, _, _, width = operands.sizes
    out = jax.ShapeDtypeStruct((call.rows, groups, length, width), operands.v.dtype)
    inverse = jax.ShapeDtypeStruct((call.rows, groups, length), jnp.float32)
    inputs = [*call.sums(), *call.queries(), *(call.keys() if causal else [])]
    outputs = [_Kinded("matrix", out), _Kinded("vector", inverse)]
    found = call(forward_kernel, "race_attention", length, inputs, outputs)
    return Results(*(x.reshape(batch, heads, *x.shape[1:]) for x in found))


def backward(
    operands: Operands,
    results: Results,
    gradient: Array,
    causal: bool,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> Gradients:
    """The gradients, with what the forward pass left.

    Raises:
        NotImplementedError: what `check` says.
    """
    check(operands, causal)
    call = _Call(operands, causal, interpret)
    batch, heads, _, length, keys, _, _ = operands.sizes
    of_keys = call.keys()
    of_queries = call.queries(gradient, results.inverse, mass_gradient(results, gradient))

    def like(x: _Kinded) -> _Kinded:
        return _Kinded("matrix", jax.ShapeDtypeStruct(x.shape, x.array.dtype))

    d_q, by_queries, *after = call(
        query_gradient_kernel,
        "race_attention_query_gradient",
        length,
        [*call.sums(), *of_queries, *(of_keys if causal else [])],
        [like(of_queries[0]), call.beta(call.tile(length)), *([] if causal else call.states())],
    )
    d_k, d_v, by_keys = call(
        key_gradient_kernel,
        "race_attention_key_gradient",
        keys,
        [*(_Kinded("state", x) for x in after), *of_keys, *(of_queries if causal else [])],
        [*map(like, of_keys[:2]), call.beta(call.tile(keys))],
        backward=True,
    )
    d_q, d_k, d_v = (x.reshape(batch, heads, *x.shape[1:]) for x in (d_q, d_k, d_v))
    return Gradients(d_q, d_k, d_v, by_queries.sum() + by_keys.sum())
