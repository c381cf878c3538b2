"""RACE attention: hash tables sketch the kernel in softmax's place (Joshi et al., ICLR 2026, arXiv 2510.04008).

A token is spread over the buckets of ``L`` SimHash tables of ``P`` bits, and a query reads back what the keys left:

    phi(x) = soft_hash(x, planes, beta)                 [L, 2**P], each table sums to 1, the same planes for q and k
    out[i] = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j)

so that time is linear in the length, and the state is ``L 2**P (V + 1)`` floats a head. As ``beta`` grows the kernel
tends to the rate of collisions in the tables, whose mean is that of *angular attention*, ``(1 - angle / pi)**P``.
``normalization="per_bucket"`` is the released causal code: each bucket's mean value, summed over the ``L`` tables
and not averaged, so that it is ``L`` times a weighted mean. ``beta`` is trained; the planes never are.

On a GPU or TPU `hashml_kernels.race_attention` computes it, where it serves.

Departures: ``phi`` has a floor of 1e-15 (lost in rounding but for beta above 5, where a query whose buckets hold no
key gets the mean of the values instead of 0 / 0). There are no weights to drop: dropout falls on the heads' outputs.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hashml.attention.linear_core import CHUNK, TILE, feature_attention
from hashml.attention.linear_state import LinearState, Normalization, init_state
from hashml.attention.multi_head import HashedAttention
from hashml.hashing.simhash import soft_hash, srp_planes
from hashml_kernels import race_attention as kernels

AnyArray = Array | np.ndarray

BETA_RANGE = (1e-2, 20.0)
"""Where `RaceAttention` keeps its inverse temperature."""

BUCKET_EPSILON = 1e-6
"""What the released code adds to the mass of a bucket."""

_FLOOR = 1e-15


def race_features(
    planes: Float[AnyArray, "L P features"], beta: Float[AnyArray, ""] | float | int, x: Float[AnyArray, "*n D"]
) -> Float[Array, "*n S"]:
    """``phi``: the soft tables of each token, side by side; the planes get no gradient.

    Raises:
        ValueError: as `soft_hash`.
    """
    tables = soft_hash(x, jax.lax.stop_gradient(jnp.asarray(planes)), beta)
    return tables.reshape(*tables.shape[:-2], -1) + _FLOOR


def _features(params: tuple[Array, Array], x: Array) -> Array:
    return race_features(*params, x)


def race_attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    planes: Float[AnyArray, "L P features"],
    beta: Float[AnyArray, ""] | float | int = 1.0,
    *,
    causal: bool = False,
    normalization: Normalization = "global",
    mask: Bool[Array, "B N"] | None = None,
    tile: int = TILE,
    chunk: int = CHUNK,
    axis_name: str | None = None,
    implementation: kernels.Implementation = "auto",
) -> Float[Array, "B H T V"]:
    """Attention with the soft-collision kernel, linear in T + N. Keys and queries are not normalised.

    Args:
        q, k, v: queries, keys and values; query head ``h`` reads key head ``h // (H / K)``.
        planes: of `hashml.hashing.srp_planes`, for all heads.
        beta: inverse temperature; it gets a gradient, the planes do not.
        causal: query ``i`` sees the keys ``0 .. i``, itself included.
        normalization: ``"global"``, the paper's, or ``"per_bucket"``.
        mask: keys that exist. A query that sees none gets zeros.
        tile, chunk: sizes of the passes; they change rounding alone.
        axis_name: an axis of the mesh over which `jax.shard_map` split the sequence, in order.
        implementation: ``"auto"`` takes the platform's kernel where there is one that serves, with global
            normalisation and the sequence on one device, else the passes of `feature_attention`; any other is that of
            `hashml_kernels.race_attention`.

    Raises:
        ValueError: as `feature_attention` and `soft_hash`.
        NotImplementedError: where an ``implementation`` asked for by name does not serve the problem.
    """
    whole = normalization == "global" and axis_name is None
    if implementation != "auto" and not whole:
        raise NotImplementedError(
            f"implementation is {implementation!r} with normalization={normalization!r} and axis_name={axis_name!r}; "
            f"it takes 'global' and None, and 'auto' takes all"
        )
    if implementation != "auto" or (whole and _kernel_serves(q, k, v, planes, causal)):
        return kernels.race_attention(q, k, v, planes, beta, causal=causal, mask=mask, implementation=implementation)
    out, _ = race_extend(
        None,
        q,
        k,
        v,
        planes,
        beta,
        causal=causal,
        normalization=normalization,
        mask=mask,
        tile=tile,
        chunk=chunk,
        axis_name=axis_name,
    )
    return out


def _kernel_serves(q: Array, k: Array, v: Array, planes: AnyArray, causal: bool) -> bool:
    """Whether this machine's default device has a kernel for these operands."""
    match jax.default_backend():
        case "gpu":
            return kernels.serves("pallas_triton", q, k, v, planes, causal=causal)
        case "tpu":
            return kernels.serves("pallas_mosaic_tpu", q, k, v, planes, causal=causal)
        case _:
            return False


def race_extend(
    state: LinearState | None,
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    planes: Float[AnyArray, "L P features"],
    beta: Float[AnyArray, ""] | float | int = 1.0,
    *,
    causal: bool = True,
    normalization: Normalization = "global",
    mask: Bool[Array, "B N"] | None = None,
    tile: int = TILE,
    chunk: int = CHUNK,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B H T V"], LinearState]:
    """`race_attention` after the keys of ``state``, and the state with these: a prompt, a part of it, or a step.

    Decoding costs ``O(L 2**P V)`` a token and head, whatever came before. `race_state` makes an empty state.
    """
    return feature_attention(
        q,
        k,
        v,
        features=_features,
        params=(jnp.asarray(planes, jnp.float32), jnp.asarray(beta, jnp.float32)),
        causal=causal,
        mask=mask,
        state=state,
        normalization=normalization,
        epsilon=BUCKET_EPSILON if normalization == "per_bucket" else 0.0,
        tile=tile,
        chunk=chunk,
        axis_name=axis_name,
    )


def race_state(batch: int, heads: int, planes: Float[AnyArray, "L P features"], width: int) -> LinearState:
    """The state of no key, for ``heads`` key heads and values of ``width`` coordinates."""
    tables, bits, _ = planes.shape
    return init_state(batch, heads, tables * 2**bits, width)


def angular_attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N V"],
    power: float | int,
    *,
    causal: bool = False,
    mask: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B H T V"]:
    """What RACE sketches, exactly and in time T N: weights ``(1 - angle(q, k) / pi)**power``; for RACE's, power = P.

    Cosines are kept 1e-6 from -1 and 1, where the slope of arccos is infinite (the reference: 1e-3, and adds 1e-6
    to each sum of weights). A query that sees no key gets zeros.

    Raises:
        ValueError: for a power that is not positive, heads that the key heads do not divide, or causal queries that
            are not as many as the keys.
    """
    batch, heads, length, _ = q.shape
    if not 0 < power < math.inf:
        raise ValueError(f"power is {power}; it must be positive and finite")
    if heads % k.shape[1]:
        raise ValueError(f"q has {heads} heads and k {k.shape[1]}; the heads of k must divide those of q")
    if causal and length != k.shape[2]:
        raise ValueError(f"q has {length} tokens and k {k.shape[2]}; with causal=True they must be as many")
    unit_q, unit_k = (_unit(x.astype(jnp.float32)) for x in (q, k))
    unit_q = unit_q.reshape(batch, k.shape[1], -1, *unit_q.shape[2:])
    cosines = jnp.einsum("bkgtd,bknd->bkgtn", unit_q, unit_k, precision=jax.lax.Precision.HIGHEST)
    angles = jnp.arccos(jnp.clip(cosines, -1 + 1e-6, 1 - 1e-6))
    weights = (1 - angles / jnp.pi) ** power
    if mask is not None:
        weights = jnp.where(mask[:, None, None, None, :], weights, 0)
    if causal:
        weights = jnp.tril(weights)
    mass = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bkgtn,bknv->bkgtv", weights, v.astype(jnp.float32)) / jnp.where(mass > 0, mass, 1)
    return out.reshape(batch, heads, length, -1).astype(v.dtype)


def _unit(x: Array) -> Array:
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-30))


class RaceAttention(HashedAttention, kw_only=True):
    """`flax.linen.MultiHeadDotProductAttention` by RACE: ``RaceAttention(num_heads=8, tables=4, bits=4)(x)``.

    The planes are a function of ``seed`` and of no variable, so that saved parameters are all that a model needs;
    modules of one seed and head width share them. With ``decode`` the state lies in the collection ``cache``:
    initialise with inputs of the batch's size, then apply with ``mutable=["cache"]`` to the next tokens, one or many.

    Attributes:
        tables, bits: L tables of 2**P buckets; the paper has (2, 2), (3, 3) and (4, 4).
        normalization: ``"global"`` or ``"per_bucket"``.
        beta: inverse temperature at initialisation, in 1e-2 .. 20; the causal models of the reference keep it
            at ``1 / sqrt(D)``.
        trainable_beta: whether ``log_beta`` is a parameter, one a module, or ``beta`` stays.
        decode: whether each call continues the sequence of the calls before.
        seed: picks the planes.
        tile, chunk: as in `race_attention`.

    Raises:
        ValueError: as `HashedAttention` and `race_attention`; for a beta outside its range, or decode without causal.
    """

    tables: int = 4
    bits: int = 4
    normalization: Normalization = "global"
    beta: float | int = 1.0
    trainable_beta: bool = True
    decode: bool = False
    seed: int = 0
    tile: int = TILE
    chunk: int = CHUNK

    def attend(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        low, high = BETA_RANGE
        if not low <= self.beta <= high:
            raise ValueError(f"beta is {self.beta}; it must lie in {low}..{high}")
        if self.decode and not self.causal:
            raise ValueError("decode is True and causal is False; a decoder's queries see no later keys")
        beta: float | int | Array = self.beta
        if self.trainable_beta:
            log_beta = self.param("log_beta", nn.initializers.constant(math.log(self.beta)), (), jnp.float32)
            beta = jnp.clip(jnp.exp(log_beta), low, high)
        planes = srp_planes(jax.random.key(self.seed), self.tables, self.bits, q.shape[-1])
        state, cache = None, None
        if self.decode:
            continues = self.has_variable("cache", "state")
            empty = race_state(k.shape[0], k.shape[1], planes, v.shape[-1])
            cache = self.variable("cache", "state", lambda: empty)
            state = cache.value if continues else empty
        out, state = race_extend(
            state,
            q,
            k,
            v,
            planes,
            beta,
            causal=self.causal,
            normalization=self.normalization,
            mask=mask,
            tile=self.tile,
            chunk=self.chunk,
        )
        if cache is not None and not self.is_initializing():
            cache.value = state
        return out
