"""FAR trains a tenth of the units of each perceptron: what it costs in accuracy, and what it saves in bytes and time.

    python -m experiments run optim.far      # about 6 minutes on 2 cores

*Quality*: a small encoder, pretrained to say the other words of an AG News article, is fine-tuned to the classes of
other articles, with learners that a priming picks, with random and with large ones, all from the same primed weights;
beside it full fine-tuning, frozen perceptrons, BitFit and LoRA with as many trained parameters in a block, each at a
learning rate of its own and for as many steps. All train the tables of tokens along: a few thousand articles leave
many words unknown. ``scratch`` is the control of the pretraining. *Bytes*: compiled steps, at the default scale at
the sizes of DistilBERT with 16 sequences of 128 tokens, Adam included; the controls are full fine-tuning that
computes its activations, or its perceptrons, again. *Time*: steps of a smaller encoder in turns. A CPU has no clock
for memory operations; the bytes that a compiled step moves stand for them.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    Trial,
    highest,
    mean_interval,
    new_figure,
    ratio_interval,
)
from experiments.lab import standard_error as error_of
from experiments.optim import far_costs, far_training
from experiments.optim.far_models import Recipe

PAPER = (
    "Vucetic, Tayaranian, Ziaeefard, Clark, Meyer, Gross: Efficient Fine-Tuning of BERT Models on the Edge, "
    "ISCAS 2022, arXiv 2205.01541"
)
SYSTEM = "hashml.optim.far"


@dataclass(frozen=True)
class Config:
    """Two layers of width 64 for quality, DistilBERT's sizes for bytes, four layers of MiniLM's width for time."""

    shares: tuple[float, ...] = (0.4, 0.1, 0.0)
    """Learners, of the units of a layer; all of them is full fine-tuning."""
    baselines: tuple[str, ...] = ("freeze", "bitfit", "lora", "scratch")
    train_attention: bool = True
    """Whether attention and the norms are trained along, in full fine-tuning too."""
    train_embedding: bool = True
    """Whether all methods train the tables along, or none. Bytes and times read neither field."""
    seeds: int = 5
    search_seeds: int = 1
    """Seeds whose validation loss chooses the learning rate."""
    learning_rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01)
    priming: float = 0.05
    """Share of the steps."""
    steps: int = 200
    batch_size: int = 16
    rows: int = 1500
    """Articles to fine-tune on, a sixth of them for validation."""
    pretraining_texts: int | None = None
    """Articles to pretrain on; by default all others, which are 4,500."""
    vocabulary: int = 8000
    length: int = 24
    features: int = 64
    layers: int = 2
    pretraining_steps: int = 800
    pretraining_rows: int = 64
    pretraining_rate: float = 0.003
    costed: tuple[str, ...] | None = None
    """Steps whose bytes and time are measured; all by default."""
    measured_vocabulary: int = 30522
    measured_features: int = 768
    measured_layers: int = 6
    measured_tokens: tuple[int, int] = (16, 128)
    timed_vocabulary: int = 1000
    timed_features: int = 384
    timed_layers: int = 4
    timed_tokens: tuple[int, int] = (8, 64)
    repetitions: int = 9


SCALES = {
    "tiny": Config(shares=(0.4,), baselines=("scratch",), seeds=2, learning_rates=(0.003,), priming=0.5, steps=4,
                   rows=60, pretraining_texts=40, batch_size=4, vocabulary=100, length=8, features=16, layers=1,
                   pretraining_steps=2, pretraining_rows=4, costed=("full", "far-0.4", "far-0.4, recomputed"),
                   measured_vocabulary=8, measured_features=16, measured_layers=1, measured_tokens=(2, 8),
                   timed_vocabulary=8, timed_features=16, timed_layers=1, timed_tokens=(2, 8), repetitions=6),
    "default": Config(),
}  # fmt: skip


def cells(config: Config) -> list[tuple[str, float | None, str | None]]:
    """``(method, share, choice)`` of what is fine-tuned; without learners there is no choice."""
    found: list[tuple[str, float | None, str | None]] = [("full", None, None)]
    for share in config.shares:
        choices: tuple[str | None, ...] = far_training.CHOICES if share else (None,)
        found += [("far", share, choice) for choice in choices]
    for method in config.baselines:
        shares = [share for share in config.shares if share] if method == "lora" else [None]
        found += [(method, share, None) for share in shares]
    return found


def run(config: Config) -> Iterator[Trial]:
    for (method, share, choice), seed in itertools.product(cells(config), range(config.seeds)):
        measure = functools.partial(_quality, config, method, share, choice, seed)
        yield _trial("quality", method, measure, share=share, choice=choice, seed=seed)
    for name, recipe in far_costs.recipes(config).items():
        yield _trial("bytes", name, functools.partial(far_costs.costs, config, recipe), share=recipe.share)
    for name, recipe in far_costs.recipes(config).items():
        for repetition in range(config.repetitions):
            measure = functools.partial(_seconds, config, name, repetition)
            yield _trial("time", name, measure, share=recipe.share, repetition=repetition)


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return config.seeds * len(cells(config)) + (1 + config.repetitions) * len(far_costs.recipes(config))


def _trial(
    part: str, method: str, measure: Any, *, share: float | None = None, choice: str | None = None,
    seed: int | None = None, repetition: int | None = None,
) -> Trial:  # fmt: skip
    key = {"part": part, "method": method, "share": share, "choice": choice, "seed": seed, "repetition": repetition}
    return Trial(key, measure)


def _quality(config: Config, method: str, share: float | None, choice: str | None, seed: int) -> dict[str, float]:
    recipe = Recipe(method, share, attention=config.train_attention, embedding=config.train_embedding)
    row = far_training.outcomes(config, recipe, choice or far_training.CHOICES[0])[seed]
    return row | {"pretraining_gain": far_training.pretrained(config)[1]}


def _seconds(config: Config, name: str, repetition: int) -> dict[str, float]:
    return {"seconds": float(far_costs.timings(config)[name][repetition])}


# --- claims -----------------------------------------------------------------------------------------


def _accuracy(rows: pl.DataFrame, method: str, share: float | None = None, choice: str | None = None) -> np.ndarray:
    """Test accuracy, seed by seed."""
    wanted = rows.filter(
        pl.col("part").eq("quality")
        & pl.col("method").eq(method)
        & pl.col("share").eq_missing(pl.lit(share))
        & pl.col("choice").eq_missing(pl.lit(choice))
    )
    if wanted.is_empty():
        raise NotEnoughRows(f"no rows of {' '.join(map(str, filter(None, (method, share, choice))))}")
    return wanted.sort("seed")["test_accuracy"].cast(pl.Float64).to_numpy()


def _against(
    rows: pl.DataFrame, share: float, rival: str, rival_share: float | None = None, control: bool = True
) -> Measured:
    """Accuracy of primed learners less that of a rival.

    Raises:
        NotEnoughRows: where the pretraining does not show.
    """
    full, scratch = _accuracy(rows, "full"), _accuracy(rows, "scratch")
    if control and not full.mean() > scratch.mean():
        raise NotEnoughRows(f"pretrained {full.mean():.3f} is not above random weights' {scratch.mean():.3f}")
    return mean_interval(_accuracy(rows, "far", share, "primed") - _accuracy(rows, rival, rival_share), "seeds")


def _choice(rows: pl.DataFrame, rival: str) -> Measured:
    """Accuracy of primed learners less that of others, the mean of a seed over all shares."""
    shares = rows.filter(pl.col("choice") == "primed")["share"].unique().to_list()
    gains = [_accuracy(rows, "far", share, "primed") - _accuracy(rows, "far", share, rival) for share in shares]
    if not gains:
        raise NotEnoughRows("no rows of primed learners")
    return mean_interval(np.mean(gains, axis=0), "seeds")


def _cost(rows: pl.DataFrame, method: str, metric: str) -> float:
    found = rows.filter(pl.col("part").eq("bytes") & pl.col("method").eq(method))
    if found.is_empty():
        raise NotEnoughRows(f"no bytes of {method}")
    return float(found[metric][0])


def _shrinks(rows: pl.DataFrame, metric: str, method: str, rival: str) -> Measured:
    ratio = _cost(rows, method, metric) / _cost(rows, rival, metric)
    return Measured(ratio, ratio, ratio, f"{_cost(rows, rival, metric) / 2**20:.0f} MiB before")


def _falls(rows: pl.DataFrame) -> Measured:
    """Temporary bytes with a share over those with the next larger one; the largest quotient."""
    found = []
    for suffix in ("", ", recomputed"):
        share = pl.col("method").str.extract(r"^far-([0-9.]+)").cast(pl.Float64)
        shares = rows.filter(pl.col("part") == "bytes").select(share)["method"].drop_nulls().unique()
        line = ["full", *(f"far-{share:g}{suffix}" for share in sorted(shares, reverse=True))]
        for larger, smaller in itertools.pairwise(line):
            ratio = _cost(rows, smaller, "temporary_bytes") / _cost(rows, larger, "temporary_bytes")
            found.append(Measured(ratio, ratio, ratio, f"largest from {larger} to {smaller}"))
    if not found:
        raise NotEnoughRows("no bytes of any share")
    return highest(found)


def _arrives(rows: pl.DataFrame, fewest: str = "far-0.1", none: str = "far-0") -> Measured:
    """Floats that a block spares without any learner, over those that its perceptron alone spares."""
    block, alone = (_cost(rows, fewest, name) - _cost(rows, none, name) for name in ("floats_block", "floats_ffn"))
    return Measured(block / alone, block / alone, block / alone, f"{alone:.0f} floats a token")


def _slower(rows: pl.DataFrame, method: str) -> Measured:
    timed = rows.filter(pl.col("part").eq("time") & pl.col("method").is_in([method, "full"]))
    return ratio_interval(timed, method, "full", "seconds", on="repetition")


CARD = "reproduction at small scale"
_NEAR = "about 1% on average over GLUE and SQuAD"

CLAIMS = (
    Claim(
        "time",
        "A training step with 10% learners takes at most 0.7 of full fine-tuning's time",
        paper="fine-tuning time -30% (DistilBERT, CoLA)",
        measure=functools.partial(_slower, method="far-0.1"),
        holds=lambda measured: measured.high <= 0.7,
        unit="x",
    ),
    Claim(
        "memory-operations",
        "A step of one block with 10% learners moves at most 0.53 of the bytes",
        paper="time spent on memory operations -47%",
        measure=functools.partial(_shrinks, metric="accessed_bytes", method="far-0.1", rival="full"),
        holds=lambda measured: measured.high <= 0.53,
        unit="x",
    ),
    *(
        Claim(
            f"metric-{share:.0%}".rstrip("%"),
            f"With {share:.0%} learners accuracy is at most 2 points below full fine-tuning",
            paper=_NEAR,
            measure=functools.partial(_against, share=share, rival="full"),
            holds=lambda measured: measured.low >= -0.02,
        )
        for share in (0.4, 0.1)
    ),
    *(
        Claim(
            f"primed-{rival}",
            f"Learners chosen by their movement in the priming are better than {text} ones, over all shares",
            paper="nodes are chosen by the L1 distance that they move",
            measure=functools.partial(_choice, rival=rival),
            holds=lambda measured: measured.low > 0,
            source=CARD,
        )
        for rival, text in (("random", "random"), ("magnitude", "the largest"))
    ),
    Claim(
        "learners-freeze",
        "10% learners are better than perceptrons that are frozen altogether",
        paper="the card's control",
        measure=functools.partial(_against, share=0.1, rival="freeze"),
        holds=lambda measured: measured.low > 0,
        source=CARD,
    ),
    Claim(
        "bitfit",
        "10% learners are better than BitFit",
        paper="the card's baseline",
        measure=functools.partial(_against, share=0.1, rival="bitfit"),
        holds=lambda measured: measured.low > 0,
        source=CARD,
    ),
    Claim(
        "lora",
        "10% learners are at most a point below LoRA with as many trained parameters in a block",
        paper="the card's baseline",
        measure=functools.partial(_against, share=0.1, rival="lora", rival_share=0.1),
        holds=lambda measured: measured.low >= -0.01,
        source=CARD,
    ),
    Claim(
        "bytes-fall",
        "Temporary bytes of the compiled step fall with every smaller share",
        paper="activation memory falls with the share of learners",
        measure=_falls,
        holds=lambda measured: measured.high < 1,
        source=CARD,
        unit="x",
    ),
    Claim(
        "optimizer-bytes",
        "With 10% learners the optimizer's state is smaller",
        paper="frozen nodes have no optimizer state",
        measure=functools.partial(_shrinks, metric="optimizer_bytes", method="far-0.1", rival="full"),
        holds=lambda measured: measured.high < 1,
        source="algorithm",
        unit="x",
    ),
    Claim(
        "recomputation",
        "Temporary bytes with 10% learners are fewer than those of full fine-tuning that computes perceptrons again",
        paper="the card's trivial control",
        measure=functools.partial(_shrinks, metric="temporary_bytes", method="far-0.1", rival="full, recomputed"),
        holds=lambda measured: measured.high < 1,
        source="cross-card notes",
        unit="x",
    ),
    Claim(
        "input-kept",
        "What a perceptron without learners spares is spared in part only: the block keeps its input all the same",
        paper="the saving of the input is partly illusory",
        measure=_arrives,
        holds=lambda measured: measured.high < 1,
        source="pitfalls",
        unit="x",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------

_LABELS = {
    "full": "full fine-tuning",
    "freeze": "perceptrons frozen",
    "bitfit": "BitFit",
    "lora": "LoRA",
    "scratch": "from random weights",
}


def _named(method: str, share: float | None, choice: str | None) -> str:
    if method == "far":
        return f"FAR, {share:.0%} {choice or 'learners'}"
    return _LABELS[method] + (f", as FAR {share:.0%}" if share is not None else "")


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Accuracy of what was fine-tuned; below it bytes in MiB and the time over that of full fine-tuning."""
    quality = rows.filter(pl.col("part") == "quality")
    keys = quality.select("method", "share", "choice").unique(maintain_order=True).rows()
    shown: list[dict[str, Any]] = []
    for method, share, choice in keys:
        found = _accuracy(rows, method, share, choice)
        error = f" ± {error_of(found):.3f}" if len(found) > 1 else ""
        shown.append({"method": _named(method, share, choice), "accuracy": f"{found.mean():.3f}{error}"})
    for method in rows.filter(pl.col("part") == "bytes")["method"]:
        bytes_of = functools.partial(_cost, rows, method)
        mebibytes = {name: round(bytes_of(f"{name}_bytes") / 2**20, 1) for name in ("temporary", "optimizer", "peak")}
        timed = _slower(rows, method) if method != "full" else Measured(1.0, 1.0, 1.0)
        line = {"floats": bytes_of("floats_block"), "time": f"{timed.value:.2f} ({timed.low:.2f}-{timed.high:.2f})"}
        shown.append({"method": f"step: {method}"} | mebibytes | line)
    return pl.DataFrame(shown, infer_schema_length=None)


def figure(rows: pl.DataFrame) -> Figure:
    """Accuracy against the share of learners by choice; bytes of a compiled step; time of a step."""
    drawing, axes = new_figure(columns=3, width=15, height=4.6)
    _draw_accuracy(axes[0], rows)
    _draw_bytes(axes[1], rows)
    _draw_time(axes[2], rows)
    return drawing


def _draw_accuracy(ax: Axes, rows: pl.DataFrame) -> None:
    quality = rows.filter(pl.col("part") == "quality")
    shares = sorted(quality.filter(pl.col("method") == "far")["share"].unique())
    full = _accuracy(rows, "full")
    for choice in far_training.CHOICES:
        lines = [_accuracy(rows, "far", share, choice if share else None) for share in shares] + [full]
        error = [error_of(line) for line in lines]
        ax.errorbar(range(len(lines)), [line.mean() for line in lines], error, marker="o", capsize=3, label=choice)
    for method, style in (("freeze", ":"), ("bitfit", "-."), ("scratch", "--")):
        if method in quality["method"].unique():
            ax.axhline(float(_accuracy(rows, method).mean()), color="0.5", linestyle=style, label=_LABELS[method])
    for share in quality.filter(pl.col("method") == "lora")["share"].unique():
        mean = float(_accuracy(rows, "lora", share).mean())
        ax.plot([shares.index(share)], [mean], color="black", marker="x", linestyle="", label=f"LoRA as {share:.0%}")
    ax.set_xticks(range(len(shares) + 1), labels=[*(f"{share:.0%}" for share in shares), "100%"])
    ax.set(xlabel="learners", ylabel="test accuracy", title="AG News, four classes")
    ax.legend(fontsize="x-small")


def _draw_bytes(ax: Axes, rows: pl.DataFrame) -> None:
    methods = rows.filter(pl.col("part") == "bytes")["method"].to_list()
    left = np.zeros(len(methods))
    for name in ("temporary", "optimizer", "parameter"):
        width = np.array([_cost(rows, method, f"{name}_bytes") / 2**20 for method in methods])
        ax.barh(methods, width, left=left, label=name)
        left += width
    ax.invert_yaxis()
    # The legend stands beside the bars.
    ax.set(xlabel="MiB of a training step", title="compiled, DistilBERT's sizes", xlim=(0, 1.5 * left.max()))
    ax.legend(fontsize="x-small", loc="upper right")


def _draw_time(ax: Axes, rows: pl.DataFrame) -> None:
    methods = rows.filter(pl.col("part") == "time")["method"].unique(maintain_order=True).to_list()
    for place, method in enumerate(methods):
        found = Measured(1.0, 1.0, 1.0) if method == "full" else _slower(rows, method)
        ax.errorbar(found.value, place, xerr=[[found.value - found.low], [found.high - found.value]], marker="o",
                    capsize=3, color="C0")  # fmt: skip
    ax.set_yticks(range(len(methods)), labels=methods)
    ax.invert_yaxis()
    ax.set(xlabel="time of a step over full fine-tuning's", title="two cores")
