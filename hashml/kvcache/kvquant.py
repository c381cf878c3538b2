"""KVQuant: non-uniform quantisation of the cache with a few exact outliers (Hooper, Kim, Mohammadzadeh, Mahoney,
Shao, Keutzer, Gholami, NeurIPS 2024, arXiv 2401.18079).

A value is brought to about [-1, 1] and snapped to the nearest of ``2**bits`` signposts, one table a layer and tensor:

    zero = (high + low) / 2,   range = (high - low) / 2
    q = argmin_j |(x - zero) / range - table[j]|,  ties to the smaller j;       x^ = zero + range levels[q]

Keys have static ranges, per channel and before rotation, from calibration. Values have ranges of their own per
token, found when they are stored. The ``outliers`` values of a token and head that lie farthest out are kept aside
in float16 with their channel, a byte, and for values they do not stretch the range. ``levels`` is the table itself,
or with Q-Norm the table shifted and scaled so that calibration data keeps its mean and deviation. Tables are
learned by Fisher-weighted k-means in `hashml.kvcache.calibration`. About ``bits + 24 outliers / D`` bits a value.

The first 1 to 5 tokens are kept exact, since most heads look at them: `hashml.kvcache.exact_first`.

Departures: the paper marks an outlier by percentiles and stores as many as there are; here their number is static,
as in the authors' later capped kernels, and all of it is used at each token.
"""

import dataclasses
from typing import Any, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Integer

from hashml.coding.bit_packing import pack, packed_size, unpack
from hashml.kvcache.contract import Codec, CodecState, Role, Space, check_shapes
from hashml.kvcache.exact_first import ExactFirst
from hashml.kvcache.integer import half

_TINY = 1e-30
"""A range of zero is taken for this: what differs from the channel's one value is then far out, and not NaN."""


def normalise(
    x: Float[Array, "*n D"], low: Float[Array, "*#m #D"], high: Float[Array, "*#m #D"]
) -> Float[Array, "*n D"]:
    """Values with ``low`` at -1 and ``high`` at 1, float32."""
    return (x.astype(jnp.float32) - (high + low) / 2) / jnp.maximum((high - low) / 2, _TINY)


def snap(x: Float[Array, "*n D"], table: Float[Array, " K"]) -> Int32[Array, "*n D"]:
    """The nearest entry of an ascending table, the smaller of two equally near ones."""
    middles = (table[1:] + table[:-1]) / 2
    return (x[..., None] > middles).sum(axis=-1, dtype=jnp.int32)


def token_outliers(x: Float[Array, "*n D"], outliers: int) -> Int32[Array, "*n {outliers}"]:
    """Channels without which the rest of a token has the smallest range: its i lowest and the others highest."""
    width = x.shape[-1]
    order = jnp.argsort(x.astype(jnp.float32), axis=-1).astype(jnp.int32)
    ranked = jnp.take_along_axis(x.astype(jnp.float32), order, axis=-1)
    splits = range(outliers + 1)  # how many of them are low
    ranges = jnp.stack([ranked[..., width - 1 - (outliers - i)] - ranked[..., i] for i in splits], axis=-1)
    low = jnp.argmin(ranges, axis=-1)[..., None]
    place = jnp.arange(outliers)
    return jnp.take_along_axis(order, jnp.where(place < low, place, width - outliers + place), axis=-1)


def token_range(
    x: Float[Array, "*n D"], index: Integer[Array, "*n o"]
) -> tuple[Float[Array, "*n 1"], Float[Array, "*n 1"]]:
    """``(low, high)`` of each token without its outliers, float32."""
    x = x.astype(jnp.float32)
    apart = (jnp.arange(x.shape[-1]) == index[..., None]).any(axis=-2)
    low = jnp.where(apart, jnp.inf, x).min(axis=-1, keepdims=True)
    return low, jnp.where(apart, -jnp.inf, x).max(axis=-1, keepdims=True)


def _check(bits: int, outliers: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; allowed are 1 to 8")
    if outliers < 0:
        raise ValueError(f"outliers is {outliers}; it is not negative")


def _check_width(outliers: int, head_dim: int) -> None:
    if outliers >= head_dim:
        raise ValueError(f"outliers is {outliers}; it must be less than the head's width, {head_dim}")
    if outliers and head_dim > 256:
        raise ValueError(f"the head's width is {head_dim}; the channel of an outlier is a byte, so it is at most 256")


def _store(batch: int, heads: int, slots: int, head_dim: int, bits: int, outliers: int) -> dict[str, Array]:
    shape = (batch, heads, slots)
    leaves = {"q": jnp.zeros((*shape, packed_size(head_dim, bits)), jnp.uint8)}
    if outliers:
        leaves["outlier_index"] = jnp.zeros((*shape, outliers), jnp.uint8)
        leaves["outlier_value"] = jnp.zeros((*shape, outliers), jnp.float16)
    return leaves


def _set_apart(x: Array, index: Array) -> dict[str, Array]:
    if not index.shape[-1]:
        return {}
    value = half(jnp.take_along_axis(x, index, axis=-1))
    return {"outlier_index": index.astype(jnp.uint8), "outlier_value": value}


def _put_back(decoded: Array, slots: dict[str, Array]) -> Array:
    if "outlier_index" not in slots:
        return decoded
    index, value = slots["outlier_index"].astype(jnp.int32), slots["outlier_value"].astype(jnp.float32)
    return jnp.put_along_axis(decoded, index, value, axis=-1, inplace=False)


def _table(params: Any, bits: int) -> tuple[Array, Array]:
    """``(table, levels)``: what is snapped to, and what it is decoded to."""
    table = params["table"]
    if table.shape != (2**bits,):
        raise ValueError(f"table is of shape {table.shape}; {bits} bits need [{2**bits}]")
    return table, params.get("levels", table)


def _shown(codec: "NonUniformKeys | NonUniformValues") -> str:
    """As the file of tables learned without Q-Norm has it."""
    norm = ", q_norm=True" if codec.q_norm else ""
    return f"{type(codec).__name__}(bits={codec.bits}, outliers={codec.outliers}{norm})"


_ROLES: dict[str, Role] = {"q": "payload", "outlier_index": "index", "outlier_value": "scales"}


@dataclasses.dataclass(frozen=True)
class NonUniformKeys(Codec):
    """Keys before rotation, in static ranges per channel.

    Its parameters are ``{"low", "high": float32 [H, D], "table": float32 [2**bits]}``, the table ascending, and with
    Q-Norm ``"levels"`` like the table. A NaN is the farthest of outliers and stays one; where it is none, it gets the
    lowest signpost, finite, and nobody sees that it was there.

    Attributes:
        bits: of a code, 1 to 8.
        outliers: values of a token and head that are kept exactly (in float16), those farthest out.
        q_norm: whether the codec learns levels too; what it has learned says how it decodes.

    Raises:
        ValueError: for other values.
    """

    bits: int
    outliers: int = 0
    q_norm: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _check(self.bits, self.outliers)

    def __repr__(self) -> str:
        return _shown(self)

    @property
    def space(self) -> Space:
        return "pre_rope"

    @property
    def roles(self) -> dict[str, Role]:
        return _ROLES if self.outliers else {"q": "payload"}

    def check(self, head_dim: int) -> None:
        _check_width(self.outliers, head_dim)

    def check_tables(self, params: Any, heads: int, head_dim: int) -> None:
        ranges = {"low": (heads, head_dim), "high": (heads, head_dim)}
        check_shapes(str(self), params, {**ranges, "table": (2**self.bits,)})

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        return CodecState(_store(batch, heads, slots, head_dim, self.bits, self.outliers), {})

    def quantise(self, params: Any, fixed: dict[str, Array], x: Array, valid: Array) -> dict[str, Array]:
        del fixed, valid
        table, _ = _table(params, self.bits)
        # Of a row's own channels under `hashml.kvcache.think` the ranges are [B, H, D].
        low, high = params["low"][..., None, :], params["high"][..., None, :]
        unit = normalise(x, low, high)
        farthest = jax.lax.top_k(jnp.abs(unit), self.outliers)[1]
        return {"q": pack(snap(unit, table), self.bits), **_set_apart(x, farthest)}

    def decode(self, params: Any, state: CodecState) -> Array:
        _, levels = _table(params, self.bits)
        low, high = params["low"][..., None, :], params["high"][..., None, :]
        codes = unpack(state.slots["q"], self.bits, low.shape[-1]).astype(jnp.int32)
        return _put_back((high + low) / 2 + (high - low) / 2 * levels[codes], state.slots)


@dataclasses.dataclass(frozen=True)
class NonUniformValues(Codec):
    """Values, in ranges per token and head that are found when they are stored.

    Its parameters are ``{"table": float32 [2**bits]}``, ascending, and with Q-Norm ``"levels"`` like it. A NaN makes
    the range NaN, and so all values of its token and head but the outliers.

    Attributes:
        bits: of a code, 1 to 8.
        outliers: values of a token and head that are kept exactly (in float16) and do not stretch its range.
        q_norm: as in `NonUniformKeys`.

    Raises:
        ValueError: for other values.
    """

    bits: int
    outliers: int = 0
    q_norm: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _check(self.bits, self.outliers)

    def __repr__(self) -> str:
        return _shown(self)

    @property
    def roles(self) -> dict[str, Role]:
        scales: dict[str, Role] = {"zero": "scales", "range": "scales"}
        return {"q": "payload", **scales, **(_ROLES if self.outliers else {})}

    def check(self, head_dim: int) -> None:
        _check_width(self.outliers, head_dim)
        if head_dim * self.bits % 8:
            raise ValueError(f"the head's width is {head_dim}; its codes of {self.bits} bits must fill whole bytes")

    def check_tables(self, params: Any, heads: int, head_dim: int) -> None:
        check_shapes(str(self), params, {"table": (2**self.bits,)})

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        leaves = _store(batch, heads, slots, head_dim, self.bits, self.outliers)
        leaves |= {name: jnp.zeros((batch, heads, slots, 1), jnp.float16) for name in ("zero", "range")}
        return CodecState(leaves, {})

    def quantise(self, params: Any, fixed: dict[str, Array], x: Array, valid: Array) -> dict[str, Array]:
        del fixed, valid
        table, _ = _table(params, self.bits)
        x = x.astype(jnp.float32)
        index = token_outliers(x, self.outliers)
        low, high = token_range(x, index)
        zero, spread = half((high + low) / 2), half((high - low) / 2)
        unit = (x - zero.astype(jnp.float32)) / jnp.maximum(spread.astype(jnp.float32), _TINY)
        return {"q": pack(snap(unit, table), self.bits), "zero": zero, "range": spread, **_set_apart(x, index)}

    def decode(self, params: Any, state: CodecState) -> Array:
        _, levels = _table(params, self.bits)
        zero, spread = (state.slots[name].astype(jnp.float32) for name in ("zero", "range"))
        packed = state.slots["q"]
        codes = unpack(packed, self.bits, packed.shape[-1] * 8 // self.bits).astype(jnp.int32)
        return _put_back(zero + spread * levels[codes], state.slots)


@overload
def kvquant(bits: int, outliers: int = 0, *, q_norm: bool = False) -> tuple[NonUniformKeys, NonUniformValues]: ...
@overload
def kvquant(bits: int, outliers: int = 0, *, first: int, q_norm: bool = False) -> tuple[Codec, Codec]: ...
def kvquant(bits: int, outliers: int = 0, *, first: int = 0, q_norm: bool = False) -> tuple[Codec, Codec]:
    """The paper's pair: ``key_codec`` and ``value_codec`` of a layer with ``rope="read"``.

    Args:
        bits, outliers, q_norm: of both, as in `NonUniformKeys`.
        first: first tokens that are exact, 1 to 5 in the paper; the layer has as many ``sinks``. They cost
            ``2 first D`` values of the layer's dtype a head, and the codecs are
            `hashml.kvcache.exact_first.ExactFirst`.
    """
    keys, values = NonUniformKeys(bits, outliers, q_norm=q_norm), NonUniformValues(bits, outliers, q_norm=q_norm)
    return (ExactFirst(keys, first), ExactFirst(values, first)) if first else (keys, values)
