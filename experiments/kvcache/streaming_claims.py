"""What StreamingLLM claims, and what is asked of texts drawn from caches: predicates on the rows of
`experiments.kvcache.streaming`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    furthest,
    highest,
    lowest,
    mean_interval,
)

SINKS = 4
"""S of the paper."""
EXPLODES = 0.1
"""Loss over another's, less 1, that is more than a difference in quality."""
FLAT = NEAR = 0.02
TEXT = 0.1
"""Loss of drawn texts over another's, less 1, that passes for the same: 6,000 tokens of two independent texts, three
models, differ by some 5 % at the bound of an interval."""
TIMES_EQUAL = 10
"""A sink's attention over the share of a key if all got the same."""
SCORED = ("h2o", "scissorhands", "corm", "keyformer")
LOSSLESS = {"streaming": "StreamingLLM", "h2o": "H2O", "scissorhands": "Scissorhands", "corm": "CORM with a budget",
            "keyformer": "Keyformer", "kivi:2": "KIVI with 2 bits", "coupled:8c8b": "CQ-8c8b"}  # fmt: skip
"""Caches that their papers call as good as the exact one, at these bytes or other ones."""


def _losses(
    rows: pl.DataFrame, method: str, capacity: int | None = None, sinks: int | None = None, rope: str | None = None,
    *, bins: slice = slice(1, None), column: str = "nll",
) -> np.ndarray:  # fmt: skip
    """Loss of each model over bins of a stream: all but the first, beyond the trained length, unless told."""
    part = rows.filter(pl.col("part") == "stream")
    chosen = sorted(part["start"].unique())[bins]
    found = part.filter(
        pl.col("method") == method, pl.col("capacity").eq_missing(capacity), pl.col("sinks").eq_missing(sinks),
        pl.col("rope").eq_missing(rope), pl.col("start").is_in(chosen),
    )  # fmt: skip
    if found.is_empty():
        raise NotEnoughRows(f"no rows of a stream with {method}, C = {capacity}, S = {sinks}, {rope}")
    return found.group_by("seed").agg(pl.col(column).mean()).sort("seed")[column].to_numpy()


def _kept(rows: pl.DataFrame, capacity: int, sinks: int = SINKS, rope: str = "slot", **options: Any) -> np.ndarray:
    """Losses with so many sinks; without, there is one rotation."""
    return _losses(rows, "sinks", capacity, sinks, rope if sinks else "write", **options)


def _cells(rows: pl.DataFrame, measure: Callable[[int], np.ndarray], note: str = "") -> list[Measured]:
    """A number of each model, at every C."""
    found = rows.filter(pl.col("part") == "stream", pl.col("method") == "sinks")["capacity"].unique().sort()
    return [dataclasses.replace(mean_interval(measure(capacity)), note=f"worst: C = {capacity}{note}")
            for capacity in found]  # fmt: skip


def _over(rows: pl.DataFrame, sinks: int) -> list[Measured]:
    """Loss without sinks over that with so many, less 1."""
    return _cells(rows, lambda c: _kept(rows, c, 0) / _kept(rows, c, sinks) - 1, f", S = {sinks}")


def _every(rows: pl.DataFrame) -> Measured:
    return lowest([cell for sinks in (1, 2, SINKS) for cell in _over(rows, sinks)])


def _first_gives_most(rows: pl.DataFrame) -> Measured:
    """What the first sink lowers the loss by, less half of what all do, over the loss with all; or what all lower it
    by, where that is less: half of nothing is not most."""

    def surplus(c: int) -> np.ndarray:
        none, one, all_ = (_kept(rows, c, sinks) for sinks in (0, 1, SINKS))
        return ((none - one) - (none - all_) / 2) / all_

    return lowest(_cells(rows, surplus) + _over(rows, SINKS))


def _drift(rows: pl.DataFrame) -> Measured:
    """Loss over that of pieces, in the last quarter over that in the second bin, less 1."""
    quarter = len(rows.filter(pl.col("part") == "stream")["start"].unique()) // 4

    def over_pieces(c: int, bins: slice) -> np.ndarray:
        return _kept(rows, c, bins=bins) / _losses(rows, "pieces", bins=bins)

    last, second = slice(-max(1, quarter), None), slice(1, 2)
    return furthest(_cells(rows, lambda c: over_pieces(c, last) / over_pieces(c, second) - 1))


def _above(rows: pl.DataFrame, method: str, rope: str = "slot") -> Measured:
    """Loss of another cache over that of S = 4, ranks as positions, less 1, at the C where it is least."""

    def excess(c: int) -> np.ndarray:
        other = _losses(rows, method) if method == "exact" else _losses(rows, method, c, SINKS, rope)
        return other / _kept(rows, c) - 1

    return lowest(_cells(rows, excess))


def _recomputed(rows: pl.DataFrame) -> Measured:
    def excess(c: int) -> np.ndarray:
        anew = _losses(rows, "recomputed", c, column="nll_strided")
        return _kept(rows, c, column="nll_strided") / anew - 1

    return highest(_cells(rows, excess))


def _first_token(rows: pl.DataFrame) -> Measured:
    """Attention on the first token over an equal share, in the layer beyond the second where it is least."""
    part = rows.filter(pl.col("part") == "sink", pl.col("layer") >= 2).sort("seed")
    found = [dataclasses.replace(mean_interval(of["first"] / of["equal"]), note=f"worst: layer {layer}")
             for (layer,), of in part.group_by("layer", maintain_order=True)]  # fmt: skip
    return lowest(found)


def _drawn(rows: pl.DataFrame, method: str, column: str) -> np.ndarray:
    """Of each model's texts."""
    found = rows.filter(pl.col("part") == "generation", pl.col("method") == method)
    if found.is_empty():
        raise NotEnoughRows(f"no rows of texts drawn with {method}")
    return found.group_by("seed").agg(pl.col(column).mean()).sort("seed")[column].to_numpy()


def _divergence(rows: pl.DataFrame, method: str) -> Measured:
    """Over the loss of texts that the exact cache draws."""
    return mean_interval(_drawn(rows, method, "divergence") / _drawn(rows, "full", "nll"), "models")


def _text(rows: pl.DataFrame) -> Measured:
    """Loss of texts over that of the exact cache's, less 1, where it is furthest from 0."""
    found = []
    for method in LOSSLESS:
        excess = mean_interval(_drawn(rows, method, "nll") / _drawn(rows, "full", "nll") - 1)
        found.append(dataclasses.replace(excess, note=f"worst: {method}"))
    return furthest(found)


def _over_random(rows: pl.DataFrame) -> Measured:
    """Divergence over random eviction's, less 1."""
    found = []
    for method in SCORED:
        ratio = mean_interval(_drawn(rows, method, "divergence") / _drawn(rows, "random", "divergence") - 1)
        found.append(dataclasses.replace(ratio, note=f"worst: {method}"))
    return highest(found)


CLAIMS = (
    Claim(
        "sink",
        f"In every layer beyond the second the first token gets more than {TIMES_EQUAL} times an equal share of "
        "the attention",
        paper="models collect a surprising amount of attention on the first tokens, in all but the bottom two layers",
        measure=_first_token,
        holds=lambda measured: measured.low > TIMES_EQUAL,
        source="section 3",
        unit="equal shares",
    ),
    Claim(
        "sinks",
        "Beyond the trained length S = 1, 2 and 4 each have less loss than S = 0, at every C",
        paper="keeping the initial tokens will largely recover the performance of window attention",
        measure=_every,
        holds=lambda measured: measured.low > 0,
    ),
    Claim(
        "window-breaks",
        f"There the loss of a plain window is more than {EXPLODES:.0%} above that of S = 4, at every C",
        paper="window attention fails when the text length surpasses the cache size",
        measure=lambda rows: lowest(_over(rows, SINKS)),
        holds=lambda measured: measured.low > EXPLODES,
    ),
    Claim(
        "first-gives-most",
        "The first sink alone gives more than half of what four give, at every C",
        paper="with a dedicated sink token in pre-training, that one token is enough",
        measure=_first_gives_most,
        holds=lambda measured: measured.low > 0,
        source="section 3",
    ),
    Claim(
        "flat",
        f"The loss of S = 4 over that of pieces is in the last quarter within {FLAT:.0%} of that in the second "
        "256 tokens, at every C",
        paper="stable language modelling with up to 4 million tokens and more",
        measure=_drift,
        holds=lambda measured: measured.low > -FLAT and measured.high < FLAT,
    ),
    Claim(
        "slot",
        "Beyond the trained length ranks as positions have less loss than absolute ones, S = 4, at every C",
        paper="the positions within the cache, not those in the text, are what works",
        measure=functools.partial(_above, method="sinks", rope="write"),
        holds=lambda measured: measured.low > 0,
        source="section 3",
    ),
    Claim(
        "elsewhere",
        "Four other tokens that never leave have more loss than the first four, at every C",
        paper="none; the control",
        measure=functools.partial(_above, method="elsewhere"),
        holds=lambda measured: measured.low > 0,
        source="reproduction",
    ),
    Claim(
        "recomputed",
        f"S = 4 is within {NEAR:.0%} of BOS and the newest C - 1 tokens encoded anew for every token",
        paper="perplexity comparable to that of a sliding window with recomputation",
        measure=_recomputed,
        holds=lambda measured: measured.high < NEAR,
        source="section 4",
    ),
    Claim(
        "dense-breaks",
        f"The exact cache's loss beyond the trained length is more than {EXPLODES:.0%} above that of S = 4",
        paper="popular models cannot generalise to texts longer than the training sequence length",
        measure=functools.partial(_above, method="exact"),
        holds=lambda measured: measured.low > EXPLODES,
    ),
    *(
        Claim(
            f"drawn-{method.replace(':', '-')}",
            f"What {title} draws from{'' if ':' in method else ' at a quarter of the bytes'} diverges from the exact "
            f"cache by less than {NEAR:.0%} of the loss of its texts",
            paper="quality of the exact cache, or near it; of generation no number that compares",
            measure=functools.partial(_divergence, method=method),
            holds=lambda measured: measured.high < NEAR,
            source="reproduction",
        )
        for method, title in LOSSLESS.items()
    ),
    Claim(
        "drawn-window",
        "A plain window behind BOS does, too: a character model hardly needs more",
        paper="none; the control, of which an earlier study said so",
        measure=functools.partial(_divergence, method="window"),
        holds=lambda measured: measured.high < NEAR,
        source="reproduction",
    ),
    Claim(
        "drawn-text",
        f"Texts drawn from each of these but the window are within {TEXT:.0%} as likely as the exact cache's own",
        paper="quality of the exact cache, or near it; of generation no number that compares",
        measure=_text,
        holds=lambda measured: measured.low > -TEXT and measured.high < TEXT,
        source="reproduction",
    ),
    Claim(
        "drawn-random",
        "Every policy that scores by attention diverges less than random eviction, in equal bytes",
        paper="past attention tells what will be needed",
        measure=_over_random,
        holds=lambda measured: measured.high < 0,
        source="reproduction",
    ),
)
"""Bounds were set before the first run."""
