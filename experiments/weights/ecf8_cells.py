"""What `experiments.weights.ecf8` counts: 8-bit weights, entropies of drawn exponents, and what a scale does."""

import dataclasses
import functools
import json

import ml_dtypes
import numpy as np

from experiments.kvcache import fixtures
from experiments.weights.trained_weights import DTYPES, arrays, cast
from hashml.coding.huffman import entropy
from hashml.weights.ecf8 import ECF8, claimed_bounds, exponent_entropy, geometric_entropy, sample_stable
from hashml.weights.float_split import float_format, split, to_bits
from hashml.weights.lossless import bits_per_weight, decode_host, encode, entropy_limit

Row = dict[str, float | int | str | None]
CASTS = ("scaled", "direct")
"""By a scale for each array, which puts its largest weight at the largest number, or as the weights are."""
CODERS = ("huffman", "gaps", "fixed_rate")


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are those of the claims."""

    models: tuple[str, ...] = ("f1", "f1_relu_gqa", "stories", "minilm")
    dtypes: tuple[str, ...] = ("float8_e4m3fn", "float8_e5m2")
    seeds: int = 3
    """Of f1 and of what is drawn; of the other models there is one."""
    size: fixtures.Size = fixtures.DEFAULT
    alphas: tuple[float, ...] = (1.0, 1.2, 1.5, 1.8, 1.9, 2.0)
    draws: int = 4_000_000
    """Stable variables of an alpha."""
    octaves: tuple[int, ...] = tuple(range(-12, 9, 2))
    """Powers of two by which Gaussian weights of standard deviation 1 are scaled."""
    gaussian: int = 2**20
    """Weights that are scaled."""


@functools.lru_cache(maxsize=2)
def matrices(size: fixtures.Size, model: str, seed: int) -> dict[str, np.ndarray]:
    """The matrices of a model; norms and biases stay as they are in FP8 models."""
    return {name: array for name, array in arrays(size, model, seed).items() if array.ndim == 2}


def rounded(array: np.ndarray, dtype: str, how: str) -> tuple[np.ndarray, float]:
    """The array in 8 bits, and the scale that its numbers are to be divided by to be weights again."""
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    scale = largest / float(np.abs(array).max()) if how == "scaled" else 1.0
    return cast(np.clip(array * np.float32(scale), -largest, largest), dtype), scale


def array_bits(size: fixtures.Size, model: str, seed: int, dtype: str, how: str, name: str) -> Row:
    """Bits a weight of one matrix by every coder, side arrays counted, and what rounding to 8 bits lost before."""
    array = matrices(size, model, seed)[name]
    small, scale = rounded(array, dtype, how)
    compressed = {coder: encode(small, dataclasses.replace(ECF8, coder=coder)) for coder in CODERS}
    back = small.astype(np.float32) / np.float32(scale)
    return {
        "weights": array.size,
        "exponent_entropy": entropy(exponents(small)),
        "limit": entropy_limit(small),
        **{coder: bits_per_weight(one) for coder, one in compressed.items()},
        "chosen": compressed["huffman"].geometry.coder,
        "subnormal": float(exponents(small)[0] / array.size),
        "error": float(((back - array) ** 2).sum() / (array**2).sum()),
        "coarse": float((np.abs(back - array) > np.abs(array) * coarsest(dtype)).mean()),
        "changed": sum(int((decode_host(one).view(np.uint8) != small.view(np.uint8)).sum())
                       for one in compressed.values()),
    }  # fmt: skip


def coarsest(dtype: str) -> np.float32:
    """The largest relative error of rounding to a normal number, and a little that the scale's own rounding adds."""
    return np.float32(1.001 * 2.0 ** -(float_format(dtype).mantissa_bits + 1))


def exponents(small: np.ndarray) -> np.ndarray:
    """How often each exponent occurs; 0 is that of subnormal numbers and of zero."""
    form = float_format(small.dtype)
    symbols = np.asarray(split(to_bits(small), form)[0])[: small.size]
    return np.bincount(
        symbols >> (form.mantissa_bits - form.low), minlength=2 ** (form.bits - 1 - form.mantissa_bits)
    )


def exponent_counts(size: fixtures.Size, model: str, seed: int, dtype: str, how: str) -> Row:
    """How often each exponent occurs among the weights of all matrices, as JSON."""
    counts = sum(exponents(rounded(array, dtype, how)[0]) for array in matrices(size, model, seed).values())
    return {"histogram": json.dumps(np.asarray(counts).tolist())}


def every_byte(dtype: str) -> Row:
    """All 256 bytes, not-a-numbers among them, beside numbers that make coding worth while."""
    drawn = cast(np.random.default_rng(0).standard_normal(40_000, np.float32), dtype)
    array = np.concatenate([np.arange(256, dtype=np.uint8).view(DTYPES[dtype]), drawn])
    compressed = encode(array, ECF8)
    found = decode_host(compressed)
    return {
        "weights": array.size,
        "chosen": compressed.geometry.coder,
        "changed": int((found.view(np.uint8) != array.view(np.uint8)).sum()),
    }


def stable_entropy(alpha: float, draws: int, seed: int) -> Row:
    """Bits of the exponents of symmetric alpha-stable variables, beside what is claimed of them."""
    lower, upper = claimed_bounds(alpha)
    generator = np.random.default_rng([seed, round(1000 * alpha)])
    return {
        "exponent_entropy": exponent_entropy(sample_stable(generator, alpha, draws)),
        "lower": lower,
        "upper": upper,
        "geometric": geometric_entropy(alpha),
    }


def scaled_entropy(count: int, dtype: str, octave: int, seed: int) -> Row:
    """Bits of the exponents of Gaussian weights times a power of two, and shares that leave the normal range."""
    values = np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(2.0**octave)
    limit = np.float32(ml_dtypes.finfo(DTYPES[dtype]).max)
    small = cast(np.clip(values, -limit, limit), dtype)
    counts = exponents(small)
    return {
        "exponent_entropy": entropy(counts),
        "subnormal": float((exponents(small[values != 0])[0]) / count),
        "clipped": float((np.abs(values) > limit).mean()),
        "error": float(((small.astype(np.float32) - values) ** 2).sum() / (values**2).sum()),
    }
