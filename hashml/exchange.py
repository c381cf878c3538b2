"""Trained modules as safetensors files that say which hash they were trained under.

A module of this library is its arrays *and* the map that places them: the same ``memory`` under another
seed, block size or budget is noise. A file therefore carries, in the header of the safetensors format
(readable by any tool, nothing is unpickled), the geometry of the map with its seed, and a checksum over
every tensor and the header. `load_module` refuses a file whose checksum or geometry disagrees.

    save_module("robe.safetensors", variables["params"], geometry={"budget": 4096, "seed": 7})
    params, geometry = load_module("robe.safetensors", geometry={"budget": 4096, "seed": 7})

Header: one metadata key, ``hashml``, whose value is canonical JSON with ``version``, ``geometry``,
``metadata`` and ``checksum``; one key, because safetensors keeps no order of keys, and equal modules shall
make equal files. The checksum (SHA-256) finds accidents: it is no signature, and whoever rewrites a file on
purpose can rewrite its checksum. For a run that is to be resumed, `hashml.models.training` shows Orbax.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

_VERSION = 1
_KEY = "hashml"
_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64"),
)


class ExchangeError(ValueError):
    """A file is damaged, or holds another module than the one asked for."""


class Header(NamedTuple):
    """What a file says of itself; only `load_module` checks it against the tensors."""

    version: int
    geometry: dict[str, Any]
    metadata: dict[str, str]
    checksum: str
    """SHA-256 over the rest of the header and all tensors, in hexadecimal."""


def save_module(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    *,
    geometry: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a module's arrays with the geometry of its map; the file appears whole or not at all.

    Args:
        path: the file to write, or to replace.
        params: a nested mapping of arrays, such as ``variables["params"]``; the path to an array, joined by
            ``/``, names its tensor. Shapes and dtypes are kept exactly (scalars and empty arrays too); dtypes
            are bool, integers and floats of 8 to 64 bits, bfloat16 and complex64.
        geometry: all that fixes where the map places weights: sizes, ``budget``, ``block_size``, ``seed``...
            JSON values: strings, ints, finite floats, bools, None, and lists or string-keyed mappings
            of them.
        metadata: further text for the header, such as a score or a date. It is not compared on loading.

    Raises:
        TypeError: for a key that is no string, a leaf that is no array, or a value that JSON cannot say.
        ValueError: for a key with a ``/`` in it, an empty inner mapping, a dtype that the format does not
            hold (pack narrower codes in uint8), or a float that is not finite; the message names the place.
        OSError: if the file cannot be written; a file that was there before is untouched.
    """
    tensors = dict(_flatten(params, "params", ""))
    header = Header(_VERSION, _plain("geometry", geometry), _text(metadata or {}), "")
    header = header._replace(checksum=_checksum(header, tensors))

    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(beside, "xb") as file:
            file.write(save(tensors, metadata={_KEY: _canonical(header._asdict())}))
            file.flush()
            os.fsync(file.fileno())  # the bytes reach the disk before the name does
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_module(
    path: str | os.PathLike[str], *, geometry: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save_module` wrote: ``(params, geometry)``, bit for bit.

    Args:
        path: the file.
        geometry: what the caller's module was built with; the file must say the same in every entry. ``None``
            takes the file's own, which is returned, to build the module from.

    Returns:
        Nested dicts of `jax.Array` on the default device, and the file's geometry (tuples became lists).

    Raises:
        ExchangeError: if the file is no safetensors file of this library, is cut short or altered, is of a
            newer version, or disagrees with ``geometry``; the message names each disagreement with both
            values. Also for a 64-bit tensor while JAX is set to 32 bits, which would silently round it.
        FileNotFoundError: if there is no such file.
    """
    expected = None if geometry is None else _plain("geometry", geometry)
    tensors: dict[str, np.ndarray] = {}
    with _opened(path) as file:
        header = _parse(path, file.metadata())
        for name in file.keys():  # noqa: SIM118 - the handle is no mapping
            tensors[name] = file.get_tensor(name)

    found = _checksum(header, tensors)
    if found != header.checksum:
        raise ExchangeError(
            f"{path}: checksum disagrees, the header says {header.checksum!r} and the content gives "
            f"{found!r}; the file was altered or damaged"
        )
    if expected is not None:
        _compare(path, header.geometry, expected)
    return _unflatten(path, tensors), header.geometry


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header alone, without reading a tensor, hence without checking the checksum.

    Raises:
        ExchangeError: if it is no safetensors file with a header of this library.
        FileNotFoundError: if there is no such file.
    """
    with _opened(path) as file:
        return _parse(path, file.metadata())


# --- the tree of arrays ---------------------------------------------------------------------------


def _flatten(tree: Any, place: str, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """Pairs of name and host array, where ``place`` is how a message calls the tree."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"{place} is of type {type(tree).__name__}; allowed are mappings and arrays")
    for key, value in tree.items():
        here = f"{place}[{key!r}]"
        if not isinstance(key, str):
            raise TypeError(f"{here} has a key of type {type(key).__name__}; allowed are strings")
        if "/" in key:
            raise ValueError(f"{here} has a '/' in its key, which separates the keys of a path in the file")
        if prefix + key == "__metadata__":
            raise ValueError(f"{here}: the format keeps this name for its header")
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            yield prefix + key, _host(value, here)
        elif isinstance(value, Mapping) and not value:
            raise ValueError(f"{here} is an empty mapping, which the file cannot hold")
        else:
            yield from _flatten(value, here, f"{prefix}{key}/")


def _host(value: Any, place: str) -> np.ndarray:
    if jnp.issubdtype(value.dtype, jax.dtypes.extended) or value.dtype.name not in _DTYPES:
        raise ValueError(f"{place} is of dtype {value.dtype}; allowed are {', '.join(_DTYPES)}")
    host = np.asarray(value, order="C")
    return host.astype(host.dtype.newbyteorder("<"), copy=False)


def _unflatten(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, host in tensors.items():
        if jax.dtypes.canonicalize_dtype(host.dtype) != host.dtype:
            raise ExchangeError(
                f"{path}: tensor {name!r} is {host.dtype}, which JAX would narrow; enable jax_enable_x64 to load it"
            )
        *parents, last = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ExchangeError(f"{path}: tensor {name!r} lies below another tensor")
        if last in node:
            raise ExchangeError(f"{path}: tensor {name!r} lies above another tensor")
        node[last] = jnp.asarray(host)
    return params


# --- the header -----------------------------------------------------------------------------------


def _canonical(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(place: str, value: Any) -> Any:
    """``value`` in the types that JSON gives back, refusing whatever would come back changed."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not np.isfinite(value):
            raise ValueError(f"{place} is {value}; allowed are finite floats")
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(f"{place}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{place}[{key!r}] has a key of type {type(key).__name__}; allowed are strings")
        return {key: _plain(f"{place}[{key!r}]", item) for key, item in value.items()}
    raise TypeError(
        f"{place} is {value!r} of type {type(value).__name__}; "
        "allowed are str, int, finite float, bool, None, and lists or mappings of them"
    )


def _text(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata[{key!r}] is {value!r}; allowed are strings under string keys")
    return dict(metadata)


def _checksum(header: Header, tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the header without its checksum, then each tensor by name: description, then bytes."""
    digest = hashlib.sha256(_canonical(header._replace(checksum="")._asdict()).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(_canonical([name, tensor.dtype.name, list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The file's handle; whatever the format finds wrong with it is an `ExchangeError`."""
    if os.path.isdir(path):
        raise ExchangeError(f"{path} is a directory; allowed is a file written by save_module")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, AttributeError, KeyError) as error:  # the latter two: a dtype that NumPy lacks
        raise ExchangeError(f"{path} is damaged or no safetensors file: {error}") from error


def _parse(path: str | os.PathLike[str], stored: dict[str, str] | None) -> Header:
    if not stored or _KEY not in stored:
        raise ExchangeError(f"{path} has no {_KEY!r} entry in its header: it was not written by save_module")
    try:
        header = Header(**json.loads(stored[_KEY]))
        if not isinstance(header.geometry, dict):
            raise TypeError("geometry is no JSON object")
        _plain("geometry", header.geometry)  # a float that a flipped digit made infinite
        _text(header.metadata)
    except (ValueError, TypeError, AttributeError) as error:
        raise ExchangeError(f"{path} has a damaged header: {error}") from error
    if header.version != _VERSION:
        raise ExchangeError(f"{path} is of format version {header.version!r}; this library reads {_VERSION}")
    return header


def _compare(path: str | os.PathLike[str], found: dict[str, Any], expected: dict[str, Any]) -> None:
    def say(geometry: dict[str, Any], key: str) -> str:
        return _canonical(geometry[key]) if key in geometry else "nothing"

    differing = [
        f"{key}: file {say(found, key)}, given {say(expected, key)}"
        for key in sorted(found.keys() | expected.keys())
        if say(found, key) != say(expected, key)
    ]
    if differing:
        raise ExchangeError(f"{path}: geometry disagrees ({'; '.join(differing)})")
