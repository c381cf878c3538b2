"""What the paper and its card say of REFRAG, measured on the rows of `experiments.attention.refrag`."""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import polars as pl

from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    lowest,
    mean_interval,
    paired_difference,
    ratio_interval,
)

NEAR = 0.02
"""Difference of accuracies that passes for none."""


def _part(rows: pl.DataFrame, part: str) -> pl.DataFrame:
    """Rows of a part that is worth judging.

    Raises:
        NotEnoughRows: where there are none, or the decoder does not answer from whole contexts.
    """
    full = rows.filter(pl.col("method") == "full")["accuracy"].to_numpy()
    if not full.size or not full.mean() >= 0.9:
        raise NotEnoughRows(
            f"whole contexts give {full.mean() if full.size else np.nan:.2f} of the answers, below 0.9"
        )
    found = rows.filter(pl.col("part") == part)
    if found.is_empty():
        raise NotEnoughRows(f"no rows of the part {part}")
    return found


def _sizes(rows: pl.DataFrame) -> list[int]:
    return sorted(rows.filter(pl.col("part") == "quality")["size"].drop_nulls().unique())


def _of(rows: pl.DataFrame, method: str, size: int | None, metric: str = "accuracy") -> np.ndarray:
    """A method's numbers, seed by seed."""
    same = pl.col("size").eq_missing(pl.lit(size))
    found = _part(rows, "quality").filter(pl.col("method").eq(method) & same).sort("seed")[metric].to_numpy()
    if not found.size:
        raise NotEnoughRows(f"no rows of {method}, chunks of {size}")
    return found


def _over_truncated(rows: pl.DataFrame) -> Measured:
    """Accuracy from chunks less that from the last tokens, in as many positions; at the size where it is least."""
    found = []
    for k in _sizes(rows):
        gain = mean_interval(_of(rows, "compressed", k) - _of(rows, "truncated", k), "seeds")
        found.append(_noted(gain, f"least at k = {k}"))
    return lowest(found)


def _ordered(rows: pl.DataFrame) -> Measured:
    """Accuracy at a size less that at the next larger one, whole contexts being the smallest; the least."""
    lines = {"whole": _of(rows, "full", None)} | {f"k = {k}": _of(rows, "compressed", k) for k in _sizes(rows)}
    names = list(lines)
    found = [_noted(mean_interval(lines[a] - lines[b], "seeds"), f"least from {a} to {b}")
             for a, b in itertools.pairwise(names)]  # fmt: skip
    return min(found, key=lambda one: one.high)  # the claim asks that no step be certainly the other way


def _noted(measured: Measured, note: str) -> Measured:
    return Measured(measured.value, measured.low, measured.high, f"{note}, {measured.note}")


def _loss(rows: pl.DataFrame) -> Measured:
    """Nats of an answer's token from the largest chunks less those from the whole context."""
    size = _sizes(rows)[-1]
    found = mean_interval(_of(rows, "compressed", size, "nll") - _of(rows, "full", None, "nll"), "seeds")
    return _noted(found, f"k = {size}")


def _selected(rows: pl.DataFrame, method: str, rival: str, metric: str = "accuracy") -> Measured:
    return paired_difference(_part(rows, "selection"), method, rival, metric, on="seed")


def _against_whole(rows: pl.DataFrame) -> Measured:
    policy = _part(rows, "selection").filter(pl.col("method") == "policy").sort("seed")["accuracy"].to_numpy()
    full = _of(rows, "full", None)
    if policy.size != full.size:
        raise NotEnoughRows(f"{policy.size} rows of policy, {full.size} of full")
    return mean_interval(policy - full, "seeds")


def _recipes(rows: pl.DataFrame, rival: str) -> Measured:
    return paired_difference(_part(rows, "ablation"), "refrag", rival, "accuracy", on="seed")


def _sooner(rows: pl.DataFrame, context: int, method: str, size: int) -> Measured:
    """Time of the whole context over that of chunks: median of the ratios within a repetition."""
    timed = rows.filter(pl.col("part").eq("time") & pl.col("context").eq(context))
    wanted = timed.filter(
        pl.col("method").eq("dense") | (pl.col("method").eq(method) & pl.col("size").eq_missing(pl.lit(size)))
    )
    absent = {"dense", method} - set(wanted["method"])
    if absent:
        raise NotEnoughRows(f"{', '.join(sorted(absent))} was not timed at {context} tokens, chunks of {size}")
    return ratio_interval(wanted, "dense", method, "seconds", on=["repetition"])


def _half_of_k(rows: pl.DataFrame, context: int = 1024) -> Measured:
    """The ratio over k, at the size where it is least."""
    timed = rows.filter(pl.col("part").eq("time") & pl.col("method").eq("kept") & pl.col("context").eq(context))
    found = []
    for k in sorted(timed["size"].unique()):
        one = _sooner(rows, context, "kept", k)
        found.append(Measured(one.value / k, one.low / k, one.high / k, f"least at k = {k}, {one.note}"))
    if not found:
        raise NotEnoughRows(f"no chunks were timed at {context} tokens")
    return lowest(found)


CARD = "reproduction at small scale"


def _quality_claims() -> Iterator[Claim]:
    yield Claim(
        "truncation",
        "At every size of chunks, their embeddings give more answers than as many of the last tokens",
        paper="better than LLaMA with as many positions",
        measure=_over_truncated,
        holds=lambda measured: measured.low > 0,
        source="tables",
    )
    yield Claim(
        "order",
        "From whole contexts to chunks of 4, 8 and 16, no step gives more answers",
        paper="k of 8, 16, 32: the more is compressed, the more is lost",
        measure=_ordered,
        holds=lambda measured: measured.high >= 0,
        source=CARD,
    )
    yield Claim(
        "no-loss",
        "Chunks of 16, none expanded, cost at most 0.02 nats a token of an answer",
        paper="30.85x sooner without loss in perplexity",
        measure=_loss,
        holds=lambda measured: measured.high < 0.02,
        unit="nats",
    )
    yield Claim(
        "policy-random",
        "The policy's quarter of expanded chunks gives more answers than a random one",
        paper="learned selection is better than random and than perplexity's",
        measure=functools.partial(_selected, method="policy", rival="random"),
        holds=lambda measured: measured.low > 0,
        source="ablation",
    )
    yield Claim(
        "policy-heuristic",
        "And more than the chunks of highest perplexity",
        paper="learned selection is better than random and than perplexity's",
        measure=functools.partial(_selected, method="policy", rival="heuristic"),
        holds=lambda measured: measured.low > 0,
        source="ablation",
    )
    yield Claim(
        "policy-oracle",
        "It is within 2 points of one who knows which chunk is asked for",
        paper="none",
        measure=functools.partial(_selected, method="policy", rival="oracle"),
        holds=lambda measured: measured.low > -NEAR,
        source=CARD,
    )
    yield Claim(
        "policy-whole",
        "And within 2 points of the whole context",
        paper="no loss in accuracy",
        measure=_against_whole,
        holds=lambda measured: measured.low > -NEAR,
    )
    yield Claim(
        "policy-compressed",
        "It gives more answers than embeddings alone",
        paper="selective compression improves on full compression",
        measure=functools.partial(_selected, method="policy", rival="compressed"),
        holds=lambda measured: measured.low > 0,
        source="ablation",
    )
    yield Claim(
        "policy-truncation",
        "And more than as many of the last tokens",
        paper="better than LLaMA with as many positions",
        measure=functools.partial(_selected, method="policy", rival="truncated_expanded"),
        holds=lambda measured: measured.low > 0,
        source="tables",
    )
    yield Claim(
        "policy-hits",
        "The chunk that is asked for is expanded more often by the policy than by chance",
        paper="none",
        measure=functools.partial(_selected, method="policy", rival="random", metric="hits"),
        holds=lambda measured: measured.low > 0,
        source=CARD,
        unit="of the questions",
    )
    yield Claim(
        "blind",
        "A policy that is not told the question expands it no more often than chance does",
        paper="the policy reads the chunks alone",
        measure=functools.partial(_selected, method="blind", rival="random", metric="hits"),
        holds=lambda measured: measured.low <= 0,
        source="none; trivial control",
        unit="of the questions",
    )
    for recipe, words in (("direct", "reconstruction and curriculum"), ("no_reconstruction", "reconstruction"),
                          ("no_curriculum", "the curriculum"), ("untrained", "any training")):  # fmt: skip
        yield Claim(
            f"ablation-{recipe}",
            f"Without {words}, but otherwise alike, there are fewer answers",
            paper="none; trivial control" if recipe == "untrained" else "both are essential",
            measure=functools.partial(_recipes, rival=recipe),
            holds=lambda measured: measured.low > 0,
            source="ablation",
        )


def _time_claims() -> Iterator[Claim]:
    yield Claim(
        "sooner-1024",
        "At 1,024 tokens with kept embeddings the first token comes at least k / 2 times sooner, for every k",
        paper="none; the products of the layers alone give k",
        measure=_half_of_k,
        holds=lambda measured: measured.low >= 0.5,
        source=CARD,
        unit="x k",
    )
    for method, factor, words in (("kept", 16.53, "with kept embeddings"), ("encoded", 8.59, "encoder included")):
        yield Claim(
            f"sooner-{method}",
            f"At 4,096 tokens, k = 16, {words}, it comes at least {factor} times sooner",
            paper=f"{factor}x at 16,384 tokens, LLaMA-2-7B",
            measure=functools.partial(_sooner, context=4096, method=method, size=16),
            holds=lambda measured, factor=factor: measured.low >= factor,
            source="figures",
            unit="x",
        )


CLAIMS = (*_quality_claims(), *_time_claims())
