"""Hashed n-grams are those of a plain loop, each with one id, spread evenly over the vocabulary."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments.data import ngrams

BIG = 2**31
texts = st.text(st.sampled_from("ab_9é .+(\n\t中"), max_size=40) | st.text(max_size=30)


def naive_words(text: str, lengths: range) -> list[tuple]:
    data = " ".join(text.split()).encode("utf-8", "replace")
    words = re.findall(rb"[0-9A-Za-z_\x80-\xff]+|[^ ]", data)
    return [tuple(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1)]


def naive_bytes(text: str, lengths: range) -> list[bytes]:
    data = " ".join(text.split()).encode("utf-8", "replace")
    return [data[i : i + n] for n in lengths for i in range(len(data) - n + 1)]


def pairs(text: str) -> list[tuple[object, int]]:
    """Each n-gram, by a plain loop, with the id at its place."""
    words, characters = naive_words(text, range(1, 4)), naive_bytes(text, range(2, 9))
    ids = ngrams.hashed_ngrams(text, vocabulary=BIG, words=(1, 3), characters=(2, 8)).tolist()
    return list(zip([*words, *characters], ids, strict=True))


@given(texts)
@settings(deadline=None, max_examples=50)
def test_every_ngram_in_order_one_id_each(text):
    """As many ids as n-grams; equal n-grams have equal ids and others (of 2**31) different ones."""
    found = pairs(text)
    distinct = {gram for gram, _ in found}
    assert len(set(found)) == len(distinct)
    assert len({number for _, number in found}) == len(distinct)


def test_ids_do_not_depend_on_the_text_around():
    first, second = dict(pairs("def f(x): return json")), dict(pairs("import json\n\n  def f"))
    shared = set(first) & set(second)
    assert {b"json", (b"json",), (b"def", b"f"), b"def f"} <= shared
    assert all(first[gram] == second[gram] for gram in shared)


def test_order_and_repetition_matter():
    ids = dict(pairs("a b b a ab aab"))
    assert ids[(b"a", b"b")] != ids[(b"b", b"a")]
    assert ids[(b"ab",)] != ids[(b"aab",)]


def test_white_space_counts_as_one_blank():
    np.testing.assert_array_equal(ngrams.hashed_ngrams("  a \n\t b "), ngrams.hashed_ngrams("a b"))


@pytest.mark.parametrize("vocabulary", [1, 2, 1000, 1 << 20, 2**31])
def test_ids_fill_the_vocabulary(vocabulary):
    text = " ".join(str(number) for number in range(3000))
    ids = ngrams.hashed_ngrams(text, vocabulary=vocabulary, words=(1, 1), characters=None)
    assert ids.dtype == np.int32
    assert ids.min() >= 0
    assert ids.max() < vocabulary
    cells = min(vocabulary, 50)
    counts = np.bincount(ids.astype(np.int64) * cells // vocabulary, minlength=cells)
    expected = np.diff(-(-np.arange(cells + 1) * vocabulary // cells)) / vocabulary * ids.size
    assert cells == 1 or stats.chisquare(counts, expected).pvalue > 1e-4


def test_collisions_are_as_many_as_chance_has():
    """Distinct n-grams in n cells: n (1 - exp(-grams / n)) are filled, within 4 standard deviations."""
    text = " ".join(str(number) for number in range(20_000))
    cells = 1 << 15
    for kind in ({"words": (2, 2), "characters": None}, {"words": None, "characters": (8, 8)}):
        distinct = len(np.unique(ngrams.hashed_ngrams(text, vocabulary=BIG, **kind)))
        filled = len(np.unique(ngrams.hashed_ngrams(text, vocabulary=cells, **kind)))
        load = distinct / cells
        deviation = np.sqrt(cells * np.exp(-load) * (1 - (1 + load) * np.exp(-load)))
        assert abs(filled - cells * (1 - np.exp(-load))) < 4 * deviation


def test_the_seed_picks_another_function():
    text = "one two three"
    first = ngrams.hashed_ngrams(text, seed=0)
    np.testing.assert_array_equal(first, ngrams.hashed_ngrams(text, seed=0))
    assert not np.array_equal(first, ngrams.hashed_ngrams(text, seed=1))


@pytest.mark.parametrize("text", ["", "   \n", "a", "\ud800"])
def test_short_texts(text):
    count = len(naive_words(text, range(1, 3))) + len(naive_bytes(text, range(3, 6)))
    assert ngrams.hashed_ngrams(text).size == count
    assert ngrams.hashed_ngrams(text, words=None, characters=None).size == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": 0}, "vocabulary=0"),
        ({"vocabulary": 2**31 + 1}, "vocabulary="),
        ({"words": (0, 1)}, r"words=\(0, 1\)"),
        ({"words": (3, 2)}, r"words=\(3, 2\)"),
        ({"characters": (1, 9)}, r"characters=\(1, 9\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ngrams.hashed_ngrams("text", **arguments)


def test_bags_are_the_texts_one_after_the_other():
    given_texts = ["import os", "", "x", "import os"]
    bags = ngrams.bags(iter(given_texts), vocabulary=1000, seed=7)
    assert len(bags) == 4
    assert bags.offsets[0] == 0
    assert bags.offsets[-1] == bags.ids.size
    for row, text in enumerate(given_texts):
        own = bags.ids[bags.offsets[row] : bags.offsets[row + 1]]
        np.testing.assert_array_equal(own, ngrams.hashed_ngrams(text, vocabulary=1000, seed=7))


def test_no_bags():
    bags = ngrams.bags([])
    assert len(bags) == 0
    ids, filled = bags.padded(np.zeros(0, np.int64), 3)
    assert ids.shape == filled.shape == (0, 3)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=10), st.integers(1, 20))
@settings(deadline=None, max_examples=50)
def test_padded_bags_keep_all_or_spread(lengths, capacity):
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    bags = ngrams.Bags(np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets)
    rows = np.arange(len(lengths))[::-1]
    ids, filled = bags.padded(rows, capacity)
    for row, own, full in zip(rows, ids, filled, strict=True):
        whole = bags.ids[offsets[row] : offsets[row + 1]]
        kept = own[full]
        assert full.sum() == min(len(whole), capacity)
        assert (own[~full] == 0).all()
        if len(whole) <= capacity:
            np.testing.assert_array_equal(kept, whole)
        else:
            assert kept[0] == whole[0]
            gaps = np.diff([*kept, whole[-1] + 1])
            assert gaps.min() >= len(whole) // capacity
            assert gaps.max() <= -(-len(whole) // capacity)


def test_padding_needs_room():
    with pytest.raises(ValueError, match="capacity=0"):
        ngrams.bags(["a"]).padded(np.arange(1), 0)


def test_frequencies_survive():
    ids = Counter(ngrams.hashed_ngrams("a a a b", vocabulary=BIG, words=(1, 1), characters=None).tolist())
    assert sorted(ids.values()) == [1, 3]
