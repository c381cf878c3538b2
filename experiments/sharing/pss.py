"""How small may the embedding memory of a recommender be, and what does smallness cost and buy?

    python -m experiments run sharing.pss      # about 30 minutes on 2 cores

(A) The law: at a fixed memory the vocabulary grows a hundredfold, and the gap to full tables stays. (B) The
trade: quality at saturation, steps to reach it, time of a step and bytes that data-parallel workers
exchange, over compressions of 1 to 10,000. (C) A pod: the MLPerf model with 100 MB of shared weights,
compiled ahead of time for 256 TPU chips (`pss_pod`; needs the environment of `make aot`).
"""

import functools
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.data.clicks import ClickLog
from experiments.data.planted import PlantedLog
from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    Trial,
    interleave,
    mean_interval,
    new_figure,
    paired_difference,
    ratio_interval,
)
from experiments.sharing import training
from experiments.sharing.click_models import TOP, Outcome, embedding, train_and_score
from hashml.models.dlrm import DLRM, binary_cross_entropy

PAPER = (
    "Desai, Shrivastava: The trade-offs of model size in large recommendation models: 100GB to 10MB Criteo-tb DLRM, "
    "NeurIPS 2022, arXiv 2207.10731"
)
SYSTEM = "hashml.sharing.robe"
FIELDS = 4


@dataclass(frozen=True)
class Config:
    """The law and the trade on a planted log whose size is ours to choose."""

    vocabularies: tuple[int, ...] = (5_000, 50_000, 500_000)
    """Rows of each of the four tables in (A); the Zipf head stays the same."""
    memory: int = 160_000
    """Floats stored in (A): the first vocabulary's full tables."""
    compressions: tuple[int, ...] = (1, 10, 100, 1000, 10_000)
    """Of (B), at the middle vocabulary."""
    features: int = 8
    block_size: int = 8
    exponent: float = 1.5
    """Of Zipf's law."""
    rows: int = 200_000
    """Training rows."""
    batch_size: int = 512
    learning_rates: tuple[float, ...] = (0.02, 0.06, 0.2)
    """Searched for every memory."""
    epochs: int = 12
    """At most: training stops at saturation, after three evaluations without gain at any rate."""
    evaluations: int = 2
    """In an epoch."""
    seeds: int = 5
    workers: int = 8
    """Data-parallel workers whose exchange is counted."""
    repetitions: int = 21
    """Of each timing."""


SCALES = {
    "tiny": Config(vocabularies=(200, 2000), memory=6400, compressions=(1, 10), rows=4096, batch_size=256,
                   learning_rates=(0.06,), epochs=1, evaluations=2, repetitions=6),
    "default": Config(),
}  # fmt: skip


@functools.cache
def parts(config: Config, vocabulary: int, seed: int) -> tuple[ClickLog, ClickLog, ClickLog]:
    """Train, validation and test logs: the same clicks for every vocabulary but for its rarest ids."""
    log = PlantedLog(
        rows=config.rows * 5 // 4, table_sizes=(vocabulary,) * FIELDS, exponent=config.exponent, seed=seed
    )
    edge = config.rows * 9 // 8
    return log.batch(0, config.rows), log.batch(config.rows, edge), log.batch(edge, len(log))


def _middle(config: Config) -> int:
    return config.vocabularies[len(config.vocabularies) // 2]


def _module(config: Config, method: str, vocabulary: int, budget: int, seed: int):
    sizes = (vocabulary,) * FIELDS
    return embedding(method, sizes, features=config.features, budget=budget, block_size=config.block_size, seed=seed)


def run(config: Config) -> Iterator[Trial]:
    for seed, vocabulary, method in itertools.product(range(config.seeds), config.vocabularies, ("full", "robe")):
        yield _trial(config, "law", method, vocabulary, None, config.memory, seed)
    for seed, compression in itertools.product(range(config.seeds), config.compressions):
        yield _trade(config, "full" if compression == 1 else "robe", compression, seed)
        if compression > 1:
            yield _trade(config, "hashing_trick", compression, seed)
            yield _trade(config, "quotient_remainder", compression, seed)
    times = functools.cache(lambda: time_steps(config))
    for compression, repetition in itertools.product(config.compressions, range(config.repetitions)):
        yield Trial(
            _key("speed", "full" if compression == 1 else "robe", _middle(config), compression, repetition),
            lambda compression=compression, repetition=repetition: {
                "seconds": float(times()[compression][repetition])
            },
        )
    yield Trial(_key("pod", "robe", 187_767_399, 1000, None), compile_pod)


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    law = config.seeds * len(config.vocabularies) * 2
    trade = config.seeds * (3 * len(config.compressions) - 2)
    return law + trade + len(config.compressions) * config.repetitions + 1


def _key(part: str, method: str, vocabulary: int, compression: int | None, seed: int | None) -> dict[str, Any]:
    return {"part": part, "method": method, "vocabulary": vocabulary, "compression": compression, "seed": seed}


def _trade(config: Config, method: str, compression: int, seed: int) -> Trial:
    virtual = FIELDS * _middle(config) * config.features
    budget = max(math.ceil(virtual / compression), 2 * config.features)
    return _trial(config, "trade", method, _middle(config), compression, budget, seed)


def _trial(
    config: Config, part: str, method: str, vocabulary: int, compression: int | None, budget: int, seed: int
) -> Trial:
    def measure() -> dict[str, Any]:
        outcome = train_and_score(
            _module(config, method, vocabulary, budget, seed),
            parts(config, vocabulary, seed),
            learning_rates=config.learning_rates,
            epochs=config.epochs,
            batch_size=config.batch_size,
            seed=seed,
            evaluations=config.evaluations,
            patience=3,
        )
        return _row(config, method, outcome)

    return Trial(_key(part, method, vocabulary, compression, seed), measure)


def _row(config: Config, method: str, outcome: Outcome) -> dict[str, Any]:
    dense = outcome.model_bytes - (outcome.embedding_bytes if method == "full" else 0)
    rows = config.batch_size * FIELDS * config.features * 4 if method == "full" else 0
    # A ring moves 2 (k - 1) / k of each dense gradient; a full table is split over the workers instead,
    # and the looked-up rows and their gradients cross once each to the workers that need them.
    ring, others = 2 * (config.workers - 1) / config.workers, (config.workers - 1) / config.workers
    return {
        "auc": outcome.test_auc,
        "validation_auc": outcome.validation_auc,
        "learning_rate": outcome.learning_rate,
        "steps": outcome.steps,
        "embedding_bytes": outcome.embedding_bytes,
        "exchanged_bytes": int(ring * dense + 2 * others * rows),
        "curve": " ".join(f"{auc:.5f}" for auc in outcome.curve),
        "steps_an_evaluation": config.rows // config.batch_size // config.evaluations,
    }


def time_steps(config: Config) -> dict[int, np.ndarray]:
    """Seconds of a training step at each compression, taken in turns."""
    train, _, _ = parts(config, _middle(config), 0)
    ids, labels = jnp.asarray(train.ids[: config.batch_size]), jnp.asarray(train.labels[: config.batch_size])
    steps = {}
    for compression in config.compressions:
        budget = max(math.ceil(FIELDS * _middle(config) * config.features / compression), 2 * config.features)
        module = _module(config, "full" if compression == 1 else "robe", _middle(config), budget, 0)
        model = DLRM(module, bottom=(), top=TOP)
        params = model.init(jax.random.key(0), None, ids[:2])["params"]

        def loss(params, vectors, model=model):
            if vectors is None:
                logits = model.apply({"params": params}, None, ids)
            else:
                logits = model.apply({"params": params}, None, vectors, method="head")
            return binary_cross_entropy(jnp.asarray(logits), labels)

        step = jax.jit(
            lambda state, module=module, loss=loss: training.adagrad_step(state, 0.05, module, ids, loss),
            donate_argnums=0,
        )
        steps[compression] = _advance(step, training.start(params, "embedding", module))
    times = interleave({str(c): step for c, step in steps.items()}, repetitions=config.repetitions)
    return {int(c): seconds for c, seconds in times.items()}


def _advance(step, state):
    held = [state]

    def advance():
        held[0] = step(held[0])
        return held[0]

    return advance


def compile_pod() -> dict[str, Any]:
    """What the compiler says of the MLPerf model on 256 chips, where its environment has been made."""
    python = Path(__file__).parents[2] / ".venv-aot/bin/python"
    fields = ("chips", "bytes_a_chip", "all_reduce_bytes", "collectives", "memory_bytes")
    if not python.exists():
        return {"compiled": False, **dict.fromkeys(fields)}
    command = [str(python), "-m", "experiments.sharing.pss_pod", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise RuntimeError(f"{' '.join(command[1:])} failed with exit code {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"compiled": True, **{name: found[name] for name in fields}}


# --- claims -------------------------------------------------------------------------------------------


def _gap_growth(rows: pl.DataFrame) -> Measured:
    """How much more AUC is lost at the largest vocabulary than at the smallest, both at one memory."""
    law = rows.filter(pl.col("part") == "law")
    if law.is_empty():
        raise NotEnoughRows("no rows of the law")
    full, robe = (law.filter(pl.col("method") == method) for method in ("full", "robe"))
    gaps = full.join(robe, on=["vocabulary", "seed"]).with_columns((pl.col("auc") - pl.col("auc_right")).alias("gap"))
    ends = [gaps.filter(pl.col("vocabulary") == v).sort("seed")["gap"].to_numpy() for v in _ends(gaps)]
    return mean_interval(ends[1] - ends[0], "pairs")


def _ends(rows: pl.DataFrame) -> tuple[int, int]:
    sizes = rows["vocabulary"].unique().sort()
    return int(sizes[0]), int(sizes[-1])


def _loss(rows: pl.DataFrame, compression: int) -> Measured:
    trade = rows.filter((pl.col("part") == "trade") & pl.col("compression").is_in([1, compression]))
    return paired_difference(trade, "robe", "full", "auc", on=["seed"])


def _iterations(rows: pl.DataFrame, compression: int) -> Measured:
    """Steps to the compressed model's own saturation over the full model's steps to the same AUC.

    Zero for a seed at which full tables never reach it.
    """
    trade = rows.filter(pl.col("part") == "trade")
    if compression not in trade["compression"].to_list():
        raise NotEnoughRows(f"no rows at {compression}x")
    ratios = []
    for seed in trade["seed"].unique().sort():
        one = trade.filter(pl.col("seed") == seed)
        full = one.filter(pl.col("method") == "full").row(0, named=True)
        robe = one.filter((pl.col("method") == "robe") & (pl.col("compression") == compression)).row(0, named=True)
        curve = np.array([float(auc) for auc in full["curve"].split()])
        reached = np.flatnonzero(curve >= robe["validation_auc"])
        never = reached.size == 0
        ratios.append(0.0 if never else robe["steps"] / ((reached[0] + 1) * full["steps_an_evaluation"]))
    missed = ratios.count(0.0)
    return mean_interval(ratios, f"values, {missed} of them 0: full tables never got there" if missed else "values")


def _step_speed(rows: pl.DataFrame, compression: int) -> Measured:
    speed = rows.filter((pl.col("part") == "speed") & pl.col("compression").is_in([1, compression]))
    return ratio_interval(speed, "full", "robe", "seconds", on=["seed"])


def _pod(rows: pl.DataFrame, field: str, scale: float = 1.0) -> Measured:
    found = rows.filter((pl.col("part") == "pod") & pl.col("compiled"))
    if found.is_empty():
        raise NotEnoughRows("not compiled: make aot first")
    value = float(found[field][0]) * scale
    return Measured(value, value, value, "read from the compiled program")


CLAIMS = (
    Claim(
        "law",
        "At a fixed memory the AUC lost to full tables grows by at most 0.005 while the vocabulary grows 100x",
        paper="memory for quality 1 ± eps is exponentially smaller than the table",
        measure=_gap_growth,
        holds=lambda measured: measured.high <= 0.005,
    ),
    Claim(
        "loss-10x",
        "At 10x at most 0.01 AUC is lost at saturation",
        paper="no loss at 10,000x on CriteoTB",
        measure=functools.partial(_loss, compression=10),
        holds=lambda measured: measured.low >= -0.01,
    ),
    Claim(
        "lossless-10000x",
        "At 10,000x no AUC is lost at saturation (at most 0.001)",
        paper="no loss at 10,000x on CriteoTB",
        measure=functools.partial(_loss, compression=10_000),
        holds=lambda measured: measured.low >= -0.001,
    ),
    *(
        Claim(
            f"more-steps-{compression}x",
            f"At {compression}x saturation takes more steps than full tables need to the same AUC",
            paper="4.5x more iterations at 10,000x",
            measure=functools.partial(_iterations, compression=compression),
            holds=lambda measured: measured.low >= 1,
            unit="x",
        )
        for compression in (10, 100)
    ),
    Claim(
        "faster-step",
        "A training step at 100x is faster than one that updates the full tables' looked-up rows",
        paper="4.3x lower training latency an iteration, on GPUs",
        measure=functools.partial(_step_speed, compression=100),
        holds=lambda measured: measured.low > 1,
        unit="x",
    ),
    Claim(
        "pod-fits",
        "The MLPerf model (26 tables, 188 M x 128) with 100 MB of weights takes less than 16 GB a chip of v5e:16x16",
        paper="100 GB of tables to 10 MB to 100 MB, on one GPU",
        measure=functools.partial(_pod, field="bytes_a_chip", scale=1e-9),
        holds=lambda measured: measured.value < 16,
        unit="GB",
    ),
    Claim(
        "pod-exchange",
        "Its only table collective is the all-reduce of the memory's gradient (other collectives that move it: 0)",
        paper="data parallel in place of model parallel",
        measure=functools.partial(_pod, field="collectives"),
        holds=lambda measured: measured.value == 0,
        unit="others",
    ),
)


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """The trade: quality, steps, time of a step and bytes exchanged, a line a memory."""
    mean = [pl.col(name).mean() for name in ("auc", "steps", "exchanged_bytes")]
    trade = (
        rows.filter(pl.col("part") == "trade")
        .group_by("compression", "method", maintain_order=True)
        .agg(pl.col("embedding_bytes").first(), *mean)
        .sort("compression", maintain_order=True)
    )
    speed = (
        rows.filter(pl.col("part") == "speed")
        .group_by("compression", "method")
        .agg((1e3 * pl.col("seconds").median()).alias("step, ms"))
    )
    return trade.join(speed, on=["compression", "method"], how="left", maintain_order="left")


def figure(rows: pl.DataFrame) -> Figure:
    """Left: the law. Middle: AUC at saturation. Right: steps, time and bytes relative to full tables."""
    drawing, (left, middle, right) = new_figure(columns=3)
    for method, name in (("full", "full tables"), ("robe", "ROBE, fixed memory")):
        line = _line(rows, "law", method, "vocabulary", "auc")
        left.errorbar(line["vocabulary"], line["auc"], line["error"], marker="o", capsize=3, label=name)
    left.set(xscale="log", xlabel="rows of a table", ylabel="test AUC", title="the law")
    left.legend()
    names = {"robe": "ROBE", "hashing_trick": "hashing trick", "quotient_remainder": "quotient-remainder"}
    full = rows.filter((pl.col("part") == "trade") & (pl.col("method") == "full"))
    middle.axhline(full["auc"].to_numpy().mean(), color="0.4", linestyle="--", label="full tables")
    for method, name in names.items():
        line = _line(rows, "trade", method, "compression", "auc")
        middle.errorbar(line["compression"], line["auc"], line["error"], marker="o", capsize=3, label=name)
    middle.set(xscale="log", xlabel="compression", ylabel="test AUC at saturation", title="the trade")
    middle.legend()
    summary = table(rows)
    base = summary.filter(pl.col("method") == "full").row(0, named=True)
    chosen = summary.filter(pl.col("method").is_in(["full", "robe"])).sort("compression")
    quantities = {"steps": "steps to saturation", "step, ms": "time of a step", "exchanged_bytes": "bytes exchanged"}
    for name, label in quantities.items():
        right.plot(chosen["compression"], chosen[name] / base[name], marker="o", label=label)
    right.axhline(1, color="0.4", linestyle="--")
    right.set(xscale="log", yscale="log", xlabel="compression", ylabel="relative to full tables", title="the cost")
    right.legend()
    return drawing


def _line(rows: pl.DataFrame, part: str, method: str, x: str, y: str) -> pl.DataFrame:
    chosen = rows.filter((pl.col("part") == part) & (pl.col("method") == method))
    error = (pl.col(y).std() / pl.len().sqrt()).alias("error")
    return chosen.group_by(x).agg(pl.col(y).mean(), error).sort(x)
