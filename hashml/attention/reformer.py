"""Reformer: attention within the buckets of a hash (Kitaev, Kaiser, Levskaya, ICLR 2020, arXiv 2001.04451).

Queries are the keys; the key of a token has length 1, its query its own length. In each of ``rounds``,

    bucket(x) = argmax [x R, -x R]                 R [D, buckets / 2] Gaussian
    sort tokens by (bucket, place), cut in chunks of ``C``; a chunk attends to itself and the one before it

with softmax at the scale ``1 / sqrt(D)``, and a token sees itself only where it sees nothing else. Rounds are
averaged by the weights that their sums of exponentials give; ``count_once`` divides a pair's by the rounds in which
it meets. The first chunk also sees the last one, as in the reference. Causality is by the tokens' own places. It is
exact for what a token reads, but *which* earlier tokens share its chunk depends on how many later ones fill the
buckets below.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key

from hashml.attention.multi_head import HashedAttention

AnyArray = Array | np.ndarray

_HIDDEN, _SELF = -1e30, -5e4
"""Logits of what a token may not see, and of itself."""


def reformer_rotations(
    key: Key[Array, ""], rounds: int, features: int, buckets: int
) -> Float32[Array, "rounds features half"]:
    """``R`` of each round.

    Raises:
        ValueError: for sizes below 1, or an odd number of buckets.
    """
    for name, size in (("rounds", rounds), ("features", features), ("buckets", buckets)):
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    if buckets % 2:
        raise ValueError(f"buckets is {buckets}; it must be even")
    return jax.random.normal(key, (rounds, features, buckets // 2))


def reformer_attention(
    qk: Float[Array, "B H N D"],
    v: Float[Array, "B H N V"],
    rotations: Float[AnyArray, "rounds features half"],
    *,
    causal: bool = False,
    mask: Bool[Array, "B N"] | None = None,
    chunk: int = 64,
    same_bucket: bool = False,
    count_once: bool = False,
) -> Float[Array, "B H N V"]:
    """Attention of tokens over those of their buckets.

    Args:
        qk: queries, and before their length is taken keys.
        v: values.
        rotations: of `reformer_rotations`; they get no gradient. The paper has 8 rounds and N / 64 buckets.
        causal: token ``i`` sees the tokens ``0 .. i`` alone.
        mask: tokens that exist, as keys. A token that sees none gets zeros.
        chunk: C, which must divide N.
        same_bucket: hide what shares the chunk and not the bucket.
        count_once: see the module.

    Raises:
        ValueError: for a chunk that does not divide N, or rotations of another width.
    """
    batch, heads, length, width = qk.shape
    if chunk < 1 or length % chunk:
        raise ValueError(f"chunk is {chunk}; it must divide the {length} tokens")
    if rotations.shape[1] != width:
        raise ValueError(f"rotations have width {rotations.shape[1]} and qk {width}; they must be the same")
    x = qk.astype(jnp.float32)
    buckets = _buckets(x, jax.lax.stop_gradient(jnp.asarray(rotations, jnp.float32)))
    order = jnp.argsort(buckets, axis=-1, stable=True)
    back = jnp.argsort(order, axis=-1)
    exists = jnp.ones((batch, length), bool) if mask is None else mask
    exists = jnp.broadcast_to(exists[:, None], (batch, heads, length))
    # What tells in every round whether two tokens meet: the chunk, and the bucket where it matters.
    meeting = (back // chunk, buckets) if count_once else None

    def one(places: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        order, back, bucket = places
        out, log_mass = _round(x, v, order, bucket, exists, meeting, causal, chunk, same_bucket)
        return jnp.take_along_axis(out, back[..., None], axis=2), jnp.take_along_axis(log_mass, back, axis=2)

    # A round's matrices are computed again in the backward pass.
    outs, log_masses = jax.lax.map(jax.checkpoint(one), (order, back, buckets))
    weights = jax.nn.softmax(log_masses, axis=0)
    return jnp.einsum("rbhn,rbhnv->bhnv", weights, outs).astype(v.dtype)


def _buckets(x: Array, rotations: Array) -> Array:
    """``[rounds, B, H, N]``."""
    turned = jnp.einsum("bhnd,rde->rbhne", jax.lax.stop_gradient(x), rotations, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(jnp.concatenate([turned, -turned], axis=-1), axis=-1)


def _with_previous(x: Array) -> Array:
    """``[B, H, n, C, ...]`` with the chunk before each, ``[B, H, n, 2 C, ...]``; one chunk stays alone."""
    return x if x.shape[2] == 1 else jnp.concatenate([jnp.roll(x, 1, axis=2), x], axis=3)


def _round(
    x: Array,
    v: Array,
    order: Array,
    bucket: Array,
    exists: Array,
    meeting: tuple[Array, Array] | None,
    causal: bool,
    chunk: int,
    same_bucket: bool,
) -> tuple[Array, Array]:
    """The output and the log of the sum of exponentials of one round, in its order."""

    def chunked(a: Array) -> Array:
        index = order if a.ndim == 3 else order[..., None]
        a = jnp.take_along_axis(a, index, axis=2)
        return a.reshape(*a.shape[:2], -1, chunk, *a.shape[3:])

    places = jnp.broadcast_to(jnp.arange(x.shape[2]), x.shape[:3])
    queries, values, place, exists, bucket = (chunked(a) for a in (x, v.astype(jnp.float32), places, exists, bucket))
    length = jnp.sum(queries * queries, axis=-1, keepdims=True)
    keys = _with_previous(queries * jax.lax.rsqrt(jnp.maximum(length, 1e-24)))
    logits = jnp.einsum("bhncd,bhned->bhnce", queries, keys) / math.sqrt(x.shape[-1])

    def pairs(a: Array) -> tuple[Array, Array]:
        return a[..., :, None], _with_previous(a)[..., None, :]

    asks, answers = pairs(place)
    seen = _with_previous(exists)[..., None, :]
    if causal:
        seen &= asks >= answers
    if same_bucket:
        mine, theirs = pairs(bucket)
        seen &= mine == theirs
    if meeting is not None:
        logits = logits - jnp.log(_rounds_met(meeting, chunked, pairs, same_bucket, place.shape[2]))
    logits = jnp.where(asks == answers, _SELF, logits)
    logits = jnp.where(seen, logits, _HIDDEN)
    log_mass = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(logits - log_mass), 0)
    out = jnp.einsum("bhnce,bhnev->bhncv", weights, _with_previous(values))
    return out.reshape(*x.shape[:3], -1), log_mass.reshape(x.shape[:3])


def _rounds_met(
    meeting: tuple[Array, Array],
    chunked: Callable[[Array], Array],
    pairs: Callable[[Array], tuple[Array, Array]],
    same_bucket: bool,
    chunks: int,
) -> Array:
    """In how many rounds each pair of this one meets, at least 1."""
    total = jnp.float32(0)
    for chunk_of, bucket_of in zip(*meeting, strict=True):
        mine, theirs = pairs(chunked(chunk_of))
        met = (mine == theirs) | ((mine - 1) % chunks == theirs)
        if same_bucket:
            own, other = pairs(chunked(bucket_of))
            met &= own == other
        total = total + met
    return jnp.maximum(total, 1)


class ReformerAttention(HashedAttention, kw_only=True):
    """`HashedAttention` by Reformer, which projects queries and values, and has no keys of its own.

    Attributes:
        rounds: hash functions.
        chunk: C; it must divide the length, and so must 2 C where ``buckets`` is not given.
        buckets: an even number; by default N / C.
        same_bucket, count_once: as in `reformer_attention`.
        seed: picks the rotations.

    Raises:
        ValueError: as `reformer_attention` and `reformer_rotations`; for keys of their own.
    """

    share_qk: bool = True
    rounds: int = 8
    chunk: int = 64
    buckets: int | None = None
    same_bucket: bool = False
    count_once: bool = False
    seed: int = 0

    def attend(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        del k
        length = q.shape[2]
        if self.buckets is None and (self.chunk < 1 or length % (2 * self.chunk)):
            raise ValueError(f"chunk is {self.chunk}; twice it must divide the {length} tokens, or buckets be given")
        buckets = length // self.chunk if self.buckets is None else self.buckets
        rotations = reformer_rotations(jax.random.key(self.seed), self.rounds, q.shape[-1], buckets)
        v = jnp.repeat(v, q.shape[1] // v.shape[1], axis=1)
        how = {"chunk": self.chunk, "same_bucket": self.same_bucket, "count_once": self.count_once}
        return reformer_attention(q, v, rotations, causal=self.causal, mask=mask, **how)
