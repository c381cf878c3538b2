"""The sizes at which `race_attention` is compiled, timed and tested, and the bytes it must move at each."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.problem import Problem
from hashml_kernels.race_attention import pallas_mosaic_tpu, pallas_triton
from hashml_kernels.race_attention.api import race_attention
from hashml_kernels.race_attention.features import Operands

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}
_PLATFORMS = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}


class Case(NamedTuple):
    """One layer's attention. Heads of values are as wide as those of queries, and keys as many, but where said."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    bits: int
    tables: int
    causal: bool = False
    dtype: str = "bfloat16"
    keys: int | None = None
    values: int | None = None
    masked: bool = False

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """q, k, v, planes, beta and, where there is one, the mask."""
        keys, values = self.keys or self.length, self.values or self.width
        arrays = (
            jax.ShapeDtypeStruct((self.batch, self.heads, self.length, self.width), self.dtype),
            jax.ShapeDtypeStruct((self.batch, self.kv_heads, keys, self.width), self.dtype),
            jax.ShapeDtypeStruct((self.batch, self.kv_heads, keys, values), self.dtype),
            jax.ShapeDtypeStruct((self.tables, self.bits, self.width), jnp.float32),
            jax.ShapeDtypeStruct((), jnp.float32),
        )
        return (*arrays, jax.ShapeDtypeStruct((self.batch, keys), bool)) if self.masked else arrays

    def operands(self) -> Operands:
        """As backends see them."""
        q, k, v, planes, beta, *mask = self.arguments()
        grouped = (self.batch, self.kv_heads, self.heads // self.kv_heads, self.length, self.width)
        keep = jax.ShapeDtypeStruct(mask[0].shape, jnp.float32) if mask else None
        return Operands(jax.ShapeDtypeStruct(grouped, q.dtype), k, v, keep, planes, beta)

    def result(self) -> jax.ShapeDtypeStruct:
        q, _, v, *_ = self.arguments()
        return jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), v.dtype)

    def bytes(self, backward: bool) -> int:
        """Everything once: forward q, k, v and the result; backward these, its gradient and three gradients."""
        q, k, v = (array.size * array.dtype.itemsize for array in self.arguments()[:3])
        out = self.result().size * self.result().dtype.itemsize
        once = sum(array.size * array.dtype.itemsize for array in self.arguments()[3:])
        return once + q + k + v + out + (q + k + v + out if backward else 0)

    def flops(self, backward: bool) -> int:
        """Of projections, features as a product, and the sums; with the chunk's triangle where order matters.

        Backward both features are made again, and each of the three kinds of product has two transposes.
        """
        q, k, v, *_ = self.arguments()
        signed, buckets = 2 * self.tables * self.bits, self.tables * 2**self.bits
        tokens = q.size // self.width + k.size // self.width
        features = 2 * tokens * signed * (self.width + buckets)
        sums = 2 * tokens * buckets * v.shape[3]
        if self.causal:
            sums += 2 * (q.size // self.width) * pallas_triton._SMALL_CHUNK * (buckets + v.shape[3])
        return 2 * features + 3 * sums if backward else features + sums


PAPER = (
    Case("paper_1m_22", 1, 4, 4, 2**20, 128, 2, 2),
    Case("paper_1m_33", 1, 4, 4, 2**20, 128, 3, 3),
    Case("paper_1m_44", 1, 4, 4, 2**20, 128, 4, 4),
    Case("paper_1m_44_f32", 1, 4, 4, 2**20, 128, 4, 4, dtype="float32"),
    Case("paper_64k_causal", 1, 8, 8, 2**16, 64, 4, 4, causal=True),
    Case("paper_64k_causal_f32", 1, 8, 8, 2**16, 64, 4, 4, causal=True, dtype="float32"),
    Case("wikitext_causal", 16, 8, 8, 1024, 64, 3, 3, causal=True),
)

LLAMA = (
    Case("llama3_8k_causal", 1, 32, 8, 8192, 128, 4, 4, causal=True),
    Case("llama3_8k_causal_f32", 1, 32, 8, 8192, 128, 4, 4, causal=True, dtype="float32"),
    Case("llama3_8k_p5", 1, 32, 8, 8192, 128, 5, 4, causal=True),
    Case("paper_64k_p5", 1, 8, 8, 2**16, 64, 5, 4, causal=True),
)

ODD = (
    Case("ragged", 2, 6, 2, 333, 40, 3, 3, keys=271, values=24, masked=True),
    Case("ragged_causal", 2, 6, 2, 333, 64, 3, 5, causal=True, masked=True, dtype="float32"),
    Case("ragged_half", 1, 2, 1, 131, 64, 2, 2, causal=True, dtype="float16"),
    Case("wide_head", 1, 2, 2, 256, 256, 2, 2, causal=True),
)

CASES = PAPER + LLAMA + ODD


def problems() -> Iterator[Problem]:
    """Every case, forward and backward."""
    for case in CASES:
        yield _problem(case, backward=False)
        yield _problem(case, backward=True)


def _problem(case: Case, *, backward: bool) -> Problem:
    arguments = (*case.arguments(), case.result()) if backward else case.arguments()

    def refusal(implementation: str) -> str | None:
        try:
            _KERNELS[implementation].check(case.operands(), case.causal)
        except NotImplementedError as error:
            return str(error)
        return None

    return Problem(
        op="race_attention",
        case=case.name,
        direction="backward" if backward else "forward",
        arguments=arguments,
        draw=lambda rng: draw(arguments, rng),
        call=_backward(case) if backward else _forward(case),
        kernels=_PLATFORMS,
        refusal=refusal,
        bytes=case.bytes(backward),
        flops=case.flops(backward),
        # What is rounded is a projection, and the sums of a bucket.
        terms=case.width,
        table_rows=None,
    )


def draw(arguments: tuple[jax.ShapeDtypeStruct, ...], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Standard normal numbers, beta = 1, and a mask of nine keys in ten."""

    def one(array: jax.ShapeDtypeStruct) -> np.ndarray:
        if array.dtype == bool:
            return rng.random(array.shape) < 0.9
        if not array.shape:
            return np.ones((), np.float32)
        return rng.standard_normal(array.shape, np.float32).astype(array.dtype)

    return tuple(map(one, arguments))


def _forward(case: Case):
    def call(implementation, q, k, v, planes, beta, mask=None):
        return race_attention(q, k, v, planes, beta, causal=case.causal, mask=mask, implementation=implementation)

    return call


def _backward(case: Case):
    def call(implementation, q, k, v, planes, beta, *more):
        *mask, cotangent = more

        def out(q, k, v, beta):
            return _forward(case)(implementation, q, k, v, planes, beta, *mask)

        _, pull = jax.vjp(out, q, k, v, beta)
        return pull(cotangent)

    return call
