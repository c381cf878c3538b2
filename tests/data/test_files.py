"""Where data files come from, and what is said when they do not."""

import hashlib
import os
from pathlib import Path

import pytest

from experiments.data import avazu, criteo, frappe, movielens_1m, movielens_100k
from experiments.data.files import ChecksumMismatch, DataNotFound, Home, data_folder, fetch, find, locate

CONTENT = b"user item\n" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HOME = Home("Toy set", "https://example.org/toy", "toy/toy.zip", sha256=SHA256)


def put(folder: Path, name: str, content: bytes = CONTENT) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def served_home(address: str) -> Home:
    return Home(HOME.title, HOME.page, HOME.name, f"{address}/toy.zip", SHA256)


def test_a_file_in_the_folder_is_found(no_data):
    path = put(no_data, "toy/a.txt")
    assert find("toy/a.txt", SHA256) == path
    assert locate("toy/a.txt", SHA256, HOME) == path
    assert locate("toy/a.txt", None, HOME) == path


def test_another_file_is_refused_by_name_and_both_checksums(no_data):
    path = put(no_data, "toy/a.txt", b"not it")
    with pytest.raises(ChecksumMismatch) as error:
        find("toy/a.txt", SHA256)
    for part in (str(path), SHA256, hashlib.sha256(b"not it").hexdigest()):
        assert part in str(error.value)


def test_a_file_that_changes_is_checked_again(no_data):
    path = put(no_data, "toy/a.txt")
    assert find("toy/a.txt", SHA256) == path
    path.write_bytes(CONTENT + b"!")
    with pytest.raises(ChecksumMismatch):
        find("toy/a.txt", SHA256)


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_nothing_is_found(monkeypatch, value):
    monkeypatch.delenv("HASHML_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("HASHML_DATA", value)
    assert data_folder() is None
    assert find("toy/a.txt", SHA256) is None
    with pytest.raises(DataNotFound, match="not set"):
        locate("toy/a.txt", SHA256, HOME)


def test_a_variable_that_names_no_folder_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("HASHML_DATA", str(tmp_path / "typo"))
    with pytest.raises(DataNotFound, match=r"typo is not a folder"):
        find("toy/a.txt", SHA256)


def test_the_error_says_what_to_get_and_where_to_put_it(no_data):
    with pytest.raises(FileNotFoundError) as error:
        locate("toy/a.txt", SHA256, HOME)
    for part in ("Toy set", "toy/a.txt", HOME.page, "$HASHML_DATA/toy/toy.zip", "export HASHML_DATA="):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("load", "home"),
    [
        (frappe.load, frappe.HOME),
        (frappe.splits, frappe.HOME),
        (criteo.load, criteo.RANDOM),
        (criteo.splits, criteo.RANDOM),
        (criteo.head_splits, criteo.HEAD),
        (criteo.kaggle, criteo.KAGGLE),
        (criteo.terabyte, criteo.TERABYTE),
        (avazu.splits, avazu.HOME),
    ],
)
def test_every_loader_without_its_files_says_what_to_get(no_data, load, home):
    with pytest.raises(DataNotFound) as error:
        load()
    for part in (home.title, home.page, f"$HASHML_DATA/{home.name}"):
        assert part in str(error.value)


def test_a_download_is_checked_kept_and_not_repeated(no_data, served):
    folder, address = served
    source = put(folder, "toy.zip")
    path = fetch(served_home(address))
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(os.environ["XDG_CACHE_HOME"])
    source.unlink()
    assert fetch(served_home(address)) == path


def test_a_copy_in_the_folder_spares_the_download(no_data):
    path = put(no_data, HOME.name)
    assert fetch(served_home("http://127.0.0.1:9")) == path


def test_a_wrong_download_is_refused_and_not_kept(no_data, served):
    folder, address = served
    put(folder, "toy.zip", b"something else")
    with pytest.raises(ChecksumMismatch, match=r"toy\.zip"):
        fetch(served_home(address))
    assert [path for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("module", [movielens_1m, movielens_100k])
def test_a_failed_download_says_what_to_get(no_data, served, monkeypatch, module):
    _, address = served
    home = Home(module.HOME.title, module.HOME.page, module.HOME.name, f"{address}/missing.zip", module.HOME.sha256)
    monkeypatch.setattr(module, "HOME", home)
    with pytest.raises(DataNotFound) as error:
        module.load()
    for part in ("missing.zip failed", "404", home.page, f"$HASHML_DATA/{home.name}"):
        assert part in str(error.value)


def test_a_home_without_an_address_is_not_downloaded_from(no_data):
    with pytest.raises(DataNotFound, match="Toy set"):
        fetch(HOME)
