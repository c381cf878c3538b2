"""FAR, freeze and reconfigure: fine-tuning that trains a few units of each perceptron (Vucetic et al., ISCAS 2022,
arXiv 2205.01541).

    prime         train everything for some of the steps (5 %)
    score         s[j] = sum_i |W1[i, j] - W1_0[i, j]| + |b1[j] - b1_0[j]|         how far unit j has moved
    choose        L = the ``share`` of a layer's units with the largest scores: its learners; F = the others
    reconfigure   y = act(x W1[:, L] + b1[L]) W2[L] + act(x W1[:, F] + b1[F]) W2[F] + b2
    go on         L and all that is no perceptron are trained; F has no gradient, no moments and fewer residuals

Both halves are kernels of their own, cut once: no step permutes or gathers. Floats that a token leaves for the
backward pass (`hashml.optim.residuals` counts them), d being the width, h the units, k the learners:

    all trained                          d + 2 h       x, z and act(z), where z = x W1 + b1
    k learners                           d + h + k     x, z, act(z_L)
    k learners, the others recomputed    d + 2 k       x, z_L, act(z_L)
    no learner                           h             z; or d, for x, if it is recomputed

Departures: the paper takes nodes of both layers, those of the second being its outputs; here a learner is an
intermediate unit, with its column of W1 and its row of W2: otherwise the gradient of W2 would need all of act(z).
``b2`` belongs to no unit; it is trained where there are learners.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Int, Int32, Key

AnyArray = Array | np.ndarray
Activation = Callable[[Array], Array]
Kept = Literal["hidden", "preactivation", "input"]
"""What the backward pass finds beside the weights: z and act(z), z alone, or only the input."""


class FeedForward(NamedTuple):
    """A perceptron ``act(x up + up_bias) down + down_bias``; gated, ``(act(x gate) * (x up + up_bias)) down + ...``.

    Its fields may have leading axes, such as that of stacked layers. Moments of an optimizer that mirror the
    parameters are a `FeedForward` too.

    Attributes:
        up, down: W1 and W2.
        up_bias, down_bias: b1 and b2; ``None``: there is none.
        gate: of a gated perceptron.
    """

    up: Float[AnyArray, "*L d h"]
    down: Float[AnyArray, "*L h d"]
    up_bias: Float[AnyArray, "*L h"] | None = None
    down_bias: Float[AnyArray, "*L d"] | None = None
    gate: Float[AnyArray, "*L d h"] | None = None


class SplitFeedForward(NamedTuple):
    """A perceptron in two that are added up.

    Attributes:
        learner: is trained.
        frozen: is not; ``None`` in what `trained_part` gives.
    """

    learner: FeedForward
    frozen: FeedForward | None


# --- choosing ---------------------------------------------------------------------------------------


def node_scores(before: FeedForward, after: FeedForward, *, down: bool = False) -> Float32[Array, "*L h"]:
    """How far each unit has moved, in L1 distance: its column of W1 (and of the gate) and its bias.

    Args:
        before, after: the priming.
        down: whether its row of W2 counts too.

    Raises:
        ValueError: where the shapes differ.
    """
    shapes = [[None if leaf is None else jnp.shape(leaf) for leaf in ffn] for ffn in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"before has the shapes {shapes[0]}, after {shapes[1]}; they must be equal")
    moved = [None if a is None else jnp.asarray(b) - jnp.asarray(a) for a, b in zip(before, after, strict=True)]
    return _size(FeedForward(*moved), down)  # pyright: ignore[reportArgumentType] None where the layer has None


def magnitude_scores(ffn: FeedForward, *, down: bool = False) -> Float32[Array, "*L h"]:
    """A control that needs no priming: the L1 norm of the weights whose movement `node_scores` measures."""
    return _size(ffn, down)


def random_scores(key: Key[Array, ""], ffn: FeedForward) -> Float32[Array, "*L h"]:
    """The other control: uniform numbers, so that learners are drawn without replacement in each layer."""
    return jax.random.uniform(key, (*ffn.up.shape[:-2], ffn.up.shape[-1]))


def _size(ffn: FeedForward, down: bool) -> Array:
    def total(leaf: Any, axis: int | None) -> Any:
        if leaf is None:
            return 0
        size = jnp.abs(jnp.asarray(leaf, jnp.float32))
        return size if axis is None else size.sum(axis)

    found = total(ffn.up, -2) + total(ffn.gate, -2) + total(ffn.up_bias, None)
    return found + total(ffn.down, -1) if down else found


def learner_count(units: int, share: float | int) -> int:
    """``share * units``, to the nearest number.

    Raises:
        ValueError: for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must be in [0, 1]")
    return round(share * units)


def choose_learners(scores: Float[AnyArray, "*L h"], share: float | int) -> Int32[Array, "*L k"]:
    """Units with the largest scores of each layer, in ascending order; of equal ones the earlier.

    Args:
        scores: of all units; all 0 where nothing has moved.
        share: of the units.

    Raises:
        ValueError: for a share outside [0, 1], or scores that are known to be NaN.
    """
    count = learner_count(scores.shape[-1], share)
    if not isinstance(scores, Tracer) and np.isnan(np.asarray(scores)).any():
        raise ValueError("scores has NaN, as of a priming that diverged; it must be finite")
    return jnp.sort(jax.lax.top_k(jnp.asarray(scores, jnp.float32), count)[1].astype(jnp.int32), axis=-1)


# --- reconfiguring ----------------------------------------------------------------------------------


def reconfigure(tree: Any, learners: Int[AnyArray, "*L k"]) -> Any:
    """Every `FeedForward` of the tree cut in two; other leaves stay.

    The tree may be parameters, or the state of an optimizer whose moments mirror them.

    Args:
        tree: with perceptrons that share these learners: one, that of stacked layers, and what mirrors it.
        learners: different units of each layer, in any order: the order that they will have.

    Raises:
        ValueError: for no perceptron, learners that do not fit it, or, unless they are traced, that repeat.
    """

    def split(ffn: FeedForward) -> SplitFeedForward:
        learner, frozen = _cut(ffn, *_halves(ffn, learners))
        # b2 is no unit's.
        kept, other = (ffn.down_bias, None) if learners.shape[-1] else (None, ffn.down_bias)
        return SplitFeedForward(learner._replace(down_bias=kept), frozen._replace(down_bias=other))

    return _each(FeedForward, split, tree)


def merge(tree: Any, learners: Int[AnyArray, "*L k"]) -> Any:
    """The inverse of `reconfigure`: every `SplitFeedForward` as one perceptron, in the order that it had.

    Raises:
        ValueError: for no split perceptron, or learners that do not fit it.
    """

    def join(split: SplitFeedForward) -> FeedForward:
        learner, frozen = split
        if frozen is None:
            raise ValueError("a perceptron has frozen=None; with_frozen gives the frozen weights back")
        whole = FeedForward(*(_joined(*pair) for pair in zip(learner, frozen, _UNIT_AXES, strict=True)))
        back = jnp.argsort(jnp.concatenate(_halves(whole, learners), axis=-1), axis=-1)
        ordered, _ = _cut(whole, back, back[..., :0])
        bias = learner.down_bias if frozen.down_bias is None else frozen.down_bias
        return ordered._replace(down_bias=bias)

    return _each(SplitFeedForward, join, tree)


_UNIT_AXES: tuple[int | None, ...] = (-1, -2, -1, None, -1)
"""Where the units lie in each field of a `FeedForward`."""


def _halves(ffn: FeedForward, learners: Int[AnyArray, "*L k"]) -> tuple[Array, Array]:
    """Learners, and the other units in ascending order."""
    *layers, _, units = ffn.up.shape
    if learners.shape[:-1] != tuple(layers) or learners.shape[-1] > units:
        raise ValueError(
            f"learners has shape {learners.shape}; for layers {tuple(layers)} of {units} units it must be "
            f"{(*layers, 'k')} with k <= {units}"
        )
    if not isinstance(learners, Tracer):
        ordered = np.sort(np.asarray(learners), axis=-1)
        if ordered.size and ((ordered < 0) | (ordered >= units)).any():
            raise ValueError(f"learners has units from {ordered.min()} to {ordered.max()}; they are 0 to {units - 1}")
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise ValueError("learners repeats a unit; those of a layer must be different")

    def rest(chosen: Array) -> Array:
        return jnp.argsort(jnp.zeros(units, jnp.int32).at[chosen].set(1), stable=True)[: units - chosen.size]

    chosen = jnp.asarray(learners, jnp.int32)
    flat = jax.vmap(rest)(chosen.reshape(math.prod(layers), chosen.shape[-1]))
    return chosen, flat.reshape(*layers, units - chosen.shape[-1]).astype(jnp.int32)


def _cut(ffn: FeedForward, *parts: Array) -> list[FeedForward]:
    """The named units of each layer, a perceptron for each part; b2 is left out."""

    def take(leaf: Any, axis: int | None, units: Array) -> Any:
        if leaf is None or axis is None:
            return None
        return jnp.take_along_axis(jnp.asarray(leaf), units if leaf is ffn.up_bias else _spread(units, axis), axis)

    return [
        FeedForward(*(take(leaf, axis, units) for leaf, axis in zip(ffn, _UNIT_AXES, strict=True))) for units in parts
    ]


def _spread(units: Array, axis: int) -> Array:
    """Indices for `jnp.take_along_axis` in a matrix whose units lie along ``axis``."""
    return units[..., None, :] if axis == -1 else units[..., :, None]


def _joined(learner: Any, frozen: Any, axis: int | None) -> Any:
    if learner is None or frozen is None or axis is None:
        return None
    return jnp.concatenate([learner, frozen], axis)


def _each(kind: type, change: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with every node of a kind changed."""
    nodes = (FeedForward, SplitFeedForward)

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, kind):
            found.append(leaf)
            return change(leaf)
        return leaf

    found: list[Any] = []
    changed = jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, nodes))
    if not found:
        raise ValueError(f"tree has no {kind.__name__}; there must be one at least")
    return changed


# --- computing --------------------------------------------------------------------------------------

_NAMES: dict[str, tuple[str, ...]] = {
    "hidden": ("feed_forward_z", "feed_forward_hidden"),
    "preactivation": ("feed_forward_z",),
    "input": (),
}
gelu: Activation = functools.partial(jax.nn.gelu, approximate=False)
"""BERT's."""


def feed_forward(
    ffn: FeedForward, x: Float[AnyArray, "*n d"], activation: Activation = gelu, *, kept: Kept = "hidden"
) -> Float[Array, "*n d"]:
    """The perceptron of every row.

    Args:
        ffn: of one layer.
        x: rows.
        activation: elementwise.
        kept: for the backward pass, which computes the rest again. "hidden" is what a framework without a compiler
            stores; "preactivation" repeats the elementwise activation, "input" the product with W1 as well.

    Raises:
        ValueError: for another ``kept``.
    """
    if kept not in _NAMES:
        raise ValueError(f"kept is {kept!r}; allowed are {', '.join(get_args(Kept))}")
    return _remembering(_NAMES[kept], functools.partial(_compute, activation))(ffn, jnp.asarray(x))


def split_feed_forward(
    split: SplitFeedForward, x: Float[AnyArray, "*n d"], activation: Activation = gelu, *, recompute: bool = False
) -> Float[Array, "*n d"]:
    """The perceptron of every row from its two halves; the frozen weights have no gradient.

    Args:
        split: of one layer, as `reconfigure` makes it.
        x: rows.
        activation: elementwise.
        recompute: whether the backward pass computes ``x W1[:, F]`` again in place of keeping it.

    Raises:
        ValueError: for a perceptron without its frozen half.
    """
    if split.frozen is None:
        raise ValueError("split has frozen=None; with_frozen gives the frozen weights back")
    parts = []
    if split.learner.up.shape[-1]:
        parts.append(feed_forward(split.learner, x, activation))
    if split.frozen.up.shape[-1]:
        names = _NAMES["input" if recompute else "preactivation"]
        # The gradient is stopped inside, so that what is kept are the weights themselves and no copies.
        parts.append(
            _remembering(names, functools.partial(_compute_frozen, activation))(split.frozen, jnp.asarray(x))
        )
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _remembering(names: tuple[str, ...], compute: Callable[..., Array]) -> Callable[..., Array]:
    """The function, whose backward pass finds its arguments and what is named, and computes the rest again."""
    return jax.checkpoint(compute, policy=jax.checkpoint_policies.save_only_these_names(*names))


def _compute_frozen(activation: Activation, ffn: FeedForward, x: Array) -> Array:
    return _compute(activation, jax.lax.stop_gradient(ffn), x)


def _compute(activation: Activation, ffn: FeedForward, x: Array) -> Array:
    z = x @ ffn.up if ffn.up_bias is None else x @ ffn.up + ffn.up_bias
    z = checkpoint_name(z, "feed_forward_z")
    gate = z if ffn.gate is None else checkpoint_name(x @ ffn.gate, "feed_forward_z")
    hidden = activation(gate) if ffn.gate is None else activation(gate) * z
    y = checkpoint_name(hidden, "feed_forward_hidden") @ ffn.down
    return y if ffn.down_bias is None else y + ffn.down_bias


# --- training ---------------------------------------------------------------------------------------


def trained_part(tree: Any) -> Any:
    """Without the frozen halves: what is differentiated, and what an optimizer's state mirrors."""
    return _each(SplitFeedForward, lambda split: split._replace(frozen=None), tree)


def frozen_part(tree: Any) -> list[FeedForward]:
    """The frozen halves, in the tree's order."""
    found: list[FeedForward] = []
    _each(SplitFeedForward, lambda split: found.append(split.frozen), tree)
    return found


def with_frozen(tree: Any, frozen: list[FeedForward]) -> Any:
    """The inverse of `trained_part` and `frozen_part`: ``with_frozen(trained_part(t), frozen_part(t)) == t``.

    Raises:
        ValueError: where there are not as many halves as split perceptrons.
    """
    count = sum(isinstance(node, SplitFeedForward) for node in jax.tree.leaves(tree, is_leaf=_is_split))
    if count != len(frozen):
        raise ValueError(f"frozen has {len(frozen)} halves; the tree has {count} split perceptrons")
    rest = iter(frozen)
    return _each(SplitFeedForward, lambda split: split._replace(frozen=next(rest)), tree)


def learner_optimizer(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer of whole split trees: it has no state for the frozen halves, and updates of zero.

    Gradients of such a tree have zeros in the frozen halves; `trained_part` before differentiating spares them.
    """

    def labels(tree: Any) -> Any:
        def of(node: Any) -> Any:
            if not _is_split(node):
                return "trained"
            names = zip(node, ("trained", "frozen"), strict=True)
            return SplitFeedForward(*(jax.tree.map(lambda _, name=name: name, half) for half, name in names))

        return jax.tree.map(of, tree, is_leaf=_is_split)

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def _is_split(node: Any) -> bool:
    return isinstance(node, SplitFeedForward)
