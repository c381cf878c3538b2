"""Which kernels the programs call, what they refuse, and how large what they hold is."""

import functools
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hashml_kernels.huffman_decode import pallas_mosaic_tpu, pallas_triton, shapes

CHIP = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "cuda": AbstractDevice("NVIDIA H200", None, "gpu"),
    "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
}
KERNEL = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}

SMALL = shapes.Case("", 200_001)
STEPS = {
    "bfloat16": SMALL,
    "symbols": SMALL._replace(form=None, max_length=14),
    "pairs": SMALL._replace(total=400_001, form=shapes.E4M3_PAIRS, lengths=shapes.LONGER),
    "e5m2": SMALL._replace(form=shapes.E5M2),
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
    # The scan over steps is XLA's way alone.
    assert ("stablehlo.while" in text) == (platform == "cpu")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_by_name_lower_to_what_auto_picks(platform):
    assert kernels(lowered(platform, step(SMALL, KERNEL[platform]), *SMALL.arguments())) == 1
    assert kernels(lowered(platform, step(SMALL, "xla"), *SMALL.arguments())) == 0


def test_auto_leaves_few_lanes_to_xla_on_a_tpu():
    case = SMALL._replace(total=100_000)
    assert case.geometry.lanes < 256
    assert [kernels(lowered(platform, step(case), *case.arguments())) for platform in ("cuda", "tpu")] == [1, 0]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_lower_with_64_bit_types_on(platform):
    with jax.enable_x64(True):
        assert kernels(lowered(platform, step(SMALL), *SMALL.arguments())) == 1


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_matrices_may_lie_on_several_devices(platform):
    """Each decodes its own, and nothing is exchanged."""
    mesh = AbstractMesh((2,), ("matrix",), axis_types=(AxisType.Auto,), abstract_device=CHIP[platform])
    own = jax.P("matrix")

    def decode(*arrays):
        return step(SMALL)(*(array[0] for array in arrays))[None]

    split = jax.shard_map(decode, mesh=mesh, in_specs=own, out_specs=own)
    stacked = [jax.ShapeDtypeStruct((2, *array.shape), array.dtype) for array in SMALL.arguments()]
    text = jax.jit(split).trace(*stacked).lower(lowering_platforms=(platform,)).as_text()
    assert kernels(text) == 1
    assert "all_reduce" not in text
    assert "all_gather" not in text


REFUSED: list[tuple[Any, shapes.Case, str]] = [
    (pallas_triton, SMALL._replace(total=2**31 - 5), "the result takes"),
    (pallas_mosaic_tpu, SMALL._replace(total=100_000), "starts has 195 lanes"),
    (pallas_mosaic_tpu, SMALL._replace(total=2**24, chunk=2**14, max_length=14), "chunks of 16384 symbols need"),
]


@pytest.mark.parametrize(("backend", "case", "named"), REFUSED)
def test_refusals_name_the_limit(backend, case, named):
    with pytest.raises(NotImplementedError, match=f"{named}.*; auto uses XLA"):
        backend.check(case.operands(), case.geometry)


def test_a_kernel_asked_for_by_name_refuses_aloud():
    case = SMALL._replace(total=100_000)
    with pytest.raises(NotImplementedError, match="195 lanes"):
        jax.eval_shape(step(case, "pallas_mosaic_tpu"), *case.arguments())


def test_the_triton_program_holds_nothing_but_the_result():
    """No symbols beside the floats: nothing of the size of the matrix but rests and result."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP["cuda"])):
        jaxpr = jax.make_jaxpr(step(SMALL, "pallas_triton"))(*SMALL.arguments())
    made = [v.aval for equation in jaxpr.jaxpr.eqns for v in equation.outvars]
    large = [aval for aval in made if getattr(aval, "size", 0) > SMALL.total // 50]
    assert [aval.shape for aval in large] == [(SMALL.total,)] * len(large)
    assert {aval.dtype.name for aval in large} == {"uint16"}
