"""What the tests of data loaders share: the data folder, and a small web server."""

import functools
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def require_data() -> Callable[[str], None]:
    """Skips a test whose file is not under ``$HASHML_DATA``."""

    def require(name: str) -> None:
        folder = os.environ.get("HASHML_DATA")
        if not folder or not (Path(folder) / name).is_file():
            pytest.skip(f"needs {name} under $HASHML_DATA, which is {folder or 'not set'}")

    return require


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """``$HASHML_DATA`` is an empty folder, and so is the user's cache."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("HASHML_DATA", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return folder


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """A test's output is not a web server's log."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which a web server on this machine serves it."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
