"""Programs compiled here for chips that are not here: their devices, and what the compiler says of a program.

Needs the environment of `make aot`, which has the compilers; nothing of this runs what it compiles.
"""

import os
import re
from pathlib import Path
from typing import Any

# No accelerator is at hand; libtpu would look for a metadata server, and it would refuse to load while another
# process compiles with it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# XLA's CUDA plugin refuses to register without a driver otherwise.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

jax.config.update("jax_platforms", "cpu")

H200 = Path(__file__).resolve().parents[1] / "kernels" / "aot" / "h200.txtpb"
"""What XLA wants to know of the chip."""

CHIP_BYTES = {"v5e": 16e9, "v5p": 95e9, "h200": 141e9}

_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
_ELEMENT = re.compile(r"(f32|bf16|s32|u32|f16)\[([\d,]*)\]")
_WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}


def chips(target: str) -> list[Any]:
    """Devices of a TPU slice, ``"v5e:2x2"``, or of a host of H200s: ``"h200"`` has one, ``"h200:1x8x1"`` eight."""
    kind, _, shape = target.partition(":")
    if kind != "h200":
        return list(topologies.get_topology_desc(platform="tpu", topology_name=target).devices)
    options = {"topology": shape or "1x1x1", "target_config": H200.read_text()}
    described = topologies.get_topology_desc(platform="cuda", topology_name=shape or "1x1x1", **options)
    return list(described.devices)[: int(np.prod([int(size) for size in shape.split("x")])) if shape else 1]


def chip_bytes(target: str) -> float:
    """Memory of a chip of the target."""
    return CHIP_BYTES[target.partition(":")[0]]


def placed(tree: Any, mesh: Mesh, spec: P) -> Any:
    """Shapes and dtypes of a tree, all sharded alike over a mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def used_bytes(compiled: Any) -> int:
    """What a chip holds at most: arguments, results and temporaries, what is updated in place once."""
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("the compiler says nothing of the program's memory")
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return int(used - memory.alias_size_in_bytes)


def fits(used: int, target: str, found: Any) -> None:
    """Raises RuntimeError, with what was found, where a chip of the target has less memory."""
    if used >= chip_bytes(target):
        raise RuntimeError(f"{used / 1e9:.2f} GB a chip do not fit into {chip_bytes(target) / 1e9:g} GB: {found}")


def collectives(compiled: Any) -> list[tuple[str, int]]:
    """Kind and bytes of every collective of a compiled program."""
    text = compiled.as_text()
    if text is None:
        raise RuntimeError("the compiler does not show the program")
    return [
        (
            match[2],
            sum(
                _WIDTHS[kind] * int(np.prod([int(n) for n in shape.split(",") if n] or [1]))
                for kind, shape in _ELEMENT.findall(match[1])
            ),
        )
        for match in _COLLECTIVE.finditer(text)
    ]
