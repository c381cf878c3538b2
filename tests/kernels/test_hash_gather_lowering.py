"""The compilers' front ends accept each kernel on the platform it claims, and `auto` uses it there only."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from hashml_kernels import bits
from hashml_kernels.hash_gather import hash_gather, hash_gather_bag, hash_scatter

CHIP = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "cuda": AbstractDevice("NVIDIA H200", None, "gpu"),
    "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
}
KERNEL = {"cuda": "pallas_triton", "tpu": "pallas_mosaic_tpu"}

MEMORY = jax.ShapeDtypeStruct((1280,), jnp.float32)
IDS = jax.ShapeDtypeStruct((13, 5), jnp.int32)
WEIGHTS = jax.ShapeDtypeStruct((13, 5), jnp.float32)
ROWS = jax.ShapeDtypeStruct((13, 5, 128), jnp.float32)
LINES: dict[str, Any] = {"block_size": 128, "align": 128}

# jax says this of any Triton kernel since 0.11, when it is lowered.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


def lookup(implementation: Any = "auto", features: int = 128, **options: Any):
    return lambda memory, ids: hash_gather(
        memory, ids, features=features, implementation=implementation, **(LINES | options)
    )


def bag(implementation: Any = "auto", **options: Any):
    return lambda memory, ids, weights: hash_gather_bag(
        memory, ids, weights, features=128, implementation=implementation, **(LINES | options)
    )


def kernels(platform: str, function, *arguments) -> int:
    """Kernel calls in the program that is handed to the platform's compiler."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=CHIP[platform])):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.custom_call @tpu_custom_call") + text.count(
        "stablehlo.custom_call @__gpu$xla.gpu.triton"
    )


def gradient(function, argument=0):
    return jax.grad(lambda *operands: function(*operands).sum(), argument)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("sign", ["none", "block"])
def test_every_pass_is_a_kernel_on_the_platforms_that_have_one(platform, sign):
    count = functools.partial(kernels, platform)
    one = int(platform != "cpu")
    assert count(lookup(sign=sign), MEMORY, IDS) == one
    assert count(gradient(lookup(sign=sign)), MEMORY, IDS) == one  # the forward result is not needed
    assert count(bag(sign=sign), MEMORY, IDS, WEIGHTS) == one
    assert count(gradient(bag(sign=sign)), MEMORY, IDS, WEIGHTS) >= one
    scatter = functools.partial(hash_scatter, budget=1280, sign=sign, **LINES)
    assert count(scatter, ROWS, IDS) == one


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_by_name_lower_to_what_auto_picks(platform):
    for function, operands in ((lookup, (MEMORY, IDS)), (bag, (MEMORY, IDS, WEIGHTS))):
        assert kernels(platform, function(KERNEL[platform]), *operands) == 1
        assert kernels(platform, function("xla"), *operands) == 0


def test_auto_leaves_to_xla_what_a_kernel_refuses():
    words = jax.ShapeDtypeStruct((13,), jnp.uint32)
    assert kernels("cuda", lookup(), MEMORY, bits.Limbs(words, words)) == 0
    assert kernels("tpu", lookup(align=1), MEMORY, IDS) == 0
    assert kernels("cuda", lookup(align=1), MEMORY, IDS) == 1
    assert kernels("tpu", lookup(sign="element"), MEMORY, IDS) == 0
    assert kernels("cuda", lookup(), MEMORY, jax.ShapeDtypeStruct((0,), jnp.int32)) == 0


def test_a_large_memory_is_read_but_not_written_by_the_tpu_kernels():
    large = jax.ShapeDtypeStruct((2**24,), jnp.float32)
    assert kernels("tpu", lookup(), large, IDS) == 1
    assert kernels("tpu", gradient(lookup()), large, IDS) == 0


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_lower_with_64_bit_types_on(platform, dtype):
    memory = jax.ShapeDtypeStruct((1280,), dtype)
    with jax.enable_x64(True):
        assert kernels(platform, lookup(), memory, IDS) == 1
        assert kernels(platform, gradient(bag()), memory, IDS, WEIGHTS) >= 1


def test_rows_that_no_tile_divides_lower_for_cuda():
    odd = {"block_size": 5, "align": 1, "sign": "element", "features": 37}
    assert kernels("cuda", lookup(**odd), MEMORY, IDS) == 1
    assert kernels("cuda", gradient(lookup(**odd)), MEMORY, jax.ShapeDtypeStruct((1,), jnp.int32)) == 1


def test_small_ids_of_numpy_reach_the_kernels():
    """NumPy's integers have 64 bits; a kernel that did not serve them would refuse here."""
    memory, ids = jnp.arange(1280.0), np.arange(4)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(lookup("pallas_triton")(memory, ids), lookup("xla")(memory, ids.astype(np.uint32)))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_kernels_lower_under_vmap(platform):
    """A CUDA grid has three axes, of which two end at 65,535; batches of batches still fit."""
    ids = jax.ShapeDtypeStruct((3, 2, 70_000), jnp.int32)
    twice = jax.vmap(jax.vmap(lookup(), (None, 0)), (None, 0))
    assert kernels(platform, twice, MEMORY, ids) == 1
    assert kernels(platform, gradient(twice), MEMORY, ids) == 1
