"""What a run was measured with: commit, versions, device, date."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[2]
"""The checkout that holds ``experiments``."""

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "hashml")

_GENERATED = ("experiments/results", "RESULTS.md", "results.html")  # a run changes these itself


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def collect(root: Path = ROOT) -> dict[str, Any]:
    """The environment as ``environment.json`` holds it; what cannot be known is None."""
    devices = jax.devices()
    return {
        "date": now(),
        "commit": _git(root, "rev-parse", "HEAD"),
        "dirty": _dirty(root),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "backend": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
    }


def differs(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two environments differ in more than their date."""
    return any(a.get(name) != b.get(name) for name in (a.keys() | b.keys()) - {"date", "resumed"})


def describe_device(environment: dict[str, Any]) -> str:
    """The device in words: ``NVIDIA H200``, ``2 × TPU v5e``, or processor and cores."""
    devices = [_one_device(e) for e in (environment, *environment.get("resumed", ()))]
    return ", then ".join(dict.fromkeys(devices))


def _one_device(environment: dict[str, Any]) -> str:
    if environment.get("backend") == "cpu":
        return f"{environment.get('cpu') or 'CPU'}, {environment.get('cores')} cores"
    count = environment.get("devices", 1)
    name = environment.get("device") or "unknown device"
    return name if count == 1 else f"{count} × {name}"


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _dirty(root: Path) -> bool | None:
    """Whether the checkout has changes that are not committed, other than results."""
    changes = _git(root, "status", "--porcelain", "--", ".", *(f":!{path}" for path in _GENERATED))
    return None if changes is None else bool(changes)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or None
