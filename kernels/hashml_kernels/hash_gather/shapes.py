"""The sizes at which `hash_gather` is compiled, timed and tested, and the bytes it must move at each."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.hash_gather import pallas_mosaic_tpu, pallas_triton
from hashml_kernels.hash_gather.api import hash_gather, hash_gather_bag
from hashml_kernels.hash_gather.geometry import BlockGeometry, Sign
from hashml_kernels.problem import Problem

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}
_PLATFORMS = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}
_SECTOR = 32


class Case(NamedTuple):
    """A lookup of ``batch`` rows, or of ``batch`` bags if it has ``members``."""

    name: str
    table_rows: int
    features: int
    block_size: int
    budget: int
    batch: int
    members: int = 0
    weighted: bool = False
    align: int = 1
    sign: Sign = "none"
    dtype: str = "float32"

    @property
    def geometry(self) -> BlockGeometry:
        return BlockGeometry(self.budget, self.features, self.block_size, sign=self.sign, align=self.align)

    @property
    def lookups(self) -> int:
        """Rows read in all."""
        return self.batch * max(self.members, 1)

    @property
    def _itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def _stream_bytes(self) -> int:
        """Ids, weights, and one row a lookup or bag."""
        weights = 4 * self.lookups if self.weighted else 0
        return 4 * self.lookups + weights + self.batch * self.features * self._itemsize

    def _touched_bytes(self) -> int:
        """The part of the memory that uniform slots reach, each weight counted once."""
        share = -math.expm1(-self.lookups * self.features / self.budget)
        return math.ceil(share * self.budget) * self._itemsize

    def forward_bytes(self) -> int:
        """What a lookup must move if every weight it reaches is fetched from HBM only once."""
        return self._stream_bytes() + self._touched_bytes()

    def backward_bytes(self) -> int:
        """What the gradients must move: every weight's sum is written once, in float32.

        With weights, their own gradient is written, and reads what the forward pass read of the memory.
        """
        weights = 4 * self.lookups + self._touched_bytes() if self.weighted else 0
        return self._stream_bytes() + weights + 4 * self.budget

    def backward_terms(self) -> int:
        """Coordinates that share a weight, or those of a row where a weight of a bag has its gradient."""
        sharing = 1 + math.ceil(self.lookups * self.features / self.budget)
        return max(sharing, self.features) if self.weighted else sharing

    def sector_bytes(self) -> int:
        """Expected traffic of the memory between cache and cores, which fetch sectors of 32 bytes.

        A run of L bytes that starts at a uniform multiple of ``step`` bytes touches (L + 32 - step) / 32
        sectors: one for a single float, 1.9 for eight, and no more than it must if blocks are aligned.
        """
        step = math.gcd(self.align * self._itemsize, _SECTOR)
        run = math.ceil(min(self.block_size, self.features) * self._itemsize / step) * step
        return self.lookups * self.geometry.blocks * (run + _SECTOR - step)


# Criteo Kaggle has 33,762,577 rows and Criteo Terabyte, as MLPerf counts them, 187,767,399; a
# thousandth of their weights is kept. A step of DLRM looks up 2048 samples of 26 fields.
LOOKUPS = (
    Case("dlrm_kaggle", 33_762_577, 16, 16, budget=500_000, batch=2048 * 26),
    Case("dlrm_terabyte_32", 187_767_399, 64, 32, budget=12_000_000, batch=2048 * 26),
    Case("dlrm_terabyte_64", 187_767_399, 64, 64, budget=12_000_000, batch=2048 * 26),
    Case("mlperf", 187_767_399, 128, 128, budget=25_000_064, batch=2048 * 26, align=128),
    Case("table_z1", 2_000_000, 64, 1, budget=128_000, batch=65_536),
    Case("table_z8", 2_000_000, 64, 8, budget=128_000, batch=65_536),
    Case("table_z32", 2_000_000, 64, 32, budget=128_000, batch=65_536),
    Case("table_z64", 2_000_000, 64, 64, budget=128_000, batch=65_536),
    Case("table_lines", 2_000_000, 128, 128, budget=256_000, batch=65_536, align=128),
    Case("ragged", 1_000_000, 37, 5, budget=10_007, batch=1003, sign="element", dtype="bfloat16"),
)

# Bags as in fastText: documents of some hundred words and n-grams, padded with the weight 0.
BAGS = (
    Case("bag_16k", 2_000_000, 16, 16, budget=16_000, batch=256, members=512),
    Case("bag_160k", 2_000_000, 16, 8, budget=160_000, batch=256, members=512, weighted=True),
    Case("bag_lines", 2_000_000, 128, 128, budget=256_000, batch=256, members=512, align=128, weighted=True),
)

CASES = LOOKUPS + BAGS


def problems() -> Iterator[Problem]:
    """Every case, forward and backward."""
    for case in CASES:
        yield _problem(case, backward=False)
        yield _problem(case, backward=True)


def _problem(case: Case, *, backward: bool) -> Problem:
    shape = (case.batch, case.members) if case.members else (case.batch,)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    weights = (jax.ShapeDtypeStruct(shape, jnp.float32),) if case.weighted else ()
    memory = jax.ShapeDtypeStruct((case.budget,), case.dtype)
    rows = jax.ShapeDtypeStruct((case.batch, case.features), case.dtype)
    # Without weights the gradient does not depend on the memory.
    arguments = (memory, ids, *weights, rows) if backward else (memory, ids, *weights)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        arrays = [rng.standard_normal(a.shape, np.float32).astype(a.dtype) for a in arguments]
        arrays[1] = rng.integers(0, case.table_rows, shape, np.int32)
        return tuple(arrays)

    def refusal(implementation: str) -> str | None:
        op = ("scatter" if backward else "gather") + ("_bag" if case.members else "")
        words = jax.ShapeDtypeStruct(shape, jnp.uint32)
        operands = (rows if backward else memory, words, *((weights or (None,)) if case.members else ()))
        try:
            _KERNELS[implementation].check(op, *operands, geometry=case.geometry)
        except NotImplementedError as error:
            return str(error)
        return None

    return Problem(
        op="hash_gather",
        case=case.name,
        direction="backward" if backward else "forward",
        arguments=arguments,
        draw=draw,
        call=_backward(case) if backward else _forward(case),
        kernels=_PLATFORMS,
        refusal=refusal,
        bytes=case.backward_bytes() if backward else case.forward_bytes(),
        flops=case.lookups * case.features * (2 if case.members else 0),
        terms=case.backward_terms() if backward else max(case.members, 1),
        table_rows=case.table_rows if case.table_rows > 16 * case.lookups * case.features else None,
    )


def _forward(case: Case):
    def call(implementation, memory, ids, *weights):
        lookup = hash_gather_bag if case.members else hash_gather
        return lookup(
            memory,
            ids,
            *weights,
            features=case.features,
            block_size=case.block_size,
            align=case.align,
            sign=case.sign,
            implementation=implementation,
        )

    return call


def _backward(case: Case):
    def call(implementation, memory, ids, *rest):
        *weights, cotangent = rest
        _, pull = jax.vjp(
            lambda memory, *weights: _forward(case)(implementation, memory, ids, *weights), memory, *weights
        )
        return pull(cotangent)

    return call
