"""Training of a table through the rows it lent out, without a gradient of the table's size.

`jax.grad` of a look-up is a dense [N, D] array that is zero nearly everywhere. Instead one differentiates
the model with respect to the ``rows = take_rows(table, ids)`` that a batch of ``B`` ids read, and applies
the optimiser to these rows alone: B * D numbers a step instead of N * D (sparse gradients in the reference
implementation of DLRM, Naumov et al. 2019, arXiv 1906.00091).

    loss, (head_grads, row_grads) = jax.value_and_grad(loss_of, argnums=(0, 1))(head, rows)
    table, sums = rowwise_adagrad_rows(table, sums, ids.reshape(-1), row_grads.reshape(-1, D), 0.02)

An id that stands twice in a batch has two row gradients, whose sum is the table's: SGD may add them one by
one, while every non-linear update needs them summed first, by `coalesce`. Jitted with the table and its
accumulator donated, the updates run in place. Ids outside the table change nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from hashml.embeddings.tables import row_numbers

PADDING = 2**31 - 1
"""The id, beyond any table, that fills the unused places of `coalesce`."""

Scalar = int | float | Float[Array, ""]


def coalesce(
    ids: Integer[Array, " B"], row_grads: Float[Array, "B D"]
) -> tuple[Int[Array, " B"], Float[Array, "B D"]]:
    """Distinct ids, int32, in increasing order, and for each the sum of its row gradients.

    The sizes are static: with ``U < B`` distinct ids, the last ``B - U`` are `PADDING`, with sums of zero.
    An id that can be no row's (negative, or beyond 31 bits) becomes `PADDING` too, and keeps its sum. Sums
    are float32 (float64 for float64 gradients).

    Raises:
        TypeError: if ``ids`` are no integers.
        ValueError: if the shapes are not [B] and [B, D].
    """
    _check(ids, row_grads)
    ids = row_numbers(ids, beyond=PADDING)
    order = jnp.argsort(ids, stable=True)
    ids, row_grads = ids[order], row_grads[order].astype(_accumulator_dtype(row_grads))
    first = jnp.diff(ids, prepend=-1) != 0  # ids are not negative, so the first differs
    segment = jnp.cumsum(first) - 1
    unique = jnp.full_like(ids, PADDING).at[segment].set(ids, indices_are_sorted=True)
    sums = jax.ops.segment_sum(row_grads, segment, num_segments=ids.shape[0], indices_are_sorted=True)
    return unique, sums


def sgd_rows(
    table: Float[Array, "N D"],
    ids: Integer[Array, " B"],
    row_grads: Float[Array, "B D"],
    learning_rate: Scalar,
) -> Float[Array, "N D"]:
    """``table[id] -= learning_rate * g``, added up over the rows of the batch."""
    if table.dtype.itemsize < 4:  # a narrow row would round at every duplicate: sum first, round once
        ids, row_grads = coalesce(ids, row_grads)
    _check(ids, row_grads)
    step = learning_rate * row_grads.astype(_accumulator_dtype(row_grads))
    return table.at[row_numbers(ids, beyond=PADDING)].add(-step.astype(table.dtype), mode="drop")


def adagrad_rows(
    table: Float[Array, "N D"],
    accumulator: Float[Array, "N D"],
    ids: Integer[Array, " B"],
    row_grads: Float[Array, "B D"],
    learning_rate: Scalar,
    *,
    eps: float = 1e-7,
) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
    """Adagrad on the rows of a batch: `optax.adagrad` of the whole table, where it changes anything.

        accumulator[id] += g**2;  table[id] -= learning_rate * g / sqrt(accumulator[id] + eps)

    with ``g`` the coalesced gradient (Duchi, Hazan and Singer 2011). Start from a non-negative accumulator,
    optax's default being ``jnp.full_like(table, 0.1)``; an entry whose accumulator stays zero is not moved.

    Returns:
        The table and the accumulator.
    """
    ids, g = coalesce(ids, row_grads)
    total = _rows(accumulator, ids) + g**2
    scale = jnp.where(total > 0, jax.lax.rsqrt(total + eps), 0.0)
    table = table.at[ids].add((-learning_rate * (scale * g)).astype(table.dtype), mode="drop")
    return table, accumulator.at[ids].set(total.astype(accumulator.dtype), mode="drop")


def rowwise_adagrad_rows(
    table: Float[Array, "N D"],
    accumulator: Float[Array, " N"],
    ids: Integer[Array, " B"],
    row_grads: Float[Array, "B D"],
    learning_rate: Scalar,
    *,
    eps: float = 1e-10,
) -> tuple[Float[Array, "N D"], Float[Array, " N"]]:
    """Adagrad with one number of state a row instead of ``D`` (the reference implementation of DLRM):

        accumulator[id] += mean(g**2);  table[id] -= learning_rate * g / (sqrt(accumulator[id]) + eps)

    with ``g`` the coalesced gradient. Start from ``jnp.zeros(N)``.

    Returns:
        The table and the accumulator.
    """
    ids, g = coalesce(ids, row_grads)
    total = _rows(accumulator, ids) + jnp.mean(g**2, axis=1)
    step = learning_rate * (g / (jnp.sqrt(total) + eps)[:, None])
    table = table.at[ids].add(-step.astype(table.dtype), mode="drop")
    return table, accumulator.at[ids].set(total.astype(accumulator.dtype), mode="drop")


def _rows(accumulator: Float[Array, "N *D"], ids: Int[Array, " B"]) -> Float[Array, "B *D"]:
    return accumulator.at[ids].get(mode="fill", fill_value=0)


def _accumulator_dtype(row_grads: Array) -> jnp.dtype:
    return jnp.promote_types(row_grads.dtype, jnp.float32)


def _check(ids: Array, row_grads: Array) -> None:
    if ids.ndim != 1 or row_grads.ndim != 2 or ids.shape[0] != row_grads.shape[0]:
        raise ValueError(
            f"ids have shape {ids.shape} and row_grads {row_grads.shape}; allowed are [B] and [B, D]: "
            "flatten the leading axes of both"
        )
