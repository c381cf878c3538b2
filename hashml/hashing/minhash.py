"""MinHash signatures of sets, and their packing into 64 bits a set (Broder 1997; Desai et al. 2021).

Sets come as pairs (set, element) in any order. With ``h_k`` hash functions without ties,

    value[s, k] = min over the elements x of s of h_k(x)
    P(value[s, k] = value[t, k]) = J(s, t) = |s & t| / |s | t|          over the draw of h_k

A packed signature is two uint32 words, and holds ``64 // b - 1`` keys of ``b = key_bits`` bits each, a hash
of a minimum every one; 64 bits leave room for one key more, which the reference implementation leaves out too:

    key p = bits b * (p mod c) .. of word p // c,   c = 32 // b           P(keys equal) = J + (1 - J) / 2**b

Nothing but the pairs, one hash of each, and the signatures exists at a time. NumPy in, NumPy out; a JAX
array among the pairs gives the same bits in JAX.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Integer, UInt32

from hashml_kernels import bits

AnyArray = Array | np.ndarray

_HASH_STREAM, _KEY_STREAM, _RANDOM_STREAM = 0x6D68, 0x6D6B, 0x6D72
_NO_ELEMENT = 2**32 - 1


class MinHashes(NamedTuple):
    """Minima of hashed sets.

    Attributes:
        values: ``[sets, hashes]``; 2**32 - 1 throughout an empty set.
        support: pairs that named each set: 0 says that it is empty. A pair given twice counts twice here.
    """

    values: UInt32[AnyArray, "sets hashes"]
    support: Int32[AnyArray, " sets"]


def minhash(
    set_ids: Integer[AnyArray, " pairs"],
    element_ids: Integer[AnyArray, " pairs"],
    num_sets: int,
    num_hashes: int,
    seed: int,
) -> MinHashes:
    """Minima of ``num_hashes`` hash functions over each of ``num_sets`` sets.

    Args:
        set_ids: the set of each pair; pairs whose set lies outside 0 .. num_sets - 1 are padding.
        element_ids: the element of each pair, a 32-bit word: a negative int32 is the word of its bits.
        num_sets: how many sets there are, below 2**31.
        num_hashes: hash functions.
        seed: picks them; the first ``k`` of many are those of ``k``.

    Raises:
        TypeError: for ids that are no integers, or sizes that are no ints.
        ValueError: for ids that are no two vectors of one length, sizes out of range, or host elements
            that do not fit 32 bits.
    """
    for name, size in (("num_sets", num_sets), ("num_hashes", num_hashes)):
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool):
            raise TypeError(f"{name} is {size!r}; it must be an int")
        if not 1 <= size < 2**31:
            raise ValueError(f"{name} is {size}; it must lie in 1..{2**31 - 1}")
    set_ids, element_ids = (
        _integers(ids, name) for ids, name in ((set_ids, "set_ids"), (element_ids, "element_ids"))
    )
    if set_ids.ndim != 1 or set_ids.shape != element_ids.shape:
        raise ValueError(
            f"set_ids has shape {set_ids.shape}, element_ids {element_ids.shape}; they must be vectors of one length"
        )
    if isinstance(element_ids, np.ndarray) and element_ids.dtype.itemsize == 8 and element_ids.size:
        low, high = int(element_ids.min()), int(element_ids.max())
        if low < 0 or high > _NO_ELEMENT:
            raise ValueError(f"element_ids holds {low if low < 0 else high}; it must fit 32 bits")
    elements = bits.as_words(element_ids)
    # Two rounds of the mixer for each function: its one round leaves the sets of few bits regular.
    salts = np.array([[word >> 32, word & 0xFFFFFFFF] for word in bits.seed_words(seed, _HASH_STREAM, num_hashes)])
    salts = salts.astype(np.uint32)
    if isinstance(set_ids, jax.Array) or isinstance(element_ids, jax.Array):
        sets = jnp.asarray(set_ids)
        # A negative index would count from the end.
        sets = jnp.where((sets >= 0) & (sets < num_sets), sets, num_sets).astype(jnp.int32)
        return _minhash_jax(sets, jnp.asarray(elements), jnp.asarray(salts), int(num_sets))
    inside = (set_ids >= 0) & (set_ids < num_sets)
    sets, elements = set_ids[inside].astype(np.int64), elements[inside]
    values = np.full((num_hashes, num_sets), _NO_ELEMENT, np.uint32)
    for one, salt in zip(values, salts, strict=True):
        np.minimum.at(one, sets, _hashed(elements, salt))
    return MinHashes(values.T.copy(), np.bincount(sets, minlength=num_sets).astype(np.int32))


def _hashed(elements: Any, salt: Any) -> Any:
    return bits.scramble(bits.scramble(elements, salt[0]), salt[1])


@functools.partial(jax.jit, static_argnums=3)
def _minhash_jax(sets: Array, elements: Array, salts: Array, num_sets: int) -> MinHashes:
    def one_hash(_: None, salt: Array) -> tuple[None, Array]:
        return None, jax.ops.segment_min(_hashed(elements, salt), sets, num_sets)

    _, values = jax.lax.scan(one_hash, None, salts)
    return MinHashes(values.T, jax.ops.segment_sum(jnp.ones_like(sets), sets, num_sets))


def key_count(key_bits: int) -> int:
    """Keys of ``key_bits`` bits that a signature of 64 bits holds: 15 of 4 bits.

    Raises:
        TypeError: where it is no int.
        ValueError: outside 1..32.
    """
    if not isinstance(key_bits, (int, np.integer)) or isinstance(key_bits, bool):
        raise TypeError(f"key_bits is {key_bits!r}; it must be an int")
    if not 1 <= key_bits <= 32:
        raise ValueError(f"key_bits is {key_bits}; it must lie in 1..32")
    return 64 // int(key_bits) - 1


def pack_signatures(
    hashes: MinHashes, *, key_bits: int = 4, minimum_support: int = 2, seed: int = 0
) -> UInt32[AnyArray, "sets 2"]:
    """The first ``key_count(key_bits)`` minima of each set as keys in two words.

    Args:
        hashes: of `minhash`, with that many hash functions at least.
        key_bits: b.
        minimum_support: sets named by fewer pairs get random keys, hashed from their number: their minima
            say nothing of what they are, and those of empty sets are all the same. Where b divides 32 no
            two random signatures are equal.
        seed: picks the hash functions.

    Raises:
        TypeError: for numbers that are no ints.
        ValueError: for key_bits outside 1..32, minimum_support below 1, or too few minima.
    """
    keys, width = key_count(key_bits), int(key_bits)
    if not isinstance(minimum_support, (int, np.integer)) or isinstance(minimum_support, bool):
        raise TypeError(f"minimum_support is {minimum_support!r}; it must be an int")
    if minimum_support < 1:
        raise ValueError(f"minimum_support is {minimum_support}; it must be at least 1: an empty set has no minimum")
    sets, found = hashes.values.shape
    if found < keys:
        raise ValueError(f"hashes has {found} minima a set; key_bits = {key_bits} needs {keys}")
    mixers = bits.seed_words(seed, _KEY_STREAM, keys)
    words = [np.zeros(sets, np.uint32)] * 2
    per_word = 32 // width
    for p in range(keys):
        # A minimum is small, so its own bits are no uniform key; a bijection of it keeps what differs apart.
        key = bits.mix32(hashes.values[:, p], mixers[p]) >> np.uint32(32 - width)
        words[p // per_word] = words[p // per_word] | (key << np.uint32(width * (p % per_word)))
    number = np.arange(sets, dtype=np.uint32)
    first, second = bits.seed_words(seed, _RANDOM_STREAM, 2)
    random = (bits.mix32(number, first), bits.mix64(bits.Limbs(np.uint32(0), number), second))
    xp = jnp if isinstance(hashes.values, jax.Array) else np
    known = hashes.support >= minimum_support
    packed = [xp.where(known, word, other) for word, other in zip(words, random, strict=True)]
    return xp.stack(packed, axis=1)


def _integers(ids: Any, name: str) -> AnyArray:
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {ids.dtype}; it must be an integer type")
    return ids
