"""DeepGEMM's lookup-table product of few-bit codes (Ganji, Ashfaq et al., 2023, arXiv 2304.09049; not DeepSeek's).

    LUT[iw << ba | ia] = V[iw] A[ia]            out[m, n] = sum_k LUT[iw[n, k] << ba | ia[m, k]]

Activations are codes of ba bits with levels A, weights codes of bw bits with levels V: any numbers, evenly spaced or
not. With 2 and 2 bits all products fit one register, and a shuffle of bytes takes the place of 64 multiplications.
Integer levels give int32, exactly; float levels float32, to rounding. Layers are trained by learned step sizes (LSQ:
Esser et al., ICLR 2020): ``q = clip(round(x / scale))``, the rounding passed over by the gradient.

Weights are stored packed along k, 4 codes of 2 bits in a byte, 64 rows side by side (`LutWeights`).

Departures. On a processor with shuffles of bytes a table holds sums of 2 or 3 products, is indexed by weights alone,
and activations pick the table: a look-up serves 64 rows, and nothing is added up across a register; the paper's own
kernel is `hashml.weights.lut_gemm_native.row_product`. XLA has no such shuffle; its forms are products of levels
(``"int8"``, ``"float32"``), tables of a byte's partial sums (``"byte_tables"``), and products with bits of weights
(``"bit_planes"``). Codes that fill no byte meet activations of level 0.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Int8, Integer, Num, UInt8

from hashml.coding import pack, packed_size, unpack
from hashml.weights import lut_gemm_native

AnyArray = Array | np.ndarray
Implementation = Literal["auto", "native", "int8", "float32", "byte_tables", "bit_planes"]
"""``"auto"``: native code for integers on a CPU with a compiler; else ``"float32"`` where that is exact or levels are
floats, else ``"int8"``."""

BITS = (2, 3, 4)
BLOCK = 64
_EXACT = 2**24
"""Integers up to here, and sums of them, are float32 numbers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LutWeights:
    """Packed weights of N rows and K columns; `pack_weights` makes them.

    Attributes:
        blocks: byte g of the packed rows ``64 b .. 64 b + 63``; rows beyond N are zeros.
        levels: of the codes, 4, 8 or 16.
        rows: N.
        columns: K.
    """

    blocks: UInt8[AnyArray, "blocks row_bytes 64"]
    levels: Num[AnyArray, " W"]
    rows: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})

    @property
    def bits(self) -> int:
        return self.levels.shape[0].bit_length() - 1


def pack_weights(codes: Integer[AnyArray, "N K"], levels: Num[AnyArray, " W"]) -> LutWeights:
    """Weights ``levels[codes]`` in ``packed_size(K, bits)`` bytes a row, N rounded up to whole blocks.

    Args:
        codes: below W; higher bits are cut off.
        levels: 4, 8 or 16 numbers, one for each code of 2, 3 or 4 bits.

    Raises:
        ValueError: for another number of levels, or no column.
    """
    bits = _bits(levels, "weight")
    rows, columns = codes.shape
    if columns < 1:
        raise ValueError("codes has no column; a product needs at least one")
    return LutWeights(_blocks(jnp.asarray(codes), bits), _narrow(levels), rows, columns)


@functools.partial(jax.jit, static_argnames="bits")
def _blocks(codes: Array, bits: int) -> Array:
    packed = jnp.pad(pack(codes, bits), ((0, -len(codes) % BLOCK), (0, 0)))
    return packed.reshape(-1, BLOCK, packed.shape[1]).swapaxes(1, 2)


@jax.jit
def unpack_weights(weights: LutWeights) -> UInt8[Array, "N K"]:
    """The codes."""
    packed = jnp.asarray(weights.blocks).swapaxes(1, 2).reshape(-1, packed_size(weights.columns, weights.bits))
    return unpack(packed[: weights.rows], weights.bits, weights.columns)


def product_table(
    activation_levels: Num[AnyArray, " A"], weight_levels: Num[AnyArray, " W"]
) -> Num[np.ndarray, " W*A"]:
    """LUT: the product of code ``iw`` with ``ia`` at ``iw << ba | ia``, integers as int64, which none overflows.

    Raises:
        ValueError: unless there are 4, 8 or 16 levels of either.
    """
    _bits(activation_levels, "activation")
    _bits(weight_levels, "weight")
    a, w = (np.asarray(levels) for levels in (activation_levels, weight_levels))
    wide = np.int64 if _integers(a, w) else np.float64
    return np.outer(w.astype(wide), a.astype(wide)).reshape(-1)


def accumulator_bound(
    activation_levels: Num[AnyArray, " A"], weight_levels: Num[AnyArray, " W"], columns: int
) -> int | float:
    """``K max |LUT|``: no partial sum is larger, in whatever order."""
    return columns * np.abs(product_table(activation_levels, weight_levels)).max().item()


def lut_product(
    activations: Integer[AnyArray, "M K"],
    weights: Integer[AnyArray, "N K"],
    activation_levels: Num[AnyArray, " A"],
    weight_levels: Num[AnyArray, " W"],
    *,
    implementation: Implementation = "auto",
) -> Num[Array, "M N"]:
    """``activation_levels[activations] @ weight_levels[weights].T`` from codes of both, as `packed_product`."""
    packed = pack_weights(weights, weight_levels)
    return packed_product(activations, packed, activation_levels, implementation=implementation)


def packed_product(
    activations: Integer[AnyArray, "M K"],
    weights: LutWeights,
    activation_levels: Num[AnyArray, " A"],
    *,
    implementation: Implementation = "auto",
) -> Num[Array, "M N"]:
    """The product with packed weights: int32 where all levels are integers, else float32.

    Args:
        activations: codes below A.
        weights: of `pack_weights`.
        activation_levels: 4, 8 or 16.
        implementation: the same integers from each; see `Implementation`.

    Raises:
        ValueError: where columns or numbers of levels do not fit, where known integer levels could leave int32, where
            an implementation does not serve such levels, or for another one.
        NativeUnavailable: for ``"native"`` where it is not.
    """
    if implementation not in get_args(Implementation):
        allowed = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation is {implementation!r}; allowed are {allowed}")
    _bits(activation_levels, "activation")
    if activations.shape[1] != weights.columns:
        raise ValueError(f"activations has {activations.shape[1]} columns; the weights have {weights.columns}")
    integers, levels = _integers(activation_levels, weights.levels), _narrow(activation_levels)
    bound = _bound(levels, weights)
    if integers and bound is not None and bound >= 2**31:
        raise ValueError(f"{weights.columns} products may add up to {bound}; int32 ends at {2**31 - 1}")
    exact_floats = not integers or (bound is not None and bound <= _EXACT)
    if implementation in ("native", "int8") and not integers:
        raise ValueError(f"implementation is {implementation!r}, which needs integer levels; 'float32' has any")
    if implementation == "float32" and not exact_floats:
        raise ValueError(f"implementation is 'float32'; sums may reach {bound}, of which it is exact to {_EXACT}")
    codes = jnp.asarray(activations, jnp.uint8)
    xla = {"int8": _integer_product, "float32": _float_product, "byte_tables": _byte_tables, "bit_planes": _planes}
    chosen = xla.get(implementation, _float_product if exact_floats else _integer_product)

    def on_xla(codes: Array) -> Array:
        return chosen(codes, weights, levels).astype(jnp.int32 if integers else jnp.float32)

    if implementation == "native":
        return _native(codes, weights, levels)
    # Asking whether it is available compiles it, which nobody needs where programs run elsewhere.
    if implementation == "auto" and integers and jax.default_backend() == "cpu" and lut_gemm_native.available():
        return jax.lax.platform_dependent(codes, cpu=lambda codes: _native(codes, weights, levels), default=on_xla)
    return on_xla(codes)


# --- how it is computed -------------------------------------------------------------------------------


def _native(codes: Array, weights: LutWeights, levels: AnyArray) -> Array:
    a, w = (jnp.asarray(x, jnp.int32) for x in (levels, weights.levels))
    return lut_gemm_native.block_product(codes, weights.blocks, a, w, rows=weights.rows)


def _integer_product(codes: Array, weights: LutWeights, levels: AnyArray) -> Array:
    """By XLA's product of int8, or of int32 where levels are wider."""
    wide = jnp.int8 if levels.dtype == weights.levels.dtype == jnp.int8 else jnp.int32
    a = _values(codes, levels).astype(wide)
    return _over_blocks(
        weights, lambda w: jnp.dot(a, _values(w, weights.levels).astype(wide), preferred_element_type=jnp.int32)
    )


def _float_product(codes: Array, weights: LutWeights, levels: AnyArray) -> Array:
    a = _values(codes, levels).astype(jnp.float32)
    return _over_blocks(weights, lambda w: _dot(a, _values(w, weights.levels).astype(jnp.float32)))


def _dot(a: Array, w: Array) -> Array:
    return jnp.dot(a, w, precision=jax.lax.Precision.HIGHEST)


def _values(codes: Array, levels: AnyArray) -> Array:
    """Levels of codes by comparisons, which XLA does many at once, unlike a gather; codes beyond have the last."""
    found = jnp.full(codes.shape, levels[-1])
    for code in range(len(levels) - 1):
        found = jnp.where(codes == code, levels[code], found)
    return found


def _over_blocks(weights: LutWeights, product: Callable[[Array], Array]) -> Array:
    """The product of each block's codes ``[K, 64]``; one block at a time is more than packed."""

    def one(block: Array) -> Array:
        if weights.bits == 3:
            triples = jnp.pad(block, ((0, -len(block) % 3), (0, 0))).reshape(-1, 3, BLOCK).astype(jnp.uint32)
            words, count = triples[:, 0] | triples[:, 1] << 8 | triples[:, 2] << 16, 8
        else:
            words, count = block, 8 // weights.bits
        shifts = (weights.bits * np.arange(count)).astype(words.dtype)[:, None]
        codes = (words[:, None] >> shifts & (2**weights.bits - 1)).astype(jnp.uint8)
        return product(codes.reshape(-1, BLOCK)[: weights.columns])

    found = jax.lax.map(one, jnp.asarray(weights.blocks))
    return found.swapaxes(0, 1).reshape(found.shape[1], -1)[:, : weights.rows]


def _byte_tables(codes: Array, weights: LutWeights, levels: AnyArray) -> Array:
    """Activations meet every byte once: partial sums of its codes, read by all rows. For 3 bits, of 2 codes."""
    wide = jnp.int32 if _integers(levels, weights.levels) else jnp.float32
    run = 8 // weights.bits
    short = -weights.columns % run
    values = jnp.pad(_values(codes, levels).astype(wide), ((0, 0), (0, short)))
    byte = np.arange(2 ** (weights.bits * run))
    each = byte >> (weights.bits * np.arange(run))[:, None] & (2**weights.bits - 1)
    entries = jnp.take(weights.levels, each).astype(wide)
    if weights.bits == 3:
        pairs = jnp.pad(unpack_weights(weights), ((0, 0), (0, short))).reshape(weights.rows, -1, 2)
        index = (pairs[..., 0] | pairs[..., 1] << 3).T
    else:
        index = weights.blocks.swapaxes(0, 1).reshape(weights.blocks.shape[1], -1)[:, : weights.rows]
    index = index.astype(jnp.int32)

    def one(values: Array) -> Array:
        tables = jnp.einsum("gr,re->ge", values, entries, precision=jax.lax.Precision.HIGHEST)
        return jnp.take_along_axis(tables, index, axis=1, mode="promise_in_bounds").sum(axis=0)

    return jax.lax.map(one, values.reshape(len(codes), -1, run))


def _planes(codes: Array, weights: LutWeights, levels: AnyArray) -> Array:
    """``V[code] = sum_S c[S] prod_{b in S} bit_b``: a product for each set S, of one bit if V is affine."""
    wide = jnp.int32 if _integers(levels, weights.levels) else jnp.float32
    a = _values(codes, levels).astype(wide)
    known = None if isinstance(weights.levels, Tracer) else _moebius(np.asarray(weights.levels).astype(wide), np)
    found = _moebius(jnp.asarray(weights.levels).astype(wide), jnp)

    def product(w: Array) -> Array:
        total = found[0] * jnp.broadcast_to(a.sum(axis=1, keepdims=True), (len(a), BLOCK))
        for bits in range(1, 2**weights.bits):
            if known is None or known[bits]:
                total += found[bits] * _dot(a, ((w & bits) == bits).astype(wide))
        return total

    return _over_blocks(weights, product)


def _moebius(levels: Any, numpy: Any) -> Any:
    """Coefficients of V as a polynomial of the bits of a code."""
    found = levels
    for bit in range(len(levels).bit_length() - 1):
        halves = found.reshape(-1, 2, 2**bit)
        found = numpy.stack([halves[:, 0], halves[:, 1] - halves[:, 0]], axis=1).reshape(-1)
    return found


def _bits(levels: Any, whose: str) -> int:
    if len(levels) not in (2**bits for bits in BITS):
        raise ValueError(f"there are {len(levels)} levels of {whose}s; codes of 2, 3 or 4 bits have 4, 8 or 16")
    return len(levels).bit_length() - 1


def _integers(*levels: Any) -> bool:
    return all(jnp.issubdtype(x.dtype, jnp.integer) for x in levels)


def _narrow(levels: Any) -> Any:
    """Known integers that fit as int8, others as int32, floats as float32; what is known stays known."""
    if isinstance(levels, Tracer):
        return levels if _integers(levels) else levels.astype(jnp.float32)
    found = np.asarray(levels)
    if not _integers(found):
        return found.astype(np.float32)
    if found.min() < -(2**31) or found.max() >= 2**31:
        raise ValueError(f"levels reach from {found.min()} to {found.max()}; they must be int32 numbers")
    return found.astype(np.int8 if found.min() >= -128 and found.max() <= 127 else np.int32)


def _bound(levels: Any, weights: LutWeights) -> int | float | None:
    """Of sums; from the type where levels are traced, None where that says nothing."""
    if not isinstance(levels, Tracer) and not isinstance(weights.levels, Tracer):
        return accumulator_bound(levels, weights.levels, weights.columns)
    return weights.columns * 2**14 if levels.dtype == weights.levels.dtype == jnp.int8 else None


# --- learned step sizes ---------------------------------------------------------------------------------


def lsq_levels(bits: int, *, signed: bool) -> Int8[np.ndarray, " levels"]:
    """``-2^(bits-1) .. 2^(bits-1) - 1``, or from 0 to ``2^bits - 1``, in the order of codes.

    Raises:
        ValueError: if ``bits`` is not in `BITS`.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; allowed are {', '.join(map(str, BITS))}")
    return (np.arange(2**bits) - (2 ** (bits - 1) if signed else 0)).astype(np.int8)


def lsq_scale(x: Float[AnyArray, "*shape"], bits: int, *, signed: bool) -> Float32[Array, ""]:
    """Where a step size starts: ``2 mean |x| / sqrt(largest level)``."""
    largest = int(lsq_levels(bits, signed=signed)[-1])
    return jnp.maximum(2 * jnp.abs(jnp.asarray(x, jnp.float32)).mean() / math.sqrt(largest), 1e-8)


def lsq_codes(
    x: Float[AnyArray, "*shape"], scale: Float[AnyArray, "..."] | float, bits: int, *, signed: bool
) -> UInt8[Array, "*shape"]:
    """``clip(round(x / scale))`` as codes, 0 for the least level; NaN is code 0."""
    levels = lsq_levels(bits, signed=signed)
    nearest = jnp.round(jnp.clip(jnp.asarray(x) / scale, levels[0], levels[-1])) - levels[0]
    return jnp.nan_to_num(nearest).astype(jnp.uint8)


def lsq_quantize(
    x: Float[AnyArray, "*shape"],
    scale: Float[AnyArray, "..."] | float,
    bits: int,
    *,
    signed: bool,
    shared: int | None = None,
) -> Float[Array, "*shape"]:
    """``scale clip(round(x / scale))``, with gradients as if nothing were rounded.

    That of x is 1 within the levels and 0 beyond. That of the scale is ``round(x / scale) - x / scale`` within, and
    the level beyond, over ``sqrt(shared * largest level)`` as the paper has it, which does not change the value.

    Args:
        x: weights, or activations.
        scale: positive; broadcasts against x, one for all or one a row.
        bits: of a code.
        signed: whether levels are below 0, too.
        shared: numbers that share a scale, those of a batch counted once; all of x, if it is not given.
    """
    levels = lsq_levels(bits, signed=signed)
    x, scale = jnp.asarray(x), jnp.asarray(scale)
    slower = 1 / math.sqrt((shared or x.size // scale.size) * int(levels[-1]))
    scale = jax.lax.stop_gradient(scale * (1 - slower)) + scale * slower
    within = jnp.clip(x / scale, levels[0], levels[-1])
    return (within + jax.lax.stop_gradient(jnp.round(within) - within)) * scale


class LsqDense(nn.Module):
    """A layer trained for `lut_dense`: weights with a step a unit, inputs that are not negative with one step.

    Attributes:
        features: units.
        bits: of weights and of inputs.
        input_scale: where the inputs' step starts.
    """

    features: int
    bits: int = 2
    input_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch K"]) -> Float[Array, "*batch N"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        steps = self.param("kernel_scale", lambda _: jax.vmap(
            lambda column: lsq_scale(column, self.bits, signed=True))(kernel.T))  # fmt: skip
        step = self.param("input_scale", lambda _: jnp.float32(self.input_scale))
        return lsq_dense(x, kernel, bias, steps, step, bits=self.bits)


def lsq_dense(
    x: Float[AnyArray, "*batch K"],
    kernel: Float[AnyArray, "K N"],
    bias: Float[AnyArray, " N"],
    kernel_scale: Float[AnyArray, " N"],
    input_scale: Float[AnyArray, ""],
    *,
    bits: int,
) -> Float[Array, "*batch N"]:
    """The layer in floats, with gradients: what `lut_dense` computes from codes."""
    columns = kernel.shape[0]
    inputs = lsq_quantize(x, input_scale, bits, signed=False, shared=columns)
    return inputs @ lsq_quantize(kernel, kernel_scale, bits, signed=True, shared=columns) + bias


def pack_dense(kernel: Float[AnyArray, "K N"], kernel_scale: Float[AnyArray, " N"], *, bits: int) -> LutWeights:
    """A trained kernel as packed codes; its scales stay as they are."""
    return pack_weights(lsq_codes(kernel, kernel_scale, bits, signed=True).T, lsq_levels(bits, signed=True))


def lut_dense(
    x: Float[AnyArray, "*batch K"],
    weights: LutWeights,
    bias: Float[AnyArray, " N"],
    kernel_scale: Float[AnyArray, " N"],
    input_scale: Float[AnyArray, ""],
    *,
    bits: int,
    implementation: Implementation = "auto",
) -> Float[Array, "*batch N"]:
    """`lsq_dense` by look-ups: inputs become codes, sums are integers, and one product a unit scales them."""
    codes = lsq_codes(x, input_scale, bits, signed=False).reshape(-1, weights.columns)
    sums = packed_product(codes, weights, lsq_levels(bits, signed=False), implementation=implementation)
    return (sums * (input_scale * kernel_scale) + bias).reshape(*x.shape[:-1], weights.rows)
