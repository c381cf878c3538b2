"""The definition: features by the product formula, all weights ``T x N`` at once, float32 in full precision."""

import jax
import jax.numpy as jnp

from hashml_kernels.annotations import Array
from hashml_kernels.race_attention.features import (
    FLOOR,
    Gradients,
    Operands,
    Results,
    corner_bits,
    reciprocal,
)


def phi(x: Array, planes: Array, beta: Array) -> Array:
    """``[*n, S]``: ``prod_p sigmoid(2 beta c[r, p] tanh(w . x))``, the tables side by side, plus the floor."""
    tables, bits, width = planes.shape
    flat = planes.reshape(-1, width)
    projected = jnp.matmul(x.astype(jnp.float32), flat.T, precision="highest")
    logits = 2 * beta * jnp.tanh(projected).reshape(*x.shape[:-1], tables, 1, bits)
    signs = 2 * corner_bits(bits) - 1
    table = jnp.prod(jax.nn.sigmoid(signs * logits), axis=-1)
    return table.reshape(*x.shape[:-1], -1) + FLOOR


def forward(operands: Operands, causal: bool) -> Results:
    q, k, v, keep, planes, beta = operands
    phi_q, phi_k = phi(q, planes, beta), phi(k, planes, beta)
    if keep is not None:
        phi_k = phi_k * keep[:, None, :, None]
    weights = jnp.einsum("bkgts,bkns->bkgtn", phi_q, phi_k, precision="highest")
    weights = jnp.tril(weights) if causal else weights
    inverse = reciprocal(weights.sum(axis=-1))
    out = jnp.einsum("bkgtn,bknv->bkgtv", weights, v.astype(jnp.float32), precision="highest")
    return Results((out * inverse[..., None]).astype(v.dtype), inverse)


def backward(operands: Operands, results: Results, gradient: Array, causal: bool) -> Gradients:
    """Autodiff of `forward`; the results are computed again."""

    def out(q: Array, k: Array, v: Array, beta: Array) -> Array:
        return forward(operands._replace(q=q, k=k, v=v, beta=beta), causal).out

    _, pull = jax.vjp(out, operands.q, operands.k, operands.v, operands.beta)
    return Gradients(*pull(gradient.astype(results.out.dtype)))
