"""Bad input by name, and what the bench's sizes say."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml_kernels.problem import every_problem
from hashml_kernels.soft_collision_score import shapes, soft_collision_score


def unchecked(**given: Any):
    """The function without jaxtyping, whose own errors would come first."""
    right: dict[str, Any] = {
        "codes": np.zeros((2, 2, 3, 24), np.uint8),
        "norms": np.ones((2, 2, 24), np.float16),
        "logits": np.zeros((2, 4, 3, 8), np.float32),
    }
    return getattr(soft_collision_score, "__wrapped__", soft_collision_score)(**right | given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"codes": np.zeros((2, 2, 3, 24), np.int8)}, TypeError, r"codes has dtype int8; .*\('uint8', 'uint16'\)"),
        ({"norms": np.ones((2, 2, 24), int)}, TypeError, "norms has dtype int"),
        ({"logits": np.zeros((2, 4, 3, 8), int)}, TypeError, "logits has dtype int"),
        ({"codes": np.zeros((2, 3, 24), np.uint8)}, ValueError, r"codes has shape \(2, 3, 24\); .*\[B, K, L, N\]"),
        ({"codes": np.zeros((2, 2, 0, 24), np.uint8)}, ValueError, "with heads and tables"),
        (
            {"logits": np.zeros((2, 4, 5, 8))},
            ValueError,
            r"logits has shape .*; it must be \[2, H, 3, P\]",
        ),
        ({"logits": np.zeros((2, 3, 3, 8))}, ValueError, "logits has 3 heads; .* multiple of the 2 key heads"),
        ({"logits": np.zeros((2, 4, 3, 9))}, ValueError, "logits has 9 bits a table; codes of uint8 hold at most 8"),
        ({"norms": np.ones((2, 2, 23))}, ValueError, r"norms has shape .*\(2, 2, 24\)"),
        ({"threshold": np.zeros((2, 2))}, ValueError, r"threshold has shape .*\(2, 4\)"),
        ({"block": 0}, ValueError, "block is 0; it must be at least 1"),
        ({"implementation": "triton"}, ValueError, "implementation is 'triton'; it must be one of"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        unchecked(**changes)


# --- sizes ----------------------------------------------------------------------------------------

PROBLEMS = {problem.case: problem for problem in shapes.problems()}


def test_every_case_has_a_name_of_its_own_and_no_backward_pass():
    assert list(PROBLEMS) == [case.name for case in shapes.CASES]
    assert {problem.direction for problem in PROBLEMS.values()} == {"forward"}
    assert [p.case for p in every_problem("soft_collision_score", "ragged")] == ["ragged"]


@pytest.mark.parametrize("case", shapes.CASES, ids=lambda case: case.name)
def test_kernels_serve_all_but_the_odd(case):
    refused = [PROBLEMS[case.name].refusal(kernel) is not None for kernel in ("pallas_triton", "pallas_mosaic_tpu")]
    assert refused == [False, case.name in ("many_queries", "few_slots")]


@pytest.mark.parametrize(("name", "expected"), [("llama3_b8_128k", 60 + 2), ("llama3_p10_b1_64k", 120 + 2)])
def test_bytes_of_a_token_and_head(name, expected):
    """A code a table and a length; and, for each query head, a score and two numbers a block."""
    case = next(case for case in shapes.CASES if case.name == name)
    tokens = case.batch * 8 * case.slots
    logits = 4 * case.batch * 32 * 60 * case.bits
    results = 4 * case.batch * 32 * (case.slots + 2 * case.slots // 256)
    assert case.bytes() == expected * tokens + logits + results


@pytest.mark.parametrize("name", ["ragged", "ragged_p16", "many_queries", "few_slots"])
def test_problems_run_as_drawn(name):
    problem = PROBLEMS[name]
    arrays = problem.draw(np.random.default_rng(0))
    assert [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in problem.arguments]
    one, other = (jax.jit(functools.partial(problem.call, name))(*arrays) for name in ("auto", "reference"))
    for got, expected in zip(one, other, strict=True):
        eps = float(jnp.finfo(jnp.float32).eps)
        np.testing.assert_allclose(got, expected, rtol=eps * (problem.terms + 4 * 16))
        assert np.abs(np.asarray(expected)).max() > 0
