"""The definition, a symbol at a time, in plain jnp."""

import jax
import jax.numpy as jnp

from hashml_kernels.annotations import Array
from hashml_kernels.huffman_decode.operands import UNIT, Geometry, Operands, finished
from hashml_kernels.manual_axes import varying_alike


def decode(operands: Operands, geometry: Geometry) -> Array:
    """A lane's symbol is the table's entry for the next bits, whose length says where the next one begins."""
    alike, _ = varying_alike(*operands)
    words, bases, starts, table, rest = operands = Operands(*alike)
    last = jnp.uint32(words.shape[0] - 1)
    lane = jnp.arange(geometry.lanes, dtype=jnp.int32)
    base = bases[lane // geometry.lanes_a_base]

    def step(position: Array, _: None) -> tuple[Array, Array]:
        place, shift = base + (position >> 5), position & 31
        high, low = words[jnp.minimum(place, last)], words[jnp.minimum(place + 1, last)]
        # The 32 bits from the position on; a shift by 32 has no defined result.
        window = jnp.where(shift == 0, high, high << shift | low >> (32 - jnp.maximum(shift, 1)))
        entry = table[window >> (32 - operands.max_length)]
        return position + (entry >> 8).astype(jnp.uint32), (entry & 255).astype(jnp.uint8)

    steps = UNIT * geometry.steps
    symbols = jax.lax.scan(step, starts.astype(jnp.uint32), None, length=steps)[1]
    units = symbols.reshape(geometry.steps, UNIT, geometry.lanes).transpose(0, 2, 1)
    return finished(units.reshape(-1), rest, geometry)
