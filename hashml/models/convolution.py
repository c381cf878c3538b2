"""A convolution as one matrix product of patches: what a loop on a CPU wants.

    y[b, i, j] = sum over (u, v) in the window of  x[b, s i + u, s j + v] @ kernel[u, v]

XLA's convolutions on a CPU are fast alone, but inside a `lax.scan` they run on one core and without their fast
paths, and `jax.vmap` over kernels makes groups of them, which is slower still: a training step of a small net takes
30 times as long. A matrix product loses nothing there. It costs memory, one copy of the input a window place.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def patches_convolution(
    lhs: Array, rhs: Array, window_strides: tuple[int, ...], padding: Any, *args: Any, **options: Any
) -> Array:
    """`lax.conv_general_dilated` for images ``[B, H, W, C]`` and kernels ``[h, w, C, F]``, in its place:

        nn.Conv(16, (3, 3), conv_general_dilated=patches_convolution)

    Args:
        lhs, rhs: images and kernels, of one dtype.
        window_strides, padding: as in `lax.conv_general_dilated`.
        args, options: its others; dilations and groups must be 1.

    Raises:
        ValueError: for a dilation or groups, or arrays that are no images and kernels of them.
    """
    for name in ("lhs_dilation", "rhs_dilation"):
        if any(step != 1 for step in options.get(name) or ()):
            raise ValueError(f"{name} is {options[name]}; a convolution of patches has none")
    if args or options.get("feature_group_count", 1) != 1 or options.get("batch_group_count", 1) != 1:
        raise ValueError(f"options are {args} {options}; a convolution of patches has no groups")
    if lhs.ndim != 4 or rhs.ndim != 4 or lhs.shape[3] != rhs.shape[2]:
        raise ValueError(f"lhs has shape {lhs.shape} and rhs {rhs.shape}; they must be [B, H, W, C] and [h, w, C, F]")
    height, width = rhs.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], (height, width), window_strides, padding)
    padded = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        (size - window) // stride + 1
        for size, window, stride in zip(padded.shape[1:3], (height, width), window_strides, strict=True)
    )
    down, across = window_strides
    patches = jnp.concatenate(
        [
            padded[:, u : u + down * (rows - 1) + 1 : down, v : v + across * (columns - 1) + 1 : across]
            for u in range(height)
            for v in range(width)
        ],
        axis=-1,
    )
    product = patches.reshape(-1, patches.shape[-1]) @ rhs.reshape(-1, rhs.shape[3])
    return product.reshape(lhs.shape[0], rows, columns, rhs.shape[3])
