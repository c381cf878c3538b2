"""The counting task: the structure of its sequences, and a model of it."""

import dataclasses

import numpy as np
import pytest

from experiments.data.counter import stream
from experiments.kvcache import counting, recall

KEY = stream(3, "test")


def test_every_sequence_has_one_token_that_is_far_more_frequent():
    tokens, targets = counting.sequences(200, KEY)
    assert tokens.shape == targets.shape == (200, 96)
    assert (tokens[:, 0] == recall.BOS).all()
    assert (tokens[:, -1] == counting.QUESTION).all()
    assert (targets[:, :-1] == -1).all()
    for row, answer in zip(tokens[:, 1:-1], targets[:, -1], strict=True):
        counts = np.bincount(row, minlength=64)
        assert counts[answer] == 12
        others = np.delete(counts[41:62], answer - 41)
        # 82 places among 20 others: two of these have one more.
        assert sorted(others) == [4] * 18 + [5] * 2
    assert counting.QUESTION not in range(*recall.FILLER)


def test_answers_and_places_are_drawn_evenly():
    """The answer is any of 21, and it is as often early as late."""
    tokens, targets = counting.sequences(4200, KEY)
    counts = np.bincount(targets[:, -1], minlength=62)[41:]
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200)
    found = (tokens == targets[:, -1:])[:, 1:-1].sum(axis=0)
    mean = 4200 * 12 / 94
    assert np.abs(found - mean).max() < 5 * np.sqrt(mean)


def test_sequences_are_a_stream():
    tokens, targets = counting.sequences(10, KEY)
    again = counting.sequences(4, KEY, 6)
    np.testing.assert_array_equal(again[0], tokens[6:])
    np.testing.assert_array_equal(again[1], targets[6:])
    assert (counting.sequences(10, stream(4, "test"))[0] != tokens).any()
    with pytest.raises(ValueError, match="count is 0; it must be at least 1"):
        counting.sequences(0, KEY)


def test_a_training_teaches_to_count_and_is_kept(monkeypatch, tmp_path):
    """A small model of one layer soon answers far more than a guess, 1 of 21."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = dataclasses.replace(counting.COUNTING.decoder, features=32, layers=1, heads=1, kv_heads=1, hidden=32)
    recipe = dataclasses.replace(counting.COUNTING, decoder=small, steps=80, learning_rate=1e-2, warmup=10)
    params = counting.trained(recipe, 0)
    assert counting.held_out_accuracy(recipe, params, count=64) > 0.5
    assert (counting.trained(recipe, 0)["embedding"] == params["embedding"]).all()
    assert len(list(tmp_path.glob("hashml/models/counting-*-seed0.safetensors"))) == 1
