"""DLRM: deep learning recommendation model (Naumov et al. 2019, arXiv 1906.00091).

The click logit of ``N`` dense numbers x and ``T`` categorical ids v:

    z_0 = BottomMLP(x)                  ReLU after every layer, the last one too
    z_t = E_t[v_t],  t = 1 .. T         one row of each table; a bag of ids is the sum of its rows
    r   = [z_0, <z_i, z_j> for i > j]   "dot"; or "cat": [z_0, z_1, .., z_T]
    logit = TopMLP(r)                   ReLU between the layers; the loss is binary cross-entropy

The tables come from outside: any module that maps ids [B, T] to vectors [B, T, D], so that a full table and
a compressed one are trained by the same code. The paper's sigmoid is left to the loss, which is stable on
logits. Initial values follow the reference implementation: W ~ N(0, 2 / (m + n)), b ~ N(0, 1 / m) from n to
m units. `DLRM.head` is the model without its tables, for training that differentiates by looked-up rows.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer


class DLRMSizes(NamedTuple):
    """A published model: ``DLRM(embedding, bottom=sizes.bottom, top=sizes.top)``."""

    dense_features: int
    bottom: tuple[int, ...]
    """Widths after the ``dense_features`` inputs."""
    top: tuple[int, ...]
    """Widths after the interaction, whose own width is computed."""
    dimension: int
    tables: tuple[int, ...]
    """Rows of each table."""


# Table sizes are those of the preprocessed logs, as the reference implementation and the MLPerf
# inference benchmark state them.
# fmt: off
KAGGLE = DLRMSizes(
    13, bottom=(512, 256, 64, 16), top=(512, 256, 1), dimension=16,
    tables=(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
            5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
"""Criteo Kaggle: 33,762,577 rows; SGD, learning rate 0.1, batches of 128."""

TERABYTE = DLRMSizes(
    13, bottom=(512, 256, 64), top=(512, 512, 256, 1), dimension=64,
    tables=(9980333, 36084, 17217, 7378, 20134, 3, 7112, 1442, 61, 9758201, 1333352, 313829, 10, 2208, 11156,
            122, 4, 970, 14, 9994222, 7267859, 9946608, 415421, 12420, 101, 36),
)
"""Criteo Terabyte, ids modulo 10 million: 49,126,297 rows; SGD, learning rate 0.1, batches of 2,048."""

MLPERF = DLRMSizes(
    13, bottom=(512, 256, 128), top=(1024, 1024, 512, 256, 1), dimension=128,
    tables=(39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208,
            11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36),
)
"""MLPerf's Criteo Terabyte, ids modulo 40 million: 187,767,399 rows, 96 GB; SGD, learning rate 1.0,
batches of 2,048, until an AUC of 0.8025."""
# fmt: on


def dot_interaction(vectors: Float[Array, "*B F D"], *, include_self: bool = False) -> Float[Array, "*B pairs"]:
    """Inner products of all pairs of ``F`` vectors: (1,0), (2,0), (2,1), (3,0)...

    ``include_self`` adds the squared norms, at the end of each row: (0,0), (1,0), (1,1), (2,0)... There are
    F(F-1)/2 products, or F(F+1)/2. Sums are float32 (float64 for float64 vectors).
    """
    rows, columns = np.tril_indices(vectors.shape[-2], k=0 if include_self else -1)
    wide = jnp.promote_types(vectors.dtype, jnp.float32)
    products = jnp.einsum("...id,...jd->...ij", vectors, vectors, preferred_element_type=wide)
    return products[..., rows, columns].astype(vectors.dtype)


def cat_interaction(vectors: Float[Array, "*B F D"]) -> Float[Array, "*B width"]:
    """The ``F`` vectors behind each other: the interaction left to the top MLP."""
    return vectors.reshape(*vectors.shape[:-2], -1)


def sum_bags(rows: Float[Array, "*B L T D"], mask: Bool[Array, "*B L T"]) -> Float[Array, "*B T D"]:
    """Sums the rows of each bag: ``L`` slots, of which ``mask`` names those in use.

    A bag of one id is its row, an empty bag is zero. A slot not in use may hold any id, even one that is
    out of range: neither its row nor a gradient passes.
    """
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.where(mask[..., None], rows, 0).sum(axis=-3, dtype=wide).astype(rows.dtype)


def binary_cross_entropy(
    logits: Float[Array, "*B"], labels: Float[Array, "*B"] | Int[Array, "*B"] | Bool[Array, "*B"]
) -> Float[Array, ""]:
    """Mean of ``-log p(label)``, in nats, with ``p(1) = sigmoid(logit)``; labels are 0 or 1."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    return optax.sigmoid_binary_cross_entropy(logits.astype(wide), labels.astype(wide)).mean()


class MLP(nn.Module):
    """Dense layers of ``widths`` with ReLU between them, and after the last one if ``final_activation``."""

    widths: tuple[int, ...]
    final_activation: bool = False
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B N"]) -> Float[Array, "*B M"]:
        for i, width in enumerate(self.widths):
            x = nn.Dense(
                width,
                param_dtype=self.param_dtype,
                kernel_init=nn.initializers.variance_scaling(1.0, "fan_avg", "normal"),
                bias_init=nn.initializers.normal(width**-0.5),
            )(x)
            if i < len(self.widths) - 1 or self.final_activation:
                x = nn.relu(x)
        return x


class DLRM(nn.Module):
    """Click logits from dense and categorical features.

    ``embedding`` maps ids [B, T] to vectors [B, T, D]. The last width of ``bottom`` must be ``D`` and the
    last of ``top`` 1; the inputs' widths are inferred. Without dense features there is no bottom MLP, and
    ``bottom`` is not used.

    Raises:
        ValueError: (when called) for an unknown ``interaction``, widths that do not fit, or nothing to
            interact: "dot" needs two vectors, the bottom's among them.
    """

    embedding: nn.Module
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    interaction: Literal["dot", "cat"] = "dot"
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        if not self.top or self.top[-1] != 1:
            raise ValueError(f"top is {self.top}; its last width must be 1, the logit")
        if self.interaction not in ("dot", "cat"):
            raise ValueError(f"interaction is {self.interaction!r}; allowed are 'dot' and 'cat'")
        self.bottom_mlp = MLP(self.bottom, final_activation=True, param_dtype=self.param_dtype)
        self.top_mlp = MLP(self.top, param_dtype=self.param_dtype)

    def __call__(self, dense: Float[Array, "B N"] | None, ids: Integer[Array, "B T"]) -> Float[Array, " B"]:
        """Logits; ``dense`` is None for a model of categories alone."""
        return self.head(dense, self.embedding(ids))

    def head(self, dense: Float[Array, "B N"] | None, vectors: Float[Array, "B T D"]) -> Float[Array, " B"]:
        """Logits from looked-up vectors: ``model.apply(variables, dense, vectors, method="head")``."""
        if dense is None:
            r = self._interact(vectors)
        else:
            if not self.bottom or self.bottom[-1] != vectors.shape[-1]:
                raise ValueError(
                    f"bottom is {self.bottom}; its last width must be {vectors.shape[-1]}, the embedding's"
                )
            z = self.bottom_mlp(dense)
            r = self._interact(jnp.concatenate([z[:, None], vectors], axis=1))
            if self.interaction == "dot":
                r = jnp.concatenate([z, r], axis=1)
        return self.top_mlp(r)[:, 0]

    def _interact(self, vectors: Float[Array, "B F D"]) -> Float[Array, "B R"]:
        if self.interaction == "cat":
            return cat_interaction(vectors)
        if vectors.shape[1] < 2:
            raise ValueError(f"vectors: {vectors.shape[1]} to interact; 'dot' needs at least two")
        return dot_interaction(vectors)
