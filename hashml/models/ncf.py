"""NCF: neural collaborative filtering (He et al., WWW 2017, arXiv 1708.05031), trained by BPR (Rendle et al. 2009).

Two towers score a user u and an item i, each from vectors of its own:

    GMF:  g = p_u * q_i                                        width d
    MLP:  z = [p'_u, q'_i],  L layers z = ReLU(W z + b)        widths d 2^L -> d 2^(L-1) -> .. -> d
    s(u, i) = <w, [g, z]> + b
    loss = -mean log sigmoid(s(u, i+) - mean_j s(u, j-)) + reg / 2 * mean of |vectors|^2

The tables come from outside, as in `hashml.models.dlrm`: modules from ids to vectors, so that full and
compressed ones are trained by the same code; `NCFHead` is the model without them. The penalty is that of BPR:
squared norms of the six vectors that an example reads. (The reference implementation of FAIR adds the norm of
the user's six times instead.) Initial values: tables N(0, 0.01^2), towers Xavier-uniform, the last layer
uniform with variance 1 / inputs, biases 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer


class NCFVectors(NamedTuple):
    """What the two towers know of users, or of items."""

    gmf: Float[Array, "*B d"]
    mlp: Float[Array, "*B w"]
    """Of width ``d * 2**(layers - 1)``."""


def mlp_width(features: int, layers: int) -> int:
    """Width of the tables of the MLP tower, which ``layers`` layers halve to ``features``.

    Raises:
        ValueError: where one is below 1.
    """
    for name, value in (("features", features), ("layers", layers)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    return features * 2 ** (layers - 1)


def table_init() -> nn.initializers.Initializer:
    """N(0, 0.01^2), for the tables of users and items."""
    return nn.initializers.normal(0.01)


class NCFHead(nn.Module):
    """Scores from looked-up vectors; those of users and of items broadcast against each other."""

    features: int
    layers: int = 1
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, user: NCFVectors, item: NCFVectors) -> Float[Array, "*B"]:
        width = mlp_width(self.features, self.layers)
        for name, vectors in (("user", user), ("item", item)):
            found = vectors.gmf.shape[-1], vectors.mlp.shape[-1]
            if found != (self.features, width):
                raise ValueError(f"{name} has vectors of widths {found}; they must be {(self.features, width)}")
        shape = jnp.broadcast_shapes(user.mlp.shape[:-1], item.mlp.shape[:-1])
        parts = [jnp.broadcast_to(vectors.mlp, (*shape, width)) for vectors in (user, item)]
        z = jnp.concatenate(parts, axis=-1)
        for level in range(self.layers):
            dense = nn.Dense(
                width >> level,
                param_dtype=self.param_dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                name=f"mlp_{level}",
            )
            z = nn.relu(dense(z))
        both = jnp.concatenate([user.gmf * item.gmf, z], axis=-1)
        predict = nn.Dense(
            1, param_dtype=self.param_dtype, kernel_init=nn.initializers.lecun_uniform(), name="predict"
        )
        return predict(both)[..., 0]


class NCF(nn.Module):
    """Scores of pairs of a user and an item.

    Attributes:
        gmf_users, gmf_items: modules from ids ``[*B]`` to vectors of ``features``, `flax.linen.Embed` or
            `hashml.sharing.RobeEmbed` for instance; `table_init` is what the paper starts them from.
        mlp_users, mlp_items: likewise, to `mlp_width` coordinates.
        features: d.
        layers: L, of the MLP tower.

    Raises:
        ValueError: (when called) for vectors of other widths.
    """

    gmf_users: nn.Module
    gmf_items: nn.Module
    mlp_users: nn.Module
    mlp_items: nn.Module
    features: int
    layers: int = 1

    def setup(self) -> None:
        self.head = NCFHead(self.features, self.layers)

    def __call__(self, users: Integer[Array, "*U"], items: Integer[Array, "*I"]) -> Float[Array, "*B"]:
        return self.head(self.users(users), self.items(items))

    def users(self, ids: Integer[Array, "*B"]) -> NCFVectors:
        """Vectors of users: ``model.apply(variables, ids, method="users")``."""
        return NCFVectors(self.gmf_users(ids), self.mlp_users(ids))

    def items(self, ids: Integer[Array, "*B"]) -> NCFVectors:
        """Vectors of items."""
        return NCFVectors(self.gmf_items(ids), self.mlp_items(ids))


def bpr_loss(
    positive: Float[Array, "*B"], negatives: Float[Array, "*B J"], weights: Float[Array, "*B"] | None = None
) -> Float[Array, ""]:
    """Weighted mean of ``-log sigmoid(positive - mean of the negatives)``, in nats; 0 where all weights are 0.

    Args:
        positive: score of an item that the user chose.
        negatives: scores of J items that it did not.
        weights: of the examples, ones where left out; 0 for padding.
    """
    margin = positive - negatives.mean(axis=-1)
    return _weighted_mean(-jax.nn.log_sigmoid(margin), weights)


def squared_norms(
    user: NCFVectors, positive: NCFVectors, negatives: NCFVectors, weights: Float[Array, "*B"] | None = None
) -> Float[Array, ""]:
    """Half the squared norms of an example's six vectors, those of negatives averaged; weighted mean."""

    def norms(vectors: NCFVectors) -> Float[Array, "*B"]:
        return (vectors.gmf**2).sum(axis=-1) + (vectors.mlp**2).sum(axis=-1)

    total = norms(user) + norms(positive) + norms(negatives).mean(axis=-1)
    return _weighted_mean(total / 2, weights)


def ncf_bpr_loss(
    score: Callable[[NCFVectors, NCFVectors], Array],
    user: NCFVectors,
    positive: NCFVectors,
    negatives: NCFVectors,
    *,
    regularization: float | int = 0.0,
    weights: Float[Array, "*B"] | None = None,
) -> Float[Array, ""]:
    """BPR of NCF with its penalty.

    Args:
        score: of users' and items' vectors, which broadcast: `NCFHead.apply` with its variables bound.
        user, positive: vectors ``[*B, width]``.
        negatives: vectors ``[*B, J, width]``.
        regularization: weight of the penalty.
        weights: of the examples, as in `bpr_loss`.
    """
    beside = NCFVectors(user.gmf[..., None, :], user.mlp[..., None, :])
    loss = bpr_loss(score(user, positive), score(beside, negatives), weights)
    return loss + regularization * squared_norms(user, positive, negatives, weights)


def _weighted_mean(values: Float[Array, "*B"], weights: Float[Array, "*B"] | None) -> Float[Array, ""]:
    if weights is None:
        return values.mean()
    total = weights.sum()
    return (values * weights).sum() / jnp.where(total > 0, total, 1)


class BPRBatch(NamedTuple):
    """Examples of one user, or with leading axes of steps and of users."""

    positive: Int[Array, "*steps B"]
    negatives: Int[Array, "*steps B J"]
    weights: Float[Array, "*steps B"]
    """0 where an example is padding."""


def sample_negatives(
    key: Array, positives: Int[Array, " S"], items: int, shape: tuple[int, ...]
) -> Int[Array, "..."]:
    """Items drawn evenly from those that are not among ``positives``; no draw is rejected.

    Args:
        key: random key.
        positives: distinct item ids in increasing order; entries of ``items`` or more at the end are padding.
        items: how many there are.
        shape: of the draw.
    """
    valid = positives < items
    gaps = jnp.where(valid, positives - jnp.arange(positives.shape[0]), items)  # items left out before each
    drawn = jax.random.randint(key, shape, 0, items - valid.sum())
    return drawn + jnp.searchsorted(gaps, drawn, side="right").astype(drawn.dtype)


def bpr_batches(
    key: Array,
    positives: Int[Array, " S"],
    *,
    items: int,
    epochs: int,
    batch_size: int,
    negatives: int = 1,
) -> tuple[BPRBatch, Bool[Array, " steps"]]:
    """Batches of ``epochs`` passes over one user's positives, in a new order and with new negatives each.

    Args:
        key: random key.
        positives: as in `sample_negatives`.
        items: how many there are.
        epochs: passes.
        batch_size: examples of a step.
        negatives: drawn for each positive.

    Returns:
        ``epochs * ceil(S / batch_size)`` batches, and which of them hold an example at all: a user with
        fewer positives than the padded length has fewer steps.
    """
    steps = -(-positives.shape[0] // batch_size)
    padded = jnp.pad(positives, (0, steps * batch_size - positives.shape[0]), constant_values=items)

    def epoch(key: Array) -> BPRBatch:
        order_key, negative_key = jax.random.split(key)
        late = jnp.where(padded < items, jax.random.uniform(order_key, padded.shape), 2.0)
        order = padded[jnp.argsort(late)]  # padding last
        drawn = sample_negatives(negative_key, positives, items, (*padded.shape, negatives))
        valid = order < items
        return BPRBatch(
            jnp.where(valid, order, 0).reshape(steps, batch_size),
            drawn.reshape(steps, batch_size, negatives),
            valid.astype(jnp.float32).reshape(steps, batch_size),
        )

    passes = jax.vmap(epoch)(jax.random.split(key, epochs))
    batches = BPRBatch(*(leaf.reshape(epochs * steps, *leaf.shape[2:]) for leaf in passes))
    return batches, batches.weights.any(axis=-1)
