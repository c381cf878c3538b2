"""Lottery tickets: pruning by the weights of a trained net, with rewinding, in several levels.

Frankle and Carbin, ICLR 2019, arXiv 1803.03635 (rewind to the start); Frankle, Dziugaite, Roy, Carbin,
ICML 2020, arXiv 1912.05671 (rewind to an early step, "LTR"):

    w_k   = the dense net after k steps of training                 k = 0 .. 1 % of it
    M     = 1
    L times:  w = train(w_k, M) to completion
              M = the density ** (l / L) of largest |w| among the survivors      l = 1 .. L
    ticket = w_k * M

The schedule of learning rates starts anew with each training. A ticket costs L trainings before its own,
and sees the data in each of them: the most informed of the pruning baselines, and the dearest.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hashml.sharing.pruning import Mask, Scope, apply_mask, density_after, mask_from_scores
from hashml.sharing.pruning_scores import Params, Predicate, is_kernel, kernels_of, magnitude_scores


class LotteryTicket(NamedTuple):
    """What remains to be trained.

    Attributes:
        mask: of the kept weights.
        params: the rewound weights, with zeros where the mask is False.
        trainings: trainings to completion that the ticket costs, its own included: ``levels + 1``.
    """

    mask: Mask
    params: Params
    trainings: int


def lottery_ticket(
    train: Callable[[Params, Mask], Params],
    params: Params,
    density: float | int,
    levels: int,
    *,
    rewind: Callable[[Params], Params] | None = None,
    scope: Scope = "global",
    prunable: Predicate = is_kernel,
    stacked: bool = False,
) -> LotteryTicket:
    """Train, prune the smallest survivors, rewind, ``levels`` times.

    Args:
        train: ``(start, mask) -> trained``: one training to completion of the kept weights, from ``start``
            and from the start of the schedule.
        params: the initial weights of the dense net.
        density: share of the prunable weights that is kept in the end, in (0, 1].
        levels: L; level l leaves a share ``density ** (l / L)``. The papers remove a fifth each time.
        rewind: ``initial -> early``: the first steps of the dense net's training; by default none, the
            ticket of 2019.
        scope: as `hashml.sharing.pruning.mask_from_scores`.
        prunable: which leaves are pruned.
        stacked: every leaf has a leading axis of runs, each of which gets a mask of its own; ``train``
            then trains all of them.

    Raises:
        ValueError: for a density outside (0, 1], levels below 1, or an unknown scope.
        TypeError: for a prunable leaf that is not floating.
    """
    if levels < 1:
        raise ValueError(f"levels is {levels}; it must be at least 1")
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1]")

    def survivors(trained: Params, mask: Mask, share: float) -> Mask:
        magnitudes = magnitude_scores(trained, prunable=prunable)
        # Below every other: what is gone stays gone, even where survivors have become zero.
        scores = jax.tree.map(lambda keep, score: jnp.where(keep, score, -jnp.inf), mask, magnitudes)
        return mask_from_scores(scores, share, scope=scope)

    def full(params: Params) -> Mask:
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), kernels_of(params, prunable))

    start = params if rewind is None else rewind(params)
    mask = jax.vmap(full)(start) if stacked else full(start)
    for level in range(levels):
        share = density_after(level + 1, levels, density)
        trained = train(apply_mask(start, mask), mask)
        if stacked:
            mask = jax.vmap(lambda trained, mask, share=share: survivors(trained, mask, share))(trained, mask)
        else:
            mask = survivors(trained, mask, share)
    return LotteryTicket(mask, apply_mask(start, mask), levels + 1)
