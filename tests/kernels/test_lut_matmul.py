"""Every backend equals NumPy in float64 on codes that were never packed, forward and backward; and the packing."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels.lut_matmul import layout, lut_matmul, pack_codes, pallas_mosaic_tpu, shapes, unpack_codes, xla

EPS = float(np.finfo(np.float32).eps)
Case = shapes.Case

# Rows, columns, groups and slots that fill no tiles, but where the name says so.
T3 = Case("t3", 5, 130, 70, 3, 2, dtype="float32")
T4 = Case("t4_bf16", 2, 210, 45, 4, 3)
T2 = Case("t2_other_dtype", 19, 75, 33, 2, grid_dtype="float32")
A8 = Case("a8", 7, 600, 37, 8, 4, affine=True, dtype="float32")
A4 = Case("a4_bf16", 33, 256, 66, 4, 4, affine=True)
T3_TILES = Case("t3_tiles", 20, 256, 40, 3, 2, dtype="float32")
T1_WIDE = Case("t1_wide", 3, 4400, 6, 1, dtype="float32")
FORWARD = [("xla", T3), ("xla", T2), ("auto", T4), ("reference", A4)]
FORWARD += [("pallas_triton", case) for case in (T3, T4, T2, A8, A4, T1_WIDE)]
FORWARD += [("pallas_mosaic_tpu", case) for case in (T3, T4, T2, A8, A4)]
BACKWARD = [("xla", T3), ("xla", A8), ("reference", T2)]
BACKWARD += [("pallas_triton", case) for case in (T3_TILES, A4, T2)]
BACKWARD += [("pallas_mosaic_tpu", case) for case in (T3, A8)]


class Drawn(NamedTuple):
    arrays: tuple[np.ndarray, ...]
    codes: np.ndarray
    w: np.ndarray


@functools.cache
def draw(case: Case) -> Drawn:
    """Arguments; the codes as integers; and W, number by number, in float64."""
    rng = np.random.default_rng(1)
    x, packed, *grids = shapes.draw(case, case.arguments(), rng)
    codes = rng.integers(0, 2**case.bits, (case.rows, case.columns), np.uint8)
    own = np.asarray(pack_codes(codes, case.bits))
    assert own.shape == packed.shape
    w, run = np.zeros(codes.shape), case.columns // case.groups
    wide = [grid.astype(np.float64) for grid in grids]
    for r in range(case.rows):
        for c in range(case.columns):
            code = int(codes[r, c])
            if case.affine:
                w[r, c] = wide[0][r, c // run] * (code - wide[1][r, c // run])
            else:
                w[r, c] = wide[0][r, c // run, code]
    return Drawn((x, own, *grids), codes, w)


def rounding(dtype: str) -> float:
    return 0.0 if dtype == "float32" else float(jnp.finfo(dtype).eps) / 2


def bound(case: Case, terms: int, size: np.ndarray, result: np.ndarray, result_dtype: str) -> np.ndarray:
    """For sums of ``terms`` products of this size: order of additions, numbers of W and the result rounded."""
    return (EPS * (terms + 16) + rounding(case.dtype)) * size + 1.01 * rounding(result_dtype) * np.abs(result)


OPTIONS: Any = {"xla_backend_optimization_level": 0}


@functools.cache
def program(case: Case, implementation: str):
    return jax.jit(functools.partial(shapes.call, case, implementation), compiler_options=OPTIONS)


@pytest.mark.parametrize(("implementation", "case"), FORWARD, ids=lambda x: x if isinstance(x, str) else x.name)
def test_backend_equals_the_dense_product(implementation, case):
    arrays, _, w = draw(case)
    x = arrays[0].astype(np.float64)
    got = program(case, implementation)(*arrays)
    assert got.dtype == case.dtype
    expected, limit = x @ w.T, bound(case, case.columns, np.abs(x) @ np.abs(w).T, x @ w.T, case.dtype)
    assert np.all(np.abs(np.asarray(got, np.float64) - expected) <= limit)
    assert np.median(limit) < 0.05 * np.abs(expected).max()


def gradients(case: Case, dy: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Each expected gradient, the sum of what it adds up without signs, and how many products these are."""
    arrays, codes, w = draw(case)
    x, grids = arrays[0].astype(np.float64), [grid.astype(np.float64) for grid in arrays[2:]]
    run = case.columns // case.groups
    rows, group = np.arange(case.rows)[:, None], np.arange(case.columns)[None] // run

    def summed(numbers: np.ndarray, weights: Any, *more: Any) -> np.ndarray:
        total = np.zeros((case.rows, case.groups, *[2**case.bits] * len(more)))
        np.add.at(total, (rows, group, *more), numbers * weights)
        return total

    dw, size = dy.T @ x, np.abs(dy).T @ np.abs(x)
    found = [(dy @ w, np.abs(dy) @ np.abs(w), case.rows)]
    terms = case.batch * case.columns
    if not case.affine:
        return [*found, (summed(dw, 1.0, codes), summed(size, 1.0, codes), terms)]
    scales, zeros = grids
    spread = (np.repeat(zeros, run, axis=1), np.repeat(scales, run, axis=1))
    weights = codes - spread[0]
    # The sums with the codes and without are made apart: their sizes add up.
    found.append((summed(dw, weights), summed(size, codes + spread[0]), terms))
    return [*found, (summed(dw, -spread[1]), summed(size, spread[1]), terms)]


@pytest.mark.parametrize(("implementation", "case"), BACKWARD, ids=lambda x: x if isinstance(x, str) else x.name)
def test_gradients_are_sums_over_codes(implementation, case):
    (x, codes, *grids), _, _ = draw(case)
    dy = np.random.default_rng(2).standard_normal((case.batch, case.rows), np.float32).astype(x.dtype)

    def pulled(x, grids, dy):
        return jax.vjp(lambda x, *grids: shapes.call(case, implementation, x, codes, *grids), x, *grids)[1](dy)

    got = jax.jit(pulled, compiler_options=OPTIONS)(x, grids, dy)
    for own, like, (expected, size, terms) in zip(
        got, (x, *grids), gradients(case, dy.astype(np.float64)), strict=True
    ):
        assert own.dtype == like.dtype
        assert own.shape == like.shape
        limit = bound(case._replace(dtype="float32"), terms, size, expected, str(like.dtype))
        assert np.all(np.abs(np.asarray(own, np.float64) - expected) <= limit)
        assert np.median(limit) < 0.05 * np.abs(expected).max()


def test_blocks_of_rows_of_any_number(monkeypatch):
    case = T3
    (x, codes, tables), _, w = draw(case)
    monkeypatch.setattr(xla, "BLOCK_WEIGHTS", 8 * case.columns + 5)
    assert xla.block_rows(case.own) == 8
    assert case.rows % 8
    dy = np.ones((case.batch, case.rows), np.float32)

    def both(x, tables, dy):
        y, pull = jax.vjp(lambda x, tables: shapes.call(case, "xla", x, codes, tables), x, tables)
        return y, pull(dy)

    y, (dx, dtables) = jax.jit(both)(x, tables, dy)
    np.testing.assert_allclose(y, x @ w.T, atol=1e-5)
    for got, (expected, *_) in zip((dx, dtables), gradients(case, dy.astype(np.float64)), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("backward", [False, True])
def test_xla_holds_a_block_of_the_matrix_at_a_time(monkeypatch, backward):
    monkeypatch.setattr(xla, "BLOCK_WEIGHTS", 2**15)
    case = Case("", 4, 1024, 1024, 4, dtype="float32")
    call = functools.partial(shapes._backward(case) if backward else shapes._forward(case), "xla")
    compiled = jax.jit(call).lower(*case.arguments(), *([case.y()] if backward else [])).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    # The inputs' gradients and a few blocks with their codes; W is 4 MiB.
    assert memory.temp_size_in_bytes < 2**20


def test_tpu_kernels_under_the_simulator():
    """JAX's simulation of the TPU's memories: reads out of bounds, or of what is not yet there, and races."""
    case = T3
    arrays, _, w = draw(case)
    x, packed, tables = map(jnp.asarray, arrays)
    simulate = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    operands = shapes.Operands(x, packed, tables, None, None)
    y = jax.jit(lambda o: pallas_mosaic_tpu.multiply(o, case.own, interpret=simulate))(operands)
    np.testing.assert_allclose(y, arrays[0] @ w.T, atol=1e-5)

    case = T2
    x, packed, tables = map(jnp.asarray, draw(case).arrays)
    dy = jnp.ones((case.batch, case.rows))
    operands = shapes.Operands(x, packed, tables, None, None)
    sums = jax.jit(lambda o, dy: pallas_mosaic_tpu.gradient(o, dy, case.own, interpret=simulate))(operands, dy)
    np.testing.assert_allclose(sums, gradients(case, np.ones(dy.shape))[1][0], atol=1e-4)


# --- identities -----------------------------------------------------------------------------------


def test_a_group_a_column_is_any_matrix_and_its_gradient():
    rng = np.random.default_rng(3)
    w = rng.standard_normal((6, 10), np.float32)
    x, dy = rng.standard_normal((4, 10), np.float32), rng.standard_normal((4, 6), np.float32)
    codes = rng.integers(0, 2, w.shape, np.uint8)
    tables = np.stack([np.where(codes == 0, w, 7.0), np.where(codes == 1, w, 7.0)], axis=2).astype(np.float32)

    def call(tables):
        return lut_matmul(x, pack_codes(codes, 1), tables=tables, bits=1, columns=10, implementation="xla")

    y, pull = jax.vjp(call, jnp.asarray(tables))
    np.testing.assert_allclose(y, x @ w.T, atol=1e-5)
    [dtables] = pull(jnp.asarray(dy))
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(dtables), codes[..., None], 2)[..., 0], dy.T @ x, atol=1e-5
    )
    assert not np.take_along_axis(np.asarray(dtables), 1 - codes[..., None], 2).any()


def test_an_even_table_is_an_affine_grid():
    rng = np.random.default_rng(4)
    scales, zeros = rng.random((9, 3), np.float32) + 0.5, 4 * rng.random((9, 3), np.float32)
    codes = pack_codes(rng.integers(0, 8, (9, 24), np.uint8), 3)
    tables = scales[..., None] * (np.arange(8, dtype=np.float32) - zeros[..., None])
    x = rng.standard_normal((2, 24), np.float32)
    own: dict[str, Any] = {"bits": 3, "columns": 24}
    affine = lut_matmul(x, codes, scales=scales, zeros=zeros, **own)
    np.testing.assert_allclose(lut_matmul(x, codes, tables=tables, **own), affine, atol=1e-4)
    plain = lut_matmul(x, codes, scales=scales, **own)
    np.testing.assert_array_equal(plain, lut_matmul(x, codes, scales=scales, zeros=0 * zeros, **own))


def test_batches_of_calls():
    """Several inputs to one matrix; several users' tables over one array of codes, with gradients; and no input."""
    case = Case("", 2, 40, 12, 2, dtype="float32")
    (x, codes, tables), _, _ = draw(case)
    xs, users = np.stack([x, 2 * x, -x]), np.stack([tables, tables + 1, -tables])
    call = functools.partial(shapes.call, case, "pallas_triton")
    together = jax.jit(jax.vmap(call, (0, None, None)), compiler_options=OPTIONS)(xs, codes, tables)
    one = program(case, "xla")
    np.testing.assert_allclose(together, [one(x, codes, tables) for x in xs], atol=1e-5)
    np.testing.assert_allclose(call(xs, codes, tables), together, atol=1e-5)

    def squares(x, tables):
        return jnp.sum(jax.vmap(call, (0, None, 0))(x, codes, tables) ** 2)

    def one_by_one(x, tables):
        return sum(jnp.sum(shapes.call(case, "reference", a, codes, b) ** 2) for a, b in zip(x, tables, strict=True))

    got = jax.jit(jax.grad(squares, argnums=(0, 1)), compiler_options=OPTIONS)(xs, users)
    for own, expected in zip(got, jax.jit(jax.grad(one_by_one, argnums=(0, 1)))(xs, users), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-3)
    assert shapes.call(case, "auto", xs[:, :0], codes, tables).shape == (3, 0, case.rows)


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 133])
def test_codes_come_back_from_exactly_so_many_bits(bits, count):
    codes = np.random.default_rng(count).integers(0, 2**bits, (2, 3, count), np.uint8)
    packed = pack_codes(codes, bits)
    own = layout(count, bits)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (2, 3, own.row_bytes)
    assert count * bits / 8 <= own.row_bytes < count * bits / 8 + 3
    np.testing.assert_array_equal(unpack_codes(packed, bits, count), codes)


def test_order_of_codes_in_bytes():
    """Slots of 4 bits are the halves of a row; of 3 bits, eighths: two planes of low bits, one of high ones."""
    assert pack_codes(np.array([1, 2, 3, 4]), 4).tolist() == [1 + 16 * 3, 2 + 16 * 4]
    codes = np.arange(8)  # one in each slot
    low = [sum((c & 3) << 2 * i for i, c in enumerate(half)) for half in (codes[:4], codes[4:])]
    assert pack_codes(codes, 3).tolist() == [*low, 0b11110000]
    assert pack_codes(np.array([17, 18]), 4).tolist() == [1 + 16 * 2]  # higher bits are cut off


def test_layouts_name_what_they_do_not_take():
    with pytest.raises(ValueError, match="bits is 5; allowed are 1, 2, 3, 4, 8"):
        layout(8, 5)
    with pytest.raises(ValueError, match="count is 0"):
        layout(0, 2)
    with pytest.raises(ValueError, match="packed has rows of 3 bytes; 8 codes of 2 bits take 2"):
        unpack_codes(np.zeros((1, 3), np.uint8), 2, 8)
