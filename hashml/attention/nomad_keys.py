"""NoMAD's codes as the keys of a cache: a row a token, so that any policy may drop any of them.

    spec = LayerSpec(key_codec=NomadKeys(channels=1), rope="write", ...)
    tables = LayerTables(keys={"codebook": nomad_codebooks(key, rotated_keys, channels=1)})

Logits are those of `hashml.attention.nomad.nomad_scores`, from quantised tables. Rows that are replaced one by one
lie in no blocks, so the codes are laid into blocks for every query, and the sums are XLA's: this is what NoMAD does
to a model's answers, and `nomad_attention` what it does to their time.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hashml.attention.nomad import check_channels, encode_keys, nomad_scores, pack_blocks
from hashml.coding import pack, packed_size, product_decode, unpack
from hashml.kvcache import Codec, CodecState


@dataclasses.dataclass(frozen=True)
class NomadKeys(Codec):
    """4-bit codes of keys, ``4 D / channels`` bits a key; parameters are ``{"codebook": [H, S, 16, channels]}``.

    Attributes:
        channels: neighbouring coordinates that share a code; they divide the head's width.

    Raises:
        ValueError: for less than one channel.
    """

    channels: int = 1

    def __post_init__(self) -> None:
        check_channels(self.channels, self.channels)

    @property
    def space(self) -> Literal["post_rope"]:
        return "post_rope"

    @property
    def keys_only(self) -> bool:
        return True

    @property
    def roles(self) -> dict[str, Literal["payload", "scales", "index"]]:
        return {"code": "payload"}

    def check(self, head_dim: int) -> None:
        check_channels(self.channels, head_dim)

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        row = packed_size(head_dim // self.channels, 4)
        return CodecState({"code": jnp.zeros((batch, heads, slots, row), jnp.uint8)}, {})

    def quantise(self, params: Any, fixed: dict[str, Array], x: Array, valid: Array) -> dict[str, Array]:
        del fixed, valid
        return {"code": pack(encode_keys(x, params["codebook"]), 4)}

    def decode(self, params: Any, state: CodecState) -> Float[Array, "B H C D"]:
        book = params["codebook"].astype(jnp.float32)
        codes = unpack(state.slots["code"], 4, book.shape[1]).astype(jnp.int32)
        return jax.vmap(jax.vmap(product_decode), in_axes=(0, None))(codes, book)

    def logits(self, params: Any, state: CodecState, q: Array, rotate: Any) -> Float[Array, "B H J n C"]:
        del rotate  # keys are stored rotated
        batch, heads, group, count, width = q.shape
        book = params["codebook"]
        blocks = pack_blocks(unpack(state.slots["code"], 4, book.shape[1]))
        queries = q.reshape(batch, heads * group * count, width)
        found = nomad_scores(queries, blocks, book, implementation="xla")[..., : state.slots["code"].shape[2]]
        return found.reshape(batch, heads, group, count, -1)
