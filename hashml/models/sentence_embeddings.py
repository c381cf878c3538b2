"""Embeddings of sentences by an encoder (Sentence-BERT: Reimers and Gurevych, EMNLP 2019, arXiv 1908.10084).

    embedding = mean of the last layer over the tokens that are no padding;    embedding / |embedding|

Sentences are sorted by length and padded to a few lengths, one or two shapes of batch for each, so that little is
computed on padding and few programs are compiled. What is padded, and with whom, changes an embedding by rounding
alone.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from hashml.exchange import ExchangeError
from hashml.models.encoder import Dense, EncoderConfig, Params, dense, forward
from hashml.models.tokenization import load_folder_tokenizer

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
"""Tokens that sentences are padded to, up to the longest that a tokenizer gives."""
Progress = Callable[[int, int], None]
"""Told ``(sentences done, sentences in all)`` after every batch."""


class SentenceTokenizer:
    """Sentences to ids, with the special tokens that the file adds ([CLS] and [SEP]) and without padding.

    Args:
        tokenizer: of the library ``tokenizers``; its own truncation and padding are turned off.
        length: tokens at which a sentence is cut, the special ones included.

    Raises:
        ValueError: for a length that leaves no token.
    """

    def __init__(self, tokenizer: Any, length: int) -> None:
        if length < 3:
            raise ValueError(f"length is {length}; a sentence has at least 3 tokens, two of them special")
        self._tokenizer, self.length = tokenizer, length
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length=length)

    @property
    def vocabulary(self) -> int:
        """Number of tokens, the added ones included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        whole = [text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for text in texts]
        return [list(found.ids) for found in self._tokenizer.encode_batch(whole)]


def load_sentence_tokenizer(path: str | os.PathLike[str], length: int, vocabulary: int) -> SentenceTokenizer:
    """Reads a ``tokenizer.json``.

    Args:
        path: the file.
        length: as for `SentenceTokenizer`.
        vocabulary: of the model.

    Raises:
        ImportError: if the library ``tokenizers`` is not installed.
        ExchangeError: if the file is damaged, or has more tokens than the model.
        FileNotFoundError: if there is no such file.
    """
    tokenizer = SentenceTokenizer(load_folder_tokenizer(path)._tokenizer, length)
    if tokenizer.vocabulary > vocabulary:
        raise ExchangeError(f"{path} has {tokenizer.vocabulary} tokens; the model has a vocabulary of {vocabulary}")
    return tokenizer


def mean_pooled(x: Float[Array, "B T d"], mask: Bool[Array, "B T"]) -> Float32[Array, "B d"]:
    """Mean over the tokens of ``mask``, float32; zeros where there is none."""
    weights = mask[..., None].astype(jnp.float32)
    return (x.astype(jnp.float32) * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Vectors of length 1; zeros stay zeros."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames=("config", "normalize", "dense"))
def embed_tokens(
    params: Params,
    config: EncoderConfig,
    tokens: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, " B"],
    *,
    normalize: bool = True,
    dense: Dense = dense,
) -> Float32[Array, "B d"]:
    """Embeddings of rows of tokens, of which the first ``lengths`` are no padding."""
    mask = jnp.arange(tokens.shape[1]) < jnp.asarray(lengths)[:, None]
    pooled = mean_pooled(forward(params, config, jnp.asarray(tokens), mask, dense=dense), mask)
    return unit(pooled) if normalize else pooled


def embed_sentences(
    params: Params,
    config: EncoderConfig,
    tokenizer: SentenceTokenizer,
    texts: Sequence[str],
    *,
    normalize: bool = True,
    dense: Dense = dense,
    tokens_a_batch: int = 2048,
    progress: Progress | None = None,
) -> Float32[np.ndarray, "N d"]:
    """Embeddings of texts, in their order, on the host.

    Args:
        params: of the encoder.
        config: of the encoder.
        tokenizer: of the encoder.
        texts: sentences or documents; what is longer than ``tokenizer.length`` is cut.
        normalize: whether embeddings have length 1.
        dense: multiplies by a kernel, see `hashml.models.encoder`.
        tokens_a_batch: padding included; a batch has at least one text.
        progress: told of every batch.

    Raises:
        TypeError: if texts is one string.
        ValueError: if the tokenizer gives longer sentences than the encoder takes, or ``tokens_a_batch`` is not
            positive.
    """
    if isinstance(texts, str):
        raise TypeError("texts is a str; it must be a sequence of them")
    if tokenizer.length > config.context:
        raise ValueError(f"tokenizer.length is {tokenizer.length}; the encoder takes at most {config.context} tokens")
    if tokens_a_batch < 1:
        raise ValueError(f"tokens_a_batch is {tokens_a_batch}; it is at least 1")
    ids = tokenizer.encode(texts)
    found = np.empty((len(ids), config.features), np.float32)
    done = 0
    for rows, tokens, lengths in _batches(ids, tokenizer.length, tokens_a_batch):
        embeddings = embed_tokens(params, config, tokens, lengths, normalize=normalize, dense=dense)
        found[rows] = np.asarray(embeddings)[: len(rows)]
        done += len(rows)
        if progress is not None:
            progress(done, len(ids))
    return found


def _batches(
    ids: list[list[int]], longest: int, tokens_a_batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Places, tokens and lengths of batches: the last one of a length has a power of two of rows."""
    lengths = np.array([len(each) for each in ids], np.int32)
    order = np.argsort(lengths, kind="stable")
    padded = [length for length in LENGTHS if length < longest] + [longest]
    bounds = np.searchsorted(lengths[order], padded, side="right")
    for length, start, stop in zip(padded, [0, *bounds[:-1]], bounds, strict=True):
        most = max(1, tokens_a_batch // length)
        for first in range(start, stop, most):
            rows = order[first : min(first + most, stop)]
            height = min(most, 1 << (len(rows) - 1).bit_length())
            tokens, counts = np.zeros((height, length), np.int32), np.zeros(height, np.int32)
            for place, row in enumerate(rows):
                tokens[place, : lengths[row]] = ids[row]
            counts[: len(rows)] = lengths[rows]
            yield rows, tokens, counts
