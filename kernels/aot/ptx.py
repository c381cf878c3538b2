"""Registers, spills and shared memory of the GPU kernels in a dump of XLA."""

import importlib.util
import pathlib
import re
import shutil
import subprocess
from typing import Any

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_THUNK = re.compile(r"\] (\w+) grid: .* shared_memory: (\d+) bytes")
_KERNEL_NAME = re.compile(r'custom_call_target="(?:__gpu\$xla\.gpu\.triton|mosaic_gpu\w*)".*?\bname = "(\w+)"')


def kernels(dump: pathlib.Path, text: str) -> list[dict[str, Any]]:
    """Every kernel of a program: its PTX lies in ``dump``, and ``text`` is the compiled program.

    XLA's own fusions are there too, with ``"kernel": False``.

    Raises:
        ValueError: where a kernel of the program left no PTX.
        RuntimeError: where ptxas is missing or refuses the PTX.
    """
    ours = set(_KERNEL_NAME.findall(text))
    shared = {
        name: int(size)
        for file in dump.glob("*thunk_sequence.txt")
        for name, size in _THUNK.findall(file.read_text())
    }
    found = []
    for file in sorted(dump.glob("*.ptx")):
        if ".entry" in file.read_text():
            found += [
                {**entry, "kernel": entry["name"] in ours, "on_chip_bytes": shared.get(entry["name"])}
                for entry in _assemble(file)
            ]
    if missing := ours - {entry["name"] for entry in found}:
        raise ValueError(f"no PTX for {sorted(missing)} in {dump}")
    return found


def _assemble(file: pathlib.Path) -> list[dict[str, Any]]:
    run = subprocess.run(
        [_ptxas(), "-v", "--gpu-name", "sm_90a", str(file), "-o", "/dev/null"], capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError(f"ptxas refuses {file.name}: {run.stderr[:1000]}")
    names = _ENTRY.findall(run.stderr)
    spills = [sum(map(int, pair)) for pair in _SPILL.findall(run.stderr)]
    registers = [int(number) for number in _REGISTERS.findall(run.stderr)]
    return [
        {"name": name, "registers": count, "spills": spill}
        for name, count, spill in zip(names, registers, spills, strict=True)
    ]


def _ptxas() -> str:
    """The assembler of the environment: the nvcc package of CUDA 12 or 13, or one on the path."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        for folder in ("cuda_nvcc", "cu13"):
            if (path := pathlib.Path(root, folder, "bin", "ptxas")).exists():
                return str(path)
    if path := shutil.which("ptxas"):
        return path
    raise RuntimeError("ptxas is missing: install nvidia-cuda-nvcc-cu12")
