"""Bad input by name, and what the bench's sizes say."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml_kernels.cache_decode import (
    CoupledFormat,
    Dense,
    DenseFormat,
    IntegerFormat,
    KiviFormat,
    Quantised,
    cache_decode,
    shapes,
)
from hashml_kernels.problem import every_problem

INT4 = IntegerFormat(4, 8)
CASE = shapes.Case("", 2, 4, 2, 24, INT4, DenseFormat(), width=16, dense="float32")


def arguments(**changes: Any) -> dict[str, Any]:
    """A step that is right, with changes."""
    q, codes, scale, minimum, values, pos, query_pos = (jnp.zeros(a.shape, a.dtype) for a in CASE.arguments())
    right = {
        "q": q, "keys": Quantised(codes, scale, minimum), "values": Dense(values), "pos": pos, "query_pos": query_pos,
        "key_format": INT4, "value_format": DenseFormat(),
    }  # fmt: skip
    return right | changes


def quantised(**changes: Any) -> Quantised:
    return arguments()["keys"]._replace(**changes)


WINDOW = {"window_keys": jnp.zeros((2, 2, 3, 16)), "window_values": jnp.zeros((2, 2, 3, 16))}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": jnp.zeros((2, 3, 16))}, ValueError, "q has 3 heads; they must be a multiple of the key heads, 2"),
        ({"pos": jnp.zeros((2, 3, 24), int)}, ValueError, r"pos has shape \(2, 3, 24\); .*\[2, 1 or 2, slots\]"),
        ({"query_pos": jnp.zeros(3, int)}, ValueError, r"query_pos has shape \(3,\)"),
        ({"pos": jnp.zeros((2, 1, 20), int)}, ValueError, r"keys.codes has shape \(2, 2, 24, 8\)"),
        ({"keys": Dense(jnp.zeros((2, 2, 24, 16)))}, TypeError, "keys is a Dense; IntegerFormat.* needs Quantised"),
        ({"keys": Dense(jnp.zeros((2, 24, 16)))}, ValueError, "keys.values has shape .*; it must have four axes"),
        ({"keys": quantised(codes=jnp.zeros((2, 2, 24, 8), jnp.int8))}, TypeError, "keys.codes has dtype int8"),
        ({"keys": quantised(scale=jnp.zeros((2, 2, 24, 1)))}, ValueError, r"keys.scale has shape .*\(2, 2, 24, 2\)"),
        ({"keys": quantised(scale=jnp.zeros((2, 2, 24, 2), int))}, TypeError, "keys.scale has dtype int32"),
        ({"key_format": IntegerFormat(4, 3)}, ValueError, "group is 3; it must divide the head's width, 16"),
        ({"key_format": KiviFormat(4, 7)}, ValueError, "group is 7; it must divide the number of slots, 24"),
        ({"sliding_window": 0}, ValueError, "sliding_window is 0"),
        ({"rotation": (np.ones(4, np.float32), "half")}, ValueError, r"frequencies of shape \(4,\); heads of 16"),
        (WINDOW, ValueError, "window_pos is None; a window needs keys, values and positions"),
        (WINDOW | {"window_pos": jnp.zeros((2, 4), int)}, ValueError, r"window_keys has shape \(2, 2, 3, 16\)"),
        (WINDOW | {"window_pos": jnp.zeros((1, 3), int)}, ValueError, r"window_pos has shape \(1, 3\)"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        unchecked(**arguments(**changes))


def unchecked(**given: Any):
    """The function without jaxtyping, whose own errors would come first."""
    return getattr(cache_decode, "__wrapped__", cache_decode)(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"implementation": "triton"}, "implementation is 'triton'; it must be one of"),
        ({"rotation": (np.ones(8, np.float32), "quarter")}, "rotation has pairs 'quarter'"),
    ],
)
def test_unknown_names_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        unchecked(**arguments(**changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntegerFormat(9, 32), "bits is 9; allowed are 1 to 8"),
        (lambda: KiviFormat(2, 0), "group is 0"),
        (lambda: CoupledFormat(0), "channels is 0"),
        (lambda: CoupledFormat(8, 17), "bits is 17; allowed are 1 to 16"),
    ],
)
def test_formats_check_their_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- sizes ----------------------------------------------------------------------------------------

PROBLEMS = {problem.case: problem for problem in shapes.problems()}


def test_every_case_has_a_name_of_its_own_and_no_backward_pass():
    assert list(PROBLEMS) == [case.name for case in shapes.CASES]
    assert {problem.direction for problem in PROBLEMS.values()} == {"forward"}
    assert [p.case for p in every_problem("cache_decode", "ragged_cq")] == ["ragged_cq"]


@pytest.mark.parametrize("case", shapes.CASES, ids=lambda case: case.name)
def test_kernels_serve_all_but_odd_widths(case):
    refusals = [PROBLEMS[case.name].refusal(kernel) for kernel in ("pallas_triton", "pallas_mosaic_tpu")]
    assert [refusal is None for refusal in refusals] == [case.name != "odd_width", case.width in (64, 128)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama7b_bf16_b8_4k", 512),
        ("llama7b_int8_b8_4k", 264),
        ("llama7b_int4_b8_4k", 136),
        ("llama7b_kivi4_b8_4k", 160),
        ("llama7b_kivi2_b8_4k", 96),
        ("llama7b_cq4c8b_b8_4k", 64),
        ("llama7b_cq8c8b_b8_4k", 32),
    ],
)
def test_bytes_of_a_token_and_head(name, expected):
    """``2 D (bits + 32 / group) / 8``, and ``2 D / channels``."""
    case = next(case for case in shapes.CASES if case.name == name)
    assert case.token_bytes() == expected
    slots = case.batch * case.slots
    books = 2 * 2 * 32 * 128 * 256 if "cq" in name else 0
    turning = 4 * 64 if "cq" in name else 0
    vectors = 4 * case.batch * (32 * 128 * 2 + 32 + 1)  # queries, results, log-sum-exps and the queries' positions
    assert case.bytes() == slots * 32 * expected + 4 * slots + books + turning + vectors
    assert case.flops() == 2 * 2 * slots * 32 * 128


@pytest.mark.parametrize("name", ["ragged_int4", "ragged_kivi2", "ragged_cq", "odd_width"])
def test_problems_run_as_drawn(name):
    problem = PROBLEMS[name]
    arrays = problem.draw(np.random.default_rng(0))
    assert [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in problem.arguments]
    one, other = (jax.jit(functools.partial(problem.call, name))(*arrays) for name in ("auto", "reference"))
    for got, expected in zip(one, other, strict=True):
        np.testing.assert_allclose(got, expected, atol=16 * float(np.finfo(np.float32).eps) * problem.terms)
        assert np.abs(np.asarray(expected)).max() > 0.1
