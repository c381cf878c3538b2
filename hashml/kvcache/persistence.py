"""Is importance persistent? What the eviction papers measured on attention rows before they built a policy on it.

All functions take rows ``p[t, j]`` of causal attention of one head or many, ``[*batch, T, T]``, 0 above the diagonal:

    persistence_ratio   Scissorhands: pivotal tokens of the second half that were pivotal in the first
    adjacent_cosine     CORM: how alike neighbouring queries are
    vote_overlap        CORM: attention on the keys that one of the w queries before voted for
    top_mass            Keyformer: attention on the best fraction of the keys

A key is pivotal for a query that sees n keys if it gets more than 1/n, and has its vote if it gets at least that.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

AnyArray = Array | np.ndarray


def persistence_ratio(
    probs: Float[AnyArray, "*batch T T"], split: int | None = None
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Of the tokens before ``split`` that are pivotal from then on, the share that was pivotal before.

    Args:
        probs: causal attention.
        split: queries before it choose, those from it on need; None for half.

    Returns:
        The ratio, 1 where nothing is needed, and the share of all tokens before ``split`` that was pivotal there:
        the ratio that a random set of that size has on average.

    Raises:
        ValueError: for a split that leaves one side empty.
    """
    tokens = probs.shape[-1]
    at = tokens // 2 if split is None else split
    if not 0 < at < tokens:
        raise ValueError(f"split is {at}; it must be between 1 and {tokens - 1}, to leave queries on both sides")
    pivotal = _causal(tokens) & (jnp.asarray(probs) > 1.0 / _visible(tokens))
    chosen = pivotal[..., :at, :at].any(axis=-2)
    needed = pivotal[..., at:, :at].any(axis=-2)
    wanted = needed.sum(axis=-1)
    ratio = (chosen & needed).sum(axis=-1) / jnp.maximum(wanted, 1)
    return jnp.where(wanted == 0, 1.0, ratio), chosen.mean(axis=-1)


def adjacent_cosine(queries: Float[AnyArray, "*batch T D"], distance: int = 1) -> Float[Array, "*batch"]:
    """Mean cosine of queries that are ``distance`` apart; shuffle the tokens for the value of random pairs.

    Raises:
        ValueError: for a distance that no pair has.
    """
    tokens = queries.shape[-2]
    if not 0 < distance < tokens:
        raise ValueError(f"distance is {distance}; it must be between 1 and {tokens - 1}")
    x = jnp.asarray(queries, jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return (x[..., distance:, :] * x[..., :-distance, :]).sum(axis=-1).mean(axis=-1)


def vote_overlap(probs: Float[AnyArray, "*batch T T"], queries: int, recents: int = 1) -> Float[Array, "*batch T"]:
    """Share of each query's attention on keys that one of the ``queries`` (w) before it voted for, or on recent ones.

    Args:
        probs: causal attention.
        queries: w; the first w entries of the answer had fewer.
        recents: newest keys that count whatever the votes, the query's own among them, which nobody saw before; 0
            leaves them out.

    Raises:
        ValueError: for no queries, or recents below 0.
    """
    if queries < 1:
        raise ValueError(f"queries is {queries}; it must be at least 1")
    if recents < 0:
        raise ValueError(f"recents is {recents}; it must be at least 0")
    tokens = probs.shape[-1]
    probs = jnp.asarray(probs, jnp.float32)
    votes = (_causal(tokens) & (probs >= 1.0 / _visible(tokens))).astype(jnp.int32)
    # Votes of the queries before t: a difference of two running sums.
    total = jnp.cumsum(votes, axis=-2)
    total = jnp.concatenate([jnp.zeros_like(total[..., :1, :]), total], axis=-2)
    t = np.arange(tokens)
    voted = total[..., t, :] - total[..., np.maximum(t - queries, 0), :] > 0
    recent = t[None, :] > t[:, None] - recents
    return jnp.where(voted | recent, probs, 0.0).sum(axis=-1)


def top_mass(probs: Float[AnyArray, "*batch T T"], fraction: float | int) -> Float[Array, "*batch T"]:
    """Each query's attention on the ``fraction`` of the keys it sees that get most, their number rounded up.

    Raises:
        ValueError: for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be above 0 and at most 1")
    tokens = probs.shape[-1]
    # A product that is an integer but for the last bit is that integer.
    kept = np.asarray([math.ceil(fraction * seen - 1e-9) for seen in range(1, tokens + 1)])
    mass = jnp.cumsum(-jnp.sort(-jnp.asarray(probs, jnp.float32), axis=-1), axis=-1)
    return mass[..., np.arange(tokens), kept - 1]


def _causal(tokens: int) -> Bool[np.ndarray, "T T"]:
    return np.tri(tokens, dtype=bool)


def _visible(tokens: int) -> Float[np.ndarray, "T 1"]:
    return np.arange(1, tokens + 1, dtype=np.float32)[:, None]
