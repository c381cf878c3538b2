"""Kept embeddings equal recomputed ones, prompts that name them are the model's own sequence, costs are counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.models.decoder import DecoderConfig
from hashml.models.generation import full_engine, generate
from hashml.models.refrag import RefragConfig, embed_chunks, init_params, output_logits
from hashml.models.refrag_serving import ChunkStore, prefill_cost, prompt, refrag_model, with_chunks

K, VOCABULARY = 4, 19
DECODER = DecoderConfig(
    vocabulary=VOCABULARY, features=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=24, context=40, smear=True
)
CONFIG = RefragConfig(DECODER, K, features=8, layers=1, heads=2)
RNG = np.random.default_rng(0)
PASSAGES = RNG.integers(0, VOCABULARY, (6, K)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(key, CONFIG))(jax.random.key(1))


@pytest.fixture(scope="module")
def embed(params):
    return jax.jit(lambda chunks: embed_chunks(params, CONFIG, chunks))


def store_of(embed, **sizes):
    calls = []

    def counted(chunks):
        # Called while tracing alone: the store compiles it once.
        calls.append(chunks.shape)
        return embed(chunks)

    return ChunkStore(counted, **({"size": K, "features": 16, "capacity": 7, "batch": 4} | sizes)), calls


def test_what_is_kept_equals_what_is_computed_again(embed):
    """Bit for bit, whatever came before in whatever order; a chunk seen twice has one row, and nothing recompiles."""
    store, calls = store_of(embed)
    assert store.rows(PASSAGES[[2, 0, 2]]).tolist().count(0) >= 1
    assert len(store) == 2
    rows = store.rows(PASSAGES)
    assert sorted(rows) == list(range(6))
    assert store.rows(PASSAGES).tolist() == rows.tolist()
    padded = np.concatenate([PASSAGES[4:], np.zeros((2, K), np.int32)])
    again = np.concatenate([np.asarray(embed(PASSAGES[:4])), np.asarray(embed(padded))[:2]])
    np.testing.assert_array_equal(np.asarray(store.table)[rows], again)
    assert not np.asarray(store.table)[6:].any()
    assert calls == [(4, K)]


def test_a_prompt_that_names_chunks_is_the_models_own_sequence(params, embed):
    """Greedy tokens of a ragged batch, each the largest logit of the whole pass over what came before it."""
    store, _ = store_of(embed)
    rows = store.rows(PASSAGES)
    model = refrag_model(DECODER, store.capacity)
    served = with_chunks(params["decoder"], store.table)
    contexts, expanded = [[0, 1, 2, 3], [5, 4, 3, 0]], [[1], [2]]
    asked = [[7], [3]]
    prompts = [
        prompt([], PASSAGES[c], rows[c], q, expanded=e, vocabulary=VOCABULARY)
        for c, e, q in zip(contexts, expanded, asked, strict=True)
    ]
    assert [len(ids) for ids in prompts] == [4 - 1 + K + 1] * 2
    prompts.append([5, 6, 7])  # a prompt without chunks among them
    found = generate(model, served, prompts, 3, temperature=0)
    assert all(0 <= token < VOCABULARY for row in found for token in row)
    context = np.stack([PASSAGES[c].ravel() for c in contexts])
    said, opened = np.array(found[:2], np.int32), np.array(expanded, np.int32)
    run = jax.jit(output_logits, static_argnames="config")
    whole = run(params, CONFIG, np.array(asked, np.int32), context, said, opened)
    assert np.asarray(whole).argmax(axis=-1).tolist() == found[:2]
    plain = generate(model, served, prompts[2:], 3, temperature=0)
    assert found[2:] == plain


def test_the_state_of_a_compressed_prompt_is_as_short_as_counted(params):
    context, others = 24, 2
    for expanded in (0, 2, None):
        cost = prefill_cost(CONFIG, context=context, others=others, expanded=expanded)
        model = refrag_model(DECODER, 6)
        tokens = jax.ShapeDtypeStruct((1, cost.positions), jnp.int32)
        served = jax.eval_shape(lambda: with_chunks(params["decoder"], jnp.zeros((6, 16))))
        state = jax.eval_shape(full_engine(model, cost.positions).prefill, served, tokens, tokens)[1]
        assert cost.kv_bytes == stored_bytes((state.k, state.v))
        compressed = 0 if expanded is None else 6 - expanded
        assert cost.positions == others + compressed + (context - compressed * K)
        assert cost.embedding_bytes == compressed * 16 * 4


def test_costs_are_the_cards_formula_and_the_programs_own_count(params):
    """``24 D^2 n + 4 n^2 D`` a layer for full heads and a perceptron four times as wide; here, by XLA, too."""
    full = DecoderConfig(
        vocabulary=50, features=32, layers=3, heads=4, kv_heads=4, head_dim=8, hidden=128, gated=False
    )
    config = RefragConfig(full, 8, features=16, layers=2, heads=2)
    for expanded, n in ((None, 5 + 64), (0, 5 + 8), (2, 5 + 6 + 16)):
        cost = prefill_cost(config, context=64, others=5, expanded=expanded)
        assert cost.positions == n
        assert cost.flops == 3 * (24 * 32**2 * n + 4 * n * n * 32) + 2 * 32 * 50
        assert cost.encoder_flops == 0
    one = 2 * (24 * 16**2 * 8 + 4 * 8**2 * 16) + 2 * (16 * 32 + 32 * 32)
    assert prefill_cost(config, context=64, others=5, kept=False).encoder_flops == 8 * one
    assert prefill_cost(config, context=64, others=5, expanded=8, kept=False).encoder_flops == 8 * one
    assert prefill_cost(config, context=64, others=5, expanded=None, kept=False).encoder_flops == 0
    everything = prefill_cost(config, context=64, others=5, expanded=8)
    assert everything == prefill_cost(config, context=64, others=5, expanded=None)


def test_what_is_refused(params, embed):
    store, _ = store_of(embed, capacity=3)
    with pytest.raises(ValueError, match="chunks has chunks of 3 tokens; size is 4"):
        store.rows(PASSAGES[:, :3])
    store.rows(PASSAGES[:2])
    with pytest.raises(ValueError, match="chunks has 3 new chunks; of a capacity of 3, 2 are taken"):
        store.rows(PASSAGES[1:5])
    assert len(store) == 2
    for name in ("size", "features", "capacity", "batch"):
        with pytest.raises(ValueError, match=f"{name} is 0; it is at least 1"):
            store_of(embed, **{name: 0})
    with pytest.raises(ValueError, match="rows has 1 rows; there are 2 chunks"):
        prompt([], PASSAGES[:2], np.array([0]), [], vocabulary=VOCABULARY)
    with pytest.raises(ValueError, match="expanded has 2; allowed are places from 0 to 1"):
        prompt([], PASSAGES[:2], np.array([0, 1]), [], expanded=(2,), vocabulary=VOCABULARY)
    with pytest.raises(ValueError, match="rows is 0; a table of chunk embeddings has at least 1"):
        refrag_model(DECODER, 0)
    with pytest.raises(ValueError, match="embeddings have width 8; the decoder's is 16"):
        with_chunks(params["decoder"], jnp.zeros((3, 8)))
    with pytest.raises(ValueError, match="context has 6 tokens; allowed are multiples of size, 4"):
        prefill_cost(CONFIG, context=6, others=0)
    with pytest.raises(ValueError, match="expanded is 3; it is from 0 to the 2 chunks, or None"):
        prefill_cost(CONFIG, context=8, others=0, expanded=3)
    with pytest.raises(ValueError, match="context is 8 and others is -1; neither is negative"):
        prefill_cost(CONFIG, context=8, others=-1)
