"""Random numbers by counting: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) without a state.

Number ``i`` of a stream is a function of the stream's key and of ``i`` alone,

    number[i] = mix64(key + (i + 1) * GOLDEN)  mod 2**64,

so row 10**8 of a log costs what row 0 costs, any slice can be made anywhere, and the integers are
the same on every machine and in every NumPy version (NumPy's own generators promise neither).
"""

import hashlib

import numpy as np
from jaxtyping import Float64, Int64, UInt64
from scipy.special import ndtri

GOLDEN = 0x9E3779B97F4A7C15


def stream(seed: int, *name: str | int) -> int:
    """The 64-bit key of a named stream; streams of different names or seeds are unrelated."""
    words = [str(int(seed)), *(f"{type(part).__name__}:{part}" for part in name)]
    return int.from_bytes(hashlib.blake2b("/".join(words).encode(), digest_size=8).digest(), "little")


def mix64(x: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """The finaliser of SplitMix64, a bijection of the 64-bit integers; products wrap by design."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def numbers(key: int, counters: Int64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """The 64-bit numbers of the stream at ``counters`` (not negative)."""
    return mix64((counters.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN) + np.uint64(key))


def uniform(key: int, counters: Int64[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
    """Uniform numbers of the open interval (0, 1), multiples of 2**-53."""
    # 52 bits and a half: with 53 bits the largest one would round up to 1.
    return ((numbers(key, counters) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normal(key: int, counters: Int64[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
    """Standard normal numbers, by the inverse of the distribution function."""
    return ndtri(uniform(key, counters))


def permutation(key: int, size: int) -> Int64[np.ndarray, " size"]:
    """A random order of ``range(size)``."""
    return np.argsort(numbers(key, np.arange(size)), kind="stable")


def scatter(key: int, x: Int64[np.ndarray, "*n"], size: int) -> Int64[np.ndarray, "*n"]:
    """A pseudo-random bijection of ``range(size)``, applied to ``x``; no table is stored.

    On the next power of two, rounds of an odd product, a sum and an xor-shift are bijections; values
    that land beyond ``size`` walk on along their cycle until they are back (less than two walks on
    average).
    """
    bits = max(1, (size - 1).bit_length())
    mask, shift = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    keys = numbers(key, np.arange(8)).reshape(4, 2)
    values = x.astype(np.uint64).reshape(-1)
    outside = np.arange(values.size)
    while outside.size:
        walked = values[outside]
        for factor, shift_by in keys:
            walked = (walked * (factor | np.uint64(1)) + shift_by) & mask
            walked ^= walked >> shift
        values[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return values.astype(np.int64).reshape(x.shape)
