"""Scissorhands: is what mattered once what matters later, and what may a cache that believes so forget?

    python -m experiments run kvcache.scissorhands      # about 4 minutes on 2 cores, once the models are there

Three parts. *Persistence*: of the tokens of the first half that are pivotal for a query of the second half, the share
that was pivotal before, layer by layer, beside the share of all tokens that was: a random set of that size scores as
much on average. *Budgets*: loss of a language model (``f1``, held-out WikiText-2, tokens after the middle of 256) and
accuracy of a recall model (final questions of 96 tokens), every token through the cache. Scissorhands keeps B tokens,
as the paper counts them, main slots and window together, and its rivals take as many bytes, all counted. The window,
r = 10 tokens of text and 6 of recall, is the same for all, and so is BOS, which never leaves. ``scissorhands`` frees
half of B at once, as the paper does, and holds less than B on average; ``scissorhands_1`` frees a token at a time.
*History*: the number w of queries whose votes count, at half of the tokens. Counted over all queries, low scores grow
with age, as if the policy were a window; ``per_query`` divides them by the queries that saw the key.

The paper's 20x is nominal: a fifth of the tokens times 4 of 16 bits. Here codes, scales, positions, votes and the
exact window count.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.kvcache import fixtures, recall
from experiments.kvcache.scissorhands_cells import Cell, Config, cells, histories, persistence, scores
from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    Trial,
    furthest,
    highest,
    lowest,
    mean_interval,
    new_figure,
    paired_difference,
)

PAPER = (
    "Liu, Desai, Liao, Wang, Xie, Xu, Kyrillidis, Shrivastava: Scissorhands, Exploiting the Persistence of "
    "Importance Hypothesis for LLM KV Cache Compression at Test Time, NeurIPS 2023, arXiv 2305.17118"
)
SYSTEM = "hashml.kvcache.scissorhands"


SCALES = {
    "tiny": Config(text_budgets=(2,), recall_budgets=(), rivals=("random",), histories=(), seeds=2,
                   recall_seeds=2, size=fixtures.TINY),
    "default": Config(),
    "paper": Config(seeds=5, size=fixtures.PAPER),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for fixture in _fixtures(config):
        for seed, layer in itertools.product(range(config.trained(fixture)), range(_depth(config, fixture))):
            key = {**dataclasses.asdict(Cell("persistence", fixture, "full")), "layer": layer, "seed": seed}
            yield Trial(key, functools.partial(persistence, config, fixture, layer, seed))
    for cell in cells(config):
        for seed in range(config.trained(cell.fixture)):
            key = {**dataclasses.asdict(cell), "layer": None, "seed": seed}
            yield Trial(key, functools.partial(_seed, config, cell, seed))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    layers = sum(_depth(config, name) * config.trained(name) for name in _fixtures(config))
    return layers + sum(config.trained(cell.fixture) for cell in cells(config))


def _depth(config: Config, fixture: str) -> int:
    return fixtures.setting(config.size, fixture, "decode").decoder.layers


def _fixtures(config: Config) -> tuple[str, ...]:
    return ("f1", "recall") if config.recall_budgets else ("f1",)


def _seed(config: Config, cell: Cell, seed: int) -> dict[str, float | int | None]:
    return (histories if cell.part == "history" else scores)(config, cell)[seed]


# --- claims -------------------------------------------------------------------------------------------


def _cell(rows: pl.DataFrame, fixture: str, method: str, budget: int | None) -> pl.DataFrame:
    """Rows of one cache, by seed."""
    same = pl.col("budget").is_null() if budget is None else pl.col("budget") == budget
    found = rows.filter(pl.col("part") == "budget", pl.col("fixture") == fixture, pl.col("method") == method, same)
    if found.is_empty():
        raise NotEnoughRows(f"no rows of {fixture} with {method} at budget {budget}")
    return found.sort("seed")


def _text(rows: pl.DataFrame, method: str, budget: int | None) -> np.ndarray:
    """Loss of each language model."""
    return _cell(rows, "f1", method, budget)["nll"].to_numpy()


def _excess(rows: pl.DataFrame, a: tuple[str, int | None], b: tuple[str, int | None]) -> Measured:
    """Loss of a over that of b, less 1."""
    return mean_interval(_text(rows, *a) / _text(rows, *b) - 1, "models")


def _every_seed(rows: pl.DataFrame) -> Measured:
    """Loss over that of random eviction at a fifth of the tokens: all models, the extremes as bounds."""
    found = _text(rows, "scissorhands", 5) / _text(rows, "random", 5) - 1
    return Measured(float(found.mean()), float(found.min()), float(found.max()), f"extremes of {len(found)} models")


def _compounding(rows: pl.DataFrame) -> Measured:
    """By how much INT4 behind Scissorhands changes its loss, where it does so most."""
    found = []
    for budget in sorted(set(rows.filter(pl.col("method") == "scissorhands+int4")["budget"])):
        one = _excess(rows, ("scissorhands+int4", budget), ("scissorhands", budget))
        found.append(dataclasses.replace(one, note=f"worst: 1/{budget} of the tokens"))
    if not found:
        raise NotEnoughRows("no rows of scissorhands+int4")
    return furthest(found)


def _fold(rows: pl.DataFrame) -> Measured:
    """All bytes of the exact cache over all bytes of Scissorhands with INT4, at a fifth of the tokens."""
    exact, small = (
        _cell(rows, "f1", *which)["bytes_per_token"][0] for which in (("full", None), ("scissorhands+int4", 5))
    )
    return Measured(exact / small, exact / small, exact / small, "counted")


def _recall(rows: pl.DataFrame, method: str, budget: int) -> Measured:
    return mean_interval(_cell(rows, "recall", method, budget)["accuracy"], "models")


def _lead(rows: pl.DataFrame, rival: str) -> Measured:
    """Accuracy over a rival's in equal bytes, where Scissorhands, one token at a time, stands worst."""
    found = []
    for budget in sorted(set(rows.filter(pl.col("fixture") == "recall")["budget"].drop_nulls())):
        pair = pl.concat(_cell(rows, "recall", method, budget) for method in ("scissorhands_1", rival))
        one = paired_difference(pair, "scissorhands_1", rival, "accuracy", on="seed")
        found.append(dataclasses.replace(one, note=f"worst: 1/{budget} of the tokens"))
    if not found:
        raise NotEnoughRows("no rows of recall")
    return lowest(found)


def _layers(rows: pl.DataFrame) -> pl.DataFrame:
    found = rows.filter(pl.col("part") == "persistence", pl.col("fixture") == "f1").sort("layer", "seed")
    if found.is_empty():
        raise NotEnoughRows("no rows of f1's persistence")
    return found


def _extreme_layer(rows: pl.DataFrame, column: str, over: str | None = None, largest: bool = False) -> Measured:
    """A layer's number, less that of the column ``over``, in the layer where it is least, or largest."""
    found = []
    for (layer,), part in _layers(rows).group_by("layer", maintain_order=True):
        values = part[column].to_numpy() - (0 if over is None else part[over].to_numpy())
        found.append(dataclasses.replace(mean_interval(values, "models"), note=f"worst: layer {layer}"))
    return (highest if largest else lowest)(found)


def _above_95(rows: pl.DataFrame) -> Measured:
    """Share of layers whose ratio is above 0.95, over the models."""
    return mean_interval(_layers(rows).group_by("seed").agg((pl.col("ratio") > 0.95).mean())["ratio"], "models")


def _late(rows: pl.DataFrame) -> Measured:
    """Ratio of the last layer less that of the first."""
    found = _layers(rows)
    ends = [found.filter(pl.col("layer") == layer)["ratio"].to_numpy() for layer in (0, found["layer"].max())]
    return mean_interval(ends[1] - ends[0], "models")


def _history(rows: pl.DataFrame, metric: str) -> Measured:
    """A number with votes of all queries less the same with those of the last 16."""
    found = rows.filter(pl.col("part") == "history", pl.col("per_query").not_()).sort("seed")
    if not {16, recall.LENGTH} <= set(found["history"]):
        raise NotEnoughRows(f"no rows of the part on history with w of {recall.LENGTH} and of 16")
    sides = [found.filter(pl.col("history") == w)[metric].to_numpy() for w in (recall.LENGTH, 16)]
    return mean_interval(sides[0] - sides[1], "models")


CLAIMS = (
    Claim(
        "persistence-median",
        "In every layer of the language model the median persistence ratio is at least 0.9",
        paper="above 0.95 in most layers of OPT",
        measure=functools.partial(_extreme_layer, column="median"),
        holds=lambda measured: measured.low >= 0.9,
        source="reproduction",
    ),
    Claim(
        "persistence-most-layers",
        "The persistence ratio is above 0.95 in more than half of the layers",
        paper="above 0.95 in most layers of OPT",
        measure=_above_95,
        holds=lambda measured: measured.low > 0.5,
        source="figure of persistence ratios",
    ),
    Claim(
        "persistence-random",
        "In every layer it is above that of a random set of the same size",
        paper="only tokens that were pivotal once will be pivotal later",
        measure=functools.partial(_extreme_layer, column="ratio", over="random_level"),
        holds=lambda measured: measured.low > 0,
    ),
    Claim(
        "persistence-small-set",
        "In every layer fewer than half of the first half's tokens are pivotal there",
        paper="the pivotal set is well under half of the tokens",
        measure=functools.partial(_extreme_layer, column="random_level", largest=True),
        holds=lambda measured: measured.high < 0.5,
        source="figure of persistence ratios",
    ),
    Claim(
        "persistence-late",
        "The persistence ratio of the last layer is below that of the first",
        paper="lower in late layers",
        measure=_late,
        holds=lambda measured: measured.high < 0,
        source="figure of persistence ratios",
    ),
    Claim(
        "text-half",
        "At half of the tokens the loss of the language model rises by less than 2 %",
        paper="perplexity flat to about 2x (OPT-13B) and 4x (OPT-66B)",
        measure=functools.partial(_excess, a=("scissorhands", 2), b=("full", None)),
        holds=lambda measured: measured.high < 0.02,
        source="figure of perplexities",
    ),
    Claim(
        "text-fifth",
        "And at a fifth of the tokens, too",
        paper="up to 5x less memory without loss of quality",
        measure=functools.partial(_excess, a=("scissorhands", 5), b=("full", None)),
        holds=lambda measured: measured.high < 0.02,
    ),
    Claim(
        "text-random",
        "At a fifth of the tokens the loss is below that of random eviction in equal bytes, with every model",
        paper="pivotal tokens stay pivotal",
        measure=_every_seed,
        holds=lambda measured: measured.high < 0,
    ),
    Claim(
        "recall-half",
        "One token at a time, it answers more than 85 % of the recall model's questions at half of the tokens",
        paper="none; .94 at 48 of 96 tokens in an earlier study",
        measure=functools.partial(_recall, method="scissorhands_1", budget=2),
        holds=lambda measured: measured.low > 0.85,
        source="reproduction",
    ),
    Claim(
        "recall-third",
        "And more than 65 % at a third",
        paper="none; .78 at 32 of 96 tokens in an earlier study",
        measure=functools.partial(_recall, method="scissorhands_1", budget=3),
        holds=lambda measured: measured.low > 0.65,
        source="reproduction",
    ),
    *(
        Claim(
            f"recall-{rival}",
            f"One token at a time, it answers more than {title} in equal bytes, at half and a third of the tokens",
            paper="pivotal tokens stay pivotal",
            measure=functools.partial(_lead, rival=rival),
            holds=lambda measured: measured.low > 0,
        )
        for rival, title in (("random", "random eviction"), ("window", "a window of the newest tokens"))
    ),
    Claim(
        "int4",
        "INT4 behind Scissorhands changes its loss by less than 1 % at every budget: the two do not compound",
        paper="HellaSwag 0.706 at 2x, 0.704 with 4 bits as well (OPT-6B)",
        measure=_compounding,
        holds=lambda measured: measured.low > -0.01 and measured.high < 0.01,
        source="table with quantisation",
    ),
    Claim(
        "int4-fold",
        "With INT4 and a fifth of the tokens the cache is 20 times smaller, all bytes counted",
        paper="up to 20x",
        measure=_fold,
        holds=lambda measured: measured.low >= 20,
        unit="x",
    ),
    Claim(
        "int4-quality",
        "And its loss is within 2 % of the exact cache's",
        paper="up to 20x without loss of quality",
        measure=functools.partial(_excess, a=("scissorhands+int4", 5), b=("full", None)),
        holds=lambda measured: measured.high < 0.02,
    ),
    Claim(
        "history-accuracy",
        "With votes of all queries it recalls less than with those of the last 16",
        paper="none; .23 against .94 in an earlier study",
        measure=functools.partial(_history, metric="accuracy"),
        holds=lambda measured: measured.high < 0,
        source="reproduction",
    ),
    Claim(
        "history-window",
        "And more of what it keeps is what a window keeps",
        paper="none; the counter of low scores grows with age",
        measure=functools.partial(_history, metric="newest"),
        holds=lambda measured: measured.low > 0,
        source="reproduction",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over the models, the standard error beside the quality; layers first, then caches."""
    settings = ["part", "fixture", "layer", "method", "budget", "history", "per_query"]
    quality = pl.coalesce(pl.col(name) for name in ("accuracy", "nll", "ratio") if name in rows.columns)
    measured = [name for name in MEASURED if name in rows.columns]
    return (
        rows.group_by(settings, maintain_order=True)
        .agg(*(pl.col(name).mean() for name in measured), (quality.std() / pl.len().sqrt()).alias("standard error"))
        .rename({"per_query": "per query", **{old: new for old, new in MEASURED.items() if old in measured}})
    )


MEASURED = {"ratio": "persistence", "median": "median", "random_level": "random level", "nll": "nll",
            "rehearsed": "rehearsed", "unrehearsed": "unrehearsed", "accuracy": "accuracy",
            "bytes_per_token": "bytes/token", "tokens_kept": "tokens kept",
            "newest": "share of newest"}  # fmt: skip
"""Columns of numbers, and their names in the table."""


def figure(rows: pl.DataFrame) -> Figure:
    """Persistence by layer; loss over the exact cache's, and accuracy, against bytes; accuracy against the queries
    whose votes count."""
    drawing, axes = new_figure(2, 2, width=12, height=8)
    _draw_persistence(axes[0], rows.filter(pl.col("part") == "persistence"))
    exact = pl.col("nll").filter(pl.col("method") == "full").first().over("fixture", "seed")
    budget = rows.filter(pl.col("part") == "budget").with_columns(excess=pl.col("nll") / exact - 1)
    for ax, fixture, quality in ((axes[1], "f1", "excess"), (axes[2], "recall", "accuracy")):
        part = budget.filter(pl.col("fixture") == fixture)
        _draw_quality(ax, part, quality)
        label = "accuracy, final questions" if fixture == "recall" else "loss over the exact cache's, less 1"
        ax.set(xlabel="bytes of cache for each token seen", ylabel=label, title=f"{fixture}, token by token")
    _draw_history(axes[3], rows.filter(pl.col("part") == "history"))
    return drawing


def _means(rows: pl.DataFrame, by: str, *columns: str) -> pl.DataFrame:
    """Means and standard errors over the models."""
    return rows.group_by(by).agg(
        *(pl.col(name).mean() for name in columns),
        *((pl.col(name).std() / pl.len().sqrt()).alias(f"{name} error") for name in columns),
    ).sort(by)  # fmt: skip


def _draw_persistence(ax: Axes, rows: pl.DataFrame) -> None:
    for fixture in rows["fixture"].unique(maintain_order=True):
        points = _means(rows.filter(pl.col("fixture") == fixture), "layer", "ratio", "random_level")
        drawn = ax.errorbar(points["layer"], points["ratio"], points["ratio error"], marker="o", label=fixture)
        ax.plot(points["layer"], points["random_level"], linestyle=":", color=drawn[0].get_color(),
                label=f"{fixture}, random set")  # fmt: skip
    ax.set(xlabel="layer", ylabel="persistence ratio", title="pivotal later, and pivotal before")
    ax.set_xticks(sorted(set(rows["layer"])))
    ax.legend(fontsize="x-small")


def _draw_quality(ax: Axes, rows: pl.DataFrame, quality: str) -> None:
    for method in rows["method"].unique(maintain_order=True):
        points = _means(rows.filter(pl.col("method") == method), "bytes_per_token", quality)
        marked = {"full": {"color": "black", "marker": "*", "markersize": 12},
                  "random": {"color": "black", "linestyle": ":"}}  # fmt: skip
        style: dict[str, Any] = {"marker": "o"} | marked.get(method, {})
        ax.errorbar(points["bytes_per_token"], points[quality], points[f"{quality} error"], label=method, **style)
    if not rows.is_empty():
        ax.legend(fontsize="x-small", ncols=2)


def _draw_history(ax: Axes, rows: pl.DataFrame) -> None:
    ax.set(xlabel="queries whose votes count, w", ylabel="accuracy, and share", title="recall at half of the tokens")
    for per_query in rows["per_query"].unique(maintain_order=True):
        points = _means(rows.filter(pl.col("per_query") == per_query), "history", "accuracy", "newest")
        suffix = ", divided by the queries that saw the key" if per_query else ""
        for name, marker, label in (("accuracy", "o", "accuracy"), ("newest", "s", "kept that a window keeps")):
            ax.errorbar(points["history"], points[name], points[f"{name} error"], label=label + suffix,
                        marker="x" if per_query else marker)  # fmt: skip
    if not rows.is_empty():
        ax.legend(fontsize="x-small")
