"""The caches of `experiments.kvcache.scissorhands`, and what is measured of them and of the models' attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kvcache import fixtures, recall
from experiments.kvcache.attention_rows import held_out_rows
from experiments.kvcache.contenders import contender
from experiments.kvcache.fixtures import DEFAULT, Size, Trained
from experiments.kvcache.token_budgets import follow, in_bytes, in_tokens, row_bytes
from hashml.kvcache.persistence import persistence_ratio
from hashml.kvcache.scissorhands import Scissorhands
from hashml.kvcache.spec import LayerSpec, batch_spec
from hashml.models.decoder import decoder_model

SCISSORHANDS = ("scissorhands", "scissorhands_1", "scissorhands+int4")
"""These keep a number of tokens; their rivals take as many bytes."""


@dataclasses.dataclass(frozen=True)
class Config(Trained):
    """Budgets are tokens of a sequence over B; the defaults are those of the claims."""

    text_budgets: tuple[int, ...] = (2, 4, 5)
    recall_budgets: tuple[int, ...] = (2, 3)
    rivals: tuple[str, ...] = ("random", "window", "h2o")
    histories: tuple[int, ...] = (8, 16, 32, recall.LENGTH)
    """w of the part on history; the last is all of a sequence."""
    size: Size = DEFAULT


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cache. ``budget`` is None where all tokens stay, ``history`` where w is the fixture's own; with ``per_query``
    low scores are divided by the queries that saw the key."""

    part: str
    fixture: str
    method: str
    budget: int | None = None
    history: int | None = None
    per_query: bool = False


def cells(config: Config) -> list[Cell]:
    """All caches; every one is a program of its own."""
    found = [Cell("budget", "f1", "full"), Cell("budget", "f1", "int4")]
    for budget in config.text_budgets:
        methods = ("scissorhands", "scissorhands+int4", *config.rivals)
        found += [Cell("budget", "f1", method, budget) for method in methods]
    for budget in config.recall_budgets:
        methods = ("scissorhands", "scissorhands_1", *config.rivals)
        found += [Cell("budget", "recall", method, budget) for method in methods]
    found += [Cell("history", "recall", "scissorhands_1", 2, w) for w in config.histories]
    return found + [Cell("history", "recall", "scissorhands_1", 2, w, True) for w in config.histories[-1:]]


def layers_of(config: Config, cell: Cell) -> tuple[LayerSpec, ...]:
    """The cache of a cell."""
    setting = fixtures.setting(config.size, cell.fixture, "decode")
    if cell.budget is None:
        return contender(cell.method, setting)
    tokens = setting.tokens // cell.budget
    if cell.method not in SCISSORHANDS:
        return in_bytes(cell.method, setting, row_bytes(setting, in_tokens("scissorhands", setting, tokens)))
    policy = None
    if cell.history is not None:
        policy = Scissorhands(queries=cell.history, drop=1, per_query=cell.per_query)
    return in_tokens(cell.method, setting, tokens, policy)


def persistence(config: Config, fixture: str, layer: int, seed: int) -> dict[str, float]:
    """Of a layer of a model: over heads and sequences, mean and median of the ratio, and the level of random sets."""
    ratio, share = persistence_ratio(held_out_rows(config.size, fixture, seed).probs[layer])
    return {"ratio": float(ratio.mean()), "median": float(jnp.median(ratio)), "random_level": float(share.mean())}


@functools.lru_cache(maxsize=2)
def scores(config: Config, cell: Cell) -> list[dict[str, float | int | None]]:
    """All seeds of a cell, which share a program."""
    rows = fixtures.scores(config.size, cell.fixture, "decode", layers_of(config, cell), config.trained(cell.fixture))
    names = ("nll", "rehearsed", "unrehearsed", "accuracy", "bytes_per_token", "tokens_kept")
    return [{name: row[name] for name in names} for row in rows]


@functools.lru_cache(maxsize=2)
def histories(config: Config, cell: Cell) -> list[dict[str, float | int | None]]:
    """Accuracy, and the share of what is kept, at the final questions, that a window of that size would keep."""
    model = decoder_model(fixtures.setting(config.size, cell.fixture, "decode").decoder)
    tokens, targets, places = fixtures.texts(config.size, cell.fixture)
    spec = batch_spec(layers_of(config, cell), len(tokens))
    found = []
    for seed in range(config.trained(cell.fixture)):
        params = fixtures.params(config.size, cell.fixture, seed)
        kept = follow(model, spec, params, jnp.asarray(tokens), jnp.asarray(targets), jax.random.key(seed))
        share = (kept.newest[recall.QUESTIONS :] / kept.held[recall.QUESTIONS :]).mean()
        right = np.asarray(kept.correct)[places["accuracy"]].mean()
        found.append({"accuracy": float(right), "newest": float(share)})
    return found
