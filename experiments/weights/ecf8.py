"""ECF8: how far exponents of 8-bit weights concentrate, and how far the theory of it holds.

    python -m experiments run weights.ecf8      # about 2 minutes on 2 cores, once models are there

Matrices of trained models become 8-bit floats in two ways: ``scaled``, the largest weight of each at the largest
number, as FP8 models are made for use, and ``direct``, cast as they are. ``array``: bits a weight of each matrix by
chunks of equally many symbols (``huffman``, the default), in the reference's layout (``gaps``) and at a fixed rate of
3 bits with escapes, all side arrays counted; the entropy of the exponents; and what the cast had lost before: the
squared error over the squared weights, and the share of ``coarse`` weights, whose relative error is more than that of
a normal number can be. A direct cast leaves part of the range unused and makes small weights subnormal: their
exponents coincide, which is what the code then saves, and their mantissas are cut.

``stable``: entropies of ``floor(log2 |X|)`` of symmetric alpha-stable X, drawn by Chambers, Mallows and Stuck, beside
the paper's two bounds and the entropy of the two-sided geometric law that it assumes. ``scale``: entropies of the
exponents of Gaussian weights times powers of two, in 8 bits and in bfloat16: invariant while no number leaves the
normal range. Throughput at a fixed memory budget, the paper's second number, needs its models and GPUs and is not
measured.
"""

import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.kvcache import fixtures
from experiments.lab import Claim, Measured, NotEnoughRows, Trial, highest, lowest, mean_interval, new_figure
from experiments.weights.ecf8_cells import (
    CASTS,
    CODERS,
    Config,
    array_bits,
    every_byte,
    exponent_counts,
    scaled_entropy,
    stable_entropy,
)
from experiments.weights.trained_weights import present, shapes

PAPER = (
    "Yang, Zhang, Xie, Li, Xu, Shrivastava: To Compress or Not? Pushing the Frontier of Lossless GenAI Model Weights "
    "Compression with Exponent Concentration (ECF8), ICLR 2026, arXiv 2510.02676"
)
SYSTEM = "hashml.weights.ecf8"
E4M3 = "float8_e4m3fn"
LARGE = 2**16
"""Weights of a matrix of 256 x 256; side arrays count for more in smaller ones."""

SCALES = {
    "tiny": Config(models=("f1",), dtypes=(E4M3,), seeds=2, size=fixtures.TINY, alphas=(1.0, 2.0), draws=5000,
                   octaves=(-4, 0), gaussian=5000),
    "default": Config(),
}  # fmt: skip

_KEY: dict[str, Any] = dict.fromkeys(("part", "model", "seed", "dtype", "cast", "name", "alpha", "octave"))


def run(config: Config) -> Iterator[Trial]:
    for key, measure in _trials(config):
        yield Trial(_KEY | key, measure)


def _trials(config: Config) -> Iterator[tuple[dict[str, Any], Any]]:
    for dtype in config.dtypes:
        yield {"part": "every_byte", "dtype": dtype}, functools.partial(every_byte, dtype)
    for model, seed in present(config.models, config.seeds):
        names = [name for name, shape in shapes(config.size, model).items() if len(shape) == 2]
        own = {"model": model, "seed": seed}
        for dtype in config.dtypes:
            for cast in CASTS:
                key, arguments = own | {"dtype": dtype, "cast": cast}, (config.size, model, seed, dtype, cast)
                yield key | {"part": "exponents"}, functools.partial(exponent_counts, *arguments)
                for name in names:
                    yield key | {"part": "array", "name": name}, functools.partial(array_bits, *arguments, name)
    for seed in range(config.seeds):
        for alpha in config.alphas:
            measure = functools.partial(stable_entropy, alpha, config.draws, seed)
            yield {"part": "stable", "alpha": alpha, "seed": seed}, measure
        for dtype in (*config.dtypes, "bfloat16"):
            for octave in config.octaves:
                measure = functools.partial(scaled_entropy, config.gaussian, dtype, octave, seed)
                yield {"part": "scale", "dtype": dtype, "octave": octave, "seed": seed}, measure


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return sum(1 for _ in _trials(config))


# --- claims -------------------------------------------------------------------------------------------


def _counted(value: float | int, note: str) -> Measured:
    return Measured(value, value, value, note)


def totals(rows: pl.DataFrame, cast: str, dtype: str = E4M3) -> pl.DataFrame:
    """Bits a weight of all matrices of a model, a row a model and seed."""
    own = pl.col("part").eq("array") & pl.col("dtype").eq(dtype) & pl.col("cast").eq(cast)
    found = rows.filter(own)
    if found.is_empty():
        raise NotEnoughRows(f"no matrices of {dtype}, {cast}")
    means = ("exponent_entropy", "limit", *CODERS, "subnormal", "coarse", "error")
    weights = pl.col("weights")
    return found.group_by("model", "seed", maintain_order=True).agg(
        weights.sum(), *((pl.col(name) * weights).sum().alias(name) / weights.sum() for name in means)
    )


def _saved(rows: pl.DataFrame, cast: str) -> Measured:
    """Share of the bytes of all matrices that is saved, on the model where it is least."""
    cells = []
    for (model,), part in totals(rows, cast).group_by("model", maintain_order=True):
        saved = 1 - part["huffman"].to_numpy() / 8
        if len(saved) > 1:
            found = mean_interval(saved, "models")
            cells.append(Measured(found.value, found.low, found.high, f"least: {model}, {found.note}"))
        else:
            cells.append(_counted(float(saved[0]), f"least: {model}"))
    return lowest(cells)


def _saved_of_large(rows: pl.DataFrame) -> Measured:
    """The matrix of at least 256 x 256 weights that saves least, scaled."""
    own = pl.col("part").eq("array") & pl.col("dtype").eq(E4M3) & pl.col("cast").eq("scaled")
    found = rows.filter(own & (pl.col("weights") >= LARGE)).sort("huffman")
    if found.is_empty():
        raise NotEnoughRows(f"no matrix of {LARGE} weights")
    worst = found.row(-1, named=True)
    return _counted(1 - worst["huffman"] / 8, f"least of {len(found)}: {worst['model']}, {worst['name']}")


def _over_limit(rows: pl.DataFrame) -> Measured:
    """Bits over those of the entropy limit, on the model and by the cast where it is most."""
    found = pl.concat([totals(rows, cast).with_columns(pl.lit(cast).alias("cast")) for cast in CASTS])
    worst = found.sort(pl.col("huffman") / pl.col("limit")).row(-1, named=True)
    return _counted(worst["huffman"] / worst["limit"], f"worst: {worst['model']}, {worst['cast']}")


def _changed(rows: pl.DataFrame) -> Measured:
    found = rows.filter(pl.col("part").is_in(["array", "every_byte"]))
    if found.is_empty():
        raise NotEnoughRows("no arrays")
    return _counted(int(found["changed"].sum()), f"of {int(found['weights'].sum())} weights in {len(found)} arrays")


def _coarse_of_direct(rows: pl.DataFrame) -> Measured:
    """Share of coarse weights by the direct cast, less that by the scaled one, on the model where it is least."""
    both = totals(rows, "direct").join(totals(rows, "scaled"), on=["model", "seed"], suffix="_scaled")
    found = both.with_columns((pl.col("coarse") - pl.col("coarse_scaled")).alias("more")).sort("more")
    least = found.row(0, named=True)
    return _counted(least["more"], f"least: {least['model']}")


def stable(rows: pl.DataFrame, alpha: float, number: pl.Expr) -> Measured:
    """A number of the drawn variables of an alpha, over the draws of all seeds."""
    part = rows.filter(pl.col("part").eq("stable") & pl.col("alpha").eq(alpha))
    return mean_interval(part.select(number.alias("number"))["number"], "samples")


def _alphas(rows: pl.DataFrame) -> list[float]:
    found = rows.filter(pl.col("part") == "stable")["alpha"].unique().sort().to_list()
    if not found:
        raise NotEnoughRows("no stable variables")
    return found


def _worst_alpha(rows: pl.DataFrame, number: pl.Expr, below: float = math.inf) -> Measured:
    """The number at the alpha, below a bound of it, where it is highest."""
    cells = []
    for alpha in _alphas(rows):
        if alpha < below:
            found = stable(rows, alpha, number)
            cells.append(Measured(found.value, found.low, found.high, f"highest: alpha {alpha}, {found.note}"))
    return highest(cells)


def _range_of_scales(rows: pl.DataFrame, dtype: str) -> Measured:
    """Largest difference of entropies between powers of two at which nothing is clipped or subnormal but zero."""
    part = rows.filter(pl.col("part").eq("scale") & pl.col("dtype").eq(dtype) & pl.col("clipped").eq(0))
    part = part.filter(pl.col("subnormal") == 0)
    spread = part.group_by("seed", maintain_order=True).agg(
        pl.col("exponent_entropy").max() - pl.col("exponent_entropy").min(), pl.len().alias("scales")
    )
    if spread.is_empty() or int(np.min(spread["scales"].to_numpy())) < 2:
        raise NotEnoughRows(f"fewer than two powers of two within the range of {dtype}")
    return _counted(float(np.max(spread["exponent_entropy"].to_numpy())), f"{spread['scales'][0]} powers of two")


EXCESS = pl.col("exponent_entropy") - pl.col("upper")
CLAIMS = (
    Claim(
        "saved",
        "Scaled E4M3 matrices of every model save at least 10 %",
        paper="9.8 % to 26.9 % of nine models; 13 % to 15 % of large language models",
        measure=functools.partial(_saved, cast="scaled"),
        holds=lambda measured: measured.low >= 0.10,
        source="table of models",
    ),
    Claim(
        "saved-large",
        "And no matrix of at least 256 x 256 weights saves less than 8 %",
        paper="none; 18.2 % of a Gaussian matrix at most, 14.6 % of a Laplacian one, by counting",
        measure=_saved_of_large,
        holds=lambda measured: measured.value >= 0.08,
        source="reproduction",
    ),
    Claim(
        "saved-direct",
        "Matrices that are cast without a scale save at least 20 %",
        paper="up to 26.9 %, of models that were cast from bfloat16",
        measure=functools.partial(_saved, cast="direct"),
        holds=lambda measured: measured.low >= 0.20,
    ),
    Claim(
        "coarse-direct",
        "They had lost more at the cast: on every model more weights are off by more than 1/16 than by a scaled one",
        paper="none",
        measure=_coarse_of_direct,
        holds=lambda measured: measured.value > 0,
        source="reproduction",
        unit="of the weights",
    ),
    Claim(
        "limit",
        "Every model takes at most 1.5 % more than the entropy limit of its matrices, however cast",
        paper="none",
        measure=_over_limit,
        holds=lambda measured: measured.value <= 1.015,
        source="this project's target",
    ),
    Claim(
        "lossless",
        "No byte comes back changed, all 256 values among them",
        paper="no deviation of outputs",
        measure=_changed,
        holds=lambda measured: measured.value == 0,
        unit="bytes",
    ),
    Claim(
        "upper-2",
        "Exponents of Gaussian variables have less entropy than the bound, 2.67 bits",
        paper="H(E) <= alpha / (1 - 2^-alpha), hence FP4.67",
        measure=lambda rows: stable(rows, 2.0, EXCESS),
        holds=lambda measured: measured.high <= 0,
        source="theorem",
        unit="bits",
    ),
    Claim(
        "upper",
        "So have those of stable variables of every alpha below 2 that is tried",
        paper="H(E) <= alpha / (1 - 2^-alpha)",
        measure=lambda rows: _worst_alpha(rows, EXCESS, below=2.0),
        holds=lambda measured: measured.high <= 0,
        source="theorem",
        unit="bits",
    ),
    Claim(
        "lower",
        "They have more than the lower bound, at every alpha",
        paper="H(E) >= alpha / (1 + 2^-alpha)",
        measure=lambda rows: _worst_alpha(rows, pl.col("lower") - pl.col("exponent_entropy")),
        holds=lambda measured: measured.high <= 0,
        source="theorem",
        unit="bits",
    ),
    Claim(
        "geometric",
        "Exponents of Gaussian variables have the entropy of the geometric law, to 0.1 bits",
        paper="E is two-sided geometric with q = 2^-alpha",
        measure=lambda rows: stable(rows, 2.0, pl.col("exponent_entropy") - pl.col("geometric")),
        holds=lambda measured: measured.low >= -0.1 and measured.high <= 0.1,
        source="theorem's assumption",
        unit="bits",
    ),
    Claim(
        "concentrated",
        "At every alpha from 1 to 2 exponents have at most 3.2 bits",
        paper="exponents concentrate, with low entropy",
        measure=lambda rows: _worst_alpha(rows, pl.col("exponent_entropy")),
        holds=lambda measured: measured.high <= 3.2,
        unit="bits",
    ),
    Claim(
        "scale",
        "A power of two does not change the entropy of exponents while all numbers stay normal (bfloat16)",
        paper="none; alpha alone is in the bounds",
        measure=functools.partial(_range_of_scales, dtype="bfloat16"),
        holds=lambda measured: measured.value == 0,
        source="theorem",
        unit="bits",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Bits a weight of models, means over seeds; entropies of stable variables; Gaussian weights by scale."""
    lines: list[dict[str, Any]] = []
    arrays = rows.filter(pl.col("part") == "array")
    for dtype, cast in arrays.select("dtype", "cast").unique(maintain_order=True).iter_rows():
        for (model,), part in totals(rows, cast, dtype).group_by("model", maintain_order=True):
            means = {name: float(np.mean(part[name].to_numpy())) for name in part.columns[2:]}
            lines.append({"what": f"{model}, {dtype}, {cast}", "saved": 1 - means["huffman"] / 8} | means)
    for (alpha,), part in rows.filter(pl.col("part") == "stable").group_by("alpha", maintain_order=True):
        names = ("exponent_entropy", "lower", "upper", "geometric")
        lines.append({"what": f"stable, alpha {alpha}"} | {n: float(np.mean(part[n].to_numpy())) for n in names})
    scaled = rows.filter(pl.col("part") == "scale")
    for (dtype, octave), part in scaled.group_by("dtype", "octave", maintain_order=True):
        names = ("exponent_entropy", "subnormal", "error")
        found = {name: float(np.mean(part[name].to_numpy())) for name in names}
        lines.append({"what": f"Gaussian times 2^{octave}, {dtype}"} | found)
    return pl.DataFrame(lines, infer_schema_length=None)


def figure(rows: pl.DataFrame) -> Figure:
    """Histograms of exponents by cast; bits by coder; entropy against alpha; saving against scale."""
    drawing, axes = new_figure(2, 2, width=12, height=8.2)
    _histograms(axes[0], rows)
    _bits(axes[1], rows)
    _stable(axes[2], rows)
    _scales(axes[3], rows)
    return drawing


def _histograms(ax: Axes, rows: pl.DataFrame) -> None:
    own = pl.col("part").eq("exponents") & pl.col("dtype").eq(E4M3) & pl.col("seed").eq(0)
    models = rows.filter(own)["model"].unique(maintain_order=True).to_list()
    for model, cast, text in rows.filter(own).select("model", "cast", "histogram").iter_rows():
        counts = np.array(json.loads(text))
        ax.plot(np.arange(len(counts)), counts / counts.sum(), marker=".", color=f"C{models.index(model)}",
                linestyle="-" if cast == "scaled" else ":", label=f"{model}, {cast}")  # fmt: skip
    ax.set(xlabel="exponent of E4M3 (0: subnormal numbers)", ylabel="share of the weights")
    ax.set_title("Exponents of the weights", loc="left")
    ax.legend(fontsize="x-small")


def _bits(ax: Axes, rows: pl.DataFrame) -> None:
    lines = []
    for cast in CASTS:
        for (model,), part in totals(rows, cast).group_by("model", maintain_order=True):
            lines.append(
                (f"{model}\n{cast}", {name: float(np.mean(part[name].to_numpy())) for name in ("limit", *CODERS)})
            )
    for place, name in enumerate(CODERS):
        ax.bar(np.arange(len(lines)) + 0.26 * place, [bits[name] for _, bits in lines], 0.26, label=name)
    for at, (_, bits) in enumerate(lines):
        ax.plot([at - 0.13, at + 0.65], [bits["limit"]] * 2, color="black", marker="", linewidth=1.2)
    ax.set(ylim=(4, 9), ylabel="bits a weight (black: the limit)")
    ax.set_xticks(np.arange(len(lines)) + 0.26, [name for name, _ in lines], fontsize="xx-small")
    ax.axhline(8, color="0.5", linestyle=":")
    ax.set_title("Matrices in E4M3, all side arrays counted", loc="left")
    ax.legend(fontsize="x-small", ncols=3, loc="upper right")


def _stable(ax: Axes, rows: pl.DataFrame) -> None:
    names = ("exponent_entropy", "upper", "lower", "geometric")
    part = rows.filter(pl.col("part") == "stable").group_by("alpha").agg(pl.col(names).mean()).sort("alpha")
    ax.plot(part["alpha"], part["exponent_entropy"], marker="o", label="drawn")
    ax.plot(part["alpha"], part["upper"], color="C1", marker="s", label="claimed bounds")
    ax.plot(part["alpha"], part["lower"], color="C1", marker="s")
    ax.plot(part["alpha"], part["geometric"], color="C2", linestyle="--", label="geometric law, exact")
    ax.set(xlabel="alpha of a symmetric stable variable", ylabel="entropy of its exponent, bits", ylim=(0, None))
    ax.set_title("The theory", loc="left")
    ax.legend(fontsize="x-small")


def _scales(ax: Axes, rows: pl.DataFrame) -> None:
    part = rows.filter(pl.col("part") == "scale").group_by("dtype", "octave", maintain_order=True)
    means = part.agg(pl.col("exponent_entropy").mean()).sort("octave")
    for dtype in means["dtype"].unique(maintain_order=True):
        own = means.filter(pl.col("dtype") == dtype)
        ax.plot(own["octave"], own["exponent_entropy"], marker="o", label=dtype)
    ax.set(xlabel="log2 of the standard deviation of Gaussian weights", ylabel="entropy of exponents, bits")
    ax.set_title("The range of a format", loc="left")
    ax.legend(fontsize="x-small")
