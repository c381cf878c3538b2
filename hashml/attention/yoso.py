"""YOSO: attention by Bernoulli draws that hash tables make (Zeng et al., ICML 2021, arXiv 2111.09714).

Queries and keys are brought to length 1, and in each of ``m`` rounds a query sums the values of its bucket of
``tau``-bit SimHash:

    y_i = (1 / m) sum_rounds sum_j [h(q_i) = h(k_j)] v_j,     E y_i = sum_j (1 - angle(q_i, k_j) / pi)**tau v_j
    out_i = y_i / |y_i|

The gradient is that of the collisions ``B`` with another slope, since the true one is infinite at angle 0:

    d_v = B' g,     d_q_i = sum_j (g_i . v_j) B_ij (tau / 2) k_j,     d_k_j = sum_i (g_i . v_j) B_ij (tau / 2) q_i

here with the expected ``B`` (`yoso_expected`, "YOSO-E": quadratic, the oracle) or with that of the same rounds, by
tables ``[2**tau, V D]``, linear in the length. A depthwise convolution of ``v`` beside it is left out. Not causal.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hashml.attention.multi_head import HashedAttention
from hashml.hashing.simhash import MAX_SOFT_BITS, hard_hash, srp_planes

AnyArray = Array | np.ndarray


def yoso_attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    planes: Float[AnyArray, "m tau features"],
    *,
    mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B H T V"]:
    """Attention by ``m`` rounds of hashing, rows of length 1 (0 where no key was met).

    Args:
        q, k, v: queries, keys and values.
        planes: of `hashml.hashing.srp_planes`: m rounds (32) of tau bits (9 to 12). They get no gradient.
        mask: keys that exist.

    Raises:
        ValueError: as `hard_hash`; for more than 16 bits, or heads that the key heads do not divide.
    """
    _check(q, k)
    if planes.shape[1] > MAX_SOFT_BITS:
        raise ValueError(f"planes has {planes.shape[1]} bits a table; a table has 2**bits rows, of at most 16 bits")
    planes = jax.lax.stop_gradient(jnp.asarray(planes, jnp.float32))
    return _finish(_sampled(*_start(q, k, v, mask), planes), v)


def yoso_expected(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    bits: int,
    *,
    mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B H T V"]:
    """What infinitely many rounds of ``tau = bits`` bits give, in time T N, with the same gradient.

    Raises:
        ValueError: for bits below 1, or heads that the key heads do not divide.
    """
    _check(q, k)
    if bits < 1:
        raise ValueError(f"bits is {bits}; it must be at least 1")
    return _finish(_expected(bits, *_start(q, k, v, mask)), v)


def _check(q: Array, k: Array) -> None:
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k {k.shape[1]}; the heads of k must divide those of q")


def _start(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """Rows of length 1 by head, and no value where there is no key."""
    group = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x.astype(jnp.float32), group, axis=1) for x in (k, v))
    if mask is not None:
        v = jnp.where(mask[:, None, :, None], v, 0)
    return _unit(q.astype(jnp.float32)), _unit(k), v


def _finish(y: Array, v: Array) -> Array:
    return _unit(y).astype(v.dtype)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def _collision_rate(q: Array, k: Array, bits: int) -> Array:
    cosines = jnp.einsum("bhtd,bhnd->bhtn", q, k, precision=jax.lax.Precision.HIGHEST)
    return (1 - jnp.arccos(jnp.clip(cosines, -1, 1)) / jnp.pi) ** bits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expected(bits: int, q: Array, k: Array, v: Array) -> Array:
    return _collision_rate(q, k, bits) @ v


def _expected_forward(bits: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple]:
    return _expected(bits, q, k, v), (q, k, v)


def _expected_backward(bits: int, saved: tuple, g: Array) -> tuple[Array, Array, Array]:
    q, k, v = saved
    rate = _collision_rate(q, k, bits)
    slope = jnp.einsum("bhtv,bhnv->bhtn", g, v) * rate * (bits / 2)
    return slope @ k, slope.swapaxes(-1, -2) @ q, rate.swapaxes(-1, -2) @ g


_expected.defvjp(_expected_forward, _expected_backward)


def _read_buckets(codes_to: Array, codes_from: Array, values: Array, buckets: int) -> Array:
    """For each of ``codes_to [T]`` the sum of ``values [N, V]`` with its code among ``codes_from [N]``."""
    return jax.ops.segment_sum(values, codes_from, buckets)[codes_to]


def _rounds(to: Array, source: Array, values: Array, planes: Array) -> Array:
    """The mean over rounds, one table alive at a time and head."""
    buckets = 2 ** planes.shape[1]
    by_head = jax.vmap(jax.vmap(functools.partial(_read_buckets, buckets=buckets)))

    def one(total: Array, plane: Array) -> tuple[Array, None]:
        codes_to, codes_from = (hard_hash(x, plane[None])[..., 0] for x in (to, source))
        return total + by_head(codes_to, codes_from, values), None

    start = jnp.zeros((*to.shape[:-1], values.shape[-1]))
    return jax.lax.scan(one, start, planes)[0] / planes.shape[0]


@jax.custom_vjp
def _sampled(q: Array, k: Array, v: Array, planes: Array) -> Array:
    return _rounds(q, k, v, planes)


def _sampled_forward(q: Array, k: Array, v: Array, planes: Array) -> tuple[Array, tuple]:
    return _rounds(q, k, v, planes), (q, k, v, planes)


def _sampled_backward(saved: tuple, g: Array) -> tuple[Array, Array, Array, Array]:
    q, k, v, planes = saved
    half = planes.shape[1] / 2

    def pairs(a: Array, b: Array) -> Array:
        return (a[..., :, None] * b[..., None, :]).reshape(*a.shape[:-1], -1)

    def against(a: Array, sums: Array) -> Array:
        return jnp.einsum("bhtv,bhtvd->bhtd", a, sums.reshape(*a.shape, -1)) * half

    d_q = against(g, _rounds(q, k, pairs(v, k), planes))
    d_k = against(v, _rounds(k, q, pairs(g, q), planes))
    return d_q, d_k, _rounds(k, q, g, planes), jnp.zeros_like(planes)


_sampled.defvjp(_sampled_forward, _sampled_backward)


class YosoAttention(HashedAttention, kw_only=True):
    """`HashedAttention` by YOSO; not causal.

    Attributes:
        rounds: m hash functions; 0 takes their expectation, in quadratic time.
        bits: tau, 9 to 12 in the paper.
        seed: picks the planes.

    Raises:
        ValueError: as `yoso_attention`; for causal=True.
    """

    rounds: int = 32
    bits: int = 9
    seed: int = 0

    def attend(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        if self.causal:
            raise ValueError("causal is True; a bucket of YOSO's sums all of its keys")
        if self.rounds == 0:
            return yoso_expected(q, k, v, self.bits, mask=mask)
        planes = srp_planes(jax.random.key(self.seed), self.rounds, self.bits, q.shape[-1])
        return yoso_attention(q, k, v, planes, mask=mask)
