"""STABLE-RPS: training a shared memory at the dense model's rate (Desai, Shrivastava, ICLR 2024, arXiv 2310.11611).

A slot j of the memory serves C_j weights, of scales lambda. Its gradient is a sum over them, so that one step moves
each weight by about C lambda^2 times what the dense model's step would: training diverges or stalls with the spread
of the memory at initialisation, which scales undo in the weights but not in their steps. With

    C_j = sum of 1,   A_j = sum of lambda,   B_j = sum of lambda^2        over the weights of slot j
    v1: Gamma = A^2 / C    v2: A    v3: A / C    v4: sqrt(B)    v5: B    none: 1

the gradient of slot j is divided by Gamma_j before momentum. Where scales are equal in a slot, v1 and v5 move each
weight by the mean of its slot's dense gradients, whatever the spread; at most one weight a slot gives the dense
model's trajectory, coupled weight decay included. v1 <= v5, by Cauchy and Schwarz. Adam undoes any such factor: for
it, keep the memory at unit spread (`unit_memory`), or scale the update (`scale_update_by_sharing`).

    shared = share(model, model.init(key, x), compression=100)
    optimizer = optax.chain(scale_by_sharing(gradient_scaler(shared)), optax.sgd(0.1, momentum=0.9))

The reference adds 1e-3 to C and 1e-6 to Gamma, which biases slots of one weight and matters where Gamma is small;
here an epsilon is relative to the mean of Gamma, and zero by default: every slot that serves a weight has Gamma > 0.
The others have no gradient, and Gamma = 1. The abstract names no version; v1 is the code's default. The scaler makes
a rate safe and not fast: the best one grows with compression, so search it for each.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from hashml.sharing.maps import AnyArray
from hashml.sharing.share import Shared

ScalerVersion = Literal["v1", "v2", "v3", "v4", "v5", "none"]


class SlotSums(NamedTuple):
    """Sums over the weights of each slot, float64."""

    weights: Float[np.ndarray, " budget"]
    """C: of 1, their number."""
    scale: Float[np.ndarray, " budget"]
    """A: of lambda."""
    square: Float[np.ndarray, " budget"]
    """B: of lambda squared."""


def slot_sums(counts: Iterable[Int[np.ndarray, " budget"]], scales: Sequence[float | int]) -> SlotSums:
    """Sums over the slots of a memory.

    Args:
        counts: for each array, how many of its weights every slot serves; taken one at a time.
        scales: lambda of each array.

    Raises:
        ValueError: for no arrays, or a scale that is not positive and finite; for unequal numbers of both.
    """
    totals: list[Any] = [0.0, 0.0, 0.0]
    for load, scale in zip(counts, scales, strict=True):
        if not 0 < scale < np.inf:
            raise ValueError(f"scales holds {scale}; they must be positive and finite")
        totals = [total + load * float(scale) ** power for power, total in enumerate(totals)]
    if not isinstance(totals[0], np.ndarray):
        raise ValueError("counts is empty; a memory serves one array at least")
    return SlotSums(*totals)


def sharing_sums(shared: Shared) -> SlotSums:
    """`slot_sums` of a shared module."""
    loads = (shared.placement.load(leaf.shape, leaf.offset) for leaf in shared.leaves)
    return slot_sums(loads, [leaf.scale for leaf in shared.leaves])


def scaler_weights(
    counts: Iterable[Int[np.ndarray, " budget"]],
    scales: Sequence[float | int],
    version: ScalerVersion = "v1",
    *,
    epsilon: float | int = 0.0,
) -> Float[np.ndarray, " budget"]:
    """Gamma of each slot, float64; 1 in slots that serve no weight.

    Args:
        counts, scales: as in `slot_sums`.
        version: which formula.
        epsilon: added to Gamma in units of its mean over the slots that serve a weight.

    Raises:
        ValueError: for an unknown version, a negative epsilon, and as `slot_sums`.
    """
    return _gamma(slot_sums(counts, scales), version, epsilon)


def gradient_scaler(
    shared: Shared, version: ScalerVersion = "v1", *, epsilon: float | int = 0.0
) -> Float[np.ndarray, " budget"]:
    """`scaler_weights` of a shared module. Of a fold they take no array as long as the model."""
    return _gamma(sharing_sums(shared), version, epsilon)


def update_scaler(shared: Shared) -> Float[np.ndarray, " budget"]:
    """``sqrt(B / C)`` of each slot: the root mean square of its weights' scales; 1 in slots that serve no weight.

    A step of Adam is of one size in every slot. Divided by this, it is of one size in the weights.
    """
    sums = sharing_sums(shared)
    used = sums.weights > 0
    return np.where(used, np.sqrt(sums.square / np.where(used, sums.weights, 1)), 1.0)


def scale_by_sharing(gamma: Float[AnyArray, " budget"]) -> optax.GradientTransformation:
    """Divides the gradient of the memory by Gamma; goes before momentum. Other arrays pass.

    Args:
        gamma: `gradient_scaler`'s.

    Returns:
        A transformation without state, for trees in which one array is called ``"memory"``.

    Raises:
        ValueError: when it updates a tree that has no array of that name, several, or one of another shape.
    """
    return _divide_memory(gamma)


def scale_update_by_sharing(shared: Shared) -> optax.GradientTransformation:
    """Divides the update of the memory by `update_scaler`; goes last, after Adam.

    Steps in the weights are then those of Adam's rate, whatever the memory's spread at initialisation.

    Raises:
        ValueError: as `scale_by_sharing`.
    """
    return _divide_memory(update_scaler(shared))


def unit_memory(shared: Shared, variables: Any) -> tuple[Shared, dict[str, Any]]:
    """The same model with a memory of unit spread, ``memory / init_std``: scales are then the arrays' own spreads.

    Adam's steps are relative to the memory, so that at unit spread its rate means the same for every model.

    Raises:
        ValueError: for variables without a memory.
    """
    params = variables.get("params", {})
    if "memory" not in params:
        raise ValueError(f"variables['params'] holds {sorted(params)}; there must be a 'memory'")
    memory = params["memory"] / shared.init_std
    return shared.with_init_std(1.0), {**variables, "params": {**params, "memory": memory}}


def _gamma(sums: SlotSums, version: str, epsilon: float | int) -> np.ndarray:
    if version not in get_args(ScalerVersion):
        raise ValueError(f"version is {version!r}; it must be one of {get_args(ScalerVersion)}")
    if not 0 <= epsilon < np.inf:
        raise ValueError(f"epsilon is {epsilon}; it must be finite, and not negative")
    used = sums.weights > 0
    count = np.where(used, sums.weights, 1)
    formulas = {
        "v1": sums.scale**2 / count,
        "v2": sums.scale,
        "v3": sums.scale / count,
        "v4": np.sqrt(sums.square),
        "v5": sums.square,
        "none": np.ones_like(sums.weights),
    }
    gamma = formulas[version]
    mean = gamma[used].mean() if used.any() else 0.0
    return np.where(used, gamma + epsilon * mean, 1.0)


def _divide_memory(divisor: Any) -> optax.GradientTransformation:
    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(updates) if _name(path) == "memory"]
        if len(paths) != 1:
            raise ValueError(f"the tree has {len(paths)} arrays called 'memory'; it must have one")

        def divide(path: Any, update: Any) -> Any:
            if _name(path) != "memory":
                return update
            if update.shape != divisor.shape:
                raise ValueError(f"the memory has shape {update.shape}; the scaler is for {divisor.shape}")
            return update / jnp.asarray(divisor, update.dtype)

        return jax.tree_util.tree_map_with_path(divide, updates), state

    return optax.GradientTransformation(init, update)


def _name(path: Any) -> str:
    return str(getattr(path[-1], "key", getattr(path[-1], "name", ""))) if path else ""
