"""The cells of `experiments.kvcache.frontier`: which cache, of which size, on which model, and what it scores."""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import numpy as np

from experiments.data import language
from experiments.data.counter import stream
from experiments.kvcache import harness, language_models, recall
from experiments.kvcache.contenders import Setting, contender
from hashml.accounting import stored_bytes
from hashml.kvcache.calibration import calibrate_coupled, calibrate_nonuniform
from hashml.kvcache.contract import Codec
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.kvquant import NonUniformKeys
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerTables
from hashml.kvcache.think import ThinK
from hashml.models.decoder import Params, decoder_model


@dataclasses.dataclass(frozen=True)
class Config:
    """Models, budgets and contenders; the defaults are those of the claims."""

    fixtures: tuple[str, ...] = ("f1", "recall")
    """Models: f1, f1_relu_gqa (grouped queries), recall."""
    budgets: tuple[int, ...] = (2, 4, 8)
    """Bytes of the exact cache over those of a policy."""
    recall_budgets: tuple[int, ...] = (2, 3, 4, 8)
    together_budgets: tuple[int, ...] = (2, 4)
    """Of compositions, and of compressed prompts."""
    policies: tuple[str, ...] = ("window", "streaming", "random", "keynorm", "tova", "h2o", "keyformer", "corm",
                                 "scissorhands", "scissorhands_1")  # fmt: skip
    codecs: tuple[str, ...] = ("int8", "fp8", "int4", "int2", "kivi:4", "kivi:2", "kvquant:3", "coupled:2c8b",
                               "coupled:4c8b", "coupled:8c8b")  # fmt: skip
    together: tuple[str, ...] = ("scissorhands+int4", "h2o+coupled:4c8b")
    prompt: tuple[str, ...] = ("window", "random", "h2o", "snapkv", "pyramidkv", "adakv", "snapkv+think:0.4")
    """Policies of compressed prompts, beside which the exact cache and ThinK alone are shown."""
    rows: int = 16
    """Sequences that the language model is scored on."""
    recall_rows: int = 128
    calibration: int = 64
    """Sequences of training text that codebooks are learned from, and twice as many of the recall model's."""
    lloyd: int = 10
    """Iterations of k-means."""
    length: int = 256
    """Tokens of the language model's sequences."""
    text_window: int = 10
    recall_window: int = 6
    layers: int = 4
    features: int = 128
    text_steps: int = language_models.F1.steps
    recall_steps: int = recall.RECALL.steps
    seeds: int = 3
    """Models of each kind."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One contender: which model, how the cache is filled, what it is, and how large."""

    fixture: str
    protocol: str
    method: str
    budget: int | None


def cells(config: Config) -> list[Cell]:
    """All contenders."""
    found = []
    for fixture in config.fixtures:
        budgets = config.recall_budgets if fixture == "recall" else config.budgets
        decode = [("full", None), *((name, None) for name in config.codecs)]
        decode += [(name, budget) for name in config.policies for budget in budgets]
        decode += [(name, budget) for name in config.together for budget in config.together_budgets]
        prompt: list[tuple[str, int | None]] = [("full", None), ("think:0.4", None)]
        prompt += [(name, budget) for name in config.prompt for budget in config.together_budgets]
        for protocol, methods in (("decode", decode), ("prompt", prompt)):
            found += [Cell(fixture, protocol, method, budget) for method, budget in methods]
    return found


# --- models, texts and tables -------------------------------------------------------------------------


def text_recipe(config: Config, fixture: str) -> language_models.Recipe:
    """The recipe of a language model at the config's size."""
    recipe = language_models.RECIPES[fixture]
    scale = config.features / recipe.decoder.features
    heads, kv_heads = (max(1, round(n * scale)) for n in (recipe.decoder.heads, recipe.decoder.kv_heads))
    decoder = dataclasses.replace(recipe.decoder, features=config.features, layers=config.layers, heads=heads,
                                  kv_heads=kv_heads, hidden=round(recipe.decoder.hidden * scale),
                                  context=config.length)  # fmt: skip
    return dataclasses.replace(recipe, decoder=decoder, steps=config.text_steps)


def setting(config: Config, fixture: str, protocol: str) -> Setting:
    """What all contenders share."""
    if fixture == "recall":
        prompt = recall.QUESTIONS if protocol == "prompt" else 0
        return Setting(recall.RECALL.decoder, recall.LENGTH, config.recall_window, queries=16, prompt=prompt)
    prompt = config.length // 2 if protocol == "prompt" else 0
    return Setting(text_recipe(config, fixture).decoder, config.length, config.text_window, prompt=prompt)


@functools.lru_cache(maxsize=16)
def _params(config: Config, fixture: str, seed: int) -> Params:
    progress = language_models.tell(f"training {fixture}, seed {seed}")
    if fixture == "recall":
        recipe = dataclasses.replace(recall.RECALL, steps=config.recall_steps)
        return recall.trained(recipe, seed, progress)
    return language_models.trained(text_recipe(config, fixture), seed, progress)


@functools.lru_cache(maxsize=4)
def _fed(config: Config, fixture: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Tokens, targets, and the places of a recall model's questions."""
    if fixture == "recall":
        data = recall.held_out(config.recall_rows)
        places = {"rehearsed": data.rehearsed, "unrehearsed": data.unrehearsed}
        return data.tokens, data.targets, places | {"accuracy": data.rehearsed | data.unrehearsed}
    test = language.splits(language_models.RECIPES[fixture].text).test
    tokens = language.sequences(test, config.length, config.rows)
    return tokens, harness.next_tokens(tokens), {}


@functools.lru_cache(maxsize=32)
def _tables(config: Config, fixture: str, seed: int, codecs: tuple[Codec, Codec]) -> tuple[LayerTables, ...]:
    """What the codecs learn from training sequences, kept beside the models; nothing where they learn nothing."""
    decoder = setting(config, fixture, "decode").decoder
    learn = {Coupled: calibrate_coupled, NonUniformKeys: calibrate_nonuniform}.get(type(codecs[0]))
    if learn is None:
        return (LayerTables(),) * decoder.layers
    if fixture == "recall":
        text = recall.sequences(2 * config.calibration, stream(seed, "recall", "calibration")).tokens
    else:
        train = language.splits(language_models.RECIPES[fixture].text).train
        text = language.sequences(train, config.length, config.calibration)
    params = _params(config, fixture, seed)
    arguments: Any = (jax.random.key(seed), decoder_model(decoder), params, [text], *codecs)

    def make() -> Params:
        progress = language_models.tell(f"codebooks of {codecs[0]}, {fixture}, seed {seed}")
        found = learn(*arguments, iterations=config.lloyd, progress=progress)
        return {f"layer{i}": {"keys": layer.keys, "values": layer.values} for i, layer in enumerate(found)}

    # They depend on the model to the last bit, however it came to be.
    model = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))).hexdigest()
    geometry = {"codecs": repr(codecs), "model": model, "iterations": config.lloyd, "sequences": text.shape[0]}
    books = language_models.kept(f"{fixture}-tables", geometry, seed, make)
    return tuple(LayerTables(**books[f"layer{i}"]) for i in range(decoder.layers))


# --- the measurement ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def scores(config: Config, cell: Cell) -> list[dict[str, float | int | None]]:
    """All seeds of a contender, which share a program."""
    common = setting(config, cell.fixture, cell.protocol)
    layers = contender(cell.method, common, cell.budget)
    model = decoder_model(common.decoder)
    tokens, targets, places = _fed(config, cell.fixture)
    models = [
        harness.Model(
            _params(config, cell.fixture, seed),
            _tables(config, cell.fixture, seed, _codecs(layers[0])),
            jax.random.key(seed),
        )
        for seed in range(config.seeds)
    ]
    size = harness.row_bytes(model, layers).total / common.tokens
    found = []
    for each, (scores, seconds) in zip(
        models, harness.decode_all(model, layers, models, tokens, targets, prompt=common.prompt), strict=True
    ):
        row: dict[str, float | int | None] = {name: harness.share_correct(scores, at) for name, at in places.items()}
        scored = np.arange(common.tokens) >= (recall.QUESTIONS if places else common.tokens // 2)
        found.append(
            {
                "nll": None if places else harness.second_half_nll(scores, targets),
                **(row or dict.fromkeys(("rehearsed", "unrehearsed", "accuracy"))),
                "bytes_per_token": size,
                "table_bytes": stored_bytes(each.tables),
                "tokens_kept": float(np.asarray(scores.kept)[scored].mean()),
                "tokens_per_second": tokens.shape[0] * (common.tokens - common.prompt) / seconds,
            }
        )
    return found


def _codecs(layer: LayerSpec) -> tuple[Codec, Codec]:
    keys = layer.key_codec
    return (keys.inner if isinstance(keys, ThinK) else keys), layer.value_codec
