"""The meter for saved activations: what the forward pass of a gradient keeps for the backward pass.

    value, backward = jax.vjp(f, *arguments)            ``backward`` holds the residuals

Counted are the arrays that ``backward`` holds, each once, without those that ``f`` was given: parameters and inputs
lie in memory whether or not a gradient is taken. Nothing is computed; arguments may be shapes. It is JAX's own
account, before the compiler: XLA may compute a cheap residual again, and adds buffers of its own. What a whole
compiled step takes is ``jax.jit(step).lower(...).compile().memory_analysis()``; both are worth looking at.
"""

from collections.abc import Callable
from typing import Any

import jax

from hashml.accounting import stored_bytes


def residuals(
    function: Callable[..., Any], *arguments: Any, constants: tuple[Any, ...] = ()
) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the arrays that the backward pass of ``function`` keeps, without those that it was given.

    Args:
        function: ``function(*arguments, *constants)``; of pytrees.
        *arguments: pytrees of arrays or of `jax.ShapeDtypeStruct`; the gradient is that with respect to all of them.
        constants: further arguments, of which no gradient is taken.
    """

    def kept(arguments: tuple[Any, ...], constants: tuple[Any, ...]) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda *given: function(*given, *constants), *arguments)[1])

    jaxpr = jax.make_jaxpr(kept)(arguments, constants).jaxpr
    given = {id(variable) for variable in (*jaxpr.invars, *jaxpr.constvars)}
    # A literal, which has a value, is a number in the program's text.
    found = {id(out): out.aval for out in jaxpr.outvars if not hasattr(out, "val") and id(out) not in given}
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in found.values()]


def residual_bytes(function: Callable[..., Any], *arguments: Any, constants: tuple[Any, ...] = ()) -> int:
    """Bytes of `residuals`."""
    return stored_bytes(residuals(function, *arguments, constants=constants))
