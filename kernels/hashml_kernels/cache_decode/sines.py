"""Sines and cosines inside the kernels: one reduction for both, and no branch for arguments that do not occur.

An angle is reduced by the nearest multiple of pi / 2, which is subtracted in pieces of four bits each: products with
integers below 2**20 are then exact in float32, fused or not, and so are the differences, until the last one. Angles
thus may have up to 1,600,000 radians, which is the position at the highest frequency, 1. The polynomials are Cephes's
(S. Moshier, public domain), good to an ulp or two on ``|x| <= pi / 4``.
"""

import jax.numpy as jnp
import numpy as np

MOST_ANGLE = 1_600_000.0
"""Beyond it the integer no longer fits: unfused products are rounded, and errors soon larger than 1e-5."""


def _pieces(value: float, bits: int, count: int) -> tuple[float, ...]:
    """``value`` as a sum of ``count`` numbers of that many bits, and what is left, as float32."""
    found = []
    for _ in range(count):
        unit = 2.0 ** (np.floor(np.log2(value)) + 1 - bits)
        found.append(float(np.floor(value / unit) * unit))
        value -= found[-1]
    return (*found, float(np.float32(value)))


_QUARTER = _pieces(np.pi / 2, 4, 5)


def _multiply_add(a, b, c):
    return a * b + c


def sine_and_cosine(angle, fma=_multiply_add):
    """``(sin, cos)`` of float32 angles between -`MOST_ANGLE` and `MOST_ANGLE`; ``fma(a, b, c)`` is ``a b + c``."""
    turns = jnp.floor(fma(angle, np.float32(2 / np.pi), np.float32(0.5)))
    x = angle
    for piece in _QUARTER:
        x = fma(turns, np.float32(-piece), x)
    z = x * x
    sine = fma(fma(np.float32(-1.9515295891e-4), z, np.float32(8.3321608736e-3)), z, np.float32(-1.6666654611e-1))
    sine = fma(sine * z, x, x)
    cosine = fma(np.float32(2.443315711809948e-5), z, np.float32(-1.388731625493765e-3))
    cosine = fma(fma(cosine, z, np.float32(4.166664568298827e-2)) * z, z, fma(np.float32(-0.5), z, np.float32(1.0)))
    quarter = turns.astype(jnp.int32) & 3
    swapped = (quarter & 1) != 0
    s, c = jnp.where(swapped, cosine, sine), jnp.where(swapped, sine, cosine)
    s = jnp.where(quarter >= 2, -s, s)
    c = jnp.where((quarter == 1) | (quarter == 2), -c, c)
    return s, c
