"""ROAST's modules equal Flax's with the weights that their map says, at Flax's variance, without holding them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml import exchange, sharing
from hashml.accounting import stored_bytes
from hashml.sharing.roast import RoastConv, RoastDense, RoastEmbed, SharedMemory

KEY = jax.random.key(0)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def applied(module, variables, *arguments, **options):
    return jnp.asarray(module.apply(variables, *arguments, **options))


def kernel_of(sharing_map, memory, scale=1.0):
    """The virtual matrix entry by entry, in NumPy."""
    rows = np.arange(sharing_map.rows)
    slots, signs = np.asarray(sharing_map.slots(rows)), np.asarray(sharing_map.signs(rows))
    return scale * signs * np.asarray(memory)[slots]


def assert_same_gradients(found, expected, *arguments):
    """Of two functions with one array as their result, in the first two arguments."""
    weight = draw(*expected(*arguments).shape, seed=9)
    for ours, theirs in zip(
        jax.grad(lambda *a: jnp.vdot(found(*a), weight), (0, 1))(*arguments),
        jax.grad(lambda *a: jnp.vdot(expected(*a), weight), (0, 1))(*arguments),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        {"budget": 300, "tile": (8, 4)},
        {"budget": 300, "tile": (8, 4), "map": "fold", "sign": "none"},
        {"compression": 7, "tile": (5, 9), "sign": "tile", "seed": 3},
    ],
)
def test_dense_is_a_dense_layer_with_the_weights_of_its_map(how):
    layer = RoastDense(22, **how)
    x = draw(3, 2, 37)
    variables: Any = layer.init(KEY, x)
    virtual = layer.bind(variables).sharing_map(37)
    memory, bias = variables["params"]["memory"], draw(22, seed=1)

    def ours(memory, x):
        return applied(layer, {"params": {"memory": memory, "bias": bias}}, x)

    def dense(memory, x):
        return applied(nn.Dense(22), {"params": {"kernel": sharing.expand(virtual, memory), "bias": bias}}, x)

    np.testing.assert_allclose(sharing.expand(virtual, memory), kernel_of(virtual, memory), rtol=1e-6)
    np.testing.assert_allclose(ours(memory, x), dense(memory, x), rtol=1e-5, atol=1e-5)
    assert_same_gradients(ours, dense, memory, x)


@pytest.mark.parametrize(
    ("how", "channels", "window"),
    [
        ({"kernel_size": (3, 3)}, 5, (3, 3)),
        ({"kernel_size": (3, 3), "strides": 2, "padding": "VALID", "map": "fold"}, 5, (3, 3)),
        ({"kernel_size": (1, 1), "use_bias": False}, 6, (1, 1)),
        ({"kernel_size": (3, 3), "feature_group_count": 2, "padding": [(0, 1), (2, 0)]}, 6, (3, 3)),
        ({"kernel_size": (2, 3), "kernel_dilation": (1, 2), "input_dilation": (2, 1), "padding": 1}, 4, (2, 3)),
        ({"kernel_size": (5, 5), "strides": (1, 2)}, 90, (5, 5)),  # 2,250 rows: in blocks, the last one cut
        ({"kernel_size": 4}, 3, (4,)),
    ],
)
def test_convolution_is_a_convolution_with_the_kernel_of_its_map(how, channels, window):
    layer = RoastConv(8, budget=200, tile=(8, 4), **how)
    spatial = (9, 8)[: len(window)]
    x = draw(2, *spatial, channels)
    variables: Any = layer.init(KEY, x)
    groups = how.get("feature_group_count", 1)
    rows = channels // groups * int(np.prod(window))
    make = sharing.fold_map if how.get("map") == "fold" else sharing.tile_map
    layout = layer.bind(variables).layout(channels)
    virtual = make(rows, 8, 200, tile=(8, 4), offset=layout.offset)
    memory = variables["params"]["memory"]
    bias = variables["params"].get("bias")
    plain = nn.Conv(
        8,
        **{**how, "kernel_size": window}
        if "map" not in how
        else {name: value for name, value in {**how, "kernel_size": window}.items() if name != "map"},
    )

    def ours(memory, x):
        return applied(layer, {"params": {**variables["params"], "memory": memory}}, x)

    def dense(memory, x):
        kernel = sharing.expand(virtual, memory).reshape(channels // groups, *window, 8)
        kernel = jnp.moveaxis(kernel, 0, -2)
        return applied(plain, {"params": {"kernel": kernel} | ({} if bias is None else {"bias": bias})}, x)

    np.testing.assert_allclose(ours(memory, x), dense(memory, x), rtol=1e-4, atol=1e-4)
    assert_same_gradients(ours, dense, memory, x)


@pytest.mark.parametrize("how", [{}, {"map": "fold"}, {"sign": "none"}, {"sign": "tile", "offset": 2**33}])
def test_embedding_reads_rows_of_its_map(how):
    layer = RoastEmbed(50, 12, budget=64, tile=(1, 8), **how)
    ids = jnp.array([[3, 49], [0, 3]])
    variables: Any = layer.init(KEY, ids)
    memory = variables["params"]["memory"]
    table = kernel_of(layer.bind(variables).sharing_map(), memory)
    np.testing.assert_array_equal(applied(layer, variables, ids), table[np.asarray(ids)])
    query = draw(4, 12)
    np.testing.assert_allclose(
        applied(layer, variables, query, method="attend"), query @ table.T, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("how", [{}, {"map": "fold"}])
def test_ids_outside_the_table_are_nan_and_have_no_gradient(how):
    layer = RoastEmbed(50, 12, budget=64, tile=(1, 8), **how)
    ids = jnp.array([3, 50, -1])
    variables: Any = layer.init(KEY, ids)
    rows = applied(layer, variables, ids)
    assert np.isfinite(rows[0]).all()
    assert np.isnan(rows[1:]).all()
    gradient = jax.grad(lambda v: jnp.nansum(applied(layer, v, ids)))(variables)["params"]["memory"]
    alone = jax.grad(lambda v: applied(layer, v, ids[:1]).sum())(variables)["params"]["memory"]
    np.testing.assert_array_equal(gradient, alone)


class Net(nn.Module):
    """Three kinds of modules over one memory."""

    map: str = "tile"
    budget: int = 5000

    @nn.compact
    def __call__(self, ids):
        memory = SharedMemory(self.budget, seed=5, std=0.04)
        offsets = (0, 3200, 3200 + 32 * 80) if self.map == "fold" else (None, None, None)
        shared = {"memory": memory, "map": self.map}
        x = RoastEmbed(100, 32, tile=(1, 8), offset=offsets[0], **shared)(ids)
        x = RoastDense(80, tile=(8, 8), offset=offsets[1], **shared)(x)
        return RoastDense(80, tile=(8, 8), offset=offsets[2], use_bias=False, **shared)(nn.relu(x))


@pytest.mark.parametrize("kind", ["tile", "fold"])
def test_one_memory_serves_every_module(kind):
    ids = jnp.arange(6)
    variables = Net(kind).init(KEY, ids)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == {"SharedMemory_0": {"memory": (5000,)}, "RoastDense_0": {"bias": (80,)}}
    assert stored_bytes(variables) == 4 * 5080
    gradient = jax.grad(lambda v: (applied(Net(kind), v, ids) ** 2).sum())(variables)
    assert (gradient["params"]["SharedMemory_0"]["memory"] != 0).mean() > 0.5


@pytest.mark.parametrize("std", [0.01, 1.0])
def test_weights_have_flax_s_standard_deviation_whatever_the_memory_s(std):
    """Neither 1 / sqrt(3) of it, as under the reference's uniform memory, nor the memory's own."""

    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = RoastDense(64, memory=SharedMemory(20_000, std=std), tile=(8, 8), use_bias=False)
            return layer(x)

    x = jnp.eye(400)
    w = One().init_with_output(KEY, x)[0]
    slots = 20_000 * (1 - np.exp(-25_600 / 20_000))  # of which an entry of W is a copy
    wanted = 400**-0.5
    assert abs(float(jnp.std(w)) / wanted - 1) < 4 / np.sqrt(2 * slots)
    dense: Any = nn.Dense(64, use_bias=False).init(KEY, x)["params"]["kernel"]
    assert abs(float(jnp.std(dense)) / wanted - 1) < 4 / np.sqrt(2 * dense.size)


def test_layers_of_one_shape_have_different_weights():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            memory = SharedMemory(4000)
            how = {"tile": (8, 8), "use_bias": False, "memory": memory}
            return RoastDense(40, **how)(x), RoastDense(40, **how)(x)

    first, second = Two().init_with_output(KEY, jnp.eye(40))[0]
    assert (np.asarray(first) == np.asarray(second)).mean() < 0.05


def test_the_tile_is_part_of_the_function():
    x = draw(3, 32)
    one = RoastDense(32, budget=256, tile=(8, 8))
    variables = one.init(KEY, x)
    other = RoastDense(32, budget=256, tile=(4, 16))
    assert np.abs(applied(one, variables, x) - applied(other, variables, x)).max() > 0.1


def test_a_file_of_other_tiles_is_refused(tmp_path):
    layer = RoastDense(32, budget=256, tile=(8, 8))
    variables: Any = layer.init(KEY, draw(3, 32))
    geometry = layer.bind(variables).sharing_map(32).geometry
    path = tmp_path / "dense.safetensors"
    exchange.save_module(path, variables, geometry=geometry)
    restored, _ = exchange.load_module(path, geometry=geometry)
    np.testing.assert_array_equal(restored["params"]["memory"], variables["params"]["memory"])
    other = RoastDense(32, budget=256, tile=(4, 16)).bind(variables).sharing_map(32).geometry
    with pytest.raises(ValueError, match="tile"):
        exchange.load_module(path, geometry=other)


def test_bfloat16_computes_in_bfloat16_and_stores_float32():
    layer = RoastDense(32, budget=256, tile=(8, 8), dtype=jnp.bfloat16)
    x = draw(3, 32)
    variables: Any = layer.init(KEY, x)
    y = applied(layer, variables, x)
    assert y.dtype == jnp.bfloat16
    assert variables["params"]["memory"].dtype == jnp.float32
    exact = applied(RoastDense(32, budget=256, tile=(8, 8)), variables, x)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_the_weights_never_exist_as_a_whole(kind):
    """Forward and backward at a thousandth: temporaries stay below a third of W."""
    if kind == "dense":
        layer, x = RoastDense(2048, compression=1000, tile=(16, 16)), jnp.zeros((4, 2048))
        dense = 4 * 2048**2
    else:
        layer, x = RoastConv(512, (3, 3), compression=1000, tile=(16, 16)), jnp.zeros((1, 4, 4, 1024))
        dense = 4 * 512 * 9 * 1024
    variables: Any = layer.init(KEY, x)
    step = jax.jit(jax.grad(lambda v, x: (applied(layer, v, x) ** 2).sum(), argnums=(0, 1)))
    found = step.lower(variables, x).compile().memory_analysis()
    assert found is not None
    assert found.temp_size_in_bytes < dense / 3
