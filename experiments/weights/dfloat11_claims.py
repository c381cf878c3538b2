"""What the paper and its card say of DFloat11, measured on the rows of `experiments.weights.dfloat11`."""

import functools

import numpy as np
import polars as pl

from experiments.lab import Claim, Measured, NotEnoughRows, highest, lowest, mean_interval, median_interval
from experiments.weights.dfloat11_cells import BYTES, CODERS
from experiments.weights.trained_weights import CONTROL, RANDOM_BITS

GB = 1e9


def _arrays(rows: pl.DataFrame, dtype: str = "bfloat16", *, control: bool = False) -> pl.DataFrame:
    found = rows.filter(
        pl.col("part").eq("array") & pl.col("dtype").eq(dtype) & (pl.col("model") == CONTROL).eq(control)
    )
    if found.is_empty():
        raise NotEnoughRows(f"no arrays of {dtype}")
    return found


def totals(rows: pl.DataFrame, dtype: str = "bfloat16") -> pl.DataFrame:
    """Bits a weight of whole models, a row a model and seed."""
    arrays = _arrays(rows, dtype)
    known = [name for name in ("limit", "exponent_entropy", "mean_length", *CODERS, *BYTES) if name in arrays.columns]
    return arrays.group_by("model", "seed", maintain_order=True).agg(
        pl.col("weights").sum(),
        *((pl.col(name).cast(pl.Float64) * pl.col("weights")).sum().alias(name) / pl.col("weights").sum()
          for name in known if arrays[name].null_count() == 0),
    )  # fmt: skip


def _worst(rows: pl.DataFrame, number: pl.Expr) -> Measured:
    """The number of the model where it is highest; the mean over its seeds, if it has several."""
    cells = []
    for (model,), part in totals(rows).group_by("model", maintain_order=True):
        values = part.select(number.alias("number"))["number"].to_numpy()
        if len(values) > 1:
            found = mean_interval(values, "models")
            cells.append(Measured(found.value, found.low, found.high, f"worst: {model}, {found.note}"))
        else:
            cells.append(_counted(float(values[0]), f"worst: {model}, counted"))
    return highest(cells)


def _counted(value: float | int, note: str = "counted") -> Measured:
    return Measured(value, value, value, note)


def _changed_weights(rows: pl.DataFrame) -> Measured:
    found = rows.filter(pl.col("part").is_in(["array", "decode"]))
    if found.is_empty():
        raise NotEnoughRows("no arrays")
    return _counted(int(found["changed"].sum()), f"{found['part'].eq('array').sum()} arrays, every coder and decoder")


def _changed_logits(rows: pl.DataFrame) -> Measured:
    found = rows.filter(pl.col("part") == "logits")
    if found.is_empty():
        raise NotEnoughRows("no logits")
    return _counted(int(found["changed"].sum()), f"of {int(found['logits'].sum())} logits of {len(found)} models")


def _apart_over_joint(rows: pl.DataFrame) -> Measured:
    """Bytes of a code for each matrix over those of one for all, where the ratio is worst."""
    found = rows.filter(pl.col("part").eq("block") & (pl.col("model") != CONTROL))
    if found.is_empty():
        raise NotEnoughRows("no blocks")
    worst = found.sort(pl.col("apart") / pl.col("joint")).row(-1, named=True)
    note = f"worst of {len(found)}: {worst['model']}, {worst['name']}"
    return _counted(worst["apart"] / worst["joint"], note)


def _over_bytes(rows: pl.DataFrame, codecs: tuple[str, ...]) -> Measured:
    """Bytes over those of the smallest of the codecs of bytes, where the ratio is worst."""
    found = [name for name in codecs if name in totals(rows).columns]
    if not found:
        raise NotEnoughRows(f"{', '.join(codecs)} was not installed where this ran")
    return _worst(rows, pl.col("huffman") / pl.min_horizontal(found))


def _random_bits(rows: pl.DataFrame) -> Measured:
    found = _arrays(rows, control=True).filter(pl.col("name") == RANDOM_BITS)
    return _counted(float(np.max(found["huffman"].to_numpy())) / 16, f"stored as {found['chosen'][0]}")


def _half_of_bfloat16(rows: pl.DataFrame) -> Measured:
    """What float16 saves over what bfloat16 saves, on the model where most."""
    both = totals(rows, "float16").join(totals(rows), on=["model", "seed"], suffix="_bfloat16")
    found = both.with_columns(((16 - pl.col("huffman")) / (16 - pl.col("huffman_bfloat16"))).alias("share"))
    worst = found.sort("share").row(-1, named=True)
    return _counted(worst["share"], f"worst: {worst['model']}")


def speed(rows: pl.DataFrame, method: str = "native", dtype: str = "bfloat16") -> Measured:
    """GB a second of output, of the weights where it is slowest."""
    part = rows.filter(pl.col("part").eq("decode") & pl.col("method").eq(method) & pl.col("dtype").eq(dtype))
    if part.is_empty():
        raise NotEnoughRows(f"{method} was not timed here")
    cells = []
    for (content,), own in part.group_by("model", maintain_order=True):
        found = median_interval(own["bytes"].to_numpy() / own["seconds"].to_numpy() / GB, "repetitions")
        busy = float(own["cores"][0])
        cells.append(Measured(found.value, found.low, found.high, f"{content}, {busy:.2f} cores, {found.note}"))
    return lowest(cells)


def passes(rows: pl.DataFrame, tokens: int, method: str) -> np.ndarray:
    """Seconds of the forward passes over so many tokens, in the order of repetitions."""
    own = pl.col("part").eq("forward") & pl.col("tokens").eq(tokens) & pl.col("method").eq(method)
    found = rows.filter(own).sort("repetition")["seconds"].to_numpy()
    if not len(found):
        raise NotEnoughRows(f"no passes over {tokens} tokens")
    return found


def _ends(rows: pl.DataFrame) -> tuple[int, int]:
    tokens = rows.filter(pl.col("part") == "forward")["tokens"].unique().sort()
    if len(tokens) < 2:
        raise NotEnoughRows("passes over fewer than two numbers of tokens")
    return int(tokens[0]), int(tokens[-1])


def _slowdown(rows: pl.DataFrame, last: bool) -> Measured:
    """Time of a pass with compressed weights over one with dense ones, over the fewest tokens or the most."""
    tokens = _ends(rows)[last]
    found = median_interval(passes(rows, tokens, "compressed") / passes(rows, tokens, "dense"), "repetitions")
    return Measured(found.value, found.low, found.high, f"{tokens} tokens, {found.note}")


def _overhead_growth(rows: pl.DataFrame) -> Measured:
    """What compression adds to a pass over the most tokens, over what it adds to one over the fewest."""
    first, last = (passes(rows, tokens, "compressed") - passes(rows, tokens, "dense") for tokens in _ends(rows))
    return median_interval(last / first, "repetitions")


TARGET = "this project's target"
CLAIMS = (
    Claim(
        "size",
        "Every model takes at most 70 % of its bfloat16 bytes, norms and side arrays included",
        paper="about 30 % smaller; 67.6 % to 69.5 % of models from 8 B weights on",
        measure=functools.partial(_worst, number=pl.col("huffman") / 16),
        holds=lambda measured: measured.high <= 0.70,
    ),
    Claim(
        "limit",
        "And at most 1.5 % more than the entropy limit of its arrays",
        paper="none; about 1 % without side arrays, 3 % with them, in the reference's layout",
        measure=functools.partial(_worst, number=pl.col("huffman") / pl.col("limit")),
        holds=lambda measured: measured.high <= 1.015,
        source=TARGET,
    ),
    Claim(
        "entropy",
        "Exponents have at most 2.7 bits of entropy, where they have most",
        paper="about 2.6 bits",
        measure=functools.partial(_worst, number=pl.col("exponent_entropy")),
        holds=lambda measured: measured.high <= 2.7,
        source="section 2",
        unit="bits",
    ),
    Claim(
        "weights",
        "No weight comes back with another bit, whatever the coder",
        paper="bit-for-bit identical",
        measure=_changed_weights,
        holds=lambda measured: measured.value == 0,
        unit="weights",
    ),
    Claim(
        "logits",
        "No logit of a forward pass with compressed weights has another bit",
        paper="bit-for-bit identical outputs",
        measure=_changed_logits,
        holds=lambda measured: measured.value == 0,
        unit="logits",
    ),
    Claim(
        "layout",
        "Chunks of equally many symbols take less than the reference's layout of 64 bits and gaps",
        paper="none; 10.66 bits against 10.80 for a Gaussian, by counting",
        measure=functools.partial(_worst, number=pl.col("huffman") / pl.col("gaps")),
        holds=lambda measured: measured.high < 1,
        source="this project's layout",
    ),
    Claim(
        "code-for-each",
        "In every block a code for each matrix takes no more than one for all, as the reference has it",
        paper="one code for a transformer block",
        measure=_apart_over_joint,
        holds=lambda measured: measured.high <= 1,
        source="the reference's container",
    ),
    Claim(
        "bytes",
        "A model takes less than by zlib or zstd, of its bytes as they lie or of planes",
        paper="none",
        measure=functools.partial(_over_bytes, codecs=BYTES[:-1]),
        holds=lambda measured: measured.high < 1,
        source=TARGET,
    ),
    Claim(
        "zipnn",
        "And less than by ZipNN, which knows floats",
        paper="none",
        measure=functools.partial(_over_bytes, codecs=("zipnn",)),
        holds=lambda measured: measured.high < 1,
        source=TARGET,
    ),
    Claim(
        "random-bits",
        "Random bits take no more than they are",
        paper="none",
        measure=_random_bits,
        holds=lambda measured: measured.value == 1,
        source="control",
    ),
    Claim(
        "float16",
        "float16 saves less than half of what bfloat16 does",
        paper="little is gained on models native in FP16",
        measure=_half_of_bfloat16,
        holds=lambda measured: measured.high < 0.5,
        source="an issue of the repository",
    ),
    Claim(
        "decode",
        "One core decodes at least 0.5 GB a second of bfloat16",
        paper="none",
        measure=speed,
        holds=lambda measured: measured.low >= 0.5,
        source=TARGET,
        unit="GB/s",
    ),
    Claim(
        "few-tokens",
        "Over the fewest tokens a pass with compressed weights takes at most twice the time",
        paper="about 2x slower at batch 1, on a GPU",
        measure=functools.partial(_slowdown, last=False),
        holds=lambda measured: measured.high <= 2,
        source="repository",
        unit="x",
    ),
    Claim(
        "many-tokens",
        "Over the most tokens it takes at most 1.1 times the time: the overhead fades",
        paper="the overhead fades with the batch",
        measure=functools.partial(_slowdown, last=True),
        holds=lambda measured: measured.high <= 1.1,
        source="repository",
        unit="x",
    ),
    Claim(
        "constant",
        "What compression adds to a pass does not double from the fewest tokens to the most",
        paper="the overhead is constant per forward pass",
        measure=_overhead_growth,
        holds=lambda measured: measured.high < 2,
        source="repository",
        unit="x",
    ),
)
