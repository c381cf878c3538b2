"""RACE attention over a billion tokens, compiled here for a pod that is not here.

    python -m experiments.attention.race_pod        # in the environment of `make aot`, which runs it

One forward and backward pass of the paper's layer (4 heads of width 128, P = L = 4, no order, bfloat16), the sequence
split over all chips: 2**30 tokens over the 512 of ``v5p:8x8x8``, 2**27 over eight H200s. What crosses between chips
is the state, ``L 2**P (128 + 1)`` floats a head, and its gradient, however long the sequence is. The compiler says
what a chip holds and what the program moves; half the length shows that the bytes moved do not change.
"""

import argparse
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.pods import chips, collectives, fits, placed, used_bytes
from hashml.attention.race import race_attention

HEADS, WIDTH, TABLES, BITS = 4, 128, 4, 4
TARGETS = {"v5p:8x8x8": 2**30, "h200:1x8x1": 2**27}
"""Tokens."""


def _passes(mesh: Mesh, planes: Any, beta: Any, q: Any, k: Any, v: Any, cotangent: Any) -> Any:
    """The output, and the gradients of beta, queries, keys and values."""

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(), *(P(None, None, "sequence"),) * 3),
        out_specs=P(None, None, "sequence"),
    )
    def attend(planes: Any, beta: Any, q: Any, k: Any, v: Any) -> Any:
        return race_attention(q, k, v, planes, beta, axis_name="sequence")

    out, pull = jax.vjp(functools.partial(attend, planes), beta, q, k, v)
    return out, pull(cotangent)


def _compiled(target: str, tokens: int) -> tuple[Any, int]:
    mesh = Mesh(np.array(chips(target)), ("sequence",))
    rows = placed(
        (jax.ShapeDtypeStruct((1, HEADS, tokens, WIDTH), jnp.bfloat16),) * 4, mesh, P(None, None, "sequence")
    )
    small = placed(
        (jax.ShapeDtypeStruct((TABLES, BITS, WIDTH), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)), mesh, P()
    )
    step = jax.jit(functools.partial(_passes, mesh), donate_argnums=(2, 3, 4, 5))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.lower(*small, *rows).compile(), mesh.size


def compile_passes(target: str) -> dict[str, Any]:
    """Compile forward and backward for a target; what a chip holds and moves.

    Raises:
        RuntimeError: where it does not fit, or moves anything but the state and its gradient.
    """
    tokens = TARGETS[target]
    compiled, size = _compiled(target, tokens)
    half, _ = _compiled(target, tokens // 2)
    used = used_bytes(compiled)
    memory: Any = compiled.memory_analysis()
    moved, moved_half = (sum(count for _, count in collectives(program)) for program in (compiled, half))
    state = 4 * HEADS * TABLES * 2**BITS * (WIDTH + 1)
    found = {
        "target": target,
        "chips": size,
        "tokens": tokens,
        "arrays_bytes": 4 * 2 * HEADS * WIDTH * tokens // size,
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "bytes_a_chip": used,
        "state_bytes": state,
        "moved_bytes": moved,
        "moved_bytes_half": moved_half,
    }
    fits(used, target, found)
    if moved != moved_half:
        raise RuntimeError(f"half the tokens move {moved_half} bytes, all of them {moved}: {found}")
    if moved != 2 * state + 4:
        raise RuntimeError(f"{moved} bytes cross between chips; two float32 states and a beta should: {found}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=tuple(TARGETS), action="append", help="what to compile for; default: all")
    parser.add_argument("--json", action="store_true", help="print a line of JSON each")
    options = parser.parse_args()
    for target in options.target or TARGETS:
        found = compile_passes(target)
        print(json.dumps(found) if options.json else "\n".join(f"{n:18} {v}" for n, v in found.items()), flush=True)


if __name__ == "__main__":
    main()
