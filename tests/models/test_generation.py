"""Generation with a cache writes what repeated whole forward passes write, for every row of a ragged batch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from hashml.models.decoder import DecoderConfig, decoder_model, forward, init_params
from hashml.models.generation import full_engine, generate, pad_prompts, stream
from hashml.models.rotary import Rotary
from hashml.models.sampling import Sampling, sample

PLAIN = DecoderConfig(
    vocabulary=19, features=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=24, rotary=Rotary(100.0), context=40
)
CONFIGS = {
    "llama": PLAIN,
    "smeared, window": dataclasses.replace(PLAIN, smear=True, sliding_window=4),
    "interleaved, biased": dataclasses.replace(PLAIN, rotary=Rotary(100.0, "interleaved"), qkv_bias=True),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5]]


@functools.cache
def model_and_params(name):
    return decoder_model(CONFIGS[name]), jax.jit(lambda key: init_params(key, CONFIGS[name]))(jax.random.key(7))


def whole_passes(model, params, prompt, tokens, choose=None):
    """No cache: one forward pass over everything for each token, in a buffer of one size."""
    ids, buffer = list(prompt), 16
    for step in range(tokens):
        line = np.array([ids + [0] * (buffer - len(ids))], np.int32)
        logits = forward(params, model.config, jnp.asarray(line))[0, len(ids) - 1]
        ids.append(int(np.argmax(logits)) if choose is None else choose(step, logits))
    return ids[len(prompt) :]


def test_greedy_rows_equal_whole_passes():
    model, params = model_and_params("smeared, window")
    found = generate(model, params, PROMPTS, 8, temperature=0)
    assert found == [whole_passes(model, params, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["smeared, window", "interleaved, biased"])
def test_logits_of_each_step_equal_the_forward_pass(name):
    """Given tokens, not chosen ones: one flipped choice would hide all that follows."""
    model, params = model_and_params(name)
    engine = full_engine(model, 16)
    given = np.asarray(jax.random.randint(jax.random.key(2), (3, 6), 0, 19))
    tokens, positions = pad_prompts(PROMPTS, 19)
    logits, state = jax.jit(engine.prefill)(params, tokens, positions)
    step = jax.jit(engine.step)
    for n in range(7):
        for row, prompt in enumerate(PROMPTS):
            line = [*prompt, *given[row, :n].tolist()]
            whole = forward(params, model.config, jnp.asarray([line + [0] * (16 - len(line))], jnp.int32))
            np.testing.assert_allclose(logits[row], whole[0, len(line) - 1], atol=1e-4)
        if n < 6:
            logits, state = step(params, state, given[:, n])


def test_draws_stops_and_the_stream():
    """Rows are drawn by the key, each ends at its stop, and the stream is the whole program step by step."""
    model, params = model_and_params("llama")
    key, sampling, stops = jax.random.key(5), Sampling(1.5, top_k=10, top_p=0.95), (3, 11, 17)
    draw = jax.jit(lambda step, logits: sample(jax.random.fold_in(key, step), jnp.tile(logits, (3, 1)), sampling))
    expected = []
    for row, prompt in enumerate(PROMPTS):
        free = whole_passes(model, params, prompt, 8, lambda step, logits, row=row: int(draw(step, logits)[row]))
        expected.append(free[: min(free.index(stop) if stop in free else 8 for stop in stops)])
    lengths = [len(row) for row in expected]
    assert len(set(lengths)) > 1
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 10, "top_p": 0.95, "key": key, "stops": stops}
    assert generate(model, params, PROMPTS, 8, **options) == expected
    other: dict[str, Any] = {**options, "key": jax.random.key(6)}
    assert generate(model, params, PROMPTS, 8, **other) != expected
    steps = np.stack(list(stream(model, params, PROMPTS, 8, **options)), axis=1)
    assert steps.shape == (3, max(lengths))  # it ends when all rows have
    for row, length in zip(range(3), lengths, strict=True):
        assert steps[row].tolist() == expected[row] + [-1] * (max(lengths) - length)


def test_one_compilation_serves_other_prompts_of_the_same_length():
    model, params = model_and_params("llama")
    engine, traced = full_engine(model, 20), {"prefill": 0, "step": 0}

    def counted(name, function):
        def call(*arguments):
            traced[name] += 1
            return function(*arguments)

        return call

    counting = dataclasses.replace(
        engine, prefill=counted("prefill", engine.prefill), step=counted("step", engine.step)
    )
    for prompts in (PROMPTS, [[1], [2, 3], [4, 5, 6, 7]]):
        for _ in stream(model, params, prompts, 9, temperature=0, cache=counting, prompt_length=9):
            pass
    assert traced == {"prefill": 1, "step": 1}


def test_a_step_writes_into_the_donated_state():
    """The compiled step has room for no second cache: its inputs' bytes are the outputs' bytes."""
    model, params = model_and_params("llama")
    engine = full_engine(model, 2000)
    tokens, positions = pad_prompts(PROMPTS, 19)
    state = jax.eval_shape(engine.prefill, params, tokens, positions)[1]
    compiled = jax.jit(engine.step, donate_argnums=1).lower(params, state, jnp.zeros(3, jnp.int32)).compile()
    memory = compiled.memory_analysis()
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory is not None
    assert memory.alias_size_in_bytes >= 0.99 * cache


def test_an_engine_may_be_anything_with_two_functions():
    """A model that says the token after this one: no state but the last token."""

    class Successor:
        def prefill(self, params, tokens, positions):
            return jax.nn.one_hot((tokens[:, -1] + 1) % 19, 19), {"seen": tokens[:, -1]}

        def step(self, params, state, token):
            return jax.nn.one_hot((token + 1) % 19, 19), {"seen": token}

    model, _ = model_and_params("llama")
    found = generate(model, {}, [[1, 2], [17]], 60, temperature=0, cache=Successor())
    assert found[0] == [(3 + i) % 19 for i in range(60)]  # beyond the model's context of 40
    assert found[1][:3] == [18, 0, 1]


def test_padding_is_left_and_positions_count_a_rows_own_tokens():
    tokens, positions = pad_prompts(PROMPTS, 19, 8)
    assert tokens.tolist()[1:] == [[6] * 8, [5] * 6 + [3, 5]]  # with the row's own first token
    assert positions.tolist()[1:] == [[-1] * 7 + [0], [-1] * 5 + [0, 1, 2]]
    assert positions[0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("call", [generate, stream])
def test_rows_without_finite_logits_are_named(call):
    """A NaN is no token, and does not reach the other rows: not by the padding of theirs."""
    model, params = model_and_params("llama")
    spoilt = params | {"embedding": params["embedding"].at[0].set(jnp.nan)}
    untied = dataclasses.replace(PLAIN, tied=False)
    spoilt["head"] = params["embedding"].T
    model = decoder_model(untied)
    expected = generate(model, params | {"head": spoilt["head"]}, PROMPTS, 5, temperature=0)
    assert all(0 not in row for row in expected)
    if call is generate:
        assert generate(model, spoilt, PROMPTS, 5, temperature=0) == expected
    for options in ({"temperature": 0}, {"key": jax.random.key(0)}):
        with pytest.raises(ValueError, match=r"logits of new token 0 behind prompts\[1\] are not finite; params"):
            list(call(model, spoilt, [[1, 2], [3, 0], [4, 5]], 5, **options))


def test_what_is_lost_later_is_named_when_it_comes():
    """An engine without a finite logit for the row that says 3; one that rules tokens out by -inf is none."""

    class Successor:
        def prefill(self, params, tokens, positions):
            return self.step(params, None, tokens[:, -1])

        def step(self, params, state, token):
            ruled = jnp.where(jax.nn.one_hot(token + 1, 19) > 0, 0.0, -jnp.inf)
            return jnp.where(token[:, None] == 3, -jnp.inf, ruled), jnp.zeros(1)

    model, _ = model_and_params("llama")
    options: dict[str, Any] = {"temperature": 0, "cache": Successor()}
    assert generate(model, {}, [[10], [1]], 2, **options) == [[11, 12], [2, 3]]
    with pytest.raises(ValueError, match=r"new token 2 behind prompts\[1\] are not finite"):
        generate(model, {}, [[10], [1]], 4, **options)
    assert generate(model, {}, [[10], [1]], 4, **options, stops=(2,)) == [[11, 12, 13, 14], []]
    steps = stream(model, {}, [[10], [1]], 4, **options)
    assert [next(steps).tolist() for _ in range(2)] == [[11, 2], [12, 3]]
    with pytest.raises(ValueError, match=r"new token 2 behind prompts\[1\] are not finite"):
        next(steps)


def test_prompts_may_be_an_array():
    expected = pad_prompts([[1, 2, 3], [4, 5, 6]], 19)
    for kind in (np.asarray, jnp.asarray):
        for found, wanted in zip(pad_prompts(kind([[1, 2, 3], [4, 5, 6]]), 19), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1, 2.5]]}, r"prompts\[0\]\[1\] is 2.5; allowed is ids from 0 to 18"),
        ({"prompts": np.ones((1, 2))}, r"prompts\[0\]\[0\] is 1.0; allowed is ids"),
        ({"prompts": [1, 2, 3]}, r"prompts\[0\] is 1; prompts are rows of token ids"),
        ({"prompts": ["abc"]}, r"prompts\[0\]\[0\] is 'a'; allowed is ids"),
        ({"prompts": 3}, "prompts is 3; prompts are rows of token ids"),
        ({"stops": [3.5]}, r"stops\[0\] is 3.5; allowed is ids of the vocabulary, 0 to 18"),
        ({"tokens": 2.5}, "tokens is 2.5; allowed is an integer, at least 1"),
        ({"top_k": 2.5}, "top_k is 2.5; allowed is an integer, at least 1, or None"),
        ({"prompt_length": 9.0}, "prompt_length is 9.0; allowed is an integer, or None"),
    ],
)
@pytest.mark.parametrize("call", [generate, stream])
def test_what_is_no_integer_is_refused_by_name(call, change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its own check of annotations comes first
    model, params = model_and_params("llama")
    with pytest.raises(TypeError, match=message):
        call(model, params, **({"prompts": PROMPTS, "tokens": 5, "temperature": 0} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts is empty; at least one is needed"),
        (
            {"prompts": [[1], []]},
            r"prompts\[1\] is empty; allowed is at least one token, such as the tokenizer's BOS",
        ),
        ({"prompts": [[1, 19]]}, r"prompts\[0\]\[1\] is 19; allowed are ids from 0 to 18"),
        ({"prompts": [[-1]]}, r"prompts\[0\]\[0\] is -1; allowed are ids"),
        ({"prompts": [[1] * 41]}, "prompts has one of 41 tokens; the model's context is 40"),
        ({"prompt_length": 2}, "prompts has one of 7 tokens; prompt_length is 2"),
        ({"tokens": 0}, "tokens is 0; at least 1 is generated"),
        ({"tokens": 34}, "tokens is 34; behind a prompt of 7, at most 33 fit the model's context of 40"),
        ({"cache": "small"}, "tokens is 5; the cache has a capacity of 11, of which the prompts take 7"),
        ({"temperature": 1.0}, "key is None; temperature 1.0 draws"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"stops": [19]}, "stops has 19; allowed are ids of the vocabulary, 0 to 18"),
    ],
)
@pytest.mark.parametrize("call", [generate, stream])
def test_bad_arguments_are_refused_by_name(call, change, message):
    model, params = model_and_params("llama")
    arguments = {"prompts": PROMPTS, "tokens": 5, "temperature": 0} | change
    if arguments.get("cache") == "small":
        arguments["cache"] = full_engine(model, 11)
    with pytest.raises(ValueError, match=message):
        call(model, params, **arguments)


def test_a_prompt_beyond_the_capacity_is_refused_when_traced():
    model, params = model_and_params("llama")
    tokens, positions = pad_prompts(PROMPTS, 19)
    with pytest.raises(ValueError, match="capacity is 6; the prompts have 7 columns"):
        full_engine(model, 6).prefill(params, jnp.asarray(tokens), jnp.asarray(positions))
