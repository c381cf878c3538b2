"""Estimators on made-up heads, where the entropy of attention is chosen: `experiments.attention.context_sparsity`.

Keys are independent normals, and queries as long as the deviation of logits asks for. Values are a linear map of keys
plus noise: where values know nothing of keys the true output is near zero, and all sampling looks bad.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hashml.attention.oracle import OracleTopK
from hashml.attention.selection_controls import UniformRandom
from hashml.attention.selector_contract import Index, Selector, slot_positions
from hashml.attention.sparse_decode import Partial, finish, gather_rows, sparse_partial
from hashml.attention.v_attention import VAttention

ESTIMATORS: dict[str, Selector] = {
    "oracle": OracleTopK(),
    "hybrid": VAttention(OracleTopK(), top_share=0.5, epsilon=0),
    "random": UniformRandom(),
}
"""The best tokens, half of them and as many draws from the rest, and draws alone, at equal numbers."""
NOISE = 0.5


class Head(NamedTuple):
    """One key head, and queries that stand as query heads beside each other."""

    q: Float[Array, "1 Q D"]
    k: Float[Array, "1 1 N D"]
    v: Float[Array, "1 1 N D"]


def head(key: Key[Array, ""], spread: Float[Array, ""], *, queries: int, tokens: int, width: int) -> Head:
    """Logits of every query have the deviation ``spread`` over the keys."""
    of_keys, of_queries, of_map, of_noise = jax.random.split(key, 4)
    k = jax.random.normal(of_keys, (1, 1, tokens, width))
    q = jax.random.normal(of_queries, (1, queries, width))
    q = spread * math.sqrt(width) * q / jnp.linalg.norm(q, axis=-1, keepdims=True)
    linear = jax.random.normal(of_map, (width, width)) / math.sqrt(width)
    return Head(q, k, k @ linear + NOISE * jax.random.normal(of_noise, k.shape))


@functools.partial(jax.jit, static_argnames=("budget", "queries", "tokens", "width"))
def errors(
    key: Key[Array, ""], spread: Float[Array, ""], *, budget: int, queries: int, tokens: int, width: int
) -> dict[str, Float[Array, ""]]:
    """Relative error of the output by estimator, mean over queries."""
    of_head, of_draws = jax.random.split(key)
    q, k, v = head(of_head, spread, queries=queries, tokens=tokens, width=width)
    shares = jax.nn.softmax(q[0] @ k[0, 0].T / math.sqrt(width), axis=1)
    exact = shares @ v[0, 0]
    found = {}
    for name, selector in ESTIMATORS.items():
        out = finish(_partial(selector, of_draws, Head(q, k, v), budget))[0]
        found[name] = (jnp.linalg.norm(out - exact, axis=1) / jnp.linalg.norm(exact, axis=1)).mean()
    return found


@functools.partial(jax.jit, static_argnames=("selector", "trials", "tokens", "width"))
def exceeded(
    key: Key[Array, ""], spread: Float[Array, ""], *, selector: VAttention, trials: int, tokens: int, width: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``(share, read)``: of queries whose estimated denominator is off by more than the selector's epsilon, and of
    tokens that are read. A list has room for all tokens."""
    of_head, of_draws = jax.random.split(key)
    given = head(of_head, spread, queries=trials, tokens=tokens, width=width)
    logits = given.q[0] @ given.k[0, 0].T / math.sqrt(width)
    index, positions = _index(selector, given)
    chosen = selector.select(
        index, given.q, positions, jnp.array([tokens - 1], jnp.int32), sinks=0, window=0, heavy=tokens,
        key=of_draws, rows=functools.partial(gather_rows, given.k),
    )  # fmt: skip
    listed = jnp.take_along_axis(logits[None], chosen.idx, axis=2)
    terms = jnp.where(chosen.valid, chosen.weight * jnp.exp(listed), 0.0)
    off = jnp.abs(terms.sum(axis=2)[0] / jnp.exp(logits).sum(axis=1) - 1)
    return (off > selector.epsilon).mean(), chosen.valid.mean(dtype=jnp.float32)


def _index(selector: Selector, given: Head) -> tuple[Index, Array]:
    tokens = given.k.shape[2]
    positions = slot_positions(jnp.array([tokens], jnp.int32), tokens)
    return selector.build(given.k, given.v, positions), positions


def _partial(selector: Selector, key: Key[Array, ""], given: Head, budget: int) -> Partial:
    index, positions = _index(selector, given)
    now = jnp.array([given.k.shape[2] - 1], jnp.int32)
    rows = functools.partial(gather_rows, given.k)
    chosen = selector.select(index, given.q, positions, now, sinks=0, window=0, heavy=budget, key=key, rows=rows)
    return sparse_partial(*given, *chosen)
