"""What all backends are handed."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from hashml_kernels.annotations import Array

Activation = Literal["relu", "silu", "gelu"]


class Operands(NamedTuple):
    """Arrays of the op: L lists, each for R neighbouring rows of the batch; either is 1.

    Attributes:
        x: ``[L, R, E]``, any float dtype.
        w_in: ``[F, E]``, a row a neuron.
        b_in: ``[F]``, or None.
        w_gate: ``[F, E]``, or None.
        w_out: ``[F, E]``, a row a neuron.
        idx: int32 ``[L, M]``: neurons, or blocks of them.
        valid: bool ``[L, M]``.
    """

    x: Array
    w_in: Array
    b_in: Array | None
    w_gate: Array | None
    w_out: Array
    idx: Array
    valid: Array

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Lists, rows a list, entries of a list, neurons, width."""
        lists, rows, width = self.x.shape
        return lists, rows, self.idx.shape[1], self.w_in.shape[0], width

    def weights(self) -> dict[str, Any]:
        """The matrices that there are."""
        every = {"w_in": self.w_in, "w_gate": self.w_gate, "w_out": self.w_out}
        return {name: array for name, array in every.items() if array is not None}


def activate(name: Activation) -> Callable[[Any], Any]:
    """The function by its name; gelu is its approximation by tanh, as in `jax.nn.gelu`."""
    match name:
        case "relu":
            return lambda x: jnp.maximum(x, 0.0)
        case "silu":
            return lambda x: x / (1.0 + jnp.exp(-x))
        case "gelu":
            return jax.nn.gelu
    raise AssertionError("the checks have seen it")


def neurons(operands: Operands, block: int) -> tuple[Array, Array]:
    """``(idx, valid)`` of single neurons, ``[L, M block]``, in which ``valid`` says all."""
    idx, valid, count = operands.idx, operands.valid, operands.w_in.shape[0]
    # Before the multiplication, which could leave the 32 bits.
    valid = valid & (idx >= 0) & (idx < -(-count // block))
    idx = jnp.where(valid, idx, 0)
    if block == 1:
        return idx, valid
    idx = (idx[..., None] * block + jnp.arange(block, dtype=jnp.int32)).reshape(idx.shape[0], -1)
    return idx, jnp.repeat(valid, block, axis=1) & (idx < count)
