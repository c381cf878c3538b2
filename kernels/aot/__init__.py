"""Compiles every kernel, at the sizes of its ``shapes.py``, for chips that this machine need not have.

In an environment with jax, the CUDA plugin of the same version, ptxas and libtpu (the extra ``aot``):

    PYTHONPATH=kernels python -m aot            # writes the table of kernels/README.md
    PYTHONPATH=kernels python -m aot --check    # compares with it instead

It fails where a program does not compile, where a kernel spills registers, where a kernel is missing
from a program that should hold it, and where a program holds an array as long as the virtual table.
"""
