"""Which kernels the programs call, what they refuse, and what XLA's own path holds."""

import functools
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hashml_kernels.cache_decode import (
    CoupledFormat,
    DenseFormat,
    IntegerFormat,
    KiviFormat,
    pallas_mosaic_tpu,
    pallas_triton,
    shapes,
    xla,
)

CHIP = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "cuda": AbstractDevice("NVIDIA H200", None, "gpu"),
    "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
}
KERNEL = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}

INT4, KIVI2, CQ8 = IntegerFormat(4, 32), KiviFormat(2, 32), CoupledFormat(8)
SMALL = shapes.Case("", 2, 4, 2, 160, INT4, INT4, width=128)
STEPS = {
    "integers": SMALL,
    "kivi": SMALL._replace(keys=KIVI2),
    "coupled": SMALL._replace(keys=CQ8, values=CQ8, pairs="half", own_positions=True),
    "neighbours": SMALL._replace(keys=CoupledFormat(4), pairs="interleaved"),
    "dense": SMALL._replace(keys=DenseFormat(), values=DenseFormat(), pairs="half"),
}

# jax says this of any Triton kernel since 0.11, when it is lowered.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


def step(case: shapes.Case, implementation: str = "auto"):
    return functools.partial(shapes._call, case, implementation)


def lowered(platform: str, function, *arguments) -> str:
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP[platform])):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def kernels(text: str) -> int:
    """Kernel calls in the program that is handed to the platform's compiler."""
    return text.count("custom_call @tpu_custom_call") + text.count("custom_call @__gpu$xla.gpu.triton")


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("name", STEPS)
def test_every_format_is_a_kernel_on_the_platforms_that_have_one(platform, name):
    text = lowered(platform, step(STEPS[name]), *STEPS[name].arguments())
    assert kernels(text) == int(platform != "cpu")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_by_name_lower_to_what_auto_picks(platform):
    case = STEPS["integers"]
    assert kernels(lowered(platform, step(case, KERNEL[platform]), *case.arguments())) == 1
    assert kernels(lowered(platform, step(case, "xla"), *case.arguments())) == 0


@pytest.mark.parametrize(
    ("platform", "changes"),
    [
        ("cuda", {"keys": IntegerFormat(3, 32)}),
        ("cuda", {"slots": 0}),
        ("tpu", {"slots": 100}),
        ("tpu", {"width": 32}),
    ],
)
def test_auto_leaves_to_xla_what_a_kernel_refuses(platform, changes):
    case = SMALL._replace(**changes)
    assert kernels(lowered(platform, step(case), *case.arguments())) == 0


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_lower_with_64_bit_types_on(platform):
    with jax.enable_x64(True):
        for name in ("kivi", "coupled"):
            assert kernels(lowered(platform, step(STEPS[name]), *STEPS[name].arguments())) == 1


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_heads_may_lie_on_several_devices(platform):
    """One kernel a device, and nothing to exchange: each head is on its own."""
    case = STEPS["coupled"]
    mesh = AbstractMesh((2,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=CHIP[platform])
    heads, own = jax.P(None, "heads"), jax.P("heads")
    specs = (heads, heads, own, heads, own, heads, jax.P(), jax.P())
    half = case._replace(query_heads=2, heads=1)
    split = jax.shard_map(step(half), mesh=mesh, in_specs=specs, out_specs=(heads, heads))
    text = jax.jit(split).trace(*case.arguments()).lower(lowering_platforms=(platform,)).as_text()
    assert kernels(text) == 1
    assert "all_reduce" not in text
    assert "all_gather" not in text


BIG = SMALL._replace(batch=32, query_heads=32, heads=32, slots=2**15)
REFUSED: list[tuple[Any, shapes.Case, str]] = [
    (pallas_triton, SMALL._replace(width=96), "width is 96"),
    (pallas_triton, SMALL._replace(keys=IntegerFormat(6, 32)), r"key_format is IntegerFormat\(bits=6"),
    (pallas_triton, SMALL._replace(values=IntegerFormat(4, 4)), r"value_format is IntegerFormat\(bits=4, group=4"),
    (pallas_triton, SMALL._replace(values=CoupledFormat(8, 10)), "value_format is CoupledFormat"),
    (pallas_triton, SMALL._replace(slots=0), r"codes has shape \(2, 2, 0, 64\)"),
    (pallas_triton, SMALL._replace(keys=DenseFormat(), dense="float64"), "values has dtype float64"),
    (pallas_triton, SMALL._replace(keys=KIVI2, pairs="half"), "rotation is given with KIVI keys"),
    (pallas_triton, BIG, f"codes holds {2**31} numbers"),
    (pallas_mosaic_tpu, SMALL._replace(width=32), "width is 32"),
    (pallas_mosaic_tpu, SMALL._replace(query_heads=18), "9 query heads"),
    (pallas_mosaic_tpu, SMALL._replace(slots=127), "127 slots"),
    (pallas_mosaic_tpu, SMALL._replace(batch=0), "0 rows"),
    (pallas_mosaic_tpu, SMALL._replace(keys=IntegerFormat(1, 32)), r"key_format is IntegerFormat\(bits=1"),
    (pallas_mosaic_tpu, SMALL._replace(values=CoupledFormat(16), width=64), r"value_format is CoupledFormat\(chan"),
    (pallas_mosaic_tpu, SMALL._replace(keys=KIVI2, width=64), r"key_format is KiviFormat\(bits=2"),
    (
        pallas_mosaic_tpu,
        SMALL._replace(keys=KiviFormat(2, 64), values=KiviFormat(2, 8), slots=1024),
        r"value_format is KiviFormat\(bits=2, group=8\), whose scales of 1024 slots are 128",
    ),
    (pallas_mosaic_tpu, SMALL._replace(keys=KIVI2, pairs="half"), "rotation is given with KIVI keys"),
    (pallas_mosaic_tpu, SMALL._replace(keys=CQ8, pairs="half", width=64), "half of 8 codes"),
    (pallas_mosaic_tpu, SMALL._replace(keys=DenseFormat(), pairs="interleaved"), "pairs are interleaved"),
    (pallas_mosaic_tpu, SMALL._replace(values=DenseFormat(), dense="float16"), "values has dtype float16"),
    (pallas_mosaic_tpu, SMALL._replace(query_heads=1024, heads=1024), "1024 key heads"),
]


@pytest.mark.parametrize(("backend", "case", "named"), REFUSED)
def test_refusals_name_the_limit(backend, case, named):
    with pytest.raises(NotImplementedError, match=f"{named}.*; auto uses XLA"):
        backend.check(case.operands(), case.geometry)


def test_a_kernel_asked_for_by_name_refuses_aloud():
    case = SMALL._replace(slots=20)
    with pytest.raises(NotImplementedError, match="20 slots"):
        jax.eval_shape(step(case, "pallas_mosaic_tpu"), *case.arguments())


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kivi", "coupled"])
@pytest.mark.parametrize("slots", [4096, 32768])
def test_xla_decodes_a_block_at_a_time(name, slots):
    """The decoded cache would be far larger; a block is held some times over: codes, keys, rotated keys, values."""
    case = STEPS[name]._replace(batch=4, query_heads=32, heads=32, slots=slots)
    block = 4 * xla.block_slots(case.operands(), case.geometry) * case.batch * case.heads * case.width
    assert block <= 4 * max(xla.BLOCK_FLOATS, xla.LEAST_SLOTS * case.batch * case.heads * case.width)
    memory = jax.jit(step(case, "xla")).lower(*case.arguments()).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 6 * block
    assert 6 * block < 4 * case.batch * case.heads * slots * case.width / 2


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["kivi", "coupled"])
def test_no_array_of_a_kernels_program_is_as_large_as_the_decoded_cache(platform, name):
    case = STEPS[name]._replace(slots=4096)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP[platform])):
        jaxpr = jax.make_jaxpr(step(case, KERNEL[platform]))(*case.arguments())
    sizes = [v.aval.size for equation in jaxpr.jaxpr.eqns for v in equation.outvars if v.aval.shape]
    codes = case.arguments()[1].size
    assert max(sizes) <= codes < case.batch * case.heads * case.slots * case.width
