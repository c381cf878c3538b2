"""The models that caches are judged on: their parameters, texts and codebooks, and what a cache scores on them.

``f1`` and ``f1_relu_gqa`` are language models of `experiments.kvcache.language_models`, ``recall`` is the model of
`experiments.kvcache.recall`, ``stories`` is stories260K, a published model. Every experiment with a cache takes a
`Size`, and finds what another has trained. A seed picks the model that was trained with it; of ``stories`` there is
one, and a seed picks stories that it tells itself, at temperature 1: what a cache adds to their loss is then its
divergence from the exact one.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int32

from experiments.data import language, stories
from experiments.data.counter import stream
from experiments.kvcache import harness, language_models, recall
from experiments.kvcache.contenders import Setting
from hashml.accounting import stored_bytes
from hashml.kvcache.calibration import calibrate_coupled, calibrate_nonuniform
from hashml.kvcache.contract import Codec
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.kvquant import NonUniformKeys
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerTables
from hashml.kvcache.tables import bare
from hashml.models.decoder import Params, decoder_model
from hashml.models.generation import generate

Protocol = Literal["decode", "prompt"]
"""Every token through the cache, or half of the tokens as a prompt that is compressed once."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How large models are and how much they are scored on; the defaults are those of the claims."""

    rows: int = 16
    """Sequences that a language model is scored on."""
    recall_rows: int = 128
    calibration: int = 64
    """Sequences of training text that codebooks are learned from, and twice as many of the recall model's."""
    lloyd: int = 10
    """Iterations of k-means."""
    length: int = 256
    """Tokens of a language model's sequences."""
    text_window: int = 10
    """Newest tokens that are exact."""
    recall_window: int = 6
    layers: int = 4
    features: int = 128
    text_steps: int = language_models.F1.steps
    recall_steps: int = recall.RECALL.steps


DEFAULT = Size()
TINY = Size(rows=2, recall_rows=4, calibration=2, lloyd=2, length=48, text_window=4, layers=1, features=32,
             text_steps=3, recall_steps=2)  # fmt: skip
"""For tests: seconds, and no model that has learned anything."""
_CALIBRATION = 1000
"""Seeds of the stories that codebooks are learned from begin here: none of them is scored."""
PAPER = Size(rows=64, recall_rows=512, lloyd=100)


# --- models, texts and tables -------------------------------------------------------------------------


def text_recipe(size: Size, fixture: str) -> language_models.Recipe:
    """The recipe of a language model at this size."""
    recipe = language_models.RECIPES[fixture]
    ratio = size.features / recipe.decoder.features
    heads, kv_heads = (max(1, round(n * ratio)) for n in (recipe.decoder.heads, recipe.decoder.kv_heads))
    decoder = dataclasses.replace(recipe.decoder, features=size.features, layers=size.layers, heads=heads,
                                  kv_heads=kv_heads, hidden=round(recipe.decoder.hidden * ratio),
                                  context=size.length)  # fmt: skip
    return dataclasses.replace(recipe, decoder=decoder, steps=size.text_steps)


def setting(size: Size, fixture: str, protocol: Protocol) -> Setting:
    """What all contenders share."""
    if fixture == "stories":
        prompt = size.length // 2 if protocol == "prompt" else 0
        return Setting(stories.load().config, size.length, size.text_window, prompt=prompt)
    if fixture == "recall":
        prompt = recall.QUESTIONS if protocol == "prompt" else 0
        return Setting(recall.RECALL.decoder, recall.LENGTH, size.recall_window, queries=16, prompt=prompt)
    prompt = size.length // 2 if protocol == "prompt" else 0
    return Setting(text_recipe(size, fixture).decoder, size.length, size.text_window, prompt=prompt)


@functools.lru_cache(maxsize=16)
def params(size: Size, fixture: str, seed: int) -> Params:
    """The parameters of a model, trained now where the user's cache has none."""
    if fixture == "stories":
        return stories.load().params
    progress = language_models.tell(f"training {fixture}, seed {seed}")
    if fixture == "recall":
        recipe = dataclasses.replace(recall.RECALL, steps=size.recall_steps)
        return recall.trained(recipe, seed, progress)
    return language_models.trained(text_recipe(size, fixture), seed, progress)


def told(key: int, rows: int, length: int) -> Int32[np.ndarray, "{rows} {length}"]:
    """Stories of stories260K, each after BOS; a story that ends is followed by another."""
    params, config, _ = stories.load()
    said = generate(decoder_model(config), params, [[stories.BOS]] * rows, length - 1, key=jax.random.key(key))
    return np.array([[stories.BOS, *row] for row in said], np.int32)


@functools.lru_cache(maxsize=16)
def texts(size: Size, fixture: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Tokens, targets, and the places of a recall model's questions; ``seed`` is for ``stories`` alone."""
    if fixture == "stories":
        tokens = told(seed, size.rows, size.length)
        return tokens, harness.next_tokens(tokens), {}
    if fixture == "recall":
        data = recall.held_out(size.recall_rows)
        places = {"rehearsed": data.rehearsed, "unrehearsed": data.unrehearsed}
        return data.tokens, data.targets, places | {"accuracy": data.rehearsed | data.unrehearsed}
    test = language.splits(language_models.RECIPES[fixture].text).test
    tokens = language.sequences(test, size.length, size.rows)
    return tokens, harness.next_tokens(tokens), {}


def calibration_text(size: Size, fixture: str, seed: int) -> Int32[np.ndarray, "B T"]:
    """Training sequences that codebooks are learned from; none of them is scored."""
    if fixture == "stories":
        return told(_CALIBRATION + seed, size.calibration, size.length)
    if fixture == "recall":
        return recall.sequences(2 * size.calibration, stream(seed, "recall", "calibration")).tokens
    train = language.splits(language_models.RECIPES[fixture].text).train
    return language.sequences(train, size.length, size.calibration)


@functools.lru_cache(maxsize=32)
def tables(
    size: Size, fixture: str, seed: int, codecs: tuple[Codec, Codec], *, fisher: bool = True
) -> tuple[LayerTables, ...]:
    """What the codecs learn from training sequences, weighted by Fisher information or not at all, kept beside the
    models; nothing where they learn nothing."""
    decoder = setting(size, fixture, "decode").decoder
    learn = {Coupled: calibrate_coupled, NonUniformKeys: calibrate_nonuniform}.get(type(codecs[0]))
    if learn is None:
        return (LayerTables(),) * decoder.layers
    text = calibration_text(size, fixture, seed)
    trained = params(size, fixture, seed)
    arguments: Any = (jax.random.key(seed), decoder_model(decoder), trained, [text], *codecs)

    def make() -> Params:
        weighting = "" if fisher else ", uniform weights"
        progress = language_models.tell(f"codebooks of {codecs[0]}{weighting}, {fixture}, seed {seed}")
        found = learn(*arguments, fisher=fisher, iterations=size.lloyd, progress=progress)
        return {f"layer{i}": {"keys": layer.keys, "values": layer.values} for i, layer in enumerate(found)}

    # They depend on the model to the last bit, however it came to be.
    model = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trained))).hexdigest()
    geometry = {"codecs": repr(codecs), "model": model, "iterations": size.lloyd, "sequences": text.shape[0]}
    geometry |= {} if fisher else {"weights": "uniform"}
    books = language_models.kept(f"{fixture}-tables", geometry, seed, make)
    return tuple(LayerTables(**books[f"layer{i}"]) for i in range(decoder.layers))


# --- the measurement ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trained:
    """How many models of a kind an experiment measures on; the same ones for all of its caches."""

    seeds: int = 3
    """Language models, each minutes of training, and samples of stories."""
    recall_seeds: int = 8
    """Recall models: half a minute each, and no two forget alike."""

    def trained(self, fixture: str) -> int:
        """Models of a kind."""
        return self.recall_seeds if fixture == "recall" else self.seeds


def fed_models(
    size: Size, fixture: str, layers: Sequence[LayerSpec], seeds: int, *, fisher: bool = True
) -> list[harness.Model]:
    """The models of seeds 0 to ``seeds - 1`` with what the codecs of a cache learn, and what they are fed."""
    found = []
    for seed in range(seeds):
        tokens, targets, _ = texts(size, fixture, seed)
        learned = tables(size, fixture, seed, codecs_of(layers[0]), fisher=fisher)
        found.append(harness.Model(params(size, fixture, seed), learned, jax.random.key(seed), tokens, targets))
    return found


def scores(
    size: Size, fixture: str, protocol: Protocol, layers: Sequence[LayerSpec], seeds: int, *, fisher: bool = True
) -> list[dict[str, float | int | None]]:
    """What a cache scores on the models of seeds 0 to ``seeds - 1``, which share a program: loss of a language model
    (``nll``), or accuracies of a recall model and the loss of its answers (``answer_nll``), bytes a token of the
    cache and of its tables, tokens kept. ``fisher`` is of `tables`."""
    common = setting(size, fixture, protocol)
    model = decoder_model(common.decoder)
    models = fed_models(size, fixture, layers, seeds, fisher=fisher)
    scored = harness.decode_all(model, layers, models, prompt=common.prompt)
    return [
        row_of(size, fixture, protocol, layers, seed, one, found)
        for seed, (one, found) in enumerate(zip(models, scored, strict=True))
    ]


def row_of(
    size: Size,
    fixture: str,
    protocol: Protocol,
    layers: Sequence[LayerSpec],
    seed: int,
    one: harness.Model,
    scored: harness.Scores,
) -> dict[str, float | int | None]:
    """The numbers of `scores` for one model."""
    common = setting(size, fixture, protocol)
    places = texts(size, fixture, seed)[2]
    row: dict[str, float | int | None] = {name: harness.share_correct(scored, at) for name, at in places.items()}
    counted = np.arange(common.tokens) >= (recall.QUESTIONS if places else common.tokens // 2)
    return {
        "nll": None if places else harness.second_half_nll(scored, one.targets),
        **(row or dict.fromkeys(("rehearsed", "unrehearsed", "accuracy"))),
        "answer_nll": float(np.asarray(scored.nll)[places["accuracy"]].mean()) if places else None,
        "bytes_per_token": harness.row_bytes(decoder_model(common.decoder), layers).total / common.tokens,
        "table_bytes": stored_bytes(one.tables),
        "tokens_kept": float(np.asarray(scored.kept)[counted].mean()),
    }


def codecs_of(layer: LayerSpec) -> tuple[Codec, Codec]:
    """Codecs of keys and values; behind a choice of channels, or beside exact first tokens, the one that codes."""
    return bare(layer.key_codec), bare(layer.value_codec)
