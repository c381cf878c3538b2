"""The op by XLA on any platform: one scan over the steps, all lanes at once, a unit of four symbols a step."""

import jax
import jax.numpy as jnp

from hashml_kernels.annotations import Array
from hashml_kernels.huffman_decode.operands import UNIT, Geometry, Operands, finished
from hashml_kernels.manual_axes import varying_alike


def decode(operands: Operands, geometry: Geometry) -> Array:
    """Two windows of 32 bits and four look-ups a step and lane; symbols are written before they are joined."""
    alike, _ = varying_alike(*operands)
    words, bases, starts, table, rest = operands = Operands(*alike)
    base = jnp.repeat(bases, geometry.lanes_a_base)[: geometry.lanes]
    beyond = 32 - operands.max_length

    def look(place: Array) -> Array:
        return words.at[place].get(mode="clip")

    def step(position: Array, _: None) -> tuple[Array, Array]:
        unit = jnp.zeros_like(position)
        for half in range(0, UNIT, 2):
            place, shift = base + (position >> 5), position & 31
            # Two shifts to the right, since one by 32 has no defined result.
            window = look(place) << shift | look(place + 1) >> 1 >> (31 - shift)
            for i in (half, half + 1):
                entry = table.at[window >> beyond].get(mode="clip").astype(jnp.uint32)
                window, position = window << (entry >> 8), position + (entry >> 8)
                unit |= (entry & 255) << (8 * i)
        return position, unit

    units = jax.lax.scan(step, starts.astype(jnp.uint32), None, length=geometry.steps)[1]
    return finished(jax.lax.bitcast_convert_type(units, jnp.uint8).reshape(-1), rest, geometry)
