"""Where the coordinates of a virtual row lie in the shared memory.

Row ``e`` of a virtual table is cut in blocks of ``Z = block_size`` coordinates. Block ``b`` lies in
one run of the memory, which is circular:

    slot(e, t) = (base(e, t // Z) + t mod Z) mod budget
    base(e, b) = align * floor(hash(e, b) * (budget / align))      hash in [0, 1)

``hash`` is a pair of `bits.m31` hashes of the row, scrambled, and the block. A geometry is part of a
trained model: it must be saved with the memory, and changing any field changes every weight.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels import bits

Sign = Literal["none", "element", "block"]
Wrap = Literal["circular", "none"]

_FIRST_STREAM, _SECOND_STREAM = 1, 2
_P31 = np.uint32(bits.P31)


@dataclasses.dataclass(frozen=True)
class BlockGeometry:
    """The map from (row, coordinate) to a slot of the memory, and its sign.

    Attributes:
        budget: weights in the memory, below 2**31.
        features: coordinates of a row.
        block_size: Z; where it does not divide ``features`` the last block is cut short.
        seed: picks the hash function.
        sign: no signs, one a coordinate, or one a block.
        wrap: ``"circular"``, or ``"none"``: blocks start no later than ``budget - Z`` (the layout of
            the reference implementations, whose edge slots are hit less often).
        align: blocks start at multiples of it; 128 suits the lanes of a TPU.

    Raises:
        TypeError: where a size is no int.
        ValueError: where a field is out of its range.
    """

    budget: int
    features: int
    block_size: int = 8
    seed: int = 0
    sign: Sign = "none"
    wrap: Wrap = "circular"
    align: int = 1

    def __post_init__(self) -> None:
        for name in ("budget", "features", "block_size", "seed", "align"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be an int")
            object.__setattr__(self, name, int(value))
        for name in ("budget", "features", "block_size", "align"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.budget >= 2**31:
            raise ValueError(f"budget is {self.budget}; a memory holds fewer than 2**31 weights")
        if self.budget < self.block_size:
            raise ValueError(
                f"budget is {self.budget}; it must be at least one block, block_size = {self.block_size}"
            )
        if self.sign not in ("none", "element", "block"):
            raise ValueError(f"sign is {self.sign!r}; it must be 'none', 'element' or 'block'")
        if self.wrap not in ("circular", "none"):
            raise ValueError(f"wrap is {self.wrap!r}; it must be 'circular' or 'none'")
        if self.budget % self.align:
            raise ValueError(f"align is {self.align}; it must divide budget = {self.budget}")

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.features // self.block_size)

    @property
    def starts(self) -> int:
        """Places where a block may begin."""
        room = self.budget if self.wrap == "circular" else self.budget - self.block_size + 1
        return -(-room // self.align)

    @property
    def may_wrap(self) -> bool:
        """Whether some block can run over the end of the memory."""
        return self.wrap == "circular" and (self.starts - 1) * self.align + self.block_size > self.budget


def id_limbs(ids: Any) -> bits.Words | bits.Limbs:
    """Row ids as uint32 words, or as limbs where they may exceed 2**32 (`bits.Limbs`, 64-bit integers).

    Raises:
        TypeError: for ids that are no integers.
    """
    if isinstance(ids, bits.Limbs):
        return ids
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids has dtype {ids.dtype}; it must be an integer type")
    if ids.dtype.itemsize == 8:
        limbs = bits.split64(ids) if isinstance(ids, np.ndarray) else _split64_traced(ids)
        # A high limb of zeros changes no hash, and the kernels take words.
        return limbs.lo if isinstance(limbs.hi, np.ndarray) and not limbs.hi.any() else limbs
    if isinstance(ids, jax.Array) and ids.dtype == jnp.int32:
        return jax.lax.bitcast_convert_type(ids, jnp.uint32)  # a conversion costs a copy before a kernel
    return bits.as_words(ids)


def _split64_traced(ids: jax.Array) -> bits.Limbs:  # only where the user enabled x64
    return bits.Limbs((ids >> 32).astype(jnp.uint32), ids.astype(jnp.uint32))


def block_bases(geometry: BlockGeometry, ids: bits.Words | bits.Limbs, block: bits.Words) -> bits.Words:
    """First slot of block ``block`` of row ``ids``, uint32; the arguments broadcast.

    Under the plain linear hash ``A * row + B * block + C`` every row's block ``b`` would lie at one
    fixed distance from its block 0, so that rows which meet in one block meet in all of them and the
    block size changes nothing. The row is therefore scrambled first, by a bijection that depends on
    the block: keys stay distinct, so the hash stays universal, and blocks become independent.
    """
    row = bits.scramble(ids, bits.multiply_low(block, 0x9E3779B9))
    if isinstance(row, bits.Limbs):
        middle = (row.lo >> np.uint32(31)) | ((row.hi << np.uint32(1)) & _P31)
        keys = (row.lo & _P31, block, middle, row.hi >> np.uint32(30))
    else:
        keys = (row & _P31, block, row > _P31)
    first = bits.m31(bits.multilinear(geometry.seed, _FIRST_STREAM, 4), *keys)
    second = bits.m31(bits.multilinear(geometry.seed, _SECOND_STREAM, 4), *keys)
    start = bits.reduce_m31(first, second, geometry.starts)
    return bits.multiply_low(start, geometry.align) if geometry.align > 1 else start


def block_signs(geometry: BlockGeometry, ids: bits.Words | bits.Limbs, coordinate: bits.Words) -> bits.Words:
    """Sign bit, 0 or 1, of each coordinate (``sign="element"``) or of its block (``sign="block"``)."""
    if geometry.sign == "block":
        block = coordinate // np.uint32(geometry.block_size)
        return bits.sign_bit(bits.flat_index(ids, geometry.blocks, block), geometry.seed)
    return bits.sign_bit(bits.flat_index(ids, geometry.features, coordinate), geometry.seed)
