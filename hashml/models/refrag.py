"""REFRAG: one embedding in place of k tokens (Lin, Ghosh, Low, Shrivastava, Mohan 2025, arXiv 2509.01092).

A context of ``L k`` tokens is cut in chunks of ``size`` k; a small bidirectional encoder makes a vector of each,

    c[i] = mean of encoder(chunk[i]);        e[i] = phi(c[i]),  a perceptron into the decoder's embedding space

which depends on that chunk alone: it is computed once and kept, whatever is asked later. The decoder reads e[i] as if
it were a token's embedding. The T' chunks that are ``chosen`` are *expanded*, read as their k tokens:

    n = before + (L - T') + T' k + after             positions, numbered one after the other; T' and so n are static

instead of ``before + L k + after``: time to the first token falls by k where the layers' products dominate and by k^2
where attention does, the key-value cache by k. A chunk that is absent takes no position. `layout` is the index
arithmetic, `mixed_inputs` the decoder's input, `output_logits` what it says.

Stages of training are in `hashml.models.refrag_training`, the choice of chunks in `hashml.models.refrag_policy`, kept
embeddings, generation and costs in `hashml.models.refrag_serving`. The paper's encoder is RoBERTa; here any vectors
will do, and the encoder of this file reads the decoder's own tokens. The paper puts the question first; `Order` has
both.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hashml.models.decoder import DecoderConfig, Params, layer, unembed
from hashml.models.decoder import init_params as init_decoder
from hashml.models.exact_attention import causal_attention
from hashml.models.text_encoder import EncoderBlock

AnyArray = Array | np.ndarray
Order = Literal["context_first", "question_first"]


@dataclasses.dataclass(frozen=True)
class RefragConfig:
    """Sizes of decoder and encoder; hashable, hence static under `jax.jit`.

    Attributes:
        decoder: sizes and choices.
        size: tokens of a chunk, k.
        features: width of the encoder.
        layers, heads: of the encoder, whose perceptrons are four times as wide as it is.
        hidden: width of phi's hidden layer; ``None``: as wide as the decoder.

    Raises:
        ValueError: for sizes that are not positive or do not fit together.
    """

    decoder: DecoderConfig
    size: int
    features: int = 128
    layers: int = 2
    heads: int = 4
    hidden: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "features", "layers", "heads", *(() if self.hidden is None else ("hidden",))):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
        if self.features % self.heads:
            raise ValueError(f"heads is {self.heads}; it divides features, {self.features}")


# --- the sequence that the decoder sees -----------------------------------------------------------


def chunked(context: Int[AnyArray, "B s"], size: int) -> Int[Array, "B L {size}"]:
    """The chunks of a context.

    Raises:
        ValueError: for a size below 1, or one that does not divide the context.
    """
    if size < 1:
        raise ValueError(f"size is {size}; it is at least 1")
    batch, length = context.shape
    if length % size:
        raise ValueError(f"context has {length} tokens; allowed are multiples of size, {size}")
    return jnp.asarray(context).reshape(batch, length // size, size)


def expanded_count(chunks: int, share: float | int) -> int:
    """T' = round(share L), the chunks that are expanded.

    Raises:
        ValueError: for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it is from 0 to 1")
    return round(share * chunks)


class Layout(NamedTuple):
    """Where each position of the shortened context comes from; positions that hold nothing come first."""

    source: Int[Array, "B m"]
    """Row of ``[embeddings of L chunks; embeddings of L k tokens]``."""
    valid: Bool[Array, "B m"]


def layout(
    chosen: Int[AnyArray, "B t"], chunks: int, size: int, present: Bool[AnyArray, "B L"] | None = None
) -> Layout:
    """The gather map of contexts of which some chunks are expanded, of ``m = L - T' + T' k`` positions.

    Args:
        chosen: the chunks to expand, in any order; T' is its length.
        chunks: L.
        size: tokens of a chunk, k.
        present: which chunks there are; ``None``: all. What is absent takes no position, even if it is chosen.

    Raises:
        ValueError: for more chosen chunks than there are, or sizes below 1.
    """
    batch, count = chosen.shape
    if chunks < 1 or size < 1:
        raise ValueError(f"chunks is {chunks} and size is {size}; both are at least 1")
    if count > chunks:
        raise ValueError(f"chosen names {count} chunks; there are {chunks}")
    total = chunks + count * (size - 1)
    places = jnp.arange(chunks)
    expanded = (jnp.asarray(chosen)[:, :, None] == places).any(axis=1)
    widths = jnp.where(expanded, size, 1)
    if present is not None:
        widths = jnp.where(jnp.asarray(present), widths, 0)
    ends = jnp.cumsum(widths, axis=1)
    # Absent chunks leave room in front, so that the context's last position stands right before what follows.
    starts = ends - widths + total - ends[:, -1:]
    rows = jnp.arange(batch)[:, None]
    begun = jnp.zeros((batch, total), jnp.int32).at[rows, starts].add(1, mode="drop")
    chunk = jnp.maximum(jnp.cumsum(begun, axis=1) - 1, 0)
    offset = jnp.arange(total) - jnp.take_along_axis(starts, chunk, axis=1)
    is_token = jnp.take_along_axis(expanded, chunk, axis=1)
    source = jnp.where(is_token, chunks + chunk * size + offset, chunk)
    valid = jnp.arange(total) >= total - ends[:, -1:]
    return Layout(jnp.where(valid, source, 0), valid)


def mixed_inputs(
    decoder: Params,
    before: Int[AnyArray, "B a"],
    context: Int[AnyArray, "B s"],
    after: Int[AnyArray, "B b"],
    embeddings: Float[Array, "B L d"],
    chosen: Int[AnyArray, "B t"],
    present: Bool[AnyArray, "B L"] | None = None,
) -> tuple[Float[Array, "B n d"], Int[Array, "B n"]]:
    """Inputs of the decoder and their positions, -1 where there is nothing.

    Args:
        decoder: its parameters.
        before, after: tokens around the context; either may have none.
        context: tokens, of which those of the chosen chunks are read.
        embeddings: of the chunks, e.
        chosen, present: see `layout`.

    Raises:
        ValueError: where context and embeddings do not fit.
    """
    batch, chunks = embeddings.shape[:2]
    if context.shape[1] % chunks:
        raise ValueError(f"context has {context.shape[1]} tokens; allowed are multiples of the {chunks} chunks")
    source, valid = layout(chosen, chunks, context.shape[1] // chunks, present)
    table = decoder["embedding"]
    # Only what is expanded is looked up: most tokens of the context are never read.
    token = jnp.take_along_axis(jnp.asarray(context), jnp.maximum(source - chunks, 0), axis=1)
    compressed = jnp.take_along_axis(embeddings, jnp.minimum(source, chunks - 1)[..., None], axis=1)
    middle = jnp.where((source < chunks)[..., None], compressed.astype(table.dtype), table[token])
    x = jnp.concatenate([table[jnp.asarray(before)], middle, table[jnp.asarray(after)]], axis=1)
    there = jnp.concatenate([jnp.ones(before.shape, bool), valid, jnp.ones((batch, after.shape[1]), bool)], axis=1)
    return x, jnp.where(there, jnp.cumsum(there, axis=1) - 1, -1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "last", "remat", "block"))
def forward_embedded(
    decoder: Params,
    config: DecoderConfig,
    x: Float[Array, "B n d"],
    positions: Int[Array, "B n"],
    *,
    last: int | None = None,
    remat: bool = False,
    block: int = 256,
) -> Float[Array, "B o V"]:
    """`hashml.models.decoder.forward` of embeddings: logits at the ``last`` columns, or at all.

    Raises:
        ValueError: for more ``last`` columns than there are, or fewer than 1.
    """
    last = x.shape[1] if last is None else last
    if not 1 <= last <= x.shape[1]:
        raise ValueError(f"last is {last}; it is from 1 to the {x.shape[1]} positions")
    options: dict[str, Any] = {"rotary": config.rotary, "sliding_window": config.sliding_window, "block": block}

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return causal_attention(q, k, v, positions, **options), None

    def body(x: Array, params_l: Params) -> tuple[Array, None]:
        return layer(params_l, config, x, None, attend, positions >= 0)[0], None

    x, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, x, decoder["layers"])
    return unembed(decoder, config, x[:, -last:])


# --- the encoder ----------------------------------------------------------------------------------


class ChunkEncoder(nn.Module):
    """Chunks of ``size`` tokens to vectors c: bidirectional attention within a chunk, then the mean.

    Attributes:
        vocabulary: tokens.
        size: of a chunk, k.
        features, layers, heads: as in `RefragConfig`.
        remat: whether the backward pass computes each layer again.
    """

    vocabulary: int
    size: int
    features: int = 128
    layers: int = 2
    heads: int = 4
    remat: bool = False

    @nn.compact
    def __call__(self, chunks: Int[AnyArray, "N k"]) -> Float[Array, "N {self.features}"]:
        if chunks.shape[1] != self.size:
            raise ValueError(f"chunks has chunks of {chunks.shape[1]} tokens; size is {self.size}")
        x = nn.Embed(self.vocabulary, self.features, name="tokens")(jnp.asarray(chunks))
        x = x + nn.Embed(self.size, self.features, name="positions")(jnp.arange(self.size))
        block = nn.remat(EncoderBlock) if self.remat else EncoderBlock
        everything = jnp.ones(chunks.shape, bool)
        for index in range(self.layers):
            x = block(self.heads, 4 * self.features, name=f"block_{index}")(x, everything)
        return nn.LayerNorm(use_bias=False, name="norm")(x).mean(axis=1)


class Projector(nn.Module):
    """phi, a perceptron with one hidden layer.

    Its outputs begin as long as the embeddings of tokens (variance 1 / D), beside which they stand.

    Attributes:
        features: width of the decoder's embeddings, D.
        hidden: of the layer between; ``None``: D.
    """

    features: int
    hidden: int | None = None

    @nn.compact
    def __call__(self, c: Float[Array, "*B w"]) -> Float[Array, "*B {self.features}"]:
        hidden = nn.gelu(nn.Dense(self.hidden or self.features, name="hidden")(c))
        small = nn.initializers.variance_scaling(1 / self.features, "fan_in", "normal")
        return nn.Dense(self.features, kernel_init=small, name="out")(hidden)


def modules(config: RefragConfig) -> tuple[ChunkEncoder, Projector]:
    """Encoder and phi of a configuration."""
    encoder = ChunkEncoder(
        config.decoder.vocabulary, config.size, config.features, config.layers, config.heads, parent=None
    )
    return encoder, Projector(config.decoder.features, config.hidden, parent=None)


def init_params(key: Array, config: RefragConfig, decoder: Params | None = None) -> Params:
    """``{"decoder", "encoder", "projector"}``; the decoder is the given one, or a fresh one."""
    keys = jax.random.split(key, 3)
    encoder, projector = modules(config)
    return {
        "decoder": init_decoder(keys[0], config.decoder) if decoder is None else decoder,
        "encoder": encoder.init(keys[1], jnp.zeros((1, config.size), jnp.int32))["params"],
        "projector": projector.init(keys[2], jnp.zeros((1, config.features)))["params"],
    }


def token_start(params: Params) -> Params:
    """The same parameters, but for an encoder and a phi that begin as a mean of the decoder's own embeddings.

    ``e = mean of standardised embedding[token]`` at first: the encoder's table is the decoder's, its blocks add
    nothing yet, and phi is the identity, since ``gelu(x) - gelu(-x) = x``. The paper's encoder is pretrained and
    learns the decoder's language from billions of tokens; a small one may begin with it.

    Raises:
        ValueError: where encoder and decoder differ in width, or phi's hidden layer is not twice as wide.
    """
    table = params["decoder"]["embedding"]
    width, hidden = params["projector"]["hidden"]["kernel"].shape
    if (width, hidden) != (table.shape[1], 2 * table.shape[1]):
        raise ValueError(
            f"features is {width} and hidden is {hidden}; beside a decoder of width {table.shape[1]}, allowed are "
            f"{table.shape[1]} and {2 * table.shape[1]}"
        )

    def begun(name: str, tree: Any) -> Any:
        if isinstance(tree, dict):
            return {inner: begun(f"{name}/{inner}", leaf) for inner, leaf in tree.items()}
        silent = name.endswith(("/output/kernel", "/down/kernel")) or name.startswith("/positions/")
        return jnp.zeros_like(tree) if silent else tree

    encoder = begun("", params["encoder"]) | {"tokens": {"embedding": table}}
    one = jnp.eye(width)
    phi = jax.tree.map(jnp.zeros_like, params["projector"])
    phi["hidden"]["kernel"], phi["out"]["kernel"] = jnp.concatenate([one, -one], 1), jnp.concatenate([one, -one], 0)
    return params | {"encoder": encoder, "projector": phi}


def encode(params: Params, config: RefragConfig, chunks: Int[AnyArray, "*N k"]) -> Float[Array, "*N w"]:
    """The vectors c of chunks; each depends on its own tokens alone."""
    flat = jnp.asarray(chunks).reshape(-1, chunks.shape[-1])
    c = modules(config)[0].apply({"params": params["encoder"]}, flat)
    return jnp.asarray(c).reshape(*chunks.shape[:-1], config.features)


def project(params: Params, config: RefragConfig, c: Float[Array, "*N w"]) -> Float[Array, "*N d"]:
    """The embeddings e = phi(c)."""
    return jnp.asarray(modules(config)[1].apply({"params": params["projector"]}, c))


def embed_chunks(params: Params, config: RefragConfig, chunks: Int[AnyArray, "*N k"]) -> Float[Array, "*N d"]:
    """``phi(c)`` of chunks: what is kept."""
    return project(params, config, encode(params, config, chunks))


# --- the whole ------------------------------------------------------------------------------------


def output_logits(
    params: Params,
    config: RefragConfig,
    question: Int[AnyArray, "B q"],
    context: Int[AnyArray, "B s"],
    output: Int[AnyArray, "B o"],
    chosen: Int[AnyArray, "B t"] | None = None,
    *,
    embeddings: Float[Array, "B L d"] | None = None,
    present: Bool[AnyArray, "B L"] | None = None,
    order: Order = "context_first",
    remat: bool = False,
) -> Float[Array, "B o V"]:
    """Logits of each token of ``output``, read at the position before it.

    Args:
        params: as `init_params` makes them.
        config: of the model.
        question: tokens behind or in front of the context; with ``context_first`` it may have none.
        context: tokens, a multiple of ``config.size``.
        output: tokens that are scored, or fed (the last is fed to nothing).
        chosen: chunks to expand; ``None``: none of them.
        embeddings: of the chunks, where they are kept; ``None``: computed now.
        present: see `layout`.
        order: what the decoder reads first.
        remat: as in `forward_embedded`.

    Raises:
        ValueError: for an order that does not exist, or sizes that do not fit.
    """
    if order not in ("context_first", "question_first"):
        raise ValueError(f"order is {order!r}; allowed are 'context_first' and 'question_first'")
    chunks = chunked(context, config.size)
    if embeddings is None:
        embeddings = embed_chunks(params, config, chunks)
    if embeddings.shape[1] != chunks.shape[1]:
        raise ValueError(f"embeddings are of {embeddings.shape[1]} chunks; context has {chunks.shape[1]}")
    chosen = jnp.zeros((context.shape[0], 0), jnp.int32) if chosen is None else chosen
    fed = jnp.asarray(output)[:, :-1]
    before, after = jnp.asarray(question), fed
    if order == "context_first":
        before, after = before[:, :0], jnp.concatenate([before, fed], axis=1)
    x, positions = mixed_inputs(params["decoder"], before, context, after, embeddings, chosen, present)
    return forward_embedded(params["decoder"], config.decoder, x, positions, last=output.shape[1], remat=remat)


def output_log_probs(logits: Float[Array, "B o V"], output: Int[AnyArray, "B o"]) -> Float[Array, "B o"]:
    """Log-probability of each token."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(output)[..., None], axis=-1)[..., 0]


class Refrag(nn.Module):
    """`output_logits` as a module, whose ``params`` are those of `init_params`.

    Attributes:
        config: sizes and choices.
        order: what the decoder reads first.
    """

    config: RefragConfig
    order: Order = "context_first"

    @nn.compact
    def __call__(
        self,
        question: Int[Array, "B q"],
        context: Int[Array, "B s"],
        output: Int[Array, "B o"],
        chosen: Int[Array, "B t"] | None = None,
    ) -> Float[Array, "B o {self.config.decoder.vocabulary}"]:
        names = ("decoder", "encoder", "projector")
        params = {
            name: self.param(name, lambda key, name=name: init_params(key, self.config)[name]) for name in names
        }
        return output_logits(params, self.config, question, context, output, chosen, order=self.order)
