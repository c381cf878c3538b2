"""RANDOMFOLD, the map of STABLE-RPS (Desai, Shrivastava, ICLR 2024, arXiv 2310.11611), on flat weights.

The weights of a whole model stand in one row; X is a weight's place in it. The row is cut in partitions as
long as the memory, and each partition is the memory, rotated by a hashed amount and with hashed signs:

    slot(X) = (u(X // budget) + X mod budget) mod budget
    weight(X) = sign(X) * memory[slot(X)]

so every slot serves floor or ceil of ``n / budget`` of the n weights, and one weight at most where the model fits
the memory. There is neither gather nor scatter: a span of weights is a few runs of the memory, and its transpose
adds runs. All modules of a model share one ``seed``; a seed for each, as in the reference code, would let
partitions that straddle two modules, and models of several modules at ``budget = n``, hit slots twice.
The layout is that of ``TileGeometry(map="fold", tile=(1, 1))``.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hashml.sharing.budgets import check_positive
from hashml.sharing.maps import AnyArray
from hashml_kernels import bits
from hashml_kernels.hashed_matmul.geometry import hashed_starts
from hashml_kernels.manual_axes import varying_alike

FoldSign = Literal["element", "none"]

_UNROLLED, _ADDED_AT_ONCE = 32, 8
"""Partitions that are written out, forward and in the transpose; spans of more go through a loop. Sums that are
written out a compiler fuses over all modules, whose gradients would then wait for one another."""


@dataclasses.dataclass(frozen=True)
class FoldSpan:
    """``size`` neighbouring weights of a folded model, from place ``offset`` on.

    Raises:
        TypeError: where a number is no int.
        ValueError: where one is out of its range, or the sign is unknown.
    """

    budget: int
    offset: int
    size: int
    seed: int = 0
    sign: FoldSign = "element"

    def __post_init__(self) -> None:
        check_positive(budget=self.budget, size=self.size)
        for name, value in (("offset", self.offset), ("seed", self.seed)):
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be an int")
        for name in ("budget", "offset", "size", "seed"):
            object.__setattr__(self, name, int(getattr(self, name)))
        if not 0 <= self.offset <= 2**63 - 1 - self.size:
            raise ValueError(f"offset is {self.offset}; it and offset + size must lie in 0..2**63 - 1")
        if max(self.budget, self.size) >= 2**31:
            raise ValueError(f"budget is {self.budget}, size {self.size}; both must be below 2**31")
        if self.sign not in ("element", "none"):
            raise ValueError(f"sign is {self.sign!r}; it must be 'element' or 'none'")

    @property
    def partitions(self) -> int:
        """Partitions that the span touches."""
        return (self.offset % self.budget + self.size - 1) // self.budget + 1


def fold_expand(
    memory: Float[AnyArray, " budget"], *, offset: int, size: int, seed: int, sign: FoldSign = "element"
) -> Float[Array, " {size}"]:
    """Weights ``offset .. offset + size`` of the folded model, in the memory's dtype.

    Args:
        memory: the stored weights.
        offset: place of the first weight in the model.
        size: number of weights.
        seed: picks rotations and signs; one for a whole model.
        sign: a hashed sign for each ``"element"``, or ``"none"``.

    Raises:
        TypeError, ValueError: for a memory that is no float vector, or a number out of range.
    """
    memory = jnp.asarray(memory)
    if not jnp.issubdtype(memory.dtype, jnp.floating):
        raise TypeError(f"memory has dtype {memory.dtype}; it must be a float type")
    if memory.ndim != 1:
        raise ValueError(f"memory has shape {memory.shape}; it must be a vector of budget weights")
    return _expand(memory, FoldSpan(memory.shape[0], offset, size, seed, sign))


def fold_pull(
    gradient: Float[AnyArray, " size"], *, budget: int, offset: int, seed: int, sign: FoldSign = "element"
) -> Float[Array, " {budget}"]:
    """The transpose of `fold_expand`: sums of signed entries in their slots, float32 (float64 stays so).

    Args:
        gradient: one number a weight of the span.
        budget: weights of the memory.
        offset, seed, sign: as in `fold_expand`.

    Raises:
        TypeError, ValueError: as `fold_expand`.
    """
    gradient = jnp.asarray(gradient)
    if gradient.ndim != 1:
        raise ValueError(f"gradient has shape {gradient.shape}; it must be a vector of the span's size")
    return _pull(gradient, FoldSpan(budget, offset, gradient.shape[0], seed, sign))


def fold_load(span: FoldSpan) -> Int[np.ndarray, " budget"]:
    """How many weights of the span each slot serves, from the ends of its runs: no array is as long as the span."""
    whole, steps = 0, np.zeros(span.budget + 1, np.int64)
    for partition_start, first, last in _partition_cuts(span):
        if last - first == span.budget:
            whole += 1
            continue
        for start, stop in _circular(partition_start + first, last - first, span.budget):
            steps[start] += 1
            steps[stop] -= 1
    return whole + np.cumsum(steps[:-1])


# --- the runs of a span ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _starts(span: FoldSpan) -> np.ndarray:
    """``u`` of the partitions that the span touches, int32."""
    first = span.offset // span.budget
    keys = np.uint64(first) + np.arange(span.partitions, dtype=np.uint64)
    return hashed_starts(bits.split64(keys), budget=span.budget, align=1, seed=span.seed)


def _partition_cuts(span: FoldSpan) -> list[tuple[int, int, int]]:
    """For each partition its rotation and the places in it, from and to, that the span covers."""
    place, cuts = span.offset % span.budget, []
    left = span.size
    for start in _starts(span):
        length = min(span.budget - place, left)
        cuts.append((int(start), place, place + length))
        place, left = 0, left - length
    return cuts


def _circular(start: int, length: int, budget: int) -> list[tuple[int, int]]:
    """The one or two stretches ``[from, to)`` of a run of ``length <= budget`` slots."""
    start %= budget
    stop = start + length
    return [(start, stop)] if stop <= budget else [(start, budget), (0, stop - budget)]


def _signed(weights: Any, span: FoldSpan) -> Any:
    if span.sign == "none":
        return weights
    place = jax.lax.iota(np.uint32, span.size)
    first = bits.Limbs(np.uint32(span.offset >> 32), np.uint32(span.offset & 0xFFFFFFFF))
    positions = bits.add64(first, bits.Limbs(np.uint32(0), place))
    return jnp.where(bits.sign_bit(positions, span.seed) == 0, weights, -weights)


# --- the operator and its transpose: each is the other's gradient, to any order ---------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _expand(memory: Any, span: FoldSpan) -> Any:
    if span.partitions <= _UNROLLED:
        pieces = [
            memory[start:stop]
            for rotation, first, last in _partition_cuts(span)
            for start, stop in _circular(rotation + first, last - first, span.budget)
        ]
        weights = jnp.concatenate(pieces)
    else:
        twice = jnp.concatenate([memory, memory])

        def one_partition(_: None, start: Array) -> tuple[None, Array]:
            return None, jax.lax.dynamic_slice_in_dim(twice, start, span.budget)

        _, partitions = jax.lax.scan(one_partition, None, jnp.asarray(_starts(span)))
        place = span.offset % span.budget
        weights = partitions.reshape(-1)[place : place + span.size]
    return _signed(weights, span)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pull(gradient: Any, span: FoldSpan) -> Any:
    gradient = _signed(gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32)), span)
    if span.partitions <= _ADDED_AT_ONCE:
        return _pull_few(gradient, span)
    place = span.offset % span.budget
    beyond = span.partitions * span.budget - place - span.size
    partitions = jnp.pad(gradient, (place, beyond)).reshape(span.partitions, span.budget)

    def one_partition(total: Array, cut: tuple[Array, Array]) -> tuple[Array, None]:
        start, weights = cut
        # The partition begins at slot `start`; read from slot 0 on, it begins with its last `start` weights.
        turned = jax.lax.dynamic_slice_in_dim(jnp.concatenate([weights, weights]), span.budget - start, span.budget)
        return total + turned, None

    zeros, _ = varying_alike(jnp.zeros(span.budget, gradient.dtype), gradient)
    return jax.lax.scan(one_partition, zeros[0], (jnp.asarray(_starts(span)), partitions))[0]


def _pull_few(gradient: Any, span: FoldSpan) -> Array:
    total, taken = None, 0
    for rotation, first, last in _partition_cuts(span):
        stretches = []
        for start, stop in _circular(rotation + first, last - first, span.budget):
            stretches.append((start, gradient[taken : taken + stop - start]))
            taken += stop - start
        stretches.sort(key=lambda stretch: stretch[0])
        laid = _laid_out(stretches, span.budget, gradient.dtype)
        total = laid if total is None else total + laid
    assert total is not None  # a span has a weight
    return total


def _laid_out(stretches: list[tuple[int, Array]], budget: int, dtype: Any) -> Array:
    """The stretches at their places in ascending order, zeros between them."""
    parts, filled = [], 0
    for start, weights in stretches:
        if start > filled:
            parts.append(jnp.zeros(start - filled, dtype))
        parts.append(weights)
        filled = start + weights.shape[0]
    if filled < budget:
        parts.append(jnp.zeros(budget - filled, dtype))
    return jnp.concatenate(parts)


def _expand_forward(memory: Any, span: FoldSpan) -> Any:
    return _expand(memory, span), jnp.zeros(0, memory.dtype)


def _expand_backward(span: FoldSpan, like: Any, cotangent: Any) -> Any:
    gradient: Any = _pull(cotangent, span)
    return (gradient.astype(like.dtype),)


def _pull_forward(gradient: Any, span: FoldSpan) -> Any:
    return _pull(gradient, span), jnp.zeros(0, gradient.dtype)


def _pull_backward(span: FoldSpan, like: Any, cotangent: Any) -> Any:
    weights: Any = _expand(cotangent, span)
    return (weights.astype(like.dtype),)


_expand.defvjp(_expand_forward, _expand_backward)
_pull.defvjp(_pull_forward, _pull_backward)
