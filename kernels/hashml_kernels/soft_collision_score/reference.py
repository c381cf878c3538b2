"""The definition, bit by bit, a table at a time, in plain jnp."""

import jax
import jax.numpy as jnp

from hashml_kernels.soft_collision_score.operands import Operands, Scores, blockwise, judged


def scores(operands: Operands, block: int) -> Scores:
    """``norm_n sum_l prod_p sigmoid(+- logit[l, p])``, with + where bit p of ``code[l, n]`` is set."""
    batch, heads, queries, tables, bits, slots = operands.sizes

    def add(place: jax.Array, totals: jax.Array) -> jax.Array:
        code, chance = operands.codes[:, :, None, place].astype(jnp.int32), 1.0
        for p in range(bits):
            logit = operands.logits[:, :, :, place, p, None]
            chance = chance * jax.nn.sigmoid(jnp.where((code >> (bits - 1 - p)) & 1 == 1, logit, -logit))
        return totals + chance

    totals = jax.lax.fori_loop(0, tables, add, jnp.zeros((batch, heads, queries, slots), jnp.float32))
    norms = jnp.ones((), jnp.float32) if operands.norms is None else operands.norms.astype(jnp.float32)[:, :, None]
    return blockwise(judged(totals, norms, operands.threshold[..., None]), block)
