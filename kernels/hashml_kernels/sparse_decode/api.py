"""`sparse_decode`: checks, choice of a backend, derivatives, and the division at the end."""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array, Float, Int
from hashml_kernels.sparse_decode import pallas_mosaic_tpu, pallas_triton, reference, xla
from hashml_kernels.sparse_decode.lists import Operands, Partial, finish

Implementation = Literal["auto", "reference", "xla", "pallas_triton", "pallas_mosaic_tpu"]

AnyArray = Array | np.ndarray
"""What the public function takes: JAX arrays, or NumPy arrays."""

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}


def sparse_decode(
    q: Float[AnyArray, "B H D"],
    k: Float[AnyArray, "B K N D"],
    v: Float[AnyArray, "B K N V"],
    idx: Int[AnyArray, "B S M"],
    valid: AnyArray,
    weight: AnyArray,
    *,
    scale: float | int | None = None,
    page: int = 1,
    length: Int[AnyArray, " B"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B H V"]:
    """``sum_i w_i exp(scale q . k_i) v_i / sum_i w_i exp(scale q . k_i)`` over the slots that a list names.

    An entry does not count where it is not valid, where its index is out of range, or where its weight is not above
    0; what lies in rows that do not count has no effect. An index that stands twice counts twice. A list in which
    nothing counts gives zeros. Sums are float32. Kernels have no backward pass of their own: derivatives are those
    of XLA's path.

    Args:
        q: queries; head ``h`` reads key head ``h // (H / K)`` and list ``h // (H / S)``.
        k, v: keys and values of N slots, any float dtype.
        idx: slots; with ``page`` above 1 numbers of pages, slots ``page i .. page i + page - 1``, of which the last
            page may have fewer.
        valid, weight: bool and float ``[B, S, M]``; a page's count for all of its slots.
        scale: of the logits; None: ``1 / sqrt(D)``.
        page: slots that an entry names.
        length: slots from here on do not count; None: all N do.
        implementation: ``"auto"`` picks the platform's kernel where it serves the problem, else XLA. A
            kernel asked for by name is interpreted on a CPU, slowly: that is for tests.

    Returns:
        The attention's result, in the dtype of ``v``.

    Raises:
        TypeError: for arrays of other dtypes.
        ValueError: for shapes that do not fit, naming them.
        NotImplementedError: where an ``implementation`` asked for by name does not serve the problem.
    """
    q, k, v, idx, valid, weight = (jnp.asarray(x) for x in (q, k, v, idx, valid, weight))
    _check_types(q, k, v, idx, valid, weight)
    if page < 1:
        raise ValueError(f"page is {page}; it must be at least 1")
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; it must be one of {get_args(Implementation)}")
    batch, heads, width = q.shape
    lists = idx.shape[1]
    slots = k.shape[2]
    if length is None:
        length = np.full(batch, slots, np.int32)
    length = jnp.asarray(length)
    if length.shape != (batch,) or not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(f"length is {length.dtype}{list(length.shape)}; it must be integers [{batch}], one a row")
    operands = Operands(
        q=q.reshape(batch, lists, heads // lists, width),
        k=k,
        v=v,
        idx=idx.astype(jnp.int32),
        valid=valid,
        weight=weight.astype(jnp.float32),
        length=length.astype(jnp.int32),
    )
    static = {"page": page, "scale": float(1 / math.sqrt(width) if scale is None else scale)}
    if implementation == "reference":
        found = reference.partial(operands, **static)
    else:
        found = _dispatch(operands, static, implementation)
    return finish(found).astype(v.dtype).reshape(batch, heads, -1)


def _check_types(q: Array, k: Array, v: Array, idx: Array, valid: Array, weight: Array) -> None:
    for name, array in (("q", q), ("k", k), ("v", v), ("weight", weight)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}; it must be a float type")
    if not jnp.issubdtype(idx.dtype, jnp.integer):
        raise TypeError(f"idx has dtype {idx.dtype}; it must be an integer type")
    if valid.dtype != jnp.bool_:
        raise TypeError(f"valid has dtype {valid.dtype}; it must be bool")
    batch, heads, width = q.shape
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"k has shape {k.shape}; it must be [{batch}, key heads, slots, {width}]")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {v.shape}; it must be {[*k.shape[:3]]} and a width")
    if not k.shape[2]:
        raise ValueError(f"k has shape {k.shape}; there must be at least one slot")
    lists, keys = idx.shape[1], k.shape[1]
    if keys < 1 or lists < 1 or lists % keys or heads % lists:
        raise ValueError(
            f"idx has lists for {lists} heads; with {heads} query heads and {keys} key heads, allowed are {keys} "
            f"(shared by a group), {heads}, or a multiple of the first that divides the second"
        )
    for name, array in (("idx", idx), ("valid", valid), ("weight", weight)):
        if array.shape != (batch, *idx.shape[1:]):
            raise ValueError(f"{name} has shape {array.shape}; it must be {(batch, *idx.shape[1:])}")


def _dispatch(operands: Operands, static: dict[str, Any], implementation: Implementation) -> Partial:
    def through(backend, **options):
        return lambda *operands: backend.partial(Operands(*operands), **static, **options)

    plain = through(xla)

    def kernel(backend, **options):
        """The backend's kernel, with XLA's derivatives, and a batch of calls as one call."""
        run = jax.custom_batching.custom_vmap(through(backend, **options))

        @run.def_vmap
        def _(size, batched, *operands):
            longer = [
                (x if own else jnp.broadcast_to(x, (size, *x.shape))).reshape(-1, *x.shape[1 + own :])
                for x, own in zip(operands, batched, strict=True)
            ]
            left = implementation == "auto" and not serves(backend, Operands(*longer))
            found = plain(*longer) if left else run(*longer)
            return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), found), jax.tree.map(
                lambda _: True, found
            )

        call = jax.custom_jvp(run)

        @call.defjvp
        def _(operands, tangents):
            return call(*operands), jax.jvp(plain, operands, tangents)[1]

        return call

    def serves(backend, operands: Operands) -> bool:
        try:
            backend.check(operands, page=static["page"])
        except NotImplementedError:
            return False
        return True

    def served(backend):
        return kernel(backend) if serves(backend, operands) else plain

    match implementation:
        case "auto":
            return jax.lax.platform_dependent(
                *operands, cuda=served(pallas_triton), tpu=served(pallas_mosaic_tpu), default=plain
            )
        case "xla":
            return plain(*operands)
        case _:
            backend = _KERNELS[implementation]
            backend.check(operands, page=static["page"])
            return jax.lax.platform_dependent(*operands, cpu=kernel(backend, interpret=True), default=kernel(backend))
