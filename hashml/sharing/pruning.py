"""Pruning: the competitors of parameter sharing, which store and train a part of a dense net's weights.

    mask      M = 1 for the ``density * N`` largest scores of all layers (global), or of each layer (local)
    prune     score, mask, score what is left, mask, ... (SynFlow: 100 times; else once)
    use       net(w * M): train the kept weights, store the kept weights and where they stand

Masks are trees of booleans like the parameters, with None where a leaf stays dense: all but kernels of
two axes and more, unless ``prunable`` says otherwise. The scores, with their papers, are those of
`hashml.sharing.pruning_scores` and can be had from here; `hashml.sharing.lottery_ticket` prunes after
training, several times. All but `pruned_bytes` can be traced, so that seeds can be a `jax.vmap` axis.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int

from hashml.accounting import stored_bytes
from hashml.sharing.pruning_scores import AnyArray, Params, Scores, leaf_path
from hashml.sharing.pruning_scores import grasp_scores as grasp_scores
from hashml.sharing.pruning_scores import is_kernel as is_kernel
from hashml.sharing.pruning_scores import magnitude_scores as magnitude_scores
from hashml.sharing.pruning_scores import random_scores as random_scores
from hashml.sharing.pruning_scores import snip_scores as snip_scores
from hashml.sharing.pruning_scores import synflow_scores as synflow_scores

Mask = Any
"""As the parameters, with None for leaves that stay dense; True is kept."""

Scope = Literal["global", "local"]
Schedule = Literal["exponential", "linear"]
Index = Literal["bitmap", "int16", "int32", "none"]


def mask_from_scores(scores: Scores, density: float | int, *, scope: Scope = "global") -> Mask:
    """True for the ``round(density * N)`` largest scores, at least one; exactly as many, whatever ties there are.

    Of equal scores the earlier are kept: leaves in the tree's order, entries in row-major order. NaN counts
    as the smallest.

    Args:
        scores: a tree, None where a leaf is not pruned.
        density: share of the scored weights that is kept, in (0, 1].
        scope: ``"global"``: all leaves compete; ``"local"``: each keeps the same share.

    Raises:
        ValueError: for a density outside (0, 1], an unknown scope, or scores without a leaf.
    """
    _check_density(density)
    leaves, treedef = jax.tree.flatten(scores)
    _check_scope(scope, leaves)
    if scope == "local":
        return treedef.unflatten([_largest([leaf], kept_weights(leaf.size, density))[0] for leaf in leaves])
    return treedef.unflatten(_largest(leaves, kept_weights(sum(leaf.size for leaf in leaves), density)))


def prune(
    score: Callable[[Params], Scores],
    params: Params,
    density: float | int,
    *,
    steps: int = 1,
    schedule: Schedule = "exponential",
    scope: Scope = "global",
) -> Mask:
    """Score, keep the largest, score what is left, ``steps`` times; the masks are nested.

    After step e of E a share ``density ** (e / E)`` is left (exponential), or ``1 - (1 - density) e / E``
    (linear). SynFlow takes 100 exponential steps, all others one.

    No layer of a bias-free chain of L layers dies under SynFlow while each step removes less than 1 / L
    of what is left: the scores of every layer add up to the same R, so among the p removed, if they held
    a whole layer, would be one of R / p at least; then no other layer has more than p that are kept, and
    p is 1 / L of all at least.

    Args:
        score: ``params -> scores``, called on the masked parameters: such as
            ``lambda params: synflow_scores(apply, params, (784,))``.
        params: where the net stands.
        density: share of the scored weights that is kept, in (0, 1].
        steps: rounds.
        schedule: of the densities.
        scope: as `mask_from_scores`.

    Raises:
        ValueError: for a density outside (0, 1], steps below 1, or an unknown schedule or scope.
    """
    _check_density(density)
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    if schedule not in ("exponential", "linear"):
        raise ValueError(f"schedule is {schedule!r}; it must be 'exponential' or 'linear'")
    shapes, treedef = jax.tree.flatten(jax.eval_shape(score, params))
    _check_scope(scope, shapes)
    sizes = [leaf.size for leaf in shapes] if scope == "local" else [sum(leaf.size for leaf in shapes)]
    densities = [density_after(step + 1, steps, density, schedule) for step in range(steps)]
    counts = jnp.asarray([[kept_weights(size, share) for size in sizes] for share in densities], jnp.int32)

    def one_step(mask: Mask, kept: Array) -> tuple[Mask, None]:
        scores = score(apply_mask(params, mask))
        # What is gone stays gone, below every other score.
        alive = [
            jnp.where(m, s, -jnp.inf) for m, s in zip(jax.tree.leaves(mask), jax.tree.leaves(scores), strict=True)
        ]
        if scope == "local":
            leaves = [_largest([leaf], kept[i])[0] for i, leaf in enumerate(alive)]
        else:
            leaves = _largest(alive, kept[0])
        return treedef.unflatten(leaves), None

    full = treedef.unflatten([jnp.ones(leaf.shape, bool) for leaf in shapes])
    return jax.lax.scan(one_step, full, counts)[0]


def density_after(step: int, steps: int, density: float | int, schedule: Schedule = "exponential") -> float:
    """Share that is left after ``step`` of ``steps`` rounds; the last leaves ``density`` exactly."""
    if step == steps:
        return float(density)
    done = step / steps
    return float(density**done if schedule == "exponential" else 1 - (1 - density) * done)


def kept_weights(size: int, density: float | int) -> int:
    """Weights that are kept of ``size``: the nearest number, at least one."""
    return max(1, round(size * density))


@jax.jit
def _largest(leaves: list[AnyArray], kept: int | Array) -> list[Array]:
    """Masks of the ``kept`` largest entries of all leaves together; equal ones in order of their index.

    The threshold is found bit by bit in the integers that order as floats do: 32 counts in place of a
    sort, at a tenth of its time, and ``kept`` may be traced.
    """
    flat = jnp.concatenate([leaf.astype(jnp.float32).reshape(-1) for leaf in leaves])
    flat = jnp.where(jnp.isnan(flat), -jnp.inf, jnp.where(flat == 0, 0.0, flat))  # one zero, not two
    bits = jax.lax.bitcast_convert_type(flat, jnp.uint32)
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def one_bit(i: Array, threshold: Array) -> Array:
        higher = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where((ordered >= higher).sum(dtype=jnp.int32) >= kept, higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, one_bit, jnp.uint32(0))
    above, equal = ordered > threshold, ordered == threshold
    free = kept - above.sum(dtype=jnp.int32)
    mask = above | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= free))
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1].tolist()
    return [part.reshape(leaf.shape) for part, leaf in zip(jnp.split(mask, ends), leaves, strict=True)]


# --- use ---------------------------------------------------------------------------------------------


def apply_mask(params: Params, mask: Mask) -> Params:
    """The parameters with zeros where the mask is False; its gradient is zero there, too.

    Raises:
        ValueError: where a mask has another shape than its leaf, or the trees differ.
    """

    def one(path: Any, keep: Bool[AnyArray, "..."] | None, leaf: Any) -> Any:
        if keep is None:
            return leaf
        if keep.shape != leaf.shape:
            raise ValueError(f"mask of {leaf_path(path)} has shape {keep.shape}; the parameter has {leaf.shape}")
        return jnp.where(keep, leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(one, mask, params, is_leaf=lambda leaf: leaf is None)


def count_kept(mask: Mask) -> Int[Array, ""]:
    """Weights that the mask keeps, of those that it covers."""
    return jnp.stack([leaf.sum(dtype=jnp.int32) for leaf in jax.tree.leaves(mask)]).sum()


def masked(optimizer: optax.GradientTransformation, mask: Mask) -> optax.GradientTransformation:
    """The optimiser on the kept weights alone: no momentum, second moment or weight decay revives another.

    It sees gradients and parameters with zeros outside the mask, and its updates are zero there.
    """
    inner = optax.with_extra_args_support(optimizer)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        kept = None if params is None else apply_mask(params, mask)
        updates, state = inner.update(apply_mask(updates, mask), state, kept, **extra)
        return apply_mask(updates, mask), state

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(apply_mask(params, mask)), update)


def pruned_bytes(params: Params, mask: Mask, *, index: Index = "bitmap") -> int:
    """Bytes that the pruned net stores, as `hashml.accounting.stored_bytes` counts a dense one.

    Args:
        params: what is stored where the mask keeps it, and every leaf without a mask, whole.
        mask: a concrete mask.
        index: how the kept places are known: ``"bitmap"``: one bit a weight; ``"int32"``: a flat index
            for each kept; ``"int16"``: the gap from the last kept one, where a longer gap takes a stored
            zero every 65,536 (Han et al. 2016); ``"none"``: not counted, as the literature does, which
            favours pruning.

    Raises:
        ValueError: for an unknown index, or shapes that differ.
    """
    if index not in ("bitmap", "int16", "int32", "none"):
        raise ValueError(f"index is {index!r}; it must be 'bitmap', 'int16', 'int32' or 'none'")
    jax.eval_shape(apply_mask, params, mask)  # for its errors

    def one(keep: Any, leaf: Any) -> int:
        if keep is None:
            return stored_bytes(leaf)
        places = np.flatnonzero(np.asarray(keep))
        kept, index_bytes = len(places), 0
        match index:
            case "bitmap":
                index_bytes = -(-leaf.size // 8)
            case "int32":
                index_bytes = 4 * kept
            case "int16":
                kept += int((np.diff(places, prepend=-1) - 1 >> 16).sum())
                index_bytes = 2 * kept
        return stored_bytes(jax.ShapeDtypeStruct((kept,), leaf.dtype)) + index_bytes

    parts = jax.tree.map(one, mask, params, is_leaf=lambda leaf: leaf is None)
    return sum(jax.tree.leaves(parts))


def _check_density(density: float | int) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1]")


def _check_scope(scope: str, leaves: list[Any]) -> None:
    if scope not in ("global", "local"):
        raise ValueError(f"scope is {scope!r}; it must be 'global' or 'local'")
    if not leaves:
        raise ValueError("scores have no leaf: nothing is prunable")
