"""Scores of weights by which nets are pruned before they are trained; `hashml.sharing.pruning` makes masks of them.

    random    S ~ N(0, 1)
    magnitude S = |w|
    SNIP      S = |w * dL/dw| / sum                       Lee et al., ICLR 2019, arXiv 1810.02340
    GraSP     S = w * (H g),  g = dL/dw, H g = jvp(grad)  Wang et al., ICLR 2020, arXiv 2002.07376
    SynFlow   S = |w * dR/dw|,  R = sum(net(|w|, ones))   Tanaka et al., NeurIPS 2020, arXiv 2006.05467

The larger a score, the sooner its weight is kept. Scores are trees like the parameters, with None where a
leaf stays dense: all but kernels of two axes and more, unless ``prunable`` says otherwise. GraSP keeps the
*largest* scores, as the code of SynFlow's authors does; other repositories negate them. SynFlow follows
its paper's formula: biases are left out of R, where that code adds their absolute values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Num

AnyArray = Array | np.ndarray

Params = Any
Scores = Any
"""As the parameters, with None for leaves that stay dense."""

Apply = Callable[[Any, Array], Array]
"""``(params, x [B, ...]) -> logits [B, classes]``, in evaluation mode: statistics of norms must not move."""

Predicate = Callable[[str, Any], bool]
"""``(path, leaf) -> bool``, the path as in ``"Dense_0/kernel"``."""


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether a leaf is pruned by default: kernels are, biases and scales of norms are not."""
    return leaf.ndim >= 2


def random_scores(params: Params, key: Array, *, prunable: Predicate = is_kernel) -> Scores:
    """Standard normal numbers: random edges.

    Raises:
        TypeError: for a prunable leaf that is not floating.
        ValueError: where no leaf is prunable.
    """
    kernels, treedef = jax.tree.flatten(kernels_of(params, prunable))
    keys = jax.random.split(key, len(kernels))
    return treedef.unflatten([jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, kernels, strict=True)])


def magnitude_scores(params: Params, *, prunable: Predicate = is_kernel) -> Scores:
    """Absolute values; errors as `random_scores`."""
    return jax.tree.map(jnp.abs, kernels_of(params, prunable))


def snip_scores(
    apply: Apply,
    params: Params,
    x: Num[AnyArray, "B ..."],
    labels: Int[AnyArray, " B"],
    *,
    prunable: Predicate = is_kernel,
) -> Scores:
    """How much the loss reacts to each connection, ``|dL/dM|`` at M = 1, divided by the sum of all.

    Args:
        apply: the net.
        params: where it stands.
        x, labels: the pruning set; ten examples a class is the custom. L is their mean cross-entropy.
        prunable: which leaves are scored.

    Raises:
        TypeError, ValueError: as `random_scores`.
    """
    kernels = kernels_of(params, prunable)
    gradient = jax.grad(_loss(apply, params, x, labels))(kernels)
    return _normalised(jax.tree.map(lambda w, g: jnp.abs(w * g), kernels, gradient), 0.0)


def grasp_scores(
    apply: Apply,
    params: Params,
    x: Num[AnyArray, "B ..."],
    labels: Int[AnyArray, " B"],
    *,
    temperature: float | int = 200.0,
    prunable: Predicate = is_kernel,
) -> Scores:
    """``w * (H g)`` over the absolute value of the sum: what keeps the gradient flowing has the largest.

    ``g`` and the Hessian ``H`` are those of the prunable leaves, and ``g`` is a constant vector in ``H g``.

    Args:
        apply, params, x, labels, prunable: as `snip_scores`.
        temperature: the logits are divided by it.

    Raises:
        TypeError, ValueError: as `random_scores`; ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    kernels = kernels_of(params, prunable)
    gradient = jax.grad(_loss(apply, params, x, labels, temperature))
    _, product = jax.jvp(gradient, (kernels,), (gradient(kernels),))
    return _normalised(jax.tree.map(jnp.multiply, kernels, product), 1e-10)


def synflow_scores(
    apply: Apply,
    params: Params,
    input_shape: tuple[int, ...],
    *,
    rescale: bool = False,
    prunable: Predicate = is_kernel,
) -> Scores:
    """Share of each weight in the flow of a net of absolute weights, without biases, from an input of ones.

    The flow is a product over layers and leaves float32's range in deep nets. Input and output are
    therefore scaled by a power of two that the flow itself gives, which multiplies all scores alike and
    serves flows up to ``2**220`` (some 50 layers of width 256). Scores are known up to that factor.

    Args:
        apply: the net. Statistics of a batch norm that it closes over must be absolute values, too.
        params: where it stands; signs do not matter.
        input_shape: of one example.
        rescale: divide each kernel by its mean gain, for nets of any depth. This multiplies all scores
            alike only where every path from input to output passes every kernel once: not in a ResNet.
        prunable: which leaves are scored.

    Raises:
        TypeError, ValueError: as `random_scores`.
    """
    kernels = jax.tree.map(jnp.abs, kernels_of(params, prunable))
    if rescale:
        kernels = jax.tree.map(_unit_gain, kernels)
    rest = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if leaf_path(path).rpartition("/")[2] == "bias" else jnp.abs(leaf),
        params,
    )

    def flow(kernels: Any, entry: Array | float, exit: Array | float) -> Array:
        return apply(with_kernels(rest, kernels), jnp.full((1, *input_shape), entry, jnp.float32)).sum() * exit

    downward, upward = flow(kernels, 2.0**-100, 1.0), flow(kernels, 2.0**100, 1.0)
    seen = jnp.isfinite(downward) & (downward > 0)
    exponent = jnp.where(seen, jnp.log2(downward) + 100, jnp.log2(upward) - 100)
    size = jnp.where(jnp.isfinite(exponent), jnp.exp2(-jnp.round(exponent / 2)), 1.0)
    gradient = jax.grad(flow)(kernels, size, size)
    return jax.tree.map(lambda w, g: jnp.abs(w * g), kernels, gradient)


def _unit_gain(kernel: Array) -> Array:
    gain = kernel.sum(dtype=jnp.float32) / kernel.shape[-1]
    return kernel / jnp.where(gain > 0, gain, 1.0).astype(kernel.dtype)


def _loss(apply: Apply, params: Params, x: AnyArray, labels: AnyArray, temperature: float | int = 1.0):
    """The mean cross-entropy as a function of the kernels alone."""
    x, labels = jnp.asarray(x), jnp.asarray(labels)

    def loss(kernels: Any) -> Array:
        logits = apply(with_kernels(params, kernels), x) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def _normalised(scores: Scores, epsilon: float) -> Scores:
    total = jnp.abs(sum(leaf.sum(dtype=jnp.float32) for leaf in jax.tree.leaves(scores))) + epsilon
    total = jnp.where(total > 0, total, 1.0)
    return jax.tree.map(lambda leaf: leaf / total, scores)


def leaf_path(path: Any) -> str:
    """``Dense_0/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def kernels_of(params: Params, prunable: Predicate) -> Any:
    """The prunable leaves, None for the others.

    Raises:
        TypeError: for one that is not floating.
        ValueError: where there is none.
    """

    def one(path: Any, leaf: Any) -> Any:
        if not prunable(leaf_path(path), leaf):
            return None
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"params {leaf_path(path)} has dtype {leaf.dtype}; what is pruned must be floating")
        return jnp.asarray(leaf)

    kernels = jax.tree_util.tree_map_with_path(one, params)
    if not jax.tree.leaves(kernels):
        raise ValueError("params have no prunable leaf; by default those of two axes and more are prunable")
    return kernels


def with_kernels(params: Params, kernels: Any) -> Params:
    """The parameters with ``kernels`` in their places."""
    return jax.tree.map(
        lambda kernel, leaf: leaf if kernel is None else kernel, kernels, params, is_leaf=lambda leaf: leaf is None
    )
