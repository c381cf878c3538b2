"""Facts spread over the chunks of a context, and questions whose answer stands in exactly one of them.

A context is ``PASSAGES`` passages of ``LENGTH`` tokens, each about a subject of its own: two facts within one block
of 4 tokens, so that chunks of 4, 8 and 16 tokens never part them, in any order, and filler elsewhere. A fact is one
token, "attribute a of subject s has value v": models of this size, which learn in seconds, know no grammar. A
question is four tokens,

    ASK[s, 0]  value  ASK[s, 1]  value

and the two values are what is scored: both right is an answer. Values are drawn anew for each context, nothing in the
question or in the filler tells them, and every passage is as likely to be asked for.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from experiments.data.counter import uniform

PASSAGES, LENGTH = 8, 16
CONTEXT = PASSAGES * LENGTH
SUBJECTS, VALUES, FILLERS = 8, 8, 8
REPEAT = 0
"""Asks for the tokens of the context again."""
ASK = 1
"""First of the questions, two a subject."""
VALUE = ASK + 2 * SUBJECTS
"""First of the values, those of the first attribute and then those of the second."""
FACT = VALUE + 2 * VALUES
"""First of the facts: a subject's of the first attribute by value, then of the second, then the next subject's."""
FILLER = FACT + 2 * SUBJECTS * VALUES
VOCABULARY = FILLER + FILLERS
QUESTION = 4
"""Tokens of a question with its answer."""


class Contexts(NamedTuple):
    """Contexts with questions about them."""

    context: Int32[np.ndarray, "N s"]
    asked: Int32[np.ndarray, "N Q"]
    """The passage that each question is about."""
    tail: Int32[np.ndarray, "N 4*Q"]
    """The questions with their answers."""

    @property
    def weight(self) -> Float32[np.ndarray, "N _"]:
        """1 at the values among the tokens of the tail behind the first."""
        places = np.tile(np.array([0, 1, 0, 1], np.float32), self.asked.shape[1])[1:]
        return np.broadcast_to(places, self.tail[:, 1:].shape)


def contexts(count: int, key: int, *, questions: int = 1, passages: int = PASSAGES, first: int = 0) -> Contexts:
    """Contexts ``first`` to ``first + count`` of a stream of `experiments.data.counter`.

    Args:
        count: contexts.
        key: of the stream.
        questions: about each context, on different passages.
        passages: of a context.
        first: of the stream.

    Raises:
        ValueError: for a count below 1, or more questions or passages than there are.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it is at least 1")
    if not 1 <= passages <= SUBJECTS:
        raise ValueError(f"passages is {passages}; it is from 1 to {SUBJECTS}, the subjects there are")
    if not 1 <= questions <= passages:
        raise ValueError(f"questions is {questions}; it is from 1 to the {passages} passages")
    sizes = np.cumsum([passages * LENGTH, SUBJECTS, 2 * passages, passages, 4 * passages, passages])
    rows = np.arange(first, first + count)[:, None]
    draws = uniform(key, rows * sizes[-1] + np.arange(sizes[-1]))
    filler, subject, value, block, slots, order = np.split(draws, sizes[:-1], axis=1)
    tokens = (FILLER + (filler * FILLERS).astype(np.int32)).reshape(count, passages, LENGTH)
    subjects = np.argsort(subject, axis=1)[:, :passages]
    values = (value * VALUES).astype(int).reshape(count, passages, 2)
    facts = FACT + (2 * subjects[:, :, None] + np.arange(2)) * VALUES + values
    at = np.argsort(slots.reshape(count, passages, 4), axis=2)[:, :, :2]
    at += 4 * (block * (LENGTH // 4)).astype(int)[:, :, None]
    np.put_along_axis(tokens, at, facts.astype(np.int32), axis=2)
    asked = np.argsort(order, axis=1)[:, :questions]
    who, said = np.take_along_axis(subjects, asked, axis=1), np.take_along_axis(values, asked[:, :, None], axis=1)
    asks, answers = ASK + 2 * who[:, :, None] + np.arange(2), VALUE + VALUES * np.arange(2) + said
    tail = np.stack([asks, answers], axis=3).reshape(count, -1)
    return Contexts(tokens.reshape(count, -1), asked.astype(np.int32), tail.astype(np.int32))
