"""ECF8: lossless FP8 weights by exponent concentration (Yang, Zhang, Xie, Li, Xu, Shrivastava, ICLR 2026).

A float8_e4m3 weight keeps sign and mantissa as a nibble, and its 4 bits of exponent are Huffman-coded:

    bits a weight = 4 + L (1 + 4/64 + 64/32768) + table            in the reference's layout, H(exponent) <= L

Why exponents concentrate: if X is symmetric and alpha-stable, ``E = floor(log2 |X|)`` is modelled as two-sided
geometric with ``q = 2^-alpha``, and the paper claims ``alpha / (1 + q) <= H(E) <= alpha / (1 - q)``; with one bit
each of sign and mantissa that is "FP4.67" for a Gaussian, ``alpha = 2``. The claim does not hold as it stands: the
law's own entropy exceeds the upper bound at ``alpha = 1`` (2.92 against 2.00), and so do the exponents of stable
variables from ``alpha = 1.9`` down (3.19 at 1), because a density is flat at 0 and the left tail decays by 1/2 an
octave whatever alpha is. What remains true: 2.5 to 3.2 bits, nearly independent of scale and alpha.

Departures: as `hashml.weights.dfloat11` says, a code for each tensor and chunks of equally many symbols; `ECF8` codes
exponents in pairs where that takes less, as it does but for small tensors; float8_e5m2 is served, too. Weights that
are cast to FP8 without a scale seem to gain more (their exponents sit at 0): that is range not used, not a better
code. arXiv 2510.02676.
"""

import math

import numpy as np

from hashml.weights.lossless import Codec

ECF8 = Codec("ecf8", ("float8_e4m3fn", "float8_e5m2"), code_limit=16)


def geometric_entropy(alpha: float | int) -> float:
    """Bits of the two-sided geometric law ``P(E = k) ~ q^|k|``, ``q = 2^-alpha``: the law that the paper assumes.

    Raises:
        ValueError: unless ``alpha`` is positive.
    """
    q = _ratio(alpha)
    # The sum of q^|k| is (1 + q) / (1 - q), and the mean of |k| is 2 q / (1 - q^2).
    return math.log2((1 + q) / (1 - q)) + alpha * 2 * q / (1 - q * q)


def claimed_bounds(alpha: float | int) -> tuple[float, float]:
    """The paper's bounds of H(E), lower and upper. They are bounds of neither law; see above.

    Raises:
        ValueError: unless ``alpha`` is positive.
    """
    q = _ratio(alpha)
    return alpha / (1 + q), alpha / (1 - q)


def sample_stable(generator: np.random.Generator, alpha: float | int, count: int) -> np.ndarray:
    """Symmetric alpha-stable numbers by the method of Chambers, Mallows and Stuck (1976); at 2, a Gaussian.

    Raises:
        ValueError: unless ``alpha`` is in (0, 2].
    """
    if not 0 < alpha <= 2:
        raise ValueError(f"alpha is {alpha}; allowed is more than 0, up to 2")
    angle = generator.uniform(-math.pi / 2, math.pi / 2, count)
    if alpha == 1:
        return np.tan(angle)
    scale = (np.cos((1 - alpha) * angle) / generator.exponential(size=count)) ** ((1 - alpha) / alpha)
    return np.sin(alpha * angle) / np.cos(angle) ** (1 / alpha) * scale


def exponent_entropy(values: np.ndarray) -> float:
    """Bits of ``floor(log2 |x|)`` over the numbers that are not 0, as float64 has it: no range ends anywhere."""
    exponents = np.frexp(values[values != 0])[1]
    counts = np.unique(exponents, return_counts=True)[1] / max(exponents.size, 1)
    return float(-(counts * np.log2(counts)).sum()) + 0.0


def _ratio(alpha: float | int) -> float:
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; allowed is more than 0")
    return 2.0**-alpha
