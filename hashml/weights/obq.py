"""OBQ: optimal brain quantisation, the slow method that GPTQ speeds up (Frantar, Singh, Alistarh, NeurIPS 2022).

    per row, F the weights that are free and P = (H_F)^-1:
        i = argmin_F (grid(w_i) - w_i)^2 / P_ii         the weight whose rounding costs least
        w -= (w_i - grid(w_i)) / P_ii  P[:, i]          the others make up for it
        P -= P[:, i] P[i, :] / P_ii                     i is free no more

NumPy in float64, ``O(out in^3)``: a reference for small layers. With a fixed order for all rows it is GPTQ.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from hashml.weights.calibration import AnyArray
from hashml.weights.grids import Grid


class ObqSolution(NamedTuple):
    """Codes, and the half of each row's squared errors: they sum to ``1/2 tr(D H D^T)``."""

    codes: UInt8[np.ndarray, "out in"]
    losses: Float[np.ndarray, " out"]


def obq(
    weights: Float[AnyArray, "out in"],
    hessian: Float[AnyArray, "n n"],
    grid: Grid,
    *,
    order: np.ndarray | None = None,
) -> ObqSolution:
    """Codes of each row, greedily or in one order for all.

    Args:
        weights: of the layer.
        hessian: damped, hence positive definite (`hashml.weights.calibration.damped`).
        grid: with rows and groups of ``weights``.
        order: of elimination; ``None``: each row takes what costs least at each step.

    Raises:
        ValueError: if the shapes do not fit.
    """
    rows, columns = weights.shape
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian has the shape {hessian.shape}; weights have {columns} columns")
    left = np.array(weights, np.float64)
    levels = _levels(grid, rows, columns)
    inverse = np.linalg.inv(np.asarray(hessian, np.float64))
    codes = np.zeros((rows, columns), np.uint8)
    losses = np.zeros(rows)
    for row in range(rows):
        own, now = inverse.copy(), left[row]
        free = np.ones(columns, bool)
        for step in range(columns):
            nearest = np.abs(levels[row] - now[:, None]).argmin(axis=1)
            missing = now - np.take_along_axis(levels[row], nearest[:, None], axis=1)[:, 0]
            pivots = np.where(free, np.diagonal(own), 1)
            i = int(np.where(free, missing**2 / pivots, np.inf).argmin()) if order is None else int(order[step])
            codes[row, i] = nearest[i]
            losses[row] += missing[i] ** 2 / (2 * own[i, i])
            now[free] -= (missing[i] / own[i, i]) * own[free, i]
            own -= np.outer(own[:, i], own[i]) / own[i, i]
            free[i] = False
    return ObqSolution(codes, losses)


def _levels(grid: Grid, rows: int, columns: int) -> np.ndarray:
    """All values of each weight, ``[rows, columns, levels]``."""
    every = [np.asarray(grid.decode(np.full((rows, columns), code, np.uint8))) for code in range(2**grid.bits)]
    return np.stack(every, axis=-1).astype(np.float64)
