"""ROBE is faster than a full table on a CPU, the more so the longer its blocks.

    make peers && python -m experiments run sharing.robe_speed      # about a minute on 2 cores

Lookup, bag and training step (forward, backward, SGD) of 65,536 ids of a 2 M x 64 table in 512 KB of shared
weights, beside what one would use instead: the full table in JAX (dense gradient, or its looked-up
rows alone), PyTorch's `nn.Embedding` (dense and sparse gradients) and the hashing trick; and beside a plain
copy of the output, which is the bound. Every ratio is taken within one repetition of one process, each call
right after one of its own that does not count. Without PyTorch its rows are absent and its claims not judged.
"""

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Array
from matplotlib.figure import Figure

from experiments.lab import Claim, Measured, NotEnoughRows, Trial, interleave, new_figure, ratio_interval
from hashml.embeddings import sgd_rows
from hashml.hashing import hash_slots
from hashml.sharing import robe_bag, robe_lookup

PAPER = "Desai, Chou, Shrivastava: Random Offset Block Embedding Array (ROBE), MLSys 2022, arXiv 2108.02191"
SYSTEM = "hashml.sharing.robe"
TASKS = {"lookup": "lookup", "bag": "bag of 16 ids", "step": "training step"}
RATE = 0.01


@dataclass(frozen=True)
class Config:
    """The sizes that the targets are stated for."""

    num_embeddings: int = 2_000_000
    features: int = 64
    ids: int = 65_536
    """Uniform over the table, drawn anew for each call: no cache holds a full table's rows."""
    batches: int = 16
    """Sets of ids that the calls go through in turn; their rows of the full table exceed any cache."""
    compression: int = 1000
    block_sizes: tuple[int, ...] = (1, 8, 32, 64)
    members: int = 16
    """Ids in a bag; there are ids / members bags."""
    repetitions: int = 21


SCALES = {
    "tiny": Config(
        num_embeddings=20_000, features=16, ids=1024, compression=100, block_sizes=(1, 16), batches=2, repetitions=6
    ),
    "default": Config(),
}


def torch_is_here() -> bool:
    """Whether the peer is installed (`make peers`)."""
    return importlib.util.find_spec("torch") is not None


def methods(config: Config, task: str) -> list[str]:
    """What is timed for a task, PyTorch last."""
    robe = [f"robe-{block_size}" for block_size in config.block_sizes]
    full = {
        "lookup": ["copy", "jax", "hashing_trick"],
        "bag": ["jax", "hashing_trick"],
        "step": ["jax", "jax, rows", "hashing_trick"],
    }
    torch = {"lookup": ["torch"], "bag": ["torch"], "step": ["torch", "torch, sparse"]}
    return [*full[task], *robe, *(torch[task] if torch_is_here() else [])]


def run(config: Config) -> Iterator[Trial]:
    times = functools.cache(lambda task: interleave(_functions(config, task), repetitions=config.repetitions, lead=1))
    for task in TASKS:
        for method in methods(config, task):
            for repetition in range(config.repetitions):

                def measure(task: str = task, method: str = method, repetition: int = repetition) -> dict[str, float]:
                    return {"seconds": float(times(task)[method][repetition])}

                yield Trial({"task": task, "method": method, "repetition": repetition}, measure)


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return config.repetitions * sum(len(methods(config, task)) for task in TASKS)


# --- what is timed ------------------------------------------------------------------------------------


def _functions(config: Config, task: str) -> dict[str, Callable[[], Any]]:
    """A function of no argument for each method; each call takes the next set of ids."""
    rng = np.random.default_rng(0)
    shape = (config.ids // config.members, config.members) if task == "bag" else (config.ids,)
    sets = [rng.integers(0, config.num_embeddings, shape, dtype=np.int32) for _ in range(config.batches)]
    table = rng.standard_normal((config.num_embeddings, config.features), dtype=np.float32)
    # A step goes forward, takes the gradient of half the squared distance to these rows back, and updates.
    target = rng.standard_normal((*shape, config.features), dtype=np.float32)
    made: dict[str, Callable[[], Any]] = {}
    for method in methods(config, task):
        if method.startswith("torch"):
            made[method] = _torch(task, method, table, sets, target)
        else:
            made[method] = _jax(config, task, method, table, sets, target)
    return made


def _jax(
    config: Config, task: str, method: str, table: np.ndarray, sets: list[np.ndarray], target: np.ndarray
) -> Callable[[], Any]:
    budget = table.size // config.compression
    turns, goal = itertools.cycle([jnp.asarray(ids) for ids in sets]), jnp.asarray(target)
    if method == "copy":
        return functools.partial(jax.jit(jnp.copy), goal)
    if method.startswith("robe"):
        params = jnp.asarray(table.reshape(-1)[:budget])
        options: dict[str, Any] = {"features": config.features, "block_size": int(method.removeprefix("robe-"))}
        look, bag = functools.partial(robe_lookup, **options), functools.partial(robe_bag, **options)
    else:
        rows = budget // config.features if method == "hashing_trick" else config.num_embeddings
        params = jnp.asarray(table[:rows])
        look = functools.partial(_take, hashed_to=rows if method == "hashing_trick" else None)
        bag = functools.partial(_take_bag, hashed_to=rows if method == "hashing_trick" else None)
    if task != "step":
        read = jax.jit(look if task == "lookup" else bag)
        return lambda: read(params, next(turns))

    def step(params: Array, ids: Array, target: Array) -> tuple[Array, Array]:
        rows, backward = jax.vjp(lambda params: look(params, ids), params)
        return params - RATE * backward(rows - target)[0], rows

    def step_rows(params: Array, ids: Array, target: Array) -> tuple[Array, Array]:
        rows = look(params, ids)
        return sgd_rows(params, ids, rows - target, RATE), rows

    train = jax.jit(step_rows if method == "jax, rows" else step, donate_argnums=0)
    held = [jnp.copy(params)]

    def advance() -> Any:
        """Trains on, as a loop would, the parameters updated in place."""
        held[0], rows = train(held[0], next(turns), goal)
        return held[0], rows

    return advance


def _take(table: Array, ids: Array, *, hashed_to: int | None) -> Array:
    """Rows of a stored table, at hashed places where ``hashed_to`` rows serve all ids."""
    slots = ids if hashed_to is None else hash_slots(ids, size=hashed_to, seed=0).astype(jnp.int32)
    return jnp.take(table, slots, axis=0)


def _take_bag(table: Array, ids: Array, *, hashed_to: int | None) -> Array:
    return _take(table, ids, hashed_to=hashed_to).sum(axis=1)


def _torch(
    task: str, method: str, table: np.ndarray, sets: list[np.ndarray], target: np.ndarray
) -> Callable[[], Any]:
    torch = importlib.import_module("torch")
    weight, goal = torch.from_numpy(table.copy()), torch.from_numpy(target)
    turns = itertools.cycle([torch.from_numpy(ids).long() for ids in sets])
    if task == "bag":
        bags = torch.nn.EmbeddingBag.from_pretrained(weight, mode="sum")
        return lambda: _without_gradient(torch, bags, next(turns))
    embedding = torch.nn.Embedding.from_pretrained(weight, freeze=task == "lookup", sparse=method == "torch, sparse")
    if task == "lookup":
        return lambda: _without_gradient(torch, embedding, next(turns))
    optimizer = torch.optim.SGD(embedding.parameters(), lr=RATE)

    def step() -> Any:
        optimizer.zero_grad()
        rows = embedding(next(turns))
        rows.backward(rows.detach() - goal)
        optimizer.step()
        return rows.detach()

    return step


def _without_gradient(torch: Any, module: Any, index: Any) -> Any:
    with torch.no_grad():
        return module(index)


# --- claims -------------------------------------------------------------------------------------------


def _speedup(rows: pl.DataFrame, task: str, method: str, peer: str) -> Measured:
    """Time of ``peer`` over that of ``method``: median of the ratios within a repetition."""
    chosen = rows.filter(pl.col("task") == task)
    if peer not in chosen["method"].to_list() or method not in chosen["method"].to_list():
        raise NotEnoughRows(f"{peer} or {method} was not timed here")
    return ratio_interval(chosen, peer, method, "seconds", on=["repetition"])


def _claim(
    id: str, text: str, times: tuple[str, str, str], least: float | int, paper: str = "none for a CPU"
) -> Claim:
    """``times`` is the task, the method, and the peer that it must be ``least`` times faster than."""
    task, method, peer = times
    return Claim(
        id,
        text,
        paper=paper,
        measure=functools.partial(_speedup, task=task, method=method, peer=peer),
        holds=lambda measured: measured.value >= least,
        source="this project's target",
        unit="x",
    )


INFERENCE = "inference throughput 3.1x of the full model's, on a GPU"
STEP = "dense gradients: 621.7 ms full, 269.5 ms ROBE; sparse gradients: 251.1 ms full (the authors' CPU benchmark)"
HASHING = "hashing 55.5 ms against lookup 8.9 ms a call in the reference"
# fmt: off
CLAIMS = (
    _claim("lookup-32-torch", "A lookup at Z = 32 is 1.3x faster than from PyTorch's full table",
           ("lookup", "robe-32", "torch"), 1.3, INFERENCE),
    _claim("lookup-32-take", "A lookup at Z = 32 is 3x faster than jnp.take on the full table",
           ("lookup", "robe-32", "jax"), 3),
    _claim("lookup-64-torch", "A lookup at Z = 64 is 1.7x faster than from PyTorch's full table",
           ("lookup", "robe-64", "torch"), 1.7, INFERENCE),
    _claim("lookup-64-take", "A lookup at Z = 64 is 5x faster than jnp.take on the full table",
           ("lookup", "robe-64", "jax"), 5),
    _claim("lookup-64-copy", "A lookup at Z = 64 takes at most 1.5x a plain copy of its output (0.667x its speed)",
           ("lookup", "robe-64", "copy"), 1 / 1.5),
    _claim("blocks-pay", "A lookup at Z = 32 is faster than at Z = 1",
           ("lookup", "robe-32", "robe-1"), 1, "block reads use whole cache lines"),
    _claim("step-dense", "A training step at Z = 32 is 20x faster than the full table's with a dense gradient",
           ("step", "robe-32", "jax"), 20, STEP),
    _claim("step-torch-sparse", "A training step at Z = 32 is not slower than PyTorch's with sparse gradients",
           ("step", "robe-32", "torch, sparse"), 1, STEP),
    _claim("step-rows", "A training step at Z = 32 is not slower than JAX's on the full table's looked-up rows",
           ("step", "robe-32", "jax, rows"), 1, STEP),
    _claim("bag-torch", "A bag of 16 at Z = 32 is not slower than PyTorch's EmbeddingBag",
           ("bag", "robe-32", "torch"), 1),
    _claim("step-hashing-trick", "A training step at Z = 32 is not slower than the hashing trick's",
           ("step", "robe-32", "hashing_trick"), 1, HASHING),
)
# fmt: on


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Milliseconds (median and quartiles), and the speed relative to the full table in JAX."""
    lines = []
    for (task, method), part in rows.group_by("task", "method", maintain_order=True):
        lower, median, upper = (1e3 * float(part["seconds"].quantile(q, "linear") or 0) for q in (0.25, 0.5, 0.75))
        line = {"task": TASKS[str(task)], "method": method, "ms": f"{median:.3g} ({lower:.3g} to {upper:.3g})"}
        for peer in ("jax", "torch", "copy"):
            try:
                line[f"faster than {peer}"] = f"{_speedup(rows, str(task), str(method), peer).value:.3g}x"
            except NotEnoughRows:
                line[f"faster than {peer}"] = "–"
        lines.append(line)
    return pl.DataFrame(lines)


def figure(rows: pl.DataFrame) -> Figure:
    """Milliseconds of each method, a panel a task, on a logarithmic axis."""
    drawing, axes = new_figure(columns=len(TASKS), height=4.0)
    for ax, (task, title) in zip(axes, TASKS.items(), strict=True):
        part = rows.filter(pl.col("task") == task)
        names = part["method"].unique(maintain_order=True).to_list()[::-1]
        for place, name in enumerate(names):
            times = 1e3 * part.filter(pl.col("method") == name)["seconds"].to_numpy()
            lower, median, upper = np.quantile(times, [0.25, 0.5, 0.75])
            color = "C0" if name.startswith("robe") else "C1" if name.startswith("torch") else "0.6"
            ax.barh(place, median, color=color, xerr=[[median - lower], [upper - median]], capsize=2)
            ax.annotate(f" {median:.3g}", (upper, place), va="center", fontsize="small")
        ax.set(xscale="log", xlabel="milliseconds", title=title)
        ax.set_yticks(range(len(names)), labels=[name.replace("_", " ").replace("robe", "ROBE") for name in names])
        ax.set_xlim(right=ax.get_xlim()[1] * 3)
    return drawing
