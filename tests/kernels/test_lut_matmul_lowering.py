"""Which kernels the programs call, what these fetch, what they refuse, bad input by name, and the bench's sizes."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hashml_kernels.lut_matmul import lut_matmul, pallas_mosaic_tpu, pallas_triton, shapes
from hashml_kernels.problem import every_problem

CHIP = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "cuda": AbstractDevice("NVIDIA H200", None, "gpu"),
    "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
}
KERNEL = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}
SMALL = shapes.Case("", 8, 512, 256, 4, 2)

# jax says this of any Triton kernel since 0.11, when it is lowered.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


def step(case: shapes.Case, implementation: str = "auto", *, backward: bool = False):
    return functools.partial(shapes._backward(case) if backward else shapes._forward(case), implementation)


def lowered(platform: str, function, *arguments) -> str:
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP[platform])):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def kernels(text: str) -> int:
    """Kernel calls in the program that is handed to the platform's compiler."""
    return text.count("custom_call @tpu_custom_call") + text.count("custom_call @__gpu$xla.gpu.triton")


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize(
    "case",
    [SMALL, SMALL._replace(bits=3, batch=1), SMALL._replace(bits=8, affine=True, batch=64, dtype="float32")],
    ids=["t4", "t3", "a8"],
)
def test_a_product_is_a_kernel_and_its_gradient_another(platform, case):
    there = platform != "cpu"
    assert kernels(lowered(platform, step(case), *case.arguments())) == there
    assert kernels(lowered(platform, step(case, backward=True), *case.arguments(), case.y())) == there


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_by_name_with_64_bit_types_on_and_xla_without(platform):
    arguments = (*SMALL.arguments(), SMALL.y())
    with jax.enable_x64(True):
        assert kernels(lowered(platform, step(SMALL, KERNEL[platform]), *arguments[:-1])) == 1
        assert kernels(lowered(platform, step(SMALL, KERNEL[platform], backward=True), *arguments)) == 1
    assert kernels(lowered(platform, step(SMALL, "xla", backward=True), *arguments)) == 0


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_batch_of_calls_is_one_kernel(platform):
    """More inputs where they share the matrix, a loop over one where they do not."""

    def batched(*arrays):
        return [jax.ShapeDtypeStruct((3, *a.shape), a.dtype) for a in arrays]

    x, codes, tables = SMALL.arguments()
    assert kernels(lowered(platform, jax.vmap(step(SMALL), (0, None, None)), *batched(x), codes, tables)) == 1
    assert kernels(lowered(platform, jax.vmap(step(SMALL)), *batched(x, codes, tables))) == 1


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_rows_may_lie_on_several_devices(platform):
    """Each makes its part of the result; the gradient of the inputs is the one sum over all."""
    mesh = AbstractMesh((2,), ("rows",), axis_types=(AxisType.Auto,), abstract_device=CHIP[platform])
    own = jax.P("rows")
    specs = (jax.P(), own, own)
    part = jax.shard_map(step(SMALL), mesh=mesh, in_specs=specs, out_specs=jax.P(None, "rows"))

    def both(x, codes, tables, dy):
        y, pull = jax.vjp(lambda x, tables: part(x, codes, tables), x, tables)
        return y, pull(dy)

    text = jax.jit(both).trace(*SMALL.arguments(), SMALL.y()).lower(lowering_platforms=(platform,)).as_text()
    assert kernels(text) == 2
    assert text.count("all_reduce") == 1
    assert "all_gather" not in text


# --- bytes ----------------------------------------------------------------------------------------


def kernel_of(backend, case: shapes.Case) -> Any:
    jaxpr = jax.make_jaxpr(lambda o: backend.multiply(o, case.own))(case.operands())
    [equation] = [equation for equation in jaxpr.eqns if equation.primitive.name == "pallas_call"]
    return equation


def fetched(equation) -> int:
    """Bytes that the pipeline of a TPU moves: of each array the blocks whose number changes from step to step."""
    mapping, total = equation.params["grid_mapping"], 0
    for block in mapping.block_mappings:
        before = None
        for place in itertools.product(*map(range, mapping.grid)):
            index = tuple(int(i) for i in jaxpr_as_fun(block.index_map_jaxpr)(*place))
            if index != before:
                array = block.array_aval if hasattr(block, "array_aval") else block.array_shape_dtype
                sides = [getattr(side, "block_size", side) for side in block.block_shape]
                inside = [min(side, size - i * side) for side, size, i in zip(sides, array.shape, index, strict=True)]
                total += int(np.prod(inside)) * array.dtype.itemsize
            before = index
    return total


LLAMA = {case.name: case for case in (*shapes.DECODE, *shapes.PREFILL)}


@pytest.mark.parametrize("case", LLAMA.values(), ids=LLAMA)
def test_a_tpu_fetches_every_byte_once(case):
    """Within a tenth of codes, tables, inputs and results, as the kernel's cost estimate says too."""
    equation = kernel_of(pallas_mosaic_tpu, case)
    moved = fetched(equation)
    assert case.bytes() <= moved <= 1.1 * case.bytes()
    assert equation.params["cost_estimate"].bytes_accessed == pytest.approx(moved, rel=0.01)


@pytest.mark.parametrize("case", LLAMA.values(), ids=LLAMA)
def test_programs_of_a_gpu_read_every_byte_of_codes_once_at_decode(case):
    """Rows dealt to programs, and tiles of bytes to their steps, cover the codes without overlap."""
    operands, own = case.operands(), case.own
    plan = pallas_triton._Plan.of(operands, own)
    assert plan.parts * plan.steps - plan.tiles.number < plan.steps  # no part is empty
    rows = -(-case.rows // plan.wide)
    assert rows * plan.wide - case.rows < plan.wide
    times = -(-case.batch // plan.high)
    assert times == (1 if case in shapes.DECODE else 4)
    estimate = kernel_of(pallas_triton, case).params["cost_estimate"].bytes_accessed
    assert estimate == pallas_triton.bytes_moved(operands, own)
    once = estimate - (times - 1) * case.rows * own.row_bytes
    assert case.bytes() <= once <= 1.1 * case.bytes()


def test_bytes_of_llamas_projections():
    """4 bits a weight, and 16 entries of 2 bytes for each group of a row; 3 bits are 3 bits."""
    four, three = LLAMA["attention_t4g4_b8"], LLAMA["attention_t3_b1"]
    assert four.bytes() == 4096 * (2048 + 4 * 16 * 2) + 2 * 8 * (4096 + 4096)
    assert three.bytes() == 4096 * (1536 + 8 * 2) + 2 * (4096 + 4096)
    assert four.flops() == 8 * three.flops() == 2 * 8 * 4096 * 4096


# --- refusals and input ---------------------------------------------------------------------------

REFUSED: list[tuple[Any, str, shapes.Case, str]] = [
    (pallas_triton, "multiply", SMALL._replace(bits=8), "tables are of 8 bits"),
    (pallas_triton, "multiply", SMALL._replace(dtype="float64"), "x has dtype float64"),
    (pallas_triton, "multiply", SMALL._replace(batch=0), r"x has shape \(0, 512\)"),
    (pallas_triton, "multiply", SMALL._replace(rows=2**23), f"codes holds {2**31} numbers"),
    (pallas_triton, "gradient", SMALL._replace(groups=64), "groups of 8 columns end inside of tiles of 16 bytes"),
    (pallas_mosaic_tpu, "multiply", SMALL._replace(bits=8), "tables are of 8 bits"),
    (pallas_mosaic_tpu, "multiply", SMALL._replace(dtype="float16"), "x has dtype float16"),
    (pallas_mosaic_tpu, "multiply", SMALL._replace(grid_dtype="float64"), "tables has dtype float64"),
    (pallas_mosaic_tpu, "gradient", SMALL._replace(rows=0), r"codes has shape \(0, 256\)"),
    (pallas_mosaic_tpu, "multiply", SMALL._replace(columns=2**17), f"codes have {2**17} columns"),
    (pallas_mosaic_tpu, "multiply", SMALL._replace(groups=64), "tables have 64 groups of 8 columns"),
]


@pytest.mark.parametrize(("backend", "op", "case", "named"), REFUSED)
def test_refusals_name_the_limit(backend, op, case, named):
    with jax.enable_x64(True):
        operands = case.operands()
    with pytest.raises(NotImplementedError, match=f"{named}.*; auto uses XLA"):
        backend.check(op, operands, case.own)


def test_a_kernel_asked_for_by_name_refuses_aloud():
    case = SMALL._replace(bits=8)
    with pytest.raises(NotImplementedError, match="tables are of 8 bits"):
        jax.eval_shape(step(case, "pallas_triton"), *case.arguments())


def arguments(**changes: Any) -> dict[str, Any]:
    """Six rows of ten codes of 2 bits, in two groups, with changes."""
    right = {"x": jnp.zeros((3, 10)), "codes": jnp.zeros((6, 3), jnp.uint8), "tables": jnp.zeros((6, 2, 4))}
    return {
        name: value for name, value in (right | {"bits": 2, "columns": 10} | changes).items() if value is not None
    }


AFFINE: dict[str, Any] = {"tables": None, "scales": jnp.zeros((6, 2))}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": jnp.zeros((3, 10), int)}, TypeError, "x has dtype int.*; it must be a float type"),
        ({"codes": jnp.zeros((6, 3), int)}, TypeError, "codes has dtype int.*; it must be uint8"),
        ({"bits": 5}, ValueError, "bits is 5; allowed are 1, 2, 3, 4, 8"),
        ({"columns": 12}, ValueError, r"x has shape \(3, 10\); its last axis must be the 12 columns"),
        ({"codes": jnp.zeros((6, 4), jnp.uint8)}, ValueError, r"codes has shape \(6, 4\); .* \[rows, 3\]: 10 codes"),
        ({"tables": None}, ValueError, "tables and scales: neither is given"),
        ({"scales": jnp.zeros((6, 2))}, ValueError, "tables and scales: both are given"),
        ({"zeros": jnp.zeros((6, 2))}, ValueError, "zeros are given with tables"),
        ({"tables": jnp.zeros((6, 4))}, ValueError, r"tables has shape \(6, 4\); it must be \[6, groups, 4\]"),
        ({"tables": jnp.zeros((6, 2, 8))}, ValueError, r"tables has shape \(6, 2, 8\); it must be \[6, groups, 4\]"),
        ({"tables": jnp.zeros((6, 3, 4))}, ValueError, "tables has 3 groups; .* must divide the 10 columns"),
        (AFFINE | {"scales": jnp.zeros((5, 2))}, ValueError, r"scales has shape \(5, 2\); it must be \[6, groups\]"),
        (AFFINE | {"scales": jnp.zeros((6, 0))}, ValueError, "scales has 0 groups"),
        (AFFINE | {"zeros": jnp.zeros((6, 5))}, ValueError, r"zeros has shape \(6, 5\); it must be \(6, 2\), as sc"),
        ({"implementation": "triton"}, ValueError, "implementation is 'triton'; it must be one of"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    """Without jaxtyping, whose own errors would come first."""
    with pytest.raises(error, match=message):
        getattr(lut_matmul, "__wrapped__", lut_matmul)(**arguments(**changes))


# --- sizes ----------------------------------------------------------------------------------------

PROBLEMS = {(problem.case, problem.direction): problem for problem in shapes.problems()}


def test_which_cases_are_served():
    assert [case for case, direction in PROBLEMS if direction == "forward"] == [case.name for case in shapes.CASES]
    assert len(list(every_problem("lut_matmul", "ragged_a2"))) == 2
    refused = {(key, kernel) for key, p in PROBLEMS.items() for kernel in KERNEL.values() if p.refusal(kernel)}
    tables = {(("tables_of_bytes", "forward"), kernel) for kernel in KERNEL.values()}
    halves = {(("ragged_t4_f16", direction), "pallas_mosaic_tpu") for direction in ("forward", "backward")}
    uneven = {((case, "backward"), "pallas_triton") for case in ("ragged_t3", "ragged_t4_f16", "ragged_a2")}
    assert refused == tables | halves | uneven


@pytest.mark.parametrize(("case", "direction"), [("ragged_t3", "backward"), ("ragged_a2", "forward")])
def test_problems_run_as_drawn(case, direction):
    problem = PROBLEMS[case, direction]
    arrays = problem.draw(np.random.default_rng(0))
    assert [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in problem.arguments]
    found = [jax.jit(functools.partial(problem.call, name))(*arrays) for name in ("auto", "reference")]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (one, other)), rtol=1e-2, atol=1e-4)
        assert np.abs(np.asarray(other, np.float32)).max() > 0.5


def test_tables_of_bytes_are_looked_up_and_pulled_by_xla():
    """256 entries, which no kernel takes."""
    case = shapes.Case("", 4, 24, 5, 8, 2, dtype="float32")
    *arrays, dy = shapes.draw(case, (*case.arguments(), case.y()), np.random.default_rng(1))
    found = [jax.jit(step(case, name, backward=True))(*arrays, dy) for name in ("auto", "reference")]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
