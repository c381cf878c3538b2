"""How many weights a module may store: said as a budget, or as a compression of the dense form."""

import math
import numbers
from fractions import Fraction
from typing import Any


def resolve_budget(
    virtual: int,
    *,
    budget: int | None,
    compression: float | int | None,
    at_least: int = 1,
    multiple_of: int = 1,
) -> int:
    """Weights to store for ``virtual`` weights of the dense form.

    Args:
        virtual: weights of the dense form.
        budget: weights to store, or
        compression: dense over stored weights, at least 1; the budget is the greatest multiple of
            ``multiple_of`` that compresses as much.
        at_least: the smallest budget that the map can work with, say one block.
        multiple_of: what a budget must be divisible by.

    Raises:
        TypeError: where a number is of the wrong type.
        ValueError: where not exactly one of the two is given, compression is below 1, or the budget is
            smaller than ``at_least`` or not divisible.
    """
    if (budget is None) == (compression is None):
        raise ValueError(f"give exactly one of budget (got {budget}) and compression (got {compression})")
    if compression is not None:
        if not isinstance(compression, numbers.Real) or isinstance(compression, bool):
            raise TypeError(f"compression is {compression!r}; it must be a number")
        if not 1 <= compression < math.inf:
            raise ValueError(f"compression is {compression}; it must be finite, and at least 1 (dense over stored)")
        # Exact: a quotient of floats may round up to one weight too many.
        budget = int(virtual // Fraction(float(compression)))
        budget -= budget % multiple_of
    if not isinstance(budget, numbers.Integral) or isinstance(budget, bool):
        raise TypeError(f"budget is {budget!r}; it must be an int")
    if budget < at_least:
        said = "" if compression is None else f" (compression {compression} of {virtual} weights)"
        raise ValueError(f"budget is {budget}{said}; it must be at least {at_least}")
    if budget % multiple_of:
        raise ValueError(f"budget is {budget}; it must be a multiple of {multiple_of}")
    return int(budget)


def check_positive(**sizes: Any) -> None:
    """Checks of sizes that a budget is computed from.

    Raises:
        TypeError: for one that is no int.
        ValueError: for one below 1.
    """
    for name, value in sizes.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; it must be an int")
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
