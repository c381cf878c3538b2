"""RACE without order: Fashion-MNIST as 196 tokens of 2 x 2 pixels, by the attention of a small vision transformer.

    python -m experiments run attention.race_images

Two layers of width 64, 4 heads, the mean of the tokens for a head, and each method at a learning rate of its own.
Linformer's mixers count among the parameters; YOSO is taken at infinitely many rounds, which is the better for it.
The control gives every token the mean of all values: what is not above it draws nothing from attention.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.attention.race import LAST_STEP, PAPER, SYSTEM, bars, within_one_error
from experiments.attention.race import table as table
from experiments.attention.race_models import Sizes
from experiments.attention.race_training import Part, Plan, outcomes
from experiments.data import images
from experiments.data.clicks import Splits
from experiments.lab import Claim, Measured, NotEnoughRows, Trial, new_figure, paired_difference

__all__ = ["CLAIMS", "PAPER", "SCALES", "SYSTEM", "Config", "count", "figure", "run", "table"]


@dataclass(frozen=True)
class Config:
    """A part of Fashion-MNIST, one pass over it."""

    methods: tuple[str, ...] = ("softmax", "race-2x2", "race-4x4", "race-2x2-bucket", "race-4x4-bucket", "linear",
                                "performer-64", "performer-256", "angular-8", "linformer-128", "yoso-8",
                                "mean")  # fmt: skip
    train: int = 3200
    held_out: int = 1000
    """Images of the validation and of the test part."""
    steps: int = 200
    batch_size: int = 16
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    features: int = 64
    layers: int = 2
    seeds: int = 3


SCALES = {
    "tiny": Config(methods=("softmax",), train=32, held_out=8, steps=2, batch_size=8, learning_rates=(0.003,),
                   features=16, layers=1, seeds=2),
    "default": Config(),
    "paper": Config(train=10_000, steps=3000, batch_size=32),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for method in config.methods:
        for seed in range(config.seeds):
            key = {"task": "images", "method": method, "tables": None, "beta": None, "seed": seed}
            yield Trial(key, functools.partial(_measure, config, method, seed))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return len(config.methods) * config.seeds


def _measure(config: Config, method: str, seed: int) -> dict[str, Any]:
    row = trained(config, method)[seed]
    return {"value": row["accuracy"]} | row


@functools.lru_cache(maxsize=1)
def trained(config: Config, method: str) -> list[dict[str, Any]]:
    """The rows of all seeds of a method."""
    sizes = Sizes(10, 196, False, reads="mean", features=config.features, layers=config.layers,
                  hidden=4 * config.features)  # fmt: skip
    plan = Plan(config.steps, config.batch_size, config.learning_rates, config.seeds)
    return outcomes(sizes, method, patches(config.train, config.held_out), plan)


@functools.lru_cache(maxsize=1)
def patches(train: int, held_out: int) -> Splits[Part]:
    """Images as rows of 2 x 2 pixels, from the upper left."""
    found = images.splits("fashion_mnist", train=train, validation=held_out, test=held_out)

    def part(whole: images.Images) -> Part:
        cut = whole.images.reshape(-1, 14, 2, 14, 2).transpose(0, 1, 3, 2, 4)
        return Part(np.ascontiguousarray(cut.reshape(-1, 196, 4)), whole.labels)

    return Splits(*(part(whole) for whole in found))


# --- claims -------------------------------------------------------------------------------------------


def _useful(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows, where softmax is above its control.

    Raises:
        NotEnoughRows: where it is not.
    """
    gain = paired_difference(rows, "softmax", "mean", "value", on="seed")
    if not gain.low > 0:
        raise NotEnoughRows(f"softmax is not above the mean of all values: {100 * gain.value:.1f} points")
    return rows


def _points(rows: pl.DataFrame, method: str, peer: str, *, one_error: bool = False) -> Measured:
    """Points of accuracy of ``method`` over ``peer``, paired over the seeds."""
    points = _useful(rows).with_columns(pl.col("value") * 100)
    if one_error:
        return within_one_error(points, method, peer)
    return paired_difference(points, method, peer, "value", on="seed")


def _against(peer: str, words: str, paper: str) -> Claim:
    return Claim(
        f"images-{peer}",
        f"RACE with 4 tables of 4 bits is not below {words}, within one standard error",
        paper=f"CIFAR-10 at 1,024 tokens: RACE (4, 4) 65.9 %, {paper}",
        measure=functools.partial(_points, method="race-4x4", peer=peer, one_error=True),
        holds=lambda measured: measured.high >= 0,
        source="tables",
        unit="points",
    )


CLAIMS = (
    Claim(
        "images-softmax",
        "RACE with 4 tables of 4 bits has a higher accuracy than softmax",
        paper="CIFAR-10 at 1,024 tokens: 65.9 % against 61.4 %",
        measure=functools.partial(_points, method="race-4x4", peer="softmax"),
        holds=lambda measured: measured.low > 0,
        source="tables",
        unit="points",
    ),
    _against("linear", "linear attention", "linear 60.0 %"),
    _against("performer-256", "Performer with 256 features", "Performer 64.9 %"),
    _against("performer-64", "Performer of equal state", "Performer 64.9 %"),
    _against("linformer-128", "Linformer", "Linformer 63.7 %"),
    _against("angular-8", "exact angular attention to the 8th power", "angular 61.7 %"),
    Claim(
        "images-control",
        "RACE with (4, 4) has a higher accuracy than the mean of all values: its buckets address",
        paper="none",
        measure=functools.partial(_points, method="race-4x4", peer="mean"),
        holds=lambda measured: measured.low > 0,
        source=LAST_STEP,
        unit="points",
    ),
)


def figure(rows: pl.DataFrame) -> Figure:
    """Accuracy of each method, a point a seed."""
    drawing, (ax,) = new_figure(height=4.2)
    bars(ax, rows, "test accuracy")
    ax.set(title="Fashion-MNIST, 196 tokens")
    return drawing
