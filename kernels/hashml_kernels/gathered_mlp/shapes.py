"""The sizes at which `gathered_mlp` is compiled, timed and tested, and the bytes it must move at each."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.gathered_mlp import pallas_mosaic_tpu, pallas_triton
from hashml_kernels.gathered_mlp.api import gathered_mlp
from hashml_kernels.gathered_mlp.lists import Activation, Operands
from hashml_kernels.problem import Problem

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}
_PLATFORMS = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}
_POOL = 1_000_003  # numbers that are drawn; larger arrays repeat them, no row like another


class Case(NamedTuple):
    """``batch`` inputs to a layer of ``neurons``, of which lists name ``entries``, or blocks, no one twice."""

    name: str
    batch: int
    width: int
    neurons: int
    entries: int
    block: int = 1
    own: bool = False
    """Whether each input has a list of its own."""
    dtype: str = "bfloat16"
    activation: Activation = "relu"
    gated: bool = False
    biased: bool = False

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """``x, w_in, w_out, idx, valid``, and the gate and the bias where there are some."""
        matrix = jax.ShapeDtypeStruct((self.neurons, self.width), self.dtype)
        lists = (self.batch, self.entries) if self.own else (self.entries,)
        return (
            jax.ShapeDtypeStruct((self.batch, self.width), self.dtype),
            matrix,
            matrix,
            jax.ShapeDtypeStruct(lists, jnp.int32),
            jax.ShapeDtypeStruct(lists, jnp.bool_),
            *([matrix] if self.gated else []),
            *([jax.ShapeDtypeStruct((self.neurons,), self.dtype)] if self.biased else []),
        )

    def operands(self) -> Operands:
        """As backends see them."""
        lists, rows = (self.batch, 1) if self.own else (1, self.batch)
        _, w_in, w_out, _, _, *others = self.arguments()
        x = jax.ShapeDtypeStruct((lists, rows, self.width), self.dtype)
        named = [jax.ShapeDtypeStruct((lists, self.entries), dtype) for dtype in (jnp.int32, jnp.bool_)]
        gate, bias = (others[0] if self.gated else None), (others[-1] if self.biased else None)
        return Operands(x, w_in, bias, gate, w_out, *named)  # pyright: ignore[reportArgumentType]

    def rows(self) -> int:
        """Rows of a matrix that are read: those that lists name."""
        return (self.batch if self.own else 1) * self.entries * self.block

    def bytes(self) -> int:
        """The rows that are named, once a list, the lists, the inputs and the results."""
        x, w_in, _, idx, valid, *_ = self.arguments()
        size = w_in.dtype.itemsize
        row = (3 if self.gated else 2) * self.width * size + (size if self.biased else 0)
        return self.rows() * row + sum(a.size * a.dtype.itemsize for a in (x, x, idx, valid))

    def flops(self) -> int:
        """Of the products."""
        rows = self.rows() * (1 if self.own else self.batch)
        return 2 * (3 if self.gated else 2) * rows * self.width


# A tenth of the neurons: 4,096 x 16,384 of OPT-6.7B, 12,288 x 49,152 of OPT-175B, and a gated layer of Llama-3-8B.
MODELS = (
    Case("opt_6b_b1", 1, 4096, 16384, 1638, biased=True),
    Case("opt_6b_b8", 8, 4096, 16384, 1638, biased=True),
    Case("opt_6b_b8_own", 8, 4096, 16384, 1638, own=True, biased=True),
    Case("opt_6b_b1_f32", 1, 4096, 16384, 1638, dtype="float32"),
    Case("opt_6b_b1_blocks", 1, 4096, 16384, 103, 16, biased=True),
    Case("opt_6b_b8_blocks", 8, 4096, 16384, 103, 16, biased=True),
    Case("opt_6b_b1_f32_blocks", 1, 4096, 16384, 205, 8, dtype="float32"),
    Case("opt_175b_b1", 1, 12288, 49152, 4915, biased=True),
    Case("opt_175b_b8", 8, 12288, 49152, 4915, biased=True),
    Case("opt_175b_b1_blocks", 1, 12288, 49152, 39, 128, biased=True),
    Case("opt_175b_b8_blocks", 8, 12288, 49152, 39, 128, biased=True),
    Case("llama3_8b_b1", 1, 4096, 14336, 1434, activation="silu", gated=True),
    Case("llama3_8b_b8_blocks", 8, 4096, 14336, 45, 32, activation="silu", gated=True),
)

ODD = (
    Case("ragged_own", 3, 100, 77, 23, own=True, dtype="float32", activation="gelu", biased=True),
    Case("ragged_gated", 11, 200, 130, 51, activation="silu", gated=True),
    Case("odd_blocks", 2, 72, 50, 6, 7, dtype="float16"),
    Case("ragged_blocks", 5, 384, 96, 5, 16, activation="gelu", gated=True, biased=True),
)

CASES = MODELS + ODD


def problems() -> Iterator[Problem]:
    """Every case, forward; derivatives are XLA's."""
    return map(_problem, CASES)


def call(case: Case, implementation, x, w_in, w_out, idx, valid, *others):
    """The public function."""
    return gathered_mlp(
        x,
        w_in,
        w_out,
        idx,
        valid,
        w_gate=others[0] if case.gated else None,
        b_in=others[-1] if case.biased else None,
        activation=case.activation,
        block=case.block,
        implementation=implementation,
    )


def _problem(case: Case) -> Problem:
    def refusal(implementation: str) -> str | None:
        try:
            _KERNELS[implementation].check(case.operands(), block=case.block)
        except NotImplementedError as error:
            return str(error)
        return None

    return Problem(
        op="gathered_mlp",
        case=case.name,
        direction="forward",
        arguments=case.arguments(),
        draw=lambda rng: draw(case, rng),
        call=lambda implementation, *arrays: call(case, implementation, *arrays),
        kernels=_PLATFORMS,
        refusal=refusal,
        bytes=case.bytes(),
        flops=case.flops(),
        # Hidden numbers and results are sums; matrices are drawn so that both are of about size one.
        terms=case.width + case.entries * case.block,
        table_rows=None,
    )


def draw(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Standard normal inputs, matrices that keep their size, neurons in any order, one entry in eight not valid."""
    pool = rng.standard_normal(_POOL, np.float32)
    size = case.width**-0.5
    x, w_in, w_out, idx, valid, *others = case.arguments()
    blocks = -(-case.neurons // case.block)
    lists = np.argsort(rng.random((case.batch, blocks), np.float32), axis=1)[:, : case.entries]

    def of(i: int, array: jax.ShapeDtypeStruct, size: float) -> np.ndarray:
        return np.resize((np.roll(pool, i) * np.float32(size)).astype(array.dtype), array.shape)

    return (
        of(0, x, 1.0),
        of(1, w_in, size),
        of(2, w_out, (case.entries * case.block) ** -0.5),
        lists[: len(lists) if case.own else 1].reshape(idx.shape).astype(np.int32),
        rng.random(valid.shape) < 7 / 8,
        *(of(3 + i, array, size) for i, array in enumerate(others)),
    )
