"""The native half of the lookup-table GEMM: ``lut_gemm_native.cc``, compiled on first use, called through `jax.ffi`.

    out[m, n] = sum_k weight_levels[w[n, k]] activation_levels[a[m, k]]       in int32, by shuffles of bytes

XLA has no shuffle of bytes. `hashml_kernels.native` says who compiles and where the library lies. Nothing here is
needed to install or import hashml: without a compiler `available` is false, a warning is logged once, and
`hashml.weights.lut_gemm` takes XLA's path. Work is shared with the threads of XLA's own pool.

Tables are made from the levels in each call, which is some thousand products, and hold sums of whole runs of
weights (`block_product`). The paper's kernel looks single products up (`row_product`); both are exact for any levels.
"""

from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Integer, UInt8

from hashml.coding import pack, packed_size
from hashml_kernels.native_xla import XlaFunctions

Level = Literal["auto", "scalar", "avx2", "avx512"]
"""Instructions to use; those that the processor lacks are replaced by the next best. ``"auto"``: the best.
``"avx512"`` needs VBMI, too."""

LEVELS: tuple[Level, ...] = ("auto", "scalar", "avx2", "avx512")
FUNCTIONS = XlaFunctions(
    Path(__file__).with_suffix(".cc"),
    ("hashml_lut_blocks", "hashml_lut_rows"),
    "The lookup-table GEMM runs without its native kernel, by XLA's products",
)
AnyArray = Array | np.ndarray


def available() -> bool:
    """Whether there is a library, which is compiled now where there is none yet. Why not is logged once."""
    return FUNCTIONS.available()


def best_level() -> Level:
    """The best instructions of this processor.

    Raises:
        NativeUnavailable: without a library.
    """
    return LEVELS[FUNCTIONS.library().hashml_lut_level()]


def block_product(
    activations: UInt8[AnyArray, "M K"],
    blocks: UInt8[AnyArray, "blocks row_bytes 64"],
    activation_levels: Int32[AnyArray, " A"],
    weight_levels: Int32[AnyArray, " W"],
    *,
    rows: int,
    level: Level = "auto",
) -> Int32[Array, "M {rows}"]:
    """The product with weights of 2, 3 or 4 bits, modulo 2^32.

    Args:
        activations: codes; one beyond the levels is read as the last.
        blocks: of `hashml.weights.lut_gemm.pack_weights`, for K columns.
        activation_levels: 1 to 16 of them.
        weight_levels: 4, 8 or 16.
        rows: N, of the weights.
        level: of instructions; the result is the same.

    Raises:
        ValueError: for other sizes or an unknown level.
        NativeUnavailable: without a library.
    """
    levels, columns = len(weight_levels), activations.shape[1]
    if levels not in (4, 8, 16) or not 1 <= len(activation_levels) <= 16:
        raise ValueError(
            f"there are {len(activation_levels)} activation_levels and {levels} weight_levels; allowed are 1 to 16, "
            "and 4, 8 or 16"
        )
    bits = levels.bit_length() - 1
    expected = (-(-rows // 64), packed_size(columns, bits))
    if blocks.shape[:2] != expected:
        raise ValueError(f"blocks has shape {blocks.shape}; {rows} rows of {columns} codes are {(*expected, 64)}")
    return FUNCTIONS.call("hashml_lut_blocks", _result(activations, rows), activations, blocks, activation_levels,
                          weight_levels, bits=np.int32(bits), level=_number(level))  # fmt: skip


def pack_rows(codes: Integer[AnyArray, "N K"]) -> UInt8[Array, "N row_bytes"]:
    """Weights of 2 bits for `row_product`: packed, neighbours in a byte swapped so that no look-up shifts them left.

    What is left of the last byte is code 0.
    """
    columns = codes.shape[1]
    even = jnp.pad(jnp.asarray(codes), ((0, 0), (0, columns % 2)))
    return pack(even.reshape(len(codes), -1, 2)[..., ::-1].reshape(even.shape), 2)


def row_product(
    activations: UInt8[AnyArray, "M row_bytes"],
    weights: UInt8[AnyArray, "N weight_bytes"],
    activation_levels: Int32[AnyArray, "4"],
    weight_levels: Int32[AnyArray, "4"],
    *,
    columns: int,
    level: Level = "auto",
) -> Int32[Array, "M N"]:
    """The product of 2-bit codes as the paper's kernel has it: one product a look-up, 64 at once.

    Args:
        activations: codes as `hashml.coding.pack` lays them.
        weights: of `pack_rows`.
        activation_levels, weight_levels: of the codes.
        columns: K.
        level: of instructions; the result is the same.

    Raises:
        ValueError: if rows have another number of bytes, or the level is unknown.
        NativeUnavailable: without a library.
    """
    if not activations.shape[1] == weights.shape[1] == packed_size(columns, 2):
        raise ValueError(
            f"rows have {activations.shape[1]} and {weights.shape[1]} bytes; {columns} codes of 2 bits take "
            f"{packed_size(columns, 2)}"
        )
    return FUNCTIONS.call("hashml_lut_rows", _result(activations, len(weights)), activations, weights,
                          activation_levels, weight_levels, columns=np.int32(columns),
                          level=_number(level))  # fmt: skip


def _result(activations: Array | np.ndarray, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((len(activations), rows), jnp.int32)


def _number(level: Level) -> np.int32:
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; allowed are {', '.join(map(repr, LEVELS))}")
    return np.int32(LEVELS.index(level))
