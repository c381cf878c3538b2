"""Sparse decoding against dense on a CPU: one step at long contexts, the choice of tokens included.

    make peers && python -m experiments run attention.sparse_decode_speed      # about 4 minutes on 2 cores

One query a head reads float32 keys and values: all of them in XLA (two products and a softmax, or
jax.nn.dot_product_attention) and in PyTorch (scaled_dot_product_attention), or those that a selector names from its
index: Quest's pages of 16 with bounds in bfloat16, SOCKET with 60 tables of 8 bits, the last tokens, which need no
index, and the best by exact logits, which read all keys to choose. At the default scale heads are 128 wide, 8 of
them with keys of their own (``8/8``), or 32 that share 8 (``32/8``, with one list for each key head). Indexes are
built before. Functions take turns in one process, each call right after one of its own that does not count, and
ratios are of one repetition. Without PyTorch its rows are absent and its claims not judged.

Beside each ratio stands its ceiling: dense bytes over those of the index and of the rows that are read, which is what
a kernel could reach that is bound by memory.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from experiments.lab import Claim, Measured, NotEnoughRows, Trial, interleave, median_interval, new_figure
from hashml.accounting import stored_bytes
from hashml.attention.oracle import OracleTopK
from hashml.attention.quest import Quest
from hashml.attention.selection_controls import StreamingMask
from hashml.attention.selector_contract import Gqa, Selector, slot_positions
from hashml.attention.socket import Socket
from hashml.attention.sparse_decode import sparse_decode

PAPER = (
    "Joshi, Dixit, Chowdhury, Shrivastava, Gonzalez, Stoica, Agrawal, Desai: Inference Time Context Sparsity: "
    "Illusion or Opportunity?, 2026, arXiv 2605.24168"
)
SYSTEM = "hashml.attention.sparse_decode"
K = 1024
BLOCK = 2048
"""Entries of a list that are gathered at a time."""


@dataclass(frozen=True)
class Config:
    """The defaults are those of the claims."""

    contexts: tuple[int, ...] = (16 * K, 64 * K)
    sparsities: tuple[int, ...] = (10, 50)
    """Tokens of the context over tokens read."""
    heads: tuple[tuple[int, int], ...] = ((8, 8), (32, 8))
    """Query heads and key heads."""
    width: int = 128
    tables: int = 60
    always: int = 16
    """Sinks, and as many tokens of the window."""
    repetitions: int = 11


SCALES = {
    "tiny": Config(contexts=(512,), sparsities=(4,), heads=((2, 1),), width=8, tables=3, always=2, repetitions=6),
    "default": Config(),
}  # fmt: skip

DENSE = ("dense", "dense_jax", "dense_torch")
SELECTORS: dict[str, Callable[[Config], Selector]] = {
    "streaming": lambda config: StreamingMask(),
    "quest": lambda config: Quest(page_size=16, dtype="bfloat16"),
    "socket": lambda config: Socket(tables=config.tables),
    "oracle": lambda config: OracleTopK(),
}


def torch_is_here() -> bool:
    """Whether the peer is installed (`make peers`)."""
    return importlib.util.find_spec("torch") is not None


def methods(config: Config) -> list[tuple[str, int | None]]:
    """``(method, sparsity)`` of what is timed; dense ones have no sparsity."""
    dense = [name for name in DENSE if name != "dense_torch" or torch_is_here()]
    sparse = [(name, sparsity) for sparsity in config.sparsities for name in SELECTORS]
    return [*((name, None) for name in dense), *sparse]


def run(config: Config) -> Iterator[Trial]:
    measured = functools.lru_cache(maxsize=1)(functools.partial(times, config))
    for heads in config.heads:
        for context in config.contexts:
            for method, sparsity in methods(config):
                for repetition in range(config.repetitions):

                    def measure(
                        heads: tuple[int, int] = heads, context: int = context,
                        name: tuple[str, int | None] = (method, sparsity), at: int = repetition,
                    ) -> dict[str, Any]:  # fmt: skip
                        seconds, read = measured(heads, context)[name]
                        return {"seconds": float(seconds[at]), "bytes": read}

                    key = {"heads": f"{heads[0]}/{heads[1]}", "context": context, "method": method}
                    yield Trial(key | {"sparsity": sparsity, "repetition": repetition}, measure)


def count(config: Config) -> int:
    """Trials of a run, for the progress bar."""
    return len(config.heads) * len(config.contexts) * len(methods(config)) * config.repetitions


# --- what is timed ------------------------------------------------------------------------------------


def times(
    config: Config, heads: tuple[int, int], context: int
) -> dict[tuple[str, int | None], tuple[np.ndarray, int]]:
    """Seconds of every repetition, and the bytes that a step reads."""
    rng = np.random.default_rng(context)
    query_heads, kv_heads = heads
    q = rng.standard_normal((1, query_heads, config.width), dtype=np.float32)
    k, v = (rng.standard_normal((1, kv_heads, context, config.width), dtype=np.float32) for _ in range(2))
    operands = tuple(map(jnp.asarray, (q, k, v)))
    functions, read = {}, {}
    for method, sparsity in methods(config):
        if sparsity is None:
            functions[method, sparsity] = _dense(method, *operands)
            read[method, sparsity] = k.nbytes + v.nbytes
        else:
            functions[method, sparsity], read[method, sparsity] = sparse(config, method, sparsity, *operands)
    # Threads of PyTorch spin for a while, hence the calls ahead.
    named = {f"{method}:{sparsity}": call for (method, sparsity), call in functions.items()}
    seconds = interleave(named, repetitions=config.repetitions, warmup=1, lead=1)
    return {name: (seconds[f"{name[0]}:{name[1]}"], read[name]) for name in functions}


def sparse(
    config: Config, method: str, sparsity: int, q: Float[Array, "1 H D"], k: Float[Array, "1 K N D"],
    v: Float[Array, "1 K N D"],
) -> tuple[Callable[[], Any], int]:  # fmt: skip
    """A step of no argument, selection and reading, and the bytes of its index and of the rows that it reads."""
    selector, (heads, kv_heads, context) = SELECTORS[method](config), (q.shape[1], *k.shape[1:3])
    positions = slot_positions(jnp.array([context], jnp.int32), context)
    index = jax.jit(lambda k, v, at: selector.build(k, v, at, key=jax.random.key(0)))(k, v, positions)
    budget = context // sparsity
    gqa: Gqa = "head" if heads == kv_heads else "mean"

    @jax.jit
    def step(index: Any, q: Array, k: Array, v: Array, at: Array, now: Array) -> Array:
        chosen = selector.select(
            index, q, at, now, sinks=config.always, window=config.always, heavy=budget - 2 * config.always, gqa=gqa
        )
        return sparse_decode(q, k, v, *chosen, block=BLOCK)

    rows = 2 * kv_heads * budget * config.width * k.dtype.itemsize
    now = jnp.array([context - 1], jnp.int32)
    return functools.partial(step, index, q, k, v, positions, now), stored_bytes(index.slots) + rows


def _dense(method: str, q: Array, k: Array, v: Array) -> Callable[[], Any]:
    if method == "dense":
        return functools.partial(jax.jit(dense), q, k, v)
    if method == "dense_torch":
        return _torch(*(np.array(x) for x in (q, k, v)))
    # Its keys lie [B, N, K, D].
    given = jax.block_until_ready((q[:, None], k.swapaxes(1, 2), v.swapaxes(1, 2)))
    return functools.partial(jax.jit(jax.nn.dot_product_attention), *given)


def dense(q: Float[Array, "B H D"], k: Float[Array, "B K N D"], v: Float[Array, "B K N D"]) -> Float[Array, "B H D"]:
    """Softmax attention of one query a head as XLA has it."""
    groups = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2]) * q.shape[2] ** -0.5
    shares = jax.nn.softmax(jnp.einsum("bkjd,bknd->bkjn", groups, k), axis=-1)
    return jnp.einsum("bkjn,bknd->bkjd", shares, v).reshape(q.shape)


def _torch(*arrays: np.ndarray) -> Callable[[], Any]:
    torch = importlib.import_module("torch")
    q, k, v = (torch.from_numpy(x) for x in arrays)
    shared = q.shape[1] != k.shape[1]

    def read() -> Any:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=shared)

    return read


# --- claims -------------------------------------------------------------------------------------------


def speedup(
    rows: pl.DataFrame, method: str, sparsity: int, peers: tuple[str, ...], heads: str = "8/8", context: int = 64 * K
) -> Measured:
    """Time of the fastest of the peers over that of a method: median of the ratios within a repetition."""
    part = rows.filter(pl.col("heads").eq(heads) & pl.col("context").eq(context)).sort("repetition")
    wanted = part.filter(pl.col("method").eq(method) & pl.col("sparsity").eq(sparsity))
    absent = [name for name in peers if part.filter(pl.col("method") == name).is_empty()]
    if wanted.is_empty() or absent:
        raise NotEnoughRows(f"{', '.join(absent) or method} was not timed here at {context} tokens")
    fastest = np.min([part.filter(pl.col("method") == name)["seconds"].to_numpy() for name in peers], axis=0)
    return median_interval(fastest / wanted["seconds"].to_numpy(), "repetitions")


def _of_ceiling(rows: pl.DataFrame) -> Measured:
    """SOCKET's ratio over its ceiling, at 50x."""
    found = speedup(rows, "socket", 50, ("dense",))
    part = rows.filter(pl.col("heads").eq("8/8") & pl.col("context").eq(64 * K))
    dense_bytes, own = (part.filter(pl.col("method").eq(name) & pl.col("sparsity").eq_missing(sparsity))["bytes"][0]
                        for name, sparsity in (("dense", pl.lit(None)), ("socket", pl.lit(50))))  # fmt: skip
    ceiling = dense_bytes / own
    note = f"{found.note}; the ceiling is {ceiling:.3g}x"
    return Measured(found.value / ceiling, found.low / ceiling, found.high / ceiling, note)


TARGET = "this project's target"
H100 = "up to 10x over FlashInfer at 50x on an H100"
CLAIMS = (
    *(
        Claim(
            f"quest-{name}",
            f"At 64 K tokens and 50x sparsity a step with Quest is at least 4x faster than {words}",
            paper=H100,
            measure=functools.partial(speedup, method="quest", sparsity=50, peers=peers, heads=heads),
            holds=lambda measured: measured.low >= 4,
            source=TARGET,
            unit="x",
        )
        for name, words, peers, heads in (
            ("xla", "a dense one in XLA", ("dense", "dense_jax"), "8/8"),
            ("torch", "PyTorch's", ("dense_torch",), "8/8"),
            ("grouped", "the fastest dense one, 32 query heads sharing 8 key heads", DENSE, "32/8"),
        )
    ),
    Claim(
        "quest-10",
        "At 64 K tokens and 10x sparsity it is faster than the fastest dense one",
        paper="none",
        measure=functools.partial(speedup, method="quest", sparsity=10, peers=DENSE),
        holds=lambda measured: measured.low > 1,
        source=TARGET,
        unit="x",
    ),
    *(
        Claim(
            f"socket-{sparsity}",
            f"At 64 K tokens and {sparsity}x sparsity a step with SOCKET is 1.5x faster than the fastest dense one",
            paper="up to 1.5x the throughput of FlashAttention, with a CUDA kernel that scores",
            measure=functools.partial(speedup, method="socket", sparsity=sparsity, peers=DENSE),
            holds=lambda measured: measured.low >= 1.5,
            source="SOCKET's abstract",
            unit="x",
        )
        for sparsity in (10, 50)
    ),
    Claim(
        "socket-ceiling",
        "At 50x SOCKET reaches half of the ratio to XLA's dense step that its bytes allow",
        paper="none; 1.5 of 4.5 on a GPU at 10x",
        measure=_of_ceiling,
        holds=lambda measured: measured.low >= 0.5,
        source=TARGET,
    ),
)


# --- what is shown ------------------------------------------------------------------------------------


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """Milliseconds, median and quartiles, a line a method; dense times over its own, and the ceiling of that."""
    lines = []
    for (heads, context), part in rows.group_by("heads", "context", maintain_order=True):
        base = part.filter(pl.col("method") == "dense").sort("repetition")
        for (method, sparsity), own in part.group_by("method", "sparsity", maintain_order=True):
            seconds = own.sort("repetition")["seconds"].to_numpy()
            lower, median, upper = np.quantile(1e3 * seconds, [0.25, 0.5, 0.75])
            lines.append(
                {
                    "query/key heads": heads,
                    "context": context,
                    "method": method,
                    "sparsity": sparsity,
                    "ms": f"{median:.3g} ({lower:.3g} to {upper:.3g})",
                    "dense in XLA over it": float(np.median(base["seconds"].to_numpy() / seconds)),
                    "ceiling by bytes": base["bytes"][0] / own["bytes"][0],
                }
            )
    return pl.DataFrame(lines, infer_schema_length=None)


def figure(rows: pl.DataFrame) -> Figure:
    """Speed over XLA's dense step against the ceiling, at the longest context: a point a method and sparsity."""
    shapes = rows["heads"].unique(maintain_order=True).to_list()
    drawing, axes = new_figure(columns=len(shapes), height=4.0)
    shown = table(rows.filter(pl.col("context") == pl.col("context").max()))
    for ax, heads in zip(axes, shapes, strict=True):
        part = shown.filter(pl.col("query/key heads") == heads)
        for place, method in enumerate(part["method"].unique(maintain_order=True)):
            points = part.filter(pl.col("method") == method)
            ax.scatter(points["ceiling by bytes"], points["dense in XLA over it"], color=f"C{place}", label=method)
            for x, y, sparsity in points.select("ceiling by bytes", "dense in XLA over it", "sparsity").iter_rows():
                ax.annotate(f"{sparsity}x" if sparsity else "", (x, y), textcoords="offset points", xytext=(4, 3))
        ends = [1.0, max(2.0, float(np.max(part["ceiling by bytes"].to_numpy())))]
        ax.plot(ends, ends, color="0.5", linestyle="--", label="ceiling")
        ax.set(xscale="log", yscale="log", xlabel="ceiling by bytes", ylabel="XLA's dense time over its own",
               title=f"{heads} heads")  # fmt: skip
    axes[0].legend(fontsize="x-small")
    return drawing
