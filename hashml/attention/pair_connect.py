"""PairConnect: an embedding of every pair of tokens, looked up in attention's place (Xu et al., arXiv 2106.08235).

No query meets a key. Token ``i`` adds up the rows of the pairs that it makes with the ``w`` tokens up to itself:

    z[i] = sum_j alpha[i - j] E[row(x_i, x_j, rho)] / sqrt(w)        row = (rho V + x_i) V + x_j,  0 <= i - j < w
    s[i] = U[x_i] + z[i] A,    s += W2 gelu(W1 norm(s)) some times,    logits = norm(s) U'

with ``rho = 0, 1, 2, 3-4, 5-8, ..`` the distance's bucket, or always 0. Rows belong to tokens and never to hidden
states, so a deeper model looks the same tokens up again, at wider strides, and depth is the perceptrons' affair
(`hashml.attention.pair_connect_model`). The table has ``V**2`` rows a bucket; where they are too many, they lie
hashed in a memory of ``budget`` weights, as ROBE's do.

A *reconstruction*: of the paper its abstract alone was at hand, which names pairs, look-ups and a perceptron, but no
formula. Departures from the notes that it follows: the hash is `hash_gather`'s, pairwise independent; each head has
an ``alpha`` of its own (without hashing, heads would else be one table); rows times buckets decide whether a table is
stored whole. The gradient of E is dense, but zero in the rows that no pair used. Train it by Adagrad, which leaves
those as they are: Adam moves every row that it ever met, and keeps two moments for all.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype, Initializer
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer

from hashml.sharing.budgets import check_positive
from hashml_kernels import bits
from hashml_kernels.hash_gather import hash_gather_bag

AnyArray = Array | np.ndarray

EXACT_ROWS = 2**20
"""Up to so many rows `PairConnect` stores every pair, unless it is told a budget."""

HASHED_ROWS = 2**18
"""Rows that a hashed memory has room for, unless `PairConnect` is told a budget."""


class PairRows(NamedTuple):
    """The pairs of each token.

    Attributes:
        rows: ``[*batch, n, w]``, rows of the table of all pairs; uint32, or `bits.Limbs` from 2**32 rows on. Where
            there is no token yet, the row is that of another pair.
        valid: ``[n, w]``, which pairs there are. It depends on places alone.
    """

    rows: Any
    valid: Bool[np.ndarray, "n w"]


def distance_bucket(distance: int) -> int:
    """``rho`` of a distance: 0 for the token itself, then 1, 2, 3-4, 5-8, 9-16, 17-32 and so on.

    Raises:
        ValueError: for a distance below 0.
    """
    if distance < 0:
        raise ValueError(f"distance is {distance}; a token sees none that come later")
    return 0 if distance == 0 else (distance - 1).bit_length() + 1


def pair_table_rows(vocabulary: int, *, window: int, dilation: int = 1, relative: bool = True) -> int:
    """Rows of the table of all pairs: ``V**2`` for each bucket of distance in the window.

    Raises:
        TypeError, ValueError: for sizes that are no positive ints, or a row number ``rho V + x_i`` beyond 32 bits.
    """
    check_positive(vocabulary=vocabulary, window=window, dilation=dilation)
    buckets = distance_bucket((window - 1) * dilation) + 1 if relative else 1
    if vocabulary * buckets > 2**31:
        raise ValueError(
            f"vocabulary is {vocabulary}, of {buckets} buckets of distance; their product must be at most 2**31"
        )
    return vocabulary**2 * buckets


def pair_rows(
    ids: Integer[AnyArray, "*batch T"],
    *,
    vocabulary: int,
    window: int,
    dilation: int = 1,
    relative: bool = True,
    last: int | None = None,
) -> PairRows:
    """The row of each pair ``(x_i, x_j)`` with ``i - j`` in ``0, dilation, .. (window - 1) dilation``.

    Args:
        ids: tokens, NumPy's or JAX's; the result is alike.
        vocabulary: V, of which every token is below.
        window: w, pairs of a token.
        dilation: tokens from one pair to the next.
        relative: whether pairs at distances of different buckets are different rows.
        last: give the pairs of so many last tokens only, as a decoder needs; all by default.

    Raises:
        TypeError: for ids that are no integers, or sizes that are no ints.
        ValueError: for a size out of range; for ids outside the vocabulary, unless they are traced.
    """
    total = pair_table_rows(vocabulary, window=window, dilation=dilation, relative=relative)
    ids = checked_ids(ids, vocabulary, last)
    length = ids.shape[-1]
    words, places = bits.as_words(ids), np.arange(0 if last is None else length - last, length)
    distances = np.arange(window) * dilation
    before = places[:, None] - distances
    buckets = np.array([distance_bucket(int(d)) if relative else 0 for d in distances], np.uint32)
    first = words[..., places][..., None] + buckets * np.uint32(vocabulary)
    second = words[..., np.maximum(before, 0)]
    row = bits.flat_index(first, vocabulary, second)
    return PairRows(row.lo if total <= 2**32 else row, before >= 0)


def checked_ids(ids: Any, vocabulary: int, last: int | None = None) -> Any:
    """The ids, if they and the number of ``last`` ones are what `pair_rows` takes."""
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids has dtype {ids.dtype}; it must be an integer type")
    if ids.ndim < 1:
        raise ValueError("ids is a scalar; tokens need an axis of their order")
    if last is not None and not 0 <= last <= ids.shape[-1]:
        raise ValueError(f"last is {last}; it must lie in 0..{ids.shape[-1]}, the tokens")
    if not isinstance(ids, Tracer) and ids.size:
        host = np.asarray(ids)
        if host.min() < 0 or host.max() >= vocabulary:
            raise ValueError(f"ids lie in {host.min()}..{host.max()}; they must lie in 0..{vocabulary - 1}")
    return ids


# --- the sums -----------------------------------------------------------------------------------------


def pair_connect(
    table: Float[AnyArray, "rows P"],
    ids: Integer[AnyArray, "*batch T"],
    alpha: Float[AnyArray, " w"],
    *,
    vocabulary: int,
    dilation: int = 1,
    relative: bool = True,
    last: int | None = None,
) -> Float[Array, "*batch n P"]:
    """``z``, from a table that stores every pair. No array of all rows looked up is formed.

    Args:
        table: E, of `pair_table_rows` rows.
        ids: tokens.
        alpha: factor of each distance, ``0, dilation, ..``; its length is the window w.
        vocabulary, dilation, relative, last: as in `pair_rows`.

    Returns:
        ``[*batch, T or last, P]`` in the dtype of the table, added up in float32. Traced ids outside the vocabulary
        make NaN of every token whose window they are in.

    Raises:
        TypeError, ValueError: as `pair_rows`; ValueError for a table of other rows.
    """
    table, alpha = jnp.asarray(table), jnp.asarray(alpha)
    how = {"vocabulary": vocabulary, "window": alpha.shape[0], "dilation": dilation, "relative": relative}
    seen = pair_rows(ids, **how, last=last)
    rows = _table_rows(table, seen, pair_table_rows(**how))
    z = _sums(table, rows, jnp.broadcast_to(_factors(alpha, seen), rows.shape))
    return _nan_outside(z, ids, seen, vocabulary, dilation)


def hashed_pair_connect(
    memory: Float[AnyArray, " budget"],
    ids: Integer[AnyArray, "*batch T"],
    alpha: Float[AnyArray, " w"],
    *,
    vocabulary: int,
    features: int,
    dilation: int = 1,
    relative: bool = True,
    block_size: int | None = None,
    seed: int = 0,
    signed: bool = True,
    last: int | None = None,
) -> Float[Array, "*batch n {features}"]:
    """`pair_connect`, with the rows of all pairs in a memory of ``budget`` weights, by `hash_gather_bag`.

    Args:
        memory: the stored weights; ``m = budget / features`` rows where blocks are rows.
        ids, alpha, vocabulary, dilation, relative, last: as in `pair_connect`.
        features: P, coordinates of a row.
        block_size: by default whole rows are hashed, and P must divide the budget; a smaller one is ROBE's Z, and
            blocks then lie anywhere.
        seed: picks the hash function.
        signed: whether rows (blocks) have hashed signs, so that what a collision adds is zero on average.

    Raises:
        TypeError, ValueError: as `pair_rows` and `hash_gather_bag`; ValueError for a budget of no whole rows.
    """
    alpha, whole = jnp.asarray(alpha), block_size is None
    check_positive(features=features)
    seen = pair_rows(
        ids, vocabulary=vocabulary, window=alpha.shape[0], dilation=dilation, relative=relative, last=last
    )
    if whole and (memory.shape[0] < features or memory.shape[0] % features):
        raise ValueError(f"memory has {memory.shape[0]} weights; whole rows need a multiple of features = {features}")
    shape = jax.tree.leaves(seen.rows)[0].shape
    z = hash_gather_bag(
        memory,
        seen.rows,
        jnp.broadcast_to(_factors(alpha, seen), shape),
        features=features,
        block_size=features if block_size is None else block_size,
        align=features if whole else 1,
        seed=seed,
        sign="block" if signed else "none",
    )
    return _nan_outside(z, ids, seen, vocabulary, dilation)


def pair_attention(
    table: Float[AnyArray, "rows columns"],
    ids: Integer[AnyArray, "*batch T"],
    bias: Float[AnyArray, " w"],
    *,
    vocabulary: int,
    dilation: int = 1,
    relative: bool = True,
    last: int | None = None,
) -> Float[Array, "*batch n values"]:
    """The normalised form: rows hold P values and a logit, and the values are averaged by a softmax of the logits.

    With the table of `attention_pair_table` it *is* a causal attention head over the window.

    Args:
        table: values and, in the last column, logits.
        ids, vocabulary, dilation, relative, last: as in `pair_connect`.
        bias: added to the logits of each distance; its length is the window w.

    Raises:
        TypeError, ValueError: as `pair_connect`; ValueError for a table of one column.
    """
    table, bias = jnp.asarray(table), jnp.asarray(bias)
    if table.shape[1] < 2:
        raise ValueError(f"table has {table.shape[1]} columns; it must have one value at least, and the logits")
    how = {"vocabulary": vocabulary, "window": bias.shape[0], "dilation": dilation, "relative": relative}
    seen = pair_rows(ids, **how, last=last)
    rows = _table_rows(table, seen, pair_table_rows(**how))
    logits = table[:, -1].at[rows].get(mode="promise_in_bounds").astype(jnp.float32) + bias
    # The pair with itself is always there, so that no sum is empty.
    weights = jax.nn.softmax(jnp.where(seen.valid, logits, jnp.finfo(jnp.float32).min), axis=-1)
    return _nan_outside(_sums(table[:, :-1], rows, weights), ids, seen, vocabulary, dilation)


def attention_pair_table(
    queries: Float[AnyArray, "V D"], keys: Float[AnyArray, "words D"], values: Float[AnyArray, "_ P"]
) -> Float[Array, "V*V P+1"]:
    """The table of `pair_attention`, ``relative=False``, that makes it the attention head of these words.

    Row ``x V + y`` holds ``values[y]`` and ``queries[x] . keys[y] / sqrt(D)``: all that a head without positions can
    say of a pair has rank D, and its values depend on the second word alone, where a table is free in both.

    Raises:
        ValueError: for queries, keys and values of different vocabularies.
    """
    queries, keys, values = (jnp.asarray(x) for x in (queries, keys, values))
    if not queries.shape[0] == keys.shape[0] == values.shape[0]:
        raise ValueError(
            f"queries has {queries.shape[0]} words, keys {keys.shape[0]} and values {values.shape[0]}; "
            "they must be as many"
        )
    logits = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST) / math.sqrt(queries.shape[1])
    size = queries.shape[0]
    spread = jnp.broadcast_to(values[None], (size, *values.shape))
    return jnp.concatenate([spread, logits[..., None]], axis=-1).reshape(size * size, -1)


def _table_rows(table: Array, seen: PairRows, rows: int) -> Array:
    """Rows as int32; those of traced ids outside the vocabulary are some row, as their sums become NaN."""
    if rows >= 2**31:
        raise ValueError(f"vocabulary, window and relative make {rows} rows; a table of every pair has below 2**31")
    if table.shape[0] != rows:
        raise ValueError(f"table has {table.shape[0]} rows; vocabulary, window and relative make {rows}")
    return jnp.minimum(jnp.asarray(seen.rows), np.uint32(rows - 1)).astype(jnp.int32)


def _nan_outside(z: Array, ids: Any, seen: PairRows, vocabulary: int, dilation: int) -> Array:
    """NaN where a token, or one that it makes a pair with, is no word: traced ids cannot be refused."""
    ids = jnp.asarray(ids)
    wide = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
    known, length = (wide >= 0) & (wide < vocabulary), ids.shape[-1]
    last, window = seen.valid.shape
    places = np.arange(length - last, length)[:, None] - np.arange(window) * dilation
    inside = (known[..., np.maximum(places, 0)] | ~seen.valid).all(axis=-1)
    return jnp.where(inside[..., None], z, jnp.nan)


def _factors(alpha: Array, seen: PairRows) -> Float[Array, "n w"]:
    return jnp.where(seen.valid, alpha.astype(jnp.float32) / math.sqrt(alpha.shape[0]), 0)


def _sums(table: Array, rows: Array, weights: Array) -> Array:
    flat = (x.reshape(-1, x.shape[-1]) for x in (rows, weights))
    return _bag(table, *flat).reshape(*rows.shape[:-1], table.shape[1])


@jax.custom_vjp
def _bag(table: Float[Array, "rows P"], rows: Array, weights: Float[Array, "n w"]) -> Float[Array, "n P"]:
    """Weighted sums of ``w`` rows, member by member, so that ``n w`` rows are never side by side."""

    def add(total: Array, member: tuple[Array, Array]) -> tuple[Array, None]:
        row, weight = member
        return total + weight[:, None] * _take(table, row), None

    start = jnp.zeros((rows.shape[0], table.shape[1]), jnp.float32)
    return jax.lax.scan(add, start, (rows.T, weights.T))[0].astype(table.dtype)


def _bag_forward(table: Array, rows: Array, weights: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _bag(table, rows, weights), (table, rows, weights)


def _bag_backward(saved: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, None, Array]:
    """One table of sums for all members: autodiff of the scan would add up one table a member."""
    table, rows, weights = saved
    gradient = gradient.astype(jnp.float32)

    def pull(sums: Array, member: tuple[Array, Array]) -> tuple[Array, Array]:
        row, weight = member
        sums = sums.at[row].add(weight[:, None] * gradient, mode="promise_in_bounds")
        return sums, jnp.sum(_take(table, row) * gradient, axis=1)

    sums, by_weight = jax.lax.scan(pull, jnp.zeros(table.shape, jnp.float32), (rows.T, weights.T))
    return sums.astype(table.dtype), None, by_weight.T.astype(weights.dtype)


_bag.defvjp(_bag_forward, _bag_backward)


def _take(table: Array, row: Array) -> Array:
    return table.at[row].get(mode="promise_in_bounds").astype(jnp.float32)


# --- the module ---------------------------------------------------------------------------------------


class PairConnect(nn.Module):
    """``z A``: what the pairs of a token add to it. ``PairConnect(vocabulary=257, features=128)(ids)``.

    Parameters are ``table`` ``[heads, rows, P / heads]`` or ``memory`` ``[heads, budget / heads]``, ``alpha``
    ``[heads, w]`` and the matrix ``out`` [P, D]. At V = 65, P = 64 and a window of 32 the table of all pairs has
    29,575 rows and 7.6 MB; the hashed memory of larger vocabularies has 67 MB unless it is told a budget.

    Attributes:
        vocabulary: V.
        features: D, of the result.
        pair_features: P, of the table's rows; all heads together.
        window: w, pairs of a token; None for all earlier tokens.
        max_length: tokens of the longest sequence, where the window is None.
        budget: weights of the pairs, all heads together, for a hashed memory. By default every pair has a row of its
            own while these are at most `EXACT_ROWS`, and else `HASHED_ROWS` rows are stored.
        heads: tables, each with an ``alpha``, and a hash function of its own.
        dilation, relative: as in `pair_rows`.
        normalised: `pair_attention`, never hashed: ``table`` has a column more a head, and ``bias`` [heads, w], from
            zero, stands for ``alpha``.
        block_size, signed: as in `hashed_pair_connect`.
        seed: picks the hash functions.
        table_init, param_dtype: of table or memory.

    Raises:
        TypeError, ValueError: as `pair_connect` and `hashed_pair_connect`; ValueError for heads that do not divide,
            a sequence longer than max_length, or what does not go together.
    """

    vocabulary: int
    features: int
    pair_features: int = 64
    window: int | None = 32
    max_length: int | None = None
    budget: int | None = None
    heads: int = 1
    dilation: int = 1
    relative: bool = True
    normalised: bool = False
    block_size: int | None = None
    signed: bool = True
    seed: int = 0
    table_init: Initializer = nn.initializers.normal(0.02)
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, ids: Integer[AnyArray, "*batch T"], *, last: int | None = None
    ) -> Float[Array, "*batch n {self.features}"]:
        """``z A`` of all tokens, or of the ``last`` ones."""
        window, rows, budget = self._sizes(ids.shape[-1])
        width = self.pair_features // self.heads
        how = {"vocabulary": self.vocabulary, "dilation": self.dilation, "relative": self.relative, "last": last}
        if budget is None:
            shape = (self.heads, rows, width + self.normalised)
            pairs = self.param("table", self.table_init, shape, self.param_dtype)
        else:
            pairs = self.param("memory", self.table_init, (self.heads, budget // self.heads), self.param_dtype)
        name, start = ("bias", nn.initializers.zeros) if self.normalised else ("alpha", nn.initializers.ones)
        alpha = self.param(name, start, (self.heads, window), jnp.float32)
        found = []
        for head in range(self.heads):
            if budget is None:
                add = pair_attention if self.normalised else pair_connect
                found.append(add(pairs[head], ids, alpha[head], **how))
            else:
                hashed = {"block_size": self.block_size, "seed": self.seed + head, "signed": self.signed}
                found.append(hashed_pair_connect(pairs[head], ids, alpha[head], features=width, **hashed, **how))
        z = jnp.concatenate(found, axis=-1)
        return nn.Dense(self.features, use_bias=False, param_dtype=self.param_dtype, name="out")(z)

    def _sizes(self, length: int) -> tuple[int, int, int | None]:
        """The window, rows of all pairs, and the budget or None."""
        check_positive(features=self.features, pair_features=self.pair_features, heads=self.heads)
        if self.pair_features % self.heads:
            raise ValueError(f"heads is {self.heads}; it must divide pair_features = {self.pair_features}")
        if (self.window is None) == (self.max_length is None):
            raise ValueError(f"give exactly one of window (got {self.window}) and max_length (got {self.max_length})")
        if self.max_length is not None:
            check_positive(max_length=self.max_length)
            if length > self.max_length:
                raise ValueError(f"ids has {length} tokens; max_length is {self.max_length}")
        window = self.window if self.max_length is None else -(-self.max_length // max(self.dilation, 1))
        assert window is not None
        rows = pair_table_rows(self.vocabulary, window=window, dilation=self.dilation, relative=self.relative)
        budget = self.budget
        if budget is None and rows > EXACT_ROWS:
            budget = HASHED_ROWS * self.pair_features
        if budget is not None:
            check_positive(budget=budget)
            if self.normalised:
                raise ValueError(f"normalised is True and the budget {budget}; logits of pairs are not hashed")
            if budget % self.heads:
                raise ValueError(f"budget is {budget}; heads = {self.heads} must divide it")
        return window, rows, budget
