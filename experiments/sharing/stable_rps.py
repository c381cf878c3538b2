"""A shared memory trains as stably as a dense net, and keeps more accuracy than pruning at high compression.

    python -m experiments run sharing.stable_rps      # about an hour on 2 cores, most of it CIFAR-10

Accuracy against compression of RPS (the fold, and v1 of the gradient scaler) and of its competitors: ROAST's
maps without the scaler, smaller dense nets, and pruning at random, by magnitude, SNIP, GraSP and SynFlow (100
rounds), and lottery tickets with rewinding. Fashion-MNIST, 784-256-256-10, and a part of CIFAR-10, three
convolutions (``--data fashion_mnist`` alone takes 10 minutes). Compression is of kernels, as in the paper;
biases are dense and counted for everyone. Pruned nets are compared with as many non-zeros as the memory has
slots, which favours them: the bitmap of their places, which they need, is shown beside it. Then: the spread of
the memory at initialisation, and compression one.

Hashes would be computed anew at every step (`hashml.sharing.share`). For the speed of this experiment alone they
are computed once, and slots and signs kept as arrays, so that one program serves all hash functions; a test
asserts that the weights are the same. The arrays are not part of the model and are not counted.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    Trial,
    lowest,
    mean_interval,
    new_figure,
    paired_difference,
)
from experiments.sharing.image_models import Outcome
from experiments.sharing.stable_rps_contenders import (
    AT_INIT,
    METHODS,
    SHARED,
    TITLES,
    Config,
    Name,
    expanded,
    geometry,
    make,
    score,
    shared_net,
    smaller_net,
    train_at,
)
from hashml.sharing.stable_rps import sharing_sums

PAPER = (
    "Desai, Shrivastava: In defense of parameter sharing for model-compression (STABLE-RPS), ICLR 2024, "
    "arXiv 2310.11611"
)
SYSTEM = "hashml.sharing.stable_rps"
SCALES = {
    "tiny": Config(data=("fashion_mnist",), compressions=(1, 10), ltr_compressions=(10,), rates=(0.1,),
                   rps_rates=(0.3,), roast_rates=(0.003,), hidden=(16, 16), epochs=1, train=320, validation=100,
                   test=100, ltr_levels=1, synflow_steps=5, init_stds=(0.1, 1.0), seeds=2),
    "default": Config(),
    "paper": Config(epochs=20, cifar_epochs=40, train=12_000),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for data in config.data:
        for compression, method in _cells(config, data):
            for seed in range(config.seeds):
                key = {"part": "quality", "data": data, "method": method, "compression": compression,
                       "init_std": None, "seed": seed}  # fmt: skip
                yield Trial(key, functools.partial(_seed, _quality, (config, data, method, compression), seed))
    for init_std, method, seed in itertools.product(config.init_stds, ("v1", "none"), range(config.seeds)):
        key = {"part": "stability", "data": config.data[0], "method": method,
               "compression": config.stability_compression, "init_std": init_std, "seed": seed}  # fmt: skip
        yield Trial(key, functools.partial(_seed, _stability, (config, method, init_std), seed))
    for method, seed in itertools.product(("fold", "element"), range(config.seeds)):
        key = {"part": "continuity", "data": config.data[0], "method": method, "compression": 1,
               "init_std": None, "seed": seed}  # fmt: skip
        yield Trial(key, functools.partial(_seed, _continuity, (config, method), seed))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    cells = sum(len(_cells(config, data)) for data in config.data)
    return config.seeds * (cells + 2 * len(config.init_stds) + 2)


def _cells(config: Config, data: Name) -> list[tuple[int, str]]:
    """Compressions and methods of a data set."""
    compressions = config.compressions if data == "fashion_mnist" else config.cifar_compressions
    cells = [(1, "dense")]
    for compression in compressions:
        for method in METHODS:
            if compression == 1 and method not in SHARED:
                continue  # the dense net itself
            if method == "ltr" and compression not in config.ltr_compressions:
                continue
            if method == "small" and smaller_net(config, data, compression) is None:
                continue
            cells.append((compression, method))
    return cells


def _seed(rows: Callable[..., list[dict[str, float]]], arguments: tuple[Any, ...], seed: int) -> dict[str, float]:
    return rows(*arguments)[seed]


# --- the parts of the experiment ----------------------------------------------------------------------


def _quality(config: Config, data: Name, method: str, compression: int) -> list[dict[str, float]]:
    """All seeds of a contender, which are trained together."""
    outcome, contender = score(config, data, method, compression), make(config, data, method, compression)
    best = outcome.chosen()
    return [
        {
            "accuracy": float(outcome.test[seed, best]),
            "validation_accuracy": float(outcome.validation[seed, best]),
            "learning_rate": outcome.learning_rates[best],
            "model_bytes": contender.bytes[seed],
            "bitmap_bytes": contender.bitmap_bytes[seed],
        }
        for seed in range(config.seeds)
    ]


@functools.cache
def _stability(config: Config, version: Literal["v1", "none"], init_std: float) -> list[dict[str, float]]:
    """One rate, and memories of different spread that expand to the same weights."""
    data = config.data[0]
    contender = shared_net(config, data, "fold", config.stability_compression, version, init_std)
    outcome = train_at(config, data, contender, (config.stability_rate,))
    return [{"accuracy": float(outcome.test[seed, 0])} for seed in range(config.seeds)]


@functools.cache
def _continuity(config: Config, map: Literal["fold", "element"]) -> list[dict[str, float]]:
    """As many slots as weights, against the dense net at the same rate."""
    data = config.data[0]
    net, contender = make(config, data, "dense", 1), shared_net(config, data, map, 1, "v1", 1.0)
    # The control: the dense net that starts one rounding away.
    beside = net._replace(params=jax.tree.map(lambda leaf: leaf * (1 + jnp.finfo(leaf.dtype).eps), net.params))
    found, dense, rounded = (
        train_at(config, data, each, (config.stability_rate,)) for each in (contender, net, beside)
    )
    rows = []
    for seed in range(config.seeds):
        constants = jax.tree.map(lambda leaf, i=seed: leaf[i], contender.constants)
        expected = _trained(dense, seed)
        away = _furthest(expanded(_trained(found, seed), constants), expected)
        shared = geometry(config, data, map, 1, seed, 1.0)
        rows.append(
            {
                "accuracy": float(found.test[seed, 0]),
                "dense_accuracy": float(dense.test[seed, 0]),
                "deviation": away / max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)),
                "over_rounding": away / _furthest(_trained(rounded, seed), expected),
                "empty_slots": float((sharing_sums(shared).weights == 0).mean()),
            }
        )
    return rows


def _trained(outcome: Outcome, seed: int) -> Any:
    """A seed's trained parameters, of the only rate."""
    return jax.tree.map(lambda leaf: leaf[seed, 0], outcome.trained.params)


def _furthest(params: Any, others: Any) -> float:
    """The largest difference between two weights."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, others)))


# --- claims ---------------------------------------------------------------------------------------------


def _quality_rows(rows: pl.DataFrame, data: str, compression: int) -> pl.DataFrame:
    chosen = pl.col("data").eq(data) & pl.col("compression").eq(compression) & pl.col("part").eq("quality")
    return rows.filter(chosen)


def _best(rows: pl.DataFrame, methods: tuple[str, ...]) -> str:
    """The method of the best mean validation accuracy."""
    means = (
        rows.filter(pl.col("method").is_in(methods))
        .group_by("method", maintain_order=True)
        .agg(pl.col("validation_accuracy").mean())
        .sort("validation_accuracy", descending=True, maintain_order=True)
    )
    if means.is_empty():
        raise NotEnoughRows(f"no rows of {', '.join(methods)}")
    return str(means["method"][0])


def _lead(rows: pl.DataFrame, methods: tuple[str, ...], data: str, compressions: tuple[int, ...]) -> Measured:
    """RPS over the best of ``methods``, at the compression where it stands worst."""
    cells = []
    for compression in compressions:
        chosen = _quality_rows(rows, data, compression)
        if not set(methods) & set(chosen["method"].to_list()):
            continue
        rival = _best(chosen, methods)
        found = paired_difference(chosen, "rps", rival, "accuracy", on=["seed"])
        cells.append(Measured(found.value, found.low, found.high, f"worst: {METHODS[rival]} at {compression}x"))
    if not cells:
        raise NotEnoughRows(f"no rows of {', '.join(methods)}")
    return lowest(cells)


def _spread(rows: pl.DataFrame, version: str) -> Measured:
    """For each seed the accuracy at the best spread of the memory less that at the worst."""
    chosen = rows.filter((pl.col("part") == "stability") & (pl.col("method") == version))
    spans = chosen.group_by("seed", maintain_order=True).agg(pl.col("accuracy").max() - pl.col("accuracy").min())
    return mean_interval(spans["accuracy"], "seeds")


def _continuous(rows: pl.DataFrame, map: str, metric: str) -> Measured:
    chosen = rows.filter((pl.col("part") == "continuity") & (pl.col("method") == map))
    return mean_interval(chosen[metric], "seeds")


ALL = (3, 10, 30, 100, 300, 1000)
HIGH = (100, 300, 1000)
PRUNERS = tuple(AT_INIT)

CLAIMS = (
    Claim(
        "matches-pruning",
        "RPS is nowhere more than half a point below the best of the pruners at initialisation (Fashion-MNIST)",
        paper="matches or beats MAG, SNIP, SYNFLOW and GRASP over the entire range",
        measure=functools.partial(_lead, methods=PRUNERS, data="fashion_mnist", compressions=ALL),
        holds=lambda measured: measured.low >= -0.005,
    ),
    Claim(
        "beats-pruning-high",
        "From 100x on RPS is at least 2 points ahead of the best pruner at initialisation (Fashion-MNIST)",
        paper="most at high compression",
        measure=functools.partial(_lead, methods=PRUNERS, data="fashion_mnist", compressions=HIGH),
        holds=lambda measured: measured.low >= 0.02,
    ),
    Claim(
        "matches-pruning-cifar",
        "The same on CIFAR-10: nowhere more than half a point below",
        paper="matches or beats MAG, SNIP, SYNFLOW and GRASP over the entire range",
        measure=functools.partial(_lead, methods=PRUNERS, data="cifar10_subset", compressions=ALL),
        holds=lambda measured: measured.low >= -0.005,
    ),
    Claim(
        "beats-tickets-high",
        "At 100x and 1000x RPS is more accurate than lottery tickets",
        paper="beats even LTR at high compression",
        measure=functools.partial(_lead, methods=("ltr",), data="fashion_mnist", compressions=(100, 1000)),
        holds=lambda measured: measured.low > 0,
    ),
    Claim(
        "tickets-win-low",
        "At 10x lottery tickets are more accurate than RPS",
        paper="LTR is behind at high compression only",
        measure=functools.partial(_lead, methods=("ltr",), data="fashion_mnist", compressions=(10,)),
        holds=lambda measured: measured.high < 0,
        source="the code's comparison",
    ),
    Claim(
        "matches-small-nets",
        "RPS is nowhere more than half a point below a smaller dense net of as many bytes",
        paper="matches or beats small models over the entire range",
        measure=functools.partial(_lead, methods=("small",), data="fashion_mnist", compressions=ALL),
        holds=lambda measured: measured.low >= -0.005,
    ),
    Claim(
        "not-below-roast",
        "With fold and scaler, RPS is nowhere more than half a point below ROAST's maps without a scaler",
        paper="two provable fixes of ROAST: stability and Pareto-continuity",
        measure=functools.partial(
            _lead, methods=("roast_element", "roast_tile"), data="fashion_mnist", compressions=(1, *ALL)
        ),
        holds=lambda measured: measured.low >= -0.005,
    ),
    Claim(
        "stable",
        "With the scaler, accuracy changes by less than a point over five orders of the memory's initial spread",
        paper="gradient scaling gives stability (theorem)",
        measure=functools.partial(_spread, version="v1"),
        holds=lambda measured: measured.high < 0.01,
    ),
    Claim(
        "unstable-without",
        "Without the scaler it changes by more than 20 points",
        paper="ROAST diverges or stalls, depending on the initial spread",
        measure=functools.partial(_spread, version="none"),
        holds=lambda measured: measured.low > 0.2,
    ),
    Claim(
        "continuous",
        "At compression 1 the fold trains as the dense net: largest deviation of a weight over the largest weight, "
        "after the whole training in float32, which amplifies rounding",
        paper="Pareto-continuity (theorem)",
        measure=functools.partial(_continuous, map="fold", metric="deviation"),
        holds=lambda measured: measured.high < 0.01,
    ),
    Claim(
        "continuous-as-rounding",
        "That deviation is at most three times that of a dense net from itself, started one rounding beside",
        paper="none; the control of the claim above",
        measure=functools.partial(_continuous, map="fold", metric="over_rounding"),
        holds=lambda measured: measured.high <= 3,
        unit="x",
    ),
    Claim(
        "hashing-is-not",
        "At compression 1 a hashed map leaves 1 / e of the slots empty",
        paper="the map of ROAST does not give the dense model back",
        measure=functools.partial(_continuous, map="element", metric="empty_slots"),
        holds=lambda measured: abs(measured.value - np.exp(-1)) < 0.005,
    ),
)


# --- what is shown --------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Accuracy, mean and standard error over the seeds, bytes both ways, and the learning rate that was chosen."""
    return (
        rows.group_by("part", "data", "compression", "method", "init_std", maintain_order=True)
        .agg(
            pl.col("model_bytes").first(),
            pl.col("bitmap_bytes").first(),
            pl.col("accuracy").mean(),
            (pl.col("accuracy").std() / pl.len().sqrt()).alias("standard error"),
            pl.col("learning_rate").first(),
        )
        .with_columns(pl.col("method").replace({"dense": "dense net", **METHODS}))
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Accuracy against compression for each data set; last, against the memory's spread at initialisation."""
    quality = rows.filter(pl.col("part") == "quality")
    names = quality["data"].unique(maintain_order=True).to_list()
    drawing, axes = new_figure(columns=len(names) + 1)
    for place, data in enumerate(names):
        ax, chosen = axes[place], quality.filter(pl.col("data") == data)
        dense = chosen.filter(pl.col("method") == "dense")["accuracy"]
        ax.axhline(dense.to_numpy().mean(), color="0.4", linestyle="--", label="dense net")
        for method, name in METHODS.items():
            _draw(ax, chosen.filter(pl.col("method") == method), "compression", name)
        ax.set(xscale="log", xlabel="compression of kernels", ylabel="test accuracy", title=TITLES[data])
        if place == 0:
            ax.legend(fontsize="x-small", ncols=2)
    stability = rows.filter(pl.col("part") == "stability")
    for version, name in (("v1", "scaler v1"), ("none", "no scaler")):
        _draw(axes[-1], stability.filter(pl.col("method") == version), "init_std", name)
    axes[-1].set(xscale="log", xlabel="initial spread of the memory", ylabel="test accuracy", title="stability")
    axes[-1].legend(fontsize="small")
    return drawing


def _draw(ax: Any, rows: pl.DataFrame, x: str, name: str) -> None:
    line = (
        rows.group_by(x)
        .agg(pl.col("accuracy").mean(), (pl.col("accuracy").std() / pl.len().sqrt()).alias("error"))
        .sort(x)
    )
    if not line.is_empty():
        # More lines than colours: the second round of them is dashed.
        style = "-" if len(ax.containers) < 7 else "--"
        ax.errorbar(line[x], line["accuracy"], line["error"], marker="o", linestyle=style, capsize=2, label=name)
