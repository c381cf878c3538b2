"""Classifiers: shapes and counts of weights, a naive forward pass, and norms that keep or have no state."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.models import classifiers
from hashml.models.classifiers import MLP, ConvNet, ResNet
from hashml.models.convolution import patches_convolution

KEY = jax.random.key(0)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def random_params(model, x):
    """Normal numbers in place of the model's own initial values, which take longer to compile."""
    shapes = jax.eval_shape(model.init, KEY, x)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (rng.standard_normal(leaf.shape) / 4).astype(np.float32), shapes)


def test_mlp_equals_matrices_in_numpy():
    model, x = MLP((7, 5, 3)), draw(4, 2, 3, 1)
    params = jax.jit(model.init)(KEY, x)["params"]
    flat: Any = jax.tree.map(np.asarray, params)
    hidden = x.reshape(4, 6)
    for name in ("Dense_0", "Dense_1"):
        hidden = np.maximum(hidden @ flat[name]["kernel"] + flat[name]["bias"], 0)
    expected = hidden @ flat["Dense_2"]["kernel"] + flat["Dense_2"]["bias"]
    found: Any = model.apply({"params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_papers_mlp_has_as_many_weights_as_it_should():
    shapes = jax.eval_shape(MLP((256, 256, 10)).init, KEY, jnp.zeros((1, 28, 28, 1)))
    assert size(shapes) == 784 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
    without = jax.eval_shape(MLP((256, 256, 10), use_bias=False).init, KEY, jnp.zeros((1, 784)))
    assert size(without) == 784 * 256 + 256 * 256 + 256 * 10


def test_convnet_equals_a_naive_loop():
    """Zero padding, 3x3 windows, ReLU, maxima of 2x2."""
    model, x = ConvNet((2,), classes=3), draw(1, 4, 4, 2)
    params = jax.tree.map(np.asarray, model.init(KEY, x)["params"])
    kernel, bias = params["Conv_0"]["kernel"], params["Conv_0"]["bias"]
    padded = np.pad(x[0], ((1, 1), (1, 1), (0, 0)))
    found = np.zeros((4, 4, 2))
    for i in range(4):
        for j in range(4):
            found[i, j] = np.einsum("hwc,hwco->o", padded[i : i + 3, j : j + 3], kernel) + bias
    pooled = np.maximum(found, 0).reshape(2, 2, 2, 2, 2).max(axis=(1, 3))
    expected = pooled.reshape(-1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    y: Any = model.apply({"params": params}, x)
    np.testing.assert_allclose(y[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "stride", "padding"), [(3, 1, "SAME"), (3, 2, "SAME"), (1, 2, "VALID"), (5, 1, ((2, 1), (0, 3)))]
)
def test_a_convolution_of_patches_is_xlas(window, stride, padding):
    x, weights = jnp.asarray(draw(2, 9, 7, 3)), jnp.asarray(draw(window, window, 3, 5, seed=1))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 1, "rhs_dilation": (1, 1)}

    def both(convolution):
        out, pull = jax.vjp(lambda x, w: convolution(x, w, (stride, stride), padding, **options), x, weights)
        return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    for found, expected in zip(both(patches_convolution), both(jax.lax.conv_general_dilated), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_convolutions_that_are_no_product_of_patches_are_refused():
    x, weights = jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2))
    with pytest.raises(ValueError, match="rhs_dilation is .2, 2."):
        patches_convolution(x, weights, (1, 1), "SAME", rhs_dilation=(2, 2))
    with pytest.raises(ValueError, match="no groups"):
        patches_convolution(x, weights, (1, 1), "SAME", feature_group_count=2)
    with pytest.raises(ValueError, match="lhs has shape .4, 4, 2."):
        patches_convolution(x[0], weights, (1, 1), "SAME")


def test_convnet_with_either_convolution():
    x = draw(2, 32, 32, 3)
    variables = ConvNet().init(jax.random.key(0), x)
    nets = ConvNet(convolution=patches_convolution), ConvNet()
    found, expected = (jnp.asarray(net.apply(variables, x)) for net in nets)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_convnet_on_both_data_sets():
    for shape, last in (((2, 28, 28, 1), 3 * 3 * 64), ((2, 32, 32, 3), 4 * 4 * 64)):
        model = ConvNet()
        variables = jax.eval_shape(model.init, KEY, jnp.zeros(shape))
        assert jax.eval_shape(model.apply, variables, jnp.zeros(shape)).shape == (2, 10)
        assert variables["params"]["Dense_0"]["kernel"].shape == (last, 10)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_resnet_has_the_papers_number_of_weights(depth, millions):
    """Table 6 of He et al.; the 1x1 shortcuts, which the paper's CIFAR nets lack, are left out."""
    params = jax.eval_shape(ResNet(depth).init, KEY, jnp.zeros((1, 32, 32, 3)))["params"]
    paper = {name: leaf for name, leaf in params.items() if "shortcut" not in name}
    assert size(paper) / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.006)
    layers = [name for name in paper if "kernel" in paper[name]]
    assert len(layers) == depth


def test_resnet_stages_halve_the_image_and_double_the_width():
    shapes, x = {}, jnp.zeros((2, 32, 32, 3))
    model = ResNet(14, width=4, norm="none")

    def note(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, nn.Conv):
            shapes[context.module.name] = y.shape
        return y

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, KEY, x)
    for stage, (side, width) in enumerate([(32, 4), (16, 8), (8, 16)]):
        for block in (0, 1):
            assert shapes[f"stage{stage}_block{block}_conv1"] == (2, side, side, width)
    assert [name for name in shapes if "shortcut" in name] == [
        "stage1_block0_shortcut",
        "stage2_block0_shortcut",
    ]


def test_a_block_whose_last_kernel_is_zero_passes_its_input_on():
    """ReLU(x + 0) is x where x is not negative, as it is after the stem's ReLU."""
    model, x = ResNet(8, width=2, norm="none"), draw(2, 4, 4, 3)
    params = random_params(model, x)
    params["stage0_block0_conv1"] = jax.tree.map(np.zeros_like, params["stage0_block0_conv1"])

    @jax.jit
    def inputs(params):
        found = {}

        def note(call, args, kwargs, context):
            found[context.module.name] = args
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            model.apply({"params": params}, x)
        return found["stage0_block0_conv0"][0], found["stage1_block0_conv0"][0]

    into_first, into_second = inputs(params)
    np.testing.assert_array_equal(into_first, into_second)
    assert np.asarray(into_first).max() > 0


def test_batch_norm_moves_its_statistics_in_training_alone():
    model, x = ResNet(8, width=2), 3 + 2 * draw(16, 4, 4, 3)
    variables = {"params": random_params(model, x)}
    shapes = jax.eval_shape(model.init, KEY, x)["batch_stats"]
    variables["batch_stats"] = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(leaf.shape, "var" in str(path[-1]), np.float32), shapes
    )

    @jax.jit
    def both(variables):
        still = model.apply(variables, x, mutable=["batch_stats"])[1]
        moved = model.apply(variables, x, train=True, mutable=["batch_stats"])[1]
        kernel = variables["params"]["stem"]["kernel"]
        stem = jax.lax.conv_general_dilated(
            jnp.asarray(x), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return still["batch_stats"], moved["batch_stats"], stem

    still, moved, stem = both(variables)
    jax.tree.map(np.testing.assert_array_equal, still, variables["batch_stats"])
    # Momentum 0.9 from a mean of zero: a tenth of the batch's own mean.
    found = moved["stem_norm"]["mean"]
    np.testing.assert_allclose(found, 0.1 * np.asarray(stem).mean((0, 1, 2)), rtol=1e-4, atol=1e-5)


def test_group_norm_is_a_function_of_parameters_alone():
    model, x = ResNet(8, width=4, norm="group", groups=2), draw(3, 4, 4, 3)
    assert set(jax.eval_shape(model.init, KEY, x)) == {"params"}
    variables = {"params": random_params(model, x)}
    # No image sees its neighbours in the batch.
    together, alone = jax.jit(lambda v: (model.apply(v, x), model.apply(v, x[:1])))(variables)
    np.testing.assert_allclose(np.asarray(together)[:1], alone, rtol=1e-4, atol=1e-5)


def test_activations_keep_their_second_moment():
    """He's start: 2 / fan_in keeps E[x^2] through Dense and ReLU; after the last layer comes none, and it has 1."""
    x = draw(200, 300)
    params = jax.jit(MLP((2000, 2000)).init)(KEY, x)["params"]
    for name, fan_in, gain in (("Dense_0", 300, 2), ("Dense_1", 2000, 1)):
        kernel = np.asarray(params[name]["kernel"])
        # A variance of n numbers is known to sqrt(2 / n) of itself.
        assert abs(kernel.var() * fan_in / gain - 1) < 5 * np.sqrt(2 / kernel.size)
        assert not params[name]["bias"].any()


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (MLP(()), (1, 4), r"widths is \(\); it must hold at least one layer"),
        (MLP((4, 0)), (1, 4), r"widths is \(4, 0\); it must hold"),
        (ConvNet(()), (1, 8, 8, 1), r"widths is \(\); it must hold at least one layer"),
        (ConvNet((4, 4, 4)), (1, 7, 8, 1), r"x has shape \(1, 7, 8, 1\); 3 pools of 2x2 leave nothing"),
        (ResNet(18), (1, 8, 8, 3), "depth is 18; it must be 6 n [+] 2"),
        (ResNet(2), (1, 8, 8, 3), "depth is 2; it must be 6 n [+] 2"),
        (ResNet(8, width=0), (1, 8, 8, 3), "width is 0; it must be at least 1"),
        (ResNet(8, width=12, norm="group"), (1, 8, 8, 3), "groups is 8; it must divide width = 12"),
    ],
)
def test_bad_input(model, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, KEY, jnp.zeros(shape))


def test_an_unknown_norm_is_refused():
    with pytest.raises((ValueError, TypeError), match="norm"):
        jax.eval_shape(
            classifiers.ResNet(8, norm="layer").init,  # pyright: ignore[reportArgumentType] that is the point
            KEY,
            jnp.zeros((1, 8, 8, 3)),
        )
