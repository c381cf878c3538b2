"""Quality against bytes: what each way to make a cache smaller costs, and what two of them cost together.

    python -m experiments run kvcache.frontier      # about 20 minutes on 2 cores, once models and codebooks are there

Loss of a language model (``f1``, held-out WikiText-2, tokens after the middle of 256) and of a published one
(stories260K, on stories that it tells itself), and accuracy of a recall model (final questions of 96 tokens) while
every token goes through the cache, against all bytes of the cache for each token seen: codes, scales, positions,
votes and sums, and the exact window that all share. Policies that drop tokens get 1/2, 1/4 or 1/8 of the exact
cache's bytes. The exact cache holds float16; codebooks are learned from 16 k tokens of
training text, weighted by Fisher information, and stand apart, since a model has them once.

A second part, never mixed with the first, compresses a prompt once, after its own exact attention, and then lets the
cache grow: the only way to compare SnapKV, PyramidKV, AdaKV and ThinK. Prompts of the recall model end before the
first question. Tokens a second are those of this reference code on a CPU, all rows of the batch together: a sanity
check, no claim.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.kvcache import fixtures
from experiments.kvcache.frontier_cells import Cell, Config, cells, scores
from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    Trial,
    furthest,
    lowest,
    mean_interval,
    new_figure,
    paired_difference,
)

PAPER = (
    "Liu, Desai, Liao, Wang, Xie, Xu, Kyrillidis, Shrivastava: Scissorhands, NeurIPS 2023, arXiv 2305.17118; "
    "Zhang, Yi, Xu, Shrivastava: KV Cache is 1 Bit Per Channel (coupled quantization), NeurIPS 2024, arXiv 2405.03917"
)
SYSTEM = "hashml.kvcache"


SCALES = {
    "tiny": Config(models=("f1",), budgets=(2,), together_budgets=(2,), policies=(),
                   codecs=("coupled:8c8b",), together=("scissorhands+int4",), prompt=("snapkv",), seeds=2,
                   size=fixtures.TINY),
    "default": Config(),
    "paper": Config(models=("f1", "f1_relu_gqa", "recall", "stories"), seeds=5, size=fixtures.PAPER),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config):
        for seed in range(config.seeds):
            key = {**dataclasses.asdict(cell), "seed": seed}
            yield Trial(key, functools.partial(_seed, config, cell, seed))


def _seed(config: Config, cell: Cell, seed: int) -> dict[str, float | int | None]:
    return scores(config, cell)[seed]


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return config.seeds * len(cells(config))


# --- claims -------------------------------------------------------------------------------------------

SCORED = ("h2o", "keyformer", "corm", "scissorhands", "scissorhands_1")
"""Policies that score by attention; TOVA, which looks at one query alone, is not expected to do well here."""
HALF_TO_QUARTER = (2, 3, 4)


def _part(rows: pl.DataFrame, fixture: str, protocol: str, budget: int | None) -> pl.DataFrame:
    same = pl.col("budget").is_null() if budget is None else pl.col("budget").eq(budget)
    return rows.filter(pl.col("fixture").eq(fixture) & pl.col("protocol").eq(protocol) & same)


def _loss(rows: pl.DataFrame, fixture: str, protocol: str, method: str, budget: int | None) -> pl.DataFrame:
    found = _part(rows, fixture, protocol, budget).filter(pl.col("method") == method).sort("seed")
    if found.is_empty():
        raise NotEnoughRows(f"no rows of {fixture} with {method} at budget {budget}")
    return found


def _excess(
    rows: pl.DataFrame,
    a: tuple[str, int | None],
    b: tuple[str, int | None],
    fixture: str = "f1",
    protocol: str = "decode",
) -> Measured:
    """Loss of a over that of b, less 1, over the models, or over samples of stories."""
    first, second = (_loss(rows, fixture, protocol, *each)["nll"].to_numpy() for each in (a, b))
    return mean_interval(first / second - 1, "samples of stories" if fixture == "stories" else "models")


def _compounding(rows: pl.DataFrame) -> Measured:
    """By how much INT4 behind Scissorhands changes its loss, where it does so most."""
    cells = []
    for budget in (2, 4):
        found = _excess(rows, ("scissorhands+int4", budget), ("scissorhands", budget))
        cells.append(Measured(found.value, found.low, found.high, f"worst: 1/{budget} of the bytes"))
    return furthest(cells)


def _recall(rows: pl.DataFrame, method: str, budget: int | None) -> Measured:
    found = _part(rows, "recall", "decode", budget).filter(pl.col("method") == method)
    return mean_interval(found["accuracy"], "models")


def _lead(rows: pl.DataFrame, methods: tuple[str, ...], control: str, budgets: tuple[int, ...]) -> Measured:
    """Accuracy of recall of the worst of the methods over the control's, at the budget where it stands worst."""
    cells = []
    for budget in budgets:
        part = _part(rows, "recall", "decode", budget)
        for method in methods:
            found = paired_difference(part, method, control, "accuracy", on=["seed"])
            cells.append(Measured(found.value, found.low, found.high, f"worst: {method} at 1/{budget}"))
    return lowest(cells)


def _recall_claim(
    name: str, subject: str, methods: tuple[str, ...], budgets: tuple[int, ...], control: str = "random"
) -> Claim:
    rival = {"random": "random eviction", "window": "a window of the newest tokens"}[control]
    return Claim(
        f"recall-{name}-{control}",
        f"{subject} recalls more than {rival} in equal bytes, at {', '.join(f'1/{b}' for b in budgets)}",
        paper="importance persists, so that past attention tells what will be needed",
        measure=functools.partial(_lead, methods=methods, control=control, budgets=budgets),
        holds=lambda measured: measured.low > 0,
    )


CLAIMS = (
    Claim(
        "scissorhands-half",
        "At half the bytes Scissorhands raises the loss of the language model by less than 2 %",
        paper="no loss of quality at 2x (13B) to 5x",
        measure=functools.partial(_excess, a=("scissorhands", 2), b=("full", None)),
        holds=lambda measured: measured.high < 0.02,
    ),
    Claim(
        "scissorhands-quarter",
        "At a quarter of the bytes, too",
        paper="up to 5x less memory without loss of quality",
        measure=functools.partial(_excess, a=("scissorhands", 4), b=("full", None)),
        holds=lambda measured: measured.high < 0.02,
    ),
    Claim(
        "scissorhands-random",
        "At a quarter of the bytes its loss is below that of random eviction",
        paper="pivotal tokens stay pivotal (persistence of importance)",
        measure=functools.partial(_excess, a=("scissorhands", 4), b=("random", 4)),
        holds=lambda measured: measured.high < 0,
    ),
    Claim(
        "scissorhands-int4",
        "INT4 behind Scissorhands changes its loss by less than 1 %: the two do not compound",
        paper="up to 20x with 4-bit quantisation, without compounding",
        measure=_compounding,
        holds=lambda measured: measured.low > -0.01 and measured.high < 0.01,
    ),
    Claim(
        "recall-half",
        "Recall at half the bytes: Scissorhands, one token at a time, answers more than 85 %",
        paper="none; .94 and .78 at 48 and 32 of 96 tokens in an earlier study",
        measure=functools.partial(_recall, method="scissorhands_1", budget=2),
        holds=lambda measured: measured.low > 0.85,
        source="reproduction",
    ),
    Claim(
        "recall-third",
        "And at a third of the bytes more than 65 %",
        paper="none; as above",
        measure=functools.partial(_recall, method="scissorhands_1", budget=3),
        holds=lambda measured: measured.low > 0.65,
        source="reproduction",
    ),
    _recall_claim("scissorhands", "Scissorhands, one token at a time,", ("scissorhands_1",), (2, 3)),
    _recall_claim("h2o", "H2O", ("h2o",), HALF_TO_QUARTER),
    _recall_claim("keyformer", "Keyformer", ("keyformer",), HALF_TO_QUARTER),
    _recall_claim("corm", "CORM with a budget", ("corm",), (2,)),
    _recall_claim("all", "Every policy that scores by attention, TOVA apart,", SCORED, HALF_TO_QUARTER),
    _recall_claim("all", "Every policy that scores by attention, TOVA apart,", SCORED, HALF_TO_QUARTER, "window"),
    Claim(
        "tova-below-random",
        "TOVA recalls less than random eviction at half the bytes: the last query knows nothing of later ones",
        paper="none; .12 against .67 at 48 of 96 tokens in an earlier study",
        measure=functools.partial(_lead, methods=("tova",), control="random", budgets=(2,)),
        holds=lambda measured: measured.high < 0,
        source="reproduction",
    ),
    Claim(
        "coupled-2c8b",
        "CQ-2c8b, 4 bits a value, is within 1 % of the exact cache's loss",
        paper="perplexity 5.70 against 5.68 (LLaMA-7b, WikiText-2)",
        measure=functools.partial(_excess, a=("coupled:2c8b", None), b=("full", None)),
        holds=lambda measured: measured.high < 0.01,
        source="table of perplexities",
    ),
    Claim(
        "coupled-8c8b",
        "CQ-8c8b, 1 bit a value, has less loss than INT2 in groups",
        paper="perplexity 8.09 against 11779 (LLaMA-7b, WikiText-2)",
        measure=functools.partial(_excess, a=("coupled:8c8b", None), b=("int2", None)),
        holds=lambda measured: measured.high < 0,
        source="table of perplexities",
    ),
    Claim(
        "stories-scissorhands-half",
        "At half the bytes Scissorhands raises the loss of stories260K by less than 2 %",
        paper="no loss of quality at 2x (13B) to 5x",
        measure=functools.partial(_excess, a=("scissorhands", 2), b=("full", None), fixture="stories"),
        holds=lambda measured: measured.high < 0.02,
    ),
    Claim(
        "stories-coupled-2c8b",
        "CQ-2c8b is within 1 % of the exact cache's loss there",
        paper="perplexity 5.70 against 5.68 (LLaMA-7b, WikiText-2)",
        measure=functools.partial(_excess, a=("coupled:2c8b", None), b=("full", None), fixture="stories"),
        holds=lambda measured: measured.high < 0.01,
        source="table of perplexities",
    ),
    Claim(
        "stories-coupled-8c8b",
        "And CQ-8c8b, 1 bit a value, has less loss than INT2 in groups",
        paper="perplexity 8.09 against 11779 (LLaMA-7b, WikiText-2)",
        measure=functools.partial(_excess, a=("coupled:8c8b", None), b=("int2", None), fixture="stories"),
        holds=lambda measured: measured.high < 0,
        source="table of perplexities",
    ),
    Claim(
        "think",
        "Keys without 40 % of their channels raise the loss after a prompt by less than 2 %",
        paper="ThinK (arXiv 2407.21018): comparable accuracy at 40 %",
        measure=functools.partial(_excess, a=("think:0.4", None), b=("full", None), protocol="prompt"),
        holds=lambda measured: measured.high < 0.02,
        source="ThinK's abstract",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------

FAMILIES = {
    "int8": "int8, int4, int2",
    "int4": "int8, int4, int2",
    "int2": "int8, int4, int2",
    "kivi:4": "KIVI",
    "kivi:2": "KIVI",
    "coupled:2c8b": "CQ 2c, 4c, 8c8b",
    "coupled:4c8b": "CQ 2c, 4c, 8c8b",
    "coupled:8c8b": "CQ 2c, 4c, 8c8b",
}
"""Codecs that are one line of the figure."""
PROTOCOLS = {"decode": "token by token", "prompt": "compressed prompt"}


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Quality, mean over the models, beside bytes. The standard error is of the accuracy, or of the loss over that of
    the exact cache; speed is a sanity check alone."""
    quality = pl.coalesce("accuracy", "excess")
    return (
        _with_excess(rows)
        .group_by("fixture", "protocol", "method", "budget", maintain_order=True)
        .agg(
            pl.col("bytes_per_token").first().alias("bytes/token"),
            pl.col("nll").mean(),
            pl.col("excess").mean().alias("over exact"),
            pl.col("rehearsed").mean(),
            pl.col("unrehearsed").mean(),
            (quality.std() / pl.len().sqrt()).alias("standard error"),
            pl.col("tokens_kept").mean().alias("tokens kept"),
            pl.col("table_bytes").first().alias("codebooks, once a model"),
            pl.col("tokens_per_second").median().round(0).alias("tokens/s, CPU, sanity only"),
        )
    )


def _with_excess(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows with the loss over that of the same model's exact cache, less 1: models differ by more than caches."""
    exact = pl.col("nll").filter(pl.col("method") == "full").first().over("fixture", "protocol", "seed")
    return rows.with_columns((pl.col("nll") / exact - 1).alias("excess"))


def figure(rows: pl.DataFrame) -> Figure:
    """Loss over the exact cache's, and accuracy, against bytes for each token seen, log axis: one line a method."""
    rows = _with_excess(rows)
    panels = rows.select("protocol", "fixture").unique(maintain_order=True).sort("fixture", maintain_order=True)
    columns = max(1, panels["protocol"].n_unique())
    lines = -(-len(panels) // columns)
    drawing, axes = new_figure(columns, lines, width=6.4 * columns, height=4.5 * lines)
    for ax, (protocol, fixture) in zip(axes, panels.iter_rows(), strict=False):
        part = rows.filter(pl.col("protocol").eq(protocol) & pl.col("fixture").eq(fixture))
        _panel(ax, part, "accuracy" if fixture == "recall" else "excess")
        label = "accuracy, final questions" if fixture == "recall" else "loss over the exact cache's, less 1"
        ax.set(xscale="log", xlabel="bytes of cache for each token seen", ylabel=label,
               title=f"{fixture}, {PROTOCOLS[protocol]}")  # fmt: skip
        ax.legend(fontsize="x-small", ncols=2)
    return drawing


def _panel(ax: Axes, rows: pl.DataFrame, quality: str) -> None:
    named = rows.with_columns(pl.col("method").replace(FAMILIES).alias("line"))
    for place, line in enumerate(named["line"].unique(maintain_order=True)):
        points = (
            named.filter(pl.col("line") == line)
            .group_by("bytes_per_token")
            .agg(pl.col(quality).mean(), (pl.col(quality).std() / pl.len().sqrt()).alias("error"))
            .sort("bytes_per_token")
        )
        marked = {"full": {"color": "black", "marker": "*", "markersize": 12},
                  "random": {"color": "black", "linestyle": ":", "linewidth": 2.5}}  # fmt: skip
        # More lines than colours: each round of them has its own dashes.
        style: dict[str, Any] = {"linestyle": ("-", "--", "-.")[place // 8 % 3]} | marked.get(line, {})
        ax.errorbar(points["bytes_per_token"], points[quality], points["error"], label=line, **style)
        if line == "full":
            ax.axhline(float(points[quality][0]), color="0.6", linewidth=0.8)
    most = rows[quality].max()
    if isinstance(most, float) and most > 1:
        # One cache that breaks a model would press all others onto the axis.
        ax.set_yscale("symlog", linthresh=0.05)
