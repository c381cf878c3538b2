"""Several LMA tables over one memory (Desai, Pan, Sun, Chou, Shrivastava 2021, arXiv 2103.06124).

The rows of all tables are numbered through as in `hashml.sharing.robe_tables`, and so are their signatures
(`hashml.sharing.lma_signatures.sample_signatures`): what occurs together shares, whatever its table.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from hashml.hashing import Limbs
from hashml.sharing.budgets import check_positive
from hashml.sharing.hashed_net import uniform_init
from hashml.sharing.lma import LmaGeometry, lma_lookup, memory_budget, stored_words
from hashml.sharing.lma_signatures import Signatures, check_signatures
from hashml.sharing.robe import Ids
from hashml.sharing.robe_tables import check_tables, global_rows


class LmaTables(nn.Module):
    """Rows of ``T`` virtual tables that share one memory of ``budget`` weights, each value with a signature.

    Attributes:
        num_embeddings: rows of each table.
        features: coordinates of a row, one number or one a table.
        signatures: of all rows, one table after another (`sample_signatures`). They are a variable, and
            `stored_bytes` of the variables counts their 8 bytes a row.
        budget: weights in the memory, the signatures not counted, or
        compression: bytes of all full tables over all bytes stored, the signatures counted.
        block_size, keys_to_use, seed: as in `LmaGeometry`. There is one seed: tables share on purpose.
        dtype, param_dtype: as in `flax.linen.Embed`.
        embedding_init: initialiser of the memory; by default that of `RobeTables`, uniform on +- 1 / sqrt(rows
            of the largest table). The reference code has +- 1 / sqrt(features).

    Raises:
        ValueError: for no tables, features of another number than tables, another number of signatures than
            rows, or a size or budget out of range.
        TypeError: where a size is no int, or signatures are no `Signatures`; when called with ids that are
            no integers.
    """

    num_embeddings: Sequence[int]
    features: int | Sequence[int]
    signatures: Signatures
    budget: int | None = None
    compression: float | int | None = None
    block_size: int = 1
    keys_to_use: int = 8
    seed: int = 0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    embedding_init: Initializer | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each table."""
        if isinstance(self.features, Sequence):
            return tuple(self.features)
        return (self.features,) * len(self.num_embeddings)

    def geometry(self) -> dict[str, Any]:
        """What determines the map, as JSON values, the signatures by their checksum: save it with the parameters."""
        check_tables(self.num_embeddings)
        sizes, widths = [int(size) for size in self.num_embeddings], self.widths
        if len(widths) != len(sizes):
            raise ValueError(f"features has {len(widths)} entries; there are {len(sizes)} tables")
        for width in widths:
            check_positive(features=width, block_size=self.block_size)
        check_signatures(self.signatures, sum(sizes))
        budget = memory_budget(
            sum(size * int(width) for size, width in zip(sizes, widths, strict=True)),
            sum(sizes),
            budget=self.budget,
            compression=self.compression,
            block_size=self.block_size,
            param_dtype=self.param_dtype,
        )
        layout = LmaGeometry(
            budget, max(widths), self.block_size, self.keys_to_use, self.signatures.key_bits, self.seed
        )
        return {
            "map": "lma_tables",
            "num_embeddings": sizes,
            "features": [int(width) for width in widths],
            "budget": budget,
            "block_size": layout.block_size,
            "keys_to_use": layout.keys_to_use,
            "key_bits": layout.key_bits,
            "seed": layout.seed,
            "signatures": self.signatures.checksum,
        }

    @nn.compact
    def __call__(self, ids: Ids) -> Float[Array, "*batch T D"] | tuple[Array, ...]:
        """Rows ``[*batch, T, D]``, or one array ``[*batch, D_t]`` a table where the widths differ.

        ``ids[..., t]`` is an id of table ``t``; one outside its table gives a row of NaN.
        """
        geometry = self.geometry()
        init = self.embedding_init or uniform_init((3 * max(self.num_embeddings)) ** -0.5)
        memory = self.param("memory", init, (geometry["budget"],), self.param_dtype)
        (memory,) = promote_dtype(memory, dtype=self.dtype, inexact=False)
        words = stored_words(self, self.signatures)
        rows, inside = global_rows(ids, self.num_embeddings)
        # Fewer than 2**31 rows have signatures: only an id that is outside has a high limb.
        low = rows.lo if isinstance(rows, Limbs) else rows
        rows = jnp.where(inside, low, sum(self.num_embeddings))  # which has no signature: its row is NaN
        common = {name: geometry[name] for name in ("block_size", "keys_to_use", "key_bits", "seed")}
        if len(set(self.widths)) == 1:
            return lma_lookup(memory, words, rows, features=self.widths[0], **common)
        return tuple(
            lma_lookup(memory, words, rows[..., t], features=width, **common) for t, width in enumerate(self.widths)
        )
