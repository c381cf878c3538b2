"""`soft_collision_score`: checks, choice of a backend, and derivatives."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array, Float
from hashml_kernels.soft_collision_score import pallas_mosaic_tpu, pallas_triton, reference, xla
from hashml_kernels.soft_collision_score.operands import Operands, Scores

Implementation = Literal["auto", "reference", "xla", "pallas_triton", "pallas_mosaic_tpu"]

AnyArray = Array | np.ndarray
"""What the public functions take: JAX arrays, or NumPy arrays."""

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}
_BITS = {"uint8": 8, "uint16": 16}


def soft_collision_score(
    codes: AnyArray,
    norms: Float[AnyArray, "B K N"] | None,
    logits: Float[AnyArray, "B H L P"],
    *,
    threshold: Float[AnyArray, "B H"] | None = None,
    block: int = 256,
    implementation: Implementation = "auto",
) -> Scores:
    """``norm sum_l prod_p sigmoid(+- logit[l, p])`` of every slot, + where bit p of its code in table l is set.

    The product is the soft table's entry for the code: the softmax over all codes of ``sum_p +- logit[p] / 2``. No
    array has an entry for every table and slot. It is made for decoding: kernels have no backward pass of their own,
    derivatives are those of XLA's path.

    Args:
        codes: uint8 or uint16 ``[B, K, L, N]``; bit ``P - 1 - p`` is of plane p, bits above do not matter.
        norms: lengths of the values, to whatever power they count, finite; None: 1 everywhere. A slot whose norm is
            below 0 is left out: that is how empty slots, or those chosen already, keep out of ``highest``.
        logits: of query head ``h``, which reads key head ``h // (H / K)``: ``2 beta tanh(w . q)``.
        threshold: a score below it becomes ``-inf``; one a query head; None: none does.
        block: slots of a block of ``highest`` and ``survivors``.
        implementation: ``"auto"`` picks the platform's kernel where it serves the problem, else XLA. A kernel asked
            for by name is interpreted on a CPU, slowly: that is for tests.

    Raises:
        TypeError: for arrays of other dtypes.
        ValueError: for shapes that do not fit, naming them, and more bits than the codes hold.
        NotImplementedError: where an ``implementation`` asked for by name does not serve the problem.
    """
    codes, logits = jnp.asarray(codes), jnp.asarray(logits)
    norms, threshold = (None if x is None else jnp.asarray(x) for x in (norms, threshold))
    if codes.dtype.name not in _BITS:
        raise TypeError(f"codes has dtype {codes.dtype}; it must be one of {tuple(_BITS)}")
    for name, array in (("norms", norms), ("logits", logits), ("threshold", threshold)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}; it must be a float type")
    if codes.ndim != 4 or 0 in codes.shape[1:3]:
        raise ValueError(f"codes has shape {codes.shape}; it must be [B, K, L, N], with heads and tables")
    batch, heads, tables, slots = codes.shape
    if logits.ndim != 4 or logits.shape[0] != batch or logits.shape[2] != tables or not logits.shape[3]:
        raise ValueError(f"logits has shape {logits.shape}; it must be [{batch}, H, {tables}, P]")
    query_heads, bits = logits.shape[1], logits.shape[3]
    if query_heads % heads or not query_heads:
        raise ValueError(f"logits has {query_heads} heads; they must be a multiple of the {heads} key heads")
    if bits > _BITS[codes.dtype.name]:
        raise ValueError(
            f"logits has {bits} bits a table; codes of {codes.dtype} hold at most {_BITS[codes.dtype.name]}"
        )
    if norms is not None and norms.shape != (batch, heads, slots):
        raise ValueError(f"norms has shape {norms.shape}; it must be {(batch, heads, slots)}")
    if threshold is not None and threshold.shape != (batch, query_heads):
        raise ValueError(f"threshold has shape {threshold.shape}; it must be {(batch, query_heads)}")
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; it must be one of {get_args(Implementation)}")

    if threshold is None:
        threshold = jnp.full((batch, query_heads), -jnp.inf)
    group = (batch, heads, query_heads // heads)
    operands = Operands(
        codes=codes,
        norms=norms,
        logits=logits.astype(jnp.float32).reshape(*group, tables, bits),
        threshold=threshold.astype(jnp.float32).reshape(group),
    )
    return _dispatch(operands, block, implementation)


def _dispatch(operands: Operands, block: int, implementation: Implementation) -> Scores:
    def through(backend: Any, **options: Any):
        def scores(*operands: Any) -> Scores:
            return backend.scores(Operands(*operands), block, **options)

        if backend in (xla, reference):
            return scores
        scores = jax.custom_jvp(scores)
        scores.defjvp(lambda operands, moved: jax.jvp(through(xla), operands, moved))
        return scores

    def served(backend: Any):
        """The backend's kernel, or XLA where it says that it does not serve these operands."""
        try:
            backend.check(operands, block)
        except NotImplementedError:
            return through(xla)
        return through(backend)

    match implementation:
        case "auto":
            return jax.lax.platform_dependent(
                *operands, cuda=served(pallas_triton), tpu=served(pallas_mosaic_tpu), default=through(xla)
            )
        case "xla":
            return through(xla)(*operands)
        case "reference":
            return through(reference)(*operands)
        case _:
            backend = _KERNELS[implementation]
            backend.check(operands, block)
            return jax.lax.platform_dependent(
                *operands, cpu=through(backend, interpret=True), default=through(backend)
            )
