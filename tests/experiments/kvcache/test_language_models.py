"""Models that are trained once: found again, refused when damaged, and better than a unigram."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.data import language
from experiments.kvcache import language_models

DECODER = dataclasses.replace(
    language_models.F1.decoder, features=32, layers=1, heads=1, kv_heads=1, hidden=64, context=32
)
TINY = dataclasses.replace(
    language_models.F1, name="tiny", decoder=DECODER, steps=150, rows=16, learning_rate=1e-2, warmup=10
)


@pytest.fixture(autouse=True)
def needs_text():
    folder = os.environ.get("HASHML_DATA")
    if not folder or not (Path(folder) / "wikitext2/valid.txt.gz").is_file():
        pytest.skip(f"needs wikitext2 under $HASHML_DATA, which is {folder or 'not set'}")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hashml" / "models"


def test_a_short_training_is_better_than_a_unigram(cache, capsys):
    """The loss on the test text is below the entropy of single bytes, which knows no context."""
    told = []
    params = language_models.trained(TINY, 0, lambda done, steps, loss: told.append((done, steps)))
    test = language.splits("wikitext2").test
    share = np.bincount(test, minlength=256) / test.size
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert language_models.held_out_nll(TINY, params, sequences=64) < entropy - 0.1
    assert told == [(step, 150) for step in range(1, 151)]


def test_a_model_is_trained_once_and_a_damaged_file_again(cache):
    recipe, told = dataclasses.replace(TINY, steps=2), []

    def count(done: int, steps: int, loss: float) -> None:
        told.append(done)

    first = language_models.trained(recipe, 0, count)
    (path,) = cache.iterdir()
    assert path.name.startswith("tiny-")
    assert path.name.endswith("-seed0.safetensors")
    again = language_models.trained(recipe, 0, count)
    assert told == [1, 2]
    assert jax.tree.structure(first) == jax.tree.structure(again)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    # Another seed, and another recipe, are other files.
    geometry = dataclasses.asdict(recipe)
    names = {
        language_models.file_of("tiny", geometry | change, seed) for change in ({}, {"steps": 3}) for seed in (0, 1)
    }
    assert len(names) == 4
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.warns(UserWarning, match="checksum disagrees.*trained anew"):
        repaired = language_models.trained(recipe, 0, count)
    assert told == [1, 2, 1, 2]
    assert path.read_bytes() == whole
    np.testing.assert_array_equal(repaired["embedding"], first["embedding"])


def test_the_models_are_those_of_the_protocol():
    """Sizes, and parameters counted by hand: embedding, four layers, norms."""
    for recipe, kv_heads, mlp in (
        (language_models.F1, 4, 3 * 128 * 344),
        (language_models.F1_RELU_GQA, 2, 2 * 128 * 512),
    ):
        decoder = recipe.decoder
        assert (decoder.layers, decoder.features, decoder.heads, decoder.head_dim) == (4, 128, 4, 32)
        assert decoder.rotary is not None
        assert decoder.rotary.pairs == "half"
        params = jax.eval_shape(lambda d=decoder: language_models.init_params(jax.random.key(0), d))
        attention = 2 * 128 * 128 + 2 * 128 * 32 * kv_heads
        expected = 257 * 128 + 4 * (attention + mlp + 2 * 128) + 128
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected
    assert language_models.F1_RELU_GQA.decoder.activation == "relu"


def test_progress_ends_with_a_line(capsys):
    progress = language_models.tell("model", every=1000)
    progress(1, 2, 3.0)
    progress(2, 2, 2.5)
    assert capsys.readouterr().err.startswith("model: step 2/2, loss 2.500, ")
