"""Look-ups in registers in place of products: what 2 bits cost a small net, and what they save a CPU (DeepGEMM).

    make peers && python -m experiments run weights.lut_gemm      # about 4 minutes on 2 cores

Three parts. ``exact``: sums by every form against a loop over the table of products, for evenly spaced and other
levels of 2, 3 and 4 bits, and the bytes that a row takes.

``accuracy``: perceptrons on scikit-learn's digits, and at the default scale on 12,000 images of Fashion-MNIST, with
weights and inputs of every layer, the first and the last too, in 2, 3 or 4 bits (LSQ). All contenders start from the
same weights, see the same batches and have a search over learning rates of their own on the validation part.
``rounded`` is the control: float32's weights, rounded with the step sizes that LSQ starts from. A trained net is run
by look-ups too, and its answers compared.

``time``: products of 2-bit codes, weights packed offline. ``codes`` are timed without making them, ``floats`` with:
activations come as float32, results leave as float32, and PyTorch's int8 finds the range of the activations.
``paper`` looks up single products along k, as the paper does; ``tables`` sums of 2 or 3 products for 64 rows at once
(`hashml.weights.lut_gemm`). QNNPACK is the paper's peer; fbgemm and oneDNN use the int8 instructions that today's
processors have. A process of its own is held to one core, another to all. Functions take turns, each call after one
of its own that does not count, which leaves weights in the caches as far as they fit; ratios are of one repetition.
Where there is no compiler or no PyTorch, rows are absent, and claims about them are not judged.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.lab import (
    Claim,
    Measured,
    NotEnoughRows,
    Trial,
    mean_interval,
    median_interval,
    new_figure,
    paired_difference,
)
from experiments.weights.lut_gemm_cells import books, exactness, forms, scores
from experiments.weights.lut_gemm_timing import INPUTS, key, method_names, settings, times
from hashml.weights.lut_gemm import BITS

PAPER = (
    "Ganji, Ashfaq et al. (Deeplite): DeepGEMM: Accelerated Ultra Low-Precision Inference on CPU Architectures using "
    "Lookup Tables, 2023, arXiv 2304.09049"
)
SYSTEM = "hashml.weights.lut_gemm"
Shape = tuple[int, int, int]
INT8 = ("torch_fbgemm", "torch_onednn")
FLOAT32 = ("dense_float32", "torch_float32")


@dataclass(frozen=True)
class Config:
    """The defaults are those of the claims."""

    columns: int = 1001
    """Of the products that are compared with a loop."""
    data: tuple[str, ...] = ("digits", "fashion_mnist")
    bits: tuple[int, ...] = BITS
    """Of nets on the first data set; on others 2 alone."""
    hidden: tuple[int, ...] = (128, 128)
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01)
    """Peaks of the schedule, searched for every contender."""
    steps: int = 1000
    """Of 64 images."""
    fashion_train: int = 12_000
    seeds: int = 5
    """Of initial weights and the order of images; the split is one."""
    shapes: tuple[Shape, ...] = (
        (1, 1024, 1024),
        (16, 1024, 1024),
        (128, 1024, 1024),
        (1, 4096, 4096),
        (16, 4096, 4096),
    )
    """``(M, N, K)``: rows of activations, rows of weights, columns."""
    cores: tuple[str, ...] = ("one", "all")
    repetitions: int = 15


SCALES = {
    "tiny": Config(columns=30, data=("digits",), bits=(2,), hidden=(16,), learning_rates=(0.003, 0.01), steps=60,
                   seeds=2, shapes=((1, 64, 64), (5, 64, 64)), cores=("all",), repetitions=6),
    "default": Config(),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for part, own, measure in _trials(config):
        yield Trial(_key(part, **own), measure)


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return sum(1 for _ in _trials(config))


def _trials(config: Config) -> Iterator[tuple[str, dict[str, Any], Any]]:
    for bits in config.bits:
        for book in books(bits):
            for form in forms(book):
                yield ("exact", {"book": book, "method": form, "bits": bits},
                       functools.partial(_exact, book, bits, form, config.columns))  # fmt: skip
    for data, method, bits in _nets(config):
        for seed in range(config.seeds):
            yield ("accuracy", {"data": data, "method": method, "bits": bits, "seed": seed},
                   functools.partial(_net, config, data, method, bits, seed))  # fmt: skip
    seconds = functools.cache(lambda cores: times(settings()[cores], config.shapes, config.repetitions))
    for cores in config.cores:
        if cores not in settings():
            continue
        for shape in config.shapes:
            for given in INPUTS:
                for method in method_names(given, shape):
                    for at in range(config.repetitions):
                        yield ("time", {"cores": cores, "given": given, "m": shape[0], "n": shape[1], "k": shape[2],
                                        "method": method, "repetition": at},
                               functools.partial(_time, seconds, cores, given, shape, method, at))  # fmt: skip


def _nets(config: Config) -> list[tuple[str, str, int]]:
    found = []
    for data in config.data:
        found.append((data, "float32", 32))
        for bits in config.bits if data == config.data[0] else (2,):
            found += [(data, "lsq", bits), (data, "rounded", bits)]
    return found


def _key(part: str, **own: Any) -> dict[str, Any]:
    names = ("book", "data", "method", "bits", "seed", "cores", "given", "m", "n", "k", "repetition")
    return {"part": part} | dict.fromkeys(names) | own


def _row(**measured: Any) -> dict[str, Any]:
    names = ("differing", "error", "row_bytes", "columns", "accuracy", "validation_accuracy", "learning_rate",
             "table_accuracy", "changed", "logit_error", "seconds", "cores_used")  # fmt: skip
    return dict.fromkeys(names) | measured


def _exact(book: str, bits: int, form: Any, columns: int) -> dict[str, Any]:
    return _row(columns=columns, **exactness(book, bits, form, columns))


def _net(config: Config, data: str, method: str, bits: int, seed: int) -> dict[str, Any]:
    return _row(**scores(config, data, method, bits)[seed])


def _time(seconds: Any, cores: str, given: str, shape: Shape, method: str, at: int) -> dict[str, Any]:
    return _row(seconds=seconds(cores)[key(given, shape, method)][at], cores_used=settings()[cores])


# --- claims -------------------------------------------------------------------------------------------


def _part(rows: pl.DataFrame, part: str) -> pl.DataFrame:
    found = rows.filter(pl.col("part") == part)
    if found.is_empty():
        raise NotEnoughRows(f"no rows of {part}")
    return found


def _differing(rows: pl.DataFrame) -> Measured:
    found = _part(rows, "exact").filter(pl.col("book") != "normal quantiles")
    total = int(found["differing"].sum())
    return Measured(total, total, total, f"{len(found)} products")


def _float_error(rows: pl.DataFrame) -> Measured:
    found = _part(rows, "exact").filter(pl.col("book") == "normal quantiles")
    worst = float(found["error"].to_numpy().max())
    return Measured(worst, worst, worst, f"worst of {len(found)} products")


def _bytes(rows: pl.DataFrame) -> Measured:
    """Bytes of a row over those of its bits, rounded up to a whole byte."""
    found = _part(rows, "exact")
    nominal = np.ceil(found["columns"].to_numpy() * found["bits"].to_numpy() / 8)
    worst = float((found["row_bytes"].to_numpy() / nominal).max())
    return Measured(worst, worst, worst, "counted, rows in whole blocks of 64")


def _accuracy(rows: pl.DataFrame, data: str, bits: int, rival: str = "float32") -> Measured:
    """Of LSQ less that of a rival, seed by seed, in points."""
    own = _part(rows, "accuracy").filter(
        pl.col("data").eq(data) & (pl.col("bits").eq(bits) | pl.col("method").eq("float32"))
    )
    if own.is_empty():
        raise NotEnoughRows(f"no rows of {data}")
    return paired_difference(own.with_columns(pl.col("accuracy") * 100), "lsq", rival, "accuracy", on="seed")


def _changed(rows: pl.DataFrame) -> Measured:
    found = _part(rows, "accuracy").filter(pl.col("method") == "lsq")
    return mean_interval(found["changed"], "nets")


def _seconds(rows: pl.DataFrame, cores: str, given: str, shape: Shape, methods: tuple[str, ...]) -> np.ndarray:
    """Of each repetition; of several methods those of the one whose median is least."""
    m, n, k = shape
    own = rows.filter(pl.col("part").eq("time") & pl.col("cores").eq(cores) & pl.col("given").eq(given)
                      & pl.col("m").eq(m) & pl.col("n").eq(n) & pl.col("k").eq(k))  # fmt: skip
    found = [own.filter(pl.col("method") == method).sort("repetition")["seconds"].to_numpy() for method in methods]
    found = [seconds for seconds in found if len(seconds)]
    if not found:
        raise NotEnoughRows(f"{' and '.join(methods)} was not timed here at {m} x {n} x {k}, cores: {cores}")
    return min(found, key=lambda seconds: float(np.median(seconds)))


def _speedup(
    rows: pl.DataFrame, peers: tuple[str, ...], method: str, shape: Shape, cores: str = "one", given: str = "codes"
) -> Measured:
    """Time of a peer, of several the faster, over that of a method: median of the ratios within a repetition."""
    first, second = (_seconds(rows, cores, given, shape, names) for names in (peers, (method,)))
    return median_interval(first / second, "repetitions")


def _best_speedup(rows: pl.DataFrame, peers: tuple[str, ...], method: str, given: str = "codes") -> Measured:
    """At the shape where it is largest: the paper says "up to"."""
    timed = _part(rows, "time").filter(pl.col("method") == method)
    found = []
    for shape in timed.select("m", "n", "k").unique(maintain_order=True).iter_rows():
        ratio = _speedup(rows, peers, method, shape, given=given)
        found.append(Measured(ratio.value, ratio.low, ratio.high, f"at {' x '.join(map(str, shape))}, {ratio.note}"))
    if not found:
        raise NotEnoughRows(f"{method} was not timed here")
    return max(found, key=lambda ratio: ratio.value)


def _packing(rows: pl.DataFrame, shape: Shape) -> Measured:
    """Time from floats to floats over that of the product alone."""
    whole, product = (_seconds(rows, "one", given, shape, ("tables",)) for given in ("floats", "codes"))
    return median_interval(whole / product, "repetitions")


GEMV = (1, 4096, 4096)
CARD, TARGET = "reproduction", "this project's target"
TIMES = "up to 1.74x over QNNPACK's int8 on an i7-9700K"


def _exact_claims() -> Iterator[Claim]:
    yield Claim(
        "exact",
        "No sum differs from a loop over the table, whatever the integer levels of 2, 3 or 4 bits and the form",
        paper="look-ups are exact",
        measure=_differing,
        holds=lambda measured: measured.value == 0,
        source=CARD,
    )
    yield Claim(
        "exact-floats",
        "Float levels give the product to 1e-5 of the sum of its magnitudes",
        paper="none",
        measure=_float_error,
        holds=lambda measured: measured.high < 1e-5,
        source=CARD,
    )
    yield Claim(
        "bytes",
        "A row of K weights takes K/4 bytes at 2 bits, 3K/8 at 3, K/2 at 4, rounded up",
        paper="four 2-bit codes in a byte",
        measure=_bytes,
        holds=lambda measured: measured.high == 1,
        source=CARD,
        unit="x",
    )


def _accuracy_claims() -> Iterator[Claim]:
    for data, bits, points in (("digits", 2, 2), ("digits", 3, 1), ("digits", 4, 1), ("fashion_mnist", 2, 2)):
        yield Claim(
            f"{data}-{bits}",
            f"On {data} weights and inputs of {bits} bits lose less than {points} points of accuracy to float32",
            paper="minor accuracy loss of LSQ at 2 bits",
            measure=functools.partial(_accuracy, data=data, bits=bits),
            holds=lambda measured, points=points: measured.low > -points,
            source="abstract" if bits == 2 else CARD,
            unit="points",
        )
    yield Claim(
        "beats-rounding",
        "On digits training at 2 bits is more accurate than rounding float32's weights",
        paper="none; trivial control",
        measure=functools.partial(_accuracy, data="digits", bits=2, rival="rounded"),
        holds=lambda measured: measured.low > 0,
        source=CARD,
        unit="points",
    )
    yield Claim(
        "same-answers",
        "By look-ups a trained net gives at most one answer in 10,000 that its float form does not give",
        paper="look-ups are exact",
        measure=_changed,
        holds=lambda measured: measured.high <= 1e-4,
        source=CARD,
    )


def _time_claims() -> Iterator[Claim]:
    kernels = {"paper": "The paper's kernel", "tables": "Tables of sums"}
    for method, whose in kernels.items():
        yield Claim(
            f"{method}-qnnpack",
            f"{whose}: at least 1.74x faster than QNNPACK's int8 at the best of the shapes, on one core",
            paper=TIMES,
            measure=functools.partial(_best_speedup, peers=("torch_qnnpack",), method=method),
            holds=lambda measured: measured.low >= 1.74,
            unit="x",
        )
        yield Claim(
            f"{method}-int8",
            f"{whose}: at least 1.74x faster than the better of fbgemm's and oneDNN's int8, at the best shape",
            paper=f"{TIMES}, which has no products of int8 in one instruction",
            measure=functools.partial(_best_speedup, peers=INT8, method=method),
            holds=lambda measured: measured.low >= 1.74,
            unit="x",
        )
    for cores, where in (("one", "one core"), ("all", "all cores")):
        yield Claim(
            f"gemv-{cores}",
            f"One row of activations, N = K = 4096, {where}: faster than float32 by XLA or PyTorch, floats to floats",
            paper="none",
            measure=functools.partial(
                _speedup, peers=FLOAT32, method="tables", shape=GEMV, cores=cores, given="floats"
            ),
            holds=lambda measured: measured.low > 1,
            source=CARD,
            unit="x",
        )
    yield Claim(
        "gemv-int8",
        "The same row on one core: faster than the better of fbgemm's and oneDNN's int8",
        paper="none",
        measure=functools.partial(_speedup, peers=INT8, method="tables", shape=GEMV, given="floats"),
        holds=lambda measured: measured.low > 1,
        source=TARGET,
        unit="x",
    )
    yield Claim(
        "sums-of-products",
        "Tables of sums are faster than the paper's tables of products: 16 rows, N = K = 1024, one core",
        paper="none",
        measure=functools.partial(_speedup, peers=("paper",), method="tables", shape=(16, 1024, 1024)),
        holds=lambda measured: measured.low > 1,
        source="this project's kernel",
        unit="x",
    )
    for peer, whose in (("dense_float32", "float32"), ("dense_int8", "int8")):
        yield Claim(
            f"xla-tables-{peer.removeprefix('dense_')}",
            f"By XLA's gathers look-ups are slower than its dense {whose} product: 16 rows, N = K = 1024, one core",
            paper="none; XLA has no shuffle of bytes",
            measure=functools.partial(_speedup, peers=(peer,), method="xla_byte_tables", shape=(16, 1024, 1024)),
            holds=lambda measured: measured.high < 1,
            source=CARD,
            unit="x",
        )
    yield Claim(
        "packing",
        "Making codes of a row of floats and scaling the sums costs less than half of the look-ups, N = K = 4096",
        paper="unpacking is about 80 % of a convolution's time",
        measure=functools.partial(_packing, shape=GEMV),
        holds=lambda measured: measured.high < 1.5,
        source="repository",
        unit="x",
    )


CLAIMS = (*_exact_claims(), *_accuracy_claims(), *_time_claims())


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Sums that differ and the largest relative error; accuracy and its standard error; then median milliseconds, a
    column a shape ``M x N x K``."""
    whats = {
        "exact": pl.format("{}, every form", "book"),
        "accuracy": pl.format("{}, {}", "data", "method"),
        "time": pl.format("ms from {}, {}: {}", "given", pl.col("cores").replace("one", "one core"), "method"),
    }
    whats = {part: what for part, what in whats.items() if part in rows["part"]}
    named = pl.concat([rows.filter(pl.col("part") == part).with_columns(what=what) for part, what in whats.items()])
    accuracy = 100 * pl.col("accuracy")
    error = (accuracy.std() / accuracy.count().sqrt()).round(2)
    shapes = named.drop_nulls("m").select("m", "n", "k").unique(maintain_order=True).rows()
    milliseconds = [
        (1e3 * pl.col("seconds").filter(m=m, n=n, k=k).median()).alias(f"{m} x {n} x {k}") for m, n, k in shapes
    ]
    return named.group_by("what", "bits", maintain_order=True).agg(
        pl.when(pl.col("differing").is_not_null().any()).then(pl.col("differing").sum()).alias("sums that differ"),
        pl.col("error").max().alias("relative error"),
        pl.format("{} ± {}", accuracy.mean().round(2), error).alias("accuracy, %"),
        *milliseconds,
    )


def figure(rows: pl.DataFrame) -> Figure:
    """Accuracy against bits; milliseconds of one row and of more, on one core if there are such rows."""
    drawing, axes = new_figure(3, 1, width=15, height=5.4)
    _accuracies(axes[0], rows.filter(pl.col("part") == "accuracy"))
    timed = rows.filter(pl.col("part").eq("time") & pl.col("given").eq("codes"))
    cores = "one" if "one" in timed["cores"] else "all"
    shapes = timed.select("m", "n", "k").unique(maintain_order=True).rows()
    shown = ([x for x in shapes if x[0] == 1][-1:] + [x for x in shapes if x[0] > 1][:1])[:2]
    for ax, shape in zip(axes[1:], shown, strict=False):
        _bars(ax, timed.filter(pl.col("cores") == cores), shape, cores)
    return drawing


def _accuracies(ax: Axes, rows: pl.DataFrame) -> None:
    for color, data in enumerate(rows["data"].unique(maintain_order=True)):
        own = rows.filter(pl.col("data") == data)
        level = 100 * own.filter(pl.col("method") == "float32")["accuracy"].to_numpy().mean()
        ax.axhline(level, color=f"C{color}", linestyle="--", label=f"{data}, float32")
        for method, marker in (("lsq", "o-"), ("rounded", "x:")):
            means = own.filter(pl.col("method") == method).group_by("bits").agg(
                (pl.col("accuracy") * 100).mean(), (pl.col("accuracy").std() * 100).alias("spread")
            ).sort("bits")  # fmt: skip
            ax.errorbar(means["bits"], means["accuracy"], means["spread"], fmt=marker, color=f"C{color}", capsize=3,
                        label=f"{data}, {method}")  # fmt: skip
    ax.set(xlabel="bits of weights and of inputs", ylabel="test accuracy, %", title="every layer at few bits")
    ax.set_xticks(sorted(b for b in rows["bits"].unique() if b < 32))
    ax.legend(fontsize="x-small")


def _bars(ax: Axes, rows: pl.DataFrame, shape: Shape, cores: str) -> None:
    own = rows.filter(pl.col("m").eq(shape[0]) & pl.col("n").eq(shape[1]) & pl.col("k").eq(shape[2]))
    medians = own.group_by("method", maintain_order=True).agg(pl.col("seconds").median() * 1e3).sort("seconds")
    names = medians["method"].to_list()
    ours = ["C1" if name.startswith(("tables", "paper")) else "C0" for name in names]
    ax.barh(np.arange(len(names)), medians["seconds"].to_numpy(), color=ours)
    ax.set_yticks(np.arange(len(names)), names, fontsize="x-small")
    ax.invert_yaxis()
    said = "one core" if cores == "one" else "all cores"
    ax.set(xscale="log", xlabel="milliseconds", title=f"M, N, K = {', '.join(map(str, shape))}; {said}")
