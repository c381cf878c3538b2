"""ThinK: do the queries tell which channels of the keys can go, better than the keys alone, and than chance?

    python -m experiments run kvcache.think       # about 3 minutes on 2 cores, once models are there

Half of a text (``f1``, held-out WikiText-2) or the text before the first question (``recall``) is a prompt, whose own
attention is exact. Then a part of the channels of its keys is dropped, once, by the last 32 queries and the keys, by
the keys' norms alone, or at random; tokens that follow lose theirs as they leave the window. Measured are the error
of the logits of later queries, ``||Q K^T - Q_S K_S^T|| / ||Q K^T||``, with queries and keys of the exact model, and
the loss of what follows, or accuracy and loss of the answers.

ThinK saves bytes behind other caches, too: it is put behind INT4 and KIVI, and behind SnapKV in equal bytes of the
prompt, where a thinner token leaves room for others. Of a head's 32 channels .4 are 12, so that keys and values
together keep 13/16 of their bytes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np
import polars as pl
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.kvcache import fixtures
from experiments.kvcache.think_cells import TOGETHER, Cell, Choice, Config, cells, scores
from experiments.lab import Claim, Measured, NotEnoughRows, Trial, highest, lowest, mean_interval, new_figure

PAPER = (
    "Xu, Jie, Dong, Wang, Lu, Zhou, Saha, Xiong, Sahoo: ThinK: Thinner Key Cache by Query-Driven Pruning, ICLR 2025, "
    "arXiv 2407.21018"
)
SYSTEM = "hashml.kvcache.think"

SCALES = {
    "tiny": Config(models=("f1",), dropped=(0.4,), choices=("random",), quantised=(), budgets=(2,), seeds=2,
                   size=fixtures.TINY),
    "default": Config(),
    "paper": Config(models=("f1", "f1_relu_gqa", "recall"), seeds=5, size=fixtures.PAPER),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config):
        for seed in range(config.seeds):
            yield Trial({**dataclasses.asdict(cell), "seed": seed}, functools.partial(_seed, config, cell, seed))


def _seed(config: Config, cell: Cell, seed: int) -> dict[str, float | int | None]:
    return scores(config, cell)[seed]


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return config.seeds * len(cells(config))


# --- claims -------------------------------------------------------------------------------------------

PARTS = Config().dropped


def _of(
    rows: pl.DataFrame, metric: str, fixture: str, method: str, choice: Choice | None = None,
    dropped: float | None = None, budget: int | None = None,
) -> Float[np.ndarray, " seeds"]:  # fmt: skip
    """The metric of a cache, seed by seed."""
    wanted = {"fixture": fixture, "method": method, "choice": choice, "dropped": dropped, "budget": budget}
    found = rows.filter([pl.col(name).eq_missing(pl.lit(value)) for name, value in wanted.items()]).sort("seed")
    if found.is_empty():
        raise NotEnoughRows(f"no rows with {', '.join(f'{name} {value}' for name, value in wanted.items())}")
    return found[metric].to_numpy()


def _choices(rows: pl.DataFrame, metric: str, a: Choice, b: Choice, parts: tuple[float, ...] = (0.4,)) -> Measured:
    """The metric with channels chosen by a over that with b, less 1: at the part dropped where a stands worst."""
    found = []
    for part in parts:
        first, second = (_of(rows, metric, "f1", "think", choice, part) for choice in (a, b))
        cell = mean_interval(first / second - 1, "models")
        found.append(Measured(cell.value, cell.low, cell.high, f"at {part:g} of the channels, {cell.note}"))
    return highest(found)


def _excess(rows: pl.DataFrame, dropped: float) -> Measured:
    """Loss of ThinK over that of the exact cache, less 1."""
    thin = _of(rows, "nll", "f1", "think", "queries", dropped)
    return mean_interval(thin / _of(rows, "nll", "f1", "full") - 1, "models")


def _behind(rows: pl.DataFrame, methods: tuple[str, ...], budgets: tuple[int | None, ...] = (None,)) -> Measured:
    """By how much ThinK behind another cache raises its loss, where it does so most."""
    found = []
    for method, budget in itertools.product(methods, budgets):
        alone = _of(rows, "nll", "f1", method, budget=budget)
        excess = _of(rows, "nll", "f1", f"{method}+think", "queries", TOGETHER, budget) / alone - 1
        cell = mean_interval(excess, "models")
        where = method if budget is None else f"{method} at 1/{budget}"
        more = f"{int((excess > 0).sum())} of {len(excess)} models lose"
        found.append(Measured(cell.value, cell.low, cell.high, f"worst: {where}, {more}"))
    return highest(found)


def _not_losing(rows: pl.DataFrame, budgets: tuple[int, ...]) -> Measured:
    """Models on which SnapKV with ThinK in equal bytes has no more loss than SnapKV, at the budget with fewest."""
    found = []
    for budget in budgets:
        alone = _of(rows, "nll", "f1", "snapkv", budget=budget)
        wins = int((_of(rows, "nll", "f1", "snapkv+think", "queries", TOGETHER, budget) <= alone).sum())
        found.append(Measured(wins, wins, wins, f"of {len(alone)}, at 1/{budget}"))
    return lowest(found)


def _recall_in_equal_bytes(rows: pl.DataFrame, budgets: tuple[int, ...]) -> Measured:
    """Accuracy of SnapKV with ThinK less that of SnapKV in equal bytes, where it is least."""
    found = []
    for budget in budgets:
        alone = _of(rows, "accuracy", "recall", "snapkv", budget=budget)
        cell = mean_interval(_of(rows, "accuracy", "recall", "snapkv+think", "queries", TOGETHER, budget) - alone)
        found.append(Measured(cell.value, cell.low, cell.high, f"least: 1/{budget}, {cell.note}"))
    return lowest(found)


def _saved(rows: pl.DataFrame, dropped: float) -> Measured:
    """Part of all bytes of a cache of the whole sequence that is saved."""
    thin = _of(rows, "bytes_per_token", "f1", "think", "queries", dropped)
    return mean_interval(1 - thin / _of(rows, "bytes_per_token", "f1", "full"), "models")


def _answers(rows: pl.DataFrame, control: Choice | None) -> Measured:
    """Accuracy of the recall model's answers with ThinK, less that with a control, or with the exact cache."""
    thin = _of(rows, "accuracy", "recall", "think", "queries", TOGETHER)
    rival, dropped = ("full", None) if control is None else ("think", TOGETHER)
    return mean_interval(thin - _of(rows, "accuracy", "recall", rival, control, dropped), "models")


def _below(measured: Measured) -> bool:
    return measured.high < 0


def _choice_claims() -> Iterator[Claim]:
    """Queries before keys before chance, in the error and in the loss."""
    pairs: tuple[tuple[Choice, Choice], ...] = (("queries", "keys"), ("keys", "random"), ("queries", "random"))
    what = {
        "logit_error": ("error", "the error of later queries' logits"),
        "nll": ("loss", "the loss of what follows"),
    }
    for metric, (short, said) in what.items():
        for a, b in pairs:
            chosen = {"queries": "Channels chosen by queries and keys", "keys": "Channels chosen by key norms"}[a]
            rival = {"keys": "those chosen by key norms", "random": "random ones"}[b]
            yield Claim(
                f"{short}-{a}-{b}",
                f"{chosen} lower {said} against {rival}, at .4 dropped",
                paper="query-driven channels beat those of L1 or L2 norm" if b == "keys" else "none; trivial control",
                measure=functools.partial(_choices, metric=metric, a=a, b=b),
                holds=_below,
                source="ablation" if b == "keys" else "reproduction",
            )


CLAIMS = (
    *_choice_claims(),
    Claim(
        "error-random-everywhere",
        "Queries and keys choose with less error than chance at every part dropped, .2 to .6",
        paper="none; trivial control",
        measure=functools.partial(_choices, metric="logit_error", a="queries", b="random", parts=PARTS),
        holds=_below,
        source="reproduction",
    ),
    Claim(
        "loss-random-everywhere",
        "And with less loss than chance, too",
        paper="none; trivial control",
        measure=functools.partial(_choices, metric="nll", a="queries", b="random", parts=PARTS),
        holds=_below,
        source="reproduction",
    ),
    Claim(
        "loss-40",
        "Keys without .4 of their channels raise the loss by less than 2 %",
        paper="the mean over LongBench is kept at .4",
        measure=functools.partial(_excess, dropped=0.4),
        holds=lambda measured: measured.high < 0.02,
    ),
    Claim(
        "loss-50",
        "And without half of them",
        paper="RULER at .5 with Llama-3-8B: 96.8 to 99.6 on needles, cwe 98.96, qa_2 59.4",
        measure=functools.partial(_excess, dropped=0.5),
        holds=lambda measured: measured.high < 0.02,
        source="the authors' repository",
    ),
    Claim(
        "memory-40",
        "Without .4 of the channels of the keys all bytes fall by more than 20 %",
        paper="over 20 % less memory than eviction or quantisation alone",
        measure=functools.partial(_saved, dropped=0.4),
        holds=lambda measured: measured.low > 0.2,
    ),
    Claim(
        "memory",
        "Half of the channels are more than 20 % of all bytes, with the window, positions and channels' names",
        paper="over 20 % less memory than eviction or quantisation alone",
        measure=functools.partial(_saved, dropped=0.5),
        holds=lambda measured: measured.low > 0.2,
    ),
    Claim(
        "equal-bytes",
        "In equal bytes of the prompt, 1/2 and 1/4 of the exact cache's, SnapKV with ThinK and more tokens has less "
        "than 1 % more loss than SnapKV",
        paper="the mean over LongBench is kept with SnapKV and 20 % less memory",
        measure=functools.partial(_behind, methods=("snapkv",), budgets=(2, 4)),
        holds=lambda measured: measured.high < 0.01,
    ),
    Claim(
        "equal-bytes-some",
        "And at neither of the two it loses to SnapKV on every model",
        paper="the mean over LongBench is kept with SnapKV and 20 % less memory",
        measure=functools.partial(_not_losing, budgets=(2, 4)),
        holds=lambda measured: measured.value >= 1,
        source="reproduction",
        unit="models",
    ),
    Claim(
        "equal-bytes-recall",
        "There it recalls at most 2 % less than SnapKV alone",
        paper="the mean over LongBench is kept with SnapKV and 20 % less memory",
        measure=functools.partial(_recall_in_equal_bytes, budgets=(2, 4)),
        holds=lambda measured: measured.low > -0.02,
    ),
    Claim(
        "quantised",
        "Behind INT4 and KIVI-2, ThinK raises their loss by less than 2 %",
        paper="with KIVI 2.8x less peak memory at equal quality",
        measure=functools.partial(_behind, methods=("int4", "kivi:2")),
        holds=lambda measured: measured.high < 0.02,
    ),
    Claim(
        "recall-40",
        "Without .4 of the channels the recall model answers at most 2 % less",
        paper="needles are found at .5",
        measure=functools.partial(_answers, control=None),
        holds=lambda measured: measured.low > -0.02,
        source="the authors' repository",
    ),
    Claim(
        "recall-random",
        "It answers more than without random ones",
        paper="none; trivial control",
        measure=functools.partial(_answers, control="random"),
        holds=lambda measured: measured.low > 0,
        source="reproduction",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------

CHOSEN = {"queries": "queries and keys (ThinK)", "keys": "norms of keys", "random": "random"}


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Quality, mean over the models and its standard error, beside bytes."""
    quality = pl.coalesce("nll", "accuracy")
    return rows.group_by("fixture", "method", "choice", "dropped", "budget", maintain_order=True).agg(
        pl.col("bytes_per_token").first().alias("bytes/token"),
        pl.col("prompt_bytes").first().alias("bytes of the prompt"),
        pl.col("prompt_slots").first().alias("prompt slots"),
        pl.col("logit_error").mean(),
        pl.col("nll").mean(),
        pl.col("accuracy").mean(),
        pl.col("answer_nll").mean(),
        (quality.std() / pl.len().sqrt()).alias("standard error"),
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Error and loss against the part dropped, by what chooses; loss against bytes."""
    drawing, axes = new_figure(2, 2, width=12, height=9)
    thin = rows.filter(pl.col("method").is_in(["think", "full"]))
    _by_choice(axes[0], thin.filter(pl.col("fixture") == "f1"), "logit_error", "relative error of later logits", "f1")
    _by_choice(axes[1], thin.filter(pl.col("fixture") == "f1"), "nll", "loss after the prompt, nats a byte", "f1")
    recall = thin.filter(pl.col("fixture") == "recall")
    _by_choice(axes[2], recall, "accuracy", "accuracy, final questions", "recall")
    controls = pl.col("choice").is_in(["keys", "random"]).fill_null(False)
    _against_bytes(axes[3], rows.filter(pl.col("fixture").eq("f1") & ~controls))
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="x-small")
        else:
            ax.set_visible(False)  # a run may leave out a model
    return drawing


def _by_choice(ax: Axes, rows: pl.DataFrame, metric: str, label: str, title: str) -> None:
    for choice in rows["choice"].drop_nulls().unique(maintain_order=True):
        _line(ax, rows.filter(pl.col("choice") == choice), "dropped", metric, CHOSEN[choice], "o-")
    full = rows.filter(pl.col("method") == "full")[metric].drop_nulls()
    if len(full):
        ax.axhline(float(full.to_numpy().mean()), color="0.6", linewidth=0.8, label="exact cache")
    ax.set(xlabel="part of the key channels dropped", ylabel=label, title=title)


def _against_bytes(ax: Axes, rows: pl.DataFrame) -> None:
    for method in rows["method"].unique(maintain_order=True):
        style = {"full": "k*", "think": "o-"}.get(method, "^-" if method.endswith("think") else "s--")
        _line(ax, rows.filter(pl.col("method") == method), "bytes_per_token", "nll", method, style)
    ax.set(xscale="log", xlabel="bytes of cache for each token seen", ylabel="loss after the prompt, nats a byte",
           title="f1, loss against bytes")  # fmt: skip


def _line(ax: Axes, rows: pl.DataFrame, x: str, y: str, label: str, style: str) -> None:
    """Means over models with their standard errors."""
    points = rows.group_by(x).agg(pl.col(y).mean(), (pl.col(y).std() / pl.len().sqrt()).alias("error")).sort(x)
    if not points.is_empty():
        ax.errorbar(points[x], points[y], points["error"], fmt=style, label=label)
