"""Times of functions that are compared: interleaved, waited for, as medians and ratios.

A machine drifts (clocks, neighbours), so the functions take turns in an order drawn anew for each
repetition, and a ratio is taken within a repetition and never between two medians.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float64

from experiments.lab.statistics import median_interval


class Timing(NamedTuple):
    """Seconds a call takes, and that over the base's; ``_asdict()`` is the measured part of a row."""

    seconds: float
    """Median over the repetitions."""
    seconds_lower: float
    """First quartile."""
    seconds_upper: float
    """Third quartile."""
    ratio: float
    """Median, over the repetitions, of the seconds over those of the base in the same repetition."""
    ratio_low: float
    """Lower end of the ratio's 95% interval (order statistics)."""
    ratio_high: float


def wait(result: Any) -> None:
    """Return when the arrays of ``result``, a tree with leaves of JAX or torch, have been computed."""
    jax.block_until_ready(result)
    torch = sys.modules.get("torch")
    if torch is None:
        return
    for leaf in jax.tree.leaves(result):
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
            torch.cuda.synchronize(leaf.device)


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    base: str,
    repetitions: int = 30,
    warmup: int = 3,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time functions of no argument against each other.

    Args:
        functions: name to function; its result is waited for by `wait`. Compile beforehand, or let
            ``warmup`` do it.
        base: the name whose time is the denominator of every ratio.
        repetitions: calls of each function that count, at least 6 (the ratio's interval needs them).
        warmup: calls of each function before those.
        seed: draws the order of the functions within each repetition.

    An experiment yields a trial a function, and shares the comparison between them:

        timings = functools.cache(lambda: compare(functions, base="dense"))
        for name in functions:
            yield Trial({"method": name}, lambda name=name: timings()[name]._asdict())
    """
    if base not in functions:
        raise ValueError(f"base must be one of {', '.join(functions)}, got {base!r}")
    if repetitions < 6:
        raise ValueError(f"repetitions must be at least 6, got {repetitions}")
    seconds = interleave(functions, repetitions=repetitions, warmup=warmup, seed=seed)

    def summary(times: np.ndarray) -> Timing:
        lower, median, upper = np.quantile(times, [0.25, 0.5, 0.75])
        ratio = median_interval(times / seconds[base])
        return Timing(float(median), float(lower), float(upper), ratio.value, ratio.low, ratio.high)

    return {name: summary(times) for name, times in seconds.items()}


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    *,
    repetitions: int = 30,
    warmup: int = 3,
    seed: int = 0,
    lead: int = 0,
) -> dict[str, Float64[np.ndarray, " repetitions"]]:
    """Seconds of every repetition; for rows a repetition, from which `ratio_interval` takes any ratio.

    Args:
        functions, warmup, seed: as `compare`.
        repetitions: calls of each function that count, at least 1.
        lead: calls of the same function right before each one that counts. Threads of one library
            (OpenMP's) spin for some time after their work and hold a core that the next library's need.

    Raises:
        ValueError: for too few repetitions, a negative warmup or lead.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}")
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, got {warmup}")
    if lead < 0:
        raise ValueError(f"lead must not be negative, got {lead}")
    for _ in range(warmup):
        for function in functions.values():
            wait(function())
    order = np.random.default_rng(seed)
    seconds = {name: np.zeros(repetitions) for name in functions}
    for repetition in range(repetitions):
        for name in order.permutation(list(functions)):
            for _ in range(lead):
                wait(functions[name]())
            start = time.perf_counter()
            wait(functions[name]())
            seconds[name][repetition] = time.perf_counter() - start
    return seconds
