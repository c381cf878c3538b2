"""KIVI and KVQuant: along which axis keys and values are quantised, and what exact outliers are worth.

    python -m experiments run kvcache.kivi      # about 5 minutes on 2 cores, once models and codebooks are there;
                                                # 10 more without these

Every token goes through the cache and is coded when it leaves the window; loss is that of the tokens after the middle
of 256. Four questions:

**Axes.** Keys per channel and values per token (KIVI), both per token, both per channel, and the two swapped, in
blocks of 32 values with a scale and a minimum, so that all store the same bytes; window and flush are 32 for all. On
``f1`` (held-out WikiText-2); on stories260K, on stories that it tells itself, whose heads have 8 channels, so that
blocks are of 8 and scales outweigh codes; and on ``planted``, which is f1 with 4 of 32 key channels of each head ten
times as large and the queries' a tenth: the same function, with keys as unbalanced as in large models. Beside them
Gaussian tensors of 16 channels in blocks of 16, two of which are ten times as large (scaled) or lie ten deviations
off zero (shifted), or none.

**Residual.** The paper's keys leave the window all at once (flush G = window R) and its values one by one; in the
library both leave in blocks of G. KIVI's 2 bits with R of 32, 64 and 128, G = 32 and G = R; bytes count the window.

**Outliers.** KVQuant's non-uniform codes of single channels at 3, 2 and 1 bits, without and with an exact outlier for
each token and head, every token coded at once as CQ does. A head has 32 channels here, so that one outlier is 3 % of
the values, not the paper's 1 %, and costs .75 bits; the ranges of values cost another .5. ``bits`` count all of it.
Also without Fisher weights, and with keys coded after rotation. (CQ against the codes without outliers is judged in
``kvcache.coupled``.)

**Lloyd.** Codebooks of CQ after the 10 iterations of k-means that all experiments with a cache take, and after 100.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.kvcache import fixtures
from experiments.kvcache.coupled_cells import TENSORS
from experiments.kvcache.kivi_cells import PLANTED, Cell, Config, cells, scores, tensor_scores
from experiments.kvcache.kivi_claims import CLAIMS as CLAIMS
from experiments.lab import Trial, new_figure

PAPER = (
    "Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, "
    "ICML 2024, arXiv 2402.02750; Hooper, Kim, Mohammadzadeh, Mahoney, Shao, Keutzer, Gholami: KVQuant, "
    "NeurIPS 2024, arXiv 2401.18079"
)
SYSTEM = "hashml.kvcache.kivi"

SCALES = {
    "tiny": Config(models=("f1", PLANTED), axes=("kivi",), bits=(2,), group=8, window=8, windows=(16,),
                   nonuniform=("kvquant:1o1",), uniform=(), rotated=("kvquant:1",), beside=(), windowed=(),
                   lloyd_methods=(), correlations=(0.9,), tensor_rows=64, tensor_seeds=2, seeds=2,
                   size=fixtures.TINY),
    "default": Config(),
    "paper": Config(other_lloyd=10, seeds=5, size=fixtures.PAPER),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config):
        for seed in range(_seeds(config, cell)):
            measure = tensor_scores if cell.fixture == TENSORS else _model_scores
            yield Trial({**dataclasses.asdict(cell), "seed": seed}, functools.partial(measure, config, cell, seed))


def _seeds(config: Config, cell: Cell) -> int:
    return config.tensor_seeds if cell.fixture == TENSORS else config.seeds


def _model_scores(config: Config, cell: Cell, seed: int) -> dict[str, float | int | None]:
    return scores(config, cell)[seed]


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return sum(_seeds(config, cell) for cell in cells(config))


# --- what is shown ------------------------------------------------------------------------------------

_KEY = [field.name for field in dataclasses.fields(Cell)]
_NAMES = {
    "kivi": "K per channel, V per token (KIVI)",
    "token": "both per token",
    "channel": "both per channel",
    "swapped": "K per token, V per channel",
}
_EXCESS = "loss over the exact cache's, less 1"


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Loss or error, mean over models or tensors, beside bits and bytes. The standard error is of the loss over the
    exact cache's, or of the error in units of variances."""
    rows = _with_excess(rows)
    main = pl.coalesce("excess", "error")
    return rows.group_by(*_KEY, maintain_order=True).agg(
        pl.col("bits").first(),
        pl.col("bytes_per_token").first().alias("bytes/token"),
        pl.col("table_bytes").first().alias("tables, once a model"),
        pl.col("nll").mean(),
        pl.col("excess").mean().alias("over exact"),
        pl.col("error").mean().alias("error, in variances"),
        pl.col("mse").mean(),
        (main.std() / pl.len().sqrt()).alias("standard error"),
    )


def _with_excess(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows with the loss over that of the same model's exact cache, less 1: models differ by more than caches."""
    full = pl.col("nll").filter(pl.col("method") == "full").first().over("fixture", "seed")
    return rows.with_columns(
        (pl.col("nll") / full - 1).alias("excess"),
        pl.col("method").str.extract(r"^([a-z]+)").alias("kind"),
        pl.col("method").str.extract(r":(\d+)").cast(pl.Int64).alias("code_bits"),
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Loss over the exact cache's by axes, by window and by bits, and errors of Gaussian tensors by axis."""
    drawing, panels = new_figure(2, 2, width=15, height=8.5)
    rows = _with_excess(rows)
    models = rows.filter(pl.col("fixture") != TENSORS)
    _axes_panel(panels[0], models)
    text = models.filter(pl.col("fixture") == "f1")
    _window_panel(panels[1], text)
    _bits_panel(panels[2], text)
    _tensor_panel(panels[3], rows.filter(pl.col("fixture") == TENSORS))
    for ax in panels:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(
                fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5)
            )  # beside the axes: off all points
        else:
            ax.set_visible(False)  # a run may leave out a model, or the tensors
    return drawing


def _points(rows: pl.DataFrame, x: str, y: str) -> pl.DataFrame:
    """Means over seeds with their standard errors."""
    return rows.group_by(x).agg(pl.col(y).mean(), (pl.col(y).std() / pl.len().sqrt()).alias("deviation")).sort(x)


def _line(ax: Axes, rows: pl.DataFrame, x: str, y: str, label: str, **style: Any) -> None:
    points = _points(rows, x, y)
    if not points.is_empty():
        ax.errorbar(points[x], points[y], points["deviation"], label=label, **style)


def _categories(ax: Axes, rows: pl.DataFrame, by: str, kinds: Iterable[str], y: str, names: dict[str, str]) -> None:
    """Points side by side: a colour a kind, filled at the fewest bits, open beyond."""
    places = {name: place for place, name in enumerate(rows[by].unique(maintain_order=True))}
    present = [kind for kind in kinds if kind in set(rows["kind"])]
    bits = sorted(set(rows["code_bits"].drop_nulls()))
    for (index, kind), code in itertools.product(enumerate(present), bits):
        part = rows.filter(pl.col("kind").eq(kind) & pl.col("code_bits").eq(code))
        shift = (index + bits.index(code) / (2 * len(bits)) - (len(present) - 0.5) / 2) / (len(present) + 1)
        part = part.with_columns((pl.col(by).replace_strict(places, return_dtype=pl.Float64) + shift).alias("place"))
        filled = {} if code == bits[0] else {"markerfacecolor": "white"}
        _line(ax, part, "place", y, f"{names[kind]}, {code} bits", linestyle="none", color=f"C{index}",
              marker="os^D"[index], **filled)  # fmt: skip
    ax.set_xticks(range(len(places)), labels=list(places))


def _near_zero(ax: Axes, rows: pl.DataFrame) -> None:
    """A log axis that has a zero, since the best codes are as good as the exact cache."""
    ax.set_yscale("symlog", linthresh=1e-3)
    most = rows["excess"].max()
    ax.set_ylim(-1e-3, 2 * most if isinstance(most, float) and most > 0 else None)


def _axes_panel(ax: Axes, rows: pl.DataFrame) -> None:
    rows = rows.filter(pl.col("kind").is_in(list(_NAMES)) & pl.col("window").eq(pl.col("flush")))
    rows = rows.filter(pl.col("window").eq(pl.col("window").filter(pl.col("kind") == "kivi").min()))
    _categories(ax, rows, "fixture", _NAMES, "excess", _NAMES)
    ax.set(ylabel=_EXCESS, title="axes of scales, equal bytes")
    _near_zero(ax, rows)


def _window_panel(ax: Axes, rows: pl.DataFrame) -> None:
    rows = rows.filter(pl.col("kind") == "kivi")
    rows = rows.filter(pl.col("code_bits") == pl.col("code_bits").min())
    block = rows["flush"].min()
    _line(ax, rows.filter(pl.col("flush") == block), "window", "excess", f"{block} leave together")
    _line(ax, rows.filter(pl.col("flush") == pl.col("window")), "window", "excess", "all leave together")
    ax.set_xticks(sorted(set(rows["window"])))
    ax.set(xlabel="exact tokens at most", ylabel=_EXCESS, title="KIVI's window on f1, fewest bits", ylim=(0, None))


def _bits_panel(ax: Axes, rows: pl.DataFrame) -> None:
    usual = pl.col("iterations").is_null() | pl.col("iterations").eq(
        pl.col("iterations").filter(pl.col("kind") == "kvquant").first()
    )
    least = pl.col("window").filter(pl.col("kind") == "kivi").min()
    rows = rows.filter(usual).with_columns((pl.col("window") == least).alias("behind"))
    plain = pl.col("kind").eq("kvquant") & pl.col("window").eq(0)
    fisher, outlier = pl.col("weights").eq("fisher"), pl.col("method").str.contains(r"o\d+$")
    for label, chosen, style in (
        ("KVQuant", plain & fisher & ~outlier & ~pl.col("rotated"), "C0o-"),
        ("with outliers", plain & fisher & outlier, "C0s--"),
        ("uniform weights", plain & ~fisher, "C5o:"),
        ("rotated keys", plain & pl.col("rotated"), "C3D:"),
        ("CQ 4c8b, 8c8b", pl.col("kind").eq("coupled"), "C1^-"),
        ("INT per token", pl.col("kind").eq("token") & pl.col("window").eq(0), "C2v"),
        ("KVQuant, window", pl.col("kind").eq("kvquant") & pl.col("behind"), "C0P"),
        ("KIVI, window", pl.col("kind").eq("kivi") & pl.col("behind"), "C4X"),
    ):
        _line(ax, rows.filter(chosen), "bits", "excess", label, fmt=style)
    ax.set(xlabel="bits of codes, scales and outliers for each value", ylabel=_EXCESS, title="codes on f1")
    _near_zero(ax, rows)


def _tensor_panel(ax: Axes, rows: pl.DataFrame) -> None:
    _categories(ax, rows, "outliers", ("channel", "token"), "error", {"channel": "per channel", "token": "per token"})
    ax.set(xlabel="outlier channels", ylabel="squared error a value, in its channel's variance", yscale="log",
           title="Gaussian tensors, all correlations")  # fmt: skip
