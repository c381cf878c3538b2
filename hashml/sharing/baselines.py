"""What ROBE is compared with at equal stored bytes: other embeddings of ``T`` tables in few weights.

    hashing trick       row[v] = table[h(v)]                          Weinberger et al. 2009
    quotient-remainder  row[v] = left[v // r] * right[v mod r]         Shi et al., KDD 2020, arXiv 1909.02107
    narrow              row[v] = table[v, :d'] @ projection           a full table of smaller width

All three share their weights over the tables as ROBE does (virtual rows are numbered through), take ids
``[*batch, T]``, give rows ``[*batch, T, features]``, and make ids outside a table NaN. What each really
holds (`hashml.accounting.stored_bytes` of its parameters) is at most ``budget`` weights: whole rows or columns.
Rows are scrambled before they are hashed, as ROBE's are: under the plain linear hash the number of collisions
among consecutive ids is right on average, but varies ten times as much from seed to seed.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from hashml.hashing import Limbs, hash_slots
from hashml.sharing.budgets import check_positive
from hashml.sharing.hashed_net import uniform_init
from hashml.sharing.robe import Ids
from hashml.sharing.robe_tables import check_tables, global_rows
from hashml_kernels import bits


class HashingTrickTables(nn.Module):
    """One table of ``budget // features`` rows; a virtual row is the stored row that its hash names.

    Attributes:
        num_embeddings: rows of each virtual table.
        features: coordinates of a row.
        budget: weights stored at most, room for one row at least.
        seed: picks the hash function.
        param_dtype: of the table.

    Raises:
        TypeError: where a size is no int; when called with ids that are no integers.
        ValueError: for no tables, a size below 1, or a budget below ``features``.
    """

    num_embeddings: Sequence[int]
    features: int
    budget: int
    seed: int = 0
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Ids) -> Float[Array, "*batch T {self.features}"]:
        stored = _stored_rows(self.num_embeddings, self.features, self.budget, at_least=1)
        table = self.param("table", _rows_init(self.num_embeddings), (stored, self.features), self.param_dtype)
        rows, inside = global_rows(ids, self.num_embeddings)
        slot = hash_slots(bits.scramble(rows), size=stored, seed=self.seed).astype(jnp.int32)
        return jnp.where(inside[..., None], table.at[slot].get(mode="promise_in_bounds"), jnp.nan)


class QuotientRemainderTables(nn.Module):
    """Products of a row of a quotient table and a row of a remainder table.

    The remainder table is as large as the budget allows while every virtual row has a pair of its own;
    where no sizes allow that, both get half and rows are first hashed to the pairs that exist (as they
    are from 2**32 rows on). The quotient table starts near one, so that rows start with the spread of a
    plain table.

    Attributes and errors: as `HashingTrickTables`, with room for two rows at least.
    """

    num_embeddings: Sequence[int]
    features: int
    budget: int
    seed: int = 0
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Ids) -> Float[Array, "*batch T {self.features}"]:
        stored = _stored_rows(self.num_embeddings, self.features, self.budget, at_least=2)
        total = sum(map(int, self.num_embeddings))
        left_rows, right_rows = _split_rows(stored, total)
        spread = _rows_init(self.num_embeddings)
        right = self.param("remainder", spread, (right_rows, self.features), self.param_dtype)
        left = self.param(
            "quotient",
            lambda key, shape, dtype: 1 + spread(key, shape, dtype),
            (left_rows, self.features),
            self.param_dtype,
        )
        rows, inside = global_rows(ids, self.num_embeddings)
        pairs = left_rows * right_rows
        if pairs >= total and not isinstance(rows, Limbs):
            pair = rows
        else:
            pair = hash_slots(bits.scramble(rows), size=min(pairs, 2**31 - 1), seed=self.seed)
        quotient = (pair // jnp.uint32(right_rows)).astype(jnp.int32)
        remainder = (pair % jnp.uint32(right_rows)).astype(jnp.int32)
        # Ids outside their tables may fall outside here; their rows become NaN below.
        found = left.at[quotient].get(mode="clip") * right.at[remainder].get(mode="clip")
        return jnp.where(inside[..., None], found, jnp.nan)


class NarrowTables(nn.Module):
    """Full tables of the greatest width that the budget allows, projected to ``features``.

    Attributes:
        num_embeddings, features, budget, param_dtype: as in `HashingTrickTables`.

    Raises:
        TypeError: where a size is no int; when called with ids that are no integers.
        ValueError: for no tables, a size below 1, 2**31 rows or more in all, or a budget with no room for
            tables of width 1: compression beyond ``features`` is not to be had by a smaller width.
    """

    num_embeddings: Sequence[int]
    features: int
    budget: int
    param_dtype: Dtype = jnp.float32

    @property
    def width(self) -> int:
        """The stored width: as many columns as fit, at most ``features``, projection included."""
        total = sum(map(int, self.num_embeddings))
        if self.budget >= total * self.features:
            return self.features
        return self.budget // (total + self.features)

    @nn.compact
    def __call__(self, ids: Ids) -> Float[Array, "*batch T {self.features}"]:
        _check(self.num_embeddings, self.features, self.budget)
        total = sum(map(int, self.num_embeddings))
        if total >= 2**31:
            raise ValueError(f"num_embeddings has {total} rows in all; a table of every row holds fewer than 2**31")
        if self.width < 1:
            raise ValueError(f"budget is {self.budget}; width 1 needs {total + self.features}, with its projection")
        table = self.param("table", _rows_init(self.num_embeddings), (total, self.width), self.param_dtype)
        rows, inside = global_rows(ids, self.num_embeddings)
        found = table.at[rows.astype(jnp.int32)].get(mode="clip")
        if self.width < self.features:
            # Keeps the variance of a coordinate: width terms of variance 1 / width.
            init = nn.initializers.normal(self.width**-0.5)
            projection = self.param("projection", init, (self.width, self.features), self.param_dtype)
            found = found @ projection
        return jnp.where(inside[..., None], found, jnp.nan)


def _check(num_embeddings: Sequence[int], features: int, budget: int) -> None:
    check_tables(num_embeddings)
    check_positive(features=features, budget=budget)


def _stored_rows(num_embeddings: Sequence[int], features: int, budget: int, *, at_least: int) -> int:
    """Whole rows that ``budget`` weights make."""
    _check(num_embeddings, features, budget)
    if budget < at_least * features:
        raise ValueError(f"budget is {budget}; it must be at least {at_least * features}: {at_least} x features")
    return budget // features


def _rows_init(num_embeddings: Sequence[int]):
    """Uniform on +- 1 / sqrt(rows of the largest table), as the tables of `RobeTables`."""
    return uniform_init((3 * max(num_embeddings)) ** -0.5)


def _split_rows(stored: int, total: int) -> tuple[int, int]:
    """Rows of the quotient and of the remainder table: few quotients while left * right >= total can be met."""
    square = stored * stored - 4 * total
    if square < 0:
        return stored // 2, stored - stored // 2
    left = max(1, (stored - math.isqrt(square)) // 2 - 1)
    while left * (stored - left) < total:
        left += 1
    return left, min(total, stored - left)
