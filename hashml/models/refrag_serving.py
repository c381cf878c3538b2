"""Serving REFRAG: embeddings that are kept, prompts that name them, and what the decoder is spared.

    store = ChunkStore(lambda chunks: embed_chunks(params, config, chunks), size=16, features=4096, capacity=100_000)
    rows = store.rows(passages)                                        encodes what it has not seen before
    model = refrag_model(config.decoder, store.capacity)
    ids = prompt(question, passages, rows, answer_begins, expanded=(3,), vocabulary=config.decoder.vocabulary)
    generate(model, with_chunks(params["decoder"], store.table), [ids], 50, temperature=0)

A chunk's embedding is the same whatever stands beside it, so one row serves every question. Chunks go through the
encoder in batches of one fixed shape: what is kept equals what would be computed again, bit for bit. `prefill_cost`
counts what the first token takes, the encoder too where nothing is kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hashml.models.decoder import DecoderConfig, DecoderModel, Params, decoder_model
from hashml.models.refrag import RefragConfig

AnyArray = Array | np.ndarray
TABLE = "chunk_embeddings"
"""Of the parameters of a `refrag_model`."""


@jax.jit
def _written(table: Array, rows: Array, embeddings: Array) -> Array:
    return table.at[rows].set(embeddings, mode="drop")


class ChunkStore:
    """Embeddings of chunks by their tokens, in a table of fixed shape.

    Attributes:
        size: tokens of a chunk.
        capacity: rows of the table.
    """

    def __init__(
        self, embed: Callable[[Array], Array], *, size: int, features: int, capacity: int, batch: int = 64
    ) -> None:
        """An empty store.

        Args:
            embed: ``chunks [batch, size] -> embeddings [batch, features]``, row by row; jitted here.
            size: tokens of a chunk.
            features: width of an embedding.
            capacity: chunks that fit.
            batch: chunks that are embedded at a time.

        Raises:
            ValueError: for sizes below 1.
        """
        for name, value in (("size", size), ("features", features), ("capacity", capacity), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it is at least 1")
        self.size, self.capacity, self._batch = size, capacity, batch
        self._embed = jax.jit(embed)
        self._table = jnp.zeros((capacity, features), jnp.float32)
        self._rows: dict[bytes, int] = {}

    def __len__(self) -> int:
        """Chunks that are kept."""
        return len(self._rows)

    @property
    def table(self) -> Float[Array, "capacity d"]:
        """Embeddings by row, zeros where there is none yet."""
        return self._table

    def rows(self, chunks: Int[AnyArray, "N k"]) -> Int[np.ndarray, " N"]:
        """The row of each chunk; those not seen before are embedded.

        Raises:
            ValueError: for chunks of another size, or more than fit; nothing is embedded then.
        """
        tokens = np.ascontiguousarray(np.asarray(chunks), np.int32)
        if tokens.shape[1] != self.size:
            raise ValueError(f"chunks has chunks of {tokens.shape[1]} tokens; size is {self.size}")
        keys = [row.tobytes() for row in tokens]
        fresh = {key: at for at, key in enumerate(keys) if key not in self._rows}
        if len(self) + len(fresh) > self.capacity:
            raise ValueError(
                f"chunks has {len(fresh)} new chunks; of a capacity of {self.capacity}, {len(self)} are taken"
            )
        places = list(fresh.values())
        for begin in range(0, len(places), self._batch):
            part = places[begin : begin + self._batch]
            fed = np.zeros((self._batch, self.size), np.int32)
            fed[: len(part)] = tokens[part]
            first = len(self)
            # Rows of padding go beyond the table, where nothing is written: every batch is one program.
            to = np.where(np.arange(self._batch) < len(part), first + np.arange(self._batch), self.capacity)
            self._table = _written(self._table, to, self._embed(fed))
            self._rows |= {keys[at]: first + n for n, at in enumerate(part)}
        return np.array([self._rows[key] for key in keys], np.int64)


@functools.lru_cache
def refrag_model(config: DecoderConfig, rows: int) -> DecoderModel:
    """A decoder whose prompts may name chunks: id ``V + r`` is row ``r`` of ``params["chunk_embeddings"] [rows, d]``.

    It generates tokens below V alone, and serves wherever a `DecoderModel` does: `generate`, `full_engine`, caches.
    `with_chunks` makes its parameters, `prompt` its prompts.

    Raises:
        ValueError: for fewer rows than 1.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; a table of chunk embeddings has at least 1")
    plain = decoder_model(config)

    def embed(params: Params, tokens: Array) -> Array:
        vocabulary, table = config.vocabulary, params[TABLE]
        token = params["embedding"][jnp.minimum(tokens, vocabulary - 1)]
        chunk = table[jnp.clip(tokens - vocabulary, 0, rows - 1)]
        return jnp.where((tokens < vocabulary)[..., None], token, chunk.astype(token.dtype))

    wider = dataclasses.replace(config, vocabulary=config.vocabulary + rows)
    return plain._replace(config=wider, embed=embed)


def with_chunks(decoder: Params, embeddings: Float[Array, "rows d"]) -> Params:
    """Parameters of a `refrag_model`.

    Raises:
        ValueError: for embeddings of another width.
    """
    width = decoder["embedding"].shape[1]
    if embeddings.shape[1] != width:
        raise ValueError(f"embeddings have width {embeddings.shape[1]}; the decoder's is {width}")
    return decoder | {TABLE: embeddings}


def prompt(
    before: Sequence[int],
    chunks: Int[AnyArray, "L k"],
    rows: Int[AnyArray, " R"],
    after: Sequence[int],
    *,
    expanded: Collection[int] = (),
    vocabulary: int,
) -> list[int]:
    """Ids of a prompt for `hashml.models.refrag.refrag_model`: ``vocabulary + row`` for a chunk, or its tokens.

    Args:
        before, after: tokens around the chunks.
        chunks: their tokens.
        rows: of the table, from `ChunkStore.rows`.
        expanded: places of the chunks that are read as tokens.
        vocabulary: tokens of the decoder.

    Raises:
        ValueError: for rows that are not one a chunk, or a place that does not exist.
    """
    chunks, rows = np.asarray(chunks), np.asarray(rows)
    if len(rows) != len(chunks):
        raise ValueError(f"rows has {len(rows)} rows; there are {len(chunks)} chunks")
    if bad := [place for place in expanded if not 0 <= place < len(chunks)]:
        raise ValueError(f"expanded has {bad[0]}; allowed are places from 0 to {len(chunks) - 1}")
    found = list(before)
    for place, (tokens, row) in enumerate(zip(chunks.tolist(), rows.tolist(), strict=True)):
        found += tokens if place in expanded else [vocabulary + row]
    return [*found, *after]


class PrefillCost(NamedTuple):
    """What stands before the first token of an answer, for one prompt."""

    positions: int
    """That the decoder reads, n."""
    flops: int
    """Of the decoder: products of its layers, attention over all pairs, one row of logits."""
    encoder_flops: int
    """Of encoder and phi, 0 where embeddings are kept."""
    kv_bytes: int
    """Of keys and values."""
    embedding_bytes: int
    """Of embeddings that are read."""


def prefill_cost(
    config: RefragConfig,
    *,
    context: int,
    others: int,
    expanded: int | None = 0,
    kept: bool = True,
    item_bytes: int = 4,
) -> PrefillCost:
    """Costs of a prefill; a product of ``[a, b]`` and ``[b, c]`` is ``2 a b c`` FLOPs, norms and softmax are free.

    Args:
        config: of the model.
        context: tokens.
        others: tokens around the context.
        expanded: chunks that are, T'; ``None``: no chunk is compressed, as without REFRAG.
        kept: whether the embeddings were computed before.
        item_bytes: of a number.

    Raises:
        ValueError: for a context that chunks do not divide, more expanded chunks than there are, or negative sizes.
    """
    if context < 0 or others < 0:
        raise ValueError(f"context is {context} and others is {others}; neither is negative")
    if context % config.size:
        raise ValueError(f"context has {context} tokens; allowed are multiples of size, {config.size}")
    chunks = context // config.size
    compressed = 0
    if expanded is not None:
        if not 0 <= expanded <= chunks:
            raise ValueError(f"expanded is {expanded}; it is from 0 to the {chunks} chunks, or None")
        compressed = chunks - expanded
    decoder = config.decoder
    n = others + compressed + (chunks - compressed) * config.size
    d, width = decoder.features, decoder.head_dim
    weights = 2 * d * width * (decoder.heads + decoder.kv_heads) + d * decoder.hidden * (3 if decoder.gated else 2)
    per_layer = 2 * weights * n + 4 * n * n * decoder.heads * width
    w, k = config.features, config.size
    one = config.layers * (24 * w * w * k + 4 * k * k * w) + 2 * (config.hidden or d) * (w + d)
    # Which chunks will be expanded is not known before: all of them are encoded.
    return PrefillCost(
        positions=n,
        flops=decoder.layers * per_layer + 2 * d * decoder.vocabulary,
        encoder_flops=0 if kept or expanded is None else chunks * one,
        kv_bytes=2 * decoder.layers * n * decoder.kv_heads * width * item_bytes,
        embedding_bytes=compressed * d * item_bytes,
    )
