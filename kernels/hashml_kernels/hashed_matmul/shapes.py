"""The sizes at which `hashed_matmul` is compiled, timed and tested, and the bytes it must move at each."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.hashed_matmul import pallas_mosaic_tpu, pallas_triton
from hashml_kernels.hashed_matmul.api import hashed_matmul
from hashml_kernels.hashed_matmul.geometry import TileGeometry, TileMap, TileSign, tile_runs
from hashml_kernels.problem import Problem

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}
_PLATFORMS = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}


class Case(NamedTuple):
    """A product of ``batch`` rows with a virtual matrix."""

    name: str
    batch: int
    rows: int
    columns: int
    tile: tuple[int, int]
    budget: int
    map: TileMap = "tile"
    sign: TileSign = "element"
    dtype: str = "float32"
    offset: int = 0
    align: int = 1

    @property
    def geometry(self) -> TileGeometry:
        return TileGeometry(
            self.budget, self.rows, self.columns, self.tile, self.map, 0, self.sign, self.offset, self.align
        )

    @property
    def _itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def distinct(self) -> int:
        """Weights of the memory that W uses: its tiles' runs, each slot counted once."""
        runs, size, budget = tile_runs(self.geometry), self.geometry.tile_size, self.budget
        # Runs as +1 where they start and -1 where they end; those over the end of the memory go on at its head.
        marks = np.zeros(2 * budget + 1, np.int64)
        for first, length in ((runs.start, runs.split), (runs.second, size - runs.split)):
            np.add.at(marks, first.ravel(), 1)
            np.add.at(marks, (first + length).ravel(), -1)
        used = np.cumsum(marks[:-1]) > 0
        return int(np.count_nonzero(used[:budget] | used[budget:]))

    def forward_bytes(self) -> int:
        """x, y, and every weight that W uses, fetched from HBM only once."""
        return (self.batch * (self.rows + self.columns) + self.distinct()) * self._itemsize

    def backward_bytes(self) -> int:
        """x and the cotangent are read, the gradients of x and of the whole memory written, the memory read."""
        vectors = self.batch * (2 * self.rows + self.columns)
        return (vectors + self.distinct() + self.budget) * self._itemsize

    def flops(self) -> int:
        """Of one product; the backward pass has two."""
        return 2 * self.batch * self.rows * self.columns

    def backward_terms(self) -> int:
        """Products in a number of the larger of the two gradients, counted as independent."""
        sharing = 1 + self.rows * self.columns // self.budget
        return max(self.columns, self.batch * sharing)


# A tenth of each matrix is kept. Tiles of 32 x 32 are the paper's; TPUs want tiles that start at multiples of
# their size, and lines of 128.
BERT = (
    Case("bert_768", 4096, 768, 768, (32, 32), 58_982),
    Case("bert_768_bf16", 4096, 768, 768, (32, 32), 58_982, sign="tile", dtype="bfloat16"),
    Case("bert_mlp_fold", 4096, 768, 3072, (32, 32), 235_929, map="fold", offset=10_000_000),
    Case("bert_mlp_lines", 4096, 768, 3072, (128, 128), 245_760, sign="tile", dtype="bfloat16", align=128 * 128),
)

LLAMA = (
    Case("llama_decode_1", 1, 4096, 11008, (32, 32), 4_508_876, sign="tile", dtype="bfloat16"),
    Case("llama_decode_8", 8, 4096, 11008, (128, 128), 4_521_984, dtype="bfloat16", align=128 * 128),
    Case("llama_prefill", 512, 4096, 11008, (64, 64), 4_508_876, map="fold", dtype="bfloat16"),
    Case("llama_prefill_lines", 512, 4096, 11008, (256, 256), 4_521_984, dtype="bfloat16", align=256 * 256),
)

# Patches of 8 images: 3 x 3 kernels at 28 x 28 and at 7 x 7.
RESNET = (
    Case("resnet_28", 8 * 28 * 28, 1152, 128, (32, 32), 14_745, map="fold"),
    Case("resnet_7_lines", 8 * 7 * 7, 4608, 512, (128, 128), 245_760, map="fold", align=128 * 128),
)

ODD = (
    Case("ragged", 37, 300, 170, (32, 16), 5_003, map="fold", sign="element", dtype="bfloat16", offset=2**32 - 1000),
    Case("ragged_lines", 37, 300, 170, (128, 128), 32_768, align=128 * 128),
    Case("single_weights", 64, 300, 170, (1, 1), 5_003),
)

CASES = BERT + LLAMA + RESNET + ODD


def problems() -> Iterator[Problem]:
    """Every case, forward and backward."""
    for case in CASES:
        yield _problem(case, backward=False)
        yield _problem(case, backward=True)


def _problem(case: Case, *, backward: bool) -> Problem:
    x = jax.ShapeDtypeStruct((case.batch, case.rows), case.dtype)
    memory = jax.ShapeDtypeStruct((case.budget,), case.dtype)
    y = jax.ShapeDtypeStruct((case.batch, case.columns), case.dtype)
    arguments = (x, memory, y) if backward else (x, memory)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return tuple(rng.standard_normal(a.shape, np.float32).astype(a.dtype) for a in arguments)

    def refusal(implementation: str) -> str | None:
        kernels = {"multiply_transposed": (y, memory), "outer": (x, y)} if backward else {"multiply": (x, memory)}
        try:
            for op, operands in kernels.items():
                _KERNELS[implementation].check(op, *operands, geometry=case.geometry)
        except NotImplementedError as error:
            return str(error)
        return None

    return Problem(
        op="hashed_matmul",
        case=case.name,
        direction="backward" if backward else "forward",
        arguments=arguments,
        draw=draw,
        call=_backward(case) if backward else _forward(case),
        kernels=_PLATFORMS,
        refusal=refusal,
        bytes=case.backward_bytes() if backward else case.forward_bytes(),
        flops=case.flops() * (2 if backward else 1),
        terms=case.backward_terms() if backward else case.rows,
        table_rows=None,
    )


def _forward(case: Case):
    def call(implementation, x, memory):
        return hashed_matmul(
            x,
            memory,
            columns=case.columns,
            tile=case.tile,
            map=case.map,
            sign=case.sign,
            offset=case.offset,
            align=case.align,
            implementation=implementation,
        )

    return call


def _backward(case: Case):
    def call(implementation, x, memory, cotangent):
        _, pull = jax.vjp(lambda x, memory: _forward(case)(implementation, x, memory), x, memory)
        return pull(cotangent)

    return call
