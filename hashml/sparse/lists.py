"""Lists of heads or neurons by score: the largest as indices or as a mask, and one list for a whole batch.

Neurons that few rows share are read for each row anew; the union reads each once, and grows towards all of them with
the batch. Lists have fixed lengths; entries beyond what they name are marked in ``valid``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32


def top_list(scores: Float[Array, "B out"], count: int) -> Int32[Array, "B {count}"]:
    """The ``count`` largest of each row, in ascending order, in which memory is read best."""
    return jnp.sort(jax.lax.top_k(scores, count)[1], axis=-1).astype(jnp.int32)


def top_mask(scores: Float[Array, "*n out"], count: int | Int[Array, ""]) -> Bool[Array, "*n out"]:
    """True for the ``count`` largest of each row, exactly that many; of equals those that come first.

    The bits of the last score that is taken are found from the highest to the lowest by counting: no row is sorted,
    and ``count`` may be traced.

    Args:
        scores: finite; minus zero stands below zero.
        count: 0 to ``out``.
    """
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)  # unsigned integers in the order of the floats

    def narrowed(place: Array, last: Array) -> Array:
        higher = last | (sign >> place.astype(jnp.uint32))
        return jnp.where((ordered >= higher).sum(axis=-1, keepdims=True) >= count, higher, last)

    last = jax.lax.fori_loop(0, 32, narrowed, jnp.zeros((*scores.shape[:-1], 1), jnp.uint32))
    above, equal = ordered > last, ordered == last
    room = count - above.sum(axis=-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= room))


def union_rows(idx: Int[Array, "B K"], total: int) -> tuple[Int32[Array, " U"], Bool[Array, " U"]]:
    """One list of what the lists of all rows name, in ascending order: ``(idx, valid)``, ``U = min(total, B K)``.

    Args:
        idx: in 0..total-1.
        total: of neurons, or of heads.
    """
    named = jnp.zeros((total,), bool).at[idx.reshape(-1)].set(True)
    size = min(total, idx.size)
    marked, found = jax.lax.top_k(named.astype(jnp.int32), size)
    return found.astype(jnp.int32), marked > 0
