"""Context sparsity: what models lose when every query reads few tokens, by who names the tokens.

    python -m experiments run attention.context_sparsity     # about 7 minutes on 2 cores, once models are there

``decode``: the first half of a text, or a recall task without its questions, is read densely, and every later token
with sparse reads in all layers and heads (set-up B of the papers), at several sparsities: a query that sees n tokens
reads n / x, the first token and the last two among them. Perplexity is over the rest of the text, on the language
model ``f1`` and on stories that stories260K tells; of the recall model the share of right answers. Selectors are the
exact ones (``oracle``, ``top_p``), the last tokens (``streaming``), uniform draws that count for all (``random``),
six with an index, MagicPig, which samples by collisions, and vAttention over the oracle. SOCKET has as many bits for
each coordinate as 60 tables of 8 bits are for 128; ``hamming`` ranks by the same bits. Bits of index are those stored
for a token and key head; bytes count the index and the rows that are read, in float16. ``top_p`` and MagicPig choose
how much they read, and vAttention reads at most what others read on average.

``codec``: SOCKET at 5x over a cache of integers of 4 bits, beside that cache read whole.

``estimator``: error of the output with a budget of tokens on made-up heads, for flat and for peaked attention: the
best tokens, half of them and as many draws (``hybrid``), draws alone. ``guarantee``: how often vAttention's
denominator is off by more than it promises.

Speed is `experiments.attention.sparse_decode_speed`'s matter.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import polars as pl
from jaxtyping import Float
from matplotlib.figure import Figure

from experiments.attention.context_sparsity_cells import RANKED, SELECTORS, Cell, cells, scores, sparsities_of
from experiments.attention.context_sparsity_estimators import ESTIMATORS, errors, exceeded
from experiments.kvcache import fixtures
from experiments.kvcache.fixtures import Size
from experiments.lab import Claim, Measured, NotEnoughRows, Trial, highest, lowest, mean_interval, new_figure
from hashml.attention.oracle import OracleTopK
from hashml.attention.v_attention import VAttention

PAPER = (
    "Joshi, Dixit, Chowdhury, Shrivastava, Gonzalez, Stoica, Agrawal, Desai: Inference Time Context Sparsity: "
    "Illusion or Opportunity?, 2026, arXiv 2605.24168"
)
SYSTEM = "hashml.attention.selector_contract"
SIZE = dataclasses.replace(fixtures.DEFAULT, rows=8)


@dataclass(frozen=True)
class Config:
    """The defaults are those of the claims."""

    models: tuple[str, ...] = ("f1", "recall", "stories")
    methods: tuple[str, ...] = tuple(SELECTORS)
    sparsities: tuple[int, ...] = (2, 5, 10, 50)
    """Tokens seen over tokens read."""
    codecs: tuple[str, ...] = ("int4",)
    seeds: int = 3
    """Of models, each with planes, draws and learned maps of its own; of stories260K, of its stories."""
    size: Size = SIZE
    maps_steps: int = 300
    """Training steps of HashAttention's maps."""
    spreads: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Deviation of logits: the larger, the more peaked attention is."""
    budgets: tuple[int, ...] = (100, 400, 800)
    """Tokens read by estimators."""
    tokens: int = 4096
    width: int = 64
    queries: int = 64
    trials: int = 500
    draws: int = 5
    """Made-up heads."""


SCALES = {
    "tiny": Config(models=("f1",), methods=("random", "oracle", "double_sparsity"),
                   sparsities=(2, 5), seeds=2, size=fixtures.TINY, maps_steps=2, spreads=(0.5,), budgets=(16,),
                   tokens=64, width=8, queries=4, trials=10, draws=2),
    "default": Config(),
    "paper": Config(size=Size(rows=64, recall_rows=512), seeds=5, draws=20, queries=256),
}  # fmt: skip

PROMISE = VAttention(OracleTopK(), top_share=0.01, base=0.05, epsilon=0.1, delta=0.1, sides=2)
"""Errors of either sign by more than a tenth, in a tenth of all cases."""
PROMISE_TOKENS, PROMISE_WIDTH = 2048, 16


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config.models, config.methods, config.codecs):
        for seed in range(config.seeds):
            for sparsity in sparsities_of(cell, config.sparsities):
                yield Trial(_key("decode" if cell.codec is None else "codec", cell.method, seed, fixture=cell.fixture,
                                 codec=cell.codec, sparsity=sparsity),
                            functools.partial(_decoded, config, cell, seed, sparsity))  # fmt: skip
    for spread in config.spreads:
        for budget in config.budgets:
            for name in ESTIMATORS:
                for seed in range(config.draws):
                    yield Trial(_key("estimator", name, seed, spread=spread, budget=budget),
                                functools.partial(_error, config, name, spread, budget, seed))  # fmt: skip
        for seed in range(config.draws):
            yield Trial(_key("guarantee", "v_attention", seed, spread=spread),
                        functools.partial(_exceeded, config, spread, seed))  # fmt: skip


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    found = cells(config.models, config.methods, config.codecs)
    decode = sum(len(sparsities_of(cell, config.sparsities)) for cell in found) * config.seeds
    return decode + len(config.spreads) * config.draws * (len(config.budgets) * len(ESTIMATORS) + 1)


def _key(
    part: str, method: str, seed: int, *, fixture: str | None = None, codec: str | None = None,
    sparsity: int | None = None, spread: float | None = None, budget: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {"part": part, "fixture": fixture, "method": method, "codec": codec, "sparsity": sparsity,
            "spread": spread, "budget": budget, "seed": seed}  # fmt: skip


def _row(**measured: float | None) -> dict[str, float | None]:
    names = ("nll", "exact_nll", "accuracy", "exact_accuracy", "tokens_read", "tokens_seen", "index_bits",
             "bytes_share", "error")  # fmt: skip
    return dict.fromkeys(names) | measured


def _decoded(config: Config, cell: Cell, seed: int, sparsity: int | None) -> dict[str, float | None]:
    found = scores(config.size, cell, config.sparsities, seed, config.maps_steps)
    return _row(**found[sparsity])


@functools.lru_cache(maxsize=32)
def _errors(config: Config, spread: float, budget: int, seed: int) -> dict[str, float]:
    sizes = {"queries": config.queries, "tokens": config.tokens, "width": config.width}
    found = errors(jax.random.key(seed), jnp.float32(spread), budget=budget, **sizes)
    return {name: float(error) for name, error in found.items()}


def _error(config: Config, name: str, spread: float, budget: int, seed: int) -> dict[str, float | None]:
    return _row(error=_errors(config, spread, budget, seed)[name])


def _exceeded(config: Config, spread: float, seed: int) -> dict[str, float | None]:
    tokens = min(PROMISE_TOKENS, 4 * config.tokens)
    sizes = {"trials": config.trials, "tokens": tokens, "width": PROMISE_WIDTH}
    share, read = exceeded(jax.random.key(seed), jnp.float32(spread), selector=PROMISE, **sizes)
    return _row(error=float(share), tokens_read=float(read) * tokens, tokens_seen=float(tokens))


# --- claims -------------------------------------------------------------------------------------------


def _of(rows: pl.DataFrame, metric: str, **wanted: Any) -> Float[np.ndarray, " seeds"]:
    """The metric, seed by seed; parts are ``decode`` where nothing else is said."""
    wanted = {"part": "decode"} | wanted
    found = rows.filter([pl.col(name).eq_missing(pl.lit(value)) for name, value in wanted.items()]).sort("seed")
    if found.is_empty():
        raise NotEnoughRows(f"no rows of {', '.join(str(value) for value in wanted.values())}")
    return found[metric].cast(pl.Float64).to_numpy()


def _excess(rows: pl.DataFrame, method: str, sparsity: int | None, fixture: str = "f1") -> Measured:
    """Perplexity over that of exact attention, less 1."""
    wanted = {"method": method, "sparsity": sparsity, "fixture": fixture}
    over = _of(rows, "nll", **wanted) - _of(rows, "exact_nll", **wanted)
    return mean_interval(np.expm1(over), "models" if fixture == "f1" else "samples of stories")


def _lead(rows: pl.DataFrame, methods: tuple[str, ...], rival: str, sparsity: int, fixture: str = "f1") -> Measured:
    """Perplexity of a rival over that of a method, less 1: of the method where it is least."""
    found = []
    for method in methods:
        wanted = {"sparsity": sparsity, "fixture": fixture}
        over = _of(rows, "nll", method=rival, **wanted) - _of(rows, "nll", method=method, **wanted)
        cell = mean_interval(np.expm1(over), "models" if fixture == "f1" else "samples of stories")
        found.append(Measured(cell.value, cell.low, cell.high, f"least: {method}, {cell.note}"))
    return lowest(found)


def _leak(rows: pl.DataFrame) -> Measured:
    """Perplexity of a ranking by an index over the oracle's, less 1: where the index stands best."""
    found = []
    for fixture in ("f1", "stories"):
        for method in RANKED:
            for sparsity in (2, 5, 10):
                wanted = {"sparsity": sparsity, "fixture": fixture}
                over = _of(rows, "nll", method=method, **wanted) - _of(rows, "nll", method="oracle", **wanted)
                cell = mean_interval(np.expm1(over), "pairs")
                note = f"best: {method} at {sparsity}x on {fixture}, {cell.note}"
                found.append(Measured(cell.value, cell.low, cell.high, note))
    return min(found, key=lambda cell: cell.high)


def _forgotten(rows: pl.DataFrame, methods: tuple[str, ...], sparsity: int) -> Measured:
    """Share of right answers that sparse reads lose: of the method that loses most."""
    found = []
    for method in methods:
        wanted = {"fixture": "recall", "method": method, "sparsity": sparsity}
        cell = mean_interval(_of(rows, "exact_accuracy", **wanted) - _of(rows, "accuracy", **wanted), "models")
        found.append(Measured(cell.value, cell.low, cell.high, f"most: {method}, {cell.note}"))
    return highest(found)


def _compounding(rows: pl.DataFrame) -> Measured:
    """What SOCKET adds to the perplexity of a cache of int4, less what it adds to an exact one."""
    sparse, coded = (_of(rows, "nll", part="codec", method=name, codec="int4") for name in ("socket", "all"))
    exact = {"method": "socket", "sparsity": 5, "fixture": "f1"}
    alone = _of(rows, "nll", **exact) - _of(rows, "exact_nll", **exact)
    return mean_interval(np.expm1(sparse - coded) - np.expm1(alone), "models")


def _gap(rows: pl.DataFrame, spread: float, budget: int) -> Measured:
    """Error of the best tokens over that of the hybrid, less 1."""
    wanted = {"part": "estimator", "spread": spread, "budget": budget}
    first, second = (_of(rows, "error", method=name, **wanted) for name in ("oracle", "hybrid"))
    return mean_interval(first / second - 1, "heads")


def _broken(rows: pl.DataFrame) -> Measured:
    """Share of denominators off by more than promised: where it is largest."""
    found = []
    for spread in Config().spreads:
        cell = mean_interval(_of(rows, "error", part="guarantee", spread=spread), "heads")
        found.append(Measured(cell.value, cell.low, cell.high, f"most at deviation {spread}, {cell.note}"))
    return highest(found)


BLOG = "vAttention's blog"
EXPECTED = "reproduction"
CLAIMS = (
    *(
        Claim(
            f"oracle-{fixture}-{sparsity}",
            f"The best tokens by exact logits, {sparsity}x fewer, raise the perplexity of {words} by less than "
            f"{limit:.0%}",
            paper="relative accuracy above 99 % at 5x and 10x, 97 % at 50x; Qwen3.5-27B without loss up to 100x",
            measure=functools.partial(_excess, method="oracle", sparsity=sparsity, fixture=fixture),
            holds=lambda measured, limit=limit: measured.high < limit,
            source=BLOG,
        )
        for fixture, words in (("f1", "the language model"), ("stories", "stories260K"))
        for sparsity, limit in ((5, 0.01), (10, 0.01), (50, 0.03))
    ),
    *(
        Claim(
            f"order-{fixture}-{rival}",
            f"At 5x SOCKET, Quest and PQCache each have less perplexity than {words} on {fixture}",
            paper="oracle, then {SOCKET, Quest, PQCache}, then StreamingLLM and random draws",
            measure=functools.partial(
                _lead, methods=("socket", "quest", "pq_cache"), rival=rival, sparsity=5, fixture=fixture
            ),
            holds=lambda measured: measured.low > 0,
            source=EXPECTED,
        )
        for fixture in ("f1", "stories")
        for rival, words in (("streaming", "the last tokens"), ("random", "random draws"))
    ),
    Claim(
        "hamming",
        "At 5x SOCKET has less perplexity than agreeing bits of the same codes",
        paper="none; on made-up keys agreeing bits ranked better",
        measure=functools.partial(_lead, methods=("socket",), rival="hamming", sparsity=5),
        holds=lambda measured: measured.low > 0,
        source=EXPECTED,
    ),
    Claim(
        "no-leak",
        "No ranking by an index has less perplexity than the oracle's, at 2x to 10x",
        paper="none; a lower one would tell that the index knows the answer",
        measure=_leak,
        holds=lambda measured: measured.high >= 0,
        source=EXPECTED,
    ),
    Claim(
        "recall-oracle",
        "At 10x the best tokens by exact logits lose less than .02 of the recall model's right answers",
        paper="decode sparsity is tolerated with little loss",
        measure=functools.partial(_forgotten, methods=("oracle",), sparsity=10),
        holds=lambda measured: measured.high < 0.02,
    ),
    Claim(
        "recall-index",
        "At 5x SOCKET, Quest and PQCache each lose less than .05 of them",
        paper="SOCKET at 5 to 20 %: RULER's multikey_3 92 to 100",
        measure=functools.partial(_forgotten, methods=("socket", "quest", "pq_cache"), sparsity=5),
        holds=lambda measured: measured.high < 0.05,
        source="SOCKET's repository",
    ),
    Claim(
        "recall-streaming",
        "And the last tokens lose more than .5: recall tells who finds tokens",
        paper="none",
        measure=functools.partial(_forgotten, methods=("streaming",), sparsity=5),
        holds=lambda measured: measured.low > 0.5,
        source=EXPECTED,
    ),
    Claim(
        "codec",
        "SOCKET at 5x adds as much perplexity to a cache of int4 as to an exact one, within 1 %",
        paper="none",
        measure=_compounding,
        holds=lambda measured: measured.low > -0.01 and measured.high < 0.01,
        source=EXPECTED,
    ),
    *(
        Claim(
            f"crossover-{name}",
            f"For {words} (logits of deviation {spread:g}, {budget} of 4096 tokens) the best tokens alone have "
            f"{more} error than half of them and draws",
            paper=paper,
            measure=functools.partial(_gap, spread=spread, budget=budget),
            holds=(lambda measured: measured.low > 0) if more == "more" else (lambda measured: measured.high < 0),
            source=EXPECTED,
        )
        for name, words, spread, budget, more, paper in (
            ("flat", "flat attention", 0.5, 400, "more", "none; .266 against .116 in an earlier study"),
            ("peaked", "peaked attention and few tokens", 2.0, 100, "less", "none; .196 against .313"),
            ("many", "peaked attention and many tokens", 2.0, 800, "more", "none; .046 against .032"),
        )
    ),
    Claim(
        "guarantee",
        "vAttention's denominator is off by more than a tenth in at most 15 % of all cases, a tenth being promised",
        paper="epsilon = delta = .1",
        measure=_broken,
        holds=lambda measured: measured.high <= 0.15,
        source="vAttention's theorem",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over the models or heads: perplexity over that of exact attention, accuracy and that of exact attention,
    or error; beside what is read and stored."""
    quality = pl.coalesce("error", pl.when(pl.col("fixture") == "recall").then("accuracy").otherwise("excess"))
    return (
        _with_excess(rows)
        .group_by("part", "fixture", "method", "codec", "sparsity", "spread", "budget", maintain_order=True)
        .agg(
            pl.col("excess").mean().alias("perplexity over exact"),
            pl.when(pl.col("fixture") == "recall").then("accuracy").mean().alias("accuracy"),
            pl.when(pl.col("fixture") == "recall").then("exact_accuracy").mean().alias("exact accuracy"),
            pl.col("error").mean(),
            (quality.std() / pl.len().sqrt()).alias("standard error"),
            (pl.col("tokens_seen") / pl.col("tokens_read")).mean().alias("sparsity, realised"),
            pl.col("index_bits").first().alias("bits of index"),
            pl.col("bytes_share").mean().alias("bytes over dense"),
        )
    )


def _with_excess(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns((pl.col("nll") - pl.col("exact_nll")).exp().sub(1).alias("excess"))


def figure(rows: pl.DataFrame) -> Figure:
    """Quality against sparsity, a panel a model; errors of estimators against the deviation of logits."""
    rows = _with_excess(rows)
    models = rows.filter(pl.col("part") == "decode")["fixture"].unique(maintain_order=True).to_list()
    drawing, axes = new_figure(columns=len(models) + 1, height=5)
    every = rows.filter(pl.col("part") == "decode")["method"].unique(maintain_order=True).to_list()
    colours = dict(zip(every, mpl.colormaps["tab20"](np.arange(len(every)) % 20), strict=True))
    for ax, fixture in zip(axes, models, strict=False):
        part = rows.filter(pl.col("part").eq("decode") & pl.col("fixture").eq(fixture))
        quality = "accuracy" if fixture == "recall" else "excess"
        for method in part["method"].unique(maintain_order=True):
            points = (
                part.filter(pl.col("method") == method)
                .group_by("sparsity")
                .agg((pl.col("tokens_seen") / pl.col("tokens_read")).mean().alias("x"), pl.col(quality).mean())
                .sort("x")
            )
            ax.plot(points["x"], points[quality], marker="o", markersize=3, label=method.replace("_", " "),
                    color=colours[method])  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set(xlabel="tokens seen over tokens read", title=fixture,
               ylabel="right answers" if fixture == "recall" else "perplexity over exact, less 1")  # fmt: skip
        if fixture != "recall":
            ax.set_yscale("symlog", linthresh=0.01)
            ax.set_ylim(bottom=min(-0.005, ax.dataLim.ymin))
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="x-small")
    part = rows.filter(pl.col("part") == "estimator")
    for style, budget in zip(("-", "--", ":"), part["budget"].unique().sort(), strict=False):
        for place, name in enumerate(ESTIMATORS):
            points = part.filter(pl.col("method").eq(name) & pl.col("budget").eq(budget))
            means = points.group_by("spread").agg(pl.col("error").mean()).sort("spread")
            axes[-1].plot(means["spread"], means["error"], linestyle=style, color=f"C{place}", marker="o",
                          markersize=3, label=f"{name}, {budget}")  # fmt: skip
    axes[-1].set(yscale="log", xlabel="deviation of logits", ylabel="relative error", title="estimators")
    axes[-1].legend(fontsize="x-small")
    return drawing
