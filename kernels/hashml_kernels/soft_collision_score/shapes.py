"""The sizes at which `soft_collision_score` is compiled, timed and tested, and the bytes it must move at each."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.problem import Problem
from hashml_kernels.soft_collision_score import pallas_mosaic_tpu, pallas_triton
from hashml_kernels.soft_collision_score.api import soft_collision_score
from hashml_kernels.soft_collision_score.operands import Operands

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}
_PLATFORMS = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}


class Case(NamedTuple):
    """Scores of all keys for a step of ``batch`` rows."""

    name: str
    batch: int
    query_heads: int
    heads: int
    slots: int
    tables: int = 60
    bits: int = 8
    norms: str | None = "float16"
    block: int = 256

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        codes = jax.ShapeDtypeStruct(
            (self.batch, self.heads, self.tables, self.slots), jnp.uint8 if self.bits <= 8 else jnp.uint16
        )
        logits = jax.ShapeDtypeStruct((self.batch, self.query_heads, self.tables, self.bits), jnp.float32)
        return (codes, logits, *([] if self.norms is None else [self._norms]))

    @property
    def _norms(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.slots), jnp.dtype(self.norms))

    def operands(self) -> Operands:
        """As backends see them."""
        group = self.batch, self.heads, self.query_heads // self.heads
        return Operands(
            self.arguments()[0],  # pyright: ignore[reportArgumentType]
            None if self.norms is None else self._norms,  # pyright: ignore[reportArgumentType]
            jax.ShapeDtypeStruct((*group, self.tables, self.bits), jnp.float32),  # pyright: ignore[reportArgumentType]
            jax.ShapeDtypeStruct(group, jnp.float32),  # pyright: ignore[reportArgumentType]
        )

    def bytes(self) -> int:
        """All arguments once, and the results: a score for each slot, two numbers for each block."""
        blocks = -(-self.slots // self.block)
        results = 4 * self.batch * self.query_heads * (self.slots + 2 * blocks)
        return results + sum(array.size * array.dtype.itemsize for array in self.arguments())

    def flops(self) -> int:
        """An addition for each table, query head and slot, and one product with the norm."""
        return self.batch * self.query_heads * self.slots * (self.tables + 1)


LLAMA_3_8B = (
    Case("llama3_b1_64k", 1, 32, 8, 2**16),
    Case("llama3_b1_128k", 1, 32, 8, 2**17),
    Case("llama3_b8_64k", 8, 32, 8, 2**16),
    Case("llama3_b8_128k", 8, 32, 8, 2**17),
    Case("llama3_p10_b1_64k", 1, 32, 8, 2**16, bits=10),
    Case("llama3_p10_b8_128k", 8, 32, 8, 2**17, bits=10),
    Case("llama3_p12_b1_64k", 1, 32, 8, 2**16, bits=12),
    Case("llama3_power_b1_64k", 1, 32, 8, 2**16, norms="float32"),
    Case("llama3_no_norms_b1_64k", 1, 32, 8, 2**16, norms=None),
)

LLAMA_7B = (Case("llama7b_b1_32k", 1, 32, 32, 2**15), Case("llama7b_b8_4k", 8, 32, 32, 2**12))

ODD = (
    Case("ragged", 3, 6, 2, 1301, 7, 5, block=128),
    Case("ragged_p16", 1, 3, 1, 777, 9, 16, norms="bfloat16", block=512),
    Case("many_queries", 1, 12, 1, 640, 5, 3, norms=None),
    Case("few_slots", 2, 2, 1, 50, 4, 4),
)

CASES = LLAMA_3_8B + LLAMA_7B + ODD


def problems() -> Iterator[Problem]:
    """Every case; scores have no backward pass."""
    return map(_problem, CASES)


def _problem(case: Case) -> Problem:
    def refusal(implementation: str) -> str | None:
        try:
            _KERNELS[implementation].check(case.operands(), case.block)
        except NotImplementedError as error:
            return str(error)
        return None

    return Problem(
        op="soft_collision_score",
        case=case.name,
        direction="forward",
        arguments=case.arguments(),
        draw=lambda rng: draw(case, rng),
        call=lambda implementation, *arrays: call(case, implementation, *arrays),
        kernels=_PLATFORMS,
        refusal=refusal,
        bytes=case.bytes(),
        flops=case.flops(),
        terms=case.tables,
        table_rows=None,
    )


def draw(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Codes of all values, normal logits of the size they have at temperature 0.3 and width 128, log-normal norms."""
    codes, logits, *norms = case.arguments()
    found: list[np.ndarray] = [
        rng.integers(0, 2**case.bits, codes.shape, codes.dtype),
        0.6 * np.tanh(rng.standard_normal(logits.shape, np.float32)),
    ]
    # jax's own rounding, for bfloat16.
    return (*found, *(np.asarray(np.exp(rng.standard_normal(x.shape, np.float32) / 2), x.dtype) for x in norms))


def call(case: Case, implementation, codes, logits, *norms):
    """The op, on the arrays of `Case.arguments`."""
    return soft_collision_score(
        codes, norms[0] if norms else None, logits, block=case.block, implementation=implementation
    )
