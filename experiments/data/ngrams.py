"""Bags of hashed n-grams of words and bytes, the input of a linear text classifier.

Joulin et al. (fastText, EACL 2017): a text is the set of its words and n-grams, each hashed to one of
``vocabulary`` rows, and their mean is classified. Nothing is stored but ids.

White space counts as one blank. Words are runs of letters, digits and underscores (bytes beyond
ASCII count as letters); every other mark is a word of its own, as source text needs it. N-grams of
bytes run over the whole text, across words. Hashes are 64-bit arithmetic (see ``counter``), keyed by
``seed`` and the same everywhere: an n-gram of up to eight bytes is hashed as one number, a word as the
sum of its bytes' random numbers times powers of an odd factor, an n-gram of words by mixing in one
word after the other.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt64

from experiments.data.counter import GOLDEN, mix64, numbers, stream

_BLANK = ord(" ")
_FACTOR = np.uint64(0xD1342543DE82EF95)
_WORD_BYTE = np.array([byte >= 128 or chr(byte).isalnum() or byte == ord("_") for byte in range(256)])


@dataclass(frozen=True, eq=False)
class Bags:
    """Bags of ids, one after the other.

    Attributes:
        ids: of all bags; ``ids[offsets[i]:offsets[i + 1]]`` is bag ``i``.
        offsets: from 0 to ``nnz``, not decreasing.
    """

    ids: Int32[np.ndarray, " nnz"]
    offsets: Int32[np.ndarray, " bounds"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def padded(
        self, rows: Int[np.ndarray, " B"], capacity: int
    ) -> tuple[Int32[np.ndarray, "B {capacity}"], Bool[np.ndarray, "B {capacity}"]]:
        """The named bags in one array of fixed width, and which places of it are filled.

        A shorter bag is filled up with id 0, of a longer one ``capacity`` members are kept, evenly
        spaced over it.

        Raises:
            ValueError: ``capacity`` is not positive.
        """
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1")
        starts = self.offsets[rows].astype(np.int64)[:, None]
        lengths = self.offsets[rows + 1].astype(np.int64)[:, None] - starts
        places = np.arange(capacity)[None, :]
        filled = places < lengths
        places = np.where(lengths > capacity, places * lengths // capacity, places)
        ids = np.zeros(filled.shape, dtype=np.int32)
        ids[filled] = self.ids[(starts + places)[filled]]
        return ids, filled


def hashed_ngrams(
    text: str,
    *,
    vocabulary: int = 1 << 20,
    words: tuple[int, int] | None = (1, 2),
    characters: tuple[int, int] | None = (3, 5),
    seed: int = 0,
) -> Int32[np.ndarray, " n"]:
    """Ids of all n-grams of a text, repeated as often as they occur.

    Args:
        text: any text; what cannot be encoded as UTF-8 counts as a question mark.
        vocabulary: ids are below this.
        words: shortest and longest n-gram of words; None for none.
        characters: shortest and longest n-gram of UTF-8 bytes, at most 8; None for none.
        seed: picks the hash function.

    Returns:
        Ids by kind (words, then bytes), by length, then by place in the text.

    Raises:
        ValueError: ``vocabulary`` or a range of lengths is out of bounds.
    """
    if not 1 <= vocabulary <= 2**31:
        raise ValueError(f"vocabulary={vocabulary} must be between 1 and 2**31")
    for name, bounds, most in (("words", words, 1 << 20), ("characters", characters, 8)):
        if bounds is not None and not 1 <= bounds[0] <= bounds[1] <= most:
            raise ValueError(f"{name}={bounds} must be 1 <= shortest <= longest <= {most}")
    data = np.frombuffer(" ".join(text.split()).encode("utf-8", "replace"), dtype=np.uint8)
    hashes = []
    if words is not None:
        hashes += _word_ngrams(data, words, seed)
    if characters is not None:
        hashes += _byte_ngrams(data, characters, seed)
    if not hashes:
        return np.zeros(0, dtype=np.int32)
    # The upper half times the size, upper half of that: a uniform id without a division.
    return ((np.concatenate(hashes) >> np.uint64(32)) * np.uint64(vocabulary) >> np.uint64(32)).astype(np.int32)


def bags(
    texts: Iterable[str],
    *,
    vocabulary: int = 1 << 20,
    words: tuple[int, int] | None = (1, 2),
    characters: tuple[int, int] | None = (3, 5),
    seed: int = 0,
) -> Bags:
    """``hashed_ngrams`` of each text.

    Raises:
        ValueError: as ``hashed_ngrams``, or there are more than 2**31 - 1 n-grams in all.
    """
    parts = [
        hashed_ngrams(text, vocabulary=vocabulary, words=words, characters=characters, seed=seed) for text in texts
    ]
    offsets = np.cumsum([0, *map(len, parts)])
    if offsets[-1] >= 2**31:
        raise ValueError(f"{offsets[-1]} n-grams are more than int32 offsets can count")
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    return Bags(ids, offsets.astype(np.int32))


def _byte_ngrams(data: np.ndarray, lengths: tuple[int, int], seed: int) -> list[UInt64[np.ndarray, " _"]]:
    shortest, longest = lengths
    hashes = []
    packed = np.zeros(len(data) + 1, dtype=np.uint64)
    for length in range(1, min(longest, len(data)) + 1):
        packed = (packed[:-1] << np.uint64(8)) | data[length - 1 :]
        if length >= shortest:
            key = np.uint64(stream(seed, "bytes", length))
            hashes.append(mix64(mix64(packed) ^ key))
    return hashes


def _word_ngrams(data: np.ndarray, lengths: tuple[int, int], seed: int) -> list[UInt64[np.ndarray, " _"]]:
    in_word = _WORD_BYTE[data]
    continues = np.zeros(len(data), dtype=bool)
    continues[1:] = in_word[1:] & in_word[:-1]
    starts = np.flatnonzero((data != _BLANK) & ~continues)
    if starts.size == 0:
        return []
    # Blanks add nothing to the word before them, so each sum may run up to the next word.
    values = numbers(stream(seed, "words"), np.arange(256))
    values[_BLANK] = 0
    place = np.arange(len(data)) - np.repeat(starts, np.diff(starts, append=len(data)))
    powers = np.multiply.accumulate(np.full(int(place.max()) + 1, _FACTOR))
    word = mix64(np.add.reduceat(values[data] * powers[place], starts))
    shortest, longest = lengths
    hashes = []
    ngram = np.zeros(starts.size + 1, dtype=np.uint64)
    for length in range(1, min(longest, starts.size) + 1):
        ngram = mix64(ngram[:-1] * np.uint64(GOLDEN) + word[length - 1 :])
        if length >= shortest:
            hashes.append(mix64(ngram ^ np.uint64(stream(seed, "word n-grams", length))))
    return hashes
