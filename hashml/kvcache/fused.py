"""A decode step that reads compressed bytes once: `hashml_kernels.cache_decode` in place of logits and sums.

It forms no probabilities, so it serves layers whose policy does not look at attention (all is kept, or what is kept
was decided before), with one token a step, slots rather than pages, and the codecs below. The kernel runs on GPUs and
TPUs; elsewhere XLA reads the store by blocks, so that a decoded cache never exists. Small stores are read at once.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from hashml.kvcache.attending import ring_values
from hashml.kvcache.contract import Codec, CodecState, Policy
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.dense import Dense
from hashml.kvcache.integer import IntGroup
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerCache, LayerTables
from hashml_kernels import cache_decode as kernel

LEAST_SLOTS = 1024
"""Below it the decoded store is small, and memory no concern."""


def is_fused(spec: LayerSpec, count: int = 1) -> bool:
    """Whether a step of ``count`` tokens reads this layer by `fused_attend`."""
    looks = type(spec.policy).observe is not Policy.observe
    served = all(_format(codec) is not None for codec in (spec.key_codec, spec.value_codec))
    return count == 1 and spec.slots >= LEAST_SLOTS and served and not looks and spec.pages is None and (
        spec.rope != "slot"
    )  # fmt: skip


def fused_attend(
    spec: LayerSpec,
    tables: LayerTables,
    layer: LayerCache,
    q: Float[Array, "B Hq 1 D"],
    query_pos: Int32[Array, "B 1"],
) -> Float[Array, "B Hq 1 D"]:
    """What `hashml.kvcache.attending.attend` returns first, for a layer that `is_fused`."""
    turned, window, rotation = q, layer.window_keys, None
    if spec.rotary is not None:
        turned = spec.rotary.rotate(q, query_pos[:, None])
        if spec.rope == "read":
            window = spec.rotary.rotate(window.astype(jnp.float32), layer.window_pos[:, None])
            rotation = (jnp.asarray(spec.rotary.frequencies(spec.head_dim)), spec.rotary.pairs)
    keys, values = _format(spec.key_codec), _format(spec.value_codec)
    assert keys is not None
    assert values is not None

    def read(q: Array, keys_of: Any, values_of: Any, pos: Array, now: Array, exact: dict[str, Array]) -> Array:
        formats = {"key_format": keys, "value_format": values, "rotation": rotation}
        options: Any = {**formats, "sliding_window": spec.sliding_window, **exact}
        return kernel.cache_decode(q, keys_of, values_of, pos, now, **options)[0]

    exact = {"window_keys": window, "window_values": ring_values(layer), "window_pos": layer.window_pos}
    operands = (
        turned[:, :, 0].astype(jnp.float32) / math.sqrt(spec.head_dim),
        _leaves(layer.keys, tables.keys),
        _leaves(layer.values, tables.values),
        layer.pos,
        query_pos[:, 0],
        exact if spec.window else {},
    )
    if spec.heads_axis is not None:
        places = _places(spec, spec.heads_axis, operands)
        # Kernels have no rule for axes that vary over devices, and nothing here crosses them.
        read = jax.shard_map(read, in_specs=places, out_specs=P(None, spec.heads_axis), check_vma=False)
    return read(*operands)[:, :, None].astype(q.dtype)


def _places(spec: LayerSpec, axis: str, operands: tuple) -> tuple:
    """Where heads stand in each operand."""
    heads, everywhere = P(None, axis), P()

    def store(leaves: Any) -> Any:
        if isinstance(leaves, kernel.Coupled):
            return kernel.Coupled(heads, P(axis))
        return jax.tree.map(lambda _: heads, leaves)

    _, keys, values, _, _, exact = operands
    pos = everywhere if spec.head_pos == 1 else heads
    ring = {name: everywhere if name == "window_pos" else heads for name in exact}
    return heads, store(keys), store(values), pos, everywhere, ring


def _format(
    codec: Codec,
) -> kernel.DenseFormat | kernel.IntegerFormat | kernel.KiviFormat | kernel.CoupledFormat | None:
    """The kernel's format of a codec; None where it has none."""
    match codec:
        case Dense():
            return kernel.DenseFormat()
        case IntGroup():
            return kernel.IntegerFormat(codec.bits, codec.group)
        case KiviKeys():
            return kernel.KiviFormat(codec.bits, codec.group)
        case Coupled():
            return kernel.CoupledFormat(codec.channels, codec.bits)
        case _:
            return None


def _leaves(state: CodecState, params: dict | None) -> kernel.Dense | kernel.Quantised | kernel.Coupled:
    slots = state.slots
    if "x" in slots:
        return kernel.Dense(slots["x"])
    if "code" in slots:
        assert params is not None
        return kernel.Coupled(slots["code"], params["codebook"])
    return kernel.Quantised(slots["q"], slots["scale"], slots["minimum"])
