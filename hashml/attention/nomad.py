"""NoMAD-Attention: inner products with keys by look-ups in registers (Zhang, Yi, Xu, Shrivastava, NeurIPS 2024,
arXiv 2403.01273).

A key is cut in S parts of ``channels`` coordinates, and each becomes the 4-bit name of the nearest of 16 centroids,
learned once by k-means for each key head from keys as the cache holds them, after rotation:

    lut[s, c] = q_s . codebook[s, c]                                                 16 D products a query
    entry[s, c] = floor((lut[s, c] - min_s) / step + 1/2)  in 0..255                 a table fits a 128-bit register
    q . k_j ~ step * sum_s entry[s, code[s, j]] + sum_s min_s                        S look-ups a key, none multiplied
    step = max_s span_s / 255,  span_s = max_s - min_s                 and at least sum_s span_s / (65535 - S / 2)
                                                                       for S > 257, so that a sum has 16 bits

One ``step`` serves all tables, without which their integers could not be added. Softmax follows, and values are
untouched: the value product and the tables still multiply.

Codes lie as ``[blocks, S, 16]``: a block is 32 keys, byte t of quantiser s holds key t in its low and key t + 16 in
its high half. A shuffle of bytes then looks up 16 keys (`hashml.attention.nomad_native`); XLA has none, and its path,
which sums the same integers, is slower than the products themselves. Inference only: nothing here has a gradient.

Departures: the library's interleaved order of keys within a block is replaced by the plain one, and k-means starts
from k-means++ seeds, not from random points. Keys and queries beyond 1e17 count as 1e17, so that no finite input
overflows.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Key, UInt8, UInt16

from hashml.attention import nomad_native
from hashml.attention.code_lookup import over_tables
from hashml.attention.selector_contract import Index, Selector, grouped, need, per_head
from hashml.coding import kmeans, product_encode

AnyArray = Array | np.ndarray
Implementation = Literal["auto", "native", "xla"]
"""``"auto"``: native on a CPU where a compiler is found, else XLA."""

CENTROIDS = 16
BLOCK = 32
"""Keys of a block."""
_POINTS = 256 * CENTROIDS
"""Keys that k-means sees at most, as in the library that the paper's code calls."""
_MOST = 1e17
_LEAST = 1e-30
"""Least step of a table: beneath it all entries are equal."""


class Tables(NamedTuple):
    """What a query looks up.

    Attributes:
        entries: S tables.
        step: what one unit of them is worth.
        bias: sum of the tables' smallest entries.
    """

    entries: UInt8[Array, "*n S 16"]
    step: Float32[Array, "*n"]
    bias: Float32[Array, "*n"]


# --- codebooks and codes ------------------------------------------------------------------------------


def nomad_codebooks(
    key: Key[Array, ""], keys: Float[AnyArray, "n K D"], *, channels: int = 1, iterations: int = 25
) -> Float32[Array, "K S 16 {channels}"]:
    """Codebooks of each key head, learned by k-means; 16 D floats a head, whatever ``channels``.

    Args:
        key: of the keys that are drawn, and of the seeds of k-means.
        keys: as the cache holds them, that is after rotation; 4096 of them are drawn where there are more.
        channels: neighbouring coordinates that share a code, 1, 2 or 4 in the paper; they divide the width.
        iterations: of k-means, at most.

    Raises:
        ValueError: for no keys, channels that do not divide their width, or a negative number of iterations.
    """
    count, heads, width = keys.shape
    check_channels(channels, width)
    if not count:
        raise ValueError(f"keys has shape {keys.shape}; there must be at least one key")
    draw, seeds = jax.random.split(key)
    points = jnp.clip(jnp.asarray(keys, jnp.float32), -_MOST, _MOST)
    if count > _POINTS:
        points = points[jax.random.choice(draw, count, (_POINTS,), replace=False)]
    parts = points.reshape(points.shape[0], heads, -1, channels).transpose(1, 2, 0, 3)

    def centroids(seed: Array, part: Array) -> Array:
        return kmeans(seed, part, CENTROIDS, iterations=iterations).centroids

    drawn = jax.random.split(seeds, (heads, width // channels))
    return jax.lax.map(lambda head: jax.vmap(centroids)(*head), (drawn, parts))


def encode_keys(keys: Float[Array, "B K n D"], codebook: Float[Array, "K S R c"]) -> UInt8[Array, "B K n S"]:
    """Codes 0..15 of keys, each part's nearest centroid.

    Raises:
        ValueError: for a codebook of other heads, another width, or not 16 centroids.
    """
    batch, heads, count, width = keys.shape
    _check_codebook(codebook, heads, width)
    bounded = jnp.clip(keys.astype(jnp.float32), -_MOST, _MOST)
    lines = bounded.swapaxes(0, 1).reshape(heads, batch * count, width)
    codes = jax.vmap(product_encode)(lines, jnp.clip(codebook.astype(jnp.float32), -_MOST, _MOST))
    return codes.reshape(heads, batch, count, -1).swapaxes(0, 1).astype(jnp.uint8)


def pack_blocks(codes: UInt8[Array, "*n N S"]) -> UInt8[Array, "*n blocks S 16"]:
    """Codes in blocks of 32 keys; a last block is filled up with code 0. Only the low half of a byte counts."""
    slots = codes.shape[-2]
    short = [(0, 0)] * (codes.ndim - 2) + [(0, -slots % BLOCK), (0, 0)]
    blocks = jnp.pad(codes & 15, short).reshape(*codes.shape[:-2], -(-slots // BLOCK), 2, 16, codes.shape[-1])
    low, high = blocks[..., 0, :, :], blocks[..., 1, :, :]
    return (low | (high << 4)).swapaxes(-1, -2)


def unpack_blocks(blocks: UInt8[Array, "*n blocks S 16"], slots: int) -> UInt8[Array, "*n {slots} S"]:
    """The codes of the first ``slots`` keys.

    Raises:
        ValueError: for more slots than the blocks hold, or a negative number of them.
    """
    count, quantisers = blocks.shape[-3:-1]
    if not 0 <= slots <= BLOCK * count:
        raise ValueError(f"slots is {slots}; {count} blocks hold 0 to {BLOCK * count} keys")
    halves = jnp.stack([blocks & 15, blocks >> 4], axis=-3).swapaxes(-1, -2)
    return halves.reshape(*blocks.shape[:-3], count * BLOCK, quantisers)[..., :slots, :]


def write_codes(
    blocks: UInt8[Array, "B K blocks S 16"], codes: UInt8[Array, "B K n S"], at: Int32[Array, "B P n"]
) -> UInt8[Array, "B K blocks S 16"]:
    """The blocks with keys' codes at slots; those outside of the slots go nowhere. Other keys are untouched."""
    batch, heads, count = blocks.shape[:3]
    at = per_head(jnp.where((at < 0) | (at >= count * BLOCK), count * BLOCK, at), heads)
    b, k = jnp.arange(batch)[:, None], jnp.arange(heads)[None, :]

    def write(place: Array, blocks: Array) -> Array:
        slot = jax.lax.dynamic_index_in_dim(at, place, axis=2, keepdims=False)
        code = jax.lax.dynamic_index_in_dim(codes, place, axis=2, keepdims=False) & 15
        where = (b, k, slot // BLOCK, slice(None), slot % 16)
        old = blocks.at[where].get(mode="clip")
        high = (slot % BLOCK >= 16)[..., None]
        return blocks.at[where].set(jnp.where(high, (old & 15) | (code << 4), (old & 240) | code), mode="drop")

    return jax.lax.fori_loop(0, codes.shape[2], write, blocks)


# --- scores -------------------------------------------------------------------------------------------


def lookup_tables(q: Float[Array, "B H D"], codebook: Float[Array, "K S R c"]) -> Float32[Array, "B K J S 16"]:
    """``q_s . codebook[s, c]`` in float32, before they are rounded.

    Raises:
        ValueError: as `encode_keys`, and for query heads that the key heads do not divide.
    """
    return _products(_queries(q, codebook), codebook)


def _queries(q: Array, codebook: Array) -> Array:
    """By key head, ``[B, K, J, D]``."""
    _check_codebook(codebook, codebook.shape[0], q.shape[2])
    return grouped(q, codebook.shape[0])


def _products(queries: Array, codebook: Array) -> Array:
    parts = jnp.clip(queries, -_MOST, _MOST).reshape(*queries.shape[:3], codebook.shape[1], -1)
    books = jnp.clip(codebook.astype(jnp.float32), -_MOST, _MOST)
    return jnp.einsum("bkjsc,ksrc->bkjsr", parts, books, precision=jax.lax.Precision.HIGHEST)


def _native_tables(queries: Array, codebook: Array) -> Tables:
    """Of batch and key heads as one axis."""
    return Tables(*nomad_native.query_tables(_rows(queries), codebook.astype(jnp.float32)))


def quantise_tables(tables: Float32[Array, "*n S 16"]) -> Tables:
    """Tables of bytes with a step that all S share, whose sums are below 2^16."""
    quantisers = tables.shape[-2]
    least = tables.min(axis=-1)
    span = tables.max(axis=-1) - least
    step = span.max(axis=-1) / 255
    if quantisers > 257:  # as many whole entries fit into 16 bits; each of more is rounded up by at most 1/2
        step = jnp.maximum(step, span.sum(axis=-1) / (65535 - quantisers / 2))
    step = jnp.maximum(step, _LEAST)
    entries = jnp.floor((tables - least[..., None]) / step[..., None, None] + 0.5)
    return Tables(jnp.clip(entries, 0, 255).astype(jnp.uint8), step, least.sum(axis=-1))


def query_tables(q: Float[Array, "B H D"], codebook: Float[Array, "K S R c"]) -> Tables:
    """The tables of queries, ``[B, K, J, S, 16]``."""
    return quantise_tables(lookup_tables(q, codebook))


def lookup_sums(
    entries: UInt8[Array, "B K J S 16"],
    blocks: UInt8[Array, "_ _ blocks _ 16"],
    *,
    implementation: Implementation = "auto",
) -> UInt16[Array, "B K J slots"]:
    """Each key's entries added up, 32 keys a block; the same integers whatever the implementation.

    Raises:
        ValueError: for blocks that do not fit the tables, or another implementation.
        NativeUnavailable: for ``"native"`` where it is not.
    """
    group = entries.shape[2]
    _check_blocks(blocks, entries, entries.shape[3])
    slots = BLOCK * blocks.shape[2]

    def native(entries: Array, blocks: Array) -> Array:
        return nomad_native.lookup_sums(_rows(entries), _rows(blocks)).reshape(*entries.shape[:3], slots)

    def xla(entries: Array, blocks: Array) -> Array:
        def term(place: Array, code: Array) -> Array:
            table = jax.lax.dynamic_index_in_dim(entries, place, axis=3, keepdims=False)
            return jnp.take_along_axis(table, code, axis=3, mode="clip").astype(jnp.uint16)

        return over_tables(term, unpack_blocks(blocks, slots).swapaxes(2, 3), group, jnp.uint16)

    return _dispatch(implementation, native, xla, entries, blocks)


def nomad_scores(
    q: Float[Array, "B H D"],
    blocks: UInt8[Array, "_ _ blocks _ 16"],
    codebook: Float[Array, "K S R c"],
    *,
    implementation: Implementation = "auto",
) -> Float32[Array, "B K J slots"]:
    """``q . k`` of all keys, 32 a block, without the factor ``1 / sqrt(D)``; padding has scores, too.

    Raises:
        ValueError: for shapes that do not fit.
    """
    queries = _queries(q, codebook)
    _check_blocks(blocks, queries, codebook.shape[1])

    def native(queries: Array, codebook: Array, blocks: Array) -> Array:
        found = nomad_native.lookup_logits(*_native_tables(queries, codebook), _rows(blocks))
        return found.reshape(*queries.shape[:3], -1)

    def xla(queries: Array, codebook: Array, blocks: Array) -> Array:
        entries, step, bias = quantise_tables(_products(queries, codebook))
        sums = lookup_sums(entries, blocks, implementation="xla")
        return step[..., None] * sums.astype(jnp.float32) + bias[..., None]

    return _dispatch(implementation, native, xla, queries, codebook, blocks)


def nomad_attention(
    q: Float[Array, "B H D"],
    blocks: UInt8[Array, "_ _ blocks _ 16"],
    values: Float[Array, "B K N V"],
    codebook: Float[Array, "K S R c"],
    length: Int32[Array, " B"],
    *,
    scale: float | int | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B H V"]:
    """What one query a head reads of the first ``length`` keys of its row, in the dtype of ``values``.

    The native path makes scores, softmax and value product in one pass over codes and values, for float32 values;
    those of another dtype it casts, so that XLA's path is the better one for them.

    Args:
        q: queries, rotated; head ``h`` reads key head ``h // (H / K)``.
        blocks: codes of at least N keys.
        values: of the keys.
        codebook: of the codes.
        length: keys that are seen; 0 gives zeros.
        scale: of the logits; ``None``: ``1 / sqrt(D)``.
        implementation: native or XLA.

    Raises:
        ValueError: for shapes that do not fit.
        NativeUnavailable: for ``"native"`` where it is not.
    """
    batch, heads, slots, width = values.shape
    if blocks.shape[:2] != (batch, heads) or not slots <= BLOCK * blocks.shape[2] < slots + BLOCK:
        raise ValueError(f"blocks has shape {blocks.shape}; with values {values.shape} it must be "
                         f"[{batch}, {heads}, {-(-slots // BLOCK)}, S, 16]")  # fmt: skip
    queries = _queries(q, codebook)
    _check_blocks(blocks, queries, codebook.shape[1])
    if scale is None:
        scale = 1 / math.sqrt(q.shape[2])

    def native(queries: Array, codebook: Array, blocks: Array, values: Array, length: Array) -> Array:
        entries, step, _ = _native_tables(queries, codebook)
        of_rows = jnp.repeat(length, heads)
        wide = values.astype(jnp.float32)
        found = nomad_native.attend(entries, scale * step, _rows(blocks), _rows(wide), of_rows)
        return found.reshape(*queries.shape[:3], width)

    def xla(queries: Array, codebook: Array, blocks: Array, values: Array, length: Array) -> Array:
        entries, step, _ = quantise_tables(_products(queries, codebook))
        slope = scale * step
        sums = lookup_sums(entries, blocks, implementation="xla")[..., :slots].astype(jnp.int32)
        seen = (jnp.arange(slots) < length[:, None])[:, None, None]
        # Integers are subtracted before they become logits: the largest is then exactly 0.
        rising = slope[..., None] >= 0
        most = jnp.where(seen, sums, -1).max(axis=-1, keepdims=True, initial=-1)
        least = jnp.where(seen, sums, 65536).min(axis=-1, keepdims=True, initial=65536)
        logits = slope[..., None] * (sums - jnp.where(rising, most, least)).astype(jnp.float32)
        share = jnp.where(seen, jnp.exp(jnp.where(seen, logits, 0.0)), 0.0)
        mass = share.sum(axis=-1, keepdims=True)
        held = jnp.where(seen[:, :, 0, :, None], values.astype(jnp.float32), 0.0)
        out = jnp.einsum("bkjn,bknv->bkjv", share, held)
        return jnp.where(mass == 0, 0.0, out / jnp.where(mass == 0, 1.0, mass))

    out = _dispatch(implementation, native, xla, queries, codebook, blocks, values, length)
    return out.reshape(*q.shape[:2], width).astype(values.dtype)


def _dispatch(implementation: Implementation, native: Any, xla: Any, *arrays: Array) -> Array:
    match implementation:
        case "xla":
            return xla(*arrays)
        case "native":
            return native(*arrays)
        case "auto":
            # Asking whether it is available compiles it, which nobody needs where programs run elsewhere.
            if jax.default_backend() != "cpu" or not nomad_native.available():
                return xla(*arrays)
            return jax.lax.platform_dependent(*arrays, cpu=native, default=xla)
    raise ValueError(f"implementation is {implementation!r}; allowed are 'auto', 'native' and 'xla'")


# --- a selector ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Nomad(Selector):
    """Keys scored by look-ups; ``learned`` is the codebook of the layer, from `nomad_codebooks`.

    Attributes:
        implementation: native or XLA.
    """

    implementation: Implementation = "auto"

    def build(
        self,
        keys: Float[Array, "B K N D"],
        values: Float[Array, "B K N V"],
        positions: Int32[Array, "B P N"],
        *,
        key: Key[Array, ""] | None = None,
        learned: Any = None,
    ) -> Index:
        del values, positions, key
        book = need("learned", learned, "Nomad", "for its codebook, which is of other text")
        codes = pack_blocks(encode_keys(keys, book))
        return Index({"codes": codes}, {"codebook": book, "slots": jnp.zeros((keys.shape[2], 0))})

    def append(
        self,
        index: Index,
        keys: Float[Array, "B K n D"],
        values: Float[Array, "B K n V"],
        at: Int32[Array, "B P n"],
    ) -> Index:
        del values
        slots = index.fixed["slots"].shape[0]
        codes = encode_keys(keys, index.fixed["codebook"])
        written = write_codes(index.slots["codes"], codes, jnp.where(at < slots, at, -1))
        return Index({"codes": written}, index.fixed)

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        found = nomad_scores(q, index.slots["codes"], index.fixed["codebook"], implementation=self.implementation)
        return found[..., : index.fixed["slots"].shape[0]]


def _rows(x: Array) -> Array:
    """Batch and key heads as one axis, as the native functions have them."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _check_blocks(blocks: Array, of_queries: Array, quantisers: int) -> None:
    batch, heads = of_queries.shape[:2]
    if blocks.shape[:2] != (batch, heads) or blocks.shape[3] != quantisers:
        raise ValueError(f"blocks has shape {blocks.shape}; of {batch} rows, {heads} key heads and {quantisers} "
                         f"quantisers it must be [{batch}, {heads}, blocks, {quantisers}, 16]")  # fmt: skip


def check_channels(channels: int, width: int) -> None:
    """Raises ValueError unless ``channels`` is positive and divides ``width``."""
    if channels < 1 or width % channels:
        raise ValueError(f"channels is {channels}; it must be at least 1 and divide the width of a key, {width}")


def _check_codebook(codebook: Array, heads: int, width: int) -> None:
    of_heads, quantisers, entries, channels = codebook.shape
    if entries != CENTROIDS:
        raise ValueError(f"codebook has {entries} centroids; a table of {CENTROIDS} entries fits a register")
    if (of_heads, quantisers * channels) != (heads, width):
        raise ValueError(f"codebook is of {of_heads} heads and {quantisers} parts of {channels} channels; keys have "
                         f"{heads} heads of width {width}")  # fmt: skip
