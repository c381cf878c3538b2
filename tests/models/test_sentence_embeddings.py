"""Sentences in batches have the embeddings that they have alone, and few programs are compiled."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.models.encoder import EncoderConfig, forward, param_shapes
from hashml.models.sentence_embeddings import (
    LENGTHS,
    SentenceTokenizer,
    embed_sentences,
    embed_tokens,
    mean_pooled,
    unit,
)

PLAIN = EncoderConfig(vocabulary=31, features=16, layers=2, heads=4, hidden=24, context=20)


@functools.cache
def plain_params() -> Any:
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32),
        param_shapes(PLAIN),
        is_leaf=lambda shape: isinstance(shape, tuple),
    )


class Letters:
    """A tokenizer that needs no library: a letter is a token."""

    def __init__(self, length: int = 20) -> None:
        self.length = length

    def encode(self, texts) -> list[list[int]]:
        return [[2, *(ord(letter) - 93 for letter in text), 3][: self.length] for text in texts]


TEXTS = ["abc", "a" * 30, "", "bca", "hello", "lmlmlmlmlm", "m" * 7] + ["ab"] * 6


def letters(length: int = 20) -> Any:
    tokenizer = SentenceTokenizer.__new__(SentenceTokenizer)
    tokenizer.length, tokenizer.encode = length, Letters(length).encode  # type: ignore[method-assign]
    return tokenizer


def test_batches_change_nothing():
    """Each text alone and unpadded, in NumPy from the hidden states."""
    params, told = plain_params(), []
    found = embed_sentences(
        params, PLAIN, letters(), TEXTS, tokens_a_batch=32, progress=lambda done, count: told.append((done, count))
    )
    # By length 8, 16, 20: ten texts in batches of 4, 4 and 2, two in one of 2, one in one of 1.
    assert told == [(4, 13), (8, 13), (10, 13), (12, 13), (13, 13)]
    for text, embedding in zip(TEXTS[:2], found[:2], strict=True):
        ids = np.array(Letters().encode([text]), np.int32)
        mean = np.asarray(forward(params, PLAIN, jnp.asarray(ids)))[0].mean(axis=0)
        np.testing.assert_allclose(embedding, mean / np.linalg.norm(mean), atol=1e-5)
    raw = embed_sentences(params, PLAIN, letters(), TEXTS[:1], tokens_a_batch=32, normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw), found[:1], atol=1e-5)
    assert abs(np.linalg.norm(raw) - 1) > 0.1


def test_few_programs_are_compiled():
    """Of a thousand texts of all lengths: two shapes a length, the last batch being a power of two."""
    rng = np.random.default_rng(0)
    texts = ["a" * int(length) for length in rng.integers(0, 25, 1000)]
    before = embed_tokens._cache_size()  # type: ignore[attr-defined]
    embed_sentences(plain_params(), PLAIN, letters(), texts, tokens_a_batch=2048)
    lengths = [length for length in LENGTHS if length < 20] + [20]
    assert embed_tokens._cache_size() - before <= 2 * len(lengths)  # type: ignore[attr-defined]


def test_pooling_and_norm():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.bfloat16)
    mask = jnp.array([[True, False, True], [False, False, False]])
    found = mean_pooled(x, mask)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], np.asarray(x, np.float32)[0, [0, 2]].mean(axis=0), rtol=1e-6)
    assert not np.asarray(found[1]).any()
    np.testing.assert_allclose(np.linalg.norm(unit(found), axis=1), [1, 0], rtol=1e-6)


def test_sentences_that_cannot_be():
    def call(texts: Any = ("a",), length: int = 20, tokens_a_batch: int = 8) -> None:
        embed_sentences(plain_params(), PLAIN, letters(length), texts, tokens_a_batch=tokens_a_batch)

    with pytest.raises(TypeError, match="texts is a str; it must be a sequence of them"):
        call("a text")
    with pytest.raises(ValueError, match="tokenizer.length is 21; the encoder takes at most 20 tokens"):
        call(length=21)
    with pytest.raises(ValueError, match="tokens_a_batch is 0; it is at least 1"):
        call(tokens_a_batch=0)
    assert embed_sentences(plain_params(), PLAIN, letters(), []).shape == (0, 16)
