"""Imports run one way, and importing the library does nothing but define it."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]

LINT = """
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename="pyproject.toml", no_cache=True, no_logo=True))
"""


def lint_imports(folder):
    return python(LINT, folder)


def python(code, folder, **environment):
    """Run ``code`` where nothing of this process (its import hook, its devices) is in force."""
    paths = os.pathsep.join([str(folder), str(folder / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def contracts():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [contract["name"] for contract in settings["tool"]["importlinter"]["contracts"]]


def test_the_contracts_hold():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Contracts: {len(contracts())} kept, 0 broken." in done.stdout


def test_every_contract_notices_what_it_forbids(tmp_path):
    for folder in ("hashml", "kernels/hashml_kernels", "experiments"):
        for file in (ROOT / folder).rglob("*.py"):
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, line in {
        "hashml/accounting.py": "import experiments",
        "hashml/hashing/universal.py": "import hashml.sharing",
        "kernels/hashml_kernels/bits.py": "import flax",
        "hashml/sharing/robe.py": "import time",
    }.items():
        with open(tmp_path / file, "a") as source:
            source.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"Contracts: 0 kept, {len(contracts())} broken." in done.stdout


IMPORT_ALL = """
import importlib, json, pkgutil, random, sys
import numpy as np
import flax.linen, jax, optax, safetensors

before = dict(jax.config.values), random.getstate(), np.random.get_state()
known = set(sys.modules)
for root in ("hashml", "hashml_kernels"):
    package = importlib.import_module(root)
    for module in pkgutil.walk_packages(package.__path__, root + "."):
        importlib.import_module(module.name)
after = dict(jax.config.values), random.getstate(), np.random.get_state()

print(json.dumps({
    "settings": [name for name in before[0] if before[0][name] != after[0].get(name)],
    "drawn": before[1] != after[1] or not all(map(np.array_equal, before[2], after[2])),
    "modules": sorted(name for name in sys.modules if name.split(".")[0] in ("hashml", "hashml_kernels")),
    "others": sorted({name.split(".")[0] for name in set(sys.modules) - known}),
}))
"""


def test_importing_everything_touches_nothing():
    """No device (there is none of that name), no random state, no setting, and no library that users lack."""
    done = python(IMPORT_ALL, ROOT, JAX_PLATFORMS="nonexistent")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["settings"] == []
    assert not found["drawn"]
    files = [*(ROOT / "hashml").rglob("*.py"), *(ROOT / "kernels/hashml_kernels").rglob("*.py")]
    assert len(found["modules"]) == len(files)
    for_experiments = {"argparse", "grain", "matplotlib", "polars", "pooch", "sklearn", "scipy", "torch", "tyro"}
    assert not for_experiments & set(found["others"])
