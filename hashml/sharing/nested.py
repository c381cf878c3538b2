"""Nested maps: one hash, memories of many sizes (FAIR; Desai, Meisburger, Liu, Shrivastava 2023, arXiv 2311.01722).

Devices that store a virtual matrix in memories of different sizes m can still exchange what they learn, if
all of them fold one map. With M = ``full_budget``, x the flat index of an entry and one ``seed`` for all:

    h_M(x) uniform on [0, M);    h_m(x) = h_M(x) mod m    for every m that divides M
    expand_m(psi)[x] = scale * sign(x) * psi[h_m(x)]      P_m = expand_m collapse_m, the projection on its span

Where m divides m', h_m = h_m' mod m: the span of the smaller memory lies within that of the larger one, and
P_m P_m' = P_m. So a memory of m' is made one of m by folding (`coarsen`), without the matrix.

Departures from the reference: it takes a 29-bit hash modulo m, which favours low slots where m is no power
of two, and sizes int(n * d * c), whose floors do not divide each other; here m divides M, `nested_budgets`
gives such sizes, and the hash is reduced to M without bias.
"""

import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hashml.hashing import Limbs, hash_slots
from hashml.sharing.budgets import check_positive
from hashml.sharing.maps import AnyArray, Rows, SharingMap, map_from_slots
from hashml_kernels import bits
from hashml_kernels.hash_gather.geometry import Sign, id_limbs

Salt = Any
"""A uint32 word: a Python int, or a scalar array that may be traced."""


def nested_budgets(entries: int, levels: int) -> tuple[int, ...]:
    """Sizes ``m0 * 2**levels, .., 2 * m0, m0``: what memories of 1, 1/2, .., 1/2**levels of the entries hold.

    ``m0 = entries // 2**levels``, so that none exceeds its share of the entries and each divides all before it.

    Args:
        entries: of the virtual matrix, rows times columns.
        levels: halvings, 0 or more.

    Raises:
        TypeError: where an argument is no int.
        ValueError: where one is out of range, or there are fewer than ``2**levels`` entries.
    """
    check_positive(entries=entries)
    if not isinstance(levels, int) or isinstance(levels, bool):
        raise TypeError(f"levels is {levels!r}; it must be an int")
    if levels < 0:
        raise ValueError(f"levels is {levels}; it must be at least 0")
    smallest = entries >> levels
    if smallest < 1:
        raise ValueError(f"entries is {entries}; {levels} halvings need at least {2**levels}")
    return tuple(smallest << level for level in range(levels, -1, -1))


def nested_map(
    rows: int,
    columns: int,
    budget: int,
    *,
    full_budget: int,
    seed: int = 0,
    sign: Sign = "element",
    scale: float = 1.0,
    salt: Salt = 0,
) -> SharingMap:
    """The map of ``budget`` weights among those that fold one map of ``full_budget`` weights.

    Args:
        rows, columns: shape of the virtual matrix.
        budget: weights stored; it divides ``full_budget``.
        full_budget: slots of the map that all sizes fold, below 2**31.
        seed: picks the hash function. Devices that exchange what they learn share it.
        sign: hashed signs for each ``"element"``, or ``"none"``.
        scale: what every entry is multiplied by.
        salt: picks another map of the same seed. It may be traced, so that one program serves many maps; a
            traced one is not part of ``geometry``, where it stands as None.

    Raises:
        TypeError: where a size is no int.
        ValueError: where a size is out of range or does not nest, for an unknown sign, or a scale that is
            not finite.
    """
    check_positive(rows=rows, columns=columns, budget=budget, full_budget=full_budget)
    if full_budget >= 2**31:
        raise ValueError(f"full_budget is {full_budget}; a memory holds fewer than 2**31 weights")
    if full_budget % budget:
        raise ValueError(
            f"budget is {budget}; it must divide full_budget = {full_budget}, or the two do not nest "
            "(nested_budgets gives sizes that do)"
        )
    if sign not in ("none", "element"):
        allowed = tuple(name for name in get_args(Sign) if name != "block")
        raise ValueError(f"sign is {sign!r}; it must be one of {allowed}")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")

    def keys(ids: Rows) -> Any:
        """The scrambled flat index of every entry of the rows: one word where all indices fit it."""
        words = jax.tree.map(lambda word: word[..., None], id_limbs(ids))
        flat = bits.flat_index(words, columns, np.arange(columns, dtype=np.uint32))
        return bits.scramble(flat.lo if rows * columns <= 2**32 else flat, bits.as_words(salt))

    def slots(ids: Rows) -> AnyArray:
        return hash_slots(keys(ids), size=full_budget, seed=seed) % np.uint32(budget)

    def signs(ids: Rows) -> AnyArray:
        key = keys(ids)
        limbs = key if isinstance(key, Limbs) else Limbs(np.uint32(0), key)
        if sign == "none":
            return np.ones(limbs.lo.shape, np.float32)
        return 1 - 2 * bits.sign_bit(limbs, seed).astype(np.float32)

    fields = {"rows": rows, "columns": columns, "budget": budget, "full_budget": full_budget, "seed": seed}
    known = int(salt) if isinstance(salt, (int, np.integer)) else None
    geometry = {"map": "nested", **fields, "sign": sign, "scale": scale, "salt": known}
    return map_from_slots(rows, columns, budget, slots, signs, geometry, scale=scale)


def materialised_map(sharing: SharingMap) -> SharingMap:
    """The same map with its slots and signs written down: 8 bytes an entry, so for simulations alone.

    Where many devices of one map are trained on one machine, each hash is computed once.
    """
    ids = np.arange(sharing.rows, dtype=np.uint32)
    slots, signs = jnp.asarray(sharing.slots(jnp.asarray(ids))), jnp.asarray(sharing.signs(jnp.asarray(ids)))

    def known(table: Array) -> Callable[[Rows], Array]:
        return lambda ids: table.at[jnp.asarray(ids)].get(mode="promise_in_bounds")

    shape = sharing.rows, sharing.columns, sharing.budget
    geometry = {**sharing.geometry, "materialised": True}
    return map_from_slots(*shape, known(slots), known(signs), geometry, scale=sharing.scale)


def fold(sums: Float[AnyArray, " fine"] | Int[AnyArray, " fine"], budget: int) -> Array:
    """Sums over the slots of a nested memory that one slot of a memory of ``budget`` joins.

    It takes the `load` of the finer map to that of the coarser one, and `pull` to `pull`.

    Raises:
        ValueError: where ``budget`` does not divide the length of ``sums``.
    """
    sums = jnp.asarray(sums)
    if budget < 1 or sums.shape[0] % budget:
        raise ValueError(f"budget is {budget}; it must divide the finer memory's budget, {sums.shape[0]}")
    return sums.reshape(-1, budget).sum(axis=0)


def coarsen(memory: Float[AnyArray, " fine"], load: Int[AnyArray, " fine"], budget: int) -> Float[Array, " {budget}"]:
    """The memory of ``budget`` that collapsing the expansion of a finer one gives, without expanding it.

    A slot becomes the mean of the slots that it joins, each weighted by the entries that it serves.

    Args:
        memory: of the finer map.
        load: entries that each of its slots serves, of memory's length (`hashml.sharing.load`).
        budget: of the coarser map of the same ``full_budget``, seed and salt.

    Raises:
        ValueError: where ``budget`` does not divide the length of ``memory``.
    """
    memory, load = jnp.asarray(memory), jnp.asarray(load)
    wide = memory.astype(jnp.promote_types(memory.dtype, jnp.float32))
    return (fold(wide * load, budget) / jnp.maximum(fold(load, budget), 1)).astype(memory.dtype)
