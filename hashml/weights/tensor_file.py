"""Bytes of the tensors of a safetensors file, whatever their dtypes, and files that appear whole or not at all.

The format's own reader judges a file; it has no float8 for NumPy, and gives no header, so that bytes are read here.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import struct
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from hashml.exchange import ExchangeError

PIECE = 2**24
_LARGEST_HEADER = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file: what the header says of it; ``begin`` and ``end`` count bytes after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


class TensorFile(NamedTuple):
    """A safetensors file, open for reading."""

    path: Path
    file: BufferedReader
    header: bytes
    """JSON, without the 8 bytes of its length."""
    entries: dict[str, Entry]
    """In the order of their bytes."""

    @property
    def begin(self) -> int:
        """Where the first tensor's bytes are."""
        return 8 + len(self.header)

    @property
    def metadata(self) -> dict[str, Any]:
        return json.loads(self.header).get("__metadata__") or {}

    def read(self, entry: Entry, begin: int = 0, end: int | None = None) -> np.ndarray:
        """The tensor's bytes, or those from ``begin`` to ``end``."""
        content = np.empty((entry.size if end is None else end) - begin, np.uint8)
        self.file.seek(self.begin + entry.begin + begin)
        if self.file.readinto(content.data) != len(content):
            raise ExchangeError(f"{self.path} was cut short while it was read, in tensor {entry.name!r}")
        return content

    def pieces(self, entry: Entry) -> Iterator[np.ndarray]:
        """The tensor's bytes in pieces of `PIECE`, so that no tensor need fit in memory."""
        for begin in range(0, entry.size, PIECE):
            yield self.read(entry, begin, min(begin + PIECE, entry.size))


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """The file, once the format's own reader has accepted it.

    Raises:
        ExchangeError: if it is damaged or no safetensors file.
        OSError: if it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise ExchangeError(f"{path} is a directory; allowed is a safetensors file")
    with open(path, "rb") as file:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ExchangeError(f"{path} is damaged or no safetensors file: {error}") from error
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LARGEST_HEADER:
            raise ExchangeError(f"{path} has a header of {length} bytes; allowed are {_LARGEST_HEADER}")
        header = file.read(length)
        yield TensorFile(path, file, header, parse_entries(path, header))


def parse_entries(path: Path, header: bytes) -> dict[str, Entry]:
    """The tensors that a header names, in the order of their bytes.

    Raises:
        ExchangeError: if it is no header.
    """
    try:
        said = json.loads(header)
        said.pop("__metadata__", None)
        found = [Entry(name, one["dtype"], tuple(one["shape"]), *one["data_offsets"]) for name, one in said.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExchangeError(f"{path} has a damaged header: {error}") from error
    return {entry.name: entry for entry in sorted(found, key=lambda entry: (entry.begin, entry.end))}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[tuple[Path, BinaryIO]]:
    """A file beside ``path`` that takes its place once the block has ended well, and is gone otherwise."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; allowed is a file to write")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(beside, "xb") as file:
            yield beside, file
            file.flush()
            os.fsync(file.fileno())  # the bytes reach the disk before the name does
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
