"""The cells of `experiments.attention.context_sparsity`: selectors by name, what they learn, what they store."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attention.context_sparsity_decode import SINKS, WINDOW, Recency, decoded
from experiments.data import language
from experiments.data.counter import stream
from experiments.kvcache import fixtures, language_models, recall
from experiments.kvcache.think_cells import rotated
from hashml.attention.double_sparsity import DoubleSparsity, heavy_channels
from hashml.attention.hash_attention import HashAttention, train_hash_attention
from hashml.attention.magic_pig import MagicPig
from hashml.attention.oracle import OracleTopK, OracleTopP
from hashml.attention.pq_cache import PQCache
from hashml.attention.quest import Quest
from hashml.attention.selection_controls import UniformRandom
from hashml.attention.selector_contract import Selector, index_bits
from hashml.attention.socket import HammingLSH, Socket
from hashml.attention.v_attention import VAttention
from hashml.kvcache import IntGroup
from hashml.models.decoder import DecoderConfig, decoder_model

TABLES, WIDTH = 60, 128
"""Of SOCKET for heads of this width; narrower heads have as many fewer tables, at least 2."""
HIDDEN = (64, 64)
"""Of HashAttention's maps; the paper's are 128 wide, for heads four times as wide as those here."""
CALIBRATION_ROWS = 4
"""Training sequences that HashAttention and Double Sparsity learn from, twice as many of the recall model's."""

SELECTORS: dict[str, Callable[[DecoderConfig], Selector]] = {
    "streaming": lambda decoder: Recency(),
    "random": lambda decoder: UniformRandom(weighted=False),
    "oracle": lambda decoder: OracleTopK(),
    "top_p": lambda decoder: OracleTopP(0.95),
    "quest": lambda decoder: Quest(page_size=8, dtype="bfloat16"),
    "double_sparsity": lambda decoder: DoubleSparsity(max(2, decoder.head_dim // 4)),
    "hash_attention": lambda decoder: HashAttention(),
    "pq_cache": lambda decoder: PQCache(groups=2, bits=6),
    "socket": lambda decoder: Socket(tables=tables_of(decoder)),
    "hamming": lambda decoder: HammingLSH(tables=tables_of(decoder), value_norm_power=0),
    "magic_pig": lambda decoder: MagicPig(),
    "v_attention": lambda decoder: VAttention(OracleTopK()),
}
ADAPTIVE = ("top_p", "magic_pig")
"""They choose how much they read; no budget is set."""
RANKED = ("quest", "double_sparsity", "hash_attention", "pq_cache", "socket", "hamming")
"""They have an index, and read the best by it."""
SAMPLE_SPARSITY = 5
"""Of vAttention: its lists are made for one sparsity."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A selector on a model, behind a codec or over exact keys; it is scored at all sparsities at once."""

    fixture: str
    method: str
    codec: str | None = None


def tables_of(decoder: DecoderConfig) -> int:
    """Tables of SOCKET: as many bits for each coordinate as for heads of 128."""
    return max(2, round(TABLES * decoder.head_dim / WIDTH))


def cells(models: tuple[str, ...], methods: tuple[str, ...], codecs: tuple[str, ...]) -> list[Cell]:
    """All cells; codecs are of the first model, under SOCKET and under all tokens."""
    found = [Cell(fixture, method) for fixture in models for method in methods]
    return found + [Cell(models[0], method, codec) for codec in codecs for method in ("all", "socket")]


def sparsities_of(cell: Cell, sparsities: tuple[int, ...]) -> tuple[int | None, ...]:
    """Sparsities that a cell is scored at, None where it chooses its own, or reads all."""
    if cell.method in ADAPTIVE or cell.method == "all":
        return (None,)
    if cell.codec is not None or cell.method == "v_attention":
        return (SAMPLE_SPARSITY,)
    return sparsities


@functools.lru_cache(maxsize=2)
def scores(
    size: fixtures.Size, cell: Cell, sparsities: tuple[int, ...], seed: int, steps: int
) -> dict[int | None, dict[str, float]]:
    """What a cell scores on the model of a seed, by sparsity."""
    decoder = fixtures.setting(size, cell.fixture, "prompt").decoder
    selector = Recency() if cell.method == "all" else SELECTORS[cell.method](decoder)
    wanted = sparsities_of(cell, sparsities)
    length = fixtures.setting(size, cell.fixture, "prompt").tokens
    options: dict[str, Any] = {"sampled": cell.method == "random"}
    shares = [1.0 if x is None else 1 / x for x in wanted]
    if cell.method == "v_attention":
        # So long that it holds, at the mean length of what is decoded, as many tokens as others read there.
        mean = (fixtures.setting(size, cell.fixture, "prompt").prompt + 1 + length) / 2
        options["heavy"] = max(round(mean / SAMPLE_SPARSITY) - SINKS - WINDOW, 2)
        shares = [1.0]
    if cell.codec is not None:
        options["codecs"] = _codecs(cell.codec, decoder)
    learned = learned_of(size, cell.fixture, seed, cell.method, steps)
    found = decoded(size, cell.fixture, seed, selector, shares, learned=learned, **options)
    bits = bits_of(selector, decoder, None if learned is None else learned[0])
    return {x: row | {"index_bits": bits, "bytes_share": _bytes_share(row, bits, decoder)}
            for x, row in zip(wanted, found, strict=True)}  # fmt: skip


def _codecs(name: str, decoder: DecoderConfig) -> tuple[IntGroup, IntGroup]:
    if not name.startswith("int"):
        raise ValueError(f"codec is {name!r}; allowed are int2, int4 and int8")
    codec = IntGroup(int(name[3:]), group=decoder.head_dim)
    return codec, codec


def _bytes_share(row: dict[str, float], bits: float, decoder: DecoderConfig) -> float:
    """Bytes that a step reads for a key head, index and rows in float16, over those of a dense one. Each query head
    of a group reads rows of its own, which is the most that it can be."""
    token = 4 * decoder.head_dim
    rows = row["tokens_read"] * token * decoder.heads // decoder.kv_heads
    return (row["tokens_seen"] * bits / 8 + rows) / (row["tokens_seen"] * token)


def bits_of(selector: Selector, decoder: DecoderConfig, learned: Any = None) -> float:
    """Bits of index that a selector stores for each token and key head, over keys in float16; what belongs to no
    token apart."""
    slots = 256
    keys = jnp.zeros((1, decoder.kv_heads, slots, decoder.head_dim), jnp.float16)
    positions = jnp.arange(slots, dtype=jnp.int32)[None, None]
    index = jax.eval_shape(lambda: selector.build(keys, keys, positions, key=jax.random.key(0), learned=learned))
    return index_bits(index, 1, decoder.kv_heads, slots)


# --- what is learned --------------------------------------------------------------------------------------


def training_text(size: fixtures.Size, fixture: str, seed: int, rows: int) -> np.ndarray:
    """Sequences that nothing is scored on."""
    if fixture == "stories":
        return fixtures.told(STORIES + seed, rows, size.length)
    if fixture == "recall":
        return recall.sequences(2 * rows, stream(seed, "recall", "calibration")).tokens
    return language.sequences(language.splits(language_models.RECIPES[fixture].text).train, size.length, rows)


STORIES = 3000
"""Seeds of the stories to learn from begin here."""


@functools.lru_cache(maxsize=4)
def learned_of(size: fixtures.Size, fixture: str, seed: int, method: str, steps: int) -> tuple[Any, ...] | None:
    """What a selector learns for each layer, from training text."""
    if method not in ("double_sparsity", "hash_attention"):
        return None
    decoder = fixtures.setting(size, fixture, "prompt").decoder
    text = training_text(size, fixture, seed, CALIBRATION_ROWS)
    queries, keys = rotated(decoder_model(decoder), fixtures.params(size, fixture, seed), text)
    if method == "double_sparsity":
        count = max(2, decoder.head_dim // 4)
        return tuple(heavy_channels(q, k, count) for q, k in zip(queries, keys, strict=True))
    length = text.shape[1]
    seen = jnp.broadcast_to(jnp.tri(length, dtype=bool), (text.shape[0], length, length))
    return tuple(
        train_hash_attention(
            jax.random.fold_in(jax.random.key(seed), place), q, k, seen, top=length // 10, hidden=HIDDEN, steps=steps
        ).params
        for place, (q, k) in enumerate(zip(queries, keys, strict=True))
    )
