"""Full embedding tables, the baseline of every compression: one parameter, one gather.

The ``T`` tables of a recommender, of ``n_0 .. n_{T-1}`` rows and one width ``D``, lie below each other in
one array, so that a batch of ids [B, T] is ONE gather (and its update one scatter):

    row of id v in table t = offset_t + v,    offset_t = n_0 + ... + n_{t-1}

An id outside its own table reads a row of NaN: under `jax.jit` nothing can be raised, and any other
answer would silently be another table's row. Initial rows are uniform on +-1/sqrt(n_t), whatever ``D`` is
(the reference implementation of DLRM, Naumov et al. 2019, arXiv 1906.00091).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Integer


def concatenated_ids(ids: Integer[Array, "*B T"], sizes: Sequence[int]) -> Int[Array, "*B T"]:
    """Row numbers, int32, in the concatenation of tables of ``sizes`` rows.

    An id that is negative or beyond its table becomes ``sum(sizes)``, one beyond the last row, which
    `take_rows` reads as NaN and the row updates drop.

    Args:
        ids: integers of any width; column ``t`` numbers the rows of table ``t``.
        sizes: rows of each table, ``T`` positive ints whose sum is below 2**31.

    Raises:
        TypeError: if ``ids`` are no integers.
        ValueError: if ``sizes`` and ``ids`` disagree in ``T``, or a size is not allowed.
    """
    offsets, total = _layout(sizes)
    if ids.ndim < 1 or ids.shape[-1] != len(sizes):
        raise ValueError(f"ids have shape {ids.shape}; their last axis must have {len(sizes)} entries, a table each")
    local = row_numbers(ids, beyond=total)
    return jnp.where(local < np.asarray(sizes, np.int32), local + offsets, total)


def take_rows(table: Float[Array, "N D"], ids: Integer[Array, "*B"]) -> Float[Array, "*B D"]:
    """``table[ids]``, with rows of NaN for ids that are negative or not below ``N``, itself below 2**31.

    Raises:
        TypeError: if ``ids`` are no integers.
    """
    rows = row_numbers(ids, beyond=table.shape[0])
    return jnp.take(table, rows, axis=0, mode="fill", fill_value=jnp.nan)


def row_numbers(ids: Integer[Array, "*B"], *, beyond: int) -> Int[Array, "*B"]:
    """``ids`` as int32, with ``beyond`` for those that are negative or need more than 31 bits.

    JAX would count a negative index from the end, and wrap a wider one into another row.

    Raises:
        TypeError: if ``ids`` are no integers.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids are of dtype {ids.dtype}; allowed are integers")
    rows = ids.astype(jnp.int32)
    return jnp.where((rows >= 0) & (rows == ids), rows, beyond)


class EmbeddingTables(nn.Module):
    """Tables of ``sizes`` rows of width ``features``, stored whole: ``sum(sizes) * features`` weights.

    Ids beyond their table give rows of NaN (see the module). A bag of ids is looked up with its slots on a
    further leading axis and summed by `hashml.models.dlrm.sum_bags`.
    """

    sizes: tuple[int, ...]
    features: int
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Integer[Array, "*B T"]) -> Float[Array, "*B T {self.features}"]:
        rows = concatenated_ids(ids, self.sizes)
        shape = (sum(self.sizes), self.features)
        return take_rows(self.param("table", _uniform_rows(self.sizes), shape, self.param_dtype), rows)


def _uniform_rows(sizes: Sequence[int]) -> nn.initializers.Initializer:
    """Rows of table ``t`` uniform on +-1/sqrt(n_t)."""

    def init(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
        rows = jnp.asarray(sizes)
        bound = jnp.repeat(1 / jnp.sqrt(rows), rows, total_repeat_length=shape[0])
        return jax.random.uniform(key, shape, dtype, -1, 1) * bound[:, None].astype(dtype)

    return init


def _layout(sizes: Sequence[int]) -> tuple[np.ndarray, int]:
    """Offsets of the tables, and rows in all."""
    if min(sizes, default=0) < 1:
        raise ValueError(f"sizes are {tuple(sizes)}; allowed are one or more tables of at least one row")
    total = sum(sizes)
    if total >= 2**31:
        raise ValueError(f"sizes sum to {total} rows; allowed are fewer than 2**31, which int32 can number")
    return np.cumsum([0, *sizes[:-1]]).astype(np.int32), total
