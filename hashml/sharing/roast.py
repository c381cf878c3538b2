"""ROAST: random operation access specific tile hashing (Desai, Zhou, Shrivastava, ICML 2023, arXiv 2207.10702).

All modules of a model read one memory of ``budget`` weights. A weight matrix (inputs x outputs) is cut in
tiles, each a contiguous run of the memory at a hashed place, and is never stored:

    W = lam * sign * memory[h(tile) + place in the tile],     lam = (standard deviation wanted) / (memory's)
    y = x W + b

``lam`` is a number of the geometry, and meets the sum of products once, so that modules of different scales
share a memory at the variance that Flax's initialisers would give them. Without a `SharedMemory` a module keeps
a memory of its own, with ``lam = 1``. ``map="fold"`` is RANDOMFOLD of STABLE-RPS (ICLR 2024, arXiv 2310.11611).
Departures from the reference code: the memory has exactly the standard deviation that ``lam`` divides by (the
reference draws it uniform on the interval of that size, and its weights come out sqrt(3) too small), tiles run
circularly over the memory's end, and one seed serves the model, whose modules differ by their offset.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float, Integer

from hashml.hashing import split64
from hashml.sharing.budgets import check_positive, resolve_budget
from hashml.sharing.maps import AnyArray, SharingMap, block_map, fold_map, tile_map, virtual_matmul
from hashml.sharing.robe import ids_inside, row_words
from hashml_kernels import bits
from hashml_kernels.hashed_matmul import hashed_matmul
from hashml_kernels.hashed_matmul.geometry import TileGeometry, TileMap, TileSign

STRIP = 512
"""Rows of a convolution's virtual matrix that exist at a time."""


class SharedMemory(nn.Module):
    """One memory for many modules: ``memory = SharedMemory(10_000)``, then ``RoastDense(64, memory=memory)(x)``.

    Attributes:
        budget: weights stored.
        seed: picks the hash functions of all modules that read it.
        std: standard deviation of the weights at initialisation. Modules rescale to the one they want; under
            Adam 1 keeps the step independent of it (see `hashml.sharing.stable_rps`).
        param_dtype: of the weights.
    """

    budget: int
    seed: int = 0
    std: float | int = 0.04
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, " {self.budget}"]:
        check_positive(budget=self.budget)
        _check_std("std", self.std)
        init = nn.initializers.normal(self.std)
        return self.param("memory", init, (self.budget,), self.param_dtype)


class _Roast(nn.Module, kw_only=True):
    """What the modules have in common: where their weights come from.

    Attributes:
        memory: the `SharedMemory` that other modules read too; or the module stores its own memory of
        budget: weights, or
        compression: dense over stored weights, at least 1.
        map: ``"tile"`` or ``"fold"``.
        seed: picks the hash function; by default that of ``memory``, or 0.
        sign: hashed signs, one an ``"element"``, one a ``"tile"``, or ``"none"``.
        offset: positions that other modules of the memory own. By default a fixed hash of the module's path,
            which keeps maps of tiles apart. A fold loads its memory evenly only if offsets follow on, so that
            one with a shared memory must be given them (`hashml.sharing.share` does it for whole models).
        align: tiles start at multiples of it; a multiple of the tile's size suits a TPU.
        weight_std: standard deviation of the virtual weights at initialisation; by default Flax's.
        dtype, param_dtype: as in Flax.
    """

    memory: SharedMemory | None = None
    budget: int | None = None
    compression: float | int | None = None
    map: TileMap = "tile"
    seed: int | None = None
    sign: TileSign = "element"
    offset: int | None = None
    align: int = 1
    weight_std: float | int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def geometry_of(self, rows: int, columns: int, tile: tuple[int, int]) -> TileGeometry:
        """The geometry of a virtual matrix of this module.

        Raises:
            TypeError, ValueError: for sizes out of range, or not exactly one of memory, budget and compression.
        """
        check_positive(rows=rows, columns=columns)
        if self.memory is None:
            # Said with the tile's size by the geometry itself.
            how: dict[str, Any] = {"budget": self.budget, "compression": self.compression}
            budget = resolve_budget(rows * columns, multiple_of=self.align, **how)
        elif self.budget is not None or self.compression is not None:
            raise ValueError(
                f"memory is given, and so is budget ({self.budget}) or compression ({self.compression}); "
                "the budget is the memory's"
            )
        else:
            budget = self.memory.budget
        seed = self.seed if self.seed is not None else 0 if self.memory is None else self.memory.seed
        return TileGeometry(budget, rows, columns, tile, self.map, seed, self.sign, self._offset(), self.align)

    def _offset(self) -> int:
        if self.offset is not None:
            return self.offset
        if self.map == "fold":
            if self.memory is not None:
                raise ValueError(
                    "offset is None; a fold of a shared memory needs the positions that its other modules own "
                    "(or use hashml.sharing.share)"
                )
            return 0
        # No module has 2**31 positions that could reach into the next path's.
        return zlib.crc32("/".join(self.path).encode()) << 31

    def _weights(self, budget: int, std: float) -> tuple[Array, float]:
        """The memory, and what its weights are multiplied by."""
        wanted = std if self.weight_std is None else float(self.weight_std)
        _check_std("weight_std", wanted)
        if self.memory is not None:
            return self.memory(), wanted / self.memory.std
        init = nn.initializers.normal(wanted)
        return self.param("memory", init, (budget,), self.param_dtype), 1.0


def _check_std(name: str, value: float | int) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be positive and finite")


class RoastDense(_Roast):
    """`flax.linen.Dense` whose weights lie in tiles of a memory: ``RoastDense(64, compression=100)(x)``.

    The weights of a layer, and their gradient, never exist as a whole (`hashml_kernels.hashed_matmul`).

    Attributes:
        features: outputs.
        tile: rows and columns of a tile; a hyper-parameter of the model, since another tile is another map.
        use_bias, bias_init: as in `flax.linen.Dense`; the bias is stored.

    Raises:
        TypeError, ValueError: as `TileGeometry`; for a compression below 1, or a memory smaller than a tile.
    """

    features: int
    tile: tuple[int, int] = (32, 32)
    use_bias: bool = True
    bias_init: Initializer = nn.initializers.zeros_init()

    def layout(self, inputs: int) -> TileGeometry:
        """The geometry of a layer with ``inputs`` inputs."""
        return self.geometry_of(inputs, self.features, self.tile)

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch inputs"]) -> Float[Array, "*batch {self.features}"]:
        layout = self.layout(x.shape[-1])
        memory, scale = self._weights(layout.budget, x.shape[-1] ** -0.5)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, memory, bias = promote_dtype(x, memory, bias, dtype=self.dtype)
        y = hashed_matmul(
            x,
            memory,
            columns=layout.columns,
            tile=layout.tile,
            map=layout.map,
            seed=layout.seed,
            sign=layout.sign,
            offset=layout.offset,
            align=layout.align,
            scale=scale,
        )
        return y if bias is None else y + bias

    def sharing_map(self, inputs: int) -> SharingMap:
        """The map of a layer with ``inputs`` inputs; its `geometry` belongs into saved files."""
        return _map_of(self.layout(inputs))


def _map_of(layout: TileGeometry) -> SharingMap:
    make = tile_map if layout.map == "tile" else fold_map
    return make(
        layout.rows,
        layout.columns,
        layout.budget,
        tile=layout.tile,
        seed=layout.seed,
        sign=layout.sign,
        offset=layout.offset,
        align=layout.align,
    )


class RoastConv(_Roast):
    """`flax.linen.Conv` whose kernel lies in tiles of a memory.

    The kernel is the virtual matrix of ``inputs / groups * prod(kernel_size)`` rows, channel by channel, and
    ``features`` columns. Blocks of input channels of at most 512 rows are expanded, convolved with, and
    forgotten, forward and backward; with groups, whose kernels are small, the whole.

    Attributes:
        features: output channels.
        kernel_size: one size a spatial dimension.
        tile: as in `RoastDense`.
        strides, padding, input_dilation, kernel_dilation, feature_group_count, use_bias, bias_init: as in
            `flax.linen.Conv`; padding is ``"SAME"``, ``"VALID"``, an int, or an int or a pair a dimension.

    Raises:
        TypeError, ValueError: as `RoastDense`; for channels that the groups do not divide, or another padding.
    """

    features: int
    kernel_size: int | Sequence[int]
    tile: tuple[int, int] = (32, 32)
    strides: int | Sequence[int] = 1
    padding: str | int | Sequence[Any] = "SAME"
    input_dilation: int | Sequence[int] = 1
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    use_bias: bool = True
    bias_init: Initializer = nn.initializers.zeros_init()

    def _window(self) -> tuple[int, ...]:
        return (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)

    def layout(self, channels: int) -> TileGeometry:
        """The geometry of a convolution of ``channels`` input channels."""
        rows = channels // self.feature_group_count * math.prod(self._window())
        return self.geometry_of(rows, self.features, self.tile)

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch_spatial_channels"]) -> Float[Array, "*batch_spatial_features"]:
        window = self._window()
        spatial, groups = len(window), self.feature_group_count
        channels = x.shape[-1]
        if x.ndim < spatial + 1:
            raise ValueError(f"x has shape {x.shape}; kernel_size {window} asks for {spatial + 1} axes at least")
        if channels % groups or self.features % groups:
            raise ValueError(
                f"feature_group_count is {groups}; it must divide the {channels} input channels and "
                f"features = {self.features}"
            )
        layout = self.layout(channels)
        memory, scale = self._weights(layout.budget, layout.rows**-0.5)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, memory, bias = promote_dtype(x, memory, bias, dtype=self.dtype)
        images = jnp.asarray(x).reshape(-1, *x.shape[-spatial - 1 :])
        y = self._convolve(images, memory * jnp.asarray(scale, memory.dtype), layout, window)
        y = y.reshape(*x.shape[: -spatial - 1], *y.shape[1:])
        return y if bias is None else y + bias

    def _convolve(self, images: Array, memory: Array, layout: TileGeometry, window: tuple[int, ...]) -> Array:
        sharing, spatial = _map_of(layout), len(window)
        letters = "".join(chr(ord("a") + i) for i in range(spatial))
        options: dict[str, Any] = {
            "window_strides": _each(self.strides, spatial, "strides"),
            "padding": _padding(self.padding, spatial),
            "lhs_dilation": _each(self.input_dilation, spatial, "input_dilation"),
            "rhs_dilation": _each(self.kernel_dilation, spatial, "kernel_dilation"),
            "feature_group_count": self.feature_group_count,
            "dimension_numbers": (f"N{letters}C", f"I{letters}O", f"N{letters}C"),
        }
        channels = layout.rows // math.prod(window)
        block = channels if self.feature_group_count > 1 else min(channels, max(1, STRIP // math.prod(window)))

        @jax.checkpoint
        def of_block(memory: Array, part: Array, first: Array | int) -> Array:
            rows = first * np.uint32(math.prod(window)) + np.arange(block * math.prod(window), dtype=np.uint32)
            kernel = sharing.expand_rows(memory, rows).reshape(block, *window, layout.columns)
            return lax.conv_general_dilated(part, kernel, preferred_element_type=jnp.float32, **options)

        if block == channels:
            return of_block(memory, images, np.uint32(0)).astype(images.dtype)
        # Channels beyond the last are zeros: what their rows hold, beyond the matrix, counts for nothing.
        count = -(-channels // block)
        padded = jnp.pad(images, [(0, 0)] * (spatial + 1) + [(0, count * block - channels)])

        def add(total: Array, first: Array) -> tuple[Array, None]:
            part = lax.dynamic_slice_in_dim(padded, first.astype(jnp.int32), block, axis=-1)
            return total + of_block(memory, part, first), None

        shape = jax.eval_shape(of_block, memory, padded[..., :block], np.uint32(0))
        # Zeros that vary over the same axes of a mesh as what is added to them.
        start = jnp.zeros(shape.shape, shape.dtype) + 0 * (images.reshape(-1)[0] + memory[0]).astype(jnp.float32)
        firsts = jnp.arange(count, dtype=jnp.uint32) * np.uint32(block)
        return lax.scan(add, start, firsts)[0].astype(images.dtype)


def _each(value: int | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    values = (value,) * count if isinstance(value, int) else tuple(value)
    if len(values) != count:
        raise ValueError(f"{name} is {value!r}; it must be an int, or one for each of {count} dimensions")
    return values


def _padding(padding: Any, count: int) -> str | list[tuple[int, int]]:
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"padding is {padding!r}; it must be 'SAME', 'VALID', ints or pairs of ints")
        return padding
    sides = [padding] * count if isinstance(padding, int) else list(padding)
    if len(sides) != count:
        raise ValueError(f"padding is {padding!r}; it must have one entry for each of {count} dimensions")
    return [(side, side) if isinstance(side, int) else (int(side[0]), int(side[1])) for side in sides]


class RoastEmbed(_Roast):
    """`flax.linen.Embed` whose table lies in a memory, in blocks of ``tile[1]`` coordinates of a row.

    With ``map="tile"`` it is ROBE in a memory that dense layers and convolutions share; with ``"fold"`` rows lie
    where the fold of the model has them.

    Attributes:
        num_embeddings: rows of the virtual table.
        features: coordinates of a row.
        tile: ``(1, Z)``.

    Raises:
        TypeError, ValueError: as `RoastDense`; for a tile of several rows, or ids that are no integers.
    """

    num_embeddings: int
    features: int
    tile: tuple[int, int] = (1, 32)

    def sharing_map(self) -> SharingMap:
        """The map of the table."""
        if self.tile[0] != 1:
            raise ValueError(f"tile is {self.tile}; an embedding's is (1, Z), a block of one row")
        block_size = min(self.tile[1], self.features)
        layout = self.geometry_of(self.num_embeddings, self.features, (1, block_size))
        if layout.map == "fold":
            return _map_of(layout)
        sign = "block" if layout.sign == "tile" else layout.sign
        blocks = block_map(
            self.num_embeddings,
            self.features,
            layout.budget,
            block_size=block_size,
            seed=layout.seed,
            sign=sign,
            align=layout.align,
        )
        return _moved(blocks, layout.offset)

    @nn.compact
    def _table(self) -> tuple[SharingMap, Array]:
        """The map, and the memory at the table's scale."""
        check_positive(num_embeddings=self.num_embeddings, features=self.features)
        sharing = self.sharing_map()
        memory, scale = self._weights(sharing.budget, self.features**-0.5)
        (memory,) = promote_dtype(memory, dtype=self.dtype, inexact=False)
        return sharing, memory if scale == 1.0 else memory * jnp.asarray(scale, memory.dtype)

    def __call__(self, ids: Integer[AnyArray, "*batch"]) -> Float[Array, "*batch {self.features}"]:
        """Rows of the table; ids outside it give rows of NaN and no gradient, as with `flax.linen.Embed`."""
        sharing, memory = self._table()
        inside = ids_inside(ids, self.num_embeddings)
        rows = sharing.expand_rows(memory, row_words(ids))
        return rows if inside is None else jnp.where(inside[..., None], rows, jnp.nan)

    def attend(
        self, query: Float[AnyArray, "*batch {self.features}"]
    ) -> Float[Array, "*batch {self.num_embeddings}"]:
        """Inner products of ``query`` with all rows of the table, as in `flax.linen.Embed`."""
        sharing, memory = self._table()
        query, memory = promote_dtype(query, memory, dtype=self.dtype)
        return virtual_matmul(query, memory, sharing)


def _moved(sharing: SharingMap, offset: int) -> SharingMap:
    """A map whose row ``i`` is row ``offset + i`` of ``sharing``."""
    if offset == 0:
        return sharing
    limbs = split64(offset)

    def at(ids: Any) -> bits.Limbs:
        words = bits.as_words(ids)
        return bits.add64(bits.Limbs(words * np.uint32(0) + limbs.hi, words), bits.Limbs(np.uint32(0), limbs.lo))

    return sharing._replace(
        expand_rows=lambda memory, ids: sharing.expand_rows(memory, at(ids)),
        pull_rows=lambda gradients, ids: sharing.pull_rows(gradients, at(ids)),
        slots=lambda ids: sharing.slots(at(ids)),
        signs=lambda ids: sharing.signs(at(ids)),
        geometry={**sharing.geometry, "offset": offset},
    )
