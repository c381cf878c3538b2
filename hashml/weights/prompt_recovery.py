"""Compress, then prompt: a soft prompt recovers a compressed decoder (Xu, Liu, Chen, Zhong, Tang, Wang, Zhou, Hu,
Shrivastava, "Soft Prompt Recovers Compressed LLMs, Transferably", ICML 2024, arXiv 2305.11186).

    x = [prompt [n, d]; embedding[tokens]]            logits = decoder(x), of the tokens alone
    loss(prompt) = mean over real tokens 2..T of  -log p(token | prompt, tokens before)

The decoder is frozen, whatever was done to it: `hashml.weights.quantize_model.quantize_decoder` may have made it, or
a mask. The prompt is all that is trained, n d floats, and takes n positions of the context. Nothing is predicted at
its places, nor from its last one the first token, so that every n and n = 0 are judged on the same targets.

At inference keys and values of the prompt are computed once for a model (`cache_prompt`), and `prompted_engine`
begins each row with them. They belong to that model: under another compression the same prompt has others.

Departures: the loss is a mean over tokens where the reference sums them over a sequence, and so is the metric.
`diluted` is what the released evaluation prints: losses over all n + T - 1 places, n of which count as 0, which makes
perplexity fall with n even if the model never looks at the prompt.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hashml.models.decoder import DecoderConfig, DecoderModel, Params, embed, layer, unembed
from hashml.models.exact_attention import causal_attention, masked_attention
from hashml.models.generation import DenseEngine, DenseState, full_engine
from hashml.weights.calibration import AnyArray


class PromptCache(NamedTuple):
    """What a model makes of a prompt; keys are rotated.

    Attributes:
        k, v: of every layer.
        previous: of every layer, the input of keys at the last place; read where keys are smeared over two tokens.
    """

    k: Float[Array, "L H n D"]
    v: Float[Array, "L H n D"]
    previous: Float[Array, "L d"]


def start_prompt(params: Params, count: int) -> Float[Array, "n d"]:
    """Where training begins: embeddings of the ids 0 to ``count - 1``, as in the reference.

    Raises:
        ValueError: for a count that is negative, or larger than the vocabulary.
    """
    vocabulary = params["embedding"].shape[0]
    if not 0 <= count <= vocabulary:
        raise ValueError(f"count is {count}; allowed are 0 to the {vocabulary} ids of the vocabulary")
    return jnp.array(params["embedding"][:count], jnp.float32)


@functools.partial(jax.jit, static_argnames=("config", "block"))
def prompted_forward(
    params: Params,
    config: DecoderConfig,
    prompt: Float[AnyArray, "n d"],
    tokens: Int[AnyArray, "B T"],
    *,
    block: int = 256,
) -> Float[Array, "B T V"]:
    """Logits of the next token after each token, behind the prompt: of positions n to n + T - 1.

    Args:
        params: of the model; kernels may be of codes.
        config: of the model.
        prompt: n = 0: `hashml.models.decoder.forward`.
        tokens: ids.
        block: queries that attention takes at a time.

    Raises:
        ValueError: for a prompt of another width, or one that with the tokens exceeds the model's context.
    """
    n, (rows, length) = _check(config, prompt, tokens.shape[1]), tokens.shape
    x = jnp.concatenate([_repeated(prompt, rows), embed(params, config, jnp.asarray(tokens))], axis=1)
    positions = jnp.broadcast_to(jnp.arange(n + length, dtype=jnp.int32), (rows, n + length))
    options: dict[str, Any] = {"rotary": config.rotary, "sliding_window": config.sliding_window, "block": block}

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return causal_attention(q, k, v, positions, **options), None

    def body(x: Array, params_l: Params) -> tuple[Array, None]:
        return layer(params_l, config, x, None, attend)[0], None

    x, _ = jax.lax.scan(body, x.astype(params["embedding"].dtype), params["layers"])
    return unembed(params, config, x[:, n:])


def prompted_nll(
    prompt: Float[AnyArray, "n d"], params: Params, config: DecoderConfig, tokens: Int[AnyArray, "B T"]
) -> Float[Array, "B T-1"]:
    """Negative log-likelihood, in nats, of each token but the first: the same targets for every prompt.

    Its mean is the loss; its gradient by ``prompt`` is all that is trained.

    Raises:
        ValueError: as `prompted_forward`.
    """
    logits = jax.nn.log_softmax(prompted_forward(params, config, prompt, tokens)[:, :-1])
    return -jnp.take_along_axis(logits, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]


def diluted(nll: Float[AnyArray, "B targets"], prompt_tokens: int) -> Float[Array, ""]:
    """The released evaluation's mean, over the prompt's places, too: smaller by (T - 1) / (n + T - 1). To be shown
    beside the mean of ``nll``, never instead."""
    return jnp.mean(nll) * (nll.shape[1] / (nll.shape[1] + prompt_tokens))


def recovered_fraction(full: float | int, compressed: float | int, prompted: float | int) -> float:
    """The part of what compression cost, in nats, that the prompt brings back; above 1 beyond the full model.

    Raises:
        ValueError: where compression cost nothing.
    """
    if not compressed > full:
        raise ValueError(f"compressed is {compressed}, full {full}; without a loss there is no part of it")
    return (compressed - prompted) / (compressed - full)


# --- inference ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def cache_prompt(params: Params, config: DecoderConfig, prompt: Float[AnyArray, "n d"]) -> PromptCache:
    """Keys and values of a prompt, once for a model.

    Raises:
        ValueError: for an empty prompt, one of another width, or one that leaves no place for a token.
    """
    n = _check(config, prompt, 1)
    if n == 0:
        raise ValueError("prompt has no row; allowed is at least one, and without a prompt nothing is cached")
    positions = jnp.arange(n, dtype=jnp.int32)[None]

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        out = causal_attention(q, k, v, positions, rotary=config.rotary, sliding_window=config.sliding_window)
        return out, (_rotated(config, k, positions), v)

    def body(x: Array, params_l: Params) -> tuple[Array, tuple[Array, Array, Array]]:
        x, previous, (k, v) = layer(params_l, config, x, None, attend)
        return x, (k[0], v[0], jnp.zeros_like(x[0, 0]) if previous is None else previous[0])

    _, found = jax.lax.scan(body, jnp.asarray(prompt)[None].astype(params["embedding"].dtype), params["layers"])
    return PromptCache(*found)


def prompted_engine(model: DecoderModel, cache: PromptCache, capacity: int) -> DenseEngine:
    """An engine for `hashml.models.generation.generate` whose rows begin with a prompt that is cached.

    Args:
        model: that ``cache`` was made by.
        cache: from `cache_prompt`.
        capacity: tokens a row without the prompt, padding included.

    Raises:
        ValueError: if prompt and tokens exceed the model's context.
    """
    config, n = model.config, cache.k.shape[2]
    if n + capacity > config.context:
        raise ValueError(f"capacity is {capacity}; behind a prompt of {n}, at most {config.context - n} fit the "
                         f"model's context of {config.context}")  # fmt: skip

    def prefill(params: Params, tokens: Array, positions: Array) -> tuple[Array, DenseState]:
        rows, columns = tokens.shape
        if columns > capacity:
            raise ValueError(f"capacity is {capacity}; the prompts have {columns} columns")
        valid = positions >= 0
        places = jnp.where(valid, positions + n, -1)
        before = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (rows, n))
        every = jnp.concatenate([before, places], axis=1)
        free = ((0, 0), (0, 0), (0, capacity - columns), (0, 0))

        def attend(index: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            keys, values = (
                jnp.concatenate([_repeated(old[index], rows).astype(new.dtype), new], axis=2)
                for old, new in ((cache.k, _rotated(config, k, places)), (cache.v, v))
            )
            out = masked_attention(_rotated(config, q, places), keys, values, places, every, config.sliding_window)
            return out, (jnp.pad(keys, free), jnp.pad(values, free))

        x, carried, previous = model.embed(params, tokens), [], []
        for index in range(config.layers):
            earlier = _repeated(cache.previous[index], rows) if config.smear else None
            attend_here = functools.partial(attend, index)
            x, last, kv = model.layer(model.layer_params(params, index), x, earlier, attend_here, valid)
            carried.append(kv)
            previous.append(last)
        k, v = zip(*carried, strict=True)
        kept = jnp.pad(every, ((0, 0), (0, capacity - columns)), constant_values=-1)
        state = DenseState(k, v, tuple(previous), kept, places.max(axis=1) + 1, jnp.asarray(n + columns, jnp.int32))
        return model.unembed(params, x[:, -1:])[:, 0], state

    return DenseEngine(prefill, full_engine(model, n + capacity).step, capacity)


def _check(config: DecoderConfig, prompt: AnyArray, length: int) -> int:
    """Rows of the prompt."""
    n, width = prompt.shape
    if width != config.features:
        raise ValueError(f"prompt has width {width}; the model's is {config.features}")
    if n + length > config.context:
        raise ValueError(
            f"prompt has {n} rows and is followed by {length} tokens; together at most {config.context} fit the "
            "model's context"
        )
    return n


def _repeated(array: AnyArray, rows: int) -> Array:
    return jnp.broadcast_to(jnp.asarray(array)[None], (rows, *array.shape))


def _rotated(config: DecoderConfig, x: Array, positions: Array) -> Array:
    return x if config.rotary is None else config.rotary.rotate(x, positions[:, None])
