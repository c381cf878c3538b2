"""What policies draw: functions of a row's key and of positions, so that nothing is stored, and nothing depends on
when, where and with whom a row runs.

    token draw   u[h, k]      of key, layer, head and the token's position            random eviction
    pair draw    u[h, q, k]   of these and the query's position, for query heads      Keyformer's Gumbel noise

A row has a key of its own, and a layer folds its number into it. Positions are mixed with two of its words by
`hashml_kernels.bits`: no slot, step, block, padding or place in the batch is among what is hashed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from hashml_kernels import bits


def row_keys(key: Array, batch: int) -> Array:
    """Typed keys ``[batch]``: those given, or one for each row, drawn from one by the row's index.

    Raises:
        ValueError: for another number of keys.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape == ():
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"key has shape {key.shape}; it must be one key, or one of each of {batch} rows")
    return key


def layer_keys(keys: Array, layer: int) -> Array:
    """Keys ``[B]`` of the rows in a layer."""
    return jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)


def token_draws(keys: Array, pos: Int32[Array, "B P n"]) -> Float[Array, "B P n"]:
    """Uniform in (0, 1), one for each head and position; ``keys [B]`` are of one layer."""
    first, second = _words(keys)
    heads = _mix(jnp.arange(pos.shape[1], dtype=jnp.uint32), first[:, None])
    return _unit(_mix(_mix(pos, second[:, None, None]), heads[..., None]))


def pair_draws(
    keys: Array, query_pos: Int32[Array, "B n"], pos: Int32[Array, "B #H N"], heads: int, group: int
) -> Float[Array, "B H J n N"]:
    """Uniform in (0, 1), one for each query head, query and key.

    Args:
        keys: ``[B]``, of one layer.
        query_pos: of the queries.
        pos: of the keys.
        heads, group: H and J.
    """
    first, second = _words(keys)
    head = _mix(jnp.arange(heads * group, dtype=jnp.uint32), first[:, None])
    asks = _mix(query_pos[:, None], head[..., None]).reshape(-1, heads, group, query_pos.shape[1], 1)
    # Both are mixed before they meet: of plain positions, one query's noise would be another's in another order.
    seen = _mix(pos, second[:, None, None])[:, :, None, None]
    return _unit(_mix(seen, asks))


def gumbel(uniform: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Standard Gumbel variables of uniform ones in (0, 1)."""
    return -jnp.log(-jnp.log(uniform))


def _mix(x: Array, salt: UInt32[Array, "*n"]) -> UInt32[Array, "*m"]:
    """A bijection of words, one for each salt; they broadcast."""
    return bits.lowbias32(bits.as_words(x) ^ salt)


def _words(keys: Array) -> tuple[UInt32[Array, " B"], UInt32[Array, " B"]]:
    words = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
    return words[:, 0], words[:, 1]


def _unit(words: UInt32[Array, "*n"]) -> Float[Array, "*n"]:
    """23 bits at the middles of their intervals: float32 has them all, and neither end."""
    return (words >> 9).astype(jnp.float32) * 2.0**-23 + 2.0**-24
