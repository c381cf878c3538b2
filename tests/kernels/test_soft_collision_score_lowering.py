"""Which kernels the programs call, what they refuse, and what XLA's own path holds."""

import functools
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hashml_kernels.soft_collision_score import pallas_mosaic_tpu, pallas_triton, shapes

CHIP = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "cuda": AbstractDevice("NVIDIA H200", None, "gpu"),
    "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
}
KERNEL = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}

SMALL = shapes.Case("", 2, 4, 2, 600, 12)
STEPS = {
    "bytes": SMALL,
    "words": SMALL._replace(bits=12, norms="float32"),
    "heads": SMALL._replace(query_heads=16, heads=8, norms=None),
}

# jax says this of any Triton kernel since 0.11, when it is lowered.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


def step(case: shapes.Case, implementation: str = "auto"):
    return functools.partial(shapes.call, case, implementation)


def lowered(platform: str, function, *arguments) -> str:
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP[platform])):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def kernels(text: str) -> int:
    """Kernel calls in the program that is handed to the platform's compiler."""
    return text.count("custom_call @tpu_custom_call") + text.count("custom_call @__gpu$xla.gpu.triton")


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("name", STEPS)
def test_every_case_is_a_kernel_on_the_platforms_that_have_one(platform, name):
    text = lowered(platform, step(STEPS[name]), *STEPS[name].arguments())
    assert kernels(text) == int(platform != "cpu")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_by_name_lower_to_what_auto_picks(platform):
    assert kernels(lowered(platform, step(SMALL, KERNEL[platform]), *SMALL.arguments())) == 1
    assert kernels(lowered(platform, step(SMALL, "xla"), *SMALL.arguments())) == 0


@pytest.mark.parametrize(("platform", "changes"), [("cuda", {"block": 100}), ("tpu", {"slots": 100})])
def test_auto_leaves_to_xla_what_a_kernel_refuses(platform, changes):
    case = SMALL._replace(**changes)
    assert kernels(lowered(platform, step(case), *case.arguments())) == 0


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["bytes", "heads"])
def test_kernels_lower_with_64_bit_types_on(platform, name):
    with jax.enable_x64(True):
        assert kernels(lowered(platform, step(STEPS[name]), *STEPS[name].arguments())) == 1


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_heads_may_lie_on_several_devices(platform):
    """One kernel a device, and nothing to exchange: each head is on its own."""
    mesh = AbstractMesh((2,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=CHIP[platform])
    heads = jax.P(None, "heads")
    half = step(SMALL._replace(query_heads=2, heads=1))
    split = jax.shard_map(half, mesh=mesh, in_specs=heads, out_specs=heads)
    text = jax.jit(split).trace(*SMALL.arguments()).lower(lowering_platforms=(platform,)).as_text()
    assert kernels(text) == 1
    assert "all_reduce" not in text
    assert "all_gather" not in text


BIG = SMALL._replace(batch=8, heads=8, query_heads=8, tables=64, slots=2**19)
REFUSED: list[tuple[Any, shapes.Case, str]] = [
    (pallas_triton, SMALL._replace(block=48), "block is 48"),
    (pallas_triton, SMALL._replace(block=1024), "block is 1024"),
    (pallas_triton, SMALL._replace(norms="float64"), "norms has dtype float64"),
    (pallas_triton, SMALL._replace(slots=0), r"codes has shape \(2, 2, 12, 0\)"),
    (pallas_triton, BIG, f"codes holds {2**31} numbers"),
    (pallas_mosaic_tpu, SMALL._replace(block=64), "block is 64"),
    (pallas_mosaic_tpu, SMALL._replace(query_heads=18), "9 query heads"),
    (pallas_mosaic_tpu, SMALL._replace(slots=255), "255 slots"),
    (pallas_mosaic_tpu, SMALL._replace(batch=0), "0 rows"),
    (pallas_mosaic_tpu, SMALL._replace(norms="float64"), "norms has dtype float64"),
    (pallas_mosaic_tpu, SMALL._replace(heads=2048, query_heads=2048, tables=64), "bytes of vector memory"),
]


@pytest.mark.parametrize(("backend", "case", "named"), REFUSED)
def test_refusals_name_the_limit(backend, case, named):
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=f"{named}.*; auto uses XLA"):
        backend.check(case.operands(), case.block)


def test_a_kernel_asked_for_by_name_refuses_aloud():
    case = SMALL._replace(slots=20)
    with pytest.raises(NotImplementedError, match="20 slots"):
        jax.eval_shape(step(case, "pallas_mosaic_tpu"), *case.arguments())


# --- memory ---------------------------------------------------------------------------------------


def test_xla_holds_no_float_for_every_table_and_slot():
    case = SMALL._replace(slots=2**14, tables=32)
    memory = jax.jit(step(case, "xla")).lower(*case.arguments()).compile().memory_analysis()
    assert memory is not None
    every = 4 * case.batch * case.query_heads * case.tables * case.slots
    assert memory.temp_size_in_bytes < every / 4


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_no_array_of_a_kernels_program_is_larger_than_the_codes(platform):
    case = SMALL._replace(slots=2**14)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP[platform])):
        jaxpr = jax.make_jaxpr(step(case, KERNEL[platform]))(*case.arguments())
    sizes = [v.aval.size for equation in jaxpr.jaxpr.eqns for v in equation.outvars if v.aval.shape]
    assert max(sizes) <= case.arguments()[0].size
