"""LMA: semantically constrained memory allocation (Desai, Pan, Sun, Chou, Shrivastava 2021, arXiv 2103.06124).

Values of a table share weights as often as they mean the same, and else by chance. With ``D_v`` the set of
training samples that contain value ``v``, and ``key[p](v)`` the MinHash keys of ``D_v`` (`hashml.hashing.minhash`),

    row[v, t] = memory[(h(e_i(v), i) + t mod Z) mod budget],   i = t // Z
    e_i(v)    = key[p_0(i)](v), .., key[p_(K-1)(i)](v)          K picks with replacement, fixed for each i

so that block ``i`` of two rows is the same weights where all ``D_i`` distinct picks agree, and meets with
probability ``1 / budget`` otherwise:

    P(shared) = phi_i + (1 - phi_i) / budget,   phi_i = (J + (1 - J) / 2**key_bits) ** D_i

What is stored beside the weights is a signature of 8 bytes a value: `stored_bytes` of the module's variables
counts it, and so does ``compression``. ``h`` is the unbiased block hash of ROBE, given ``e_i(v)`` for the row;
the reference kernel reduces modulo ``budget - Z + 1`` and does not wrap. A value that is seen too rarely gets
random keys. Of one field, in which a sample has one value, the sets are disjoint: values of different fields
share. The variant for dense inputs is left out.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, UInt32

from hashml.hashing import Limbs
from hashml.hashing.minhash import key_count
from hashml.sharing.budgets import check_positive, resolve_budget
from hashml.sharing.lma_signatures import Signatures, check_signatures, check_words
from hashml.sharing.maps import AnyArray, SharingMap, virtual_matmul
from hashml.sharing.robe import Ids, ids_inside, row_words
from hashml_kernels import bits
from hashml_kernels.hash_gather.geometry import BlockGeometry, block_bases
from hashml_kernels.manual_axes import varying_alike

_PICK_STREAM = 0x706B


@dataclasses.dataclass(frozen=True)
class LmaGeometry:
    """The allocation, but for the signatures.

    Attributes:
        budget: weights in the memory, below 2**31.
        features: coordinates of a row.
        block_size: Z; blocks longer than one leave fewer independent functions, ``features / Z``, and rows
            share more unevenly.
        keys_to_use: K, keys that must agree; ``K * key_bits`` is at most 64, less what does not fill a word.
        key_bits: bits of a key.
        seed: picks the keys and the hash function.

    Raises:
        TypeError: where a number is no int.
        ValueError: where one is out of range.
    """

    budget: int
    features: int
    block_size: int = 1
    keys_to_use: int = 8
    key_bits: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        layout = BlockGeometry(self.budget, self.features, self.block_size, self.seed)
        check_positive(keys_to_use=self.keys_to_use)
        key_count(self.key_bits)
        if self.keys_to_use > 2 * (32 // self.key_bits):
            raise ValueError(
                f"keys_to_use is {self.keys_to_use}; at most {2 * (32 // self.key_bits)} keys of "
                f"{self.key_bits} bits fit two words"
            )
        for name in ("budget", "features", "block_size", "seed"):
            object.__setattr__(self, name, getattr(layout, name))
        for name in ("keys_to_use", "key_bits"):
            object.__setattr__(self, name, int(getattr(self, name)))

    @property
    def layout(self) -> BlockGeometry:
        """ROBE's geometry of the same blocks."""
        return BlockGeometry(self.budget, self.features, self.block_size, self.seed)

    @property
    def picks(self) -> np.ndarray:
        """The keys ``p_k(i)`` of each block, int ``[blocks, keys_to_use]``."""
        return _picks(self.layout.blocks, self.keys_to_use, self.key_bits, self.seed)


@functools.lru_cache(maxsize=64)
def _picks(blocks: int, keys_to_use: int, key_bits: int, seed: int) -> np.ndarray:
    # Mixed, not linear: under a linear hash the picks of a block would be an arithmetic progression.
    block, pick = np.meshgrid(*(np.arange(n, dtype=np.uint32) for n in (blocks, keys_to_use)), indexing="ij")
    fraction = bits.mix64(Limbs(block, pick), seed, _PICK_STREAM)
    picks = bits.multiply32(fraction, np.uint32(key_count(key_bits))).hi.astype(np.int64)
    picks.flags.writeable = False
    return picks


def lma_slots(signatures: UInt32[AnyArray, "*batch 2"], geometry: LmaGeometry) -> UInt32[AnyArray, "*batch features"]:
    """A(v, t), the slot of each coordinate of the values with these signatures: the definition, in NumPy or JAX."""
    layout, width = geometry.layout, np.uint32(geometry.key_bits)
    per_word = 32 // geometry.key_bits
    low, high = signatures[..., 0, None], signatures[..., 1, None]
    mask = np.uint32(2**geometry.key_bits - 1)
    chosen: list[Any] = [np.uint32(0), np.uint32(0)]
    for k, picks in enumerate(geometry.picks.T):
        # The word of each block's key is known here, so that selecting it is a mask and no gather.
        upper = np.where(picks >= per_word, np.uint32(0xFFFFFFFF), np.uint32(0))
        shift = width * (picks % per_word).astype(np.uint32)
        key = ((low ^ ((low ^ high) & upper)) >> shift) & mask
        chosen[k // per_word] = chosen[k // per_word] | (key << (width * np.uint32(k % per_word)))
    # A high word of zero changes no hash, and costs two products.
    row = Limbs(chosen[1], chosen[0]) if geometry.keys_to_use > per_word else chosen[0]
    base = block_bases(layout, row, np.arange(layout.blocks, dtype=np.uint32))
    place = base[..., None] + np.arange(layout.block_size, dtype=np.uint32)
    place = place - np.uint32(layout.budget) * (place >= np.uint32(layout.budget)).astype(np.uint32)
    return place.reshape(*base.shape[:-1], layout.blocks * layout.block_size)[..., : layout.features]


def lma_lookup(
    memory: Float[AnyArray, " budget"],
    signatures: UInt32[AnyArray, "values 2"],
    ids: Ids,
    *,
    features: int,
    block_size: int = 1,
    keys_to_use: int = 8,
    key_bits: int = 4,
    seed: int = 0,
) -> Float[Array, "*batch {features}"]:
    """Rows of the virtual table, read from the shared memory.

    Args:
        memory: the stored weights, any float dtype.
        signatures: of every value, as `pack_signatures` gives them.
        ids: values ``[*batch]``, any integer dtype, or `Limbs`.
        features: coordinates of a row.
        block_size, keys_to_use, key_bits, seed: as in `LmaGeometry`.

    Returns:
        ``[*batch, features]`` in the dtype of ``memory``. Ids without a signature, and ids below zero, give
        rows of NaN and no gradient. The gradient is added up in float32; what the backward pass keeps is
        ``ids`` and the signatures that are there anyway.

    Raises:
        TypeError: for ids that are no integers, a memory that is no float array, signatures that are not uint32.
        ValueError: for arrays of another shape, or a geometry out of range.
    """
    memory = jnp.asarray(memory)
    if not jnp.issubdtype(memory.dtype, jnp.floating):
        raise TypeError(f"memory has dtype {memory.dtype}; it must be a float type")
    if memory.ndim != 1:
        raise ValueError(f"memory has shape {memory.shape}; it must be a vector of budget weights")
    check_words(signatures)
    signatures = jnp.asarray(signatures)
    geometry = LmaGeometry(memory.shape[0], features, block_size, keys_to_use, key_bits, seed)
    return _gather_rows(memory, signatures, ids, geometry)


def lma_map(
    signatures: Signatures | UInt32[AnyArray, "values 2"],
    columns: int,
    budget: int,
    *,
    block_size: int = 1,
    keys_to_use: int = 8,
    key_bits: int | None = None,
    seed: int = 0,
    scale: float | int = 1.0,
) -> SharingMap:
    """The allocation as a map of the family, with a row a signature and no signs.

    Its ``geometry`` names the signatures by their checksum: they are part of a trained model. ``key_bits`` is
    that of `Signatures`, or 4.

    Raises:
        TypeError, ValueError: as `LmaGeometry` and `Signatures`; ValueError for key_bits other than those of
            the `Signatures`, or a scale that is not finite.
    """
    if not isinstance(signatures, Signatures):
        signatures = Signatures(signatures, 4 if key_bits is None else key_bits)
    elif key_bits not in (None, signatures.key_bits):
        raise ValueError(f"key_bits is {key_bits}; the signatures have {signatures.key_bits}")
    if not np.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")
    geometry = LmaGeometry(budget, columns, block_size, keys_to_use, signatures.key_bits, seed)
    return _sharing_map(signatures.words, geometry, float(scale), signatures.checksum)


def _sharing_map(words: AnyArray, geometry: LmaGeometry, scale: float, checksum: str) -> SharingMap:
    def expand_rows(memory: AnyArray, ids: Any) -> Array:
        # As with the family's other maps, what lies beyond the last row is some row.
        rows = _gather_rows(jnp.asarray(memory), jnp.asarray(words), _places(row_words(ids), len(words)), geometry)
        return rows if scale == 1.0 else rows * jnp.asarray(scale, rows.dtype)

    def pull_rows(gradients: AnyArray, ids: Any) -> Array:
        known = jnp.asarray(words)
        flat = jnp.asarray(gradients).reshape(-1, geometry.features)
        place = jnp.asarray(_places(row_words(ids), len(words))).reshape(-1)
        operands, _ = varying_alike(flat, known, place)
        sums = _scatter(*operands, geometry)
        return sums if scale == 1.0 else sums * scale

    def slots(ids: Any) -> AnyArray:
        place = _places(row_words(ids), len(words))
        on_device = isinstance(place, jax.Array) or isinstance(words, jax.Array)
        return lma_slots((jnp.asarray(words) if on_device else words)[place], geometry)

    def signs(ids: Any) -> AnyArray:
        return np.ones((*_places(row_words(ids), len(words)).shape, geometry.features), np.float32)

    fields = {name: value for name, value in dataclasses.asdict(geometry).items() if name != "features"}
    described = {"map": "lma", "rows": len(words), "columns": geometry.features, "scale": scale, **fields}
    return SharingMap(
        rows=len(words),
        columns=geometry.features,
        budget=geometry.budget,
        scale=scale,
        expand_rows=expand_rows,
        pull_rows=pull_rows,
        slots=slots,
        signs=signs,
        geometry={**described, "signatures": checksum},
    )


# --- gradients: gather and scatter are each other's transpose, so any order of reverse mode works ----


def _gather_rows(memory: Array, signatures: Array, ids: Ids, geometry: LmaGeometry) -> Array:
    """Rows of ids; NaN where an id has no signature."""
    values = signatures.shape[0]
    place = jnp.asarray(_places(row_words(ids), values))
    inside = ids_inside(ids, values)
    # Said by the row's number: a mask over the rows found would be kept for the backward pass.
    flat = (place if inside is None else jnp.where(inside, place, -1)).reshape(-1)
    operands, _ = varying_alike(memory, signatures, flat)
    return _gather(*operands, geometry, np.nan).reshape(*place.shape, geometry.features)


def _places(words: Any, values: int) -> AnyArray:
    """Row numbers as int32, those beyond the last value as the last."""
    low = words.lo if isinstance(words, Limbs) else words
    last = np.uint32(values - 1)
    return (jnp.minimum(low, last) if isinstance(low, jax.Array) else np.minimum(low, last)).astype(np.int32)


def _slots(signatures: Array, rows: Array, geometry: LmaGeometry) -> Array:
    chosen = signatures.at[jnp.maximum(rows, 0)].get(mode="promise_in_bounds")
    return jnp.asarray(lma_slots(chosen, geometry)).astype(jnp.int32)


def _custom_vjp(*static: int) -> Callable[[Callable[..., Any]], Any]:
    return functools.partial(jax.custom_vjp, nondiff_argnums=static)


@_custom_vjp(3, 4)
def _gather(memory, signatures, rows, geometry: LmaGeometry, outside: float) -> Any:
    """Rows of the table, ``outside`` where a row is -1."""
    found = memory.at[_slots(signatures, rows, geometry)].get(mode="promise_in_bounds")
    return jnp.where(rows[:, None] >= 0, found, jnp.asarray(outside, found.dtype))


def _gather_forward(memory, signatures, rows, geometry, outside):
    return _gather(memory, signatures, rows, geometry, outside), (signatures, rows, jnp.zeros(0, memory.dtype))


def _gather_backward(geometry, outside, residuals, cotangent):
    signatures, rows, like = residuals
    return _scatter(cotangent, signatures, rows, geometry).astype(like.dtype), None, None


_gather.defvjp(_gather_forward, _gather_backward)


@_custom_vjp(3)
def _scatter(gradients, signatures, rows, geometry: LmaGeometry) -> Any:
    """The transpose: sums of gradients by slots, float32, without the rows that are -1."""
    known = jnp.where(rows[:, None] >= 0, gradients.astype(jnp.float32), 0)
    memory = jnp.zeros(geometry.budget, jnp.float32)
    return memory.at[_slots(signatures, rows, geometry)].add(known, mode="promise_in_bounds")


def _scatter_forward(gradients, signatures, rows, geometry):
    return _scatter(gradients, signatures, rows, geometry), (signatures, rows, jnp.zeros(0, gradients.dtype))


def _scatter_backward(geometry, residuals, cotangent):
    signatures, rows, like = residuals
    return _gather(cotangent, signatures, rows, geometry, 0.0).astype(like.dtype), None, None


_scatter.defvjp(_scatter_forward, _scatter_backward)


# --- the module -------------------------------------------------------------------------------------


def memory_budget(
    virtual: int,
    values: int,
    *,
    budget: int | None,
    compression: float | int | None,
    block_size: int,
    param_dtype: Dtype,
) -> int:
    """Weights of the memory: ``budget``, or what ``compression`` leaves beside 8 bytes a value.

    Raises:
        TypeError, ValueError: as `resolve_budget`; ValueError where the signatures leave less than a block.
    """
    if compression is None:
        return resolve_budget(virtual, budget=budget, compression=None, at_least=block_size)
    whole = resolve_budget(virtual, budget=budget, compression=compression)
    taken = -(-8 * values // jnp.dtype(param_dtype).itemsize)
    if whole - taken < block_size:
        raise ValueError(
            f"compression is {compression}: {whole} weights in all, of which the signatures of {values} values "
            f"take {taken}; at least block_size = {block_size} must be left (budget counts the memory alone)"
        )
    return whole - taken


def stored_words(module: nn.Module, signatures: Signatures) -> Array:
    """The words as the module's variable ``signatures``; where only parameters are given, as a constant.

    A training loop that carries parameters alone thus works; one that gives all variables keeps the words
    of a large table out of the compiled program.
    """
    if module.is_initializing() or module.has_variable("signatures", "words"):
        return jnp.asarray(module.variable("signatures", "words", lambda: jnp.asarray(signatures.words)).value)
    return jnp.asarray(signatures.words)


class LmaEmbed(nn.Module):
    """`flax.linen.Embed` in ``budget`` weights and a signature a value, which is a variable but no parameter.

    Differentiate by ``variables["params"]``: the collection ``signatures`` holds integers. Where it is not
    given to `apply`, the module's own are read.

    Attributes:
        num_embeddings: rows of the virtual table.
        features: coordinates of a row.
        signatures: one a row.
        budget: weights in the memory, the signatures not counted, or
        compression: bytes of the full table over all bytes stored, the signatures' 8 bytes a row counted.
        block_size, keys_to_use, seed: as in `LmaGeometry`.
        dtype, param_dtype, embedding_init: as in `flax.linen.Embed`; the initialiser is asked for the
            memory. By default normal with the standard deviation that `flax.linen.Embed` gives.

    Raises:
        ValueError: where not exactly one of budget and compression is given, one is out of range, or there
            are not as many signatures as rows.
        TypeError: where a size is no int, or signatures are no `Signatures`; when called with ids that are
            no integers.
    """

    num_embeddings: int
    features: int
    signatures: Signatures
    budget: int | None = None
    compression: float | int | None = None
    block_size: int = 1
    keys_to_use: int = 8
    seed: int = 0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    embedding_init: Initializer | None = None

    def setup(self) -> None:
        init = self.embedding_init or nn.initializers.normal(self.features**-0.5)
        self.memory = self.param("memory", init, (self._layout().budget,), self.param_dtype)
        self.words = stored_words(self, self.signatures)

    def _layout(self) -> LmaGeometry:
        check_positive(num_embeddings=self.num_embeddings, features=self.features, block_size=self.block_size)
        check_signatures(self.signatures, self.num_embeddings)
        budget = memory_budget(
            self.num_embeddings * self.features,
            self.num_embeddings,
            budget=self.budget,
            compression=self.compression,
            block_size=self.block_size,
            param_dtype=self.param_dtype,
        )
        bits_of_key = self.signatures.key_bits
        return LmaGeometry(budget, self.features, self.block_size, self.keys_to_use, bits_of_key, self.seed)

    def sharing_map(self) -> SharingMap:
        """The map from memory to table, by the module's own signatures; `geometry` included."""
        return _sharing_map(self.signatures.words, self._layout(), 1.0, self.signatures.checksum)

    def __call__(self, inputs: Ids) -> Float[Array, "*batch {self.features}"]:
        """Rows of the ids ``inputs``; ids outside the table give NaN (`lma_lookup`)."""
        (memory,) = promote_dtype(self.memory, dtype=self.dtype, inexact=False)
        return _gather_rows(memory, self.words, inputs, self._layout())

    def attend(self, query: Float[AnyArray, "*batch D"]) -> Float[Array, "*batch {self.num_embeddings}"]:
        """Inner products of ``query`` with every row, for a tied output layer; rows exist by blocks only."""
        query, memory = promote_dtype(query, self.memory, dtype=self.dtype)
        sharing = _sharing_map(self.words, self._layout(), 1.0, self.signatures.checksum)
        return virtual_matmul(query, memory, sharing, row_block=4096)
