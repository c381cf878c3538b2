"""Every backend equals a loop over rows, heads and entries in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels.sparse_decode import pallas_mosaic_tpu, pallas_triton, shapes, sparse_decode, xla
from hashml_kernels.sparse_decode.lists import MASKED, Operands, Partial, finish, merge

EPS = float(np.finfo(np.float32).eps)
Case = shapes.Case

# No number of slots, entries or channels is a multiple of a tile, unless pages ask for it.
ROWS = Case("rows", 3, 6, 2, 1, 61, 29, 1, "float32", 20, 12)
OWN = Case("own", 3, 4, 4, 2, 45, 19, 1, "bfloat16", 16, 16)
ODD_PAGES = Case("odd_pages", 3, 3, 1, 1, 50, 6, 7, "float16", 10, 24)
PAGES = Case("pages", 3, 6, 2, 1, 160, 13, 8, "float32", 128, 128)
HALF_PAGES = Case("half_pages", 3, 9, 1, 1, 160, 9, 16, "bfloat16", 128, 256)
CASES = [("reference", ROWS), ("xla", ROWS), ("xla", ODD_PAGES), ("auto", PAGES)]
CASES += [("pallas_triton", case) for case in (ROWS, OWN, ODD_PAGES)]
CASES += [("pallas_mosaic_tpu", case) for case in (PAGES, HALF_PAGES)]


@functools.cache
def draw(case: Case) -> dict[str, Any]:
    """Lists as drawn; with all that does not count, in a cache filled in part; and without a valid entry.

    What lies in rows that no list names is NaN.
    """
    rng = np.random.default_rng(0)
    q, k, v, idx, valid, weight = (x.copy() for x in shapes.draw(case, rng))
    pages = -(-case.slots // case.page)
    idx[1, 0, :4] = -1, pages, 2**31 - 1, idx[1, 0, 4]
    weight[1, 0, 5], valid[1, 0, :5] = 0, True
    valid[2] = False
    length = np.array([case.slots, case.slots * 2 // 3 + 1, case.slots], np.int32)
    for b, h in np.ndindex(case.batch, case.heads):
        named = {slot for s in range(case.lists) if s * case.heads // case.lists == h
                 for slot, _ in entries(case, idx[b, s], valid[b, s], weight[b, s], int(length[b]))}  # fmt: skip
        others = [slot for slot in range(case.slots) if slot not in named]
        assert others
        k[b, h, others] = v[b, h, others] = np.nan
    return {"q": q, "k": k, "v": v, "idx": idx, "valid": valid, "weight": weight, "length": length}


def entries(case: Case, idx: Any, valid: Any, weight: Any, length: int) -> list[tuple[int, float]]:
    """Slots that count, and their weights, one by one."""
    return [
        (int(i) * case.page + n, float(w))
        for i, ok, w in zip(idx, valid, weight, strict=True)
        for n in range(case.page)
        if ok and w > 0 and i >= 0 and int(i) * case.page + n < length
    ]


@functools.cache
def loop(case: Case, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The result, and a bound for the error that float32 makes of it."""
    arrays = draw(case)
    q, k, v = (arrays[name].astype(np.float64) for name in "qkv")
    out, bound = np.zeros((*q.shape[:2], case.values)), np.zeros((*q.shape[:2], 1))
    for b, h in np.ndindex(q.shape[:2]):
        s, of_key = h * case.lists // case.query_heads, h * case.heads // case.query_heads
        idx, valid, weight = (arrays[name][b, s] for name in ("idx", "valid", "weight"))
        found = entries(case, idx, valid, weight, int(arrays["length"][b]))
        if found:
            slots, weights = map(np.array, zip(*found, strict=True))
            logits = scale * (k[b, of_key, slots] @ q[b, h]) + np.log(weights)
            share = np.exp(logits - logits.max())
            out[b, h] = share @ v[b, of_key, slots] / share.sum()
            sizes = scale * (np.abs(k[b, of_key, slots]) @ np.abs(q[b, h])).max() * (case.width + 4)
            off = 2 * EPS * (sizes + len(found) + 8 + 2 * np.abs(logits).max())
            bound[b, h] = off * np.abs(v[b, of_key, slots]).max()
    rounding = float(jnp.finfo(case.dtype).eps) if case.dtype != "float32" else 0.0
    return out, bound + rounding * np.abs(out)


@functools.cache
def program(case: Case, implementation: Any, scale: float = 0.3):
    """The op, compiled once for all tests of a case."""
    options = {"xla_backend_optimization_level": 0} if implementation.startswith("pallas") else None
    return jax.jit(
        lambda arrays: sparse_decode(**arrays, scale=scale, page=case.page, implementation=implementation),
        compiler_options=options,
    )


def assert_equals_the_loop(case: Case, implementation: str) -> None:
    out, bound = loop(case, 0.3)
    got = program(case, implementation)(draw(case))
    assert got.dtype == case.dtype
    assert np.all(np.abs(np.asarray(got, np.float64) - out) <= bound)
    np.testing.assert_array_equal(np.asarray(got, np.float64)[2], 0)
    assert np.abs(out).max() > 0.5
    assert bound.max() < 3e-2  # while results are of size one


@pytest.mark.parametrize(("implementation", "case"), CASES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_backend_equals_the_loop(implementation, case):
    assert_equals_the_loop(case, implementation)


@pytest.fixture
def _compiled_anew():
    """For tests that change a module's numbers."""
    program.cache_clear()
    yield
    program.cache_clear()


@pytest.mark.usefixtures("_compiled_anew")
def test_blocks_of_xla_may_have_any_size(monkeypatch):
    monkeypatch.setattr(xla, "LEAST_SLOTS", 7)
    monkeypatch.setattr(xla, "BLOCK_FLOATS", 1)
    assert_equals_the_loop(ROWS, "xla")


@pytest.mark.usefixtures("_compiled_anew")
def test_triton_programs_share_rows_and_query_heads(monkeypatch):
    monkeypatch.setattr(pallas_triton, "_QUERY_FLOATS", 32)
    monkeypatch.setattr(pallas_triton, "_STEP_NUMBERS", 8 * 48)
    monkeypatch.setattr(pallas_triton, "_PROGRAMS", 2 * 3 * 2 * 3)
    plan = pallas_triton._Plan.of(ROWS.operands(), 1)
    assert (plan.shares, plan.parts, plan.steps) == (3, 2, 2)
    assert_equals_the_loop(ROWS, "pallas_triton")


def test_tpu_kernel_under_the_simulator(monkeypatch):
    """JAX's simulation of the TPU's memories: reads out of bounds, or of what is not yet there, and races."""
    monkeypatch.setattr(pallas_mosaic_tpu, "_TOKENS", 128)
    case, arrays = HALF_PAGES, draw(HALF_PAGES)
    assert pallas_mosaic_tpu._steps(case.entries, case.page) > 1
    q = jnp.asarray(arrays["q"]).reshape(case.batch, case.lists, -1, case.width)
    operands = Operands(q, *(jnp.asarray(arrays[name]) for name in Operands._fields[1:]))
    simulate = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    found = jax.jit(lambda o: pallas_mosaic_tpu.partial(o, page=case.page, scale=0.3, interpret=simulate))(operands)
    out, bound = loop(case, 0.3)
    got = np.asarray(finish(found), np.float64).reshape(out.shape)
    assert np.all(np.abs(got - out) <= bound)


def test_float32_numbers_in_pieces_of_eight_bits():
    x = np.random.default_rng(3).standard_normal((5, 7)).astype(np.float32)
    pieces = np.asarray(jax.jit(pallas_mosaic_tpu._pieces)(x))
    assert pieces.dtype == jnp.bfloat16
    np.testing.assert_array_equal(sum(np.split(pieces.astype(np.float64), 3)), x)


def test_partial_sums_merge_in_any_order():
    rng = np.random.default_rng(1)
    logits, values = rng.standard_normal((3, 4, 7)) * 30, rng.standard_normal((3, 4, 7, 5))
    tops = logits.max(axis=-1)
    shares = np.exp(logits - tops[..., None])
    empty = np.array([False, False, True, False])
    masses = np.where(empty, 0, shares.sum(axis=-1))
    sums = np.where(empty[:, None], 0, np.einsum("npm,npmv->npv", shares, values))
    parts = [sums, masses, np.where(empty, MASKED, tops)]
    merged = jax.jit(lambda *parts: finish(merge(Partial(*parts), axis=1)))
    whole = np.exp(logits - tops[:, ~empty].max(axis=1)[:, None, None])[:, ~empty]
    expected = np.einsum("npm,npmv->nv", whole, values[:, ~empty]) / whole.sum(axis=(1, 2))[:, None]
    for order in ([0, 1, 2, 3], [2, 3, 1, 0]):
        found = merged(*(x[:, order].astype(np.float32) for x in parts))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    nothing = np.zeros((3, 4, 5)), np.zeros((3, 4)), np.full((3, 4), MASKED)
    np.testing.assert_array_equal(merged(*(x.astype(np.float32) for x in nothing)), np.zeros((3, 5)))


def test_a_batch_of_calls_and_derivatives_through_a_kernel():
    """The kernel's batching puts calls side by side; its derivatives are XLA's."""
    case = Case("", 1, 2, 1, 1, 24, 9, 1, "float32", 8, 8)
    drawn = [jnp.stack(x) for x in zip(*(shapes.draw(case, np.random.default_rng(n)) for n in (1, 2)), strict=True)]

    def total(implementation, q, *others):
        out = jax.vmap(lambda *arrays: sparse_decode(*arrays, implementation=implementation))(q, *others)
        return jnp.sum(out**2), out

    kernel, plain = (
        jax.jit(
            jax.value_and_grad(functools.partial(total, name), argnums=(0, 1, 2, 5), has_aux=True),
            compiler_options={"xla_backend_optimization_level": 0},
        )(*drawn)
        for name in ("pallas_triton", "xla")
    )
    for got, expected in zip(jax.tree.leaves(kernel), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
        assert np.abs(np.asarray(expected)).max() > 1e-2
