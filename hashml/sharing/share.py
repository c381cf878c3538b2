"""Any Flax module with one memory for all its weights: ROAST's global sharing (Desai, Zhou, Shrivastava, ICML
2023, arXiv 2207.10702) by the map of STABLE-RPS (Desai, Shrivastava, ICLR 2024, arXiv 2310.11611), model-agnostic.

    dense = model.init(key, x)                          # says shapes, and the spread of each array
    shared = share(model, dense, compression=100)
    variables = shared.init(key, x)                     # {"params": {"memory": [m], "dense": {...}}, ...}
    y = shared.apply(variables, x)                      # the model's own apply; rngs, mutable, method as there

    W_l = lambda_l * sign * memory[slots of l],   lambda_l = std(W_l at initialisation) / std(memory)

Large float arrays are read from the memory; biases, norms, small arrays and those that start constant stay dense,
and count. The model is not edited, and knows nothing of it. Scales are numbers of the geometry, not parameters;
they are measured, hence `share` asks for initial variables. The memory is drawn with standard deviation
``init_std`` itself (the reference draws uniformly on +-init_std, which makes its weights sqrt(3) too small).

Where a folded model fits its memory, sharing is a permutation: scales are one, `Shared.init` lays the model's own
initial weights out, and outputs are those of the dense model, bit for bit.

`Shared` is a frozen dataclass with the calls of a linen module, not a module: keys, ``method`` and every other
collection pass through untouched, so that its masks of dropout and its outputs are the dense model's, while a
module around a module has a scope, and so keys, of its own.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer
from jaxtyping import Array

from hashml.accounting import stored_bytes
from hashml.sharing.budgets import resolve_budget
from hashml.sharing.placement import ModelMap, ModelSign, Placement
from hashml.sharing.reexpansion import just_in_time, virtual_array
from hashml_kernels.manual_axes import varying_alike

Path = tuple[str, ...]
Choose = Callable[[Path, jax.ShapeDtypeStruct], bool]
"""Whether an array, named by its path in the parameters, is shared."""

_MEMORY_STREAM = 0x6D656D


class SharedLeaf(NamedTuple):
    """An array that is read from the memory."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    """Position of its first weight in the model."""
    scale: float
    """lambda: every weight is so many times its slot."""


class DenseLeaf(NamedTuple):
    """An array that is stored as it is."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


class ReportRow(NamedTuple):
    """What becomes of one array of the model."""

    name: str
    shape: tuple[int, ...]
    stored: str
    """``"shared"`` or ``"dense"``."""
    offset: int | None
    positions: int
    scale: float | None
    dense_bytes: int


@dataclasses.dataclass(frozen=True)
class Shared:
    """A module whose large arrays are read from one memory; made by `share`, or `from_geometry`.

    Attributes:
        module: the model, unchanged.
        placement: the map.
        leaves: the shared arrays, in order of their positions.
        dense: the others.
        init_std: standard deviation of the memory at initialisation.
        dtype: of the memory.
        recompute: arrays are expanded where they are used, and again in the backward pass
            (`hashml.sharing.reexpansion`): less memory on a TPU, and for inference on a GPU, at twice the hashing.
    """

    module: nn.Module
    placement: Placement
    leaves: tuple[SharedLeaf, ...]
    dense: tuple[DenseLeaf, ...]
    init_std: float = 1.0
    dtype: str = "float32"
    recompute: bool = False

    @property
    def budget(self) -> int:
        """Weights of the memory."""
        return self.placement.budget

    @property
    def one_to_one(self) -> bool:
        """Whether no two weights share a slot, whatever the seed: a fold of a model that fits its memory."""
        return self.placement.map == "fold" and _end(self.leaves) <= self.budget

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """``module.init``, with ``{"memory", "dense"}`` as parameters (no ``"dense"`` where it would be empty).

        Arrays that stay dense, and other collections, are those of ``module.init(rngs, ...)``; so are the
        weights of a model that fits its memory. Else the memory is normal with ``init_std``.
        """
        dense = dict(self.module.init(rngs, *args, **kwargs))
        if self.one_to_one:
            return self.from_dense(dense)
        key = jax.random.fold_in(rngs["params"] if isinstance(rngs, Mapping) else rngs, _MEMORY_STREAM)
        memory = self.init_std * jax.random.normal(key, (self.budget,), self.dtype)
        return dense | {"params": self._params(memory, _flatten(dense["params"]))}

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        """``module.apply`` with every array expanded; reverse-mode gradients, of the memory among them.

        Raises:
            ValueError: for variables of another geometry, or where ``mutable`` names ``"params"``.
        """
        mutable = nn.DenyList("params") if mutable is True else mutable
        if mutable == "params" or (isinstance(mutable, (list, tuple, set)) and "params" in mutable):
            raise ValueError(
                f"mutable is {mutable!r}; parameters of a shared module are changed by its gradient alone"
            )
        memory, kept = self._split(variables["params"])
        rest = {name: value for name, value in variables.items() if name != "params"}
        traced, static, structure = _partition((kept, rest, args, kwargs, rngs))
        # Expanded from a varying memory, arrays have varying gradients: what shard_map sums over its
        # devices is then the gradient of the memory, and not one of every array.
        memory = varying_alike(memory, traced)[0][0]

        def call(memory: Array, traced: list[Any]) -> Any:
            kept, rest, args, kwargs, rngs = _join(traced, static, structure)
            options = {"rngs": rngs, "method": method, "mutable": mutable}
            if capture_intermediates:
                options["capture_intermediates"] = capture_intermediates
            return self.module.apply(
                {**rest, "params": self._tree(self.expand(memory), kept)}, *args, **options, **kwargs
            )

        return just_in_time(call, memory, traced) if self.recompute else call(memory, traced)

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """The output of a first call, and `init`'s variables."""
        variables = self.init(rngs, *args, **kwargs)
        others = {name: key for name, key in rngs.items() if name != "params"} if isinstance(rngs, Mapping) else None
        return self.apply(variables, *args, rngs=others, **kwargs), variables

    def expand(self, memory: Array) -> list[Array]:
        """The shared arrays, in the order of ``leaves``; differentiable in the memory."""
        return [virtual_array(functools.partial(self._expand_leaf, leaf), memory) for leaf in self.leaves]

    def to_dense(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Variables of the model itself, every array in full: for export.

        Raises:
            ValueError: for variables of another geometry.
        """
        memory, kept = self._split(variables["params"])
        return {**variables, "params": self._tree(self.expand(memory), kept)}

    def from_dense(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The variables whose arrays are nearest to the model's in least squares; slots that serve none are 0.

        ``memory = expand^T(W) / sum of lambda^2 over a slot's weights``. Exact for a one-to-one map.

        Raises:
            ValueError: where an array is missing, or has another shape.
        """
        params = _flatten(variables["params"])
        weights = [_checked(params, leaf) for leaf in self.leaves]
        zeros = jnp.zeros(self.budget, self.dtype)
        _, pull = jax.vjp(self.expand, zeros)
        (total,) = pull([weight.astype(leaf.dtype) for weight, leaf in zip(weights, self.leaves, strict=True)])
        mass = sum(leaf.scale**2 * self.placement.load(leaf.shape, leaf.offset) for leaf in self.leaves)
        memory = total / np.where(mass == 0, 1, mass).astype(self.dtype)
        return {**variables, "params": self._params(memory, params)}

    @property
    def geometry(self) -> dict[str, Any]:
        """All that fixes where and how weights are read, as JSON values: save it with the variables
        (`hashml.exchange.save_module`), and build the module again by `from_geometry`."""
        return {
            "placement": dataclasses.asdict(self.placement) | {"tile": list(self.placement.tile)},
            "init_std": self.init_std,
            "dtype": self.dtype,
            "leaves": [leaf._asdict() | {"path": list(leaf.path), "shape": list(leaf.shape)} for leaf in self.leaves],
            "dense": [leaf._asdict() | {"path": list(leaf.path), "shape": list(leaf.shape)} for leaf in self.dense],
        }

    @property
    def dense_bytes(self) -> int:
        """Bytes of the model's own parameters."""
        return sum(row.dense_bytes for row in self.report())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the memory and of the arrays that stay dense."""
        memory = jax.ShapeDtypeStruct((self.budget,), self.dtype)
        return stored_bytes([memory, *(_abstract(leaf) for leaf in self.dense)])

    @property
    def compression(self) -> float:
        """Bytes of the model's parameters over bytes stored."""
        return self.dense_bytes / self.stored_bytes

    def report(self) -> tuple[ReportRow, ...]:
        """A row an array: where it lies, its scale and its bytes."""
        shared = [
            ReportRow("/".join(leaf.path), leaf.shape, "shared", leaf.offset,
                      self.placement.positions(leaf.shape), leaf.scale, stored_bytes(_abstract(leaf)))
            for leaf in self.leaves
        ]  # fmt: skip
        dense = [
            ReportRow("/".join(leaf.path), leaf.shape, "dense", None, 0, None, stored_bytes(_abstract(leaf)))
            for leaf in self.dense
        ]
        return (*shared, *dense)

    def with_init_std(self, init_std: float | int) -> "Shared":
        """The same function of ``memory / init_std``: scales change against the memory's spread.

        A one-to-one module has weights of its own spread in the memory, and any scale.
        """
        factor = self.init_std / _checked_std(init_std)
        leaves = tuple(leaf._replace(scale=leaf.scale * factor) for leaf in self.leaves)
        return dataclasses.replace(self, leaves=leaves, init_std=float(init_std))

    def _expand_leaf(self, leaf: SharedLeaf, memory: Array) -> Array:
        weights = self.placement.expand(memory, leaf.shape, leaf.offset)
        return (weights if leaf.scale == 1 else weights * leaf.scale).astype(leaf.dtype)

    def _split(self, params: Mapping[str, Any]) -> tuple[Array, dict[Path, Any]]:
        memory = params.get("memory")
        if memory is None or jnp.shape(memory) != (self.budget,):
            found = "missing" if memory is None else f"of shape {jnp.shape(memory)}"
            raise ValueError(f"params['memory'] is {found}; this geometry has a memory of shape ({self.budget},)")
        kept = flatten_dict(dict(params.get("dense", {})))
        if set(kept) != {leaf.path for leaf in self.dense}:
            raise ValueError(
                f"params['dense'] holds {sorted(map('/'.join, kept))}; "
                f"this geometry has {sorted('/'.join(leaf.path) for leaf in self.dense)}"
            )
        return jnp.asarray(memory), kept

    def _params(self, memory: Array, params: dict[Path, Any]) -> dict[str, Any]:
        kept = {leaf.path: params[leaf.path] for leaf in self.dense}
        return {"memory": memory} | ({"dense": unflatten_dict(kept)} if kept else {})

    def _tree(self, weights: list[Array], kept: dict[Path, Any]) -> dict[str, Any]:
        return unflatten_dict(kept | {leaf.path: w for leaf, w in zip(self.leaves, weights, strict=True)})


def share(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    compression: float | int | None = None,
    budget: int | None = None,
    map: ModelMap = "fold",
    seed: int = 0,
    sign: ModelSign = "element",
    block_size: int = 32,
    tile: tuple[int, int] = (32, 32),
    init_std: float | int = 1.0,
    min_size: int = 256,
    choose: Choose | None = None,
    recompute: bool = False,
) -> Shared:
    """A module whose large arrays share one memory.

    Args:
        module: any linen module.
        variables: what ``module.init`` gave, or trained ones: shapes, and the spread of each array.
        compression: bytes of all parameters over bytes stored, those that stay dense included; at least 1.
        budget: or the weights of the memory.
        map: ``"fold"``, ``"element"``, ``"block"`` or ``"tile"`` (`hashml.sharing.placement`).
        seed: picks the map.
        sign: hashed signs, one an ``"element"``, or ``"none"``.
        block_size, tile: for maps ``"block"`` and ``"tile"``.
        init_std: standard deviation of the memory. One suits Adam, whose steps are of one size; with the
            scaler of `hashml.sharing.stable_rps` training by SGD does not depend on it.
        min_size: arrays of fewer weights stay dense.
        choose: which arrays are shared, by path and shape, in place of "rank 2 at least, and min_size".
            Arrays of integers, and constant ones (they have no spread to imitate), never are.
        recompute: as in `Shared`.

    Raises:
        TypeError: for sizes of a wrong type.
        ValueError: for a module without parameters or without any that can be shared, a compression that is
            below 1 or that the arrays that stay dense forbid, a budget below a run of the map, or an unknown map.
    """
    if not variables.get("params"):
        raise ValueError(f"variables has no 'params' (it has {sorted(variables)}); there is nothing to share")
    if not isinstance(min_size, (int, np.integer)) or isinstance(min_size, bool):
        raise TypeError(f"min_size is {min_size!r}; it must be an int")
    init_std = _checked_std(init_std)
    params = _flatten(variables["params"])
    choose = choose or (lambda path, leaf: len(leaf.shape) >= 2 and math.prod(leaf.shape) >= min_size)
    spreads = {path: _spread(path, leaf) for path, leaf in params.items() if _may_share(leaf)}
    chosen = [path for path, std in spreads.items() if std > 0 and choose(path, _shape_of(params[path]))]
    if not chosen:
        raise ValueError(
            f"none of the module's {len(params)} arrays is shared: min_size is {min_size}, choose {choose}"
        )
    dense = tuple(DenseLeaf(path, *_describe(leaf)) for path, leaf in params.items() if path not in chosen)
    dtype = jnp.result_type(*(params[path].dtype for path in chosen)).name
    if compression is not None and budget is None:
        dense_bytes, kept = (stored_bytes(tree) for tree in (params, [_abstract(leaf) for leaf in dense]))
        budget = _budget(compression, dense_bytes, kept, np.dtype(jnp.dtype(dtype)).itemsize)
    else:
        budget = resolve_budget(1, budget=budget, compression=compression)

    placement = Placement(budget, map, seed, sign, block_size, tile)
    leaves: list[SharedLeaf] = []
    for path in chosen:
        scale = spreads[path] / init_std
        leaves.append(SharedLeaf(path, *_describe(params[path]), _next(leaves, placement), scale))
    shared = Shared(module, placement, tuple(leaves), dense, init_std, dtype, recompute)
    if shared.one_to_one:
        leaves = [leaf._replace(scale=1.0) for leaf in leaves]
    return dataclasses.replace(shared, leaves=tuple(leaves))


def from_geometry(module: nn.Module, geometry: Mapping[str, Any], *, recompute: bool = False) -> Shared:
    """The `Shared` whose ``geometry`` this is, for instance the one that a file was saved with."""
    placement = Placement(**{**geometry["placement"], "tile": tuple(geometry["placement"]["tile"])})

    def leaf(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {**fields, "path": tuple(fields["path"]), "shape": tuple(fields["shape"])}

    leaves = tuple(SharedLeaf(**leaf(fields)) for fields in geometry["leaves"])
    dense = tuple(DenseLeaf(**leaf(fields)) for fields in geometry["dense"])
    return Shared(module, placement, leaves, dense, geometry["init_std"], geometry["dtype"], recompute)


# --- arrays and their names -----------------------------------------------------------------------


def _flatten(params: Mapping[str, Any]) -> dict[Path, Any]:
    """Arrays by path in an order that does not depend on the mapping's own: Dense_2 before Dense_10."""
    flat = flatten_dict(nn.unbox(dict(params)))

    def natural(path: Path) -> list[Any]:
        return [[(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", key)]
                for key in path]  # fmt: skip

    return {path: flat[path] for path in sorted(flat, key=natural)}


def _may_share(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray)) and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size > 0


def _spread(path: Path, leaf: Any) -> float:
    if isinstance(leaf, Tracer):
        raise ValueError(
            f"variables are traced ({'/'.join(path)}); share reads their spread, so call it outside of jit"
        )
    host = np.asarray(leaf).astype(np.float64)
    # Of a constant array the rounded mean would leave a spread above zero.
    return 0.0 if (host == host.reshape(-1)[0]).all() else float(host.std())


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _describe(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), jnp.dtype(leaf.dtype).name


def _abstract(leaf: SharedLeaf | DenseLeaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))


def _next(leaves: list[SharedLeaf], placement: Placement) -> int:
    return leaves[-1].offset + placement.positions(leaves[-1].shape) if leaves else 0


def _end(leaves: tuple[SharedLeaf, ...]) -> int:
    return leaves[-1].offset + math.prod(leaves[-1].shape)


def _checked(params: dict[Path, Any], leaf: SharedLeaf) -> Array:
    found = params.get(leaf.path)
    if found is None or tuple(found.shape) != leaf.shape:
        shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
        raise ValueError(f"params['{'/'.join(leaf.path)}'] is {shape}; this geometry has shape {leaf.shape}")
    return jnp.asarray(found)


def _checked_std(init_std: float | int) -> float:
    if not 0 < init_std < math.inf:
        raise ValueError(f"init_std is {init_std}; it must be positive and finite")
    return float(init_std)


def _budget(compression: float | int, dense_bytes: int, kept: int, itemsize: int) -> int:
    # As if bytes were weights: its checks of the number are wanted here too.
    total = resolve_budget(dense_bytes, budget=None, compression=compression)
    if total - kept < itemsize:
        most = Fraction(dense_bytes, kept + itemsize)
        raise ValueError(
            f"compression is {compression}; of {dense_bytes} bytes, {kept} stay dense, so that it must be at "
            f"most {float(most):.4g}"
        )
    return (total - kept) // itemsize


# --- what is traced and what is not ---------------------------------------------------------------


def _partition(tree: Any) -> tuple[list[Any], list[Any], Any]:
    """The array leaves, the other leaves with None for an array, and the structure."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [isinstance(leaf, (jax.Array, np.ndarray, np.generic)) for leaf in leaves]
    traced = [jnp.asarray(leaf) for leaf, array in zip(leaves, arrays, strict=True) if array]
    return traced, [None if array else (leaf,) for leaf, array in zip(leaves, arrays, strict=True)], structure


def _join(traced: list[Any], static: list[Any], structure: Any) -> Any:
    following = iter(traced)
    return jax.tree.unflatten(structure, [next(following) if leaf is None else leaf[0] for leaf in static])
