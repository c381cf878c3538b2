"""The contenders of `experiments.sharing.stable_rps`: shared, smaller and pruned nets of as many stored weights."""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from experiments.data import images
from experiments.data.clicks import Splits
from experiments.data.images import Images
from experiments.sharing.image_models import Apply, Optimizer, Outcome, momentum, train, train_and_score
from hashml.accounting import stored_bytes
from hashml.models.classifiers import MLP, ConvNet
from hashml.models.convolution import patches_convolution
from hashml.sharing import pruning
from hashml.sharing.lottery_ticket import lottery_ticket
from hashml.sharing.pruning import apply_mask, kept_weights, mask_from_scores, prune, pruned_bytes
from hashml.sharing.share import Shared, share
from hashml.sharing.stable_rps import gradient_scaler, scale_by_sharing

Name = Literal["fashion_mnist", "cifar10_subset"]
TITLES = {"fashion_mnist": "Fashion-MNIST, MLP", "cifar10_subset": "CIFAR-10 (part), ConvNet"}
SHARED = {"rps": "RPS", "roast_element": "ROAST, elements", "roast_tile": "ROAST, tiles"}
AT_INIT = {"random": "random", "magnitude": "magnitude", "snip": "SNIP", "grasp": "GraSP", "synflow": "SynFlow"}
METHODS = {**SHARED, "small": "smaller net", **AT_INIT, "ltr": "lottery ticket"}
CLASSES = 10
TILE = (8, 8)
"""So that a memory at 1000x holds a tile."""
ROAST_SPREAD = 0.04
"""Standard deviation of ROAST's memory in the reference code."""


@dataclass(frozen=True)
class Config:
    """The paper's range of compressions on a small machine."""

    data: tuple[Name, ...] = ("fashion_mnist", "cifar10_subset")
    compressions: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000)
    """Weights of the kernels over weights stored; for Fashion-MNIST."""
    cifar_compressions: tuple[int, ...] = (10, 100)
    ltr_compressions: tuple[int, ...] = (10, 100, 1000)
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Peaks of the schedule, for dense and pruned nets; each contender has its search at each compression."""
    rps_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """The best one grows with compression."""
    roast_rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
    """Without the scaler the best one falls with compression."""
    hidden: tuple[int, ...] = (256, 256)
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of the convolutions."""
    epochs: int = 6
    cifar_epochs: int = 4
    batch_size: int = 64
    train: int = 6000
    cifar_train: int = 5000
    validation: int = 3000
    test: int | None = None
    ltr_levels: int = 3
    synflow_steps: int = 100
    stability_compression: int = 10
    stability_rate: float = 0.1
    init_stds: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0, 10.0)
    """Spread of the memory at initialisation."""
    seeds: int = 3
    """Of initial weights, hash functions and the order of images; the split is one."""


@functools.cache
def split(config: Config, data: Name) -> Splits[Images]:
    """Standardised train, validation and test images."""
    rows = config.train if data == "fashion_mnist" else config.cifar_train
    validation = config.validation if data == "fashion_mnist" else min(config.validation, 6000 - rows)
    return images.splits(data, train=rows, validation=validation, test=config.test)


def steps_of(config: Config, data: Name) -> int:
    epochs = config.epochs if data == "fashion_mnist" else config.cifar_epochs
    return epochs * (len(split(config, data).train) // config.batch_size)


class Contender(NamedTuple):
    """What `train_and_score` takes, and the bytes that each seed's net stores."""

    apply: Apply
    params: Any
    constants: Any
    optimizer: Optimizer
    bytes: list[int]
    bitmap_bytes: list[int]
    """With the places of non-zeros as a bitmap; as ``bytes`` where there are none to say."""


@functools.lru_cache(maxsize=2)
def make(config: Config, data: Name, method: str, compression: int) -> Contender:
    """A contender in the dense net's kernel weights over ``compression``.

    Raises:
        ValueError: for an unknown method, or a smaller net that does not fit.
    """
    match method:
        case "dense":
            return _dense(config, data, model(config, data))
        case "small":
            smaller = smaller_net(config, data, compression)
            if smaller is None:
                raise ValueError(f"compression is {compression}; no net of {data} is as small")
            return _dense(config, data, smaller)
        case "rps":
            return shared_net(config, data, "fold", compression, "v1", 1.0)
        case "roast_element" | "roast_tile":
            kind = "element" if method == "roast_element" else "tile"
            return shared_net(config, data, kind, compression, "none", ROAST_SPREAD)
        case _ if method in AT_INIT or method == "ltr":
            return _pruned(config, data, method, 1 / compression)
        case _:
            raise ValueError(f"method is {method!r}; it must be 'dense' or one of {', '.join(map(repr, METHODS))}")


@functools.cache
def model(config: Config, data: Name) -> nn.Module:
    """The dense net."""
    return MLP((*config.hidden, CLASSES)) if data == "fashion_mnist" else _conv_net(config.widths)


def _conv_net(widths: tuple[int, ...]) -> ConvNet:
    # Nets of all seeds and rates train together in one loop, where XLA's own convolutions crawl on a CPU.
    return ConvNet(widths, CLASSES, convolution=patches_convolution)


def _image(config: Config, data: Name) -> Array:
    return jnp.zeros((1, *split(config, data).train.images.shape[1:]))


@functools.cache
def _initial(config: Config, data: Name, net: nn.Module) -> Any:
    """Parameters, stacked over the seeds."""
    keys = jnp.stack([jax.random.key(seed) for seed in range(config.seeds)])
    return jax.jit(jax.vmap(lambda key: net.init(key, _image(config, data))["params"]))(keys)


def _kernel_weights(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim >= 2)


@functools.cache
def _plain(net: nn.Module) -> Apply:
    return lambda params, _, x: jnp.asarray(net.apply({"params": params}, x))


@functools.cache
def _masked(net: nn.Module) -> Apply:
    return lambda params, mask, x: jnp.asarray(net.apply({"params": apply_mask(params, mask)}, x))


@functools.cache
def _expanding(net: nn.Module) -> Apply:
    return lambda params, constants, x: jnp.asarray(net.apply({"params": expanded(params, constants)}, x))


def _dense(config: Config, data: Name, net: nn.Module) -> Contender:
    params = _initial(config, data, net)
    sizes = [stored_bytes(jax.tree.map(lambda leaf: leaf[0], params))] * config.seeds
    return Contender(_plain(net), params, None, momentum, sizes, sizes)


@functools.cache
def smaller_net(config: Config, data: Name, compression: int) -> nn.Module | None:
    """The net whose hidden widths are scaled by the largest factor that fits; None where none does."""
    full = model(config, data)

    def shapes(net: nn.Module) -> Any:
        return jax.eval_shape(net.init, jax.random.key(0), _image(config, data))["params"]

    dense = shapes(full)
    kernels = _kernel_weights(dense)
    floats = stored_bytes(dense) // 4 - kernels + kept_weights(kernels, 1 / compression)
    for step in range(200, 0, -1):
        if isinstance(full, MLP):
            net = MLP((*(max(1, width * step // 200) for width in config.hidden), CLASSES))
        else:
            net = _conv_net(tuple(max(1, width * step // 200) for width in config.widths))
        if stored_bytes(shapes(net)) // 4 <= floats:
            return net
    return None


def geometry(config: Config, data: Name, map: Any, compression: int, seed: int, init_std: float) -> Shared:
    params = jax.tree.map(lambda leaf: leaf[seed], _initial(config, data, model(config, data)))
    budget = kept_weights(_kernel_weights(params), 1 / compression)
    return share(model(config, data), {"params": params}, budget=budget, map=map, seed=seed, tile=TILE,
                 init_std=init_std, min_size=1)  # fmt: skip


def shared_net(
    config: Config, data: Name, map: Any, compression: int, version: Literal["v1", "none"], init_std: float
) -> Contender:
    params, constants, sizes = [], [], []
    for seed in range(config.seeds):
        shared = geometry(config, data, map, compression, seed, init_std)
        start = shared.init(jax.random.key(seed), _image(config, data))["params"]
        params.append(start)
        constants.append(materialised(shared) | {"gamma": jnp.asarray(gradient_scaler(shared, version), jnp.float32)})
        sizes.append(stored_bytes(start))
    stack = functools.partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
    net = model(config, data)
    return Contender(_expanding(net), stack(*params), stack(*constants), scaled_momentum, sizes, sizes)


def materialised(shared: Shared) -> dict[str, Any]:
    """Slots, and signs times scales, of every shared array."""
    index = jnp.arange(1, shared.budget + 1, dtype=jnp.float32)  # exact up to 2**24 slots
    placed = {leaf.path: shared.placement.expand(index, leaf.shape, leaf.offset) for leaf in shared.leaves}
    factors = {leaf.path: jnp.sign(placed[leaf.path]) * leaf.scale for leaf in shared.leaves}
    slots = {path: jnp.abs(array).astype(jnp.int32) - 1 for path, array in placed.items()}
    return {"slots": unflatten_dict(slots), "factors": unflatten_dict(factors)}


def expanded(params: Any, constants: Any) -> Any:
    """The net's own parameters."""
    arrays = jax.tree.map(
        lambda slots, factors: params["memory"][slots] * factors, constants["slots"], constants["factors"]
    )
    return unflatten_dict(flatten_dict(arrays) | flatten_dict(params.get("dense", {})))


def scaled_momentum(schedule: optax.Schedule, constants: Any) -> optax.GradientTransformation:
    """Momentum on gradients divided by Gamma, which is 1 without the scaler."""
    return optax.chain(scale_by_sharing(constants["gamma"]), momentum(schedule))


def _pruned(config: Config, data: Name, method: str, density: float) -> Contender:
    net = model(config, data)
    params = _initial(config, data, net)
    if method == "ltr":
        ticket = _ticket(config, data, density)
        params, masks = ticket.params, ticket.mask
    else:
        masks = jax.jit(jax.vmap(functools.partial(_mask, config, data, net, method, density)))(
            params, jnp.arange(config.seeds)
        )
    sizes = {
        index: [
            pruned_bytes(*jax.tree.map(lambda leaf, i=seed: leaf[i], (params, masks)), index=index)
            for seed in range(config.seeds)
        ]
        for index in ("none", "bitmap")
    }
    return Contender(_masked(net), params, masks, _masked_momentum, sizes["none"], sizes["bitmap"])


def _masked_momentum(schedule: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    return pruning.masked(momentum(schedule), mask)


def _mask(config: Config, data: Name, net: nn.Module, method: str, density: float, params: Any, seed: Array) -> Any:
    part = split(config, data).train
    # Ten examples a class, the first of each.
    rows = np.concatenate([np.flatnonzero(part.labels == label)[:10] for label in range(CLASSES)])
    x, labels = jnp.asarray(part.images[rows]), jnp.asarray(part.labels[rows])

    def apply(params: Any, x: Array) -> Array:
        return jnp.asarray(net.apply({"params": params}, x))

    match method:
        case "random":
            scores = pruning.random_scores(params, jax.random.fold_in(jax.random.key(1), seed))
        case "magnitude":
            scores = pruning.magnitude_scores(params)
        case "snip":
            scores = pruning.snip_scores(apply, params, x, labels)
        case "grasp":
            scores = pruning.grasp_scores(apply, params, x, labels)
        case _:
            flow = functools.partial(pruning.synflow_scores, apply, input_shape=part.images.shape[1:])
            return prune(lambda params: flow(params=params), params, density, steps=config.synflow_steps)
    return mask_from_scores(scores, density)


def _ticket(config: Config, data: Name, density: float) -> Any:
    """Levels at the rate that the dense net chose; rewound to its weights after 1 % of training."""
    net, steps = model(config, data), steps_of(config, data)
    rate = dense_rate(config, data)
    options: dict[str, Any] = {"learning_rates": (rate,), "steps": steps, "batch_size": config.batch_size}
    options |= {"seeds": range(config.seeds)}
    part = split(config, data).train

    def complete(start: Any, mask: Any) -> Any:
        found = train(_masked(net), start, part, constants=mask, optimizer=_masked_momentum, **options)
        return jax.tree.map(lambda leaf: leaf[:, 0], found.params)

    def early(params: Any) -> Any:
        found = train(_plain(net), params, part, stop=max(1, steps // 100), **options)
        return jax.tree.map(lambda leaf: leaf[:, 0], found.params)

    params = _initial(config, data, net)
    return lottery_ticket(complete, params, density, config.ltr_levels, rewind=early, stacked=True)


@functools.cache
def score(config: Config, data: Name, method: str, compression: int) -> Outcome:
    """All seeds and rates of a contender."""
    return train_at(config, data, make(config, data, method, compression), rates_of(config, method))


def train_at(config: Config, data: Name, contender: Contender, rates: tuple[float, ...]) -> Outcome:
    """A contender, trained and scored at each rate."""
    return train_and_score(
        contender.apply,
        contender.params,
        tuple(split(config, data)),
        learning_rates=rates,
        steps=steps_of(config, data),
        batch_size=config.batch_size,
        seeds=range(config.seeds),
        constants=contender.constants,
        optimizer=contender.optimizer,
    )


def rates_of(config: Config, method: str) -> tuple[float, ...]:
    """The rates that a method is searched over."""
    return config.rps_rates if method == "rps" else config.roast_rates if method in SHARED else config.rates


def dense_rate(config: Config, data: Name) -> float:
    """The rate that the dense net chose."""
    outcome = score(config, data, "dense", 1)
    return outcome.learning_rates[outcome.chosen()]
