"""PyramidKV: budgets that fall with depth (Cai, Zhang, Gao, Liu, Liu, Lu, Xiong, Dong, Chang, Hu, Xiao, 2024, arXiv
2406.02069).

Low layers look everywhere, high ones at few tokens. At the same total, layer ``l`` of ``L`` gets

    slots[l] = most - l (most - least) / (L - 1)         least = base / beta,  most = 2 base - least

main slots beside the window that all have, and chooses as SnapKV does. Where ``most`` exceeds what a prompt has to
offer, it is cut to that, and ``least`` rises by as much. Scissorhands found that later layers need more instead:
``slope = "rising"`` is the same pyramid turned upside down. Layers ``l`` and ``L - 1 - l`` are rounded as a pair, so
that the total is kept to the slot; the reference rounds the step down, and keeps more.
"""

import dataclasses
import math
from typing import Literal

from hashml.kvcache.spec import LayerSpec


def pyramid_budgets(
    layers: int,
    base: int,
    *,
    beta: float | int = 20,
    prompt: int | None = None,
    slope: Literal["falling", "rising"] = "falling",
    least: int = 1,
    multiple_of: int = 1,
) -> tuple[int, ...]:
    """Main slots of each layer, ``layers * base`` in all.

    Args:
        layers: L.
        base: main slots of the middle layer, and the mean of all.
        beta: ``base`` over the slots of the smallest layer; 1 gives equal budgets.
        prompt: tokens of a prompt without its window, which no layer needs to exceed; None for no bound.
        slope: whether the first or the last layer gets most.
        least: no layer has fewer slots.
        multiple_of: budgets are multiples of it, as ``base`` must be.

    Raises:
        ValueError: for sizes out of range.
    """
    for name, value in (("layers", layers), ("base", base), ("beta", beta), ("multiple_of", multiple_of)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if base % multiple_of:
        raise ValueError(f"base is {base}; it must be a multiple of {multiple_of}")
    if not 0 <= least <= base:
        raise ValueError(f"least is {least}; it must be between 0 and base, {base}")
    if prompt is not None and prompt < 0:
        raise ValueError(f"prompt is {prompt}; it must be at least 0, or None")
    if slope not in ("falling", "rising"):
        raise ValueError(f"slope is {slope!r}; it must be 'falling' or 'rising'")
    most = 2 * base - max(base / beta, least)
    if prompt is not None:
        # A prompt that fits into equal budgets fits everywhere.
        most = min(most, max(prompt, base))
    budgets = [base] * layers
    for layer in range(layers // 2):
        exact = most - layer * 2 * (most - base) / (layers - 1)
        # Down, so that the partner, which has the rest of 2 base, is not below the least.
        rounded = int(exact // multiple_of) * multiple_of
        budgets[layer], budgets[-1 - layer] = rounded, 2 * base - rounded
    return tuple(budgets if slope == "falling" else budgets[::-1])


def pyramid_layers(
    base: LayerSpec,
    layers: int,
    *,
    beta: float | int = 20,
    prompt: int | None = None,
    slope: Literal["falling", "rising"] = "falling",
) -> tuple[LayerSpec, ...]:
    """Copies of ``base`` with the slots of `pyramid_budgets`: multiples of what its codecs share, sinks included.

    What a policy counts in slots follows them: ``drop`` of Scissorhands, ``base`` of AdaKV (`Policy.resized`); so do
    the pages of a paged layer.

    Args:
        base: a layer with the mean number of slots, and the policy of all; `SnapKV` in the paper.
        layers: L.
        beta, slope: as in `pyramid_budgets`.
        prompt: tokens of a prompt, its window included; None for no bound.
    """
    budgets = pyramid_budgets(
        layers,
        base.slots,
        beta=beta,
        prompt=None if prompt is None else max(prompt - base.window, 0),
        slope=slope,
        least=max(base.flush, base.sinks, 1),
        multiple_of=base.page_size or base.granularity,
    )

    def sized(slots: int) -> LayerSpec:
        share = slots / base.slots
        # The page that each head fills in part only is needed at every size.
        pages = None if base.pages is None else math.ceil(base.pages * share + base.kv_heads * max(0, 1 - share))
        return dataclasses.replace(base, slots=slots, pages=pages, policy=base.policy.resized(slots, base.slots))

    return tuple(sized(slots) for slots in budgets)
