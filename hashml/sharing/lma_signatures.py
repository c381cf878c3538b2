"""The signatures of LMA's values: 64 bits that say with whom a value shares (Desai et al. 2021, arXiv 2103.06124).

``D_v`` holds the training samples that contain value ``v``, of whatever table; its MinHash keys are the
signature of ``v`` (`hashml.hashing.minhash`). A sample has one value of each table, so that the sets of one
table are disjoint: what comes to share are values of different tables that occur together.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt32

from hashml.hashing.minhash import key_count, minhash, pack_signatures
from hashml.sharing.maps import AnyArray
from hashml.sharing.robe_tables import check_tables


class Signatures:
    """The signatures of a table's values, as a value: modules that hold equal ones are equal.

    So a module may be a static argument of `jax.jit`. Pass it on, rather than the array.

    Attributes:
        words: uint32 ``[values, 2]``, not to be written to.
        key_bits: bits of a key in them.
        checksum: SHA-256 of both.

    Raises:
        TypeError: where words are not uint32, or key_bits is no int.
        ValueError: where words have another shape, or key_bits is out of range.
    """

    def __init__(self, words: UInt32[AnyArray, "values 2"], key_bits: int = 4) -> None:
        key_count(key_bits)
        check_words(words)
        host = np.array(words)
        host.flags.writeable = False
        self.words, self.key_bits = host, int(key_bits)
        head = f"{len(host)} {self.key_bits} ".encode()
        self.checksum = hashlib.sha256(head + host.astype("<u4").tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signatures) and self.checksum == other.checksum

    def __hash__(self) -> int:
        return hash(self.checksum)

    def __repr__(self) -> str:
        return f"Signatures({len(self)} values, key_bits={self.key_bits}, {self.checksum[:8]})"


def sample_signatures(
    ids: Integer[AnyArray, "samples T"],
    num_embeddings: Sequence[int],
    *,
    key_bits: int = 4,
    minimum_support: int = 2,
    seed: int = 0,
) -> Signatures:
    """Signatures of the values of ``T`` tables, one table after another, by the samples that contain them.

    Give training samples alone, and no labels: what is shared must not know the answer.

    Args:
        ids: one row a sample, one column a table; an id outside its table belongs to no set.
        num_embeddings: rows of each table.
        key_bits, minimum_support, seed: as in `pack_signatures`.

    Raises:
        TypeError: for ids that are no integers.
        ValueError: for ids that are not ``[samples, T]``, or sizes out of range.
    """
    check_tables(num_embeddings)
    host = np.asarray(ids)
    if host.ndim != 2 or host.shape[1] != len(num_embeddings):
        raise ValueError(f"ids has shape {host.shape}; it must be [samples, {len(num_embeddings)}], a column a table")
    if not np.issubdtype(host.dtype, np.integer):
        raise TypeError(f"ids has dtype {host.dtype}; it must be an integer type")
    sizes = np.asarray(num_embeddings, np.int64)
    values = np.where((host >= 0) & (host < sizes), host + (np.cumsum(sizes) - sizes), -1).reshape(-1)
    samples = np.repeat(np.arange(len(host), dtype=np.uint32), len(sizes))
    hashes = minhash(values, samples, int(sizes.sum()), key_count(key_bits), seed)
    words = pack_signatures(hashes, key_bits=key_bits, minimum_support=minimum_support, seed=seed)
    return Signatures(words, key_bits)


def check_words(words: AnyArray) -> None:
    """The check of an array of signatures.

    Raises:
        TypeError: where it is not uint32.
        ValueError: where it is not ``[values, 2]``.
    """
    if getattr(words, "dtype", None) != np.uint32:
        raise TypeError(f"signatures has dtype {getattr(words, 'dtype', type(words).__name__)}; it must be uint32")
    if words.ndim != 2 or words.shape[1] != 2 or not 1 <= words.shape[0] < 2**31:
        raise ValueError(f"signatures has shape {words.shape}; it must be [values, 2], of one value at least")


def check_signatures(signatures: Any, values: int) -> None:
    """The check that every module with signatures makes.

    Raises:
        TypeError: for what are no `Signatures`.
        ValueError: for another number of them than values.
    """
    if not isinstance(signatures, Signatures):
        raise TypeError(f"signatures is of type {type(signatures).__name__}; it must be Signatures")
    if len(signatures) != values:
        raise ValueError(f"signatures has {len(signatures)} values; there are {values} rows")
