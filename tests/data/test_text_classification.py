"""Facts of the text sets, and a vocabulary that knows its training rows alone."""

import gzip

import numpy as np
import pytest

from experiments.data import files
from experiments.data import text_classification as sets

needs_data = pytest.mark.skipif(files.data_folder() is None, reason="HASHML_DATA is not set")


@needs_data
@pytest.mark.parametrize("name", list(sets.SETS))
def test_facts(name):
    facts = sets.SETS[name]
    for part, rows in (("train", facts.train), ("test", facts.test)):
        texts, labels = sets.load(name, part)
        assert len(texts) == len(labels) == rows
        assert set(labels.tolist()) == set(range(facts.classes))
        assert all(texts)


@needs_data
def test_splits_are_disjoint_and_the_same_again():
    first = sets.splits("sst2", size=500, length=12, rows=600, seed=3)
    again = sets.splits("sst2", size=500, length=12, rows=600, seed=3)
    assert [len(part) for part in first] == [500, 100, 1821]
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.inputs, two.inputs)
    assert first.train.inputs.max() == 499
    other = sets.splits("sst2", size=500, length=12, rows=600, seed=4)
    assert (first.validation.inputs != other.validation.inputs).any()


def test_words_and_vocabulary():
    assert sets.words("It's GOOD, 42% (good)!") == ["it's", "good", ",", "42", "%", "(", "good", ")", "!"]
    numbers = sets.vocabulary(["b a", "b c", "a b"], size=4)
    assert numbers == {"b": 2, "a": 3}
    np.testing.assert_array_equal(sets.encode(["b zebra a b", ""], numbers, 3), [[2, 1, 3], [0, 0, 0]])


def test_ties_go_by_the_alphabet():
    assert sets.vocabulary(["z y x"], size=4) == {"x": 2, "y": 3}


def test_take():
    texts = sets.Texts(np.arange(6, dtype=np.int32).reshape(3, 2), np.array([0, 1, 0], np.int32))
    np.testing.assert_array_equal(texts.take(np.array([2, 0])).inputs, [[4, 5], [0, 1]])
    assert len(texts.take(slice(1))) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sets.load("imdb", "train"), "name='imdb' must be one of sst2, ag_news, mr"),
        (lambda: sets.load("sst2", "dev"), "part='dev' must be 'train' or 'test'"),
        (lambda: sets.vocabulary(["a"], 2), "size is 2; a vocabulary has padding"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HASHML_DATA", str(tmp_path))
    folder = tmp_path / "text_classification"
    folder.mkdir()
    (folder / "sst2_train.tsv.gz").write_bytes(gzip.compress(b"1\ta text\n"))
    with pytest.raises(files.ChecksumMismatch, match="sha256"):
        sets.load("sst2", "train")
