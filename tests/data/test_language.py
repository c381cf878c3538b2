"""Text as bytes: the facts of the files, and how sequences are cut from them."""

import itertools

import numpy as np
import pytest

from experiments.data import language
from experiments.data.counter import stream
from experiments.data.files import DataNotFound

TEXT = np.arange(100, dtype=np.uint8)


def test_wikitext2_has_the_published_tokens(require_data):
    """217,646 and 245,569 tokens, an <eos> for each line counted."""
    for part, tokens in (("valid", 217_646), ("test", 245_569)):
        require_data(f"wikitext2/{part}.txt.gz")
        text = language.read(f"wikitext2/{part}.txt.gz").tobytes()
        assert len(text.split()) + text.count(b"\n") == tokens
        assert b"<unk>" in text
    train, validation, test = language.splits("wikitext2")
    assert train.tobytes() + validation.tobytes() == language.read("wikitext2/valid.txt.gz").tobytes()
    assert train[-1] == validation[-1] == ord("\n")
    assert validation.size / (train.size + validation.size) == pytest.approx(0.05, abs=0.002)
    assert b"Robert <unk>" in test.tobytes()[:40]


def test_tiny_shakespeare(require_data):
    require_data("tiny_shakespeare/input.txt.gz")
    parts = list(language.splits("tiny_shakespeare"))
    text = np.concatenate(parts)
    assert text.size == 1_115_394
    assert np.unique(text).size == 65
    assert language.to_text(text[:14].astype(np.int32)) == "First Citizen:"
    assert [part.size / text.size for part in parts] == pytest.approx([0.9, 0.05, 0.05], abs=0.001)


def test_stdlib_parts_share_no_file():
    parts = language.splits("stdlib", seed=1)
    assert all(part.size > 100_000 for part in parts)
    assert b"def " in parts.test.tobytes()
    heads = [{part.tobytes()[i : i + 200] for i in range(0, 20_000, 200)} for part in parts]
    assert all(not a & b for a, b in itertools.combinations(heads, 2))


def test_sequences_begin_with_bos_and_do_not_overlap():
    found = language.sequences(TEXT, 11)
    assert found.shape == (10, 11)
    assert (found[:, 0] == language.BOS).all()
    np.testing.assert_array_equal(found[:, 1:].ravel(), TEXT)
    np.testing.assert_array_equal(language.sequences(TEXT, 11, 2), found[[0, 5]])
    assert language.to_text(language.sequences(np.frombuffer(b"hello!", np.uint8), 7)[0]) == "hello!"


def test_crops_are_pieces_from_everywhere():
    key = stream(0, "crops")
    found = np.concatenate([language.crops(TEXT, 4, 50, key=key, step=step) for step in range(40)])
    assert (found[:, 0] == language.BOS).all()
    assert (np.diff(found[:, 1:]) == 1).all()
    # All 98 places that a piece of 3 fits to, about evenly: 2,000 draws, chi-square of 97 degrees of freedom.
    counts = np.bincount(found[:, 1], minlength=98)
    assert counts.size == 98
    assert ((counts - 2000 / 98) ** 2 / (2000 / 98)).sum() < 97 + 5 * np.sqrt(2 * 97)
    np.testing.assert_array_equal(language.crops(TEXT, 4, 50, key=key, step=3), found[150:200])


def test_bad_input(no_data):
    with pytest.raises(ValueError, match="file='wikitext2/train.txt.gz' must be one of"):
        language.read("wikitext2/train.txt.gz")
    with pytest.raises((ValueError, TypeError), match="name"):
        language.splits("text8")  # pyright: ignore[reportArgumentType] that is the point
    with pytest.raises(ValueError, match="count is 11; the text has 10 sequences of 11 tokens"):
        language.sequences(TEXT, 11, 11)
    with pytest.raises(ValueError, match="length is 1; it must be at least 2"):
        language.sequences(TEXT, 1)
    with pytest.raises(ValueError, match="length is 102; .* text of 100 bytes"):
        language.crops(TEXT, 102, 1, key=0, step=0)
    with pytest.raises(DataNotFound, match="wikitext2: no file wikitext2/valid.txt.gz"):
        language.splits("wikitext2")
