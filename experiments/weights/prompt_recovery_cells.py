"""The cells of `experiments.weights.prompt_recovery`: a model made small, what is put before its text, and scores."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from experiments.data import language
from experiments.data.counter import stream
from experiments.kvcache import fixtures
from experiments.weights import compressed_models as models
from hashml.models.decoder import DecoderConfig, Params
from hashml.weights.prompt_recovery import diluted, prompted_nll, start_prompt
from hashml.weights.quantize_model import dequantize_params
from hashml.weights.quantized import preset, stored_bits_per_weight

HOME: language.Name = "wikitext2"
"""What the model was trained on, and what its compression costs is measured on."""
AWAY: language.Name = "tiny_shakespeare"
FULL = "full"
COMPRESSIONS = ("rtn3", "rtn2", "gptq3", "prune50", "rtn4+prune50")
ADAPTED = ("query", "value")
"""Kernels with adapters, as in LoRA's paper: with all of them rank 1 would have more floats than a prompt."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Models, prompts and what they are compared with; the defaults are those of the claims."""

    compressions: tuple[str, ...] = COMPRESSIONS
    prompt_tokens: int = 32
    """Rows n of a prompt, bytes of a hard one."""
    short: int = 16
    """Rows of a shorter one, for"""
    short_models: tuple[str, ...] = (FULL, "rtn3", "rtn2")
    """these."""
    away_models: tuple[str, ...] = (FULL, "rtn3", "rtn2")
    """Whose prompts are learned on the other text, too."""
    hard: int = 4
    """Pieces of training text that are tried as a hard prompt."""
    steps: int = 500
    search_steps: int = 100
    """Of each learning rate that is tried, on the model of seed 0; they divide ``steps``."""
    batch_size: int = 8
    """Pieces of a step, each of"""
    sequence: int = 64
    """tokens."""
    scored: int = 128
    """Pieces of test text, and of validation text."""
    prompt_rates: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
    adapter_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    seeds: int = 3
    """Models f1, each with an order of batches of its own."""
    size: fixtures.Size = models.SIZE


@dataclasses.dataclass(frozen=True)
class Cell:
    """A model, what is put before its text or beside its kernels, and where that was learned."""

    model: str
    method: str
    """none, untrained, hard, prompt or adapters."""
    prompt_tokens: int
    source: str | None = None
    """The model that a prompt was learned on."""
    learned_on: language.Name | None = None


def cells(config: Config) -> list[Cell]:
    """Prompts of each model itself, then those of another model, then those of another text."""
    n, found = config.prompt_tokens, []
    everything = (FULL, *config.compressions)
    for model in everything:
        found += [Cell(model, "none", 0), Cell(model, "untrained", n), Cell(model, "hard", n, None, HOME)]
        found += [Cell(model, "prompt", n, model, HOME), Cell(model, "adapters", 0, model, HOME)]
        if model in config.short_models:
            found.append(Cell(model, "prompt", config.short, model, HOME))
    found += [Cell(model, "prompt", n, source, HOME) for source in everything for model in everything
              if source != model]  # fmt: skip
    found += [Cell(model, "prompt", n, model, AWAY) for model in config.away_models if model in everything]
    return found


# --- models -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=24)
def compressed(config: Config, name: str, seed: int) -> tuple[Params, float]:
    """A model with dense kernels, and bits a weight of its kernels as they would be stored.

    Half of the weights are 0 after pruning: the others are stored, and a bit for each says which.
    """
    if not re.fullmatch(r"full|prune50|rtn[1-4](\+prune50)?|gptq[1-4]", name):
        raise ValueError(f"name is {name!r}; allowed are {FULL}, {', '.join(COMPRESSIONS)} and others of their kind")
    model, params = models.decoder_config(config.size), fixtures.params(config.size, "f1", seed)
    bits = 16.0
    if name.endswith("prune50"):
        params = models.pruned(params, model, 0.5)
        bits = 1 + bits / 2
    if name.startswith("rtn"):
        params = models.rounded(params, model, preset("rtn", int(name[3])))
    elif name.startswith("gptq"):
        params = models.quantized(config.size, seed, preset("gptq", int(name[4])))
    if name not in (FULL, "prune50"):
        shapes, total = models.kernel_shapes(model), 0.0
        for kernel, matrix in models.kernels(params, model).items():
            own = stored_bits_per_weight(matrix)
            # Codes of weights that are 0 need not be stored; the grid is.
            own -= (matrix.bits / 2 - 1) if name.endswith("prune50") else 0
            total += own * np.prod(shapes[kernel])
        bits = float(total / sum(np.prod(shape) for shape in shapes.values()))
    return dequantize_params(params), bits


# --- what is learned ----------------------------------------------------------------------------------


def prompt_loss(prompt: Array, params: Params, tokens: Array, config: DecoderConfig) -> Float[Array, ""]:
    return prompted_nll(prompt, params, config, tokens).mean()


def rank_of(config: Config) -> int:
    """Of adapters with as many floats as a prompt.

    Raises:
        ValueError: if there is no such rank.
    """
    model = models.decoder_config(config.size)
    shapes = models.kernel_shapes(model)
    each = sum(shapes[name][0] * sum(shapes[name][1:]) for name in ADAPTED)
    floats = config.prompt_tokens * model.features
    if floats % each:
        raise ValueError(f"prompt_tokens is {config.prompt_tokens}; its {floats} floats must be a multiple of the "
                         f"{each} of a rank")  # fmt: skip
    return floats // each


def _learn(config: Config, cell: Cell, rate: float, steps: int, seed: int) -> Any:
    """A prompt ``[n, d]``, or adapters, of the cell's source."""
    assert cell.source is not None
    assert cell.learned_on is not None
    model, (params, _) = models.decoder_config(config.size), compressed(config, cell.source, seed)
    tokens = models.batches(cell.learned_on, config.sequence, config.batch_size, steps, seed)
    if cell.method == "prompt":
        began = start_prompt(params, cell.prompt_tokens)
        return models.tune(prompt_loss, began, params, tokens, rate, model, config.search_steps)
    drawn = models.draw_adapters(jax.random.key(seed), params, model, rank_of(config), names=ADAPTED)
    return models.tune(models.adapted_loss, drawn, params, tokens, rate, model, config.search_steps)


@functools.lru_cache(maxsize=256)
def learned(config: Config, method: str, n: int, source: str, text: language.Name, seed: int) -> tuple[Any, float]:
    """What is learned on a model, and its learning rate."""
    cell = Cell(source, method, n, source, text)
    rate = chosen_rate(config, cell)
    return _learn(config, cell, rate, config.steps, seed), rate


@functools.lru_cache(maxsize=64)
def chosen_rate(config: Config, cell: Cell) -> float:
    """The learning rate of the least validation loss after few steps, on the model of seed 0."""
    rates = config.prompt_rates if cell.method == "prompt" else config.adapter_rates
    if len(rates) == 1:
        return rates[0]
    assert cell.learned_on is not None
    validation, _ = models.held_out(cell.learned_on, config.sequence, config.scored)
    losses = [
        _mean(config, cell, _learn(config, cell, rate, config.search_steps, 0), 0, validation) for rate in rates
    ]
    return rates[int(np.nanargmin(losses))]


@functools.lru_cache(maxsize=64)
def hard_prompt(config: Config, name: str, seed: int) -> Int32[np.ndarray, " n"]:
    """The best of some pieces of training text, on validation text."""
    train, key = language.splits(HOME).train, stream(seed, "hard prompt")
    pieces = language.crops(train, config.prompt_tokens + 1, config.hard, key=key, step=0)[:, 1:]
    validation, _ = models.held_out(HOME, config.sequence, config.scored)
    cell, (params, _) = Cell(name, "hard", config.prompt_tokens), compressed(config, name, seed)
    losses = [_mean(config, cell, params["embedding"][piece], seed, validation) for piece in pieces]
    return pieces[int(np.argmin(losses))]


# --- scores -------------------------------------------------------------------------------------------


def scores(config: Config, cell: Cell, seed: int) -> dict[str, Any]:
    """Nats a byte of the same real tokens on both texts, and what the released evaluation would make of the first."""
    (params, bits), rate = compressed(config, cell.model, seed), None
    before: Any = start_prompt(params, cell.prompt_tokens) if cell.method == "untrained" else None
    if cell.method == "hard":
        before = params["embedding"][hard_prompt(config, cell.model, seed)]
    elif cell.source is not None:
        assert cell.learned_on is not None
        before, rate = learned(config, cell.method, cell.prompt_tokens, cell.source, cell.learned_on, seed)
    home, away = (_mean(config, cell, before, seed, models.held_out(text, config.sequence, config.scored)[1])
                  for text in (HOME, AWAY))  # fmt: skip
    rates = config.prompt_rates if cell.method == "prompt" else config.adapter_rates
    trained = 0 if rate is None else sum(leaf.size for leaf in jax.tree.leaves(before))
    places = jnp.full((1, config.sequence - 1), home)
    return {
        "nll": home,
        "away_nll": away,
        "diluted": float(diluted(places, cell.prompt_tokens)),
        "trained_floats": trained,
        "learning_rate": rate,
        "at_the_edge": None if rate is None else len(rates) > 1 and rate in (min(rates), max(rates)),
        "bits_per_weight": bits,
    }


def _mean(config: Config, cell: Cell, before: Any, seed: int, tokens: Int32[np.ndarray, "n T"]) -> float:
    """Loss of the cell's model over tokens, behind a prompt or beside adapters."""
    model, (params, _) = models.decoder_config(config.size), compressed(config, cell.model, seed)
    if cell.method in ("none", "adapters"):
        return models.mean_nll(models.merged(params, before or {}), model, tokens)
    parts = [tokens[at : at + 32] for at in range(0, len(tokens), 32)]
    return float(np.concatenate([np.asarray(_nll(before, params, part, config=model)) for part in parts]).mean())


@functools.partial(jax.jit, static_argnames="config")
def _nll(prompt: Array, params: Params, tokens: Array, *, config: DecoderConfig) -> Array:
    return prompted_nll(prompt, params, config, tokens).mean(axis=1)
