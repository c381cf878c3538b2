"""Where data files come from: ``$HASHML_DATA``, then the data set's home, else an error that helps.

``HASHML_DATA`` names a folder with one sub-folder a data set. Files found there, and files that are
downloaded, are checked by their sha256 before anything reads them.
"""

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "HASHML_DATA"


class DataNotFound(FileNotFoundError):
    """A data file is neither under ``$HASHML_DATA`` nor to be had from its home."""


class ChecksumMismatch(ValueError):
    """A data file is not the one it should be."""


@dataclass(frozen=True)
class Home:
    """Where a data set lives, and under which name a copy is looked for.

    Attributes:
        title: the data set's name, for messages.
        page: the page that explains how to get it.
        name: the file's place under ``$HASHML_DATA``, such as ``movielens_1m/ml-1m.zip``.
        url: a direct address of that file; None where the home asks for a login or an agreement.
        sha256: the file's checksum; None where the home may serve any of several files.
    """

    title: str
    page: str
    name: str
    url: str | None = None
    sha256: str | None = None


def data_folder() -> Path | None:
    """The folder that ``HASHML_DATA`` names, or None when it is unset or empty.

    Raises:
        DataNotFound: the variable names something that is not a folder.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise DataNotFound(f"{VARIABLE}={value} is not a folder; set it to the one that holds the data sets")
    return folder


def find(name: str, sha256: str | None) -> Path | None:
    """The file ``name`` under ``$HASHML_DATA``, checked; None when it is not there.

    Raises:
        ChecksumMismatch: the file is there but is another one.
    """
    folder = data_folder()
    if folder is None or not (folder / name).is_file():
        return None
    path = folder / name
    if sha256 is not None:
        status = path.stat()
        found = _sha256(path, status.st_size, status.st_mtime_ns)
        if found != sha256:
            raise ChecksumMismatch(
                f"{path} has sha256 {found}, expected {sha256}; it is damaged or another version: "
                "replace it, or remove it"
            )
    return path


def locate(name: str, sha256: str | None, home: Home) -> Path:
    """The file ``name`` under ``$HASHML_DATA``, checked.

    Raises:
        ChecksumMismatch: the file is there but is another one.
        DataNotFound: it is not there; the message says what to get and where to put it.
    """
    path = find(name, sha256)
    if path is None:
        raise _not_found(home, name)
    return path


def fetch(home: Home) -> Path:
    """The home's own file: from ``$HASHML_DATA``, else downloaded once into the user's cache.

    Raises:
        ChecksumMismatch: the file is there, or was served, but is another one.
        DataNotFound: it cannot be downloaded.
    """
    path = find(home.name, home.sha256)
    if path is not None:
        return path
    if home.url is None:
        raise _not_found(home, home.name)
    import pooch  # brings a network stack, which most runs never need

    cache = Path(pooch.os_cache("hashml")) / Path(home.name).parent
    known = None if home.sha256 is None else f"sha256:{home.sha256}"
    try:
        # pooch downloads beside the target, checks, and moves: nothing half written is ever read.
        return Path(pooch.retrieve(home.url, known, fname=Path(home.name).name, path=cache))
    except OSError as error:
        response = getattr(error, "response", None)
        if response is not None:
            response.close()  # an answer such as 404 leaves its connection open
        raise _not_found(home, home.name, f"The download of {home.url} failed: {error}. ") from error
    except ValueError as error:
        raise ChecksumMismatch(f"{home.url} does not serve the file expected: {error}") from error


def _not_found(home: Home, name: str, reason: str = "") -> DataNotFound:
    value = os.environ.get(VARIABLE) or "not set"
    return DataNotFound(
        f"{home.title}: no file {name} under ${VARIABLE} ({value}). {reason}Get the data from "
        f"{home.page}, put it at ${VARIABLE}/{home.name}, and let {VARIABLE} name that folder: "
        f"export {VARIABLE}=/path/to/data"
    )


@functools.cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """Once a process for each state of a file; ``size`` and ``modified`` only tell states apart."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
