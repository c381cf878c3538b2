"""The sizes at which `cache_decode` is compiled, timed and tested, and the bytes it must move at each."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.cache_decode import pallas_mosaic_tpu, pallas_triton
from hashml_kernels.cache_decode.api import cache_decode
from hashml_kernels.cache_decode.formats import (
    Coupled,
    CoupledFormat,
    DecodeGeometry,
    Dense,
    DenseFormat,
    Format,
    IntegerFormat,
    KiviFormat,
    Leaves,
    Operands,
    Pairs,
    Quantised,
    expected_shapes,
)
from hashml_kernels.problem import Problem

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}
_PLATFORMS = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}


class Case(NamedTuple):
    """A step of ``batch`` rows over caches in which every slot is taken."""

    name: str
    batch: int
    query_heads: int
    heads: int
    slots: int
    keys: Format
    values: Format
    pairs: Pairs | None = None
    width: int = 128
    own_positions: bool = False
    """Whether each head has positions of its own, as evicting policies leave them."""
    dense: str = "bfloat16"

    @property
    def geometry(self) -> DecodeGeometry:
        return DecodeGeometry(self.keys, self.values, self.pairs)

    def leaves(self, form: Format) -> Leaves:
        """The arrays of keys or values."""
        shapes = expected_shapes(form, self.batch, self.heads, self.slots, self.width)
        match form:
            case DenseFormat():
                return Dense(jax.ShapeDtypeStruct(shapes[0], self.dense))
            case CoupledFormat():
                return Coupled(*map(jax.ShapeDtypeStruct, shapes, (jnp.uint8, jnp.float16)))
            case _:
                return Quantised(*map(jax.ShapeDtypeStruct, shapes, (jnp.uint8, jnp.float16, jnp.float16)))

    @property
    def pos(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.heads if self.own_positions else 1, self.slots), jnp.int32)

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        q = jax.ShapeDtypeStruct((self.batch, self.query_heads, self.width), jnp.float32)
        query_pos = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        turning = [] if self.pairs is None else [jax.ShapeDtypeStruct((self.width // 2,), jnp.float32)]
        return (q, *self.leaves(self.keys), *self.leaves(self.values), self.pos, query_pos, *turning)

    def operands(self) -> Operands:
        """As backends see them."""
        queries = self.query_heads // self.heads
        q = jax.ShapeDtypeStruct((self.batch, self.heads, queries, self.width), jnp.float32)
        turning = None if self.pairs is None else jax.ShapeDtypeStruct((self.width // 2,), jnp.float32)
        query_pos = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        return Operands(q, self.leaves(self.keys), self.leaves(self.values), self.pos, query_pos, turning)  # pyright: ignore[reportArgumentType]

    def token_bytes(self) -> float:
        """Of one slot and key head, keys and values: codes and scales, without codebooks and positions."""
        stored = sum(
            array.size * array.dtype.itemsize
            for leaves in (self.leaves(self.keys), self.leaves(self.values))
            for field, array in zip(leaves._fields, leaves, strict=True)
            if field != "codebook"
        )
        return stored / (self.batch * self.heads * self.slots)

    def bytes(self) -> int:
        """All arguments once, and the results."""
        results = 4 * self.batch * self.query_heads * (self.width + 1)
        return results + sum(array.size * array.dtype.itemsize for array in self.arguments())

    def flops(self) -> int:
        """Of the two products; decoding and rotation come on top."""
        return 4 * self.batch * self.query_heads * self.slots * self.width


INT4, INT8 = IntegerFormat(4, 128), IntegerFormat(8, 128)
KIVI2, KIVI4 = (KiviFormat(2, 32), IntegerFormat(2, 32)), (KiviFormat(4, 32), IntegerFormat(4, 32))
CQ8, CQ4 = CoupledFormat(8), CoupledFormat(4)

LLAMA_7B = (
    Case("llama7b_bf16_b8_4k", 8, 32, 32, 4096, DenseFormat(), DenseFormat()),
    Case("llama7b_int8_b8_4k", 8, 32, 32, 4096, INT8, INT8),
    Case("llama7b_int4_b8_4k", 8, 32, 32, 4096, INT4, INT4),
    Case("llama7b_kivi4_b8_4k", 8, 32, 32, 4096, *KIVI4),
    Case("llama7b_kivi2_b8_4k", 8, 32, 32, 4096, *KIVI2),
    Case("llama7b_kivi2_b1_32k", 1, 32, 32, 32768, *KIVI2),
    Case("llama7b_cq4c8b_b8_4k", 8, 32, 32, 4096, CQ4, CQ4, "half"),
    Case("llama7b_cq8c8b_b8_4k", 8, 32, 32, 4096, CQ8, CQ8, "half"),
    Case("llama7b_cq8c8b_b32_4k", 32, 32, 32, 4096, CQ8, CQ8, "half"),
    Case("llama7b_cq8c8b_b1_32k", 1, 32, 32, 32768, CQ8, CQ8, "half"),
)

LLAMA_3_8B = (
    Case("llama3_bf16_b8_32k", 8, 32, 8, 32768, DenseFormat(), DenseFormat()),
    Case("llama3_int4_b8_32k", 8, 32, 8, 32768, INT4, INT4),
    Case("llama3_kivi2_b1_4k", 1, 32, 8, 4096, *KIVI2),
    Case("llama3_kivi2_b32_32k", 32, 32, 8, 32768, *KIVI2),
    Case("llama3_cq8c8b_b8_32k", 8, 32, 8, 32768, CQ8, CQ8, "half"),
    Case("llama3_cq8c8b_own_b8_4k", 8, 32, 8, 4096, CQ8, CQ8, "half", own_positions=True),
)

# Eight query heads share a key head.
LLAMA_3_70B = (
    Case("llama3_70b_int4_b8_32k", 8, 64, 8, 32768, INT4, INT4),
    Case("llama3_70b_kivi2_b8_32k", 8, 64, 8, 32768, *KIVI2),
    Case("llama3_70b_cq8c8b_b8_32k", 8, 64, 8, 32768, CQ8, CQ8, "half"),
)

# One key head, of width 256.
GEMMA_2B = (
    Case("gemma2b_bf16_b8_8k", 8, 8, 1, 8192, DenseFormat(), DenseFormat(), width=256),
    Case("gemma2b_int4_b8_8k", 8, 8, 1, 8192, INT4, INT4, width=256),
    Case("gemma2b_cq8c8b_b8_8k", 8, 8, 1, 8192, CQ8, CQ8, "half", width=256),
)

ODD = (
    Case("ragged_int4", 3, 6, 2, 201, IntegerFormat(4, 32), IntegerFormat(2, 64), width=64),
    Case("ragged_kivi2", 2, 2, 2, 224, KiviFormat(2, 32), IntegerFormat(4, 32)),
    Case("ragged_cq", 2, 4, 1, 133, CoupledFormat(4), CoupledFormat(8), "interleaved", 64, own_positions=True),
    Case("ragged_cq1", 2, 10, 2, 150, CoupledFormat(1), CoupledFormat(1), "half"),
    Case("odd_width", 2, 3, 1, 50, IntegerFormat(3, 8), CoupledFormat(3, 10), "half", 24),
)

CASES = LLAMA_7B + LLAMA_3_8B + LLAMA_3_70B + GEMMA_2B + ODD


def problems() -> Iterator[Problem]:
    """Every case; decoding has no backward pass."""
    return map(_problem, CASES)


def _problem(case: Case) -> Problem:
    arguments = case.arguments()

    def refusal(implementation: str) -> str | None:
        try:
            _KERNELS[implementation].check(case.operands(), case.geometry)
        except NotImplementedError as error:
            return str(error)
        return None

    return Problem(
        op="cache_decode",
        case=case.name,
        direction="forward",
        arguments=arguments,
        draw=lambda rng: draw(case, rng),
        call=lambda implementation, *arrays: _call(case, implementation, *arrays),
        kernels=_PLATFORMS,
        refusal=refusal,
        bytes=case.bytes(),
        flops=case.flops(),
        # The result is a mean; what is rounded like a sum is a logit.
        terms=case.width,
        table_rows=None,
    )


def draw(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Standard normal queries, keys of about that size, and all positions up to the query's."""

    def of(form: Format) -> list[np.ndarray]:
        found = []
        leaves = case.leaves(form)
        for field, array in zip(leaves._fields, leaves, strict=True):
            if field == "codes":
                found.append(rng.integers(0, 256, array.shape, np.uint8))
                continue
            x = rng.standard_normal(array.shape, np.float32)
            if field == "scale" and isinstance(form, IntegerFormat | KiviFormat):
                x = np.abs(x) / 2**form.bits
            found.append(x.astype(array.dtype))
        return found

    q = rng.standard_normal((case.batch, case.query_heads, case.width), np.float32) / np.sqrt(np.float32(case.width))
    pos = np.broadcast_to(np.arange(case.slots, dtype=np.int32), case.pos.shape).copy()
    query_pos = np.full(case.batch, case.slots - 1, np.int32)
    turning = [] if case.pairs is None else [frequencies(case.width)]
    return (q, *of(case.keys), *of(case.values), pos, query_pos, *turning)


def frequencies(width: int) -> np.ndarray:
    """float32 ``[width / 2]``: those of Llama's rotation."""
    return (10_000.0 ** (-np.arange(0, width, 2) / width)).astype(np.float32)


def _call(case: Case, implementation, q, *arrays):
    keys, values = (type(case.leaves(form)) for form in (case.keys, case.values))
    middle = len(keys._fields)
    end = middle + len(values._fields)
    pos, query_pos, *turning = arrays[end:]
    return cache_decode(
        q,
        keys(*arrays[:middle]),
        values(*arrays[middle:end]),
        pos,
        query_pos,
        key_format=case.keys,
        value_format=case.values,
        rotation=None if case.pairs is None else (turning[0], case.pairs),
        implementation=implementation,
    )
