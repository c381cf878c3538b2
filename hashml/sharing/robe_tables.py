"""Several ROBE tables, of one width or of many, over one memory (Desai, Chou, Shrivastava, MLSys 2022).

Table ``k`` owns the virtual rows from ``offset_k = n_0 + .. + n_(k-1)``, so that equal ids of different
tables are different rows; or each table has a seed of its own.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from hashml.hashing import Limbs
from hashml.sharing.budgets import check_positive, resolve_budget
from hashml.sharing.hashed_net import uniform_init
from hashml.sharing.robe import Ids, ids_inside, robe_lookup, row_words
from hashml_kernels import bits
from hashml_kernels.hash_gather.geometry import Sign


class RobeTables(nn.Module):
    """Rows of ``T`` virtual tables that share one memory of ``budget`` weights.

    Attributes:
        num_embeddings: rows of each table.
        features: coordinates of a row, one number or one a table.
        budget: weights stored, or
        compression: weights of all virtual tables over weights stored, at least 1.
        block_size, sign, align: as in `robe_lookup`.
        seed: one seed, or one a table (all different).
        dtype, param_dtype: as in `flax.linen.Embed`.
        embedding_init: initialiser of the memory; by default uniform on +- 1 / sqrt(rows of the largest
            table), which the DLRM code of the paper uses.

    Raises:
        ValueError: for no tables, features or seeds of another number than tables, equal seeds of
            two tables, or a size or budget out of range.
        TypeError: where a size is no int; when called with ids that are no integers.
    """

    num_embeddings: Sequence[int]
    features: int | Sequence[int]
    budget: int | None = None
    compression: float | int | None = None
    block_size: int = 8
    seed: int | Sequence[int] = 0
    sign: Sign = "none"
    align: int = 1
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    embedding_init: Initializer | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each table."""
        if isinstance(self.features, Sequence):
            return tuple(self.features)
        return (self.features,) * len(self.num_embeddings)

    def geometry(self) -> dict[str, Any]:
        """What determines the map, as JSON values: save it with the parameters."""
        self._check()
        sizes, widths = [int(size) for size in self.num_embeddings], [int(width) for width in self.widths]
        budget = resolve_budget(
            sum(size * width for size, width in zip(sizes, widths, strict=True)),
            budget=self.budget,
            compression=self.compression,
            at_least=self.block_size,
            multiple_of=self.align,
        )
        return {
            "map": "robe_tables",
            "num_embeddings": sizes,
            "features": widths,
            "budget": budget,
            "block_size": int(self.block_size),
            "seed": [int(seed) for seed in self.seed] if isinstance(self.seed, Sequence) else int(self.seed),
            "sign": self.sign,
            "align": int(self.align),
        }

    def _check(self) -> None:
        check_tables(self.num_embeddings)
        check_positive(block_size=self.block_size, align=self.align)
        tables = len(self.num_embeddings)
        if len(self.widths) != tables:
            raise ValueError(f"features has {len(self.widths)} entries; there are {tables} tables")
        for width in self.widths:
            check_positive(features=width)
        seeds = self.seed if isinstance(self.seed, Sequence) else (self.seed,)
        for seed in seeds:
            if not isinstance(seed, numbers.Integral):
                raise TypeError(f"seed is {seed!r}; it must be an int")
        if not isinstance(self.seed, Sequence):
            return
        if len(seeds) != tables:
            raise ValueError(f"seed has {len(seeds)} entries; there are {tables} tables")
        words = [int(seed) % 2**64 for seed in seeds]  # all that a seed is to the hash
        twice = sorted({int(seed) for seed, word in zip(seeds, words, strict=True) if words.count(word) > 1})
        if twice:
            raise ValueError(f"seed holds {twice} more than once; tables of one seed would share every row")

    @nn.compact
    def __call__(self, ids: Ids) -> Float[Array, "*batch T D"] | tuple[Array, ...]:
        """Rows ``[*batch, T, D]``, or one array ``[*batch, D_t]`` a table where the widths differ.

        ``ids[..., t]`` is an id of table ``t``; one outside its table gives a row of NaN.
        """
        geometry = self.geometry()
        init = self.embedding_init or uniform_init((3 * max(self.num_embeddings)) ** -0.5)
        memory = self.param("memory", init, (geometry["budget"],), self.param_dtype)
        (memory,) = promote_dtype(memory, dtype=self.dtype, inexact=False)
        own_seeds = isinstance(self.seed, Sequence)
        rows, inside = global_rows(ids, self.num_embeddings, apart=not own_seeds)
        common = {"block_size": self.block_size, "sign": self.sign, "align": self.align}

        if not own_seeds and len(set(self.widths)) == 1:
            found = robe_lookup(memory, rows, features=self.widths[0], seed=geometry["seed"], **common)
            return jnp.where(inside[..., None], found, jnp.nan)
        seeds = geometry["seed"] if own_seeds else [geometry["seed"]] * len(self.widths)
        tables = []
        for t, (width, seed) in enumerate(zip(self.widths, seeds, strict=True)):
            found = robe_lookup(memory, _column(rows, t), features=width, seed=seed, **common)
            tables.append(jnp.where(inside[..., t, None], found, jnp.nan))
        return jnp.stack(tables, axis=-2) if len(set(self.widths)) == 1 else tuple(tables)


def check_tables(num_embeddings: Sequence[int]) -> None:
    """The check of table sizes that every module with several tables makes.

    Raises:
        TypeError: for what is no sequence of ints.
        ValueError: for no tables, or one without rows.
    """
    if not isinstance(num_embeddings, Sequence):
        raise TypeError(f"num_embeddings is {num_embeddings!r}; it must be a sequence of ints, one a table")
    if len(num_embeddings) == 0:
        raise ValueError("num_embeddings is (); it must name one table at least")
    for size in num_embeddings:
        check_positive(num_embeddings=size)


def global_rows(ids: Ids, num_embeddings: Sequence[int], *, apart: bool = True) -> tuple[Any, Array]:
    """Virtual rows of ids ``[*batch, T]``, and which ids lie inside their tables.

    Where all tables together have more than 2**32 rows the rows are `Limbs`. With ``apart`` false every
    table counts from 0.

    Raises:
        TypeError: for ids that are no integers.
        ValueError: for ids without one column a table.
    """
    words, tables = row_words(ids), len(num_embeddings)
    shape = jax.tree.leaves(words)[0].shape
    if not shape or shape[-1] != tables:
        raise ValueError(f"ids has shape {shape}; its last axis must be {tables}, one column a table")
    inside = ids_inside(ids, num_embeddings)
    assert inside is not None  # sizes were given
    sizes = np.asarray(num_embeddings, np.uint64)
    # Rows outside their tables may come out wrong below: they are never shown.
    if max(num_embeddings) <= 2**32 and isinstance(words, Limbs):
        words = words.lo
    if not apart:
        return words, inside
    offsets = np.cumsum(sizes) - sizes
    if sum(num_embeddings) <= 2**32:
        return words + offsets.astype(np.uint32), inside
    words = words if isinstance(words, Limbs) else Limbs(jnp.zeros_like(words), words)
    return bits.add64(words, bits.split64(offsets)), inside


def _column(rows: Any, t: int) -> Any:
    """Column ``t`` of rows that may be `Limbs`."""
    return Limbs(rows.hi[..., t], rows.lo[..., t]) if isinstance(rows, Limbs) else rows[..., t]
