"""The native half of NoMAD-Attention: ``nomad_native.cc``, compiled on first use, called through `jax.ffi`.

    sums[n] = sum_s tables[s, code[s, n]]     in uint16, by shuffles of bytes (AVX-512, AVX2), else by a plain loop

XLA has no shuffle of bytes, and a gather from 16 entries costs it more than the products that it replaces.
`hashml_kernels.native` says who compiles and where the library lies. Nothing here is needed to install or import
hashml: without a compiler `available` is false, a warning is logged once, and callers take XLA's path.

Work is shared with the threads of XLA's own pool, in units that do not depend on their number, so that they change no
bit of a result.
"""

from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8, UInt16

from hashml_kernels import native
from hashml_kernels.native_xla import XlaFunctions

Level = Literal["auto", "scalar", "avx2", "avx512"]
"""Instructions to use; those that the processor lacks are replaced by the next best. ``"auto"``: the best."""

LEVELS: tuple[Level, ...] = ("auto", "scalar", "avx2", "avx512")
FUNCTIONS = XlaFunctions(
    Path(__file__).with_suffix(".cc"),
    ("hashml_nomad_tables", "hashml_nomad_scores", "hashml_nomad_logits", "hashml_nomad_attend"),
    "NoMAD-Attention runs without its native look-ups, by XLA's slower ones",
    (*native.FLAGS, "-pthread", "-fno-math-errno", "-Wno-psabi"),
)


def available() -> bool:
    """Whether there is a library, which is compiled now where there is none yet. Why not is logged once."""
    return FUNCTIONS.available()


def best_level() -> Level:
    """The best instructions of this processor.

    Raises:
        NativeUnavailable: without a library.
    """
    return LEVELS[FUNCTIONS.library().hashml_nomad_level()]


def query_tables(
    q: Float32[Array, "R J D"], codebook: Float32[Array, "K S 16 c"]
) -> tuple[UInt8[Array, "R J S 16"], Float32[Array, "R J"], Float32[Array, "R J"]]:
    """Tables of queries, their step and their bias, as `hashml.attention.nomad.query_tables` has them.

    XLA takes longer over their few numbers than the look-ups take for thousands of keys. Products are rounded after
    each channel, so that an entry that lies at a half may be the next one of XLA's.

    Args:
        q: of rows; row ``r`` reads key head ``r % K``.
        codebook: of the key heads.

    Raises:
        NativeUnavailable: without a library.
    """
    of_queries, quantisers = q.shape[:2], codebook.shape[1]
    worth = jax.ShapeDtypeStruct(of_queries, jnp.float32)
    out = (jax.ShapeDtypeStruct((*of_queries, quantisers, 16), jnp.uint8), worth, worth)
    entries, step, bias = FUNCTIONS.call("hashml_nomad_tables", out, q, codebook)
    return entries, step, bias


def lookup_sums(
    tables: UInt8[Array, "R J S 16"], codes: UInt8[Array, "R blocks S 16"], *, level: Level = "auto"
) -> UInt16[Array, "R J slots"]:
    """Each key's table entries added up, modulo 2^16; ``slots`` is 32 a block.

    Args:
        tables: of J queries that read the same codes.
        codes: in blocks of 32 keys, as `hashml.attention.nomad.pack_blocks` lays them.
        level: of instructions; the result is the same.

    Raises:
        NativeUnavailable: without a library.
    """
    rows, group = tables.shape[:2]
    out = jax.ShapeDtypeStruct((rows, group, 32 * codes.shape[1]), jnp.uint16)
    return FUNCTIONS.call("hashml_nomad_scores", out, tables, codes, level=_number(level))


def lookup_logits(
    tables: UInt8[Array, "R J S 16"],
    step: Float32[Array, "R J"],
    bias: Float32[Array, "R J"],
    codes: UInt8[Array, "R blocks S 16"],
    *,
    level: Level = "auto",
) -> Float32[Array, "R J slots"]:
    """``step * sums + bias`` of the sums of `lookup_sums`, in the pass that makes them.

    Args:
        tables, codes, level: as `lookup_sums`.
        step: what a unit of a sum is worth.
        bias: what is added.

    Raises:
        NativeUnavailable: without a library.
    """
    rows, group = tables.shape[:2]
    out = jax.ShapeDtypeStruct((rows, group, 32 * codes.shape[1]), jnp.float32)
    return FUNCTIONS.call("hashml_nomad_logits", out, tables, step, bias, codes, level=_number(level))


def attend(
    tables: UInt8[Array, "R J S 16"],
    slope: Float32[Array, "R J"],
    codes: UInt8[Array, "R blocks S 16"],
    values: Float32[Array, "R N V"],
    length: Int32[Array, " R"],
    *,
    level: Level = "auto",
) -> Float32[Array, "R J V"]:
    """``softmax(slope * sums) values`` over the first ``length`` keys of each row; 0 where there is none.

    Args:
        tables, codes, level: as `lookup_sums`.
        slope: what a logit rises by for each unit of a sum.
        values: of the keys.
        length: keys that are seen; clipped to what there is.

    Raises:
        NativeUnavailable: without a library.
    """
    out = jax.ShapeDtypeStruct((*tables.shape[:2], values.shape[2]), jnp.float32)
    return FUNCTIONS.call("hashml_nomad_attend", out, tables, slope, codes, values, length, level=_number(level))


def _number(level: Level) -> np.int32:
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; allowed are {', '.join(map(repr, LEVELS))}")
    return np.int32(LEVELS.index(level))
