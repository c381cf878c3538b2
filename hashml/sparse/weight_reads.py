"""What a decode step reads of the weights: predictors, chosen rows and matrices, and all that nothing is chosen of.

At batch 1 the time of a step is the time of these reads. A neuron is two rows of d (three with a gate), a query head
its part of the query and output matrices, ``2 d D``, a key head its keys' and values', ``2 d D``. Predictors are
``r (d + ff)`` and ``r (d + Hq)`` and count in full: a layer that keeps everything has none.
"""

from typing import NamedTuple

from hashml.models.decoder import DecoderConfig


class Reads(NamedTuple):
    """Weights read by a step; their sum is `total`, and of a type of n bytes n times that are bytes.

    Attributes:
        predictors: of neurons and heads.
        neurons: rows of the perceptrons.
        heads: queries and output projections.
        keys_values: matrices of keys and values.
        rest: norms, a row of the embedding, the head over the vocabulary.
    """

    predictors: float | int
    neurons: float | int
    heads: float | int
    keys_values: float | int
    rest: float | int

    @property
    def total(self) -> float | int:
        return sum(self)


def neuron_weights(config: DecoderConfig) -> int:
    """Weights of one neuron."""
    return (3 if config.gated else 2) * config.features


def neuron_predictor_weights(config: DecoderConfig, rank: int) -> int:
    """Weights of the predictor of one layer's neurons."""
    return rank * (config.features + config.hidden)


def weight_reads(
    config: DecoderConfig,
    *,
    neurons: float | int,
    heads: float | int,
    key_heads: float | int,
    neuron_rank: int = 0,
    head_rank: int = 0,
) -> Reads:
    """Weights that a step of one batch reads, in all layers.

    Args:
        config: of the model.
        neurons, heads, key_heads: distinct ones that a layer reads, mean over layers: of a batch, those of the union.
            ``dense_kv`` reads all key heads, ``lazy_kv`` the chosen ones and every ``ring`` tokens all.
        neuron_rank, head_rank: of predictors; 0 for none.

    Raises:
        ValueError: for more than the model has, or negative numbers.
    """
    bounds = {"neurons": (neurons, config.hidden), "heads": (heads, config.heads),
              "key_heads": (key_heads, config.kv_heads)}  # fmt: skip
    for name, (value, most) in bounds.items():
        if not 0 <= value <= most:
            raise ValueError(f"{name} is {value}; it must lie in 0..{most}")
    for name, rank in (("neuron_rank", neuron_rank), ("head_rank", head_rank)):
        if rank < 0:
            raise ValueError(f"{name} is {rank}; it must not be negative")
    layers, d, width = config.layers, config.features, config.head_dim
    predictors = neuron_predictor_weights(config, neuron_rank) + head_rank * (d + config.heads)
    biases = 1 if config.qkv_bias else 0
    norms = (2 * layers + 1) * d
    return Reads(
        layers * predictors,
        layers * neurons * neuron_weights(config),
        layers * heads * (2 * d + biases) * width,
        layers * key_heads * 2 * (d + biases) * width,
        norms + d + config.vocabulary * d,
    )


def neurons_for(config: DecoderConfig, neurons: int, rank: int) -> int:
    """Neurons that a layer without a predictor reads in the same bytes as ``neurons`` and a predictor; rounded up, in
    favour of the one without."""
    bought = -(-neuron_predictor_weights(config, rank) // neuron_weights(config))
    return min(config.hidden, neurons + bought)
