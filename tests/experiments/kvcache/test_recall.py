"""The recall task: the structure of its sequences, and a model of it."""

import dataclasses
from typing import Any

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


def test_the_long_layout_is_as_it_says():
    """Sixteen pairs, eight of them rehearsed, read back by a loop."""
    data = recall.sequences(50, KEY, layout=recall.LONG)
    for tokens, targets, rehearsed, unrehearsed in zip(*data, strict=True):
        keys = [p for p in range(256) if 1 <= tokens[p] <= 20]
        pairs, rehearsals, questions = keys[:16], keys[16:24], keys[24:]
        assert all(place in range(1, 144, 2) for place in pairs)
        assert all(place in range(146, 219, 2) for place in rehearsals)
        assert questions == list(range(224, 256, 2))
        values = {int(tokens[p]): int(tokens[p + 1]) for p in pairs}
        assert len(values) == 16
        asked = [*rehearsals, *questions]
        assert [int(targets[p]) for p in asked] == [values[int(tokens[p])] for p in asked]
        assert set(np.flatnonzero(targets >= 0)) == set(asked)
        assert {int(tokens[p]) for p in questions} == set(values)
        again = {int(tokens[p]) for p in rehearsals}
        assert len(again) == 8
        assert set(tokens[rehearsed]) == again
        assert set(tokens[unrehearsed]) == set(values) - again


def test_an_asked_pair_is_where_its_key_stood_first():
    data = recall.sequences(50, KEY)
    places = recall.asked_pairs(data.tokens, data.targets)
    assert ((places >= 0) == (data.targets >= 0)).all()
    for row, column in zip(*np.nonzero(data.targets >= 0), strict=True):
        place = places[row, column]
        assert place in range(1, 36, 2)
        assert data.tokens[row, place] == data.tokens[row, column]
        assert data.tokens[row, place + 1] == data.targets[row, column]


def test_without_rehearsals_filler_stands_in_their_place():
    data = recall.sequences(500, KEY)
    bare = recall.without_rehearsals(data, stream(5, "test"))
    early = (data.targets >= 0) & (np.arange(96) < 80)
    gone = early | np.roll(early, 1, axis=1)
    np.testing.assert_array_equal(bare.tokens[~gone], data.tokens[~gone])
    counts = np.bincount(bare.tokens[gone], minlength=62)
    assert counts[:41].sum() == 0
    mean = 500 * 8 / 21
    assert np.abs(counts[41:] - mean).max() < 5 * np.sqrt(mean)
    np.testing.assert_array_equal(bare.targets, np.where(early, -1, data.targets))
    assert bare.rehearsed is data.rehearsed


def test_layouts_that_do_not_fit_are_refused():
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"pairs": 19}, r"pair_places is \(1, 35\) and rehearsal_places \(38, 76\); each must rise"),
        ({"length": 92}, "end before the questions at 76"),
        ({"pair_places": (1, 37)}, "each must rise, pairs first"),
        ({"pair_places": (1, 13)}, "pairs is 8; there is room for 1 to 7"),
        ({"rehearsal_places": (70, 74)}, "rehearsed is 4; there is room for 1 to 3"),
        ({"rehearsed": 0}, "rehearsed is 0; there is room for 1 to 8"),
    )
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            recall.Layout(**options)


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
