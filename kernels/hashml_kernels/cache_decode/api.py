"""`cache_decode`: checks, choice of a backend, and the softmax that joins its parts with the exact window."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from hashml_kernels.annotations import Array, Float, Int
from hashml_kernels.cache_decode import pallas_mosaic_tpu, pallas_triton, reference, xla
from hashml_kernels.cache_decode.formats import DecodeGeometry, Format, Leaves, Operands, Pairs, check_leaves

Implementation = Literal["auto", "reference", "xla", "pallas_triton", "pallas_mosaic_tpu"]

AnyArray = Array | np.ndarray
"""What the public functions take: JAX arrays, or NumPy arrays."""

_KERNELS = {"pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}


def cache_decode(
    q: Float[AnyArray, "B Hq D"],
    keys: Leaves,
    values: Leaves,
    pos: Int[AnyArray, "B P C"],
    query_pos: Int[AnyArray, " rows"],
    *,
    key_format: Format,
    value_format: Format,
    window_keys: Float[AnyArray, "B H R D"] | None = None,
    window_values: Float[AnyArray, "B H R D"] | None = None,
    window_pos: Int[AnyArray, "B R"] | None = None,
    rotation: tuple[Float[AnyArray, " half"], Pairs] | None = None,
    sliding_window: int | None = None,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
    """One query a head and row, attending over a compressed cache and an exact window in one softmax.

    A slot is seen where ``0 <= pos <= query_pos``, and ``pos > query_pos - sliding_window`` if there is one. The
    decoded keys and values are never written to memory by the kernels, and block by block by XLA. It is made for
    decoding: there is no gradient.

    Args:
        q: queries, any float dtype; rotated already, and divided by ``sqrt(D)``. Query head ``h`` reads key head
            ``h // (Hq / H)``.
        keys, values: arrays of their formats, see `hashml_kernels.cache_decode.formats`.
        pos: absolute position of each slot's token, -1 for empty ones; one line for all key heads, or one each.
            What lies in empty slots, NaN included, has no effect.
        query_pos: position of each row's query.
        key_format, value_format: how they lie in memory.
        window_keys, window_values, window_pos: exact tokens, keys rotated where the model rotates; all or none.
            Places with position -1 are empty, too.
        rotation: frequencies ``[D / 2]`` in radians a position and which channels are pairs, for keys that are stored
            unrotated; they are rotated at ``pos`` after decoding, right up to angles of `sines.MOST_ANGLE`, that is
            1,600,000 positions at frequency 1: beyond it the kernel for TPUs, which fuses no products, loses digits.
        sliding_window: how many last positions a query sees; None: all.
        implementation: ``"auto"`` picks the platform's kernel where it serves the problem, else XLA. A
            kernel asked for by name is interpreted on a CPU, slowly: that is for tests.

    Returns:
        ``(out, lse)``, float32: the attention's result, and the logarithm of the softmax's denominator, with which
        results over several caches can be joined. A row that sees nothing gets zeros, and -1e30.

    Raises:
        TypeError: for arrays of other dtypes, or other formats.
        ValueError: for shapes that do not fit, naming them.
        NotImplementedError: where an ``implementation`` asked for by name does not serve the problem.
    """
    q, keys, values = jnp.asarray(q), jax.tree.map(jnp.asarray, keys), jax.tree.map(jnp.asarray, values)
    pos, query_pos = jnp.asarray(pos), jnp.asarray(query_pos)
    for name, array in (("pos", pos), ("query_pos", query_pos)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} has dtype {array.dtype}; it must be an integer type")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(f"q has dtype {q.dtype}; it must be a float type")
    batch, query_heads, width = q.shape
    heads = _heads(keys, query_heads)
    _check_positions(pos, query_pos, batch, heads)
    for name, form, leaves in (("keys", key_format, keys), ("values", value_format, values)):
        check_leaves(name, form, leaves, batch, heads, pos.shape[2], width)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}; it must be at least 1, or None")
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation is {implementation!r}; it must be one of {get_args(Implementation)}")
    frequencies, pairs = _rotation(rotation, width)
    window = _window(window_keys, window_values, window_pos, (batch, heads, width))

    operands = Operands(
        q=q.astype(jnp.float32).reshape(batch, heads, query_heads // heads, width),
        keys=keys,
        values=values,
        pos=pos.astype(jnp.int32),
        query_pos=query_pos.astype(jnp.int32),
        frequencies=frequencies,
    )
    geometry = DecodeGeometry(key_format, value_format, pairs, sliding_window)
    if implementation == "reference":
        out, lse = reference.step(operands, geometry, window)
    else:
        out, lse = _dispatch(operands, geometry, implementation)
        if window is not None:
            extra_out, extra_lse = xla.exact(operands.q, window, operands.query_pos, sliding_window)
            out = jnp.concatenate([out, extra_out[..., None, :]], axis=-2)
            lse = jnp.concatenate([lse, extra_lse[..., None]], axis=-1)
        out, lse = (out[..., 0, :], lse[..., 0]) if lse.shape[-1] == 1 else xla.merge(out, lse)
    return out.reshape(q.shape), lse.reshape(batch, query_heads)


def _dispatch(operands: Operands, geometry: DecodeGeometry, implementation: Implementation) -> tuple[Array, Array]:
    """Parts ``([B, H, J, S, D], [B, H, J, S])`` of the attention over the compressed store."""

    def through(backend, **options):
        return lambda *operands: backend.partials(Operands(*operands), geometry, **options)

    def served(backend):
        """The backend's kernel, or XLA where it says that it does not serve these operands."""
        try:
            backend.check(operands, geometry)
        except NotImplementedError:
            return through(xla)

        # All platforms' results must have one shape, and kernels split the slots each in its own way.
        def merged(*operands):
            out, lse = through(backend)(*operands)
            out, lse = xla.merge(out, lse)
            return out[..., None, :], lse[..., None]

        return merged

    match implementation:
        case "auto":
            return jax.lax.platform_dependent(
                *operands, cuda=served(pallas_triton), tpu=served(pallas_mosaic_tpu), default=through(xla)
            )
        case "xla":
            return through(xla)(*operands)
        case _:
            backend = _KERNELS[implementation]
            backend.check(operands, geometry)
            return jax.lax.platform_dependent(
                *operands, cpu=through(backend, interpret=True), default=through(backend)
            )


def _heads(keys: Any, query_heads: int) -> int:
    store = jax.tree.leaves(keys)[0]
    if store.ndim != 4:
        raise ValueError(f"keys.{keys._fields[0]} has shape {store.shape}; it must have four axes, [B, H, C, ...]")
    heads = store.shape[1]
    if heads < 1 or query_heads % heads:
        raise ValueError(f"q has {query_heads} heads; they must be a multiple of the key heads, {heads}")
    return heads


def _check_positions(pos: Array, query_pos: Array, batch: int, heads: int) -> None:
    if pos.ndim != 3 or pos.shape[0] != batch or pos.shape[1] not in (1, heads):
        raise ValueError(f"pos has shape {pos.shape}; it must be [{batch}, 1 or {heads}, slots]")
    if query_pos.shape != (batch,):
        raise ValueError(f"query_pos has shape {query_pos.shape}; it must be [{batch}], one a row of q")


def _rotation(rotation: Any, width: int) -> tuple[Array | None, Pairs | None]:
    if rotation is None:
        return None, None
    frequencies, pairs = rotation
    frequencies = jnp.asarray(frequencies, jnp.float32)
    if pairs not in get_args(Pairs):
        raise ValueError(f"rotation has pairs {pairs!r}; they must be one of {get_args(Pairs)}")
    if width % 2 or frequencies.shape != (width // 2,):
        raise ValueError(f"rotation has frequencies of shape {frequencies.shape}; heads of {width} need half as many")
    return frequencies, pairs


def _window(keys: Any, values: Any, pos: Any, sizes: tuple[int, int, int]) -> reference.Window | None:
    given = {"window_keys": keys, "window_values": values, "window_pos": pos}
    missing = [name for name, array in given.items() if array is None]
    if len(missing) == 3:
        return None
    if missing:
        raise ValueError(f"{' and '.join(missing)} is None; a window needs keys, values and positions")
    keys, values, pos = (jnp.asarray(array) for array in (keys, values, pos))
    batch, heads, width = sizes
    shape = (batch, heads, pos.shape[-1], width)
    if pos.shape != (batch, shape[2]):
        raise ValueError(f"window_pos has shape {pos.shape}; it must be [{batch}, tokens]")
    for name, array in (("window_keys", keys), ("window_values", values)):
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")
    return (keys, values, pos.astype(jnp.int32)) if shape[2] else None
