"""Compressed checkpoints: one safetensors file from which the original file comes back byte for byte.

    pack("model.safetensors", "model.packed", {"bfloat16": DFLOAT11})
    unpack("model.packed", "back.safetensors")           the same bytes as model.safetensors
    load_compressed("model.packed")                      arrays for `hashml.weights.lossless.decode`

Every tensor keeps its name. A coded one is a row of bytes: its parts, wide ones first, each row filled up to a
multiple of 8 bytes; then those that are not coded follow in their own dtype, wide ones first, so that every tensor
stands at a multiple of its width. The entry ``hashml`` of the header is JSON: for each tensor its coder, sizes of
parts and SHA-256, and of the original file its header and a digest. The header itself is under a checksum, too: no
byte of the file is unguarded. The checksums find accidents; they are no signatures.

One tensor is in memory at a time. A file is written beside its place, read back and compared with the original bit by
bit, and only then gets its name: whatever fails before (a full disk, an interrupt), the place holds what it held.
"""

import base64
import binascii
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hashml.exchange import ExchangeError
from hashml.weights.float_split import FORMATS
from hashml.weights.lossless import (
    CODERS,
    Codec,
    CompressedArray,
    Geometry,
    decode_host,
    encode,
    entropy_limit,
    part_dtypes,
)
from hashml.weights.tensor_file import PIECE, Entry, TensorFile, opened, parse_entries, replacing

_VERSION = 1
_KEY = "hashml"
_UNSUMMED = "0" * 64
_DTYPES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32"},
    **{"U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
    **{"C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
Progress = Callable[[str, int, int], None]
"""``(tensor, done, total)``, after each tensor."""


class TensorInfo(NamedTuple):
    """What a compressed file says of a tensor."""

    name: str
    dtype: str
    """By the format's name, such as BF16."""
    shape: tuple[int, ...]
    coder: str
    """``copy`` for a tensor that was not coded."""
    original_bytes: int
    stored_bytes: int
    limit_bytes: float
    """What no code of single symbols goes below; of a copy, ``original_bytes``."""


class FileInfo(NamedTuple):
    """What a compressed file says of itself."""

    tensors: list[TensorInfo]
    original_bytes: int
    """Of the original file, its header included."""
    file_bytes: int


# --- the command's three verbs --------------------------------------------------------------------


def pack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    codecs: Mapping[str, Codec],
    *,
    progress: Progress | None = None,
) -> FileInfo:
    """Compresses a safetensors file; ``target`` appears whole and verified, or not at all.

    Args:
        source: the file, which is only read.
        target: the file to write, or to replace.
        codecs: for each dtype, by name, the codec of its tensors; tensors of other dtypes are copied.
        progress: is told of each tensor once it is written.

    Raises:
        ExchangeError: if ``source`` is damaged or no safetensors file, or if what was written
            does not decode to it.
        ValueError: if ``target`` is ``source``, or for a codec of another dtype.
        OSError: if a file cannot be read or written; a target that was there before is untouched.
    """
    for dtype, codec in codecs.items():
        if dtype not in codec.dtypes:
            raise ValueError(f"codecs[{dtype!r}] is {codec.name!r}, which is for {', '.join(codec.dtypes)}")
    _distinct(source, target)
    with opened(source) as original, replacing(target) as (beside, out):
        total = len(original.entries)
        coded = [entry for entry in original.entries.values() if _DTYPES.get(entry.dtype) in codecs]
        copied = [entry for entry in original.entries.values() if _DTYPES.get(entry.dtype) not in codecs]
        reserved = len(_header(original, _longest(original, codecs), _UNSUMMED))
        reserved += -reserved % 8
        out.seek(8 + reserved)

        written: dict[str, dict[str, Any]] = {}
        contents: dict[str, bytes] = {}
        done, place = 0, 0

        def note(entry: Entry, dtype: str, shape: list[int], size: int, fields: dict[str, Any]) -> None:
            nonlocal done, place
            written[entry.name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]} | fields
            place, done = place + size, done + 1
            if progress is not None:
                progress(entry.name, done, total)

        for entry in coded:
            content = original.read(entry)
            array = _array(entry, content)
            codec = codecs[_DTYPES[entry.dtype]]
            compressed = encode(array, codec)
            if compressed.geometry.coder == "raw":
                copied.append(entry)
                continue
            blob = b"".join(np.ascontiguousarray(part).tobytes() for part in compressed.parts.values())
            blob += bytes(-len(blob) % 8)
            if len(blob) >= entry.size:  # the fill of a tiny tensor
                copied.append(entry)
                continue
            out.write(blob)
            contents[entry.name] = hashlib.sha256(content.data).digest()
            fields = {
                "codec": codec.name,
                "coder": compressed.geometry.coder,
                "limit": compressed.geometry.limit,
                "sizes": [part.size for part in compressed.parts.values()],
                "entropy": round(entropy_limit(array), 4),
                "sha256": hashlib.sha256(blob).hexdigest(),
            }
            note(entry, "U8", [len(blob)], len(blob), fields)
        for entry in sorted(copied, key=lambda entry: -_width(entry)):
            digest = hashlib.sha256()
            for piece in original.pieces(entry):
                out.write(piece.data)
                digest.update(piece.data)
            contents[entry.name] = digest.digest()
            note(entry, entry.dtype, list(entry.shape), entry.size, {"sha256": digest.hexdigest()})

        whole = hashlib.sha256(original.header)
        for name in original.entries:
            whole.update(contents[name])
        text = _header(original, written, whole.hexdigest())
        text += b" " * (reserved - len(text))
        assert len(text) == reserved, "the header was longer than its longest form"
        text = text.replace(_UNSUMMED.encode(), hashlib.sha256(text).hexdigest().encode(), 1)
        out.seek(0)
        out.write(struct.pack("<Q", reserved) + text)
        out.flush()
        info = _compare(beside, original)
    return info


def unpack(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, progress: Progress | None = None
) -> None:
    """Writes the original file, byte for byte; ``target`` appears whole and checked, or not at all.

    Raises:
        ExchangeError: if ``source`` is damaged, or no file of `pack`.
        ValueError: if ``target`` is ``source``.
        OSError: if a file cannot be read or written; a target that was there before is untouched.
    """
    _distinct(source, target)
    with opened(source) as packed, replacing(target) as (_, out):
        said = _said(packed)
        header = _original_header(packed, said)
        out.write(struct.pack("<Q", len(header)) + header)
        entries = parse_entries(packed.path, header)

        def write(entry: Entry) -> Iterator[np.ndarray]:
            for piece in _content(packed, said, entry):
                out.write(piece.data)
                yield piece

        digest = hashlib.sha256(header)
        for done, entry in enumerate(entries.values()):
            digest.update(_sha256(write(entry)).digest())
            if progress is not None:
                progress(entry.name, done + 1, len(entries))
        if digest.hexdigest() != said["digest"]:
            raise ExchangeError(f"{source}: what it decodes to is not what was packed; its content disagrees")


def file_info(path: str | os.PathLike[str], *, verify: bool = False) -> FileInfo:
    """What a compressed file holds, tensor by tensor in the original's order.

    Args:
        path: the file.
        verify: whether to read all of it and to compare every checksum, too; else only the header's.

    Raises:
        ExchangeError: if it is damaged, or no file of `pack`.
        OSError: if it cannot be read.
    """
    with opened(path) as packed:
        said = _said(packed)
        if verify:
            for entry in packed.entries.values():
                _check(packed, said, entry, _sha256(packed.pieces(entry)).hexdigest())
        return _info(packed, said)


def load_compressed(path: str | os.PathLike[str]) -> dict[str, CompressedArray | np.ndarray]:
    """The tensors of a compressed file by name, on the host: coded ones as they lie there, the others as arrays.

    Raises:
        ExchangeError: if it is damaged, or no file of `pack`; and for a tensor whose dtype NumPy lacks.
        OSError: if it cannot be read.
    """
    found: dict[str, CompressedArray | np.ndarray] = {}
    with opened(path) as packed:
        said = _said(packed)
        for name, original in parse_entries(packed.path, _original_header(packed, said)).items():
            entry = packed.entries[name]
            content = packed.read(entry)
            _check(packed, said, entry, hashlib.sha256(content.data).hexdigest())
            if "coder" in said["tensors"][name]:
                found[name] = _compressed(packed, said["tensors"][name], original, content)
            elif original.dtype in _DTYPES:
                found[name] = _array(original, content)
            else:
                raise ExchangeError(f"{path}: tensor {name!r} is of dtype {original.dtype}, which NumPy lacks")
    return found


# --- the header -----------------------------------------------------------------------------------


def _header(original: TensorFile, written: Mapping[str, dict[str, Any]], digest: str) -> bytes:
    """The header in JSON, its checksum zero; ``written`` has both the format's fields of a tensor and ours."""
    format_keys = ("dtype", "shape", "data_offsets")
    said = {
        "checksum": _UNSUMMED,  # first, so that nothing like it stands before
        "version": _VERSION,
        "header": base64.b64encode(zlib.compress(original.header, 9)).decode(),
        "digest": digest,
        "tensors": {
            name: {key: value for key, value in fields.items() if key not in format_keys}
            for name, fields in written.items()
        },
    }
    header: dict[str, Any] = {"__metadata__": {_KEY: _canonical(said)}}
    header |= {name: {key: fields[key] for key in format_keys} for name, fields in written.items()}
    return _canonical(header).encode()


def _longest(original: TensorFile, codecs: Mapping[str, Codec]) -> dict[str, dict[str, Any]]:
    """Fields none of which can be shorter than what will be written: the header comes last, its room first."""
    end = sum(entry.size for entry in original.entries.values())
    longest = {}
    for entry in original.entries.values():
        fields: dict[str, Any] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [end, end]}
        fields["sha256"] = _UNSUMMED.replace("0", "f")
        codec = codecs.get(_DTYPES.get(entry.dtype, ""))
        if codec is not None:
            fields |= {"codec": codec.name, "coder": max(CODERS, key=len), "limit": 99, "entropy": 99.9999}
            fields["sizes"] = [entry.size] * 5
            fields["shape"] = max((list(entry.shape), [entry.size]), key=lambda shape: len(_canonical(shape)))
        longest[entry.name] = fields
    return longest


def _said(packed: TensorFile) -> dict[str, Any]:
    """The entry of the header, once its checksum agrees with every byte of the header."""
    path = packed.path
    if _KEY not in packed.metadata:
        raise ExchangeError(f"{path} has no {_KEY!r} entry in its header: it was not written by pack")
    try:
        said = json.loads(packed.metadata[_KEY])
        checksum, version = said["checksum"], said["version"]
        if "header" not in said and "geometry" in said:
            raise ExchangeError(f"{path} is a module of save_module; allowed are files of pack")
        unsummed = packed.header.replace(checksum.encode(), _UNSUMMED.encode(), 1)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ExchangeError):
            raise
        raise ExchangeError(f"{path} has a damaged header: {error}") from error
    if hashlib.sha256(unsummed).hexdigest() != checksum:
        raise ExchangeError(f"{path}: the header's checksum disagrees; the file was altered or damaged")
    if version != _VERSION:
        raise ExchangeError(f"{path} is of format version {version!r}; this library reads {_VERSION}")
    return said


def _original_header(packed: TensorFile, said: dict[str, Any]) -> bytes:
    try:
        header = zlib.decompress(base64.b64decode(said["header"], validate=True))
        names = set(parse_entries(packed.path, header))
    except (binascii.Error, zlib.error, KeyError, TypeError) as error:
        raise ExchangeError(f"{packed.path} has a damaged header of the original: {error}") from error
    if names != set(packed.entries) or names != set(said["tensors"]):
        raise ExchangeError(f"{packed.path} has other tensors than its header says")
    return header


def _canonical(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


# --- tensors --------------------------------------------------------------------------------------


def _array(entry: Entry, content: np.ndarray) -> np.ndarray:
    name = _DTYPES[entry.dtype]
    dtype = FORMATS[name].dtype if name in FORMATS else np.dtype(name)
    return content.view(dtype.newbyteorder("<")).reshape(entry.shape)


def _width(entry: Entry) -> int:
    """Bytes of a number, roughly: only the order of widths matters."""
    return -(-entry.size // max(math.prod(entry.shape), 1))


def _compressed(packed: TensorFile, fields: dict[str, Any], original: Entry, content: np.ndarray) -> CompressedArray:
    geometry = Geometry(_DTYPES[original.dtype], original.shape, fields["coder"], fields["limit"])
    if geometry.coder not in CODERS:
        raise ExchangeError(f"{packed.path}: tensor {original.name!r} has the coder {geometry.coder!r}, unknown here")
    parts, begin = {}, 0
    for (name, dtype), size in zip(part_dtypes(geometry).items(), fields["sizes"], strict=True):
        end = begin + size * dtype.itemsize
        parts[name] = content[begin:end].view(dtype.newbyteorder("<"))
        begin = end
    if "luts" in parts:
        parts["luts"] = parts["luts"].reshape(-1, 256)
    return CompressedArray(parts, geometry)


def _content(packed: TensorFile, said: dict[str, Any], original: Entry) -> Iterator[np.ndarray]:
    """The original bytes of a tensor; they are not to be believed before the iterator has ended."""
    entry, fields = packed.entries[original.name], said["tensors"][original.name]
    if "coder" not in fields:
        digest = hashlib.sha256()
        for piece in packed.pieces(entry):
            digest.update(piece.data)
            yield piece
        _check(packed, said, entry, digest.hexdigest())
        return
    content = packed.read(entry)
    _check(packed, said, entry, hashlib.sha256(content.data).hexdigest())
    try:
        array = decode_host(_compressed(packed, fields, original, content))
    except ValueError as error:  # only a forger's file comes here
        raise ExchangeError(f"{packed.path}: tensor {original.name!r} does not decode: {error}") from error
    whole = array.reshape(-1).view(np.uint8)
    for begin in range(0, len(whole), PIECE):
        yield whole[begin : begin + PIECE]


def _check(packed: TensorFile, said: dict[str, Any], entry: Entry, found: str) -> None:
    fields = said["tensors"].get(entry.name)
    if fields is None or fields["sha256"] != found:
        raise ExchangeError(
            f"{packed.path}: tensor {entry.name!r} disagrees with its checksum; the file was altered or damaged"
        )


def _sha256(pieces: Iterator[np.ndarray]) -> Any:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.data)
    return digest


def _compare(beside: Path, original: TensorFile) -> FileInfo:
    """Reads what was written and compares every tensor with the original's bytes."""
    with opened(beside) as packed:
        said = _said(packed)
        entries = parse_entries(beside, _original_header(packed, said))
        for entry in entries.values():
            for found, wanted in zip(_content(packed, said, entry), original.pieces(entry), strict=True):
                if not np.array_equal(found, wanted):
                    raise ExchangeError(f"tensor {entry.name!r} does not decode to the original; nothing was written")
        return _info(packed, said)


def _info(packed: TensorFile, said: dict[str, Any]) -> FileInfo:
    header = _original_header(packed, said)
    tensors = []
    for name, original in parse_entries(packed.path, header).items():
        fields = said["tensors"][name]
        limit = float(original.size)
        if "coder" in fields:
            limit = fields["entropy"] * math.prod(original.shape) / 8
        tensors.append(
            TensorInfo(
                name,
                original.dtype,
                original.shape,
                fields.get("coder", "copy"),
                original.size,
                packed.entries[name].size,
                limit,
            )
        )
    size = 8 + len(header) + sum(tensor.original_bytes for tensor in tensors)
    return FileInfo(tensors, size, packed.begin + sum(entry.size for entry in packed.entries.values()))


def _distinct(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    if os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target):
        raise ValueError(f"target is {os.fspath(target)}, the source itself; allowed is another file")
