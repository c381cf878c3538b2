"""A trial is one row to be: what identifies it, and how to measure it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Number = int | float  # the run-time check of annotations does not take an int for a float
Scalar = bool | int | float | str | None
Row = dict[str, Scalar]


@dataclass(frozen=True)
class Trial:
    """One measurement that an experiment's ``run`` yields.

    The runner calls ``measure`` before it takes the next trial, and appends ``{**key, **measured}`` to the
    record; it does not call it where the record already holds a row with this key. So ``measure`` must
    not rely on an earlier trial having been measured in the same process, and what it needs at random is
    drawn from its own key (``seed``), never from a generator that the trials share.
    """

    key: Mapping[str, Scalar | np.generic]
    """What identifies the row: ``{"method": "robe", "compression": 100, "seed": 0}``. All trials of a run
    have the same fields (``None`` where one does not apply), and no two of them the same values."""
    measure: Callable[[], Mapping[str, Scalar | np.generic]]
    """Returns the measured fields: numbers, text, truth values or ``None``; NaN and infinities are kept."""
