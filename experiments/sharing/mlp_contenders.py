"""An MLP of few stored floats, five ways: dense, smaller, hashed, with random edges, of low rank.

Each contender stores at most the dense net's floats over the compression, biases included, so that a
comparison is one at equal bytes. Weights start with the dense net's variances, in random edges with those of
the fan-in that is left. The places of random edges follow from a seed and are not counted.

Hashes would be computed anew at every step (`hashml.sharing.HashedDense`). For the speed of experiments
alone they are computed once, and slots and signs kept as arrays: the "materialised" form. The virtual matrix
is the same bit for bit, which a test asserts; the arrays are not part of the model and are not counted.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.sharing.image_models import Apply
from hashml.accounting import stored_bytes
from hashml.models.classifiers import MLP
from hashml.sharing import element_map
from hashml.sharing.hashed_net import uniform_init
from hashml.sharing.pruning import apply_mask, mask_from_scores, pruned_bytes, random_scores

METHODS = {
    "hashed": "HashedNet",
    "small": "small dense net",
    "random_edges": "random edges",
    "low_rank": "low rank",
}
"""What stands against the dense net, with its name in reports."""


class Contender(NamedTuple):
    """What `train_and_score` takes, and the bytes that one run stores."""

    apply: Apply
    params: Any
    constants: Any
    bytes: int


def make(method: str, sizes: Sequence[int], compression: int, seeds: Sequence[int]) -> Contender:
    """A contender of the dense net ``sizes`` (inputs, hidden widths, classes) in its bytes over ``compression``.

    Raises:
        ValueError: for an unknown method, or a compression that the method cannot meet.
    """
    sizes = tuple(sizes)
    budget = floats(sizes) // compression
    match method:
        case "dense":
            return _dense(sizes, seeds)
        case "small":
            hidden = small_widths(sizes, budget)
            return _dense((sizes[0], *hidden, sizes[-1]), seeds)
        case "hashed":
            return _hashed(sizes, weights(sizes, budget), seeds)
        case "random_edges":
            return _random_edges(sizes, weights(sizes, budget), seeds)
        case "low_rank":
            return _low_rank(sizes, ranks(sizes, budget), seeds)
        case _:
            raise ValueError(f"method is {method!r}; it must be 'dense' or one of {', '.join(map(repr, METHODS))}")


def floats(sizes: Sequence[int]) -> int:
    """Weights and biases of a dense net."""
    return sum(a * b + b for a, b in itertools.pairwise(sizes))


def weights(sizes: Sequence[int], budget: int) -> tuple[int, ...]:
    """Weights of each layer, in proportion to its matrix, once every bias has its float."""
    matrices = [a * b for a, b in itertools.pairwise(sizes)]
    left = budget - sum(sizes[1:])
    shares = tuple(left * matrix // sum(matrices) for matrix in matrices)
    if min(shares) < 1:
        raise ValueError(f"budget is {budget}; it must hold {sum(sizes[1:])} biases and a weight for every layer")
    return shares


def small_widths(sizes: Sequence[int], budget: int) -> tuple[int, ...]:
    """The hidden widths, scaled by the largest factor that fits: the positive root of a quadratic.

    With widths ``t * h_l`` the net has ``a t^2 + b t + c`` floats; widths are rounded down, one at least.
    """
    hidden = sizes[1:-1]
    a = sum(first * second for first, second in itertools.pairwise(hidden))
    b = hidden[0] * sizes[0] + hidden[-1] * sizes[-1] + sum(hidden)
    c = sizes[-1] - budget
    factor = (-b + (b * b - 4 * a * c) ** 0.5) / (2 * a) if a else -c / b
    widths = tuple(max(1, int(factor * width + 1e-9)) for width in hidden)
    if floats((sizes[0], *widths, sizes[-1])) > budget:
        raise ValueError(f"budget is {budget}; a net of hidden widths {widths} does not fit")
    return widths


def ranks(sizes: Sequence[int], budget: int) -> tuple[int, ...]:
    """Ranks of the factors: one each, then one more where the least share of the matrix is stored, while it fits."""
    shapes = list(itertools.pairwise(sizes))
    costs = [a + b for a, b in shapes]
    chosen = [1] * len(shapes)
    left = budget - sum(sizes[1:]) - sum(costs)
    if left < 0:
        raise ValueError(f"budget is {budget}; rank one and the biases take {budget - left}")
    while True:
        # Beyond a b / (a + b) factors would be larger than the matrix.
        open_ = [i for i, (a, b) in enumerate(shapes) if costs[i] <= left and (chosen[i] + 1) * costs[i] <= a * b]
        if not open_:
            return tuple(chosen)
        next_ = min(open_, key=lambda i: chosen[i] * costs[i] / (shapes[i][0] * shapes[i][1]))
        chosen[next_] += 1
        left -= costs[next_]


def _per_seed(draw: Callable[[Array], Any], seeds: Sequence[int]) -> Any:
    """What ``draw`` makes of the key of each seed, stacked."""
    return jax.jit(jax.vmap(draw))(jnp.stack([jax.random.key(seed) for seed in seeds]))


def _spread(layer: int, sizes: Sequence[int]) -> float:
    """Standard deviation of a layer's initial weights in the dense net: He's, and 1 / fan_in in the last."""
    return ((1 if layer == len(sizes) - 2 else 2) / sizes[layer]) ** 0.5


def _layers(sizes: Sequence[int], kernel: Any, bias: Any, x: Array) -> Array:
    """An MLP whose layer ``i`` multiplies by ``kernel(i, h)`` and adds ``bias[i]``."""
    h = x.reshape(len(x), -1)
    for i in range(len(sizes) - 1):
        h = kernel(i, h) + bias[i]
        h = nn.relu(h) if i < len(sizes) - 2 else h
    return h


def _dense(sizes: tuple[int, ...], seeds: Sequence[int]) -> Contender:
    model = MLP(sizes[1:])

    def start(key: Array) -> Any:
        return model.init(key, jnp.zeros((1, sizes[0])))["params"]

    def apply(params: Any, constants: Any, x: Array) -> Array:
        logits: Any = model.apply({"params": params}, x)
        return logits

    return Contender(apply, _per_seed(start, seeds), None, stored_bytes(jax.eval_shape(start, jax.random.key(0))))


def _random_edges(sizes: tuple[int, ...], kept: tuple[int, ...], seeds: Sequence[int]) -> Contender:
    """The dense net with ``kept`` weights a layer, drawn at random, which start as in a net of their fan-in."""
    dense = _dense(sizes, seeds)
    shares = {f"Dense_{i}": kept[i] / (sizes[i] * sizes[i + 1]) for i in range(len(kept))}
    params = {
        name: {**layer, "kernel": layer["kernel"] / shares[name] ** 0.5} for name, layer in dense.params.items()
    }
    one = jax.tree.map(lambda leaf: leaf[0], params)

    def mask(key: Array) -> Any:
        scores = random_scores(one, jax.random.fold_in(key, 1))
        return {name: mask_from_scores(scores[name], share) for name, share in shares.items()}

    masks = _per_seed(mask, seeds)

    def apply(params: Any, mask: Any, x: Array) -> Array:
        return dense.apply(apply_mask(params, mask), None, x)

    stored = pruned_bytes(one, jax.tree.map(lambda leaf: leaf[0], masks), index="none")
    return Contender(apply, params, masks, stored)


def _hashed(sizes: tuple[int, ...], budgets: tuple[int, ...], seeds: Sequence[int]) -> Contender:
    def start(key: Array) -> dict[str, Any]:
        keys = jax.random.split(key, len(budgets))
        memories = [uniform_init(_spread(i, sizes))(keys[i], (budget,)) for i, budget in enumerate(budgets)]
        return {"memory": memories, "bias": [jnp.zeros(size) for size in sizes[1:]]}

    def apply(params: Any, maps: Any, x: Array) -> Array:
        def product(i: int, h: Array) -> Array:
            return h @ materialised(params["memory"][i], maps[i]).T

        return _layers(sizes, product, params["bias"], x)

    maps = [[precomputed(sizes, budgets, layer, seed) for layer in range(len(budgets))] for seed in seeds]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *maps)
    return Contender(apply, _per_seed(start, seeds), stacked, stored_bytes(jax.eval_shape(start, jax.random.key(0))))


class Materialised(NamedTuple):
    """Slots and signs of a layer's virtual matrix ``[outputs, inputs]``."""

    slots: Array
    signs: Array


def precomputed(sizes: Sequence[int], budgets: Sequence[int], layer: int, seed: int) -> Materialised:
    """What a `HashedDense` of ``budgets[layer]`` and `hash_seed` hashes anew at every step."""
    sharing = element_map(sizes[layer + 1], sizes[layer], budgets[layer], seed=hash_seed(layer, seed))
    rows = np.arange(sharing.rows, dtype=np.uint32)
    slots, signs = sharing.slots(rows), sharing.signs(rows)
    return Materialised(jnp.asarray(slots, jnp.int32), jnp.asarray(signs, jnp.int8))


def hash_seed(layer: int, seed: int) -> int:
    """Layers of one net, and nets of different seeds, have hash functions of their own."""
    return 1000 * seed + layer


def materialised(memory: Array, given: Materialised) -> Array:
    """The virtual matrix."""
    return memory.at[given.slots].get(mode="promise_in_bounds") * given.signs.astype(memory.dtype)


def _low_rank(sizes: tuple[int, ...], chosen: tuple[int, ...], seeds: Sequence[int]) -> Contender:
    """Both factors trained, from a product with the variance of the dense net's matrix."""

    def start(key: Array) -> dict[str, Any]:
        left, right = [], []
        for i, (rank, one) in enumerate(zip(chosen, jax.random.split(key, len(chosen)), strict=True)):
            first, second = jax.random.split(one)
            left.append(jax.random.normal(first, (sizes[i], rank)) * rank**-0.5)
            right.append(jax.random.normal(second, (rank, sizes[i + 1])) * _spread(i, sizes))
        return {"left": left, "right": right, "bias": [jnp.zeros(size) for size in sizes[1:]]}

    def apply(params: Any, constants: Any, x: Array) -> Array:
        return _layers(sizes, lambda i, h: h @ params["left"][i] @ params["right"][i], params["bias"], x)

    return Contender(apply, _per_seed(start, seeds), None, stored_bytes(jax.eval_shape(start, jax.random.key(0))))
