"""The bytes meter: what a model really stores, read off its array leaves.

Every comparison of the library is made at equal ``stored_bytes``, and ``compression`` is a quotient of
two of them, never a nominal ratio: indices, signs, scales, codebooks and policy state count wherever
they are leaves of the tree. What a hash recomputes is no leaf, and costs nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def stored_bytes(tree: Any) -> int:
    """Bytes of all array leaves of ``tree``; an empty tree, or ``None``, stores nothing.

    A leaf counts ``ceil(size * bits / 8)`` bytes. Types narrower than a byte (int4, int2, float4, ...)
    count their real bits, as on an accelerator or in a packed file, although NumPy spends a whole byte
    on each; a bool is a byte. An array that stands in two places of the tree is stored twice, and a
    traced or abstract array (`jax.eval_shape`) counts what the concrete one would.

    Args:
        tree: any pytree of JAX arrays, NumPy arrays or scalars, or `jax.ShapeDtypeStruct`.

    Raises:
        TypeError: for a leaf that is no array (a Python number, a string, an array of Python objects),
            with its path: such a leaf would be stored, but nothing says in how many bytes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(_leaf_bytes(path, leaf) for path, leaf in leaves)


def compression(dense_tree: Any, stored_tree: Any) -> float:
    """Dense bytes over stored bytes, as `stored_bytes` counts them: 100.0 means a hundredth is left.

    Raises:
        TypeError: for a leaf that is no array.
        ValueError: if ``stored_tree`` stores no byte.
    """
    stored = stored_bytes(stored_tree)
    if stored == 0:
        raise ValueError("stored_tree holds 0 bytes; a compression needs at least one stored byte")
    return stored_bytes(dense_tree) / stored


def format_bytes(count: int) -> str:
    """``count`` for a reader: ``"512 B"``, then three digits in binary units, as ``"1.50 MiB"``.

    Raises:
        ValueError: for a negative count.
    """
    if count < 0:
        raise ValueError(f"count is {count}; a number of bytes is not negative")
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        # 1023.5 would print as 1024 of this unit: it belongs to the next.
        if value < 1023.5 or unit == "PiB":
            break
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def _leaf_bytes(path: tuple[Any, ...], leaf: Any) -> int:
    if not isinstance(leaf, _ARRAYS) or np.dtype(object) == leaf.dtype:
        kind = "an array of Python objects" if isinstance(leaf, _ARRAYS) else f"of type {type(leaf).__name__}"
        raise TypeError(
            f"tree{jax.tree_util.keystr(path)} is {kind}, whose bytes are not defined; "
            "allowed are JAX and NumPy arrays and jax.ShapeDtypeStruct"
        )
    return -(-math.prod(leaf.shape) * _bits(leaf.dtype) // 8)


def _bits(dtype: Any) -> int:
    """Bits of one entry."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return 8 * dtype.itemsize  # bool, complex, strings, and the words of a random key
