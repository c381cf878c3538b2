"""Which kernels the programs call, what they refuse, bad input by name, and what the bench's sizes say."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hashml_kernels.gathered_mlp import gathered_mlp, pallas_mosaic_tpu, pallas_triton, shapes
from hashml_kernels.problem import every_problem

CHIP = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "cuda": AbstractDevice("NVIDIA H200", None, "gpu"),
    "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
}
KERNEL = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}
CALLS = {"cpu": 0, "cuda": 2, "tpu": 1}
SMALL = shapes.Case("", 4, 256, 128, 3, 16, activation="silu", gated=True, biased=True)

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
@pytest.mark.parametrize("case", [SMALL, SMALL._replace(own=True, dtype="float32", activation="gelu", gated=False)])
def test_blocks_are_kernels_on_the_platforms_that_have_some(platform, case):
    assert kernels(lowered(platform, step(case), *case.arguments())) == CALLS[platform]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_single_neurons_are_a_kernel_on_gpus_alone(platform):
    case = SMALL._replace(block=1)
    assert kernels(lowered(platform, step(case), *case.arguments())) == (2 if platform == "cuda" else 0)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_by_name_with_64_bit_types_on_and_xla_without(platform):
    with jax.enable_x64(True):
        assert kernels(lowered(platform, step(SMALL, KERNEL[platform]), *SMALL.arguments())) == CALLS[platform]
    assert kernels(lowered(platform, step(SMALL, "xla"), *SMALL.arguments())) == 0


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_batch_of_calls_is_one_call_where_weights_are_shared(platform):
    """And a loop over one where they are not; XLA where all lists together do not fit the kernel."""
    x, w_in, w_out, idx, valid, *others = SMALL.arguments()

    def batched(size, *arrays):
        return [jax.ShapeDtypeStruct((size, *a.shape), a.dtype) for a in arrays]

    axes = (0, None, None, 0, 0, None, None)
    for size, expected in ((3, CALLS[platform]), (2**15, 2 if platform == "cuda" else 0)):
        [xs], lists = batched(size, x), batched(size, idx, valid)
        one = jax.vmap(step(SMALL), axes)
        assert kernels(lowered(platform, one, xs, w_in, w_out, *lists, *others)) == expected
    assert kernels(lowered(platform, jax.vmap(step(SMALL)), *batched(2, *SMALL.arguments()))) == CALLS[platform]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_neurons_may_lie_on_several_devices(platform):
    """Each device sums over its own neurons, of which a list names them by its own numbers; one sum over all."""
    mesh = AbstractMesh((2,), ("neurons",), axis_types=(AxisType.Auto,), abstract_device=CHIP[platform])
    own, lists = jax.P("neurons"), jax.P(None, "neurons")
    case = SMALL._replace(own=True, entries=6)

    def part(*arrays):
        return jax.lax.psum(step(case)(*arrays), "neurons")

    split = jax.shard_map(part, mesh=mesh, in_specs=(jax.P(), own, own, lists, lists, own, own), out_specs=jax.P())
    text = jax.jit(split).trace(*case.arguments()).lower(lowering_platforms=(platform,)).as_text()
    assert kernels(text) == CALLS[platform]
    assert text.count("all_reduce") == 1
    assert "all_gather" not in text


REFUSED: list[tuple[Any, shapes.Case, str]] = [
    (pallas_triton, SMALL._replace(dtype="float64"), "x has dtype float64"),
    (pallas_triton, SMALL._replace(batch=65), "x has 65 rows that share a list"),
    (pallas_triton, SMALL._replace(entries=0), r"idx has shape \(1, 0\)"),
    (pallas_triton, SMALL._replace(neurons=2**23), f"w_in holds {2**31} numbers"),
    (pallas_mosaic_tpu, SMALL._replace(block=1), "block is 1; .* a DMA of a single row"),
    (pallas_mosaic_tpu, SMALL._replace(block=24), "block is 24; of bfloat16 the TPU kernel takes multiples of 16"),
    (pallas_mosaic_tpu, SMALL._replace(block=256), "block is 256"),
    (pallas_mosaic_tpu, SMALL._replace(dtype="float16"), "w_in has dtype float16"),
    (pallas_mosaic_tpu, SMALL._replace(neurons=120), "w_in has 120 neurons"),
    (pallas_mosaic_tpu, SMALL._replace(width=200), "x has width 200"),
    (pallas_mosaic_tpu, SMALL._replace(batch=9), "9 rows"),
    (pallas_mosaic_tpu, SMALL._replace(entries=0), "lists of 0 entries"),
    (pallas_mosaic_tpu, SMALL._replace(entries=2**17), f"idx names {2**17} blocks"),
    (pallas_mosaic_tpu, SMALL._replace(block=128, width=2**17), "blocks of 128 neurons of width 131072"),
]


@pytest.mark.parametrize(("backend", "case", "named"), REFUSED)
def test_refusals_name_the_limit(backend, case, named):
    with jax.enable_x64(case.dtype == "float64"):
        operands = case.operands()
    with pytest.raises(NotImplementedError, match=f"{named}.*; auto uses XLA"):
        backend.check(operands, block=case.block)


def test_a_kernel_asked_for_by_name_refuses_aloud():
    case = SMALL._replace(block=1)
    with pytest.raises(NotImplementedError, match="block is 1"):
        jax.eval_shape(step(case, "pallas_mosaic_tpu"), *case.arguments())


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_no_array_of_a_kernels_program_is_as_large_as_the_gathered_rows(platform):
    case = SMALL._replace(neurons=2048, entries=32, width=1024, biased=False)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP[platform])):
        jaxpr = jax.make_jaxpr(step(case, KERNEL[platform]))(*case.arguments())
    sizes = [v.aval.size for equation in jaxpr.jaxpr.eqns for v in equation.outvars if v.aval.shape]
    assert max(sizes) < case.rows() * case.width / 8


# --- input ----------------------------------------------------------------------------------------

CASE = shapes.Case("", 3, 8, 20, 5, dtype="float32")


def arguments(**changes: Any) -> dict[str, Any]:
    """A layer that is right, with changes."""
    names = ("x", "w_in", "w_out", "idx", "valid")
    return {name: jnp.zeros(a.shape, a.dtype) for name, a in zip(names, CASE.arguments(), strict=True)} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": jnp.zeros((3, 8), int)}, TypeError, "x has dtype int.*; it must be a float type"),
        ({"idx": jnp.zeros(5)}, TypeError, "idx has dtype float32; it must be an integer type"),
        ({"valid": jnp.zeros(5, int)}, TypeError, "valid has dtype int.*; it must be bool"),
        ({"w_in": jnp.zeros((0, 8))}, ValueError, "there must be at least one neuron"),
        (
            {"w_out": jnp.zeros((8, 20))},
            ValueError,
            r"w_out has shape \(8, 20\); it must be \(20, 8\), a row a neuron",
        ),
        ({"w_gate": jnp.zeros((20, 7))}, ValueError, r"w_gate has shape \(20, 7\)"),
        ({"b_in": jnp.zeros(8)}, ValueError, r"b_in has shape \(8,\); it must be \(20,\)"),
        ({"idx": jnp.zeros((2, 5), int)}, ValueError, r"idx has shape \(2, 5\); it must be \[entries\], or \[3, ent"),
        ({"valid": jnp.zeros(4, bool)}, ValueError, r"valid has shape \(4,\); it must be \(5,\), as idx"),
        ({"block": 0}, ValueError, "block is 0; it must be at least 1"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'; it must be one of"),
        ({"implementation": "triton"}, ValueError, "implementation is 'triton'; it must be one of"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    """Without jaxtyping, whose own errors would come first."""
    with pytest.raises(error, match=message):
        getattr(gathered_mlp, "__wrapped__", gathered_mlp)(**arguments(**changes))


# --- sizes ----------------------------------------------------------------------------------------

PROBLEMS = {problem.case: problem for problem in shapes.problems()}


def test_which_cases_are_served():
    assert list(PROBLEMS) == [case.name for case in shapes.CASES]
    assert [p.case for p in every_problem("gathered_mlp", "ragged_own")] == ["ragged_own"]
    for case in shapes.CASES:
        refused = {kernel: PROBLEMS[case.name].refusal(kernel) is not None for kernel in KERNEL.values()}
        assert not refused["pallas_triton"]
        assert refused["pallas_mosaic_tpu"] == (case.block == 1 or case.name == "odd_blocks")


def test_bytes_of_a_layer_of_opt():
    """``2 K (2 d)`` bytes in bfloat16, biases, the list, and two vectors; once for eight inputs that share it."""
    one, eight, own = (
        next(case for case in shapes.CASES if case.name == f"opt_6b_{kind}") for kind in ("b1", "b8", "b8_own")
    )
    rows = 1638 * (4 * 4096 + 2 + 5)
    assert one.bytes() == rows + 4 * 4096
    assert eight.bytes() == rows + 8 * 4 * 4096
    assert own.bytes() == 8 * one.bytes()
    assert one.flops() * 8 == eight.flops() == own.flops() == 8 * 4 * 1638 * 4096


@pytest.mark.parametrize("name", ["ragged_own", "ragged_gated", "odd_blocks", "ragged_blocks"])
def test_problems_run_as_drawn(name):
    problem = PROBLEMS[name]
    arrays = problem.draw(np.random.default_rng(0))
    assert [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in problem.arguments]
    one, other = (jax.jit(functools.partial(problem.call, name))(*arrays) for name in ("auto", "reference"))
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (one, other)), rtol=1e-2, atol=1e-4)
    assert np.abs(np.asarray(other)).max() > 0.1
