"""The language model f1 made small, and the ways to tune it that two experiments share.

The kernels of its layers are put in few bits, calibrated on training text of WikiText-2 where a method reads some,
or pruned by magnitude, or both. Embedding, head and norms stay as they are. What is frozen is decoded once here, for
the speed of experiments alone: products with codes give the same numbers, as a test asserts.

`tune` trains any part of a model by Adam with a warm-up of a tenth and a linear decay, gradients cut at norm 1.
Adapters are products of rank r beside every kernel of the layers (LoRA, Hu et al. 2022), up being 0 at first.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from experiments.data import language
from experiments.data.counter import stream
from experiments.kvcache import fixtures
from experiments.kvcache.language_models import next_token_nll
from hashml.models.decoder import DecoderConfig, Params, param_shapes
from hashml.weights.quantize_model import kernel_groups, quantize_decoder
from hashml.weights.quantized import QuantizationSpec, quantize_matrix
from hashml.weights.quantized_dense import QuantizedKernel, as_kernel

SIZE = fixtures.Size(calibration=16)
"""f1 as it is, and 4,096 calibration tokens."""
Loss = Callable[[Any, Any, Any, DecoderConfig], Array]
"""``(trained, frozen, tokens [B, T], config) -> nats a token``; a function of a module, hence static."""


# --- models -------------------------------------------------------------------------------------------


def decoder_config(size: fixtures.Size) -> DecoderConfig:
    return fixtures.text_recipe(size, "f1").decoder


@functools.lru_cache(maxsize=8)
def quantized(size: fixtures.Size, seed: int, spec: QuantizationSpec) -> Params:
    """f1 with kernels of codes, calibrated on training text where the method reads it."""
    params, config = fixtures.params(size, "f1", seed), decoder_config(size)
    if spec.method == "rtn" and not spec.grid.weighted:
        return rounded(params, config, spec)
    return quantize_decoder(params, config, fixtures.calibration_text(size, "f1", seed), spec).params


def _rounded(kernel: Array, spec: QuantizationSpec) -> QuantizedKernel:
    """A stack ``[L, in, out]``, all rows at once: each is rounded by itself."""
    layers, inputs, outputs = kernel.shape
    matrix = quantize_matrix(jnp.swapaxes(kernel, 1, 2).reshape(-1, inputs), None, spec)
    return as_kernel(jax.tree.map(lambda leaf: leaf.reshape(layers, outputs, *leaf.shape[1:]), matrix))


def pruned(params: Params, config: DecoderConfig, share: float) -> Params:
    """Dense kernels without the smallest weights of each layer's kernel, by magnitude."""

    def prune(kernel: Array) -> Array:
        kept = np.asarray(kernel).copy()
        flat = kept.reshape(len(kept), -1)
        least = np.argsort(np.abs(flat), axis=1, kind="stable")[:, : round(share * flat.shape[1])]
        np.put_along_axis(flat, least, 0, axis=1)
        return jnp.asarray(kept)

    return with_kernels(params, {name: prune(kernel) for name, kernel in kernels(params, config).items()})


def rounded(params: Params, config: DecoderConfig, spec: QuantizationSpec) -> Params:
    """Kernels of codes by round-to-nearest, without calibration text; a grid has 0, so that what is pruned stays."""
    return with_kernels(params, {name: _rounded(kernel, spec) for name, kernel in kernels(params, config).items()})


def kernel_names(config: DecoderConfig) -> list[str]:
    """Kernels of the layers: what is compressed."""
    return [name for group in kernel_groups(config) for name in group]


def kernel_shapes(config: DecoderConfig) -> dict[str, tuple[int, int, int]]:
    """``[L, in, out]`` of each."""
    return {name: param_shapes(config)["layers"][name] for name in kernel_names(config)}


def kernels(params: Params, config: DecoderConfig) -> dict[str, Any]:
    return {name: params["layers"][name] for name in kernel_names(config)}


def with_kernels(params: Params, new: dict[str, Any]) -> Params:
    return params | {"layers": params["layers"] | new}


def halved(tree: Any) -> Any:
    """The tree as it is stored: floats in 16 bits, codes and zeros as they are."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def restored(tree: Any) -> Any:
    """What `halved` left, in float32."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


# --- adapters -----------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankKernel:
    """``x @ kernel`` is ``x W + (x down) up``, W anything that is multiplied so."""

    base: Any
    down: Any
    up: Any

    def __rmatmul__(self, x: Any) -> Array:
        return x @ self.base + (x @ self.down) @ self.up


Adapters = dict[str, tuple[Array, Array]]


def floats_of_a_rank(config: DecoderConfig) -> int:
    """Floats that each rank of the adapters takes in all layers."""
    return sum(count * (inputs + outputs) for count, inputs, outputs in kernel_shapes(config).values())


def draw_adapters(
    key: Array,
    params: Params,
    config: DecoderConfig,
    rank: int,
    padded: int | None = None,
    names: tuple[str, ...] | None = None,
) -> Adapters:
    """Adapters that change nothing yet.

    Args:
        key: of the draw.
        params: with dense kernels.
        config: of the model.
        rank: of each.
        padded: columns that arrays have. Those beyond ``rank`` are 0, get no gradient and stay 0: adapters of
            several ranks share a program.
        names: of the kernels that get some; ``None``: all.
    """
    width, found = max(rank, padded or 0), {}
    for place, (name, kernel) in enumerate(kernels(params, config).items()):
        if names is not None and name not in names:
            continue
        layers, inputs, outputs = kernel.shape
        drawn = jax.random.normal(jax.random.fold_in(key, place), (layers, inputs, width)) / math.sqrt(inputs)
        found[name] = (jnp.where(jnp.arange(width) < rank, drawn, 0), jnp.zeros((layers, width, outputs)))
    return found


def cut(adapters: Adapters, rank: int) -> Adapters:
    """Adapters without the columns that `draw_adapters` padded."""
    return {name: (down[..., :rank], up[:, :rank]) for name, (down, up) in adapters.items()}


def with_adapters(params: Params, adapters: Adapters) -> Params:
    return with_kernels(params, {name: LowRankKernel(params["layers"][name], *pair)
                                 for name, pair in adapters.items()})  # fmt: skip


def merged(params: Params, adapters: Adapters) -> Params:
    """Dense kernels that multiply as adapted ones do."""
    return with_kernels(params, {name: params["layers"][name] + down @ up for name, (down, up) in adapters.items()})


def adapted_loss(adapters: Adapters, params: Params, tokens: Array, config: DecoderConfig) -> Float[Array, ""]:
    return next_token_nll(with_adapters(params, adapters), config, tokens).mean()


# --- tuning -------------------------------------------------------------------------------------------


def batches(text: language.Name, length: int, rows: int, steps: int, seed: int) -> Int32[np.ndarray, "steps rows T"]:
    """Training pieces of each step, the same for all that share a seed."""
    train, key = language.splits(text).train, stream(seed, "compressed models", text)
    return np.stack([language.crops(train, length, rows, key=key, step=step) for step in range(steps)])


def tune(
    loss: Loss,
    trained: Any,
    frozen: Any,
    tokens: Int32[np.ndarray, "steps rows T"],
    learning_rate: float,
    config: DecoderConfig,
    chunk: int,
) -> Any:
    """What is trained, after a step for each batch.

    Args:
        loss: mean over a batch.
        trained: at the start.
        frozen: what else the loss reads.
        tokens: of all steps, whose number ``chunk`` divides.
        learning_rate: at its highest.
        config: of the model.
        chunk: steps of a program; runs of several lengths share it.

    Raises:
        ValueError: if ``chunk`` does not divide the steps.
    """
    if tokens.shape[0] % chunk:
        raise ValueError(f"chunk is {chunk}; it must divide the {tokens.shape[0]} steps")
    trained = jax.tree.map(jnp.array, trained)
    state = (trained, _optimizer().init(trained))
    for start in range(0, len(tokens), chunk):
        state = _steps(state, frozen, tokens[start : start + chunk], jnp.float32(learning_rate), jnp.int32(start),
                       jnp.int32(len(tokens)), loss=loss, config=config)  # fmt: skip
    return state[0]


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


@functools.partial(jax.jit, static_argnames=("loss", "config"), donate_argnums=0)
def _steps(
    state: Any, frozen: Any, tokens: Array, rate: Array, start: Array, steps: Array, *, loss: Loss, config: Any
) -> Any:
    def step(state: Any, batch: Any) -> tuple[Any, None]:
        (trained, moments), (tokens, done) = state, batch
        warm = jnp.maximum(steps / 10, 1)
        now = rate * jnp.minimum((done + 1) / warm, (steps - done) / jnp.maximum(steps - warm, 1))
        gradients = jax.grad(loss)(trained, frozen, tokens, config)
        updates, moments = _optimizer().update(gradients, moments)
        return (jax.tree.map(lambda leaf, by: leaf - now * by, trained, updates), moments), None

    return jax.lax.scan(step, state, (tokens, start + jnp.arange(tokens.shape[0])))[0]


def mean_nll(params: Params, config: DecoderConfig, tokens: Int32[np.ndarray, "n T"], rows: int = 32) -> float:
    """Nats a byte over sequences, some at a time."""
    parts = [tokens[at : at + rows] for at in range(0, len(tokens), rows)]
    return float(np.concatenate([np.asarray(_nll(params, part, config=config)) for part in parts]).mean())


@functools.partial(jax.jit, static_argnames="config")
def _nll(params: Params, tokens: Array, *, config: DecoderConfig) -> Array:
    return next_token_nll(params, config, tokens).mean(axis=1)


def held_out(
    text: language.Name, length: int, count: int
) -> tuple[Int32[np.ndarray, "half T"], Int32[np.ndarray, "{count} T"]]:
    """Sequences of the validation part, half as many, and of the test part."""
    parts = language.splits(text)
    return language.sequences(parts.validation, length, max(1, count // 2)), language.sequences(
        parts.test, length, count
    )
