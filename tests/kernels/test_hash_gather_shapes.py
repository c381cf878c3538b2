"""The sizes of the bench are drawn as declared, and their bounds count what a simulation counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml_kernels.hash_gather import reference, shapes
from hashml_kernels.problem import every_problem

PROBLEMS = {(problem.case, problem.direction): problem for problem in shapes.problems()}
SMALL = ("ragged", "bag_16k")


def test_every_case_has_both_passes_and_a_name_of_its_own():
    names = [case.name for case in shapes.CASES]
    assert len(set(names)) == len(names)
    assert set(PROBLEMS) == {(name, direction) for name in names for direction in ("forward", "backward")}
    assert [p.case for p in every_problem("hash_gather", "mlperf")] == ["mlperf", "mlperf"]


@pytest.mark.parametrize(("op", "case", "named"), [("sort", None, "op is 'sort'"), (None, "huge", "case is 'huge'")])
def test_unknown_names_are_refused(op, case, named):
    with pytest.raises(ValueError, match=named):
        list(every_problem(op, case))


@pytest.mark.parametrize("case", shapes.CASES, ids=lambda case: case.name)
def test_each_platform_serves_what_it_says(case):
    forward, backward = PROBLEMS[case.name, "forward"], PROBLEMS[case.name, "backward"]
    assert forward.refusal("pallas_triton") is None
    assert backward.refusal("pallas_triton") is None
    lines = case.align % 128 == 0
    assert (forward.refusal("pallas_mosaic_tpu") is None) == lines
    assert (backward.refusal("pallas_mosaic_tpu") is None) == (lines and case.budget <= 2**23)


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_problems_run_as_drawn(case, direction):
    problem = PROBLEMS[case, direction]
    arrays = problem.draw(np.random.default_rng(0))
    assert [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in problem.arguments]
    one, other = (jax.jit(lambda *a, name=name: problem.call(name, *a))(*arrays) for name in ("auto", "reference"))
    for got, expected in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        tolerance = 0 if problem.terms == 1 else 32 * problem.terms * float(jnp.finfo(got.dtype).eps)
        np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), atol=tolerance)


@pytest.mark.parametrize("name", ["dlrm_kaggle", "table_z1", "table_z32", "bag_16k"])
def test_the_bound_counts_each_weight_once(name):
    """Expected distinct slots against those of drawn ids; their count varies by less than its square root."""
    case = next(case for case in shapes.CASES if case.name == name)
    ids = np.random.default_rng(0).integers(0, case.table_rows, case.lookups).astype(np.uint32)
    distinct = np.unique(np.asarray(reference.slots(ids, case.geometry))).size
    rows = case.batch * case.features * 4
    predicted = (case.forward_bytes() - 4 * case.lookups - rows) / 4
    # Whole blocks come and go together.
    assert abs(distinct - predicted) <= 5 * np.sqrt(case.block_size * min(predicted, case.budget)) + 1
    weights = 4 * case.lookups if case.weighted else 0
    assert case.backward_bytes() == 4 * case.lookups + weights + rows + 4 * case.budget


@pytest.mark.parametrize("name", ["table_z1", "table_z8", "table_z32", "table_lines", "ragged"])
def test_sectors_are_those_of_drawn_blocks(name):
    case = next(case for case in shapes.CASES if case.name == name)
    ids = np.random.default_rng(1).integers(0, case.table_rows, 500).astype(np.uint32)
    size = jnp.dtype(case.dtype).itemsize
    first = np.asarray(reference.slots(ids, case.geometry)).astype(np.int64)[:, :: case.block_size] * size
    touched = (first + case.block_size * size - 1) // 32 - first // 32 + 1
    mean, error = touched.mean(), touched.std() / np.sqrt(touched.size)
    assert abs(32 * mean * case.geometry.blocks * case.lookups - case.sector_bytes()) <= (
        5 * error * 32 * case.geometry.blocks * case.lookups + 1e-6
    )


@pytest.mark.parametrize(("z", "sectors"), [(1, 1.0), (8, 1.875), (32, 4.875)])
def test_sectors_of_a_block_as_the_formula_has_them(z, sectors):
    """(4 Z + 28) / 32 sectors a block of float32."""
    case = shapes.Case("one", 10, z, z, budget=1000, batch=1)
    assert case.sector_bytes() == 32 * sectors


def test_aligned_blocks_waste_nothing():
    case = shapes.Case("one", 10, 128, 128, budget=1280, batch=7, align=128)
    assert case.sector_bytes() == 7 * 128 * 4
