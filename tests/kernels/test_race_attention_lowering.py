"""Which kernels the programs call, what they refuse, and what XLA's own path holds."""

import functools
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hashml_kernels.race_attention import pallas_mosaic_tpu, pallas_triton, serves, shapes

CHIP = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "cuda": AbstractDevice("NVIDIA H200", None, "gpu"),
    "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
}
KERNEL = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}
SMALL = shapes.Case("", 2, 4, 2, 300, 64, 3, 3)
CASES = {
    "no_order": SMALL._replace(keys=260, masked=True),
    "order": SMALL._replace(causal=True, dtype="float32"),
}
# Sums over keys first where there is no order, and always on a GPU; backward, the forward pass comes before.
COUNTS = {
    ("cuda", "forward"): {"no_order": 2, "order": 2},
    ("cuda", "backward"): {"no_order": 6, "order": 6},
    ("tpu", "forward"): {"no_order": 2, "order": 1},
    ("tpu", "backward"): {"no_order": 5, "order": 3},
}

# jax says this of any Triton kernel since 0.11, when it is lowered.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


def problem(case: shapes.Case, direction: str) -> Any:
    return shapes._problem(case, backward=direction == "backward")


def lowered(platform: str, case: shapes.Case, direction: str, implementation: Any = "auto") -> str:
    own = problem(case, direction)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP[platform])):
        traced = jax.jit(functools.partial(own.call, implementation)).trace(*own.arguments)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def kernels(text: str) -> int:
    """Kernel calls in the program that is handed to the platform's compiler."""
    return text.count("custom_call @tpu_custom_call") + text.count("custom_call @__gpu$xla.gpu.triton")


@pytest.mark.parametrize(("platform", "direction"), COUNTS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_of_each_platform(platform, direction, name):
    assert kernels(lowered(platform, CASES[name], direction)) == COUNTS[platform, direction][name]


def test_a_cpu_has_no_kernels():
    assert not kernels(lowered("cpu", CASES["order"], "backward"))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_by_name_lower_to_what_auto_picks(platform):
    case = CASES["order"]
    expected = COUNTS[platform, "forward"]["order"]
    with jax.enable_x64(True):
        assert kernels(lowered(platform, case, "forward", KERNEL[platform])) == expected
    assert kernels(lowered(platform, case, "forward", "xla")) == 0


@pytest.mark.parametrize(("platform", "changes"), [("cuda", {"width": 256}), ("tpu", {"dtype": "float16"})])
def test_auto_leaves_to_xla_what_a_kernel_refuses(platform, changes):
    assert not kernels(lowered(platform, SMALL._replace(**changes), "backward"))


def test_sums_that_would_not_fit_are_taken_in_rounds():
    """Twice as many kernels, each for half of the values."""
    case = SMALL._replace(width=128, bits=4, tables=4, causal=True)
    assert kernels(lowered("cuda", case, "forward")) == 4


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_heads_may_lie_on_several_devices(platform):
    """The kernels of one device, and nothing to exchange."""
    mesh = AbstractMesh((2,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=CHIP[platform])
    heads = jax.P(None, "heads")
    own = problem(SMALL, "forward")
    specs = (heads, heads, heads, jax.P(), jax.P())
    split = jax.shard_map(functools.partial(own.call, "auto"), mesh=mesh, in_specs=specs, out_specs=heads)
    text = jax.jit(split).trace(*own.arguments).lower(lowering_platforms=(platform,)).as_text()
    assert kernels(text) == 2
    assert "all_reduce" not in text
    assert "all_gather" not in text


REFUSED: list[tuple[Any, shapes.Case, str]] = [
    (pallas_triton, SMALL._replace(width=200), "D is 200"),
    (pallas_triton, SMALL._replace(values=129), "V is 129"),
    (pallas_triton, SMALL._replace(bits=5), r"planes has shape \(3, 5, 64\), 96 buckets"),
    (pallas_triton, SMALL._replace(width=65, bits=4, causal=True, dtype="float32"), "q has dtype float32 and shape"),
    (pallas_triton, SMALL._replace(dtype="float64"), "q has dtype float64"),
    (pallas_triton, SMALL._replace(batch=0), r"q has shape \(0, "),
    (pallas_triton, SMALL._replace(length=2**23, keys=7), f"q holds {2**32} numbers"),
    (pallas_mosaic_tpu, SMALL._replace(width=96), "D is 96"),
    (pallas_mosaic_tpu, SMALL._replace(keys=127), "N is 127"),
    (pallas_mosaic_tpu, SMALL._replace(heads=34), "q has shape"),
    (pallas_mosaic_tpu, SMALL._replace(bits=7), r"planes has shape \(3, 7, 64\), 384 buckets"),
    (pallas_mosaic_tpu, SMALL._replace(dtype="float16"), "q has dtype float16"),
]


@pytest.mark.parametrize(("backend", "case", "named"), REFUSED)
def test_refusals_name_the_limit(backend, case, named):
    with pytest.raises(NotImplementedError, match=f"{named}.*; auto uses XLA"):
        backend.check(case.operands(), case.causal)


def test_a_kernel_asked_for_by_name_refuses_aloud():
    own = problem(SMALL._replace(width=96), "forward")
    assert not serves("pallas_mosaic_tpu", *own.arguments[:4])
    assert serves("pallas_triton", *own.arguments[:4])
    with pytest.raises(NotImplementedError, match="D is 96"):
        jax.eval_shape(functools.partial(own.call, "pallas_mosaic_tpu"), *own.arguments)


@pytest.mark.parametrize("causal", [False, True])
def test_xla_keeps_no_features_of_the_sequence(causal):
    """Forward and backward: less than the features of q would take, though they are needed twice."""
    case = shapes.Case("", 1, 2, 2, 2**14, 32, 4, 4, causal, "float32")
    own = problem(case, "backward")
    memory = jax.jit(functools.partial(own.call, "xla")).lower(*own.arguments).compile().memory_analysis()
    assert memory is not None
    features = 4 * case.heads * case.length * 64
    vectors = 4 * case.heads * case.length * case.width
    # Outputs, tiles of all operands, and gradients of numerators are as large as q.
    assert memory.temp_size_in_bytes < 6 * vectors + 2**20
    assert features == 2 * vectors
