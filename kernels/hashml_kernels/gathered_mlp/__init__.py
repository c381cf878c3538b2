"""A multi-layer perceptron of which each input meets only the neurons that a list names."""

from hashml_kernels.gathered_mlp.api import gathered_mlp as gathered_mlp
