"""SOCKET: how well soft collisions rank keys, beside what else the same bits, or as many, can do.

    python -m experiments run attention.socket               # about 6 minutes on 2 cores, once models are there

Four parts. ``keys``: made-up heads 64 wide of 8192 keys at the default scale, of which 256 are read: independent
normal keys, keys in clusters, keys with a common part. ``heads``: queries, keys and values of trained models at 5, 10
and 20 % of the keys that a query sees, the first and the last two always among them; every model is exact elsewhere.
Indexes have as many bits for each coordinate as 60 tables of 8 bits are for 128. ``loss``: perplexity of the language
model when every layer decodes sparsely after a dense half of the text. ``bytes``: what the index of a head of 128
stores.

The controls score the same codes otherwise: tables that collide (``hard``), bits that agree (``hamming``), signs
times the query's projections (``asymmetric``); each with the lengths of values in the score, as the paper has it,
without (``-plain``), and without and with the mean key taken off (``-centred``). Of about as many bits are Quest's
pages, and keys of 4 or 2 bits a coordinate with a scale of their own (``int4``, ``int2``). Tables of other sizes have
480 bits in all, but codes are stored in bytes: the column of bits says what is stored. A run draws keys, or takes a
model, and planes with its seed, for all rankings alike.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.attention.context_sparsity_decode import decoded
from experiments.attention.socket_cells import (
    SETUPS,
    TABLES,
    TEMPERATURES,
    WIDTH,
    bits_of,
    head_quality,
    head_rankings,
    made_up,
    quality,
    ranking,
    synthetic_rankings,
    tables_of,
)
from experiments.attention.socket_claims import CLAIMS as CLAIMS
from experiments.attention.socket_claims import SHARES
from experiments.kvcache import fixtures
from experiments.kvcache.fixtures import Size
from experiments.lab import Trial, new_figure

PAPER = (
    "Joshi, Chowdhury, Bellinger, Kanakamedala, Singh, Le, Desai, Shrivastava: SOCKET: SOft Collision Kernel "
    "EsTimator for Sparse Attention, 2026, arXiv 2602.06283"
)
SYSTEM = "hashml.attention.socket"
SIZE = dataclasses.replace(fixtures.DEFAULT, rows=8, recall_rows=32)
METRICS = ("recall", "recall_logits", "mass", "error", "correlation")


@dataclass(frozen=True)
class Config:
    """The defaults are those of the claims."""

    setups: tuple[str, ...] = SETUPS
    rankings: tuple[str, ...] = synthetic_rankings()
    tokens: int = 8192
    width: int = 64
    read: int = 256
    """Keys of made-up heads that are read."""
    queries: int = 32
    draws: int = 3
    """Of made-up heads and their planes."""
    models: tuple[str, ...] = ("f1", "recall", "stories")
    head_rankings: tuple[str, ...] = head_rankings()
    loss: tuple[str, ...] = ("oracle", "socket", "socket-plain", "hard", "hamming-plain", "asymmetric-plain")
    seeds: int = 3
    """Of models, each with planes of its own; of stories260K, of its stories."""
    size: Size = SIZE


SCALES = {
    "tiny": Config(setups=("gaussian",), rankings=("socket-plain", "hard-plain"), tokens=64, width=8, read=8,
                   queries=4, draws=2, models=("f1",), head_rankings=("oracle", "socket"), loss=("socket",), seeds=2,
                   size=fixtures.TINY),
    "default": Config(),
    "paper": Config(draws=10, queries=256, seeds=5, size=Size(rows=64, recall_rows=512)),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for setup in config.setups:
        for name in config.rankings:
            for seed in range(config.draws):
                share = config.read / config.tokens
                yield Trial(_key("keys", setup, name, share, seed),
                            functools.partial(_made_up, config, setup, name, seed))  # fmt: skip
    for fixture in config.models:
        for name in config.head_rankings:
            for seed in range(config.seeds):
                for share in SHARES:
                    yield Trial(_key("heads", fixture, name, share, seed),
                                functools.partial(_heads, config, fixture, name, share, seed))  # fmt: skip
    for name in config.loss:
        for seed in range(config.seeds):
            for share in SHARES:
                yield Trial(_key("loss", "f1", name, share, seed),
                            functools.partial(_loss, config, name, share, seed))  # fmt: skip
    for name in ("socket", "int4"):
        yield Trial(_key("bytes", None, name, None, None), functools.partial(_bytes, name))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    heads = len(config.models) * len(config.head_rankings) + len(config.loss)
    return len(config.setups) * len(config.rankings) * config.draws + heads * config.seeds * len(SHARES) + 2


def _key(part: str, data: str | None, method: str, share: float | None, seed: int | None) -> dict[str, Any]:
    return {"part": part, "data": data, "method": method, "share": share, "seed": seed}


def _row(**measured: float | None) -> dict[str, float | None]:
    return dict.fromkeys((*METRICS, "index_bits", "nll", "exact_nll")) | measured


def _made_up(config: Config, setup: str, name: str, seed: int) -> dict[str, float | None]:
    heads = _drawn(setup, seed, config.queries, config.tokens, config.width)
    selector = ranking(name, TABLES, config.width)
    shares = (config.read / config.tokens,)
    found = quality(selector, heads, jax.random.key(seed), shares=shares, sinks=0, window=0)
    measured = {metric: float(value[0]) for metric, value in found._asdict().items()}
    # Values are drawn without regard to keys: the exact output is near zero, and errors say nothing.
    return _row(**measured | {"error": None, "index_bits": bits_of(selector, config.width)})


@functools.lru_cache(maxsize=4)
def _drawn(setup: str, seed: int, queries: int, tokens: int, width: int) -> Any:
    drawn = jax.random.fold_in(jax.random.key(seed), SETUPS.index(setup))
    return made_up(drawn, setup, queries=queries, tokens=tokens, width=width)


@functools.lru_cache(maxsize=4)
def _of_model(config: Config, fixture: str, name: str, seed: int) -> list[dict[str, float | None]]:
    found, bits = head_quality(config.size, fixture, seed, name, SHARES)
    columns = {metric: np.asarray(value) for metric, value in found._asdict().items()}
    return [
        _row(index_bits=bits, **{metric: float(value[at]) for metric, value in columns.items()})
        for at in range(len(SHARES))
    ]


def _heads(config: Config, fixture: str, name: str, share: float, seed: int) -> dict[str, float | None]:
    return _of_model(config, fixture, name, seed)[SHARES.index(share)]


@functools.lru_cache(maxsize=4)
def _decoded(config: Config, name: str, seed: int) -> list[dict[str, float]]:
    width = fixtures.setting(config.size, "f1", "prompt").decoder.head_dim
    return decoded(config.size, "f1", seed, ranking(name, tables_of(width), width), SHARES)


def _loss(config: Config, name: str, share: float, seed: int) -> dict[str, float | None]:
    found = _decoded(config, name, seed)[SHARES.index(share)]
    return _row(nll=found["nll"], exact_nll=found["exact_nll"])


def _bytes(name: str) -> dict[str, float | None]:
    return _row(index_bits=bits_of(ranking(name, TABLES, WIDTH), WIDTH))


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over draws or models. The standard error is of the recall of ``weight |v|``, or of the perplexity over
    that of exact attention."""
    return (
        _with_excess(rows)
        .group_by("part", "data", "method", "share", maintain_order=True)
        .agg(
            pl.col("index_bits").first().alias("bits of index"),
            pl.col("recall").mean().alias("recall, weight |v|"),
            pl.col("recall_logits").mean().alias("recall, logits"),
            pl.col("mass").mean(),
            pl.col("error").mean(),
            pl.col("correlation").mean().alias("correlation of ranks"),
            pl.col("excess").mean().alias("perplexity over exact"),
            (pl.coalesce("recall", "excess").std() / pl.len().sqrt()).alias("standard error"),
        )
    )


def _with_excess(rows: pl.DataFrame) -> pl.DataFrame:
    excess = (pl.col("nll").cast(pl.Float64) - pl.col("exact_nll").cast(pl.Float64)).exp() - 1
    return rows.with_columns(excess.alias("excess"))


def figure(rows: pl.DataFrame) -> Figure:
    """Recall against temperature on made-up keys, with the controls as lines; error on trained heads, with bits."""
    drawing, axes = new_figure(columns=2, height=4.4, width=11)
    part = rows.filter(pl.col("part").eq("keys"))
    for place, setup in enumerate(part["data"].unique(maintain_order=True)):
        means = dict(
            part.filter(pl.col("data") == setup).group_by("method").agg(pl.col("recall_logits").mean()).iter_rows()
        )
        curve = sorted([(0.3, means["socket-plain"])] + [(tau, means[f"socket-plain:{tau:g}"]) for tau in TEMPERATURES
                                                         if f"socket-plain:{tau:g}" in means])  # fmt: skip
        axes[0].plot(*zip(*curve, strict=True), marker="o", color=f"C{place}", label=f"SOCKET, {setup}")
        for style, name in (("--", "hamming-plain"), (":", "hard-plain")):
            if name in means:
                axes[0].axhline(means[name], color=f"C{place}", linestyle=style, linewidth=1,
                                label=f"{name.removesuffix('-plain')}, {setup}")  # fmt: skip
    axes[0].set(xscale="log", xlabel="temperature", ylabel="recall of the largest logits", title="Made-up keys",
                ylim=(0, 1))  # fmt: skip
    axes[0].legend(fontsize="x-small")
    heads = rows.filter(pl.col("part").eq("heads") & pl.col("share").eq(0.1))
    first = heads.filter(pl.col("data") == pl.col("data").first())
    shown = (
        first.filter(~pl.col("method").str.contains(":") | pl.col("method").str.starts_with("quest"))
        .group_by("method", maintain_order=True)
        .agg(pl.col("index_bits").first(), pl.col("error").mean())
        .sort("error", descending=True)
    )
    colours = ["C1" if name.startswith("socket") else "0.4" for name in shown["method"]]
    axes[1].scatter(shown["error"], range(len(shown)), s=18, color=colours)
    labels = [f"{name}, {bits:.0f} bits" for name, bits, _ in shown.iter_rows()]
    axes[1].set_yticks(range(len(shown)), labels, fontsize="x-small")
    axes[1].set(xlabel="relative error", title="Trained heads, 10 % of the keys")
    return drawing
