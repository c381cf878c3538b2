"""Compress, then prompt: how much of what compression costs does a learned prompt bring back, and is it recovery?

    python -m experiments run weights.prompt_recovery      # about 20 minutes on 2 cores, once the models f1 are there

f1, a language model of WikiText-2, is rounded to 3 or 2 bits a weight, solved by GPTQ at 3 bits, pruned by magnitude
to one half, or pruned and rounded to 4 bits: nominally an eighth of its bytes. A prompt of 32 rows is learned on
each frozen model from WikiText-2's training text, 500 batches of 8 pieces of 64 bytes, the learning rate chosen in
100 steps on validation text. Beside it stand the control that decides, the same prompt on the *full* model; adapters
of as many floats beside queries and values (LoRA); a hard prompt, the best of 4 pieces of training text; and a prompt
as it was before training. Prompts are then put before every other model, and some are learned on tiny Shakespeare.

All losses are means over the same real tokens. ``diluted`` is what the paper's released evaluation would print, whose
mean runs over the prompt's places, too: it falls whatever the prompt says. A prompt takes 32 tokens of a context of
256 and their keys and values; adapters take none. The paper has 100 rows, 30,000 steps, LLaMA of 7 B and C4.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.kvcache import fixtures
from experiments.lab import Claim, Measured, NotEnoughRows, Trial, lowest, mean_interval, new_figure
from experiments.weights.prompt_recovery_cells import AWAY, FULL, HOME, Config, cells, scores
from hashml.weights.prompt_recovery import recovered_fraction

PAPER = (
    "Xu, Liu, Chen, Zhong, Tang, Wang, Zhou, Hu, Shrivastava: Soft Prompt Recovers Compressed LLMs, Transferably "
    "(Compress, Then Prompt), ICML 2024, arXiv 2305.11186"
)
SYSTEM = "hashml.weights.prompt_recovery"
SCALES = {
    "tiny": Config(compressions=("rtn2", "prune50"), prompt_tokens=4, short_models=(),
                   away_models=("rtn2",), hard=2, steps=2, search_steps=1, batch_size=2, sequence=16, scored=4,
                   prompt_rates=(1e-2, 3e-2), adapter_rates=(1e-3,), seeds=2, size=fixtures.TINY),
    "default": Config(),
    "paper": Config(prompt_tokens=96, steps=20_000, search_steps=500, batch_size=16, sequence=128, seeds=5),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config):
        for seed in range(config.seeds):
            yield Trial(dataclasses.asdict(cell) | {"seed": seed}, functools.partial(scores, config, cell, seed))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return config.seeds * len(cells(config))


# --- claims -------------------------------------------------------------------------------------------


def losses(
    rows: pl.DataFrame,
    model: str,
    method: str = "prompt",
    *,
    source: str | None = None,
    learned_on: str = HOME,
    short: bool = False,
    metric: str = "nll",
) -> np.ndarray:
    """Losses by seed; of a prompt of the model itself, if no source is named."""
    found = rows.filter(pl.col("model").eq(model), pl.col("method").eq(method))
    if method == "prompt":
        found = found.filter(pl.col("source").eq(source or model), pl.col("learned_on").eq(learned_on))
    if not found.is_empty():
        lengths = found["prompt_tokens"]
        found = found.filter(pl.col("prompt_tokens").eq(lengths.min() if short else lengths.max()))
    if found.is_empty():
        raise NotEnoughRows(f"no rows of {model} with {method} of {source or model}, learned on {learned_on}")
    return found.sort("seed")[metric].to_numpy()


def gain(rows: pl.DataFrame, model: str, **options: Any) -> np.ndarray:
    """Nats that something takes off the loss of a model, by seed."""
    metric = options.get("metric", "nll")
    return losses(rows, model, "none", metric=metric) - losses(rows, model, **options)


def _compressions(rows: pl.DataFrame) -> list[str]:
    return [name for name in rows["model"].unique(maintain_order=True) if name != FULL]


def _least(found: dict[str, np.ndarray]) -> Measured:
    """The mean that is lowest, with its interval over models f1."""
    cells = []
    for name, values in found.items():
        measured = mean_interval(values, "models")
        cells.append(Measured(measured.value, measured.low, measured.high, f"least: {name}, {measured.note}"))
    return lowest(cells)


def fractions(rows: pl.DataFrame, model: str, **options: Any) -> np.ndarray:
    """Recovered fractions by seed; NaN where compression cost nothing."""
    triples = zip(
        losses(rows, FULL, "none"), losses(rows, model, "none"), losses(rows, model, **options), strict=True
    )
    return np.array([recovered_fraction(*map(float, each)) if each[1] > each[0] else np.nan for each in triples])


def _recovered(rows: pl.DataFrame) -> Measured:
    return _least({name: fractions(rows, name) for name in _compressions(rows)})


def _beyond_control(rows: pl.DataFrame) -> Measured:
    """Nats gained on a compressed model less those that its own prompt gains on the full one."""
    return _least({name: gain(rows, name) - gain(rows, FULL) for name in _compressions(rows)})


def _between(rows: pl.DataFrame, more: str, less: str) -> Measured:
    return mean_interval(gain(rows, more) - gain(rows, less), "models")


def _over_full(rows: pl.DataFrame, model: str) -> Measured:
    return mean_interval(losses(rows, model) - losses(rows, FULL, "none"), "models")


def _transferred(rows: pl.DataFrame, source: str, model: str) -> Measured:
    """Gain of another model's prompt over that of the model's own."""
    return mean_interval(gain(rows, model, source=source) / gain(rows, model), "models")


def _other_text(rows: pl.DataFrame, learned_on: str, metric: str) -> Measured:
    """Gain on one text of a prompt that was learned on the other, where it is least."""
    away = rows.filter(pl.col("learned_on").eq(AWAY), pl.col("model") != FULL)["model"].unique(maintain_order=True)
    if away.is_empty():
        raise NotEnoughRows(f"no prompt of a compressed model was learned on {AWAY}")
    return _least({name: gain(rows, name, learned_on=learned_on, metric=metric) for name in away})


def _lead(rows: pl.DataFrame, rival: str) -> Measured:
    """Nats by which a prompt ends below something else, where it does so least."""
    return _least({name: losses(rows, name, rival) - losses(rows, name) for name in _compressions(rows)})


def _dilution(rows: pl.DataFrame) -> Measured:
    """The diluted loss behind an untrained prompt over the loss without one, on the full model."""
    return mean_interval(losses(rows, FULL, "untrained", metric="diluted") / losses(rows, FULL, "none"), "models")


CLAIMS = (
    Claim(
        "recovers",
        "A prompt brings back a part of the loss of every compression",
        paper="8x compressed LLaMA-7B with a prompt matches the uncompressed model",
        measure=_recovered,
        holds=lambda measured: measured.low > 0,
    ),
    Claim(
        "control",
        "And it gains more nats there than a prompt gains on the full model: it is recovery, not more training",
        paper="none; the control is not in the paper",
        measure=_beyond_control,
        holds=lambda measured: measured.low > 0,
        source="control",
        unit="nats",
    ),
    Claim(
        "damage",
        "The gain is larger at 2 bits than at 3",
        paper="prompts recover most where compression is most aggressive",
        measure=functools.partial(_between, more="rtn2", less="rtn3"),
        holds=lambda measured: measured.low > 0,
        source="figures",
        unit="nats",
    ),
    Claim(
        "eighth",
        "Pruned to one half and rounded to 4 bits, the model with a prompt is within 0.02 nats of the full one",
        paper="4 bits and 50 % pruned with a prompt match the uncompressed LLaMA-7B",
        measure=functools.partial(_over_full, model="rtn4+prune50"),
        holds=lambda measured: measured.high < 0.02,
        unit="nats",
    ),
    Claim(
        "three-to-two",
        "A prompt learned at 3 bits keeps a part of the gain at 2 bits",
        paper="prompts transfer across compression levels",
        measure=functools.partial(_transferred, source="rtn3", model="rtn2"),
        holds=lambda measured: measured.low > 0,
    ),
    Claim(
        "two-to-three",
        "And one learned at 2 bits at 3 bits",
        paper="prompts transfer across compression levels",
        measure=functools.partial(_transferred, source="rtn2", model="rtn3"),
        holds=lambda measured: measured.low > 0,
    ),
    Claim(
        "gptq-to-pruned",
        "And one learned under GPTQ on the pruned model",
        paper="prompts transfer across compression types",
        measure=functools.partial(_transferred, source="gptq3", model="prune50"),
        holds=lambda measured: measured.low > 0,
    ),
    Claim(
        "to-shakespeare",
        "A prompt learned on WikiText-2 lowers the loss of the compressed models on tiny Shakespeare",
        paper="prompts transfer across data sets",
        measure=functools.partial(_other_text, learned_on=HOME, metric="away_nll"),
        holds=lambda measured: measured.low > 0,
        unit="nats",
    ),
    Claim(
        "to-wikitext",
        "And one learned on tiny Shakespeare lowers it on WikiText-2",
        paper="prompts transfer across data sets",
        measure=functools.partial(_other_text, learned_on=AWAY, metric="nll"),
        holds=lambda measured: measured.low > 0,
        unit="nats",
    ),
    Claim(
        "adapters",
        "A prompt ends below adapters of as many floats on every compressed model",
        paper="cheaper than recovery by LoRA",
        measure=functools.partial(_lead, rival="adapters"),
        holds=lambda measured: measured.low > 0,
        source="section 2",
        unit="nats",
    ),
    Claim(
        "hard",
        "And below a hard prompt of as many tokens",
        paper="learned prompts do what hand-written ones do not",
        measure=functools.partial(_lead, rival="hard"),
        holds=lambda measured: measured.low > 0,
        source="section 3",
        unit="nats",
    ),
    Claim(
        "diluted",
        "The released evaluation would praise a prompt that nobody trained: its mean falls below that without one",
        paper="none; with 100 places before 1,023 targets the loss of the same predictions falls to 0.911 of it",
        measure=_dilution,
        holds=lambda measured: measured.high < 1,
        source="the reference's code",
        unit="x",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over models f1 of losses, and the recovered fraction; the standard error is of the gain."""
    keys = ["model", "method", "prompt_tokens", "source", "learned_on"]
    before = rows.filter(pl.col("method") == "none").select("model", "seed", unprompted="nll")
    full = before.filter(pl.col("model") == FULL).select("seed", full="unprompted")
    joined = rows.join(before, on=["model", "seed"]).join(full, on="seed")
    gained, cost = pl.col("unprompted") - pl.col("nll"), pl.col("unprompted") - pl.col("full")
    fraction = pl.when((pl.col("model") != FULL) & (cost > 0) & (pl.col("method") != "none")).then(gained / cost)
    return joined.group_by(keys, maintain_order=True).agg(
        pl.col("bits_per_weight").first().alias("bits a weight"),
        pl.col("trained_floats").first().alias("trained floats"),
        pl.col("learning_rate").first().alias("learning rate"),
        pl.col("nll").mean().alias("WikiText-2"),
        pl.col("away_nll").mean().alias("tiny Shakespeare"),
        pl.col("diluted").mean().alias("WikiText-2, diluted"),
        gained.mean().alias("gain"),
        (gained.std() / pl.len().sqrt()).alias("standard error"),
        fraction.mean().alias("recovered"),
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Loss of each model with and without what was learned; gains of prompts on other models; the two metrics."""
    drawing, axes = new_figure(3, width=15, height=4.6, width_ratios=[1.5, 1, 0.8])
    _losses(axes[0], rows)
    _transfers(axes[1], rows)
    _metrics(axes[2], rows)
    return drawing


_SHOWN = {"none": "nothing", "hard": "hard prompt", "adapters": "LoRA, equal floats", "prompt": "soft prompt"}


def _losses(ax: Axes, rows: pl.DataFrame) -> None:
    names = [FULL, *_compressions(rows)]
    for place, (method, label) in enumerate(_SHOWN.items()):
        found = [losses(rows, name, method) for name in names]
        errors = [float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0 for values in found]
        places = np.arange(len(names)) + 0.2 * place - 0.3
        ax.bar(places, [values.mean() for values in found], 0.19, yerr=errors, label=label, color=f"C{place}")
    everything = np.concatenate([losses(rows, name, method) for name in names for method in _SHOWN])
    low, high = float(everything.min()), float(everything.max())
    ax.set_ylim(low - 0.1 * (high - low), high + 0.05 * (high - low))
    ax.axhline(losses(rows, FULL, "none").mean(), color="0.3", linestyle=":")
    ax.set_xticks(np.arange(len(names)), names)
    ax.set(ylabel="nats a byte, real tokens of WikiText-2", xlabel="model")
    ax.set_title("Before the text, or beside the kernels", loc="left")
    ax.legend(fontsize="x-small")


def _transfers(ax: Axes, rows: pl.DataFrame) -> None:
    names = [FULL, *_compressions(rows)]
    gains = np.array([[gain(rows, model, source=source).mean() for model in names] for source in names])
    most = float(np.abs(gains).max()) or 1.0
    ax.imshow(gains, cmap="RdBu", vmin=-most, vmax=most)
    for row, column in np.ndindex(*gains.shape):
        color = "white" if abs(gains[row, column]) > 0.6 * most else "black"
        ax.text(column, row, f"{gains[row, column]:.3f}", ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(np.arange(len(names)), names, rotation=35, ha="right")
    ax.set_yticks(np.arange(len(names)), names)
    ax.set(xlabel="put before", ylabel="prompt learned on")
    ax.grid(visible=False)
    ax.set_title("Nats gained by a prompt", loc="left")


def _metrics(ax: Axes, rows: pl.DataFrame) -> None:
    shown = {"none": "nothing", "untrained": "untrained", "prompt": "learned"}
    for place, (metric, label) in enumerate({"nll": "real tokens", "diluted": "diluted"}.items()):
        means = [losses(rows, FULL, method, metric=metric).mean() for method in shown]
        ax.bar(np.arange(3) + 0.4 * place - 0.2, means, 0.38, label=label, color=f"C{place}")
    ax.set_xticks(np.arange(3), list(shown.values()))
    ax.set(xlabel="prompt", ylabel="nats a byte, full model")
    ax.set_title("Two means of the same predictions", loc="left")
    ax.legend(fontsize="x-small", loc="lower right", frameon=True)
