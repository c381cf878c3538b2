"""`race_attention`: checks, choice of a backend, gradient."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array, Float
from hashml_kernels.manual_axes import varying_alike
from hashml_kernels.race_attention import pallas_mosaic_tpu, pallas_triton, reference, xla
from hashml_kernels.race_attention.features import Gradients, Operands, Results

Implementation = Literal["auto", "reference", "xla", "pallas_triton", "pallas_mosaic_tpu"]

AnyArray = Array | np.ndarray
"""What the public functions take: JAX arrays, or NumPy arrays."""

_BACKENDS: dict[str, Any] = {
    "reference": reference,
    "xla": xla,
    "pallas_triton": pallas_triton,
    "pallas_mosaic_tpu": pallas_mosaic_tpu,
}
_MOST_BITS = 16


def race_attention(
    q: Float[AnyArray, "B H T D"],
    k: Float[AnyArray, "B K N D"],
    v: Float[AnyArray, "B K N V"],
    planes: Float[AnyArray, "L P D"],
    beta: Float[AnyArray, ""] | float | int = 1.0,
    *,
    causal: bool = False,
    mask: AnyArray | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B H T V"]:
    """Attention with the soft-collision kernel of L SimHash tables of ``2**P`` buckets, linear in T + N.

        phi(x)[l, r] = prod_p sigmoid(2 beta c[r, p] tanh(planes[l, p] . x)) + 1e-15
        out[i] = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j)

    where ``j`` runs over all keys of the mask, or with ``causal`` over those up to ``i``. Neither the weights nor the
    features of the whole sequence exist at any time, backward neither. There are gradients of q, k, v and beta; the
    planes have none.

    Args:
        q, k, v: any float dtypes; query head ``h`` reads key head ``h // (H / K)``.
        planes: normals of the hyperplanes, used in float32.
        beta: inverse temperature.
        causal: query ``i`` sees the keys ``0 .. i``.
        mask: bool ``[B, N]``, keys that exist. A query that sees none gets zeros.
        implementation: ``"auto"`` picks the platform's kernel where it serves the problem, else XLA. A
            kernel asked for by name is interpreted on a CPU, slowly: that is for tests.

    Returns:
        The result in the dtype of ``v``; sums are float32.

    Raises:
        TypeError: for arrays of other dtypes.
        ValueError: for shapes that do not fit, naming them.
        NotImplementedError: where an ``implementation`` asked for by name does not serve the problem.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; it must be one of {get_args(Implementation)}")
    operands = _operands(q, k, v, planes, beta, mask, causal)
    operands, _ = varying_alike(*operands)
    out: Any = _attend(*operands, causal, implementation)
    return out.reshape(*q.shape[:3], v.shape[3])


def serves(
    implementation: Literal["pallas_triton", "pallas_mosaic_tpu"],
    q: Any,
    k: Any,
    v: Any,
    planes: Any,
    *,
    causal: bool = False,
) -> bool:
    """Whether a kernel takes arrays of these shapes and dtypes, forward and backward."""
    operands = jax.eval_shape(lambda q, k, v, planes: _operands(q, k, v, planes, 1.0, None, causal), q, k, v, planes)
    try:
        _BACKENDS[implementation].check(operands, causal)
    except NotImplementedError:
        return False
    return True


def _operands(q: Any, k: Any, v: Any, planes: Any, beta: Any, mask: Any, causal: bool) -> Operands:
    q, k, v, planes = (jnp.asarray(x) for x in (q, k, v, planes))
    for name, array, axes in (("q", q, 4), ("k", k, 4), ("v", v, 4), ("planes", planes, 3)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}; it must be a float type")
        if array.ndim != axes:
            raise ValueError(f"{name} has shape {array.shape}; it must have {axes} axes")
    batch, heads, length, width = q.shape
    kv_heads, keys = k.shape[1:3]
    if k.shape != (batch, kv_heads, keys, width):
        raise ValueError(f"k has shape {k.shape} and q {q.shape}; their first and last axes must agree")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {v.shape} and k {k.shape}; their first three axes must agree")
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k {kv_heads}; the heads of k must divide those of q")
    if causal and length != keys:
        raise ValueError(f"q has {length} tokens and k {keys}; with causal=True they must be as many")
    tables, bits, _ = planes.shape
    if planes.shape[2] != width:
        raise ValueError(f"planes has shape {planes.shape} and q {q.shape}; their last axes must agree")
    if not tables or not 1 <= bits <= _MOST_BITS:
        raise ValueError(f"planes has shape {planes.shape}; it needs a table, and 1 to {_MOST_BITS} planes in each")
    beta = jnp.asarray(beta, jnp.float32)
    if beta.shape:
        raise ValueError(f"beta has shape {beta.shape}; it must be a scalar")
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.shape != (batch, keys) or mask.dtype != jnp.bool_:
            raise ValueError(f"mask is {mask.dtype}{list(mask.shape)}; it must be bool[{batch}, {keys}]")
        mask = mask.astype(jnp.float32)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, length, width)
    return Operands(grouped, k, v, mask, planes.astype(jnp.float32), beta)


# --- gradient -------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q, k, v, keep, planes, beta, causal: bool, implementation: Implementation) -> Any:
    return _dispatch("forward", causal, implementation, Operands(q, k, v, keep, planes, beta)).out


def _attend_forward(q, k, v, keep, planes, beta, causal: bool, implementation: Implementation):
    operands = Operands(q, k, v, keep, planes, beta)
    results = Results(*_dispatch("forward", causal, implementation, operands))
    return results.out, (operands, results)


def _attend_backward(causal: bool, implementation: Implementation, saved, gradient):
    found = Gradients(*_dispatch("backward", causal, implementation, *saved, gradient))
    return found.q, found.k, found.v, None, None, found.beta


_attend.defvjp(_attend_forward, _attend_backward)


# --- the choice of a backend ----------------------------------------------------------------------


def _dispatch(direction: str, causal: bool, implementation: Implementation, operands: Operands, *more: Any) -> Any:
    """``forward(operands, causal)``, or ``backward(operands, results, gradient, causal)``, of a backend."""

    def through(backend, **options):
        return lambda operands, *more: getattr(backend, direction)(operands, *more, causal, **options)

    def served(backend):
        """The backend's kernels, or XLA where it says that it does not serve these operands."""
        try:
            backend.check(operands, causal)
        except NotImplementedError:
            return through(xla)
        return through(backend)

    match implementation:
        case "auto":
            return jax.lax.platform_dependent(
                operands, *more, cuda=served(pallas_triton), tpu=served(pallas_mosaic_tpu), default=through(xla)
            )
        case "reference" | "xla":
            return through(_BACKENDS[implementation])(operands, *more)
        case _:
            backend = _BACKENDS[implementation]
            backend.check(operands, causal)
            return jax.lax.platform_dependent(
                operands, *more, cpu=through(backend, interpret=True), default=through(backend)
            )
