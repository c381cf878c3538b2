"""ThinK: thinner keys by query-driven pruning of channels (Xu, Jie, Dong, Wang, Lu, Zhou, Saha, Xiong, Sahoo, ICLR
2025, arXiv 2407.21018).

Few channels of a head's keys decide its logits, and the recent queries tell which. After a prompt every row and head
keeps the ``D' = D - int(D dropped)`` channels of highest

    score[d] = mean over the last queries of q[d]^2  *  mean over the keys that stay of k[d]^2

in ascending order; the window's keys are among those that stay. Main slots hold those channels alone, coded by any
``inner`` codec, and a query is gathered at them; the window keeps all channels, and logits are divided by the square
root of the whole D. The choice is made once, and a token is pruned when it leaves the window. Before a prompt was
seen the first D' channels are kept.

Rotation turns the channels ``(i, i + D/2)`` together, so for keys that are stored raw a mask of single channels does
not commute with it. ``pair_tied`` keeps or drops such pairs whole, by

    score[i] = mean(q[i]^2 + q[i + D/2]^2) * mean(k[i]^2 + k[i + D/2]^2)

which no rotation changes. It is the only form for raw keys and the codecs of raw keys (`Coupled` loses whole groups,
each with its partner's). Where a model's rotation turns neighbours ``(2i, 2i + 1)`` instead, ``pairs`` says so.

D' is seldom a number that kernels or groups of channels like: ``multiple_of`` keeps as many more as it takes.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from hashml.kvcache.contract import Codec, CodecState, Role, Rotate, Space
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.kvquant import NonUniformKeys


@dataclasses.dataclass(frozen=True)
class ThinK(Codec):
    """Keys of fewer channels, coded by ``inner``. For keys only.

    Attributes:
        inner: codec of the kept channels.
        dropped: the part of channels that goes, lambda; at least 0 and below 1. With ``pair_tied`` the number is
            rounded down to whole pairs, or whole groups of `Coupled` with their partners.
        pair_tied: whether channels are kept in rotary pairs.
        multiple_of: the kept channels are a multiple of it, and as many more than ``dropped`` leaves as that takes.
        pairs: which channels are a pair, as in `hashml.models.rotary.Rotary`: ``(i, i + D/2)``, or ``(2i, 2i + 1)``.
        queries: W, the last queries of a prompt that choose.

    Raises:
        ValueError: for an inner codec that cannot be pruned so, or a part out of range.
    """

    inner: Codec
    dropped: float | int = 0.4
    pair_tied: bool = False
    multiple_of: int = 1
    pairs: Literal["half", "interleaved"] = "half"
    queries: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.dropped < 1:
            raise ValueError(f"dropped is {self.dropped}; a part of the channels is at least 0 and below 1")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of is {self.multiple_of}; it must be at least 1")
        if self.queries < 1:
            raise ValueError(f"queries is {self.queries}; at least 1 of the prompt's last queries must choose")
        if self.pairs not in ("half", "interleaved"):
            raise ValueError(f"pairs is {self.pairs!r}; it must be 'half' or 'interleaved'")

    @property
    def granularity(self) -> int:
        return self.inner.granularity

    @property
    def space(self) -> Space:
        return self.inner.space if self.pair_tied else "post_rope"

    @property
    def keys_only(self) -> bool:
        return True

    @property
    def observed(self) -> int:
        return self.queries

    @property
    def rotary_pairs(self) -> str | None:
        return self.pairs if self.pair_tied else None

    @property
    def roles(self) -> dict[str, Role]:
        return {**self.inner.roles, "channels": "index", "width": "index"}

    @property
    def _unit(self) -> int:
        """Neighbouring channels that stay or go together."""
        return self.inner.channels if isinstance(self.inner, Coupled) else 1

    def kept(self, head_dim: int) -> int:
        """Channels that main slots hold, D'."""
        together = math.lcm(self._together, self.multiple_of)
        return -(-(head_dim - int(head_dim * self.dropped)) // together) * together

    @property
    def _together(self) -> int:
        """Channels that stay or go together, a pair's partners among them."""
        if not self.pair_tied:
            return 1
        return 2 * self._unit if self.pairs == "half" else math.lcm(self._unit, 2)

    def check(self, head_dim: int) -> None:
        if isinstance(self.inner, ThinK):
            raise ValueError(f"inner is {self.inner}; its channels are pruned already")
        if self.inner.needs_sinks:
            raise ValueError(f"inner is {self.inner}; its first tokens are exact and have all channels, so that it "
                             f"is ThinK that goes inside")  # fmt: skip
        if self.inner.space == "pre_rope" and not self.pair_tied:
            raise ValueError(f"inner is {self.inner}, for keys before rotation; pair_tied must be True, since a mask "
                             f"of single channels does not commute with rotation")  # fmt: skip
        if self.inner.space == "post_rope" and self.pair_tied:
            raise ValueError(f"inner is {self.inner}, for keys after rotation; pair_tied must be False")
        if head_dim % self._together:
            raise ValueError(f"the head's width is {head_dim}; pair_tied with {self.inner} needs a multiple of "
                             f"{self._together}, so that whole groups of channels have whole partners")  # fmt: skip
        if head_dim % math.lcm(self._together, self.multiple_of):
            raise ValueError(f"multiple_of is {self.multiple_of}; it must divide the head's width, {head_dim}, "
                             f"together with the {self._together} channels that stay or go at once")  # fmt: skip
        self.inner.check(self.kept(head_dim))

    def check_tables(self, params: Any, heads: int, head_dim: int) -> None:
        self.inner.check_tables(params, heads, head_dim)

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        kept = self.kept(head_dim)
        inner = self.inner.init(batch, heads, slots, kept, dtype)
        channels = jnp.arange(kept)
        if self.pair_tied and self.pairs == "half":
            channels = jnp.where(channels < kept // 2, channels, channels - kept // 2 + head_dim // 2)
        channels = channels.astype(jnp.uint8 if head_dim <= 256 else jnp.int32)
        fixed = {
            "channels": jnp.broadcast_to(channels, (batch, heads, kept)),
            # No bytes: the shape alone says what D was.
            "width": jnp.zeros((batch, heads, 0, head_dim), bool),
        }
        return CodecState(inner.slots, inner.fixed | fixed)

    def fit(
        self, fixed: dict[str, Array], keys: Array, queries: Array, valid: tuple[Array, Array]
    ) -> dict[str, Array]:
        keys_valid, queries_valid = valid
        batch, heads, group, count, width = queries.shape
        queries_valid = jnp.broadcast_to(queries_valid[:, None, None], queries.shape[:-1])
        merged = (batch, heads, group * count)
        query_energy = mean_square(queries.reshape(*merged, width), queries_valid.reshape(merged))
        old = fixed["channels"]
        choose = choose_channels
        if self.pair_tied:
            choose = functools.partial(choose_pairs, unit=self._unit, pairs=self.pairs)
        chosen = choose(query_energy, mean_square(keys, keys_valid), old.shape[-1])
        return fixed | {"channels": chosen.astype(old.dtype)}

    def quantise(self, params: Any, fixed: dict[str, Array], x: Array, valid: Array) -> dict[str, Array]:
        channels = fixed["channels"].astype(jnp.int32)
        kept = jnp.take_along_axis(x, channels[:, :, None], axis=-1)
        return self.inner.quantise(self._inner_params(params, channels), fixed, kept, valid)

    def decode(self, params: Any, state: CodecState) -> Float[Array, "B H C D"]:
        """Keys, with zeros in the channels that are gone."""
        channels = state.fixed["channels"].astype(jnp.int32)
        kept = self.inner.decode(self._inner_params(params, channels), state).astype(jnp.float32)
        whole = jnp.zeros((*kept.shape[:-1], state.fixed["width"].shape[-1]), jnp.float32)
        places = jnp.broadcast_to(channels[:, :, None], kept.shape)
        return jnp.put_along_axis(whole, places, kept, axis=-1, inplace=False)

    def logits(
        self, params: Any, state: CodecState, q: Float[Array, "B H J n D"], rotate: Rotate | None
    ) -> Float[Array, "B H J n C"]:
        if rotate is not None:
            return super().logits(params, state, q, rotate)
        channels = state.fixed["channels"].astype(jnp.int32)
        kept = jnp.take_along_axis(q, channels[:, :, None, None], axis=-1)
        return self.inner.logits(self._inner_params(params, channels), state, kept, None)

    def _inner_params(self, params: Any, channels: Int32[Array, "B H kept"]) -> Any:
        """What the inner codec has learned of the channels that are kept."""
        if isinstance(self.inner, Coupled):
            return params | {"groups": channels[..., :: self._unit] // self._unit}
        if isinstance(self.inner, NonUniformKeys):
            ranges = {name: jnp.take_along_axis(params[name][None], channels, axis=-1) for name in ("low", "high")}
            return params | ranges
        return params


def mean_square(x: Float[Array, "B H n D"], valid: Bool[Array, "B H n"]) -> Float[Array, "B H D"]:
    """Mean over the valid tokens of the square of each channel, float32; 0 where there is none."""
    squares = jnp.where(valid[..., None], x.astype(jnp.float32), 0.0) ** 2
    return squares.sum(axis=2) / jnp.maximum(valid.sum(axis=2), 1)[..., None]


def choose_channels(
    query_energy: Float[Array, "B H D"], key_energy: Float[Array, "B H D"], count: int
) -> Int32[Array, "B H {count}"]:
    """The ``count`` channels of highest energy of queries times keys, ascending; of equal ones the first."""
    return jnp.sort(jax.lax.top_k(query_energy * key_energy, count)[1], axis=-1)


def choose_pairs(
    query_energy: Float[Array, "B H D"], key_energy: Float[Array, "B H D"], count: int, *, unit: int = 1,
    pairs: Literal["half", "interleaved"] = "half",
) -> Int32[Array, "B H {count}"]:  # fmt: skip
    """As `choose_channels`, of whole pairs ``(i, i + D/2)``, in runs of ``unit`` neighbours; ``count`` is a multiple
    of ``2 unit``. A pair's score is the product of its energies, a run's the sum of its pairs'.

    With interleaved ``pairs``, ``(2i, 2i + 1)``, a run is whole pairs and whole units, and needs no partner.
    """
    *lead, width = query_energy.shape
    half = pairs == "half"
    # Partners side by side on the axis that is summed up.
    shape, axis = ((2, width // 2), -2) if half else ((width // 2, 2), -1)
    of_queries, of_keys = (x.reshape(*lead, *shape).sum(axis=axis) for x in (query_energy, key_energy))
    run = unit if half else math.lcm(unit, 2) // 2  # pairs
    scores = (of_queries * of_keys).reshape(*lead, width // (2 * run), run).sum(axis=-1)
    runs = jnp.sort(jax.lax.top_k(scores, count // (2 * run))[1], axis=-1)
    if not half:
        return (runs[..., None] * 2 * run + jnp.arange(2 * run)).reshape(*lead, count)
    first = (runs[..., None] * unit + jnp.arange(unit)).reshape(*lead, count // 2)
    return jnp.concatenate([first, first + width // 2], axis=-1)
