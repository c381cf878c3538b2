"""What the programs hold, which kernels they call, and what the bench's sizes say of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hashml_kernels.hashed_matmul import (
    TileGeometry,
    hashed_matmul,
    pallas_mosaic_tpu,
    pallas_triton,
    reference,
    shapes,
    xla,
)
from hashml_kernels.problem import every_problem

CHIP = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "cuda": AbstractDevice("NVIDIA H200", None, "gpu"),
    "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
}
KERNEL = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}

LINES: dict[str, Any] = {"columns": 200, "tile": (128, 128), "align": 128 * 128}
X = jax.ShapeDtypeStruct((2, 3, 300), jnp.float32)
MEMORY = jax.ShapeDtypeStruct((3 * 2**14,), jnp.float32)

# jax says this of any Triton kernel since 0.11, when it is lowered.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


def product(implementation: Any = "auto", **options: Any):
    return functools.partial(hashed_matmul, implementation=implementation, **(LINES | options))


def gradient(function):
    """Of x and memory: two kernels, and the result of the forward pass is not needed."""
    return jax.grad(lambda *operands: function(*operands).sum(), (0, 1))


def kernels(platform: str, function, *arguments) -> int:
    """Kernel calls in the program that is handed to the platform's compiler."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP[platform])):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.custom_call @tpu_custom_call") + text.count(
        "stablehlo.custom_call @__gpu$xla.gpu.triton"
    )


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize(("sign", "kind"), [("none", "tile"), ("tile", "fold"), ("element", "fold")])
def test_every_pass_is_a_kernel_on_the_platforms_that_have_one(platform, sign, kind):
    function, one = product(sign=sign, map=kind), int(platform != "cpu")
    assert kernels(platform, function, X, MEMORY) == one
    assert kernels(platform, gradient(function), X, MEMORY) == 2 * one


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_by_name_lower_to_what_auto_picks(platform):
    assert kernels(platform, product(KERNEL[platform]), X, MEMORY) == 1
    assert kernels(platform, product("xla"), X, MEMORY) == 0


def test_auto_leaves_to_xla_what_a_kernel_refuses():
    assert kernels("tpu", product(align=1), X, MEMORY) == 0
    assert kernels("cuda", product(align=1), X, MEMORY) == 1
    assert kernels("cuda", product(tile=(8, 8)), X, MEMORY) == 0
    assert kernels("cuda", product(), jax.ShapeDtypeStruct((0, 300), jnp.float32), MEMORY) == 0


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_lower_with_64_bit_types_on(platform, dtype):
    x, memory = (jax.ShapeDtypeStruct(a.shape, dtype) for a in (X, MEMORY))
    with jax.enable_x64(True):
        assert kernels(platform, product(map="fold", offset=2**15), x, memory) == 1
        assert kernels(platform, gradient(product(map="fold", offset=2**15)), x, memory) == 2


@pytest.mark.parametrize(
    "options", [{"offset": 2**32 - 2**14}, {"offset": 2**32 - 100, "align": 1, "tile": (48, 16)}]
)
def test_positions_beyond_32_bits_lower(options):
    assert kernels("cuda", gradient(product(map="fold", **options)), X, MEMORY) == 2
    assert kernels("tpu", gradient(product(map="fold", **options)), X, MEMORY) == 2 * ("align" not in options)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_lower_under_vmap_and_shard_map(platform):
    many = jax.ShapeDtypeStruct((4, *X.shape), jnp.float32), jax.ShapeDtypeStruct((4, *MEMORY.shape), jnp.float32)
    twice = jax.vmap(jax.vmap(product(), (0, None)), (0, 0))
    assert kernels(platform, twice, *many) == 1
    assert kernels(platform, gradient(twice), *many) == 2

    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=CHIP[platform])
    data, everywhere = jax.P("data"), jax.P()
    split = jax.shard_map(gradient(product()), mesh=mesh, in_specs=(data, everywhere), out_specs=(data, everywhere))
    text = jax.jit(split).trace(X, MEMORY).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("all_reduce") >= 1  # the sum of the memory's gradients
    assert text.count("custom_call @tpu_custom_call") + text.count("custom_call @__gpu$xla.gpu.triton") == 2


FLOATS = {name: jax.ShapeDtypeStruct((5, 300), name) for name in ("float32", "float64", "float16")}


@pytest.mark.parametrize(
    ("backend", "dtype", "changes", "named"),
    [
        (pallas_triton, "float32", {"tile": (8, 16)}, r"tile\[0\] is 8"),
        (pallas_triton, "float32", {"tile": (16, 24)}, r"tile\[1\] is 24"),
        (pallas_triton, "float64", {}, "x has dtype float64"),
        (pallas_mosaic_tpu, "float32", {"tile": (128, 64)}, r"tile\[1\] is 64"),
        (pallas_mosaic_tpu, "float32", {"tile": (2048, 128)}, r"tile\[0\] is 2048"),
        (pallas_mosaic_tpu, "float32", {"align": 128}, "align is 128"),
        (pallas_mosaic_tpu, "float32", {"map": "fold", "offset": 7}, "offset is 7"),
        (pallas_mosaic_tpu, "float32", {"rows": 2**16, "columns": 2**16}, r"tile is \(128, 128\)"),
        (pallas_mosaic_tpu, "float16", {}, "x has dtype float16"),
    ],
)
def test_refusals_name_the_argument(backend, dtype, changes, named):
    options = {"budget": 2**20, "rows": 300, "columns": 200, "tile": (128, 128), "align": 2**14} | changes
    with pytest.raises(NotImplementedError, match=f"{named}.*; auto uses XLA"):
        backend.check("multiply", FLOATS[dtype], MEMORY, geometry=TileGeometry(**options))


def test_a_kernel_asked_for_by_name_refuses_aloud():
    with pytest.raises(NotImplementedError, match="align is 1"):
        hashed_matmul(
            jnp.zeros((2, 300)), jnp.zeros(2**14), columns=8, tile=(128, 128), implementation="pallas_mosaic_tpu"
        )


# --- memory ---------------------------------------------------------------------------------------

SIZE, BATCH = 4096, 256
ROW_BLOCK = 4 * xla.STRIP * SIZE
"""Bytes of a strip of W, of which there are sixteen."""


def held(function, *arguments) -> int:
    """Temporary bytes of a compiled program."""
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("options", [{}, {"map": "fold", "offset": 12345}, {"sign": "none"}, {"tile": (8, 128)}])
@pytest.mark.parametrize("compression", [1, 10, 1000])
def test_no_more_than_two_strips_of_the_matrix_exist_at_a_time(options, compression):
    x = jax.ShapeDtypeStruct((BATCH, SIZE), jnp.float32)
    memory = jax.ShapeDtypeStruct((SIZE * SIZE // compression,), jnp.float32)
    function = functools.partial(hashed_matmul, columns=SIZE, scale=0.5, **options)
    allowed = 2 * ROW_BLOCK + 4 * xla.STRIP * SIZE // options.get("tile", (32, 32))[1]  # and one int32 a run
    assert held(function, x, memory) <= allowed
    # The cotangent of the result is a temporary of this program, and so is the gradient before it is scaled.
    grown = allowed + 4 * BATCH * SIZE + memory.size * 4
    assert held(gradient(function), x, memory) <= grown


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_no_array_of_a_kernels_program_is_as_large_as_the_matrix(platform):
    """In the program that XLA sees: for a compressed memory nothing there has the size of W."""
    x = jax.ShapeDtypeStruct((BATCH, SIZE), jnp.float32)
    memory = jax.ShapeDtypeStruct((2**20,), jnp.float32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP[platform])):
        jaxpr = jax.make_jaxpr(gradient(product(columns=SIZE)))(x, memory)
    sizes = [
        variable.aval.size for equation in jaxpr.jaxpr.eqns for variable in equation.outvars if variable.aval.shape
    ]
    assert max(sizes) <= 2**20 < SIZE * SIZE


# --- sizes ----------------------------------------------------------------------------------------

PROBLEMS = {(problem.case, problem.direction): problem for problem in shapes.problems()}


def test_every_case_has_both_passes_and_a_name_of_its_own():
    names = [case.name for case in shapes.CASES]
    assert len(set(names)) == len(names)
    assert set(PROBLEMS) == {(name, direction) for name in names for direction in ("forward", "backward")}
    assert [p.case for p in every_problem("hashed_matmul", "ragged")] == ["ragged", "ragged"]


@pytest.mark.parametrize("case", shapes.CASES, ids=lambda case: case.name)
def test_each_platform_serves_what_it_says(case):
    lines = case.align % (case.tile[0] * case.tile[1]) == 0 and case.tile[0] >= 128
    for direction in ("forward", "backward"):
        problem = PROBLEMS[case.name, direction]
        assert (problem.refusal("pallas_triton") is None) == (case.tile[0] >= 16)
        assert (problem.refusal("pallas_mosaic_tpu") is None) == lines


@pytest.mark.parametrize("name", ["ragged", "ragged_lines", "single_weights"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_problems_run_as_drawn(name, direction):
    problem = PROBLEMS[name, direction]
    arrays = problem.draw(np.random.default_rng(0))
    assert [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in problem.arguments]
    one, other = (jax.jit(lambda *a, name=name: problem.call(name, *a))(*arrays) for name in ("auto", "reference"))
    for got, expected in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        rounding = float(jnp.finfo(got.dtype).eps)  # the bench's own rule
        atol = 16 * float(np.finfo(np.float32).eps) * problem.terms
        np.testing.assert_allclose(
            np.asarray(got, np.float64), np.asarray(expected, np.float64), atol=atol, rtol=8 * rounding
        )


@pytest.mark.parametrize("name", ["ragged", "ragged_lines", "single_weights", "bert_768", "resnet_28"])
def test_the_bound_counts_each_weight_once(name):
    """The runs of whole tiles against the slots one by one; tiles at the edge are counted in full."""
    case = next(case for case in shapes.CASES if case.name == name)
    whole = case._replace(
        rows=case.geometry.grid[0] * case.tile[0], columns=case.geometry.grid[1] * case.tile[1]
    ).geometry
    distinct = len(np.unique(np.asarray(reference.slots(whole))))
    assert case.distinct() == distinct
    size = jnp.dtype(case.dtype).itemsize
    vectors = case.batch * (case.rows + case.columns)
    assert case.forward_bytes() == size * (vectors + distinct)
    assert case.backward_bytes() == size * (vectors + case.batch * case.rows + distinct + case.budget)
