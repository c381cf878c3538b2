"""Retrieval: what a smaller cache finds again, by how deep it lies, who asked when, and where nothing is a needle.

    python -m experiments run kvcache.retrieval      # about 8 minutes on 2 cores, once models and codebooks are there

Three parts, each with several models, seeds 0, 1, 2... of one recipe. *Grid*: the recall task, 96 tokens with 8
pairs and 256 with 16, every token through the cache. The places of pairs are cut in six parts, the oldest first:
accuracy of the final questions by depth, length and bytes, of pairs that were rehearsed and of the others. *Prompt*:
78 tokens are compressed once, after their own exact attention. They end with questions for 4 of the 8 pairs, inside
the last 8 tokens with which SnapKV looks (aware), or with filler in their place (agnostic); then all pairs are asked
for. So the cache may know of a pair that it was asked for before, and one that it was not is a second turn's.
*Aggregation*: which token came most often (`experiments.kvcache.counting`), every token through the cache.

A budget of 4 is a quarter of the exact cache's bytes (float16), or of the prompt's, positions and the policies'
memory included. BOS never leaves, and the newest tokens are exact: a sixteenth of a sequence, 8 of a prompt;
Scissorhands and CORM count the votes of the last sixth of a sequence. `coupled:8c8b` keeps all tokens in 7 times
fewer bytes, its codebooks apart. A window is BOS and the newest tokens, `streaming` the 4 first ones and the newest,
rotated by rank.
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
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from experiments.kvcache import retrieval_measures as measures
from experiments.kvcache.retrieval_cells import (
    CONDITIONS,
    DEPTHS,
    KINDS,
    MEASURED,
    Cell,
    Config,
    Row,
    cells,
    last_place,
    scores,
)
from experiments.lab import Claim, Trial, new_figure

PAPER = (
    "Li, Huang, Yang, Venkitesh, Locatelli, Ye, Cai, Lewis, Chen: SnapKV, NeurIPS 2024, arXiv 2404.14469; "
    "Zhang, Sheng, Zhou, Chen, Zheng, Cai, Song, Tian, Re, Barrett, Wang, Chen: H2O, NeurIPS 2023, arXiv 2306.14048; "
    "Hsieh, Sun, Kriman, Acharya, Rekesh, Jia, Zhang, Ginsburg: RULER, COLM 2024, arXiv 2404.06654"
)
SYSTEM = "hashml.kvcache"

SCALES = {
    "tiny": Config(lengths=(96,), budgets=(2,), policies=("window",), prompt_budgets=(2,),
                   prompt_policies=("snapkv",), aggregation_policies=("streaming",), codecs=(), seeds=1,
                   questions=64, aggregation_questions=8, steps=2),
    "default": Config(),
    "paper": Config(seeds=10, questions=4096, aggregation_questions=1024, lloyd=100),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config):
        for condition in _conditions(cell):
            for seed in range(config.seeds):
                key = {**dataclasses.asdict(cell), "condition": condition, "seed": seed}
                yield Trial(key, functools.partial(_one, config, cell, condition, seed))


def _conditions(cell: Cell) -> tuple[str | None, ...]:
    return CONDITIONS if cell.part == "prompt" else (None,)


def _one(config: Config, cell: Cell, condition: str | None, seed: int) -> Row:
    return scores(config, cell)[condition, seed]


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return config.seeds * sum(len(_conditions(cell)) for cell in cells(config))


# --- claims -------------------------------------------------------------------------------------------

SCORED, BUDGETS = measures.SCORED, measures.BUDGETS

CLAIMS = (
    Claim(
        "exact",
        "The exact cache answers more than 99 % of the recall task, at 96 and 256 tokens",
        paper="none; above 99 % in an earlier study",
        measure=functools.partial(measures.exact, part="grid"),
        holds=lambda measured: measured.low > 0.99,
        source="reproduction",
    ),
    Claim(
        "window-reach",
        "Of pairs beyond its reach, never rehearsed, a window answers less than a tenth, at every length and budget: "
        "it guesses",
        paper="none; .04 to .08 in an earlier study",
        measure=measures.beyond_reach,
        holds=lambda measured: measured.high < measures.GUESS,
        source="reproduction",
    ),
    Claim(
        "scored-random",
        "At half of the bytes every policy that scores by attention answers more than random eviction, at both "
        "lengths",
        paper="importance persists, so that past attention tells what will be needed",
        measure=functools.partial(measures.over, methods=SCORED, rivals=("random",), budgets=(2,), part="grid"),
        holds=lambda measured: measured.low > 0,
    ),
    Claim(
        "h2o-random",
        "H2O does so at every budget",
        paper="a few heavy hitters get most of the attention; failed here if not above random at every budget",
        measure=functools.partial(measures.over, methods=("h2o",), rivals=("random",), budgets=BUDGETS, part="grid"),
        holds=lambda measured: measured.low > 0,
    ),
    Claim(
        "window-depth",
        "At half of the bytes a window answers more of the newest sixth of the places than of the oldest, at both "
        "lengths",
        paper="none; a needle in a haystack is found while the window reaches it",
        measure=measures.window_depth,
        holds=lambda measured: measured.low > 0,
        source="reproduction",
    ),
    Claim(
        "other-depth",
        "And only a window does: random eviction and the policies that score by attention answer less than .1 more "
        "there",
        paper="none; what is kept does not go by age",
        measure=measures.other_depth,
        holds=lambda measured: measured.high < 0.1,
        source="reproduction",
    ),
    Claim(
        "rehearsed",
        "Scissorhands, one token at a time, answers more of the pairs that were rehearsed than of the others, at a "
        "half and a third of the bytes",
        paper="only tokens that were pivotal once will be pivotal later",
        measure=functools.partial(measures.rehearsal, method="scissorhands_1", budgets=(2, 3)),
        holds=lambda measured: measured.low > 0,
    ),
    Claim(
        "coupled-exact",
        "CQ-8c8b, 1 bit a value and all tokens, loses less than .02 of the exact cache's right answers on every task",
        paper="perplexity 8.09 against 5.68 with 1 bit (LLaMA-7b, WikiText-2); no retrieval",
        measure=measures.all_tokens,
        holds=lambda measured: measured.low > -0.02,
        source="reproduction",
    ),
    Claim(
        "coupled-quarter",
        "In fewer bytes it answers more than every policy that drops tokens to a quarter, at both lengths",
        paper="none",
        measure=measures.coupled_over,
        holds=lambda measured: measured.low > 0,
        source="reproduction",
    ),
    Claim(
        "aware",
        "SnapKV answers more of the questions that its observation window saw than with filler in their place, at "
        "every budget",
        paper="none; near 100 % against clearly lower expected, failed if no difference",
        measure=measures.aware_gain,
        holds=lambda measured: measured.low > 0,
        source="reproduction",
    ),
    Claim(
        "aware-control",
        "By more than random eviction and a window do, which hold the same questions among their newest tokens",
        paper="as above",
        measure=measures.aware_gain_over,
        holds=lambda measured: measured.low > 0,
        source="reproduction",
    ),
    Claim(
        "aware-half",
        "At half of the prompt's bytes it then answers more than 95 %",
        paper="none; near 100 % expected",
        measure=measures.aware_half,
        holds=lambda measured: measured.low > 0.95,
        source="reproduction",
    ),
    Claim(
        "agnostic-random",
        "Without questions in the prompt SnapKV still answers more than random eviction, at every budget",
        paper="none; what a prompt's last tokens attend to is what is needed later",
        measure=measures.agnostic_over,
        holds=lambda measured: measured.low > 0,
        source="reproduction",
    ),
    Claim(
        "second-turn",
        "What SnapKV kept for the first turn's questions answers fewer of the second turn's, at every budget",
        paper="none; multi-turn is a known weakness of choosing by the question",
        measure=measures.second_turn,
        holds=lambda measured: measured.low > 0,
        source="reproduction",
    ),
    Claim(
        "second-turn-cost",
        "And fewer than what it keeps without any question, at every budget",
        paper="as above",
        measure=measures.second_turn_cost,
        holds=lambda measured: measured.high < 0,
        source="reproduction",
    ),
    Claim(
        "counting-exact",
        "The exact cache counts: it answers more than 95 % of the aggregation task",
        paper="none",
        measure=functools.partial(measures.exact, part="aggregation"),
        holds=lambda measured: measured.low > 0.95,
        source="reproduction",
    ),
    Claim(
        "counting-streaming",
        "Counting from fewer tokens, StreamingLLM answers more than H2O, at every budget",
        paper="in RULER's aggregation even StreamingLLM can win over needle-tuned policies",
        measure=functools.partial(
            measures.over, methods=("streaming",), rivals=("h2o",), budgets=BUDGETS, part="aggregation"
        ),
        holds=lambda measured: measured.low > 0,
        source="a thread of kvpress",
    ),
    *(
        Claim(
            f"counting-{method}",
            f"{title} answers at most .05 less than any policy that scores by attention, at every budget",
            paper="as above",
            measure=functools.partial(
                measures.over, methods=(method,), rivals=SCORED, budgets=BUDGETS, part="aggregation"
            ),
            holds=lambda measured: measured.low > -0.05,
            source="a thread of kvpress",
        )
        for method, title in (("window", "A window"), ("random", "Random eviction"))
    ),
    Claim(
        "needle-tuned",
        "At half of the bytes every policy that scores by attention leads over random eviction by more on the recall "
        "task than on counting",
        paper="as above",
        measure=measures.needle_tuned,
        holds=lambda measured: measured.low > 0,
        source="a thread of kvpress",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------

SETTINGS = ("part", "length", "condition", "method", "budget")


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over the models, and the standard error of the accuracy; depth 1 is the oldest part of the places. Of a
    prompt, rehearsed pairs are those that it asks for, or would."""
    depths = [
        ((pl.col(f"rehearsed_{part}").mean() + pl.col(f"unrehearsed_{part}").mean()) / 2).alias(f"depth {part}")
        for part in range(1, DEPTHS + 1)
    ]
    return (
        rows.with_columns(pl.col(name).cast(pl.Float64) for name in MEASURED)
        .group_by(SETTINGS, maintain_order=True)
        .agg(
            pl.col("bytes_per_token").first().alias("bytes/token"),
            pl.col("tokens_kept").mean().alias("tokens kept"),
            pl.col("rehearsed").mean(),
            pl.col("unrehearsed").mean(),
            pl.col("accuracy").mean(),
            (pl.col("accuracy").std() / pl.len().sqrt()).alias("standard error"),
            *depths,
        )
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Above, accuracy by depth (oldest first) and budget, a map for every policy, length and kind of pair; below,
    prompts with and without questions, and counting, against budget."""
    rows = rows.with_columns(pl.col(name).cast(pl.Float64) for name in MEASURED)
    grid = rows.filter(pl.col("part") == "grid", pl.col("budget").is_not_null())
    methods = grid["method"].unique(maintain_order=True).to_list()
    lines = list(itertools.product(grid["length"].unique(maintain_order=True), KINDS))
    columns = max(3, len(methods))
    drawing, axes = new_figure(columns, len(lines) + 1, width=2.35 * columns, height=2.1 * len(lines) + 4.4,
                               height_ratios=[*[2.1] * len(lines), 3.6])  # fmt: skip
    maps = [axes[line * columns : (line + 1) * columns] for line in range(len(lines))]
    shown = None
    for (length, kind), row in zip(lines, maps, strict=True):
        for ax, method in itertools.zip_longest(row, methods):
            if method is None:
                ax.remove()
                continue
            part = grid.filter(pl.col("length") == length, pl.col("method") == method)
            shown = _draw_map(ax, part, int(length), kind)
            ax.set_title(method if row is maps[0] else "")
        row[0].set_ylabel(f"{length} tokens, {kind}\nplaces of pairs")
    if shown is not None:
        drawing.colorbar(shown, ax=[ax for row in maps for ax in row[: len(methods)]], label="accuracy", pad=0.01)
    for ax in axes[-columns:]:
        ax.remove()
    below = axes[0].get_gridspec()
    assert below is not None
    wide = drawing.add_subfigure(below[-1, :]).subplots(1, 3)
    prompt = rows.filter(pl.col("part") == "prompt")
    _draw_prompt(wide[0], prompt, "rehearsed", "prompt: pairs it asked for")
    _draw_prompt(wide[1], prompt, "unrehearsed", "prompt: the second turn's pairs")
    _draw_counting(wide[2], rows.filter(pl.col("part") == "aggregation"))
    for ax in wide[1:]:
        ax.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return drawing


def _draw_map(ax: Axes, rows: pl.DataFrame, length: int, kind: str) -> AxesImage:
    """Depth against budget, with the numbers."""
    budgets = rows["budget"].unique().sort().to_list()
    columns = [f"{kind}_{part}" for part in range(1, DEPTHS + 1)]
    means = rows.group_by("budget").agg(pl.col(columns).mean()).sort("budget").select(columns).to_numpy().T
    shown = ax.imshow(means, vmin=0, vmax=1, aspect="auto")
    for (depth, place), value in np.ndenumerate(means):
        ax.text(place, depth, f"{100 * value:.0f}", ha="center", va="center", fontsize="x-small",
                color="white" if value < 0.6 else "black")  # fmt: skip
    ax.grid(visible=False)
    ax.set_xticks(range(len(budgets)), [f"1/{budget}" for budget in budgets])
    first = [1, *(last_place(length, part) + 1 for part in range(1, DEPTHS))]
    ax.set_yticks(range(DEPTHS), [f"{place}..." for place in first])
    return shown


def _draw_budgets(ax: Axes, rows: pl.DataFrame, column: str, label: str, **style: Any) -> Line2D:
    points = (
        rows.group_by("budget")
        .agg(pl.col(column).mean(), (pl.col(column).std() / pl.len().sqrt()).alias("error"))
        .sort("budget")
    )
    return ax.errorbar(1 / points["budget"], points[column], points["error"], label=label, **style)[0]


def _frame(ax: Axes, rows: pl.DataFrame, column: str, title: str) -> None:
    """What the panels below share: the exact cache as a line, and budgets on the axis."""
    exact = rows.filter(pl.col("method") == "full")[column].mean()
    if isinstance(exact, float):
        ax.axhline(exact, color="black", linewidth=0.8)
    budgets = rows["budget"].drop_nulls().unique().sort(descending=True).to_list()
    ax.set_xscale("log")
    ax.set_xticks([1 / budget for budget in budgets], [f"1/{budget}" for budget in budgets])
    ax.minorticks_off()
    ax.set(xlabel="bytes, share of the exact cache's", ylabel="accuracy", title=title, ylim=(0, 1.05))


def _draw_prompt(ax: Axes, rows: pl.DataFrame, kind: str, title: str) -> None:
    _frame(ax, rows, kind, title)
    dropping = rows.filter(pl.col("budget").is_not_null())
    for method in dropping["method"].unique(maintain_order=True):
        style: dict[str, Any] = {}
        for condition, dashes in zip(CONDITIONS, ("-", "--"), strict=True):
            part = dropping.filter(pl.col("method") == method, pl.col("condition") == condition)
            drawn = _draw_budgets(ax, part, kind, f"{method}, {condition}", linestyle=dashes, **style)
            style = {"color": drawn.get_color(), "marker": drawn.get_marker()}


def _draw_counting(ax: Axes, rows: pl.DataFrame) -> None:
    _frame(ax, rows, "accuracy", "counting, token by token")
    dropping = rows.filter(pl.col("budget").is_not_null())
    for method in dropping["method"].unique(maintain_order=True):
        _draw_budgets(ax, dropping.filter(pl.col("method") == method), "accuracy", method)
