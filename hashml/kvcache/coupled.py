"""CQ: coupled quantisation of the cache, down to one bit a channel (Zhang, Yi, Xu, Shrivastava, NeurIPS 2024,
arXiv 2405.03917).

Channels of a head depend on each other, so that ``channels`` neighbours (c) together need fewer bits than one by one:
they share one code of ``bits`` bits (b), which names a centroid of a codebook of their own.

    code[i] = argmin_j ||x[i c : (i + 1) c] - codebook[head, i, j]||^2,  ties to the smaller j
    x^[i c : (i + 1) c] = codebook[head, i, code[i]]

``b / c`` bits a value are stored: CQ-2c8b is 4 bits, CQ-4c8b 2, CQ-8c8b 1, CQ-8c10b 1.25. Keys are coded before
rotation and rotated at their positions when they are read; books are learned by k-means from calibration data
weighted by the gradient of the loss (Fisher), in `hashml.kvcache.calibration`, and the weights play no part in
encoding.

Codebooks are parameters, ``{"codebook": float16 [H, D / c, 2**b, c]}`` a layer, of which a model has one copy; on toy
models they outweigh the cache. What is here is the definition, for which XLA forms the decoded keys; where a large
store is read on a GPU or a TPU, `hashml.kvcache.fused` reads the codes themselves.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hashml.coding.bit_packing import pack, packed_size, unpack
from hashml.coding.product_codebooks import product_encode
from hashml.kvcache.contract import Codec, CodecState, Role, Space, check_shapes


@dataclasses.dataclass(frozen=True)
class Coupled(Codec):
    """CQ-<c>c<b>b, for keys before rotation and for values.

    A NaN is nearest to nothing: its group gets the first centroid, finite, and nobody sees that it was there.

    Attributes:
        channels: neighbours that share a code, c; they divide the head's width.
        bits: of a code, b, 1 to 16; codes are packed to the bit.
        histogram: whether `weighted_sum` first adds up the probability of each centroid; equal up to rounding, and
            less arithmetic than a gather where there are more slots than centroids.

    Raises:
        ValueError: for other values.
    """

    channels: int
    bits: int
    histogram: bool = dataclasses.field(default=False, repr=False)  # codebooks are of the same codec either way

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels is {self.channels}; it must be at least 1")
        if not 1 <= self.bits <= 16:
            raise ValueError(f"bits is {self.bits}; allowed are 1 to 16")

    @classmethod
    def named(cls, name: str) -> "Coupled":
        """The codec of the paper's name: ``"8c8b"``, or ``"CQ-8c8b"``.

        Raises:
            ValueError: for another text.
        """
        found = re.fullmatch(r"(?:CQ-)?(\d+)c(\d+)b", name)
        if found is None:
            raise ValueError(f"name is {name!r}; allowed are channels and bits, as in '8c8b' or 'CQ-8c8b'")
        return cls(int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        return f"CQ-{self.channels}c{self.bits}b"

    @property
    def space(self) -> Space:
        return "pre_rope"

    @property
    def roles(self) -> dict[str, Role]:
        return {"code": "payload"}

    def check(self, head_dim: int) -> None:
        if head_dim % self.channels:
            raise ValueError(f"channels is {self.channels}; it must divide the head's width, {head_dim}")

    def check_tables(self, params: Any, heads: int, head_dim: int) -> None:
        shape = (heads, head_dim // self.channels, 2**self.bits, self.channels)
        check_shapes(self.name, params, {"codebook": shape})

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        row = packed_size(head_dim // self.channels, self.bits)
        return CodecState({"code": jnp.zeros((batch, heads, slots, row), jnp.uint8)}, {})

    def quantise(self, params: Any, fixed: dict[str, Array], x: Array, valid: Array) -> dict[str, Array]:
        del fixed, valid
        books, _ = self._books(params)
        if books.shape[-3] * self.channels != x.shape[-1]:
            raise ValueError(f"x has width {x.shape[-1]}; the codebook is of {books.shape[-3]} groups of "
                             f"{self.channels} channels")  # fmt: skip
        batch, heads, tokens, width = x.shape
        if books.ndim == 4:  # one book for all rows: their tokens in one line
            line = x.transpose(1, 0, 2, 3).reshape(heads, batch * tokens, width)
            codes = jax.vmap(product_encode)(line, books)
            codes = codes.reshape(heads, batch, tokens, codes.shape[-1]).transpose(1, 0, 2, 3)
        else:
            codes = jax.vmap(jax.vmap(product_encode))(x, books)
        return {"code": pack(codes, self.bits)}

    def decode(self, params: Any, state: CodecState) -> Float[Array, "B H C D"]:
        book, groups = self._books(params, gather=False)
        codes = self._codes(state, groups.shape[-1])
        heads = jnp.arange(book.shape[0])[:, None, None]
        parts = book[heads, groups[..., None, :], codes].astype(jnp.float32)
        return parts.reshape(*codes.shape[:-1], groups.shape[-1] * self.channels)

    def weighted_sum(
        self, params: Any, state: CodecState, probs: Float[Array, "B H J n C"]
    ) -> Float[Array, "B H J n D"]:
        if not self.histogram:
            return super().weighted_sum(params, state, probs)
        books, groups = self._books(params)
        codes = self._codes(state, groups.shape[-1])
        batch, heads, _, count = codes.shape
        lines = probs.astype(jnp.float32).reshape(batch, heads, -1, probs.shape[-1]).swapaxes(-1, -2)

        def mass(code: Array, line: Array) -> Array:
            return jax.ops.segment_sum(line, code, 2**self.bits)

        over_groups = jax.vmap(mass, in_axes=(1, None))
        histogram = jax.vmap(jax.vmap(over_groups))(codes, lines)
        books = jnp.broadcast_to(books, (batch, *books.shape[-4:])).astype(jnp.float32)
        out = jnp.einsum("bhgkm,bhgkc->bhmgc", histogram, books)
        return out.reshape(*probs.shape[:-1], count * self.channels)

    def _codes(self, state: CodecState, groups: int) -> Int[Array, "B H C G"]:
        return unpack(state.slots["code"], self.bits, groups).astype(jnp.int32)

    def _books(self, params: Any, *, gather: bool = True) -> tuple[Array, Array]:
        """``(codebook [H, G, K, c], groups)``: the book, or a row's own groups of it ``[B, H, G', K, c]``.

        ``params["groups"]``, int ``[B, H, G']``, names the groups that are stored at all (see
        `hashml.kvcache.think`); without it they are all.
        """
        book = params["codebook"]
        if book.ndim != 4 or book.shape[2:] != (2**self.bits, self.channels):
            raise ValueError(f"codebook is of shape {book.shape}; {self.name} needs [heads, groups, {2**self.bits}, "
                             f"{self.channels}]")  # fmt: skip
        groups = params.get("groups")
        if groups is None:
            return book, jnp.arange(book.shape[1])[None]
        return (book[jnp.arange(book.shape[0])[:, None], groups] if gather else book), groups
