"""The definition: the dense matrix, number by number, and its product in float32."""

import jax.numpy as jnp

from hashml_kernels.annotations import Array
from hashml_kernels.lut_matmul.layout import Layout, unpack_codes
from hashml_kernels.lut_matmul.operands import Operands


def dense(operands: Operands, own: Layout) -> Array:
    """``W [out, in]``, float32."""
    codes = unpack_codes(operands.codes, own.bits, own.count)
    codes = codes.reshape(codes.shape[0], operands.groups, -1)
    tables, scales, zeros = (None if a is None else a.astype(jnp.float32) for a in operands[2:])
    if tables is not None:
        w = jnp.take_along_axis(tables, codes.astype(jnp.int32), axis=2)
    else:
        assert scales is not None
        assert zeros is not None
        w = scales[..., None] * (codes.astype(jnp.float32) - zeros[..., None])
    return w.reshape(codes.shape[0], own.count)


def multiply(operands: Operands, own: Layout) -> Array:
    """``[M, out]`` in the dtype of ``x``."""
    x = operands.x.astype(jnp.float32)
    return jnp.einsum("mi,oi->mo", x, dense(operands, own), precision="highest").astype(operands.x.dtype)
