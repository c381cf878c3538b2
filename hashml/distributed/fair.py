"""FAIR: federated averaging in random subspaces (Desai, Meisburger, Liu, Shrivastava 2023, arXiv 2311.01722).

The server holds tables W of n rows; a device of capacity c < 1 never does. With the nested maps of
`hashml.sharing.nested`, of one seed for everybody, a round is

    device i of size m:  psi_i <- collapse_m(W);  E local epochs on psi_i from a fresh optimiser
    server:              W <- sum_i w_i expand_m(psi_i)        w_i = |data_i| / sum |data|

and a device of capacity 1 copies W instead. Since expand is linear, devices of one size are averaged as
psi, and the mean is expanded once: a device sends m weights. The other shared parameters (towers) are
averaged as they are. Departures from the reference: empty slots are 0 and counts are exact (it divides by
count + 1e-3, which shrinks every weight at every round); what belongs to a user stays on the user's
device, where it averages the user tables of devices that were not even sampled.

A round treats devices of equal form together (`DeviceGroup`), as one `jax.vmap`, over an axis of a mesh
where there is one. How a device holds a table is a `TableForm`, three pure functions; the baselines are
other forms (`hashml.distributed.federated_baselines`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt32

from hashml.accounting import stored_bytes
from hashml.sharing.maps import SharingMap, collapse, expand
from hashml_kernels import bits
from hashml_kernels.manual_axes import varying_alike

Params = Any
"""Pytree of arrays."""
Salt = Any
"""A uint32 word that picks one of a form's maps; a scalar that may be traced."""
Memory = Any
"""What a device holds of a table: a pytree of arrays."""


class TableForm(NamedTuple):
    """How the devices of one capacity hold a table ``[n, d]`` of the server.

    Attributes:
        download: ``(table, salt) -> memory``, at the server.
        read: ``(memory, ids, salt) -> rows [*ids, d]``, on the device; differentiable in the memory.
        upload: ``(memory, salt) -> table``, at the server.
        common: the devices have one salt, that of the round; else each has its own.
        linear: ``upload`` is linear in the memory. Where it is also common, memories are averaged first.
        covers: 1 where the form can say something of an entry and 0 where not; broadcasts against the table.
    """

    download: Callable[[Array, Salt], Memory]
    read: Callable[[Memory, Array, Salt], Array]
    upload: Callable[[Memory, Salt], Array]
    common: bool = True
    linear: bool = True
    covers: Any = 1.0


Forms = Mapping[str, TableForm]
"""The form of each table, by its name."""


class ServerState(NamedTuple):
    """All that a round changes; a pytree."""

    tables: dict[str, Float[Array, "n d"]]
    shared: Params
    """Copied to every device and averaged."""
    private: Params
    """What stays on the devices: arrays whose leading axis are the clients."""


class DeviceGroup(NamedTuple):
    """The devices of one form that a round has sampled, ``K`` places."""

    clients: Int[Array, " K"]
    """Distinct rows of ``ServerState.private``."""
    weights: Float[Array, " K"]
    """Each device's share of the data, up to a common factor; 0 for a place that is not taken."""
    batches: Any
    """Pytree of arrays ``[K, steps, ...]``."""
    active: Bool[Array, "K steps"]
    """The steps that a device makes: one with less data makes fewer."""


class Traffic(NamedTuple):
    """Bytes that one device moves in a round."""

    down: int
    up: int


LossFn = Callable[[Callable[[str, Array], Array], Params, Params, Any], Float[Array, ""]]
"""``loss(rows, shared, private, batch)``; ``rows(name, ids)`` reads a table, private is the device's own."""


def whole_table() -> TableForm:
    """The table itself: a device of capacity 1."""
    return TableForm(
        download=lambda table, salt: table,
        read=lambda table, ids, salt: table.at[ids].get(mode="promise_in_bounds"),
        upload=lambda table, salt: table,
    )


def subspace_table(make_map: Callable[[Salt], SharingMap]) -> TableForm:
    """FAIR: the table's nearest point in the span of a sharing map.

    Args:
        make_map: the map of a salt, ``lambda salt: nested_map(rows, columns, m, full_budget=..., salt=salt)``.
    """
    return TableForm(
        download=lambda table, salt: collapse(make_map(salt), table),
        read=lambda memory, ids, salt: make_map(salt).expand_rows(memory, ids),
        upload=lambda memory, salt: expand(make_map(salt), memory),
    )


def download(forms: Forms, tables: Mapping[str, Array], salt: Salt = 0) -> dict[str, Memory]:
    """What a device gets of each table.

    Raises:
        ValueError: where the names of forms and tables differ.
    """
    if forms.keys() != tables.keys():
        raise ValueError(f"forms are of tables {sorted(forms)}; the server has {sorted(tables)}")
    return {name: form.download(tables[name], salt) for name, form in forms.items()}


def traffic(forms: Forms, state: ServerState) -> Traffic:
    """Bytes down and up of one device in a round, from the arrays that travel; nothing is computed.

    Its private parameters stay where they are, and hash functions are a seed that everybody knows.
    """
    memory = jax.eval_shape(lambda tables: download(forms, tables), state.tables)
    count = stored_bytes((memory, jax.eval_shape(lambda: state.shared)))
    return Traffic(count, count)


def train_locally(
    memory: dict[str, Memory],
    shared: Params,
    private: Params,
    batches: Any,
    active: Bool[Array, " steps"],
    *,
    forms: Forms,
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    salt: Salt = 0,
) -> tuple[dict[str, Memory], Params, Params]:
    """One device's work: a step for each active batch, from a fresh optimiser. The table itself is not there.

    Args:
        memory: what was downloaded.
        shared, private: the other parameters; private is the device's own.
        batches: pytree of arrays ``[steps, ...]``.
        active: which of them hold data.
        forms: of the tables.
        loss: of a batch.
        optimizer: its state starts anew.
        salt: of the device's maps.
    """

    def objective(params: Params, batch: Any) -> Float[Array, ""]:
        memory, shared, private = params
        return loss(lambda name, ids: forms[name].read(memory[name], ids, salt), shared, private, batch)

    def step(carry: Any, one: tuple[Any, Bool[Array, ""]]) -> tuple[Any, None]:
        params, opt_state = carry
        batch, on = one
        updates, next_state = optimizer.update(jax.grad(objective)(params, batch), opt_state, params)
        # Without data even a zero gradient would move the parameters, by the momentum.
        moved = (optax.apply_updates(params, updates), next_state)
        return jax.tree.map(lambda new, old: jnp.where(on, new, old), moved, carry), None

    params = (memory, shared, private)
    # Within `jax.shard_map` all that the loop carries must vary over the mesh from its start.
    (carry, batches, active), _ = varying_alike((params, optimizer.init(params)), batches, active)
    (params, _), _ = jax.lax.scan(step, carry, (batches, active))
    return params


def federated_round(
    state: ServerState,
    groups: Sequence[DeviceGroup],
    classes: Sequence[Forms],
    *,
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    aggregation: str = "replace",
    salt: Salt = 0,
    at_a_time: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "clients",
) -> ServerState:
    """Download, local training and aggregation, as one pure function.

    Args:
        state: of the server; ``private`` holds every client's own parameters.
        groups: the sampled devices, a group for each class. A client is sampled once a round at most.
        classes: the forms of the tables in each class.
        loss: of a batch, on the device.
        optimizer: of the device; its state is fresh in every round.
        aggregation: ``"replace"`` makes the mean of the uploads the new table (the paper). It forgets what
            no sampled device could hold. ``"delta"`` adds the mean of what training changed:
            ``W + sum_i w_i (expand(psi_i') - expand(psi_i))``.
        salt: of the maps that all devices share.
        at_a_time: devices of a group that are trained side by side, by default all of them. Fewer take less
            memory, and on a CPU one at a time is faster where its parameters fit the cache.
        mesh: where given, the devices of each group are split over its ``axis``.

    Raises:
        ValueError: for an unknown aggregation or axis, groups and classes of unequal number, forms of
            other tables than the server's, or a group that the mesh cannot split evenly (`pad_group`).
    """
    if aggregation not in ("replace", "delta"):
        raise ValueError(f"aggregation is {aggregation!r}; it must be 'replace' or 'delta'")
    if len(groups) != len(classes) or not groups:
        raise ValueError(
            f"got {len(groups)} groups and {len(classes)} classes; each class has one, and one is needed"
        )
    total = sum(group.weights.sum() for group in groups)
    # A round without data changes nothing, rather than to divide by zero.
    share = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    sums = {name: jnp.zeros_like(table) for name, table in state.tables.items()}
    covered = {name: jnp.zeros_like(table) for name, table in state.tables.items()}
    shared_sum = jax.tree.map(jnp.zeros_like, state.shared)
    private = state.private
    for forms, group in zip(classes, groups, strict=True):
        group = group._replace(weights=group.weights * share)
        start, tables, shared, own = _train_group(state, forms, group, loss, optimizer, salt, at_a_time, mesh, axis)
        for name, form in forms.items():
            mean = _upload(form, tables[name], group, salt)
            weight = group.weights.sum()
            if aggregation == "delta":
                mean = mean - _upload(form, _stay(form, start[name], weight), group, salt)
            sums[name] = sums[name] + form.covers * mean
            covered[name] = covered[name] + form.covers * weight
        shared_sum = jax.tree.map(jnp.add, shared_sum, shared)
        places = jnp.where(group.weights > 0, group.clients, jax.tree.leaves(private)[0].shape[0])
        private = jax.tree.map(lambda old, new, to=places: old.at[to].set(new, mode="drop"), private, own)

    def new_table(old: Array, uploaded: Array, weight: Array) -> Array:
        mean = uploaded / jnp.where(weight > 0, weight, 1)
        return jnp.where(weight > 0, mean, old) if aggregation == "replace" else old + mean

    return ServerState(
        {name: new_table(table, sums[name], covered[name]) for name, table in state.tables.items()},
        jax.tree.map(lambda old, new: jnp.where(total > 0, new, old), state.shared, shared_sum),
        private,
    )


def pad_group(group: DeviceGroup, multiple: int) -> DeviceGroup:
    """The group with places that are not taken at its end, so that their number is divisible by ``multiple``.

    Raises:
        ValueError: for a multiple below 1.
    """
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}; it must be at least 1")
    missing = -group.clients.shape[0] % multiple
    return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, missing), *((0, 0),) * (leaf.ndim - 1))), group)


def device_salts(salt: Salt, clients: Int[Array, " K"]) -> UInt32[Array, " K"]:
    """A salt of its own for each client, for forms that are not common."""
    return bits.lowbias32(bits.lowbias32(clients + jnp.uint32(1)) ^ bits.as_words(salt))


def _train_group(
    state: ServerState,
    forms: Forms,
    group: DeviceGroup,
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    salt: Salt,
    at_a_time: int | None,
    mesh: Mesh | None,
    axis: str,
) -> tuple[dict[str, Memory], dict[str, Memory], Params, Params]:
    """What the devices started from and came to: by table, a weighted sum of memories or all of them."""
    salts = device_salts(salt, group.clients)
    starts = {}
    for name, memory in download(forms, state.tables, salt).items():
        form = forms[name]
        starts[name] = memory if form.common else jax.vmap(form.download, (None, 0))(state.tables[name], salts)
    own = jax.tree.map(lambda leaf: leaf.at[group.clients].get(mode="promise_in_bounds"), state.private)

    def work(starts: Any, shared: Params, own: Params, group: DeviceGroup, salts: Array) -> Any:
        def one(memory: Any, own: Params, batches: Any, active: Array, salt_of_device: Array) -> Any:
            def with_salt(form: TableForm) -> TableForm:
                chosen = salt if form.common else salt_of_device
                return form._replace(read=lambda memory, ids, _: form.read(memory, ids, chosen))

            local = {name: with_salt(form) for name, form in forms.items()}
            return train_locally(memory, shared, own, batches, active, forms=local, loss=loss, optimizer=optimizer)

        def each(device: Any) -> Any:
            memory, *rest = device
            return one({**starts, **memory}, *rest)

        # What all devices start from is not mapped, so that it exists once.
        memories = {name: starts[name] for name, form in forms.items() if not form.common}
        devices = (memories, own, group.batches, group.active, salts)
        tables, shared, own = (
            jax.vmap(each)(devices) if at_a_time is None else jax.lax.map(each, devices, batch_size=at_a_time)
        )

        def weighted(tree: Any) -> Any:
            sums = jax.tree.map(lambda leaf: jnp.einsum("k,k...->...", group.weights, leaf), tree)
            return sums if mesh is None else jax.lax.psum(sums, axis)

        tables = {name: weighted(tables[name]) if _averaged(forms[name]) else tables[name] for name in tables}
        return tables, weighted(shared), own

    if mesh is not None:
        if axis not in mesh.shape:
            raise ValueError(f"axis is {axis!r}; allowed are the axes of the mesh, {tuple(mesh.shape)}")
        if group.clients.shape[0] % mesh.shape[axis]:
            raise ValueError(
                f"a group of {group.clients.shape[0]} devices cannot be split evenly over the "
                f"{mesh.shape[axis]} of mesh axis {axis!r}; pad it with pad_group"
            )
        # `jax.make_mesh` makes explicit axes, which would ask the loss to say the sharding of each array.
        automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
        placed = {name: P() if form.common else P(axis) for name, form in forms.items()}
        results = {name: P() if _averaged(form) else P(axis) for name, form in forms.items()}
        work = jax.shard_map(
            work,
            mesh=automatic,
            in_specs=(placed, P(), P(axis), P(axis), P(axis)),
            out_specs=(results, P(), P(axis)),
        )
    return starts, *work(starts, state.shared, own, group, salts)


def _averaged(form: TableForm) -> bool:
    """Whether the memories of a group are summed before they are uploaded."""
    return form.common and form.linear


def _upload(form: TableForm, memory: Memory, group: DeviceGroup, salt: Salt) -> Array:
    """The weighted sum of the devices' tables, from a weighted sum of memories or from all of them."""
    if _averaged(form):
        return form.upload(memory, salt)
    if form.common:
        tables = jax.vmap(lambda one: form.upload(one, salt))(memory)
    else:
        tables = jax.vmap(form.upload)(memory, device_salts(salt, group.clients))
    return jnp.einsum("k,knd->nd", group.weights, tables)


def _stay(form: TableForm, start: Memory, weight: Array) -> Memory:
    """What `_upload` would get if no device had moved, ``weight`` being the group's in all."""
    return jax.tree.map(lambda leaf: weight * leaf, start) if _averaged(form) else start
