"""Compiles the problems of one platform and writes a row for each: ``python -m aot.compile cuda ROWS``."""

import argparse
import json
import os
import pathlib
import re
import shutil
import time
import warnings
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aot import ptx
from hashml_kernels.problem import Problem, every_problem

_H200 = pathlib.Path(__file__).with_name("h200.txtpb")
_CALLS = re.compile(r'custom_call_target="(?:__gpu\$xla\.gpu\.triton|mosaic_gpu\w*|tpu_custom_call)"')
_PAYLOAD = re.compile(r"custom_call @(?:__gpu\$xla\.gpu\.triton|mosaic_gpu\w*|tpu_custom_call)\([^)]*\) (.*)")
_TPU_NAME = re.compile(r'%(\w+?)(?:\.\d+)? = .*custom_call_target="tpu_custom_call"')
_TPU_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"\}\]')


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("platform", choices=("cuda", "tpu"))
    parser.add_argument("rows", type=pathlib.Path)
    parser.add_argument("--op")
    parser.add_argument("--case")
    options = parser.parse_args()
    # Emitted whenever a Triton kernel is lowered, since jax 0.11.
    warnings.filterwarnings("ignore", message="The Pallas Triton backend", category=DeprecationWarning)
    mesh = _mesh(options.platform)
    with options.rows.open("w") as file:
        for problem in every_problem(options.op, options.case):
            print(json.dumps(compile_problem(problem, options.platform, mesh)), file=file, flush=True)


def _mesh(platform: str) -> Mesh:
    """One device of the platform's chip."""
    if platform == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=_H200.read_text()
        )
    return Mesh(np.array(topology.devices[:1]), ("chip",))


def compile_problem(problem: Problem, platform: str, mesh: Mesh) -> dict[str, Any]:
    """What the compilers say of a problem's kernel, asked for by name and as ``"auto"`` picks it."""
    kernel = problem.kernels.get(platform)
    refusal = f"no kernel for {platform}" if kernel is None else problem.refusal(kernel)
    row: dict[str, Any] = {
        "chip": mesh.devices.item().device_kind,
        "op": problem.op,
        "case": problem.case,
        "direction": problem.direction,
        "bytes": problem.bytes,
        "refusal": refusal,
        "kernels": [],
        "temporary_bytes": None,
        "failures": [],
    }
    start = time.perf_counter()
    done = set()
    for implementation in ("auto",) if refusal else (kernel, "auto"):
        try:
            lowered = _lower(problem, implementation, mesh)
            payload = tuple(_PAYLOAD.findall(lowered.as_text()))
            if payload and payload in done:  # the kernels of the other name, compiled already
                continue
            done.add(payload)
            _examine(problem, lowered, platform, row)
        except Exception as error:  # whatever a compiler raises is the finding; the other problems are wanted too
            row["failures"].append(f"{implementation}: {type(error).__name__}: {error}"[:2000])
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _lower(problem: Problem, implementation: str | None, mesh: Mesh) -> jax.stages.Lowered:
    place = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in problem.arguments]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # newer JAX asks there for the kind of device
        return jax.jit(lambda *arrays: problem.call(implementation, *arrays)).lower(*arguments)


def _examine(problem: Problem, lowered: jax.stages.Lowered, platform: str, row: dict[str, Any]) -> None:
    """Compiles, and puts into ``row`` what was found."""
    dump = pathlib.Path(os.environ["AOT_DUMP"]) if platform == "cuda" else None
    if dump:
        shutil.rmtree(dump, ignore_errors=True)
    compiled = lowered.compile()
    text = str(compiled.as_text())
    found = ptx.kernels(dump, text) if dump else _tpu_kernels(text)
    # By name: the compiler numbers its files, and so lists the kernels, in an order of its own.
    row["kernels"] = sorted((kernel for kernel in found if kernel["kernel"]), key=lambda kernel: kernel["name"])
    row["failures"] += [f"{kernel['name']} spills {kernel['spills']} bytes" for kernel in found if kernel["spills"]]
    if bool(row["kernels"]) != (row["refusal"] is None):
        row["failures"].append(f"the program holds {len(row['kernels'])} kernels")
    memory = compiled.memory_analysis()
    if memory is None:
        raise ValueError("the compiler reports no memory use")
    row["temporary_bytes"] = memory.temp_size_in_bytes
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    if problem.table_rows and held >= 4 * problem.table_rows:
        row["failures"].append(f"the program holds {held} bytes; the table has {problem.table_rows} rows")


def _tpu_kernels(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        if _CALLS.search(line):
            name, vmem = _TPU_NAME.search(line), _TPU_VMEM.search(line)
            if not name or not vmem:
                raise ValueError(f"a kernel call of a form not known here: {line[:300]}")
            found.append(
                {"name": name[1], "kernel": True, "registers": None, "spills": None, "on_chip_bytes": int(vmem[1])}
            )
    return found


if __name__ == "__main__":
    main()
