"""float16 where a compiler has none: Mosaic, for TPUs."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


def half_to_float(bits: Any) -> Any:
    """float16 numbers, given as uint16, as float32."""
    bits = bits.astype(jnp.int32)
    magnitude = bits & 0x7FFF
    normal = lax.bitcast_convert_type((magnitude << 13) + ((127 - 15) << 23), jnp.float32)
    tiny = (magnitude & 0x3FF).astype(jnp.float32) * np.float32(2.0**-24)
    number = jnp.where(magnitude >= 0x400, normal, tiny)
    return jnp.where(bits >= 0x8000, -number, number)
