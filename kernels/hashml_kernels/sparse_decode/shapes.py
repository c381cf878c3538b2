"""The sizes at which `sparse_decode` is compiled, timed and tested, and the bytes it must move at each."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.problem import Problem
from hashml_kernels.sparse_decode import pallas_mosaic_tpu, pallas_triton
from hashml_kernels.sparse_decode.api import sparse_decode
from hashml_kernels.sparse_decode.lists import Operands

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}
_PLATFORMS = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}
_POOL = 1_000_003  # numbers that are drawn; larger arrays repeat them, no row like another


class Case(NamedTuple):
    """A step of ``batch`` rows in which lists name ``entries`` slots, or pages, no one twice."""

    name: str
    batch: int
    query_heads: int
    lists: int
    heads: int
    slots: int
    entries: int
    page: int = 1
    dtype: str = "bfloat16"
    width: int = 128
    values: int = 128

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """``q, k, v, idx, valid, weight``."""
        one_list = (self.batch, self.lists, self.entries)
        return (
            jax.ShapeDtypeStruct((self.batch, self.query_heads, self.width), self.dtype),
            jax.ShapeDtypeStruct((self.batch, self.heads, self.slots, self.width), self.dtype),
            jax.ShapeDtypeStruct((self.batch, self.heads, self.slots, self.values), self.dtype),
            jax.ShapeDtypeStruct(one_list, jnp.int32),
            jax.ShapeDtypeStruct(one_list, jnp.bool_),
            jax.ShapeDtypeStruct(one_list, jnp.float32),
        )

    def operands(self) -> Operands:
        """As backends see them."""
        q, *others = self.arguments()
        q = jax.ShapeDtypeStruct((self.batch, self.lists, self.query_heads // self.lists, self.width), q.dtype)
        length = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        return Operands(q, *others, length)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def rows(self) -> int:
        """Rows of keys that are read at most: those that lists name."""
        return self.batch * self.lists * self.entries * self.page

    def bytes(self) -> int:
        """The rows that are named, once a list, the lists, the queries and the results."""
        q, k, v, *lists = self.arguments()
        named = self.rows() * (self.width * k.dtype.itemsize + self.values * v.dtype.itemsize)
        result = self.batch * self.query_heads * self.values * v.dtype.itemsize
        return named + result + sum(a.size * a.dtype.itemsize for a in (q, *lists))

    def flops(self) -> int:
        """Of the two products."""
        return 2 * self.rows() * (self.query_heads // self.lists) * (self.width + self.values)


# Llama-3-8B at 65,536 tokens, of which a fiftieth is read: 1,310 rows, or 82 pages of 16.
LLAMA_3_8B = (
    *(
        Case(f"llama3_{kind}_b{batch}_64k_p{page}", batch, 32, 8, 8, 65536, -(-1310 // page), page, dtype)
        for kind, dtype in (("bf16", "bfloat16"), ("f32", "float32"))
        for batch in (1, 8)
        for page in (1, 16)
    ),
    # Every query head has a list of its own.
    Case("llama3_bf16_b8_64k_own_p1", 8, 32, 32, 8, 65536, 1310, 1),
    Case("llama3_bf16_b8_64k_own_p16", 8, 32, 32, 8, 65536, 82, 16),
)

ODD = (
    Case("ragged_rows", 3, 6, 2, 1, 333, 77, 1, "float32", 80, 48),
    Case("ragged_pages", 2, 20, 2, 2, 320, 7, 32, "bfloat16", 128, 256),
    Case("odd_pages", 2, 3, 3, 1, 101, 5, 7, "float16", 64, 24),
    Case("wide_heads", 1, 2, 1, 1, 64, 8, 8, "float32", 640, 512),
)

CASES = LLAMA_3_8B + ODD


def problems() -> Iterator[Problem]:
    """Every case, forward; derivatives are XLA's."""
    return map(_problem, CASES)


def _problem(case: Case) -> Problem:
    def refusal(implementation: str) -> str | None:
        try:
            _KERNELS[implementation].check(case.operands(), page=case.page)
        except NotImplementedError as error:
            return str(error)
        return None

    return Problem(
        op="sparse_decode",
        case=case.name,
        direction="forward",
        arguments=case.arguments(),
        draw=lambda rng: draw(case, rng),
        call=lambda implementation, *arrays: sparse_decode(*arrays, page=case.page, implementation=implementation),
        kernels=_PLATFORMS,
        refusal=refusal,
        bytes=case.bytes(),
        flops=case.flops(),
        # The result is a mean; what is rounded like a sum is a logit.
        terms=case.width,
        table_rows=None,
    )


def draw(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Standard normal numbers, lists of different slots or pages in any order, one entry in eight not valid."""
    pool = rng.standard_normal(_POOL, np.float32)
    *floats, idx, valid, weight = case.arguments()
    q, k, v = (np.resize(np.roll(pool, i).astype(a.dtype), a.shape) for i, a in enumerate(floats))
    pages = -(-case.slots // case.page)
    lists = np.argsort(rng.random((case.batch * case.lists, pages), np.float32), axis=1)[:, : case.entries]
    return (
        q,
        k,
        v,
        lists.reshape(idx.shape).astype(np.int32),
        rng.random(valid.shape) < 7 / 8,
        rng.choice(np.array([1, 1, 2, 8], np.float32), weight.shape),
    )
