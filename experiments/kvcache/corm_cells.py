"""The caches of `experiments.kvcache.corm`, and what is measured of them and of the models' queries and votes."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.kvcache import fixtures, harness, recall
from experiments.kvcache.attention_rows import held_out_rows
from experiments.kvcache.contenders import Setting, contender
from experiments.kvcache.fixtures import DEFAULT, Size, Trained
from experiments.kvcache.token_budgets import follow, in_bytes, in_tokens, row_bytes
from hashml.kvcache.corm import Corm
from hashml.kvcache.persistence import adjacent_cosine, vote_overlap
from hashml.kvcache.spec import LayerSpec, batch_spec
from hashml.kvcache.window_vote import at_least_mean
from hashml.models.decoder import decoder_model

AnyArray = Array | np.ndarray
SCORES = ("nll", "rehearsed", "unrehearsed", "accuracy", "tokens_kept")
"""What rows have of `fixtures.row_of`."""


@dataclasses.dataclass(frozen=True)
class Config(Trained):
    """The defaults are those of the claims."""

    models: tuple[str, ...] = ("f1", "recall")
    widths: tuple[int, ...] = (8, 16, 32, 64)
    """w = r of the language model's caches without a budget."""
    recall_widths: tuple[int, ...] = (4, 8, 16, 32)
    """w = r of the recall model's."""
    overlaps: tuple[int, ...] = (4, 8, 16, 32)
    """w of the overlap of votes."""
    recall_budgets: tuple[int, ...] = (2, 3)
    """Tokens of a sequence over those that are kept."""
    rivals: tuple[str, ...] = ("h2o", "random", "window")
    size: Size = DEFAULT


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cache: without a budget, of ``width`` w = r, or of recall, of a ``budget``; None for both where all tokens
    stay."""

    fixture: str
    method: str
    width: int | None = None
    budget: int | None = None


def cells(config: Config) -> list[Cell]:
    """All caches; every one is a program of its own."""
    found = []
    for fixture in config.models:
        widths = config.recall_widths if fixture == "recall" else config.widths
        found.append(Cell(fixture, "full"))
        found += [Cell(fixture, name, width) for width in widths for name in ("corm", *config.rivals)]
    if "recall" in config.models:
        budgets = config.recall_budgets
        found += [Cell("recall", name, None, budget) for budget in budgets for name in ("corm", *config.rivals)]
    return found


# --- queries and votes --------------------------------------------------------------------------------


def cosines(config: Config, fixture: str, layer: int, seed: int) -> dict[str, float]:
    """Mean cosines of adjacent queries of a layer, and of random pairs, before and after rotation."""
    rows, found = held_out_rows(config.size, fixture, seed), {}
    order = np.random.default_rng(seed).permutation(rows.probs.shape[-1])
    for name, queries in (("", rows.queries[layer]), ("_rotated", rows.rotated[layer])):
        found[f"adjacent{name}"] = float(adjacent_cosine(queries).mean())
        found[f"random_pairs{name}"] = float(adjacent_cosine(queries[..., order, :]).mean())
    return found


def overlap(config: Config, fixture: str, layer: int, width: int, seed: int) -> dict[str, float]:
    """Means over the queries of the second half of a layer: attention on keys with one of the last w votes or of the
    query's own, without the own one, and the share of the keys that these are."""
    probs = held_out_rows(config.size, fixture, seed).probs[layer]
    found = {
        "overlap": vote_overlap(probs, width),
        "overlap_voted": vote_overlap(probs, width, recents=0),
        "share_of_keys": share_of_keys(probs, width),
    }
    return {name: float(each[..., each.shape[-1] // 2 :].mean()) for name, each in found.items()}


@functools.partial(jax.jit, static_argnames="queries")
def share_of_keys(probs: Float[AnyArray, "B H T T"], queries: int) -> Float[Array, "B H T"]:
    """Share of the keys a query sees that one of the ``queries`` before it voted for, or that are its own: the
    attention on a random set of that size, on average."""
    tokens = probs.shape[-1]
    seen = np.tri(tokens, dtype=bool)
    valid = jnp.broadcast_to(seen, (probs.shape[0], 1, 1, tokens, tokens))
    votes = at_least_mean(jnp.asarray(probs)[:, :, None], valid)[:, :, 0]
    total = jnp.pad(jnp.cumsum(votes.astype(jnp.int32), axis=-2), ((0, 0), (0, 0), (1, 0), (0, 0)))
    t = np.arange(tokens)
    voted = total[..., t, :] - total[..., np.maximum(t - queries, 0), :] > 0
    return (voted | np.eye(tokens, dtype=bool)).sum(axis=-1) / (t + 1)


# --- caches -------------------------------------------------------------------------------------------


def scores(config: Config, cell: Cell) -> list[dict[str, Any]]:
    """All seeds of a cell, which share a program."""
    if cell.method == "corm" and cell.width is not None:
        return unlimited(config, cell.fixture, cell.width)
    return _fixed(config, cell)


@functools.lru_cache(maxsize=2)
def _fixed(config: Config, cell: Cell) -> list[dict[str, Any]]:
    """A cache of fixed size."""
    setting, layers = _setting(config, cell.fixture, cell.width), layers_of(config, cell)
    first = _first(setting, cell.fixture)
    found = []
    for row in fixtures.scores(config.size, cell.fixture, "decode", layers, config.trained(cell.fixture)):
        shares = _shares(setting, layers, cast(float, row["tokens_kept"]), first)
        peak = min(layers[0].capacity, setting.tokens) / setting.tokens
        found.append({name: row[name] for name in SCORES} | shares | {"peak_share": peak})
    return found


def layers_of(config: Config, cell: Cell) -> tuple[LayerSpec, ...]:
    """A cache of fixed size: a rival gets the mean bytes of CORM without a budget, rounded up to a token, or those of
    CORM with one."""
    setting = _setting(config, cell.fixture, cell.width)
    if cell.width is not None:
        mean = float(np.mean([row["kept_bytes"] for row in unlimited(config, cell.fixture, cell.width)]))
        return in_bytes(cell.method, setting, mean, round_up=True)
    if cell.budget is None:
        return contender("full", setting)
    own = in_tokens("corm", setting, setting.tokens // cell.budget)
    return own if cell.method == "corm" else in_bytes(cell.method, setting, row_bytes(setting, own))


@functools.lru_cache(maxsize=8)
def unlimited(config: Config, fixture: str, width: int) -> list[dict[str, Any]]:
    """CORM without a budget, w = r = ``width``."""
    setting = _setting(config, fixture, width)
    model = decoder_model(setting.decoder)
    layers = in_tokens("corm", setting, setting.tokens, Corm(queries=width))
    tokens, targets, _ = fixtures.texts(config.size, fixture)
    fed, first = (jnp.asarray(tokens), jnp.asarray(targets)), _first(setting, fixture)
    found = []
    for seed in range(config.trained(fixture)):
        params = fixtures.params(config.size, fixture, seed)
        kept = follow(model, batch_spec(layers, len(tokens)), params, *fed, jax.random.key(seed))
        scored = harness.Scores(kept.nll, kept.correct, kept.held.mean(axis=(1, 2, 3)))
        one = harness.Model(params, (), jax.random.key(seed), tokens, targets)
        row = fixtures.row_of(config.size, fixture, "decode", layers, seed, one, scored)
        shares = _shares(setting, layers, cast(float, row["tokens_kept"]), first)
        peak = {"peak_share": float(kept.held.max()) / setting.tokens}
        found.append({name: row[name] for name in SCORES} | shares | peak)
    return found


def _first(setting: Setting, fixture: str) -> int:
    """The first of the tokens that count."""
    return recall.QUESTIONS if fixture == "recall" else setting.tokens // 2


def _setting(config: Config, fixture: str, width: int | None) -> Setting:
    common = fixtures.setting(config.size, fixture, "decode")
    return common if width is None else dataclasses.replace(common, window=width, queries=width)


def _shares(setting: Setting, layers: Sequence[LayerSpec], kept: float, first: int) -> dict[str, float]:
    """Tokens and bytes that are held, mean over the tokens from ``first`` on, beside those of an exact cache that
    holds all tokens seen by then."""
    seen = (first + 1 + setting.tokens) / 2
    held = bytes_of(setting, layers, kept)
    exact = bytes_of(setting, contender("full", setting), seen)
    return {"kept_share": kept / seen, "kept_bytes": held, "bytes_share": held / exact}


def bytes_of(setting: Setting, layers: Sequence[LayerSpec], tokens: float) -> float:
    """Bytes of one row's cache if it were as large as ``tokens``, on average, need: all parts grow with the slots."""
    one, two = (row_bytes(setting, [dataclasses.replace(layer, slots=n) for layer in layers]) for n in (1, 2))
    return one + (two - one) * (tokens - layers[0].window - 1)
