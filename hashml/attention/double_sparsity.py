"""Double Sparsity: logits of a few coordinates, in 4 bits (Yang et al. 2024, arXiv 2408.07092).

    channels[head] = the r coordinates with the largest  sum |q_c| sum |k_c|  over calibration text
    score_j = q[channels] . int4(k_j[channels]) / sqrt(r)

``D / r`` is 16 in the paper. Coordinates are chosen once a head, offline (`heavy_channels`); a key's have a float16
scale and minimum of their own: ``4 r + 32`` bits a token, r being even.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key

from hashml.attention.selector_contract import Index, Selector, check_heads, grouped, need, put
from hashml.kvcache import CodecState, IntGroup


def heavy_channels(
    queries: Float[Array, "B H T D"], keys: Float[Array, "B K N D"], count: int
) -> Int32[Array, "K {count}"]:
    """The coordinates that matter most to each key head, the first the most; both as attention uses them.

    Raises:
        ValueError: for more coordinates than there are, or heads that do not divide.
    """
    heads, width = keys.shape[1], keys.shape[-1]
    if not 1 <= count <= width:
        raise ValueError(f"count is {count}; it must lie in 1..{width}, the head's width")
    check_heads(queries.shape[1], heads, heads)
    of_queries = jnp.abs(queries.astype(jnp.float32)).sum(axis=(0, 2)).reshape(heads, -1, width).sum(axis=1)
    of_keys = jnp.abs(keys.astype(jnp.float32)).sum(axis=(0, 2))
    return jax.lax.top_k(of_queries * of_keys, count)[1]


@dataclasses.dataclass(frozen=True)
class DoubleSparsity(Selector):
    """Scores from ``channels`` coordinates; `build` takes those of `heavy_channels` as ``learned``.

    Attributes:
        channels: r, coordinates of a key that are stored.
        bits: of each.

    Raises:
        ValueError: for no channel, or bits outside 1..8.
    """

    channels: int
    bits: int = 4

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels is {self.channels}; it must be at least 1")
        self._codec()

    def _codec(self) -> IntGroup:
        return IntGroup(self.bits, group=self.channels)

    def build(
        self,
        keys: Float[Array, "B K N D"],
        values: Float[Array, "B K N V"],
        positions: Int32[Array, "B P N"],
        *,
        key: Key[Array, ""] | None = None,
        learned: Any = None,
    ) -> Index:
        del values, positions, key
        chosen = jnp.asarray(need("learned", learned, "DoubleSparsity", "for its channels"), jnp.int32)
        if chosen.shape != (keys.shape[1], self.channels):
            raise ValueError(f"learned has shape {chosen.shape}; channels must be {(keys.shape[1], self.channels)}")
        return Index(self._rows(chosen, keys), {"channels": chosen})

    def append(
        self,
        index: Index,
        keys: Float[Array, "B K n D"],
        values: Float[Array, "B K n V"],
        at: Int32[Array, "B P n"],
    ) -> Index:
        del values
        rows = self._rows(index.fixed["channels"], keys)
        return Index({name: put(leaf, rows[name], at) for name, leaf in index.slots.items()}, index.fixed)

    def _rows(self, channels: Array, keys: Array) -> dict[str, Array]:
        few = jnp.take_along_axis(keys, channels[None, :, None], axis=3)
        return self._codec().quantise(None, {}, few, jnp.ones(few.shape[:3], bool))

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        channels = index.fixed["channels"]
        few = self._codec().decode(None, CodecState(index.slots, {}))
        queries = jnp.take_along_axis(grouped(q, channels.shape[0]), channels[None, :, None], axis=3)
        return jnp.einsum("bkjc,bknc->bkjn", queries, few) / math.sqrt(self.channels)
