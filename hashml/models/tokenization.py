"""Text to tokens and back, for the two kinds of tokenizer that come with decoders.

`Llama2cTokenizer` reads the ``tok*.bin`` of llama2.c (SentencePiece BPE, exported): the text, a space before it,
falls into characters, or into bytes where a character has no token; then the adjacent pair whose union is the
best-scored token is merged until there is none. `FolderTokenizer` reads the ``tokenizer.json`` of a Hugging Face
folder by the library ``tokenizers``.

Both write text *incrementally*: a character of UTF-8 may be spread over tokens, so a `TextStream` holds back what may
be the beginning of one. What it has written stays, also where a ``tokenizer.json`` would afterwards read a whole run
of bytes as U+FFFD because of one more byte that is no UTF-8.
"""

import codecs
import heapq
import importlib
import os
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hashml.exchange import ExchangeError


@runtime_checkable
class TextStream(Protocol):
    """Writes tokens as they come."""

    def push(self, token: int) -> str:
        """The text that ``token`` completes, perhaps none."""
        ...

    def finish(self) -> str:
        """What was held back, bytes that are no UTF-8 as U+FFFD."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """What `hashml.generate` needs."""

    bos: int | None
    """The token a text begins with, if there is one."""
    stops: tuple[int, ...]
    """The tokens that end a text."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with whatever the model wants before it."""
        ...

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        """Writes what follows the tokens ``before``, whose text was already written."""
        ...


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The text of ``tokens``."""
    stream = tokenizer.stream()
    return "".join([stream.push(token) for token in tokens]) + stream.finish()


# --- llama2.c -------------------------------------------------------------------------------------


class Llama2cTokenizer:
    """The byte-fallback BPE of llama2.c: token 0 is unknown, 1 begins and 2 ends a text, 3 + b is the byte b.

    Args:
        pieces: bytes of each token, ``<0x0A>`` for a byte alone.
        scores: of each token; the best is merged first.

    Raises:
        ValueError: for fewer tokens than the 259 that every such vocabulary has.
    """

    def __init__(self, pieces: Sequence[bytes], scores: Sequence[float]) -> None:
        if len(pieces) < 259 or len(scores) != len(pieces):
            raise ValueError(
                f"pieces and scores have {len(pieces)} and {len(scores)} entries; they are as many, at least 259"
            )
        self.bos: int | None = 1
        # A new story begins where one ends: the models were trained on texts behind each other.
        self.stops: tuple[int, ...] = (1, 2)
        self.pieces = [_text_of(token, piece) for token, piece in enumerate(pieces)]
        self._scores = list(scores)
        self._ids: dict[bytes, int] = {}
        for token, piece in enumerate(pieces):
            self._ids.setdefault(piece, token)

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """BOS, then the tokens of ``text`` behind a space; of an empty text BOS alone."""
        if not text:
            return [1]
        tokens: list[int] = []
        for character in " " + text:
            raw = character.encode("utf-8", "surrogateescape")
            known = self._ids.get(raw)
            tokens.extend([3 + byte for byte in raw] if known is None else [known])
        return [1, *self._merged(tokens)]

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        """Writes what follows ``before``; behind BOS, a leading space is dropped."""
        return _ByteStream(self, before[-1] if before else 1)

    def _merged(self, tokens: list[int]) -> list[int]:
        """Merges the best-scored pair, the leftmost of equals, until none is a token. O(n log n) by a heap."""
        spelled = [self._spelling(token) for token in tokens]
        after = [*range(1, len(tokens)), -1]
        before = list(range(-1, len(tokens) - 1))
        heap: list[tuple[float, int, int, bytes]] = []

        def offer(left: int) -> None:
            if left >= 0 and after[left] >= 0:
                union = spelled[left] + spelled[after[left]]
                if union in self._ids:
                    heapq.heappush(heap, (-self._scores[self._ids[union]], left, after[left], union))

        for left in range(len(tokens)):
            offer(left)
        while heap:
            _, left, right, union = heapq.heappop(heap)
            if after[left] != right or spelled[left] + spelled[right] != union:
                continue  # one of the two has since been merged otherwise
            spelled[left], tokens[left] = union, self._ids[union]
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            spelled[right], after[right] = b"", -2
            offer(before[left])
            offer(left)
        place, merged = 0, []
        while place >= 0:
            merged.append(tokens[place])
            place = after[place]
        return merged

    def _spelling(self, token: int) -> bytes:
        """As merges see it: a byte token is spelled ``<0x0A>`` and so takes part in none."""
        return b"<0x%02X>" % (token - 3) if 3 <= token < 259 else self.pieces[token]


class _ByteStream:
    def __init__(self, tokenizer: Llama2cTokenizer, last: int) -> None:
        self._pieces, self._last = tokenizer.pieces, last
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        piece = b"" if token in (1, 2) else self._pieces[token]
        if self._last == 1:
            piece = piece.removeprefix(b" ")
        self._last = token
        return self._decoder.decode(piece)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _text_of(token: int, piece: bytes) -> bytes:
    byte = re.fullmatch(rb"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte and 3 <= token < 259 else piece


def load_llama2c_tokenizer(path: str | os.PathLike[str], vocabulary: int | None = None) -> Llama2cTokenizer:
    """Reads a ``tok*.bin``: int32 longest length, then per token float32 score, int32 length, bytes.

    Args:
        path: the file.
        vocabulary: tokens that it must have: those of the model.

    Raises:
        ExchangeError: if the file is damaged, or has another number of tokens.
        FileNotFoundError: if there is no such file.
    """
    content = Path(path).read_bytes()
    if len(content) < 4:
        raise ExchangeError(
            f"{path} has {len(content)} bytes; a llama2.c tokenizer begins with 4 of the longest length"
        )
    longest = struct.unpack_from("<i", content)[0]
    place, pieces, scores = 4, [], []
    while place < len(content):
        length = struct.unpack_from("<i", content, place + 4)[0] if place + 8 <= len(content) else 0
        if not 0 <= length <= longest or place + 8 + length > len(content):
            raise ExchangeError(
                f"{path}: token {len(pieces)}, at byte {place} of {len(content)}, does not fit: it has length "
                f"{length} where the longest is {longest}; the file was cut short or is no llama2.c tokenizer"
            )
        scores.append(struct.unpack_from("<f", content, place)[0])
        pieces.append(content[place + 8 : place + 8 + length])
        place += 8 + length
    if vocabulary is not None and len(pieces) != vocabulary:
        raise ExchangeError(f"{path} has {len(pieces)} tokens; the model has a vocabulary of {vocabulary}")
    if len(pieces) < 259:
        raise ExchangeError(f"{path} has {len(pieces)} tokens; a llama2.c tokenizer has at least 259")
    return Llama2cTokenizer(pieces, scores)


# --- Hugging Face ---------------------------------------------------------------------------------


class FolderTokenizer:
    """A ``tokenizer.json``, with the special tokens that the folder's configuration names.

    Args:
        tokenizer: of the library ``tokenizers``; its own truncation and padding are turned off.
        bos: as `Tokenizer.bos`; only an empty text begins with it unless the file itself adds one.
        stops: as `Tokenizer.stops`.
    """

    def __init__(self, tokenizer: Any, bos: int | None, stops: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.bos = bos
        self.stops = tuple(stops)

    @property
    def vocabulary(self) -> int:
        """Number of tokens, the added ones included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """As the file's own rules say, BOS included; an empty text is BOS alone, if there is one."""
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        tokens = list(self._tokenizer.encode(text).ids)
        return tokens or ([] if self.bos is None else [self.bos])

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        """Writes what follows ``before``."""
        return _DifferenceStream(lambda tokens: self._tokenizer.decode(tokens, skip_special_tokens=True), before)


_NEAR, _FAR = 8, 64
"""Tokens that stay as a neighbourhood, at least and at most."""
_UNKNOWN = "\ufffd"


class _DifferenceStream:
    """The text of a token is how the text of its neighbourhood grows by it: pieces alone lose their spaces."""

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int]) -> None:
        self._decode = decode
        self._tokens, self._written = self._neighbourhood(list(before))
        self._silent = 0

    def push(self, token: int) -> str:
        self._tokens.append(token)
        self._silent += 1
        text = self._decode(self._tokens)
        # What is unknown at the end may be a character that the next tokens complete; after so many, only its last.
        held = len(text) - len(text.rstrip(_UNKNOWN))
        stop = len(text) - (held if self._silent <= _NEAR else min(held, 1))
        new = text[self._written : stop]
        if new:
            self._written, self._silent = stop, 0
        # Without the other tokens, a text costs linear time.
        if len(self._tokens) >= (2 * _NEAR if new else _FAR):
            waiting = len(text) - self._written
            self._tokens, length = self._neighbourhood(self._tokens)
            self._written = max(0, length - waiting)
        return new

    def finish(self) -> str:
        text = self._decode(self._tokens)
        new, self._written = text[self._written :], len(text)
        return new

    def _neighbourhood(self, tokens: list[int]) -> tuple[list[int], int]:
        """The fewest last tokens that read alone as they read behind the others, which those behind half a character
        do not, and the length of their text."""
        text = self._decode(tokens)
        for count in range(_NEAR, min(len(tokens), _FAR)):
            part = self._decode(tokens[-count:])
            if not part.startswith(_UNKNOWN) and part.strip(_UNKNOWN) and text.endswith(part):
                return tokens[-count:], len(part)
        last = tokens if len(tokens) < _FAR else tokens[-_NEAR:]
        return last, len(self._decode(last))


def load_folder_tokenizer(
    path: str | os.PathLike[str], bos: int | None = None, stops: Sequence[int] = ()
) -> FolderTokenizer:
    """Reads a ``tokenizer.json``.

    Raises:
        ImportError: if the library ``tokenizers`` is not installed.
        ExchangeError: if the file cannot be read by it.
        FileNotFoundError: if there is no such file.
    """
    content = Path(path).read_bytes()
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError as error:
        raise ImportError(f"{path} needs the library tokenizers; install it by: pip install tokenizers") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception and ValueError
        raise ExchangeError(f"{path} is damaged or no tokenizer.json: {error}") from error
    return FolderTokenizer(tokenizer, bos, stops)


def load_tokenizer(
    path: str | os.PathLike[str], *, vocabulary: int | None = None, bos: int | None = None, stops: Sequence[int] = ()
) -> Tokenizer:
    """A tokenizer of either kind: ``*.json``, a folder with ``tokenizer.json``, else the file of llama2.c.

    Args:
        path: the file or folder.
        vocabulary: of the model; a llama2.c tokenizer must agree with it.
        bos: special tokens of a ``tokenizer.json``, which does not name them itself.
        stops: likewise.

    Raises:
        ExchangeError, ImportError, FileNotFoundError: as the two readers do.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if file.suffix == ".json":
        return load_folder_tokenizer(file, bos, stops)
    return load_llama2c_tokenizer(file, vocabulary)
