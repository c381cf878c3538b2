"""Which kernels the programs call, what they refuse, bad input by name, and what the bench's sizes say."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hashml_kernels.problem import every_problem
from hashml_kernels.sparse_decode import pallas_mosaic_tpu, pallas_triton, shapes, sparse_decode

CHIP = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "cuda": AbstractDevice("NVIDIA H200", None, "gpu"),
    "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
}
KERNEL = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}
SMALL = shapes.Case("", 2, 8, 2, 2, 256, 9, 16)

# jax says this of any Triton kernel since 0.11, when it is lowered.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


def step(case: shapes.Case, implementation: Any = "auto"):
    return lambda *arrays: sparse_decode(*arrays, page=case.page, implementation=implementation)


def lowered(platform: str, function, *arguments) -> str:
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP[platform])):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def kernels(text: str) -> int:
    """Kernel calls in the program that is handed to the platform's compiler."""
    return text.count("custom_call @tpu_custom_call") + text.count("custom_call @__gpu$xla.gpu.triton")


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("case", [SMALL, SMALL._replace(lists=8, dtype="float32", values=256)])
def test_pages_are_a_kernel_on_the_platforms_that_have_one(platform, case):
    assert kernels(lowered(platform, step(case), *case.arguments())) == int(platform != "cpu")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_rows_are_a_kernel_on_gpus_alone(platform):
    case = SMALL._replace(page=1)
    assert kernels(lowered(platform, step(case), *case.arguments())) == int(platform == "cuda")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_by_name_with_64_bit_types_on_and_xla_without(platform):
    with jax.enable_x64(True):
        assert kernels(lowered(platform, step(SMALL, KERNEL[platform]), *SMALL.arguments())) == 1
    assert kernels(lowered(platform, step(SMALL, "xla"), *SMALL.arguments())) == 0


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_batch_of_calls_is_one_call(platform):
    """XLA where all lists together do not fit the kernel."""
    for size, expected in ((3, 1), (2**11, int(platform == "cuda"))):
        batch = [jax.ShapeDtypeStruct((size, *a.shape), a.dtype) for a in SMALL.arguments()]
        assert kernels(lowered(platform, jax.vmap(step(SMALL)), *batch)) == expected


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_heads_may_lie_on_several_devices(platform):
    """One kernel a device, and nothing to exchange: each head is on its own."""
    mesh = AbstractMesh((2,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=CHIP[platform])
    heads = jax.P(None, "heads")
    split = jax.shard_map(step(SMALL), mesh=mesh, in_specs=(heads,) * 6, out_specs=heads)
    text = jax.jit(split).trace(*SMALL.arguments()).lower(lowering_platforms=(platform,)).as_text()
    assert kernels(text) == 1
    assert "all_reduce" not in text
    assert "all_gather" not in text


REFUSED: list[tuple[Any, shapes.Case, str]] = [
    (pallas_triton, SMALL._replace(dtype="float64"), "q has dtype float64"),
    (pallas_triton, SMALL._replace(values=257), "v has heads of 257"),
    (pallas_triton, SMALL._replace(entries=0), r"idx has shape \(2, 2, 0\)"),
    (pallas_triton, SMALL._replace(batch=64, slots=2**17), f"k holds {2**31} numbers"),
    (pallas_mosaic_tpu, SMALL._replace(page=1), "page is 1; .* a DMA of a single row"),
    (pallas_mosaic_tpu, SMALL._replace(page=8), "page is 8; of bfloat16 the TPU kernel fetches pages of 16 to 512"),
    (pallas_mosaic_tpu, SMALL._replace(page=48), "page is 48; .* power of 2"),
    (pallas_mosaic_tpu, SMALL._replace(page=1024, slots=1024), "page is 1024"),
    (pallas_mosaic_tpu, SMALL._replace(dtype="float16"), "k has dtype float16"),
    (pallas_mosaic_tpu, SMALL._replace(values=64), "v has heads of 64"),
    (pallas_mosaic_tpu, SMALL._replace(slots=250), "k has 250 slots"),
    (pallas_mosaic_tpu, SMALL._replace(entries=0), "0 entries of a list"),
    (pallas_mosaic_tpu, SMALL._replace(query_heads=258), "129 queries"),
    (pallas_mosaic_tpu, SMALL._replace(batch=64, entries=2048), f"idx names {64 * 2 * 2048} pages"),
]


@pytest.mark.parametrize(("backend", "case", "named"), REFUSED)
def test_refusals_name_the_limit(backend, case, named):
    with (
        jax.enable_x64(case.dtype == "float64"),
        pytest.raises(NotImplementedError, match=f"{named}.*; auto uses XLA"),
    ):
        backend.check(case.operands(), page=case.page)


def test_a_kernel_asked_for_by_name_refuses_aloud():
    case = SMALL._replace(page=1)
    with pytest.raises(NotImplementedError, match="page is 1"):
        jax.eval_shape(step(case, "pallas_mosaic_tpu"), *case.arguments())


def test_no_array_of_a_kernels_program_is_as_large_as_the_gathered_rows():
    case = SMALL._replace(slots=4096, entries=64)
    for platform, name in KERNEL.items():
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP[platform])):
            jaxpr = jax.make_jaxpr(step(case, name))(*case.arguments())
        store = case.arguments()[1].size
        sizes = {v.aval.size for equation in jaxpr.jaxpr.eqns for v in equation.outvars if v.aval.shape}
        assert max(sizes - {store}) < case.rows() * case.width / 8  # the store itself is seen in pages


# --- input ----------------------------------------------------------------------------------------

CASE = shapes.Case("", 2, 4, 2, 1, 24, 5, 1, "float32", 8, 6)


def arguments(**changes: Any) -> dict[str, Any]:
    """A step that is right, with changes."""
    names = ("q", "k", "v", "idx", "valid", "weight")
    return {name: jnp.zeros(a.shape, a.dtype) for name, a in zip(names, CASE.arguments(), strict=True)} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": jnp.zeros((2, 4, 8), int)}, TypeError, "q has dtype int.*; it must be a float type"),
        ({"idx": jnp.zeros((2, 2, 5))}, TypeError, "idx has dtype float32"),
        ({"valid": jnp.zeros((2, 2, 5), int)}, TypeError, "valid has dtype int.*; it must be bool"),
        ({"k": jnp.zeros((2, 1, 24, 7))}, ValueError, r"k has shape .*; it must be \[2, key heads, slots, 8\]"),
        ({"v": jnp.zeros((2, 1, 23, 6))}, ValueError, r"v has shape .*; it must be \[2, 1, 24\] and a width"),
        (
            {"k": jnp.zeros((2, 1, 0, 8)), "v": jnp.zeros((2, 1, 0, 6))},
            ValueError,
            "there must be at least one slot",
        ),
        ({"idx": jnp.zeros((2, 3, 5), int)}, ValueError, "idx has lists for 3 heads; .* allowed are 1"),
        ({"weight": jnp.zeros((2, 2, 4))}, ValueError, r"weight has shape \(2, 2, 4\); it must be \(2, 2, 5\)"),
        ({"length": jnp.zeros(3, int)}, ValueError, r"length is int.*\[3\]; it must be integers \[2\]"),
        ({"page": 0}, ValueError, "page is 0; it must be at least 1"),
        ({"implementation": "triton"}, ValueError, "implementation is 'triton'; it must be one of"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    """Without jaxtyping, whose own errors would come first."""
    with pytest.raises(error, match=message):
        getattr(sparse_decode, "__wrapped__", sparse_decode)(**arguments(**changes))


# --- sizes ----------------------------------------------------------------------------------------

PROBLEMS = {problem.case: problem for problem in shapes.problems()}


def test_which_cases_are_served():
    assert list(PROBLEMS) == [case.name for case in shapes.CASES]
    assert [p.case for p in every_problem("sparse_decode", "ragged_rows")] == ["ragged_rows"]
    for case in shapes.CASES:
        refused = {kernel: PROBLEMS[case.name].refusal(kernel) is not None for kernel in KERNEL.values()}
        assert refused["pallas_triton"] == (case.name == "wide_heads")
        assert refused["pallas_mosaic_tpu"] == (case.page == 1 or case.name == "odd_pages")


def test_bytes_of_a_step_of_llama():
    """``4 M D`` bytes a key head in bfloat16, as against ``4 N D`` of the dense step: a fiftieth."""
    case = next(case for case in shapes.CASES if case.name == "llama3_bf16_b1_64k_p1")
    lists, vectors = 8 * 1310 * 9, 2 * 32 * 128 * 2
    assert case.bytes() == 8 * 4 * 1310 * 128 + lists + vectors
    assert case.flops() == 4 * 32 * 1310 * 128


@pytest.mark.parametrize("name", ["ragged_rows", "ragged_pages", "odd_pages"])
def test_problems_run_as_drawn(name):
    problem = PROBLEMS[name]
    arrays = problem.draw(np.random.default_rng(0))
    assert [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in problem.arguments]
    one, other = (jax.jit(functools.partial(problem.call, name))(*arrays) for name in ("auto", "reference"))
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (one, other)), rtol=1e-2, atol=1e-4)
    assert np.abs(np.asarray(other)).max() > 0.1
