"""What the Triton kernels of several ops compute with; imported by their ``pallas_triton.py`` alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt


def fused(a: Any, b: Any, c: Any) -> Any:
    """``a b + c`` in one instruction, which XLA does not make of two: it is half of what such a kernel does."""
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in (a, b, c)))
    a, b, c = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape) for x in (a, b, c))
    [found] = plt.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[a, b, c],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return found


def unfused(a: Any, b: Any, c: Any) -> Any:
    """The same for the interpreter."""
    return a * b + c


def count_to(size: int) -> Any:
    return jnp.arange(size, dtype=jnp.int32)
