"""A language model by PairConnect: look-ups and perceptrons in a transformer's place (Xu et al., arXiv 2106.08235).

    s[i] = U[x_i]
    s += pairs(x) A;  s += W2 gelu(W1 norm(s))      ``blocks`` times, the look-up in the first ``len(pairs)`` of them
    logits = norm(s) U'

A reconstruction, as `hashml.attention.pair_connect` says. Two tokens meet in a look-up alone: nothing in the rest of
the model knows of any other token.
"""

from collections.abc import Sequence

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float, Integer

from hashml.attention.pair_connect import PairConnect, checked_ids

AnyArray = Array | np.ndarray


class ResidualMLP(nn.Module):
    """``x + W2 gelu(W1 norm(x))``, with ``hidden`` units."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        y = nn.gelu(nn.Dense(self.hidden, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class PairConnectLM(nn.Module):
    """A language model without attention: pairs, perceptrons, and the word embedding again as the output layer.

        PairConnectLM(257, 128, pairs=(PairConnect(vocabulary=257, features=128),))(ids)

    The state of a decoder is the last ``(w - 1) dilation + 1`` ids: ``apply(variables, those, last=1)``.

    Attributes:
        vocabulary, features: V and D.
        pairs: layers of look-ups, the k-th in front of the k-th perceptron; at wider dilations a deeper model sees
            further. None of them makes the model see one token alone, the control of every comparison.
        blocks: perceptrons.
        hidden: their units; by default 4 D.

    Raises:
        ValueError: as `PairConnect`; for more pairs than blocks, or of another vocabulary or width.
    """

    vocabulary: int
    features: int
    pairs: Sequence[PairConnect] = ()
    blocks: int = 2
    hidden: int | None = None

    @nn.compact
    def __call__(
        self, ids: Integer[AnyArray, "*batch T"], *, last: int | None = None
    ) -> Float[Array, "*batch n {self.vocabulary}"]:
        """Logits of the token after each, or after the ``last`` ones."""
        if not len(self.pairs) <= self.blocks:
            raise ValueError(f"pairs has {len(self.pairs)} layers; there are {self.blocks} blocks for them")
        for layer in self.pairs:
            if (layer.vocabulary, layer.features) != (self.vocabulary, self.features):
                raise ValueError(
                    f"pairs holds vocabulary {layer.vocabulary} and features {layer.features}; "
                    f"they must be the model's, {self.vocabulary} and {self.features}"
                )
        words = nn.Embed(self.vocabulary, self.features, name="words")
        own = checked_ids(ids, self.vocabulary, last)
        x = words(own if last is None else own[..., ids.shape[-1] - last :])
        for k in range(self.blocks):
            if k < len(self.pairs):
                x = x + self.pairs[k](ids, last=last)
            x = ResidualMLP(self.hidden or 4 * self.features, name=f"block_{k}")(x)
        return words.attend(nn.LayerNorm(name="norm")(x))
