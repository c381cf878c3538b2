"""NCF trained by clients that are users of MovieLens-1M, under any plan of devices and servers.

Every client is one user: what it likes is its data, so that no two clients have the same distribution. Its
own vectors never leave it. A run goes through all its rounds in one compiled scan, for all learning rates
side by side, and scores all items for all users on the way.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Int32

from experiments.data import movielens_1m
from hashml.distributed import DeviceGroup, ServerState, TableForm, federated_round
from hashml.models.ncf import NCFHead, NCFVectors, bpr_batches, ncf_bpr_loss

TOWERS = ("gmf", "mlp")
"""Names of the item tables; with one layer both are of the same width."""

CUTOFF = 20
"""Items of a list."""


class Clients(NamedTuple):
    """Items that each user likes, in three parts; rows in increasing order, padded with ``items``."""

    train: Int32[np.ndarray, "N S"]
    validation: Int32[np.ndarray, "N V"]
    test: Int32[np.ndarray, "N R"]
    items: int


class Part(NamedTuple):
    """Devices of one form: a class of a server."""

    form: Callable[[Array], TableForm]
    """Of the salt of a run; hashable, so the same object wherever it is to be the same program."""
    members: tuple[int, ...]
    """Clients, by their place in the order that a run draws."""
    devices: int
    """Sampled from them in each round."""


class Server(NamedTuple):
    """A model, the devices that train it, and the clients that it is scored on."""

    parts: tuple[Part, ...]
    audience: tuple[int, ...]


class Curves(NamedTuple):
    """NDCG of each client at each evaluation of each learning rate."""

    validation: Float[np.ndarray, "rates evaluations N"]
    test: Float[np.ndarray, "rates evaluations N"]


@functools.cache
def clients(users: int, seed: int, fewest: int, most: int) -> Clients:
    """Users drawn by ``seed`` among those who like ``fewest`` to ``most`` films (4 or 5 stars).

    A fifth of a user's films is the test part; of the rest a tenth is the validation part.

    Raises:
        ValueError: where there are fewer such users.
    """
    data = movielens_1m.ratings()
    user, item = data.user[data.level == 2], data.item[data.level == 2]
    counts = np.bincount(user, minlength=len(data.male))
    eligible = np.flatnonzero((counts >= fewest) & (counts <= most))
    if len(eligible) < users:
        raise ValueError(f"users is {users}; {len(eligible)} users like {fewest} to {most} films")
    rng = np.random.default_rng(seed)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for chosen in rng.choice(eligible, users, replace=False):
        films = rng.permutation(item[user == chosen])
        held, rest = np.split(films, [len(films) // 5])
        validation, train = np.split(rest, [-(-len(rest) // 10)])
        for part, ids in zip(parts, (train, validation, held), strict=True):
            part.append(np.sort(ids))
    items = len(data.genres)
    # Of one width whatever the seed, so that all runs share one compiled program.
    widths = (most, -(-most // 10), most // 5)
    train, validation, test = (_padded(part, width, items) for part, width in zip(parts, widths, strict=True))
    return Clients(train, validation, test, items)


def _padded(rows: Sequence[np.ndarray], width: int, fill: int) -> Int32[np.ndarray, "N W"]:
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=fill) for row in rows]).astype(np.int32)


def ndcg(scores: Float[Array, "N I"], relevant: Bool[Array, "N I"], cutoff: int = CUTOFF) -> Float[Array, " N"]:
    """Normalised discounted cumulative gain of the first ``cutoff`` items; NaN for a row with none relevant."""
    discounts = 1 / jnp.log2(jnp.arange(2, cutoff + 2))
    _, order = jax.lax.top_k(scores, cutoff)
    gained = (jnp.take_along_axis(relevant, order, axis=1) * discounts).sum(axis=1)
    best = jnp.cumsum(discounts)[jnp.clip(relevant.sum(axis=1), 1, cutoff) - 1]
    return jnp.where(relevant.any(axis=1), gained / best, jnp.nan)


def popularity(data: Clients) -> Float[np.ndarray, " N"]:
    """NDCG of each client on the test part where items are ranked by how many clients trained on them."""
    counts = np.bincount(data.train.reshape(-1), minlength=data.items + 1)[: data.items]
    scores = jnp.broadcast_to(jnp.asarray(counts, jnp.float32), (len(data.train), data.items))
    train, validation, test = (_flags(jnp.asarray(part), data.items) for part in data[:3])
    return np.asarray(ndcg(jnp.where(train | validation, -jnp.inf, scores), test))


def _flags(ids: Int[Array, "N S"], items: int) -> Bool[Array, "N items"]:
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], items), bool).at[rows, ids].set(True, mode="drop")


class Training(NamedTuple):
    """What all contenders have in common; hashable, part of a program's identity."""

    features: int
    epochs: int
    batch_size: int
    rounds: int
    evaluations: int
    regularization: float
    aggregation: str


def train_and_score(
    servers: tuple[Server, ...], training: Training, data: Clients, *, rates: Sequence[float], seed: int
) -> Curves:
    """Every client's NDCG, on the server that has it in its audience.

    Args:
        servers: the plan. Its client numbers are places in an order drawn from ``seed``, so that who has
            which capacity differs from seed to seed while the program stays the same.
        training: sizes.
        data: of the clients.
        rates: learning rates of Adam, trained side by side from one start.
        seed: of the order, the start, the sampling and the maps.
    """
    order = np.random.default_rng([seed, 1]).permutation(len(data.train))
    places = np.argsort(order)
    parts = [jnp.asarray(part[order]) for part in data[:3]]
    sampled = tuple(tuple((part.members, part.devices) for part in server.parts) for server in servers)
    groups = _groups(sampled, training, data.items, parts[0], jax.random.fold_in(jax.random.key(seed), 1))
    validation, test = _run(servers, training, data.items, *parts, groups, jnp.asarray(rates), jnp.uint32(seed))
    return Curves(np.asarray(validation)[..., places], np.asarray(test)[..., places])


def order_of(clients: int, seed: int) -> Int[np.ndarray, " N"]:
    """Which client has each of the places that a plan numbers."""
    return np.random.default_rng([seed, 1]).permutation(clients)


def start(key: Array, users: int, items: int, features: int) -> ServerState:
    """A model before its first round."""
    head_key, *keys = jax.random.split(key, 5)
    tables = [
        0.01 * jax.random.normal(k, (n, features)) for k, n in zip(keys, (items, items, users, users), strict=True)
    ]
    one = NCFVectors(jnp.zeros(features), jnp.zeros(features))
    head = NCFHead(features).init(head_key, one, one)
    return ServerState(dict(zip(TOWERS, tables[:2], strict=True)), head, dict(zip(TOWERS, tables[2:], strict=True)))


def local_loss(features: int, regularization: float) -> Any:
    """BPR of one client, whose user vectors are its private parameters."""
    head = NCFHead(features)

    def loss(rows: Any, shared: Any, private: Any, batch: Any) -> Float[Array, ""]:
        def items(ids: Array) -> NCFVectors:
            return NCFVectors(*(rows(tower, ids) for tower in TOWERS))

        positive, negatives = items(batch.positive), items(batch.negatives)
        user = NCFVectors(*(jnp.broadcast_to(private[t], (*batch.positive.shape, features)) for t in TOWERS))

        def score(user: NCFVectors, item: NCFVectors) -> Array:
            return jnp.asarray(head.apply(shared, user, item))

        return ncf_bpr_loss(score, user, positive, negatives, regularization=regularization, weights=batch.weights)

    return loss


def all_scores(state: ServerState, features: int) -> Float[Array, "N items"]:
    """Every client's score of every item."""
    users = NCFVectors(*(state.private[tower][:, None] for tower in TOWERS))
    items = NCFVectors(*(state.tables[tower][None] for tower in TOWERS))
    return jnp.asarray(NCFHead(features).apply(state.shared, users, items))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _groups(
    sampled: tuple[tuple[tuple[tuple[int, ...], int], ...], ...],
    training: Training,
    items: int,
    train: Array,
    key: Array,
) -> list[list[DeviceGroup]]:
    """The sampled devices and their batches, ``[evaluations, rounds between them, K, ...]``, for all parts.

    Apart from `_run`, since contenders with the same members share it, and random bits compile slowly.
    """
    make = functools.partial(bpr_batches, items=items, epochs=training.epochs, batch_size=training.batch_size)
    sizes = (train < items).sum(axis=1).astype(jnp.float32)

    def one(members: tuple[int, ...], devices: int, key: Array) -> DeviceGroup:
        choice, data = jax.random.split(key)
        chosen = jax.random.choice(choice, jnp.asarray(members), (devices,), replace=False)
        batches, active = jax.vmap(make)(jax.random.split(data, devices), train[chosen])
        return DeviceGroup(chosen, sizes[chosen], batches, active)

    groups = []
    for number, parts in enumerate(sampled):
        of_server = []
        for place, (members, devices) in enumerate(parts):
            own = jax.random.fold_in(jax.random.fold_in(key, number), place)
            keys = jax.random.split(own, (training.evaluations, training.rounds // training.evaluations))
            draw = jax.vmap(jax.vmap(functools.partial(one, members, devices)))
            of_server.append(draw(keys))
        groups.append(of_server)
    return groups


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    servers: tuple[Server, ...],
    training: Training,
    items: int,
    train: Array,
    validation: Array,
    test: Array,
    groups: list[list[DeviceGroup]],
    rates: Array,
    seed: Array,
) -> tuple[Array, Array]:
    users = train.shape[0]
    seen, held, wanted = (_flags(ids, items) for ids in (train, validation, test))
    loss = local_loss(training.features, training.regularization)
    salt = seed * jnp.uint32(0x9E3779B9) + jnp.uint32(1)

    forms = [[dict.fromkeys(TOWERS, part.form(salt)) for part in server.parts] for server in servers]

    def one_round(
        states: tuple[ServerState, ...], groups: list[list[DeviceGroup]]
    ) -> tuple[tuple[ServerState, ...], None]:
        moved = []
        for state, sampled, classes in zip(states, groups, forms, strict=True):

            def with_rate(state: ServerState, rate: Array, groups=sampled, classes=classes) -> ServerState:
                return federated_round(
                    state,
                    groups,
                    classes,
                    loss=loss,
                    optimizer=optax.adam(rate),
                    aggregation=training.aggregation,
                    salt=salt,
                    at_a_time=1,
                )

            moved.append(jax.vmap(with_rate)(state, rates))
        return tuple(moved), None

    def score(states: tuple[ServerState, ...]) -> tuple[Array, Array]:
        found = jnp.full((2, users), jnp.nan)
        for server, state in zip(servers, states, strict=True):
            scores = all_scores(state, training.features)
            scores = jnp.where(jnp.isfinite(scores), scores, -1e30)  # a diverged run ranks by the item's number
            scores = jnp.where(seen, -jnp.inf, scores)
            both = jnp.stack([ndcg(scores, held), ndcg(jnp.where(held, -jnp.inf, scores), wanted)])
            audience = jnp.asarray(server.audience)
            found = found.at[:, audience].set(both[:, audience])
        return found[0], found[1]

    def stretch(states: Any, groups: Any) -> tuple[Any, tuple[Array, Array]]:
        states, _ = jax.lax.scan(one_round, states, groups)
        return states, jax.lax.map(score, states)

    first = start(jax.random.key(seed), users, items, training.features)
    stacked = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], rates.shape[0], axis=0), first)
    _, (by_validation, by_test) = jax.lax.scan(stretch, (stacked,) * len(servers), groups)
    return jnp.swapaxes(by_validation, 0, 1), jnp.swapaxes(by_test, 0, 1)
