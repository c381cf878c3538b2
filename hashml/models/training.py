"""Training steps as pure functions of a state and a batch, on one device or many.

    state = init_state(params, optimizer)
    step = train_step(loss_fn, optimizer)                   # or data_parallel_step(..., mesh)
    for batch in batches:
        state, loss = step(state, batch)

``loss_fn(params, batch)`` is a mean over the leading axis that all arrays of the batch share. Data
parallelism comes in JAX's two forms, with equal gradients: `data_parallel_step` writes the collective down
(`jax.shard_map`: each device takes its part of the batch, and the gradients are averaged), `sharded_step`
states where the batch lies and lets the compiler find it. Parameters are replicated in both.

A run is saved and resumed with Orbax, bit for bit, the position in the data included; ``folder`` is an
absolute path, and the state given to `StandardRestore` says only shapes, dtypes and devices:

    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder) as manager:
        manager.save(int(state.step), args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"position": position})))
        manager.wait_until_finished()

    with ocp.CheckpointManager(folder) as manager:
        saved = manager.restore(manager.latest_step(), args=ocp.args.Composite(
            state=ocp.args.StandardRestore(init_state(params, optimizer)), data=ocp.args.JsonRestore()))
    state, position = saved.state, saved.data["position"]

The continued run then equals the uninterrupted one wherever a step repeats itself: on the CPU, as the
tests show; on a GPU XLA needs ``--xla_gpu_deterministic_ops``, since a gather's gradient adds atomically.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

Params = Any
"""Pytree of arrays."""
Batch = Any
"""Pytree of arrays with one leading axis of equal length."""
LossFn = Callable[[Params, Batch], Float[Array, ""]]


class TrainState(NamedTuple):
    """All that a step changes; a pytree, to be saved whole."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    """Steps taken."""


Step = Callable[[TrainState, Batch], tuple[TrainState, Float[Array, ""]]]
ValueAndGrad = Callable[[Params, Batch], tuple[Float[Array, ""], Params]]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, *, donate: bool = False) -> Step:
    """The jitted step on one device: ``step(state, batch) -> (state, loss before the step)``.

    With ``donate`` the step reuses the memory of the state given to it, which cannot be read afterwards;
    without it, old and new parameters stand in memory together.
    """
    return _jit_step(jax.value_and_grad(loss_fn), optimizer, donate)


def data_parallel_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    axis: str = "data",
    donate: bool = False,
) -> Step:
    """`train_step` with the batch split over ``axis`` of ``mesh``; see `data_parallel_value_and_grad`."""
    return _placed(_jit_step(_split(loss_fn, mesh, axis), optimizer, donate), mesh, axis)


def sharded_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    axis: str = "data",
    donate: bool = False,
) -> Step:
    """`data_parallel_step` by the compiler's own partitioning; see `sharded_value_and_grad`."""
    return _placed(_jit_step(_partitioned(loss_fn, mesh, axis), optimizer, donate), mesh, axis)


def data_parallel_value_and_grad(loss_fn: LossFn, mesh: Mesh, *, axis: str = "data") -> ValueAndGrad:
    """``f(params, batch) -> (loss, gradient)`` of the whole batch, by `jax.shard_map`.

    Every device differentiates its part; one all-reduce of the gradient follows, of the parameters' bytes.
    ``loss_fn`` sees a part only, so it must be a mean over the leading axis. Arguments are moved to the
    mesh if they are elsewhere.

    Raises:
        ValueError: if ``mesh`` has no ``axis``; when called, if the batch cannot be split evenly: parts
            of unequal size would make the mean of their means another number than the batch's mean.
    """
    return _placed(jax.jit(_split(loss_fn, mesh, axis)), mesh, axis)


def sharded_value_and_grad(loss_fn: LossFn, mesh: Mesh, *, axis: str = "data") -> ValueAndGrad:
    """As `data_parallel_value_and_grad`, but ``loss_fn`` sees the whole batch and XLA splits the work.

    Raises:
        ValueError: as there.
    """
    return _placed(jax.jit(_partitioned(loss_fn, mesh, axis)), mesh, axis)


def _split(loss_fn: LossFn, mesh: Mesh, axis: str) -> ValueAndGrad:
    def on_each(params: Params, part: Batch) -> tuple[Array, Params]:
        # The mean is taken inside the differentiated function, so that its transpose, which is the
        # average of the gradients, is JAX's affair and not a factor to remember.
        return jax.value_and_grad(lambda p: jax.lax.pmean(loss_fn(p, part), axis))(params)

    return jax.shard_map(on_each, mesh=_automatic(mesh), in_specs=(P(), P(axis)), out_specs=(P(), P()))


def _partitioned(loss_fn: LossFn, mesh: Mesh, axis: str) -> ValueAndGrad:
    def whole(params: Params, batch: Batch) -> tuple[Array, Params]:
        # Said here too, since within a caller's jit the arguments' own places say nothing.
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(_automatic(mesh), P(axis)))
        result = jax.value_and_grad(loss_fn)(params, batch)
        return jax.lax.with_sharding_constraint(result, NamedSharding(_automatic(mesh), P()))

    return whole


def _placed(function: Callable[[Any, Batch], Any], mesh: Mesh, axis: str) -> Callable[[Any, Batch], Any]:
    """``function`` of its first argument, replicated over the mesh, and the batch, split over ``axis``."""
    if axis not in mesh.shape:
        raise ValueError(f"axis is {axis!r}; allowed are the axes of the mesh, {tuple(mesh.shape)}")
    everywhere, split = (NamedSharding(_automatic(mesh), spec) for spec in (P(), P(axis)))

    def placed(first: Any, batch: Batch) -> Any:
        _check_batch(batch, mesh.shape[axis], axis)
        return function(jax.device_put(first, everywhere), jax.device_put(batch, split))

    return placed


def _automatic(mesh: Mesh) -> Mesh:
    """The same devices with axes of type Auto: `jax.make_mesh` makes explicit ones, which would ask the
    model to say the sharding of each of its arrays."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _jit_step(value_and_grad: ValueAndGrad, optimizer: optax.GradientTransformation, donate: bool) -> Step:
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Array]:
        loss, grads = value_and_grad(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), loss

    return jax.jit(step, donate_argnums=0 if donate else ())


def _check_batch(batch: Batch, parts: int, axis: str) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    sizes = {f"batch{jax.tree_util.keystr(path)}": jnp.shape(leaf)[:1] for path, leaf in leaves}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise ValueError(f"the leading axes of the batch are {sizes}; all arrays must have one, of equal length")
    ((size,),) = set(sizes.values())
    if size % parts:
        raise ValueError(
            f"a batch of {size} cannot be split evenly over the {parts} devices of mesh axis {axis!r}; "
            f"allowed are multiples of {parts}"
        )
