"""RACE attention, forward and backward, whose features are never stored."""

from hashml_kernels.race_attention.api import Implementation as Implementation
from hashml_kernels.race_attention.api import race_attention as race_attention
from hashml_kernels.race_attention.api import serves as serves
