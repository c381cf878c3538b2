"""Deja Vu: for one input few heads and neurons matter, and a small predictor names them in time.

    python -m experiments run sparse.deja_vu        # about 5 minutes on 2 cores, once the language model is there

A small language model with ReLU (``f1_relu_gqa``, held-out WikiText-2) runs every token with some of its neurons, or
of its query heads, and the others multiplied by zero; keys and values are those of all heads. Who chooses: the
activations themselves (oracle), the paper's predictors from a residual stream 0, 1/2 or 1 block earlier, one order
for all tokens (the most frequent neurons, the largest weights), nobody (random). A predictor reads weights, too: the
control ``static_bytes`` has as many more of the most frequent neurons as these bytes would hold. Recall is that of
the list which inference takes, in the sparse model's own hidden states.

All seeds share one language model. A seed draws the calibration text, the first maps and batches of the predictors
and the random lists, and has test sequences of its own; methods are compared on the same seed. Learning rates are
chosen on held-out positions of the calibration text. Union sizes say what is left of the savings in a batch. Times
are of one perceptron for one row (width 2048 at the default scale), gathered by XLA on a CPU, where the dense one is
timed in turns with it: ratios alone count.
"""

import dataclasses
import functools
from collections.abc import Iterator

import polars as pl

from experiments.kvcache import fixtures
from experiments.lab import Claim, Measured, NotEnoughRows, Trial, highest, lowest, mean_interval, ratio_interval
from experiments.sparse.deja_vu_cells import HEADS, NEURONS, TOGETHER, Config, cells, measure
from experiments.sparse.deja_vu_figure import figure as figure
from experiments.sparse.deja_vu_figure import with_ratios

PAPER = (
    "Liu, Wang, Dao, Zhou, Yuan, Song, Shrivastava, Zhang, Tian, Re, Chen: Deja Vu: Contextual Sparsity for "
    "Efficient LLMs at Inference Time, ICML 2023, arXiv 2310.17157"
)
SYSTEM = "hashml.sparse.deja_vu"

SCALES = {
    "tiny": Config(seeds=2, kept=(0.5, 0.3), heads_kept=(0.5,), lookaheads=(0.5, 1.0), rank=4,
                   calibration_sequences=4, test_sequences=2, learning_rates=(1e-2,), batch=64, epochs=2,
                   batches=(1, 2), speed_features=32, speed_hidden=64, speed_kept=(0.1,), speed_rank=4, repetitions=6,
                   size=dataclasses.replace(fixtures.TINY, layers=2, features=64)),
    "default": Config(),
    "paper": Config(seeds=5, calibration_sequences=200, test_sequences=32, epochs=20, batches=(1, 2, 4, 8, 16, 32),
                    repetitions=41),
}  # fmt: skip


def run(config: Config) -> Iterator[Trial]:
    for cell in cells(config):
        yield Trial(dataclasses.asdict(cell), functools.partial(measure, config, cell))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return len(cells(config))


# --- claims -------------------------------------------------------------------------------------------


def _part(rows: pl.DataFrame, part: str, method: str, **same: float | int | None) -> pl.DataFrame:
    chosen = rows.filter(pl.col("part").eq(part) & pl.col("method").eq(method))
    for name, value in same.items():
        chosen = chosen.filter(pl.col(name).is_null() if value is None else pl.col(name).eq(value))
    if chosen.is_empty():
        raise NotEnoughRows(f"no rows of {part} with {method} at {same}")
    return chosen.sort("seed")


def _excess(first: pl.DataFrame, second: pl.DataFrame) -> Measured:
    """Loss of the first over that of the second, less 1, over seeds."""
    return mean_interval(first["nll"].to_numpy() / second["nll"].to_numpy() - 1, "seeds")


def _over_dense(rows: pl.DataFrame, part: str, method: str, **same: float | int | None) -> Measured:
    return _excess(_part(rows, part, method, **same), _part(rows, "neurons", "dense"))


def _worst(rows: pl.DataFrame, a: tuple[str, float | int | None], b: tuple[str, float | int | None]) -> Measured:
    """Loss of one way to choose neurons over that of another, less 1, at the share where it stands worst."""
    found = []
    for share in sorted(rows.filter(pl.col("part") == "neurons")["kept"].drop_nulls().unique().to_list()):
        sides = (_part(rows, "neurons", name, kept=share, lookahead=ahead) for name, ahead in (a, b))
        one = _excess(*sides)
        found.append(Measured(one.value, one.low, one.high, f"worst: {share:.0%} kept, {one.note}"))
    if not found:
        raise NotEnoughRows("no rows of neurons")
    return highest(found)


def _heads(rows: pl.DataFrame, rival: str) -> Measured:
    same = {"heads_kept": HEADS}
    return _excess(_part(rows, "heads", "predictor", lookahead=1, **same), _part(rows, "heads", rival, **same))


def _lookahead(rows: pl.DataFrame) -> Measured:
    sides = (_part(rows, "neurons", "predictor", kept=NEURONS, lookahead=ahead) for ahead in (1, TOGETHER))
    return _excess(*sides)


def _zeros(rows: pl.DataFrame) -> Measured:
    """Mean over layers of a seed's calibration text."""
    found = _part(rows, "activity", "dense").group_by("seed").agg(pl.col("zeros").mean())
    return mean_interval(found["zeros"], "seeds")


def _later_cosine(rows: pl.DataFrame) -> Measured:
    """Of the second half of the layers, the one with the smallest cosine."""
    dense = _part(rows, "activity", "dense")
    layers = dense["place"].n_unique()
    found = []
    for layer in range(max(1, layers // 2), layers):
        values = dense.filter(pl.col("place") == layer)["cosine_before"].drop_nulls()
        one = mean_interval(values, "seeds")
        found.append(Measured(one.value, one.low, one.high, f"layer {layer}, {one.note}"))
    if not found:
        raise NotEnoughRows("one layer alone")
    return lowest(found)


def _recall(rows: pl.DataFrame) -> Measured:
    return mean_interval(_part(rows, "neurons", "predictor", kept=NEURONS, lookahead=TOGETHER)["recall"], "seeds")


def _union(rows: pl.DataFrame) -> Measured:
    part = _part(rows, "union", "predictor")
    largest = max(part["place"].to_list())
    found = mean_interval(part.filter(pl.col("place") == largest)["union_share"], "seeds")
    return Measured(found.value, found.low, found.high, f"{largest} rows, {found.note}")


def _speedup(rows: pl.DataFrame, method: str, peer: str) -> Measured:
    """Time of the peer over that of the method at the smallest share, within a repetition; a peer of fewer neurons
    has as many of them."""
    kept = min(_part(rows, "speed", method)["kept"].to_list())
    of_peer = None if peer == "dense" else kept
    chosen = pl.concat([_part(rows, "speed", method, kept=kept), _part(rows, "speed", peer, kept=of_peer)])
    return ratio_interval(chosen, peer, method, "seconds", on=["place"])


PREDICTED = ("predictor", TOGETHER)
IDLE = "up to about 80 % of heads and 95 % of neurons idle for an input (OPT-175B)"
KEPT = "no loss of accuracy up to about 75 % sparsity (OPT-175B)"
TRIVIAL = "none; trivial control"

CLAIMS = (
    Claim(
        "sparsity",
        "More than 60 % of the neurons of the model are zero for a token",
        paper=IDLE,
        measure=_zeros,
        holds=lambda measured: measured.low > 0.6,
        source="card",
    ),
    Claim(
        "oracle",
        "30 % of the neurons, chosen by an oracle for every token, raise the loss by less than 2 %",
        paper=IDLE,
        measure=functools.partial(_over_dense, part="neurons", method="oracle", kept=NEURONS),
        holds=lambda measured: measured.high < 0.02,
        source="card",
    ),
    Claim(
        "predictor",
        "Chosen by predictors half a block ahead, they raise it by less than 2 %",
        paper=KEPT,
        measure=functools.partial(_over_dense, part="neurons", method="predictor", kept=NEURONS, lookahead=TOGETHER),
        holds=lambda measured: measured.high < 0.02,
        source="card",
    ),
    Claim(
        "predictor-static",
        "Predictors have less loss than the most frequent neurons, at every share kept",
        paper="sparsity depends on the input",
        measure=functools.partial(_worst, a=PREDICTED, b=("static", None)),
        holds=lambda measured: measured.high < 0,
        source="card",
    ),
    Claim(
        "predictor-bytes",
        "Also than so many more of these as the predictor's weights would hold, in equal bytes read",
        paper=TRIVIAL,
        measure=functools.partial(_worst, a=PREDICTED, b=("static_bytes", None)),
        holds=lambda measured: measured.high < 0,
        source="reproduction",
    ),
    Claim(
        "predictor-magnitude",
        "And than neurons of the largest weights",
        paper=TRIVIAL,
        measure=functools.partial(_worst, a=PREDICTED, b=("magnitude", None)),
        holds=lambda measured: measured.high < 0,
        source="card",
    ),
    Claim(
        "oracle-predictor",
        "The oracle has no more loss than predictors, at every share",
        paper=TRIVIAL,
        measure=functools.partial(_worst, a=("oracle", None), b=PREDICTED),
        holds=lambda measured: measured.high <= 0,
        source="reproduction",
    ),
    Claim(
        "static-random",
        "The most frequent neurons have less loss than random ones, at every share",
        paper=TRIVIAL,
        measure=functools.partial(_worst, a=("static", None), b=("random", None)),
        holds=lambda measured: measured.high < 0,
        source="reproduction",
    ),
    Claim(
        "recall",
        "Of the active neurons predictors find more than 80 % in a list of 30 % of all",
        paper="none for a small model",
        measure=_recall,
        holds=lambda measured: measured.low > 0.8,
        source="reproduction",
    ),
    Claim(
        "heads-random",
        "Half of the heads, predicted a block ahead, have less loss than a random half",
        paper=IDLE,
        measure=functools.partial(_heads, rival="random"),
        holds=lambda measured: measured.high < 0,
        source="card",
    ),
    Claim(
        "heads-static",
        "And less than the half that is most often the larger one",
        paper=TRIVIAL,
        measure=functools.partial(_heads, rival="static"),
        holds=lambda measured: measured.high < 0,
        source="reproduction",
    ),
    Claim(
        "both",
        "Half of the heads and 30 % of the neurons, both predicted, raise the loss by less than 2 %",
        paper=KEPT,
        measure=functools.partial(_over_dense, part="both", method="predictor"),
        holds=lambda measured: measured.high < 0.02,
        source="card",
    ),
    Claim(
        "lookahead",
        "Predicting neurons from the block before and not from their own raises the loss by less than 1 %",
        paper="look-ahead prediction is possible",
        measure=_lookahead,
        holds=lambda measured: measured.high < 0.01,
        source="card",
    ),
    Claim(
        "residuals",
        "In later layers the residual streams of successive blocks have a cosine above .9",
        paper="the residual stream changes slowly between layers",
        measure=_later_cosine,
        holds=lambda measured: measured.low > 0.9,
        source="card",
    ),
    Claim(
        "union",
        "The lists of the largest batch together hold more than 80 % of the neurons: little is saved there",
        paper="none; what is measured at batch 1 says nothing of batch 32",
        measure=_union,
        holds=lambda measured: measured.low > 0.8,
        source="reproduction",
    ),
    Claim(
        "speed",
        "With its predictor a perceptron of 10 % of the neurons is more than twice as fast as the dense one",
        paper="latency of OPT-175B over 2x better than FasterTransformer",
        measure=functools.partial(_speedup, method="predicted", peer="dense"),
        holds=lambda measured: measured.low > 2,
        unit="x",
    ),
    Claim(
        "gather",
        "Gathering 10 % of the neurons takes less than twice as long as a dense perceptron of so many",
        paper=TRIVIAL,
        measure=functools.partial(_speedup, method="gathered", peer="fewer"),
        holds=lambda measured: measured.low > 0.5,
        source="reproduction",
        unit="x",
    ),
)


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Means over seeds: loss, and over the dense model's with its standard error; recall; bytes of weights that a
    step of one row reads; shares of zeros and unions; the median time over the dense perceptron's."""
    wanted = ("nll", "recall", "head_recall", "perceptron_bytes", "bytes_per_token", "zeros", "cosine_before",
              "union_share", "ratio")  # fmt: skip
    rows = with_ratios(rows)
    absent = [pl.lit(None, pl.Float64).alias(name) for name in wanted if name not in rows.columns]
    rows = rows.with_columns(absent)
    place = pl.when(pl.col("part") != "speed").then(pl.col("place"))
    dense = pl.col("nll").filter(pl.col("method").eq("dense") & pl.col("part").eq("neurons")).first().over("seed")
    return (
        rows.with_columns(place.alias("layer or rows"), (pl.col("nll") / dense - 1).alias("excess"))
        .group_by("part", "method", "lookahead", "kept", "heads_kept", "layer or rows", maintain_order=True)
        .agg(
            pl.col("nll").mean(),
            pl.col("excess").mean().alias("over dense"),
            (pl.col("excess").std() / pl.len().sqrt()).alias("standard error"),
            pl.col("recall").mean(),
            pl.col("head_recall").mean().alias("recall of heads"),
            pl.col("perceptron_bytes").first().alias("bytes of neurons and their predictors"),
            pl.col("bytes_per_token").first().alias("bytes/token"),
            pl.col("zeros").mean(),
            pl.col("cosine_before").mean().alias("cosine with the block before"),
            pl.col("union_share").mean().alias("share in the union"),
            pl.col("ratio").median().alias("time over dense"),
        )
    )
