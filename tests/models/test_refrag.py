"""REFRAG: the shortened sequence by a loop, the dense decoder where all is expanded, a chunk's embedding alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.models.decoder import DecoderConfig, forward
from hashml.models.refrag import (
    ChunkEncoder,
    Order,
    Refrag,
    RefragConfig,
    chunked,
    embed_chunks,
    encode,
    expanded_count,
    forward_embedded,
    init_params,
    layout,
    mixed_inputs,
    output_log_probs,
    output_logits,
    project,
    token_start,
)

K, CHUNKS = 4, 5
DECODER = DecoderConfig(
    vocabulary=23, features=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=24, context=64, smear=True
)
CONFIG = RefragConfig(DECODER, K, features=8, layers=1, heads=2)
RNG = np.random.default_rng(0)
CONTEXT = RNG.integers(0, 23, (2, K * CHUNKS)).astype(np.int32)
QUESTION = RNG.integers(0, 23, (2, 3)).astype(np.int32)
OUTPUT = RNG.integers(0, 23, (2, 4)).astype(np.int32)
EVERY = np.tile(np.array([3, 0, 4, 1, 2], np.int32), (2, 1))
"""All chunks, in no order."""
NONE = np.zeros((2, 0), np.int32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(key, CONFIG))(jax.random.key(1))


@functools.cache
def embed():
    """One program for every batch of ten chunks."""
    return jax.jit(lambda params, chunks: embed_chunks(params, CONFIG, chunks))


run = jax.jit(output_logits, static_argnames=("config", "order"))


# --- the sequence -------------------------------------------------------------------------------------


def shortened(chosen, chunks, size, present):
    """Rows of the concatenation, chunk by chunk."""
    found = []
    for chunk in range(chunks):
        if present[chunk]:
            tokens = [chunks + chunk * size + offset for offset in range(size)]
            found += tokens if chunk in chosen else [chunk]
    return found


compiled = jax.jit(layout, static_argnums=(1, 2))
"""The last of four shapes has chunks that are tokens."""


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_gather_map_equals_a_loop(data):
    chunks, size, count = data.draw(st.sampled_from([(1, 4, 1), (5, 3, 0), (5, 3, 2), (6, 1, 3)]))
    chosen = data.draw(st.permutations(range(chunks)))[:count]
    present = data.draw(st.lists(st.booleans(), min_size=chunks, max_size=chunks))
    found = compiled(np.array([chosen], np.int32).reshape(1, count), chunks, size, np.array([present]))
    expected = shortened(chosen, chunks, size, present)
    total = chunks - count + count * size
    assert found.source.shape == (1, total)
    assert np.asarray(found.valid)[0].tolist() == [False] * (total - len(expected)) + [True] * len(expected)
    assert np.asarray(found.source)[0][np.asarray(found.valid)[0]].tolist() == expected


def test_without_a_mask_every_chunk_is_there():
    found = layout(np.array([[2, 0]], np.int32), 4, 3)
    assert np.asarray(found.valid).all()
    assert np.asarray(found.source)[0].tolist() == [4, 5, 6, 1, 10, 11, 12, 3]


def test_positions_are_consecutive_and_inputs_are_what_they_name(params):
    """An expanded chunk moves all that follows it; an absent one leaves a gap that has no position."""
    table = np.asarray(params["decoder"]["embedding"])
    embeddings = RNG.standard_normal((2, CHUNKS, 16)).astype(np.float32)
    chosen = np.array([[1, 4], [0, 3]], np.int32)
    present = np.array([[True] * CHUNKS, [True, False, True, False, True]])
    x, positions = mixed_inputs(
        params["decoder"], QUESTION, CONTEXT, OUTPUT, jnp.asarray(embeddings), chosen, present
    )
    n = 3 + (CHUNKS - 2) + 2 * K + 4
    assert x.shape == (2, n, 16)
    for row in range(2):
        rows = np.concatenate([embeddings[row], table[CONTEXT[row]]])
        middle = rows[shortened(chosen[row], CHUNKS, K, present[row])]
        expected = np.concatenate([table[QUESTION[row]], middle, table[OUTPUT[row]]])
        there = np.asarray(positions)[row] >= 0
        np.testing.assert_array_equal(np.asarray(x)[row][there], expected)
        np.testing.assert_array_equal(np.asarray(positions)[row][there], np.arange(len(expected)))
    assert (np.asarray(positions)[0] >= 0).all()
    # Of the second row one of two expanded chunks and another are absent: 1 + K places, between question and context.
    assert np.flatnonzero(np.asarray(positions)[1] < 0).tolist() == list(range(3, 3 + 1 + K))


# --- the decoder --------------------------------------------------------------------------------------


def test_with_every_chunk_expanded_it_is_the_dense_decoder(params):
    """Invariant of the paper's construction: no embedding is read, whatever the order of the choice."""
    tokens = np.concatenate([CONTEXT, QUESTION, OUTPUT[:, :-1]], axis=1)
    dense = np.asarray(forward(params["decoder"], DECODER, jnp.asarray(tokens)))[:, -4:]
    found = run(params, CONFIG, QUESTION, CONTEXT, OUTPUT, EVERY)
    np.testing.assert_allclose(found, dense, atol=2e-6)
    first = np.concatenate([QUESTION, CONTEXT, OUTPUT[:, :-1]], axis=1)
    dense = np.asarray(forward(params["decoder"], DECODER, jnp.asarray(first)))[:, -4:]
    found = run(params, CONFIG, QUESTION, CONTEXT, OUTPUT, EVERY, order="question_first")
    np.testing.assert_allclose(found, dense, atol=2e-6)


def test_a_chunk_that_is_absent_might_as_well_not_be_there(params):
    """Logits equal those of the context without it, in either order; smeared keys step over the gap."""
    embeddings = embed()(params, chunked(CONTEXT, K))
    present = np.array([[False, True, True, True, True]] * 2)
    chosen = np.array([[2], [0]], np.int32)  # of the second row the absent one
    shorter = CONTEXT[:, K:]
    orders: tuple[Order, Order] = ("context_first", "question_first")
    for row, (order, mine) in enumerate(zip(orders, ([1], []), strict=True)):
        part = slice(row, row + 1)
        found = run(params, CONFIG, QUESTION[part], CONTEXT[part], OUTPUT[part], chosen[part],
                              embeddings=embeddings[part], present=present[part], order=order)  # fmt: skip
        expected = run(params, CONFIG, QUESTION[part], shorter[part], OUTPUT[part],
                                 np.array([mine], np.int32).reshape(1, -1), embeddings=embeddings[part, 1:],
                                 order=order)  # fmt: skip
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_compressed_chunks_are_read_by_their_embeddings_alone(params):
    """Other tokens in a chunk change nothing as long as its embedding is the same; another embedding does."""
    embeddings = embed()(params, chunked(CONTEXT, K))
    chosen = np.array([[1], [2]], np.int32)

    def read(context, embeddings):
        return run(params, CONFIG, QUESTION, context, OUTPUT, chosen, embeddings=embeddings)

    base = np.asarray(read(CONTEXT, embeddings))
    compressed, expanded = CONTEXT.copy(), CONTEXT.copy()
    compressed[:, :K] = (compressed[:, :K] + 1) % 23
    expanded[0, K] = (expanded[0, K] + 1) % 23
    np.testing.assert_array_equal(read(compressed, embeddings), base)
    assert np.abs(np.asarray(read(expanded, embeddings))[0] - base[0]).max() > 1e-4
    assert np.abs(np.asarray(read(CONTEXT, embeddings.at[:, 0].add(1.0))) - base).max() > 1e-4
    assert np.abs(np.asarray(read(CONTEXT, embeddings.at[0, 1].add(1.0))) - base).max() == 0  # it is expanded


def test_log_probabilities_and_the_module(params):
    logits = np.asarray(run(params, CONFIG, QUESTION, CONTEXT, OUTPUT), np.float64)
    expected = np.take_along_axis(scipy.special.log_softmax(logits, axis=-1), OUTPUT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(output_log_probs(jnp.asarray(logits, jnp.float32), OUTPUT), expected, atol=1e-5)
    module = Refrag(CONFIG)
    arguments = [jnp.asarray(part) for part in (QUESTION, CONTEXT, OUTPUT)]
    found = jnp.asarray(jax.jit(module.apply)({"params": params}, *arguments))
    np.testing.assert_allclose(found, logits, atol=2e-6)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


# --- embeddings ---------------------------------------------------------------------------------------


def test_embeddings_depend_on_their_own_chunk_alone_and_move_with_it(params):
    """Bit for bit: the others are replaced, then all are permuted."""
    chunks = np.asarray(chunked(CONTEXT, K)).reshape(-1, K)
    base = np.asarray(embed()(params, chunks))
    others = np.random.default_rng(1).integers(0, 23, chunks.shape).astype(np.int32)
    others[4] = chunks[4]
    np.testing.assert_array_equal(np.asarray(embed()(params, others))[4], base[4])
    order = np.random.default_rng(2).permutation(len(chunks))
    np.testing.assert_array_equal(np.asarray(embed()(params, chunks[order])), base[order])
    assert np.abs(base[0] - base[1:]).max(axis=1).min() > 1e-3  # and they are not all the same


def test_an_embedding_is_phi_of_the_mean_over_the_chunk(params):
    """phi by hand; and the order of tokens within a chunk matters."""
    chunks = np.asarray(chunked(CONTEXT, K))
    encoder = jax.jit(lambda chunks: encode(params, CONFIG, chunks))
    c = np.asarray(encoder(chunks), np.float64)
    assert c.shape == (2, CHUNKS, 8)
    phi = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["projector"])
    hidden = c @ phi["hidden"]["kernel"] + phi["hidden"]["bias"]
    cubed = 0.7978845608028654 * (hidden + 0.044715 * hidden**3)
    expected = 0.5 * hidden * (1 + np.tanh(cubed)) @ phi["out"]["kernel"] + phi["out"]["bias"]
    np.testing.assert_allclose(project(params, CONFIG, jnp.asarray(c, jnp.float32)), expected, atol=1e-5)
    turned = np.asarray(encoder(chunks[:, :, ::-1]))
    assert np.abs(turned - c).max() > 1e-3


def test_the_start_is_a_mean_of_the_decoders_embeddings(params):
    config = dataclasses.replace(CONFIG, features=16, hidden=32)
    made = jax.jit(lambda decoder: token_start(init_params(jax.random.key(0), config, decoder)))(params["decoder"])
    table = np.asarray(params["decoder"]["embedding"], np.float64)
    standard = (table - table.mean(axis=1, keepdims=True)) / np.sqrt(table.var(axis=1, keepdims=True) + 1e-6)
    chunks = np.asarray(chunked(CONTEXT, K))
    found = jax.jit(lambda chunks: embed_chunks(made, config, chunks))(chunks)
    np.testing.assert_allclose(found, standard[chunks].mean(axis=2), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, made["decoder"], params["decoder"])


# --- what is refused ----------------------------------------------------------------------------------


def test_what_is_refused(params):
    with pytest.raises(ValueError, match="size is 0; it is at least 1"):
        dataclasses.replace(CONFIG, size=0)
    with pytest.raises(ValueError, match="heads is 3; it divides features, 8"):
        dataclasses.replace(CONFIG, heads=3)
    with pytest.raises(ValueError, match="context has 20 tokens; allowed are multiples of size, 3"):
        chunked(CONTEXT, 3)
    with pytest.raises(ValueError, match="size is -1; it is at least 1"):
        chunked(CONTEXT, -1)
    with pytest.raises(ValueError, match="share is 1.5; it is from 0 to 1"):
        expanded_count(4, 1.5)
    assert [expanded_count(16, share) for share in (0, 0.25, 1)] == [0, 4, 16]
    with pytest.raises(ValueError, match="chosen names 3 chunks; there are 2"):
        layout(np.zeros((1, 3), np.int32), 2, 4)
    with pytest.raises(ValueError, match="chunks is 0 and size is 4; both are at least 1"):
        layout(np.zeros((1, 0), np.int32), 0, 4)
    embeddings = jnp.zeros((2, 3, 16))
    with pytest.raises(ValueError, match="context has 20 tokens; allowed are multiples of the 3 chunks"):
        mixed_inputs(params["decoder"], QUESTION, CONTEXT, OUTPUT, embeddings, NONE)
    with pytest.raises(ValueError, match="embeddings are of 3 chunks; context has 5"):
        output_logits(params, CONFIG, QUESTION, CONTEXT, OUTPUT, embeddings=embeddings)
    with pytest.raises(
        ValueError, match="features is 8 and hidden is 16; beside a decoder of width 16, allowed are 16"
    ):
        token_start(params)
    with pytest.raises(ValueError, match="hidden is 0; it is at least 1"):
        dataclasses.replace(CONFIG, hidden=0)
    x, positions = jnp.zeros((1, 3, 16)), jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="last is 4; it is from 1 to the 3 positions"):
        forward_embedded(params["decoder"], DECODER, x, positions, last=4)
    with pytest.raises(ValueError, match="chunks has chunks of 3 tokens; size is 4"):
        ChunkEncoder(23, 4).init(jax.random.key(0), np.zeros((1, 3), np.int32))


def test_an_order_that_does_not_exist(params):
    order: str = "answer_first"
    with pytest.raises(Exception, match="answer_first"):  # the check of annotations speaks first while tests run
        output_logits(params, CONFIG, QUESTION, CONTEXT, OUTPUT, order=order)  # pyright: ignore[reportArgumentType]
