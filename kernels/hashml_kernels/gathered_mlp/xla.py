"""The op by XLA on any platform: rows of some neurons are taken, and multiplied, block by block.

Rows that are taken are written and read again, so that about three times their bytes cross the bus.
"""

import jax.numpy as jnp
from jax import lax

from hashml_kernels.annotations import Array
from hashml_kernels.gathered_mlp.lists import Activation, Operands, activate, neurons
from hashml_kernels.manual_axes import varying_alike

BLOCK_FLOATS = 2**22
"""Numbers of each matrix that are taken at a time: 16 MiB in float32."""
LEAST_NEURONS = 64
"""Neurons of a block at least, where many lists share those numbers."""


def block_neurons(operands: Operands) -> int:
    """Neurons of a block."""
    lists, _, _, _, width = operands.sizes
    return max(LEAST_NEURONS, BLOCK_FLOATS // max(lists * width, 1))


def apply(operands: Operands, *, activation: Activation, block: int) -> Array:
    """``[L, R, E]``, float32."""
    idx, valid = neurons(operands, block)
    x = operands.x.astype(jnp.float32)

    def part(idx: Array, valid: Array) -> Array:
        def rows(weights: Array) -> Array:
            # What stands in rows that do not count, and be it NaN, does not matter.
            taken = jnp.take(weights, idx, axis=0, mode="clip").astype(jnp.float32)
            return jnp.where(valid[..., None], taken, 0.0)

        def product(weights: Array) -> Array:
            return jnp.einsum("lre,lme->lrm", x, rows(weights), precision="highest")

        found = product(operands.w_in)
        if operands.b_in is not None:
            bias = jnp.take(operands.b_in, idx, mode="clip").astype(jnp.float32)
            found = found + jnp.where(valid, bias, 0.0)[:, None]
        found = activate(activation)(found)
        if operands.w_gate is not None:
            found = found * product(operands.w_gate)
        return jnp.einsum("lrm,lme->lre", found, rows(operands.w_out), precision="highest")

    size, entries = block_neurons(operands), idx.shape[1]
    if entries <= size:
        return part(idx, valid)

    def blocks(lists: Array) -> Array:
        padded = jnp.pad(lists, ((0, 0), (0, -entries % size)))
        return jnp.moveaxis(padded.reshape(lists.shape[0], -1, size), 1, 0)

    def step(total: Array, lists: tuple[Array, Array]) -> tuple[Array, None]:
        return total + part(*lists), None

    (start, _), _ = varying_alike(jnp.zeros_like(x), tuple(leaf for leaf in operands if leaf is not None))
    return lax.scan(step, start, (blocks(idx), blocks(valid)))[0]
