"""The definition: the dense perceptron, whose neurons count as often as a list names them."""

import jax.numpy as jnp

from hashml_kernels.annotations import Array
from hashml_kernels.gathered_mlp.lists import Activation, Operands, activate, neurons


def apply(operands: Operands, *, activation: Activation, block: int) -> Array:
    """``[L, R, E]``, float32."""
    x = operands.x.astype(jnp.float32)
    idx, valid = neurons(operands, block)
    lists = jnp.arange(idx.shape[0])[:, None]
    times = jnp.zeros((idx.shape[0], operands.w_in.shape[0])).at[lists, idx].add(valid.astype(jnp.float32))

    def product(weights: Array) -> Array:
        return jnp.einsum("lre,fe->lrf", x, weights.astype(jnp.float32), precision="highest")

    found = product(operands.w_in)
    if operands.b_in is not None:
        found = found + operands.b_in.astype(jnp.float32)
    found = activate(activation)(found)
    if operands.w_gate is not None:
        found = found * product(operands.w_gate)
    found = jnp.where(times[:, None] > 0, times[:, None] * found, 0.0)
    return jnp.einsum("lrf,fe->lre", found, operands.w_out.astype(jnp.float32), precision="highest")
