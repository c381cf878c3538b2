"""A wheel holds the library and its kernels, nothing else, and works where nothing else of the project is."""

import email
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from build import ProjectBuilder
from pyproject_hooks import quiet_subprocess_runner

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the backend that pyproject.toml names, as installed here: no download."""
    builder = ProjectBuilder(ROOT, runner=quiet_subprocess_runner)
    return Path(builder.build("wheel", tmp_path_factory.mktemp("wheel")))


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    files = {name for name in names if ".dist-info/" not in name}
    expected = {
        str(file.relative_to(source))
        for source, package in ((ROOT, "hashml"), (ROOT / "kernels", "hashml_kernels"))
        for file in (source / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert files == expected
    assert {"hashml/py.typed", "hashml_kernels/py.typed", "hashml/sharing/robe.py"} <= files
    assert {name.split("/")[0] for name in files} == {"hashml", "hashml_kernels"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_metadata_is_that_of_the_project(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(path))
    assert (metadata["Name"], metadata["Version"]) == (project["name"], project["version"])
    assert metadata["Requires-Python"] == project["requires-python"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(always) == len(project["dependencies"])


LOOKUP = """
import json
import hashml, hashml_kernels
import numpy as np
from hashml.sharing import robe_lookup
from hashml_kernels.hash_gather import hash_gather

memory, ids = np.arange(100, dtype=np.float32), np.array([3, 2**31 + 5], np.uint32)
rows, same = (f(memory, ids, features=16, block_size=4, seed=1) for f in (robe_lookup, hash_gather))
print(json.dumps([hashml.__file__, hashml_kernels.__file__, rows.shape, bool((rows == same).all())]))
"""


def test_the_unpacked_wheel_looks_up_rows(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOKUP], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = [str(tmp_path / package / "__init__.py") for package in ("hashml", "hashml_kernels")]
    assert done.stdout.splitlines()[-1].startswith(f'["{expected[0]}", "{expected[1]}", [2, 16], true]')
