"""Kernels under `jax.shard_map`, which tracks over which axes of the mesh a value varies.

A `pallas_call` must say so of its output, and the cotangent that a `custom_vjp` gives back must vary as
its primal does. Both come right where all operands vary alike from the start: the transpose of that
cast is the sum over the axis, which a replicated parameter's gradient needs.
"""

from typing import Any

import jax


def varying_alike(*operands: Any) -> tuple[tuple[Any, ...], Any]:
    """The operands, all varying over every mesh axis that one of them varies over, and that type.

    Outside `jax.shard_map`, or in one that does not check, the operands come back as they are. Give
    the type to the output as ``jax.ShapeDtypeStruct(..., manual_axis_type=...)``.
    """
    kinds = [jax.typeof(leaf).manual_axis_type for leaf in jax.tree.leaves(operands)]
    axes = frozenset().union(*(kind.varying for kind in kinds))
    if not axes:
        return operands, kinds[0]

    def cast(leaf: jax.Array) -> jax.Array:
        missing = axes - jax.typeof(leaf).manual_axis_type.varying
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    operands = jax.tree.map(cast, operands)
    return operands, jax.typeof(jax.tree.leaves(operands)[0]).manual_axis_type
