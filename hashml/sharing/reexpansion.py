"""Virtual arrays that exist while they are used: expanded where a product reads them, and again in its gradient.

A model that is given all its expanded arrays holds all of them at once: compilers expand early, since nothing says
that an array waits for the activations it meets, and what a gradient needs is kept from the forward pass.
`just_in_time` reads the traced program, finds the operations that consume an expanded array, and rewrites each

    y = op(x, expand(memory))   to   y = op(x, expand(memory after x)),   dx, dmemory: expand(memory after dy)

where "after" is a dependency on data that changes no number. The gradient of an operation keeps its other
operands and the memory. What only reshapes, casts or transposes an expanded array is repeated with it. An array
that enters a loop (`flax.linen.scan` over layers) is expanded whole. Forward mode is not there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jaxtyping import Array

_MARK = "hashml_virtual_array"


def virtual_array(expand: Callable[[Array], Array], memory: Array) -> Array:
    """``expand(memory)``, marked for `just_in_time`; elsewhere nothing but that."""

    def hashml_virtual_array(memory: Array) -> Array:
        return expand(memory)

    return jax.jit(hashml_virtual_array)(memory)


def just_in_time(function: Callable[..., Any], memory: Array, *args: Any) -> Any:
    """``function(memory, *args)``, its virtual arrays expanded where they are used.

    Args:
        function: makes arrays from its first argument by `virtual_array`; any output.
        memory: read by virtual arrays.
        args: pytrees of arrays.
    """
    jaxpr, output = jax.make_jaxpr(function, return_shape=True)(memory, *args)
    inputs = jax.tree.leaves((memory, *args))
    found = _run(jaxpr.jaxpr, jaxpr.consts, inputs, memory)
    return jax.tree.unflatten(jax.tree.structure(output), [_whole(value, memory) for value in found])


class _Virtual(NamedTuple):
    """An array that does not exist yet."""

    expand: Callable[[Array], Array]


def _run(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], memory: Array) -> list[Any]:
    """The outputs of a program, some of them virtual perhaps."""
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        values.update(zip(eqn.outvars, _operation(eqn, operands, memory), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _operation(eqn: JaxprEqn, operands: list[Any], memory: Array) -> Sequence[Any]:
    inner = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit") else None
    if inner is not None and eqn.params.get("name") == _MARK and not isinstance(operands[-1], _Virtual):
        # Constants of the expansion, if any, stand before the memory.
        return [_Virtual(lambda memory: jaxpr_as_fun(inner)(*operands[:-1], memory)[0])]
    virtual = [i for i, operand in enumerate(operands) if isinstance(operand, _Virtual)]
    if not virtual:
        return _bind(eqn, operands)
    if inner is not None:
        return _run(inner.jaxpr, inner.consts, operands, memory)
    literal = [isinstance(atom, Literal) for atom in eqn.invars]
    if len(virtual) + sum(literal) == len(operands) and len(virtual) == 1 and len(eqn.outvars) == 1:
        (place,) = virtual

        def changed(memory: Array) -> Array:
            return _bind(eqn, [*operands[:place], operands[place].expand(memory), *operands[place + 1 :]])[0]

        return [_Virtual(changed)]

    others = [operand for i, operand in enumerate(operands) if i not in virtual]

    def expand(memory: Array) -> list[Array]:
        return [operands[i].expand(memory) for i in virtual]

    def use(arrays: list[Array], others: list[Any]) -> list[Any]:
        arrays_left, others_left = iter(arrays), iter(others)
        merged = [next(arrays_left if i in virtual else others_left) for i in range(len(operands))]
        return list(_bind(eqn, merged))

    return _reexpanding(expand, use)(_after(memory, others), others)


def _bind(eqn: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """The outputs of one operation."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # a pair before jax 0.10
    outputs = eqn.primitive.bind(*functions, *operands, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def _whole(value: Any, memory: Array) -> Any:
    return value.expand(memory) if isinstance(value, _Virtual) else value


# --- gradients that keep no expanded array ----------------------------------------------------------


class _Residuals(NamedTuple):
    memory: Array
    kept: list[Any]
    form: "_Form"


@jax.tree_util.register_static
class _Form:
    """How to build the transposed function again: its structure, and which of its leaves are dropped arrays."""

    def __init__(self, structure: Any, arrays: tuple[int | None, ...]) -> None:
        self.structure, self.arrays = structure, arrays


def _reexpanding(
    expand: Callable[[Array], list[Array]], function: Callable[[list[Array], list[Any]], list[Any]]
) -> Callable[[Array, list[Any]], list[Any]]:
    """``(memory, others) -> function(expand(memory), others)``; its residuals are told by identity, and dropped."""

    @jax.custom_vjp
    def call(memory: Array, others: list[Any]) -> Any:
        return function(expand(memory), others)

    def forward(memory: Array, others: list[Any]) -> tuple[Any, _Residuals]:
        arrays = expand(memory)
        output, transposed = jax.vjp(function, arrays, others)
        number = {id(array): i for i, array in enumerate(arrays)}
        leaves, structure = jax.tree.flatten(transposed)
        dropped = tuple(number.get(id(leaf)) for leaf in leaves)
        kept = [leaf for leaf, array in zip(leaves, dropped, strict=True) if array is None]
        return output, _Residuals(memory, kept, _Form(structure, dropped))

    def backward(residuals: _Residuals, cotangent: Any) -> tuple[Array, Any]:
        memory, kept, form = residuals
        arrays, pull = jax.vjp(expand, _after(memory, cotangent))
        following = iter(kept)
        leaves = [next(following) if number is None else arrays[number] for number in form.arrays]
        gradients, others = jax.tree.unflatten(form.structure, leaves)(cotangent)
        return pull(gradients)[0], others

    call.defvjp(forward, backward)
    return call


def _after(memory: Array, others: Any) -> Array:
    """``memory``, bit for bit, once the others are there."""
    floats = [leaf for leaf in jax.tree.leaves(others) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    if not floats:
        return memory
    # Compilers for CPU and GPU drop barriers before they order operations. A zero that they cannot know to be
    # one, a sign bit shifted out, ties for good, and unlike a product with 0 it lets no NaN through.
    first = [jnp.asarray(leaf).reshape(-1)[:1].sum().astype(jnp.float32) for leaf in floats]
    zero = sum(jax.lax.bitcast_convert_type(jax.lax.stop_gradient(one), jnp.uint32) >> 31 >> 5 for one in first)
    return jnp.where(zero == 0, memory, 0)
