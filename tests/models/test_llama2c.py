"""llama2.c's two files, read as they are written, and refused with their sizes where they are not."""

import dataclasses
import functools
import os
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.exchange import ExchangeError
from hashml.models.decoder import DecoderConfig, param_shapes
from hashml.models.decoder_checkpoints import load_decoder
from hashml.models.llama2c import load_llama2c
from hashml.models.rotary import Rotary
from hashml.models.tokenization import Llama2cTokenizer, decode, load_llama2c_tokenizer, load_tokenizer

CONFIG = DecoderConfig(31, 16, 2, 4, 2, 4, 24, tied=False, rotary=Rotary(1e4, "interleaved"), context=64)
STORIES = Path(os.environ.get("HASHML_DATA", ".")) / "stories260K"
needs_stories = pytest.mark.skipif(
    "HASHML_DATA" not in os.environ, reason="set HASHML_DATA to the folder of data sets"
)


def random_params(config):
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        param_shapes(config),
        is_leaf=lambda shape: isinstance(shape, tuple),
    )


def llama2c_bytes(params, config):
    """The format, written as its inventor's export.py does, array by array."""
    sizes = (config.features, config.hidden, config.layers, config.heads, config.kv_heads)
    out = struct.pack("<7i", *sizes, config.vocabulary if config.tied else -config.vocabulary, config.context)
    layers = {name: np.asarray(leaf) for name, leaf in params["layers"].items()}

    def kernel(name):
        return b"".join(np.ascontiguousarray(one.T).tobytes() for one in layers[name])

    out += np.asarray(params["embedding"]).tobytes() + layers["attention_norm"].tobytes()
    out += b"".join(kernel(name) for name in ("query", "key", "value", "output"))
    out += layers["mlp_norm"].tobytes() + b"".join(kernel(name) for name in ("gate", "down", "up"))
    out += np.asarray(params["norm"]).tobytes()
    out += np.full(config.context * config.head_dim, np.nan, "<f4").tobytes()
    return out if config.tied else out + np.ascontiguousarray(np.asarray(params["head"]).T).tobytes()


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_files_are_read(tied, tmp_path):
    config = dataclasses.replace(CONFIG, tied=tied)
    params = random_params(config)
    (tmp_path / "model.bin").write_bytes(llama2c_bytes(params, config))
    found, read, tokenizer = load_decoder(tmp_path / "model.bin")
    assert (read, tokenizer) == (config, None)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_damaged_llama2c_files_are_refused_with_their_sizes(tmp_path):
    content = llama2c_bytes(random_params(CONFIG), CONFIG)
    file, size = tmp_path / "model.bin", len(content)
    for damaged, message in (
        (content[:-4], f"has {size - 4} bytes; .* has {size}: it was cut short"),
        (content + b"\0", f"has {size + 1} bytes; .* has {size}: something follows"),
        (content[:20], "has 20 bytes; the header of a llama2.c file alone has 28"),
        (b"", "has 0 bytes"),
        (struct.pack("<7i", 0x616B3432, 1, 2, 3, 4, 5, 6), r"later llama2.c export; allowed is version 0"),
        (struct.pack("<7i", 16, 24, 2, 3, 1, 31, 64), "is no llama2.c file: its header reads features 16, hidden 24"),
        (struct.pack("<7i", 16, 24, -2, 4, 2, 31, 64), "layers -2"),
        (struct.pack("<7i", *[2**31 - 1] * 7), "is no llama2.c file"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ExchangeError, match=message):
            load_llama2c(file)
    with pytest.raises(FileNotFoundError):
        load_decoder(tmp_path / "absent.bin")


def test_weights_that_are_not_finite_or_too_large_are_named(tmp_path):
    params = random_params(CONFIG)
    for value, dtype, error, message in (
        (np.nan, jnp.float32, ExchangeError, "model.bin: array 'output' has 1 entries that are NaN or infinite"),
        (1e6, jnp.float16, ValueError, "dtype is float16; .*model.bin: array 'output' exceeds it"),
    ):
        layers = params["layers"] | {"output": params["layers"]["output"].at[1, 2, 3].set(value)}
        (tmp_path / "model.bin").write_bytes(llama2c_bytes(params | {"layers": layers}, CONFIG))
        with pytest.raises(error, match=message):
            load_llama2c(tmp_path / "model.bin", dtype)
    assert load_llama2c(tmp_path / "model.bin", jnp.bfloat16)[0]["norm"].dtype == jnp.bfloat16


@needs_stories
def test_the_facts_of_stories260k():
    params, config, tokenizer = load_decoder(STORIES / "stories260K.bin")
    assert (config.features, config.hidden, config.layers, config.heads, config.kv_heads) == (64, 172, 5, 8, 4)
    assert (config.vocabulary, config.context, config.tied) == (512, 512, True)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == (1056540 - 28) // 4 - 512 * 8
    assert isinstance(tokenizer, Llama2cTokenizer)
    assert tokenizer.vocabulary == 512
    assert tokenizer.pieces[3 + 65] == b"A"


@functools.cache
def stories_tokenizer():
    return load_llama2c_tokenizer(STORIES / "tok512.bin", 512)


def naive_encode(pieces, scores, text):
    """llama2.c's loop: scan all pairs, merge the best, start again."""
    ids = {piece: token for token, piece in reversed(list(enumerate(pieces)))}
    tokens = [1] if not text else [1, ids[b" "]]
    for character in text:
        raw = character.encode()
        tokens += [ids[raw]] if raw in ids else [3 + byte for byte in raw]
    while True:
        best = (-1e10, -1, -1)
        for place in range(1, len(tokens) - 1):
            union = pieces[tokens[place]] + pieces[tokens[place + 1]]
            if union in ids and scores[ids[union]] > best[0]:
                best = scores[ids[union]], place, ids[union]
        if best[1] < 0:
            return tokens
        tokens[best[1] : best[1] + 2] = [best[2]]


def raw_tokens():
    content = (STORIES / "tok512.bin").read_bytes()
    place, pieces, scores = 4, [], []
    while place < len(content):
        score, length = struct.unpack_from("<fi", content, place)
        pieces.append(content[place + 8 : place + 8 + length])
        scores.append(score)
        place += 8 + length
    return pieces, scores


words = st.sampled_from(
    [" ", "  ", "the", "The ", "there was", "Lily", "ing", "aaa", "\n", "!", "é", "日本", "🙂", "<0x41>", "<s>"]
)


@needs_stories
@settings(deadline=None, max_examples=150)
@given(st.lists(words, max_size=8).map("".join))
def test_encoding_is_that_of_the_loop_and_comes_back(text):
    tokenizer = stories_tokenizer()
    ids = tokenizer.encode(text)
    assert ids == naive_encode(*raw_tokens(), text)
    assert decode(tokenizer, ids) == text


@needs_stories
def test_characters_split_over_tokens_come_whole():
    tokenizer = stories_tokenizer()
    stream = tokenizer.stream([1])
    ids = tokenizer.encode("é🙂")[1:]
    pushed = [stream.push(token) for token in ids]
    assert "".join(pushed) == "é🙂"
    assert pushed.count("") >= 4
    assert stream.push(3 + 0xF0) == ""
    assert stream.finish() == "\ufffd"


@needs_stories
def test_the_tokenizer_is_found_or_named(tmp_path):
    model = tmp_path / "stories.bin"
    model.write_bytes((STORIES / "stories260K.bin").read_bytes())
    assert load_decoder(model).tokenizer is None
    assert load_decoder(model, tokenizer=STORIES / "tok512.bin").tokenizer is not None
    content = (STORIES / "tok512.bin").read_bytes()
    (tmp_path / "tok1.bin").write_bytes(content)
    assert load_decoder(model).tokenizer is not None
    (tmp_path / "tok2.bin").write_bytes(content)
    with pytest.raises(ExchangeError, match="2 tokenizers lie beside it, .*tok1.bin, .*tok2.bin; name one"):
        load_decoder(model)
    for damaged, message in (
        (content[:-1], "token 511, at byte .*; the file was cut short"),
        (content[:6], "token 0, at byte 4 of 6, does not fit"),
        (b"", "has 0 bytes"),
        (content + struct.pack("<fi", 0.0, 1) + b"x", "has 513 tokens; the model has a vocabulary of 512"),
        (content[:4] + struct.pack("<fi", 0.0, 99) + content[12:], "length 99 where the longest is 7"),
    ):
        (tmp_path / "tok1.bin").write_bytes(damaged)
        with pytest.raises(ExchangeError, match=message):
            load_tokenizer(tmp_path / "tok1.bin", vocabulary=512)
