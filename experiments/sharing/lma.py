"""LMA lets values that occur together share weights: does that beat sharing by chance, at what bytes?

    python -m experiments run sharing.lma      # about 10 minutes on 2 cores

AUC of one DLRM against the compression of its tables, on two real click logs: LMA, the same with its
signatures shuffled over the values (the control), element hashing, ROBE and the hashing trick with as many
weights, and element hashing that is also given LMA's 8 bytes of signature a value. The signatures come from
one half of the training rows, never from labels. Beside it the law: how much of their rows values share.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.data import frappe, movielens_1m
from experiments.data.clicks import ClickLog
from experiments.data.planted import PlantedLog
from experiments.lab import Claim, Measured, NotEnoughRows, Trial, new_figure, paired_difference
from experiments.sharing.click_models import embedding, train_and_score
from hashml.accounting import stored_bytes
from hashml.sharing.lma import LmaGeometry, lma_slots
from hashml.sharing.lma_signatures import Signatures, sample_signatures
from hashml.sharing.lma_tables import LmaTables

PAPER = (
    "Desai, Pan, Sun, Chou, Shrivastava: Semantically Constrained Memory Allocation (SCMA) for Embedding in "
    "Efficient Recommendation Systems, 2021, arXiv 2103.06124"
)
SYSTEM = "hashml.sharing.lma"

TITLES = {"movielens_1m": "MovieLens-1M", "frappe": "frappe", "planted": "planted Zipf log"}
CLAIMED = ("movielens_1m", "frappe")
LABELS = {
    "full": "full tables",
    "lma": "LMA",
    "shuffled": "LMA, signatures shuffled",
    "element": "element hashing",
    "element_same_bytes": "element hashing, LMA's bytes",
    "robe": "ROBE-16",
    "hashing_trick": "hashing trick",
}
PAIRED = ("lma", "shuffled", "element", "element_same_bytes")
OTHERS = ("robe", "hashing_trick")


@dataclass(frozen=True)
class Config:
    """The claim on logs of some ten thousand rows and values."""

    data: tuple[str, ...] = CLAIMED
    compressions: tuple[int, ...] = (4, 16, 64)
    """Floats of the full tables over floats of the memory; signatures are not in it."""
    features: int = 16
    keys_to_use: int = 8
    """K of the reference."""
    minimum_support: int = 2
    """Values in fewer of the sampled rows get random signatures."""
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Searched for every contender, compression and seed on the validation part."""
    epochs: int | None = None
    """At most; by default `EPOCHS`. Training stops after two without gain; the best is scored."""
    rows: int = 80_000
    """Training rows used at most."""
    seeds: int = 5
    other_seeds: int = 3
    """Of ROBE and the hashing trick, which no claim compares with."""
    law_seeds: int = 40
    """Hash functions drawn for the law."""


SCALES = {
    "tiny": Config(data=("planted",), compressions=(16,), learning_rates=(0.06,), epochs=1, rows=4096, seeds=2,
                   other_seeds=1, law_seeds=3),
    "default": Config(),
}  # fmt: skip

BATCH = {"frappe": 256, "movielens_1m": 1024, "planted": 512}
EPOCHS = {"frappe": 5, "movielens_1m": 4, "planted": 2}
SIMILARITIES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)
"""Edges of the classes of pairs for the law; the last class is that of equal sets."""
PAIRS = 200
"""Pairs of values in a class, at most."""


@functools.cache
def parts(config: Config, data: str, seed: int) -> tuple[ClickLog, ClickLog, ClickLog]:
    """Train, validation and test logs."""
    if data == "planted":
        rows = config.rows
        log = PlantedLog(rows=rows * 3 // 2, table_sizes=(300,) * 4, exponent=1.2, seed=seed)
        train, held = log.batch(0, rows), log.batch(rows, len(log))
        return train, held.take(slice(0, len(held) // 2)), held.take(slice(len(held) // 2, None))
    train, validation, test = {"frappe": frappe, "movielens_1m": movielens_1m}[data].splits(seed=seed)
    return train.take(slice(0, config.rows)), validation, test


def sampled(train: ClickLog) -> np.ndarray:
    """Ids of the half of the training rows that signatures are made of; rows are in random order."""
    return train.ids[: len(train) // 2]


@functools.cache
def signatures(config: Config, data: str, seed: int) -> Signatures:
    """Of every value of every table."""
    train = parts(config, data, seed)[0]
    return sample_signatures(sampled(train), train.table_sizes, minimum_support=config.minimum_support, seed=seed)


def shuffled(given: Signatures, seed: int) -> Signatures:
    """The same signatures, each with another value: as many agree, but not those that mean the same."""
    return Signatures(np.random.default_rng(seed).permutation(given.words), given.key_bits)


def contender(config: Config, data: str, method: str, compression: int, seed: int) -> nn.Module:
    """The embedding module of a method."""
    sizes = parts(config, data, seed)[0].table_sizes
    budget = math.ceil(sum(sizes) * config.features / compression)
    match method:
        case "lma" | "shuffled":
            known = signatures(config, data, seed)
            known = known if method == "lma" else shuffled(known, seed)
            return LmaTables(sizes, config.features, known, budget=budget, keys_to_use=config.keys_to_use, seed=seed)
        case "element" | "element_same_bytes":
            budget += 2 * sum(sizes) if method == "element_same_bytes" else 0  # 8 bytes are two weights
            return embedding("robe", sizes, features=config.features, budget=budget, block_size=1, seed=seed)
        case _:
            return embedding(method, sizes, features=config.features, budget=budget, block_size=16, seed=seed)


def run(config: Config) -> Iterator[Trial]:
    for data, seed in itertools.product(config.data, range(config.seeds)):
        yield _quality(config, data, "full", 1, seed)
        methods = PAIRED + (OTHERS if seed < config.other_seeds else ())
        for compression, method in itertools.product(config.compressions, methods):
            yield _quality(config, data, method, compression, seed)
    for data, similarity in itertools.product(config.data, range(len(SIMILARITIES))):
        yield Trial(
            _key("law", data, "lma", None, SIMILARITIES[similarity], None),
            functools.partial(_law, config, data, similarity),
        )


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    compressed = config.seeds * len(PAIRED) + min(config.seeds, config.other_seeds) * len(OTHERS)
    return len(config.data) * (config.seeds + len(config.compressions) * compressed + len(SIMILARITIES))


def _key(
    part: str, data: str, method: str, compression: int | None, similarity: float | None, seed: int | None
) -> dict[str, Any]:
    return {
        "part": part,
        "data": data,
        "method": method,
        "compression": compression,
        "similarity": similarity,
        "seed": seed,
    }


def _quality(config: Config, data: str, method: str, compression: int, seed: int) -> Trial:
    def measure() -> dict[str, Any]:
        logs = parts(config, data, seed)
        module = contender(config, data, method, compression, seed)
        outcome = train_and_score(
            module,
            logs,
            learning_rates=config.learning_rates,
            epochs=config.epochs or EPOCHS[data],
            patience=2,
            batch_size=BATCH[data],
            seed=seed,
        )
        stored = jax.eval_shape(module.init, jax.random.key(0), logs[0].ids[:2])
        return {
            "auc": outcome.test_auc,
            "validation_auc": outcome.validation_auc,
            "learning_rate": outcome.learning_rate,
            "steps": outcome.steps,
            "memory_bytes": outcome.embedding_bytes,
            "embedding_bytes": stored_bytes(stored),  # signatures included
        }

    return Trial(_key("quality", data, method, compression, None, seed), measure)


# --- the law ----------------------------------------------------------------------------------------


@functools.cache
def _similar_pairs(config: Config, data: str) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of values ``[n, 2]`` of different fields that occur together, and the Jaccard index of their rows."""
    train = parts(config, data, 0)[0]
    sizes = np.array(train.table_sizes)
    ids = sampled(train).astype(np.int64) + (np.cumsum(sizes) - sizes)
    total = int(sizes.sum())
    support = np.bincount(ids.reshape(-1), minlength=total)
    pairs, similarity = [], []
    for a, b in itertools.combinations(range(len(sizes)), 2):
        both, together = np.unique(ids[:, a] * total + ids[:, b], return_counts=True)
        first, second = both // total, both % total
        known = np.minimum(support[first], support[second]) >= config.minimum_support
        pairs.append(np.stack([first, second], axis=1)[known])
        similarity.append((together / (support[first] + support[second] - together))[known])
    return np.concatenate(pairs), np.concatenate(similarity)


@functools.cache
def _law_signatures(config: Config, data: str, seed: int) -> Signatures:
    train = parts(config, data, 0)[0]
    return sample_signatures(
        sampled(train), train.table_sizes, minimum_support=config.minimum_support, seed=1000 + seed
    )


def _law(config: Config, data: str, place: int) -> dict[str, Any]:
    """Fraction of coordinates that pairs of a class share, over hash functions, beside what the law says."""
    pairs, similarity = _similar_pairs(config, data)
    chosen = similarity >= SIMILARITIES[place]
    if place + 1 < len(SIMILARITIES):
        chosen &= similarity < SIMILARITIES[place + 1]
    rows = np.flatnonzero(chosen)
    rows = rows[np.random.default_rng(place).permutation(len(rows))[:PAIRS]]
    if not len(rows):
        return {"pairs": 0, **dict.fromkeys(("jaccard", "shared", "law", "deviation", "deviation_error"))}
    budget = math.ceil(sum(parts(config, data, 0)[0].table_sizes) * config.features / 16)
    shared, law = [], []
    for seed in range(config.law_seeds):
        known = _law_signatures(config, data, seed)
        geometry = LmaGeometry(
            budget, config.features, keys_to_use=config.keys_to_use, key_bits=known.key_bits, seed=seed
        )
        slots = lma_slots(known.words[pairs[rows]], geometry)
        shared.append((slots[:, 0] == slots[:, 1]).mean())
        law.append(expected_sharing(similarity[rows], geometry).mean())
    apart = np.array(shared) - np.array(law)
    return {
        "pairs": len(rows),
        "jaccard": float(similarity[rows].mean()),
        "shared": float(np.mean(shared)),
        "law": float(np.mean(law)),
        "deviation": float(apart.mean()),
        "deviation_error": float(apart.std(ddof=1) / math.sqrt(len(apart))),
    }


def expected_sharing(jaccard: np.ndarray, geometry: LmaGeometry) -> np.ndarray:
    """Mean over coordinates of phi + (1 - phi) / budget, phi = (J + (1 - J) / 2**key_bits) ** distinct picks."""
    distinct = np.array([len(set(picks)) for picks in geometry.picks.tolist()])
    distinct = np.repeat(distinct, geometry.block_size)[: geometry.features]
    one_key = jaccard + (1 - jaccard) / 2**geometry.key_bits
    phi = one_key[:, None] ** distinct
    return (phi + (1 - phi) / geometry.budget).mean(axis=1)


# --- claims -----------------------------------------------------------------------------------------


def _of(rows: pl.DataFrame, part: str, data: str) -> pl.DataFrame:
    return rows.filter((pl.col("part") == part) & (pl.col("data") == data))


def _gain(rows: pl.DataFrame, data: str, a: str, b: str) -> Measured:
    """AUC of ``a`` less that of ``b``: the mean over compressions, a pair a seed."""
    means = _of(rows, "quality", data).group_by("method", "seed").agg(pl.col("auc").mean())
    return paired_difference(means, a, b, "auc", on=["seed"])


def _loss(rows: pl.DataFrame, data: str, compression: int) -> Measured:
    chosen = _of(rows, "quality", data).filter(pl.col("compression").is_in([1, compression]))
    return paired_difference(chosen, "lma", "full", "auc", on=["seed"])


def _deviation(rows: pl.DataFrame) -> Measured:
    chosen = rows.filter((pl.col("part") == "law") & (pl.col("pairs") > 0) & (pl.col("deviation_error") > 0))
    if chosen.is_empty():
        raise NotEnoughRows("no pairs whose sharing varies")
    z = (chosen["deviation"] / chosen["deviation_error"]).abs()
    worst = float(z.to_numpy().max())
    return Measured(worst, worst, worst, f"largest of {len(z)} classes of pairs")


def _claims(data: str) -> tuple[Claim, ...]:
    title = TITLES[data]
    return (
        Claim(
            f"gain-{data}",
            f"LMA gains at least 0.002 AUC on element hashing with as many weights, over 4x to 64x, on {title}",
            paper="0.003 AUC on average over the standard DLRM across memory regimes, Criteo and Avazu",
            measure=functools.partial(_gain, data=data, a="lma", b="element"),
            holds=lambda measured: measured.value >= 0.002 and measured.low > 0,
        ),
        Claim(
            f"loss-16x-{data}",
            f"With a sixteenth of the weights LMA loses at most 0.003 AUC against full tables on {title}",
            paper="the quality of full embeddings at 16x less memory",
            measure=functools.partial(_loss, data=data, compression=16),
            holds=lambda measured: measured.low >= -0.003,
        ),
        Claim(
            f"control-{data}",
            f"With its signatures shuffled over the values LMA does worse on {title}",
            paper="memory is shared in proportion to semantic similarity",
            measure=functools.partial(_gain, data=data, a="lma", b="shuffled"),
            holds=lambda measured: measured.low > 0,
            source="section 4",
        ),
        Claim(
            f"equal-bytes-{data}",
            f"LMA beats element hashing at equal bytes, its signatures counted, on {title}",
            paper="the memory that is compared does not hold the signatures",
            measure=functools.partial(_gain, data=data, a="lma", b="element_same_bytes"),
            holds=lambda measured: measured.low > 0,
        ),
    )


CLAIMS = (
    *itertools.chain.from_iterable(map(_claims, CLAIMED)),
    Claim(
        "sharing-law",
        "Values share as much of their rows as the law says at every similarity (deviation in standard errors)",
        paper="E f = Gamma, with Gamma = J^K for ideal keys",
        measure=_deviation,
        holds=lambda measured: measured.value < 4,
        source="theorem",
        unit="standard errors",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Bytes of the memory and of all that is stored, mean AUC and its standard error over seeds."""
    return (
        rows.filter(pl.col("part") == "quality")
        .group_by("data", "compression", "method", maintain_order=True)
        .agg(
            pl.col("memory_bytes").first(),
            pl.col("embedding_bytes").first().alias("bytes with signatures"),
            pl.len().alias("seeds"),
            pl.format(
                "{} ± {}",
                pl.col("auc").mean().round(4),
                (pl.col("auc").std() / pl.len().sqrt()).round(4),
            ).alias("test AUC"),
        )
        .sort("data", "compression", maintain_order=True)
        .with_columns(pl.col("method").replace(LABELS), pl.col("data").replace(TITLES))
    )


def figure(rows: pl.DataFrame) -> Figure:
    """For each data set AUC against all bytes stored, one standard error as bars; last, the law."""
    quality = rows.filter(pl.col("part") == "quality")
    names = quality["data"].unique(maintain_order=True).to_list()
    drawing, axes = new_figure(columns=len(names) + 1)
    for place, (data, ax) in enumerate(zip(names, axes, strict=False)):
        chosen = quality.filter(pl.col("data") == data)
        full = chosen.filter(pl.col("method") == "full")["auc"].to_numpy().mean()
        ax.axhline(full, color="0.4", linestyle="--", label=LABELS["full"])
        for method in PAIRED[:3] + OTHERS:  # at equal bytes a point of element hashing is one more on its line
            same = ["element", "element_same_bytes"] if method == "element" else [method]
            line = (
                chosen.filter(pl.col("method").is_in(same))
                .group_by("embedding_bytes")
                .agg(pl.col("auc").mean(), (pl.col("auc").std() / pl.len().sqrt()).fill_null(0).alias("error"))
                .sort("embedding_bytes")
            )
            x, y, error = (line[name].to_numpy() for name in ("embedding_bytes", "auc", "error"))
            ax.errorbar(x / 1024, y, error, marker="o", capsize=2, label=LABELS[method])
        ax.set(xscale="log", xlabel="KiB stored, with signatures", ylabel="test AUC", title=TITLES[data])
        if place == 0:
            ax.legend(fontsize="small")
    for data in names:
        law = rows.filter((pl.col("part") == "law") & (pl.col("data") == data) & (pl.col("pairs") > 0))
        x, y, expected = (law[name].to_numpy() for name in ("jaccard", "shared", "law"))
        axes[-1].scatter(x, y, label=TITLES[data])
        axes[-1].plot(x, expected, linestyle=":", color="0.4")
    axes[-1].set(xlabel="Jaccard index of two values' rows", ylabel="fraction of a row shared", title="the law")
    axes[-1].legend(fontsize="small")
    return drawing
