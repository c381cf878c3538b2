"""The MLPerf DLRM with 100 MB of shared weights on a TPU pod slice, compiled here without one.

    make aot        # or, in its environment: python -m experiments.sharing.pss_pod

26 tables of 188 M x 128 virtual floats (96 GB) are read from 25 million weights (100 MB) that every chip
holds; the batch is split over the chips, and the only thing of the tables that crosses between them is the
gradient of the memory, all-reduced. The compiler says whether that fits and what it moves.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.pods import chips, collectives, fits, placed, used_bytes
from hashml.models.dlrm import DLRM, MLPERF, binary_cross_entropy
from hashml.models.training import TrainState, data_parallel_step, init_state
from hashml.sharing import RobeTables

MEMORY = 25_000_000 // 128 * 128
"""Weights stored: 100 MB of float32, whole lanes."""
BATCH = 131_072
"""Rows of a step over all chips; the largest of the published runs."""


def compile_step(topology: str) -> dict[str, int | str]:
    """Compile a training step for a pod slice; what it needs and moves, a chip.

    Raises:
        RuntimeError: where it does not fit, or the tables cross in another way than by the all-reduce.
    """
    devices = chips(topology)
    mesh = Mesh(np.array(devices), ("data",))
    tables = RobeTables(MLPERF.tables, MLPERF.dimension, budget=MEMORY, block_size=128, align=128)
    model = DLRM(tables, bottom=MLPERF.bottom, top=MLPERF.top)
    optimizer = optax.sgd(1.0)

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["dense"], batch["ids"])
        return binary_cross_entropy(jnp.asarray(logits), batch["labels"])

    def begin() -> TrainState:
        dense, ids = jnp.zeros((2, MLPERF.dense_features)), jnp.zeros((2, len(MLPERF.tables)), jnp.int32)
        return init_state(model.init(jax.random.key(0), dense, ids)["params"], optimizer)

    batch = {
        "dense": jax.ShapeDtypeStruct((BATCH, MLPERF.dense_features), jnp.float32),
        "ids": jax.ShapeDtypeStruct((BATCH, len(MLPERF.tables)), jnp.int32),
        "labels": jax.ShapeDtypeStruct((BATCH,), jnp.float32),
    }
    state = jax.eval_shape(begin)
    step = jax.jit(data_parallel_step(loss, optimizer, mesh), donate_argnums=0)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = step.lower(placed(state, mesh, P()), placed(batch, mesh, P("data"))).compile()
    used, moved = used_bytes(compiled), collectives(compiled)
    found = {
        "topology": topology,
        "chips": len(devices),
        "virtual_bytes": 4 * sum(MLPERF.tables) * MLPERF.dimension,
        "memory_bytes": 4 * MEMORY,
        "parameter_bytes": sum(4 * leaf.size for leaf in jax.tree.leaves(state.params)),
        "bytes_a_chip": used,
        "all_reduce_bytes": sum(size for kind, size in moved if kind == "all-reduce"),
        "collectives": sum(1 for kind, size in moved if kind != "all-reduce"),
    }
    fits(used, topology, found)
    if found["collectives"] or not any(kind == "all-reduce" and size >= 4 * MEMORY for kind, size in moved):
        raise RuntimeError(f"the tables must cross by the all-reduce of the memory's gradient alone: {moved}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:16x16", help="TPU slice to compile for (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    found = compile_step(options.topology)
    print(json.dumps(found) if options.json else "\n".join(f"{name:18} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
