"""What codecs learn from calibration data: codebooks of CQ, ranges and signposts of KVQuant, weighted by the loss.

`collect` runs a decoder over token sequences and gives, layer by layer, every key before rotation and every value
(A) together with the gradient ``G = d loss / d A`` of the mean loss of a language model. To second order, with the
diagonal Fisher information for the Hessian, an error ``A - A^`` costs ``sum G^2 (A - A^)^2``, so k-means is
weighted:

    coupled         w[n] = g[n] . g[n]  over the channels that share a code         one scalar a vector
    non-uniform     w[n] = g[n]^2                                                    one scalar a value

plus ``1e-12 mean(w)``, so that tokens without a gradient make no cluster empty. The gradients come from adding
arrays of zeros to keys and values and differentiating with respect to these. The codebooks are those of
`hashml.kvcache.coupled` and `hashml.kvcache.kvquant`; `hashml.kvcache.tables` writes and reads them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from hashml.coding.kmeans import kmeans
from hashml.kvcache.contract import Codec
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.kvquant import NonUniformKeys, NonUniformValues, normalise, snap, token_outliers, token_range
from hashml.kvcache.state import LayerTables
from hashml.models.decoder import DecoderModel, Params
from hashml.models.exact_attention import causal_attention

AnyArray = Array | np.ndarray
Progress = Callable[[int, int], None]
"""Told ``(done, total)`` steps: an array of tokens that has been through the model, forward and back, is one, and
what has been learned of a layer's keys, or of its values, is another."""

TOKENS = 16 * 2048
"""Calibration tokens of the papers."""


class Activations(NamedTuple):
    """One layer's keys before rotation and values of N calibration tokens, and the gradients of the mean loss."""

    keys: Float[AnyArray, "N H D"]
    values: Float[AnyArray, "N H D"]
    key_gradients: Float[AnyArray, "N H D"]
    value_gradients: Float[AnyArray, "N H D"]


def collect(
    model: DecoderModel,
    params: Params,
    sequences: Iterable[Int[AnyArray, "*B T"]],
    *,
    memory: int = 2**30,
    tokens: int = TOKENS,
) -> Iterator[Activations]:
    """Activations of layer after layer, float32 on the host.

    Args:
        model: the decoder.
        params: its parameters.
        sequences: arrays of tokens, each a sequence or a batch of them, of at least two tokens and without
            padding. An array is taken through the model at once, and each shape is compiled once.
        memory: bytes of activations that may be held together. As many layers as fit in it, at least one, come
            from one pass over the sequences.
        tokens: no further array is taken when there are so many, so that ``sequences`` may be without an end; the
            last one is taken whole.

    Raises:
        ValueError: if there is no sequence, or one is too short or no sequence at all, or for less than one token.
    """
    batches = _arrays(sequences, tokens)
    return _layers(model, params, batches, _at_once(model, batches, memory), lambda: None)


def _arrays(sequences: Iterable[AnyArray], tokens: int) -> list[np.ndarray]:
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; it must be at least 1")
    found: list[np.ndarray] = []
    held = 0
    for sequence in sequences:
        array = np.atleast_2d(np.asarray(sequence))
        if array.ndim != 2 or array.shape[1] < 2:
            raise ValueError(f"sequences holds an array of shape {array.shape}; allowed are [T] and [B, T] with T "
                             f"at least 2, since the loss is of next tokens")  # fmt: skip
        found.append(array)
        held += array.size
        if held >= tokens:
            break
    if not found:
        raise ValueError("sequences is empty; calibration needs at least one")
    return found


def _at_once(model: DecoderModel, batches: list[np.ndarray], memory: int) -> int:
    """Layers whose activations come from one pass."""
    config = model.config
    layer_bytes = 4 * 4 * sum(tokens.size for tokens in batches) * config.kv_heads * config.head_dim
    return max(1, min(config.layers, memory // layer_bytes))


def _layers(
    model: DecoderModel, params: Params, batches: list[np.ndarray], at_once: int, tell: Callable[[], None]
) -> Iterator[Activations]:
    predictions = sum(tokens.shape[0] * (tokens.shape[1] - 1) for tokens in batches)
    for start in range(0, model.config.layers, at_once):
        taken = slice(start, start + at_once)
        parts: list[tuple[np.ndarray, ...]] = []
        for tokens in batches:
            found = _activations(model, params, jnp.asarray(tokens), 1.0 / predictions)
            parts.append(tuple(np.asarray(x[taken], np.float32) for x in found))
            tell()
        held = [np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)]
        del parts
        for index in range(held[0].shape[0]):
            yield Activations(*(x[index] for x in held))


@functools.partial(jax.jit, static_argnames="model")
def _activations(
    model: DecoderModel, params: Params, tokens: Int[Array, "B T"], scale: float | Float[Array, ""]
) -> tuple[Array, Array, Array, Array]:
    """Keys, values and their gradients, each ``[L, B T, H, D]``; the loss is the sum of all NLL times ``scale``."""
    config = model.config
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    taps = jnp.zeros((config.layers, 2, batch, config.kv_heads, length, config.head_dim), jnp.float32)

    def loss(taps: Array) -> tuple[Array, Array]:
        def body(x: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            index, tap = inputs

            def attend(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
                k, v = (a + t.astype(a.dtype) for a, t in zip((k, v), tap, strict=True))
                out = causal_attention(
                    q, k, v, positions, rotary=config.rotary, sliding_window=config.sliding_window
                )  # fmt: skip
                return out, jnp.stack([k, v])

            x, _, seen = model.layer(model.layer_params(params, index), x, None, attend)
            return x, seen

        x = model.embed(params, tokens)
        x, seen = jax.lax.scan(jax.checkpoint(body), x, (jnp.arange(config.layers), taps))
        logits = jax.nn.log_softmax(model.unembed(params, x)[:, :-1].astype(jnp.float32))
        said = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)
        return -scale * said.sum(), seen

    gradients, seen = jax.grad(loss, has_aux=True)(taps)

    def line(x: Array) -> Array:  # [L, 2, B, H, T, D] of keys or values, token by token
        return x.transpose(0, 1, 3, 2, 4).reshape(config.layers, batch * length, config.kv_heads, config.head_dim)

    return line(seen[:, 0]), line(seen[:, 1]), line(gradients[:, 0]), line(gradients[:, 1])


# --- coupled --------------------------------------------------------------------------------------


def learn_coupled(
    key: PRNGKeyArray,
    codec: Coupled,
    x: Float[AnyArray, "N H D"],
    gradients: Float[AnyArray, "N H D"] | None = None,
    *,
    iterations: int = 100,
    at_once: int = 1,
) -> dict[str, Array]:
    """``{"codebook": float16 [H, D / c, 2**b, c]}`` of one tensor.

    Args:
        key: of the seeds of k-means.
        codec: whose codebook it is.
        x: calibration tokens.
        gradients: of the loss with respect to ``x``; ``None`` for uniform weights.
        iterations: of Lloyd, at most; it stops at a relative change of 1e-6.
        at_once: codebooks that are learned together; more of them keep an accelerator busy.

    Raises:
        ValueError: if the codec does not fit the width, or ``x`` or ``gradients`` are not finite.
    """
    codec.check(x.shape[-1])
    _check_finite(x=x, gradients=gradients)
    return _learn_coupled(key, codec, x, gradients, iterations=iterations, at_once=at_once)


def _check_finite(**arrays: AnyArray | None) -> None:
    """Raises ValueError for a NaN or an infinity, of which k-means would make books of nothing else."""
    for name, x in arrays.items():
        if x is None or isinstance(x, Tracer):
            continue
        broken = x.size - int(np.isfinite(np.asarray(x, np.float32)).sum())
        if broken:
            raise ValueError(f"{name}: {broken} of {x.size} values are not finite; nothing can be learned of them")


@functools.partial(jax.jit, static_argnames=("codec", "iterations", "at_once"))
def _learn_coupled(
    key: PRNGKeyArray, codec: Coupled, x: AnyArray, gradients: AnyArray | None, *, iterations: int, at_once: int
) -> dict[str, Array]:
    count, heads, width = x.shape
    groups = width // codec.channels

    def split(x: Array) -> Array:
        return x.astype(jnp.float32).reshape(count, heads * groups, codec.channels).transpose(1, 0, 2)

    vectors = split(jnp.asarray(x))
    weights = None
    if gradients is not None:
        weights = with_floor((split(jnp.asarray(gradients)) ** 2).sum(axis=-1))

    def one(inputs: tuple) -> Array:
        group_key, vectors, weights = inputs
        return kmeans(group_key, vectors, 2**codec.bits, weights, iterations=iterations).centroids

    keys = jax.random.split(key, heads * groups)
    books = jax.lax.map(one, (keys, vectors, weights), batch_size=None if at_once == 1 else at_once)
    limit = float(jnp.finfo(jnp.float16).max)
    books = jnp.clip(books, -limit, limit).astype(jnp.float16)
    return {"codebook": books.reshape(heads, groups, 2**codec.bits, codec.channels)}


def with_floor(weights: Float[Array, "*n N"]) -> Float[Array, "*n N"]:
    """``weights + 1e-12 mean(weights)`` over the last axis."""
    return weights + 1e-12 * weights.mean(axis=-1, keepdims=True)


def calibrate_coupled(
    key: PRNGKeyArray,
    model: DecoderModel,
    params: Params,
    sequences: Iterable[Int[AnyArray, "*B T"]],
    codec: Coupled,
    value_codec: Coupled | None = None,
    *,
    fisher: bool = True,
    iterations: int = 100,
    memory: int = 2**30,
    tokens: int = TOKENS,
    at_once: int = 1,
    progress: Progress | None = None,
) -> tuple[LayerTables, ...]:
    """Codebooks of every layer.

    Args:
        key: of the seeds of k-means.
        model, params, sequences, memory, tokens: see `collect`; the paper takes 16 sequences of 2048 tokens.
        codec: of keys, and of values unless they have a ``value_codec``.
        value_codec: of values.
        fisher: whether vectors are weighted by their gradients.
        iterations, at_once: see `learn_coupled`.
        progress: called after every array and every tensor.

    Raises:
        ValueError: for a codec or sequences that do not fit, or a layer with activations or gradients that are not
            finite.
    """

    def learn(tensor_key: PRNGKeyArray, codec: Any, x: AnyArray, gradients: AnyArray | None) -> dict[str, Array]:
        return learn_coupled(tensor_key, codec, x, gradients, iterations=iterations, at_once=at_once)

    codecs = codec, codec if value_codec is None else value_codec
    return _calibrate(key, model, params, sequences, codecs, learn, fisher, (memory, tokens), progress)


# --- non-uniform ----------------------------------------------------------------------------------


def learn_nonuniform(
    key: PRNGKeyArray,
    codec: NonUniformKeys | NonUniformValues,
    x: Float[AnyArray, "N H D"],
    gradients: Float[AnyArray, "N H D"] | None = None,
    *,
    coverage: float | int | None = None,
    q_norm: bool | None = None,
    iterations: int = 50,
    values: int = 2**18,
) -> dict[str, Array]:
    """The parameters of `NonUniformKeys` or `NonUniformValues` of one tensor.

    Args:
        key: of the seeds of k-means, and of the values that it takes.
        codec: whose parameters they are.
        x: calibration tokens.
        gradients: of the loss with respect to ``x``; ``None`` for uniform weights.
        coverage: the part of a key channel's values that lies in its range, the middle one; ``None`` is the
            paper's 0.99 where there are outliers, else 1.
        q_norm: whether ``levels`` restore mean and deviation; None: as the codec says.
        iterations: of Lloyd, at most.
        values: at most so many are drawn for k-means in one dimension; the paper takes all.

    Raises:
        ValueError: if the codec does not fit the width, ``coverage`` is not above 0 and at most 1, or ``x`` or
            ``gradients`` are not finite.
    """
    coverage = coverage if coverage is not None else 0.99 if codec.outliers else 1.0
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage is {coverage}; it must be above 0 and at most 1")
    codec.check(x.shape[-1])
    _check_finite(x=x, gradients=gradients)
    plain = dataclasses.replace(codec, q_norm=False)  # the program is the same
    return _learn_nonuniform(
        key, plain, jnp.asarray(x), None if gradients is None else jnp.asarray(gradients), jnp.float32(coverage),
        q_norm=codec.q_norm if q_norm is None else q_norm, iterations=iterations, values=values,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("codec", "q_norm", "iterations", "values"))
def _learn_nonuniform(
    key: PRNGKeyArray, codec: NonUniformKeys | NonUniformValues, x: Array, gradients: Array | None, coverage: Array,
    *, q_norm: bool, iterations: int, values: int,
) -> dict[str, Array]:  # fmt: skip
    x = x.astype(jnp.float32)
    found: dict[str, Array] = {}
    if isinstance(codec, NonUniformKeys):
        tail = (1 - coverage) / 2
        found["low"], found["high"] = jnp.quantile(x, jnp.stack([tail, 1 - tail]), axis=0)
        unit = normalise(x, found["low"], found["high"])
    else:
        index = token_outliers(x, codec.outliers)
        low, high = token_range(x, index)
        unit = normalise(x, low, high)
    inside = (jnp.abs(unit) <= 1 + 1e-6).reshape(-1)
    weights = jnp.ones_like(unit) if gradients is None else gradients.astype(jnp.float32) ** 2
    weights = jnp.where(inside, with_floor(weights.reshape(-1)), 0.0)
    unit = jnp.where(inside, unit.reshape(-1), 0.0)
    draw, seeds = jax.random.split(key)
    if unit.size > values:
        chosen = jax.random.choice(draw, unit.size, (values,), replace=False)
        unit, weights, inside = unit[chosen], weights[chosen], inside[chosen]
    centroids = kmeans(seeds, unit[:, None], 2**codec.bits, weights, iterations=iterations).centroids
    table = found["table"] = jnp.sort(centroids[:, 0])
    if q_norm:
        mean, deviation = _moments(unit, inside)
        snapped_mean, snapped_deviation = _moments(table[snap(unit, table)], inside)
        ratio = jnp.where(snapped_deviation > 0, deviation / jnp.maximum(snapped_deviation, 1e-30), 1.0)
        found["levels"] = mean + ratio * (table - snapped_mean)
    return found


def _moments(x: Array, inside: Array) -> tuple[Array, Array]:
    count = jnp.maximum(inside.sum(), 1)
    mean = jnp.where(inside, x, 0.0).sum() / count
    return mean, jnp.sqrt(jnp.where(inside, (x - mean) ** 2, 0.0).sum() / count)


def calibrate_nonuniform(
    key: PRNGKeyArray,
    model: DecoderModel,
    params: Params,
    sequences: Iterable[Int[AnyArray, "*B T"]],
    key_codec: NonUniformKeys,
    value_codec: NonUniformValues,
    *,
    fisher: bool = True,
    coverage: float | int | None = None,
    q_norm: bool | None = None,
    iterations: int = 50,
    memory: int = 2**30,
    tokens: int = TOKENS,
    progress: Progress | None = None,
) -> tuple[LayerTables, ...]:
    """Ranges and signposts of every layer; arguments as in `calibrate_coupled` and `learn_nonuniform`."""

    def learn(tensor_key: PRNGKeyArray, codec: Any, x: AnyArray, gradients: AnyArray | None) -> dict[str, Array]:
        return learn_nonuniform(
            tensor_key, codec, x, gradients, coverage=coverage, q_norm=q_norm, iterations=iterations
        )  # fmt: skip

    codecs = key_codec, value_codec
    return _calibrate(key, model, params, sequences, codecs, learn, fisher, (memory, tokens), progress)


def _calibrate(
    key: PRNGKeyArray,
    model: DecoderModel,
    params: Params,
    sequences: Iterable[AnyArray],
    codecs: tuple[Codec, Codec],
    learn: Callable[[PRNGKeyArray, Any, AnyArray, AnyArray | None], dict[str, Array]],
    fisher: bool,
    limits: tuple[int, int],
    progress: Progress | None,
) -> tuple[LayerTables, ...]:
    """``limits`` are the ``memory`` and ``tokens`` of `collect`."""
    for codec in codecs:
        codec.check(model.config.head_dim)
    memory, tokens = limits
    batches = _arrays(sequences, tokens)
    at_once = _at_once(model, batches, memory)
    passes = -(-model.config.layers // at_once)
    total, done = 2 * model.config.layers + passes * len(batches), 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    tables: list[LayerTables] = []
    for index, layer in enumerate(_layers(model, params, batches, at_once, tell)):
        tensors = ("keys", layer.keys, layer.key_gradients), ("values", layer.values, layer.value_gradients)
        learned = []
        for place, (codec, (name, x, gradients)) in enumerate(zip(codecs, tensors, strict=True)):
            weights = gradients if fisher else None
            named = {f"{name} of layer {index}": x, f"gradients of the {name} of layer {index}": weights}
            _check_finite(**named)
            tensor_key = jax.random.fold_in(key, 2 * index + place)
            learned.append(learn(tensor_key, codec, x, weights))
            if progress is not None:
                jax.block_until_ready(learned[-1])
            tell()
        tables.append(LayerTables(*learned))
    return tuple(tables)
