"""`huffman_decode`: checks, and choice of a backend."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array
from hashml_kernels.huffman_decode import pallas_mosaic_tpu, pallas_triton, reference, xla
from hashml_kernels.huffman_decode.operands import FloatParts, Geometry, Operands

Implementation = Literal["auto", "reference", "xla", "pallas_triton", "pallas_mosaic_tpu"]

AnyArray = Array | np.ndarray
"""What the public functions take: JAX arrays, or NumPy arrays."""

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}
_DTYPES = {"words": "uint32", "bases": "uint32", "starts": "uint16", "table": "uint16", "rest": "uint8"}
_LENGTHS = (8, 14)
_FORMS = ((16, 7), (8, 3), (8, 1))


def huffman_decode(
    words: AnyArray,
    bases: AnyArray,
    starts: AnyArray,
    table: AnyArray,
    *,
    count: int,
    lanes_a_base: int,
    rest: AnyArray | None = None,
    form: FloatParts | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """The symbols of chunks of equally many symbols, or the floats whose coded part they are, bit for bit.

    With ``S`` steps, the least that give ``count`` symbols, unit ``t * lanes + n`` of four neighbouring symbols is
    step ``t`` of lane ``n``, whose words follow each other from bit ``starts[n]`` after the word
    ``bases[n // lanes_a_base]`` on. A damaged stream gives wrong symbols, never a read out of bounds. Integers come
    out: there is no gradient.

    Args:
        words: uint32 ``[words]``, at least one: the stream, from the highest bit.
        bases: uint32, a word's number for each ``lanes_a_base`` lanes.
        starts: uint16 ``[lanes]``, at least one.
        table: uint16 ``[2^max_length]`` of 8 to 14 bits, ``length << 8 | symbol`` by the next bits of the stream.
        count: numbers of the result.
        lanes_a_base: lanes that share a base.
        rest: uint8, the rests of ``count`` numbers one after the other, the first one in the highest bits; with
            ``form`` alone.
        form: how numbers are made of symbols and rests; None: the symbols are the result.
        implementation: ``"auto"`` picks the platform's kernel where it serves the problem, else XLA. A kernel asked
            for by name is interpreted on a CPU, slowly: that is for tests.

    Returns:
        ``[count]``: uint8 symbols, or the bits of the numbers, uint16 or uint8.

    Raises:
        TypeError: for arrays of other dtypes.
        ValueError: for sizes that do not fit, naming them.
        NotImplementedError: where an ``implementation`` asked for by name does not serve the problem.
    """
    given = {"words": words, "bases": bases, "starts": starts, "table": table, "rest": rest}
    arrays = {name: jnp.asarray(array) for name, array in given.items() if array is not None}
    for name, array in arrays.items():
        if array.dtype != _DTYPES[name]:
            raise TypeError(f"{name} has dtype {array.dtype}; it must be {_DTYPES[name]}")
        if array.ndim != 1:
            raise ValueError(f"{name} has shape {array.shape}; it must have one axis")
    operands = Operands(arrays["words"], arrays["bases"], arrays["starts"], arrays["table"], arrays.get("rest"))
    lanes = operands.starts.shape[0]
    if not operands.words.shape[0] or not lanes:
        raise ValueError(f"words has {operands.words.shape[0]} entries and starts {lanes}; both have at least one")
    if lanes_a_base < 1 or operands.bases.shape[0] != -(-lanes // max(lanes_a_base, 1)):
        raise ValueError(
            f"bases has {operands.bases.shape[0]} entries, one for {lanes_a_base} lanes; starts has {lanes} lanes"
        )
    entries, (least, most) = operands.table.shape[0], _LENGTHS
    if entries not in [2**length for length in range(least, most + 1)]:
        raise ValueError(f"table has {entries} entries; it must have 2^{least} to 2^{most}, a power of 2")
    if count < 0:
        raise ValueError(f"count is {count}; it must not be negative")
    if (form is None) != (rest is None):
        raise ValueError("one of rest and form is None; floats need both, symbols neither")
    if form is not None and ((form.bits, form.low) not in _FORMS or (form.pairs and form.rest_bits != 4)):
        raise ValueError(
            f"form is {form}; allowed are (bits, low) of {_FORMS}, and pairs where a symbol and a rest have 4 bits"
        )
    if form is not None and operands.rest is not None:
        needed = -(-count * form.rest_bits // 8)
        if operands.rest.shape[0] != needed:
            raise ValueError(f"rest has {operands.rest.shape[0]} bytes; {count} numbers of {form} have {needed}")
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; it must be one of {get_args(Implementation)}")
    geometry = Geometry(count, lanes, lanes_a_base, form)
    if not count:
        return jnp.zeros(0, geometry.dtype)
    return _dispatch(operands, geometry, implementation)


def _dispatch(operands: Operands, geometry: Geometry, implementation: Implementation) -> Array:
    def through(backend: Any, **options: Any):
        return lambda *operands: backend.decode(Operands(*operands), geometry, **options)

    def served(backend: Any):
        """The backend's kernel, or XLA where it says that it does not serve these operands."""
        try:
            backend.check(operands, geometry)
        except NotImplementedError:
            return through(xla)
        return through(backend)

    match implementation:
        case "auto":
            return jax.lax.platform_dependent(
                *operands, cuda=served(pallas_triton), tpu=served(pallas_mosaic_tpu), default=through(xla)
            )
        case "xla":
            return through(xla)(*operands)
        case "reference":
            return through(reference)(*operands)
        case _:
            backend = _KERNELS[implementation]
            backend.check(operands, geometry)
            return jax.lax.platform_dependent(
                *operands, cpu=through(backend, interpret=True), default=through(backend)
            )
