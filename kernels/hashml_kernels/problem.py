"""What the bench and the compilation gate know of an op: it at one size, in one direction.

An op's ``shapes.py`` offers ``problems()``; a new kernel folder needs no change of the tools.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import hashml_kernels


class Problem(NamedTuple):
    """One op, at one size, in one direction.

    Attributes:
        op: name of the kernel folder.
        case: name of the size.
        direction: which pass.
        arguments: shapes and dtypes of ``call``'s arrays.
        draw: arrays for ``arguments``.
        call: ``call(implementation, *arrays)``, to be jitted; through the op's public function.
        kernels: the backend that has a kernel for a platform: ``{"cuda": "pallas_triton", ...}``.
        refusal: why a backend does not serve this problem, None if it does.
        bytes: what has to cross the memory bus at least once.
        flops: floating point operations.
        terms: how many numbers are added up in one number of the result, on average; 1 for a copy.
        table_rows: rows of the virtual table, where they are many more than all numbers looked up, and
            memory use therefore shows that no array has an entry for each; None elsewhere.
    """

    op: str
    case: str
    direction: Literal["forward", "backward"]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    draw: Callable[[np.random.Generator], tuple[np.ndarray, ...]]
    call: Callable[..., Any]
    kernels: Mapping[str, str]
    refusal: Callable[[str], str | None]
    bytes: int
    flops: int
    terms: int
    table_rows: int | None


def every_problem(op: str | None = None, case: str | None = None) -> Iterator[Problem]:
    """The problems of every kernel folder, or of those asked for.

    Raises:
        ValueError: where there is no such op, or no such case.
    """
    folders = [module.name for module in pkgutil.iter_modules(hashml_kernels.__path__) if module.ispkg]
    if op is not None and op not in folders:
        raise ValueError(f"op is {op!r}; it must be one of {folders}")
    every = [
        problem
        for folder in folders
        if op in (None, folder)
        for problem in importlib.import_module(f"hashml_kernels.{folder}.shapes").problems()
    ]
    names = list(dict.fromkeys(problem.case for problem in every))
    if case is not None and case not in names:
        raise ValueError(f"case is {case!r}; it must be one of {names}")
    yield from (problem for problem in every if case in (None, problem.case))
