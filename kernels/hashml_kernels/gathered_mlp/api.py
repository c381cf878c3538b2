"""`gathered_mlp`: checks, choice of a backend, and derivatives."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array, Float
from hashml_kernels.gathered_mlp import pallas_mosaic_tpu, pallas_triton, reference, xla
from hashml_kernels.gathered_mlp.lists import Activation, Operands

Implementation = Literal["auto", "reference", "xla", "pallas_triton", "pallas_mosaic_tpu"]

AnyArray = Array | np.ndarray
"""What the public function takes: JAX arrays, or NumPy arrays."""

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}


def gathered_mlp(
    x: Float[AnyArray, "B E"],
    w_in: Float[AnyArray, "F E"],
    w_out: Float[AnyArray, "F E"],
    idx: AnyArray,
    valid: AnyArray | None = None,
    *,
    w_gate: Float[AnyArray, "F E"] | None = None,
    b_in: Float[AnyArray, " F"] | None = None,
    activation: Activation = "relu",
    block: int = 1,
    implementation: Implementation = "auto",
) -> Float[Array, "B E"]:
    """``sum_i act(x . w_in[i] + b_in[i]) (x . w_gate[i]) w_out[i]`` over the neurons i that a list names.

    Neurons are rows of all matrices, so that ``w_out`` is the transpose of what a dense layer multiplies by. An entry
    does not count where it is not valid or its index is out of range; what lies in such rows has no effect. A neuron
    that stands twice counts twice. Sums are float32. Kernels have no backward pass of their own: derivatives are
    those of XLA's path.

    Args:
        x: inputs.
        w_in, w_out: of F neurons, any float dtype.
        idx: int ``[M]``, one list for the batch, or ``[B, M]``, a list a row. With ``block`` above 1 numbers of
            blocks, neurons ``block i .. block i + block - 1``, of which the last block may have fewer.
        valid: bool, as ``idx``; None: all entries count.
        w_gate: of a gated perceptron; None: the factor is 1.
        b_in: None: zeros. A bias of the output is the caller's to add.
        activation: ``"gelu"`` is the approximation by tanh.
        block: neurons that an entry names.
        implementation: ``"auto"`` picks the platform's kernel where it serves the problem, else XLA. A
            kernel asked for by name is interpreted on a CPU, slowly: that is for tests.

    Returns:
        The sum, in the dtype of ``x``.

    Raises:
        TypeError: for arrays of other dtypes.
        ValueError: for shapes that do not fit, naming them.
        NotImplementedError: where an ``implementation`` asked for by name does not serve the problem.
    """
    valid = np.ones(idx.shape, np.bool_) if valid is None else valid
    given = {"x": x, "w_in": w_in, "w_gate": w_gate, "b_in": b_in, "w_out": w_out, "idx": idx, "valid": valid}
    arrays = {name: jnp.asarray(array) for name, array in given.items() if array is not None}
    _check(arrays)
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    for name, value, allowed in (
        ("activation", activation, get_args(Activation)),
        ("implementation", implementation, get_args(Implementation)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {allowed}")
    x, idx, valid = arrays["x"], arrays["idx"].astype(jnp.int32), arrays["valid"]
    shared = idx.ndim == 1
    operands = Operands(
        x=x[None] if shared else x[:, None],
        w_in=arrays["w_in"],
        b_in=arrays.get("b_in"),
        w_gate=arrays.get("w_gate"),
        w_out=arrays["w_out"],
        idx=idx[None] if shared else idx,
        valid=valid[None] if shared else valid,
    )
    static = {"activation": activation, "block": block}
    if implementation == "reference":
        found = reference.apply(operands, **static)
    else:
        found = _dispatch(operands, static, implementation)
    return found.reshape(x.shape).astype(x.dtype)


def _check(arrays: dict[str, Array]) -> None:
    for name, array in arrays.items():
        if name == "idx":
            if not jnp.issubdtype(array.dtype, jnp.integer):
                raise TypeError(f"idx has dtype {array.dtype}; it must be an integer type")
        elif name == "valid":
            if array.dtype != jnp.bool_:
                raise TypeError(f"valid has dtype {array.dtype}; it must be bool")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}; it must be a float type")
    x, idx = arrays["x"], arrays["idx"]
    shape = (arrays["w_in"].shape[0], x.shape[1])
    if not shape[0]:
        raise ValueError(f"w_in has shape {arrays['w_in'].shape}; there must be at least one neuron")
    for name in ("w_in", "w_gate", "w_out"):
        if name in arrays and arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}; it must be {shape}, a row a neuron")
    if "b_in" in arrays and arrays["b_in"].shape != shape[:1]:
        raise ValueError(f"b_in has shape {arrays['b_in'].shape}; it must be {shape[:1]}")
    if idx.shape[:-1] not in ((), x.shape[:1]):
        raise ValueError(f"idx has shape {idx.shape}; it must be [entries], or [{x.shape[0]}, entries]")
    if arrays["valid"].shape != idx.shape:
        raise ValueError(f"valid has shape {arrays['valid'].shape}; it must be {idx.shape}, as idx")


def _dispatch(operands: Operands, static: dict[str, Any], implementation: Implementation) -> Array:
    def through(backend, **options):
        return lambda operands: backend.apply(operands, **static, **options)

    plain = through(xla)

    def kernel(backend, **options):
        """The backend's kernel, with XLA's derivatives; a batch of calls is one call with more lists."""
        run = jax.custom_batching.custom_vmap(through(backend, **options))

        @run.def_vmap
        def _(size, batched, operands):
            every = [name for name in Operands._fields if getattr(batched[0], name)]
            if not {"x", "idx", "valid"}.issuperset(every):

                def one(own):
                    return run(operands._replace(**dict(zip(every, own, strict=True))))

                return jax.lax.map(one, [getattr(operands, name) for name in every]), True
            longer = {}
            for name in ("x", "idx", "valid"):
                array = getattr(operands, name)
                array = array if name in every else jnp.broadcast_to(array, (size, *array.shape))
                longer[name] = array.reshape(-1, *array.shape[2:])
            many = operands._replace(**longer)
            left = implementation == "auto" and not serves(backend, many)
            found = plain(many) if left else run(many)
            return found.reshape(size, -1, *found.shape[1:]), True

        call = jax.custom_jvp(run)

        @call.defjvp
        def _(operands, tangents):
            return call(*operands), jax.jvp(plain, operands, tangents)[1]

        return call

    def serves(backend, operands: Operands) -> bool:
        try:
            backend.check(operands, block=static["block"])
        except NotImplementedError:
            return False
        return True

    def served(backend):
        return kernel(backend) if serves(backend, operands) else plain

    match implementation:
        case "auto":
            return jax.lax.platform_dependent(
                operands, cuda=served(pallas_triton), tpu=served(pallas_mosaic_tpu), default=plain
            )
        case "xla":
            return plain(operands)
        case _:
            backend = _KERNELS[implementation]
            backend.check(operands, block=static["block"])
            return jax.lax.platform_dependent(operands, cpu=kernel(backend, interpret=True), default=kernel(backend))
