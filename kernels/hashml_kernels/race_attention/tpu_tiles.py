"""What the TPU kernels do with a tile of tokens: make its features, take their gradient back.

Features lie along sublanes and tokens along lanes, ``[S, C]``: the few projections of a token would leave most lanes
empty. float32 inputs are multiplied in full precision everywhere. 16-bit inputs take single passes of the matrix
unit: their features are rounded to bfloat16 once, before anything is added up, and the sums over tokens are read in
two parts of eight bits each. Projections and features themselves keep float32: planes, and the logarithms that are
added up, come in three parts of eight bits, side by side in one product.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from hashml_kernels.race_attention.features import FLOOR, log_sigmoid


def split(x: Any) -> list[Any]:
    """float32 as three bfloat16 numbers that add up to it."""
    parts = []
    for _ in range(3):
        part = x.astype(jnp.bfloat16)
        parts.append(part)
        x = x - part.astype(jnp.float32)
    return parts


def _dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """Summed over one axis of each."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


class Arithmetic(NamedTuple):
    """How numbers are multiplied."""

    precise: bool
    """float32 inputs."""

    def dot(self, a: Any, b: Any, contract: tuple[int, int]) -> Any:
        """Of what `round` has made."""
        return _dot(self.round(a), self.round(b), contract)

    def read(self, state: Any, b: Any, contract: tuple[int, int]) -> Any:
        """Of float32 sums with what `round` has made."""
        if self.precise:
            return _dot(state, b, contract)
        high, low, _ = split(state)
        return _dot(low, b, contract) + _dot(high, b, contract)

    def round(self, x: Any) -> Any:
        return x.astype(jnp.float32 if self.precise else jnp.bfloat16)


class Phi(NamedTuple):
    """Features of a tile, and what their gradient needs."""

    phi: Any
    """``[S, C]``, rounded; 0 where there is no token."""
    table: Any
    """float32, without the floor and the mask."""
    u: Any
    """``[2 L P, C]``, the saturated projections."""


class Maps(NamedTuple):
    """What makes features: refs that all kernels read."""

    arithmetic: Arithmetic
    buckets: int
    adding: Any
    """bfloat16 ``[S, 3 * 2 L P]``: the selection for each of three parts."""
    gathering: Any
    """bfloat16 ``[2 L P, 3 S]``."""
    planes: Any
    """``[2 L P, D]`` in float32, or the three parts of it below each other."""
    beta: Any

    def phi(self, x: Any, live: Any) -> Phi:
        """Of tokens ``[C, D]``; ``live [1, C]`` says which exist."""
        projected = _dot(self.planes[...], x, (1, 1))
        if not self.arithmetic.precise:
            high, middle, low = jnp.split(projected, 3)
            projected = (low + middle) + high
        u = jnp.tanh(projected)
        parts = jnp.concatenate(split(log_sigmoid(2.0 * self.beta[0] * u)))
        table = jnp.exp(_dot(self.adding[...], parts, (1, 0)))
        used = live & (lax.broadcasted_iota(jnp.int32, table.shape, 0) < self.buckets)
        table = jnp.where(used, table, 0.0)
        return Phi(self.arithmetic.round(jnp.where(used, table + FLOOR, 0.0)), table, u)

    def pull(self, at: Phi, d_phi: Any) -> tuple[Any, Any]:
        """Gradients of the tokens ``[C, D]``, and of beta in parts ``[2 L P, C]``."""
        beta = self.beta[0]
        d_z = _dot(self.gathering[...], jnp.concatenate(split(at.table * d_phi)), (1, 0))
        d_z = d_z / (1.0 + jnp.exp(2.0 * beta * at.u))
        projected = 2.0 * beta * d_z * (1.0 - at.u * at.u)
        if self.arithmetic.precise:
            d_x = _dot(projected, self.planes[...], (0, 0))
        else:
            # The large part with all of the planes, and the small one with the planes' large part.
            high, low, _ = split(projected)
            d_x = _dot(jnp.concatenate([high, high, high]), self.planes[...], (0, 0))
            d_x += _dot(low, self.planes[: low.shape[0], :], (0, 0))
        return d_x, 2.0 * at.u * d_z
