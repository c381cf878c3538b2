"""FAIR lets small devices take part in federated training of a recommender: what that is worth, and against what.

    python -m experiments run distributed.fair      # about 15 minutes on 2 cores

NCF on MovieLens-1M. Every client is a user who likes many films, its device holds 1/1 to 1/64 of the item
tables, and all are scored on the server's model: NDCG@20 over all films. Contenders share rounds, devices a
round, local epochs, data and bytes: a device that a contender has no form for is left out, and others are
sampled in its place. Departures: devices of each capacity are sampled in equal numbers, and without
replacement, so that shapes are static; low rank and width slicing have no form of 1/16 of 8 columns.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jax import Array
from matplotlib.figure import Figure

from experiments.distributed.federated_ncf import (
    TOWERS,
    Curves,
    Part,
    Server,
    Training,
    clients,
    order_of,
    popularity,
    start,
    train_and_score,
)
from experiments.lab import Claim, Measured, Trial, mean_interval, new_figure, paired_difference
from hashml.distributed import (
    TableForm,
    low_rank_table,
    low_rank_within,
    own_subspace_table,
    sliced_table,
    subspace_table,
    traffic,
    whole_table,
    width_within,
)
from hashml.sharing import SharingMap
from hashml.sharing.nested import materialised_map, nested_budgets, nested_map

PAPER = "Desai, Meisburger, Liu, Shrivastava: FAIR, federated averaging in random subspaces, 2023, arXiv 2311.01722"
SYSTEM = "hashml.distributed.fair"

HISTOGRAMS = {"thirds": (0, 2, 4), "range": (0, 1, 2, 3, 4, 5, 6), "halves": (0, 1)}
"""Halvings of the table that the devices can hold, in equal shares of the devices."""

METHODS = {
    "full": "FedAvg, all whole",
    "fair": "FAIR",
    "fair_delta": "FAIR, delta",
    "inconsistent": "own hash each",
    "smallest": "smallest for all",
    "per_size": "a server a size",
    "drop_small": "small ones dropped",
    "heterofl": "width slicing",
    "fedhm": "low rank",
    "popularity": "popularity",
}

CONTENDERS = {
    "thirds": tuple(METHODS),
    "range": ("fair", "fair_delta", "smallest", "drop_small"),
    "halves": ("full", "fair", "fair_delta"),
}


@dataclass(frozen=True)
class Config:
    """126 users who like many films, as the 99 heavy readers of the authors' Goodreads-100."""

    histograms: tuple[str, ...] = ("thirds", "range", "halves")
    users: int = 126
    fewest: int = 160
    """Films that a client likes, at least."""
    most: int = 512
    features: int = 8
    devices: int = 12
    """Sampled in a round, rounded to equal numbers of each capacity."""
    rounds: int = 200
    evaluations: int = 10
    epochs: int = 5
    """Local passes, as in the authors' run on Goodreads-100."""
    batch_size: int = 512
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01)
    """Of Adam, searched for every contender, histogram and seed by NDCG on the validation part."""
    regularization: float = 1e-6
    seeds: int = 3
    first_seed: int = 10
    """The settings were chosen while looking at seeds 0 and 1, which are therefore not judged."""


SCALES = {
    "tiny": Config(histograms=("halves",), users=12, fewest=20, most=40, devices=2, rounds=2, evaluations=2, epochs=1,
                   batch_size=64, learning_rates=(0.01,), seeds=2),
    "default": Config(),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    for seed, histogram in itertools.product(seeds, config.histograms):
        for method in CONTENDERS[histogram]:
            key = {"histogram": histogram, "method": method, "seed": seed}
            yield Trial(key, functools.partial(measure, config, histogram, method, seed))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return config.seeds * sum(len(CONTENDERS[histogram]) for histogram in config.histograms)


def measure(config: Config, histogram: str, method: str, seed: int) -> dict[str, float | int | None]:
    """NDCG@20 of a contender, its own learning rate and moment chosen on the validation part."""
    data = clients(config.users, seed, config.fewest, config.most)
    marks = [_mark(config, number) for number in range(config.evaluations)]
    large = order_of(config.users, seed)[
        : config.users // len(HISTOGRAMS[histogram])
    ]  # the first class is the largest
    if method == "popularity":
        found = popularity(data)
        nothing = {"validation_ndcg": None, "learning_rate": None, "rounds": None, "device_bytes": 0}
        scores = {"ndcg": float(np.nanmean(found)), "ndcg_large": float(np.nanmean(found[large]))}
        return {**scores, "taking_part": 0.0, **nothing, **dict.fromkeys(marks)}
    servers, aggregation = plan(config, histogram, method, data.items)
    training = Training(
        config.features,
        config.epochs,
        config.batch_size,
        config.rounds,
        config.evaluations,
        config.regularization,
        aggregation,
    )
    curves = train_and_score(servers, training, data, rates=config.learning_rates, seed=seed)
    rate, moment, line = _chosen(curves)
    parts = [part for server in servers for part in server.parts]
    members = np.array([len(part.members) for part in parts])
    moved = np.array([_bytes(config, part, data.items) for part in parts])
    return {
        "ndcg": line[moment],
        "ndcg_large": float(np.nanmean(curves.test[rate, moment, large])),
        "taking_part": float(members.sum() / config.users),
        "validation_ndcg": float(np.nanmean(curves.validation[rate, moment])),
        "learning_rate": config.learning_rates[rate],
        "rounds": (moment + 1) * (config.rounds // config.evaluations),
        "device_bytes": float(members @ moved / members.sum()),
        **dict(zip(marks, line, strict=True)),
    }


def _chosen(curves: Curves) -> tuple[int, int, list[float]]:
    """Rate and evaluation of the best mean NDCG on the validation part, and the test curve of that rate."""
    means = np.nanmean(curves.validation, axis=-1)
    rate, moment = np.unravel_index(np.argmax(means), means.shape)
    return int(rate), int(moment), np.nanmean(curves.test[rate], axis=-1).tolist()


def _mark(config: Config, evaluation: int) -> str:
    """Name of the column of the test NDCG at an evaluation."""
    return f"round_{(evaluation + 1) * (config.rounds // config.evaluations):04d}"


def _bytes(config: Config, part: Part, items: int) -> int:
    """What a device downloads in a round."""
    state = jax.eval_shape(lambda key: start(key, 1, items, config.features), jax.random.key(0))
    return traffic(dict.fromkeys(TOWERS, part.form(jnp.uint32(0))), state).down


# --- the plans of the contenders ----------------------------------------------------------------------


@functools.cache
def plan(config: Config, histogram: str, method: str, items: int) -> tuple[tuple[Server, ...], str]:
    """Servers, their classes of devices, and the aggregation of a contender."""
    halvings = HISTOGRAMS[histogram]
    form = functools.partial(_form, items=items, columns=config.features, levels=halvings[-1])
    everybody = tuple(range(config.users))
    bounds = np.linspace(0, config.users, len(halvings) + 1).astype(int)
    classes = [everybody[low:high] for low, high in itertools.pairwise(bounds)]
    each = max(1, round(config.devices / len(halvings)))
    total = each * len(halvings)
    match method:
        case "full" | "smallest":
            halving = 0 if method == "full" else halvings[-1]
            return (Server((Part(form("fair", halving), everybody, total),), everybody),), "replace"
        case "per_size":
            kinds = [form("fair", halving) for halving in halvings]
            return tuple(Server((Part(k, c, each),), c) for k, c in zip(kinds, classes, strict=True)), "replace"
        case "drop_small":
            served = {0: classes[0]}
        case "heterofl":
            served = {h: c for h, c in zip(halvings, classes, strict=True) if width_within(config.features, 2.0**-h)}
        case "fedhm":
            served = {
                h: c
                for h, c in zip(halvings, classes, strict=True)
                if low_rank_within(items, config.features, 2.0**-h)
            }
        case _:
            served = dict(zip(halvings, classes, strict=True))
    kind = method if method in ("inconsistent", "heterofl", "fedhm") else "fair"
    parts = tuple(Part(form(kind, h), members, total // len(served)) for h, members in served.items())
    return (Server(parts, everybody),), "delta" if method == "fair_delta" else "replace"


@functools.cache
def _form(kind: str, halvings: int, *, items: int, columns: int, levels: int) -> Callable[[Array], TableForm]:
    """The form of 1/2**halvings of the table, as a function of a run's salt."""
    if halvings == 0:
        return lambda salt: whole_table()
    capacity = 2.0**-halvings
    match kind:
        case "heterofl":
            return lambda salt: sliced_table(columns, width_within(columns, capacity))
        case "fedhm":
            return lambda salt: low_rank_table(low_rank_within(items, columns, capacity))
    sizes = nested_budgets(items * columns, levels)

    def make_map(salt: Any) -> SharingMap:
        return nested_map(items, columns, sizes[halvings], full_budget=sizes[0], salt=salt)

    def consistent(salt: Array) -> TableForm:
        known = materialised_map(make_map(salt))  # the simulation hashes once, a device would at each step
        return subspace_table(lambda _: known)

    return consistent if kind == "fair" else lambda salt: own_subspace_table(make_map)


# --- claims -----------------------------------------------------------------------------------------


def _gain(rows: pl.DataFrame, a: str, b: str, histogram: str = "thirds") -> Measured:
    """NDCG of ``a`` over that of ``b``, less one: the mean of the seeds' relative differences."""
    chosen = rows.filter(pl.col("histogram") == histogram)
    paired_difference(chosen, a, b, "ndcg", on="seed")  # checks that the seeds are the same
    of = {name: chosen.filter(pl.col("method") == name).sort("seed")["ndcg"].to_numpy() for name in (a, b)}
    with np.errstate(divide="ignore", invalid="ignore"):  # an NDCG may be 0 at scale tiny
        return mean_interval(of[a] / of[b] - 1, "pairs")


def _claim(name: str, text: str, a: str, b: str, above: float, histogram: str = "thirds", paper: str = "") -> Claim:
    return Claim(
        name,
        text,
        paper=paper or "all devices take part, and information flows between capacities",
        measure=functools.partial(_gain, a=a, b=b, histogram=histogram),
        holds=lambda measured: measured.low > above,
    )


CLAIMS = (
    _claim("not-dropping", "FAIR is better than to drop small devices", "fair", "drop_small", 0.0),
    _claim(
        "not-dropping-range",
        "FAIR is better than to drop small devices where capacities go from 1 to 1/64",
        "fair",
        "drop_small",
        0.0,
        "range",
    ),
    _claim(
        "consistency",
        "FAIR is at least 10 % better than with a hash function of each device's own",
        "fair",
        "inconsistent",
        0.1,
        paper="hashing must be consistent",
    ),
    _claim("not-low-rank", "FAIR is not worse than low rank at equal bytes (by 1 %)", "fair", "fedhm", -0.01),
    _claim("flow", "FAIR is better than a server for each size", "fair", "per_size", 0.0),
    _claim("not-smallest", "FAIR is better than every device at the smallest size", "fair", "smallest", 0.0),
    _claim(
        "near-full",
        "With capacities 1 and 1/2 FAIR is within 10 % of FedAvg on whole tables",
        "fair",
        "full",
        -0.1,
        "halves",
        paper="NDCG@20 0.275 on Goodreads-100 at round 230",
    ),
    _claim("beats-popularity", "FAIR is better than the ranking by popularity", "fair", "popularity", 0.0),
    _claim("full-beats-popularity", "FedAvg on whole tables is too", "full", "popularity", 0.0),
    _claim(
        "delta",
        "Adding the mean change is better than replacing the table by the mean, which forgets",
        "fair_delta",
        "fair",
        0.0,
        paper="(no claim of the paper's: it replaces)",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """NDCG@20 and its standard error, of all clients and of those with the largest devices."""

    def cell(column: str) -> pl.Expr:
        error = (pl.col(column).std() / pl.len().sqrt()).round(4)
        return pl.format("{} ± {}", pl.col(column).mean().round(4), error)

    return (
        rows.group_by("histogram", "method", maintain_order=True)
        .agg(
            cell("ndcg").alias("NDCG@20"),
            cell("ndcg_large").alias("of the largest devices"),
            pl.col("taking_part").first().alias("devices that take part"),
            (pl.col("device_bytes").mean() / 1024).round(1).alias("KiB down a device"),
        )
        .with_columns(pl.col("method").replace(METHODS))
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Left: NDCG@20 by round where devices hold 1, 1/4 and 1/16. Right: at the chosen moment, by method."""
    drawing, (left, right) = new_figure(columns=2, width=10)
    histograms = rows["histogram"].unique(maintain_order=True).to_list()
    first = rows.filter(pl.col("histogram") == histograms[0])
    marks = sorted(name for name in rows.columns if name.startswith("round_"))
    rounds = [int(name.removeprefix("round_")) for name in marks]
    for name, label in METHODS.items():
        chosen = first.filter(pl.col("method") == name)
        if chosen.is_empty():
            continue
        if name == "popularity":
            left.axhline(chosen["ndcg"].to_numpy().mean(), color="0.4", linestyle="--", label=label)
            continue
        lines = chosen.select(marks).to_numpy()
        left.plot(rounds, lines.mean(axis=0), label=label, linewidth=2.5 if name.startswith("fair") else 1.2)
    left.set(xlabel="round", ylabel="test NDCG@20", title=f"by round ({histograms[0]})")
    left.legend(fontsize="x-small", ncols=2)
    step = 1 / (len(histograms) + 1)
    for place, histogram in enumerate(histograms):
        chosen = rows.filter(pl.col("histogram") == histogram)
        means = [
            (number, group["ndcg"].to_numpy())
            for number, name in enumerate(METHODS)
            if len(group := chosen.filter(pl.col("method") == name))
        ]
        right.errorbar(
            [values.mean() for _, values in means],
            [number + place * step for number, _ in means],
            xerr=[values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0 for _, values in means],
            marker="o",
            linestyle="",
            capsize=3,
            label=histogram,
        )
    right.set(xlabel="test NDCG@20", title="by method, one standard error")
    right.set_yticks(range(len(METHODS)), labels=list(METHODS.values()))
    right.invert_yaxis()
    right.legend(fontsize="small")
    return drawing
