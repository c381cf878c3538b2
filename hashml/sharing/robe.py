"""ROBE: random offset block embedding (Desai, Chou, Shrivastava, MLSys 2022, arXiv 2108.02191).

A table of ``num_embeddings`` rows is never stored. Row ``e`` is cut in blocks of ``Z`` coordinates,
and block ``b`` is read, circularly, from ``budget`` shared weights at the offset ``h(e, b)``:

    row[e, t] = sign * memory[(h(e, t // Z) + t mod Z) mod budget]

All tables of a model read one memory: table ``k`` owns the rows from ``offset_k = n_0 + .. + n_(k-1)``.
A forward pass makes one hash a block and copies runs of Z weights; the backward pass keeps the ids
and adds runs into one dense gradient of ``budget`` floats. Departures from the reference code: blocks
wrap at the end of the memory (as in the paper), rows are scrambled before the linear hash, so that
blocks are placed independently (`BlockGeometry`), and signs are offered.
"""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Integer

from hashml.hashing import Limbs, split64
from hashml.sharing.budgets import check_positive, resolve_budget
from hashml.sharing.maps import AnyArray, SharingMap, block_map, virtual_matmul
from hashml_kernels.hash_gather import hash_gather, hash_gather_bag
from hashml_kernels.hash_gather.geometry import Sign, Wrap, id_limbs

Ids = Any
"""Integer array of row ids, or `hashml.hashing.Limbs` where they may exceed 2**32."""


def robe_lookup(
    memory: Float[AnyArray, " budget"],
    ids: Ids,
    *,
    features: int,
    block_size: int = 8,
    seed: int = 0,
    sign: Sign = "none",
    wrap: Wrap = "circular",
    align: int = 1,
    num_embeddings: int | None = None,
) -> Float[Array, "*batch {features}"]:
    """Rows of the virtual table, read from the shared memory.

    Args:
        memory: the stored weights, any float dtype; a NaN in it shows in the rows that read it only.
        ids: row ids ``[*batch]``, any integer dtype, or `Limbs`.
        features: coordinates of a row.
        block_size: Z, coordinates that lie side by side; where it does not divide ``features`` the last
            block is cut short.
        seed: picks the hash function.
        sign: hashed signs, ``"none"`` (the reference), one an ``"element"`` or one a ``"block"``.
        wrap: ``"circular"`` (the paper) or ``"none"`` (the reference kernels).
        align: blocks start at multiples of it; 128 for a TPU.
        num_embeddings: rows of the table, if ids are to be checked against it.

    On a CPU with one device long lookups are native code (`hashml_kernels.hash_gather.native_cpu`), where there is
    a C++ compiler.

    Returns:
        ``[*batch, features]`` in the dtype of ``memory``. Ids from ``num_embeddings`` on give rows of NaN
        and no gradient, jitted or not, as with `flax.linen.Embed`; so do ids below zero, which that reads
        from the end. A wrong id is seen, and never reads another's row.

    Raises:
        TypeError: for ids that are no integers, or a memory that is no float array.
        ValueError: for a memory that is no vector, a budget smaller than a block, or a geometry out of range.
    """
    return hash_gather(
        memory,
        row_words(ids),
        features=features,
        block_size=block_size,
        seed=seed,
        sign=sign,
        wrap=wrap,
        align=align,
        valid=ids_inside(ids, num_embeddings),
    )


def robe_bag(
    memory: Float[AnyArray, " budget"],
    ids: Ids,
    *,
    features: int,
    mode: Literal["sum", "mean"] = "sum",
    offsets: Integer[AnyArray, " bags"] | None = None,
    weights: Float[AnyArray, "*members"] | None = None,
    padding_id: int | None = None,
    block_size: int = 8,
    seed: int = 0,
    sign: Sign = "none",
    wrap: Wrap = "circular",
    align: int = 1,
    num_embeddings: int | None = None,
) -> Float[Array, "*batch {features}"]:
    """Sums or means of rows over bags of ids.

    Args:
        memory: the stored weights.
        ids: ``[*batch, members]``, bags of one length (padded with ``padding_id``), or with ``offsets``
            the ids ``[n]`` of all bags one after another.
        features: coordinates of a row.
        mode: ``"sum"``, or ``"mean"``: the sum over the sum of the weights (their number where no weights
            are given).
        offsets: ``[bags]``, where each bag starts in ``ids``: ascending, from 0.
        weights: one an id, in its shape; differentiable.
        padding_id: members with this id (it may be negative) count for nothing: they are read with
            weight 0, which only a NaN in the memory outlives.
        block_size, seed, sign, wrap, align, num_embeddings: as in `robe_lookup`.

    Returns:
        ``[*batch, features]`` or ``[bags, features]`` in the dtype of ``memory``, added up in float32. An
        empty bag is zero in either mode. An id out of range makes its bag NaN.

    Raises:
        TypeError: as `robe_lookup`; for offsets that are no integers.
        ValueError: as `robe_lookup`; for an unknown mode, ids without an axis of members, weights of
            another shape than ids, or offsets with ids that are no vector.
    """
    if mode not in ("sum", "mean"):
        raise ValueError(f"mode is {mode!r}; it must be 'sum' or 'mean'")
    words = row_words(ids)
    shape = jax.tree.leaves(words)[0].shape
    weights = None if weights is None else jnp.asarray(weights)
    if weights is not None and weights.shape != shape:
        raise ValueError(f"weights has shape {weights.shape}; it must be that of ids, {shape}")
    valid = ids_inside(ids, num_embeddings)
    if padding_id is not None:
        padding = _equals(ids, padding_id)
        weights = jnp.where(padding, 0.0, jnp.ones(shape, jnp.float32) if weights is None else weights)
        valid = None if valid is None else valid | padding
    geometry: dict[str, Any] = {"features": features, "block_size": block_size, "seed": seed, "sign": sign}
    geometry |= {"wrap": wrap, "align": align}

    if offsets is None:
        if not shape:
            raise ValueError("ids is a scalar; a bag needs an axis of members, or offsets")
        sums = hash_gather_bag(memory, words, weights, **geometry)
        mass = jnp.asarray(shape[-1], jnp.float32) if weights is None else weights.sum(-1, dtype=jnp.float32)
        broken = None if valid is None else ~valid.all(axis=-1)
    else:
        segments, bags = _segments(offsets, shape)

        def segment_sum(x: Array) -> Array:
            return jax.ops.segment_sum(x, segments, bags, indices_are_sorted=True)

        rows = hash_gather(memory, words, **geometry).astype(jnp.float32)
        factor = jnp.ones(shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
        sums = segment_sum(rows * factor[:, None]).astype(memory.dtype)
        mass = segment_sum(factor)
        broken = None if valid is None else segment_sum((~valid).astype(jnp.int32)) > 0
    if mode == "mean":
        mass = jnp.broadcast_to(mass, sums.shape[:-1])[..., None]
        sums = (sums / jnp.where(mass == 0, 1, mass)).astype(sums.dtype)
    return _nan_where_not(None if broken is None else ~broken, sums)


def _segments(offsets: AnyArray, shape: tuple[int, ...]) -> tuple[Int[Array, " n"], int]:
    """The bag of each of ``n`` ids."""
    offsets = offsets if isinstance(offsets, jax.Array) else np.asarray(offsets)
    if not jnp.issubdtype(offsets.dtype, jnp.integer):
        raise TypeError(f"offsets has dtype {offsets.dtype}; it must be an integer type")
    if len(shape) != 1 or offsets.ndim != 1:
        raise ValueError(f"ids has shape {shape}, offsets {offsets.shape}; with offsets both must be vectors")
    if shape[0] and not offsets.shape[0]:
        raise ValueError(f"offsets is empty; it must name the bags of {shape[0]} ids")
    if not isinstance(offsets, Tracer) and offsets.shape[0]:
        host = np.asarray(offsets).astype(np.int64)
        if host[0] != 0 or (np.diff(host) < 0).any() or host[-1] > shape[0]:
            raise ValueError(f"offsets is {host}; it must ascend from 0 to at most {shape[0]}, the ids' number")
    position = jnp.arange(shape[0], dtype=jnp.int32)
    return jnp.searchsorted(offsets, position, side="right").astype(jnp.int32) - 1, offsets.shape[0]


def row_words(ids: Ids) -> Any:
    """`id_limbs`, where a negative 64-bit id keeps its bits as a 32-bit one does: no table reaches that far.

    Raises:
        TypeError: for ids that are no integers.
    """
    if isinstance(ids, (Limbs, jax.Array)):
        return id_limbs(ids)
    ids = np.asarray(ids)
    return id_limbs(ids.astype(np.uint64) if ids.dtype == np.int64 else ids)


def ids_inside(ids: Ids, num_embeddings: int | Sequence[int] | None) -> Bool[Array, "*batch"] | None:
    """Which ids name a row of their table; None where all of them do by their type.

    Args:
        ids: ``[*batch]``.
        num_embeddings: rows of the table, or of one table for each column of ids.

    Raises:
        TypeError, ValueError: for ``num_embeddings`` that are no positive ints; TypeError for ids that
            are no integers.
    """
    words, inside = row_words(ids), None
    if not isinstance(ids, Limbs):
        ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
        inside = ids >= 0 if jnp.issubdtype(ids.dtype, jnp.signedinteger) else None
    if num_embeddings is not None:
        for size in num_embeddings if isinstance(num_embeddings, Sequence) else (num_embeddings,):
            check_positive(num_embeddings=size)
        # Compared in two limbs, so that neither the dtype of the ids nor the size of a table matters.
        last = split64(np.asarray(num_embeddings, np.uint64) - 1)
        hi, lo = words if isinstance(words, Limbs) else (np.uint32(0), words)
        below = (hi < last.hi) | ((hi == last.hi) & (lo <= last.lo))
        inside = below if inside is None else inside & below
    return None if inside is None else jnp.asarray(inside)


def _equals(ids: Ids, value: int) -> Bool[Array, "*batch"]:
    if isinstance(ids, Limbs):
        word = value % 2**64
        return jnp.asarray((ids.hi == np.uint32(word >> 32)) & (ids.lo == np.uint32(word & 0xFFFFFFFF)))
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    information = jnp.iinfo(ids.dtype)
    if not information.min <= value <= information.max:
        return jnp.zeros(ids.shape, bool)
    return jnp.asarray(ids == value)


def _nan_where_not(inside: Bool[Array, "*batch"] | None, rows: Array) -> Array:
    return rows if inside is None else jnp.where(inside[..., None], rows, jnp.nan)


class RobeEmbed(nn.Module):
    """Drop-in for `flax.linen.Embed` that stores ``budget`` weights in all.

    Attributes:
        num_embeddings: rows of the virtual table.
        features: coordinates of a row.
        budget: weights stored, or
        compression: ``num_embeddings * features`` over weights stored, at least 1.
        block_size: Z, coordinates that lie side by side in the memory.
        seed, sign, align: as in `robe_lookup`.
        dtype, param_dtype, embedding_init: as in `flax.linen.Embed`; the initialiser is asked for the
            memory. By default normal with the standard deviation that `flax.linen.Embed` gives,
            ``1 / sqrt(features)``.

    Raises:
        ValueError: where not exactly one of budget and compression is given, or one is out of range.
        TypeError: where a size is no int; when called with ids that are no integers.
    """

    num_embeddings: int
    features: int
    budget: int | None = None
    compression: float | int | None = None
    block_size: int = 8
    seed: int = 0
    sign: Sign = "none"
    align: int = 1
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    embedding_init: Initializer | None = None

    def setup(self) -> None:
        sharing = self.sharing_map()
        init = self.embedding_init or nn.initializers.normal(self.features**-0.5)
        self.memory = self.param("memory", init, (sharing.budget,), self.param_dtype)

    def sharing_map(self) -> SharingMap:
        """The map from memory to table, `geometry` included."""
        check_positive(
            num_embeddings=self.num_embeddings,
            features=self.features,
            block_size=self.block_size,
            align=self.align,
        )
        budget = resolve_budget(
            self.num_embeddings * self.features,
            budget=self.budget,
            compression=self.compression,
            at_least=self.block_size,
            multiple_of=self.align,
        )
        return block_map(
            self.num_embeddings,
            self.features,
            budget,
            block_size=self.block_size,
            seed=self.seed,
            sign=self.sign,
            align=self.align,
        )

    def __call__(self, inputs: Ids) -> Float[Array, "*batch {self.features}"]:
        """Rows of the ids ``inputs``; ids outside the table give NaN (`robe_lookup`)."""
        (memory,) = promote_dtype(self.memory, dtype=self.dtype, inexact=False)
        return robe_lookup(
            memory,
            inputs,
            features=self.features,
            block_size=self.block_size,
            seed=self.seed,
            sign=self.sign,
            align=self.align,
            num_embeddings=self.num_embeddings,
        )

    def attend(self, query: Float[AnyArray, "*batch D"]) -> Float[Array, "*batch {self.num_embeddings}"]:
        """Inner products of ``query`` with every row, for a tied output layer; rows exist by blocks only."""
        query, memory = promote_dtype(query, self.memory, dtype=self.dtype)
        return virtual_matmul(query, memory, self.sharing_map(), row_block=4096)
