"""RACE's time grows as the length, softmax's as its square: one head, forward and with its gradient, on a CPU.

    make peers && python -m experiments run attention.race_scaling

RACE, causal and not, beside softmax attention in JAX, which forms its matrix, and in PyTorch, which does not. Every
ratio is taken within one repetition of one process, each call right after one of its own that does not count. Softmax
stops where it takes seconds. Without PyTorch its rows are absent and its claims not judged.

Then one forward and backward pass over more tokens than memory holds: queries, keys, values and the gradients of the
outputs are made chunk by chunk from a hash, keys are collected into a state, queries read it and pull its gradient,
keys pull theirs (`hashml.attention.race_streamed`); of the gradients checksums are kept.
"""

import functools
import importlib
import importlib.util
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Array, Float, UInt32
from matplotlib.figure import Figure

from experiments.lab import Claim, Measured, NotEnoughRows, Trial, interleave, median_interval, new_figure
from experiments.lab import ratio_interval as ratio
from hashml.attention.linear_state import LinearState, merge_states
from hashml.attention.race import race_attention, race_state
from hashml.attention.race_streamed import collect_keys, pull_keys, pull_queries, read_queries
from hashml.hashing.simhash import srp_planes
from hashml_kernels.bits import lowbias32

PAPER = (
    "Joshi, Chowdhury, Kanakamedala, Singh, Tu, Shrivastava: RACE Attention: A Strictly Linear-Time Attention for "
    "Long-Sequence Training, ICLR 2026, arXiv 2510.04008"
)
SYSTEM = "hashml.attention.race"
PASSES = {"forward": "forward", "gradient": "forward and backward"}
K = 1024


@dataclass(frozen=True)
class Config:
    """One head of 64; tables as in the targets."""

    lengths: tuple[int, ...] = (1 * K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K, 256 * K)
    longest_softmax: int = 8 * K
    """In JAX: its matrix of weights is N x N."""
    longest_torch: int = 16 * K
    features: int = 64
    tables: int = 4
    bits: int = 3
    repetitions: int = 7
    streamed: int = 75_000_000
    """Tokens of the pass over more than memory holds, rounded up to whole chunks; 0 leaves it out."""
    chunk: int = 16 * K
    """Tokens that exist at a time there."""


SCALES = {
    "tiny": Config(lengths=(128, 256), longest_softmax=128, longest_torch=256, features=8, tables=2, bits=2,
                   repetitions=6, streamed=600, chunk=256),
    "default": Config(),
}  # fmt: skip


def torch_is_here() -> bool:
    """Whether the peer is installed (`make peers`)."""
    return importlib.util.find_spec("torch") is not None


def methods(config: Config, length: int) -> list[str]:
    """What is timed at a length, PyTorch last."""
    softmax = ["softmax"] if length <= config.longest_softmax else []
    torch = ["torch", "torch_causal"] if length <= config.longest_torch and torch_is_here() else []
    return ["race", "race_causal", *softmax, *torch]


def run(config: Config) -> Iterator[Trial]:
    times = functools.lru_cache(maxsize=1)(functools.partial(_times, config))
    for direction in PASSES:
        for length in config.lengths:
            for method in methods(config, length):
                for repetition in range(config.repetitions):

                    def measure(
                        direction: str = direction, length: int = length, method: str = method, at: int = repetition
                    ) -> dict[str, Any]:
                        seconds = float(times(direction, length)[method][at])
                        return {"seconds": seconds} | dict.fromkeys(Streamed._fields)

                    yield Trial(_key(direction, method, length, repetition), measure)
    if config.streamed:
        yield Trial(_key("streamed", "race", config.streamed, 0), functools.partial(_streamed_row, config))


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    timed = len(PASSES) * sum(len(methods(config, length)) for length in config.lengths)
    return timed * config.repetitions + bool(config.streamed)


def _key(direction: str, method: str, tokens: int, repetition: int) -> dict[str, Any]:
    return {"pass": direction, "method": method, "tokens": tokens, "repetition": repetition}


# --- what is timed ------------------------------------------------------------------------------------


def _times(config: Config, direction: str, length: int) -> dict[str, np.ndarray]:
    """Seconds of every method at a length; threads of PyTorch spin for a while, hence the calls ahead."""
    rng = np.random.default_rng(length)
    arrays = [rng.standard_normal((1, 1, length, config.features), dtype=np.float32) for _ in range(4)]
    functions = {name: timed(config, direction, name, arrays) for name in methods(config, length)}
    return interleave(functions, repetitions=config.repetitions, warmup=1, lead=1)


def timed(config: Config, direction: str, method: str, arrays: list[np.ndarray]) -> Callable[[], Any]:
    """A function of no argument: the output of q, k, v, or their gradients where the output's is ``g``."""
    if method.startswith("torch"):
        return _torch(direction, method == "torch_causal", arrays)
    planes = srp_planes(jax.random.key(0), config.tables, config.bits, config.features)

    def attend(q: Array, k: Array, v: Array) -> Array:
        if method == "softmax":
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            return jax.nn.dot_product_attention(q, k, v).swapaxes(1, 2)
        return race_attention(q, k, v, planes, causal=method == "race_causal")

    def gradient(q: Array, k: Array, v: Array, g: Array) -> tuple[Array, ...]:
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(g)

    operands = [jnp.asarray(x) for x in arrays]
    if direction == "forward":
        return functools.partial(jax.jit(attend), *operands[:3])
    return functools.partial(jax.jit(gradient), *operands)


def _torch(direction: str, causal: bool, arrays: list[np.ndarray]) -> Callable[[], Any]:
    torch = importlib.import_module("torch")
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=causal)
    q, k, v, g = (torch.from_numpy(x) for x in arrays)

    def forward() -> Any:
        with torch.no_grad():
            return attend(q, k, v)

    def gradient() -> Any:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves), leaves, g)

    return forward if direction == "forward" else gradient


# --- more tokens than memory holds --------------------------------------------------------------------


class Streamed(NamedTuple):
    """What is kept of the pass. Sums of squares stand for arrays that nobody could store."""

    tokens_passed: int
    collect_seconds: float
    queries_seconds: float
    keys_seconds: float
    peak_bytes: int
    """Resident memory of the process at its highest."""
    out_square: float
    d_q_square: float
    d_k_square: float
    d_v_square: float


def noise(config: Config) -> UInt32[Array, "C D"]:
    """Words that all chunks share; `made` turns them into those of a chunk."""
    words = lowbias32(np.arange(config.chunk * config.features, dtype=np.uint32))
    return jnp.asarray(words).reshape(config.chunk, config.features)


def made(noise: UInt32[Array, "C D"], chunk: Array | int, which: int) -> Float[Array, "1 1 C D"]:
    """Array ``which`` (q, k, v, g: 0 to 3) of a chunk: uniform numbers of mean 0 and variance 1, by a hash."""
    own = lowbias32(jnp.asarray(chunk, jnp.uint32) * np.uint32(4) + np.uint32(which))
    words = lowbias32(noise + own)
    return ((words >> 8).astype(jnp.float32) * (2 * math.sqrt(3) * 2.0**-24) - math.sqrt(3))[None, None]


def streamed(config: Config) -> Streamed:
    """One forward and backward pass over ``config.streamed`` tokens, rounded up to whole chunks."""
    planes = srp_planes(jax.random.key(0), config.tables, config.bits, config.features)

    def square(*arrays: Array) -> tuple[Array, ...]:
        return tuple(jnp.sum(x * x) for x in arrays)

    @jax.jit
    def collect(state: LinearState, noise: Array, chunk: Array) -> LinearState:
        return collect_keys(state, made(noise, chunk, 1), made(noise, chunk, 2), planes)

    @jax.jit
    def queries(state: LinearState, d_state: LinearState, noise: Array, chunk: Array) -> tuple:
        q, g = made(noise, chunk, 0), made(noise, chunk, 3)
        out, pulled = read_queries(state, q, planes), pull_queries(state, q, g, planes)
        return merge_states(d_state, pulled.d_state), square(out, pulled.d_q)

    @jax.jit
    def keys(d_state: LinearState, noise: Array, chunk: Array) -> tuple:
        pulled = pull_keys(d_state, made(noise, chunk, 1), made(noise, chunk, 2), planes)
        return square(pulled.d_k, pulled.d_v)

    words, chunks = noise(config), [np.uint32(chunk) for chunk in range(-(-config.streamed // config.chunk))]
    squares, state = np.zeros(4), race_state(1, 1, planes, config.features)
    d_state = jax.tree.map(jnp.zeros_like, state)
    times = [time.perf_counter()]
    for chunk in chunks:
        # Waiting for each chunk bounds the chunks that are under way.
        state = jax.block_until_ready(collect(state, words, chunk))
    times.append(time.perf_counter())
    for chunk in chunks:
        d_state, found = queries(state, d_state, words, chunk)
        squares[:2] += np.asarray(found, np.float64)
    times.append(time.perf_counter())
    for chunk in chunks:
        squares[2:] += np.asarray(keys(d_state, words, chunk), np.float64)
    times.append(time.perf_counter())
    first, second, third = np.diff(times).tolist()
    out, d_q, d_k, d_v = squares.tolist()
    return Streamed(len(chunks) * config.chunk, first, second, third, _peak_bytes(), out, d_q, d_k, d_v)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _streamed_row(config: Config) -> dict[str, Any]:
    found = streamed(config)
    return {"seconds": found.collect_seconds + found.queries_seconds + found.keys_seconds} | found._asdict()


# --- claims -------------------------------------------------------------------------------------------


def _at(rows: pl.DataFrame, direction: str, methods: tuple[str, ...]) -> pl.DataFrame:
    part = rows.filter(pl.col("pass").eq(direction) & pl.col("method").is_in(methods))
    absent = set(methods) - set(part["method"])
    if absent:
        raise NotEnoughRows(f"{', '.join(sorted(absent))} was not timed here")
    return part


def _speedup(rows: pl.DataFrame, direction: str, method: str, peer: str, tokens: int) -> Measured:
    """Time of ``peer`` over that of ``method``: median of the ratios within a repetition."""
    part = _at(rows.filter(pl.col("tokens") == tokens), direction, (method, peer))
    return ratio(part, peer, method, "seconds", on=["repetition"])


def _curves(rows: pl.DataFrame, direction: str, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Lengths, and seconds ``[repetition, length]``."""
    part = _at(rows, direction, (method,)).sort("repetition", "tokens")
    lengths = np.sort(part["tokens"].unique().to_numpy())
    return lengths, part["seconds"].to_numpy().reshape(-1, lengths.size)


def _slope(rows: pl.DataFrame, direction: str, method: str, first: int | None = None, last: int = 0) -> Measured:
    """Slope of log time against log length from ``first`` tokens on, or over the last ``last`` doublings."""
    lengths, seconds = _curves(rows, direction, method)
    chosen = lengths >= first if first is not None else np.arange(lengths.size) >= lengths.size - 1 - last
    if chosen.sum() < 2:
        raise NotEnoughRows(f"{method} was timed at {lengths.max()} tokens at most")
    slopes = np.polynomial.polynomial.polyfit(np.log(lengths[chosen]), np.log(seconds[:, chosen]).T, 1)[1]
    found = median_interval(slopes, "repetitions")
    note = f"{lengths[chosen].min()} to {lengths[chosen].max()} tokens, {found.note}"
    return Measured(found.value, found.low, found.high, note)


def _crossover(rows: pl.DataFrame, direction: str, method: str, peer: str) -> Measured:
    """Tokens from which ``method`` stays faster than ``peer``, between lengths by straight lines in logarithms."""
    lengths, ours = _curves(rows, direction, method)
    common, theirs = _curves(rows, direction, peer)
    gains = np.log(theirs / ours[:, np.isin(lengths, common)])
    found = median_interval([_crossing(np.log(common), gain) for gain in gains], "repetitions")
    note = f"{found.note}; {common[0]} means at the shortest length or below"
    return Measured(found.value, found.low, found.high, note)


def _crossing(at: np.ndarray, gain: np.ndarray) -> float:
    slower = np.flatnonzero(gain <= 0)
    if not slower.size:
        return float(np.exp(at[0]))
    place = slower[-1]
    if place == at.size - 1:
        return math.inf
    share = -gain[place] / (gain[place + 1] - gain[place])
    return float(np.exp(at[place] + share * (at[place + 1] - at[place])))


def _streamed(rows: pl.DataFrame, column: str, scale: float) -> Measured:
    part = rows.filter(pl.col("pass") == "streamed")
    if part.is_empty():
        raise NotEnoughRows("no pass over more tokens than memory holds")
    value = float(part[column][0]) * scale
    return Measured(value, value, value, f"one pass over {part['tokens_passed'][0]:,} tokens")


TARGET = "this project's target"
LINEAR = "strictly linear time"
CLAIMS = (
    Claim(
        "forward-16k",
        "Forward at 16 K tokens RACE is at least 30x faster than PyTorch's softmax attention",
        paper="on a CPU 40x faster at 4 M tokens than FlashAttention-2 on a GH200",
        measure=functools.partial(_speedup, direction="forward", method="race", peer="torch", tokens=16 * K),
        holds=lambda measured: measured.low >= 30,
        source=TARGET,
        unit="x",
    ),
    *(
        Claim(
            f"crossover-{direction}{suffix}",
            f"{PASSES[direction].capitalize()}, {words}RACE is faster than PyTorch's softmax from 2 K tokens on",
            paper="near 131 K tokens, a CPU against a GPU; at 2 K tokens a model was 1.2x slower on 16 threads",
            measure=functools.partial(_crossover, direction=direction, method=f"race{suffix}", peer=f"torch{suffix}"),
            holds=lambda measured: measured.high < 2 * K,
            source=TARGET,
            unit="tokens",
        )
        for direction in PASSES
        for suffix, words in (("", ""), ("_causal", "causal "))
    ),
    *(
        Claim(
            f"slope-{method}",
            f"Time of {words} forward and backward grows at most as length to the 1.15, from 4 K tokens on",
            paper=LINEAR,
            measure=functools.partial(_slope, direction="gradient", method=method, first=4 * K),
            holds=lambda measured: measured.high <= 1.15,
        )
        for method, words in (("race", "RACE"), ("race_causal", "causal RACE"))
    ),
    *(
        Claim(
            f"slope-{method}",
            f"That of softmax in {words} grows at least as length to the 1.7, over its last two doublings",
            paper="quadratic",
            measure=functools.partial(_slope, direction="gradient", method=method, last=2),
            holds=lambda measured: measured.low >= 1.7,
        )
        for method, words in (("softmax", "JAX"), ("torch", "PyTorch"))
    ),
    Claim(
        "memory",
        "75 M tokens pass forward and backward through one head in less than 20 GB",
        paper="75 M tokens on a Xeon Gold 5220R in about 100 s, 4 heads of 128",
        measure=functools.partial(_streamed, column="peak_bytes", scale=1e-9),
        holds=lambda measured: measured.high < 20,
        unit="GB",
    ),
)


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Milliseconds, median and quartiles, a line a pass and length."""
    lines = []
    for (direction, tokens), part in rows.group_by("pass", "tokens", maintain_order=True):
        line: dict[str, Any] = {"pass": PASSES.get(str(direction), "forward and backward, chunk by chunk")}
        line["tokens"] = tokens
        for method in ("race", "race_causal", "softmax", "torch", "torch_causal"):
            times = 1e3 * part.filter(pl.col("method") == method)["seconds"].to_numpy()
            lower, median, upper = np.quantile(times, [0.25, 0.5, 0.75]) if times.size else (0, 0, 0)
            spread = f" ({lower:.3g} to {upper:.3g})" if times.size > 1 else ""
            line[f"{method}, ms"] = f"{median:.3g}{spread}" if times.size else "–"
        lines.append(line)
    return pl.DataFrame(lines)


def figure(rows: pl.DataFrame) -> Figure:
    """Seconds against tokens, a panel a pass, both axes logarithmic."""
    drawing, axes = new_figure(columns=len(PASSES), height=4.0)
    for ax, (direction, title) in zip(axes, PASSES.items(), strict=True):
        part = rows.filter(pl.col("pass") == direction)
        for method in part["method"].unique(maintain_order=True):
            lengths, seconds = _curves(rows, direction, method)
            lower, median, upper = np.quantile(seconds, [0.25, 0.5, 0.75], axis=0)
            style = {"linestyle": "--" if method.endswith("causal") else "-", "marker": "o", "markersize": 3}
            spread = [median - lower, upper - median]
            ax.errorbar(lengths, median, spread, capsize=2, label=method.replace("_", ", "), **style)
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds", title=title)
        ax.legend()
    return drawing
