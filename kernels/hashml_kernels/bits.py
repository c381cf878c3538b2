"""Hash arithmetic in uint32: the same lines run in NumPy, in XLA and inside a Pallas kernel.

TPUs have no 64-bit integers and JAX hides them by default, so a 64-bit quantity is a pair of
uint32 limbs and every product is taken 16 bits at a time. All arithmetic wraps modulo 2**32 by
design. Functions take NumPy arrays, JAX arrays or values inside a kernel, and return the same kind;
shapes broadcast. Parameters of a hash function are Python ints, drawn once from its seed.

Sources: Carter and Wegman 1979 (multilinear hashing modulo a prime), Dietzfelbinger et al. 1997
(multiply-shift), Patrascu and Thorup 2012 (simple tabulation), Appleby 2011 (MurmurHash3), Wellons
2018 (lowbias32), Steele, Lea and Flood 2014 (splitmix64), Lemire 2019 (range reduction).
"""

from typing import Any, NamedTuple

import jax
import numpy as np

P31 = 2**31 - 1
"""The Mersenne prime that `m31` works modulo."""

_MASK64 = 2**64 - 1

_UINT32 = np.dtype(np.uint32)

Words = Any
"""uint32 values of any shape: a NumPy array, a JAX array, or a value inside a kernel."""


class Limbs(NamedTuple):
    """Unsigned 64-bit integers as two uint32 arrays of one shape: ``hi * 2**32 + lo``."""

    hi: Words
    lo: Words


def _u(value: int) -> np.uint32:
    return np.uint32(value)


def as_words(x: Any) -> Words:
    """``x`` as uint32; a signed integer keeps its bit pattern. Python ints must lie in [0, 2**32)."""
    if isinstance(x, int):
        return np.asarray(x, dtype=np.uint32)
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
    return x if x.dtype == _UINT32 else x.astype(np.uint32)


def split64(x: Any) -> Limbs:
    """Limbs of host integers: NumPy int64 or uint64 arrays, or Python ints of any size below 2**64.

    Call it outside `jax.jit`, which silently cuts 64-bit inputs to 32 bits.

    Raises:
        ValueError: for a negative value.
    """
    host = np.asarray(x)
    if host.dtype == object or not np.issubdtype(host.dtype, np.integer):
        host = np.asarray(x, dtype=np.uint64)
    if host.size and np.issubdtype(host.dtype, np.signedinteger) and int(host.min()) < 0:
        raise ValueError(f"x holds {int(host.min())}; 64-bit ids must not be negative")
    host = host.astype(np.uint64)
    return Limbs((host >> np.uint64(32)).astype(np.uint32), host.astype(np.uint32))


# --- 64-bit arithmetic in limbs ---------------------------------------------------------------


@np.errstate(over="ignore")
def multiply32(a: Words, b: Words) -> Limbs:
    """The full 64-bit product of 32-bit words."""
    a, b = as_words(a), as_words(b)
    a1, a0 = a >> _u(16), a & _u(0xFFFF)
    b1, b0 = b >> _u(16), b & _u(0xFFFF)
    low = a0 * b0
    middle = a1 * b0 + (low >> _u(16))  # below 2**32: (2**16 - 1)**2 + 2**16 - 1
    cross = a0 * b1 + (middle & _u(0xFFFF))
    return Limbs(a1 * b1 + (middle >> _u(16)) + (cross >> _u(16)), (cross << _u(16)) | (low & _u(0xFFFF)))


@np.errstate(over="ignore")
def multiply_low(a: Words, b: Words) -> Words:
    """``(a * b) mod 2**32``."""
    return as_words(a) * as_words(b)


@np.errstate(over="ignore")
def add64(a: Limbs, b: Limbs) -> Limbs:
    """``(a + b) mod 2**64``."""
    lo = as_words(a.lo) + as_words(b.lo)
    carry = (lo < as_words(b.lo)).astype(np.uint32)
    return Limbs(as_words(a.hi) + as_words(b.hi) + carry, lo)


@np.errstate(over="ignore")
def multiply64(a: Limbs, b: Limbs) -> Limbs:
    """``(a * b) mod 2**64``."""
    product = multiply32(a.lo, b.lo)
    return Limbs(product.hi + as_words(a.hi) * as_words(b.lo) + as_words(a.lo) * as_words(b.hi), product.lo)


def flat_index(row: Words | Limbs, columns: int, column: Words) -> Limbs:
    """``row * columns + column`` in 64 bits: the place of an entry of a virtual matrix."""
    row = row if isinstance(row, Limbs) else Limbs(np.uint32(0), as_words(row))
    product = multiply64(row, Limbs(np.uint32(0), np.uint32(columns)))
    return add64(product, Limbs(np.uint32(0), as_words(column)))


# --- drawing the parameters of a hash function from its seed ------------------------------------


def seed_words(seed: int, stream: int, count: int) -> tuple[int, ...]:
    """``count`` independent 64-bit words of a seed, by splitmix64: fixed for ever, on every machine.

    Args:
        seed: any int; it is taken modulo 2**64.
        stream: which use of the seed this is, so that locations and signs are independent.
        count: how many words.
    """
    state = (seed ^ (stream * 0xD1342543DE82EF95)) & _MASK64
    # One output of the generator seeds the run of another: streams of nearby seeds share no word.
    state = _splitmix64(state)
    return tuple(_splitmix64((state + i * 0x9E3779B97F4A7C15) & _MASK64) for i in range(count))


def _splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


# --- multilinear hashing modulo 2**31 - 1 -------------------------------------------------------


class Multilinear(NamedTuple):
    """``(sum_i multipliers[i] * key[i] + offset) mod (2**31 - 1)``; multipliers are in [1, P)."""

    multipliers: tuple[int, ...]
    offset: int


def multilinear(seed: int, stream: int, keys: int) -> Multilinear:
    """A member of the multilinear family on ``keys`` 31-bit keys, drawn from ``seed``."""
    words = seed_words(seed, stream, keys + 1)
    return Multilinear(tuple(1 + word % (P31 - 1) for word in words[:keys]), words[keys] % P31)


def _fold31(x: Words) -> Words:
    """``x`` modulo P31 up to one multiple: below 2**31 + 1 for any uint32."""
    return (x & _u(P31)) + (x >> _u(31))


def _canonical31(x: Words) -> Words:
    """The representative in [0, P31) of an ``x`` below 2 * P31."""
    return x - _u(P31) * (x >= _u(P31)).astype(np.uint32)


def _multiply31(a: int, b: Words) -> Words:
    """``a * b`` modulo P31 up to one multiple; a, b below 2**31.

    With a = a1 * 2**16 + a0 and 2**31 = 1: a1 * b1 * 2**32 = 2 * a1 * b1, and the middle sum is
    below 2**32 because a1 and b1 have 15 bits.
    """
    a1, a0 = _u(a >> 16), _u(a & 0xFFFF)
    b1, b0 = b >> _u(16), b & _u(0xFFFF)
    high = _fold31((a1 * b1) << _u(1))
    middle = a1 * b0 + a0 * b1
    middle = (middle >> _u(15)) + ((middle & _u(0x7FFF)) << _u(16))
    return _fold31(_fold31(high + middle) + _fold31(a0 * b0))


@np.errstate(over="ignore")
def m31(function: Multilinear, *keys: Words | None) -> Words:
    """Multilinear hash of 31-bit keys, exact: uniform and pairwise independent on [0, 2**31 - 1).

    Args:
        function: one multiplier a key.
        keys: uint32 words below 2**31 (0 and 2**31 - 1 are the same key); they broadcast. A None
            counts as zero, and so do trailing keys that are left out. A key of one bit may be given as
            bool: it costs no modular product.
    """
    if not 1 <= len(keys) <= len(function.multipliers):
        raise ValueError(f"keys: got {len(keys)}; the hash function takes 1 to {len(function.multipliers)}")
    total: Words = _u(function.offset)
    for multiplier, key in zip(function.multipliers, keys, strict=False):
        if key is None:
            continue
        one_bit = getattr(key, "dtype", None) == np.bool_
        product = _u(multiplier) * as_words(key) if one_bit else _multiply31(multiplier, as_words(key))
        total = _fold31(product + total)
    return _canonical31(total)


@np.errstate(over="ignore")
def reduce_m31(first: Words, second: Words, size: int) -> Words:
    """``floor((first * P + second) * size / P**2)``: two m31 hashes to a uniform slot below ``size``.

    One 31-bit hash cannot be spread evenly over millions of slots: some would be hit 1 % more often.
    Two make a number below P**2, and no slot is off by more than ``size / P**2`` of its share.
    """
    # size * first = quotient * P + rest; size * second / P carries at most one into the quotient.
    quotient, rest = _divide_p31(multiply32(_u(size), first))
    carry, _ = _divide_p31(multiply32(_u(size), second))
    return quotient + (rest + carry >= _u(P31)).astype(np.uint32)


def _divide_p31(x: Limbs) -> tuple[Words, Words]:
    """Quotient and rest of a 62-bit number divided by 2**31 - 1."""
    quotient = (x.hi << _u(1)) | (x.lo >> _u(31))
    total = quotient + (x.lo & _u(P31))  # x = quotient * P + total, and total < 2 * P + 1
    more = (total >= _u(P31)).astype(np.uint32)
    total = total - _u(P31) * more
    again = (total >= _u(P31)).astype(np.uint32)
    return quotient + more + again, total - _u(P31) * again


# --- other families -----------------------------------------------------------------------------


def multiply_shift32(x: Words, seed: int, bits: int) -> Words:
    """The top ``bits`` of ``(a * x + b) mod 2**64``: strongly universal on 32-bit words, bits <= 32."""
    _check_bits(bits)
    a, b = seed_words(seed, 0x3232, 2)
    product = add64(multiply64(_limbs(a), Limbs(np.uint32(0), as_words(x))), _limbs(b))
    return product.hi >> _u(32 - bits)


def multiply_shift64(x: Limbs, seed: int, bits: int) -> Words:
    """The top ``bits`` of ``(a0 * lo + a1 * hi + b) mod 2**64``: strongly universal on 64-bit keys.

    The pair form: each limb has a 64-bit multiplier of its own, so 32 output bits are pairwise
    independent, which one odd 64-bit multiplier does not give.
    """
    _check_bits(bits)
    a0, a1, b = seed_words(seed, 0x6464, 3)
    low = multiply64(_limbs(a0), Limbs(np.uint32(0), as_words(x.lo)))
    high = multiply64(_limbs(a1), Limbs(np.uint32(0), as_words(x.hi)))
    return add64(add64(low, high), _limbs(b)).hi >> _u(32 - bits)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 32:
        raise ValueError(f"bits is {bits}; it must lie in 1..32")


def _limbs(value: int) -> Limbs:
    return Limbs(_u(value >> 32), _u(value & 0xFFFFFFFF))


@np.errstate(over="ignore")
def lowbias32(x: Words) -> Words:
    """Bijective 32-bit mixer (Wellons' lowbias32)."""
    x = as_words(x)
    x = (x ^ (x >> _u(16))) * _u(0x7FEB352D)
    x = (x ^ (x >> _u(15))) * _u(0x846CA68B)
    return x ^ (x >> _u(16))


def mix32(x: Words, seed: int) -> Words:
    """`lowbias32` keyed by the 32-bit word ``seed``: a bijection for every seed."""
    return lowbias32(as_words(x) ^ _u(seed & 0xFFFFFFFF))


def mix64(x: Limbs, seed: int, stream: int = 0x6D78) -> Words:
    """32 well-mixed bits of a 64-bit key; not a universal family, but free of linear structure."""
    first, second = seed_words(seed, stream, 2)
    return mix32(mix32(x.lo, first) ^ as_words(x.hi) ^ mix32(x.hi, first >> 32), second)


def scramble(x: Words | Limbs, salt: Words = 0) -> Words | Limbs:
    """A bijection of words, or of limbs, that breaks up arithmetic progressions; one for each salt.

    Before a linear hash it keeps the hash universal, since keys stay distinct, and takes its lattices away.
    A high limb of zero stays zero, so that a number is scrambled alike as a word and as limbs.
    """
    if isinstance(x, Limbs):
        lo = lowbias32(as_words(x.lo) ^ as_words(salt))
        return Limbs(multiply_low(x.hi, lo | _u(1)), lo)  # an odd factor: a bijection of the high limb
    return lowbias32(as_words(x) ^ as_words(salt))


def sign_bit(x: Limbs, seed: int) -> Words:
    """0 or 1 with equal odds for each 64-bit key, by a mixed bit.

    A linear hash would not do: the variance laws of sketches take the product of four signs, and
    under a linear hash the signs of i, j, k and i + j - k are dependent.
    """
    return mix64(x, seed, stream=0x5169) >> _u(31)


@np.errstate(over="ignore")
def murmur3_32(words: tuple[Words, ...], seed: int, *, tail: Words | None = None, length: int | None = None) -> Words:
    """MurmurHash3_x86_32 of keys made of 32-bit words (little endian), one hash a position.

    Args:
        words: the whole 32-bit words of the key, arrays that broadcast.
        seed: 32-bit seed.
        tail: the last 1 to 3 bytes as a word, where the length in bytes is no multiple of 4.
        length: bytes of the key; by default ``4 * len(words)``.
    """
    h: Words = _u(seed & 0xFFFFFFFF)
    for word in words:
        h = h ^ _murmur_scramble(as_words(word))
        h = _rotate(h, 13) * _u(5) + _u(0xE6546B64)
    if tail is not None:
        h = h ^ _murmur_scramble(as_words(tail))
    h = h ^ _u(4 * len(words) if length is None else length)
    h = (h ^ (h >> _u(16))) * _u(0x85EBCA6B)
    h = (h ^ (h >> _u(13))) * _u(0xC2B2AE35)
    return h ^ (h >> _u(16))


def _rotate(x: Words, r: int) -> Words:
    return (x << _u(r)) | (x >> _u(32 - r))


def _murmur_scramble(k: Words) -> Words:
    return _rotate(k * _u(0xCC9E2D51), 15) * _u(0x1B873593)


def tabulation_tables(seed: int) -> np.ndarray:
    """The uint32 tables ``[4, 256]`` of simple tabulation, filled from ``seed`` by the keyed mixer."""
    return mix64(Limbs(np.uint32(0), np.arange(1024, dtype=np.uint32)), seed, stream=0x7461).reshape(4, 256)


def tabulation(x: Words, tables: Any) -> Words:
    """Simple tabulation: the exclusive or of one table entry a byte; 3-wise independent.

    Args:
        x: uint32 words.
        tables: uint32 ``[4, 256]`` of `tabulation_tables`; a JAX array where ``x`` is traced.
    """
    x = as_words(x)
    parts = [tables[i][((x >> _u(8 * i)) & _u(0xFF)).astype(np.int32)] for i in range(4)]
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3]


def multiply_high(x: Limbs, size: int) -> Words:
    """``floor(x * size / 2**64)``: 64 hashed bits to a slot below ``size``, bias at most ``size / 2**64``."""
    low = multiply32(x.lo, _u(size))
    high = multiply32(x.hi, _u(size))
    return add64(high, Limbs(np.uint32(0), low.hi)).hi
