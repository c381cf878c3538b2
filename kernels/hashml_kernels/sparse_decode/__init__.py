"""Attention of one query a head over the rows, or pages of rows, that a list names, each with a weight."""

from hashml_kernels.sparse_decode.api import sparse_decode as sparse_decode
