"""Rows of a virtual table, read from a shared memory at hashed offsets (the loop of ROBE)."""

from hashml_kernels.hash_gather.api import hash_gather as hash_gather
from hashml_kernels.hash_gather.api import hash_gather_bag as hash_gather_bag
from hashml_kernels.hash_gather.api import hash_scatter as hash_scatter
from hashml_kernels.hash_gather.geometry import BlockGeometry as BlockGeometry
