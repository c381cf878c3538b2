"""LeanQuant: grids that are fine where errors cost most, against GPTQ and rounding at equal bits and at equal bytes.

    python -m experiments run weights.leanquant      # some 20 minutes on 2 cores, once models are there

Trained models are quantised layer by layer, each group of kernels on the inputs that the quantised layers before it
give. ``rtn`` rounds to the nearest value of an affine grid from the least to the largest weight of a row,
``rtn_mse`` to one that is shrunk for the least error; ``gptq`` makes up in later columns for what rounding one column
loses; ``gptq_groups`` has as many groups as take no more bytes than LeanQuant's tables. ``leanquant_p`` (non-uniform)
has the grid of GPTQ replaced by a table a row, from k-means in which column i weighs ``d_i^-p``, d the diagonal of
the Cholesky factor of the inverse Hessian; ``gptq_kmeans`` and ``rtn_kmeans`` are its controls, whose columns weigh
the same (p = 0). ``leanquant_affine`` searches the ends of an affine range under the weights of p = 4. All are damped
by 0.1 of the mean diagonal, and columns go by its order.

All bytes count, tables too: 16-bit tables of ``2^b`` numbers add ``16 2^b / in`` bits to each weight of a row of
``in``, which on kernels of 128 inputs is half a bit at 2 bits, one at 3 and two at 4.

``nll`` is the loss on test sequences that all methods share; ``proxy`` is the sum over kernels of the mean squared
error of their outputs on calibration tokens. MiniLM is judged by cosines with the exact embeddings, a linear
classifier of them (SST-2) and a search in Cranfield (nDCG@10), its documents cut at 400 characters. Times are those
of solving one layer, in turns; a decoder of 20 million random weights is quantised for its time alone.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from experiments.kvcache import fixtures
from experiments.lab import Claim, Measured, NotEnoughRows, Trial, highest, mean_interval, new_figure
from experiments.weights.leanquant_cells import MINILM, TIMED, Config, cells, large, measure, timings
from experiments.weights.trained_weights import minilm_file

PAPER = (
    "Zhang, Shrivastava: LeanQuant: Accurate and Scalable LLM Quantization with Loss-error-aware Grid, ICLR 2025, "
    "arXiv 2407.10032; Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023, arXiv 2210.17323"
)
SYSTEM = "hashml.weights.quantize_model"

SCALES = {
    "tiny": Config(models=("f1",), seeds=2, methods=("rtn", "gptq", "gptq_kmeans", "leanquant_4"), bits=(2,),
                   size=fixtures.TINY, repetitions=6, large=64),
    "default": Config(),
    "paper": Config(size=dataclasses.replace(fixtures.DEFAULT, rows=128, calibration=128), sentences=512,
                    classified=1800),
}  # fmt: skip

_KEY: dict[str, Any] = dict.fromkeys(("part", "model", "method", "bits", "seed"))


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config):
        yield Trial(_KEY | {"part": "quality"} | cell._asdict(), functools.partial(measure, config, cell))
    for model, bits in _timed(config):
        for method in TIMED:
            key = {"part": "time", "model": model, "method": method, "bits": bits}
            yield Trial(_KEY | key, functools.partial(_time, config, model, bits, method))
    yield Trial(_KEY | {"part": "large", "method": "leanquant_4", "bits": 3}, functools.partial(large, config))


def _time(config: Config, model: str, bits: int, method: str) -> dict[str, float]:
    return timings(config, model, bits)[method]


def _timed(config: Config) -> list[tuple[str, int]]:
    """Layers that are timed: those of f1 at every number of bits up to 4, MiniLM's at 3."""
    found = [("f1", bits) for bits in config.bits if bits <= 4 and "f1" in config.models]
    return found + [(MINILM, 3)] * (MINILM in config.models and minilm_file() is not None)


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return len(cells(config)) + len(TIMED) * len(_timed(config)) + 1


# --- claims -------------------------------------------------------------------------------------------


def _counted(value: float | int, note: str) -> Measured:
    return Measured(float(value), float(value), float(value), note)


def _quality(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.filter(pl.col("part") == "quality")


def _pair(rows: pl.DataFrame, a: str, b: str, bits: int, number: str) -> dict[str, np.ndarray]:
    """By model, the number of method a and of method b, a row a seed; ``float`` has 32 bits."""
    parts = [
        _quality(rows).filter(pl.col("method").eq(method) & pl.col("bits").eq(32 if method == "float" else bits))
        for method in (a, b)
    ]
    joined = parts[0].join(parts[1], on=["model", "seed"], suffix="_b", maintain_order="left")
    joined = joined.filter(pl.col(number).is_not_null() & pl.col(f"{number}_b").is_not_null())
    if joined.is_empty():
        raise NotEnoughRows(f"no rows of {a} and {b} at {bits} bits with {number}")
    return {
        str(model): part.select(number, f"{number}_b").to_numpy()
        for (model,), part in joined.group_by("model", maintain_order=True)
    }


def _interval(values: np.ndarray, model: str) -> Measured:
    if len(values) == 1:
        return _counted(float(values[0]), model)
    found = mean_interval(values, "seeds")
    return Measured(found.value, found.low, found.high, f"{model}, {found.note}")


def difference(rows: pl.DataFrame, a: str, b: str, bits: int) -> Measured:
    """Loss of a less that of b, on the decoder where its bound is highest."""
    pairs = _pair(rows, a, b, bits, "nll")
    return highest([_interval(both[:, 0] - both[:, 1], f"highest: {model}") for model, both in pairs.items()])


def ratio(rows: pl.DataFrame, a: str, b: str, bits: tuple[int, ...]) -> Measured:
    """Proxy loss of a over that of b, on the model and at the bits where its bound is highest."""
    return highest(
        [
            _interval(both[:, 0] / both[:, 1], f"highest: {model}, {each} bits")
            for each in bits
            for model, both in _pair(rows, a, b, each, "proxy").items()
        ]
    )


def _below_exact(rows: pl.DataFrame, bits: tuple[int, ...]) -> Measured:
    """By how much the exact model's loss exceeds GPTQ's, in the seed where it does most."""
    found = [
        (float((both[:, 1] - both[:, 0]).max()), f"{model}, {each} bits")
        for each in bits
        for model, both in _pair(rows, "gptq", "float", each, "nll").items()
    ]
    value, note = max(found)
    return _counted(value, f"most: {note}")


def _gap_grows(rows: pl.DataFrame) -> Measured:
    """What GPTQ saves of rounding's loss at 3 bits less what it saves at 2, where that is highest."""
    at = [_pair(rows, "rtn", "gptq", bits, "nll") for bits in (3, 2)]
    cells = []
    for model in (model for model in at[0] if model in at[1]):
        three, two = (each[model][:, 0] - each[model][:, 1] for each in at)
        cells.append(_interval(three - two, f"highest: {model}"))
    return highest(cells)


def _of_encoder(rows: pl.DataFrame, a: str, b: str, bits: int, number: str) -> Measured:
    mine, other = _pair(rows.filter(pl.col("model") == MINILM), a, b, bits, number)[MINILM][0].tolist()
    return _counted(mine - other, f"{mine:.3f} against {other:.3f}")


def _slowest(rows: pl.DataFrame, method: str, bits: tuple[int, ...]) -> Measured:
    part = rows.filter(pl.col("part").eq("time") & pl.col("method").eq(method) & pl.col("bits").is_in(bits))
    if part.is_empty():
        raise NotEnoughRows("no times")
    worst = part.sort("ratio").row(-1, named=True)
    note = f"slowest: {worst['model']}, {worst['bits']} bits"
    return Measured(worst["ratio"], worst["ratio_low"], worst["ratio_high"], note)


def _large(rows: pl.DataFrame) -> Measured:
    part = rows.filter(pl.col("part") == "large")
    if part.is_empty():
        raise NotEnoughRows("no large decoder")
    return _counted(part["seconds"][0], f"{part['weights'][0] / 1e6:.1f} million parameters")


def _loss_claim(name: str, statement: str, a: str, b: str, bits: int, paper: str, source: str) -> Claim:
    return Claim(
        f"{name}-{bits}",
        f"{statement} at {bits} bits, on every decoder",
        paper=paper,
        measure=functools.partial(difference, a=a, b=b, bits=bits),
        holds=lambda measured: measured.high < 0,
        source=source,
        unit="nats",
    )


_GPTQ = "LLaMA-7B perplexity 25.54 of rounding, 8.07 of GPTQ, 5.68 exact, at 3 bits"
_LEAN = "compares favourably at 4, 3 and 2 bits"
CLAIMS = (
    *(
        _loss_claim("gptq-rtn", "GPTQ has less loss than rounding to nearest", "gptq", "rtn", bits, _GPTQ, "GPTQ")
        for bits in (3, 2)
    ),
    Claim(
        "exact-gptq",
        "No model that GPTQ has made, at 2 or 3 bits, has less loss than the exact one",
        paper="5.68 exact, 8.07 at 3 bits",
        measure=functools.partial(_below_exact, bits=(2, 3)),
        holds=lambda measured: measured.value <= 0,
        source="GPTQ",
        unit="nats",
    ),
    Claim(
        "gap-grows",
        "What GPTQ saves grows from 3 bits to 2, on every decoder",
        paper="0.20 at 4 bits, 17.5 at 3 (LLaMA-7B, perplexity)",
        measure=_gap_grows,
        holds=lambda measured: measured.high < 0,
        source="GPTQ",
        unit="nats",
    ),
    *(
        _loss_claim("leanquant-gptq", "LeanQuant (p = 4) has less loss than GPTQ with an affine grid a row",
                    "leanquant_4", "gptq", bits, _LEAN, "abstract")
        for bits in (3, 2)
    ),
    *(
        _loss_claim("leanquant-rtn", "LeanQuant (p = 4) has less loss than rounding to nearest",
                    "leanquant_4", "rtn", bits, _LEAN, "abstract")
        for bits in (3, 2)
    ),
    *(
        _loss_claim("leanquant-bytes", "LeanQuant (p = 4) has less loss than GPTQ with groups in no more bytes",
                    "leanquant_4", "gptq_groups", bits, "none: its tables are 0.06 bits a weight on 4,096 inputs",
                    "reproduction")
        for bits in (3, 2)
    ),
    Claim(
        "leanquant-proxy",
        "LeanQuant (p = 4) has at most 0.9 of GPTQ's proxy loss, on every model at 2 and 3 bits",
        paper="none; 0.41 to 0.44 at 2 bits and 0.60 to 0.67 at 3 on synthetic layers in an earlier study",
        measure=functools.partial(ratio, a="leanquant_4", b="gptq", bits=(2, 3)),
        holds=lambda measured: measured.high <= 0.9,
        source="reproduction",
        unit="of GPTQ's",
    ),
    Claim(
        "rtn-kmeans",
        "A better grid is not all: unweighted k-means with GPTQ has less proxy loss than without, at 2 and 3 bits",
        paper="none",
        measure=functools.partial(ratio, a="gptq_kmeans", b="rtn_kmeans", bits=(2, 3)),
        holds=lambda measured: measured.high < 1,
        source="reproduction",
        unit="of rounding's",
    ),
    *(
        _loss_claim("weighting", "Weighting columns (p = 4) gives less loss than not weighting them (p = 0)",
                    "leanquant_4", "gptq_kmeans", bits, "errors of columns with a small d cost most; p of 3 or 4",
                    "README")
        for bits in (3, 2)
    ),
    Claim(
        "weighting-proxy",
        "And less proxy loss, on every model at 2 and 3 bits",
        paper="none; -5 % to +9 % on synthetic layers in an earlier study",
        measure=functools.partial(ratio, a="leanquant_4", b="gptq_kmeans", bits=(2, 3)),
        holds=lambda measured: measured.high < 1,
        source="reproduction",
        unit="of that of p = 0",
    ),
    *(
        Claim(
            f"affine-{bits}",
            f"LeanQuant's affine grid has no more loss than GPTQ's at {bits} bits, on any decoder",
            paper=_LEAN,
            measure=functools.partial(difference, a="leanquant_affine", b="gptq", bits=bits),
            holds=lambda measured: measured.high <= 0,
            source="abstract",
            unit="nats",
        )
        for bits in (3, 2)
    ),
    Claim(
        "affine-proxy",
        "And no more proxy loss, on any model at 2 and 3 bits",
        paper="none: min-max is among the ranges that are searched, under weights for errors before elimination",
        measure=functools.partial(ratio, a="leanquant_affine", b="gptq", bits=(2, 3)),
        holds=lambda measured: measured.high <= 1,
        source="reproduction",
        unit="of GPTQ's",
    ),
    *(
        Claim(
            f"minilm-{number}",
            f"MiniLM at 3 bits: LeanQuant (p = 4) keeps {what} better than GPTQ",
            paper="none",
            measure=functools.partial(_of_encoder, a="leanquant_4", b="gptq", bits=3, number=number),
            holds=lambda measured: measured.value > 0,
            source="reproduction",
        )
        for number, what in (("cosine", "the direction of embeddings"), ("ndcg", "a search (nDCG@10)"))
    ),
    Claim(
        "eight-bits",
        "Rounding to 8 bits changes the loss of f1 by less than 0.01 nats",
        paper="none",
        measure=functools.partial(difference, a="rtn", b="float", bits=8),
        holds=lambda measured: measured.low > -0.01 and measured.high < 0.01,
        source="reproduction",
        unit="nats",
    ),
    *(
        Claim(
            f"time-{method}-{bits[-1]}",
            f"{name} takes at most 1.5 times GPTQ's time at {' and '.join(map(str, bits))} bits",
            paper="none; an efficient fused kernel for the search of affine grids",
            measure=functools.partial(_slowest, method=method, bits=bits),
            holds=lambda measured: measured.high <= 1.5,
            source="this project's target",
            unit="of GPTQ's",
        )
        for method, name in (("leanquant_4", "LeanQuant (p = 4)"), ("leanquant_affine", "LeanQuant's affine grid"))
        for bits in ((2, 3), (4,))
    ),
    Claim(
        "large",
        "A decoder of 20 million parameters is quantised in less than 3 minutes",
        paper="70B in 4 hours, on a GPU of 24 GB",
        measure=_large,
        holds=lambda measured: measured.value < 180,
        source="this project's target",
        unit="seconds",
    ),
)  # fmt: skip


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over seeds: bits a weight with all that is stored, what of it are tables or scales, quality, seconds."""
    quality = _with_excess(rows)
    numbers = ("nll", "excess", "cosine", "accuracy", "ndcg")
    found = quality.group_by("model", "method", "bits", maintain_order=True).agg(
        pl.col("bits_per_weight").first().alias("bits/weight"),
        (pl.col("bits_per_weight") - pl.col("bits")).first().alias("of tables, scales"),
        pl.col("proxy").mean().alias("proxy loss"),
        *(pl.col(name).mean() for name in numbers),
        (pl.col("excess").std() / pl.len().sqrt()).alias("standard error"),
        pl.col("seconds").min().alias("seconds, whole model"),
    )
    times = rows.filter(pl.col("part") == "time")
    if times.is_empty():
        return found
    lines = times.select("model", "method", "bits", pl.col("ratio").alias("time of a layer, of GPTQ's"))
    return found.join(lines, on=["model", "method", "bits"], how="left", maintain_order="left")


def _with_excess(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of quality with the loss over the exact model's, in nats."""
    exact = pl.col("nll").filter(pl.col("method") == "float").first().over("model", "seed")
    return _quality(rows).with_columns((pl.col("nll") - exact).alias("excess"))


_LINES = ("rtn", "rtn_mse", "gptq", "gptq_groups", "gptq_kmeans", "leanquant_2", "leanquant_4", "leanquant_affine")


def figure(rows: pl.DataFrame) -> Figure:
    """Loss over the exact model's, or one less the cosine, against bits a weight: one line a method."""
    quality = _with_excess(rows).filter(pl.col("method").is_in(_LINES))
    models = quality["model"].unique(maintain_order=True).to_list()
    columns = max(1, len(models) if len(models) < 4 else (len(models) + 1) // 2)
    lines = max(1, -(-len(models) // columns))
    drawing, axes = new_figure(columns, lines, width=5.6 * columns, height=4.6 * lines)
    for ax, model in zip(axes, models, strict=False):
        part = quality.filter(pl.col("model") == model)
        encoder = model == MINILM
        shown = part.with_columns((1 - pl.col("cosine") if encoder else pl.col("excess")).alias("shown"))
        for place, method in enumerate(_LINES):
            if method not in part["method"]:
                continue
            points = (
                shown.filter(pl.col("method") == method)
                .group_by("bits", maintain_order=True)
                .agg(
                    pl.col("bits_per_weight", "shown").mean(),
                    (pl.col("shown").std() / pl.len().sqrt()).alias("error"),
                )
                .sort("bits_per_weight")
            )
            style: dict[str, Any] = {
                "color": f"C{place}",
                "linestyle": "--" if "leanquant" in method else "-",
                "marker": "os^vD*Xp"[place % 8],
            }
            errors = points["error"].fill_null(0.0)
            ax.errorbar(points["bits_per_weight"], points["shown"], errors, label=method, **style)
        label = "1 - cosine with the exact embedding" if encoder else "loss over the exact model's, nats"
        ax.set(xlabel="stored bits a weight, tables and scales included", ylabel=label, title=model)
        if encoder:
            ax.set_yscale("log")
        else:
            ax.set_yscale("symlog", linthresh=0.01)
        ax.legend(fontsize="x-small")
    return drawing
