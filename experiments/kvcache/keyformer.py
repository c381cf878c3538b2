"""Keyformer: does a noisy, ever flatter softmax tell better than attention itself which tokens to keep?

    python -m experiments run kvcache.keyformer      # about 5 minutes on 2 cores, once the models are there

Loss of a language model (``f1``, held-out WikiText-2, tokens after the middle of 256) and accuracy of a recall model
(final questions of 96 tokens), every token through the cache, at 70, 50 and 30 % of a sequence's tokens. Of these
30 % are the recent window, as in the released code, for every policy but the plain window, which is all window. H2O
and Keyformer remember a float32 for each slot and so take equal bytes at equal tokens; the window and random
eviction, which remember nothing, get the same bytes and with them a few tokens more. ``temperature`` is Keyformer
without its noise, ``noise`` is Keyformer at temperature 1. There is no prompt: the temperature rises from 1 to 2 over
the sequence. What draws noise, random eviction too, is run with several noise seeds on every model, whose mean is one
number of that model; intervals are over models.

Apart from this, on exact attention: the share of each query's attention that the best 10 to 60 % of its keys get.
The sign of Keyformer less H2O is no claim: the table shows it with its interval.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.kvcache import fixtures, harness
from experiments.kvcache.attention_rows import held_out_rows
from experiments.kvcache.contenders import Setting, contender
from experiments.kvcache.fixtures import DEFAULT, Size
from experiments.kvcache.token_budgets import in_bytes, in_tokens, row_bytes
from experiments.lab import Claim, Measured, NotEnoughRows, Trial, mean_interval, new_figure
from experiments.lab.formatting import interval
from hashml.kvcache.contract import Policy
from hashml.kvcache.keyformer import Keyformer
from hashml.kvcache.persistence import top_mass
from hashml.kvcache.serving import no_tables
from hashml.kvcache.spec import LayerSpec, batch_spec
from hashml.models.decoder import decoder_model

PAPER = (
    "Adnan, Arunkumar, Jain, Nair, Soloveychik, Kamath: Keyformer: KV Cache Reduction through Key Tokens Selection "
    "for Efficient Generative Inference, MLSys 2024, arXiv 2403.09054"
)
SYSTEM = "hashml.kvcache.keyformer"

RECENT = 0.3
"""Part of the kept tokens that is the window."""
NOISY = ("random", "keyformer", "noise")
METHODS = ("window", "random", "h2o", "keyformer", "temperature", "noise")


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are those of the claims."""

    models: tuple[str, ...] = ("f1", "recall")
    kept: tuple[float, ...] = (0.7, 0.5, 0.3)
    """Parts of a sequence's tokens."""
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    """Of a query's keys, those with most attention."""
    noises: int = 5
    """Noise seeds on each model."""
    seeds: int = 3
    """Of each model."""
    size: Size = DEFAULT


SCALES = {
    "tiny": Config(models=("f1",), kept=(0.5,), fractions=(0.4,), noises=2, seeds=2, size=fixtures.TINY),
    "default": Config(),
    "paper": Config(noises=5, seeds=5, size=fixtures.PAPER),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cache; ``kept`` is the part of the tokens that stays, 1 for the exact cache. Under the name ``attention`` it
    is the part of a query's keys, those that get most of its exact attention."""

    fixture: str
    method: str
    kept: float | int


def cells(config: Config) -> list[Cell]:
    """All caches; every one is a program of its own."""
    found = []
    for fixture in config.models:
        found.append(Cell(fixture, "full", 1.0))
        found += [Cell(fixture, method, kept) for kept in config.kept for method in METHODS]
    return found


def run(config: Config) -> Iterator[Trial]:
    for fixture, seed in itertools.product(config.models, range(config.seeds)):
        for layer, fraction in itertools.product(range(_depth(config, fixture)), config.fractions):
            key = {**dataclasses.asdict(Cell(fixture, "attention", fraction)), "layer": layer, "noise": None}
            yield Trial(key | {"seed": seed}, functools.partial(mass, config, fixture, layer, fraction, seed))
    for cell in cells(config):
        for seed, noise in itertools.product(range(config.seeds), range(_noises(config, cell))):
            key = {**dataclasses.asdict(cell), "layer": None, "noise": noise if cell.method in NOISY else None}
            yield Trial(key | {"seed": seed}, functools.partial(_one, config, cell, seed, noise))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    layers = sum(_depth(config, fixture) for fixture in config.models)
    return config.seeds * (layers * len(config.fractions) + sum(_noises(config, cell) for cell in cells(config)))


def _depth(config: Config, fixture: str) -> int:
    return fixtures.setting(config.size, fixture, "decode").decoder.layers


def _noises(config: Config, cell: Cell) -> int:
    return config.noises if cell.method in NOISY else 1


# --- measurements -------------------------------------------------------------------------------------


def mass(config: Config, fixture: str, layer: int, fraction: float, seed: int) -> dict[str, float]:
    """Attention that the best keys get, mean over heads, sequences and queries of the second half; and the same of
    the worst of these heads."""
    found = top_mass(held_out_rows(config.size, fixture, seed).probs[layer], fraction)
    found = found[..., found.shape[-1] // 2 :].mean(axis=(0, 2))
    return {"mass": float(found.mean()), "worst_head": float(found.min())}


def policy(method: str, setting: Setting) -> Policy | None:
    """Of the methods that are Keyformer, or a part of it."""
    match method:
        case "keyformer":
            return Keyformer(new_tokens=setting.tokens)
        case "temperature":
            return Keyformer(new_tokens=setting.tokens, noise=False)
        case "noise":
            return Keyformer(tau_end=1.0, new_tokens=setting.tokens)
        case _:
            return None


def layers_of(config: Config, cell: Cell) -> tuple[LayerSpec, ...]:
    """The cache of a cell."""
    setting = fixtures.setting(config.size, cell.fixture, "decode")
    if cell.method == "full":
        return contender("full", setting)
    tokens = int(setting.tokens * cell.kept)
    setting = dataclasses.replace(setting, window=max(1, int(RECENT * tokens)))
    own = policy(cell.method, setting)
    if cell.method in ("window", "random"):
        return in_bytes(cell.method, setting, row_bytes(setting, in_tokens("keyformer", setting, tokens)))
    return in_tokens("keyformer" if own else cell.method, setting, tokens, own)


def _one(config: Config, cell: Cell, seed: int, noise: int) -> dict[str, float | int | None]:
    return scores(config, cell)[seed, noise]


@functools.lru_cache(maxsize=2)
def scores(config: Config, cell: Cell) -> dict[tuple[int, int], dict[str, float | int | None]]:
    """All model seeds and noise seeds of a cell, which share a program."""
    setting = fixtures.setting(config.size, cell.fixture, "decode")
    model, layers = decoder_model(setting.decoder), layers_of(config, cell)
    tokens, targets, places = fixtures.texts(config.size, cell.fixture)
    pairs = list(itertools.product(range(config.seeds), range(_noises(config, cell))))
    models = [
        harness.Model(
            fixtures.params(config.size, cell.fixture, seed),
            no_tables(batch_spec(layers, len(tokens))),
            jax.random.fold_in(jax.random.key(seed), noise),
            tokens,
            targets,
        )
        for seed, noise in pairs
    ]
    found = {}
    for pair, scored in zip(pairs, harness.decode_all(model, layers, models), strict=True):
        row: dict[str, float | int | None] = {name: harness.share_correct(scored, at) for name, at in places.items()}
        found[pair] = {
            "nll": None if places else harness.second_half_nll(scored, targets),
            **(row or dict.fromkeys(("rehearsed", "unrehearsed", "accuracy"))),
            "bytes_per_token": row_bytes(setting, layers) / setting.tokens,
            "tokens_kept": float(scored.kept[-1]),
        }
    return found


# --- claims -------------------------------------------------------------------------------------------


def _models(rows: pl.DataFrame, fixture: str, method: str, kept: float | int) -> np.ndarray:
    """Loss or accuracy of each model, mean over noise seeds."""
    metric = "accuracy" if fixture == "recall" else "nll"
    part = rows.filter(pl.col("fixture") == fixture, pl.col("method") == method, pl.col("kept") == kept)
    if part.is_empty():
        raise NotEnoughRows(f"no rows of {fixture} with {method} at {kept:.0%} of the tokens")
    return part.group_by("seed").agg(pl.col(metric).mean()).sort("seed")[metric].to_numpy()


def difference(rows: pl.DataFrame, fixture: str, kept: float | int, a: str, b: str) -> Measured:
    """Of a less b, over the models."""
    return mean_interval(_models(rows, fixture, a, kept) - _models(rows, fixture, b, kept), "models")


def _budgets(rows: pl.DataFrame, a: str, b: str) -> list[Measured]:
    """Accuracy of recall of a less b at every budget."""
    part = rows.filter(pl.col("fixture") == "recall", pl.col("method") == a)
    budgets = part["kept"].unique(maintain_order=True).to_list()
    if not budgets:
        raise NotEnoughRows(f"no rows of recall with {a}")
    found = [(kept, difference(rows, "recall", kept, a, b)) for kept in budgets]
    return [dataclasses.replace(one, note=f"at {kept:.0%} of the tokens") for kept, one in found]


def _lead(rows: pl.DataFrame, rival: str) -> Measured:
    """Accuracy of Keyformer over a rival's where it stands worst."""
    return min(_budgets(rows, "keyformer", rival), key=lambda one: one.low)


def _noise(rows: pl.DataFrame) -> Measured:
    """Accuracy with noise less that without, where the noise helps most."""
    return max(_budgets(rows, "keyformer", "temperature"), key=lambda one: one.high)


def _ratio(rows: pl.DataFrame, fixture: str) -> Measured:
    """Loss or accuracy at 70 % of the tokens over that of the exact cache."""
    return mean_interval(_models(rows, fixture, "keyformer", 0.7) / _models(rows, fixture, "full", 1.0), "models")


def _mass(rows: pl.DataFrame) -> Measured:
    """Attention that the best 40 % of the keys get in the language model, mean over its layers."""
    part = rows.filter(pl.col("method") == "attention", pl.col("fixture") == "f1", pl.col("kept") == 0.4)
    means = part.group_by("seed").agg(pl.col("mass").mean()).sort("seed")
    return mean_interval(means["mass"], "models")


CLAIMS = (
    Claim(
        "mass",
        "The best 40 % of the keys get at least 90 % of the language model's attention, mean over layers",
        paper="about 90 % of the attention mass on about 40 % of the tokens",
        measure=_mass,
        holds=lambda measured: measured.low >= 0.9,
        source="abstract, and a figure of the repository",
    ),
    *(
        Claim(
            f"recall-{rival}",
            f"Keyformer recalls more than {title} in equal bytes, at every budget",
            paper=paper,
            measure=functools.partial(_lead, rival=rival),
            holds=lambda measured: measured.low > 0,
            source=source,
        )
        for rival, title, paper, source in (
            ("window", "a window of the newest tokens", "above window attention at equal budgets", "figures"),
            ("random", "random eviction", "none", "reproduction"),
        )
    ),
    Claim(
        "text-70",
        "At 70 % of the tokens its loss is less than 1 % above the exact cache's",
        paper="99 % of the baseline's accuracy at 70 % of the cache (summaries)",
        measure=functools.partial(_ratio, fixture="f1"),
        holds=lambda measured: measured.high < 1.01,
        source="repository",
        unit="x",
    ),
    Claim(
        "recall-70",
        "At 70 % of the tokens it answers at least 99 % of what the exact cache answers",
        paper="99 % of the baseline's accuracy at 70 % of the cache (summaries)",
        measure=functools.partial(_ratio, fixture="recall"),
        holds=lambda measured: measured.low >= 0.99,
        source="repository",
        unit="x",
    ),
    Claim(
        "noise",
        "Leaving out the noise is not better at every budget of recall (where the noise helps most)",
        paper="Gumbel noise regularises the scores",
        measure=_noise,
        holds=lambda measured: measured.high >= 0,
        source="reproduction",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over models and noise seeds, and the 95 % interval over models of the difference to H2O."""
    found = []
    settings = ["fixture", "method", "kept", "layer"]
    for part in rows.partition_by(settings, maintain_order=True):
        first, line = part.row(0, named=True), {}
        for name in ("mass", "worst_head", "nll", "rehearsed", "unrehearsed", "accuracy"):
            line[name.replace("_", " ")] = part[name].mean() if name in part.columns else None
        line |= {"bytes/token": first.get("bytes_per_token"), "tokens kept": first.get("tokens_kept")}
        found.append({name: first[name] for name in settings} | line | {"less H2O": _less_h2o(rows, first)})
    return pl.DataFrame(found, infer_schema_length=None)


def _less_h2o(rows: pl.DataFrame, row: dict[str, Any]) -> str | None:
    if row["method"] in ("attention", "full", "h2o"):
        return None
    try:
        return interval(difference(rows, row["fixture"], row["kept"], row["method"], "h2o"))
    except NotEnoughRows:
        return None


def figure(rows: pl.DataFrame) -> Figure:
    """Attention on the best keys, layer by layer; loss over the exact cache's, and accuracy, against the part of the
    tokens that is kept."""
    names = rows["fixture"].unique(maintain_order=True).to_list()
    drawing, axes = new_figure(2, len(names), width=12, height=4 * len(names))
    for place, fixture in enumerate(names):
        part = rows.filter(pl.col("fixture") == fixture)
        _draw_mass(axes[2 * place], part.filter(pl.col("method") == "attention"), fixture)
        quality = "accuracy" if fixture == "recall" else "excess"
        _draw_quality(axes[2 * place + 1], part.filter(pl.col("method") != "attention"), quality)
        label = "accuracy, final questions" if fixture == "recall" else "loss over the exact cache's, less 1"
        axes[2 * place + 1].set(
            xlabel="part of the tokens that is kept", ylabel=label, title=f"{fixture}, token by token"
        )
    return drawing


def _draw_mass(ax: Axes, rows: pl.DataFrame, fixture: str) -> None:
    for (layer,), part in rows.group_by("layer", maintain_order=True):
        points = part.group_by("kept").agg(pl.col("mass").mean(), _error("mass")).sort("kept")
        ax.errorbar(points["kept"], points["mass"], points["error"], marker="o", label=f"layer {layer}")
    ax.axhline(0.9, color="0.6", linewidth=0.8)
    ax.axvline(0.4, color="0.6", linewidth=0.8)
    ax.set(xlabel="part of the keys, those with most attention", ylabel="their share of the attention",
           title=f"{fixture}, exact attention")  # fmt: skip
    if not rows.is_empty():
        ax.legend(fontsize="x-small")


def _draw_quality(ax: Axes, rows: pl.DataFrame, quality: str) -> None:
    exact = pl.col("nll").filter(pl.col("method") == "full").first().over("seed")
    rows = rows.with_columns(excess=pl.col("nll") / exact - 1)
    means = rows.group_by("method", "kept", "seed", maintain_order=True).agg(pl.col(quality).mean())
    for (method,), part in means.group_by("method", maintain_order=True):
        points = part.group_by("kept").agg(pl.col(quality).mean(), _error(quality)).sort("kept")
        style: dict[str, Any] = {"random": {"color": "black", "linestyle": ":"}}.get(str(method), {})
        if method == "full":
            ax.axhline(float(points[quality][0]), color="0.4", linestyle="--", label="full")
        else:
            ax.errorbar(points["kept"], points[quality], points["error"], marker="o", label=str(method), **style)
    ax.legend(fontsize="x-small")


def _error(column: str) -> pl.Expr:
    return (pl.col(column).std() / pl.len().sqrt()).alias("error")
