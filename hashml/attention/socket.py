"""SOCKET: soft collisions of hash codes choose the tokens that a query reads (Joshi et al., 2026, arXiv 2602.06283).

    code[l, j] = SimHash of key j in table l, P bits                                        stored, with |v_j|
    p_l(r) = softmax_r( sum_p c[r, p] tanh(w[l, p] . q) / (tau sqrt(d)) )                    soft_hash of the query
    score_j = |v_j| sum_l p_l(code[l, j])

The first ``sinks`` tokens, the last ``window`` ones and the best of the others by score are read, with exact softmax.
Nothing is trained. As ``tau`` falls, the sum counts hard collisions; as it grows, it ranks by bits that agree.
``p_l`` is a product over bits, so a score needs no table of ``2^P`` entries either (`factorised_scores`):

    log p_l(code) = sum_p log sigmoid(-2 b u_p) + sum_p bit_p 2 b u_p,      u = tanh(w . q),  b = 1 / (tau sqrt(d))

`HardLSH`, `HammingLSH` and `AsymmetricSRP` score the same index by collisions, by agreeing bits and by
``sum_l sum_p c[code, p] (w . q)_p``: what SOCKET is to be compared with at equal bits.

Departures: codes take a byte up to 8 bits (the released code stores int16), and one index a key head serves its group
(there, one a query head). Beside the paper's: an exponent of the value norm, and ``center``, which subtracts the mean
key of the prompt before keys are hashed. That shifts all logits of a query alike, so attention does not change.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Float32, Int32, Key, UInt

from hashml.attention.code_lookup import agreeing_bits, collision_counts, lookup_sum, over_tables
from hashml.attention.selector_contract import Index, Selector, grouped, mean_key, need, put, put_codes
from hashml.coding import code_dtype
from hashml.hashing.simhash import MAX_SOFT_BITS, corners, hard_hash, project, soft_hash, srp_planes
from hashml_kernels.soft_collision_score import soft_collision_score

_TOKENS = 256
"""Tokens whose projections exist at a time."""

_HALF_MAX = 65504.0
"""The largest finite float16."""

LEAST_SLOTS = 1024
"""Below it the look-up by XLA takes no time worth a kernel."""


def srp_codes(keys: Float[Array, "B K N D"], planes: Float32[Array, "L P D"]) -> UInt[Array, "B K N L"]:
    """SimHash codes of keys, uint8 up to 8 bits and uint16 above; projections are forgotten by blocks of tokens."""
    dtype = code_dtype(planes.shape[1])
    batch, heads, tokens, width = keys.shape
    if tokens <= _TOKENS:
        return hard_hash(keys, planes).astype(dtype)
    blocks = jnp.pad(keys, ((0, 0), (0, 0), (0, -tokens % _TOKENS), (0, 0)))
    blocks = jnp.moveaxis(blocks.reshape(batch, heads, -1, _TOKENS, width), 2, 0)
    codes = jax.lax.map(lambda block: hard_hash(block, planes).astype(dtype), blocks)
    return jnp.moveaxis(codes, 0, 2).reshape(batch, heads, -1, planes.shape[0])[:, :, :tokens]


def value_norms(values: Float[Array, "B K N V"]) -> Float16[Array, "B K N"]:
    """Lengths of values, at most 65504; below 6e-8 they are 0."""
    norms = jnp.sqrt(jnp.sum(jnp.square(values.astype(jnp.float32)), axis=-1))
    return jnp.minimum(norms, _HALF_MAX).astype(jnp.float16)


def socket_scores(
    q: Float[Array, "B K J D"], planes: Float32[Array, "L P D"], codes: UInt[Array, "B K L N"], beta: float
) -> Float32[Array, "B K J N"]:
    """``sum_l p_l(code)`` by look-up in the soft tables of the queries; in [0, L]."""
    return lookup_sum(soft_hash(q, planes, beta), codes)


def factorised_scores(
    q: Float[Array, "B K J D"], planes: Float32[Array, "L P D"], codes: UInt[Array, "B K L N"], beta: float
) -> Float32[Array, "B K J N"]:
    """`socket_scores` from the bits of each code, without tables."""
    bits = planes.shape[1]
    logits = 2 * beta * jnp.tanh(project(q, planes))
    unset = jax.nn.log_sigmoid(-logits).sum(axis=-1)

    def term(place: Array, code: Array) -> Array:
        of_table = jax.lax.dynamic_index_in_dim(logits, place, axis=3, keepdims=False)
        total = jax.lax.dynamic_slice_in_dim(unset, place, 1, axis=3)
        for p in range(bits):
            total = total + (code >> (bits - 1 - p) & 1) * of_table[..., p, None]
        return jnp.exp(total)

    return over_tables(term, codes, q.shape[2], jnp.float32)


@dataclasses.dataclass(frozen=True)
class SimHashIndex(Selector):
    """SimHash codes of the keys and lengths of the values: the index that four ways of scoring share.

    ``tables * 8 * ceil(bits / 8)`` bits a key (8 or 16 for each code), and 16 for the length of its value.

    Attributes:
        tables, bits: L tables of P bits.
        value_norm_power: exponent of ``|v|`` in the score; with 0, no lengths are stored.
        center: ``"prefill_mean"`` subtracts the mean of the keys that the index was built from; it stays for keys
            that come later, so that codes remain valid.

    Raises:
        ValueError: for values outside these, or bits outside 1..16.
    """

    tables: int = 60
    bits: int = 8
    value_norm_power: float | int = 1
    center: Literal["none", "prefill_mean"] = "none"

    def __post_init__(self) -> None:
        if self.tables < 1:
            raise ValueError(f"tables is {self.tables}; it must be at least 1")
        if not 1 <= self.bits <= MAX_SOFT_BITS:
            raise ValueError(f"bits is {self.bits}; it must lie in 1..{MAX_SOFT_BITS}")
        if not 0 <= self.value_norm_power < math.inf:
            raise ValueError(f"value_norm_power is {self.value_norm_power}; it must be at least 0 and finite")
        if self.center not in ("none", "prefill_mean"):
            raise ValueError(f"center is {self.center!r}; allowed are 'none' and 'prefill_mean'")

    def build(
        self,
        keys: Float[Array, "B K N D"],
        values: Float[Array, "B K N V"],
        positions: Int32[Array, "B P N"],
        *,
        key: Key[Array, ""] | None = None,
        learned: Any = None,
    ) -> Index:
        del learned
        key = need("key", key, type(self).__name__, "to draw its planes")
        fixed = {"planes": srp_planes(key, self.tables, self.bits, keys.shape[-1])}
        if self.center == "prefill_mean":
            fixed["centre"] = mean_key(keys, positions)
        slots = {"codes": self._codes(fixed, keys).swapaxes(2, 3)}
        if self.value_norm_power:
            slots["norms"] = value_norms(values)
        return Index(slots, fixed)

    def append(
        self,
        index: Index,
        keys: Float[Array, "B K n D"],
        values: Float[Array, "B K n V"],
        at: Int32[Array, "B P n"],
    ) -> Index:
        slots = {"codes": put_codes(index.slots["codes"], self._codes(index.fixed, keys), at)}
        if self.value_norm_power:
            slots["norms"] = put(index.slots["norms"], value_norms(values), at)
        return Index(slots, index.fixed)

    def _codes(self, fixed: dict[str, Any], keys: Array) -> UInt[Array, "B K N L"]:
        if "centre" in fixed:
            keys = keys.astype(jnp.float32) - fixed["centre"][:, :, None]
        return srp_codes(keys, fixed["planes"])

    def similarity(
        self, planes: Float32[Array, "L P D"], q: Float32[Array, "B K J D"], codes: UInt[Array, "B K L N"]
    ) -> Array:
        """Scores before the lengths of values, ``[B, K, J, N]``."""
        raise NotImplementedError

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        codes = index.slots["codes"]
        found = self.similarity(index.fixed["planes"], grouped(q, codes.shape[1]), codes).astype(jnp.float32)
        lengths = self.lengths(index)
        return found if lengths is None else found * lengths[:, :, None].astype(jnp.float32)

    def lengths(self, index: Index) -> Float[Array, "B K N"] | None:
        """What scores are multiplied with."""
        if not self.value_norm_power:
            return None
        norms = index.slots["norms"]
        return norms if self.value_norm_power == 1 else norms.astype(jnp.float32) ** self.value_norm_power


@dataclasses.dataclass(frozen=True)
class Socket(SimHashIndex):
    """Soft collisions; the paper's defaults.

    Attributes:
        temperature: tau of the soft tables.
        implementation: ``"auto"`` scores by `hashml_kernels.soft_collision_score` on GPUs and TPUs, for 1024 slots or
            more, and by XLA elsewhere. An index whose heads lie on several devices wants `jax.shard_map` around a
            kernel, or ``"xla"``.

    Raises:
        ValueError: for a temperature that is not positive and finite, another ``implementation``, and as
            `SimHashIndex`.
    """

    temperature: float | int = 0.3
    implementation: Literal["auto", "xla"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be positive and finite")
        if self.implementation not in ("auto", "xla"):
            raise ValueError(f"implementation is {self.implementation!r}; allowed are 'auto' and 'xla'")

    def beta(self, width: int) -> float:
        """Inverse temperature of a bit, for heads of this width."""
        return 1 / (self.temperature * math.sqrt(width))

    def similarity(
        self, planes: Float32[Array, "L P D"], q: Float32[Array, "B K J D"], codes: UInt[Array, "B K L N"]
    ) -> Float32[Array, "B K J N"]:
        return socket_scores(q, planes, codes, self.beta(q.shape[-1]))

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        if self.implementation == "xla" or index.slots["codes"].shape[3] < LEAST_SLOTS:
            return super().scores(index, q)
        by_kernel = self._by_kernel
        return jax.lax.platform_dependent(index, q, cuda=by_kernel, tpu=by_kernel, default=super().scores)

    def _by_kernel(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        logits = 2 * self.beta(q.shape[-1]) * jnp.tanh(project(q, index.fixed["planes"]))
        return soft_collision_score(index.slots["codes"], self.lengths(index), logits).values


@dataclasses.dataclass(frozen=True)
class HardLSH(SimHashIndex):
    """Tables in which key and query collide: the limit of `Socket` as its temperature falls."""

    def similarity(
        self, planes: Float32[Array, "L P D"], q: Float32[Array, "B K J D"], codes: UInt[Array, "B K L N"]
    ) -> Int32[Array, "B K J N"]:
        return collision_counts(hard_hash(q, planes), codes)


@dataclasses.dataclass(frozen=True)
class HammingLSH(SimHashIndex):
    """Bits in which key and query agree, of all ``L P``: plain SimHash, as many bits as `Socket`."""

    def similarity(
        self, planes: Float32[Array, "L P D"], q: Float32[Array, "B K J D"], codes: UInt[Array, "B K L N"]
    ) -> Int32[Array, "B K J N"]:
        return agreeing_bits(hard_hash(q, planes), codes, self.bits)


@dataclasses.dataclass(frozen=True)
class AsymmetricSRP(SimHashIndex):
    """Signs of the key's projections times the query's projections, which are not rounded.

    Its mean over planes is ``sqrt(2 / pi) L P q . k / |k|``; it may be negative, and is then the lower the longer the
    value is.
    """

    def similarity(
        self, planes: Float32[Array, "L P D"], q: Float32[Array, "B K J D"], codes: UInt[Array, "B K L N"]
    ) -> Float32[Array, "B K J N"]:
        tables = jnp.matmul(project(q, planes), corners(self.bits).T, precision=jax.lax.Precision.HIGHEST)
        return lookup_sum(tables, codes)
