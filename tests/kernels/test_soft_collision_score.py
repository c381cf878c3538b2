"""Every backend equals a product over bits in float64, and blocks say what lies in them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels.soft_collision_score import (
    Scores,
    operands,
    pallas_mosaic_tpu,
    pallas_triton,
    shapes,
    soft_collision_score,
)

EPS = float(np.finfo(np.float32).eps)


class Case(NamedTuple):
    heads: int = 2
    queries: int = 2
    tables: int = 6
    bits: int = 8
    slots: int = 83
    norms: str | None = "float16"
    block: int = 32
    batch: int = 2

    @property
    def sizes(self) -> shapes.Case:
        return shapes.Case("", self.batch, self.heads * self.queries, self.heads, self.slots, *self[2:4], *self[5:7])


# No number of slots is a multiple of a block, and no number of tables of those that are read together.
ANY = {
    "bytes": Case(),
    "three_pieces": Case(queries=1, bits=12, tables=5, norms="bfloat16"),
    "two_programs_a_head": Case(1, 9, 3, 3, 40, None, 16, 1),
    "one": Case(1, 1, 1, 1, 1, "float32", 16, 1),
}
XLA_ALONE = {"odd_block": Case(bits=16, tables=3, queries=3, block=7)}
TPU = {
    "tables": Case(2, 3, 11, 8, 300, "float16", 128, 1),
    "heads": Case(8, 2, 2, 8, 150, "float16", 128, 1),
    "one_row": Case(1, 1, 9, 16, 570, "bfloat16", 256, 2),
    "few_bits": Case(1, 2, 4, 5, 140, None, 128, 1),
}
CASES = [("reference", "bytes"), ("reference", "odd_block")]
CASES += [("xla", name) for name in (*ANY, *XLA_ALONE)]
CASES += [("pallas_triton", name) for name in ANY] + [("pallas_mosaic_tpu", name) for name in TPU]


def case_of(backend: str, name: str) -> Case:
    return TPU[name] if backend == "pallas_mosaic_tpu" else (ANY | XLA_ALONE)[name]


@functools.cache
def draw(case: Case) -> tuple[np.ndarray, ...]:
    """Codes, logits and norms; some slots are left out, and a whole block where there are several."""
    rng = np.random.default_rng(case.slots)
    codes, logits, *norms = shapes.draw(case.sizes, rng)
    for norm in norms:
        norm[rng.random(norm.shape) < 0.2] = -1
        norm[..., :: case.slots] = 0.5  # one is there in any case
        if case.slots > 2 * case.block:
            norm[0, 0, case.block : 2 * case.block] = -2
    # Bits above those of the planes, which no one asked for.
    spare = codes.dtype.itemsize * 8 - case.bits
    codes |= (rng.integers(0, 2**spare, codes.shape) << case.bits).astype(codes.dtype)
    return codes, 3 * logits, *norms


@functools.cache
def truth(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Scores in float64, ``-inf`` where left out, and a threshold a head that is no head's score, nor near one."""
    codes, logits, *norms = draw(case)
    bits = codes[..., None, :] >> np.arange(case.bits)[::-1, None] & 1
    signs = 2.0 * np.repeat(bits, case.queries, axis=1) - 1
    chances = scipy.special.expit(signs * np.asarray(logits, np.float64)[..., None])
    scores = chances.prod(axis=3).sum(axis=2)
    if norms:
        norm = np.repeat(norms[0].astype(np.float64), case.queries, axis=1)
        scores = np.where(norm >= 0, scores * norm, -np.inf)
    thresholds = np.zeros(scores.shape[:2])
    for at in np.ndindex(*thresholds.shape):
        finite = np.sort(scores[at][np.isfinite(scores[at])])
        middle = finite[len(finite) // 4 : len(finite) // 4 + 20]
        gap = np.argmax(np.diff(middle)) if len(middle) > 1 else 0
        thresholds[at] = middle[gap : gap + 2].mean() if len(middle) > 1 else finite[0] / 2
    return scores.reshape(case.batch, case.heads, case.queries, -1), thresholds


@functools.cache
def program(case: Case, implementation: Any):
    """The op, compiled once for all tests of a case."""
    # Interpreted kernels are long programs that run once: LLVM's passes would take most of the time.
    options = {"xla_backend_optimization_level": 0} if implementation.startswith("pallas") else None

    def run(codes, logits, threshold, *norms):
        return soft_collision_score(
            codes, norms[0] if norms else None, logits, threshold=threshold, block=case.block,
            implementation=implementation,
        )  # fmt: skip

    return jax.jit(run, compiler_options=options)


def arguments(case: Case, threshold: np.ndarray) -> list[jax.Array]:
    codes, logits, *norms = draw(case)
    return [jnp.asarray(x) for x in (codes, logits, threshold.astype(np.float32), *norms)]


def assert_is(case: Case, found: Scores, threshold: np.ndarray) -> None:
    expected, _ = truth(case)
    limits = threshold.reshape(*expected.shape[:3], 1)
    expected = np.where(expected >= limits, expected, -np.inf)
    values, highest, survivors = map(np.asarray, found)
    np.testing.assert_array_equal(np.isfinite(values), np.isfinite(expected))
    held = np.isfinite(expected)
    # Sums of positive numbers, each a product of as many as there are bits.
    bound = EPS * (case.tables + 4 * case.bits + 4)
    np.testing.assert_allclose(values[held], expected[held], rtol=bound)
    for number, first in enumerate(range(0, case.slots, case.block)):
        own = values[..., first : first + case.block]
        np.testing.assert_array_equal(highest[..., number], own.max(axis=-1))
        np.testing.assert_array_equal(survivors[..., number], np.isfinite(own).sum(axis=-1))
    assert highest.shape[-1] == survivors.shape[-1] == -(-case.slots // case.block)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """So that several of Triton's programs share the slots of a head."""
    monkeypatch.setattr(pallas_triton, "_TILE", 32)


# --- backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_backend_equals_the_product_over_bits(backend, name):
    case = case_of(backend, name)
    scores, threshold = truth(case)
    for limits in (threshold, np.full_like(threshold, -np.inf)):
        assert_is(case, program(case, backend)(*arguments(case, limits)), limits)
    if case.slots > 20:
        kept = (scores >= threshold.reshape(*scores.shape[:3], 1)).sum(axis=-1)
        assert ((kept > 0) & (kept < np.isfinite(scores).sum(axis=-1))).all()


def test_tpu_kernel_under_the_simulator():
    """JAX's simulation of the TPU's memories: reads out of bounds, or of what is not yet there, and races."""
    simulate = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    case = Case(1, 2, 3, 8, 290, "float16", 128, 1)
    _, threshold = truth(case)
    codes, logits, limits, norms = arguments(case, threshold)
    group = (case.batch, case.heads, case.queries)
    given = operands.Operands(codes, norms, logits.reshape(*group, *logits.shape[2:]), limits.reshape(group))
    assert pallas_mosaic_tpu._Plan.of(given, case.block).slots < case.slots  # several steps, the last one ragged
    found = jax.jit(lambda given: pallas_mosaic_tpu.scores(given, case.block, interpret=simulate))(given)
    assert_is(case, found, threshold)


def test_hard_collisions_at_large_logits():
    """The limit of low temperatures: each table gives 1 to the query's code alone."""
    case = ANY["bytes"]._replace(norms=None)
    codes, logits, *_ = draw(case)
    limits = np.full(logits.shape[:2], -np.inf, np.float32)
    found = program(case, "xla")(codes, 1e4 * np.sign(logits), limits).values
    own = ((logits > 0) * 2 ** np.arange(case.bits)[::-1]).sum(axis=-1).reshape(2, 2, 2, case.tables, 1)
    np.testing.assert_array_equal(found, (codes[:, :, None] == own).sum(axis=3))


def test_derivatives_are_those_of_the_definition():
    case = Case(1, 1, 2, 3, 20, "float32", 16, 1)
    codes, logits, norms = draw(case)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(backend, logits, norms):
        def total(logits, norms):
            values = soft_collision_score(codes, norms, logits, block=16, implementation=backend).values
            return jnp.where(values > -jnp.inf, values, 0.0).sum()

        return jax.grad(total, argnums=(0, 1))(logits, norms)

    expected = gradient("reference", logits, np.abs(norms))
    for backend in ("auto", "pallas_triton"):
        for got, wanted in zip(gradient(backend, logits, np.abs(norms)), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
            assert np.abs(wanted).max() > 0.01


# --- pieces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "most"), [(8, 7), (8, 5), (10, 5), (16, 7), (1, 5), (5, 5)])
def test_pieces_cover_every_bit_once(bits, most):
    pieces = operands.pieces_of(bits, most)
    assert all(1 <= piece.width <= most for piece in pieces)
    assert pieces[0].shift + pieces[0].width == bits
    assert [piece.shift for piece in pieces[:-1]] == [piece.shift + piece.width for piece in pieces[1:]]
    assert pieces[-1].shift == 0


def test_pieces_multiply_to_the_softmax_over_corners():
    logits = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    pieces = operands.pieces_of(7, 3)
    code = np.arange(2**7)

    @jax.jit
    def entries(logits, code):
        tables = operands.piece_tables(logits, pieces)
        return [table[:, piece.of(code)] for piece, table in zip(pieces, tables, strict=True)]

    corners = 2.0 * (code[:, None] >> np.arange(7)[::-1] & 1) - 1
    expected = scipy.special.softmax(logits.astype(np.float64) @ corners.T / 2, axis=-1)
    np.testing.assert_allclose(np.prod(entries(logits, code), axis=0), expected, rtol=30 * EPS)
