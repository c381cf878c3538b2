"""Caches whose budget is a number of tokens, as the eviction papers state it, and what heads hold as time goes by.

`experiments.kvcache.contenders` gives every policy the same bytes. Here a policy keeps a number of tokens, main slots
and window together, and `in_bytes` then gives its rivals as many bytes as it takes. `follow` decodes as the harness
does and tells beside it how many tokens each head holds, and how many of them a plain window of that size would hold.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from experiments.kvcache import harness
from experiments.kvcache.contenders import Setting, contender
from hashml.kvcache.contract import Policy
from hashml.kvcache.serving import decode_step, no_tables
from hashml.kvcache.spec import CacheSpec, LayerSpec
from hashml.kvcache.state import Cache
from hashml.models.decoder import DecoderModel, Params, decoder_model


def in_tokens(name: str, setting: Setting, tokens: int, policy: Policy | None = None) -> tuple[LayerSpec, ...]:
    """The layers of a contender that keeps ``tokens`` tokens, its window among them.

    Args:
        name: as in `contender`, of a policy that drops tokens.
        setting: what all share.
        tokens: at least one beside the window, and room for the sinks.
        policy: in place of the one that the name has.

    Raises:
        ValueError: for a budget that the window fills.
    """
    slots = tokens - setting.window
    if slots < max(1, setting.sinks):
        raise ValueError(f"tokens is {tokens}; a window of {setting.window} and {setting.sinks} sinks need at least "
                         f"{setting.window + max(1, setting.sinks)}")  # fmt: skip
    layers = contender(name, setting, 1)
    return tuple(
        dataclasses.replace(layer, slots=slots, policy=layer.policy if policy is None else policy) for layer in layers
    )


def in_bytes(name: str, setting: Setting, allowed: float | int, *, round_up: bool = False) -> tuple[LayerSpec, ...]:
    """The layers of a contender that keeps as many tokens as fit into the ``allowed`` bytes of a row.

    Args:
        name, setting: as in `in_tokens`.
        allowed: bytes.
        round_up: whether the last token may stick out, so that there are at least these bytes.

    Raises:
        ValueError: for fewer bytes than window, sinks and one slot take.
    """
    least = setting.window + max(1, setting.sinks)
    base = in_tokens(name, setting, least)

    def sized(tokens: int) -> tuple[LayerSpec, ...]:
        return tuple(dataclasses.replace(layer, slots=tokens - setting.window) for layer in base)

    sizes = range(least, 2 * setting.tokens + 1)
    place = bisect.bisect_left if round_up else bisect.bisect_right
    found = place(sizes, allowed, key=lambda tokens: row_bytes(setting, sized(tokens))) - (not round_up)
    if found < 0:
        raise ValueError(f"allowed is {allowed:.0f} bytes; {name} with {least} tokens, the fewest, takes "
                         f"{row_bytes(setting, base)}")  # fmt: skip
    return sized(sizes[min(found, len(sizes) - 1)])


def row_bytes(setting: Setting, layers: Sequence[LayerSpec]) -> int:
    """All bytes of one row's cache."""
    return harness.row_bytes(decoder_model(setting.decoder), layers).total


class Followed(NamedTuple):
    """What is said after each token, and what heads hold then.

    Attributes:
        nll, correct: as in `harness.Scores`.
        held: tokens that a head holds.
        newest: of these, the ones that a window of as many newest tokens would hold, too.
    """

    nll: Float[Array, "B T"]
    correct: Bool[Array, "B T"]
    held: Int32[Array, "T L B H"]
    newest: Int32[Array, "T L B H"]


@functools.partial(jax.jit, static_argnames=("model", "spec"))
def follow(
    model: DecoderModel,
    spec: CacheSpec,
    params: Params,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    key: Array,
) -> Followed:
    """`harness.teacher_forced` from an empty cache, head by head; arguments as there, for codecs that learn nothing
    and policies that decide for each head alone."""

    def step(cache: Cache, given: tuple[Array, Array]) -> tuple[Cache, tuple[Array, ...]]:
        token, target = given
        logits, cache = decode_step(model, spec, no_tables(spec), params, cache, token)
        said = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(target, 0)[:, None], axis=1)[:, 0]
        nll = jnp.where(target >= 0, -said, 0.0)
        return cache, (nll, logits.argmax(axis=1) == target, *_held(cache))

    _, (nll, correct, held, newest) = jax.lax.scan(step, harness.empty_cache(model, spec, key), (tokens.T, targets.T))
    return Followed(nll.T, correct.T, held, newest)


def _held(cache: Cache) -> tuple[Array, Array]:
    """Tokens of each layer, row and head, and how many of them a window of that size has."""
    counts, shared = [], []
    for layer in cache.layers:
        batch, heads, _ = layer.pos.shape
        ring = jnp.broadcast_to(layer.window_pos[:, None], (batch, heads, layer.window_pos.shape[1]))
        pos = jnp.concatenate([layer.pos, ring], axis=2)
        held = (pos >= 0).sum(axis=2, dtype=jnp.int32)
        first = cache.length[:, None] - held
        counts.append(held)
        shared.append(((pos >= 0) & (pos >= first[..., None])).sum(axis=2, dtype=jnp.int32))
    return jnp.stack(counts), jnp.stack(shared)
