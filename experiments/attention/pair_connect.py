"""PairConnect against attention: what a table of pairs can say, and the perplexity and the cost of a language model.

    python -m experiments run attention.pair_connect

*Contains*: a table is filled with a random attention head, and must give its outputs. *Beyond*: the share of a random
function of pairs that no head of that width can hold. *Characters*: models of tiny Shakespeare with the same
perceptrons, in which a token learns of others by pairs, by attention, or not at all. Attention stands beside
PairConnect at its width, at its window, at its FLOPs and at its stored bytes, each with a learning rate of its own.
*Words*: WikiText-2 in words, where pairs must be hashed; at the scale ``paper`` alone. The system is a reconstruction
from the paper's abstract, and so are the sizes here. Controls: one token alone, a window of two tokens, and counts of
trigrams, which store a number a triple. A hashed memory is trained at the rate that the whole table chose, and the
hash is the same for all seeds. The models of the default scale are some hundred steps old, which favours look-ups:
attention has to find first where to look. The scale ``paper`` trains them longer.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import polars as pl
from jaxtyping import Array
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from experiments.attention.pair_connect_models import Sizes
from experiments.attention.pair_connect_training import characters, counts, outcomes, words
from experiments.attention.race_training import Plan
from experiments.lab import Claim, Measured, NotEnoughRows, Trial, mean_interval, new_figure, paired_difference
from hashml.attention.pair_connect import attention_pair_table, pair_attention

PAPER = "Xu, Yan, Zhang, Shrivastava: PairConnect: A Compute-Efficient MLP Alternative to Attention, arXiv 2106.08235"
SYSTEM = "hashml.attention.pair_connect"


@dataclass(frozen=True)
class Config:
    """Two perceptrons of width 64, a window of 32 and pairs of 16 numbers, on tiny Shakespeare."""

    characters: tuple[str, ...] = ("none", "bigram", "counts", "pairs", "pairs-2^15", "pairs-2^13", "pairs-2^11",
                                   "pairs-2^9", "attention", "attention-window", "attention-flops",
                                   "attention-bytes")  # fmt: skip
    words: tuple[str, ...] = ()
    vocabulary: int = 8192
    """Of the words."""
    context: int = 128
    steps: int = 450
    batch_size: int = 8
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Of Adam, for all dense parameters."""
    held_out: int = 192
    """Sequences of the validation and of the test part."""
    features: int = 64
    pair_features: int = 16
    window: int = 32
    head_tokens: int = 64
    """Length of the sequences on which a table of pairs is compared with a head."""
    seeds: int = 3


SCALES = {
    "tiny": Config(characters=("counts", "pairs-2^9", "pairs"), words=("attention-bytes",), vocabulary=32, context=16,
                   steps=2, batch_size=2, learning_rates=(0.003, 0.01), held_out=8, features=8, pair_features=4,
                   window=4, head_tokens=8, seeds=2),
    "default": Config(),
    "paper": Config(words=("none", "bigram", "pairs", "pairs-2^20", "pairs-2^16", "pairs-2^14", "attention",
                           "attention-window", "attention-flops"),
                    context=256, steps=4000, batch_size=32, pair_features=64),
}  # fmt: skip

WORDS, HEAD_WIDTH = 16, 4
"""Vocabulary and width of the head that a table must contain."""


def run(config: Config) -> Iterator[Trial]:
    for task, measure in (("contains", _contains), ("beyond", _beyond)):
        for seed in range(config.seeds):
            yield Trial(_key(task, "pairs", seed), functools.partial(measure, config, seed))
    for task, methods in (("characters", config.characters), ("words", config.words)):
        for method in methods:
            for seed in range(config.seeds):
                yield Trial(_key(task, method, seed), functools.partial(_measure, config, task, method, seed))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return config.seeds * (2 + len(config.characters) + len(config.words))


def _key(task: str, method: str, seed: int) -> dict[str, Any]:
    return {"task": task, "method": method, "seed": seed}


# --- what a table can say -----------------------------------------------------------------------------


def _contains(config: Config, seed: int) -> dict[str, float]:
    """The largest deviation of a filled table's outputs from a causal head's."""
    rng = np.random.default_rng(seed)
    queries, keys, values = rng.standard_normal((3, WORDS, HEAD_WIDTH)).astype(np.float32)
    ids = rng.integers(0, WORDS, config.head_tokens)
    logits = (queries.astype(np.float64) @ keys.T / np.sqrt(HEAD_WIDTH))[ids[:, None], ids]
    heavy = np.tril(np.exp(logits))
    right = heavy @ values[ids] / heavy.sum(axis=1, keepdims=True)
    return {"value": float(np.abs(np.asarray(_filled(queries, keys, values, ids.astype(np.int32))) - right).max())}


@jax.jit
def _filled(queries: Array, keys: Array, values: Array, ids: Array) -> Array:
    table = attention_pair_table(queries, keys, values)
    return pair_attention(table, ids, jnp.zeros(ids.shape[0]), vocabulary=WORDS, relative=False)


def _beyond(config: Config, seed: int) -> dict[str, float]:
    """Of Gaussian logits of pairs, the share (of the root mean square) that is left of the best head's.

    A softmax is blind to a constant a row, so means are taken off; what remains a head holds up to its rank, and
    best by the largest singular values (Eckart and Young). A table holds all of it.
    """
    del config
    logits = np.random.default_rng(seed).standard_normal((WORDS, WORDS))
    singular = np.linalg.svd(logits - logits.mean(axis=1, keepdims=True), compute_uv=False)
    return {"value": float(np.sqrt(np.sum(singular[HEAD_WIDTH:] ** 2) / np.sum(singular**2)))}


# --- the models ---------------------------------------------------------------------------------------


def _measure(config: Config, task: str, method: str, seed: int) -> dict[str, Any]:
    if method == "counts":
        row = counts(_text(config, task), _plan(config), seed)
    else:
        row = trained(config, task, method)[seed]
    return row | {"perplexity": float(np.exp(row["value"]))}


@functools.cache
def trained(config: Config, task: str, method: str) -> list[dict[str, Any]]:
    """The rows of all seeds of a method."""
    text, plan = _text(config, task), _plan(config)
    if method.startswith("pairs-") and len(plan.learning_rates) > 1:
        plan = plan._replace(learning_rates=(trained(config, task, "pairs")[0]["learning_rate"],))
    sizes = Sizes(text.vocabulary, config.context, config.features, pair_features=config.pair_features,
                  window=config.window)  # fmt: skip
    return outcomes(sizes, method, text.parts, plan)


def _plan(config: Config) -> Plan:
    return Plan(config.steps, config.batch_size, config.learning_rates, config.seeds)


def _text(config: Config, task: str) -> Any:
    if task == "characters":
        return characters(config.context, config.held_out)
    return words(config.context, config.held_out, config.vocabulary)


# --- claims -------------------------------------------------------------------------------------------

LAST_STEP = "reproduction at small scale"


def _task(rows: pl.DataFrame, task: str) -> pl.DataFrame:
    part = rows.filter(pl.col("task") == task)
    if part.is_empty():
        raise NotEnoughRows(f"no {task} at this scale")
    return part


def _useful(rows: pl.DataFrame, task: str) -> pl.DataFrame:
    """The rows of a task in which attention is worth having.

    Raises:
        NotEnoughRows: where it has not less loss than one token alone.
    """
    part = _task(rows, task)
    gain = paired_difference(part, "none", "attention", "value", on="seed")
    if not gain.low > 0:
        raise NotEnoughRows(f"attention is not below one token alone: {gain.value:.3f} nats")
    return part


def _largest(rows: pl.DataFrame) -> Measured:
    values = _task(rows, "contains")["value"].to_numpy()
    return Measured(float(values.max()), float(values.min()), float(values.max()), f"largest of {values.size} heads")


def _share(rows: pl.DataFrame) -> Measured:
    return mean_interval(_task(rows, "beyond")["value"], "functions")


def _excess(rows: pl.DataFrame, task: str, peer: str) -> Measured:
    """Perplexity of PairConnect over that of ``peer``, less 1."""
    part = _useful(rows, task)
    found = [part.filter(pl.col("method") == name).sort("seed")["perplexity"] for name in ("pairs", peer)]
    if not found[0].len() or found[0].len() != found[1].len():
        raise NotEnoughRows(f"no pairs of pairs and {peer}")
    return mean_interval((found[0] / found[1] - 1).to_numpy(), "seeds")


def _gain(rows: pl.DataFrame, task: str, peer: str, method: str = "pairs") -> Measured:
    """Loss of ``peer`` less that of ``method``."""
    return paired_difference(_task(rows, task), peer, method, "value", on="seed")


def _cost_ratio(rows: pl.DataFrame) -> Measured:
    part = _task(rows, "characters")
    flops = [part.filter(pl.col("method") == name)["flops"].to_list() for name in ("attention", "pairs")]
    if not flops[0] or not flops[1]:
        raise NotEnoughRows("no rows of attention and pairs")
    ratio = flops[0][0] / flops[1][0]
    return Measured(ratio, ratio, ratio, "counted, for the last token of a sequence")


def _memories(rows: pl.DataFrame, task: str) -> list[str]:
    """Hashed memories, the largest first."""
    names = _task(rows, task)["method"].unique().to_list()
    found = sorted((name for name in names if name.startswith("pairs-")), key=lambda n: -int(n[8:]))
    if len(found) < 2:
        raise NotEnoughRows("fewer than two hashed memories")
    return found


def _sixteenth(rows: pl.DataFrame, task: str) -> Measured:
    """What the largest cut to a sixteenth costs; where it costs most is not looked for."""
    found = _memories(rows, task)
    smaller = f"pairs-2^{int(found[0][8:]) - 4}"
    if smaller not in found:
        raise NotEnoughRows(f"no rows of {smaller}")
    measured = _gain(rows, task, smaller, found[0])
    return Measured(measured.value, measured.low, measured.high, f"{found[0]} to {smaller}, {measured.note}")


def _cliff(rows: pl.DataFrame, task: str) -> Measured:
    """The largest rise of the loss from a memory to the next smaller one, over that from the first to the last."""
    found = _memories(rows, task)
    part = _task(rows, task)
    losses = np.stack([part.filter(pl.col("method") == name).sort("seed")["value"].to_numpy() for name in found])
    whole = losses[-1] - losses[0]
    if not (whole > 0).all():
        raise NotEnoughRows("the smallest memory is not the worst")
    steps = [mean_interval(step / whole, "seeds") for step in np.diff(losses, axis=0)]
    worst = max(range(len(steps)), key=lambda at: steps[at].value)
    note = f"{found[worst]} to {found[worst + 1]}, {steps[worst].note}"
    return Measured(steps[worst].value, steps[worst].low, steps[worst].high, note)


CLAIMS = (
    Claim(
        "contains",
        "A table filled with an attention head gives its outputs to 1e-5",
        paper="an MLP with pairwise embeddings is strictly more expressive than the Transformer",
        measure=_largest,
        holds=lambda measured: measured.high <= 1e-5,
    ),
    Claim(
        "beyond",
        "A random function of pairs of 16 words has a part that no head of width 4 holds; a table holds all of it",
        paper="strictly more expressive",
        measure=_share,
        holds=lambda measured: measured.low > 0,
    ),
    *(
        Claim(
            f"{task}-{name}",
            f"On {task}, PairConnect's perplexity is at most {percent} % above that of {words_}",
            paper="about the quality of the Transformer at a much lower cost of inference; no number",
            measure=functools.partial(_excess, task=task, peer=peer),
            holds=functools.partial(lambda limit, measured: measured.high < limit, percent / 100),
            source=source,
        )
        for task, name, percent, peer, words_, source in (
            ("characters", "near", 15, "attention", "a Transformer of its width", "abstract"),
            (
                "characters",
                "gap",
                25,
                "attention",
                "a Transformer of its width, else the reproduction failed",
                LAST_STEP,
            ),
            ("characters", "window", 15, "attention-window", "attention with the same window", LAST_STEP),
            ("characters", "flops", 0, "attention-flops", "a Transformer of equal FLOPs", LAST_STEP),
            ("characters", "bytes", 0, "attention-bytes", "a Transformer of equal stored bytes", LAST_STEP),
            ("words", "gap", 25, "attention", "a Transformer of its width, else the reproduction failed", LAST_STEP),
        )
    ),
    Claim(
        "cheaper",
        "It needs at most half of the FLOPs of the Transformer of its width, perceptrons and output layer included",
        paper="a much lower cost of inference; no number",
        measure=_cost_ratio,
        holds=lambda measured: measured.low >= 2,
    ),
    *(
        Claim(
            f"characters-{name}",
            f"On characters, PairConnect has less loss than {words_}",
            paper="none",
            measure=functools.partial(_gain, task="characters", peer=name),
            holds=functools.partial(lambda limit, measured: measured.low > limit, limit),
            source=LAST_STEP,
            unit="nats",
        )
        for name, limit, words_ in (
            ("none", 0.1, "the same model without pairs, by 0.1 nats"),
            ("bigram", 0.0, "with a window of two tokens"),
            ("counts", 0.0, "counts of trigrams, which need no training and no product"),
        )
    ),
    *(
        Claim(
            f"{task}-memory",
            f"On {task}, a sixteenth of the hashed memory has more loss: the pairs are used",
            paper="none",
            measure=functools.partial(_sixteenth, task=task),
            holds=lambda measured: measured.low > 0,
            source=LAST_STEP,
            unit="nats",
        )
        for task in ("characters", "words")
    ),
    Claim(
        "characters-smooth",
        "Hashed memories degrade smoothly: no cut to a quarter costs three quarters of what all cuts cost",
        paper="none",
        measure=functools.partial(_cliff, task="characters"),
        holds=lambda measured: measured.high < 0.75,
        source=LAST_STEP,
    ),
)


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Loss in nats a token, or the deviation, or the share: mean and standard error over the seeds, beside costs."""
    return rows.group_by("task", "method", maintain_order=True).agg(
        pl.col("value").mean(),
        (pl.col("value").std() / pl.len().sqrt()).alias("standard error"),
        pl.col("perplexity").mean(),
        *(pl.col(name).first() for name in ("learning_rate", "features", "bytes", "flops", "bytes_looked_up")),
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Perplexity against FLOPs and against stored bytes."""
    drawing, axes = new_figure(columns=2, height=4.2)
    part = rows.filter(pl.col("task") == "characters")
    means = part.group_by("method", maintain_order=True).agg(
        pl.col("perplexity").mean(), pl.col("flops").first(), pl.col("bytes").first()
    )
    colours = mpl.colormaps["tab20"](np.linspace(0, 1, 20))
    for ax, cost, title in ((axes[0], "flops", "FLOPs a token"), (axes[1], "bytes", "bytes stored")):
        for at, (name, perplexity, *costs) in enumerate(means.iter_rows()):
            spent = costs[0] if cost == "flops" else costs[1]
            if not spent:  # counts need no product
                ax.axhline(perplexity, color="0.6", linestyle=":", label=name)
                continue
            marker = "o" if name.startswith(("pairs", "bigram")) else "s" if name.startswith("attention") else "x"
            ax.plot([spent], [perplexity], marker, color=colours[at], label=name)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.set(xlabel=title, ylabel="perplexity", title="Tiny Shakespeare, characters")
    memories = [(int(name[8:]), p, b) for name, p, _, b in means.iter_rows() if name.startswith("pairs-")]
    for (_, *one), (_, *other) in itertools.pairwise(sorted(memories)):
        axes[1].plot([one[1], other[1]], [one[0], other[0]], color="0.7", linewidth=1, zorder=0)
    drawing.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return drawing
