"""Tensors of Hugging Face folders, read into a tree of parameters one by one.

A folder holds ``model.safetensors``, or several such files that ``model.safetensors.index.json`` names; kernels lie
``[out, in]`` there, one tensor a layer. Every tensor is used or refused. Nothing is unpickled.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from hashml.exchange import ExchangeError
from hashml.models.folder_config import read_json

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Stored(NamedTuple):
    """A tensor that is not read yet."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def stored_tensors(path: Path, files: contextlib.ExitStack) -> dict[str, Stored]:
    """Every tensor of the folder by name; ``files`` closes what is opened.

    Raises:
        ExchangeError: for files that are absent, damaged, pickled or outside of the folder.
    """
    weights: dict[str, Any] | None = None
    if (path / SINGLE).exists():  # also beside an index, as in transformers
        names = [SINGLE]
    elif (path / INDEX).exists():
        weights = read_json(path / INDEX).get("weight_map")
        if (
            not isinstance(weights, dict)
            or not weights
            or not all(isinstance(name, str) for name in weights.values())
        ):
            raise ExchangeError(f"{path / INDEX} has no weight_map of tensor names to file names")
        names = sorted(set(weights.values()))
    else:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        there = f"; {few(pickled)} may be pickled and is not read" if pickled else ""
        raise ExchangeError(f"{path} has neither {SINGLE} nor {INDEX}{there}; allowed are safetensors")
    if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ExchangeError(f"{path / INDEX} names {few(outside)}; allowed are safetensors files of the same folder")
    if absent := [name for name in names if not (path / name).exists()]:
        raise ExchangeError(f"{path / INDEX} names {few(absent)}, which is not there")
    found: dict[str, Stored] = {}
    for name in names:
        file = path / name
        if not file.is_file():
            raise ExchangeError(f"{file} is no file; allowed are safetensors files")
        with readable(file):
            handle = files.enter_context(safe_open(file, framework="numpy"))
            for tensor in handle.keys():  # noqa: SIM118 - the handle is no mapping
                if weights is None or weights.get(tensor) == name:
                    found[tensor] = _stored(file, handle, tensor)
    if weights is not None and (absent := sorted(set(weights) - set(found))):
        file = path / weights[absent[0]]
        raise ExchangeError(f"{file} lacks {few(absent)}, which {INDEX} says it holds")
    if not found:
        raise ExchangeError(f"{path / SINGLE} holds no tensors")
    return found


def _stored(file: Path, handle: Any, name: str) -> Stored:
    view = handle.get_slice(name)
    return Stored(file, view.get_dtype(), tuple(view.get_shape()), lambda: handle.get_tensor(name))


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Whatever the format finds wrong with a file is an `ExchangeError`."""
    try:
        yield
    except SafetensorError as error:
        raise ExchangeError(f"{file} is damaged or no safetensors file: {error}") from error
    except OSError as error:  # whose own message need not name the file
        raise ExchangeError(f"{file} cannot be read: {error}") from error


def read_params(
    shapes: Mapping[str, Any],
    names: Mapping[str, list[str]],
    tensors: Mapping[str, Stored],
    dtype: np.dtype,
    *,
    tables: Collection[str],
    ignored: Callable[[str], bool],
) -> dict[str, Any]:
    """The tree of ``shapes``, each leaf filled tensor by tensor, so that no layer is in memory twice.

    Args:
        shapes: leaves by name, those of the layers under ``"layers"`` with a leading axis.
        names: of the tensors of a leaf: one, or one a layer.
        tensors: of `stored_tensors`.
        dtype: of the leaves.
        tables: leaves that lie in a file as they do here; all others are transposed.
        ignored: says which tensors hold nothing that counts.

    Raises:
        ExchangeError: for tensors that are missing, superfluous, of a wrong shape, quantised or not finite.
        ValueError: for weights that exceed ``dtype``.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not ignored(name)}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ExchangeError(
                f"{tensor.file}: tensor {name!r} is of dtype {tensor.dtype}; allowed are {', '.join(DTYPES)}, "
                "not quantised"
            )
    wanted = {name for each in names.values() for name in each}
    place = next(iter(tensors.values())).file.parent if tensors else "the folder"
    if missing := sorted(wanted - set(tensors)):
        raise ExchangeError(f"{place} lacks {len(missing)} tensors that its config.json asks for: {few(missing)}")
    if superfluous := sorted(set(tensors) - wanted):
        raise ExchangeError(
            f"{place} has {len(superfluous)} tensors that its config.json has no place for: {few(superfluous)}"
        )
    leaves = {name: shape for name, shape in shapes.items() if name != "layers"} | shapes["layers"]
    for name, shape in leaves.items():
        one = shape[1:] if name in shapes["layers"] else shape
        one = one if name in tables else one[::-1]
        for tensor in names[name]:
            if tensors[tensor].shape != one:
                file, found = tensors[tensor].file, tensors[tensor].shape
                raise ExchangeError(f"{file}: tensor {tensor!r} has shape {found}; config.json asks for {one}")

    def filled(name: str) -> jax.Array:
        host = np.empty(leaves[name], dtype)
        parts = host if name in shapes["layers"] else host[None]
        for part, tensor in zip(parts, names[name], strict=True):
            file = tensors[tensor].file
            with readable(file):
                values = tensors[tensor].read()
            target = part if name in tables else part.T
            target[...] = narrowed(values, dtype, f"{file}: tensor {tensor!r}")
        return jnp.asarray(host)

    return {
        name: {inner: filled(inner) for inner in shapes["layers"]} if name == "layers" else filled(name)
        for name in shapes
    }


def narrowed(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """``values`` in ``dtype``, finite before and after.

    Raises:
        ExchangeError: for NaN and infinities.
        ValueError: for values that would become infinite.
    """
    if not (finite := np.isfinite(values)).all():
        raise ExchangeError(
            f"{name} has {finite.size - finite.sum()} entries that are NaN or infinite; allowed are none"
        )
    with np.errstate(all="ignore"):
        found = values.astype(dtype, copy=False)
    if not np.isfinite(found).all():
        raise ValueError(f"dtype is {dtype.name}; {name} exceeds it")
    return found


def few(names: Iterable[str]) -> str:
    """At most three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
