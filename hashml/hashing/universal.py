"""Universal hash families on integer keys, uint32 throughout.

    m31             (sum_i A_i key_i + C) mod (2**31 - 1)     pairwise independent    Carter, Wegman 1979
    multiply_shift  (a x + b) mod 2**64, its top bits         strongly universal      Dietzfelbinger 1996
    tabulation      xor of one random word a byte             3-wise independent      Zobrist 1970
    murmur3_32, lowbias32, mix32                              no guarantee, well mixed

Keys may be NumPy or JAX arrays of any integer type, or Python ints, and are not negative; keys that do
not fit 32 bits are `Limbs` (of `split64`). NumPy in, NumPy out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels import bits
from hashml_kernels.bits import lowbias32 as lowbias32
from hashml_kernels.bits import mix32 as mix32

_M31_STREAM, _M31_SECOND_STREAM = 0x3131, 0x3132


def m31(*keys: Any, seed: int) -> Any:
    """``(sum_i A_i key_i + C) mod (2**31 - 1)``, exact, with ``A_i``, ``C`` drawn from ``seed``.

    Args:
        *keys: integer arrays or `Limbs` that broadcast.
        seed: picks the function.

    Returns:
        uint32 in [0, 2**31 - 1), uniform and pairwise independent over seeds for distinct keys
        (within a word, 0 and 2**31 - 1 are the same key).

    Raises:
        TypeError: for keys that are no integers.
    """
    words = _key_words(keys)
    return bits.m31(bits.multilinear(seed, _M31_STREAM, len(words)), *words)


def hash_slots(*keys: Any, size: int, seed: int) -> Any:
    """A slot in [0, ``size``) for each key, uint32: two m31 hashes reduced without modulo bias.

    No slot's probability differs from ``1 / size`` by more than a factor ``1 + 2**-31``, up to the largest
    ``size`` of 2**31 - 1; two distinct keys meet with probability ``1 / size`` over seeds.

    Raises:
        TypeError: for keys that are no integers.
        ValueError: for a size outside 1 .. 2**31 - 1.
    """
    if not 1 <= size < 2**31:
        raise ValueError(f"size is {size}; it must lie in 1..{2**31 - 1}")
    words = _key_words(keys)
    first = bits.m31(bits.multilinear(seed, _M31_STREAM, len(words)), *words)
    second = bits.m31(bits.multilinear(seed, _M31_SECOND_STREAM, len(words)), *words)
    return bits.reduce_m31(first, second, size)


def hash_signs(key: Any, *, seed: int) -> Any:
    """-1 or 1, int32, with equal odds for each key; independent of the slots of the same seed."""
    key = _integers(key)
    limbs = key if isinstance(key, bits.Limbs) else bits.Limbs(np.uint32(0), bits.as_words(key))
    negative = bits.sign_bit(limbs, seed)
    return 1 - 2 * negative.astype(np.int32)


def multiply_shift(key: Any, *, seed: int, bits_out: int = 32) -> Any:
    """The top ``bits_out`` bits of ``(a x + b) mod 2**64`` (for `Limbs`: ``a0 lo + a1 hi + b``), uint32.

    Raises:
        TypeError: for a key that is no integer.
        ValueError: for bits_out outside 1..32.
    """
    key = _integers(key)
    if isinstance(key, bits.Limbs):
        return bits.multiply_shift64(key, seed, bits_out)
    return bits.multiply_shift32(bits.as_words(key), seed, bits_out)


def tabulation(key: Any, *, seed: int) -> Any:
    """Simple tabulation of 32-bit words with four tables of 256 words drawn from ``seed``; uint32."""
    key = _integers(key)
    if isinstance(key, bits.Limbs):
        raise TypeError("key is Limbs; tabulation takes 32-bit words")
    tables = bits.tabulation_tables(seed)
    return bits.tabulation(key, jnp.asarray(tables) if isinstance(key, jax.Array) else tables)


def murmur3_32(*words: Any, seed: int = 0) -> Any:
    """MurmurHash3_x86_32 of keys of ``len(words)`` 32-bit words, one key a position; uint32."""
    return bits.murmur3_32(tuple(bits.as_words(_integers(word)) for word in words), seed)


def murmur3_32_bytes(data: bytes, seed: int = 0) -> int:
    """MurmurHash3_x86_32 of a byte string (host)."""
    whole = len(data) // 4 * 4
    words = tuple(np.frombuffer(data[:whole], "<u4"))
    tail = int.from_bytes(data[whole:], "little") if len(data) > whole else None
    return int(bits.murmur3_32(words, seed, tail=tail, length=len(data)))


def _integers(key: Any) -> Any:
    if isinstance(key, bits.Limbs):
        return key
    if not isinstance(key, jax.Array):
        key = np.asarray(key)
    if not jnp.issubdtype(key.dtype, jnp.integer):
        raise TypeError(f"key has dtype {key.dtype}; it must be an integer type")
    if isinstance(key, np.ndarray) and key.size and int(key.max()) >= 2**32:
        return bits.split64(key)
    return key


def _key_words(keys: tuple[Any, ...]) -> list[Any]:
    """Three 31-bit words a key, None where its type says that they are zero.

    A fixed place for every word: the hash depends on the value of a key, not on its dtype.
    """
    words: list[Any] = []
    low31 = np.uint32(bits.P31)
    for key in map(_integers, keys):
        if isinstance(key, bits.Limbs):
            lo, hi = bits.as_words(key.lo), bits.as_words(key.hi)
            middle = (lo >> np.uint32(31)) | ((hi << np.uint32(1)) & low31)
            words += [lo & low31, middle, hi >> np.uint32(30)]
        else:
            word = bits.as_words(key)
            below = np.issubdtype(key.dtype, np.signedinteger) and key.dtype.itemsize <= 4
            words += [word & low31, None if below else word >> np.uint32(31), None]
    return words
