"""The recall task: the structure of its sequences, and a model of it."""

import dataclasses

import numpy as np
import pytest

from experiments.data.counter import stream
from experiments.kvcache import recall

KEY = stream(3, "test")


def test_every_sequence_is_as_the_recipe_says():
    """Read back by a loop: pairs, rehearsals, questions, blanks and filler are where they belong."""
    data = recall.sequences(200, KEY)
    for tokens, targets, rehearsed, unrehearsed in zip(*data, strict=True):
        assert tokens[0] == recall.BOS
        places = [p for p in range(1, 38) if 1 <= tokens[p] <= 20]
        assert len(places) == 8
        assert all(place % 2 == 1 for place in places)
        pairs = {int(tokens[p]): int(tokens[p + 1]) for p in places}
        assert len(pairs) == 8
        assert all(21 <= value <= 40 for value in pairs.values())
        rehearsals = [p for p in range(38, 80) if 1 <= tokens[p] <= 20]
        assert len(rehearsals) == 4
        assert len({int(tokens[p]) for p in rehearsals}) == 4
        assert all(p <= 76 for p in rehearsals)
        questions = list(range(80, 96, 2))
        assert {int(tokens[p]) for p in questions} == set(pairs)
        for place in (*rehearsals, *questions):
            assert targets[place] == pairs[int(tokens[place])]
            assert tokens[place + 1] == recall.BLANK
        again = {int(tokens[p]) for p in rehearsals}
        assert [p for p in range(96) if rehearsed[p]] == [p for p in questions if int(tokens[p]) in again]
        assert [p for p in range(96) if unrehearsed[p]] == [p for p in questions if int(tokens[p]) not in again]
        asked = {*rehearsals, *questions}
        used = {0, *places, *(p + 1 for p in places), *asked, *(p + 1 for p in asked)}
        assert all(41 <= tokens[p] <= 61 for p in range(96) if p not in used)
        assert all(targets[p] == -1 for p in range(96) if p not in asked)


def test_places_and_tokens_are_drawn_evenly():
    data = recall.sequences(2000, KEY)
    for low, high, columns, each in ((1, 21, slice(1, 38), 8), (21, 41, slice(1, 38), 8), (41, 62, slice(78, 80), 2)):
        part = data.tokens[:, columns]
        counts = np.bincount(part[(part >= low) & (part < high)], minlength=high)[low:high]
        mean = 2000 * each / (high - low)
        assert np.abs(counts - mean).max() < 5 * np.sqrt(mean)


def test_sequences_are_a_stream():
    data = recall.sequences(10, KEY)
    np.testing.assert_array_equal(recall.sequences(4, KEY, 6).tokens, data.tokens[6:])
    assert (recall.sequences(10, stream(4, "test")).tokens != data.tokens).any()
    with pytest.raises(ValueError, match="count is 0; it must be at least 1"):
        recall.sequences(0, KEY)


def test_a_training_lowers_the_loss_and_is_kept(monkeypatch, tmp_path):
    """Sixty steps teach that the answer is a value, one of 20 and not one of 64."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = dataclasses.replace(recall.RECALL.decoder, features=32, heads=1, kv_heads=1, hidden=32)
    recipe = dataclasses.replace(recall.RECALL, decoder=small, steps=60, rows=16, learning_rate=1e-2, warmup=10)
    losses = []
    params = recall.trained(recipe, 0, lambda done, steps, loss: losses.append(loss))
    assert np.mean(losses[-5:]) < np.log(20) + 0.2 < np.log(64) < losses[0]
    assert (recall.trained(recipe, 0)["embedding"] == params["embedding"]).all()
    shares = recall.held_out_accuracy(recipe, params, count=32)
    assert all(0 <= share <= 1 for share in shares)
    assert len(list(tmp_path.glob("hashml/models/recall-*-seed0.safetensors"))) == 1
