"""SketchTune adapts a model in few bits by its tables alone, against adapters of as many floats and of as many bytes.

    python -m experiments run weights.sketch_tune      # about 20 minutes on 2 cores, once the models f1 are there

f1, a language model of WikiText-2, is sketched at 4, 3 and 2 bits with 1 or 4 tables a row, and adapted to tiny
Shakespeare: the same 300 batches of 8 pieces of 64 bytes for every contender, a learning rate of its own, chosen in
75 steps on validation text. ``full`` trains all weights of the dense model, ``kernels`` those of its layers' kernels,
``lora`` adapters beside it. ``qlora`` trains adapters beside an even grid of one scale a row, with as many floats as
one table a row has or the next rank more, ``qlora_bytes`` with what the sketch's bytes leave. ``frozen`` has those
adapters beside the sketch, whose tables stay. Controls tune the tables of another grid: ``rtn``, an even one, and
``kmeans``, k-means that knows no Hessian and no feedback. (The paper's QLoRA has 4 bits of NF4 in groups of 64; an
even grid of a row is the base here, so that there is one for 2 and 3 bits, too.) Part ``grid`` scores grids before
any tuning; its loss on WikiText-2 says what rounding costs.

Bytes are of the kernels of the layers, with their codes, grids and adapters, floats in 16 bits, and what is scored is
rounded to these; embedding, head and norms are the same for all, but for ``full``, which trains them, too. The
paper's models are LLaMA of 7 to 13 B and its tasks are questions: only the order of the methods can be compared.
"""

import functools
from collections.abc import Iterator
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from experiments.kvcache import fixtures
from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    Trial,
    highest,
    mean_interval,
    new_figure,
    paired_difference,
)
from experiments.weights.sketch_tune_cells import DENSE, Cell, Config, cells, scores

PAPER = (
    "Zhang, Su, Desai, Wu, Xu, Shrivastava: SpaLLM, arXiv 2410.06364; published as Sketch to Adapt: Fine-Tunable "
    "Sketches for Efficient LLM Adaptation (SketchTune), ICML 2025"
)
SYSTEM = "hashml.weights.sketch_tune"
SCALES = {
    "tiny": Config(bits=(2,), groups=(1,), control_bits=(2,), dense=("full", "lora"), steps=2, search_steps=1,
                   batch_size=2, sequence=16, scored=4, table_rates=(1e-3,), adapter_rates=(1e-3,),
                   full_rates=(1e-3, 3e-3), seeds=2, size=fixtures.TINY),
    "default": Config(),
    "paper": Config(steps=2000, search_steps=500, batch_size=32, sequence=128, seeds=5),
}  # fmt: skip

TITLES = {
    "full": "all weights",
    "kernels": "all weights of kernels",
    "lora": "LoRA, dense base",
    "sketch": "SketchTune",
    "qlora": "QLoRA, equal floats",
    "qlora_bytes": "QLoRA, equal bytes",
    "frozen": "LoRA, frozen sketch",
    "rtn": "tables of an even grid",
    "kmeans": "tables of plain k-means",
}


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config):
        for seed in range(config.seeds):
            yield Trial(_key(cell, seed), functools.partial(scores, config, cell, seed))


def _key(cell: Cell, seed: int) -> dict[str, Any]:
    return {"part": cell.part, "method": cell.method, "bits": cell.bits, "groups": cell.groups, "seed": seed}


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return config.seeds * len(cells(config))


# --- claims -------------------------------------------------------------------------------------------


def _losses(rows: pl.DataFrame, part: str, method: str, bits: int | None, groups: int | None = 1) -> pl.DataFrame:
    groups = None if bits is None else groups
    same = [pl.col(name).is_null() if value is None else pl.col(name).eq(value)
            for name, value in (("bits", bits), ("groups", groups))]  # fmt: skip
    found = rows.filter(pl.col("part").eq(part), pl.col("method").eq(method), *same)
    if found.is_empty():
        raise NotEnoughRows(f"no rows of {method}, bits {bits}, groups {groups}")
    return found.with_columns(pl.lit(f"{method}/{groups}").alias("contender"))


def difference(
    rows: pl.DataFrame,
    rival: str,
    bits: tuple[int, ...],
    *,
    groups: int = 1,
    part: str = "tuned",
    metric: str = "nll",
    of: str = "sketch",
    rival_groups: int = 1,
) -> Measured:
    """Loss of a method less its rival's in nats, paired by model, at the bits where it is highest."""
    found = []
    for each in bits:
        mine = _losses(rows, part, of, each, groups)
        other = _losses(rows, part, rival, None if rival in DENSE else each, rival_groups)
        measured = paired_difference(
            pl.concat([mine, other]), mine["contender"][0], other["contender"][0], metric, "seed", by="contender"
        )
        note = measured.note if len(bits) == 1 else f"worst: {each} bits, {measured.note}"
        found.append(Measured(measured.value, measured.low, measured.high, note))
    return highest(found)


def _bytes(rows: pl.DataFrame, bits: tuple[int, ...]) -> Measured:
    """Bytes of QLoRA over those of the sketch, where it gets most."""
    found = []
    for each in bits:
        mine, other = (
            _losses(rows, "tuned", method, each)["kernel_bytes"][0] for method in ("sketch", "qlora_bytes")
        )
        found.append(Measured(other / mine, other / mine, other / mine, f"most: {each} bits, counted"))
    return highest(found)


def _rounding(rows: pl.DataFrame, method: str, bits: int) -> Measured:
    """What a grid adds to the loss on the text of the base."""
    part = pl.concat([_losses(rows, "grid", method, bits), _losses(rows, "grid", "dense", None)])
    values = part.pivot("method", index="seed", values="base_nll")
    return mean_interval(values[method] - values["dense"], "models")


BITS, FEW = (4, 3, 2), (3, 2)
CLAIMS = (
    Claim(
        "sketch-rtn",
        "Before any tuning the sketch has less loss than round-to-nearest on an even grid, at 4, 3 and 2 bits",
        paper="none; relative errors of outputs .134, .038, .0145 against .583, .112, .026 in an earlier study",
        measure=functools.partial(difference, rival="rtn", bits=BITS, part="grid", metric="base_nll"),
        holds=lambda measured: measured.high < 0,
        source="reproduction",
        unit="nats",
    ),
    Claim(
        "gap-2",
        "And round-to-nearest loses more than half a nat at 2 bits",
        paper="none; the gap is large at 2 bits in an earlier study",
        measure=functools.partial(_rounding, method="rtn", bits=2),
        holds=lambda measured: measured.low > 0.5,
        source="reproduction",
        unit="nats",
    ),
    Claim(
        "qlora-floats",
        "At 3 and 2 bits SketchTune ends at or below QLoRA with at least as many trained floats",
        paper="better accuracy for its size than QLoRA and its kind",
        measure=functools.partial(difference, rival="qlora", bits=FEW),
        holds=lambda measured: measured.high <= 0,
        unit="nats",
    ),
    Claim(
        "qlora-bytes",
        "And at or below QLoRA within as many stored bytes",
        paper="better accuracy for its size than QLoRA and its kind",
        measure=functools.partial(difference, rival="qlora_bytes", bits=FEW),
        holds=lambda measured: measured.high <= 0,
        unit="nats",
    ),
    Claim(
        "equal-bytes",
        "Where bytes are said to be equal, QLoRA takes between 0.9 of the sketch's and all of them",
        paper="none",
        measure=functools.partial(_bytes, bits=FEW),
        holds=lambda measured: 0.9 < measured.value <= 1,
        source="fairness of the comparison",
    ),
    Claim(
        "full",
        "At 4 bits with 4 tables a row it ends within 0.03 nats of tuning all weights of the dense model",
        paper="commonsense 87.0 against 83.6, mathematics 79.3 against 77.7 (Llama-3-8B): above it",
        measure=functools.partial(difference, rival="full", bits=(4,), groups=4),
        holds=lambda measured: measured.high < 0.03,
        source="tables of the repository",
        unit="nats",
    ),
    Claim(
        "lora",
        "At 4 bits it ends at or below LoRA beside the dense model with at least as many trained floats",
        paper="78.2 against 77.2 in mathematics, 22.0 M floats trained (Llama-3-8B)",
        measure=functools.partial(difference, rival="lora", bits=(4,)),
        holds=lambda measured: measured.high <= 0,
        source="tables of the repository",
        unit="nats",
    ),
    Claim(
        "frozen",
        "At 4, 3 and 2 bits it ends below adapters of at least as many floats beside the same tables, which stay",
        paper="no second tower and no low rank are needed",
        measure=functools.partial(difference, rival="frozen", bits=BITS),
        holds=lambda measured: measured.high < 0,
        unit="nats",
    ),
    Claim(
        "even-grid",
        "At 3 and 2 bits tuned tables of the sketch end below tuned tables of an even grid",
        paper="learned sketching preserves the model",
        measure=functools.partial(difference, rival="rtn", bits=FEW),
        holds=lambda measured: measured.high < 0,
        source="section 3",
        unit="nats",
    ),
    Claim(
        "plain-k-means",
        "And below tuned tables of k-means without Hessian and feedback",
        paper="weighted by the Hessian",
        measure=functools.partial(difference, rival="kmeans", bits=FEW),
        holds=lambda measured: measured.high < 0,
        source="section 3",
        unit="nats",
    ),
    Claim(
        "groups",
        "Four tables a row end below one, at 4, 3 and 2 bits",
        paper="mathematics 78.2, 78.6, 79.3, 79.9 with 1, 2, 4, 8 (Llama-3-8B)",
        measure=functools.partial(difference, rival="sketch", bits=BITS, groups=4),
        holds=lambda measured: measured.high < 0,
        source="tables of the repository",
        unit="nats",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Losses, means over models; the standard error is of the loss over that of tuning all weights, or of the dense
    model before tuning."""
    best = pl.col("nll").filter(pl.col("method").is_in(["full", "dense"])).first().over("part", "seed")
    return (
        rows.with_columns((pl.col("nll") - best).alias("over"))
        .group_by("part", "method", "bits", "groups", maintain_order=True)
        .agg(
            pl.col("trained_floats").first().alias("trained floats"),
            pl.col("rank").first(),
            pl.col("kernel_bytes").first().alias("bytes of kernels"),
            pl.col("learning_rate").first().alias("learning rate"),
            pl.col("at_the_edge").first().alias("at the grid's edge"),
            pl.col("base_nll").mean().alias("WikiText-2"),
            pl.col("nll").mean().alias("tiny Shakespeare"),
            pl.col("over").mean().alias("over the best"),
            (pl.col("over").std() / pl.len().sqrt()).alias("standard error"),
        )
    )


def figure(rows: pl.DataFrame) -> Figure:
    """After tuning: loss over full tuning against bytes, and by bits. Before: what grids cost on WikiText-2."""
    drawing, axes = new_figure(3, width=14.4, height=4.4)
    best = pl.col("nll").filter(pl.col("method") == "full").first().over("seed")
    tuned = rows.filter(pl.col("part") == "tuned").with_columns((pl.col("nll") - best).alias("over"))
    contenders = [(method, groups) for method, groups in
                  tuned.select("method", "groups").unique(maintain_order=True).iter_rows()]  # fmt: skip
    for place, (method, groups) in enumerate(contenders):
        own = tuned.filter(pl.col("method").eq(method), pl.col("groups").eq_missing(groups))
        label = TITLES[method] + (f", {groups} tables" if method == "sketch" and groups != 1 else "")
        style: dict[str, Any] = {"label": label, "color": f"C{place % 8}", "marker": "os^DvPX*"[place % 8],
                                 "linestyle": "-" if place < 8 else "--"}  # fmt: skip
        _line(axes[0], own, "kernel_bytes", "over", style)
        if groups is not None:
            _line(axes[1], own, "bits", "over", style)
    axes[0].set(xscale="log", xlabel="bytes of the layers' kernels", ylabel="nats over tuning all weights")
    axes[0].set_title("Adapted to tiny Shakespeare", loc="left")
    axes[0].legend(fontsize="x-small")
    axes[1].set(xlabel="bits of a code", ylabel="nats over tuning all weights")
    axes[1].set_title("The same by bits", loc="left")
    dense = pl.col("base_nll").filter(pl.col("method") == "dense").first().over("seed")
    grids = rows.filter(pl.col("part") == "grid").with_columns((pl.col("base_nll") - dense).alias("over"))
    for (method, groups), own in grids.drop_nulls("bits").group_by("method", "groups", maintain_order=True):
        label = {"rtn": "even grid, nearest", "kmeans": "k-means, nearest"}.get(
            str(method), f"sketch, {groups} a row"
        )
        _line(axes[2], own, "bits", "over", {"label": label})
    axes[2].set(yscale="log", xlabel="bits of a code", ylabel="nats over the dense model, WikiText-2")
    axes[2].set_title("Before any tuning", loc="left")
    axes[2].legend(fontsize="x-small")
    for ax in axes[1:]:
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.set_xticks(sorted(set(rows["bits"].drop_nulls())))
    return drawing


def _line(ax: Axes, rows: pl.DataFrame, x: str, y: str, style: dict[str, Any]) -> None:
    """Means over models and a standard error either way."""
    points = rows.group_by(x).agg(pl.col(y).mean(), (pl.col(y).std() / pl.len().sqrt()).alias("error")).sort(x)
    ax.errorbar(points[x], points[y], points["error"].fill_null(0), **style)
