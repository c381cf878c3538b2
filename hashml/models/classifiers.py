"""Image classifiers as plain layers, so that sharing and pruning can be applied to them from outside.

    MLP       x -> flatten -> Dense, ReLU, ..., Dense                        784-256-256-10 in the papers' stand-ins
    ConvNet   3 x (Conv 3x3, ReLU, max pool 2x2), Dense                      about 3 convolutions, no norm
    ResNet    CIFAR form of He et al. 2016 (arXiv 1512.03385), section 4.2:  depth 6n + 2
              Conv 3x3, three stages of n blocks of widths w, 2w, 4w, global mean, Dense
              block(x) = ReLU(norm(conv(ReLU(norm(conv(x))))) + shortcut(x))

Weights are `flax.linen.Dense` and `flax.linen.Conv` kernels and biases; nothing is fused or tied. The first
block of the second and third stage halves the image; its shortcut is a 1x1 convolution with a norm where
the paper's CIFAR nets subsample and pad with zeros ("projection", option B of the paper). Kernels
start from He's normal, `variance_scaling(2, fan_in)`, but the last layer's from 1 / fan_in.
"""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Float

Norm = Literal["batch", "group", "none"]

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""Keeps the second moment of activations through a ReLU."""


class MLP(nn.Module):
    """Dense layers of ``widths`` with ReLU between them, on flattened inputs.

    Attributes:
        widths: outputs of each layer; the last is the number of classes.
        use_bias: adds a bias in every layer.
        param_dtype: of the weights.

    Raises:
        ValueError: (when called) for no widths, or one below 1.
    """

    widths: tuple[int, ...]
    use_bias: bool = True
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array | np.ndarray, "B *shape"]) -> Float[Array, "B classes"]:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths is {self.widths}; it must hold at least one layer, and widths of at least 1")
        y = jnp.asarray(x).reshape(len(x), -1)
        for i, width in enumerate(self.widths):
            last = i == len(self.widths) - 1
            y = _dense(width, last=last, use_bias=self.use_bias, param_dtype=self.param_dtype)(y)
            y = y if last else nn.relu(y)
        return y


class ConvNet(nn.Module):
    """Convolutions 3x3, each with ReLU and a max pool 2x2, then one dense layer.

    Attributes:
        widths: channels of each convolution.
        classes: outputs.
        use_bias, param_dtype: as in `MLP`.
        convolution: in place of `lax.conv_general_dilated`, such as `hashml.models.convolution.patches_convolution`.

    Raises:
        ValueError: (when called) for no widths, one below 1, or an image that the pools reduce to nothing.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    classes: int = 10
    use_bias: bool = True
    param_dtype: Dtype = jnp.float32
    convolution: Callable[..., Array] | None = None

    @nn.compact
    def __call__(self, x: Float[Array | np.ndarray, "B H W C"]) -> Float[Array, "B classes"]:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths is {self.widths}; it must hold at least one layer, and widths of at least 1")
        if min(x.shape[1:3]) < 2 ** len(self.widths):
            raise ValueError(f"x has shape {x.shape}; {len(self.widths)} pools of 2x2 leave nothing of it")
        x = jnp.asarray(x)
        for width in self.widths:
            convolution = nn.Conv(
                width,
                (3, 3),
                use_bias=self.use_bias,
                kernel_init=he_normal,
                param_dtype=self.param_dtype,
                conv_general_dilated=self.convolution,
            )
            x = _max_pool(nn.relu(convolution(x)))
        head = _dense(self.classes, last=True, use_bias=self.use_bias, param_dtype=self.param_dtype)
        return head(x.reshape(len(x), -1))


def _max_pool(x: Array) -> Array:
    """Maxima of 2x2 windows; an odd last row or column is left out. Its gradient is twice as fast as
    `flax.linen.max_pool`'s on a CPU, which scatters."""
    batch, height, width, channels = x.shape
    even = x[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


class ResNet(nn.Module):
    """The residual nets of CIFAR: `ResNet(depth=20)` is ResNet-20, ``width=32`` twice as wide.

    With ``norm="batch"`` there are two collections, ``params`` and ``batch_stats``; training passes
    ``train=True`` and ``mutable=["batch_stats"]``, and scores of pruning are taken with ``train=False``,
    so that no statistic moves. ``norm="group"`` has no state, and is what a function of parameters alone
    (``apply(params, x)``) needs.

    Attributes:
        depth: layers with weights, ``6 n + 2``.
        width: channels of the first stage; the others have 2 and 4 times as many.
        classes: outputs.
        norm: ``"batch"`` (the paper), ``"group"`` or ``"none"``.
        groups: of the group norm; must divide ``width``.
        param_dtype: of the weights.

    Raises:
        ValueError: (when called) for a depth that is not ``6 n + 2``, a width below 1, an unknown norm, or
            groups that do not divide the width.
    """

    depth: int = 20
    width: int = 16
    classes: int = 10
    norm: Norm = "batch"
    groups: int = 8
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array | np.ndarray, "B H W C"], *, train: bool = False) -> Float[Array, "B classes"]:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(f"depth is {self.depth}; it must be 6 n + 2: 8, 14, 20, 32, 44, 56, 110 ...")
        if self.width < 1:
            raise ValueError(f"width is {self.width}; it must be at least 1")
        if self.norm not in ("batch", "group", "none"):
            raise ValueError(f"norm is {self.norm!r}; it must be 'batch', 'group' or 'none'")
        if self.norm == "group" and (self.groups < 1 or self.width % self.groups):
            raise ValueError(f"groups is {self.groups}; it must divide width = {self.width}")
        y = self._convolution(self.width, 3, 1, "stem")(jnp.asarray(x))
        y = nn.relu(self._norm(train, "stem_norm")(y))
        for stage in range(3):
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                y = self._block(y, self.width * 2**stage, stride, train, f"stage{stage}_block{block}")
        head = _dense(self.classes, last=True, use_bias=True, param_dtype=self.param_dtype, name="head")
        return head(y.mean(axis=(1, 2)))

    def _block(self, x: Array, width: int, stride: int, train: bool, name: str) -> Array:
        y = self._convolution(width, 3, stride, f"{name}_conv0")(x)
        y = nn.relu(self._norm(train, f"{name}_norm0")(y))
        y = self._convolution(width, 3, 1, f"{name}_conv1")(y)
        y = self._norm(train, f"{name}_norm1")(y)
        if x.shape != y.shape:
            x = self._convolution(width, 1, stride, f"{name}_shortcut")(x)
            x = self._norm(train, f"{name}_shortcut_norm")(x)
        return nn.relu(x + y)

    def _convolution(self, width: int, size: int, stride: int, name: str) -> nn.Conv:
        # The norm's shift stands in for a bias; without a norm there has to be one.
        return nn.Conv(
            width,
            (size, size),
            strides=stride,
            use_bias=self.norm == "none",
            kernel_init=he_normal,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _norm(self, train: bool, name: str) -> Callable[[Array], Array]:
        match self.norm:
            case "batch":
                return nn.BatchNorm(
                    use_running_average=not train, momentum=0.9, param_dtype=self.param_dtype, name=name
                )
            case "group":
                return nn.GroupNorm(num_groups=self.groups, param_dtype=self.param_dtype, name=name)
            case _:
                return lambda x: x


def _dense(width: int, *, last: bool, use_bias: bool, param_dtype: Dtype, name: str | None = None) -> nn.Dense:
    # The last layer feeds no ReLU: 1 / fan_in gives logits of unit variance from unit inputs.
    init = nn.initializers.lecun_normal() if last else he_normal
    return nn.Dense(width, use_bias=use_bias, kernel_init=init, param_dtype=param_dtype, name=name)
