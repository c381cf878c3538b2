"""DFloat11: which part of real weights can be coded away, and what decoding them costs.

    make peers && python -m experiments run weights.dfloat11      # about 3 minutes on 2 cores, once models are there

Trained weights are cast to bfloat16 and to float16. ``array``: bits a weight of each array by itself, all side
arrays counted, as chunks of equally many symbols (``huffman``, the default), in the reference's layout (``gaps``) and
at a fixed rate with escapes, beside zlib, zstd and ZipNN at their default levels, the entropy of exponents, and the
``limit`` below which no code of single exponents goes. ``block``: the matrices of one transformer block under a code
each, under one for all, and in the reference's own container. ``logits``: a forward pass whose weights stay
compressed, compared bit by bit with one whose weights do not. The control is drawn: Gaussian matrices of four scales
(one block), a norm of ones, random bits.

``decode``: seconds until an array is there again, by native code and by NumPy on one core, by XLA on all that it
takes, by codecs of bytes, and of a plain copy. ``cores`` says how many were busy. ``forward``: a pass of f1 over
more and more tokens, with dense weights, with compressed ones that are decoded block by block inside, and the
decoding alone. Functions take turns, and differences are of one repetition. Where the encoder, a codec of bytes or a
compiler is not installed, its rows or columns are absent.
"""

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from experiments.kvcache import fixtures
from experiments.lab import Trial, new_figure
from experiments.weights.dfloat11_cells import (
    BYTES,
    CODERS,
    Config,
    array_bits,
    block_bits,
    contents,
    decode_methods,
    decode_times,
    exponent_counts,
    forward_times,
    logits_row,
)
from experiments.weights.dfloat11_claims import CLAIMS as CLAIMS
from experiments.weights.dfloat11_claims import GB, totals
from experiments.weights.trained_weights import CONTROL, DECODERS, layer_of, present, shapes

PAPER = (
    "Zhang, Hariri, Zhong, Chaudhary, Sui, Hu, Shrivastava: 70% Size, 100% Accuracy: Lossless LLM Compression for "
    "Efficient GPU Inference via Dynamic-Length Float (DFloat11), NeurIPS 2025, arXiv 2504.11651"
)
SYSTEM = "hashml.weights.dfloat11"

SCALES = {
    "tiny": Config(models=("f1", "control"), dtypes=("bfloat16",), seeds=1, size=fixtures.TINY, weights=5000,
                   peers=("zlib",), tokens=(16,), repetitions=6),
    "default": Config(),
}  # fmt: skip

_KEY: dict[str, Any] = dict.fromkeys(("part", "model", "seed", "dtype", "name", "method", "tokens", "repetition"))


def run(config: Config) -> Iterator[Trial]:
    times_of_decoders = functools.lru_cache(maxsize=1)(functools.partial(decode_times, config))
    times_of_passes = functools.lru_cache(maxsize=1)(functools.partial(forward_times, config))

    def decoding(content: str, dtype: str, method: str, at: int) -> dict[str, Any]:
        seconds, fixed = times_of_decoders(content, dtype)[method]
        return {"seconds": float(seconds[at]), **fixed}

    def passing(tokens: int, method: str, at: int) -> dict[str, Any]:
        return {"seconds": float(times_of_passes(tokens)[method][at])}

    counted = {"array": array_bits, "block": block_bits, "exponents": exponent_counts, "logits": logits_row}
    measures: dict[str, Any] = {part: functools.partial(f, config.size) for part, f in counted.items()}
    measures |= {"decode": decoding, "forward": passing}
    for part, key, arguments in _trials(config):
        yield Trial(_KEY | {"part": part} | key, functools.partial(measures[part], *arguments))


def _trials(config: Config) -> Iterator[tuple[str, dict[str, Any], tuple[Any, ...]]]:
    """Part, what identifies a row in it, and the arguments of what measures it."""
    models = present(config.models, config.seeds)
    for model, seed in models:
        names = shapes(config.size, model)
        own = {"model": model, "seed": seed}
        for dtype in config.dtypes:
            for name in names:
                yield "array", own | {"dtype": dtype, "name": name}, (model, seed, dtype, name)
        for layer in sorted({layer_of(name) for name in names} - {None}, key=lambda place: place or 0):
            yield "block", own | {"dtype": "bfloat16", "name": f"layer {layer}"}, (model, seed, layer)
        if model != CONTROL:
            yield "exponents", own | {"dtype": "bfloat16"}, (model, seed)
        for dtype in config.dtypes if model in DECODERS else ():
            yield "logits", own | {"dtype": dtype}, (model, seed, dtype)
    for content, dtype in contents(config):
        if content == "minilm" and ("minilm", 0) not in models:
            continue
        for method in decode_methods(config, dtype):
            for at in range(config.repetitions):
                key = {"model": content, "dtype": dtype, "method": method, "repetition": at}
                yield "decode", key, (content, dtype, method, at)
    for tokens in config.tokens if "f1" in config.models else ():
        for method in ("dense", "compressed", "decode"):
            for at in range(config.repetitions):
                key = {"model": "f1", "dtype": "bfloat16", "method": method, "tokens": tokens, "repetition": at}
                yield "forward", key, (tokens, method, at)


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return sum(1 for _ in _trials(config))


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Bits a weight of models, means over seeds; then GB a second of decoders, and milliseconds of passes."""
    lines: list[dict[str, Any]] = []
    arrays = rows.filter(pl.col("part") == "array")
    for dtype in arrays["dtype"].unique(maintain_order=True):
        for (model,), part in totals(rows, dtype).group_by("model", maintain_order=True):
            lines.append({"what": f"{model}, {dtype}"} | _line(part))
    for (name, dtype), part in arrays.filter(pl.col("model") == CONTROL).group_by(
        "name", "dtype", maintain_order=True
    ):
        lines.append({"what": f"control, {name}, {dtype}"} | _line(part))
    for (model,), part in rows.filter(pl.col("part") == "block").group_by("model", maintain_order=True):
        for kind, words in {
            "apart": "a code for each",
            "joint": "one for all",
            "reference": "the reference's",
        }.items():
            bits = float(np.average(part[kind].to_numpy(), weights=part["weights"].to_numpy()))
            lines.append({"what": f"{model}, blocks, {words}", "huffman": bits, "of 16 bits": bits / 16})
    lines += _timed(rows)
    # Read off the rows: the report must be the same wherever it is made of them.
    absent = [codec for codec in BYTES if codec not in arrays.columns or arrays[codec].null_count() == len(arrays)]
    lines += [{"what": f"{codec} was not installed where this ran"} for codec in absent]
    return pl.DataFrame(lines, infer_schema_length=None)


def _line(part: pl.DataFrame) -> dict[str, Any]:
    """Means over seeds: bits a weight, and those of the best codec of bytes."""
    names = [name for name in ("weights", "exponent_entropy", "limit", *CODERS, *BYTES)
             if name in part.columns and part[name].null_count() == 0]  # fmt: skip
    means = {name: float(np.mean(part[name].to_numpy())) for name in names}
    best = min((name for name in BYTES if name in means), key=means.__getitem__, default=None)
    shown = {name.replace("exponent_", ""): means[name] for name in names if name not in BYTES}
    by_bytes = None if best is None else f"{means[best]:.2f}, {best}"
    return shown | {"best of bytes": by_bytes, "of 16 bits": means["huffman"] / 16}


def _timed(rows: pl.DataFrame) -> Iterator[dict[str, Any]]:
    decoded = rows.filter(pl.col("part") == "decode")
    for (content, dtype, method), part in decoded.group_by("model", "dtype", "method", maintain_order=True):
        rate = float(np.median(part["bytes"].to_numpy() / part["seconds"].to_numpy())) / GB
        yield {"what": f"decode {content}, {dtype}, {method}", "bits read": float(part["bits"][0]), "GB/s": rate,
               "cores": float(part["cores"][0])}  # fmt: skip
    passed = rows.filter(pl.col("part") == "forward")
    for (tokens, method), part in passed.group_by("tokens", "method", maintain_order=True):
        yield {
            "what": f"pass of f1, {tokens} tokens, {method}",
            "ms": 1e3 * float(np.median(part["seconds"].to_numpy())),
        }


def figure(rows: pl.DataFrame) -> Figure:
    """Histograms of exponents; bits a weight by coder; speed of decoders; passes against tokens."""
    drawing, axes = new_figure(2, 2, width=12, height=8.4)
    _histograms(axes[0], rows)
    _bits(axes[1], totals(rows))
    _speeds(axes[2], rows)
    _passes(axes[3], rows)
    return drawing


def _histograms(ax: Axes, rows: pl.DataFrame) -> None:
    part = rows.filter(pl.col("part") == "exponents").unique("model", keep="first", maintain_order=True)
    for model, text in part.select("model", "histogram").iter_rows():
        counts = {int(exponent): number for exponent, number in json.loads(text).items()}
        octaves = range(max(min(counts), 127 - 24), max(counts) + 1)
        total = sum(counts.values())
        ax.plot([e - 127 for e in octaves], [counts.get(e, 0) / total for e in octaves], marker=".", label=model)
    ax.set(xlabel="exponent: octave of the weight, floor(log2 |w|)", ylabel="share of the weights of matrices")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("Exponents of the weights, bfloat16", loc="left")
    ax.legend()


def _bits(ax: Axes, models: pl.DataFrame) -> None:
    means = models.group_by("model", maintain_order=True).mean()
    shown = [name for name in (*CODERS, *BYTES) if name in means.columns]
    width = 0.8 / len(shown)
    for place, name in enumerate(shown):
        ax.bar(np.arange(len(means)) + width * place, means[name].to_numpy(), width, label=name, color=f"C{place}")
    for at, limit in enumerate(means["limit"]):
        ax.plot([at - width / 2, at + 0.8 - width / 2], [limit, limit], color="black", marker="", linewidth=1.2)
    ax.set(ylim=(8, 18), ylabel="bits a weight, bfloat16 (black: the limit)")
    ax.set_xticks(np.arange(len(means)) + 0.4 - width / 2, means["model"].to_list())
    ax.axhline(16, color="0.5", linestyle=":")
    ax.set_title("Whole models, all side arrays counted", loc="left")
    ax.legend(fontsize="x-small", ncols=3, loc="upper right")


def _speeds(ax: Axes, rows: pl.DataFrame) -> None:
    lines = [line for line in _timed(rows.filter(pl.col("part") == "decode")) if "GB/s" in line]
    names = [line["what"].removeprefix("decode ") for line in lines]
    colors = ["C1" if name.endswith("native") else "0.6" if name.endswith("copy") else "C0" for name in names]
    ax.barh(np.arange(len(lines)), [line["GB/s"] for line in lines], color=colors)
    ax.set_yticks(np.arange(len(lines)), names, fontsize="xx-small" if len(lines) > 12 else "x-small")
    ax.invert_yaxis()
    ax.axvline(0.5, color="black", linestyle=":")
    ax.set(xlabel="GB a second of output (dotted: 0.5)", xscale="log")
    ax.set_title("Decoding: native on one core, XLA on all", loc="left")


def _passes(ax: Axes, rows: pl.DataFrame) -> None:
    part = rows.filter(pl.col("part") == "forward").group_by("method", "tokens", maintain_order=True)
    medians = part.agg(pl.col("seconds").median()).sort("tokens")
    for method, label in {"dense": "dense", "compressed": "compressed", "decode": "decoding alone"}.items():
        own = medians.filter(pl.col("method") == method)
        ax.plot(own["tokens"], 1e3 * own["seconds"].to_numpy(), marker="o", label=label)
    ax.set(xscale="log", yscale="log", xlabel="tokens of a pass of f1", ylabel="ms")
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.set_title("Forward passes of f1", loc="left")
    ax.legend()
