"""Adagrad for every contender alike, with the full table updated by its looked-up rows alone.

A dense gradient of a full table would be a second table at every step. Adagrad moves only entries whose
gradient is not zero, so that updating the looked-up rows is the same arithmetic at a small part of the
cost (`hashml.embeddings.adagrad_rows`); the full table is thereby timed at its best.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from hashml.embeddings import EmbeddingTables, adagrad_rows, concatenated_ids, take_rows

EPS = 1e-10


class RunState(NamedTuple):
    """Parameters and optimiser state of one run; ``table`` and ``sums`` are None but for a full table."""

    params: Any
    opt_state: Any
    table: Array | None
    sums: Array | None


def adagrad(learning_rate: Array | float) -> optax.GradientTransformation:
    """Adagrad from zero, as the DLRM code has it; optax's default start of 0.1 would drown these gradients."""
    return optax.adagrad(learning_rate, initial_accumulator_value=0.0, eps=EPS)


def start(params: Any, name: str, module: nn.Module) -> RunState:
    """The state before the first step, copied from ``params``, whose entry ``name`` belongs to ``module``."""
    params = jax.tree.map(jnp.copy, params)
    if not isinstance(module, EmbeddingTables):
        return RunState(params, adagrad(1.0).init(params), None, None)
    rest = {key: value for key, value in params.items() if key != name}
    table = params[name]["table"]
    return RunState(rest, adagrad(1.0).init(rest), table, jnp.zeros_like(table))


def parameters(state: RunState, name: str) -> Any:
    """The parameters as the model takes them."""
    return state.params if state.table is None else {**state.params, name: {"table": state.table}}


def adagrad_step(
    state: RunState,
    rate: Array | float,
    module: nn.Module,
    ids: Array,
    loss: Callable[[Any, Array | None], Float[Array, ""]],
) -> RunState:
    """One step down the gradient of ``loss(params, rows)``.

    Args:
        state: parameters and their sums of squares.
        rate: learning rate.
        module: the embedding, which decides what is differentiated.
        ids: ``[*batch, T]``, what the embedding looks up.
        loss: of the parameters alone where rows is None; else of the parameters without the embedding,
            and of the looked-up rows ``[*batch, T, D]``.
    """
    optimizer = adagrad(rate)
    table, sums = state.table, state.sums
    if not isinstance(module, EmbeddingTables) or table is None or sums is None:
        gradients = jax.grad(lambda params: loss(params, None))(state.params)
    else:
        numbers = concatenated_ids(ids, module.sizes)
        gradients, row_gradients = jax.grad(loss, (0, 1))(state.params, take_rows(table, numbers))
        flat = row_gradients.reshape(-1, table.shape[1])
        table, sums = adagrad_rows(table, sums, numbers.reshape(-1), flat, rate, eps=EPS)
    updates, opt_state = optimizer.update(gradients, state.opt_state)
    return RunState(optax.apply_updates(state.params, updates), opt_state, table, sums)
