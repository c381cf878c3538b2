"""Tiles against single elements and against a dense layer: what a hashed layer costs in time.

    make peers && python -m experiments run sharing.roast_speed      # about 2 minutes on 2 cores

Forward pass and training step (forward, both gradients) of one layer at each size: HashedNet, which hashes every
weight whenever it reads it; HashedNet with its index and signs kept in memory, several times the dense layer's
bytes; ROAST in tiles, in the fold, and a dense layer in JAX and PyTorch. Every ratio is taken within one repetition.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.lab import Claim, Measured, NotEnoughRows, Trial, interleave, new_figure, ratio_interval
from experiments.sharing.robe_speed import torch_is_here
from hashml.sharing import element_map, virtual_matmul
from hashml_kernels.hashed_matmul import hashed_matmul

PAPER = "Desai, Zhou, Shrivastava: Hardware-Aware Compression with ROAST Hashing, ICML 2023, arXiv 2207.10702"
SYSTEM = "hashml.sharing.roast"
TASKS = {"inference": "forward pass", "training": "forward and backward"}
LABELS = {
    "dense": "dense, JAX",
    "torch": "dense, PyTorch",
    "hashed_net": "HashedNet",
    "indexed": "HashedNet, index kept",
    "tile": "ROAST, tiles",
    "fold": "ROAST, fold of tiles",
    "tile, no signs": "ROAST, tiles, no signs",
}


@dataclass(frozen=True)
class Config:
    """One layer at a hundredth of its weights."""

    sizes: tuple[tuple[int, int], ...] = ((1024, 64), (4096, 256))
    """Width of the square layer, and rows of the batch."""
    compression: int = 100
    tile: int = 32
    repetitions: int = 11


SCALES = {"tiny": Config(sizes=((64, 8),), compression=10, tile=8, repetitions=6), "default": Config()}


def methods(width: int) -> list[str]:
    """What is timed; at a large width HashedNet and its index take seconds and gigabytes, and are left out."""
    every = [*(["hashed_net", "indexed"] if width <= 1024 else []), "tile", "fold", "tile, no signs", "dense"]
    return [*every, "torch"] if torch_is_here() else every


def run(config: Config) -> Iterator[Trial]:
    times = functools.cache(
        lambda task, width, batch: interleave(
            functions(config, task, width, batch), repetitions=config.repetitions, lead=1
        )
    )
    for task in TASKS:
        for width, batch in config.sizes:
            for method in methods(width):
                for repetition in range(config.repetitions):
                    key = {"task": task, "width": width, "batch": batch, "method": method, "repetition": repetition}

                    def measure(key: dict[str, Any] = key) -> dict[str, float]:
                        taken = times(key["task"], key["width"], key["batch"])[key["method"]]
                        return {"seconds": float(taken[key["repetition"]])}

                    yield Trial(key, measure)


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return len(TASKS) * config.repetitions * sum(len(methods(width)) for width, _ in config.sizes)


def layers(config: Config, width: int) -> dict[str, tuple[Callable[..., Any], Any]]:
    """``(x, weights) -> y`` of each contender in JAX, and its weights."""
    budget = width * width // config.compression
    rng = np.random.default_rng(0)
    memory = jnp.asarray(rng.standard_normal(budget, dtype=np.float32))
    options: dict[str, Any] = {"columns": width, "tile": (config.tile, config.tile)}
    found: dict[str, tuple[Callable[..., Any], Any]] = {
        "dense": (jnp.matmul, jnp.asarray(rng.standard_normal((width, width), dtype=np.float32))),
        "tile": (functools.partial(hashed_matmul, **options), memory),
        "tile, no signs": (functools.partial(hashed_matmul, **options, sign="none"), memory),
        "fold": (functools.partial(hashed_matmul, **options, map="fold"), memory),
    }
    if "hashed_net" in methods(width):
        elements = element_map(width, width, budget)
        slots = jnp.asarray(np.asarray(elements.slots(np.arange(width))).astype(np.int32))
        signs = jnp.asarray(np.asarray(elements.signs(np.arange(width))))
        found["hashed_net"] = (lambda x, memory: virtual_matmul(x, memory, elements), memory)
        found["indexed"] = (lambda x, memory: x @ (signs * memory[slots]).T, memory)
    return found


def functions(config: Config, task: str, width: int, batch: int) -> dict[str, Callable[[], Any]]:
    """A function of no argument for each contender."""
    rng = np.random.default_rng(1)
    x, gradient = (rng.standard_normal((batch, width), dtype=np.float32) for _ in range(2))
    made: dict[str, Callable[[], Any]] = {}
    for name, (layer, weights) in layers(config, width).items():

        def step(x: Any, weights: Any, gradient: Any, layer: Callable[..., Any] = layer) -> Any:
            y, backward = jax.vjp(layer, x, weights)
            return y, backward(gradient)

        call = jax.jit(layer) if task == "inference" else jax.jit(step)
        arguments = (
            (jnp.asarray(x), weights) if task == "inference" else (jnp.asarray(x), weights, jnp.asarray(gradient))
        )
        made[name] = functools.partial(call, *arguments)
    if "torch" in methods(width):
        made["torch"] = _torch(task, width, x, gradient)
    return {name: made[name] for name in methods(width)}


def _torch(task: str, width: int, x: np.ndarray, gradient: np.ndarray) -> Callable[[], Any]:
    torch = importlib.import_module("torch")
    inputs, backward = torch.from_numpy(x), torch.from_numpy(gradient)
    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0))

    def infer() -> Any:
        with torch.no_grad():
            return inputs @ weight

    def train() -> Any:
        leaf, kernel = inputs.requires_grad_(), weight.requires_grad_()
        leaf.grad = kernel.grad = None
        (leaf @ kernel).backward(backward)
        return kernel.grad

    return infer if task == "inference" else train


# --- claims -------------------------------------------------------------------------------------------


def _speedup(rows: pl.DataFrame, task: str, width: int, method: str, peer: str) -> Measured:
    """Time of ``peer`` over that of ``method``: median of the ratios within a repetition."""
    chosen = rows.filter((pl.col("task") == task) & (pl.col("width") == width))
    if not {method, peer} <= set(chosen["method"].to_list()):
        raise NotEnoughRows(f"{method} or {peer} was not timed at width {width}")
    return ratio_interval(chosen, peer, method, "seconds", on=["repetition"])


def _claim(id: str, text: str, what: tuple[str, int, str, str], least: float | int, paper: str) -> Claim:
    """``what`` is the task, the width, the method, and the peer that it must be ``least`` times faster than."""
    task, width, method, peer = what
    return Claim(
        id,
        text,
        paper=paper,
        measure=functools.partial(_speedup, task=task, width=width, method=method, peer=peer),
        holds=lambda measured: measured.value >= least,
        unit="x",
    )


# fmt: off
CLAIMS = (
    _claim("inference-50x", "Inference is 50x faster than HashedNet's", ("inference", 1024, "tile", "hashed_net"), 50,
           "up to about 50x, on a GPU"),
    _claim("training-25x", "Training is 25x faster than HashedNet's", ("training", 1024, "tile", "hashed_net"), 25,
           "up to about 25x, on a GPU"),
    _claim("training-3x", "Training is 3x faster than HashedNet's", ("training", 1024, "tile", "hashed_net"), 3,
           "none for a CPU"),
    _claim("indexed", "Training is 1.5x faster than HashedNet's with its index kept",
           ("training", 1024, "tile", "indexed"), 1.5, "none for a CPU"),
    _claim("dense-forward", "A forward pass at 4096 x 4096, batch 256, is at least 0.667x as fast as dense",
           ("inference", 4096, "tile", "dense"), 1 / 1.5, "none; this project's target"),
    _claim("dense-fold", "So does one in the fold", ("inference", 4096, "fold", "dense"), 1 / 1.5,
           "none; this project's target"),
    _claim("dense-training", "A training step at 4096 x 4096, batch 256, is at least 0.667x as fast as dense",
           ("training", 4096, "tile", "dense"), 1 / 1.5, "none"),
)
# fmt: on


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Milliseconds (median and quartiles), and the speed relative to a dense layer and to HashedNet."""
    lines = []
    for (task, width, batch, method), part in rows.group_by("task", "width", "batch", "method", maintain_order=True):
        lower, median, upper = (1e3 * float(part["seconds"].quantile(q, "linear") or 0) for q in (0.25, 0.5, 0.75))
        line = {"task": TASKS[str(task)], "width": width, "batch": batch, "method": LABELS[str(method)]}
        line["ms"] = f"{median:.3g} ({lower:.3g} to {upper:.3g})"
        for peer in ("dense", "hashed_net"):
            try:
                found = _speedup(rows, str(task), int(str(width)), str(method), peer)
                line[f"faster than {LABELS[peer]}"] = f"{found.value:.3g}x"
            except NotEnoughRows:
                line[f"faster than {LABELS[peer]}"] = "–"
        lines.append(line)
    return pl.DataFrame(lines)


def figure(rows: pl.DataFrame) -> Figure:
    """Milliseconds of each contender, a panel a task and size."""
    sizes = rows.select("task", "width", "batch").unique(maintain_order=True).rows()
    drawing, axes = new_figure(columns=2, rows=-(-len(sizes) // 2), width=10)
    for ax, (task, width, batch) in zip(axes, sizes, strict=False):
        part = rows.filter((pl.col("task") == task) & (pl.col("width") == width))
        names = part["method"].unique(maintain_order=True).to_list()[::-1]
        for place, name in enumerate(names):
            times = 1e3 * part.filter(pl.col("method") == name)["seconds"].to_numpy()
            lower, median, upper = np.quantile(times, [0.25, 0.5, 0.75])
            color = "C0" if name in ("tile", "fold", "tile, no signs") else "C1" if name == "torch" else "0.6"
            ax.barh(place, median, color=color, xerr=[[median - lower], [upper - median]], capsize=2)
            ax.annotate(f" {median:.3g}", (upper, place), va="center", fontsize="small")
        ax.set(xlabel="milliseconds", title=f"{TASKS[task]}, {width}, batch {batch}")
        ax.set_yticks(range(len(names)), labels=[LABELS[name] for name in names])
        ax.set_xlim(0, ax.get_xlim()[1] * 1.15)
    return drawing
